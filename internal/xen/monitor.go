package xen

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"syscall"
	"time"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/spin"
	"github.com/vmprobes/vmprobes/internal/x86"
	"github.com/vmprobes/vmprobes/paging"
	"github.com/vmprobes/vmprobes/xenctrl"
)

// MonitorRoute is the monitor route: an HVM or PVH guest whose int3s are
// vm_event requests. A request carries the vCPU's registers and stops that vCPU
// only; the response sets them.
type MonitorRoute struct {
	*guest
	caps xenctrl.MonitorCaps

	// guest.mu guards the ring and what follows it.
	mon   Monitor
	nvcpu int
	vcpus []monitored
	known []sharedVCPU
	// Of a guest with more vCPUs than the ring has places: whether it may have been full,
	// how many requests have come since it was empty, and who may have waited for room.
	crowded  bool
	burst    int
	suspects []place
	other    monitored // a vCPU that has come up since: nothing is known of it
	notify   bool      // responses are on the ring that Xen hasn't been told of
	step     *step
	trapMon  bool // debug-exception events are on
	left     bool // the ring is closed: no more stops
	closed   bool
	checked  time.Time
	online   int
	in, out  xenctrl.Event // the request and the response in hand
	redo     bool          // in has been taken off the ring and isn't dealt with

	// Of the goroutine in Wait: when it looked last whether the domain is alive
	// (spin.Clock), a context that ends when it is time to look again, and the one
	// that was made from.
	alive            time.Duration
	waitCtx, waitFor context.Context
	waitEnd          context.CancelFunc
}

// monitored is a vCPU and the request that stopped it.
type monitored struct {
	ev        xenctrl.Event
	stopped   bool
	responded bool
	injected  bool
	seq       uint64 // of its stops
}

// ringSlots is how many requests are in the ring at a time: 8 of 400 bytes in a page
// (xen/include/public/vm_event.h and io/ring.h).
const ringSlots = 8

// OpenMonitor attaches to an HVM or PVH guest.
func OpenMonitor(hv Hypervisor, frames *paging.Cache, cfg Config) (*MonitorRoute, error) {
	m, err := newMonitor(hv, frames, cfg.State)
	if err != nil {
		return nil, err
	}
	m.SetKernelRoot(cfg.Root)
	m.settle = cfg.Roots
	if err := m.attach(); err != nil {
		return m, err
	}
	m.port = m.mon.Port() // no event is on yet
	if err := m.listen(); err != nil {
		return m, errors.Join(err, m.mon.Close())
	}
	return m, nil
}

func newMonitor(hv Hypervisor, frames *paging.Cache, state []byte) (*MonitorRoute, error) {
	info, err := hv.Info()
	if err != nil {
		return nil, mapErr(err)
	}
	caps, err := hv.MonitorCapabilities()
	if err != nil {
		return nil, fmt.Errorf("%w (monitor capabilities: %w)", ErrNoMonitor, mapErr(err))
	}
	if caps&xenctrl.MonitorSoftwareBreakpoint == 0 {
		return nil, fmt.Errorf("%w (capabilities %#x)", ErrNoMonitor, uint32(caps))
	}
	if info.Flags&xenctrl.DomainDebugged != 0 {
		return nil, ErrBusy // an attached debugger takes every int3 before vm_event does
	}
	n := info.MaxVCPUID + 1
	if n < 1 || n > xenctrl.MaxVCPUs {
		return nil, fmt.Errorf("domain %d has vCPU numbers up to %d", info.ID, info.MaxVCPUID)
	}
	s, vs, err := stateIn(state, n)
	if err != nil {
		return nil, err
	}
	m := &MonitorRoute{guest: newGuest(hv, frames, s), caps: caps, nvcpu: n, vcpus: make([]monitored, n), known: vs}
	m.roots = m.currentRoots
	return m, m.findMode()
}

