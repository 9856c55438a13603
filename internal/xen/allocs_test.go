package xen_test

import (
	"context"
	"runtime"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/xen"
	"github.com/vmprobes/vmprobes/internal/xentest"
	"github.com/vmprobes/vmprobes/xenctrl"
)

// TestHitAllocates: a hit makes nothing for the garbage collector, on either route
// and in each way past the instruction that needs no single step. Hits are real ones
// of the simulated guest, seen once and then repeated without it, as it allocates
// itself.
func TestHitAllocates(t *testing.T) {
	if raceDetector {
		t.Skip("it allocates itself, and makes sync.Pool forget")
	}
	for _, c := range []struct {
		name   string
		cfg    xentest.Config
		method breakpoint.Method
		insn   string
		post   bool
	}{
		{"pv/nop", xentest.Config{Kind: xentest.PV, GDBSX: true}, breakpoint.Auto, "\x0f\x1f\x44\x00\x00", false},
		{"pv/push", xentest.Config{Kind: xentest.PV, GDBSX: true, AVX: true}, breakpoint.Auto, "\x55", true},
		{"pv/out-of-line", xentest.Config{Kind: xentest.PV, GDBSX: true, AVX: true}, breakpoint.OutOfLine, "\x55", true},
		{"hvm/nop", xentest.Config{Kind: xentest.HVM}, breakpoint.Auto, "\x0f\x1f\x44\x00\x00", false},
		{"hvm/push", xentest.Config{Kind: xentest.HVM}, breakpoint.Auto, "\x55", true},
		{"hvm/out-of-line", xentest.Config{Kind: xentest.HVM}, breakpoint.OutOfLine, "\x55", true},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.cfg.IRQEvery = -1
			m := xentest.New(c.cfg)
			m.Start()
			defer m.Stop()
			x := &again{Hypervisor: m.Hypervisor()}
			drv, err := m.Attach(x)
			require.NoError(t, err)
			e := breakpoint.New(drv, breakpoint.Config{Method: c.method, MayFault: func(uint64) bool { return false },
				Scratch: func(_ uint64, try func(addr, size uint64) bool) {
					for _, g := range m.Gaps() {
						if try(g.VA+16, g.Size-16) {
							return
						}
					}
				}})
			defer func() {
				x.mode = passing
				require.NoError(t, e.Close())
			}()
			const warm, hits = 200, 5000
			var before, after runtime.MemStats
			n := 0
			p := &breakpoint.Probe{Pre: func(ctx *breakpoint.Context) breakpoint.Verdict {
				n++
				switch n {
				case 2:
					x.mode, x.out = repeating, true
				case warm:
					runtime.ReadMemStats(&before)
				case warm + hits:
					runtime.ReadMemStats(&after)
					x.mode = passing
					return 1
				}
				return breakpoint.Continue
			}}
			if c.post {
				p.Post = func(*breakpoint.Context) breakpoint.Verdict { return breakpoint.Continue }
			}
			for _, in := range m.Insns() {
				if string(in.Bytes) == c.insn {
					p.Addr = in.VA
					break
				}
			}
			require.NotZero(t, p.Addr)
			x.addr = p.Addr
			x.length = uint64(len(c.insn))
			require.NoError(t, e.Register(p))
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			_, err = e.Serve(ctx, true)
			require.NoError(t, err)
			require.Equal(t, warm+hits, n)
			// What is made at every hit makes this 1 or more. The runtime and the page cache
			// allocate a little from time to time.
			require.Less(t, float64(after.Mallocs-before.Mallocs)/hits, 0.5, "allocations a hit")
			t.Logf("%d allocations in %d hits", after.Mallocs-before.Mallocs, hits)
		})
	}
}

const (
	passing   = iota // calls reach the simulated Xen; stops are seen
	repeating        // the stop that was seen last comes again and again, and no answer gets through
)

