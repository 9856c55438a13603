package x86

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"sync"
)

// An action is what Emulate does for an instruction.
type action uint8

const (
	actNone  action = iota // not emulated
	actNop                 // nothing
	actALU                 // one of the eight operations of opcodes 00-3F and 80-83
	actTest                // AND without a result
	actMov                 // destination = source
	actMovZX               // zero-extended, source narrower
	actMovSX               // sign-extended, source narrower
	actLea                 // destination = address of source
	actXchg                // two registers
	actInc                 //
	actDec                 //
	actNot                 //
	actNeg                 //
	actShift               // ROL, ROR, SHL, SHR, SAR by an immediate or 1
	actCmov                //
	actSetcc               //
	actPush                //
	actPop                 //
	actJmp                 //
	actJcc                 //
	actLoop                // LOOPNE, LOOPE, LOOP, JRCXZ
	actCall                //
	actRet                 //
	actLeave               //
	actCBW                 // CBW, CWDE, CDQE
	actCWD                 // CWD, CDQ, CQO
	actBswap               //
	actFlag                // CLC, STC, CMC, CLD, STD
)

// An operand of an emulated instruction.
type operand uint8

const (
	opNone operand = iota
	opReg          // ModRM.reg
	opRM           // ModRM.rm: register or memory
	opLow          // register in the opcode
	opAcc          // AL, AX, EAX, RAX
	opImm
	opOne   // the constant 1
	opMoffs // memory at an absolute address
)

// A plan is all Emulate has to know about an instruction.
type plan struct {
	act      action
	sub      uint8 // ALU or shift operation, or condition
	dst, src operand
	size     uint8 // of the operation and destination, in bytes
	srcSize  uint8 // of the source, if it is narrower
}

// Numbers of the ALU operations in opcodes 00-3F and in ModRM.reg of 80-83.
const (
	aluAdd = iota
	aluOr
	aluAdc
	aluSbb
	aluAnd
	aluSub
	aluXor
	aluCmp
)

// opSize is the operand size of instructions without a byte form
// (SDM 1 table 3-4).
func (in *Insn) opSize() uint8 {
	switch {
	case in.rexW():
		return 8
	case in.pfx&pfxOpSize != 0:
		return 2
	}
	return 4
}

