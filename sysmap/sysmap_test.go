package sysmap

import (
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/iotest"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

const stub = "ffffffffffffffff B The real System.map is in the linux-image-<version>-dbg package\n"

// A small map with the oddities of real ones.
const sample = `0000000000000000 A fixed_percpu_data
0000000000000000 D __per_cpu_start
0000000000001000 A cpu_debug_store
0000000001000000 A phys_startup_64
ffffffff81000000 T _stext
ffffffff81000000 T _text
ffffffff81000000 t startup_64_local
ffffffff81000000 T startup_64
ffffffff81000100 t type_show
ffffffff81000200 t type_show
ffffffff81000200 t alias_of_type_show
ffffffff810002f0 t __pfx_do_sys_openat2
ffffffff81000300 t do_sys_openat2
ffffffff81000400 T __x64_sys_open
ffffffff81000500 t finish_task_switch.isra.0
ffffffff81000600 t finish_task_switch.cold
ffffffff81000700 t twice.part.0
ffffffff81000800 t twice.constprop.0.isra.1
ffffffff81000900 T vfs_open
ffffffff81000900 T same
ffffffff81000900 t same
ffffffff81000a00 T __noinstr_text_start
ffffffff81000a80 T bprm_execve
ffffffff81000b00 T _etext
ffffffff82000000 D init_task
ffffffff82003000 A __high_constant
ffffffff82004000 B _end
ffffffffc0201000 t ext4_init	[ext4]
ffffffffc0201080 t type_show	[ext4]
ffffffffc0205000 t xfs_init	[xfs]
`

func mustParse(t testing.TB, s string) *Map {
	t.Helper()
	m, err := Parse(strings.NewReader(s))
	require.NoError(t, err)
	return m
}

func TestParse(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name, in string
		want     []Symbol
	}{
		{"plain", "ffffffff81000000 T _text\n", []Symbol{{0xffffffff81000000, 'T', "_text", ""}}},
		{"no newline at the end", "c1000000 T _text", []Symbol{{0xc1000000, 'T', "_text", ""}}},
		{"CRLF, blanks, comment, BOM", "\xef\xbb\xbf# saved\r\n\r\n   c1000000\tT  _text  \r\n\n", []Symbol{{0xc1000000, 'T', "_text", ""}}},
		{"upper-case digits", "C100ABCD ? x\n", []Symbol{{0xc100abcd, '?', "x", ""}}},
		{"module", "ffffffffc0000000 t f\t[ext4]\nffffffffc0000001 t g [bpf]\n",
			[]Symbol{{0xffffffffc0000000, 't', "f", "ext4"}, {0xffffffffc0000001, 't', "g", "bpf"}}},
		{"out of order, stable", "2 t b\n1 t a\n2 t a\n", []Symbol{{1, 't', "a", ""}, {2, 't', "b", ""}, {2, 't', "a", ""}}},
		{"undefined", "         U foo\n         w bar\n1 T x\n", []Symbol{{1, 'T', "x", ""}}},
		{"some zero", "0 A z\n1 T x\n", []Symbol{{0, 'A', "z", ""}, {1, 'T', "x", ""}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			for name, r := range map[string]io.Reader{
				"whole": strings.NewReader(tt.in),
				"bytes": iotest.OneByteReader(strings.NewReader(tt.in)),
				"EOF":   iotest.DataErrReader(strings.NewReader(tt.in)),
			} {
				m, err := Parse(r)
				require.NoError(t, err, name)
				require.Equal(t, tt.want, slices.Collect(m.All()), name)
			}
		})
	}
}

func TestParseOdd(t *testing.T) {
	t.Parallel()
	m, err := Parse(strings.NewReader("          (null) A irq_stack_union\n          (null) A __per_cpu_start\n" +
		"ffffffff81000000 T _text\nffffffff81000010 t caf\xc3\xa9\t[m]\n"))
	require.NoError(t, err)
	var all []string
	for s := range m.All() {
		all = append(all, s.String())
	}
	assert.Equal(t, []string{"0000000000000000 A irq_stack_union", "0000000000000000 A __per_cpu_start", "ffffffff81000000 T _text",
		`ffffffff81000010 t caf\xc3\xa9 [m]`}, all)
	sym, _, ok := m.With([]Symbol{{Addr: 0xffffffffc0000000, Type: 't', Name: "café", Module: "m"}}).Find(0xffffffffc0000000)
	assert.True(t, ok)
	assert.Equal(t, `caf\xc3\xa9`, sym.Name)
}

