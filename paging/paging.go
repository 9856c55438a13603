// Package paging reads and writes the memory of a running guest from
// outside: it walks the guest's own page tables over frames that a [Frames]
// maps, and knows nothing of breakpoints.
//
// Everything it reads is the guest's, so it trusts none of it: a walk visits at
// most five tables and every address is checked before it is used.
package paging

import (
	"errors"
	"fmt"
)

// PageSize is the size of a frame in bytes.
const PageSize = 4096

// A VAddr is a guest virtual address.
type VAddr uint64

func (a VAddr) String() string { return fmt.Sprintf("0x%016x", uint64(a)) }

// A Frame is the number of a page frame as the guest's page tables name it: a
// machine frame (MFN) for a PV guest, a guest frame (GFN) for HVM and PVH.
type Frame uint64

// A Root is the physical (PV: machine) address of a top-level page table: a
// CR3 value, whose flag bits are ignored.
type Root uint64

// Frame returns the frame of the table. Bits 0 to 11 (PCD, PWT, PCID) and 52 to
// 63 (no-flush) of a CR3 are not part of it: Intel SDM vol. 3, 4.5.
func (r Root) Frame() Frame { return Frame(uint64(r) & physMask >> 12) }

// Frames gives access to the guest's page frames.
type Frames interface {
	// Page returns the 4096 bytes of frame f. They stay valid, and follow the
	// guest's memory, until the caller calls release. A page that was asked for
	// as writable may be stored to.
	Page(f Frame, writable bool) (page []byte, release func(), err error)
}

// Errors of a translation.
var (
	// ErrNotMapped says that the guest has nothing at a virtual address.
	ErrNotMapped = errors.New("address not mapped by the guest")
	// ErrNonCanonical says that an address isn't one the CPU accepts.
	ErrNonCanonical = errors.New("non-canonical address")
	// ErrBadTable says that a page-table entry has reserved bits set or points
	// outside the guest.
	ErrBadTable = errors.New("malformed page table")
	// ErrProtected says that the guest itself could not do this store.
	ErrProtected = errors.New("page is not writable by the guest kernel")
)

// An Error is a failed access: what was done, where, and in which tables.
type Error struct {
	Op    string // "translate", "read", "write" or "store"
	Addr  VAddr
	Root  Root
	Level int // the level of the table that ended the walk, 0 if none
	Err   error
}

func (e *Error) Error() string {
	s := fmt.Sprintf("paging: %s %v (cr3 %#x", e.Op, e.Addr, uint64(e.Root))
	if e.Level != 0 {
		s += fmt.Sprintf(", level-%d table", e.Level)
	}
	return s + "): " + e.Err.Error()
}

func (e *Error) Unwrap() error { return e.Err }

// Protection is what the page tables allow, combined over all levels.
type Protection uint8

// Protection bits. Dirty and Accessed are those of the last level.
const (
	Writable Protection = 1 << iota
	User
	NoExecute
	Accessed
	Dirty
)

// A Translation is the result of a page-table walk.
type Translation struct {
	Frame  Frame  // the 4 KiB frame that holds the address
	Offset uint64 // of the address in the frame
	Size   uint64 // of the page: 4 KiB, 2 MiB or 1 GiB
	Prot   Protection
}

const (
	pteP    = 1 << 0
	pteRW   = 1 << 1
	pteUS   = 1 << 2
	pteA    = 1 << 5
	pteD    = 1 << 6
	ptePS   = 1 << 7
	pteNX   = 1 << 63
	canonHi = 0xffff800000000000

	// physMask selects the frame bits of an entry: MAXPHYADDR is at most 52
	// (Intel SDM vol. 3, 4.1.4).
	physMask = 0x000ffffffffff000
)

// Memory is a guest's memory behind its page tables. It is safe for concurrent
// use if its Frames is.
type Memory struct {
	frames Frames
	levels int
}

// New returns the memory of a guest with 4-level page tables.
func New(f Frames) *Memory { return &Memory{frames: f, levels: 4} }

// New5Level returns the memory of a guest that runs with CR4.LA57 set.
func New5Level(f Frames) *Memory { return &Memory{frames: f, levels: 5} }