// plan says how the instruction is emulated. It depends on the instruction
// alone; register values may still make Emulate refuse.
func (in *Insn) plan() plan {
	var none plan
	if in.Len == 0 || in.enc != encLegacy {
		return none
	}
	// LOCK asks for atomicity. Mixed repeat prefixes, several segments and a
	// stray REX are things no compiler emits and processors may differ on.
	if in.pfx&(pfxLock|pfxF2F3|pfxTwoSegs|pfxDeadREX) != 0 {
		return none
	}
	if in.IsNop() {
		return plan{act: actNop}
	}
	if in.vendorDefined() {
		return none
	}
	// F2 and F3 are accepted only where compilers put them and processors
	// ignore them: "rep ret" and BND on near branches.
	if in.rep != 0 && !in.ignoresRep() {
		return none
	}

	op := in.op
	size := in.opSize()
	bsize := size // operand size where bit 0 of the opcode chooses it
	if op&1 == 0 {
		bsize = 1
	}
	opsz16 := in.pfx&pfxOpSize != 0
	mem := in.modrmMem()
	var p plan
	switch in.omap {
	case 0:
		switch {
		case op < 0x40: // ALU
			p = plan{act: actALU, sub: op >> 3, size: bsize}
			switch op & 7 {
			case 0, 1:
				p.dst, p.src = opRM, opReg
			case 2, 3:
				p.dst, p.src = opReg, opRM
			case 4, 5:
				p.dst, p.src = opAcc, opImm
			}
		case op >= 0x50 && op <= 0x57 && !opsz16:
			p = plan{act: actPush, src: opLow, size: 8}
		case op >= 0x58 && op <= 0x5f && !opsz16:
			p = plan{act: actPop, dst: opLow, size: 8}
		case op == 0x63 && in.rexW():
			p = plan{act: actMovSX, dst: opReg, src: opRM, size: 8, srcSize: 4}
		case (op == 0x68 || op == 0x6a) && !opsz16:
			p = plan{act: actPush, src: opImm, size: 8}
		case op >= 0x70 && op <= 0x7f:
			p = plan{act: actJcc, sub: op & 15}
		case op == 0x80, op == 0x81, op == 0x83:
			if op == 0x83 {
				bsize = size
			}
			p = plan{act: actALU, sub: in.ext(), dst: opRM, src: opImm, size: bsize}
		case op == 0x84 || op == 0x85:
			p = plan{act: actTest, dst: opRM, src: opReg, size: bsize}
		case op == 0x86 || op == 0x87:
			if mem {
				return none // locks the bus
			}
			p = plan{act: actXchg, dst: opRM, src: opReg, size: bsize}
		case op == 0x88 || op == 0x89:
			p = plan{act: actMov, dst: opRM, src: opReg, size: bsize}
		case op == 0x8a || op == 0x8b:
			p = plan{act: actMov, dst: opReg, src: opRM, size: bsize}
		case op == 0x8d:
			p = plan{act: actLea, dst: opReg, src: opRM, size: size}
		case op >= 0x90 && op <= 0x97:
			p = plan{act: actXchg, dst: opLow, src: opAcc, size: size}
		case op == 0x98:
			p = plan{act: actCBW, size: size}
		case op == 0x99:
			p = plan{act: actCWD, size: size}
		case op == 0xa0 || op == 0xa1:
			p = plan{act: actMov, dst: opAcc, src: opMoffs, size: bsize}
		case op == 0xa2 || op == 0xa3:
			p = plan{act: actMov, dst: opMoffs, src: opAcc, size: bsize}
		case op == 0xa8 || op == 0xa9:
			p = plan{act: actTest, dst: opAcc, src: opImm, size: bsize}
		case op >= 0xb0 && op <= 0xb7:
			p = plan{act: actMov, dst: opLow, src: opImm, size: 1}
		case op >= 0xb8 && op <= 0xbf:
			p = plan{act: actMov, dst: opLow, src: opImm, size: size}
		case op == 0xc0 || op == 0xc1:
			p = plan{act: actShift, sub: in.ext(), dst: opRM, src: opImm, size: bsize}
		case op == 0xd0 || op == 0xd1:
			p = plan{act: actShift, sub: in.ext(), dst: opRM, src: opOne, size: bsize}
		case op == 0xc2 || op == 0xc3:
			p = plan{act: actRet}
			if op == 0xc2 {
				p.src = opImm
			}
		case (op == 0xc6 || op == 0xc7) && in.ext() == 0:
			p = plan{act: actMov, dst: opRM, src: opImm, size: bsize}
		case op == 0xc9 && !opsz16:
			p = plan{act: actLeave}
		case op >= 0xe0 && op <= 0xe3 && in.pfx&pfxAddr32 == 0:
			p = plan{act: actLoop, sub: op & 3}
		case op == 0xe8:
			p = plan{act: actCall, src: opImm}
		case op == 0xe9 || op == 0xeb:
			p = plan{act: actJmp, src: opImm}
		case op == 0xf5 || op == 0xf8 || op == 0xf9 || op == 0xfc || op == 0xfd:
			p = plan{act: actFlag}
		case op == 0xf6 || op == 0xf7:
			p = plan{dst: opRM, size: bsize}
			switch in.ext() {
			case 0:
				p.act, p.src = actTest, opImm
			case 2:
				p.act = actNot
			case 3:
				p.act = actNeg
			default:
				return none
			}
		case op == 0xfe || op == 0xff:
			p = plan{dst: opRM, size: bsize}
			switch in.ext() {
			case 0:
				p.act = actInc
			case 1:
				p.act = actDec
			case 2:
				p = plan{act: actCall, src: opRM, size: 8}
			case 4:
				p = plan{act: actJmp, src: opRM, size: 8}
			case 6:
				if opsz16 {
					return none
				}
				p = plan{act: actPush, src: opRM, size: 8}
			default:
				return none
			}
		}
	case 1:
		switch {
		case op >= 0x40 && op <= 0x4f:
			p = plan{act: actCmov, sub: op & 15, dst: opReg, src: opRM, size: size}
		case op >= 0x80 && op <= 0x8f:
			p = plan{act: actJcc, sub: op & 15}
		case op >= 0x90 && op <= 0x9f:
			p = plan{act: actSetcc, sub: op & 15, dst: opRM, size: 1}
		case op == 0xb6 || op == 0xb7 || op == 0xbe || op == 0xbf:
			p = plan{act: actMovZX, dst: opReg, src: opRM, size: size, srcSize: 1 + op&1}
			if op >= 0xbe {
				p.act = actMovSX
			}
		case op >= 0xc8 && op <= 0xcf && size != 2: // 16-bit BSWAP is undefined
			p = plan{act: actBswap, dst: opLow, size: size}
		}
	}

	// Read-modify-write of memory must look atomic to interrupts and, as far
	// as it did on the processor, to others.
	if p.dst == opRM && mem {
		switch p.act {
		case actMov, actSetcc, actTest:
		case actALU:
			if p.sub != aluCmp {
				return none
			}
		default:
			return none
		}
	}
	if p.act == actShift && !p.shiftDefined(in.shiftCount(p)) {
		return none
	}
	return p
}

