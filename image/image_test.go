package image

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/paging"
)

func open(t testing.TB, b []byte, opts *Options) *Image {
	t.Helper()
	m, err := New(bytes.NewReader(b), int64(len(b)), opts)
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, m.Close()) })
	return m
}

// get returns a copy of a page.
func get(t testing.TB, m *Image, f uint64) []byte {
	t.Helper()
	b, release, err := m.Page(paging.Frame(f), false)
	require.NoError(t, err, "frame %#x", f)
	defer release()
	require.Len(t, b, paging.PageSize)
	return bytes.Clone(b)
}

func requireAbsent(t testing.TB, m *Image, frames ...uint64) {
	t.Helper()
	for _, f := range frames {
		_, _, err := m.Page(paging.Frame(f), false)
		require.ErrorIs(t, err, ErrAbsent, "frame %#x", f)
		n, err := m.ReadPhys(min(f, 1<<52-1)<<12, make([]byte, 1))
		require.ErrorIs(t, err, ErrAbsent, "frame %#x", f)
		require.Zero(t, n)
	}
}

func ranges(m *Image) []Range { return slices.Collect(m.Frames()) }

func TestRaw(t *testing.T) {
	b := append(pages(0, 5), 1, 2, 3)
	m := open(t, b, nil)
	assert.Equal(t, "raw", m.Format())
	assert.Equal(t, Unknown, m.Kind())
	assert.Empty(t, m.CPUs())
	assert.EqualValues(t, len(b), m.Size())
	assert.EqualValues(t, 6, m.PhysPages())
	assert.Equal(t, []Range{{0, 6}}, ranges(m))
	for i := range uint64(5) {
		require.Equal(t, page(i), get(t, m, i))
	}
	require.Equal(t, append([]byte{1, 2, 3}, make([]byte, 4093)...), get(t, m, 5))
	requireAbsent(t, m, 6, 1<<40-1, 1<<40, 1<<52, 1<<63)

	pfn, ok := m.MachineToPhys(3)
	assert.True(t, ok)
	assert.EqualValues(t, 3, pfn)
	_, ok = m.PhysToMachine(6)
	assert.False(t, ok)
	_, ok = m.MachineToPhys(1 << 60)
	assert.False(t, ok)
}

func TestRawHole(t *testing.T) {
	b := pages(0, 8)
	hole := Hole{Limit: 6 << 12, Start: 5 << 12}
	m := open(t, b, &Options{RawHole: hole})
	assert.Equal(t, []Range{{0, 5}, {1 << 20, 3}}, ranges(m))
	require.Equal(t, page(4), get(t, m, 4))
	require.Equal(t, page(5), get(t, m, 1<<20))
	require.Equal(t, page(7), get(t, m, 1<<20+2))
	requireAbsent(t, m, 5, 1<<20-1, 1<<20+3)

	m = open(t, b[:5<<12], &Options{RawHole: hole})
	assert.Equal(t, []Range{{0, 5}}, ranges(m), "less than the limit")

	for _, h := range []Hole{{0, 4096}, {8192, 4097}, {8192, 12288}, {1 << 33, 1<<32 + 4096}} {
		_, err := New(bytes.NewReader(b), int64(len(b)), &Options{RawHole: h})
		require.Error(t, err, "%+v", h)
	}
}

func TestForcedRaw(t *testing.T) {
	b := limeBytes(piece{0x1000, page(1)})
	require.Equal(t, "LiME", open(t, b, nil).Format())
	m := open(t, b, &Options{Raw: true})
	assert.Equal(t, "raw", m.Format())
	assert.Equal(t, b[:4096], get(t, m, 0))
}

func TestLiME(t *testing.T) {
	// As /proc/iomem has it: RAM ends within a page.
	low := pages(1, 3)[:2*4096+0xc00]
	m := open(t, limeBytes(piece{0x1000, low}, piece{0x100000, pages(0x100, 4)}, piece{0x104000, pages(0x104, 1)}), nil)
	assert.Equal(t, "LiME", m.Format())
	assert.Equal(t, Unknown, m.Kind())
	assert.Equal(t, []Range{{1, 3}, {0x100, 5}}, ranges(m))
	assert.EqualValues(t, len(low)+5*4096, m.Size())
	require.Equal(t, page(2), get(t, m, 2))
	require.Equal(t, append(page(3)[:0xc00:0xc00], make([]byte, 0x400)...), get(t, m, 3))
	require.Equal(t, page(0x104), get(t, m, 0x104))
	requireAbsent(t, m, 0, 4, 0x105)

	// Across what follows in the guest, and in the file doesn't.
	b := make([]byte, 8)
	n, err := m.ReadPhys(0x103ffc, b)
	require.NoError(t, err)
	require.Equal(t, 8, n)
	require.Equal(t, slices.Concat(page(0x103)[4092:], page(0x104)[:4]), b)
	n, err = m.ReadPhys(0x1000+uint64(len(low))-3, b)
	require.ErrorIs(t, err, ErrAbsent)
	require.Equal(t, 3, n)
}

func TestLiMEOverlap(t *testing.T) {
	m := open(t, limeBytes(piece{0x2000, pages(2, 2)}, piece{0x1000, pages(0x11, 2)}, piece{0x1800, pages(0x21, 1)}), nil)
	assert.Equal(t, []Range{{1, 3}}, ranges(m))
	require.Equal(t, page(0x11), get(t, m, 1))
	require.Equal(t, page(0x12), get(t, m, 2), "the lower one has it")
	require.Equal(t, page(3), get(t, m, 3))
}

