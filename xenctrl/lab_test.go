package xenctrl

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestLab runs the calls against a hypervisor, in a dom0 as root, if
// VMPROBES_LAB is set. The guest that it looks at is the first domain other
// than 0, or if there is none one that it starts; it pauses it for moments,
// and what it leaves is what it found.
func TestLab(t *testing.T) {
	if os.Getenv("VMPROBES_LAB") == "" {
		t.Skip("VMPROBES_LAB is not set: this test is for a Xen dom0")
	}
	h, err := Open()
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := h.Close(); err != nil {
			t.Error(err)
		}
	}()

	v, err := h.Version()
	if err != nil || v.Major != 4 || v.Minor < oldestLabMinor {
		t.Errorf("Version: %v, %v", v, err)
	}
	t.Logf("Xen %v, %s", v, h.LibraryPath())
	if caps, err := h.Capabilities(); err != nil || !strings.Contains(caps, "xen-3.0-x86_64") {
		t.Errorf("Capabilities: %q, %v", caps, err)
	}
	if p := h.LibraryPath(); !strings.Contains(p, "libxenctrl.so") {
		t.Errorf("LibraryPath: %q", p)
	}

	list, err := h.Domains()
	if err != nil || len(list) == 0 || list[0].ID != DomID0 {
		t.Fatalf("Domains: %+v, %v", list, err)
	}
	for _, d := range list {
		t.Logf("%+v", d)
		if d.OnlineVCPUs < 0 || d.OnlineVCPUs > d.MaxVCPUID+1 || d.TotalPages == 0 && !d.Gone() {
			t.Errorf("implausible: %+v", d)
		}
	}
	if d, err := h.Domain(DomID0); err != nil || d.ID != DomID0 || d.Gone() {
		t.Errorf("Domain(0): %+v, %v", d, err)
	}
	if w, err := h.GuestWidth(DomID0); err != nil || w != 64 {
		t.Errorf("GuestWidth(0): %d, %v", w, err)
	}
	if n, err := h.MaxGPFN(DomID0); err != nil || n == 0 {
		t.Errorf("MaxGPFN(0): %d, %v", n, err)
	}
	if i, err := h.VCPUInfo(DomID0, 0); err != nil || !i.Online {
		t.Errorf("VCPUInfo(0, 0): %+v, %v", i, err)
	}
	if caps, err := h.MonitorCapabilities(DomID0); err != nil || caps != 0 {
		t.Logf("MonitorCapabilities(0): %#x, %v", caps, err) // EPERM: Xen refuses it for the caller's own domain
	}

	const none = 0x7000
	for name, f := range map[string]func() error{
		"Domain":         func() error { _, err := h.Domain(none); return err },
		"Pause":          func() error { return h.Pause(none) },
		"Unpause":        func() error { return h.Unpause(none) },
		"VCPUInfo":       func() error { _, err := h.VCPUInfo(none, 0); return err },
		"VCPUContext":    func() error { return h.VCPUContext(none, 0, new(VCPUContext)) },
		"VCPUExtState":   func() error { _, err := h.VCPUExtState(none, 0); return err },
		"SetDebugging":   func() error { return h.SetDebugging(none, true) },
		"GuestWidth":     func() error { _, err := h.GuestWidth(none); return err },
		"MaxGPFN":        func() error { _, err := h.MaxGPFN(none); return err },
		"InjectEvent":    func() error { return h.InjectEvent(none, 0, 3, EventTypeSoftwareException, ^uint32(0), 1, 0) },
		"DebugControl":   func() error { return h.DebugControl(none, 0, false) },
		"GdbsxDomStatus": func() error { _, err := h.GdbsxDomStatus(none); return err },
	} {
		err := f()
		if !errors.Is(err, ErrNoDomain) {
			t.Errorf("%s of no domain: %v, want ErrNoDomain", name, err)
		}
		var e *Error
		if !errors.As(err, &e) || e.Domain != none {
			t.Errorf("%s of no domain: %#v", name, err)
		}
	}
	if _, err := h.MapForeign(none, false, 1); err == nil {
		t.Error("MapForeign of no domain succeeded")
	} else {
		t.Logf("MapForeign of no domain: %v", err)
	}
	if m, err := h.OpenMonitor(none); err == nil {
		t.Error("OpenMonitor of no domain succeeded", m.Close())
	} else {
		t.Logf("OpenMonitor of no domain: %v", err)
	}

	t.Run("store", func(t *testing.T) { labStore(t, h, list) })
	t.Run("event channels", labEventChannels)
	i := slices.IndexFunc(list, func(d DomainInfo) bool { return d.ID != DomID0 && !d.Gone() })
	if i >= 0 {
		t.Run("guest", func(t *testing.T) { labGuest(t, h, list[i]) })
		return
	}
	id := labCreate(t)
	d, err := h.Domain(id)
	if err != nil {
		t.Fatal(err)
	}
	dead, err := h.WatchDomainDeath(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	t.Run("guest before it runs", func(t *testing.T) { labGuest(t, h, d) })
	if err := h.Unpause(id); err != nil {
		t.Fatal(err)
	}
	time.Sleep(20 * time.Second)
	if d, err = h.Domain(id); err != nil {
		t.Fatal(err)
	}
	t.Run("guest", func(t *testing.T) { labGuest(t, h, d) })
	before, err1 := h.Domain(id)
	time.Sleep(2 * time.Second)
	after, err2 := h.Domain(id)
	if err := errors.Join(err1, err2); err != nil || after.Gone() || after.Flags&DomainPaused != 0 || after.CPUTime == before.CPUTime {
		t.Errorf("the guest does not run after the test: %+v, then %+v, %v", before, after, err)
	}
	select {
	case <-dead:
		t.Error("the guest is reported dead")
	default:
	}
	labCommand(t, "xl", "destroy", strconv.Itoa(int(id)))
	select {
	case <-dead:
	case <-time.After(30 * time.Second):
		t.Error("the end of the guest is not reported")
	}
}

