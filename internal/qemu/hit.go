package qemu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/x86"
	"github.com/vmprobes/vmprobes/paging"
)

// take picks up a stop at a breakpoint, if there is a new one, and either keeps it
// for Wait or lets the VM go on.
func (d *Driver) take() error {
	v := d.vm
	if d.closed {
		return nil
	}
	thread, ok := v.takeTrap()
	if !ok {
		return nil
	}
	if len(d.points) == 0 { // the breakpoint was removed meanwhile
		return errors.Join(v.unstick(), v.settle())
	}
	if err := v.readRegs(thread); err != nil {
		return err
	}
	ip := v.regs[rIP]
	p := d.points[ip]
	if p == nil || p.changed {
		v.log.Debug("stop where no breakpoint is", "thread", thread, "rip", ip)
		return errors.Join(v.unstick(), v.settle())
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
		return errors.Join(err, v.settle()) // it comes to the breakpoint again
	}
	if p.changed {
		return v.settle()
	}
	d.stop = breakpoint.Stop{VCPU: n, Reason: breakpoint.Hit, User: v.regs[rCS]&3 == 3, Regs: v.regs.general()}
	d.thread, d.queued = thread, true
	v.holdTrap()
	v.changed.Broadcast()
	return nil
}

// watch picks up stops while nobody is in Wait: one at a breakpoint that is gone must
// not keep the VM stopped. A hit is kept for the next Wait.
func (d *Driver) watch() {
	v := d.vm
	v.mu.Lock()
	defer v.mu.Unlock()
	for v.err == nil && !d.closed {
		if err := v.look(); err != nil {
			return
		}
		if err := d.take(); err != nil && len(d.faults) == 0 {
			d.faults = append(d.faults, err)
			v.changed.Broadcast()
		}
		v.rest()
	}
}

// checkEvery is how long the code at a breakpoint may go without a check, where
// reading it takes packets or a system call.
const checkEvery = 100 * time.Millisecond

