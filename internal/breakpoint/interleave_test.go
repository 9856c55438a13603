package breakpoint_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/xentest"
)

// TestInterleaved does random operations on many probes at once, with fresh seeds,
// fails random calls, once or several times in a row, has an administrator pause
// the domain and suspend it, and looks whether the guest is whole afterwards and
// the probes that stayed have counted what the guest did.
//
// VMPROBES_INTERLEAVINGS is how many to run, over all guests; VMPROBES_SEED is one of
// them (xentest.Seeds).
func TestInterleaved(t *testing.T) {
	configs := 0
	each(t, func(*testing.T, xentest.Config) { configs++ })
	rounds := 30
	if testing.Short() {
		rounds = 5
	}
	if n, err := strconv.Atoi(os.Getenv("VMPROBES_INTERLEAVINGS")); err == nil {
		rounds = max(1, n/configs)
	}
	each(t, func(t *testing.T, cfg xentest.Config) {
		xentest.Seeds(t, rounds, 4, func(t *testing.T, seed uint64) { interleaving(t, cfg, seed) })
		t.Logf("%d interleavings", rounds)
	})
}

// interleaving is one round of TestInterleaved.
func interleaving(t *testing.T, cfg xentest.Config, seed uint64) {
	cfg.Seed = seed
	r := rand.New(rand.NewPCG(seed, 1))
	cfg.AnyMask = false
	m := xentest.New(cfg)
	before := m.Text()
	m.Start()
	defer m.Stop()
	quiesce(t, m)
	interleave(t, m, cfg, r)
	m.Release()
	xentest.Verify(t, m, before)
	if t.Failed() {
		// Those that failed, with what came before and after.
		log := m.CallLog()
		for i, c := range log {
			if slices.ContainsFunc(log[max(0, i-10):min(len(log), i+60)], func(c xentest.Call) bool { return c.Err != nil }) {
				t.Logf("call %d: %v", i, c)
			}
		}
	}
	require.False(t, m.Attached() || m.MonitorOpen(), "still attached")
	require.Zero(t, m.Mappings(), "mappings left")
	require.Zero(t, m.Pauses(), "pauses left")
}

