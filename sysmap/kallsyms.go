package sysmap

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
	"slices"
	"strings"
)

// The kernel's own symbol table, as scripts/kallsyms.c has written it into
// .rodata since 2.6.10. Every name is a string of bytes that stand for tokens, a
// token table gives each of the 256 its text, and a marker every 256 names says
// where in the names it is. The parts, in order of address ([x] = absent in some):
//
//	2.6.10        addresses            num_syms names markers token_table token_index
//	4.6           offsets relative_base num_syms names markers token_table token_index
//	              (2213e9a66bb8)
//	4.20          the same, markers and num_syms of 4 bytes, not a long
//	              (80ffbaa5b1bd)
//	6.1           lengths above 127 take two bytes (73bbb94466fd)
//	6.2           + seqs_of_names, 3 bytes each, after the markers (60443c88f3a8);
//	              back-ported to 6.1.y
//	6.4           num_syms names markers token_table token_index offsets
//	              relative_base seqs_of_names (404bad70fcf7)
//	6.15 or 6.16  no absolute per-CPU symbols any more: each offset is unsigned
//	7.0           no relative_base: an offset counts from its own place
//	              (a081b5789255); absolute where a 32-bit kernel cannot move
//
// Stable kernels take parts of this early, so that the version does not tell the
// layout. Nothing here looks at the version: the token table is found by its
// content, the rest by what must agree with it, and the meaning of the addresses
// by which one gives ascending addresses inside the kernel.

// A Segment is a piece of a kernel's memory or image.
type Segment struct {
	Addr uint64 // virtual address of Data[0]
	Data []byte
	// Size is the length in memory if that is more than len(Data): the rest
	// is zeros (.bss), or not available.
	Size uint64
}

func (s *Segment) size() uint64 { return max(s.Size, uint64(len(s.Data))) }

// FromImage finds the kallsyms tables in the memory of a kernel: the segments of
// its ELF file, or pieces of a guest's memory, read through the kernel's page
// tables. The tables must lie within one segment, at their true addresses, and the
// segments together must span the kernel, for addresses outside count as wrong.
// It takes segments above 4 GiB for those of a 64-bit kernel. FromMemory does the
// same with few reads.
func FromImage(segs []Segment) (*Map, error) { return fromImage(segs, maxWork) }

func fromImage(segs []Segment, work int) (*Map, error) {
	im := image{lo: math.MaxUint64, word: 4, work: work}
	for i := range segs {
		if end := segs[i].Addr + segs[i].size(); end < segs[i].Addr && end != 0 {
			return nil, formatErr("segment at %#x of %#x bytes wraps around", segs[i].Addr, segs[i].size())
		}
		if segs[i].Addr > math.MaxUint32 {
			im.word = 8
		}
	}
	for i := range segs {
		if n := segs[i].size(); n > 0 {
			im.span(segs[i].Addr, n)
		}
	}
	im.finishSpan()
	im.at = func(addr uint64, n int) []byte { return at(segs, addr, n) }
	for i := range segs {
		w := &window{addr: segs[i].Addr, data: segs[i].Data}
		if m, _ := im.search(w, 0, len(w.data)); m != nil {
			if m.t.banner == "" {
				m.t.banner = findBanner(segs, 0)
			}
			return m, nil
		}
	}
	for i := range segs {
		w := &window{addr: segs[i].Addr, data: segs[i].Data}
		if m, _ := im.searchPlain(w, 0, len(w.data)); m != nil {
			if m.t.banner == "" {
				m.t.banner = findBanner(segs, 0)
			}
			return m, nil
		}
	}
	return nil, im.failure()
}

