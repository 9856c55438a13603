package sysmap

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestFromImageLayouts(t *testing.T) {
	t.Parallel()
	for _, l := range layouts {
		t.Run(l.name, func(t *testing.T) {
			t.Parallel()
			for seed := range placements() {
				// Also odd numbers, and whole multiples of 256.
				n := []int{1000, 1024, 2001, 5003, 8192, 1537, 3333, 20000}[seed]
				seg, syms := testKernel(l, seed, n)
				m, err := FromImage([]Segment{seg})
				require.NoError(t, err, "seed %d", seed)
				// Compared by hand: a diff of thousands is of no use.
				got := slices.Collect(m.All())
				require.Len(t, got, len(syms))
				for i := range got {
					require.Equal(t, syms[i], got[i], "seed %d, symbol %d", seed, i)
				}
				assert.Equal(t, testBanner, m.Banner())
				assert.Equal(t, "6.6.6-test", m.Release())
			}
		})
	}
}

// Damage gives an error, or touches one symbol; never a map of another size.
func TestFromImageDamaged(t *testing.T) {
	t.Parallel()
	for _, l := range layouts {
		seg, syms := testKernel(l, 3, 2000)
		for i := 0; i < len(seg.Data); i += 4999 * 8 / int(placements()) {
			d := bytes.Clone(seg.Data)
			d[i] ^= 0x55
			m, err := FromImage([]Segment{{Addr: seg.Addr, Data: d, Size: seg.Size}})
			if err != nil {
				require.ErrorIs(t, err, ErrFormat)
				continue
			}
			require.Equal(t, len(syms), m.Len(), "%s, byte %#x", l.name, i)
		}
	}
}

func TestFromImageErrors(t *testing.T) {
	t.Parallel()
	seg, _ := testKernel(layouts[15], 1, 2000)
	for name, segs := range map[string][]Segment{
		"none":       nil,
		"empty":      {{}},
		"noise":      {{Addr: seg.Addr, Data: seg.Data[:0x2000]}},
		"cut":        {{Addr: seg.Addr, Data: seg.Data[:len(seg.Data)*2/5]}},
		"wraps":      {{Addr: 1<<64 - 8, Data: make([]byte, 16)}},
		"wraps size": {{Addr: 1<<64 - 8, Data: make([]byte, 4), Size: 1 << 63}},
		"elsewhere":  {{Addr: seg.Addr + 1<<30, Data: seg.Data[len(seg.Data)/2:]}},
	} {
		m, err := FromImage(segs)
		require.ErrorIs(t, err, ErrFormat, name)
		require.Nil(t, m, name)
	}
}

// Tables made to cost time: any number of starts fits every marker.
func TestFromImageWorkIsBounded(t *testing.T) {
	large(t)
	t.Parallel()
	l := layouts[9]
	var syms []Symbol
	for range 1 << 16 {
		syms = append(syms, Symbol{Addr: 0xffffffff81000000, Type: 'T', Name: "0"})
	}
	tables := encodeKallsyms(l, syms, 0xffffffff81000000)
	// All names the same two bytes: length 1 and a token of "T".
	names := bytes.Repeat([]byte{1, 'T'}, 1<<20)
	tok := bytes.Index(tables, []byte("0\x001\x00"))
	require.Positive(t, tok)
	var d []byte
	for range 1 << 18 {
		d = binary.LittleEndian.AppendUint32(d, 1<<16)
	}
	d = append(d, names...)
	for range 32 {
		for i := range 1 << 8 {
			d = binary.LittleEndian.AppendUint32(d, uint32(i*512))
		}
	}
	for range 8 {
		d = append(d, tables[tok-1000:]...)
	}
	_, err := FromImage([]Segment{{Addr: 0xffffffff81000000, Data: d}})
	require.ErrorIs(t, err, errWork)
}

// The same for names that aren't compressed: each place leads to each other.
func TestPlainWorkIsBounded(t *testing.T) {
	large(t)
	t.Parallel()
	d := bytes.Repeat([]byte{0, 4, 0, 0}, 1<<16) // numbers of symbols
	d = append(d, bytes.Repeat([]byte("\x06T_text\x01\x03Tab"), 1<<16)...)
	d = append(d, bytes.Repeat([]byte("\x06T_text\x02Ta\x03Tab\x02Ta"), 1<<16)...)
	d = append(d, bytes.Repeat([]byte("\x06T_text"), 1<<16)...)
	_, err := FromImage([]Segment{{Addr: 0xffffffff81000000, Data: d}})
	require.ErrorIs(t, err, ErrFormat)
}

// fuzzWork keeps one run short; the code that counts it is the same.
const fuzzWork = 1 << 22

