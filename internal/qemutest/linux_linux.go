package qemutest

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vmprobes/vmprobes/internal/console"
	"github.com/vmprobes/vmprobes/internal/cpio"
	"github.com/vmprobes/vmprobes/internal/kerneltest"
)

// Linux is a VM that runs a Debian kernel with the lab's init
// (lab/guestinit, whose documentation has the commands).
type Linux struct {
	*VM
	Ready string // what the init said: the kernel's release and its number of CPUs

	console *console.Client
}

// readyTimeout is for an emulated boot on a busy machine; it takes four seconds
// on an idle one.
const readyTimeout = 90 * time.Second

// StartLinux boots the kernel of a series that the lab has fetched ("6.1",
// "6.12"), and waits until its init is ready.
func StartLinux(tb testing.TB, series string, c Config) *Linux {
	tb.Helper()
	Binary(tb)
	dir := tb.TempDir()
	c.Kernel = filepath.Join(dir, "vmlinuz")
	if err := os.WriteFile(c.Kernel, kerneltest.File(tb, series, "vmlinuz"), 0o600); err != nil {
		tb.Fatal(err)
	}
	init := filepath.Join(dir, "init")
	build := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", init, "github.com/vmprobes/vmprobes/lab/guestinit")
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64")
	if out, err := build.CombinedOutput(); err != nil {
		kerneltest.Skip(tb, "can't build the guest's init: %v: %s", err, out)
	}
	program, err := os.ReadFile(init)
	if err != nil {
		tb.Fatal(err)
	}
	c.Initrd = filepath.Join(dir, "initrd")
	var initrd bytes.Buffer
	w := cpio.NewWriter(&initrd)
	err = errors.Join(w.Bytes("init", 0o755, program), w.Close())
	initrd.Write(kerneltest.File(tb, series, "modules.cpio")) // one archive may follow another
	if err = errors.Join(err, os.WriteFile(c.Initrd, initrd.Bytes(), 0o600)); err != nil {
		tb.Fatal(err)
	}
	// What the emulated CPU spends most of its boot time on is left out.
	// no_timer_check: on a busy machine the kernel may find that no timer interrupt came
	// in the time that it gives one, and panics.
	c.Append = strings.TrimSpace("console=ttyS0 quiet mitigations=off no_timer_check panic=-1 " + c.Append)
	if c.MB == 0 {
		c.MB = 256
	}
	return BootLinux(tb, c, readyTimeout)
}

// BootLinux boots c.Kernel and waits until its init, in c.Initrd, is ready, for the time
// given. The init speaks as package console says.
func BootLinux(tb testing.TB, c Config, timeout time.Duration) *Linux {
	tb.Helper()
	for boots := 1; ; boots++ {
		g, err := boot(tb, c, timeout)
		// A kernel rewrites its code when it boots, which QEMU 7.2's TCG isn't always up to
		// while other vCPUs run. Nobody is attached yet.
		if errors.Is(err, console.ErrDied) && boots < 3 {
			tb.Logf("boots again: %v", err)
			g.Kill()
			continue
		}
		if err != nil {
			tb.Fatalf("the guest isn't ready: %v: %s\n%s", err, g.out.String(), g.console.Tail())
		}
		return g
	}
}

// boot boots a guest. It is returned with an error, too.
func boot(tb testing.TB, c Config, timeout time.Duration) (*Linux, error) {
	tb.Helper()
	v := Start(tb, c)
	conn, err := net.Dial("unix", v.serial)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { conn.Close() })
	g := &Linux{VM: v, console: console.New(conn)}
	ctx, cancel := context.WithTimeout(tb.Context(), timeout)
	defer cancel()
	g.Ready, err = g.console.Ready(ctx)
	return g, err
}

// Do sends a command and returns the answer.
func (g *Linux) Do(command string) (string, error) {
	reply, _, err := g.DoLines(command)
	return reply, err
}

// DoLines is like Do and returns the lines before the answer, too.
func (g *Linux) DoLines(command string) (reply string, lines []string, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), readyTimeout)
	defer cancel()
	return g.console.Do(ctx, command)
}

// Must is Do for commands that work.
func (g *Linux) Must(command string) string {
	g.tb.Helper()
	reply, err := g.Do(command)
	if err != nil {
		g.tb.Fatal(err)
	}
	return reply
}

// Symbol asks the guest for the address of a symbol.
func (g *Linux) Symbol(name string) uint64 {
	g.tb.Helper()
	f := strings.Fields(g.Must("kallsyms " + name))
	if len(f) < 3 {
		g.tb.Fatalf("kallsyms %s: %v", name, f)
	}
	addr, err := strconv.ParseUint(f[2], 0, 64)
	if err != nil {
		g.tb.Fatal(err)
	}
	return addr
}

// Counts returns the numbers of an answer such as "open total=10 cpu0=5 cpu1=5".
func Counts(reply string) map[string]int {
	m := map[string]int{}
	for f := range strings.FieldsSeq(reply) {
		if k, v, ok := strings.Cut(f, "="); ok {
			if n, err := strconv.Atoi(v); err == nil {
				m[k] = n
			}
		}
	}
	return m
}
