//go:build linux

package recovery_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/journal"
	"github.com/vmprobes/vmprobes/internal/recovery"
	"github.com/vmprobes/vmprobes/internal/xen"
	"github.com/vmprobes/vmprobes/internal/xentest"
	"github.com/vmprobes/vmprobes/xenctrl"
)

// victim is a tool with a journal, on a simulated Xen, that dies at some call.
type victim struct {
	m       *xentest.Machine
	mortal  *xentest.Mortal
	log     *recovery.Log
	dir     string
	died    chan struct{} // closed when it has
	journal []byte        // as it was at that moment; nil if there was none
	path    string

	wrap   func(xen.Hypervisor) xen.Hypervisor // or nil
	method breakpoint.Method                   // with many
	many   bool                                // breakpoints, by that method
	busy   sync.Map                            // records.busy
}

// records makes each record of the journal a call at which the tool may die.
type records struct {
	*recovery.Log
	m    *xentest.Mortal
	busy *sync.Map // the counters of slots, by address
}

func (r records) Break(b breakpoint.LeftBreak, s *breakpoint.LeftSlot) (busy *atomic.Int32, err error) {
	r.m.Call(func() { busy, err = r.Log.Break(b, s) })
	if s != nil && err == nil {
		r.busy.Store(s.Addr, busy)
	}
	return busy, err
}

func (r records) Removed(addr uint64) (err error) {
	r.m.Call(func() { err = r.Log.Removed(addr) })
	return err
}

func (r records) Cleaned(addr uint64) (err error) {
	r.m.Call(func() { err = r.Log.Cleaned(addr) })
	return err
}

// TestKilled kills a tool at a random call or record, with probes of all kinds, and
// repairs the guest from the journal, as it was at that moment: the guest is as before,
// and runs on. Every second time the one who repairs is killed, too.
//
// VMPROBES_KILLS is how many kill points to try, over all guests; VMPROBES_SEED is one of
// them (xentest.Seeds).
func TestKilled(t *testing.T) {
	var cfgs []xentest.Config
	for _, n := range []int{1, 2, 4} {
		cfgs = append(cfgs,
			xentest.Config{Kind: xentest.PV, GDBSX: true, AVX: true, VCPUs: n},
			xentest.Config{Kind: xentest.HVM, AVX: true, VCPUs: n},
			xentest.Config{Kind: xentest.HVM, MTF: true, AVX: true, VCPUs: n})
	}
	kills := 450
	if testing.Short() {
		kills = 180
	}
	if n, err := strconv.Atoi(os.Getenv("VMPROBES_KILLS")); err == nil {
		kills = n
	}
	// Seeds that found something: two deaths in the middle of calls, a breakpoint that was
	// hit just before it was removed, a POPF that was stepped, a vCPU that had come back from
	// the guest's own int3; two deaths, of which the second was in an unpause; a vCPU back from a
	// slot, whose stack pointer nobody knew.
	found := map[string][]uint64{
		"pv/1":     {5669080580335978074, 16388405188449809901},
		"pv/2":     {12931728158109400755, 7433053235200183982},
		"pv/4":     {12082286825210121787, 10724209782721860034},
		"hvm-tf/2": {7158404733053840141},
	}
	for i, cfg := range cfgs {
		kind := []string{"pv", "hvm-tf", "hvm-mtf"}[i%3]
		name := fmt.Sprintf("%s/%d", kind, cfg.VCPUs)
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for _, seed := range found[name] {
				for range 20 {
					t.Run(fmt.Sprint(seed), func(t *testing.T) { kill(t, cfg, seed) })
				}
			}
			xentest.Seeds(t, max(1, kills/len(cfgs)), 2, func(t *testing.T, seed uint64) { kill(t, cfg, seed) })
		})
	}
}

// kill is one round of TestKilled.
func kill(t *testing.T, cfg xentest.Config, seed uint64) {
	cfg.Seed = seed
	r := rand.New(rand.NewPCG(seed, 2))
	m := xentest.New(cfg)
	before := m.Text()
	m.Start()
	defer m.Stop()
	require.NoError(t, m.Quiesce(t.Context()))
	v := newVictim(t, m)
	v.dieSoon(r)
	if !v.dies(t, r) {
		return
	}
	var log strings.Builder
	repaired(t, m, nil, v.journal, r, r.IntN(3), &log)
	whole(t, m, before, &log)
}

// newVictim returns a tool that hasn't begun.
func newVictim(t *testing.T, m *xentest.Machine) *victim {
	dir := filepath.Join(t.TempDir(), "vmprobes")
	return &victim{
		m: m, mortal: xentest.NewMortal(m.Hypervisor()), dir: dir, path: journal.Path(dir, "domain-1"), died: make(chan struct{}),
	}
}

// dieSoon has it die at a random call.
func (v *victim) dieSoon(r *rand.Rand) {
	v.mortal.Die(int(r.ExpFloat64()*300), r.IntN(2) == 0, v.dead)
}

// dead keeps the journal as it is when the tool dies.
func (v *victim) dead() {
	if b, err := os.ReadFile(v.path); err == nil {
		v.journal = b
	}
	close(v.died)
}

// dies has the tool run until it dies, and reports whether it did.
func (v *victim) dies(t *testing.T, r *rand.Rand) bool {
	t.Helper()
	died := untilDeath(t, v.m, v.died, func(ctx context.Context, wg *sync.WaitGroup) { v.run(t, ctx, wg, r) })
	if died && v.log != nil {
		require.NoError(t, v.log.Close())
	}
	return died
}

