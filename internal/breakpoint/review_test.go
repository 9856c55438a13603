package breakpoint_test

import (
	"bytes"
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/xentest"
)

// TestPanicCounts: a handler that panics ends the hit for the probes after it, which
// count it as missed.
func TestPanicCounts(t *testing.T) {
	one(t, func(t *testing.T, cfg xentest.Config) {
		m, _, e := engine(t, cfg, breakpoint.Config{MayFault: xentest.NoFaults})
		a := &breakpoint.Probe{Addr: m.Symbol("nop5")}
		a.Pre = func(*breakpoint.Context) breakpoint.Verdict {
			if a.Hits() == 3 {
				panic("handler")
			}
			return breakpoint.Continue
		}
		b := &breakpoint.Probe{Addr: a.Addr}
		require.NoError(t, e.Register(a, b))
		base := m.Executed(a.Addr)
		m.Release()
		require.Panics(t, func() { _, _ = e.Serve(t.Context(), true) })
		require.NoError(t, served(t, e, func() { quiesce(t, m) }))
		n := m.Executed(a.Addr) - base
		assert.Equal(t, n, a.Hits()+a.Missed())
		assert.Equal(t, n, b.Hits()+b.Missed())
	})
}

// TestShiftedGoesOn has a handler send the vCPU from the probe's address to where its
// breakpoint stands: the other probe there sees it.
func TestShiftedGoesOn(t *testing.T) {
	one(t, func(t *testing.T, cfg xentest.Config) {
		m, _, e := engine(t, cfg, breakpoint.Config{MayFault: xentest.NoFaults})
		addr := m.Symbol("nop5")
		shifted := &breakpoint.Probe{Addr: addr, At: addr + 5, Pre: func(c *breakpoint.Context) breakpoint.Verdict {
			c.Regs.IP = addr + 5
			return breakpoint.Continue
		}}
		direct := &breakpoint.Probe{Addr: addr + 5}
		require.NoError(t, e.Register(shifted, direct))
		base := m.Executed(addr)
		m.Release()
		require.NoError(t, served(t, e, func() {
			time.Sleep(20 * time.Millisecond)
			quiesce(t, m)
		}))
		n := m.Executed(addr) - base
		require.Positive(t, n)
		assert.Equal(t, n, shifted.Hits())
		assert.Equal(t, n, direct.Hits()+direct.Missed())
	})
}

// TestReplacedInHandler has a handler unregister its probe and register it again: the
// vCPU goes on, and the execution counts once.
func TestReplacedInHandler(t *testing.T) {
	for _, kind := range []string{"emulated", "out of line"} {
		t.Run(kind, func(t *testing.T) {
			one(t, func(t *testing.T, cfg xentest.Config) {
				cfg.VCPUs = 1 // another one could slip past in between
				m, _, e := engine(t, cfg, breakpoint.Config{MayFault: xentest.NoFaults})
				p := &breakpoint.Probe{Addr: m.Symbol("nop5")}
				if kind == "out of line" {
					p.Addr = outOfLine(t, m)
				}
				n := 0
				p.Pre = func(*breakpoint.Context) breakpoint.Verdict {
					if n++; n%2 == 1 && n < 20 {
						assert.NoError(t, e.Unregister(p))
						assert.NoError(t, e.Register(p))
					}
					return breakpoint.Continue
				}
				require.NoError(t, e.Register(p))
				base := m.Executed(p.Addr)
				m.Release()
				require.NoError(t, served(t, e, func() {
					time.Sleep(20 * time.Millisecond)
					quiesce(t, m)
				}))
				require.Positive(t, m.Executed(p.Addr)-base)
				assert.Equal(t, m.Executed(p.Addr)-base, p.Hits())
			})
		})
	}
}

