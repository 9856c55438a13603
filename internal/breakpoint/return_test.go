package breakpoint_test

import (
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/x86"
	"github.com/vmprobes/vmprobes/internal/xentest"
)

// hooksOf are what a kernel would know of a guest's tasks.
func hooksOf(m *xentest.Machine) breakpoint.Hooks {
	return breakpoint.Hooks{
		Task: func(r *x86.Regs) (breakpoint.Task, error) {
			t, err := m.TaskAt(r.GSBase)
			return breakpoint.Task{Addr: t.Addr, PID: int(t.ID), ID: t.ID, StackLow: t.StackLo, StackHigh: t.StackHi}, err
		},
		Alive: func(t breakpoint.Task) (bool, error) {
			return m.TaskAlive(xentest.Task{Addr: t.Addr, ID: t.ID, StackLo: t.StackLow, StackHi: t.StackHigh}), nil
		},
	}
}

// followed is a return probe that keeps books of its own.
type followed struct {
	*breakpoint.Probe
	m        *xentest.Machine
	vcpus    int
	f        xentest.Function
	under    map[*breakpoint.Activation]bool // way
	byTask   map[uint64][]*breakpoint.Activation
	entries  uint64
	returns  uint64
	lost     uint64
	problems []string
	// As the guest counts, when the probe was registered.
	entered, returned, ended, inside uint64
}

func (p *followed) problem(format string, args ...any) {
	if len(p.problems) < 20 {
		p.problems = append(p.problems, p.f.Name+": "+fmt.Sprintf(format, args...))
	}
}

func follow(m *xentest.Machine, cfg xentest.Config, name string, how breakpoint.Follow) *followed {
	p := &followed{m: m, vcpus: cfg.VCPUs, f: m.Function(name), under: map[*breakpoint.Activation]bool{}, byTask: map[uint64][]*breakpoint.Activation{}}
	exits, open := m.Exits(name)
	r := &breakpoint.Returns{Follow: how, Exits: exits, TailsTo: func(fn uint64) bool { return m.TailsTo(p.f.Entry, fn) }}
	if open {
		r.Exits, r.NoExits = nil, errors.New("an indirect jump")
	}
	p.Probe = &breakpoint.Probe{Addr: p.f.Entry, Ret: r}
	p.Pre = func(c *breakpoint.Context) breakpoint.Verdict {
		a := c.Call
		p.entries++
		if p.under[a] || a.Slot != c.Regs.SP || c.Regs.IP != p.f.Entry || c.Return {
			p.problem("entry %+v with %+v", a, c.Regs)
		}
		p.under[a] = true
		of := p.byTask[a.Task.Addr]
		if a.Depth > len(of) { // it may not have been told yet that some were abandoned
			p.problem("depth %d, want %d", a.Depth, len(of))
		}
		p.byTask[a.Task.Addr] = append(of, a)
		a.Data = p
		return breakpoint.Continue
	}
	r.Return = func(c *breakpoint.Context) breakpoint.Verdict {
		a := c.Call
		p.returns++
		if !p.end(a) || a.Data != p || !c.Return {
			p.problem("return of what isn't under way: %+v", a)
		}
		if at := c.Regs.SP - 8; at != a.Slot && (c.Regs.SP != a.Slot || !slices.Contains(exits, c.Regs.IP)) {
			p.problem("returns at stack pointer %#x, slot %#x", c.Regs.SP, a.Slot)
		}
		if p.f.Values != nil && !slices.Contains(p.f.Values, c.Regs.AX) {
			p.problem("returns %#x", c.Regs.AX)
		}
		return breakpoint.Continue
	}
	r.Abandoned = func(a *breakpoint.Activation, why error) breakpoint.Verdict {
		p.lost++
		if !p.end(a) {
			p.problem("abandoned what isn't under way: %+v", a)
		}
		if !errors.Is(why, breakpoint.ErrUnwound) && !errors.Is(why, breakpoint.ErrTaskGone) {
			p.problem("abandoned: %v", why)
		}
		return breakpoint.Continue
	}
	return p
}

// end takes an activation out of the test's books.
func (p *followed) end(a *breakpoint.Activation) bool {
	was := p.under[a]
	delete(p.under, a)
	p.byTask[a.Task.Addr] = slices.DeleteFunc(p.byTask[a.Task.Addr], func(b *breakpoint.Activation) bool { return a == b })
	return was
}

