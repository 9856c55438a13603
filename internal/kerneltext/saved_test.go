package kerneltext_test

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/kerneltext"
	"github.com/vmprobes/vmprobes/internal/target"
	"github.com/vmprobes/vmprobes/internal/x86"
	"github.com/vmprobes/vmprobes/linux"
)

// truthEnv names a folder with a guest's memory, in the file image; its kernel's files
// are in the folder above it. "make test-oracles" makes one.
const truthEnv = "VMPROBES_TEST_GUEST"

// TestSaved: in the whole text of a kernel that has booted and runs, nothing is taken for a
// breakpoint, whichever file of the kernel it is compared with. Breakpoints that are put
// there are found, and what they are on is right.
func TestSaved(t *testing.T) {
	dir := os.Getenv(truthEnv)
	if dir == "" {
		if os.Getenv("VMPROBES_REQUIRE_ORACLES") == "1" {
			t.Fatal(truthEnv + " is not set")
		}
		t.Skip(truthEnv + " is not set: it names a folder with a guest's memory and what the guest said of itself")
	}
	g, err := target.Open(t.Context(), "file:"+filepath.Join(dir, "image"))
	require.NoError(t, err)
	defer g.Close()
	k, err := linux.Discover(t.Context(), g, nil)
	require.NoError(t, err)
	for _, name := range []string{"vmlinuz", "vmlinux", "vmlinux.debug"} {
		f, err := kerneltext.ReadFile(filepath.Join(dir, "..", name))
		if os.IsNotExist(err) && name == "vmlinux.debug" {
			continue // the newer kernel's is too large to fetch
		}
		require.NoError(t, err)
		r, err := kerneltext.Compare(t.Context(), k, f)
		require.NoError(t, err)
		none(t, r)
		t.Logf("%s: %d bytes of text compared, none taken for a breakpoint", name, r.Text)
		if name == "vmlinuz" {
			plant(t, k, f)
		}
	}
}

func none(t *testing.T, r *kerneltext.Report) {
	t.Helper()
	assert.Empty(t, r.Breaks)
	assert.Empty(t, r.Unclear)
	assert.Empty(t, r.Copies)
	assert.Zero(t, r.Unread)
	assert.Zero(t, r.More)
	assert.NoError(t, r.Rewriting)
}

// plant puts int3s on instructions all over the text, as they are in the guest.
func plant(t *testing.T, k *linux.Kernel, f *kerneltext.File) {
	linked, file := f.Text()
	here, err := k.Symbols().Lookup("_stext")
	require.NoError(t, err)
	mem := make([]byte, len(file))
	for off := 0; off < len(mem); off += 4096 {
		require.NoError(t, k.Read(here.Addr+uint64(off), mem[off:min(off+4096, len(mem))]))
	}
	slide := here.Addr - linked
	r := rand.New(rand.NewPCG(1, 2))
	type place struct {
		orig    byte
		changes bool
		length  int
	}
	var all [3]int // found, unclear, missed, where the kernel changes nothing
	var changed [3]int
	for range 6 {
		planted := make(map[uint64]place)
		now := bytes.Clone(mem)
		next := uint64(0)
		f.Boundaries(func(addr uint64, insn []byte, changes bool) {
			off := addr - linked
			if addr < next || mem[off] == 0xcc || insn[0] == 0xcc {
				return
			}
			if in, err := x86.Decode(mem[off:]); err != nil || !changes && in.Len != len(insn) {
				return
			}
			next = addr + 64 + uint64(r.IntN(8192)) // a list has room for 4096
			planted[addr+slide] = place{mem[off], changes, len(insn)}
			now[off] = 0xcc
		})
		rep := f.CompareText(slide, now, linux.Int3s{})
		require.Zero(t, rep.More)
		seen := make(map[uint64]int)
		for _, b := range rep.Breaks {
			p, ok := planted[b.Addr]
			require.True(t, ok, "%#x (%s) is no breakpoint", b.Addr, b.Where)
			require.Equal(t, mem[b.Addr-here.Addr], p.orig)
			off := b.Addr - here.Addr
			require.Equal(t, mem[off:off+uint64(len(b.Insn))], b.Insn, "%#x (%s)", b.Addr, b.Where)
			seen[b.Addr] = 1
		}
		for _, u := range rep.Unclear {
			_, ok := planted[u.Addr]
			for back := uint64(1); !ok && back < 32; back++ { // it may hide why others are there
				_, ok = planted[u.Addr-back]
			}
			require.True(t, ok, "%#x (%s): %s", u.Addr, u.Where, u.Why)
			seen[u.Addr] = 2
		}
		for addr, p := range planted {
			n := map[int]int{1: 0, 2: 1, 0: 2}[seen[addr]]
			if p.changes {
				if changed[n]++; n == 2 {
					t.Logf("missed: %#x, %#x on %d bytes", addr, p.orig, p.length)
				}
			} else if all[n]++; n > 0 {
				t.Logf("not found: %#x, %d bytes", addr, p.length)
			}
		}
	}
	t.Logf("of int3s on instructions that the kernel never changes %d were found, %d said to be unclear and %d missed; on others %d, %d and %d", all[0], all[1], all[2], changed[0], changed[1], changed[2])
	assert.Zero(t, all[2]+changed[2], "missed")
	assert.Less(t, 100*all[1], all[0], "unclear")
	assert.Greater(t, all[0], 1000)
}
