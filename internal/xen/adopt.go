package xen

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/x86"
	"github.com/vmprobes/vmprobes/paging"
	"github.com/vmprobes/vmprobes/xenctrl"
)

// Left is what a process that died had in the guest, as far as a driver has to know.
type Left struct {
	State  []byte // what it was given to OpenDebugger or OpenMonitor
	Breaks []breakpoint.LeftBreak
	Gone   []breakpoint.LeftBreak // that were removed not long ago: a vCPU may have hit one just before
	Ends   []uint64               // addresses of the int3s that end slots
	Ring   Ring                   // that the dead process' monitor has, or nil: MonitorRoute's
	Logger *slog.Logger           // or nil
}

// AdoptBreak implements breakpoint.Adopter.
func (g *guest) AdoptBreak(addr uint64, in *x86.Insn) (there bool, err error) {
	g.breaksMu.Lock()
	defer g.breaksMu.Unlock()
	cur := make([]byte, in.Len)
	if err := g.read(0, addr, cur); err != nil {
		return false, err
	}
	orig := in.Bytes()
	p := &patch{addr: addr, insn: *in}
	if st := g.stepped; st != nil && st.addr == addr {
		p = st
		p.insn = *in
		p.lifted, p.gone = bytes.Equal(cur, orig), false
	}
	switch {
	case p.lifted || cur[0] == int3 && orig[0] != int3 && bytes.Equal(cur[1:], orig[1:]):
		g.breaks[addr], g.been[addr] = p, true
		return true, nil
	case bytes.Equal(cur, orig):
		return false, nil
	}
	return false, fmt.Errorf("%w: %#x holds % x, neither the breakpoint nor % x", breakpoint.ErrTextChanged, addr, cur, orig)
}

// Underway implements breakpoint.Adopter.
func (g *guest) Underway() (u breakpoint.Underway, ok bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	st := &g.shared.step
	if st.vcpu == 0 || st.phase == stepBegins {
		return u, false
	}
	return breakpoint.Underway{
		VCPU: st.vcpu - 1, Break: breakpoint.LeftBreak{Addr: st.addr, Insn: st.insn[:st.len]}, Before: st.before,
	}, true
}

// AdoptDebugger takes the place of a process that died with its debugger attached to a PV
// guest. The guest is frozen afterwards, and to be thawed once. The stops which that
// process hadn't answered are returned by Wait then, as if they had just come.
//
// others is how many pauses of the domain's were somebody else's, as "xl pause" makes
// them: those stay.
func AdoptDebugger(hv Hypervisor, frames *paging.Cache, left Left) (_ *Debugger, others int, err error) {
	info, err := hv.Info()
	if err != nil {
		return nil, 0, mapErr(err)
	}
	d, err := newDebugger(hv, frames, info, left.State)
	if err != nil {
		return nil, 0, err
	}
	a := &takeover{Debugger: d, left: &left, attached: info.Flags&xenctrl.DomainDebugged != 0}
	if err := a.run(); err != nil {
		return nil, 0, err
	}
	return d, a.unknown, nil
}

// takeover is an AdoptDebugger in progress. Another process can take over from it, too:
// what it finds out is written down before it is acted on.
type takeover struct {
	*Debugger
	left     *Left
	attached bool // the dead process was
	unknown  int  // pauses that nothing explains
}

