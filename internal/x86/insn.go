package x86

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"strings"

	"golang.org/x/arch/x86/x86asm"
)

// String returns a short disassembly in GNU syntax with branch targets and
// RIP-relative operands shown as if the instruction were at address 0, or its bytes
// in hexadecimal where the disassembler is not sure. It is for display only.
func (in *Insn) String() string {
	if in.Len == 0 {
		return "(none)"
	}
	switch {
	case in.is(1, 0x1e) && in.rep == 0xf3 && in.modrm == 0xfa:
		return "endbr64"
	case in.is(1, 0x1e) && in.rep == 0xf3 && in.modrm == 0xfb:
		return "endbr32"
	case in.IsNop() && in.omap == 1:
		return "nop (" + hex.EncodeToString(in.Bytes()) + ")"
	}
	// x86asm takes several forms it does not know for shorter ones, with
	// Op == 0 and no error; a different length gives it away too.
	d, err := x86asm.Decode(in.Bytes(), 64)
	if err != nil || d.Op == 0 || d.Len != in.Len {
		return "(" + hex.EncodeToString(in.Bytes()) + ")"
	}
	return strings.TrimSpace(x86asm.GNUSyntax(d, 0, nil))
}

// vendorDefined reports whether processors disagree about the instruction:
// with 66, Intel ignores the prefix on near branches and AMD truncates the
// branch to 16 bits (SDM 2A CALL, APM 3 §1.2.4).
func (in *Insn) vendorDefined() bool {
	if in.enc != encLegacy || in.pfx&pfxOpSize == 0 || in.rexW() {
		return false
	}
	switch in.omap {
	case 0:
		switch {
		case in.op >= 0x70 && in.op <= 0x7f, in.op >= 0xe0 && in.op <= 0xe3:
			return true
		case in.op == 0xe8, in.op == 0xe9, in.op == 0xeb, in.op == 0xc2, in.op == 0xc3:
			return true
		case in.op == 0xff && (in.ext() == 2 || in.ext() == 4):
			return true
		}
	case 1:
		return in.op >= 0x80 && in.op <= 0x8f
	}
	return false
}

// IsNop reports whether all the instruction does is to advance RIP: NOP in all
// its lengths, PAUSE, ENDBR32, ENDBR64 and the reserved hint NOPs of 0F 18 to
// 0F 1F (SDM 2B NOP, APM 3 "NOP"). RDSSP and the MPX opcodes are not counted,
// as they have effects once CET or MPX is on, and ENDBR counts because its
// effect (ending the wait for an ENDBR) is nil with CET off.
func (in *Insn) IsNop() bool {
	if in.enc != encLegacy || in.Len == 0 || in.pfx&pfxLock != 0 {
		return false
	}
	switch in.omap {
	case 0:
		// REX.B makes it XCHG R8, RAX.
		return in.op == 0x90 && in.rex&1 == 0
	case 1:
		switch in.op {
		case 0x18: // PREFETCHh
			return in.modrmMem()
		case 0x19, 0x1d, 0x1f:
			return true
		case 0x1c: // CLDEMOTE with memory
			return true
		case 0x1e:
			if in.rep == 0xf3 && in.mod() == 3 {
				return in.modrm == 0xfa || in.modrm == 0xfb
			}
			return true
		}
	}
	return false
}

// IsInt3 reports whether the instruction is the one-byte breakpoint, CC.
func (in *Insn) IsInt3() bool { return in.is(0, 0xcc) }

// isString reports whether the instruction is one of the string instructions
// that take a REP prefix (SDM 2B REP).
func (in *Insn) isString() bool {
	if in.enc != encLegacy || in.omap != 0 || in.Len == 0 {
		return false
	}
	switch in.op {
	case 0x6c, 0x6d, 0x6e, 0x6f, 0xa4, 0xa5, 0xa6, 0xa7, 0xaa, 0xab, 0xac, 0xad, 0xae, 0xaf:
		return true
	}
	return false
}

