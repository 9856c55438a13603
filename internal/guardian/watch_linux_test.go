package guardian

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/journal"
	"github.com/vmprobes/vmprobes/internal/target"
)

// The guest of these tests is in the state of a journal: a number that grows as long as its
// owner answers, and whether a vCPU waits. The test is the hypervisor, and writes the latter
// into the file, whatever the owner does.
const (
	offBeats = 0
	offWaits = 8
)

// paper is such a guest, as a guardian sees it.
type paper struct{ *journal.View }

func (p paper) Over() bool { return p.Removed() }

func (p paper) word(off int) *uint64 { return (*uint64)(unsafe.Pointer(&p.State()[off])) }

func (p paper) Beats() (uint64, error) { return atomic.LoadUint64(p.word(offBeats)), nil }

func (p paper) Waits() (string, error) {
	switch atomic.LoadUint64(p.word(offWaits)) {
	case 0:
		return "", nil
	case 1:
		return "vCPU 0 waits", nil
	}
	return "", errors.New("the hypervisor doesn't answer")
}

// paperGuests has a guardian of these tests look at such guests: this is before its init.
var paperGuests = func() bool {
	if os.Getenv("VMPROBES_TEST_WATCHED") == "" {
		return false
	}
	look = func(path string) (guest, error) {
		v, err := journal.Look(path)
		if err != nil {
			return nil, err
		}
		return paper{v}, nil
	}
	return true
}()

// soon has a process with the race detector end at once.
const soon = "GORACE=atexit_sleep_ms=0"

// TestWatched is the tool of the tests below. It answers all the time, unless it is told to
// take a hit for a while.
func TestWatched(t *testing.T) {
	name := os.Getenv("VMPROBES_TEST_WATCHED")
	if name == "" {
		t.Skip("only as a child process of the tests of watchdogs")
	}
	require.True(t, paperGuests)
	limit, err := time.ParseDuration(os.Getenv("VMPROBES_TEST_LIMIT"))
	require.NoError(t, err)
	log := slog.New(slog.DiscardHandler)
	require.NoError(t, Start(log))
	f, err := journal.Create(target.JournalDir(), name, journal.Identity{Name: name, Kind: "qemu"}, 16)
	require.NoError(t, err)
	require.NoError(t, Watch(f.Path(), limit))
	beats := (*uint64)(unsafe.Pointer(&f.State()[offBeats]))
	waits := (*uint64)(unsafe.Pointer(&f.State()[offWaits]))
	hits := make(chan time.Duration)
	go func() {
		for {
			select {
			case d := <-hits:
				atomic.StoreUint64(waits, 1)
				time.Sleep(d)
				atomic.StoreUint64(waits, 0)
				atomic.AddUint64(beats, 1) // it looks for the next one
				fmt.Println("answered")
			case <-time.After(time.Millisecond):
				atomic.AddUint64(beats, 1)
			}
		}
	}()
	fmt.Println("guarded by", pid)
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		switch word, rest, _ := strings.Cut(lines.Text(), " "); word {
		case "hit":
			d, err := time.ParseDuration(rest)
			require.NoError(t, err)
			hits <- d
		case "restart":
			require.NoError(t, Start(log))
			fmt.Println("guarded by", pid)
		case "leave":
			require.NoError(t, f.Remove())
			fmt.Println("left")
		}
	}
}

// limit is the watchdog of these tests.
const limit = 800 * time.Millisecond

// tool is a process with a watchdog.
type tool struct {
	*testing.T
	cmd      *exec.Cmd
	in       io.Writer
	lines    chan string
	guardian int
	path     string
	file     *os.File
	ended    chan struct{} // closed when it has
	err      error         // of its end
}

func watchedTool(t *testing.T) *tool {
	t.Helper()
	name := fmt.Sprintf("test-%d-%s", os.Getpid(), strings.ReplaceAll(t.Name(), "/", "-"))
	cmd := exec.Command(os.Args[0], "-test.run=^TestWatched$")
	cmd.Env = append(os.Environ(), "VMPROBES_TEST_WATCHED="+name, "VMPROBES_TEST_LIMIT="+limit.String(), soon)
	in, err := cmd.StdinPipe()
	require.NoError(t, err)
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	cmd.Stderr = os.Stderr
	require.NoError(t, cmd.Start())
	w := &tool{T: t, cmd: cmd, in: in, lines: make(chan string, 100), ended: make(chan struct{})}
	go func() {
		for lines := bufio.NewScanner(out); lines.Scan(); {
			w.lines <- lines.Text()
		}
		w.err = cmd.Wait()
		close(w.ended)
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-w.ended
		if w.guardian != 0 {
			assert.Eventually(t, func() bool { return !lives(w.guardian) }, 20*time.Second, time.Millisecond)
		}
	})
	w.guarded()
	w.path = journal.Path(target.JournalDir(), name)
	w.file, err = os.OpenFile(w.path, os.O_RDWR, 0)
	require.NoError(t, err)
	t.Cleanup(func() { _ = w.file.Close() })
	return w
}

