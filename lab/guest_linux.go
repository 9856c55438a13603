package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/vmprobes/vmprobes/internal/console"
	"github.com/vmprobes/vmprobes/internal/cpio"
	"github.com/vmprobes/vmprobes/lab/internal/job"
)

// guestParts is what a guest is made of, and the programs to look into it.
type guestParts struct {
	series   string            // of the kernel
	kernel   string            // archive with the kernel and its modules
	programs map[string]string // by name
}

// prepareGuest makes what a guest takes and isn't there yet: a kernel, its init,
// and the commands of this module named by their folders. Downloads and compilers
// run at the same time.
func (c *cache) prepareGuest(ctx context.Context, series string, commands ...string) (*guestParts, error) {
	both, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	p := &guestParts{series: series}
	var kernel sync.WaitGroup
	kernel.Go(func() {
		k, ok := ownKernel(series)
		if !ok {
			fail(fmt.Errorf("no guest kernel %s", series))
			return
		}
		var err error
		if p.kernel, _, err = c.buildGuestKernel(both, k); err != nil {
			fail(fmt.Errorf("guest kernel %s: %w", series, err))
		}
	})
	var err error
	if p.programs, err = c.buildCommands(both, append([]string{"lab/guestinit"}, commands...)...); err != nil {
		fail(err)
	}
	kernel.Wait()
	switch {
	case ctx.Err() != nil:
		return nil, interrupted(ctx)
	case both.Err() != nil:
		return nil, context.Cause(both) // of the one that failed first
	}
	return p, nil
}

// buildCommands builds commands of this module, by their folders in it, from the
// source tree that the current folder is in. Outside of it the ones built last are
// used.
func (c *cache) buildCommands(ctx context.Context, folders ...string) (map[string]string, error) {
	list, err := output(ctx, "", "go", "list", "-m", "-f", "{{.Path}} {{.Dir}}")
	module, tree, _ := strings.Cut(strings.TrimSpace(list), " ")
	inside := err == nil && module == modulePath
	last := c.path("bin", "last")
	dir := last
	if inside {
		// Each tree has its own: a run may wait a long time between this and taking them.
		if dir, err = c.mkdir("bin", key(tree)); err != nil {
			return nil, err
		}
	}
	programs := map[string]string{}
	args := []string{"build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", dir + "/"}
	for _, f := range folders {
		program := filepath.Join(dir, path.Base(f))
		programs[path.Base(f)] = program
		args = append(args, modulePath+"/"+f)
		if !inside && absent(program) {
			return nil, fmt.Errorf("%s has not been built yet: the current folder must be one of %s", f, modulePath)
		}
	}
	if !inside {
		return programs, nil
	}
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64")
	if msg, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build %s: %w\n%s", strings.Join(folders, ", "), err, lastLines(string(msg), 20))
	}
	link := fmt.Sprintf("%s.%d", dir, os.Getpid())
	if err := os.Symlink(filepath.Base(dir), link); err != nil {
		return nil, err
	}
	return programs, os.Rename(link, last)
}

// How a guest is accelerated.
const (
	kvmAuto = "auto"
	kvmOn   = "on"
	kvmOff  = "off"
)

// Times within which a guest is up. An emulated one takes three seconds on an idle
// machine. With KVM it takes one, or never: some machines have a /dev/kvm that
// starts a VM but no Linux.
const (
	bootTimeout  = 3 * time.Minute
	trialTimeout = 10 * time.Second
)

// guestConfig says how a guest is started.
type guestConfig struct {
	vcpus int
	kvm   string // kvmAuto …
}

// guest is a VM straight under QEMU that runs a distribution's kernel with
// lab/guestinit as its only process.
type guest struct {
	process
	accel   string // "KVM" or "TCG"
	ready   string // what init said: the kernel's release and the number of CPUs
	gdb     string // path of the gdbstub's socket
	dir     string
	console *port
	conn    net.Conn
	client  *console.Client
	stderr  tail
}

// The command line of the guest's kernel. What costs an emulated CPU much of its
// boot time is left out; KASLR is as the distribution has it.
const guestArgs = "console=ttyS0 quiet mitigations=off noreplace-smp no_timer_check rcupdate.rcu_cpu_stall_timeout=60 watchdog_thresh=30 panic=-1"

// guestMB is the guest's memory.
const guestMB = 256

// startGuest starts a guest and waits until its init is ready. KVM is tried, not
// looked for.
//
// The lock of the long runs (lockEmulator) is not taken: it is held for minutes up
// to an hour, and this guest is short and small.
func startGuest(ctx context.Context, p *guestParts, c guestConfig) (*guest, error) {
	if c.kvm == kvmOn || c.kvm == kvmAuto && kvmWorks(ctx) == nil {
		g, err := bootGuest(ctx, p, c, "KVM", trialTimeout)
		if err == nil || c.kvm == kvmOn || ctx.Err() != nil {
			return g, err
		}
		progress("this machine's KVM starts no Linux: going on without")
	}
	return bootGuest(ctx, p, c, "TCG", bootTimeout)
}

