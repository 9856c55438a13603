package sysmap

import (
	"bytes"
	"context"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/kimage"
)

var errPage = errors.New("page is gone")

// testMemory is a kernel's memory in pages.
type testMemory struct {
	pages map[uint64][]byte
	gone  map[uint64]bool // fail
	reads int
	seen  map[uint64]int // how often each page was read
}

func newTestMemory() *testMemory {
	return &testMemory{pages: map[uint64][]byte{}, gone: map[uint64]bool{}, seen: map[uint64]int{}}
}

func (m *testMemory) Read(addr uint64, b []byte) error {
	if addr%pageSize != 0 || len(b)%pageSize != 0 || len(b) == 0 {
		return fmt.Errorf("read of %d bytes at %#x", len(b), addr)
	}
	m.reads++
	for ; len(b) > 0; addr, b = addr+pageSize, b[pageSize:] {
		m.seen[addr]++
		p, ok := m.pages[addr]
		if !ok || m.gone[addr] {
			return errPage
		}
		copy(b, p)
	}
	return nil
}

// put adds data, and returns its range.
func (m *testMemory) put(addr uint64, data []byte) Range {
	r := Range{Addr: addr &^ (pageSize - 1)}
	for i := 0; i < len(data); {
		a := (addr + uint64(i)) &^ (pageSize - 1)
		if m.pages[a] == nil {
			m.pages[a] = make([]byte, pageSize)
		}
		i += copy(m.pages[a][addr+uint64(i)-a:], data[i:])
		r.Size = a + pageSize - r.Addr
	}
	return r
}

// kernelMemory is a kernel of l, with text before its tables and data behind.
func kernelMemory(l layout, seed uint64, n int) (m *testMemory, ranges []Range, syms []Symbol) {
	seg, syms := testKernel(l, seed, n)
	rng := rand.New(rand.NewPCG(seed, 7))
	m = newTestMemory()
	image := m.put(seg.Addr, seg.Data)
	data := m.put(image.Addr+image.Size, noise(rng, 1<<18))
	data.Writable = true
	// The rest up to the last symbol, with a gap before it.
	last := Range{Addr: (seg.Addr + seg.size() - 1) &^ (pageSize - 1), Size: pageSize, Writable: true}
	m.put(last.Addr, make([]byte, pageSize))
	return m, []Range{image, data, last}, syms
}

func TestFromMemoryLayouts(t *testing.T) {
	t.Parallel()
	for _, l := range layouts {
		t.Run(l.name, func(t *testing.T) {
			t.Parallel()
			for seed, n := range []int{1000, 1537, 8192, 24001} {
				if testing.Short() && n > 9000 {
					continue
				}
				m, ranges, syms := kernelMemory(l, uint64(seed), n)
				got, tables, err := FromMemory(context.Background(), m, ranges)
				require.NoError(t, err, "%d symbols", n)
				equalSymbols(t, syms, got)
				assert.Equal(t, testBanner, got.Banner())
				assert.Equal(t, n, tables.Count)
				assert.Contains(t, tables.String(), tables.Layout)
				banner, err := got.Lookup("linux_banner")
				require.NoError(t, err)
				assert.Equal(t, banner.Addr, tables.Banner)
				pages := 0
				for _, k := range m.seen {
					pages += k
				}
				assert.Equal(t, pages, tables.Pages)
				if testing.Verbose() {
					t.Logf("%d symbols: %v; %d reads, %d pages there are", n, tables, m.reads, len(m.pages))
				}
			}
		})
	}
}

// equalSymbols compares by hand: a diff of thousands is of no use.
func equalSymbols(t *testing.T, want []Symbol, m *Map) {
	t.Helper()
	got := slices.Collect(m.All())
	require.Len(t, got, len(want))
	for i := range got {
		require.Equal(t, want[i], got[i], "symbol %d", i)
	}
}

// vmlinuxMemory is what a booted kernel has of an ELF image.
func vmlinuxMemory(img []byte) (*testMemory, []Range) {
	f, err := elf.NewFile(bytes.NewReader(img))
	if err != nil {
		panic(err)
	}
	segs, err := loadSegments(f)
	if err != nil {
		panic(err)
	}
	m := newTestMemory()
	var ranges []Range
	data := uint64(0)
	if s := f.Section(".data"); s != nil {
		data = s.Addr
	}
	for _, s := range f.Sections {
		if s.Flags&elf.SHF_ALLOC == 0 || s.Addr < 1<<31 || s.Size == 0 {
			continue
		}
		b := slices.Clone(at(segs, s.Addr, int(s.Size)))
		r := m.put(s.Addr, append(b, make([]byte, int(s.Size)-len(b))...))
		// After boot, as mark_rodata_ro leaves it.
		r.Exec, r.Writable = s.Name == ".text", data != 0 && s.Addr >= data
		if n := len(ranges); n > 0 {
			// Sections share pages.
			last := &ranges[n-1]
			if end := last.Addr + last.Size; r.Addr < end {
				last.Size = max(end, r.Addr+r.Size) - last.Addr
				continue
			}
		}
		ranges = append(ranges, r)
	}
	return m, ranges
}