const (
	maxToken   = 512 // longer than any name
	minMarkers = 4   // so fewer than 769 symbols are not looked for
	maxPad     = 256
	maxEncoded = 520      // bytes of an encoded name
	maxSpan    = 16 << 20 // from the names to the tokens; 2.4 MB in 7.3
	// slack is how far symbols may be beyond the kernel's last byte: its end may be
	// rounded down by whoever cut the segments, and .brk and .init.scratch (2 MiB
	// aligned) are given back at boot.
	slack = 8 << 20
	// maxWork bounds the elementary steps spent on one image, see image.spend.
	// The tables of 6.12 take 2.6 million, those of 7.3 3.9.
	maxWork    = 1 << 27
	maxHits    = 1 << 16  // places that look like tokens for digits
	maxTables  = 64       // token tables
	maxRuns    = 128      // runs that look like markers, per token table
	maxTokens  = 12 << 10 // bytes of the token table and its index; 1.5 KB in 6.12
	tokenIndex = 256 * 2  // bytes of kallsyms_token_index
	digits     = "0\x001\x002\x00" + "3\x004\x005\x006\x007\x008\x009\x00"
)

var errWork = formatErr("gave up: the image has too much that looks like kallsyms tables")

// image is what is known of the kernel that the tables are looked for in.
type image struct {
	lo, hi  uint64 // the kernel is within, both included
	word    int    // bytes of a long
	work    int    // elementary steps left
	tables  int    // token tables seen
	hits    int    // places that looked like one
	anchors int    // places that looked like a name that isn't compressed

	// at returns up to n bytes at an address; fewer, or none, if there are
	// no more.
	at func(addr uint64, n int) []byte
}

// span adds a piece of the kernel.
func (im *image) span(addr, size uint64) {
	if im.word == 4 || addr >= 1<<63 {
		im.lo = min(im.lo, addr)
		im.hi = max(im.hi, addr+size-1)
	}
}

func (im *image) finishSpan() {
	if im.hi += slack; im.hi < slack {
		im.hi = math.MaxUint64
	}
}

// spend accounts for n steps. A hostile image can have any number of almost correct
// tables; this bounds the time for all of them.
func (im *image) spend(n int) bool {
	im.work -= n
	return im.work >= 0
}

// spent reports whether a bound was reached, so that every search is over.
func (im *image) spent() bool {
	return im.work < 0 || im.hits >= maxHits || im.tables >= maxTables
}

func (im *image) failure() error {
	switch {
	case im.spent():
		return errWork
	case im.tables > 0:
		return formatErr("found a kallsyms token table, but no names and addresses that agree with it")
	}
	return formatErr("no kallsyms tables in the image (CONFIG_KALLSYMS=n, older than 2.6.10, or not a Linux kernel)")
}

// search tries the token tables whose digits are at offsets from..to of a window,
// which must be loaded there.
func (im *image) search(w *window, from, to int) (*Map, *Tables) {
	for !im.spent() {
		i := bytes.Index(w.data[from:to], []byte(digits))
		if i < 0 {
			break
		}
		from += i + 1
		im.hits++
		k := kallsyms{im: im, w: w}
		if !im.spend(64) || !k.tokens(from-1) {
			continue
		}
		im.tables++
		if m, t := k.decode(); m != nil {
			return m, t
		}
	}
	return nil, nil
}

// kallsyms is one set of tables. Offsets are those in w.data.
type kallsyms struct {
	im *image
	w  *window

	tok        [256][]byte
	badToken   [256]bool // contains a byte that no name has
	highBytes  [256]int  // how many of its bytes are above 0x7e
	tokenTable int
	tokenEnd   int  // after the index
	plain      bool // there are no tokens: both are where the markers end

	markers    int
	markerSize int
	marker     []uint64
	numSyms    int
	names      int
	n          int // symbols
	nameBytes  int // of all names
	longNames  bool
	types      []byte // first letter of each
	banner     int    // which symbol is linux_banner, or -1
}

// tokens checks for a token table around the tokens of the digits, which are
// always themselves, and for its index.
func (k *kallsyms) tokens(zero int) bool {
	k.w.need(zero-maxTokens, zero+maxTokens)
	d := k.w.data[:min(len(k.w.data), zero+maxTokens)]
	end := zero
	for range 256 - '0' {
		n := bytes.IndexByte(d[end:min(len(d), end+maxToken+1)], 0)
		if n < 0 {
			return false
		}
		end += n + 1
	}
	for pad := 0; pad < 16 && end+pad+tokenIndex <= len(d); pad++ {
		if pad > 0 && d[end+pad-1] != 0 {
			return false
		}
		index := d[end+pad:]
		start := zero - int(binary.LittleEndian.Uint16(index[2*'0':]))
		if start >= max(0, zero-maxTokens) && k.index(d[start:end], index) {
			k.tokenTable, k.tokenEnd = start, end+pad+tokenIndex
			return true
		}
	}
	return false
}