func (a *takeover) run() error {
	if err := a.recount(); err != nil {
		return err
	}
	if !a.attached {
		a.unknown -= min(a.maybe, max(a.unknown, 0)) // calls that seem to have been made
		// It had not begun, or had taken everything out and left.
		a.shared.step.vcpu = 0
		return a.commit()
	}
	if err := attempts(func() error { return a.hv.SetDebugging(true) }); err != nil {
		return fmt.Errorf("attach debugger: %w", err)
	}
	if err := a.contexts(); err != nil {
		return err
	}
	for v := range a.vcpus {
		s := &a.vcpus[v]
		s.ext = xenctrl.ExtState{Mask: s.extMask, Data: s.extData[:min(max(s.extLen, 0), maxExt)]}
	}
	if a.stepMade() {
		a.unknown-- // for that the domain was paused
	}
	for {
		// If no pause is without explanation all that speaks for a stop is that one process
		// may have asked for it, while what others may have paused or undone explains the
		// rest. That a vCPU has come back from the int3 that it was given is more likely.
		v, score := a.taken(a.unknown <= a.maybe)
		if v < 0 || score < 3 && (a.asked == 0 || a.unknown+a.paid <= 0) {
			break
		}
		a.stop(v)
		a.latched++
		a.unknown--
		a.asked = max(a.asked-1, 0)
	}
	a.unknown -= min(a.maybe, max(a.unknown, 0))
	for v := range a.vcpus {
		if s := &a.vcpus[v]; s.stopped && s.setting != settingNone {
			if err := a.answer(v); err != nil {
				return err
			}
		}
	}
	if err := a.resumeStep(); err != nil {
		return err
	}
	for v := range a.vcpus {
		if !a.vcpus[v].stopped {
			continue
		}
		a.pending++
		if !slices.ContainsFunc(a.first, func(s breakpoint.Stop) bool { return s.VCPU == v }) {
			a.queue = append(a.queue, v)
		}
	}
	return a.commit()
}

// contexts reads the registers of all vCPUs that have some.
func (a *takeover) contexts() error {
	for v := range a.vcpus {
		if err := attempts(func() error { return a.hv.VCPUContext(v, &a.vcpus[v].ctx) }); err != nil && !neverUp(err) {
			return fmt.Errorf("vCPU %d: read registers: %w", v, mapErr(err))
		}
	}
	return nil
}

// commit makes the account that of a driver that has attached just now: all pauses but
// one have been undone, and that one is owed.
func (a *takeover) commit() error {
	debugged := a.attached && a.unknown+a.paid > 0 // perhaps: the guest by itself
	if a.tries > 1 {
		a.unknown = 0 // one of those who tried before may have made it
	}
	a.owed, a.frozen, a.undone, a.latched, a.asked, a.maybe, a.paid, a.tries, a.counted = 1, 0, 0, 0, 0, 0, 0, 0, false
	if debugged {
		n, err := a.giveDebugExceptions()
		if err != nil {
			return err
		}
		a.unknown -= n
	}
	a.unknown = max(a.unknown, 0)
	for range a.unknown {
		if err := attempts(a.hv.Pause); err != nil {
			return err
		}
	}
	if err := attempts(a.Freeze); err != nil {
		return err
	}
	return a.release()
}

// recount finds out how often the domain was paused, and leaves it paused once. Meanwhile
// every vCPU is held by itself. What was latched is taken.
func (a *takeover) recount() error {
	if n := int(a.took.Load()); n != 0 {
		if n > 0 {
			a.vcpus[n-1].fresh = true
		}
		a.takeStop(n)
	}
	switch a.intent {
	case intentAsk:
		a.asked++
	case intentPause:
		a.maybe++
	case intentUnpause:
		a.paid++
	}
	died := a.intent // in which the last one did: the tool, or a takeover
	a.intent = intentNone
	a.tries++
	if !a.counted {
		if err := a.undo(died); err != nil {
			return err
		}
		a.counted = true
	}
	switch is, err := a.isPaused(); {
	case err != nil:
		return err
	case !is:
		if err := attempts(a.hv.Pause); err != nil {
			return fmt.Errorf("pause the guest: %w", err)
		}
	}
	for range 4 * a.nvcpu {
		var st xenctrl.DomStatus
		a.intent = intentAsk
		if err := attempts(func() (err error) { st, err = a.hv.GdbsxDomStatus(); return err }); err != nil {
			a.intent = intentNone
			return err
		}
		switch {
		case st.VCPU >= a.nvcpu:
			a.latched++
		case st.VCPU >= 0:
			a.tookOwed, a.tookLatched = a.owed, a.latched+1
			a.vcpus[st.VCPU].fresh = true
			a.takeStop(st.VCPU + 1)
		}
		a.intent = intentNone
		if st.VCPU < 0 {
			break
		}
	}
	a.unknown = a.undone - a.owed - a.frozen - a.latched
	for v := range a.nvcpu {
		if err := a.free(v); err != nil {
			return err
		}
	}
	return nil
}

