package ktype

import (
	"debug/dwarf"
	"encoding/binary"
)

// A typeUnit has one type, which others refer to by a signature, in place of a copy in
// each of them (gcc -fdebug-types-section, clang -fdebug-types-section).
type typeUnit struct {
	start, end int // of the unit
	header     int // bytes up to the signature
	long       int // bytes of an offset: 4 or 8
}

// units calls f for each unit of a section with a signature; types says that it is
// .debug_types, the place of such units in DWARF 4 (4, 7.5.1.2); in DWARF 5 they are in
// .debug_info (5, 7.5.1.3). It ends where a unit isn't whole.
func typeUnits(b []byte, types bool, f func(u typeUnit)) {
	for off := 0; len(b)-off >= 12; {
		u := typeUnit{start: off, long: 4}
		size := uint64(binary.LittleEndian.Uint32(b[off:]))
		head := 4
		if size == 0xffff_ffff {
			size = binary.LittleEndian.Uint64(b[off+4:])
			head, u.long = 12, 8
		}
		if size > uint64(len(b)-off-head) {
			return
		}
		u.end = off + head + int(size)
		if size >= 4 {
			version, kind := binary.LittleEndian.Uint16(b[off+head:]), b[off+head+2]
			u.header = head + 2 + u.long + 1 // version, abbreviations, size of an address
			if !types {
				u.header++ // the unit's type
			}
			const utType = 2 // DW_UT_type
			isType := types && version == 4 || !types && version == 5 && kind == utType
			if isType && u.start+u.header+8+u.long <= u.end {
				f(u)
			}
		}
		off = u.end
	}
}

// signatures returns where the types with a signature are in .debug_info. Those of
// .debug_types, which package dwarf finds by their signature only, are appended to it as
// units of their own: they have the same header, and then the signature and the place of
// the type, which are made null entries.
func signatures(info, types []byte) (all []byte, sigs map[uint64]dwarf.Offset) {
	sigs = make(map[uint64]dwarf.Offset)
	add := func(b []byte, u typeUnit, base int) {
		at := b[u.start+u.header:]
		off := uint64(binary.LittleEndian.Uint32(at[8:]))
		if u.long == 8 {
			off = binary.LittleEndian.Uint64(at[8:])
		}
		sig := binary.LittleEndian.Uint64(at)
		if _, dup := sigs[sig]; !dup && off < uint64(u.end-u.start) {
			sigs[sig] = dwarf.Offset(base + u.start + int(off))
		}
	}
	typeUnits(info, false, func(u typeUnit) { add(info, u, 0) })
	if len(types) == 0 {
		return info, sigs
	}
	all = append(info[:len(info):len(info)], types...)
	typeUnits(types, true, func(u typeUnit) {
		add(types, u, len(info))
		clear(all[len(info)+u.start+u.header:][:8+u.long])
	})
	return all, sigs
}

// Attributes that say that a unit's types are in another file: DWARF 5, table 7.5, and
// GCC's extension of DWARF 4.
const (
	attrDwoName    = dwarf.AttrDwoName
	attrGNUDwoName = dwarf.Attr(0x2130)
)

// isSplit reports whether a unit is a skeleton.
func isSplit(e *dwarf.Entry) bool { return e.Val(attrDwoName) != nil || e.Val(attrGNUDwoName) != nil }
