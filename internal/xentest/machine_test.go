package xentest

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/arch/x86/x86asm"

	"github.com/vmprobes/vmprobes/internal/xen"
	"github.com/vmprobes/vmprobes/xenctrl"
)

func configs() []Config {
	var r []Config
	for _, k := range []Kind{PV, HVM} {
		for _, n := range []int{1, 3} {
			r = append(r, Config{Kind: k, VCPUs: n, GDBSX: true, MTF: true, AVX: n > 1, Seed: uint64(n)})
		}
	}
	return r
}

func (c Config) name() string { return fmt.Sprintf("kind%d-%dvcpu-avx%v", c.Kind, c.VCPUs, c.AVX) }

func TestAlone(t *testing.T) {
	for _, cfg := range configs() {
		t.Run(cfg.name(), func(t *testing.T) {
			m := New(cfg)
			text := m.Text()
			n := 150_000
			if testing.Short() {
				n = 50_000
			}
			if got := m.Run(n); got != n {
				t.Errorf("ran %d instructions", got)
			}
			Verify(t, m, text)
			t.Log(m.prog, m.Counter(0), m.Executed(m.Symbol("event_entry")))
		})
	}
}

// The page tables must say what the interpreter goes by.
func TestPageTables(t *testing.T) {
	for _, cfg := range configs() {
		m := New(cfg)
		for i := range m.v {
			for _, va := range []uint64{TextBase, TextBase + 0x5123, DataBase + 0x10, percpuBase + 0x123, StackBase + 0x1ff8,
				DirectBase + 0x345678 - 0x100000, DirectBase + 0x1000} {
				w, ok := m.mem.walk(m.roots[i], va)
				o, _, ok2 := m.mem.translate(va, false)
				if !ok || !ok2 || w != o {
					t.Errorf("%s: %#x: walk %#x %v, translate %#x %v", cfg.name(), va, w, ok, o, ok2)
				}
			}
			for _, va := range []uint64{0, StackBase + 0x3000, TextBase - 0x200000, DataBase + 0x8000} {
				if _, ok := m.mem.walk(m.roots[i], va); ok {
					t.Errorf("%#x is mapped", va)
				}
			}
		}
	}
}

func TestListing(t *testing.T) {
	for _, cfg := range configs() {
		m := New(cfg)
		for _, in := range m.Insns() {
			if in.Bytes[0] == 0xc5 || string(in.Bytes) == "\xf3\x0f\x1e\xfa" {
				continue // x86asm does not know them
			}
			d, err := x86asm.Decode(in.Bytes, 64)
			if err != nil || d.Len != len(in.Bytes) {
				t.Errorf("%#x in %s: % x: length %d, %v", in.VA, in.Func, in.Bytes, d.Len, err)
			}
		}
	}
}

// tool is the least of a debugger: it plants int3 in the text.
type tool struct {
	t    *testing.T
	m    *Machine
	h    xen.Hypervisor
	text xen.Mapping
	orig []byte
	hits map[uint64]int
}

func newTool(t *testing.T, m *Machine) *tool {
	h := m.Hypervisor()
	var frames []uint64
	for va := uint64(TextBase); va < TextBase+textSize; va += pageSize {
		off, _ := m.mem.walk(m.roots[0], va)
		f := off / pageSize
		if m.pv() {
			f += frameBase
		}
		frames = append(frames, f)
	}
	mp, err := h.MapFrames(true, frames...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = mp.Unmap() })
	return &tool{t, m, h, mp, append([]byte(nil), mp.Bytes()...), map[uint64]int{}}
}

func (d *tool) arm(va uint64, b ...byte) { copy(d.text.Bytes()[va-TextBase:], b) }

func (d *tool) disarm(va uint64, n int) {
	o := va - TextBase
	copy(d.text.Bytes()[o:o+uint64(n)], d.orig[o:])
}

func (d *tool) ok(err error) {
	d.t.Helper()
	if err != nil {
		d.t.Fatalf("%v (oops %q, %s)", err, d.m.Oops(), d.m.State())
	}
}

func isErr(t *testing.T, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("error %v, want %v", err, want)
	}
}

