package paging_test

import (
	"encoding/binary"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/pagetest"
	"github.com/vmprobes/vmprobes/paging"
)

var allKinds = []pagetest.Kind{pagetest.TwoLevel, pagetest.PAE, pagetest.FourLevel, pagetest.FiveLevel}

// randomMappings maps up to n pages of all sizes, none of which hides another.
func randomMappings(r *rand.Rand, k pagetest.Kind, n int) map[uint64]pagetest.Mapping {
	// Each has an entry of a table of the highest pages for itself; bucket is
	// that entry's number in the whole address space.
	shift := 30
	phys := 52
	flags := uint64(pagetest.Writable | pagetest.User | pagetest.Accessed | pagetest.Dirty | pagetest.Global | pagetest.NX)
	switch k {
	case pagetest.TwoLevel:
		shift, phys, flags = 22, 32, flags&^pagetest.NX
	case pagetest.PAE:
		shift = 21
	}
	out := make(map[uint64]pagetest.Mapping)
	for range n {
		bucket := r.Uint64N(1 << (k.Bits() - shift))
		if r.IntN(3) == 0 && len(out) > 0 { // clusters, too: neighbours of others
			for b := range out {
				bucket = (b + 1) % (1 << (k.Bits() - shift))
				break
			}
		}
		m := pagetest.Mapping{Level: 1 + r.IntN(k.MaxLevel()), Flags: r.Uint64() & flags}
		size := k.Size(m.Level)
		m.Virt = (bucket<<shift | r.Uint64N(1<<shift)) &^ (size - 1)
		m.Phys = r.Uint64N(1<<phys) &^ (size - 1)
		if k == pagetest.TwoLevel && m.Level == 2 {
			m.Phys |= r.Uint64N(1<<8) << 32 // PSE-36
		}
		out[bucket] = m
	}
	return out
}

// canonical extends the sign of an address in 64-bit modes.
func canonical(k pagetest.Kind, va uint64) uint64 {
	if k.Bits() > 32 {
		s := 64 - k.Bits()
		return uint64(int64(va) << s >> s)
	}
	return va
}

func protOf(flags uint64) (p paging.Protection) {
	for bit, prot := range map[uint64]paging.Protection{
		pagetest.Writable: paging.Writable, pagetest.User: paging.User, pagetest.NX: paging.NoExecute,
		pagetest.Accessed: paging.Accessed, pagetest.Dirty: paging.Dirty, pagetest.Global: paging.Global,
	} {
		if flags&bit != 0 {
			p |= prot
		}
	}
	return p
}

// TestTranslateInverts builds tables of random mappings and walks them.
func TestTranslateInverts(t *testing.T) {
	for _, k := range allKinds {
		t.Run(kinds[k].String(), func(t *testing.T) {
			r := rand.New(rand.NewPCG(1, uint64(k)))
			g := newGuest(k)
			maps := randomMappings(r, k, 400)
			for _, m := range maps {
				g.tables.Map(m)
			}
			mem := paging.New(g.ram, g.mode())
			for _, m := range maps {
				size := k.Size(m.Level)
				off := r.Uint64N(size)
				got, err := mem.Translate(g.root(), paging.VAddr(canonical(k, m.Virt)+off))
				require.NoError(t, err, "%+v", m)
				require.Equal(t, paging.Translation{
					Frame: paging.Frame((m.Phys + off) >> 12), Offset: off & 0xfff, Size: size, Prot: protOf(m.Flags),
				}, got, "%+v", m)
				require.EqualValues(t, m.Phys+off, got.Phys())
				// Where nothing was mapped nothing is found.
				for _, va := range []uint64{m.Virt - 1, m.Virt + size} {
					va &= 1<<k.Bits() - 1
					mapped := false
					for _, o := range maps {
						mapped = mapped || va-o.Virt < k.Size(o.Level)
					}
					_, err := mem.Translate(g.root(), paging.VAddr(canonical(k, va)))
					if mapped {
						require.NoError(t, err, "%#x", va)
					} else {
						require.ErrorIs(t, err, paging.ErrNotMapped, "%#x", va)
					}
				}
			}
		})
	}
}

