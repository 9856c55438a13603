package qemu

import (
	"errors"
	"fmt"
)

// The methods here set and remove the stub's breakpoints while the VM is stopped;
// v.mu is held. The stub counts a breakpoint that is set twice twice, so each is
// set once.

// plant has the stub set a breakpoint. KVM's are int3s in memory, which the stub
// can plant only where the vCPU it happens to look through has the kernel mapped;
// debug registers don't care.
func (v *VM) plant(addr uint64) error {
	kind := byte('0')
	var err error
	if !v.info.KVM || !v.hardware {
		err = v.callOK(breakPacket('Z', kind, addr))
		if no := (*refused)(nil); !v.info.KVM || !errors.As(err, &no) {
			if err == nil {
				v.breaks[addr] = kind
			}
			return err
		}
	}
	kind = '1'
	herr := v.callOK(breakPacket('Z', kind, addr))
	if no := (*refused)(nil); errors.As(herr, &no) {
		return errors.Join(fmt.Errorf("the CPU's four debug registers are in use, by other probes or a watchpoint: remove one: %w", herr), err)
	}
	if herr == nil {
		v.breaks[addr] = kind
	}
	return herr
}

// lift removes the breakpoint at addr, if there is one.
func (v *VM) lift(addr uint64) error {
	kind, ok := v.breaks[addr]
	if !ok {
		return nil
	}
	if err := v.callOK(breakPacket('z', kind, addr)); err != nil {
		return err
	}
	delete(v.breaks, addr)
	return nil
}

// liftAll removes all breakpoints.
func (v *VM) liftAll() (errs error) {
	for addr := range v.breaks {
		if err := v.lift(addr); err != nil {
			errs = errors.Join(errs, fmt.Errorf("remove breakpoint at %#x: %w", addr, err))
		}
	}
	return errs
}

// shows reports whether the breakpoint at addr is an int3 in the guest's memory.
func (v *VM) shows(addr uint64) bool { return v.info.KVM && v.breaks[addr] == '0' }

// breakPacket returns the packet that sets ('Z') or removes ('z') a breakpoint.
func breakPacket(op, kind byte, addr uint64) string {
	return fmt.Sprintf("%c%c,%x,1", op, kind, addr)
}
