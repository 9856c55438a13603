package vmprobes

import (
	"errors"
	"io/fs"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/cstring"
	"github.com/vmprobes/vmprobes/internal/sentinel"
	"github.com/vmprobes/vmprobes/internal/target"
	"github.com/vmprobes/vmprobes/internal/x86"
	"github.com/vmprobes/vmprobes/internal/xen"
	"github.com/vmprobes/vmprobes/linux"
	"github.com/vmprobes/vmprobes/sysmap"
	"github.com/vmprobes/vmprobes/xenctrl"
)

// Errors in the arguments of Register, found before anything is touched.
var (
	ErrNilProbe      = errors.New("probe is nil")
	ErrNoDomain      = target.ErrNoName // by a name, DomainName or DomainID
	ErrTwoDomains    = errors.New("both DomainID and DomainName are set")
	ErrNoAddress     = errors.New("neither Addr nor Symbol is set")
	ErrTwoAddresses  = errors.New("both Addr and Symbol are set")
	ErrControlDomain = target.ErrControlDomain
	ErrDomainPaused  = target.ErrPaused
	ErrRegistered    = sentinel.New("the probe is registered", fs.ErrExist)
	ErrNotRegistered = errors.New("the probe is not registered")
	ErrBadFilter     = errors.New("bad filter")
)

// Errors caused by the host, the hypervisor or other tools. They are the same for all
// guests; each says what is wrong with the one at hand.
var (
	// ErrBadName: the name is not one of a guest.
	ErrBadName = target.ErrBadName
	// ErrDomainNotFound: there is no such domain, gdbstub or file.
	ErrDomainNotFound = target.ErrNotFound
	// ErrPermission: the user lacks rights to the guest. It is also an
	// fs.ErrPermission.
	ErrPermission = target.ErrPermission
	// ErrImage: the guest is a saved image. Nothing runs in it, so it has no probes.
	ErrImage = target.ErrImage
	// Err32Bit: the guest's kernel is a 32-bit one, which has no probes. It is also an
	// errors.ErrUnsupported.
	Err32Bit = target.Err32Bit
	// ErrDomainGone: the domain was destroyed or has shut down, or its kernel isn't there any
	// more, as after a reset.
	ErrDomainGone = breakpoint.ErrGone
	// ErrBusy: another tool debugs or monitors the guest.
	ErrBusy = target.ErrBusy
	// ErrDetached: another debugger has come to a PV guest, and with its going detached
	// the Session, which has attached again. Hits may have been lost to the guest.
	ErrDetached = xen.ErrDetached
	// ErrNoGDBSX: this Xen can't stop a PV guest at a breakpoint.
	ErrNoGDBSX = xen.ErrNoGDBSX
	// ErrNoMonitor: this Xen can't stop an HVM or PVH guest at a breakpoint.
	ErrNoMonitor = xen.ErrNoMonitor
	// ErrNoWatchdog: Options.Watchdog is out of range, or nobody is there to be it.
	ErrNoWatchdog = target.ErrNoWatchdog
	// ErrClosed: the Session is closed.
	ErrClosed = sentinel.New("the session is closed", fs.ErrClosed)
	// ErrLooping: a Loop or Hits of the Session is running already.
	ErrLooping = errors.New("the session's loop is running already")
	// ErrUnanswered: Close could not give the guest all of its bytes or vCPUs back.
	ErrUnanswered = breakpoint.ErrUnanswered
	// ErrBadRegisters: a handler left registers that no vCPU can have.
	ErrBadRegisters = breakpoint.ErrBadRegs
	// ErrInterrupted: a signal ended what Register or Run had begun; the probe is
	// unregistered.
	ErrInterrupted = errors.New("interrupted by a signal")
	// ErrTooOften: the probe has had more hits in a second than Limit.PerSecond allows.
	ErrTooOften = breakpoint.ErrTooOften

	// ErrNotBuilt, ErrUnsupportedPlatform, ErrLibraryNotFound and
	// ErrNotControlDomain are why Xen can't be reached from here.
	ErrNotBuilt            = xenctrl.ErrNotBuilt
	ErrUnsupportedPlatform = xenctrl.ErrUnsupportedPlatform
	ErrLibraryNotFound     = xenctrl.ErrLibraryNotFound
	ErrNotControlDomain    = xenctrl.ErrNotControlDomain
)

