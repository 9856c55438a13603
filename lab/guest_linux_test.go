package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spf13/cobra"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/console"
	"github.com/vmprobes/vmprobes/internal/cpio"
)

// Under the names of the programs that a guest takes, the test binary plays them.
func TestMain(m *testing.M) {
	switch filepath.Base(os.Args[0]) {
	case "qemu-system-x86_64":
		fakeQEMU(os.Getenv("LAB_FAKE"))
	case "vmprobebio":
		fakeProbe(strings.TrimPrefix(os.Args[len(os.Args)-1], "qemu:"))
	default:
		os.Exit(m.Run())
	}
}

// fakeQEMU is a VM with a guest whose files are opened until all are. It ends as
// behaviour says.
func fakeQEMU(behaviour string) {
	if behaviour == "no such machine" {
		fmt.Fprintln(os.Stderr, behaviour)
		os.Exit(1)
	}
	value := func(option string) string {
		v, _, _ := strings.Cut(os.Args[slices.Index(os.Args, option)+1], ",server")
		return strings.TrimPrefix(v, "unix:")
	}
	for _, file := range []string{value("-kernel"), value("-initrd")} {
		if _, err := os.Stat(file); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	gdb, err := net.Listen("unix", value("-gdb"))
	if err != nil {
		panic(err)
	}
	console, err := net.Dial("unix", value("-serial"))
	if err != nil {
		panic(err)
	}
	if behaviour == "panic" {
		fmt.Fprint(console, "Kernel panic - not syncing: no init\r\n")
		os.Exit(0)
	}
	if behaviour == "silent" {
		time.Sleep(time.Hour)
	}
	fmt.Fprint(console, "some noise\r\nGUEST READY 6.1.0-test 2\r\n")
	armed := make(chan net.Conn, 1)
	go func() {
		c, err := gdb.Accept()
		if err == nil {
			armed <- c
		}
	}()
	left := len(opened)
	for in := bufio.NewScanner(console); in.Scan(); {
		tag, command, _ := strings.Cut(in.Text(), " ")
		reply := "DONE " + command
		switch {
		case command == "textkeep":
		case command == "textchanges":
			reply += " other=0 own=1"
			if behaviour == "changed" {
				fmt.Fprint(console, "| 0xffffffff81000000 55 cc other\r\n")
				reply = "DONE textchanges other=1 own=1"
			}
		case command == "check":
			reply = "DONE check rounds=1 ymm=ok mem=ok"
			if behaviour == "damaged" {
				reply = "DONE check rounds=1 ymm=BAD:1 mem=ok"
			}
		case command == "dmesg":
			reply = "DONE dmesg bad=0 boot=0"
			if behaviour == "complains" {
				fmt.Fprint(console, "| BUG: this and that\r\n")
				reply = "DONE dmesg bad=1 boot=0"
			}
		case command == "nonsense":
			reply = "ERR unknown command"
		case behaviour == "dies":
			os.Exit(3)
		default:
			if left--; left == 0 {
				(<-armed).Close()
			}
		}
		fmt.Fprintf(console, "%s %s\r\n", tag, reply)
	}
}

// fakeProbe is a vmprobebio that ends when all files have been opened.
func fakeProbe(gdb string) {
	c, err := net.Dial("unix", gdb)
	if err != nil {
		panic(err)
	}
	fmt.Println("vmprobe registered")
	_, _ = io.ReadAll(c)
}

// TestBuildCommandsOfTwoTrees checks that what one source tree has built is not
// replaced by another's, and that outside of both what was built last is taken.
func TestBuildCommandsOfTwoTrees(t *testing.T) {
	c := &cache{dir: t.TempDir()}
	build := func(dir string) string {
		t.Chdir(dir)
		programs, err := c.buildCommands(t.Context(), "cmd/which")
		require.NoError(t, err)
		return programs["which"]
	}
	run := func(program string) string {
		out, err := exec.Command(program).Output()
		require.NoError(t, err)
		return string(out)
	}
	outside := t.TempDir()
	t.Chdir(outside)
	_, err := c.buildCommands(t.Context(), "cmd/which")
	require.ErrorContains(t, err, modulePath)

	var built []string
	for _, tree := range []string{"one", "two"} {
		dir := t.TempDir()
		require.NoError(t, os.MkdirAll(filepath.Join(dir, "cmd", "which"), 0o755))
		for name, text := range map[string]string{
			"go.mod":            "module " + modulePath + "\n",
			"cmd/which/main.go": fmt.Sprintf("package main\n\nimport \"os\"\n\nfunc main() { os.Stdout.WriteString(%q) }\n", tree),
		} {
			require.NoError(t, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644))
		}
		built = append(built, build(dir))
	}
	assert.Equal(t, "one", run(built[0]))
	assert.Equal(t, "two", run(built[1]))
	assert.Equal(t, "two", run(build(outside)))
}

