//go:build unix

package xenaccess_test

import (
	"context"
	"errors"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/kerneltest"
	"github.com/vmprobes/vmprobes/xenaccess"
)

// TestOpenGivenUp has files that can't be read to their end, as nobody writes into the
// pipe: Open ends when its context does.
func TestOpenGivenUp(t *testing.T) {
	image := kerneltest.NewSynthetic(kerneltest.Layout{}).WriteImage(t)
	pipe := filepath.Join(t.TempDir(), "pipe")
	require.NoError(t, syscall.Mkfifo(pipe, 0o600))
	cause := errors.New("given up")
	for name, opts := range map[string]xenaccess.Options{"symbols": {Symbols: pipe}, "types": {Types: pipe}} {
		t.Run(name, func(t *testing.T) {
			opts.Config, opts.Cache = "-", "-"
			ctx, cancel := context.WithTimeoutCause(t.Context(), 50*time.Millisecond, cause)
			defer cancel()
			done := make(chan error, 1)
			go func() {
				_, err := xenaccess.Open(ctx, "file:"+image, &opts)
				done <- err
			}()
			select {
			case err := <-done:
				require.ErrorIs(t, err, cause)
			case <-time.After(10 * time.Second):
				t.Fatal("Open goes on")
			}
		})
	}
}
