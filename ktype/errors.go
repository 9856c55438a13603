package ktype

import (
	"errors"
	"fmt"
	"io/fs"
)

var (
	// ErrNoType means that the kernel has no type of that name. It matches
	// fs.ErrNotExist.
	ErrNoType error = missing("no such type")

	// ErrNoField means that a struct or union has no such member. It matches
	// fs.ErrNotExist.
	ErrNoField error = missing("no such field")

	// ErrAmbiguous means that a name stands for several types which differ in
	// what was asked.
	ErrAmbiguous = errors.New("ambiguous type")

	// ErrFormat means that a description of types is damaged, or isn't what the
	// function reads.
	ErrFormat = errors.New("bad type information")

	// ErrPath means that a path, or a tag, has wrong syntax.
	ErrPath = errors.New("bad path")

	// ErrKind means that the operation doesn't fit the type: a number read from a
	// struct, a field of an integer, an index of something that is not an array.
	ErrKind = errors.New("wrong kind of type")

	// ErrNotPointer means that what is to be followed is not a pointer.
	ErrNotPointer = fmt.Errorf("%w: not a pointer", ErrKind)

	// ErrPointer means that the way to a field goes through a pointer, where
	// only an offset within one object makes sense.
	ErrPointer = errors.New("behind a pointer")

	// ErrNull means that a pointer on the way to a field is null.
	ErrNull = errors.New("null pointer")

	// ErrRange means that an index or a length is out of bounds, or that a
	// number doesn't fit.
	ErrRange = errors.New("out of range")

	// ErrListBroken means that a list's element doesn't point back to the one
	// before: the memory isn't a list, or was changed during the walk.
	ErrListBroken = errors.New("broken list")

	// ErrListCycle means that a list comes back to an element other than its
	// head.
	ErrListCycle = errors.New("cycle in list")

	// ErrLimit means that a list has more elements than allowed.
	ErrLimit = errors.New("too many elements")
)

// missing is an error that matches fs.ErrNotExist without saying so.
type missing string

func (e missing) Error() string { return string(e) }

func (e missing) Is(target error) bool { return target == fs.ErrNotExist }

func formatErr(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrFormat, fmt.Sprintf(format, args...))
}

// A ReadError says which object couldn't be read. It wraps the error of the
// Memory, or one of this package's.
type ReadError struct {
	Path string // the object, from its type's name on
	Addr uint64 // its address; 0 if the way there ended before
	Err  error
}

// Error implements error.
func (e *ReadError) Error() string {
	if e.Addr == 0 {
		return fmt.Sprintf("%s: %v", e.Path, e.Err)
	}
	return fmt.Sprintf("%s at %#x: %v", e.Path, e.Addr, e.Err)
}

// Unwrap returns e.Err.
func (e *ReadError) Unwrap() error { return e.Err }
