package xenctrl

import (
	"fmt"
	"os"
	"syscall"
	"unsafe"
)

// directEvents makes three calls of libxenevtchn, those that each event takes, as
// the system calls that they are (linux/include/uapi/xen/evtchn.h;
// tools/libs/evtchn/linux.c): of a call through cgo Go's scheduler keeps account,
// which costs several times what the call does. None of the three waits.
type directEvents struct {
	eventLib
	dev uintptr

	priv   *os.File // /dev/xen/privcmd, nil if it can't be opened
	privFD uintptr
	yield  privcmdHypercall
}

// privcmdHypercall is struct privcmd_hypercall (linux/include/uapi/xen/privcmd.h).
type privcmdHypercall struct {
	op  uint64
	arg [5]uint64
}

const (
	// fileEvtchn is the device behind libxenevtchn on Linux.
	fileEvtchn = "/dev/xen/evtchn"

	// ioctlNotify is IOCTL_EVTCHN_NOTIFY: _IOC(_IOC_NONE, 'E', 4,
	// sizeof(struct ioctl_evtchn_notify)), which is a port.
	ioctlNotify = 'E'<<8 | 4 | 4<<16

	// ioctlHypercall is IOCTL_PRIVCMD_HYPERCALL: _IOC(_IOC_NONE, 'P', 0,
	// sizeof(struct privcmd_hypercall)).
	ioctlHypercall = 'P'<<8 | 48<<16

	// hypervisorSchedOp and schedopYield are __HYPERVISOR_sched_op
	// (xen/include/public/xen.h) and SCHEDOP_yield (sched.h).
	hypervisorSchedOp = 29
	schedopYield      = 0
)

// direct returns l with directEvents if its descriptor is the device, and l if it
// isn't, or if that can't be told.
func direct(l eventLib) eventLib {
	fd := l.fd()
	if path, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd)); err != nil || path != fileEvtchn {
		return l
	}
	d := &directEvents{eventLib: l, dev: uintptr(fd)}
	d.yield.op, d.yield.arg[0] = hypervisorSchedOp, schedopYield
	if priv, err := os.OpenFile("/dev/xen/privcmd", os.O_RDWR, 0); err == nil {
		d.priv, d.privFD = priv, priv.Fd()
	}
	return d
}

func (d *directEvents) close() error {
	if d.priv != nil {
		_ = d.priv.Close()
	}
	return d.eventLib.close()
}

// yieldVCPU gives the rest of this vCPU's turn to others that wait for the same
// physical processor. It reports whether that is possible.
func (d *directEvents) yieldVCPU() bool {
	if d.priv == nil {
		return false
	}
	_, _, e := syscall.RawSyscall(syscall.SYS_IOCTL, d.privFD, ioctlHypercall, uintptr(unsafe.Pointer(&d.yield)))
	return e == 0
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

// whole is the error of a system call that passed n bytes of a port.
func whole(n uintptr, e syscall.Errno) error {
	switch {
	case e != 0:
		return e
	case n != unsafe.Sizeof(uint32(0)):
		return syscall.EIO
	}
	return nil
}