// ignoresRep reports whether F2 and F3 are known to do nothing.
func (in *Insn) ignoresRep() bool {
	if in.rep == 0xf3 {
		return in.omap == 0 && in.op == 0xc3
	}
	switch in.omap {
	case 0: // BND, a hint of the retired MPX
		return in.op >= 0x70 && in.op <= 0x7f || in.op == 0xc2 || in.op == 0xc3 ||
			in.op == 0xe8 || in.op == 0xe9 || in.op == 0xeb ||
			in.op == 0xff && (in.ext() == 2 || in.ext() == 4)
	case 1:
		return in.op >= 0x80 && in.op <= 0x8f
	}
	return false
}

// shiftCount is the masked count (SDM 2B SAL/SAR/SHL/SHR).
func (in *Insn) shiftCount(p plan) uint8 {
	if p.src == opOne {
		return 1
	}
	c := in.b[in.immOff]
	if p.size == 8 {
		return c & 63
	}
	return c & 31
}

// shiftDefined reports whether shift does the operation. Rotations through carry, the
// undocumented /6, and counts of the operand size or more, for which even CF is
// undefined, are left to the processor.
func (p plan) shiftDefined(count uint8) bool {
	switch p.sub {
	case 0, 1, 4, 5, 7:
		return count < p.size*8
	}
	return false
}

// CanEmulate reports whether Emulate knows the instruction. Emulate may still
// refuse: an address may not be canonical, or memory not accessible.
func (in *Insn) CanEmulate() bool { return in.plan().act != actNone }

// scratch holds a buffer for Memory calls, so that they cost no allocation.
var scratch = sync.Pool{New: func() any { return new([8]byte) }}

// Emulate executes the instruction on r, where r.IP is the address of the
// instruction, and on m. Afterwards r is as the processor would have left it, with IP
// at the successor and RF clear; the trap that TF in r.Flags asks for is not raised.
// If it returns an error, nothing was changed. An error that wraps [ErrNotEmulated]
// says that the processor has to execute the instruction; other errors come from m.
//
// It emulates, in 64-bit mode: NOPs and ENDBR; MOV, MOVZX, MOVSX, MOVSXD, LEA,
// CMOVcc, SETcc; ADD, OR, ADC, SBB, AND, SUB, XOR, CMP and TEST with a register
// destination (CMP and TEST with memory, too); INC, DEC, NEG, NOT, XCHG, BSWAP
// and shifts and rotations by a constant, of registers; PUSH, POP, LEAVE; near
// JMP, Jcc, LOOPcc, JRCXZ, CALL and RET; CBW, CWD and their wider forms; CLC, STC,
// CMC, CLD, STD. Reading, changing and writing memory back is not emulated, as
// it would not be atomic, and neither is anything with an effect on the system.
//
// Status flags the manual leaves undefined, on which no program can rely, get
// the values measured on AMD Zen: AF is 0 after logical operations and 1 after
// shifts, and OF follows the last bit of a shift or rotation.
func (in *Insn) Emulate(r *Regs, m Memory) error {
	p := in.plan()
	if p.act == actNone {
		return ErrNotEmulated
	}
	e := emulation{in: *in, p: p, old: *r, r: *r, m: m}
	e.r.IP += uint64(in.Len)
	e.r.Flags &^= FlagRF
	if err := e.run(); err != nil {
		return err
	}
	if e.writeLen != 0 {
		if err := e.commit(); err != nil {
			return err
		}
	}
	*r = e.r
	return nil
}

