package xentest

import (
	"encoding/binary"
	"math/bits"
)

// Register numbers.
const (
	rax = iota
	rcx
	rdx
	rbx
	rsp
	rbp
	rsi
	rdi
	r8
	r9
	r10
	r11
	r12
	r13
	r14
	r15
)

// RFLAGS.
const (
	flCF   = 1 << 0
	flMBS  = 1 << 1
	flPF   = 1 << 2
	flAF   = 1 << 4
	flZF   = 1 << 6
	flSF   = 1 << 7
	flTF   = 1 << 8
	flIF   = 1 << 9
	flDF   = 1 << 10
	flOF   = 1 << 11
	flIOPL = 3 << 12
	flNT   = 1 << 14
	flRF   = 1 << 16
	flVM   = 1 << 17
	flAC   = 1 << 18
	flID   = 1 << 21

	flArith = flCF | flPF | flAF | flZF | flSF | flOF
)

type outcome uint8

const (
	done    outcome = iota
	again           // one iteration of a repeated instruction, more to come
	isInt3          // breakpoint; RIP is not advanced
	isUD            // invalid opcode
	isFault         // a page or protection fault
	isCall          // a PV hypercall; RIP is advanced
)

// insn executes one instruction.
type insn struct {
	m    *Machine
	v    *vcpu
	b    []byte
	i    int
	rex  byte
	op16 bool
	rep  byte
	gs   bool
	fs   bool
	bad  bool // fault
	size int

	// The operand of ModRM.
	mod, reg, rm int
	addr         uint64
}

func (x *insn) u8() byte {
	if x.i >= len(x.b) {
		x.bad = true
		return 0
	}
	x.i++
	return x.b[x.i-1]
}

func (x *insn) imm(n int) uint64 {
	if x.i+n > len(x.b) {
		x.bad = true
		return 0
	}
	b := x.b[x.i:]
	x.i += n
	switch n {
	case 1:
		return uint64(int64(int8(b[0])))
	case 2:
		return uint64(int64(int16(binary.LittleEndian.Uint16(b))))
	case 4:
		return uint64(int64(int32(binary.LittleEndian.Uint32(b))))
	}
	return binary.LittleEndian.Uint64(b)
}

// immSize is the size of an immediate of the operand size.
func (x *insn) immSize() int { return min(x.size, 4) }

// modrm decodes the ModRM byte; an immediate of immLen bytes follows.
func (x *insn) modrm(immLen int) {
	c := int(x.u8())
	x.mod, x.reg, x.rm = c>>6, c>>3&7|int(x.rex&4)<<1, c&7
	if x.mod == 3 {
		x.rm |= int(x.rex&1) << 3
		return
	}
	r := &x.v.r
	var a uint64
	switch {
	case x.rm == 4:
		s := int(x.u8())
		base, index := s&7|int(x.rex&1)<<3, s>>3&7|int(x.rex&2)<<2
		if index != 4 {
			a = r[index] << (s >> 6)
		}
		if s&7 == 5 && x.mod == 0 {
			a += x.imm(4)
		} else {
			a += r[base]
		}
	case x.rm == 5 && x.mod == 0:
		a = x.imm(4)
		a += x.v.rip + uint64(x.i+immLen)
	default:
		a = r[x.rm|int(x.rex&1)<<3]
	}
	switch x.mod {
	case 1:
		a += x.imm(1)
	case 2:
		a += x.imm(4)
	}
	if x.gs {
		a += x.v.gsBase
	}
	if x.fs {
		a += x.v.fsBase
	}
	x.addr = a
}

func (x *insn) load(va uint64, n int) uint64 {
	if off, left, ok := x.m.mem.translate(va, false); ok && left >= n {
		b := x.m.mem.b[off:]
		switch n {
		case 1:
			return uint64(b[0])
		case 2:
			return uint64(binary.LittleEndian.Uint16(b))
		case 4:
			return uint64(binary.LittleEndian.Uint32(b))
		}
		return binary.LittleEndian.Uint64(b)
	}
	var b [8]byte
	if !x.m.mem.access(va, b[:n], false, false) {
		x.bad = true
	}
	return binary.LittleEndian.Uint64(b[:])
}

