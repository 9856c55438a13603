package ktype

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/bits"
	"strings"
)

const (
	pageSize   = 4096
	maxString  = 4096    // bytes of a string behind a pointer, PATH_MAX
	maxBytes   = 1 << 20 // bytes of Value.Bytes
	stringStep = 64      // bytes of a string read at a time
)

// Memory is the virtual memory of a kernel.
type Memory interface {
	// Read fills b from the address on, or fails. It must not keep b.
	Read(addr uint64, b []byte) error
}

// A Value is a cursor: an object in memory, of a known type. Nothing is read until a
// number, a string or the target of a pointer is asked for.
//
// A failed step gives a Value whose every method returns the error of that step,
// so that only the end of a chain needs a check. Errors are *ReadError.
type Value struct {
	t    *Types
	m    Memory
	f    Field // Offset is the address
	path string
	err  error
}

// At returns the object of type typ at address addr. typ is the name of a type as in
// a path, such as "task_struct" or "enum pid_type", or a whole path, which gives that
// member of the object at addr.
func (t *Types) At(m Memory, typ string, addr uint64) Value {
	v := Value{t: t, m: m, path: typ}
	name, rest := splitPath(typ)
	found, err := t.Type(name)
	if err == nil {
		var size uint64
		if size, err = found.Size(); err == nil || found.Underlying().kind == KindForward {
			v.f, v.path = Field{Offset: addr, Size: size, Type: found}, name
			return v.Field(rest)
		}
	}
	return v.fail(err)
}

func (v Value) fail(err error) Value {
	v.err = v.wrap(err)
	return v
}

func (v Value) wrap(err error) error {
	if err == nil {
		return nil
	}
	return &ReadError{Path: clip(v.path), Addr: v.f.Offset, Err: err}
}

// Err returns the error of the steps to this value, or nil.
func (v Value) Err() error {
	if v.err == nil && v.t == nil {
		return &ReadError{Path: "zero Value", Err: ErrNull}
	}
	return v.err
}

// Addr returns the address of the object; of a bit-field, that of the byte with
// its lowest bit.
func (v Value) Addr() uint64 { return v.f.Offset }

// Type returns the type of the object.
func (v Value) Type() *Type {
	if v.f.Type == nil {
		return void
	}
	return v.f.Type
}

// Path returns how the value was reached, for messages.
func (v Value) Path() string { return v.path }

// Field returns a member by its path, without the type: "real_parent.comm",
// "files[3]". Pointers on the way are followed, one at the end is not. The empty
// path is the object itself.
func (v Value) Field(path string) Value {
	if v.Err() != nil || path == "" {
		return v
	}
	sep := ""
	if isIdent(path[0]) {
		sep = "."
	}
	out := v
	out.path += sep + path
	hops, err := parseHops(path)
	if err != nil {
		return out.fail(err)
	}
	r, err := v.f.Type.compile(hops)
	if err != nil {
		return out.fail(err)
	}
	if v.f.BitSize > 0 {
		return out.fail(fmt.Errorf("%w: a bit-field has no members", ErrKind))
	}
	for i, p := range r.derefs {
		at := v
		at.path += sep + r.texts[i]
		at.f = Field{Offset: v.f.Offset + p.Offset, Size: p.Size, Type: p.Type}
		target, err := at.Pointer()
		if err == nil && target == 0 {
			err = at.wrap(ErrNull)
		}
		if err != nil {
			out.f, out.err = at.f, err
			return out
		}
		v.f.Offset = target
	}
	out.f = r.last
	out.f.Offset += v.f.Offset
	return out
}

// Deref returns what a pointer points to.
func (v Value) Deref() Value {
	target, err := v.Pointer()
	out := v
	out.path = "*" + v.path
	if err == nil && target == 0 {
		err = v.wrap(ErrNull)
	}
	if err != nil {
		out.err = err
		return out
	}
	elem := v.f.Type.Underlying().Elem()
	size, err := elem.Size()
	if err != nil && elem.Underlying().kind != KindForward {
		return out.fail(err)
	}
	out.f = Field{Offset: target, Size: size, Type: elem}
	return out
}

// Len returns the number of an array's elements: 0 for a flexible array, and for a
// value that is not an array.
func (v Value) Len() uint64 { return v.Type().Len() }

// Index returns an element of an array, or the i-th object from a pointer's target
// on. A flexible array has no upper bound.
func (v Value) Index(i uint64) Value {
	return v.Field(hop{index: i}.String())
}

// read gets the object's bytes, at most len(b).
func (v Value) read(b []byte) error {
	return v.wrap(v.m.Read(v.f.Offset, b))
}

// word returns the value of a number of any kind, zero-extended.
func (v Value) word() (uint64, error) {
	if err := v.Err(); err != nil {
		return 0, err
	}
	if err := scalar(v.f); err != nil {
		return 0, v.wrap(err)
	}
	var b [9]byte
	if err := v.read(b[:v.f.Size]); err != nil {
		return 0, err
	}
	return v.f.word(b[:v.f.Size]), nil
}

// scalar returns an error if a field is not a number.
func scalar(f Field) error {
	if err := f.Type.load(); err != nil {
		return err
	}
	u := f.Type.Underlying()
	switch u.kind {
	case KindInt, KindEnum, KindPointer:
	default:
		return fmt.Errorf("%w: %s (%s) is not a number", ErrKind, f.Type, u.kind)
	}
	if f.BitSize == 0 && (f.Size == 0 || f.Size > 8) {
		return fmt.Errorf("%w: number of %d bytes", ErrRange, f.Size)
	}
	return u.load()
}

