package xenctrl

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestDomains(t *testing.T) {
	f := newFakeLib()
	h := newHandle(f)
	list, err := h.Domains()
	if err != nil || len(list) != 2 || list[0].ID != 0 || list[1].ID != 5 {
		t.Errorf("Domains: %+v, %v", list, err)
	}
	if d, err := h.Domain(5); err != nil || d.ID != 5 || d.Flags&DomainHVM == 0 {
		t.Errorf("Domain(5): %+v, %v", d, err)
	}
	for _, id := range []DomID{3, 6, 0x7000, DomIDFirstReserved, 0xFFFF} {
		if _, err := h.Domain(id); !errors.Is(err, ErrNoDomain) || !errors.Is(err, syscall.ESRCH) {
			t.Errorf("Domain(%#x): %v, want ErrNoDomain", id, err)
		}
	}
	if v, err := h.Version(); err != nil || v.String() != "4.17.7" {
		t.Errorf("Version: %v, %v", v, err)
	}
	if p := h.LibraryPath(); p != f.path() {
		t.Errorf("LibraryPath: %q", p)
	}
	if n, err := h.GuestWidth(5); n != 64 || err != nil {
		t.Errorf("GuestWidth: %d, %v", n, err)
	}
}

func TestErrors(t *testing.T) {
	for _, c := range []struct {
		errno error
		is    []error
	}{
		{syscall.ESRCH, []error{ErrNoDomain}},
		{syscall.ENOSYS, []error{ErrNotSupported}},
		{syscall.EOPNOTSUPP, []error{ErrNotSupported}},
		{syscall.EBUSY, []error{ErrBusy}},
		{syscall.EPERM, []error{ErrPermission, fs.ErrPermission}},
		{syscall.EACCES, []error{ErrPermission, fs.ErrPermission}},
		{syscall.EFAULT, nil},
	} {
		f := newFakeLib()
		f.fail["debugControl on"] = c.errno
		err := newHandle(f).DebugControl(5, 1, true)
		var e *Error
		if !errors.As(err, &e) || e.Op != "debug control" || e.Domain != 5 || e.VCPU != 1 || e.Err != c.errno {
			t.Errorf("%v: got %#v", c.errno, err)
		}
		if !errors.Is(err, c.errno) {
			t.Errorf("%v is not the errno it has", err)
		}
		for _, s := range []error{ErrNoDomain, ErrNotSupported, ErrBusy, ErrPermission, fs.ErrPermission, ErrClosed, ErrNotBuilt} {
			if got, want := errors.Is(err, s), slices.Contains(c.is, s); got != want {
				t.Errorf("errors.Is(%v, %v) = %v", err, s, got)
			}
		}
	}
	if got, want := (&Error{Op: "pause", Domain: 5, VCPU: -1, Err: syscall.ESRCH}).Error(), "xenctrl: pause of domain 5: no such process"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if !errors.Is(ErrPermission, fs.ErrPermission) || !errors.Is(ErrClosed, os.ErrClosed) {
		t.Error("sentinels do not match those of the standard library")
	}
}

func TestVCPUNumbers(t *testing.T) {
	f := newFakeLib()
	h := newHandle(f)
	for _, vcpu := range []int{-2, -1, MaxVCPUs, 1 << 40} {
		if err := h.VCPUContext(5, vcpu, new(VCPUContext)); !errors.Is(err, syscall.EINVAL) {
			t.Errorf("VCPUContext of vcpu %d: %v, want EINVAL", vcpu, err)
		}
	}
	if len(f.calls) != 0 {
		t.Errorf("calls: %v", f.calls)
	}
}

