package xen_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/xen"
	"github.com/vmprobes/vmprobes/internal/xentest"
	"github.com/vmprobes/vmprobes/xenctrl"
)

// BenchmarkHit counts what a hit costs in calls of the hypervisor, by route and
// by the way its instruction is executed, on the simulated Xen. The numbers of
// calls are what counts; the time is the simulation's.
func BenchmarkHit(b *testing.B) {
	for _, h := range []struct {
		name string
		cfg  xentest.Config
	}{
		{"pv", xentest.Config{Kind: xentest.PV, GDBSX: true, IRQEvery: -1}},
		{"pv-avx", xentest.Config{Kind: xentest.PV, GDBSX: true, AVX: true, IRQEvery: -1}},
		{"hvm", xentest.Config{Kind: xentest.HVM, IRQEvery: -1}},
	} {
		for _, c := range []struct {
			name   string
			method breakpoint.Method
			insn   string
		}{
			{"nop", breakpoint.Auto, "\x0f\x1f\x44\x00\x00"},
			{"emulated", breakpoint.Auto, "\x55"},
			{"out-of-line", breakpoint.OutOfLine, "\x55"},
			{"in-place", breakpoint.InPlace, "\x55"},
		} {
			b.Run(fmt.Sprintf("%s/%s", h.name, c.name), func(b *testing.B) { benchmarkHit(b, h.cfg, c.method, c.insn) })
		}
	}
}

// counter counts calls, but not polls that found nothing, nor the mapping of
// pages once a second.
type counter struct {
	xen.Hypervisor
	n int
}

func (c *counter) Pause() error   { c.n++; return c.Hypervisor.Pause() }
func (c *counter) Unpause() error { c.n++; return c.Hypervisor.Unpause() }

func (c *counter) VCPUContext(v int, x *xenctrl.VCPUContext) error {
	c.n++
	return c.Hypervisor.VCPUContext(v, x)
}

func (c *counter) SetVCPUContext(v int, x *xenctrl.VCPUContext) error {
	c.n++
	return c.Hypervisor.SetVCPUContext(v, x)
}

func (c *counter) VCPUExtState(v int) (xenctrl.ExtState, error) {
	c.n++
	return c.Hypervisor.VCPUExtState(v)
}

func (c *counter) SetVCPUExtState(v int, s xenctrl.ExtState) error {
	c.n++
	return c.Hypervisor.SetVCPUExtState(v, s)
}

func (c *counter) HVMCPU(v int) (xenctrl.HVMCPU, error) { c.n++; return c.Hypervisor.HVMCPU(v) }

func (c *counter) GdbsxDomStatus() (xenctrl.DomStatus, error) {
	s, err := c.Hypervisor.GdbsxDomStatus()
	if s.Paused {
		c.n++
	}
	return s, err
}

func (c *counter) GdbsxPauseVCPU(v int) error   { c.n++; return c.Hypervisor.GdbsxPauseVCPU(v) }
func (c *counter) GdbsxUnpauseVCPU(v int) error { c.n++; return c.Hypervisor.GdbsxUnpauseVCPU(v) }

func (c *counter) InjectEvent(vcpu int, vector, eventType uint8, errorCode, insnLen uint32, cr2 uint64) error {
	c.n++
	return c.Hypervisor.InjectEvent(vcpu, vector, eventType, errorCode, insnLen, cr2)
}

func (c *counter) OpenMonitor() (xen.Monitor, error) {
	m, err := c.Hypervisor.OpenMonitor()
	return &countedMonitor{m, c}, err
}

type countedMonitor struct {
	xen.Monitor
	c *counter
}

func (m *countedMonitor) Notify() error { m.c.n++; return m.Monitor.Notify() }