// logger logs to t if VMPROBES_SEED is set: it takes more time than all the rest.
func logger(t *testing.T) *slog.Logger {
	if os.Getenv("VMPROBES_SEED") == "" {
		return nil
	}
	return slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// failSome makes up to a dozen of the next calls fail, in a row or not.
func failSome(m *xentest.Machine, r *rand.Rand) {
	first := 1 + r.IntN(60)
	for i := range 1 + r.IntN(9) {
		m.FailCall(first+i*(1+r.IntN(2)), fmt.Errorf("injected: %w", syscall.EAGAIN))
	}
}

func interleave(t *testing.T, m *xentest.Machine, cfg xentest.Config, r *rand.Rand) {
	withFailures := r.IntN(2) == 0
	admin := r.IntN(3) == 0
	if withFailures && r.IntN(2) == 0 {
		m.FailCall(1+r.IntN(60), fmt.Errorf("injected: %w", syscall.ENOMEM))
	}
	drv, err := m.Attach(nil)
	if err != nil {
		require.ErrorContains(t, err, "injected")
		return
	}
	method := breakpoint.Auto
	if r.IntN(3) == 0 {
		method = breakpoint.Method(r.IntN(3))
	}
	e := breakpoint.New(drv, breakpoint.Config{
		Scratch:  m.Scratch,
		MayFault: func(a uint64) bool { return a%5 == 0 },
		Method:   method,
		Logger:   logger(t),
	})
	insns := m.Insns()
	pick := func() uint64 {
		for {
			// See TestEveryInstruction for int3_entry.
			if in := insns[r.IntN(len(insns))]; in.VA != m.Symbol("int3_entry") {
				return in.VA
			}
		}
	}

	// Some probes stay, and are compared with the guest's own counts.
	type stay struct {
		*breakpoint.Probe
		pre, post, base uint64
	}
	var stays []*stay
	quiesce := func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		err := m.Quiesce(ctx)
		if err != nil {
			t.Errorf("%v", err)
		}
		return err == nil
	}
	serving, stopServing := context.WithCancel(t.Context())
	done := make(chan struct{})
	var failed atomic.Bool // Serve has: hits may be missed from then on, and Post handlers
	go func() {
		defer close(done)
		for serving.Err() == nil {
			if _, err := e.Serve(serving, true); err != nil && !errors.Is(err, context.Canceled) {
				failed.Store(true)
				t.Logf("serve: %v", err)
			}
		}
	}()
	defer func() {
		stopServing()
		<-done
		// A failure may be reported, but nothing may be left behind.
		for range 5 {
			if err := e.Close(); err != nil {
				t.Logf("close: %v", err)
			}
			if e.Left() {
				break
			}
		}
		if !e.Left() {
			t.Error("Close hasn't left the guest")
		}
	}()
	for range r.IntN(4) {
		s := &stay{Probe: &breakpoint.Probe{Addr: pick()}}
		if isOwn(m, s.Addr) {
			continue
		}
		s.Pre = func(*breakpoint.Context) breakpoint.Verdict { s.pre++; return breakpoint.Continue }
		if r.IntN(2) == 0 {
			s.Post = func(*breakpoint.Context) breakpoint.Verdict { s.post++; return breakpoint.Continue }
		}
		if e.Register(s.Probe) == nil {
			s.base = m.Executed(s.Addr)
			stays = append(stays, s)
		}
	}
	m.Release()

	var wg sync.WaitGroup
	stopAdmin := make(chan struct{})
	if admin {
		wg.Add(1)
		seed := r.Uint64()
		go func() {
			defer wg.Done()
			administer(m, rand.New(rand.NewPCG(seed, 2)), stopAdmin)
		}()
	}
	var probes []*breakpoint.Probe
	for range 40 {
		switch r.IntN(5) {
		case 0, 1:
			p := &breakpoint.Probe{Addr: pick()}
			if r.IntN(2) == 0 {
				p.Pre = func(*breakpoint.Context) breakpoint.Verdict { return breakpoint.Continue }
			}
			if r.IntN(2) == 0 {
				p.Post = func(*breakpoint.Context) breakpoint.Verdict { return breakpoint.Continue }
			}
			if e.Register(p) == nil {
				probes = append(probes, p)
			}
		case 2:
			if len(probes) > 0 {
				i := r.IntN(len(probes))
				if e.Unregister(probes[i]) == nil {
					probes = append(probes[:i], probes[i+1:]...)
				}
			}
		case 3:
			time.Sleep(time.Duration(r.IntN(300)) * time.Microsecond)
		case 4:
			if withFailures && r.IntN(4) == 0 {
				failSome(m, r)
			}
		}
	}
	close(stopAdmin)
	wg.Wait()
	if r.IntN(2) == 0 || len(stays) == 0 {
		return // leave in the middle of everything
	}
	if !quiesce() {
		return
	}
	for _, s := range stays {
		n := m.Executed(s.Addr) - s.base
		if !s.Armed() {
			continue // there was no way past it any more, and Serve said so
		}
		ok := n == s.Hits()+s.Missed() && s.pre == s.Hits() && (s.Post == nil || s.post <= s.pre)
		if !failed.Load() {
			ok = ok && n == s.Hits() && (s.Post == nil || s.post == n)
		}
		if !ok {
			t.Errorf("%#x: executed %d times, hits %d, missed %d, pre %d, post %d (%v)", s.Addr, n, s.Hits(), s.Missed(), s.pre, s.post, s.Post != nil)
		}
	}
}

// administer pauses and unpauses the domain, in pairs, and now and then suspends
// and resumes it.
func administer(m *xentest.Machine, r *rand.Rand, stop <-chan struct{}) {
	h := m.Hypervisor()
	for {
		select {
		case <-stop:
			return
		default:
		}
		if r.IntN(8) == 0 {
			m.Shutdown(2)
			time.Sleep(time.Duration(r.IntN(300)) * time.Microsecond)
			m.ResumeDomain()
		} else if h.Pause() == nil {
			time.Sleep(time.Duration(r.IntN(150)) * time.Microsecond)
			for h.Unpause() != nil {
			}
		}
		time.Sleep(time.Duration(r.IntN(150)) * time.Microsecond)
	}
}
