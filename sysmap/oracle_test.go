package sysmap

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// Tests on real kernels, which are not in the repository:
//
//	VMPROBES_TEST_VMLINUZ   vmlinuz or vmlinux files, a list as in PATH
//	VMPROBES_TEST_KALLSYMS  /proc/kallsyms of the first of them, saved as root
//	VMPROBES_TEST_SYSMAP    System.map of the first of them
//
// "make test-oracles" gets all of them and runs these tests; with
// VMPROBES_REQUIRE_ORACLES=1, as there, a missing file is a failure.

func testFiles(t *testing.T, env string) []string {
	t.Helper()
	files := filepath.SplitList(os.Getenv(env))
	if len(files) == 0 {
		if os.Getenv("VMPROBES_REQUIRE_ORACLES") == "1" {
			t.Fatalf("%s is not set", env)
		}
		t.Skipf("%s is not set: no real kernel to test with", env)
	}
	return files
}

// Whatever kernel it is, this must be so.
func TestRealKernels(t *testing.T) {
	t.Parallel()
	for _, file := range testFiles(t, "VMPROBES_TEST_VMLINUZ") {
		m, err := ParseFile(file)
		require.NoError(t, err)
		t.Logf("%s: %d symbols, %s", file, m.Len(), m.Release())
		assert.Greater(t, m.Len(), 10000)
		// The banner is the string at linux_banner: the finder has looked there.
		assert.True(t, strings.HasPrefix(m.Banner(), bannerStart+m.Release()+" ("), m.Banner())
		var text, end uint64
		for _, name := range []string{"_text", "_stext", "_etext", "_end", "linux_banner", "entry_SYSCALL_64",
			"do_sys_open", "vfs_open", "init_task", "__x64_sys_openat"} {
			s, err := m.Lookup(name)
			require.NoError(t, err, name)
			switch name {
			case "_text":
				text = s.Addr
			case "_end":
				end = s.Addr
			}
		}
		prev, inside, places := uint64(0), 0, 0
		for s := range m.All() {
			require.GreaterOrEqual(t, s.Addr, prev)
			prev = s.Addr
			if s.Type == 'A' || s.Type == 'a' {
				continue
			}
			places++
			// .init.scratch is deliberately behind the end.
			scratch := s.Name == "sme_workarea" || strings.HasPrefix(s.Name, "__init_scratch_")
			if s.Addr >= text && (s.Addr <= end || scratch) {
				inside++
			}
			if s.Type == 'T' || s.Type == 't' {
				if f, off, ok := m.Find(s.Addr); ok && !strings.HasPrefix(s.Name, "__pfx_") {
					require.Zero(t, off, "%v gives %v", s, f)
				}
			}
		}
		assert.Equal(t, places, inside, "all but the absolute ones are in the kernel")
		assert.LessOrEqual(t, len(m.Suggest("sys_open")), maxSuggest)
		assert.Contains(t, m.Suggest("sys_open"), "__x64_sys_open")
	}
}

// The way through memory finds what the way through the file finds, with few pages:
// with the protections of a booted kernel, and where they tell nothing.
func TestFromMemoryRealKernels(t *testing.T) {
	t.Parallel()
	for _, file := range testFiles(t, "VMPROBES_TEST_VMLINUZ") {
		img, err := vmlinux(file)
		require.NoError(t, err)
		want, err := FromELF(bytes.NewReader(img))
		require.NoError(t, err)
		syms := slices.Collect(want.All())
		mem, ranges := vmlinuxMemory(img)
		for _, flat := range []bool{false, true} {
			for i := range ranges {
				ranges[i].Writable = ranges[i].Writable || flat
				ranges[i].Exec = ranges[i].Exec || flat
			}
			mem.reads = 0
			m, tables, err := FromMemory(context.Background(), mem, ranges)
			require.NoError(t, err, file)
			equalSymbols(t, syms, m)
			assert.Equal(t, want.Banner(), m.Banner())
			assert.LessOrEqual(t, tables.Pages, 1500)
			t.Logf("%s, flat %v: %d pages of %d, %d reads; %v", m.Release(), flat, tables.Pages, len(mem.pages), mem.reads, tables)
			data, err := m.Slide(0x1e000000).MarshalBinary()
			require.NoError(t, err)
			cached, err := UnmarshalMap(data)
			require.NoError(t, err)
			equalSymbols(t, slices.Collect(m.Slide(0x1e000000).All()), cached)
		}
	}
}

// Every address, type and name, against what the running kernel says itself.
func TestKallsymsOracle(t *testing.T) {
	t.Parallel()
	truth, err := ParseFile(testFiles(t, "VMPROBES_TEST_KALLSYMS")[0])
	require.NoError(t, err)
	m, err := ParseFile(testFiles(t, "VMPROBES_TEST_VMLINUZ")[0])
	require.NoError(t, err)
	compare(t, truth, m, true)
}

// The same against the map of the build, whose types of per-CPU symbols differ.
func TestSystemMapOracle(t *testing.T) {
	t.Parallel()
	truth, err := ParseFile(testFiles(t, "VMPROBES_TEST_SYSMAP")[0])
	require.NoError(t, err)
	m, err := ParseFile(testFiles(t, "VMPROBES_TEST_VMLINUZ")[0])
	require.NoError(t, err)
	compare(t, truth, m, false)
}

// compare wants each symbol of m in truth, and no others of the kernel there if all.
func compare(t *testing.T, truth, m *Map, all bool) {
	t.Helper()
	there, err := truth.Lookup("_text")
	require.NoError(t, err)
	here, err := m.Lookup("_text")
	require.NoError(t, err)
	m = m.Slide(there.Addr - here.Addr)
	want := map[Symbol]int{}
	n := 0
	for s := range truth.All() {
		if s.Module == "" {
			if !all {
				s.Type = 0
			}
			want[s]++
			n++
		}
	}
	wrong := 0
	for s := range m.All() {
		if !all {
			s.Type = 0
		}
		if want[s]--; want[s] < 0 {
			if wrong++; wrong < 10 {
				t.Errorf("not in the truth: %v", s)
			}
		}
	}
	t.Logf("%d symbols, slide %#x, %d wrong", m.Len(), m.core().slide, wrong)
	assert.Zero(t, wrong)
	if all {
		assert.Equal(t, n, m.Len())
	}
}
