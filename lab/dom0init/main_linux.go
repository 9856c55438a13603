package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/vmprobes/vmprobes/lab/internal/job"
	"github.com/vmprobes/vmprobes/lab/internal/wire"
	"github.com/vmprobes/vmprobes/lab/labguest"
	"golang.org/x/sys/unix"
)

const (
	port        = "/dev/ttyS1"
	daemonLimit = 3 * time.Minute // Bochs is slow
)

func main() {
	if os.Getpid() == 1 {
		reap()
	}
	if os.Getppid() != 1 {
		fmt.Fprintln(os.Stderr, "dom0init: this is the /init of the lab's emulated dom0, not to be run elsewhere")
		os.Exit(1)
	}
	code := 0
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "dom0init:", err)
		code = 1
	}
	os.Exit(code)
}

// reap is process 1: it starts the real work in a child, collects every
// orphan, and ends the machine when the child is done.
func reap() {
	pid, err := syscall.ForkExec("/proc/self/exe", []string{"dom0init"}, &syscall.ProcAttr{
		Env: os.Environ(), Files: []uintptr{0, 1, 2}, Sys: &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		// /proc is not there yet on the first try.
		pid, err = syscall.ForkExec("/init", []string{"dom0init"}, &syscall.ProcAttr{
			Env: os.Environ(), Files: []uintptr{0, 1, 2}, Sys: &syscall.SysProcAttr{Setsid: true},
		})
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "dom0init: fork:", err)
	}
	for err == nil {
		var got int
		got, err = syscall.Wait4(-1, nil, 0, nil)
		if errors.Is(err, syscall.EINTR) {
			err = nil
		}
		if got == pid {
			break
		}
	}
	unix.Sync()
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	select {}
}

func run() error {
	if err := mounts(); err != nil {
		return err
	}
	line, err := openPort()
	if err != nil {
		return err
	}
	out := wire.NewWriter(line)
	if err := serve(line, out); err != nil {
		_ = out.Send(wire.Message{Kind: wire.Fatal, Data: err.Error()})
		drain(line)
		return err
	}
	drain(line)
	return nil
}

func serve(line *os.File, out *wire.Writer) error {
	status := func(s string) { _ = out.Send(wire.Message{Kind: wire.Status, Data: s}) }
	status("dom0 kernel up")
	var j job.Job
	b, err := os.ReadFile(job.Path)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, &j); err != nil {
		return fmt.Errorf("%s: %w", job.Path, err)
	}
	environment(j)
	if err := modules(); err != nil {
		return err
	}
	if err := unix.Mount("xenfs", "/proc/xen", "xenfs", 0, ""); err != nil {
		return fmt.Errorf("mount /proc/xen: %w", err)
	}
	if err := xenDaemons(); err != nil {
		return err
	}
	status("Xen tools up")

	if len(j.Args) == 0 {
		return shell(j, line, out)
	}
	_ = out.Send(wire.Message{Kind: wire.Start})
	stopLogs := followLogs(out)
	code := runJob(j, out)
	stopLogs()
	for _, pattern := range j.Collect {
		sendFiles(out, pattern)
	}
	if code != 0 {
		if b, err := exec.Command("xl", "list").CombinedOutput(); err == nil {
			_ = out.Send(wire.Message{Kind: wire.File, Name: "xl-list.txt", Data: string(b)})
		}
	}
	return out.Send(wire.Message{Kind: wire.Exit, Code: code})
}

func mounts() error {
	for _, m := range []struct{ source, target, kind, data string }{
		{"proc", "/proc", "proc", ""},
		{"sysfs", "/sys", "sysfs", ""},
		{"devtmpfs", "/dev", "devtmpfs", ""},
		{"devpts", "/dev/pts", "devpts", "ptmxmode=0666"},
		{"tmpfs", "/dev/shm", "tmpfs", ""},
		{"tmpfs", "/run", "tmpfs", ""},
		{"tmpfs", "/tmp", "tmpfs", ""},
	} {
		if err := os.MkdirAll(m.target, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.source, m.target, m.kind, 0, m.data); err != nil && !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("mount %s: %w", m.target, err)
		}
	}
	for _, dir := range []string{"/run/lock", "/run/xen", "/var/log/xen", "/var/lib/xen", "/var/lib/xenstored", "/run/xenstored", job.WorkDir} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	return unix.Sethostname([]byte("labdom0"))
}

