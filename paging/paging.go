// Package paging reads and writes the memory of a running guest from outside:
// it walks the guest's own page tables over frames that a [Frames] gives it,
// and knows nothing of breakpoints. It walks as the CPU does (Intel SDM vol. 3,
// chapter 4): 2-level 32-bit tables, PAE, 4-level and 5-level ones.
//
// There is no TLB here. Each access walks the guest's live tables, so it can't
// follow a translation that the guest has changed; it costs a load for each
// level. What may be kept for a while is where a frame is mapped into this
// process: see [Cache].
//
// Everything it reads is the guest's, so it trusts none of it. A walk visits one
// table for each level and never more than five, whatever the tables hold:
// tables that lead back to themselves need no check. Ranges, which visits many,
// has a budget.
package paging

import (
	"errors"
	"fmt"
)

// PageSize is the size of a frame in bytes.
const PageSize = 4096

// A VAddr is a guest virtual address. In the 32-bit modes it is below 1<<32.
type VAddr uint64

// String returns the address in hexadecimal, with 16 digits.
func (a VAddr) String() string { return fmt.Sprintf("0x%016x", uint64(a)) }

// A PAddr is a guest physical address; for a PV guest, whose page tables know
// no other, a machine address.
type PAddr uint64

// String returns the address in hexadecimal.
func (a PAddr) String() string { return fmt.Sprintf("%#x", uint64(a)) }

// A Frame is the number of a page frame as the guest's page tables name it: a
// machine frame (MFN) for a PV guest, a guest frame (GFN) for HVM and PVH. So a
// walk needs no physical-to-machine map of a PV guest.
type Frame uint64

// A Root is a CR3 value: the physical (PV: machine) address of the top-level
// page table, and flags, which are ignored.
type Root uint64

// PV32Root returns the root in a CR3 value of a 32-bit PV guest, which has the
// frame number rotated by 12 bits so that it can hold one of 32 bits
// (xen_cr3_to_pfn, xen/include/public/arch-x86/xen-x86_32.h).
func PV32Root(cr3 uint32) Root { return Root(cr3>>12|cr3<<20) << pageShift }

// Frame returns the frame of the top-level table. Bits 0 to 11 (PCD, PWT, PCID;
// with PAE the place of the table in its frame) and 52 to 63 (no-flush, LAM) of a
// CR3 are not part of it: Intel SDM vol. 3, 4.5.2.
func (r Root) Frame() Frame { return Frame(uint64(r) & physMask >> pageShift) }

// Frames gives access to the guest's page frames.
type Frames interface {
	// Page returns the 4096 bytes of frame f. They stay valid, and follow the
	// guest's memory if it can be mapped, until the caller calls release, which
	// it does once. A page that was asked for as writable may be stored to.
	Page(f Frame, writable bool) (page []byte, release func(), err error)
}

// A FrameWriter is a Frames, or a [Mapper], whose pages are copies, so that what
// is stored to one doesn't reach the guest. Writes go through WriteFrame then.
type FrameWriter interface {
	// WriteFrame stores b at offset off of frame f. It isn't called with bytes
	// beyond the frame's end, and doesn't keep b.
	WriteFrame(f Frame, off int, b []byte) error
}

// Errors of an access. An error matches only one of them, except that ErrClosed is
// wrapped in an ErrNoFrame.
var (
	// ErrNotMapped: an entry on the way is not present. Error.Level says which.
	ErrNotMapped = errors.New("address not mapped by the guest")
	// ErrNonCanonical: the CPU would refuse the address: bits above the
	// translated ones differ from the highest of them, or, in the 32-bit modes,
	// are set.
	ErrNonCanonical = errors.New("non-canonical address")
	// ErrReserved: a present entry has a bit set that must be zero in this mode.
	ErrReserved = errors.New("reserved bit set in page table")
	// ErrNoFrame: a frame, of a page table or of the page itself, is not available:
	// it isn't the guest's, or the hypervisor refuses it. The error says which.
	ErrNoFrame = errors.New("frame not available")
	// ErrProtected: the guest kernel itself could not do this store.
	ErrProtected = errors.New("page is not writable by the guest kernel")
	// ErrBudget: Ranges has read as many tables as it may.
	ErrBudget = errors.New("too many page tables")
	// ErrPagingOff: the vCPU runs without paging, so it has no page tables.
	ErrPagingOff = errors.New("paging is off (CR0.PG is clear)")
	// ErrMode: a Mode that no CPU has.
	ErrMode = errors.New("impossible paging mode")
	// ErrClosed: the Cache is closed.
	ErrClosed = errors.New("frame cache is closed")
)

// An Error is a failed access by virtual address: what was done, where, and in
// which tables.
type Error struct {
	Op    string // "translate", "read", "write", "store" or "list"
	Addr  VAddr
	Root  Root
	Level int // of the table that ended the walk, 1 the lowest; 0 if none did
	Err   error
}

// Error implements error.
func (e *Error) Error() string {
	s := fmt.Sprintf("paging: %s %v (cr3 %#x", e.Op, e.Addr, uint64(e.Root))
	if e.Level != 0 {
		s += fmt.Sprintf(", level-%d table", e.Level)
	}
	return s + "): " + e.Err.Error()
}

// Unwrap returns e.Err.
func (e *Error) Unwrap() error { return e.Err }

// Protection is what the page tables allow, combined over all levels.
type Protection uint8

// Protection bits. Accessed, Dirty and Global are those of the last level.
const (
	Writable Protection = 1 << iota
	User
	NoExecute
	Accessed
	Dirty
	Global
)

// String returns the bits as in "WUXADG", with a dash for each that isn't set; X
// means executable.
func (p Protection) String() string {
	const names = "WUXADG"
	s := []byte(names)
	for i := range s {
		if (p^NoExecute)>>i&1 == 0 {
			s[i] = '-'
		}
	}
	return string(s)
}

// A Translation is the result of a page-table walk.
type Translation struct {
	Frame  Frame  // the 4 KiB frame that holds the address
	Offset uint64 // of the address in the frame
	Size   uint64 // of the page: 4 KiB, 2 MiB, 4 MiB (2-level tables) or 1 GiB
	Prot   Protection
}

// Phys returns the physical address.
func (t Translation) Phys() PAddr { return PAddr(uint64(t.Frame)<<pageShift | t.Offset) }

// Memory is a guest's memory, as its page tables map it. It is safe for concurrent
// use if its Frames is.
type Memory struct {
	frames Frames
	cache  *Cache      // frames, if it is or embeds one
	writer FrameWriter // frames, if it is one
	walker
}

// New returns the memory of a guest whose CPU walks its tables in the given
// mode. If no CPU has such a mode each access fails with ErrMode.
func New(f Frames, mode Mode) *Memory {
	m := &Memory{frames: f, walker: newWalker(mode)}
	if c, ok := f.(interface{ frameCache() *Cache }); ok {
		m.cache = c.frameCache()
	}
	m.writer, _ = f.(FrameWriter)
	return m
}

// Mode returns the mode that m was made with.
func (m *Memory) Mode() Mode { return m.mode }