// attach opens the ring.
func (m *MonitorRoute) attach() (err error) {
	if m.mon, err = m.hv.OpenMonitor(); err != nil {
		if errors.Is(err, xenctrl.ErrBusy) {
			return fmt.Errorf("%w (%w)", ErrBusy, err)
		}
		return fmt.Errorf("attach monitor: %w", mapErr(err))
	}
	return nil
}

// listen turns the events of breakpoints on.
func (m *MonitorRoute) listen() error {
	if err := attempts(func() error { return already(m.mon.SetSoftwareBreakpoint(true)) }); err != nil {
		return fmt.Errorf("monitor software breakpoints: %w", err)
	}
	return nil
}

// already ignores EEXIST: the setting was in effect (xen/arch/x86/monitor.c), as a
// predecessor that died may have left it.
func already(err error) error {
	if errors.Is(err, syscall.EEXIST) {
		return nil
	}
	return err
}

// listenSteps turns the events of single steps on, if they aren't.
func (m *MonitorRoute) listenSteps() error {
	if m.trapMon {
		return nil
	}
	on := func() error { return m.mon.SetDebugExceptions(true, true) }
	if m.caps&xenctrl.MonitorSingleStep != 0 {
		on = func() error { return m.mon.SetSingleStep(true) }
	}
	if err := attempts(func() error { return already(on()) }); err != nil {
		return fmt.Errorf("monitor single steps: %w", err)
	}
	m.trapMon = true
	return nil
}

// currentRoots returns page tables that vCPUs use now. A vCPU in user mode may
// use the tables of page-table isolation, whose kernel half is the table before
// (arch/x86/entry/calling.h, PTI_USER_PGTABLE_MASK).
func (m *MonitorRoute) currentRoots() ([]paging.Root, error) {
	var roots []paging.Root
	var errs error
	for v := range m.nvcpu {
		c, err := m.hv.HVMCPU(v)
		if neverUp(err) {
			continue // it has none
		} else if err != nil {
			errs = errors.Join(errs, err)
			continue
		}
		roots = append(roots, paging.Root(c.CR3), paging.Root(c.CR3&^0x1000))
	}
	return roots, errs
}

// findMode finds out how the guest's page tables are to be walked. A guest that
// hasn't turned paging on yet has no kernel to probe.
func (m *MonitorRoute) findMode() error {
	var errs error
	for v := range m.nvcpu {
		c, err := m.hv.HVMCPU(v)
		if err == nil {
			var mode paging.Mode
			if mode, err = paging.ModeOf(c.CR0, c.CR4, c.EFER); err == nil {
				m.mem = paging.New(m.frames, mode)
				return nil
			}
		}
		errs = errors.Join(errs, fmt.Errorf("vCPU %d: %w", v, mapErr(err)))
	}
	return errs
}

// Caps implements breakpoint.Driver. Without a hypercall that holds single
// vCPUs, only a guest with one vCPU can be stepped in place.
func (m *MonitorRoute) Caps() breakpoint.Caps {
	m.mu.Lock()
	defer m.mu.Unlock()
	if now := time.Now(); m.online == 0 || now.Sub(m.checked) > time.Second {
		if info, err := m.hv.Info(); err == nil {
			m.online, m.checked = info.OnlineVCPUs, now
		}
	}
	canTrap := m.caps&(xenctrl.MonitorSingleStep|xenctrl.MonitorDebugException) != 0
	return breakpoint.Caps{
		VCPUs: m.nvcpu, Step: m.online == 1 && canTrap, Queue: ringSlots,
		LA57: m.mem.Mode().Kind == paging.FiveLevel,
	}
}

// alone makes sure that no other vCPU runs than the one that has stopped. What
// Caps said may be a second old; now nobody can bring another one up.
func (m *MonitorRoute) alone() error {
	info, err := m.hv.Info()
	if err != nil {
		return mapErr(err)
	}
	if m.online, m.checked = info.OnlineVCPUs, time.Now(); m.online != 1 {
		return fmt.Errorf("%w: %d vCPUs are online, and they can't be held", breakpoint.ErrNoWayPast, m.online)
	}
	return nil
}

