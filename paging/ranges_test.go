package paging_test

import (
	"cmp"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/pagetest"
	"github.com/vmprobes/vmprobes/paging"
)

type found struct {
	r   paging.Range
	err error
}

func list(m *paging.Memory, root paging.Root, first, last paging.VAddr, tables int) (out []found) {
	for r, err := range m.Ranges(root, first, last, tables) {
		out = append(out, found{r, err})
	}
	return out
}

// merge is what Ranges has to find for mappings, page by page.
func merge(k pagetest.Kind, maps map[uint64]pagetest.Mapping, first, last uint64) (out []found) {
	var ms []pagetest.Mapping
	for _, m := range maps {
		m.Virt = canonical(k, m.Virt)
		ms = append(ms, m)
	}
	slices.SortFunc(ms, func(a, b pagetest.Mapping) int { return cmp.Compare(a.Virt, b.Virt) })
	for _, m := range ms {
		lo, hi := max(m.Virt, first), min(m.Virt+k.Size(m.Level)-1, last)
		if lo > hi {
			continue
		}
		p := protOf(m.Flags) & (paging.Writable | paging.User | paging.NoExecute)
		if n := len(out) - 1; n < 0 || out[n].r.Last()+1 != paging.VAddr(lo) || out[n].r.Prot != p {
			out = append(out, found{r: paging.Range{Addr: paging.VAddr(lo), Prot: p}})
		}
		r := &out[len(out)-1].r
		r.Size += hi - lo + 1
		r.Pages[m.Level]++
	}
	return out
}

func TestRangesInvert(t *testing.T) {
	for _, k := range allKinds {
		t.Run(kinds[k].String(), func(t *testing.T) {
			for seed := range uint64(20) {
				r := rand.New(rand.NewPCG(seed, uint64(k)))
				g := newGuest(k)
				maps := randomMappings(r, k, 60)
				// A run of small pages that reaches the end of the address space.
				top := uint64(1)<<k.Bits() - 1
				for b := range maps {
					if top-maps[b].Virt < 1<<30 {
						delete(maps, b)
					}
				}
				for i := range uint64(9) {
					m := pagetest.Mapping{Virt: top&^0xfff - i<<12, Phys: 0x3000, Level: 1, Flags: pagetest.User * (i / 5)}
					maps[top-i] = m
				}
				for _, m := range maps {
					g.tables.Map(m)
				}
				reads := &counting{ram: g.ram}
				mem := paging.New(reads, g.mode())
				got := list(mem, g.root(), 0, ^paging.VAddr(0), 1000)
				require.Equal(t, merge(k, maps, 0, ^uint64(0)), got)
				require.Equal(t, int(g.next-0x1000), reads.n, "each table is read once")
				if k.Bits() > 32 {
					require.Equal(t, ^paging.VAddr(0), got[len(got)-1].r.Last())
				}
				for range 20 {
					first, last := canonical(k, r.Uint64()&top), canonical(k, r.Uint64()&top)
					for _, m := range maps { // often inside a mapping
						if r.IntN(2) == 0 {
							first = canonical(k, m.Virt) + r.Uint64N(k.Size(m.Level))
						}
						break
					}
					require.Equal(t, merge(k, maps, first, last), list(mem, g.root(), paging.VAddr(first), paging.VAddr(last), 1000), "%#x to %#x", first, last)
				}
			}
		})
	}
}