// vmlinux reads the ELF image in a vmlinuz.
func vmlinux(file string) ([]byte, error) {
	b, err := os.ReadFile(file)
	if err != nil || kimage.IsELF(b) {
		return b, err
	}
	return kimage.Kernel(bytes.NewReader(b), int64(len(b)))
}

// pagesOf makes a Memory of a function.
type pagesOf func(addr uint64, page []byte) error

func (f pagesOf) Read(addr uint64, b []byte) error {
	for ; len(b) > 0; addr, b = addr+pageSize, b[pageSize:] {
		if err := f(addr, b[:pageSize]); err != nil {
			return err
		}
	}
	return nil
}

// Guests that cost time: everything looks like some part of the tables. It ends, in
// an error, with no more pages read than the bound says.
func TestFromMemoryHostile(t *testing.T) {
	large(t)
	t.Parallel()
	const base = 0xffffffff81000000
	le := binary.LittleEndian
	good, ranges, _ := kernelMemory(layouts[15], 1, 5000)
	_, where, err := FromMemory(context.Background(), good, ranges)
	require.NoError(t, err)
	tokens := make([]byte, 2*pageSize)
	require.NoError(t, good.Read(where.TokenTable&^(pageSize-1), tokens))
	tokens = tokens[where.TokenTable%pageSize:][:2000]
	for name, mem := range map[string]pagesOf{
		"zeros": func(uint64, []byte) error { return nil },
		"gone":  func(uint64, []byte) error { return errPage },
		"ascending offsets": func(addr uint64, p []byte) error {
			for i := 0; i < len(p); i += 4 {
				le.PutUint32(p[i:], uint32(addr-base)/4+uint32(i/4))
			}
			return nil
		},
		"ascending in pieces": func(addr uint64, p []byte) error {
			for i := 0; i < len(p) && addr>>12&7 != 0; i += 4 {
				le.PutUint32(p[i:], uint32(addr-base)/4+uint32(i/4))
			}
			return nil
		},
		"one page of offsets everywhere": func(_ uint64, p []byte) error {
			for i := 0; i < len(p); i += 4 {
				le.PutUint32(p[i:], uint32(i/4))
			}
			return nil
		},
		"counted everywhere": func(addr uint64, p []byte) error {
			for i := 0; i < len(p); i += 4 {
				if le.PutUint32(p[i:], uint32(i/4)); addr>>12&31 == 0 {
					le.PutUint32(p[i:], 31<<10)
				}
			}
			return nil
		},
		"digits": func(_ uint64, p []byte) error {
			for i := 0; i < len(p); i += copy(p[i:], digits) {
			}
			return nil
		},
		"token tables": func(_ uint64, p []byte) error {
			copy(p, tokens)
			return nil
		},
		"names": func(_ uint64, p []byte) error {
			for i := 0; i < len(p); i += copy(p[i:], "\x01T") {
			}
			return nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			pages := 0
			count := pagesOf(func(addr uint64, p []byte) error {
				pages++
				return mem(addr, p)
			})
			m, tables, err := FromMemory(context.Background(), count, []Range{{Addr: base - base%maxKernel, Size: maxKernel}})
			require.ErrorIs(t, err, ErrFormat)
			assert.Nil(t, m)
			assert.Nil(t, tables)
			assert.LessOrEqual(t, pages, 2*maxPages, "also when reads of many pages fail and are repeated")
			t.Logf("%d pages: %v", pages, err)
		})
	}
}

