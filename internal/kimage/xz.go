package kimage

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"hash/crc64"
	"io"

	"github.com/ulikunitz/xz/lzma"
)

// The container of .xz files, after the format's description (xz-file-format.txt,
// public domain). The xz package reads no file with a filter besides LZMA2, but
// the kernel's scripts/xz_wrap.sh always adds the one for x86 code.

var errXZ = errors.New("malformed xz")

const (
	xzX86   = 0x04
	xzLZMA2 = 0x21
)

// unpackXZ reads the blocks of one stream. The index at its end is not looked at,
// the checksum of each block is.
func unpackXZ(p []byte, limit int) ([]byte, error) {
	if len(p) < 12 || crc32.ChecksumIEEE(p[6:8]) != binary.LittleEndian.Uint32(p[8:]) || p[6] != 0 {
		return nil, fmt.Errorf("%w: stream header", errXZ)
	}
	check := p[7]
	if check > 15 {
		return nil, fmt.Errorf("%w: stream header", errXZ)
	}
	checkSize := [16]int{0, 4, 4, 4, 8, 8, 8, 16, 16, 16, 32, 32, 32, 64, 64, 64}[check]
	var out []byte
	for off := 12; ; {
		if off >= len(p) {
			return out, io.ErrUnexpectedEOF
		}
		if p[off] == 0 {
			return out, nil // the index
		}
		x86, dict, size, err := xzBlockHeader(p[off:])
		if err != nil {
			return out, err
		}
		body := bytes.NewReader(p[off+size:])
		// No dictionary needs to be larger than what it unpacks to.
		z, err := lzma.Reader2Config{DictCap: int(max(min(dict, uint64(limit)), lzma.MinDictCap))}.NewReader2(body)
		if err != nil {
			return out, err
		}
		block, err := drain(z, limit-len(out))
		if err != nil {
			return out, err
		}
		if x86 {
			unfilterX86(block)
		}
		used := len(p) - off - size - body.Len()
		off += size + (used+3)&^3
		if off+checkSize > len(p) {
			return out, io.ErrUnexpectedEOF
		}
		sum := p[off : off+checkSize]
		ok := true
		switch check {
		case 1:
			ok = binary.LittleEndian.Uint32(sum) == crc32.ChecksumIEEE(block)
		case 4:
			ok = binary.LittleEndian.Uint64(sum) == crc64.Checksum(block, crc64.MakeTable(crc64.ECMA))
		case 10:
			h := sha256.Sum256(block)
			ok = bytes.Equal(sum, h[:])
		}
		if !ok {
			return out, fmt.Errorf("%w: checksum", errXZ)
		}
		off += checkSize
		out = append(out, block...)
	}
}

// xzBlockHeader accepts the filter chains LZMA2 and x86 + LZMA2.
func xzBlockHeader(p []byte) (x86 bool, dict uint64, size int, err error) {
	bad := fmt.Errorf("%w: block header", errXZ)
	size = (int(p[0]) + 1) * 4
	if size > len(p) || crc32.ChecksumIEEE(p[:size-4]) != binary.LittleEndian.Uint32(p[size-4:]) {
		return false, 0, 0, bad
	}
	flags := p[1]
	h := p[2 : size-4]
	vli := func() (v uint64) {
		for i := range 9 {
			if len(h) == 0 {
				err = bad
				return 0
			}
			c := h[0]
			h = h[1:]
			v |= uint64(c&0x7f) << (7 * i)
			if c < 0x80 {
				return v
			}
		}
		err = bad
		return 0
	}
	if flags&0x40 != 0 {
		vli() // compressed size
	}
	if flags&0x80 != 0 {
		vli() // unpacked size
	}
	n := int(flags&3) + 1
	for i := range n {
		id, props := vli(), vli()
		if err != nil || props > uint64(len(h)) {
			return false, 0, 0, bad
		}
		prop := h[:props]
		h = h[props:]
		switch {
		case id == xzX86 && i == 0 && n == 2 && (len(prop) == 0 || len(prop) == 4 && binary.LittleEndian.Uint32(prop) == 0):
			x86 = true
		case id == xzLZMA2 && i == n-1 && len(prop) == 1 && prop[0] <= 40:
			if prop[0] == 40 {
				dict = 1<<32 - 1
			} else {
				dict = uint64(2|prop[0]&1) << (prop[0]/2 + 11)
			}
		default:
			return false, 0, 0, fmt.Errorf("%w: xz filter %#x", errUnsupported, id)
		}
	}
	return x86, dict, size, nil
}

// unfilterX86 undoes, in place, what the x86 filter of LZMA and xz does to a whole
// block: it replaces the relative targets of CALL and JMP (e8, e9) by absolute ones,
// as those repeat. Only operands whose top byte is 00 or ff are touched, and those
// only if no opcode shortly before makes it doubtful that this one is an opcode. (The
// filter is Igor Pavlov's, in the public domain as part of the LZMA SDK.)
func unfilterX86(b []byte) {
	sign := func(c byte) bool { return c == 0x00 || c == 0xff }
	// recent has a bit for each of the last three bytes that looked like an
	// opcode and was not converted, the latest in bit 0.
	recent := uint32(0)
	last := -1 // where the latest opcode was
	for i := 0; i+4 < len(b); i++ {
		if b[i]&0xfe != 0xe8 {
			continue
		}
		if d := i - last; d > 3 {
			recent = 0
		} else {
			recent = recent << (d - 1) & 7
		}
		last = i
		// depth is how far before the operand's end the earliest of them would have
		// the top byte of its own operand.
		var depth int
		switch recent {
		case 0:
		case 1:
			depth = 1
		case 2:
			depth = 2
		case 4:
			depth = 3
		default:
			// Two or three in a row are never followed by a converted one.
			recent = recent<<1&7 | 1
			continue
		}
		if depth != 0 && sign(b[i+4-depth]) || !sign(b[i+4]) {
			recent = recent<<1&7 | 1
			continue
		}
		src := binary.LittleEndian.Uint32(b[i+1:])
		var dst uint32
		// The encoder goes round at most twice.
		for range 3 {
			dst = src - uint32(i+5)
			if depth == 0 {
				break
			}
			shift := 32 - 8*depth
			if !sign(byte(dst >> (shift - 8))) {
				break
			}
			src = dst ^ (1<<shift - 1)
		}
		dst &= 1<<25 - 1
		if dst&(1<<24) != 0 {
			dst |= 0xff << 24
		}
		binary.LittleEndian.PutUint32(b[i+1:], dst)
		i += 4
	}
}