// says waits for a line of the tool's.
func (w *tool) says(format string, args ...any) {
	w.Helper()
	for end := time.After(20 * time.Second); ; {
		select {
		case line := <-w.lines:
			if n, _ := fmt.Sscanf(line, format, args...); n == len(args) && strings.HasPrefix(line, strings.TrimSuffix(format, "%d")) {
				return
			}
		case <-end:
			w.Fatalf("the tool doesn't say %q", format)
		}
	}
}

func (w *tool) guarded() {
	w.Helper()
	w.says("guarded by %d", &w.guardian)
}

func (w *tool) tell(format string, args ...any) {
	w.Helper()
	_, err := fmt.Fprintf(w.in, format+"\n", args...)
	require.NoError(w, err)
}

// waits is the hypervisor: from now on a vCPU waits (1), or none does (0).
func (w *tool) waits(n uint64) {
	w.Helper()
	const header = 4096
	_, err := w.file.WriteAt(binary.LittleEndian.AppendUint64(nil, n), header+offWaits)
	require.NoError(w, err)
}

// signal sends one, and waits until it has had its effect.
func (w *tool) signal(pid int, sig syscall.Signal) {
	w.Helper()
	require.NoError(w, syscall.Kill(pid, sig))
	require.Eventually(w, func() bool { return (state(pid) == 'T') == (sig == syscall.SIGSTOP) }, 20*time.Second, time.Millisecond)
}

// state is the third field of /proc/PID/stat (proc(5)), or 0.
func state(pid int) byte {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if i := strings.LastIndex(string(b), ") "); err == nil && i >= 0 && i+2 < len(b) {
		return b[i+2]
	}
	return 0
}

// isEnded checks that the tool is ended when a hit has waited since begin for longer than
// the limit, and that its guest is repaired.
func (w *tool) isEnded(begin time.Time) {
	w.Helper()
	select {
	case <-w.ended:
	case <-time.After(20 * time.Second):
		w.Fatal("the tool is not ended")
	}
	took := time.Since(begin)
	var exit *exec.ExitError
	require.ErrorAs(w, w.err, &exit)
	assert.Equal(w, syscall.SIGKILL, exit.Sys().(syscall.WaitStatus).Signal())
	assert.GreaterOrEqual(w, took, limit)
	assert.Less(w, took, 2*limit, "a quarter more, and what a busy machine takes")
	assert.Eventually(w, func() bool { _, err := os.Stat(w.path); return errors.Is(err, os.ErrNotExist) }, 20*time.Second, time.Millisecond, "it is repaired")
	w.Logf("ended and waited for after %v", took.Round(time.Millisecond))
}

// lives checks that the tool does, for a while.
func (w *tool) lives(d time.Duration, why string) {
	w.Helper()
	select {
	case <-w.ended:
		w.Fatalf("the tool was ended: %s", why)
	case <-time.After(d):
	}
}

// answers checks that the tool does.
func (w *tool) answers() {
	w.Helper()
	w.tell("hit 1ms")
	w.says("answered")
	require.FileExists(w, w.path)
}

// TestWatchdog: a tool that doesn't answer a hit is ended, whether it is stopped or not,
// and whether it has taken the hit or not.
func TestWatchdog(t *testing.T) {
	t.Run("stopped", func(t *testing.T) {
		t.Parallel()
		w := watchedTool(t)
		w.signal(w.cmd.Process.Pid, syscall.SIGSTOP)
		w.lives(2*limit, "nobody waits for it")
		begin := time.Now()
		w.waits(1)
		w.isEnded(begin)
	})
	t.Run("stopped in a handler", func(t *testing.T) {
		t.Parallel()
		w := watchedTool(t)
		begin := time.Now()
		w.tell("hit 20s")
		time.Sleep(limit / 4)
		w.signal(w.cmd.Process.Pid, syscall.SIGSTOP)
		w.isEnded(begin)
	})
	t.Run("in a handler", func(t *testing.T) {
		t.Parallel()
		w := watchedTool(t)
		begin := time.Now()
		w.tell("hit 20s")
		w.isEnded(begin)
	})
	t.Run("with another guardian", func(t *testing.T) {
		t.Parallel()
		w := watchedTool(t)
		first := w.guardian
		require.NoError(t, syscall.Kill(first, syscall.SIGKILL))
		require.Eventually(t, func() bool { return !lives(first) }, 20*time.Second, time.Millisecond)
		w.tell("restart")
		w.guarded()
		require.NotEqual(t, first, w.guardian)
		w.signal(w.cmd.Process.Pid, syscall.SIGSTOP)
		begin := time.Now()
		w.waits(1)
		w.isEnded(begin)
	})
}