func TestFromMemoryUnreadable(t *testing.T) {
	t.Parallel()
	for _, i := range []int{0, 4, 13, 15, 18} {
		l := layouts[i]
		m, ranges, syms := kernelMemory(l, 2, 20000)
		_, where, err := FromMemory(context.Background(), m, ranges)
		require.NoError(t, err)
		page := func(a uint64) uint64 { return a &^ (pageSize - 1) }

		// Outside the tables it does not matter; not even linux_banner's page.
		m.gone[page(where.Banner)] = true
		for a := ranges[1].Addr; a < ranges[1].Addr+ranges[1].Size; a += pageSize {
			m.gone[a] = true
		}
		got, _, err := FromMemory(context.Background(), m, ranges)
		require.NoError(t, err, l.name)
		equalSymbols(t, syms, got)
		assert.Empty(t, got.Banner())

		for _, a := range []uint64{where.Names, where.Names + 9*pageSize, where.Markers, where.TokenTable,
			where.Addresses + 2*pageSize, where.Addresses + 5*pageSize} {
			m.gone = map[uint64]bool{page(a): true}
			got, tables, err := FromMemory(context.Background(), m, ranges)
			require.ErrorIs(t, err, ErrFormat, "%s %#x", l.name, a)
			require.ErrorIs(t, err, errPage, "%s %#x", l.name, a)
			assert.Nil(t, got)
			assert.Nil(t, tables)
		}
	}
}

// The quick way reads what is in the tables, and little more.
func TestFromMemoryIsQuick(t *testing.T) {
	large(t)
	t.Parallel()
	const n = 40000
	for _, i := range []int{4, 9, 13, 15, 18} {
		l := layouts[i]
		m, ranges, _ := kernelMemory(l, 3, n)
		_, where, err := FromMemory(context.Background(), m, ranges)
		require.NoError(t, err)
		size := uint64(4)
		if l.kind == addrLong {
			size = uint64(l.word)
		}
		end := where.TokenTable + 2000 + n*size
		if where.Addresses < where.Names {
			end -= where.Names - where.Addresses - size
		}
		least := int((end - min(where.Names, where.Addresses)) / pageSize)
		assert.LessOrEqual(t, where.Pages, least+80, l.name)
	}
}

// 5.10 has 9,778 symbols of one address (__kstrtabns_…), so
// that pages in the midst of the table do not look like it.
func TestFromMemoryPlateau(t *testing.T) {
	t.Parallel()
	const va, n = 0xffffffff81000000, 80000
	b := rawTables(va, single, n, func(i int) []byte { return fmt.Appendf(nil, "Tf%d", i) })
	for i := 20000; i < 30000; i++ {
		binary.LittleEndian.PutUint32(b[len(b)-8-4*n+4*i:], 16*20000)
	}
	mem := newTestMemory()
	text := mem.put(va, make([]byte, 1<<20))
	text.Exec = true
	data := mem.put(va+1<<20, make([]byte, 4<<20))
	data.Writable = true
	tables := mem.put(va+5<<20, b)
	m, where, err := FromMemory(context.Background(), mem, []Range{text, data, tables})
	require.NoError(t, err)
	assert.Equal(t, n, m.Len())
	assert.LessOrEqual(t, where.Pages, len(b)/pageSize+30)
	assert.Less(t, where.Pages, len(mem.pages)/2)
}

// The banner of a kernel without data symbols.
func TestFromMemoryBanner(t *testing.T) {
	t.Parallel()
	const va = 0xffffffff81000000
	tables := rawTables(va, single, 3000, func(i int) []byte {
		if i == 7 {
			return []byte("T_etext")
		}
		return fmt.Appendf(nil, "Tf%d", i)
	})
	for where, at := range map[string]int{"right before": 0x8000 - 104, ".rodata": 0x11e0, "nowhere": 0x4000} {
		b := append(make([]byte, 0x8000), tables...)
		copy(b[at:], testBanner+"\n")
		mem := newTestMemory()
		m, found, err := FromMemory(context.Background(), mem, []Range{mem.put(va, b)})
		require.NoError(t, err, where)
		if where == "nowhere" {
			assert.Empty(t, m.Banner())
			assert.Zero(t, found.Banner)
		} else {
			assert.Equal(t, testBanner, m.Banner(), where)
			assert.Equal(t, va+uint64(at), found.Banner, where)
		}
	}
}

