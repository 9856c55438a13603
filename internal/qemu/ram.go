package qemu

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/vmprobes/vmprobes/paging"
)

// ramMap is where a guest's memory is, in order of addresses.
type ramMap []ramRange

// A ramRange is a piece of guest-physical addresses that is memory.
type ramRange struct {
	start, end uint64 // the first address, and the last
	region     string // the memory region that is there
	offset     uint64 // of start in it
	rom        bool
}

// maxRanges bounds the pieces of a map.
const maxRanges = 4096

// parseRAM reads the output of "info mtree -f", in the flat view of the address
// space "memory". Its lines look like
//
//	0000000000100000-00000000bfffffff (prio 0, ram): pc.ram @0000000000100000
func parseRAM(text string) ramMap {
	var m ramMap
	inside := false
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		switch {
		case strings.HasPrefix(line, "FlatView"):
			if inside && len(m) > 0 {
				return m
			}
			inside = false
		case strings.HasPrefix(line, "AS \"memory\","):
			inside = true
		case inside:
			if r, ok := parseRange(line); ok && len(m) < maxRanges && (len(m) == 0 || m[len(m)-1].end < r.start) {
				m = append(m, r)
			}
		}
	}
	return m
}

func parseRange(line string) (r ramRange, ok bool) {
	addrs, rest, ok1 := strings.Cut(line, " (prio ")
	first, last, ok2 := strings.Cut(addrs, "-")
	_, rest, ok3 := strings.Cut(rest, ", ")
	kind, name, ok4 := strings.Cut(rest, "): ")
	if !ok1 || !ok2 || !ok3 || !ok4 {
		return r, false
	}
	switch kind {
	case "ram":
	case "rom", "romd":
		r.rom = true
	default:
		return r, false
	}
	var err error
	if r.start, err = strconv.ParseUint(first, 16, 64); err != nil {
		return r, false
	}
	if r.end, err = strconv.ParseUint(last, 16, 64); err != nil || r.end < r.start {
		return r, false
	}
	name = strings.TrimSuffix(name, " KVM")
	if at := strings.LastIndex(name, " @"); at >= 0 {
		if r.offset, err = strconv.ParseUint(name[at+2:], 16, 64); err != nil {
			return r, false
		}
		name = name[:at]
	}
	r.region = name
	return r, true
}

// find returns the range that addr is in.
func (m ramMap) find(addr uint64) (ramRange, bool) {
	for _, r := range m {
		if addr >= r.start && addr <= r.end {
			return r, true
		}
	}
	return ramRange{}, false
}

// contains reports whether n bytes at addr, all in one frame, are memory. With an
// empty map, since QEMU gave none, it says so of everything.
func (m ramMap) contains(addr uint64, n int) bool {
	if len(m) == 0 || n == 0 {
		return true
	}
	r, ok := m.find(addr)
	return ok && r.end-addr >= uint64(n)-1
}

// bySize returns the regions of RAM, the largest one first.
func (m ramMap) bySize() (regions []string, sizes map[string]uint64) {
	sizes = map[string]uint64{}
	for _, r := range m {
		if r.rom {
			continue
		}
		if _, ok := sizes[r.region]; !ok {
			regions = append(regions, r.region)
		}
		sizes[r.region] += r.end - r.start + 1
	}
	slices.SortStableFunc(regions, func(a, b string) int { return cmp.Compare(sizes[b], sizes[a]) })
	return regions, sizes
}

// main returns the region that most of the memory is in.
func (m ramMap) main() string {
	if all, _ := m.bySize(); len(all) > 0 {
		return all[0]
	}
	return ""
}

// hidden bounds what of the guest's memory lies behind something else: a graphics card
// below 1 MiB, ROM, and 16 MiB for system management at most (q35's TSEG).
const hidden = 20 << 20

// system returns the ranges of the guest's memory proper, which has total bytes in one or
// more regions (NUMA nodes, memory that was plugged in): other RAM is a graphics card's.
// A total of 0 isn't known: then there is one region.
func (m ramMap) system(total uint64) (out ramMap) {
	all, sizes := m.bySize()
	n, have := 0, uint64(0)
	for n < len(all) && (n == 0 || have+hidden < total) {
		have += sizes[all[n]]
		n++
	}
	for _, r := range m {
		if !r.rom && slices.Contains(all[:n], r.region) {
			out = append(out, r)
		}
	}
	return out
}

// of returns the ranges of a region.
func (m ramMap) of(region string) (out ramMap) {
	for _, r := range m {
		if r.region == region {
			out = append(out, r)
		}
	}
	return out
}

// inFile returns the region that a file of this size holds.
func (m ramMap) inFile(size uint64) (ramMap, error) {
	all, _ := m.bySize()
	var fit []ramMap
	for _, region := range all {
		of, end := m.of(region), uint64(0)
		for _, r := range of {
			end = max(end, r.offset+(r.end-r.start)+1)
		}
		if end <= size && (len(all) == 1 || size-end < hidden) {
			fit = append(fit, of)
		}
	}
	switch len(fit) {
	case 0:
		return nil, fmt.Errorf("it has %d bytes, the guest %d: this is not its memory", size, m.size())
	case 1:
		return fit[0], nil
	}
	return nil, fmt.Errorf("the guest has memory in %d regions of about %d bytes, and QEMU doesn't say which one is in the file: leave ram= out of the name", len(fit), size)
}

// size is how much RAM there is.
func (m ramMap) size() (n uint64) {
	for _, r := range m {
		if !r.rom {
			n += r.end - r.start + 1
		}
	}
	return n
}

// end is where the RAM ends.
func (m ramMap) end() (end uint64) {
	for _, r := range m {
		if !r.rom {
			end = r.end + 1
		}
	}
	return end
}

// parseTotal reads the output of "info memory_size_summary", two lines like "base memory:
// 536870912" and "plugged memory: 0", and returns the sum, or 0.
func parseTotal(text string) (total uint64) {
	for line := range strings.Lines(text) {
		_, value, _ := strings.Cut(line, " memory: ")
		if n, err := strconv.ParseUint(strings.TrimSpace(value), 10, 63); err == nil && n < 1<<52 {
			total += n
		}
	}
	return total
}

// locate returns the range and the offset in its region of a whole frame.
func (m ramMap) locate(f paging.Frame) (r ramRange, offset uint64, ok bool) {
	addr := uint64(f) << 12
	r, ok = m.find(addr)
	if !ok || r.end-addr < paging.PageSize-1 {
		return r, 0, false
	}
	return r, r.offset + addr - r.start, true
}
