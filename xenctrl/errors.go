package xenctrl

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"syscall"
)

// Sentinel errors, to be matched with errors.Is. The first five come from
// [Open], [OpenStore] and [OpenEventChannels] and say, each in its own way,
// why Xen cannot be reached from here; the message of the error that wraps one
// of them names the cure.
var (
	// ErrNotBuilt: the program is for Linux on amd64, but was built without cgo.
	ErrNotBuilt = errors.New("xenctrl: built without cgo")

	// ErrUnsupportedPlatform: the program was built for another system than
	// Linux on amd64.
	ErrUnsupportedPlatform = errors.New("xenctrl: only Linux on amd64 is supported")

	// ErrLibraryNotFound: a Xen library is not installed, or none that fits
	// the running hypervisor.
	ErrLibraryNotFound = errors.New("xenctrl: Xen library not found")

	// ErrNotControlDomain: this is not a control domain (dom0) of Xen.
	ErrNotControlDomain = errors.New("xenctrl: not in a Xen control domain (dom0)")

	// ErrPermission: Xen is there, but the process may not use it. It is also
	// an fs.ErrPermission.
	ErrPermission error = permissionError{}

	// ErrNoDomain: there is no such domain (ESRCH).
	ErrNoDomain = errors.New("xenctrl: no such domain")

	// ErrNotSupported: this hypervisor, or this kind of guest, does not know
	// the operation (ENOSYS, EOPNOTSUPP).
	ErrNotSupported = errors.New("xenctrl: operation not supported by this hypervisor or for this guest")

	// ErrBusy: the resource is taken (EBUSY): for OpenMonitor, another monitor
	// is attached to the domain, or one that was killed still is.
	ErrBusy = errors.New("xenctrl: resource busy")

	// ErrAmbiguousName: more than one domain has the name.
	ErrAmbiguousName = errors.New("xenctrl: more than one domain has this name")

	// ErrClosed: the handle was closed before the call. It is also an
	// os.ErrClosed.
	ErrClosed = fmt.Errorf("xenctrl: handle is closed: %w", os.ErrClosed)

	// ErrRing: the event ring holds values that Xen never writes.
	ErrRing = errors.New("xenctrl: inconsistent event ring")
)

type permissionError struct{}

func (permissionError) Error() string        { return "xenctrl: no permission to use Xen" }
func (permissionError) Is(target error) bool { return target == fs.ErrPermission }

// An Error is the failure of one operation. Err is a [syscall.Errno] if the
// hypervisor or a library refused it; its Unwrap gives Err, and errors.Is
// matches ErrNoDomain, ErrNotSupported, ErrBusy and ErrPermission by errno.
type Error struct {
	Op     string // such as "pause" or "get vcpu context"
	Domain DomID
	VCPU   int // -1: the operation is not about one vCPU
	Err    error
}

// Error implements error.
func (e *Error) Error() string {
	where := ""
	if e.Domain != domNone {
		where = fmt.Sprintf(" of domain %d", e.Domain)
	}
	if e.VCPU >= 0 {
		where += fmt.Sprintf(" vcpu %d", e.VCPU)
	}
	return fmt.Sprintf("xenctrl: %s%s: %v", e.Op, where, e.Err)
}

// Unwrap returns e.Err.
func (e *Error) Unwrap() error { return e.Err }

// Is reports whether target is the sentinel that stands for the errno of e.
func (e *Error) Is(target error) bool {
	errno, ok := e.Err.(syscall.Errno)
	if !ok {
		return false
	}
	switch target {
	case ErrNoDomain:
		return errno == syscall.ESRCH
	case ErrNotSupported:
		return errno == syscall.ENOSYS || errno == syscall.EOPNOTSUPP
	case ErrBusy:
		return errno == syscall.EBUSY
	case ErrPermission:
		return errno == syscall.EPERM || errno == syscall.EACCES
	}
	return false
}

// domNone is the Error.Domain of operations that are not about a domain
// (DOMID_INVALID, xen/include/public/xen.h).
const domNone DomID = 0x7FF4

// A MapError says which frames MapForeign could not map.
type MapError struct {
	Frames []uint64 // the frames that failed
	Errs   []error  // and why, one for each of Frames
}

// Error implements error.
func (e *MapError) Error() string {
	if len(e.Frames) == 1 {
		return fmt.Sprintf("frame %#x: %v", e.Frames[0], e.Errs[0])
	}
	return fmt.Sprintf("frame %#x: %v (and %d more)", e.Frames[0], e.Errs[0], len(e.Frames)-1)
}

// Unwrap returns e.Errs.
func (e *MapError) Unwrap() []error { return e.Errs }

// opErr makes an *Error, or nil for nil.
func opErr(op string, id DomID, vcpu int, err error) error {
	if err == nil {
		return nil
	}
	return &Error{Op: op, Domain: id, VCPU: vcpu, Err: err}
}