func benchmarkHit(b *testing.B, cfg xentest.Config, method breakpoint.Method, insn string) {
	m := xentest.New(cfg)
	m.Start()
	defer m.Stop()
	c := &counter{Hypervisor: m.Hypervisor()}
	drv, err := m.Attach(c)
	if err != nil {
		b.Fatal(err)
	}
	e := breakpoint.New(drv, breakpoint.Config{Scratch: m.Scratch, MayFault: xentest.NoFaults, Method: method})
	defer e.Close()

	// The guest has breakpoints of its own in its loop; what one costs is known first.
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	before := c.n
	e.Serve(ctx, true)
	cancel()
	own := float64(c.n-before) / float64(e.Stats().Reinjected)

	n := 0
	p := &breakpoint.Probe{Pre: func(*breakpoint.Context) breakpoint.Verdict {
		if n++; n >= b.N {
			return 1
		}
		return breakpoint.Continue
	}}
	for _, in := range m.Insns() {
		if string(in.Bytes) == insn {
			p.Addr = in.VA
			break
		}
	}
	if p.Addr == 0 {
		b.Fatalf("the guest has no % x", insn)
	}
	if err := e.Register(p); err != nil {
		b.Fatal(err)
	}
	reinjected := e.Stats().Reinjected
	before = c.n
	b.ResetTimer()
	if _, err := e.Serve(context.Background(), true); err != nil {
		b.Fatal(err)
	}
	b.StopTimer()
	calls := float64(c.n-before) - own*float64(e.Stats().Reinjected-reinjected)
	b.ReportMetric(calls/float64(b.N), "hypercalls/hit")
}

// BenchmarkReturn counts what a call costs in calls of the hypervisor that a return probe
// follows, to its return address and to its exits. The breakpoint at the return address is there
// already, but for the first call from each place.
func BenchmarkReturn(b *testing.B) {
	for _, h := range []struct {
		name string
		cfg  xentest.Config
	}{
		{"pv", xentest.Config{Kind: xentest.PV, GDBSX: true, IRQEvery: -1, Returns: true}},
		{"hvm", xentest.Config{Kind: xentest.HVM, IRQEvery: -1, Returns: true}},
	} {
		for name, how := range map[string]breakpoint.Follow{"at-return": breakpoint.AtReturn, "at-exits": breakpoint.AtExits} {
			b.Run(h.name+"/"+name, func(b *testing.B) { benchmarkReturn(b, h.cfg, how) })
		}
	}
}

func benchmarkReturn(b *testing.B, cfg xentest.Config, how breakpoint.Follow) {
	m := xentest.New(cfg)
	m.Start()
	defer m.Stop()
	c := &counter{Hypervisor: m.Hypervisor()}
	drv, err := m.Attach(c)
	if err != nil {
		b.Fatal(err)
	}
	e := breakpoint.New(drv, breakpoint.Config{Scratch: m.Scratch, MayFault: xentest.NoFaults})
	defer e.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	before := c.n
	e.Serve(ctx, true)
	cancel()
	own := float64(c.n-before) / float64(e.Stats().Reinjected)

	f := m.Function("tail_b")
	exits, _ := m.Exits("tail_b")
	p := &breakpoint.Probe{Addr: f.Entry, Ret: &breakpoint.Returns{Follow: how, Exits: exits}}
	n := 0
	p.Ret.Return = func(*breakpoint.Context) breakpoint.Verdict {
		if n++; n >= b.N {
			return 1
		}
		return breakpoint.Continue
	}
	if err := e.Register(p); err != nil {
		b.Fatal(err)
	}
	start := e.Stats()
	before = c.n
	b.ResetTimer()
	if _, err := e.Serve(context.Background(), true); err != nil {
		b.Fatal(err)
	}
	b.StopTimer()
	end := e.Stats()
	calls := float64(c.n-before) - own*float64(end.Reinjected-start.Reinjected)
	b.ReportMetric(calls/float64(b.N), "hypercalls/call")
	b.ReportMetric(float64(end.Hits-start.Hits)/float64(b.N), "stops/call")
	b.ReportMetric(float64(e.Counts(p).Foreign)/float64(b.N), "foreign/call")
}
