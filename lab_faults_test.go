package vmprobes_test

import (
	"bufio"
	"bytes"
	"context"
	endian "encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes"
	"github.com/vmprobes/vmprobes/internal/x86"
	"github.com/vmprobes/vmprobes/lab/labguest"
	"github.com/vmprobes/vmprobes/xenctrl"
)

// TestLabFaults has a test for each way in which a probe, a tool or an
// administrator once brought a guest down or left it standing. The last one of a
// guest leaves it dead.
func TestLabFaults(t *testing.T) {
	labguest.Require(t, "pv", "hvm")
	// Where each makes sense, and where it is part of a short run: Bochs is slow.
	const pv, hvm = "pv", "hvm"
	both := []string{pv, hvm}
	// skip skips a test where it makes no sense, or takes too long.
	skip := func(t *testing.T, hosts, short []string) {
		if !slices.ContainsFunc(hosts, labguest.Is) {
			t.Skipf("of guests on %s: make lab-test HOSTS=%[1]s runs it", strings.Join(hosts, ", "))
		}
		if testing.Short() && !slices.ContainsFunc(short, labguest.Is) {
			t.Skipf("takes too long for a short run here: make lab-test HOSTS=%s runs it", labguest.Host())
		}
	}
	for _, cfg := range matrix() {
		if cfg.VCPUs < 2 {
			continue
		}
		t.Run(guestName(cfg), func(t *testing.T) {
			lt := startGuest(t, cfg)
			lt.keepText()
			for _, c := range []struct {
				name         string
				hosts, short []string
				test         func(labTest)
			}{
				{"LDT", both, both, testLDT},
				{"JumpLabels", both, both, testJumpLabels},
				{"Ftrace", both, both, testFtrace},
				{"TwoTools", both, []string{pv}, testTwoTools},
				{"Watchpoints", both, []string{pv}, testWatchpoints},
				{"Pause", both, []string{pv}, testPause},
				{"Unpause", []string{pv}, []string{pv}, testUnpause},
				{"RefusedRegisters", []string{pv}, []string{pv}, testRefusedRegisters},
				{"Checkpoint", both, []string{pv}, testCheckpoint},
				{"FromFile", both, []string{pv}, testFromFile},
				{"Stopped", both, both, testStoppedTool},
				{"OpenAtOnce", []string{pv}, []string{pv}, testOpenAtOnce},
				{"Killed", both, both, testKilledTool},
			} {
				t.Run(c.name, func(t *testing.T) {
					skip(t, c.hosts, c.short)
					mine := lt
					mine.T = t
					require.Contains(t, mine.answers(), "ping", "the guest was hurt before")
					c.test(mine)
				})
			}
		})
		for name, step := range map[string]vmprobes.Stepping{"online": vmprobes.StepAuto, "online-inplace": vmprobes.StepInPlace} {
			t.Run(guestName(cfg)+"-"+name, func(t *testing.T) {
				short := []string{pv}
				if step != vmprobes.StepAuto {
					short = nil
				}
				skip(t, both, short)
				cfg := cfg
				cfg.VCPUs, cfg.Extra = 1, []string{"maxvcpus = 2"}
				testOnline(startGuest(t, cfg), step)
			})
		}
	}
}

// answers pings the guest and returns what it says, or the error.
func (t labTest) answers() string { return <-t.later("ping") }

// patience is how long a guest is given that may be dead.
const patience = time.Minute

// later sends a command and returns what comes of it.
func (t labTest) later(format string, args ...any) <-chan string {
	c := make(chan string, 1)
	go func() {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		reply, err := t.g.Command(ctx, fmt.Sprintf(format, args...))
		if err != nil {
			reply = err.Error()
		}
		c <- reply
	}()
	return c
}

// unhurt checks that the guest lives and logs no trouble.
func (t labTest) unhurt() {
	t.Helper()
	require.Contains(t, <-t.later("open 5 all"), "open total=", "each vCPU makes calls; the guest:\n%s", tail(t.g.Console(), 4000))
	t.unharmed()
}

// xl runs an administrator's command.
func xl(t testing.TB, args ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, "xl", args...).CombinedOutput()
	require.NoError(t, err, "xl %s: %s", strings.Join(args, " "), out)
}

// domain is what Xen says of the guest.
func (t labTest) domain() xenctrl.DomainInfo {
	t.Helper()
	h, err := xenctrl.Open()
	require.NoError(t, err)
	defer h.Close()
	d, err := h.Domain(xenctrl.DomID(t.g.(*labguest.Guest).DomID()))
	require.NoError(t, err)
	return d
}

