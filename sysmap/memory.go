package sysmap

import (
	"context"
	"encoding/binary"
	"fmt"
	"math"
	"slices"
)

// A Range is a mapped piece of a kernel's image, as its page tables say.
type Range struct {
	Addr, Size     uint64 // bytes, multiples of 4096
	Writable, Exec bool
}

// Memory reads the virtual memory of a kernel: all of b, from addr on, or an error.
// FromMemory asks for whole pages of 4 KiB, several at a time where it needs
// neighbours, and only for pages in the ranges it was given.
type Memory interface {
	Read(addr uint64, b []byte) error
}

// Tables says where FromMemory found a kernel's symbol table, and so why it is
// believed: all names meet all markers, and the addresses are in order and inside
// the kernel.
type Tables struct {
	Layout     string // in words
	Names      uint64 // address of kallsyms_names
	Markers    uint64 // of kallsyms_markers
	TokenTable uint64 // of kallsyms_token_table; Names again if they aren't compressed
	Addresses  uint64 // of kallsyms_offsets, or kallsyms_addresses
	Banner     uint64 // of linux_banner, 0 if not found
	Count      int    // symbols
	Pages      int    // pages of 4 KiB that were read, in the search too
}

// String returns where the tables are, on one line.
func (t *Tables) String() string {
	return fmt.Sprintf("%d symbols, names at %#x, tokens at %#x, addresses at %#x (%s), %d pages read",
		t.Count, t.Names, t.TokenTable, t.Addresses, t.Layout, t.Pages)
}

const (
	// maxRanges and maxKernel bound the ranges: a PV guest has a range for each
	// change of protection among its 4 KiB pages, and the largest image seen
	// has 80 MB.
	maxRanges = 1 << 16
	maxKernel = 128 << 20
	// maxPages bounds the pages read: everything once in the search of last
	// resort, and as much again for what looks like tables and is none.
	maxPages = 2 * maxKernel / pageSize
	// maxFollowed bounds the pages that look like addresses, and have no tables
	// around them. A kernel has a few: .orc_unwind_ip is one such table.
	maxFollowed = 64
	// readPages is how many pages a Read asks for at most.
	readPages = 16
)

// FromMemory finds and decodes the symbol table in the memory of a running kernel.
// ranges are the present pieces of the kernel's image, in address order; all of them,
// for symbols outside count as wrong. The addresses are those of the running kernel:
// don't add a slide.
//
// The search reads few pages: 725 of Linux 6.12, whose names and addresses take 707,
// or 789 if all protections are the same. It samples the image, read-only data first,
// for the table of addresses, whose pages are ascending numbers that lie in the
// kernel; the tokens are next to it, or beyond the names. If that fails it reads
// everything. A page that cannot be read is skipped in the search; in the tables it
// is an error, which wraps that of Memory. All errors match ErrFormat, or are the
// context's.
//
// Everything in memory may be a lie. The search reads at most 65,536 pages, 256 MB,
// takes 2^27 elementary steps (about a second in the worst case found), and has at
// most 48 MB of memory at a time. A kernel without data symbols
// (CONFIG_KALLSYMS_ALL=n) may have an empty Map.Banner.
func FromMemory(ctx context.Context, m Memory, ranges []Range) (*Map, *Tables, error) {
	return fromMemory(ctx, m, ranges, maxWork)
}

func fromMemory(ctx context.Context, m Memory, ranges []Range, work int) (*Map, *Tables, error) {
	s, err := newFinder(ctx, m, ranges, work)
	if err != nil {
		return nil, nil, err
	}
	mp, t := s.quick()
	if mp == nil {
		mp, t = s.scan()
	}
	switch {
	case mp != nil:
		if t.Banner == 0 {
			mp.t.banner, t.Banner = s.banner(mp, t)
		}
		t.Pages = s.pages
		return mp, t, nil
	case s.stop != nil:
		return nil, nil, fmt.Errorf("looking for the kernel's symbol table: %w", s.stop)
	case s.unread != nil:
		return nil, nil, fmt.Errorf("%w; pages could not be read, first %w", s.im.failure(), s.unread)
	}
	return nil, nil, s.im.failure()
}

