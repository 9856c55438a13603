package breakpoint

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/vmprobes/vmprobes/internal/goid"
	"github.com/vmprobes/vmprobes/internal/x86"
)

// mode is what stops are served for.
type mode uint8

const (
	unserved mode = iota // nobody sees hits: no handler runs
	ending               // a Serve with handlers ends: Post of hits whose Pre has run
	serving              // all handlers run
)

// Serve answers stops until a handler's verdict isn't Continue (then it returns
// that verdict), ctx is done, or something fails. If live is false no handler
// runs and hits count as missed.
//
// An error doesn't mean that a vCPU is left behind: what could not be answered is
// answered by the next Serve or by Close. Nor does a panic of a handler: its hit is
// seen to the end.
//
// Before a live Serve returns, vCPUs that execute the instruction of a hit have
// 20 ms to come back for their Post handlers, which otherwise run in the next live
// Serve, or never.
func (e *Engine) Serve(ctx context.Context, live bool) (Verdict, error) {
	e.serving.Lock()
	defer e.serving.Unlock()
	if !live {
		return e.serve(ctx, unserved)
	}
	e.mu.Lock()
	e.server = goid.Get()
	e.mu.Unlock()
	v, err := e.serve(ctx, serving)
	e.wind()
	return v, err
}

func (e *Engine) serve(ctx context.Context, m mode) (Verdict, error) {
	if m == serving {
		e.mu.Lock()
		err := e.noneLeft()
		if err == nil {
			err = e.allSpent()
		}
		e.mu.Unlock()
		if err != nil {
			return Continue, err
		}
	}
	defer e.tick.stop()
	for {
		if err := ctx.Err(); err != nil {
			return Continue, err
		}
		wait, ticking := ctx, false
		if m == serving && e.following.Load() {
			if v, err := e.tend(); v != Continue || err != nil {
				return v, err
			}
			var over bool
			ticking = true
			if wait, over = e.tick.of(ctx); over {
				e.sweep(false)
			}
		}
		if e.owing.Load() {
			if v, err := e.serveOwing(ctx, m); v != Continue || err != nil {
				return v, err
			}
			continue
		}
		if err := e.drv.Wait(wait, &e.stop); err != nil {
			if ticking && wait.Err() != nil && errors.Is(err, wait.Err()) {
				if err := ctx.Err(); err != nil {
					return Continue, err
				}
				e.tick.next()
				e.sweep(true)
				continue
			}
			if err = e.changed(err); err != nil {
				return Continue, err
			}
			continue
		}
		if v, err := e.handle(&e.stop, m); v != Continue || err != nil {
			return v, err
		}
	}
}