// standsStill checks that the guest is up and doesn't run for a second.
func (t labTest) standsStill(why string) {
	t.Helper()
	before := t.domain()
	time.Sleep(time.Second)
	after := t.domain()
	assert.False(t, after.Gone(), "%s: the guest is down: state %#x", why, after.Flags)
	assert.Equal(t, before.CPUTime, after.CPUTime, "%s: nanoseconds that the guest has run for", why)
}

// testLDT: mov %eax,%ds in flush_ldt is in the exception table, although it has no
// operand in memory. Where it is executed elsewhere its fault is an oops.
func testLDT(t labTest) {
	require.Contains(t, t.ask("ldt"), "before=7 after=0", "without a probe")
	s := t.open(nil)
	function, err := s.Lookup("flush_ldt")
	require.NoError(t, err)
	code := make([]byte, 256)
	_, err = s.ReadMemory(function, code)
	require.NoError(t, err)
	offset := uint64(0)
	for at := 0; at < len(code)-15 && offset == 0; {
		in, err := x86.Decode(code[at:])
		require.NoError(t, err)
		if bytes.Equal(in.Bytes(), []byte{0x8e, 0xd8}) {
			offset = uint64(at)
		}
		at += in.Len
	}
	require.NotZero(t, offset, "mov %%eax,%%ds in flush_ldt: % x", code)
	assert.ErrorIs(t, s.Register(&vmprobes.Probe{Symbol: "flush_ldt", Offset: offset}), vmprobes.ErrNoWayPast)
	entry := &vmprobes.Probe{Symbol: "flush_ldt"}
	require.NoError(t, s.Register(entry))
	serve(t, s, func() {
		for range 5 {
			assert.Contains(t, t.ask("ldt"), "before=7 after=0")
		}
	})
	assert.GreaterOrEqual(t, entry.Stats().Hits, uint64(5))
	require.NoError(t, s.Close())
	t.unhurt()
}

// testJumpLabels: the guest rewrites the jump labels of its modules, too.
func testJumpLabels(t labTest) {
	s := t.open(nil)
	k := s.Guest().Linux()
	types, err := k.Types()
	require.NoError(t, err)
	mods, err := k.Modules()
	require.NoError(t, err)
	labels, accepted := 0, []string(nil)
	for _, m := range mods {
		if m.Name != "tun" {
			continue
		}
		v := types.At(k, "module", m.Addr)
		table, err := v.Field("jump_entries").Pointer()
		require.NoError(t, err)
		n, err := v.Field("num_jump_entries").Uint()
		require.NoError(t, err)
		require.Less(t, n, uint64(1000))
		for i := range n {
			// struct jump_entry (linux/jump_label.h): code and target, relative to
			// themselves, and the key.
			at := table + 16*i
			var b [4]byte
			require.NoError(t, k.Read(at, b[:]))
			site := at + uint64(int64(int32(endian.LittleEndian.Uint32(b[:]))))
			if err := k.Read(site, b[:1]); err != nil {
				continue // of its init code, which is gone
			}
			labels++
			if err := s.Register(&vmprobes.Probe{Addr: vmprobes.Addr(site)}); !errors.Is(err, vmprobes.ErrNotProbeable) {
				accepted = append(accepted, fmt.Sprintf("%#x: %v", site, err))
			}
		}
	}
	assert.Greater(t, labels, 10, "jump labels of tun")
	assert.Empty(t, accepted, "jump labels of tun that aren't refused as no place for a probe")
	// What the labels are for goes on working, beside another probe.
	p := t.loadProbe(probed)
	require.NoError(t, s.Register(&p.Probe))
	serve(t, s, func() {
		t.ask("event xdp/xdp_exception on")
		t.ask("event xdp/xdp_exception off")
	})
	require.NoError(t, s.Close())
	t.unhurt()
}

