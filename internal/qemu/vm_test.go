//go:build linux

package qemu_test

import (
	"context"
	"fmt"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/qemu"
	"github.com/vmprobes/vmprobes/internal/qemutest"
	"github.com/vmprobes/vmprobes/paging"
)

// TestMemory compares the guest's memory as each way of access shows it with the
// file that holds it.
func TestMemory(t *testing.T) {
	guest := qemutest.Start(t, qemutest.Config{VCPUs: 2})
	guest.CPU(0)
	guest.CPU(1)
	for name, opts := range map[string]*qemu.Options{
		"packets": {},
		"file":    {RAM: guest.RAM},
		"procmem": {ProcMem: true},
	} {
		t.Run(name, func(t *testing.T) {
			vm, err := qemu.Dial(t.Context(), "qemu:"+guest.GDB, opts)
			require.NoError(t, err)
			defer vm.Close()
			assert.InDelta(t, 64<<20, vm.Info().RAM, 0x60000, "all but what the BIOS shadows")
			assert.Equal(t, "qemutest", vm.Info().Name)
			assert.False(t, vm.Info().KVM)
			packets := vm.Packets()
			for _, frame := range []paging.Frame{0x200, 0x203, 0x300, 0x9f} {
				page, release, err := vm.Page(frame, false)
				require.NoError(t, err)
				for off := 0; off < paging.PageSize; off += 8 {
					var w uint64
					for i := range 8 {
						w |= uint64(page[off+i]) << (8 * i)
					}
					require.Equal(t, guest.Load(uint64(frame)<<12+uint64(off)), w, "frame %#x, offset %#x", frame, off)
				}
				release()
			}
			if name != "packets" {
				assert.Equal(t, packets, vm.Packets(), "no packet is sent")
			}
			// Not memory: beyond the end, a device, ROM as far as files go.
			for _, frame := range []paging.Frame{0x4000, 0xfee00, 1 << 40} {
				_, _, err = vm.Page(frame, false)
				require.ErrorIs(t, err, qemu.ErrNotRAM)
				require.ErrorIs(t, vm.WriteFrame(frame, 0, []byte{1}), qemu.ErrNotRAM)
			}
			want := []byte(name + " was here")
			require.NoError(t, vm.WriteFrame(0x300, 0x123, want))
			for i, c := range want {
				require.Equal(t, c, byte(guest.Load(0x300120+uint64(i+3)&^7)>>(8*((i+3)%8))))
			}
			require.Error(t, vm.WriteFrame(0x300, 4090, want))
			require.Error(t, vm.WriteFrame(0x300, -1, want))

			// Through page tables, with and without a root that is known.
			d, err := vm.Attach(t.Context())
			require.NoError(t, err)
			_, err = vm.Attach(t.Context())
			require.ErrorIs(t, err, qemu.ErrAttached)
			for _, root := range []paging.Root{0, 0x201000} {
				d.SetKernelRoot(root)
				function, _ := qemutest.Target(0)
				code := make([]byte, 5)
				_, err = d.Read(0, function, code)
				require.NoError(t, err)
				require.Equal(t, []byte{0x0f, 0x1f, 0x44, 0, 0}, code)
				tr, err := d.Translate(function)
				require.NoError(t, err)
				require.EqualValues(t, 0x200, tr.Frame)
				_, err = d.Read(0, 0xffffc00000000000, code)
				require.ErrorIs(t, err, breakpoint.ErrNotMapped)
				at := uint64(qemutest.KernelBase + 0x300200)
				_, err = d.Write(0, at, want)
				require.NoError(t, err)
				require.NoError(t, d.Store(0, at+16, want))
				got := make([]byte, len(want))
				_, err = d.Read(0, at+16, got)
				require.NoError(t, err)
				require.Equal(t, want, got)
			}
			cpus, err := vm.CPUs()
			require.NoError(t, err)
			require.Len(t, cpus, 2)
			for _, c := range cpus {
				require.EqualValues(t, 0x201000, c.CR3)
				require.EqualValues(t, uint64(qemutest.IDT), c.IDT)
				require.EqualValues(t, 0x500, c.EFER&0x500)
				require.Zero(t, c.CPL)
			}
			require.NoError(t, d.Close())
			require.NoError(t, vm.Close())
			require.Equal(t, "running", guest.Status())
		})
	}
	other := guest.RAM + ".other"
	require.NoError(t, os.WriteFile(other, make([]byte, 64<<20), 0o600))
	defer os.Remove(other)
	_, err := qemu.Dial(t.Context(), "qemu:"+guest.GDB, &qemu.Options{RAM: other})
	require.ErrorContains(t, err, "not the memory of the VM")
	require.Equal(t, "running", guest.Status())
}

