package paging_test

import (
	"testing"

	"github.com/vmprobes/vmprobes/internal/pagetest"
	"github.com/vmprobes/vmprobes/paging"
)

// BenchmarkRead8 reads eight bytes by virtual address through 4-level tables,
// all frames being in a Cache: five pages are looked up. Run it with -cpu 1,2.
func BenchmarkRead8(b *testing.B) {
	const va = 0xffff888000001000
	g := newGuest(pagetest.FourLevel)
	g.tables.Map(pagetest.Mapping{Virt: va, Phys: g.frame() << 12, Level: 1})
	c := paging.NewCache(g.ram, 512, 0)
	defer c.Close()
	m := paging.New(c, g.mode())
	// Frames of others, so that the index has some size.
	for range 400 {
		m.ReadPhys(paging.PAddr(g.frame()<<12), make([]byte, 8))
	}
	before := c.Stats()
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		var buf [8]byte
		for pb.Next() {
			if _, err := m.Read(g.root(), va+8, buf[:]); err != nil {
				b.Error(err)
				return
			}
		}
	})
	st := c.Stats()
	b.ReportMetric(float64(st.Hits-before.Hits)/float64(b.N), "pages/op")
	b.ReportMetric(float64(st.Maps-before.Maps)/float64(b.N), "maps/op")
}

// BenchmarkRanges lists a kernel image of 40 MiB in pages of 4 KiB.
func BenchmarkRanges(b *testing.B) {
	const base = 0xffffffff81000000
	g := newGuest(pagetest.FourLevel)
	for off := uint64(0); off < 40<<20; off += paging.PageSize {
		g.tables.Map(pagetest.Mapping{Virt: base + off, Phys: off, Level: 1})
	}
	c := paging.NewCache(g.ram, 512, 0)
	defer c.Close()
	m := paging.New(c, g.mode())
	b.ReportAllocs()
	for b.Loop() {
		for r, err := range m.Ranges(g.root(), 0xffffffff80000000, 0xffffffffbfffffff, 600) {
			if err != nil || r.Size != 40<<20 {
				b.Fatal(r, err)
			}
		}
	}
	b.ReportMetric(float64(c.Stats().Hits+c.Stats().Maps)/float64(b.N), "tables/op")
}