func (x *insn) store(va uint64, n int, v uint64) {
	if x.bad {
		return
	}
	if off, left, ok := x.m.mem.translate(va, true); ok && left >= 8 && n == 8 {
		binary.LittleEndian.PutUint64(x.m.mem.b[off:], v)
		return
	}
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], v)
	if !x.m.mem.access(va, b[:n], true, false) {
		x.bad = true
	}
}

func (x *insn) getReg(r, n int) uint64 {
	if n == 1 && x.rex == 0 && r >= 4 && r < 8 {
		return x.v.r[r-4] >> 8 & 0xff
	}
	return x.v.r[r] & mask(n)
}

func (x *insn) setReg(r, n int, v uint64) {
	if x.bad {
		return
	}
	p := &x.v.r[r]
	switch n {
	case 1:
		if x.rex == 0 && r >= 4 && r < 8 {
			p = &x.v.r[r-4]
			*p = *p&^0xff00 | v&0xff<<8
			return
		}
		*p = *p&^0xff | v&0xff
	case 2:
		*p = *p&^0xffff | v&0xffff
	default:
		*p = v & mask(n)
	}
}

func mask(n int) uint64 {
	if n == 8 {
		return ^uint64(0)
	}
	return 1<<(8*n) - 1
}

func signBit(n int) uint64 { return 1 << (8*n - 1) }

func signed(v uint64, n int) int64 { return int64(v<<(64-8*n)) >> (64 - 8*n) }

func (x *insn) getRM(n int) uint64 {
	if x.mod == 3 {
		return x.getReg(x.rm, n)
	}
	return x.load(x.addr, n)
}

func (x *insn) setRM(n int, v uint64) {
	if x.mod == 3 {
		x.setReg(x.rm, n, v)
		return
	}
	x.store(x.addr, n, v)
}

func (x *insn) push(v uint64) {
	x.store(x.v.r[rsp]-8, 8, v)
	if !x.bad {
		x.v.r[rsp] -= 8
	}
}

func (x *insn) pop() uint64 {
	v := x.load(x.v.r[rsp], 8)
	if !x.bad {
		x.v.r[rsp] += 8
	}
	return v
}

func (x *insn) flags(clear, set uint64) {
	if !x.bad {
		x.v.flags = x.v.flags&^clear | set
	}
}

func when(c bool, f uint64) uint64 {
	if c {
		return f
	}
	return 0
}

func pszFlags(v uint64, n int) uint64 {
	v &= mask(n)
	return when(v == 0, flZF) | when(v&signBit(n) != 0, flSF) | when(bits.OnesCount8(uint8(v))%2 == 0, flPF)
}

// alu is one of the eight operations of opcodes 00 to 3f.
func (x *insn) alu(op int, a, b uint64, n int) (res uint64, write bool) {
	carry := x.v.flags & flCF
	if op != 2 && op != 3 {
		carry = 0
	}
	m, s := mask(n), signBit(n)
	switch op {
	case 0, 2: // add, adc
		var c uint64
		res, c = bits.Add64(a, b, carry)
		if n < 8 {
			c = res >> (8 * n)
		}
		res &= m
		x.flags(flArith, pszFlags(res, n)|when(c != 0, flCF)|(a^b^res)&flAF|when((a^res)&(b^res)&s != 0, flOF))
		return res, true
	case 3, 5, 7: // sbb, sub, cmp
		var c uint64
		res, c = bits.Sub64(a, b, carry)
		res &= m
		x.flags(flArith, pszFlags(res, n)|when(c != 0, flCF)|(a^b^res)&flAF|when((a^b)&(a^res)&s != 0, flOF))
		return res, op != 7
	case 1:
		res = a | b
	case 4:
		res = a & b
	case 6:
		res = a ^ b
	}
	x.flags(flArith, pszFlags(res, n))
	return res, true
}

func (x *insn) cond(c byte) bool {
	f := x.v.flags
	var t bool
	switch c >> 1 & 7 {
	case 0:
		t = f&flOF != 0
	case 1:
		t = f&flCF != 0
	case 2:
		t = f&flZF != 0
	case 3:
		t = f&(flCF|flZF) != 0
	case 4:
		t = f&flSF != 0
	case 5:
		t = f&flPF != 0
	case 6:
		t = f&flSF != 0 != (f&flOF != 0)
	case 7:
		t = f&flZF != 0 || f&flSF != 0 != (f&flOF != 0)
	}
	return t != (c&1 != 0)
}