func TestCore(t *testing.T) {
	state := []qemuState{
		{rip: 0xffffffff81000123, rsp: 0xffffc90000001000, rflags: 0x246, cs: 0x10, gs: 0xffff88803fc00000, kernelGS: 0x7f0000001000, idt: 0xfffffe0000000000, cr0: 0x80050033, cr3: 0x2a10003, cr4: 0x3506f0},
		{rip: 0xfff0, cs: 0xf000, rflags: 2, cr0: 0x60000010},
	}
	loads := []load{{paddr: 0, data: pages(0, 3)}, {paddr: 0x100000, data: pages(0x100, 2), memsz: 4 << 12}, {paddr: 0x200000, memsz: 0x1800}}
	info := "OSRELEASE=6.1.0\nPAGESIZE=4096\n"
	for _, tt := range []struct {
		name string
		core core
	}{
		{"64", core{machine: 62, loads: loads}},
		{"64 extended numbering", core{machine: 62, loads: loads, xnum: true}},
		{"32", core{machine: 3, loads: loads, class32: true}},
		{"32 extended numbering", core{machine: 3, loads: loads, class32: true, xnum: true}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tt.core.notes = []note{
				{"CORE", 1, prstatus64(1, 2, 3, 4)}, {"CORE", 1, prstatus64(5, 6, 7, 8)},
				{"QEMU", 0, state[0].bytes()}, {"QEMU", 0, state[1].bytes()},
				{"VMCOREINFO", 0, []byte(info + "\x00")},
			}
			b := tt.core.bytes()
			readelf(t, b, "-hln")
			m := open(t, b, nil)
			assert.Equal(t, "QEMU core", m.Format())
			assert.Equal(t, HVM, m.Kind())
			assert.Equal(t, info, string(m.VMCoreInfo()))
			assert.EqualValues(t, 5*4096, m.Size())
			assert.EqualValues(t, 0x202, m.PhysPages())
			assert.Equal(t, []Range{{0, 3}, {0x100, 2}}, ranges(m))
			for _, f := range []uint64{0, 1, 2, 0x100, 0x101} {
				require.Equal(t, page(f), get(t, m, f))
			}
			for _, f := range []uint64{0x102, 0x103, 0x200, 0x201} {
				require.Equal(t, make([]byte, 4096), get(t, m, f), "left out, so zero")
			}
			requireAbsent(t, m, 3, 0xff, 0x104, 0x1ff, 0x202)
			got := make([]byte, 3*4096)
			n, err := m.ReadPhys(0x101000, got)
			require.NoError(t, err)
			require.Equal(t, len(got), n)
			require.Equal(t, append(page(0x101), make([]byte, 8192)...), got)

			cpus := m.CPUs()
			require.Len(t, cpus, 2)
			want := CPU{
				ID: 0, Has: CR0 | CR2 | CR3 | CR4 | EFER | RIP | RSP | RFLAGS | CS | GSBase | KernelGSBase | IDTBase,
				CR0: 0x80050033, CR2: 0x1234, CR3: 0x2a10003, CR4: 0x3506f0, EFER: 0xd00, Bits: 64,
				RIP: 0xffffffff81000123, RSP: 0xffffc90000001000, RFLAGS: 0x246, CS: 0x10,
				GSBase: 0xffff88803fc00000, KernelGSBase: 0x7f0000001000, IDTBase: 0xfffffe0000000000,
			}
			if tt.core.machine == 3 {
				want.EFER, want.Bits = 0, 32
			}
			assert.Equal(t, want, cpus[0])
			assert.Equal(t, 1, cpus[1].ID)
			assert.Zero(t, cpus[1].Bits, "it has no paging yet")
			assert.Zero(t, cpus[1].Has&EFER)
		})
	}
}

func TestCoreCPUs(t *testing.T) {
	one := []load{{data: page(0)}}
	t.Run("kdump", func(t *testing.T) {
		b := core{machine: 62, loads: one, notes: []note{{"CORE", 1, prstatus64(0xffffffff81000123, 2, 0x46, 0x10)}, {"CORE", 3, []byte("x")}, {"CORE", 1, []byte("short")}}}.bytes()
		m := open(t, b, nil)
		assert.Equal(t, "ELF core", m.Format())
		assert.Equal(t, Unknown, m.Kind())
		assert.Equal(t, []CPU{{Has: RIP | RSP | RFLAGS | CS, RIP: 0xffffffff81000123, RSP: 2, RFLAGS: 0x46, CS: 0x10}}, m.CPUs())
		assert.Nil(t, m.VMCoreInfo())
	})
	t.Run("32-bit kdump", func(t *testing.T) {
		b := core{machine: 3, class32: true, loads: one, notes: []note{{"CORE", 1, prstatus32(0xc1000123, 2, 0x46, 0x60)}}}.bytes()
		assert.Equal(t, []CPU{{Has: RIP | RSP | RFLAGS | CS, RIP: 0xc1000123, RSP: 2, RFLAGS: 0x46, CS: 0x60}}, open(t, b, nil).CPUs())
	})
	t.Run("old QEMU", func(t *testing.T) {
		b := core{machine: 62, loads: one, notes: []note{{"QEMU", 0, qemuState{cr0: 1 << 31, cr4: 0x20, old: true}.bytes()}}}.bytes()
		c := open(t, b, nil).CPUs()
		require.Len(t, c, 1)
		assert.Zero(t, c[0].Has&KernelGSBase)
		assert.Equal(t, 64, c[0].Bits)
	})
	t.Run("damaged", func(t *testing.T) {
		bad := qemuState{}.bytes()
		bad[0] = 2 // version
		b := core{machine: 62, loads: one, notes: []note{{"QEMU", 0, bad}, {"QEMU", 0, bad[:100]}}}.bytes()
		assert.Empty(t, open(t, b, nil).CPUs())
	})
}

