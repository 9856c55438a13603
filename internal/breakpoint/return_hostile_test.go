package breakpoint_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/x86"
)

// scripted is a guest of which a test says at each step where its vCPU is, and a driver of
// it. Its text is NOPs but for what the test puts there.
type scripted struct {
	t    testing.TB
	e    *breakpoint.Engine
	logs *warnings

	mu     sync.Mutex
	pages  map[uint64]*[4096]byte
	orig   map[uint64]byte // under our breakpoints
	queue  []breakpoint.Stop
	last   breakpoint.Stop // the last one answered
	frozen int
	idle   bool // Wait waits, if there is nothing
	cancel context.CancelFunc

	task breakpoint.Task // that the vCPU executes

	// Each may be nil, and fails the call.
	read                 func(addr uint64) error
	insert, remove       func(addr uint64) error
	freeze, thaw, resume func() error
}

const (
	scriptText  = 0xffffffff81000000
	scriptStack = 0xffffc90000000000
)

// newScripted makes a guest with text and a stack of 16 KiB, each vCPU executing a task with
// that stack.
func newScripted(t testing.TB, hooks breakpoint.Hooks) *scripted {
	g := &scripted{t: t, pages: map[uint64]*[4096]byte{}, orig: map[uint64]byte{}}
	g.task = breakpoint.Task{Addr: 0xffff888001234000, PID: 77, ID: 0x5eed, StackLow: scriptStack, StackHigh: scriptStack + 0x4000}
	g.pagesAt(scriptText, 16, 0x90)
	g.pagesAt(scriptStack, 4, 0)
	if hooks.Task == nil {
		hooks.Task = func(*x86.Regs) (breakpoint.Task, error) { return g.task, nil }
	}
	g.logs = new(warnings)
	g.e = breakpoint.New(g, breakpoint.Config{MayFault: none, Logger: slog.New(g.logs), Hooks: hooks})
	return g
}

func (g *scripted) pagesAt(addr uint64, n int, fill byte) {
	for i := range uint64(n) {
		p := new([4096]byte)
		for j := range p {
			p[j] = fill
		}
		g.pages[addr>>12+i] = p
	}
}

func (g *scripted) poke(addr uint64, b ...byte) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for i, c := range b {
		a := addr + uint64(i)
		g.pages[a>>12][a&4095] = c
	}
}

func (g *scripted) poke64(addr, v uint64) {
	g.poke(addr, binary.LittleEndian.AppendUint64(nil, v)...)
}

// stop has the vCPU come to a breakpoint; it reports whether there is one.
func (g *scripted) stop(ip, sp uint64) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if _, ok := g.orig[ip]; !ok {
		return false
	}
	g.queue = append(g.queue, breakpoint.Stop{Reason: breakpoint.Hit, Regs: x86.Regs{IP: ip, SP: sp, Flags: 2}})
	return true
}

// serve has the engine serve what is in the queue, and fails if it can't.
func (g *scripted) serve() {
	g.t.Helper()
	require.NoError(g.t, g.serving(true))
}