// index checks that the index describes the table, all of it, and sets k.tok.
func (k *kallsyms) index(table, index []byte) bool {
	at := 0
	for i := range k.tok {
		if int(binary.LittleEndian.Uint16(index[2*i:])) != at || at >= len(table) {
			return false
		}
		n := bytes.IndexByte(table[at:], 0)
		if n < 0 || n > maxToken {
			return false
		}
		k.tok[i] = table[at : at+n]
		k.noteToken(i)
		at += n + 1
	}
	return at == len(table)
}

// noteToken notes what the bytes of a token mean for a name that has it.
func (k *kallsyms) noteToken(i int) {
	k.badToken[i], k.highBytes[i] = false, 0
	for _, c := range k.tok[i] {
		if c <= ' ' || c == 0x7f {
			k.badToken[i] = true
		} else if c > 0x7f {
			k.highBytes[i]++
		}
	}
}

func (k *kallsyms) u32(off int) uint32 {
	if off < 0 || off+4 > len(k.w.data) {
		return 0
	}
	return binary.LittleEndian.Uint32(k.w.data[off:])
}

func (k *kallsyms) u64(off int) uint64 {
	if off < 0 || off+8 > len(k.w.data) {
		return 0
	}
	return binary.LittleEndian.Uint64(k.w.data[off:])
}

// long reads a word of the kernel's size.
func (k *kallsyms) long(off int) uint64 {
	if k.im.word == 8 {
		return k.u64(off)
	}
	return uint64(k.u32(off))
}

// align rounds an offset up so that its address is a multiple of n.
func (k *kallsyms) align(off, n int) int {
	return off + int(-(k.w.addr+uint64(off))&uint64(n-1))
}

// decode looks for the markers, backwards from the token table, and for what must
// be before them.
func (k *kallsyms) decode() (*Map, *Tables) {
	const chunk = 1 << 16
	runs := 0
	first := max(0, k.tokenTable-maxSpan)
	for end := k.align(k.tokenTable-3, 4); end > first; end -= chunk {
		start := max(first, end-chunk)
		k.w.need(start, end)
		if !k.im.spend(chunk / 4) {
			return nil, nil
		}
		for off := end - 4; off >= start; off -= 4 {
			if k.u32(off) != 0 {
				continue
			}
			for size := 4; size <= k.im.word; size += 4 {
				if !k.run(off, size) {
					continue
				}
				if m, t := k.findNames(); m != nil {
					return m, t
				}
				if runs++; runs == maxRuns || k.im.spent() {
					return nil, nil
				}
			}
		}
	}
	return nil, nil
}

// run checks for markers of size bytes each at off: a zero, then ascending numbers in
// steps that 256 names can make.
func (k *kallsyms) run(off, size int) bool {
	if (k.w.addr+uint64(off))&uint64(size-1) != 0 {
		return false
	}
	k.marker = append(k.marker[:0], 0)
	last := uint64(0)
	limit := k.tokenTable
	if k.plain {
		limit = len(k.w.data)
	}
	for p := off + size; p+size <= limit && len(k.marker) <= maxSymbols/256; p += size {
		v := uint64(k.u32(p))
		if size == 8 {
			v = k.u64(p)
		}
		if v < last+256*2 || v > last+256*maxEncoded {
			break
		}
		k.marker = append(k.marker, v)
		last = v
	}
	k.markers, k.markerSize = off, size
	return len(k.marker) >= minMarkers && k.im.spend(len(k.marker))
}