// wind serves until the vCPUs have come back whose Post handlers are due.
func (e *Engine) wind() {
	const limit = 20 * time.Millisecond
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.postsDue() {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	for e.postsDue() {
		if _, err := e.wait(ctx, ending); err != nil {
			e.log.Debug("waiting for Post handlers", "err", err)
			return
		}
	}
}

// wait serves one stop. e.mu, which is held, is released until handle takes it.
func (e *Engine) wait(ctx context.Context, m mode) (Verdict, error) {
	e.mu.Unlock()
	defer e.mu.Lock()
	if err := e.drv.Wait(ctx, &e.stop); err != nil {
		return Continue, e.changed(err)
	}
	return e.handle(&e.stop, m)
}

func (e *Engine) postsDue() bool {
	return slices.ContainsFunc(e.active, func(f *inflight) bool { return e.wantsPost(f, ending) })
}

// handle answers one stop. It takes e.mu, which is free while handlers run; what it
// calls wants it held.
func (e *Engine) handle(s *Stop, m mode) (Verdict, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	defer e.attend()
	e.stops++
	if s.VCPU < 0 || s.VCPU >= e.nvcpu {
		return Continue, fmt.Errorf("stop of vCPU %d, of %d", s.VCPU, e.nvcpu)
	}
	e.now = present{}
	if e.activations > 0 {
		e.now.time = time.Now()
	}
	defer func() { e.hold(s.VCPU) }()
	switch s.Reason {
	case Stepped:
		return e.stepped(s, m)
	case Hit:
	default:
		return Continue, errors.Join(fmt.Errorf("vCPU %d stopped for reason %d, which is none", s.VCPU, s.Reason), e.resume(s))
	}
	if s.User {
		e.stats.Reinjected++
		return Continue, e.reinject(s)
	}
	if e.adopted != nil {
		e.here(s)
	}
	return e.hit(s, m)
}

// foreign answers a breakpoint exception at an address where no breakpoint of ours
// is. If the byte there isn't an int3 either, ours has been removed since, and the
// instruction is executed. Until the byte can be read, nothing is injected.
func (e *Engine) foreign(s *Stop) error {
	b := e.buf[:1]
	err := e.retry(func() error { _, err := e.drv.Read(s.Regs.CR3, s.Regs.IP, b); return err })
	switch {
	case err == nil:
	case transient(err):
		return e.owe(debt{duty: dutyForeign, stop: *s}, fmt.Errorf("read the breakpoint at %#x: %w", s.Regs.IP, err))
	case errors.Is(err, ErrGone):
		return err
	default:
		b[0] = 0 // the vCPU finds out itself
	}
	if b[0] != int3 {
		e.stats.Stale++
		e.log.Debug("breakpoint was removed", "vcpu", s.VCPU, "addr", hex(s.Regs.IP))
		return e.resume(s)
	}
	e.stats.Reinjected++
	e.log.Debug("breakpoint is the guest's own", "vcpu", s.VCPU, "addr", hex(s.Regs.IP))
	return e.reinject(s)
}

// take returns an unused inflight for a hit of st.
func (e *Engine) take(st *site, s *Stop) *inflight {
	var f *inflight
	if n := len(e.idle); n > 0 {
		f, e.idle = e.idle[n-1], e.idle[:n-1]
	} else {
		f = new(inflight)
	}
	*f = inflight{vcpu: s.VCPU, site: st, owners: append(f.owners[:0], st.owners...), shifted: st.shifted(), before: s.Regs}
	return f
}

// maxActive bounds the hits whose instruction is being executed: one for each vCPU and
// each task that was preempted in a slot. Without a bound, a hostile guest could
// abandon any number of them and exhaust this process' memory.
const maxActive = 1 << 14

func (e *Engine) give(f *inflight) { e.idle = append(e.idle, f) }

// depart marks f as executed by its vCPU.
func (e *Engine) depart(f *inflight, sl *slot) {
	f.slot = sl
	if sl != nil {
		if own := e.mark(f.vcpu); own != nil { // the answer may not be given any more
			own.count(sl, Mark{SP: f.before.SP}, sl.busy.Load()+1)
		} else {
			sl.busy.Add(1)
		}
	}
	e.active = append(e.active, f)
}

// arrive ends what depart began.
func (e *Engine) arrive(f *inflight) {
	if f.slot != nil {
		f.slot.busy.Add(-1)
	}
	e.forget(f)
}

// arriveAt is arrive for a vCPU that has stopped at the end of its slot.
func (e *Engine) arriveAt(f *inflight, s *Stop) {
	if f.mark != nil {
		f.mark.Slot = 0 // it is in the slot
	}
	own := e.mark(s.VCPU)
	if own == nil {
		e.arrive(f)
		return
	}
	// The answer may not be given any more: then it stops there again.
	own.count(f.slot, Mark{SP: f.before.SP, Back: true, End: s.Regs.SP}, f.slot.busy.Load()-1)
	e.forget(f)
}

func (e *Engine) forget(f *inflight) {
	if i := slices.Index(e.active, f); i >= 0 {
		e.active = slices.Delete(e.active, i, i+1)
	}
}

// find returns the hit that ends with s, in slot sl (nil: in place). Interrupt
// handlers with probes of their own may have run meanwhile, and the task may have
// moved to another vCPU, so hits are told apart by the stack pointer.
func (e *Engine) find(s *Stop, sl *slot) *inflight {
	var best *inflight
	score := 0
	for _, f := range e.active {
		if f.slot != sl || s.Addr != 0 && s.Addr != f.site.addr {
			continue
		}
		n, nearby := 2, near(f.before.SP, s.Regs.SP)
		if f.mark != nil {
			n = 1 // it may not be in the slot
		}
		if nearby {
			n += 8
		}
		if f.vcpu == s.VCPU && (nearby || f.mark == nil) {
			n += 4
		}
		if n > score || n == score && f.before.SP == s.Regs.SP {
			best, score = f, n
		}
	}
	if sl == nil && best != nil && best.vcpu != s.VCPU && !e.cheap {
		return nil
	}
	return best
}

// near reports whether two stack pointers may be those before and after one instruction.
func near(a, b uint64) bool {
	d := int64(a - b)
	return d >= -64 && d <= 64
}

// sameStack reports whether two stack pointers may be of one stack of the kernel's, which has
// 16 KiB (THREAD_SIZE, arch/x86/include/asm/page_64_types.h).
func sameStack(a, b uint64) bool {
	d := int64(a - b)
	return d > -1<<14 && d < 1<<14
}

// wants reports whether o's registration is still there, and enabled.
func (o owner) wants(st *site) bool {
	return o.site == st && o.Probe.gen == o.gen && o.Enabled()
}

// miss counts f as missed by those of owners that want it.
func (f *inflight) miss(owners []owner) {
	for _, o := range owners {
		if o.wants(f.site) {
			o.missed.Add(1)
		}
	}
}

// hit answers a breakpoint exception in the guest's kernel. At a site of ours it runs
// the handlers that come before the instruction there: Pre and Post of the shifted
// owners, whose instruction is another one, and Pre of the others. Each sees the vCPU
// at its probe; if one sends it elsewhere that holds from when all have run, and the
// first one's word counts. As soon as one ends the hit the rest miss it.
func (e *Engine) hit(s *Stop, m mode) (v Verdict, err error) {
	st := e.sites[s.Regs.IP]
	if st == nil || !st.armed {
		if sl := e.slotEnd[s.Regs.IP]; sl != nil {
			return e.leaveSlot(sl, s, m)
		}
		return Continue, e.foreign(s)
	}
	f := e.take(st, s)
	e.stats.Hits++
	// If a handler panics, or a hook, the hit is still completed.
	finished := false
	defer func() {
		if !finished {
			f.miss(f.owners[f.told:])
			f.post = false
			s.Regs = f.before
			if _, err := e.execute(f, s, unserved); err != nil {
				e.log.Error("hit not finished after a panic", "err", err)
			}
		}
	}()
	if st.follows() || st.wantTask {
		e.look(s)
	}
	if st.filters > 0 || len(e.spent) > 0 {
		e.filter(f, s)
	}
	if m != serving {
		err := e.passBy(st, s, m)
		finished = true
		f.miss(f.owners)
		v, xerr := e.execute(f, s, m)
		return v, errors.Join(err, xerr)
	}
	v, bad := e.returned(st, s, m)
	e.enter(st, s)
	shifted, others := f.owners[:f.shifted], f.owners[f.shifted:]
	v, moved := e.pre(f, shifted, s, v)
	if !moved && v == Continue {
		v = e.post(f, shifted, s)
	}
	if s.Regs.IP == st.addr { // else the vCPU doesn't come to the instruction of the others
		v, _ = e.pre(f, others, s, v)
	}
	w, badExit := e.exited(st, s, m)
	if f.skipped || e.leftByHand(f, s) {
		if err := e.checkRegs(&f.before, s); err != nil { // then the function is executed after all
			bad, f.skipped = errors.Join(bad, err), false
		} else {
			w, badExit = e.skipped(f, s, m)
		}
	}
	v = first(v, w)
	finished = true
	f.post = v == Continue
	bad = errors.Join(bad, badExit, e.checkRegs(&f.before, s))
	w, err = e.execute(f, s, m)
	return first(v, w), errors.Join(bad, err)
}

// first returns the verdict that counts.
func first(a, b Verdict) Verdict {
	if a != Continue {
		return a
	}
	return b
}

// passBy is for a hit that no handler sees: the calls that end with it are abandoned.
func (e *Engine) passBy(st *site, s *Stop, m mode) error {
	if !st.follows() {
		return nil
	}
	_, err := e.returned(st, s, m)
	e.enter(st, s)
	_, exitErr := e.exited(st, s, m)
	return errors.Join(err, exitErr)
}

// checkRegs takes back what handlers have left in s.Regs, if no vCPU can have it.
func (e *Engine) checkRegs(before *x86.Regs, s *Stop) error {
	if s.Regs == *before {
		return nil
	}
	err := s.Regs.CheckChange(before, e.drv.Caps().LA57)
	if err == nil {
		return nil
	}
	s.Regs = *before
	return fmt.Errorf("vCPU %d at %#x goes on with the registers that it had: %w: a handler left %w", s.VCPU, before.IP, ErrBadRegs, err)
}

// pre runs the Pre handlers of owners unless a verdict was given, and reports
// whether one sent the vCPU elsewhere.
func (e *Engine) pre(f *inflight, owners []owner, s *Stop, v Verdict) (_ Verdict, moved bool) {
	st := f.site
	to := st.addr
	for _, o := range owners {
		f.told++
		switch {
		case !o.wants(st):
			continue
		case f.skipped:
			o.skipped.Add(1)
			continue
		case v != Continue:
			o.missed.Add(1)
			continue
		}
		s.Regs.IP = o.Addr
		e.moved = moved
		if o.Ret != nil {
			v = e.follow(o, s)
		} else {
			e.tally(o.Probe)
			v = e.call(o.Probe, o.Pre, s, false)
		}
		if s.Regs.IP != o.Addr && !moved {
			to, moved = s.Regs.IP, true
			f.skipped = e.ctx.skip
		}
	}
	s.Regs.IP = to
	return v, moved
}

// post runs the Post handlers of owners, until one ends the hit.
func (e *Engine) post(f *inflight, owners []owner, s *Stop) (v Verdict) {
	for _, o := range owners {
		if !o.wants(f.site) {
			continue
		}
		if v = e.call(o.Probe, o.Post, s, true); v != Continue {
			break
		}
	}
	return v
}

// call runs a handler of p for a stop.
func (e *Engine) call(p *Probe, handler func(*Context) Verdict, s *Stop, post bool) Verdict {
	return e.run(Context{Probe: p, VCPU: s.VCPU, Regs: &s.Regs, Post: post, e: e}, handler)
}

// run runs a handler, without the engine's lock.
func (e *Engine) run(c Context, handler func(*Context) Verdict) Verdict {
	if handler == nil {
		return Continue
	}
	e.running = c.Probe
	c.moved = e.moved && !c.Post && !c.Return && c.Regs != nil
	e.ctx = c
	e.mu.Unlock()
	defer func() {
		e.mu.Lock()
		e.handled()
	}()
	return handler(&e.ctx)
}

// handled says that no handler runs.
func (e *Engine) handled() {
	e.running = nil
	e.done.Broadcast()
}

// execute has the instruction of a hit executed, by the first way that works.
func (e *Engine) execute(f *inflight, s *Stop, m mode) (Verdict, error) {
	st := f.site
	if now := e.sites[st.addr]; !st.armed && now != nil && now.armed {
		// Removed and put back meanwhile: that is no further execution.
		f.site, st = now, now
	}
	if s.Regs.IP != st.addr || !st.armed {
		// Redirected by a handler, or removed by one: the guest's own bytes run.
		e.give(f)
		return Continue, e.resume(s)
	}
	in := &st.insn
	why := x86.ErrNotEmulated
	if e.cfg.Method == Auto && e.emulates(in) {
		if why = e.emulate(in, s); why == nil {
			e.stats.Emulated++
			return e.finish(f, s, m)
		}
	}
	if e.cheap && e.cfg.Method == Auto && !e.wantsPost(f, m) {
		return Continue, e.stepOn(f, s)
	}
	if len(e.active) >= maxActive {
		return Continue, e.giveUp(f, s, fmt.Errorf("%#x (%s): %w: %d hits are on their way and haven't come back", st.addr, in.String(), ErrNoWayPast, maxActive))
	}
	f.before = s.Regs
	if sl := st.slot; sl != nil && (e.own == nil || e.mark(f.vcpu) != nil) {
		e.depart(f, sl)
		s.Regs.IP = sl.addr
		e.stats.OutOfLine++
		return Continue, e.resume(s)
	}
	if err := e.canStepNow(in); err != nil {
		if transient(why) {
			return Continue, e.owe(debt{duty: dutyExecute, stop: *s, f: f}, fmt.Errorf("%#x (%s): %w", st.addr, in.String(), why))
		}
		return Continue, e.giveUp(f, s, fmt.Errorf("%#x (%s): %w: %w; %w", st.addr, in.String(), ErrNoWayPast, why, err))
	}
	e.depart(f, nil)
	err := e.stepOver(f, s)
	if err == nil {
		e.stats.InPlace++
	}
	return Continue, err
}

// emulates reports whether an attempt is made to emulate in here.
func (e *Engine) emulates(in *x86.Insn) bool {
	return in.CanEmulate() && (!e.cheap || !in.MemoryOperand())
}

// emulate makes s.Regs what in makes of them. If it fails it has changed nothing.
func (e *Engine) emulate(in *x86.Insn, s *Stop) (err error) {
	before := s.Regs
	e.mem = memory{e.drv, s.Regs.CR3}
	for try := range tries {
		if try > 0 {
			time.Sleep(time.Millisecond)
		}
		err = in.Emulate(&s.Regs, &e.mem)
		if err == nil && e.cheap && !onlyIP(&before, &s.Regs) {
			err = x86.ErrNotEmulated // a step costs less
		}
		if err == nil {
			return nil
		}
		s.Regs = before
		if !transient(err) {
			return err
		}
	}
	return err
}

// onlyIP reports whether a and b differ in IP at the most.
func onlyIP(a, b *x86.Regs) bool {
	c := *a
	c.IP = b.IP
	return c == *b
}

// transient reports whether a failure may go away by itself: it isn't permanent, and
// the guest didn't cause it.
func transient(err error) bool {
	return err != nil && !final(err) && !errors.Is(err, ErrFault) && !errors.Is(err, ErrNotMapped) &&
		!errors.Is(err, x86.ErrNotEmulated)
}

// giveUp takes a breakpoint out so that the vCPU at it can go on.
func (e *Engine) giveUp(f *inflight, s *Stop, why error) error {
	st := f.site
	s.Regs.IP = st.addr
	err := e.removeSite(st)
	if st.armed && !errors.Is(err, ErrGone) {
		return errors.Join(why, e.owe(debt{duty: dutyGiveUp, stop: *s, f: f}, err))
	}
	e.give(f)
	e.orphan(st, cmp.Or(why, err, ErrNoWayPast))                   // at a later try it was told before
	if lost := cmp.Or(why, err); errors.Is(lost, ErrTextChanged) { // that one ends, and no other
		e.keepLost(st, lost)
		return errors.Join(e.resume(s), e.noneLeft())
	}
	followed := false
	for _, o := range st.owners {
		if o.site != st {
			continue
		}
		e.disown(o.Probe)
		if o.Ret != nil {
			e.endCalls(o.Probe)
			followed = true
		}
	}
	if followed {
		e.dropUnwanted()
	}
	return errors.Join(why, err, e.resume(s))
}

// wantsPost reports whether a Post handler is to run after the instruction.
func (e *Engine) wantsPost(f *inflight, m mode) bool {
	if !f.post || m == unserved {
		return false
	}
	for _, o := range f.owners[f.shifted:] {
		if o.Post != nil && o.wants(f.site) {
			return true
		}
	}
	return false
}

// finish runs the post handlers, with s.Regs after the instruction, and lets the
// vCPU go.
func (e *Engine) finish(f *inflight, s *Stop, m mode) (v Verdict, err error) {
	if !e.wantsPost(f, m) {
		e.give(f)
		return Continue, e.resume(s)
	}
	was := s.Regs
	finished := false
	defer func() {
		if !finished {
			s.Regs = was
			if err := e.resume(s); err != nil {
				e.log.Error("hit not finished after a panic", "err", err)
			}
		}
	}()
	v = e.post(f, f.owners[f.shifted:], s)
	finished = true
	e.give(f)
	bad := e.checkRegs(&was, s)
	return v, errors.Join(bad, e.resume(s))
}

// leaveSlot takes a vCPU back from out-of-line execution.
func (e *Engine) leaveSlot(sl *slot, s *Stop, m mode) (Verdict, error) {
	if e.back != nil && e.counted(sl, s) {
		return e.complete(&inflight{vcpu: s.VCPU, site: sl.site, before: s.Regs}, s, sl.addr, m)
	}
	f := e.find(s, sl)
	if f == nil {
		// No vCPU is known to be there, but only our own int3 can be.
		e.log.Error("vCPU at the end of a slot that it wasn't sent to", "vcpu", s.VCPU, "addr", hex(s.Regs.IP))
		s.Regs.IP = sl.site.addr + uint64(sl.site.insn.Len)
		return Continue, e.resume(s)
	}
	e.arriveAt(f, s)
	if f.lost {
		f.before = s.Regs // a copy in a slot has no step's flags
	}
	if sl.busy.Load() == 0 && !sl.site.armed {
		defer e.freeSlot(sl.site)
	}
	return e.complete(f, s, sl.addr, m)
}

// complete ends a hit whose instruction the vCPU executed itself, at address at.
func (e *Engine) complete(f *inflight, s *Stop, at uint64, m mode) (Verdict, error) {
	err := e.finishStep(f, s, at)
	switch {
	case err == nil:
		return e.finish(f, s, m)
	case transient(err):
		return Continue, e.owe(debt{duty: dutyComplete, stop: *s, f: f, at: at}, err)
	}
	// The vCPU is behind the instruction all the same.
	s.Regs.IP = f.site.addr + uint64(f.site.insn.Len)
	e.give(f)
	return Continue, errors.Join(err, e.resume(s))
}

func (e *Engine) finishStep(f *inflight, s *Stop, at uint64) error {
	st := f.site
	e.mem = memory{e.drv, s.Regs.CR3}
	err := e.retry(func() error { return st.insn.FinishStep(&s.Regs, st.addr, at, &e.mem, &f.before) })
	if err != nil {
		return fmt.Errorf("%#x: %w", st.addr, err)
	}
	return nil
}

func (e *Engine) stepped(s *Stop, m mode) (Verdict, error) {
	f := e.find(s, nil)
	if f == nil {
		return Continue, errors.Join(fmt.Errorf("vCPU %d was stepped, but not by us", s.VCPU), e.resume(s))
	}
	st := f.site
	if s.Regs.IP == st.addr && st.insn.Repeats() && st.armed {
		unstep(f, s) // the next step may fail, and the vCPU go another way
		return Continue, e.stepOver(f, s)
	}
	e.arrive(f)
	err := e.finishStep(f, s, st.addr)
	switch {
	case err == nil:
		return e.finish(f, s, m)
	case transient(err):
		return Continue, e.owe(debt{duty: dutyComplete, stop: *s, f: f, at: st.addr}, err)
	case e.cheap && errors.Is(err, x86.ErrStepLost):
		// It faulted. The guest's handler runs, and may come back for another hit.
		e.give(f)
		return Continue, e.resume(s)
	}
	// It faulted, though newSite refuses instructions that are known to: the vCPU is in
	// the guest's fault handler. The flags that were set for the step must not stay.
	unstep(f, s)
	e.give(f)
	return Continue, errors.Join(err, e.resume(s))
}

// unstep takes back what a driver has set in RFLAGS for a step.
func unstep(f *inflight, s *Stop) {
	if s.Regs.Flags&x86.FlagTF != 0 {
		const step = x86.FlagTF | x86.FlagIF
		s.Regs.Flags = s.Regs.Flags&^step | f.before.Flags&step
	}
}

// memory is guest memory as the vCPU with these page tables sees it.
type memory struct {
	drv Driver
	cr3 uint64
}

func (m *memory) ReadVirt(addr uint64, b []byte) error {
	_, err := m.drv.Read(m.cr3, addr, b)
	return err
}

func (m *memory) WriteVirt(addr uint64, b []byte) error { return m.drv.Store(m.cr3, addr, b) }
