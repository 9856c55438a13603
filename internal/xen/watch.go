package xen

import (
	"bytes"
	"fmt"
	"slices"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/paging"
	"github.com/vmprobes/vmprobes/xenctrl"
)

// beat says that somebody looks for stops, or works on the guest's breakpoints.
func (s *shared) beat() { s.beats.Add(1) }

// Beats returns a number that grows as long as the driver whose state it is is asked for
// stops, once in a tenth of a second at least, or inserts and removes breakpoints. It stays
// the same while a handler runs, and while the process is stopped.
func Beats(state []byte) (uint64, error) {
	s, _, err := stateIn(state, 0)
	if err != nil {
		return 0, err
	}
	return s.beats.Load(), nil
}

// Waits says for what of the process whose state it is the guest waits, or "". The process
// is alive, and may do something meanwhile, which makes the answer worthless: whoever asks
// looks at Beats before and after. Nothing is changed in the guest, nor in Left.State.
//
// Without a stop that the process has taken it is not known for sure. An administrator who
// has paused a guest at the very moment when a vCPU was to execute a breakpoint, or had just
// been sent behind one, makes it look like one that waits.
func Waits(hv Hypervisor, frames *paging.Cache, left Left) (why string, err error) {
	info, err := hv.Info()
	if err != nil {
		return "", mapErr(err)
	}
	if info.Gone() {
		return "", nil
	}
	left.State = bytes.Clone(left.State) // what an attempt to take over finds out goes nowhere
	n := info.MaxVCPUID + 1
	if n < 1 || n > xenctrl.MaxVCPUs {
		return "", fmt.Errorf("domain %d has vCPU numbers up to %d", info.ID, info.MaxVCPUID)
	}
	s, vs, err := stateIn(left.State, n)
	if err != nil {
		return "", err
	}
	for v := range vs {
		if vs[v].stopped {
			return fmt.Sprintf("vCPU %d has stopped at a breakpoint", v), nil
		}
	}
	if v := s.step.vcpu; v > 0 && v <= n {
		return fmt.Sprintf("vCPU %d steps over a breakpoint", v-1), nil
	}
	if info.Flags&xenctrl.DomainPaused != 0 &&
		(s.owed > 0 || s.frozen > 0 || s.intent == intentPause || s.intent == intentUnpause) {
		return "the domain is paused for it", nil
	}
	if info.Flags&xenctrl.DomainHVM != 0 {
		return waitsForMonitor(hv, frames, n, left)
	}
	if info.Flags&xenctrl.DomainPaused == 0 || info.Flags&xenctrl.DomainDebugged == 0 {
		return "", nil // no event is latched that nobody has taken
	}
	return waitsForDebugger(hv, frames, info, left)
}

// waitsForDebugger looks for events that nobody has asked for. The domain is paused.
func waitsForDebugger(hv Hypervisor, frames *paging.Cache, info xenctrl.DomainInfo, left Left) (string, error) {
	d, err := newDebugger(hv, frames, info, left.State)
	if err != nil {
		return "", err
	}
	a := &takeover{Debugger: d, left: &left}
	if err := a.contexts(); err != nil {
		return "", err
	}
	if v, _ := a.taken(false); v >= 0 {
		return fmt.Sprintf("vCPU %d has stopped at a breakpoint, which was not noticed", v), nil
	}
	for v := range a.vcpus {
		if c := &a.vcpus[v]; d.debug.found(&c.ctx, c.dr6) {
			return fmt.Sprintf("vCPU %d has met a debug exception, which was not noticed", v), nil
		}
	}
	return "", nil
}

// waitsForMonitor looks for vCPUs at an int3, whoever's it is: each is a request, and its
// vCPU gets no further without an answer.
func waitsForMonitor(hv Hypervisor, frames *paging.Cache, n int, left Left) (string, error) {
	m, err := newMonitor(hv, frames, left.State)
	if err != nil {
		return "", err
	}
	for v := range n {
		c, err := hv.HVMCPU(v)
		if err != nil {
			continue // it is offline, or has nothing to say
		}
		why := fmt.Sprintf("vCPU %d is at the breakpoint at %#x", v, c.RIP)
		var b [1]byte
		if m.read(c.CR3, c.RIP, b[:]) == nil && b[0] == int3 {
			return why, nil
		}
		if slices.ContainsFunc(left.Gone, func(b breakpoint.LeftBreak) bool { return b.Addr == c.RIP }) {
			return why + ", which was removed", nil
		}
	}
	return "", nil
}