// What the lab's dom0 has to make guests from.
const (
	labKernels = "/lab/kernels"
	labRamdisk = "/lab/guest.cpio"
)

// labCreate makes a domain of the lab's guest, paused, and returns its id.
func labCreate(t *testing.T) DomID {
	kernels, err := filepath.Glob(filepath.Join(labKernels, "*", "vmlinux"))
	if err != nil || len(kernels) == 0 {
		t.Skip("no guest, and no kernel in " + labKernels + " to start one: the rest is not tested")
	}
	file := filepath.Join(t.TempDir(), "xenctrl.cfg")
	config := fmt.Sprintf("name = \"xenctrl\"\ntype = \"pv\"\nkernel = %q\nramdisk = %q\ncmdline = \"console=hvc0\"\nmemory = 256\nvcpus = 2\n",
		kernels[0], labRamdisk)
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	labCommand(t, "xl", "create", "-e", "-p", file)
	s, err := OpenStore()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	id, err := s.DomainByName("xenctrl")
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func labCommand(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v: %s", name, err, out)
	}
}

// oldestLabMinor is the oldest release that the lab may have.
const oldestLabMinor = 13

func labStore(t *testing.T, h *Handle, list []DomainInfo) {
	s, err := OpenStore()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, err := s.Read("/vmprobes-none"); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("Read: %v, want ENOENT", err)
	}
	names, err := s.Directory("/local/domain")
	if err != nil || !slices.Contains(names, "0") {
		t.Errorf("Directory: %q, %v", names, err)
	}
	for _, d := range list {
		name, err := s.DomainName(d.ID)
		if err != nil {
			t.Logf("DomainName(%d): %v", d.ID, err) // the lab's guests need not have one
			continue
		}
		if id, err := s.DomainByName(name); err != nil || id != d.ID {
			t.Errorf("DomainByName(%q): %d, %v, want %d", name, id, err, d.ID)
		}
		t.Logf("domain %d is %q", d.ID, name)
	}
	if _, err := s.DomainByName("vmprobes-none"); !errors.Is(err, ErrNoDomain) {
		t.Errorf("DomainByName: %v, want ErrNoDomain", err)
	}
	if err := s.Watch("@releaseDomain", "lab"); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if path, token, err := s.WaitWatch(ctx); path != "@releaseDomain" || token != "lab" || err != nil {
		t.Errorf("WaitWatch: %q, %q, %v", path, token, err)
	}
	ctx, cancel = context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if path, _, err := s.WaitWatch(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("second WaitWatch: %q, %v", path, err)
	}
	if err := s.Unwatch("@releaseDomain", "lab"); err != nil {
		t.Error(err)
	}
	if _, err := h.WatchDomainDeath(t.Context(), 0x7000); !errors.Is(err, ErrNoDomain) {
		t.Errorf("WatchDomainDeath: %v, want ErrNoDomain", err)
	}
	ctx, cancel = context.WithCancel(t.Context())
	dead, err := h.WatchDomainDeath(ctx, DomID0)
	if err != nil {
		t.Fatal(err)
	}
	select {
	case <-dead:
		t.Error("dom0 is reported dead")
	case <-time.After(100 * time.Millisecond):
	}
	cancel()
}

