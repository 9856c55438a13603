// Package pagetest builds x86 page tables for tests. It shares nothing with
// package paging, which has to read what it builds: bit positions are written
// down once more from Intel SDM vol. 3, chapter 4.
package pagetest

import (
	"encoding/binary"
	"fmt"
)

// A Kind is a shape of page tables, by the number of their levels.
type Kind int

// The kinds.
const (
	TwoLevel  Kind = 2 // 32-bit paging
	PAE       Kind = 3
	FourLevel Kind = 4
	FiveLevel Kind = 5
)

// Flags of a mapping, as they stand in an entry.
const (
	Present  = 1 << 0
	Writable = 1 << 1
	User     = 1 << 2
	Accessed = 1 << 5
	Dirty    = 1 << 6
	Large    = 1 << 7 // PS; set by the builder
	Global   = 1 << 8
	NX       = 1 << 63
)

// A Mapping is one page.
type Mapping struct {
	Virt  uint64
	Phys  uint64
	Level int    // 1: 4 KiB; 2: 2 MiB, or 4 MiB with 2-level tables; 3: 1 GiB
	Flags uint64 // Writable, User, Accessed, Dirty, Global, NX
}

// Size returns the size in bytes of a page at a level.
func (k Kind) Size(level int) uint64 { return 1 << (12 + k.indexBits()*(level-1)) }

// Bits returns the number of bits of a virtual address.
func (k Kind) Bits() int { return map[Kind]int{TwoLevel: 32, PAE: 32, FourLevel: 48, FiveLevel: 57}[k] }

// MaxLevel returns the level of the largest page.
func (k Kind) MaxLevel() int { return map[Kind]int{TwoLevel: 2, PAE: 2, FourLevel: 3, FiveLevel: 3}[k] }

func (k Kind) indexBits() int {
	if k == TwoLevel {
		return 10
	}
	return 9
}

// Tables are page tables in the making.
type Tables struct {
	Kind  Kind
	CR3   uint64
	alloc func() (frame uint64, page []byte)
	pages map[uint64][]byte
	// Grant are the flags of entries that lead to tables.
	Grant uint64
}

// New returns empty tables. The function gives it zeroed frames of 4096 bytes, for
// 2-level tables below 1<<20 and for the top of PAE ones, too.
func New(k Kind, alloc func() (frame uint64, page []byte)) *Tables {
	t := &Tables{Kind: k, alloc: alloc, pages: make(map[uint64][]byte), Grant: Writable | User | Accessed}
	t.CR3 = t.table() << 12
	if k == PAE {
		t.CR3 |= 0xfe0 // the last place in the frame where its 32 bytes fit
	}
	return t
}

func (t *Tables) table() uint64 {
	f, p := t.alloc()
	t.pages[f] = p
	return f
}

// Entry returns the bytes of the entry for virt at a level; it makes the tables
// above it. The caller may set them to anything.
func (t *Tables) Entry(virt uint64, level int) []byte {
	table := t.pages[t.CR3>>12]
	if t.Kind == PAE {
		table = table[0xfe0:]
	}
	for l := int(t.Kind); ; l-- {
		size := 8
		if t.Kind == TwoLevel {
			size = 4
		}
		i := int(virt >> (12 + t.Kind.indexBits()*(l-1)) & (1<<t.Kind.indexBits() - 1))
		e := table[i*size : (i+1)*size]
		if l == level {
			return e
		}
		v := Get(e)
		if v&Present == 0 {
			v = t.table()<<12 | Present | t.Grant
			if t.Kind == PAE && l == 3 {
				v &= ^uint64(0xfff) | Present // its other flags are reserved
			}
			Put(e, v)
		}
		next, ok := t.pages[v&(1<<52-1)>>12]
		if !ok {
			panic(fmt.Sprintf("pagetest: %#x is mapped by a larger page", virt))
		}
		table = next
	}
}

// Map adds a page.
func (t *Tables) Map(m Mapping) {
	v := m.Phys | m.Flags | Present
	if m.Level > 1 {
		v |= Large
		if t.Kind == TwoLevel {
			v = v&(1<<32-1) | m.Phys>>32<<13 // PSE-36
		}
	}
	Put(t.Entry(m.Virt, m.Level), v)
}

// Get reads an entry of four or eight bytes.
func Get(e []byte) uint64 {
	if len(e) == 4 {
		return uint64(binary.LittleEndian.Uint32(e))
	}
	return binary.LittleEndian.Uint64(e)
}

// Put sets an entry of four or eight bytes.
func Put(e []byte, v uint64) {
	if len(e) == 4 {
		binary.LittleEndian.PutUint32(e, uint32(v))
		return
	}
	binary.LittleEndian.PutUint64(e, v)
}
