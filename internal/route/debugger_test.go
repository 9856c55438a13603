package route_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/route"
	"github.com/vmprobes/vmprobes/internal/sim"
	"github.com/vmprobes/vmprobes/xenctrl"
)

// debugHandler is the simulated Xen with a guest that has a handler for debug
// exceptions, which the simulated one hasn't, and with debug registers of the test's.
type debugHandler struct {
	route.Hypervisor
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
			m := sim.New(sim.Config{Kind: sim.PV, GDBSX: true, VCPUs: 2, IRQEvery: -1})
			hv := &debugHandler{Hypervisor: m.Hypervisor(), address: m.Symbol("int3_entry")}
			drv, err := route.OpenDebugger(hv)
			require.NoError(t, err)
			e := breakpoint.New(drv, breakpoint.Config{Scratch: scratch(m), MayFault: never})
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
			m := sim.New(sim.Config{Kind: sim.PV, GDBSX: true, VCPUs: 2})
			hv := &debugHandler{Hypervisor: m.Hypervisor(), address: m.Symbol("int3_entry")}
			drv, err := route.OpenDebugger(hv)
			require.NoError(t, err)
			if c.symbols { // all of the text is what runs before DR6 is read
				drv.UseSymbols(func(name string) (uint64, bool) {
					addr, ok := map[string]uint64{"__noinstr_text_start": sim.TextBase, "__noinstr_text_end": sim.TextBase + 1<<20}[name]
					return addr, ok
				})
			}
			e := breakpoint.New(drv, breakpoint.Config{Scratch: scratch(m), MayFault: never})
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

// unhurried is a Hypervisor whose guest gets somewhere before an unpause returns.
type unhurried struct{ route.Hypervisor }

func (h unhurried) Unpause() error {
	err := h.Hypervisor.Unpause()
	time.Sleep(time.Millisecond)
	return err
}

// TestUnpausedByOthers has an administrator unpause the domain while a handler runs:
// the vCPU stays at its breakpoint, others may hit meanwhile, and all is counted.
func TestUnpausedByOthers(t *testing.T) {
	for _, vcpus := range []int{1, 2, 4} {
		t.Run(fmt.Sprint(vcpus), func(t *testing.T) {
			cfg := sim.Config{Kind: sim.PV, GDBSX: true, AVX: true, VCPUs: vcpus, Seed: uint64(vcpus)}
			m := sim.New(cfg)
			before := m.Text()
			m.Start()
			defer m.Stop()
			require.NoError(t, m.Quiesce(t.Context()))
			hv := m.Hypervisor()
			drv, err := attachTo(unhurried{hv}, m, cfg)
			require.NoError(t, err)
			e := breakpoint.New(drv, breakpoint.Config{Scratch: scratch(m), MayFault: never})
			unpaused := 0
			p := &breakpoint.Probe{Addr: m.Symbol("nop5"), Pre: func(*breakpoint.Context) breakpoint.Verdict {
				if unpaused < 5 {
					time.Sleep(30 * time.Millisecond)
					if hv.Unpause() == nil {
						unpaused++
					}
					time.Sleep(30 * time.Millisecond)
				}
				return breakpoint.Continue
			}}
			require.NoError(t, e.Register(p))
			base := m.Executed(p.Addr)
			m.Release()
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error, 1)
			go func() {
				_, err := e.Serve(ctx, true)
				done <- err
			}()
			for i := 0; i < 5000 && p.Hits() < 20; i++ {
				time.Sleep(time.Millisecond)
			}
			quiet, end := context.WithTimeout(t.Context(), 20*time.Second)
			defer end()
			assert.NoError(t, m.Quiesce(quiet), m.State())
			cancel()
			require.ErrorIs(t, <-done, context.Canceled)
			assert.GreaterOrEqual(t, unpaused, 5)
			assert.Equal(t, m.Executed(p.Addr)-base, p.Hits())
			require.NoError(t, e.Close())
			m.Release()
			sim.Verify(t, m, before)
			assert.Zero(t, m.Pauses())
		})
	}
}
