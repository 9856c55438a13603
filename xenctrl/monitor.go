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
	port  uint32 // dom0's
	far   uint32 // the guest's
	page  unsafe.Pointer
	mu    sync.Mutex // ring, on, closed
	ring  ring
	on    [monitorEvents]bool
	close bool
	taken *Ring // that it was taken with, or nil

	looking sync.Mutex // held during look

	// Of the goroutine in Wait.
	near   bool // the next request may come soon
	holder spin.Holder
}

// hasRing fails if a domain can't have a monitor. Of a PV domain the library would say
// EINVAL, for want of a ring page.
func hasRing(l lib, id DomID) error {
	switch d, ok, err := l.firstDomain(id); {
	case err != nil:
		return err
	case !ok || d.ID != id:
		return syscall.ESRCH
	case d.Flags&DomainHVM == 0:
		return syscall.EOPNOTSUPP
	}
	return nil
}

// OpenMonitor attaches to the events of a domain, of which none is delivered
// before it is asked for. It fails with ErrBusy if a monitor is attached, and
// with ErrNotSupported for a PV domain.
func (h *Handle) OpenMonitor(id DomID) (*Monitor, error) {
	m := &Monitor{h: h, id: id}
	h.ref()
	err := h.do("open monitor", id, -1, func(l lib) error {
		if err := hasRing(l, id); err != nil {
			return err
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
		m.far = remote
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
// detach it then, and without the ring there is no way to make room ([Handle.MapRing]).
// Breakpoints are events still. vCPUs that have got room and haven't run since make
// trouble: Xen may use the ring that it has freed. So a domain with more vCPUs than the
// ring has places must have run before, for as long as they take to do that.
func (h *Handle) ReleaseMonitor(id DomID, answers []Event) error {
	err := h.do("detach a dead monitor", id, -1, func(l lib) error {
		err := l.monitorDisable(id)
		if errors.Is(err, syscall.EINVAL) {
			return nil // there is none
		}
		if errors.Is(err, syscall.EBUSY) {
			// Xen has turned the events off all the same (arch_monitor_cleanup_domain): the
			// guest would get its breakpoints itself.
			_ = l.monitorSet(id, monitorSoftwareBreakpoint, true, true)
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

// A Ring is the page of a monitor's ring, mapped by a process that isn't the one which
// attaches the monitor, before it does: when a monitor is attached the page is taken out of
// the guest's memory, and can't be mapped any more.
type Ring struct {
	h    *Handle
	id   DomID
	page unsafe.Pointer
	last *Monitor
}

// MapRing maps the page that will be the ring of the domain's next monitor. It fails with
// ErrBusy if one is attached, and with ErrNotSupported for a PV domain.
func (h *Handle) MapRing(id DomID) (*Ring, error) {
	r := &Ring{h: h, id: id}
	h.ref()
	err := h.do("map the monitor's ring", id, -1, func(l lib) (err error) {
		if err := hasRing(l, id); err != nil {
			return err
		}
		r.page, err = l.monitorMap(id)
		return err
	})
	if err != nil {
		h.unref()
		return nil, err
	}
	return r, nil
}

// Close unmaps the ring, and gives back the event channel of a Monitor that was taken and
// isn't closed. Nothing of the domain's is changed.
func (r *Ring) Close() error {
	if r.page == nil {
		return nil
	}
	err := r.drop()
	err = errors.Join(err, opErr("unmap event ring", r.id, -1, r.h.l.unmapForeign(unsafe.Slice((*byte)(r.page), PageSize))))
	r.page = nil
	r.h.unref()
	return err
}

// drop ends the use of the Monitor taken last.
func (r *Ring) drop() (err error) {
	if r.last == nil {
		return nil
	}
	m := r.last
	r.last = nil
	m.mu.Lock()
	done := m.close
	m.close = true
	m.mu.Unlock()
	if done {
		return nil
	}
	err = m.ev.Close()
	m.looking.Lock()
	defer m.looking.Unlock()
	m.h.unref()
	return err
}

// RingState is what a ring says of the process that had it before.
type RingState struct {
	Unanswered   int // requests that it had taken and not responded to
	LastTaken    int // vCPU of the request that it had taken last; -1: of none
	LastAnswered int // vCPU of the response that it had put last, or -1
}

// TakeMonitor goes on with a domain's monitor whose process has died: with all that it had
// turned on, the responses that Xen hadn't been told of, which the next Notify tells it of,
// and the requests that weren't taken. port is what its Port said. As long as the process
// is there its event channel can't be bound a second time, and the error is EINVAL; that of
// a ring that isn't the monitor's is ErrRing.
//
// TakeMonitor may be called again: the Monitor of before is closed then, as far as this
// process is concerned. When the Monitor is closed by Close the Ring is, too.
func (r *Ring) TakeMonitor(port uint32) (*Monitor, RingState, error) {
	var st RingState
	if r.page == nil {
		return nil, st, opErr("take over monitor", r.id, -1, ErrClosed)
	}
	if err := r.drop(); err != nil {
		return nil, st, err
	}
	m := &Monitor{h: r.h, id: r.id, page: r.page, far: port, taken: r}
	r.h.ref()
	err := r.h.do("take over monitor", r.id, -1, func(l lib) (err error) {
		if st, err = m.ring.resume(r.page); err != nil {
			return err
		}
		el, err := l.openEvents()
		if err != nil {
			return err
		}
		if m.ev, err = newEventChannels(el); err != nil {
			return err
		}
		if m.port, err = el.bindInterdomain(r.id, port); err != nil {
			return errors.Join(err, m.ev.Close())
		}
		return nil
	})
	if err != nil {
		r.h.unref()
		return nil, st, err
	}
	// What is on is not known. To turn off what is off already does no harm.
	m.on[monitorSoftwareBreakpoint], m.on[monitorDebugExceptions] = true, true
	r.last = m
	return m, st, nil
}

// Port returns the guest's port of the monitor's event channel, for TakeMonitor.
func (m *Monitor) Port() uint32 { return m.far }

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
//
// If the domain's monitor can't be disabled it is attached still, what was on is on, and Close
// may be called again. With ErrBusy vCPUs wait for room on the ring, as they may in a domain
// that is paused and has more vCPUs than the ring has places: then when that has run.
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

// roomFor is how often Close looks, a millisecond apart, whether the vCPUs that waited
// for room have put their requests on the ring.
const roomFor = 20

// detach is Close but for what Wait may use.
func (m *Monitor) detach() (first bool, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.close {
		return false, nil
	}
	l := m.h.l
	var errs []error
	keep := func(op string, err error) {
		// A domain that is gone has nothing left to turn off.
		if err != nil && !errors.Is(err, syscall.ESRCH) && (m.taken == nil || !errors.Is(err, syscall.EEXIST)) {
			errs = append(errs, opErr(op, m.id, -1, err))
		}
	}
	on := m.on
	for what := range m.on {
		if m.on[what] {
			keep("disable monitor event", l.monitorSet(m.id, monitorEvent(what), false, true))
		}
	}
	// A response makes room for a request that isn't on the ring yet.
	full := m.ring.full()
	for range roomFor {
		if m.drain() {
			_ = m.ev.Notify(m.port)
		}
		if !full {
			break
		}
		time.Sleep(time.Millisecond)
	}
	switch err := l.monitorDisable(m.id); {
	case err == nil, errors.Is(err, syscall.ESRCH):
	case errors.Is(err, syscall.EINVAL): // there is none any more
		keep("disable monitor", err)
	default:
		// With EBUSY Xen has turned all of them off.
		for what := range on {
			if on[what] {
				_ = l.monitorSet(m.id, monitorEvent(what), true, true)
			}
		}
		return false, opErr("disable monitor", m.id, -1, err)
	}
	m.close = true
	_ = m.ev.Unbind(m.port)
	if r := m.taken; r != nil {
		keep("unmap event ring", l.unmapForeign(unsafe.Slice((*byte)(m.page), PageSize)))
		r.page, r.last = nil, nil
		defer r.h.unref()
	} else {
		keep("unmap event ring", l.monitorUnmap(m.page))
	}
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
