//go:build linux && amd64 && cgo

package xenctrl

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestStubLibrary runs the C side against testdata/stub.c, built as all of
// Xen's libraries, in a process that finds them there.
func TestStubLibrary(t *testing.T) {
	if os.Getenv("XENCTRL_TEST_STUB") != "" {
		pretend(t, "control_d\n", "x")
		stubLibrary(t)
		return
	}
	cc, err := exec.LookPath("cc")
	if err != nil {
		t.Skip("no C compiler at run time: ", err)
	}
	dir := t.TempDir()
	first := filepath.Join(dir, "libxenctrl.so.4.13")
	if out, err := exec.Command(cc, "-std=gnu11", "-shared", "-fPIC", "-o", first, "testdata/stub.c").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	// One file under all names is one library to the loader.
	for _, name := range []string{"libxencall.so.1", "libxenforeignmemory.so.1", "libxendevicemodel.so.1", "libxenevtchn.so.1", "libxenstore.so.3.0"} {
		if err := os.Link(first, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	// Names that come first in the search, and are not libraries.
	for _, name := range []string{"libxenctrl.so.4.17", "libxenstore.so.4"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe, "-test.run=^TestStubLibrary$", "-test.v")
	cmd.Env = append(os.Environ(), "XENCTRL_TEST_STUB=1", "LD_LIBRARY_PATH="+dir)
	var out, msg strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &msg
	if err := cmd.Run(); err != nil {
		t.Errorf("%v: %s", err, out.String())
	}
	if msg.Len() != 0 {
		t.Errorf("printed %q", msg.String())
	}
}

func stubLibrary(t *testing.T) {
	l, err := openLibNamed([]string{"libxenctrl.so.4.17", "libxenctrl.so.4.13"})
	if err != nil {
		t.Fatal(err)
	}
	h := newHandle(l)
	if p := h.LibraryPath(); filepath.Base(p) != "libxenctrl.so.4.13" {
		t.Errorf("LibraryPath: %q", p)
	}
	if v, err := h.Version(); err != nil || v != (Version{4, 13, strings.Repeat("x", 15)}) {
		t.Errorf("Version: %+v, %v", v, err)
	}
	if c, err := h.Capabilities(); c != "xen-3.0-x86_64" || err != nil {
		t.Errorf("Capabilities: %q, %v", c, err)
	}
	list, err := h.Domains()
	want := DomainInfo{
		ID: 7, Flags: DomainHVM, TotalPages: 100, MaxPages: 200, SharedInfoFrame: 0x55, CPUTime: 1 << 40,
		OnlineVCPUs: 2, MaxVCPUID: 3, Handle: [16]byte{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
	}
	if err != nil || len(list) != 2 || list[1] != want {
		t.Errorf("Domains: %+v, %v", list, err)
	}
	if err := errors.Join(h.Pause(7), h.Unpause(7), h.SetDebugging(7, true), h.DebugControl(7, 1, true)); err != nil {
		t.Error(err)
	}
	if err := h.Pause(3); !errors.Is(err, ErrNoDomain) {
		t.Errorf("Pause: %v, want ErrNoDomain", err)
	}
	if err := h.DebugControl(7, 1, false); !errors.Is(err, ErrNotSupported) {
		t.Errorf("DebugControl: %v, want ErrNotSupported", err)
	}
	if n, err := h.GuestWidth(7); n != 64 || err != nil {
		t.Errorf("GuestWidth: %d, %v", n, err)
	}
	if _, err := h.GuestWidth(3); !errors.Is(err, ErrNoDomain) {
		t.Errorf("GuestWidth: %v, want ErrNoDomain", err)
	}
	if n, err := h.MaxGPFN(7); n != 1<<33 || err != nil {
		t.Errorf("MaxGPFN: %#x, %v", n, err)
	}
	if i, err := h.VCPUInfo(7, 1); err != nil || i != (VCPUInfo{Online: true, Running: true, CPUTime: 1 << 41}) {
		t.Errorf("VCPUInfo: %+v, %v", i, err)
	}

	var in, out VCPUContext
	in.FPU[511], in.User.RIP, in.Traps[3].Address, in.GSBaseUser = 1, 2, 3, 4
	// The stub destroys a byte of the extended state at each set.
	before, err := h.VCPUExtState(7, 1)
	if err != nil || before.Mask != 7 || len(before.Data) != 592 || !before.Live() {
		t.Errorf("VCPUExtState: %#x, %d bytes, %v", before.Mask, len(before.Data), err)
	}
	if err := h.SetVCPUContextPreserving(7, 1, &in); err != nil {
		t.Error(err)
	}
	if after, err := h.VCPUExtState(7, 1); err != nil || !bytes.Equal(after.Data, before.Data) {
		t.Errorf("extended state was not preserved: %v", err)
	}
	if err := h.VCPUContext(7, 1, &out); err != nil || in != out {
		t.Errorf("VCPUContext: %v", err)
	}
	if err := h.SetVCPUExtState(7, 1, ExtState{Mask: 7, Data: make([]byte, 100)}); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("SetVCPUExtState: %v, want EINVAL", err)
	}

	if err := errors.Join(h.GdbsxPauseVCPU(7, 1), h.GdbsxUnpauseVCPU(7, 1)); err != nil {
		t.Error(err)
	}
	if s, err := h.GdbsxDomStatus(7); err != nil || s != (DomStatus{Paused: true, VCPU: 1, Event: 3}) {
		t.Errorf("GdbsxDomStatus: %+v, %v", s, err)
	}
	text := bytes.Repeat([]byte("kernel text "), 400)
	got := make([]byte, len(text))
	if n, err := h.GdbsxGuestMemory(7, 9, 0x1100, text, true); n != len(text) || err != nil {
		t.Errorf("write: %d, %v", n, err)
	}
	if n, err := h.GdbsxGuestMemory(7, 9, 0x1100, got, false); n != len(text) || err != nil || !bytes.Equal(got, text) {
		t.Errorf("read: %d, %v", n, err)
	}
	if n, err := h.GdbsxGuestMemory(7, 9, 0x2F00, got, false); n != 0x100 || !errors.Is(err, syscall.EFAULT) {
		t.Errorf("read past the end: %d, %v", n, err)
	}
	if f, err := h.TranslateAddress(7, 0, 0x10123); f != 0x20 || err != nil {
		t.Errorf("TranslateAddress: %#x, %v", f, err)
	}
	if _, err := h.TranslateAddress(7, 0, 0); !errors.Is(err, syscall.EFAULT) {
		t.Errorf("TranslateAddress: %v, want EFAULT", err)
	}
	if c, err := h.HVMCPU(7, 0); err != nil || c.RAX != 0x0706050403020100 {
		t.Errorf("HVMCPU: %+v, %v", c, err)
	}
	if err := h.InjectEvent(7, 1, VectorBreakpoint, EventTypeSoftwareException, ^uint32(0), 1, 1<<35); err != nil {
		t.Error(err)
	}

	m, err := h.MapForeign(7, true, 3, 9)
	if err != nil {
		t.Fatal(err)
	}
	if b := m.Bytes(); len(b) != 2*PageSize || b[0] != 3 || b[PageSize] != 9 {
		t.Errorf("mapping of %d bytes", len(b))
	}
	m.Bytes()[1] = 0xCC
	if err := m.Unmap(); err != nil {
		t.Error(err)
	}
	var me *MapError
	if _, err := h.MapForeign(7, false, 3, 0x1001, 4); !errors.As(err, &me) || me.Frames[0] != 0x1001 || !errors.Is(err, syscall.EINVAL) {
		t.Errorf("MapForeign: %v", err)
	}
	if _, err := h.MapForeign(7, false, 0x1001); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("MapForeign: %v", err)
	}

	if c, err := h.MonitorCapabilities(7); c != 0x1F7B || err != nil {
		t.Errorf("MonitorCapabilities: %#x, %v", c, err)
	}
	if _, err := h.OpenMonitor(0); !errors.Is(err, ErrBusy) {
		t.Errorf("OpenMonitor: %v, want ErrBusy", err)
	}
	r, err := h.MapRing(7)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	mon, err := h.OpenMonitor(7)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(mon.SetSoftwareBreakpoint(true), mon.SetDebugExceptions(true, true)); err != nil {
		t.Error(err)
	}
	if err := mon.SetSingleStep(true); !errors.Is(err, ErrNotSupported) {
		t.Errorf("SetSingleStep: %v, want ErrNotSupported", err)
	}
	if err := mon.Notify(); err != nil {
		t.Error(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	if err := mon.Wait(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Wait: %v", err)
	}
	if err := mon.Close(); err != nil {
		t.Error(err)
	}

	s, err := OpenStore()
	if err != nil {
		t.Fatal(err)
	}
	if id, err := s.DomainByName("guest"); id != 7 || err != nil {
		t.Errorf("DomainByName: %d, %v", id, err)
	}
	if err := s.Watch("@releaseDomain", "vmprobes"); err != nil {
		t.Error(err)
	}
	if path, token, err := s.WaitWatch(t.Context()); path != "@releaseDomain" || token != "vmprobes" || err != nil {
		t.Errorf("WaitWatch: %q, %q, %v", path, token, err)
	}
	if err := s.Unwatch("a", "b"); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("Unwatch: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}

	c, err := OpenEventChannels()
	if err != nil {
		t.Fatal(err)
	}
	port, err := c.BindVIRQ(VIRQDebugger)
	if port != 12 || err != nil {
		t.Errorf("BindVIRQ: %d, %v", port, err)
	}
	go func() {
		time.Sleep(10 * time.Millisecond)
		_ = c.Notify(port)
	}()
	if err := c.Wait(t.Context()); err != nil {
		t.Error(err)
	}
	if p, ok, err := c.Pending(); p != port || !ok || err != nil {
		t.Errorf("Pending: %d, %v, %v", p, ok, err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}

	var f VCPUContext
	if n := testing.AllocsPerRun(20, func() { _ = h.VCPUContext(7, 0, &f) }); n > 1 {
		t.Errorf("VCPUContext: %v allocations", n)
	}
	if err := h.Close(); err != nil { // the stub ends the process if anything is open
		t.Error(err)
	}
}