// Wait implements breakpoint.Driver.
func (m *MonitorRoute) Wait(ctx context.Context, s *breakpoint.Stop) error {
	for {
		if now := spin.Clock(); now-m.alive > aliveEvery {
			if err := m.checkAlive(); err != nil {
				return err
			}
			m.alive = now
		}
		ok, err := m.poll(s)
		if ok || err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if m.isLeft() {
			<-ctx.Done()
			return ctx.Err()
		}
		if m.waitFor != ctx || m.waitCtx.Err() != nil {
			if m.waitEnd != nil {
				m.waitEnd()
			}
			m.waitFor = ctx
			m.waitCtx, m.waitEnd = context.WithTimeout(ctx, aliveEvery)
		}
		if err := m.mon.Wait(m.waitCtx); err != nil && m.waitCtx.Err() == nil {
			return mapErr(err)
		}
	}
}

func (m *MonitorRoute) isLeft() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.left
}

// poll returns one stop, if there is one.
func (m *MonitorRoute) poll(s *breakpoint.Stop) (bool, error) {
	m.beat()
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.left {
		return false, nil
	}
	if err := m.flush(); err != nil {
		return false, err
	}
	for {
		ev := &m.in
		fresh := !m.redo
		if fresh {
			ok, err := m.mon.Next(ev)
			m.crowd(ok)
			if err != nil || !ok {
				return false, mapErr(err)
			}
		}
		// A request that can't be dealt with now is not forgotten.
		m.redo = true
		v := &m.other
		known := ev.VCPU >= 0 && ev.VCPU < m.nvcpu
		if known {
			v = &m.vcpus[ev.VCPU]
		}
		if fresh {
			v.ev, v.stopped, v.responded, v.injected = *ev, true, false, false
			v.seq++
			if known { // in this order: who finds it told finds it stopped
				k := &m.known[ev.VCPU]
				k.told = false
				k.stopped = true
				k.again = false
			}
		}
		*s = breakpoint.Stop{VCPU: ev.VCPU, Regs: regsOfEvent(&ev.Regs), User: ev.Regs.CS&3 == 3, Seq: v.seq}
		switch {
		case !known:
			if err := m.answer(v, ev, 0); err != nil { // let it go on
				return false, err
			}
		case ev.Reason == xenctrl.ReasonSoftwareBreakpoint:
			s.Reason = breakpoint.Hit
			m.redo = false
			return true, nil
		case ev.Reason == xenctrl.ReasonSingleStep, ev.Reason == xenctrl.ReasonDebugException:
			if st := m.step; st != nil && st.vcpu == ev.VCPU && !st.done {
				if err := attempts(func() error { return m.dropAfterStep(st.patch) }); err != nil {
					return false, err
				}
				st.done, m.shared.step.phase = true, stepDone
				s.Reason = breakpoint.Stepped
				m.redo = false
				return true, nil
			}
			if err := m.giveBack(v); err != nil {
				return false, err
			}
		default:
			if err := m.answer(v, ev, 0); err != nil {
				return false, err
			}
		}
		m.redo = false
	}
}

// giveBack returns a debug exception of the guest's own to it.
func (m *MonitorRoute) giveBack(v *monitored) error {
	m.out = v.ev
	ev := &m.out
	if ev.Reason == xenctrl.ReasonDebugException && !v.injected {
		if err := attempts(func() error {
			return m.hv.InjectEvent(ev.VCPU, xenctrl.VectorDebug, ev.Type, noErrorCode, ev.InsnLen, ev.Pending)
		}); err != nil {
			return err
		}
		v.injected = true
	}
	return m.answer(v, ev, 0)
}

// noErrorCode (X86_EVENT_NO_EC, xen/arch/x86/include/asm/x86_emulate.h).
const noErrorCode = ^uint32(0)