// emulation is one execution in progress: all reads come first, then the
// register changes on a copy, then at most one write to memory.
//
// It holds copies, no pointers besides m, so that in and r need not escape to
// the heap with what m is given.
type emulation struct {
	in  Insn
	p   plan
	old Regs // before the instruction
	r   Regs // after it
	m   Memory

	writeAddr uint64
	writeVal  uint64
	writeLen  uint8
}

func (e *emulation) run() error {
	p, in := e.p, &e.in
	switch p.act {
	case actNop:
		return nil
	case actALU, actTest:
		a, err := e.get(p.dst, p.size)
		if err != nil {
			return err
		}
		b, err := e.get(p.src, p.size)
		if err != nil {
			return err
		}
		sub := p.sub
		if p.act == actTest {
			sub = aluAnd
		}
		res := e.alu(sub, a, b)
		if p.act == actTest || sub == aluCmp {
			return nil
		}
		return e.put(p.dst, p.size, res)
	case actMov:
		v, err := e.get(p.src, p.size)
		if err != nil {
			return err
		}
		return e.put(p.dst, p.size, v)
	case actMovZX, actMovSX:
		v, err := e.get(p.src, p.srcSize)
		if err != nil {
			return err
		}
		if p.act == actMovSX {
			v = signExtend(v, p.srcSize)
		}
		return e.put(p.dst, p.size, v)
	case actLea:
		return e.put(p.dst, p.size, e.effective())
	case actXchg:
		a, err := e.get(p.dst, p.size)
		if err != nil {
			return err
		}
		b, err := e.get(p.src, p.size)
		if err != nil {
			return err
		}
		if err := e.put(p.dst, p.size, b); err != nil {
			return err
		}
		return e.put(p.src, p.size, a)
	case actInc, actDec, actNot, actNeg:
		v, err := e.get(p.dst, p.size)
		if err != nil {
			return err
		}
		cf := e.r.Flags & FlagCF
		switch p.act {
		case actInc: // CF stays (SDM 2A INC)
			v = e.alu(aluAdd, v, 1)
			e.r.Flags = e.r.Flags&^FlagCF | cf
		case actDec:
			v = e.alu(aluSub, v, 1)
			e.r.Flags = e.r.Flags&^FlagCF | cf
		case actNeg:
			v = e.alu(aluSub, 0, v)
		case actNot:
			v = ^v
		}
		return e.put(p.dst, p.size, v)
	case actShift:
		v, err := e.get(p.dst, p.size)
		if err != nil {
			return err
		}
		return e.put(p.dst, p.size, e.shift(v, in.shiftCount(p)))
	case actCmov:
		// The source is read, and a 32-bit destination zero-extended, whether
		// the condition holds or not (SDM 2A CMOVcc).
		v, err := e.get(p.src, p.size)
		if err != nil {
			return err
		}
		if !condition(p.sub, e.old.Flags) {
			if v, err = e.get(p.dst, p.size); err != nil {
				return err
			}
		}
		return e.put(p.dst, p.size, v)
	case actSetcc:
		var v uint64
		if condition(p.sub, e.old.Flags) {
			v = 1
		}
		return e.put(p.dst, 1, v)
	case actPush:
		v, err := e.get(p.src, 8)
		if err != nil {
			return err
		}
		return e.push(v)
	case actPop:
		v, err := e.load(e.old.SP, 8)
		if err != nil {
			return err
		}
		e.r.SP += 8
		return e.put(p.dst, 8, v) // POP RSP: the value popped wins
	case actJcc:
		if condition(p.sub, e.old.Flags) {
			return e.branch(e.r.IP + in.imm())
		}
		return nil
	case actLoop:
		taken := false
		if p.sub == 3 { // JRCXZ
			taken = e.r.CX == 0
		} else {
			e.r.CX--
			zf := e.r.Flags&FlagZF != 0
			taken = e.r.CX != 0 && (p.sub == 2 || zf == (p.sub == 1))
		}
		if taken {
			return e.branch(e.r.IP + in.imm())
		}
		return nil
	case actJmp, actCall:
		target := e.r.IP + in.imm()
		if p.src == opRM {
			var err error
			if target, err = e.get(opRM, 8); err != nil {
				return err
			}
		}
		if p.act == actCall {
			if err := e.push(e.r.IP); err != nil {
				return err
			}
		}
		return e.branch(target)
	case actRet:
		target, err := e.load(e.old.SP, 8)
		if err != nil {
			return err
		}
		e.r.SP += 8
		if p.src == opImm {
			e.r.SP += in.imm() & 0xffff
		}
		return e.branch(target)
	case actLeave:
		v, err := e.load(e.old.BP, 8)
		if err != nil {
			return err
		}
		e.r.SP = e.old.BP + 8
		e.r.BP = v
		return nil
	case actCBW:
		return e.put(opAcc, p.size, signExtend(e.r.AX, p.size/2))
	case actCWD:
		v := uint64(int64(signExtend(e.r.AX, p.size)) >> 63)
		writeReg(&e.r.DX, p.size, v)
		return nil
	case actBswap:
		v := bits.ReverseBytes64(*e.r.gpr(in.opReg()))
		if p.size == 4 {
			v = uint64(bits.ReverseBytes32(uint32(*e.r.gpr(in.opReg()))))
		}
		return e.put(opLow, p.size, v)
	case actFlag:
		switch in.op {
		case 0xf5:
			e.r.Flags ^= FlagCF
		case 0xf8:
			e.r.Flags &^= FlagCF
		case 0xf9:
			e.r.Flags |= FlagCF
		case 0xfc:
			e.r.Flags &^= FlagDF
		case 0xfd:
			e.r.Flags |= FlagDF
		}
		return nil
	}
	return ErrNotEmulated
}

