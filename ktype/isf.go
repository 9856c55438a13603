package ktype

import (
	"bytes"
	"cmp"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/vmprobes/vmprobes/internal/kimage"
)

// maxISF bounds the bytes of an unpacked ISF file. Those of kernels have 20 to
// 60 MB.
const maxISF = 256 << 20

// FromISF reads an Intermediate Symbol File of Volatility 3, as dwarf2json makes
// it: JSON, plain or packed by xz, gzip, bzip2 or zstd, of at most 256 MiB. It has no
// function prototypes, and no typedefs. A member whose type the file lacks, or is of a
// kind that isn't known, gives an error that names the type, where it is asked for.
func FromISF(r io.Reader) (*Types, error) {
	r, closer, err := unpack(r, maxISF)
	if err != nil {
		return nil, err
	}
	defer closer()
	var f isfFile
	if err := json.NewDecoder(r).Decode(&f); err != nil {
		return nil, readErr("ISF", err)
	}
	if len(f.UserTypes) == 0 {
		return nil, formatErr("ISF file has no user_types")
	}
	s := &isfSource{isfFile: f, ptr: 8, nodes: make(map[*isfRef]*Type)}
	if p, ok := f.BaseTypes["pointer"]; ok {
		if p.Endian == "big" {
			return nil, formatErr("ISF file of a big-endian kernel")
		}
		s.ptr = p.Size
	}
	if s.ptr != 4 && s.ptr != 8 {
		return nil, formatErr("ISF file has pointers of %d bytes", s.ptr)
	}
	t := &Types{name: "ISF", src: s, ptr: s.ptr}
	// dwarf2json keeps the contents of linux_banner, for Volatility to compare.
	if b, err := base64.StdEncoding.DecodeString(f.Symbols["linux_banner"].Data); err == nil {
		t.origin.Banners = kimage.Banners(bytes.NewReader(b))
	}
	return t, nil
}

// readErr tells damaged data from a failed read.
func readErr(what string, err error) error {
	if errors.Is(err, ErrFormat) {
		return err // of limitReader, which has said what it was doing
	}
	var syntax *json.SyntaxError
	var typ *json.UnmarshalTypeError
	if errors.As(err, &syntax) || errors.As(err, &typ) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) {
		return formatErr("%s: %v", what, err)
	}
	return fmt.Errorf("%s: %w", what, err)
}

// The parts of the format that are used: volatility3/schemas/schema-6.2.0.json.
type isfFile struct {
	BaseTypes map[string]isfBase   `json:"base_types"`
	UserTypes map[string]isfStruct `json:"user_types"`
	Enums     map[string]isfEnum   `json:"enums"`
	Symbols   map[string]isfSymbol `json:"symbols"`
}

type isfBase struct {
	Size   uint64 `json:"size"`
	Signed bool   `json:"signed"`
	Kind   string `json:"kind"` // void, int, float, char, bool
	Endian string `json:"endian"`
}

type isfStruct struct {
	Kind   string              `json:"kind"` // struct, union, class
	Size   uint64              `json:"size"`
	Fields map[string]isfField `json:"fields"`
}

type isfField struct {
	Type      *isfRef `json:"type"`
	Offset    uint64  `json:"offset"`
	Anonymous bool    `json:"anonymous"`
}

type isfEnum struct {
	Size      uint64                 `json:"size"`
	Base      string                 `json:"base"`
	Constants map[string]json.Number `json:"constants"`
}

type isfSymbol struct {
	Type *isfRef `json:"type"`
	Data string  `json:"constant_data"` // base64
}

// isfRef is a use of a type.
type isfRef struct {
	Kind    string  `json:"kind"` // struct, union, class, enum, base, pointer, array, bitfield, function
	Name    string  `json:"name"`
	Subtype *isfRef `json:"subtype"`
	Count   uint64  `json:"count"`

	// kind bitfield
	Type   *isfRef `json:"type"`
	BitPos uint64  `json:"bit_position"`
	BitLen uint64  `json:"bit_length"`
}

type isfSource struct {
	isfFile
	ptr uint64

	mu    sync.Mutex
	nodes map[*isfRef]*Type
	// Types by name: a name of each kind has one *isfRef.
	named map[isfRef]*isfRef
}

// name returns the one reference to a named type.
func (s *isfSource) name(kind, name string) *isfRef {
	s.mu.Lock()
	defer s.mu.Unlock()
	key := isfRef{Kind: kind, Name: name}
	if s.named == nil {
		s.named = make(map[isfRef]*isfRef)
	}
	if s.named[key] == nil {
		s.named[key] = &key
	}
	return s.named[key]
}

func (s *isfSource) find(tag, name string) ([]*Type, error) {
	kind := tag
	ok := false
	switch tag {
	case "struct", "union":
		u, have := s.UserTypes[name]
		ok = have && (u.Kind == "union") == (tag == "union")
	case "enum":
		_, ok = s.Enums[name]
	default:
		kind = "base"
		_, ok = s.BaseTypes[name]
		ok = ok && name != "pointer"
	}
	if !ok {
		return nil, nil
	}
	t, err := s.node(s.name(kind, name))
	if err != nil {
		return nil, err
	}
	return []*Type{t}, nil
}

func (s *isfSource) names() iter.Seq[string] {
	return func(yield func(string) bool) {
		for n := range s.UserTypes {
			if !yield(n) {
				return
			}
		}
		for n := range s.Enums {
			if !yield(n) {
				return
			}
		}
	}
}

