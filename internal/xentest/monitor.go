package xentest

import (
	"context"
	"fmt"
	"syscall"
	"time"

	"github.com/vmprobes/vmprobes/xenctrl"
)

// monitor is a vm_event ring and the settings of the monitor.
type monitor struct {
	m         *Machine
	requests  []xenctrl.Event // not taken by the tool yet
	responses []xenctrl.Event // not read by Xen yet
	used      int             // slots between request and response
	ready     chan struct{}
	closed    bool

	breakpoint, singleStep, debug, debugSync bool
}

// sendEvent puts a request of v on the ring; a sync one pauses the vCPU.
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
		v.paused++
	}
	if m.mon.used == ringSlots {
		v.ringWait = e
		return
	}
	m.mon.put(e)
}

func (mon *monitor) put(e *xenctrl.Event) {
	mon.used++
	mon.requests = append(mon.requests, *e)
	select {
	case mon.ready <- struct{}{}:
	default:
	}
}

func (mon *monitor) do(op string, f func() error) error {
	return mon.m.do(op, -1, func() error {
		if mon.closed {
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
		spurious = len(mon.requests) != 0 || m.rng.IntN(32) == 0
		return nil
	}); err != nil || spurious {
		return err
	}
	for {
		m.lock()
		closed, ready, dead := mon.closed, len(mon.requests) != 0, m.dying
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
	case len(mon.requests) == 0:
		return false, nil
	}
	*e = mon.requests[0]
	mon.requests = mon.requests[1:]
	return true, nil
}

func (mon *monitor) Respond(e *xenctrl.Event) error {
	m := mon.m
	m.lock()
	defer m.mu.Unlock()
	if mon.closed {
		return xenctrl.ErrClosed
	}
	if len(mon.responses)+len(mon.requests) >= mon.used {
		m.report(fmt.Sprintf("a response for vcpu %d that nobody waits for", e.VCPU))
	}
	mon.responses = append(mon.responses, *e)
	return nil
}

// Notify makes Xen read the responses (vm_event_resume).
func (mon *monitor) Notify() error {
	m := mon.m
	return mon.do("monitor notify", func() error {
		for i := range mon.responses {
			m.respond(&mon.responses[i])
			mon.used--
		}
		mon.responses = mon.responses[:0]
		for _, v := range m.v {
			if v.ringWait != nil && mon.used < ringSlots {
				e := v.ringWait
				v.ringWait = nil
				mon.put(e)
			}
		}
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
		mon.closed = true
		m.mon = nil
		for _, v := range m.v {
			v.ringWait = nil
		}
		select {
		case mon.ready <- struct{}{}:
		default:
		}
		return nil
	})
}
