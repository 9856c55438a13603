//go:build !linux

package xentest

import "errors"

// ram is the machine's memory. Without memfd, a mapping is a part of it.
type ram struct{ b []byte }

func newRAM(size int) *ram { return &ram{make([]byte, size)} }

func (*ram) free() {}

func (r *ram) mapPages(_ bool, pages []int) ([]byte, error) {
	for i, x := range pages {
		if x != pages[0]+i {
			return nil, errors.ErrUnsupported
		}
	}
	at := pages[0] * pageSize
	return r.b[at : at+len(pages)*pageSize : at+len(pages)*pageSize], nil
}

func unmapPages([]byte) error { return nil }
