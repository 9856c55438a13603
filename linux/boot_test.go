package linux_test

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/kerneltest"
	"github.com/vmprobes/vmprobes/linux"
	"github.com/vmprobes/vmprobes/paging"
)

// A newMachine is one that has not run yet, as a PV domain that was created paused.
type newMachine struct {
	*kerneltest.Machine
	started bool
	cr3     uint64 // in use, if not the builder's
}

func (m *newMachine) Started() (bool, error) { return m.started, nil }

func (m *newMachine) CPUs() ([]linux.CPU, error) {
	cpus, err := m.Machine.CPUs()
	if m.cr3 != 0 {
		cpus[0].CR3 = m.cr3
	}
	return cpus, err
}

// section returns a section of the kernel's file, or nothing.
func (v vmlinux) section(name string) (addr uint64, b []byte) {
	s := v.f.Section(name)
	if s == nil {
		return 0, nil
	}
	b, err := s.Data()
	require.NoError(v, err)
	return s.Addr, b
}

// TestBoot: in a kernel that has not run yet a probe may be anywhere but where the kernel
// rewrites its text, by the sections of its file.
func TestBoot(t *testing.T) {
	linux.SettleEvery(0)
	t.Cleanup(func() { linux.SettleEvery(time.Millisecond) })
	kernels := serieses
	if testing.Short() {
		kernels = kernels[len(kernels)-1:] // the race detector takes its time
	}
	for _, series := range kernels {
		t.Run(series, func(t *testing.T) {
			b := kerneltest.File(t, series, "vmlinux")
			g, err := kerneltest.Load(b)
			require.NoError(t, err)
			f, err := elf.NewFile(bytes.NewReader(b))
			require.NoError(t, err)
			v := vmlinux{t, g, f}
			le := binary.LittleEndian
			// The own tables of a PV guest's kernel have pseudo-physical frames in them.
			own := v.memory(v.addr("init_top_pgt"))[:paging.PageSize]
			clear(own)
			// The domain's builder maps what is below the kernel, too.
			entry := func(table uint64, i int) []byte { return g.RAM[table&^(1<<63)&^0xfff:][8*i:][:8] }
			below := le.Uint64(entry(le.Uint64(entry(g.CR3, 511)), 510))
			for i := range 8 {
				require.Zero(t, le.Uint64(entry(below, i)))
				le.PutUint64(entry(below, i), uint64(i)<<21|1<<7|1<<1|1<<0) // of 2 MiB
			}
			m := &newMachine{Machine: g.Machine()}
			_, err = linux.Discover(t.Context(), m, &linux.Options{Symbols: g.Symbols})
			require.NoError(t, err, "symbols of a file")
			k, err := linux.Discover(t.Context(), m, nil)
			require.NoError(t, err)
			assert.Empty(t, rung(k, "own tables"))

			for _, name := range []string{"do_one_initcall", "kernel_init", "rest_init", "do_sys_openat2"} {
				at, err := k.Place(v.addr(name), linux.Placing{})
				require.NoError(t, err, name)
				assert.GreaterOrEqual(t, at, v.addr(name)+5, "%s: behind what ftrace makes a NOP", name)
			}
			require.ErrorIs(t, k.Probeable(v.addr("start_kernel")), linux.ErrNotProbeable, "init code, which is freed")
			text := func(a uint64) bool { return a >= v.addr("_stext") && a < v.addr("_etext") }
			rewritten := map[uint64]string{}
			for name, s := range map[string]struct{ entry, least int }{
				".altinstructions":  {map[string]int{"6.1": 12, "6.12": 14}[series], 4000},
				".retpoline_sites":  {4, 4000},
				".return_sites":     {4, 30000},
				".call_sites":       {4, 100000},
				".parainstructions": {16, 3000},
			} {
				base, table := v.section(name)
				n := 0
				for off := 0; off+s.entry <= len(table); off += s.entry {
					a := base + uint64(off) + uint64(int64(int32(le.Uint32(table[off:]))))
					if name == ".parainstructions" {
						a = le.Uint64(table[off:])
					}
					if text(a) {
						rewritten[a] = name
						n++
					}
				}
				if table != nil {
					assert.Greater(t, n, s.least, name)
				}
			}
			_, table := v.data("__start_kprobe_blacklist", "__stop_kprobe_blacklist")
			for ; len(table) > 0; table = table[8:] {
				if a := le.Uint64(table); text(a) {
					rewritten[a] = "blacklist"
				}
			}
			every := 7 // of 150,000
			if testing.Short() {
				every = 97
			}
			// A breakpoint is put behind an ENDBR64, or there is none.
			base, seals := v.section(".ibt_endbr_seal")
			sealed := 0
			for off := 0; off+4 <= len(seals); off += 4 {
				a := base + uint64(off) + uint64(int64(int32(le.Uint32(seals[off:]))))
				if !text(a) {
					continue
				}
				if sealed++; sealed%every == 0 {
					if at, err := k.Place(a, linux.Placing{}); err == nil {
						require.GreaterOrEqual(t, at, a+4)
					}
				}
			}
			if seals != nil {
				assert.Greater(t, sealed, 5000)
			}
			_, traced := v.data("__start_mcount_loc", "__stop_mcount_loc")
			for ; len(traced) > 0; traced = traced[8:] {
				delete(rewritten, le.Uint64(traced)) // among the calls, but ftrace's
			}
			refused := 0
			for a, name := range rewritten {
				if refused++; refused%every != 0 && name != "blacklist" {
					continue
				}
				err := k.Blacklisted(a)
				require.ErrorIs(t, err, linux.ErrNotProbeable, "%s %#x", name, a)
				require.NotErrorIs(t, err, linux.ErrUnknownPlaces, "%s %#x", name, a)
			}
			t.Log(len(rewritten), "places that are rewritten;", rung(k, "probeable"))

			// It runs, and makes tables of its own; nothing may be probed until it has
			// booted.
			m.started = true
			require.ErrorContains(t, k.Probeable(v.addr("do_sys_openat2")), "still booting")
			root, settled := k.Settled()
			assert.EqualValues(t, g.CR3, root)
			assert.False(t, settled)
			copy(own, g.RAM[g.CR3:][:paging.PageSize])
			root, settled = k.Settled()
			assert.EqualValues(t, g.CR3, root, "it is still on its builder's tables")
			assert.False(t, settled)
			m.cr3 = v.addr("init_top_pgt") - 0xffffffff80000000
			root, settled = k.Settled()
			assert.Equal(t, m.cr3, uint64(root))
			assert.True(t, settled)
			m.cr3 = 0x1000 // of some process
			root, settled = k.Settled()
			assert.Equal(t, v.addr("init_top_pgt")-0xffffffff80000000, uint64(root))
			assert.True(t, settled)
			sites := v.booted()
			require.NoError(t, k.Probeable(v.addr("do_sys_openat2")+5))
			testSites(v, k)
			testFtrace(v, k, sites)
		})
	}
}
