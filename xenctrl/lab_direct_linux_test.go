package xenctrl

import (
	"bytes"
	"testing"
)

// labDirect compares the calls that are made without the library with the library's,
// on the vCPUs of a domain that is paused once more than info says.
func labDirect(t *testing.T, h *Handle, info DomainInfo) {
	id, maxVCPU := info.ID, info.MaxVCPUID
	direct, ok := h.l.(*domctls)
	if !ok {
		t.Errorf("the calls of a hit are the library's: does %s have another interface?", h.LibraryPath())
		return
	}
	t.Logf("version %#x of the interface", direct.face)
	libs := map[string]lib{"direct": direct, "library": direct.lib}
	paused := func(want bool) {
		t.Helper()
		if d, err := h.Domain(id); err != nil || (d.Flags&DomainPaused != 0) != want {
			t.Errorf("paused: flags %#x, %v, want %v", d.Flags, err, want)
		}
	}
	for first := range id + 2 {
		one, ok1, err1 := libs["direct"].firstDomain(first)
		two, ok2, err2 := libs["library"].firstDomain(first)
		one.CPUTime, two.CPUTime = 0, 0 // of dom0: this test runs
		const now = DomainRunning | DomainBlocked
		one.Flags, two.Flags = one.Flags&^now, two.Flags&^now
		if one != two || ok1 != ok2 || err1 != err2 {
			t.Errorf("domain %d or the next: direct %+v, %v, %v; library %+v, %v, %v", first, one, ok1, err1, two, ok2, err2)
		}
	}
	for _, set := range []string{"direct", "library"} {
		for _, get := range []string{"direct", "library"} {
			s, g := libs[set], libs[get]
			for v := range maxVCPU + 1 {
				var was, is VCPUContext
				var wasExt, isExt ExtState
				err1, err2 := s.vcpuContext(id, v, &was), g.vcpuContext(id, v, &is)
				if err1 != err2 || was != is {
					t.Errorf("vCPU %d: %s and %s have different registers: %v, %v", v, set, get, err1, err2)
				}
				ext1, ext2 := s.vcpuExtState(id, v, &wasExt), g.vcpuExtState(id, v, &isExt)
				if ext1 != ext2 || wasExt.Mask != isExt.Mask || !bytes.Equal(wasExt.Data, isExt.Data) {
					t.Errorf("vCPU %d: %s and %s have different extended states: %v, %v", v, set, get, ext1, ext2)
				}
				if err1 != nil {
					continue
				}
				// What was read, with one register changed, and then again without.
				changed := was
				changed.User.R15 ^= 0x5A5A
				for _, c := range []*VCPUContext{&changed, &was} {
					if err := s.setVCPUContext(id, v, c); err != nil {
						t.Errorf("vCPU %d: %s: set registers: %v", v, set, err)
					}
					if ext1 == nil && wasExt.Live() {
						if err := s.setVCPUExtState(id, v, wasExt.Mask, wasExt.Data); err != nil {
							t.Errorf("vCPU %d: %s: set extended state: %v", v, set, err)
						}
					}
					if err := g.vcpuContext(id, v, &is); err != nil || is.User != c.User || is.CtrlReg != c.CtrlReg || is.FPU != c.FPU {
						t.Errorf("vCPU %d: set by %s, read by %s: %v\nwas %+v\nis  %+v", v, set, get, err, c.User, is.User)
					}
					if err := g.vcpuExtState(id, v, &isExt); err != ext2 || wasExt.Live() && !bytes.Equal(wasExt.Data, isExt.Data) {
						t.Errorf("vCPU %d: extended state set by %s, read by %s: %v", v, set, get, err)
					}
				}
			}
			// What one pauses the other lets run, and the pause of the test is left.
			if err1, err2 := s.pause(id), g.unpause(id); err1 != nil || err2 != nil {
				t.Errorf("%s pauses: %v, %s unpauses: %v", set, err1, get, err2)
			}
			paused(true)
			if info.Flags&DomainPaused == 0 { // before the test
				if err := g.unpause(id); err != nil {
					t.Errorf("%s unpauses: %v", get, err)
				}
				paused(false)
				if err := s.pause(id); err != nil {
					t.Errorf("%s pauses: %v", set, err)
				}
				paused(true)
			}
			one, err1 := s.domctl(domctlGdbsxDomStatus, id, domctlArgs{})
			two, err2 := g.domctl(domctlGdbsxDomStatus, id, domctlArgs{})
			if err1 != err2 || one != two {
				t.Errorf("status: %s % x, %v; %s % x, %v", set, one[:12], err1, get, two[:12], err2)
			}
			if err1 == nil {
				_, err1 = s.domctl(domctlGdbsxPauseVCPU, id, domctlArgs{})
				_, err2 = g.domctl(domctlGdbsxUnpauseVCPU, id, domctlArgs{})
				if err1 != nil || err2 != nil {
					t.Errorf("%s pauses a vCPU: %v, %s unpauses it: %v", set, err1, get, err2)
				}
			}
		}
	}
	// And both fail alike.
	calls := map[string]func(l lib) error{
		"domain":     func(l lib) error { return l.pause(0x7000) },
		"unpause":    func(l lib) error { return l.unpause(0x7000) },
		"status":     func(l lib) error { _, err := l.domctl(domctlGdbsxDomStatus, 0x7000, domctlArgs{}); return err },
		"registers":  func(l lib) error { return l.vcpuContext(id, maxVCPU+1, new(VCPUContext)) },
		"context":    func(l lib) error { return l.setVCPUContext(id, maxVCPU+1, new(VCPUContext)) },
		"vCPU":       func(l lib) error { return l.vcpuExtState(id, maxVCPU+1, new(ExtState)) },
		"state":      func(l lib) error { return l.setVCPUExtState(id, 0, 7, make([]byte, 100)) },
		"mask":       func(l lib) error { return l.vcpuExtState(id, 0, &ExtState{Mask: 1 << 60, Data: make([]byte, 0, 4096)}) },
		"pause vCPU": func(l lib) error { _, err := l.domctl(domctlGdbsxPauseVCPU, id, domctlArgs{0: 127}); return err },
	}
	for name, call := range calls {
		if direct, library := call(libs["direct"]), call(libs["library"]); direct != library {
			t.Errorf("%s: the direct call says %v, the library %v", name, direct, library)
		}
	}
}
