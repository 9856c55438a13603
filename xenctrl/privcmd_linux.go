package xenctrl

import (
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// privcmd makes hypercalls through Linux's /dev/xen/privcmd. Go's scheduler isn't
// told of them: telling it would take longer than most calls, and a yield lasts only
// while others run.
type privcmd struct {
	f  *os.File
	fd uintptr
}

// privcmdHypercall is struct privcmd_hypercall (linux/include/uapi/xen/privcmd.h).
type privcmdHypercall struct {
	op  uint64
	arg [5]uint64
}

const (
	filePrivcmdDevice = "/dev/xen/privcmd"

	// ioctlHypercall is IOCTL_PRIVCMD_HYPERCALL: _IOC(_IOC_NONE, 'P', 0,
	// sizeof(struct privcmd_hypercall)).
	ioctlHypercall = 'P'<<8 | 48<<16

	// fileHypercallMemory gives memory that the hypervisor can use at any time, as the
	// kernel never moves it nor takes it away (linux/drivers/xen/privcmd-buf.c, since
	// Linux 4.18).
	fileHypercallMemory = "/dev/xen/hypercall"
)

// openPrivcmd returns nil if hypercalls can't be made.
func openPrivcmd() *privcmd {
	f, err := os.OpenFile(filePrivcmdDevice, os.O_RDWR, 0)
	if err != nil {
		return nil
	}
	return &privcmd{f: f, fd: f.Fd()}
}

func (p *privcmd) close() { _ = p.f.Close() }

// hypercall makes one. Its arguments are no pointers to Go's memory.
func (p *privcmd) hypercall(op, arg0 uint64) error {
	call := privcmdHypercall{op: op, arg: [5]uint64{arg0}}
	if _, _, e := syscall.RawSyscall(syscall.SYS_IOCTL, p.fd, ioctlHypercall, uintptr(unsafe.Pointer(&call))); e != 0 {
		return e
	}
	return nil
}

// yield implements turn.
func (p *privcmd) yield() bool { return p.hypercall(hypervisorSchedOp, schedopYield) == nil }

// hypercallMemory returns size bytes that the hypervisor can use.
func hypercallMemory(size int) ([]byte, error) {
	fd, err := unix.Open(fileHypercallMemory, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer func() { _ = unix.Close(fd) }() // the mapping keeps the file
	return unix.Mmap(fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
}

// goDirect makes the calls of a hit without the libraries, where that is possible.
func (h *Handle) goDirect() {
	p := openPrivcmd()
	if p == nil {
		return
	}
	h.turn = p
	mem, err := hypercallMemory(domctlMemory)
	if err != nil {
		return
	}
	d, err := newDomctls(h.l, p, mem)
	if err != nil {
		_ = unix.Munmap(mem)
		return
	}
	h.l = d
}
