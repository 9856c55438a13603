package linux

import (
	"errors"
	"fmt"
	"strings"

	"github.com/vmprobes/vmprobes/ktype"
	"github.com/vmprobes/vmprobes/sysmap"
)

// ErrNoPrototype: the kernel's types don't have a function's arguments.
var ErrNoPrototype = errors.New("the function's arguments are not known")

// A Function is how a function of the kernel is called.
type Function struct {
	Symbol sysmap.Symbol
	// Syscall is the name of a system call, if the function is its wrapper and the
	// kernel describes it, else "". Then Params are those of the system call, and the
	// arguments are where [SyscallArgOffset] says, not in the argument registers.
	Syscall string
	Params  []Param
}

// A Param is a parameter of a function. Its texts are printable ASCII.
type Param struct {
	Name string // "" if it has none
	Type string // in C, as in "const char *"
	// Text says that the value points to a string rather than to a buffer.
	Text bool

	format func(uint64) string
}

// Format returns a value of the parameter as C has it.
func (p Param) Format(v uint64) string {
	if p.format == nil {
		return fmt.Sprintf("%#x", v)
	}
	return p.format(v)
}

// maxParams is how many arguments registers hold, both of a function (System V ABI
// for AMD64, 3.2.3) and of a system call.
const maxParams = 6

// Function returns how the function that begins at addr is called. Of more than six
// parameters, those that are passed on the stack are left out. The error wraps
// ErrNoPrototype if no function begins there, or if its prototype isn't known.
func (k *Kernel) Function(addr uint64) (*Function, error) {
	if k == nil {
		return nil, ErrNoKernel
	}
	sym, off, ok := k.Find(addr)
	if !ok || off != 0 {
		return nil, fmt.Errorf("%#x: %w: no function begins there", addr, ErrNoPrototype)
	}
	types, err := k.Types()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNoPrototype, err)
	}
	f := &Function{Symbol: sym}
	if call, ok := wrapped(sym.Name); ok {
		if sc, err := k.Syscall(call); err == nil {
			f.Syscall = call
			for _, a := range sc.Args {
				f.add(a.Name, a.Type, formatter(types, a.Type))
			}
			return f, nil
		}
	}
	proto, err := types.Prototype(sym.Name)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNoPrototype, err)
	}
	for _, p := range proto.Params[:min(len(proto.Params), maxParams)] {
		f.add(p.Name, p.Type.Decl(""), p.Format)
	}
	return f, nil
}

func (f *Function) add(name, typ string, format func(uint64) string) {
	f.Params = append(f.Params, Param{
		Name: printable(name), Type: printable(typ), Text: isText(typ, name),
		format: func(v uint64) string { return printable(format(v)) },
	})
}

// isText reports whether a parameter is likely a string rather than a buffer: the
// kernel's sources call the latter buf.
func isText(typ, name string) bool {
	t := strings.ReplaceAll(strings.ReplaceAll(typ, "__user ", ""), " ", "")
	return t == "constchar*" && name != "buf" && name != "u_buf"
}

// formatter returns how a value of a C type is written.
func formatter(types *ktype.Types, typ string) func(uint64) string {
	if t, err := types.Type(strings.TrimSpace(strings.TrimPrefix(typ, "const "))); err == nil {
		return t.Format
	}
	return Param{}.Format
}
