package sysmap

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math"
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
// It takes segments above 4 GiB for those of a 64-bit kernel.
func FromImage(segs []Segment) (*Map, error) { return fromImage(segs, maxWork) }

func fromImage(segs []Segment, work int) (*Map, error) {
	im := image{segs: segs, lo: math.MaxUint64, word: 4, work: work}
	for i := range segs {
		if end := segs[i].Addr + segs[i].size(); end < segs[i].Addr && end != 0 {
			return nil, formatErr("segment at %#x of %#x bytes wraps around", segs[i].Addr, segs[i].size())
		}
		if segs[i].Addr > math.MaxUint32 {
			im.word = 8
		}
	}
	for i := range segs {
		if n := segs[i].size(); n > 0 && (im.word == 4 || segs[i].Addr >= 1<<63) {
			im.lo = min(im.lo, segs[i].Addr)
			im.hi = max(im.hi, segs[i].Addr+n-1)
		}
	}
	// The kernel's end may be rounded down by who cut the segments.
	if im.hi += slack; im.hi < slack {
		im.hi = math.MaxUint64
	}
	for i := range segs {
		if m, err := im.search(&segs[i]); m != nil || err != nil {
			return m, err
		}
	}
	if im.sawTokens {
		return nil, formatErr("found a kallsyms token table, but no names and addresses that agree with it")
	}
	return nil, formatErr("no kallsyms tables in the image (CONFIG_KALLSYMS=n, older than 2.6.10, or not a Linux kernel)")
}

const (
	maxToken   = 512 // longer than any name
	slack      = 1 << 16
	minMarkers = 4 // so fewer than 769 symbols are not looked for
	maxPad     = 256
	maxEncoded = 520              // bytes of an encoded name
	maxSpan    = 16 << 20         // between the first marker and the tokens
	maxWork    = 256 * maxSymbols // see image.spend
	maxHits    = 1 << 16          // places that look like tokens for digits
	maxTables  = 64               // token tables
	maxRuns    = 128              // runs that look like markers, per token table
	tokenIndex = 256 * 2          // bytes of kallsyms_token_index
	digits     = "0\x001\x002\x00" + "3\x004\x005\x006\x007\x008\x009\x00"
)

var errWork = formatErr("gave up: the image has too much that looks like kallsyms tables")

type image struct {
	segs      []Segment
	lo, hi    uint64 // the kernel is within, both included
	word      int    // bytes of a long
	work      int    // elementary steps left
	sawTokens bool
}

// spend accounts for n steps. A hostile image can have any number of almost
// correct tables, this bounds the time for all of them.
func (im *image) spend(n int) bool {
	im.work -= n
	return im.work >= 0
}

// search tries all token tables of a segment. No table is no error.
func (im *image) search(seg *Segment) (*Map, error) {
	data, tables := seg.Data, 0
	for at, hits := 0, 0; hits < maxHits && tables < maxTables; hits++ {
		i := bytes.Index(data[at:], []byte(digits))
		if i < 0 {
			break
		}
		at += i + 1
		var k kallsyms
		if !im.spend(64) {
			return nil, errWork
		}
		if !k.tokens(data, at-1) {
			continue
		}
		tables++
		im.sawTokens = true
		k.im, k.seg = im, seg
		if m := k.decode(); m != nil {
			return m, nil
		}
		if im.work < 0 {
			return nil, errWork
		}
	}
	return nil, nil
}

// kallsyms is one set of tables.
type kallsyms struct {
	im  *image
	seg *Segment

	tok        [256][]byte
	tokenTable int // offsets in seg.Data
	tokenEnd   int // after the index

	markers   int // offset
	marker    []uint64
	numSyms   int // offset
	names     int // offset
	n         int // symbols
	longNames bool
	types     []byte // first letter of each
}

// tokens checks for a token table around the tokens of the digits, which are
// always themselves, and for its index.
func (k *kallsyms) tokens(d []byte, zero int) bool {
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
		if start >= 0 && k.index(d[start:end], index) {
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
		at += n + 1
	}
	return at == len(table)
}

func (k *kallsyms) u32(off int) uint32 {
	if off < 0 || off+4 > len(k.seg.Data) {
		return 0
	}
	return binary.LittleEndian.Uint32(k.seg.Data[off:])
}

func (k *kallsyms) u64(off int) uint64 {
	if off < 0 || off+8 > len(k.seg.Data) {
		return 0
	}
	return binary.LittleEndian.Uint64(k.seg.Data[off:])
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
	return off + int(-(k.seg.Addr+uint64(off))&uint64(n-1))
}

