package linux

import (
	"fmt"

	"github.com/vmprobes/vmprobes/paging"
)

// checkHole compares where a flat image has its memory with where the kernel says that
// its memory ends (max_pfn, arch/x86/kernel/setup.c). A flat image with a hole that the
// machine doesn't have gives the wrong pages from 4 GiB on, or none.
func (k *Kernel) checkHole(m Scanner) {
	const fourGiB = 4 << 30 / paging.PageSize
	total, end, runs := uint64(0), uint64(0), 0
	for first, count := range m.Ranges() {
		if first != 0 && first != fourGiB || runs == 2 {
			return // not flat: it says where its memory belongs
		}
		runs++
		total += count
		end = uint64(first) + count
	}
	at, err := k.symbol("max_pfn")
	if err != nil {
		return
	}
	top, err := k.pointer(at)
	if err != nil {
		top, err = k.pointerInImage(at) // the page tables may be in what is missing
	}
	// Up to 4 GiB there is nothing behind a hole.
	if err != nil || top <= fourGiB || top == end || total+fourGiB <= top {
		return
	}
	hole := total + fourGiB - top // in pages
	if hole >= fourGiB {
		return
	}
	k.explain(rungLayout, nil, fmt.Sprintf("the guest's memory ends at %#x, and that of the image at %#x", top*paging.PageSize, end*paging.PageSize),
		"the hole below 4 GiB is not where it was taken to be, so that what lies above is wrong or missing: it begins at %#x (?hole=%#x behind the name of the file)",
		hole*paging.PageSize, hole*paging.PageSize)
	k.log.Warn("the image's memory is not laid out as the guest's", "hole", hole*paging.PageSize)
}

// pointerInImage reads a word of the kernel's image without its page tables: the image lies
// in one piece, with the kernel's own page tables in it.
func (k *Kernel) pointerInImage(at uint64) (uint64, error) {
	for _, name := range ownRoots {
		pgd, err := k.symbol(name)
		if err != nil {
			continue
		}
		phys := k.root.Load() + at - pgd
		page, release, err := k.machine.Page(paging.Frame(phys/paging.PageSize), false)
		if err != nil {
			return 0, err
		}
		defer release()
		if phys%paging.PageSize > paging.PageSize-8 {
			return 0, ErrBadKernel
		}
		return word(page[phys%paging.PageSize:][:k.bits/8], k.bits/8), nil
	}
	return 0, ErrNoKernel
}

// Names of rungs that say that what was found is less than certain.
const (
	rungOthers = "other kernels"
	rungLayout = "memory layout"
)

// Warning reports whether a rung says that what was found is less than certain. Programs
// should show those even if they are not asked to explain.
func (r Rung) Warning() bool { return r.Err == nil && (r.Name == rungOthers || r.Name == rungLayout) }
