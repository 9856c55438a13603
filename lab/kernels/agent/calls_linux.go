//go:build amd64 || 386

package main

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// other is that of the child that isn't root.
var other = syscall.Credential{Uid: 1000, Gid: 1001}

// openat opens a file with one system call, and nothing of the runtime's around it.
func openat(name *byte) (fd int, ok bool) {
	dir := unix.AT_FDCWD
	r, _, errno := unix.RawSyscall6(unix.SYS_OPENAT, uintptr(dir), uintptr(unsafe.Pointer(name)), unix.O_RDONLY, 0, 0, 0)
	return int(r), errno == 0
}

// setName is prctl(PR_SET_NAME), of the calling thread.
func setName(name *byte) {
	_, _, _ = unix.RawSyscall6(unix.SYS_PRCTL, unix.PR_SET_NAME, uintptr(unsafe.Pointer(name)), 0, 0, 0, 0)
}

// address is where a slice begins, which is not moved.
func address(b []byte) uint64 { return uint64(uintptr(unsafe.Pointer(&b[0]))) }
