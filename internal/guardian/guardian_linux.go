package guardian

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"slices"
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
	if os.Getenv(between) != "" {
		if err := leave(os.Args[1:]); err != nil {
			os.Exit(1)
		}
		os.Exit(0)
	}
	if err := guard(of); err != nil {
		os.Exit(1)
	}
	os.Exit(0)
}

// The guardian of this process. There is one for all guests.
var (
	mu      sync.Mutex
	conn    *os.File // our end of the connection, which ends when either process does
	pid     int
	watched []request // what it was asked to watch
)

// answerFor bounds how long a guardian may take to get ready, and to answer. On a host
// where a dozen programs wait for each processor it has taken more than ten seconds.
const answerFor = 30 * time.Second

// Start sees to it that this process has a guardian, and returns when it is ready.
func Start(log *slog.Logger) error {
	mu.Lock()
	defer mu.Unlock()
	if conn != nil {
		if alive(conn) {
			return nil
		}
		log.Warn("the guardian has died; another one is started", "pid", pid)
		stop()
	}
	if err := startApart(); err != nil {
		if err := start("/proc/self/exe"); err != nil {
			return fmt.Errorf("%w: %w", ErrNoGuardian, err)
		}
	}
	if mine, theirs := cgroup("self"), cgroup(strconv.Itoa(pid)); mine != "" && mine == theirs {
		log.Debug("the guardian shares this process' cgroup, and what kills all of that", "pid", pid, "cgroup", mine)
	}
	before := watched
	watched = nil
	for _, r := range before {
		// Most of these guests may have been left.
		if _, err := os.Stat(r.path); errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err := watch(r); err != nil {
			log.Error("the new guardian doesn't watch a guest", "journal", r.path, "err", err)
		}
	}
	return nil
}

// stop gives the guardian up; mu is held.
func stop() {
	_ = conn.Close()
	conn, pid = nil, 0
}

// Watch has the guardian end this process should the guest whose journal is at path wait
// for it for longer than limit, and repair the guest then. Start has been called.
func Watch(path string, limit time.Duration) error {
	mu.Lock()
	defer mu.Unlock()
	return watch(request{path, limit})
}

// watch asks the guardian; mu is held.
func watch(r request) error {
	if conn == nil {
		return ErrNoGuardian
	}
	// The program may not ignore SIGPIPE.
	if _, err := unix.SendmsgN(int(conn.Fd()), []byte(r.String()), nil, nil, unix.MSG_NOSIGNAL); err != nil {
		return fmt.Errorf("ask the guardian, process %d, to watch a guest: %w", pid, err)
	}
	answer, err := hear(conn)
	if err == nil && answer != watching {
		err = errors.New(answer)
	}
	if err != nil {
		return fmt.Errorf("the guardian, process %d, doesn't watch the guest: %w", pid, err)
	}
	watched = append(slices.DeleteFunc(watched, func(o request) bool { return o.path == r.path }), r)
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
	// By way of a process that ends at once: the guardian is no child of this one, whose
	// program may wait for any child there is.
	cmd := exec.Command("/proc/self/exe", append([]string{name}, args...)...)
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%d:%d", environment, os.Getpid(), began), between+"=1")
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.Dir = "/"
	if err := cmd.Run(); err != nil && !errors.Is(err, syscall.ECHILD) { // the program has waited for it
		return err
	}
	_ = theirs.Close() // so that there is an end to be heard if it dies
	said, err := hear(ours)
	if err != nil {
		return err
	}
	n, err := strconv.Atoi(strings.TrimPrefix(said, readyWord))
	if err != nil {
		return fmt.Errorf("it said %q and not that it is ready", said)
	}
	conn, pid = ours, n
	return nil
}

// leave starts a command and doesn't wait for it.
func leave(command []string) error {
	if len(command) == 0 {
		return errors.New("no command")
	}
	if err := os.Unsetenv(between); err != nil {
		return err
	}
	cmd := exec.Command(command[0], command[1:]...)
	cmd.ExtraFiles = []*os.File{os.NewFile(3, "guarded")}
	// Whatever this process writes to, somebody may wait for its end.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	return cmd.Start()
}

// hear returns a line of what the guardian says.
func hear(f *os.File) (string, error) {
	c, err := net.FileConn(f)
	if err != nil {
		return "", err
	}
	defer c.Close()
	if err := c.SetReadDeadline(time.Now().Add(answerFor)); err != nil {
		return "", err
	}
	const long = 4096
	var line []byte
	for b := make([]byte, 1); len(line) < long; line = append(line, b[0]) {
		if _, err := c.Read(b); err != nil {
			return "", fmt.Errorf("it said %q: %w", line, err)
		}
		if b[0] == '\n' {
			return string(line), nil
		}
	}
	return "", fmt.Errorf("it said %q and more", line)
}

const (
	readyWord = "ready " // its process number follows
	watching  = "watching"
)

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
	if _, err := fmt.Fprintf(conn, "%s%d\n", readyWord, os.Getpid()); err == nil {
		serve(conn, &warden{owner: owner, began: began, look: look, log: guardianLog})
	} else if !errors.Is(err, syscall.EPIPE) {
		return err
	}
	debug.SetGCPercent(100)
	return takeOver(target.JournalDirs(), owner, began)
}

// serve does what the other end asks for until that is closed, which is its death.
func serve(conn *os.File, w *warden) {
	requests := make(chan string)
	go func() {
		defer close(requests)
		for lines := bufio.NewScanner(conn); lines.Scan(); {
			requests <- lines.Text()
		}
	}()
	for {
		select {
		case line, ok := <-requests:
			if !ok {
				return
			}
			answer := watching
			if err := w.add(line); err != nil {
				answer = strings.ReplaceAll(err.Error(), "\n", "; ")
			}
			_, _ = conn.WriteString(answer + "\n")
		case <-w.ticks():
			w.tick()
		}
	}
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
	log, done := guardianLog()
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

// guardianLog returns where a guardian says what it did: it has no terminal.
func guardianLog() (*slog.Logger, func()) {
	dirs := target.JournalDirs()
	name := filepath.Join(dirs[len(dirs)-1], "guardian.log")
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
