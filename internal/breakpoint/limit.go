package breakpoint

import (
	"errors"
	"fmt"
	"slices"
	"time"
)

// ErrSpent is what ends Serve when the last probe has been taken out by its limit, and
// ErrTooOften when that was PerSecond.
var (
	ErrSpent    = errors.New("the last probe has had all its hits")
	ErrTooOften = errors.New("the probe has had too many hits in a second, and is out")
)

// filter takes the owners out of f to which this execution isn't a hit, and those whose limits
// are reached.
func (e *Engine) filter(f *inflight, s *Stop) {
	for i := 0; i < len(f.owners); {
		switch o := f.owners[i]; {
		case o.Over() != NotOver:
		case o.Want != nil && o.wants(f.site) && !e.isHit(o, s): // which may panic
			o.filtered.Add(1)
		default:
			i++
			continue
		}
		f.owners = slices.Delete(f.owners, i, i+1)
		if i < f.shifted {
			f.shifted--
		}
	}
}

func (e *Engine) isHit(o owner, s *Stop) bool {
	ip := s.Regs.IP
	s.Regs.IP = o.Addr
	defer func() { s.Regs.IP = ip }()
	t := &e.noTask
	if o.WantTask {
		t = &e.now.task
	}
	return o.Want(&s.Regs, s.VCPU, t)
}

// tally counts a hit of p, whose last one it may be.
func (e *Engine) tally(p *Probe) {
	n := p.hits.Add(1)
	switch {
	case p.Limit > 0 && n-p.limitBase >= p.Limit:
		p.over.Store(uint32(OverLimit))
	case p.PerSecond > 0:
		if now := time.Now(); p.second.IsZero() || now.Sub(p.second) >= time.Second {
			p.second, p.inSecond = now, 0
		}
		if p.inSecond++; p.inSecond <= p.PerSecond {
			return
		}
		p.over.Store(uint32(OverPerSecond))
	default:
		return
	}
	e.spent = append(e.spent, p)
}

// dropSpent takes the probes out whose limits are reached. A return probe follows to their end
// what calls it has.
func (e *Engine) dropSpent() error {
	if e.closing || e.owing.Load() { // a Post handler may be to come
		return nil
	}
	var now []*Probe
	for _, p := range e.spent {
		if p.site != nil && p.Over() != NotOver && !e.isActive(p) {
			now = append(now, p)
		}
	}
	e.spent = slices.DeleteFunc(e.spent, func(p *Probe) bool {
		return p.site == nil || p.Over() == NotOver || slices.Contains(now, p)
	})
	if len(now) == 0 {
		return nil
	}
	if err := e.freeze(); err != nil {
		e.spent = append(e.spent, now...)
		return e.spentLater(err)
	}
	var errs error
	for _, p := range now {
		if p.site == nil || p.Over() == NotOver { // e.mu was released
			continue
		}
		err := e.drop(p, false)
		e.log.Debug("a probe has reached its limit", "addr", hex(p.Addr), "err", err)
		errs = errors.Join(errs, err)
		if p.site != nil { // it is tried again
			e.spent = append(e.spent, p)
			continue
		}
		e.spentErr = ErrSpent
		if p.Over() == OverPerSecond {
			e.spentErr = fmt.Errorf("%#x: %w: more than %d", p.Addr, ErrTooOften, p.PerSecond)
			e.log.Warn("a probe is out", "addr", hex(p.Addr), "why", e.spentErr)
		}
	}
	errs = errors.Join(errs, e.removeColdOf(now), e.thaw())
	if err := e.spentLater(errs); err != nil {
		return err
	}
	return e.allSpent()
}

// spentLater takes the error of taking probes out. What failed is tried again, and where the
// guest has other code now the probe is out all the same: neither ends Serve.
func (e *Engine) spentLater(err error) error {
	if err == nil || errors.Is(err, ErrGone) || errors.Is(err, ErrClosed) {
		return err
	}
	if msg := err.Error(); msg != e.spentTold {
		e.spentTold = msg
		e.log.Warn("probes that have reached their limits", "err", err)
	}
	return nil
}

// allSpent returns what ends Serve if the last probe has been taken out by its limit.
func (e *Engine) allSpent() error {
	for _, s := range e.sites {
		if len(s.owners) > 0 {
			return nil
		}
	}
	if err := e.noneLeft(); err != nil {
		return err
	}
	return e.spentErr
}

// isActive reports whether a handler of p is to come: Post, of a hit that is on its way, or those of
// a call that is followed.
func (e *Engine) isActive(p *Probe) bool {
	if p.Ret != nil {
		return p.Ret.active > 0 || slices.ContainsFunc(e.ended, func(x endedCall) bool { return x.a.Probe == p })
	}
	if p.Post == nil {
		return false
	}
	return slices.ContainsFunc(e.active, func(f *inflight) bool {
		return f.post && slices.ContainsFunc(f.owners, func(o owner) bool { return o.Probe == p })
	})
}