// exec executes the instruction in b as if it stood at RIP, and advances RIP.
func (m *Machine) exec(v *vcpu, b []byte) outcome {
	x := &m.x
	*x = insn{m: m, v: v, b: b}
	start := v.rip
	o := x.run()
	if x.bad {
		v.rip = start
		return isFault
	}
	return o
}

func (x *insn) run() outcome {
	v := x.v
	var op byte
prefixes:
	for {
		op = x.u8()
		switch {
		case op == 0x66:
			x.op16 = true
		case op == 0xf0: // every instruction is atomic here
		case op == 0xf2 || op == 0xf3:
			x.rep = op
		case op == 0x65:
			x.gs = true
		case op == 0x64:
			x.fs = true
		case op == 0x2e || op == 0x36 || op == 0x3e || op == 0x26:
		case op>>4 == 4:
			x.rex = op
			op = x.u8()
			break prefixes
		default:
			break prefixes
		}
		if x.bad {
			return isFault
		}
	}
	x.size = 4
	if x.rex&8 != 0 {
		x.size = 8
	} else if x.op16 {
		x.size = 2
	}
	target, jump := uint64(0), false
	rexB := int(x.rex&1) << 3
	switch {
	case op < 0x40 && op&7 < 6:
		n := x.size
		if op&1 == 0 {
			n = 1
		}
		k := int(op >> 3)
		if op&7 >= 4 {
			b := x.imm(min(n, 4)) & mask(n)
			if res, w := x.alu(k, x.getReg(rax, n), b, n); w {
				x.setReg(rax, n, res)
			}
			break
		}
		x.modrm(0)
		a, b := x.getRM(n), x.getReg(x.reg, n)
		if op&2 != 0 {
			a, b = b, a
		}
		res, w := x.alu(k, a, b, n)
		if w && op&2 != 0 {
			x.setReg(x.reg, n, res)
		} else if w {
			x.setRM(n, res)
		}
	case op>>3 == 0x50>>3:
		x.push(v.r[int(op&7)|rexB])
	case op>>3 == 0x58>>3:
		val := x.pop()
		x.setReg(int(op&7)|rexB, 8, val)
	case op == 0x63:
		x.modrm(0)
		x.setReg(x.reg, x.size, uint64(signed(x.getRM(4), 4)))
	case op == 0x68:
		x.push(x.imm(4))
	case op == 0x6a:
		x.push(x.imm(1))
	case op == 0x69 || op == 0x6b:
		n := x.immSize()
		if op == 0x6b {
			n = 1
		}
		x.modrm(n)
		x.imul(x.reg, signed(x.getRM(x.size), x.size), int64(x.imm(n)))
	case op>>4 == 7:
		d := x.imm(1)
		target, jump = d, x.cond(op&15)
	case op == 0x80 || op == 0x81 || op == 0x83:
		n, i := x.size, 1
		switch op {
		case 0x80:
			n = 1
		case 0x81:
			i = x.immSize()
		}
		x.modrm(i)
		b := x.imm(i) & mask(n)
		if res, w := x.alu(x.reg&7, x.getRM(n), b, n); w {
			x.setRM(n, res)
		}
	case op == 0x84 || op == 0x85:
		n := x.size
		if op == 0x84 {
			n = 1
		}
		x.modrm(0)
		x.alu(4, x.getRM(n), x.getReg(x.reg, n), n)
	case op == 0x86 || op == 0x87:
		n := x.size
		if op == 0x86 {
			n = 1
		}
		x.modrm(0)
		a, b := x.getRM(n), x.getReg(x.reg, n)
		x.setRM(n, b)
		x.setReg(x.reg, n, a)
	case op >= 0x88 && op <= 0x8b:
		n := x.size
		if op&1 == 0 {
			n = 1
		}
		x.modrm(0)
		if op < 0x8a {
			x.setRM(n, x.getReg(x.reg, n))
		} else {
			x.setReg(x.reg, n, x.getRM(n))
		}
	case op == 0x8d:
		x.gs, x.fs = false, false
		x.modrm(0)
		if x.mod == 3 {
			return isUD
		}
		x.setReg(x.reg, x.size, x.addr)
	case op == 0x90 && rexB == 0:
	case op>>3 == 0x90>>3:
		r := int(op&7) | rexB
		a, b := x.getReg(rax, x.size), x.getReg(r, x.size)
		x.setReg(rax, x.size, b)
		x.setReg(r, x.size, a)
	case op == 0x98:
		x.setReg(rax, x.size, uint64(signed(v.r[rax], x.size/2)))
	case op == 0x99:
		x.setReg(rdx, x.size, uint64(signed(v.r[rax], x.size)>>63))
	case op == 0x9c:
		x.push(v.flags &^ (flRF | flVM))
	case op == 0x9d:
		c := uint64(flArith | flTF | flDF | flNT | flAC | flID)
		if x.m.cfg.Kind == HVM {
			c |= flIF
		}
		f := x.pop()
		x.flags(c|flRF, f&c)
	case op == 0xa8 || op == 0xa9:
		n, i := 1, 1
		if op == 0xa9 {
			n, i = x.size, x.immSize()
		}
		x.alu(4, x.getReg(rax, n), x.imm(i)&mask(n), n)
	case op == 0xaa || op == 0xab || op == 0xa4 || op == 0xa5:
		n := x.size
		if op&1 == 0 {
			n = 1
		}
		if x.rep != 0 && v.r[rcx] == 0 {
			break
		}
		step := uint64(n)
		if v.flags&flDF != 0 {
			step = -step
		}
		val := v.r[rax]
		if op < 0xa8 {
			val = x.load(v.r[rsi], n)
		}
		x.store(v.r[rdi], n, val)
		if x.bad {
			return isFault
		}
		v.r[rdi] += step
		if op < 0xa8 {
			v.r[rsi] += step
		}
		if x.rep != 0 {
			if v.r[rcx]--; v.r[rcx] != 0 {
				return again
			}
		}
	case op>>3 == 0xb0>>3:
		val := x.imm(1)
		x.setReg(int(op&7)|rexB, 1, val)
	case op>>3 == 0xb8>>3:
		val := x.imm(x.size)
		x.setReg(int(op&7)|rexB, x.size, val)
	case op == 0xc0 || op == 0xc1 || op>>2 == 0xd0>>2:
		n, i := x.size, 0
		if op&1 == 0 {
			n = 1
		}
		if op < 0xd0 {
			i = 1
		}
		x.modrm(i)
		c := uint64(1)
		switch {
		case i == 1:
			c = x.imm(1)
		case op >= 0xd2:
			c = v.r[rcx]
		}
		if !x.shift(n, c) {
			return isUD
		}
	case op == 0xc2:
		n := x.imm(2) & 0xffff
		t := x.pop()
		if x.bad {
			return isFault
		}
		v.r[rsp] += n
		v.rip = t
		return done
	case op == 0xc3:
		t := x.pop()
		v.rip = t
		return done
	case op == 0xc6 || op == 0xc7:
		n, i := 1, 1
		if op == 0xc7 {
			n, i = x.size, x.immSize()
		}
		x.modrm(i)
		x.setRM(n, x.imm(i))
	case op == 0xc9:
		s := v.r[rbp]
		old := v.r[rsp]
		v.r[rsp] = s
		b := x.pop()
		if x.bad {
			v.r[rsp] = old
			return isFault
		}
		v.r[rbp] = b
	case op == 0xcc:
		return isInt3
	case op == 0xcf && x.rex&8 != 0:
		if x.m.cfg.Kind == PV {
			return isFault // not used by this PV guest
		}
		var f [5]uint64
		for i := range f {
			f[i] = x.load(v.r[rsp]+uint64(8*i), 8)
		}
		if x.bad || f[1]&0xffff != hvmCS || f[4]&0xffff != hvmSS {
			return isFault
		}
		v.rip, v.flags, v.r[rsp] = f[0], f[2]|flMBS, f[3]
		return done
	case op == 0xe8:
		d := x.imm(4)
		x.push(v.rip + uint64(x.i))
		target, jump = d, true
	case op == 0xe9:
		target, jump = x.imm(4), true
	case op == 0xeb:
		target, jump = x.imm(1), true
	case op == 0xe3:
		d := x.imm(1)
		target, jump = d, v.r[rcx] == 0
	case op == 0xf6 || op == 0xf7:
		n, i := x.size, x.immSize()
		if op == 0xf6 {
			n, i = 1, 1
		}
		if x.i < len(x.b) && x.b[x.i]>>3&7 > 1 {
			i = 0
		}
		x.modrm(i)
		a := x.getRM(n)
		switch x.reg & 7 {
		case 0, 1:
			x.alu(4, a, x.imm(i)&mask(n), n)
		case 2:
			x.setRM(n, ^a)
		case 3:
			res, _ := x.alu(5, 0, a, n)
			x.setRM(n, res)
		case 4: // mul
			if n != 8 {
				return isUD
			}
			hi, lo := bits.Mul64(v.r[rax], a)
			x.flags(flArith, when(hi != 0, flCF|flOF))
			x.setReg(rax, 8, lo)
			x.setReg(rdx, 8, hi)
		default:
			return isUD
		}
	case op == 0xfa || op == 0xfb:
		if x.m.cfg.Kind == PV {
			return isFault
		}
		v.flags = v.flags&^flIF | when(op == 0xfb, flIF)
	case op == 0xfc || op == 0xfd:
		v.flags = v.flags&^flDF | when(op == 0xfd, flDF)
	case op == 0xfe || op == 0xff:
		n := x.size
		if op == 0xfe {
			n = 1
		}
		x.modrm(0)
		switch x.reg & 7 {
		case 0, 1:
			c := v.flags & flCF
			a := x.getRM(n)
			res, _ := x.alu(5*(x.reg&1), a, 1, n)
			x.flags(flCF, c)
			x.setRM(n, res)
		case 2:
			t := x.getRM(8)
			x.push(v.rip + uint64(x.i))
			if !x.bad {
				v.rip = t
			}
			return done
		case 4:
			v.rip = x.getRM(8)
			return done
		case 6:
			x.push(x.getRM(8))
		default:
			return isUD
		}
	case op == 0xc5:
		// vpaddq ymm0, ymm0, ymm1 is all the AVX there is.
		if x.u8() != 0xfd || x.u8() != 0xd4 || x.u8() != 0xc1 || x.bad || !x.m.cfg.AVX {
			return isUD
		}
		v.ymm.step()
		v.ymmWant.step()
	case op == 0x0f:
		switch o, t, j := x.twoByte(); {
		case j:
			target, jump = t, true
		case o == isCall:
			v.rip += uint64(x.i)
			return isCall
		case o != done:
			return o
		}
	default:
		return isUD
	}
	if x.bad {
		return isFault
	}
	v.rip += uint64(x.i)
	if jump {
		v.rip += target
	}
	return done
}