func (g *scripted) serving(live bool) error {
	ctx, cancel := context.WithCancel(g.t.Context())
	defer cancel()
	g.mu.Lock()
	g.cancel = cancel
	g.mu.Unlock()
	if _, err := g.e.Serve(ctx, live); !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// idleFor serves a guest that does nothing for a while.
func (g *scripted) idleFor(d time.Duration) {
	g.t.Helper()
	g.idle = true
	defer func() { g.idle = false }()
	ctx, cancel := context.WithTimeout(g.t.Context(), d)
	defer cancel()
	_, err := g.e.Serve(ctx, true)
	require.ErrorIs(g.t, err, context.DeadlineExceeded)
}

// call has the vCPU call the function at fn, and stop there.
func (g *scripted) call(fn, slot, ret uint64) {
	g.t.Helper()
	g.poke64(slot, ret)
	require.True(g.t, g.stop(fn, slot), "no breakpoint at %#x", fn)
	g.serve()
}

// back has the vCPU return from a call; it reports whether it stops at the return address.
func (g *scripted) back(slot, ret uint64) bool {
	g.t.Helper()
	ok := g.stop(ret, slot+8)
	if ok {
		g.serve()
	}
	return ok
}

func (g *scripted) sites() (addrs []uint64) {
	for _, s := range g.e.Sites() {
		addrs = append(addrs, s.Addr)
	}
	return addrs
}

func (g *scripted) Caps() breakpoint.Caps { return breakpoint.Caps{VCPUs: 4, Step: true} }

func (g *scripted) Read(_, addr uint64, b []byte) (int, error) {
	if g.read != nil {
		if err := g.read(addr); err != nil {
			return 0, err
		}
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	for i := range b {
		a := addr + uint64(i)
		p := g.pages[a>>12]
		if p == nil {
			return i, fmt.Errorf("%#x: %w", a, breakpoint.ErrNotMapped)
		}
		b[i] = p[a&4095]
	}
	return len(b), nil
}

func (g *scripted) Store(_, addr uint64, b []byte) error { g.poke(addr, b...); return nil }
func (g *scripted) Patch(addr uint64, b []byte) error    { g.poke(addr, b...); return nil }

func (g *scripted) InsertBreak(addr uint64, in *x86.Insn) error {
	if g.insert != nil {
		if err := g.insert(addr); err != nil {
			return err
		}
	}
	g.poke(addr, 0xcc)
	g.mu.Lock()
	defer g.mu.Unlock()
	g.orig[addr] = in.Bytes()[0]
	return nil
}

func (g *scripted) RemoveBreak(addr uint64) error {
	if g.remove != nil {
		if err := g.remove(addr); err != nil {
			return err
		}
	}
	g.mu.Lock()
	b := g.orig[addr]
	delete(g.orig, addr)
	changed := g.pages[addr>>12][addr&4095] != 0xcc
	g.mu.Unlock()
	if changed {
		return breakpoint.ErrTextChanged
	}
	g.poke(addr, b)
	return nil
}

func (g *scripted) Freeze() error {
	return first(g.freeze, func() error { g.mu.Lock(); defer g.mu.Unlock(); g.frozen++; return nil })
}

func (g *scripted) Thaw() error {
	return first(g.thaw, func() error { g.mu.Lock(); defer g.mu.Unlock(); g.frozen--; return nil })
}

func (g *scripted) Wait(ctx context.Context, s *breakpoint.Stop) error {
	g.mu.Lock()
	if len(g.queue) > 0 {
		*s, g.queue = g.queue[0], g.queue[1:]
		g.mu.Unlock()
		return nil
	}
	cancel := g.cancel
	g.mu.Unlock()
	if !g.idle && cancel != nil {
		cancel()
	}
	<-ctx.Done()
	return ctx.Err()
}

func (g *scripted) answer(s *breakpoint.Stop) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.last = *s
	return nil
}

func (g *scripted) Resume(s *breakpoint.Stop) error {
	return first(g.resume, func() error { return g.answer(s) })
}
func (g *scripted) StepOn(s *breakpoint.Stop, _ *x86.Insn) error   { return g.answer(s) }
func (g *scripted) StepOver(s *breakpoint.Stop, addr uint64) error { return breakpoint.ErrNoWayPast }
func (g *scripted) Reinject(s *breakpoint.Stop) error              { return g.answer(s) }
func (g *scripted) Close() error                                   { return nil }

// warnings counts what is logged at that level or above.
type warnings struct{ n atomic.Int64 }

func (w *warnings) Enabled(_ context.Context, l slog.Level) bool { return l >= slog.LevelWarn }
func (w *warnings) Handle(context.Context, slog.Record) error    { w.n.Add(1); return nil }
func (w *warnings) WithAttrs([]slog.Attr) slog.Handler           { return w }
func (w *warnings) WithGroup(string) slog.Handler                { return w }

// told is a return probe that notes what it is told.
type told struct {
	*breakpoint.Probe
	log []string
}

func newTold(fn uint64, r *breakpoint.Returns) *told {
	p := &told{Probe: &breakpoint.Probe{Addr: fn, Ret: r}}
	p.Pre = func(c *breakpoint.Context) breakpoint.Verdict {
		p.log = append(p.log, fmt.Sprintf("entry %#x", c.Call.Slot))
		return breakpoint.Continue
	}
	r.Return = func(c *breakpoint.Context) breakpoint.Verdict {
		p.log = append(p.log, fmt.Sprintf("return %#x", c.Call.Slot))
		return breakpoint.Continue
	}
	r.Abandoned = func(a *breakpoint.Activation, why error) breakpoint.Verdict {
		p.log = append(p.log, fmt.Sprintf("abandoned %#x", a.Slot))
		return breakpoint.Continue
	}
	return p
}

// balance checks that each call that was seen has become exactly one thing.
func (p *told) balance(t *testing.T, e *breakpoint.Engine) breakpoint.Counts {
	t.Helper()
	c := e.Counts(p.Probe)
	assert.GreaterOrEqual(t, c.Active, 0, "%+v", c)
	assert.Equal(t, int64(p.Hits()), int64(c.Ignored+c.Returned+c.Abandoned+c.Dropped)+int64(c.Active), "%d hits: %+v", p.Hits(), c)
	return c
}

// Places in the text of a scripted guest.
const (
	fnF  = scriptText + 0x100
	fnG  = scriptText + 0x200
	retR = scriptText + 0x800
	top  = scriptStack + 0x3f00 // a slot
)

func none(uint64) bool { return false }

// TestScripted is what the other tests here rely on.
func TestScripted(t *testing.T) {
	g := newScripted(t, breakpoint.Hooks{})
	p := newTold(fnF, &breakpoint.Returns{TailsTo: none})
	require.NoError(t, g.e.Register(p.Probe))
	for i := range uint64(3) {
		g.call(fnF, top-64*i, retR+16*i)
	}
	assert.False(t, g.back(top, retR+1))
	assert.True(t, g.back(top-128, retR+32))
	assert.True(t, g.back(top, retR)) // past the second one
	g.serve()
	assert.Equal(t, []string{
		fmt.Sprintf("entry %#x", uint64(top)), fmt.Sprintf("entry %#x", uint64(top-64)), fmt.Sprintf("entry %#x", uint64(top-128)),
		fmt.Sprintf("return %#x", uint64(top-128)), fmt.Sprintf("return %#x", uint64(top)), fmt.Sprintf("abandoned %#x", uint64(top-64)),
	}, p.log)
	p.balance(t, g.e)
	require.NoError(t, g.e.Unregister(p.Probe))
	assert.Empty(t, g.sites())
	require.NoError(t, g.e.Close())
}

// ends are the exits that the tests' functions have.
func ends(fn uint64) []uint64 { return []uint64{fn + 0x40, fn + 0x50} }

// hit has the vCPU stop at a breakpoint that must be there, and serves.
func (g *scripted) hit(ip, sp uint64) {
	g.t.Helper()
	require.True(g.t, g.stop(ip, sp), "no breakpoint at %#x", ip)
	g.serve()
}

// TestGivenUpEntry: when the breakpoint at a function's entry is given up, because there is no
// way past the instruction, its calls are over and no other breakpoint of the probe stays. If
// it is registered again it counts its own calls.
func TestGivenUpEntry(t *testing.T) {
	for _, how := range []breakpoint.Follow{breakpoint.AtReturn, breakpoint.AtExits} {
		t.Run(fmt.Sprint(how), func(t *testing.T) {
			g := newScripted(t, breakpoint.Hooks{})
			g.poke(fnF, 0x48, 0x8b, 0x18) // mov (%rax),%rbx
			p := newTold(fnF, &breakpoint.Returns{Follow: how, Exits: ends(fnF), TailsTo: none})
			require.NoError(t, g.e.Register(p.Probe))
			g.poke64(top, retR)
			require.True(t, g.stop(fnF, top))
			g.queue[0].Regs.AX = scriptStack
			g.serve()
			g.poke64(top-64, retR)
			require.True(t, g.stop(fnF, top-64)) // RAX is 0
			require.ErrorIs(t, g.serving(true), breakpoint.ErrNoWayPast)
			require.False(t, g.e.Registered(p.Probe))
			assert.Empty(t, g.sites(), "breakpoints of a probe that is gone")
			p.balance(t, g.e)

			g.poke(fnF, 0x90)
			require.NoError(t, g.e.Register(p.Probe))
			g.back(top, retR)
			g.call(fnF, top, retR)
			assert.Equal(t, 1, p.balance(t, g.e).Active)
		})
	}
}

// TestUnregisteredInHook unregisters the last return probe while a hook finds out where a call
// returns.
func TestUnregisteredInHook(t *testing.T) {
	var g *scripted
	var p *told
	g = newScripted(t, breakpoint.Hooks{ReturnAt: func(ret uint64) ([]uint64, error) {
		return []uint64{ret}, g.e.Unregister(p.Probe)
	}})
	p = newTold(fnF, &breakpoint.Returns{TailsTo: none})
	require.NoError(t, g.e.Register(p.Probe))
	g.call(fnF, top, retR)
	assert.Empty(t, g.sites(), "breakpoints, and no probe")
	p.balance(t, g.e)
}

// TestPlantThawFails: the breakpoint at the return address is there, but the guest isn't let go
// at once.
func TestPlantThawFails(t *testing.T) {
	g := newScripted(t, breakpoint.Hooks{})
	p := newTold(fnF, &breakpoint.Returns{TailsTo: none})
	require.NoError(t, g.e.Register(p.Probe))
	g.thaw = failing(3)
	g.call(fnF, top, retR)
	if p.Missed() > 0 {
		assert.Len(t, g.sites(), 1, "a breakpoint that nobody waits at")
	}
	g.back(top, retR)
	assert.EqualValues(t, 1, p.balance(t, g.e).Returned)
}

// TestExitsFailOnce: that the exits could not be had for a moment isn't for ever.
func TestExitsFailOnce(t *testing.T) {
	for _, what := range []string{"freeze", "insert"} {
		t.Run(what, func(t *testing.T) {
			g := newScripted(t, breakpoint.Hooks{ReturnAt: func(uint64) ([]uint64, error) { return nil, errInjected }})
			p := newTold(fnF, &breakpoint.Returns{Exits: ends(fnF), TailsTo: none})
			require.NoError(t, g.e.Register(p.Probe))
			if what == "freeze" {
				g.freeze = failing(3)
			} else {
				fail := failing(1)
				g.insert = func(uint64) error { return fail() }
			}
			g.call(fnF, top, retR)
			g.call(fnF, top-64, retR)
			assert.EqualValues(t, 1, p.Missed(), "after it could be had")
			assert.Equal(t, 1, p.balance(t, g.e).Active)
		})
	}
}

// TestReturnSitesFull has as many breakpoints at return addresses as there may be, from calls
// that have returned: those that a call needs don't push out one another.
func TestReturnSitesFull(t *testing.T) {
	two := func(ret uint64) ([]uint64, error) {
		if ret == retR {
			return []uint64{retR + 5, retR + 0x10}, nil
		}
		return []uint64{ret}, nil
	}
	for _, how := range []breakpoint.Follow{breakpoint.AtReturn, breakpoint.AtExits} {
		t.Run(fmt.Sprint(how), func(t *testing.T) {
			g := newScripted(t, breakpoint.Hooks{ReturnAt: two})
			filler := newTold(fnG, &breakpoint.Returns{TailsTo: none})
			require.NoError(t, g.e.Register(filler.Probe))
			for i := range uint64(4096) {
				ret := uint64(scriptText + 0x1000 + i)
				g.call(fnG, top, ret)
				require.True(t, g.back(top, ret))
			}
			p := newTold(fnF, &breakpoint.Returns{Follow: how, Exits: ends(fnF), TailsTo: none})
			require.NoError(t, g.e.Register(p.Probe))
			g.call(fnF, top, retR)
			want := []uint64{retR + 5, retR + 0x10}
			if how == breakpoint.AtExits {
				want = ends(fnF)
			}
			for _, x := range want {
				assert.True(t, slices.Contains(g.sites(), x), "%#x", x)
			}
			c := p.balance(t, g.e)
			assert.Equal(t, 1, c.Active, "%+v", c)
		})
	}
}

// TestLostExit has the guest change its code at an exit while a call is followed there: it
// can't be told any more when it returns. A probe that must be followed to exits isn't
// followed elsewhere from then on.
func TestLostExit(t *testing.T) {
	g := newScripted(t, breakpoint.Hooks{})
	p := newTold(fnF, &breakpoint.Returns{Follow: breakpoint.AtExits, Exits: ends(fnF), TailsTo: none})
	require.NoError(t, g.e.Register(p.Probe))
	g.call(fnF, top, retR)
	g.poke(ends(fnF)[0], 0xe9)
	require.NoError(t, g.e.Check())
	g.serve()
	c := p.balance(t, g.e)
	assert.EqualValues(t, 1, c.Abandoned, "%+v", c)
	assert.Contains(t, p.log, fmt.Sprintf("abandoned %#x", uint64(top)))

	g.call(fnF, top-64, retR)
	assert.NotContains(t, g.sites(), uint64(retR), "AtExits was asked for")
	assert.EqualValues(t, 1, p.Missed())
}

// oddContext is a context that can't be compared.
type oddContext struct {
	context.Context
	_ []int
}

// TestOddContext serves with a context that can't be compared while calls are under way.
func TestOddContext(t *testing.T) {
	g := newScripted(t, breakpoint.Hooks{})
	p := newTold(fnF, &breakpoint.Returns{TailsTo: none})
	require.NoError(t, g.e.Register(p.Probe))
	g.call(fnF, top, retR)
	require.True(t, g.stop(retR, top+8))
	ctx, cancel := context.WithCancel(t.Context())
	g.cancel = cancel
	assert.NotPanics(t, func() { _, _ = g.e.Serve(oddContext{ctx, nil}, true) })
}

// TestPanics: a call is accounted for when a handler panics, and when a hook does the vCPU goes on.
func TestPanics(t *testing.T) {
	for _, where := range []string{"entry", "return", "abandoned", "task", "return at"} {
		t.Run(where, func(t *testing.T) {
			now := ""
			throw := func(w string) {
				if w == now {
					now = ""
					panic(w)
				}
			}
			var g *scripted
			g = newScripted(t, breakpoint.Hooks{
				Task:     func(*x86.Regs) (breakpoint.Task, error) { throw("task"); return g.task, nil },
				ReturnAt: func(ret uint64) ([]uint64, error) { throw("return at"); return []uint64{ret}, nil },
			})
			p := newTold(fnF, &breakpoint.Returns{TailsTo: none})
			p.Pre = func(*breakpoint.Context) breakpoint.Verdict { throw("entry"); return 0 }
			p.Ret.Return = func(*breakpoint.Context) breakpoint.Verdict { throw("return"); return 0 }
			p.Ret.Abandoned = func(*breakpoint.Activation, error) breakpoint.Verdict { throw("abandoned"); return 0 }
			require.NoError(t, g.e.Register(p.Probe))
			stops := uint64(0)
			at := func(ip, sp uint64) {
				if !g.stop(ip, sp) {
					return
				}
				g.last = breakpoint.Stop{}
				if ip == fnF {
					stops++
				}
				func() {
					defer func() { _ = recover() }()
					assert.NoError(t, g.serving(true))
				}()
				assert.Equal(t, ip+1, g.last.Regs.IP, "the vCPU goes on")
			}
			for i := range uint64(4) {
				if i == 1 {
					now = where
				}
				r := retR + 16*i
				g.poke64(top, r)
				at(fnF, top)
				g.poke64(top-64, r+8)
				at(fnF, top-64)
				at(r, top+8)
			}
			g.serve()
			assert.Empty(t, now)
			c := p.balance(t, g.e)
			if where != "return at" { // that isn't known to be a call
				assert.Equal(t, stops, p.Hits()+p.Missed(), "%+v", c)
			}
			require.NoError(t, g.e.Unregister(p.Probe))
			assert.Empty(t, g.sites())
		})
	}
}

// TestStackUnreadable: the return address can't be read for a moment.
func TestStackUnreadable(t *testing.T) {
	g := newScripted(t, breakpoint.Hooks{})
	p := newTold(fnF, &breakpoint.Returns{TailsTo: none})
	require.NoError(t, g.e.Register(p.Probe))
	fail := failing(1)
	g.read = func(addr uint64) error {
		if addr == top {
			return fail()
		}
		return nil
	}
	g.call(fnF, top, retR)
	assert.Zero(t, p.Missed())
}

// TestBareRet: a function that is one instruction, followed to its exit, takes no less than no time.
func TestBareRet(t *testing.T) {
	g := newScripted(t, breakpoint.Hooks{})
	g.poke(fnF, 0xc3)
	p := newTold(fnF, &breakpoint.Returns{Follow: breakpoint.AtExits, Exits: []uint64{fnF}, TailsTo: none})
	took := time.Duration(-1)
	p.Ret.Return = func(c *breakpoint.Context) breakpoint.Verdict { took = c.Call.Ended.Sub(c.Call.Entered); return 0 }
	require.NoError(t, g.e.Register(p.Probe))
	g.call(fnF, top, retR)
	assert.GreaterOrEqual(t, took, time.Duration(0))
	assert.EqualValues(t, 1, p.balance(t, g.e).Returned)
}

// TestSweepSpares: the sweep leaves calls alone that are under way, or have returned to where
// no breakpoint has told yet.
func TestSweepSpares(t *testing.T) {
	if testing.Short() {
		t.Skip("takes seconds")
	}
	two := func(ret uint64) ([]uint64, error) { return []uint64{ret + 5, ret + 0x20}, nil }
	for name, f := range map[string]func(*scripted) uint64{
		"at the bottom of the stack": func(g *scripted) uint64 { return scriptStack + 0x10 },
		"interrupted behind a jump label": func(g *scripted) uint64 {
			g.poke64(top, 0x18)           // SS
			g.poke64(top-0x20, retR+0x20) // RIP: where the jump leads
			return top
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			g := newScripted(t, breakpoint.Hooks{ReturnAt: two})
			p := newTold(fnF, &breakpoint.Returns{TailsTo: none})
			require.NoError(t, g.e.Register(p.Probe))
			slot := uint64(top)
			if name == "at the bottom of the stack" {
				slot = f(g)
			}
			g.call(fnF, slot, retR)
			f(g)
			g.idleFor(3500 * time.Millisecond)
			c := p.balance(t, g.e)
			assert.Equal(t, 1, c.Active, "%+v", c)
			g.hit(retR+0x20, slot+8)
			assert.EqualValues(t, 1, g.e.Counts(p.Probe).Returned)
		})
	}
}

