package breakpoint_test

import (
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/x86"
	"github.com/vmprobes/vmprobes/internal/xentest"
)

// TestReturnsInterleaved follows calls with random return probes, while others, plain ones among
// them, are registered, unregistered and switched off and on: between two stops, in handlers,
// and in what the engine asks of who knows the guest. Nobody serves for a while, calls of the
// hypervisor fail, an administrator pauses the domain, what the engine does once a second comes
// at any moment. Each call that was followed has to end once, in the way that it has in the
// guest, and none may be forgotten.
//
// Most rounds have one goroutine only, which executes the guest while it waits for a stop, so
// that a seed does the same each time, all but. In the others the guest runs by itself.
//
// VMPROBES_INTERLEAVINGS is how many to run, over all guests; VMPROBES_SEED is one of
// them (xentest.Seeds).
func TestReturnsInterleaved(t *testing.T) {
	configs := 0
	each(t, func(*testing.T, xentest.Config) { configs++ })
	rounds := 150
	if testing.Short() {
		rounds = 15
	}
	if n, err := strconv.Atoi(os.Getenv("VMPROBES_INTERLEAVINGS")); err == nil {
		rounds = max(1, n/max(1, configs))
	}
	each(t, func(t *testing.T, cfg xentest.Config) {
		xentest.Seeds(t, rounds, 1, func(t *testing.T, seed uint64) { interleaveReturns(t, cfg, seed) })
		t.Logf("%d interleavings", rounds)
	})
}

// weave is one round of TestReturnsInterleaved.
type weave struct {
	t   *testing.T
	cfg xentest.Config
	m   *xentest.Machine
	e   *breakpoint.Engine

	// What this round has.
	failures, gaps, small, admin, hard, noPlace, noTask, changes bool

	mu     sync.Mutex // guards what follows: handlers run elsewhere, in some rounds
	r      *rand.Rand
	exits  []uint64 // of all functions
	probes []*woven
	all    []*woven // also those that are unregistered
	stays  []*woven
	acts   []*act // under way, as far as was told
	seq    int
	failed bool // Serve has: hits may be missed
	bad    int
	fails  int // times that some were to come
	paused int // waits until the administrator unpauses

	// Without a goroutine for the guest.
	waits   int
	stops   int
	over    func() // when there were so many
	resting bool   // the guest comes to rest then
	settled bool   // it has, and no call ends any more
}

// woven is a probe.
type woven struct {
	*breakpoint.Probe
	f    xentest.Function
	base uint64
	ret  bool

	pre, returned, abandoned, ignored uint64
}

// act is what was told of a call.
type act struct {
	*breakpoint.Activation
	of     *woven
	seq    int
	passed string // by which outer call, that has returned already
}

func interleaveReturns(t *testing.T, cfg xentest.Config, seed uint64) {
	cfg.Seed, cfg.Returns = seed, true
	r := rand.New(rand.NewPCG(seed, 1))
	if r.IntN(2) == 0 {
		cfg.Quantum = r.IntN(60)
	}
	if r.IntN(2) == 0 {
		cfg.IRQEvery = 250 + r.IntN(400) // the handler takes a hundred
	}
	w := &weave{t: t, cfg: cfg, m: xentest.New(cfg), r: r}
	maybe := func() bool { return r.IntN(4) == 0 }
	w.failures, w.gaps, w.small, w.admin = maybe(), maybe(), maybe(), maybe()
	w.hard, w.noPlace, w.noTask, w.changes = maybe(), maybe(), maybe(), r.IntN(2) == 0
	free := !w.hard && r.IntN(12) == 0
	m := w.m
	for _, f := range m.Functions() {
		w.exits = append(w.exits, f.Exits...)
	}
	m.Run(r.IntN(20000)) // so that calls are under way that nobody saw begin
	before := m.Text()
	if free {
		m.Start()
		defer m.Stop()
	}
	quiesce(t, m)
	drv, err := m.Attach(nil)
	require.NoError(t, err)
	c := breakpoint.Config{Scratch: m.Scratch, MayFault: xentest.NoFaults, Logger: logger(t), Hooks: w.hooks()}
	if w.hard {
		c.MayFault = func(a uint64) bool { return a%5 == 0 }
		c.Method = breakpoint.Method(r.IntN(3))
	}
	if free {
		w.e = breakpoint.New(&sweeper{drv, w}, c)
	} else {
		w.e = breakpoint.New(&executor{drv, w}, c)
	}
	w.begin()
	m.Release()
	quit := r.IntN(5) == 0
	if free {
		w.free(quit)
	} else {
		w.alone(quit)
	}
	w.end(quit)
	m.Release()
	xentest.Verify(t, m, before)
	require.False(t, m.Attached() || m.MonitorOpen(), "still attached")
	require.Zero(t, m.Mappings(), "mappings left")
	require.Zero(t, m.Pauses(), "pauses left")
	if t.Failed() {
		t.Logf("failures %v, gaps %v, small %v, admin %v, hard %v, noPlace %v, noTask %v, changes %v, free %v: %s",
			w.failures, w.gaps, w.small, w.admin, w.hard, w.noPlace, w.noTask, w.changes, free, m.State())
	}
}