// TestPanicOwes has a Post handler panic while more than one vCPU is owed its answer:
// the others are answered all the same.
func TestPanicOwes(t *testing.T) {
	one(t, func(t *testing.T, cfg xentest.Config) {
		m, d, e := engine(t, cfg, breakpoint.Config{MayFault: xentest.NoFaults})
		failing, seen := false, map[int]bool{}
		d.store = func() error {
			if failing {
				return errInjected
			}
			return nil
		}
		p := &breakpoint.Probe{Addr: find(t, m, 0xe8)}
		panicking := false
		p.Pre = func(c *breakpoint.Context) breakpoint.Verdict { seen[c.VCPU] = true; return breakpoint.Continue }
		p.Post = func(c *breakpoint.Context) breakpoint.Verdict {
			if panicking {
				panicking = false
				panic("handler")
			}
			return breakpoint.Continue
		}
		require.NoError(t, e.Register(p))
		base := m.Executed(p.Addr)
		failing = true
		m.Release()
		serveUntil(t, e, func() bool { return len(seen) == 2 })
		require.Len(t, seen, 2)
		failing, panicking = false, true
		require.Panics(t, func() { _, _ = e.Serve(t.Context(), true) })
		require.NoError(t, served(t, e, func() { quiesce(t, m) }))
		assert.Equal(t, m.Executed(p.Addr)-base, p.Hits()+p.Missed())
	})
}

// TestOwedVerdict: a handler of a hit whose instruction could not be executed at once
// ends Serve, even if the answer fails once more.
func TestOwedVerdict(t *testing.T) {
	one(t, func(t *testing.T, cfg xentest.Config) {
		m, d, e := engine(t, cfg, breakpoint.Config{MayFault: xentest.NoFaults})
		failing, resumes := true, 0
		d.store = func() error {
			if failing {
				return errInjected
			}
			return nil
		}
		d.resume = func() error {
			if resumes > 0 {
				resumes--
				return errInjected
			}
			return nil
		}
		p := &breakpoint.Probe{Addr: find(t, m, 0xe8)}
		posts := 0
		p.Post = func(c *breakpoint.Context) breakpoint.Verdict {
			if posts++; posts > 1 {
				return breakpoint.Continue
			}
			resumes = 3
			return 1
		}
		require.NoError(t, e.Register(p))
		m.Release()
		v, err := e.Serve(t.Context(), true)
		require.ErrorIs(t, err, errInjected)
		failing = false
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		defer cancel()
		for posts == 0 {
			v, _ = e.Serve(ctx, true)
		}
		assert.EqualValues(t, 1, v)
	})
}

// TestGoneWhileStopped has the domain destroyed while a handler runs: nothing of this
// process stays.
func TestGoneWhileStopped(t *testing.T) {
	one(t, func(t *testing.T, cfg xentest.Config) {
		m := xentest.New(cfg)
		m.Start()
		defer m.Stop()
		drv, err := m.Attach(nil)
		require.NoError(t, err)
		e := breakpoint.New(drv, breakpoint.Config{Scratch: m.Scratch, MayFault: xentest.NoFaults})
		p := &breakpoint.Probe{Addr: m.Symbol("nop5"), Pre: func(*breakpoint.Context) breakpoint.Verdict {
			m.Kill()
			return breakpoint.Continue
		}}
		require.NoError(t, e.Register(p))
		_, err = e.Serve(t.Context(), true)
		require.ErrorIs(t, err, breakpoint.ErrGone)
		assert.NoError(t, e.Close())
		assert.True(t, e.Left())
		assert.Zero(t, m.Mappings())
	})
}

// TestRegisterThaws has the guest not go on after Register for a moment: all probes are
// registered, or none.
func TestRegisterThaws(t *testing.T) {
	one(t, func(t *testing.T, cfg xentest.Config) {
		m, d, e := engine(t, cfg, breakpoint.Config{MayFault: xentest.NoFaults})
		d.thaw = failing(3)
		p := &breakpoint.Probe{Addr: m.Symbol("nop5")}
		err := e.Register(p)
		assert.Equal(t, err == nil, e.Registered(p), "%v", err)
		assert.Equal(t, err == nil, m.Peek(p.Addr, 1)[0] == 0xcc, "%v", err)
	})
}

