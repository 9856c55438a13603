// Package kernelimg takes the ELF kernel out of a compressed x86 Linux boot
// image ("bzImage"). Xen starts an ELF kernel at once, while it needs minutes
// under an emulator to decompress the boot image itself.
package kernelimg

import (
	"bytes"
	"compress/bzip2"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
)

// Offsets into the boot image, from the Linux/x86 boot protocol.
const (
	offSetupSects    = 0x1f1
	offHeaderMagic   = 0x202
	offVersion       = 0x206
	offPayload       = 0x248
	offPayloadLength = 0x24c
	headerEnd        = 0x250
	sectorSize       = 512
	payloadVersion   = 0x0208 // the first protocol version with the payload fields
)

// maxKernel bounds what is accepted as a decompressed kernel.
const maxKernel = 1 << 30

// Errors that callers may want to tell apart.
var (
	// ErrNotBootImage says that the file is no x86 Linux boot image.
	ErrNotBootImage = errors.New("not an x86 Linux boot image")
	// ErrCompression says that the payload's compression is not known here.
	ErrCompression = errors.New("unknown payload compression")
)

// ELF returns the ELF kernel in image, which is the content of a vmlinuz file.
// An image that is an ELF file already is returned as it is.
func ELF(image []byte) ([]byte, error) {
	if isELF(image) {
		return image, nil
	}
	payload, err := Payload(image)
	if err != nil {
		return nil, err
	}
	kernel, err := decompress(payload)
	if err != nil {
		return nil, fmt.Errorf("decompress the kernel: %w", err)
	}
	if !isELF(kernel) {
		return nil, errors.New("the decompressed kernel is not an ELF file")
	}
	return kernel, nil
}

// Payload returns the compressed kernel inside a boot image.
func Payload(image []byte) ([]byte, error) {
	if len(image) < headerEnd || string(image[offHeaderMagic:offHeaderMagic+4]) != "HdrS" {
		return nil, ErrNotBootImage
	}
	if v := binary.LittleEndian.Uint16(image[offVersion:]); v < payloadVersion {
		return nil, fmt.Errorf("%w with a payload (boot protocol %d.%02d)", ErrNotBootImage, v>>8, v&0xff)
	}
	sectors := uint64(image[offSetupSects])
	if sectors == 0 {
		sectors = 4 // what zero means in that field
	}
	start := (sectors+1)*sectorSize + uint64(binary.LittleEndian.Uint32(image[offPayload:]))
	length := uint64(binary.LittleEndian.Uint32(image[offPayloadLength:]))
	if start+length > uint64(len(image)) || length < 4 {
		return nil, fmt.Errorf("truncated boot image: payload of %d bytes at %d in a file of %d", length, start, len(image))
	}
	return image[start : start+length], nil
}

func isELF(b []byte) bool { return bytes.HasPrefix(b, []byte("\x7fELF")) }

func decompress(payload []byte) ([]byte, error) {
	in := bytes.NewReader(payload)
	switch {
	case bytes.HasPrefix(payload, []byte("\x1f\x8b")):
		r, err := gzip.NewReader(in)
		if err != nil {
			return nil, err
		}
		r.Multistream(false) // the kernel's size follows the stream
		return readAll(r)
	case bytes.HasPrefix(payload, []byte("\xfd7zXZ\x00")):
		return unxz(payload)
	case bytes.HasPrefix(payload, []byte("\x28\xb5\x2f\xfd")):
		// The compressor leaves the content size out of the header and the
		// kernel's size behind the frame, so that trailer must not be read.
		r, err := zstd.NewReader(bytes.NewReader(payload[:len(payload)-4]), zstd.WithDecoderMaxMemory(maxKernel), zstd.WithDecoderConcurrency(1))
		if err != nil {
			return nil, err
		}
		defer r.Close()
		return readAll(r)
	case bytes.HasPrefix(payload, []byte("\x02\x21\x4c\x18")):
		return lz4Legacy(payload)
	case bytes.HasPrefix(payload, []byte("BZh")):
		return untilELFEnd(readAll(bzip2.NewReader(in)))
	}
	return nil, fmt.Errorf("%w (starts with % x)", ErrCompression, payload[:4])
}

// untilELFEnd forgives an error behind a whole kernel: the four bytes of
// trailer that follow the stream are no part of it.
func untilELFEnd(kernel []byte, err error) ([]byte, error) {
	if err != nil && isELF(kernel) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return kernel, nil
	}
	return kernel, err
}

func readAll(r io.Reader) ([]byte, error) {
	out, err := io.ReadAll(io.LimitReader(r, maxKernel+1))
	if err == nil && len(out) > maxKernel {
		return nil, fmt.Errorf("larger than %d bytes", maxKernel)
	}
	return out, err
}

// lz4Legacy undoes the legacy LZ4 frame: the magic number, then blocks of up
// to 8 MiB, each with its compressed length before it, then the kernel's size.
func lz4Legacy(payload []byte) ([]byte, error) {
	const blockSize = 8 << 20
	size := uint64(binary.LittleEndian.Uint32(payload[len(payload)-4:]))
	if size > maxKernel {
		return nil, fmt.Errorf("lz4: implausible kernel size %d", size)
	}
	rest := payload[4 : len(payload)-4]
	out := make([]byte, 0, size)
	block := make([]byte, blockSize)
	for len(rest) > 0 {
		if len(rest) < 4 {
			return nil, fmt.Errorf("lz4: %w", io.ErrUnexpectedEOF)
		}
		n := uint64(binary.LittleEndian.Uint32(rest))
		rest = rest[4:]
		if n > uint64(len(rest)) {
			return nil, fmt.Errorf("lz4: %w", io.ErrUnexpectedEOF)
		}
		m, err := lz4.UncompressBlock(rest[:n], block)
		if err != nil {
			return nil, fmt.Errorf("lz4: %w", err)
		}
		out = append(out, block[:m]...)
		rest = rest[n:]
	}
	if uint64(len(out)) != size {
		return nil, fmt.Errorf("lz4: %d bytes instead of %d", len(out), size)
	}
	return out, nil
}