// pvLoop answers breakpoints until f is done.
func (d *tool) pvLoop(until func() bool, f func(vcpu int, c *xenctrl.VCPUContext) (set bool)) {
	for !until() && d.m.Oops() == "" {
		s, err := d.h.GdbsxDomStatus()
		d.ok(err)
		if s.VCPU < 0 {
			continue
		}
		if s.Event != xenctrl.DomStatusBreakpoint {
			d.t.Fatalf("event %d", s.Event)
		}
		var c xenctrl.VCPUContext
		d.ok(d.h.VCPUContext(s.VCPU, &c))
		d.hits[c.User.RIP-1]++
		if f(s.VCPU, &c) {
			x, err := d.h.VCPUExtState(s.VCPU)
			d.ok(err)
			d.ok(d.h.SetVCPUContext(s.VCPU, &c))
			d.ok(d.h.SetVCPUExtState(s.VCPU, x))
		}
		d.ok(d.h.Unpause())
	}
}

// bounce enters the guest's int3 handler.
func (d *tool) bounce(vcpu int, c *xenctrl.VCPUContext) {
	m, u := d.m, &c.User
	mask := m.upcallMask(m.v[vcpu])
	sp := u.RSP &^ 15
	fl := u.RFLAGS &^ (flIF | flIOPL)
	if *mask == 0 {
		fl |= flIF
	}
	for _, w := range []uint64{pvSS, u.RSP, fl, pvCS&^3 | uint64(*mask)<<32, u.RIP, u.R11, u.RCX} {
		sp -= 8
		m.write64(sp, w)
	}
	*mask = 1
	u.RSP, u.RIP = sp, c.Traps[3].Address
	u.RFLAGS &^= flAC | flVM | flRF | flNT | flTF
}

func TestPVTool(t *testing.T) {
	for _, started := range []bool{false, true} {
		for _, vcpus := range []int{1, 2, 4} {
			t.Run(fmt.Sprintf("started=%v/%d", started, vcpus), func(t *testing.T) {
				m := New(Config{VCPUs: vcpus, GDBSX: true, AVX: true, Seed: 7, Quantum: 40, IRQEvery: 100})
				before := m.Text()
				d := newTool(t, m)
				nop, push, own := m.Symbol("nop5"), m.Symbol("push_rbp"), m.OwnBreakpoints()[0]
				if started {
					m.Start()
					defer m.Stop()
				}
				ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
				defer cancel()
				d.ok(m.Quiesce(ctx))
				d.ok(d.h.Pause())
				d.ok(d.h.SetDebugging(true))
				n0, p0, o0 := m.Executed(nop), m.Executed(push), m.Executed(own)
				d.arm(nop, 0xcc, 0x0f, 0x1f, 0x40, 0x00)
				d.arm(push, 0xcc)
				d.ok(d.h.Unpause())
				m.Release()
				until := func() bool { return d.hits[nop] >= 25*vcpus }
				handle := func(vcpu int, c *xenctrl.VCPUContext) bool {
					switch c.User.RIP - 1 {
					case nop:
						return false
					case push:
						c.User.RSP -= 8
						m.mu.Lock()
						m.write64(c.User.RSP, c.User.RBP)
						m.mu.Unlock()
						return true
					case own:
						m.mu.Lock()
						d.bounce(vcpu, c)
						m.mu.Unlock()
						return true
					}
					t.Errorf("hit at %#x", c.User.RIP-1)
					return false
				}
				d.pvLoop(until, handle)
				m.Park()
				d.pvLoop(m.Parked, handle)
				if s, _ := d.h.GdbsxDomStatus(); s.VCPU != -1 || s.Paused {
					t.Errorf("status %+v", s)
				}
				for _, c := range []struct {
					va uint64
					n0 uint64
				}{{nop, n0}, {push, p0}, {own, o0}} {
					if got, want := d.hits[c.va], int(m.Executed(c.va)-c.n0); got != want {
						t.Errorf("%#x: %d hits, executed %d times", c.va, got, want)
					}
				}
				d.ok(d.h.Pause())
				d.disarm(nop, 5)
				d.disarm(push, 1)
				d.ok(d.h.SetDebugging(false))
				d.ok(d.h.Unpause())
				m.Release()
				Verify(t, m, before)
			})
		}
	}
}

