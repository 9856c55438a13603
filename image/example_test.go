package image_test

import (
	"bytes"
	"errors"
	"fmt"
	"slices"

	"github.com/vmprobes/vmprobes/image"
	"github.com/vmprobes/vmprobes/paging"
)

// twoPages is what a hypervisor gives: a guest's frames.
type twoPages struct{}

func (twoPages) Page(f paging.Frame, _ bool) ([]byte, func(), error) {
	p := make([]byte, paging.PageSize)
	copy(p, fmt.Sprintf("frame %d", f))
	return p, func() {}, nil
}

// A file is recognised by its content, and read by physical address or as frames for
// package paging. [image.Open] does the same with a path.
func Example() {
	var file bytes.Buffer
	frames := slices.Values([]image.Range{{First: 16, Count: 2}})
	if err := image.Dump(&file, image.DumpLiME, twoPages{}, frames, nil); err != nil {
		fmt.Println(err)
		return
	}

	m, err := image.New(bytes.NewReader(file.Bytes()), int64(file.Len()), nil)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer m.Close()
	fmt.Println(m.Format(), m.Size())
	for r := range m.Frames() {
		fmt.Println("frames from", r.First, "on:", r.Count)
	}
	b := make([]byte, 8)
	_, err = m.ReadPhys(b, 17*paging.PageSize)
	fmt.Printf("%q %v\n", b, err)
	_, err = m.ReadPhys(b, 0)
	fmt.Println(errors.Is(err, image.ErrAbsent))
	// Output:
	// LiME 8192
	// frames from 16 on: 2
	// "frame 17" <nil>
	// true
}
