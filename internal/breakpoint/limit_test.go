package breakpoint_test

import (
	"context"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/x86"
	"github.com/vmprobes/vmprobes/internal/xentest"
)

// counting returns a probe whose handlers count.
func counting(addr uint64) (p *breakpoint.Probe, pre, post *uint64) {
	pre, post = new(uint64), new(uint64)
	return &breakpoint.Probe{
		Addr: addr,
		Pre:  func(*breakpoint.Context) breakpoint.Verdict { *pre++; return breakpoint.Continue },
		Post: func(*breakpoint.Context) breakpoint.Verdict { *post++; return breakpoint.Continue },
	}, pre, post
}

// TestFilter has three probes at one address, each of which wants other vCPUs or tasks, and
// compares with the guest's own counts.
func TestFilter(t *testing.T) {
	with(t, 2, func(t *testing.T, cfg xentest.Config) {
		cfg.Returns = true
		m, _, e := returnsEngine(t, cfg)
		f := m.Function("tail_b")
		p, pre, post := counting(f.Entry)
		p.Want = func(r *x86.Regs, vcpu int, task *breakpoint.Task) bool {
			assert.Equal(t, f.Entry, r.IP)
			assert.Zero(t, *task, "of one that hasn't asked for it")
			return vcpu == 1
		}
		q, qPre, qPost := counting(f.Entry)
		all, allPre, allPost := counting(f.Entry)
		boot, err := m.CurrentTask(0)
		require.NoError(t, err)
		q.WantTask = true
		q.Want = func(_ *x86.Regs, _ int, task *breakpoint.Task) bool { return task.Addr == boot.Addr }
		require.NoError(t, e.Register(p, q, all))
		before := []uint64{m.Executed(f.Entry), m.ExecutedBy(0, f.Entry), m.ExecutedBy(1, f.Entry)}
		m.Release()
		require.NoError(t, served(t, e, func() { loops(t, m, 5) }))
		n, first, second := m.Executed(f.Entry)-before[0], m.ExecutedBy(0, f.Entry)-before[1], m.ExecutedBy(1, f.Entry)-before[2]
		require.Positive(t, first)
		require.Positive(t, second)
		for _, x := range []struct {
			p         *breakpoint.Probe
			hits      uint64
			pre, post uint64
		}{{p, second, *pre, *post}, {q, first, *qPre, *qPost}, {all, n, *allPre, *allPost}} {
			assert.Equal(t, x.hits, x.p.Hits())
			assert.Equal(t, n-x.hits, x.p.Filtered())
			assert.Zero(t, x.p.Missed())
			assert.Equal(t, x.hits, x.pre)
			assert.Equal(t, x.hits, x.post)
		}
	})
}

// TestLimit: a probe sees as many hits as it is to, whatever the number of vCPUs, with Post, and is
// out; with the last probe Serve ends.
func TestLimit(t *testing.T) {
	each(t, func(t *testing.T, cfg xentest.Config) {
		m, _, e := engine(t, cfg, breakpoint.Config{MayFault: xentest.NoFaults})
		addr := outOfLine(t, m)
		p, pre, post := counting(addr)
		p.Limit = 3
		q, qPre, _ := counting(m.Symbol("event_entry"))
		q.Limit = 1
		require.NoError(t, e.Register(p, q))
		m.Release()
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		_, err := e.Serve(ctx, true)
		require.ErrorIs(t, err, breakpoint.ErrSpent)
		assert.EqualValues(t, 3, p.Hits())
		assert.EqualValues(t, 3, *pre)
		assert.EqualValues(t, 3, *post)
		assert.EqualValues(t, 1, *qPre)
		assert.Equal(t, breakpoint.OverLimit, p.Over())
		assert.False(t, p.Armed())
		assert.Empty(t, e.Sites())
		require.NoError(t, e.Unregister(p, q))

		// Registered again it has its hits again.
		require.NoError(t, e.Register(p))
		_, err = e.Serve(ctx, true)
		require.ErrorIs(t, err, breakpoint.ErrSpent)
		assert.EqualValues(t, 6, p.Hits())
		assert.EqualValues(t, 6, *pre)
	})
}

