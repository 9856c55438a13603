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

// whys are the reasons for which calls of a probe were abandoned.
func whys(p *followed) *[]error {
	all := new([]error)
	p.Ret.Abandoned = func(_ *breakpoint.Activation, why error) breakpoint.Verdict {
		*all = append(*all, why)
		return breakpoint.Continue
	}
	return all
}

// TestReturnSiteGivenUp has a breakpoint at a return address given up, at the second try, as
// there is no way past it, while other calls are to return there: these are abandoned for
// that reason, and the calls that come then are missed, or followed to the exits.
func TestReturnSiteGivenUp(t *testing.T) {
	for _, how := range []breakpoint.Follow{breakpoint.AtReturn, breakpoint.FollowAuto} {
		t.Run(fmt.Sprint(how), func(t *testing.T) {
			cfg := xentest.Config{Kind: xentest.PV, GDBSX: true, AVX: true, VCPUs: 2, Seed: 1, Returns: true}
			c := breakpoint.Config{MayFault: xentest.NoFaults, Method: breakpoint.InPlace}
			m, d, e := engine(t, cfg, c)
			p := follow(m, cfg, "blocking", how)
			all := whys(p)
			fail, ret := false, p.Ret.Return
			p.Ret.Return = func(c *breakpoint.Context) breakpoint.Verdict {
				if p.returns == 20 {
					fail, d.remove = true, failing(3)
				}
				return ret(c)
			}
			d.step = func() error {
				if fail {
					fail = false
					return breakpoint.ErrNoWayPast
				}
				return nil
			}
			require.NoError(t, e.Register(p.Probe))
			p.begin()
			m.Release()
			told := serveUntil(t, e, func() bool { return p.entries+p.Missed() > 100 })
			require.NotEmpty(t, told)
			require.NoError(t, served(t, e, func() { quiesce(t, m) }))
			counts := e.Counts(p.Probe)
			require.NotEmpty(t, *all)
			for _, why := range *all {
				require.ErrorIs(t, why, breakpoint.ErrNoWayPast, "%+v", counts)
				require.NotContains(t, why.Error(), "%!")
			}
			if how == breakpoint.AtReturn {
				assert.NotZero(t, p.Missed())
				assert.Zero(t, counts.Active)
			} else {
				assert.Zero(t, p.Missed())
				assert.Equal(t, breakpoint.AtExits, counts.Follow)
				assert.LessOrEqual(t, uint64(counts.Active), m.Inside("blocking"))
			}
		})
	}
}

// TestEntryGivenUp has the breakpoint of a return probe given up: nothing of it is left, and it
// can be registered again.
func TestEntryGivenUp(t *testing.T) {
	for _, how := range []breakpoint.Follow{breakpoint.AtReturn, breakpoint.AtExits} {
		t.Run(fmt.Sprint(how), func(t *testing.T) {
			cfg := xentest.Config{Kind: xentest.PV, GDBSX: true, AVX: true, VCPUs: 2, Seed: 1, Returns: true}
			c := breakpoint.Config{MayFault: xentest.NoFaults, Method: breakpoint.InPlace}
			m, d, e := engine(t, cfg, c)
			p := follow(m, cfg, "blocking", how)
			fail, pre := false, p.Pre
			p.Pre = func(c *breakpoint.Context) breakpoint.Verdict {
				fail = p.entries == 20
				return pre(c)
			}
			d.step = func() error {
				if fail {
					fail = false
					return breakpoint.ErrNoWayPast
				}
				return nil
			}
			require.NoError(t, e.Register(p.Probe))
			m.Release()
			serveUntil(t, e, func() bool { return !e.Registered(p.Probe) })
			require.False(t, e.Registered(p.Probe))
			assert.Empty(t, e.Sites())
			counts := e.Counts(p.Probe)
			assert.Zero(t, counts.Active)
			assert.NotZero(t, counts.Dropped)
			require.NoError(t, e.Register(p.Probe))
			serveUntil(t, e, func() bool { return p.entries > 40 })
			require.NoError(t, served(t, e, func() { quiesce(t, m) }))
			counts = e.Counts(p.Probe)
			assert.LessOrEqual(t, uint64(counts.Active), m.Inside("blocking"))
			assert.Equal(t, p.Hits(), counts.Returned+counts.Abandoned+counts.Dropped+uint64(counts.Active), "%+v", counts)
		})
	}
}

// TestExitLost has the guest overwrite the breakpoint at the only exit: the calls that were to
// end there are abandoned for that, at once. Found later, by what is in their place, they would
// be taken for calls that never returned.
func TestExitLost(t *testing.T) {
	one(t, func(t *testing.T, cfg xentest.Config) {
		cfg.Returns = true
		m, _, e := returnsEngine(t, cfg)
		p := follow(m, cfg, "blocking", breakpoint.AtExits)
		all := whys(p)
		require.NoError(t, e.Register(p.Probe))
		m.Release()
		require.NoError(t, served(t, e, func() { loops(t, m, 3) }))
		was := e.Counts(p.Probe)
		require.NotZero(t, was.Active)
		m.Poke(p.f.Exits[0], []byte{0xc3})
		require.NoError(t, e.Check())
		counts := e.Counts(p.Probe)
		assert.Zero(t, counts.Active)
		assert.Equal(t, uint64(was.Active), counts.Abandoned)
		m.Release()
		require.NoError(t, served(t, e, func() { loops(t, m, 20) }))
		require.Len(t, *all, was.Active)
		for _, why := range *all {
			require.ErrorIs(t, why, breakpoint.ErrTextChanged)
		}
		assert.Equal(t, was.Returned, e.Counts(p.Probe).Returned)
		assert.NotZero(t, p.Missed(), "from then on: who asks for AtExits isn't followed AtReturn")
	})
}

