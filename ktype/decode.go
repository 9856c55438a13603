package ktype

import (
	"bytes"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
)

const (
	maxOps    = 4096     // numbers and strings of one Go struct, array elements each
	maxSpan   = pageSize // bytes that are read together
	maxGap    = 256      // bytes between two fields that are read together
	maxInline = 1 << 16  // bytes of one field
)

// Decode reads an object into a Go struct, to which dst points. The struct's
// fields say in a tag where in the object they come from:
//
//	struct {
//		Pid    int32  `ktype:"pid"`
//		State  uint32 `ktype:"__state|state"`         // the first that this kernel has
//		Parent string `ktype:"real_parent.comm"`      // through a pointer
//		PGD    uint64 `ktype:"mm.pgd,optional"`       // stays 0 if mm is null
//		Sched  struct {                               // members of se
//			VRuntime uint64 `ktype:"vruntime"`
//		} `ktype:"se"`
//	}
//
// Integers of any width and bool take integers, enums, bit-fields and pointers;
// what doesn't fit is an error that matches ErrRange. A string takes what
// Value.CString reads, or the name of an enum's value (its number, if it has
// none). An array takes an array of at least its length, or a flexible one.
// Structs take structs, or pointers to one; embedded ones without a tag are the
// same object. Fields without a tag are left alone.
//
// With ",optional" a field is left alone where the kernel has no such member, or
// a pointer on the way, or to the string, is null.
//
// Fields that are close together are read at once. The error is a *ReadError, unless
// a tag is wrong; the struct may then be written in part.
func (t *Types) Decode(m Memory, typ string, addr uint64, dst any) error {
	v := reflect.ValueOf(dst)
	if v.Kind() != reflect.Pointer || v.IsNil() || v.Elem().Kind() != reflect.Struct {
		return fmt.Errorf("decode %s: %w: the destination is a %T, not a pointer to a struct", typ, ErrKind, dst)
	}
	key := planKey{typ, v.Type().Elem()}
	p, ok := t.plans.get(key)
	if !ok {
		var err error
		if p, err = t.plan(key); err != nil {
			return fmt.Errorf("decode %s: %w", clip(typ), err)
		}
		t.plans.put(key, p)
	}
	return p.run(m, addr, v.Elem())
}

type planKey struct {
	typ string
	dst reflect.Type
}

// A plan says what to read for one C type and one Go type.
type plan struct {
	typ     string
	objects []object // the first is the root; each comes after that with its pointer
}

// object is one C object: the root, or what a pointer points to.
type object struct {
	path  string
	ops   []op // by offset
	spans []span
}

// span is a part of an object that is read at once: ops[first:end].
type span struct {
	off        uint64
	size       int
	first, end int
}

type opKind uint8

const (
	opInt     opKind = iota // to int, uint or bool
	opEnum                  // to string, by name
	opString                // from an array of characters
	opCString               // from a pointer to characters
	opBytes                 // array of bytes from array of characters
	opDeref                 // the pointer to another object
)

// op takes one field.
type op struct {
	kind     opKind
	f        Field
	path     string
	index    []int // of the Go field: fields and elements
	target   int   // opDeref: the object it leads to
	optional bool
}

// plan compiles a Go type.
func (t *Types) plan(key planKey) (*plan, error) {
	c := compiler{t: t, plan: &plan{typ: key.typ}, known: map[deref]int{}}
	c.plan.objects = []object{{path: key.typ}}
	if err := c.structure(key.dst, nil, nil, false); err != nil {
		return nil, err
	}
	for i := range c.plan.objects {
		c.plan.objects[i].join()
	}
	return c.plan, nil
}

type compiler struct {
	t     *Types
	plan  *plan
	known map[deref]int
	ops   int
}

// deref is a pointer in an object.
type deref struct {
	object   int
	offset   uint64
	optional bool
}

func (c *compiler) structure(typ reflect.Type, hops []hop, index []int, optional bool) error {
	for i := range typ.NumField() {
		sf := typ.Field(i)
		idx := append(index[:len(index):len(index)], i)
		tag, ok := sf.Tag.Lookup("ktype")
		switch {
		case !ok && sf.Anonymous && sf.Type.Kind() == reflect.Struct:
			if err := c.structure(sf.Type, hops, idx, optional); err != nil {
				return err
			}
			continue
		case !ok || tag == "-":
			continue
		case !sf.IsExported():
			return fmt.Errorf("%w: field %s has a tag, but is not exported", ErrPath, sf.Name)
		}
		paths, option, _ := strings.Cut(tag, ",")
		if option != "" && option != "optional" {
			return fmt.Errorf("%w: field %s: unknown option %q", ErrPath, sf.Name, option)
		}
		opt := optional || option == "optional"
		to, err := c.choose(paths, hops)
		if errors.Is(err, ErrNoField) && opt {
			continue
		}
		if err == nil {
			err = c.value(sf.Type, to, idx, opt)
		}
		if err != nil {
			return fmt.Errorf("field %s: %w", sf.Name, err)
		}
	}
	return nil
}

