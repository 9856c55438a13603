package xen_test

import (
	"fmt"
	"syscall"
	"testing"

	"github.com/stretchr/testify/assert"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/xen"
	"github.com/vmprobes/vmprobes/paging"
)

// TestAbsent: memory isn't there if all page tables say so. A breakpoint in it is given
// up then, as one in an unloaded module, which one of them that couldn't be read, or
// wasn't known, must not bring about.
func TestAbsent(t *testing.T) {
	failed := fmt.Errorf("map: %w", syscall.EAGAIN)
	absent := fmt.Errorf("walk: %w", paging.ErrNotMapped)
	reserved := fmt.Errorf("walk: %w", paging.ErrReserved)
	for name, c := range map[string]struct {
		known   error // that not all roots are
		answers [3]error
		want    error
	}{
		"the last one has it":         {nil, [3]error{absent, failed, nil}, nil},
		"the first one has it":        {failed, [3]error{nil, absent, absent}, nil},
		"none has it":                 {nil, [3]error{absent, absent, absent}, breakpoint.ErrNotMapped},
		"none has it, tables damaged": {nil, [3]error{absent, absent, reserved}, breakpoint.ErrFault},
		"the first can't be read":     {nil, [3]error{failed, absent, absent}, syscall.EAGAIN},
		"the last can't be read":      {nil, [3]error{absent, reserved, failed}, syscall.EAGAIN},
		"one isn't known":             {failed, [3]error{absent, absent, absent}, syscall.EAGAIN},
	} {
		roots := []paging.Root{0x1000, 0x2000, 0x3000}
		answers := map[paging.Root]error{}
		for i, r := range roots {
			answers[r] = c.answers[i]
		}
		err := xen.WithRoots(roots, c.known, answers)
		assert.ErrorIs(t, err, c.want, name)
		if c.want == syscall.EAGAIN {
			assert.NotErrorIs(t, err, breakpoint.ErrNotMapped, name)
		}
	}
	assert.ErrorIs(t, xen.WithRoots(nil, failed, nil), syscall.EAGAIN, "none is known")
}