func TestParseErrors(t *testing.T) {
	t.Parallel()
	const ok = "ffffffff81000000 T _text\n"
	for _, tt := range []struct {
		name, in string
		line     int
		is       error
		text     string
	}{
		{"empty", "", 0, ErrFormat, "no symbols"},
		{"only comments", "# a\n\n", 0, ErrFormat, "no symbols"},
		{"text", ok + "\n" + "hello world\n", 3, ErrFormat, "address"},
		{"long address", ok + "11111111111111111 T x\n", 2, ErrFormat, "16 digits"},
		{"no type", ok + "1\n", 2, ErrFormat, "address"},
		{"bad type", ok + "1 7 x\n", 2, ErrFormat, "type letter"},
		{"no name", ok + "1 T\n", 2, ErrFormat, "name"},
		{"no name but blank", ok + "1 T  \n", 2, ErrFormat, "name"},
		{"junk after name", ok + "1 T x y\n", 2, ErrFormat, "[module]"},
		{"empty module", ok + "1 T x []\n", 2, ErrFormat, "[module]"},
		{"blank in module", ok + "1 T x [a b]\n", 2, ErrFormat, "module name"},
		{"escape in name", ok + "1 T \x1b[31m\n", 2, ErrFormat, "name"},
		{"control in name", ok + "1 T x\x00y\n", 2, ErrFormat, "0x00"},
		{"long name", ok + "1 T " + strings.Repeat("x", maxName+1) + "\n", 2, ErrFormat, "too long"},
		{"long line", ok + strings.Repeat("x", 5000), 2, ErrFormat, "too long"},
		{"endless line", ok + strings.Repeat("x", 1<<18), 2, ErrFormat, "too long"},
		{"stub", stub, 0, ErrStub, "linux-image-<version>-dbg"},
		{"stub of a version", strings.Replace(stub, "<version>", "6.1.0-9-amd64", 1), 0, ErrStub, "linux-image-6.1.0-9-amd64-dbg"},
		{"restricted, (null)", "          (null) A irq_stack_union\n          (null) T _text\n", 0, ErrRestricted, "kptr_restrict"},
		{"null and more", "(null)0 T x\n", 1, ErrFormat, "address"},
		{"restricted", "0000000000000000 T _text\n0000000000000000 t f\n", 0, ErrRestricted, "kptr_restrict"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			m, err := Parse(strings.NewReader(tt.in))
			require.ErrorIs(t, err, tt.is)
			require.Nil(t, m)
			assert.Contains(t, err.Error(), tt.text)
			var se *SyntaxError
			if errors.As(err, &se) {
				assert.Equal(t, tt.line, se.Line)
			} else {
				assert.Zero(t, tt.line)
			}
		})
	}
	_, err := Parse(iotest.ErrReader(io.ErrClosedPipe))
	require.ErrorIs(t, err, io.ErrClosedPipe)
	_, err = Parse(stuck{})
	require.ErrorIs(t, err, io.ErrNoProgress)
}

type stuck struct{}

func (stuck) Read([]byte) (int, error) { return 0, nil }

func TestLookup(t *testing.T) {
	t.Parallel()
	m := mustParse(t, sample)

	s, err := m.Lookup("do_sys_openat2")
	require.NoError(t, err)
	assert.Equal(t, Symbol{Addr: 0xffffffff81000300, Type: 't', Name: "do_sys_openat2"}, s)

	_, err = m.Lookup("type_show")
	require.ErrorIs(t, err, ErrAmbiguous)
	var ae *AmbiguousError
	require.ErrorAs(t, err, &ae)
	require.Len(t, ae.Candidates, 3)
	assert.Equal(t, `symbol "type_show" is ambiguous, 3 candidates: type_show@1 = 0xffffffff81000100, `+
		`type_show@2 = 0xffffffff81000200, type_show@3 = 0xffffffffc0201080 [ext4]`, err.Error())
	for i, c := range ae.Candidates {
		s, err := m.Lookup(fmt.Sprintf("type_show@%d", i+1))
		require.NoError(t, err)
		assert.Equal(t, c, s)
	}
	// One name twice at one address is one symbol.
	s, err = m.Lookup("same")
	require.NoError(t, err)
	assert.Equal(t, byte('T'), s.Type)
	assert.Len(t, m.LookupAll("same"), 2)
	_, err = m.Lookup("same@1")
	require.NoError(t, err)

	for _, name := range []string{"", "nosuch", "type_show@0", "type_show@4", "type_show@x", "@1", "same@2",
		"type_show@99999999999999999999", "nosuch@1", "finish_task_switch"} {
		_, err := m.Lookup(name)
		require.ErrorIs(t, err, ErrNotFound, name)
		require.ErrorIs(t, err, fs.ErrNotExist, name)
	}

	s, err = m.LookupSuffixed("finish_task_switch")
	require.NoError(t, err)
	assert.Equal(t, "finish_task_switch.isra.0", s.Name)
	s, err = m.LookupSuffixed("vfs_open")
	require.NoError(t, err)
	assert.Equal(t, "vfs_open", s.Name)
	_, err = m.LookupSuffixed("twice")
	require.ErrorIs(t, err, ErrAmbiguous)
	assert.Contains(t, err.Error(), "twice.constprop.0.isra.1 = ")
	_, err = m.LookupSuffixed("type_show")
	require.ErrorIs(t, err, ErrAmbiguous)
	_, err = m.LookupSuffixed("twice.part")
	require.ErrorIs(t, err, ErrNotFound)
	_, err = m.LookupSuffixed("")
	require.ErrorIs(t, err, ErrNotFound)
}

