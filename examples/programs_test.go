// Package examples_test runs the example programs.
package examples_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/kerneltest"
)

// arguments are, by program, those behind the guest's name.
var arguments = map[string][]string{
	"opens": nil, "vmprobebio": nil, "returns": {"vfs_*"},
	"guest-info": nil, "process-list": nil, "process-list-file": nil, "module-list": nil,
	"map-symbol": {"init_task"}, "map-addr": {"KERNEL"}, "process-data": {"1"}, "dump-memory": {"FILE"},
}

var programs string // the folder of the programs

func TestMain(m *testing.M) {
	os.Exit(build(m))
}

func build(m *testing.M) int {
	dir, err := os.MkdirTemp("", "examples")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	programs = dir
	args := []string{"build", "-ldflags=-s -w", "-o", dir + "/"}
	for name := range arguments {
		args = append(args, "./"+name)
	}
	if out, err := exec.Command("go", args...).CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "%v: %s", err, out)
		return 1
	}
	return m.Run()
}

func TestAllPrograms(t *testing.T) {
	folders, err := filepath.Glob("*/main.go")
	require.NoError(t, err)
	for _, f := range folders {
		assert.Contains(t, arguments, filepath.Dir(f))
	}
}

type result struct {
	status         int
	stdout, stderr string
}

func run(t *testing.T, stdout *os.File, program string, args ...string) result {
	t.Helper()
	cmd := exec.Command(program, args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if stdout != nil {
		cmd.Stdout = stdout
	}
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		require.NoError(t, err)
	}
	return result{cmd.ProcessState.ExitCode(), out.String(), errs.String()}
}

// TestCommandLines: help is output, a wrong command line is told on stderr and is
// status 2, in every program.
func TestCommandLines(t *testing.T) {
	for name, args := range arguments {
		t.Run(name, func(t *testing.T) {
			program := filepath.Join(programs, name)
			for _, h := range []string{"-h", "--help"} {
				r := run(t, nil, program, h)
				assert.Zero(t, r.status)
				assert.Empty(t, r.stderr)
				assert.Contains(t, r.stdout, "usage: "+name+" [flags] ")
			}
			full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
			if err == nil {
				defer full.Close()
				assert.Equal(t, 1, run(t, full, program, "-h").status)
			}
			for why, args := range map[string][]string{
				"not defined":        {"-no-such-flag", "guest"},
				"one argument":       append(append([]string{"guest"}, args...), "extra"),
				"flags stand before": append(append([]string{"guest"}, args...), "-n"),
			} {
				r := run(t, nil, program, args...)
				assert.Equal(t, 2, r.status, "%q", args)
				assert.Empty(t, r.stdout)
				assert.Contains(t, r.stderr, why)
				assert.Contains(t, r.stderr, "usage: ")
			}
			if r := run(t, nil, program); name != "vmprobebio" { // which has a guest of its own
				assert.Equal(t, 2, r.status)
				assert.Contains(t, r.stderr, "is given")
			}
		})
	}
}

// TestNames has names of guests that can't be right.
func TestNames(t *testing.T) {
	for name, args := range arguments {
		if name == "process-list-file" {
			continue
		}
		for _, guest := range []string{"/run/vm.gdb", "./mem", "qmeu:/run/vm.gdb"} {
			r := run(t, nil, filepath.Join(programs, name), append([]string{guest}, args...)...)
			assert.Equal(t, 1, r.status, "%s %s", name, guest)
			assert.Empty(t, r.stdout)
			for _, scheme := range []string{"qemu:PATH", "qemu+monitor:PATH", "file:PATH", "xen:NAME"} {
				assert.Contains(t, r.stderr, scheme)
			}
			assert.Equal(t, 1, strings.Count(r.stderr, guest), "it is said once: %s", r.stderr)
		}
	}
}

// TestPrograms runs those that look into a guest on a saved one, with output that can
// be written, and output that can't.
func TestPrograms(t *testing.T) {
	s := kerneltest.NewSynthetic(kerneltest.Layout{})
	image := "file:" + s.WriteImage(t)
	t.Setenv("VMPROBES_SYMBOLS", "")
	saved := filepath.Join(t.TempDir(), "memory")
	for name, args := range arguments {
		if name == "opens" || name == "vmprobebio" || name == "returns" {
			r := run(t, nil, filepath.Join(programs, name), append([]string{image}, args...)...)
			assert.Equal(t, 1, r.status)
			assert.Contains(t, r.stderr, "a saved image can't be probed", name)
			continue
		}
		t.Run(name, func(t *testing.T) {
			guest := image
			if name == "process-list-file" {
				guest = strings.TrimPrefix(image, "file:")
			}
			all := []string{guest}
			for _, a := range args {
				a = strings.ReplaceAll(a, "FILE", saved)
				all = append(all, strings.ReplaceAll(a, "KERNEL", "ffffffff81000000"))
			}
			program := filepath.Join(programs, name)
			r := run(t, nil, program, all...)
			if name == "process-data" { // the guest's init has no code in memory
				assert.Equal(t, 1, r.status)
				assert.Contains(t, r.stderr, "not mapped")
			} else {
				assert.Zero(t, r.status, "%s", r.stderr)
			}
			if name == "dump-memory" {
				return // it writes elsewhere
			}
			assert.NotEmpty(t, r.stdout)
			assert.NotContains(t, r.stdout+r.stderr, "\x1b", "the guest has a task whose name would colour the terminal")
			if strings.HasPrefix(name, "process-list") {
				assert.Contains(t, r.stdout, `[   50] zombie\x1b[31m`)
			}
			if full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0); err == nil {
				defer full.Close()
				r := run(t, full, program, all...)
				assert.Equal(t, 1, r.status)
				assert.Equal(t, 1, strings.Count(r.stderr, "no space left on device"), r.stderr)
			}
			gone, w, err := os.Pipe()
			require.NoError(t, err)
			require.NoError(t, gone.Close())
			r = run(t, w, program, all...)
			require.NoError(t, w.Close())
			assert.Equal(t, 1, r.status, "it ends by itself, not by a signal")
			assert.Contains(t, r.stderr, "broken pipe")
		})
	}
	r := run(t, nil, filepath.Join(programs, "map-symbol"), image, "init_tsak")
	assert.Equal(t, 1, r.status)
	assert.Contains(t, r.stderr, "init_task")
	r = run(t, nil, filepath.Join(programs, "map-symbol"), image, "init_task")
	assert.Contains(t, r.stdout, "init_task = 0xffff")
}
