package qemu

import (
	"fmt"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/x86"
)

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

// putRegs gives the vCPU the registers of s, except RIP unless ip is set, if they
// differ from what it has.
func (d *Driver) putRegs(s *breakpoint.Stop, ip bool) error {
	want := d.vm.regs
	want.setGeneral(&s.Regs)
	if !ip {
		want[rIP] = d.vm.regs[rIP]
	}
	return d.vm.writeRegs(d.thread, &want)
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
		v.releaseTrap()
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
	v.releaseTrap()
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
	d.vm.holdTrap()
	if p.removed {
		// It is where it is: the rest it executes without us.
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
	if err := d.putRegs(s, true); err != nil {
		return err
	}
	if d.stop.Reason == breakpoint.Stepped && p.insn.Repeats() {
		// It has had a slice.
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
		if err := v.readRegs(); err != nil {
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
	p := d.points[s.Regs.IP]
	d.vm.mu.Unlock()
	if p == nil {
		return d.Resume(s)
	}
	return d.StepOn(s, &p.insn)
}
