package vmprobes_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes"
	"github.com/vmprobes/vmprobes/internal/x86"
	"github.com/vmprobes/vmprobes/lab/labguest"
	"github.com/vmprobes/vmprobes/linux"
	"github.com/vmprobes/vmprobes/xenctrl"
)

// TestLabEnds has a test for each row of "Ends of a guest" in docs/survival.md that xl can
// bring about, and for a guest's beginning. The rows of pauses, of vCPUs that come, of xl
// save -c and of two tools are tests of TestLabFaults.
func TestLabEnds(t *testing.T) {
	labguest.Require(t, "pv", "hvm")
	for _, cfg := range matrix() {
		if cfg.VCPUs < 2 {
			continue
		}
		t.Run(guestName(cfg), func(t *testing.T) {
			t.Run("Boot", func(t *testing.T) { testBoot(t, cfg) })
			for _, end := range []string{"shutdown", "crash", "destroy"} {
				t.Run(end, func(t *testing.T) { testEndOfGuest(t, cfg, end) })
			}
			t.Run("reboot", func(t *testing.T) { testReboot(t, cfg) })
			t.Run("save", func(t *testing.T) { testSave(t, cfg) })
			lt := startGuest(t, cfg)
			lt.keepText()
			for _, c := range []struct {
				name string
				test func(labTest)
			}{
				{"rename", testRename},
				{"balloon", testBalloon},
				{"module", testModule},
				{"xenstored", testXenstored},
				{"another tool", testAnotherTool},
				{"unplug", testUnplug},
			} {
				t.Run(c.name, func(t *testing.T) {
					mine := lt
					mine.T = t
					require.Contains(t, mine.answers(), "ping", "the guest was hurt before")
					t.Cleanup(func() {
						if t.Failed() { // its load may run still, and fail what follows
							_, _ = lt.g.Command(context.Background(), "stop")
						}
					})
					c.test(mine)
				})
			}
		})
	}
}

