package ktype

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
)

// maxPath bounds the bytes of a path.
const maxPath = 1 << 10

// A Field is the place and type of a member in an object.
type Field struct {
	Offset    uint64 // bytes from the object's start; of a bit-field, to the byte with its lowest bit
	Size      uint64 // bytes; of a bit-field, those that it has a part of
	BitOffset uint8  // of a bit-field: its lowest bit in the byte at Offset, 0 to 7
	BitSize   uint8  // of a bit-field: its width, 1 to 64, else 0
	Type      *Type
}

// same reports whether reading f and g gives the same.
func (f Field) same(g Field) bool {
	return f.Offset == g.Offset && f.Size == g.Size && f.BitOffset == g.BitOffset && f.BitSize == g.BitSize
}

// A hop is one name or index of a path.
type hop struct {
	name  string // "" for an index
	index uint64
}

func (h hop) String() string {
	if h.name == "" {
		return "[" + strconv.FormatUint(h.index, 10) + "]"
	}
	return h.name
}

// splitPath cuts a path into the type's name and the rest.
func splitPath(path string) (typ, rest string) {
	i := strings.IndexAny(path, ".[")
	if j := strings.Index(path, "->"); j >= 0 && (i < 0 || j < i) {
		i = j
	}
	if i < 0 {
		return path, ""
	}
	return path[:i], path[i:]
}

// parseHops reads what follows a type's name, or the same without the first dot.
// The empty path has no hops.
func parseHops(path string) ([]hop, error) {
	bad := func(what string) error { return fmt.Errorf("%w: %q: %s", ErrPath, clip(path), what) }
	if len(path) > maxPath {
		return nil, bad("too long")
	}
	var hops []hop
	for rest, first := path, true; rest != ""; first = false {
		if digits, ok := strings.CutPrefix(rest, "["); ok {
			digits, after, ok := strings.Cut(digits, "]")
			if !ok {
				return nil, bad("a [ without ]")
			}
			n, err := strconv.ParseUint(digits, 10, 32)
			if err != nil {
				return nil, bad("the index " + strconv.Quote(digits) + " is not a decimal number below 2^32")
			}
			hops = append(hops, hop{index: n})
			rest = after
			continue
		}
		after, ok := strings.CutPrefix(rest, ".")
		if !ok {
			after, ok = strings.CutPrefix(rest, "->")
		}
		if !ok && !first {
			return nil, bad("expected one of . -> [")
		}
		n := 0
		for n < len(after) && isIdent(after[n]) {
			n++
		}
		if n == 0 {
			return nil, bad("a name is missing")
		}
		hops = append(hops, hop{name: after[:n]})
		rest = after[n:]
	}
	return hops, nil
}

func isIdent(c byte) bool {
	return c == '_' || c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z'
}

// clip shortens what goes into an error.
func clip(s string) string {
	const most = 200
	if len(s) > most {
		return s[:most] + "…"
	}
	return s
}

// field returns where a member is, if it is within the type.
func (t *Type) field(m *member) (Field, error) {
	typ := m.typ
	if typ == nil || t.size > maxSize || m.bit > maxSize*8 {
		return Field{}, formatErr("member %q of %s has no type, or a wrong offset", clip(m.name), t)
	}
	size, err := typ.Size()
	if err != nil {
		return Field{}, err
	}
	f := Field{Offset: m.bit / 8, Size: size, Type: typ}
	end := m.bit + size*8
	if m.width > 0 {
		f.BitOffset, f.BitSize = uint8(m.bit%8), uint8(m.width)
		f.Size = (m.bit%8 + m.width + 7) / 8
		end = m.bit + m.width
		if m.width > 64 || m.width > size*8 {
			return Field{}, formatErr("bit-field %q of %s has %d bits", clip(m.name), t, m.width)
		}
	} else if m.bit%8 != 0 {
		return Field{}, formatErr("member %q of %s is at bit %d", clip(m.name), t, m.bit)
	}
	if end > t.size*8 {
		return Field{}, formatErr("member %q of %s ends at bit %d, beyond its %d bytes", clip(m.name), t, end, t.size)
	}
	return f, nil
}

// member finds a member by name, also in anonymous structs and unions.
func (t *Type) member(name string) (Field, error) {
	if t.kind != KindStruct && t.kind != KindUnion {
		return Field{}, fmt.Errorf("%w: %s (%s) has no field %q", ErrKind, t, t.kind, clip(name))
	}
	budget := maxVisited
	f, ok, err := t.search(name, maxDepth, &budget)
	if err != nil {
		return Field{}, err
	}
	if !ok {
		return Field{}, fmt.Errorf("%w: %s has no %q%s", ErrNoField, t, clip(name), suggest(name, t.fieldNames()))
	}
	return f, nil
}

func (t *Type) search(name string, depth int, budget *int) (Field, bool, error) {
	if err := t.load(); err != nil {
		return Field{}, false, err
	}
	for i := range t.members {
		if m := &t.members[i]; m.name == name {
			f, err := t.field(m)
			return f, err == nil, err
		}
	}
	if *budget -= len(t.members); *budget < 0 || depth == 0 {
		return Field{}, false, formatErr("%s has too many anonymous members", t)
	}
	for i := range t.members {
		m := &t.members[i]
		if m.name != "" || m.typ == nil {
			continue
		}
		u := m.typ.Underlying()
		if u.kind != KindStruct && u.kind != KindUnion {
			continue
		}
		f, ok, err := u.search(name, depth-1, budget)
		if err != nil {
			return Field{}, false, err
		}
		if ok {
			outer, err := t.field(m)
			f.Offset += outer.Offset
			return f, err == nil, err
		}
	}
	return Field{}, false, nil
}

