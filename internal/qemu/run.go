package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"
)

// The unexported functions here want v.mu held.

// A trapState says how far a stop at a breakpoint has come, of a VM that is served.
type trapState uint8

const (
	noTrap   trapState = iota
	newTrap            // nobody has taken it
	heldTrap           // it was taken, and its answer is still to come
)

// serve has stops at breakpoints noted, for one Driver, until unserve. Without one
// the VM goes on at once.
func (v *VM) serve() error {
	if v.served {
		return ErrAttached
	}
	v.served = true
	return nil
}

func (v *VM) unserve() { v.served = false }

// takeTrap returns the thread of a vCPU that has stopped at a breakpoint, if nobody
// has taken that yet. Whoever takes it lets the VM run (settle, run) or holds it.
func (v *VM) takeTrap() (thread string, ok bool) {
	if v.trap != newTrap {
		return "", false
	}
	v.trap = noTrap
	return v.trapOf, true
}

// holdTrap keeps the VM stopped until releaseTrap.
func (v *VM) holdTrap() { v.trap = heldTrap }

// releaseTrap says that a stop at a breakpoint no longer keeps the VM stopped.
func (v *VM) releaseTrap() { v.trap = noTrap }

// halt stops the VM, if it runs.
func (v *VM) halt() error {
	for v.running && v.err == nil {
		if !v.breakin {
			v.breakin = true
			if err := v.stub.interrupt(v.timeout); err != nil {
				return v.broken(err)
			}
			if err := v.stub.deadline(time.Now().Add(v.timeout)); err != nil {
				return v.broken(err)
			}
		}
		if v.reading {
			v.changed.Wait()
			continue
		}
		data, err := v.stub.receive()
		if err != nil {
			return v.broken(err)
		}
		if err := v.stopped(data); err != nil {
			return err
		}
	}
	return v.err
}

// settle lets the VM run unless something keeps it stopped.
func (v *VM) settle() error {
	if v.err != nil {
		return v.err
	}
	if v.running || v.frozen > 0 || v.trap != noTrap {
		return nil
	}
	return v.run("c")
}

// run lets the VM run, by the last of the given packets.
func (v *VM) run(packets ...string) error {
	v.forget()
	if err := v.post(packets...); err != nil {
		return err
	}
	v.running = true
	v.changed.Broadcast()
	return nil
}

// step has the vCPU of one thread, which is at the breakpoint at addr, execute the
// instruction there, while all other vCPUs stand still. Afterwards it is the current
// thread.
func (v *VM) step(thread string, addr uint64) error {
	kind := v.breaks[addr].kind
	if v.info.KVM { // which would trap again at once; TCG doesn't while it steps
		if err := v.callOK(breakPacket('z', kind, addr)); err != nil {
			return err
		}
	}
	v.forget()
	data, err := v.call("vCont;s:" + thread)
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
		if err := v.callOK(breakPacket('Z', kind, addr)); err != nil {
			return err
		}
	}
	return v.choose(thread)
}

// forget drops what was known of the stopped VM.
func (v *VM) forget() {
	v.regsOf = ""
	clear(v.pages)
}

// stopped takes the stop reply of a VM that ran, and notes a stop at a breakpoint.
func (v *VM) stopped(data []byte) error {
	stop, err := parseStop(data)
	if err != nil {
		return v.broken(err)
	}
	asked := v.breakin
	v.running, v.breakin, v.current = false, false, ""
	v.changed.Broadcast()
	if stop.exited {
		v.gone = true
		return v.lose(errors.New("the VM has ended: the guest was shut down, or reset under -no-reboot, or QEMU was quit"))
	}
	switch stop.signal {
	case sigTrap: // at a breakpoint
		thread := stop.thread
		if thread == "" {
			if len(v.threads) != 1 {
				return v.broken(fmt.Errorf("%w: it doesn't say which vCPU stopped", errProtocol))
			}
			thread = v.threads[0]
		}
		v.current = thread
		if !v.served {
			return errors.Join(v.unstick(), v.settle())
		}
		v.trap, v.trapOf = newTrap, thread
		return nil
	case sigInt:
		if asked {
			return nil
		}
		return v.lose(errors.New("somebody has paused the VM through QEMU's monitor (stop, virsh suspend, snapshot): " +
			"attach again when it runs"))
	case sigQuit:
		return v.lose(errors.New("the guest has shut down"))
	case sigAbrt:
		return v.lose(errors.New("QEMU has stopped the VM: the guest panicked, or met an internal error of QEMU"))
	case sigAlrm:
		return v.lose(errors.New("QEMU has stopped the VM: its watchdog has fired"))
	case sigIO:
		return v.lose(errors.New("QEMU has stopped the VM: a disk failed or is full; cure that, enter \"cont\" in the monitor, and attach again"))
	case sigXCPU:
		return v.lose(errors.New("QEMU has stopped the VM: it is migrating to another host; attach again there"))
	}
	return v.lose(fmt.Errorf("QEMU has stopped the VM (signal %d)", stop.signal))
}