// A finder looks for the tables in memory.
type finder struct {
	ctx     context.Context
	mem     Memory
	im      image
	ranges  []Range
	regions []Range // ranges without gaps between them are one

	pages  int   // read
	stop   error // the search is over
	unread error // of the first page in a window that was not readable

	last     *window
	page     [pageSize]byte
	followed []Range // where no tables were
}

func newFinder(ctx context.Context, m Memory, ranges []Range, work int) (*finder, error) {
	if len(ranges) > maxRanges {
		return nil, formatErr("kernel image of more than %d ranges", maxRanges)
	}
	s := &finder{ctx: ctx, mem: m, im: image{lo: math.MaxUint64, word: 4, work: work}}
	s.im.at = s.at
	total, last := uint64(0), uint64(0) // last is the last byte of the range before
	for _, r := range ranges {
		if r.Size == 0 {
			continue
		}
		if (r.Addr|r.Size)&(pageSize-1) != 0 || r.Addr+r.Size-1 < r.Addr || len(s.ranges) > 0 && r.Addr <= last {
			return nil, formatErr("range %#x of %#x bytes: not whole pages, or not in address order", r.Addr, r.Size)
		}
		if total += r.Size; r.Size > maxKernel || total > maxKernel {
			return nil, formatErr("kernel image of more than %d bytes", maxKernel)
		}
		if r.Addr > math.MaxUint32 {
			s.im.word = 8
		}
		s.ranges = append(s.ranges, r)
		if n := len(s.regions); n > 0 && last+1 == r.Addr {
			s.regions[n-1].Size += r.Size
		} else {
			s.regions = append(s.regions, Range{Addr: r.Addr, Size: r.Size})
		}
		last = r.Addr + r.Size - 1
	}
	for _, r := range s.ranges {
		s.im.span(r.Addr, r.Size)
	}
	s.im.finishSpan()
	// Where the tables may be, first: read-only data.
	class := func(r Range) int {
		n := 0
		if r.Exec {
			n++
		}
		if r.Writable {
			n += 2
		}
		return n
	}
	slices.SortStableFunc(s.ranges, func(a, b Range) int { return class(a) - class(b) })
	return s, nil
}

// read reads whole pages.
func (s *finder) read(addr uint64, b []byte) error {
	if s.stop == nil {
		s.stop = s.ctx.Err()
	}
	if s.pages += len(b) / pageSize; s.stop == nil && s.pages > maxPages {
		s.stop = formatErr("gave up after %d pages", maxPages)
	}
	if s.stop != nil {
		s.im.work = -1 // ends all loops
		return s.stop
	}
	return s.mem.Read(addr, b)
}

// banner looks for the banner of a kernel that has no symbol for it, where it has
// always been: at the beginning of .rodata (init/version.c, among the first linked)
// or, since 6.1 (init/version-timestamp.c), right before the tables.
func (s *finder) banner(m *Map, t *Tables) (line string, addr uint64) {
	places := []uint64{min(t.Names, t.Addresses) - maxBanner}
	if etext, err := m.Lookup("_etext"); err == nil {
		for _, align := range []uint64{pageSize, 2 << 20} {
			places = append(places, (etext.Addr+align-1)&^(align-1))
		}
	}
	for _, a := range places {
		d := s.at(a, 2*maxBanner)
		if i, line := VersionString(d); i >= 0 {
			return line, a + uint64(i)
		}
	}
	return "", 0
}

// region returns the region that holds an address.
func (s *finder) region(addr uint64) (Range, bool) {
	i, ok := slices.BinarySearchFunc(s.regions, addr, func(r Range, a uint64) int {
		switch {
		case a < r.Addr:
			return 1
		case a-r.Addr >= r.Size:
			return -1
		}
		return 0
	})
	if !ok {
		return Range{}, false
	}
	return s.regions[i], true
}

// at is the image's.
func (s *finder) at(addr uint64, n int) []byte {
	r, ok := s.region(addr)
	if !ok {
		return nil
	}
	n = int(min(uint64(n), r.Addr+r.Size-addr))
	first := addr &^ (pageSize - 1)
	off := int(addr - first)
	b := make([]byte, (off+n+pageSize-1)&^(pageSize-1))
	if s.read(first, b) != nil {
		return nil
	}
	return b[off : off+n]
}

