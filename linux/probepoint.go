package linux

import (
	"errors"
	"fmt"
	"slices"

	"github.com/vmprobes/vmprobes/internal/x86"
	"github.com/vmprobes/vmprobes/paging"
)

// SetOverlay hides the caller's own breakpoints, which are in the guest's memory, from
// whatever decodes the text: overlay replaces them, in the bytes b that were read at
// addr, by what is under them. Nil hides none. It is called by [Kernel.Place],
// [Kernel.Boundary], [Kernel.ProbePoint], [Kernel.Probeable], [Kernel.Blacklisted] and
// [Kernel.FtraceSite], in the goroutine that calls those.
func (k *Kernel) SetOverlay(overlay func(addr uint64, b []byte)) {
	if k != nil {
		k.overlay.Store(&overlay)
	}
}

// readText is Read without breakpoints of the caller's own.
func (k *Kernel) readText(addr uint64, b []byte) (int, error) {
	n, err := k.mem.Read(k.Root(), paging.VAddr(addr), b)
	if f := k.overlay.Load(); f != nil && *f != nil {
		(*f)(addr, b[:n])
	}
	return n, err
}

// textOf returns the text that p is of.
func (k *Kernel) textOf(p *places) (kernelText, error) {
	if p.module == "" {
		return kernelText{k.syms, k.readText}, nil
	}
	all, err := k.AllSymbols()
	return kernelText{all, k.readText}, err
}

// Boundary returns nil if addr is the start of an instruction of the kernel or of a
// module, by decoding its function from the beginning, as the kernel's can_probe does
// (arch/x86/kernel/kprobes/core.c). Breakpoints of the caller's own are not decoded:
// see [Kernel.SetOverlay]. The error wraps ErrNotProbeable: it is x86's ErrNotBoundary
// where addr is inside an instruction, and ErrUnknownPlaces where no symbol or no code
// tells.
func (k *Kernel) Boundary(addr uint64) error {
	if k == nil {
		return ErrNoKernel
	}
	syms := k.syms
	if _, _, ok := syms.Find(addr); !ok {
		var err error
		if syms, err = k.AllSymbols(); err != nil {
			return fmt.Errorf("%#x: %w: the symbols of modules are not known: %w", addr, ErrUnknownPlaces, err)
		}
	}
	return kernelText{syms, k.readText}.boundary(addr)
}

// Placing says how [Kernel.Place] chooses. The zero value is the safe choice.
type Placing struct {
	// Hidden says that the guest can't see the breakpoint, in a register or in a view
	// of its own: it may stand anywhere.
	Hidden bool
	// Force takes the risk of a place that the kernel forbids, or doesn't tell about.
	// An address inside an instruction is refused all the same.
	Force bool
}

// Place returns where the breakpoint of a probe at addr has to stand, or why there
// may be none. It is [Kernel.Probeable] and [Kernel.ProbePoint] together. Places of
// which it isn't known whether the kernel expects their faults are refused as well:
// see [Kernel.FaultsKnown].
func (k *Kernel) Place(addr uint64, how Placing) (uint64, error) {
	boundary := k.Boundary(addr)
	if k == nil || errors.Is(boundary, x86.ErrNotBoundary) {
		return 0, boundary
	}
	if how.Hidden && how.Force {
		return addr, nil
	}
	at, err := k.place(addr, how, boundary)
	if err != nil && how.Force {
		return addr, nil //nolint:nilerr // the caller takes the risk
	}
	return at, err
}

// place is Place where it matters what the kernel says of addr, which is read once.
// boundary is why addr may not be the start of an instruction, or nil.
func (k *Kernel) place(addr uint64, how Placing, boundary error) (uint64, error) {
	p, err := k.placesOf(addr)
	if err != nil {
		return 0, err
	}
	if err := k.refused(p, addr); err != nil {
		return 0, err
	}
	if !how.Force && p.noFaults != nil {
		return 0, fmt.Errorf("%#x: %w: %w", addr, ErrUnknownPlaces, p.noFaults)
	}
	if boundary != nil {
		return 0, boundary
	}
	if how.Hidden {
		return addr, nil
	}
	return k.skip(p, addr)
}

