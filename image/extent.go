package image

import (
	"cmp"
	"fmt"
	"slices"
	"sort"
)

// An extent is a run of guest memory that lies in one piece in the file.
type extent struct {
	addr uint64 // physical (PV: machine) address
	off  uint64 // in the file
	size uint64 // in bytes, not 0
}

func (e extent) end() uint64 { return e.addr + e.size }

// A run is a run of frames of a PV guest: of frames in both address spaces, and of
// pages in the file.
type run struct {
	pfn, mfn, page, count uint64
}

// maxExtents bounds the pieces of an image: 8 Mi of 24 bytes each, and as many of 32
// if the guest is PV. That is enough for a PV guest of 32 GiB without two adjacent
// frames; real guests of any size have a few thousand.
const maxExtents = 8 << 20

// layOut makes data and zero the memory of the image. Where two extents overlap the
// first one wins: the one with the lower address, or the earlier one in the file's
// tables. Dumps have such overlaps where several virtual addresses map to one
// physical address.
func (m *Image) layOut(data, zero []extent) error {
	for _, list := range [][]extent{data, zero} {
		for _, e := range list {
			if e.addr >= maxPhys || e.size > maxPhys-e.addr {
				return formatErr("%#x bytes at physical address %#x: beyond 52 bits", e.size, e.addr)
			}
		}
	}
	for i, e := range data {
		data[i] = m.cutAt(e)
	}
	m.warnCut()
	m.data, m.zero = resolve(data), resolve(zero)
	if len(m.data) == 0 {
		if len(m.cut) > 0 {
			return fmt.Errorf("%w: it ends before its memory begins", ErrTruncated)
		}
		return formatErr("no memory in it")
	}
	// Otherwise a small file could claim endless memory, and scans of it would not
	// end.
	if size := m.Size(); size > m.length {
		return formatErr("%#x bytes of memory in a file of %#x: several share their bytes", size, m.length)
	}
	return nil
}

// within checks that the file has size bytes at off.
func (m *Image) within(what string, off, size uint64) error {
	if off > m.length || size > m.length-off {
		return fmt.Errorf("%w: %s: %#x bytes at %#x, of a file of %#x", ErrTruncated, what, size, off, m.length)
	}
	return nil
}

// resolve sorts the extents, removes from each what a lower one has, and joins
// adjacent ones. It reuses its argument's array.
func resolve(list []extent) []extent {
	slices.SortStableFunc(list, func(a, b extent) int { return cmp.Compare(a.addr, b.addr) })
	out := list[:0]
	for _, e := range list {
		if e.size == 0 {
			continue
		}
		if len(out) > 0 {
			last := &out[len(out)-1]
			if e.end() <= last.end() {
				continue
			}
			if cut := last.end(); cut > e.addr {
				e = extent{addr: cut, off: e.off + cut - e.addr, size: e.end() - cut}
			}
			if last.end() == e.addr && last.off+last.size == e.off {
				last.size += e.size
				continue
			}
		}
		out = append(out, e)
	}
	return slices.Clip(out)
}

// search returns the index of the first extent that ends beyond addr.
func search(list []extent, addr uint64) int {
	return sort.Search(len(list), func(i int) bool { return list[i].end() > addr })
}

// find returns the extent that contains addr.
func find(list []extent, addr uint64) (extent, bool) {
	if i := search(list, addr); i < len(list) && list[i].addr <= addr {
		return list[i], true
	}
	return extent{}, false
}

// after returns the start of the first extent that begins beyond addr, or the end of
// memory.
func after(list []extent, addr uint64) uint64 {
	if i := search(list, addr); i < len(list) {
		return list[i].addr
	}
	return maxPhys
}

// overlaps reports whether an extent contains an address from first to end-1.
func overlaps(list []extent, first, end uint64) bool {
	i := search(list, first)
	return i < len(list) && list[i].addr < end
}
