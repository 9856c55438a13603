package xen_test

import (
	"context"
	"encoding/binary"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/xen"
	"github.com/vmprobes/vmprobes/internal/xentest"
	"github.com/vmprobes/vmprobes/xenctrl"
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

// leaf returns the entry of the page tables that maps va, in memory that is mapped until
// the test ends.
func leaf(t *testing.T, hv xen.Hypervisor, va uint64) []byte {
	t.Helper()
	c, err := hv.HVMCPU(0)
	require.NoError(t, err)
	table := c.CR3 >> 12
	for level := 4; ; level-- {
		m, err := hv.MapFrames(true, table)
		require.NoError(t, err)
		t.Cleanup(func() { assert.NoError(t, m.Unmap()) })
		entry := m.Bytes()[va>>(12+9*(level-1))&511*8:][:8]
		e := binary.LittleEndian.Uint64(entry)
		require.NotZero(t, e&1, "level %d", level)
		if level == 1 || e&(1<<7) != 0 {
			return entry
		}
		table = e >> 12 & (1<<40 - 1)
	}
}

// TestUnmapped: a probe in memory that the guest has given back, as that of a module that
// it has unloaded, is gone. Its probe says so, and Close leaves the guest.
func TestUnmapped(t *testing.T) {
	// Xen lets nobody write to a PV guest's page tables, and what is tried is both routes'.
	for _, byClose := range []bool{false, true} {
		m, left := running(t, xentest.Config{Kind: xentest.HVM, VCPUs: 2, Seed: 7})
		hv := m.Hypervisor()
		entry := leaf(t, hv, m.Symbol("nop5"))
		drv, err := m.Attach(hv)
		require.NoError(t, err)
		e := breakpoint.New(drv, breakpoint.Config{Scratch: m.Scratch, MayFault: xentest.NoFaults})
		p := &breakpoint.Probe{Addr: m.Symbol("nop5")}
		orig := m.Peek(p.Addr, 1)
		require.NoError(t, e.Register(p))
		entry[0] &^= 1
		if byClose {
			require.ErrorIs(t, e.Close(), breakpoint.ErrTextChanged)
			assert.True(t, e.Left())
		} else {
			require.ErrorIs(t, e.Unregister(p), breakpoint.ErrTextChanged)
			assert.False(t, e.Registered(p))
		}
		entry[0] |= 1
		assert.Equal(t, []byte{0xcc}, m.Peek(p.Addr, 1), "nothing was written")
		m.Poke(p.Addr, orig) // for the guest that was never without the page
		left(e)
	}
}

// spare is a Xen whose guest has a last vCPU that was never brought up.
type spare struct {
	xen.Hypervisor
	last int
}

func (s spare) VCPUContext(v int, c *xenctrl.VCPUContext) error {
	if v == s.last {
		return syscall.Errno(61) // ENODATA
	}
	return s.Hypervisor.VCPUContext(v, c)
}

func (s spare) HVMCPU(v int) (xenctrl.HVMCPU, error) {
	if v == s.last {
		return xenctrl.HVMCPU{}, syscall.ENOENT
	}
	return s.Hypervisor.HVMCPU(v)
}

// TestWaitsSpare: such a guest can be watched, too.
func TestWaitsSpare(t *testing.T) {
	m := xentest.New(xentest.Config{Kind: xentest.PV, GDBSX: true, VCPUs: 2, Seed: 3})
	hv := spare{m.Hypervisor(), 1}
	require.NoError(t, hv.SetDebugging(true))
	require.NoError(t, hv.Pause())
	why, err := xen.Waits(hv, xentest.Frames(t, hv), xen.Left{State: make([]byte, xen.StateSize(2))})
	require.NoError(t, err)
	assert.Empty(t, why)
}

// TestAdoptSpare: a guest may be repaired though it has a vCPU without registers
// (maxvcpus, or xl vcpu-set).
func TestAdoptSpare(t *testing.T) {
	for _, kind := range []xentest.Kind{xentest.PV, xentest.HVM} {
		m := xentest.New(xentest.Config{Kind: kind, GDBSX: kind == xentest.PV, VCPUs: 2, Seed: 3})
		before := m.Text()
		m.Start()
		t.Cleanup(m.Stop)
		require.NoError(t, m.Quiesce(t.Context()))
		hv := spare{m.Hypervisor(), 1}
		mem := make([]byte, xen.StateSize(2))
		tool := xentest.NewMortal(hv)
		cfg := xen.Config{State: mem, Lookup: m.Lookup}
		var d breakpoint.Driver
		var err error
		if kind == xentest.PV {
			d, err = xen.OpenDebugger(tool, xen.NewFrames(tool), cfg)
		} else {
			d, err = xen.OpenMonitor(tool, xen.NewFrames(tool), cfg)
		}
		require.NoError(t, err)
		died := make(chan struct{})
		tool.Die(0, false, func() { close(died) })
		go func() { _ = d.Freeze() }()
		<-died

		frames := xen.NewFrames(hv)
		left := xen.Left{State: append([]byte(nil), mem...)}
		var next interface {
			breakpoint.Driver
			breakpoint.Adopter
		}
		if kind == xentest.PV {
			next, _, err = xen.AdoptDebugger(hv, frames, left)
		} else {
			next, err = xen.AdoptMonitor(hv, frames, left)
		}
		require.NoError(t, err)
		ips, err := next.IPs()
		require.NoError(t, err)
		require.Len(t, ips, 2)
		assert.NotZero(t, ips[0])
		assert.Zero(t, ips[1])
		require.NoError(t, next.Thaw())
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		assert.ErrorIs(t, next.Wait(ctx, new(breakpoint.Stop)), context.DeadlineExceeded)
		cancel()
		require.NoError(t, next.Close())
		require.NoError(t, frames.Close())
		m.Release()
		xentest.Verify(t, m, before)
		assert.Zero(t, m.Pauses())
	}
}
