package guardian

import (
	"bufio"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/journal"
	"github.com/vmprobes/vmprobes/internal/target"
)

// TestGuarded is the process that is killed, of the tests below: it has a guardian and a
// journal.
func TestGuarded(t *testing.T) {
	name := os.Getenv("VMPROBES_TEST_GUARDED")
	if name == "" {
		t.Skip("only as a child process of TestTakesOver")
	}
	require.NoError(t, Start(slog.New(slog.DiscardHandler)))
	require.NoError(t, Start(slog.New(slog.DiscardHandler)), "there is one already")
	f, err := journal.Create(target.JournalDir(), name, journal.Identity{Name: name, Kind: "qemu"}, 0)
	require.NoError(t, err)
	fmt.Println("guarded by", pid)
	_, _ = bufio.NewReader(os.Stdin).ReadString('\n')
	require.NoError(t, f.Remove())
}

// guarded starts such a process, and returns it, its guardian and its journal.
func guarded(t *testing.T) (cmd *exec.Cmd, guardian int, path string) {
	t.Helper()
	name := fmt.Sprintf("test-%d-%s", os.Getpid(), strings.ReplaceAll(t.Name(), "/", "-"))
	cmd = exec.Command(os.Args[0], "-test.run=^TestGuarded$")
	cmd.Env = append(os.Environ(), "VMPROBES_TEST_GUARDED="+name, soon)
	in, err := cmd.StdinPipe()
	require.NoError(t, err)
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	cmd.Stderr = os.Stderr
	r, w, err := os.Pipe()
	require.NoError(t, err)
	cmd.ExtraFiles = []*os.File{r, w} // that it doesn't know of
	require.NoError(t, cmd.Start())
	require.NoError(t, errors.Join(r.Close(), w.Close()))
	t.Cleanup(func() { _ = in.Close(); _ = cmd.Process.Kill(); _ = cmd.Wait() })
	for lines := bufio.NewScanner(out); lines.Scan(); {
		if n, err := fmt.Sscanf(lines.Text(), "guarded by %d", &guardian); n == 1 && err == nil {
			path = journal.Path(target.JournalDir(), name)
			require.FileExists(t, path)
			return cmd, guardian, path
		}
	}
	t.Fatal("the child has no guardian")
	return nil, 0, ""
}

// lives reports whether a process is there, and more than a zombie, whose parent is slow.
// As long as it has other threads than the first its files aren't closed.
func lives(pid int) bool {
	if s := state(pid); s == 0 || s == 'X' {
		return false
	} else if s != 'Z' {
		return true
	}
	threads, _ := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	return len(threads) > 1
}

// TestTakesOver kills a process: its guardian undoes what it has left, and ends.
func TestTakesOver(t *testing.T) {
	cmd, guardian, path := guarded(t)
	// Not what ends a terminal, nor what ends a service.
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT} {
		require.NoError(t, syscall.Kill(guardian, sig))
	}
	time.Sleep(50 * time.Millisecond)
	require.True(t, lives(guardian))
	session, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", guardian))
	require.NoError(t, err)
	fields := strings.Fields(string(session[strings.LastIndexByte(string(session), ')'):]))
	assert.Equal(t, fmt.Sprint(guardian), fields[4], "a session of its own (proc(5), field 6)")
	require.NoError(t, cmd.Process.Kill())
	died := time.Now()
	require.Eventually(t, func() bool { _, err := os.Stat(path); return errors.Is(err, os.ErrNotExist) }, 20*time.Second, time.Millisecond)
	t.Logf("%v after SIGKILL", time.Since(died))
	require.Eventually(t, func() bool { return !lives(guardian) }, 20*time.Second, time.Millisecond, "it goes")
}

// TestKeepsNothing: a guardian holds nothing open that its process was given.
func TestKeepsNothing(t *testing.T) {
	cmd, guardian, _ := guarded(t)
	given, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/4", cmd.Process.Pid))
	require.NoError(t, err)
	require.Contains(t, given, "pipe:")
	files := fmt.Sprintf("/proc/%d/fd", guardian)
	entries, err := os.ReadDir(files)
	require.NoError(t, err)
	for _, e := range entries {
		to, err := os.Readlink(files + "/" + e.Name())
		require.NoError(t, err)
		assert.NotContains(t, to, "pipe:", e.Name())
	}
}

// TestGoesWithIt: when a process ends that has left nothing its guardian ends, too.
func TestGoesWithIt(t *testing.T) {
	cmd, guardian, path := guarded(t)
	in, err := os.OpenFile(fmt.Sprintf("/proc/%d/fd/0", cmd.Process.Pid), os.O_WRONLY, 0)
	require.NoError(t, err)
	defer in.Close()
	_, err = in.WriteString("\n")
	require.NoError(t, err)
	require.NoError(t, cmd.Wait())
	require.NoFileExists(t, path)
	require.Eventually(t, func() bool { return !lives(guardian) }, 20*time.Second, time.Millisecond)
}

// TestAnother: a guardian that was killed is replaced by the next Start.
func TestAnother(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	require.NoError(t, Start(log))
	first := pid
	require.NoError(t, syscall.Kill(first, syscall.SIGKILL))
	require.Eventually(t, func() bool { return !lives(first) }, 20*time.Second, time.Millisecond)
	require.NoError(t, Start(log))
	assert.NotEqual(t, first, pid)
	assert.True(t, lives(pid))
}

// TestDiesBeforeReady: a process may die while it starts a guardian anew, and have guests:
// the guardian repairs them though nobody hears that it is ready.
func TestDiesBeforeReady(t *testing.T) {
	cmd, guardian, path := guarded(t)
	require.NoError(t, syscall.Kill(guardian, syscall.SIGKILL))
	require.Eventually(t, func() bool { return !lives(guardian) }, 20*time.Second, time.Millisecond)
	entries, err := journal.List(target.JournalDir())
	require.NoError(t, err)
	i := slices.IndexFunc(entries, func(e journal.Entry) bool { return e.Path == path })
	require.GreaterOrEqual(t, i, 0)
	require.NoError(t, cmd.Process.Kill())
	_ = cmd.Wait()
	require.FileExists(t, path)

	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	require.NoError(t, err)
	require.NoError(t, syscall.Close(fds[0]))
	theirs := os.NewFile(uintptr(fds[1]), "guarded")
	next := exec.Command(os.Args[0])
	o := entries[i].Owner
	next.Env = append(os.Environ(), fmt.Sprintf("%s=%d:%d", environment, o.PID, o.Start))
	next.ExtraFiles = []*os.File{theirs}
	require.NoError(t, next.Run())
	require.NoError(t, theirs.Close())
	require.NoFileExists(t, path)
}
