package xenctrl

import (
	"syscall"
	"unsafe"
)

// lib is the seam below a Handle: one method for each call of the C libraries,
// in Go types only and without any policy. Its errors are syscall.Errno.
// lib_dlopen.go has the real one, lib_none.go says why there is none, and the
// tests have a fake.
type lib interface {
	path() string
	close() error

	version() (major, minor int, extra string, err error)
	capabilities() (string, error)

	// firstDomain returns the domain with the lowest id that is >= first;
	// ok is false if there is none.
	firstDomain(first DomID) (info DomainInfo, ok bool, err error)
	pause(id DomID) error
	unpause(id DomID) error
	guestWidth(id DomID) (bytes int, err error)
	maxGPFN(id DomID) (uint64, error)

	vcpuInfo(id DomID, vcpu int, info *VCPUInfo) error
	vcpuContext(id DomID, vcpu int, c *VCPUContext) error
	setVCPUContext(id DomID, vcpu int, c *VCPUContext) error
	// vcpuExtState reuses s.Data. If s is from an earlier call, that tells how much
	// room is needed and saves a call.
	vcpuExtState(id DomID, vcpu int, s *ExtState) error
	setVCPUExtState(id DomID, vcpu int, mask uint64, data []byte) error
	hvmCPU(id DomID, vcpu int, rec *hvmHWCPU) error

	setDebugging(id DomID, on bool) error
	debugControl(id DomID, vcpu int, op uint32) error
	domctl(cmd uint32, id DomID, u domctlArgs) (domctlArgs, error)
	gdbsxMemory(id DomID, pgd3, va uint64, buf []byte, write bool) (remain int, err error)
	translate(id DomID, vcpu int, va uint64) (frame uint64, err error)

	// mapForeign maps the frames. If any of them can't be mapped it maps none, and
	// returns an errno for each in errs.
	mapForeign(id DomID, writable bool, frames []uint64) (mem []byte, errs []int32, err error)
	unmapForeign(mem []byte) error
	// writeForeign writes b to a frame from offset off on, within it.
	writeForeign(id DomID, frame uint64, off int, b []byte) error

	injectEvent(id DomID, vcpu int, vector, eventType uint8, errorCode uint32, insnLen uint8, cr2 uint64) error

	monitorCaps(id DomID) (uint32, error)
	eventVersion() (int, error)
	monitorEnable(id DomID) (ring unsafe.Pointer, port uint32, err error)
	// monitorMap maps the page that the next monitorEnable makes the ring. It fails with
	// EBUSY if a monitor is attached.
	monitorMap(id DomID) (ring unsafe.Pointer, err error)
	monitorUnmap(ring unsafe.Pointer) error
	monitorDisable(id DomID) error
	monitorSet(id DomID, what monitorEvent, on, sync bool) error

	openEvents() (eventLib, error)
	openStore() (storeLib, error)
}

// extStates has the two calls that vcpuExtState takes. extRoom returns the mask that
// Xen expects and the largest size of the state; extState stores the state in buf and
// returns its size, which setVCPUExtState needs, and fails with EAGAIN or EINVAL if
// buf is too small.
type extStates interface {
	extRoom(id DomID, vcpu int) (mask, room uint64, err error)
	extState(id DomID, vcpu int, mask uint64, buf []byte) (size int, err error)
}

// readExtState is lib.vcpuExtState.
func readExtState(l extStates, id DomID, vcpu int, s *ExtState) error {
	var err error
	// The state grows when the guest first uses an extension: since s was filled,
	// or between the two calls, if it is not paused.
	for range 3 {
		if cap(s.Data) == 0 {
			mask, room, err := l.extRoom(id, vcpu)
			if err != nil {
				return err
			}
			if room > extStateMax {
				return syscall.E2BIG
			}
			s.Mask = mask
			if room == 0 {
				return nil
			}
			s.Data = make([]byte, room)
		}
		buf := s.Data[:cap(s.Data)]
		var size int
		size, err = l.extState(id, vcpu, s.Mask, buf)
		if err == nil {
			s.Data = buf[:size]
			return nil
		}
		if err != syscall.EAGAIN && err != syscall.EINVAL {
			break
		}
		s.Data = nil
	}
	return err
}

// monitorEvent selects an xc_monitor_* call.
type monitorEvent int

const (
	monitorSoftwareBreakpoint monitorEvent = iota
	monitorSingleStep
	monitorDebugExceptions
	monitorEvents // how many
)

// eventLib is the seam below EventChannels and Monitor (libxenevtchn).
type eventLib interface {
	fd() int
	bindVIRQ(virq uint32) (port uint32, err error)
	bindInterdomain(id DomID, remote uint32) (port uint32, err error)
	unbind(port uint32) error
	notify(port uint32) error
	pending() (port uint32, err error) // EAGAIN: none
	unmask(port uint32) error
	close() error
}

// turn is how this domain gives up its vCPU's turn.
type turn interface {
	yield() bool
	close()
}

// storeLib is the seam below Store (libxenstore).
type storeLib interface {
	fd() int
	read(path string) ([]byte, error)
	directory(path string) ([]string, error)
	watch(path, token string) error
	unwatch(path, token string) error
	checkWatch() (path, token string, err error) // EAGAIN: none
	close() error
}