func bootGuest(ctx context.Context, p *guestParts, c guestConfig, accel string, timeout time.Duration) (_ *guest, err error) {
	dir, err := os.MkdirTemp("", "vmprobes-*")
	if err != nil {
		return nil, err
	}
	g := &guest{accel: accel, dir: dir, gdb: filepath.Join(dir, "gdb.sock")}
	defer func() {
		if err != nil {
			g.close()
		}
	}()
	if err := g.unpack(p); err != nil {
		return nil, err
	}
	if g.console, err = newPort("unix", filepath.Join(dir, "console")); err != nil {
		return nil, fmt.Errorf("%w (is the path of the folder for temporary files too long?)", err)
	}
	progress("boot Linux %s under QEMU (%s)", p.series, accel)
	begin := time.Now()
	cmd := exec.Command("qemu-system-x86_64", g.args(c)...)
	cmd.Dir = dir
	cmd.Stdout, cmd.Stderr = &g.stderr, &g.stderr
	if err := g.run(ctx, cmd, syscall.SysProcAttr{}); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, fmt.Errorf("the guest isn't up after %v", timeout))
	defer cancel()
	if err := g.waitReady(ctx); err != nil {
		return nil, err
	}
	progress("it is up after %v", time.Since(begin).Round(100*time.Millisecond))
	return g, nil
}

// unpack puts the kernel and its first file system into the guest's folder.
func (g *guest) unpack(p *guestParts) error {
	archive, err := os.Open(p.kernel)
	if err != nil {
		return err
	}
	defer func() { _ = archive.Close() }()
	from := path.Join(job.Kernels, p.series)
	kernel, err := cpio.Open(archive, path.Join(from, "vmlinuz"))
	if err != nil {
		return fmt.Errorf("%s: %w", p.kernel, err)
	}
	modules, err := cpio.Open(archive, path.Join(from, "modules.cpio"))
	if err != nil {
		return fmt.Errorf("%s: %w", p.kernel, err)
	}
	init, err := guestImage(p.programs["guestinit"])
	if err != nil {
		return err
	}
	for name, content := range map[string]io.Reader{
		"vmlinuz": kernel,
		"initrd":  io.MultiReader(strings.NewReader(string(init)), modules),
	} {
		err := writeWith(filepath.Join(g.dir, name), func(f *os.File) error {
			_, err := io.Copy(f, content)
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// args are QEMU's. It runs in the guest's folder, but the gdbstub's socket has its
// whole path, by which the qemu package finds it in /proc/net/unix.
func (g *guest) args(c guestConfig) []string {
	accel := []string{"-accel", "tcg", "-cpu", "max"}
	if g.accel == "KVM" {
		accel = []string{"-accel", "kvm", "-cpu", "host"}
	}
	return append(accel,
		"-M", "pc", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-name", "vmprobes",
		"-smp", strconv.Itoa(c.vcpus), "-m", strconv.Itoa(guestMB),
		"-kernel", "vmlinuz", "-initrd", "initrd", "-append", guestArgs,
		"-serial", "unix:console",
		"-gdb", "unix:"+strings.ReplaceAll(g.gdb, ",", ",,")+",server=on,wait=off",
	)
}

// waitReady waits until init has said that it is.
func (g *guest) waitReady(ctx context.Context) error {
	select {
	case g.conn = <-g.console.conn:
	case <-g.dead:
		return g.gone()
	case <-ctx.Done():
		return interrupted(ctx)
	}
	g.client = console.New(g.conn)
	var err error
	if g.ready, err = g.client.Ready(ctx); err != nil {
		return fmt.Errorf("%w\n%s", g.failure(ctx, err), g.client.Tail())
	}
	return nil
}

// do has the guest's init execute a command, as described in lab/guestinit, and
// returns the lines that came before the reply, and the reply.
func (g *guest) do(ctx context.Context, command string) (lines []string, reply string, err error) {
	reply, lines, err = g.client.Do(ctx, command)
	return lines, reply, g.failure(ctx, err)
}

// failure says more about an error of the console's.
func (g *guest) failure(ctx context.Context, err error) error {
	switch {
	case errors.Is(err, console.ErrClosed):
		return g.gone()
	case err != nil && ctx.Err() != nil:
		return interrupted(ctx)
	}
	return err
}

// gone is why there is no guest any more.
func (g *guest) gone() error {
	select {
	case err := <-g.end:
		return fmt.Errorf("QEMU has ended: %w: %s", err, g.stderr.String())
	case <-time.After(2 * time.Second):
		return errors.New("the guest's console is gone")
	}
}

// close ends QEMU and leaves nothing behind.
func (g *guest) close() {
	g.kill()
	if g.console != nil {
		_ = g.console.listener.Close()
	}
	if g.conn != nil {
		_ = g.conn.Close()
	}
	_ = os.RemoveAll(g.dir)
}

// interrupted is why ctx has ended.
func interrupted(ctx context.Context) error {
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return &exitError{codeTimeout, context.Cause(ctx)}
	}
	return &exitError{codeLab, errors.New("interrupted")}
}

// tail keeps the last that a program printed.
type tail struct {
	mu sync.Mutex
	b  []byte
}

const maxTail = 4096

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.b = append(t.b, p...)
	t.b = slices.Clone(t.b[max(0, len(t.b)-maxTail):])
	return len(p), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.TrimSpace(string(t.b))
}
