//go:build linux

package qemu_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes"
	"github.com/vmprobes/vmprobes/internal/qemutest"
	"github.com/vmprobes/vmprobes/xenaccess"
)

// noFiles keeps Sessions from looking for symbols and configurations, which the
// micro-kernel hasn't got.
var noFiles = &vmprobes.Options{Cache: "-", Config: "-", IgnoreBlacklist: true}

// TestOpenOptions opens VMs by names with options, and counts hits.
func TestOpenOptions(t *testing.T) {
	guest := qemutest.Start(t, qemutest.Config{})
	cpu := guest.CPU(0)
	_, addr := qemutest.Target(1)
	name := "qemu:" + guest.GDB
	for _, options := range []string{
		"", "?debugregs", "?ram=" + guest.RAM, fmt.Sprintf("?pid=%d&debugregs", guest.PID), "?timeout=20s&ram=" + guest.RAM,
	} {
		t.Run(options, func(t *testing.T) {
			s, err := vmprobes.Open(t.Context(), name+options, noFiles)
			require.NoError(t, err)
			defer s.Close()
			hits := 0
			p := &vmprobes.Probe{Addr: vmprobes.Addr(addr), Pre: func(*vmprobes.Probe, *vmprobes.Regs) vmprobes.Action {
				hits++
				return vmprobes.Continue
			}}
			require.NoError(t, s.Register(p))
			if options == "" { // a second tool is told who is there
				_, err := vmprobes.Open(t.Context(), name, noFiles)
				require.ErrorIs(t, err, vmprobes.ErrBusy)
				require.ErrorContains(t, err, fmt.Sprintf("process %d", os.Getpid()))
			}
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error)
			go func() { done <- s.Loop(ctx) }()
			cpu.Call(1, 20)
			cpu.Wait()
			cancel()
			require.ErrorIs(t, <-done, context.Canceled)
			require.Equal(t, 20, hits)
			require.NoError(t, s.Close())
			require.Equal(t, "running", guest.Status())
		})
	}
	// What is asked for by name isn't given up silently.
	other := guest.RAM + ".other"
	require.NoError(t, os.WriteFile(other, make([]byte, 64<<20), 0o600))
	defer os.Remove(other)
	for options, want := range map[string]string{
		"?ram=" + other:                      "not the memory of the VM",
		"?ram=/none":                         "no such file",
		fmt.Sprintf("?pid=%d", os.Getpid()):  "", // reading there fails, or shows other bytes
		"?pid=1&ram=/x":                      "exclude each other",
		"?hole=pc":                           "debugregs",
		"?gdb=" + guest.GDB + ".x&debugregs": "qemu+monitor",
	} {
		_, err := vmprobes.Open(t.Context(), name+options, noFiles)
		require.ErrorContains(t, err, want, options)
		require.NotErrorIs(t, err, vmprobes.ErrDomainNotFound, options) // the VM is there
		require.Equal(t, "running", guest.Status(), options)
	}
}

// TestOpenMonitor has the monitor make the stub's socket where the name says.
func TestOpenMonitor(t *testing.T) {
	guest := qemutest.Start(t, qemutest.Config{NoGDB: true})
	guest.CPU(0)
	socket := guest.RAM + ".gdb"
	s, err := vmprobes.Open(t.Context(), "qemu+monitor:"+guest.Monitor+"?gdb="+socket, noFiles)
	require.NoError(t, err)
	require.FileExists(t, socket)
	require.NoError(t, s.Close())
	require.NoFileExists(t, socket)
	require.Equal(t, "running", guest.Status())
}

// TestOpenErrors: the sentinels of package vmprobes are the same as with Xen.
func TestOpenErrors(t *testing.T) {
	guest := qemutest.Start(t, qemutest.Config{})
	guest.CPU(0)
	name := "qemu:" + guest.GDB
	s, err := vmprobes.Open(t.Context(), name, noFiles)
	require.NoError(t, err)
	_, err = vmprobes.Open(t.Context(), name, noFiles)
	require.ErrorIs(t, err, vmprobes.ErrBusy)
	require.ErrorContains(t, err, fmt.Sprintf("process %d", os.Getpid()))
	require.NotContains(t, err.Error(), "xl ")
	require.NoError(t, s.Close())

	// A monitor that somebody uses, as libvirt does.
	c, err := net.Dial("unix", guest.Monitor)
	require.NoError(t, err)
	begin := time.Now()
	_, err = vmprobes.Open(t.Context(), "qemu+monitor:"+guest.Monitor, noFiles)
	require.ErrorIs(t, err, vmprobes.ErrBusy)
	require.ErrorContains(t, err, "virsh")
	require.Less(t, time.Since(begin), 3*time.Second)
	require.NoError(t, c.Close())

	guest.HMP("gdbserver none")
	guest.QMP("stop", nil)
	_, err = vmprobes.Open(t.Context(), "qemu+monitor:"+guest.Monitor, noFiles)
	require.ErrorIs(t, err, vmprobes.ErrDomainPaused)
	require.NotContains(t, err.Error(), "xl ")
	require.Equal(t, "paused", guest.Status())
	guest.QMP("cont", nil)

	guest.Kill()
	_, err = vmprobes.Open(t.Context(), name, noFiles)
	require.ErrorIs(t, err, vmprobes.ErrDomainNotFound)
	require.ErrorIs(t, err, fs.ErrNotExist)
	var e *vmprobes.Error
	require.True(t, errors.As(err, &e))
	require.Equal(t, name, e.Domain)
}

// TestOpenNames: VMs of the same name are told apart.
func TestOpenNames(t *testing.T) {
	const uuid = "c0ffee00-1111-2222-3333-444444444444"
	guests := []*qemutest.VM{
		qemutest.Start(t, qemutest.Config{}),
		qemutest.Start(t, qemutest.Config{}),
		qemutest.Start(t, qemutest.Config{Args: []string{"-uuid", uuid}}),
	}
	seen := map[string]bool{}
	for _, g := range guests {
		g.CPU(0)
		s, err := vmprobes.Open(t.Context(), "qemu:"+g.GDB, noFiles)
		require.NoError(t, err)
		name := s.Domain().Name
		assert.Contains(t, name, "qemutest (")
		assert.False(t, seen[name], name)
		seen[name] = true
		require.NoError(t, s.Close())
	}
	assert.True(t, seen["qemutest ("+uuid+")"], seen)
	// A configuration has the name that QEMU was given.
	conf := filepath.Join(t.TempDir(), "libvmi.conf")
	require.NoError(t, os.WriteFile(conf, []byte("qemutest {\n\tostype = \"Windows\";\n}\n"), 0o600))
	_, err := xenaccess.Open(t.Context(), "qemu:"+guests[2].GDB, &xenaccess.Options{Config: conf, Cache: "-"})
	require.ErrorContains(t, err, "only Linux guests")
}
