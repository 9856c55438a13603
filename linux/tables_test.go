package linux_test

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/kerneltest"
	"github.com/vmprobes/vmprobes/internal/x86"
	"github.com/vmprobes/vmprobes/linux"
)

// vmlinux is a kernel's file, the oracle of what is read of the same kernel in
// memory.
type vmlinux struct {
	*testing.T
	g *kerneltest.Guest
	f *elf.File
}

func (v vmlinux) addr(name string) uint64 {
	v.Helper()
	s, err := v.g.Symbols.Lookup(name)
	require.NoError(v, err)
	return s.Addr
}

// data returns what the file has between two symbols.
func (v vmlinux) data(start, stop string) (base uint64, b []byte) {
	v.Helper()
	base = v.addr(start)
	return base, v.bytes(base, v.addr(stop)-base)
}

func (v vmlinux) bytes(addr, n uint64) []byte {
	v.Helper()
	for _, s := range v.f.Sections {
		if s.Type == elf.SHT_PROGBITS && addr >= s.Addr && addr+n <= s.Addr+s.Size {
			b := make([]byte, n)
			_, err := s.ReadAt(b, int64(addr-s.Addr))
			require.NoError(v, err)
			return b
		}
	}
	v.Fatalf("%#x: not in the file", addr)
	return nil
}

// relative returns the addresses that a table's entries begin with, in the text.
func (v vmlinux) relative(start, stop string, entry int) map[uint64]bool {
	v.Helper()
	base, b := v.data(start, stop)
	require.Zero(v, len(b)%entry)
	found := make(map[uint64]bool)
	for i := 0; i < len(b); i += entry {
		a := base + uint64(i) + uint64(int64(int32(binary.LittleEndian.Uint32(b[i:]))))
		if a >= v.addr("_stext") && a < v.addr("_etext") {
			found[a] = true
		}
	}
	return found
}

// memory returns where an address is in the guest's.
func (v vmlinux) memory(addr uint64) []byte { return v.g.RAM[addr-0xffffffff80000000:] }

// booted does to a kernel what it does itself when it boots, as far as it matters:
// its state, ftrace's records and the NOPs that they are of. It returns where those
// are, in the text.
func (v vmlinux) booted() []uint64 {
	le := binary.LittleEndian
	le.PutUint32(v.memory(v.addr("system_state")), 3)
	_, b := v.data("__start_mcount_loc", "__stop_mcount_loc")
	// The unwinder's tables are in nobody's way here.
	page := v.addr("__start_orc_unwind_ip")
	records := page + 32
	require.Less(v, uint64(2*len(b)+32), v.addr("__stop_orc_unwind_ip")-page)
	le.PutUint64(v.memory(v.addr("ftrace_pages_start")), page)
	le.PutUint64(v.memory(page), 0)
	le.PutUint64(v.memory(page+8), records)
	le.PutUint32(v.memory(page+16), uint32(len(b)/8))
	var sites []uint64
	for i := 0; i < len(b); i += 8 {
		a := le.Uint64(b[i:])
		le.PutUint64(v.memory(records+2*uint64(i)), a)
		le.PutUint64(v.memory(records+2*uint64(i)+8), 0)
		if a < v.addr("_stext") || a >= v.addr("_etext") {
			continue
		}
		sites = append(sites, a)
		require.Equal(v, byte(0xe8), v.memory(a)[0], "call __fentry__")
		copy(v.memory(a), []byte{0x0f, 0x1f, 0x44, 0, 0})
	}
	return sites
}

// TestKernelFile compares the tables of Debian's kernels with their files, entry by
// entry.
func TestKernelFile(t *testing.T) {
	for _, series := range serieses {
		t.Run(series, func(t *testing.T) {
			b := kerneltest.File(t, series, "vmlinux")
			g, err := kerneltest.Load(b)
			require.NoError(t, err)
			f, err := elf.NewFile(bytes.NewReader(b))
			require.NoError(t, err)
			v := vmlinux{t, g, f}
			boots, err := linux.Discover(t.Context(), g.Machine(), nil)
			require.NoError(t, err)
			require.ErrorContains(t, boots.Probeable(v.addr("do_sys_openat2")), "still booting")

			sites := v.booted()
			k, err := linux.Discover(t.Context(), g.Machine(), nil)
			require.NoError(t, err)
			t.Run("sites", func(t *testing.T) { testSites(vmlinux{t, g, f}, k) })
			t.Run("faults", func(t *testing.T) { testFaults(vmlinux{t, g, f}, k) })
			t.Run("ftrace", func(t *testing.T) { testFtrace(vmlinux{t, g, f}, k, sites) })
			t.Run("returns", func(t *testing.T) { testReturns(vmlinux{t, g, f}, k) })
			t.Run("dead code", func(t *testing.T) { testDeadCode(vmlinux{t, g, f}, k) })
			t.Log(rung(k, "probeable"))
		})
	}
}

// testSites: no jump label and no static call may be probed, nor what is inside.
func testSites(v vmlinux, k *linux.Kernel) {
	for kind, sites := range map[string]map[uint64]bool{
		"jump label":  v.relative("__start___jump_table", "__stop___jump_table", 16),
		"static call": v.relative("__start_static_call_sites", "__stop_static_call_sites", 8),
	} {
		require.Greater(v, len(sites), 4000)
		others := 0
		for a := range sites {
			err := k.Blacklisted(a)
			require.ErrorIs(v, err, linux.ErrNotProbeable)
			require.NotErrorIs(v, err, linux.ErrUnknownPlaces)
			if !assert.Regexp(v, kind+"|noinstr|entry code|idle code|static call", err.Error()) {
				break
			}
			if !assert.Error(v, k.Blacklisted(a+1), "inside") {
				break
			}
			others++
		}
		v.Logf("%d of %s", others, kind)
	}
	require.ErrorContains(v, k.Blacklisted(v.addr("ftrace_call")), "ftrace's own call")
	require.ErrorContains(v, k.Blacklisted(v.addr("ftrace_regs_call")+4), "ftrace's own call")
}

