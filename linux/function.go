package linux

import (
	"errors"
	"fmt"
	"slices"
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
	// arguments are where [Wrapper.ArgOffset] says, not in the argument registers.
	Syscall string
	Wrapper Wrapper // of Syscall
	Params  []Param
}

// A Param is a parameter of a function. Its texts are printable ASCII.
type Param struct {
	Name string // "" if it has none
	Type string // in C, as in "const char *"
	// Reg is the argument register that has the value, from 0 on, or the system call's
	// argument. Of a struct in two registers it is the first.
	Reg int
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

// maxArgs is how many argument registers there are, both of a function (System V ABI
// for AMD64, 3.2.3) and of a system call.
const maxArgs = 6

// Function returns how the function that begins at addr is called. Parameters that are
// passed on the stack are left out: those for which no register is left, and structs of
// more than 16 bytes. The error wraps ErrNoPrototype if no function begins there, or if
// its prototype isn't known.
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
	if w, ok := WrapperOf(sym.Name); ok && k.bits == 64 {
		if args, ok := k.wrapperArgs(types, w); ok {
			f.Syscall, f.Wrapper = w.Call, w
			for i, a := range args {
				f.add(i, a.name, a.typ, a.format)
			}
			return f, nil
		}
	}
	name := sym.Name
	if sym.Module != "" {
		// A function of the kernel's may have the same name.
		if types, err = k.ModuleTypes(sym.Module); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrNoPrototype, err)
		}
		name = sym.Module + ":" + name
	}
	proto, err := types.Prototype(name)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNoPrototype, err)
	}
	reg := 0
	for _, p := range proto.Params {
		n, err := registers(p.Type)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrNoPrototype, err)
		}
		if n > 0 && reg+n <= maxArgs {
			f.add(reg, p.Name, p.Type.Decl(""), p.Format)
			reg += n
		}
	}
	return f, nil
}

// wrapperArg is an argument of a system call.
type wrapperArg struct {
	name, typ string
	format    func(uint64) string
}

// otherCompat are the system calls whose implementation for 32-bit programs has other
// arguments than the one of the same name for 64-bit programs: one of 64 bits comes in
// two halves (fs/notify/fanotify/fanotify_user.c). The others of that kind have other
// names (ia32_pread64 …, arch/x86/kernel/sys_ia32.c).
var otherCompat = []string{"fanotify_mark"}

// wrapperArgs returns the arguments of the system call that a wrapper is entered by: as
// the kernel describes them, or, of what it has for 32-bit programs only, as the types
// do.
func (k *Kernel) wrapperArgs(types *ktype.Types, w Wrapper) (args []wrapperArg, ok bool) {
	if !w.Compat || !slices.Contains(otherCompat, w.Call) {
		if sc, err := k.Syscall(w.Call); err == nil {
			for _, a := range sc.Args {
				args = append(args, wrapperArg{a.Name, a.Type, w.formatter(types, a.Type)})
			}
			return args, true
		}
	}
	if !w.Compat {
		return nil, false
	}
	proto, err := types.Prototype("__do_compat_sys_" + w.Call)
	if err != nil || len(proto.Params) > maxSyscallArgs {
		return nil, false
	}
	for _, p := range proto.Params {
		args = append(args, wrapperArg{p.Name, p.Type.Decl(""), p.Format})
	}
	return args, true
}

// formatter is formatter for an argument of 32 bits, if the wrapper has such: a long is
// an int to the caller.
func (w Wrapper) formatter(types *ktype.Types, typ string) func(uint64) string {
	format := formatter(types, typ)
	if t, err := types.Type(typ); w.IA32 && w.Compat && err == nil && t.Signed() {
		return func(v uint64) string { return format(uint64(int64(int32(v)))) }
	}
	return format
}

// registers returns how many argument registers a parameter takes if so many are left,
// or 0 if it is passed on the stack, or has no bytes. In the kernel, which has no
// floating point, that is a matter of size alone.
func registers(t *ktype.Type) (int, error) {
	size, err := t.Size()
	if err != nil || size > 16 {
		return 0, err
	}
	return int(size+7) / 8, nil
}

func (f *Function) add(reg int, name, typ string, format func(uint64) string) {
	f.Params = append(f.Params, Param{
		Name: printable(name), Type: printable(typ), Reg: reg, Text: isText(typ, name),
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
