package xen_test

import (
	"context"
	"errors"
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

// TestNoFrame has a hostile PV guest execute an int3 of its own with a stack that isn't
// there: nobody can be given that exception, but the guest can be left.
func TestNoFrame(t *testing.T) {
	cfg := xentest.Config{Kind: xentest.PV, GDBSX: true, VCPUs: 2, IRQEvery: -1}
	m := xentest.New(cfg)
	va := m.Gaps()[0].VA + 0x100
	m.Load(va, []byte{0xcc})
	hv := m.Hypervisor()
	drv, err := m.Attach(hv)
	require.NoError(t, err)
	e := breakpoint.New(drv, breakpoint.Config{Scratch: m.Scratch, MayFault: xentest.NoFaults})
	require.NoError(t, hv.Pause())
	var c xenctrl.VCPUContext
	require.NoError(t, hv.VCPUContext(0, &c))
	c.User.RIP, c.User.RSP = va, 0xffffc8ffffff0000
	require.NoError(t, hv.SetVCPUContext(0, &c))
	require.NoError(t, hv.Unpause())
	m.Run(50)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err = e.Serve(ctx, true)
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.NoError(t, e.Close())
	assert.False(t, m.Attached())
	assert.Zero(t, m.Pauses())
	require.NoError(t, hv.VCPUContext(0, &c))
	assert.Equal(t, va, c.User.RIP, "Xen sees what becomes of it")
}

// TestNoDebugFrame is TestNoFrame for a debug exception of the guest's own.
func TestNoDebugFrame(t *testing.T) {
	for _, serve := range []bool{false, true} {
		m := xentest.New(xentest.Config{Kind: xentest.PV, GDBSX: true, VCPUs: 2, IRQEvery: -1})
		va := m.Gaps()[0].VA + 0x100
		m.Load(va, []byte{0x90, 0x90, 0x90, 0x90})
		hv := &debugHandler{Hypervisor: m.Hypervisor(), address: m.Symbol("int3_entry")}
		drv, err := xen.OpenDebugger(hv, xentest.Frames(t, hv), xen.Config{})
		require.NoError(t, err)
		e := breakpoint.New(drv, breakpoint.Config{Scratch: m.Scratch, MayFault: xentest.NoFaults})
		var c xenctrl.VCPUContext
		require.NoError(t, hv.Pause())
		require.NoError(t, hv.VCPUContext(0, &c))
		c.User.RFLAGS |= 0x100
		c.User.RIP, c.User.RSP = va, 0xffffc8ffffff0000
		require.NoError(t, hv.SetVCPUContext(0, &c))
		require.NoError(t, hv.Unpause())
		m.RunVCPU(0, 1)
		require.Equal(t, 1, m.Pauses(), "the exception has paused the domain")
		if serve {
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
			_, err := e.Serve(ctx, true)
			cancel()
			assert.ErrorIs(t, err, context.DeadlineExceeded)
		}
		require.NoError(t, e.Close())
		assert.Zero(t, m.Pauses())
	}
}

// flaky is a Xen whose questions about the domain fail twice, and then succeed.
type flaky struct {
	xen.Hypervisor
	on atomic.Bool
	n  atomic.Int64
}

func (h *flaky) fails() error {
	if h.on.Load() && h.n.Add(1)%3 != 0 {
		return errors.New("not now")
	}
	return nil
}

func (h *flaky) Info() (xenctrl.DomainInfo, error) {
	if err := h.fails(); err != nil {
		return xenctrl.DomainInfo{}, err
	}
	return h.Hypervisor.Info()
}

func (h *flaky) GdbsxDomStatus() (xenctrl.DomStatus, error) {
	if err := h.fails(); err != nil {
		return xenctrl.DomStatus{}, err
	}
	return h.Hypervisor.GdbsxDomStatus()
}

// TestPassingFailure: a call that fails for a moment doesn't end Serve.
func TestPassingFailure(t *testing.T) {
	for name, cfg := range map[string]xentest.Config{
		"pv":  {Kind: xentest.PV, GDBSX: true},
		"hvm": {Kind: xentest.HVM},
	} {
		t.Run(name, func(t *testing.T) {
			m := xentest.New(cfg)
			before := m.Text()
			m.Start()
			defer m.Stop()
			hv := &flaky{Hypervisor: m.Hypervisor()}
			drv, err := m.Attach(hv)
			require.NoError(t, err)
			hv.on.Store(true)
			e := breakpoint.New(drv, breakpoint.Config{Scratch: m.Scratch, MayFault: xentest.NoFaults})
			p := &breakpoint.Probe{Addr: m.Symbol("nop5")}
			require.NoError(t, e.Register(p))
			ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
			defer cancel()
			_, err = e.Serve(ctx, true)
			require.ErrorIs(t, err, context.DeadlineExceeded)
			assert.Positive(t, p.Hits())
			require.NoError(t, e.Close())
			m.Release()
			xentest.Verify(t, m, before)
		})
	}
}

// TestNewcomer has a request on the ring of a vCPU that Info had not told of: it is let
// go on, once, whatever fails meanwhile, and is nobody's stop.
func TestNewcomer(t *testing.T) {
	for _, fails := range []struct{ respond, notify int }{{}, {respond: 3}, {notify: 3}, {respond: 6, notify: 6}} {
		m := xentest.New(xentest.Config{Kind: xentest.HVM, VCPUs: 2, IRQEvery: -1})
		hv := &newcomer{Hypervisor: m.Hypervisor(), respond: fails.respond, notify: fails.notify, requests: []int{2}}
		drv, err := m.Attach(hv)
		require.NoError(t, err)
		for range 5 {
			var s breakpoint.Stop
			ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
			err := drv.Wait(ctx, &s)
			cancel()
			require.Error(t, err)
		}
		assert.Equal(t, []xenctrl.Event{{VCPU: 2, Reason: xenctrl.ReasonSoftwareBreakpoint, Flags: xenctrl.EventVCPUPaused}}, hv.responses)
		assert.Zero(t, hv.untold, "responses that Xen hasn't been told of")
		require.NoError(t, drv.Freeze())
		require.NoError(t, drv.Close())
	}
}

// TestToldLater has Xen be told of an answer only after that has failed, when the vCPU is let
// go and stops anew: the answer that is tried again isn't that to the new stop.
func TestToldLater(t *testing.T) {
	m := xentest.New(xentest.Config{Kind: xentest.HVM, VCPUs: 1, IRQEvery: -1})
	hv := &newcomer{Hypervisor: m.Hypervisor(), notify: 3, requests: []int{0, 0}}
	drv, err := m.Attach(hv)
	require.NoError(t, err)
	var first, second breakpoint.Stop
	require.NoError(t, drv.Wait(t.Context(), &first))
	require.Error(t, drv.Resume(&first))
	require.NoError(t, drv.Wait(t.Context(), &second))
	for range 2 {
		require.NoError(t, drv.Resume(&first))
		assert.Len(t, hv.responses, 1)
	}
	require.NoError(t, drv.Resume(&second))
	assert.Len(t, hv.responses, 2)
	require.NoError(t, drv.Freeze())
	require.NoError(t, drv.Close())
}

type newcomer struct {
	xen.Hypervisor
	xen.Monitor
	respond, notify int   // how often these fail yet
	requests        []int // vCPUs
	untold          int
	responses       []xenctrl.Event
}

func (n *newcomer) OpenMonitor() (mon xen.Monitor, err error) {
	n.Monitor, err = n.Hypervisor.OpenMonitor()
	return n, err
}

func (n *newcomer) Wait(ctx context.Context) error {
	<-ctx.Done()
	return ctx.Err()
}

func (n *newcomer) Next(e *xenctrl.Event) (bool, error) {
	if len(n.requests) == 0 {
		return false, nil
	}
	*e = xenctrl.Event{VCPU: n.requests[0], Reason: xenctrl.ReasonSoftwareBreakpoint, Flags: xenctrl.EventVCPUPaused | xenctrl.EventAlternateP2M}
	n.requests = n.requests[1:]
	return true, nil
}

func (n *newcomer) Respond(e *xenctrl.Event) error {
	if n.respond > 0 {
		n.respond--
		return errors.New("injected")
	}
	n.untold++
	n.responses = append(n.responses, *e)
	return nil
}

func (n *newcomer) Notify() error {
	if n.notify > 0 {
		n.notify--
		return errors.New("injected")
	}
	n.untold = 0
	return nil
}
