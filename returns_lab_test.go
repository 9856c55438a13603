package vmprobes_test

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes"
	"github.com/vmprobes/vmprobes/lab/labguest"
)

// TestLabReturns compares return probes with the guests' own.
func TestLabReturns(t *testing.T) {
	labguest.Require(t, "pv", "hvm")
	for _, cfg := range matrix() {
		t.Run(guestName(cfg), func(t *testing.T) {
			lt := startGuest(t, cfg)
			lt.keepText()
			lt.returns()
			lt.unharmed()
		})
	}
}

// returns runs all that is tested of return probes on a guest.
func (t labTest) returns() {
	for _, c := range []struct {
		name string
		test func(labTest)
	}{
		{"Returns", testReturns},
		{"ReturnsRecursion", testReturnsRecursion},
		{"ReturnsBlocked", testReturnsBlocked},
		{"ReturnsKilled", testReturnsKilled},
		{"ReturnsForks", testReturnsForks},
		{"EarlyReturn", testEarlyReturn},
	} {
		t.Run(c.name, func(tt *testing.T) { c.test(labTest{tt, t.g, t.cfg}) })
	}
}

// Return probes beside the guest's own, which are kretprobe events: first these see a load
// whose calls and results are the same each time, then ours do.

// tally counts calls by function, thread and result.
type tally map[string]map[int]map[uint64]uint64

func (c tally) add(function string, thread int, result, n uint64) {
	if c[function] == nil {
		c[function] = map[int]map[uint64]uint64{}
	}
	if c[function][thread] == nil {
		c[function][thread] = map[uint64]uint64{}
	}
	c[function][thread][result] += n
}

// times returns what is counted when all is done n times.
func (c tally) times(n uint64) tally {
	out := tally{}
	for f, threads := range c {
		for id, results := range threads {
			for r, calls := range results {
				out.add(f, id, r, n*calls)
			}
		}
	}
	return out
}

func (c tally) total() (n uint64) {
	for _, threads := range c {
		for _, results := range threads {
			for _, calls := range results {
				n += calls
			}
		}
	}
	return n
}

// orders are the returns of each thread, as they came.
type orders map[int][]string

func (o orders) add(thread int, function string, result uint64) {
	o[thread] = append(o[thread], fmt.Sprintf("%s = %d", function, int64(result)))
}

// mostInOrder is of how many calls the guest tells the order.
const mostInOrder = 2000

// kretprobes has the guest's own kretprobes see a load, and returns what they saw of the
// threads that make it.
func (t labTest) kretprobes(functions []string, load func()) (tally, orders) {
	t.Helper()
	threads := t.threads()
	t.ask("kretprobes on %s", strings.Join(functions, " "))
	load()
	reply, lines, err := t.g.Output(t.Context(), "kretprobes counts")
	require.NoError(t, err)
	assert.Equal(t, "0", field(t, reply, "missed"), "returns that the guest's own kretprobes missed")
	counts, order := tally{}, orders{}
	number := func(s string) uint64 {
		n, err := strconv.ParseUint(s, 10, 64)
		require.NoError(t, err)
		return n
	}
	for _, line := range lines {
		f := strings.Fields(line)
		for _, one := range f[1:] {
			part := strings.Split(one, ":")
			require.Len(t, part, 3, line)
			if id := int(number(part[0])); slices.Contains(threads, id) {
				counts.add(f[0], id, number(part[1]), number(part[2]))
			}
		}
	}
	if counts.total() < mostInOrder {
		for _, line := range t.lines("kretprobes order") {
			f := strings.Fields(line)
			require.Len(t, f, 3, line)
			if id := int(number(f[0])); slices.Contains(threads, id) {
				order.add(id, f[1], number(f[2]))
			}
		}
	}
	t.ask("kretprobes off")
	return counts, order
}

// followed is what return probes of a session see. Its handlers run in one goroutine.
type followed struct {
	t       testing.TB
	probes  []*vmprobes.ReturnProbe
	threads []int // whose calls are counted
	counts  tally
	order   orders
	depths  map[int]uint64
	ends    map[int]map[string][]string // by thread and function: how each call ended
	under   map[*vmprobes.Activation]bool
	longest []time.Duration // of calls of half a second and more
	strange []string        // what must not be
}

