// Package kimage takes the ELF kernel out of a boot image as installed in /boot: a
// bzImage, the vmlinuz of x86. The input may come from anybody: what it unpacks to
// is bounded.
package kimage

import (
	"bufio"
	"bytes"
	"compress/bzip2"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/ulikunitz/xz/lzma"
)

const (
	// MaxFile bounds the file, and MaxKernel what is in it, in bytes. The largest
	// seen have 15 MB and 66 MB.
	MaxFile   = 1 << 28
	MaxKernel = 1 << 28

	// HeaderSize is how much of a file IsBootImage looks at.
	HeaderSize = 0x250

	// ELFMagic is how an ELF file begins.
	ELFMagic = "\x7fELF"
)

var (
	// ErrNotBootImage means that a file is not a bzImage with a kernel in it.
	ErrNotBootImage = errors.New("not an x86 Linux boot image")
	// ErrFormat means that a file is damaged, cut short or too large.
	ErrFormat = errors.New("damaged boot image")
	// ErrCompression means that a payload's compression, or a filter in it, can't be
	// read. If it is a known one the error also matches errors.ErrUnsupported.
	ErrCompression = errors.New("unreadable compression")

	errUnsupported = fmt.Errorf("%w: %w", ErrCompression, errors.ErrUnsupported)
)

// IsELF reports whether p begins like an ELF file.
func IsELF(p []byte) bool { return bytes.HasPrefix(p, []byte(ELFMagic)) }

// IsBootImage reports whether the first HeaderSize bytes of a file are those of a
// bzImage: the boot sector's signature and that of the setup header
// (Documentation/arch/x86/boot.rst).
func IsBootImage(head []byte) bool {
	return len(head) >= HeaderSize && head[0x1fe] == 0x55 && head[0x1ff] == 0xaa && string(head[0x202:0x206]) == "HdrS"
}

// Kernel unpacks the ELF kernel in a bzImage of size bytes. The payload is where the
// setup header says (payload_offset, since protocol 2.08 of Linux 2.6.26); in older
// files it is found by the magic number of gzip. Payloads packed by gzip, bzip2,
// lzma, xz, lz4 and zstd are read.
//
// The errors are those of this package, or r's.
func Kernel(r io.ReaderAt, size int64) ([]byte, error) {
	if size > MaxFile {
		return nil, fmt.Errorf("%w: %d bytes", ErrFormat, size)
	}
	var head [HeaderSize]byte
	if n, err := r.ReadAt(head[:], 0); n < len(head) {
		if err == io.EOF {
			return nil, fmt.Errorf("%w: file of %d bytes", ErrNotBootImage, n)
		}
		return nil, fmt.Errorf("reading setup header: %w", err)
	}
	if !IsBootImage(head[:]) {
		return nil, fmt.Errorf("%w: the setup header's signature is missing", ErrNotBootImage)
	}
	sects := int64(head[0x1f1])
	if sects == 0 {
		sects = 4
	}
	kernel := (sects + 1) * 512
	if version := binary.LittleEndian.Uint16(head[0x206:]); version < 0x208 {
		return oldKernel(r, kernel, size)
	}
	off := kernel + int64(binary.LittleEndian.Uint32(head[0x248:]))
	length := int64(binary.LittleEndian.Uint32(head[0x24c:]))
	if length == 0 || off+length > size {
		return nil, fmt.Errorf("%w: truncated: %d bytes, and its payload is %d bytes at %#x", ErrFormat, size, length, off)
	}
	payload := make([]byte, length)
	if n, err := r.ReadAt(payload, off); n < len(payload) {
		return nil, fmt.Errorf("reading payload: %w", err)
	}
	return unpackKernel(payload)
}

func unpackKernel(payload []byte) ([]byte, error) {
	img, err := Unpack(payload)
	if err != nil {
		return nil, err
	}
	if !IsELF(img) {
		return nil, fmt.Errorf("%w: its payload is not an ELF file (nor is that of any kernel before 2.6.26)", ErrNotBootImage)
	}
	return img, nil
}

func oldKernel(r io.ReaderAt, kernel, size int64) ([]byte, error) {
	data := make([]byte, max(0, size-kernel))
	if n, err := r.ReadAt(data, kernel); n < len(data) {
		return nil, fmt.Errorf("reading boot image: %w", err)
	}
	lastErr := fmt.Errorf("%w: no gzip payload found (an image from before Linux 2.6.26 says no more)", ErrNotBootImage)
	for off, tries := 0, 0; tries < 16; tries++ {
		n := bytes.Index(data[off:], []byte("\x1f\x8b\x08"))
		if n < 0 {
			break
		}
		off += n
		img, err := unpackKernel(data[off:])
		if err == nil {
			return img, nil
		}
		lastErr = err
		off++
	}
	return nil, lastErr
}

// The compressions scripts/Makefile.lib has rules for, by their magic numbers
// (the list of lib/decompress.c).
var packings = []struct {
	magic, name string
	unpack      func(p []byte, limit int) ([]byte, error)
}{
	{"\x1f\x8b", "gzip", unpackGzip},
	{"\xfd7zXZ\x00", "xz", unpackXZ},
	{"\x28\xb5\x2f\xfd", "zstd", unpackZstd},
	{"\x02\x21\x4c\x18", "lz4", unpackLZ4},
	{"\x5d\x00\x00", "lzma", unpackLZMA},
	{"BZh", "bzip2", unpackBzip2},
	{"\x89LZO", "lzo", nil},
}

