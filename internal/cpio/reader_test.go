package cpio

import (
	"bytes"
	"io"
	"io/fs"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestOpen(t *testing.T) {
	var b bytes.Buffer
	w := NewWriter(&b)
	require.NoError(t, w.Bytes("a/odd", 0o644, []byte("12345")))
	require.NoError(t, w.Bytes("a/empty", 0o644, nil))
	require.NoError(t, w.Bytes("last", 0o644, []byte("end")))
	require.NoError(t, w.Close())
	archive := bytes.NewReader(b.Bytes())
	for name, want := range map[string]string{"a/odd": "12345", "/a/empty": "", "last": "end"} {
		r, err := Open(archive, name)
		require.NoError(t, err, name)
		got, err := io.ReadAll(r)
		require.NoError(t, err, name)
		assert.Equal(t, want, string(got), name)
	}
	_, err := Open(archive, "none")
	require.ErrorIs(t, err, fs.ErrNotExist)
}

func FuzzOpen(f *testing.F) {
	var b bytes.Buffer
	w := NewWriter(&b)
	require.NoError(f, w.Bytes("dir/file", 0o644, []byte("content")))
	require.NoError(f, w.Close())
	f.Add(b.Bytes(), "dir/file")
	f.Add(b.Bytes()[:150], "file")
	f.Add([]byte("070701"), "")
	f.Fuzz(func(t *testing.T, archive []byte, name string) {
		if r, err := Open(bytes.NewReader(archive), name); err == nil {
			_, _ = io.ReadAll(r)
		}
	})
}
