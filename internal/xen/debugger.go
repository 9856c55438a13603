package xen

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"syscall"
	"time"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/x86"
	"github.com/vmprobes/vmprobes/paging"
	"github.com/vmprobes/vmprobes/xenctrl"
)

// Debugger is the debugger route: a PV guest whose int3s pause the domain
// (XEN_DOMCTL_setdebugging), on a hypervisor with the gdbsx domctls.
//
// Every event raises the domain's pause count by one, and owes one unpause. The
// domain runs when all are paid, so Debugger counts the events it has taken
// (owed) and the stops it hasn't had an answer for (pending), and pays what is
// owed above what is pending.
//
// An int3 raises no VIRQ_DEBUGGER on any Xen since 2012, so events are polled.
type Debugger struct {
	*guest

	nvcpu   int
	vcpus   []vcpu
	queue   []int             // vCPUs whose stop waits to be returned by Wait
	first   []breakpoint.Stop // that another process had left, to be returned first
	pending int
	step    *step
	closed  bool
	scratch xenctrl.VCPUContext // for what is read only
	want    xenctrl.VCPUContext // for what is to be set; a context is large
	debug   debugWatch
	pins    pins
	pace    pace          // of the goroutine in Wait
	checked time.Duration // of spin.Clock: when checkAttached was called last; likewise
}

// vcpu is a stopped vCPU's context. A change of it that failed halfway is taken up where
// it was.
type vcpu struct {
	*sharedVCPU
	ctx    xenctrl.VCPUContext
	reason breakpoint.Reason
	at     uint64           // address of the int3
	dirty  bool             // Xen may have other registers than those of ctx
	tick   uint64           // of pins, when it stopped
	pinned bool             // held by itself, whatever the domain's pause count is
	ext    xenctrl.ExtState // if saved: as it was before
}

// step is a StepOver in progress.
type step struct {
	vcpu   int
	patch  *patch
	others []int  // vCPUs held
	done   bool   // the Stepped stop has been returned
	ending bool   // not all others are held any more
	masked uint64 // address of an upcall mask that was 0 and has been set, or 0
	maybe  bool   // of a process that died: the vCPU may not have been told of it
}

// OpenDebugger attaches to a PV guest, whose memory it reaches through frames; they
// stay the caller's, who closes them after the Debugger. It changes nothing in the
// guest unless the hypervisor has what it takes.
func OpenDebugger(hv Hypervisor, frames *paging.Cache, cfg Config) (*Debugger, error) {
	info, err := hv.Info()
	if err != nil {
		return nil, mapErr(err)
	}
	// Without GDBSX, setdebugging succeeds and each int3 then derails the guest:
	// ask first. Any error means that it is missing (ENOSYS up to EOPNOTSUPP).
	if _, err := hv.GdbsxDomStatus(); err != nil {
		if e := mapErr(err); errors.Is(e, breakpoint.ErrGone) {
			return nil, e
		}
		return nil, fmt.Errorf("%w (gdbsx_domstatus: %w)", ErrNoGDBSX, err)
	}
	if info.Flags&xenctrl.DomainDebugged != 0 {
		return nil, ErrBusy
	}
	d, err := newDebugger(hv, frames, info, cfg.State)
	if err != nil {
		return nil, err
	}
	d.SetKernelRoot(cfg.Root)
	d.settle = cfg.Roots
	if cfg.Lookup != nil {
		d.useSymbols(cfg.Lookup)
	}
	for v := range d.vcpus {
		if hv.VCPUContext(v, &d.scratch) == nil {
			d.vcpus[v].dr6 = d.scratch.DebugReg[6]
		}
	}
	if err := attempts(func() error { return hv.SetDebugging(true) }); err != nil {
		return nil, fmt.Errorf("attach debugger: %w", err)
	}
	return d, nil
}

func newDebugger(hv Hypervisor, frames *paging.Cache, info xenctrl.DomainInfo, state []byte) (*Debugger, error) {
	n := info.MaxVCPUID + 1
	if n < 1 || n > xenctrl.MaxVCPUs {
		return nil, fmt.Errorf("domain %d has vCPU numbers up to %d", info.ID, info.MaxVCPUID)
	}
	s, vs, err := stateIn(state, n)
	if err != nil {
		return nil, err
	}
	d := &Debugger{guest: newGuest(hv, frames, s), nvcpu: n, vcpus: make([]vcpu, n)}
	for v := range d.vcpus {
		d.vcpus[v].sharedVCPU = &vs[v]
	}
	d.roots = d.currentRoots
	return d, nil
}

