package x86

import "encoding/binary"

// MaxLen is the length of the longest valid instruction (SDM 2A §2.3.11).
const MaxLen = 15

// Insn is a decoded instruction. It is a value without pointers, holds its own
// bytes and may be copied and shared freely. The zero value is no instruction;
// get one from [Decode].
type Insn struct {
	// Len is the number of bytes, 1 to 15.
	Len int

	b     [MaxLen]byte
	enc   encoding // how the opcode is encoded
	omap  uint8    // opcode map: 0, 1 (0F), 2 (0F 38), 3 (0F 3A), 5 and 6 (EVEX), 8 to 10 (XOP)
	op    uint8    // last opcode byte
	opOff uint8    // its offset
	rex   uint8    // REX byte in force, or 0
	rep   uint8    // last of F2 and F3, or 0
	seg   uint8    // last segment override, or 0
	pfx   prefix   // what else the prefixes said

	modrm   uint8 // ModRM byte if hasModRM
	sib     uint8 // SIB byte if hasSIB
	form    form
	dispOff uint8
	dispLen uint8 // 0, 1, 4, or 8 for a 64-bit moffs
	immOff  uint8
	immLen  uint8 // all immediates together
}

type encoding uint8

const (
	encLegacy encoding = iota
	encVEX
	encEVEX
	encXOP
)

type prefix uint8

const (
	pfxOpSize  prefix = 1 << iota // 66
	pfxAddr32                     // 67
	pfxLock                       // F0
	pfxF2F3                       // both F2 and F3 occur
	pfxTwoSegs                    // two different segment overrides occur
	pfxDeadREX                    // a REX that is not next to the opcode
)

type form uint8

const (
	hasModRM form = 1 << iota
	hasSIB
	ripRel   // [rip+disp32]
	hasMoffs // absolute address in the instruction
	relBranch
)

// attr says what follows an opcode.
type attr uint8

const (
	aM     attr         = 1 << iota // ModRM
	aI8                             // 8-bit immediate
	aIz                             // 16-bit immediate with 66 and no REX.W, else 32-bit
	aI16                            // 16-bit immediate
	aJ8                             // 8-bit branch displacement
	aJz                             // 32-bit branch displacement
	aX                              // needs a look: see the switch in Decode
	aBad                            // no such instruction in 64-bit mode
	aI8I16 = aI8 | aI16             // ENTER
	aMI8   = aM | aI8
	aMIz   = aM | aIz
)

// oneByte is the one-byte opcode map in 64-bit mode (SDM 2D tables A-2).
// Prefixes and escapes do not reach it.
var oneByte = [256]attr{
	0x00: aM, aM, aM, aM, aI8, aIz, aBad, aBad, aM, aM, aM, aM, aI8, aIz, aBad, aBad,
	0x10: aM, aM, aM, aM, aI8, aIz, aBad, aBad, aM, aM, aM, aM, aI8, aIz, aBad, aBad,
	0x20: aM, aM, aM, aM, aI8, aIz, aBad, aBad, aM, aM, aM, aM, aI8, aIz, aBad, aBad,
	0x30: aM, aM, aM, aM, aI8, aIz, aBad, aBad, aM, aM, aM, aM, aI8, aIz, aBad, aBad,
	0x60: aBad, aBad, aBad, aM, 0, 0, 0, 0, aIz, aMIz, aI8, aMI8, 0, 0, 0, 0,
	0x70: aJ8, aJ8, aJ8, aJ8, aJ8, aJ8, aJ8, aJ8, aJ8, aJ8, aJ8, aJ8, aJ8, aJ8, aJ8, aJ8,
	0x80: aMI8, aMIz, aBad, aMI8, aM, aM, aM, aM, aM, aM, aM, aM, aM, aM | aX, aM, aM | aX,
	0x9a: aBad,
	0xa0: aX, aX, aX, aX, 0, 0, 0, 0, aI8, aIz,
	0xb0: aI8, aI8, aI8, aI8, aI8, aI8, aI8, aI8, aX, aX, aX, aX, aX, aX, aX, aX,
	0xc0: aMI8, aMI8, aI16, 0, aBad, aBad, aMI8 | aX, aMIz | aX, aI8I16, 0, aI16, 0, 0, aI8, aBad, 0,
	0xd0: aM, aM, aM, aM, aBad, aBad, aBad, 0, aM, aM, aM, aM, aM, aM, aM, aM,
	0xe0: aJ8, aJ8, aJ8, aJ8, aI8, aI8, aI8, aI8, aJz, aJz, aBad, aJ8,
	0xf6: aM | aX, aM | aX,
	0xfe: aM | aX, aM | aX,
}

