package breakpoint_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/xentest"
)

// notices is a driver that notices itself that the guest has changed its code, as QEMU's.
type notices struct {
	breakpoint.Driver
	addr uint64 // of the next Wait
	then func() // is called when it has told that
}

func (d *notices) Wait(ctx context.Context, s *breakpoint.Stop) error {
	if a := d.addr; a != 0 {
		d.addr = 0
		d.then()
		return &breakpoint.ChangedError{Addrs: []uint64{a}, Err: fmt.Errorf("%#x: %w", a, breakpoint.ErrTextChanged)}
	}
	return d.Driver.Wait(ctx, s)
}

// TestChanged has the guest change its code at one probe of two, and then at the other,
// noticed by the driver or by Check: the first is out, and told, and the second goes on
// until it is its turn.
func TestChanged(t *testing.T) {
	for _, own := range []bool{false, true} {
		t.Run(fmt.Sprintf("driver=%t", own), func(t *testing.T) {
			one(t, func(t *testing.T, cfg xentest.Config) {
				m := xentest.New(cfg)
				drv, err := m.Attach(nil)
				require.NoError(t, err)
				d := &notices{Driver: drv}
				e := breakpoint.New(d, breakpoint.Config{Scratch: m.Scratch, MayFault: xentest.NoFaults})
				p, q := &breakpoint.Probe{Addr: m.Symbol("nop5")}, &breakpoint.Probe{Addr: outOfLine(t, m)}
				again := &breakpoint.Probe{Addr: p.Addr}
				require.NoError(t, e.Register(p, q, again))
				require.NoError(t, e.Check())
				assert.True(t, p.Armed())
				// change has the guest change its code, and somebody notice.
				change := func(addr uint64) error {
					m.Poke(addr, []byte{0xe9, 1, 2, 3, 4})
					if !own {
						return e.Check()
					}
					ctx, cancel := context.WithCancel(t.Context())
					d.addr, d.then = addr, cancel
					_, err := e.Serve(ctx, true)
					if errors.Is(err, context.Canceled) {
						return nil
					}
					return err
				}
				require.NoError(t, change(p.Addr))
				assert.False(t, p.Armed())
				assert.False(t, again.Armed())
				assert.True(t, q.Armed())
				require.Len(t, e.Sites(), 1)
				assert.True(t, e.Registered(p))
				require.ErrorIs(t, e.Unregister(p), breakpoint.ErrTextChanged)
				require.NoError(t, e.Unregister(p))
				assert.False(t, e.Registered(p))
				assert.Equal(t, []byte{0xe9, 1, 2, 3, 4}, m.Peek(p.Addr, 5), "what the guest has written stays")

				// Something else may be probed there now.
				require.NoError(t, e.Register(p))
				require.ErrorIs(t, e.Unregister(again), breakpoint.ErrTextChanged)
				assert.True(t, p.Armed())
				require.NoError(t, e.Unregister(p))

				require.ErrorIs(t, change(q.Addr), breakpoint.ErrTextChanged)
				assert.False(t, q.Armed())
				_, err = e.Serve(t.Context(), true)
				require.ErrorIs(t, err, breakpoint.ErrTextChanged, "nothing is left to serve")
				require.ErrorIs(t, e.Close(), breakpoint.ErrTextChanged)
				assert.True(t, e.Left())
				assert.Equal(t, []byte{0xe9, 1, 2, 3, 4}, m.Peek(q.Addr, 5))
			})
		})
	}
}

// TestCheckHarmless looks at a breakpoint at every moment of its hits: none of them shows
// it as changed by the guest, though it is out while a vCPU steps over it.
func TestCheckHarmless(t *testing.T) {
	for method, vcpus := range map[breakpoint.Method]int{breakpoint.Auto: 2, breakpoint.InPlace: 1} {
		with(t, vcpus, func(t *testing.T, cfg xentest.Config) {
			m, d, e := engine(t, cfg, breakpoint.Config{MayFault: xentest.NoFaults, Method: method})
			n := 0
			check := func(*breakpoint.Context) breakpoint.Verdict {
				n++
				assert.NoError(t, e.Check())
				return breakpoint.Continue
			}
			d.waited = func(*breakpoint.Stop) { check(nil) }
			p := &breakpoint.Probe{Addr: outOfLine(t, m), Pre: check, Post: check}
			require.NoError(t, e.Register(p))
			base := m.Executed(p.Addr)
			require.NoError(t, served(t, e, func() {
				m.Release()
				assert.Eventually(t, func() bool { return p.Hits() > 10 }, patience, time.Millisecond)
				quiesce(t, m)
			}))
			assert.Greater(t, n, 20)
			assert.True(t, p.Armed())
			assert.Equal(t, m.Executed(p.Addr)-base, p.Hits())
		})
	}
}

// TestChangedInStep has the guest change the rest of an instruction while a vCPU is stopped
// at it: what fails then is the step, and only that probe ends.
func TestChangedInStep(t *testing.T) {
	with(t, 1, func(t *testing.T, cfg xentest.Config) {
		m := xentest.New(cfg)
		m.Start()
		defer m.Stop()
		drv, err := m.Attach(nil)
		require.NoError(t, err)
		e := breakpoint.New(drv, breakpoint.Config{Scratch: m.Scratch, MayFault: xentest.NoFaults, Method: breakpoint.InPlace})
		p, q := &breakpoint.Probe{Addr: m.Symbol("nop5")}, &breakpoint.Probe{Addr: outOfLine(t, m)}
		changed := make(chan struct{})
		p.Pre = func(*breakpoint.Context) breakpoint.Verdict {
			select {
			case <-changed:
			default:
				b := m.Peek(p.Addr, 5)
				m.Poke(p.Addr+1, []byte{b[1], b[2], b[3], b[4] ^ 1})
				close(changed)
			}
			return breakpoint.Continue
		}
		require.NoError(t, e.Register(p, q))
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err = e.Serve(ctx, true)
		select {
		case <-changed:
		default:
			require.Fail(t, "nobody came to it", "%v; %s", err, m.State())
		}
		require.ErrorIs(t, err, context.DeadlineExceeded, "the other one goes on")
		assert.True(t, q.Armed())
		assert.False(t, p.Armed())
		require.ErrorIs(t, e.Unregister(p), breakpoint.ErrTextChanged)
	})
}

// TestLostWhileClosing: what Close notices itself it tells, too.
func TestLostWhileClosing(t *testing.T) {
	one(t, func(t *testing.T, cfg xentest.Config) {
		m := xentest.New(cfg)
		drv, err := m.Attach(nil)
		require.NoError(t, err)
		d := &notices{Driver: drv, then: func() {}}
		e := breakpoint.New(&hooked{Driver: d, remove: failing(3)}, breakpoint.Config{Scratch: m.Scratch, MayFault: xentest.NoFaults})
		p := &breakpoint.Probe{Addr: m.Symbol("nop5")}
		require.NoError(t, e.Register(p))
		m.Poke(p.Addr, []byte{0xe9, 1, 2, 3, 4})
		d.addr = p.Addr
		require.ErrorIs(t, e.Close(), breakpoint.ErrTextChanged)
		assert.True(t, e.Left())
	})
}