// QEMU's dump-guest-memory -p has a segment for each virtual mapping, and these
// share the bytes of their memory; the vmcore of kdump has the kernel's text twice.
func TestCoreAliases(t *testing.T) {
	m := open(t, core{machine: 62, loads: []load{
		{paddr: 0x10000, data: pages(0x10, 4)},
		{paddr: 0x10000, data: pages(0x10, 4), at: 1},
		{paddr: 0x10000, data: pages(0x10, 2), at: 1},
		{paddr: 0x13000, data: pages(0x13, 2)},
	}}.bytes(), nil)
	assert.Equal(t, []Range{{0x10, 5}}, ranges(m))
	assert.EqualValues(t, 5*4096, m.Size())
	for f := uint64(0x10); f < 0x15; f++ {
		require.Equal(t, page(f), get(t, m, f))
	}
	_, err := New(bytes.NewReader(core{machine: 62, loads: []load{
		{paddr: 0, data: pages(0, 8)}, {paddr: 1 << 20, data: pages(0, 8), at: 1}, {paddr: 2 << 20, data: pages(0, 8), at: 1},
	}}.bytes()), 9<<12, nil)
	require.ErrorIs(t, err, ErrFormat, "a memory larger than its file")
}

func TestXenHVM(t *testing.T) {
	ctx := context64(map[int]uint64{
		512: 1 << 5, 648: 0xffffffff81000123, 656: 0x10, 664: 0x246, 672: 0xffffc90000001000,
		4984: 0x80050033, 5000: 0x1234, 5008: 0x2a10003, 5016: 0x3506f0,
		5152: 0xffff88803fc00000, 5160: 0x7f0000001000, // gs_base_kernel, gs_base_user
	})
	user := context64(map[int]uint64{
		648: 0x401000, 656: 0x33, 4984: 0x80050033, 5016: 0x3506f0,
		5152: 0xffff88803fc80000, 5160: 0x7f0000001000,
	})
	pae := context64(map[int]uint64{512: 1 << 5, 648: 0xc1000123, 656: 0x60, 4984: 1 << 31, 5016: 0x20})
	frames := []frame{{0, 0, page(0)}, {1, 1, page(1)}, {0x100, 0x100, page(0x100)}, {^uint64(0), 0, make([]byte, 4096)}}
	b := xenCore{frames: frames, contexts: [][]byte{ctx, user, pae}}.bytes()
	readelf(t, b, "-hSn")
	m := open(t, b, nil)
	assert.Equal(t, "Xen core", m.Format())
	assert.Equal(t, HVM, m.Kind())
	assert.Equal(t, []Range{{0, 2}, {0x100, 1}}, ranges(m))
	for _, f := range []uint64{0, 1, 0x100} {
		require.Equal(t, page(f), get(t, m, f))
	}
	requireAbsent(t, m, 2, 0xff, 0x101)
	mfn, ok := m.PhysToMachine(0x100)
	assert.True(t, ok)
	assert.EqualValues(t, 0x100, mfn)

	c := m.CPUs()
	require.Len(t, c, 3)
	assert.Equal(t, CPU{
		Has: CR0 | CR2 | CR3 | CR4 | EFER | RIP | RSP | RFLAGS | CS | GSBase | KernelGSBase,
		CR0: 0x80050033, CR2: 0x1234, CR3: 0x2a10003, CR4: 0x3506f0, EFER: 0xd00, Bits: 64,
		RIP: 0xffffffff81000123, RSP: 0xffffc90000001000, RFLAGS: 0x246, CS: 0x10,
		GSBase: 0xffff88803fc00000, KernelGSBase: 0x7f0000001000,
	}, c[0])
	assert.True(t, c[1].Offline)
	assert.Equal(t, 64, c[1].Bits, "the kernel's per-CPU base is above 4 GiB")
	assert.Equal(t, uint64(0x7f0000001000), c[1].GSBase)
	assert.Equal(t, uint64(0xffff88803fc80000), c[1].KernelGSBase)
	assert.Equal(t, 32, c[2].Bits)
}