// clean reports whether no call may be missed.
func (w *weave) clean() bool {
	return !w.failures && !w.gaps && !w.small && !w.hard && !w.noPlace && !w.failed
}

// chance is true once in n times.
func (w *weave) chance(n int) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.r.IntN(n) == 0
}

func (w *weave) int(n int) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.r.IntN(n)
}

// problem is for who has w.mu.
func (w *weave) problem(format string, args ...any) {
	if w.bad++; w.bad < 10 {
		w.t.Errorf(format, args...)
	}
}

// executor is a driver that executes the guest while it waits for a stop, and lets things
// happen meanwhile.
type executor struct {
	breakpoint.Driver
	w *weave
}

func (d *executor) Wait(ctx context.Context, s *breakpoint.Stop) error {
	gone, cancel := context.WithCancel(ctx)
	cancel()
	for {
		err := d.Driver.Wait(gone, s)
		if !errors.Is(err, context.Canceled) && !errors.Is(err, context.DeadlineExceeded) {
			if d.w.stops++; d.w.stops%8 == 0 { // there may be one always
				d.w.wait()
			}
			return err
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		d.w.between(true)
		if d.w.wait(); ctx.Err() != nil {
			return ctx.Err()
		}
		d.w.m.Run(1 + d.w.int(80))
	}
}

// sweeper is a driver of a guest that runs by itself. What the engine does once a second
// it does now and then.
type sweeper struct {
	breakpoint.Driver
	w *weave
}

func (d *sweeper) Wait(ctx context.Context, s *breakpoint.Stop) error {
	if !d.w.settled && d.w.chance(4) {
		gone, cancel := context.WithCancel(ctx)
		cancel()
		err := d.Driver.Wait(gone, s)
		if ctx.Err() != nil || !errors.Is(err, context.Canceled) && !errors.Is(err, context.DeadlineExceeded) {
			return err
		}
		if d.w.chance(8) {
			d.w.e.Age()
		}
		d.w.e.Sweep(true)
	}
	return d.Driver.Wait(ctx, s)
}

// hooks are those of TestReturns, in which something else may happen, and which fail now and
// then in some rounds.
func (w *weave) hooks() breakpoint.Hooks {
	known := hooksOf(w.m)
	h := breakpoint.Hooks{
		Task: func(r *x86.Regs) (breakpoint.Task, error) {
			w.meanwhile(60)
			if w.noTask && w.chance(3) {
				return breakpoint.Task{}, errInjected
			}
			return known.Task(r)
		},
		Alive: func(t breakpoint.Task) (bool, error) {
			w.meanwhile(60)
			if w.noTask && w.chance(3) {
				return false, errInjected
			}
			return known.Alive(t)
		},
		Trampoline: func(uint64) bool { w.meanwhile(60); return false },
	}
	if w.noPlace {
		h.ReturnAt = func(ret uint64) ([]uint64, error) {
			w.meanwhile(60)
			switch {
			case ret%3 == 0:
				return nil, errInjected
			case string(w.m.Peek(ret, 5)) == "\x0f\x1f\x44\x00\x00":
				return []uint64{ret + 5}, nil
			}
			return []uint64{ret}, nil
		}
	}
	return h
}

// meanwhile is where the engine's lock is free in the middle of something.
func (w *weave) meanwhile(n int) {
	if w.changes && w.e != nil && w.chance(n) {
		w.change()
	}
}

// between is where nothing has stopped, or if quiet isn't set something may have.
func (w *weave) between(quiet bool) {
	switch n := w.int(48); n {
	case 0, 1, 2:
		if quiet && !w.settled {
			if n == 0 {
				w.e.Age()
			}
			w.e.Sweep(w.int(4) > 0)
		}
	case 3:
		if err := w.e.Check(); err != nil && !w.failures {
			w.t.Errorf("check: %v", err)
		}
	case 4, 5, 6, 7:
		w.meanwhile(1)
	case 8:
		if w.failures && w.fails < 6 { // or nothing would succeed any more
			w.mu.Lock()
			w.fails++
			failSome(w.m, w.r)
			w.mu.Unlock()
		}
	case 9:
		if w.admin && w.paused == 0 && w.m.Hypervisor().Pause() == nil {
			w.paused = 1 + w.int(6)
		}
	}
	if w.paused > 0 {
		if w.paused == 1 {
			w.unpause()
		} else {
			w.paused--
		}
	}
}

// wait counts to the end of a turn.
func (w *weave) wait() {
	if w.waits--; w.waits <= 0 && w.over != nil {
		w.over()
	}
}

// unpause ends the administrator's pause, if there is one.
func (w *weave) unpause() {
	for w.paused > 0 && w.m.Hypervisor().Unpause() != nil {
	}
	w.paused = 0
}

// change registers a probe, or unregisters one or switches one off or on.
func (w *weave) change() {
	w.mu.Lock()
	n, i := w.r.IntN(8), 0
	var p *woven
	if len(w.probes) > 0 {
		i = w.r.IntN(len(w.probes))
		p = w.probes[i]
	}
	w.mu.Unlock()
	switch {
	case n < 2:
		w.register(w.followed())
	case n < 4 || p == nil:
		w.register(w.plain())
	case n < 6:
		err := w.e.Unregister(p.Probe)
		w.e.Quiesce(p.Probe)
		if err != nil && !w.failures {
			w.t.Errorf("unregister: %v", err)
		}
		if !w.e.Registered(p.Probe) {
			w.mu.Lock()
			w.probes = slices.DeleteFunc(w.probes, func(q *woven) bool { return q == p })
			w.acts = slices.DeleteFunc(w.acts, func(x *act) bool { return x.of == p }) // nothing is told of them
			if w.r.IntN(3) > 0 {
				p = nil
			}
			w.mu.Unlock()
			if p != nil {
				w.register(p) // once more
			}
		}
	default:
		p.SetEnabled(!p.Enabled())
	}
}

func (w *weave) register(p *woven) (ok bool) {
	if p == nil {
		return false
	}
	err := w.e.Register(p.Probe)
	w.mu.Lock()
	defer w.mu.Unlock()
	if !slices.Contains(w.all, p) {
		w.all = append(w.all, p)
	}
	if err != nil {
		return false
	}
	w.probes = append(w.probes, p)
	return true
}

// plain returns a plain probe, which likely is where calls begin or end.
func (w *weave) plain() *woven {
	w.mu.Lock()
	defer w.mu.Unlock()
	var addr uint64
	fs := w.m.Functions()
	switch f := fs[w.r.IntN(len(fs))]; w.r.IntN(4) {
	case 0:
		addr = f.Entry
	case 1:
		if len(f.Exits) > 0 {
			addr = f.Exits[w.r.IntN(len(f.Exits))]
		}
	case 2:
		if len(f.Backs) > 0 {
			addr = f.Backs[w.r.IntN(len(f.Backs))]
		}
	}
	if addr == 0 {
		insns := w.m.Insns()
		addr = insns[w.r.IntN(len(insns))].VA
	}
	if addr == w.m.Symbol("int3_entry") || isOwn(w.m, addr) { // see TestEveryInstruction
		return nil
	}
	p := &woven{Probe: &breakpoint.Probe{Addr: addr}}
	p.Pre = func(*breakpoint.Context) breakpoint.Verdict {
		w.mu.Lock()
		p.pre++
		w.mu.Unlock()
		return w.verdict()
	}
	if w.r.IntN(2) == 0 {
		p.Post = func(*breakpoint.Context) breakpoint.Verdict { return w.verdict() }
	}
	return p
}

// verdict is what a handler does at its end.
func (w *weave) verdict() breakpoint.Verdict {
	w.meanwhile(30)
	if w.gaps && w.chance(40) {
		return 1
	}
	return breakpoint.Continue
}

// hardest are functions that are probed more often than others.
var hardest = append([]string{"call_blocker", "inner", "wrap", "bare_ret", "call_leaf", "leaf"}, followAll...)

// followed returns a return probe.
func (w *weave) followed() *woven {
	w.mu.Lock()
	defer w.mu.Unlock()
	fs := w.m.Functions()
	f := fs[w.r.IntN(len(fs))]
	if w.r.IntN(4) > 0 {
		f = w.m.Function(hardest[w.r.IntN(len(hardest))])
	}
	if isOwn(w.m, f.Entry) {
		return nil
	}
	exits, open := w.m.Exits(f.Name)
	ret := &breakpoint.Returns{
		Follow: breakpoint.Follow(w.r.IntN(3)), ExitsFirst: w.r.IntN(3) == 0, Exits: exits,
		TailsTo: func(fn uint64) bool { return w.m.TailsTo(f.Entry, fn) },
	}
	if open {
		ret.Exits, ret.NoExits = nil, errors.New("an indirect jump")
	}
	if w.small && w.r.IntN(2) == 0 {
		ret.MaxActive = 1 + w.r.IntN(3)
	}
	p := &woven{Probe: &breakpoint.Probe{Addr: f.Entry, Ret: ret}, f: f, ret: true}
	ignores := w.r.IntN(3) == 0
	p.Pre = func(c *breakpoint.Context) breakpoint.Verdict {
		if a := c.Call; a == nil || a.Slot != c.Regs.SP || c.Regs.IP != f.Entry || c.Return || a.Probe != p.Probe {
			w.t.Errorf("%s: entry %+v with %+v", f.Name, a, c.Regs)
		}
		w.entered(p, c.Call, ignores)
		return w.verdict()
	}
	ret.Return = func(c *breakpoint.Context) breakpoint.Verdict {
		a := c.Call
		if at := c.Regs.SP - 8; !c.Return || at != a.Slot && (c.Regs.SP != a.Slot || !slices.Contains(w.exits, c.Regs.IP)) {
			w.t.Errorf("%s: returns at %#x with stack pointer %#x, slot %#x", f.Name, c.Regs.IP, c.Regs.SP, a.Slot)
		}
		if f.Values != nil && !slices.Contains(f.Values, c.Regs.AX) {
			w.t.Errorf("%s: returns %#x", f.Name, c.Regs.AX)
		}
		w.returned(p, a)
		return w.verdict()
	}
	ret.Abandoned = func(a *breakpoint.Activation, why error) breakpoint.Verdict {
		w.lost(p, a, why)
		return w.verdict()
	}
	return p
}

func (w *weave) entered(p *woven, a *breakpoint.Activation, ignores bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	p.pre++
	w.seq++
	if ignores && w.r.IntN(3) == 0 {
		p.ignored++
		a.Ignore()
		return
	}
	x := &act{Activation: a, of: p, seq: w.seq}
	a.Data = x
	w.acts = append(w.acts, x)
}

// take takes an activation that has ended out of the test's books.
func (w *weave) take(p *woven, a *breakpoint.Activation, how string) *act {
	x, _ := a.Data.(*act)
	i := slices.Index(w.acts, x)
	if i < 0 || x.Activation != a || x.of != p {
		w.problem("%s: %s, but it wasn't under way: %+v", p.f.Name, how, a)
		return nil
	}
	w.acts = slices.Delete(w.acts, i, i+1)
	return x
}

// destiny is how a call ends: it returns, never does, or that isn't known as its task isn't.
type destiny uint8

const (
	returns destiny = iota
	never
	unknown
)

func destinyOf(f xentest.Function, a *breakpoint.Activation) destiny {
	switch f.Name {
	case "lj_mid", "lj_deep":
		return never
	case "victim", "yield":
		switch {
		case a.Task.Addr == 0:
			return unknown
		case a.Task.ID >= 1<<24: // a mortal
			return never
		}
	}
	return returns
}

func (w *weave) returned(p *woven, a *breakpoint.Activation) {
	w.mu.Lock()
	defer w.mu.Unlock()
	p.returned++
	x := w.take(p, a, "returned")
	if x == nil {
		return
	}
	if destinyOf(p.f, a) == never {
		w.problem("%s: a false return: %+v", p.f.Name, a)
	}
	if x.passed != "" {
		w.problem("%s: a call returns after one around it, of %s: %+v", p.f.Name, x.passed, a)
	}
	for _, y := range w.acts {
		in := a.Task.Addr != 0 && a.Task.Addr == y.Task.Addr && a.Task.ID == y.Task.ID && y.Slot >= a.Task.StackLow
		if in && (y.Slot < a.Slot || y.Slot == a.Slot && y.seq > x.seq) && y.passed == "" {
			y.passed = p.f.Name
		}
	}
}

func (w *weave) lost(p *woven, a *breakpoint.Activation, why error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	p.abandoned++
	w.take(p, a, "abandoned")
	switch {
	case errors.Is(why, breakpoint.ErrUnwound) || errors.Is(why, breakpoint.ErrTaskGone):
		if destinyOf(p.f, a) == returns {
			w.problem("%s: a false abandoned, %v: %+v", p.f.Name, why, a)
		}
	case errors.Is(why, breakpoint.ErrNotServed):
		if !w.gaps && !w.failures && !w.hard {
			w.problem("%s: %v, in a round without gaps: %+v", p.f.Name, why, a)
		}
	case w.failures || w.hard:
	default:
		w.problem("%s: abandoned, %v: %+v", p.f.Name, why, a)
	}
	if strings.Contains(why.Error(), "%!") {
		w.problem("%s: abandoned: %v", p.f.Name, why)
	}
}

// begin registers the probes that stay, before the guest runs.
func (w *weave) begin() {
	for range 1 + w.int(6) {
		if p := w.followed(); p != nil && w.register(p) {
			w.stays = append(w.stays, p)
		}
	}
	for range w.int(3) {
		if p := w.plain(); p != nil && w.register(p) {
			w.stays = append(w.stays, p)
		}
	}
	for _, p := range w.stays {
		p.base = w.m.Executed(p.Addr)
	}
	w.probes = nil // nobody touches them
}

// serve serves once, and notes a failure.
func (w *weave) serve(ctx context.Context, live bool) {
	_, err := w.e.Serve(ctx, live)
	if err != nil && ctx.Err() == nil {
		w.mu.Lock()
		w.failed = true
		w.mu.Unlock()
		if !w.failures && !w.hard {
			w.t.Errorf("serve: %v", err)
		}
	}
}

// alone lets a guest run that nobody else executes, until it is at rest, or somewhere in
// the middle.
func (w *weave) alone(quit bool) {
	n := 100 + w.int(400)
	for w.gaps && n > 0 {
		k := min(n, 1+w.int(60))
		n -= k
		w.turn(k, true)
		if w.chance(2) {
			w.turn(1+w.int(20), false)
		}
	}
	if n = max(n, 1); quit {
		w.turn(n, true)
		w.unpause()
		return
	}
	// The end of Serve is a gap, too, so the last one goes on until the guest is at rest.
	w.resting = true
	w.turn(n, true)
	w.settled = true
	w.turn(2, true) // tells what is known by now
}

// turn serves until so many times nothing was there, or eight stops were.
func (w *weave) turn(waits int, live bool) {
	ctx, cancel := context.WithCancel(w.t.Context())
	defer cancel()
	w.waits, w.over = waits, func() {
		if w.resting && !w.m.Parked() && w.m.Oops() == "" {
			w.unpause()
			w.changes, w.admin = false, false
			w.m.Park()
			return
		}
		cancel()
	}
	for ctx.Err() == nil {
		w.serve(ctx, live)
	}
	w.over = nil
}

// free lets a guest run that runs by itself, until it is at rest, or somewhere in the middle.
func (w *weave) free(quit bool) {
	turns := 1
	if w.gaps {
		turns += w.int(4)
	}
	for i := range turns {
		ctx, cancel := context.WithCancel(w.t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			for ctx.Err() == nil {
				w.serve(ctx, true)
			}
		}()
		for range 1 + w.int(60) {
			w.between(false)
			time.Sleep(time.Duration(w.int(300)) * time.Microsecond)
		}
		w.unpause()
		if i == turns-1 && !quit {
			quiesce(w.t, w.m)
		}
		cancel()
		<-done
		if w.gaps && i < turns-1 {
			ctx, cancel := context.WithTimeout(w.t.Context(), time.Duration(w.int(2000))*time.Microsecond)
			w.serve(ctx, false)
			cancel()
		}
	}
	if w.settled = true; !quit { // tells what is known by now
		ctx, cancel := context.WithTimeout(w.t.Context(), 5*time.Millisecond)
		w.serve(ctx, true)
		cancel()
	}
}

// end compares, if the guest is at rest, and leaves it.
func (w *weave) end(quit bool) {
	w.changes = false
	w.m.FailAll(nil)
	if !quit {
		w.check()
	}
	// Some failures may be to come yet.
	for begin := time.Now(); !w.e.Left() && time.Since(begin) < patience/4; {
		if err := w.e.Close(); err != nil && !w.failures {
			w.t.Errorf("close: %v", err)
		}
	}
	if !w.e.Left() {
		w.t.Error("Close hasn't left the guest")
	}
	for _, p := range w.all {
		w.equation(p)
		if c := w.counts(p); p.ret && c.Active != 0 {
			w.t.Errorf("%s: %+v after Close", p.f.Name, c)
		}
	}
}

func (w *weave) counts(p *woven) breakpoint.Counts {
	if !p.ret {
		return breakpoint.Counts{}
	}
	return w.e.Counts(p.Probe)
}

// equation looks whether what has become of the calls of a probe adds up.
func (w *weave) equation(p *woven) {
	if p.Pre != nil && p.pre != p.Hits() {
		w.t.Errorf("%s at %#x: %d Pre handlers, %d hits", p.f.Name, p.Addr, p.pre, p.Hits())
	}
	if !p.ret {
		return
	}
	c := w.counts(p)
	name := p.f.Name
	ended := c.Ignored + c.Returned + c.Abandoned + c.Dropped
	assert.Equal(w.t, p.Hits(), ended+uint64(c.Active), "%s: %+v", name, c)
	assert.GreaterOrEqual(w.t, c.Active, 0, name)
	// One whose probe its handler has unregistered before it ignored it counts as dropped.
	assert.LessOrEqual(w.t, c.Ignored, p.ignored, name)
	assert.Equal(w.t, p.returned, c.Returned, name)
	assert.LessOrEqual(w.t, p.abandoned, c.Abandoned, name)
}

// check compares with what the guest has counted, which is at rest.
func (w *weave) check() {
	for _, p := range w.all {
		w.equation(p)
	}
	for _, p := range w.stays {
		if !p.Armed() {
			if !w.hard && !w.failures {
				w.t.Errorf("%#x isn't armed", p.Addr)
			}
			continue // there was no way past it any more, and Serve said so
		}
		n := w.m.Executed(p.Addr) - p.base
		if n != p.Hits()+p.Missed() || w.clean() && p.Missed() > 0 {
			w.t.Errorf("%s at %#x: executed %d times, hits %d, missed %d, %+v", p.f.Name, p.Addr, n, p.Hits(), p.Missed(), w.counts(p))
		}
		if p.ret {
			w.checkUnderWay(p)
		}
	}
	if w.clean() {
		for _, p := range slices.Concat(w.all, w.stays) {
			if err := w.e.Unregister(p.Probe); err != nil {
				w.t.Errorf("unregister: %v", err)
			}
		}
		if s := w.e.Sites(); len(s) > 0 {
			w.t.Errorf("breakpoints after Unregister: %+v", s)
		}
	}
}

// checkUnderWay looks whether the calls of a probe that stays, which nothing was told of yet,
// are under way in the guest.
func (w *weave) checkUnderWay(p *woven) {
	w.mu.Lock()
	defer w.mu.Unlock()
	c := w.counts(p)
	told := 0
	slots := map[uint64]bool{}
	for _, x := range w.acts {
		if x.of != p {
			continue
		}
		told++
		// A call whose task wasn't known when it began isn't found by its stack.
		if x.passed != "" && !w.noTask {
			w.problem("%s: a call of %s around it has returned, and it hasn't ended: %+v", p.f.Name, x.passed, x.Activation)
		}
		// The indirect jump of lj_deep may be to itself, for all that the engine knows.
		if slots[x.Slot] && p.f.Name != "lj_deep" {
			w.problem("%s: two calls at one place, %+v is one, %+v", p.f.Name, x.Activation, c)
		}
		slots[x.Slot] = true
		if destinyOf(p.f, x.Activation) != returns {
			continue
		}
		b := w.m.Peek(x.Slot, 8)
		ret := uint64(0)
		for i, v := range b {
			ret |= uint64(v) << (8 * i)
		}
		if ret != x.Return {
			w.problem("%s: it has returned, and nobody was told: %+v, there is %#x, %+v", p.f.Name, x.Activation, ret, c)
		}
	}
	if told != c.Active {
		w.problem("%s: %d calls haven't ended, %+v", p.f.Name, told, c)
	}
	if inside := w.m.Inside(p.f.Name); p.f.Values != nil && destinyOf(p.f, &breakpoint.Activation{}) == returns && uint64(c.Active) > inside {
		w.problem("%s: %d calls are under way, %+v", p.f.Name, inside, c)
	}
	_, returned, unwound, died := w.m.Returns(p.f.Name)
	if p.f.Values != nil && (c.Returned > returned || c.Abandoned > unwound+died && w.clean()) {
		w.problem("%s: %d returned, %d were unwound past, %d died, %+v", p.f.Name, returned, unwound, died, c)
	}
}