func TestPreserving(t *testing.T) {
	ext := func(accum uint64) []byte {
		b := make([]byte, 16+576)
		binary.LittleEndian.PutUint64(b[8:], accum)
		b[100] = 0x5A
		return b
	}
	get, set, setExt := "vcpuExtState", "setVCPUContext", "setVCPUExtState"
	for _, c := range []struct {
		name string
		ext  []byte
		fail map[string]error
		want []string
		err  error
	}{
		{"avx", ext(7), nil, []string{get, set, setExt}, nil},
		{"sse only", ext(3), nil, []string{get, set}, nil},
		{"nothing", nil, nil, []string{get, set}, nil},
		{"no xsave", nil, map[string]error{get: syscall.EOPNOTSUPP}, []string{get, set}, nil},
		{"get fails", ext(7), map[string]error{get: syscall.EIO}, []string{get}, syscall.EIO},
		{"set fails", ext(7), map[string]error{set: syscall.EINVAL}, []string{get, set}, syscall.EINVAL},
		{"restore fails", ext(7), map[string]error{setExt: syscall.ENOMEM}, []string{get, set, setExt}, syscall.ENOMEM},
	} {
		f := newFakeLib()
		f.ext = c.ext
		maps.Copy(f.fail, c.fail)
		err := newHandle(f).SetVCPUContextPreserving(5, 0, new(VCPUContext))
		if !errors.Is(err, c.err) {
			t.Errorf("%s: %v, want %v", c.name, err, c.err)
		}
		if !slices.Equal(f.calls, c.want) {
			t.Errorf("%s: calls %v, want %v", c.name, f.calls, c.want)
		}
		if !bytes.Equal(f.ext, c.ext) {
			t.Errorf("%s: state changed", c.name)
		}
	}
	h := newHandle(newFakeLib())
	for _, n := range []int{0, 15, extStateMax + 1} {
		if err := h.SetVCPUExtState(5, 0, ExtState{Data: make([]byte, n)}); !errors.Is(err, syscall.EINVAL) {
			t.Errorf("SetVCPUExtState of %d bytes: %v, want EINVAL", n, err)
		}
	}
}

func TestGdbsx(t *testing.T) {
	f := newFakeLib()
	h := newHandle(f)
	status := func(paused byte, vcpu, ev uint32) {
		f.status = domctlArgs{}
		f.status[0] = paused
		binary.LittleEndian.PutUint32(f.status[4:], vcpu)
		binary.LittleEndian.PutUint32(f.status[8:], ev)
	}
	for _, c := range []struct {
		paused   byte
		vcpu, ev uint32
		want     DomStatus
		err      error
	}{
		{0, ^uint32(0), 0, DomStatus{VCPU: -1}, nil},
		{0, 0, 0, DomStatus{VCPU: -1}, nil},
		{1, ^uint32(0), 0, DomStatus{Paused: true, VCPU: -1}, nil},
		{1, 2, 3, DomStatus{Paused: true, VCPU: 2, Event: DomStatusBreakpoint}, nil},
		{1, MaxVCPUs, 3, DomStatus{Paused: true, VCPU: -1}, syscall.ERANGE},
	} {
		status(c.paused, c.vcpu, c.ev)
		got, err := h.GdbsxDomStatus(5)
		if got != c.want || !errors.Is(err, c.err) {
			t.Errorf("%+v: got %+v, %v", c, got, err)
		}
	}
	f.domctls = nil
	if err := h.GdbsxPauseVCPU(5, 3); err != nil || binary.LittleEndian.Uint32(f.status[0:]) != 3 {
		t.Errorf("GdbsxPauseVCPU: %v, % x", err, f.status[:8])
	}
	if err := h.GdbsxUnpauseVCPU(5, 3); err != nil {
		t.Error(err)
	}
	if !slices.Equal(f.domctls, []uint32{1001, 1002}) {
		t.Errorf("domctls %v", f.domctls)
	}

	f.guest = map[uint64]byte{}
	for a := uint64(0x1F00); a < 0x4000; a++ {
		f.guest[a] = byte(a) ^ byte(a>>8)
	}
	f.calls = nil
	buf := make([]byte, 0x2000)
	n, err := h.GdbsxGuestMemory(5, 0, 0x1F00, buf, false)
	if n != len(buf) || err != nil || buf[0x200] != 0x21 {
		t.Errorf("read: %d, %v", n, err)
	}
	if len(f.calls) != 3 {
		t.Errorf("%d calls, want 3: one for each page", len(f.calls))
	}
	n, err = h.GdbsxGuestMemory(5, 0, 0x3F00, buf, false)
	if n != 0x100 || !errors.Is(err, syscall.EFAULT) {
		t.Errorf("read past the end: %d, %v, want 256 bytes and EFAULT", n, err)
	}
	n, err = h.GdbsxGuestMemory(5, 0, 0x2000, []byte{0xCC}, true)
	if n != 1 || err != nil || f.guest[0x2000] != 0xCC {
		t.Errorf("write: %d, %v", n, err)
	}
}