// testFaults: the whole exception table, and nothing else at the starts of functions.
func testFaults(v vmlinux, k *linux.Kernel) {
	faults := v.relative("__start___ex_table", "__stop___ex_table", 12)
	require.Greater(v, len(faults), 400)
	registers := 0
	for a := range faults {
		require.True(v, k.ExpectedFault(a), "%#x", a)
		in, err := x86.Decode(v.bytes(a, x86.MaxLen))
		require.NoError(v, err, "%#x", a)
		if !in.MemoryOperand() {
			registers++
		}
	}
	v.Logf("%d expected faults, %d of them of instructions without a memory operand", len(faults), registers)
	assert.Greater(v, registers, 60)
	n := 0
	for s := range v.g.Symbols.All() {
		if a := s.Addr; a >= v.addr("_stext") && a < v.addr("_etext") {
			require.Equal(v, faults[a], k.ExpectedFault(a), "%#x", a)
			n++
		}
	}
	require.Greater(v, n, 40000)
}

// testFtrace asks for a place at every function that ftrace traces.
func testFtrace(v vmlinux, k *linux.Kernel, sites []uint64) {
	n, err := k.FtraceSites()
	require.NoError(v, err)
	require.Equal(v, len(sites), n)
	jumps := v.relative("__start___jump_table", "__stop___jump_table", 16)
	calls := v.relative("__start_static_call_sites", "__stop_static_call_sites", 8)
	behind, itself, refused, patched := 0, 0, 0, 0
	for _, a := range sites {
		start := a
		if sym, off, ok := v.g.Symbols.Find(a); ok && off == 4 {
			start = sym.Addr // of the ENDBR64
		}
		at, err := k.ProbePoint(start)
		never := jumps[a+5] || calls[a+5] // a place that the kernel rewrites
		if never {
			patched++
		}
		switch {
		case err != nil:
			require.ErrorIs(v, err, linux.ErrNotProbeable)
			require.NotErrorIs(v, err, linux.ErrUnknownPlaces)
			refused++
		case at == a+5:
			require.False(v, never, "%#x", a)
			behind++
		default:
			require.Equal(v, start, at)
			require.NotEqual(v, a, at)
			itself++
		}
		if err == nil && behind%16 == 0 {
			require.NoError(v, k.Probeable(at))
		}
	}
	v.Logf("%d functions that are traced: the probe is after the NOP at %d, at the ENDBR64 at %d, and not possible at %d; after %d is what the kernel rewrites",
		len(sites), behind, itself, refused, patched)
	assert.Less(v, refused+itself, len(sites)/100)
	for _, name := range []string{"hrtimer_active", "panic_smp_self_stop"} { // loops begin behind their NOPs
		a := v.addr(name)
		at, err := k.ProbePoint(a)
		if err == nil {
			require.Equal(v, a, at)
		} else {
			require.ErrorContains(v, err, "leads there, too")
		}
	}
}

// testDeadCode: what is proposed is int3, and is enough.
func testDeadCode(v vmlinux, k *linux.Kernel) {
	total, first := uint64(0), uint64(0)
	seen := make(map[uint64]bool)
	k.DeadCode(func(addr, size uint64) bool {
		if first == 0 {
			first = addr
		}
		require.GreaterOrEqual(v, addr, v.addr("_stext"))
		require.LessOrEqual(v, addr+size, v.addr("_etext"))
		b := v.bytes(addr-64, size+128)
		if !seen[addr] {
			require.Equal(v, bytes.Repeat([]byte{0xcc}, len(b)), b, "%#x", addr)
			total += size
		}
		seen[addr] = true
		return false
	})
	end := v.addr("__entry_text_end")
	assert.Equal(v, end+64, first)
	assert.Greater(v, total, uint64(1<<20))
	for a := range seen {
		sym, _, ok := v.g.Symbols.Find(a)
		require.True(v, ok)
		require.NotContains(v, sym.Name, "xen_hypercall")
		require.NotContains(v, sym.Name, "__x86_")
	}
	v.Logf("%d KiB of dead code", total>>10)
}

// TestBlacklistedIsQuick: what is asked again and again is not read again.
func TestBlacklistedIsQuick(t *testing.T) {
	s := kerneltest.NewSynthetic(kerneltest.Layout{})
	m := s.Machine()
	k, err := linux.Discover(t.Context(), m, nil)
	require.NoError(t, err)
	require.NoError(t, k.Probeable(kerneltest.Fn(1)))
	before := accesses(m)
	for i := range uint64(100) {
		_, err := k.ProbePoint(kerneltest.Fn(i))
		require.NoError(t, err)
		require.False(t, k.ExpectedFault(kerneltest.Fn(i)))
	}
	// The function's code, and what page tables it takes to get there; no lists.
	assert.LessOrEqual(t, accesses(m)-before, uint64(100*12))
	assert.NotEqual(t, before, accesses(m), "they are counted")
	err = errors.Join(k.Probeable(s.Sym["text demo"]))
	require.NoError(t, err)
}

// accesses returns how many pages have been accessed.
func accesses(m *kerneltest.Machine) uint64 {
	st := m.Stats()
	return st.Hits + st.Maps
}