// set puts entries of size bytes into frames: the address of each, and its value.
func set(r ram, size int, entries map[uint64]uint64) {
	for pa, v := range entries {
		f := paging.Frame(pa >> 12)
		if r[f] == nil {
			r[f] = make([]byte, paging.PageSize)
		}
		pagetest.Put(r[f][pa&0xfff:int(pa&0xfff)+size], v)
	}
}

// TestTranslateGolden has tables written down bit by bit from the figures and
// tables of Intel SDM vol. 3, 4.3 to 4.5.
func TestTranslateGolden(t *testing.T) {
	const (
		w = paging.Writable
		u = paging.User
		x = paging.NoExecute
		a = paging.Accessed
		d = paging.Dirty
		g = paging.Global
	)
	long := paging.Mode{Kind: paging.FourLevel, NXE: true}
	long5 := paging.Mode{Kind: paging.FiveLevel, NXE: true}
	pae := paging.Mode{Kind: paging.PAE, NXE: true}
	two := paging.Mode{Kind: paging.TwoLevel, PSE: true}
	for _, c := range []struct {
		name    string
		mode    paging.Mode
		root    paging.Root
		size    int
		entries map[uint64]uint64
		va      paging.VAddr
		phys    paging.PAddr
		page    uint64
		prot    paging.Protection
	}{
		// 0xc0801234: directory entry 0x302, table entry 0x001.
		{"2-level, 4 KiB", two, 0x1018, 4, map[uint64]uint64{0x1000 + 0x302*4: 0x2067, 0x2000 + 0x001*4: 0xabcde163},
			0xc0801234, 0xabcde234, 4 << 10, w | a | d | g},
		// The address bits 31:22 select one entry; its bits 31:22 and 20:13 (PSE-36).
		{"2-level, 4 MiB", two, 0x1000, 4, map[uint64]uint64{0x1000 + 0x301*4: 0x014000e7 | 0x5a<<13 | 1<<12},
			0xc0400000 + 0x123456, 0x5a_0140_0000 + 0x123456, 4 << 20, w | u | a | d},
		{"2-level without PSE: PS is ignored", paging.Mode{Kind: paging.TwoLevel}, 0x1000, 4,
			map[uint64]uint64{0x1000 + 0x301*4: 0x20e7, 0x2000 + 0x123*4: 0x7025}, 0xc0523456, 0x7456, 4 << 10, u | a},
		// 0xc0201234: PDPT entry 3, directory entry 1, table entry 1.
		{"PAE, 4 KiB", pae, 0x21f7f98, 8, map[uint64]uint64{
			0x21f7f80 + 3*8: 0x2001, 0x2000 + 1*8: 0x3063, 0x3000 + 1*8: 1<<63 | 0xf_edcb_a163},
			0xc0201234, 0xf_edcb_a234, 4 << 10, w | x | a | d | g},
		{"PAE, 2 MiB", pae, 0x1fe0, 8, map[uint64]uint64{0x1fe0: 0x2001, 0x2000 + 5*8: 0x12_3460_00a5},
			0xabcdef, 0x12_3460_0000 + 0xbcdef, 2 << 20, u | a},
		// 0xffffffff81abcdef: 511, 510, 13, 188.
		{"4-level, 4 KiB", long, 0x1000, 8, map[uint64]uint64{
			0x1000 + 511*8: 0x2067, 0x2000 + 510*8: 0x3063, 0x3000 + 13*8: 0x4063, 0x4000 + 188*8: 0x000f_edcb_a987_6121},
			0xffffffff81abcdef, 0xf_edcb_a987_6def, 4 << 10, a | g},
		{"4-level, 2 MiB", long, 0x1000, 8, map[uint64]uint64{
			0x1000 + 511*8: 0x2067, 0x2000 + 510*8: 0x3063, 0x3000 + 13*8: 0x0c80_01e1 | 1<<12},
			0xffffffff81abcdef, 0x0c80_0000 + 0xbcdef, 2 << 20, a | d | g},
		// 0xffff888100000010: 273, 4.
		{"4-level, 1 GiB", long, 0x1000, 8, map[uint64]uint64{
			0x1000 + 273*8: 0x2067, 0x2000 + 4*8: 1<<63 | 1<<30 | 0x1e3},
			0xffff888100000010, 0x4000_0010, 1 << 30, w | x | a | d | g},
		// 0xff10000000000008: 272 of the fifth level.
		{"5-level, 1 GiB", long5, 0x1000, 8, map[uint64]uint64{0x1000 + 272*8: 0x2067, 0x2000: 0x3067, 0x3000: 0xe7},
			0xff10000000000008, 8, 1 << 30, w | u | a | d},
		{"5-level, 4 KiB", long5, 0x1000, 8, map[uint64]uint64{
			0x1000 + 511*8: 0x2067, 0x2000 + 511*8: 0x3067, 0x3000 + 511*8: 0x4067, 0x4000 + 511*8: 0x5067, 0x5000 + 511*8: 0x6063},
			0xffffffffffffffff, 0x6fff, 4 << 10, w | a | d},
		{"restrictions of any level", long, 0x1000, 8, map[uint64]uint64{
			0x1000: 0x2005, 0x2000: 0x3003, 0x3000: 1<<63 | 0x4007, 0x4000: 0x5067}, 0, 0x5000, 4 << 10, x | a | d},
		{"PV 32-bit", paging.Mode{Kind: paging.PAE, NXE: true, PV: true}, paging.PV32Root(0x5678_9123), 8, map[uint64]uint64{
			0x1235_6789_000 + 3*8: 0x2027, 0x2000: 0x3063, 0x3000: 0x7_0000_4063}, 0xc0000000, 0x7_0000_4000, 4 << 10, w | a | d},
		{"C-bit", paging.Mode{Kind: paging.FourLevel, NXE: true, PhysBits: 43, EncryptMask: 1 << 47}, 1<<47 | 0x1000, 8, map[uint64]uint64{
			0x1000: 1<<47 | 0x2067, 0x2000: 1<<47 | 0x3067, 0x3000: 1<<47 | 0x2000e7}, 0x42, 0x200042, 2 << 20, w | u | a | d},
		{"bits to ignore in long mode", long, 0x1000, 8, map[uint64]uint64{
			0x1000: 0x7ff0_0000_0000_2f7f &^ 0x80, 0x2000: 0x7ff0_0000_0000_3f7f &^ 0x80, 0x3000: 0x7ff0_0000_0000_4f7f &^ 0x80,
			0x4000: 0x7ff0_0000_0000_5fff}, 0, 0x5000, 4 << 10, w | u | a | d | g},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := ram{}
			set(r, c.size, c.entries)
			got, err := paging.New(r, c.mode).Translate(c.root, c.va)
			require.NoError(t, err)
			assert.Equal(t, c.phys, got.Phys())
			assert.Equal(t, c.page, got.Size)
			assert.Equal(t, c.prot, got.Prot, "%v, not %v", got.Prot, c.prot)
		})
	}
}