// undo undoes all pauses of the domain, and counts them, while every vCPU is held by itself.
func (a *takeover) undo(died intent) error {
	is, err := a.isPaused()
	switch {
	case err != nil:
		return err
	case is:
	case a.tries > 1 && (a.undone > 0 || died == intentUnpause):
		// Who took over before has undone the last one, and holds every vCPU.
		if died == intentUnpause {
			a.undone, a.paid = a.undone+1, a.paid-1
		}
		return nil
	default:
		// So no event was taken, and no pause made, that nobody wrote down, and
		// nothing is left of those that were written down.
		a.asked, a.maybe, a.paid = 0, 0, 0
		a.owed, a.frozen = 0, 0
		if err := attempts(a.Freeze); err != nil {
			return fmt.Errorf("pause the guest: %w", err)
		}
	}
	for v := range a.nvcpu {
		if err := attempts(func() error { return a.hv.GdbsxPauseVCPU(v) }); err != nil {
			return fmt.Errorf("hold vCPU %d: %w", v, err)
		}
	}
	const most = 4096 // for what is worse than a few tools' pauses
	for is = true; is; {
		if a.undone > most {
			return fmt.Errorf("the domain is paused more than %d times", most)
		}
		if err := attempts(func() error { return a.account(intentUnpause, a.unpause, &a.undone, 1) }); err != nil {
			return fmt.Errorf("unpause: %w", err)
		}
		if is, err = a.isPaused(); err != nil {
			return err
		}
	}
	return nil
}

func (a *takeover) isPaused() (bool, error) {
	var info xenctrl.DomainInfo
	err := attempts(func() (err error) { info, err = a.hv.Info(); return err })
	return info.Flags&xenctrl.DomainPaused != 0, err
}

// stop says that a vCPU has stopped since its last answer.
func (a *takeover) stop(v int) {
	a.vcpus[v].fresh = true
	a.vcpus[v].setting, a.vcpus[v].stopped = settingNone, true
}

// free undoes every hold of a vCPU by itself.
func (a *takeover) free(v int) error {
	for range 64 {
		none := false
		err := attempts(func() error {
			err := a.hv.GdbsxUnpauseVCPU(v)
			if none = errors.Is(err, syscall.EINVAL); none {
				return nil
			}
			return err
		})
		if err != nil || none {
			return err
		}
	}
	return fmt.Errorf("vCPU %d is held more than 64 times", v)
}

// taken returns a vCPU whose event the dead process had taken without writing that
// down, or -1. Such a vCPU is one byte behind an int3; see behind for the score. back says
// that one which was answered before, and is behind an int3 of the guest's own, has come
// back from it.
func (a *takeover) taken(back bool) (vcpu, score int) {
	vcpu = -1
	for v := range a.vcpus {
		s := &a.vcpus[v]
		if s.stopped || s.ctx.Flags&vgcfInKernel == 0 || v+1 == a.shared.step.vcpu && a.stepMade() {
			continue // the last one is behind the instruction that it has stepped over
		}
		n := a.behind(s.ctx.CtrlReg[3], s.ctx.User.RIP-1)
		if n < 3 && n > 0 && s.setting == settingDone && sameRegs(&s.want, &s.ctx.User) {
			n = 0 // it hasn't moved since its last answer
		}
		if n == 1 && s.setting == settingDone && back {
			n = 0
		}
		if n > score {
			vcpu, score = v, n
		}
	}
	return vcpu, score
}