// TestHeldStays: a vCPU that was held when another one stopped the domain doesn't run on
// when it is let go: it was out of the guest already (vcpu_wake, xen/common/sched/core.c).
func TestHeldStays(t *testing.T) {
	for seed := range uint64(20) {
		m := New(Config{VCPUs: 2, GDBSX: true, AVX: true, Seed: seed + 1})
		d := newTool(t, m)
		d.ok(d.h.Pause())
		d.ok(d.h.SetDebugging(true))
		d.ok(d.h.GdbsxPauseVCPU(1))
		d.arm(m.Symbol("nop5"), 0xcc)
		d.ok(d.h.Unpause())
		stopped := -1
		for i := 0; i < 10000 && stopped < 0; i++ {
			m.Run(100)
			s, err := d.h.GdbsxDomStatus()
			d.ok(err)
			stopped = s.VCPU
		}
		if stopped != 0 {
			t.Fatalf("vCPU %d stopped", stopped)
		}
		at := m.v[1].rip
		d.ok(d.h.GdbsxUnpauseVCPU(1))
		m.Run(100)
		if m.v[1].rip != at {
			t.Errorf("seed %d: vCPU 1 ran from %#x to %#x in a paused domain", seed, at, m.v[1].rip)
		}
	}
}

func TestPVStep(t *testing.T) {
	m := New(Config{VCPUs: 2, GDBSX: true, Seed: 3, IRQEvery: -1})
	before := m.Text()
	d := newTool(t, m)
	isErr(t, d.h.Unpause(), syscall.EINVAL)
	isErr(t, d.h.GdbsxPauseVCPU(0), xenctrl.ErrBusy)
	isErr(t, d.h.GdbsxPauseVCPU(9), syscall.EINVAL)
	va := m.Symbol("sub_rsp")
	d.ok(d.h.Pause())
	if s, err := d.h.GdbsxDomStatus(); err != nil || s != (xenctrl.DomStatus{Paused: true, VCPU: -1}) {
		t.Errorf("status %+v, %v", s, err)
	}
	d.ok(d.h.SetDebugging(true))
	d.arm(va, 0xcc)
	d.ok(d.h.GdbsxPauseVCPU(1))
	d.ok(d.h.Unpause())
	if n := m.RunVCPU(1, 100); n != 0 {
		t.Error("a held vCPU runs")
	}
	m.RunVCPU(0, 5000)
	isErr(t, d.h.SetVCPUContext(0, &xenctrl.VCPUContext{}), xenctrl.ErrNotSupported) // cr3
	var c xenctrl.VCPUContext
	d.ok(d.h.VCPUContext(0, &c))
	if c.User.RIP != va+1 || m.Pauses() != 1 {
		t.Fatalf("at %#x, %s", c.User.RIP, m.State())
	}
	s, err := d.h.GdbsxDomStatus()
	d.ok(err)
	if s.VCPU != 0 || s.Event != 3 || !s.Paused {
		t.Errorf("status %+v", s)
	}
	if s, _ := d.h.GdbsxDomStatus(); s.VCPU != -1 {
		t.Errorf("again: %+v", s)
	}
	d.disarm(va, 1)
	c.User.RIP = va
	c.User.RFLAGS |= flTF
	for _, dr := range []int{6, 7} {
		wide := c
		wide.DebugReg[dr] |= 1 << 32
		isErr(t, d.h.SetVCPUContext(0, &wide), syscall.EINVAL)
	}
	d.ok(d.h.SetVCPUContext(0, &c))
	d.ok(d.h.Unpause())
	if n := m.Run(100); n != 1 {
		t.Errorf("%d instructions in a step", n)
	}
	d.ok(d.h.VCPUContext(0, &c))
	if c.User.RIP != va+4 || c.User.RFLAGS&flTF == 0 || c.DebugReg[6]&(1<<14) == 0 || m.Pauses() != 1 {
		t.Errorf("after the step: at %#x flags %#x dr6 %#x", c.User.RIP, c.User.RFLAGS, c.DebugReg[6])
	}
	if s, _ := d.h.GdbsxDomStatus(); s.VCPU != -1 {
		t.Errorf("a step leaves %+v", s)
	}
	c.User.RFLAGS &^= flTF
	d.ok(d.h.SetVCPUContext(0, &c))
	d.ok(d.h.GdbsxUnpauseVCPU(1))
	isErr(t, d.h.GdbsxUnpauseVCPU(1), syscall.EINVAL)
	for range maxPauses - 1 {
		d.ok(d.h.Pause())
	}
	isErr(t, d.h.Pause(), syscall.EUSERS)
	if len(m.Stuck()) != 2 {
		t.Error(m.Stuck())
	}
	for range maxPauses {
		d.ok(d.h.Unpause())
	}
	d.ok(d.h.SetDebugging(false))
	Verify(t, m, before)
}

