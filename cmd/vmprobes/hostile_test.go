package main

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/kerneltext"
	"github.com/vmprobes/vmprobes/internal/target"
	"github.com/vmprobes/vmprobes/internal/terminal"
)

// TestHostileNames: whoever names a guest, or writes a journal, doesn't get at the terminal,
// and doesn't make lines of his own.
func TestHostileNames(t *testing.T) {
	const evil = "\x1b[2Ja\nb\tc\u202ed"
	var out bytes.Buffer
	require.NoError(t, show(&out, []target.State{{Name: evil, Kind: evil, State: target.Left, Owner: evil}}))
	require.NoError(t, found(&out, evil, &target.Found{
		Debugger: true, Repaired: true, File: evil, Changed: errors.New(evil),
		Text: &kerneltext.Report{Breaks: []kerneltext.Break{{Where: evil}}, Unclear: []kerneltext.Place{{Where: evil, Why: evil}}, Copies: []kerneltext.Place{{Where: evil}}},
	}, nil))
	require.NoError(t, tell(&out, evil, true, nil))
	require.NoError(t, tell(&out, evil, false, nil))
	err := tell(&out, evil, false, errors.New("no"))
	require.Error(t, err)
	out.WriteString(terminal.Harmless(err.Error()) + "\n")
	assert.Equal(t, 12, strings.Count(out.String(), "\n"), out.String())
	for _, c := range []string{"\x1b", "\t", "\u202e"} {
		assert.NotContains(t, out.String(), c)
	}
}