// choose returns the hops of the first of the paths, separated by |, that exists.
func (c *compiler) choose(paths string, hops []hop) ([]hop, error) {
	var first error
	for path := range strings.SplitSeq(paths, "|") {
		more, err := parseHops(path)
		if err == nil && len(more) == 0 {
			err = fmt.Errorf("%w: empty", ErrPath)
		}
		if err != nil {
			return nil, err
		}
		to := append(hops[:len(hops):len(hops)], more...)
		if _, err = c.t.route(c.plan.typ, to); err == nil {
			return to, nil
		}
		if first == nil {
			first = err
		}
		if !errors.Is(err, ErrNoField) {
			return nil, err
		}
	}
	return nil, first
}

// value plans one Go value.
func (c *compiler) value(typ reflect.Type, hops []hop, index []int, optional bool) error {
	r, err := c.t.route(c.plan.typ, hops)
	if err != nil {
		return err
	}
	u := r.last.Type.Underlying()
	switch typ.Kind() {
	case reflect.Struct:
		return c.structure(typ, hops, index, optional)
	case reflect.Array:
		if u.kind != KindArray {
			return fmt.Errorf("%w: %s from %s", ErrKind, typ, r.last.Type)
		}
		if n := u.Len(); n > 0 && uint64(typ.Len()) > n {
			return fmt.Errorf("%w: %s from %s", ErrRange, typ, r.last.Type)
		}
		if _, _, err := stringType(r.last); err == nil && typ.Elem().Kind() == reflect.Uint8 {
			r.last.Size = uint64(typ.Len())
			return c.add(r, op{kind: opBytes, index: index, optional: optional})
		}
		for i := range typ.Len() {
			elem := append(hops[:len(hops):len(hops)], hop{index: uint64(i)})
			idx := append(index[:len(index):len(index)], i)
			if err := c.value(typ.Elem(), elem, idx, optional); err != nil {
				return err
			}
		}
		return nil
	case reflect.String:
		if u.kind == KindEnum {
			return c.add(r, op{kind: opEnum, index: index, optional: optional})
		}
		isPtr, most, err := stringType(r.last)
		if err != nil {
			return err
		}
		if isPtr {
			return c.add(r, op{kind: opCString, index: index, optional: optional})
		}
		if u.n == 0 {
			return fmt.Errorf("%w: %s has no length; read it with At", ErrRange, r.last.Type)
		}
		r.last.Size = most
		return c.add(r, op{kind: opString, index: index, optional: optional})
	case reflect.Bool, reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64,
		reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64, reflect.Uintptr:
		if err := scalar(r.last); err != nil {
			return err
		}
		return c.add(r, op{kind: opInt, index: index, optional: optional})
	}
	return fmt.Errorf("%w: %s from %s", ErrKind, typ, r.last.Type)
}

// add puts an op where the route ends, and the pointers on the way before it.
func (c *compiler) add(r route, o op) error {
	at := 0
	for i, p := range r.derefs {
		key := deref{at, p.Offset, o.optional}
		next, ok := c.known[key]
		if !ok {
			next = len(c.plan.objects)
			c.known[key] = next
			path := c.plan.typ + "." + r.texts[i]
			c.plan.objects = append(c.plan.objects, object{path: path})
			err := c.put(at, op{kind: opDeref, f: p, path: path, target: next, optional: o.optional})
			if err != nil {
				return err
			}
		}
		at = next
	}
	o.f, o.path = r.last, c.plan.typ+"."+r.text
	return c.put(at, o)
}

func (c *compiler) put(object int, o op) error {
	if c.ops++; c.ops > maxOps {
		return fmt.Errorf("%w: more than %d numbers and strings", ErrRange, maxOps)
	}
	if o.f.Size > maxInline {
		return fmt.Errorf("%w: %s has %d bytes", ErrRange, o.path, o.f.Size)
	}
	obj := &c.plan.objects[object]
	obj.ops = append(obj.ops, o)
	return nil
}