// TestPerSecond: a probe that is hit too often is out, and its neighbour goes on.
func TestPerSecond(t *testing.T) {
	one(t, func(t *testing.T, cfg xentest.Config) {
		m, _, e := engine(t, cfg, breakpoint.Config{MayFault: xentest.NoFaults})
		addr := outOfLine(t, m)
		p, pre, _ := counting(addr)
		p.PerSecond = 5
		require.NoError(t, e.Register(p))
		m.Release()
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		_, err := e.Serve(ctx, true)
		require.ErrorIs(t, err, breakpoint.ErrTooOften)
		assert.Equal(t, breakpoint.OverPerSecond, p.Over())
		assert.Equal(t, *pre, p.Hits())
		assert.GreaterOrEqual(t, *pre, uint64(6))
		assert.Empty(t, e.Sites())
	})
}

// TestLimitOfReturns: the calls that a return probe has been limited to are followed to their end,
// which is a return or, as its handler is told before the probe is out, none.
func TestLimitOfReturns(t *testing.T) {
	one(t, func(t *testing.T, cfg xentest.Config) {
		cfg.Returns = true
		m, _, e := returnsEngine(t, cfg)
		m.Release()
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		for _, c := range []struct {
			name          string
			returns, lost uint64
		}{{"blocking", 2, 0}, {"lj_mid", 0, 1}} {
			p := follow(m, cfg, c.name, breakpoint.AtReturn)
			p.Limit = c.returns + c.lost
			require.NoError(t, e.Register(p.Probe))
			_, err := e.Serve(ctx, true)
			require.ErrorIs(t, err, breakpoint.ErrSpent)
			assert.Empty(t, p.problems)
			assert.Equal(t, p.Limit, p.entries, c.name)
			assert.Equal(t, c.returns, p.returns, c.name)
			assert.Equal(t, c.lost, p.lost, c.name)
			assert.Equal(t, c.returns, e.Counts(p.Probe).Returned, c.name)
			assert.Equal(t, c.lost, e.Counts(p.Probe).Abandoned, c.name)
			assert.Empty(t, e.Sites(), c.name)
		}
	})
}

// TestRegisterEach arms what can be armed.
func TestRegisterEach(t *testing.T) {
	one(t, func(t *testing.T, cfg xentest.Config) {
		m, _, e := engine(t, cfg, breakpoint.Config{MayFault: xentest.NoFaults})
		addr := outOfLine(t, m)
		good, _, _ := counting(addr)
		inside, _, _ := counting(addr + 1)
		other, _, _ := counting(m.Symbol("event_entry"))
		errs := e.RegisterEach(good, inside, other, good)
		require.NoError(t, errs[0])
		require.Error(t, errs[1])
		require.NoError(t, errs[2])
		require.ErrorContains(t, errs[3], "is registered already")
		assert.True(t, good.Armed() && other.Armed() && !inside.Armed())
		assert.Len(t, e.Sites(), 2)
	})
}

