package xentest

import (
	"context"
	"fmt"
	"syscall"
	"time"

	"github.com/vmprobes/vmprobes/internal/xen"
	"github.com/vmprobes/vmprobes/xenctrl"
)

// ringPage is the page of a vm_event ring, of which whoever has it mapped sees the same:
// eight places of 400 bytes behind a header of 64 (__RING_SIZE, xen/include/public/io/ring.h),
// in which requests and responses share the places, so that a response overwrites a request
// that may not be answered yet.
type ringPage struct {
	slots            [ringSlots]xenctrl.Event
	reqProd, rspProd uint32
	reqCons          uint32 // req_event less one: how far a tool has come
}

// vmEvent is Xen's side of a monitor (struct vm_event_domain, xen/common/vm_event.c). It
// outlives the tool that has enabled it: nothing but XEN_VM_EVENT_DISABLE and the end of
// the domain ends it.
type vmEvent struct {
	page    *ringPage
	rspCons uint32
	port    uint32
	// bound is who has bound dom0's end of the event channel. When a process dies its ends
	// are closed, and the guest's is unbound again, for any process of dom0 to be bound
	// (evtchn_close and evtchn_bind_interdomain, xen/common/event_channel.c). Without it
	// nobody is notified of requests, which are put on the ring all the same.
	bound *monitor
	queue []*vcpu // on the wait queue, because the ring was full

	breakpoint, singleStep, debug, debugSync bool
}

// monitor is a monitor as a tool has it.
type monitor struct {
	m *Machine
	*vmEvent
	ready  chan struct{}
	closed bool
}

// room is how many requests the ring takes (RING_FREE_REQUESTS): the place of one is free
// again when Xen has read its response.
func (d *vmEvent) room() int { return ringSlots - int(d.page.reqProd-d.rspCons) }

// untaken is how many requests no tool has taken.
func (d *vmEvent) untaken() int { return int(d.page.reqProd - d.page.reqCons) }

// sendEvent puts a request of v on the ring; a sync one pauses the vCPU. If there is no
// room the vCPU sleeps on a wait queue (vm_event_wait_slot), and is not paused yet:
// monitor_traps (xen/common/monitor.c) claims the place first.
func (m *Machine) sendEvent(v *vcpu, e *xenctrl.Event, sync bool) {
	e.VCPU = v.id
	e.Regs = xenctrl.EventRegs{
		RAX: v.r[rax], RCX: v.r[rcx], RDX: v.r[rdx], RBX: v.r[rbx], RSP: v.r[rsp], RBP: v.r[rbp], RSI: v.r[rsi],
		RDI: v.r[rdi], R8: v.r[r8], R9: v.r[r9], R10: v.r[r10], R11: v.r[r11], R12: v.r[r12], R13: v.r[r13],
		R14: v.r[r14], R15: v.r[r15], RFLAGS: v.flags, RIP: v.rip, DR6: v.dr6, DR7: 0x400,
		CR0: 0x80050033, CR3: v.cr3, CR4: 0x6f0, EFER: 0xd01, STAR: 0x0023001000000000, LSTAR: m.prog.addr("bad"),
		FSBase: v.fsBase, GSBase: v.gsBase, ShadowGS: v.shadow, CS: hvmCS, SS: hvmSS,
	}
	if sync {
		e.Flags = xenctrl.EventVCPUPaused
	}
	v.ringWait = e
	m.claim(v)
}

// claim puts v's request on the ring, or v to sleep until there may be room.
func (m *Machine) claim(v *vcpu) {
	d := m.mon
	if d == nil {
		m.report(fmt.Sprintf("vcpu %d was woken to put a request on a ring that Xen has freed", v.id))
		return
	}
	v.woken = false
	if d.room() == 0 {
		d.queue = append(d.queue, v)
		return
	}
	if v.ringWait.Flags&xenctrl.EventVCPUPaused != 0 {
		v.paused++
	}
	d.page.slots[d.page.reqProd%ringSlots] = *v.ringWait
	d.page.reqProd++
	v.ringWait = nil
	if d.bound != nil {
		d.bound.kick()
	}
}

func (mon *monitor) kick() {
	select {
	case mon.ready <- struct{}{}:
	default:
	}
}

// resumeEvents is vm_event_resume: Xen reads the responses. With each one it may wake
// those who wait for room; they take it when they run next, which they don't while the
// domain is paused.
func (m *Machine) resumeEvents(d *vmEvent) {
	for d.rspCons != d.page.rspProd {
		e := d.page.slots[d.rspCons%ringSlots]
		d.rspCons++
		for n := d.room(); n > 0 && len(d.queue) > 0; n-- {
			d.queue[0].woken = true
			d.queue = d.queue[1:]
		}
		m.respond(&e)
	}
}

// disableEvents is XEN_VM_EVENT_DISABLE. It fails while vCPUs are on the wait queue, and
// turns all events off even so (arch_monitor_cleanup_domain). It doesn't know of those that
// were woken and haven't run since: they look at the ring once more, whose memory is freed.
func (m *Machine) disableEvents() error {
	d := m.mon
	d.breakpoint, d.singleStep, d.debug, d.debugSync = false, false, false, false
	if len(d.queue) > 0 {
		return syscall.EBUSY
	}
	for _, v := range m.v {
		if v.woken {
			m.report(fmt.Sprintf("the ring is freed while vcpu %d, which was woken, is about to look at it", v.id))
		}
	}
	m.mon = nil
	return nil
}