func environment(j job.Job) {
	os.Clearenv()
	set := func(kv string) {
		k, v, _ := strings.Cut(kv, "=")
		_ = os.Setenv(k, v)
	}
	for _, kv := range []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin:" + job.XenBin(job.Find(j.Host).Xen), "HOME=/root", "TMPDIR=/tmp", "TERM=vt100", job.EnvHost + "=" + j.Host, job.EnvCmdline + "=" + j.Cmdline} {
		set(kv)
	}
	for _, kv := range j.Env {
		set(kv)
	}
}

// openPort opens the serial port of the lab protocol, with nothing added to or
// taken from what is written.
func openPort() (*os.File, error) {
	f, err := os.OpenFile(port, os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	fd := int(f.Fd()) // blocking from here on
	t, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", port, err)
	}
	t.Iflag, t.Oflag, t.Lflag = 0, 0, 0
	t.Cflag = unix.CS8 | unix.CREAD | unix.CLOCAL | unix.B115200
	t.Cc[unix.VMIN], t.Cc[unix.VTIME] = 1, 0
	if err := unix.IoctlSetTermios(fd, unix.TCSETS, t); err != nil {
		return nil, fmt.Errorf("%s: %w", port, err)
	}
	return f, nil
}

// drain waits until everything written has left.
func drain(f *os.File) {
	_ = unix.IoctlSetInt(int(f.Fd()), unix.TCSBRK, 1)
	time.Sleep(200 * time.Millisecond)
}

func modules() error {
	list, err := os.ReadFile(job.Modules)
	if err != nil {
		return err
	}
	for path := range strings.FieldsSeq(string(list)) {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		err = unix.FinitModule(int(f.Fd()), "", 0)
		_ = f.Close()
		if err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("load module %s: %w", path, err)
		}
	}
	return nil
}

func xenDaemons() error {
	if err := command("xenstored", "--pid-file", "/run/xenstored.pid"); err != nil {
		return err
	}
	for start := time.Now(); ; time.Sleep(50 * time.Millisecond) {
		if err := command("xenstore-ls", "-s"); err == nil {
			break
		} else if time.Since(start) > daemonLimit {
			return fmt.Errorf("xenstored does not answer: %w", err)
		}
	}
	if err := command("xen-init-dom0"); err != nil {
		return err
	}
	return command("xenconsoled", "--log=all", "--log-dir=/var/log/xen", "--pid-file=/run/xenconsoled.pid")
}

func command(name string, args ...string) error {
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", name, err, strings.TrimSpace(string(out)))
	}
	return nil
}

// runJob runs the job and returns the exit code for it. A job that is not a
// program gets the codes a shell would give.
func runJob(j job.Job, out *wire.Writer) int {
	cmd := exec.Command(j.Args[0], j.Args[1:]...)
	cmd.Dir = job.WorkDir
	cmd.WaitDelay = 2 * time.Second
	stderr := out.Stream(wire.Stderr, "")
	stdout := coalesce(out.Stream(wire.Stdout, ""))
	cmd.Stdout, cmd.Stderr = stdout, stderr
	err := cmd.Run()
	stdout.flush()
	var exit *exec.ExitError
	switch {
	case err == nil || errors.Is(err, exec.ErrWaitDelay):
		return 0
	case errors.As(err, &exit):
		if ws, ok := exit.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
			fmt.Fprintf(stderr, "dom0init: %s: killed by %v\n", j.Args[0], ws.Signal())
			return 128 + int(ws.Signal())
		}
		return exit.ExitCode()
	case errors.Is(err, os.ErrNotExist):
		fmt.Fprintln(stderr, "dom0init:", err)
		return 127
	}
	fmt.Fprintln(stderr, "dom0init:", err)
	return 126
}

