package target

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/image"
	"github.com/vmprobes/vmprobes/internal/qemu"
	"github.com/vmprobes/vmprobes/internal/xen"
	"github.com/vmprobes/vmprobes/xenctrl"
)

// TestBadNames: a name that can't be one of a guest is told from one that isn't there,
// and says what names there are.
func TestBadNames(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "mem")
	require.NoError(t, os.WriteFile(file, make([]byte, 1<<12), 0o600))
	socket := filepath.Join(dir, "gdb")
	l, err := net.Listen("unix", socket)
	require.NoError(t, err)
	defer l.Close()
	for name, hint := range map[string]string{
		"/no/such/path": "", "./x": "", "a/b": "", "qmeu:/run/vm.gdb": "", "http://host": "", "C:": "",
		file:   "the file of that name is file:" + file,
		socket: "the socket of that name is qemu:" + socket,
	} {
		_, err := Open(t.Context(), name)
		require.ErrorIs(t, err, ErrBadName, name)
		assert.ErrorContains(t, err, "qemu+monitor:PATH")
		assert.ErrorContains(t, err, hint)
	}
	for _, name := range []string{"qemu:x", "qemu+monitor:sub/folder"} {
		_, err := Open(t.Context(), name)
		require.ErrorIs(t, err, ErrBadName)
		assert.NotContains(t, err.Error(), name, "the caller says it")
	}
	t.Chdir(dir)
	_, err = Open(t.Context(), "gdb")
	require.ErrorContains(t, err, "the socket of that name is qemu:./gdb or qemu+monitor:./gdb", "a name that is taken for a path")
	_, err = Open(t.Context(), "mem")
	require.Error(t, err)
	assert.NotErrorIs(t, err, ErrBadName, "it might be a domain")
	assert.ErrorContains(t, err, "file:mem")
	for _, name := range []string{"", "xen:", "qemu:"} {
		_, err := Open(t.Context(), name)
		require.ErrorIs(t, err, ErrNoName)
	}
}

// TestSameErrors: what says the same of guests of different hypervisors is the same to
// errors.Is, in words that fit.
func TestSameErrors(t *testing.T) {
	_, err := Open(t.Context(), "qemu:"+filepath.Join(t.TempDir(), "none"))
	require.ErrorIs(t, err, ErrNotFound)
	require.ErrorIs(t, err, fs.ErrNotExist)
	require.ErrorIs(t, err, qemu.ErrNoStub)
	assert.NotContains(t, err.Error(), "domain")
	for _, name := range []string{"qemu+monitor:" + filepath.Join(t.TempDir(), "none"), "qemu+monitor:localhost:1"} {
		_, err = Open(t.Context(), name)
		require.ErrorIs(t, err, ErrNotFound, "%v", err)
	}
	program, err := os.Executable()
	require.NoError(t, err)
	_, err = Open(t.Context(), "file:"+program)
	require.ErrorIs(t, err, image.ErrUnsupported)
	assert.NotContains(t, err.Error(), program, "the caller says it")
	_, err = Open(t.Context(), "file:/no/such/file")
	require.ErrorIs(t, err, ErrNotFound)
	require.ErrorIs(t, err, fs.ErrNotExist)
	assert.EqualError(t, err, "there is no such file")

	for _, e := range []error{xen.ErrBusy, qemu.ErrBusy, qemu.ErrAttached} {
		err := known("", fmt.Errorf("attach: %w", e))
		require.ErrorIs(t, err, ErrBusy)
		require.ErrorIs(t, err, e)
		assert.EqualError(t, err, "attach: "+e.Error())
	}
	for _, e := range []error{fs.ErrPermission, xenctrl.ErrPermission, os.ErrPermission} {
		require.ErrorIs(t, known("", e), ErrPermission)
	}
	other := errors.New("another one")
	assert.Equal(t, other, known("", other))
	assert.NoError(t, known("", nil))
	assert.EqualError(t, known("qemu:/x", fmt.Errorf("qemu:/x: %w", other)), "another one")
	assert.EqualError(t, known("a3", fmt.Errorf("domain %q: %w", "a3", other)), "another one")
	assert.EqualError(t, known("xen:a3", fmt.Errorf("domain %q: %w", "a3", other)), "another one")
	if os.Geteuid() == 0 {
		assert.Equal(t, fs.ErrPermission, explain(fs.ErrPermission), "root lacks something else")
	} else {
		assert.ErrorContains(t, explain(fs.ErrPermission), "/dev/xen/privcmd")
	}
}
