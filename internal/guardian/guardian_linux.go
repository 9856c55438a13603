package guardian

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmprobes/vmprobes/internal/journal"
	"github.com/vmprobes/vmprobes/internal/target"
)

func init() {
	of := os.Getenv(environment)
	if of == "" {
		return
	}
	if err := guard(of); err != nil {
		os.Exit(1)
	}
	os.Exit(0)
}

// The guardian of this process. There is one for all guests.
var (
	mu   sync.Mutex
	conn *os.File // our end of the connection, which ends when either process does
	pid  int
)

// readyFor bounds how long a guardian may take to get ready.
const readyFor = 10 * time.Second

// Start sees to it that this process has a guardian, and returns when it is ready.
func Start(log *slog.Logger) error {
	mu.Lock()
	defer mu.Unlock()
	if conn != nil {
		if alive(conn) {
			return nil
		}
		log.Warn("the guardian has died; another one is started", "pid", pid)
		_ = conn.Close()
		conn = nil
	}
	if err := startApart(); err != nil {
		if err := start("/proc/self/exe"); err != nil {
			return fmt.Errorf("%w: %w", ErrNoGuardian, err)
		}
	}
	if mine, theirs := cgroup("self"), cgroup(strconv.Itoa(pid)); mine != "" && mine == theirs {
		log.Debug("the guardian shares this process' cgroup, and what kills all of that", "pid", pid, "cgroup", mine)
	}
	return nil
}

// startApart starts a guardian in a unit of its own, where systemd runs: what kills this
// one's cgroup doesn't kill both then.
func startApart() error {
	if _, err := os.Stat("/run/systemd/system"); err != nil {
		return err
	}
	path, err := exec.LookPath("systemd-run")
	if err != nil {
		return err
	}
	return start(path, "--quiet", "--no-ask-password", "--collect", "--scope", "--slice=system.slice", fmt.Sprintf("/proc/%d/exe", os.Getpid()))
}

// start starts a guardian by a command whose process becomes it.
func start(name string, args ...string) (err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "guardian"), os.NewFile(uintptr(fds[1]), "guarded")
	defer theirs.Close()
	defer func() {
		if err != nil {
			_ = ours.Close()
		}
	}()
	began, err := journal.StartTime(os.Getpid())
	if err != nil {
		return err
	}
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%d:%d", environment, os.Getpid(), began))
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.Dir = "/"
	// Whatever this process writes to, somebody may wait for its end.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	go func() { _ = cmd.Wait() }()
	if err := ready(ours); err != nil {
		_ = cmd.Process.Kill()
		return err
	}
	conn, pid = ours, cmd.Process.Pid
	return nil
}

// ready waits until the guardian says that it is.
func ready(f *os.File) error {
	c, err := net.FileConn(f)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetReadDeadline(time.Now().Add(readyFor)); err != nil {
		return err
	}
	said, err := io.ReadAll(io.LimitReader(c, int64(len(readyWord))))
	if string(said) != readyWord {
		return fmt.Errorf("it said %q and not that it is ready: %v", said, err)
	}
	return nil
}

const readyWord = "ready\n"

// alive reports whether the guardian at the other end lives.
func alive(f *os.File) bool {
	p := []unix.PollFd{{Fd: int32(f.Fd()), Events: unix.POLLRDHUP}}
	n, err := unix.Poll(p, 0)
	return err == nil && n == 0
}

// cgroup returns the cgroup (version 2) of a process, or "".
func cgroup(process string) string {
	b, err := os.ReadFile("/proc/" + process + "/cgroup")
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(b)) {
		if path, ok := strings.CutPrefix(line, "0::"); ok {
			return strings.TrimSpace(path)
		}
	}
	return ""
}

