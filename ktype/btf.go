package ktype

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"iter"
	"sync"

	"github.com/cilium/ebpf/btf"
)

const (
	maxBTF      = 32 << 20 // bytes; the largest kernel seen has 5.5 MB
	maxSameName = 64       // types of one name and kind
)

// FromBTF reads the raw BTF of a kernel: what is between __start_BTF and
// __stop_BTF in its memory, in /sys/kernel/btf/vmlinux, or in the section .BTF.
// See Documentation/bpf/btf.rst of Linux. At most 32 MiB and 1,048,575 types are
// accepted. Types of a kind that isn't known are left out, if the BTF says how long they
// are, as that of Linux 7.1 and later does.
func FromBTF(r io.ReaderAt, size int64) (*Types, error) {
	if size < 0 || size > maxBTF {
		return nil, formatErr("BTF of %d bytes, at most %d are read", size, int64(maxBTF))
	}
	var raw bytes.Buffer
	if _, err := io.Copy(&raw, io.NewSectionReader(r, 0, size)); err != nil {
		return nil, fmt.Errorf("reading BTF: %w", err)
	}
	src, err := loadBTF(raw.Bytes(), nil)
	if err != nil {
		return nil, err
	}
	return &Types{name: "BTF", src: src, ptr: src.table.ptr}, nil
}

// WithModule returns the types of t and those that a module adds: btf is its
// split BTF, as in the kernel's btf_module.btf.data or in the .BTF section of the
// file of a module that was built with the kernel. (One that was built apart has a
// .BTF.base: see [Types.WithModuleFile].) A name is looked for in the kernel first, then in the modules in
// the order they were added; "name:struct x" looks in that module only.
//
// Only types that are from BTF can be extended.
func (t *Types) WithModule(name string, btf []byte) (*Types, error) {
	base, ok := t.src.(*btfSource)
	if !ok {
		return nil, fmt.Errorf("module %q: %w: split BTF needs the kernel's BTF, these types are from %s", name, errors.ErrUnsupported, t.name)
	}
	if len(btf) > maxBTF {
		return nil, formatErr("module %q: BTF of %d bytes, at most %d are read", name, len(btf), maxBTF)
	}
	src, err := loadBTF(bytes.Clone(btf), base)
	if err != nil {
		return nil, fmt.Errorf("module %q: %w", name, err)
	}
	modules := append(t.modules[:len(t.modules):len(t.modules)], module{name, src})
	return &Types{name: t.name, src: t.src, modules: modules, ptr: t.ptr, origin: t.origin}, nil
}

// btfSource has the types of one BTF. They are decoded when they are asked for,
// with all that they refer to.
type btfSource struct {
	table *btfTable
	base  *btfSource // of split BTF
	sheet *btfSheet
	spec  *btf.Spec
	// broken is the first error of decoding, which leaves types half done:
	// nothing is decoded after it.
	broken error
}

// btfTable has what the BTF of a kernel and of its modules share. Package btf
// decodes a module's types together with those of the kernel, so that one lock is
// for all.
type btfTable struct {
	ptr uint64

	mu    sync.Mutex // of specs, sheets and broken
	nmu   sync.Mutex // of nodes
	nodes map[btf.Type]*Type
}

func loadBTF(raw []byte, base *btfSource) (s *btfSource, err error) {
	s = &btfSource{base: base}
	if base == nil {
		s.table = &btfTable{nodes: make(map[btf.Type]*Type)}
		s.sheet, err = newSheet(raw, nil)
	} else {
		s.table = base.table
		if s.sheet, err = newSheet(raw, base.sheet); err == nil {
			err = s.sheet.ofBase()
		}
	}
	if err != nil {
		return nil, err
	}
	defer func() {
		if r := recover(); r != nil {
			s, err = nil, formatErr("BTF: %v", r)
		}
	}()
	if s.sheet.plain != nil {
		raw = s.sheet.plain
	}
	s.table.mu.Lock()
	defer s.table.mu.Unlock()
	if base == nil {
		s.table.ptr = s.sheet.pointerSize()
		s.spec, err = btf.LoadSpecFromReader(bytes.NewReader(raw))
	} else {
		s.spec, err = btf.LoadSplitSpecFromReader(bytes.NewReader(raw), base.spec)
	}
	if err != nil {
		return nil, formatErr("BTF: %v", err)
	}
	return s, nil
}

// decode returns the types of a name whose kind is one of those.
func (s *btfSource) decode(name string, kinds ...int) ([]btf.Type, error) {
	s.table.mu.Lock()
	defer s.table.mu.Unlock()
	var types []btf.Type
	for id := range s.sheet.named(name, kinds) {
		if len(types) == maxSameName {
			return nil, formatErr("more than %d types of the name %q", maxSameName, clip(name))
		}
		if s.broken != nil {
			return nil, s.broken
		}
		added, err := s.sheet.admit(id)
		if err != nil {
			return nil, err
		}
		typ, err := s.byID(id)
		if err != nil {
			// Types of the kernel that are decoded already count as if they weren't.
			added.undo()
			s.broken = err
			return nil, err
		}
		types = append(types, typ)
	}
	return types, nil
}

// byID decodes a type that was admitted.
func (s *btfSource) byID(id uint32) (typ btf.Type, err error) {
	defer func() {
		if r := recover(); r != nil {
			err = formatErr("BTF type %d: %v", id, r)
		}
	}()
	typ, err = s.spec.TypeByID(btf.TypeID(id))
	if err != nil {
		return nil, formatErr("BTF type %d: %v", id, err)
	}
	return typ, nil
}

