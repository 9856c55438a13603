package xen

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"maps"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/x86"
	"github.com/vmprobes/vmprobes/paging"
	"github.com/vmprobes/vmprobes/xenctrl"
)

// Errors that say why a guest can't be probed.
var (
	// ErrNoGDBSX: a PV guest needs a hypervisor built with CONFIG_GDBSX.
	ErrNoGDBSX = errors.New("this Xen is built without CONFIG_GDBSX, which breakpoints in a PV guest need: " +
		"boot a hypervisor built with CONFIG_EXPERT=y and CONFIG_GDBSX=y, or run the guest as PVH or HVM")
	// ErrNoMonitor: an HVM or PVH guest needs vm_event software breakpoints.
	ErrNoMonitor = errors.New("this Xen doesn't offer vm_event software breakpoints for the guest: " +
		"it needs HAP (EPT or NPT) and, from Xen 4.22 on, CONFIG_VM_EVENT=y")
	// ErrBusy: somebody else debugs or monitors the guest.
	ErrBusy = errors.New("another tool debugs or monitors this guest: end it first; if it was killed, and keeps no journal, its " +
		"breakpoints may be in the guest still, which stands at the next one: leave it so (xl unpause would kill a PV guest there), " +
		"and repair it from its kernel's file (vmprobes recover GUEST --from FILE)")
	// ErrDetached: another debugger has come to a PV guest, and has gone.
	ErrDetached = errors.New("another debugger has detached from the guest, and this tool with it, since Xen doesn't tell them apart: " +
		"this one is attached again, but a breakpoint that the guest met meanwhile was an exception to it")
)

// Config is what OpenDebugger and OpenMonitor may be told. All of it is optional.
type Config struct {
	// State is memory of [StateSize] bytes, all zero, that outlives this process: another
	// one can take over then ([AdoptDebugger], [AdoptMonitor]).
	State []byte
	// Root are the page tables through which kernel memory is reached outside of a hit:
	// the kernel's init_top_pgt, which never goes away. 0: those that a vCPU uses.
	Root paging.Root
	// Roots returns the page tables to reach kernel memory through at this moment, and
	// whether these stay, for a kernel that has none of its own yet. Root is 0 then.
	Roots func() (root paging.Root, stays bool)
	// Lookup finds the kernel's symbols.
	Lookup func(name string) (addr uint64, ok bool)
}

// guest is what both routes have in common: memory and patched bytes.
type guest struct {
	hv     Hypervisor
	frames *paging.Cache
	mem    *paging.Memory
	pages  atomic.Uint64 // the domain's, as checkAlive saw it last

	rootMu sync.Mutex
	root   paging.Root // 0: ask settle, or roots, each time
	settle func() (root paging.Root, stays bool)

	// roots returns page-table roots that may map the kernel, best first. With an error
	// there are others, which couldn't be asked for.
	roots func() ([]paging.Root, error)

	breaksMu sync.Mutex
	breaks   map[uint64]*patch
	been     map[uint64]bool // where breakpoints are, and were
	stepped  *patch          // that is lifted for a step

	mu sync.Mutex // the route's own
	*shared
}

// patch is a breakpoint in the guest's text.
type patch struct {
	addr   uint64
	insn   x86.Insn
	lifted bool // the original is in place, for a step
	gone   bool // removed, if in the middle of a step
}

func newGuest(hv Hypervisor, frames *paging.Cache, s *shared) *guest {
	g := &guest{hv: hv, frames: frames, breaks: make(map[uint64]*patch), been: make(map[uint64]bool), shared: s, root: s.kernel}
	g.mem = paging.New(g.frames, paging.Mode{Kind: paging.FourLevel, NXE: true}) // a 64-bit PV guest's
	return g
}

// SetKernelRoot fixes Config.Root later.
func (g *guest) SetKernelRoot(r paging.Root) {
	g.rootMu.Lock()
	defer g.rootMu.Unlock()
	g.root, g.kernel = r, r
}

// kernelRoot returns the kernel's page tables, or 0 if the roots are to be asked.
func (g *guest) kernelRoot() paging.Root {
	g.rootMu.Lock()
	root, settle := g.root, g.settle
	g.rootMu.Unlock()
	if root != 0 || settle == nil {
		return root
	}
	root, stays := settle()
	if stays {
		g.SetKernelRoot(root)
	}
	return root
}

// Freeze implements breakpoint.Driver.
func (g *guest) Freeze() error {
	g.beat()
	g.mu.Lock()
	defer g.mu.Unlock()
	return mapErr(g.account(intentPause, g.hv.Pause, &g.frozen, 1))
}

// Thaw implements breakpoint.Driver.
func (g *guest) Thaw() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.frozen == 0 {
		return nil
	}
	return mapErr(g.thaw())
}

