package sysmap

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
)

// The test side of kallsyms: writes the tables of a list of symbols in any of the
// layouts, into noise.

type addrKind int

const (
	addrLong addrKind = iota
	addrFour
	addrRelative
	addrPerCPU
	addrPlace
)

type layout struct {
	name      string
	word      int
	kind      addrKind
	marker    int  // bytes
	reordered bool // addresses after the token index
	seqs      bool
	longNames bool
	numLong   bool // num_syms is a long
	plain     bool // OpenWrt's: no tokens
}

var layouts = []layout{
	{name: "5.15 OpenWrt", word: 8, kind: addrRelative, marker: 4, plain: true},
	{name: "5.15 OpenWrt i386", word: 4, kind: addrRelative, marker: 4, plain: true},
	{name: "6.6 OpenWrt", word: 8, kind: addrPerCPU, marker: 4, longNames: true, seqs: true, reordered: true, plain: true},
	{name: "6.4 x86_64 absolute", word: 8, kind: addrLong, marker: 4, longNames: true, seqs: true, reordered: true},
	{name: "2.6.10 x86_64", word: 8, kind: addrLong, marker: 8, numLong: true},
	{name: "2.6.10 i386", word: 4, kind: addrLong, marker: 4, numLong: true},
	{name: "4.6 x86_64", word: 8, kind: addrPerCPU, marker: 8, numLong: true},
	{name: "4.6 x86_64 UP", word: 8, kind: addrRelative, marker: 8, numLong: true},
	{name: "4.6 i386", word: 4, kind: addrRelative, marker: 4, numLong: true},
	{name: "4.20 x86_64", word: 8, kind: addrPerCPU, marker: 4},
	{name: "4.20 i386", word: 4, kind: addrRelative, marker: 4},
	{name: "4.20 x86_64 absolute", word: 8, kind: addrLong, marker: 4},
	{name: "6.1.0 x86_64", word: 8, kind: addrPerCPU, marker: 4, longNames: true},
	{name: "6.2 x86_64, 6.1.192", word: 8, kind: addrPerCPU, marker: 4, longNames: true, seqs: true},
	{name: "6.2 i386", word: 4, kind: addrRelative, marker: 4, longNames: true, seqs: true},
	{name: "6.4 x86_64", word: 8, kind: addrPerCPU, marker: 4, longNames: true, seqs: true, reordered: true},
	{name: "6.4 i386", word: 4, kind: addrRelative, marker: 4, longNames: true, seqs: true, reordered: true},
	{name: "6.15 x86_64", word: 8, kind: addrRelative, marker: 4, longNames: true, seqs: true, reordered: true},
	{name: "7.0 x86_64", word: 8, kind: addrPlace, marker: 4, longNames: true, seqs: true, reordered: true},
	{name: "7.0 i386", word: 4, kind: addrPlace, marker: 4, longNames: true, seqs: true, reordered: true},
	{name: "7.0 i386 not relocatable", word: 4, kind: addrFour, marker: 4, longNames: true, seqs: true, reordered: true},
}

const testBanner = "Linux version 6.6.6-test (me@here) (cc 1) #1 SMP"

