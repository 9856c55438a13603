package x86

import (
	"encoding/binary"
	"fmt"
	"math"
)

// CanStep reports whether the instruction may be executed with TF set and the
// vCPU stopped again by the trap after it (SDM 3B, chapter Debug, "Single-Step
// Exception Condition"). The error wraps
// [ErrNotSteppable] and says why not. Refused are
//
//   - software interrupts, system calls and far transfers, which load another
//     CS, RIP and flags or enter a handler with TF cleared: the step would end
//     late or not at all;
//   - instructions that always raise #UD: their handler would see a changed
//     address or a TF of ours, and code that is meant to trap (UD2 of Linux'
//     WARN) is looked up by address;
//   - MOV SS, POP SS and LSS, which hold the trap back for one instruction
//     (SDM 3A, "Masking Exceptions and Interrupts When Switching Stacks"), and STI, whose interrupt shadow does not survive a stop;
//   - HLT, MWAIT and their kin, which wait for the interrupt that the engine
//     keeps away;
//   - what hypervisors always intercept and complete in software, where the
//     trap may be lost or be delivered to the guest: CPUID, IN, OUT, INS, OUTS,
//     RDMSR, WRMSR, moves to control registers, WBINVD, INVD, XSETBV;
//   - the debug and descriptor-table registers, SWAPGS, hypercalls,
//     virtualization, SGX, SMM, and transactions, which TF aborts.
//
// POPF and CLI can be stepped: [Insn.FinishStep] keeps their new IF. So can
// LOCK-prefixed instructions.
func (in *Insn) CanStep() error {
	if why := in.unsteppable(); why != "" {
		return fmt.Errorf("%w: %s: %s", ErrNotSteppable, in, why)
	}
	return nil
}

func (in *Insn) unsteppable() string {
	const (
		softInt   = "software interrupt"
		syscall   = "system call or return"
		far       = "far control transfer"
		wait      = "waits for an event"
		intercept = "completed by the hypervisor"
		system    = "changes the state of the system"
		virt      = "virtualization instruction"
		enclave   = "enclave instruction"
		tsx       = "transactions abort under TF"
		undefined = "always raises #UD"
		shadow    = "delays the trap after it"
	)
	if in.Len == 0 {
		return "no instruction"
	}
	if in.enc != encLegacy {
		return ""
	}
	if in.vendorDefined() {
		return "processors disagree about its length and target"
	}
	ext, mem := in.ext(), in.modrmMem()
	switch in.omap {
	case 0:
		switch in.op {
		case 0xcc, 0xcd, 0xf1:
			return softInt
		case 0xcf:
			return syscall
		case 0xca, 0xcb:
			return far
		case 0xff:
			if ext == 3 || ext == 5 {
				return far
			}
		case 0xf4:
			return wait
		case 0x6c, 0x6d, 0x6e, 0x6f, 0xe4, 0xe5, 0xe6, 0xe7, 0xec, 0xed, 0xee, 0xef:
			return intercept
		case 0x8e: // MOV Sreg
			switch ext {
			case 1, 6, 7:
				return undefined
			case 2:
				return shadow
			}
		case 0xfb: // STI
			return shadow
		case 0xc6, 0xc7:
			if in.modrm == 0xf8 {
				return tsx
			}
		}
	case 1:
		switch in.op {
		case 0x00:
			if ext == 2 || ext == 3 { // LLDT, LTR
				return system
			}
		case 0x01:
			if mem {
				switch ext {
				case 2, 3, 6: // LGDT, LIDT, LMSW
					return system
				}
				return ""
			}
			switch ext {
			case 6: // LMSW
				return system
			case 0: // VMCALL and friends, ENCLV, PCONFIG, WRMSRNS
				return virt
			case 1:
				switch in.modrm {
				case 0xc8, 0xc9: // MONITOR, MWAIT
					return wait
				case 0xca: // CLAC, or FRED's ERETS and ERETU
					if in.rep != 0 {
						return syscall
					}
				case 0xcb: // STAC
				default: // ENCLS, TDX
					return enclave
				}
			case 2:
				switch in.modrm {
				case 0xd0: // XGETBV
				case 0xd1:
					return intercept
				case 0xd4:
					return virt
				case 0xd5: // XEND
					return tsx
				case 0xd6: // XTEST
				default:
					return enclave
				}
			case 3: // SVM
				return virt
			case 5:
				if in.rep == 0xf3 && in.modrm >= 0xec {
					return syscall // UIRET, TESTUI, CLUI, STUI
				}
			case 7:
				switch in.modrm {
				case 0xf8:
					return "SWAPGS: entry code runs between two states"
				case 0xfa, 0xfb: // MONITORX, MWAITX
					return wait
				case 0xfe, 0xff: // INVLPGB, TLBSYNC
					return virt
				}
			}
		case 0x05, 0x07, 0x34, 0x35:
			return syscall
		case 0x06: // CLTS
			return system
		case 0x08, 0x09: // INVD, WBINVD
			return intercept
		case 0xa6, 0xa7: // VIA PadLock; undefined elsewhere
			return undefined
		case 0x0b, 0xb9, 0xff: // UD2, UD1, UD0
			return undefined
		case 0x21, 0x23:
			return "debug register"
		case 0x22:
			return intercept
		case 0x30, 0x32, 0xa2: // WRMSR, RDMSR, CPUID
			return intercept
		case 0x37:
			return system // GETSEC
		case 0x78, 0x79: // VMREAD, VMWRITE; with a prefix, SSE4a
			if in.rep == 0 && in.pfx&pfxOpSize == 0 {
				return virt
			}
		case 0xaa:
			return system // RSM
		case 0xae:
			if !mem && ext == 6 && in.rep != 0 || !mem && in.pfx&pfxOpSize != 0 && ext == 6 {
				return wait // UMONITOR, UMWAIT, TPAUSE
			}
		case 0xb2:
			return shadow // LSS
		case 0xc7:
			if mem && (ext == 6 || ext == 7) {
				return virt // VMPTRLD, VMCLEAR, VMXON, VMPTRST
			}
			if !mem && in.rep == 0xf3 && ext == 6 {
				return system // SENDUIPI
			}
		}
	case 2:
		switch in.op {
		case 0x80, 0x81: // INVEPT, INVVPID
			if in.pfx&pfxOpSize != 0 {
				return virt
			}
		case 0x82: // INVPCID
			return intercept
		}
	}
	return ""
}