// useSymbols finds struct vcpu_info, and the code that runs between a debug exception
// and where its cause is read, by the kernel's symbols. The former is the per-CPU
// variable xen_vcpu_info (arch/x86/xen/enlighten.c), to which the vCPU's GS base is
// added. With it the virtual interrupt flag is seen and kept.
func (d *Debugger) useSymbols(lookup func(name string) (addr uint64, ok bool)) {
	if addr, ok := lookup("xen_vcpu_info"); ok {
		d.vcpuInfo = addr
	}
	d.debug.useSymbols(lookup)
}

// upcallMask is evtchn_upcall_mask of a vCPU.
type upcallMask struct {
	known bool // the guest's struct vcpu_info could be found
	addr  uint64
	value byte
}

// upcallMask reads evtchn_upcall_mask, the second byte of struct vcpu_info
// (xen/include/public/xen.h): non-zero while the guest has interrupts off. The
// RFLAGS.IF that Xen shows is always set.
func (d *Debugger) upcallMask(c *xenctrl.VCPUContext) (upcallMask, error) {
	if d.vcpuInfo == 0 {
		return upcallMask{}, nil
	}
	var b [2]byte
	addr := c.GSBaseKernel + d.vcpuInfo
	if err := d.read(c.CtrlReg[3], addr, b[:]); err != nil {
		return upcallMask{}, err
	}
	if b[0] > 1 || b[1] > 1 {
		return upcallMask{}, nil // whatever it is, it isn't that
	}
	return upcallMask{true, addr + 1, b[1]}, nil
}

// currentRoots returns the kernel page tables that vCPUs use now.
func (d *Debugger) currentRoots() ([]paging.Root, error) {
	var c xenctrl.VCPUContext
	var errs error
	for v := range d.nvcpu {
		if err := d.hv.VCPUContext(v, &c); err != nil {
			errs = errors.Join(errs, err)
			continue
		}
		return []paging.Root{paging.Root(c.CtrlReg[3])}, nil
	}
	return nil, errs
}

// Caps implements breakpoint.Driver.
func (d *Debugger) Caps() breakpoint.Caps {
	return breakpoint.Caps{VCPUs: d.nvcpu, Step: true, AllStop: true}
}

// setContext sets a vCPU's registers. Xen replaces the extended state (AVX and
// so on) by its initial value when it takes the FPU image of the context, so
// that state is saved before and restored after, unless there is none. If it fails
// it is to be called again, as long as the vCPU is stopped.
func (d *Debugger) setContext(v int, c *xenctrl.VCPUContext) error {
	s := &d.vcpus[v]
	s.dirty = true
	if !s.saved {
		ext, err := d.hv.VCPUExtState(v)
		if err != nil && !errors.Is(err, xenctrl.ErrNotSupported) {
			return fmt.Errorf("vCPU %d: save extended state: %w", v, mapErr(err))
		}
		s.keep(ext)
		s.saved = true
	}
	s.want = c.User
	s.setting = settingBegun
	if err := attempts(func() error { return d.hv.SetVCPUContext(v, c) }); err != nil {
		return fmt.Errorf("vCPU %d: set registers: %w", v, err)
	}
	if s.ext.Live() {
		if err := attempts(func() error { return d.hv.SetVCPUExtState(v, s.ext) }); err != nil {
			return fmt.Errorf("vCPU %d: restore extended state: %w", v, err)
		}
	}
	s.setting = settingDone
	s.saved, s.dirty = false, false
	return nil
}

// aliveEvery is how often a wait looks whether the domain still lives.
const aliveEvery = 100 * time.Millisecond