// thaw undoes one Freeze.
func (g *guest) thaw() error { return g.account(intentUnpause, g.unpause, &g.frozen, -1) }

// Translate resolves a kernel address.
func (g *guest) Translate(addr uint64) (t paging.Translation, err error) {
	err = g.withRoot(0, func(r paging.Root) (err error) {
		t, err = g.mem.Translate(r, paging.VAddr(addr))
		return err
	})
	return t, err
}

// withRoot calls f with cr3, or with candidates for the kernel's root until one
// maps what f wants.
func (g *guest) withRoot(cr3 uint64, f func(paging.Root) error) error {
	if cr3 != 0 {
		return mapErr(f(paging.Root(cr3)))
	}
	if root := g.kernelRoot(); root != 0 {
		return mapErr(f(root))
	}
	// That something isn't there is believed if all roots say so: a vCPU in user mode has
	// tables without the kernel, and one whose memory can't be read now says nothing.
	roots, failed := g.roots()
	failed = mapErr(failed)
	var absent error
	for _, r := range roots {
		err := mapErr(f(r))
		switch {
		case err == nil:
			return nil
		case errors.Is(err, breakpoint.ErrNotMapped), errors.Is(err, breakpoint.ErrFault):
			absent = err
		case failed == nil:
			failed = err
		}
	}
	return cmp.Or(failed, absent)
}

func (g *guest) Read(cr3, addr uint64, b []byte) (n int, err error) {
	err = g.withRoot(cr3, func(r paging.Root) (err error) {
		n, err = g.mem.Read(r, paging.VAddr(addr), b)
		return err
	})
	return n, err
}

func (g *guest) Write(cr3, addr uint64, b []byte) (n int, err error) {
	err = g.withRoot(cr3, func(r paging.Root) (err error) {
		n, err = g.mem.Write(r, paging.VAddr(addr), b)
		return err
	})
	return n, err
}

// read and write are Read and Write for those who need all of b.
func (g *guest) read(cr3, addr uint64, b []byte) error {
	_, err := g.Read(cr3, addr, b)
	return err
}

func (g *guest) write(cr3, addr uint64, b []byte) error {
	_, err := g.Write(cr3, addr, b)
	return err
}

func (g *guest) Store(cr3, addr uint64, b []byte) error {
	return g.withRoot(cr3, func(r paging.Root) error {
		_, err := g.mem.Store(r, paging.VAddr(addr), b)
		return err
	})
}

func (g *guest) Patch(addr uint64, b []byte) error { return g.write(0, addr, b) }

// int3 is the breakpoint instruction.
const int3 = 0xcc

// InsertBreak implements breakpoint.Driver. One byte changes: whatever stands
// behind it stays a boundary only where it was one.
func (g *guest) InsertBreak(addr uint64, in *x86.Insn) error {
	g.beat()
	g.breaksMu.Lock()
	defer g.breaksMu.Unlock()
	if g.breaks[addr] != nil {
		return fmt.Errorf("breakpoint at %#x is there already", addr)
	}
	cur := make([]byte, in.Len)
	if err := g.read(0, addr, cur); err != nil {
		return err
	}
	if !bytes.Equal(cur, in.Bytes()) {
		return fmt.Errorf("%w: %#x holds % x, not % x", breakpoint.ErrTextChanged, addr, cur, in.Bytes())
	}
	p := &patch{addr: addr, insn: *in}
	if st := g.stepped; st != nil && st.addr == addr {
		// A vCPU is still stepping there: the breakpoint comes back behind it.
		p = st
		p.insn, p.gone = *in, false
	} else if err := g.drop(p); err != nil {
		return err
	}
	if len(g.been) >= maxBeen { // return probes make breakpoints where the guest calls from
		maps.DeleteFunc(g.been, func(a uint64, _ bool) bool { return g.breaks[a] == nil })
	}
	g.breaks[addr], g.been[addr] = p, true
	return nil
}

// maxBeen bounds the removed breakpoints that are remembered.
const maxBeen = 1 << 16

// RemoveBreak implements breakpoint.Driver.
func (g *guest) RemoveBreak(addr uint64) error {
	g.beat()
	g.breaksMu.Lock()
	defer g.breaksMu.Unlock()
	p := g.breaks[addr]
	if p == nil {
		return nil
	}
	if !p.lifted {
		if err := g.lift(p); err != nil {
			if errors.Is(err, breakpoint.ErrTextChanged) {
				p.gone = true
				delete(g.breaks, addr)
			}
			return err
		}
	}
	p.gone = true
	delete(g.breaks, addr)
	return nil
}

// liftForStep takes a breakpoint out for a step, and dropAfterStep puts it back
// unless it has been removed meanwhile.
func (g *guest) liftForStep(p *patch) error {
	g.breaksMu.Lock()
	defer g.breaksMu.Unlock()
	if p.lifted || p.gone {
		return nil
	}
	if err := g.lift(p); err != nil {
		return err
	}
	p.lifted = true
	g.stepped = p
	return nil
}

