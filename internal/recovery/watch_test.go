//go:build linux

package recovery_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/journal"
	"github.com/vmprobes/vmprobes/internal/recovery"
	"github.com/vmprobes/vmprobes/internal/xen"
	"github.com/vmprobes/vmprobes/internal/xentest"
)

// guests are those of each kind, for tests of both routes.
func guests(f func(name string, cfg xentest.Config)) {
	for _, n := range []int{1, 2} {
		f(fmt.Sprintf("pv/%d", n), xentest.Config{Kind: xentest.PV, GDBSX: true, AVX: true, VCPUs: n})
		f(fmt.Sprintf("hvm-tf/%d", n), xentest.Config{Kind: xentest.HVM, AVX: true, VCPUs: n})
		f(fmt.Sprintf("hvm-mtf/%d", n), xentest.Config{Kind: xentest.HVM, MTF: true, AVX: true, VCPUs: n})
	}
}

// looks is how often a guest is looked at before it is believed to wait: it may be caught
// at the instant before it executes an int3.
const looks = 8

// TestWatchStopped stops a tool at a random call, for good: a guest that can't run on waits,
// and one that runs on doesn't, by what its journal and the hypervisor say.
func TestWatchStopped(t *testing.T) {
	rounds := 40
	if testing.Short() {
		rounds = 8
	}
	guests(func(name string, cfg xentest.Config) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			xentest.Seeds(t, rounds, 2, func(t *testing.T, seed uint64) { watchStopped(t, cfg, seed) })
		})
	})
}

func watchStopped(t *testing.T, cfg xentest.Config, seed uint64) {
	cfg.Seed = seed
	r := rand.New(rand.NewPCG(seed, 3))
	m := xentest.New(cfg)
	m.Start()
	defer m.Stop()
	require.NoError(t, m.Quiesce(t.Context()))
	v := newVictim(t, m)
	v.dieSoon(r)
	if !v.dies(t, r) || v.log == nil {
		return // it had not begun
	}
	// The journal as it was at that moment: goroutines of the tool may have gone on a bit.
	path := filepath.Join(v.dir, "at-that-moment.journal")
	require.NoError(t, os.WriteFile(path, v.journal, 0o600))
	w, err := recovery.Look(path)
	if err != nil { // it was about to begin
		require.ErrorIs(t, err, journal.ErrUnreadable)
		require.Empty(t, m.Stuck())
		return
	}
	defer w.Close()
	assert.Equal(t, os.Getpid(), w.Owner().PID)

	// What stands still after this doesn't run on.
	for range 50 {
		steps := m.Steps()
		time.Sleep(time.Millisecond)
		if len(m.Stuck()) == cfg.VCPUs && m.Steps() == steps {
			break
		}
	}
	stuck := m.Stuck()
	var whys []string
	for range looks {
		why, err := w.Waits(m.Hypervisor())
		require.NoError(t, err)
		if why == "" {
			break
		}
		whys = append(whys, why)
		time.Sleep(200 * time.Microsecond)
	}
	if after := m.Stuck(); len(after) != len(stuck) {
		return // one more has come to a breakpoint meanwhile
	}
	assert.Equal(t, len(stuck) > 0, len(whys) == looks, "vCPUs that can't run: %v; the guest waits, by %d looks of %d: %q\n%s",
		stuck, len(whys), looks, whys, m.State())
	assert.Empty(t, m.Oops())
}