// TestReservedBits sets each bit of an entry at each level in turn and compares
// with the rows of the SDM's tables.
func TestReservedBits(t *testing.T) {
	const max52, max40 = 52, 40
	for _, c := range []struct {
		sdm      string // table of Intel SDM vol. 3
		mode     paging.Mode
		level    int
		large    bool
		reserved [][2]int // high and low bit
	}{
		{"4-4", paging.Mode{Kind: paging.TwoLevel, PSE: true}, 2, true, [][2]int{{21, 21}}},
		{"4-4, 36 bits", paging.Mode{Kind: paging.TwoLevel, PSE: true, PhysBits: 36}, 2, true, [][2]int{{21, 17}}},
		{"4-4, no PSE-36", paging.Mode{Kind: paging.TwoLevel, PSE: true, PhysBits: 32}, 2, true, [][2]int{{21, 13}}},
		{"4-5", paging.Mode{Kind: paging.TwoLevel, PSE: true}, 2, false, nil},
		{"4-5, no PSE", paging.Mode{Kind: paging.TwoLevel}, 2, false, nil},
		{"4-6", paging.Mode{Kind: paging.TwoLevel, PSE: true, PhysBits: 32}, 1, false, nil},
		{"4-8, but A", paging.Mode{Kind: paging.PAE, NXE: true}, 3, false, [][2]int{{63, 52}, {8, 6}, {2, 1}}},
		{"4-8, but A, 40 bits", paging.Mode{Kind: paging.PAE, NXE: true, PhysBits: max40}, 3, false, [][2]int{{63, 40}, {8, 6}, {2, 1}}},
		{"4-9", paging.Mode{Kind: paging.PAE, NXE: true, PhysBits: max40}, 2, true, [][2]int{{62, 40}, {20, 13}}},
		{"4-9, no NXE", paging.Mode{Kind: paging.PAE, PhysBits: max40}, 2, true, [][2]int{{63, 40}, {20, 13}}},
		{"4-10", paging.Mode{Kind: paging.PAE, NXE: true, PhysBits: max40}, 2, false, [][2]int{{62, 40}}},
		{"4-11", paging.Mode{Kind: paging.PAE, NXE: true, PhysBits: max52}, 1, false, [][2]int{{62, 52}}},
		{"Xen PV, level 3", paging.Mode{Kind: paging.PAE, NXE: true, PV: true, PhysBits: max40}, 3, false, [][2]int{{51, 40}, {7, 7}}},
		{"Xen PV, level 1", paging.Mode{Kind: paging.PAE, NXE: true, PV: true}, 1, false, nil},
		{"4-14", paging.Mode{Kind: paging.FiveLevel, NXE: true, PhysBits: max40}, 5, false, [][2]int{{51, 40}, {7, 7}}},
		{"4-15", paging.Mode{Kind: paging.FourLevel, NXE: true, PhysBits: max40}, 4, false, [][2]int{{51, 40}, {7, 7}}},
		{"4-15, no NXE", paging.Mode{Kind: paging.FourLevel}, 4, false, [][2]int{{63, 63}, {7, 7}}},
		{"4-16", paging.Mode{Kind: paging.FourLevel, NXE: true, PhysBits: max40}, 3, true, [][2]int{{51, 40}, {29, 13}}},
		{"4-17", paging.Mode{Kind: paging.FourLevel, NXE: true, PhysBits: max40}, 3, false, [][2]int{{51, 40}}},
		{"4-18", paging.Mode{Kind: paging.FiveLevel, NXE: true, PhysBits: max40}, 2, true, [][2]int{{51, 40}, {20, 13}}},
		{"4-19", paging.Mode{Kind: paging.FourLevel, NXE: true, PhysBits: max40}, 2, false, [][2]int{{51, 40}}},
		{"4-20", paging.Mode{Kind: paging.FourLevel, PhysBits: max40}, 1, false, [][2]int{{63, 63}, {51, 40}}},
		{"C-bit", paging.Mode{Kind: paging.FourLevel, NXE: true, PhysBits: max40, EncryptMask: 1 << 43}, 1, false, [][2]int{{51, 44}, {42, 40}}},
	} {
		t.Run(c.sdm, func(t *testing.T) {
			var kind pagetest.Kind
			for k, v := range kinds {
				if v == c.mode.Kind {
					kind = k
				}
			}
			g := newGuest(kind)
			mem := paging.New(g.ram, c.mode)
			g.tables.Map(pagetest.Mapping{Level: 1})
			e := g.tables.Entry(0, c.level)
			if c.large {
				pagetest.Put(e, pagetest.Present|pagetest.Large)
			}
			good := pagetest.Get(e)
			for bit := 1; bit < 8*len(e); bit++ {
				if bit == 7 && (c.large || c.level == 2 && (len(e) == 8 || c.mode.PSE) || c.level == 3 && kind >= pagetest.FourLevel) {
					continue // PS: it would be another kind of entry
				}
				want := false
				for _, r := range c.reserved {
					want = want || r[0] >= bit && bit >= r[1]
				}
				pagetest.Put(e, good|1<<bit)
				_, err := mem.Translate(paging.Root(g.tables.CR3), 0)
				var pe *paging.Error
				switch {
				case want:
					require.ErrorIs(t, err, paging.ErrReserved, "bit %d", bit)
					require.ErrorAs(t, err, &pe)
					require.Equal(t, c.level, pe.Level)
				case err != nil: // an address bit, and no such table
					require.ErrorIs(t, err, paging.ErrNoFrame, "bit %d", bit)
				}
			}
			pagetest.Put(e, ^uint64(1))
			_, err := mem.Translate(paging.Root(g.tables.CR3), 0)
			require.ErrorIs(t, err, paging.ErrNotMapped, "what isn't present has no reserved bits")
		})
	}
}

