package xenctrl

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"github.com/vmprobes/vmprobes/internal/spin"
)

// A Monitor receives the events of one HVM or PVH domain. Wait may be called
// from one goroutine, Next, Respond and Notify from one goroutine (which may be
// another), and the rest from any.
type Monitor struct {
	h     *Handle
	id    DomID
	ev    *EventChannels
	port  uint32
	page  unsafe.Pointer
	mu    sync.Mutex // ring, on, closed
	ring  ring
	on    [monitorEvents]bool
	close bool

	looking sync.Mutex // held during look

	// Of the goroutine in Wait.
	near   bool // the next request may come soon
	holder spin.Holder
}

// OpenMonitor attaches to the events of a domain, of which none is delivered
// before it is asked for. It fails with ErrBusy if a monitor is attached, and
// with ErrNotSupported for a PV domain.
func (h *Handle) OpenMonitor(id DomID) (*Monitor, error) {
	m := &Monitor{h: h, id: id}
	h.ref()
	err := h.do("open monitor", id, -1, func(l lib) error {
		// The library would say EINVAL, for want of a ring page.
		if d, ok, err := l.firstDomain(id); err != nil {
			return err
		} else if !ok || d.ID != id {
			return syscall.ESRCH
		} else if d.Flags&DomainHVM == 0 {
			return syscall.EOPNOTSUPP
		}
		// Xen 4.14 and older have another layout of events.
		if v, err := l.eventVersion(); err != nil {
			return err
		} else if v != vmEventVersion {
			return fmt.Errorf("%w: its events have version %d, not %d: use Xen 4.15 or later", ErrNotSupported, v, vmEventVersion)
		}
		el, err := l.openEvents()
		if err != nil {
			return err
		}
		m.ev, err = newEventChannels(el)
		if err != nil {
			return err
		}
		var remote uint32
		m.page, remote, err = l.monitorEnable(id)
		if err != nil {
			_ = m.ev.Close()
			return err
		}
		m.ring.init(m.page)
		m.port, err = el.bindInterdomain(id, remote)
		if err != nil {
			_ = m.ev.Close()
			_ = l.monitorDisable(id)
			_ = l.monitorUnmap(m.page)
			return err
		}
		return nil
	})
	if err != nil {
		h.unref()
		return nil, err
	}
	return m, nil
}

// ReleaseMonitor detaches a domain's monitor whose owner has died
// (XEN_DOMCTL_VM_EVENT_OP_MONITOR, XEN_VM_EVENT_DISABLE, xen/common/vm_event.c), which
// turns its events off, and then gives answers to vCPUs that wait for those of the dead
// owner: responses that nobody asked for, which Xen ignores for a vCPU that waits for none.
// The domain should be paused. No monitor is attached afterwards.
//
// It fails with ErrBusy while vCPUs wait for room on the dead owner's ring: Xen doesn't
// detach it then.
func (h *Handle) ReleaseMonitor(id DomID, answers []Event) error {
	err := h.do("detach a dead monitor", id, -1, func(l lib) error {
		err := l.monitorDisable(id)
		if errors.Is(err, syscall.EINVAL) {
			return nil // there is none
		}
		return err
	})
	if err != nil {
		return err
	}
	m, err := h.OpenMonitor(id)
	if err != nil {
		return err
	}
	for part := range slices.Chunk(answers, ringSlots) {
		for i := range part {
			if err := m.unasked(&part[i]); err != nil {
				return errors.Join(err, m.Close())
			}
		}
		if err := m.Notify(); err != nil {
			return errors.Join(err, m.Close())
		}
	}
	return m.Close()
}

// unasked puts a response on the ring for which there was no request.
func (m *Monitor) unasked(e *Event) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.ring.reqCons++ // as if there had been one
	return opErr("respond", m.id, e.VCPU, m.ring.put(e))
}

// Domain returns the id of the domain.
func (m *Monitor) Domain() DomID { return m.id }

// set turns one kind of events on or off.
func (m *Monitor) set(op string, what monitorEvent, on, sync bool) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.close {
		return opErr(op, m.id, -1, ErrClosed)
	}
	err := m.h.l.monitorSet(m.id, what, on, sync)
	if err == nil {
		m.on[what] = on
	}
	return opErr(op, m.id, -1, err)
}

// SetSoftwareBreakpoint turns events for int3 on or off.
func (m *Monitor) SetSoftwareBreakpoint(on bool) error {
	return m.set("monitor software breakpoint", monitorSoftwareBreakpoint, on, true)
}

// SetSingleStep turns events for steps by the monitor trap flag on or off
// (Intel only).
func (m *Monitor) SetSingleStep(on bool) error {
	return m.set("monitor single step", monitorSingleStep, on, true)
}

// SetDebugExceptions turns events for #DB on or off; sync makes the vCPU wait
// for the response.
func (m *Monitor) SetDebugExceptions(on, sync bool) error {
	return m.set("monitor debug exceptions", monitorDebugExceptions, on, sync)
}

