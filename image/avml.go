package image

import (
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"sort"
	"sync"

	"github.com/klauspost/compress/s2"
)

// AVML's compressed form (https://github.com/microsoft/avml, src/image.rs): ranges, each
// the header of LiME with a magic and a version of its own, followed by the memory as a
// stream of snappy (https://github.com/google/snappy, framing_format.txt) and by the
// stream's length in 8 bytes. Long ranges are cut into several, and in newer versions those
// of zeros are left out.
//
// A stream is chunks, each of at most 64 KiB of memory:
//
//	0  u8 kind, u24 length of what follows
//	4  u32 masked CRC-32C of the memory, then the memory, compressed or not
const (
	avmlMagic   = "AVML" // 0x4c4d5641
	avmlVersion = 2

	snappyHead  = "\xff\x06\x00\x00sNaPpY"
	snappyChunk = 64 << 10

	snappyCompressed = 0x00 // kinds of a chunk
	snappyPlain      = 0x01
	snappySkippable  = 0x80 // from here to 0xfd
	snappyPadding    = 0xfe
	snappyStream     = 0xff

	snappyMask = 0xa282ead8 // added to the rotated checksum

	// snappyRatio bounds what a byte can become: a copy of 64 bytes takes 3.
	snappyRatio = 22
)

// A chunk is a piece of memory in a stream.
type chunk struct {
	at   uint64 // of its memory, counted from the beginning of all streams'
	off  uint64 // in the file, of its contents
	n    uint32 // bytes of contents, without the checksum
	size uint32 // bytes of memory
	sum  uint32
	kind byte
}

// chunks reads memory in streams.
type chunks struct {
	m    *Image // what the file was before
	list []chunk
	size uint64 // of all memory

	mu   sync.Mutex
	last [8]decoded // the ones used last
	next int
}

type decoded struct {
	i int // 1-based
	b []byte
}

// avml lays out a compressed AVML file, as a file of its memory.
func (m *Image) avml() error {
	m.format = "AVML"
	file := *m
	c := &chunks{m: &file}
	var data []extent
	for off := uint64(0); off < m.length; {
		first, size, more, err := m.limeRange(off, avmlMagic, avmlVersion)
		if err != nil {
			return err
		}
		if !more {
			break
		}
		if len(data) == maxExtents {
			return formatErr("more than %d ranges", maxExtents)
		}
		e := extent{addr: first, off: c.size, size: size}
		data = append(data, e)
		if off, err = c.stream(off+limeHeader, size); err != nil {
			err = fmt.Errorf("AVML's range of memory from %#x: %w", first, err)
			if c.size == 0 || !errors.Is(err, ErrFormat) {
				return err
			}
			m.warnf("%v: it, or its rest, and all behind it are left out", err)
			break
		}
		if c.size < e.off+size { // it is cut short
			break
		}
	}
	m.r, m.length = c, c.size
	return m.layOut(data, nil)
}

// stream adds the chunks of a stream that begins at off and has size bytes of memory. A
// file may end in it. It returns where the next range begins.
func (c *chunks) stream(off, size uint64) (next uint64, err error) {
	start, want := off, c.size+size
	for c.size < want {
		var h [4 + 4 + 10]byte // and the length of a block of snappy
		n := min(uint64(len(h)), c.m.length-min(off, c.m.length))
		if n < 4 {
			return c.m.length, nil
		}
		if err := c.m.readAt(h[:n], off); err != nil {
			return 0, err
		}
		kind, length := h[0], uint64(le.Uint32(h[:])>>8)
		at := off
		off += 4 + length
		switch {
		case kind >= snappySkippable && kind <= snappyPadding, kind == snappyStream && string(h[:min(n, 10)]) == snappyHead:
			continue
		case kind != snappyCompressed && kind != snappyPlain || length < 4:
			return 0, formatErr("chunk of kind %#x with %d bytes at %#x of a snappy stream", kind, length, at)
		case off > c.m.length:
			return c.m.length, nil
		}
		e := chunk{at: c.size, off: at + 8, n: uint32(length - 4), sum: le.Uint32(h[4:]), kind: kind}
		e.size = e.n
		if kind == snappyCompressed {
			d, err := s2.DecodedLen(h[8:n])
			if err != nil || d < 0 || uint64(d) > uint64(e.n)*snappyRatio {
				return 0, formatErr("chunk at %#x of a snappy stream: %d bytes of memory in %d", at, d, e.n)
			}
			e.size = uint32(min(d, 2*snappyChunk))
		}
		if e.size == 0 || e.size > snappyChunk || uint64(e.size) > want-c.size || len(c.list) == maxExtents {
			return 0, formatErr("chunk at %#x of a snappy stream: %d bytes of memory, of %d that are missing", at, e.size, want-c.size)
		}
		c.list = append(c.list, e)
		c.size += uint64(e.size)
	}
	var b [8]byte
	if off > c.m.length || c.m.length-off < 8 {
		return c.m.length, nil // all of the memory is there
	}
	if err := c.m.readAt(b[:], off); err != nil {
		return 0, err
	}
	if n := le.Uint64(b[:]); n != off-start {
		return 0, formatErr("a snappy stream of %d bytes at %#x is said to have %d", off-start, start, n)
	}
	return off + 8, nil
}

// ReadAt implements io.ReaderAt for all memory.
func (c *chunks) ReadAt(b []byte, off int64) (n int, err error) {
	at := uint64(off)
	i := sort.Search(len(c.list), func(i int) bool { return c.list[i].at > at }) - 1
	for ; n < len(b) && i >= 0 && i < len(c.list); i++ {
		d, err := c.decode(i)
		if err != nil {
			return n, err
		}
		if skip := at + uint64(n) - c.list[i].at; skip < uint64(len(d)) {
			n += copy(b[n:], d[skip:])
		}
	}
	if n < len(b) {
		return n, io.EOF
	}
	return n, nil
}

// decode returns the memory of a chunk, which nobody changes.
func (c *chunks) decode(i int) ([]byte, error) {
	c.mu.Lock()
	for _, d := range c.last {
		if d.i == i+1 {
			c.mu.Unlock()
			return d.b, nil
		}
	}
	c.mu.Unlock()
	e := c.list[i]
	b := make([]byte, e.n)
	if err := c.m.readAt(b, e.off); err != nil {
		return nil, err
	}
	if e.kind == snappyCompressed {
		d, err := s2.Decode(make([]byte, e.size), b)
		if err != nil {
			return nil, formatErr("chunk at %#x: %v", e.off, err)
		}
		b = d
	}
	sum := crc32.Checksum(b, castagnoli)
	if len(b) != int(e.size) || sum>>15|sum<<17 != e.sum-snappyMask {
		return nil, formatErr("chunk at %#x: its memory doesn't have its checksum", e.off)
	}
	c.mu.Lock()
	c.last[c.next] = decoded{i + 1, b}
	c.next = (c.next + 1) % len(c.last)
	c.mu.Unlock()
	return b, nil
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)