// TestBusy: a second debugger gets an answer, not silence.
func TestBusy(t *testing.T) {
	guest := qemutest.Start(t, qemutest.Config{})
	guest.CPU(0)
	first, err := qemu.Dial(t.Context(), "qemu:"+guest.GDB, nil)
	require.NoError(t, err)
	_, err = qemu.Dial(t.Context(), "qemu:"+guest.GDB, &qemu.Options{Timeout: 500 * time.Millisecond})
	require.ErrorIs(t, err, qemu.ErrBusy)
	require.NoError(t, first.Close())
	require.Equal(t, "running", guest.Status())
	// A socket that isn't the gdbstub's.
	for _, path := range []string{guest.Monitor, guest.QMPSocket()} {
		_, err = qemu.Dial(t.Context(), "qemu:"+path, nil)
		require.ErrorIs(t, err, qemu.ErrNotStub)
	}
	_, err = qemu.Dial(t.Context(), "qemu+monitor:"+guest.GDB, &qemu.Options{Timeout: 500 * time.Millisecond})
	require.ErrorIs(t, err, qemu.ErrMonitor)
	vm, err := qemu.Dial(t.Context(), "qemu:"+guest.GDB, nil)
	require.NoError(t, err)
	require.NoError(t, vm.Close())
}

// TestMonitor starts the stub through either kind of monitor, and stops it again.
func TestMonitor(t *testing.T) {
	guest := qemutest.Start(t, qemutest.Config{NoGDB: true})
	cpu := guest.CPU(0)
	for _, path := range []string{guest.Monitor, guest.QMPSocket()} {
		for i := range 2 {
			vm, e := attach(t, "qemu+monitor:"+path, nil)
			_, addr := qemutest.Target(0)
			hits := 0
			p := &breakpoint.Probe{Addr: addr, Pre: count(&hits)}
			require.NoError(t, e.Register(p))
			stop := serve(e)
			before := cpu.Count()
			cpu.Call(0, 50)
			cpu.Wait()
			require.NoError(t, stop())
			require.EqualValues(t, 50, cpu.Count()-before)
			require.Equal(t, 50, hits)
			require.NoError(t, e.Close())
			require.NoError(t, vm.Close())
			require.NoFileExists(t, path+".vmprobes")
			require.Equal(t, "running", guest.Status())
			if i == 0 {
				// What a killed tool leaves.
				guest.HMP("gdbserver unix:" + path + ".vmprobes,server=on,wait=off")
			}
		}
	}
	require.Equal(t, "running", guest.Status())
	guest.QMP("stop", nil)
	_, err := qemu.Dial(t.Context(), "qemu+monitor:"+guest.QMPSocket(), nil)
	require.ErrorContains(t, err, "paused")
	require.Equal(t, "paused", guest.Status())
}

// TestPausedByAnother: the owner's pause ends the session, and stays.
func TestPausedByAnother(t *testing.T) {
	guest := qemutest.Start(t, qemutest.Config{})
	cpu := guest.CPU(0)
	cpu.Call(0, 1<<40)
	vm, e := attach(t, "qemu:"+guest.GDB, nil)
	_, addr := qemutest.Target(1)
	require.NoError(t, e.Register(&breakpoint.Probe{Addr: addr}))
	done := make(chan error, 1)
	go func() {
		_, err := e.Serve(context.Background(), true)
		done <- err
	}()
	time.Sleep(50 * time.Millisecond)
	guest.QMP("stop", nil)
	err := <-done
	require.ErrorIs(t, err, breakpoint.ErrGone)
	require.ErrorContains(t, err, "paused")
	require.NoError(t, e.Close())
	require.NoError(t, vm.Close())
	require.Equal(t, "paused", guest.Status())
	guest.QMP("cont", nil)
	cpu.Stop()
	cpu.Call(1, 1<<40)
	running(t, guest, []qemutest.CPU{cpu})
}

// TestEnded: QEMU's end, and a reset, end the session.
func TestEnded(t *testing.T) {
	for _, how := range []string{"quit", "system_reset", "kill"} {
		t.Run(how, func(t *testing.T) {
			guest := qemutest.Start(t, qemutest.Config{})
			cpu := guest.CPU(0)
			cpu.Call(0, 1<<40)
			vm, e := attach(t, "qemu:"+guest.GDB, nil)
			_, addr := qemutest.Target(0)
			require.NoError(t, e.Register(&breakpoint.Probe{Addr: addr}))
			done := make(chan error, 1)
			go func() {
				_, err := e.Serve(context.Background(), true)
				done <- err
			}()
			time.Sleep(50 * time.Millisecond)
			if how == "kill" {
				guest.Kill()
			} else {
				guest.QMP(how, nil) // with -no-reboot a reset is the end
			}
			err := <-done
			require.ErrorIs(t, err, breakpoint.ErrGone)
			t.Log(err)
			require.NoError(t, e.Close())
			require.NoError(t, vm.Close())
		})
	}
}