// testBoot arms probes in a domain that was created paused, and compares the hits with
// what each boot of the kernel does.
func testBoot(t *testing.T, cfg labguest.Config) {
	cfg.Name = "a3paused"
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Minute)
	defer cancel()
	g, err := labguest.StartPaused(ctx, cfg)
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, g.Destroy()) })
	lt := labTest{t, g, cfg}
	if cfg.Kind != labguest.PV {
		_, err := vmprobes.Open(ctx, g.Name(), nil)
		require.ErrorIs(t, err, vmprobes.ErrDomainPaused)
		require.ErrorContains(t, err, "has never run")
		require.Zero(t, lt.domain().CPUTime)
		xl(t, "unpause", g.Name())
		require.NoError(t, g.Booted(ctx))
		require.NoError(t, lt.open(nil).Close())
		return
	}
	// A tool that dies before the guest has run leaves nothing in it either.
	cmd := exec.Command(os.Args[0], "-test.run=^TestBootChild$")
	cmd.Env = append(os.Environ(), "VMPROBES_TEST_DOMAIN="+g.Name(), "VMPROBES_TEST_CHILD=boot")
	out := start(t, cmd, "begins\n")
	// Nothing of a kernel that hasn't run is in the cache, and the emulator is slow.
	require.Eventually(t, func() bool { return strings.Contains(out.String(), "registered\n") }, 4*time.Minute, 10*time.Millisecond, "%s", out)
	require.NoError(t, cmd.Process.Kill())
	<-out.done
	journalOf := fmt.Sprintf("/run/vmprobes/domain-%d.journal", g.DomID())
	require.Eventually(t, func() bool {
		_, err := os.Stat(journalOf)
		return errors.Is(err, os.ErrNotExist)
	}, 20*time.Second, time.Millisecond, "the guardian doesn't repair the guest; its log:\n%s", guardianLog())
	require.Zero(t, lt.domain().CPUTime, "the guest has run")
	require.Equal(t, xenctrl.DomainPaused, lt.domain().Flags&(xenctrl.DomainPaused|xenctrl.DomainDebugged))

	s := lt.open(nil)
	k := s.Guest().Linux()
	for _, r := range k.Explain() {
		t.Log(r)
	}
	var mu sync.Mutex
	var order []string
	before := func(name string) (n int) { // hits of initcalls before the first of another
		mu.Lock()
		defer mu.Unlock()
		for _, o := range order {
			if o == name {
				return n
			}
			if o == "do_one_initcall" {
				n++
			}
		}
		return -1
	}
	probes := map[string]*vmprobes.Probe{}
	probe := func(name string, offset uint64) *vmprobes.Probe {
		return &vmprobes.Probe{Symbol: name, Offset: offset, Pre: func(*vmprobes.Probe, *vmprobes.Regs) vmprobes.Action {
			mu.Lock()
			defer mu.Unlock()
			if offset == 0 {
				order = append(order, name)
			}
			return vmprobes.Continue
		}}
	}
	for _, name := range []string{"rest_init", "kernel_init", "do_one_initcall", probed} {
		probes[name] = probe(name, 0)
		require.NoError(t, s.Register(probes[name]), name)
	}
	// One whose instruction the processor must execute, in a slot of a kernel that has not
	// booted.
	stepped := firstStepped(t, s, []string{"do_one_initcall", "driver_register", "bus_add_driver", "kernel_init", "rest_init"}, probe)
	entry := &vmprobes.Probe{Symbol: stepped.Symbol}
	require.NoError(t, s.Register(entry))
	require.ErrorIs(t, s.Register(&vmprobes.Probe{Symbol: "start_kernel"}), vmprobes.ErrNotProbeable, "init code, which is freed")
	accepted := sampleOfPlaces(t, s, k)

	start, err := s.Lookup("__initcall_start")
	require.NoError(t, err)
	end, err := s.Lookup("__initcall_end")
	require.NoError(t, err)
	initcalls := int(end-start) / 4 // of initcall_entry_t, a 32-bit distance (include/linux/init.h)
	require.Zero(t, lt.domain().CPUTime, "the guest has run")
	require.NotZero(t, lt.domain().Flags&xenctrl.DomainPaused)

	began := time.Now()
	serve(t, s, func() {
		xl(t, "unpause", g.Name())
		require.NoError(t, g.Booted(ctx))
	})
	modules := 0
	for _, l := range lt.lines("modules") {
		if len(strings.Fields(l)) > 0 {
			modules++
		}
	}
	mu.Lock()
	t.Logf("%d hits in %v of boot: %v; %+v", len(order), time.Since(began).Round(time.Millisecond), order[:3], s.Stats())
	require.Equal(t, []string{"rest_init", "kernel_init", "do_one_initcall"}, order[:3])
	mu.Unlock()
	assert.Equal(t, vmprobes.Stats{Hits: 1}, probes["rest_init"].Stats())
	assert.Equal(t, vmprobes.Stats{Hits: 1}, probes["kernel_init"].Stats())
	assert.Equal(t, initcalls, before(probed), "initcalls before the first file is opened, of the table's %d", initcalls)
	calls := probes["do_one_initcall"].Stats()
	assert.Zero(t, calls.Missed)
	assert.GreaterOrEqual(t, calls.Hits, uint64(initcalls))
	assert.LessOrEqual(t, calls.Hits, uint64(initcalls+modules), "initcalls, and those of %d modules", modules)
	assert.Positive(t, entry.Stats().Hits)
	assert.Equal(t, entry.Stats(), stepped.Stats(), "%v, executed once a call", stepped)
	t.Logf("%v: %d hits; %d initcalls of %d in the table, %d modules", stepped, stepped.Stats().Hits, calls.Hits, initcalls, modules)

	// What could have been probed is as it was.
	changed := 0
	for addr, code := range accepted {
		now := make([]byte, len(code))
		_, err := s.ReadMemory(addr, now)
		require.NoError(t, err)
		if !slices.Equal(code, now) {
			changed++
			name, off, _ := s.Symbolize(addr)
			t.Errorf("%s+%#x, where a probe was allowed: % x before booting, % x after", name, off, code, now)
		}
	}
	t.Logf("%d of %d places that were allowed before booting were rewritten", changed, len(accepted))

	// It is a session like any other now.
	late := lt.loadProbe("vfs_open")
	require.NoError(t, s.Register(&late.Probe))
	serve(t, s, func() { late.sawAll(t, number(t, lt.ask("open 20 all"), "total")) })
	_, own := k.Settled()
	assert.True(t, own, "the kernel's own page tables are known by now")
	require.NoError(t, s.Close())
	lt.keepText()
	lt.ftraceWorks()
	assert.NotRegexp(t, `Oops|BUG|WARNING|panic`, g.Console())
	lt.unhurt()
}