// condition evaluates condition code cc (SDM 1 appendix B).
func condition(cc uint8, flags uint64) bool {
	var v bool
	switch cc >> 1 {
	case 0:
		v = flags&FlagOF != 0
	case 1:
		v = flags&FlagCF != 0
	case 2:
		v = flags&FlagZF != 0
	case 3:
		v = flags&(FlagCF|FlagZF) != 0
	case 4:
		v = flags&FlagSF != 0
	case 5:
		v = flags&FlagPF != 0
	case 6:
		v = (flags&FlagSF != 0) != (flags&FlagOF != 0)
	case 7:
		v = flags&FlagZF != 0 || (flags&FlagSF != 0) != (flags&FlagOF != 0)
	}
	return v != (cc&1 != 0)
}

// sizeMask has the bits of an operand of size bytes.
func sizeMask(size uint8) uint64 { return ^uint64(0) >> (64 - 8*uint(size)) }

func signExtend(v uint64, size uint8) uint64 {
	s := 64 - 8*uint(size)
	return uint64(int64(v<<s) >> s)
}

// writeReg writes size bytes of v to a register: 32-bit results are
// zero-extended, narrower ones leave the rest alone (SDM 1 §3.4.1.1).
func writeReg(reg *uint64, size uint8, v uint64) {
	switch size {
	case 8:
		*reg = v
	case 4:
		*reg = uint64(uint32(v))
	default:
		mask := sizeMask(size)
		*reg = *reg&^mask | v&mask
	}
}

// highByte reports whether register number n of an 8-bit operand means AH, CH,
// DH or BH, and gives the number of the register it is part of.
func (in *Insn) highByte(n uint8) (uint8, bool) {
	if in.rex == 0 && n >= 4 && n <= 7 {
		return n - 4, true
	}
	return n, false
}

// regOf maps a register operand to its number.
func (in *Insn) regOf(o operand) uint8 {
	switch o {
	case opReg:
		return in.reg()
	case opRM:
		return in.rm()
	case opLow:
		return in.opReg()
	}
	return 0
}

// get reads an operand as it was before the instruction, zero-extended.
func (e *emulation) get(o operand, size uint8) (uint64, error) {
	switch o {
	case opImm:
		return e.in.imm() & sizeMask(size), nil
	case opMoffs:
		return e.load(e.linear(e.in.disp()), size)
	case opRM:
		if e.in.mod() != 3 {
			return e.load(e.linear(e.effective()), size)
		}
	}
	n := e.in.regOf(o)
	if size == 1 {
		if h, ok := e.in.highByte(n); ok && o != opAcc {
			return *e.old.gpr(h) >> 8 & 0xff, nil
		}
	}
	return *e.old.gpr(n) & sizeMask(size), nil
}