// twoByte is the 0F map (SDM 2D tables A-3), also used for VEX and EVEX map 1.
var twoByte = [256]attr{
	0x00: aM, aM, aM, aM, aBad, 0, 0, 0, 0, 0, aBad, 0, aBad, aM, 0, aMI8,
	0x10: aM, aM, aM, aM, aM, aM, aM, aM, aM, aM, aM, aM, aM, aM, aM, aM,
	0x20: aM | aX, aM | aX, aM | aX, aM | aX, aBad, aBad, aBad, aBad, aM, aM, aM, aM, aM, aM, aM, aM,
	0x36: aBad, 0, 0, aBad, 0, aBad, aBad, aBad, aBad, aBad,
	0x40: aM, aM, aM, aM, aM, aM, aM, aM, aM, aM, aM, aM, aM, aM, aM, aM,
	0x50: aM, aM, aM, aM, aM, aM, aM, aM, aM, aM, aM, aM, aM, aM, aM, aM,
	0x60: aM, aM, aM, aM, aM, aM, aM, aM, aM, aM, aM, aM, aM, aM, aM, aM,
	0x70: aMI8, aMI8, aMI8, aMI8, aM, aM, aM, 0, aM | aX, aM, aBad, aBad, aM, aM, aM, aM,
	0x80: aJz, aJz, aJz, aJz, aJz, aJz, aJz, aJz, aJz, aJz, aJz, aJz, aJz, aJz, aJz, aJz,
	0x90: aM, aM, aM, aM, aM, aM, aM, aM, aM, aM, aM, aM, aM, aM, aM, aM,
	0xa0: 0, 0, 0, aM, aMI8, aM, aM, aM, 0, 0, 0, aM, aMI8, aM, aM, aM,
	0xb0: aM, aM, aM, aM, aM, aM, aM, aM, aM | aX, aM, aMI8 | aX, aM, aM, aM, aM, aM,
	0xc0: aM, aM, aMI8, aM, aMI8, aMI8, aMI8, aM,
	0xd0: aM, aM, aM, aM, aM, aM, aM, aM, aM, aM, aM, aM, aM, aM, aM, aM,
	0xe0: aM, aM, aM, aM, aM, aM, aM, aM, aM, aM, aM, aM, aM, aM, aM, aM,
	0xf0: aM, aM, aM, aM, aM, aM, aM, aM, aM, aM, aM, aM, aM, aM, aM, aM,
}

// Decode decodes the instruction at the start of code, as a processor in
// 64-bit mode would (SDM 2A chapter 2). Bytes after it are ignored.
//
// The error is [ErrTruncated] if code is the beginning of an instruction, or
// [ErrInvalid]. Decode is a length decoder: it rejects what has no defined
// length, but accepts some undefined opcodes and operand combinations that
// raise #UD when executed.
//
// Intel's APX (REX2, extended EVEX) encodings are invalid here.
func Decode(code []byte) (Insn, error) {
	var in Insn
	err := in.decode(code)
	if err != nil {
		return Insn{}, err
	}
	return in, nil
}

