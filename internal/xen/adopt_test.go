package xen_test

import (
	"bytes"
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/xen"
	"github.com/vmprobes/vmprobes/internal/xentest"
)

// TestDiesCounting has a tool die between the stores by which it counts a stop, at an int3 of
// the guest's own: the stop is neither lost nor counted twice.
func TestDiesCounting(t *testing.T) {
	for with := range 4 {
		t.Run(fmt.Sprint(with), func(t *testing.T) {
			m := xentest.New(xentest.Config{Kind: xentest.PV, GDBSX: true, AVX: true, VCPUs: 1, Seed: 7})
			before := m.Text()
			m.Start()
			defer m.Stop()
			require.NoError(t, m.Quiesce(t.Context()))
			mem := make([]byte, xen.StateSize(1))
			tool := xentest.NewMortal(m.Hypervisor())
			d, err := xen.OpenDebugger(tool, xen.NewFrames(tool), xen.Config{State: mem, Lookup: m.Lookup})
			require.NoError(t, err)
			m.Release()
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			s, again := new(breakpoint.Stop), new(breakpoint.Stop)
			require.NoError(t, d.Wait(ctx, s))
			died := make(chan struct{})
			tool.Die(0, false, func() {
				mem = bytes.Clone(mem) // what else the dead tool runs still has its own
				close(died)
			})
			go func() { _ = d.Freeze() }()
			<-died
			require.NoError(t, xen.Torn(mem, 1, s.VCPU, with))

			hv := m.Hypervisor()
			frames := xen.NewFrames(hv)
			next, others, err := xen.AdoptDebugger(hv, frames, xen.Left{State: mem})
			require.NoError(t, err)
			assert.Zero(t, others)
			require.NoError(t, next.Thaw())
			require.NoError(t, next.Wait(ctx, again))
			assert.Equal(t, s.Regs.IP, again.Regs.IP)
			m.Park()
			require.NoError(t, next.Reinject(again))
			for !m.Parked() && ctx.Err() == nil {
				short, end := context.WithTimeout(ctx, time.Millisecond)
				if next.Wait(short, again) == nil {
					require.NoError(t, next.Reinject(again))
				}
				end()
			}
			require.NoError(t, next.Close())
			require.NoError(t, frames.Close())
			m.Release()
			xentest.Verify(t, m, before)
			assert.Zero(t, m.Pauses())
		})
	}
}
