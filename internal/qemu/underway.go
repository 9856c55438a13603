package qemu

import (
	"slices"

	"github.com/vmprobes/vmprobes/internal/x86"
)

// underway is an execution that has begun at a breakpoint, was a hit, and runs on
// with the VM before it is over: QEMU before 11 now and then ends a step that it
// hasn't made, and a repeated instruction gets a slice at a time. The vCPU comes
// back to the breakpoint, at once or when it has served interrupts; the guest may
// even move the task to another vCPU meanwhile, and others may come to the breakpoint
// first. The execution is known by its general registers, its stack pointer above
// all: they are the task's own.
type underway struct {
	regs  x86.Regs
	over  bool // the answer was StepOver, and Stepped is still to come
	tries int  // how often it came back, unless it repeats
}

// maxUnderway bounds how many are kept. One that never comes back, because its task
// has died, is forgotten once that many others have come.
const maxUnderway = 256

// maxTries is how often in a row a step that ends where it began is taken for one
// that wasn't made, as about one of 10,000 isn't. An indirect jump may lead to itself.
const maxTries = 8

// own returns the registers that are the task's, and so the same when it comes back
// from an interrupt, even on another vCPU: not the bases, not the page tables, which
// may change under a kernel thread, and not RF, which interrupts set.
func own(f *regFile) x86.Regs {
	r := f.general()
	r.FSBase, r.GSBase, r.CR3 = 0, 0, 0
	r.Flags &^= x86.FlagRF
	return r
}

// leave notes that d.thread, whose registers are v.regs, is let go in the middle
// of its execution.
func (d *Driver) leave(u underway) {
	u.regs = own(&d.vm.regs)
	if len(d.underway) >= maxUnderway {
		i := max(0, slices.IndexFunc(d.underway, func(u underway) bool { return !u.over }))
		d.underway = slices.Delete(d.underway, i, i+1)
	}
	d.underway = append(d.underway, u)
}

// back returns the execution that the vCPU with v.regs continues, if any.
func (d *Driver) back() (u underway, ok bool) {
	if len(d.underway) == 0 {
		return u, false
	}
	regs := own(&d.vm.regs)
	i := slices.IndexFunc(d.underway, func(u underway) bool { return u.regs == regs })
	if i < 0 {
		return u, false
	}
	u = d.underway[i]
	d.underway = slices.Delete(d.underway, i, i+1)
	return u, true
}

// owed reports whether a Stepped stop is still to come of an execution at addr.
func (d *Driver) owed(addr uint64) bool {
	return slices.ContainsFunc(d.underway, func(u underway) bool { return u.over && u.regs.IP == addr })
}

// forgetUnderway drops what is underway at addr, unless a Stepped stop is owed.
func (d *Driver) forgetUnderway(addr uint64) {
	d.underway = slices.DeleteFunc(d.underway, func(u underway) bool { return u.regs.IP == addr && !u.over })
}
