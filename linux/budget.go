package linux

import (
	"errors"
	"fmt"
	"time"

	"github.com/vmprobes/vmprobes/internal/cstring"
)

// ErrBudget: an operation would read more of the guest than any real kernel
// needs. The error says which limit was reached.
var ErrBudget = errors.New("the guest's structures take too much reading")

// The limits of one operation, whatever the guest's structures say. A task takes a
// dozen reads, so there may be 300,000 of them; a module's symbol takes one or two.
// The types of modules take the most bytes: about 40 MiB for all of Debian's. What an
// operation keeps in memory is proportional to what it reads.
//
// A read takes 100 ns if its page is mapped here, and 10 µs or more if not. The limit
// of time is for machines that are slower still.
const (
	maxReads = 4 << 20
	maxBytes = 128 << 20
	maxTime  = 60 * time.Second
)

// An op is one operation on a kernel, within its limits. It isn't safe for concurrent
// use.
type op struct {
	*Kernel
	name     string
	reads    int // left
	bytes    uint64
	deadline time.Time
	text     []byte // of the kernel, if it was read as a whole
	spent    error  // the limit that was reached: nothing can be read any more
}

// begin begins an operation. The name is for errors.
func (k *Kernel) begin(name string) *op {
	return &op{Kernel: k, name: name, reads: maxReads, bytes: maxBytes, deadline: time.Now().Add(maxTime)}
}

// take counts a read of n bytes.
func (o *op) take(n uint64) error {
	switch {
	case o.spent != nil:
	case o.reads == 0:
		o.spent = fmt.Errorf("%s: %w: more than %d reads", o.name, ErrBudget, maxReads)
	case n > o.bytes:
		o.spent = fmt.Errorf("%s: %w: more than %s", o.name, ErrBudget, size(maxBytes))
	case o.reads%256 == 0 && time.Now().After(o.deadline):
		o.spent = fmt.Errorf("%s: %w: it has taken %v", o.name, ErrBudget, maxTime)
	default:
		o.reads--
		o.bytes -= n
	}
	return o.spent
}

// Read reads kernel memory. It is the [ktype.Memory] of an operation.
func (o *op) Read(addr uint64, b []byte) error {
	if err := o.take(uint64(len(b))); err != nil {
		return err
	}
	return o.Kernel.Read(addr, b)
}

// table reads a table of n bytes, which must not be more than limit.
func (o *op) table(what string, addr, n, limit uint64) ([]byte, error) {
	if n > limit {
		return nil, fmt.Errorf("%s of %d bytes, at most %d are read: %w", what, n, limit, ErrBadKernel)
	}
	// Counted before it is allocated.
	if err := o.take(n); err != nil {
		return nil, err
	}
	b := make([]byte, n)
	return b, o.Kernel.Read(addr, b)
}

// str reads a string, which may fill its limit bytes without a NUL.
func (o *op) str(addr uint64, limit int) (string, error) {
	s, err := cstring.Read(func(addr uint64, b []byte) (int, error) {
		if err := o.Read(addr, b); err != nil {
			return 0, err
		}
		return len(b), nil
	}, addr, min(limit, maxString))
	if errors.Is(err, cstring.ErrNoTerminator) {
		err = nil
	}
	return s, err
}

// pointer reads a pointer of the kernel's own width.
func (o *op) pointer(addr uint64) (uint64, error) {
	return readPointer(o.Read, addr, o.bits)
}
