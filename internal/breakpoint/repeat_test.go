package breakpoint_test

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/xentest"
)

// TestRepeatedStepFails has a repeated string instruction stepped in place, the step of
// an iteration fail, and the probe removed: the vCPU goes on without TF.
func TestRepeatedStepFails(t *testing.T) {
	one(t, func(t *testing.T, cfg xentest.Config) {
		cfg.VCPUs = 1
		m, d, e := engine(t, cfg, breakpoint.Config{MayFault: xentest.NoFaults, Method: breakpoint.InPlace})
		steps := 0
		d.step = func() error {
			if steps++; steps >= 2 {
				return errInjected
			}
			return nil
		}
		p := &breakpoint.Probe{Addr: find(t, m, 0xf3, 0xaa)} // rep stosb
		require.NoError(t, e.Register(p))
		m.Release()
		told := serveUntil(t, e, func() bool { return steps >= 2 })
		require.NotEmpty(t, told)
		require.NoError(t, e.Unregister(p))
		serveFor(t, e, 50*time.Millisecond)
		assert.Empty(t, m.Oops())
	})
}
