//go:build linux

package target

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
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
	guests, _ := Status() // there is no Xen here, which it may say
	i := slices.IndexFunc(guests, func(s State) bool { return s.Journal == path })
	require.GreaterOrEqual(t, i, 0)
	assert.Equal(t, Repaired, guests[i].State, "it isn't served by its dead owner")
	begin := time.Now()
	const takes = 300 * time.Millisecond
	time.AfterFunc(takes, func() { assert.NoError(t, repairer.Remove()) })
	l, err = g.own(t.Context(), Setup{})
	require.NoError(t, err)
	assert.GreaterOrEqual(t, time.Since(begin), takes)
	require.NoError(t, l.Remove())
}

// TestOwner is a tool of TestTwoTools: it attaches when it is told to, at an instant, and
// leaves when it is told to.
func TestOwner(t *testing.T) {
	route, dir, _ := strings.Cut(os.Getenv("VMPROBES_TEST_OWNER"), ":")
	if route == "" {
		t.Skip("only as a child process of TestTwoTools")
	}
	m := xentest.New(xentest.Config{Kind: xentest.PV, GDBSX: true, VCPUs: 2, Seed: 1})
	hv := m.Hypervisor()
	info, err := hv.Info()
	require.NoError(t, err)
	g := newXen(hv, info)
	journalDir = dir
	own := func() (leave func() error, err error) {
		if route == "xen" {
			l, err := g.own(t.Context(), Setup{})
			return func() error { return l.Remove() }, err
		}
		// It leaves its journal, as if it died.
		f, err := ownVM(filepath.Join(dir, "socket"), journal.Identity{Name: "vm", Kind: "qemu"}, slog.New(slog.DiscardHandler))
		return func() error { return f.Close() }, err
	}
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		at, err := strconv.ParseInt(in.Text(), 10, 64)
		require.NoError(t, err)
		for time.Now().UnixNano() < at {
		}
		leave, err := own()
		switch {
		case err == nil:
			fmt.Println("owner")
			require.True(t, in.Scan())
			require.NoError(t, leave())
			fmt.Println("left")
		case errors.Is(err, ErrBusy):
			fmt.Println("busy:", err)
		default:
			fmt.Println("failed:", err)
		}
	}
}

// TestTwoTools starts two processes at the same guest at the same instant, a hundred times:
// one of them has it, and the other one is told which. For the simulated Xen's domain the
// journal isn't there before; a VM's has an owner that died.
func TestTwoTools(t *testing.T) {
	const rounds = 100
	program, err := os.Executable()
	require.NoError(t, err)
	for _, route := range []string{"xen", "qemu"} {
		t.Run(route, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "vmprobes")
			type tool struct {
				*exec.Cmd
				in    io.Writer
				lines chan string
			}
			var tools [2]tool
			for i := range tools {
				cmd := exec.Command(program, "-test.run=^TestOwner$")
				cmd.Env = append(os.Environ(), "VMPROBES_TEST_OWNER="+route+":"+dir, "XDG_RUNTIME_DIR="+filepath.Dir(dir))
				cmd.Stderr = os.Stderr
				in, err := cmd.StdinPipe()
				require.NoError(t, err)
				out, err := cmd.StdoutPipe()
				require.NoError(t, err)
				require.NoError(t, cmd.Start())
				lines := make(chan string, 10)
				go func() {
					defer close(lines)
					for s := bufio.NewScanner(out); s.Scan(); {
						lines <- s.Text()
					}
				}()
				t.Cleanup(func() {
					require.NoError(t, in.Close())
					for range lines {
					}
					assert.NoError(t, cmd.Wait())
				})
				tools[i] = tool{cmd, in, lines}
			}
			hear := func(i int) string {
				select {
				case line := <-tools[i].lines:
					return line
				case <-time.After(time.Minute):
					t.Fatalf("tool %d says nothing", i)
					return ""
				}
			}
			wins := [2]int{}
			for round := range rounds {
				at := time.Now().Add(3 * time.Millisecond).UnixNano()
				for i := range tools {
					_, err := fmt.Fprintln(tools[i].in, at)
					require.NoError(t, err)
				}
				said := [2]string{hear(0), hear(1)}
				winner := slices.Index(said[:], "owner")
				require.GreaterOrEqual(t, winner, 0, "round %d: %q", round, said)
				wins[winner]++
				require.True(t, strings.HasPrefix(said[1-winner], "busy: "), "round %d: %q", round, said)
				require.Contains(t, said[1-winner], fmt.Sprintf("process %d (%q) is attached to the guest", tools[winner].Process.Pid, program), "round %d", round)
				_, err := fmt.Fprintln(tools[winner].in)
				require.NoError(t, err)
				require.Equal(t, "left", hear(winner))
				if route == "qemu" {
					orphan(t, journal.Path(dir, "qemu:"+filepath.Join(dir, "socket")))
				}
			}
			t.Logf("%d rounds: the two have won %v", rounds, wins)
		})
	}
}

// TestJournalDirs: whoever looks for what was left looks where Xen guests' journals are, too.
func TestJournalDirs(t *testing.T) {
	dirs := JournalDirs()
	assert.Contains(t, dirs, journalDir)
	assert.Contains(t, dirs, JournalDir())
}