// answer responds to v's request and notifies Xen. When it fails it may be
// called again, and does what is still to be done.
func (m *MonitorRoute) answer(v *monitored, ev *xenctrl.Event, flags xenctrl.EventFlags) error {
	if v.stopped && !v.responded {
		ev.Flags = ev.Flags&xenctrl.EventVCPUPaused | flags
		if err := attempts(func() error { return m.mon.Respond(ev) }); err != nil {
			return fmt.Errorf("vCPU %d: respond: %w", ev.VCPU, err)
		}
		v.responded, m.notify = true, true
		if ev.VCPU < m.nvcpu {
			m.known[ev.VCPU].stopped = false
		}
	}
	v.stopped = false
	return m.flush()
}

// flush tells Xen of the responses that it hasn't been told of.
func (m *MonitorRoute) flush() error {
	if !m.notify {
		return nil
	}
	m.intent = intentNotify
	err := attempts(m.mon.Notify)
	if err == nil { // before the intent is forgotten: in between it isn't known
		for v := range m.known {
			m.known[v].told = !m.known[v].stopped
		}
	}
	m.intent = intentNone
	if err != nil {
		return fmt.Errorf("notify Xen: %w", err)
	}
	m.notify = false
	return nil
}

// stopOf returns the vCPU of a stop. answered says that this stop has been answered, and the
// vCPU has stopped anew since.
func (m *MonitorRoute) stopOf(s *breakpoint.Stop) (v *monitored, answered bool, err error) {
	if s.VCPU < 0 || s.VCPU >= m.nvcpu {
		return nil, false, fmt.Errorf("vCPU %d isn't stopped", s.VCPU)
	}
	v = &m.vcpus[s.VCPU]
	return v, s.Seq != v.seq, nil
}

// Resume implements breakpoint.Driver.
func (m *MonitorRoute) Resume(s *breakpoint.Stop) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	v, answered, err := m.stopOf(s)
	if err != nil || answered {
		return err
	}
	var flags xenctrl.EventFlags
	ended := m.step != nil && m.step.vcpu == s.VCPU && m.step.done
	if ended && m.caps&xenctrl.MonitorSingleStep != 0 {
		flags = xenctrl.EventToggleSingleStep // off again
	}
	m.out = v.ev
	ev := &m.out
	setEventRegs(&ev.Regs, &s.Regs)
	if ev.Regs != v.ev.Regs {
		flags |= xenctrl.EventSetRegisters
	}
	err = m.answer(v, ev, flags)
	if ended && v.responded {
		m.step = nil
		if err == nil {
			m.shared.step.vcpu = 0
		}
	}
	return err
}

// StepOver implements breakpoint.Driver.
func (m *MonitorRoute) StepOver(s *breakpoint.Stop, addr uint64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	v, answered, err := m.stopOf(s)
	if err != nil || answered {
		return err
	}
	p := m.breakAt(addr)
	if p == nil {
		return fmt.Errorf("step over %#x: no breakpoint there", addr)
	}
	if m.step != nil && (m.step.vcpu != s.VCPU || !m.step.done) {
		return fmt.Errorf("step over %#x: vCPU %d is stepping", addr, m.step.vcpu)
	}
	if err := m.alone(); err != nil {
		return err
	}
	mtf := m.caps&xenctrl.MonitorSingleStep != 0
	again := m.step != nil
	m.out = v.ev
	ev := &m.out
	setEventRegs(&ev.Regs, &s.Regs)
	var flags xenctrl.EventFlags
	if err := m.listenSteps(); err != nil {
		return err
	}
	if mtf {
		if !again {
			flags |= xenctrl.EventToggleSingleStep // and again when it is done
		}
	} else {
		// Interrupts are off, as the step would end in their handler.
		ev.Regs.RFLAGS = ev.Regs.RFLAGS&^eflagIF | eflagTF
	}
	if ev.Regs != v.ev.Regs {
		flags |= xenctrl.EventSetRegisters
	}
	m.shared.step.begin(s.VCPU, p, &s.Regs)
	if err := attempts(func() error { return m.liftForStep(p) }); err != nil {
		m.shared.step.vcpu = 0
		return err
	}
	m.step = &step{vcpu: s.VCPU, patch: p}
	if err := m.answer(v, ev, flags); err != nil && !v.responded {
		m.step, m.shared.step.vcpu = nil, 0
		return errors.Join(err, m.dropAfterStep(p))
	}
	m.shared.step.phase = stepRuns
	return nil
}