// isBranchRel reports whether the instruction branches relative to itself.
func (in *Insn) isBranchRel() bool { return in.form&relBranch != 0 }

// isIndirectCall reports whether the instruction is CALL r/m64.
func (in *Insn) isIndirectCall() bool { return in.is(0, 0xff) && in.ext() == 2 }

// setsIP reports whether the instruction loads RIP with an absolute address.
func (in *Insn) setsIP() bool {
	if in.enc != encLegacy || in.omap != 0 {
		return false
	}
	return in.op == 0xc2 || in.op == 0xc3 || in.op == 0xff && (in.ext() == 2 || in.ext() == 4)
}

// Relocate returns the bytes to step at address to in place of the instruction at
// address from. [Insn.FinishStep] must be called after the step. A RIP-relative
// displacement is adjusted; [ErrRange] means that its target is more than 2 GiB from
// to. Relative branches and calls give [ErrNotRelocatable]; [Insn.Emulate] executes
// them. Instructions that CanStep refuses give [ErrNotRelocatable], too, and the
// error wraps both. If from == to, the bytes are the instruction's own.
func (in *Insn) Relocate(from, to uint64) (code []byte, err error) {
	if err := in.CanStep(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNotRelocatable, err)
	}
	code = append(make([]byte, 0, MaxLen), in.Bytes()...)
	if from == to {
		return code, nil
	}
	if in.isBranchRel() {
		return nil, fmt.Errorf("%w: %s is relative to its address", ErrNotRelocatable, in)
	}
	if in.form&ripRel == 0 {
		return code, nil
	}
	if in.pfx&pfxAddr32 != 0 {
		// EIP-relative: the target is the low half of an address, and wraps.
		d := uint32(in.disp()) + uint32(from) - uint32(to)
		binary.LittleEndian.PutUint32(code[in.dispOff:], d)
		return code, nil
	}
	d := int64(in.disp() + from - to)
	if d < math.MinInt32 || d > math.MaxInt32 {
		return nil, fmt.Errorf("%w: %s moved from %#x to %#x", ErrRange, in, from, to)
	}
	binary.LittleEndian.PutUint32(code[in.dispOff:], uint32(d))
	return code, nil
}