func (s *isfSource) function(string) (*Type, error) { return nil, nil }

func (s *isfSource) variable(name string) (*Type, error) {
	sym := s.Symbols[name]
	if sym.Type == nil {
		return nil, nil
	}
	return s.node(sym.Type)
}

// node returns the type that a reference names, without its details.
func (s *isfSource) node(ref *isfRef) (*Type, error) {
	if ref == nil {
		return void, nil
	}
	switch ref.Kind {
	case "struct", "union", "class", "enum", "base":
		kind := ref.Kind
		if kind == "class" {
			kind = "struct"
		}
		if u, ok := s.UserTypes[ref.Name]; ok && kind != "enum" && kind != "base" && (u.Kind == "union") != (kind == "union") {
			return nil, formatErr("ISF: %s %q is defined as a %s", kind, clip(ref.Name), clip(u.Kind))
		}
		ref = s.name(kind, ref.Name)
	}
	t := &Type{src: s, ref: ref}
	switch ref.Kind {
	case "struct", "union":
		u, ok := s.UserTypes[ref.Name]
		t.kind, t.size, t.union = KindStruct, u.Size, ref.Kind == "union"
		switch {
		case !ok:
			t.kind = KindForward
		case t.union:
			t.kind = KindUnion
		}
		t.name = ref.Name
		if strings.HasPrefix(t.name, "unnamed_") {
			t.name = "" // as dwarf2json has to call them
		}
	case "enum":
		e, ok := s.Enums[ref.Name]
		if !ok {
			t.kind = KindTypedef // of nothing: see fill
			break
		}
		t.kind, t.name, t.size = KindEnum, ref.Name, e.Size
		if strings.HasPrefix(t.name, "unnamed_") {
			t.name = ""
		}
	case "base":
		b, ok := s.BaseTypes[ref.Name]
		switch b.Kind {
		case "":
			if !ok && ref.Name != "void" {
				t.kind = KindTypedef // of nothing: see fill
				break
			}
			return void, nil
		case "void":
			return void, nil
		case "float":
			t.kind = KindFloat
		default:
			t.kind = KindInt
		}
		t.name, t.size = ref.Name, b.Size
	case "pointer":
		t.kind, t.size = KindPointer, s.ptr
	case "array":
		t.kind = KindArray
	case "function":
		t.kind = KindFunc
	default:
		t.kind = KindTypedef // of nothing: see fill
	}
	if t.size > maxSize {
		return nil, formatErr("ISF: %q has %d bytes", clip(ref.Name), t.size)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if known := s.nodes[ref]; known != nil {
		return known, nil
	}
	s.nodes[ref] = t
	return t, nil
}

func (s *isfSource) fill(t *Type) (err error) {
	ref := t.ref.(*isfRef)
	switch t.kind {
	case KindTypedef:
		switch ref.Kind {
		case "base":
			return formatErr("ISF: the base type %q is not among the file's base_types", clip(ref.Name))
		case "enum":
			return formatErr("ISF: the enum %q is not among the file's enums", clip(ref.Name))
		}
		return formatErr("ISF: type of kind %q", clip(ref.Kind))
	case KindInt:
		b := s.BaseTypes[ref.Name]
		t.signed, t.boolean = b.Signed, b.Kind == "bool"
	case KindPointer:
		t.elem, err = s.node(ref.Subtype)
	case KindArray:
		t.n = ref.Count
		t.elem, err = s.node(ref.Subtype)
	case KindEnum:
		e := s.Enums[ref.Name]
		t.signed = s.BaseTypes[e.Base].Signed
		for name, n := range e.Constants {
			v, err := enumConstant(n)
			if err != nil {
				return formatErr("ISF: enum %q: %v", clip(ref.Name), err)
			}
			t.values = append(t.values, EnumValue{name, v})
			t.signed = t.signed || strings.HasPrefix(n.String(), "-")
		}
		slices.SortFunc(t.values, func(a, b EnumValue) int {
			return cmp.Or(cmp.Compare(a.Value, b.Value), cmp.Compare(a.Name, b.Name))
		})
	case KindStruct, KindUnion:
		return s.members(t, s.UserTypes[ref.Name].Fields)
	}
	return err
}

func enumConstant(n json.Number) (int64, error) {
	if v, err := strconv.ParseInt(n.String(), 10, 64); err == nil {
		return v, nil
	}
	v, err := strconv.ParseUint(n.String(), 10, 64)
	return int64(v), err
}

// members puts the fields in the order of their offsets: JSON objects have none.
func (s *isfSource) members(t *Type, fields map[string]isfField) error {
	for name, f := range fields {
		m := member{name: name, bit: min(f.Offset, maxSize+1) * 8}
		if f.Anonymous || strings.HasPrefix(name, "unnamed_field_") {
			m.name = "" // older files only have the name
		}
		ref := f.Type
		if ref != nil && ref.Kind == "bitfield" {
			m.bit += min(ref.BitPos, 1<<16)
			m.width = ref.BitLen
			if m.width == 0 || m.width > 64 {
				return formatErr("ISF: bit-field %q of %d bits", clip(name), m.width)
			}
			ref = ref.Type
		}
		typ, err := s.node(ref)
		if err != nil {
			return fmt.Errorf("field %q: %w", clip(name), err)
		}
		m.typ = typ
		t.members = append(t.members, m)
	}
	slices.SortFunc(t.members, func(a, b member) int {
		return cmp.Or(cmp.Compare(a.bit, b.bit), cmp.Compare(a.name, b.name))
	})
	return nil
}