// fakes puts the fake programs on PATH and returns a guest's parts. What a guest
// leaves is found in the folder.
func fakes(t *testing.T, behaviour string) (p *guestParts, tmp string) {
	t.Helper()
	self, err := os.Executable()
	require.NoError(t, err)
	bin := t.TempDir()
	for _, name := range []string{"qemu-system-x86_64", "vmprobebio"} {
		require.NoError(t, os.Symlink(self, filepath.Join(bin, name)))
	}
	// The path of a socket is short.
	tmp, err = os.MkdirTemp("", "lab")
	require.NoError(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(tmp) })
	t.Setenv("TMPDIR", tmp)
	t.Setenv("PATH", bin)
	t.Setenv("LAB_FAKE", behaviour)

	var archive bytes.Buffer
	w := cpio.NewWriter(&archive)
	require.NoError(t, w.Bytes("lab/kernels/6.1/vmlinuz", 0o644, []byte("kernel")))
	require.NoError(t, w.Bytes("lab/kernels/6.1/modules.cpio", 0o644, nil))
	require.NoError(t, w.Close())
	kernel := filepath.Join(bin, "kernel.cpio")
	require.NoError(t, os.WriteFile(kernel, archive.Bytes(), 0o600))
	return &guestParts{"6.1", kernel, map[string]string{"guestinit": self, "vmprobebio": filepath.Join(bin, "vmprobebio")}}, tmp
}

func empty(t *testing.T, dir string) {
	t.Helper()
	left, err := os.ReadDir(dir)
	require.NoError(t, err)
	assert.Empty(t, left)
}

func TestShowOpens(t *testing.T) {
	for behaviour, want := range map[string]string{
		"":          "",
		"changed":   "text has changed",
		"damaged":   "ymm=BAD:1",
		"complains": "BUG: this and that",
		"dies":      "QEMU has ended: exit status 3",
	} {
		t.Run(behaviour, func(t *testing.T) {
			p, tmp := fakes(t, behaviour)
			g, err := startGuest(t.Context(), p, guestConfig{vcpus: 2, kvm: kvmOff})
			require.NoError(t, err)
			assert.Equal(t, "6.1.0-test 2", g.ready)
			_, _, err = g.do(t.Context(), "nonsense")
			require.ErrorIs(t, err, console.ErrCommand)
			err = showOpens(t.Context(), g, p.programs["vmprobebio"])
			if want == "" {
				assert.NoError(t, err)
			} else {
				assert.ErrorContains(t, err, want)
			}
			g.close()
			empty(t, tmp)
		})
	}
}

// TestTries checks that the demonstration offers programs that are there, by their
// paths, whatever Go this machine has.
func TestTries(t *testing.T) {
	dir := t.TempDir()
	probe := filepath.Join(dir, "vmprobebio")
	for _, name := range []string{"vmprobebio", "opens"} {
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), nil, 0o755))
	}
	assert.Equal(t, "  "+probe+" -task qemu:/g\n  "+filepath.Join(dir, "opens")+" qemu:/g\n", tries(probe, "qemu:/g"))
	for _, text := range []string{next, playground} {
		assert.NotContains(t, text, "go run")
	}
	for _, name := range others {
		assert.DirExists(t, filepath.Join("..", "examples", name))
	}
}