// findNames looks for the start of the names below the markers. The last marker
// says roughly where, num_syms before it must agree with the number of markers,
// and in the end the walk over all names must meet every marker.
func (k *kallsyms) findNames() (*Map, *Tables) {
	all := k.marker
	// What follows the markers may look like one or two more of them.
	for cut := 0; cut <= 2 && len(all)-cut >= minMarkers; cut++ {
		k.marker = all[:len(all)-cut]
		end := k.marker[len(k.marker)-1]
		if end >= uint64(k.markers) {
			continue
		}
		last := int(end)
		lowest := max(4, k.markers-last-256*maxEncoded-maxPad)
		for start := k.align(k.markers-last-5, 4); start >= lowest; start -= 4 {
			k.w.need(start-maxPad, start)
			if !k.im.spend(maxPad / 4) {
				return nil, nil
			}
			for d := 4; d <= maxPad && d <= start; d += 4 {
				n := k.u32(start - d)
				if n > maxSymbols || int(n+255)/256 != len(k.marker) {
					continue
				}
				k.numSyms, k.names, k.n = start-d, start, int(n)
				// Up to 6.0 a length of 128 and more was one byte.
				for _, k.longNames = range []bool{true, false} {
					if k.walk() {
						if m, t := k.addresses(); m != nil {
							return m, t
						}
					}
					if k.im.spent() {
						return nil, nil
					}
				}
			}
		}
	}
	return nil, nil
}

// next splits an encoded name off at p.
func (k *kallsyms) next(p int) (name []byte, end int) {
	d := k.w.data[:k.markers]
	if p >= len(d) {
		return nil, p
	}
	n := int(d[p])
	p++
	if k.longNames && n >= 0x80 {
		if p >= len(d) {
			return nil, p
		}
		n = n&0x7f | int(d[p])<<7
		p++
	}
	if n == 0 || n > maxEncoded || n > len(d)-p {
		return nil, p
	}
	return d[p : p+n], p + n
}

// walk checks all names against the markers, notes the types, and how many bytes the
// names have. After it, decoding a name can't fail.
func (k *kallsyms) walk() bool {
	if !k.w.need(k.names, k.markers) {
		return false
	}
	k.types = k.types[:0]
	k.nameBytes, k.banner = 0, -1
	odd := 0
	p, block := k.names, k.names
	buf := make([]byte, 0, 1+len(bannerName))
	for i := range k.n {
		if i&0xff == 0 {
			if uint64(p-k.names) != k.marker[i>>8] || !k.im.spend(256+p-block) {
				return false
			}
			block = p
		}
		enc, end := k.next(p)
		if enc == nil {
			return false
		}
		n, high, bad := 0, 0, false
		for _, c := range enc {
			n += len(k.tok[c])
			high += k.highBytes[c]
			bad = bad || k.badToken[c]
		}
		if high > 0 {
			odd++
		}
		first := k.tok[enc[0]]
		if bad || n < 2 || n > maxName+1 || len(first) == 0 || !isType(first[0]) {
			return false
		}
		if n == 1+len(bannerName) && k.banner < 0 {
			if text := k.expand(buf[:0], enc); string(text[1:]) == bannerName {
				k.banner = i
			}
		}
		k.types = append(k.types, first[0])
		k.nameBytes += n - 1 + high*len(`xc3`)
		p = end
	}
	// Few names have such bytes; garbage has many.
	if k.markers-p >= maxPad || k.nameBytes > maxNameBytes || odd > k.n/8 {
		return false
	}
	for _, c := range k.w.data[p:k.markers] {
		if c != 0 {
			return false
		}
	}
	return true
}

// What the numbers in the table of addresses mean.
type meaning int

const (
	absolute  meaning = iota // a long
	absolute4                // four bytes
	relative                 // base + u32
	perCPU                   // s32: absolute if not negative, else base - 1 - s32
	place                    // own address + s32
)

func (m meaning) String() string {
	return [...]string{"absolute addresses", "absolute addresses", "offsets from a base",
		"offsets below a base, per-CPU absolute", "offsets from their own place"}[m]
}

// A hypothesis says where the addresses are and what they mean.
type hypothesis struct {
	kind meaning
	off  int
	base uint64
}

// size is the bytes of one entry.
func (k *kallsyms) size(m meaning) int {
	if m == absolute {
		return k.im.word
	}
	return 4
}

