package linux

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vmprobes/vmprobes/internal/cstring"
	"github.com/vmprobes/vmprobes/ktype"
	"github.com/vmprobes/vmprobes/paging"
	"github.com/vmprobes/vmprobes/sysmap"
)

// Errors.
var (
	// ErrNoKernel: the page tables in use map no Linux kernel. It is also what the
	// methods of a nil Kernel return.
	ErrNoKernel = errors.New("no Linux kernel found: has the guest booted?")
	// ErrNoSymbols: the kernel has no symbol table, or one of an unknown layout.
	ErrNoSymbols = errors.New("the kernel's symbols are not known")
	// ErrWrongSymbols: the symbols of a file are those of another kernel.
	ErrWrongSymbols = errors.New("the symbols are not those of the running kernel")
	// ErrNoTypes: the kernel carries no type information, and none was given.
	ErrNoTypes = errors.New("the kernel's types are not known")
	// ErrWrongTypes: the types of a file are those of another kernel, by its build id,
	// its version string, or what is known to be in the running kernel's memory.
	ErrWrongTypes = errors.New("the types are not those of the running kernel")
	// ErrNoProcess: there is no such process.
	ErrNoProcess = errors.New("no such process")
	// ErrNoMemory: a process has no memory of its own: it is a kernel thread or a
	// zombie.
	ErrNoMemory = errors.New("process has no user memory")
)

// A Machine is the guest as its hypervisor, or a file, shows it.
type Machine interface {
	paging.Frames
	// CPUs returns the state of the vCPUs that are online, in order.
	CPUs() ([]CPU, error)
}

// A CPU is what Discover uses of a vCPU's state.
type CPU struct {
	// CR0, CR3, CR4 and EFER are the control registers. For a PV guest CR3 is
	// that of its kernel (ctrlreg[3] of struct vcpu_guest_context), and the others
	// may be zero: Xen sets them.
	CR0, CR3, CR4, EFER uint64
	// PV says that page tables hold machine frames and that CR0, CR4 and EFER are
	// the hypervisor's.
	PV bool
	// Entries are addresses at which the guest has told its processor to enter
	// the kernel: handlers of traps and system calls. They confirm what was found.
	Entries []uint64
}

// Options configures Discover. The zero value, and nil, mean defaults.
type Options struct {
	// Symbols, if not nil, replaces the guest's own symbol table. The addresses
	// may be those the kernel was linked at.
	Symbols *sysmap.Map
	// SymbolFiles, if not nil, returns files that may have the symbols of a kernel
	// that carries none itself, best first (see [sysmap.ParseFile]). The first
	// that fits is used. The release is the kernel's ("6.1.0-56-amd64") or "". It
	// comes from the guest, and is safe in a path: it has only letters, digits and
	// "._+~-", and doesn't begin with a dot.
	SymbolFiles func(release string) []string
	// Types, if not nil, replaces the guest's own type information.
	Types *ktype.Types
	// Offsets are those that XenAccess' and LibVMI's configuration files have, by
	// their keys: linux_tasks, linux_mm, linux_pid and linux_name in struct
	// task_struct, linux_pgd and linux_addr (start_code) in struct mm_struct.
	// They are used if the kernel has no type information, and if they fit.
	Offsets map[string]uint64
	// Cache is a directory for what is expensive to work out. Empty means none.
	Cache string
	// Logger receives debug records. Nil discards them.
	Logger *slog.Logger
}

