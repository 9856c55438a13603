package kernelimg

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/ulikunitz/xz/lzma"
)

// The xz filters a kernel is compressed with.
const (
	filterX86   = 0x04
	filterLZMA2 = 0x21
)

// unxz decompresses the single block of an xz stream. It exists because the
// kernel's build passes x86 code through xz's branch filter, which the xz
// package does not know.
func unxz(stream []byte) ([]byte, error) {
	const streamHeader = 12
	if len(stream) < streamHeader+8 {
		return nil, fmt.Errorf("xz: %w", io.ErrUnexpectedEOF)
	}
	// The block header: its size in words less one, flags, the optional sizes
	// of the block, the filters (id, size of properties, properties), padding
	// and a checksum.
	size := (int(stream[streamHeader]) + 1) * 4
	if len(stream) < streamHeader+size {
		return nil, fmt.Errorf("xz: %w", io.ErrUnexpectedEOF)
	}
	flags := stream[streamHeader+1]
	header := bytes.NewReader(stream[streamHeader+2 : streamHeader+size-4])
	for _, bit := range []byte{0x40, 0x80} {
		if flags&bit != 0 {
			if _, err := binary.ReadUvarint(header); err != nil {
				return nil, fmt.Errorf("xz block header: %w", err)
			}
		}
	}
	var x86, lzma2 bool
	var dictionary byte
	for range int(flags&3) + 1 {
		id, err := binary.ReadUvarint(header)
		if err != nil {
			return nil, fmt.Errorf("xz block header: %w", err)
		}
		n, err := binary.ReadUvarint(header)
		if err != nil || n > uint64(header.Len()) {
			return nil, errors.New("xz: broken block header")
		}
		properties := make([]byte, n)
		if _, err := io.ReadFull(header, properties); err != nil {
			return nil, fmt.Errorf("xz block header: %w", err)
		}
		switch {
		case id == filterX86 && n == 0 && !lzma2:
			x86 = true
		case id == filterLZMA2 && n == 1:
			lzma2, dictionary = true, properties[0]
		default:
			return nil, fmt.Errorf("%w (xz filter %#x)", ErrCompression, id)
		}
	}
	if !lzma2 || dictionary > 40 {
		return nil, fmt.Errorf("%w (xz without a usable LZMA2 filter)", ErrCompression)
	}
	// The dictionary size is 2 or 3 times a power of two. A kernel's build
	// asks for 32 MiB or 64 MiB; more than a kernel can hold is useless.
	capacity := min((uint64(2)|uint64(dictionary&1))<<(dictionary/2+11), maxKernel)
	r, err := lzma.Reader2Config{DictCap: int(capacity)}.NewReader2(bytes.NewReader(stream[streamHeader+size:]))
	if err != nil {
		return nil, fmt.Errorf("xz: %w", err)
	}
	out, err := readAll(r)
	if err != nil {
		return nil, fmt.Errorf("xz: %w", err)
	}
	if x86 {
		undoX86(out)
	}
	return out, nil
}

// undoX86 reverts the x86 branch filter: before compression the relative
// target of each likely CALL and JMP (E8 and E9) was made absolute. The filter
// guesses where instructions start from the opcode bytes seen just before, and
// the same guesses are made again here.
func undoX86(code []byte) {
	// near tells whether a byte can be the top of a target that is near
	// enough for the filter to have touched it.
	near := func(b byte) bool { return b == 0x00 || b == 0xff }
	// recent has a bit for each opcode byte among the three bytes before.
	// usable says for which of those patterns a target may start here, and
	// lowest is the position of the last of those opcode bytes.
	usable := [8]bool{true, true, true, false, true, false, false, false}
	lowest := [8]uint{0, 1, 2, 2, 3, 3, 3, 3}

	recent, last := uint32(0), -1
	for i := 0; i+4 < len(code); i++ {
		if code[i]&0xfe != 0xe8 {
			continue
		}
		distance := i - last
		last = i
		if distance > 3 {
			recent = 0
		} else if recent = recent << (distance - 1) & 7; recent != 0 {
			if !usable[recent] || near(code[i+4-int(lowest[recent])]) {
				recent = recent<<1 | 1
				continue
			}
		}
		if !near(code[i+4]) {
			recent = recent<<1 | 1
			continue
		}
		target := binary.LittleEndian.Uint32(code[i+1:])
		for {
			relative := target - uint32(i+5)
			if recent != 0 {
				if shift := lowest[recent] * 8; near(byte(relative >> (24 - shift))) {
					target = relative ^ (1<<(32-shift) - 1)
					continue
				}
			}
			// Only 25 bits and their sign are kept.
			relative &= 0x01ffffff
			if relative&0x01000000 != 0 {
				relative |= 0xff000000
			}
			binary.LittleEndian.PutUint32(code[i+1:], relative)
			break
		}
		i += 4
	}
}
