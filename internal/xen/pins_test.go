package xen_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync/atomic"
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

// stubborn is a Xen whose next unpauses fail.
type stubborn struct {
	xen.Hypervisor
	n atomic.Int64
}

func (h *stubborn) Unpause() error {
	if h.n.Add(-1) >= 0 {
		return syscall.EAGAIN
	}
	return h.Hypervisor.Unpause()
}

// TestDebugExceptionUnpauseFails has the unpause fail for a while that lets the guest go
// on after a debug exception of its own: it goes on later.
func TestDebugExceptionUnpauseFails(t *testing.T) {
	m := xentest.New(xentest.Config{Kind: xentest.PV, GDBSX: true, VCPUs: 2, IRQEvery: -1})
	fails := &stubborn{Hypervisor: m.Hypervisor()}
	hv := &debugHandler{Hypervisor: fails, address: m.Symbol("int3_entry")}
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
	fails.n.Store(3)
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	for ctx.Err() == nil {
		_, err := e.Serve(ctx, true)
		require.Error(t, err)
	}
	assert.Zero(t, m.Pauses(), "the guest goes on")
	require.NoError(t, e.Close())
	assert.Zero(t, m.Pauses())
}

// TestUnpausedInStep has an administrator unpause the domain while a handler runs for a
// vCPU whose step an interrupt has come in between of, with a probe in its handler.
func TestUnpausedInStep(t *testing.T) {
	for _, vcpus := range []int{1, 2} {
		t.Run(fmt.Sprint(vcpus), func(t *testing.T) {
			m, left := running(t, xentest.Config{Kind: xentest.PV, GDBSX: true, VCPUs: vcpus, AnyMask: true, Seed: rand.Uint64()})
			hv := m.Hypervisor()
			drv, err := xen.OpenDebugger(hv, xentest.Frames(t, hv), xen.Config{}) // events can't be masked
			require.NoError(t, err)
			e := breakpoint.New(drv, breakpoint.Config{MayFault: xentest.NoFaults}) // no dead code: steps in place
			var addr uint64
			stepped, inHandler := &breakpoint.Probe{}, &breakpoint.Probe{}
			stepping := 0
			var unpaused atomic.Int64
			for _, in := range m.Insns() {
				if in.Func == "event_entry" && len(in.Bytes) == 1 && in.Bytes[0] == 0x57 {
					inHandler.Addr = in.VA
				}
				if len(in.Bytes) > 3 && string(in.Bytes[:3]) == "\x48\x69\xc0" { // imul, which is stepped in place
					addr = in.VA
				}
			}
			stepped.Addr = addr
			stepped.Pre = func(*breakpoint.Context) breakpoint.Verdict { stepping++; return breakpoint.Continue }
			stepped.Post = func(*breakpoint.Context) breakpoint.Verdict { stepping--; return breakpoint.Continue }
			inHandler.Pre = func(*breakpoint.Context) breakpoint.Verdict {
				if stepping > 0 && unpaused.Load() < 5 {
					time.Sleep(200 * time.Millisecond) // it is pinned after two ticks
					if hv.Unpause() == nil {
						unpaused.Add(1)
					}
					time.Sleep(10 * time.Millisecond)
				}
				return breakpoint.Continue
			}
			require.NoError(t, e.Register(stepped, inHandler))
			base := m.Executed(inHandler.Addr)
			served(t, m, e, func() bool { return unpaused.Load() >= 5 || m.Oops() != "" })
			assert.EqualValues(t, 5, unpaused.Load())
			assert.Equal(t, m.Executed(inHandler.Addr)-base, inHandler.Hits())
			left(e)
		})
	}
}

// leaving is a Xen that takes its time to detach the debugger.
type leaving struct {
	*holding
	detach func()
}

func (h leaving) SetDebugging(on bool) error {
	if !on {
		h.detach()
	}
	return h.holding.SetDebugging(on)
}