// testFtrace: the function tracer rewrites the instruction that a function begins
// with, and gives up for good when it finds another one there.
func testFtrace(t labTest) {
	s := t.open(nil)
	addr, err := s.Lookup(probed)
	require.NoError(t, err)
	p := t.loadProbe(probed)
	require.NoError(t, s.Register(&p.Probe))
	assert.Equal(t, addr, p.Address(), "the address that was asked for")
	var total uint64
	serve(t, s, func() {
		load := func() { total += number(t, t.ask("open 20 all"), "total") }
		load()
		for range 3 {
			reply := t.ask("ftrace %s", probed)
			assert.Equal(t, "yes", field(t, reply, "alive"), reply)
			load()
			assert.GreaterOrEqual(t, number(t, t.ask("ftrace off"), "calls"), uint64(40))
			load()
		}
	})
	p.sawAll(t, total)
	// A probe at a function that is traced already, and traced on when it is gone.
	t.ask("ftrace %s", probed)
	q := t.loadProbe(probed)
	require.NoError(t, s.Register(&q.Probe))
	serve(t, s, func() { total = number(t, t.ask("open 20 all"), "total") })
	require.NoError(t, s.Unregister(&q.Probe))
	q.sawAll(t, total)
	require.NoError(t, s.Close())
	t.ask("ftrace off")
	t.ftraceWorks()
	t.unhurt()
}

// testTwoTools: one tool at a time, also where Xen would let a second one in.
func testTwoTools(t labTest) {
	rounds := 5
	if testing.Short() {
		rounds = 2
	}
	for range rounds {
		var wg sync.WaitGroup
		var sessions [2]*vmprobes.Session
		var errs [2]error
		for i := range sessions {
			wg.Go(func() { sessions[i], errs[i] = vmprobes.Open(t.Context(), t.g.Name(), nil) })
		}
		wg.Wait()
		opened := 0
		for i, s := range sessions {
			if s != nil {
				opened++
				assert.NoError(t, s.Close())
			} else {
				assert.ErrorIs(t, errs[i], vmprobes.ErrBusy)
			}
		}
		assert.Equal(t, 1, opened, "sessions that two Opens at once made: %v", errs)
	}
	// Between programs.
	t.ask("busy 0 all")
	cmd := exec.Command(os.Args[0], "-test.run=^TestChild$")
	cmd.Env = append(os.Environ(), "VMPROBES_TEST_CHILD=SIGINT", "VMPROBES_TEST_DOMAIN="+t.g.Name())
	out := start(t, cmd, "hits\n")
	s, err := vmprobes.Open(t.Context(), t.g.Name(), nil)
	assert.ErrorIs(t, err, vmprobes.ErrBusy)
	if s != nil {
		assert.NoError(t, s.Close())
	}
	require.NoError(t, cmd.Process.Signal(syscall.SIGINT))
	require.NoError(t, <-out.done, "%s", out)
	assert.Contains(t, t.ask("stop"), "failed=0")
	t.unhurt()
}

// testWatchpoints: a watchpoint of a user's debugger that the kernel hits on its
// behalf stops a PV guest where it is debugged. It is the guest's, and must cost it
// nothing that matters.
func testWatchpoints(t labTest) {
	const reads = 500 // so many that the start of the process doesn't matter
	var want string
	// watch returns the shortest and the longest time of three.
	watch := func(when string) (least, most time.Duration) {
		for i := range 3 {
			began := time.Now()
			reply := t.ask("watch %d", reads)
			took := time.Since(began)
			if want == "" {
				want = reply
			}
			assert.Equal(t, want, reply, when)
			if i == 0 || took < least {
				least = took
			}
			most = max(most, took)
		}
		assert.Equal(t, "0", field(t, t.ask("dmesg"), "bad"), "signs of trouble in the guest's log after watched reads %s", when)
		return least, most
	}
	t.ask("watch %d", reads) // the first one starts slowly
	_, alone := watch("without a session")
	require.Equal(t, uint64(reads), number(t, want, "kernel"), want)
	s := t.open(nil)
	time.Sleep(1100 * time.Millisecond) // the session is idle then
	idle, _ := watch("with a session and no probe")
	p := t.loadProbe(probed)
	require.NoError(t, s.Register(&p.Probe))
	var served time.Duration
	serve(t, s, func() {
		served, _ = watch("with a probe and a loop")
		p.sawAll(t, number(t, t.ask("open 50 all"), "total"))
	})
	t.Logf("%d watched reads: at most %v without a session, at least %v with an idle one, %v with a loop", reads, alone, idle, served)
	// Each takes a poll, of some milliseconds here. It was fifty times as long when each
	// took ten.
	assert.Less(t, idle, 20*alone, "time for %d watched reads with an idle session", reads)
	assert.Less(t, served, 20*alone, "time for %d watched reads with a loop", reads)
	require.NoError(t, s.Close())

	// The session may end at any moment of it.
	closes := 12
	if testing.Short() {
		closes = 2
	}
	stop, stopped := make(chan struct{}), make(chan string, 1)
	go func() {
		for {
			select {
			case <-stop:
				stopped <- ""
				return
			default:
			}
			if reply := <-t.later("watch %d", reads); reply != want {
				stopped <- reply
				return
			}
		}
	}()
	for i := range closes {
		s, err := vmprobes.Open(t.Context(), t.g.Name(), nil)
		if !assert.NoError(t, err, "session %d", i) {
			break
		}
		time.Sleep(time.Duration(50+37*i) * time.Millisecond)
		assert.NoError(t, s.Close(), "session %d", i)
		for range 5 {
			if !assert.Zero(t, t.domain().Flags&xenctrl.DomainPaused, "session %d left the domain paused", i) {
				xl(t, "unpause", t.g.Name())
				break
			}
			time.Sleep(20 * time.Millisecond)
		}
	}
	close(stop)
	assert.Empty(t, <-stopped, "watched reads while sessions come and go: want %s", want)
	t.unhurt()
}

