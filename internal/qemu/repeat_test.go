//go:build linux

package qemu_test

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/qemu"
	"github.com/vmprobes/vmprobes/internal/qemutest"
)

// TestString executes repeated string instructions with random counts, addresses
// that overlap or alias and cross pages, and memory that ends comparisons early,
// first without a probe and then with one: the processor's registers and flags,
// memory and page table with its accessed and dirty bits are the same, and one
// execution is one hit.
func TestString(t *testing.T) {
	rounds := 100
	if testing.Short() {
		rounds = 14
	}
	for _, test := range []struct {
		name, accel string
		opts        func(*qemutest.VM) *qemu.Options
	}{
		{"packets", "tcg", func(*qemutest.VM) *qemu.Options { return nil }},
		{"file", "tcg", func(g *qemutest.VM) *qemu.Options { return &qemu.Options{RAM: g.RAM} }},
		{"kvm", "kvm", func(*qemutest.VM) *qemu.Options { return &qemu.Options{DebugRegisters: true} }},
	} {
		t.Run(test.name, func(t *testing.T) {
			guest := qemutest.Start(t, qemutest.Config{Accel: test.accel})
			cpu := guest.CPU(0)
			seed := rand.Uint64()
			t.Logf("seed %d", seed)
			r := rand.New(rand.NewPCG(seed, 1))
			arena := guest.Bytes(qemutest.ArenaMemory, 256<<12)
			table := guest.Bytes(qemutest.ArenaTable, 4096)
			opts := test.opts(guest)
			_, e := attach(t, "qemu:"+guest.GDB, opts)
			probes := map[int]*breakpoint.Probe{}
			var pres, posts int
			for i, f := range qemutest.StringFunctions() {
				_, addr := qemutest.Target(f)
				probes[f] = &breakpoint.Probe{Addr: addr, Pre: count(&pres)}
				if i%2 == 0 {
					probes[f].Post = count(&posts)
				}
			}
			longest, which := time.Duration(0), ""
			for round := range rounds {
				if round%2 == 1 {
					// The VM runs between any two steps.
					defer qemu.SetSlice(0)()
				} else {
					defer qemu.SetSlice(25 * time.Millisecond)()
				}
				for _, f := range qemutest.StringFunctions() {
					if r.IntN(4) != 0 {
						continue
					}
					fn := qemutest.Functions[f]
					s := qemutest.StringState{CX: r.Uint64N(6000), Flags: 2, AX: r.Uint64()}
					switch r.IntN(8) {
					case 0:
						s.CX = r.Uint64N(4)
					case 1:
						s.CX = r.Uint64N(40)
					}
					// Where 48,000 bytes up and down are the Arena's.
					s.SI = qemutest.Arena + 50000 + r.Uint64N(512<<12-100000)
					s.DI = qemutest.Arena + 50000 + r.Uint64N(512<<12-100000)
					switch r.IntN(4) {
					case 0:
						s.DI = s.SI + r.Uint64N(10000) - 5000
					case 1: // all by steps, if it has few elements in between
						s.DI = s.SI + r.Uint64N(400) - 200
						s.CX %= 100
					}
					if r.IntN(2) == 0 {
						s.SI, s.DI = s.SI&^7, s.DI&^7
					}
					if fn.Name == "rep movsb, 32-bit" {
						s.CX %= 200
						s.SI, s.DI = s.SI-qemutest.KernelBase, s.DI-qemutest.KernelBase
					}
					if r.IntN(3) == 0 {
						s.Flags |= 0x400 // DF
					}
					// Memory of one byte with few exceptions.
					fill := byte(s.AX)
					s.AX = uint64(fill) * 0x0101010101010101
					before := bytes.Repeat([]byte{fill}, len(arena))
					if fn.Name == "repne scasb" || fn.Name == "repne cmpsl" {
						s.AX ^= 0xff
						if fn.Name == "repne cmpsl" {
							for i := range before {
								before[i] = byte(r.Uint32())
							}
						}
					}
					if r.IntN(2) == 0 {
						for range 1 + r.IntN(400) {
							before[r.IntN(len(before))] = byte(s.AX) ^ byte(r.IntN(2))
						}
					}
					if fn.Name == "rep movsb" || fn.Name == "rep movsw" || fn.Name == "rep movsq" || fn.Name == "rep lodsl" {
						for i := range before {
							before[i] = byte(r.Uint32())
						}
					}
					bits := r.Uint32()
					prepare := func() {
						copy(arena, before)
						for i := range 512 {
							// Accessed and dirty, or not, in turn of some bits.
							table[8*i] = 0x03 | byte(bits>>(i%16)&3)<<5
						}
						cpu.SetString(s)
					}
					run := func() (qemutest.StringState, []byte, []byte) {
						prepare()
						cpu.Call(f, 1)
						cpu.Wait()
						return cpu.StringState(), bytes.Clone(arena), bytes.Clone(table)
					}
					regs, memory, entries := run()
					pres, posts = 0, 0
					require.NoError(t, e.Register(probes[f]))
					stop := serve(e)
					begin := time.Now()
					gotRegs, gotMemory, gotEntries := run()
					if took := time.Since(begin); took > longest && round%2 == 0 {
						longest, which = took, fmt.Sprintf("%s, %+v", fn.Name, s)
					}
					require.NoError(t, stop())
					require.NoError(t, e.Unregister(probes[f]))
					what := fmt.Sprintf("%s, %+v", fn.Name, s)
					require.Equal(t, regs, gotRegs, what)
					if !bytes.Equal(memory, gotMemory) {
						t.Fatalf("%s: memory differs", what)
					}
					require.Equal(t, entries, gotEntries, what)
					require.Equal(t, 1, pres, what)
					if probes[f].Post != nil {
						require.Equal(t, 1, posts, what)
					}
				}
			}
			t.Logf("the longest took %v: %s; %+v", longest, which, e.Stats())
		})
	}
}

