package main

import (
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmprobes/vmprobes/internal/console"
)

func main() {
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "guestinit: this is the /init of a lab guest, not to be run elsewhere")
		os.Exit(1)
	}
	setup()
	loadModules()
	cpus := runtime.NumCPU()
	// Enough threads for everything that spins at once. Setting it also stops
	// the runtime from looking up the CPU limit, which opens files.
	runtime.GOMAXPROCS(4*cpus + 4)

	g := newGuest(cpus)
	g.badAtStart = len(g.scanLog())
	g.warmUp()
	// From here on the runtime must not open anything on its own.
	runtime.GC()
	debug.SetGCPercent(-1)
	g.startCheckers()

	var name unix.Utsname
	_ = unix.Uname(&name)
	say("GUEST READY %s %d", unix.ByteSliceToString(name.Release[:]), cpus)
	console.Serve(stdin{}, say, g.command)
}

var sayLock sync.Mutex

// say prints one line in one piece.
func say(format string, args ...any) {
	sayLock.Lock()
	defer sayLock.Unlock()
	line := fmt.Appendf(nil, format+"\n", args...)
	for len(line) > 0 {
		n, err := unix.Write(1, line)
		if err != nil && err != unix.EINTR && err != unix.EAGAIN {
			return
		}
		line = line[max(n, 0):]
	}
}

// setup makes the system usable and the console quiet.
func setup() {
	for _, m := range []struct{ source, target, kind string }{
		{"proc", "/proc", "proc"},
		{"sysfs", "/sys", "sysfs"},
		{"devtmpfs", "/dev", "devtmpfs"},
		{"tmpfs", "/tmp", "tmpfs"},
	} {
		_ = os.MkdirAll(m.target, 0o755)
		if err := unix.Mount(m.source, m.target, m.kind, 0, ""); err != nil && err != unix.EBUSY {
			say("ERR mount %s: %v", m.target, err)
		}
	}
	// The kernel opened /dev/console for us if the archive had it; hvc0 is
	// the console itself.
	if fd, err := unix.Open("/dev/hvc0", unix.O_RDWR, 0); err == nil {
		for std := range 3 {
			_ = unix.Dup2(fd, std)
		}
		if fd > 2 {
			_ = unix.Close(fd)
		}
	}
	if t, err := unix.IoctlGetTermios(0, unix.TCGETS); err == nil {
		t.Lflag &^= unix.ECHO | unix.ISIG
		t.Oflag &^= unix.OPOST
		_ = unix.IoctlSetTermios(0, unix.TCSETS, t)
	}
	// Only a panic may still write to the console.
	const consoleLevel = 8
	_, _, _ = unix.Syscall(unix.SYS_SYSLOG, consoleLevel, 0, 1)
	_ = unix.Sethostname([]byte("labguest"))
}

// stdin reads the standard input with the plain system call, without the
// runtime's poller.
type stdin struct{}

func (stdin) Read(p []byte) (int, error) {
	for {
		n, err := unix.Read(0, p)
		if err == unix.EINTR {
			continue
		}
		return max(n, 0), err
	}
}

func (g *guest) command(words []string) (string, error) {
	arg := func(i int) string {
		if i < len(words) {
			return words[i]
		}
		return ""
	}
	number := func(i int) (uint64, error) {
		n, err := strconv.ParseUint(arg(i), 0, 64)
		if err != nil {
			return 0, fmt.Errorf("%s: argument %d: want a number, not %q", words[0], i, arg(i))
		}
		return n, nil
	}
	switch words[0] {
	case "ping":
		return "ping", nil
	case "open":
		n, err := number(1)
		if err != nil {
			return "", err
		}
		return g.open(n, arg(2))
	case "openpath":
		return openPath(arg(1))
	case "reads", "recurse":
		n, err := number(1)
		if err != nil {
			return "", err
		}
		return map[string]func(uint64, string) (string, error){"reads": g.reads, "recurse": g.recurse}[words[0]](n, arg(2))
	case "block":
		n, err := number(1)
		if err != nil {
			return "", err
		}
		seconds, err := number(2)
		if err != nil {
			return "", err
		}
		return block(n, time.Duration(seconds)*time.Second)
	case "blockkill":
		n, err := number(1)
		if err != nil {
			return "", err
		}
		return blockKill(n)
	case "busy":
		n, err := number(1)
		if err != nil {
			return "", err
		}
		return g.busy(time.Duration(n)*time.Second, arg(2), arg(3))
	case "stop":
		return g.stop()
	case "count":
		return "count " + g.totals(), nil
	case "check":
		return g.check(), nil
	case "int3user":
		n, err := number(1)
		if err != nil {
			return "", err
		}
		return int3User(n)
	case "breaks", "steps", "watch":
		n, err := number(1)
		if err != nil {
			return "", err
		}
		return map[string]func(uint64) (string, error){"breaks": breaks, "steps": steps, "watch": watch}[words[0]](n)
	case "ldt":
		return ldt()
	case "ftrace":
		return ftrace(words[1:])
	case "kprobes":
		return kprobeEvents.command(words[1:])
	case "kretprobes":
		return kretprobeEvents.command(words[1:])
	case "event":
		return event(arg(1), arg(2))
	case "reload":
		n, err := number(1)
		if err != nil {
			return "", err
		}
		return reloadModules(n, 0)
	case "storm":
		return g.storm.command(words[1:], len(g.cpus))
	case "online":
		n, err := number(1)
		if err != nil {
			return "", err
		}
		return g.online(n)
	case "threads":
		return g.threads(), nil
	case "kallsymshash":
		return kallsymsHash()
	case "kallsyms":
		return kallsyms(arg(1))
	case "text":
		n, err := number(2)
		if err != nil {
			return "", err
		}
		return text(arg(1), n)
	case "texthash":
		return textHash()
	case "textkeep":
		return textKeep()
	case "textchanges":
		return textChanges()
	case "dmesg":
		return g.dmesg()
	case "modules":
		return printFile("modules", "/proc/modules")
	case "stat":
		return printFile("stat", "/proc/1/stat")
	case "ps":
		return ps()
	case "sleep":
		n, err := number(1)
		if err != nil {
			return "", err
		}
		time.Sleep(time.Duration(n) * time.Millisecond)
		return "sleep", nil
	case "poweroff":
		say("DONE poweroff")
		unix.Sync()
		return "", unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	}
	return "", fmt.Errorf("unknown command %q", words[0])
}
