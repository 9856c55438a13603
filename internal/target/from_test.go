//go:build linux

package target

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/journal"
	"github.com/vmprobes/vmprobes/internal/kerneltest"
	"github.com/vmprobes/vmprobes/internal/kerneltext"
	"github.com/vmprobes/vmprobes/internal/xen"
	"github.com/vmprobes/vmprobes/xenctrl"
)

// standing is an HVM domain with a real kernel's memory, whose vCPUs don't run: what Xen
// would do for who repairs it.
type standing struct {
	xen.Hypervisor // what isn't here isn't called
	g              *kerneltest.Guest
	cpu            xenctrl.HVMCPU
	pauses         int
	monitor        bool
	released       int
}

func (s *standing) Info() (xenctrl.DomainInfo, error) {
	i := xenctrl.DomainInfo{ID: 7, Flags: xenctrl.DomainHVM, OnlineVCPUs: 1, TotalPages: uint64(len(s.g.RAM) / 4096)}
	if s.pauses > 0 {
		i.Flags |= xenctrl.DomainPaused
	}
	return i, nil
}
func (s *standing) Pause() error   { s.pauses++; return nil }
func (s *standing) Unpause() error { s.pauses--; return nil }

func (s *standing) HVMCPU(int) (xenctrl.HVMCPU, error) { return s.cpu, nil }

func (s *standing) MonitorCapabilities() (xenctrl.MonitorCaps, error) {
	return xenctrl.MonitorSoftwareBreakpoint | xenctrl.MonitorSingleStep, nil
}
func (s *standing) DebugControl(int, bool) error { return nil }
func (s *standing) ReleaseMonitor(answers []xenctrl.Event) error {
	s.monitor = false
	s.released += len(answers)
	return nil
}

func (s *standing) OpenMonitor() (xen.Monitor, error) {
	if s.monitor {
		return nil, xenctrl.ErrBusy
	}
	s.monitor = true
	return quiet{s}, nil
}

// quiet is a monitor to which nothing happens.
type quiet struct{ s *standing }

func (quiet) SetSoftwareBreakpoint(bool) error   { return nil }
func (quiet) SetSingleStep(bool) error           { return nil }
func (quiet) SetDebugExceptions(_, _ bool) error { return nil }
func (quiet) Wait(ctx context.Context) error     { <-ctx.Done(); return ctx.Err() }
func (quiet) Next(*xenctrl.Event) (bool, error)  { return false, nil }
func (quiet) Respond(*xenctrl.Event) error       { return errors.New("nobody asked") }
func (quiet) Notify() error                      { return nil }
func (quiet) Port() uint32                       { return 1 }
func (q quiet) Close() error                     { q.s.monitor = false; return nil }
func (s *standing) frame(f uint64) ([]byte, error) {
	if f >= uint64(len(s.g.RAM)/4096) {
		return nil, fmt.Errorf("frame %#x isn't there", f)
	}
	return s.g.RAM[f*4096:][:4096:4096], nil
}

func (s *standing) MapFrames(_ bool, frames ...uint64) (xen.Mapping, error) {
	if len(frames) != 1 {
		return nil, errors.New("several frames")
	}
	b, err := s.frame(frames[0])
	return mapped(b), err
}

func (s *standing) WriteFrame(f uint64, off int, b []byte) error {
	m, err := s.frame(f)
	if err == nil {
		copy(m[off:], b)
	}
	return err
}

type mapped []byte

func (m mapped) Bytes() []byte { return m }
func (m mapped) Unmap() error  { return nil }