// Wait implements breakpoint.Driver.
func (d *Debugger) Wait(ctx context.Context, s *breakpoint.Stop) error {
	d.pace.start()
	defer d.pace.end()
	for now := d.pace.begin; ; {
		if now-d.checked > aliveEvery {
			if err := d.checkAttached(); err != nil {
				return err
			}
			d.checked = now
		}
		ok, err := d.poll(s)
		if ok || err != nil {
			d.pace.done()
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if d.debug.gave.Swap(false) { // as good as a stop: the next one may follow soon
			d.pace.done()
			d.pace.start()
		}
		now = d.pace.rest(ctx)
	}
}

// checkAttached returns ErrGone as checkAlive does. If another debugger has detached,
// which Xen takes for ours, it attaches again, so that the guest isn't left alone with
// its breakpoints, and returns ErrDetached.
func (d *Debugger) checkAttached() error {
	info, err := d.alive()
	if err != nil || info.Flags&xenctrl.DomainDebugged != 0 {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return nil
	}
	if err := attempts(func() error { return d.hv.SetDebugging(true) }); err != nil {
		return fmt.Errorf("attach debugger again: %w", err)
	}
	return ErrDetached
}

// poll returns one stop, if there is one.
func (d *Debugger) poll(s *breakpoint.Stop) (bool, error) {
	d.beat()
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.first) > 0 {
		*s, d.first = d.first[0], d.first[1:]
		d.vcpus[s.VCPU].fresh = false
		return true, nil
	}
	if d.stepping() {
		// Only the stepping vCPU runs; the queue waits until it's done.
		return d.pollStep(s)
	}
	if len(d.queue) == 0 {
		if _, err := d.take(); err != nil {
			return false, err
		}
	}
	if len(d.queue) == 0 && d.frozen == 0 && d.owed > d.keep() { // an unpause has failed, or had to wait for a Thaw
		if err := d.release(); err != nil {
			return false, err
		}
	}
	if len(d.queue) == 0 {
		return false, nil
	}
	return d.next(s, 0)
}

// stepping reports whether a vCPU executes the instruction of a StepOver.
func (d *Debugger) stepping() bool { return d.step != nil && !d.step.done }

// next returns the stop at place i of the queue, with the vCPU's context read.
func (d *Debugger) next(s *breakpoint.Stop, i int) (bool, error) {
	v := d.queue[i]
	c := &d.vcpus[v]
	if err := attempts(func() error { return d.hv.VCPUContext(v, &c.ctx) }); err != nil {
		return false, fmt.Errorf("vCPU %d: read registers: %w", v, err)
	}
	d.queue = slices.Delete(d.queue, i, i+1)
	c.fresh = false
	c.reason = breakpoint.Hit
	c.at = c.ctx.User.RIP - 1 // int3 is a trap: RIP is behind it
	c.dr6 = c.ctx.DebugReg[6]
	*s = breakpoint.Stop{VCPU: v, Reason: breakpoint.Hit, Regs: regsOf(&c.ctx)}
	s.Regs.IP = c.at
	return true, nil
}

// take asks Xen for one latched event, and queues the stop of its vCPU. The event is
// read and cleared: a call that fails clears nothing, and what one has returned must
// not be lost, whatever fails next. If there is none, but the domain is paused, it may
// be for a debug exception of the guest's own.
func (d *Debugger) take() (st xenctrl.DomStatus, err error) {
	d.intent = intentAsk
	err = attempts(func() (err error) { st, err = d.hv.GdbsxDomStatus(); return err })
	if err != nil || st.VCPU < 0 || st.VCPU >= d.nvcpu {
		d.intent = intentNone
	}
	if err != nil {
		return st, err
	}
	if st.VCPU < 0 {
		switch {
		case !st.Paused:
			d.debug.quiet = false
		case d.frozen == 0 && d.pending == 0 && d.owed == 0 && d.step == nil:
			err = d.takeDebugException()
		}
		return st, err
	}
	if st.VCPU >= d.nvcpu {
		d.owed++
		return st, fmt.Errorf("event on vCPU %d, of %d", st.VCPU, d.nvcpu)
	}
	v := &d.vcpus[st.VCPU]
	if v.stopped {
		d.owed++
		d.intent = intentNone
		return st, fmt.Errorf("event on vCPU %d, which is stopped", st.VCPU)
	}
	d.tookOwed, d.tookLatched = d.owed+1, d.latched
	d.takeStop(st.VCPU + 1)
	v.dirty = false
	v.tick = d.pins.tick
	d.pending++
	d.queue = append(d.queue, st.VCPU)
	d.watchPins()
	if d.pins.loose {
		err = d.pin(st.VCPU)
	}
	return st, err
}