// testPause: what an administrator has paused stays so until he says otherwise.
func testPause(t labTest) {
	s := t.open(nil)
	p := t.loadProbe(probed)
	require.NoError(t, s.Register(&p.Probe))
	paused := func(what string) {
		t.Helper()
		time.Sleep(300 * time.Millisecond) // in the middle of it
		xl(t, "pause", t.g.Name())
		time.Sleep(300 * time.Millisecond)
		t.standsStill(what + ", paused by xl")
		xl(t, "unpause", t.g.Name())
	}
	serve(t, s, func() {
		before := number(t, t.ask("count"), "total")
		t.ask("busy 0 all")
		for range 3 {
			paused("hits")
		}
		reply := t.ask("stop")
		assert.NotContains(t, reply, "BAD")
		p.sawAll(t, number(t, reply, "total")-before)
	})
	require.NoError(t, s.Unregister(&p.Probe))
	// A user's single steps leave their trace in DR6.
	for _, command := range []string{"steps", "watch"} {
		n := 50
		var want string
		for began := time.Now(); time.Since(began) < 2*time.Second; n *= 2 {
			began = time.Now()
			want = t.ask("%s %d", command, 2*n)
		}
		reply := t.later("%s %d", command, n)
		paused(command)
		assert.Equal(t, want, <-reply, "%s", command)
	}
	require.NoError(t, s.Close())
	t.unhurt()
}

// testUnpause: an administrator unpauses a PV guest while a handler runs, for which
// the guest is paused.
func testUnpause(t labTest) {
	s := t.open(nil)
	p := t.loadProbe(probed)
	count, n := p.Pre, 0
	p.Pre = func(q *vmprobes.Probe, r *vmprobes.Regs) vmprobes.Action {
		if n++; n%5 == 3 {
			if out, err := exec.Command("xl", "unpause", t.g.Name()).CombinedOutput(); err != nil {
				t.Errorf("xl unpause: %v: %s", err, out)
			}
			time.Sleep(100 * time.Millisecond) // for the guest to run into its ruin
		}
		return count(q, r)
	}
	require.NoError(t, s.Register(&p.Probe))
	serve(t, s, func() {
		reply := <-t.later("open 10 all")
		assert.Contains(t, reply, fmt.Sprintf("total=%d ", 10*t.cfg.VCPUs))
		assert.NotContains(t, reply, "BAD")
	})
	p.sawAll(t, uint64(10*t.cfg.VCPUs))
	require.NoError(t, s.Close())
	assert.Zero(t, t.domain().Flags&xenctrl.DomainPaused, "the domain is paused")
	t.unhurt()
}