// TestInterruptedString: an execution of 40,000 iterations is one hit, with an
// interrupt in its midst, whose handler executes the same instruction, while
// another goroutine stops the VM now and then.
func TestInterruptedString(t *testing.T) {
	f := qemutest.Find(qemutest.Interrupted)
	_, addr := qemutest.Target(f)
	for _, vcpus := range []int{1, 2} {
		guest := qemutest.Start(t, qemutest.Config{VCPUs: vcpus})
		var cpus []qemutest.CPU
		for n := range vcpus {
			cpus = append(cpus, guest.CPU(n))
		}
		vm, e := attach(t, "qemu:"+guest.GDB, nil)
		for _, post := range []bool{false, true} {
			for _, slice := range []time.Duration{25 * time.Millisecond, time.Millisecond, 0} {
				t.Run(fmt.Sprintf("%d vCPUs/post=%v/%v", vcpus, post, slice), func(t *testing.T) {
					defer qemu.SetSlice(slice)()
					pres, posts, short := 0, 0, 0
					var inside atomic.Int64
					p := &breakpoint.Probe{Addr: addr}
					depth := make([]int, vcpus)
					p.Pre = func(c *breakpoint.Context) breakpoint.Verdict {
						pres++
						switch c.Regs.CX {
						case 40000:
							depth[c.VCPU]++
						case 5:
							short++
							inside.Add(int64(depth[c.VCPU]))
						default:
							t.Errorf("a hit with RCX %d", c.Regs.CX)
						}
						return breakpoint.Continue
					}
					if post {
						p.Post = func(c *breakpoint.Context) breakpoint.Verdict {
							posts++
							if c.Regs.CX != 0 || c.Regs.IP != addr+2 {
								t.Errorf("after it: RCX %d, RIP %#x", c.Regs.CX, c.Regs.IP)
							}
							if c.Regs.SI&0xff == 0x80+40000&0xff {
								depth[c.VCPU] = 0
							}
							return breakpoint.Continue
						}
					}
					require.NoError(t, e.Register(p))
					stop := serve(e)
					var before, irqs uint64
					for _, c := range cpus {
						before += c.Count()
						irqs += c.IRQs()
					}
					const n = 5
					rounds := 0
					packets, begin := vm.Packets(), time.Now()
					disturb, cancel := context.WithCancel(t.Context())
					var wg sync.WaitGroup
					wg.Go(func() {
						for disturb.Err() == nil {
							assert.NoError(t, vm.Freeze())
							_, err := vm.CPUs()
							assert.NoError(t, err)
							assert.NoError(t, vm.Thaw())
							time.Sleep(time.Millisecond)
						}
					})
					// Whether an interrupt finds the instruction under way is chance: about
					// half of them do when it is stepped.
					for midst := false; !midst && rounds < 50; rounds++ {
						for _, c := range cpus {
							c.Call(f, n)
						}
						for _, c := range cpus {
							c.Wait()
						}
						midst = !post || slice > 0 || inside.Load() > 0
					}
					took := time.Since(begin)
					cancel()
					wg.Wait()
					packets = vm.Packets() - packets
					require.NoError(t, stop())
					var after, irqsAfter uint64
					for _, c := range cpus {
						after += c.Count()
						irqsAfter += c.IRQs()
					}
					require.NoError(t, e.Unregister(p))
					require.EqualValues(t, after-before, pres, "hits")
					require.EqualValues(t, irqsAfter-irqs, short)
					require.EqualValues(t, rounds*n*vcpus, pres-short)
					if slice > time.Millisecond {
						require.Less(t, packets, uint64(n*vcpus*4000), "it isn't done by steps")
					}
					if post {
						require.Equal(t, pres, posts)
						if slice == 0 {
							require.NotZero(t, inside.Load())
						}
						t.Logf("%d interrupts in the midst of it", inside.Load())
					}
					t.Logf("%d executions, %d of them in %d interrupts, %v", pres, short, irqsAfter-irqs, took)
				})
			}
		}
	}
}