// ProbePoint returns where a breakpoint has to stand, so that it is hit as often as
// addr is executed, and nothing is touched that the guest rewrites. That is addr
// itself, unless one of two instructions without effect is there, or both. These are
// skipped, as the kernel's kprobes skip them:
//
//   - ENDBR64 at the beginning of a function. With indirect branch tracking (CR4.CET)
//     an indirect call must arrive at one. An int3 there would hit first, but when the
//     ENDBR64 under it is emulated by moving RIP, the processor still waits for one
//     (SDM 1, Indirect Branch Tracking). The guest's own tools look for it there, too
//     (is_endbr in arch/x86/include/asm/ibt.h).
//   - The NOP of 5 bytes, after that or at the function's entry, which ftrace makes a
//     call to trace the function. It compares before it writes: an int3 there turns
//     ftrace off until the guest reboots.
//
// A vCPU that executes addr reaches the instruction after them: a tracer returns
// there, and a BPF trampoline calls it (at addr+5, arch_prepare_bpf_trampoline in
// arch/x86/net/bpf_jit_comp.c). The registers are then as they were at addr, except
// that the stack has the tracer's return address if the function is traced at its
// return (fexit, function graph). Some calls do not get there: those that a live patch,
// or another user of ftrace with FTRACE_OPS_FL_IPMODIFY, redirects; those that a
// fmod_ret program or fault injection makes return at once; and those of a BPF
// dispatcher, whose entry is made a jump (in kernels before 6.2).
//
// Nor may a vCPU get there that did not execute addr. If a branch of the function, or of
// the .cold part that the compiler split off it, or a jump label leads there, or if no
// breakpoint may stand there, ProbePoint returns addr itself if it is an ENDBR64 and no
// vCPU tracks branches; otherwise the error wraps ErrNotProbeable. Where nothing is
// skipped, the checks are those of [Kernel.Probeable].
func (k *Kernel) ProbePoint(addr uint64) (uint64, error) {
	p, err := k.placesOf(addr)
	if err != nil {
		return 0, err
	}
	if err := k.refused(p, addr); err != nil {
		return 0, err
	}
	return k.skip(p, addr)
}

// skip is ProbePoint of an address that isn't refused, in p's text.
func (k *Kernel) skip(p *places, addr uint64) (uint64, error) {
	text, err := k.textOf(p)
	if err != nil {
		return 0, fmt.Errorf("%#x: %w: the symbols of modules are not known: %w", addr, ErrUnknownPlaces, err)
	}
	f, err := text.functionAt(addr)
	if err != nil {
		return 0, err
	}
	if err := f.boundary(addr); err != nil {
		return 0, err
	}
	at := addr
	endbr := f.endbr(addr)
	if endbr {
		at += endbrSize
	}
	if _, ok := within(p.trace, at, 1); ok {
		err = f.traceable(at)
		at += ftraceSize
	}
	rewritten := p.sealedAtBoot(addr)
	if at == addr && rewritten {
		return 0, fmt.Errorf("%#x: %w: the kernel rewrites the instruction when it boots (%s)", addr, ErrNotProbeable, sealed)
	}
	if at == addr {
		return addr, nil
	}
	if err == nil {
		err = k.beyond(p, text, &f, addr, at)
	}
	if err == nil {
		return at, nil
	}
	if endbr && !rewritten {
		tracked := k.tracked()
		if tracked == nil {
			return addr, nil
		}
		err = reasons{err, tracked}
	}
	return 0, fmt.Errorf("%#x: %w: the instruction must stay as it is, and %#x, after it, is not safe: %w", addr, ErrNotProbeable, at, err)
}

const endbrSize = 4

// endbr reports whether a function begins at addr with ENDBR64, or with what the
// kernel makes of it where no indirect call comes: NOPs of the same size
// (gen_endbr_poison in arch/x86/include/asm/ibt.h, which has been changed).
func (f *function) endbr(addr uint64) bool {
	if addr != f.start || len(f.code) < endbrSize {
		return false
	}
	b := [endbrSize]byte(f.code)
	return b == [...]byte{0xf3, 0x0f, 0x1e, 0xfa} || b == [...]byte{0x66, 0x0f, 0x1f, 0x00} || b == [...]byte{0x0f, 0x1f, 0x40, 0xd6}
}

