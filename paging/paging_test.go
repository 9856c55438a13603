package paging_test

import (
	"errors"

	"github.com/vmprobes/vmprobes/internal/pagetest"
	"github.com/vmprobes/vmprobes/paging"
)

// ram is guest memory in a map; frames that aren't in it don't exist. It is a
// Frames and a Mapper.
type ram map[paging.Frame][]byte

var errNoFrame = errors.New("no such frame")

func (r ram) Page(f paging.Frame, _ bool) ([]byte, func(), error) {
	if p, ok := r[f]; ok {
		return p, func() {}, nil
	}
	return nil, nil, errNoFrame
}

func (r ram) Map(f paging.Frame, _ bool) ([]byte, func() error, error) {
	if p, ok := r[f]; ok {
		return p, func() error { return nil }, nil
	}
	return nil, nil, errNoFrame
}

// guest is memory with page tables in it.
type guest struct {
	ram    ram
	next   uint64
	tables *pagetest.Tables
}

func newGuest(k pagetest.Kind) *guest {
	g := &guest{ram: ram{}, next: 0x1000}
	g.tables = pagetest.New(k, func() (uint64, []byte) {
		f := g.frame()
		return f, g.ram[paging.Frame(f)]
	})
	return g
}

// frame adds a frame to the memory.
func (g *guest) frame() uint64 {
	g.next++
	g.ram[paging.Frame(g.next)] = make([]byte, paging.PageSize)
	return g.next
}

var kinds = map[pagetest.Kind]paging.Kind{
	pagetest.TwoLevel: paging.TwoLevel, pagetest.PAE: paging.PAE,
	pagetest.FourLevel: paging.FourLevel, pagetest.FiveLevel: paging.FiveLevel,
}

func (g *guest) mode() paging.Mode {
	return paging.Mode{Kind: kinds[g.tables.Kind], PSE: true, NXE: true}
}

// root is the CR3 with flags that have to be ignored: PCD and PWT, and in long
// mode a PCID and no-flush.
func (g *guest) root() paging.Root {
	flags := uint64(0x18)
	if g.tables.Kind >= pagetest.FourLevel {
		flags = 1<<63 | 0xabc
	}
	return paging.Root(g.tables.CR3 | flags)
}