// Reinject implements breakpoint.Driver.
func (m *MonitorRoute) Reinject(s *breakpoint.Stop) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	v, answered, err := m.stopOf(s)
	if err != nil || answered {
		return err
	}
	if v.stopped && !v.responded && !v.injected {
		ev := &v.ev
		if err := attempts(func() error {
			return m.hv.InjectEvent(ev.VCPU, xenctrl.VectorBreakpoint, ev.Type, noErrorCode, ev.InsnLen, 0)
		}); err != nil {
			return fmt.Errorf("vCPU %d: inject breakpoint: %w", s.VCPU, err)
		}
		v.injected = true
	}
	m.out = v.ev
	return m.answer(v, &m.out, 0)
}

// Close implements breakpoint.Driver.
func (m *MonitorRoute) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return nil
	}
	err := m.leave()
	if err != nil && !errors.Is(err, breakpoint.ErrGone) {
		return err
	}
	if err != nil {
		_ = m.mon.Close() // the domain is gone; what the ring takes here is not
	}
	m.closed = true
	if m.waitEnd != nil {
		m.waitEnd()
	}
	return err
}

func (m *MonitorRoute) leave() error {
	for v := range m.vcpus {
		if m.vcpus[v].stopped && !m.dead() {
			return fmt.Errorf("vCPU %d is stopped", v)
		}
	}
	// A domain that somebody has paused in the middle of a step: its vCPU has TF, and
	// there is no call to take it back. With the monitor trap flag there is.
	if st := m.step; st != nil && !st.done && m.caps&xenctrl.MonitorSingleStep == 0 && !m.dead() && !(st.maybe && !m.trapped(st.vcpu)) {
		return fmt.Errorf("vCPU %d has not made its step yet", st.vcpu)
	}
	if !m.left {
		if err := m.queued(); err != nil {
			return err
		}
		if err := m.detach(); err != nil {
			return err
		}
		m.left = true
	}
	return m.thawAll()
}

// queued fails if a vCPU may wait for room on the ring, or has been told that there is some
// and has not run since, as the guest is frozen: Xen refuses to end the monitor in the first
// case, and in the second doesn't, and lets the vCPU look at what it has freed
// (vm_event_disable and wake_up_nr, xen/common/vm_event.c and wait.c). Such a vCPU is at the
// int3 that it has executed, which may have been removed, and its registers stay as they
// are until it has put its request on the ring. No breakpoint of ours is in the guest.
func (m *MonitorRoute) queued() error {
	if m.nvcpu <= ringSlots || m.dead() {
		return nil
	}
	if m.crowded || len(m.suspects) > 0 {
		at, err := m.atInt3()
		if err != nil {
			return err
		}
		if !m.crowded {
			at = slices.DeleteFunc(at, func(p place) bool { return !slices.Contains(m.suspects, p) }) // it has moved
		}
		m.crowded, m.burst, m.suspects = false, 0, at
	}
	if len(m.suspects) > 0 {
		p := &m.suspects[0]
		return fmt.Errorf("%w: vCPU %d at %#x", breakpoint.ErrQueued, p.vcpu, p.cpu.RIP)
	}
	return nil
}

// crowd notes that the ring may be full: so many requests have come since it was empty,
// and all of them answered, as it has places.
func (m *MonitorRoute) crowd(taken bool) {
	switch {
	case m.nvcpu <= ringSlots:
	case taken:
		m.burst++
		m.crowded = m.crowded || m.burst >= ringSlots
	case !slices.ContainsFunc(m.vcpus, func(v monitored) bool { return v.stopped }):
		m.burst = 0
	}
}

