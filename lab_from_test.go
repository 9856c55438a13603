package vmprobes_test

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes"
	"github.com/vmprobes/vmprobes/internal/kerneltext"
	"github.com/vmprobes/vmprobes/internal/target"
	"github.com/vmprobes/vmprobes/lab/labguest"
	"github.com/vmprobes/vmprobes/xenctrl"
)

// untouched checks that nothing in a guest's text is taken for somebody's int3: while it
// runs, and rewrites its code, and with probes of its own.
func (t labTest) untouched(compare func() *kerneltext.Report) {
	t.Helper()
	check := func(when string) {
		t.Helper()
		began := time.Now()
		r := compare()
		t.Logf("%s: %d bytes of text, %d int3s of the guest's own, %d left, %d unclear, %d copies, in %v",
			when, r.Text, len(r.Own), len(r.Breaks), len(r.Unclear), len(r.Copies), time.Since(began).Round(time.Millisecond))
		assert.Empty(t, r.Breaks, when)
		assert.Empty(t, r.Unclear, when)
		assert.Empty(t, r.Copies, when)
		assert.Zero(t, r.Unread, when)
		assert.NoError(t, r.Rewriting, when)
	}
	check("idle")
	if testing.Short() {
		return
	}
	t.ask("event sched on") // static keys, static calls
	check("with events on")
	t.ask("ftrace %s", probed)
	check("traced")
	t.ask("ftrace off")
	t.ask("event sched off")
	t.ask("busy 0 all")
	for range 3 {
		check("busy")
	}
	t.ask("stop")
}

// testFromFile kills a tool of which then nothing is known, and repairs the guest from its
// kernel's file.
func testFromFile(t labTest) {
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	file := t.g.KernelPath()
	if !testing.Short() {
		file = filepath.Join(filepath.Dir(file), "vmlinuz") // takes long to unpack here: once is enough
	}
	t.untouched(func() *kerneltext.Report {
		f, err := target.RecoverFrom(t.Context(), t.g.Name(), file, false, log)
		require.NoError(t, err)
		require.False(t, f.Repaired)
		file = t.g.KernelPath()
		return f.Text
	})
	for _, k := range labguest.Kernels() {
		if other := strings.Replace(file, t.cfg.Kernel, k, 1); other != file {
			_, err := target.RecoverFrom(t.Context(), t.g.Name(), other, false, log)
			require.ErrorIs(t, err, kerneltext.ErrOtherKernel)
		}
	}
	_, err := target.RecoverFrom(t.Context(), t.g.Name(), "/proc/self/exe", false, log)
	require.ErrorIs(t, err, kerneltext.ErrNotKernel)

	rounds := map[bool]int{true: 20, false: 5}[labguest.Host() == "pv"]
	if testing.Short() {
		rounds = 2 // each takes a minute on a busy machine
	}
	if n, err := strconv.Atoi(os.Getenv("VMPROBES_TEST_ROUNDS")); err == nil {
		rounds = n
	}
	journal := fmt.Sprintf("/run/vmprobes/domain-%d.journal", t.g.(*labguest.Guest).DomID())
	for i := range rounds {
		busy := i%2 == 1 // when the tool dies
		if busy {
			t.ask("busy 0 all")
		}
		cmd := exec.Command(os.Args[0], "-test.run=^TestChild$")
		cmd.Env = append(os.Environ(), "VMPROBES_TEST_CHILD=alone", "VMPROBES_TEST_DOMAIN="+t.g.Name())
		sign := "armed\n"
		if busy {
			sign = "hits\n"
		}
		out := start(t, cmd, sign)
		time.Sleep(time.Duration(rand.IntN(20_000)) * time.Microsecond)
		require.NoError(t, cmd.Process.Signal(syscall.SIGKILL))
		<-out.done
		require.NoError(t, os.Remove(journal))
		reply := make(chan string, 1)
		if !busy { // the guest comes to the breakpoint now, and stands there for some time
			go func() {
				ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
				defer cancel()
				said, err := t.g.Command(ctx, "busy 0 all")
				reply <- fmt.Sprint(said, err)
			}()
			time.Sleep(time.Second)
		}
		t.standsStill("after the tool was killed")

		_, err := vmprobes.Open(t.Context(), t.g.Name(), nil)
		require.ErrorIs(t, err, vmprobes.ErrBusy)
		assert.ErrorContains(t, err, "--from")
		if t.cfg.Kind == labguest.PV {
			guests, err := target.Status()
			require.NoError(t, err)
			require.Len(t, guests, 1)
			assert.Equal(t, target.Debugged, guests[0].State)
			t.Log(guests[0])
		}
		if i == 0 {
			seen, err := target.Inspect(t.Context(), t.g.Name(), log)
			require.NoError(t, err)
			assert.True(t, seen.Hurt())
			t.Log(strings.Join(seen.Lines(), "\n"))
			require.NotNil(t, seen.Text, "%v", seen.TextErr)
			require.Len(t, seen.Text.Breaks, 1)
			assert.Contains(t, seen.Text.Breaks[0].Where, probed+"+0x")
		}

		began := time.Now()
		f, err := target.RecoverFrom(t.Context(), t.g.Name(), file, false, log)
		require.NoError(t, err)
		require.True(t, f.Repaired)
		require.Len(t, f.Text.Breaks, 1)
		assert.Empty(t, f.Text.Unclear)
		require.NoError(t, f.Changed)
		t.Logf("round %d: repaired in %v, %v of it with the guest in hand; paused still: %v", i, time.Since(began).Round(time.Millisecond), f.Took.Round(time.Millisecond), f.StillPaused)
		if f.StillPaused {
			xl(t, "unpause", t.g.Name())
		}
		assert.Zero(t, t.domain().Flags&(xenctrl.DomainPaused|xenctrl.DomainDebugged), "round %d: the domain's flags", i)
		assert.NoFileExists(t, journal)
		if !busy {
			require.Contains(t, <-reply, "busy")
		}
		t.runsOn(fmt.Sprintf("round %d", i))
		stop := <-t.later("stop")
		if busy { // its extended state is lost if the tool died while it set the registers
			stop = strings.Replace(stop, "ymm=BAD", "", 1)
		}
		require.NotContains(t, stop, "BAD", "round %d", i)
		t.sameText()
	}
	assert.NotRegexp(t, `Oops|BUG|panic`, t.g.Console())
	s := t.open(nil)
	p := &vmprobes.Probe{Symbol: probed}
	require.NoError(t, s.Register(p))
	serve(t, s, func() {
		reply := t.ask("open 20 all")
		assert.Equal(t, number(t, reply, "total"), p.Stats().Hits+p.Stats().Missed)
	})
	require.NoError(t, s.Close())
}
