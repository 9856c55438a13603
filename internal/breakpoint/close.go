package breakpoint

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"
)

// closeWait bounds how long Close waits for vCPUs in slots. They are there for
// microseconds, unless the guest is preempted or the hypervisor is busy. failWait
// bounds how long it tries again what failed.
const (
	closeWait = 10 * time.Second
	failWait  = time.Second
	cheapWait = 100 * time.Millisecond
)

// Close takes every breakpoint out, waits until no vCPU executes a slot, and
// leaves the guest. It waits for Serve to return. No probe can be registered from
// then on.
//
// If a byte can't be restored or a vCPU not be answered, Close fails with
// ErrUnanswered and stays attached: a guest that comes to such a byte then waits,
// where it would die if nobody was attached. Close may be called again, and Serve
// too, meanwhile.
func (e *Engine) Close() (terr error) {
	e.serving.Lock()
	defer e.serving.Unlock()
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return nil
	}
	e.closing = true
	e.forgetCalls(nil)
	e.meet()
	told := e.tellLost()
	defer func() { terr = errors.Join(terr, e.tellLost()) }() // what was noticed meanwhile
	more, err := e.takeOut()
	told = errors.Join(told, more)
	if errors.Is(err, ErrGone) {
		return e.left(told)
	}
	e.drain()
	told = errors.Join(told, e.endSlots())
	err = e.leaveGuest()
	for begin := time.Now(); (errors.Is(err, errInside) || errors.Is(err, ErrQueued)) && time.Since(begin) < closeWait; {
		e.serveFor(time.Millisecond)
		err = e.leaveGuest()
	}
	switch {
	case errors.Is(err, ErrGone):
		return e.left(told)
	case err != nil:
		return errors.Join(told, err)
	}
	e.closed = true
	e.thaws = 0
	return told
}

// leaveGuest has the driver leave the guest, if nothing of ours is in it. Otherwise it
// fails, and the guest isn't frozen.
func (e *Engine) leaveGuest() error {
	switch err := e.standStill(); {
	case errors.Is(err, ErrGone):
		return err
	case err != nil:
		return fmt.Errorf("%w, or a byte not restored; still attached, close again: %w", ErrUnanswered, err)
	}
	if err := e.retry(e.drv.Close); err != nil && !errors.Is(err, ErrGone) {
		return errors.Join(fmt.Errorf("%w: %w", ErrUnanswered, err), e.thaw())
	}
	return nil
}

// Left reports whether Close has left the guest: nothing of ours is in it.
func (e *Engine) Left() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.closed
}

// left ends Close of a guest that is gone.
func (e *Engine) left(told error) error {
	e.closed = true
	e.owed, e.thaws, e.active = nil, 0, nil
	e.owing.Store(false)
	if err := e.drv.Close(); err != nil && !errors.Is(err, ErrGone) {
		told = errors.Join(told, err)
	}
	return told
}

// takeOut removes all breakpoints. What it returns in told doesn't keep Close from
// leaving the guest, such as that the guest has changed its code at a breakpoint.
func (e *Engine) takeOut() (told, err error) {
	end := time.Now().Add(failWait)
	for wait := time.Millisecond; ; wait *= 2 {
		err = e.freezeServing()
		if err == nil {
			for _, s := range e.sites {
				for _, o := range s.owners {
					e.disown(o.Probe)
				}
				rerr := e.removeSite(s)
				switch {
				case s.armed:
					err = errors.Join(err, rerr)
				case rerr != nil && !errors.Is(rerr, ErrGone):
					told = errors.Join(told, rerr)
				}
			}
			err = errors.Join(err, e.thaw())
		}
		if err == nil || errors.Is(err, ErrGone) || time.Now().After(end) {
			return told, err
		}
		e.log.Debug("breakpoints not removed, trying again", "err", err)
		e.serveFor(wait)
	}
}

// freezeServing is freeze for Close, during which nobody else serves.
func (e *Engine) freezeServing() error {
	for try := 0; ; try++ {
		if err := e.retry(e.drv.Freeze); err != nil {
			return fmt.Errorf("pause the guest: %w", err)
		}
		if try == rewritingTries || e.cfg.Rewriting == nil || !e.cfg.Rewriting() {
			return nil
		}
		if err := e.thaw(); err != nil {
			return err
		}
		e.serveFor(time.Millisecond)
	}
}