func (g *guest) dropAfterStep(p *patch) error {
	g.breaksMu.Lock()
	defer g.breaksMu.Unlock()
	if p.lifted && !p.gone {
		if err := g.drop(p); err != nil {
			return err
		}
	}
	p.lifted = false
	if g.stepped == p {
		g.stepped = nil
	}
	return nil
}

// lift puts the original byte back, drop the breakpoint again.
func (g *guest) lift(p *patch) error {
	// The whole instruction is compared: a guest that rewrites it puts an int3 of
	// its own over the first byte first, and the first byte of the new one last.
	var buf [x86.MaxLen]byte
	orig := p.insn.Bytes()
	cur := buf[:len(orig)]
	if err := g.read(0, p.addr, cur); errors.Is(err, breakpoint.ErrNotMapped) {
		// A module was unloaded, and its pages were given back.
		return fmt.Errorf("%w: the guest has nothing at %#x any more: %w", breakpoint.ErrTextChanged, p.addr, err)
	} else if err != nil {
		return err
	}
	if cur[0] != int3 || !bytes.Equal(cur[1:], orig[1:]) {
		return fmt.Errorf("%w: %#x holds % x, not the breakpoint and the rest of % x", breakpoint.ErrTextChanged, p.addr, cur, orig)
	}
	return g.write(0, p.addr, orig[:1])
}

func (g *guest) drop(p *patch) error { return g.write(0, p.addr, []byte{int3}) }

func (g *guest) breakAt(addr uint64) *patch {
	g.breaksMu.Lock()
	defer g.breaksMu.Unlock()
	return g.breaks[addr]
}

// checkAlive returns ErrGone if the domain is dying or has shut down. One that is
// suspended may be resumed ("xl save -c", a migration that failed), and its
// breakpoints are still to be served then.
//
// It looks at the domain's memory as well: if a guest gives a page back to Xen
// (ballooning) while it is mapped here, and takes another one at the same place, the
// mapping is of the old one, which counts as the domain's as long as it is mapped.
func (g *guest) checkAlive() error {
	_, err := g.alive()
	return err
}

// alive is checkAlive, and returns what Xen says of the domain.
func (g *guest) alive() (info xenctrl.DomainInfo, err error) {
	if err := attempts(func() (err error) { info, err = g.hv.Info(); return err }); err != nil {
		return info, err
	}
	if info.Gone() {
		return info, fmt.Errorf("%w: domain %d is dying or has shut down", breakpoint.ErrGone, info.ID)
	}
	if g.pages.Swap(info.TotalPages) != info.TotalPages {
		g.frames.Invalidate()
	}
	return info, nil
}

// dead reports whether no vCPU of the domain will ever run again.
func (g *guest) dead() bool { return errors.Is(g.checkAlive(), breakpoint.ErrGone) }

// mapErr gives errors of Xen and of page walks the engine's names.
func mapErr(err error) error {
	switch {
	case err == nil, errors.Is(err, breakpoint.ErrGone):
		return err
	case errors.Is(err, xenctrl.ErrNoDomain), errors.Is(err, syscall.ESRCH):
		return fmt.Errorf("%w: %w", breakpoint.ErrGone, err)
	case errors.Is(err, paging.ErrNotMapped):
		return fmt.Errorf("%w: %w", breakpoint.ErrNotMapped, err)
	case errors.Is(err, paging.ErrProtected), errors.Is(err, paging.ErrNonCanonical), errors.Is(err, paging.ErrReserved):
		return fmt.Errorf("%w: %w", breakpoint.ErrFault, err)
	}
	return err
}

// attempts makes a call that must not fail a few times.
func attempts(f func() error) (err error) {
	for try := range 3 {
		if try > 0 {
			time.Sleep(time.Millisecond)
		}
		if err = mapErr(f()); err == nil || errors.Is(err, breakpoint.ErrGone) {
			return err
		}
	}
	return err
}

// thawAll undoes all Freezes; g.mu is held.
func (g *guest) thawAll() error {
	for g.frozen > 0 {
		if err := attempts(g.thaw); err != nil {
			return err
		}
	}
	return nil
}

// unpause takes one from the domain's pause count. That it is 0 already, as after
// an administrator's unpause, is no error.
func (g *guest) unpause() error {
	if err := g.hv.Unpause(); !errors.Is(err, syscall.EINVAL) {
		return err
	}
	return nil
}

// StepOn implements breakpoint.Driver.
func (g *guest) StepOn(*breakpoint.Stop, *x86.Insn) error {
	return fmt.Errorf("step on: %w", errors.ErrUnsupported)
}