func TestOops(t *testing.T) {
	cases := []struct {
		name string
		cfg  Config
		do   func(m *Machine, d *tool)
		want string
	}{
		{"int3 to guest", Config{}, func(m *Machine, d *tool) { d.arm(m.Symbol("nop5"), 0xcc) }, "int3 delivered"},
		{"int3 to hvm guest", Config{Kind: HVM}, func(m *Machine, d *tool) { d.arm(m.Symbol("nop5"), 0xcc) }, "int3 delivered"},
		{"swallowed", Config{}, func(m *Machine, d *tool) {
			_, err := d.h.GdbsxDomStatus()
			isErr(t, err, xenctrl.ErrNotSupported)
			d.ok(d.h.SetDebugging(true))
			d.arm(m.Symbol("push_r12"), 0xcc)
		}, "in the middle"},
		{"avx", Config{AVX: true}, func(m *Machine, d *tool) {
			var c xenctrl.VCPUContext
			d.ok(d.h.VCPUContext(0, &c))
			d.ok(d.h.SetVCPUContext(0, &c))
		}, "extended state lost"},
		{"register", Config{}, func(m *Machine, d *tool) {
			m.RunVCPU(0, 40)
			var c xenctrl.VCPUContext
			d.ok(d.h.VCPUContext(0, &c))
			c.User.R14++
			d.ok(d.h.SetVCPUContext(0, &c))
		}, "invalid opcode"},
		{"tf", Config{GDBSX: true}, func(m *Machine, d *tool) {
			var c xenctrl.VCPUContext
			d.ok(d.h.VCPUContext(0, &c))
			c.User.RFLAGS |= flTF
			d.ok(d.h.SetVCPUContext(0, &c))
		}, "TF"},
		{"skipped own int3", Config{GDBSX: true, IRQEvery: -1}, func(m *Machine, d *tool) {
			d.ok(d.h.SetDebugging(true))
			m.Run(5000)
			if m.Pauses() != 1 {
				t.Error(m.State())
			}
			d.ok(d.h.Unpause())
			d.ok(d.h.SetDebugging(false))
			d.ok(m.Quiesce(t.Context()))
			if err := m.Check(); err == nil || !strings.Contains(err.Error(), "int3_entry") {
				t.Error(err)
			}
			m.fail(m.v[0], "done")
		}, "done"},
	}
	for _, c := range cases {
		m := New(c.cfg)
		d := newTool(t, m)
		c.do(m, d)
		m.Run(20000)
		if s := m.Oops(); !strings.Contains(s, c.want) {
			t.Errorf("%s: oops %q", c.name, s)
		}
		if len(m.Stuck()) == 0 {
			t.Errorf("%s: not stuck", c.name)
		}
	}
}

func TestFailures(t *testing.T) {
	m := New(Config{VCPUs: 2, GDBSX: true})
	h := m.Hypervisor()
	m.FailCall(2, syscall.EAGAIN)
	m.FailCall(3, syscall.ENOMEM)
	if err := h.Pause(); err != nil {
		t.Error(err)
	}
	isErr(t, h.Pause(), syscall.EAGAIN)
	isErr(t, h.Unpause(), syscall.ENOMEM)
	if m.Pauses() != 1 || m.Calls() != 3 || len(m.CallLog()) != 3 {
		t.Error(m.Pauses(), m.CallLog())
	}
	if _, err := h.MapFrames(false, 3); !errors.Is(err, syscall.EINVAL) {
		t.Error(err)
	}
	if _, err := h.OpenMonitor(); !errors.Is(err, xenctrl.ErrNotSupported) {
		t.Error(err)
	}
	m.Kill()
	if i, err := h.Info(); err != nil || !i.Gone() {
		t.Error(i, err)
	}
	_, err := h.Info()
	isErr(t, err, xenctrl.ErrNoDomain)
	isErr(t, h.Unpause(), xenctrl.ErrNoDomain)
	if m.Run(10) != 0 {
		t.Error("a dead domain runs")
	}
}