// window returns the memory around an address, as far as tables could extend.
// Windows start at multiples of maxSpan in their region, so that few are made.
func (s *finder) window(addr uint64) *window {
	r, ok := s.region(addr)
	if !ok {
		return nil
	}
	tile := (addr - r.Addr) / maxSpan
	from := max(tile, 1) - 1
	start := r.Addr + from*maxSpan
	if s.last != nil && s.last.addr == start {
		return s.last
	}
	size := min((tile+2-from)*maxSpan, r.Size-from*maxSpan)
	s.last = nil // let go before the next
	s.last = &window{addr: start, data: make([]byte, size), state: make([]pageState, size/pageSize), src: s}
	return s.last
}

// quick samples pages for the table of addresses, in finer and finer steps.
func (s *finder) quick() (*Map, *Tables) {
	prev := uint64(0)
	for _, stride := range []uint64{64, 16, 4} {
		for _, r := range s.ranges {
			for i := uint64(0); i < r.Size/pageSize; i += stride {
				if prev != 0 && i%prev == 0 || s.wasFollowed(r.Addr+i*pageSize) {
					continue
				}
				if len(s.followed) >= maxFollowed || s.im.spent() {
					return nil, nil
				}
				addr := r.Addr + i*pageSize
				if s.read(addr, s.page[:]) != nil {
					continue
				}
				for kind := absolute; kind <= place; kind++ {
					if !s.im.spend(64) {
						return nil, nil
					}
					if _, _, rises, ok := s.ascending(kind, addr, s.page[:]); !ok || rises < minRises {
						continue
					}
					if m, t := s.follow(kind, addr); m != nil {
						return m, t
					}
				}
			}
		}
		prev = stride
	}
	return nil, nil
}

func (s *finder) wasFollowed(addr uint64) bool {
	for _, r := range s.followed {
		if addr-r.Addr < r.Size {
			return true
		}
	}
	return false
}

// minRises is how many different addresses a page of the table must have to be taken
// for one. (Some pages have only one: 5.10 has 9,778 __kstrtabns_ symbols of the same
// address.)
const minRises = 64

// ascending reports whether a page can be part of a table of addresses of that kind,
// and returns its first and last address and how often neighbours differ.
func (s *finder) ascending(kind meaning, addr uint64, b []byte) (first, last uint64, rises int, ok bool) {
	le := binary.LittleEndian
	size := 4
	lo, hi := s.im.lo, s.im.hi
	switch kind {
	case absolute:
		size = s.im.word
	case absolute4:
		if s.im.word == 8 {
			return 0, 0, 0, false
		}
	case relative, perCPU:
		lo, hi = 0, hi-lo
	}
	raw := uint64(0)
	for i := 0; i < len(b); i += size {
		prevRaw, v := raw, uint64(0)
		if raw = uint64(le.Uint32(b[i:])); size == 8 {
			raw = le.Uint64(b[i:])
		}
		switch kind {
		case absolute, absolute4, relative:
			v = raw
		case perCPU:
			v = uint64(^uint32(raw))
		case place:
			v = addr + uint64(i) + uint64(int64(int32(raw)))
			if s.im.word == 4 {
				v &= math.MaxUint32
			}
		}
		if i == 0 {
			first, last = v, v
		} else if raw != prevRaw {
			rises++
		}
		if v < last || v < lo || v > hi {
			return 0, 0, 0, false
		}
		last = v
	}
	return first, last, rises, true
}

