package breakpoint_test

import (
	"errors"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/x86"
)

func plainAt(addr uint64) (*breakpoint.Probe, *int) {
	n := new(int)
	return &breakpoint.Probe{Addr: addr, Pre: func(*breakpoint.Context) breakpoint.Verdict { *n++; return breakpoint.Continue }}, n
}

// TestSpentFails: a failure to take a probe out that has reached its limit is tried again. Serve
// goes on: another probe is armed.
func TestSpentFails(t *testing.T) {
	for _, what := range []string{"freeze", "remove", "thaw"} {
		t.Run(what, func(t *testing.T) {
			g := newScripted(t, breakpoint.Hooks{})
			p, _ := plainAt(fnF)
			p.Limit = 1
			q, _ := plainAt(fnG)
			require.NoError(t, g.e.Register(p, q))
			f := failing(3)
			switch what {
			case "freeze":
				g.freeze = f
			case "remove":
				g.remove = func(uint64) error { return f() }
			case "thaw":
				g.thaw = f
			}
			require.True(t, g.stop(fnF, top))
			assert.NoError(t, g.serving(true))
		})
	}
}

// TestSpentLost: the guest has other code at the entry of a return probe that reached its limit, when
// its last call returns. Serve goes on: another probe is armed.
func TestSpentLost(t *testing.T) {
	g := newScripted(t, breakpoint.Hooks{})
	p := newTold(fnF, &breakpoint.Returns{TailsTo: none})
	p.Limit = 1
	q, n := plainAt(fnG)
	require.NoError(t, g.e.Register(p.Probe, q))
	g.call(fnF, top, retR)
	g.poke(fnF, 0x66)
	require.NoError(t, g.e.Check())
	require.True(t, g.stop(retR, top+8))
	assert.NoError(t, g.serving(true))
	require.True(t, g.stop(fnG, top))
	g.serve()
	assert.Equal(t, 1, *n)
}

// TestUnregisteredAtExit: a probe is unregistered while the engine asks, at an exit, whether a
// tracer of the guest's is there.
func TestUnregisteredAtExit(t *testing.T) {
	var g *scripted
	var p *told
	unreg := false
	g = newScripted(t, breakpoint.Hooks{Trampoline: func(uint64) bool {
		if unreg {
			unreg = false
			require.NoError(t, g.e.Unregister(p.Probe))
		}
		return false
	}})
	p = newTold(fnF, &breakpoint.Returns{Follow: breakpoint.AtExits, Exits: ends(fnF), TailsTo: none})
	var depth []int
	pre := p.Pre
	p.Pre = func(c *breakpoint.Context) breakpoint.Verdict { depth = append(depth, c.Call.Depth); return pre(c) }
	require.NoError(t, g.e.Register(p.Probe))
	g.call(fnF, top, retR)
	g.poke64(top, retR+0x20)
	unreg = true
	require.True(t, g.stop(ends(fnF)[0], top))
	g.serve()
	assert.Equal(t, 0, g.e.Counts(p.Probe).Active, "active")
	require.NoError(t, g.e.Register(p.Probe))
	g.call(fnF, top, retR)
	assert.Equal(t, []int{0, 0}, depth)
}

// TestExitsOfGivenUpEntry: the guest can't be paused for a moment when the entry of a return probe is
// given up. The breakpoints at its exits go later.
func TestExitsOfGivenUpEntry(t *testing.T) {
	g := newScripted(t, breakpoint.Hooks{})
	g.poke(fnF, 0x48, 0x8b, 0x18) // mov (%rax),%rbx
	p := newTold(fnF, &breakpoint.Returns{Follow: breakpoint.AtExits, Exits: ends(fnF), TailsTo: none})
	q, _ := plainAt(fnG)
	require.NoError(t, g.e.Register(p.Probe, q))
	g.poke64(top, retR)
	require.True(t, g.stop(fnF, top)) // RAX is 0
	g.freeze = failing(3)
	require.ErrorIs(t, g.serving(true), breakpoint.ErrNoWayPast)
	for range 4 {
		g.e.Age()
		g.e.Sweep(true)
	}
	g.idleFor(2500 * time.Millisecond)
	assert.Equal(t, []uint64{fnG}, g.sites())
}

