package breakpoint

import (
	"errors"
	"fmt"
	"slices"
	"time"
)

// plan is where breakpoints notice a return to an address.
type plan struct {
	addrs []uint64
	err   error // why none may stand there, as of then
	made  time.Time
}

// planAgain is how long a reason holds: it may have been one that goes away.
const planAgain = 10 * time.Second

// Bounds of what the engine remembers about return addresses, of which a hostile guest can
// make up any number.
const (
	maxPlans       = 1 << 12
	maxReturnSites = 1 << 12
)

var (
	errManyCalls       = errors.New("too many calls are under way")
	errManyReturnSites = errors.New("return probes have too many breakpoints")
)

// enter notices a call that begins with the stop in hand, at st: whatever was under way in its
// slot, or below, is over, unless it has ended in a jump to this function. It releases e.mu.
func (e *Engine) enter(st *site, s *Stop) {
	if st.rets == 0 {
		return
	}
	e.now.slot = s.Regs.SP
	// If it can't be read what was in the slot may be over all the same: see below.
	e.now.ret, e.now.err = e.word(s.Regs.CR3, e.now.slot)
	e.unwind(e.now.slot, &e.now.task)
	c := e.calls[e.now.slot]
	if c == nil {
		return
	}
	if e.now.err == nil && c.ret != e.now.ret && !e.trampoline(e.now.ret) && !e.trampoline(c.ret) {
		if c = e.calls[e.now.slot]; c != nil {
			e.abandon(ErrUnwound, c)
		}
		return
	}
	if c = e.calls[e.now.slot]; c == nil {
		return
	}
	fn, tailsTo := st.function()
	switch {
	case !c.task.same(&e.now.task):
		e.abandon(ErrTaskGone, c)
	case c.tailsTo != nil && !c.tailsTo(fn):
		e.abandon(ErrUnwound, c) // its caller has called again from the same place
	default:
		c.tailsTo = tailsTo
	}
}

// function returns the address of the function whose return probes are at s, and which others
// it may end in a jump to.
func (s *site) function() (fn uint64, tailsTo func(uint64) bool) {
	for _, o := range s.owners {
		if o.Ret != nil {
			return o.Addr, o.Ret.TailsTo
		}
	}
	return s.addr, nil
}

// follow runs the Pre handler of a return probe, at the entry of a call, and enters the call in
// the books, unless the handler isn't interested. It has been counted when the vCPU goes on, so
// it can't return before.
func (e *Engine) follow(o owner, s *Stop) Verdict {
	r := o.Ret
	sites, err := e.canFollow(o, s)
	if o.site == nil || !o.wants(o.site) { // e.mu was released
		if o.site == nil && len(sites) > 0 {
			e.dropUnwanted()
		}
		return Continue
	}
	if err != nil {
		e.missCall(o, err)
		return Continue
	}
	e.tally(o.Probe)
	a := &Activation{
		Probe: o.Probe, Before: s.Regs, VCPU: s.VCPU, Task: e.now.task, Slot: e.now.slot, Return: e.now.ret, gen: o.gen, disables: o.disables.Load(),
		Entered: e.now.time, held: e.heldFor(s.VCPU),
	}
	a.Before.IP = o.Addr
	a.Depth = e.depths[taskProbe{a.Task.Addr, a.Probe}]
	e.inHand = append(e.inHand[:0], a)
	v := e.begin(a, s, sites)
	e.inHand = e.inHand[:0]
	switch {
	case a.ignored && !a.dropped:
		r.ignored.Add(1)
		return v
	case !a.wanted():
		a.drop()
		e.dropUnwanted()
		return v
	}
	for _, st := range sites {
		if !st.armed { // lost while the handler ran
			e.lapse(a, ErrTextChanged)
			return v
		}
		if !slices.Contains(st.by, o.Probe) {
			st.by = append(st.by, o.Probe)
		}
	}
	c := e.calls[a.Slot]
	switch {
	case c == nil:
		c = &call{slot: a.Slot, ret: a.Return, task: a.Task, tailsTo: r.TailsTo, begun: e.sweeps, sites: sites}
		e.insert(c)
	case c.sites == nil && sites != nil:
		c.sites = sites
		for _, st := range sites {
			st.live++
		}
	}
	c.acts = append(c.acts, a)
	e.count(a, 1)
	return v
}