// TestTCP reaches the stub over TCP.
func TestTCP(t *testing.T) {
	guest := qemutest.Start(t, qemutest.Config{NoGDB: true})
	cpu := guest.CPU(0)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	addr := l.Addr().String()
	require.NoError(t, l.Close())
	guest.HMP("gdbserver tcp:" + addr)
	_, e := attach(t, "qemu:"+addr, nil)
	hits := 0
	_, at := qemutest.Target(0)
	require.NoError(t, e.Register(&breakpoint.Probe{Addr: at, Pre: count(&hits)}))
	stop := serve(e)
	cpu.Call(0, 100)
	cpu.Wait()
	require.NoError(t, stop())
	require.Equal(t, 100, hits)
	_, err = qemu.Dial(t.Context(), "qemu:"+addr, &qemu.Options{ProcMem: true, Timeout: 300 * time.Millisecond})
	require.ErrorIs(t, err, qemu.ErrBusy)
}

// TestReset resets a VM that comes back with the same code at the same place: the
// probe goes on.
func TestReset(t *testing.T) {
	guest := qemutest.Start(t, qemutest.Config{Reboot: true})
	cpu := guest.CPU(0)
	_, e := attach(t, "qemu:"+guest.GDB, nil)
	_, addr := qemutest.Target(0)
	hits := 0
	p := &breakpoint.Probe{Addr: addr, Pre: count(&hits)}
	require.NoError(t, e.Register(p))
	stop := serve(e)
	cpu.Call(0, 100)
	cpu.Wait()
	require.EqualValues(t, 100, cpu.Count())
	guest.QMP("system_reset", nil)
	for range 3000 {
		if cpu.Count() == 0 {
			break
		}
		time.Sleep(time.Millisecond)
	}
	guest.CPU(0)
	cpu.Call(0, 100)
	cpu.Wait()
	require.EqualValues(t, 100, cpu.Count())
	require.NoError(t, stop())
	require.Equal(t, 200, hits)
}

// TestIdentity resets a VM that comes back with the same code at the same place,
// once with the same kernel around it and once with another one, whose function
// there is another one.
func TestIdentity(t *testing.T) {
	for name, opts := range map[string]func(*qemutest.VM) *qemu.Options{
		"packets": func(*qemutest.VM) *qemu.Options { return nil },
		"file":    func(g *qemutest.VM) *qemu.Options { return &qemu.Options{RAM: g.RAM} },
	} {
		t.Run(name, func(t *testing.T) {
			guest := qemutest.Start(t, qemutest.Config{Reboot: true})
			cpu := guest.CPU(0)
			vm, err := qemu.Dial(t.Context(), "qemu:"+guest.GDB, opts(guest))
			require.NoError(t, err)
			t.Cleanup(func() { require.NoError(t, vm.Close()) })
			d, err := vm.Attach(t.Context())
			require.NoError(t, err)
			e := breakpoint.New(d, breakpoint.Config{})
			t.Cleanup(func() { require.NoError(t, e.Close()) })
			banner := guest.Bytes(qemutest.ArenaMemory, 32)
			const at = qemutest.KernelBase + qemutest.ArenaMemory
			copy(banner, "Micro version 1")
			require.ErrorContains(t, d.SetIdentity(at, []byte("Micro version 2")), "Micro version 1")
			require.Error(t, d.SetIdentity(0xffffc00000000000, []byte("x")))
			require.NoError(t, d.SetIdentity(at, []byte("Micro version 1")))
			var hits atomic.Int64
			var probes []*breakpoint.Probe
			for f := range 2 {
				_, addr := qemutest.Target(f)
				probes = append(probes, &breakpoint.Probe{Addr: addr, Pre: func(*breakpoint.Context) breakpoint.Verdict {
					hits.Add(1)
					return breakpoint.Continue
				}})
			}
			require.NoError(t, e.Register(probes...))
			served := make(chan error, 1)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			go func() {
				_, err := e.Serve(ctx, true)
				served <- err
			}()
			call := func() {
				guest.CPU(0)
				for f := range 2 {
					cpu.Call(f, 50)
					cpu.Wait()
				}
				require.EqualValues(t, 100, cpu.Count())
			}
			reset := func() {
				time.Sleep(110 * time.Millisecond) // how long a reboot takes, at least
				guest.QMP("system_reset", nil)
				for range 3000 {
					if cpu.Count() == 0 {
						break
					}
					time.Sleep(time.Millisecond)
				}
			}
			call()
			reset()
			call()
			for range 1000 {
				if hits.Load() == 200 {
					break
				}
				time.Sleep(time.Millisecond)
			}
			require.Empty(t, served)
			copy(banner, "Micro version 2")
			reset()
			call()
			err = <-served
			require.ErrorIs(t, err, breakpoint.ErrTextChanged)
			require.ErrorContains(t, err, "Micro version 2")
			require.EqualValues(t, 200, hits.Load())
			for _, p := range probes {
				require.ErrorIs(t, e.Unregister(p), breakpoint.ErrTextChanged)
			}
		})
	}
}