// testRefusedRegisters: a handler sets a register to what Xen doesn't accept. The
// guest goes on with what it had.
func testRefusedRegisters(t labTest) {
	s := t.open(nil)
	n := 0
	p := &vmprobes.Probe{Symbol: probed, Pre: func(_ *vmprobes.Probe, r *vmprobes.Regs) vmprobes.Action {
		if n++; n == 3 {
			r.SP = 1 << 62 // not canonical
		}
		return vmprobes.Continue
	}}
	require.NoError(t, s.Register(p))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- s.Loop(ctx) }()
	looping(t, s)
	select {
	case reply := <-t.later("open 10 all"):
		assert.Contains(t, reply, fmt.Sprintf("total=%d ", 10*t.cfg.VCPUs))
		assert.NotContains(t, reply, "BAD")
	case <-time.After(30 * time.Second):
		t.Errorf("the guest doesn't go on; domain state %#x", t.domain().Flags)
	}
	cancel()
	if err := <-done; errors.Is(err, context.Canceled) {
		t.Log("Loop went on")
	} else {
		assert.Error(t, err, "Loop's end")
		t.Log("Loop ended:", err)
	}
	assert.Greater(t, n, 2, "hits")
	require.NoError(t, s.Close())
	assert.Zero(t, t.domain().Flags&xenctrl.DomainPaused, "the domain is paused")
	t.unhurt()
}

// testCheckpoint: "xl save -c" suspends the guest, writes it to a file and lets it
// go on.
func testCheckpoint(t labTest) {
	// To resume a PV guest Xen's tools set a context (tools/libs/guest/xg_resume.c),
	// which takes the upper halves of its ymm registers, with us or without.
	t.ask("busy 0 all") // with live ones all the time
	xl(t, "save", "-c", t.g.Name(), "/dev/null")
	loses := strings.Contains(<-t.later("stop"), "ymm=BAD")
	t.Logf("without a session the guest loses ymm registers: %v", loses)
	for _, probes := range []int{0, 1} {
		s := t.open(nil)
		p := t.loadProbe(probed)
		if probes > 0 {
			require.NoError(t, s.Register(&p.Probe))
		} else {
			time.Sleep(1100 * time.Millisecond) // the session is idle then
		}
		during := func() {
			xl(t, "save", "-c", t.g.Name(), "/dev/null")
			// Its own int3s are answered, and ours.
			reply := <-t.later("int3user 20")
			assert.Contains(t, reply, "sent=20 sigtraps=20", "after a checkpoint with %d probes", probes)
			reply = <-t.later("open 20 all")
			assert.Contains(t, reply, fmt.Sprintf("total=%d ", 20*t.cfg.VCPUs), "after a checkpoint with %d probes", probes)
		}
		if probes > 0 {
			serve(t, s, during)
			p.sawAll(t, uint64(20*t.cfg.VCPUs))
		} else {
			during()
			reply := t.ask("ftrace %s", probed) // has int3s in the kernel
			assert.Equal(t, "yes", field(t, reply, "alive"))
			t.ask("ftrace off")
		}
		require.NoError(t, s.Close())
		if loses {
			t.sameText()
			assert.Equal(t, "0", field(t, t.ask("dmesg"), "bad"))
		} else {
			t.unhurt()
		}
	}
}

// testKilledTool kills a tool at random moments, with probes of every kind, and looks
// whether its guest runs on within a second, without anybody's help. In every fourth round
// the guardian is killed first: then the next tool that opens the guest repairs it.
func testKilledTool(t labTest) {
	rounds := map[bool]int{true: 200, false: 50}[labguest.Is("pv")]
	if testing.Short() {
		rounds = 4
	}
	if n, err := strconv.Atoi(os.Getenv("VMPROBES_TEST_ROUNDS")); err == nil {
		rounds = n
	}
	kinds := []string{"auto", "out-of-line", "in-place"}
	if t.cfg.Kind != labguest.PV && t.cfg.VCPUs > 1 {
		kinds = kinds[:2] // its other vCPUs can't be held
	}
	journalOf := fmt.Sprintf("/run/vmprobes/domain-%d.journal", t.g.(*labguest.Guest).DomID())
	var slowest time.Duration
	for i := range rounds {
		t.ask("busy 0 all")
		cmd := exec.Command(os.Args[0], "-test.run=^TestChild$")
		cmd.Env = append(os.Environ(), "VMPROBES_TEST_CHILD=SIGKILL", "VMPROBES_TEST_DOMAIN="+t.g.Name(), "VMPROBES_TEST_STEPPING="+kinds[i%len(kinds)],
			"VMPROBES_TEST_KERNEL="+t.g.KernelPath())
		out := start(t, cmd, "hits\n")
		time.Sleep(time.Duration(rand.IntN(20_000)) * time.Microsecond)
		alone := i%4 == 3
		if alone {
			killGuardian(t)
		}
		require.NoError(t, cmd.Process.Signal(syscall.SIGKILL))
		died := time.Now()
		<-out.done
		if alone {
			t.standsStill("after the tool and its guardian were killed")
			require.FileExists(t, journalOf)
			s := t.open(nil)
			require.NoError(t, s.Close())
		} else {
			require.Eventually(t, func() bool {
				_, err := os.Stat(journalOf)
				return errors.Is(err, os.ErrNotExist)
			}, 20*time.Second, time.Millisecond, "the guardian doesn't repair the guest; its log:\n%s", guardianLog())
			slowest = max(slowest, time.Since(died))
		}
		assert.Zero(t, t.domain().Flags&(xenctrl.DomainPaused|xenctrl.DomainDebugged), "round %d: the domain's flags", i)
		t.runsOn(fmt.Sprintf("round %d, %s", i, kinds[i%len(kinds)]))
		reply := <-t.later("stop")
		require.NotContains(t, reply, "BAD", "round %d, %s", i, kinds[i%len(kinds)])
		t.sameText()
	}
	t.Logf("%d rounds; the slowest repair was over %v after SIGKILL\n%s", rounds, slowest.Round(time.Millisecond), tail(guardianLog(), 600))
	assert.NotRegexp(t, `Oops|BUG|panic`, t.g.Console())
	// A new session counts as ever.
	s := t.open(nil)
	p := &vmprobes.Probe{Symbol: probed}
	require.NoError(t, s.Register(p))
	serve(t, s, func() {
		reply := t.ask("open 20 all")
		assert.Equal(t, number(t, reply, "total"), p.Stats().Hits+p.Stats().Missed)
	})
	t.owner()
}

