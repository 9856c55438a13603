//go:build linux

package target

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/journal"
	"github.com/vmprobes/vmprobes/internal/recovery"
	"github.com/vmprobes/vmprobes/internal/xen"
	"github.com/vmprobes/vmprobes/internal/xentest"
)

// orphan makes the owner of a journal a process that isn't there: one that was started at
// another time.
func orphan(t *testing.T, path string) {
	t.Helper()
	b, err := os.ReadFile(path)
	require.NoError(t, err)
	// Numbers of the header: see package journal.
	text := b[40 : 40+binary.LittleEndian.Uint32(b[32:])]
	at := bytes.Index(text, []byte(`"start":`)) + len(`"start":`)
	require.Greater(t, at, 10)
	text[at] = '1' + (text[at]-'0')%9
	binary.LittleEndian.PutUint32(b[36:], crc32.Checksum(text, crc32.MakeTable(crc32.Castagnoli)))
	require.NoError(t, os.WriteFile(path, b, 0o600))
}

// TestOwn: a guest whose owner lives is refused. One whose owner is dead, and which somebody
// repairs at this moment, is waited for.
func TestOwn(t *testing.T) {
	was := journalDir
	journalDir = filepath.Join(t.TempDir(), "vmprobes")
	t.Cleanup(func() { journalDir = was })
	m := xentest.New(xentest.Config{Kind: xentest.PV, GDBSX: true, VCPUs: 1, Seed: 1})
	hv := m.Hypervisor()
	info, err := hv.Info()
	require.NoError(t, err)
	g := newXen(hv, info)
	name := domainJournal(info.ID)
	l, err := recovery.Create(journalDir, name, recovery.Identity("a3guest", "", info), 1, xen.StateSize(1))
	require.NoError(t, err)
	_, err = g.own(t.Context(), Setup{})
	require.ErrorIs(t, err, ErrBusy)
	require.ErrorContains(t, err, fmt.Sprintf("process %d ", os.Getpid()))
	require.NoError(t, l.Close())

	path := journal.Path(journalDir, name)
	orphan(t, path)
	repairer, err := journal.Open(path)
	require.NoError(t, err)
	assert.False(t, lives(repairer.Owner()))
	begin := time.Now()
	const takes = 300 * time.Millisecond
	time.AfterFunc(takes, func() { assert.NoError(t, repairer.Remove()) })
	l, err = g.own(t.Context(), Setup{})
	require.NoError(t, err)
	assert.GreaterOrEqual(t, time.Since(begin), takes)
	require.NoError(t, l.Remove())
}

// TestJournalDirs: whoever looks for what was left looks where Xen guests' journals are, too.
func TestJournalDirs(t *testing.T) {
	dirs := JournalDirs()
	assert.Contains(t, dirs, journalDir)
	assert.Contains(t, dirs, JournalDir())
}