// Run it with -fuzzminimizetime 1x, see FuzzFromELF.
func FuzzFromImage(f *testing.F) {
	for i, l := range layouts {
		seg, _ := testKernel(l, uint64(i), 900)
		f.Add(seg.Addr, seg.Data[0x2000:])
	}
	f.Fuzz(func(t *testing.T, addr uint64, data []byte) {
		m, err := fromImage([]Segment{{Addr: addr, Data: data}}, fuzzWork)
		checkFuzzed(t, m, err)
	})
}

// checkFuzzed uses a map that came of anything.
func checkFuzzed(t *testing.T, m *Map, err error) {
	t.Helper()
	if err != nil {
		require.Nil(t, m)
		require.NotEmpty(t, err.Error())
		return
	}
	prev := uint64(0)
	n := 0
	for s := range m.All() {
		require.GreaterOrEqual(t, s.Addr, prev)
		require.NotEmpty(t, s.Name)
		prev = s.Addr
		if n++; n%97 == 1 {
			require.NotEmpty(t, m.LookupAll(s.Name))
			if y, off, ok := m.Find(s.Addr + 3); ok {
				require.Equal(t, s.Addr+3, y.Addr+off)
				end, ok := m.FuncEnd(s.Addr + 3)
				require.True(t, ok)
				require.Greater(t, end, s.Addr+3)
			}
		}
	}
	require.Equal(t, n, m.Len())
	_ = m.Suggest("sys_open")
	for range m.Slide(0x1000000).All() {
	}
}

func BenchmarkFromImage(b *testing.B) {
	for _, i := range []int{13, 15, 18} {
		seg, _ := testKernel(layouts[i], 1, 100000)
		b.Run(fmt.Sprint(layouts[i].name), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := FromImage([]Segment{seg}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// large skips a test of bounds, on megabytes of tables, in short runs: under the
// race detector it takes ten times as long, and nothing here is concurrent.
func large(t *testing.T) {
	if testing.Short() {
		t.Skip("megabytes of tables: in the run that isn't short")
	}
}

// placements is how many places each table is put in.
func placements() uint64 {
	if testing.Short() {
		return 2
	}
	return 8
}

const weakBanner = "Linux version 6.6.6-test (me@here) (cc 1) # SMP"

func TestVersionString(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]struct {
		at   int
		line string
	}{
		"":                                    {-1, ""},
		"Linux version %s (%s)\n":             {-1, ""},
		"xx" + testBanner + "\n":              {2, testBanner},
		testBanner:                            {-1, ""}, // cut
		weakBanner + "\n":                     {-1, ""},
		weakBanner[:len(weakBanner)-4] + "\n": {-1, ""},
		weakBanner + "\n\x00Linux version " + testBanner + "\n":                 {len(weakBanner) + 2 + len(bannerStart), testBanner},
		"Linux version 6.8.0-41-generic (b@h) (gcc) #41~22.04.1-Ubuntu SMP\x00": {0, "Linux version 6.8.0-41-generic (b@h) (gcc) #41~22.04.1-Ubuntu SMP"},
	} {
		at, line := VersionString([]byte(in))
		assert.Equal(t, want.at, at, "%q", in)
		assert.Equal(t, want.line, line, "%q", in)
	}
}

// TestWeakBanner: the kernel of a file has two version strings, and no symbol for either.
func TestWeakBanner(t *testing.T) {
	t.Parallel()
	l := layouts[len(layouts)-3]
	seg, _ := testKernelOf(l, 7, 1500, func(s *Symbol, _ int) {
		if s.Name == "linux_banner" {
			s.Name, s.Type = "some_function", 'T'
		}
	})
	copy(seg.Data[0x100:], weakBanner+"\n\x00")
	m, err := FromELF(bytes.NewReader(testELF(l.word, seg, nil)))
	require.NoError(t, err)
	assert.Equal(t, testBanner, m.Banner())
}

// TestOddNames: names with bytes that none had when this was written are no reason to
// lose all of them.
func TestOddNames(t *testing.T) {
	t.Parallel()
	for _, l := range layouts {
		seg, syms := testKernelOf(l, 9, 1500, func(s *Symbol, i int) {
			if i == 700 {
				s.Name = "caf\xc3\xa9_init"
			}
		})
		syms[700].Name = `caf\xc3\xa9_init`
		m, err := FromImage([]Segment{seg})
		require.NoError(t, err, l.name)
		require.Equal(t, syms, slices.Collect(m.All()), l.name)
		for _, name := range []string{"café_init", `caf\xc3\xa9_init`, "café_init@1"} {
			sym, err := m.Lookup(name)
			require.NoError(t, err, name)
			assert.Equal(t, syms[700].Addr, sym.Addr)
		}
		// Control characters are none of them.
		seg, _ = testKernelOf(l, 9, 1500, func(s *Symbol, i int) {
			if i == 700 {
				s.Name = "a\x1b[31m"
			}
		})
		_, err = FromImage([]Segment{seg})
		require.ErrorIs(t, err, ErrFormat, l.name)
	}
}
