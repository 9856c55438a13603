package linux

import (
	"errors"
	"fmt"
	"strings"

	"github.com/vmprobes/vmprobes/ktype"
	"github.com/vmprobes/vmprobes/sysmap"
)

// A Syscall is a system call as the kernel itself describes it.
type Syscall struct {
	Number int
	Name   string // without "sys_"
	Args   []SyscallArg
}

// A SyscallArg is one of at most six arguments.
type SyscallArg struct{ Type, Name string }

// String returns the system call as a C declaration, as in
// "openat(int dfd, const char * filename, int flags, umode_t mode)", in printable
// ASCII.
func (s Syscall) String() string {
	args := make([]string, len(s.Args))
	for i, a := range s.Args {
		args[i] = a.Type + " " + a.Name
	}
	return printable(s.Name + "(" + strings.Join(args, ", ") + ")")
}

// syscallMeta begins the names of the objects that CONFIG_FTRACE_SYSCALLS leaves
// behind, one for each system call (SYSCALL_METADATA, include/linux/syscalls.h).
const syscallMeta = "__syscall_meta__"

// maxSyscallArgs is how many arguments the calling convention of system calls has
// room for (System V ABI for AMD64, A.2.1).
const maxSyscallArgs = 6

// wrapperPrefix begins the names of the functions that system calls of 64-bit programs
// enter, in kernels since 4.17 (arch/x86/include/asm/syscall_wrapper.h). Before, they
// were called sys_NAME, and took the arguments themselves.
const wrapperPrefix = "__x64_sys_"

// A Wrapper is a function that system calls enter. Its one argument points to the
// caller's registers, struct pt_regs, in which the arguments are.
type Wrapper struct {
	Call string // the system call's name, as in "openat"
	// IA32 says that it is entered by int $0x80 and by 32-bit programs, whose
	// arguments are in other registers, and have 32 bits.
	IA32 bool
	// Compat says that the kernel has an implementation of its own for these programs,
	// or for those of the x32 ABI.
	Compat bool
}

// wrappers are the beginnings of their names, the longest first. Kernels since 5.7
// (6cc8d2b286d9) have "__x64_compat_sys_" for "__x32_compat_sys_".
var wrappers = []struct {
	prefix       string
	ia32, compat bool
}{
	{"__ia32_compat_sys_", true, true},
	{"__x32_compat_sys_", false, true},
	{"__x64_compat_sys_", false, true},
	{"__ia32_sys_", true, false},
	{wrapperPrefix, false, false},
}

// WrapperOf returns what the wrapper of that name is.
func WrapperOf(symbol string) (Wrapper, bool) {
	for _, w := range wrappers {
		if call, ok := strings.CutPrefix(symbol, w.prefix); ok && call != "" {
			return Wrapper{Call: call, IA32: w.ia32, Compat: w.compat}, true
		}
	}
	return Wrapper{}, false
}

// syscallArgs and ia32Args are offsets in struct pt_regs, the same in every 64-bit
// kernel since 2.6.24 (arch/x86/include/asm/ptrace.h).
var (
	syscallArgs = [maxSyscallArgs]uint64{112 /* di */, 104 /* si */, 96 /* dx */, 56 /* r10 */, 72 /* r8 */, 64 /* r9 */}
	ia32Args    = [maxSyscallArgs]uint64{40 /* bx */, 88 /* cx */, 96 /* dx */, 104 /* si */, 112 /* di */, 32 /* bp */}
)

// SyscallArgOffset returns the offset, in bytes, of argument n, from 0 to 5, of a
// system call in the caller's registers (struct pt_regs, 8 bytes a register), to which
// the one argument of an __x64_sys_ wrapper points. ok is false for any other n.
func SyscallArgOffset(n int) (offset uint64, ok bool) { return Wrapper{}.ArgOffset(n) }

// ArgOffset is [SyscallArgOffset] for a wrapper of any kind. If it is IA32, only the low
// half of the register counts.
func (w Wrapper) ArgOffset(n int) (offset uint64, ok bool) {
	if n < 0 || n >= maxSyscallArgs {
		return 0, false
	}
	if w.IA32 {
		return ia32Args[n], true
	}
	return syscallArgs[n], true
}

// ErrNoWrapper: a function isn't one that system calls enter.
var ErrNoWrapper = errors.New("no wrapper of a system call")

