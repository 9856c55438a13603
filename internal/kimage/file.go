package kimage

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
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

// ntGNUBuildID is the type of the note that holds a build id (NT_GNU_BUILD_ID).
const ntGNUBuildID = 3

// BuildID returns the build id among ELF notes, in hexadecimal digits, or "".
func BuildID(notes []byte) string {
	for len(notes) >= 12 {
		name, desc, typ := binary.LittleEndian.Uint32(notes), binary.LittleEndian.Uint32(notes[4:]), binary.LittleEndian.Uint32(notes[8:])
		notes = notes[12:]
		n, d := (uint64(name)+3)&^3, (uint64(desc)+3)&^3
		if n+d > uint64(len(notes)) {
			return ""
		}
		if typ == ntGNUBuildID && bytes.Equal(notes[:name], []byte("GNU\x00")) && desc > 0 && desc <= 64 {
			return hex.EncodeToString(notes[n : n+uint64(desc)])
		}
		notes = notes[n+d:]
	}
	return ""
}
