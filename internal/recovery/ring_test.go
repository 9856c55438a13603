//go:build linux

package recovery_test

import (
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
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

// TestKilledWithRing kills a tool as TestKilled does. Who repairs has mapped the ring of its
// monitor, and the one after him, should he die, has not.
func TestKilledWithRing(t *testing.T) {
	var cfgs []xentest.Config
	for _, n := range []int{1, 2, 4, 12} {
		cfgs = append(cfgs, xentest.Config{Kind: xentest.HVM, AVX: true, VCPUs: n},
			xentest.Config{Kind: xentest.HVM, MTF: true, AVX: true, VCPUs: n})
	}
	kills := 320
	if testing.Short() {
		kills = 120
	}
	if n, err := strconv.Atoi(os.Getenv("VMPROBES_KILLS")); err == nil {
		kills = n
	}
	for i, cfg := range cfgs {
		t.Run(fmt.Sprintf("%s/%d", []string{"tf", "mtf"}[i%2], cfg.VCPUs), func(t *testing.T) {
			t.Parallel()
			xentest.Seeds(t, max(1, kills/len(cfgs)), 2, func(t *testing.T, seed uint64) { killWithRing(t, cfg, seed) })
		})
	}
}

func killWithRing(t *testing.T, cfg xentest.Config, seed uint64) {
	cfg.Seed = seed
	r := rand.New(rand.NewPCG(seed, 5))
	m := xentest.New(cfg)
	before := m.Text()
	m.Start()
	defer m.Stop()
	require.NoError(t, m.Quiesce(t.Context()))
	ring, err := m.Hypervisor().MapRing()
	require.NoError(t, err)
	v := newVictim(t, m)
	v.method, v.many = breakpoint.Method(r.IntN(3)), r.IntN(2) == 0
	v.dieSoon(r)
	if !v.dies(t, r) {
		return
	}
	deaths := r.IntN(3)
	if cfg.VCPUs > 8 {
		deaths = 0 // without the ring nobody could help such a guest
	}
	var log strings.Builder
	repaired(t, m, ring, v.journal, r, deaths, &log)
	whole(t, m, before, &log)
}

// waiting is a guest with twelve vCPUs, all of which have come to a breakpoint when its
// tool is killed: eight requests are on the ring, of which the tool has taken some, and
// four vCPUs wait for room.
func waiting(t *testing.T, mtf bool, taken int) (m *xentest.Machine, ring xen.Ring, b []byte, before []byte) {
	const vcpus = 12
	o := ringed(t, xentest.Config{MTF: mtf, VCPUs: vcpus, Seed: uint64(taken)}, breakpoint.OutOfLine)
	m = o.m
	for _, in := range m.Insns() { // every vCPU comes to each of them
		if in.Func != "int3_entry" {
			_ = o.e.Register(&breakpoint.Probe{Addr: in.VA})
		}
	}
	require.Greater(t, len(o.e.Sites()), 20)
	m.Release()
	require.Eventually(t, func() bool { return len(m.Stuck()) == vcpus }, time.Minute, time.Millisecond, "%s", m.State())
	// The tool takes requests, and dies before it answers the last of them.
	var s breakpoint.Stop
	for range taken {
		require.NoError(t, o.drv.Wait(t.Context(), &s))
	}
	return m, o.ring, o.dies(t), o.before
}

// owner is a tool that is attached to an HVM guest at rest, whose ring somebody else has
// mapped before.
type owner struct {
	m      *xentest.Machine
	before []byte // the guest's text
	ring   xen.Ring
	tool   *xentest.Mortal
	drv    *xen.MonitorRoute
	e      *breakpoint.Engine
	l      *recovery.Log
	dir    string
}

func ringed(t *testing.T, cfg xentest.Config, method breakpoint.Method) *owner {
	cfg.Kind, cfg.AVX = xentest.HVM, true
	m := xentest.New(cfg)
	o := &owner{m: m, before: m.Text(), dir: filepath.Join(t.TempDir(), "vmprobes")}
	m.Start()
	t.Cleanup(m.Stop)
	require.NoError(t, m.Quiesce(t.Context()))
	hv := m.Hypervisor()
	var err error
	o.ring, err = hv.MapRing()
	require.NoError(t, err)
	o.tool = xentest.NewMortal(hv)
	info, err := o.tool.Info()
	require.NoError(t, err)
	o.l, err = recovery.Create(o.dir, "domain-1", recovery.Identity("a3guest", "", info), cfg.VCPUs, xen.StateSize(cfg.VCPUs))
	require.NoError(t, err)
	o.drv, err = xen.OpenMonitor(o.tool, xen.NewFrames(o.tool), xen.Config{State: o.l.DriverState()})
	require.NoError(t, err)
	o.e = breakpoint.New(o.drv, breakpoint.Config{Scratch: m.Scratch, MayFault: xentest.NoFaults, Method: method, Journal: o.l})
	return o
}

// dies kills the tool, and returns its journal.
func (o *owner) dies(t *testing.T) (b []byte) {
	o.tool.Die(0, false, func() { b, _ = os.ReadFile(journal.Path(o.dir, "domain-1")) })
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = o.tool.Pause()
	}()
	<-done
	require.NoError(t, o.l.Close())
	return b
}

