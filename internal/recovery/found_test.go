//go:build linux

package recovery_test

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/journal"
	"github.com/vmprobes/vmprobes/internal/recovery"
	"github.com/vmprobes/vmprobes/internal/x86"
	"github.com/vmprobes/vmprobes/internal/xen"
	"github.com/vmprobes/vmprobes/internal/xentest"
)

// TestFound kills a tool that keeps no journal at a random call, and repairs the guest from
// what its text was: it goes on as if nobody had been there, after the pauses of the tool's
// that nothing explains are undone by hand. What nobody can know isn't looked at: to what
// the tool had forced the event mask of a vCPU when it was giving the guest an int3 of
// its own (AnyMask), and its extended state while its registers were set (no AVX). Where
// it is likely only, and said so, that a vCPU has stopped, only the text is looked at.
func TestFound(t *testing.T) {
	for name, cfg := range map[string]xentest.Config{
		"pv/1":  {Kind: xentest.PV, GDBSX: true, AnyMask: true, VCPUs: 1},
		"pv/2":  {Kind: xentest.PV, GDBSX: true, AnyMask: true, VCPUs: 2},
		"hvm/1": {Kind: xentest.HVM, MTF: true, VCPUs: 1}, "hvm/2": {Kind: xentest.HVM, MTF: true, VCPUs: 2},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := 200
			if testing.Short() {
				n = 40
			}
			xentest.Seeds(t, n, 2, func(t *testing.T, seed uint64) { findKilled(t, cfg, seed) })
		})
	}
}

// findKilled is one round of TestFound.
func findKilled(t *testing.T, cfg xentest.Config, seed uint64) {
	cfg.Seed = seed
	r := rand.New(rand.NewPCG(seed, 3))
	m := xentest.New(cfg)
	before := m.Text()
	m.Start()
	defer m.Stop()
	require.NoError(t, m.Quiesce(t.Context()))
	died := make(chan struct{})
	mortal := xentest.NewMortal(m.Hypervisor())
	mortal.Die(int(r.ExpFloat64()*300), r.IntN(2) == 0, func() { close(died) })
	if !untilDeath(t, m, died, func(ctx context.Context, wg *sync.WaitGroup) { emulating(ctx, m, mortal, wg, r) }) {
		return
	}

	hv := m.Hypervisor()
	info, err := hv.Info()
	require.NoError(t, err)
	dir := filepath.Join(t.TempDir(), "vmprobes")
	vcpus := info.MaxVCPUID + 1
	read := func(addr uint64, b []byte) error { copy(b, m.Peek(addr, len(b))); return nil }
	likely := false
	for {
		l, err := recovery.Prepare(dir, "domain-1", recovery.Identity("a3guest", "", info), vcpus, xen.StateSize(vcpus))
		require.NoError(t, err)
		require.NoError(t, xen.Stranger(hv, l.DriverState(), xen.Config{Lookup: m.Lookup}, likely))
		breaks := different(t, m, before)
		if err := xen.CheckStops(hv, read, breaks, m.OwnBreakpoints()); err != nil && !likely {
			require.ErrorIs(t, err, xen.ErrUnsure)
			require.False(t, l.Begun())
			require.NoError(t, errors.Join(xen.LetGo(hv, l.DriverState()), l.Remove()))
			likely = true // it was told, and takes the risk
			continue
		}
		removed, err := xen.Removed(hv, func(addr uint64) ([]byte, bool) {
			all := m.Insns()
			i := slices.IndexFunc(all, func(in xentest.Insn) bool { return in.VA == addr })
			if i < 0 {
				return nil, false
			}
			return all[i].Bytes, true
		}, breaks)
		require.NoError(t, err)
		breaks = append(breaks, removed...)
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		rep, err := recovery.Found(ctx, hv, l, breaks, slog.New(slog.DiscardHandler))
		if err != nil || rep.Changed != nil {
			t.Errorf("repair: %v, changed: %v", err, rep.Changed)
		}
		assert.NoFileExists(t, journal.Path(dir, "domain-1"))
		break
	}
	for m.Pauses() > 0 {
		require.NoError(t, hv.Unpause())
	}
	m.Release()
	if likely {
		// The risk was that a vCPU had come back to where it was from an int3 of the guest's
		// own, and gets that a second time.
		assert.Equal(t, before, m.Text())
	} else {
		xentest.Verify(t, m, before)
	}
	if m.Attached() || m.MonitorOpen() {
		t.Error("debugger or monitor is attached still")
	}
	if t.Failed() {
		t.Logf("likely: %v, state: %s", likely, m.State())
		for _, c := range m.CallLog() {
			t.Log(c)
		}
	}
}