// A Kernel is a running Linux kernel. Its methods are safe for concurrent use if
// its Machine is.
//
// A nil Kernel is one that isn't known. Its methods return ErrNoKernel, or the zero
// value if they return no error, so that a chain of calls fails at its end. Only
// ExpectedFault differs: of an unknown kernel any fault may be expected.
type Kernel struct {
	machine Machine
	mem     *paging.Memory
	root    atomic.Uint64 // see Root
	bits    int           // 32 or 64
	log     *slog.Logger
	ranges  []sysmap.Range
	syms    *sysmap.Map
	banner  string
	// bannerAt is where the banner is.
	bannerAt uint64
	buildID  string

	rungMu sync.Mutex
	rungs  []Rung

	givenTypes *ktype.Types
	typesWhy   string // why givenTypes are those of this kernel
	offsets    map[string]uint64
	typesOnce  sync.Once
	types      *ktype.Types
	typesErr   error

	modMu    sync.Mutex
	mods     []Module // whose symbols are in withMods
	withMods *sysmap.Map

	settling sync.Mutex
	lookedAt time.Time   // when settle did last
	borrowed atomic.Bool // root isn't the kernel's own; it gets one when it boots
	builder  uint64      // the page tables that it begins with

	idleAddr    atomic.Uint64          // of the idle task, if no symbol says
	currentAddr atomic.Pointer[uint64] // of current_task, likewise

	safeMu  sync.Mutex
	safe    *places     // of the kernel's text; nil until it has been read
	booted  atomic.Bool // system_state was seen to be beyond booting
	started atomic.Bool // the machine was seen to have run, or can't tell
	overlay atomic.Pointer[func(addr uint64, b []byte)]

	taskRefs    atomic.Pointer[taskRefs] // how a TaskRef is read; nil until one was
	trampOnce   sync.Once
	trampolines []span // that replace return addresses
}

// A Rung is one step of Discover.
type Rung struct {
	Name  string // "page tables", "symbols", …
	Found string // what was found, or ""
	Why   string // why it is believed
	Err   error  // why nothing was found
	// Source is what it comes from, if that isn't the guest itself.
	Source Source
}

// A Source is what a finding comes from.
type Source uint8

// Sources.
const (
	FromGuest Source = iota // the guest says so itself
	Inferred                // from how things in the guest look
	FromFile                // a file, of symbols, types or configuration
)

// Note reports whether a rung says that something was inferred or comes from a file.
// Programs should tell that beside what they show.
func (r Rung) Note() bool { return r.Err == nil && r.Source != FromGuest }

// String returns the rung as one line, of printable ASCII.
func (r Rung) String() string {
	if r.Err != nil {
		return fmt.Sprintf("%-12s not found: %s", r.Name+":", printable(strings.ReplaceAll(r.Err.Error(), "\n", "; ")))
	}
	if r.Why == "" {
		return fmt.Sprintf("%-12s %s", r.Name+":", r.Found)
	}
	return fmt.Sprintf("%-12s %s; %s", r.Name+":", r.Found, r.Why)
}

// Explain returns what has been found so far, and why it is believed. Types are
// looked for when they are first needed.
func (k *Kernel) Explain() []Rung {
	if k == nil {
		return nil
	}
	k.rungMu.Lock()
	defer k.rungMu.Unlock()
	return append([]Rung(nil), k.rungs...)
}

func (k *Kernel) explain(name string, err error, why, format string, args ...any) {
	k.explainFrom(FromGuest, name, err, why, format, args...)
}

func (k *Kernel) explainFrom(source Source, name string, err error, why, format string, args ...any) {
	r := Rung{Name: name, Why: why, Err: err, Source: source}
	if err == nil {
		r.Found = fmt.Sprintf(format, args...)
	}
	k.rungMu.Lock()
	if i := slices.IndexFunc(k.rungs, func(r Rung) bool { return r.Name == name }); i >= 0 && (name == "probeable" || k.rungs[i].Err != nil) {
		k.rungs[i] = r // it was read again
	} else {
		k.rungs = append(k.rungs, r)
	}
	k.rungMu.Unlock()
	if r.Source == Inferred && r.Err == nil {
		// Whatever rests on it does so unseen.
		k.log.Warn("inferred, as the guest doesn't tell", "what", name, "found", r.Found, "why", why)
		return
	}
	k.log.Debug("discover", "rung", name, "found", r.Found, "why", why, "err", err)
}

// Symbols returns the kernel's symbols, at the addresses where they are now.
// Those of modules aren't among them: see [Kernel.AllSymbols].
func (k *Kernel) Symbols() *sysmap.Map {
	if k == nil {
		return nil
	}
	return k.syms
}

// Banner returns the kernel's version string, "Linux version …".
func (k *Kernel) Banner() string {
	if k == nil {
		return ""
	}
	return k.banner
}

// Release returns what uname -r prints, the third word of the banner.
func (k *Kernel) Release() string {
	return release(k.Banner())
}

func release(banner string) string {
	if f := strings.Fields(banner); len(f) > 2 {
		return f[2]
	}
	return ""
}