// ring is the page of a ring, mapped by a process before a monitor was attached.
type ring struct {
	m    *Machine
	page *ringPage
	last *monitor // taken with it
}

// Close unmaps it.
func (r *ring) Close() error {
	r.m.lock()
	defer r.m.mu.Unlock()
	r.unbind()
	return nil
}

func (r *ring) unbind() {
	if d := r.m.mon; d != nil && r.last != nil && d.bound == r.last {
		d.bound = nil
	}
	r.last = nil
}

// MapRing maps the page that will be the ring of the next monitor, and puts one there
// first if there is none. When the monitor is attached the page is taken out of the
// guest's memory (xc_vm_event_enable, tools/libs/ctrl/xc_vm_event.c), and nobody can map it
// any more.
func (h hypervisor) MapRing() (r xen.Ring, err error) {
	m := h.m
	err = m.do("map ring", -1, func() error {
		switch {
		case m.pv():
			return syscall.EOPNOTSUPP
		case m.mon != nil:
			return syscall.EBUSY
		case m.ringPage == nil:
			m.ringPage = new(ringPage)
		}
		r = &ring{m: m, page: m.ringPage}
		return nil
	})
	return r, err
}

// TakeMonitor goes on with the monitor of a process that died.
func (h hypervisor) TakeMonitor(r xen.Ring, port uint32) (mon xen.Monitor, st xenctrl.RingState, err error) {
	m := h.m
	err = m.do("take monitor", -1, func() error {
		r := r.(*ring)
		r.unbind()
		d := m.mon
		switch {
		case d == nil || port != d.port || d.bound != nil:
			return syscall.EINVAL
		case r.page != d.page:
			return xenctrl.ErrRing
		}
		p := r.page
		st = xenctrl.RingState{Unanswered: int(p.reqCons - p.rspProd), LastTaken: -1, LastAnswered: -1}
		if p.reqCons > 0 {
			st.LastTaken = p.slots[(p.reqCons-1)%ringSlots].VCPU
		}
		if p.rspProd > 0 {
			st.LastAnswered = p.slots[(p.rspProd-1)%ringSlots].VCPU
		}
		r.last = &monitor{m: m, vmEvent: d, ready: make(chan struct{}, 1)}
		d.bound = r.last
		r.last.kick() // bind_interdomain sets the port pending
		mon = r.last
		return nil
	})
	return mon, st, err
}

// Died closes the event channels of the process that has the monitor.
func (h hypervisor) Died() {
	h.m.lock()
	defer h.m.mu.Unlock()
	if h.m.mon != nil {
		h.m.mon.bound = nil
	}
}

// Port is the guest's port of the event channel.
func (mon *monitor) Port() uint32 { return mon.port }

func (mon *monitor) do(op string, f func() error) error {
	return mon.m.do(op, -1, func() error {
		if mon.closed || mon.m.mon != mon.vmEvent {
			return xenctrl.ErrClosed
		}
		return f()
	})
}

func (mon *monitor) SetSoftwareBreakpoint(on bool) error {
	return mon.do("monitor software breakpoint", func() error { return set(&mon.breakpoint, on) })
}

// set changes a setting; Xen refuses what is so already.
func set(p *bool, on bool) error {
	if *p == on {
		return syscall.EEXIST
	}
	*p = on
	return nil
}

func (mon *monitor) SetSingleStep(on bool) error {
	return mon.do("monitor single step", func() error {
		if !mon.m.cfg.MTF {
			return syscall.EOPNOTSUPP
		}
		return set(&mon.singleStep, on)
	})
}

func (mon *monitor) SetDebugExceptions(on, sync bool) error {
	return mon.do("monitor debug exceptions", func() error {
		if err := set(&mon.debug, on); err != nil {
			return err
		}
		mon.debugSync = sync
		return nil
	})
}

// Wait counts as a call of the hypervisor. It returns for nothing now and then.
// Without Start it runs the guest.
func (mon *monitor) Wait(ctx context.Context) error {
	const op = "monitor wait"
	m := mon.m
	spurious := false
	if err := mon.do(op, func() error {
		spurious = mon.untaken() != 0 || m.rng.IntN(32) == 0
		return nil
	}); err != nil || spurious {
		return err
	}
	for {
		m.lock()
		closed, ready, dead := mon.closed, mon.untaken() != 0, m.dying
		n := 0
		if !m.started && !ready && !dead {
			n = m.run(64, false)
		}
		m.mu.Unlock()
		switch {
		case closed:
			return xenctrl.ErrClosed
		case ready:
			return nil
		case dead:
			return m.wrap(op, -1, syscall.ESRCH)
		case ctx.Err() != nil:
			return ctx.Err()
		case n != 0:
			continue
		}
		timer := time.NewTimer(time.Millisecond)
		if m.Started() {
			timer.Reset(time.Hour)
		}
		select {
		case <-ctx.Done():
		case <-m.dead:
		case <-mon.ready:
		case <-timer.C: // somebody may have made a vCPU runnable
		}
		timer.Stop()
	}
}