// kernelSymbols invents n symbols of a kernel of size bytes at base.
func kernelSymbols(rng *rand.Rand, l layout, n int, base, size uint64, banner uint64) []Symbol {
	words := strings.Fields("sys do open read write vfs ext4 xen irq page alloc free lock init " +
		"exit tcp udp skb queue work timer cpu mem map fault notify register device driver get put show store type")
	var syms []Symbol
	seen := map[string]bool{"linux_banner": true, "_text": true, "_end": true}
	name := func() string {
		for {
			var b strings.Builder
			for i := range 2 + rng.IntN(3) {
				if i > 0 {
					b.WriteByte('_')
				}
				b.WriteString(words[rng.IntN(len(words))])
			}
			switch rng.IntN(12) {
			case 0:
				fmt.Fprintf(&b, ".isra.%d", rng.IntN(10))
			case 1:
				fmt.Fprintf(&b, "_%d", rng.IntN(1e5))
			case 2:
				b.WriteString(strings.Repeat("$Xq", rng.IntN(8)))
			}
			if l.longNames && rng.IntN(150) == 0 {
				// Uncompressible, so that the length needs two bytes.
				for b.Len() < 200 {
					b.WriteByte("BCFGHJKLMNOPQRSTUVWYZ"[rng.IntN(21)])
				}
			}
			if s := b.String(); !seen[s] || rng.IntN(20) == 0 {
				seen[s] = true
				return s
			}
		}
	}
	percpu := 0
	if l.kind == addrPerCPU {
		percpu = n / 100
	}
	a := uint64(0)
	for range percpu {
		syms = append(syms, Symbol{Addr: a, Type: 'A', Name: name()})
		a += uint64(rng.IntN(64))
	}
	syms = append(syms, Symbol{Addr: base, Type: 'T', Name: "_text"}, Symbol{Addr: banner, Type: 'D', Name: "linux_banner"})
	for len(syms) < n-1 {
		syms = append(syms, Symbol{Addr: base + rng.Uint64N(size), Type: "tTdDbBrRWV"[rng.IntN(10)], Name: name()})
	}
	syms = append(syms, Symbol{Addr: base + size, Type: 'B', Name: "_end"})
	slices.SortStableFunc(syms, func(x, y Symbol) int {
		switch {
		case x.Addr < y.Addr:
			return -1
		case x.Addr > y.Addr:
			return 1
		}
		return 0
	})
	return syms
}

// tokens makes the 256 strings: each character used is its own, the rest are
// common pieces.
func makeTokens(syms []Symbol) (tok [256]string, by map[string]byte) {
	used := [256]bool{}
	pairs := map[string]int{}
	for c := '0'; c <= '9'; c++ {
		used[c] = true
	}
	for _, s := range syms {
		t := string(s.Type) + s.Name
		for i := range len(t) {
			used[t[i]] = true
			for n := 2; n <= 6 && i+n <= len(t); n++ {
				pairs[t[i:i+n]] += n
			}
		}
	}
	common := make([]string, 0, len(pairs))
	for p := range pairs {
		common = append(common, p)
	}
	slices.SortFunc(common, func(a, b string) int {
		if pairs[a] != pairs[b] {
			return pairs[b] - pairs[a]
		}
		return strings.Compare(a, b)
	})
	by = map[string]byte{}
	for i := range tok {
		switch {
		case used[i]:
			tok[i] = string([]byte{byte(i)})
		case len(common) > 0:
			tok[i], common = common[0], common[1:]
		}
		by[tok[i]] = byte(i)
	}
	return tok, by
}

func encodeName(s string, by map[string]byte) []byte {
	var enc []byte
	for len(s) > 0 {
		for n := min(6, len(s)); ; n-- {
			if c, ok := by[s[:n]]; ok {
				enc = append(enc, c)
				s = s[n:]
				break
			}
		}
	}
	return enc
}

