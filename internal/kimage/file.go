package kimage

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
)

// Open opens the ELF kernel in a file: a vmlinux, which may be packed or have debug
// information, or a vmlinuz. The errors are those of this package, or *fs.PathError.
func Open(path string) (io.ReaderAt, io.Closer, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, nil, err
	}
	r, err := open(f)
	if err != nil {
		return nil, nil, errors.Join(err, f.Close())
	}
	return r, f, nil
}

func open(f *os.File) (io.ReaderAt, error) {
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() {
		return nil, fmt.Errorf("%w: it isn't a regular file", ErrNotBootImage)
	}
	head := make([]byte, HeaderSize)
	n, err := f.ReadAt(head, 0)
	if err != nil && err != io.EOF {
		return nil, err
	}
	switch head = head[:n]; {
	case IsELF(head):
		return f, nil // debug information is larger than anything that is unpacked
	case IsBootImage(head):
		b, err := Kernel(f, st.Size())
		return bytes.NewReader(b), err
	case !Packed(head):
		return nil, fmt.Errorf("%w: it is no ELF file either", ErrNotBootImage)
	case st.Size() > MaxFile:
		return nil, fmt.Errorf("%w: %d bytes", ErrFormat, st.Size())
	}
	p := make([]byte, st.Size())
	if _, err := f.ReadAt(p, 0); err != nil {
		return nil, err
	}
	b, err := unpackKernel(p)
	return bytes.NewReader(b), err
}