func TestMapForeign(t *testing.T) {
	f := newFakeLib()
	h := newHandle(f)
	m, err := h.MapForeign(5, true, 1, 2)
	if err != nil || len(m.Bytes()) != 2*PageSize {
		t.Fatal(m, err)
	}
	// The libraries outlive the handle for a mapping.
	if err := h.Close(); err != nil || f.closes != 0 {
		t.Errorf("Close: %v, libraries closed %d times", err, f.closes)
	}
	if err := h.Pause(5); !errors.Is(err, ErrClosed) || !errors.Is(err, os.ErrClosed) {
		t.Errorf("Pause: %v, want ErrClosed", err)
	}
	for range 2 {
		if err := m.Unmap(); err != nil || m.Bytes() != nil {
			t.Error(err)
		}
	}
	if err := h.Close(); err != nil || f.closes != 1 {
		t.Errorf("Close: %v, libraries closed %d times", err, f.closes)
	}
	if _, err := h.MapForeign(5, true, 1); !errors.Is(err, ErrClosed) || f.closes != 1 {
		t.Errorf("MapForeign: %v, libraries closed %d times", err, f.closes)
	}

	h = newHandle(newFakeLib())
	for _, n := range []int{0, mapForeignMax + 1} {
		if _, err := h.MapForeign(5, true, make([]uint64, n)...); !errors.Is(err, syscall.EINVAL) {
			t.Errorf("MapForeign of %d frames: %v, want EINVAL", n, err)
		}
	}
	f = newFakeLib()
	f.mapErrs = []int32{0, int32(syscall.EINVAL), int32(syscall.ENOENT)}
	_, err = newHandle(f).MapForeign(5, true, 10, 11, 12)
	var me *MapError
	if !errors.As(err, &me) || !slices.Equal(me.Frames, []uint64{11, 12}) || !errors.Is(err, syscall.ENOENT) {
		t.Errorf("MapForeign: %v", err)
	}
	if want := "frame 0xb: invalid argument (and 1 more)"; !strings.Contains(err.Error(), want) {
		t.Errorf("got %q, want %q in it", err, want)
	}
}

func TestWriteForeign(t *testing.T) {
	f := newFakeLib()
	h := newHandle(f)
	for _, c := range []struct {
		frame  uint64
		off, n int
		want   error
	}{
		{5, -1, 1, syscall.EINVAL}, {5, PageSize, 1, syscall.EINVAL}, {5, PageSize - 1, 2, syscall.EINVAL},
		{5, 0, PageSize + 1, syscall.EINVAL}, {frameMax + 1, 0, 1, syscall.ERANGE}, {5, PageSize, 0, nil},
	} {
		if err := h.WriteForeign(5, c.frame, c.off, make([]byte, c.n)); !errors.Is(err, c.want) {
			t.Errorf("%+v: %v", c, err)
		}
	}
	if len(f.calls) != 0 {
		t.Errorf("calls of the library: %q", f.calls)
	}
	if err := h.WriteForeign(5, 0x77, PageSize-2, []byte{0xcc, 1}); err != nil {
		t.Error(err)
	}
	if want := []string{"writeForeign 0x77+4094 cc 01"}; !slices.Equal(f.calls, want) {
		t.Errorf("calls %q, want %q", f.calls, want)
	}
	if err := h.Close(); err != nil {
		t.Error(err)
	}
	if err := h.WriteForeign(5, 0x77, 0, []byte{1}); !errors.Is(err, ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}

func TestHVMCPU(t *testing.T) {
	f := newFakeLib()
	f.rec = hvmHWCPU{RAX: 1, RIP: 2, CR3: 3, CSSel: 4, SSSel: 5, FSBase: 6, GSBase: 7, IDTRBase: 8, ShadowGS: 9, MSRLSTAR: 10, MSREFER: 11}
	got, err := newHandle(f).HVMCPU(5, 0)
	want := HVMCPU{RAX: 1, RIP: 2, CR3: 3, CS: 4, SS: 5, FSBase: 6, GSBase: 7, IDTBase: 8, ShadowGS: 9, LSTAR: 10, EFER: 11}
	if err != nil || got != want {
		t.Errorf("got %+v, %v", got, err)
	}
}

func TestInjectEvent(t *testing.T) {
	f := newFakeLib()
	h := newHandle(f)
	if err := h.InjectEvent(5, 0, VectorBreakpoint, EventTypeSoftwareException, ^uint32(0), 1, 0); err != nil {
		t.Error(err)
	}
	if err := h.InjectEvent(5, 0, VectorBreakpoint, EventTypeSoftwareException, ^uint32(0), 16, 0); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("instruction of 16 bytes: %v, want EINVAL", err)
	}
}