// TestRemovedString removes a probe while a repeated instruction is under way at
// it: nothing fails, waits or is left behind, and each Pre has its Post unless the
// probe was removed first.
func TestRemovedString(t *testing.T) {
	defer qemu.SetSlice(0)()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 1))
	f := qemutest.Find(qemutest.Interrupted)
	_, addr := qemutest.Target(f)
	guest := qemutest.Start(t, qemutest.Config{VCPUs: 2})
	cpus := []qemutest.CPU{guest.CPU(0), guest.CPU(1)}
	rounds := 20
	if testing.Short() {
		rounds = 8
	}
	for round := range rounds {
		vm, err := qemu.Dial(t.Context(), "qemu:"+guest.GDB, nil)
		require.NoError(t, err)
		d, err := vm.Attach(t.Context())
		require.NoError(t, err)
		e := breakpoint.New(d, breakpoint.Config{})
		pres, posts := 0, 0
		p := &breakpoint.Probe{Addr: addr, Pre: count(&pres)}
		if round%3 > 0 {
			p.Post = count(&posts)
		}
		require.NoError(t, e.Register(p))
		stop := serve(e)
		for _, c := range cpus {
			c.Call(f, 3)
		}
		time.Sleep(time.Duration(r.IntN(60)) * time.Millisecond)
		begin := time.Now()
		switch round % 2 {
		case 0:
			require.NoError(t, e.Unregister(p))
			time.Sleep(time.Duration(r.IntN(5)) * time.Millisecond)
			if r.IntN(2) == 0 { // and there is a probe again
				q := &breakpoint.Probe{Addr: addr, Post: count(new(int))}
				require.NoError(t, e.Register(q))
			}
			require.NoError(t, stop())
		case 1:
			require.NoError(t, stop())
		}
		require.NoError(t, e.Close())
		require.NoError(t, vm.Close())
		require.Less(t, time.Since(begin), 3*time.Second)
		for _, c := range cpus {
			c.Wait()
		}
		require.Equal(t, "running", guest.Status())
		if p.Post != nil {
			require.LessOrEqual(t, posts, pres)
			require.LessOrEqual(t, pres-posts, 4, "two of each vCPU under way")
		}
	}
}