// place is where a vCPU is.
type place struct {
	vcpu int
	cpu  xenctrl.HVMCPU
}

// atInt3 returns the vCPUs that are at an int3, whoever's it is, or at one that was there,
// but for those that wait for an interrupt: they have executed a HLT, and nothing since.
func (m *MonitorRoute) atInt3() (at []place, err error) {
	for v := range m.nvcpu {
		var c xenctrl.HVMCPU
		if err := attempts(func() (err error) { c, err = m.hv.HVMCPU(v); return err }); neverUp(err) {
			continue
		} else if err != nil {
			return nil, mapErr(err)
		}
		m.breaksMu.Lock()
		was := m.been[c.RIP]
		m.breaksMu.Unlock()
		var b [1]byte
		if !was && (m.read(c.CR3, c.RIP, b[:]) != nil || b[0] != int3) {
			continue
		}
		var info xenctrl.VCPUInfo
		if err := attempts(func() (err error) { info, err = m.hv.VCPUInfo(v); return err }); err != nil {
			return nil, mapErr(err)
		}
		if !info.Blocked {
			at = append(at, place{v, c})
		}
	}
	return at, nil
}

// trapped reports whether a vCPU has TF. What it has been given shows only when it has run.
func (m *MonitorRoute) trapped(v int) bool {
	c, err := m.hv.HVMCPU(v)
	return err != nil || c.RFLAGS&eflagTF != 0
}

func (m *MonitorRoute) detach() error {
	off := func(what string, f func() error) error {
		err := attempts(func() error { return already(f()) })
		if err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		return nil
	}
	if err := off("notify Xen", m.flush); err != nil {
		return err
	}
	if m.trapMon {
		if m.caps&xenctrl.MonitorSingleStep != 0 {
			if err := off("stop monitoring single steps", func() error { return m.mon.SetSingleStep(false) }); err != nil {
				return err
			}
			for v := range m.nvcpu {
				if err := off("end single steps", func() error { return m.hv.DebugControl(v, false) }); err != nil {
					return err
				}
			}
		} else if err := off("stop monitoring debug exceptions", func() error { return m.mon.SetDebugExceptions(false, false) }); err != nil {
			return err
		}
		m.trapMon = false
	}
	if err := off("stop monitoring breakpoints", func() error { return m.mon.SetSoftwareBreakpoint(false) }); err != nil {
		return err
	}
	return off("detach monitor", m.mon.Close)
}

func regsOfEvent(e *xenctrl.EventRegs) x86.Regs {
	return x86.Regs{
		R15: e.R15, R14: e.R14, R13: e.R13, R12: e.R12, BP: e.RBP, BX: e.RBX,
		R11: e.R11, R10: e.R10, R9: e.R9, R8: e.R8,
		AX: e.RAX, CX: e.RCX, DX: e.RDX, SI: e.RSI, DI: e.RDI,
		IP: e.RIP, CS: uint64(e.CS), Flags: e.RFLAGS, SP: e.RSP, SS: uint64(e.SS),
		FSBase: e.FSBase, GSBase: e.GSBase, CR3: e.CR3,
	}
}

func setEventRegs(e *xenctrl.EventRegs, r *x86.Regs) {
	e.R15, e.R14, e.R13, e.R12, e.RBP, e.RBX = r.R15, r.R14, r.R13, r.R12, r.BP, r.BX
	e.R11, e.R10, e.R9, e.R8 = r.R11, r.R10, r.R9, r.R8
	e.RAX, e.RCX, e.RDX, e.RSI, e.RDI = r.AX, r.CX, r.DX, r.SI, r.DI
	e.RIP, e.RFLAGS, e.RSP = r.IP, r.Flags, r.SP
}

var _ breakpoint.Driver = (*MonitorRoute)(nil)