// follow makes return probes at functions.
func (t labTest) follow(functions ...string) *followed {
	t.Helper()
	f := &followed{t: t, threads: t.threads(), under: map[*vmprobes.Activation]bool{}}
	f.forget()
	for _, name := range functions {
		f.probes = append(f.probes, &vmprobes.ReturnProbe{
			Symbol: name,
			Entry: func(a *vmprobes.Activation, r *vmprobes.Regs) vmprobes.Action {
				f.under[a] = true
				if _, _, known := a.Task(); !known {
					f.odd("%s: nobody knows whose call it is", name)
				}
				if at := a.Probe().Address(); a.Entry().PC() != r.PC() || a.Slot() != r.SP || at == 0 {
					f.odd("%s at %#x: entered at %#x with RSP %#x, slot %#x", name, at, a.Entry().PC(), r.SP, a.Slot())
				}
				return vmprobes.Continue
			},
			Return: func(a *vmprobes.Activation, r *vmprobes.Regs) vmprobes.Action {
				f.end(name, a, fmt.Sprint(int64(r.Result())))
				_, pid, _ := a.Task()
				if a.Duration() >= time.Second/2 {
					f.longest = append(f.longest, a.Duration())
				}
				if task, err := r.Task(); err != nil || task.PID != pid {
					f.odd("%s: called by %d, returned by %v (%v)", name, pid, task, err)
				}
				if slices.Contains(f.threads, pid) {
					f.counts.add(name, pid, r.Result(), 1)
					f.order.add(pid, name, r.Result())
					f.depths[a.Depth()]++
				}
				return vmprobes.Continue
			},
			Abandoned: func(a *vmprobes.Activation, why error) vmprobes.Action {
				f.end(name, a, why.Error())
				if !errors.Is(why, vmprobes.ErrTaskGone) && !errors.Is(why, vmprobes.ErrUnwound) {
					f.odd("%s: abandoned: %v", name, why)
				}
				return vmprobes.Continue
			},
		})
	}
	return f
}

// serve serves what load does, and what the guest's init does until it waits for the next
// command: its reads would be missed.
func (f *followed) serve(s *vmprobes.Session, load func()) {
	f.t.Helper()
	serve(f.t, s, func() {
		load()
		time.Sleep(time.Second / 2)
	})
}

func (f *followed) odd(format string, args ...any) {
	if len(f.strange) < 20 {
		f.strange = append(f.strange, fmt.Sprintf(format, args...))
	}
}

// end notes how a call ended.
func (f *followed) end(name string, a *vmprobes.Activation, how string) {
	if !f.under[a] {
		f.odd("%s: a call that isn't under way ends: %s", name, how)
	}
	delete(f.under, a)
	_, pid, _ := a.Task()
	if f.ends[pid] == nil {
		f.ends[pid] = map[string][]string{}
	}
	f.ends[pid][name] = append(f.ends[pid][name], how)
}

// forget begins anew, with calls that may be under way.
func (f *followed) forget() {
	f.counts, f.order, f.depths, f.ends, f.longest = tally{}, orders{}, map[int]uint64{}, map[int]map[string][]string{}, nil
}

func (f *followed) register(s *vmprobes.Session) {
	f.t.Helper()
	for _, p := range f.probes {
		require.NoError(f.t, s.Register(p.Probe()), p.Symbol)
	}
}

// stats returns the counters of the probe at a function.
func (f *followed) stats(name string) vmprobes.Stats {
	i := slices.IndexFunc(f.probes, func(p *vmprobes.ReturnProbe) bool { return p.Symbol == name })
	return f.probes[i].Probe().Stats()
}

// settled checks the probes' counters beside each other, and that nothing was strange or
// missed. What is under way may go on.
func (f *followed) settled(s *vmprobes.Session) {
	f.t.Helper()
	for _, p := range f.probes {
		st := p.Probe().Stats()
		f.t.Logf("%s: %+v", p.Symbol, st)
		assert.Equal(f.t, st.Hits, st.Returned+st.Abandoned+st.Ignored+st.Dropped+uint64(st.Active), "calls of %s, and what became of them: %+v", p.Symbol, st)
		assert.Zero(f.t, st.Missed, "calls of %s that weren't followed", p.Symbol)
	}
	assert.Empty(f.t, f.strange)
	f.t.Logf("%+v", s.Stats())
}