// takeStop counts a stop: of vCPU n-1, or of vCPU -n-1 if its step is done. tookOwed and
// tookLatched are the counts with it. Whoever takes over in the middle of it does it once
// more: a vCPU that is marked as stopped and whose pause isn't counted would leave the
// domain paused, and the other way round it would be forgotten.
func (d *Debugger) takeStop(n int) {
	d.took.Store(int64(n))
	v := n - 1
	if n < 0 {
		v = -n - 1
		d.shared.step.phase = stepDone
	}
	if v < d.nvcpu {
		d.owed, d.latched = d.tookOwed, d.tookLatched
		d.vcpus[v].saved, d.vcpus[v].entering = false, false
		d.vcpus[v].setting, d.vcpus[v].stopped = settingNone, true
	}
	d.intent = intentNone
	d.took.Store(0)
}

// takeAll moves every latched event to the queue. The domain is paused.
func (d *Debugger) takeAll() error {
	for range 4 * d.nvcpu {
		if st, err := d.take(); err != nil || st.VCPU < 0 {
			return err
		}
	}
	return nil
}

const (
	eflagTF = x86.FlagTF
	eflagIF = x86.FlagIF
)

// release pays what is owed to the domain's pause count: all but one for each
// stop that waits for its answer, and everything while a vCPU steps, since the
// others are held one by one then. What it leaves is paid by poll or Close.
func (d *Debugger) release() error {
	if err := d.checkPins(); err != nil {
		return err
	}
	for d.owed > d.keep() {
		if d.pins.loose && !d.stepping() {
			if d.frozen > 0 {
				return nil // one too many would undo a Freeze
			}
			switch due, err := d.due(); {
			case err != nil:
				return err
			case !due:
				continue
			}
		}
		if err := d.pay(); err != nil {
			return err
		}
	}
	if d.pending == 0 && d.owed == 0 {
		d.pins.loose = false
	}
	return nil
}

// pay makes one unpause of those that are owed.
func (d *Debugger) pay() error {
	if err := attempts(func() error { return d.account(intentUnpause, d.unpause, &d.owed, -1) }); err != nil {
		return fmt.Errorf("unpause: %w", err)
	}
	return nil
}

// pause pauses the domain, which is owed from then on.
func (d *Debugger) pause() error { return d.account(intentPause, d.hv.Pause, &d.owed, 1) }

// keep is how many pauses of those that are owed are needed.
func (d *Debugger) keep() int {
	switch {
	case d.stepping() && d.vcpus[d.step.vcpu].stopped:
		return 1 // it has come to another breakpoint on its way
	case d.stepping():
		return 0
	case d.pins.loose:
		return d.pending - d.pins.n
	}
	return d.pending
}

// answered marks v's stop as answered and lets the domain go. If the latter fails the
// answer is given all the same, and must not be made again: v may hit once more before.
func (d *Debugger) answered(v int) error {
	if d.vcpus[v].stopped {
		if err := d.unpin(v); err != nil {
			return err
		}
		d.vcpus[v].stopped, d.vcpus[v].entering = false, false
		d.pending--
	}
	if err := d.release(); errors.Is(err, breakpoint.ErrGone) {
		return err
	}
	return nil // what is owed still is paid by poll, or Close
}

func (d *Debugger) stopOf(s *breakpoint.Stop) (*vcpu, error) {
	if s.VCPU < 0 || s.VCPU >= d.nvcpu {
		return nil, fmt.Errorf("vCPU %d isn't stopped", s.VCPU)
	}
	return &d.vcpus[s.VCPU], nil
}

// Resume implements breakpoint.Driver.
func (d *Debugger) Resume(s *breakpoint.Stop) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	v, err := d.stopOf(s)
	if err != nil {
		return err
	}
	if v.stopped {
		want := &d.want
		*want = v.ctx
		setRegs(&want.User, &s.Regs)
		if v.dirty || want.User != v.ctx.User {
			if err := d.setContext(s.VCPU, want); err != nil {
				return err
			}
			v.ctx = *want
		}
	}
	if d.step != nil && d.step.vcpu == s.VCPU && d.step.done {
		if err := d.endStep(); err != nil {
			return err
		}
	}
	return d.answered(s.VCPU)
}

