package ktype

import (
	"debug/dwarf"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"iter"
	"sync"
)

const (
	maxDebug    = 2 << 30 // bytes of one section; .debug_info of a kernel has 300 MB
	maxSections = 1 << 16
)

// FromELF reads the types of a vmlinux: its .BTF section if it has one, else its
// DWARF, as kernels built with CONFIG_DEBUG_INFO and Debian's -dbg packages have.
//
// The DWARF of a kernel is large, so it is searched when a type is first asked for,
// and only as far as that type; a name that doesn't exist takes a search of all of it
// (seconds). FromELF itself reads it from r completely.
func FromELF(r io.ReaderAt) (*Types, error) {
	f, err := openELF(r)
	if err != nil {
		return nil, err
	}
	if sec := f.Section(".BTF"); sec != nil {
		if sec.Flags&elf.SHF_COMPRESSED != 0 || sec.Type == elf.SHT_NOBITS {
			return nil, formatErr("ELF section .BTF has no plain data")
		}
		t, err := FromBTF(sec, int64(min(sec.FileSize, maxBTF+1)))
		if err != nil {
			return nil, err
		}
		return withOrigin(t, f), nil
	}
	return fromDWARF(f)
}

// FromDWARF is FromELF, but reads the DWARF of a file that also has BTF.
func FromDWARF(r io.ReaderAt) (*Types, error) {
	f, err := openELF(r)
	if err != nil {
		return nil, err
	}
	return fromDWARF(f)
}

func openELF(r io.ReaderAt) (*elf.File, error) {
	f, err := elf.NewFile(r)
	if err != nil {
		return nil, formatErr("%v", err)
	}
	if f.ByteOrder != binary.LittleEndian {
		return nil, formatErr("ELF file is not little-endian")
	}
	if len(f.Sections) > maxSections {
		return nil, formatErr("ELF file of %d sections", len(f.Sections))
	}
	return f, nil
}

func fromDWARF(f *elf.File) (t *Types, err error) {
	defer func() {
		if r := recover(); r != nil {
			t, err = nil, formatErr("DWARF: %v", r)
		}
	}()
	for _, s := range f.Sections {
		if s.Size > maxDebug {
			return nil, formatErr("ELF section %s has %d bytes", s.Name, s.Size)
		}
	}
	if f.Section(".debug_info") == nil && f.Section(".debug_info.dwo") != nil {
		return nil, formatErr("split DWARF (.debug_info.dwo) is not read: %s", unsplit)
	}
	if f.Section(".debug_info") == nil {
		return nil, formatErr("ELF file has neither a .BTF section nor DWARF (.debug_info)")
	}
	var d *dwarf.Data
	var sigs map[uint64]dwarf.Offset
	if f.Type == elf.ET_REL {
		if f.Section(".debug_types") != nil {
			return nil, formatErr("an object file with type units (.debug_types), which only linked files are read with")
		}
		d, err = f.DWARF() // which applies relocations
		if info, ierr := f.Section(".debug_info").Data(); ierr == nil {
			_, sigs = signatures(info, nil)
		}
	} else {
		d, sigs, err = typeSections(f)
	}
	if err != nil {
		return nil, formatErr("DWARF: %v", err)
	}
	ptr := uint64(8)
	if f.Class == elf.ELFCLASS32 {
		ptr = 4
	}
	src := &dwarfSource{d: d, ptr: ptr, scan: d.Reader(), sigs: sigs,
		index: make(map[dwarfKey]dwarf.Offset), nodes: make(map[dwarf.Offset]*Type)}
	return withOrigin(&Types{name: "DWARF", src: src, ptr: ptr}, f), nil
}

