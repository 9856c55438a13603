package image

import "fmt"

// LiME, version 1: ranges, each a header of 32 bytes followed by the memory from its
// first to its last address, both included:
//
//	 0  u32 magic, u32 version
//	 8  u64 first, u64 last
//	24  8 bytes, zero
const (
	limeMagic   = "EMiL" // 0x4c694d45
	limeVersion = 1
	limeHeader  = 32
)

// limeRange reads the header of a range at off, of either version. more is false where
// there is none, and nothing but zeros or what can't be read: behind the last.
func (m *Image) limeRange(off uint64, magic string, version uint32) (first, size uint64, more bool, err error) {
	var h [limeHeader]byte
	n := min(limeHeader, m.length-off)
	if err := m.readAt(h[:n], off); err != nil {
		return 0, 0, false, err
	}
	if h == [limeHeader]byte{} {
		// A disk, or a pipe in blocks, has zeros behind it.
		return 0, 0, false, nil
	}
	if string(h[:4]) != magic {
		err := formatErr("no header of a range at %#x", off)
		if off == 0 {
			return 0, 0, false, err
		}
		m.warnf("%v: the rest of the file is left out, %#x bytes", err, m.length-off)
		return 0, 0, false, nil
	}
	if n < limeHeader {
		if off == 0 {
			return 0, 0, false, fmt.Errorf("%w: in the first header", ErrTruncated)
		}
		m.warnf("the file is cut short in the header of a range at %#x: that range and all behind it are missing", off)
		return 0, 0, false, nil
	}
	v, first, last := le.Uint32(h[4:]), le.Uint64(h[8:]), le.Uint64(h[16:])
	if v != version {
		return 0, 0, false, fmt.Errorf("%w: version %d of %s at %#x: only version %d is known", ErrUnsupported, v, m.format, off, version)
	}
	if last < first || last >= maxPhys {
		return 0, 0, false, formatErr("header of a range at %#x: memory from %#x to %#x", off, first, last)
	}
	return first, last - first + 1, true, nil
}

// lime lays out a LiME file.
func (m *Image) lime() error {
	m.format = "LiME"
	var data []extent
	for off := uint64(0); off < m.length; {
		first, size, more, err := m.limeRange(off, limeMagic, limeVersion)
		if err != nil {
			return err
		}
		if !more {
			break
		}
		if len(data) == maxExtents {
			return formatErr("more than %d ranges", maxExtents)
		}
		e := extent{addr: first, off: off + limeHeader, size: size}
		data = append(data, e)
		off = e.off + e.size
	}
	return m.layOut(data, nil)
}