func TestFromMemoryErrors(t *testing.T) {
	t.Parallel()
	m, ranges, _ := kernelMemory(layouts[13], 1, 2000)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_, _, err := FromMemory(ctx, m, ranges)
	require.ErrorIs(t, err, context.Canceled)

	const base = 0xffffffff81000000
	for name, r := range map[string][]Range{
		"none":         nil,
		"empty":        {{}},
		"odd address":  {{Addr: base + 1, Size: pageSize}},
		"odd size":     {{Addr: base, Size: 100}},
		"wraps":        {{Addr: base, Size: 1 << 63}},
		"too large":    {{Addr: base, Size: maxKernel + pageSize}},
		"not in order": {{Addr: base, Size: pageSize}, {Addr: base - pageSize, Size: pageSize}},
		"overlap":      {{Addr: base, Size: 2 * pageSize}, {Addr: base + pageSize, Size: 2 * pageSize}},
		"too many":     make([]Range, maxRanges+1),
		"not there":    {{Addr: base - 1<<30, Size: 1 << 20}},
		"half":         {{Addr: ranges[0].Addr, Size: ranges[0].Size / 2 &^ (pageSize - 1)}},
	} {
		_, _, err := FromMemory(context.Background(), m, r)
		require.ErrorIs(t, err, ErrFormat, name)
	}
	// The last page there can be.
	end := []Range{{Addr: 1<<64 - pageSize, Size: pageSize}}
	_, _, err = FromMemory(context.Background(), m, end)
	require.ErrorIs(t, err, ErrFormat)
	_, _, err = FromMemory(context.Background(), m, append(end, ranges[0]))
	require.ErrorIs(t, err, ErrFormat)
	s, err := newFinder(context.Background(), pagesOf(func(uint64, []byte) error { return nil }), end, maxWork)
	require.NoError(t, err)
	assert.Len(t, s.at(1<<64-1, 14), 1)
	assert.Len(t, s.at(1<<64-pageSize, maxBanner), maxBanner)
	assert.Len(t, s.at(1<<64-pageSize, 2*pageSize), pageSize)
	assert.Empty(t, s.at(0, 14))
}

// rawTables makes tables as since 6.4, of any tokens and encoded names.
func rawTables(va uint64, tok func(i int) string, n int, name func(i int) []byte) []byte {
	le := binary.LittleEndian
	b := le.AppendUint64(nil, uint64(n))
	start := len(b)
	var markers []uint32
	for i := range n {
		if i%256 == 0 {
			markers = append(markers, uint32(len(b)-start))
		}
		enc := name(i)
		if len(enc) >= 0x80 {
			b = append(b, byte(len(enc))|0x80, byte(len(enc)>>7))
		} else {
			b = append(b, byte(len(enc)))
		}
		b = append(b, enc...)
	}
	for len(b)%8 != 0 {
		b = append(b, 0)
	}
	for _, m := range markers {
		b = le.AppendUint32(b, m)
	}
	for len(b)%8 != 0 {
		b = append(b, 0)
	}
	var index []uint16
	start = len(b)
	for i := range 256 {
		index = append(index, uint16(len(b)-start))
		b = append(append(b, tok(i)...), 0)
	}
	for len(b)%8 != 0 {
		b = append(b, 0)
	}
	for _, i := range index {
		b = le.AppendUint16(b, i)
	}
	for i := range n {
		b = le.AppendUint32(b, uint32(16*i))
	}
	for len(b)%8 != 0 {
		b = append(b, 0)
	}
	return le.AppendUint64(b, va)
}

