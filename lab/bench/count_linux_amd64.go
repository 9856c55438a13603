package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// counters counts the system calls of a process, by the kernel's own tracepoint:
// all of them, and ioctl(2) alone, of which each is a hypercall here (privcmd,
// and the notify of /dev/xen/evtchn).
type counters struct {
	id uint64 // of raw_syscalls:sys_enter
}

func newCounters() (*counters, error) {
	dir, err := os.MkdirTemp("", "trace-*")
	if err != nil {
		return nil, err
	}
	if err := unix.Mount("tracefs", dir, "tracefs", 0, ""); err != nil {
		return nil, fmt.Errorf("mount tracefs: %w", err)
	}
	defer func() { _ = unix.Unmount(dir, 0) }()
	b, err := os.ReadFile(filepath.Join(dir, "events/raw_syscalls/sys_enter/id"))
	if err != nil {
		return nil, err
	}
	id, err := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
	return &counters{id}, err
}

// counts is open for the threads that a process has, and those it starts. Counters
// of the thread that opened it come last.
type counts struct{ list []*counter }

type counter struct {
	fd    int
	ioctl bool
	n     uint64
}

func (c *counters) of(pid int) (_ *counts, err error) {
	n := new(counts)
	if c == nil {
		return n, nil
	}
	defer func() {
		if err != nil {
			n.close()
		}
	}()
	tasks, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	if err != nil {
		return nil, err
	}
	var tids []int
	self := unix.Gettid()
	for _, t := range tasks {
		if tid, err := strconv.Atoi(t.Name()); err == nil && tid != self {
			tids = append(tids, tid)
		}
	}
	if pid == os.Getpid() {
		tids = append(tids, self)
	}
	for _, tid := range tids {
		for _, ioctl := range []bool{true, false} {
			fd, err := unix.PerfEventOpen(&unix.PerfEventAttr{
				Type: unix.PERF_TYPE_TRACEPOINT, Config: c.id, Size: uint32(unsafe.Sizeof(unix.PerfEventAttr{})),
				Bits: unix.PerfBitDisabled | unix.PerfBitInherit,
			}, tid, -1, -1, unix.PERF_FLAG_FD_CLOEXEC)
			if errors.Is(err, unix.ESRCH) {
				continue // the thread has ended
			}
			if err != nil {
				return nil, fmt.Errorf("count system calls: %w", err)
			}
			n.list = append(n.list, &counter{fd: fd, ioctl: ioctl})
			if !ioctl {
				continue
			}
			filter, err := unix.BytePtrFromString(fmt.Sprintf("id == %d", unix.SYS_IOCTL))
			if err != nil {
				return nil, err
			}
			if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.PERF_EVENT_IOC_SET_FILTER, uintptr(unsafe.Pointer(filter))); e != 0 {
				return nil, fmt.Errorf("count ioctls: %w", e)
			}
		}
	}
	return n, nil
}

// start and stop bound what read returns. What they do themselves is not in it:
// counters of this very thread are read last at the start and first at the end.
func (n *counts) start() {
	for _, c := range n.list {
		_ = unix.IoctlSetInt(c.fd, unix.PERF_EVENT_IOC_ENABLE, 0)
	}
	for _, c := range n.list {
		c.n = c.value()
	}
}

func (n *counts) stop() {
	for _, c := range slices.Backward(n.list) {
		c.n = c.value() - c.n
	}
}

func (c *counter) value() uint64 {
	var b [8]byte
	if k, err := unix.Read(c.fd, b[:]); err != nil || k != len(b) {
		return 0
	}
	return binary.LittleEndian.Uint64(b[:])
}

func (n *counts) read() (all, ioctls uint64) {
	for _, c := range n.list {
		if c.ioctl {
			ioctls += c.n
		} else {
			all += c.n
		}
	}
	return all, ioctls
}

func (n *counts) close() {
	for _, c := range n.list {
		_ = unix.Close(c.fd)
	}
	n.list = nil
}