// different returns the breakpoints in the machine's text.
func different(t *testing.T, m *xentest.Machine, before []byte) (breaks []breakpoint.LeftBreak) {
	now := m.Text()
	for _, in := range m.Insns() {
		at := in.VA - xentest.TextBase
		if now[at] == 0xcc && before[at] != 0xcc {
			breaks = append(breaks, breakpoint.LeftBreak{Addr: in.VA, Insn: in.Bytes})
		}
	}
	return breaks
}

// emulating is a tool without a journal, whose probes are all on instructions that it
// emulates.
func emulating(ctx context.Context, m *xentest.Machine, hv *xentest.Mortal, wg *sync.WaitGroup, r *rand.Rand) {
	drv, err := m.Attach(hv)
	if err != nil {
		return
	}
	e := breakpoint.New(drv, breakpoint.Config{MayFault: xentest.NoFaults})
	wg.Go(func() {
		for ctx.Err() == nil {
			_, _ = e.Serve(ctx, true)
		}
	})
	var insns []xentest.Insn
	for _, in := range m.Insns() {
		if d, err := x86.Decode(in.Bytes); err == nil && d.CanEmulate() && !d.MemoryOperand() && in.VA != m.Symbol("int3_entry") {
			insns = append(insns, in)
		}
	}
	long := func(p *breakpoint.Probe) bool {
		return slices.ContainsFunc(insns, func(in xentest.Insn) bool { return in.VA == p.Addr && len(in.Bytes) > 1 })
	}
	var probes []*breakpoint.Probe
	for ctx.Err() == nil {
		p := &breakpoint.Probe{Addr: insns[r.IntN(len(insns))].VA, Pre: func(*breakpoint.Context) breakpoint.Verdict { return breakpoint.Continue }}
		if e.Register(p) == nil {
			probes = append(probes, p)
		}
		// Of a vCPU that stopped at an instruction of one byte nothing tells any more when the
		// breakpoint is out.
		if i := slices.IndexFunc(probes, long); len(probes) > 6 && i >= 0 {
			_ = e.Unregister(probes[i])
			probes = slices.Delete(probes, i, i+1)
		}
		time.Sleep(time.Duration(r.IntN(300)) * time.Microsecond)
	}
}

// TestPrepared: somebody who dies before he has written down all that he found leaves a
// journal on which nobody acts.
func TestPrepared(t *testing.T) {
	m := xentest.New(xentest.Config{Kind: xentest.PV, GDBSX: true, VCPUs: 1, Seed: 1})
	hv := m.Hypervisor()
	info, err := hv.Info()
	require.NoError(t, err)
	dir := filepath.Join(t.TempDir(), "vmprobes")
	l, err := recovery.Prepare(dir, "domain-1", recovery.Identity("a3guest", "", info), 1, xen.StateSize(1))
	require.NoError(t, err)
	require.NoError(t, hv.SetDebugging(true))
	in := m.Insns()[0]
	_, err = l.Break(breakpoint.LeftBreak{Addr: in.VA, Insn: in.Bytes}, nil)
	require.NoError(t, err)
	require.NoError(t, l.Close())
	f, err := journal.Open(journal.Path(dir, "domain-1"))
	require.NoError(t, err)
	calls := m.Calls()
	_, err = recovery.Repair(t.Context(), hv, f, slog.New(slog.DiscardHandler))
	require.NoError(t, err)
	assert.Equal(t, calls+1, m.Calls(), "it only asks who it is")
	assert.True(t, m.Attached())
	assert.NoFileExists(t, f.Path())
}

// TestOtherUUID: the journal of a domain whose id another one has now is of no use to
// anybody, and hinders nobody.
func TestOtherUUID(t *testing.T) {
	m := xentest.New(xentest.Config{Kind: xentest.PV, GDBSX: true, VCPUs: 1, Seed: 1})
	hv := m.Hypervisor()
	info, err := hv.Info()
	require.NoError(t, err)
	before := m.Text()
	old := info
	old.Handle[3]++
	dir := filepath.Join(t.TempDir(), "vmprobes")
	l, err := recovery.Create(dir, "domain-1", recovery.Identity("a3guest", "", old), 1, xen.StateSize(1))
	require.NoError(t, err)
	in := m.Insns()[0]
	_, err = l.Break(breakpoint.LeftBreak{Addr: in.VA, Insn: in.Bytes}, nil)
	require.NoError(t, err)
	require.NoError(t, l.Close())
	f, err := journal.Open(journal.Path(dir, "domain-1"))
	require.NoError(t, err)
	r, err := recovery.Repair(t.Context(), hv, f, slog.New(slog.NewTextHandler(os.Stderr, nil)))
	require.NoError(t, err)
	assert.True(t, r.NothingThere)
	assert.NoFileExists(t, f.Path())
	assert.Equal(t, before, m.Text())
	assert.Zero(t, m.Pauses())
	assert.False(t, m.Attached())
}
