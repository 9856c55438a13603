package ktype

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/bzip2"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"

	"github.com/vmprobes/vmprobes/internal/kimage"
)

// maxUnpacked bounds what a compressed ELF file unpacks to; a vmlinux with DWARF
// has 600 MB.
const maxUnpacked = 1 << 30

// ParseFile reads a file of any kind the package knows, and finds out itself
// which: raw BTF (/sys/kernel/btf/vmlinux), an ELF vmlinux with BTF or DWARF, or
// an ISF file of Volatility; each also packed by gzip, xz or zstd, or in a tar
// archive as the only file, as BTFHub has them.
//
// A vmlinuz must be unpacked first.
func ParseFile(path string) (*Types, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // only read from
	t, err := parseOpen(f)
	if err != nil {
		var pe *os.PathError
		if errors.As(err, &pe) {
			return nil, err
		}
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return t, nil
}

func parseOpen(f *os.File) (*Types, error) {
	var head [kimage.HeaderSize]byte
	n, err := f.ReadAt(head[:], 0)
	if err != nil && err != io.EOF {
		return nil, err
	}
	switch {
	case kimage.IsELF(head[:n]):
		return FromELF(f)
	case kimage.IsBootImage(head[:n]):
		info, err := f.Stat()
		if err != nil {
			return nil, err
		}
		return FromVMLinuz(f, info.Size())
	}
	r, closer, err := unpack(f, maxUnpacked)
	if err != nil {
		return nil, err
	}
	defer closer()
	return parseStream(bufio.NewReader(r), true)
}

// parseStream reads unpacked data; archives only at the top.
func parseStream(r *bufio.Reader, archive bool) (*Types, error) {
	head, err := r.Peek(512)
	if err != nil && err != io.EOF {
		return nil, readErr("unpacking", err)
	}
	trimmed := bytes.TrimLeft(head, " \t\r\n")
	switch {
	case len(head) == 0:
		return nil, formatErr("empty")
	case bytes.HasPrefix(head, []byte{btfMagic & 0xff, btfMagic >> 8}):
		data, err := readMost(r, maxBTF)
		if err != nil {
			return nil, err
		}
		return FromBTF(bytes.NewReader(data), int64(len(data)))
	case kimage.IsELF(head):
		data, err := readMost(r, maxUnpacked)
		if err != nil {
			return nil, err
		}
		return FromELF(bytes.NewReader(data))
	case bytes.HasPrefix(trimmed, []byte("{")):
		return FromISF(r)
	case archive && len(head) > 262 && string(head[257:262]) == "ustar":
		return parseTar(r)
	case bytes.HasPrefix(head, []byte("MZ")):
		return nil, formatErr("a PE file, but no bzImage (a unified kernel image? extract its .linux section)")
	}
	return nil, formatErr("neither BTF, nor ELF, nor an ISF file: it starts with % x", head[:min(len(head), 8)])
}

// parseTar reads the first regular file of an archive.
func parseTar(r io.Reader) (*Types, error) {
	const most = 16 // entries before it
	a := tar.NewReader(r)
	for range most {
		h, err := a.Next()
		if err != nil {
			return nil, formatErr("tar archive: %v", err)
		}
		if h.Typeflag == tar.TypeReg {
			t, err := parseStream(bufio.NewReader(a), false)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", clip(h.Name), err)
			}
			return t, nil
		}
	}
	return nil, formatErr("tar archive without a file")
}

// readMost reads all of r, which must not have more than limit bytes.
func readMost(r io.Reader, limit int64) ([]byte, error) {
	var b bytes.Buffer
	n, err := b.ReadFrom(io.LimitReader(r, limit+1))
	if err != nil {
		return nil, readErr("unpacking", err)
	}
	if n > limit {
		return nil, formatErr("more than %d bytes", limit)
	}
	return b.Bytes(), nil
}

// unpack returns a reader of at most limit bytes of what is in r, unpacked if it is
// packed, and a function that frees the reader.
func unpack(r io.Reader, limit int64) (io.Reader, func(), error) {
	br := bufio.NewReader(r)
	head, err := br.Peek(6)
	if err != nil && err != io.EOF {
		return nil, nil, fmt.Errorf("reading: %w", err)
	}
	var out io.Reader = br
	free := func() {}
	switch {
	case bytes.HasPrefix(head, []byte{0x1f, 0x8b}):
		out, err = gzip.NewReader(br)
	case bytes.HasPrefix(head, []byte("BZh")):
		out = bzip2.NewReader(br)
	case bytes.HasPrefix(head, []byte("\xfd7zXZ\x00")):
		out, err = xz.ReaderConfig{DictCap: maxDict}.NewReader(br)
	case bytes.HasPrefix(head, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		var z *zstd.Decoder
		z, err = zstd.NewReader(br, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxDict))
		if err == nil {
			out, free = z, z.Close
		}
	default:
		err = nil
	}
	if err != nil {
		return nil, nil, formatErr("unpacking: %v", err)
	}
	return &limitReader{r: out, left: limit}, free, nil
}

// maxDict bounds the memory of decompressors.
const maxDict = 128 << 20

// limitReader fails where there is more than the limit, and marks what is wrong
// with the data as ErrFormat.
type limitReader struct {
	r    io.Reader
	left int64
}

func (l *limitReader) Read(p []byte) (int, error) {
	if l.left < 0 {
		return 0, formatErr("unpacks to more than is allowed")
	}
	n, err := l.r.Read(p[:min(int64(len(p)), l.left+1)])
	if l.left -= int64(n); l.left < 0 {
		return n, formatErr("unpacks to more than is allowed")
	}
	var pe *os.PathError
	if err != nil && err != io.EOF && !errors.As(err, &pe) {
		err = formatErr("unpacking: %v", err)
	}
	return n, err
}