func TestTranslateErrors(t *testing.T) {
	level := func(err error) int {
		var e *paging.Error
		require.ErrorAs(t, err, &e)
		return e.Level
	}
	for _, k := range allKinds {
		t.Run(kinds[k].String(), func(t *testing.T) {
			g := newGuest(k)
			mem := paging.New(g.ram, g.mode())
			va := uint64(1)<<(k.Bits()-1) | 0x1000
			at := paging.VAddr(canonical(k, va))
			for l := int(k); l >= 1; l-- {
				e := g.tables.Entry(va, l)
				_, err := mem.Translate(g.root(), at)
				require.ErrorIs(t, err, paging.ErrNotMapped)
				assert.Equal(t, l, level(err))
				if l > 1 {
					pagetest.Put(e, 0xdead<<12|pagetest.Present)
					_, err = mem.Translate(g.root(), at)
					require.ErrorIs(t, err, paging.ErrNoFrame)
					require.ErrorIs(t, err, errNoFrame, "the backend's reason is kept")
					assert.NotErrorIs(t, err, paging.ErrNotMapped)
					assert.Equal(t, l-1, level(err))
					pagetest.Put(e, 0)
				}
			}
			// The addresses around the hole.
			for _, va := range map[pagetest.Kind][]uint64{
				pagetest.TwoLevel: {1 << 32, ^uint64(0)}, pagetest.PAE: {1 << 32, 0xffffffff80000000},
				pagetest.FourLevel: {1 << 47, 0xffff7fffffffffff}, pagetest.FiveLevel: {1 << 56, 0xfeffffffffffffff},
			}[k] {
				_, err := mem.Translate(g.root(), paging.VAddr(va))
				require.ErrorIs(t, err, paging.ErrNonCanonical, "%#x", va)
				assert.Zero(t, level(err))
			}
			for _, va := range map[pagetest.Kind][]uint64{
				pagetest.TwoLevel: {1<<32 - 1}, pagetest.PAE: {1<<32 - 1},
				pagetest.FourLevel: {1<<47 - 1, 0xffff800000000000}, pagetest.FiveLevel: {1<<56 - 1, 0xff00000000000000},
			}[k] {
				_, err := mem.Translate(g.root(), paging.VAddr(va))
				require.ErrorIs(t, err, paging.ErrNotMapped, "%#x", va)
			}
			_, err := mem.Translate(0xbad000, 0)
			require.ErrorIs(t, err, paging.ErrNoFrame, "no top-level table")
		})
	}
}

