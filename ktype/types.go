package ktype

import (
	"errors"
	"fmt"
	"iter"
	"strings"
	"sync"
)

// Bounds on types. Real kernels need less than a tenth of each.
const (
	maxChain   = 32      // typedefs, qualifiers and array dimensions in a row
	maxDepth   = 32      // structs in structs, pointers in a path
	maxVisited = 1 << 16 // members looked at for one name
	maxSize    = 1 << 40 // bytes of a type
	maxMembers = 1 << 16 // of one struct, as in BTF
)

// Types is the type information of one kernel, or of one kernel and some of its
// modules.
type Types struct {
	name    string // Source
	src     source
	modules []module // see WithModule
	ptr     uint64   // bytes of a pointer
	origin  Origin

	fields cache[string, Field]
	plans  cache[planKey, *plan]
}

type module struct {
	name string
	src  source
}

// A source is where types come from. Its methods are safe for concurrent use.
type source interface {
	// find returns the types of that name, in the order of the source. Where
	// tag is "struct", "union" or "enum" it is such a type, else a typedef or a
	// base type.
	find(tag, name string) ([]*Type, error)
	// fill completes a type that find, or fill itself, has made: the fields of
	// Type below once. It must not recurse into other types.
	fill(t *Type) error
	// function returns the KindFunc type of a function.
	function(name string) (*Type, error)
	// variable returns the type of a variable.
	variable(name string) (*Type, error)
	// names yields all names find knows, for suggestions.
	names() iter.Seq[string]
}

// Source says where the types are from: "BTF", "DWARF", "ISF", or what was given
// to New.
func (t *Types) Source() string { return t.name }

// PointerSize returns the size of a pointer in bytes: 8, or 4 for i386 kernels.
func (t *Types) PointerSize() uint64 { return t.ptr }

var tags = []string{"struct", "union", "enum"}

// candidates returns the types a name may stand for, at least one.
func (t *Types) candidates(name string) ([]*Type, error) {
	sources, want, err := t.sources(name)
	if err != nil {
		return nil, err
	}
	for _, src := range sources {
		found, err := find(src, want)
		if len(found) > 0 || err != nil {
			return found, err
		}
	}
	return nil, fmt.Errorf("%w: %q%s", ErrNoType, name, suggest(want, t.names()))
}

// sources returns where a name is to be looked for, and the name without the module's
// that may stand before it.
func (t *Types) sources(name string) (in []source, plain string, err error) {
	plain = strings.TrimSpace(name)
	mod, rest, ok := strings.Cut(plain, ":")
	if !ok {
		in = append(in, t.src)
	}
	for _, m := range t.modules {
		if !ok || m.name == mod {
			in = append(in, m.src)
		}
	}
	if len(in) == 0 {
		return nil, "", fmt.Errorf("%w: %q: types of module %q were not added", ErrNoType, name, mod)
	}
	if ok {
		plain = strings.TrimSpace(rest)
	}
	return in, plain, nil
}

func find(src source, name string) ([]*Type, error) {
	for _, tag := range tags {
		if rest, ok := strings.CutPrefix(name, tag+" "); ok {
			return src.find(tag, strings.TrimSpace(rest))
		}
	}
	for _, tag := range []string{"struct", "union", "", "enum"} {
		found, err := src.find(tag, name)
		if len(found) > 0 || err != nil {
			return found, err
		}
	}
	return nil, nil
}

// names yields the names of all types, those of modules last. A name may come
// several times.
func (t *Types) names() iter.Seq[string] {
	return func(yield func(string) bool) {
		for n := range t.src.names() {
			if !yield(n) {
				return
			}
		}
		for _, m := range t.modules {
			for n := range m.src.names() {
				if !yield(n) {
					return
				}
			}
		}
	}
}