// TestUnregisterLeavesExit: a breakpoint at an exit that can't be removed when its probe is
// unregistered goes as soon as it can.
func TestUnregisterLeavesExit(t *testing.T) {
	if testing.Short() {
		t.Skip("takes seconds")
	}
	t.Parallel()
	g := newScripted(t, breakpoint.Hooks{})
	p := newTold(fnF, &breakpoint.Returns{Follow: breakpoint.AtExits, Exits: ends(fnF), TailsTo: none})
	require.NoError(t, g.e.Register(p.Probe))
	g.remove = func(addr uint64) error {
		if addr == fnF {
			return nil
		}
		return errInjected
	}
	_ = g.e.Unregister(p.Probe)
	require.False(t, g.e.Registered(p.Probe))
	g.remove = nil
	g.idleFor(3500 * time.Millisecond)
	assert.Empty(t, g.sites())
}

// TestPlanIsNew: what may be probed at a return address is asked when a breakpoint is put there,
// as the guest may have loaded other code there since the last time.
func TestPlanIsNew(t *testing.T) {
	var refused error
	g := newScripted(t, breakpoint.Hooks{ReturnAt: func(ret uint64) ([]uint64, error) { return []uint64{ret}, refused }})
	p := newTold(fnF, &breakpoint.Returns{TailsTo: none})
	other := newTold(fnG, &breakpoint.Returns{TailsTo: none})
	require.NoError(t, g.e.Register(p.Probe, other.Probe))
	g.call(fnF, top, retR)
	require.True(t, g.back(top, retR))
	require.NoError(t, g.e.Unregister(other.Probe)) // takes out what nobody waits at
	require.NotContains(t, g.sites(), uint64(retR))
	refused = errInjected
	g.call(fnF, top, retR)
	assert.NotContains(t, g.sites(), uint64(retR), "a breakpoint where none may stand")
}

