package xentest

import (
	"errors"
	"testing"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/xen"
	"github.com/vmprobes/vmprobes/paging"
)

// Attach opens the driver for the guest. hv is its Hypervisor, or what a test has put
// around that; nil means the former.
func (m *Machine) Attach(hv xen.Hypervisor) (breakpoint.Driver, error) {
	if hv == nil {
		hv = m.Hypervisor()
	}
	frames := xen.NewFrames(hv)
	if m.cfg.Kind != PV {
		d, err := xen.OpenMonitor(hv, frames, xen.Config{})
		return attached{d, frames}, err
	}
	d, err := xen.OpenDebugger(hv, frames, xen.Config{Lookup: m.Lookup})
	return attached{d, frames}, err
}

// attached is a driver with frames of its own.
type attached struct {
	breakpoint.Driver
	frames *paging.Cache
}

func (d attached) Close() error {
	err := d.Driver.Close()
	if err == nil || errors.Is(err, breakpoint.ErrGone) {
		err = errors.Join(err, d.frames.Close())
	}
	return err
}

// Frames returns frames for a driver that the test opens itself. They are closed when
// the test is over.
func Frames(t testing.TB, hv xen.Hypervisor) *paging.Cache {
	f := xen.NewFrames(hv)
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	return f
}

// Scratch proposes the guest's dead code: it is a breakpoint.Config's Scratch.
func (m *Machine) Scratch(_ uint64, try func(addr, size uint64) bool) {
	for _, g := range m.Gaps() {
		if try(g.VA+16, g.Size-16) {
			return
		}
	}
}

// NoFaults is a breakpoint.Config's MayFault: the guest's kernel expects none.
func NoFaults(uint64) bool { return false }
