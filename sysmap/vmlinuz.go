package sysmap

import (
	"bytes"
	"errors"
	"io"

	"github.com/vmprobes/vmprobes/internal/kimage"
	"github.com/vmprobes/vmprobes/internal/sentinel"
)

// FromVMLinuz reads the symbols of a bzImage, the vmlinuz of x86: it unpacks the
// kernel in it and gives that to FromELF. Payloads packed by gzip, bzip2, lzma, xz,
// lz4 and zstd are read; for LZO the error matches errors.ErrUnsupported.
func FromVMLinuz(r io.ReaderAt, size int64) (*Map, error) {
	img, err := kimage.Kernel(r, size)
	if err != nil {
		return nil, imageErr(err)
	}
	return FromELF(bytes.NewReader(img))
}

// imageErr makes an error about what was read match ErrFormat.
func imageErr(err error) error {
	if errors.Is(err, kimage.ErrNotBootImage) || errors.Is(err, kimage.ErrFormat) || errors.Is(err, kimage.ErrCompression) {
		return sentinel.As(err, ErrFormat)
	}
	return err
}
