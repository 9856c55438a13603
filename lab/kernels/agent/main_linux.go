//go:build amd64 || 386

package main

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/vmprobes/vmprobes/internal/console"
	"github.com/vmprobes/vmprobes/lab/internal/kmsg"
)

func main() {
	if does := os.Getenv(childEnv); does != "" {
		child(does)
	}
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "agent: this is the /init of a guest, not to be run elsewhere")
		os.Exit(1)
	}
	if err := setup(); err != nil {
		say("ERR %v", err)
	}
	for _, err := range loadModules() {
		say("ERR %v", err)
	}
	for _, err := range startChildren() {
		say("ERR %v", err)
	}
	runtime.GC()
	debug.SetGCPercent(-1)
	var name unix.Utsname
	_ = unix.Uname(&name)
	say("GUEST READY %s", unix.ByteSliceToString(name.Release[:]))
	console.Serve(os.Stdin, say, command)
}

func say(format string, args ...any) { fmt.Printf(format+"\n", args...) }

// setup makes the system usable, and the console quiet and raw.
func setup() error {
	for _, m := range []struct{ target, kind string }{
		{"/proc", "proc"}, {"/sys", "sysfs"}, {"/dev", "devtmpfs"},
	} {
		_ = os.MkdirAll(m.target, 0o755)
		if err := unix.Mount(m.kind, m.target, m.kind, 0, ""); err != nil && err != unix.EBUSY {
			return fmt.Errorf("mount %s: %w", m.target, err)
		}
	}
	for _, s := range []struct{ file, value string }{
		{"/proc/sys/kernel/kptr_restrict", "0"},
		{"/proc/sys/kernel/printk", "1"}, // only a panic may still write to the console
	} {
		if err := os.WriteFile(s.file, []byte(s.value), 0o644); err != nil {
			return err
		}
	}
	console, err := os.OpenFile("/dev/ttyS0", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	for std := range 3 {
		if err := unix.Dup3(int(console.Fd()), std, 0); err != nil && int(console.Fd()) != std {
			return err
		}
	}
	t, err := unix.IoctlGetTermios(0, unix.TCGETS)
	if err != nil {
		return err
	}
	t.Iflag, t.Oflag, t.Lflag = 0, 0, 0
	return unix.IoctlSetTermios(0, unix.TCSETS, t)
}

func loadModules() (errs []error) {
	files, err := filepath.Glob("/modules/*.ko")
	if err != nil {
		return []error{err}
	}
	for _, file := range files { // in the order of their names
		b, err := os.ReadFile(file)
		if err == nil {
			err = unix.InitModule(b, "")
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", file, err))
		}
	}
	return errs
}

func command(words []string) (string, error) {
	switch {
	case words[0] == "ping":
		return "ping", nil
	case words[0] == "say" && len(words) == 2:
		return tell(words[1] == "all")
	case words[0] == "open" && len(words) == 3:
		n, err := strconv.ParseUint(words[2], 10, 32)
		if err != nil {
			return "", err
		}
		return open(words[1], int(n))
	case words[0] == "dmesg":
		return dmesg()
	}
	return "", fmt.Errorf("unknown command %q", words)
}

// tell sends what /proc says.
func tell(all bool) (string, error) {
	var files []string
	if all {
		files = append(files, "/proc/kallsyms", "/proc/modules", "/proc/version")
	}
	for _, pattern := range []string{
		"/proc/[0-9]*/cmdline", "/proc/[0-9]*/stat",
		"/proc/[0-9]*/task/[0-9]*/comm", "/proc/[0-9]*/task/[0-9]*/status",
	} {
		more, err := filepath.Glob(pattern)
		if err != nil {
			return "", err
		}
		files = append(files, more...)
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			continue // the process has ended
		}
		if err := w.WriteHeader(&tar.Header{Name: strings.TrimPrefix(file, "/proc/"), Mode: 0o444, Size: int64(len(data))}); err != nil {
			return "", err
		}
		if _, err := w.Write(data); err != nil {
			return "", err
		}
	}
	if err := w.Close(); err != nil {
		return "", err
	}
	return show(b.Bytes())
}

// shown is what lies in memory for the host to read.
var shown []byte

// show keeps data in memory and tells in which page frames.
func show(data []byte) (string, error) {
	if shown != nil {
		_ = unix.Munmap(shown)
	}
	var err error
	size := (len(data) + pageSize - 1) &^ (pageSize - 1)
	if shown, err = unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_POPULATE|unix.MAP_LOCKED); err != nil {
		return "", err
	}
	copy(shown, data)
	frames, err := framesOf(shown)
	if err != nil {
		return "", err
	}
	for i := 0; i < len(frames); {
		n := 1
		for i+n < len(frames) && frames[i+n] == frames[i]+uint64(n) {
			n++
		}
		say("| %x %x", frames[i], n)
		i += n
	}
	return fmt.Sprintf("say bytes=%d sha256=%x", len(data), sha256.Sum256(data)), nil
}