func TestXenPV(t *testing.T) {
	words := map[int]uint64{
		512: 1<<5 | 1<<2, 648: 0xffffffff81000123, 656: 0xe033, 664: 0x246, 672: 0xffffc90000001000,
		4984: 0x80050033, 4992: 0x777000, 5008: 0x35000000, 5016: 0x2660,
		5112: 0xffffffff81e00000, 5120: 0xffffffff81e00010, 5128: 0xffffffff81e00020,
		5152: 0xffff88803fc00000, 5160: 0x7f0000001000,
		720 + 14*16: 0xe033<<16 | 4<<8 | 14, 720 + 14*16 + 8: 0xffffffff81e01000,
		720 + 3*16: 0xe033<<16 | 3<<8 | 3, 720 + 3*16 + 8: 0xffffffff81e02000,
	}
	// Two superpages' worth that follow in neither order, a balloon's hole, an
	// entry that doesn't count, and a frame with two names.
	frames := []frame{
		{0, 0x900, page(0x900)}, {1, 0x901, page(0x901)}, {2, 0x902, page(0x902)},
		{0x10, 0x300, page(0x300)}, {0x11, 0x301, page(0x301)},
		{0x12, ^uint64(0), make([]byte, 4096)},
		{0x13, 0x302, page(0x302)},
		{0x20, 0x902, page(0x902)},
		{^uint64(0), ^uint64(0), make([]byte, 4096)},
	}
	b := xenCore{pv: true, frames: frames, contexts: [][]byte{context64(words)}}.bytes()
	readelf(t, b, "-hSn")
	m := open(t, b, nil)
	assert.Equal(t, PV, m.Kind())
	assert.EqualValues(t, 0x21, m.PhysPages())
	assert.Equal(t, []Range{{0x300, 3}, {0x900, 3}}, ranges(m))
	for _, f := range []uint64{0x900, 0x901, 0x902, 0x300, 0x301, 0x302} {
		require.Equal(t, page(f), get(t, m, f))
	}
	requireAbsent(t, m, 0, 1, 0x10, 0x2ff, 0x303, 0x8ff, 0x903)
	for _, tt := range []struct {
		pfn uint64
		mfn paging.Frame
	}{{0, 0x900}, {1, 0x901}, {2, 0x902}, {0x10, 0x300}, {0x11, 0x301}, {0x13, 0x302}} {
		mfn, ok := m.PhysToMachine(tt.pfn)
		assert.True(t, ok)
		assert.Equal(t, tt.mfn, mfn)
		pfn, ok := m.MachineToPhys(tt.mfn)
		assert.True(t, ok)
		assert.Equal(t, tt.pfn, pfn)
	}
	mfn, ok := m.PhysToMachine(0x20)
	assert.True(t, ok)
	assert.EqualValues(t, 0x902, mfn)
	for _, pfn := range []uint64{3, 0xf, 0x12, 0x14, 0x21, ^uint64(0)} {
		_, ok := m.PhysToMachine(pfn)
		assert.False(t, ok, "%#x", pfn)
	}
	for _, f := range []paging.Frame{0, 0x2ff, 0x303, 1 << 60} {
		_, ok := m.MachineToPhys(f)
		assert.False(t, ok, "%#x", f)
	}

	assert.Equal(t, []CPU{{
		Has: CR0 | CR2 | CR3 | CR4 | RIP | RSP | RFLAGS | CS | GSBase | KernelGSBase | PVContext,
		CR0: 0x80050033, CR3: 0x35000000, CR4: 0x2660, Bits: 64, InKernel: true, UserCR3: 0x777000,
		RIP: 0xffffffff81000123, RSP: 0xffffc90000001000, RFLAGS: 0x246, CS: 0xe033,
		GSBase: 0xffff88803fc00000, KernelGSBase: 0x7f0000001000,
		EventCallback: 0xffffffff81e00000, FailsafeCallback: 0xffffffff81e00010, SyscallCallback: 0xffffffff81e00020,
		Traps: []Trap{{3, 3, 0xe033, 0xffffffff81e02000}, {14, 4, 0xe033, 0xffffffff81e01000}},
	}}, m.CPUs())

	delete(words, 512)
	c := open(t, xenCore{pv: true, frames: frames, contexts: [][]byte{context64(words)}}.bytes(), nil).CPUs()[0]
	assert.False(t, c.InKernel)
	assert.True(t, c.Offline)
	assert.Equal(t, uint64(0x7f0000001000), c.GSBase)
}

func TestXenPV32(t *testing.T) {
	ctx := context32(map[int]uint32{
		512: 1<<5 | 1<<2, 548: 0xc1000123, 552: 0xe019, 556: 0x246, 560: 0xc1500000,
		2716: 0x8005003b, 2728: 0x34567<<12 | 0x1, 2732: 0x660, // CR3: frame 0x134567 folded
		2784: 0xc1e00000, 2792: 0xc1e00010,
		584 + 14*8: 0xe019<<16 | 4<<8 | 14, 584 + 14*8 + 4: 0xc1e01000,
	})
	for _, tt := range []struct {
		name string
		core xenCore
	}{
		{"64-bit toolstack", xenCore{bits: 32}},
		{"32-bit toolstack", xenCore{bits: 32, stride: 2800}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tt.core.pv, tt.core.frames, tt.core.contexts = true, []frame{{0, 9, page(9)}}, [][]byte{ctx, ctx}
			c := open(t, tt.core.bytes(), nil).CPUs()
			require.Len(t, c, 2)
			assert.Equal(t, CPU{
				ID: 1, Has: CR0 | CR2 | CR3 | CR4 | RIP | RSP | RFLAGS | CS | PVContext,
				CR0: 0x8005003b, CR3: 0x134567000, CR4: 0x660, Bits: 32, InKernel: true,
				RIP: 0xc1000123, RSP: 0xc1500000, RFLAGS: 0x246, CS: 0xe019,
				EventCallback: 0xc1e00000, FailsafeCallback: 0xc1e00010,
				Traps: []Trap{{14, 4, 0xe019, 0xc1e01000}},
			}, c[1])
		})
	}
}

