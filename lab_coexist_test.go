package vmprobes_test

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes"
	"github.com/vmprobes/vmprobes/lab/labguest"
)

// All functions of the kernel's fs/ stand from the first to before the second one.
const fsFirst, fsBehind = "generic_file_open", "pstore_register"

// inOpen are functions that an openat and a close run through, in Linux 6.1 and 6.12,
// of which a kernel inlines some: those that they run through once, whatever else goes
// on. Two kinds are left out, since the guest's own kprobes count other numbers of them
// as well, without a probe of ours:
//   - What looks the path up, in path_openat, is done a second time where the guest
//     mounts something meanwhile (do_filp_open, fs/namei.c), as it does when it is told
//     to trace: 8,514 calls in 8,512 rounds of the load.
//   - What gives a file up is done by whoever has it last (__fput): a process that is
//     started meanwhile may be. 116,216 calls in 116,224 rounds, with 40 processes.
var inOpen = []string{
	"do_sys_openat2", "do_filp_open", "may_open", "vfs_open", "do_dentry_open", "fd_install", "putname", "security_file_open",
	"file_ra_state_init", "alloc_fd", "get_unused_fd_flags", "__x64_sys_openat", "__x64_sys_close", "filp_close", "filp_flush",
	"close_fd", "file_close_fd", "pick_file", "locks_remove_posix", "getname", "getname_flags.part.0", "dnotify_flush",
	"security_file_post_open", "apparmor_file_open", "ima_file_check", "inode_to_bdi",
}

// sharedPlaces is how many functions are probed by both sides.
const sharedPlaces = 20

// A loadProbe counts its hits by the threads that make the guest's load: others
// run the probed functions too.
type loadProbe struct {
	vmprobes.Probe
	threads      atomic.Pointer[[]int]
	perOpen      uint64 // calls that one round of the load makes
	hits, failed atomic.Uint64
}

func (t labTest) loadProbe(symbol string) *loadProbe {
	t.Helper()
	return loadProbeOf(t.threads(), symbol)
}

func loadProbeOf(threads []int, symbol string) *loadProbe {
	p := &loadProbe{Probe: vmprobes.Probe{Symbol: symbol}, perOpen: 1}
	p.threads.Store(&threads)
	p.Pre = func(_ *vmprobes.Probe, r *vmprobes.Regs) vmprobes.Action {
		task, err := r.Task()
		switch {
		case err != nil:
			p.failed.Add(1)
		case slices.Contains(*p.threads.Load(), task.PID):
			p.hits.Add(1)
		}
		return vmprobes.Continue
	}
	return p
}

// sawAll checks that p counted the calls of so many rounds of the load, and that
// nothing escaped the handlers.
func (p *loadProbe) sawAll(t testing.TB, total uint64) {
	t.Helper()
	assert.Equal(t, total*p.perOpen, p.hits.Load(), "hits at %s of %d rounds of the load", p.Symbol, total)
	assert.Zero(t, p.failed.Load(), "hits at %s whose task couldn't be told", p.Symbol)
	assert.Zero(t, p.Stats().Missed, "hits at %s that no handler saw", p.Symbol)
}

// threads are those that make the guest's load.
func (t labTest) threads() (threads []int) {
	t.Helper()
	reply := t.ask("threads")
	for cpu := 0; strings.Contains(reply, fmt.Sprintf(" cpu%d=", cpu)); cpu++ {
		threads = append(threads, int(number(t, reply, fmt.Sprintf("cpu%d", cpu))))
	}
	require.NotEmpty(t, threads)
	return threads
}

