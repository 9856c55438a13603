package paging_test

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/vmprobes/vmprobes/paging"
)

// frames are a guest's memory, page by page: a [paging.Frames].
type frames map[paging.Frame][]byte

func (r frames) Page(f paging.Frame, _ bool) ([]byte, func(), error) {
	p, ok := r[f]
	if !ok {
		return nil, nil, paging.ErrNoFrame
	}
	return p, func() {}, nil
}

// smallGuest has 4-level tables in its frames 1 to 4, by which the address
// 0xffffffff81000000 is frame 5.
func smallGuest() frames {
	r := frames{}
	for f := range paging.Frame(6) {
		r[f] = make([]byte, paging.PageSize)
	}
	const present, writable = 1, 2
	entry := func(table paging.Frame, index int, to paging.Frame) {
		binary.LittleEndian.PutUint64(r[table][8*index:], uint64(to)<<12|present|writable)
	}
	entry(1, 511, 2)
	entry(2, 510, 3)
	entry(3, 8, 4)
	entry(4, 0, 5)
	copy(r[5], "the guest's kernel")
	return r
}

// A guest's registers say how its tables are walked and where they begin; its
// frames are all else that is needed.
func Example() {
	const cr0, cr3, cr4, efer = 0x80050033, 0x1000, 0x6f0, 0xd01
	mode, err := paging.ModeOf(cr0, cr4, efer)
	if err != nil {
		fmt.Println(err)
		return
	}
	mem := paging.New(smallGuest(), mode)

	b := make([]byte, 18)
	n, err := mem.Read(cr3, 0xffffffff81000000, b)
	fmt.Printf("%q %d %v\n", b, n, err)

	// A read goes as far as it can, and says where it ended.
	n, err = mem.Read(cr3, 0xffffffff81000ffe, b)
	fmt.Println(n, errors.Is(err, paging.ErrNotMapped))
	fmt.Println(err)
	// Output:
	// "the guest's kernel" 18 <nil>
	// 2 true
	// paging: read 0xffffffff81001000 (cr3 0x1000, level-1 table): address not mapped by the guest
}

func ExampleMemory_Translate() {
	mem := paging.New(smallGuest(), paging.Mode{Kind: paging.FourLevel, NXE: true})
	t, err := mem.Translate(0x1000, 0xffffffff81000123)
	fmt.Println(t.Phys(), err)
	// Output: 0x5123 <nil>
}

func ExampleMemory_Ranges() {
	mem := paging.New(smallGuest(), paging.Mode{Kind: paging.FourLevel, NXE: true})
	for r, err := range mem.Ranges(0x1000, 0xffff800000000000, 0xffffffffffffffff, 1000) {
		if err != nil {
			fmt.Println(err)
			return
		}
		fmt.Println(r.Addr, r.Last(), r.Prot)
	}
	// Output: 0xffffffff81000000 0xffffffff81000fff W-X---
}