// TestSelfMap has all entries of the top-level table lead back to it.
func TestSelfMap(t *testing.T) {
	for _, k := range allKinds {
		g := newGuest(k)
		top := g.tables.CR3 >> 12
		self := top<<12 | pagetest.Present
		size := len(g.tables.Entry(0, int(k)))
		page := g.ram[paging.Frame(top)]
		for off := 0; off < len(page); off += size {
			pagetest.Put(page[off:off+size], self)
		}
		reads := &counting{ram: g.ram}
		got, err := paging.New(reads, g.mode()).Translate(g.root(), 0x123)
		require.NoError(t, err, "it ends like any other")
		assert.EqualValues(t, top, got.Frame)
		assert.Equal(t, int(k), reads.n)
	}
}

type counting struct {
	ram
	n int
}

func (c *counting) Page(f paging.Frame, w bool) ([]byte, func(), error) {
	c.n++
	return c.ram.Page(f, w)
}

func TestModeOf(t *testing.T) {
	const pg, pse, pae, la57, lme, lma, nxe = 1 << 31, 1 << 4, 1 << 5, 1 << 12, 1 << 8, 1 << 10, 1 << 11
	for _, c := range []struct {
		cr0, cr4, efer uint64
		want           paging.Mode
		err            error
	}{
		{pg | 1, 0, 0, paging.Mode{Kind: paging.TwoLevel}, nil},
		{pg | 1, pse, nxe, paging.Mode{Kind: paging.TwoLevel, PSE: true, NXE: true}, nil},
		{pg | 1, pae, 0, paging.Mode{Kind: paging.PAE}, nil},
		{pg | 1, pae | pse | la57, nxe, paging.Mode{Kind: paging.PAE, PSE: true, NXE: true}, nil},
		{0x80050033, 0x3406f0, 0xd01, paging.Mode{Kind: paging.FourLevel, PSE: true, NXE: true}, nil},
		{0x80050033, 0x3416f0, 0xd01, paging.Mode{Kind: paging.FiveLevel, PSE: true, NXE: true}, nil},
		{0x11, pae, lme, paging.Mode{}, paging.ErrPagingOff},
		{0x60000010, 0, 0, paging.Mode{}, paging.ErrPagingOff},
		{pg | 1, 0, lme | lma, paging.Mode{}, paging.ErrMode},
	} {
		got, err := paging.ModeOf(c.cr0, c.cr4, c.efer)
		require.ErrorIs(t, err, c.err)
		assert.Equal(t, c.want, got, "%#x %#x %#x", c.cr0, c.cr4, c.efer)
	}
	for _, m := range []paging.Mode{
		{}, {Kind: 9}, {Kind: paging.FourLevel, PhysBits: 53}, {Kind: paging.FourLevel, PhysBits: 31}, {Kind: paging.PAE, PhysBits: -1},
		{Kind: paging.FourLevel, EncryptMask: 1}, {Kind: paging.FourLevel, EncryptMask: 1 << 52},
		{Kind: paging.TwoLevel, EncryptMask: 1 << 20},
	} {
		mem := paging.New(ram{}, m)
		_, err := mem.Translate(0, 0)
		require.ErrorIs(t, err, paging.ErrMode, "%+v", m)
		_, err = mem.Read(0, 0, make([]byte, 1))
		require.ErrorIs(t, err, paging.ErrMode, "%+v", m)
		for _, err := range mem.Ranges(0, 0, 1, 1) {
			require.ErrorIs(t, err, paging.ErrMode, "%+v", m)
		}
	}
}

