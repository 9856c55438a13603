package vmprobes

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/vmprobes/vmprobes/linux"
)

// errNoHit: registers are asked for what only those of a hit have.
var errNoHit = errors.New("these are not the registers of a hit, in its handler")

// Task returns the task that the vCPU runs. It works in handlers and while a Hit
// is valid. The kernel's types must be known, from its own memory or from
// Options.Types.
func (r *Regs) Task() (linux.Task, error) {
	if r.mem == nil || r.past {
		return linux.Task{}, fmt.Errorf("vmprobes: current task: %w", errNoHit)
	}
	return r.kernel.Current(r.GSBase)
}

// A Call is a call of a function, as [Probe.Call] describes it. All texts in it are
// printable ASCII, whatever the guest has in its memory.
type Call struct {
	Function string // as in "do_sys_openat2"
	// Syscall is the name of the system call, as in "openat", if Function is its
	// wrapper and Args are the system call's; else "".
	Syscall string
	Args    []CallArg
}

// A CallArg is an argument of a Call.
type CallArg struct {
	Name  string // of the parameter, "" if it has none
	Type  string // in C, as in "const char *"
	Value uint64 // as it is in the register, or in the first of a struct's two
	// Text is Value as C has it: a number, a constant's name, an address. A string is
	// the quoted text that Value points to, of 256 bytes at the most, or the address
	// if it can't be read; "?" stands for a value that can't be read.
	Text string
	Err  error // why Value can't be read, or nil
}

// String returns the call as in
//
//	do_sys_openat2(dfd=-100, filename="/etc/passwd", how=0xffffc900003f7ef0)
func (c Call) String() string {
	args := make([]string, len(c.Args))
	for i, a := range c.Args {
		args[i] = a.String()
	}
	return c.Function + "(" + strings.Join(args, ", ") + ")"
}

// String returns the argument as in "dfd=-100".
func (a CallArg) String() string {
	if a.Name == "" {
		return a.Text
	}
	return a.Name + "=" + a.Text
}

// Call describes the call that the vCPU is at the beginning of, with the names
// and types that the guest's kernel has for the arguments. p must be at the first
// instruction of a function, and r its registers there. The arguments of a system
// call's wrapper are those of the system call. Arguments on the stack are left out.
//
// Of a function that the kernel has no prototype of, the error wraps ErrNoPrototype.
func (p *Probe) Call(r *Regs) (Call, error) {
	s, err := p.attached()
	if err != nil {
		e := &Error{Op: "describe a call", Err: err}
		if p != nil {
			e.Domain, e.Probe = p.domain(), p.location()
		}
		return Call{}, e
	}
	if r == nil {
		return Call{}, s.fail("describe a call", p, errNoHit)
	}
	fn, err := s.function(p)
	if err != nil {
		return Call{}, s.fail("describe a call", p, err)
	}
	c := Call{Function: fn.Symbol.Name, Syscall: fn.Syscall, Args: make([]CallArg, len(fn.Params))}
	for i, param := range fn.Params {
		a := CallArg{Name: param.Name, Type: param.Type}
		if fn.Syscall != "" {
			a.Value, a.Err = r.wrapperArg(fn.Wrapper, param.Reg)
		} else {
			a.Value = r.Arg(param.Reg)
		}
		switch {
		case a.Err != nil:
			a.Text = "?"
		case param.Text:
			a.Text = p.quoted(a.Value)
		default:
			a.Text = param.Format(a.Value)
		}
		c.Args[i] = a
	}
	return c, nil
}

// quoted returns the string at a pointer, in quotes.
func (p *Probe) quoted(v uint64) string {
	if v == 0 {
		return "NULL"
	}
	const limit = 256
	text, err := p.ReadString(v, limit)
	if err != nil {
		return hex(v) // not resident, perhaps
	}
	return strconv.QuoteToASCII(text)
}

func hex(v uint64) string { return fmt.Sprintf("%#x", v) }

// function returns how the function is called that p is at.
func (s *Session) function(p *Probe) (*linux.Function, error) {
	p.mu.Lock()
	fn, addr := p.function, p.addr
	p.mu.Unlock()
	if fn != nil {
		return fn, nil
	}
	if s.kernel == nil {
		return nil, fmt.Errorf("%w: %w", ErrNoPrototype, s.noKernel())
	}
	fn, err := s.kernel.Function(addr)
	if err != nil {
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.session == s && p.addr == addr {
		p.function = fn
	}
	return fn, nil
}
