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