func TestMonitor(t *testing.T) {
	f := newFakeLib()
	h := newHandle(f)
	m, err := h.OpenMonitor(5)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(m.SetSoftwareBreakpoint(true), m.SetDebugExceptions(true, true), m.SetDebugExceptions(false, true)); err != nil {
		t.Fatal(err)
	}

	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	if err := m.Wait(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Wait without a request: %v", err)
	}
	// Notifications without a request do not end it either.
	ctx, cancel = context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	f.events.raise(m.port)
	if err := m.Wait(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Wait without a request: %v", err)
	}

	want := sample(ReasonSoftwareBreakpoint, EventVCPUPaused)
	go func() {
		time.Sleep(10 * time.Millisecond)
		f.front.request(fillRequest(&want))
		f.events.raise(m.port)
	}()
	if err := m.Wait(context.Background()); err != nil {
		t.Fatal(err)
	}
	var e Event
	if ok, err := m.Next(&e); !ok || err != nil || e != want {
		t.Fatalf("Next: %v, %v, %+v", ok, err, e)
	}
	if ok, err := m.Next(&e); ok || err != nil {
		t.Fatalf("second Next: %v, %v", ok, err)
	}
	e.Flags |= EventSetRegisters
	if err := errors.Join(m.Respond(&e), m.Notify()); err != nil {
		t.Fatal(err)
	}
	if _, ok := f.front.response(); !ok || f.events.notified != 1 {
		t.Errorf("response: %v, notified %d times", ok, f.events.notified)
	}

	// Close lets a vCPU go on whose request was not taken, and wakes Wait.
	woken := make(chan error)
	go func() { woken <- m.Wait(context.Background()) }()
	time.Sleep(20 * time.Millisecond)
	f.front.request(fillRequest(&want))
	responses := 0
	f.events.onNotify = func() {
		for {
			s, ok := f.front.response()
			if !ok {
				return
			}
			responses++
			if flags := EventFlags(le32(s, evFlagsOff)); flags != EventVCPUPaused {
				t.Errorf("flags %#x", flags)
			}
		}
	}
	f.calls = nil
	for range 2 {
		if err := m.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if err := <-woken; !errors.Is(err, ErrClosed) {
		t.Errorf("Wait: %v, want ErrClosed", err)
	}
	if responses != 1 || f.events.closed != 1 || len(f.events.bound) != 0 {
		t.Errorf("%d responses, closed %d times, bound %v", responses, f.events.closed, f.events.bound)
	}
	if got, want := f.calls, []string{"swbp off", "monitorDisable", "monitorUnmap"}; !slices.Equal(got, want) {
		t.Errorf("calls %v, want %v", got, want)
	}
	if _, err := m.Next(&e); !errors.Is(err, ErrClosed) {
		t.Errorf("Next: %v", err)
	}
	for _, err := range []error{m.Respond(&e), m.Notify(), m.Wait(context.Background()), m.SetSingleStep(true)} {
		if !errors.Is(err, ErrClosed) {
			t.Errorf("%v, want ErrClosed", err)
		}
	}
	if err := h.Close(); err != nil || f.closes != 1 {
		t.Error(err, f.closes)
	}
}

func TestMonitorFailures(t *testing.T) {
	for _, c := range []struct {
		call  string
		errno syscall.Errno
		is    error
		calls []string // after the failure
	}{
		{"eventVersion", syscall.ENOSYS, ErrNotSupported, nil},
		{"openEvents", syscall.EMFILE, syscall.EMFILE, nil},
		{"monitorEnable", syscall.EBUSY, ErrBusy, nil},
		{"monitorEnable", syscall.EOPNOTSUPP, ErrNotSupported, nil},
	} {
		f := newFakeLib()
		f.fail[c.call] = c.errno
		h := newHandle(f)
		if _, err := h.OpenMonitor(5); !errors.Is(err, c.is) {
			t.Errorf("%s: %v, want %v", c.call, err, c.is)
		}
		if f.calls[len(f.calls)-1] != c.call {
			t.Errorf("%s: calls %v", c.call, f.calls)
		}
		if f.events != nil && f.events.closed != 1 {
			t.Errorf("%s: event channels closed %d times", c.call, f.events.closed)
		}
		_ = h.Close()
		if f.closes != 1 {
			t.Errorf("%s: libraries closed %d times", c.call, f.closes)
		}
	}

	f := newFakeLib()
	f.evVersion = 6
	if _, err := newHandle(f).OpenMonitor(5); !errors.Is(err, ErrNotSupported) {
		t.Errorf("events of version 6: %v", err)
	}

	if _, err := newHandle(newFakeLib()).OpenMonitor(0); !errors.Is(err, ErrNotSupported) {
		t.Errorf("PV domain: %v", err)
	}
	if _, err := newHandle(newFakeLib()).OpenMonitor(3); !errors.Is(err, ErrNoDomain) {
		t.Errorf("no domain: %v", err)
	}

	f = newFakeLib()
	h := newHandle(failBind{f})
	if _, err := h.OpenMonitor(5); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("bind: %v", err)
	}
	if n := len(f.calls); n < 2 || !slices.Equal(f.calls[n-2:], []string{"monitorDisable", "monitorUnmap"}) {
		t.Errorf("bind: calls %v", f.calls)
	}
}

