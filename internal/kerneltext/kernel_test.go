package kerneltext_test

import (
	"bytes"
	"encoding/binary"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/kerneltest"
	"github.com/vmprobes/vmprobes/internal/kerneltext"
	"github.com/vmprobes/vmprobes/linux"
)

var serieses = []string{"6.1", "6.12"}

const mapBase = 0xffffffff80000000 // where kerneltest has physical memory 0

// booted is a guest whose kernel has not begun to run, and its file.
func booted(t *testing.T, series string) (*kerneltest.Guest, *kerneltext.File) {
	t.Helper()
	vmlinux := kerneltest.File(t, series, "vmlinux")
	g, err := kerneltest.Load(vmlinux)
	require.NoError(t, err)
	f, err := kerneltext.Read(bytes.NewReader(vmlinux))
	require.NoError(t, err)
	return g, f
}

func compare(t *testing.T, g *kerneltest.Guest, f *kerneltext.File) *kerneltext.Report {
	t.Helper()
	k, err := linux.Discover(t.Context(), g.Machine(), nil)
	require.NoError(t, err)
	r, err := kerneltext.Compare(t.Context(), k, f)
	require.NoError(t, err)
	return r
}

// TestOwn: int3s that the guest's kernel has put there are told from others: its kprobes,
// and what it is rewriting.
func TestOwn(t *testing.T) {
	for _, series := range serieses {
		if testing.Short() && series != serieses[0] {
			continue
		}
		t.Run(series, func(t *testing.T) {
			g, f := booted(t, series)
			none(t, compare(t, g, f))
			at := func(name string) uint64 {
				s, err := g.Symbols.Lookup(name)
				require.NoError(t, err, name)
				return s.Addr
			}
			ram := func(addr uint64) []byte { return g.RAM[addr-mapBase:] }
			put := func(addr, v uint64) { binary.LittleEndian.PutUint64(ram(addr), v) }
			entry := map[string]uint64{"6.1": 5, "6.12": 9}[series] // bytes: a call, behind an ENDBR64
			probe, ours, poked := at("vfs_read")+entry, at("vfs_write")+entry, at("vfs_open")+entry
			ours0 := ram(ours)[0]
			for _, a := range []uint64{probe, ours, poked} {
				require.NotEqual(t, byte(0xcc), ram(a)[0])
				ram(a)[0] = 0xcc
			}
			r := compare(t, g, f)
			assert.Len(t, r.Breaks, 3)
			assert.Empty(t, r.Own)

			// A struct kprobe in one of the lists, in memory that isn't used.
			kprobe := at("_end") - 4096
			put(at("kprobe_table")+8*17, kprobe)
			put(kprobe+40, probe)
			r = compare(t, g, f)
			assert.Len(t, r.Breaks, 2)
			assert.Equal(t, []uint64{probe}, r.Own)

			// What text_poke_bp_batch is at: who holds text_mutex isn't 0.
			put(at("text_mutex"), 0xffff888000001000)
			vec := kprobe + 256
			put(at("bp_desc"), vec)
			binary.LittleEndian.PutUint32(ram(at("bp_desc")+8), 1)  // nr_entries
			binary.LittleEndian.PutUint32(ram(at("bp_desc")+12), 1) // refs
			binary.LittleEndian.PutUint32(ram(vec), uint32(poked-at("_stext")))
			r = compare(t, g, f)
			require.NoError(t, r.Rewriting)
			assert.ElementsMatch(t, []uint64{probe, poked}, r.Own)
			require.Len(t, r.Breaks, 1)
			assert.Equal(t, ours, r.Breaks[0].Addr)
			assert.Equal(t, ours0, r.Breaks[0].Insn[0])
			assert.Contains(t, r.Breaks[0].Where, "vfs_write")
			assert.Empty(t, r.Unclear)

			// Lists without an end, and more than there can be.
			put(kprobe, kprobe)
			k, err := linux.Discover(t.Context(), g.Machine(), nil)
			require.NoError(t, err)
			_, err = kerneltext.Compare(t.Context(), k, f)
			require.ErrorIs(t, err, linux.ErrBadKernel)
			put(kprobe, 0)
			binary.LittleEndian.PutUint32(ram(at("bp_desc")+8), 1<<20)
			r = compare(t, g, f)
			require.ErrorIs(t, r.Rewriting, linux.ErrBadKernel)
		})
	}
}

// TestOtherFile: only the file of the very kernel is compared with.
func TestOtherFile(t *testing.T) {
	g, f := booted(t, "6.1")
	_, other := booted(t, "6.12")
	assert.NotEqual(t, f.BuildID(), other.BuildID())
	k, err := linux.Discover(t.Context(), g.Machine(), nil)
	require.NoError(t, err)
	_, err = kerneltext.Compare(t.Context(), k, other)
	require.ErrorIs(t, err, kerneltext.ErrOtherKernel)
	assert.ErrorContains(t, err, f.BuildID())
	_, err = kerneltext.Compare(t.Context(), nil, f)
	require.ErrorIs(t, err, linux.ErrNoKernel)

	// Of the same build id, but with another kernel's code.
	text, err := g.Symbols.Lookup("_stext")
	require.NoError(t, err)
	_, b := other.Text()
	copy(g.RAM[text.Addr-mapBase+1<<20:][:8<<20], b[2<<20:])
	if k, err = linux.Discover(t.Context(), g.Machine(), nil); err == nil {
		_, err = kerneltext.Compare(t.Context(), k, f)
		require.ErrorIs(t, err, kerneltext.ErrOtherKernel)
	}
}

// TestFiles: whatever else a file is, it is refused.
func TestFiles(t *testing.T) {
	dir := t.TempDir()
	for name, b := range map[string][]byte{"empty": nil, "text": []byte("ffffffff81000000 T _text\n"), "elf": []byte("\x7fELF"), "gzip": []byte("\x1f\x8b")} {
		path := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(path, b, 0o600))
		_, err := kerneltext.ReadFile(path)
		assert.Error(t, err, name)
	}
	_, err := kerneltext.ReadFile(dir)
	require.Error(t, err)
	_, err = kerneltext.ReadFile(filepath.Join(dir, "none"))
	require.ErrorIs(t, err, os.ErrNotExist)
	program, err := os.Executable()
	require.NoError(t, err)
	_, err = kerneltext.ReadFile(program)
	require.ErrorIs(t, err, kerneltext.ErrNotKernel)
}