// TestForeignOwed has the byte at a stale breakpoint be unreadable while a new one is
// put there: the guest isn't given what is ours.
func TestForeignOwed(t *testing.T) {
	one(t, func(t *testing.T, cfg xentest.Config) {
		m, d, e := engine(t, cfg, breakpoint.Config{MayFault: xentest.NoFaults})
		p := &breakpoint.Probe{Addr: m.Symbol("nop5")}
		q := &breakpoint.Probe{Addr: p.Addr}
		require.NoError(t, e.Register(p))
		base := m.Executed(p.Addr)
		m.Release()
		time.Sleep(5 * time.Millisecond) // vCPUs stop at it
		require.NoError(t, e.Unregister(p))
		failing := true
		d.read = func(addr uint64) error {
			if failing && addr == p.Addr {
				return errInjected
			}
			return nil
		}
		_, err := e.Serve(t.Context(), true)
		require.ErrorIs(t, err, errInjected)
		failing = false
		require.NoError(t, e.Register(q))
		require.NoError(t, served(t, e, func() {
			time.Sleep(10 * time.Millisecond)
			quiesce(t, m)
		}))
		assert.Empty(t, m.Oops())
		assert.LessOrEqual(t, q.Hits(), m.Executed(p.Addr)-base)
		assert.Positive(t, q.Hits())
	})
}

// TestCloseTwiceInSlot closes while a vCPU on its way to a slot can't be answered, and
// again when it can: nothing stays, or Close says so.
func TestCloseTwiceInSlot(t *testing.T) {
	one(t, func(t *testing.T, cfg xentest.Config) {
		m, d, e := engine(t, cfg, breakpoint.Config{MayFault: xentest.NoFaults})
		p := &breakpoint.Probe{Addr: outOfLine(t, m), Pre: func(*breakpoint.Context) breakpoint.Verdict {
			d.resume = func() error { return errInjected }
			return breakpoint.Continue
		}}
		require.NoError(t, e.Register(p))
		m.Release()
		_, err := e.Serve(t.Context(), true)
		require.ErrorIs(t, err, errInjected)
		require.ErrorIs(t, e.Close(), breakpoint.ErrUnanswered)
		d.resume = nil
		begin := time.Now()
		if e.Close() == nil {
			assert.Less(t, time.Since(begin), time.Second)
		}
	})
}

// TestGiveUpOwed has a breakpoint that is to be given up be removed by its owner and
// put back, before it could be: the new one stays, and is removed by Close.
func TestGiveUpOwed(t *testing.T) {
	one(t, func(t *testing.T, cfg xentest.Config) {
		if cfg.Kind == xentest.PV {
			return // it is stepped in place, and not given up
		}
		m, d, e := engine(t, cfg, breakpoint.Config{MayFault: xentest.NoFaults})
		p := &breakpoint.Probe{Addr: find(t, m, 0xe8)}
		require.NoError(t, e.Register(p))
		base := m.Executed(p.Addr)
		d.store = func() error { return breakpoint.ErrFault }
		d.remove = func() error { return errInjected }
		m.Release()
		_, err := e.Serve(t.Context(), true)
		require.ErrorIs(t, err, breakpoint.ErrNoWayPast)
		require.ErrorIs(t, err, errInjected)
		d.store, d.remove = nil, nil
		require.NoError(t, e.Unregister(p))
		require.NoError(t, e.Register(p))
		require.NoError(t, served(t, e, func() {
			time.Sleep(10 * time.Millisecond)
			quiesce(t, m)
		}))
		assert.Len(t, e.Sites(), 1)
		assert.Equal(t, m.Executed(p.Addr)-base, p.Hits()+p.Missed())
	})
}

// TestReplacedInStep has a probe be unregistered and registered again while a vCPU
// executes its instruction in place.
func TestReplacedInStep(t *testing.T) {
	with(t, 1, func(t *testing.T, cfg xentest.Config) {
		cfg.IRQEvery = -1
		m, d, e := engine(t, cfg, breakpoint.Config{MayFault: xentest.NoFaults, Method: breakpoint.InPlace})
		p := &breakpoint.Probe{Addr: outOfLine(t, m)}
		require.NoError(t, e.Register(p))
		base := m.Executed(p.Addr)
		hv := m.Hypervisor()
		ctx, cancel := context.WithCancel(t.Context())
		d.stepped = func() { d.stepped = nil; assert.NoError(t, hv.Pause()); cancel() } // so that the step takes long
		m.Release()
		_, err := e.Serve(ctx, true)
		require.ErrorIs(t, err, context.Canceled)
		if e.Stats().InPlace > 0 && p.Hits() == 1 {
			require.NoError(t, e.Unregister(p))
			require.NoError(t, e.Register(p))
		}
		require.NoError(t, hv.Unpause())
		require.NoError(t, served(t, e, func() {
			time.Sleep(10 * time.Millisecond)
			quiesce(t, m)
		}))
		assert.Equal(t, m.Executed(p.Addr)-base, p.Hits())
	})
}

