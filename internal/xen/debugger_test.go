package xen_test

import (
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

// debugHandler is the simulated Xen with a guest that has a handler for debug
// exceptions, which the simulated one hasn't, and with debug registers of the test's.
type debugHandler struct {
	xen.Hypervisor
	address  uint64
	dr6, dr7 uint64 // of vCPU 0; 0: as they are
}

func (h *debugHandler) VCPUContext(v int, c *xenctrl.VCPUContext) error {
	err := h.Hypervisor.VCPUContext(v, c)
	c.Traps[1] = xenctrl.TrapInfo{Vector: 1, Flags: xenctrl.TrapDisablesEvents, CS: 0xe033, Address: h.address}
	if h.dr6 != 0 && v == 0 {
		c.DebugReg[6], c.DebugReg[7] = h.dr6, h.dr7
	}
	return err
}

func (h *debugHandler) SetVCPUContext(v int, c *xenctrl.VCPUContext) error {
	d := *c
	d.Traps[1] = xenctrl.TrapInfo{}
	return h.Hypervisor.SetVCPUContext(v, &d)
}

// TestDebugException has the guest's kernel meet a debug exception of its own, whose
// pause Xen leaves to the debugger: it is given to the guest, by Close as well.
func TestDebugException(t *testing.T) {
	for _, serve := range []bool{false, true} {
		t.Run(fmt.Sprintf("served=%v", serve), func(t *testing.T) {
			m := xentest.New(xentest.Config{Kind: xentest.PV, GDBSX: true, VCPUs: 2, IRQEvery: -1})
			hv := &debugHandler{Hypervisor: m.Hypervisor(), address: m.Symbol("int3_entry")}
			drv, err := xen.OpenDebugger(hv, xentest.Frames(t, hv), xen.Config{})
			require.NoError(t, err)
			e := breakpoint.New(drv, breakpoint.Config{Scratch: m.Scratch, MayFault: xentest.NoFaults})
			var c xenctrl.VCPUContext
			require.NoError(t, hv.Pause())
			require.NoError(t, hv.VCPUContext(0, &c))
			c.User.RFLAGS |= 0x100 // TF: the guest steps itself
			require.NoError(t, hv.SetVCPUContext(0, &c))
			require.NoError(t, hv.Unpause())
			m.Run(50)
			require.Equal(t, 1, m.Pauses(), "the exception has paused the domain")
			if serve {
				ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
				_, err := e.Serve(ctx, true)
				cancel()
				require.ErrorIs(t, err, context.DeadlineExceeded)
				assert.Zero(t, m.Pauses())
			}
			require.NoError(t, e.Close())
			assert.Zero(t, m.Pauses())
			require.NoError(t, hv.VCPUContext(0, &c))
			if !serve {
				assert.Equal(t, hv.address, c.User.RIP, "at its handler")
			}
			assert.Zero(t, c.User.RFLAGS&0x100)
		})
	}
}

// TestPausedByOthers: a domain that an administrator has paused stays paused, even
// while a vCPU has a debug exception that its handler has not read yet.
func TestPausedByOthers(t *testing.T) {
	for name, c := range map[string]struct {
		dr6, dr7 uint64
		symbols  bool
	}{
		"nothing":            {},
		"a step was made":    {0xffff4ff0, 0x400, false},
		"watchpoint, no DR7": {0xffff0ff1, 0x400, false},
		"in the handler":     {0xffff0ff1, 0x401, true},
	} {
		t.Run(name, func(t *testing.T) {
			m := xentest.New(xentest.Config{Kind: xentest.PV, GDBSX: true, VCPUs: 2})
			hv := &debugHandler{Hypervisor: m.Hypervisor(), address: m.Symbol("int3_entry")}
			var cfg xen.Config
			if c.symbols { // all of the text is what runs before DR6 is read
				cfg.Lookup = func(name string) (uint64, bool) {
					addr, ok := map[string]uint64{"__noinstr_text_start": xentest.TextBase, "__noinstr_text_end": xentest.TextBase + 1<<20}[name]
					return addr, ok
				}
			}
			drv, err := xen.OpenDebugger(hv, xentest.Frames(t, hv), cfg)
			require.NoError(t, err)
			e := breakpoint.New(drv, breakpoint.Config{Scratch: m.Scratch, MayFault: xentest.NoFaults})
			m.Run(100)
			hv.dr6, hv.dr7 = c.dr6, c.dr7
			require.NoError(t, hv.Pause())
			ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
			defer cancel()
			_, err = e.Serve(ctx, true)
			require.ErrorIs(t, err, context.DeadlineExceeded)
			assert.Equal(t, 1, m.Pauses())
			require.NoError(t, e.Close())
			assert.Equal(t, 1, m.Pauses(), "after Close")
		})
	}
}

// holding is a Xen that knows which vCPUs are held by themselves, and how often no event
// was left.
type holding struct {
	xen.Hypervisor
	vcpus [4]atomic.Int64 // how often
	looks atomic.Int64
}

func (h *holding) GdbsxDomStatus() (xenctrl.DomStatus, error) {
	s, err := h.Hypervisor.GdbsxDomStatus()
	if s.VCPU < 0 {
		h.looks.Add(1)
	}
	return s, err
}

// all returns when vcpu, at whose stop the domain is, is held, and every other one that
// had stopped before, too: that takes three more ticks, each of which takes the events
// that there are.
func (h *holding) all(t *testing.T, vcpu int) {
	wait := func(f func() bool) { assert.Eventually(t, f, 20*time.Second, time.Millisecond) }
	wait(func() bool { return h.vcpus[vcpu].Load() > 0 })
	n := h.looks.Load() + 4
	wait(func() bool { return h.looks.Load() >= n })
}

func (h *holding) GdbsxPauseVCPU(v int) error {
	err := h.Hypervisor.GdbsxPauseVCPU(v)
	if err == nil {
		h.vcpus[v].Add(1)
	}
	return err
}

func (h *holding) GdbsxUnpauseVCPU(v int) error {
	err := h.Hypervisor.GdbsxUnpauseVCPU(v)
	if err == nil {
		h.vcpus[v].Add(-1)
	}
	return err
}

// unhurried is a Hypervisor whose guest gets somewhere before an unpause returns.
type unhurried struct{ xen.Hypervisor }

func (h unhurried) Unpause() error {
	err := h.Hypervisor.Unpause()
	time.Sleep(time.Millisecond)
	return err
}

// TestUnpausedByOthers has an administrator unpause the domain while a handler runs:
// those that have stopped, which are held by themselves by then, stay at their
// breakpoints, others may hit meanwhile, and all is counted. So it is with instructions
// that are stepped in place.
func TestUnpausedByOthers(t *testing.T) {
	for _, method := range []breakpoint.Method{breakpoint.Auto, breakpoint.InPlace} {
		for _, vcpus := range []int{1, 2, 4} {
			t.Run(fmt.Sprintf("%v/%d", method, vcpus), func(t *testing.T) { unpausedByOthers(t, method, vcpus) })
		}
	}
}

func unpausedByOthers(t *testing.T, method breakpoint.Method, vcpus int) {
	m, left := running(t, xentest.Config{Kind: xentest.PV, GDBSX: true, AVX: true, VCPUs: vcpus, Seed: uint64(vcpus)})
	hv := m.Hypervisor()
	holds := &holding{Hypervisor: hv}
	drv, err := m.Attach(unhurried{holds})
	require.NoError(t, err)
	e := breakpoint.New(drv, breakpoint.Config{Scratch: m.Scratch, MayFault: xentest.NoFaults, Method: method})
	unpaused, posts := 0, uint64(0)
	p := &breakpoint.Probe{Addr: m.Symbol("nop5"), Pre: func(c *breakpoint.Context) breakpoint.Verdict {
		if unpaused < 5 {
			holds.all(t, c.VCPU)
			if hv.Unpause() == nil {
				unpaused++
			}
			time.Sleep(30 * time.Millisecond)
		}
		return breakpoint.Continue
	}, Post: func(c *breakpoint.Context) breakpoint.Verdict {
		posts++
		assert.Equal(t, m.Symbol("nop5")+5, c.Regs.IP)
		return breakpoint.Continue
	}}
	require.NoError(t, e.Register(p))
	base := m.Executed(p.Addr)
	served(t, m, e, func() bool { return p.Hits() >= 20 })
	assert.GreaterOrEqual(t, unpaused, 5)
	assert.Equal(t, m.Executed(p.Addr)-base, p.Hits())
	assert.Equal(t, p.Hits(), posts)
	left(e)
}