// Tables that are right but for one thing. Not parallel: it looks at what is
// allocated.
func TestHostileTables(t *testing.T) {
	large(t)
	const va = 0xffffffff81000000
	const n = 80000
	long := func(c int) func(int) string {
		return func(i int) string {
			switch {
			case i >= '0' && i <= '9', i == 'T':
				return string(rune(i))
			case i == 'x':
				return strings.Repeat("x", c)
			}
			return ""
		}
	}
	name := func(i int) []byte { return fmt.Appendf(nil, "Tf%d", i) }
	le := binary.LittleEndian
	patch := func(find []byte, off int, v uint32) func([]byte) {
		return func(b []byte) {
			i := bytes.Index(b, find)
			le.PutUint32(b[i+off:], v)
		}
	}
	count := le.AppendUint32(nil, n)
	for what, tt := range map[string]struct {
		tok    func(int) string
		name   func(int) []byte
		damage func(b []byte)
		ok     bool
	}{
		"nothing": {single, name, nil, true},
		// 512 tokens of 500 bytes: a name of 256 KB, and 20 GB in all.
		"tokens expand": {long(500), func(int) []byte { return append([]byte("T"), bytes.Repeat([]byte("x"), 511)...) }, nil, false},
		"names of 64 KB": {long(500), func(i int) []byte {
			if i == 70000 {
				return append([]byte("T"), bytes.Repeat([]byte("x"), 131)...)
			}
			return name(i)
		}, nil, false},
		// Each of them is allowed, all of them are not.
		"80 MB of names":         {long(500), func(int) []byte { return []byte("Txx") }, nil, false},
		"four billion symbols":   {single, name, patch(count, 0, 1<<32-1), false},
		"more symbols":           {single, name, patch(count, 0, n+100), false},
		"fewer symbols":          {single, name, patch(count, 0, n-100), false},
		"a name is longer":       {single, name, patch([]byte("\x07Tf70000"), 0, 0x30665409), false},
		"a name has no type":     {single, name, patch([]byte("\x07Tf70000"), 0, 0x30663107), false},
		"a name has a blank":     {single, name, patch([]byte("\x07Tf70000"), 0, 0x20205407), false},
		"a name has no length":   {single, name, patch([]byte("\x07Tf70000"), 0, 0x30665400), false},
		"names are out of range": {single, name, patch([]byte("\x07Tf79999"), 0, 0xffffffff), false},
		"a marker is higher":     {single, name, func(b []byte) { marker(b, 100, 1) }, false},
		"a marker is lower":      {single, name, func(b []byte) { marker(b, 100, -1) }, false},
		"the last marker lies":   {single, name, func(b []byte) { marker(b, (n-1)/256, 500) }, false},
		"descending addresses": {single, name, func(b []byte) {
			for i := range n {
				le.PutUint32(b[len(b)-8-4*n+4*i:], uint32(16*(n-i)))
			}
		}, false},
		"addresses elsewhere": {single, name, func(b []byte) {
			for i := range n {
				le.PutUint32(b[len(b)-8-4*n+4*i:], 1<<30+uint32(16*i))
			}
		}, false},
	} {
		b := rawTables(va, tt.tok, n, tt.name)
		if tt.damage != nil {
			tt.damage(b)
		}
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		m, err := FromImage([]Segment{{Addr: va, Data: b}})
		runtime.ReadMemStats(&after)
		mem := newTestMemory()
		viaMemory, _, memErr := FromMemory(context.Background(), mem, []Range{mem.put(va, b)})
		if tt.ok {
			require.NoError(t, err, what)
			require.NoError(t, memErr, what)
			require.Equal(t, n, m.Len(), what)
			require.Equal(t, n, viaMemory.Len(), what)
		} else {
			require.ErrorIs(t, err, ErrFormat, what)
			require.ErrorIs(t, memErr, ErrFormat, what)
		}
		assert.Less(t, after.TotalAlloc-before.TotalAlloc, uint64(16<<20), what)
	}
}

// single is the token table where every character is itself.
func single(i int) string { return strings.Trim(string(rune(i&0x7f)), "\x00") }

// marker adds to a marker of tables that have 80,000 names "Tf…".
func marker(b []byte, i, delta int) {
	le := binary.LittleEndian
	// Of all names 10 have 4 bytes with the length, 90 have 5, …
	second := le.AppendUint32(make([]byte, 4), 10*4+90*5+156*6)
	at := bytes.Index(b, second) + 4*i
	le.PutUint32(b[at:], uint32(int(le.Uint32(b[at:]))+delta))
}

// Run it with -fuzzminimizetime 1x, see FuzzFromELF.
func FuzzFromMemory(f *testing.F) {
	for i, l := range layouts {
		seg, _ := testKernel(l, uint64(i), 900)
		f.Add(seg.Addr, seg.Data[0x2000:], uint64(0), byte(i))
	}
	// Enough for the quick way.
	seg, _ := testKernel(layouts[15], 1, 9000)
	f.Add(seg.Addr, seg.Data, uint64(0), byte(3))
	f.Add(seg.Addr, rawTables(seg.Addr, single, 9000, func(i int) []byte { return fmt.Appendf(nil, "Tf%d", i) }), uint64(1<<5), byte(0))
	f.Fuzz(func(t *testing.T, addr uint64, data []byte, gone uint64, flags byte) {
		if len(data) > 1<<20 || addr > math.MaxUint64-2<<20 {
			return
		}
		mem := newTestMemory()
		r := mem.put(addr, data)
		if r.Size == 0 {
			return
		}
		// Some pages are gone, and the range may be two, or one page longer.
		for i := range uint64(64) {
			if gone>>i&1 != 0 {
				mem.gone[r.Addr+i*pageSize] = true
			}
		}
		if flags&4 != 0 {
			r.Size += pageSize
		}
		r.Writable, r.Exec = flags&1 != 0, flags&2 != 0
		ranges := []Range{r}
		if half := r.Size / 2 &^ (pageSize - 1); flags&8 != 0 && half > 0 {
			ranges = []Range{{Addr: r.Addr, Size: half}, {Addr: r.Addr + half, Size: r.Size - half, Writable: true}}
		}
		m, tables, err := fromMemory(context.Background(), mem, ranges, fuzzWork)
		checkFuzzed(t, m, err)
		if err == nil {
			require.Equal(t, m.Len(), tables.Count)
		}
	})
}
