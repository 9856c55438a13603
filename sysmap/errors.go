package sysmap

import (
	"errors"
	"fmt"
	"io/fs"
	"strconv"
	"strings"

	"github.com/vmprobes/vmprobes/internal/sentinel"
)

var (
	// ErrNotFound means that the map has no such symbol. It matches
	// fs.ErrNotExist.
	ErrNotFound = sentinel.New("symbol not found", fs.ErrNotExist)

	// ErrAmbiguous means that a name stands for several addresses. The error
	// returned is an *AmbiguousError, which lists them.
	ErrAmbiguous = errors.New("ambiguous symbol")

	// ErrFormat means that the input is not what the function reads: a
	// malformed line (then the error is a *SyntaxError), a damaged image, or
	// an image without a symbol table.
	ErrFormat = errors.New("bad symbol table")

	// ErrStub means that the file is the one-line placeholder that Debian and
	// its derivatives install as /boot/System.map-*.
	ErrStub = errors.New("this System.map is only a placeholder")

	// ErrRestricted means that every address of a kallsyms file is zero: it
	// was read without the privilege that kernel.kptr_restrict asks for.
	ErrRestricted = errors.New("all addresses are zero")
)

// A SyntaxError is a line Parse does not understand. It matches ErrFormat.
type SyntaxError struct {
	Line int    // 1-based
	Msg  string // what is wrong with it
}

// Error implements error.
func (e *SyntaxError) Error() string { return "line " + strconv.Itoa(e.Line) + ": " + e.Msg }

// Is reports whether target is ErrFormat.
func (e *SyntaxError) Is(target error) bool { return target == ErrFormat }

// An AmbiguousError says that a name has several addresses. It matches
// ErrAmbiguous.
type AmbiguousError struct {
	Name       string
	Candidates []Symbol // in address order, one per address
}

// maxListed bounds how many candidates the message names.
const maxListed = 20

// Error implements error. It lists at most 20 candidates.
func (e *AmbiguousError) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "symbol %q is ambiguous, %d candidates:", e.Name, len(e.Candidates))
	numbered := true
	for _, c := range e.Candidates {
		numbered = numbered && c.Name == e.Name
	}
	for i, c := range e.Candidates {
		if i == maxListed {
			fmt.Fprintf(&b, " … and %d more", len(e.Candidates)-maxListed)
			break
		}
		if i > 0 {
			b.WriteByte(',')
		}
		if numbered {
			fmt.Fprintf(&b, " %s@%d", c.Name, i+1)
		} else {
			b.WriteString(" " + c.Name)
		}
		fmt.Fprintf(&b, " = %#x", c.Addr)
		if c.Module != "" {
			b.WriteString(" [" + c.Module + "]")
		}
	}
	return b.String()
}

// Is reports whether target is ErrAmbiguous.
func (e *AmbiguousError) Is(target error) bool { return target == ErrAmbiguous }

func formatErr(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrFormat, fmt.Sprintf(format, args...))
}
