//go:build linux

package qemu_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/qemu"
	"github.com/vmprobes/vmprobes/internal/qemutest"
)

// attach dials, attaches and makes an engine, which the test closes.
func attach(t testing.TB, target string, opts *qemu.Options) (*qemu.VM, *breakpoint.Engine) {
	t.Helper()
	vm, err := qemu.Dial(t.Context(), target, opts)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, vm.Close()) })
	d, err := vm.Attach(t.Context())
	require.NoError(t, err)
	var log *slog.Logger
	if opts != nil {
		log = opts.Logger
	}
	e := breakpoint.New(d, breakpoint.Config{MayFault: func(uint64) bool { return false }, Logger: log})
	t.Cleanup(func() { require.NoError(t, e.Close()) })
	return vm, e
}

// serve serves e until the returned function is called, which gives Serve's error.
func serve(e *breakpoint.Engine) (stop func() error) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		_, err := e.Serve(ctx, true)
		done <- err
	}()
	return func() error {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			return err
		}
		return nil
	}
}

func count(n *int) func(*breakpoint.Context) breakpoint.Verdict {
	return func(*breakpoint.Context) breakpoint.Verdict {
		*n++
		return breakpoint.Continue
	}
}

// TestExact probes each kind of instruction and compares the hits with the
// guest's own count of executions, with and without a post handler.
func TestExact(t *testing.T) {
	for _, vcpus := range []int{1, 2} {
		t.Run(fmt.Sprintf("%d vCPUs", vcpus), func(t *testing.T) {
			guest := qemutest.Start(t, qemutest.Config{VCPUs: vcpus})
			exact(t, guest, vcpus, nil)
		})
	}
}

// TestKVM is TestExact under KVM, where there is one that runs the micro-kernel.
func TestKVM(t *testing.T) {
	guest := qemutest.Start(t, qemutest.Config{Accel: "kvm"})
	exact(t, guest, 1, &qemu.Options{DebugRegisters: true})
}

func exact(t *testing.T, guest *qemutest.VM, vcpus int, opts *qemu.Options) {
	var cpus []qemutest.CPU
	for n := range vcpus {
		cpus = append(cpus, guest.CPU(n))
	}
	vm, e := attach(t, "qemu:"+guest.GDB, opts)
	t.Logf("%+v", vm.Info())
	require.Equal(t, vcpus, vm.Info().VCPUs)
	for i, f := range qemutest.Functions[:qemutest.Ordinary] {
		for _, post := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/post=%v", f.Name, post), func(t *testing.T) {
				_, addr := qemutest.Target(i)
				pres, posts := 0, 0
				each := make([]int, vcpus)
				p := &breakpoint.Probe{Addr: addr, Pre: func(c *breakpoint.Context) breakpoint.Verdict {
					pres++
					each[c.VCPU]++
					return breakpoint.Continue
				}}
				if post {
					p.Post = count(&posts)
				}
				require.NoError(t, e.Register(p))
				stop := serve(e)
				const n = 300
				var before uint64
				for _, c := range cpus {
					before += c.Count()
				}
				packets, begin := vm.Packets(), time.Now()
				for _, c := range cpus {
					c.Call(i, n)
				}
				for _, c := range cpus {
					c.Wait()
				}
				took := time.Since(begin)
				packets = vm.Packets() - packets
				require.NoError(t, stop())
				var after uint64
				for _, c := range cpus {
					after += c.Count()
				}
				require.EqualValues(t, n*vcpus, after-before, "executions")
				require.EqualValues(t, n*vcpus, pres, "hits")
				for v := range each {
					require.Equal(t, n, each[v], "hits of vCPU %d", v)
				}
				if post {
					require.EqualValues(t, n*vcpus, posts, "post handlers")
				}
				require.NoError(t, e.Unregister(p))
				t.Logf("%.2f packets/hit, %.0f hits/s", float64(packets)/float64(pres), float64(pres)/took.Seconds())
			})
		}
	}
	t.Logf("%+v", e.Stats())
}

// TestStress makes many hits on two vCPUs at once, where QEMU is known to end a
// step without having made it.
func TestStress(t *testing.T) {
	n := 5000
	if testing.Short() {
		n = 500
	}
	guest := qemutest.Start(t, qemutest.Config{VCPUs: 2})
	cpus := []qemutest.CPU{guest.CPU(0), guest.CPU(1)}
	vm, e := attach(t, "qemu:"+guest.GDB, nil)
	const push = 1
	_, addr := qemutest.Target(push)
	hits := make([]int, 2)
	require.NoError(t, e.Register(&breakpoint.Probe{Addr: addr, Pre: func(c *breakpoint.Context) breakpoint.Verdict {
		hits[c.VCPU]++
		return breakpoint.Continue
	}}))
	stop := serve(e)
	packets := vm.Packets()
	for _, c := range cpus {
		c.Call(push, n)
	}
	for i, c := range cpus {
		c.Wait()
		require.EqualValues(t, n, c.Count(), "executions of vCPU %d", i)
	}
	require.NoError(t, stop())
	require.Equal(t, []int{n, n}, hits)
	t.Logf("%.3f packets a hit", float64(vm.Packets()-packets)/float64(2*n))
}

// TestStressed probes one function on four vCPUs while other probes come and go,
// registers are read and the VM is frozen, all from other goroutines.
func TestStressed(t *testing.T) {
	const vcpus = 4
	n := 400
	if testing.Short() {
		n = 100
	}
	guest := qemutest.Start(t, qemutest.Config{VCPUs: vcpus})
	var cpus []qemutest.CPU
	for n := range vcpus {
		cpus = append(cpus, guest.CPU(n))
	}
	vm, e := attach(t, "qemu:"+guest.GDB, nil)
	for fn, post := range []bool{false, true} {
		_, addr := qemutest.Target(fn)
		pres, posts := 0, 0
		p := &breakpoint.Probe{Addr: addr, Pre: count(&pres)}
		if post {
			p.Post = count(&posts)
		}
		require.NoError(t, e.Register(p))
		stop := serve(e)
		var before, after uint64
		for _, c := range cpus {
			before += c.Count()
			c.Call(fn, n)
		}
		var wg sync.WaitGroup
		for g := range 2 {
			wg.Go(func() {
				// They come to an end whatever the guest does: it gets little time.
				for range 60 {
					_, a := qemutest.Target(2 + g)
					q := &breakpoint.Probe{Addr: a}
					assert.NoError(t, e.Register(q))
					assert.NoError(t, vm.Freeze())
					_, err := vm.CPUs()
					assert.NoError(t, err)
					assert.NoError(t, vm.Thaw())
					assert.NoError(t, e.Unregister(q))
				}
			})
		}
		wg.Wait()
		for _, c := range cpus {
			c.Wait()
		}
		require.NoError(t, stop())
		for _, c := range cpus {
			after += c.Count()
		}
		require.EqualValues(t, n*vcpus, after-before)
		require.Equal(t, n*vcpus, pres)
		if post {
			require.Equal(t, pres, posts)
		}
		require.NoError(t, e.Unregister(p))
	}
}