// sigStop is SIGSTOP of the lab's dom0, a Linux on amd64. This file is built elsewhere, too.
const sigStop = syscall.Signal(19)

// testStoppedTool stops tools with a watchdog. As long as no hit waits they are left alone,
// and so are tools whose guest an administrator has paused. With a hit that waits the
// guest runs on soon, and the tool is no more.
func testStoppedTool(t labTest) {
	rounds := map[bool]int{true: 30, false: 10}[labguest.Host() == "pv"]
	if testing.Short() {
		rounds = 3
	}
	watchdog := 3 * time.Second
	if labguest.Is("hvm") {
		watchdog = 6 * time.Second // where all takes its time
	}
	kinds := []string{"auto", "out-of-line", "in-place"}
	if t.cfg.Kind != labguest.PV && t.cfg.VCPUs > 1 {
		kinds = kinds[:2] // its other vCPUs can't be held
	}
	journalOf := fmt.Sprintf("/run/vmprobes/domain-%d.journal", t.g.(*labguest.Guest).DomID())
	stoppable := func(want string, env ...string) (*exec.Cmd, *proc) {
		cmd := exec.Command(os.Args[0], "-test.run=^TestChild$")
		cmd.Env = append(os.Environ(), append(env, "VMPROBES_TEST_CHILD=SIGKILL", "VMPROBES_TEST_DOMAIN="+t.g.Name(), "VMPROBES_TEST_WATCHDOG="+watchdog.String())...)
		return cmd, start(t, cmd, want)
	}
	lives := func(out *proc, d time.Duration, why string) {
		t.Helper()
		select {
		case err := <-out.done:
			t.Fatalf("the tool was ended (%v), %s:\n%s", err, why, guardianLog())
		case <-time.After(d):
		}
		require.FileExists(t, journalOf, why)
	}
	isEnded := func(out *proc, began time.Time, when string) (took time.Duration) {
		t.Helper()
		select {
		case err := <-out.done:
			var exit *exec.ExitError
			require.ErrorAs(t, err, &exit, when)
			require.Equal(t, syscall.SIGKILL, exit.Sys().(syscall.WaitStatus).Signal(), when)
		case <-time.After(time.Minute):
			t.Fatalf("%s: the tool is not ended; the guardian's log:\n%s", when, guardianLog())
		}
		require.Eventually(t, func() bool {
			_, err := os.Stat(journalOf)
			return errors.Is(err, os.ErrNotExist)
		}, 20*time.Second, time.Millisecond, "%s: the guardian doesn't repair the guest; its log:\n%s", when, guardianLog())
		took = time.Since(began)
		assert.GreaterOrEqual(t, took, watchdog-50*time.Millisecond, "%s: the hit may have been on its way already", when)
		assert.Zero(t, t.domain().Flags&(xenctrl.DomainPaused|xenctrl.DomainDebugged), "%s: the domain's flags", when)
		return took
	}

	cmd, out := stoppable("armed")
	lives(out, 2*watchdog, "it is idle")
	xl(t, "pause", t.g.Name())
	lives(out, 2*watchdog, "an administrator has paused its guest")
	require.NoError(t, cmd.Process.Signal(sigStop))
	lives(out, 2*watchdog, "an administrator has paused its guest, and it is stopped")
	xl(t, "unpause", t.g.Name())
	lives(out, 2*watchdog, "it is stopped, and no hit waits for it")
	hit := t.later("open 1 0")
	isEnded(out, time.Now(), "one hit")
	assert.Contains(t, <-hit, "total=1 ")
	t.sameText()

	var slowest time.Duration
	for i := range rounds {
		kind := kinds[i%len(kinds)]
		t.ask("busy 0 all")
		cmd, out := stoppable("hits\n", "VMPROBES_TEST_STEPPING="+kind, "VMPROBES_TEST_KERNEL="+t.g.KernelPath())
		time.Sleep(time.Duration(rand.IntN(20_000)) * time.Microsecond)
		require.NoError(t, cmd.Process.Signal(sigStop))
		when := fmt.Sprintf("round %d, %s", i, kind)
		slowest = max(slowest, isEnded(out, time.Now(), when))
		t.runsOn(when)
		require.NotContains(t, <-t.later("stop"), "BAD", "round %d, %s", i, kind)
		t.sameText()
	}
	t.Logf("%d rounds; the slowest guest ran on %v after SIGSTOP, with a watchdog of %v\n%s", rounds, slowest.Round(time.Millisecond), watchdog, tail(guardianLog(), 1000))
	assert.NotRegexp(t, `Oops|BUG|panic`, t.g.Console())
	t.unhurt()
}