func (in *Insn) decode(code []byte) error {
	short := ErrTruncated // what it means to run out of bytes
	if len(code) >= MaxLen {
		code, short = code[:MaxLen], ErrInvalid
	}
	n := 0

	// Legacy prefixes and REX (SDM 2A §2.1.1, §2.2.1).
	var op byte
prefixes:
	for {
		if n >= len(code) {
			return short
		}
		op = code[n]
		n++
		switch op {
		case 0x66:
			in.pfx |= pfxOpSize
		case 0x67:
			in.pfx |= pfxAddr32
		case 0xf0:
			in.pfx |= pfxLock
		case 0xf2, 0xf3:
			if in.rep != 0 && in.rep != op {
				in.pfx |= pfxF2F3
			}
			in.rep = op
		case 0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65:
			if in.seg != 0 && in.seg != op {
				in.pfx |= pfxTwoSegs
			}
			in.seg = op
		default:
			if op&0xf0 != 0x40 {
				break prefixes
			}
			if in.rex != 0 {
				in.pfx |= pfxDeadREX
			}
			in.rex = op
			continue
		}
		if in.rex != 0 { // a REX counts only right before the opcode
			in.rex = 0
			in.pfx |= pfxDeadREX
		}
	}

	// Opcode (SDM 2A §2.1.2, §2.3.5, §2.7.1).
	var a attr
	switch op {
	case 0x0f:
		if n >= len(code) {
			return short
		}
		op = code[n]
		n++
		switch op {
		case 0x38, 0x3a:
			in.omap, a = 2, aM
			if op == 0x3a {
				in.omap, a = 3, aMI8
			}
			if n >= len(code) {
				return short
			}
			op = code[n]
			n++
		default:
			in.omap, a = 1, twoByte[op]
		}
	case 0xc4, 0xc5, 0x62:
		in.enc = encVEX
		payload := 1
		switch op {
		case 0xc4:
			payload = 2
		case 0x62:
			in.enc, payload = encEVEX, 3
		}
		if in.rex != 0 || in.rep != 0 || in.pfx&(pfxOpSize|pfxLock) != 0 {
			return ErrInvalid // SDM 2A §2.3.2 to §2.3.4
		}
		in.omap = 1
		if payload > 1 {
			if n >= len(code) {
				return short
			}
			if in.enc == encVEX {
				in.omap = code[n] & 0x1f
			} else if in.omap = code[n] & 7; code[n]&8 != 0 {
				return ErrInvalid
			}
		}
		switch in.omap {
		case 1, 2, 3:
		case 5, 6:
			if in.enc == encVEX {
				return ErrInvalid
			}
		default:
			return ErrInvalid
		}
		if in.enc == encEVEX {
			if n+1 >= len(code) {
				return short
			}
			if code[n+1]&4 == 0 {
				return ErrInvalid
			}
		}
		if n+payload >= len(code) {
			return short
		}
		n += payload
		op = code[n]
		n++
		switch in.omap {
		case 1:
			// Only these opcodes of the 0F map differ from "ModRM".
			a = aM
			switch op {
			case 0x70, 0x71, 0x72, 0x73, 0xc2, 0xc4, 0xc5, 0xc6:
				a = aMI8
			case 0x77:
				if in.enc == encVEX {
					a = 0 // VZEROUPPER, VZEROALL
				}
			}
		case 3:
			a = aMI8
		default:
			a = aM
		}
	default:
		a = oneByte[op]
		// 8F is POP with /0; otherwise it begins an XOP instruction of older
		// AMD processors (APM 3 §1.2.5): map, W.vvvv.L.pp, opcode.
		if op != 0x8f || n >= len(code) || code[n]&0x18 == 0 {
			break
		}
		if in.rex != 0 || in.rep != 0 || in.pfx&(pfxOpSize|pfxLock) != 0 {
			return ErrInvalid
		}
		in.enc, in.omap = encXOP, code[n]&0x1f
		switch in.omap {
		case 8:
			a = aMI8
		case 9:
			a = aM
		case 10:
			a = aMIz
		default:
			return ErrInvalid
		}
		if n+2 >= len(code) {
			return short
		}
		op = code[n+2]
		n += 3
	}
	in.op, in.opOff = op, uint8(n-1)
	if a&aBad != 0 {
		return ErrInvalid
	}

	// ModRM, SIB, displacement (SDM 2A §2.1.3, §2.2.1.3).
	imm := 0
	if a&aM != 0 {
		if n >= len(code) {
			return short
		}
		m := code[n]
		n++
		in.modrm = m
		in.form |= hasModRM
		mod, reg, rm := m>>6, m>>3&7, m&7

		if a&aX != 0 && in.enc == encLegacy {
			switch {
			case in.omap == 1:
				switch op {
				case 0x20, 0x21, 0x22, 0x23:
					mod = 3 // MOV CRn/DRn: mod is ignored (SDM 2B MOV)
					in.modrm |= 0xc0
				case 0x78: // EXTRQ and INSERTQ of SSE4a have two immediates
					if in.rep == 0xf2 || in.pfx&pfxOpSize != 0 {
						imm = 2
					}
				case 0xb8: // JMPE without F3
					if in.rep != 0xf3 {
						return ErrInvalid
					}
				case 0xba:
					if reg < 4 {
						return ErrInvalid
					}
				}
			case op == 0x8d: // LEA
				if mod == 3 {
					return ErrInvalid
				}
			case op == 0x8f:
				if reg != 0 {
					return ErrInvalid
				}
			case op == 0xc6 || op == 0xc7: // MOV, XABORT, XBEGIN
				if reg != 0 && m != 0xf8 {
					return ErrInvalid
				}
				if m == 0xf8 && op == 0xc7 {
					in.form |= relBranch
				}
			case op == 0xf6: // TEST has an immediate
				if reg < 2 {
					a |= aI8
				}
			case op == 0xf7:
				if reg < 2 {
					a |= aIz
				}
			case op == 0xfe:
				if reg > 1 {
					return ErrInvalid
				}
			case op == 0xff:
				// FF /7 is undefined; /3 and /5 are far and need memory.
				if reg == 7 || mod == 3 && (reg == 3 || reg == 5) {
					return ErrInvalid
				}
			}
		}

		if mod != 3 {
			disp := 0
			switch mod {
			case 0:
				if rm == 5 {
					disp = 4
					in.form |= ripRel
				}
			case 1:
				disp = 1
			case 2:
				disp = 4
			}
			if rm == 4 {
				if n >= len(code) {
					return short
				}
				in.sib = code[n]
				in.form |= hasSIB
				n++
				if mod == 0 && in.sib&7 == 5 {
					disp = 4
				}
			}
			if disp != 0 {
				in.dispOff, in.dispLen = uint8(n), uint8(disp)
				n += disp
			}
		}
	} else if a&aX != 0 { // one-byte map only
		switch {
		case op >= 0xa0 && op <= 0xa3: // MOV moffs (SDM 2A §2.2.1.4)
			in.form |= hasMoffs
			in.dispOff, in.dispLen = uint8(n), 8
			if in.pfx&pfxAddr32 != 0 {
				in.dispLen = 4
			}
			n += int(in.dispLen)
		case op >= 0xb8 && op <= 0xbf: // MOV r, imm (SDM 2A §2.2.1.5)
			imm = in.immZ()
			if in.rexW() {
				imm = 8
			}
		}
	}

	// Immediates and branch displacements.
	if a&aI8 != 0 {
		imm++
	}
	if a&aI16 != 0 {
		imm += 2
	}
	if a&aIz != 0 {
		imm += in.immZ()
	}
	if a&aJ8 != 0 {
		imm = 1
		in.form |= relBranch
	}
	if a&aJz != 0 {
		imm = 4
		in.form |= relBranch
	}
	in.immOff, in.immLen = uint8(n), uint8(imm)
	n += imm
	if n > len(code) {
		return short
	}
	in.Len = n
	copy(in.b[:], code[:n])
	return nil
}

