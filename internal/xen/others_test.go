package xen_test

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/xen"
	"github.com/vmprobes/vmprobes/internal/xentest"
)

// TestDetachedByOthers: a second debugger, which Xen lets in, detaches the first one with
// itself. That is attached again before long, and says so.
func TestDetachedByOthers(t *testing.T) {
	m, left := running(t, xentest.Config{Kind: xentest.PV, GDBSX: true, AVX: true, VCPUs: 2, Seed: 5})
	hv := m.Hypervisor()
	drv, err := m.Attach(hv)
	require.NoError(t, err)
	e := breakpoint.New(drv, breakpoint.Config{Scratch: m.Scratch, MayFault: xentest.NoFaults})
	p := &breakpoint.Probe{Addr: m.Symbol("nop5")}
	require.NoError(t, e.Register(p))
	require.NoError(t, hv.SetDebugging(true))
	require.NoError(t, hv.SetDebugging(false))
	begin := time.Now()
	_, err = e.Serve(t.Context(), true)
	require.ErrorIs(t, err, xen.ErrDetached)
	assert.Less(t, time.Since(begin), 5*time.Second)
	base := m.Executed(p.Addr)
	served(t, m, e, func() bool { return p.Hits() >= 20 })
	assert.Equal(t, m.Executed(p.Addr)-base, p.Hits())
	left(e)
}

// TestPausedFromTheStart: a domain that was created paused, and has not run, has its
// probes before its first instruction, and stays paused whoever comes and goes.
func TestPausedFromTheStart(t *testing.T) {
	for _, vcpus := range []int{1, 2} {
		m := xentest.New(xentest.Config{Kind: xentest.PV, GDBSX: true, AVX: true, VCPUs: vcpus, Seed: uint64(vcpus)})
		before := m.Text()
		hv := m.Hypervisor()
		require.NoError(t, hv.Pause())
		m.Start()
		t.Cleanup(m.Stop)
		var e *breakpoint.Engine
		p := &breakpoint.Probe{Addr: m.Symbol("nop5")}
		for range 2 {
			if e != nil {
				require.NoError(t, e.Close())
				assert.Equal(t, 1, m.Pauses(), "after Close")
			}
			drv, err := m.Attach(hv)
			require.NoError(t, err)
			e = breakpoint.New(drv, breakpoint.Config{Scratch: m.Scratch, MayFault: xentest.NoFaults})
			p = &breakpoint.Probe{Addr: m.Symbol("nop5")}
			require.NoError(t, e.Register(p))
			info, err := hv.Info()
			require.NoError(t, err)
			assert.Zero(t, info.CPUTime)
			assert.Equal(t, 1, m.Pauses())
		}
		require.NoError(t, hv.Unpause())
		served(t, m, e, func() bool { return p.Hits() >= 20 })
		assert.Equal(t, m.Executed(p.Addr), p.Hits())
		require.NoError(t, e.Close())
		m.Release()
		xentest.Verify(t, m, before)
		assert.Zero(t, m.Pauses())
	}
}
