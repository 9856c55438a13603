// Package goid tells goroutines apart, for the one question that needs it: does
// a function wait for the very goroutine that it runs in?
package goid

import (
	"bytes"
	"runtime"
	"strconv"
)

// Get returns the number of the calling goroutine, from the first line of its
// stack trace ("goroutine 18 [running]:"). It takes a microsecond or two, so it
// isn't for hot paths. It returns 0, which no goroutine has, should that line ever
// change.
func Get() uint64 {
	var buf [64]byte
	b := buf[:runtime.Stack(buf[:], false)]
	b, ok := bytes.CutPrefix(b, []byte("goroutine "))
	if !ok {
		return 0
	}
	if i := bytes.IndexByte(b, ' '); i > 0 {
		b = b[:i]
	}
	n, err := strconv.ParseUint(string(b), 10, 64)
	if err != nil {
		return 0
	}
	return n
}
