// Package target finds a guest by its name, whatever hypervisor it runs under,
// and shows it in the two ways that the packages above need: as memory and
// registers, which changes nothing, and as a driver for breakpoints.
package target

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/qemu"
	"github.com/vmprobes/vmprobes/internal/sentinel"
	"github.com/vmprobes/vmprobes/internal/xen"
	"github.com/vmprobes/vmprobes/linux"
	"github.com/vmprobes/vmprobes/paging"
	"github.com/vmprobes/vmprobes/xenctrl"
)

// Errors of Open.
var (
	ErrNoName  = errors.New("no guest is named")
	ErrBadName = errors.New("not the name of a guest")
	// ErrNotFound is matched by errors that say the same of other guests than domains.
	ErrNotFound      = sentinel.New("no such domain", fs.ErrNotExist)
	ErrBusy          = errors.New("another tool is attached to the guest")
	ErrControlDomain = errors.New("domain 0 can't be looked into: this program runs in it")
	Err32Bit         = sentinel.New("only 64-bit kernels can be probed", errors.ErrUnsupported)
	ErrNoWatchdog    = errors.New("no watchdog can be had")
	ErrPaused        = errors.New("the domain is paused, and no tool has left it so, as far as is known: unpause it first (xl unpause)")
	ErrPermission    = sentinel.New("this program may not look into the guest", fs.ErrPermission)
)

// Kind is how a guest is virtualized.
type Kind uint8

// Kinds.
const (
	PV Kind = iota + 1
	HVM
	PVH
)

// Info describes a guest.
type Info struct {
	ID     uint16 // Xen's domain id
	Name   string // that no other guest of this host has
	Given  string // name that its configuration gives it, if that is another one
	Kind   Kind
	VCPUs  int    // online
	Kernel string // file, on this machine, that the toolstack booted it from, or ""
}

// A Guest is an opened guest. Nothing has been changed in it.
type Guest interface {
	linux.Machine
	Info() Info
	// Attach prepares the guest for breakpoints. The driver is closed before the
	// Guest.
	Attach(ctx context.Context, s Setup) (Driver, error)
	Close() error
}

// A Driver is a breakpoint driver with what a Session needs besides.
type Driver interface {
	breakpoint.Driver
	Translate(addr uint64) (paging.Translation, error)
	// Write writes in spite of the guest's page protection, with the page tables
	// of cr3, or with the kernel's own if that is 0.
	Write(cr3, addr uint64, b []byte) (n int, err error)
}

// A Freezer is a guest that does better if it stands still while much of its
// memory is read. Calls nest.
type Freezer interface {
	Freeze() error
	Thaw() error
}

// A Holder is a running guest that can be made to stand still, for as long as that takes.
// Calls nest. Close ends them, as far as it can; a process that dies doesn't.
type Holder interface {
	Hold() error
	LetGo() error
}

// Sized is implemented by guests that know how large their physical memory is.
type Sized interface {
	// PhysicalPages returns the number of the last page of physical memory, plus
	// one. There may be holes below it.
	PhysicalPages() (uint64, error)
}

// Setup is what a driver is told when it attaches. All of it is optional.
type Setup struct {
	// Root are the page tables through which kernel memory is reached outside of a hit.
	Root paging.Root
	// Roots returns them where they aren't the kernel's own yet, and whether they stay.
	// Root is 0 then.
	Roots func() (root paging.Root, stays bool)
	// Lookup finds symbols: where the kernel keeps certain things, and what runs when.
	Lookup func(name string) (addr uint64, ok bool)
	// Banner are bytes at BannerAddr that tell this kernel from any other, for guests
	// that may be reset under a probe.
	BannerAddr uint64
	Banner     []byte
	BuildID    string // of the kernel, in hexadecimal digits
	Bits       int    // of the kernel: 32, 64, or 0 if it isn't known
	// Guardian is called before anything in the guest is changed, with the path of its
	// journal, if it has one by which somebody else can repair it: it sees to it that
	// somebody does should this process die.
	Guardian func(journal string) error
	// Ring is called after that for a guest of the monitor route, and has the same one map
	// the guest's ring ([MapRing]). Without it a guest of which more vCPUs wait than the ring
	// has places can't be repaired; every other one can.
	Ring func(journal string) error
	// Watchdog: Guardian has to see to it, too, should this process not answer for so
	// long. Attach fails with ErrNoWatchdog if Guardian isn't to be called.
	Watchdog time.Duration
	Logger   *slog.Logger
}

func (s *Setup) log() *slog.Logger {
	if s.Logger == nil {
		return slog.New(slog.DiscardHandler)
	}
	return s.Logger
}