// testOpenAtOnce has two processes open the guest at the same instant: one gets it, and the
// other one is told which.
func testOpenAtOnce(t labTest) {
	rounds := 100
	if testing.Short() {
		rounds = 10
	}
	type tool struct {
		*exec.Cmd
		in    io.Writer
		lines chan string
	}
	var tools [2]tool
	for i := range tools {
		cmd := exec.Command(os.Args[0], "-test.run=^TestChild$")
		cmd.Env = append(os.Environ(), "VMPROBES_TEST_CHILD=open", "VMPROBES_TEST_DOMAIN="+t.g.Name())
		cmd.Stderr = os.Stderr
		in, err := cmd.StdinPipe()
		require.NoError(t, err)
		out, err := cmd.StdoutPipe()
		require.NoError(t, err)
		require.NoError(t, cmd.Start())
		lines := make(chan string, 10)
		go func() {
			defer close(lines)
			for s := bufio.NewScanner(out); s.Scan(); {
				lines <- s.Text()
			}
		}()
		defer func() {
			assert.NoError(t, in.Close())
			for range lines {
			}
			assert.NoError(t, cmd.Wait())
		}()
		tools[i] = tool{cmd, in, lines}
	}
	hear := func(i int) string {
		select {
		case line := <-tools[i].lines:
			return line
		case <-time.After(time.Minute):
			t.Fatalf("tool %d says nothing", i)
			return ""
		}
	}
	for i := range tools {
		require.Equal(t, "ready", hear(i))
	}
	program, err := os.Executable()
	require.NoError(t, err)
	var wins [2]int
	for round := range rounds {
		at := time.Now().Add(10 * time.Millisecond).UnixNano()
		for i := range tools {
			_, err := fmt.Fprintln(tools[i].in, at)
			require.NoError(t, err)
		}
		said := [2]string{hear(0), hear(1)}
		winner := slices.Index(said[:], "owner")
		require.GreaterOrEqual(t, winner, 0, "round %d: %q", round, said)
		wins[winner]++
		require.True(t, strings.HasPrefix(said[1-winner], "busy: "), "round %d: %q", round, said)
		require.Contains(t, said[1-winner], fmt.Sprintf("process %d (%q) is attached to the guest", tools[winner].Process.Pid, program), "round %d", round)
		_, err := fmt.Fprintln(tools[winner].in)
		require.NoError(t, err)
		require.Equal(t, "left", hear(winner))
	}
	t.Logf("%d rounds: the two have won %v", rounds, wins)
	t.unhurt()
}

// owner checks that a guest that has an owner is refused with its name.
func (t labTest) owner() {
	t.Helper()
	s, err := vmprobes.Open(t.Context(), t.g.Name(), nil)
	if err == nil {
		s.Close()
	}
	require.ErrorIs(t, err, vmprobes.ErrBusy)
	assert.ErrorContains(t, err, fmt.Sprintf("process %d", os.Getpid()))
}