// TestUnregisteredMeanwhile unregisters a return probe, as if from elsewhere, while the engine
// asks where a call of it will end: no breakpoint is made then and stays.
func TestUnregisteredMeanwhile(t *testing.T) {
	one(t, func(t *testing.T, cfg xentest.Config) {
		cfg.Returns = true
		var e *breakpoint.Engine
		var p *followed
		c := breakpoint.Config{MayFault: xentest.NoFaults}
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		c.Hooks.ReturnAt = func(ret uint64) ([]uint64, error) { cancel(); return []uint64{ret}, e.Unregister(p.Probe) }
		m, _, eng := engine(t, cfg, c)
		e, p = eng, follow(m, cfg, "rec", breakpoint.AtReturn)
		require.NoError(t, e.Register(p.Probe))
		m.Release()
		_, err := e.Serve(ctx, true)
		require.ErrorIs(t, err, context.Canceled)
		assert.Empty(t, e.Sites())
		assert.Zero(t, p.entries)
	})
}

// TestFollowThawFails has the guest stay frozen for a moment after a breakpoint was made in the
// middle of a hit, which is nothing that the call could not be followed for.
func TestFollowThawFails(t *testing.T) {
	for _, how := range []breakpoint.Follow{breakpoint.AtReturn, breakpoint.FollowAuto} {
		one(t, func(t *testing.T, cfg xentest.Config) {
			cfg.Returns = true
			c := breakpoint.Config{MayFault: xentest.NoFaults}
			if how == breakpoint.FollowAuto {
				c.Hooks.ReturnAt = func(uint64) ([]uint64, error) { return nil, errInjected } // so at the exits
			}
			m, d, e := engine(t, cfg, c)
			p := follow(m, cfg, "rec", how)
			require.NoError(t, e.Register(p.Probe))
			d.thaw = failing(3)
			m.Release()
			serveUntil(t, e, func() bool { return p.returns > 20 })
			require.NoError(t, served(t, e, func() { quiesce(t, m) }))
			assert.Zero(t, p.Missed())
			assert.Equal(t, p.Hits(), e.Counts(p.Probe).Returned)
		})
	}
}

// TestEntryUnreadable has the stack be out of reach for a moment when a call begins: it is
// missed, and what was at its place before is over all the same.
func TestEntryUnreadable(t *testing.T) {
	one(t, func(t *testing.T, cfg xentest.Config) {
		cfg.Returns = true
		cfg.VCPUs = 1
		m, d, e := returnsEngine(t, cfg)
		p := follow(m, cfg, "victim", breakpoint.AtReturn)
		require.NoError(t, e.Register(p.Probe))
		p.begin()
		m.Release()
		require.NoError(t, served(t, e, func() { loops(t, m, 2) }))
		require.Equal(t, 1, e.Counts(p.Probe).Active)
		was := e.Counts(p.Probe).Abandoned
		n := 0
		d.read = func(addr uint64) error {
			if addr >= xentest.StackBase && addr < xentest.TextBase {
				n++
				return errInjected
			}
			return nil
		}
		m.Release()
		require.NoError(t, served(t, e, func() { loops(t, m, 1) }))
		d.read = nil
		require.NotZero(t, n)
		counts := e.Counts(p.Probe)
		assert.Zero(t, counts.Active, "%+v", counts)
		assert.Equal(t, was+1, counts.Abandoned)
		assert.NotZero(t, p.Missed())
		assert.Empty(t, p.problems)
	})
}

// TestShortServes serves for moments only: what is to be done once a second is done.
func TestShortServes(t *testing.T) {
	t.Parallel()
	m, _, e := returnsEngine(t, xentest.Config{Kind: xentest.PV, GDBSX: true, AVX: true, VCPUs: 1, Seed: 1, Returns: true})
	p := follow(m, xentest.Config{VCPUs: 1}, "rec", breakpoint.AtReturn)
	require.NoError(t, e.Register(p.Probe))
	m.Release()
	require.NoError(t, served(t, e, func() { loops(t, m, 3) }))
	require.Greater(t, len(e.Sites()), 1)
	for begin := time.Now(); len(e.Sites()) > 1 && time.Since(begin) < 10*time.Second; {
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		_, err := e.Serve(ctx, true)
		cancel()
		if !errors.Is(err, context.DeadlineExceeded) {
			require.NoError(t, err)
		}
	}
	assert.Len(t, e.Sites(), 1)
}
