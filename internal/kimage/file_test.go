package kimage

import (
	"bytes"
	"compress/gzip"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// TestOpen: a vmlinux is read as it is, or packed.
func TestOpen(t *testing.T) {
	dir := t.TempDir()
	elf := append([]byte(ELFMagic), bytes.Repeat([]byte("x"), 2000)...)
	var z bytes.Buffer
	w := gzip.NewWriter(&z)
	_, err := w.Write(elf)
	require.NoError(t, err)
	require.NoError(t, w.Close())
	for name, b := range map[string][]byte{"plain": elf, "packed": z.Bytes()} {
		path := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(path, b, 0o600))
		r, c, err := Open(path)
		require.NoError(t, err, name)
		got, err := io.ReadAll(io.NewSectionReader(r, 0, 1<<20))
		require.NoError(t, err)
		assert.Equal(t, elf, got, name)
		require.NoError(t, c.Close())
	}
	for name, b := range map[string][]byte{"empty": nil, "text": []byte("ffffffff81000000 T _text\n"), "cut": z.Bytes()[:20]} {
		path := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(path, b, 0o600))
		_, _, err := Open(path)
		assert.Error(t, err, name)
	}
	_, _, err = Open(dir)
	require.Error(t, err)
	_, _, err = Open(filepath.Join(dir, "none"))
	require.ErrorIs(t, err, os.ErrNotExist)
}
