package ktype

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/cilium/ebpf/btf"
)

// kindLayouts says how long records are, by their kind: struct btf_layout of Linux 7.1,
// include/uapi/linux/btf.h, which has the bytes behind struct btf_type (info_sz), those
// of each of vlen elements (elem_sz), and flags of two bytes.
type kindLayouts []byte

const kindLayoutLen = 4

// kindLayout returns the table that BTF has of its kinds, if it has one.
func kindLayout(raw []byte) (kindLayouts, error) {
	u32 := func(off int) uint64 { return uint64(binary.LittleEndian.Uint32(raw[off:])) }
	if u32(4) < btfLayoutLen || len(raw) < btfLayoutLen {
		return nil, nil
	}
	start := u32(4) + u32(24)
	end := start + u32(28)
	if end > uint64(len(raw)) {
		return nil, formatErr("BTF of %d bytes has the layout of its kinds up to %#x", len(raw), end)
	}
	return kindLayouts(raw[start:end]), nil
}

// size returns the bytes of a record of a kind that isn't known here.
func (l kindLayouts) size(r btfRecord) (int, error) {
	k := r.kind()
	if k == 0 || len(l) < kindLayoutLen*(k+1) {
		return 0, formatErr("BTF kind %d is not known, and the BTF doesn't say how long its types are", k)
	}
	e := l[kindLayoutLen*k:]
	return btfTypeLen + int(e[0]) + int(e[1])*r.vlen(), nil
}

// simplify makes of the types what package btf knows: those of other kinds, and structs
// and prototypes of more members than it takes, are only declared; enums lose what is
// beyond that.
func (s *btfSheet) simplify() {
	var types []byte
	offsets := make([]uint32, len(s.offsets))
	for i, off := range s.offsets {
		rec := btfRecord(s.types[off:])
		size := rec.size()
		offsets[i] = uint32(len(types))
		switch long := rec.vlen() > btfMaxVlen; {
		case size == 0:
			types = appendRecord(types, 0, btfFwd<<24, 0)
		case long && (rec.kind() == btfEnum || rec.kind() == btfEnum64):
			if s.cut == nil {
				s.cut = make(map[uint32]btfRecord)
			}
			s.cut[s.first+uint32(i)] = rec[:size]
			types = appendRecord(types, rec.u32(0), rec.u32(4)&^0xff_ffff|btfMaxVlen, rec.u32(8))
			types = append(types, rec[btfTypeLen:btfTypeLen+rec.stride()*btfMaxVlen]...)
		case long && rec.stride() == 0 && rec.kind() != btfDatasec:
			// vlen means nothing here.
			types = appendRecord(types, rec.u32(0), rec.u32(4)&^0xff_ffff, rec.u32(8))
			types = append(types, rec[btfTypeLen:size]...)
		case long:
			types = appendRecord(types, rec.u32(0), btfFwd<<24, 0)
		default:
			types = append(types, rec[:size]...)
		}
	}
	s.types, s.offsets = types, offsets
	s.plain = rawBlob(types, s.strings)
}

func appendRecord(b []byte, name, info, size uint32) []byte {
	b = binary.LittleEndian.AppendUint32(b, name)
	b = binary.LittleEndian.AppendUint32(b, info)
	return binary.LittleEndian.AppendUint32(b, size)
}

// rawBlob makes BTF of types and strings.
func rawBlob(types, strings []byte) []byte {
	b := binary.LittleEndian.AppendUint32(nil, 1<<16|btfMagic)
	for _, v := range []int{btfHeaderLen, 0, len(types), len(types), len(strings)} {
		b = binary.LittleEndian.AppendUint32(b, uint32(v))
	}
	return append(append(b, types...), strings...)
}