// TestWatchServed: as long as somebody answers the watch can tell, be the guest idle, busy,
// or paused by an administrator. The pause isn't taken for ours, even if nobody serves.
func TestWatchServed(t *testing.T) {
	guests(func(name string, cfg xentest.Config) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cfg.Seed = 5
			m := xentest.New(cfg)
			before := m.Text()
			m.Start()
			defer m.Stop()
			require.NoError(t, m.Quiesce(t.Context()))
			hv := m.Hypervisor()
			info, err := hv.Info()
			require.NoError(t, err)
			dir := filepath.Join(t.TempDir(), "vmprobes")
			l, err := recovery.Create(dir, "domain-1", recovery.Identity("a3guest", "", info), cfg.VCPUs, xen.StateSize(cfg.VCPUs))
			require.NoError(t, err)
			w, err := recovery.Look(journal.Path(dir, "domain-1"))
			require.NoError(t, err)
			defer w.Close()
			frames := xentest.Frames(t, hv)
			config := xen.Config{State: l.DriverState(), Lookup: m.Lookup}
			var drv breakpoint.Driver
			if cfg.Kind == xentest.PV {
				drv, err = xen.OpenDebugger(hv, frames, config)
			} else {
				drv, err = xen.OpenMonitor(hv, frames, config)
			}
			require.NoError(t, err)
			e := breakpoint.New(drv, breakpoint.Config{Scratch: m.Scratch, MayFault: xentest.NoFaults, Journal: l})
			slow := make(chan time.Duration, 1)
			p := &breakpoint.Probe{Addr: m.Insns()[len(m.Insns())/2].VA, Pre: func(*breakpoint.Context) breakpoint.Verdict {
				select {
				case d := <-slow:
					time.Sleep(d)
				default:
				}
				return breakpoint.Continue
			}}
			for _, in := range m.Insns() { // one that is executed all the time
				if in.Func == "int3_entry" || m.Executed(in.VA) < 3 {
					continue
				}
				p.Addr = in.VA
				break
			}
			beats := func() uint64 {
				n, err := w.Beats()
				require.NoError(t, err)
				return n
			}
			begin := beats()
			require.NoError(t, e.Register(p))
			assert.Greater(t, beats(), begin, "it registers a probe")
			serve := func() (end func()) {
				ctx, cancel := context.WithCancel(t.Context())
				done := make(chan error, 1)
				go func() {
					_, err := e.Serve(ctx, true)
					done <- err
				}()
				return func() { cancel(); require.ErrorIs(t, <-done, context.Canceled) }
			}
			// No hit comes, and nobody serves.
			require.NoError(t, hv.Pause())
			why, err := w.Waits(hv)
			require.NoError(t, err)
			assert.Empty(t, why, "an administrator has paused the guest")
			require.NoError(t, hv.Unpause())
			why, err = w.Waits(hv)
			require.NoError(t, err)
			assert.Empty(t, why, "the guest is idle")
			// A tool that serves, of whatever guest.
			end := serve()
			grows := func(what string) {
				t.Helper()
				was := beats()
				assert.Eventually(t, func() bool { return beats() > was }, 20*time.Second, time.Millisecond, what)
			}
			grows("the guest is idle")
			m.Release()
			for hits := p.Hits(); p.Hits() < hits+3; {
				time.Sleep(time.Millisecond)
			}
			grows("the guest is busy")
			require.NoError(t, hv.Pause())
			grows("an administrator has paused the guest")
			require.NoError(t, hv.Unpause())
			// A handler that takes long: the guest waits as long, and no longer.
			const takes = 300 * time.Millisecond
			slow <- takes
			for len(slow) > 0 {
				time.Sleep(time.Millisecond)
			}
			was := beats()
			time.Sleep(takes / 3)
			why, err = w.Waits(hv)
			require.NoError(t, err)
			assert.NotEmpty(t, why, "a handler runs")
			assert.Equal(t, was, beats(), "a handler runs")
			grows("the handler has ended")
			require.NoError(t, m.Quiesce(t.Context()))
			end()
			assert.False(t, w.Over())
			require.NoError(t, e.Close())
			require.NoError(t, l.Remove())
			assert.True(t, w.Over(), "the tool has left")
			m.Release()
			xentest.Verify(t, m, before)
		})
	})
}

// TestWatchOther: nothing is said of another guest, or of one that is gone.
func TestWatchOther(t *testing.T) {
	m := xentest.New(xentest.Config{Kind: xentest.PV, GDBSX: true, VCPUs: 1, Seed: 1})
	hv := m.Hypervisor()
	info, err := hv.Info()
	require.NoError(t, err)
	dir := filepath.Join(t.TempDir(), "vmprobes")
	id := recovery.Identity("a3guest", "", info)
	id.Handle = []byte("another one's   ")
	l, err := recovery.Create(dir, "domain-1", id, 1, xen.StateSize(1))
	require.NoError(t, err)
	defer l.Remove()
	w, err := recovery.Look(journal.Path(dir, "domain-1"))
	require.NoError(t, err)
	defer w.Close()
	require.NoError(t, hv.Pause())
	require.NoError(t, hv.SetDebugging(true))
	why, err := w.Waits(hv)
	assert.NoError(t, err)
	assert.Empty(t, why)

	_, err = recovery.Look(filepath.Join(dir, "domain-2.journal"))
	assert.ErrorIs(t, err, os.ErrNotExist)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "domain-3.journal"), make([]byte, 9000), 0o600))
	_, err = recovery.Look(filepath.Join(dir, "domain-3.journal"))
	assert.True(t, errors.Is(err, journal.ErrUnreadable), "%v", err)
}
