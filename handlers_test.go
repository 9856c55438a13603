package vmprobes

import (
	"bytes"
	"context"
	"fmt"
	"iter"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/xentest"
)

// outOfLine is an instruction (imul) that is executed out of line.
func outOfLine(t *testing.T, m *xentest.Machine) Addr {
	t.Helper()
	for _, in := range m.Insns() {
		if bytes.HasPrefix(in.Bytes, []byte{0x48, 0x69, 0xc0}) {
			return Addr(in.VA)
		}
	}
	t.Fatal("no imul")
	return 0
}

// TestPostNeedsLoop: a Post handler runs only while a Loop does, even if its vCPU
// comes back from the instruction between two.
func TestPostNeedsLoop(t *testing.T) {
	onBoth(t, func(t *testing.T, m *xentest.Machine, s *Session) {
		var looping atomic.Bool
		var inside, outside int
		p := &Probe{Addr: outOfLine(t, m), Post: func(*Probe, *Regs, Flags) Action {
			if looping.Load() {
				inside++
			} else {
				outside++
			}
			return Continue
		}}
		require.NoError(t, s.Register(p))
		for range 50 {
			ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
			looping.Store(true)
			err := s.Loop(ctx)
			looping.Store(false)
			cancel()
			require.ErrorIs(t, err, context.DeadlineExceeded)
			time.Sleep(200 * time.Microsecond)
		}
		assert.Zero(t, outside)
		assert.Positive(t, inside)
	})
}

// TestSessionInHandlers calls the Session's methods in handlers.
func TestSessionInHandlers(t *testing.T) {
	onBoth(t, func(t *testing.T, m *xentest.Machine, s *Session) {
		other := &Probe{Symbol: entry}
		p := &Probe{Addr: outOfLine(t, m)}
		p.Post = func(*Probe, *Regs, Flags) Action {
			assert.Contains(t, s.Probes(), p)
			assert.NoError(t, s.Register(other))
			assert.NoError(t, s.Unregister(other))
			return Continue
		}
		require.NoError(t, s.Register(p))
		done := make(chan struct{})
		go func() {
			defer close(done)
			for range 50 {
				ctx, cancel := context.WithTimeout(context.Background(), time.Millisecond)
				_ = s.Loop(ctx)
				cancel()
			}
		}()
		select {
		case <-done:
		case <-time.After(60 * time.Second):
			t.Fatalf("a Loop hangs; guest: %s", m.State())
		}
	})
}

// TestUnregisterWaits: once Unregister has returned no handler of the probe runs.
func TestUnregisterWaits(t *testing.T) {
	rounds := 300
	if testing.Short() {
		rounds = 50
	}
	onBoth(t, func(t *testing.T, m *xentest.Machine, s *Session) {
		var gone atomic.Bool
		var ran, late atomic.Int64
		see := func() {
			ran.Add(1)
			for range 20 {
				if gone.Load() {
					late.Add(1)
				}
				time.Sleep(time.Microsecond)
			}
		}
		p := &Probe{Addr: outOfLine(t, m),
			Pre:  func(*Probe, *Regs) Action { see(); return Continue },
			Post: func(*Probe, *Regs, Flags) Action { see(); return Continue }}
		require.NoError(t, s.Register(&Probe{Symbol: entry})) // keeps the Loop busy
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- s.Loop(ctx) }()
		for range rounds {
			gone.Store(false)
			require.NoError(t, s.Register(p))
			time.Sleep(300 * time.Microsecond)
			require.NoError(t, s.Unregister(p))
			gone.Store(true)
			time.Sleep(100 * time.Microsecond)
		}
		cancel()
		require.ErrorIs(t, <-done, context.Canceled)
		assert.Positive(t, ran.Load())
		assert.Zero(t, late.Load())
	})
}

// TestUnregisterNext has a handler unregister the probe whose handler is next.
func TestUnregisterNext(t *testing.T) {
	onBoth(t, func(t *testing.T, m *xentest.Machine, s *Session) {
		var b *Probe
		gone, ran := false, 0
		a := &Probe{Symbol: entry, Pre: func(*Probe, *Regs) Action {
			if !gone {
				require.NoError(t, s.Unregister(b))
				gone = true
			}
			return Continue
		}}
		b = &Probe{Symbol: entry, Pre: func(*Probe, *Regs) Action {
			if gone {
				ran++
			}
			return Continue
		}}
		require.NoError(t, s.Register(a, b))
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		require.ErrorIs(t, s.Loop(ctx), context.DeadlineExceeded)
		assert.True(t, gone)
		assert.Zero(t, ran)
	})
}

// TestUnregisterBetweenHits unregisters a probe while one of its hits is in hand,
// outside of the goroutine that serves.
func TestUnregisterBetweenHits(t *testing.T) {
	onBoth(t, func(t *testing.T, m *xentest.Machine, s *Session) {
		p := &Probe{Symbol: entry}
		require.NoError(t, s.Register(p))
		next, stop := iter.Pull2(s.Hits(t.Context()))
		defer stop()
		hit, err, ok := next()
		require.True(t, ok)
		require.NoError(t, err)
		require.Equal(t, p, hit.Probe)
		require.NoError(t, s.Unregister(p))
	})
}

