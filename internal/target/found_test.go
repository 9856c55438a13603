//go:build linux

package target

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/journal"
	"github.com/vmprobes/vmprobes/internal/qemu"
	"github.com/vmprobes/vmprobes/internal/xen"
	"github.com/vmprobes/vmprobes/internal/xentest"
)

// inTestDir has journals in a folder of the test's.
func inTestDir(t *testing.T) {
	was := journalDir
	journalDir = filepath.Join(t.TempDir(), "vmprobes")
	t.Cleanup(func() { journalDir = was })
}

// TestHold: a guest that is held stands still until it is let go, or closed.
func TestHold(t *testing.T) {
	for _, kind := range []xentest.Kind{xentest.PV, xentest.HVM} {
		m := xentest.New(xentest.Config{Kind: kind, GDBSX: true, VCPUs: 1, Seed: 1})
		hv := m.Hypervisor()
		info, err := hv.Info()
		require.NoError(t, err)
		g := newXen(hv, info)
		require.NoError(t, g.LetGo())
		require.Zero(t, m.Pauses())
		require.NoError(t, g.Hold())
		require.NoError(t, g.Hold())
		require.NoError(t, g.LetGo())
		require.Equal(t, 1, m.Pauses())
		require.NoError(t, g.Hold())
		require.NoError(t, g.Close())
		require.Zero(t, m.Pauses())
	}
}

// TestPaused: the error of a domain that stands still says why it does, and what is safe.
func TestPaused(t *testing.T) {
	inTestDir(t)
	for name, c := range map[string]struct {
		kind     xentest.Kind
		left     func(t *testing.T, hv xen.Hypervisor)
		err      error
		has, not string
	}{
		"pv, an administrator": {xentest.PV, func(t *testing.T, hv xen.Hypervisor) { require.NoError(t, hv.Pause()) }, ErrPaused, "xl unpause", "--from"},
		"pv, a debugger": {xentest.PV, func(t *testing.T, hv xen.Hypervisor) {
			require.NoError(t, hv.SetDebugging(true))
			require.NoError(t, hv.Pause()) // as an int3 does
		}, ErrBusy, "vmprobes recover GUEST --from FILE", "unpause it first"},
		"hvm, an administrator": {xentest.HVM, func(t *testing.T, hv xen.Hypervisor) { require.NoError(t, hv.Pause()) }, ErrPaused, "xl unpause", "--from"},
		"hvm, a monitor": {xentest.HVM, func(t *testing.T, hv xen.Hypervisor) {
			_, err := hv.OpenMonitor()
			require.NoError(t, err)
		}, ErrBusy, "vmprobes recover GUEST --from FILE", "unpause it first"},
	} {
		t.Run(name, func(t *testing.T) {
			m := xentest.New(xentest.Config{Kind: c.kind, GDBSX: true, VCPUs: 1, Seed: 1})
			hv := m.Hypervisor()
			c.left(t, hv)
			pauses, before := m.Pauses(), m.Text()
			info, err := hv.Info()
			require.NoError(t, err)
			g := newXen(hv, info)
			g.live = true
			_, err = g.Attach(t.Context(), Setup{})
			require.ErrorIs(t, err, c.err)
			require.ErrorContains(t, err, c.has)
			require.NotContains(t, err.Error(), c.not)
			require.Equal(t, pauses, m.Pauses())
			require.Equal(t, before, m.Text())
			require.NoError(t, g.Close())
			entries, err := journal.List(journalDir)
			require.NoError(t, err)
			require.Empty(t, entries)
		})
	}
}

