package vmprobes

import (
	"fmt"
	"sync"

	"github.com/vmprobes/vmprobes/linux"
)

// Return makes the function return at once, with value: neither the instruction that the vCPU
// is at is executed nor any other of the function. It is for a Pre handler, or that of a
// ReturnProbe's Entry, at a function's first instruction. The first one of a hit wins: Pre
// handlers after it don't run and count it in Stats.Skipped. Return probes that have seen the
// entry get their Return handler, with [Activation.Skipped].
//
// If it can't be right it fails, and changes nothing. The error wraps ErrNotEntry;
// ErrNotInjectable or ErrReturnValue (see [Options.AllowReturn]); ErrReturnAddress, if what is at
// RSP isn't the return address of a call; or ErrShadowStack.
func (r *Regs) Return(value uint64) error {
	h := r.hit
	switch {
	case h == nil || h.Post || h.Return || r.entry == 0 || r != &r.session.regs: // or it is a copy
		return fmt.Errorf("vmprobes: return early: %w, in its handler", ErrNotEntry)
	case h.CallSkipped() || h.Moved() || r.IP != r.entry:
		return fmt.Errorf("vmprobes: return early from %#x: %w: a handler has sent the vCPU elsewhere already", r.entry, ErrNotEntry)
	}
	ret, err := r.session.mayReturn(r, value)
	if err != nil {
		return fmt.Errorf("vmprobes: return early from %#x: %w", r.entry, err)
	}
	r.AX, r.IP, r.SP = value, ret, r.SP+8
	h.SkipCall()
	return nil
}

// mayReturn returns the return address of the function that a vCPU with registers r is at the
// first instruction of, if it may return value without being executed.
func (s *Session) mayReturn(r *Regs, value uint64) (Addr, error) {
	k := s.kernel
	if k == nil {
		return 0, s.noKernel()
	}
	if _, off, ok := k.Find(r.entry); !ok || off != 0 {
		return 0, fmt.Errorf("%#x: %w", r.entry, ErrNotEntry)
	}
	if !s.allowReturn {
		if err := s.early.injectable(k, r.entry, value); err != nil {
			return 0, fmt.Errorf("%w: Options.AllowReturn takes the risk", err)
		}
	}
	if err := s.early.shadowStack(k); err != nil {
		return 0, err
	}
	var b [8]byte
	if err := r.mem(r.SP, b[:]); err != nil {
		return 0, fmt.Errorf("%w: RSP is %#x: %w", ErrReturnAddress, r.SP, err)
	}
	ret := le64(b[:])
	return ret, s.early.behindCall(k, ret)
}

// early remembers what has been asked about early returns.
type early struct {
	mu      sync.Mutex
	allowed map[earlyReturn]bool
	calls   map[Addr]bool // return addresses that are some
	noCET   bool
}

type earlyReturn struct{ fn, value uint64 }

// maxEarly bounds what is remembered.
const maxEarly = 1 << 10

func (e *early) injectable(k *linux.Kernel, fn, value uint64) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.allowed[earlyReturn{fn, value}] {
		return nil
	}
	err := k.Injectable(fn, value)
	if err == nil && staysThere(k, fn) {
		if e.allowed == nil || len(e.allowed) == maxEarly {
			e.allowed = make(map[earlyReturn]bool)
		}
		e.allowed[earlyReturn{fn, value}] = true
	}
	return err
}

func (e *early) behindCall(k *linux.Kernel, ret Addr) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.calls[ret] {
		return nil
	}
	if err := k.BehindCall(ret); err != nil {
		return err
	}
	if !staysThere(k, ret) {
		return nil
	}
	if e.calls == nil || len(e.calls) == maxEarly {
		e.calls = make(map[Addr]bool)
	}
	e.calls[ret] = true
	return nil
}

// staysThere reports whether addr is in the kernel's own text, and not in a module's, whose place
// may be another one's later.
func staysThere(k *linux.Kernel, addr Addr) bool {
	end, err := k.Lookup("_etext")
	return err == nil && addr < end.Addr
}

// shadowStack returns an error if a vCPU may have a shadow stack, whose pointer can't be
// changed from outside. Linux has none for the kernel (Documentation/arch/x86/shstk.rst), but
// what is on shows only in registers that no hypervisor tells.
func (e *early) shadowStack(k *linux.Kernel) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.noCET {
		return nil
	}
	on, err := k.CET()
	switch {
	case err != nil:
		return fmt.Errorf("%w: it can't be told: %w", ErrShadowStack, err)
	case on:
		return fmt.Errorf("%w: CR4.CET is set", ErrShadowStack)
	}
	e.noCET = true
	return nil
}