// behind says how sure it is that a vCPU one byte behind addr has executed an int3 there:
// 0 is not at all; 1 is an int3 of the guest's own; 2 is one of ours, with another
// instruction behind it; and 3 is where no instruction begins.
func (a *takeover) behind(cr3, addr uint64) int {
	sure := func(b breakpoint.LeftBreak) int {
		if len(b.Insn) == 1 {
			return 2 // the next instruction begins there
		}
		return 3
	}
	if slices.Contains(a.left.Ends, addr) {
		return 3
	}
	if i := breakAt(a.left.Breaks, addr); i >= 0 {
		return sure(a.left.Breaks[i])
	}
	if i := breakAt(a.left.Gone, addr); i >= 0 {
		b := a.left.Gone[i]
		now := make([]byte, len(b.Insn))
		if a.read(cr3, addr, now) == nil && bytes.Equal(now, b.Insn) {
			return sure(b)
		}
	}
	if behindInt3(func(addr uint64, b []byte) error { return a.read(cr3, addr, b) }, addr+1) {
		return 1
	}
	return 0
}

// sameRegs reports whether a vCPU has the registers that it was given. What Xen changes
// in them isn't looked at.
func sameRegs(a, b *xenctrl.UserRegs) bool {
	const flags = x86.FlagTF | 0xcd5 // CF, PF, AF, ZF, SF, DF, OF
	x, y := *a, *b
	return x.RIP == y.RIP && x.RSP == y.RSP && x.RFLAGS&flags == y.RFLAGS&flags &&
		x.RAX == y.RAX && x.RBX == y.RBX && x.RCX == y.RCX && x.RDX == y.RDX && x.RSI == y.RSI && x.RDI == y.RDI && x.RBP == y.RBP &&
		x.R8 == y.R8 && x.R9 == y.R9 && x.R10 == y.R10 && x.R11 == y.R11 && x.R12 == y.R12 && x.R13 == y.R13 && x.R14 == y.R14 && x.R15 == y.R15
}

// answer finds out how far the answer to v's stop had come: if its registers were set it
// is given.
func (a *takeover) answer(v int) error {
	s := &a.vcpus[v]
	if s.setting == settingBegun {
		if !sameRegs(&s.want, &s.ctx.User) {
			return nil // not set: it is stopped as it was
		}
		if s.saved && s.ext.Live() {
			if err := attempts(func() error { return a.hv.SetVCPUExtState(v, s.ext) }); err != nil {
				return fmt.Errorf("vCPU %d: restore extended state: %w", v, err)
			}
		}
	}
	s.saved = false
	if st := &a.shared.step; st.vcpu == v+1 && st.phase == stepBegins && s.ctx.User.RIP == st.addr {
		return nil // to execute the instruction under the breakpoint, which is there still
	}
	s.stopped, s.entering = false, false
	return nil
}

// stepMade reports whether the vCPU of a step has executed its instruction, and nobody
// has seen that yet.
func (a *takeover) stepMade() bool {
	sh := &a.shared.step
	if sh.vcpu < 1 || sh.vcpu > a.nvcpu || sh.phase != stepRuns {
		return false
	}
	s := &a.vcpus[sh.vcpu-1]
	return !s.stopped && s.ctx.DebugReg[6]&dr6BS != 0 // POPF may have cleared TF
}