func (k *kallsyms) value(h *hypothesis, i int) uint64 {
	var v uint64
	switch h.kind {
	case absolute:
		return k.long(h.off + i*k.im.word)
	case absolute4:
		return uint64(k.u32(h.off + 4*i))
	case relative:
		v = h.base + uint64(k.u32(h.off+4*i))
	case perCPU:
		if s := int32(k.u32(h.off + 4*i)); s >= 0 {
			v = uint64(s)
		} else {
			v = h.base - 1 - uint64(int64(s))
		}
	case place:
		v = k.w.addr + uint64(h.off) + 4*uint64(i) + uint64(int64(int32(k.u32(h.off+4*i))))
	}
	if k.im.word == 4 {
		v &= math.MaxUint32
	}
	return v
}

// outside reports whether v cannot be the address of symbol i. Only absolute symbols
// may be outside the kernel.
func (k *kallsyms) outside(v uint64, i int) bool {
	return (v < k.im.lo || v > k.im.hi) && k.types[i]|0x20 != 'a'
}

// faults counts what is wrong with a hypothesis, up to limit. An address that cannot
// be read is wrong.
func (k *kallsyms) faults(h *hypothesis, limit int) int {
	// The last addresses first, which are close together: most hypotheses are wrong
	// everywhere, and a few addresses tell.
	const few = 16
	size := k.size(h.kind)
	if !k.w.need(h.off+(k.n-few)*size, h.off+k.n*size) || !k.im.spend(few) {
		return limit
	}
	bad := 0
	for i := k.n - few; i < k.n; i++ {
		if k.outside(k.value(h, i), i) {
			bad++
		}
	}
	if bad > few/4 {
		return limit
	}
	if !k.w.need(h.off, h.off+k.n*size) || !k.im.spend(k.n) {
		return limit
	}
	bad = 0
	prev := uint64(0)
	for i := 0; i < k.n && bad < limit; i++ {
		v := k.value(h, i)
		if v < prev {
			bad++
		}
		if k.outside(v, i) {
			bad++
		}
		prev = v
	}
	return bad
}

// addresses finds the table of addresses, and makes the map.
func (k *kallsyms) addresses() (*Map, *Tables) {
	var best hypothesis
	// Up to 3.13 per-CPU symbols had small values without being absolute.
	most := k.n / 32
	bestFaults := most + 1
	size := len(k.w.data)
	try := func(h hypothesis) {
		if h.off >= 0 && h.off+k.n*k.size(h.kind) <= size && bestFaults > 0 && k.im.work >= 0 {
			// Strictly fewer: among equals the one with the least padding stays.
			if f := k.faults(&h, bestFaults); f < bestFaults && k.bannerFits(&h) {
				best, bestFaults = h, f
			}
		}
	}
	rel := func(off, base int) {
		if bestFaults == 0 || !k.w.need(base, base+k.im.word) {
			return
		}
		b := k.long(base)
		if b >= k.im.lo && b <= k.im.hi {
			try(hypothesis{relative, off, b})
			if k.im.word == 8 {
				try(hypothesis{perCPU, off, b})
			}
		}
	}
	const pads = 64
	// Since 6.4, after the token index.
	for pad := 0; pad <= pads; pad += 4 {
		off := k.align(k.tokenEnd, 4) + pad
		end := off + 4*k.n
		base := k.align(end, k.im.word)
		for ; base-end <= pads; base += k.im.word {
			rel(off, base)
		}
		try(hypothesis{kind: place, off: off})
		// Up to 6.10, with CONFIG_KALLSYMS_BASE_RELATIVE=n.
		if pad%k.im.word == 0 {
			try(hypothesis{kind: absolute, off: k.align(k.tokenEnd, k.im.word) + pad})
		}
		if k.im.word == 4 {
			try(hypothesis{kind: absolute4, off: off})
		}
	}
	// Up to 6.3, before the number of symbols.
	for pad := 0; pad <= pads; pad += 4 {
		base := k.numSyms - k.im.word - pad
		for gap := 0; gap <= pads; gap += 4 {
			rel(base-gap-4*k.n, base)
		}
		try(hypothesis{kind: absolute, off: k.numSyms - pad - k.im.word*k.n})
	}
	if bestFaults > most {
		return nil, nil
	}
	return k.build(&best), k.tables(&best)
}