const pageSize = 4096

// framesOf returns the page frames of memory (Documentation/admin-guide/mm/pagemap.rst).
func framesOf(memory []byte) ([]uint64, error) {
	f, err := os.Open("/proc/self/pagemap")
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	const entry, present, frame = 8, 1 << 63, 1<<55 - 1
	b := make([]byte, len(memory)/pageSize*entry)
	if _, err := f.ReadAt(b, int64(address(memory)/pageSize*entry)); err != nil {
		return nil, err
	}
	var frames []uint64
	for ; len(b) > 0; b = b[entry:] {
		e := binary.LittleEndian.Uint64(b)
		if e&present == 0 || e&frame == 0 {
			return nil, fmt.Errorf("pagemap: %#x", e)
		}
		frames = append(frames, e&frame)
	}
	return frames, nil
}

// open opens a file so many times.
func open(path string, n int) (string, error) {
	name, err := unix.BytePtrFromString(path)
	if err != nil {
		return "", err
	}
	opened := 0
	for range n {
		if fd, ok := openat(name); ok {
			opened++
			_ = unix.Close(fd)
		}
	}
	return fmt.Sprintf("open calls=%d opened=%d", n, opened), nil
}

// trouble matches what a damaged kernel logs.
var trouble = regexp.MustCompile(`BUG:|Oops|int3|WARNING:|general protection|invalid opcode|Call Trace|soft lockup|rcu.*stall|Kernel panic|unhandled|cut here`)

var toldBefore int

// dmesg tells the trouble since the last time.
func dmesg() (string, error) {
	bad, err := kmsg.Messages()
	if err != nil {
		return "", err
	}
	bad = slices.DeleteFunc(bad, func(message string) bool { return !trouble.MatchString(message) })
	fresh := bad[min(toldBefore, len(bad)):]
	toldBefore = len(bad)
	for _, line := range fresh {
		say("| %s", line)
	}
	return fmt.Sprintf("dmesg bad=%d", len(fresh)), nil
}

// childEnv says what a child does, beside its command line.
const childEnv = "AGENT_CHILD"

// startChildren starts processes that stay, and one that is a zombie.
func startChildren() (errs []error) {
	long := []string{"long"}
	for i := range 600 { // some pages
		long = append(long, fmt.Sprintf("argument-%d", i))
	}
	for _, c := range []struct {
		does string // names of threads, and how it ends
		args []string
		attr unix.SysProcAttr
	}{
		{"threads:one,two,fifteen-letters", []string{"worker", "--threads", "3"}, unix.SysProcAttr{}},
		{"threads:a b(c) d", []string{"(odd) name", "", "an argument", "\x01\x02\xff"}, unix.SysProcAttr{}},
		{"threads:tab\tnew\nline", []string{"-sh"}, unix.SysProcAttr{}},
		{"threads:\xc3\xa4\xc3\xb6 \xff\xfe", long, unix.SysProcAttr{}},
		{"threads:user", []string{"user", "of", "its", "own"}, unix.SysProcAttr{Credential: &other}},
		{"threads:namespace", []string{"namespace"}, unix.SysProcAttr{Cloneflags: unix.CLONE_NEWPID}},
		{"zombie", []string{"zombie"}, unix.SysProcAttr{}},
	} {
		r, w, err := os.Pipe()
		if err != nil {
			return append(errs, err)
		}
		p, err := os.StartProcess("/init", c.args, &os.ProcAttr{
			Env:   []string{childEnv + "=" + c.does, "GOGC=off", "PATH=/bin"},
			Files: []*os.File{r, r, r, w},
			Sys:   &c.attr,
		})
		_ = w.Close()
		if err != nil {
			errs = append(errs, fmt.Errorf("start %s: %w", c.does, err))
			_ = r.Close()
			continue
		}
		_ = p // never waited for
		// It says that it is ready, or ends, which closes its pipe.
		_, _ = r.Read(make([]byte, 1))
		_ = r.Close()
	}
	return errs
}

// child is one of those processes.
func child(does string) {
	does, names, _ := strings.Cut(does, ":")
	if does != "threads" {
		os.Exit(0)
	}
	var ready sync.WaitGroup
	for name := range strings.SplitSeq(names, ",") {
		ready.Add(1)
		go func() {
			runtime.LockOSThread()
			rename(name)
			ready.Done()
			stay()
		}()
	}
	ready.Wait()
	runtime.LockOSThread()
	_, _ = os.NewFile(3, "ready").Write([]byte{1})
	stay()
}

// rename gives the calling thread a name.
func rename(name string) {
	p, err := unix.BytePtrFromString(name)
	if err != nil {
		return
	}
	setName(p)
}

// stay blocks the calling thread for ever.
func stay() {
	for {
		_ = unix.Pause()
	}
}
