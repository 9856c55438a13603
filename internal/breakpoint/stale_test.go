package breakpoint_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/xentest"
)

// TestStaleUnreadable has a breakpoint removed while a vCPU waits at it, and the
// guest's memory unreadable then: the guest must not get an int3 it didn't execute.
func TestStaleUnreadable(t *testing.T) {
	for name, failures := range map[string]int{"for a moment": 2, "for long": 20} {
		t.Run(name, func(t *testing.T) {
			each(t, func(t *testing.T, cfg xentest.Config) {
				m, d, e := engine(t, cfg, breakpoint.Config{MayFault: xentest.NoFaults})
				p := &breakpoint.Probe{Addr: m.Symbol("nop5")}
				failed, left := 0, 0
				d.waited = func(s *breakpoint.Stop) {
					if s.Reason == breakpoint.Hit && s.Regs.IP == p.Addr && failed == 0 {
						assert.NoError(t, e.Unregister(p))
						left = failures
					}
				}
				d.read = func(addr uint64) error {
					if addr == p.Addr && left > 0 {
						left--
						failed++
						return errors.New("unreadable")
					}
					return nil
				}
				require.NoError(t, e.Register(p))
				m.Release()
				told := false
				for range 100 {
					ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
					_, err := e.Serve(ctx, true)
					cancel()
					if !errors.Is(err, context.DeadlineExceeded) {
						require.ErrorContains(t, err, "unreadable")
						told = true
					}
					if told || e.Stats().Stale > 0 {
						break
					}
				}
				assert.Equal(t, name == "for long", told)
				assert.GreaterOrEqual(t, failed, 2)
				left = 0
			})
		})
	}
}