// resumeStep takes up a step where it was.
func (a *takeover) resumeStep() error {
	sh := &a.shared.step
	if sh.vcpu < 1 || sh.vcpu > a.nvcpu {
		sh.vcpu = 0
		return nil
	}
	p, err := sh.patch()
	if err != nil {
		return err
	}
	v := sh.vcpu - 1
	s := &a.vcpus[v]
	st := &step{vcpu: v, patch: p, masked: sh.masked, done: true}
	a.stepped = p // until AdoptBreak has looked
	for o := range a.nvcpu {
		if o == v {
			continue
		}
		if err := a.hold(o); err != nil {
			return fmt.Errorf("hold vCPU %d: %w", o, err)
		}
		st.others = append(st.others, o)
	}
	a.step = st
	ip, made := s.ctx.User.RIP, a.stepMade()
	s.ctx.User.RFLAGS &^= eflagTF
	stop := breakpoint.Stop{VCPU: v, Regs: regsOf(&s.ctx)}
	switch {
	case s.stopped && ip == sh.addr && sh.phase != stepDone:
		// It has TF, and was to be let go.
		s.dirty, s.reason, s.at = true, breakpoint.Hit, ip
		stop.Reason = breakpoint.Hit
		sh.phase = stepBegins
		a.first = append(a.first, stop)
	case s.stopped && sh.phase == stepDone:
		s.ctx.DebugReg[6] &^= dr6BS
		s.dirty, s.reason = true, breakpoint.Stepped
		stop.Reason = breakpoint.Stepped
		a.first = append(a.first, stop)
	case sh.phase == stepDone || sh.phase == stepBegins && !s.stopped:
		return a.endStep() // answered
	case sh.phase == stepBegins:
		// It is at its int3, as any that has stopped.
	case made:
		s.ctx.DebugReg[6] &^= dr6BS
		s.dirty, s.reason, s.stopped, s.setting = true, breakpoint.Stepped, true, settingNone
		sh.phase = stepDone
		stop.Reason = breakpoint.Stepped
		a.first = append(a.first, stop)
	default:
		st.done = false
	}
	return nil
}

// neverUp reports whether err, of a call that asks for a vCPU's registers, says that it has
// none: a PV guest has not brought it up yet (ENODATA, do_domctl in xen/arch/x86/domctl.c),
// or a vCPU of an HVM guest isn't up (ENOENT, hvm_save_one in
// xen/arch/x86/hvm/save.c). These are Linux' numbers, which dom0 gets.
func neverUp(err error) bool {
	const enoent, enodata = syscall.Errno(2), syscall.Errno(61)
	return errors.Is(err, enodata) || errors.Is(err, enoent)
}

// IPs implements breakpoint.Adopter. That of a vCPU that isn't up is 0.
func (d *Debugger) IPs() ([]uint64, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	ips := make([]uint64, d.nvcpu)
	for v := range ips {
		if err := d.hv.VCPUContext(v, &d.scratch); neverUp(err) {
			continue
		} else if err != nil {
			return nil, mapErr(err)
		}
		ips[v] = d.scratch.User.RIP
	}
	return ips, nil
}

// IPs implements breakpoint.Adopter. That of a vCPU that isn't up is 0.
func (m *MonitorRoute) IPs() ([]uint64, error) {
	ips := make([]uint64, m.nvcpu)
	for v := range ips {
		c, err := m.hv.HVMCPU(v)
		if neverUp(err) {
			continue
		} else if err != nil {
			return nil, mapErr(err)
		}
		ips[v] = c.RIP
	}
	return ips, nil
}

// Answered implements breakpoint.Adopter.
func (d *Debugger) Answered(vcpu int) (answered, known bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return !d.vcpus[vcpu].stopped || d.vcpus[vcpu].fresh, true
}