// TestRangesEdges: the hole between the halves is none of the ranges, from either side.
func TestRangesEdges(t *testing.T) {
	g := newGuest(pagetest.FourLevel)
	for _, va := range []uint64{0x7fffffffffff &^ 0xfff, 0x800000000000} {
		g.tables.Map(pagetest.Mapping{Virt: va, Phys: 0x5000, Level: 1})
	}
	mem := paging.New(g.ram, g.mode())
	low := paging.Range{Addr: 0x7ffffffff000, Size: 0x1000, Pages: [4]uint64{1: 1}}
	high := paging.Range{Addr: 0xffff800000000000, Size: 0x1000, Pages: [4]uint64{1: 1}}
	for _, c := range []struct {
		first, last paging.VAddr
		want        []found
	}{
		{0, ^paging.VAddr(0), []found{{r: low}, {r: high}}},
		{0, 0x900000000000, []found{{r: low}}},
		{0x800000000000, ^paging.VAddr(0), []found{{r: high}}},
		{0x900000000000, 0xffff800000000000, []found{{r: paging.Range{Addr: high.Addr, Size: 1, Pages: high.Pages}}}},
		{0x900000000000, 0xa00000000000, nil},
		{0xffff800000001000, 0, nil},
		{5, 4, nil},
	} {
		assert.Equal(t, c.want, list(mem, g.root(), c.first, c.last, 100), "%v to %v", c.first, c.last)
	}
	g = newGuest(pagetest.PAE)
	g.tables.Map(pagetest.Mapping{Virt: 0xffe00000, Level: 2, Flags: pagetest.Writable})
	mem = paging.New(g.ram, g.mode())
	assert.Equal(t, []found{{r: paging.Range{Addr: 0xffe00000, Size: 2 << 20, Prot: paging.Writable, Pages: [4]uint64{2: 1}}}},
		list(mem, g.root(), 0, ^paging.VAddr(0), 100))
	assert.Empty(t, list(mem, g.root(), 1<<32, ^paging.VAddr(0), 100))
}

// TestRangesHostile has tables that lead back to themselves: 512^4 pages.
func TestRangesHostile(t *testing.T) {
	for _, k := range allKinds {
		g := newGuest(k)
		top := g.tables.CR3 >> 12
		page := g.ram[paging.Frame(top)]
		size := len(g.tables.Entry(0, int(k)))
		for off := 0; off < len(page); off += size {
			pagetest.Put(page[off:off+size], top<<12|pagetest.Present)
		}
		reads := &counting{ram: g.ram}
		mem := paging.New(reads, g.mode())
		got := list(mem, g.root(), 0, ^paging.VAddr(0), 100)
		require.NotEmpty(t, got)
		if k == pagetest.TwoLevel || k == pagetest.PAE {
			continue // few enough
		}
		last := got[len(got)-1]
		require.ErrorIs(t, last.err, paging.ErrBudget)
		require.Equal(t, 100, reads.n)
		require.NotZero(t, got[0].r.Size, "what was found before is yielded")
		var e *paging.Error
		require.ErrorAs(t, last.err, &e)
		require.Equal(t, got[len(got)-2].r.Last()+1, e.Addr, "it says how far it came")
	}
	mem := paging.New(ram{}, paging.Mode{Kind: paging.FourLevel})
	for _, budget := range []int{0, -1} {
		got := list(mem, 0, 0, 1, budget)
		require.Len(t, got, 1)
		require.ErrorIs(t, got[0].err, paging.ErrBudget)
	}
}

// TestRangesErrors: entries that can't be used hide nothing behind them.
func TestRangesErrors(t *testing.T) {
	const base = uint64(0xffffffff80000000)
	g := newGuest(pagetest.FourLevel)
	for i := range uint64(4) {
		g.tables.Map(pagetest.Mapping{Virt: base + i<<21, Phys: i << 21, Level: 2})
	}
	pagetest.Put(g.tables.Entry(base+1<<21, 2), 1<<13|pagetest.Large|pagetest.Present)
	pagetest.Put(g.tables.Entry(base+3<<21, 2), 0xdead<<12|pagetest.Present)
	mem := paging.New(g.ram, g.mode())
	got := list(mem, g.root(), paging.VAddr(base), paging.VAddr(base+1<<30-1), 100)
	require.Len(t, got, 4)
	assert.EqualValues(t, base, got[0].r.Addr)
	require.ErrorIs(t, got[1].err, paging.ErrReserved)
	assert.EqualValues(t, base+2<<21, got[2].r.Addr)
	require.ErrorIs(t, got[3].err, paging.ErrNoFrame)
	for i, want := range map[int]struct {
		at    paging.VAddr
		level int
	}{1: {paging.VAddr(base + 1<<21), 2}, 3: {paging.VAddr(base + 3<<21), 1}} {
		var e *paging.Error
		require.ErrorAs(t, got[i].err, &e)
		assert.Equal(t, want.at, e.Addr)
		assert.Equal(t, want.level, e.Level)
	}
	for range mem.Ranges(g.root(), paging.VAddr(base), paging.VAddr(base+1<<30-1), 100) {
		break // and it calls no more
	}
}