// calls is how many calls to follow, if VMPROBES_TEST_CALLS doesn't say. An emulated
// hypervisor takes milliseconds for one, as does QEMU, which before 10.2 throws away all that
// it has translated at each stop.
func (t labTest) calls() int {
	if n, err := strconv.Atoi(os.Getenv("VMPROBES_TEST_CALLS")); err == nil {
		return n
	}
	switch {
	case testing.Short() && labguest.Is("hvm"):
		return 200
	case testing.Short() || labguest.Host() == "":
		return 1000
	case labguest.Is("hvm"):
		return 2000
	}
	return 10000
}

// same fails if two tallies differ.
func (t labTest) same(want, got tally, what string) {
	t.Helper()
	if !assert.Equal(t, want, got, "%s: calls by function, thread and result; first the guest's own kretprobes", what) {
		t.Logf("of %d calls %d", want.total(), got.total())
	}
}

// sameOrder fails if two orders differ, with where.
func (t labTest) sameOrder(want, got orders) {
	t.Helper()
	assert.Len(t, got, len(want), "threads with returns")
	for thread, w := range want {
		g := got[thread]
		n := 0
		for n < min(len(w), len(g)) && w[n] == g[n] {
			n++
		}
		if n < len(w) || n < len(g) {
			t.Errorf("thread %d: the guest's own kretprobes saw %d returns and ours %d; the first %d are the same, then come\n%q\n%q",
				thread, len(w), len(g), n, w[n:min(n+5, len(w))], g[n:min(n+5, len(g))])
		}
	}
}

// testReturns compares calls, results and their order with the guest's own.
func testReturns(t labTest) {
	// The last two share a return address: one ends in a jump to the other.
	functions := []string{"do_sys_openat2", "vfs_read", "ksys_read", "__x64_sys_read"}
	const short, callsPerRound = 5, 2 + 4 + 5 + 5
	load := func(rounds int) {
		const most = 50 // the guest is to answer within a minute
		for ; rounds > 0; rounds -= most {
			reply := t.ask("reads %d all", min(rounds, most))
			assert.Equal(t, "0", field(t, reply, "wrong"), reply)
		}
	}
	load(1)
	want, order := t.kretprobes(functions, func() { load(short) })
	require.EqualValues(t, short*callsPerRound*t.cfg.VCPUs, want.total(), "%v", want)
	rounds := (t.calls() + callsPerRound*t.cfg.VCPUs - 1) / (callsPerRound * t.cfg.VCPUs) / short * short
	guests, _ := t.kretprobes(functions, func() { load(rounds) })
	t.same(want.times(uint64(rounds/short)), guests, "the load's rounds are equal")

	s := t.open(nil)
	f := t.follow(functions...)
	f.register(s)
	f.serve(s, func() { load(short) })
	t.same(want, f.counts, "a short run")
	t.sameOrder(order, f.order)
	f.settled(s)

	f.forget()
	began := time.Now()
	f.serve(s, func() { load(rounds) })
	took := time.Since(began)
	t.same(guests, f.counts, "a long run")
	f.settled(s)
	t.Logf("%d calls in %.1f s: %.0f a second", guests.total(), took.Seconds(), float64(guests.total())/took.Seconds())
	for _, name := range functions {
		assert.Zero(t, f.stats(name).Abandoned, name)
	}
	require.NoError(t, s.Close())
	t.sameText()
}

// testReturnsRecursion follows a function that calls itself through others.
func testReturnsRecursion(t labTest) {
	functions := []string{"ep_poll_callback"}
	n := 100
	if testing.Short() || t.patched() {
		n = 20
	}
	var depth uint64
	load := func() { depth = number(t, t.ask("recurse %d all", n), "depth") }
	load()
	want, order := t.kretprobes(functions, load)
	require.EqualValues(t, depth*uint64(n*t.cfg.VCPUs), want.total(), "the guest's own kretprobes: %v", want)
	s := t.open(nil)
	f := t.follow(functions...)
	f.register(s)
	f.serve(s, load)
	t.same(want, f.counts, "recursion")
	t.sameOrder(order, f.order)
	f.settled(s)
	depths := map[int]uint64{}
	for i := range int(depth) {
		depths[i] = uint64(n * t.cfg.VCPUs)
	}
	assert.Equal(t, depths, f.depths, "calls by how many are under way around them")
	require.NoError(t, s.Close())
}