// TestMadeUpReturns: a guest that makes up return addresses doesn't fill the log.
func TestMadeUpReturns(t *testing.T) {
	g := newScripted(t, breakpoint.Hooks{ReturnAt: func(uint64) ([]uint64, error) { return nil, errInjected }})
	p := newTold(fnF, &breakpoint.Returns{TailsTo: none})
	require.NoError(t, g.e.Register(p.Probe))
	for i := range uint64(1000) {
		g.call(fnF, top, retR+i)
	}
	assert.EqualValues(t, 1000, p.Missed())
	assert.Less(t, g.logs.n.Load(), int64(50))
}

// TestForeignRemovalFails: Serve goes on if a breakpoint that isn't wanted can't be removed now.
func TestForeignRemovalFails(t *testing.T) {
	for _, what := range []string{"remove", "thaw"} {
		t.Run(what, func(t *testing.T) {
			g := newScripted(t, breakpoint.Hooks{})
			p := newTold(fnF, &breakpoint.Returns{TailsTo: none})
			require.NoError(t, g.e.Register(p.Probe))
			g.call(fnF, top, retR)
			require.True(t, g.back(top, retR))
			if fail := failing(3); what == "thaw" {
				g.thaw = fail
			} else {
				g.remove = func(uint64) error { return fail() }
			}
			for range 30 {
				if g.stop(retR, top-0x100) {
					require.NoError(t, g.serving(true))
				}
			}
			assert.NotContains(t, g.sites(), uint64(retR))
		})
	}
}