// Type returns the type of that name: see the package comment for how names are
// looked up. If the kernel has several of different size or members the error is
// ErrAmbiguous.
func (t *Types) Type(name string) (*Type, error) {
	found, err := t.candidates(name)
	if err != nil {
		return nil, err
	}
	for _, other := range found[1:] {
		same, err := sameLayout(found[0], other)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		if !same {
			return nil, fmt.Errorf("%w: %q stands for %d types of different layout", ErrAmbiguous, name, len(found))
		}
	}
	return found[0], nil
}

// sameLayout compares size and direct members.
func sameLayout(a, b *Type) (bool, error) {
	a, b = a.Underlying(), b.Underlying()
	if err := errors.Join(a.load(), b.load()); err != nil {
		return false, err
	}
	if a.kind != b.kind || a.size != b.size || len(a.members) != len(b.members) {
		return false, nil
	}
	for i, m := range a.members {
		if n := b.members[i]; m.name != n.name || m.bit != n.bit || m.width != n.width {
			return false, nil
		}
	}
	return true, nil
}

// Sizeof returns the size of a type in bytes.
func (t *Types) Sizeof(name string) (uint64, error) {
	typ, err := t.Type(name)
	if err != nil {
		return 0, err
	}
	size, err := typ.Size()
	if err != nil {
		return 0, fmt.Errorf("%s: %w", name, err)
	}
	return size, nil
}

// Variable returns the type of a variable of the kernel, or of one of the modules, as far
// as the source has them: BTF has per-CPU variables only. "module:name" is looked for in
// that module only.
func (t *Types) Variable(name string) (*Type, error) {
	return t.object("variable", name, source.variable)
}

func (t *Types) object(what, name string, get func(source, string) (*Type, error)) (*Type, error) {
	sources, plain, err := t.sources(name)
	if err != nil {
		return nil, err
	}
	var typ *Type
	for _, src := range sources {
		if typ, err = get(src, plain); typ != nil || err != nil {
			break
		}
	}
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", what, name, err)
	}
	if typ == nil {
		return nil, fmt.Errorf("%w: %s has no type of a %s %q", ErrNoType, t.name, what, name)
	}
	return typ, nil
}

// Kind is what a Type is.
type Kind uint8

// The kinds of types.
const (
	KindVoid Kind = iota
	KindInt       // integers, characters and booleans
	KindFloat
	KindPointer
	KindArray
	KindStruct
	KindUnion
	KindEnum
	KindFunc
	KindTypedef
	KindConst
	KindVolatile
	KindRestrict
	KindForward // a struct or union that is declared, not defined
)

var kindNames = [...]string{"void", "integer", "float", "pointer", "array", "struct", "union", "enum",
	"function", "typedef", "const", "volatile", "restrict", "incomplete type"}

// String returns the kind's name in lower case, such as "struct".
func (k Kind) String() string {
	if int(k) < len(kindNames) {
		return kindNames[k]
	}
	return fmt.Sprintf("kind %d", uint8(k))
}

// A Type is a C type. The zero value is void.
type Type struct {
	// Known when a source makes the type.
	src   source
	ref   any // what the source knows it by
	kind  Kind
	name  string
	size  uint64 // 0 for arrays, functions and what only names another type
	union bool   // KindForward: of a union

	once sync.Once
	err  error

	// Known after load.
	elem     *Type // target, element, result, or the type that this one names; nil is void
	n        uint64
	signed   bool
	boolean  bool
	members  []member
	values   []EnumValue
	params   []Param
	variadic bool
}

type member struct {
	name  string // "" for an anonymous struct or union, or padding
	typ   *Type
	bit   uint64 // offset in bits
	width uint64 // bits of a bit-field, else 0
}

// An EnumValue is one constant of an enum.
type EnumValue struct {
	Name  string
	Value int64 // as bits, where the enum is unsigned
}

var void = new(Type)

func (t *Type) load() error {
	if t.src == nil {
		return nil
	}
	t.once.Do(func() { t.err = t.src.fill(t) })
	return t.err
}

// Kind returns what the type is, by its outermost part: KindTypedef for a
// typedef of a struct. See Underlying.
func (t *Type) Kind() Kind { return t.kind }