// A route is a compiled path: pointers to follow, and the field at the end.
type route struct {
	// derefs[i] is where the pointer to the next object is, in the one before.
	derefs []Field
	// texts[i] is the part of the path up to that pointer, text all of it.
	texts []string
	text  string
	last  Field
}

// compile finds the way from an object of type t.
func (t *Type) compile(hops []hop) (route, error) {
	var r route
	size, err := t.Size()
	if err != nil && len(hops) > 0 {
		return route{}, err
	}
	at := Field{Size: size, Type: t}
	var text strings.Builder
	for _, h := range hops {
		u := at.Type.Underlying()
		if at.BitSize > 0 {
			return route{}, fmt.Errorf("%w: %s is a bit-field", ErrKind, text.String())
		}
		if u.kind == KindPointer {
			if len(r.derefs) == maxDepth {
				return route{}, fmt.Errorf("%w: more than %d pointers", ErrPath, maxDepth)
			}
			r.derefs = append(r.derefs, at)
			r.texts = append(r.texts, text.String())
			target := u.Elem()
			size, err := target.Size()
			if err != nil {
				return route{}, err
			}
			at = Field{Size: size, Type: target}
			if h.name == "" {
				// p[i] is the i-th object from the target on.
				if at.Offset, err = scale(h.index, size, target); err != nil {
					return route{}, err
				}
				text.WriteString(h.String())
				continue
			}
			u = target.Underlying()
		}
		var f Field
		if h.name == "" {
			f, err = u.element(h.index)
		} else {
			f, err = u.member(h.name)
		}
		if err != nil {
			return route{}, err
		}
		if f.Offset > math.MaxInt64-at.Offset {
			return route{}, formatErr("offset of %s", h)
		}
		f.Offset += at.Offset
		at = f
		if h.name != "" && text.Len() > 0 {
			text.WriteByte('.')
		}
		text.WriteString(h.String())
	}
	r.last, r.text = at, text.String()
	return r, nil
}

// element returns where an array's element is. Those of flexible arrays are
// beyond the object's size.
func (t *Type) element(i uint64) (Field, error) {
	if t.kind != KindArray {
		return Field{}, fmt.Errorf("%w: %s (%s) has no element [%d]", ErrKind, t, t.kind, i)
	}
	if err := t.load(); err != nil {
		return Field{}, err
	}
	if t.n > 0 && i >= t.n {
		return Field{}, fmt.Errorf("%w: [%d] of %s", ErrRange, i, t)
	}
	elem := t.Elem()
	size, err := elem.Size()
	if err != nil {
		return Field{}, err
	}
	off, err := scale(i, size, elem)
	return Field{Offset: off, Size: size, Type: elem}, err
}

func scale(i, size uint64, t *Type) (uint64, error) {
	if size == 0 && i > 0 {
		return 0, fmt.Errorf("%w: index of %s, which has no size", ErrKind, t)
	}
	if size > 0 && i > maxSize/size {
		return 0, fmt.Errorf("%w: [%d] of %s", ErrRange, i, t)
	}
	return i * size, nil
}

// Offset returns the place that the member named by a path has in an object of the
// path's type: "task_struct.comm". A path without members gives the type itself. If
// the path goes through a pointer the error is ErrPointer: see At and Decode.
//
// Results are kept, so asking again is cheap and allocates nothing.
func (t *Types) Offset(path string) (Field, error) {
	if f, ok := t.fields.get(path); ok {
		return f, nil
	}
	f, err := t.offset(path)
	if err != nil {
		return Field{}, fmt.Errorf("%s: %w", clip(path), err)
	}
	t.fields.put(path, f)
	return f, nil
}

func (t *Types) offset(path string) (Field, error) {
	name, rest := splitPath(path)
	hops, err := parseHops(rest)
	if err != nil {
		return Field{}, err
	}
	r, err := t.route(name, hops)
	if err != nil {
		return Field{}, err
	}
	if len(r.derefs) > 0 {
		return Field{}, fmt.Errorf("%w: %s is one; use At or Decode", ErrPointer, r.texts[0])
	}
	return r.last, nil
}

// HasField reports whether this kernel has the type and member that a path names. The
// path is as for Offset, and may go through pointers.
func (t *Types) HasField(path string) bool {
	name, rest := splitPath(path)
	hops, err := parseHops(rest)
	if err != nil {
		return false
	}
	_, err = t.route(name, hops)
	return err == nil
}

// route compiles a path from a named type. Where the name stands for several
// types the way must be the same in all that have it.
func (t *Types) route(name string, hops []hop) (route, error) {
	found, err := t.candidates(name)
	if err != nil {
		return route{}, err
	}
	var r route
	var first error
	have := false
	for _, typ := range found {
		other, err := typ.compile(hops)
		switch {
		case errors.Is(err, ErrNoField) && len(found) > 1:
			first = errors.Join(first, err)
		case err != nil:
			return route{}, err
		case !have:
			r, have = other, true
		case !r.same(other):
			return route{}, fmt.Errorf("%w: %q stands for %d types where this differs", ErrAmbiguous, name, len(found))
		}
	}
	if !have {
		return route{}, first
	}
	return r, nil
}

func (r route) same(o route) bool {
	if len(r.derefs) != len(o.derefs) || !r.last.same(o.last) {
		return false
	}
	for i := range r.derefs {
		if !r.derefs[i].same(o.derefs[i]) {
			return false
		}
	}
	return true
}