func labEventChannels(t *testing.T) {
	c, err := OpenEventChannels()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, ok, err := c.Pending(); ok || err != nil {
		t.Errorf("Pending: %v, %v", ok, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	start := time.Now()
	if err := c.Wait(ctx); !errors.Is(err, context.DeadlineExceeded) || time.Since(start) > 5*time.Second {
		t.Errorf("Wait: %v after %v", err, time.Since(start))
	}
	port, err := c.BindVIRQ(VIRQDebugger)
	if errors.Is(err, syscall.EEXIST) {
		t.Skip("VIRQ_DEBUGGER has a listener")
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("VIRQ_DEBUGGER is port %d", port)
	if err := c.Unmask(port); err != nil {
		t.Error(err)
	}
	if err := c.Unbind(port); err != nil {
		t.Error(err)
	}
	woken := make(chan error)
	go func() { woken <- c.Wait(context.Background()) }()
	time.Sleep(20 * time.Millisecond)
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if err := <-woken; !errors.Is(err, ErrClosed) {
		t.Errorf("Wait: %v, want ErrClosed", err)
	}
}

func labGuest(t *testing.T, h *Handle, d DomainInfo) {
	id := d.ID
	hvm := d.Flags&DomainHVM != 0
	if err := h.Pause(id); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := h.Unpause(id); err != nil {
			t.Error(err)
		}
	}()
	if p, err := h.Domain(id); err != nil || p.Flags&DomainPaused == 0 {
		t.Errorf("Domain: %+v, %v: not paused", p, err)
	}
	if i, err := h.VCPUInfo(id, 0); err != nil || !i.Online || i.Running {
		t.Errorf("VCPUInfo: %+v, %v", i, err)
	}
	if _, err := h.VCPUInfo(id, d.MaxVCPUID+1); err == nil {
		t.Error("VCPUInfo of no vCPU succeeded")
	}

	var c, again VCPUContext
	if err := h.VCPUContext(id, 0, &c); err != nil {
		t.Fatal(err)
	}
	t.Logf("rip %#x rsp %#x cs %#x rflags %#x cr3 %#x traps[3] %#x", c.User.RIP, c.User.RSP, c.User.CS, c.User.RFLAGS, c.CtrlReg[3], c.Traps[3].Address)
	if c.User.RIP == 0 || c.CtrlReg[3] == 0 {
		t.Errorf("implausible context: %+v", c.User)
	}
	ext, err := h.VCPUExtState(id, 0)
	t.Logf("extended state: mask %#x, %d bytes, accumulated %#x, live %v, %v", ext.Mask, len(ext.Data), ext.Accumulated(), ext.Live(), err)

	// Writing back what was read changes nothing.
	if err := h.SetVCPUContextPreserving(id, 0, &c); err != nil {
		t.Errorf("SetVCPUContextPreserving: %v", err)
	}
	if err := h.VCPUContext(id, 0, &again); err != nil || again.User != c.User || again.CtrlReg != c.CtrlReg {
		t.Errorf("context after it was written back: %v\nwas %+v\nis  %+v", err, c.User, again.User)
	}
	if after, err := h.VCPUExtState(id, 0); err != nil && ext.Live() {
		t.Error(err)
	} else if ext.Live() && !bytes.Equal(after.Data, ext.Data) {
		t.Error("extended state changed")
	}
	if ext.Data != nil {
		if err := h.SetVCPUExtState(id, 0, ext); err != nil {
			t.Errorf("SetVCPUExtState: %v", err)
		}
	}

	labDirect(t, h, d)
	// The guest ran in between.
	if err := h.VCPUContext(id, 0, &c); err != nil {
		t.Fatal(err)
	}

	if w, err := h.GuestWidth(id); d.Flags&DomainHVM != 0 {
		if !errors.Is(err, ErrNotSupported) {
			t.Errorf("GuestWidth of an HVM guest: %d, %v", w, err)
		}
	} else if err != nil || w != 64 {
		t.Errorf("GuestWidth: %d, %v", w, err)
	}
	frame, err := h.TranslateAddress(id, 0, c.User.RIP)
	if err != nil {
		t.Errorf("TranslateAddress(%#x): %v", c.User.RIP, err)
	} else {
		m, err := h.MapForeign(id, false, frame)
		if err != nil {
			t.Fatal(err)
		}
		code := m.Bytes()[c.User.RIP%PageSize:]
		t.Logf("code at rip: % x", code[:min(16, len(code))])
		if bytes.Equal(m.Bytes(), make([]byte, PageSize)) {
			t.Error("the page that the vCPU executes is empty")
		}
		// The same bytes by the other route, if there is one.
		buf, want := make([]byte, min(16, len(code))), bytes.Clone(code[:min(16, len(code))])
		if n, err := h.GdbsxGuestMemory(id, 0, c.User.RIP, buf, false); err != nil {
			t.Logf("GdbsxGuestMemory: %d, %v", n, err)
		} else if !bytes.Equal(buf, code[:len(buf)]) {
			t.Errorf("GdbsxGuestMemory: % x, want % x", buf, code[:len(buf)])
		}
		// What is there is written there.
		at := int(c.User.RIP % PageSize)
		if err := h.WriteForeign(id, frame, at, want); err != nil {
			t.Errorf("WriteForeign: %v", err)
		}
		if !bytes.Equal(code[:len(want)], want) {
			t.Errorf("after WriteForeign: % x, want % x", code[:len(want)], want)
		}
		if err := h.WriteForeign(id, 1<<30, 0, buf); err == nil {
			t.Error("WriteForeign to no frame succeeded")
		} else {
			t.Logf("WriteForeign to no frame: %v", err)
		}
		if err := m.Unmap(); err != nil {
			t.Error(err)
		}
	}
	if _, err := h.MapForeign(id, true, 1<<40); err == nil {
		t.Error("MapForeign of no frame succeeded")
	} else {
		t.Logf("MapForeign of no frame: %v", err)
	}
	if m, err := h.MapForeign(id, true, d.SharedInfoFrame); err != nil {
		t.Logf("shared info: %v", err)
	} else {
		t.Logf("shared info begins with % x", m.Bytes()[:16])
		_ = m.Unmap()
	}

	st, err := h.GdbsxDomStatus(id)
	switch {
	case err != nil:
		t.Logf("GdbsxDomStatus: %v: no gdbsx support", err)
	case !st.Paused || st.VCPU != -1:
		t.Errorf("GdbsxDomStatus: %+v", st)
	default:
		if err := errors.Join(h.GdbsxPauseVCPU(id, 0), h.GdbsxUnpauseVCPU(id, 0)); err != nil {
			t.Errorf("pausing a vCPU: %v", err)
		}
	}
	cpu, err := h.HVMCPU(id, 0)
	switch {
	case hvm && (err != nil || cpu.RIP != c.User.RIP || cpu.CR3 != c.CtrlReg[3]):
		t.Errorf("HVMCPU: %+v, %v", cpu, err)
	case !hvm && err == nil:
		t.Errorf("HVMCPU of a PV domain: %+v", cpu)
	}
	caps, err := h.MonitorCapabilities(id)
	t.Logf("HVM %v, monitor capabilities %#x, %v", hvm, caps, err)
	m, err := h.OpenMonitor(id)
	if !hvm {
		if err == nil {
			t.Error("OpenMonitor of a PV domain succeeded", m.Close())
		} else if !errors.Is(err, ErrNotSupported) {
			t.Errorf("OpenMonitor: %v, want ErrNotSupported", err)
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	if second, err := h.OpenMonitor(id); !errors.Is(err, ErrBusy) {
		t.Errorf("second OpenMonitor: %v, want ErrBusy", err)
		if err == nil {
			_ = second.Close()
		}
	}
	if caps&MonitorSoftwareBreakpoint != 0 {
		if err := m.SetSoftwareBreakpoint(true); err != nil {
			t.Error(err)
		}
	}
	var e Event
	if ok, err := m.Next(&e); ok || err != nil {
		t.Errorf("Next: %v, %v", ok, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := m.Wait(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Wait: %v", err)
	}
	if err := m.Close(); err != nil {
		t.Error(err)
	}
	if m, err = h.OpenMonitor(id); err != nil {
		t.Errorf("OpenMonitor after Close: %v", err)
	} else if err := m.Close(); err != nil {
		t.Error(err)
	}
}