// TestBootChild is the tool that testBoot kills.
func TestBootChild(t *testing.T) {
	if os.Getenv("VMPROBES_TEST_CHILD") != "boot" {
		t.Skip("only as a child process of TestLabEnds")
	}
	fmt.Println("begins")
	s, err := vmprobes.Open(t.Context(), os.Getenv("VMPROBES_TEST_DOMAIN"), nil)
	require.NoError(t, err)
	require.NoError(t, s.Register(&vmprobes.Probe{Symbol: "do_one_initcall"}, &vmprobes.Probe{Symbol: probed}))
	fmt.Println("registered")
	require.NoError(t, s.Loop(t.Context()))
}

// firstStepped registers a probe at the first instruction that isn't emulated, of the
// first function that has one before its first conditional branch.
func firstStepped(t testing.TB, s *vmprobes.Session, functions []string, probe func(string, uint64) *vmprobes.Probe) *vmprobes.Probe {
	t.Helper()
	for _, function := range functions {
		addr, err := s.Lookup(function)
		require.NoError(t, err)
		code := make([]byte, 256)
		_, err = s.ReadMemory(addr, code)
		require.NoError(t, err)
		for off := 0; off < len(code)-x86.MaxLen; {
			in, err := x86.Decode(code[off:])
			require.NoError(t, err)
			if in.Branches() && in.Bytes()[0] != 0xe8 { // a call returns
				break
			}
			if !in.CanEmulate() && !in.IsNop() && in.CanStep() == nil && !in.Branches() && !in.Repeats() {
				p := probe(function, uint64(off))
				if s.Register(p) == nil {
					return p
				}
			}
			off += in.Len
		}
	}
	t.Fatalf("no instruction at the beginning of %v must be stepped", functions)
	return nil
}

// sampleOfPlaces returns instructions, of functions all over the kernel, at which a probe
// may be.
func sampleOfPlaces(t testing.TB, s *vmprobes.Session, k *linux.Kernel) map[vmprobes.Addr][]byte {
	t.Helper()
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 0))
	start, err := s.Lookup("_stext")
	require.NoError(t, err)
	end, err := s.Lookup("_etext")
	require.NoError(t, err)
	functions := 300
	if testing.Short() {
		functions = 100
	}
	accepted := map[vmprobes.Addr][]byte{}
	refused := 0
	for range functions {
		at := start + r.Uint64N(end-start)
		sym, off, ok := k.Symbols().Find(at)
		if !ok || off > 4096 {
			continue
		}
		stop, ok := k.Symbols().FuncEnd(sym.Addr)
		if !ok || stop-sym.Addr > 8192 {
			continue
		}
		code := make([]byte, stop-sym.Addr)
		if _, err := s.ReadMemory(sym.Addr, code); err != nil {
			continue
		}
		for off := 0; off < len(code); {
			in, err := x86.Decode(code[off:])
			if err != nil {
				break
			}
			addr := sym.Addr + uint64(off)
			if at, err := k.Place(addr, linux.Placing{}); err != nil {
				refused++
			} else if at == addr {
				accepted[addr] = slices.Clone(in.Bytes())
			}
			off += in.Len
		}
	}
	t.Logf("seed %#x: %d places of %d functions allowed, %d refused", seed, len(accepted), functions, refused)
	require.Greater(t, len(accepted), 10*functions)
	return accepted
}

// ended runs a busy guest's probe while f ends the guest, and checks what the session
// says.
func (t labTest) ended(end string, f func()) {
	t.Helper()
	s, err := vmprobes.Open(t.Context(), t.g.Name(), nil)
	require.NoError(t, err)
	p := &vmprobes.Probe{Symbol: probed}
	require.NoError(t, s.Register(p))
	journalOf := fmt.Sprintf("/run/vmprobes/domain-%d.journal", t.g.(*labguest.Guest).DomID())
	require.FileExists(t, journalOf)
	done := make(chan error, 1)
	go func() { done <- s.Loop(t.Context()) }()
	looping(t, s)
	t.ask("busy 0 all")
	require.Eventually(t, func() bool { return p.Stats().Hits > 20 }, time.Minute, 10*time.Millisecond)
	began := time.Now()
	f()
	select {
	case err := <-done:
		require.ErrorIs(t, err, vmprobes.ErrDomainGone)
	case <-time.After(3 * time.Minute):
		t.Fatalf("Loop goes on; domain state %#x; the guest:\n%s", t.domain().Flags, tail(t.g.Console(), 2000))
	}
	t.Logf("%s: Loop ended after %v, with %d hits", end, time.Since(began).Round(time.Millisecond), p.Stats().Hits)
	require.NoError(t, s.Close(), "there is nothing to restore")
	assert.NoFileExists(t, journalOf)
}