// wide returns nil if probes in m would be in 64-bit code, as far as can be told. Where no
// kernel is known its processors tell: they have paging (CR0.PG) without long mode
// (EFER.LMA; Intel SDM vol. 3, 2.2.1).
func (s *Setup) wide(m linux.Machine) error {
	const paged, long = 1 << 31, 1 << 10
	switch s.Bits {
	case 64:
		return nil
	case 32:
		return fmt.Errorf("%w: this guest's has 32 bits; it can be looked into (xenaccess)", Err32Bit)
	}
	cpus, err := m.CPUs()
	if err != nil {
		return nil //nolint:nilerr // then that isn't known either
	}
	for i, c := range cpus {
		if !c.PV && c.CR0&paged != 0 && c.EFER&long == 0 {
			return fmt.Errorf("%w: vCPU %d runs 32-bit code, and no kernel was found", Err32Bit, i)
		}
	}
	return nil
}

// schemes are the prefixes of names, as in "xen:a3guest", with what opens such a
// guest by the whole name.
var schemes = map[string]func(ctx context.Context, name string) (Guest, error){
	"xen":          openXen,
	"file":         openFile,
	"qemu":         openQEMU,
	"qemu+monitor": openQEMU,
}

// names says what Open takes.
const names = "want the name or id of a Xen domain (xen:NAME if there is a colon in it), qemu:PATH or qemu:HOST:PORT " +
	"(a gdbstub), qemu+monitor:PATH (a monitor), or file:PATH (a saved memory image)"

// openedKey is the key of a context's opened guest.
type openedKey struct{}

// WithOpened returns a context with which Open returns g, whatever the name. Package
// vmprobes hands its guest to xenaccess in this way, because an exported function would
// need a parameter of a type that nobody outside this module can have. (Package net
// does the same with its traces: internal/nettrace.)
func WithOpened(ctx context.Context, g Guest) context.Context {
	return context.WithValue(ctx, openedKey{}, g)
}

// Open opens the guest that name stands for: "scheme:name", or just the name or
// the numeric id of a Xen domain. Its errors don't begin with the name.
func Open(ctx context.Context, name string) (Guest, error) {
	if g, ok := ctx.Value(openedKey{}).(Guest); ok {
		return g, nil
	}
	if name == "" {
		return nil, ErrNoName
	}
	if err := ctx.Err(); err != nil {
		return nil, context.Cause(ctx)
	}
	scheme, rest, ok := strings.Cut(name, ":")
	open := schemes[scheme]
	switch {
	case ok && open != nil && rest == "":
		return nil, ErrNoName
	case ok && open == nil, !ok && strings.Contains(name, "/"):
		return nil, fmt.Errorf("%w: %s%s", ErrBadName, names, meant(name))
	case !ok:
		open = openXen
	}
	g, err := open(ctx, name)
	if err != nil {
		if !ok {
			hint := meant(name)
			if hint == "" && noXen(err) {
				hint = "; guests without Xen are named qemu:PATH or file:PATH"
			}
			if hint != "" {
				err = fmt.Errorf("%w%s", err, hint)
			}
		}
		return nil, known(name, err)
	}
	return g, nil
}

// noXen reports whether an error says that there is no Xen here.
func noXen(err error) bool {
	for _, e := range []error{xenctrl.ErrNotBuilt, xenctrl.ErrUnsupportedPlatform, xenctrl.ErrLibraryNotFound, xenctrl.ErrNotControlDomain} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// meant returns what to say about a name if there is a file of that name here.
func meant(name string) string {
	st, err := os.Stat(name)
	switch {
	case err != nil:
		return ""
	case st.Mode().IsRegular():
		return fmt.Sprintf("; the file of that name is file:%s", name)
	case st.Mode()&fs.ModeSocket != 0:
		if !strings.Contains(name, "/") {
			name = "./" + name // else it isn't taken for a path
		}
		return fmt.Sprintf("; the socket of that name is qemu:%[1]s or qemu+monitor:%[1]s", name)
	}
	return ""
}

// known makes the errors of all hypervisors alike for errors.Is, each with its own
// text, and takes the guest's name off, which the caller says.
func known(name string, err error) error {
	if err == nil {
		return nil
	}
	for _, k := range []struct{ of, is error }{
		{xen.ErrBusy, ErrBusy}, {qemu.ErrBusy, ErrBusy}, {qemu.ErrAttached, ErrBusy},
		{qemu.ErrPaused, ErrPaused}, {qemu.ErrNoStub, ErrNotFound}, {qemu.ErrTarget, ErrBadName}, {fs.ErrPermission, ErrPermission},
	} {
		if errors.Is(err, k.of) && !errors.Is(err, k.is) {
			err = sentinel.As(err, k.is)
		}
	}
	quoted := strconv.Quote(strings.TrimPrefix(name, "xen:"))
	for _, prefix := range []string{name + ": ", quoted + ": ", "domain " + quoted + ": "} {
		if text, ok := strings.CutPrefix(err.Error(), prefix); ok && text != "" {
			err = sentinel.Say(err, text)
		}
	}
	return err
}
