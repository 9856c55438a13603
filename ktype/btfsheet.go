package ktype

import (
	"bytes"
	"encoding/binary"
	"hash/maphash"
	"iter"
	"slices"
)

// The layout of BTF that checkBTF needs, after include/uapi/linux/btf.h.
const (
	btfMagic     = 0xeb9f
	btfHeaderLen = 24
	btfLayoutLen = 32          // of a header that says where the layout of kinds is, since 7.1
	btfMaxVlen   = 0xffff      // that package btf knows
	btfTypeLen   = 12          // struct btf_type
	btfMaxType   = 0x000f_ffff // BTF_MAX_TYPE

	btfInt       = 1
	btfArray     = 3
	btfStruct    = 4
	btfUnion     = 5
	btfEnum      = 6
	btfFwd       = 7
	btfTypedef   = 8
	btfFunc      = 12
	btfFuncProto = 13
	btfVar       = 14
	btfDatasec   = 15
	btfFloat     = 16
	btfDeclTag   = 17
	btfEnum64    = 19
)

// maxInflate bounds the nesting of package btf's decoder. Kernels (6.1, 6.12) reach
// 250; a level takes up to 5 KB of stack.
const maxInflate = 4 << 10

// btfRecord is one type: struct btf_type and what follows it.
type btfRecord []byte

func (r btfRecord) u32(off int) uint32 { return binary.LittleEndian.Uint32(r[off:]) }

// kind and vlen have 7 and 24 bits since Linux 7.1. Before, they had 5 and 16, and what
// is between them was zero.
func (r btfRecord) kind() int { return int(r.u32(4) >> 24 & 0x7f) }
func (r btfRecord) vlen() int { return int(r.u32(4) & 0xff_ffff) }

// stride returns the bytes of each member, constant or parameter, which begin with
// their name, or 0 if the type has none.
func (r btfRecord) stride() int {
	switch r.kind() {
	case btfStruct, btfUnion, btfEnum64:
		return 12
	case btfEnum, btfFuncProto:
		return 8
	}
	return 0
}

// size returns the bytes of the record, or 0 if its kind is unknown.
func (r btfRecord) size() int {
	switch k := r.kind(); k {
	case btfInt, btfVar, btfDeclTag:
		return btfTypeLen + 4
	case btfArray:
		return btfTypeLen + 12
	case btfStruct, btfUnion, btfEnum, btfEnum64, btfFuncProto:
		return btfTypeLen + r.stride()*r.vlen()
	case btfDatasec:
		return btfTypeLen + 12*r.vlen()
	default:
		if k == 0 || k > btfEnum64 {
			return 0
		}
		return btfTypeLen
	}
}

// refs returns how many types the record refers to.
func (r btfRecord) refs() int {
	switch r.kind() {
	case btfInt, btfEnum, btfEnum64, btfFloat, btfFwd:
		return 0
	case btfArray:
		return 2
	case btfStruct, btfUnion, btfDatasec:
		return r.vlen()
	case btfFuncProto:
		return r.vlen() + 1
	default:
		return 1
	}
}

// ref returns the i-th of them, in the order in which package btf decodes them.
func (r btfRecord) ref(i int) uint32 {
	switch k := r.kind(); {
	case k == btfArray: // the index's type, then the element's
		return r.u32(btfTypeLen + 4 - 4*i)
	case k == btfStruct || k == btfUnion:
		return r.u32(btfTypeLen + 12*i + 4)
	case k == btfDatasec:
		return r.u32(btfTypeLen + 12*i)
	case k == btfFuncProto && i < r.vlen():
		return r.u32(btfTypeLen + 8*i + 4)
	default:
		return r.u32(8)
	}
}

// Bounds on names. Linux has none of more than 512 bytes (KSYM_NAME_LEN), and
// 200 KB in what task_struct leads to.
const (
	maxName  = 2 << 10
	maxNames = 64 << 20
)

// A btfSheet is the table of contents of BTF. It stands before package btf, which
// decodes types by recursion from reference to reference, and copies the name of
// every member, without bounds: Four megabytes of BTF made by a hostile guest would
// end the program, by a stack overflow, which Go can't recover from, or by using up
// memory. The sheet finds types by their names, and walks what is to be decoded
// before it is.
type btfSheet struct {
	base    *btfSheet // of split BTF
	raw     []byte    // as it was read
	types   []byte
	strings []byte
	first   uint32              // the ID of the first type here
	offsets []uint32            // of the types, from there on
	tags    map[uint32][]uint32 // decl tags, which are decoded with what they tag
	index   []uint64            // of names, see buildIndex
	seed    maphash.Seed
	seen    []bool // what has been admitted
	// Where package btf doesn't know all that is in raw, plain has the same without
	// that, as types and offsets do, and cut the enums of more than 65,535 constants.
	plain []byte
	cut   map[uint32]btfRecord
	names int // bytes of names in that
}

