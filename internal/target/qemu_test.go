package target

import (
	"errors"
	"net"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/qemu"
	"github.com/vmprobes/vmprobes/linux"
)

func TestQEMUName(t *testing.T) {
	for _, test := range []struct {
		info qemu.Info
		want string
	}{
		{qemu.Info{Socket: "/run/a.gdb"}, "/run/a.gdb"},
		{qemu.Info{Socket: "/run/a.gdb", UUID: "1b2c"}, "/run/a.gdb"},
		{qemu.Info{Name: "vm", Socket: "/run/a.gdb"}, "vm (/run/a.gdb)"},
		{qemu.Info{Name: "vm", Socket: "/run/a.gdb", UUID: "1b2c"}, "vm (1b2c)"},
	} {
		assert.Equal(t, test.want, qemuName(test.info))
	}
}

// TestQEMUWatchdog: a VM has no guardian, and so no watchdog.
func TestQEMUWatchdog(t *testing.T) {
	_, err := new(qemuGuest).Attach(t.Context(), Setup{Watchdog: time.Minute})
	assert.ErrorIs(t, err, ErrNoWatchdog)
}

// cpus are the processors of a guest.
type cpus struct {
	linux.Machine
	all []linux.CPU
}

func (c cpus) CPUs() ([]linux.CPU, error) { return c.all, nil }

// Test32Bit: a 32-bit kernel has no probes, nor has what isn't known and runs 32-bit code,
// and that is said before anything is done.
func Test32Bit(t *testing.T) {
	for name, g := range map[string]Guest{"qemu": new(qemuGuest), "xen": new(xenGuest)} {
		_, err := g.Attach(t.Context(), Setup{Bits: 32})
		require.ErrorIs(t, err, Err32Bit, name)
		require.ErrorIs(t, err, errors.ErrUnsupported, name)
		require.ErrorContains(t, err, "xenaccess", name)
	}
	const paged, long = 1<<31 | 1, 1<<8 | 1<<10
	for name, c := range map[string]struct {
		bits int
		cpu  linux.CPU
		ok   bool
	}{
		"64-bit kernel":                {64, linux.CPU{CR0: paged, EFER: long}, true},
		"64-bit kernel, its cpu boots": {64, linux.CPU{CR0: 1}, true},
		"unknown":                      {0, linux.CPU{CR0: paged, CR4: 0x20, EFER: long}, true},
		"unknown, PV":                  {0, linux.CPU{PV: true, CR0: paged}, true},
		"unknown, firmware":            {0, linux.CPU{CR0: 1}, true},
		"unknown, PAE":                 {0, linux.CPU{CR0: paged, CR4: 0x20, EFER: 1 << 11}, false},
		"unknown, two levels":          {0, linux.CPU{CR0: paged}, false},
		"32-bit kernel, unseen":        {32, linux.CPU{CR0: 1}, false},
	} {
		s := Setup{Bits: c.bits}
		err := s.wide(cpus{all: []linux.CPU{{CR0: 1}, c.cpu}})
		if c.ok {
			assert.NoError(t, err, name)
		} else {
			assert.ErrorIs(t, err, Err32Bit, name)
		}
	}
}

// TestQEMUErrors: what stands in the way has the same sentinel as with Xen, and says
// what it is in QEMU's terms.
func TestQEMUErrors(t *testing.T) {
	dir := t.TempDir()
	l, err := net.Listen("unix", filepath.Join(dir, "left"))
	require.NoError(t, err)
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	require.NoError(t, l.Close())
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	require.NoError(t, tcp.Close())
	for _, name := range []string{
		"qemu:" + dir + "/none", "qemu:" + dir + "/left", "qemu+monitor:" + dir + "/none", "qemu+monitor:" + dir + "/left",
		"qemu:" + tcp.Addr().String(), "qemu+monitor:" + tcp.Addr().String(),
	} {
		_, err := Open(t.Context(), name)
		require.ErrorIs(t, err, ErrNotFound, name)
		require.ErrorContains(t, err, "start QEMU with", name)
		require.NotContains(t, err.Error(), "xl ", name)
	}
	denied := &net.OpError{Op: "dial", Err: syscall.EACCES}
	err = known("", denied)
	require.ErrorIs(t, err, ErrPermission)
	require.Equal(t, denied.Error(), err.Error())
	var op *net.OpError
	require.True(t, errors.As(err, &op))

	_, err = Open(t.Context(), "qemu:/run/vm.gdb?hole=pc")
	require.ErrorIs(t, err, qemu.ErrTarget)
	require.ErrorContains(t, err, "debugregs")
}