// testReturnsBlocked has calls that take a second, while others make other system calls: the
// guest isn't stopped at the returns of those, though all system calls return to one address.
func testReturnsBlocked(t labTest) {
	const name, threads = "__x64_sys_read", 4
	rounds := 3
	if testing.Short() {
		rounds = 1
	}
	s := t.open(nil)
	f := t.follow(name)
	f.register(s)
	var before, after uint64
	f.serve(s, func() {
		before = number(t, t.ask("count"), "total")
		t.ask("busy 0 all")
		for range rounds {
			reply := t.ask("block %d 1", threads)
			assert.EqualValues(t, threads, number(t, reply, "returned"), reply)
		}
		reply := t.ask("stop")
		after = number(t, reply, "total")
		assert.NotContains(t, reply, "BAD")
		t.ask("reads 50 all") // some hundred stops, of which one may be another's
	})
	f.settled(s)
	st := f.stats(name)
	stops := s.Stats().Hits
	assert.Equal(t, vmprobes.AtExits, st.Follow)
	assert.LessOrEqual(t, 100*st.Foreign, stops, "stops at returns of others, of all stops")
	assert.GreaterOrEqual(t, len(f.longest), threads*rounds, "calls that took half a second and more")
	assert.Greater(t, after-before, uint64(100), "calls of others meanwhile")
	t.Logf("%d calls, %d stops of others, %d stops in all, %d other system calls; %d blocked: %v",
		st.Hits, st.Foreign, stops, 2*(after-before), len(f.longest), f.longest)
}

// testReturnsKilled has tasks killed in a call, which then returns, and in get_signal, which
// never does.
func testReturnsKilled(t labTest) {
	const call, signal = "__x64_sys_read", "get_signal"
	processes, rounds := 25, 3
	if testing.Short() || t.patched() {
		processes = 10
	}
	if testing.Short() {
		rounds = 1
	}
	s := t.open(nil)
	require.ErrorIs(t, s.Register((&vmprobes.ReturnProbe{Symbol: "do_group_exit"}).Probe()), vmprobes.ErrNeverReturns)
	f := t.follow(call, signal)
	f.register(s)
	var pids []int
	f.serve(s, func() {
		for range rounds {
			reply, lines, err := t.g.Output(t.Context(), fmt.Sprintf("blockkill %d", processes))
			require.NoError(t, err)
			assert.EqualValues(t, processes, number(t, reply, "killed"), reply)
			for _, line := range lines {
				pid, err := strconv.Atoi(line)
				require.NoError(t, err)
				pids = append(pids, pid)
			}
		}
		began := time.Now()
		require.Eventually(t, func() bool {
			st := f.stats(signal)
			return st.Abandoned >= uint64(len(pids)) && st.Active == 0
		}, time.Minute, 20*time.Millisecond, "%v: %+v", signal, f.stats(signal))
		took := time.Since(began)
		t.Logf("%d calls are known to have ended after %v", len(pids), took)
		assert.Less(t, took, 10*time.Second)
	})
	f.settled(s)
	require.Len(t, pids, processes*rounds)
	for _, pid := range pids {
		assert.Equal(t, []string{"-512"}, f.ends[pid][call], "%d was killed in %s, which returns ERESTARTSYS", pid, call)
		if assert.Len(t, f.ends[pid][signal], 1, "%d was killed in %s", pid, signal) {
			assert.Regexp(t, "its task is gone|its stack was unwound past it", f.ends[pid][signal][0], "%d", pid)
		}
	}
	assert.Zero(t, f.stats(call).Abandoned)
}

