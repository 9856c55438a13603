package breakpoint

import (
	"bytes"
	"errors"
	"fmt"
	"slices"

	"github.com/vmprobes/vmprobes/internal/x86"
)

// A guest may change its code at a breakpoint: its own ftrace or kprobes are switched on
// there, a module is unloaded. Whatever driver notices it, and however, the breakpoint
// is out then, and the rest goes on: its probes stay registered without being armed, and
// who unregisters them, or closes the Engine, gets ErrTextChanged. Only if no breakpoint
// is left Serve ends with that.

// changed takes the error of a Wait. It returns nil if only some breakpoints are lost.
func (e *Engine) changed(err error) error {
	var c *ChangedError
	if !errors.As(err, &c) {
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, addr := range c.Addrs {
		if s := e.sites[addr]; s != nil && s.armed {
			e.lose(s, c.Err)
		}
	}
	return e.noneLeft()
}

// lose takes the breakpoint of s out, where the guest has other code now.
func (e *Engine) lose(s *site, why error) {
	err := e.removeSite(s)
	if s.armed {
		e.log.Error("the guest has changed its code at a probe, and the breakpoint can't be removed", "addr", hex(s.addr), "err", err)
		return
	}
	e.keepLost(s, why)
	e.orphan(s, why)
}

// keepLost keeps the probes of s, whose breakpoint is out, until their owners are told: by
// Close, if that has taken them already.
func (e *Engine) keepLost(s *site, why error) {
	e.log.Warn("the guest has changed its code at a breakpoint, which is out now", "addr", hex(s.addr), "why", why)
	if len(s.owners) == 0 && !e.closing {
		return
	}
	s.lost = why
	for _, o := range s.owners {
		o.armed.Store(false)
	}
	e.lost = append(e.lost, s)
}

// tellLost ends the registration of the probes whose breakpoints the guest has overwritten,
// and returns that it has.
func (e *Engine) tellLost() (told error) {
	for _, s := range e.lost {
		for _, o := range s.owners {
			e.disown(o.Probe)
		}
		told = errors.Join(told, s.lost)
	}
	e.lost = nil
	return told
}

// noneLeft returns why the last breakpoint is out, or nil if there are others or there
// was none.
func (e *Engine) noneLeft() error {
	if len(e.lost) == 0 {
		return nil
	}
	for _, s := range e.sites {
		if s.armed && len(s.owners) > 0 {
			return nil
		}
	}
	return e.lost[len(e.lost)-1].lost
}

// Check looks whether the guest's code at the breakpoints is what it was. A breakpoint
// that the guest has overwritten is hit no more, so that with most drivers nothing else
// would tell. It returns ErrTextChanged if no breakpoint is left.
func (e *Engine) Check() (err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closing || len(e.differing()) == 0 {
		return nil
	}
	// The guest may be changing it at this moment, or we were: looked at once more, with
	// nothing running.
	if err := e.freeze(); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, e.thaw()) }()
	for s, now := range e.differing() {
		e.lose(s, fmt.Errorf("%#x: %w: there is %s now, not % x; the probe has been removed", s.addr, ErrTextChanged, now, s.insn.Bytes()))
	}
	return e.noneLeft()
}

// differing returns the breakpoints at which the guest has other code, with what is
// there. One that a vCPU is stepping over isn't looked at, as it is lifted until the step
// has been answered: after Post handlers, and after what is owed.
func (e *Engine) differing() map[*site]string {
	all := make(map[*site]string)
	if e.running != nil || e.owing.Load() {
		return all
	}
	for _, s := range e.sites {
		if !s.armed || slices.ContainsFunc(e.active, func(f *inflight) bool { return f.site == s && f.slot == nil }) {
			continue
		}
		var b [x86.MaxLen]byte
		orig := s.insn.Bytes()
		cur := b[:len(orig)]
		_, err := e.drv.Read(0, s.addr, cur)
		switch {
		case errors.Is(err, ErrNotMapped):
			all[s] = "nothing"
		case err != nil: // it isn't known
		case !bytes.Equal(cur[1:], orig[1:]), cur[0] != int3 && (cur[0] != orig[0] || !e.cheap):
			all[s] = fmt.Sprintf("% x", cur)
		}
	}
	return all
}
