package xenctrl

import (
	"context"
	"errors"
	"sync"
	"syscall"
)

// EventChannels is a set of event channel ports of this domain. Wait may be
// called from one goroutine at a time, the other methods from any.
type EventChannels struct {
	mu     sync.RWMutex // held for reading during each call
	l      eventLib
	p      *poller
	once   sync.Once
	closed bool
}

// OpenEventChannels makes an empty set.
func OpenEventChannels() (*EventChannels, error) {
	l, err := openEventLib()
	if err != nil {
		return nil, err
	}
	return newEventChannels(l)
}

// newEventChannels owns l, and closes it if it fails.
func newEventChannels(l eventLib) (*EventChannels, error) {
	l = direct(l)
	p, err := newPoller(l.fd(), true)
	if err != nil {
		_ = l.close()
		return nil, opErr("open event channels", domNone, -1, err)
	}
	return &EventChannels{l: l, p: p}, nil
}

func (c *EventChannels) do(op string, id DomID, f func(l eventLib) error) error {
	c.mu.RLock()
	defer c.mu.RUnlock()
	if c.closed {
		return opErr(op, id, -1, ErrClosed)
	}
	return opErr(op, id, -1, f(c.l))
}

// BindVIRQ adds a port for a virtual interrupt, such as VIRQDebugger. A global one
// has a single listener: the error is EEXIST if there is one already.
func (c *EventChannels) BindVIRQ(virq uint32) (port uint32, err error) {
	err = c.do("bind virq", domNone, func(l eventLib) (err error) {
		port, err = l.bindVIRQ(virq)
		return err
	})
	return port, err
}

// BindInterdomain adds a port that is connected to a port of another domain.
func (c *EventChannels) BindInterdomain(id DomID, remote uint32) (port uint32, err error) {
	err = c.do("bind event channel", id, func(l eventLib) (err error) {
		port, err = l.bindInterdomain(id, remote)
		return err
	})
	return port, err
}

// Unbind removes a port.
func (c *EventChannels) Unbind(port uint32) error {
	return c.do("unbind event channel", domNone, func(l eventLib) error { return l.unbind(port) })
}

// Notify sends an event to the other end of a port.
func (c *EventChannels) Notify(port uint32) error {
	return c.do("notify event channel", domNone, func(l eventLib) error { return l.notify(port) })
}

// Unmask lets a port that Pending returned receive events again.
func (c *EventChannels) Unmask(port uint32) error {
	return c.do("unmask event channel", domNone, func(l eventLib) error { return l.unmask(port) })
}

// Pending takes a port that received an event, without waiting; ok is false if
// there is none. The port is masked until Unmask.
func (c *EventChannels) Pending() (port uint32, ok bool, err error) {
	err = c.do("get pending event channel", domNone, func(l eventLib) error {
		p, err := l.pending()
		switch {
		case err == nil:
			port, ok = p, true
			return nil
		case errors.Is(err, syscall.EAGAIN):
			return nil
		}
		return err
	})
	return port, ok, err
}

// Wait returns when Pending has a port to give, or with the error of ctx.
func (c *EventChannels) Wait(ctx context.Context) error {
	c.mu.RLock()
	defer c.mu.RUnlock()
	if c.closed {
		return opErr("wait for event channel", domNone, -1, ErrClosed)
	}
	return waitErr("wait for event channel", ctx, c.p.wait(ctx))
}

// Close removes all ports and makes Wait return. Calling it again does nothing.
func (c *EventChannels) Close() (err error) {
	c.once.Do(func() {
		c.p.interrupt() // wakes Wait, which holds the lock
		c.mu.Lock()
		defer c.mu.Unlock()
		c.closed = true
		c.p.close()
		err = opErr("close event channels", domNone, -1, c.l.close())
	})
	return err
}

// waitErr returns the error of ctx as it is, and others as *Error.
func waitErr(op string, ctx context.Context, err error) error {
	if err != nil && ctx.Err() != nil && errors.Is(err, ctx.Err()) {
		return err
	}
	return opErr(op, domNone, -1, err)
}