// begin runs the Pre handler of a. The breakpoints at its return address stay meanwhile.
func (e *Engine) begin(a *Activation, s *Stop, sites []*site) Verdict {
	for _, st := range sites {
		st.live++
	}
	over := false
	defer func() {
		if !over { // the handler has panicked
			a.drop()
		}
		for _, st := range sites {
			e.leaveSite(st)
		}
	}()
	v := e.run(Context{Probe: a.Probe, VCPU: s.VCPU, Regs: &s.Regs, Call: a, e: e}, a.Probe.Pre)
	over = true
	return v
}

// whileFrozen calls f while the guest is frozen. Unlike freeze it doesn't wait for a moment at
// which the guest doesn't rewrite its code: the vCPU in hand may be about to.
func (e *Engine) whileFrozen(f func() error) error {
	if err := e.retry(e.drv.Freeze); err != nil {
		for _, st := range e.order { // the next sweep finds what was to be removed
			if st.cold() && st.warm.IsZero() {
				e.made, st.warm = true, time.Now()
			}
		}
		return fmt.Errorf("pause the guest: %w", err)
	}
	return errors.Join(f(), e.thaw())
}

// dropUnwanted removes, in the middle of a hit, the breakpoints at which no call that is under
// way ends.
func (e *Engine) dropUnwanted() {
	if err := e.whileFrozen(e.removeAllCold); err != nil {
		e.log.Warn("breakpoints at return addresses", "err", err)
	}
}

// missCall counts a call that can't be followed. The first one is told, and later ones for other
// reasons from time to time: the guest makes up the addresses in them.
func (e *Engine) missCall(o owner, why error) {
	o.missed.Add(1)
	r := o.Ret
	if r.told != nil && (r.told.Error() == why.Error() || time.Since(r.toldAt) < planAgain) {
		return
	}
	r.told, r.toldAt = why, time.Now()
	e.log.Warn("calls of a return probe are missed", "addr", hex(o.Addr), "why", why)
}

// canFollow makes the breakpoints at which the call that begins will end, and returns those
// that are at its return address.
func (e *Engine) canFollow(o owner, s *Stop) ([]*site, error) {
	r := o.Ret
	if e.now.err != nil {
		return nil, fmt.Errorf("read the return address at %#x: %w", e.now.slot, e.now.err)
	}
	if r.active >= r.limit() || e.activations >= maxActivations {
		if time.Since(e.swept) > 100*time.Millisecond {
			e.sweepNow()
		}
		if r.active >= r.limit() || e.activations >= maxActivations {
			return nil, errManyCalls
		}
	}
	if r.exiting {
		r.following.Store(uint32(AtExits))
		return nil, nil
	}
	var err error
	if r.Follow != AtExits { // else they are lost
		var sites []*site
		if sites, err = e.returnSites(e.now.ret); err == nil {
			r.following.Store(uint32(AtReturn))
			return sites, nil
		}
		if r.Follow == AtReturn {
			return nil, err
		}
	}
	if o.site == nil { // e.mu was released
		return nil, err
	}
	if exitErr := e.useExits(o.Probe); exitErr != nil {
		return nil, errors.Join(err, exitErr)
	}
	r.following.Store(uint32(AtExits))
	return nil, nil
}

