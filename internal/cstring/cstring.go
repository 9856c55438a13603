// Package cstring reads C's strings from a guest's memory.
package cstring

import (
	"bytes"
	"errors"
)

var (
	// ErrNoTerminator says that a string goes on behind the bytes that may be read.
	ErrNoTerminator = errors.New("the string has no terminator within the limit")
	// ErrEnd says that it goes on behind the last address.
	ErrEnd = errors.New("the string has no terminator before the end of the address space")
)

const pageSize = 4096

// Read reads the string at addr, up to its NUL, which is one of the first limit bytes.
// If none of them is one it returns these bytes and ErrNoTerminator; if not all can be
// read, those before the first that can't, and read's error.
//
// read returns how many bytes it has read, and an error if these aren't all. It is
// never asked for bytes of two pages, as the second one need not be there.
func Read(read func(addr uint64, b []byte) (int, error), addr uint64, limit int) (string, error) {
	var out []byte
	var chunk [256]byte
	for len(out) < limit {
		at := addr + uint64(len(out))
		if at < addr {
			return string(out), ErrEnd
		}
		b := chunk[:min(len(chunk), limit-len(out), int(pageSize-at%pageSize))]
		n, err := read(at, b)
		if before, _, ok := bytes.Cut(b[:n], []byte{0}); ok {
			return string(append(out, before...)), nil
		}
		if out = append(out, b[:n]...); err != nil {
			return string(out), err
		}
	}
	return string(out), ErrNoTerminator
}
