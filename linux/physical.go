package linux

import (
	"errors"
	"fmt"

	"github.com/vmprobes/vmprobes/paging"
)

// ErrNoP2M: a page of a PV guest's physical memory has no machine frame.
var ErrNoP2M = errors.New("no machine frame behind the physical page")

// A PV guest's own map of its memory (arch/x86/xen/p2m.c): xen_p2m_addr points to
// an array with the machine frame of each physical page, xen_p2m_size of them.
// INVALID_P2M_ENTRY is all ones; the two top bits mark frames of other domains and
// identity mappings (arch/x86/include/asm/xen/page.h).
//
// maxP2M bounds pages and frames: physical addresses have 52 bits.
const maxP2M = 1 << 40

// PhysToMachine returns the machine frame of a page of a PV guest's physical
// memory.
func (k *Kernel) PhysToMachine(page uint64) (paging.Frame, error) {
	table, err := k.symbol("xen_p2m_addr")
	if err != nil {
		return 0, fmt.Errorf("%w: %w", ErrNoP2M, err)
	}
	count, err := k.symbol("xen_p2m_size")
	if err != nil {
		return 0, fmt.Errorf("%w: %w", ErrNoP2M, err)
	}
	if table, err = k.pointer(table); err != nil {
		return 0, err
	}
	if count, err = k.pointer(count); err != nil {
		return 0, err
	}
	if page >= min(count, maxP2M) || k.bits != 64 {
		return 0, fmt.Errorf("page %#x of %#x: %w", page, count, ErrNoP2M)
	}
	entry, err := k.pointer(table + page*8)
	if err != nil {
		return 0, err
	}
	if entry >= maxP2M { // or one of the kinds that are no frames, which are larger
		return 0, fmt.Errorf("page %#x, entry %#x: %w", page, entry, ErrNoP2M)
	}
	return paging.Frame(entry), nil
}
