package xen_test

import (
	"bytes"
	"context"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/xen"
	"github.com/vmprobes/vmprobes/internal/xentest"
	"github.com/vmprobes/vmprobes/xenctrl"
)

// resting starts a PV guest with one vCPU, which is at rest.
func resting(t *testing.T, cfg xentest.Config) (m *xentest.Machine, before []byte) {
	cfg.Kind, cfg.GDBSX, cfg.AVX, cfg.VCPUs, cfg.Seed = xentest.PV, true, true, 1, 7
	m = xentest.New(cfg)
	before = m.Text()
	m.Start()
	t.Cleanup(m.Stop)
	require.NoError(t, m.Quiesce(t.Context()))
	return m, before
}

// TestDiesCounting has a tool die between the stores by which it counts a stop, at an int3 of
// the guest's own: the stop is neither lost nor counted twice.
func TestDiesCounting(t *testing.T) {
	for with := range 4 {
		t.Run(fmt.Sprint(with), func(t *testing.T) {
			m, before := resting(t, xentest.Config{})
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

// dying is a tool that dies at some of its calls.
type dying struct {
	*xentest.Mortal
	asks           func() bool // whether it dies when it asks for an event, which it has then
	unpauses, made bool        // whether it dies when it unpauses, and has
	die            func(made bool)
}

func (d dying) GdbsxDomStatus() (xenctrl.DomStatus, error) {
	if d.asks != nil && d.asks() {
		d.die(true)
	}
	return d.Mortal.GdbsxDomStatus()
}

func (d dying) Unpause() error {
	if d.unpauses {
		d.die(d.made)
	}
	return d.Mortal.Unpause()
}

// TestDiesUnpausing has a tool die when it has taken the event of an int3 of the guest's own,
// and who takes over when the pauses are being counted. That the domain isn't paused any more
// doesn't mean then that there was no event.
func TestDiesUnpausing(t *testing.T) {
	for _, made := range []bool{false, true} {
		t.Run(fmt.Sprintf("made=%v", made), func(t *testing.T) {
			m, before := resting(t, xentest.Config{})
			mem := make([]byte, xen.StateSize(1))
			var released atomic.Bool
			mem = dies(t, m, mem, dying{asks: func() bool { return released.Load() && paused(t, m) }}, func(hv xen.Hypervisor, mem []byte) {
				d, err := xen.OpenDebugger(hv, xen.NewFrames(hv), xen.Config{State: mem, Lookup: m.Lookup})
				if assert.NoError(t, err) {
					m.Release()
					released.Store(true)
					assert.NoError(t, d.Wait(t.Context(), new(breakpoint.Stop)))
				}
			})
			mem = dies(t, m, mem, dying{unpauses: true, made: made}, func(hv xen.Hypervisor, mem []byte) {
				_, _, err := xen.AdoptDebugger(hv, xen.NewFrames(hv), xen.Left{State: mem})
				assert.NoError(t, err)
			})
			reinjected(t, m, before, mem, m.Symbol("own_int3")+5)
		})
	}
}

// TestDiesAfterStep has a tool die when it asks for an event, and the vCPU has just stepped over
// an instruction of one byte: it is not taken for one that stands at that breakpoint, whatever
// becomes of who takes over.
func TestDiesAfterStep(t *testing.T) {
	m, before := resting(t, xentest.Config{IRQEvery: -1})
	left := xen.Left{Breaks: []breakpoint.LeftBreak{{Addr: m.Symbol("push_rbp"), Insn: m.Peek(m.Symbol("push_rbp"), 1)}}}
	b := left.Breaks[0]
	require.Equal(t, []byte{0x55}, b.Insn)
	mem := make([]byte, xen.StateSize(1))
	var registered atomic.Bool
	stepped := func() bool { return registered.Load() && m.Peek(b.Addr, 1)[0] == b.Insn[0] && paused(t, m) }
	mem = dies(t, m, mem, dying{asks: stepped}, func(hv xen.Hypervisor, mem []byte) {
		d, err := xen.OpenDebugger(hv, xen.NewFrames(hv), xen.Config{State: mem, Lookup: m.Lookup})
		require.NoError(t, err)
		e := breakpoint.New(d, breakpoint.Config{Method: breakpoint.InPlace, MayFault: xentest.NoFaults})
		require.NoError(t, e.Register(&breakpoint.Probe{Addr: b.Addr}))
		registered.Store(true)
		m.Release()
		for {
			_, _ = e.Serve(t.Context(), true)
		}
	})
	left.State = mem
	mem = dies(t, m, mem, dying{unpauses: true}, func(hv xen.Hypervisor, mem []byte) {
		_, _, _ = xen.AdoptDebugger(hv, xen.NewFrames(hv), left)
	})
	left.State = mem
	hv := m.Hypervisor()
	frames := xen.NewFrames(hv)
	next, others, err := xen.AdoptDebugger(hv, frames, left)
	require.NoError(t, err)
	assert.Zero(t, others)
	e := breakpoint.New(next, breakpoint.Config{MayFault: xentest.NoFaults})
	told, err := e.Adopt(left.Breaks, nil)
	require.NoError(t, err)
	require.NoError(t, told)
	require.NoError(t, next.Thaw())
	require.NoError(t, e.Close())
	require.NoError(t, frames.Close())
	xentest.Verify(t, m, before)
	assert.Zero(t, m.Pauses())
}

// dies has a tool run until it dies, and returns its memory as it was then.
func dies(t *testing.T, m *xentest.Machine, mem []byte, tool dying, f func(hv xen.Hypervisor, mem []byte)) (left []byte) {
	t.Helper()
	died := make(chan struct{})
	tool.Mortal = xentest.NewMortal(m.Hypervisor())
	tool.die = func(made bool) {
		tool.Die(0, made, func() {
			left = bytes.Clone(mem) // what else the dead tool runs still has its own
			close(died)
		})
	}
	go f(tool, mem)
	select {
	case <-died:
	case <-time.After(20 * time.Second):
		t.Fatalf("the tool doesn't die: %s", m.State())
	}
	return left
}

// paused waits until the domain is, so that the next one who asks is told why.
func paused(t *testing.T, m *xentest.Machine) bool {
	for m.Pauses() == 0 && t.Context().Err() == nil {
		time.Sleep(20 * time.Microsecond)
	}
	return true
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