// TestRecoverFrom repairs a guest by its kernel's file where all is known, and does nothing
// where it isn't.
func TestRecoverFrom(t *testing.T) {
	inTestDir(t)
	vmlinux := kerneltest.File(t, "6.1", "vmlinux")
	file, err := kerneltext.Read(bytes.NewReader(vmlinux))
	require.NoError(t, err)
	other, err := kerneltext.Read(bytes.NewReader(kerneltest.File(t, "6.12", "vmlinux")))
	require.NoError(t, err)
	for name, c := range map[string]struct {
		left   func(s *standing, at func(string) []byte)
		file   *kerneltext.File
		force  bool
		err    error
		breaks int
		paused bool // at the end
	}{
		"nothing":        {},
		"paused":         {left: func(s *standing, _ func(string) []byte) { s.pauses = 2 }, paused: true},
		"a monitor":      {left: func(s *standing, _ func(string) []byte) { s.monitor = true }},
		"another kernel": {left: func(s *standing, _ func(string) []byte) { s.monitor = true }, file: other, err: kerneltext.ErrOtherKernel},
		"breakpoints": {left: func(s *standing, at func(string) []byte) {
			s.monitor = true
			at("vfs_read")[5], at("vfs_open")[5] = 0xcc, 0xcc
		}, breaks: 2},
		"the monitor is off": {left: func(_ *standing, at func(string) []byte) { at("vfs_read")[5] = 0xcc }, breaks: 1},
		"paused at one":      {left: func(s *standing, at func(string) []byte) { s.monitor, s.pauses, at("vfs_read")[5] = true, 1, 0xcc }, breaks: 1, paused: true},
		"changed code": {left: func(s *standing, at func(string) []byte) {
			s.monitor = true
			at("vfs_read")[5], at("vfs_open")[5], at("vfs_open")[6] = 0xcc, 0xcc, at("vfs_open")[6]+1
		}, err: ErrUnclear},
		"changed code, forced": {left: func(s *standing, at func(string) []byte) {
			s.monitor = true
			at("vfs_read")[5], at("vfs_open")[5], at("vfs_open")[6] = 0xcc, 0xcc, at("vfs_open")[6]+1
		}, force: true, breaks: 1},
		"a copy of an instruction": {left: func(s *standing, at func(string) []byte) {
			s.monitor = true
			copy(at("__entry_text_end")[100:], "\x41\x54")
		}, err: ErrUnclear},
		"a step": {left: func(s *standing, at func(string) []byte) {
			s.monitor, at("vfs_read")[5] = true, 0xcc
			s.cpu.RFLAGS |= 1 << 8
		}, err: xen.ErrStepped},
	} {
		if testing.Short() && !slices.Contains([]string{"nothing", "breakpoints", "changed code"}, name) {
			continue
		}
		t.Run(name, func(t *testing.T) {
			g, err := kerneltest.Load(vmlinux)
			require.NoError(t, err)
			clean := bytes.Clone(g.RAM)
			cpus, err := g.Machine().CPUs()
			require.NoError(t, err)
			s := &standing{g: g}
			s.cpu = xenctrl.HVMCPU{CR0: cpus[0].CR0, CR3: cpus[0].CR3, CR4: cpus[0].CR4, EFER: cpus[0].EFER, CS: 0x10}
			at := func(name string) []byte {
				sym, err := g.Symbols.Lookup(name)
				require.NoError(t, err)
				return g.RAM[sym.Addr-0xffffffff80000000:]
			}
			s.cpu.RIP = 0xffffffff81000000
			if c.left != nil {
				c.left(s, at)
			}
			before, pauses, monitor := bytes.Clone(g.RAM), s.pauses, s.monitor
			info, err := s.Info()
			require.NoError(t, err)
			f := c.file
			if f == nil {
				f = file
			}
			x := newFound(newXen(s, info))
			found, err := x.recover(t.Context(), f, c.force, slog.New(slog.DiscardHandler))
			require.NoError(t, x.close())
			entries, lerr := journal.List(journalDir)
			require.NoError(t, lerr)
			assert.Empty(t, entries)
			assert.Equal(t, pauses, s.pauses, "pauses")
			if c.err != nil {
				require.ErrorIs(t, err, c.err)
				assert.True(t, bytes.Equal(before, g.RAM), "nothing was written")
				assert.Equal(t, monitor, s.monitor)
				assert.False(t, found.Repaired)
				return
			}
			require.NoError(t, err)
			require.NoError(t, found.Changed)
			assert.Len(t, found.Text.Breaks, c.breaks)
			assert.Equal(t, c.breaks > 0 || monitor, found.Repaired)
			assert.Equal(t, c.paused && found.Repaired, found.StillPaused)
			assert.False(t, s.monitor)
			if found.Repaired {
				assert.NotZero(t, s.released)
			}
			for i := range clean { // every byte is back, but for what isn't known
				if g.RAM[i] != clean[i] && !(c.force && g.RAM[i] == before[i]) {
					t.Fatalf("%#x: %#x, was %#x", i, g.RAM[i], clean[i])
				}
			}
		})
	}
}