// Packed reports whether p begins like one of the formats that Unpack knows.
func Packed(p []byte) bool { return packing(p) >= 0 }

// packing returns the index in packings of what p starts as, or -1.
func packing(p []byte) int {
	for i := range packings {
		if bytes.HasPrefix(p, []byte(packings[i].magic)) {
			return i
		}
	}
	return -1
}

// Unpack decompresses a payload, or any file of one of these formats. It returns an
// ELF file as it is. All formats but gzip (whose trailer has it anyway) are followed
// by the unpacked size in four bytes; it tells the end of the data from trailing
// bytes the format does not know, and spares the decompressors allocating more than
// that for a dictionary.
func Unpack(p []byte) ([]byte, error) {
	if IsELF(p) {
		return p, nil // CONFIG_KERNEL_UNCOMPRESSED
	}
	i := packing(p)
	if i < 0 {
		return nil, fmt.Errorf("%w: unknown compression (starts with % x)", ErrCompression, p[:min(len(p), 6)])
	}
	f := packings[i]
	if f.unpack == nil {
		return nil, fmt.Errorf("%w: packed by %s: unpack it with another program (lzop) first", errUnsupported, f.name)
	}
	size := declaredSize(p)
	limit := MaxKernel
	if size > 0 && size < limit {
		limit = size
	}
	img, err := f.unpack(p, limit)
	if len(img) > 0 && len(img) == size {
		return img, nil
	}
	if limit < MaxKernel && (err == nil || errors.Is(err, errLimit)) {
		// The last four bytes are not a size, so this is not the payload of a
		// bzImage.
		img, err = f.unpack(p, MaxKernel)
	}
	switch {
	case errors.Is(err, ErrCompression):
		return nil, err
	case err != nil:
		return nil, fmt.Errorf("%w: %s payload: %w", ErrFormat, f.name, err)
	}
	return img, nil
}

func declaredSize(p []byte) int {
	if len(p) < 4 {
		return 0
	}
	return int(binary.LittleEndian.Uint32(p[len(p)-4:]))
}

var errLimit = errors.New("unpacks to more than is allowed")

// drain reads r to its end, at most limit bytes. With an error it also returns
// what came before.
func drain(r io.Reader, limit int) ([]byte, error) {
	var b bytes.Buffer
	n, err := b.ReadFrom(io.LimitReader(r, int64(limit)))
	if err == nil && n == int64(limit) {
		var one [1]byte
		if k, _ := io.ReadFull(r, one[:]); k > 0 {
			err = errLimit
		}
	}
	return b.Bytes(), err
}

func unpackGzip(p []byte, limit int) ([]byte, error) {
	z, err := gzip.NewReader(bytes.NewReader(p))
	if err != nil {
		return nil, err
	}
	z.Multistream(false) // relocations of old kernels may follow
	return drain(z, limit)
}

func unpackBzip2(p []byte, limit int) ([]byte, error) {
	return drain(bzip2.NewReader(bytes.NewReader(p)), limit)
}

func unpackZstd(p []byte, limit int) ([]byte, error) {
	z, err := zstd.NewReader(bytes.NewReader(p), zstd.WithDecoderConcurrency(1),
		zstd.WithDecoderMaxWindow(1<<28), // the kernel uses 1<<27, zstd --ultra -22
		zstd.WithDecoderMaxMemory(MaxKernel), zstd.WithDecoderLowmem(true))
	if err != nil {
		return nil, err
	}
	defer z.Close()
	return drain(z, limit)
}

func unpackLZMA(p []byte, limit int) ([]byte, error) {
	if len(p) < lzma.HeaderLen {
		return nil, io.ErrUnexpectedEOF
	}
	// No dictionary needs to be larger than what it unpacks to.
	head := bytes.Clone(p[:lzma.HeaderLen])
	if dict := binary.LittleEndian.Uint32(head[1:]); uint64(dict) > uint64(limit) {
		binary.LittleEndian.PutUint32(head[1:], uint32(max(limit, lzma.MinDictCap)))
	}
	r := io.MultiReader(bytes.NewReader(head), bytes.NewReader(p[lzma.HeaderLen:]))
	z, err := lzma.ReaderConfig{DictCap: MaxKernel}.NewReader(bufio.NewReader(r))
	if err != nil {
		return nil, err
	}
	return drain(z, limit)
}

// unpackLZ4 reads the "legacy" frame of lz4 -l, which is what the kernel uses
// (lib/decompress_unlz4.c): blocks of at most 8 MiB, each after its length. No end
// mark; the four bytes of the size may follow.
func unpackLZ4(p []byte, limit int) ([]byte, error) {
	const block = 8 << 20
	const magic = 0x184c2102
	out := make([]byte, 0, min(limit, 4*len(p)))
	var buf []byte
	for p = p[4:]; len(p) > 4; {
		n := binary.LittleEndian.Uint32(p)
		p = p[4:]
		if n == magic {
			continue // concatenated frames
		}
		if n == 0 {
			break
		}
		if uint64(n) > uint64(len(p)) {
			return out, io.ErrUnexpectedEOF
		}
		if buf == nil {
			buf = make([]byte, block)
		}
		k, err := lz4.UncompressBlock(p[:n], buf)
		if err != nil {
			return out, err
		}
		if len(out)+k > limit {
			return out, errLimit
		}
		out = append(out, buf[:k]...)
		p = p[n:]
	}
	return out, nil
}