// guard is the guardian's life.
func guard(of string) error {
	p, s, _ := strings.Cut(of, ":")
	owner, err1 := strconv.Atoi(p)
	began, err2 := strconv.ParseUint(s, 10, 64)
	if err := errors.Join(err1, err2, os.Unsetenv(environment)); err != nil {
		return err
	}
	signal.Ignore(syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGPIPE, syscall.SIGTTIN, syscall.SIGTTOU)
	conn := os.NewFile(3, "guarded")
	leaveFiles()
	unix.CloseOnExec(3)
	// What can't be had of this makes the guardian less sure, not useless.
	_ = os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0)
	_ = unix.Mlockall(unix.MCL_CURRENT)
	debug.SetGCPercent(-1)
	_ = os.WriteFile("/proc/self/comm", []byte("vmprobes-guard"), 0)
	// If that fails the other end is dead already: it may have had another guardian before,
	// and guests.
	if _, err := conn.WriteString(readyWord); err == nil {
		_, _ = io.Copy(io.Discard, conn) // until the other end is closed, which is its death
	} else if !errors.Is(err, syscall.EPIPE) {
		return err
	}
	debug.SetGCPercent(100)
	return takeOver(target.JournalDirs(), owner, began)
}

// leaveFiles puts the null device in the place of what the guardian has inherited: at the
// other end of a pipe somebody may wait for the end of the process that it was of, and a
// repair may take longer than that. What the Go runtime has opened for itself stays.
func leaveFiles() {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return
	}
	defer null.Close()
	for fd := range 3 {
		_ = unix.Dup3(int(null.Fd()), fd, 0)
	}
	entries, _ := os.ReadDir("/proc/self/fd")
	for _, e := range entries {
		fd, err := strconv.Atoi(e.Name())
		if err != nil || fd <= 3 || fd == int(null.Fd()) {
			continue
		}
		if to, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil && !strings.HasPrefix(to, "anon_inode:") {
			_ = unix.Dup3(int(null.Fd()), fd, unix.O_CLOEXEC)
		}
	}
}

// takeOverFor bounds how long a guardian tries.
const takeOverFor = 10 * time.Minute

// takeOver repairs the guests of a process that has died.
func takeOver(dirs []string, owner int, began uint64) error {
	log, done := logger(dirs[len(dirs)-1])
	defer done()
	ctx, cancel := context.WithTimeout(context.Background(), takeOverFor)
	defer cancel()
	for pause := time.Millisecond; ; pause = min(2*pause, time.Second) {
		var entries []journal.Entry
		for _, dir := range dirs {
			more, err := journal.List(dir)
			if err != nil && !errors.Is(err, os.ErrPermission) {
				log.Error("look for guests to be repaired", "folder", dir, "err", err)
			}
			entries = append(entries, more...)
		}
		var wg sync.WaitGroup
		left := 0
		for _, e := range entries {
			if e.Err != nil || e.Owner.PID != owner || e.Owner.Start != began {
				continue
			}
			left++
			if e.Hot { // its lock goes a moment after its end of the connection
				wg.Go(func() {
					if _, err := target.Recover(ctx, e.Path, log); err != nil && !errors.Is(err, os.ErrNotExist) {
						log.Error("repair a guest", "journal", e.Path, "err", err)
					}
				})
			}
		}
		wg.Wait()
		if left == 0 || ctx.Err() != nil {
			return ctx.Err()
		}
		time.Sleep(pause)
	}
}

// logger returns where a guardian says what it did: it has no terminal.
func logger(dir string) (*slog.Logger, func()) {
	name := filepath.Join(dir, "guardian.log")
	flags := unix.O_WRONLY | unix.O_APPEND | unix.O_CREAT | unix.O_NOFOLLOW | unix.O_CLOEXEC | unix.O_NONBLOCK
	const long = 1 << 20
	if st, err := os.Lstat(name); err == nil && st.Size() > long {
		flags |= unix.O_TRUNC
	}
	f, err := os.OpenFile(name, flags, 0o600)
	if err != nil {
		return slog.New(slog.DiscardHandler), func() {}
	}
	return slog.New(slog.NewTextHandler(f, nil)), func() { _ = f.Close() }
}
