// Package xen holds the two ways in which a breakpoint in a Xen guest can
// reach a tool in dom0: the debugger route (PV guests, gdbsx domctls) and the
// monitor route (HVM and PVH guests, vm_event). Both are drivers of
// [github.com/vmprobes/vmprobes/internal/breakpoint].
package xen

import (
	"context"

	"github.com/vmprobes/vmprobes/xenctrl"
)

// Hypervisor is what the routes need of Xen, for one domain. Live binds it to
// libxenctrl; internal/xentest implements it in memory.
type Hypervisor interface {
	Info() (xenctrl.DomainInfo, error)
	Pause() error
	Unpause() error

	VCPUContext(vcpu int, c *xenctrl.VCPUContext) error
	SetVCPUContext(vcpu int, c *xenctrl.VCPUContext) error
	// VCPUExtState returns memory that the next call uses again. One call at a time.
	VCPUExtState(vcpu int) (xenctrl.ExtState, error)
	SetVCPUExtState(vcpu int, s xenctrl.ExtState) error
	HVMCPU(vcpu int) (xenctrl.HVMCPU, error)
	VCPUInfo(vcpu int) (xenctrl.VCPUInfo, error)

	// MapFrames maps machine frames (PV) or guest frames (HVM) of the guest.
	MapFrames(writable bool, frames ...uint64) (Mapping, error)
	// WriteFrame writes to a frame, from an offset on, and keeps nothing mapped.
	WriteFrame(frame uint64, off int, b []byte) error

	SetDebugging(on bool) error
	GdbsxDomStatus() (xenctrl.DomStatus, error)
	GdbsxPauseVCPU(vcpu int) error
	GdbsxUnpauseVCPU(vcpu int) error

	MonitorCapabilities() (xenctrl.MonitorCaps, error)
	OpenMonitor() (Monitor, error)
	// ReleaseMonitor detaches the monitor of a process that died, if there is one, and
	// gives answers to vCPUs that wait for its. A vCPU that waits for none isn't touched.
	ReleaseMonitor(answers []xenctrl.Event) error
	// MapRing maps the page that will be the ring of the next OpenMonitor, and TakeMonitor
	// goes on with that monitor when its process has died; port is what its Port said. A
	// mapping made later doesn't show the ring.
	MapRing() (Ring, error)
	TakeMonitor(r Ring, port uint32) (Monitor, xenctrl.RingState, error)
	InjectEvent(vcpu int, vector, eventType uint8, errorCode, insnLen uint32, cr2 uint64) error
	DebugControl(vcpu int, singleStep bool) error
}

// A Mapping is guest memory mapped into this process.
type Mapping interface {
	Bytes() []byte
	Unmap() error
}

// Monitor is an open vm_event ring; *xenctrl.Monitor is one.
type Monitor interface {
	SetSoftwareBreakpoint(on bool) error
	SetSingleStep(on bool) error
	SetDebugExceptions(on, sync bool) error
	// Wait returns when a request may be on the ring, or with ctx's error.
	Wait(ctx context.Context) error
	// Next takes one request off the ring.
	Next(e *xenctrl.Event) (ok bool, err error)
	// Respond puts a response on the ring; Notify makes Xen read them.
	Respond(e *xenctrl.Event) error
	Notify() error
	// Port is the guest's port of the ring's event channel.
	Port() uint32
	Close() error
}

// A Ring is the page of a vm_event ring, mapped by a process that didn't attach.
// TakeMonitor may be called again with it: the Monitor of before is of no use then. When a
// Monitor that was taken with it is closed there is nothing left to be unmapped.
type Ring interface{ Close() error }
