package paging

import "fmt"

// A Kind is a shape of page tables.
type Kind uint8

// The kinds of page tables (Intel SDM vol. 3, 4.1.1). With PAE an Intel CPU keeps the
// four top-level entries in registers from a load of CR3 on (4.4.1); here they are
// read from memory like all others.
const (
	TwoLevel  Kind = iota + 1 // 32-bit paging: 4-byte entries, pages of 4 KiB and 4 MiB
	PAE                       // 32-bit addresses, 8-byte entries, pages of 4 KiB and 2 MiB
	FourLevel                 // 48-bit addresses, pages of 4 KiB, 2 MiB and 1 GiB
	FiveLevel                 // 57-bit addresses, the same pages
)

// String returns the kind's name: "2-level", "PAE", "4-level" or "5-level".
func (k Kind) String() string {
	switch k {
	case TwoLevel:
		return "2-level"
	case PAE:
		return "PAE"
	case FourLevel:
		return "4-level"
	case FiveLevel:
		return "5-level"
	}
	return fmt.Sprintf("Kind(%d)", uint8(k))
}

// A Mode says how the guest's CPU walks its page tables. [ModeOf] makes it from
// a vCPU's registers; a 64-bit guest's usual one is
// Mode{Kind: FourLevel, NXE: true}.
//
// CR0.WP is not part of it: it doesn't change the walk, only whether a kernel may
// write to read-only pages, and kernels clear it briefly. Store takes it as set.
type Mode struct {
	Kind Kind
	// PSE is CR4.PSE: 2-level tables can have 4 MiB pages. The other kinds have
	// large pages always; 1 GiB pages are taken as supported by the CPU.
	PSE bool
	// NXE is EFER.NXE: bit 63 of an 8-byte entry forbids execution. It is
	// reserved otherwise.
	NXE bool
	// PhysBits is MAXPHYADDR of the guest's CPU (CPUID 80000008H, EAX bits 7:0),
	// 32 to 52: address bits from there on are reserved. 0 stands for 52, the
	// highest that there can be. For 4 MiB pages it counts up to 40, and with 32
	// the CPU has no PSE-36.
	PhysBits int
	// PV says that the guest is a Xen PV guest. With PAE, its top-level entries are
	// also entries of Xen's own 4-level tables: their R/W, U/S and A bits are set,
	// and the reserved bits are those of 4-level tables (adjust_guest_l3e,
	// xen/arch/x86/mm.c).
	PV bool
	// EncryptMask has the bits of an entry, and of CR3, that are neither address
	// nor reserved: the C-bit of AMD SME (CPUID 8000001FH, EBX bits 5:0). They must
	// lie within bits 12 to 51. 8-byte entries only.
	EncryptMask uint64
}

// Bits of the control registers: Intel SDM vol. 3, 2.5 and 2.2.1.
const (
	cr0PG   = 1 << 31
	cr4PSE  = 1 << 4
	cr4PAE  = 1 << 5
	cr4LA57 = 1 << 12
	eferLMA = 1 << 10
	eferNXE = 1 << 11
)

// ModeOf returns the mode of an HVM or PVH guest's vCPU with these registers
// (Intel SDM vol. 3, 4.1.1), with PhysBits, PV and EncryptMask unset. The error
// is ErrPagingOff if the vCPU hasn't turned paging on (yet), and ErrMode if no
// CPU has such registers.
//
// The registers of a PV guest's vCPU context are not those that its tables are
// walked with: a 64-bit one has Mode{Kind: FourLevel, NXE: true}, a 32-bit one
// Mode{Kind: PAE, NXE: true, PV: true}.
func ModeOf(cr0, cr4, efer uint64) (Mode, error) {
	m := Mode{PSE: cr4&cr4PSE != 0, NXE: efer&eferNXE != 0}
	switch {
	case cr0&cr0PG == 0:
		return Mode{}, ErrPagingOff
	case efer&eferLMA != 0 && cr4&cr4PAE == 0:
		return Mode{}, fmt.Errorf("%w: EFER.LMA without CR4.PAE (cr0 %#x, cr4 %#x, efer %#x)", ErrMode, cr0, cr4, efer)
	case efer&eferLMA != 0 && cr4&cr4LA57 != 0:
		m.Kind = FiveLevel
	case efer&eferLMA != 0:
		m.Kind = FourLevel
	case cr4&cr4PAE != 0:
		m.Kind = PAE
	default:
		m.Kind = TwoLevel
	}
	return m, nil
}

// Bits of page-table entries: Intel SDM vol. 3, tables 4-4 to 4-20.
const (
	pteP  = 1 << 0
	pteRW = 1 << 1
	pteUS = 1 << 2
	pteA  = 1 << 5
	pteD  = 1 << 6
	ptePS = 1 << 7
	pteG  = 1 << 8
	pteNX = 1 << 63

	pageShift = 12

	// physMask has the address bits of an 8-byte entry: MAXPHYADDR is at most
	// 52 (Intel SDM vol. 3, 4.1.4).
	physMask = 0x000ffffffffff000

	maxLevels = 5
)

// field returns a mask of the bits from lo to hi-1.
func field(lo, hi uint) uint64 { return 1<<hi - 1<<lo }

// A walker is a Mode prepared for walks.
type walker struct {
	mode   Mode
	err    error // why no walk is possible
	levels int
	bits   uint // of a virtual address
	index  uint // bits of it for each level
	wide   bool // entries are of 8 bytes
	level  [maxLevels + 1]level
}

