package vmprobes

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/vmprobes/vmprobes/ktype"
	"github.com/vmprobes/vmprobes/linux"
)

// ErrNoPrototype: the guest's kernel doesn't tell what the arguments are.
var ErrNoPrototype = errors.New("the function's arguments are not known")

// Task returns the task that the vCPU runs. It works in handlers and while a Hit
// is valid. The kernel's types must be known, from its own memory or from
// Options.Types.
func (r *Regs) Task() (linux.Task, error) {
	if r.kernel == nil {
		return linux.Task{}, errors.New("vmprobes: these registers are of no vCPU whose kernel is known")
	}
	return r.kernel.Current(r.GSBase)
}

// A parameter of a probed function.
type parameter struct {
	name   string
	value  func(*Regs) (uint64, error)
	format func(uint64) string
	text   bool // a pointer to a string
}

// signature is how a probed function is called.
type signature struct {
	name   string
	params []parameter
}

// Call describes the call that the vCPU is at the beginning of, with the names
// and types that the guest's kernel has for the arguments, as in
//
//	do_sys_openat2(dfd=-100, filename="/etc/passwd", how=0xffffc900003f7ef0)
//
// p must be at the first instruction of a function, and r its registers there.
// Strings are quoted and at most 256 bytes long; one that isn't in memory shows
// as an address. Functions that the kernel has no prototype of give ErrNoPrototype.
func (p *Probe) Call(r *Regs) (string, error) {
	p.mu.Lock()
	s, sig := p.session, p.sig
	p.mu.Unlock()
	if s == nil {
		return "", &Error{Op: "describe a call", Domain: p.domain(), Probe: p.location(), Err: ErrNotRegistered}
	}
	if sig == nil {
		var err error
		if sig, err = s.signature(p.Address()); err != nil {
			return "", s.fail("describe a call", p, err)
		}
		p.mu.Lock()
		p.sig = sig
		p.mu.Unlock()
	}
	args := make([]string, len(sig.params))
	for i, a := range sig.params {
		v, err := a.value(r)
		switch {
		case err != nil:
			args[i] = "?"
		case a.text:
			args[i] = s.quoted(p, v)
		default:
			args[i] = a.format(v)
		}
		if a.name != "" {
			args[i] = a.name + "=" + args[i]
		}
	}
	return sig.name + "(" + strings.Join(args, ", ") + ")", nil
}

// quoted returns the string at a pointer.
func (s *Session) quoted(p *Probe, v uint64) string {
	if v == 0 {
		return "NULL"
	}
	const limit = 256
	text, err := p.ReadString(Addr(v), limit)
	if err != nil {
		return hex(v) // not resident, perhaps
	}
	return strconv.QuoteToASCII(text)
}

func hex(v uint64) string { return fmt.Sprintf("%#x", v) }

// signature finds out how the function at addr is called.
func (s *Session) signature(addr Addr) (*signature, error) {
	name, off, ok := s.Symbolize(addr)
	if !ok || off != 0 {
		return nil, fmt.Errorf("%#x: %w: it isn't where a function begins", addr, ErrNoPrototype)
	}
	if s.guest == nil || s.guest.Linux() == nil {
		return nil, ErrNoPrototype
	}
	k := s.guest.Linux()
	types, err := k.Types()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNoPrototype, err)
	}
	sig := &signature{name: name}
	if call, ok := strings.CutPrefix(name, "__x64_sys_"); ok {
		if sc, err := k.Syscall(call); err == nil {
			for i, a := range sc.Args {
				sig.params = append(sig.params, parameter{
					name:   a.Name,
					value:  func(r *Regs) (uint64, error) { return r.SyscallArg(i) },
					format: formatter(types, a.Type),
					text:   isText(a.Type, a.Name),
				})
			}
			return sig, nil
		}
	}
	proto, err := types.Prototype(name)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNoPrototype, err)
	}
	for i, a := range proto.Params {
		if i == 6 { // the rest is on the stack
			break
		}
		sig.params = append(sig.params, parameter{
			name:   a.Name,
			value:  func(r *Regs) (uint64, error) { return r.Arg(i), nil },
			format: a.Format,
			text:   isText(a.Type.Decl(""), a.Name),
		})
	}
	return sig, nil
}

// isText says whether a char pointer is likely a string rather than a buffer:
// the kernel's sources call the latter buf.
func isText(typ, name string) bool {
	t := strings.ReplaceAll(strings.ReplaceAll(typ, "__user ", ""), " ", "")
	return t == "constchar*" && name != "buf" && name != "u_buf"
}

// formatter returns how a value of a C type is written.
func formatter(types *ktype.Types, typ string) func(uint64) string {
	if t, err := types.Type(strings.TrimSpace(strings.TrimPrefix(typ, "const "))); err == nil {
		return t.Format
	}
	return hex
}
