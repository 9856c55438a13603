package sysmap

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
	maxVMLinuz  = 1 << 28 // bytes of the file
	maxUnpacked = 1 << 28 // bytes of what is in it
)

// FromVMLinuz reads the symbols of a bzImage, the vmlinuz of x86: it unpacks the
// kernel in it and gives that to FromELF. The payload is found as the boot
// protocol describes (Documentation/arch/x86/boot.rst, payload_offset since
// protocol 2.08, Linux 2.6.26), in older files by the magic number of gzip.
// Payloads packed by gzip, bzip2, lzma, xz, lz4 and zstd are read; for LZO the
// error matches errors.ErrUnsupported.
func FromVMLinuz(r io.ReaderAt, size int64) (*Map, error) {
	if size > maxVMLinuz {
		return nil, formatErr("kernel image of %d bytes", size)
	}
	var head [0x260]byte
	if n, err := r.ReadAt(head[:], 0); err != nil && (err != io.EOF || n < len(head)) {
		if err == io.EOF {
			return nil, formatErr("kernel image of %d bytes", n)
		}
		return nil, fmt.Errorf("reading setup header: %w", err)
	}
	if !isBzImage(head[:]) {
		return nil, formatErr("no bzImage: the setup header's signature is missing")
	}
	sects := int64(head[0x1f1])
	if sects == 0 {
		sects = 4
	}
	kernel := (sects + 1) * 512
	if version := binary.LittleEndian.Uint16(head[0x206:]); version < 0x208 {
		return oldBzImage(r, kernel, size)
	}
	off := kernel + int64(binary.LittleEndian.Uint32(head[0x248:]))
	length := int64(binary.LittleEndian.Uint32(head[0x24c:]))
	if length == 0 || off+length > size {
		return nil, formatErr("bzImage of %d bytes says its payload is %d bytes at %#x: file cut short?", size, length, off)
	}
	payload, err := readAll(io.NewSectionReader(r, off, length), int(length))
	if err != nil {
		return nil, fmt.Errorf("reading payload: %w", err)
	}
	return fromPayload(payload)
}

func isBzImage(head []byte) bool {
	return len(head) >= 0x250 && head[0x1fe] == 0x55 && head[0x1ff] == 0xaa && string(head[0x202:0x206]) == "HdrS"
}

func fromPayload(payload []byte) (*Map, error) {
	img, err := unpack(payload)
	if err != nil {
		return nil, err
	}
	return fromUnpacked(img)
}

func fromUnpacked(img []byte) (*Map, error) {
	if !bytes.HasPrefix(img, []byte(elfMagic)) {
		return nil, formatErr("the kernel image holds no ELF file (before 2.6.26 it does not)")
	}
	return FromELF(bytes.NewReader(img))
}

func oldBzImage(r io.ReaderAt, kernel, size int64) (*Map, error) {
	data, err := readAll(io.NewSectionReader(r, kernel, max(0, size-kernel)), int(max(0, size-kernel)))
	if err != nil {
		return nil, fmt.Errorf("reading bzImage: %w", err)
	}
	lastErr := formatErr("no gzip payload in a bzImage of before 2.6.26")
	for off, tries := 0, 0; tries < 16; tries++ {
		n := bytes.Index(data[off:], []byte("\x1f\x8b\x08"))
		if n < 0 {
			break
		}
		off += n
		img, err := unpack(data[off:])
		if err == nil {
			return fromUnpacked(img)
		}
		lastErr = err
		off++
	}
	return nil, lastErr
}

const elfMagic = "\x7fELF"

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

// packing returns the index in packings of what p starts as, or -1.
func packing(p []byte) int {
	for i := range packings {
		if bytes.HasPrefix(p, []byte(packings[i].magic)) {
			return i
		}
	}
	return -1
}

// unpack decompresses a payload. All formats but gzip (whose trailer has it
// anyway) are followed by the unpacked size in four bytes; it tells the end of
// the data from trailing bytes the format does not know, and spares the
// decompressors allocating more than that for a dictionary.
func unpack(p []byte) ([]byte, error) {
	if bytes.HasPrefix(p, []byte(elfMagic)) {
		return p, nil // CONFIG_KERNEL_UNCOMPRESSED
	}
	i := packing(p)
	if i < 0 {
		return nil, formatErr("payload has no known compression (starts with % x)", p[:min(len(p), 6)])
	}
	f := packings[i]
	if f.unpack == nil {
		return nil, fmt.Errorf("payload is packed by %s: %w; unpack it with another program (lzop) first", f.name, errors.ErrUnsupported)
	}
	size := declaredSize(p)
	limit := maxUnpacked
	if size > 0 && size < limit {
		limit = size
	}
	img, err := f.unpack(p, limit)
	if len(img) > 0 && len(img) == size {
		return img, nil
	}
	if limit < maxUnpacked && (err == nil || errors.Is(err, errLimit)) {
		// What is at the end is no size: not the payload of a bzImage.
		img, err = f.unpack(p, maxUnpacked)
	}
	if err != nil {
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

var errLimit = errors.New("unpacks to too much")

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
		zstd.WithDecoderMaxMemory(maxUnpacked), zstd.WithDecoderLowmem(true))
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
	z, err := lzma.ReaderConfig{DictCap: maxUnpacked}.NewReader(bufio.NewReader(r))
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
