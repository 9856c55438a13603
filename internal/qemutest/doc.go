// Package qemutest starts QEMU for tests: a micro-kernel made here, which counts
// what it executes, or a Linux guest with the lab's init.
//
// What it tells of a guest comes from the guest's memory, shared by a file, and
// from QEMU's monitor, so it is independent of the gdbstub under test.
package qemutest
