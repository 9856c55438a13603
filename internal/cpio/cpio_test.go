package cpio

import (
	"bytes"
	"io"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

type entry struct {
	name         string
	mode         uint64
	major, minor uint64
	data         string
}

// parse reads an archive back with a reader of its own, field by field.
func parse(t *testing.T, archive []byte) []entry {
	t.Helper()
	var entries []entry
	at := 0
	for {
		require.Equal(t, "070701", string(archive[at:at+6]))
		field := func(i int) uint64 {
			n, err := strconv.ParseUint(string(archive[at+6+8*i:at+14+8*i]), 16, 32)
			require.NoError(t, err)
			return n
		}
		mode, size, major, minor, nameLen := field(1), int(field(6)), field(9), field(10), int(field(11))
		name := string(archive[at+110 : at+110+nameLen-1])
		require.Zero(t, archive[at+110+nameLen-1])
		start := (at + 110 + nameLen + 3) &^ 3
		entries = append(entries, entry{name, mode, major, minor, string(archive[start : start+size])})
		at = (start + size + 3) &^ 3
		if name == "TRAILER!!!" {
			require.Empty(t, strings.Trim(string(archive[at:]), "\x00"))
			return entries[:len(entries)-1]
		}
	}
}

func TestArchive(t *testing.T) {
	var buf bytes.Buffer
	w := NewWriter(&buf)
	require.NoError(t, w.Bytes("/usr/bin/tool", 0o755, []byte("hello")))
	require.NoError(t, w.Symlink("tool", "usr/bin/other"))
	require.NoError(t, w.CharDevice("dev/console", 0o600, 5, 1))
	require.NoError(t, w.Dir("usr", 0o700))
	require.NoError(t, w.Dir("tmp", 0o777))
	require.NoError(t, w.Close())

	assert.Zero(t, buf.Len()%512)
	assert.Equal(t, []entry{
		{name: "usr", mode: 0o040755},
		{name: "usr/bin", mode: 0o040755},
		{name: "usr/bin/tool", mode: 0o100755, data: "hello"},
		{name: "usr/bin/other", mode: 0o120777, data: "tool"},
		{name: "dev", mode: 0o040755},
		{name: "dev/console", mode: 0o020600, major: 5, minor: 1},
		{name: "tmp", mode: 0o040777},
	}, parse(t, buf.Bytes()))
}

func TestShortFileIsAnError(t *testing.T) {
	w := NewWriter(io.Discard)
	require.ErrorIs(t, w.File("a", 0o644, 10, strings.NewReader("short")), io.ErrUnexpectedEOF)
	require.Error(t, w.Close(), "the first error stays")
}

func TestTooLargeFile(t *testing.T) {
	w := NewWriter(io.Discard)
	require.ErrorContains(t, w.File("a", 0o644, 1<<32, strings.NewReader("")), "does not fit")
}

func TestUseAfterClose(t *testing.T) {
	w := NewWriter(io.Discard)
	require.NoError(t, w.Close())
	require.Error(t, w.Bytes("a", 0o644, nil))
}