// encodeKallsyms returns the tables as they are at address va.
func encodeKallsyms(l layout, syms []Symbol, va uint64) []byte {
	var b []byte
	le := binary.LittleEndian
	align := func() {
		for (va+uint64(len(b)))%uint64(l.word) != 0 {
			b = append(b, 0)
		}
	}
	long := func(v uint64) {
		if l.word == 8 {
			b = le.AppendUint64(b, v)
		} else {
			b = le.AppendUint32(b, uint32(v))
		}
	}
	base := uint64(0)
	for _, s := range syms {
		if s.Type != 'A' {
			base = s.Addr
			break
		}
	}
	addresses := func() {
		align()
		for _, s := range syms {
			switch l.kind {
			case addrLong:
				long(s.Addr)
			case addrFour:
				b = le.AppendUint32(b, uint32(s.Addr))
			case addrRelative:
				b = le.AppendUint32(b, uint32(s.Addr-base))
			case addrPerCPU:
				if s.Type == 'A' {
					b = le.AppendUint32(b, uint32(s.Addr))
				} else {
					b = le.AppendUint32(b, uint32(base-1-s.Addr))
				}
			case addrPlace:
				b = le.AppendUint32(b, uint32(s.Addr-va-uint64(len(b))))
			}
		}
		if l.kind == addrRelative || l.kind == addrPerCPU {
			align()
			long(base)
		}
	}
	if !l.reordered {
		addresses()
	}
	align()
	if l.numLong {
		long(uint64(len(syms)))
	} else {
		b = le.AppendUint32(b, uint32(len(syms)))
	}
	align()
	tok, by := makeTokens(syms)
	start := len(b)
	var markers []int
	for i, s := range syms {
		if i%256 == 0 {
			markers = append(markers, len(b)-start)
		}
		enc := []byte(string(s.Type) + s.Name)
		if !l.plain {
			enc = encodeName(string(enc), by)
		}
		switch {
		case len(enc) < 0x80, !l.longNames && len(enc) < 0x100:
			b = append(b, byte(len(enc)))
		case l.longNames:
			b = append(b, byte(len(enc))|0x80, byte(len(enc)>>7))
		default:
			panic("name too long for the layout")
		}
		b = append(b, enc...)
	}
	align()
	for _, m := range markers {
		if l.marker == 8 {
			b = le.AppendUint64(b, uint64(m))
		} else {
			b = le.AppendUint32(b, uint32(m))
		}
	}
	seqs := func() {
		align()
		for i := range syms {
			j := i * 7919 % len(syms)
			b = append(b, byte(j>>16), byte(j>>8), byte(j))
		}
	}
	if l.seqs && !l.reordered {
		seqs()
	}
	align()
	var index []uint16
	start = len(b)
	if l.plain {
		tok = [256]string{}
	}
	for _, t := range tok {
		if !l.plain {
			index = append(index, uint16(len(b)-start))
			b = append(append(b, t...), 0)
		}
	}
	align()
	for _, i := range index {
		b = le.AppendUint16(b, i)
	}
	if l.reordered {
		addresses()
		if l.seqs {
			seqs()
		}
	}
	return b
}

// noise looks a bit like a kernel: code bytes, zeros, pointers, strings.
func noise(rng *rand.Rand, n int) []byte {
	var b bytes.Buffer
	for b.Len() < n {
		switch rng.IntN(5) {
		case 0:
			b.Write(make([]byte, rng.IntN(64)))
		case 1:
			for range rng.IntN(16) {
				_ = binary.Write(&b, binary.LittleEndian, 0xffffffff81000000+rng.Uint64N(1<<24))
			}
		case 2:
			b.WriteString("0\x001\x002\x003\x00some text\x00")
		case 3:
			for i := range rng.IntN(12) {
				_ = binary.Write(&b, binary.LittleEndian, uint32(i*(512+rng.IntN(512))))
			}
		default:
			for range rng.IntN(200) {
				b.WriteByte("\xe8\x48\x89\x8b\x00\x0f\x1f\x44\xc3\xcc\x55\x5d\xff\x10\x83\x74"[rng.IntN(16)])
			}
		}
	}
	return b.Bytes()[:n]
}

// testKernel makes the memory of a kernel with tables of n symbols.
func testKernel(l layout, seed uint64, n int) (seg Segment, syms []Symbol) {
	return testKernelOf(l, seed, n, nil)
}

// testKernelOf is testKernel with symbols that edit has changed, if it isn't nil.
func testKernelOf(l layout, seed uint64, n int, edit func(s *Symbol, i int)) (seg Segment, syms []Symbol) {
	rng := rand.New(rand.NewPCG(seed, 1))
	base := uint64(0xffffffff81000000)
	if l.word == 4 {
		base = 0xc1000000
	}
	const bannerAt = 0x2000
	before := bannerAt + 256 + rng.IntN(1<<16)
	size := uint64(4<<20 + rng.IntN(1<<22))
	syms = kernelSymbols(rng, l, n, base, size, base+bannerAt)
	for i := range syms {
		if edit != nil {
			edit(&syms[i], i)
		}
	}
	data := noise(rng, before)
	copy(data[bannerAt:], testBanner+"\n\x00")
	for len(data)%l.word != 0 {
		data = append(data, 0)
	}
	data = append(data, encodeKallsyms(l, syms, base+uint64(len(data)))...)
	data = append(data, noise(rng, 1<<12+rng.IntN(1<<16))...)
	return Segment{Addr: base, Data: data, Size: size}, syms
}