// TestGivenUpReturnAddress: a breakpoint at a return address is given up when the only call has just
// returned there. It isn't made again by the next call.
func TestGivenUpReturnAddress(t *testing.T) {
	for _, how := range []breakpoint.Follow{breakpoint.AtReturn, breakpoint.FollowAuto} {
		g := newScripted(t, breakpoint.Hooks{})
		g.poke(retR, 0x48, 0x8b, 0x18)
		p := newTold(fnF, &breakpoint.Returns{Follow: how, Exits: ends(fnF), TailsTo: none})
		require.NoError(t, g.e.Register(p.Probe))
		g.call(fnF, top, retR)
		require.True(t, g.stop(retR, top+8)) // RAX is 0
		require.ErrorIs(t, g.serving(true), breakpoint.ErrNoWayPast)
		g.call(fnF, top, retR)
		assert.False(t, g.stop(retR, top+8), "%v", how)
	}
}

// TestSpentOnce: that a probe has reached its limit ends one Serve, and not a later one, in which
// others were.
func TestSpentOnce(t *testing.T) {
	g := newScripted(t, breakpoint.Hooks{})
	p, _ := plainAt(fnF)
	p.Limit = 1
	require.NoError(t, g.e.Register(p))
	require.True(t, g.stop(fnF, top))
	require.ErrorIs(t, g.serving(true), breakpoint.ErrSpent)
	q, _ := plainAt(fnG)
	require.NoError(t, g.e.Register(q))
	g.serve()
	require.NoError(t, g.e.Unregister(q))
	assert.NoError(t, g.serving(true), "nothing was spent since")
}

// TestSkipTakenBack: a handler has a function return, with registers that no vCPU can have. These are
// taken back, so the function is executed, and its return probe isn't told of a return.
func TestSkipTakenBack(t *testing.T) {
	g := newScripted(t, breakpoint.Hooks{})
	p := newTold(fnF, &breakpoint.Returns{TailsTo: none})
	q, _ := plainAt(fnF)
	q.Pre = func(c *breakpoint.Context) breakpoint.Verdict {
		c.Regs.IP, c.Regs.SP = retR, c.Regs.SP+8
		c.Regs.CR3 ^= 0x1000
		c.SkipCall()
		return breakpoint.Continue
	}
	require.NoError(t, g.e.Register(p.Probe, q))
	g.poke64(top, retR)
	require.True(t, g.stop(fnF, top))
	err := g.serving(true)
	require.ErrorIs(t, err, breakpoint.ErrBadRegs)
	assert.NotEqual(t, uint64(retR), g.last.Regs.IP)
	assert.EqualValues(t, 1, g.e.Counts(p.Probe).Active, "the function is executed")
	assert.Zero(t, g.e.Counts(p.Probe).Returned)
}

// TestMovedOfEarlierHit: that a handler has sent a vCPU elsewhere says nothing of other hits.
func TestMovedOfEarlierHit(t *testing.T) {
	g := newScripted(t, breakpoint.Hooks{})
	a, _ := plainAt(fnG)
	a.Pre = func(c *breakpoint.Context) breakpoint.Verdict { c.Regs.IP = fnG + 0x20; return breakpoint.Continue }
	b, _ := plainAt(fnG)
	p := newTold(fnF, &breakpoint.Returns{Follow: breakpoint.AtExits, Exits: ends(fnF), TailsTo: none})
	moved := false
	p.Ret.Return = func(c *breakpoint.Context) breakpoint.Verdict { moved = c.Moved(); return breakpoint.Continue }
	require.NoError(t, g.e.Register(a, b, p.Probe))
	g.call(fnF, top, retR)
	require.True(t, g.stop(fnG, top-64))
	g.serve()
	require.True(t, g.stop(ends(fnF)[0], top))
	g.serve()
	assert.False(t, moved)
}

// TestWantPanics: each owner counts the execution once when Want panics.
func TestWantPanics(t *testing.T) {
	g := newScripted(t, breakpoint.Hooks{})
	a, _ := plainAt(fnF)
	a.Want = func(*x86.Regs, int, *breakpoint.Task) bool { return false }
	b, _ := plainAt(fnF)
	c, _ := plainAt(fnF)
	c.Want = func(*x86.Regs, int, *breakpoint.Task) bool { panic(errors.New("x")) }
	require.NoError(t, g.e.Register(a, b, c))
	require.True(t, g.stop(fnF, top))
	require.Panics(t, func() { _ = g.serving(true) })
	assert.EqualValues(t, 1, b.Missed())
	assert.EqualValues(t, 1, c.Missed())
}