// returnSites returns the breakpoints that notice a return to ret, which it makes if there are
// none. It releases e.mu.
func (e *Engine) returnSites(ret uint64) ([]*site, error) {
	p, known := e.plans[ret]
	sites := e.standing(p)
	if !known || p.err != nil && time.Since(p.made) > planAgain || p.err == nil && sites == nil {
		// What stands there already may stay. To make it anew it is asked whether it may: the guest may
		// have loaded other code there.
		p = e.planReturn(ret)
		p.made = time.Now()
		if len(e.plans) >= maxPlans {
			clear(e.plans)
		}
		e.plans[ret] = p
		sites = e.standing(p)
	}
	if p.err != nil {
		return nil, p.err
	}
	if sites != nil {
		for _, st := range sites {
			if e.made = true; st.live == 0 && st.warm.IsZero() {
				st.warm = time.Now() // a probe of another kind is there
			}
		}
		return sites, nil
	}
	sites, err := e.plant(p.addrs)
	switch {
	case lasting(err):
		e.plans[ret] = plan{err: err, made: time.Now()}
	case err == nil:
		e.made = true
		for _, st := range sites {
			st.warm = time.Now()
		}
	}
	return sites, err
}

// standing returns the breakpoints of a plan, or nil if one isn't there.
func (e *Engine) standing(p plan) []*site {
	if len(p.addrs) == 0 {
		return nil
	}
	sites := make([]*site, 0, len(p.addrs))
	for _, a := range p.addrs {
		st := e.sites[a]
		if st == nil || !st.armed {
			return nil
		}
		sites = append(sites, st)
	}
	return sites
}

// lasting reports whether a breakpoint can't be made, rather than not at this moment.
func lasting(err error) bool {
	return errors.Is(err, ErrOverlap) || errors.Is(err, ErrNoWayPast) || errors.Is(err, ErrForeign) || errors.Is(err, ErrBadInsn)
}

// planReturn asks where a return to ret is noticed. It releases e.mu.
func (e *Engine) planReturn(ret uint64) plan {
	h := &e.cfg.Hooks
	e.mu.Unlock()
	defer e.mu.Lock()
	if h.Trampoline != nil && h.Trampoline(ret) {
		return plan{err: fmt.Errorf("%#x: %w", ret, errTraced)}
	}
	if h.ReturnAt == nil {
		return plan{addrs: []uint64{ret}}
	}
	addrs, err := h.ReturnAt(ret)
	if err == nil && len(addrs) == 0 {
		err = errors.New("no breakpoint may stand there")
	}
	if err != nil {
		err = fmt.Errorf("return to %#x: %w", ret, err)
	}
	return plan{addrs: addrs, err: err}
}

var errTraced = errors.New("the guest's own tracer stands at the return address")

// plant makes breakpoints in the middle of a hit, or none. It doesn't wait for a moment at
// which the guest doesn't rewrite its code, as the vCPU in hand may be about to: Hooks.ReturnAt
// refuses what may be rewritten, and the driver compares the instruction.
func (e *Engine) plant(addrs []uint64) (sites []*site, err error) {
	if e.closing {
		return nil, ErrClosed
	}
	if err := e.retry(e.drv.Freeze); err != nil {
		return nil, fmt.Errorf("pause the guest: %w", err)
	}
	defer func() {
		if err := e.thaw(); err != nil { // which is tried again, and the breakpoints are there
			e.log.Warn("breakpoints of return probes", "err", err)
		}
	}()
	for _, a := range addrs {
		st := e.sites[a]
		if st == nil || !st.armed {
			if st, err = e.makeRoom(a); err != nil {
				break
			}
		}
		st.live++ // so that makeRoom doesn't take it for the next one
		sites = append(sites, st)
	}
	for _, st := range sites {
		st.live--
	}
	if err == nil {
		return sites, nil
	}
	for _, made := range sites {
		if !made.used() {
			err = errors.Join(err, e.removeCold(made))
		}
	}
	return nil, err
}

// makeRoom inserts a breakpoint for return probes only. If there are too many, one goes where
// no call that is under way returns to.
func (e *Engine) makeRoom(addr uint64) (*site, error) {
	if len(e.sites) >= maxReturnSites {
		n, oldest := 0, (*site)(nil)
		for _, st := range e.sites {
			if len(st.owners) == 0 {
				n++
			}
			if st.cold() && (oldest == nil || st.warm.Before(oldest.warm)) {
				oldest = st
			}
		}
		switch {
		case n < maxReturnSites:
		case oldest == nil:
			return nil, errManyReturnSites
		default:
			if err := e.removeCold(oldest); err != nil {
				return nil, err
			}
		}
	}
	return e.insertSite(addr)
}

