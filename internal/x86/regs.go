package x86

// Regs holds the general registers of one vCPU, with the segment bases and the
// page-table root that give its memory accesses a meaning.
type Regs struct {
	R15, R14, R13, R12, BP, BX uint64
	R11, R10, R9, R8           uint64
	AX, CX, DX, SI, DI         uint64
	IP, CS, Flags, SP, SS      uint64
	FSBase, GSBase             uint64
	CR3                        uint64
}

// Bits of RFLAGS (SDM 1 §3.4.3).
const (
	FlagCF   = 1 << 0  // carry
	FlagPF   = 1 << 2  // even parity of the low byte
	FlagAF   = 1 << 4  // carry out of bit 3
	FlagZF   = 1 << 6  // zero
	FlagSF   = 1 << 7  // sign
	FlagTF   = 1 << 8  // single-step trap
	FlagIF   = 1 << 9  // maskable interrupts are on
	FlagDF   = 1 << 10 // string operations go down
	FlagOF   = 1 << 11 // signed overflow
	FlagIOPL = 3 << 12 // I/O privilege level
	FlagNT   = 1 << 14 // nested task
	FlagRF   = 1 << 16 // resume: no instruction breakpoint once
	FlagVM   = 1 << 17 // virtual-8086 mode
	FlagAC   = 1 << 18 // alignment check, or SMAP off for the kernel
	FlagVIF  = 1 << 19 // virtual interrupt flag
	FlagVIP  = 1 << 20 // virtual interrupt pending
	FlagID   = 1 << 21 // CPUID can be toggled
)

// arithFlags are the six status flags.
const arithFlags = FlagCF | FlagPF | FlagAF | FlagZF | FlagSF | FlagOF

// Memory is guest virtual memory as the vCPU that hit sees it.
//
// The caller of [Insn.Emulate] is responsible for what the processor would
// have checked: ReadVirt must fail where a load would fault, and WriteVirt
// must fail where a store would fault or would have side effects in the page
// tables — a page that is not present or not writable, or whose accessed or
// dirty bit is still clear. An implementation that writes through a foreign
// mapping without looking at these bits breaks copy-on-write in the guest.
// A failing call makes the engine fall back to stepping the instruction, so
// failing is always safe.
//
// WriteVirt must be all or nothing; it is never asked to cross a 4 KiB page.
type Memory interface {
	ReadVirt(addr uint64, b []byte) error
	WriteVirt(addr uint64, b []byte) error
}

// gpr returns the general register with number n (SDM 2A table 3-1).
func (r *Regs) gpr(n uint8) *uint64 {
	switch n & 15 {
	case 0:
		return &r.AX
	case 1:
		return &r.CX
	case 2:
		return &r.DX
	case 3:
		return &r.BX
	case 4:
		return &r.SP
	case 5:
		return &r.BP
	case 6:
		return &r.SI
	case 7:
		return &r.DI
	case 8:
		return &r.R8
	case 9:
		return &r.R9
	case 10:
		return &r.R10
	case 11:
		return &r.R11
	case 12:
		return &r.R12
	case 13:
		return &r.R13
	case 14:
		return &r.R14
	default:
		return &r.R15
	}
}