// kprobeHits are the hits of the guest's own kprobes by the threads of its load.
func (t labTest) kprobeHits() map[string]uint64 {
	t.Helper()
	threads := t.threads()
	reply, lines, err := t.g.Output(t.Context(), "kprobes counts")
	require.NoError(t, err)
	assert.Equal(t, "0", field(t, reply, "missed"), "hits that the guest's own kprobes missed")
	hits := map[string]uint64{}
	for _, line := range lines {
		f := strings.Fields(line)
		for _, one := range f[1:] {
			thread, n, _ := strings.Cut(one, ":")
			id, err := strconv.Atoi(thread)
			require.NoError(t, err, line)
			count, err := strconv.ParseUint(n, 10, 64)
			require.NoError(t, err, line)
			if slices.Contains(threads, id) {
				hits[f[0]] += count
			}
		}
	}
	return hits
}

// sharedProbes returns probes at functions that the load calls the same number of
// times in each round, as the guest's own kprobes tell.
func (t labTest) sharedProbes() (probes []*loadProbe) {
	t.Helper()
	const rounds = 20
	threads := t.threads()
	var there []string
	for _, name := range inOpen {
		if _, err := t.g.Command(t.Context(), "kallsyms "+name); err == nil {
			there = append(there, name)
		}
	}
	t.ask("kprobes on %s", strings.Join(there, " "))
	total := number(t, t.ask("open %d all", rounds), "total")
	hits := t.kprobeHits()
	t.ask("kprobes off")
	for _, name := range there {
		n := hits[name]
		if n == 0 || n%total != 0 || len(probes) == sharedPlaces {
			continue
		}
		p := loadProbeOf(threads, name)
		p.perOpen = n / total
		probes = append(probes, p)
	}
	require.Len(t, probes, sharedPlaces, "functions that the load calls a fixed number of times: %v of %v", hits, total)
	return probes
}

// debugging has processes debugged in the guest: n system calls stepped through,
// and n breakpoints and n watchpoints of each kind hit.
func (t labTest) debugging(n int) {
	t.Helper()
	reply := t.ask("breaks %d", n)
	assert.EqualValues(t, n, number(t, reply, "hits"), reply)
	assert.Contains(t, reply, "others=0 status=0")
	reply = t.ask("steps %d", n)
	assert.Equal(t, number(t, reply, "want"), number(t, reply, "made"), reply)
	assert.Contains(t, reply, "others=0")
	t.watching(n)
}

func (t labTest) watching(n int) {
	t.Helper()
	reply := t.ask("watch %d", n)
	assert.EqualValues(t, n, number(t, reply, "kernel"), reply)
	assert.EqualValues(t, n, number(t, reply, "user"), reply)
	assert.Contains(t, reply, "odd=0 others=0 status=0")
}

// ftraceWorks checks that the guest can trace a function, and traces it.
func (t labTest) ftraceWorks() {
	t.Helper()
	assert.Equal(t, "yes", field(t, t.ask("ftrace %s", probed), "alive"))
	t.ask("open 10 0")
	reply := t.ask("ftrace off")
	assert.Equal(t, "yes", field(t, reply, "alive"), "ftrace in the guest: %s", reply)
	assert.GreaterOrEqual(t, number(t, reply, "calls"), uint64(10), "calls of %s traced in the guest", probed)
}

// rewriting has the guest rewrite its text in every way that it has: function
// tracing of all of fs/, kprobes at functions, static keys and static calls of
// trace events, and code of modules. Between that, between is called.
func (t labTest) rewriting(functions []string, between func()) {
	t.Helper()
	on := func() {
		reply := t.ask("ftrace %s %s", fsFirst, fsBehind)
		require.Equal(t, "yes", field(t, reply, "alive"), reply)
		assert.Greater(t, number(t, reply, "enabled"), uint64(1000), "functions of fs/ that are traced")
	}
	off := func() {
		assert.Equal(t, "yes", field(t, t.ask("ftrace off"), "alive"))
	}
	on()
	between()
	t.ask("kprobes on %s", strings.Join(functions, " "))
	t.ask("event sched on") // static keys and static calls of many functions
	off()
	between()
	t.ask("event xdp/xdp_exception on") // one in tun, too
	t.ask("reload 1")
	on()
	t.ask("event xdp/xdp_exception off")
	t.ask("kprobes off")
	t.ask("event sched off")
	off()
	t.ask("reload 1")
}