func (m *Memory) canonical(va VAddr) bool {
	shift := 64 - (12 + 9*m.levels)
	return VAddr(int64(va)<<shift>>shift) == va
}

// Translate walks the tables below root (Intel SDM vol. 3, 4.5).
func (m *Memory) Translate(root Root, va VAddr) (Translation, error) {
	fail := func(level int, err error) (Translation, error) {
		return Translation{}, &Error{Op: "translate", Addr: va, Root: root, Level: level, Err: err}
	}
	if !m.canonical(va) {
		return fail(0, ErrNonCanonical)
	}
	prot := Writable | User
	table := root.Frame()
	for level := m.levels; ; level-- {
		page, release, err := m.frames.Page(table, false)
		if err != nil {
			return fail(level, fmt.Errorf("%w: frame %#x: %w", ErrBadTable, uint64(table), err))
		}
		shift := 12 + 9*(level-1)
		pte := loadUint64(page, int(uint64(va)>>shift&0x1ff)*8)
		release()
		if pte&pteP == 0 {
			return fail(level, ErrNotMapped)
		}
		if pte&pteRW == 0 {
			prot &^= Writable
		}
		if pte&pteUS == 0 {
			prot &^= User
		}
		if pte&pteNX != 0 {
			prot |= NoExecute
		}
		leaf := level == 1 || pte&ptePS != 0
		if !leaf {
			table = Frame(pte & physMask >> 12)
			continue
		}
		if level > 3 {
			return fail(level, fmt.Errorf("%w: PS set at level %d", ErrBadTable, level))
		}
		size := uint64(1) << shift
		base := pte & physMask
		if level > 1 {
			// Bit 12 of a large entry is PAT; the others below the page size are reserved.
			base &^= 1 << 12
			if base&(size-1) != 0 {
				return fail(level, fmt.Errorf("%w: reserved bits in %#x", ErrBadTable, pte))
			}
		}
		if pte&pteA != 0 {
			prot |= Accessed
		}
		if pte&pteD != 0 {
			prot |= Dirty
		}
		phys := base + uint64(va)&(size-1)
		return Translation{Frame: Frame(phys >> 12), Offset: phys & (PageSize - 1), Size: size, Prot: prot}, nil
	}
}

// Read fills b from virtual address va. n < len(b) if and only if err is not
// nil: the bytes before the first unmapped page are read.
func (m *Memory) Read(root Root, va VAddr, b []byte) (n int, err error) {
	return m.access(root, va, b, "read")
}

// Write stores b at virtual address va, whatever the guest's page protection
// says, as a debugger does.
func (m *Memory) Write(root Root, va VAddr, b []byte) (n int, err error) {
	return m.access(root, va, b, "write")
}

// Store stores b as the guest kernel itself would: it fails, before it writes
// anything to a page, unless that page is in the kernel's half, mapped writable,
// and already marked accessed and dirty, so that no bit of the tables would
// have to change. (The user bit tells nothing: a 64-bit PV kernel runs in ring 3.)
func (m *Memory) Store(root Root, va VAddr, b []byte) (n int, err error) {
	return m.access(root, va, b, "store")
}

func (m *Memory) access(root Root, va VAddr, b []byte, op string) (n int, err error) {
	if len(b) > 0 && uint64(va)+uint64(len(b))-1 < uint64(va) {
		return 0, &Error{Op: op, Addr: va, Root: root, Err: ErrNonCanonical}
	}
	for n < len(b) {
		at := va + VAddr(n)
		t, err := m.Translate(root, at)
		if err != nil {
			if e, ok := err.(*Error); ok {
				e.Op = op
			}
			return n, err
		}
		const want = Writable | Accessed | Dirty
		if op == "store" && (t.Prot&want != want || int64(at) >= 0) {
			return n, &Error{Op: op, Addr: at, Root: root, Err: ErrProtected}
		}
		page, release, err := m.frames.Page(t.Frame, op != "read")
		if err != nil {
			return n, &Error{Op: op, Addr: at, Root: root, Err: err}
		}
		k := min(len(b)-n, int(PageSize-t.Offset))
		if op == "read" {
			copyFrom(b[n:n+k], page[t.Offset:])
		} else {
			copyTo(page[t.Offset:], b[n:n+k])
		}
		release()
		n += k
	}
	return n, nil
}
