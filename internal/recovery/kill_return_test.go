//go:build linux

package recovery_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/x86"
	"github.com/vmprobes/vmprobes/internal/xentest"
)

// TestKilledReturns is TestKilled with a tool that follows calls to their returns and to the
// ends of their functions. It makes breakpoints in the middle of hits and removes them, some
// where calls are under way, and none of that may be left in the guest.
//
// VMPROBES_KILLS is how many kill points to try, over all guests; VMPROBES_SEED is one of
// them (xentest.Seeds).
func TestKilledReturns(t *testing.T) {
	kills := 180
	if testing.Short() {
		kills = 45
	}
	if n, err := strconv.Atoi(os.Getenv("VMPROBES_KILLS")); err == nil {
		kills = n
	}
	for _, n := range []int{1, 2, 4} {
		for kind, cfg := range map[string]xentest.Config{
			"pv":      {Kind: xentest.PV, GDBSX: true, AVX: true},
			"hvm-tf":  {Kind: xentest.HVM, AVX: true},
			"hvm-mtf": {Kind: xentest.HVM, MTF: true, AVX: true},
		} {
			t.Run(fmt.Sprintf("%s/%d", kind, n), func(t *testing.T) {
				t.Parallel()
				cfg.VCPUs, cfg.Returns = n, true
				xentest.Seeds(t, max(1, kills/9), 2, func(t *testing.T, seed uint64) { killReturns(t, cfg, seed) })
			})
		}
	}
}

// killReturns is one round of TestKilledReturns.
func killReturns(t *testing.T, cfg xentest.Config, seed uint64) {
	cfg.Seed = seed
	r := rand.New(rand.NewPCG(seed, 2))
	m := xentest.New(cfg)
	before := m.Text()
	m.Start()
	defer m.Stop()
	require.NoError(t, m.Quiesce(t.Context()))
	v := newVictim(t, m)
	v.dieSoon(r)
	if !untilDeath(t, m, v.died, func(ctx context.Context, wg *sync.WaitGroup) { v.follow(t, ctx, wg, r) }) {
		return
	}
	if v.log != nil {
		require.NoError(t, v.log.Close())
	}
	var log strings.Builder
	repaired(t, m, nil, v.journal, r, r.IntN(3), &log)
	whole(t, m, before, &log)
}

// follow is the tool: it attaches, registers return probes and plain ones and unregisters
// some, and serves hits.
func (v *victim) follow(t *testing.T, ctx context.Context, wg *sync.WaitGroup, r *rand.Rand) {
	drv := v.attach(t)
	if drv == nil {
		return
	}
	e := breakpoint.New(drv, breakpoint.Config{
		Scratch: v.m.Scratch, MayFault: xentest.NoFaults, Method: breakpoint.Method(r.IntN(3)),
		Journal: records{v.log, v.mortal, &v.busy},
		Hooks: breakpoint.Hooks{Task: func(r *x86.Regs) (breakpoint.Task, error) {
			t, err := v.m.TaskAt(r.GSBase)
			return breakpoint.Task{Addr: t.Addr, PID: int(t.ID), ID: t.ID, StackLow: t.StackLo, StackHigh: t.StackHi}, err
		}},
	})
	wg.Go(func() {
		for ctx.Err() == nil {
			_, _ = e.Serve(ctx, true)
		}
	})
	nothing := func(*breakpoint.Context) breakpoint.Verdict { return breakpoint.Continue }
	functions, insns := v.m.Functions(), v.m.Insns()
	var probes []*breakpoint.Probe
	for ctx.Err() == nil {
		f := functions[r.IntN(len(functions))]
		p := &breakpoint.Probe{Addr: f.Entry, Pre: nothing}
		switch n := r.IntN(8); {
		case n == 0:
			p.Addr = insns[r.IntN(len(insns))].VA
		case n == 1 && len(f.Backs) > 0:
			p.Addr = f.Backs[r.IntN(len(f.Backs))]
		default:
			p.Ret = &breakpoint.Returns{Return: nothing, Follow: breakpoint.Follow(r.IntN(3)), ExitsFirst: r.IntN(2) == 0}
			if exits, open := v.m.Exits(f.Name); !open {
				p.Ret.Exits = exits
			}
		}
		if p.Addr == v.m.Symbol("int3_entry") {
			continue // where the simulated guest looks how it came there
		}
		if e.Register(p) == nil {
			probes = append(probes, p)
		}
		if len(probes) > 6 {
			_ = e.Unregister(probes[0]) // with the breakpoints at which no call is expected
			probes = probes[1:]
		}
		time.Sleep(time.Duration(r.IntN(1000)) * time.Microsecond)
	}
}