// testEndOfGuest ends a guest that keeps its domain, or doesn't.
func testEndOfGuest(t *testing.T, cfg labguest.Config, end string) {
	cfg.Name = "a3" + end
	cfg.Cmdline = "sysrq_always_enabled"
	lt := startGuest(t, cfg)
	gone := vmprobes.ErrDomainGone
	lt.ended(end, func() {
		switch end {
		case "shutdown":
			lt.later("poweroff")
		case "crash":
			xl(t, "sysrq", lt.g.Name(), "c")
		case "destroy":
			require.NoError(t, lt.g.(*labguest.Guest).Destroy())
			gone = vmprobes.ErrDomainNotFound
		}
	})
	_, err := vmprobes.Open(t.Context(), cfg.Name, nil)
	require.ErrorIs(t, err, gone)
	if end == "crash" {
		assert.Contains(t, lt.g.Console(), "sysrq triggered crash")
		assert.NotRegexp(t, `int3|invalid opcode`, lt.g.Console())
	}
}

// testReboot: what comes after a reboot is another domain, of the same name.
func testReboot(t *testing.T, cfg labguest.Config) {
	cfg.Name, cfg.Restart = "a3reboot", true
	lt := startGuest(t, cfg)
	g := lt.g.(*labguest.Guest)
	lt.ended("reboot", func() { xl(t, "reboot", cfg.Name) })
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	var next *labguest.Guest
	require.Eventually(t, func() bool {
		// It may find the one that is about to go, which gets no console any more.
		short, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		n, err := labguest.Find(short, cfg)
		if err == nil && n.DomID() != g.DomID() {
			next = n
			return true
		}
		if err == nil {
			n.Leave()
		}
		return false
	}, 2*time.Minute, 100*time.Millisecond, "no domain after the reboot")
	require.NoError(t, next.Booted(ctx))
	after := labTest{t, next, cfg}
	s := after.open(nil)
	p := after.loadProbe(probed)
	require.NoError(t, s.Register(&p.Probe))
	serve(t, s, func() { p.sawAll(t, number(t, after.ask("open 20 all"), "total")) })
	require.NoError(t, s.Close())
	require.Zero(t, number(t, after.ask("dmesg"), "bad"))
}

// exact checks that a session counts as it should, with what goes on meanwhile.
func (t labTest) exact(s *vmprobes.Session, p *loadProbe, when string, meanwhile func()) {
	t.Helper()
	before := p.hits.Load()
	serve(t, s, func() {
		start := number(t, t.ask("count"), "total")
		t.ask("busy 0 all")
		time.Sleep(200 * time.Millisecond)
		meanwhile()
		time.Sleep(200 * time.Millisecond)
		reply := t.ask("stop")
		assert.NotContains(t, reply, "BAD", when)
		assert.Equal(t, number(t, reply, "total")-start, p.hits.Load()-before, "hits, %s", when)
	})
	assert.Zero(t, p.failed.Load()+p.Stats().Missed, when)
}

func testRename(t labTest) {
	s := t.open(nil)
	p := t.loadProbe(probed)
	require.NoError(t, s.Register(&p.Probe))
	name := t.g.Name()
	const other = "a3renamed"
	t.exact(s, p, "while it is renamed", func() { xl(t, "rename", name, other) })
	defer xl(t, "rename", other, name)
	require.NoError(t, s.Close())
	_, err := vmprobes.Open(t.Context(), name, nil)
	require.ErrorIs(t, err, vmprobes.ErrDomainNotFound)
	s, err = vmprobes.Open(t.Context(), other, nil)
	require.NoError(t, err)
	require.NoError(t, s.Close())
	t.unhurt()
}

// testBalloon: memory goes and comes while the guest's is read.
func testBalloon(t labTest) {
	s := t.open(nil)
	p := t.loadProbe(probed)
	count, wrong := p.Pre, 0
	p.Pre = func(q *vmprobes.Probe, r *vmprobes.Regs) vmprobes.Action {
		if name, err := q.ReadString(r.Arg(1), 256); err != nil || name == "" {
			wrong++
		}
		return count(q, r)
	}
	require.NoError(t, s.Register(&p.Probe))
	pages := t.domain().TotalPages
	t.exact(s, p, "while memory goes and comes", func() {
		// How far the guest gets below that depends on what it needs for itself.
		for _, mb := range []uint64{220, 256, 200, 256} {
			xl(t, "mem-set", t.g.Name(), fmt.Sprint(mb))
			now := uint64(0)
			if !assert.Eventually(t, func() bool {
				now = t.domain().TotalPages >> 8
				return now <= mb+4 && now+8 >= mb
			}, 2*time.Minute, 20*time.Millisecond) {
				t.Errorf("the guest has %d MB, and not %d; before %d", now, mb, pages>>8)
			}
		}
	})
	assert.Zero(t, wrong, "names that could not be read")
	tasks, err := s.Guest().Linux().Processes(false)
	require.NoError(t, err)
	assert.NotEmpty(t, tasks)
	require.NoError(t, s.Close())
	t.unhurt()
}