// Started reports whether the guest runs in the background.
func (m *Machine) Started() bool {
	m.lock()
	defer m.mu.Unlock()
	return m.started
}

// Next and Respond only touch the ring's memory, and are not counted as calls.
func (mon *monitor) Next(e *xenctrl.Event) (bool, error) {
	m := mon.m
	m.lock()
	defer m.mu.Unlock()
	switch {
	case mon.closed:
		return false, xenctrl.ErrClosed
	case m.dying:
		return false, m.wrap("monitor next", -1, syscall.ESRCH)
	case mon.untaken() == 0:
		return false, nil
	}
	*e = mon.page.slots[mon.page.reqCons%ringSlots]
	mon.page.reqCons++
	return true, nil
}

func (mon *monitor) Respond(e *xenctrl.Event) error {
	m := mon.m
	m.lock()
	defer m.mu.Unlock()
	if mon.closed {
		return xenctrl.ErrClosed
	}
	p := mon.page
	if p.rspProd == p.reqCons {
		m.report(fmt.Sprintf("a response for vcpu %d that nobody waits for", e.VCPU))
		return xenctrl.ErrRing
	}
	p.slots[p.rspProd%ringSlots] = *e
	p.rspProd++
	return nil
}

// Notify makes Xen read the responses (vm_event_resume).
func (mon *monitor) Notify() error {
	m := mon.m
	return mon.do("monitor notify", func() error {
		m.resumeEvents(mon.vmEvent)
		return nil
	})
}

func (m *Machine) respond(e *xenctrl.Event) {
	if e.VCPU < 0 || e.VCPU >= len(m.v) {
		return
	}
	v := m.v[e.VCPU]
	emul := e.Flags&(xenctrl.EventEmulate|xenctrl.EventSetEmulInsnData) == xenctrl.EventEmulate|xenctrl.EventSetEmulInsnData
	if emul && e.Reason == xenctrl.ReasonSoftwareBreakpoint {
		v.emulate = append([]byte(nil), e.InsnData[:]...)
		v.resume = true
	}
	if v.paused == 0 {
		return
	}
	if e.Flags&xenctrl.EventSetRegisters != 0 {
		if e.Flags&xenctrl.EventSetEmulInsnData != 0 {
			m.report("registers and instruction bytes in one response: they are a union")
		}
		r := e.Regs
		v.setRegs = &r
		v.resume = true
	}
	if e.Flags&xenctrl.EventToggleSingleStep != 0 && m.cfg.MTF {
		v.single = !v.single
	}
	if e.Flags&xenctrl.EventVCPUPaused != 0 {
		v.paused--
	}
}

// hvmResume is hvm_do_resume: what is pending for a vCPU that enters the guest.
// It ends with an instruction executed if that was what was asked for.
func (m *Machine) hvmResume(v *vcpu) {
	v.resume = false
	if code := v.emulate; code != nil {
		v.emulate = nil
		m.emulated(v, code)
		if v.halted {
			return
		}
	}
	if r := v.setRegs; r != nil {
		v.setRegs = nil
		v.r = [16]uint64{
			rax: r.RAX, rcx: r.RCX, rdx: r.RDX, rbx: r.RBX, rsp: r.RSP, rbp: r.RBP, rsi: r.RSI, rdi: r.RDI,
			r8: r.R8, r9: r.R9, r10: r.R10, r11: r.R11, r12: r.R12, r13: r.R13, r14: r.R14, r15: r.R15,
		}
		v.rip, v.flags = r.RIP, r.RFLAGS|flMBS
		if v.flags&flTF != 0 && m.cfg.IRQEvery > 0 && m.rng.IntN(8) == 0 {
			v.irq = 0
		}
	}
	in := v.inject
	v.inject = nil
	switch {
	case in == nil:
	case in.vector != 3:
		m.fail(v, "vector %d injected", in.vector)
	case in.typ != xenctrl.EventTypeSoftwareException || in.insnLen != 1:
		m.fail(v, "int3 injected with type %d and length %d", in.typ, in.insnLen)
	default:
		m.guestInt3(v, v.rip)
	}
}

// emulated has the hypervisor's emulator execute code at RIP: all repetitions of
// a string instruction, and no trap after it.
func (m *Machine) emulated(v *vcpu, code []byte) {
	for {
		switch m.exec(v, code[:15]) {
		case again:
			continue
		case done:
		case isInt3:
			m.guestInt3(v, v.rip)
		case isFault:
			m.fail(v, "page fault in emulation: % x", code)
		default:
			m.fail(v, "not emulated: % x: invalid opcode to the guest", code)
		}
		return
	}
}

// Close ends the monitor. vCPUs that wait for a response go on waiting.
func (mon *monitor) Close() error {
	m := mon.m
	return mon.do("close monitor", func() error {
		if err := m.disableEvents(); err != nil {
			return err
		}
		mon.closed = true
		mon.kick()
		return nil
	})
}