// word takes a number, of at most 64 bits, out of the bytes of its field.
func (f Field) word(b []byte) uint64 {
	var full [8]byte
	if f.BitSize == 0 {
		copy(full[:], b)
		return binary.LittleEndian.Uint64(full[:])
	}
	copy(full[:], b)
	w := binary.LittleEndian.Uint64(full[:]) >> f.BitOffset
	if len(b) > 8 {
		w |= uint64(b[8]) << (64 - f.BitOffset)
	}
	return w & (1<<f.BitSize - 1)
}

// bits returns the width of a number.
func (f Field) bits() uint {
	if f.BitSize > 0 {
		return uint(f.BitSize)
	}
	return uint(f.Size) * 8
}

func signExtend(w uint64, width uint) int64 {
	shift := 64 - min(width, 64)
	return int64(w<<shift) >> shift
}

// Uint returns the value of an integer, boolean, enum or pointer of any width, or
// of a bit-field. A negative one is an error that matches ErrRange.
func (v Value) Uint() (uint64, error) {
	w, err := v.word()
	if err != nil {
		return 0, err
	}
	if v.f.Type.Signed() {
		if n := signExtend(w, v.f.bits()); n < 0 {
			return 0, v.wrap(fmt.Errorf("%w: %d is negative", ErrRange, n))
		}
	}
	return w, nil
}

// Int is Uint for numbers that may be negative. One that doesn't fit into an int64 is
// an error that matches ErrRange.
func (v Value) Int() (int64, error) {
	w, err := v.word()
	if err != nil {
		return 0, err
	}
	if v.f.Type.Signed() {
		return signExtend(w, v.f.bits()), nil
	}
	if bits.Len64(w) == 64 {
		return 0, v.wrap(fmt.Errorf("%w: %d", ErrRange, w))
	}
	return int64(w), nil
}

// Pointer returns the value of a pointer.
func (v Value) Pointer() (uint64, error) {
	if err := v.Err(); err != nil {
		return 0, err
	}
	if u := v.f.Type.Underlying(); u.kind != KindPointer {
		return 0, v.wrap(fmt.Errorf("%w: %s (%s)", ErrNotPointer, v.f.Type, u.kind))
	}
	return v.word()
}

// Bool reports whether a number is not zero.
func (v Value) Bool() (bool, error) {
	w, err := v.word()
	return w != 0, err
}

// EnumName returns the name of an enum's value, or "" if it has none.
func (v Value) EnumName() (string, error) {
	w, err := v.word()
	if err != nil {
		return "", err
	}
	u := v.f.Type.Underlying()
	if u.kind != KindEnum {
		return "", v.wrap(fmt.Errorf("%w: %s (%s) is not an enum", ErrKind, v.f.Type, u.kind))
	}
	return u.enumName(w, v.f.bits()), nil
}

// enumName returns the first name of a value that was read with that many bits.
func (t *Type) enumName(w uint64, width uint) string {
	n := int64(w)
	if t.Signed() {
		n = signExtend(w, width)
	}
	for _, v := range t.Values() {
		if v.Value == n {
			return v.Name
		}
	}
	return ""
}

// Bytes returns the object's bytes, at most 1 MiB.
func (v Value) Bytes() ([]byte, error) {
	if err := v.Err(); err != nil {
		return nil, err
	}
	if v.f.Size > maxBytes {
		return nil, v.wrap(fmt.Errorf("%w: %d bytes", ErrRange, v.f.Size))
	}
	b := make([]byte, v.f.Size)
	return b, v.read(b)
}

// CString returns the string in an array of characters, up to its NUL or end, or
// the one that a pointer to characters points to, up to its NUL or 4096 bytes. A
// flexible array is read like a pointer's target. A null pointer is an error that
// matches ErrNull.
func (v Value) CString() (string, error) {
	if err := v.Err(); err != nil {
		return "", err
	}
	isPtr, most, err := stringType(v.f)
	if err != nil {
		return "", v.wrap(err)
	}
	if isPtr {
		if v.f.Offset, err = v.Pointer(); err != nil {
			return "", err
		}
		if v.f.Offset == 0 {
			return "", v.wrap(ErrNull)
		}
	}
	var b strings.Builder
	var buf [stringStep]byte
	err = readString(v.m, v.f.Offset, most, buf[:], func(p []byte) { b.Write(p) })
	if err != nil {
		return "", v.wrap(err)
	}
	return b.String(), nil
}

// stringType reports whether a field points to a string, rather than holding it, and
// how many bytes the string has at most.
func stringType(f Field) (isPtr bool, most uint64, err error) {
	u := f.Type.Underlying()
	if u.kind == KindPointer || u.kind == KindArray {
		e := u.Elem().Underlying()
		if e.kind == KindInt && e.size == 1 {
			most = maxString
			if u.kind == KindArray && u.n > 0 {
				most = min(u.n, maxBytes)
			}
			return u.kind == KindPointer, most, nil
		}
	}
	return false, 0, fmt.Errorf("%w: %s is not a string", ErrKind, f.Type)
}

// readString reads up to a NUL or most bytes, through buf. It touches no page without
// any part of the string.
func readString(m Memory, addr, most uint64, buf []byte, add func([]byte)) error {
	for most > 0 {
		n := min(uint64(len(buf)), most, pageSize-addr%pageSize)
		p := buf[:n]
		if err := m.Read(addr, p); err != nil {
			return err
		}
		if before, _, ok := bytes.Cut(p, []byte{0}); ok {
			add(before)
			return nil
		}
		add(p)
		addr += n
		most -= n
	}
	return nil
}