// testModule: a module is unloaded with a probe in it, and loaded again.
func testModule(t labTest) {
	s := t.open(nil)
	syms, err := s.Guest().Linux().ModuleSymbols()
	require.NoError(t, err)
	var probes []*vmprobes.Probe
	for _, sym := range syms {
		p := &vmprobes.Probe{Addr: sym.Addr}
		if sym.Type|0x20 == 't' && len(probes) < 10 && s.Register(p) == nil {
			probes = append(probes, p)
		}
	}
	require.NotEmpty(t, probes)
	// It goes on while those are gone.
	other := &vmprobes.Probe{Symbol: "do_sys_openat2"}
	require.NoError(t, s.Register(other))
	serve(t, s, func() { t.ask("reload 1") })
	require.NoError(t, s.Unregister(other))
	for _, p := range probes {
		assert.ErrorIs(t, s.Unregister(p), vmprobes.ErrTextChanged)
		assert.Zero(t, p.Flags()&vmprobes.FlagArmed)
	}
	require.NoError(t, s.Close())
	t.keepText()
	t.unhurt()
}

// testXenstored: a session needs no xenstore once it is open.
func testXenstored(t labTest) {
	s := t.open(nil)
	p := t.loadProbe(probed)
	require.NoError(t, s.Register(&p.Probe))
	pid := processOf(t, "xenstored")
	require.NoError(t, exec.Command("kill", "-STOP", pid).Run())
	stopped := true
	resume := func() {
		if stopped {
			assert.NoError(t, exec.Command("kill", "-CONT", pid).Run())
			stopped = false
		}
	}
	defer resume()
	// The guest's console isn't xenstore's.
	t.exact(s, p, "while xenstored stands still", func() { time.Sleep(time.Second) })
	require.NoError(t, s.Close())
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	opened := make(chan error, 1)
	go func() {
		s, err := vmprobes.Open(ctx, t.g.Name(), nil)
		if err == nil {
			err = errors.Join(errors.New("it was opened"), s.Close())
		}
		opened <- err
	}()
	select {
	case err := <-opened:
		require.ErrorIs(t, err, context.DeadlineExceeded)
	case <-time.After(10 * time.Second):
		t.Error("Open waits for xenstored beyond its context")
	}
	resume()
	s = t.open(nil)
	require.NoError(t, s.Close())
	t.unhurt()
}

// processOf returns the id of the one process of that name.
func processOf(t testing.TB, name string) string {
	t.Helper()
	all, err := filepath.Glob("/proc/[0-9]*/comm")
	require.NoError(t, err)
	for _, file := range all {
		if b, err := os.ReadFile(file); err == nil && strings.TrimSpace(string(b)) == name {
			return filepath.Base(filepath.Dir(file))
		}
	}
	t.Fatalf("no process is called %s", name)
	return ""
}