// put writes a result to a register now, or remembers a write to memory.
func (e *emulation) put(o operand, size uint8, v uint64) error {
	switch o {
	case opMoffs:
		return e.store(e.linear(e.in.disp()), size, v)
	case opRM:
		if e.in.mod() != 3 {
			return e.store(e.linear(e.effective()), size, v)
		}
	}
	n := e.in.regOf(o)
	if size == 1 {
		if h, ok := e.in.highByte(n); ok && o != opAcc {
			reg := e.r.gpr(h)
			*reg = *reg&^0xff00 | v&0xff<<8
			return nil
		}
	}
	writeReg(e.r.gpr(n), size, v)
	return nil
}

// effective computes the effective address of the ModRM memory operand
// (SDM 2A tables 2-2, 2-3, §2.2.1.2 and §2.2.1.6).
func (e *emulation) effective() uint64 {
	in := &e.in
	addr := in.disp()
	switch {
	case in.form&ripRel != 0:
		addr += e.old.IP + uint64(in.Len)
	case in.form&hasSIB != 0:
		if base := in.sib & 7; base != 5 || in.mod() != 0 {
			addr += *e.old.gpr(base | in.rex<<3&8)
		}
		if index := in.sib>>3&7 | in.rex<<2&8; index != 4 {
			addr += *e.old.gpr(index) << (in.sib >> 6)
		}
	default:
		addr += *e.old.gpr(in.rm())
	}
	if in.pfx&pfxAddr32 != 0 {
		addr = uint64(uint32(addr))
	}
	return addr
}

// linear adds the segment base; only FS and GS have one (SDM 1 §3.4.2.1).
func (e *emulation) linear(addr uint64) uint64 {
	switch e.in.seg {
	case 0x64:
		addr += e.old.FSBase
	case 0x65:
		addr += e.old.GSBase
	}
	return addr
}

const pageSize = 4096

// canonical reports whether addr is canonical with 48 bits. With five-level
// paging more addresses are; refusing them just means stepping.
func canonical(addr uint64) bool {
	return uint64(int64(addr<<16)>>16) == addr
}

var (
	errCanonical = fmt.Errorf("%w: address is not canonical", ErrNotEmulated)
	errAlign     = fmt.Errorf("%w: misaligned access with AC set", ErrNotEmulated)
	errPriv      = fmt.Errorf("%w: user mode access to a kernel address", ErrNotEmulated)
	errSMAP      = fmt.Errorf("%w: kernel access to a user address with AC clear", ErrNotEmulated)
	errPage      = fmt.Errorf("%w: write across a page boundary", ErrNotEmulated)
	errNoMemory  = errors.New("x86: no memory given")
)

// access refuses accesses that might fault for another reason than the page
// tables' contents.
func (e *emulation) access(addr uint64, size uint8) error {
	last := addr + uint64(size) - 1
	if !canonical(addr) || !canonical(last) || last < addr {
		return errCanonical
	}
	kernelAddr := int64(addr) < 0
	if e.old.CS&3 == 3 {
		if e.old.Flags&FlagAC != 0 && addr&uint64(size-1) != 0 {
			return errAlign // SDM 3A, "Alignment Check Exception (#AC)"
		}
		// The kernel of a 64-bit Xen PV guest runs in ring 3, too; a user
		// instruction must not get a kernel's access.
		if kernelAddr && int64(e.old.IP) >= 0 {
			return errPriv
		}
	} else if !kernelAddr && e.old.Flags&FlagAC == 0 {
		return errSMAP // SDM 3A §4.6.1; whether CR4.SMAP is on is not known here
	}
	if e.m == nil {
		return errNoMemory
	}
	return nil
}

func (e *emulation) load(addr uint64, size uint8) (uint64, error) {
	if err := e.access(addr, size); err != nil {
		return 0, err
	}
	buf := scratch.Get().(*[8]byte)
	defer scratch.Put(buf)
	*buf = [8]byte{}
	if err := e.m.ReadVirt(addr, buf[:size]); err != nil {
		return 0, err
	}
	return binary.LittleEndian.Uint64(buf[:]), nil
}

// store notes the instruction's one write for commit.
func (e *emulation) store(addr uint64, size uint8, v uint64) error {
	if err := e.access(addr, size); err != nil {
		return err
	}
	if addr&(pageSize-1)+uint64(size) > pageSize {
		return errPage
	}
	e.writeAddr, e.writeVal, e.writeLen = addr, v, size
	return nil
}

