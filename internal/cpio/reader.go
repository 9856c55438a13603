package cpio

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strconv"
)

// headerSize is that of an entry: a magic number and 13 numbers of eight
// hexadecimal digits (Linux, Documentation/driver-api/early-userspace/buffer-format.rst).
const headerSize = 6 + 13*8

// maxName bounds the length of a name: Linux' own limit for a path (PATH_MAX).
const maxName = 4096

// ErrFormat says that a file is no newc archive.
var ErrFormat = errors.New("cpio: not a newc archive")

// Open returns the content of the file called name in the archive in r. Without
// such a file the error wraps [fs.ErrNotExist].
func Open(r io.ReaderAt, name string) (*io.SectionReader, error) {
	name = clean(name)
	var header [headerSize]byte
	for at := int64(0); ; {
		if _, err := r.ReadAt(header[:], at); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrFormat, err)
		}
		size, err := field(&header, 6)
		if err != nil {
			return nil, err
		}
		length, err := field(&header, 11)
		if err != nil {
			return nil, err
		}
		if length == 0 || length > maxName {
			return nil, fmt.Errorf("%w: a name of %d bytes", ErrFormat, length)
		}
		full := make([]byte, length)
		if _, err := r.ReadAt(full, at+headerSize); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrFormat, err)
		}
		data := aligned(at + headerSize + length)
		switch string(full[:length-1]) {
		case name:
			return io.NewSectionReader(r, data, size), nil
		case "TRAILER!!!":
			return nil, fmt.Errorf("cpio: %s: %w", name, fs.ErrNotExist)
		}
		at = aligned(data + size)
	}
}

// field returns number i of a header.
func field(header *[headerSize]byte, i int) (int64, error) {
	if string(header[:6]) != "070701" {
		return 0, ErrFormat
	}
	n, err := strconv.ParseUint(string(header[6+8*i:14+8*i]), 16, 32)
	if err != nil {
		return 0, fmt.Errorf("%w: %w", ErrFormat, err)
	}
	return int64(n), nil
}

func aligned(n int64) int64 { return (n + 3) &^ 3 }