func (x *insn) twoByte() (o outcome, target uint64, jump bool) {
	v := x.v
	op := x.u8()
	switch {
	case op == 0x05 && x.m.cfg.Kind == PV:
		return isCall, 0, false
	case op == 0x18 || op == 0x1e || op == 0x1f:
		x.modrm(0)
	case op == 0x31:
		x.m.tsc += 1 + x.m.rng.Uint64N(1<<20)
		x.setReg(rax, 4, x.m.tsc)
		x.setReg(rdx, 4, x.m.tsc>>32)
	case op>>4 == 4:
		x.modrm(0)
		a := x.getRM(x.size)
		if !x.cond(op & 15) {
			a = x.getReg(x.reg, x.size)
		}
		x.setReg(x.reg, x.size, a)
	case op>>4 == 8:
		d := x.imm(4)
		return done, d, x.cond(op & 15)
	case op>>4 == 9:
		x.modrm(0)
		x.setRM(1, when(x.cond(op&15), 1))
	case op == 0xa2:
		h := (v.r[rax]&0xffffffff)*0x9e3779b97f4a7c15 ^ (v.r[rcx]&0xffffffff)*0xc2b2ae3d27d4eb4f
		for i, r := range []int{rax, rbx, rcx, rdx} {
			x.setReg(r, 4, bits.RotateLeft64(h, 13*i))
		}
	case op == 0xa3 || op == 0xba:
		i := 0
		if op == 0xba {
			i = 1
		}
		x.modrm(i)
		if op == 0xa3 && x.mod != 3 {
			return isUD, 0, false
		}
		n := x.getReg(x.reg, x.size)
		a := x.getRM(x.size)
		if op == 0xba {
			n = x.imm(1)
			if x.reg&7 < 4 {
				return isUD, 0, false
			}
		}
		n &= uint64(8*x.size - 1)
		x.flags(flCF, a>>n&1)
		if op == 0xba {
			switch x.reg & 7 {
			case 5:
				x.setRM(x.size, a|1<<n)
			case 6:
				x.setRM(x.size, a&^(1<<n))
			case 7:
				x.setRM(x.size, a^1<<n)
			}
		}
	case op == 0xaf:
		x.modrm(0)
		x.imul(x.reg, signed(x.getReg(x.reg, x.size), x.size), signed(x.getRM(x.size), x.size))
	case op == 0xb0 || op == 0xb1:
		n := x.size
		if op == 0xb0 {
			n = 1
		}
		x.modrm(0)
		a := x.getRM(n)
		x.alu(7, x.getReg(rax, n), a, n)
		if a == x.getReg(rax, n) {
			x.setRM(n, x.getReg(x.reg, n))
		} else {
			x.setReg(rax, n, a)
		}
	case op == 0xb6 || op == 0xb7:
		x.modrm(0)
		x.setReg(x.reg, x.size, x.getRM(int(op-0xb5)))
	case op == 0xbe || op == 0xbf:
		x.modrm(0)
		n := int(op - 0xbd)
		x.setReg(x.reg, x.size, uint64(signed(x.getRM(n), n)))
	case op == 0xc0 || op == 0xc1:
		n := x.size
		if op == 0xc0 {
			n = 1
		}
		x.modrm(0)
		a, b := x.getRM(n), x.getReg(x.reg, n)
		res, _ := x.alu(0, a, b, n)
		if x.mod == 3 {
			x.setReg(x.reg, n, a)
			x.setRM(n, res)
		} else {
			x.setRM(n, res)
			x.setReg(x.reg, n, a)
		}
	case op>>3 == 0xc8>>3:
		r := int(op&7) | int(x.rex&1)<<3
		if x.size == 8 {
			x.setReg(r, 8, bits.ReverseBytes64(v.r[r]))
		} else {
			x.setReg(r, 4, uint64(bits.ReverseBytes32(uint32(v.r[r]))))
		}
	default:
		return isUD, 0, false
	}
	return done, 0, false
}

