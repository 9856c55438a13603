package x86

// A StringKind is what a string instruction does with an element.
type StringKind uint8

// Kinds of string instruction.
const (
	Movs StringKind = iota + 1
	Cmps
	Stos
	Lods
	Scas
)

// Source reports whether the instruction reads [RSI].
func (k StringKind) Source() bool { return k == Movs || k == Cmps || k == Lods }

// Dest reports whether the instruction accesses [RDI].
func (k StringKind) Dest() bool { return k != Lods }

// A StringOp describes a repeated string instruction with 64-bit addresses.
type StringOp struct {
	Kind StringKind
	Size int // of an element: 1, 2, 4 or 8 bytes
	// Segment is the override in force for the source, 0x64 (FS) or 0x65 (GS), or 0
	// for any other: their bases are 0 in 64-bit mode.
	Segment byte
	// Equal says, for Cmps and Scas, whether the repetition goes on while elements
	// are equal (REPE) or while they differ (REPNE).
	Equal bool
}

// StringOp describes the instruction if it Repeats, is no INS or OUTS, and counts
// in RCX, not ECX (SDM 2B REP).
func (in *Insn) StringOp() (op StringOp, ok bool) {
	if !in.Repeats() || in.pfx&(pfxAddr32|pfxLock|pfxF2F3|pfxTwoSegs) != 0 {
		return op, false
	}
	switch in.op &^ 1 {
	case 0xa4:
		op.Kind = Movs
	case 0xa6:
		op.Kind = Cmps
	case 0xaa:
		op.Kind = Stos
	case 0xac:
		op.Kind = Lods
	case 0xae:
		op.Kind = Scas
	default:
		return op, false
	}
	switch {
	case in.op&1 == 0:
		op.Size = 1
	case in.rexW():
		op.Size = 8
	case in.pfx&pfxOpSize != 0:
		op.Size = 2
	default:
		op.Size = 4
	}
	if in.seg == 0x64 || in.seg == 0x65 {
		op.Segment = in.seg
	}
	op.Equal = in.rep == 0xf3
	return op, true
}