// TestOverlay: what is read of the guest's code is what is there. Nothing of a
// breakpoint shows under TCG.
func TestOverlay(t *testing.T) {
	guest := qemutest.Start(t, qemutest.Config{})
	guest.CPU(0)
	_, e := attach(t, "qemu:"+guest.GDB, nil)
	_, addr := qemutest.Target(0)
	require.NoError(t, e.Register(&breakpoint.Probe{Addr: addr}))
	for _, want := range []string{
		"\x0f\x1f\x44\x00\x00", // the probe's
		"\xe9\x01\x02\x03\x04", // rewritten by the guest, as Linux' text_poke does
		"\x66\x90\x44\x00\x00", // in part
	} {
		code := guest.Bytes(addr-qemutest.KernelBase, 5)
		copy(code, want)
		got := []byte(string(code))
		e.Overlay(addr, got)
		require.Equal(t, want, string(got))
	}
}

// TestConcurrent registers, unregisters, reads and freezes while the guest hits
// as fast as it can; every execution while a probe was there is a hit.
func TestConcurrent(t *testing.T) {
	const vcpus = 2
	guest := qemutest.Start(t, qemutest.Config{VCPUs: vcpus})
	vm, e := attach(t, "qemu:"+guest.GDB, nil)
	var cpus []qemutest.CPU
	for n := range vcpus {
		cpus = append(cpus, guest.CPU(n))
	}
	_, always := qemutest.Target(2)
	hits := 0
	p := &breakpoint.Probe{Addr: always, Pre: count(&hits)}
	require.NoError(t, e.Register(p))
	stop := serve(e)
	var before uint64
	for _, c := range cpus {
		before += c.Count()
		c.Call(2, 400)
	}
	var wg sync.WaitGroup
	for g := range 3 {
		wg.Go(func() {
			for i := range 15 {
				switch g {
				case 0:
					_, addr := qemutest.Target(i % 2)
					q := &breakpoint.Probe{Addr: addr}
					assert.NoError(t, e.Register(q))
					assert.NoError(t, e.Unregister(q))
				case 1:
					_, _, err := vm.Page(paging.Frame(0x200+i), false)
					assert.NoError(t, err)
				case 2:
					assert.NoError(t, vm.Freeze())
					cpus, err := vm.CPUs()
					assert.NoError(t, err)
					assert.Len(t, cpus, vcpus)
					assert.NoError(t, vm.Thaw())
				}
				time.Sleep(time.Millisecond)
			}
		})
	}
	wg.Wait()
	for _, c := range cpus {
		c.Wait()
	}
	require.NoError(t, stop())
	var after uint64
	for _, c := range cpus {
		after += c.Count()
	}
	require.EqualValues(t, after-before, hits)
	require.Equal(t, 400*vcpus, hits)
}

// TestSecondConnection leaves a plain connection behind, as a crashed gdb does.
func TestSecondConnection(t *testing.T) {
	guest := qemutest.Start(t, qemutest.Config{})
	cpu := guest.CPU(0)
	c, err := net.Dial("unix", guest.GDB)
	require.NoError(t, err)
	_, addr := qemutest.Target(0)
	fmt.Fprintf(c, "$Z0,%x,1#%02x", addr, checksum(fmt.Sprintf("Z0,%x,1", addr)))
	time.Sleep(50 * time.Millisecond)
	require.NoError(t, c.Close())
	cpu.Call(0, 1<<40)
	require.NotEqual(t, "running", guest.Status())
	vm, err := qemu.Dial(t.Context(), "qemu:"+guest.GDB, nil)
	require.NoError(t, err)
	running(t, guest, []qemutest.CPU{cpu})
	require.NoError(t, vm.Close())
}

func checksum(s string) (sum byte) {
	for i := range len(s) {
		sum += s[i]
	}
	return sum
}