func (x *insn) imul(dst int, a, b int64) {
	hi, lo := bits.Mul64(uint64(a), uint64(b))
	hi -= uint64(b) & uint64(a>>63)
	hi -= uint64(a) & uint64(b>>63)
	fits := int64(hi) == int64(lo)>>63 && signed(lo, x.size) == int64(lo)
	x.flags(flArith, when(!fits, flCF|flOF))
	x.setReg(dst, x.size, lo)
}

// shift does rol, ror, shl, shr and sar; OF only as for a count of 1.
func (x *insn) shift(n int, count uint64) bool {
	if n == 8 {
		count &= 63
	} else {
		count &= 31
	}
	a := x.getRM(n)
	m, s, w := mask(n), signBit(n), uint64(8*n)
	if count == 0 {
		return true
	}
	switch x.reg & 7 {
	case 0, 1:
		c := count % w
		if x.reg&7 == 1 {
			c = (w - c) % w
		}
		res := (a<<c | a>>(w-c)) & m
		if c == 0 {
			res = a
		}
		if x.reg&7 == 0 {
			x.flags(flCF|flOF, res&1|when(res&s != 0 != (res&1 != 0), flOF))
		} else {
			x.flags(flCF|flOF, when(res&s != 0, flCF)|when(res&s != 0 != (res&(s>>1) != 0), flOF))
		}
		x.setRM(n, res)
	case 4:
		res := a << count & m
		c := a >> (w - count) & 1
		x.flags(flArith, pszFlags(res, n)|c|when((c != 0) != (res&s != 0), flOF))
		x.setRM(n, res)
	case 5:
		res := a >> count
		x.flags(flArith, pszFlags(res, n)|a>>(count-1)&1|when(a&s != 0, flOF))
		x.setRM(n, res)
	case 7:
		sv := signed(a, n)
		res := uint64(sv>>count) & m
		x.flags(flArith, pszFlags(res, n)|uint64(sv>>(count-1))&1)
		x.setRM(n, res)
	default:
		return false
	}
	return true
}
