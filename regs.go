package vmprobes

import (
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/x86"
	"github.com/vmprobes/vmprobes/linux"
)

// Regs are the registers of the vCPU that hit a probe. A handler may change
// them: the vCPU goes on with what it leaves.
//
// Changing IP in a Pre handler replaces the probed instruction: it is not
// executed, and Post handlers don't run.
type Regs struct {
	R15, R14, R13, R12, BP, BX, R11, R10, R9, R8 uint64
	AX, CX, DX, SI, DI                           uint64
	IP, CS, Flags, SP, SS                        uint64

	// FSBase and GSBase are the segment bases in use, CR3 the root of the page
	// tables. They can't be changed.
	FSBase, GSBase, CR3 uint64

	mem     func(addr uint64, b []byte) error
	kernel  *linux.Kernel // nil: not known
	entry   Addr          // of the probe that was hit, or 0
	session *Session
	hit     *breakpoint.Context // whose handler runs, or nil
	past    bool                // the vCPU has gone on since: see Activation.Entry
}

// PC returns the address of the next instruction: in a Pre handler the probe's.
func (r *Regs) PC() Addr { return r.IP }

// Arg returns argument n, from 0 to 5, of the function whose first instruction
// the vCPU is at: RDI, RSI, RDX, RCX, R8, R9 (System V ABI for AMD64, 3.2.3). It
// returns 0 for any other n.
//
// The wrappers of system calls (__x64_sys_openat and so on) have one argument,
// a pointer to the registers of the caller: see [Regs.SyscallArg].
func (r *Regs) Arg(n int) uint64 {
	switch n {
	case 0:
		return r.DI
	case 1:
		return r.SI
	case 2:
		return r.DX
	case 3:
		return r.CX
	case 4:
		return r.R8
	case 5:
		return r.R9
	}
	return 0
}

// SyscallArg returns argument n, from 0 to 5, of the system call whose wrapper the vCPU
// is at the first instruction of: a function named __x64_sys_*, or, for calls of 32-bit
// programs and by int $0x80, __ia32_sys_* or __ia32_compat_sys_* (since Linux 4.17). The
// wrapper's only argument points to the caller's registers, struct pt_regs, and this
// reads it from there; an argument of a 32-bit call is not sign-extended. In kernels
// before 4.17 sys_* has the arguments itself.
//
// At another function the error wraps linux.ErrNoWrapper: use [Regs.Arg].
func (r *Regs) SyscallArg(n int) (uint64, error) {
	v, err := r.findSyscallArg(n)
	if err != nil {
		return 0, fmt.Errorf("vmprobes: system call argument %d: %w", n, err)
	}
	return v, nil
}

func (r *Regs) findSyscallArg(n int) (uint64, error) {
	if r.mem == nil {
		return 0, errNoHit
	}
	at := r.IP
	if r.entry != 0 {
		at = r.entry
	}
	w, direct, err := r.kernel.Wrapper(at)
	if err != nil {
		return 0, err
	}
	if direct && n >= 0 && n < 6 {
		return r.Arg(n), nil
	}
	return r.wrapperArg(w, n)
}

// wrapperArg reads an argument of a system call at its wrapper.
func (r *Regs) wrapperArg(w linux.Wrapper, n int) (uint64, error) {
	offset, ok := w.ArgOffset(n)
	if !ok {
		return 0, errors.New("there are 6, from 0")
	}
	if r.mem == nil {
		return 0, errNoHit
	}
	var b [8]byte
	if err := r.mem(r.DI+offset, b[:]); err != nil {
		return 0, err
	}
	if w.IA32 {
		clear(b[4:])
	}
	return le64(b[:]), nil
}

// Result returns RAX: the return value, where a function has just returned.
func (r *Regs) Result() uint64 { return r.AX }

// SetResult sets RAX.
func (r *Regs) SetResult(v uint64) { r.AX = v }

// String returns the registers in one line.
func (r *Regs) String() string {
	if r == nil {
		return "<nil>"
	}
	var b strings.Builder
	for i, f := range r.fields() {
		if i > 0 {
			b.WriteByte(' ')
		}
		fmt.Fprintf(&b, "%s=%x", f.name, f.value)
	}
	return b.String()
}

type regField struct {
	name  string
	value uint64
}

// fields lists the registers in the order of dump_regs, then those that i386
// doesn't have.
func (r *Regs) fields() []regField {
	return []regField{
		{"rbx", r.BX}, {"rcx", r.CX}, {"rdx", r.DX}, {"rsi", r.SI}, {"rdi", r.DI}, {"rbp", r.BP},
		{"rax", r.AX}, {"rip", r.IP}, {"cs", r.CS}, {"rflags", r.Flags}, {"rsp", r.SP}, {"ss", r.SS},
		{"r8", r.R8}, {"r9", r.R9}, {"r10", r.R10}, {"r11", r.R11},
		{"r12", r.R12}, {"r13", r.R13}, {"r14", r.R14}, {"r15", r.R15},
		{"fs_base", r.FSBase}, {"gs_base", r.GSBase}, {"cr3", r.CR3},
	}
}

// MarshalJSON returns the registers as a JSON object of hexadecimal strings, with the
// names that [Regs.Dump] prints.
func (r Regs) MarshalJSON() ([]byte, error) {
	b := []byte{'{'}
	for i, f := range r.fields() {
		if i > 0 {
			b = append(b, ',')
		}
		b = fmt.Appendf(b, `"%s":"%#x"`, f.name, f.value)
	}
	return append(b, '}'), nil
}

// Dump writes the registers one a line, as dump_regs did.
func (r *Regs) Dump(w io.Writer) error {
	if r == nil {
		_, err := fmt.Fprintln(w, "Dumping registers: NULL")
		return err
	}
	var b strings.Builder
	b.WriteString("Dumping registers:\n")
	for _, f := range r.fields() {
		fmt.Fprintf(&b, " -- %s: %016x\n", f.name, f.value)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// load and store convert from and to the engine's registers.
func (r *Regs) load(x *x86.Regs, mem func(addr uint64, b []byte) error) {
	*r = Regs{
		R15: x.R15, R14: x.R14, R13: x.R13, R12: x.R12, BP: x.BP, BX: x.BX,
		R11: x.R11, R10: x.R10, R9: x.R9, R8: x.R8,
		AX: x.AX, CX: x.CX, DX: x.DX, SI: x.SI, DI: x.DI,
		IP: x.IP, CS: x.CS, Flags: x.Flags, SP: x.SP, SS: x.SS,
		FSBase: x.FSBase, GSBase: x.GSBase, CR3: x.CR3,
		mem: mem,
	}
}

func (r *Regs) store(x *x86.Regs) {
	x.R15, x.R14, x.R13, x.R12, x.BP, x.BX = r.R15, r.R14, r.R13, r.R12, r.BP, r.BX
	x.R11, x.R10, x.R9, x.R8 = r.R11, r.R10, r.R9, r.R8
	x.AX, x.CX, x.DX, x.SI, x.DI = r.AX, r.CX, r.DX, r.SI, r.DI
	x.IP, x.Flags, x.SP = r.IP, r.Flags, r.SP
}