func TestGuestThatDoesNotStart(t *testing.T) {
	for behaviour, want := range map[string]string{
		"no such machine": "no such machine",
		"panic":           "Kernel panic",
	} {
		t.Run(behaviour, func(t *testing.T) {
			p, tmp := fakes(t, behaviour)
			_, err := startGuest(t.Context(), p, guestConfig{vcpus: 1, kvm: kvmOff})
			require.ErrorContains(t, err, want)
			empty(t, tmp)
		})
	}
}

func TestInterruptedGuest(t *testing.T) {
	p, tmp := fakes(t, "silent")
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(50*time.Millisecond, cancel)
	_, err := startGuest(ctx, p, guestConfig{vcpus: 1, kvm: kvmOff})
	require.ErrorContains(t, err, "interrupted")
	empty(t, tmp)

	_, err = bootGuest(t.Context(), p, guestConfig{vcpus: 1}, "TCG", 50*time.Millisecond)
	var exit *exitError
	require.ErrorAs(t, err, &exit)
	assert.Equal(t, codeTimeout, exit.code)
	empty(t, tmp)
}

// TestExitCode: a lab that was interrupted has the code that a shell would give it, and
// a job's own code is passed on whatever came.
func TestExitCode(t *testing.T) {
	for signal, want := range map[syscall.Signal]int{syscall.SIGINT: 130, syscall.SIGTERM: 143, syscall.SIGHUP: 129} {
		ctx, stop := untilSignal(t.Context())
		require.NoError(t, syscall.Kill(os.Getpid(), signal))
		<-ctx.Done()
		cause := context.Cause(ctx)
		code, err := exitCode(fmt.Errorf("boot: %w", interrupted(ctx)), cause)
		assert.Equal(t, want, code)
		assert.EqualError(t, err, "interrupted")
		code, _ = exitCode(errors.New("go build: signal: killed"), cause)
		assert.Equal(t, want, code, "what the signal has ended")
		code, err = exitCode(&exitError{code: 3}, cause)
		assert.Equal(t, 3, code, "the job's own")
		assert.NoError(t, err)
		code, _ = exitCode(nil, cause)
		assert.Zero(t, code)
		stop()
	}
	code, err := exitCode(errors.New("broken"), nil)
	assert.Equal(t, codeLab, code)
	assert.EqualError(t, err, "broken")
	ctx, stop := untilSignal(t.Context())
	stop()
	code, _ = exitCode(errors.New("broken"), context.Cause(ctx))
	assert.Equal(t, codeLab, code, "no signal came")
}

func TestGuestFlags(t *testing.T) {
	for args, ok := range map[string]bool{
		"":                                  true,
		"--kernel 6.12 --vcpus 1 --kvm off": true,
		"--kernel 5.10":                     false,
		"--vcpus 0":                         false,
		"--vcpus 9":                         false,
		"--kvm maybe":                       false,
	} {
		var f guestFlags
		cmd := new(cobra.Command)
		f.add(cmd)
		require.NoError(t, cmd.ParseFlags(strings.Fields(args)), args)
		err := f.check()
		if ok {
			assert.NoError(t, err, args)
			continue
		}
		var exit *exitError
		require.ErrorAs(t, err, &exit, args)
		assert.Equal(t, codeUsage, exit.code, args)
	}
}

func TestWatcher(t *testing.T) {
	var out strings.Builder
	w := &watcher{w: &out, mark: "vmprobe registered", seen: make(chan struct{})}
	for _, piece := range []string{"not vmprobe registered\nvmprobe ", "regis"} {
		_, _ = io.WriteString(w, piece)
	}
	select {
	case <-w.seen:
		t.Fatal("seen too early")
	default:
	}
	for range 2 {
		_, _ = io.WriteString(w, "tered\nvmprobe regis")
	}
	<-w.seen
	assert.Equal(t, "not vmprobe registered\nvmprobe registered\nvmprobe registered\nvmprobe regis", out.String())
}
