package breakpoint

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// A debt is a stop that couldn't be answered.
type debt struct {
	duty  duty
	stop  Stop
	f     *inflight // of the hit, if it is one
	at    uint64    // dutyComplete: where the instruction was executed
	since time.Time
}

// duty is what is to be done about a debt.
type duty uint8

const (
	dutyResume duty = iota
	dutyReinject
	dutyForeign // find out whose breakpoint it is
	dutyExecute // have the instruction of the hit executed
	dutyStepOn  // … by the driver
	// dutyComplete corrects what executing it has left. It has no time limit: a vCPU
	// that went on with the return address of a copy would bring the guest down.
	dutyComplete
	dutyGiveUp // take the breakpoint out, and let the vCPU go on
)

// executeFor bounds the attempts to execute an instruction whose memory can't be
// reached. After that its breakpoint is removed, so that the guest can go on.
const executeFor = 2 * time.Second

// owe keeps d for later, and returns an error that says why.
func (e *Engine) owe(d debt, why error) error {
	d.since = time.Now()
	if r := e.retried; r != nil {
		d.since = r.since
	}
	e.owed = append(e.owed, d)
	e.owing.Store(true)
	return fmt.Errorf("vCPU %d stays stopped, and its answer is tried again: %w", d.stop.VCPU, why)
}

// resume answers s. A vCPU is not left behind because a call failed.
func (e *Engine) resume(s *Stop) error {
	err := e.retry(func() error { return e.drv.Resume(s) })
	if own := e.mark(s.VCPU); err == nil && own != nil {
		own.Slot = 0
	}
	if err == nil || errors.Is(err, ErrGone) {
		return err
	}
	return e.owe(debt{duty: dutyResume, stop: *s}, err)
}

func (e *Engine) reinject(s *Stop) error {
	err := e.retry(func() error { return e.drv.Reinject(s) })
	if err == nil || errors.Is(err, ErrGone) {
		return err
	}
	return e.owe(debt{duty: dutyReinject, stop: *s}, err)
}

// stepOn has the driver execute the instruction of a hit.
func (e *Engine) stepOn(f *inflight, s *Stop) error {
	err := e.retry(func() error { return e.drv.StepOn(s, &f.site.insn) })
	switch {
	case err == nil:
		e.stats.InPlace++
		e.give(f)
		return nil
	case errors.Is(err, ErrGone):
		return err
	}
	return e.owe(debt{duty: dutyStepOn, stop: *s, f: f}, err)
}

// stepOver begins a step in place, of a hit that has departed.
func (e *Engine) stepOver(f *inflight, s *Stop) error {
	st := f.site
	err := e.retry(func() error { return e.drv.StepOver(s, st.addr) })
	if err == nil {
		return nil
	}
	e.arrive(f)
	err = fmt.Errorf("step over %#x: %w", st.addr, err)
	switch {
	case errors.Is(err, ErrGone):
		return err
	case transient(err):
		return e.owe(debt{duty: dutyExecute, stop: *s, f: f}, err)
	}
	return e.giveUp(f, s, err)
}

// pay does what is owed. If it fails there is a new debt.
func (e *Engine) pay(d *debt, m mode) (Verdict, error) {
	s := &d.stop
	e.now = present{}
	switch d.duty {
	case dutyResume:
		return Continue, e.resume(s)
	case dutyReinject:
		return Continue, e.reinject(s)
	case dutyForeign:
		return e.hit(s, m) // it may be ours by now
	case dutyExecute:
		if st := d.f.site; st.armed && time.Since(d.since) > executeFor {
			return Continue, e.giveUp(d.f, s, fmt.Errorf("%#x (%s): %w: its memory can't be reached", st.addr, st.insn.String(), ErrNoWayPast))
		}
		return e.execute(d.f, s, m)
	case dutyStepOn:
		if !d.f.site.armed {
			return e.execute(d.f, s, m)
		}
		return Continue, e.stepOn(d.f, s)
	case dutyComplete:
		return e.complete(d.f, s, d.at, m)
	}
	if !d.f.site.armed {
		return e.execute(d.f, s, m) // somebody else took it out
	}
	return Continue, e.giveUp(d.f, s, nil)
}

// settle tries once to pay every debt. It returns only what is new: a debt that
// remains was reported when it was made.
func (e *Engine) settle(m mode) (v Verdict, errs error) {
	owed, next := e.owed, 0
	e.owed = nil
	defer func() { // a handler may panic, and the rest is owed all the same
		e.retried = nil
		e.owed = append(e.owed, owed[next:]...)
		e.owing.Store(len(e.owed) > 0)
		if len(e.owed) == 0 {
			e.freeSlots()
		}
	}()
	for next < len(owed) {
		d := &owed[next]
		next++
		n := len(e.owed)
		e.retried = d
		w, err := e.pay(d, m)
		if v == Continue {
			v = w // of a handler that ran, whatever became of the answer
		}
		if v != Continue {
			m = min(m, ending)
		}
		switch {
		case errors.Is(err, ErrGone):
			e.owed, next = nil, len(owed)
			return Continue, err
		case len(e.owed) > n && e.owed[n].duty == d.duty:
			e.log.Debug("still owed", "vcpu", d.stop.VCPU, "err", err)
		default:
			errs = errors.Join(errs, err)
		}
	}
	return v, errs
}

// owedPause is how long stops are waited for between two attempts at what is owed.
const owedPause = 5 * time.Millisecond

// serveOwing is one iteration of serve while something is owed.
func (e *Engine) serveOwing(ctx context.Context, m mode) (Verdict, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if v, err := e.settle(m); v != Continue || err != nil || !e.owing.Load() {
		return v, err
	}
	moment, cancel := context.WithTimeout(ctx, owedPause)
	defer cancel()
	v, err := e.wait(moment, m)
	if err != nil && moment.Err() != nil && errors.Is(err, moment.Err()) {
		err = nil
	}
	return v, err
}