// await waits, without v.mu, until the VM stops or ctx is done. If the VM is
// stopped already, or another goroutine waits for that, it returns when anything
// changes.
func (v *VM) await(ctx context.Context) error {
	if !v.running || v.reading {
		stop := context.AfterFunc(ctx, func() {
			v.mu.Lock()
			defer v.mu.Unlock()
			v.changed.Broadcast()
		})
		defer stop()
		v.changed.Wait()
		return nil
	}
	if !v.breakin {
		if err := v.stub.deadline(time.Time{}); err != nil {
			return v.broken(err)
		}
	}
	v.reading = true
	v.reads++
	turn := v.reads
	stop := context.AfterFunc(ctx, func() {
		v.mu.Lock()
		defer v.mu.Unlock()
		// A break-in has its own deadline, and ends the reading as well.
		if v.reading && v.reads == turn && !v.breakin {
			v.stub.deadline(time.Unix(1, 0))
		}
	})
	v.mu.Unlock()
	data, err := v.stub.receive()
	v.mu.Lock()
	stop()
	v.reading = false
	v.changed.Broadcast()
	if errors.Is(err, os.ErrDeadlineExceeded) && !v.breakin {
		return nil // ctx is done
	}
	if err != nil {
		return v.broken(err)
	}
	return v.stopped(data)
}

// watchEvery is how long a stop may stay unnoticed when nobody waits for stops.
const watchEvery = 50 * time.Millisecond

// watch sees the stops of a VM that nobody serves, so that it goes on: QEMU now
// and then reports one late, of a breakpoint that is gone.
func (v *VM) watch() {
	v.mu.Lock()
	defer v.mu.Unlock()
	for v.err == nil {
		if !v.served {
			if err := v.look(); err != nil {
				return
			}
		}
		v.rest()
	}
}

// look waits for a stop if the VM runs and nobody else waits for one.
func (v *VM) look() error {
	if !v.running || v.reading {
		return nil
	}
	return v.await(context.Background())
}

// rest waits, without v.mu, until it is time to look again.
func (v *VM) rest() {
	v.mu.Unlock()
	time.Sleep(watchEvery)
	v.mu.Lock()
}

// Freeze stops the VM until the Thaw that belongs to it; they nest. Many reads
// under one Freeze stop the VM once, and see one state of it.
func (v *VM) Freeze() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.freeze()
}

func (v *VM) freeze() error {
	v.frozen++
	if err := v.halt(); err != nil {
		v.frozen--
		return err
	}
	return nil
}

// Thaw ends a Freeze.
func (v *VM) Thaw() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.thaw(1)
}

// thaw ends n Freezes.
func (v *VM) thaw(n int) error {
	if n = min(n, v.frozen); n == 0 {
		return nil
	}
	v.frozen -= n
	v.changed.Broadcast()
	return v.settle()
}

// Who reads a page through the stub reads more, mostly: to stop the VM for each takes longer
// than the reading. So it stays stopped for lingerFor after a page, but not for longer than
// lingerMax at once; then it runs for lingerRest at least.
const (
	lingerFor  = 2 * time.Millisecond
	lingerMax  = 50 * time.Millisecond
	lingerRest = 10 * time.Millisecond
)

// A linger keeps a VM stopped between two reads.
type linger struct {
	on    bool
	since time.Time // when it began, or ended
	timer *time.Timer
	turn  uint64 // counts lingers, so that a late timer ends none but its own
}

// linger keeps the VM, which is stopped, so for a moment.
func (v *VM) linger() error {
	l, now := &v.lingering, time.Now()
	switch {
	case !l.on && (v.frozen > 1 || v.trap != noTrap):
		return nil // it is stopped for something else
	case l.on && now.Sub(l.since) > lingerMax:
		return v.endLinger()
	case l.on:
		l.timer.Reset(lingerFor)
		return nil
	case now.Sub(l.since) < lingerRest:
		return nil
	}
	if err := v.freeze(); err != nil {
		return err
	}
	l.on, l.since = true, now
	l.turn++
	turn := l.turn
	l.timer = time.AfterFunc(lingerFor, func() {
		v.mu.Lock()
		defer v.mu.Unlock()
		if l.on && l.turn == turn {
			_ = v.endLinger() // v.err has it
		}
	})
	return nil
}

func (v *VM) endLinger() error {
	v.lingering.timer.Stop()
	v.lingering.on, v.lingering.since = false, time.Now()
	return v.thaw(1)
}

// held calls f while the VM is stopped.
func (v *VM) held(f func() error) error {
	if err := v.freeze(); err != nil {
		return err
	}
	err := f()
	return errors.Join(err, v.thaw(1))
}
