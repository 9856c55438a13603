//go:build linux

package recovery_test

import (
	"context"
	"fmt"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/recovery"
	"github.com/vmprobes/vmprobes/internal/xen"
	"github.com/vmprobes/vmprobes/internal/xentest"
	"github.com/vmprobes/vmprobes/xenctrl"
)

// told counts what a journal is told.
type told struct {
	*recovery.Log
	n int
}

func (c *told) Break(b breakpoint.LeftBreak, s *breakpoint.LeftSlot) (busy *atomic.Int32, err error) {
	c.n++
	return c.Log.Break(b, s)
}

func (c *told) Removed(addr uint64) error { c.n++; return c.Log.Removed(addr) }
func (c *told) Cleaned(addr uint64) error { c.n++; return c.Log.Cleaned(addr) }

// changes is how many calls a tool has made, but for those that it makes by the clock: to
// look, or to hold a single vCPU.
func changes(m *xentest.Machine) (n int) {
	for _, c := range m.CallLog() {
		switch c.Op {
		case "info", "gdbsx domstatus", "map", "monitor wait", "get hvm cpu", "gdbsx pause vcpu", "gdbsx unpause vcpu":
		default:
			n++
		}
	}
	return n
}

// TestCost: a journal costs one record for a probe, whether it has a slot or not, and
// nothing at a hit: no record, and no hypercall.
func TestCost(t *testing.T) {
	const hits = 50
	for _, cfg := range []xentest.Config{{Kind: xentest.PV, GDBSX: true, AVX: true, VCPUs: 1, Quantum: 400, IRQEvery: -1}, {Kind: xentest.HVM, VCPUs: 1, Quantum: 400, IRQEvery: -1}} {
		for _, symbol := range []string{"nop5", "inc_mem"} {
			for _, method := range []breakpoint.Method{breakpoint.Auto, breakpoint.OutOfLine, breakpoint.InPlace} {
				t.Run(fmt.Sprintf("%v/%s/%v", cfg.Kind, symbol, method), func(t *testing.T) {
					calls := func(journal bool) int {
						m := xentest.New(cfg)
						hv := m.Hypervisor()
						info, err := hv.Info()
						require.NoError(t, err)
						var c *told
						ecfg := breakpoint.Config{Scratch: m.Scratch, MayFault: xentest.NoFaults, Method: method}
						xcfg := xen.Config{Lookup: m.Lookup}
						if journal {
							l, err := recovery.Create(filepath.Join(t.TempDir(), "vmprobes"), "domain-1", recovery.Identity("g", "", info), 1, xen.StateSize(1))
							require.NoError(t, err)
							c = &told{Log: l}
							ecfg.Journal, xcfg.State = c, l.DriverState()
						}
						var drv breakpoint.Driver
						if info.Flags&xenctrl.DomainHVM != 0 {
							drv, err = xen.OpenMonitor(hv, xentest.Frames(t, hv), xcfg)
						} else {
							drv, err = xen.OpenDebugger(hv, xentest.Frames(t, hv), xcfg)
						}
						require.NoError(t, err)
						e := breakpoint.New(drv, ecfg)
						p := &breakpoint.Probe{Addr: m.Symbol(symbol), Pre: func(*breakpoint.Context) breakpoint.Verdict { return breakpoint.Continue }}
						require.NoError(t, e.Register(p))
						if journal {
							assert.Equal(t, 1, c.n, "records of a probe")
						}
						last := &breakpoint.Probe{Addr: p.Addr}
						last.Pre = func(*breakpoint.Context) breakpoint.Verdict {
							if p.Hits() == hits {
								return 1
							}
							return breakpoint.Continue
						}
						require.NoError(t, e.Register(last))
						before := changes(m)
						ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
						defer cancel()
						v, err := e.Serve(ctx, true)
						require.NoError(t, err)
						require.EqualValues(t, 1, v)
						n := changes(m) - before
						if journal {
							assert.Equal(t, 1, c.n, "records after %d hits", hits)
						}
						require.NoError(t, e.Close())
						return n
					}
					without, with := calls(false), calls(true)
					assert.Equal(t, without, with, "hypercalls of %d hits", hits)
					t.Logf("%d hits: %d calls without a journal, %d with one", hits, without, with)
				})
			}
		}
	}
}