// used reports whether the breakpoint at s is wanted, or was a moment ago.
func (s *site) used() bool { return !s.cold() || !s.warm.IsZero() }

// cold reports whether nobody waits for a hit at s. It may be warm.
func (s *site) cold() bool { return len(s.owners) == 0 && s.live == 0 && len(s.exitOf) == 0 }

// removeCold removes a breakpoint that was for return probes. If that fails it is tried again by
// the next sweep, and by Close.
func (e *Engine) removeCold(st *site) error {
	err := e.removeSite(st)
	if st.armed {
		if e.made = true; st.warm.IsZero() {
			st.warm = time.Now()
		}
		e.following.Store(true)
		return err
	}
	if errors.Is(err, ErrTextChanged) || errors.Is(err, ErrGone) {
		e.log.Debug("a breakpoint at a return address is gone", "addr", hex(st.addr), "err", err)
	}
	return nil
}

// useExits makes breakpoints where p's function ends, so that calls from now on are followed
// to these.
func (e *Engine) useExits(p *Probe) error {
	r := p.Ret
	why := r.lost
	if why == nil && len(r.Exits) == 0 {
		if why = r.NoExits; why == nil {
			why = errors.New("where the function ends isn't known")
		}
	}
	if why != nil {
		return why
	}
	sites, err := e.plant(r.Exits)
	if err != nil {
		err = fmt.Errorf("breakpoints where the function ends: %w", err)
		if lasting(err) {
			r.lost = err
		}
		return err
	}
	for _, st := range sites {
		st.exitOf = append(st.exitOf, p)
	}
	r.exits, r.exiting = sites, true
	e.log.Debug("calls are followed to where the function ends", "addr", hex(p.Addr), "breakpoints", len(sites))
	return nil
}

// leaveExits is for a probe that is dropped.
func (e *Engine) leaveExits(p *Probe) {
	for _, st := range p.Ret.exits {
		st.exitOf = slices.DeleteFunc(slices.Clone(st.exitOf), func(q *Probe) bool { return q == p })
	}
	p.Ret.exits, p.Ret.exiting = nil, false
}

// removeAllCold removes the breakpoints at which no call that is under way ends; the guest is frozen.
func (e *Engine) removeAllCold() (err error) {
	for _, st := range e.sites {
		st.by = slices.DeleteFunc(st.by, func(p *Probe) bool { return p.site == nil })
		if st.cold() {
			err = errors.Join(err, e.removeCold(st))
		}
	}
	return err
}

// Bounds of foreign returns. A breakpoint at a return address that no call under way returns to
// goes after a few of them; if many come while there is one, the probe's exits are the better
// place.
const (
	maxIdleReturns    = 8
	minForeignReturns = 64
	maxForeignRatio   = 64
)

// foreignReturn counts a return to st that no probe follows.
func (e *Engine) foreignReturn(st *site) {
	st.foreign++
	for _, p := range st.by {
		p.Ret.foreign.Add(1)
	}
	switch {
	case st.live == 0:
		if st.idle++; st.idle < maxIdleReturns {
			return
		}
		st.warm = time.Time{}
		if !st.cold() {
			return
		}
		err := e.whileFrozen(func() error { return e.removeCold(st) })
		if err != nil { // all of it is tried again
			e.log.Debug("a breakpoint at a return address stays for a while", "addr", hex(st.addr), "err", err)
		}
		return
	case st.foreign < max(minForeignReturns, st.tried) || st.foreign <= st.own/maxForeignRatio:
		return
	}
	st.tried = 2 * st.foreign
	for _, p := range slices.Clone(st.by) {
		if p.site == nil || p.Ret.Follow != FollowAuto || p.Ret.exiting {
			continue
		}
		if err := e.useExits(p); err != nil {
			e.log.Warn("a return probe stops the guest at others' returns", "addr", hex(p.Addr), "at", hex(st.addr), "why", err)
		}
	}
}
