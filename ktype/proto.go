package ktype

import (
	"fmt"
	"strconv"
	"strings"
)

// A Prototype is how a function is called.
type Prototype struct {
	Name     string
	Params   []Param
	Variadic bool
	Return   *Type
}

// A Param is one parameter of a function.
type Param struct {
	Name string // may be ""
	Type *Type
}

// Decl returns the parameter as in C: "const char *filename".
func (p Param) Decl() string { return p.Type.Decl(p.Name) }

// Format returns the value of a register, or of a stack slot, as a value of the
// parameter's type.
func (p Param) Format(w uint64) string { return p.Type.Format(w) }

// String returns the prototype in C.
func (p *Prototype) String() string {
	return declare(&Type{kind: KindFunc, elem: p.Return, params: p.Params, variadic: p.Variadic}, p.Name)
}

// Prototype returns how a function of the kernel, or of a module that was added, is
// called; "module:name" is looked for in that module only. BTF has nine functions in ten,
// DWARF all that are written in C, ISF none.
func (t *Types) Prototype(fn string) (*Prototype, error) {
	typ, err := t.object("function", fn, source.function)
	if err != nil {
		return nil, err
	}
	if typ.kind != KindFunc {
		return nil, fmt.Errorf("function %s: %w: it has the type %s", fn, ErrKind, typ)
	}
	if err := typ.load(); err != nil {
		return nil, fmt.Errorf("function %s: %w", fn, err)
	}
	params := append([]Param(nil), typ.params...)
	_, fn, _ = t.sources(fn)
	return &Prototype{Name: fn, Params: params, Variadic: typ.variadic, Return: typ.Elem()}, nil
}

// Enum returns an enum's type; see Values and Format. The name may be that of a
// typedef.
func (t *Types) Enum(name string) (*Type, error) {
	typ, err := t.Type(name)
	if err != nil {
		return nil, err
	}
	if u := typ.Underlying(); u.kind != KindEnum {
		return nil, fmt.Errorf("%w: %s (%s) is not an enum", ErrKind, name, u.kind)
	}
	return typ, nil
}

// Format returns w, as a register has it, as a value of the type: integers in
// decimal, truncated to their size, as signed or unsigned; enums by name, or as a
// number; booleans as true or false; pointers in hexadecimal, NULL for zero. If the
// type is not a number it returns w in hexadecimal.
func (t *Type) Format(w uint64) string {
	u := t.Underlying()
	size := u.size
	if u.load() != nil || scalar(Field{Size: size, Type: u}) != nil {
		return fmt.Sprintf("%#x", w)
	}
	width := uint(size) * 8
	if width < 64 {
		w &= 1<<width - 1
	}
	switch {
	case u.kind == KindPointer:
		if w == 0 {
			return "NULL"
		}
		return fmt.Sprintf("%#x", w)
	case u.boolean:
		// The ABI defines only bit 0.
		return strconv.FormatBool(w&1 != 0)
	case u.kind == KindEnum:
		if name := u.enumName(w, width); name != "" {
			return name
		}
	}
	if u.signed {
		return strconv.FormatInt(signExtend(w, width), 10)
	}
	return strconv.FormatUint(w, 10)
}

// String returns the type as C writes it without a name: "char[16]",
// "struct task_struct *".
func (t *Type) String() string { return t.Decl("") }

// Decl returns the declaration of a variable of the type: "char comm[16]". Types
// that nest more than 32 deep end in "…".
func (t *Type) Decl(name string) string { return declare(t, name) }

const (
	maxParams = 64      // of a function type that is printed
	maxDecl   = 1 << 12 // bytes of a declaration
)

func declare(t *Type, name string) string {
	d := declarer{budget: maxDecl}
	return strings.TrimRight(d.decl(t, name, maxChain), " ")
}

// declarer bounds the size of a declaration: function types with parameters of
// function types could grow exponentially.
type declarer struct{ budget int }

// decl wraps inner, what is declared so far, in what t is: C declarations are
// read from the inside out.
func (d *declarer) decl(t *Type, inner string, depth int) string {
	if t == nil {
		t = void
	}
	if d.budget -= len(inner) + 1; d.budget < 0 || depth == 0 || t.load() != nil {
		return "… " + clip(inner)
	}
	depth--
	switch t.kind {
	case KindPointer:
		return d.decl(t.elem, parens(t.elem, "*"+inner), depth)
	case KindArray:
		n := ""
		if t.n > 0 {
			n = strconv.FormatUint(t.n, 10)
		}
		return d.decl(t.elem, inner+"["+n+"]", depth)
	case KindFunc:
		var b strings.Builder
		b.WriteString(inner + "(")
		for i, p := range t.params {
			if i > 0 {
				b.WriteString(", ")
			}
			if i == maxParams || d.budget < 0 {
				b.WriteString("…")
				break
			}
			b.WriteString(strings.TrimRight(d.decl(p.Type, p.Name, depth), " "))
		}
		switch {
		case t.variadic && len(t.params) > 0:
			b.WriteString(", ...")
		case t.variadic:
			b.WriteString("...")
		case len(t.params) == 0:
			b.WriteString("void")
		}
		b.WriteByte(')')
		return d.decl(t.elem, b.String(), depth)
	case KindConst, KindVolatile, KindRestrict:
		// A pointer's qualifier follows the star.
		if u := t.elem; u != nil && (u.kind == KindPointer || u.kind >= KindConst && u.kind <= KindRestrict && u.Underlying().kind == KindPointer) {
			return d.decl(u, strings.TrimRight(t.kind.String()+" "+inner, " "), depth)
		}
		return t.kind.String() + " " + d.decl(t.elem, inner, depth)
	}
	if strings.HasPrefix(inner, "[") {
		return t.base() + inner
	}
	return strings.TrimRight(t.base()+" "+inner, " ")
}

// parens encloses a pointer's declarator where what it points to, an array or a
// function, binds tighter.
func parens(elem *Type, inner string) string {
	if elem != nil && (elem.kind == KindArray || elem.kind == KindFunc) {
		return "(" + inner + ")"
	}
	return inner
}

// base returns the name of a type that is not derived from another.
func (t *Type) base() string {
	tag := ""
	switch t.kind {
	case KindVoid:
		return "void"
	case KindStruct, KindUnion, KindEnum:
		tag = t.kind.String() + " "
	case KindForward:
		tag = "struct "
		if t.union {
			tag = "union "
		}
	}
	if t.name == "" {
		return tag + "{…}"
	}
	return tag + clip(t.name)
}
