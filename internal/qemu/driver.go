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
// breakpoint.Driver.
//
// A hit costs two packets at an instruction that only moves RIP (read the
// registers; go on elsewhere), else three (read, step, go on), or four where a
// handler wants to see the result. Before QEMU 11, whose steps can be believed,
// one more asks whether the step was made; it takes no round trip of its own.
// Registers are written only if they changed.
type Driver struct {
	vm     *VM
	mem    atomic.Pointer[paging.Memory]
	kernel atomic.Uint64 // paging.Root, 0: ask the vCPUs

	// The rest is guarded by vm.mu.
	breaks   map[uint64]*point
	pending  bool            // a stop hasn't been answered: the VM must not run
	queued   bool            // Wait hasn't returned it yet
	stop     breakpoint.Stop // the pending one
	thread   string          // its vCPU's
	fault    error           // for Wait to return once
	underway []underway
	identity identity
	freezes  int // Freezes without their Thaw
	closed   bool
}

// A point is a breakpoint in the stub.
type point struct {
	kind    byte // of Z packet: '0' or '1'
	insn    x86.Insn
	checked time.Time // when the guest's code there was last compared
	changed bool      // … and found different; the breakpoint is out
	removed bool      // only what is underway there comes back to it
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

// Attach returns a driver for breakpoints in the VM. It doesn't stop it for more
// than a moment. The Driver is to be closed before the VM.
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
	if v.drv != nil {
		return nil, ErrAttached
	}
	d := &Driver{vm: v, breaks: make(map[uint64]*point)}
	d.setMode(paging.Mode{Kind: paging.FourLevel, NXE: true})
	for _, c := range cpus {
		if mode, err := paging.ModeOf(c.CR0, c.CR4, c.EFER); err == nil {
			d.setMode(mode)
			break
		}
	}
	v.drv = d
	return d, nil
}

func (d *Driver) setMode(mode paging.Mode) {
	if m := d.mem.Load(); m == nil || m.Mode() != mode {
		d.mem.Store(paging.New(d.vm, mode))
	}
}

// Caps implements breakpoint.Driver.
func (d *Driver) Caps() breakpoint.Caps {
	return breakpoint.Caps{
		VCPUs: maxVCPUs, Step: true, CheapStep: true,
		Hidden: !d.vm.info.KVM, // TCG's breakpoints are in no memory
		LA57:   d.mem.Load().Mode().Kind == paging.FiveLevel,
	}
}

// SetKernelRoot fixes the page-table root through which kernel memory is
// reached outside of a hit: the kernel's init_top_pgt, which never goes away.
func (d *Driver) SetKernelRoot(r paging.Root) { d.kernel.Store(uint64(r)) }

// identity is memory that tells a guest's kernel from others.
type identity struct {
	addr  uint64
	bytes []byte
}

// maxIdentity bounds the bytes of an identity, which are read with every check.
const maxIdentity = 512

// SetIdentity names bytes of the kernel, at most 512, that never change while it
// runs, such as its banner. A VM may be reset and come back with another kernel, or
// with the same one elsewhere (KASLR): where the old one had a probe the new one
// may have the same instruction, in another function. When a hit finds other bytes
// at addr all breakpoints are out, and Wait fails with ErrTextChanged. It fails if
// they are not there now.
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
	// Behind them those in user mode, whose tables may lack the kernel.
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

