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
	"github.com/vmprobes/vmprobes/xenctrl"
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
			s := new(breakpoint.Stop)
			require.NoError(t, d.Wait(ctx, s))
			died := make(chan struct{})
			tool.Die(0, false, func() {
				mem = bytes.Clone(mem) // what else the dead tool runs still has its own
				close(died)
			})
			go func() { _ = d.Freeze() }()
			<-died
			require.NoError(t, xen.Torn(mem, 1, s.VCPU, with))

			reinjected(t, m, before, mem, s.Regs.IP)
		})
	}
}

// calls is a tool to which something happens before some of its calls.
type calls struct {
	*xentest.Mortal
	domStatus, unpause func()
}

func (c calls) GdbsxDomStatus() (xenctrl.DomStatus, error) {
	c.domStatus()
	return c.Mortal.GdbsxDomStatus()
}

func (c calls) Unpause() error {
	c.unpause()
	return c.Mortal.Unpause()
}

// TestDiesUnpausing has a tool die when it has taken the event of an int3 of the guest's own,
// and who takes over when the pauses are being counted. That the domain isn't paused any more
// doesn't mean then that there was no event.
func TestDiesUnpausing(t *testing.T) {
	for _, made := range []bool{false, true} {
		t.Run(fmt.Sprintf("made=%v", made), func(t *testing.T) {
			m := xentest.New(xentest.Config{Kind: xentest.PV, GDBSX: true, AVX: true, VCPUs: 1, Seed: 7})
			before := m.Text()
			m.Start()
			defer m.Stop()
			require.NoError(t, m.Quiesce(t.Context()))
			mem := make([]byte, xen.StateSize(1))
			dies := func(f func(hv xen.Hypervisor)) {
				t.Helper()
				died := make(chan struct{})
				tool := xentest.NewMortal(m.Hypervisor())
				die := func(after bool) {
					tool.Die(0, after, func() {
						mem = bytes.Clone(mem)
						close(died)
					})
				}
				go f(calls{tool, func() {
					if m.Pauses() > 0 {
						die(true)
					}
				}, func() { die(made) }})
				select {
				case <-died:
				case <-time.After(20 * time.Second):
					t.Fatalf("the tool doesn't die: %s", m.State())
				}
			}
			dies(func(hv xen.Hypervisor) {
				d, err := xen.OpenDebugger(hv, xen.NewFrames(hv), xen.Config{State: mem, Lookup: m.Lookup})
				if assert.NoError(t, err) {
					m.Release()
					assert.NoError(t, d.Wait(t.Context(), new(breakpoint.Stop)))
				}
			})
			dies(func(hv xen.Hypervisor) {
				_, _, err := xen.AdoptDebugger(hv, xen.NewFrames(hv), xen.Left{State: mem})
				assert.NoError(t, err)
			})
			reinjected(t, m, before, mem, m.Symbol("own_int3")+5)
		})
	}
}

// reinjected takes over a guest of which a vCPU stands at an int3 of its own, and gives it that.
func reinjected(t *testing.T, m *xentest.Machine, before, mem []byte, at uint64) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	hv := m.Hypervisor()
	frames := xen.NewFrames(hv)
	next, others, err := xen.AdoptDebugger(hv, frames, xen.Left{State: mem})
	require.NoError(t, err)
	assert.Zero(t, others)
	require.NoError(t, next.Thaw())
	s := new(breakpoint.Stop)
	require.NoError(t, next.Wait(ctx, s))
	assert.Equal(t, at, s.Regs.IP)
	m.Park()
	require.NoError(t, next.Reinject(s))
	for !m.Parked() && ctx.Err() == nil {
		short, end := context.WithTimeout(ctx, time.Millisecond)
		if next.Wait(short, s) == nil {
			require.NoError(t, next.Reinject(s))
		}
		end()
	}
	require.NoError(t, next.Close())
	require.NoError(t, frames.Close())
	m.Release()
	xentest.Verify(t, m, before)
	assert.Zero(t, m.Pauses())
}
