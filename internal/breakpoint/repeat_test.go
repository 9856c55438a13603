package breakpoint_test

import (
	"errors"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/xentest"
)

// unstepping is a driver whose second step of an instruction fails, and with it
// whatever was to be done then: the probe is removed in the meantime.
type unstepping struct {
	breakpoint.Driver
	steps int
	fail  func() error
}

func (d *unstepping) StepOver(s *breakpoint.Stop, addr uint64) error {
	if d.steps++; d.steps >= 2 && d.fail != nil {
		return d.fail()
	}
	return d.Driver.StepOver(s, addr)
}

// TestRepeatedStepFails has a repeated string instruction stepped in place, the step of
// an iteration fail, and the probe removed: the vCPU goes on without TF.
func TestRepeatedStepFails(t *testing.T) {
	one(t, func(t *testing.T, cfg xentest.Config) {
		cfg.VCPUs = 1
		m := xentest.New(cfg)
		before := m.Text()
		m.Start()
		defer m.Stop()
		quiesce(t, m)
		drv, err := attach(m, cfg)
		require.NoError(t, err)
		d := &unstepping{Driver: drv}
		d.fail = func() error { return errors.New("no step for the moment") }
		e := breakpoint.New(d, breakpoint.Config{Scratch: scratch(m), MayFault: never, Method: breakpoint.InPlace})
		p := &breakpoint.Probe{Addr: find(t, m, 0xf3, 0xaa)} // rep stosb
		require.NoError(t, e.Register(p))
		m.Release()
		told := serveUntil(t, e, func() bool { return d.steps >= 2 })
		require.NotEmpty(t, told)
		require.NoError(t, e.Unregister(p))
		serveFor(t, e, 50*time.Millisecond)
		assert.Empty(t, m.Oops())
		require.NoError(t, e.Close())
		m.Release()
		xentest.Verify(t, m, before)
	})
}