// newSheet checks the header, and that types are whole.
func newSheet(raw []byte, base *btfSheet) (*btfSheet, error) {
	if len(raw) < btfHeaderLen || binary.LittleEndian.Uint16(raw) != btfMagic {
		return nil, formatErr("no little-endian BTF: it starts with % x", raw[:min(len(raw), 4)])
	}
	section := func(off int) ([]byte, uint64) { // of hdr_len, and an offset and a length
		u32 := func(off int) uint64 { return uint64(binary.LittleEndian.Uint32(raw[off:])) }
		start := u32(4) + u32(off)
		end := start + u32(off+4)
		if end > uint64(len(raw)) {
			return nil, end
		}
		return raw[start:end], end
	}
	s := &btfSheet{base: base, raw: raw, first: 1, tags: make(map[uint32][]uint32)}
	var typesEnd, stringsEnd uint64
	s.types, typesEnd = section(8)
	s.strings, stringsEnd = section(16)
	if end := max(typesEnd, stringsEnd); end > uint64(len(raw)) {
		return nil, formatErr("BTF of %d bytes has sections up to %#x", len(raw), end)
	}
	if base != nil {
		s.first = base.end()
	}
	for rest := s.strings; len(rest) > 0; {
		n := bytes.IndexByte(rest, 0)
		if n < 0 || n > maxName {
			return nil, formatErr("BTF: name of more than %d bytes, or without end", maxName)
		}
		rest = rest[n+1:]
	}
	layout, err := kindLayout(raw)
	if err != nil {
		return nil, err
	}
	odd := len(layout) > 0
	for off := 0; off < len(s.types); {
		rec := btfRecord(s.types[off:])
		size := 0
		if len(rec) >= btfTypeLen {
			if size = rec.size(); size == 0 {
				if size, err = layout.size(rec); err != nil {
					return nil, err
				}
				odd = true
			}
		}
		if size == 0 || size > len(rec) {
			return nil, formatErr("BTF: damaged type %d", s.end())
		}
		if s.end() > btfMaxType {
			return nil, formatErr("BTF of more than %d types", btfMaxType)
		}
		if rec.kind() == btfDeclTag {
			s.tags[rec.u32(8)] = append(s.tags[rec.u32(8)], s.end())
		}
		odd = odd || rec.vlen() > btfMaxVlen
		s.offsets = append(s.offsets, uint32(off))
		off += size
	}
	if odd {
		s.simplify()
	}
	s.seen = make([]bool, len(s.offsets))
	return s, nil
}

// end returns the ID after the last type.
func (s *btfSheet) end() uint32 { return s.first + uint32(len(s.offsets)) }

// record returns a type of this sheet or of the base.
func (s *btfSheet) record(id uint32) btfRecord {
	if id < s.first {
		s = s.base
	}
	return btfRecord(s.types[s.offsets[id-s.first]:])
}

// name returns the string at an offset, nil if there is none.
func (s *btfSheet) name(offset uint32) []byte {
	off := uint64(offset)
	from := s.strings
	if s.base != nil {
		if n := uint64(len(s.base.strings)); off < n {
			from = s.base.strings
		} else {
			off -= n
		}
	}
	if off >= uint64(len(from)) {
		return nil
	}
	from = from[off:]
	end := bytes.IndexByte(from, 0)
	if end <= 0 {
		return nil
	}
	return from[:end]
}

// named yields the IDs of the types of a name and of one of the kinds, in order.
func (s *btfSheet) named(name string, kinds []int) iter.Seq[uint32] {
	return func(yield func(uint32) bool) {
		if s.index == nil {
			s.buildIndex()
		}
		hash := indexEntry(maphash.String(s.seed, name), 0)
		i, _ := slices.BinarySearch(s.index, hash)
		for ; i < len(s.index) && s.index[i]>>32 == hash>>32; i++ {
			id := uint32(s.index[i])
			rec := s.record(id)
			if slices.Contains(kinds, rec.kind()) && string(s.name(rec.u32(0))) == name && !yield(id) {
				return
			}
		}
	}
}

