//go:build linux

package target

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/journal"
	"github.com/vmprobes/vmprobes/internal/qemu"
)

// TestOwnedVM: whoever is attached to a VM is found by any name of its socket.
func TestOwnedVM(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("XDG_RUNTIME_DIR", dir)
	was := journalDir
	journalDir = filepath.Join(dir, "vmprobes")
	t.Cleanup(func() { journalDir = was })
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
