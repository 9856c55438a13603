package labguest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmprobes/vmprobes/internal/console"
	"github.com/vmprobes/vmprobes/lab/internal/job"
)

// Guest is a running guest.
type Guest struct {
	config Config
	domID  uint32
	tty    *os.File
	client *console.Client
	ready  string
	stop   sync.Once
}

func start(ctx context.Context, c Config) (*Guest, error) {
	g, err := create(ctx, c)
	if err == nil {
		g.ready, err = g.client.Ready(ctx)
	}
	return g.orDestroyed(err)
}

// startPaused starts a guest that has not run when it returns.
func startPaused(ctx context.Context, c Config) (*Guest, error) {
	g, err := create(ctx, c, "-p")
	return g.orDestroyed(err)
}

// orDestroyed returns g, or destroys it and says why.
func (g *Guest) orDestroyed(err error) (*Guest, error) {
	if g == nil || err == nil {
		return g, err
	}
	err = fmt.Errorf("%w\n%s", err, g.tail())
	return nil, errors.Join(err, g.Destroy())
}

// create creates a domain, and opens its console. If it returns a guest the domain is
// there, whatever the error.
func create(ctx context.Context, c Config, args ...string) (*Guest, error) {
	for _, name := range []string{"vmlinux", "vmlinuz"} {
		if _, err := os.Stat(c.kernelFile(name)); err != nil {
			return nil, fmt.Errorf("guest kernel %q is not in this dom0 (there are: %s): %w", c.Kernel, strings.Join(Kernels(), ", "), err)
		}
	}
	path := filepath.Join(os.TempDir(), "labguest-"+c.Name+".cfg")
	if err := os.WriteFile(path, []byte(c.file()), 0o600); err != nil {
		return nil, err
	}
	if err := c.writeRamdisk(); err != nil {
		return nil, err
	}
	// The log of an earlier guest with this name is not this one's.
	_ = os.Remove(c.log())
	// -e: nobody waits in the background to clean up after the guest, or to start it again.
	if !c.Restart {
		args = append(args, "-e")
	}
	if _, err := output(ctx, "xl", append(append([]string{"create"}, args...), path)...); err != nil {
		return nil, err
	}
	g := &Guest{config: c}
	return g, g.connect(ctx)
}

// Booted waits until the guest takes commands.
func (g *Guest) Booted(ctx context.Context) (err error) {
	if g.ready, err = g.client.Ready(ctx); err != nil {
		err = fmt.Errorf("%w\n%s", err, g.tail())
	}
	return err
}

// find opens the console of a guest that runs already.
func find(ctx context.Context, c Config) (*Guest, error) {
	g := &Guest{config: c}
	return g, g.connect(ctx)
}

// writeRamdisk puts one archive behind the other, as the kernel allows.
func (c Config) writeRamdisk() error {
	var all []byte
	for _, file := range []string{job.GuestImage, c.kernelFile("modules.cpio")} {
		b, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		all = append(all, b...)
	}
	return os.WriteFile(c.ramdisk(), all, 0o600)
}

func output(ctx context.Context, name string, args ...string) (string, error) {
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return strings.TrimSpace(string(out)), nil
}

// connect opens the guest's console, which xenconsoled offers as a terminal.
func (g *Guest) connect(ctx context.Context) error {
	id, err := output(ctx, "xl", "domid", g.config.Name)
	if err != nil {
		return err
	}
	n, err := strconv.ParseUint(id, 10, 16)
	if err != nil {
		return fmt.Errorf("xl domid: %w", err)
	}
	g.domID = uint32(n)
	node := fmt.Sprintf("/local/domain/%d/console/tty", g.domID)
	for {
		tty, err := output(ctx, "xenstore-read", node)
		if err == nil && tty != "" {
			return g.open(tty)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("no console terminal for the guest: %w", ctx.Err())
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func (g *Guest) open(tty string) error {
	fd, err := unix.Open(tty, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", tty, err)
	}
	t, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err == nil {
		t.Iflag, t.Oflag, t.Lflag = 0, 0, 0
		t.Cc[unix.VMIN], t.Cc[unix.VTIME] = 1, 0
		err = unix.IoctlSetTermios(fd, unix.TCSETS, t)
	}
	if err != nil {
		_ = unix.Close(fd)
		return fmt.Errorf("%s: %w", tty, err)
	}
	g.tty = os.NewFile(uintptr(fd), tty)
	g.client = console.New(g.tty)
	return nil
}

// Command sends a command and returns what the guest answered, without the
// DONE in front. An ERR answer is an error.
func (g *Guest) Command(ctx context.Context, command string) (string, error) {
	reply, _, err := g.Output(ctx, command)
	return reply, err
}

// Output is like Command and returns the "| " lines before the answer too.
func (g *Guest) Output(ctx context.Context, command string) (reply string, lines []string, err error) {
	reply, lines, err = g.client.Do(ctx, command)
	if err != nil && !errors.Is(err, console.ErrCommand) {
		err = fmt.Errorf("%w\n%s", err, g.tail())
	}
	return reply, lines, err
}

// DomID returns the guest's domain id.
func (g *Guest) DomID() uint32 { return g.domID }

// Name returns the guest's name.
func (g *Guest) Name() string { return g.config.Name }

// Ready returns what the guest said when it was up: its kernel's release and
// its number of vCPUs.
func (g *Guest) Ready() string { return g.ready }

func (c Config) log() string { return "/var/log/xen/guest-" + c.Name + ".log" }

// Console returns everything the guest has written to its console.
func (g *Guest) Console() string {
	b, err := os.ReadFile(g.config.log())
	if err != nil {
		return "(" + err.Error() + ")"
	}
	return string(b)
}

func (g *Guest) tail() string {
	const most = 2000
	s := g.Console()
	if len(s) > most {
		s = "…" + s[len(s)-most:]
	}
	return "console of guest " + g.config.Name + ":\n" + s
}

// KernelPath returns the path of the guest's kernel as an ELF file.
func (g *Guest) KernelPath() string { return g.config.kernelFile("vmlinux") }

// VMLinuzPath returns the path of the guest's kernel as Debian packages it.
func (g *Guest) VMLinuzPath() string { return g.config.kernelFile("vmlinuz") }

// Leave lets go of the guest's console and leaves the guest running.
func (g *Guest) Leave() {
	g.stop.Do(func() {
		if g.tty != nil {
			_ = g.tty.Close()
		}
	})
}

// Destroy ends the guest at once. Only the first call does anything.
func (g *Guest) Destroy() error {
	done := true
	g.stop.Do(func() {
		done = false
		if g.tty != nil {
			_ = g.tty.Close()
		}
	})
	if done {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	_, err := output(ctx, "xl", "destroy", g.config.Name)
	return err
}
