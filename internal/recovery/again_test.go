//go:build linux

package recovery_test

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/journal"
	"github.com/vmprobes/vmprobes/internal/recovery"
	"github.com/vmprobes/vmprobes/internal/xen"
	"github.com/vmprobes/vmprobes/internal/xentest"
	"github.com/vmprobes/vmprobes/xenctrl"
)

// refusing is a Xen of which some calls fail so often.
type refusing struct {
	xen.Hypervisor
	listen, open int    // turning on the events of a monitor that was taken, and opening one
	hook         func() // is called by the last of the former
}

type refusingRing struct {
	xen.Monitor
	f *refusing
}

func (f *refusing) TakeMonitor(r xen.Ring, port uint32) (xen.Monitor, xenctrl.RingState, error) {
	m, st, err := f.Hypervisor.TakeMonitor(r, port)
	if err != nil {
		return nil, st, err
	}
	return refusingRing{m, f}, st, nil
}

func (f *refusing) OpenMonitor() (xen.Monitor, error) {
	if f.open > 0 {
		f.open--
		return nil, fmt.Errorf("injected: %w", syscall.ENOMEM)
	}
	return f.Hypervisor.OpenMonitor()
}

func (r refusingRing) SetSoftwareBreakpoint(on bool) error {
	if !on || r.f.listen == 0 {
		return r.Monitor.SetSoftwareBreakpoint(on)
	}
	if r.f.listen--; r.f.listen == 0 {
		r.f.hook()
	}
	return fmt.Errorf("injected: %w", syscall.ENOMEM)
}

// orphan is a guest at rest with breakpoints in it, all over or at one place, whose tool
// has died; its journal is at path.
func orphan(t *testing.T, vcpus int, at ...uint64) (m *xentest.Machine, before []byte, ring xen.Ring, path string) {
	o := ringed(t, xentest.Config{VCPUs: vcpus, Seed: 1}, breakpoint.Auto)
	m = o.m
	if at == nil {
		for _, in := range m.Insns() {
			if in.Func != "int3_entry" && in.Func != "main" {
				at = append(at, in.VA)
			}
		}
	}
	for _, addr := range at {
		_ = o.e.Register(&breakpoint.Probe{Addr: addr})
	}
	require.NotEmpty(t, o.e.Sites())
	return m, o.before, o.ring, writeJournal(t, o.dies(t))
}

func writeJournal(t *testing.T, b []byte) (path string) {
	path = filepath.Join(t.TempDir(), "domain-1.journal")
	require.NoError(t, os.WriteFile(path, b, 0o600))
	return path
}

// takeOver repairs the guest from the journal at path.
func takeOver(t *testing.T, hv xen.Hypervisor, ring xen.Ring, path string) error {
	f, err := journal.Open(path)
	if err != nil {
		return err
	}
	if _, err = recovery.TakeOver(t.Context(), hv, ring, f, slog.New(slog.DiscardHandler)); err != nil {
		_ = f.Close()
	}
	return err
}

// TestRepairAgain: a repair that has released the monitor, and can't attach another one or is
// killed then, is repeated. The guest doesn't run in between, with int3s that nobody watches.
func TestRepairAgain(t *testing.T) {
	for _, vcpus := range []int{8, 12} {
		t.Run(fmt.Sprintf("fails/%d", vcpus), func(t *testing.T) {
			m, before, _, path := orphan(t, vcpus)
			require.Error(t, takeOver(t, &refusing{Hypervisor: m.Hypervisor(), open: 3}, nil, path))
			m.Release()
			require.NoError(t, takeOver(t, m.Hypervisor(), nil, path))
			xentest.Verify(t, m, before)
			assert.Zero(t, m.Pauses())
			assert.False(t, m.MonitorOpen())
		})
	}
	every := 1
	if testing.Short() {
		every = 3
	}
	opened := 0
	for n := 1; n <= 60; n += every { // the monitor is released and opened at about the 36th call
		t.Run(fmt.Sprintf("killed/%d", n), func(t *testing.T) {
			m, before, _, path := orphan(t, 12)
			mortal := xentest.NewMortal(m.Hypervisor())
			var then []byte
			mortal.Die(n, false, func() { then, _ = os.ReadFile(path) })
			ended := make(chan struct{})
			go func() { defer close(ended); _ = takeOver(t, mortal, nil, path) }()
			<-ended
			require.NotNil(t, then)
			if slices.ContainsFunc(m.CallLog(), func(c xentest.Call) bool { return c.Op == "release monitor" }) {
				opened++
			}
			m.Release()
			if err := takeOver(t, m.Hypervisor(), nil, writeJournal(t, then)); errors.Is(err, breakpoint.ErrQueued) {
				// It has run, watched still, and more have come to a breakpoint than can be helped.
				assert.Greater(t, len(m.Stuck()), 8)
				assert.Empty(t, m.Oops())
				return
			} else {
				require.NoError(t, err)
			}
			xentest.Verify(t, m, before)
			assert.Zero(t, m.Pauses())
		})
	}
	assert.Positive(t, opened, "some died behind that")
}