func (k *kallsyms) decode() *Map {
	for _, r := range k.runs() {
		k.markers, k.marker = r.off, r.val
		if m := k.findNames(); m != nil || k.im.work < 0 {
			return m
		}
	}
	return nil
}

type run struct {
	off int
	val []uint64
}

// runs lists what may be the markers: a zero, and ascending numbers with the steps
// that 256 names can make. The nearest to the token table come first.
func (k *kallsyms) runs() []run {
	first := k.align(max(0, k.tokenTable-maxSpan), 8)
	var all []run
	scan := func(size int) {
		get := func(off int) uint64 {
			if size == 8 {
				return k.u64(off)
			}
			return uint64(k.u32(off))
		}
		for off := first; off+minMarkers*size <= k.tokenTable; off += size {
			if get(off) != 0 || !step(0, get(off+size)) {
				continue
			}
			val := []uint64{0}
			p := off + size
			for ; p+size <= k.tokenTable && len(val) <= maxSymbols/256; p += size {
				v := get(p)
				if !step(val[len(val)-1], v) {
					break
				}
				val = append(val, v)
			}
			if len(val) >= minMarkers {
				all = append(all, run{off, val})
			}
			off = p - size
		}
	}
	scan(4)
	if k.im.word == 8 {
		scan(8)
	}
	if !k.im.spend(maxSpan / 16) {
		return nil
	}
	// Nearest first.
	for i, j := 0, len(all)-1; i < j; i, j = i+1, j-1 {
		all[i], all[j] = all[j], all[i]
	}
	return all[:min(len(all), maxRuns)]
}

func step(from, to uint64) bool {
	return to > from && to-from >= 256*2 && to-from <= 256*maxEncoded
}

// findNames looks for the start of the names below the markers. The last marker
// says roughly where, num_syms before it must agree with the number of markers,
// and in the end the walk over all names must meet every marker.
func (k *kallsyms) findNames() *Map {
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
		for start := k.markers - last - 2; start >= lowest; start-- {
			if (k.seg.Addr+uint64(start))&3 != 0 {
				continue
			}
			if !k.im.spend(maxPad / 4) {
				return nil
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
						if m := k.addresses(); m != nil {
							return m
						}
					}
					if k.im.work < 0 {
						return nil
					}
				}
			}
		}
	}
	return nil
}

// next splits an encoded name off at p.
func (k *kallsyms) next(p int) (name []byte, end int) {
	d := k.seg.Data[:k.markers]
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
	if n == 0 || n > maxEncoded || p+n > len(d) {
		return nil, p
	}
	return d[p : p+n], p + n
}

