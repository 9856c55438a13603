package qemu

import (
	"bytes"
	"errors"
	"fmt"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/x86"
)

// The methods here set and remove the stub's breakpoints while the VM is stopped;
// v.mu is held. The stub counts a breakpoint that is set twice twice, so each is
// set once.

// planted is a breakpoint that the stub has set.
type planted struct {
	kind byte // '0' or '1', as in Z packets
	insn x86.Insn
}

const int3 = 0xcc

// plant has the stub set a breakpoint. KVM's are int3s in memory, which the stub
// can plant only where the vCPU it happens to look through has the kernel mapped;
// debug registers don't care.
func (v *VM) plant(addr uint64, in *x86.Insn) error {
	if v.stuck[addr] {
		return fmt.Errorf("%#x: %w: QEMU keeps a breakpoint there that the guest had overwritten: close the VM and open it again", addr, breakpoint.ErrTextChanged)
	}
	kind := byte('0')
	var err error
	if !v.info.KVM || !v.hardware {
		err = v.callOK(breakPacket('Z', kind, addr))
		if no := (*refused)(nil); !v.info.KVM || !errors.As(err, &no) {
			if err == nil {
				v.breaks[addr] = planted{kind, *in}
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
		v.breaks[addr] = planted{kind, *in}
	}
	return herr
}

// lift removes the breakpoint at addr, if there is one.
//
// Under KVM QEMU then puts back the byte that it found there. If the guest has changed the rest
// of the instruction, the int3 is its own as well: text_poke_bp_batch
// (arch/x86/kernel/alternative.c) begins with one, and vCPUs that come to it are sent on.
// That byte over the rest of another instruction would be executed.
func (v *VM) lift(addr uint64) error {
	b, ok := v.breaks[addr]
	if !ok {
		return nil
	}
	theirs := v.shows(addr) && v.rewriting(addr, &b.insn)
	err := v.callOK(breakPacket('z', b.kind, addr))
	switch no := (*refused)(nil); {
	case errors.As(err, &no) && v.shows(addr) && v.overwrote(addr):
		return v.giveUp(addr)
	case err != nil:
		return err
	}
	delete(v.breaks, addr)
	if theirs {
		return v.putInt3(addr)
	}
	return nil
}

// giveUp leaves the breakpoint at addr to QEMU: the guest has overwritten its int3, and QEMU
// removes only what it finds.
func (v *VM) giveUp(addr uint64) error {
	delete(v.breaks, addr)
	v.stuck[addr] = true
	return fmt.Errorf("%w: the guest has overwritten the breakpoint", breakpoint.ErrTextChanged)
}

// unstick is called when a vCPU has stopped where no breakpoint is. Where one was given up
// QEMU takes an int3 of the guest's own for it, and removes it by now, so that it can be put
// back as the guest's.
func (v *VM) unstick() error {
	for addr := range v.stuck {
		err := v.callOK(breakPacket('z', '0', addr))
		if no := (*refused)(nil); errors.As(err, &no) {
			continue
		}
		if err != nil {
			return err
		}
		delete(v.stuck, addr)
		if err := v.putInt3(addr); err != nil {
			return err
		}
	}
	return nil
}

func (v *VM) putInt3(addr uint64) error { return v.callOK(fmt.Sprintf("M%x,1:%02x", addr, int3)) }

// rewriting reports whether behind the int3 at addr isn't the rest of in. Nobody knows if it
// can't be read.
func (v *VM) rewriting(addr uint64, in *x86.Insn) bool {
	var b [x86.MaxLen]byte
	cur := b[:in.Len]
	return v.peek(addr, cur) && cur[0] == int3 && !bytes.Equal(cur[1:], in.Bytes()[1:])
}

// overwrote reports whether something else than an int3 is at addr.
func (v *VM) overwrote(addr uint64) bool {
	var b [1]byte
	return v.peek(addr, b[:]) && b[0] != int3
}

// peek reads what some vCPU sees at addr, and reports whether it could.
func (v *VM) peek(addr uint64, b []byte) bool {
	thread := v.current
	if thread == "" && len(v.threads) > 0 {
		thread = v.threads[0]
	}
	return thread != "" && v.readVirt(thread, addr, b) == nil
}

// liftAll removes all breakpoints.
func (v *VM) liftAll() (errs error) {
	for addr := range v.breaks {
		if err := v.lift(addr); err != nil && !errors.Is(err, breakpoint.ErrTextChanged) {
			errs = errors.Join(errs, fmt.Errorf("remove breakpoint at %#x: %w", addr, err))
		}
	}
	return errs
}

// shows reports whether the breakpoint at addr is an int3 in the guest's memory.
func (v *VM) shows(addr uint64) bool { return v.info.KVM && v.breaks[addr].kind == '0' }

// breakPacket returns the packet that sets ('Z') or removes ('z') a breakpoint.
func breakPacket(op, kind byte, addr uint64) string {
	return fmt.Sprintf("%c%c,%x,1", op, kind, addr)
}