// TestCloseInStep closes while somebody has paused the domain in the middle of a step:
// TF doesn't stay, or Close fails.
func TestCloseInStep(t *testing.T) {
	if testing.Short() {
		t.Skip("Close waits for ten seconds")
	}
	with(t, 1, func(t *testing.T, cfg xentest.Config) {
		t.Parallel()
		cfg.IRQEvery = -1
		m, d, e := engine(t, cfg, breakpoint.Config{MayFault: xentest.NoFaults, Method: breakpoint.InPlace})
		hv := m.Hypervisor()
		ctx, cancel := context.WithCancel(t.Context())
		d.stepped = cancel
		paused := false
		p := &breakpoint.Probe{Addr: outOfLine(t, m), Pre: func(*breakpoint.Context) breakpoint.Verdict {
			if !paused {
				paused = true
				assert.NoError(t, hv.Pause())
			}
			return breakpoint.Continue
		}}
		require.NoError(t, e.Register(p))
		m.Release()
		_, err := e.Serve(ctx, true)
		require.ErrorIs(t, err, context.Canceled)
		err = e.Close()
		require.NoError(t, hv.Unpause())
		if err != nil {
			require.ErrorIs(t, err, breakpoint.ErrUnanswered)
			require.NoError(t, e.Close())
		}
	})
}

// TestPanicWinding has a Post handler panic in what a Serve that ends still waits for:
// its hit is answered, and the engine is of use afterwards.
func TestPanicWinding(t *testing.T) {
	one(t, func(t *testing.T, cfg xentest.Config) {
		m, _, e := engine(t, cfg, breakpoint.Config{MayFault: xentest.NoFaults})
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		posts := 0
		p := &breakpoint.Probe{Addr: outOfLine(t, m)}
		p.Pre = func(*breakpoint.Context) breakpoint.Verdict { cancel(); return breakpoint.Continue }
		p.Post = func(*breakpoint.Context) breakpoint.Verdict {
			if posts++; posts == 1 {
				panic("handler")
			}
			return breakpoint.Continue
		}
		require.NoError(t, e.Register(p))
		base := m.Executed(p.Addr)
		m.Release()
		require.PanicsWithValue(t, "handler", func() { _, _ = e.Serve(ctx, true) })
		require.NotZero(t, e.Stats().OutOfLine)
		require.NoError(t, served(t, e, func() { quiesce(t, m) }))
		assert.Equal(t, m.Executed(p.Addr)-base, p.Hits()+p.Missed())
	})
}

// TestSlotOwed: a slot whose probe has gone isn't made dead code while a vCPU at its end can't
// be answered. If this process died the vCPU would come there once more.
func TestSlotOwed(t *testing.T) {
	one(t, func(t *testing.T, cfg xentest.Config) {
		m, d, e := engine(t, cfg, breakpoint.Config{MayFault: xentest.NoFaults, Method: breakpoint.OutOfLine})
		p := &breakpoint.Probe{Addr: outOfLine(t, m), Post: func(*breakpoint.Context) breakpoint.Verdict {
			d.resume = func() error { return errInjected }
			return breakpoint.Continue
		}}
		require.NoError(t, e.Register(p))
		slot := e.Sites()[0].Slot
		require.NotZero(t, slot)
		before := m.Peek(slot, 8)
		m.Release()
		_, err := e.Serve(t.Context(), true)
		require.ErrorIs(t, err, errInjected)
		require.NoError(t, e.Unregister(p))
		assert.Equal(t, before, m.Peek(slot, 8))
		d.resume = nil
		require.NoError(t, served(t, e, func() {
			for i := 0; i < 2000 && m.Peek(slot, 1)[0] != 0xcc; i++ {
				time.Sleep(time.Millisecond)
			}
		}))
		assert.Equal(t, bytes.Repeat([]byte{0xcc}, 8), m.Peek(slot, 8))
	})
}
