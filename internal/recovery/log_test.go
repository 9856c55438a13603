//go:build linux

package recovery

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/journal"
)

// descriptor returns the number under which this process has a file open.
func descriptor(t *testing.T, path string) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	require.NoError(t, err)
	for _, e := range entries {
		if to, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil && to == path {
			n, err := strconv.Atoi(e.Name())
			require.NoError(t, err)
			return n
		}
	}
	t.Fatal("the file isn't open")
	return 0
}

// TestToldLater: when the journal couldn't be told that a breakpoint is out, it is told with
// the next record. The guest may put an int3 of its own there meanwhile, which is not to be
// taken for ours.
func TestToldLater(t *testing.T) {
	l, err := Create(filepath.Join(t.TempDir(), "vmprobes"), "domain-7", journal.Identity{Kind: "pv"}, 1, 0)
	require.NoError(t, err)
	insn := []byte{0x0f, 0x1f, 0x44, 0, 0}
	for i := range 3 {
		_, err := l.Break(breakpoint.LeftBreak{Addr: uint64(i), Insn: insn}, nil)
		require.NoError(t, err)
	}
	// Nothing can be written meanwhile.
	fd := descriptor(t, l.f.Path())
	ro, err := unix.Open(l.f.Path(), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	require.NoError(t, err)
	defer unix.Close(ro)
	rw, err := unix.Dup(fd)
	require.NoError(t, err)
	defer unix.Close(rw)
	require.NoError(t, unix.Dup3(ro, fd, unix.O_CLOEXEC))
	require.Error(t, l.Removed(1))
	_, err = l.Break(breakpoint.LeftBreak{Addr: 9, Insn: insn}, nil)
	require.Error(t, err, "a change that can't be told isn't made")
	require.NoError(t, unix.Dup3(rw, fd, unix.O_CLOEXEC))

	_, err = l.Break(breakpoint.LeftBreak{Addr: 3, Insn: insn}, nil)
	require.NoError(t, err)
	again := newLog(l.f, 1)
	require.NoError(t, again.load(again.f))
	var got []string
	for addr := range again.breaks {
		got = append(got, fmt.Sprint(addr))
	}
	assert.ElementsMatch(t, []string{"0", "2", "3"}, got)
	require.NoError(t, l.Remove())
}