// typeSections reads what the types are in, without the tables of lines, ranges
// and locations, which are as large.
func typeSections(f *elf.File) (*dwarf.Data, map[uint64]dwarf.Offset, error) {
	var err error
	data := func(name string) []byte {
		s := f.Section(name)
		if s == nil || err != nil {
			return nil
		}
		var b []byte
		b, err = s.Data()
		return b
	}
	abbrev, info, str := data(".debug_abbrev"), data(".debug_info"), data(".debug_str")
	lineStr, strOff, addr := data(".debug_line_str"), data(".debug_str_offsets"), data(".debug_addr")
	// DWARF 4 has these in a section for each type, until they are linked.
	types := data(".debug_types")
	if err != nil {
		return nil, nil, err
	}
	info, sigs := signatures(info, types)
	d, err := dwarf.New(abbrev, nil, nil, info, nil, nil, nil, str)
	if err != nil {
		return nil, nil, err
	}
	err = errors.Join(d.AddSection(".debug_line_str", lineStr),
		d.AddSection(".debug_str_offsets", strOff), d.AddSection(".debug_addr", addr))
	return d, sigs, err
}

// dwarfKey is a name in one of C's name spaces: "struct", "union", "enum",
// "function", "variable", or "" for typedefs and base types.
type dwarfKey struct{ tag, name string }

// dwarfSource finds types in DWARF. Each compilation unit has its own copy of
// each type; the first definition is taken.
type dwarfSource struct {
	d    *dwarf.Data
	ptr  uint64
	sigs map[uint64]dwarf.Offset // types in units of their own, by signature

	mu    sync.Mutex
	split bool          // a unit's types are in another file
	scan  *dwarf.Reader // where the search for names has got to; nil at the end
	index map[dwarfKey]dwarf.Offset
	nodes map[dwarf.Offset]*Type
}

// lookup searches on until a name is found.
func (s *dwarfSource) lookup(key dwarfKey) (off dwarf.Offset, ok bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	defer func() {
		if r := recover(); r != nil {
			err = formatErr("DWARF: %v", r)
		}
	}()
	for {
		if off, ok = s.index[key]; ok {
			return off, true, nil
		}
		if s.scan == nil {
			if s.split {
				err = formatErr("%s %q: not in this file, whose DWARF is split: %s", key.tag, clip(key.name), unsplit)
			}
			return 0, false, err
		}
		if err := s.next(); err != nil {
			return 0, false, err
		}
	}
}

// next advances the search by one entry of the top level.
func (s *dwarfSource) next() error {
	e, err := s.scan.Next()
	if err != nil {
		s.scan = nil
		return formatErr("DWARF: %v", err)
	}
	if e == nil {
		s.scan = nil
		return nil
	}
	switch e.Tag {
	case dwarf.TagCompileUnit, dwarf.TagPartialUnit, dwarf.TagTypeUnit, dwarf.TagSkeletonUnit:
		s.split = s.split || isSplit(e)
		return nil // into it
	}
	if key, ok := keyOf(e); ok {
		if _, dup := s.index[key]; !dup {
			s.index[key] = e.Offset
		}
	}
	return skip(s.scan, e)
}

// unsplit is what to do about types in .dwo files.
const unsplit = "give the kernel's BTF, or a vmlinux without CONFIG_DEBUG_INFO_SPLIT"

func keyOf(e *dwarf.Entry) (dwarfKey, bool) {
	var key dwarfKey
	switch e.Tag {
	case dwarf.TagStructType:
		key.tag = "struct"
	case dwarf.TagUnionType:
		key.tag = "union"
	case dwarf.TagEnumerationType:
		key.tag = "enum"
	case dwarf.TagSubprogram:
		key.tag = "function"
	case dwarf.TagVariable:
		key.tag = "variable"
	case dwarf.TagTypedef, dwarf.TagBaseType:
	default:
		return key, false
	}
	key.name, _ = e.Val(dwarf.AttrName).(string)
	// A variable's definition refers to its declaration, which has the type.
	declared, _ := e.Val(dwarf.AttrDeclaration).(bool)
	return key, key.name != "" && (!declared || key.tag == "variable")
}