// Name returns the name of a base type or typedef, or the tag of a struct, union
// or enum, or "".
func (t *Type) Name() string { return t.name }

// Elem returns what a pointer points to, an array consists of, a function
// returns, or a typedef or qualifier stands for; for others, and where it is
// unknown, void.
func (t *Type) Elem() *Type {
	if t.load() != nil || t.elem == nil {
		return void
	}
	return t.elem
}

// Len returns the number of an array's elements: 0 for a flexible array, and for a
// type that is not an array.
func (t *Type) Len() uint64 {
	u := t.Underlying()
	if u.kind != KindArray || u.load() != nil {
		return 0
	}
	return u.n
}

// Signed reports whether the type is a signed integer or enum.
func (t *Type) Signed() bool {
	u := t.Underlying()
	return u.load() == nil && u.signed
}

// IsBool reports whether the type is _Bool.
func (t *Type) IsBool() bool {
	u := t.Underlying()
	return u.load() == nil && u.boolean
}

// IsString reports whether the type is a pointer to, or an array of, char.
func (t *Type) IsString() bool {
	u := t.Underlying()
	if u.kind != KindPointer && u.kind != KindArray {
		return false
	}
	e := u.Elem().Underlying()
	return e.kind == KindInt && e.name == "char"
}

// alias reports whether the type is only a name of another.
func (t *Type) alias() bool {
	return t.kind >= KindTypedef
}

// Underlying returns the type without typedefs and qualifiers, and the definition
// of a struct that is only declared here. A chain of more than 32 is void.
func (t *Type) Underlying() *Type {
	for range maxChain {
		if !t.alias() {
			return t
		}
		if t.load() != nil || t.elem == nil {
			if t.kind == KindForward {
				return t
			}
			return void
		}
		t = t.elem
	}
	return void
}

// Size returns the size of the type in bytes: 0 for void, functions and flexible
// arrays. For a struct that is nowhere defined the error is ErrNoType.
func (t *Type) Size() (uint64, error) {
	count := uint64(1)
	for range maxChain {
		u := t.Underlying()
		if err := errors.Join(t.load(), u.load()); err != nil {
			return 0, err
		}
		size := u.size
		switch u.kind {
		case KindForward:
			return 0, fmt.Errorf("%w: %s is declared, but not defined", ErrNoType, u)
		case KindArray:
			size = u.n
		}
		if size > 0 && count > maxSize/size {
			return 0, formatErr("%s has more than %d bytes", t, uint64(maxSize))
		}
		count *= size
		if u.kind != KindArray {
			return count, nil
		}
		t = u.Elem()
	}
	return 0, formatErr("array of more than %d dimensions", maxChain)
}

// Fields yields the direct members of a struct or union in the order of their
// declaration, with "" as the name of anonymous ones. Members outside the struct,
// which only damaged information has, are left out.
func (t *Type) Fields() iter.Seq2[string, Field] {
	return func(yield func(string, Field) bool) {
		u := t.Underlying()
		if u.load() != nil {
			return
		}
		for i := range u.members {
			f, err := u.field(&u.members[i])
			if err == nil && !yield(u.members[i].name, f) {
				return
			}
		}
	}
}

// Values returns the constants of an enum. The caller must not change them.
func (t *Type) Values() []EnumValue {
	u := t.Underlying()
	if u.load() != nil {
		return nil
	}
	return u.values
}

// cache is a map for many readers.
type cache[K comparable, V any] struct {
	mu sync.RWMutex
	m  map[K]V
}

func (c *cache[K, V]) get(k K) (V, bool) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	v, ok := c.m[k]
	return v, ok
}

// maxCached bounds a cache: it begins anew where a program makes up more keys.
const maxCached = 1 << 14

func (c *cache[K, V]) put(k K, v V) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.m == nil || len(c.m) >= maxCached {
		c.m = make(map[K]V)
	}
	c.m[k] = v
}
