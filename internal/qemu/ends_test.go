//go:build linux

package qemu_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/qemu"
	"github.com/vmprobes/vmprobes/internal/qemutest"
)

// childEnv makes the test binary a small tool that probes a VM until a signal
// ends it: "target address".
const childEnv = "VMPROBES_QEMU_TEST_CHILD"

func TestMain(m *testing.M) {
	if target := os.Getenv(childEnv); target != "" {
		addr, _ := strconv.ParseUint(os.Getenv(childEnv+"_ADDR"), 0, 64)
		if err := child(target, addr); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func child(target string, addr uint64) (err error) {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	vm, err := qemu.Dial(ctx, target, nil)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, vm.Close()) }()
	d, err := vm.Attach(ctx)
	if err != nil {
		return err
	}
	e := breakpoint.New(d, breakpoint.Config{})
	defer func() { err = errors.Join(err, e.Close()) }()
	hits := 0
	p := &breakpoint.Probe{Addr: addr, Pre: func(*breakpoint.Context) breakpoint.Verdict {
		if hits++; hits == 20 {
			fmt.Println("hit")
		}
		return breakpoint.Continue
	}}
	if err := e.Register(p); err != nil {
		return err
	}
	if _, err := e.Serve(ctx, true); !errors.Is(err, context.Canceled) {
		return fmt.Errorf("serve: %w", err)
	}
	return nil
}

// running checks that the guest executes function after function, and that
// nothing stops it.
func running(t *testing.T, guest *qemutest.VM, cpus []qemutest.CPU) {
	t.Helper()
	for n, c := range cpus {
		before := c.Count()
		for range 3000 {
			if c.Count() > before+200 {
				break
			}
			time.Sleep(time.Millisecond)
		}
		require.Greater(t, c.Count(), before+200, "vCPU %d goes on; QEMU says %s", n, guest.Status())
	}
	require.Equal(t, "running", guest.Status())
}

// TestEnds ends a tool under load by signals, many times: whatever happens the
// guest goes on, at the latest when the next one attaches.
func TestEnds(t *testing.T) {
	kinds := []struct {
		signal syscall.Signal
		times  int
	}{{syscall.SIGTERM, 25}, {syscall.SIGINT, 25}, {syscall.SIGKILL, 20}}
	self, err := os.Executable()
	require.NoError(t, err)
	const vcpus = 2
	guest := qemutest.Start(t, qemutest.Config{VCPUs: vcpus})
	var cpus []qemutest.CPU
	for n := range vcpus {
		cpus = append(cpus, guest.CPU(n))
	}
	r := rand.New(rand.NewPCG(1, 2))
	stopped := 0
	for _, k := range kinds {
		if testing.Short() {
			k.times /= 5
		}
		for i := range k.times {
			f := i % len(qemutest.Functions)
			_, addr := qemutest.Target(f)
			for _, c := range cpus {
				c.Stop()
				c.Call(f, 1<<40)
			}
			cmd := exec.Command(self)
			cmd.Env = append(os.Environ(), childEnv+"=qemu:"+guest.GDB, fmt.Sprintf("%s_ADDR=%#x", childEnv, addr))
			out, err := cmd.StdoutPipe()
			require.NoError(t, err)
			var stderr qemutest.Buffer
			cmd.Stderr = &stderr
			require.NoError(t, cmd.Start())
			line, err := bufio.NewReader(out).ReadString('\n')
			require.NoError(t, err, "%s", stderr.String())
			require.Equal(t, "hit\n", line)
			time.Sleep(time.Duration(r.IntN(3000)) * time.Microsecond)
			require.NoError(t, cmd.Process.Signal(k.signal))
			err = cmd.Wait()
			if k.signal != syscall.SIGKILL {
				require.NoError(t, err, "%s", stderr.String())
				running(t, guest, cpus)
				continue
			}
			require.Error(t, err)
			if guest.Status() != "running" {
				stopped++
			}
			vm, err := qemu.Dial(t.Context(), "qemu:"+guest.GDB, nil)
			require.NoError(t, err)
			running(t, guest, cpus)
			require.NoError(t, vm.Close())
			running(t, guest, cpus)
		}
	}
	t.Logf("%d killed tools left the VM stopped, until the next attached", stopped)
}