// testAnotherTool: a second tool that isn't vmprobes comes, and goes.
func testAnotherTool(t labTest) {
	h, err := xenctrl.Open()
	require.NoError(t, err)
	defer h.Close()
	id := xenctrl.DomID(t.g.(*labguest.Guest).DomID())
	if t.cfg.Kind == labguest.PV {
		// One was there first.
		require.NoError(t, h.SetDebugging(id, true))
		_, err := vmprobes.Open(t.Context(), t.g.Name(), nil)
		require.ErrorIs(t, err, vmprobes.ErrBusy)
		require.NoError(t, h.SetDebugging(id, false))
	}
	s := t.open(nil)
	p := t.loadProbe(probed)
	require.NoError(t, s.Register(&p.Probe))
	if t.cfg.Kind != labguest.PV {
		t.exact(s, p, "while another monitor is refused", func() {
			_, err := h.OpenMonitor(id)
			assert.ErrorIs(t, err, xenctrl.ErrBusy)
		})
		require.NoError(t, s.Close())
		t.unhurt()
		return
	}
	// Xen lets a second debugger in, which takes the first one off as it leaves: with no
	// debugger a PV guest would die at the next hit. Nothing hits here meanwhile.
	done := make(chan error, 1)
	go func() { done <- s.Loop(t.Context()) }()
	looping(t, s)
	require.NoError(t, h.SetDebugging(id, true))
	require.NoError(t, h.SetDebugging(id, false))
	select {
	case err := <-done:
		require.ErrorIs(t, err, vmprobes.ErrDetached)
		t.Log(err)
	case <-time.After(10 * time.Second):
		t.Error("Loop doesn't notice that the debugger is gone")
	}
	require.NotZero(t, t.domain().Flags&xenctrl.DomainDebugged, "it is attached again")
	t.exact(s, p, "after another debugger has left", func() {})
	require.NoError(t, s.Close())
	require.Zero(t, t.domain().Flags&(xenctrl.DomainDebugged|xenctrl.DomainPaused))
	t.unhurt()
}

// testUnplug: a vCPU is taken away in the middle of hits.
func testUnplug(t labTest) {
	steps := []vmprobes.Stepping{vmprobes.StepAuto}
	if t.cfg.Kind == labguest.PV {
		steps = append(steps, vmprobes.StepInPlace)
	}
	for i, step := range steps {
		s := t.open(&vmprobes.Options{Stepping: step})
		p := t.loadProbe(probed)
		require.NoError(t, s.Register(&p.Probe))
		t.exact(s, p, fmt.Sprintf("while a vCPU goes, stepping %d", step), func() {
			if i > 0 {
				return // it is gone
			}
			xl(t, "vcpu-set", t.g.Name(), "1")
			require.Eventually(t, func() bool { return t.domain().OnlineVCPUs == 1 }, 2*time.Minute, 100*time.Millisecond,
				"the guest keeps its second vCPU")
		})
		require.NoError(t, s.Close())
	}
	t.keepText()
	t.unhurt()
}

// testSave: an image has the breakpoints that the guest had when it was written. One of a
// guest whose session was closed before is as good as any.
func testSave(t *testing.T, cfg labguest.Config) {
	if cfg.Kind != labguest.PV {
		return // those of the lab can't be saved (nomigrate)
	}
	cfg.Name, cfg.MemoryMB = "a3save", 128
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	g, err := labguest.Start(ctx, cfg)
	require.NoError(t, err)
	destroyed := false
	defer func() {
		if !destroyed {
			assert.NoError(t, g.Destroy())
		}
	}()
	image := filepath.Join(t.TempDir(), "image")
	restore := func() labTest {
		xl(t, "restore", "-p", "-e", image)
		require.NoError(t, os.Remove(image))
		if g, err = labguest.Find(ctx, cfg); err != nil {
			t.Fatal(err)
		}
		return labTest{t, g, cfg}
	}
	lt := labTest{t, g, cfg}
	s := lt.open(nil)
	p := lt.loadProbe(probed)
	require.NoError(t, s.Register(&p.Probe))
	serve(t, s, func() { p.sawAll(t, number(t, lt.ask("open 20 all"), "total")) })
	require.NoError(t, s.Close())
	xl(t, "save", cfg.Name, image)

	// The domain that it is now has not run yet, but its kernel has booted.
	lt = restore()
	s = lt.open(nil)
	require.NoError(t, s.Register(&p.Probe))
	var orig, now [16]byte
	at := p.Address()
	_, err = s.ReadMemory(at, orig[:])
	require.NoError(t, err)
	xl(t, "unpause", cfg.Name)
	lt.exact(s, p, "after a restore", func() {})
	lt.keepText()
	lt.unhurt()

	// With a probe in it: the domain is gone for the session, and the image has a byte of
	// its.
	done := make(chan error, 1)
	go func() { done <- s.Loop(t.Context()) }()
	looping(t, s)
	xl(t, "save", cfg.Name, image)
	require.ErrorIs(t, <-done, vmprobes.ErrDomainGone)
	require.NoError(t, s.Close())
	lt = restore()
	s = lt.open(nil)
	_, err = s.ReadMemory(at, now[:])
	require.NoError(t, err)
	assert.NotEqual(t, orig, now)
	assert.Contains(t, string(now[:]), "\xcc", "% x in the image, % x before", now, orig)
	require.NoError(t, s.Close())
	assert.NoError(t, g.Destroy()) // it would die at its next hit
	destroyed = true
}