// AdoptMonitor takes the place of a process that died with its monitor attached to an HVM
// or PVH guest. The guest is frozen afterwards, and to be thawed once.
//
// With the ring it goes on with the monitor as it is. Without, which nobody can have who
// hasn't mapped it before, the monitor is closed and opened again. Either way every vCPU
// whose request the dead process had taken and not answered goes on where it was: at a
// breakpoint, which it then meets again.
//
// Without the ring a guest of which more vCPUs wait than the ring has places can't be
// helped: AdoptMonitor fails with ErrQueued then, having changed nothing.
func AdoptMonitor(hv Hypervisor, frames *paging.Cache, left Left) (*MonitorRoute, error) {
	m, err := newMonitor(hv, frames, left.State)
	if err != nil {
		return nil, err
	}
	m.crowded = true // who knows
	for _, bs := range [][]breakpoint.LeftBreak{left.Breaks, left.Gone} {
		for _, b := range bs {
			m.been[b.Addr] = true
		}
	}
	if m.intent == intentPause { // thaw takes one too many for none
		m.frozen++
	}
	m.unsure = m.unsure || m.intent == intentNotify
	m.intent = intentNone
	if left.Ring != nil && m.port != 0 {
		err := m.takeRing(left.Ring)
		if err == nil {
			return m, m.thawLeft()
		}
		if left.Logger != nil {
			left.Logger.Warn("the ring of a dead process can't be gone on with", "err", err)
		}
		if qerr := m.settleQueue(); qerr != nil {
			return nil, errors.Join(qerr, err) // the ring may be of use yet
		}
		if err := left.Ring.Close(); err != nil {
			return nil, err
		}
		m.mon, m.step, m.stepped, m.notify, m.trapMon = nil, nil, nil, false, false
	} else if err := m.settleQueue(); err != nil {
		return nil, err
	}
	return m, m.reopen()
}

// reopen closes the dead process' monitor and opens it again.
func (m *MonitorRoute) reopen() error {
	if err := attempts(m.Freeze); err != nil {
		return fmt.Errorf("pause the guest: %w", err)
	}
	if err := m.endTraps(); err != nil {
		return err
	}
	answers := make([]xenctrl.Event, 0, m.nvcpu)
	for v := range m.nvcpu {
		e, err := m.goesOn(v)
		if err != nil {
			return err
		}
		answers = append(answers, e)
	}
	m.released = true
	m.port = 0 // who has mapped the ring has mapped another one from now on
	if err := attempts(func() error { return m.hv.ReleaseMonitor(answers) }); err != nil {
		return fmt.Errorf("release the guest from the monitor of a dead process: %w", err)
	}
	if m.step == nil {
		m.shared.step.vcpu = 0
	}
	if err := m.attach(); err != nil {
		return err
	}
	if err := m.listen(); err != nil {
		return err
	}
	if m.step != nil {
		if err := m.listenSteps(); err != nil {
			return err
		}
	}
	m.released = false
	return m.thawLeft()
}

// settled is how long a guest runs until vCPUs that were told of room on the ring have
// taken it.
const settled = 20 * time.Millisecond

// settleQueue fails if more vCPUs wait than the ring has places. Those that have been told
// of room have taken it when it returns, as the dead process may have paused the guest. Once
// that was seen to and the monitor is released, the guest must not run until another one is
// attached.
func (m *MonitorRoute) settleQueue() error {
	if m.nvcpu <= ringSlots || m.released {
		return nil
	}
	for m.frozen > 0 {
		if err := attempts(m.Thaw); err != nil {
			return fmt.Errorf("resume the guest: %w", err)
		}
	}
	time.Sleep(settled)
	if err := attempts(m.Freeze); err != nil {
		return fmt.Errorf("pause the guest: %w", err)
	}
	at, err := m.atInt3()
	if err == nil && len(at) > ringSlots {
		var who []string
		for _, p := range at {
			who = append(who, fmt.Sprintf("%d at %#x", p.vcpu, p.cpu.RIP))
		}
		err = fmt.Errorf("%w: of the guest %d vCPUs wait at breakpoints (%s), more than the %d that the ring of the dead process takes, "+
			"and only a process that had mapped the ring before could answer them: the guest stands still and has lost nothing, "+
			"but can't be released: save what is needed of it (xl dump-core), and destroy it (xl destroy)",
			breakpoint.ErrQueued, len(at), strings.Join(who, ", "), ringSlots)
	}
	return errors.Join(err, attempts(m.Thaw))
}

