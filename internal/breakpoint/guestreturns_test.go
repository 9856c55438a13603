package breakpoint_test

import (
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/xentest"
)

// TestGuestReturns has probes at every entry, exit and return address of the functions whose
// calls end in all ways that calls can, and compares them with what the guest counts of
// these calls. Those who see the registers there know the task, and what was returned.
func TestGuestReturns(t *testing.T) {
	each(t, func(t *testing.T, cfg xentest.Config) {
		cfg.Returns = true
		m, _, e := engine(t, cfg, breakpoint.Config{MayFault: xentest.NoFaults})
		type end struct {
			*breakpoint.Probe
			what string
			hits uint64
		}
		var probes []*end
		add := func(what string, addr uint64, look func(*breakpoint.Context)) *end {
			p := &end{what: what}
			p.Probe = &breakpoint.Probe{Addr: addr, Pre: func(c *breakpoint.Context) breakpoint.Verdict {
				p.hits++
				task, err := m.TaskAt(c.Regs.GSBase)
				if assert.NoError(t, err) && (c.Regs.SP < task.StackLo || c.Regs.SP >= task.StackHi || !m.TaskAlive(task)) {
					t.Errorf("%s: stack pointer %#x of %+v", what, c.Regs.SP, task)
				}
				if look != nil {
					look(c)
				}
				return breakpoint.Continue
			}}
			require.NoError(t, e.Register(p.Probe), what)
			probes = append(probes, p)
			return p
		}
		first := m.Symbol("rec") // what was there before can be probed, as other tests say
		entries := map[string]*end{}
		for _, f := range m.Functions() {
			if f.Entry < first {
				continue
			}
			entries[f.Name] = add(f.Name, f.Entry, nil)
			look := func(c *breakpoint.Context) {
				if !slices.Contains(f.Values, c.Regs.AX) {
					t.Errorf("%s returns %#x", f.Name, c.Regs.AX)
				}
			}
			if f.Values == nil {
				look = nil
			}
			for _, addr := range f.Exits {
				add(f.Name+"'s exit", addr, look)
			}
			for _, addr := range f.Backs {
				add(f.Name+"'s return address", addr, look)
			}
		}
		executed := map[uint64]uint64{}
		for _, p := range probes {
			executed[p.Addr] = m.Executed(p.Addr)
		}
		entered := map[string]uint64{}
		for name := range entries {
			entered[name], _, _, _ = m.Returns(name)
		}
		loops := m.Counter(0)
		m.Release()
		require.NoError(t, served(t, e, func() {
			// As many as a waiter stays inside, and some more.
			for end := time.Now().Add(patience); m.Counter(0) < loops+12 && m.Oops() == "" && time.Now().Before(end); {
				time.Sleep(100 * time.Microsecond)
			}
			quiesce(t, m)
		}))
		require.Empty(t, m.Oops())
		require.GreaterOrEqual(t, m.Counter(0), loops+12)
		for _, p := range probes {
			want := m.Executed(p.Addr) - executed[p.Addr]
			assert.Equal(t, want, p.Hits(), "%s at %#x", p.what, p.Addr)
			assert.Equal(t, want, p.hits, "%s at %#x", p.what, p.Addr)
			assert.Zero(t, p.Missed(), "%s at %#x", p.what, p.Addr)
		}
		for name, p := range entries {
			n, returned, unwound, died := m.Returns(name)
			assert.Equal(t, n-entered[name], p.hits, name)
			assert.Equal(t, n, returned+unwound+died+m.Inside(name), name)
		}
		t.Logf("%d probes, %d loops of vCPU 0", len(probes), m.Counter(0)-loops)
	})
}
