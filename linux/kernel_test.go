package linux_test

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/kerneltest"
	"github.com/vmprobes/vmprobes/ktype"
	"github.com/vmprobes/vmprobes/linux"
	"github.com/vmprobes/vmprobes/sysmap"
)

func load(tb testing.TB, series string) *kerneltest.Guest {
	tb.Helper()
	g, err := kerneltest.Load(kerneltest.File(tb, series, "vmlinux"))
	require.NoError(tb, err)
	return g
}

var serieses = []string{"6.1", "6.12"}

// TestDiscover compares what is found in memory with the kernel's file.
func TestDiscover(t *testing.T) {
	for _, series := range serieses {
		t.Run(series, func(t *testing.T) {
			g := load(t, series)
			m := g.Machine()
			k, err := linux.Discover(t.Context(), m, nil)
			require.NoError(t, err)
			assert.Equal(t, 64, k.Bits())
			assert.Equal(t, strings.TrimSpace(g.Symbols.Banner()), k.Banner())
			assert.True(t, strings.HasPrefix(k.Release(), series+"."), k.Release())
			assert.Len(t, k.BuildID(), 40)
			require.Equal(t, g.Symbols.Len(), k.Symbols().Len())
			next := make(map[string]bool, g.Symbols.Len())
			for s := range g.Symbols.All() {
				next[s.String()] = true
			}
			for s := range k.Symbols().All() {
				require.True(t, next[s.String()], "%v isn't in the file", s)
			}

			types, err := k.Types()
			require.NoError(t, err)
			assert.Equal(t, "BTF", types.Source())
			init, err := k.Symbols().Lookup("init_task")
			require.NoError(t, err)
			task, err := k.Task(init.Addr)
			require.NoError(t, err)
			assert.Equal(t, "swapper", task.Comm)
			assert.Equal(t, "swapper[0]", task.String())
			tasks, err := k.Processes(true)
			require.NoError(t, err)
			assert.Len(t, tasks, 1)
			_, err = k.Process(1)
			require.ErrorIs(t, err, linux.ErrNoProcess)
			_, err = k.UserRoot(task)
			require.ErrorIs(t, err, linux.ErrNoMemory)
			mods, err := k.Modules()
			require.NoError(t, err)
			assert.Empty(t, mods)

			calls, err := k.Syscalls()
			require.NoError(t, err)
			assert.Greater(t, len(calls), 400)
			call, err := k.Syscall("openat")
			require.NoError(t, err)
			assert.Equal(t, "openat(int dfd, const char * filename, int flags, umode_t mode)", call.String())
			_, err = k.Syscall("nosuchcall")
			require.ErrorIs(t, err, sysmap.ErrNotFound)

			for _, rung := range k.Explain() {
				assert.NotContains(t, rung.String(), "not found")
			}
			t.Logf("%d pages", m.Stats().Maps)
		})
	}
}

// TestCurrentByCode compares where the code of getpid and others says that current is
// with what the symbols say.
func TestCurrentByCode(t *testing.T) {
	for _, series := range serieses {
		k, err := linux.Discover(t.Context(), load(t, series).Machine(), nil)
		require.NoError(t, err)
		var want uint64
		if sym, err := k.Symbols().Lookup("current_task"); err == nil {
			want = sym.Addr
		} else {
			sym, err := k.Symbols().Lookup("pcpu_hot")
			require.NoError(t, err)
			types, err := k.Types()
			require.NoError(t, err)
			f, err := types.Offset("pcpu_hot.current_task")
			require.NoError(t, err)
			want = sym.Addr + f.Offset
		}
		got, err := linux.CurrentByCode(k)
		require.NoError(t, err, series)
		assert.Equal(t, want, got, series)
	}
}

// TestCache finds the same symbols in the cache as in memory, and none of another
// kernel's.
func TestCache(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "cache")
	opts := &linux.Options{Cache: dir}
	found := func(k *linux.Kernel) (s string) {
		for _, r := range k.Explain() {
			if r.Name == "symbols" {
				s = r.Found
			}
		}
		return s
	}
	g := load(t, "6.1")
	first, err := linux.Discover(t.Context(), g.Machine(), opts)
	require.NoError(t, err)
	assert.Contains(t, found(first), "by the structure")
	second, err := linux.Discover(t.Context(), g.Machine(), opts)
	require.NoError(t, err)
	assert.Contains(t, found(second), "from the cache")
	assert.Equal(t, first.Symbols().Len(), second.Symbols().Len())
	for s := range first.Symbols().All() {
		all := second.Symbols().LookupAll(s.Name)
		require.Contains(t, all, s)
	}

	// A kernel that differs in one name of its table isn't taken for the same.
	name, err := g.Symbols.Lookup("linux_banner")
	require.NoError(t, err)
	require.NotZero(t, name.Addr)
	changed := *g
	changed.RAM = bytes.Clone(g.RAM)
	digits := []byte("0\x001\x002\x003\x004\x005\x006\x007\x008\x009\x00") // in kallsyms_token_table
	swapped := []byte("1\x000\x002\x003\x004\x005\x006\x007\x008\x009\x00")
	require.Contains(t, string(g.RAM), string(digits))
	changed.RAM = bytes.ReplaceAll(changed.RAM, digits, swapped)
	third, err := linux.Discover(t.Context(), changed.Machine(), opts)
	if err == nil {
		assert.NotContains(t, found(third), "from the cache")
	}

	// What is wrong with a cache doesn't matter but for the time.
	files, err := filepath.Glob(filepath.Join(dir, "*.symbols"))
	require.NoError(t, err)
	require.NotEmpty(t, files)
	for _, f := range files {
		b, err := os.ReadFile(f)
		require.NoError(t, err)
		b[len(b)/2] ^= 1
		require.NoError(t, os.WriteFile(f, b, 0o600))
	}
	fourth, err := linux.Discover(t.Context(), g.Machine(), opts)
	require.NoError(t, err)
	assert.Contains(t, found(fourth), "by the structure")
	require.NoError(t, os.Chmod(dir, 0o777))
	fifth, err := linux.Discover(t.Context(), g.Machine(), opts)
	require.NoError(t, err)
	assert.Contains(t, found(fifth), "by the structure", "anybody could have written that")
	_, err = linux.Discover(t.Context(), g.Machine(), &linux.Options{Cache: "/proc/no/such"})
	require.NoError(t, err)
}