// walk checks the names against the markers, and notes the types.
func (k *kallsyms) walk() bool {
	k.types = k.types[:0]
	p := k.names
	for i := range k.n {
		if i&0xff == 0 {
			if uint64(p-k.names) != k.marker[i>>8] || !k.im.spend(256) {
				return false
			}
		}
		name, end := k.next(p)
		if name == nil {
			return false
		}
		first := k.tok[name[0]]
		if len(first) == 0 || !isType(first[0]) {
			return false
		}
		k.types = append(k.types, first[0])
		p = end
	}
	if k.markers-p >= maxPad {
		return false
	}
	for _, c := range k.seg.Data[p:k.markers] {
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

// A hypothesis says where the addresses are and what they mean.
type hypothesis struct {
	kind meaning
	off  int
	base uint64
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
		v = k.seg.Addr + uint64(h.off) + 4*uint64(i) + uint64(int64(int32(k.u32(h.off+4*i))))
	}
	if k.im.word == 4 {
		v &= math.MaxUint32
	}
	return v
}

// outside says whether v cannot be the address of symbol i. Only absolute symbols
// may be outside the kernel.
func (k *kallsyms) outside(v uint64, i int) bool {
	return (v < k.im.lo || v > k.im.hi) && k.types[i]|0x20 != 'a'
}

// faults counts what is wrong with a hypothesis, up to limit.
func (k *kallsyms) faults(h *hypothesis, limit int) int {
	// A sample first, most are wrong everywhere.
	bad := 0
	if !k.im.spend(64) {
		return limit
	}
	for s := range 64 {
		if i := s * k.n / 64; k.outside(k.value(h, i), i) {
			bad++
		}
	}
	if bad > 16 {
		return limit
	}
	if !k.im.spend(k.n) {
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
func (k *kallsyms) addresses() *Map {
	var best hypothesis
	// Up to 3.13 per-CPU symbols had small values without being absolute.
	most := k.n / 32
	bestFaults := most + 1
	size := len(k.seg.Data)
	try := func(h hypothesis, bytes int) {
		if h.off >= 0 && h.off+k.n*bytes <= size && bestFaults > 0 && k.im.work >= 0 {
			// Strictly fewer: of equals the one with the least padding stays.
			if f := k.faults(&h, bestFaults); f < bestFaults && k.banner(&h) {
				best, bestFaults = h, f
			}
		}
	}
	rel := func(off, base int) {
		b := k.long(base)
		if b >= k.im.lo && b <= k.im.hi {
			try(hypothesis{relative, off, b}, 4)
			if k.im.word == 8 {
				try(hypothesis{perCPU, off, b}, 4)
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
		try(hypothesis{kind: place, off: off}, 4)
		if k.im.word == 4 {
			try(hypothesis{kind: absolute4, off: off}, 4)
		}
	}
	// Up to 6.3, before the number of symbols.
	for pad := 0; pad <= pads; pad += 4 {
		base := k.numSyms - k.im.word - pad
		for gap := 0; gap <= pads; gap += 4 {
			rel(base-gap-4*k.n, base)
		}
		try(hypothesis{kind: absolute, off: k.numSyms - pad - k.im.word*k.n}, k.im.word)
	}
	if bestFaults > most {
		return nil
	}
	m, _ := k.build(&best)
	return m
}

// banner checks the place that a hypothesis gives to linux_banner, if the kernel
// has that symbol (not with CONFIG_KALLSYMS_ALL=n) and the image that place.
func (k *kallsyms) banner(h *hypothesis) bool {
	p := k.names
	var buf []byte
	if !k.im.spend(2 * k.n) {
		return false
	}
	for i := range k.n {
		var enc []byte
		enc, p = k.next(p)
		if enc == nil {
			return false
		}
		// Do not expand what cannot be it.
		if len(enc) > len("linux_banner")+1 {
			continue
		}
		if buf = k.expand(buf[:0], enc); len(buf) == 13 && string(buf[1:]) == "linux_banner" {
			d := at(k.im.segs, k.value(h, i))
			return len(d) < len(bannerStart) || bytes.HasPrefix(d, []byte(bannerStart))
		}
	}
	return true
}

// expand appends the text of an encoded name, type letter first, to buf. It stops
// early if that gets too long.
func (k *kallsyms) expand(buf, enc []byte) []byte {
	for _, c := range enc {
		if buf = append(buf, k.tok[c]...); len(buf) > maxName+1 {
			break
		}
	}
	return buf
}

var errName = errors.New("bad name")

func (k *kallsyms) build(h *hypothesis) (*Map, error) {
	b := newBuilder(k.n, 24*k.n)
	p := k.names
	var buf, enc []byte
	var bannerAddr uint64
	for i := range k.n {
		enc, p = k.next(p)
		buf = k.expand(buf[:0], enc)
		if len(buf) < 2 || !isType(buf[0]) {
			return nil, errName
		}
		for _, c := range buf {
			if c <= ' ' || c >= 0x7f {
				return nil, errName
			}
		}
		v := k.value(h, i)
		if msg := b.add(v, buf[0], buf[1:], nil); msg != "" {
			return nil, errName
		}
		if string(buf[1:]) == "linux_banner" {
			bannerAddr = v
		}
	}
	return b.finish(findBanner(k.im.segs, bannerAddr)), nil
}

const bannerStart = "Linux version "

// at returns what the segments have from an address on.
func at(segs []Segment, addr uint64) []byte {
	for i := range segs {
		if off := addr - segs[i].Addr; off < uint64(len(segs[i].Data)) {
			return segs[i].Data[off:]
		}
	}
	return nil
}

// findBanner returns the banner at addr, or without that (addr is 0 or has none)
// the first in the image.
func findBanner(segs []Segment, addr uint64) string {
	if addr != 0 {
		if s := bannerAt(at(segs, addr)); s != "" {
			return s
		}
	}
	for i := range segs {
		d := segs[i].Data
		for range 64 {
			n := bytes.Index(d, []byte(bannerStart))
			if n < 0 {
				break
			}
			if s := bannerAt(d[n:]); s != "" {
				return s
			}
			d = d[n+1:]
		}
	}
	return ""
}

// bannerAt accepts "Linux version 6.1.0 (…) …\n".
func bannerAt(d []byte) string {
	const most = 1024
	d = d[:min(len(d), most)]
	if !bytes.HasPrefix(d, []byte(bannerStart)) {
		return ""
	}
	end := bytes.IndexAny(d, "\n\x00")
	if end <= len(bannerStart) || d[len(bannerStart)] < '0' || d[len(bannerStart)] > '9' {
		return ""
	}
	for _, c := range d[:end] {
		if c < ' ' || c >= 0x7f {
			return ""
		}
	}
	return string(d[:end])
}
