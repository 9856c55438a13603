package sysmap

import (
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestWith(t *testing.T) {
	t.Parallel()
	base := mustParse(t, sample)
	before := slices.Collect(base.All())
	const ext4, xfs = 0xffffffffc0301000, 0xffffffffc0401000
	syms := []Symbol{
		{xfs + 0x40, 't', "type_show", "xfs"},
		{ext4, 't', "ext4_new", "ext4"},
		{ext4 + 0x100, 't', "type_show", "ext4"},
		{ext4 + 0x200, 't', "only_here", "ext4"},
		{xfs, 't', "only_here", "xfs"},
		{xfs + 0x80, 't', "_end", "xfs"},
		{xfs + 0x100, 0, "odd_type", "xfs"},
		// Left out:
		{ext4, 't', "no_module", ""},
		{ext4, 't', "", "ext4"},
		{ext4, 't', "blank name", "ext4"},
		{ext4, 't', "name", "e\x1b[31m"},
		{ext4, 't', strings.Repeat("x", maxName+1), "ext4"},
	}
	slid := base.Slide(0x1000000)
	m := slid.With(syms)
	assert.Equal(t, slid.Len()+7, m.Len())
	assert.Equal(t, before, slices.Collect(base.All()), "the original is untouched")
	assert.Same(t, slid.t, m.t, "the kernel's table is shared")
	assert.True(t, slices.IsSortedFunc(slices.Collect(m.All()), byAddr))

	for name, want := range map[string]uint64{
		"ext4_new": ext4, "ext4:ext4_new": ext4, "ext4_new [ext4]": ext4,
		"ext4:type_show": ext4 + 0x100, "type_show [xfs]": xfs + 0x40,
		"type_show@1": 0xffffffff82000100, "type_show@3": ext4 + 0x100, "type_show@4": xfs + 0x40,
		"ext4:type_show@1": ext4 + 0x100, "only_here [xfs]@1": xfs,
		"vfs_open": 0xffffffff82000900, "odd_type": xfs + 0x100,
	} {
		s, err := m.Lookup(name)
		require.NoError(t, err, name)
		assert.Equal(t, want, s.Addr, name)
	}
	for _, name := range []string{"type_show", "only_here"} {
		_, err := m.Lookup(name)
		require.ErrorIs(t, err, ErrAmbiguous, name)
	}
	for _, name := range []string{"ext4_init", "xfs:ext4_new", "ext4:", ":ext4_new", "ext4_new []", "ext4_new [ext4", " [ext4]",
		"ext4:type_show@2", "ext4:vfs_open", "name", "no_module"} {
		_, err := m.Lookup(name)
		require.ErrorIs(t, err, ErrNotFound, name)
	}
	assert.Len(t, m.LookupAll("type_show"), 4)
	assert.Contains(t, m.Suggest("ext4_nev"), "ext4_new")

	for _, tt := range []struct {
		addr uint64
		name string
		end  uint64
	}{
		{ext4 + 0x10, "ext4_new", ext4 + 0x100},
		{ext4 + 0x1ff, "type_show", ext4 + 0x200},
		{ext4 + 0xfff, "only_here", ext4 + 0x1000}, // with its page
		{ext4 + 0x1000, "", 0},
		{xfs + 0x41, "type_show", xfs + 0x80},
		{xfs + 0x81, "", 0},
		{0xffffffff82000901, "vfs_open", 0xffffffff82000a00},
		{0xffffffff82000b01, "", 0},
	} {
		s, off, ok := m.Find(tt.addr)
		require.Equal(t, tt.name != "", ok, "%#x: %v", tt.addr, s)
		end, endOK := m.FuncEnd(tt.addr)
		require.Equal(t, ok, endOK)
		if ok {
			assert.Equal(t, tt.name, s.Name)
			assert.Equal(t, tt.addr, s.Addr+off)
			assert.Equal(t, tt.end, end, "%#x", tt.addr)
		}
	}
	next, ok := m.Next(0xffffffff83004000) // _end
	require.True(t, ok)
	assert.Equal(t, uint64(ext4), next)

	// The next load, of one map or the other.
	for _, m := range []*Map{m, slid} {
		m = m.With(syms[1:2])
		assert.Equal(t, slid.Len()+1, m.Len())
		_, err := m.Lookup("only_here")
		require.ErrorIs(t, err, ErrNotFound)
	}
	assert.Equal(t, slid.Len(), m.With(nil).Len())
	assert.Equal(t, slid.Len(), m.Slide(0x1000).Len(), "a slide leaves no modules")
	// A map from kallsyms loses those it had.
	_, err := base.With(syms).Lookup("ext4_init")
	require.ErrorIs(t, err, ErrNotFound)

	var none *Map
	m = none.With(syms)
	assert.Equal(t, 7, m.Len())
	s, _, ok := m.Find(ext4)
	require.True(t, ok)
	assert.Equal(t, "ext4_new", s.Name)
	// 32 bits.
	m = mustParse(t, "c1000000 T _text\nc1000100 T _etext\n").Slide(0x1000).With([]Symbol{{0xf8000000, 't', "f", "x"}})
	s, _, ok = m.Find(0xf8000010)
	require.True(t, ok)
	assert.Equal(t, "f", s.Name)
}

func TestPrintable(t *testing.T) {
	t.Parallel()
	for n := range 20 {
		for at := range n {
			for c := range 256 {
				for _, fill := range []byte{'!', '~', 'x'} {
					b := make([]byte, n)
					for i := range b {
						b[i] = fill
					}
					b[at] = byte(c)
					require.Equal(t, c > ' ' && c < 0x7f, printable(b), "%#x at %d of %d", c, at, n)
				}
			}
		}
	}
	assert.True(t, printable(nil))
}

// What the compiler made of a module's function.
func TestModuleSuffixes(t *testing.T) {
	t.Parallel()
	const ext4, xfs = 0xffffffffc0301000, 0xffffffffc0401000
	m := mustParse(t, sample).With([]Symbol{
		{xfs, 't', "split.isra.0", "xfs"}, {ext4, 't', "split.constprop.0", "ext4"}, {ext4 + 0x100, 't', "whole", "ext4"},
	})
	for name, want := range map[string]uint64{"xfs:split": xfs, "split [ext4]": ext4, "ext4:whole": ext4 + 0x100} {
		s, err := m.LookupSuffixed(name)
		require.NoError(t, err, name)
		assert.Equal(t, want, s.Addr, name)
	}
	_, err := m.LookupSuffixed("split")
	require.ErrorIs(t, err, ErrAmbiguous)
	_, err = m.LookupSuffixed("btrfs:split")
	require.ErrorIs(t, err, ErrNotFound)
}