// TestGiven uses files instead of what is in memory.
func TestGiven(t *testing.T) {
	g := load(t, "6.1")
	k, err := linux.Discover(t.Context(), g.Machine(), &linux.Options{Symbols: g.Symbols})
	require.NoError(t, err)
	assert.Equal(t, g.Symbols.Len(), k.Symbols().Len())

	// Linked elsewhere, as those of a kernel that KASLR moved.
	k, err = linux.Discover(t.Context(), g.Machine(), &linux.Options{Symbols: g.Symbols.Slide(1<<64 - 4<<20)})
	require.NoError(t, err)
	want, err := g.Symbols.Lookup("do_sys_openat2")
	require.NoError(t, err)
	got, err := k.Symbols().Lookup("do_sys_openat2")
	require.NoError(t, err)
	assert.Equal(t, want, got)

	other := load(t, "6.12")
	_, err = linux.Discover(t.Context(), g.Machine(), &linux.Options{Symbols: other.Symbols})
	require.ErrorIs(t, err, linux.ErrWrongSymbols)
	empty, err := sysmap.Parse(strings.NewReader("ffffffff81000000 T startup_64\n"))
	require.NoError(t, err)
	_, err = linux.Discover(t.Context(), g.Machine(), &linux.Options{Symbols: empty})
	require.ErrorIs(t, err, linux.ErrWrongSymbols)

	// Types of another kernel don't find the idle task's name.
	ko, err := linux.Discover(t.Context(), other.Machine(), nil)
	require.NoError(t, err)
	wrong, err := ktype.New("wrong", 8, ktype.Struct{Name: "task_struct", Fields: []ktype.StructField{{Name: "comm", Offset: 64, Type: "char[16]"}}})
	require.NoError(t, err)
	kw, err := linux.Discover(t.Context(), g.Machine(), &linux.Options{Types: wrong})
	require.NoError(t, err)
	_, err = kw.Types()
	require.ErrorIs(t, err, linux.ErrWrongTypes)
	right, err := ko.Types()
	require.NoError(t, err)
	kr, err := linux.Discover(t.Context(), other.Machine(), &linux.Options{Types: right})
	require.NoError(t, err)
	_, err = kr.Types()
	require.NoError(t, err)

	// Those of a file are told by its build id, wherever comm is.
	vmlinuz := kerneltest.File(t, "6.1", "vmlinuz")
	of61, err := ktype.FromVMLinuz(bytes.NewReader(vmlinuz), int64(len(vmlinuz)))
	require.NoError(t, err)
	assert.Equal(t, ktype.Origin{BuildID: k.BuildID(), Banners: []string{k.Banner()}}, of61.Origin())
	kg, err := linux.Discover(t.Context(), g.Machine(), &linux.Options{Types: of61})
	require.NoError(t, err)
	_, err = kg.Types()
	require.NoError(t, err)
	_, err = linux.Discover(t.Context(), other.Machine(), &linux.Options{Types: of61})
	require.ErrorIs(t, err, linux.ErrWrongTypes)
	assert.ErrorContains(t, err, k.Banner())
	assert.ErrorContains(t, err, ko.Banner())
}

func TestNoKernel(t *testing.T) {
	g := &kerneltest.Guest{RAM: make([]byte, 1<<20), CR3: 0x1000}
	_, err := linux.Discover(t.Context(), g.Machine(), nil)
	require.ErrorIs(t, err, linux.ErrNoKernel)
	// A table that leads to itself.
	for i := range 512 {
		g.RAM[0x1000+8*i] = 0x63
		g.RAM[0x1000+8*i+1] = 0x10
	}
	_, err = linux.Discover(t.Context(), g.Machine(), nil)
	require.Error(t, err)
}

// BenchmarkDiscover is the first attachment to a kernel, and one with its symbols
// in the cache.
func BenchmarkDiscover(b *testing.B) {
	for _, series := range serieses {
		g := load(b, series)
		for _, cached := range []bool{false, true} {
			opts := new(linux.Options)
			name := series
			if cached {
				name += "/cached"
				opts.Cache = filepath.Join(b.TempDir(), "cache")
				_, err := linux.Discover(b.Context(), g.Machine(), opts)
				require.NoError(b, err)
			}
			b.Run(name, func(b *testing.B) {
				var pages uint64
				for b.Loop() {
					m := g.Machine()
					if _, err := linux.Discover(b.Context(), m, opts); err != nil {
						b.Fatal(err)
					}
					pages = m.Stats().Maps
				}
				b.ReportMetric(float64(pages), "pages")
			})
		}
	}
}