// immZ is the size of an immediate of the operand size, at most 4.
func (in *Insn) immZ() int {
	if in.pfx&pfxOpSize != 0 && !in.rexW() {
		return 2
	}
	return 4
}

func (in *Insn) rexW() bool { return in.rex&8 != 0 }

func (in *Insn) hasModRM() bool { return in.form&hasModRM != 0 }
func (in *Insn) mod() uint8     { return in.modrm >> 6 }

// ext is the reg field of ModRM where it extends the opcode.
func (in *Insn) ext() uint8 { return in.modrm >> 3 & 7 }

// modrmMem reports whether ModRM names a memory operand.
func (in *Insn) modrmMem() bool { return in.hasModRM() && in.mod() != 3 }

// reg and rm are the register numbers of ModRM with their REX bits.
func (in *Insn) reg() uint8 { return in.modrm>>3&7 | in.rex<<1&8 }
func (in *Insn) rm() uint8  { return in.modrm&7 | in.rex<<3&8 }

// opReg is the register number in the opcode's low bits.
func (in *Insn) opReg() uint8 { return in.op&7 | in.rex<<3&8 }

// disp returns the sign-extended displacement.
func (in *Insn) disp() uint64 {
	d := in.b[in.dispOff:]
	switch in.dispLen {
	case 1:
		return uint64(int64(int8(d[0])))
	case 4:
		if in.form&hasMoffs != 0 {
			return uint64(binary.LittleEndian.Uint32(d))
		}
		return uint64(int64(int32(binary.LittleEndian.Uint32(d))))
	case 8:
		return binary.LittleEndian.Uint64(d)
	}
	return 0
}

// imm returns the sign-extended immediate.
func (in *Insn) imm() uint64 {
	d := in.b[in.immOff:]
	switch in.immLen {
	case 1:
		return uint64(int64(int8(d[0])))
	case 2:
		return uint64(int64(int16(binary.LittleEndian.Uint16(d))))
	case 4:
		return uint64(int64(int32(binary.LittleEndian.Uint32(d))))
	case 8:
		return binary.LittleEndian.Uint64(d)
	}
	return 0
}

// is reports whether the instruction is op of a legacy-encoded map.
func (in *Insn) is(omap, op uint8) bool {
	return in.enc == encLegacy && in.omap == omap && in.op == op && in.Len > 0
}

// Bytes returns the instruction's bytes. They alias in.
func (in *Insn) Bytes() []byte { return in.b[:in.Len] }