// all returns the constants of an enum of which package btf has only some.
func (s *btfSource) all(typ *btf.Enum) (values []EnumValue, ok bool) {
	s.table.mu.Lock()
	defer s.table.mu.Unlock()
	for src := s; src != nil; src = src.base {
		if src.sheet.cut == nil {
			continue
		}
		id, err := src.spec.TypeID(typ)
		rec, cut := src.sheet.cut[uint32(id)]
		if err != nil || !cut {
			continue
		}
		values = make([]EnumValue, rec.vlen())
		for i := range values {
			at := btfTypeLen + rec.stride()*i
			v := int64(rec.u32(at + 4))
			switch {
			case rec.kind() == btfEnum64:
				v |= int64(rec.u32(at+8)) << 32
			case typ.Signed:
				v = int64(int32(v))
			}
			values[i] = EnumValue{string(src.sheet.name(rec.u32(at))), v}
		}
		return values, true
	}
	return nil, false
}

// ofBase returns an error if split BTF isn't relative to the base that it was given: none
// of its types has a name of its own, or one has a name that begins within another.
func (s *btfSheet) ofBase() error {
	own, used := uint32(len(s.base.strings)), len(s.strings) <= 1 || len(s.offsets) == 0
	for _, off := range s.offsets {
		rec := btfRecord(s.types[off:])
		for _, at := range rec.names() {
			n := rec.u32(at)
			from := s.base.strings
			if n >= own {
				used = true
				n, from = n-own, s.strings
			}
			if n > 0 && uint64(n) < uint64(len(from)) && from[n-1] != 0 {
				return formatErr("BTF of type names that begin within others: %v", notOfBase)
			}
		}
	}
	if !used {
		return formatErr("BTF without a type of its own: %v", notOfBase)
	}
	return nil
}

const notOfBase = "it is not relative to the kernel's; of a module that was built apart from it, with a .BTF.base?"

// names returns where in a record the offsets of names are.
func (r btfRecord) names() []int {
	at := []int{0}
	if stride := r.stride(); stride > 0 {
		for i := range r.vlen() {
			at = append(at, btfTypeLen+stride*i)
		}
	}
	return at
}

// refsAt returns where in a record IDs of types are: see ref.
func (r btfRecord) refsAt() (at []int) {
	switch r.kind() {
	case btfInt, btfEnum, btfEnum64, btfFloat, btfFwd:
		return nil
	case btfArray:
		return []int{btfTypeLen, btfTypeLen + 4}
	case btfStruct, btfUnion:
		for i := range r.vlen() {
			at = append(at, btfTypeLen+12*i+4)
		}
		return at
	case btfDatasec:
		for i := range r.vlen() {
			at = append(at, btfTypeLen+12*i)
		}
		return at
	case btfFuncProto:
		at = append(at, 8)
		for i := range r.vlen() {
			at = append(at, btfTypeLen+8*i+4)
		}
		return at
	}
	return []int{8}
}

// WithModuleFile is WithModule for the file of a module (.ko), unpacked. If the module was
// built apart from the kernel, its .BTF refers to a .BTF.base (since Linux 6.11), which has
// the names and sizes of what it needs of the kernel: these are looked for in t. If t has
// one of them with another size, or doesn't have it, the module is for another kernel, and
// the error wraps ErrFormat.
func (t *Types) WithModuleFile(name string, r io.ReaderAt) (*Types, error) {
	f, err := openELF(r)
	if err != nil {
		return nil, fmt.Errorf("module %q: %w", name, err)
	}
	section := func(name string) ([]byte, error) {
		sec := f.Section(name)
		if sec == nil {
			return nil, nil
		}
		if sec.Flags&elf.SHF_COMPRESSED != 0 || sec.Type == elf.SHT_NOBITS || sec.FileSize > maxBTF {
			return nil, formatErr("ELF section %s has no plain data of at most %d bytes", name, int64(maxBTF))
		}
		var b bytes.Buffer
		_, err := io.Copy(&b, io.NewSectionReader(sec, 0, int64(sec.FileSize)))
		return b.Bytes(), err
	}
	split, err := section(".BTF")
	if err == nil && split == nil {
		err = formatErr("no .BTF section")
	}
	var distilled []byte
	if err == nil {
		distilled, err = section(".BTF.base")
	}
	if err == nil && distilled != nil {
		base, ok := t.src.(*btfSource)
		if !ok {
			return nil, fmt.Errorf("module %q: %w: split BTF needs the kernel's BTF, these types are from %s", name, errors.ErrUnsupported, t.name)
		}
		base.table.mu.Lock() // of the index of names
		split, err = relocate(split, distilled, base.sheet)
		base.table.mu.Unlock()
	}
	if err != nil {
		return nil, fmt.Errorf("module %q: %w", name, err)
	}
	return t.WithModule(name, split)
}

