package breakpoint

import (
	"context"
	"encoding/binary"
	"errors"
	"slices"
	"time"
)

// Calls that end in another way than by returning tell nobody. Those that are known to have are
// found when their stack is used again (enter, unwind), and the rest by a sweep, once a second:
// their task is gone, or their return address isn't where it was. The latter is also so of a
// call that has returned a moment ago, and whose stop hasn't been taken up; so it has to be seen
// by two sweeps, with nothing left to take up between them.

const (
	sweepEvery = time.Second
	sweepCalls = 256 // looked at by one sweep
	coolFor    = time.Second
	coolSites  = 32 // removed by one sweep
)

// suspicion says that a call was seen without its return address, and what the engine had
// counted then.
type suspicion struct {
	is           bool
	quiet, stops uint64
}

// Errors of calls that don't return.
var (
	ErrUnwound   = errors.New("its stack was unwound past it")
	ErrTaskGone  = errors.New("its task is gone")
	ErrNotServed = errors.New("nobody served when it returned")
)

// tick is a context that ends once a second. When it does outlives stop, as nobody may serve
// for a whole second at a time.
type tick struct {
	ctx    context.Context
	cancel context.CancelFunc
	due    time.Time
}

// of returns a context of parent's that ends when the next sweep is due, and whether one was.
// Until stop it has the same parent each time.
func (t *tick) of(parent context.Context) (_ context.Context, over bool) {
	if t.ctx != nil {
		if t.ctx.Err() == nil {
			return t.ctx, false
		}
		over = true
		t.next()
	}
	t.stop()
	if t.due.IsZero() {
		t.due = time.Now().Add(sweepEvery)
	}
	t.ctx, t.cancel = context.WithDeadline(parent, t.due)
	return t.ctx, over
}

// next says that a sweep is made.
func (t *tick) next() {
	t.stop()
	t.due = time.Time{}
}

func (t *tick) stop() {
	if t.ctx != nil {
		t.cancel()
	}
	t.ctx, t.cancel = nil, nil
}

// attend says whether there is something to sweep or to tell.
func (e *Engine) attend() {
	e.following.Store(len(e.calls) > 0 || len(e.ended) > 0 || e.made || len(e.spent) > 0)
}

// tend does what is due between two stops.
func (e *Engine) tend() (v Verdict, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	defer e.attend()
	if v := e.tellEnded(); v != Continue {
		return v, nil
	}
	return Continue, e.dropSpent()
}

// tellEnded runs the Abandoned handlers that are due.
func (e *Engine) tellEnded() (v Verdict) {
	for v == Continue && len(e.ended) > 0 {
		x := e.ended[0]
		e.ended = e.ended[1:]
		if len(e.ended) == 0 {
			e.ended = nil
		}
		if !x.a.wanted() {
			continue
		}
		abandoned := x.a.Probe.Ret.Abandoned
		v = e.run(Context{Probe: x.a.Probe, VCPU: x.a.VCPU, Call: x.a, e: e}, func(*Context) Verdict { return abandoned(x.a, x.why) })
	}
	return v
}

// sweep looks for calls that will never return, and removes the breakpoints that no return is
// expected at any more. quiet says that no stop waits to be taken up.
func (e *Engine) sweep(quiet bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	defer e.attend()
	if quiet {
		e.quiet++
	}
	e.sweepNow()
	if quiet {
		e.cool()
	}
}

// sweepNow is sweep for calls. It releases e.mu.
func (e *Engine) sweepNow() {
	e.sweeps++
	e.swept = time.Now()
	e.forgetUnwanted()
	var calls []*call
	for _, c := range e.calls {
		if c.begun == e.sweeps-1 { // it may just have begun
			continue
		}
		if calls = append(calls, c); len(calls) == sweepCalls {
			break
		}
	}
	for _, c := range calls {
		if e.calls[c.slot] != c {
			continue
		}
		fate := e.fate(c)
		if e.calls[c.slot] == c {
			e.judge(c, fate)
		}
	}
}

// fate is what a look at a call shows.
type fate uint8

const (
	unknown fate = iota
	underWay
	returnGone
	taskGone
)

// fate looks at a call. It releases e.mu.
func (e *Engine) fate(c *call) fate {
	slot, ret, task := c.slot, c.ret, c.task
	var next []uint64 // what it executes then, behind a jump label
	for _, st := range c.sites {
		next = append(next, st.addr)
	}
	e.mu.Unlock()
	defer e.mu.Lock()
	h := &e.cfg.Hooks
	if task.Addr != 0 && h.Alive != nil {
		if alive, err := h.Alive(task); err == nil && !alive {
			return taskGone
		}
	}
	// A vCPU that is interrupted before it executes what is at its return address leaves that
	// in the frame of the interrupt, below where it was: RIP is up to 111 bytes below, as FRED
	// aligns frames of 64 bytes to 64 (FRED specification, 5.1).
	const below = 128
	var b [below + 8]byte
	_, err := e.drv.Read(0, slot-below, b[:])
	if page := slot &^ 0xfff; errors.Is(err, ErrNotMapped) && slot-below < page { // the stack ends there
		clear(b[:])
		_, err = e.drv.Read(0, page, b[page-(slot-below):])
	}
	switch {
	case errors.Is(err, ErrNotMapped):
		return returnGone
	case err != nil:
		return unknown
	}
	for at := 0; at < len(b); at += 8 {
		v := binary.LittleEndian.Uint64(b[at:])
		switch {
		case v == ret, at < below && slices.Contains(next, v), at == below && h.Trampoline != nil && h.Trampoline(v):
			return underWay
		}
	}
	return returnGone
}

// judge ends a call, if what a look has shown proves that it has.
func (e *Engine) judge(c *call, f fate) {
	if f == underWay {
		c.suspect = suspicion{}
	}
	if f == unknown || f == underWay {
		return
	}
	why := ErrUnwound
	if f == taskGone {
		why = ErrTaskGone
	}
	was := c.suspect
	if !was.is {
		c.suspect = suspicion{true, e.quiet, e.stops}
		return
	}
	// Each vCPU has had its turn if so many stops were served.
	if e.quiet == was.quiet && e.stops < was.stops+uint64(4*e.nvcpu+16) {
		return
	}
	e.abandon(why, c)
}

// cool removes breakpoints that no return is expected at any more.
func (e *Engine) cool() {
	var out []*site
	for _, st := range e.order {
		if st.warm.IsZero() || st.live > 0 || time.Since(st.warm) < coolFor {
			continue
		}
		if !st.cold() {
			st.warm = time.Time{}
			continue
		}
		if out = append(out, st); len(out) == coolSites {
			break
		}
	}
	if e.made = slices.ContainsFunc(e.order, func(st *site) bool { return !st.warm.IsZero() }); len(out) == 0 {
		return
	}
	err := e.whileFrozen(func() (err error) {
		for _, st := range out {
			st.warm = time.Time{}
			err = errors.Join(err, e.removeCold(st))
		}
		return err
	})
	if err != nil {
		e.log.Debug("breakpoints at return addresses stay for a while", "err", err)
	}
}
