//go:build linux

package qemu_test

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/qemu"
	"github.com/vmprobes/vmprobes/internal/qemutest"
	"github.com/vmprobes/vmprobes/paging"
)

// benchmarkHits serves b.N hits of one function of the micro-kernel and reports
// what each cost.
func benchmarkHits(b *testing.B, vcpus, function int, post bool) {
	guest := qemutest.Start(b, qemutest.Config{VCPUs: vcpus})
	var cpus []qemutest.CPU
	for n := range vcpus {
		cpus = append(cpus, guest.CPU(n))
	}
	vm, e := attach(b, "qemu:"+guest.GDB, nil)
	_, addr := qemutest.Target(function)
	hits := 0
	ctx, done := context.WithCancel(context.Background())
	defer done()
	p := &breakpoint.Probe{Addr: addr, Pre: func(*breakpoint.Context) breakpoint.Verdict {
		if hits++; hits == b.N {
			return 1
		}
		return breakpoint.Continue
	}}
	if post {
		p.Post = func(*breakpoint.Context) breakpoint.Verdict { return breakpoint.Continue }
	}
	require.NoError(b, e.Register(p))
	for _, c := range cpus {
		c.Call(function, 1<<40)
	}
	b.ReportAllocs()
	b.ResetTimer()
	packets := vm.Packets()
	_, err := e.Serve(ctx, true)
	b.StopTimer()
	require.NoError(b, err)
	b.ReportMetric(float64(vm.Packets()-packets)/float64(b.N), "packets/op")
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "hits/s")
}

// BenchmarkHit is the cost of a hit by kind of instruction.
func BenchmarkHit(b *testing.B) {
	for i, f := range qemutest.Functions {
		for _, post := range []bool{false, true} {
			b.Run(fmt.Sprintf("%s/post=%v", f.Name, post), func(b *testing.B) { benchmarkHits(b, 1, i, post) })
		}
	}
	b.Run("nop5/2vCPUs", func(b *testing.B) { benchmarkHits(b, 2, 0, false) })
	b.Run("push/2vCPUs", func(b *testing.B) { benchmarkHits(b, 2, 1, false) })
}

// gdbHits has GDB serve n hits at addr, by a breakpoint with commands that print
// something and go on, as people write them, and returns how long that took.
func gdbHits(tb testing.TB, socket string, addr uint64, n int, print string) time.Duration {
	gdb, err := exec.LookPath("gdb")
	if err != nil {
		tb.Skip("no gdb to compare with: install it")
	}
	script := filepath.Join(tb.TempDir(), "gdb")
	commands := fmt.Sprintf(`set pagination off
set confirm off
set architecture i386:x86-64
target remote %s
set $n = 0
break *%#x
commands
silent
%s
set $n = $n + 1
if $n < %d
continue
end
end
python import time; begin = time.time()
continue
python print("TOOK", time.time() - begin)
delete
detach
quit
`, socket, addr, print, n)
	require.NoError(tb, os.WriteFile(script, []byte(commands), 0o600))
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, gdb, "-nx", "-batch", "-x", script).CombinedOutput()
	require.NoError(tb, err, "%s", out)
	_, took, ok := strings.Cut(string(out), "TOOK ")
	require.True(tb, ok, "%s", out)
	require.GreaterOrEqual(tb, strings.Count(string(out), "HIT "), n)
	var s float64
	fmt.Sscan(took, &s)
	return time.Duration(s * float64(time.Second))
}

// BenchmarkGDB is GDB doing the same as BenchmarkHit/nop5 and /push, on the same
// micro-kernel.
func BenchmarkGDB(b *testing.B) {
	for _, i := range []int{0, 1} {
		b.Run(qemutest.Functions[i].Name, func(b *testing.B) {
			guest := qemutest.Start(b, qemutest.Config{})
			cpu := guest.CPU(0)
			_, addr := qemutest.Target(i)
			cpu.Call(i, 1<<40)
			b.ResetTimer()
			took := gdbHits(b, guest.GDB, addr, b.N, `printf "HIT %lx\n", $rdi`)
			b.StopTimer()
			b.ReportMetric(float64(b.N)/took.Seconds(), "hits/s")
			b.ReportMetric(0, "ns/op")
			require.Equal(b, "running", guest.Status())
		})
	}
}

// BenchmarkLinux compares the driver with GDB at do_sys_openat2 of one booted
// Linux guest, whose program opens files in a loop: both print each file's name.
func BenchmarkLinux(b *testing.B) {
	guest := qemutest.StartLinux(b, "6.1", qemutest.Config{})
	addr := guest.Symbol("do_sys_openat2")
	guest.Must("busy 0")
	for _, at := range []uint64{addr, addr + 5} {
		b.Run(fmt.Sprintf("vmprobes/+%d", at-addr), func(b *testing.B) {
			vm, err := qemu.Dial(b.Context(), "qemu:"+guest.GDB, nil)
			require.NoError(b, err)
			d, err := vm.Attach(b.Context())
			require.NoError(b, err)
			e := breakpoint.New(d, breakpoint.Config{})
			hits := 0
			require.NoError(b, e.Register(&breakpoint.Probe{Addr: at, Pre: func(c *breakpoint.Context) breakpoint.Verdict {
				name, err := fileName(d, c)
				if err != nil {
					b.Error(err)
				}
				fmt.Fprintf(io.Discard, "HIT %s\n", name)
				if hits++; hits == b.N {
					return 1
				}
				return breakpoint.Continue
			}}))
			b.ResetTimer()
			packets := vm.Packets()
			_, err = e.Serve(context.Background(), true)
			b.StopTimer()
			require.NoError(b, err)
			b.ReportMetric(float64(vm.Packets()-packets)/float64(b.N), "packets/op")
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "hits/s")
			require.NoError(b, e.Close())
			require.NoError(b, vm.Close())
		})
		b.Run(fmt.Sprintf("GDB/+%d", at-addr), func(b *testing.B) {
			took := gdbHits(b, guest.GDB, at, b.N, `printf "HIT %s\n", (char*)$rsi`)
			b.ReportMetric(float64(b.N)/took.Seconds(), "hits/s")
			b.ReportMetric(0, "ns/op")
		})
	}
	guest.Must("stop")
}

// BenchmarkPage reads frames under one Freeze, as discovery does.
func BenchmarkPage(b *testing.B) {
	guest := qemutest.Start(b, qemutest.Config{})
	guest.CPU(0)
	for name, opts := range map[string]*qemu.Options{"packets": {}, "procmem": {ProcMem: true}, "file": {RAM: guest.RAM}} {
		b.Run(name, func(b *testing.B) {
			vm, err := qemu.Dial(b.Context(), "qemu:"+guest.GDB, opts)
			require.NoError(b, err)
			defer vm.Close()
			require.NoError(b, vm.Freeze())
			b.ReportAllocs()
			b.SetBytes(paging.PageSize)
			for i := range b.N {
				_, release, err := vm.Page(paging.Frame(0x200+i%0x3000), false)
				if err != nil {
					b.Fatal(err)
				}
				release()
			}
			require.NoError(b, vm.Thaw())
		})
	}
}