type failBind struct{ *fakeLib }

func (f failBind) openEvents() (eventLib, error) {
	l, err := f.fakeLib.openEvents()
	f.events.bindErr = syscall.EINVAL
	return l, err
}

// watching is a monitor that delivers breakpoints.
func watching(t *testing.T) (*fakeLib, *Monitor) {
	t.Helper()
	f := newFakeLib()
	m, err := newHandle(f).OpenMonitor(5)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.SetSoftwareBreakpoint(true); err != nil {
		t.Fatal(err)
	}
	return f, m
}

// TestMonitorGone closes a monitor whose domain was destroyed.
func TestMonitorGone(t *testing.T) {
	f, m := watching(t)
	f.fail["swbp off"], f.fail["monitorDisable"] = syscall.ESRCH, syscall.ESRCH
	if err := m.Close(); err != nil {
		t.Error(err)
	}
}

func TestEventChannels(t *testing.T) {
	l := newFakeEvents()
	c, err := newEventChannels(l)
	if err != nil {
		t.Fatal(err)
	}
	p1, err1 := c.BindVIRQ(VIRQDebugger)
	p2, err2 := c.BindInterdomain(5, 1)
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	if _, ok, err := c.Pending(); ok || err != nil {
		t.Errorf("Pending: %v, %v", ok, err)
	}
	// Two events, one wakeup of the descriptor each, taken one by one.
	l.raise(p1)
	l.raise(p2)
	for _, want := range []uint32{p1, p2} {
		if err := c.Wait(context.Background()); err != nil {
			t.Fatal(err)
		}
		if got, ok, err := c.Pending(); got != want || !ok || err != nil {
			t.Errorf("Pending: %d, %v, %v, want %d", got, ok, err, want)
		}
	}
	canceled, cancel := context.WithCancel(context.Background())
	go func() {
		time.Sleep(10 * time.Millisecond)
		cancel()
	}()
	if err := c.Wait(canceled); !errors.Is(err, context.Canceled) {
		t.Errorf("Wait: %v, want Canceled", err)
	}
	if err := c.Wait(canceled); !errors.Is(err, context.Canceled) {
		t.Errorf("Wait: %v, want Canceled", err)
	}
	// A wait that was interrupted does not spoil the next.
	go func() {
		time.Sleep(10 * time.Millisecond)
		_ = c.Unmask(p1)
		l.raise(p1)
	}()
	if err := c.Wait(context.Background()); err != nil {
		t.Errorf("Wait: %v", err)
	}
	if err := errors.Join(c.Notify(p2), c.Unbind(p2)); err != nil {
		t.Error(err)
	}
	if err := c.Unbind(p2); !errors.Is(err, syscall.ENOTCONN) {
		t.Errorf("second Unbind: %v", err)
	}
	_, _, _ = c.Pending()
	woken := make(chan error)
	go func() { woken <- c.Wait(context.Background()) }()
	time.Sleep(10 * time.Millisecond)
	for range 2 {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
	if err := <-woken; !errors.Is(err, ErrClosed) {
		t.Errorf("Wait: %v, want ErrClosed", err)
	}
	if _, err := c.BindVIRQ(1); !errors.Is(err, ErrClosed) || l.closed != 1 {
		t.Errorf("BindVIRQ: %v, closed %d times", err, l.closed)
	}
}

func TestStore(t *testing.T) {
	l := newFakeStore(map[string]string{
		"/local/domain/0/name":  "Domain-0",
		"/local/domain/5/name":  "guest",
		"/local/domain/6/name":  "twin",
		"/local/domain/7/name":  "twin",
		"/local/domain/8/vm":    "no name yet",
		"/local/domain/x/name":  "not a number",
		"/local/domain/99999/a": "not an id",
	})
	s, err := newStore(l)
	if err != nil {
		t.Fatal(err)
	}
	if v, err := s.Read("/local/domain/5/name"); v != "guest" || err != nil {
		t.Errorf("Read: %q, %v", v, err)
	}
	if _, err := s.Read("/none"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Read: %v, want ErrNotExist", err)
	}
	for _, path := range []string{"", "a\x00b", strings.Repeat("a", 4000)} {
		if _, err := s.Read(path); !errors.Is(err, syscall.EINVAL) {
			t.Errorf("Read(%.10q): %v, want EINVAL", path, err)
		}
	}
	if name, err := s.DomainName(5); name != "guest" || err != nil {
		t.Errorf("DomainName: %q, %v", name, err)
	}
	if _, err := s.DomainName(9); !errors.Is(err, ErrNoDomain) {
		t.Errorf("DomainName: %v, want ErrNoDomain", err)
	}
	if id, err := s.DomainByName("guest"); id != 5 || err != nil {
		t.Errorf("DomainByName: %d, %v", id, err)
	}
	if _, err := s.DomainByName("none"); !errors.Is(err, ErrNoDomain) {
		t.Errorf("DomainByName: %v, want ErrNoDomain", err)
	}
	if _, err := s.DomainByName("twin"); !errors.Is(err, ErrAmbiguousName) {
		t.Errorf("DomainByName: %v, want ErrAmbiguousName", err)
	}

	if err := s.Watch("/a", "token"); err != nil {
		t.Fatal(err)
	}
	for range 2 { // the event of the watch itself, then a change
		if path, token, err := s.WaitWatch(context.Background()); path != "/a" || token != "token" || err != nil {
			t.Errorf("WaitWatch: %q, %q, %v", path, token, err)
		}
		go l.fire("/a")
	}
	time.Sleep(10 * time.Millisecond)
	_, _, _ = s.WaitWatch(context.Background())
	if err := s.Unwatch("/a", "token"); err != nil {
		t.Error(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
	defer cancel()
	if _, _, err := s.WaitWatch(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("WaitWatch: %v", err)
	}
	for range 2 {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
	if _, err := s.Read("/a"); !errors.Is(err, ErrClosed) || l.closed != 1 {
		t.Errorf("Read: %v, closed %d times", err, l.closed)
	}
}

func TestWatchDomainDeath(t *testing.T) {
	gone := map[string]func(f *fakeLib){
		"destroyed": func(f *fakeLib) { f.domains = f.domains[:1] },
		"crashed":   func(f *fakeLib) { f.domains[1].Flags |= DomainShutdown | 3<<16 },
		"dying":     func(f *fakeLib) { f.domains[1].Flags |= DomainDying },
		"replaced":  func(f *fakeLib) { f.domains[1].Handle[0]++ },
	}
	for name, change := range gone {
		f := newFakeLib()
		f.store = newFakeStore(nil)
		dead, err := newHandle(f).WatchDomainDeath(t.Context(), 5)
		if err != nil {
			t.Fatal(err)
		}
		f.store.fire("@releaseDomain") // of another domain
		select {
		case <-dead:
			t.Errorf("%s: reported before it was", name)
		case <-time.After(20 * time.Millisecond):
		}
		f.set(func() { change(f) })
		f.store.fire("@releaseDomain")
		select {
		case <-dead:
		case <-time.After(deathPoll / 2):
			t.Errorf("%s: not reported", name)
		}
	}

	f := newFakeLib()
	f.store = newFakeStore(nil)
	if _, err := newHandle(f).WatchDomainDeath(t.Context(), 9); !errors.Is(err, ErrNoDomain) || f.store.closed != 1 {
		t.Errorf("no domain: %v, store closed %d times", err, f.store.closed)
	}
	f = newFakeLib()
	f.store = newFakeStore(nil)
	ctx, cancel := context.WithCancel(context.Background())
	dead, err := newHandle(f).WatchDomainDeath(ctx, 5)
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	f.set(func() { f.domains = nil })
	select {
	case <-dead:
		t.Error("reported after ctx was done")
	case <-time.After(20 * time.Millisecond):
	}
}
