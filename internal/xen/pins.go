package xen

import (
	"fmt"
	"time"

	"github.com/vmprobes/vmprobes/xenctrl"
)

// pinTick is how often stops are looked at that wait for their answer. When one has
// waited for a whole tick, all are pinned. A timer's cost is felt where time is scarce, so
// the ticks are longer once every stop has been answered in time for a while.
const (
	pinTick     = 4 * time.Millisecond
	slowPinTick = 20 * time.Millisecond
	quickTicks  = 25 // in a row that found nothing to pin
)

// pins guard a PV guest against an administrator's "xl unpause" while a handler
// runs: it takes away the pause that keeps a vCPU at a breakpoint, and the guest
// would run on in the middle of an instruction. A stop whose answer takes long is
// therefore pinned: its vCPU is held by itself (XEN_DOMCTL_gdbsx_pausevcpu), which
// "xl unpause" doesn't undo. Short ones aren't, since that costs two calls.
//
// While a vCPU is pinned the domain's own pause is looked after as well. If
// somebody has unpaused it, the domain is let run (loose), every stopped vCPU being
// pinned, until all are answered.
type pins struct {
	tick    uint64
	n       int    // vCPUs pinned
	cpuTime uint64 // the domain's, when it was seen paused: it doesn't change as long as it is
	ran     bool   // a vCPU has stepped since then
	loose   bool

	timer *time.Timer // runs while stops come
	armed bool
	quick int // ticks since one found a stop that had waited
}

// watchPins has pinTick called a tick from now, if it isn't going to be called anyway.
func (d *Debugger) watchPins() {
	if d.pins.armed {
		return
	}
	d.pins.armed = true
	tick := pinTick
	if d.pins.quick >= quickTicks {
		tick = slowPinTick
	}
	if d.pins.timer == nil {
		d.pins.timer = time.AfterFunc(tick, d.pinTick)
	} else {
		d.pins.timer.Reset(tick)
	}
}

func (d *Debugger) pinTick() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.pins.armed = false
	d.pins.tick++
	d.pins.quick++
	if !d.closed && d.pending > 0 { // else the next stop arms the timer
		d.pinDue()
		d.watchPins()
	}
}

// pinDue pins what has waited for a tick. What fails is tried again at the next one.
func (d *Debugger) pinDue() {
	if d.stepping() {
		d.pinStepping()
		return
	}
	due := d.pins.n > 0
	for v := range d.vcpus {
		c := &d.vcpus[v]
		due = due || c.stopped && d.pins.tick-c.tick > 1
	}
	if !due {
		return
	}
	d.pins.quick = 0
	if d.takeAll() != nil {
		return
	}
	// Those that have stopped since wait as long as the first, and are as much in danger.
	for v := range d.vcpus {
		if c := &d.vcpus[v]; c.stopped && !c.pinned {
			if d.pin(v) != nil {
				return
			}
		}
	}
	_ = d.checkPins()
}

// pinStepping pins the vCPU of a step if it has come to another breakpoint on the way.
// The others are held.
func (d *Debugger) pinStepping() {
	v := d.step.vcpu
	c := &d.vcpus[v]
	if !c.stopped || d.pins.tick-c.tick <= 1 {
		return
	}
	d.pins.quick = 0
	if !c.pinned && d.pin(v) == nil {
		d.pins.ran = true // the step goes on
	}
}

// pin holds a stopped vCPU by itself.
func (d *Debugger) pin(v int) error {
	if d.pins.n == 0 {
		info, err := d.hv.Info()
		if err != nil {
			return mapErr(err)
		}
		d.pins.ran, d.pins.cpuTime = false, info.CPUTime
	}
	if err := d.hold(v); err != nil {
		return err
	}
	d.vcpus[v].pinned = true
	d.pins.n++
	return nil
}

// unpin undoes pin, if there was one.
func (d *Debugger) unpin(v int) error {
	if !d.vcpus[v].pinned {
		return nil
	}
	if err := d.checkPins(); err != nil {
		return err
	}
	if err := d.letGo(v); err != nil {
		return fmt.Errorf("vCPU %d: release: %w", v, err)
	}
	d.vcpus[v].pinned = false
	d.pins.n--
	return nil
}

// due reports whether the next one of what is owed is still to be paid, while the domain
// is loose: somebody may have paid it. One too many would undo the pause of a vCPU that
// has hit since.
func (d *Debugger) due() (bool, error) {
	st, err := d.take()
	switch {
	case err != nil || st.VCPU >= 0:
		return false, err
	case !st.Paused:
		d.owed = 0
		return false, nil
	}
	return true, nil
}

// count makes what is owed exact before v steps, once vCPUs are pinned: somebody may have
// paid of it, and one unpause too many, when v has stepped already, would have it step
// twice. Nothing can run meanwhile: v is pinned, and the others are held for the step.
func (d *Debugger) count(v int) error {
	if err := d.checkPins(); err != nil {
		return err
	}
	if d.pins.n == 0 && !d.pins.loose {
		return nil
	}
	if !d.vcpus[v].pinned {
		if err := d.pin(v); err != nil {
			return fmt.Errorf("vCPU %d: hold: %w", v, err)
		}
	}
	for {
		info, err := d.hv.Info()
		switch {
		case err != nil:
			return mapErr(err)
		case info.Flags&xenctrl.DomainPaused == 0:
			d.owed = 0
			return attempts(d.pause)
		case d.owed <= 1:
			return nil
		}
		if err := d.pay(); err != nil {
			return err
		}
	}
}

// checkPins finds out whether somebody has unpaused the domain though vCPUs are
// stopped. Then all of them are pinned, and what is owed is paid.
func (d *Debugger) checkPins() error {
	if d.pins.n == 0 || d.pins.loose || d.stepping() {
		return nil
	}
	info, err := d.hv.Info()
	if err != nil {
		return mapErr(err)
	}
	paused := info.Flags&xenctrl.DomainPaused != 0
	if paused && (d.pins.ran || info.CPUTime == d.pins.cpuTime) {
		d.pins.ran, d.pins.cpuTime = false, info.CPUTime
		return nil
	}
	if !paused {
		d.owed = 0 // nothing is left of it
	}
	// From here on nothing moves, until our own pause is undone.
	if err := attempts(d.pause); err != nil {
		return err
	}
	if err := d.takeAll(); err != nil {
		return err
	}
	for v := range d.vcpus {
		if c := &d.vcpus[v]; c.stopped && !c.pinned {
			if err := d.pin(v); err != nil {
				return fmt.Errorf("vCPU %d: hold: %w", v, err)
			}
		}
	}
	d.pins.loose = true
	return nil
}
