package xentest

import (
	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/xen"
)

// Attach opens the driver for the guest. hv is its Hypervisor, or what a test has put
// around that; nil means the former.
func (m *Machine) Attach(hv xen.Hypervisor) (breakpoint.Driver, error) {
	if hv == nil {
		hv = m.Hypervisor()
	}
	if m.cfg.Kind != PV {
		return driver(xen.OpenMonitor(hv))
	}
	d, err := xen.OpenDebugger(hv)
	if err == nil {
		d.SetVCPUInfo(m.VCPUInfo())
	}
	return driver(d, err)
}

// driver keeps a nil pointer from becoming a driver that isn't nil.
func driver[D breakpoint.Driver](d D, err error) (breakpoint.Driver, error) {
	if err != nil {
		return nil, err
	}
	return d, nil
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