// manyCalls has a task with as many calls under way as can be followed.
func manyCalls(t *testing.T, probes ...*told) (g *scripted, lowest uint64) {
	g = newScripted(t, breakpoint.Hooks{})
	const size = 1 << 21
	g.pagesAt(scriptStack, size>>12, 0)
	g.task.StackHigh = scriptStack + size
	for _, p := range probes {
		require.NoError(t, g.e.Register(p.Probe))
	}
	begin := time.Now()
	slot := uint64(scriptStack + size - 64)
	for i := range 1 << 16 {
		p := probes[i%len(probes)]
		slot -= 16
		g.poke64(slot, retR)
		require.True(t, g.stop(p.Addr, slot))
	}
	g.serve()
	took := time.Since(begin)
	t.Logf("%v for the entries", took)
	return g, slot
}

// TestManyCalls: a hostile guest may have as many calls under way as can be followed, all of one
// task. To begin one takes no longer for it, nor to end all at once: the guest may be frozen. (The times are
// logged; quadratic ones were half a minute.)
func TestManyCalls(t *testing.T) {
	for name, f := range map[string]func(g *scripted, probes []*told){
		"unwound": func(g *scripted, probes []*told) {
			g.poke64(g.task.StackHigh-64, retR)
			require.True(t, g.stop(fnF, g.task.StackHigh-64))
			g.serve()
			assert.EqualValues(t, 1<<15, g.e.Counts(probes[0].Probe).Abandoned)
		},
		"unregistered": func(g *scripted, probes []*told) {
			require.NoError(t, g.e.Unregister(probes[0].Probe))
			assert.EqualValues(t, 1<<15, g.e.Counts(probes[0].Probe).Dropped)
		},
		"lost": func(g *scripted, probes []*told) {
			g.poke(retR, 0xe9)
			require.NoError(t, g.e.Check())
			assert.EqualValues(t, 1<<15, g.e.Counts(probes[0].Probe).Abandoned)
		},
		"closed": func(g *scripted, probes []*told) { require.NoError(t, g.e.Close()) },
	} {
		t.Run(name, func(t *testing.T) {
			probes := []*told{newTold(fnF, &breakpoint.Returns{TailsTo: none}), newTold(fnG, &breakpoint.Returns{TailsTo: none})}
			g, _ := manyCalls(t, probes...)
			begin := time.Now()
			f(g, probes)
			took := time.Since(begin)
			t.Logf("%v for the end", took)
			for _, p := range probes {
				p.balance(t, g.e)
			}
		})
	}
}