// Errors of addresses and symbols.
var (
	// ErrNoKernel: no Linux kernel was found in the guest's memory.
	ErrNoKernel = linux.ErrNoKernel
	// ErrNoSymbols: the Session has no symbol table.
	ErrNoSymbols = linux.ErrNoSymbols
	// ErrSymbolNotFound and ErrAmbiguous: the table has no such symbol, or several.
	ErrSymbolNotFound = sysmap.ErrNotFound
	ErrAmbiguous      = sysmap.ErrAmbiguous
	// ErrWrongSymbols: the table is of another kernel than the one that runs.
	ErrWrongSymbols = linux.ErrWrongSymbols
	// ErrWrongTypes: the types of a file are of another kernel than the one that runs.
	ErrWrongTypes = linux.ErrWrongTypes
	// ErrOffset: Probe.Offset leads out of the function that Probe.Symbol names.
	ErrOffset = errors.New("the offset is beyond the function")
	// ErrNotBoundary: the address is inside an instruction.
	ErrNotBoundary = x86.ErrNotBoundary
	// ErrNoTerminator: a string is longer than the limit.
	ErrNoTerminator = cstring.ErrNoTerminator
	// ErrNotMapped: the guest has nothing at the address.
	ErrNotMapped = breakpoint.ErrNotMapped
	// ErrNoWayPast: no way is safe to execute the instruction under the probe.
	ErrNoWayPast = breakpoint.ErrNoWayPast
	// ErrNotProbeable: the guest's own kprobes would refuse the address.
	ErrNotProbeable = linux.ErrNotProbeable
	// ErrNoPrototype: the guest's kernel doesn't tell what a function's arguments are.
	ErrNoPrototype = linux.ErrNoPrototype
	// ErrForeign: a breakpoint that isn't ours is at the address.
	ErrForeign = breakpoint.ErrForeign
	// ErrTextChanged: the guest changed its code at the probe while it was armed, as its
	// own ftrace does. The probe is out: a warning is logged within seconds, its Flags lack
	// FlagArmed, and Unregister and Close return this. Other probes go on; a Loop without any
	// returns it.
	ErrTextChanged = breakpoint.ErrTextChanged
	// ErrOverlap: the address is inside the instruction of another probe.
	ErrOverlap = breakpoint.ErrOverlap
)

// Errors of return probes, and of early returns.
var (
	// ErrNotEntry: the address isn't that of a function's first instruction.
	ErrNotEntry = linux.ErrNotEntry
	// ErrNeverReturns: the function doesn't come back to its caller.
	ErrNeverReturns = linux.ErrNeverReturns
	// ErrStackSwitch: the function leaves on another stack than it was entered on.
	ErrStackSwitch = linux.ErrStackSwitch
	// ErrNoExits: where the function ends isn't known, or can't be probed.
	ErrNoExits = linux.ErrNoExits
	// ErrNotInjectable: the guest's kernel doesn't list the function among those that may be
	// made to fail; ErrNoErrorInjection, which wraps it: it has no list.
	ErrNotInjectable    = linux.ErrNotInjectable
	ErrNoErrorInjection = linux.ErrNoErrorInjection
	// ErrReturnValue: the function doesn't fail with this value.
	ErrReturnValue = linux.ErrReturnValue
	// ErrReturnAddress: what is where a return address should be is none.
	ErrReturnAddress = linux.ErrReturnAddress
	// ErrShadowStack: a return address can't be skipped, as the vCPU may have another copy of it.
	ErrShadowStack = errors.New("the vCPU may have a shadow stack")
	// ErrUnwound: the guest has left the function without returning from it.
	ErrUnwound = breakpoint.ErrUnwound
	// ErrTaskGone: the task that made the call has ended.
	ErrTaskGone = breakpoint.ErrTaskGone
	// ErrNotServed: the call returned while no Loop ran.
	ErrNotServed = breakpoint.ErrNotServed
)

// An Error is a failed operation.
type Error struct {
	Op     string // "open", "register", "loop", "read" …
	Domain string // as the caller named it
	Probe  string // Symbol+Offset or the address, if the operation is about a probe
	Err    error
}

// Error implements error.
func (e *Error) Error() string {
	s := "vmprobes: " + e.Op
	if e.Domain != "" {
		s += " " + e.Domain
	}
	if e.Probe != "" {
		s += " " + e.Probe
	}
	return s + ": " + e.Err.Error()
}

// Unwrap returns e.Err.
func (e *Error) Unwrap() error { return e.Err }
