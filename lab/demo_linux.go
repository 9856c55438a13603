package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/vmprobes/vmprobes/internal/console"
)

// opened are what the guest opens in the demonstration; the last one isn't there.
var opened = []string{
	"/proc/version", "/proc/cpuinfo", "/sys/kernel/vmcoreinfo", "/dev/null",
	"/init", "/proc/self/maps", "/proc/meminfo", "/etc/shadow",
}

// guestFlags are the flags that start a guest without Xen.
type guestFlags struct {
	series string
	bin    string
	guestConfig
}

func (f *guestFlags) add(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.StringVar(&f.series, "kernel", "6.1", "the guest's kernel: 6.1 or 6.12")
	flags.IntVar(&f.vcpus, "vcpus", 2, "the guest's vCPUs, 1 to 8")
	flags.StringVar(&f.kvm, "kvm", kvmAuto, "auto (by trial), on or off")
	flags.StringVar(&f.bin, "bin", "", "the vmprobebio to run (default: build it, and what else is offered)")
}

func (f *guestFlags) check() error {
	if _, ok := ownKernel(f.series); !ok {
		return &exitError{codeUsage, fmt.Errorf("--kernel %s: want 6.1 or 6.12", f.series)}
	}
	if f.vcpus < 1 || f.vcpus > 8 {
		return &exitError{codeUsage, fmt.Errorf("--vcpus %d: want 1 to 8", f.vcpus)}
	}
	if !slices.Contains([]string{kvmAuto, kvmOn, kvmOff}, f.kvm) {
		return &exitError{codeUsage, fmt.Errorf("--kvm %s: want auto, on or off", f.kvm)}
	}
	return nil
}

