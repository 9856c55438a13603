package sysmap

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
)

// benchSymbols is the number of symbols of Debian's 6.12.
const benchSymbols = 163205

// benchMemory is the memory of the first kernel of VMPROBES_TEST_VMLINUZ, or else
// of one made up with as many symbols as 6.12.
var benchMemory = sync.OnceValues(func() (*testMemory, []Range) {
	if files := filepath.SplitList(os.Getenv("VMPROBES_TEST_VMLINUZ")); len(files) > 0 {
		img, err := vmlinux(files[0])
		if err != nil {
			panic(err)
		}
		return vmlinuxMemory(img)
	}
	for _, l := range layouts {
		if l.name == "6.4 x86_64" {
			m, ranges, _ := kernelMemory(l, 1, benchSymbols)
			return m, ranges
		}
	}
	panic("no such layout")
})

func benchMap(b *testing.B) *Map {
	m, ranges := benchMemory()
	k, _, err := FromMemory(context.Background(), m, ranges)
	if err != nil {
		b.Fatal(err)
	}
	return k
}

func BenchmarkFromMemory(b *testing.B) {
	m, ranges := benchMemory()
	b.ReportAllocs()
	for b.Loop() {
		k, t, err := FromMemory(context.Background(), m, ranges)
		if err != nil {
			b.Fatal(err)
		}
		b.ReportMetric(float64(t.Pages), "pages")
		b.ReportMetric(float64(k.Len()), "symbols")
	}
}

// BenchmarkIndex is what the first Lookup and the first Find cost on top.
func BenchmarkIndex(b *testing.B) {
	data, err := benchMap(b).MarshalBinary()
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		b.StopTimer()
		m, err := UnmarshalMap(data)
		if err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
		m.t.index()
		m.t.places()
	}
}

func BenchmarkBinary(b *testing.B) {
	m := benchMap(b)
	data, err := m.MarshalBinary()
	if err != nil {
		b.Fatal(err)
	}
	b.Run("marshal", func(b *testing.B) {
		b.ReportAllocs()
		b.ReportMetric(float64(len(data)), "bytes")
		for b.Loop() {
			if _, err := m.MarshalBinary(); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("unmarshal", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := UnmarshalMap(data); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// moduleSymbols invents what With takes: n symbols of 12 modules.
func moduleSymbols(n int) []Symbol {
	var syms []Symbol
	for i := range n {
		syms = append(syms, Symbol{
			Addr: 0xffffffffc0200000 + uint64(i/(n/12+1))<<16 + uint64(i)*32,
			Type: 't', Name: fmt.Sprintf("mod_function_%d", i), Module: fmt.Sprintf("mod%d", i/(n/12+1)),
		})
	}
	return syms
}

// benchViews are the kinds of maps that lookups are measured on.
func benchViews(b *testing.B) map[string]*Map {
	m := benchMap(b)
	slid := m.Slide(0x1e000000)
	return map[string]*Map{"plain": m, "slid": slid, "modules": slid.With(moduleSymbols(8000))}
}

// benchEach runs find on a thousand of all in turn, as a program would that comes back
// to the same ones, and on all of them in a random order, where memory is slow.
func benchEach[T any](b *testing.B, name string, all []T, find func(T) bool) {
	rand.New(rand.NewPCG(1, 1)).Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	for _, n := range []int{1000, len(all)} {
		b.Run(fmt.Sprintf("%s/%d", name, n), func(b *testing.B) {
			i := 0
			b.ReportAllocs()
			for b.Loop() {
				if !find(all[i]) {
					b.Fatalf("%v not found", all[i])
				}
				if i++; i == n {
					i = 0
				}
			}
		})
	}
}

func BenchmarkLookup(b *testing.B) {
	for name, m := range benchViews(b) {
		var names []string
		for s := range m.All() {
			if _, err := m.Lookup(s.Name); err == nil {
				names = append(names, s.Name)
			}
		}
		benchEach(b, name, names, func(s string) bool {
			_, err := m.Lookup(s)
			return err == nil
		})
	}
}

func BenchmarkFind(b *testing.B) {
	for name, m := range benchViews(b) {
		var addrs []uint64
		for s := range m.All() {
			if _, _, ok := m.Find(s.Addr + 5); ok {
				addrs = append(addrs, s.Addr+5)
			}
		}
		benchEach(b, name, addrs, func(a uint64) bool {
			_, _, ok := m.Find(a)
			return ok
		})
	}
}

func BenchmarkWith(b *testing.B) {
	m := benchMap(b)
	syms := moduleSymbols(8000)
	b.ReportAllocs()
	for b.Loop() {
		m.With(syms)
	}
}

// BenchmarkFootprint reports the memory of a map, fresh and with its indices.
func BenchmarkFootprint(b *testing.B) {
	data, err := benchMap(b).MarshalBinary()
	if err != nil {
		b.Fatal(err)
	}
	heap := func() float64 {
		var s runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&s)
		return float64(s.HeapAlloc)
	}
	for b.Loop() {
		before := heap()
		m, err := UnmarshalMap(data)
		if err != nil {
			b.Fatal(err)
		}
		fresh := heap()
		m.t.index()
		m.t.places()
		full := heap()
		b.ReportMetric(fresh-before, "fresh-bytes")
		b.ReportMetric(full-before, "indexed-bytes")
		runtime.KeepAlive(m)
	}
}
