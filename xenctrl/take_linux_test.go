package xenctrl

import (
	"errors"
	"slices"
	"syscall"
	"testing"
)

// TestTakeMonitor: a process that has mapped the ring goes on where another one has died.
func TestTakeMonitor(t *testing.T) {
	f := newFakeLib()
	h := newHandle(f)
	for _, c := range []struct {
		id   DomID
		fail syscall.Errno
		want error
	}{{0, 0, ErrNotSupported}, {3, 0, ErrNoDomain}, {5, syscall.EBUSY, ErrBusy}} {
		f.fail["monitorMap"] = nil
		if c.fail != 0 {
			f.fail["monitorMap"] = c.fail
		}
		if _, err := h.MapRing(c.id); !errors.Is(err, c.want) {
			t.Errorf("domain %d: %v, want %v", c.id, err, c.want)
		}
	}
	f.fail["monitorMap"] = nil
	r, err := h.MapRing(5)
	if err != nil {
		t.Fatal(err)
	}
	dead, err := h.OpenMonitor(5)
	if err != nil {
		t.Fatal(err)
	}
	front := f.front
	for v := range 3 {
		e := sample(ReasonSoftwareBreakpoint, EventVCPUPaused)
		e.VCPU = v
		front.request(fillRequest(&e))
	}
	var e Event
	for range 2 {
		if ok, err := dead.Next(&e); !ok || err != nil {
			t.Fatal(ok, err)
		}
	}
	if dead.Port() != 44 {
		t.Errorf("port %d", dead.Port())
	}
	// Its end of the event channel isn't closed yet, and then is.
	bad := &Ring{h: newHandle(failBind{f}), id: 5, page: r.page}
	bad.h.ref()
	if _, _, err := bad.TakeMonitor(44); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("bound still: %v", err)
	}
	first, st, err := r.TakeMonitor(44)
	if want := (RingState{Unanswered: 2, LastTaken: 1, LastAnswered: -1}); err != nil || st != want {
		t.Fatalf("%+v, %v, want %+v", st, err, want)
	}
	m, _, err := r.TakeMonitor(44) // it may begin anew
	if err != nil {
		t.Fatal(err)
	}
	if _, err := first.Next(&e); !errors.Is(err, ErrClosed) {
		t.Errorf("the Monitor of before: %v", err)
	}
	if ok, err := m.Next(&e); !ok || err != nil || e.VCPU != 2 {
		t.Fatalf("next: %v, %v, vCPU %d", ok, err, e.VCPU)
	}
	for v := range 3 {
		if err := m.Respond(&Event{Flags: EventVCPUPaused, Reason: ReasonSoftwareBreakpoint, VCPU: v}); err != nil {
			t.Fatal(err)
		}
	}
	if err := m.Respond(&e); !errors.Is(err, ErrRing) {
		t.Errorf("one answer too many: %v", err)
	}
	if err := m.Notify(); err != nil {
		t.Error(err)
	}
	// Xen doesn't let go of it as long as vCPUs wait for room: then it is as before.
	f.fail["monitorDisable"] = syscall.EBUSY
	f.calls = nil
	if err := m.Close(); !errors.Is(err, ErrBusy) {
		t.Errorf("Close: %v, want ErrBusy", err)
	}
	if want := []string{"swbp off", "debug off", "monitorDisable", "swbp on", "debug on"}; !slices.Equal(f.calls, want) {
		t.Errorf("calls %v, want %v", f.calls, want)
	}
	if _, err := m.Next(&e); err != nil {
		t.Errorf("after that: %v", err)
	}
	f.fail["monitorDisable"], f.fail["debug off"] = nil, syscall.EEXIST
	f.calls = nil
	if err := errors.Join(m.Close(), m.Close(), r.Close()); err != nil {
		t.Error(err)
	}
	if want := []string{"swbp off", "debug off", "monitorDisable", "unmapForeign"}; !slices.Equal(f.calls, want) {
		t.Errorf("calls %v, want %v", f.calls, want)
	}
	if _, _, err := r.TakeMonitor(44); !errors.Is(err, ErrClosed) {
		t.Errorf("of a ring that is closed: %v", err)
	}
	// The dead process' own use of the library ends, too, in this test.
	dead.mu.Lock()
	dead.close = true
	dead.mu.Unlock()
	h.unref()
	if err := h.Close(); err != nil || f.closes != 1 {
		t.Errorf("%v, closed %d times", err, f.closes)
	}
}

// TestReleaseBusy: a guest that can't be released keeps its breakpoints as events, though
// Xen has turned them off.
func TestReleaseBusy(t *testing.T) {
	f := newFakeLib()
	f.fail["monitorDisable"] = syscall.EBUSY
	if err := newHandle(f).ReleaseMonitor(5, nil); !errors.Is(err, ErrBusy) {
		t.Errorf("%v, want ErrBusy", err)
	}
	if want := []string{"monitorDisable", "swbp on"}; !slices.Equal(f.calls, want) {
		t.Errorf("calls %v, want %v", f.calls, want)
	}
}

// TestCloseMonitorAgain: a monitor that Xen couldn't disable is attached still, and Close
// doesn't say otherwise the second time.
func TestCloseMonitorAgain(t *testing.T) {
	f, m := watching(t)
	for _, errno := range []syscall.Errno{syscall.ENOMEM, syscall.EBUSY} {
		f.fail["monitorDisable"] = errno
		for range 2 {
			if err := m.Close(); !errors.Is(err, errno) {
				t.Fatalf("%v, want %v", err, errno)
			}
		}
	}
	delete(f.fail, "monitorDisable")
	for _, want := range []bool{true, false} {
		f.calls = nil
		if err := m.Close(); err != nil || slices.Contains(f.calls, "monitorDisable") != want {
			t.Fatalf("%v; calls %v", err, f.calls)
		}
	}
}