// TestRingEventsFail: who goes on with the ring of a dead process can't turn its events on,
// which are on already. The monitor isn't ended by that, with int3s in the guest.
func TestRingEventsFail(t *testing.T) {
	for _, vcpus := range []int{2, 8, 12} {
		for range 3 {
			m, before, ring, path := orphan(t, vcpus)
			f := &refusing{Hypervisor: m.Hypervisor(), listen: 3, hook: m.Release}
			if err := takeOver(t, f, ring, path); err != nil {
				require.NoError(t, takeOver(t, m.Hypervisor(), ring, path))
			}
			m.Release()
			xentest.Verify(t, m, before)
			assert.Zero(t, m.Pauses())
			assert.False(t, m.MonitorOpen())
		}
	}
}

// idle is a guest whose vCPUs from one on wait for an interrupt, behind the HLT: at a
// breakpoint that none of them has executed.
type idle struct {
	xen.Hypervisor
	at   uint64
	from int
}

func (h idle) HVMCPU(v int) (xenctrl.HVMCPU, error) {
	c, err := h.Hypervisor.HVMCPU(v)
	if v >= h.from {
		c = xenctrl.HVMCPU{CR0: c.CR0, CR3: c.CR3, CR4: c.CR4, CS: c.CS, RIP: h.at}
	}
	return c, err
}

func (h idle) VCPUInfo(v int) (xenctrl.VCPUInfo, error) {
	info, err := h.Hypervisor.VCPUInfo(v)
	info.Blocked = info.Blocked || v >= h.from
	return info, err
}

// TestIdleAtBreakpoint: vCPUs that wait for an interrupt are none of those that wait for room
// on the ring, neither for who repairs nor for who leaves.
func TestIdleAtBreakpoint(t *testing.T) {
	m, before, _, path := orphan(t, 12)
	at := m.Symbol("nop5")
	require.NoError(t, takeOver(t, idle{m.Hypervisor(), at, 3}, nil, path))
	m.Release()
	xentest.Verify(t, m, before)

	main := xentest.New(xentest.Config{Kind: xentest.HVM, AVX: true, VCPUs: 12, Seed: 1}).Symbol("main")
	m, before, _, path = orphan(t, 12, main) // all are at rest there
	require.NoError(t, takeOver(t, m.Hypervisor(), nil, path))
	m.Release()
	xentest.Verify(t, m, before)

	m = xentest.New(xentest.Config{Kind: xentest.HVM, AVX: true, VCPUs: 12, Seed: 1})
	m.Start()
	t.Cleanup(m.Stop)
	require.NoError(t, m.Quiesce(t.Context()))
	hv := idle{m.Hypervisor(), at, 11}
	drv, err := xen.OpenMonitor(hv, xen.NewFrames(hv), xen.Config{})
	require.NoError(t, err)
	e := breakpoint.New(drv, breakpoint.Config{Scratch: m.Scratch, MayFault: xentest.NoFaults})
	require.NoError(t, e.Register(&breakpoint.Probe{Addr: at}))
	m.Release()
	require.Eventually(t, func() bool { return len(m.Stuck()) == 12 }, time.Minute, time.Millisecond)
	require.NoError(t, e.Close())
	assert.True(t, e.Left())
}
