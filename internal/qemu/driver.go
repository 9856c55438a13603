package qemu

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/x86"
	"github.com/vmprobes/vmprobes/paging"
)

// ErrAttached: a VM has one Driver at a time.
var ErrAttached = errors.New("this VM has a driver already")

// A Driver sets breakpoints in a VM and serves them. It implements
// [breakpoint.Driver].
//
// A hit costs two packets at an instruction that only moves RIP (read the
// registers; go on elsewhere), else three (read, step, go on), or four where a
// handler wants to see the result. Before QEMU 11, whose steps can be relied on, one
// more packet asks whether the step was made, without a round trip of its own.
// Registers are written only if they changed.
//
// A Driver knows what breakpoints are for, and uses the VM to set them; the VM knows
// nothing of it. After every call that may stop the VM the Driver calls take, to pick
// up a stop at a breakpoint that has come in the meantime.
type Driver struct {
	vm     *VM
	mem    atomic.Pointer[paging.Memory] // replaced when the guest changes its paging mode
	here   atomic.Pointer[paging.Memory] // the same, for those who hold vm.mu
	kernel atomic.Uint64                 // paging.Root, 0: ask the vCPUs

	// The rest is the Driver's own, and guarded by vm.mu. A stop that waits for its
	// answer is the VM's heldTrap.
	points   map[uint64]*point
	stop     breakpoint.Stop // that waits for its answer
	thread   string          // its vCPU's
	queued   bool            // Wait hasn't returned it yet
	faults   []error         // for Wait to return, each once
	underway []underway
	identity identity
	freezes  int // Freezes without their Thaw
	closed   bool
}

// A point is a place where a breakpoint is wanted.
type point struct {
	insn    x86.Insn
	checked time.Time // when the guest's code there was last compared
	changed bool      // the guest has other code there now; the breakpoint is out
	removed bool      // it stays in the stub only for an execution underway there
}

// toItself reports whether the instruction may be a branch to itself, as in
// "loop .": its displacement, which is at the end, is its length.
func (p *point) toItself() bool {
	b := p.insn.Bytes()
	if !p.insn.Branches() || len(b) < 2 {
		return false
	}
	if len(b) < 5 {
		return int(int8(b[len(b)-1])) == -len(b)
	}
	return int(int32(binary.LittleEndian.Uint32(b[len(b)-4:]))) == -len(b)
}