// Not parallel: it counts allocations.
func TestFind(t *testing.T) {
	m := mustParse(t, sample)
	for _, tt := range []struct {
		addr uint64
		name string // "" = nothing
		off  uint64
		end  uint64
	}{
		{0, "", 0, 0},
		{0x1010, "", 0, 0},
		{0x1000000, "", 0, 0},
		{0xffffffff80ffffff, "", 0, 0},
		{0xffffffff81000000, "startup_64", 0, 0xffffffff81000100},
		{0xffffffff81000150, "type_show", 0x50, 0xffffffff81000200},
		// Past the padding symbol it is still the one before, which ends there.
		{0xffffffff810002ef, "type_show", 0xef, 0xffffffff810002f0},
		{0xffffffff810002f5, "type_show", 0xf5, 0xffffffff81000300},
		{0xffffffff81000300, "do_sys_openat2", 0, 0xffffffff81000400},
		{0xffffffff81000a10, "__noinstr_text_start", 0x10, 0xffffffff81000a80},
		{0xffffffff81000aff, "bprm_execve", 0x7f, 0xffffffff81000b00},
		{0xffffffff81000b00, "", 0, 0},
		{0xffffffff81ffffff, "", 0, 0},
		{0xffffffff82003100, "init_task", 0x3100, 0xffffffff82004000},
		{0xffffffff82004000, "", 0, 0},
		{0xffffffffc0200fff, "", 0, 0},
		{0xffffffffc0201010, "ext4_init", 0x10, 0xffffffffc0201080},
		{0xffffffffc0201fff, "type_show", 0xf7f, 0xffffffffc0202000},
		{0xffffffffc0202000, "", 0, 0},
		{0xffffffffc0205fff, "xfs_init", 0xfff, 0xffffffffc0206000},
		{0xffffffffc0206000, "", 0, 0},
		{1<<64 - 1, "", 0, 0},
	} {
		for _, delta := range []uint64{0, 0x1e000000, ^uint64(0xffffff)} {
			if delta != 0 && tt.addr >= 0xffffffffc0000000 {
				continue // no modules there
			}
			m, addr := m.Slide(delta), tt.addr
			if addr > 1<<63 && addr != 1<<64-1 {
				addr += delta
			}
			s, off, ok := m.Find(addr)
			require.Equal(t, tt.name != "", ok, "%#x + %#x: %v", tt.addr, delta, s)
			end, endOK := m.FuncEnd(addr)
			require.Equal(t, ok, endOK)
			if ok {
				assert.Equal(t, tt.name, s.Name, "%#x", tt.addr)
				assert.Equal(t, tt.off, off, "%#x", tt.addr)
				assert.Equal(t, addr, s.Addr+off)
				assert.Equal(t, tt.end+delta, end, "%#x", tt.addr)
			}
		}
	}
	next, ok := m.Next(0xffffffff81000200)
	require.True(t, ok)
	assert.Equal(t, uint64(0xffffffff810002f0), next)
	_, ok = m.Next(0xffffffffc0205000)
	assert.False(t, ok)
	_, ok = m.Next(0)
	assert.False(t, ok)

	assert.Zero(t, testing.AllocsPerRun(100, func() { m.Find(0xffffffff81000150) }))
}