// hvmLoop answers events until f is done.
func (d *tool) hvmLoop(mon xen.Monitor, until func() bool, f func(e *xenctrl.Event)) {
	for !until() && d.m.Oops() == "" {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Millisecond)
		err := mon.Wait(ctx)
		cancel()
		if err != nil && !errors.Is(err, context.DeadlineExceeded) {
			d.t.Fatal(err)
		}
		n := 0
		for {
			var e xenctrl.Event
			ok, err := mon.Next(&e)
			d.ok(err)
			if !ok {
				break
			}
			f(&e)
			d.ok(mon.Respond(&e))
			n++
		}
		if n > 0 {
			d.ok(mon.Notify())
		}
	}
}

func TestHVMTool(t *testing.T) {
	for _, started := range []bool{false, true} {
		for _, cfg := range []Config{{VCPUs: 1}, {VCPUs: 2, MTF: true}, {VCPUs: 3}, {VCPUs: 10}} {
			t.Run(fmt.Sprintf("started=%v/%d", started, cfg.VCPUs), func(t *testing.T) {
				cfg.Kind, cfg.AVX, cfg.Seed, cfg.IRQEvery = HVM, true, 9, 100
				m := New(cfg)
				before := m.Text()
				d := newTool(t, m)
				sub, leaf, own := m.Symbol("sub_rsp"), m.Symbol("leaf"), m.OwnBreakpoints()[0]
				ring, emul := m.Symbol("mov_riprel"), m.Symbol("rep_stosb")
				if started {
					m.Start()
					defer m.Stop()
				}
				d.ok(m.Quiesce(t.Context()))
				mon, err := d.h.OpenMonitor()
				d.ok(err)
				_, err = d.h.OpenMonitor()
				isErr(t, err, xenctrl.ErrBusy)
				d.ok(mon.SetSoftwareBreakpoint(true))
				d.ok(mon.SetDebugExceptions(true, true))
				if cfg.MTF {
					d.ok(mon.SetSingleStep(true))
				} else {
					isErr(t, mon.SetSingleStep(true), xenctrl.ErrNotSupported)
				}
				start := map[uint64]uint64{}
				probes := []uint64{sub, ring, emul}
				if cfg.VCPUs == 1 {
					probes = append(probes, leaf) // stepped in place
				}
				for _, va := range append(probes, own) {
					start[va] = m.Executed(va)
				}
				for _, va := range probes {
					d.arm(va, 0xcc)
				}
				m.Release()
				lens := map[uint64]int{}
				for _, in := range m.Insns() {
					lens[in.VA] = len(in.Bytes)
				}
				handle := func(e *xenctrl.Event) {
					if e.Flags != xenctrl.EventVCPUPaused {
						t.Errorf("flags %#x", e.Flags)
					}
					switch {
					case e.Reason == xenctrl.ReasonDebugException:
						d.arm(leaf, 0xcc)
						e.Regs.RFLAGS &^= flTF
						e.Flags |= xenctrl.EventSetRegisters
						return
					case e.Reason != xenctrl.ReasonSoftwareBreakpoint:
						t.Errorf("reason %d", e.Reason)
						return
					}
					switch va := e.Regs.RIP; va {
					case sub:
						d.hits[va]++
						a := e.Regs.RSP
						e.Regs.RSP -= 0x18
						x := insn{m: m, v: &vcpu{}}
						res, _ := x.alu(5, a, 0x18, 8)
						e.Regs.RFLAGS = e.Regs.RFLAGS&^flArith | x.v.flags
						e.Regs.RIP += uint64(lens[va])
						_ = res
						e.Flags |= xenctrl.EventSetRegisters
					case ring, emul:
						d.hits[va]++
						copy(e.InsnData[:], d.orig[va-TextBase:])
						e.Flags |= xenctrl.EventEmulate | xenctrl.EventSetEmulInsnData
					case leaf:
						d.hits[va]++
						d.disarm(leaf, 1)
						e.Regs.RFLAGS |= flTF
						e.Flags |= xenctrl.EventSetRegisters
					case own:
						d.hits[va]++
						d.ok(d.h.InjectEvent(e.VCPU, 3, e.Type, 0, e.InsnLen, 0))
						isErr(t, d.h.InjectEvent(e.VCPU, 3, e.Type, 0, e.InsnLen, 0), xenctrl.ErrBusy)
					default:
						t.Errorf("hit at %#x", va)
					}
				}
				d.hvmLoop(mon, func() bool { return d.hits[sub] > 60 }, handle)
				m.Park()
				d.hvmLoop(mon, m.Parked, handle)
				if m.Oops() != "" {
					t.Fatal(m.Oops())
				}
				for va, n := range start {
					if va == leaf {
						continue
					}
					if got, want := d.hits[va], int(m.Executed(va)-n); got != want {
						t.Errorf("%#x: %d hits, executed %d times", va, got, want)
					}
				}
				for _, va := range probes {
					d.disarm(va, 1)
				}
				d.ok(mon.SetSoftwareBreakpoint(false))
				d.ok(mon.Close())
				isErr(t, mon.Notify(), xenctrl.ErrClosed)
				m.Release()
				Verify(t, m, before)
			})
		}
	}
}

