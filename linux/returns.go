package linux

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/vmprobes/vmprobes/internal/x86"
)

// Errors of following a function to its return.
var (
	// ErrNotEntry: no function begins at the address.
	ErrNotEntry = errors.New("not the first instruction of a function")
	// ErrNeverReturns: a function doesn't come back to its caller.
	ErrNeverReturns = errors.New("the function never returns")
	// ErrNoExits: where a function returns isn't known, or may not be probed.
	ErrNoExits = errors.New("the function's exits can't be probed")
	// ErrStackSwitch: a function leaves on another stack than it was entered on, or isn't
	// entered by a call, so that its return can't be told from others.
	ErrStackSwitch = errors.New("the function changes the stack that its return address is on")
	// ErrReturnAddress: what is where a return address should be is none.
	ErrReturnAddress = errors.New("not the return address of a call")
)

// stackSwitches are such functions of the kernel: the context switch, what a new task
// begins with, entries of traps, what replaces a return address, and jumps to other code for
// good (arch/x86/entry, arch/x86/lib/retpoline.S, arch/x86/kernel; the names since 5.10).
var stackSwitches = []string{
	"__switch_to", "__switch_to_asm", "ret_from_fork", "ret_from_fork_asm", "ret_from_kernel_thread",
	"asm_call_*on_stack", "rewind_stack_and_make_dead", "rewind_stack_do_exit",
	"error_entry", "error_return", "xen_error_entry", "paranoid_entry", "paranoid_exit", "sync_regs", "fixup_bad_iret",
	"xen_iret", "xen_*_iret", "native_iret", "native_irq_return_iret",
	"relocate_kernel", "soft_restart_cpu", "machine_real_restart",
	"arch_rethook_trampoline", "__kretprobe_trampoline", "kretprobe_trampoline", "return_to_handler",
	"__x86_indirect_*", "*_return_thunk", "__x86_return_skl",
}

// Returnable returns nil if a call of the function that begins at fn can be followed to its
// return, by the return address that is at RSP when it begins. Otherwise the error wraps
// ErrNotEntry, ErrNeverReturns or ErrStackSwitch. Whether a breakpoint may stand there is
// another question: see [Kernel.Place]. A function whose code can't be followed is not
// refused.
func (k *Kernel) Returnable(fn uint64) error {
	w, err := k.walk(fn)
	if err != nil {
		return err
	}
	if _, _, ok := k.syms.Find(fn); ok {
		for _, pattern := range stackSwitches {
			if match, err := path.Match(pattern, strings.TrimPrefix(w.name, "__pi_")); err == nil && match {
				return fmt.Errorf("%q: %w", w.name, ErrStackSwitch)
			}
		}
	}
	if len(w.exits) == 0 && w.why == nil {
		return w.errorf(ErrNeverReturns, errNoWayOut)
	}
	return nil
}

// ReturnAt returns where breakpoints have to stand, so that one of them is hit when a call
// returns to ret, before anything else has changed than RIP: at ret itself, or, if the
// instruction there is a jump label, at both of its ends. RSP is then 8 above where the
// return address was. The error wraps ErrNotProbeable if there may be none: what is said of
// [Kernel.Probeable] holds, and neither may the kernel expect a fault of the instruction,
// nor somebody else's int3 be there. With force it is enough that nothing is known to forbid
// it. That ret is behind a call isn't checked.
func (k *Kernel) ReturnAt(ret uint64, force bool) ([]uint64, error) {
	p, err := k.placesOf(ret)
	if err != nil {
		return nil, err
	}
	if k.bits != 64 {
		return nil, fmt.Errorf("code of a kernel of %d bits: %w", k.bits, errors.ErrUnsupported)
	}
	text, err := k.textOf(p)
	if err != nil {
		return nil, fmt.Errorf("%#x: %w: the symbols of modules are not known: %w", ret, ErrUnknownPlaces, err)
	}
	at := []uint64{ret}
	if to, ok := branchAt(p.labels, ret); ok {
		next, err := text.behindLabel(ret, to)
		if err != nil {
			return nil, err
		}
		if at[0] = next; to != next {
			at = append(at, to)
		}
	}
	for _, a := range at {
		if err := k.mayBeReached(p, text, a, force); err != nil {
			if a != ret {
				err = fmt.Errorf("%#x is a jump label: %w", ret, err)
			}
			return nil, err
		}
	}
	return at, nil
}

// behindLabel returns the address of the instruction behind a jump label, which is a NOP or
// a JMP.
func (t kernelText) behindLabel(addr, to uint64) (uint64, error) {
	in, err := t.decode(addr)
	if err != nil {
		return 0, err
	}
	if leads, ok := target(addr, in.Bytes()); !(ok && leads == to || in.IsNop()) || in.Len != 2 && in.Len != 5 {
		return 0, fmt.Errorf("%#x: %w: % x at a jump label: the kernel is rewriting it, or it has a breakpoint of the guest's own", addr, ErrNotProbeable, in.Bytes())
	}
	return addr + uint64(in.Len), nil
}

