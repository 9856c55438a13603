package target

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/linux"
	"github.com/vmprobes/vmprobes/xenctrl"
)

func TestConfiguredKernel(t *testing.T) {
	dir := t.TempDir()
	kernel := filepath.Join(dir, "vmlinuz")
	require.NoError(t, os.WriteFile(kernel, []byte("x"), 0o600))
	for name, c := range map[string]struct{ json, want string }{
		"pvh":       {`{"c_info":{"type":"pvh"},"b_info":{"kernel":"` + kernel + `","ramdisk":"/x"}}`, kernel},
		"pv":        {`{"b_info":{"type.pv":{"kernel":"` + kernel + `"}}}`, kernel},
		"no kernel": {`{"b_info":{"kernel":"/no/such/file"}}`, ""},
		"folder":    {`{"b_info":{"kernel":"` + dir + `"}}`, ""},
		"relative":  {`{"b_info":{"kernel":"vmlinuz"}}`, ""},
		"not json":  {`{"b_info":`, ""},
		"wrong":     {`{"b_info":{"kernel":7}}`, ""},
	} {
		file := filepath.Join(dir, "config")
		require.NoError(t, os.WriteFile(file, []byte(c.json), 0o600))
		assert.Equal(t, c.want, configuredKernel(file), name)
	}
	assert.Empty(t, configuredKernel(filepath.Join(dir, "none")))
}

// closes is a guest that says when it is closed.
type closes struct {
	Guest
	closed chan struct{}
}

func (g *closes) Close() error { close(g.closed); return nil }

// TestNoAnswer: who never answers doesn't hold Open longer than its context, and nothing
// stays open.
func TestNoAnswer(t *testing.T) {
	g := &closes{closed: make(chan struct{})}
	answer := make(chan struct{})
	ctx, cancel := context.WithCancelCause(t.Context())
	other := errors.New("enough")
	time.AfterFunc(10*time.Millisecond, func() { cancel(other) })
	_, err := within(ctx, "xenstored", func() (Guest, error) { <-answer; return g, nil })
	require.ErrorIs(t, err, other)
	require.ErrorContains(t, err, "xenstored doesn't answer")
	close(answer)
	<-g.closed
	_, err = within(t.Context(), "xenstored", func() (Guest, error) { return nil, other })
	require.Equal(t, other, err)
}

// TestAttachable: who has paused a domain decides what is to be done about it.
func TestAttachable(t *testing.T) {
	const (
		paused   = xenctrl.DomainPaused
		hvm      = xenctrl.DomainHVM
		debugged = xenctrl.DomainDebugged
		shutdown = xenctrl.DomainShutdown
	)
	for name, c := range map[string]struct {
		flags   xenctrl.DomainFlags
		cpuTime uint64
		unknown bool
		err     error
		says    string
	}{
		"runs":                         {cpuTime: 1},
		"runs, of an unknown kernel":   {cpuTime: 1, unknown: true},
		"paused by xl":                 {flags: paused, cpuTime: 1, err: ErrPaused, says: "no tool has left it so, as far as is known: unpause it first"},
		"paused by a debugger's event": {flags: paused | debugged, cpuTime: 1, err: ErrBusy, says: "leave it so"},
		"debugged":                     {flags: debugged, cpuTime: 1, err: ErrBusy},
		"created paused":               {flags: paused},
		"created paused, unknown":      {flags: paused, unknown: true, err: ErrPaused, says: "open it when it has booted"},
		"created paused, PVH":          {flags: paused | hvm, err: ErrPaused, says: "open it when it has booted"},
		"paused by xl, PVH":            {flags: paused | hvm, cpuTime: 1, err: ErrPaused},
		"shut down":                    {flags: shutdown, cpuTime: 1, err: breakpoint.ErrGone},
	} {
		err := known("", attachable(xenctrl.DomainInfo{Flags: c.flags, CPUTime: c.cpuTime}, !c.unknown))
		if c.err == nil {
			require.NoError(t, err, name)
			continue
		}
		require.ErrorIs(t, err, c.err, name)
		require.ErrorContains(t, err, c.says, name)
		assert.Equal(t, c.cpuTime == 0, errors.Is(err, linux.ErrNotInPlace), name)
	}
}
