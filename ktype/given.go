package ktype

import (
	"fmt"
	"iter"
	"maps"
	"slices"
	"strconv"
	"strings"
)

// A Struct is the layout of a struct, as far as it is known. It is an argument of
// New.
type Struct struct {
	Name   string
	Size   uint64 // bytes; 0 if unknown: up to the end of the last field
	Fields []StructField
}

// A StructField is a member of a Struct.
type StructField struct {
	Name   string
	Offset uint64 // bytes
	// Type is a base type of C or of the kernel (void, bool, char, short, int,
	// long, long long, with signed or unsigned; s8 to s64, u8 to u64), or the
	// name of a struct, with "struct" before it or not; then any number of *,
	// and of array lengths: "char[16]", "task_struct *", "list_head". A struct
	// that is only pointed to needn't be among those given.
	Type string
}

// New returns types with the given layouts, such as have been inferred from
// memory. source is what Source returns; pointerSize is 8, or 4 for i386.
func New(source string, pointerSize uint64, structs ...Struct) (*Types, error) {
	if pointerSize != 4 && pointerSize != 8 {
		return nil, formatErr("pointers of %d bytes", pointerSize)
	}
	s := &givenSource{structs: make(map[string]*Type), base: baseTypes(pointerSize), ptr: pointerSize}
	for _, st := range structs {
		if _, dup := s.structs[st.Name]; dup || !isName(st.Name) || len(st.Fields) > maxMembers || st.Size > maxSize {
			return nil, formatErr("struct %q: a second of that name, no name of C, or too large", clip(st.Name))
		}
		s.structs[st.Name] = &Type{kind: KindStruct, name: st.Name, size: st.Size}
	}
	// First the sizes that are given, so that structs may contain each other in any
	// order; a struct without a size can only be contained in later ones.
	for _, st := range structs {
		typ := s.structs[st.Name]
		for _, f := range st.Fields {
			ft, err := s.parse(f.Type)
			if err != nil {
				return nil, fmt.Errorf("%s.%s: %w", st.Name, f.Name, err)
			}
			size, err := ft.Size()
			if err != nil {
				return nil, fmt.Errorf("%s.%s: %w", st.Name, f.Name, err)
			}
			if f.Offset > maxSize || !isName(f.Name) {
				return nil, formatErr("%s.%s: offset %d", st.Name, clip(f.Name), f.Offset)
			}
			if st.Size == 0 {
				typ.size = max(typ.size, f.Offset+size)
			}
			typ.members = append(typ.members, member{name: f.Name, typ: ft, bit: f.Offset * 8})
			if _, err := typ.field(&typ.members[len(typ.members)-1]); err != nil {
				return nil, err
			}
		}
	}
	return &Types{name: source, src: s, ptr: pointerSize}, nil
}

func isName(s string) bool {
	for i := range len(s) {
		if !isIdent(s[i]) {
			return false
		}
	}
	return s != "" && len(s) <= maxPath
}

func baseTypes(ptr uint64) map[string]*Type {
	m := map[string]*Type{"bool": {kind: KindInt, name: "bool", size: 1, boolean: true}}
	add := func(size uint64, signed bool, names ...string) {
		for _, n := range names {
			m[n] = &Type{kind: KindInt, name: n, size: size, signed: signed}
		}
	}
	add(1, true, "char", "signed char", "s8")
	add(1, false, "unsigned char", "u8")
	add(2, true, "short", "s16")
	add(2, false, "unsigned short", "u16")
	add(4, true, "int", "s32")
	add(4, false, "unsigned int", "unsigned", "u32")
	add(8, true, "long long", "s64")
	add(8, false, "unsigned long long", "u64")
	add(ptr, true, "long")
	add(ptr, false, "unsigned long")
	return m
}

type givenSource struct {
	structs map[string]*Type
	base    map[string]*Type
	ptr     uint64
}

// parse reads the type of a field.
func (s *givenSource) parse(text string) (*Type, error) {
	bad := func() error { return formatErr("type %q", clip(text)) }
	rest := strings.TrimSpace(text)
	name := rest
	if i := strings.IndexAny(rest, "*["); i >= 0 {
		name = rest[:i]
	}
	rest = rest[len(name):]
	name = strings.Join(strings.Fields(name), " ")
	tagged := strings.HasPrefix(name, "struct ")
	name = strings.TrimPrefix(name, "struct ")
	t := s.base[name]
	switch {
	case name == "void":
		t = void
	case t == nil || tagged:
		if !isName(name) {
			return nil, bad()
		}
		if t = s.structs[name]; t == nil {
			t = &Type{kind: KindForward, name: name}
		}
	}
	for range maxChain {
		rest = strings.TrimSpace(rest)
		stars, ok := strings.CutPrefix(rest, "*")
		if !ok {
			break
		}
		t = &Type{kind: KindPointer, size: s.ptr, elem: t}
		rest = stars
	}
	var dims []uint64
	for rest != "" && len(dims) < maxChain {
		digits, after, ok := strings.Cut(strings.TrimPrefix(rest, "["), "]")
		n, err := strconv.ParseUint(strings.TrimSpace(digits), 10, 32)
		if !ok || err != nil || rest[0] != '[' {
			return nil, bad()
		}
		dims = append(dims, n)
		rest = strings.TrimSpace(after)
	}
	if rest != "" {
		return nil, bad()
	}
	for _, n := range slices.Backward(dims) {
		t = &Type{kind: KindArray, elem: t, n: n}
	}
	return t, nil
}

func (s *givenSource) find(tag, name string) ([]*Type, error) {
	var t *Type
	switch tag {
	case "struct":
		t = s.structs[name]
	case "":
		t = s.base[name]
	}
	if t == nil {
		return nil, nil
	}
	return []*Type{t}, nil
}

func (s *givenSource) fill(*Type) error               { return nil }
func (s *givenSource) function(string) (*Type, error) { return nil, nil }
func (s *givenSource) variable(string) (*Type, error) { return nil, nil }
func (s *givenSource) names() iter.Seq[string]        { return maps.Keys(s.structs) }