func TestMonitorTrapFlag(t *testing.T) {
	m := New(Config{Kind: HVM, MTF: true, IRQEvery: 5})
	d := newTool(t, m)
	before := m.Text()
	mon, err := d.h.OpenMonitor()
	d.ok(err)
	d.ok(mon.SetSoftwareBreakpoint(true))
	d.ok(mon.SetSingleStep(true))
	isErr(t, mon.SetSingleStep(true), syscall.EEXIST)
	va := m.Symbol("sub_rsp")
	d.arm(va, 0xcc)
	next := func() (e xenctrl.Event) {
		t.Helper()
		for {
			d.ok(mon.Wait(t.Context()))
			ok, err := mon.Next(&e)
			d.ok(err)
			if ok && e.Regs.RIP-TextBase < textSize && e.Regs.RIP != m.OwnBreakpoints()[0] {
				return e
			}
			if ok {
				d.ok(d.h.InjectEvent(0, 3, 6, 0, 1, 0))
				d.ok(mon.Respond(&e))
				d.ok(mon.Notify())
			}
		}
	}
	for range 100 {
		e := next()
		if e.Regs.RIP != va || len(m.Stuck()) != 1 {
			t.Fatalf("at %#x, %s", e.Regs.RIP, m.State())
		}
		d.ok(mon.Respond(&e)) // nothing: hits again
		d.ok(mon.Notify())
		e = next()
		if e.Regs.RIP != va {
			t.Fatalf("then at %#x", e.Regs.RIP)
		}
		d.disarm(va, 1)
		e.Flags |= xenctrl.EventToggleSingleStep
		d.ok(mon.Respond(&e))
		d.ok(mon.Notify())
		e = next()
		if e.Reason != xenctrl.ReasonSingleStep || e.Regs.RIP != va+4 {
			t.Fatalf("after the step: %+v", e)
		}
		d.arm(va, 0xcc)
		e.Flags |= xenctrl.EventToggleSingleStep
		d.ok(mon.Respond(&e))
		d.ok(mon.Notify())
	}
	_ = next()
	d.disarm(va, 1)
	d.ok(mon.Close())
	if len(m.Stuck()) != 1 {
		t.Error("a closed monitor released the vCPU")
	}
	if string(m.Text()) != string(before) {
		t.Error("text differs")
	}
	m.Kill()
}

func TestDeterministic(t *testing.T) {
	run := func() string {
		m := New(Config{VCPUs: 3, Seed: 42, GDBSX: true})
		m.Run(30000)
		return m.State()
	}
	if a, b := run(), run(); a != b {
		t.Errorf("%s\n%s", a, b)
	}
}

func BenchmarkRun(b *testing.B) {
	m := New(Config{VCPUs: 2})
	for b.Loop() {
		m.Run(1000)
	}
	b.ReportMetric(float64(m.Steps())/b.Elapsed().Seconds(), "insn/s")
}

func BenchmarkNew(b *testing.B) {
	for b.Loop() {
		New(Config{VCPUs: 2})
	}
}
