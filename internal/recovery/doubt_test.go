//go:build linux

package recovery_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/journal"
	"github.com/vmprobes/vmprobes/internal/xen"
	"github.com/vmprobes/vmprobes/internal/xentest"
)

// doubtful is a Xen whose tool dies when it is about to tell Xen of an answer that sends a
// vCPU to a slot: whoever takes over can't know whether Xen was told.
type doubtful struct {
	xen.Hypervisor
	die func() // if it is time
}

type doubtfulRing struct {
	xen.Monitor
	die func()
}

func (d doubtful) OpenMonitor() (xen.Monitor, error) {
	mon, err := d.Hypervisor.OpenMonitor()
	if err != nil {
		return nil, err
	}
	return doubtfulRing{mon, d.die}, nil
}

func (r doubtfulRing) Notify() error {
	r.die()
	return r.Monitor.Notify()
}

// TestKilledInDoubt: the vCPU whose answer is in doubt takes an interrupt at its breakpoint,
// hits another one in the handler, and who repairs dies when he has answered that. The next
// one knows all the same that the vCPU may be at its breakpoint: no slot stays behind as if
// somebody was in it.
func TestKilledInDoubt(t *testing.T) {
	rounds := 60
	if testing.Short() {
		rounds = 20
	}
	for _, mtf := range []bool{false, true} {
		t.Run(map[bool]string{false: "tf", true: "mtf"}[mtf], func(t *testing.T) {
			t.Parallel()
			xentest.Seeds(t, rounds, 2, func(t *testing.T, seed uint64) {
				killInDoubt(t, xentest.Config{Kind: xentest.HVM, MTF: mtf, AVX: true, VCPUs: 1, IRQEvery: 170, Seed: seed})
			})
		})
	}
}

func killInDoubt(t *testing.T, cfg xentest.Config) {
	r := rand.New(rand.NewPCG(cfg.Seed, 4))
	m := xentest.New(cfg)
	before := m.Text()
	m.Start()
	defer m.Stop()
	require.NoError(t, m.Quiesce(t.Context()))
	dir := filepath.Join(t.TempDir(), "vmprobes")
	v := &victim{m: m, dir: dir, died: make(chan struct{}), path: journal.Path(dir, "domain-1"), method: breakpoint.OutOfLine, many: true}
	mortal := xentest.NewMortal(nil)
	left := 20 + r.IntN(200)
	mortal.Hypervisor = m.Hypervisor()
	v.mortal = mortal
	v.wrap = func(hv xen.Hypervisor) xen.Hypervisor {
		return doubtful{hv, func() {
			if left--; left < 0 && v.log.Mark(0).Slot != 0 && !v.log.Mark(0).Back {
				mortal.Die(0, left%2 == 0, func() {
					v.journal, _ = os.ReadFile(v.path)
					close(v.died)
				})
			}
		}}
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var wg sync.WaitGroup
	wg.Go(func() { v.run(t, ctx, &wg, r) })
	m.Release()
	select {
	case <-v.died:
	case <-time.After(time.Minute):
		t.Fatalf("the tool doesn't die: %s", m.State())
	}
	cancel()
	wg.Wait()
	require.NoError(t, v.log.Close())
	var log strings.Builder
	for deaths, then := 1+r.IntN(3), v.journal; then != nil; deaths-- {
		fmt.Fprintf(&log, "--- %s\n", m.State())
		then = repairs(t, m, nil, then, r, deaths > 0, &log)
	}
	m.Release()
	xentest.Verify(t, m, before)
	assert.Zero(t, m.Pauses())
	if t.Failed() {
		t.Log(log.String())
	}
}