func TestFind32(t *testing.T) {
	t.Parallel()
	m := mustParse(t, "00400000 A phys_startup_32\n00010000 t below\nc1000000 T _text\nc1000010 T f\nc1000100 T _etext\n")
	_, _, ok := m.Find(0x10000)
	assert.False(t, ok)
	s, off, ok := m.Slide(0x4000000).Find(0xc5000011)
	require.True(t, ok)
	assert.Equal(t, "f", s.Name)
	assert.Equal(t, uint64(1), off)
	assert.Equal(t, uint64(0xc5000010), s.Addr)
	_, _, ok = m.Find(0x1_c1000010)
	assert.False(t, ok)
	_, ok = m.Next(0x1_c1000010)
	assert.False(t, ok)
	s, err := m.Slide(0x50000000).Lookup("f")
	require.NoError(t, err)
	assert.Equal(t, uint64(0x11000010), s.Addr, "wraps at 32 bits")
}

func TestSlide(t *testing.T) {
	t.Parallel()
	m := mustParse(t, sample)
	assert.Same(t, m, m.Slide(0))
	k := m.Slide(0x1000000).Slide(0x200000)
	assert.Equal(t, m.Len()-3, k.Len())
	for s := range k.All() {
		want, err := m.Lookup(s.Name)
		if errors.Is(err, ErrAmbiguous) {
			continue
		}
		require.NoError(t, err)
		if want.Addr > 1<<63 {
			want.Addr += 0x1200000
		}
		if s.Name != "same" {
			assert.Equal(t, want, s)
		}
	}
	_, err := k.Lookup("ext4_init")
	require.ErrorIs(t, err, ErrNotFound)
	assert.Same(t, m.Slide(1).t, m.Slide(2).t, "tables are shared")
}

func TestSuggest(t *testing.T) {
	t.Parallel()
	m := mustParse(t, sample)
	for name, want := range map[string][]string{
		"sys_open":           {"__x64_sys_open", "do_sys_openat2", "vfs_open"},
		"SyS_open":           {"__x64_sys_open", "do_sys_openat2", "vfs_open"},
		"sys_openat":         {"do_sys_openat2", "vfs_open"},
		"open":               {"do_sys_openat2", "vfs_open", "__x64_sys_open"},
		"execve":             {"bprm_execve"},
		"finish_task_switch": {"finish_task_switch.isra.0"},
		"do_sys_opnat2":      {"do_sys_openat2"},
		"VFS_Open":           {"vfs_open"},
		"nothing_like_it":    nil,
		"":                   nil,
		"sys_":               nil,
	} {
		assert.Equal(t, want, m.Suggest(name), name)
	}
	long := strings.Repeat("x", 1<<16)
	assert.Empty(t, m.Suggest(long))
	assert.Empty(t, m.Suggest(long[:maxName]))
}

func TestEditDistance(t *testing.T) {
	t.Parallel()
	// The textbook's, to compare with.
	plain := func(a, b string) int {
		d := make([][]int, len(a)+1)
		for i := range d {
			d[i] = make([]int, len(b)+1)
			for j := range d[i] {
				switch {
				case i == 0 || j == 0:
					d[i][j] = i + j
				case a[i-1] == b[j-1]:
					d[i][j] = d[i-1][j-1]
				default:
					d[i][j] = 1 + min(d[i-1][j-1], d[i-1][j], d[i][j-1])
				}
			}
		}
		return d[len(a)][len(b)]
	}
	rng := rand.New(rand.NewPCG(1, 2))
	word := func() string {
		b := make([]byte, rng.IntN(9))
		for i := range b {
			b[i] = "abc"[rng.IntN(3)]
		}
		return string(b)
	}
	for range 20000 {
		a, b := word(), word()
		for most := range 3 {
			require.Equal(t, min(plain(a, b), most+1), editDistance(a, b, most), "%q %q %d", a, b, most)
		}
	}
}

