package main

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/lab/internal/job"
)

// TestBochsEdit checks that an edit goes to the one place that it is for, and that a
// source without that place, or with two, is no source to build.
func TestBochsEdit(t *testing.T) {
	for _, test := range []struct{ source, want string }{
		{"a\nb\nc\n", "a\nnew\nb\nc\n"},
		{"a\nc\n", ""},
		{"b\na\nb\n", ""},
	} {
		dir := t.TempDir()
		path := filepath.Join(dir, "x.cc")
		require.NoError(t, os.WriteFile(path, []byte(test.source), 0o644))
		err := bochsEdit{file: "x.cc", before: "b\n", text: "new\n"}.apply(dir)
		got, readErr := os.ReadFile(path)
		require.NoError(t, readErr)
		if test.want == "" {
			assert.Error(t, err, "%q", test.source)
			assert.Equal(t, test.source, string(got))
			continue
		}
		require.NoError(t, err)
		assert.Equal(t, test.want, string(got))
	}
	assert.ErrorIs(t, bochsEdit{file: "y.cc", before: "b\n"}.apply(t.TempDir()), os.ErrNotExist)
}

// TestBochsKey checks that another edit makes another emulator.
func TestBochsKey(t *testing.T) {
	before, edits := bochsKey(), bochsEdits
	defer func() { bochsEdits = edits }()
	bochsEdits = slices.Clone(edits)
	bochsEdits[0].text += "\n"
	assert.NotEqual(t, before, bochsKey())
}

// TestAMDHost checks that the AMD host is one of AMD's, whatever this machine has.
func TestAMDHost(t *testing.T) {
	assert.Contains(t, allHosts, job.HVMAMD)
	assert.True(t, needsBochs(context.Background(), job.HVMAMD))
	assert.False(t, needsBochs(context.Background(), job.PV))
	intel, amd := newBochs(job.HVM), newBochs(job.HVMAMD)
	assert.NotEqual(t, intel.model, amd.model)
	for _, tool := range tools {
		assert.Equal(t, tool.isFor(job.HVM), tool.isFor(job.HVMAMD), "%s", tool.pkg)
	}
	_, err := chooseEmulator(context.Background(), job.HVMAMD, "tcg")
	assert.ErrorContains(t, err, job.HVMAMD)
	_, err = hostArg("hvm-intel")
	assert.ErrorContains(t, err, job.HVMAMD)
}