// onOneProcessor has a guest's vCPUs take turns on one processor of the host pv. On two,
// QEMU's TCG may go on executing what one of them has replaced in the other's text, and a
// guest that rewrites its text under load doesn't survive that, with or without a
// session: without one, putting and removing 14 kprobes under load, one stood at an int3
// of __schedule for ever in its 14th change, and another one called address 0 in its 4th.
// On one processor it made all 22.
var onOneProcessor = []string{`cpus = "1"`}

// TestLabCoexist has probes served under load, while in the guest a process is
// debugged and the kernel rewrites its text at the same functions.
func TestLabCoexist(t *testing.T) {
	labguest.Require(t, "pv", "hvm")
	for _, cfg := range matrix() {
		if cfg.VCPUs < 2 {
			continue
		}
		if labguest.Is("pv") {
			cfg.Extra = onOneProcessor
		}
		t.Run(guestName(cfg), func(t *testing.T) { testCoexist(startGuest(t, cfg)) })
	}
}

func guestName(cfg labguest.Config) string {
	return fmt.Sprintf("%s-%s-%dvcpu", cfg.Kind, cfg.Kernel, cfg.VCPUs)
}

// startGuest starts a guest that lives as long as the test.
func startGuest(t *testing.T, cfg labguest.Config) labTest {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	g, err := labguest.Start(ctx, cfg)
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, g.Destroy()) })
	return labTest{t, g, cfg}
}

func testCoexist(t labTest) {
	rounds, debugged := 5, 200
	if testing.Short() {
		rounds, debugged = 1, 20
	}
	// Under QEMU each hit of a PV guest takes milliseconds, and what the guest does
	// beside the load waits for those of the load as well.
	rest := 0
	if labguest.Is("pv") {
		rest = 3
	}
	began := time.Now()
	lap := func(what string) {
		t.Logf("%.1f s: %s", time.Since(began).Seconds(), what)
	}
	probes := t.sharedProbes()
	names := make([]string, len(probes))
	for i, p := range probes {
		names[i] = p.Symbol
	}
	lap("functions chosen")

	// Everything once without a probe: it works in this guest, and what the kernel
	// does to its text at the first time only is done.
	t.rewriting(names, func() { t.debugging(debugged) })
	t.ftraceWorks()
	time.Sleep(2 * time.Second) // a static key of perf stays on for a second
	t.keepText()
	lap("without probes")

	s := t.open(nil)
	for _, p := range probes {
		require.NoError(t, s.Register(&p.Probe))
	}
	var total uint64
	serve(t, s, func() {
		before := number(t, t.ask("count"), "total")
		t.ask("busy 0 all %d", rest)
		for i := range rounds {
			t.rewriting(names, func() { t.debugging(debugged) })
			lap(fmt.Sprintf("round %d with probes under load", i))
		}
		reply := t.ask("stop")
		assert.NotContains(t, reply, "BAD")
		assert.Equal(t, "0", field(t, reply, "failed"))
		total = number(t, reply, "total") - before

		// Both sides count the same calls, with the function tracer at them as well.
		t.ask("kprobes on %s", strings.Join(names, " "))
		t.ask("ftrace %s %s", fsFirst, fsBehind)
		n := number(t, t.ask("open 10 all"), "total")
		hits := t.kprobeHits()
		t.ask("ftrace off")
		t.ask("kprobes off")
		total += n
		want := map[string]uint64{}
		for _, p := range probes {
			want[p.Symbol] = n * p.perOpen
		}
		assert.Equal(t, want, hits, "hits of the guest's own kprobes")
		lap("kprobes and probes compared")
	})
	for _, p := range probes {
		p.sawAll(t, total)
	}
	t.Logf("%d rounds of the load; %+v", total, s.Stats())
	require.NoError(t, s.Close())
	t.ftraceWorks()
	t.unharmed()
	lap("without probes again")
}