// FuzzTranslate walks tables of arbitrary contents: it may fail, but not panic,
// loop, or leave the frames that exist.
func FuzzTranslate(f *testing.F) {
	f.Add([]byte{1, 0x10, 0, 0, 0, 0, 0, 0}, uint64(0), uint64(0xffffffff81000000), byte(2))
	f.Add([]byte{0x67, 0, 0, 0}, uint64(0xfe8), uint64(0xc0000000), byte(0))
	f.Add([]byte{1, 0x20, 0, 0, 0, 0, 0, 0x80}, uint64(0x1fe0), uint64(0xc0000000), byte(1))
	f.Add([]byte{0xff}, ^uint64(0), ^uint64(0), byte(3))
	f.Fuzz(func(t *testing.T, table []byte, cr3, va uint64, kind byte) {
		reads := &counting{ram: ram{}}
		for i := range paging.Frame(4) {
			p := make([]byte, paging.PageSize)
			for j := range p {
				if len(table) > 0 {
					p[j] = table[(j+int(i)*8)%len(table)]
				}
			}
			reads.ram[i] = p
		}
		mode := paging.Mode{Kind: paging.TwoLevel + paging.Kind(kind&3), PSE: kind&4 != 0, NXE: kind&8 != 0, PV: kind&16 != 0}
		m := paging.New(reads, mode)
		tr, err := m.Translate(paging.Root(cr3), paging.VAddr(va))
		require.LessOrEqual(t, reads.n, 5)
		if err == nil && (tr.Offset >= paging.PageSize || tr.Frame >= 1<<40) {
			t.Fatalf("translation %+v", tr)
		}
		var b [16]byte
		n, err := m.Read(paging.Root(cr3), paging.VAddr(va), b[:])
		require.Equal(t, err == nil, n == len(b))
		n, err = m.ReadPhys(paging.PAddr(va), b[:])
		require.Equal(t, err == nil, n == len(b))

		const budget = 12
		reads.n = 0
		last := paging.VAddr(0)
		first := true
		for r, err := range m.Ranges(paging.Root(cr3), paging.VAddr(va&(cr3|0xfff)), ^paging.VAddr(0), budget) {
			if err != nil {
				continue
			}
			require.True(t, first || r.Addr > last, "%v after %v", r.Addr, last)
			require.NotZero(t, r.Size)
			require.GreaterOrEqual(t, r.Last(), r.Addr)
			first, last = false, r.Last()
		}
		require.LessOrEqual(t, reads.n, budget)
		n, _ = m.Store(paging.Root(cr3), paging.VAddr(va), binary.LittleEndian.AppendUint64(nil, va))
		require.LessOrEqual(t, n, 8)
	})
}