// check compares, now and then, the guest's code at a breakpoint and the kernel's
// identity with what they were. If they differ, as after a reboot, it would be wrong
// to go on as if the old instruction stood there: the breakpoint is removed, or all
// of them if the kernel is another one, and Wait says so.
func (d *Driver) check(addr uint64, p *point) error {
	v := d.vm
	if v.regs[rCS]&3 != 0 {
		return nil
	}
	const longMode = 1 << 10 // EFER.LMA
	if v.regs[rEFER]&longMode == 0 {
		return d.rebooted("it runs 32-bit code now")
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
	if v.shows(addr) {
		cur, want = cur[1:], want[1:] // QEMU's int3 is there
	}
	if !same || !bytes.Equal(cur, want) {
		if err := d.takeOut(addr, p); err != nil {
			return err
		}
		d.faults = append(d.faults, &breakpoint.ChangedError{Addrs: []uint64{addr}, Err: fmt.Errorf("%#x: %w (or has it rebooted?): there is % x now, not % x; the probe has been removed",
			addr, breakpoint.ErrTextChanged, cur, want)})
		v.changed.Broadcast()
		return nil
	}
	if id := d.identity; id.bytes != nil {
		var b [maxIdentity]byte
		cur := b[:len(id.bytes)]
		if same, err = d.readHere(id.addr, cur); err != nil {
			return err
		}
		if !same || !bytes.Equal(cur, id.bytes) {
			return d.rebooted(fmt.Sprintf("its kernel has %q at %#x now, not %q", printable(string(cur)), id.addr, printable(string(id.bytes))))
		}
	}
	p.checked = now
	return nil
}

// rebooted removes all breakpoints, as the guest runs another kernel.
func (d *Driver) rebooted(why string) error {
	c := &breakpoint.ChangedError{Err: fmt.Errorf("%w: it has rebooted: %s; all probes have been removed", breakpoint.ErrTextChanged, why)}
	for addr, p := range d.points {
		if err := d.takeOut(addr, p); err != nil {
			return err
		}
		c.Addrs = append(c.Addrs, addr)
	}
	d.faults = append(d.faults, c)
	d.vm.changed.Broadcast()
	return nil
}

// look reads the kernel's code, whatever the vCPUs are doing.
func (d *Driver) look(addr uint64, b []byte) error {
	root := d.kernel.Load()
	if root == 0 {
		return d.vm.peek(addr, b)
	}
	_, err := d.here.Load().Read(paging.Root(root), paging.VAddr(addr), b)
	return err
}

// takeOut removes a breakpoint of a guest that has something else there.
func (d *Driver) takeOut(addr uint64, p *point) error {
	if p.changed {
		return nil
	}
	if err := d.vm.lift(addr, d.look); err != nil && !errors.Is(err, breakpoint.ErrTextChanged) {
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
	if v.whole {
		_, err := d.here.Load().Read(paging.Root(v.regs[rCR3]), paging.VAddr(addr), b)
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
		if err := d.take(); err != nil {
			return err
		}
		switch {
		case d.queued:
			*s = d.stop
			d.queued = false
			return nil
		case v.err != nil:
			return v.err
		case d.closed:
			return ErrClosed
		case len(d.faults) > 0:
			err := d.faults[0]
			d.faults = d.faults[1:]
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
	if d.vm.trap != heldTrap || s.VCPU != d.stop.VCPU {
		return fmt.Errorf("vCPU %d isn't stopped", s.VCPU)
	}
	return nil
}

// Resume implements breakpoint.Driver.
func (d *Driver) Resume(s *breakpoint.Stop) error {
	v := d.vm
	v.mu.Lock()
	defer v.mu.Unlock()
	if err := d.pendingStop(s); err != nil {
		return err
	}
	// "c" takes the address where the vCPU goes on, which is a packet less than to set
	// RIP. A VM that stays frozen gets none.
	regs, packet := s.Regs, "c"
	if v.frozen == 0 && s.Regs.IP != v.regs[rIP] {
		regs.IP = v.regs[rIP]
		packet = fmt.Sprintf("c%x", s.Regs.IP)
	}
	if err := v.writeRegs(d.thread, &regs); err != nil {
		return err
	}
	if packet != "c" { // which is for the vCPU that g and P are about
		if err := v.choose(d.thread); err != nil {
			return err
		}
	}
	v.releaseTrap()
	if v.frozen > 0 {
		return nil
	}
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
	p := d.points[s.Regs.IP]
	if p == nil {
		return fmt.Errorf("step on at %#x: no breakpoint there", s.Regs.IP)
	}
	if err := v.writeRegs(d.thread, &s.Regs); err != nil {
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
	d.vm.holdTrap()
	if p.removed {
		// However far it has come, it executes the rest without us.
		addr := d.vm.regs[rIP]
		d.stepped(addr)
		if !d.owed(addr) {
			if err := d.takeOut(addr, p); err != nil {
				return err
			}
			delete(d.points, addr)
		}
		return nil
	}
	return d.stepOver(d.vm.regs[rIP], p)
}

// stepOn steps d.thread past the instruction at addr, and lets the VM run unless
// it is frozen. u is the execution that goes on, if the vCPU came back. Where a step
// may end where it began, RIP is asked for in the same write that lets the VM run: if
// the vCPU hasn't moved it stops there again, unless it takes an interrupt first.
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
		v.releaseTrap()
		return v.settle()
	}
	u.tries++
	for range maxTries {
		if err := v.step(d.thread, addr); err != nil {
			return err
		}
		if !v.verify || p.toItself() {
			break
		}
		if v.frozen == 0 {
			v.releaseTrap()
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
	v.releaseTrap()
	return v.settle()
}

// StepOver implements breakpoint.Driver.
func (d *Driver) StepOver(s *breakpoint.Stop, addr uint64) error {
	v := d.vm
	v.mu.Lock()
	defer v.mu.Unlock()
	if err := d.pendingStop(s); err != nil {
		return err
	}
	p := d.points[addr]
	if p == nil {
		return fmt.Errorf("step over %#x: no breakpoint there", addr)
	}
	if err := v.writeRegs(d.thread, &s.Regs); err != nil {
		return err
	}
	if d.stop.Reason == breakpoint.Stepped && p.insn.Repeats() {
		// It has just had a slice.
		d.leave(underway{over: true})
		v.releaseTrap()
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
		if err := v.step(d.thread, addr); err != nil {
			return err
		}
		if err := v.readRegs(d.thread); err != nil {
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

// Reinject implements breakpoint.Driver. The guest's own breakpoints never come
// here: QEMU gives them to the guest. What does is a jump from user mode to one of
// ours: the step makes the vCPU take the page fault that it is due.
func (d *Driver) Reinject(s *breakpoint.Stop) error {
	d.vm.mu.Lock()
	p := d.points[s.Regs.IP]
	d.vm.mu.Unlock()
	if p == nil {
		return d.Resume(s)
	}
	return d.StepOn(s, &p.insn)
}