// walk calls f, while the VM is stopped unless memory can be had without, with
// roots until one maps what f wants.
func (d *Driver) walk(cr3 uint64, f func(*paging.Memory, paging.Root) error) error {
	if d.vm.direct == nil {
		if err := d.vm.Freeze(); err != nil {
			return err
		}
		defer d.vm.Thaw()
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
	if d.vm.direct == nil {
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

// readAsVCPU reads through the stub with the page tables of the vCPU that
// stopped, in one packet instead of one for each table, if they are the right ones.
func (d *Driver) readAsVCPU(cr3, addr uint64, b []byte) (ok bool, err error) {
	v := d.vm
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.err != nil {
		return false, v.err
	}
	if v.running || !d.pending || v.regsOf == "" {
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

// Patch implements breakpoint.Driver. It does nothing: code isn't patched in a
// VM of QEMU, and needn't be.
func (d *Driver) Patch(addr uint64, b []byte) error {
	return fmt.Errorf("patch code at %#x: %w", addr, errors.ErrUnsupported)
}

// Freeze implements breakpoint.Driver. The instruction of a hit may still be
// stepped meanwhile.
func (d *Driver) Freeze() error {
	v := d.vm
	v.mu.Lock()
	defer v.mu.Unlock()
	if err := v.freeze(); err != nil {
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
	if err := v.thaw(); err != nil {
		return err
	}
	d.freezes--
	return nil
}

// InsertBreak implements breakpoint.Driver.
func (d *Driver) InsertBreak(addr uint64, in *x86.Insn) error {
	if err := d.vm.Freeze(); err != nil {
		return err
	}
	defer d.vm.Thaw()
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
	p := &point{kind: '0', insn: *in, checked: time.Now()}
	if old := d.breaks[addr]; old != nil {
		// The stub would count it twice, and keep one for ever.
		if !old.removed {
			return fmt.Errorf("breakpoint at %#x is there already", addr)
		}
		if !old.changed {
			p.kind = old.kind
			d.breaks[addr] = p
			return nil
		}
	}
	err := v.insert(p, addr)
	if err != nil {
		return err
	}
	d.breaks[addr] = p
	return nil
}

// insert has the stub set a breakpoint. KVM's are int3s in memory, which the stub
// can plant only where the vCPU it happens to look through has the kernel mapped;
// debug registers don't care.
func (v *VM) insert(p *point, addr uint64) error {
	var err error
	if !v.info.KVM || !v.hardware {
		err = v.callOK(p.packet('Z', addr))
		if no := (*refused)(nil); !v.info.KVM || !errors.As(err, &no) {
			return err
		}
	}
	p.kind = '1'
	herr := v.callOK(p.packet('Z', addr))
	if no := (*refused)(nil); errors.As(herr, &no) {
		return errors.Join(fmt.Errorf("the CPU's four debug registers are in use, by other probes or a watchpoint: remove one: %w", herr), err)
	}
	return herr
}

// packet returns the packet that sets ('Z') or removes ('z') the breakpoint.
func (p *point) packet(op byte, addr uint64) string {
	return fmt.Sprintf("%c%c,%x,1", op, p.kind, addr)
}

// RemoveBreak implements breakpoint.Driver.
func (d *Driver) RemoveBreak(addr uint64) error {
	v := d.vm
	v.mu.Lock()
	defer v.mu.Unlock()
	p := d.breaks[addr]
	if p == nil || p.removed {
		return nil
	}
	return v.held(func() error {
		d.forgetUnderway(addr)
		if p.changed {
			delete(d.breaks, addr)
			return fmt.Errorf("%#x: %w", addr, breakpoint.ErrTextChanged)
		}
		if d.owed(addr) {
			p.removed = true // until that has come back
			return nil
		}
		if err := v.callOK(p.packet('z', addr)); err != nil {
			return err
		}
		delete(d.breaks, addr)
		return nil
	})
}

// checkEvery is how often the guest's code under a breakpoint is compared with
// what it was, at most, unless that costs next to nothing.
const checkEvery = 100 * time.Millisecond

// trapped takes the stop of vm.current; vm.mu is held.
func (d *Driver) trapped() error {
	v := d.vm
	if len(d.breaks) == 0 {
		return v.settle() // the breakpoint was removed meanwhile
	}
	thread := v.current
	data, err := v.call("g")
	if err != nil {
		return err
	}
	if err := v.takeRegs(data); err != nil {
		return err
	}
	ip := v.regs[rIP]
	p := d.breaks[ip]
	if p == nil || p.changed {
		v.log.Debug("stop where no breakpoint is", "thread", thread, "rip", ip)
		return v.settle()
	}
	n, err := v.vcpu(thread)
	if err != nil {
		return err
	}
	if u, ok := d.back(); ok && u.tries < maxTries {
		return d.goOn(n, thread, p, u)
	}
	if p.removed {
		d.thread = thread
		return d.stepOn(ip, p, underway{})
	}
	if mode, err := paging.ModeOf(v.regs[rCR0], v.regs[rCR4], v.regs[rEFER]); err == nil {
		d.setMode(mode)
	}
	if err := d.check(ip, p); err != nil {
		return err
	}
	if p.changed {
		return v.settle()
	}
	d.stop = breakpoint.Stop{VCPU: n, Reason: breakpoint.Hit, User: v.regs[rCS]&3 == 3, Regs: v.regs.general()}
	d.thread, d.pending, d.queued = thread, true, true
	return nil
}

// check compares the guest's code at a breakpoint, and what its kernel is known by,
// now and then. If the guest has rewritten it, as a reboot does, to go on as if the
// old instruction stood there would be wrong: the breakpoint is taken out, or all
// of them if the kernel is another one, and Wait says so.
func (d *Driver) check(addr uint64, p *point) error {
	v := d.vm
	if v.regs[rCS]&3 != 0 {
		return nil
	}
	var b [x86.MaxLen]byte
	cur, want := b[:p.insn.Len], p.insn.Bytes()
	var now time.Time
	if v.direct == nil || !v.direct.mapped() {
		if now = time.Now(); now.Sub(p.checked) < checkEvery {
			return nil
		}
	}
	same, err := d.readHere(addr, cur)
	if err != nil {
		return err
	}
	if v.info.KVM && p.kind == '0' {
		cur, want = cur[1:], want[1:] // QEMU's int3 shows
	}
	if !same || !bytes.Equal(cur, want) {
		if err := d.takeOut(addr, p); err != nil {
			return err
		}
		d.fault = fmt.Errorf("%#x: %w (or has it rebooted?): it has % x there, not % x; the probe is out",
			addr, breakpoint.ErrTextChanged, cur, want)
		return nil
	}
	if id := d.identity; id.bytes != nil {
		var b [maxIdentity]byte
		cur := b[:len(id.bytes)]
		if same, err = d.readHere(id.addr, cur); err != nil {
			return err
		}
		if !same || !bytes.Equal(cur, id.bytes) {
			for addr, p := range d.breaks {
				if err := d.takeOut(addr, p); err != nil {
					return err
				}
			}
			d.fault = fmt.Errorf("%w: it has rebooted: what its kernel was known by, at %#x, is %q now, not %q; all probes are out",
				breakpoint.ErrTextChanged, id.addr, printable(string(cur)), printable(string(id.bytes)))
			return nil
		}
	}
	p.checked = now
	return nil
}

// takeOut removes a breakpoint of a guest that has something else there.
func (d *Driver) takeOut(addr uint64, p *point) error {
	if p.changed {
		return nil
	}
	if err := d.vm.callOK(p.packet('z', addr)); err != nil {
		return err
	}
	p.changed = true
	d.forgetUnderway(addr)
	return nil
}

// readHere reads through the page tables of the vCPU that has stopped. It reports
// whether the memory is there.
func (d *Driver) readHere(addr uint64, b []byte) (bool, error) {
	v := d.vm
	if v.direct != nil {
		_, err := d.mem.Load().Read(paging.Root(v.regs[rCR3]), paging.VAddr(addr), b)
		return err == nil, nil
	}
	err := v.readVirt(v.current, addr, b)
	if errors.Is(err, breakpoint.ErrNotMapped) {
		return false, nil
	}
	return err == nil, err
}

// Wait implements breakpoint.Driver.
func (d *Driver) Wait(ctx context.Context, s *breakpoint.Stop) error {
	v := d.vm
	v.mu.Lock()
	defer v.mu.Unlock()
	for {
		switch {
		case d.queued:
			*s = d.stop
			d.queued = false
			return nil
		case v.err != nil:
			return v.err
		case d.closed:
			return ErrClosed
		case d.fault != nil:
			err := d.fault
			d.fault = nil
			return err
		case ctx.Err() != nil:
			return ctx.Err()
		}
		if err := v.await(ctx); err != nil {
			return err
		}
	}
}

// pendingStop checks that s is the stop that waits for an answer.
func (d *Driver) pendingStop(s *breakpoint.Stop) error {
	if d.vm.err != nil {
		return d.vm.err
	}
	if !d.pending || s.VCPU != d.stop.VCPU {
		return fmt.Errorf("vCPU %d isn't stopped", s.VCPU)
	}
	return nil
}

// putRegs gives the vCPU the registers of s, except RIP unless ip is set, if they
// differ from what it has.
func (d *Driver) putRegs(s *breakpoint.Stop, ip bool) error {
	want := d.vm.regs
	want.setGeneral(&s.Regs)
	if !ip {
		want[rIP] = d.vm.regs[rIP]
	}
	return d.put(&want)
}

// put gives d.thread, whose registers are v.regs, those of want.
func (d *Driver) put(want *regFile) error {
	v := d.vm
	if *want == v.regs {
		return nil
	}
	if err := v.choose(d.thread); err != nil {
		return err
	}
	var packets []string
	for i := range want {
		if want[i] != v.regs[i] {
			packets = append(packets, v.layout.set(i, want[i]))
		}
	}
	if err := v.post(packets...); err != nil {
		return err
	}
	var errs error
	for i := range packets {
		data, err := v.receive()
		if err != nil {
			return err
		}
		if string(data) != "OK" {
			errs = errors.Join(errs, &refused{packets[i], printable(string(data))})
		}
	}
	if errs == nil {
		v.regs = *want
	}
	return errs
}

// Resume implements breakpoint.Driver.
func (d *Driver) Resume(s *breakpoint.Stop) error {
	v := d.vm
	v.mu.Lock()
	defer v.mu.Unlock()
	if err := d.pendingStop(s); err != nil {
		return err
	}
	if v.frozen > 0 {
		if err := d.putRegs(s, true); err != nil {
			return err
		}
		d.pending = false
		return nil
	}
	if err := d.putRegs(s, false); err != nil {
		return err
	}
	packet := "c"
	if s.Regs.IP != v.regs[rIP] {
		// "c" takes the address for the vCPU that g and P are about.
		if err := v.choose(d.thread); err != nil {
			return err
		}
		packet = fmt.Sprintf("c%x", s.Regs.IP)
	}
	d.pending = false
	return v.run(packet)
}

// StepOn implements breakpoint.Driver.
func (d *Driver) StepOn(s *breakpoint.Stop, _ *x86.Insn) error {
	v := d.vm
	v.mu.Lock()
	defer v.mu.Unlock()
	if err := d.pendingStop(s); err != nil {
		return err
	}
	p := d.breaks[s.Regs.IP]
	if p == nil {
		return fmt.Errorf("step on at %#x: no breakpoint there", s.Regs.IP)
	}
	if err := d.putRegs(s, true); err != nil {
		return err
	}
	return d.stepOn(s.Regs.IP, p, underway{})
}

// goOn has vCPU n, which came back to the breakpoint, go on with its execution.
func (d *Driver) goOn(n int, thread string, p *point, u underway) error {
	d.thread = thread
	if !u.over {
		return d.stepOn(d.vm.regs[rIP], p, u)
	}
	d.stop = breakpoint.Stop{VCPU: n}
	d.pending = true
	if p.removed {
		// It is where it is: the rest it executes without us.
		addr := d.vm.regs[rIP]
		d.stepped(addr)
		if !d.owed(addr) {
			if err := d.takeOut(addr, p); err != nil {
				return err
			}
			delete(d.breaks, addr)
		}
		return nil
	}
	return d.stepOver(d.vm.regs[rIP], p)
}

// stepOn steps d.thread past the instruction at addr, and lets the VM run unless
// it is frozen. u is what it has been before, if it came back. Where a step may
// fail to move, RIP is asked for in the same write as the VM is let go: if it
// hasn't moved, the vCPU stops there again, unless it takes an interrupt first.
func (d *Driver) stepOn(addr uint64, p *point, u underway) error {
	v := d.vm
	if p.insn.Repeats() {
		done, err := d.repeat(addr, p)
		if err != nil {
			return err
		}
		if !done {
			d.leave(u)
		}
		d.pending = false
		return v.settle()
	}
	u.tries++
	for range maxTries {
		if err := d.step(addr, p); err != nil {
			return err
		}
		if !v.verify || p.toItself() {
			break
		}
		if v.frozen == 0 {
			d.pending = false
			if err := v.run(v.readIP(), "c"); err != nil {
				return err
			}
			ip, err := v.receiveIP()
			if err == nil && ip == addr {
				v.log.Debug("a step ended where it began", "thread", d.thread, "rip", ip)
				d.leave(u)
			}
			return err
		}
		if err := v.post(v.readIP()); err != nil {
			return err
		}
		ip, err := v.receiveIP()
		if err != nil {
			return err
		}
		if ip != addr {
			break
		}
	}
	d.pending = false
	return v.settle()
}

// readIP returns the packet that asks for RIP. Under KVM "p" doesn't fetch the
// registers from the kernel (QEMU's handle_get_reg), "g" does.
func (v *VM) readIP() string {
	if v.info.KVM {
		return "g"
	}
	return fmt.Sprintf("p%x", v.layout.reg[rIP].number)
}

// receiveIP takes the answer.
func (v *VM) receiveIP() (uint64, error) {
	data, err := v.receive()
	if err != nil {
		return 0, err
	}
	var ip uint64
	if v.info.KVM {
		var f regFile
		err = v.layout.parse(&f, data)
		ip = f[rIP]
	} else {
		ip, err = v.layout.value(rIP, data)
	}
	if err != nil {
		return 0, v.broken(err)
	}
	return ip, nil
}

// step makes one step of d.thread, all other vCPUs standing still. Afterwards
// d.thread is the current one.
func (d *Driver) step(addr uint64, p *point) error {
	v := d.vm
	// KVM traps again at once; TCG doesn't while it steps.
	if v.info.KVM {
		if err := v.callOK(p.packet('z', addr)); err != nil {
			return err
		}
	}
	v.forget()
	data, err := v.call("vCont;s:" + d.thread)
	if err != nil {
		return err
	}
	stop, err := parseStop(data)
	if err != nil {
		return v.broken(err)
	}
	if stop.exited || stop.signal != sigTrap {
		return v.stopped(data)
	}
	v.current = stop.thread
	if v.info.KVM {
		if err := v.callOK(p.packet('Z', addr)); err != nil {
			return err
		}
	}
	return v.choose(d.thread)
}

// StepOver implements breakpoint.Driver.
func (d *Driver) StepOver(s *breakpoint.Stop, addr uint64) error {
	v := d.vm
	v.mu.Lock()
	defer v.mu.Unlock()
	if err := d.pendingStop(s); err != nil {
		return err
	}
	p := d.breaks[addr]
	if p == nil {
		return fmt.Errorf("step over %#x: no breakpoint there", addr)
	}
	if err := d.putRegs(s, true); err != nil {
		return err
	}
	if d.stop.Reason == breakpoint.Stepped && p.insn.Repeats() {
		// It has had a slice.
		d.leave(underway{over: true})
		d.pending = false
		return v.settle()
	}
	return d.stepOver(addr, p)
}

// stepOver steps d.thread over the instruction at addr, or a slice further in it,
// and has Wait return that.
func (d *Driver) stepOver(addr uint64, p *point) error {
	v := d.vm
	if p.insn.Repeats() {
		if _, err := d.repeat(addr, p); err != nil {
			return err
		}
		d.stepped(addr)
		return nil
	}
	for range maxTries {
		if err := d.step(addr, p); err != nil {
			return err
		}
		data, err := v.call("g")
		if err != nil {
			return err
		}
		if err := v.takeRegs(data); err != nil {
			return err
		}
		if v.regs[rIP] != addr || p.toItself() {
			break
		}
	}
	d.stepped(addr)
	return nil
}

// stepped has Wait return that the vCPU of the pending stop has stepped at addr.
func (d *Driver) stepped(addr uint64) {
	d.stop.Reason, d.stop.Addr, d.stop.Regs = breakpoint.Stepped, addr, d.vm.regs.general()
	d.queued = true
	d.vm.changed.Broadcast()
}

// Reinject implements breakpoint.Driver. A breakpoint of the guest's own never
// comes here: the guest has it. What does is a jump to one of ours from user
// mode: the step makes the vCPU meet the page fault that it is due.
func (d *Driver) Reinject(s *breakpoint.Stop) error {
	d.vm.mu.Lock()
	p := d.breaks[s.Regs.IP]
	d.vm.mu.Unlock()
	if p == nil {
		return d.Resume(s)
	}
	return d.StepOn(s, &p.insn)
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
	// Whoever waits for stops is to see that there are no more.
	d.closed = true
	v.changed.Broadcast()
	d.pending, d.queued = false, false
	err := d.detach()
	if err != nil && v.err == nil {
		d.closed = false // it may be called again
	} else if v.drv == d {
		v.drv = nil
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
		// Another has stopped the VM, which is to stay so.
		return errors.Join(v.err, d.clear())
	}
	v.frozen++
	err := v.halt()
	if !v.gone {
		err = errors.Join(err, d.clear())
	}
	v.frozen--
	if err == nil {
		v.frozen -= d.freezes
		d.freezes = 0
	}
	return errors.Join(err, v.settle())
}

// clear removes all breakpoints of the stopped VM.
func (d *Driver) clear() (errs error) {
	for addr, p := range d.breaks {
		if !p.changed {
			if err := d.vm.callOK(p.packet('z', addr)); err != nil {
				errs = errors.Join(errs, fmt.Errorf("remove breakpoint at %#x: %w", addr, err))
				continue
			}
		}
		delete(d.breaks, addr)
	}
	return errs
}