func (s *btfSource) find(tag, name string) ([]*Type, error) {
	var kinds []int
	switch tag {
	case "struct":
		kinds = []int{btfStruct}
	case "union":
		kinds = []int{btfUnion}
	case "enum":
		kinds = []int{btfEnum, btfEnum64}
	default:
		kinds = []int{btfTypedef, btfInt, btfFloat}
	}
	types, err := s.decode(name, kinds...)
	if err != nil {
		return nil, err
	}
	found := make([]*Type, len(types))
	for i, typ := range types {
		found[i] = s.table.node(s, typ)
	}
	return found, nil
}

func (s *btfSource) names() iter.Seq[string] { return s.sheet.allNames() }

func (s *btfSource) function(name string) (*Type, error) {
	return s.only(name, btfFunc)
}

func (s *btfSource) variable(name string) (*Type, error) {
	return s.only(name, btfVar)
}

// only returns the type of the functions or variables of a name, if all have the same
// one.
func (s *btfSource) only(name string, kind int) (*Type, error) {
	objects, err := s.decode(name, kind)
	if err != nil {
		return nil, err
	}
	var first *Type
	for _, obj := range objects {
		var t *Type
		switch obj := obj.(type) {
		case *btf.Func:
			t = s.table.node(s, obj.Type)
		case *btf.Var:
			t = s.table.node(s, obj.Type)
		}
		if first == nil {
			first = t
		}
		if t != first && t.String() != first.String() {
			return nil, fmt.Errorf("%w: several have that name, such as %q and %q", ErrAmbiguous, first, t)
		}
	}
	return first, nil
}

// node returns the Type of a BTF type, without its details.
func (b *btfTable) node(s *btfSource, typ btf.Type) *Type {
	for range maxChain {
		tag, ok := typ.(*btf.TypeTag)
		if !ok {
			break
		}
		typ = tag.Type
	}
	t := &Type{src: s, ref: typ}
	switch typ := typ.(type) {
	case *btf.Int:
		t.kind, t.name, t.size = KindInt, typ.Name, uint64(typ.Size)
	case *btf.Float:
		t.kind, t.name, t.size = KindFloat, typ.Name, uint64(typ.Size)
	case *btf.Pointer:
		t.kind, t.size = KindPointer, b.ptr
	case *btf.Array:
		t.kind = KindArray
	case *btf.Struct:
		t.kind, t.name, t.size = KindStruct, typ.Name, uint64(typ.Size)
	case *btf.Union:
		t.kind, t.name, t.size = KindUnion, typ.Name, uint64(typ.Size)
	case *btf.Enum:
		t.kind, t.name, t.size = KindEnum, typ.Name, uint64(typ.Size)
	case *btf.FuncProto:
		t.kind = KindFunc
	case *btf.Typedef:
		t.kind, t.name = KindTypedef, typ.Name
	case *btf.Const:
		t.kind = KindConst
	case *btf.Volatile:
		t.kind = KindVolatile
	case *btf.Restrict:
		t.kind = KindRestrict
	case *btf.Fwd:
		t.kind, t.name, t.union = KindForward, typ.Name, typ.Kind == btf.FwdUnion
	default:
		return void // or not a type at all, in damaged information
	}
	b.nmu.Lock()
	defer b.nmu.Unlock()
	if known, ok := b.nodes[typ]; ok {
		return known
	}
	b.nodes[typ] = t
	return t
}

func (s *btfSource) fill(t *Type) error {
	node := func(typ btf.Type) *Type { return s.table.node(s, typ) }
	switch typ := t.ref.(type) {
	case *btf.Int:
		t.signed = typ.Encoding&btf.Signed != 0
		t.boolean = typ.Encoding&btf.Bool != 0
	case *btf.Pointer:
		t.elem = node(typ.Target)
	case *btf.Array:
		t.elem, t.n = node(typ.Type), uint64(typ.Nelems)
	case *btf.Struct:
		t.members = s.members(typ.Members)
	case *btf.Union:
		t.members = s.members(typ.Members)
	case *btf.Enum:
		t.signed = typ.Signed
		if values, ok := s.all(typ); ok {
			t.values = values
			return nil
		}
		t.values = make([]EnumValue, len(typ.Values))
		for i, v := range typ.Values {
			t.values[i] = EnumValue{v.Name, int64(v.Value)}
		}
	case *btf.FuncProto:
		t.elem = node(typ.Return)
		for i, p := range typ.Params {
			pt := node(p.Type)
			if i == len(typ.Params)-1 && p.Name == "" && pt == void {
				t.variadic = true
				break
			}
			t.params = append(t.params, Param{Name: p.Name, Type: pt})
		}
	case *btf.Typedef:
		t.elem = node(typ.Type)
	case *btf.Const:
		t.elem = node(typ.Type)
	case *btf.Volatile:
		t.elem = node(typ.Type)
	case *btf.Restrict:
		t.elem = node(typ.Type)
	case *btf.Fwd:
		return s.define(t)
	}
	return nil
}

func (s *btfSource) members(of []btf.Member) []member {
	all := make([]member, len(of))
	for i, m := range of {
		all[i] = member{m.Name, s.table.node(s, m.Type), uint64(m.Offset), uint64(m.BitfieldSize)}
	}
	return all
}

// define finds the definition of a struct or union that is only declared, if
// there is just one.
func (s *btfSource) define(t *Type) error {
	for src := s; src != nil; src = src.base {
		elem, err := definition(src, t)
		if elem != nil || err != nil {
			t.elem = elem
			return err
		}
	}
	return nil
}

func definition(src source, t *Type) (*Type, error) {
	tag := "struct"
	if t.union {
		tag = "union"
	}
	found, err := src.find(tag, t.name)
	if len(found) != 1 {
		return nil, err
	}
	return found[0], nil
}