// skip moves r past the children of an entry. (Reader.SkipChildren recurses for
// entries without DW_AT_sibling, as deep as a damaged file wants.)
func skip(r *dwarf.Reader, e *dwarf.Entry) error {
	for depth := 0; ; {
		if e == nil {
			return nil // the end of the data
		}
		switch {
		case e.Tag == 0:
			depth--
		case e.Children:
			if next, ok := e.Val(dwarf.AttrSibling).(dwarf.Offset); ok && next > e.Offset {
				r.Seek(next)
			} else {
				depth++
			}
		}
		if depth <= 0 {
			return nil
		}
		var err error
		if e, err = r.Next(); err != nil {
			return formatErr("DWARF: %v", err)
		}
	}
}

func (s *dwarfSource) find(tag, name string) ([]*Type, error) {
	off, ok, err := s.lookup(dwarfKey{tag, name})
	if !ok {
		return nil, err
	}
	t, err := s.node(off)
	if err != nil {
		return nil, err
	}
	return []*Type{t}, nil
}

func (s *dwarfSource) function(name string) (*Type, error) {
	off, ok, err := s.lookup(dwarfKey{"function", name})
	if !ok {
		return nil, err
	}
	return s.node(off)
}

func (s *dwarfSource) variable(name string) (*Type, error) {
	off, ok, err := s.lookup(dwarfKey{"variable", name})
	if !ok {
		return nil, err
	}
	e, err := s.entry(off)
	if err != nil {
		return nil, err
	}
	return s.refer(e)
}

func (s *dwarfSource) names() iter.Seq[string] {
	return func(yield func(string) bool) {
		// Names are asked for after a miss, which has searched everything.
		s.mu.Lock()
		defer s.mu.Unlock()
		for key := range s.index {
			if key.tag != "function" && key.tag != "variable" && !yield(key.name) {
				return
			}
		}
	}
}

// entry reads the entry at an offset.
func (s *dwarfSource) entry(off dwarf.Offset) (*dwarf.Entry, error) {
	e, _, err := s.at(off)
	return e, err
}

func (s *dwarfSource) at(off dwarf.Offset) (e *dwarf.Entry, r *dwarf.Reader, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = formatErr("DWARF at %#x: %v", off, p)
		}
	}()
	r = s.d.Reader()
	r.Seek(off)
	e, err = r.Next()
	if err != nil || e == nil {
		return nil, nil, formatErr("DWARF: no entry at %#x: %v", off, err)
	}
	return e, r, nil
}

// refer returns the type that an entry's DW_AT_type refers to, void without one.
func (s *dwarfSource) refer(e *dwarf.Entry) (*Type, error) {
	switch to := e.Val(dwarf.AttrType).(type) {
	case dwarf.Offset:
		return s.node(to)
	case uint64:
		return s.signed(to)
	}
	return void, nil
}

// signed returns the type that has a signature.
func (s *dwarfSource) signed(sig uint64) (*Type, error) {
	off, ok := s.sigs[sig]
	if !ok {
		return nil, formatErr("DWARF: no type has the signature %#x", sig)
	}
	return s.node(off)
}

// Tags that package dwarf has no name for in all versions: DWARF 5, table 7.3.
const tagAtomic = dwarf.Tag(0x47)

