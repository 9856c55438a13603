//go:build unix

package vmprobes

import (
	"os"
	"os/signal"
	"syscall"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/xentest"
)

func TestSignalUnregisters(t *testing.T) {
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP} {
		t.Run(sig.String(), func(t *testing.T) {
			if signal.Ignored(sig) {
				t.Skip("the tests were started with this signal ignored (nohup, or a shell's background), which stays so")
			}
			_, s := simulated(t, xentest.Config{Kind: xentest.HVM, VCPUs: 2, Seed: 3}, nil)
			g := guardSignals()
			s.guard = g
			p := &Probe{DomainName: "a3guest", Symbol: entry}
			require.NoError(t, s.register(true, p))
			go g.watch(s)
			done := make(chan error, 1)
			go func() { done <- Loop(t.Context(), p) }()
			soon(t, "hits", func() bool { return p.Stats().Hits > 5 })
			require.NoError(t, syscall.Kill(os.Getpid(), syscall.SIGPIPE), "not an end")
			require.NoError(t, syscall.Kill(os.Getpid(), sig))
			err := <-done
			require.ErrorIs(t, err, ErrInterrupted)
			assert.ErrorContains(t, err, sig.String())
			assert.Equal(t, FlagRestored, p.Flags())
			require.NoError(t, Unregister(p))
			<-g.quit
		})
	}
}