// traceable checks that the instruction at an ftrace site is a NOP, or a call, which
// returns. The NOPs are those of 64-bit kernels, and those that 5.10 chose
// by the processor (arch/x86/include/asm/nops.h).
func (f *function) traceable(at uint64) error {
	off := at - f.start
	if off+ftraceSize > uint64(len(f.code)) {
		return fmt.Errorf("%#x: %w: ftrace's instruction reaches beyond the end of %q", at, ErrNotProbeable, f.name)
	}
	b := [ftraceSize]byte(f.code[off:])
	switch b {
	case [...]byte{0x0f, 0x1f, 0x44, 0x00, 0x00}, [...]byte{0x66, 0x66, 0x66, 0x66, 0x90}, [...]byte{0x3e, 0x8d, 0x74, 0x26, 0x00}:
		return nil
	}
	switch b[0] {
	case callRel32:
		return nil
	case 0xcc:
		return fmt.Errorf("%#x: %w: the guest is rewriting ftrace's instruction, or has a breakpoint there", at, ErrNotProbeable)
	case 0xe9:
		return fmt.Errorf("%#x: %w: the function is redirected: ftrace's instruction is a jump elsewhere", at, ErrNotProbeable)
	}
	return fmt.Errorf("%#x: %w: % x where ftrace has a NOP or a call", at, ErrNotProbeable, b)
}

// beyond checks that a breakpoint may stand at at, and that at is reached from addr
// only.
func (k *Kernel) beyond(p *places, text kernelText, f *function, addr, at uint64) error {
	if at >= f.start+uint64(len(f.code)) {
		return fmt.Errorf("%#x is past the end of %q", at, f.name)
	}
	if err := k.refused(p, at); err != nil {
		return err
	}
	if _, ok := within(p.trace, at, 1); ok {
		return fmt.Errorf("%#x: another instruction that ftrace rewrites", at)
	}
	if err := f.boundary(at); err != nil {
		return err
	}
	if i, _ := slices.BinarySearch(p.jumps, addr+1); i < len(p.jumps) && p.jumps[i] <= at {
		return fmt.Errorf("%#x: a jump label leads there, too", at)
	}
	parts := []function{*f}
	for _, s := range text.syms.LookupAll(f.name + ".cold") {
		cold, err := text.functionAt(s.Addr)
		if err != nil {
			return err
		}
		parts = append(parts, cold)
	}
	for _, part := range parts {
		for pc := part.start; pc < part.start+uint64(len(part.code)); {
			in, err := x86.Decode(part.code[pc-part.start:])
			if errors.Is(err, x86.ErrTruncated) && pc > addr {
				break // only this much could be read
			}
			if err != nil {
				return fmt.Errorf("%#x: whether it leads to %#x can't be told: %w", pc, at, err)
			}
			skipped := pc >= addr && pc < at
			if to, ok := target(pc, in.Bytes()); ok && !skipped && to > addr && to <= at {
				return fmt.Errorf("%#x: the branch at %q+%#x leads there, too", to, part.name, pc-part.start)
			}
			pc += uint64(in.Len)
		}
	}
	return nil
}

// cr4CET turns control-flow enforcement on, with indirect branch tracking (SDM 3A,
// 2.5).
const cr4CET = 1 << 23

// tracked returns an error if a vCPU may track indirect branches.
func (k *Kernel) tracked() error {
	switch on, err := k.CET(); {
	case err != nil:
		return fmt.Errorf("whether indirect branches are tracked can't be told: %w", err)
	case on:
		return errors.New("indirect branches are tracked (CR4.CET)")
	}
	return nil
}

// CET reports whether control-flow enforcement is on in a vCPU (CR4.CET), which is a condition of
// indirect branch tracking and of shadow stacks. PV guests can't turn it on: Xen owns their CR4.
func (k *Kernel) CET() (bool, error) {
	if k == nil {
		return false, ErrNoKernel
	}
	cpus, err := k.machine.CPUs()
	if err != nil {
		return false, err
	}
	if len(cpus) == 0 {
		return false, errors.New("no vCPU has registers")
	}
	return slices.ContainsFunc(cpus, func(c CPU) bool { return !c.PV && c.CR4&cr4CET != 0 }), nil
}