// TestWatchdogSpares: a tool that answers in time lives, and one for which nobody waits.
func TestWatchdogSpares(t *testing.T) {
	t.Run("idle", func(t *testing.T) {
		t.Parallel()
		w := watchedTool(t)
		w.lives(3*limit, "it is idle")
		w.answers()
	})
	t.Run("paused guest", func(t *testing.T) {
		t.Parallel()
		w := watchedTool(t)
		w.waits(1) // so it looks to somebody who doesn't ask the tool
		w.lives(3*limit, "it would answer if there was anything")
		w.waits(0)
		w.answers()
	})
	t.Run("slow", func(t *testing.T) {
		t.Parallel()
		w := watchedTool(t)
		for range 5 {
			w.tell("hit %v", limit*3/5)
			w.lives(limit*3/5, "it answers in time")
			w.says("answered")
		}
		w.answers()
	})
	t.Run("stopped for a while", func(t *testing.T) {
		t.Parallel()
		w := watchedTool(t)
		for range 4 {
			w.signal(w.cmd.Process.Pid, syscall.SIGSTOP)
			w.waits(1)
			w.lives(limit*3/5, "it goes on in time")
			w.signal(w.cmd.Process.Pid, syscall.SIGCONT)
			w.lives(limit/5, "it goes on in time")
			w.waits(0)
		}
		w.answers()
	})
	t.Run("hypervisor that doesn't answer", func(t *testing.T) {
		t.Parallel()
		w := watchedTool(t)
		w.signal(w.cmd.Process.Pid, syscall.SIGSTOP)
		w.waits(2)
		w.lives(2*limit, "nobody knows whether a hit waits")
		w.waits(0)
		w.signal(w.cmd.Process.Pid, syscall.SIGCONT)
		w.answers()
	})
	// All stand still, as if the machine did: the tool had no time to answer.
	t.Run("machine that stands still", func(t *testing.T) {
		t.Parallel()
		w := watchedTool(t)
		w.signal(w.cmd.Process.Pid, syscall.SIGSTOP)
		w.waits(1)
		time.Sleep(limit / 4)
		w.signal(w.guardian, syscall.SIGSTOP)
		time.Sleep(3 * limit)
		w.signal(w.guardian, syscall.SIGCONT)
		w.lives(limit/4, "it had no time to answer")
		w.signal(w.cmd.Process.Pid, syscall.SIGCONT)
		w.waits(0)
		w.answers()
	})
	// A guest that was left isn't looked at any more.
	t.Run("left", func(t *testing.T) {
		t.Parallel()
		w := watchedTool(t)
		w.waits(1)
		w.tell("leave")
		w.says("left")
		w.signal(w.cmd.Process.Pid, syscall.SIGSTOP)
		w.lives(3*limit, "it has no guest")
	})
}

// TestWatchRefused: a guardian says why it can't do what it is asked for.
func TestWatchRefused(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	require.NoError(t, Start(log))
	missing := journal.Path(target.JournalDir(), fmt.Sprintf("test-%d-missing", os.Getpid()))
	err := Watch(missing, time.Minute)
	assert.ErrorContains(t, err, "no such file")
	assert.NoError(t, Start(log), "it lives on")

	w := watchedTool(t) // whose journal has the owner that another process is
	err = Watch(w.path, time.Minute)
	assert.ErrorContains(t, err, "journal", "%v", err)

	for _, line := range []string{"", "watch", "watch 5", "watch x /a", "watch -1 /a", "watch 0 /a", "watched 1 /a"} {
		_, err := parseRequest(line)
		assert.Error(t, err, "%q", line)
	}
	r := request{"/run/a b", 3 * time.Second}
	got, err := parseRequest(strings.TrimSuffix(r.String(), "\n"))
	require.NoError(t, err)
	assert.Equal(t, r, got)
}

// TestOpenProcess: no other process is meant than the one that began then.
func TestOpenProcess(t *testing.T) {
	began, err := journal.StartTime(os.Getpid())
	require.NoError(t, err)
	fd, err := openProcess(os.Getpid(), began)
	require.NoError(t, err)
	require.NoError(t, syscall.Close(fd))
	_, err = openProcess(os.Getpid(), began+1)
	assert.ErrorContains(t, err, "another one")
	gone := exec.Command("/proc/self/exe", "-test.run=^$")
	require.NoError(t, gone.Run())
	_, err = openProcess(gone.Process.Pid, began)
	assert.ErrorIs(t, err, syscall.ESRCH)
}