// Wrapper returns what the wrapper is that begins at addr. direct is true if it is a
// sys_NAME of a kernel before 4.17, which has the arguments as any function has. Of
// another function the error wraps ErrNoWrapper.
func (k *Kernel) Wrapper(addr uint64) (w Wrapper, direct bool, err error) {
	if k == nil {
		return w, false, ErrNoKernel
	}
	sym, off, ok := k.syms.Find(addr)
	if !ok || off != 0 {
		return w, false, fmt.Errorf("%#x: %w: no function begins there", addr, ErrNoWrapper)
	}
	if k.bits != 64 {
		return w, false, fmt.Errorf("%q: %w: of a kernel of %d bits", sym.Name, errors.ErrUnsupported, k.bits)
	}
	if w, ok := WrapperOf(sym.Name); ok {
		return w, false, nil
	}
	for _, prefix := range []string{"sys_", "SyS_", "compat_sys_", "compat_SyS_"} {
		call, ok := strings.CutPrefix(sym.Name, prefix)
		if !ok || call == "" {
			continue
		}
		if _, err := k.syms.Lookup(wrapperPrefix + call); errors.Is(err, sysmap.ErrNotFound) {
			return Wrapper{Call: call, Compat: len(prefix) > 4}, true, nil
		}
	}
	return w, false, fmt.Errorf("%q: %w: its arguments are where any function's are", sym.Name, ErrNoWrapper)
}

// Syscall returns the description of a system call, by its name without "sys_".
// It fails with an error that wraps [sysmap.ErrNotFound] if the kernel has no
// such call, or was built without CONFIG_FTRACE_SYSCALLS.
func (k *Kernel) Syscall(name string) (Syscall, error) {
	at, err := k.symbol(syscallMeta + name)
	if err != nil {
		return Syscall{}, err
	}
	return k.begin("system call").syscall(at)
}

// Syscalls returns every system call that the kernel describes, by address of the
// description. If it describes none, the error wraps [sysmap.ErrNotFound].
func (k *Kernel) Syscalls() ([]Syscall, error) {
	if k == nil {
		return nil, ErrNoKernel
	}
	o := k.begin("system calls")
	var all []Syscall
	for sym := range k.syms.All() {
		if !strings.HasPrefix(sym.Name, syscallMeta) {
			continue
		}
		s, err := o.syscall(sym.Addr)
		if err != nil {
			return all, fmt.Errorf("%q: %w", sym.Name, err)
		}
		all = append(all, s)
	}
	if len(all) == 0 {
		return nil, k.lacks(fmt.Errorf("%s*: %w (CONFIG_FTRACE_SYSCALLS=n?)", syscallMeta, sysmap.ErrNotFound))
	}
	return all, nil
}

// syscall reads struct syscall_metadata (include/trace/syscall.h).
func (o *op) syscall(at uint64) (s Syscall, err error) {
	t, err := o.Types()
	if err != nil {
		return s, err
	}
	v := t.At(o, "syscall_metadata", at)
	number, err := v.Field("syscall_nr").Int()
	if err != nil {
		return s, err
	}
	s.Number = int(number)
	if s.Name, err = o.stringAt(v.Field("name"), 128); err != nil {
		return s, err
	}
	s.Name = strings.TrimPrefix(s.Name, "sys_")
	count, err := v.Field("nb_args").Uint()
	if err != nil {
		return s, err
	}
	if count > maxSyscallArgs {
		return s, fmt.Errorf("%q with %d arguments: %w", s.Name, count, ErrBadKernel)
	}
	if count == 0 {
		return s, nil
	}
	types, err := v.Field("types").Pointer()
	if err != nil {
		return s, err
	}
	names, err := v.Field("args").Pointer()
	if err != nil {
		return s, err
	}
	for i := range count {
		var a SyscallArg
		for _, f := range []struct {
			table uint64
			dst   *string
		}{{types, &a.Type}, {names, &a.Name}} {
			p, err := o.pointer(f.table + i*uint64(o.bits/8))
			if err != nil {
				return s, err
			}
			if *f.dst, err = o.str(p, 128); err != nil {
				return s, err
			}
		}
		s.Args = append(s.Args, a)
	}
	return s, nil
}

// stringAt reads the string that a pointer leads to.
func (o *op) stringAt(v ktype.Value, limit int) (string, error) {
	p, err := v.Pointer()
	if err != nil {
		return "", err
	}
	return o.str(p, limit)
}