// Any list of extents is the memory that a map of bytes, filled in the order of
// the rule, is.
func TestLayOutModel(t *testing.T) {
	seeds := uint64(300)
	if testing.Short() {
		seeds = 50
	}
	for seed := range seeds {
		rnd := rand.New(rand.NewPCG(seed, 1))
		file := make([]byte, 8<<12)
		for i := range file {
			file[i] = byte(rnd.Uint32())
		}
		var data, zero []extent
		for range 1 + rnd.IntN(8) {
			e := extent{addr: rnd.Uint64N(6 << 12), off: rnd.Uint64N(4 << 12), size: rnd.Uint64N(9 << 10)}
			if rnd.IntN(2) == 0 {
				e.addr, e.size = e.addr&^0xfff, (e.size+0xfff)&^0xfff
			}
			data = append(data, e)
			zero = append(zero, extent{addr: rnd.Uint64N(9 << 12), size: rnd.Uint64N(4 << 10)})
		}
		model := map[uint64]byte{}
		for _, e := range zero {
			for i := range e.size {
				model[e.addr+i] = 0
			}
		}
		sorted := slices.Clone(data)
		slices.SortStableFunc(sorted, func(a, b extent) int { return int(a.addr) - int(b.addr) })
		frames := map[uint64]bool{}
		for _, e := range slices.Backward(sorted) { // the first wins
			for i := range e.size {
				model[e.addr+i] = file[e.off+i]
				frames[(e.addr+i)>>12] = true
			}
		}
		m := &Image{r: bytes.NewReader(file), length: uint64(len(file))}
		err := m.layOut(slices.Clone(data), slices.Clone(zero))
		if len(frames) == 0 {
			require.ErrorIs(t, err, ErrFormat)
			continue
		}
		require.NoError(t, err, "seed %d", seed)
		m.cache = paging.NewCache(reader{m}, 2, 0)
		listed := map[uint64]bool{}
		for r := range m.Frames() {
			for i := range r.Count {
				require.False(t, listed[uint64(r.First)+i])
				listed[uint64(r.First)+i] = true
			}
		}
		require.Equal(t, frames, listed, "seed %d", seed)
		for f := range uint64(16) {
			want, some := make([]byte, 4096), false
			for i := range want {
				b, ok := model[f<<12+uint64(i)]
				want[i], some = b, some || ok
			}
			if !some {
				requireAbsent(t, m, f)
				continue
			}
			require.True(t, bytes.Equal(want, get(t, m, f)), "seed %d frame %#x", seed, f)
		}
		b := make([]byte, 3000)
		for range 20 {
			addr := rnd.Uint64N(14 << 12)
			n, err := m.ReadPhys(addr, b)
			for i := range n {
				require.Equal(t, model[addr+uint64(i)], b[i], "seed %d", seed)
			}
			_, ok := model[addr+uint64(n)]
			require.Equal(t, n < len(b), err != nil)
			require.Equal(t, n == len(b) || !ok, true, "seed %d: ends too early", seed)
		}
		require.NoError(t, m.Close())
	}
}

func TestReadOnly(t *testing.T) {
	m := open(t, page(0), nil)
	_, _, err := m.Page(0, true)
	require.ErrorIs(t, err, ErrReadOnly)
}

func TestForeign(t *testing.T) {
	for _, f := range foreign {
		b := append([]byte(f.magic), make([]byte, 8192)...)
		_, err := New(bytes.NewReader(b), int64(len(b)), nil)
		require.ErrorIs(t, err, ErrUnsupported)
		require.ErrorContains(t, err, f.cure)
		open(t, b, &Options{Raw: true})
	}
	for _, tool := range []string{"gzip", "xz", "bzip2", "zstd"} {
		path, err := exec.LookPath(tool)
		if err != nil {
			continue // the table above has its magic
		}
		cmd := exec.Command(path, "-c")
		cmd.Stdin = bytes.NewReader(page(1))
		b, err := cmd.Output()
		require.NoError(t, err)
		_, err = New(bytes.NewReader(b), int64(len(b)), nil)
		require.ErrorIs(t, err, ErrUnsupported, tool)
	}
}