// untilDeath lets the guest run, and the tool, until that has died. It reports whether it did.
func untilDeath(t *testing.T, m *xentest.Machine, died <-chan struct{}, tool func(context.Context, *sync.WaitGroup)) bool {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var wg sync.WaitGroup
	wg.Go(func() { tool(ctx, &wg) })
	m.Release()
	select {
	case <-died:
	case <-time.After(time.Minute):
		t.Errorf("the tool doesn't die: %s", m.State())
		return false
	}
	cancel()
	wg.Wait()
	return true
}

// repaired repairs the guest from a journal, with the ring at first, if that isn't nil. So
// many of those who do so die.
func repaired(t *testing.T, m *xentest.Machine, ring xen.Ring, then []byte, r *rand.Rand, deaths int, log *strings.Builder) {
	t.Helper()
	for ; then != nil; deaths-- {
		fmt.Fprintf(log, "--- %s\n", m.State())
		then = repairs(t, m, ring, then, r, deaths > 0, log)
		ring = nil
	}
}

// whole checks that the guest runs as if nobody had been there.
func whole(t *testing.T, m *xentest.Machine, before []byte, log fmt.Stringer) {
	t.Helper()
	m.Release()
	xentest.Verify(t, m, before)
	if n := m.Pauses(); n != 0 {
		t.Errorf("the domain is paused %d times", n)
	}
	if m.Attached() || m.MonitorOpen() {
		t.Error("debugger or monitor is attached still")
	}
	if t.Failed() {
		t.Logf("state: %s", m.State())
		t.Log(log)
		for _, c := range m.CallLog() {
			t.Log(c)
		}
	}
}

// repairs repairs the guest from a journal, unless whoever does so dies, too: then it
// returns the journal as it was at that moment. The journal is in a file of its own, as
// goroutines of the dead may still write to theirs.
func repairs(t *testing.T, m *xentest.Machine, ring xen.Ring, b []byte, r *rand.Rand, dies bool, log *strings.Builder) (then []byte) {
	path := filepath.Join(t.TempDir(), "domain-1.journal")
	require.NoError(t, os.WriteFile(path, b, 0o600))
	f, err := journal.Open(path)
	require.NoError(t, err)
	mortal := xentest.NewMortal(m.Hypervisor())
	if dies {
		mortal.Die(int(r.ExpFloat64()*60), r.IntN(2) == 0, func() { then, _ = os.ReadFile(path) })
	}
	done := make(chan error, 1)
	go func() {
		err := errDied
		defer func() { done <- err }()
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		rep, rerr := recovery.TakeOver(ctx, mortal, ring, f, slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: slog.LevelDebug})))
		err = errors.Join(rerr, rep.Changed)
		if rep.Took > 5*time.Second { // of ten that a repair waits for a vCPU that doesn't come
			err = errors.Join(err, fmt.Errorf("it took %v", rep.Took))
		}
	}()
	if err = <-done; err == errDied {
		require.NoError(t, f.Close())
		return then
	}
	if err != nil {
		t.Errorf("repair: %v", err)
	}
	if _, err := os.Stat(path); err == nil {
		t.Error("the journal is still there")
	}
	return nil
}

var errDied = fmt.Errorf("whoever repaired died")

// attach makes the tool's journal, and attaches. It returns nil if it has failed.
func (v *victim) attach(t *testing.T) breakpoint.Driver {
	info, err := v.mortal.Info()
	if err != nil {
		t.Error(err)
		return nil
	}
	vcpus := info.MaxVCPUID + 1
	v.mortal.Call(func() {
		v.log, err = recovery.Create(v.dir, "domain-1", recovery.Identity("a3guest", "", info), vcpus, xen.StateSize(vcpus))
	})
	if err != nil {
		t.Error(err)
		return nil
	}
	hv := xen.Hypervisor(v.mortal)
	if v.wrap != nil {
		hv = v.wrap(hv)
	}
	frames := xen.NewFrames(hv)
	var drv breakpoint.Driver
	if info.Flags&xenctrl.DomainHVM == 0 {
		drv, err = xen.OpenDebugger(hv, frames, xen.Config{State: v.log.DriverState(), Lookup: v.m.Lookup})
	} else {
		drv, err = xen.OpenMonitor(hv, frames, xen.Config{State: v.log.DriverState()})
	}
	if err != nil {
		t.Error(err)
		return nil
	}
	return drv
}

// run is the tool: it attaches, registers probes and unregisters some, serves hits, and
// closes.
func (v *victim) run(t *testing.T, ctx context.Context, wg *sync.WaitGroup, r *rand.Rand) {
	drv := v.attach(t)
	if drv == nil {
		return
	}
	method, most := breakpoint.Method(r.IntN(3)), 6
	if v.many {
		method, most = v.method, 40
	}
	e := breakpoint.New(drv, breakpoint.Config{Scratch: v.m.Scratch, MayFault: xentest.NoFaults, Method: method, Journal: records{v.log, v.mortal, &v.busy}})
	wg.Go(func() {
		for ctx.Err() == nil {
			_, _ = e.Serve(ctx, true)
		}
	})
	insns := v.m.Insns()
	var probes []*breakpoint.Probe
	for ctx.Err() == nil {
		in := insns[r.IntN(len(insns))]
		if in.VA == v.m.Symbol("int3_entry") {
			continue // where the simulated guest looks how it came there
		}
		p := &breakpoint.Probe{Addr: in.VA, Pre: func(*breakpoint.Context) breakpoint.Verdict { return breakpoint.Continue }}
		if e.Register(p) == nil {
			probes = append(probes, p)
		}
		if len(probes) > most {
			_ = e.Unregister(probes[0])
			probes = probes[1:]
		}
		time.Sleep(time.Duration(r.IntN(300)) * time.Microsecond)
	}
}
