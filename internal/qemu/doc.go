// Package qemu reaches a guest of QEMU, under TCG or KVM, through the stub for
// GDB that every QEMU has (gdbstub): one socket, no patch, no agent. [Dial]
// gives the guest's memory and the state of its vCPUs; [VM.Attach] a driver for
// breakpoints.
//
// # What is done to the guest
//
// The stub stops the whole VM when somebody connects, and whenever a byte is
// sent while it runs; so memory that is read through it costs a stop of about a
// millisecond, unless it is shared by a file or reached through /proc (see
// [Options]). Breakpoints are the stub's own: under TCG a comparison of
// addresses, which changes no memory; under KVM an int3 in memory, whose exception
// QEMU keeps from the guest, or a debug register. Code is never patched from
// here: TCG wouldn't notice, and the int3 would go to the guest.
//
// A hit stops every vCPU until its handlers are done, and the instruction is then
// executed by its vCPU alone: no execution is missed. One that faults (an access
// to user memory) is a hit again when the guest repeats it. A repeated string
// instruction is one hit; what of it neither faults nor ends it is done here, in
// the guest's memory, and the VM runs every 25 ms until it is over.
//
// When the connection is closed in order, the stub forgets the breakpoints and
// the VM runs. A process that is killed leaves the VM stopped at its next
// breakpoint; the next Dial clears that and lets it run.
//
// Whoever can connect to the stub owns the guest: put its socket in a directory
// that only root can enter.
package qemu