// TestSkip has functions return early, at their first instruction: they aren't executed, their
// callers see the value, and return probes are told.
func TestSkip(t *testing.T) {
	each(t, func(t *testing.T, cfg xentest.Config) {
		for _, how := range []breakpoint.Follow{breakpoint.AtReturn, breakpoint.AtExits} {
			cfg.Returns = true
			m := xentest.New(cfg)
			text := m.Text()
			m.Start()
			quiesce(t, m)
			drv, err := m.Attach(nil)
			require.NoError(t, err)
			e := breakpoint.New(drv, breakpoint.Config{Scratch: m.Scratch, MayFault: xentest.NoFaults, Hooks: hooksOf(m)})
			f := m.Function("wrap")
			r := follow(m, cfg, "wrap", how)
			r.f.Values = nil
			skips, skipped := uint64(0), uint64(0)
			ret := r.Ret.Return
			r.Ret.Return = func(c *breakpoint.Context) breakpoint.Verdict {
				if c.Call.Skipped {
					skipped++
					assert.EqualValues(t, 0x5c1b, c.Regs.AX)
					assert.Contains(t, f.Backs, c.Regs.IP)
				}
				return ret(c)
			}
			before, _, _ := counting(f.Entry)
			skip := &breakpoint.Probe{Addr: f.Entry}
			skip.Pre = func(c *breakpoint.Context) breakpoint.Verdict {
				if c.VCPU != 0 {
					return breakpoint.Continue
				}
				skips++
				ret, err := word(m, c.Regs.SP)
				require.NoError(t, err)
				c.Regs.AX, c.Regs.IP, c.Regs.SP = 0x5c1b, ret, c.Regs.SP+8
				c.SkipCall()
				return breakpoint.Continue
			}
			after, _, _ := counting(f.Entry)
			require.NoError(t, e.Register(before, skip, after, r.Probe))
			start := m.Executed(f.Entry)
			m.Release()
			require.NoError(t, served(t, e, func() { loops(t, m, 5) }))
			n := m.Executed(f.Entry) - start
			assert.Empty(t, r.problems)
			require.Positive(t, skips)
			assert.Equal(t, skips, skipped, "%v", how)
			assert.EqualValues(t, 0x5c1b, m.Result(0))
			if cfg.VCPUs > 1 {
				assert.NotEqualValues(t, 0x5c1b, m.Result(1))
			}
			assert.Equal(t, n, before.Hits()-skips, "executed, beside what was skipped")
			assert.Equal(t, skips, after.Skipped())
			assert.Equal(t, n, after.Hits())
			assert.Zero(t, after.Missed())
			assert.Equal(t, n+skips, r.Hits())
			assert.Equal(t, n+skips, e.Counts(r.Probe).Returned)
			require.NoError(t, e.Unregister(before, skip, after, r.Probe))
			require.NoError(t, e.Close())
			assert.Equal(t, text, m.Text())
			m.Release()
			m.Stop() // what counts what wrap calls has found that it wasn't executed
		}
	})
}

func word(m *xentest.Machine, addr uint64) (v uint64, err error) {
	for _, c := range slices.Backward(m.Peek(addr, 8)) {
		v = v<<8 | uint64(c)
	}
	return v, nil
}

// TestStillUnderWay: calls that stay inside their function for long are not given up by sweeps,
// and those whose task is gone are.
func TestStillUnderWay(t *testing.T) {
	one(t, func(t *testing.T, cfg xentest.Config) {
		cfg.Returns = true
		m, _, e := returnsEngine(t, cfg)
		p := follow(m, cfg, "blocking", breakpoint.AtReturn)
		require.NoError(t, e.Register(p.Probe))
		p.begin()
		m.Release()
		require.NoError(t, served(t, e, func() { loops(t, m, 12); time.Sleep(3500 * time.Millisecond) }))
		p.check(t, e)
		c := e.Counts(p.Probe)
		assert.Zero(t, c.Abandoned)
		assert.EqualValues(t, m.Inside("blocking"), c.Active)
	})
}

// TestDisable: the calls that are under way when a return probe is disabled are dropped, also if it
// is enabled again before they end.
func TestDisable(t *testing.T) {
	one(t, func(t *testing.T, cfg xentest.Config) {
		cfg.Returns = true
		m, _, e := returnsEngine(t, cfg)
		p := follow(m, cfg, "blocking", breakpoint.AtReturn)
		require.NoError(t, e.Register(p.Probe))
		m.Release()
		require.NoError(t, served(t, e, func() { loops(t, m, 12) }))
		under := uint64(e.Counts(p.Probe).Active)
		require.Positive(t, under)
		p.SetEnabled(false)
		p.SetEnabled(false)
		p.SetEnabled(true)
		m.Release()
		require.NoError(t, served(t, e, func() { loops(t, m, 12) }))
		c := e.Counts(p.Probe)
		assert.Equal(t, under, c.Dropped)
		assert.Equal(t, p.entries, p.returns+under+uint64(c.Active), "%+v", c)
		assert.Equal(t, p.Hits(), c.Returned+c.Dropped+uint64(c.Active))
		p.SetEnabled(false)
		require.NoError(t, served(t, e, func() { time.Sleep(3500 * time.Millisecond) }))
		assert.Zero(t, e.Counts(p.Probe).Active, "after a sweep")
		assert.Len(t, e.Sites(), 1, "after the return addresses have cooled")
	})
}