// node returns the type that an entry describes, without its details.
func (s *dwarfSource) node(off dwarf.Offset) (*Type, error) {
	s.mu.Lock()
	t := s.nodes[off]
	s.mu.Unlock()
	if t != nil {
		return t, nil
	}
	e, err := s.entry(off)
	if err != nil {
		return nil, err
	}
	// A declaration may say which type it stands for.
	if sig, ok := e.Val(dwarf.AttrSignature).(uint64); ok {
		if to, ok := s.sigs[sig]; ok && to != off {
			if e, err = s.entry(to); err != nil {
				return nil, err
			}
			off = to
		}
	}
	t = &Type{src: s, ref: off}
	t.name, _ = e.Val(dwarf.AttrName).(string)
	size, _ := e.Val(dwarf.AttrByteSize).(int64)
	if size < 0 || size > maxSize {
		return nil, formatErr("DWARF type at %#x has %d bytes", off, size)
	}
	t.size = uint64(size)
	switch e.Tag {
	case dwarf.TagBaseType:
		t.kind = KindInt
		if enc, _ := e.Val(dwarf.AttrEncoding).(int64); enc == encFloat || enc == encComplex {
			t.kind = KindFloat
		}
	case dwarf.TagPointerType:
		t.kind, t.name = KindPointer, ""
		if size == 0 {
			t.size = s.ptr
		}
	case dwarf.TagArrayType:
		t.kind, t.size = KindArray, 0
	case dwarf.TagStructType, dwarf.TagUnionType:
		t.kind, t.union = KindStruct, e.Tag == dwarf.TagUnionType
		if declared, _ := e.Val(dwarf.AttrDeclaration).(bool); declared {
			t.kind = KindForward
		} else if t.union {
			t.kind = KindUnion
		}
	case dwarf.TagEnumerationType:
		t.kind = KindEnum
	case dwarf.TagSubroutineType, dwarf.TagSubprogram:
		t.kind, t.name, t.size = KindFunc, "", 0
	case dwarf.TagTypedef:
		t.kind, t.size = KindTypedef, 0
	case dwarf.TagConstType:
		t.kind, t.size = KindConst, 0
	case dwarf.TagVolatileType, tagAtomic:
		t.kind, t.size = KindVolatile, 0
	case dwarf.TagRestrictType:
		t.kind, t.size = KindRestrict, 0
	case dwarf.TagUnspecifiedType:
		return void, nil
	default:
		return nil, formatErr("DWARF entry at %#x is not a type of C: %v", off, e.Tag)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if known := s.nodes[off]; known != nil {
		return known, nil
	}
	s.nodes[off] = t
	return t, nil
}

// Encodings of base types: DWARF 5, table 7.11.
const (
	encBoolean    = 0x02
	encComplex    = 0x03
	encFloat      = 0x04
	encSigned     = 0x05
	encSignedChar = 0x06
)

func (s *dwarfSource) fill(t *Type) error {
	e, r, err := s.at(t.ref.(dwarf.Offset))
	if err != nil {
		return err
	}
	if t.kind != KindStruct && t.kind != KindUnion {
		if t.elem, err = s.refer(e); err != nil {
			return err
		}
	}
	switch t.kind {
	case KindInt:
		enc, _ := e.Val(dwarf.AttrEncoding).(int64)
		t.signed = enc == encSigned || enc == encSignedChar
		t.boolean = enc == encBoolean
	case KindForward:
		t.elem, err = definition(s, t)
		return err
	case KindArray:
		return s.dimensions(t, e, r)
	case KindStruct, KindUnion:
		return s.children(e, r, func(c *dwarf.Entry) error { return s.member(t, c) })
	case KindEnum:
		t.elem = nil
		return s.children(e, r, func(c *dwarf.Entry) error {
			if v, ok := c.Val(dwarf.AttrConstValue).(int64); ok && c.Tag == dwarf.TagEnumerator {
				name, _ := c.Val(dwarf.AttrName).(string)
				t.values = append(t.values, EnumValue{name, v})
				t.signed = t.signed || v < 0
			}
			return nil
		})
	case KindFunc:
		return s.children(e, r, func(c *dwarf.Entry) error {
			switch c.Tag {
			case dwarf.TagFormalParameter:
				name, _ := c.Val(dwarf.AttrName).(string)
				typ, err := s.refer(c)
				t.params = append(t.params, Param{name, typ})
				return err
			case dwarf.TagUnspecifiedParameters:
				t.variadic = true
			}
			return nil
		})
	}
	return nil
}

// children calls what for each direct child of an entry.
func (s *dwarfSource) children(e *dwarf.Entry, r *dwarf.Reader, what func(*dwarf.Entry) error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = formatErr("DWARF: %v", p)
		}
	}()
	if !e.Children {
		return nil
	}
	for range maxMembers {
		c, err := r.Next()
		if err != nil {
			return formatErr("DWARF: %v", err)
		}
		if c == nil || c.Tag == 0 {
			return nil
		}
		if err := what(c); err != nil {
			return err
		}
		if err := skip(r, c); err != nil {
			return err
		}
	}
	return formatErr("DWARF entry at %#x has more than %d children", e.Offset, maxMembers)
}

