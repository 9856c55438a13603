package qemu

import (
	"bytes"
	"errors"
	"fmt"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/x86"
	"github.com/vmprobes/vmprobes/paging"
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
	if _, ok := v.stuck[addr]; ok {
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

// lift removes the breakpoint at addr, if there is one. look reads the guest's code.
//
// Under KVM QEMU then puts back the byte that it found there. If the guest has changed the rest
// of the instruction, the int3 is its own as well: text_poke_bp_batch
// (arch/x86/kernel/alternative.c) begins with one, and vCPUs that come to it are sent on.
// That byte over the rest of another instruction would be executed.
//
// ErrTextChanged says that the int3 isn't in the guest any more. QEMU before 6.0 doesn't
// remove the breakpoint then, and no QEMU does where nothing is mapped.
func (v *VM) lift(addr uint64, look func(addr uint64, b []byte) error) error {
	b, ok := v.breaks[addr]
	if !ok {
		return v.putInt3(addr)
	}
	var gone error
	theirs := false
	if v.shows(addr) {
		var buf [x86.MaxLen]byte
		cur, orig := buf[:b.insn.Len], b.insn.Bytes()
		err := look(addr, cur)
		if errors.Is(err, paging.ErrNotMapped) || err == nil && cur[0] != int3 {
			gone = fmt.Errorf("%w: the guest has overwritten the breakpoint", breakpoint.ErrTextChanged)
		}
		theirs = err == nil && cur[0] == int3 && !bytes.Equal(cur[1:], orig[1:])
	}
	switch err, no := v.callOK(breakPacket('z', b.kind, addr)), (*refused)(nil); {
	case errors.As(err, &no) && gone != nil:
		v.stuck[addr] = false
	case err != nil:
		return err
	case theirs:
		v.stuck[addr] = true
	}
	delete(v.breaks, addr)
	return errors.Join(gone, v.putInt3(addr))
}

// unstick has QEMU forget breakpoints of which the guest had overwritten the int3, and has an
// int3 of its own there now, which QEMU takes for the breakpoint's.
func (v *VM) unstick() error {
	for addr, lifted := range v.stuck {
		if !lifted {
			var b [1]byte
			if v.peek(addr, b[:]) != nil || b[0] != int3 {
				continue // without an int3 there nothing comes of it
			}
			err := v.callOK(breakPacket('z', '0', addr))
			if no := (*refused)(nil); errors.As(err, &no) {
				continue
			}
			if err != nil {
				return err
			}
			v.stuck[addr] = true
		}
		if err := v.putInt3(addr); err != nil {
			return err
		}
	}
	return nil
}

// putInt3 puts back an int3 of the guest's, if one is to be put back.
func (v *VM) putInt3(addr uint64) error {
	if !v.stuck[addr] {
		return nil
	}
	err := v.anyThread(func() error { return v.callOK(fmt.Sprintf("M%x,1:%02x", addr, int3)) })
	if err == nil {
		delete(v.stuck, addr)
	}
	return err
}

// peek reads what some vCPU has at addr.
func (v *VM) peek(addr uint64, b []byte) error {
	return v.anyThread(func() error { return v.readMem(addr, b) })
}

// anyThread calls f with virtual addresses being those of one thread after the other, until it
// succeeds: one in user mode may lack the kernel.
func (v *VM) anyThread(f func() error) error {
	err := v.physical(0)
	if err != nil {
		return err
	}
	err = errors.New("no vCPU is known")
	for _, t := range v.threads {
		if err = v.choose(t); err == nil {
			if err = f(); err == nil {
				return nil
			}
		}
	}
	return err
}

// liftAll removes all breakpoints, and what was left to be done for those removed before.
func (v *VM) liftAll(look func(addr uint64, b []byte) error) (errs error) {
	for addr := range v.breaks {
		if err := v.lift(addr, look); err != nil && !errors.Is(err, breakpoint.ErrTextChanged) {
			errs = errors.Join(errs, fmt.Errorf("remove breakpoint at %#x: %w", addr, err))
		}
	}
	return errors.Join(errs, v.unstick())
}

// shows reports whether the breakpoint at addr is an int3 in the guest's memory.
func (v *VM) shows(addr uint64) bool { return v.info.KVM && v.breaks[addr].kind == '0' }

// breakPacket returns the packet that sets ('Z') or removes ('z') a breakpoint.
func breakPacket(op, kind byte, addr uint64) string {
	return fmt.Sprintf("%c%c,%x,1", op, kind, addr)
}