// relocate makes split BTF that refers to a distilled base refer to a kernel's
// (tools/lib/bpf/btf_relocate.c has the rules).
func relocate(split, distilled []byte, kernel *btfSheet) ([]byte, error) {
	base, err := newSheet(distilled, nil)
	if err != nil {
		return nil, fmt.Errorf(".BTF.base: %w", err)
	}
	mod, err := newSheet(split, base)
	if err != nil {
		return nil, err
	}
	if len(mod.cut) > 0 {
		return nil, formatErr("an enum of more than %d constants, beside a .BTF.base", btfMaxVlen)
	}
	ids := make([]uint32, base.end())
	for id := uint32(1); id < base.end(); id++ {
		if ids[id], err = kernel.like(base, id); err != nil {
			return nil, err
		}
	}
	types := bytes.Clone(mod.types)
	own := uint32(len(kernel.strings))
	for i, off := range mod.offsets {
		rec := btfRecord(types[off:])
		for _, at := range rec.names() {
			if n := rec.u32(at); n != 0 {
				binary.LittleEndian.PutUint32(rec[at:], n+own)
			}
		}
		for _, at := range rec.refsAt() {
			id := rec.u32(at)
			switch {
			case id >= mod.end():
				return nil, formatErr("BTF type %d refers to type %d of %d", mod.first+uint32(i), id, mod.end())
			case id < base.end():
				id = ids[id]
			default:
				id += kernel.end() - base.end()
			}
			binary.LittleEndian.PutUint32(rec[at:], id)
		}
	}
	return rawBlob(types, append(bytes.Clone(base.strings), mod.strings...)), nil
}

// like returns the ID of the type here that a type of a distilled base stands for. It has
// the same name and kind. A struct or an enum without a size is one that is only pointed
// to; where it has a size, that is the same, too.
func (s *btfSheet) like(base *btfSheet, id uint32) (uint32, error) {
	rec := base.record(id)
	name := string(base.name(rec.u32(0)))
	var kinds []int
	switch k := rec.kind(); k {
	case btfInt, btfFloat, btfStruct, btfUnion:
		kinds = []int{k}
	case btfEnum, btfEnum64:
		kinds = []int{btfEnum, btfEnum64}
	case btfFwd:
		kinds = []int{btfStruct}
		if rec.u32(4)>>31 != 0 {
			kinds = []int{btfUnion}
		}
	default:
		return 0, formatErr(".BTF.base: type %d is of kind %d", id, k)
	}
	if name == "" {
		return 0, formatErr(".BTF.base: type %d has no name", id)
	}
	found, other := uint32(0), uint32(0)
	for k := range s.named(name, kinds) {
		r := s.record(k)
		switch {
		case rec.kind() == btfFwd,
			r.u32(8) == rec.u32(8) && (rec.kind() != btfInt || r.u32(btfTypeLen) == rec.u32(btfTypeLen)):
			if found == 0 {
				found = k
			}
		default:
			other = k
		}
	}
	switch {
	case found != 0:
		return found, nil
	case other != 0:
		return 0, formatErr("the module was built with a %q of %d bytes, and the kernel's has %d", clip(name), rec.u32(8), s.record(other).u32(8))
	case rec.kind() == btfFwd:
		for k := range s.named(name, []int{btfFwd}) {
			return k, nil
		}
	}
	return 0, formatErr("the module was built with a %q, which the kernel doesn't have", clip(name))
}