// TestLook: what is attached to a guest is seen, and nothing is left by that.
func TestLook(t *testing.T) {
	inTestDir(t)
	for _, kind := range []xentest.Kind{xentest.PV, xentest.HVM} {
		m := xentest.New(xentest.Config{Kind: kind, GDBSX: true, VCPUs: 2, Seed: 1, IRQEvery: -1})
		hv := m.Hypervisor()
		info, err := hv.Info()
		require.NoError(t, err)
		look := func() Found {
			c := newFound(newXen(hv, info))
			require.NoError(t, c.prepare(t.Context(), slog.New(slog.DiscardHandler)))
			require.NoError(t, c.look())
			require.NoError(t, c.close())
			return c.Found
		}
		f := look()
		require.False(t, f.Debugger || f.Monitor || f.Paused || f.Hurt())
		require.Empty(t, f.Standing)
		require.False(t, m.Attached() || m.MonitorOpen())

		at := m.Symbol("nop5") + 5
		m.Poke(at, []byte{0xcc})
		if kind == xentest.PV {
			require.NoError(t, hv.SetDebugging(true))
		} else {
			mon, err := hv.OpenMonitor()
			require.NoError(t, err)
			require.NoError(t, mon.SetSoftwareBreakpoint(true))
		}
		m.Goto(0, at)
		m.Run(100)
		f = look()
		require.Equal(t, kind == xentest.PV, f.Debugger)
		require.Equal(t, kind == xentest.HVM, f.Monitor)
		require.Equal(t, kind == xentest.PV, f.Paused)
		require.True(t, f.Hurt())
		require.Contains(t, f.Standing, xen.Standing{VCPU: 0, Addr: at})
		for _, l := range f.Lines() {
			t.Log(l)
		}

		// Somebody else's guest isn't looked into.
		c := newFound(newXen(hv, info))
		require.NoError(t, c.prepare(t.Context(), slog.New(slog.DiscardHandler)))
		require.ErrorIs(t, newFound(newXen(hv, info)).prepare(t.Context(), slog.New(slog.DiscardHandler)), ErrBusy)
		require.NoError(t, c.close())
	}
	for _, name := range []string{"qemu:/run/vm.gdb", "/run/vmprobes/domain-7.journal", "file:/x"} {
		_, err := Inspect(t.Context(), name, slog.New(slog.DiscardHandler))
		require.ErrorIs(t, err, ErrBadName)
		_, err = RecoverFrom(t.Context(), name, "/boot/vmlinuz", false, slog.New(slog.DiscardHandler))
		require.ErrorIs(t, err, ErrBadName)
		require.False(t, Inspectable(name))
	}
	require.True(t, Inspectable("a3guest") && Inspectable("xen:a:b"))
}

// TestOwnedVM: whoever is attached to a VM is found by any name of its socket.
func TestOwnedVM(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("XDG_RUNTIME_DIR", dir)
	inTestDir(t)
	t.Chdir(dir)
	here, err := os.Getwd()
	require.NoError(t, err)
	for socket, names := range map[string][]string{
		here + "/vm.gdb": {"qemu:" + here + "/vm.gdb", "qemu:unix:" + here + "/vm.gdb?debugregs", "qemu:./vm.gdb"},
		here + "/vm.mon": {"qemu+monitor:" + here + "/vm.mon", "qemu+monitor:./vm.mon?gdb=/x"},
		"localhost:1234": {"qemu::1234", "qemu+monitor:localhost:1234?timeout=3s"},
	} {
		for _, name := range names {
			require.Equal(t, qemu.ErrBusy, ownedVM(name, qemu.ErrBusy), name)
		}
		f, err := journal.Create(JournalDir(), vmJournal(socket), journal.Identity{Kind: "qemu"}, 0)
		require.NoError(t, err)
		for _, name := range names {
			err := ownedVM(name, qemu.ErrBusy)
			require.ErrorIs(t, err, ErrBusy, name)
			require.ErrorContains(t, err, fmt.Sprintf("process %d ", os.Getpid()), name)
		}
		require.NoError(t, f.Remove())
	}
	require.Equal(t, qemu.ErrBusy, ownedVM("qemu:", qemu.ErrBusy))
}