// Find against a search through all symbols, in maps of any spread.
func TestFindBuckets(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(3, 4))
	for range 300 {
		b := newBuilder(0, 0)
		shift := rng.IntN(63)
		for i := range 1 + rng.IntN(40) {
			require.Empty(t, b.add(1<<63|rng.Uint64()>>1>>shift, 'T', fmt.Appendf(nil, "f%d", i), nil))
		}
		m := b.finish("")
		for range 100 {
			a := 1<<63 | rng.Uint64()>>1>>shift
			var want Symbol
			for s := range m.All() {
				if s.Addr <= a && (want.Name == "" || s.Addr > want.Addr) {
					want = s
				}
			}
			if want.Addr == m.core().symbol(m.Len()-1).Addr && a|4095 != want.Addr|4095 {
				want = Symbol{} // the last one ends with its page
			}
			got, _, ok := m.Find(a)
			require.Equal(t, want.Name != "", ok)
			require.Equal(t, want, got)
		}
	}
}

func TestEmptyMap(t *testing.T) {
	t.Parallel()
	for _, m := range []*Map{nil, {}, new(Map).Slide(1)} {
		assert.Zero(t, m.Len())
		assert.Empty(t, slices.Collect(m.All()))
		_, err := m.Lookup("x")
		require.ErrorIs(t, err, ErrNotFound)
		_, err = m.LookupSuffixed("x@1")
		require.ErrorIs(t, err, ErrNotFound)
		assert.Empty(t, m.LookupAll("x"))
		_, _, ok := m.Find(1)
		assert.False(t, ok)
		_, ok = m.Next(1)
		assert.False(t, ok)
		_, ok = m.FuncEnd(1)
		assert.False(t, ok)
		assert.Empty(t, m.Suggest("x"))
		assert.Empty(t, m.Banner())
		assert.Empty(t, m.Release())
	}
}

func TestConcurrent(t *testing.T) {
	t.Parallel()
	m := mustParse(t, sample)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			k := m.Slide(uint64(i))
			for s := range k.All() {
				k.Find(s.Addr)
				_, _ = k.Lookup(s.Name)
				k.Suggest(s.Name)
			}
		})
	}
	wg.Wait()
}

func TestParseFile(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	write := func(name string, data []byte) string {
		p := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(p, data, 0o600))
		return p
	}
	var z bytes.Buffer
	w := gzip.NewWriter(&z)
	_, _ = w.Write([]byte(sample))
	require.NoError(t, w.Close())

	for _, p := range []string{write("System.map", []byte(sample)), write("map.gz", z.Bytes())} {
		m, err := ParseFile(p)
		require.NoError(t, err, p)
		assert.Equal(t, slices.Collect(mustParse(t, sample).All()), slices.Collect(m.All()))
	}
	_, err := ParseFile(write("stub", []byte(stub)))
	require.ErrorIs(t, err, ErrStub)
	assert.Contains(t, err.Error(), dir)
	_, err = ParseFile(write("cut.gz", z.Bytes()[:z.Len()-20]))
	require.ErrorIs(t, err, ErrFormat)
	_, err = ParseFile(write("efi", append([]byte("MZ"), make([]byte, 2000)...)))
	require.ErrorIs(t, err, ErrFormat)
	_, err = ParseFile(write("empty", nil))
	require.ErrorIs(t, err, ErrFormat)
	_, err = ParseFile(filepath.Join(dir, "nosuch"))
	require.ErrorIs(t, err, fs.ErrNotExist)
	_, err = ParseFile(dir)
	require.Error(t, err)
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(sample))
	f.Add([]byte(stub))
	f.Add([]byte("0 A z\r\n c1000000 T _text [x]\n# \n U x"))
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := Parse(bytes.NewReader(data))
		checkFuzzed(t, m, err)
		if err != nil {
			return
		}
		// What it read it reads again, if written as the kernel would.
		var b bytes.Buffer
		for s := range m.All() {
			fmt.Fprintln(&b, s)
		}
		again, err := Parse(&b)
		require.NoError(t, err)
		require.Equal(t, slices.Collect(m.All()), slices.Collect(again.All()))
	})
}

// bigMap is text of the size of a real kernel's.
func bigMap() []byte {
	var b bytes.Buffer
	for i := range 163205 {
		fmt.Fprintf(&b, "%016x %c some_function_name_%06d\n", 0xffffffff81000000+uint64(i)*176, "tTdb"[i%4], i*7919%163205)
	}
	return b.Bytes()
}

func BenchmarkParse(b *testing.B) {
	text := bigMap()
	b.SetBytes(int64(len(text)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Parse(bytes.NewReader(text)); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkSuggest(b *testing.B) {
	m, err := Parse(bytes.NewReader(bigMap()))
	require.NoError(b, err)
	b.ReportAllocs()
	for b.Loop() {
		m.Suggest("sume_function_nime_00x100")
	}
}