// TestUnpausedBeforeClose has an administrator unpause the domain while nobody serves,
// though vCPUs are stopped: Close leaves a guest that stands still, and one that is whole.
func TestUnpausedBeforeClose(t *testing.T) {
	for seed := range uint64(5) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			m, left := running(t, xentest.Config{Kind: xentest.PV, GDBSX: true, AVX: true, VCPUs: 4, Seed: seed})
			hv := m.Hypervisor()
			holds := &holding{Hypervisor: hv}
			drv, err := m.Attach(leaving{holds, func() {
				assert.Positive(t, m.Pauses(), "the guest runs while it is left")
				time.Sleep(10 * time.Millisecond)
			}})
			require.NoError(t, err)
			e := breakpoint.New(drv, breakpoint.Config{Scratch: m.Scratch, MayFault: xentest.NoFaults})
			others := func() (n int) {
				for v := range holds.vcpus {
					if holds.vcpus[v].Load() > 0 {
						n++
					}
				}
				return n
			}
			p := &breakpoint.Probe{Addr: m.Symbol("nop5"), Pre: func(c *breakpoint.Context) breakpoint.Verdict {
				holds.all(t, c.VCPU)
				if n := others(); n < 2 || n == 4 {
					return breakpoint.Continue
				}
				return 1
			}}
			require.NoError(t, e.Register(p))
			m.Release()
			_, err = e.Serve(t.Context(), true)
			require.NoError(t, err)
			n := others()
			require.Positive(t, n, "some wait for their answer")
			for range 3 {
				_ = hv.Unpause()
				time.Sleep(20 * time.Millisecond)
			}
			require.NoError(t, e.Close())
			assert.Zero(t, m.Pauses())
			atRest(t, m)
			left(e)
		})
	}
}

// stale is a Xen with two vCPUs whose unpauses fail until each has been answered and
// tried again, and where one then doesn't get its registers at its next hit.
type stale struct {
	stubborn
	vcpu int
	set  int // that fail
}

func (h *stale) SetVCPUContext(v int, c *xenctrl.VCPUContext) error {
	if h.vcpu == v && h.set > 0 && h.n.Load() < 0 {
		h.set--
		return syscall.EAGAIN
	}
	return h.stubborn.SetVCPUContext(v, c)
}

// TestAnsweredOnce has the unpause fail that follows an answer, so that the vCPU goes on
// with that of another one: at its next hit it isn't given its old registers.
func TestAnsweredOnce(t *testing.T) {
	for seed := range uint64(6) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			m, left := running(t, xentest.Config{Kind: xentest.PV, GDBSX: true, VCPUs: 2, Seed: seed})
			hv := &stale{stubborn: stubborn{Hypervisor: m.Hypervisor()}}
			drv, err := m.Attach(hv)
			require.NoError(t, err)
			e := breakpoint.New(drv, breakpoint.Config{Scratch: m.Scratch, MayFault: xentest.NoFaults})
			p := &breakpoint.Probe{Addr: m.Symbol("nop5")}
			p.Pre = func(c *breakpoint.Context) breakpoint.Verdict {
				if p.Hits() == 1 {
					time.Sleep(5 * time.Millisecond) // the other one hits, too
					hv.vcpu, hv.set = c.VCPU, 9
					hv.n.Store(36)
				}
				return breakpoint.Continue
			}
			require.NoError(t, e.Register(p))
			base := m.Executed(p.Addr)
			m.Release()
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan struct{})
			go func() {
				defer close(done)
				for ctx.Err() == nil {
					_, _ = e.Serve(ctx, true)
				}
			}()
			for i := 0; i < 3000 && p.Hits() < 20 && m.Oops() == ""; i++ {
				time.Sleep(time.Millisecond)
			}
			atRest(t, m)
			cancel()
			<-done
			assert.GreaterOrEqual(t, p.Hits(), uint64(20))
			assert.Equal(t, m.Executed(p.Addr)-base, p.Hits()+p.Missed())
			left(e)
		})
	}
}