func TestErrors(t *testing.T) {
	put16 := func(b []byte, off int, v uint16) []byte { le.PutUint16(b[off:], v); return b }
	put64 := func(b []byte, off int, v uint64) []byte { le.PutUint64(b[off:], v); return b }
	good := func() []byte { return core{machine: 62, loads: []load{{data: page(0)}}}.bytes() }
	const load0 = 64 + 56 // its program header
	xen := func(edit func(*xenCore)) []byte {
		c := xenCore{pv: true, frames: []frame{{0, 5, page(5)}, {1, 6, page(6)}}, contexts: [][]byte{make([]byte, 5168)}}
		if edit != nil {
			edit(&c)
		}
		return c.bytes()
	}
	xenSection := func(b []byte, n int) []byte { return b[64+64*n:] }
	edited := func(b []byte, n, field int, v uint64) []byte {
		le.PutUint64(xenSection(b, n)[field:], v)
		return b
	}
	const shOff, shSize = 24, 32
	for _, tt := range []struct {
		name string
		b    []byte
		want error
		msg  string
	}{
		{"empty", nil, ErrFormat, "empty"},
		{"header cut", good()[:40], ErrTruncated, "ELF header"},
		{"big-endian", func() []byte { b := good(); b[5] = 2; return b }(), ErrFormat, "big-endian"},
		{"executable", put16(good(), 16, 2), ErrUnsupported, "not a core"},
		{"arm", put16(good(), 18, 183), ErrUnsupported, "not x86"},
		{"class", func() []byte { b := good(); b[4] = 7; return b }(), ErrFormat, "class 7"},
		{"phentsize", put16(good(), 54, 57), ErrFormat, "57"},
		{"shentsize", put16(put16(good(), 60, 1), 58, 3), ErrFormat, "3"},
		{"phdrs beyond", put64(good(), 32, 1<<63), ErrTruncated, "program headers"},
		{"too many phdrs", func() []byte {
			b := core{machine: 62, loads: []load{{data: page(0)}}, xnum: true}.bytes()
			le.PutUint32(b[64+44:], 1<<31)
			return b
		}(), ErrFormat, "segments"},
		{"too many sections", put16(put16(good(), 58, 64), 60, 5000), ErrFormat, "sections"},
		{"section 0 beyond", put64(put16(good(), 56, 0xffff), 40, 1<<40), ErrTruncated, "section 0"},
		{"no memory", core{machine: 62}.bytes(), ErrFormat, "no memory"},
		{"zeros only", core{machine: 62, loads: []load{{memsz: 1 << 40}}}.bytes(), ErrFormat, "no memory"},
		{"segment beyond", put64(good(), load0+8, 1<<62), ErrTruncated, "memory"},
		{"segment wraps", put64(good(), load0+24, ^uint64(0)-100), ErrFormat, "52 bits"},
		{"zeros wrap", put64(good(), load0+40, ^uint64(0)), ErrFormat, "52 bits"},
		{"notes too long", put64(good(), 64+32, 1<<40), ErrFormat, "notes"},
		{"cut", good()[:len(good())-1], ErrTruncated, "memory"},

		{"lime version", put16(limeBytes(piece{0, page(0)}), 4, 2), ErrUnsupported, "version 2"},
		{"lime reversed", put64(limeBytes(piece{4096, page(0)}), 16, 4094), ErrFormat, "0x1000 to 0xffe"},
		{"lime address", put64(limeBytes(piece{0, page(0)}), 16, 1<<52), ErrFormat, "0x10000000000000"},
		{"lime cut", limeBytes(piece{0, page(0)})[:4000], ErrTruncated, "before its memory begins"},
		{"lime header cut", limeBytes(piece{0, page(0)})[:20], ErrTruncated, "header"},

		{"xen magic", xen(func(c *xenCore) { c.magic = 7 }), ErrFormat, "magic 0x7"},
		{"xen version", xen(func(c *xenCore) { c.version = 1 }), ErrUnsupported, "version 1"},
		{"xen page size", xen(func(c *xenCore) { c.pageSize = 16384 }), ErrUnsupported, "16384"},
		{"xen descending", xen(func(c *xenCore) { c.frames[1].pfn = 0 }), ErrFormat, "comes after"},
		{"xen mfn", xen(func(c *xenCore) { c.frames[1].mfn = 1 << 40 }), ErrFormat, "entry 1"},
		{"xen pfn", xen(func(c *xenCore) { c.frames[1].pfn = 1 << 40 }), ErrFormat, "entry 1"},
		{"xen no p2m", xen(func(c *xenCore) { c.magic = 0xf00febee }), ErrFormat, "no section .xen_pfn"},
		{"xen pages beyond", edited(xen(nil), 5, shOff, 1<<60), ErrTruncated, ".xen_pages"},
		{"xen pages short", edited(xen(nil), 5, shSize, 4097), ErrFormat, ".xen_pages"},
		{"xen p2m beyond", edited(xen(nil), 6, shOff, 1<<60), ErrTruncated, ".xen_p2m"},
		{"xen p2m short", edited(xen(nil), 6, shSize, 31), ErrFormat, ".xen_p2m"},
		{"xen contexts short", edited(xen(nil), 3, shSize, 2799), ErrFormat, ".xen_prstatus"},
		{"xen contexts beyond", edited(xen(nil), 3, shOff, 1<<60), ErrTruncated, ".xen_prstatus"},
		{"xen notes beyond", edited(xen(nil), 2, shOff, 1<<60), ErrTruncated, ".note.Xen"},
		{"xen notes too long", edited(xen(nil), 2, shSize, 1<<60), ErrFormat, "notes"},
		{"xen no header", edited(xen(nil), 2, shSize, 16), ErrFormat, "no header note"},
		{"xen names too long", edited(xen(nil), 1, shSize, 1<<20), ErrFormat, "names"},
		{"xen names beyond", edited(xen(nil), 1, shOff, 1<<40), ErrTruncated, "names"},
		{"xen only invalid frames", xen(func(c *xenCore) { c.frames[0].mfn, c.frames[1].mfn = ^uint64(0), ^uint64(0) }), ErrFormat, "no memory"},
		{"xen too many pages", func() []byte {
			b := xen(nil)
			// The header note is the second; the first has 16 bytes.
			le.PutUint64(b[le.Uint64(xenSection(b, 2)[shOff:])+16+16+16:], 1<<33)
			return b
		}(), ErrFormat, "pages"},
		{"xen too many CPUs", func() []byte {
			b := xen(nil)
			le.PutUint64(b[le.Uint64(xenSection(b, 2)[shOff:])+16+16+8:], 1<<33)
			return b
		}(), ErrFormat, "CPUs"},
		{"xen cut", xen(nil)[:8192], ErrTruncated, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := New(bytes.NewReader(tt.b), int64(len(tt.b)), nil)
			require.ErrorIs(t, err, tt.want)
			require.ErrorContains(t, err, tt.msg)
			if tt.want == ErrTruncated {
				require.ErrorIs(t, err, io.ErrUnexpectedEOF)
			}
		})
	}
}