func (s *dwarfSource) member(t *Type, c *dwarf.Entry) error {
	if c.Tag != dwarf.TagMember {
		return nil
	}
	typ, err := s.refer(c)
	if err != nil {
		return err
	}
	m := member{typ: typ}
	m.name, _ = c.Val(dwarf.AttrName).(string)
	off, hasOff := c.Val(dwarf.AttrDataMemberLoc).(int64)
	if expr, ok := c.Val(dwarf.AttrDataMemberLoc).([]byte); ok {
		if off, ok = plusConst(expr); !ok {
			return formatErr("DWARF member at %#x has its location in the expression % x", c.Offset, expr)
		}
		hasOff = true
	}
	m.bit = offsetBits(off)
	if width, ok := c.Val(dwarf.AttrBitSize).(int64); ok && width > 0 {
		m.width = uint64(width)
		if bit, ok := c.Val(dwarf.AttrDataBitOffset).(int64); ok && !hasOff {
			m.bit = uint64(min(max(bit, 0), maxSize*8))
		} else if fromTop, ok := c.Val(dwarf.AttrBitOffset).(int64); ok {
			// DWARF 2 and 3 count from the storage unit's most significant bit.
			unit, ok := c.Val(dwarf.AttrByteSize).(int64)
			if !ok {
				// Not Size: it may need the type that is being filled.
				unit = int64(typ.Underlying().size)
			}
			low := unit*8 - fromTop - width
			if unit < 0 || unit > 16 || low < -int64(m.bit) || low > 128 {
				return formatErr("DWARF bit-field at %#x", c.Offset)
			}
			m.bit = uint64(int64(m.bit) + low)
		}
	}
	t.members = append(t.members, m)
	return nil
}

// offsetBits turns bytes into bits; what is out of bounds stays so.
func offsetBits(off int64) uint64 {
	if off < 0 || off > maxSize {
		return (maxSize + 1) * 8
	}
	return uint64(off) * 8
}

// plusConst reads the location expression of old compilers: DW_OP_plus_uconst n.
func plusConst(expr []byte) (int64, bool) {
	const opPlusUconst = 0x23
	if len(expr) < 2 || expr[0] != opPlusUconst {
		return 0, false
	}
	v, n := binary.Uvarint(expr[1:])
	return int64(min(v, maxSize+1)), n == len(expr)-1
}

// dimensions turns what DWARF has as one type into an array of arrays.
func (s *dwarfSource) dimensions(t *Type, e *dwarf.Entry, r *dwarf.Reader) error {
	var dims []uint64
	err := s.children(e, r, func(c *dwarf.Entry) error {
		if c.Tag != dwarf.TagSubrangeType {
			return nil
		}
		n := int64(0)
		if count, ok := c.Val(dwarf.AttrCount).(int64); ok {
			n = count
		} else if upper, ok := c.Val(dwarf.AttrUpperBound).(int64); ok {
			n = upper + 1
		}
		if n < 0 || n > maxSize || len(dims) == maxChain {
			return formatErr("DWARF array at %#x", e.Offset)
		}
		dims = append(dims, uint64(n))
		return nil
	})
	if err != nil {
		return err
	}
	if len(dims) == 0 {
		return fmt.Errorf("%w: DWARF array at %#x has no dimension", ErrFormat, e.Offset)
	}
	for i := len(dims) - 1; i > 0; i-- {
		t.elem = &Type{kind: KindArray, elem: t.elem, n: dims[i]}
	}
	t.n = dims[0]
	return nil
}