// again is a Hypervisor whose guest's hits can be made to repeat. All calls come
// from the goroutine in Serve.
type again struct {
	xen.Hypervisor
	mode   int
	out    bool   // a stop waits for its answer (PV)
	addr   uint64 // of the probe
	length uint64 // of its instruction

	ctx   xenctrl.VCPUContext // at the hit (PV)
	ext   xenctrl.ExtState
	vcpu  int
	event xenctrl.Event // of the hit (HVM)
	slot  uint64        // where the answer sent the vCPU, 0 if not to a slot
}

// went notes where an answer sends the vCPU.
func (x *again) went(ip uint64) {
	x.slot = 0
	if ip != x.addr && ip != x.addr+x.length {
		x.slot = ip
	}
}

// at is where the next stop is: RIP of the int3.
func (x *again) at() uint64 {
	if x.slot != 0 {
		return x.slot + x.length
	}
	return x.addr
}

func (x *again) GdbsxDomStatus() (xenctrl.DomStatus, error) {
	if x.mode == passing {
		s, err := x.Hypervisor.GdbsxDomStatus()
		if s.VCPU >= 0 {
			x.vcpu = s.VCPU
		}
		return s, err
	}
	if x.out { // somebody asks while the handler runs, which took long
		return xenctrl.DomStatus{Paused: true, VCPU: -1}, nil
	}
	x.out = true
	return xenctrl.DomStatus{Paused: true, VCPU: x.vcpu, Event: xenctrl.DomStatusBreakpoint}, nil
}

func (x *again) VCPUContext(v int, c *xenctrl.VCPUContext) error {
	if x.mode == passing {
		err := x.Hypervisor.VCPUContext(v, c)
		if c.User.RIP == x.addr+1 {
			x.ctx = *c
		}
		return err
	}
	*c = x.ctx
	c.User.RIP = x.at() + 1
	return nil
}

func (x *again) VCPUExtState(v int) (xenctrl.ExtState, error) {
	if x.mode == passing {
		var err error
		x.ext, err = x.Hypervisor.VCPUExtState(v)
		return x.ext, err
	}
	return x.ext, nil
}

func (x *again) SetVCPUContext(v int, c *xenctrl.VCPUContext) error {
	if x.mode == passing {
		return x.Hypervisor.SetVCPUContext(v, c)
	}
	x.went(c.User.RIP)
	return nil
}

func (x *again) SetVCPUExtState(v int, s xenctrl.ExtState) error {
	if x.mode == passing {
		return x.Hypervisor.SetVCPUExtState(v, s)
	}
	return nil
}

// Unpause at the end of repeating is that of the last stop, whose vCPU has been
// stopped all the while.
func (x *again) Unpause() error {
	if x.mode == passing {
		return x.Hypervisor.Unpause()
	}
	x.out = false
	return nil
}

func (x *again) OpenMonitor() (xen.Monitor, error) {
	m, err := x.Hypervisor.OpenMonitor()
	return &againMonitor{m, x}, err
}

type againMonitor struct {
	xen.Monitor
	x *again
}

func (m *againMonitor) Wait(ctx context.Context) error {
	if m.x.mode == passing {
		return m.Monitor.Wait(ctx)
	}
	return nil
}

func (m *againMonitor) Next(e *xenctrl.Event) (bool, error) {
	x := m.x
	if x.mode == passing {
		ok, err := m.Monitor.Next(e)
		if ok && e.Regs.RIP == x.addr {
			x.event = *e
		}
		return ok, err
	}
	*e = x.event
	e.Regs.RIP = x.at()
	return true, nil
}

func (m *againMonitor) Respond(e *xenctrl.Event) error {
	if m.x.mode == passing {
		return m.Monitor.Respond(e)
	}
	if e.Flags&xenctrl.EventSetRegisters != 0 {
		m.x.went(e.Regs.RIP)
	}
	return nil
}

func (m *againMonitor) Notify() error {
	if m.x.mode == passing {
		return m.Monitor.Notify()
	}
	return nil
}
