package breakpoint_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/xen"
	"github.com/vmprobes/vmprobes/internal/xentest"
)

// host is a simulated Xen and how to attach to its guest.
type host struct {
	name string
	cfg  xentest.Config
}

func hosts() []host {
	return []host{
		{"pv", xentest.Config{Kind: xentest.PV, GDBSX: true, AVX: true}},
		{"hvm-tf", xentest.Config{Kind: xentest.HVM, AVX: true}},
		{"hvm-mtf", xentest.Config{Kind: xentest.HVM, MTF: true, AVX: true}},
	}
}

// each runs f on every host, with one and several vCPUs.
func each(t *testing.T, f func(t *testing.T, cfg xentest.Config)) {
	for _, h := range hosts() {
		for _, n := range []int{1, 2, 4} {
			t.Run(fmt.Sprintf("%s/%d", h.name, n), func(t *testing.T) {
				cfg := h.cfg
				cfg.VCPUs = n
				cfg.Seed = uint64(n)
				f(t, cfg)
			})
		}
	}
}

func attach(m *xentest.Machine, cfg xentest.Config) (breakpoint.Driver, error) {
	return attachTo(m.Hypervisor(), m, cfg)
}

func attachTo(hv xen.Hypervisor, m *xentest.Machine, cfg xentest.Config) (breakpoint.Driver, error) {
	if cfg.Kind == xentest.PV {
		d, err := xen.OpenDebugger(hv)
		if err != nil {
			return nil, err
		}
		d.SetVCPUInfo(m.VCPUInfo())
		return d, nil
	}
	d, err := xen.OpenMonitor(hv)
	if err != nil {
		return nil, err
	}
	return d, nil
}

// scratch proposes the machine's dead code.
func scratch(m *xentest.Machine) func(uint64, func(addr, size uint64) bool) {
	return func(_ uint64, try func(addr, size uint64) bool) {
		for _, g := range m.Gaps() {
			if try(g.VA+16, g.Size-16) {
				return
			}
		}
	}
}

func never(uint64) bool { return false }

// served runs f while the engine serves, and returns Serve's result.
func served(t *testing.T, e *breakpoint.Engine, f func()) error {
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		_, err := e.Serve(ctx, true)
		done <- err
	}()
	f()
	cancel()
	err := <-done
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

func quiesce(t *testing.T, m *xentest.Machine) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := m.Quiesce(ctx); err != nil {
		calls := slices.DeleteFunc(m.CallLog(), func(c xentest.Call) bool { return c.Op == "gdbsx domstatus" || c.Op == "info" })
		require.NoError(t, err, "%s\nlast calls: %v", m.State(), calls[max(0, len(calls)-30):])
	}
}

// isOwn reports whether va is one of the guest's own breakpoints.
func isOwn(m *xentest.Machine, va uint64) bool {
	return slices.Contains(m.OwnBreakpoints(), va)
}

// TestEveryInstruction probes each instruction of the guest in turn, in each way
// of executing it, and compares the hits with the guest's own count.
func TestEveryInstruction(t *testing.T) {
	each(t, func(t *testing.T, cfg xentest.Config) {
		m := xentest.New(cfg)
		before := m.Text()
		m.Start()
		defer m.Stop()
		for _, method := range []breakpoint.Method{breakpoint.Auto, breakpoint.OutOfLine, breakpoint.InPlace} {
			probed := 0
			var stats breakpoint.Stats
			for i, in := range m.Insns() {
				if testing.Short() && (i+cfg.VCPUs)%10 != 0 {
					continue
				}
				// The first instruction of the guest's int3 handler looks how it was
				// reached, and so would notice to be executed a second time.
				if isOwn(m, in.VA) || in.VA == m.Symbol("int3_entry") {
					continue
				}
				quiesce(t, m)
				drv, err := attach(m, cfg)
				require.NoError(t, err)
				e := breakpoint.New(drv, breakpoint.Config{Scratch: scratch(m), MayFault: never, Method: method})
				var pre, post uint64
				p := &breakpoint.Probe{
					Addr: in.VA,
					Pre: func(c *breakpoint.Context) breakpoint.Verdict {
						pre++
						if c.Regs.IP != in.VA {
							t.Errorf("pre handler at %#x, want %#x", c.Regs.IP, in.VA)
						}
						return breakpoint.Continue
					},
				}
				if probed%2 == 0 {
					p.Post = func(c *breakpoint.Context) breakpoint.Verdict {
						post++
						if c.Regs.Flags&0x100 != 0 {
							t.Errorf("post handler at %#x sees TF", c.Regs.IP)
						}
						return breakpoint.Continue
					}
				}
				if err := e.Register(p); err != nil {
					require.ErrorIs(t, err, breakpoint.ErrNoWayPast, "%#x % x", in.VA, in.Bytes)
					require.NoError(t, e.Close())
					continue
				}
				probed++
				executed := m.Executed(in.VA)
				m.Release()
				err = served(t, e, func() {
					for i := 0; i < 400 && p.Hits() < 12; i++ {
						time.Sleep(100 * time.Microsecond)
					}
					quiesce(t, m)
				})
				require.NoError(t, err, "%#x % x", in.VA, in.Bytes)
				require.Empty(t, m.Oops(), "%#x % x in %s (method %d)", in.VA, in.Bytes, in.Func, method)
				executed = m.Executed(in.VA) - executed
				require.Equal(t, executed, p.Hits(), "%#x % x in %s (method %d)", in.VA, in.Bytes, in.Func, method)
				require.Equal(t, executed, pre)
				if p.Post != nil {
					require.Equal(t, executed, post, "%#x % x", in.VA, in.Bytes)
				}
				require.NoError(t, e.Close())
				s := e.Stats()
				stats.Hits += s.Hits
				stats.Emulated += s.Emulated
				stats.OutOfLine += s.OutOfLine
				stats.InPlace += s.InPlace
				require.Equal(t, before, m.Text())
			}
			t.Logf("method %d: %d instructions, %+v", method, probed, stats)
			m.Release()
			xentest.Verify(t, m, before)
		}
	})
}