// A level says what the entries of one level of tables mean; level 1 is the lowest.
type level struct {
	shift uint // lowest bit of the virtual address that chooses the entry
	large bool // an entry with PS is a page
	// Bits that must be zero in an entry for a table (at level 1: for a page), and
	// in an entry for a large page.
	reserved, reservedLarge uint64
	// Bits that count as set, since they restrict nothing at this level.
	grant uint64
}

func newWalker(mode Mode) walker {
	w := walker{mode: mode, index: 9, wide: true}
	phys := uint(mode.PhysBits)
	if mode.PhysBits == 0 {
		phys = 52
	}
	switch mode.Kind {
	case TwoLevel:
		w.levels, w.bits, w.index, w.wide = 2, 32, 10, false
	case PAE:
		w.levels, w.bits = 3, 32
	case FourLevel:
		w.levels, w.bits = 4, 48
	case FiveLevel:
		w.levels, w.bits = 5, 57
	}
	switch {
	case w.levels == 0:
		w.err = fmt.Errorf("%w: %v", ErrMode, mode.Kind)
	case phys < 32 || phys > 52:
		w.err = fmt.Errorf("%w: %d physical address bits", ErrMode, mode.PhysBits)
	case mode.EncryptMask&^physMask != 0 || mode.EncryptMask != 0 && !w.wide:
		w.err = fmt.Errorf("%w: encryption mask %#x with %v tables", ErrMode, mode.EncryptMask, mode.Kind)
	}
	if w.err != nil {
		return w
	}
	for i := 1; i <= w.levels; i++ {
		l := &w.level[i]
		l.shift = pageShift + w.index*uint(i-1)
		if !w.wide {
			if l.large = i == 2 && mode.PSE; l.large {
				// Bits 13 and up are address bits from 32 on, as many as there are;
				// the rest, up to bit 21, is reserved (table 4-4).
				l.reservedLarge = field(13+min(phys, 40)-32, 22)
			}
			continue
		}
		l.reserved = field(phys, 52)
		if mode.Kind == PAE && !mode.PV {
			l.reserved |= field(52, 63) // tables 4-9 to 4-11; ignored in longer modes
		}
		if !mode.NXE {
			l.reserved |= pteNX
		}
		l.large = i == 2 || i == 3 && mode.Kind != PAE
		l.reservedLarge = l.reserved | field(13, l.shift) // bit 12 is PAT
		if i > 1 && !l.large {
			l.reserved |= ptePS
		}
		if mode.Kind == PAE && i == 3 {
			l.grant = pteRW | pteUS
			if !mode.PV {
				// Table 4-8. A, bit 5, is reserved as well, but QEMU's TCG sets it.
				l.reserved |= field(1, 3) | field(6, 9) | pteNX
			}
		}
	}
	return w
}

// top returns where the top-level table is. That of PAE has four entries and
// begins at any multiple of 32 (Intel SDM vol. 3, table 4-7).
func (w *walker) top(root Root) (f Frame, off int) {
	root &^= Root(w.mode.EncryptMask)
	if w.mode.Kind == PAE {
		off = int(root & 0xfe0)
	}
	return root.Frame(), off
}

// canonical returns va with the untranslated bits as the CPU requires them: copies of
// the highest translated bit, or zero in the 32-bit modes.
func (w *walker) canonical(va VAddr) VAddr {
	shift := 64 - w.bits
	if w.bits == 32 {
		return va << shift >> shift
	}
	return VAddr(int64(va) << shift >> shift)
}

// entryAt returns entry i of the table that begins at page[off].
func (w *walker) entryAt(page []byte, off int, i uint64) uint64 {
	if w.wide {
		return load64(page, off+int(i)*8) &^ w.mode.EncryptMask
	}
	return uint64(load32(page, off+int(i)*4))
}

// step interprets the entry e of a table at level i: a page, whose first
// address is base and whose size is 1<<w.level[i].shift, or the table at base.
func (w *walker) step(e uint64, i int) (base uint64, leaf bool, err error) {
	l := &w.level[i]
	if e&pteP == 0 {
		return 0, false, ErrNotMapped
	}
	large := l.large && e&ptePS != 0
	reserved := l.reserved
	if large {
		reserved = l.reservedLarge
	}
	if e&reserved != 0 {
		return 0, false, fmt.Errorf("%w: entry %#x, reserved %#x", ErrReserved, e, reserved)
	}
	base = e & physMask
	if large {
		base &^= field(pageShift, l.shift)
		if !w.wide {
			base |= e >> 13 & 0xff << 32
		}
	}
	return base, large || i == 1, nil
}

// restrict adds the restrictions of the entry e at level i to those of the
// entries above it: R/W and U/S are set if they are in all, NX if it is in one.
func (w *walker) restrict(above, e uint64, i int) uint64 {
	return above&(e|w.level[i].grant)&(pteRW|pteUS) | (above|e)&pteNX
}

// protection names the restrictions of all levels and the last entry's bits.
func protection(all, last uint64) (p Protection) {
	if all&pteRW != 0 {
		p |= Writable
	}
	if all&pteUS != 0 {
		p |= User
	}
	if all&pteNX != 0 {
		p |= NoExecute
	}
	if last&pteA != 0 {
		p |= Accessed
	}
	if last&pteD != 0 {
		p |= Dirty
	}
	if last&pteG != 0 {
		p |= Global
	}
	return p
}