// decode decodes the instruction at addr.
func (t kernelText) decode(addr uint64) (x86.Insn, error) {
	var b [x86.MaxLen]byte
	n, err := t.read(addr, b[:])
	if n == 0 {
		return x86.Insn{}, fmt.Errorf("%#x: %w: the code can't be read: %w", addr, ErrUnknownPlaces, err)
	}
	in, err := x86.Decode(b[:n])
	if err != nil {
		return in, fmt.Errorf("%#x: %w: %w", addr, ErrNotProbeable, err)
	}
	return in, nil
}

// mayBeReached returns nil if a breakpoint may stand at addr, at an instruction of p's text.
func (k *Kernel) mayBeReached(p *places, text kernelText, addr uint64, force bool) error {
	if !p.text.has(addr) {
		return fmt.Errorf("%#x: %w: not in the text of the code that leads there", addr, ErrNotProbeable)
	}
	if err := k.mayStand(p, addr, force); err != nil {
		return err
	}
	if err := text.boundary(addr); err != nil {
		return err
	}
	in, err := text.decode(addr)
	if err == nil && in.IsInt3() {
		err = fmt.Errorf("%#x: %w: an int3 is there: the guest's own, or padding behind a call that doesn't come back", addr, ErrNotProbeable)
	}
	return err
}

// mayStand returns nil if a breakpoint may stand at addr, in p's text, and the instruction
// under it be executed elsewhere; with force, if it isn't known that it may not.
func (k *Kernel) mayStand(p *places, addr uint64, force bool) error {
	if err := k.refused(p, addr); err != nil && !(force && errors.Is(err, ErrUnknownPlaces)) {
		return err
	}
	if p.noFaults != nil && !force {
		return fmt.Errorf("%#x: %w: %w", addr, ErrUnknownPlaces, p.noFaults)
	}
	if _, found := slices.BinarySearch(p.faults, addr); found {
		return fmt.Errorf("%#x: %w: the kernel expects that the instruction may fault", addr, ErrNotProbeable)
	}
	if _, ok := within(p.trace, addr, 1); ok {
		return fmt.Errorf("%#x: %w: ftrace may rewrite the instruction", addr, ErrNotProbeable)
	}
	return nil
}

// Trampoline reports whether addr is in code of the kernel's that its own return probes and
// function graph tracer put in place of return addresses, and that finds the right one
// elsewhere (arch/x86/kernel/rethook.c, since 5.19; arch/x86/kernel/kprobes/core.c before
// that; arch/x86/kernel/ftrace_64.S).
func (k *Kernel) Trampoline(addr uint64) bool {
	if k == nil {
		return false
	}
	k.trampOnce.Do(func() {
		for _, name := range []string{"arch_rethook_trampoline", "__kretprobe_trampoline", "kretprobe_trampoline", "return_to_handler"} {
			for _, s := range k.syms.LookupAll(name) {
				if end, ok := k.syms.FuncEnd(s.Addr); ok {
					k.trampolines = append(k.trampolines, span{start: s.Addr, end: end})
				}
			}
		}
	})
	return slices.ContainsFunc(k.trampolines, func(s span) bool { return s.has(addr) })
}

// BehindCall returns nil if addr is where a call may return to: in the text of the kernel or of
// a module, behind a call instruction, or a [Kernel.Trampoline]. Otherwise the error wraps
// ErrReturnAddress.
func (k *Kernel) BehindCall(addr uint64) error {
	if k.Trampoline(addr) {
		return nil
	}
	p, err := k.placesOf(addr - 1)
	if err != nil {
		return fmt.Errorf("%#x: %w: %w", addr, ErrReturnAddress, err)
	}
	text, err := k.textOf(p)
	if err != nil {
		return fmt.Errorf("%#x: %w: %w", addr, ErrReturnAddress, err)
	}
	f, err := text.functionAt(addr - 1) // the call may be the last instruction
	if err != nil {
		return fmt.Errorf("%#x: %w: %w", addr, ErrReturnAddress, err)
	}
	call := false
	at := f.start
	for at < addr {
		in, err := x86.Decode(f.code[min(at-f.start, uint64(len(f.code))):])
		if err != nil {
			return fmt.Errorf("%#x: %w: %w", addr, ErrReturnAddress, err)
		}
		call = isCall(in.Bytes())
		at += uint64(in.Len)
	}
	if at != addr || !call {
		return fmt.Errorf("%#x: %w: no call is before it", addr, ErrReturnAddress)
	}
	return nil
}

// isCall reports whether b is a near call (SDM 2A: CALL).
func isCall(b []byte) bool {
	b = bare(b)
	return b[0] == 0xe8 || b[0] == 0xff && len(b) > 1 && b[1]>>3&7 == 2
}