// runsOn checks that all vCPUs make progress.
func (t labTest) runsOn(when string) {
	t.Helper()
	before := t.ask("count")
	for cpu := range t.cfg.VCPUs {
		name := fmt.Sprintf("cpu%d", cpu)
		require.Eventually(t, func() bool { return number(t, t.ask("count"), name) > number(t, before, name) },
			time.Minute, 10*time.Millisecond, "%s: %s stands still", when, name)
	}
}

// killGuardian kills the guardians there are.
func killGuardian(t labTest) {
	t.Helper()
	n := 0
	all, err := filepath.Glob("/proc/[0-9]*/comm")
	require.NoError(t, err)
	for _, name := range all {
		if b, err := os.ReadFile(name); err == nil && string(b) == "vmprobes-guard\n" {
			pid, err := strconv.Atoi(filepath.Base(filepath.Dir(name)))
			require.NoError(t, err)
			p, err := os.FindProcess(pid)
			require.NoError(t, err)
			require.NoError(t, p.Kill())
			n++
		}
	}
	require.NotZero(t, n, "no guardian")
}

func guardianLog() string {
	b, _ := os.ReadFile("/run/vmprobes/guardian.log")
	return string(b)
}

// testOnline: a guest that runs on one vCPU of two has patched the locks out of its
// text, and patches them in when the second one comes. That one executes what is
// probed at once.
func testOnline(t labTest, step vmprobes.Stepping) {
	s := t.open(&vmprobes.Options{Stepping: step})
	from, err := s.Lookup("__smp_locks")
	require.NoError(t, err)
	to, err := s.Lookup("__smp_locks_end")
	require.NoError(t, err)
	require.Less(t, uint64(to-from), uint64(1<<20))
	table := make([]byte, to-from)
	_, err = s.ReadMemory(from, table)
	require.NoError(t, err)
	const samples = 60
	sites, accepted := map[vmprobes.Addr]byte{}, []string(nil)
	stride := max(1, len(table)/4/samples)
	for i := 0; i+4 <= len(table); i += 4 * stride {
		// Relative to the entry (LOCK_PREFIX_HERE, arch/x86/include/asm/alternative.h).
		at := from + vmprobes.Addr(i) + vmprobes.Addr(int64(int32(endian.LittleEndian.Uint32(table[i:]))))
		var b [1]byte
		if _, err := s.ReadMemory(at, b[:]); err != nil || b[0] != 0x3e {
			continue // of init code, which is gone
		}
		sites[at] = b[0]
		if err := s.Register(&vmprobes.Probe{Addr: at}); !errors.Is(err, vmprobes.ErrNotProbeable) {
			accepted = append(accepted, fmt.Sprintf("%v, %#x: %v", at, b, err))
		}
	}
	assert.Empty(t, accepted, "lock prefixes that aren't refused as no place for a probe")
	if len(sites) == 0 {
		// Two CPUs were present when it booted (alternatives_smp_module_add).
		t.Log("this guest has not patched its locks out")
	}
	p := t.loadProbe(probed)
	require.NoError(t, s.Register(&p.Probe))
	var total uint64
	serve(t, s, func() {
		total = number(t, t.ask("open 50 all"), "total")
		xl(t, "vcpu-set", t.g.Name(), "2")
		online := ""
		for range 20 { // the guest hears of it by and by
			if online = <-t.later("online 1"); strings.Contains(online, "cpus=2") {
				break
			}
			time.Sleep(500 * time.Millisecond)
		}
		require.Contains(t, online, "cpus=2")
		threads := t.threads()
		require.Len(t, threads, 2)
		p.threads.Store(&threads)
		total += number(t, t.ask("open 50 all"), "total")
	})
	assert.EqualValues(t, 150, total)
	p.sawAll(t, total)
	patched := 0
	for at, before := range sites {
		var b [1]byte
		_, err := s.ReadMemory(at, b[:])
		require.NoError(t, err)
		assert.Equal(t, byte(0xf0), b[0], "lock prefix at %v", at)
		if before == 0x3e {
			patched++
		}
	}
	t.Logf("%d lock prefixes looked at, %d were patched", len(sites), patched)
	require.NoError(t, s.Close())
	t.keepText()
	t.unhurt()
}
