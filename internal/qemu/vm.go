package qemu

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/paging"
)

// Errors of Dial and of a VM's methods.
var (
	// ErrBusy: a gdbstub, or a monitor, serves one client at a time, and has one.
	ErrBusy = errors.New("another client is connected, and QEMU serves one at a time")
	// ErrNoStub: there is no gdbstub, or no monitor.
	ErrNoStub = errors.New("nobody listens there")
	// ErrNotStub: something else listens there.
	ErrNotStub = errors.New("what listens there is not QEMU's gdbstub; for a monitor's socket use qemu+monitor:PATH")
	// ErrPaused: the VM's owner has paused it.
	ErrPaused = errors.New("the VM is paused: resume it first (virsh resume, or \"cont\" in its monitor)")
	// ErrClosed: the VM is closed.
	ErrClosed = fmt.Errorf("the connection to the VM is closed: %w", fs.ErrClosed)
)

// Info describes a VM.
type Info struct {
	Name    string // QEMU's -name, or ""
	UUID    string // QEMU's -uuid, or ""
	Socket  string // address of the socket that Dial was given
	Version string // QEMU's, as in "7.2.22"
	KVM     bool   // not TCG
	VCPUs   int
	// RAM is where the guest's memory ends, in bytes, or 0 if QEMU didn't say. There may be
	// holes in it.
	RAM uint64
}

// maxVCPUs bounds the number of vCPUs; QEMU's machines have up to 4096.
const maxVCPUs = 4096

// A VM is a connection to a VM's gdbstub. Its methods are safe for concurrent
// use. It implements [paging.Frames].
//
// The VM runs unless somebody holds it ([VM.Freeze]), a stop at a breakpoint
// waits for its answer, or somebody else has stopped it.
//
// A VM knows the protocol, and which breakpoints the stub has. It knows nothing of
// what they are for: it notes a stop at one (trap), and stays stopped until the
// [Driver] has taken and answered it.
type VM struct {
	// These don't change once Dial has returned.
	target   Target
	timeout  time.Duration
	log      *slog.Logger
	layout   *layout
	info     Info
	mread    int  // bytes that one "m" packet may read
	verify   bool // a step may end where it began
	multi    bool // thread ids have a process
	xml      bool // the stub has a target description
	phys     bool // PhyMemMode exists
	hardware bool // Options.DebugRegisters
	mon      *monitor
	direct   directRAM // nil: memory goes through packets
	whole    bool      // direct has all of system
	system   ramMap    // the guest's memory proper

	// mu guards the connection and all fields below, and the Driver's state as well,
	// since a stop and its answer are one exchange on the connection. Only methods of
	// VM change fields of VM. mu is released by changed.Wait, and by await while it
	// reads from the stub of a running VM; reading is set meanwhile.
	mu      sync.Mutex
	changed sync.Cond // signalled when err, running, reading, trap or frozen changes
	stub    *stub
	err     error // why nothing works any more
	gone    bool  // the connection is of no use
	closed  bool

	// Running and stopping (run.go).
	running   bool   // as far as we know
	reading   bool   // somebody receives, without mu
	reads     uint64 // counts those
	breakin   bool   // the VM has been told to stop
	frozen    int    // Freezes without their Thaw
	lingering linger
	served    bool      // stops at breakpoints are for a Driver
	trap      trapState // of the last such stop
	trapOf    string    // its thread

	// What the stub has been told (cpu.go, breaks.go, memory.go).
	threads []string           // by number of vCPU
	current string             // the thread that g, p, P and m are about; "" is unknown
	physNow int                // PhyMemMode, -1 is unknown
	breaks  map[uint64]planted // by address
	stuck   map[uint64]bool    // breakpoints that QEMU has, and the guest has overwritten; or that are removed, and an int3 is to be put back

	// What is known of the guest until it runs again.
	regs   regFile // of the vCPU that stopped
	regsOf string  // its thread, "" if regs are nobody's
	pages  map[paging.Frame][]byte

	ram   ramMap
	ramAt time.Time // when it was last read because of an unknown address
}

// A lostError ends everything: the guest can't be served any more.
type lostError struct{ reason error }

func (e *lostError) Error() string        { return e.reason.Error() }
func (e *lostError) Unwrap() error        { return e.reason }
func (e *lostError) Is(target error) bool { return target == breakpoint.ErrGone }

// Info describes the VM as it was when Dial connected.
func (v *VM) Info() Info { return v.info }

// Packets returns how many packets have been sent, for measurements.
func (v *VM) Packets() uint64 {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.stub.sent
}

// Close removes every breakpoint, lets the VM run and leaves it. A VM that
// somebody else has paused meanwhile stays paused.
func (v *VM) Close() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.closed {
		return nil
	}
	v.closed = true
	var err error
	if !v.gone {
		v.frozen++ // it must not run again in between
		if v.err == nil {
			err = v.halt()
		}
		if !v.gone {
			err = errors.Join(err, v.detach())
		}
	}
	if errors.Is(err, breakpoint.ErrGone) {
		err = nil
	}
	v.stub.c.Close()
	v.gone = true
	v.lose(ErrClosed)
	if v.direct != nil {
		err = errors.Join(err, v.direct.close())
	}
	if v.mon != nil {
		err = errors.Join(err, v.mon.stopStub())
		v.mon.close()
		v.mon = nil
	}
	return err
}

// detach clears the stopped VM and, unless somebody else has stopped it, lets it
// run. v.mu is held.
func (v *VM) detach() error {
	errs := v.liftAll(v.peek)
	if v.gone || v.err != nil {
		// Without "D" a VM that somebody else has paused stays so.
		return errs
	}
	packet := "D"
	if v.multi {
		// Process 1 is the first one, if the threads aren't known yet.
		pid := "1"
		if len(v.threads) > 0 {
			pid, _, _ = strings.Cut(strings.TrimPrefix(v.threads[0], "p"), ".")
		}
		packet = "D;" + pid
	}
	return errors.Join(errs, v.callOK(packet))
}