// takeFor bounds how long the event channel of a dead process may take to be closed.
const takeFor = time.Second

// takeRing goes on with the dead process' monitor. The guest is frozen then, unless it fails.
func (m *MonitorRoute) takeRing(ring Ring) error {
	if err := attempts(m.Freeze); err != nil {
		return fmt.Errorf("pause the guest: %w", err)
	}
	if err := m.goOn(ring); err != nil {
		return errors.Join(err, m.Thaw())
	}
	return nil
}

func (m *MonitorRoute) goOn(ring Ring) error {
	var st xenctrl.RingState
	var err error
	for begin := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		if m.mon, st, err = m.hv.TakeMonitor(ring, m.port); err == nil {
			break
		}
		if errors.Is(err, xenctrl.ErrRing) || errors.Is(err, xenctrl.ErrClosed) || errors.Is(err, xenctrl.ErrNoDomain) || time.Since(begin) > takeFor {
			return fmt.Errorf("go on with the monitor of a dead process: %w", mapErr(err))
		}
	}
	waiting, err := m.unanswered(st)
	if err != nil {
		return err
	}
	// First of all Xen is told of the answers there are: they may begin a step.
	m.notify = true
	if err := m.flush(); err != nil {
		return err
	}
	m.unsure = false // there is no answer that Xen was not told of
	m.trapMon = m.caps&xenctrl.MonitorSingleStep != 0 && m.shared.step.vcpu != 0
	if err := m.endTraps(); err != nil {
		return err
	}
	for _, v := range waiting {
		e, err := m.goesOn(v)
		if err != nil {
			return err
		}
		if v < m.nvcpu {
			m.known[v].again = true
		}
		if err := attempts(func() error { return m.mon.Respond(&e) }); err != nil {
			return fmt.Errorf("vCPU %d: respond: %w", v, err)
		}
		if v < m.nvcpu {
			m.known[v].stopped = false
		}
		m.notify = true
	}
	if err := m.flush(); err != nil {
		return err
	}
	if sh := &m.shared.step; sh.vcpu > 0 && !slices.Contains(waiting, sh.vcpu-1) {
		// It hasn't stopped behind the instruction yet, or nobody has taken that stop.
		p, err := sh.patch()
		if err != nil {
			return err
		}
		m.step = &step{vcpu: sh.vcpu - 1, patch: p, maybe: true}
		m.stepped, sh.phase = p, stepRuns
	}
	if m.step == nil {
		m.shared.step.vcpu = 0
	} else if err := m.listenSteps(); err != nil {
		return err
	}
	return m.listen() // the process may have died before
}

// goesOn is the answer to a vCPU that goes on where it was, in its step if it makes one.
func (m *MonitorRoute) goesOn(v int) (e xenctrl.Event, err error) {
	e = xenctrl.Event{Flags: xenctrl.EventVCPUPaused, Reason: xenctrl.ReasonSoftwareBreakpoint, VCPU: v}
	if m.shared.step.vcpu == v+1 {
		err = m.resumeStep(&e)
	}
	return e, err
}

// endTraps ends the step that the monitor trap flag makes, if there is such a flag: the
// instruction is executed where it stands.
func (m *MonitorRoute) endTraps() error {
	if m.caps&xenctrl.MonitorSingleStep == 0 {
		return nil
	}
	for v := range m.nvcpu {
		if err := attempts(func() error { return m.hv.DebugControl(v, false) }); err != nil {
			return fmt.Errorf("vCPU %d: end single steps: %w", v, err)
		}
	}
	m.shared.step.vcpu = 0
	return nil
}

