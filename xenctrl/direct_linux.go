package xenctrl

import (
	"fmt"
	"os"
	"syscall"
	"unsafe"
)

// directEvents makes the three calls of libxenevtchn that each event takes as system
// calls (linux/include/uapi/xen/evtchn.h; tools/libs/evtchn/linux.c). Go's scheduler
// keeps account of calls through cgo, which costs several times as much as the calls.
// None of the three waits.
type directEvents struct {
	eventLib
	dev uintptr
}

const (
	// fileEvtchn is the device behind libxenevtchn on Linux.
	fileEvtchn = "/dev/xen/evtchn"

	// ioctlNotify is IOCTL_EVTCHN_NOTIFY: _IOC(_IOC_NONE, 'E', 4,
	// sizeof(struct ioctl_evtchn_notify)), which is a port.
	ioctlNotify = 'E'<<8 | 4 | 4<<16
)

// direct returns directEvents above l if l's descriptor is the device, and l if it
// isn't or that can't be told.
func direct(l eventLib) eventLib {
	fd := l.fd()
	if path, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd)); err != nil || path != fileEvtchn {
		return l
	}
	return &directEvents{l, uintptr(fd)}
}

func (d *directEvents) pending() (port uint32, err error) {
	n, _, e := syscall.RawSyscall(syscall.SYS_READ, d.dev, uintptr(unsafe.Pointer(&port)), unsafe.Sizeof(port))
	return port, whole(n, e)
}

func (d *directEvents) unmask(port uint32) error {
	n, _, e := syscall.RawSyscall(syscall.SYS_WRITE, d.dev, uintptr(unsafe.Pointer(&port)), unsafe.Sizeof(port))
	return whole(n, e)
}

func (d *directEvents) notify(port uint32) error {
	if _, _, e := syscall.RawSyscall(syscall.SYS_IOCTL, d.dev, ioctlNotify, uintptr(unsafe.Pointer(&port))); e != 0 {
		return e
	}
	return nil
}

// whole returns the error of a system call that has passed n bytes of a port number.
func whole(n uintptr, e syscall.Errno) error {
	switch {
	case e != 0:
		return e
	case n != unsafe.Sizeof(uint32(0)):
		return syscall.EIO
	}
	return nil
}