// join sorts the ops and finds what to read at once. Nothing is read besides the
// fields but gaps between two of them, each shorter than a page, so that no page is
// touched for nothing.
func (o *object) join() {
	slices.SortStableFunc(o.ops, func(a, b op) int {
		switch {
		case a.f.Offset < b.f.Offset:
			return -1
		case a.f.Offset > b.f.Offset:
			return 1
		}
		return 0
	})
	for i, op := range o.ops {
		end := op.f.Offset + op.f.Size
		if n := len(o.spans); n > 0 {
			s := &o.spans[n-1]
			if op.f.Offset <= s.off+uint64(s.size)+maxGap && end-s.off <= maxSpan {
				s.size = max(s.size, int(end-s.off))
				s.end = i + 1
				continue
			}
		}
		o.spans = append(o.spans, span{op.f.Offset, int(op.f.Size), i, i + 1})
	}
}

// scratch is what a run of a plan needs.
type scratch struct {
	addrs []uint64 // of the objects, 0 if not reached
	buf   []byte
	str   []byte
}

var scratches = sync.Pool{New: func() any { return &scratch{buf: make([]byte, maxSpan), str: make([]byte, maxString)} }}

func (p *plan) run(m Memory, addr uint64, dst reflect.Value) error {
	s := scratches.Get().(*scratch)
	defer scratches.Put(s)
	s.addrs = append(s.addrs[:0], addr)
	for range p.objects[1:] {
		s.addrs = append(s.addrs, 0)
	}
	for i := range p.objects {
		obj := &p.objects[i]
		base := s.addrs[i]
		if i > 0 && base == 0 {
			continue // reached through an optional null pointer
		}
		for _, sp := range obj.spans {
			if sp.size > len(s.buf) {
				s.buf = make([]byte, maxInline)
			}
			buf := s.buf[:sp.size]
			if err := m.Read(base+sp.off, buf); err != nil {
				return &ReadError{obj.ops[sp.first].path, base + sp.off, err}
			}
			for j := sp.first; j < sp.end; j++ {
				o := &obj.ops[j]
				at := o.f.Offset - sp.off
				if err := o.run(m, buf[at:at+o.f.Size], s, dst); err != nil {
					return &ReadError{o.path, base + o.f.Offset, err}
				}
			}
		}
	}
	return nil
}

func (o *op) run(m Memory, b []byte, s *scratch, dst reflect.Value) error {
	if o.kind == opDeref {
		w := o.f.word(b)
		if w == 0 && !o.optional {
			return ErrNull
		}
		s.addrs[o.target] = w
		return nil
	}
	for _, i := range o.index {
		if dst.Kind() == reflect.Array {
			dst = dst.Index(i)
		} else {
			dst = dst.Field(i)
		}
	}
	switch o.kind {
	case opInt:
		return o.setInt(dst, o.f.word(b))
	case opEnum:
		w := o.f.word(b)
		u := o.f.Type.Underlying()
		name := u.enumName(w, o.f.bits())
		if name == "" {
			name = strconv.FormatUint(w, 10)
			if u.signed {
				name = strconv.FormatInt(signExtend(w, o.f.bits()), 10)
			}
		}
		dst.SetString(name)
	case opString:
		if i := bytes.IndexByte(b, 0); i >= 0 {
			b = b[:i]
		}
		dst.SetString(string(b))
	case opBytes:
		copy(dst.Bytes(), b)
	case opCString:
		ptr := o.f.word(b)
		if ptr == 0 {
			if o.optional {
				return nil
			}
			return ErrNull
		}
		n := 0
		for n < len(s.str) {
			// A step at a time, as few strings are long.
			step := s.str[n:min(n+stringStep, len(s.str))]
			step = step[:min(len(step), int(pageSize-ptr%pageSize))]
			if err := m.Read(ptr, step); err != nil {
				return err
			}
			if i := bytes.IndexByte(step, 0); i >= 0 {
				n += i
				break
			}
			n += len(step)
			ptr += uint64(len(step))
		}
		dst.SetString(string(s.str[:n]))
	}
	return nil
}

func (o *op) setInt(dst reflect.Value, w uint64) error {
	n, negative := int64(w), false
	if o.f.Type.Signed() {
		n = signExtend(w, o.f.bits())
		negative = n < 0
		w = uint64(n)
	}
	switch {
	case dst.Kind() == reflect.Bool:
		dst.SetBool(w != 0)
	case dst.CanInt():
		if !negative && n < 0 || dst.OverflowInt(n) {
			return o.overflow(dst, w, negative)
		}
		dst.SetInt(n)
	default:
		if negative || dst.OverflowUint(w) {
			return o.overflow(dst, w, negative)
		}
		dst.SetUint(w)
	}
	return nil
}

func (o *op) overflow(dst reflect.Value, w uint64, negative bool) error {
	if negative {
		return fmt.Errorf("%w: %d doesn't fit into %s", ErrRange, int64(w), dst.Type())
	}
	return fmt.Errorf("%w: %d doesn't fit into %s", ErrRange, w, dst.Type())
}
