//go:build linux

package recovery_test

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/xen"
	"github.com/vmprobes/vmprobes/internal/xentest"
	"github.com/vmprobes/vmprobes/xenctrl"
)

// doubtful is a Xen whose tool dies when it is about to give an answer, or to tell Xen of it:
// then whoever takes over can't know whether Xen was told.
type doubtful struct {
	xen.Hypervisor
	respond bool   // when it gives one
	die     func() // if it is time
}

type doubtfulRing struct {
	xen.Monitor
	d doubtful
}

func (d doubtful) OpenMonitor() (xen.Monitor, error) {
	mon, err := d.Hypervisor.OpenMonitor()
	if err != nil {
		return nil, err
	}
	return doubtfulRing{mon, d}, nil
}

func (r doubtfulRing) Respond(e *xenctrl.Event) error {
	if r.d.respond {
		r.d.die()
	}
	return r.Monitor.Respond(e)
}

func (r doubtfulRing) Notify() error {
	if !r.d.respond {
		r.d.die()
	}
	return r.Monitor.Notify()
}

// TestKilledInDoubt: the vCPU whose answer is in doubt takes an interrupt at its breakpoint,
// hits another one in the handler, or the same, and who repairs dies when he has answered
// that. The next one knows all the same that the vCPU may be at its breakpoint: no slot stays
// behind as if somebody was in it.
func TestKilledInDoubt(t *testing.T) {
	rounds := 60
	if testing.Short() {
		rounds = 20
	}
	for _, mtf := range []bool{false, true} {
		t.Run(map[bool]string{false: "tf", true: "mtf"}[mtf], func(t *testing.T) {
			t.Parallel()
			xentest.Seeds(t, rounds, 2, func(t *testing.T, seed uint64) {
				cfg := xentest.Config{Kind: xentest.HVM, MTF: mtf, AVX: true, VCPUs: 1, IRQEvery: 170, Seed: seed}
				killInDoubt(t, cfg, false, func(m *breakpoint.Mark) bool { return m.Slot != 0 && m.Back == (seed%2 == 0) }, nil)
			})
		})
	}
}

// TestKilledAtEnd: the tool dies when a vCPU that has come back from a slot isn't answered yet,
// so that it comes to the slot's end once more. Before that it takes an interrupt, and hits
// another breakpoint in the handler; who repairs dies when he has answered that. The next one
// waits for it all the same: it would come to dead code.
func TestKilledAtEnd(t *testing.T) {
	rounds := 60
	if testing.Short() {
		rounds = 20
	}
	xentest.Seeds(t, rounds, 2, func(t *testing.T, seed uint64) {
		cfg := xentest.Config{Kind: xentest.HVM, AVX: true, VCPUs: 1, IRQEvery: 170, Seed: seed}
		killInDoubt(t, cfg, true, func(m *breakpoint.Mark) bool { return m.Slot != 0 && m.Back }, nil)
	})
}

// TestKilledCounting kills a tool between the two stores that say that a vCPU is in a slot,
// or isn't any more: the mark says what the counter is to be, and the counter is that, or
// what it was. Nobody is taken for one who is in a slot afterwards, and waited for.
func TestKilledCounting(t *testing.T) {
	for _, back := range []bool{false, true} {
		for _, counted := range []bool{false, true} {
			t.Run(fmt.Sprintf("back=%v/counted=%v", back, counted), func(t *testing.T) {
				t.Parallel()
				xentest.Seeds(t, 6, 2, func(t *testing.T, seed uint64) {
					cfg := xentest.Config{Kind: xentest.HVM, AVX: true, VCPUs: 1, Seed: seed}
					killInDoubt(t, cfg, false, func(m *breakpoint.Mark) bool { return m.Slot != 0 && m.Back == back },
						func(m *breakpoint.Mark, busy *atomic.Int32) {
							// As it was a moment ago: the answer was not given.
							m.Counting, m.Count = true, busy.Load()
							switch {
							case counted:
							case back:
								busy.Add(1)
							default:
								busy.Add(-1)
							}
						})
				})
			})
		}
	}
}

// killInDoubt kills a tool when it is about to give an answer, or to notify Xen of one, and the
// mark of its vCPU is what at wants. undo puts the mark and the slot's counter back to what
// they were.
func killInDoubt(t *testing.T, cfg xentest.Config, respond bool, at func(*breakpoint.Mark) bool, undo func(*breakpoint.Mark, *atomic.Int32)) {
	r := rand.New(rand.NewPCG(cfg.Seed, 4))
	m := xentest.New(cfg)
	before := m.Text()
	m.Start()
	defer m.Stop()
	require.NoError(t, m.Quiesce(t.Context()))
	v := newVictim(t, m)
	v.method, v.many = breakpoint.OutOfLine, true
	left := 20 + r.IntN(200)
	v.wrap = func(hv xen.Hypervisor) xen.Hypervisor {
		return doubtful{hv, respond, func() {
			if left--; left < 0 && at(&v.log.Marks(0)[0]) {
				v.mortal.Die(0, undo == nil && left%2 == 0, func() {
					if undo != nil {
						mark := &v.log.Marks(0)[0]
						busy, _ := v.busy.Load(mark.Slot)
						undo(mark, busy.(*atomic.Int32))
					}
					v.dead()
				})
			}
		}}
	}
	if !v.dies(t, r) {
		return
	}
	if undo == nil {
		m.Interrupt(0)
	}
	var log strings.Builder
	repaired(t, m, nil, v.journal, r, 1+r.IntN(5), &log)
	whole(t, m, before, &log)
}