// TestPidChanges: a thread that executes a program takes on the pid of its process' leader
// (exchange_tids in de_thread), in the middle of a call. That returns.
func TestPidChanges(t *testing.T) {
	g := newScripted(t, breakpoint.Hooks{})
	p := newTold(fnF, &breakpoint.Returns{TailsTo: none})
	require.NoError(t, g.e.Register(p.Probe))
	g.call(fnF, top, retR)
	g.task.PID++
	require.True(t, g.back(top, retR))
	c := p.balance(t, g.e)
	assert.EqualValues(t, 1, c.Returned, "%+v", c)

	g.call(fnF, top, retR)
	g.task.ID++ // another task, whose entry nobody saw
	require.True(t, g.back(top, retR))
	assert.EqualValues(t, 1, p.balance(t, g.e).Abandoned)
}

// TestManyReturnProbes unregisters many at once: the guest is frozen meanwhile.
func TestManyReturnProbes(t *testing.T) {
	g := newScripted(t, breakpoint.Hooks{})
	var all []*breakpoint.Probe
	for i := range uint64(14000) {
		all = append(all, newTold(scriptText+0x1000+i, &breakpoint.Returns{TailsTo: none}).Probe)
	}
	require.NoError(t, g.e.Register(all...))
	begin := time.Now()
	require.NoError(t, g.e.Unregister(all...))
	t.Logf("%v", time.Since(begin))
	assert.Empty(t, g.sites())
}