// serveFor answers stops for a while.
func (e *Engine) serveFor(d time.Duration) {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	defer cancel()
	for ctx.Err() == nil {
		if e.owing.Load() {
			e.settle(unserved)
		}
		if _, err := e.wait(ctx, unserved); err != nil {
			e.log.Debug("closing", "err", err)
			if errors.Is(err, ErrGone) {
				return
			}
		}
	}
}

// drain serves until no hit is in flight and nothing is owed, as far as waiting
// for it helps.
func (e *Engine) drain() {
	begin := time.Now()
	for len(e.active) > 0 || e.owing.Load() {
		limit := closeWait
		switch {
		case e.owing.Load():
			limit = failWait
		case e.cheap:
			limit = cheapWait // they are in no code of ours
		case !slices.ContainsFunc(e.active, func(f *inflight) bool { return !f.lost || f.slot != nil }):
			limit = failWait // a step of a process that died, which may not have begun
		}
		if time.Since(begin) > limit {
			return
		}
		if e.owing.Load() {
			if _, err := e.settle(unserved); errors.Is(err, ErrGone) {
				return
			}
		}
		if len(e.active) == 0 && !e.owing.Load() {
			break
		}
		ctx, cancel := context.WithTimeout(context.Background(), owedPause)
		_, err := e.wait(ctx, unserved)
		cancel()
		if errors.Is(err, ErrGone) {
			return
		}
	}
	// Those that found no room to announce their stop do so when there is some.
	queue := e.drv.Caps().Queue
	for n := e.nvcpu; queue > 0 && n > queue; n -= queue {
		_ = e.pollAll()
		time.Sleep(time.Millisecond)
	}
}

// pollAll serves the stops there are; e.mu is released meanwhile. It fails if it can't
// be told whether there are more.
func (e *Engine) pollAll() error {
	e.mu.Unlock()
	defer e.mu.Lock()
	failed := 0
	for range 4*min(e.nvcpu, 1<<13) + 16 { // a frozen guest has no more
		err := e.drv.Wait(expired, &e.stop)
		switch {
		case err == nil:
			failed = 0
			if _, err := e.handle(&e.stop, unserved); err != nil {
				e.log.Debug("closing", "err", err)
			}
		case errors.Is(err, expired.Err()):
			return nil
		case errors.As(err, new(*ChangedError)):
			e.log.Debug("closing", "err", err)
		default:
			if failed++; failed == 2*tries || final(err) {
				return err
			}
			time.Sleep(time.Millisecond)
		}
	}
	return nil
}

// endSlots makes slots that vCPUs are still in harmless, if nothing else keeps Close
// from leaving the guest: those vCPUs may come back later. It returns what was left in
// the guest, now or before.
func (e *Engine) endSlots() error {
	if len(e.active)+len(e.back) == 0 || e.owing.Load() || len(e.sites) > 0 {
		return e.endLeft
	}
	if err := e.retry(e.drv.Freeze); err != nil {
		return err
	}
	var errs error
	for _, sl := range e.slotEnd {
		if sl.busy.Load() > 0 || e.expected(sl) {
			errs = errors.Join(errs, e.endWithJump(sl))
		}
	}
	return errors.Join(e.endLeft, errs, e.thaw())
}

// standStill freezes the guest, answers what has stopped, and returns with the
// guest frozen if nothing of ours is left in it. Otherwise it fails, and the guest
// isn't frozen.
func (e *Engine) standStill() error {
	if err := e.retry(e.drv.Freeze); err != nil {
		return fmt.Errorf("pause the guest: %w", err)
	}
	errs := e.pollAll()
	for try := 0; try < tries && e.owing.Load() && !errors.Is(errs, ErrGone); try++ {
		if _, err := e.settle(unserved); errors.Is(err, ErrGone) {
			errs = err
		}
	}
	if errors.Is(errs, ErrGone) {
		return errs
	}
	if errs == nil {
		if errs = e.inside(); errs == nil {
			e.settleAdopted()
		}
	}
	errs = errors.Join(errs, e.cleanDirty())
	for _, s := range e.sites {
		errs = errors.Join(errs, fmt.Errorf("the breakpoint at %#x could not be removed", s.addr))
	}
	for i := range e.owed {
		errs = errors.Join(errs, fmt.Errorf("vCPU %d at %#x could not be answered", e.owed[i].stop.VCPU, e.owed[i].stop.Regs.IP))
	}
	for _, sl := range e.slotEnd {
		errs = errors.Join(errs, fmt.Errorf("the copy of an instruction at %#x could not be removed", sl.addr))
	}
	if errs == nil {
		return nil
	}
	return errors.Join(errs, e.thaw())
}
