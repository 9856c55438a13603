package examples_test

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"

	"github.com/vmprobes/vmprobes/internal/kerneltest"
)

// TestUnknown: what isn't known of a process is shown so, what is inferred is told, and
// a bad pointer in one process neither hides another nor fails the program.
func TestUnknown(t *testing.T) {
	t.Setenv("VMPROBES_SYMBOLS", "")
	list := func(s *kerneltest.Synthetic, flags ...string) result {
		return run(t, nil, filepath.Join(programs, "process-list"), append(flags, "-file", s.WriteImage(t))...)
	}
	good := kerneltest.NewSynthetic(kerneltest.Layout{})
	r := list(good, "-l")
	assert.Zero(t, r.status)
	assert.Empty(t, r.stderr)
	assert.Contains(t, r.stdout, "[   40]     1  1000 - daemon\n")
	assert.Contains(t, r.stdout, "[   50]    40  1000 Z zombie")
	short := list(good).stdout

	r = list(kerneltest.NewSynthetic(kerneltest.Layout{NoTypes: true}), "-l")
	assert.Zero(t, r.status)
	assert.Contains(t, r.stdout, "[   40]     1     ? ? daemon\n")
	assert.Contains(t, r.stderr, "note: not from the guest itself: types: ")
	assert.Contains(t, r.stderr, "not known: users, states and threads")

	for _, off := range []uint64{kerneltest.TaskCred, kerneltest.TaskParent} {
		bad := kerneltest.NewSynthetic(kerneltest.Layout{})
		bad.Put64(bad.Sym["task 3"]+off, 0x4141414141414141)
		r = list(bad)
		assert.Zero(t, r.status)
		assert.Equal(t, short, r.stdout)
		r = list(bad, "-l")
		assert.Zero(t, r.status)
		for l := range strings.Lines(r.stdout) {
			assert.Equal(t, strings.HasPrefix(l, "[    3]"), strings.Contains(l, "?"), l)
		}
	}
}