// follow looks for the tokens near a page that seems to be in the table of
// addresses.
func (s *finder) follow(kind meaning, addr uint64) (*Map, *Tables) {
	const batch = 8 * pageSize
	w := s.window(addr)
	page := func(off int) (first, last uint64, ok bool) {
		if !w.need(off, off+pageSize) || !s.im.spend(pageSize/4) {
			return 0, 0, false
		}
		first, last, _, ok = s.ascending(kind, w.addr+uint64(off), w.data[off:off+pageSize])
		return first, last, ok
	}
	// Since 6.4 they are before it. Its first page, with the tokens' end or
	// per-CPU offsets in it, need not fit.
	start := int(addr - w.addr)
	end := start + pageSize
	lowest, highest, _ := page(start)
	for start >= pageSize {
		if start%batch == 0 {
			w.need(start-batch, start)
		}
		first, last, ok := page(start - pageSize)
		if !ok || last > lowest {
			break
		}
		lowest = first
		start -= pageSize
	}
	before := max(0, start-4*pageSize)
	w.need(before, start)
	if m, t := s.im.search(w, before, min(len(w.data), start+len(digits))); m != nil {
		return m, t
	}
	// Before that they are beyond the names, which are beyond the addresses.
	for end < len(w.data) {
		if end%batch == 0 {
			w.need(end, end+batch)
		}
		first, last, ok := page(end)
		if !ok || first < highest {
			break
		}
		highest = last
		end += pageSize
	}
	s.followed = append(s.followed, Range{Addr: w.addr + uint64(start), Size: uint64(end - start)})
	n := s.counted(w, kind, start, end)
	for from := end; n > 0 && from < min(len(w.data), end+n*maxPerSymbol) && !s.im.spent(); from += batch {
		to := min(len(w.data), from+batch)
		w.need(from, to)
		if m, t := s.im.search(w, from, min(len(w.data), to+len(digits))); m != nil {
			return m, t
		}
	}
	return nil, nil
}

// maxPerSymbol is how many bytes of names, markers and sequence numbers a symbol
// has on average at most: 14 in 6.1.
const maxPerSymbol = 64

// counted looks for num_syms where the table of addresses ends, and returns 0 if
// there is no such number.
func (s *finder) counted(w *window, kind meaning, start, end int) int {
	size := 4
	if kind == absolute {
		size = s.im.word
	}
	least := (end - start) / size
	w.need(end, end+2*pageSize)
	for off := end - pageSize; off+4 <= min(len(w.data), end+2*pageSize); off += 4 {
		n := int(binary.LittleEndian.Uint32(w.data[off:]))
		if n >= least && n <= least+4*pageSize/size && n <= maxSymbols {
			return n
		}
	}
	return 0
}

// scan reads everything, in search of tokens.
func (s *finder) scan() (*Map, *Tables) {
	const batch = readPages * pageSize
	for _, r := range s.regions {
		for off := uint64(0); off < r.Size; off += batch {
			if s.im.spent() {
				return nil, nil
			}
			w := s.window(r.Addr + off)
			from := int(r.Addr + off - w.addr)
			to := min(len(w.data), from+batch)
			w.need(from-len(digits), to)
			if m, t := s.im.search(w, max(0, from-len(digits)), to); m != nil {
				return m, t
			}
			if m, t := s.im.searchPlain(w, max(0, from-len(digits)), to); m != nil {
				return m, t
			}
		}
	}
	return nil, nil
}

// A window is a stretch of memory, of which pages are read when they are needed.
type window struct {
	addr uint64
	data []byte

	// Without src all of data is there.
	src   *finder
	state []pageState
}

type pageState uint8

const (
	pageMissing pageState = iota
	pageRead
	pageFailed // its bytes are zeros
)

// need reads the missing pages of data[from:to], as far as data goes, and reports
// whether all of it is there.
func (w *window) need(from, to int) bool {
	from, to = max(0, from), min(to, len(w.data))
	if w.src == nil || from >= to {
		return true
	}
	ok := true
	last := (to - 1) / pageSize
	for p := from / pageSize; p <= last; p++ {
		if w.state[p] == pageMissing {
			end := p + 1
			for end <= last && end-p < readPages && w.state[end] == pageMissing {
				end++
			}
			w.read(p, end)
		}
		ok = ok && w.state[p] == pageRead
	}
	return ok
}

// read fills pages from..to. If that fails it finds out which of them did.
func (w *window) read(from, to int) {
	b := w.data[from*pageSize : to*pageSize]
	state := pageRead
	if err := w.src.read(w.addr+uint64(from*pageSize), b); err != nil {
		if to-from > 1 && w.src.stop == nil {
			for p := from; p < to; p++ {
				w.read(p, p+1)
			}
			return
		}
		clear(b)
		state = pageFailed
		if w.src.unread == nil {
			w.src.unread = fmt.Errorf("page %#x: %w", w.addr+uint64(from*pageSize), err)
		}
	}
	for p := from; p < to; p++ {
		w.state[p] = state
	}
}