// BuildID returns the kernel's build id in hexadecimal digits, or "" if it has
// none.
func (k *Kernel) BuildID() string {
	if k == nil {
		return ""
	}
	return k.buildID
}

// Bits returns the width of the kernel, 32 or 64.
func (k *Kernel) Bits() int {
	if k == nil {
		return 0
	}
	return k.bits
}

// Root returns the page tables of the kernel itself, which live as long as it. Those of
// a kernel that has not run when it was discovered ([Starter]) are other ones from some
// moment of its boot on: see [Kernel.Settled].
func (k *Kernel) Root() paging.Root {
	if k == nil {
		return 0
	}
	if k.borrowed.Load() {
		k.settle()
	}
	return paging.Root(k.root.Load())
}

// Memory returns the guest's memory behind page tables.
func (k *Kernel) Memory() *paging.Memory {
	if k == nil {
		return nil
	}
	return k.mem
}

// Read reads kernel memory. An error means that not all of it could be read.
func (k *Kernel) Read(addr uint64, b []byte) error {
	if k == nil {
		return ErrNoKernel
	}
	_, err := k.mem.Read(k.Root(), paging.VAddr(addr), b)
	return err
}

// maxString bounds strings that are read from the guest.
const maxString = 4096

// ReadString reads a NUL-terminated string from kernel memory. If none of the first
// limit bytes is a NUL, or of the first 4096, these bytes are returned with an error.
// They are the guest's: quote them before they go to a terminal.
func (k *Kernel) ReadString(addr uint64, limit int) (string, error) {
	if k == nil {
		return "", ErrNoKernel
	}
	return cstring.Read(func(addr uint64, b []byte) (int, error) {
		return k.mem.Read(k.Root(), paging.VAddr(addr), b)
	}, addr, min(limit, maxString))
}

// pointer reads a pointer of the kernel's own width.
func (k *Kernel) pointer(addr uint64) (uint64, error) {
	return readPointer(k.Read, addr, k.bits)
}

func readPointer(read func(uint64, []byte) error, addr uint64, bits int) (uint64, error) {
	var b [8]byte
	if err := read(addr, b[:bits/8]); err != nil {
		return 0, err
	}
	return le64(b[:]), nil
}

// symbol returns the address of a symbol of the kernel's.
func (k *Kernel) symbol(name string) (uint64, error) {
	if k == nil {
		return 0, ErrNoKernel
	}
	s, err := k.syms.Lookup(name)
	if err != nil {
		return 0, k.lacks(err)
	}
	return s.Addr, nil
}

// lacks adds to the error that a symbol wasn't found why that is, if the kernel's table
// has only functions.
func (k *Kernel) lacks(err error) error {
	if k.onlyFunctions() && errors.Is(err, sysmap.ErrNotFound) {
		return fmt.Errorf("%w (CONFIG_KALLSYMS_ALL=n: name the kernel's vmlinux or System.map)", err)
	}
	return err
}

// onlyFunctions reports whether the symbols have no data among them. Every kernel has an
// init_task.
func (k *Kernel) onlyFunctions() bool {
	_, err := k.syms.Lookup("init_task")
	return errors.Is(err, sysmap.ErrNotFound)
}

// section returns the range between two symbols, of at most limit bytes.
func (k *Kernel) section(start, stop string, limit uint64) (addr, size uint64, err error) {
	addr, size, err = section(k.syms, start, stop, limit)
	return addr, size, k.lacks(err)
}

func section(syms *sysmap.Map, start, stop string, limit uint64) (addr, size uint64, err error) {
	a, err := syms.Lookup(start)
	if err != nil {
		return 0, 0, err
	}
	b, err := syms.Lookup(stop)
	if err != nil {
		return 0, 0, err
	}
	if b.Addr < a.Addr || b.Addr-a.Addr > limit {
		return 0, 0, fmt.Errorf("%s at %#x and %s at %#x: %w", start, a.Addr, stop, b.Addr, ErrBadKernel)
	}
	return a.Addr, b.Addr - a.Addr, nil
}

// ErrBadKernel: the guest's memory holds what no kernel has.
var ErrBadKernel = errors.New("malformed kernel data")

// done returns ctx's cause if it is done.
func done(ctx context.Context) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return nil
}
