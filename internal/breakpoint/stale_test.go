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

// meddler is a driver in whose calls others happen.
type meddler struct {
	breakpoint.Driver
	waited func(*breakpoint.Stop)
	read   func(addr uint64) error
}

func (m *meddler) Wait(ctx context.Context, s *breakpoint.Stop) error {
	err := m.Driver.Wait(ctx, s)
	if err == nil {
		m.waited(s)
	}
	return err
}

func (m *meddler) Read(cr3, addr uint64, b []byte) error {
	if err := m.read(addr); err != nil {
		return err
	}
	return m.Driver.Read(cr3, addr, b)
}

// TestStaleUnreadable has a breakpoint removed while a vCPU waits at it, and the
// guest's memory unreadable then: the guest must not get an int3 it didn't execute.
func TestStaleUnreadable(t *testing.T) {
	for name, failures := range map[string]int{"for a moment": 2, "for long": 20} {
		t.Run(name, func(t *testing.T) {
			each(t, func(t *testing.T, cfg xentest.Config) {
				m := xentest.New(cfg)
				before := m.Text()
				m.Start()
				defer m.Stop()
				drv, err := attach(m, cfg)
				require.NoError(t, err)
				d := &meddler{Driver: drv}
				e := breakpoint.New(d, breakpoint.Config{Scratch: scratch(m), MayFault: never})
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
				require.NoError(t, e.Close())
				m.Release()
				xentest.Verify(t, m, before)
			})
		})
	}
}
