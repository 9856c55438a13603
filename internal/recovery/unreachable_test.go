//go:build linux

package recovery_test

import (
	"context"
	"errors"
	"log/slog"
	"path/filepath"
	"sync/atomic"
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

var errFails = errors.New("it fails")

// failing is a hypervisor that doesn't map memory, or doesn't pause, while it is told so.
type failing struct {
	xen.Hypervisor
	maps, pauses atomic.Bool
	paused       atomic.Int32 // how often it may be paused before that fails
}

func (h *failing) MapFrames(writable bool, frames ...uint64) (xen.Mapping, error) {
	if h.maps.Load() {
		return nil, errFails
	}
	return h.Hypervisor.MapFrames(writable, frames...)
}

func (h *failing) Pause() error {
	if h.pauses.Load() && h.paused.Add(-1) < 0 {
		return errFails
	}
	return h.Hypervisor.Pause()
}

// TestUnreachable: a guest whose memory can't be reached, or that can't be paused, while it
// is repaired isn't left with its breakpoints. The journal stays, and the next attempt
// repairs it.
func TestUnreachable(t *testing.T) {
	for name, kind := range map[string]xentest.Kind{"pv": xentest.PV, "hvm": xentest.HVM} {
		for _, what := range []string{"memory", "pause"} {
			t.Run(name+"/"+what, func(t *testing.T) {
				m := xentest.New(xentest.Config{Kind: kind, GDBSX: kind == xentest.PV, MTF: true, AVX: true, VCPUs: 1, Seed: 3})
				before := m.Text()
				m.Start()
				defer m.Stop()
				require.NoError(t, m.Quiesce(t.Context()))
				tool := xentest.NewMortal(m.Hypervisor())
				info, err := tool.Info()
				require.NoError(t, err)
				dir := filepath.Join(t.TempDir(), "vmprobes")
				path := journal.Path(dir, "domain-1")
				l, err := recovery.Create(dir, "domain-1", recovery.Identity("a3guest", "", info), 1, xen.StateSize(1))
				require.NoError(t, err)
				frames := xen.NewFrames(tool)
				var drv breakpoint.Driver
				if kind == xentest.PV {
					drv, err = xen.OpenDebugger(tool, frames, xen.Config{State: l.DriverState(), Lookup: m.Lookup})
				} else {
					drv, err = xen.OpenMonitor(tool, frames, xen.Config{State: l.DriverState()})
				}
				require.NoError(t, err)
				e := breakpoint.New(drv, breakpoint.Config{Scratch: m.Scratch, MayFault: xentest.NoFaults, Journal: l})
				require.NoError(t, e.Register(&breakpoint.Probe{Addr: m.Symbol("nop5")}))
				died := make(chan struct{})
				tool.Die(0, false, func() { close(died) })
				go func() { _ = drv.Freeze() }()
				<-died
				require.NoError(t, l.Close())
				require.NotEqual(t, before, m.Text())

				hv := &failing{Hypervisor: m.Hypervisor()}
				repair := func() error {
					f, err := journal.Open(path)
					require.NoError(t, err)
					ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
					defer cancel()
					_, err = recovery.Repair(ctx, hv, f, slog.New(slog.DiscardHandler))
					return errors.Join(err, f.Close())
				}
				for pauses := range int32(4) {
					hv.maps.Store(what == "memory")
					hv.pauses.Store(what == "pause")
					hv.paused.Store(pauses)
					if err := repair(); err == nil {
						require.Equal(t, "pause", what)
						require.Equal(t, before, m.Text())
						return
					}
					require.FileExists(t, path)
				}
				hv.maps.Store(false)
				hv.pauses.Store(false)
				require.NoError(t, repair())
				assert.Equal(t, before, m.Text())
				assert.NoFileExists(t, path)
				m.Release()
				xentest.Verify(t, m, before)
				assert.Zero(t, m.Pauses())
			})
		}
	}
}