// bannerFits checks the place that a hypothesis gives to linux_banner, if the
// kernel has that symbol (not with CONFIG_KALLSYMS_ALL=n) and the image that place.
func (k *kallsyms) bannerFits(h *hypothesis) bool {
	if k.banner < 0 {
		return true
	}
	d := k.im.at(k.value(h, k.banner), len(bannerStart))
	return len(d) < len(bannerStart) || bytes.HasPrefix(d, []byte(bannerStart))
}

// expand appends the text of an encoded name, type letter first, to buf.
func (k *kallsyms) expand(buf, enc []byte) []byte {
	for _, c := range enc {
		buf = append(buf, k.tok[c]...)
	}
	return buf
}

// build makes the map, of names that walk has seen.
func (k *kallsyms) build(h *hypothesis) *Map {
	b := newBuilder(k.n, k.nameBytes)
	p := k.names
	var buf, enc []byte
	for i := range k.n {
		enc, p = k.next(p)
		buf = k.expand(buf[:0], enc)
		name, _ := quoted(buf[1:]) // which walk has checked
		b.add(k.value(h, i), buf[0], name, nil)
	}
	line := ""
	if k.banner >= 0 {
		line = bannerAt(k.im.at(k.value(h, k.banner), maxBanner))
	}
	return b.finish(line)
}

// Names that aren't compressed, as kernels of OpenWrt have them (its patch for
// CONFIG_KALLSYMS_UNCOMPRESSED): each byte of a name is itself, and there are no tokens.
// A name tells where they are: that of the beginning of the text, which each kernel has
// among its first.
var plainAnchors = []string{"\x06T_text", "\x06t_text", "\x07T_stext", "\x07t_stext"}

const (
	// maxBefore bounds the bytes of names before an anchor, which are those of per-CPU
	// symbols.
	maxBefore = 64 << 10
	// maxAnchors bounds the places that look like one.
	maxAnchors = 64
)

// searchPlain tries the anchors at offsets from..to of a window, which must be loaded
// there.
func (im *image) searchPlain(w *window, from, to int) (*Map, *Tables) {
	for _, anchor := range plainAnchors {
		for at := from; at < to && !im.spent() && im.anchors < maxAnchors; at++ {
			i := bytes.Index(w.data[at:to], []byte(anchor))
			if i < 0 {
				break
			}
			at += i
			im.anchors++
			k := kallsyms{im: im, w: w, plain: true}
			for c := range k.tok {
				k.tok[c] = []byte{byte(c)}
				k.noteToken(c)
			}
			if m, t := k.decodePlain(at); m != nil {
				return m, t
			}
		}
	}
	return nil, nil
}

// decodePlain looks for the start of the names before an anchor, and for what must be
// before and behind them.
func (k *kallsyms) decodePlain(anchor int) (*Map, *Tables) {
	lowest := max(maxPad, anchor-maxBefore)
	k.w.need(lowest-maxPad, anchor)
	for start := k.align(anchor-3, 4); start >= lowest; start -= 4 {
		if !k.im.spend(1) {
			return nil, nil
		}
		for _, k.longNames = range []bool{true, false} {
			k.markers = len(k.w.data) // ends next
			if !k.leads(start, anchor) {
				continue
			}
			for d := 4; d <= maxPad; d += 4 {
				n := k.u32(start - d)
				if n > maxSymbols || n <= 256*(minMarkers-1) {
					continue
				}
				k.numSyms, k.names, k.n = start-d, start, int(n)
				if !k.markersBehind() {
					continue
				}
				if k.walk() {
					if m, t := k.addresses(); m != nil {
						return m, t
					}
				}
				if k.im.spent() {
					return nil, nil
				}
			}
		}
	}
	return nil, nil
}

// leads reports whether names from start on lead to the anchor.
func (k *kallsyms) leads(start, anchor int) bool {
	for start < anchor {
		enc, end := k.next(start)
		if len(enc) < 2 || !isType(enc[0]) || !k.im.spend(1) {
			return false
		}
		for _, c := range enc {
			if k.badToken[c] {
				return false
			}
		}
		start = end
	}
	return start == anchor
}

