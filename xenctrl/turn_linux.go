package xenctrl

import (
	"os"
	"syscall"
	"unsafe"
)

// privcmdTurn is the turn of a Linux domain: a hypercall through /dev/xen/privcmd,
// of which Go's scheduler isn't told, as it takes less time than that, or as long as
// others run.
type privcmdTurn struct {
	f    *os.File
	fd   uintptr
	call privcmdHypercall // only read
}

// privcmdHypercall is struct privcmd_hypercall (linux/include/uapi/xen/privcmd.h).
type privcmdHypercall struct {
	op  uint64
	arg [5]uint64
}

const (
	// ioctlHypercall is IOCTL_PRIVCMD_HYPERCALL: _IOC(_IOC_NONE, 'P', 0,
	// sizeof(struct privcmd_hypercall)).
	ioctlHypercall = 'P'<<8 | 48<<16

	// hypervisorSchedOp and schedopYield are __HYPERVISOR_sched_op
	// (xen/include/public/xen.h) and SCHEDOP_yield (sched.h).
	hypervisorSchedOp = 29
	schedopYield      = 0
)

// openTurn returns nil if turns can't be given away.
func openTurn() turn {
	f, err := os.OpenFile("/dev/xen/privcmd", os.O_RDWR, 0)
	if err != nil {
		return nil
	}
	return &privcmdTurn{f: f, fd: f.Fd(), call: privcmdHypercall{op: hypervisorSchedOp, arg: [5]uint64{schedopYield}}}
}

func (t *privcmdTurn) yield() bool {
	_, _, e := syscall.RawSyscall(syscall.SYS_IOCTL, t.fd, ioctlHypercall, uintptr(unsafe.Pointer(&t.call)))
	return e == 0
}

func (t *privcmdTurn) close() { _ = t.f.Close() }