// testReturnsForks starts processes as fast as the guest can, each with the task_struct and the
// stack of one that has ended before.
func testReturnsForks(t labTest) {
	const fork, make, wake = "kernel_clone", "copy_process", "wake_up_new_task"
	atLeast := uint64(200)
	switch {
	case testing.Short():
		atLeast = 20
	case t.patched():
		atLeast = 100
	}
	s := t.open(nil)
	f := t.follow(fork, make, wake)
	f.register(s)
	forks := uint64(0)
	f.serve(s, func() {
		t.ask("storm forks")
		for forks < atLeast {
			time.Sleep(time.Second)
			forks += number(t, t.ask("storm"), "forks")
		}
		forks += number(t, t.ask("storm off"), "forks")
	})
	f.settled(s)
	made, again := map[string]uint64{}, map[string]uint64{}
	for _, ends := range f.ends {
		for name, how := range ends {
			for _, result := range how {
				// A signal that comes meanwhile has the call made again (ERESTARTNOINTR).
				if n, err := strconv.ParseInt(result, 10, 64); assert.NoError(t, err) && int32(n) == -513 {
					again[name]++
				} else {
					made[name]++
				}
			}
		}
	}
	t.Logf("%d processes; calls: %v; %v to be made again", forks, made, again)
	assert.GreaterOrEqual(t, made[fork], forks)
	assert.LessOrEqual(t, made[fork], forks+20, "threads of init are made, too")
	assert.Equal(t, made[fork], made[make])
	assert.Equal(t, made[fork], made[wake])
	assert.Equal(t, again[fork], again[make])
	for _, name := range []string{fork, make, wake} {
		st := f.stats(name)
		assert.Equal(t, st.Hits, st.Returned, "%s: %+v", name, st)
	}
}

// testEarlyReturn has a function return before its first instruction, for one file.
func testEarlyReturn(t labTest) {
	const denied, eperm = "/proc/self/status", 1
	s := t.open(nil)
	var bad error
	deny := func(p *vmprobes.Probe, r *vmprobes.Regs) vmprobes.Action {
		if name, err := p.ReadString(r.Arg(1), 256); err == nil && name == denied {
			bad = r.Return(^uint64(eperm) + 1)
		}
		return vmprobes.Continue
	}
	p := &vmprobes.Probe{Symbol: probed, Pre: deny}
	require.NoError(t, s.Register(p))
	serve(t, s, func() { assert.Contains(t, t.ask("openpath %s", denied), "opened") })
	require.ErrorIs(t, bad, vmprobes.ErrNoErrorInjection, "Debian's kernels list no functions")
	require.NoError(t, s.Close())

	s = t.open(&vmprobes.Options{AllowReturn: true})
	var skipped, others int
	rp := &vmprobes.ReturnProbe{Symbol: probed, Return: func(a *vmprobes.Activation, r *vmprobes.Regs) vmprobes.Action {
		switch {
		case !a.Skipped():
			others++
		case int64(r.Result()) == -eperm:
			skipped++
		}
		return vmprobes.Continue
	}}
	later := &vmprobes.Probe{Symbol: probed, Pre: func(*vmprobes.Probe, *vmprobes.Regs) vmprobes.Action { return vmprobes.Continue }}
	bad = nil
	require.NoError(t, s.Register(rp.Probe(), p, later))
	const rounds = 20
	serve(t, s, func() {
		for range rounds {
			assert.Contains(t, t.ask("openpath %s", denied), fmt.Sprintf("failed errno=%d", eperm))
			assert.Contains(t, t.ask("openpath /proc/self/stat"), "opened")
			assert.Contains(t, t.ask("openpath /no-such-file"), "failed errno=2")
		}
		reply := t.ask("reads 10 all")
		assert.Equal(t, "0", field(t, reply, "wrong"), reply)
	})
	require.NoError(t, bad)
	assert.Equal(t, rounds, skipped)
	assert.Equal(t, 2*rounds+20*t.cfg.VCPUs, others)
	assert.EqualValues(t, rounds, later.Stats().Skipped)
	assert.EqualValues(t, others, later.Stats().Hits)
	st := rp.Probe().Stats()
	assert.EqualValues(t, skipped+others, st.Returned, "%+v", st)
	assert.Equal(t, st.Hits, st.Returned, "%+v", st)
	require.NoError(t, s.Close())
	assert.Contains(t, t.ask("openpath %s", denied), "opened")
	t.sameText()
}