// markersBehind follows the names to their end, and finds the markers there that say the
// same.
func (k *kallsyms) markersBehind() bool {
	k.markers = len(k.w.data)
	var want []uint64
	p := k.names
	for i := range k.n {
		if i%256 == 0 {
			want = append(want, uint64(p-k.names))
			k.w.need(p, p+256*maxEncoded) // what can't be read is zero, and ends the names
			if !k.im.spend(256) {
				return false
			}
		}
		enc, end := k.next(p)
		if enc == nil {
			return false
		}
		p = end
	}
	if p-k.names > maxSpan {
		return false
	}
	for size := 4; size <= k.im.word; size += 4 {
		for off := k.align(p, size); off < p+maxPad; off += size {
			k.w.need(off, off+size*len(want))
			if k.run(off, size) && len(k.marker) >= len(want) {
				k.marker = k.marker[:len(want)]
				if slices.Equal(k.marker, want) {
					k.tokenTable = off + size*len(want)
					k.tokenEnd = k.tokenTable
					return true
				}
			}
		}
	}
	return false
}

// tables describes what was found.
func (k *kallsyms) tables(h *hypothesis) *Tables {
	t := &Tables{
		Names:      k.w.addr + uint64(k.names),
		Markers:    k.w.addr + uint64(k.markers),
		TokenTable: k.w.addr + uint64(k.tokenTable),
		Addresses:  k.w.addr + uint64(h.off),
		Count:      k.n,
	}
	if k.banner >= 0 {
		t.Banner = k.value(h, k.banner)
	}
	t.Layout = h.kind.String() + ", before the names"
	if h.off > k.tokenTable {
		t.Layout = h.kind.String() + ", after the tokens"
	}
	if k.plain {
		t.TokenTable = t.Names
		t.Layout = h.kind.String() + "; names are not compressed"
	}
	t.Layout += fmt.Sprintf("; %d-byte markers", k.markerSize)
	return t
}

const (
	bannerName  = "linux_banner"
	bannerStart = "Linux version "
	maxBanner   = 1024
)

// at returns up to n bytes of what the segments have from an address on.
func at(segs []Segment, addr uint64, n int) []byte {
	for i := range segs {
		if off := addr - segs[i].Addr; off < uint64(len(segs[i].Data)) {
			return segs[i].Data[off:min(off+uint64(n), uint64(len(segs[i].Data)))]
		}
	}
	return nil
}

// findBanner returns the banner at addr, or without that (addr is 0 or has none)
// the first in the image, see [VersionString].
func findBanner(segs []Segment, addr uint64) string {
	if addr != 0 {
		if s := bannerAt(at(segs, addr, maxBanner)); s != "" {
			return s
		}
	}
	for i := range segs {
		if _, s := VersionString(segs[i].Data); s != "" {
			return s
		}
	}
	return ""
}

// maxBanners bounds what is looked at as a version string: a kernel has two, and some
// text that begins like one.
const maxBanners = 64

// VersionString finds the first version string of a kernel, "Linux version 6.1.0 (…)
// #1 …", in memory, and returns where it begins and its text, without the line's end; -1
// if there is none.
//
// Since Linux 6.1 an image has two: before that of the build comes a weak one
// (init/version.c), which a later object (init/version-timestamp.c) replaces and which
// lacks the build's number: "# SMP". That one is not returned.
func VersionString(b []byte) (at int, line string) {
	for range maxBanners {
		i := bytes.Index(b[at:], []byte(bannerStart))
		if i < 0 {
			break
		}
		at += i
		if s := bannerAt(b[at:]); s != "" && !strings.Contains(s+" ", " # ") {
			return at, s
		}
		at++
	}
	return -1, ""
}

// bannerAt accepts "Linux version 6.1.0 (…) …\n".
func bannerAt(d []byte) string {
	d = d[:min(len(d), maxBanner)]
	if end := bytes.IndexAny(d, "\n\x00"); end >= 0 && isBanner(d[:end]) {
		return string(d[:end])
	}
	return ""
}

func isBanner(line []byte) bool {
	const n = len(bannerStart)
	if !bytes.HasPrefix(line, []byte(bannerStart)) || len(line) == n || line[n] < '0' || line[n] > '9' {
		return false
	}
	for _, c := range line {
		if c < ' ' || c >= 0x7f {
			return false
		}
	}
	return true
}