// buildIndex takes 20 ms, and less than a tenth of the memory of a map.
func (s *btfSheet) buildIndex() {
	s.seed = maphash.MakeSeed()
	s.index = make([]uint64, 0, len(s.offsets))
	for i := range s.offsets {
		id := s.first + uint32(i)
		if name := s.name(s.record(id).u32(0)); name != nil {
			s.index = append(s.index, indexEntry(maphash.Bytes(s.seed, name), id))
		}
	}
	slices.Sort(s.index)
}

// indexEntry has part of a name's hash in its upper half, and a type's ID.
func indexEntry(hash uint64, id uint32) uint64 { return hash&^(1<<32-1) | uint64(id) }

// allNames yields the names of all types that a path may begin with.
func (s *btfSheet) allNames() iter.Seq[string] {
	return func(yield func(string) bool) {
		for _, off := range s.offsets {
			rec := btfRecord(s.types[off:])
			switch rec.kind() {
			case btfStruct, btfUnion, btfEnum, btfEnum64, btfTypedef, btfInt, btfFloat:
				if name := s.name(rec.u32(0)); name != nil && !yield(string(name)) {
					return
				}
			}
		}
	}
}

// pointerSize returns the size of a long, which Linux' pointers have everywhere: BTF
// doesn't say theirs.
func (s *btfSheet) pointerSize() uint64 {
	for i := range s.offsets {
		rec := s.record(s.first + uint32(i))
		if rec.kind() != btfInt {
			continue
		}
		switch string(s.name(rec.u32(0))) {
		case "long unsigned int", "unsigned long", "long int", "long":
			if rec.u32(8) == 4 {
				return 4
			}
			return 8
		}
	}
	return 8
}

// tagged returns the decl tags of a type. Those that a module has for a type of
// the kernel aren't decoded with it.
func (s *btfSheet) tagged(id uint32) []uint32 {
	if id < s.first {
		s = s.base
	}
	return s.tags[id]
}

// nameBytes returns the length of a type's name and of those of its members.
func (s *btfSheet) nameBytes(id uint32) int {
	rec := s.record(id)
	n := len(s.name(rec.u32(0)))
	if stride := rec.stride(); stride > 0 {
		for i := range rec.vlen() {
			n += len(s.name(rec.u32(btfTypeLen + stride*i)))
		}
	}
	return n
}

// A batch is what one call of admit has added.
type batch []struct {
	sheet *btfSheet
	id    uint32
}

// undo takes a batch back that was not decoded, or not completely.
func (b batch) undo() {
	for _, e := range b {
		e.sheet.seen[e.id-e.sheet.first] = false
		e.sheet.names -= e.sheet.nameBytes(e.id)
	}
}

// admit walks the references from a type on, as package btf does when it decodes
// that type after those which were admitted before, and returns an error if they
// nest too deep, or have too many names.
func (s *btfSheet) admit(root uint32) (added batch, err error) {
	type frame struct {
		id   uint32
		next int // the reference to follow next
	}
	var stack []frame
	push := func(in *btfSheet, id uint32) error {
		if in.seen[id-in.first] {
			return nil
		}
		if len(stack) == maxInflate {
			return formatErr("BTF types refer to each other more than %d deep", maxInflate)
		}
		in.seen[id-in.first] = true
		added = append(added, struct {
			sheet *btfSheet
			id    uint32
		}{in, id})
		stack = append(stack, frame{id: id})
		if in.names += in.nameBytes(id); in.names > maxNames {
			return formatErr("BTF has more than %d bytes of names", maxNames)
		}
		return nil
	}
	defer func() {
		if err != nil {
			added.undo()
			added = nil
		}
	}()
	if err := push(s, root); err != nil {
		return added, err
	}
	for len(stack) > 0 {
		top := &stack[len(stack)-1]
		i := top.next
		top.next++
		rec := s.record(top.id)
		var id uint32
		if refs, tags := rec.refs(), s.tagged(top.id); i < refs {
			id = rec.ref(i)
		} else if i < refs+len(tags) {
			id = tags[i-refs]
		} else {
			stack = stack[:len(stack)-1]
			continue
		}
		in := s
		if id < s.first {
			if in = s.base; in == nil || id == 0 {
				continue // void
			}
		}
		if id >= in.end() {
			return added, formatErr("BTF type %d refers to type %d of %d", top.id, id, s.end())
		}
		if err := push(in, id); err != nil {
			return added, err
		}
	}
	return added, nil
}