// TestCountsOfTwo: what one probe's handler ends, the other one has missed.
func TestCountsOfTwo(t *testing.T) {
	onBoth(t, func(t *testing.T, m *xentest.Machine, s *Session) {
		require.NoError(t, quiesced(t, m))
		n := 0
		a := &Probe{Symbol: entry, Pre: func(*Probe, *Regs) Action {
			if n++; n%5 == 0 {
				return Stop
			}
			return Continue
		}}
		b := &Probe{Symbol: entry}
		require.NoError(t, s.Register(a, b))
		va := uint64(a.Address())
		base := m.Executed(va)
		m.Release()
		for range 20 {
			require.NoError(t, s.Loop(t.Context()))
		}
		require.NoError(t, quiesced(t, m))
		executed := m.Executed(va) - base
		for _, p := range []*Probe{a, b} {
			st := p.Stats()
			assert.Equal(t, executed, st.Hits+st.Missed, "%+v", st)
		}
		assert.GreaterOrEqual(t, b.Stats().Missed, uint64(20))
	})
}

// TestEachAtItsProbe has the first of two handlers send the vCPU elsewhere: the
// second one sees it at the probe all the same.
func TestEachAtItsProbe(t *testing.T) {
	onBoth(t, func(t *testing.T, m *xentest.Machine, s *Session) {
		va := m.Symbol("nop5")
		a := &Probe{Addr: Addr(va), Pre: func(_ *Probe, r *Regs) Action { r.IP += 5; return Continue }}
		n := 0
		b := &Probe{Addr: Addr(va), Pre: func(p *Probe, r *Regs) Action {
			assert.Equal(t, p.Address(), r.PC())
			if n++; n == 10 {
				return Stop
			}
			return Continue
		}}
		require.NoError(t, s.Register(a, b))
		require.NoError(t, s.Loop(t.Context()))
		assert.Equal(t, 10, n)
	})
}

// TestBadRegisters has a handler leave registers that no vCPU can have.
func TestBadRegisters(t *testing.T) {
	onBoth(t, func(t *testing.T, m *xentest.Machine, s *Session) {
		p := &Probe{Symbol: entry, Pre: func(_ *Probe, r *Regs) Action {
			r.IP = 1 << 62
			return Continue
		}}
		require.NoError(t, s.Register(p))
		require.ErrorIs(t, s.Loop(t.Context()), ErrBadRegisters)
		_, err := p.Call(&Regs{})
		require.ErrorIs(t, err, ErrNoPrototype, "no kernel is known")
	})
}

// TestSuspended suspends the guest and resumes it, as "xl save -c" does: its
// breakpoints, and those of its own, are answered on.
func TestSuspended(t *testing.T) {
	for _, probes := range []int{0, 1} {
		t.Run(fmt.Sprintf("%d probes", probes), func(t *testing.T) {
			onBoth(t, func(t *testing.T, m *xentest.Machine, s *Session) {
				for range probes {
					require.NoError(t, s.Register(&Probe{Symbol: entry}))
				}
				runs := func() bool { a := m.Counter(0); time.Sleep(time.Millisecond); return m.Counter(0) > a+2 }
				time.Sleep(loopGrace + 100*time.Millisecond)
				soon(t, "running", runs)
				m.Shutdown(2)
				time.Sleep(3 * aliveCheck)
				m.ResumeDomain()
				soon(t, "running after it was resumed", runs)
			})
		})
	}
}

// aliveCheck is how often the drivers look whether the domain still exists.
const aliveCheck = 100 * time.Millisecond

// TestProbeElsewhere registers a probe with another guest in a handler of its own:
// what it reads from then on is the other guest's, by that one's page tables.
func TestProbeElsewhere(t *testing.T) {
	m1, s1 := simulated(t, xentest.Config{Kind: xentest.HVM, VCPUs: 2, Seed: 1}, nil)
	m2, s2 := simulated(t, xentest.Config{Kind: xentest.PV, GDBSX: true, VCPUs: 2, Seed: 2}, nil)
	at := Addr(xentest.DataBase + 0x800)
	m1.Poke(uint64(at), []byte{1})
	m2.Poke(uint64(at), []byte{2})
	read := func(p *Probe) byte {
		b := make([]byte, 1)
		_, err := p.ReadMemory(at, b)
		assert.NoError(t, err)
		return b[0]
	}
	var seen []byte
	p := &Probe{Symbol: entry}
	p.Pre = func(*Probe, *Regs) Action {
		seen = append(seen, read(p))
		if len(seen) == 1 {
			assert.NoError(t, s1.Unregister(p))
			assert.NoError(t, s2.Register(p))
			seen = append(seen, read(p))
		}
		return Stop
	}
	require.NoError(t, s1.Register(p))
	require.NoError(t, s1.Loop(t.Context()))
	require.NoError(t, s2.Loop(t.Context()))
	assert.Equal(t, []byte{1, 2, 2}, seen)
	assert.EqualValues(t, 2, p.Stats().Hits)
}