// StepOver implements breakpoint.Driver.
func (d *Debugger) StepOver(s *breakpoint.Stop, addr uint64) (err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	v, err := d.stopOf(s)
	if err != nil {
		return err
	}
	if d.frozen > 0 {
		return errors.New("step while the domain is frozen")
	}
	p := d.breakAt(addr)
	if p == nil {
		return fmt.Errorf("step over %#x: no breakpoint there", addr)
	}
	if st := d.step; st != nil && st.ending {
		if err := d.endStep(); err != nil {
			return err
		}
	}
	st := d.step
	if st != nil && (st.vcpu != s.VCPU || !st.done) {
		return fmt.Errorf("step over %#x: vCPU %d is stepping", addr, st.vcpu)
	}
	d.shared.step.begin(s.VCPU, p, &s.Regs)
	if st == nil {
		// pausevcpu waits until the vCPU doesn't run, so after it every event of the
		// others is latched, and can be taken: none will pause the domain again.
		st = &step{vcpu: s.VCPU, patch: p, done: true}
		d.step = st
		for o := range d.nvcpu {
			if o == s.VCPU {
				continue
			}
			if err := d.hold(o); err != nil {
				return errors.Join(fmt.Errorf("hold vCPU %d: %w", o, err), d.endStep())
			}
			st.others = append(st.others, o)
		}
		if err := d.takeAll(); err != nil {
			return errors.Join(err, d.endStep())
		}
	}
	want := &d.want
	*want = v.ctx
	setRegs(&want.User, &s.Regs)
	want.User.RFLAGS |= eflagTF
	want.DebugReg[6] &^= dr6BS
	if err := d.setContext(s.VCPU, want); err != nil {
		return errors.Join(err, d.endStep())
	}
	v.ctx = *want
	v.dirty = true // TF is Xen's, not the vCPU's
	if err := attempts(func() error { return d.liftForStep(p) }); err != nil {
		return errors.Join(err, d.endStep())
	}
	// An interrupt between here and the step would run over the lifted byte.
	m, err := d.upcallMask(&v.ctx)
	if err == nil && m.known && m.value == 0 && st.masked == 0 {
		d.shared.step.masked = m.addr
		if err = d.write(v.ctx.CtrlReg[3], m.addr, []byte{1}); err == nil {
			st.masked = m.addr
		}
	}
	if err != nil {
		return errors.Join(fmt.Errorf("vCPU %d: mask events: %w", s.VCPU, err), d.endStep())
	}
	if err := d.count(s.VCPU); err != nil {
		return errors.Join(err, d.endStep())
	}
	if err := d.unpin(s.VCPU); err != nil {
		return errors.Join(err, d.endStep())
	}
	st.done = false
	d.pins.ran = true
	d.shared.step.phase = stepRuns
	v.stopped = false
	d.pending--
	// Everything owed: the other stops' vCPUs are held one by one now.
	if err := d.release(); err != nil {
		st.done = true
		d.shared.step.phase = stepBegins
		v.stopped = true
		d.pending++
		return errors.Join(err, d.endStep())
	}
	return nil
}

// pollStep looks whether the stepping vCPU has come to its debug exception.
func (d *Debugger) pollStep(s *breakpoint.Stop) (bool, error) {
	st, err := d.take()
	if err != nil || !st.Paused {
		return false, err
	}
	// An interrupt handler may have run first, and met another breakpoint.
	if i := slices.Index(d.queue, d.step.vcpu); i >= 0 {
		return d.next(s, i)
	}
	if st.VCPU >= 0 || d.frozen > 0 {
		return false, nil
	}
	if err := d.hv.VCPUContext(d.step.vcpu, &d.scratch); err != nil {
		return false, mapErr(err)
	}
	if d.scratch.DebugReg[6]&dr6BS == 0 {
		return false, nil // somebody else paused the domain
	}
	if err := attempts(func() error { return d.dropAfterStep(d.step.patch) }); err != nil {
		return false, err
	}
	v := &d.vcpus[d.step.vcpu]
	v.ctx = d.scratch
	v.ctx.User.RFLAGS &^= eflagTF
	v.ctx.DebugReg[6] &^= dr6BS
	// TF is still set in Xen, whatever an interrupt's hit on the way has done to it.
	d.tookOwed, d.tookLatched = d.owed+1, d.latched
	d.takeStop(-(d.step.vcpu + 1))
	v.reason, v.dirty, v.dr6 = breakpoint.Stepped, true, v.ctx.DebugReg[6]
	v.tick = d.pins.tick
	d.watchPins()
	d.pending++
	d.step.done = true
	*s = breakpoint.Stop{VCPU: d.step.vcpu, Reason: breakpoint.Stepped, Regs: regsOf(&v.ctx)}
	return true, nil
}

