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

// lime lays out a LiME file.
func (m *Image) lime() error {
	m.format = "LiME"
	var data []extent
	var h [limeHeader]byte
	for off := uint64(0); off < m.length; {
		if err := m.readAt(h[:], off); err != nil {
			return err
		}
		version, first, last := le.Uint32(h[4:]), le.Uint64(h[8:]), le.Uint64(h[16:])
		if string(h[:4]) != limeMagic {
			return formatErr("no LiME header at %#x", off)
		}
		if version != limeVersion {
			return fmt.Errorf("%w: version %d of LiME at %#x: only version 1 is known", ErrUnsupported, version, off)
		}
		if last < first || last >= maxPhys {
			return formatErr("LiME header at %#x: memory from %#x to %#x", off, first, last)
		}
		if len(data) == maxExtents {
			return formatErr("more than %d ranges", maxExtents)
		}
		e := extent{addr: first, off: off + limeHeader, size: last - first + 1}
		if err := m.within("range of LiME", e.off, e.size); err != nil {
			return err
		}
		data = append(data, e)
		off = e.off + e.size
	}
	return m.layOut(data, nil)
}