// Repeats reports whether the instruction is a string instruction with a
// repeat prefix. With TF set such an instruction traps after every iteration
// with RIP still at it (SDM 3B, chapter Debug, "Single-Step Exception
// Condition"); an engine steps on until RIP moves.
func (in *Insn) Repeats() bool { return in.isString() && in.rep != 0 }

// RIPRelative reports whether the instruction has an operand addressed
// relative to RIP (SDM 2A §2.2.1.6).
func (in *Insn) RIPRelative() bool { return in.form&ripRel != 0 }

// MemoryOperand reports whether the instruction may access data memory: by
// ModRM, by an absolute address, by the string registers or XLAT, by masked
// moves, or on the stack. LEA and the NOPs compute addresses but access nothing.
func (in *Insn) MemoryOperand() bool {
	if in.Len == 0 || in.IsNop() || in.is(0, 0x8d) {
		return false
	}
	if in.modrmMem() || in.form&hasMoffs != 0 || in.isString() {
		return true
	}
	if in.enc != encLegacy {
		return in.enc == encVEX && in.omap == 1 && in.op == 0xf7 // VMASKMOVDQU
	}
	switch in.omap {
	case 0:
		switch {
		case in.op >= 0x50 && in.op <= 0x5f, in.op == 0x68, in.op == 0x6a, // push, pop
			in.op == 0x8f, in.op == 0x9c, in.op == 0x9d,
			in.op == 0xc2, in.op == 0xc3, in.op == 0xc8, in.op == 0xc9, // ret, enter, leave
			in.op == 0xca, in.op == 0xcb, in.op >= 0xcc && in.op <= 0xcf, // far ret, int, iret
			in.op == 0xd7, in.op == 0xe8, in.op == 0xf1: // xlat, call, icebp
			return true
		case in.op == 0xff:
			return in.ext() == 2 || in.ext() == 6
		}
	case 1:
		switch in.op {
		case 0xa0, 0xa1, 0xa8, 0xa9: // push, pop fs and gs
			return true
		case 0xf7: // MASKMOVQ, MASKMOVDQU
			return true
		}
	}
	return false
}

// emulatePrefixes ask a hypervisor, Xen or (in KVM's own tests) KVM, to emulate the
// instruction after them: UD2 and three letters (Linux'
// arch/x86/include/asm/emulate_prefix.h; Xen's public/arch-x86/xen.h). The
// hypervisor's handler of #UD consumes the prefix and that instruction.
var emulatePrefixes = [...][5]byte{
	{0x0f, 0x0b, 'x', 'e', 'n'},
	{0x0f, 0x0b, 'k', 'v', 'm'},
}

// UnitLen returns the length in bytes of what Linux' decoder takes for one
// instruction at the start of code: an instruction with its emulate prefix, if it has
// one.
func UnitLen(code []byte) (int, error) {
	n := 0
	for _, p := range emulatePrefixes {
		if bytes.HasPrefix(code, p[:]) {
			n = len(p)
		}
	}
	in, err := Decode(code[n:])
	return n + in.Len, err
}

// FindBoundary checks that target is the address of an instruction, given the code of
// the function that begins at start. It decodes from start on, as Linux' can_probe
// does, which counts an emulate prefix and the instruction after it as one: no
// processor executes anything inside. The error wraps [ErrNotBoundary] and names the
// instruction that target is inside of, or says why decoding did not reach it.
func FindBoundary(code []byte, start, target uint64) error {
	off := target - start
	if target < start || off >= uint64(len(code)) {
		return fmt.Errorf("%w: %#x is outside of the %d bytes of code at %#x",
			ErrNotBoundary, target, len(code), start)
	}
	for at := uint64(0); at < off; {
		n, err := UnitLen(code[at:])
		if err != nil {
			return fmt.Errorf("%w: %#x cannot be reached from %#x: at %#x: %w",
				ErrNotBoundary, target, start, start+at, err)
		}
		next := at + uint64(n)
		if next > off {
			return fmt.Errorf("%w: %#x is %d bytes into the %d-byte instruction at %#x",
				ErrNotBoundary, target, off-at, n, start+at)
		}
		at = next
	}
	return nil
}