func TestOpen(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "mem")
	require.NoError(t, os.WriteFile(path, pages(0, 4), 0o600))
	m, err := Open(path, nil)
	require.NoError(t, err)
	require.Equal(t, page(1), get(t, m, 1))

	// It shrinks under us: what was read is still there, what wasn't is an error.
	require.NoError(t, os.Truncate(path, 2<<12|5))
	require.Equal(t, page(1), get(t, m, 1))
	for _, f := range []paging.Frame{2, 3} {
		_, _, err = m.Page(f, false)
		require.ErrorIs(t, err, ErrTruncated)
	}
	require.NoError(t, m.Close())
	_, _, err = m.Page(1, false)
	require.ErrorIs(t, err, paging.ErrClosed)
	_, err = m.ReadPhys(0, make([]byte, 1))
	require.ErrorIs(t, err, fs.ErrClosed)

	_, err = Open(filepath.Join(dir, "none"), nil)
	require.ErrorIs(t, err, fs.ErrNotExist)
	_, err = Open(dir, nil)
	require.ErrorIs(t, err, ErrUnsupported)
	require.NoError(t, os.WriteFile(path, nil, 0o600))
	_, err = Open(path, nil)
	require.ErrorIs(t, err, ErrFormat)
	require.ErrorContains(t, err, path)
	if runtime.GOOS == "linux" {
		_, err = Open("/dev/zero", nil)
		require.ErrorIs(t, err, ErrUnsupported)
	}
}

// failing is a file with a bad block.
type failing struct{ io.ReaderAt }

var errIO = errors.New("input/output error")

func (f failing) ReadAt(b []byte, off int64) (int, error) {
	if off >= 8192 {
		return 0, errIO
	}
	return f.ReaderAt.ReadAt(b, off)
}

func TestReadError(t *testing.T) {
	m, err := New(failing{bytes.NewReader(pages(0, 4))}, 4<<12, nil)
	require.NoError(t, err)
	require.Equal(t, page(1), get(t, m, 1))
	_, _, err = m.Page(2, false)
	require.ErrorIs(t, err, errIO)
	_, err = m.ReadPhys(9000, make([]byte, 1))
	require.ErrorIs(t, err, errIO)
	require.NoError(t, m.Close())
}

func TestConcurrent(t *testing.T) {
	m := open(t, pages(0, 64), nil)
	var wg sync.WaitGroup
	for i := range uint64(8) {
		wg.Go(func() {
			for j := range uint64(500) {
				f := (j*7 + i) % 64
				b, release, err := m.Page(paging.Frame(f), false)
				if assert.NoError(t, err) {
					assert.Equal(t, le.Uint64(page(f)), le.Uint64(b))
					release()
				}
			}
		})
	}
	wg.Wait()
}

// mem is a guest's memory in which some frames are missing.
type mem map[paging.Frame][]byte

var errGone = errors.New("no such frame")

func (m mem) Page(f paging.Frame, _ bool) ([]byte, func(), error) {
	if b := m[f]; b != nil {
		return b, func() {}, nil
	}
	return nil, nil, errGone
}

func TestDump(t *testing.T) {
	guest := mem{2: page(2), 3: page(3), 5: page(5), 0x10: page(0x10)}
	list := []Range{{2, 4}, {9, 0}, {0x10, 1}}
	for _, format := range []DumpFormat{DumpRaw, DumpLiME} {
		var b bytes.Buffer
		var missing []paging.Frame
		require.NoError(t, Dump(&b, format, guest, slices.Values(list), func(f paging.Frame, err error) error {
			assert.ErrorIs(t, err, errGone)
			missing = append(missing, f)
			return nil
		}))
		assert.Equal(t, []paging.Frame{4}, missing)
		m := open(t, b.Bytes(), nil)
		want := list[:1:1]
		if format == DumpRaw {
			want = []Range{{0, 0x11}}
			require.Equal(t, make([]byte, 4096), get(t, m, 8))
		} else {
			want = append(want, list[2])
		}
		assert.Equal(t, want, ranges(m))
		for f := range guest {
			require.Equal(t, page(uint64(f)), get(t, m, uint64(f)))
		}
		require.Equal(t, make([]byte, 4096), get(t, m, 4))

		require.ErrorIs(t, Dump(io.Discard, format, guest, slices.Values(list), nil), errGone)
		// Wherever the writer fails, that is the error.
		size := b.Len()
		for n := 0; n < size; n += 1000 {
			require.ErrorIs(t, Dump(&limited{n}, format, guest, slices.Values(list), func(paging.Frame, error) error { return nil }), errIO)
		}
	}
	for _, bad := range [][]Range{{{5, 1}, {5, 1}}, {{5, 1}, {2, 1}}, {{1 << 40, 1}}, {{1, ^uint64(0)}}} {
		require.Error(t, Dump(io.Discard, DumpLiME, mem{5: page(5)}, slices.Values(bad), nil))
	}
	require.Error(t, Dump(io.Discard, 9, guest, slices.Values(list), nil))
}

// limited fails when more than left bytes are written.
type limited struct{ left int }

func (w *limited) Write(b []byte) (int, error) {
	if len(b) > w.left {
		return 0, errIO
	}
	w.left -= len(b)
	return len(b), nil
}