// Wait returns when a request is on the ring, or with the error of ctx.
func (m *Monitor) Wait(ctx context.Context) error {
	if n, err := m.waiting(); n > 0 || err != nil {
		return err
	}
	if m.near {
		if ok, err := m.look(ctx); ok || err != nil {
			return err
		}
		m.near = false
	}
	for begin := spin.Clock(); ; {
		if err := m.ev.Wait(ctx); err != nil {
			return err
		}
		port, ok, err := m.ev.Pending()
		if err != nil {
			return err
		}
		if ok {
			// Unmask before looking at the ring: a request that comes in
			// between is then announced again.
			if err := m.ev.Unmask(port); err != nil {
				return err
			}
		}
		n, err := m.waiting()
		if n > 0 {
			m.near = spin.Clock()-begin < spinFor
		}
		if n > 0 || err != nil {
			return err
		}
	}
}

// waiting returns how many requests are on the ring.
func (m *Monitor) waiting() (n uint32, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.close {
		return 0, opErr("wait for events", m.id, -1, ErrClosed)
	}
	n, err = m.ring.waiting()
	return n, opErr("wait for events", m.id, -1, err)
}

// spinFor is how long Wait looks at the ring without rest, if the last request
// came within that time. To be woken by the event takes both kernels longer: the
// domain is put to sleep, takes an interrupt, and makes three calls more.
const spinFor = time.Millisecond

// look waits for a request without the event, which stays masked meanwhile. The
// guest's vCPU may be on this very processor, and gets it.
func (m *Monitor) look(ctx context.Context) (bool, error) {
	m.looking.Lock()
	defer m.looking.Unlock()
	m.holder.Begin(spin.Clock())
	defer m.holder.End()
	for begin := spin.Clock(); ; {
		// First of all: after Close there is no turn to give away.
		if n, err := m.waiting(); n > 0 || err != nil {
			return true, err
		}
		if err := ctx.Err(); err != nil {
			return false, err
		}
		if spin.Clock()-begin > spinFor || !m.h.turns() {
			return false, nil
		}
	}
}

// Next takes one request off the ring, without waiting; ok is false if there
// is none. A request with values that Xen never writes is dropped and makes
// ErrRing.
func (m *Monitor) Next(e *Event) (ok bool, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.close {
		return false, opErr("take event", m.id, -1, ErrClosed)
	}
	ok, err = m.ring.next(e)
	return ok, opErr("take event", m.id, -1, err)
}

// Respond puts a response on the ring: the request with other Flags (of which
// EventVCPUPaused has to be kept), Regs or InsnData. Xen acts on it after
// Notify. There has to be one for each request that had EventVCPUPaused.
func (m *Monitor) Respond(e *Event) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.close {
		return opErr("respond", m.id, e.VCPU, ErrClosed)
	}
	return opErr("respond", m.id, e.VCPU, m.ring.put(e))
}

// Notify makes Xen act on all responses that were put on the ring.
func (m *Monitor) Notify() error { return m.ev.Notify(m.port) }

// Close turns all events off, lets vCPUs run on whose requests were not taken,
// and detaches. Requests that were taken must have been answered, or their
// vCPUs stay paused; breakpoints must have been removed, or they reach the
// guest. Calling it again does nothing.
func (m *Monitor) Close() error {
	first, err := m.detach()
	if first {
		// Wait may be about to give away a turn, which ends with the Handle.
		m.looking.Lock()
		defer m.looking.Unlock()
		m.h.unref()
	}
	return err
}

// detach is Close but for what Wait may use.
func (m *Monitor) detach() (first bool, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.close {
		return false, nil
	}
	m.close = true
	l := m.h.l
	var errs []error
	keep := func(op string, err error) {
		// A domain that is gone has nothing left to turn off.
		if err != nil && !errors.Is(err, syscall.ESRCH) {
			errs = append(errs, opErr(op, m.id, -1, err))
		}
	}
	for what := range m.on {
		if m.on[what] {
			keep("disable monitor event", l.monitorSet(m.id, monitorEvent(what), false, true))
		}
	}
	if m.drain() {
		_ = m.ev.Notify(m.port)
	}
	_ = m.ev.Unbind(m.port)
	keep("disable monitor", l.monitorDisable(m.id))
	keep("unmap event ring", l.monitorUnmap(m.page))
	m.page, m.ring.page = nil, nil
	keep("close event channels", m.ev.Close())
	return true, errors.Join(errs...)
}

// drain answers requests that were not taken with "go on".
func (m *Monitor) drain() (any bool) {
	var e Event
	for range ringSlots {
		ok, err := m.ring.next(&e)
		if err != nil || !ok {
			return any
		}
		e.Flags &= EventVCPUPaused | EventAlternateP2M
		if m.ring.put(&e) != nil {
			return any
		}
		any = true
	}
	return any
}