func (e *emulation) commit() error {
	buf := scratch.Get().(*[8]byte)
	defer scratch.Put(buf)
	binary.LittleEndian.PutUint64(buf[:], e.writeVal)
	return e.m.WriteVirt(e.writeAddr, buf[:e.writeLen])
}

func (e *emulation) push(v uint64) error {
	e.r.SP -= 8
	return e.store(e.r.SP, 8, v)
}

func (e *emulation) branch(target uint64) error {
	if !canonical(target) {
		return errCanonical // #GP at the branch
	}
	e.r.IP = target
	return nil
}

// setResultFlags sets PF, ZF and SF from a result and clears the other status
// flags.
func (e *emulation) setResultFlags(res uint64, size uint8) {
	f := e.r.Flags &^ arithFlags
	if bits.OnesCount8(uint8(res))&1 == 0 {
		f |= FlagPF
	}
	if res == 0 {
		f |= FlagZF
	}
	if res>>(8*uint(size)-1)&1 != 0 {
		f |= FlagSF
	}
	e.r.Flags = f
}

// alu does one of the eight two-operand operations and sets the status flags
// (SDM 1 appendix A). Operands are zero-extended; so is the result.
func (e *emulation) alu(sub uint8, a, b uint64) uint64 {
	size := e.p.size
	mask := sizeMask(size)
	msb := 8*uint(size) - 1
	var carry, res uint64
	if sub == aluAdc || sub == aluSbb {
		carry = e.r.Flags & FlagCF
	}
	var cf, of bool
	switch sub {
	case aluAdd, aluAdc:
		sum, c := bits.Add64(a, b, carry)
		res = sum & mask
		cf = c != 0 || sum != res
		of = (a^res)&(b^res)>>msb&1 != 0
	case aluSub, aluSbb, aluCmp:
		diff, c := bits.Sub64(a, b, carry)
		res = diff & mask
		cf = c != 0
		of = (a^b)&(a^res)>>msb&1 != 0
	default:
		switch sub {
		case aluOr:
			res = a | b
		case aluAnd:
			res = a & b
		case aluXor:
			res = a ^ b
		}
		e.setResultFlags(res, size) // CF and OF 0, AF undefined: 0
		return res
	}
	e.setResultFlags(res, size)
	if cf {
		e.r.Flags |= FlagCF
	}
	if of {
		e.r.Flags |= FlagOF
	}
	e.r.Flags |= (a ^ b ^ res) & FlagAF
	return res
}

// shift does ROL, ROR, SHL, SHR and SAR by a masked constant less than the
// operand size (SDM 2B SAL/SAR/SHL/SHR and RCL/RCR/ROL/ROR). A count of 0
// changes no flag. OF for counts above 1 and AF of all shifts are undefined:
// they get what AMD Zen processors were measured to set, which is OF by the
// rule for a count of 1 applied to the last bit shifted, and AF 1.
func (e *emulation) shift(v uint64, count uint8) uint64 {
	if count == 0 {
		return v
	}
	size := e.p.size
	mask := sizeMask(size)
	width := 8 * uint(size)
	n := uint(count)
	var res uint64
	var cf, of bool
	top := func(x uint64, i uint) bool { return x>>(width-i)&1 != 0 }
	switch e.p.sub {
	case 0, 1: // rotations touch CF and OF only
		if e.p.sub == 0 {
			res = (v<<n | v>>(width-n)) & mask
			cf = res&1 != 0
			of = cf != top(res, 1)
		} else {
			res = (v>>n | v<<(width-n)) & mask
			cf = top(res, 1)
			of = cf != top(res, 2)
		}
		e.r.Flags &^= FlagCF | FlagOF
	case 4:
		res = v << n & mask
		cf = v>>(width-n)&1 != 0
		of = cf != top(res, 1)
		e.setResultFlags(res, size)
	case 5:
		res = v >> n
		cf = v>>(n-1)&1 != 0
		of = top(res, 2) // for a count of 1 the old sign
		e.setResultFlags(res, size)
	default: // SAR
		s := int64(signExtend(v, size))
		res = uint64(s>>n) & mask
		cf = uint64(s>>(n-1))&1 != 0
		e.setResultFlags(res, size)
	}
	if e.p.sub >= 4 {
		e.r.Flags |= FlagAF
	}
	if cf {
		e.r.Flags |= FlagCF
	}
	if of {
		e.r.Flags |= FlagOF
	}
	return res
}
