package target

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/xen"
)

func TestLockDomain(t *testing.T) {
	was := lockDir
	defer func() { lockDir = was }()
	lockDir = filepath.Join(t.TempDir(), "vmprobes")
	release, err := lockDomain(7)
	require.NoError(t, err)
	_, err = lockDomain(7)
	require.ErrorIs(t, err, xen.ErrBusy)
	other, err := lockDomain(8)
	require.NoError(t, err)
	require.NoError(t, other())
	require.NoError(t, release())
	again, err := lockDomain(7)
	require.NoError(t, err)
	require.NoError(t, again())

	require.NoError(t, os.Remove(filepath.Join(lockDir, "domain-7.lock")))
	require.NoError(t, os.Symlink("/etc/passwd", filepath.Join(lockDir, "domain-7.lock")))
	_, err = lockDomain(7)
	require.Error(t, err, "a link isn't followed")
}