// coalescer joins small writes for a moment: each message has its overhead on
// a slow line.
type coalescer struct {
	mu    sync.Mutex
	w     io.Writer
	buf   []byte
	timer *time.Timer
}

func coalesce(w io.Writer) *coalescer {
	c := &coalescer{w: w}
	c.timer = time.AfterFunc(time.Hour, c.flush)
	return c
}

func (c *coalescer) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.buf = append(c.buf, p...)
	if len(c.buf) < 512 {
		c.timer.Reset(20 * time.Millisecond)
		return len(p), nil
	}
	return len(p), c.send()
}

func (c *coalescer) flush() {
	c.mu.Lock()
	defer c.mu.Unlock()
	_ = c.send()
}

func (c *coalescer) send() error {
	if len(c.buf) == 0 {
		return nil
	}
	_, err := c.w.Write(c.buf)
	c.buf = c.buf[:0]
	return err
}

// followLogs sends what the guests write to their consoles while they do, so
// that it is there even if dom0 comes to no end. The returned function sends
// the rest and stops.
func followLogs(out *wire.Writer) (stop func()) {
	sent := map[string]int64{}
	look := func() {
		paths, _ := filepath.Glob(job.GuestLogs)
		for _, path := range paths {
			b, err := os.ReadFile(path)
			if err != nil {
				continue
			}
			if int64(len(b)) < sent[path] { // another guest of that name
				sent[path] = 0
			}
			if rest := b[sent[path]:]; len(rest) > 0 {
				_ = out.Send(wire.Message{Kind: wire.File, Name: filepath.Base(path), Data: string(rest)})
				sent[path] = int64(len(b))
			}
		}
	}
	quit, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-quit:
				look()
				return
			case <-time.After(2 * time.Second):
				look()
			}
		}
	}()
	return func() {
		close(quit)
		<-done
	}
}

// sendFiles sends each file that matches.
func sendFiles(out *wire.Writer, pattern string) {
	paths, _ := filepath.Glob(pattern)
	for _, path := range paths {
		b, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		_ = out.Send(wire.Message{Kind: wire.File, Name: filepath.Base(path), Data: string(b)})
	}
}

// shell gives the serial port to an interactive shell until that ends.
func shell(j job.Job, line *os.File, out *wire.Writer) error {
	if j.ShellGuest != "" {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
		defer cancel()
		if g, err := labguest.Start(ctx, labguest.Config{Name: j.ShellGuest}); err != nil {
			_ = out.Send(wire.Message{Kind: wire.Status, Data: "guest " + j.ShellGuest + ": " + err.Error()})
		} else {
			_ = out.Send(wire.Message{Kind: wire.Status, Data: fmt.Sprintf("guest %s is domain %d", j.ShellGuest, g.DomID())})
			g.Leave()
		}
	}
	_ = out.Send(wire.Message{Kind: wire.Start})
	drain(line)
	fd := int(line.Fd())
	saved, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return err
	}
	cooked := *saved
	cooked.Iflag = unix.ICRNL | unix.IXON
	cooked.Oflag = unix.OPOST | unix.ONLCR
	cooked.Lflag = unix.ICANON | unix.ECHO | unix.ECHOE | unix.ECHOK | unix.ISIG | unix.IEXTEN
	for i, c := range map[int]uint8{unix.VINTR: 3, unix.VERASE: 127, unix.VEOF: 4, unix.VSUSP: 26, unix.VKILL: 21, unix.VMIN: 1} {
		cooked.Cc[i] = c
	}
	_ = unix.IoctlSetTermios(fd, unix.TCSETS, &cooked)
	_ = unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: j.Rows, Col: j.Columns})
	cmd := exec.Command("/bin/sh")
	cmd.Dir = job.WorkDir
	cmd.Stdin, cmd.Stdout, cmd.Stderr = line, line, line
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true, Ctty: 0}
	err = cmd.Run()
	_ = unix.IoctlSetTermios(fd, unix.TCSETS, saved)
	code := 0
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		code = exit.ExitCode()
	}
	return out.Send(wire.Message{Kind: wire.Exit, Code: code})
}