// endStep lets the other vCPUs go. The domain is paused, so they run with it. If
// it fails it is to be called again.
func (d *Debugger) endStep() error {
	st := d.step
	if st == nil {
		return nil
	}
	st.ending = true
	if err := attempts(func() error { return d.dropAfterStep(st.patch) }); err != nil {
		return err
	}
	if st.masked != 0 {
		if err := attempts(func() error { return d.write(d.vcpus[st.vcpu].ctx.CtrlReg[3], st.masked, []byte{0}) }); err != nil {
			return fmt.Errorf("vCPU %d: unmask events: %w", st.vcpu, err)
		}
		st.masked, d.shared.step.masked = 0, 0
	}
	for len(st.others) > 0 {
		o := st.others[len(st.others)-1]
		if err := d.letGo(o); err != nil {
			return fmt.Errorf("release vCPU %d: %w", o, err)
		}
		st.others = st.others[:len(st.others)-1]
	}
	d.shared.step.vcpu = 0
	d.step = nil
	return nil
}

// hold holds a vCPU by itself, and letGo undoes it.
func (d *Debugger) hold(vcpu int) error {
	return d.paused(func() error { return d.hv.GdbsxPauseVCPU(vcpu) })
}

func (d *Debugger) letGo(vcpu int) error {
	return d.paused(func() error { return d.hv.GdbsxUnpauseVCPU(vcpu) })
}

// paused makes a call that takes a paused domain: one that isn't, because somebody
// has unpaused it, is paused first, and that is owed.
func (d *Debugger) paused(call func() error) error {
	return attempts(func() error {
		err := call()
		if !errors.Is(err, syscall.EBUSY) {
			return err
		}
		d.owed = 0 // nothing is left of it
		if err := d.pause(); err != nil {
			return err
		}
		return call()
	})
}

// Reinject implements breakpoint.Driver: Xen has no call for it, so the vCPU is
// put at the guest's handler as Xen itself would have (enter).
func (d *Debugger) Reinject(s *breakpoint.Stop) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	v, err := d.stopOf(s)
	if err != nil {
		return err
	}
	if v.stopped {
		if v.reason != breakpoint.Hit {
			return fmt.Errorf("vCPU %d isn't at a breakpoint", s.VCPU)
		}
		d.want = v.ctx
		err := d.enter(s.VCPU, &d.want, 3, v.at+1)
		if cantTake(err) {
			// Xen would crash a guest that can't take its exception, and does so as soon as
			// it is left; until then the vCPU comes back to its int3.
			d.want = v.ctx
			d.want.User.RIP = v.at
			err = d.setContext(s.VCPU, &d.want)
		}
		if err != nil {
			return err
		}
	}
	return d.answered(s.VCPU)
}

const (
	flatKernelCS = 0xe033 // FLAT_KERNEL_CS, xen/include/public/arch-x86/xen-x86_64.h
	flatKernelSS = 0xe02b
)

var errNoHandler = errors.New("the guest has no handler")

// cantTake reports whether enter has failed because of what the guest is like.
func cantTake(err error) bool {
	return errors.Is(err, breakpoint.ErrFault) || errors.Is(err, breakpoint.ErrNotMapped) || errors.Is(err, errNoHandler)
}