func demoCommand() *cobra.Command {
	var f guestFlags
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Boot a Linux guest under QEMU and show every file that it opens",
		Long: `demo boots a distribution's kernel under QEMU, has vmprobebio watch it from
outside while it opens files, and checks that it is unharmed. It needs no Xen,
no KVM and no root, and leaves nothing behind but what is in the cache.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			begin := time.Now()
			err := f.withGuest(cmd.Context(), showOpens)
			if err == nil {
				progress("done in %v", time.Since(begin).Round(100*time.Millisecond))
			}
			return err
		},
	}
	f.add(cmd)
	return cmd
}

func vmCommand() *cobra.Command {
	var f guestFlags
	cmd := &cobra.Command{
		Use:   "vm",
		Short: "A Linux guest under QEMU to try programs on, until Ctrl+C",
		Long: `vm boots the guest of the demonstration and keeps it. It prints the name of the
guest for programs in another terminal, such as qemu:/tmp/…/gdb.sock. The guest
opens a file every second. Lines typed here go to its init, whose commands are in
lab/guestinit/doc.go: try "ps" or "openpath /etc/passwd".`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return f.withGuest(cmd.Context(), keepGuest)
		},
	}
	f.add(cmd)
	return cmd
}

// withGuest starts a guest for use, and ends it on every way out.
func (f *guestFlags) withGuest(ctx context.Context, use func(ctx context.Context, g *guest, probe string) error) error {
	if err := f.check(); err != nil {
		return err
	}
	if err := requireTools(demo); err != nil {
		return err
	}
	// A reader of our output that goes away must not kill us before we clean up: this
	// makes it an error of the write.
	pipe := make(chan os.Signal, 1)
	signal.Notify(pipe, syscall.SIGPIPE)
	defer signal.Stop(pipe)
	c, err := openCache()
	if err != nil {
		return err
	}
	var commands []string
	if f.bin == "" {
		for _, name := range append([]string{"vmprobebio"}, others...) {
			commands = append(commands, "examples/"+name)
		}
	} else if f.bin, err = filepath.Abs(f.bin); err != nil {
		return err
	} else if absent(f.bin) {
		return &exitError{codeUsage, fmt.Errorf("--bin: no program %s", f.bin)}
	}
	if len(commands) > 0 {
		progress("compile the programs, and get the guest's kernel: a minute the first time, seconds after that")
	}
	p, err := c.prepareGuest(ctx, f.series, commands...)
	if err != nil {
		return err
	}
	probe := f.bin
	if probe == "" {
		probe = p.programs["vmprobebio"]
	}
	g, err := startGuest(ctx, p, f.guestConfig)
	if err != nil {
		return err
	}
	defer g.close()
	return use(ctx, g, probe)
}

// probeTimeout bounds the part of the demonstration that takes two seconds.
const probeTimeout = 3 * time.Minute

// showOpens is the demonstration on a running guest.
func showOpens(ctx context.Context, g *guest, probe string) error {
	ctx, cancel := context.WithTimeoutCause(ctx, probeTimeout, fmt.Errorf("the demonstration isn't done after %v", probeTimeout))
	defer cancel()
	release, vcpus, _ := strings.Cut(g.ready, " ")
	fmt.Printf("A guest is up: Linux %s under QEMU (%s, vCPUs: %s). Nothing in it is prepared.\n\n", release, g.accel, vcpus)
	if _, _, err := g.do(ctx, "textkeep"); err != nil {
		return err
	}
	if err := g.watchOpens(ctx, probe); err != nil {
		return err
	}
	if err := g.unharmed(ctx); err != nil {
		return err
	}
	fmt.Printf(next, os.Args[0], tries(probe, "qemu:…"))
	return nil
}

// others are the examples that are offered to try beside vmprobebio.
var others = []string{"opens", "process-list"}

// tries returns the commands that look into a guest: programs that are there, since
// the go command on PATH may be too old to run them from their source.
func tries(probe, guest string) string {
	var lines strings.Builder
	fmt.Fprintf(&lines, "  %s -task %s\n", probe, guest)
	for _, name := range others {
		if path := filepath.Join(filepath.Dir(probe), name); !absent(path) {
			fmt.Fprintf(&lines, "  %s %s\n", path, guest)
		}
	}
	return lines.String()
}

const next = `
Next: keep such a guest, and look into it from another terminal:

  %[1]s vm                       until Ctrl+C; it prints the guest's name, qemu:…
%[2]s
docs/qemu.md tells how to reach guests of libvirt, Proxmox and plain QEMU;
make demo-xen does the same on a real Xen host.
`

// watchOpens runs vmprobebio while the guest opens files.
func (g *guest) watchOpens(ctx context.Context, probe string) error {
	args := []string{"-task", "-n", strconv.Itoa(len(opened)), "qemu:" + g.gdb}
	fmt.Printf("# %s %s\n", filepath.Base(probe), strings.Join(args, " "))
	out := &watcher{w: os.Stdout, mark: "vmprobe registered", seen: make(chan struct{})}
	cmd := exec.CommandContext(ctx, probe, args...)
	cmd.Stdout, cmd.Stderr = out, os.Stderr
	// Ctrl+C is for the lab, which then asks the program to end.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 5 * time.Second
	if err := cmd.Start(); err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	var err error
	select {
	case <-out.seen:
		for _, file := range opened {
			if _, _, err = g.do(ctx, "openpath "+file); err != nil {
				break
			}
		}
		if err != nil {
			_ = cmd.Cancel()
		}
		err = errors.Join(err, <-ended)
	case err = <-ended:
		if err == nil {
			err = errors.New("it ended too early")
		}
	}
	switch {
	case ctx.Err() != nil:
		return interrupted(ctx)
	case err != nil:
		return fmt.Errorf("%s: %w", probe, err)
	}
	return nil
}

// unharmed compares the guest with what it was.
func (g *guest) unharmed(ctx context.Context) error {
	own, err := console.SameText(ctx, func(ctx context.Context, command string) (string, []string, error) {
		lines, reply, err := g.do(ctx, command)
		return reply, lines, err
	})
	if err != nil {
		return err
	}
	_, check, err := g.do(ctx, "check")
	if err != nil {
		return err
	}
	complaints, dmesg, err := g.do(ctx, "dmesg")
	if err != nil {
		return err
	}
	switch {
	case strings.Contains(check, "BAD"):
		return fmt.Errorf("the guest's registers or memory have changed: %s", check)
	case !strings.Contains(dmesg, "bad=0 "):
		return fmt.Errorf("the guest's kernel complains:\n%s", strings.Join(complaints, "\n"))
	}
	text := "every byte of its kernel's text is as before"
	if len(own) > 0 {
		text = fmt.Sprintf("its kernel's text is as before, but for %d places that it\nswitched over itself", len(own))
	}
	fmt.Printf("\nThe guest is unharmed: %s, its\nregisters and memory too, and its kernel has logged no complaint.\n", text)
	return nil
}

// keepGuest keeps a guest for programs in other terminals.
func keepGuest(ctx context.Context, g *guest, probe string) error {
	release, vcpus, _ := strings.Cut(g.ready, " ")
	fmt.Printf(playground, release, g.accel, vcpus, tries(probe, "qemu:"+g.gdb))
	lines := make(chan string)
	if inForeground() {
		go readLines(os.Stdin, lines)
	}
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for n := 0; ; {
		var err error
		select {
		case <-ctx.Done():
			return nil
		case <-g.dead:
			return g.gone()
		case <-tick.C:
			_, _, err = g.do(ctx, "openpath "+opened[n%len(opened)])
			n++
		case line := <-lines:
			var answer []string
			var reply string
			if answer, reply, err = g.do(ctx, line); errors.Is(err, console.ErrCommand) {
				reply, err = err.Error(), nil
			}
			fmt.Println(strings.Join(append(answer, reply), "\n"))
		}
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

const playground = `A guest is up: Linux %[1]s under QEMU (%[2]s, vCPUs: %[3]s). It opens a file every second.
From another terminal:

%[4]s
Lines typed here go to the guest's init: try ps, modules, or openpath /etc/passwd.
Ctrl+C ends the guest.
`

// inForeground tells whether reading standard input would not stop this program.
func inForeground() bool {
	group, err := unix.IoctlGetInt(0, unix.TIOCGPGRP)
	return err != nil || group == unix.Getpgrp()
}

// readLines passes on the lines of in that aren't empty.
func readLines(in io.Reader, lines chan<- string) {
	for s := bufio.NewScanner(in); s.Scan(); {
		if line := strings.TrimSpace(s.Text()); line != "" {
			lines <- line
		}
	}
}

// watcher passes on output, and tells when a line is mark.
type watcher struct {
	w    io.Writer
	mark string
	line []byte
	once sync.Once
	seen chan struct{}
}

func (w *watcher) Write(p []byte) (int, error) {
	for line := range strings.Lines(string(p)) {
		if w.line = append(w.line, line...); strings.HasSuffix(line, "\n") {
			if strings.TrimSpace(string(w.line)) == w.mark {
				w.once.Do(func() { close(w.seen) })
			}
			w.line = w.line[:0]
		}
	}
	return w.w.Write(p)
}