// begin notes what the guest has counted, which is at rest.
func (p *followed) begin() {
	n, returned, unwound, died := p.m.Returns(p.f.Name)
	p.entered, p.returned, p.ended, p.inside = n, returned, unwound+died, p.m.Inside(p.f.Name)
}

// check compares with the guest's counts. All calls that were under way when the probe was
// registered have ended since, and the guest is at rest.
func (p *followed) check(t *testing.T, e *breakpoint.Engine) {
	t.Helper()
	assert.Empty(t, p.problems)
	n, returned, unwound, died := p.m.Returns(p.f.Name)
	n, returned, ended := n-p.entered, returned-p.returned, unwound+died-p.ended
	// Those that were under way at first have ended, too: the mortals' by dying.
	dead := uint64(0)
	if died > 0 {
		dead = uint64(p.vcpus)
	}
	ended, returned = ended-dead, returned-(p.inside-dead)
	c := e.Counts(p.Probe)
	name := p.f.Name
	assert.Equal(t, n, p.Hits(), "%s: entries", name)
	assert.Zero(t, p.Missed(), "%s: missed", name)
	assert.Equal(t, n, p.entries, "%s: Pre handlers", name)
	assert.Equal(t, returned, c.Returned, "%s: returned, of %d, %+v", name, n, c)
	assert.Equal(t, returned, p.returns, "%s: Return handlers", name)
	assert.Equal(t, ended+p.m.Inside(name), c.Abandoned+uint64(c.Active), "%s: abandoned and under way, %+v", name, c)
	assert.LessOrEqual(t, p.lost, c.Abandoned, "%s: Abandoned handlers", name)
	assert.Zero(t, c.Dropped, name)
}

// loops lets the guest run until vCPU 0 has been around its loop n times more, and rest.
func loops(t *testing.T, m *xentest.Machine, n uint64) {
	t.Helper()
	n += m.Counter(0)
	for end := time.Now().Add(patience); m.Counter(0) < n && m.Oops() == "" && time.Now().Before(end); {
		time.Sleep(100 * time.Microsecond)
	}
	quiesce(t, m)
	require.Empty(t, m.Oops())
	require.GreaterOrEqual(t, m.Counter(0), n)
}

// followAll are the functions whose calls begin and end in all ways.
var followAll = []string{
	"rec", "tail_a", "tail_b", "tail_c", "tail_self", "lj_outer", "lj_mid", "lj_deep", "blocker", "victim", "blocking", "yield",
}

// TestReturns follows all calls of functions whose calls end in all ways, and compares with the
// guest's own counts: each alone, and all together.
func TestReturns(t *testing.T) {
	for _, how := range []breakpoint.Follow{breakpoint.AtReturn, breakpoint.AtExits, breakpoint.FollowAuto} {
		t.Run(fmt.Sprint(how), func(t *testing.T) {
			each(t, func(t *testing.T, cfg xentest.Config) {
				cfg.Returns = true
				m, _, e := returnsEngine(t, cfg)
				var probes []*followed
				for _, name := range followAll {
					p := follow(m, cfg, name, how)
					err := e.Register(p.Probe)
					if how == breakpoint.AtExits && p.Ret.Exits == nil {
						require.ErrorContains(t, err, "an indirect jump")
						continue
					}
					require.NoError(t, err, name)
					p.begin()
					probes = append(probes, p)
				}
				m.Release()
				require.NoError(t, served(t, e, func() { loops(t, m, 12) }))
				for _, p := range probes {
					p.check(t, e)
				}
				for _, p := range probes {
					require.NoError(t, e.Unregister(p.Probe))
				}
				assert.Empty(t, e.Sites(), "breakpoints after Unregister")
			})
		})
	}
}

func returnsEngine(t *testing.T, cfg xentest.Config) (*xentest.Machine, *hooked, *breakpoint.Engine) {
	var m *xentest.Machine
	c := breakpoint.Config{MayFault: xentest.NoFaults, Logger: logger(t), Hooks: breakpoint.Hooks{
		Task:  func(r *x86.Regs) (breakpoint.Task, error) { return hooksOf(m).Task(r) },
		Alive: func(t breakpoint.Task) (bool, error) { return hooksOf(m).Alive(t) },
	}}
	m, d, e := engine(t, cfg, c)
	return m, d, e
}