// readelf checks that binutils understands a file that a writer of these tests
// made, and says nothing against it.
func readelf(t *testing.T, b []byte, flags string) {
	t.Helper()
	path, err := exec.LookPath("readelf")
	if err != nil {
		t.Log("readelf (binutils) is not here: the writer is not checked")
		return
	}
	name := filepath.Join(t.TempDir(), "core")
	require.NoError(t, os.WriteFile(name, b, 0o600))
	out, err := exec.Command(path, flags, name).CombinedOutput()
	require.NoError(t, err, "%s", out)
	for _, word := range []string{"rror:", "arning:", "orrupt", "truncated"} {
		require.NotContains(t, string(out), word)
	}
	require.Contains(t, string(out), "CORE (Core file)")
}

// seeds are small: a fuzzer tries each of their bytes.
func seeds() [][]byte {
	ctx := make([]byte, 5168)
	some := page(1)[:64]
	return [][]byte{
		some,
		limeBytes(piece{0x1000, some}, piece{0x1020, some}),
		core{machine: 62, loads: []load{{data: some, memsz: 8192}, {paddr: 0x20, data: some}}, notes: []note{
			{"CORE", 1, prstatus64(1, 2, 3, 4)}, {"QEMU", 0, qemuState{}.bytes()}, {"VMCOREINFO", 0, []byte("OSRELEASE=1\n")},
		}}.bytes(),
		core{machine: 3, class32: true, loads: []load{{data: some}}, notes: []note{{"CORE", 1, prstatus32(1, 2, 3, 4)}}, xnum: true}.bytes(),
		xenCore{frames: []frame{{0, 0, page(0)}, {2, 2, page(2)}}, contexts: [][]byte{ctx}}.bytes(),
		xenCore{pv: true, frames: []frame{{0, 9, page(9)}, {1, 4, page(4)}}, contexts: [][]byte{ctx}}.bytes(),
		xenCore{pv: true, bits: 32, frames: []frame{{0, 9, page(9)}}, contexts: [][]byte{ctx[:2800]}}.bytes(),
	}
}

// Whatever the file is, what it has adds up.
func FuzzOpen(f *testing.F) {
	for _, b := range append(seeds(), packedSeeds(f)...) {
		f.Add(b, uint32(0))
		f.Add(b[:len(b)*2/3], uint32(4096))
	}
	f.Fuzz(func(t *testing.T, b []byte, hole uint32) {
		m, err := New(bytes.NewReader(b), int64(len(b)), &Options{RawHole: Hole{uint64(hole) << 1, uint64(hole)}})
		if err != nil {
			return
		}
		defer m.Close()
		// What is packed is unpacked when it is read: pages of kdump's that are zero
		// share their contents, and have 24 bytes each.
		packed, most := false, uint64(len(b))
		if strings.HasPrefix(m.Format(), "kdump") || m.Format() == "AVML" {
			packed, most = true, uint64(len(b))*paging.PageSize/24
		}
		if m.Size() == 0 || m.Size() > most {
			t.Fatalf("%d bytes of memory in %d", m.Size(), len(b))
		}
		var last paging.Frame
		first := true
		for r := range m.Frames() {
			if r.Count == 0 || !first && r.First <= last {
				t.Fatalf("range %+v after frame %#x", r, last)
			}
			first, last = false, r.First+paging.Frame(r.Count)
			for _, f := range []paging.Frame{r.First, last - 1} {
				page, release, err := m.Page(f, false)
				if packed && (errors.Is(err, ErrFormat) || errors.Is(err, ErrTruncated)) {
					continue
				}
				if err != nil || len(page) != paging.PageSize {
					t.Fatalf("frame %#x: %v", f, err)
				}
				release()
				pfn, ok := m.MachineToPhys(f)
				if !ok {
					t.Fatalf("frame %#x has no other number", f)
				}
				if _, ok := m.PhysToMachine(pfn); !ok {
					t.Fatalf("frame %#x: no way back from %#x", f, pfn)
				}
			}
		}
		var buf [100]byte
		for _, at := range []uint64{0, uint64(last) << 12, 4000, ^uint64(0) - 50} {
			n, err := m.ReadPhys(at, buf[:])
			if (n < len(buf)) != (err != nil) {
				t.Fatalf("%d bytes, error %v", n, err)
			}
		}
		for _, c := range m.CPUs() {
			if len(c.Traps) > 256 {
				t.Fatal("too many traps")
			}
		}
	})
}

func BenchmarkPageHit(b *testing.B) {
	m := open(b, pages(0, 4), nil)
	b.ReportAllocs()
	for b.Loop() {
		_, release, err := m.Page(1, false)
		if err != nil {
			b.Fatal(err)
		}
		release()
	}
}

func TestPageHitAllocates(t *testing.T) {
	m := open(t, pages(0, 4), nil)
	assert.Zero(t, testing.AllocsPerRun(100, func() {
		_, release, err := m.Page(1, false)
		if err == nil {
			release()
		}
	}))
}

func ExampleOpen() {
	f, _ := os.CreateTemp("", "")
	defer os.Remove(f.Name())
	f.Write(make([]byte, 8192)) //nolint:errcheck // an example
	f.Close()

	m, err := Open(f.Name(), nil)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer m.Close() //nolint:errcheck // only read from
	for r := range m.Frames() {
		fmt.Println(m.Format(), r.First, r.Count)
	}
	// Output: raw 0 2
}

func TestKindString(t *testing.T) {
	assert.Equal(t, "pv hvm unknown Kind(9)", strings.Join([]string{PV.String(), HVM.String(), Unknown.String(), Kind(9).String()}, " "))
}