// Attach returns a driver for breakpoints in the VM, which it stops for a moment.
// Close the Driver before the VM.
func (v *VM) Attach(context.Context) (*Driver, error) {
	cpus, err := v.CPUs()
	if err != nil {
		return nil, err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.err != nil {
		return nil, v.err
	}
	if v.layout.bits != 64 {
		return nil, fmt.Errorf("breakpoints in a VM of qemu-system-i386: %w", errors.ErrUnsupported)
	}
	if err := v.serve(); err != nil {
		return nil, err
	}
	d := &Driver{vm: v, points: make(map[uint64]*point)}
	d.setMode(paging.Mode{Kind: paging.FourLevel, NXE: true})
	for _, c := range cpus {
		if mode, err := paging.ModeOf(c.CR0, c.CR4, c.EFER); err == nil {
			d.setMode(mode)
			break
		}
	}
	go d.watch()
	return d, nil
}

func (d *Driver) setMode(mode paging.Mode) {
	if m := d.mem.Load(); m == nil || m.Mode() != mode {
		d.mem.Store(paging.New(d.vm, mode))
		d.here.Store(paging.New(held{d.vm}, mode))
	}
}

// Caps implements breakpoint.Driver.
func (d *Driver) Caps() breakpoint.Caps {
	return breakpoint.Caps{
		VCPUs: maxVCPUs, Step: true, CheapStep: true, AllStop: true,
		Hidden: !d.vm.info.KVM, // TCG's breakpoints are in no memory
		LA57:   d.mem.Load().Mode().Kind == paging.FiveLevel,
	}
}

// SetKernelRoot fixes the page-table root through which kernel memory is reached
// while no vCPU is at a breakpoint: the kernel's init_top_pgt, which never goes away.
func (d *Driver) SetKernelRoot(r paging.Root) { d.kernel.Store(uint64(r)) }

// identity is memory by which a guest's kernel is told from others.
type identity struct {
	addr  uint64
	bytes []byte
}

// maxIdentity bounds the bytes of an identity, which are read with every check.
const maxIdentity = 512

// SetIdentity names bytes of the kernel, at most 512, that never change while it
// runs, such as its banner. A VM may be reset and come back with another kernel, or
// with the same one elsewhere (KASLR): where the old one had a probe the new one
// may have the same instruction, in another function. If a hit finds other bytes at
// addr all breakpoints are removed, and Wait fails with a breakpoint.ChangedError. SetIdentity
// itself fails if the bytes are not there now.
func (d *Driver) SetIdentity(addr uint64, b []byte) error {
	if len(b) > maxIdentity {
		b = b[:maxIdentity]
	}
	cur := make([]byte, len(b))
	if _, err := d.Read(0, addr, cur); err != nil {
		return fmt.Errorf("the kernel's identity at %#x: %w", addr, err)
	}
	if !bytes.Equal(cur, b) {
		return fmt.Errorf("the kernel's identity at %#x is %q, not %q", addr, printable(string(cur)), printable(string(b)))
	}
	v := d.vm
	v.mu.Lock()
	defer v.mu.Unlock()
	d.identity = identity{addr, cur}
	return nil
}

// roots returns page-table roots that may map the kernel.
func (d *Driver) roots(cr3 uint64) ([]paging.Root, error) {
	if cr3 == 0 {
		cr3 = d.kernel.Load()
	}
	if cr3 != 0 {
		return []paging.Root{paging.Root(cr3)}, nil
	}
	cpus, err := d.vm.CPUs()
	if err != nil {
		return nil, err
	}
	var all []paging.Root
	for _, c := range cpus {
		if c.CPL == 0 && c.CR3 != 0 {
			all = append(all, paging.Root(c.CR3))
		}
	}
	// Last those in user mode, whose tables may lack the kernel.
	for _, c := range cpus {
		if c.CPL != 0 {
			all = append(all, paging.Root(c.CR3))
		}
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("%w: no vCPU has page tables: the guest hasn't booted yet", breakpoint.ErrNotMapped)
	}
	return all, nil
}

// walk calls f with one root after the other until one maps what f wants. The VM is
// stopped meanwhile unless its memory can be reached without the stub.
func (d *Driver) walk(cr3 uint64, f func(*paging.Memory, paging.Root) error) error {
	if !d.vm.whole {
		if err := d.Freeze(); err != nil {
			return err
		}
		defer d.Thaw()
	}
	roots, err := d.roots(cr3)
	if err != nil {
		return err
	}
	for _, r := range roots {
		if err = f(d.mem.Load(), r); !errors.Is(err, paging.ErrNotMapped) {
			break
		}
	}
	if errors.Is(err, paging.ErrNotMapped) {
		err = fmt.Errorf("%w: %w", breakpoint.ErrNotMapped, err)
	}
	return err
}

// Translate resolves a kernel address.
func (d *Driver) Translate(addr uint64) (t paging.Translation, err error) {
	err = d.walk(0, func(m *paging.Memory, r paging.Root) (err error) {
		t, err = m.Translate(r, paging.VAddr(addr))
		return err
	})
	return t, err
}

// Read implements breakpoint.Driver.
func (d *Driver) Read(cr3, addr uint64, b []byte) (n int, err error) {
	if !d.vm.whole {
		switch ok, err := d.readAsVCPU(cr3, addr, b); {
		case err != nil:
			return 0, err
		case ok:
			return len(b), nil
		}
	}
	err = d.walk(cr3, func(m *paging.Memory, r paging.Root) (err error) {
		n, err = m.Read(r, paging.VAddr(addr), b)
		return err
	})
	return n, err
}

// readAsVCPU reads through the stub with the page tables of the vCPU that stopped,
// if those are the right ones: that is one packet instead of one for each table.
func (d *Driver) readAsVCPU(cr3, addr uint64, b []byte) (ok bool, err error) {
	v := d.vm
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.err != nil {
		return false, v.err
	}
	if v.running || v.trap != heldTrap || v.regsOf == "" {
		return false, nil
	}
	kernel := addr>>63 != 0 && v.regs[rCS]&3 == 0
	if same := paging.Root(cr3).Frame() == paging.Root(v.regs[rCR3]).Frame(); !same && (cr3 != 0 || !kernel) {
		return false, nil
	}
	err = v.readVirt(v.regsOf, addr, b)
	if errors.Is(err, breakpoint.ErrNotMapped) {
		return false, nil // the walk says why
	}
	return err == nil, err
}

// Write writes in spite of the guest's page protection. It is for data: under
// TCG code that has been executed doesn't notice a write to shared RAM.
func (d *Driver) Write(cr3, addr uint64, b []byte) (n int, err error) {
	err = d.walk(cr3, func(m *paging.Memory, r paging.Root) (err error) {
		n, err = m.Write(r, paging.VAddr(addr), b)
		return err
	})
	return n, err
}

// Store implements breakpoint.Driver.
func (d *Driver) Store(cr3, addr uint64, b []byte) error {
	return d.walk(cr3, func(m *paging.Memory, r paging.Root) error {
		_, err := m.Store(r, paging.VAddr(addr), b)
		return err
	})
}

// Patch implements breakpoint.Driver. It always fails: code in a VM of QEMU can't be
// patched from outside, and needn't be.
func (d *Driver) Patch(addr uint64, b []byte) error {
	return fmt.Errorf("patch code at %#x: %w", addr, errors.ErrUnsupported)
}

// Freeze implements breakpoint.Driver. The instruction of a hit may still be
// stepped meanwhile.
func (d *Driver) Freeze() error {
	v := d.vm
	v.mu.Lock()
	defer v.mu.Unlock()
	if err := d.freeze(); err != nil {
		return err
	}
	d.freezes++
	return nil
}

// Thaw implements breakpoint.Driver.
func (d *Driver) Thaw() error {
	v := d.vm
	v.mu.Lock()
	defer v.mu.Unlock()
	if d.freezes == 0 {
		return nil
	}
	if err := v.thaw(1); err != nil {
		return err
	}
	d.freezes--
	return nil
}

// freeze stops the VM until VM.thaw, and takes a stop that has come meanwhile.
func (d *Driver) freeze() error {
	if err := d.vm.freeze(); err != nil {
		return err
	}
	err := d.take()
	if err != nil {
		d.vm.thaw(1) // if it fails, then for the same reason
	}
	return err
}

// held calls f while the VM is stopped.
func (d *Driver) held(f func() error) error {
	if err := d.freeze(); err != nil {
		return err
	}
	err := f()
	return errors.Join(err, d.vm.thaw(1))
}

// InsertBreak implements breakpoint.Driver.
func (d *Driver) InsertBreak(addr uint64, in *x86.Insn) error {
	if err := d.Freeze(); err != nil {
		return err
	}
	defer d.Thaw()
	cur := make([]byte, in.Len)
	if _, err := d.Read(0, addr, cur); err != nil {
		return err
	}
	if !bytes.Equal(cur, in.Bytes()) {
		return fmt.Errorf("%w: %#x holds % x, not % x", breakpoint.ErrTextChanged, addr, cur, in.Bytes())
	}
	v := d.vm
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.err != nil {
		return v.err
	}
	if d.closed {
		return ErrClosed
	}
	p := &point{insn: *in, checked: time.Now()}
	if old := d.points[addr]; old != nil {
		if !old.removed {
			return fmt.Errorf("breakpoint at %#x is there already", addr)
		}
		if !old.changed {
			d.points[addr] = p // its breakpoint is still in the stub
			return nil
		}
	}
	if err := v.plant(addr, in); err != nil {
		return err
	}
	d.points[addr] = p
	return nil
}

// RemoveBreak implements breakpoint.Driver.
func (d *Driver) RemoveBreak(addr uint64) error {
	v := d.vm
	v.mu.Lock()
	defer v.mu.Unlock()
	p := d.points[addr]
	if p == nil || p.removed {
		return nil
	}
	return d.held(func() error {
		d.forgetUnderway(addr)
		if p.changed {
			delete(d.points, addr)
			return fmt.Errorf("%#x: %w", addr, breakpoint.ErrTextChanged)
		}
		if d.owed(addr) {
			p.removed = true // until that has come back
			return nil
		}
		err := v.lift(addr, d.look)
		if err == nil || errors.Is(err, breakpoint.ErrTextChanged) {
			delete(d.points, addr)
		}
		return err
	})
}

// Close implements breakpoint.Driver: it removes all breakpoints and lets the VM
// run. A stop that waits for its answer is dropped: its vCPU executes the
// instruction itself.
func (d *Driver) Close() error {
	v := d.vm
	v.mu.Lock()
	defer v.mu.Unlock()
	if d.closed {
		return nil
	}
	// Wait is to see that there are no more stops.
	d.closed = true
	v.changed.Broadcast()
	d.queued = false
	v.releaseTrap()
	err := d.detach()
	if err != nil && v.err == nil {
		d.closed = false // it may be called again
	} else {
		v.unserve()
	}
	return err
}

// detach removes all breakpoints and lets the VM run, unless others hold it.
func (d *Driver) detach() error {
	v := d.vm
	if v.gone {
		return v.err
	}
	if v.err != nil {
		// Somebody else has stopped the VM: it is left so.
		return errors.Join(v.err, d.clear())
	}
	if err := v.freeze(); err != nil {
		if !v.gone {
			err = errors.Join(err, d.clear())
		}
		return err
	}
	v.releaseTrap() // a vCPU that has hit in the meantime executes the instruction itself
	err := d.clear()
	n := 1
	if err == nil {
		n += d.freezes
		d.freezes = 0
	}
	return errors.Join(err, v.thaw(n))
}

// clear removes all breakpoints of the stopped VM.
func (d *Driver) clear() error {
	err := d.vm.liftAll(d.look)
	for addr := range d.points {
		if _, still := d.vm.breaks[addr]; !still {
			delete(d.points, addr)
		}
	}
	return err
}