// FinishStep turns the state after a step into what executing the instruction
// at from without TF would have given. The step ran at to, where the engine
// had put the bytes of [Insn.Relocate]; from == to is a step in place. before
// holds the registers before the engine set TF and cleared IF, with IP == from;
// r holds those after the step and is corrected.
//
//   - RIP is moved from the copy back to the instruction's successor, except
//     after an indirect branch. A repeated string instruction that is not
//     done yet is left at from; [Insn.Repeats] tells.
//   - The return address pushed by an indirect call is corrected in m.
//   - TF and IF in the flags pushed by PUSHF are corrected in m.
//   - TF and IF in r become those of before, except that CLI and POPF keep the
//     IF, and POPF the TF, that they loaded.
//
// If r.IP is not where the instruction leads, the step was lost to an interrupt
// or exception: the error wraps [ErrStepLost]. On any error nothing was changed.
func (in *Insn) FinishStep(r *Regs, from, to uint64, m Memory, before *Regs) error {
	if in.Len == 0 {
		return fmt.Errorf("%w: no instruction", ErrStepLost)
	}
	n := uint64(in.Len)
	ip := r.IP
	done := true
	switch {
	case in.setsIP():
		// The target is not known here, but the stack pointer tells whether
		// the branch was done or something else was entered.
		if ip == to && from != to || r.SP != in.spAfterBranch(before) {
			return in.lost(ip, to)
		}
	case in.is(0, 0xe8), in.is(0, 0xe9), in.is(0, 0xeb):
		if ip != to+n+in.imm() {
			return in.lost(ip, to)
		}
		ip += from - to
	case in.isBranchRel() && ip == to+n+in.imm():
		ip += from - to
	case ip == to+n:
		ip = from + n
	case ip == to && in.Repeats():
		ip = from
		done = false
	default:
		return in.lost(ip, to)
	}

	const engineFlags = FlagTF | FlagIF
	flags := r.Flags&^engineFlags | before.Flags&engineFlags
	if done && in.enc == encLegacy && in.omap == 0 {
		switch in.op {
		case 0x9d: // POPF: IF changes only if CPL <= IOPL (SDM 2B POPF)
			if r.CS&3 <= before.Flags&FlagIOPL>>12 {
				flags = flags&^FlagIF | r.Flags&FlagIF
			}
			flags = flags&^FlagTF | r.Flags&FlagTF
		case 0xfa: // CLI, if it did not fault
			if r.CS&3 <= before.Flags&FlagIOPL>>12 {
				flags &^= FlagIF
			}
		}
	}

	// What the instruction pushed.
	switch {
	case in.isIndirectCall() && from != to:
		if err := fixStack(m, r.SP, to+n, from+n); err != nil {
			return err
		}
	case in.is(0, 0x9c):
		if err := in.fixPushf(m, r.SP, before.Flags&engineFlags); err != nil {
			return err
		}
	}
	r.IP, r.Flags = ip, flags
	return nil
}

// spAfterBranch is the stack pointer after an instruction for which setsIP holds.
func (in *Insn) spAfterBranch(before *Regs) uint64 {
	switch {
	case in.op == 0xc3:
		return before.SP + 8
	case in.op == 0xc2:
		return before.SP + 8 + in.imm()&0xffff
	case in.isIndirectCall():
		return before.SP - 8
	}
	return before.SP
}

func (in *Insn) lost(ip, to uint64) error {
	return fmt.Errorf("%w: %s stepped at %#x ended at %#x", ErrStepLost, in, to, ip)
}

// fixStack replaces the return address an indirect call pushed.
func fixStack(m Memory, sp, have, want uint64) error {
	if m == nil {
		return errNoMemory
	}
	buf := scratch.Get().(*[8]byte)
	defer scratch.Put(buf)
	if err := m.ReadVirt(sp, buf[:]); err != nil {
		return err
	}
	if got := binary.LittleEndian.Uint64(buf[:]); got != have {
		return fmt.Errorf("%w: return address at %#x is %#x, not %#x", ErrStepLost, sp, got, have)
	}
	binary.LittleEndian.PutUint64(buf[:], want)
	return m.WriteVirt(sp, buf[:])
}

// fixPushf sets TF and IF of the flags image at sp, 2 or 8 bytes long.
func (in *Insn) fixPushf(m Memory, sp, flags uint64) error {
	if m == nil {
		return errNoMemory
	}
	buf := scratch.Get().(*[8]byte)
	defer scratch.Put(buf)
	b := buf[:1] // both are bits of the second byte
	if err := m.ReadVirt(sp+1, b); err != nil {
		return err
	}
	const bits = (FlagTF | FlagIF) >> 8
	v := b[0]&^bits | byte(flags>>8)&bits
	if v == b[0] {
		return nil
	}
	b[0] = v
	return m.WriteVirt(sp+1, b)
}
