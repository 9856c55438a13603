// Package breakpoint is the policy of vmprobes: where a breakpoint may stand,
// what happens when a vCPU meets one, and how the guest gets past it and, in the
// end, gets every byte back. It knows nothing of hypervisors: a [Driver] is one
// guest under one of them.
//
// # A hit
//
// A vCPU that executes an armed address stops. The pre handlers of all probes
// there run, in order of registration; the engine then has the original
// instruction executed, in the first of these ways that is possible, and the
// post handlers run:
//
//  1. emulated here ([x86.Insn.Emulate]): nothing in the guest is touched;
//  2. out of line: the vCPU runs a copy that stands in a slot of dead code,
//     followed by a breakpoint that brings it back;
//  3. in place, under a single step, while every other vCPU is held.
//
// In the first two the breakpoint stays armed throughout, so that no other
// vCPU can slip past it. Under a driver with [Caps].CheapStep it does so always,
// and the order is another one: see there.
//
// # What is owed
//
// A call of the driver that must not fail is made again a few times. If an answer
// fails all the same its vCPU is still stopped: the stop stays owed, and Serve and
// Close make the answer again until it succeeds. A guest is never left behind
// because of a failed call, and Close does not report success while anything of
// ours is left in it.
//
// # A return
//
// A return probe follows the calls that begin at its address: [Returns]. The engine knows
// a call by where on the stack its return address is, and notices its return by a
// breakpoint at that address or at the function's last instructions, which has no probe
// of its own.
//
// # Later
//
// Memory-access traps and altp2m views are further Reasons of a Stop and another
// InsertBreak.
package breakpoint

import (
	"context"
	"errors"

	"github.com/vmprobes/vmprobes/internal/x86"
)

// A Reason says why a vCPU stopped.
type Reason uint8

// Reasons.
const (
	// Hit is a breakpoint instruction, ours or the guest's: Regs.IP is its address.
	Hit Reason = iota + 1
	// Stepped is the end of a StepOver: Regs.IP is where the instruction led.
	Stepped
)

// A Stop is a vCPU that stopped. It stays so until the Stop is answered by
// exactly one of Resume, StepOn, StepOver and Reinject. An answer that fails was
// not given: the vCPU is still stopped, and it, or another one, can be made again.
type Stop struct {
	VCPU   int
	Reason Reason
	// User says that the vCPU was in user mode, where no breakpoint of ours is.
	User bool
	// Addr is, of a Stepped stop, the address that StepOver was given, if the driver
	// can have several under way; else 0.
	Addr uint64
	// Seq tells the stops of a vCPU apart, for a driver whose answers may fail and be given
	// all the same: the vCPU may have stopped anew before it is tried again.
	Seq  uint64
	Regs x86.Regs
}

// Caps is what a driver can do for one guest.
type Caps struct {
	VCPUs  int  // vCPU numbers are below this
	Step   bool // StepOver works now: every other vCPU can be held
	Hidden bool // breakpoints don't show in the guest's memory
	// Queue is how many stops can be announced before one is answered; the others
	// wait for room. 0: all.
	Queue int
	// LA57 says that virtual addresses have 57 bits instead of 48.
	LA57 bool
	// CheapStep says that a step leaves every breakpoint armed, that a fault in it
	// is the guest's as any other, and that it costs less than to write a register.
	// So instructions are emulated here only if nothing but IP changes, none is
	// copied out of line, and where nobody wants to see the result it is made by
	// StepOn, without a Stepped stop.
	CheapStep bool
	// AllStop says that no vCPU runs while one is stopped.
	AllStop bool
}

// A Driver is one guest under one hypervisor.
//
// Wait is called by one goroutine at a time; the answers come from that same
// goroutine; everything else may be called at any time from any goroutine.
// Addresses are guest virtual. An error that wraps ErrGone means that the guest
// no longer exists.
type Driver interface {
	Caps() Caps

	// Read reads memory with the page tables of cr3, or with the kernel's own
	// if cr3 is 0; n is how far it came before an error. Store writes as the vCPU
	// itself would: it fails, having done nothing, where the store would fault or
	// change a page-table bit. An error that wraps ErrFault or ErrNotMapped is the
	// guest's doing: the vCPU's own access would fault. Any other may go away.
	Read(cr3, addr uint64, b []byte) (n int, err error)
	Store(cr3, addr uint64, b []byte) error
	// Patch writes kernel text in spite of its protection. The bytes are dead
	// code: no vCPU executes them.
	Patch(addr uint64, b []byte) error

	// InsertBreak plants a breakpoint on the instruction in at addr. It fails
	// with ErrTextChanged if the guest has something else there.
	InsertBreak(addr uint64, in *x86.Insn) error
	// RemoveBreak restores the bytes. If the guest has overwritten the
	// breakpoint, or any other byte of the instruction, they are left alone, and
	// the error is ErrTextChanged. A vCPU that the breakpoint has stopped already is
	// still reported.
	RemoveBreak(addr uint64) error

	// Freeze stops every vCPU until the Thaw that belongs to it. They nest.
	Freeze() error
	Thaw() error

	// Wait returns the next vCPU that stopped. One that has stopped already is
	// returned even if ctx is done. A *ChangedError says that breakpoints are out; no
	// vCPU waits for an answer because of it.
	Wait(ctx context.Context, s *Stop) error

	// Resume lets the vCPU go on with s.Regs.
	Resume(s *Stop) error
	// StepOn has the vCPU execute in at s.Regs.IP, alone, with s.Regs, and go on.
	// Only a driver with CheapStep has it.
	StepOn(s *Stop, in *x86.Insn) error
	// StepOver executes the original instruction under the breakpoint at addr,
	// with s.Regs, while no other vCPU can run; they run again when the Stepped
	// stop which follows is answered.
	StepOver(s *Stop, addr uint64) error
	// Reinject gives the guest the breakpoint exception it would have had.
	Reinject(s *Stop) error

	// Close leaves the guest. It is called between Freeze and Thaw, when every
	// stop has been answered, and undoes all Freezes as well. If it fails it may be
	// called again, and does what is still to be done.
	Close() error
}

// A ChangedError says that the guest has other code at breakpoints now, which have been
// taken out. It wraps Err, which wraps ErrTextChanged.
type ChangedError struct {
	Addrs []uint64 // of the breakpoints
	Err   error
}

// Error implements error.
func (e *ChangedError) Error() string { return e.Err.Error() }

// Unwrap returns e.Err.
func (e *ChangedError) Unwrap() error { return e.Err }

// Errors of drivers and engine.
var (
	ErrGone        = errors.New("the guest is gone")
	ErrTextChanged = errors.New("the guest changed its code at the probe")
	ErrForeign     = errors.New("a breakpoint of the guest's own, or of another tool, is there")
	ErrFault       = errors.New("the access would fault in the guest")
	ErrNotMapped   = errors.New("address not mapped")
	ErrBadInsn     = errors.New("no valid instruction there")
	ErrOverlap     = errors.New("inside the instruction of another probe")
	ErrNoWayPast   = errors.New("the instruction can be neither emulated nor stepped safely")
	ErrBadRegs     = errors.New("no vCPU can have these registers")
	// ErrQueued is an error of Close: a vCPU has stopped, or may have, and found no room to
	// announce that. It does so when the guest runs.
	ErrQueued     = errors.New("a vCPU waits for room to announce its stop")
	ErrUnanswered = errors.New("a vCPU is still stopped")
	ErrClosed     = errors.New("engine is closed")
)
