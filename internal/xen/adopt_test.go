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
			mem = dies(t, m, mem, asks(func() bool { return true }), func(hv xen.Hypervisor, mem []byte) {
				d, err := xen.OpenDebugger(hv, xen.NewFrames(hv), xen.Config{State: mem, Lookup: m.Lookup})
				if assert.NoError(t, err) {
					m.Release()
					assert.NoError(t, d.Wait(t.Context(), new(breakpoint.Stop)))
				}
			})
			mem = dies(t, m, mem, unpauses(made), func(hv xen.Hypervisor, mem []byte) {
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
	m := xentest.New(xentest.Config{Kind: xentest.PV, GDBSX: true, AVX: true, VCPUs: 1, IRQEvery: -1, Seed: 7})
	before := m.Text()
	m.Start()
	defer m.Stop()
	require.NoError(t, m.Quiesce(t.Context()))
	left := xen.Left{Breaks: []breakpoint.LeftBreak{{Addr: m.Symbol("push_rbp"), Insn: m.Peek(m.Symbol("push_rbp"), 1)}}}
	b := left.Breaks[0]
	require.Equal(t, []byte{0x55}, b.Insn)
	mem := make([]byte, xen.StateSize(1))
	lifted := func() bool { return m.Peek(b.Addr, 1)[0] == b.Insn[0] }
	mem = dies(t, m, mem, asks(lifted), func(hv xen.Hypervisor, mem []byte) {
		d, err := xen.OpenDebugger(hv, xen.NewFrames(hv), xen.Config{State: mem, Lookup: m.Lookup})
		require.NoError(t, err)
		e := breakpoint.New(d, breakpoint.Config{Method: breakpoint.InPlace, MayFault: xentest.NoFaults})
		require.NoError(t, e.Register(&breakpoint.Probe{Addr: b.Addr}))
		m.Release()
		for {
			_, _ = e.Serve(t.Context(), true)
		}
	})
	left.State = mem
	mem = dies(t, m, mem, unpauses(false), func(hv xen.Hypervisor, mem []byte) {
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
func dies(t *testing.T, m *xentest.Machine, mem []byte, when func(*xentest.Machine, calls, func(after bool)) calls, f func(hv xen.Hypervisor, mem []byte)) (left []byte) {
	t.Helper()
	died := make(chan struct{})
	tool := xentest.NewMortal(m.Hypervisor())
	die := func(after bool) {
		tool.Die(0, after, func() {
			left = bytes.Clone(mem) // what else the dead tool runs still has its own
			close(died)
		})
	}
	go f(when(m, calls{tool, func() {}, func() {}}, die), mem)
	select {
	case <-died:
	case <-time.After(20 * time.Second):
		t.Fatalf("the tool doesn't die: %s", m.State())
	}
	return left
}

// asks has a tool die when it asks for an event while the domain is paused, and it is time.
func asks(now func() bool) func(*xentest.Machine, calls, func(after bool)) calls {
	return func(m *xentest.Machine, c calls, die func(after bool)) calls {
		c.domStatus = func() {
			if m.Pauses() > 0 && now() {
				die(true)
			}
		}
		return c
	}
}

// unpauses has a tool die at its first unpause, which may be made.
func unpauses(made bool) func(*xentest.Machine, calls, func(after bool)) calls {
	return func(_ *xentest.Machine, c calls, die func(after bool)) calls {
		c.unpause = func() { die(made) }
		return c
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