// unanswered returns the vCPUs whose requests the dead process had taken, and not answered.
// It has written down who they are, but for the one that it was taking, or answering: of
// those the ring tells.
func (m *MonitorRoute) unanswered(st xenctrl.RingState) (vcpus []int, err error) {
	for v := range m.known {
		if m.known[v].stopped {
			vcpus = append(vcpus, v)
		}
	}
	last := slices.Index(vcpus, st.LastAnswered)
	switch n := len(vcpus); {
	case n == st.Unanswered:
	case n == st.Unanswered+1 && last >= 0:
		m.known[st.LastAnswered].stopped = false // answered, and not written down
		vcpus = slices.Delete(vcpus, last, last+1)
	case n == st.Unanswered-1 && st.LastTaken >= 0 && !slices.Contains(vcpus, st.LastTaken):
		vcpus = append(vcpus, st.LastTaken)
	default:
		return nil, fmt.Errorf("%w: %d requests of the dead process are not answered, and it has written down %d", xenctrl.ErrRing, st.Unanswered, n)
	}
	return vcpus, nil
}

// thawLeft undoes what the dead process has paused.
func (m *MonitorRoute) thawLeft() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for m.frozen > 1 {
		if err := attempts(m.thaw); err != nil {
			return err
		}
	}
	return nil
}

// resumeStep takes up a step by TF. e is the answer that its vCPU will be given.
func (m *MonitorRoute) resumeStep(e *xenctrl.Event) error {
	p, err := m.shared.step.patch()
	if err != nil {
		return err
	}
	v, sh := e.VCPU, &m.shared.step
	var c xenctrl.HVMCPU
	if err := attempts(func() (err error) { c, err = m.hv.HVMCPU(v); return err }); err != nil {
		return fmt.Errorf("vCPU %d: read registers: %w", v, err)
	}
	if c.RFLAGS&eflagTF == 0 || c.RIP == sh.addr {
		// It hasn't made the step, and will, or will not any more.
		m.step = &step{vcpu: v, patch: p, maybe: true}
		m.stepped, sh.phase = p, stepRuns
		return nil
	}
	r := x86.Regs{
		R15: c.R15, R14: c.R14, R13: c.R13, R12: c.R12, BP: c.RBP, BX: c.RBX,
		R11: c.R11, R10: c.R10, R9: c.R9, R8: c.R8, AX: c.RAX, CX: c.RCX, DX: c.RDX, SI: c.RSI, DI: c.RDI,
		IP: c.RIP, CS: uint64(c.CS), Flags: c.RFLAGS, SP: c.RSP, SS: uint64(c.SS), CR3: c.CR3,
	}
	if err := p.insn.FinishStep(&r, sh.addr, sh.addr, virtual{m.guest, c.CR3}, &sh.before); err != nil {
		if !errors.Is(err, x86.ErrStepLost) {
			return fmt.Errorf("vCPU %d: finish its step over %#x: %w", v, sh.addr, err)
		}
		// It is in the guest's handler of a fault.
		r.Flags = r.Flags&^(eflagTF|eflagIF) | sh.before.Flags&(eflagTF|eflagIF)
	}
	setEventRegs(&e.Regs, &r)
	e.Flags |= xenctrl.EventSetRegisters
	return nil
}

// virtual is memory as a vCPU with these page tables sees it.
type virtual struct {
	g   *guest
	cr3 uint64
}

func (m virtual) ReadVirt(addr uint64, b []byte) error  { return m.g.read(m.cr3, addr, b) }
func (m virtual) WriteVirt(addr uint64, b []byte) error { return m.g.Store(m.cr3, addr, b) }

// Answered implements breakpoint.Adopter. An answer that Xen hadn't been told of is gone
// with the ring, if that isn't gone on with.
func (m *MonitorRoute) Answered(vcpu int) (answered, known bool) {
	k := &m.known[vcpu]
	return !m.unsure && k.told && !k.stopped && !k.again, !m.unsure
}

var (
	_ breakpoint.Adopter = (*Debugger)(nil)
	_ breakpoint.Adopter = (*MonitorRoute)(nil)
)