// enter delivers exception vector to a vCPU of a 64-bit PV guest that is in
// kernel mode: the frame that the guest expects from Xen
// (xen/arch/x86/x86_64/entry.S, create_bounce_frame; public/arch-x86/xen.h). It may
// be called again until vcpu.entering is cleared.
func (d *Debugger) enter(v int, c *xenctrl.VCPUContext, vector int, rip uint64) error {
	t := c.Traps[vector]
	if t.Address == 0 {
		return fmt.Errorf("vCPU %d, vector %d: %w", v, vector, errNoHandler)
	}
	s := &d.vcpus[v]
	if !s.entering {
		mask, err := d.upcallMask(c)
		if err != nil {
			return fmt.Errorf("vCPU %d: read its interrupt flag: %w", v, err)
		}
		s.mask, s.entering = mask, true
	}
	u := &c.User
	mask := uint64(s.mask.value)
	flags := u.RFLAGS &^ eflagIF
	if mask == 0 {
		flags |= eflagIF
	}
	sp := u.RSP &^ 15
	frame := [...]uint64{u.RCX, u.R11, rip, uint64(u.CS&^3) | mask<<32, flags, u.RSP, uint64(u.SS)}
	sp -= uint64(len(frame) * 8)
	buf := make([]byte, 0, len(frame)*8)
	for _, w := range frame {
		buf = binary.LittleEndian.AppendUint64(buf, w)
	}
	if err := d.write(c.CtrlReg[3], sp, buf); err != nil {
		return fmt.Errorf("vCPU %d: exception frame: %w", v, err)
	}
	if s.mask.known && t.Flags&xenctrl.TrapDisablesEvents != 0 {
		if err := d.write(c.CtrlReg[3], s.mask.addr, []byte{1}); err != nil {
			return fmt.Errorf("vCPU %d: mask events: %w", v, err)
		}
	}
	u.RSP, u.RIP = sp, t.Address
	u.CS, u.SS = flatKernelCS, flatKernelSS
	u.RFLAGS &^= eflagTF | x86.FlagRF | x86.FlagNT | x86.FlagVM | x86.FlagAC
	return d.setContext(v, c)
}

// Close implements breakpoint.Driver.
func (d *Debugger) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return nil
	}
	err := d.leave()
	if err != nil && !errors.Is(err, breakpoint.ErrGone) {
		return err
	}
	d.closed = true
	return err
}

func (d *Debugger) leave() error {
	if d.pending > 0 && !d.dead() {
		return fmt.Errorf("%d vCPUs are stopped", d.pending)
	}
	if d.stepping() {
		// The step didn't come to its end: at least TF must not stay.
		v := d.step.vcpu
		if err := attempts(func() error { return d.hv.VCPUContext(v, &d.scratch) }); err != nil {
			return err
		}
		d.scratch.User.RFLAGS &^= eflagTF
		if err := d.setContext(v, &d.scratch); err != nil {
			return err
		}
		d.step.done = true
	}
	if err := d.endStep(); err != nil {
		return err
	}
	if err := attempts(func() error { return d.hv.SetDebugging(false) }); err != nil {
		return fmt.Errorf("detach debugger: %w", err)
	}
	if err := d.thawAll(); err != nil {
		return err
	}
	if err := d.release(); err != nil {
		return err
	}
	return d.lastDebugExceptions()
}

// regsOf returns the registers of a context.
func regsOf(c *xenctrl.VCPUContext) x86.Regs {
	u := &c.User
	return x86.Regs{
		R15: u.R15, R14: u.R14, R13: u.R13, R12: u.R12, BP: u.RBP, BX: u.RBX,
		R11: u.R11, R10: u.R10, R9: u.R9, R8: u.R8,
		AX: u.RAX, CX: u.RCX, DX: u.RDX, SI: u.RSI, DI: u.RDI,
		IP: u.RIP, CS: uint64(u.CS), Flags: u.RFLAGS, SP: u.RSP, SS: uint64(u.SS),
		FSBase: c.FSBase, GSBase: c.GSBaseKernel, CR3: c.CtrlReg[3],
	}
}

// setRegs writes the registers that a handler can change.
func setRegs(u *xenctrl.UserRegs, r *x86.Regs) {
	u.R15, u.R14, u.R13, u.R12, u.RBP, u.RBX = r.R15, r.R14, r.R13, r.R12, r.BP, r.BX
	u.R11, u.R10, u.R9, u.R8 = r.R11, r.R10, r.R9, r.R8
	u.RAX, u.RCX, u.RDX, u.RSI, u.RDI = r.AX, r.CX, r.DX, r.SI, r.DI
	u.RIP, u.RFLAGS, u.RSP = r.IP, r.Flags, r.SP
}

var _ breakpoint.Driver = (*Debugger)(nil)