// TestTwelveWaitWithRing: who has the ring lets all of them go on.
func TestTwelveWaitWithRing(t *testing.T) {
	for _, mtf := range []bool{false, true} {
		for _, taken := range []int{0, 1, 3, 8} {
			t.Run(fmt.Sprintf("mtf=%v/%d", mtf, taken), func(t *testing.T) {
				t.Parallel()
				m, ring, b, before := waiting(t, mtf, taken)
				var log strings.Builder
				require.Nil(t, repairs(t, m, ring, b, rand.New(rand.NewPCG(1, 1)), false, &log))
				whole(t, m, before, &log)
				for _, c := range m.CallLog() {
					assert.NotContains(t, c.Op, "release monitor")
				}
			})
		}
	}
}

// TestTwelveWaitWithoutRing: Xen doesn't let go of the ring, and nobody else can have it.
// The guest stands as it did, and the error says so.
func TestTwelveWaitWithoutRing(t *testing.T) {
	m, _, b, _ := waiting(t, false, 3)
	path := filepath.Join(t.TempDir(), "domain-1.journal")
	require.NoError(t, os.WriteFile(path, b, 0o600))
	for range 3 { // it may be tried again, and is the same
		f, err := journal.Open(path)
		require.NoError(t, err)
		_, err = recovery.Repair(t.Context(), m.Hypervisor(), f, slog.New(slog.DiscardHandler))
		require.ErrorIs(t, err, breakpoint.ErrQueued)
		for v := range 12 {
			assert.Contains(t, err.Error(), fmt.Sprintf("%d at 0x", v))
		}
		assert.Contains(t, err.Error(), "xl destroy")
		require.NoError(t, f.Close())
		assert.Zero(t, m.Pauses())
		assert.True(t, m.MonitorOpen())
		assert.Len(t, m.Stuck(), 12)
		assert.Empty(t, m.Oops())
	}
}

// TestTwelveLeave: a tool leaves a guest of which more vCPUs have stopped than the ring takes.
func TestTwelveLeave(t *testing.T) {
	rounds := 20
	if testing.Short() {
		rounds = 6
	}
	xentest.Seeds(t, rounds, 2, func(t *testing.T, seed uint64) {
		m := xentest.New(xentest.Config{Kind: xentest.HVM, MTF: seed%2 == 0, AVX: true, VCPUs: 12, Seed: seed})
		before := m.Text()
		m.Start()
		defer m.Stop()
		require.NoError(t, m.Quiesce(t.Context()))
		hv := m.Hypervisor()
		drv, err := xen.OpenMonitor(hv, xentest.Frames(t, hv), xen.Config{})
		require.NoError(t, err)
		e := breakpoint.New(drv, breakpoint.Config{Scratch: m.Scratch, MayFault: xentest.NoFaults, Method: breakpoint.Method(seed % 2)})
		for _, in := range m.Insns() {
			if in.Func != "int3_entry" {
				_ = e.Register(&breakpoint.Probe{Addr: in.VA})
			}
		}
		m.Release()
		require.Eventually(t, func() bool { return len(m.Stuck()) == 12 }, time.Minute, time.Millisecond)
		require.NoError(t, e.Close(), "%s", m.State())
		xentest.Verify(t, m, before)
		assert.Zero(t, m.Pauses())
		assert.False(t, m.MonitorOpen())
	})
}
