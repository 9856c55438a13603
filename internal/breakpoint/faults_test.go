package breakpoint_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/xen"
	"github.com/vmprobes/vmprobes/internal/xentest"
	"github.com/vmprobes/vmprobes/xenctrl"
)

// TestAnswerFails has the calls fail with which a hit is answered, more often than
// they are made again at once: the vCPU is answered all the same, later.
func TestAnswerFails(t *testing.T) {
	for _, kind := range []string{"emulated", "out of line"} {
		for _, failures := range []int{3, 9, 12} {
			t.Run(fmt.Sprintf("%s/%d", kind, failures), func(t *testing.T) {
				each(t, func(t *testing.T, cfg xentest.Config) {
					m, _, e := engine(t, cfg, breakpoint.Config{MayFault: xentest.NoFaults})
					p := &breakpoint.Probe{Addr: m.Symbol("nop5")}
					if kind == "out of line" {
						p.Addr = outOfLine(t, m)
					}
					n := 0
					p.Pre = func(*breakpoint.Context) breakpoint.Verdict {
						if n++; n == 3 {
							failNext(m, failures)
						}
						return breakpoint.Continue
					}
					require.NoError(t, e.Register(p))
					base := m.Executed(p.Addr)
					m.Release()
					told := serveFor(t, e, 40*time.Millisecond)
					for range 100 {
						if n > 3 {
							break
						}
						told = append(told, serveFor(t, e, 20*time.Millisecond)...)
					}
					assert.Greater(t, n, 3, "the guest goes on: %s", m.State())
					for _, err := range told {
						assert.ErrorContains(t, err, "injected")
					}
					require.NoError(t, served(t, e, func() { quiesce(t, m) }))
					assert.Equal(t, m.Executed(p.Addr)-base, p.Hits())
				})
			})
		}
	}
}

// TestCloseOwes closes while a vCPU can't be answered, and again when it can.
func TestCloseOwes(t *testing.T) {
	each(t, func(t *testing.T, cfg xentest.Config) {
		t.Parallel()
		m, _, e := engine(t, cfg, breakpoint.Config{MayFault: xentest.NoFaults})
		p := &breakpoint.Probe{Addr: m.Symbol("nop5"), Pre: func(*breakpoint.Context) breakpoint.Verdict {
			m.FailAll(errInjected)
			return 1
		}}
		require.NoError(t, e.Register(p))
		m.Release()
		_, err := e.Serve(t.Context(), true)
		require.ErrorIs(t, err, errInjected)
		require.ErrorIs(t, e.Close(), breakpoint.ErrUnanswered)
		require.False(t, e.Left())
		assert.Empty(t, m.Oops())
		require.ErrorIs(t, e.Register(&breakpoint.Probe{Addr: p.Addr}), breakpoint.ErrClosed)
		m.FailAll(nil)
		require.NoError(t, e.Close())
		require.True(t, e.Left())
	})
}

// TestUnregisterFails has a breakpoint that can't be removed: the probe stays, and
// counts, until it can.
func TestUnregisterFails(t *testing.T) {
	each(t, func(t *testing.T, cfg xentest.Config) {
		t.Parallel()
		m, d, e := engine(t, cfg, breakpoint.Config{MayFault: xentest.NoFaults})
		p := &breakpoint.Probe{Addr: m.Symbol("nop5")}
		require.NoError(t, e.Register(p))
		base := m.Executed(p.Addr)
		d.remove = func() error { return errInjected }
		for range 2 {
			require.ErrorIs(t, e.Unregister(p), errInjected)
			require.True(t, e.Registered(p))
			require.True(t, p.Armed())
		}
		m.Release()
		require.NoError(t, served(t, e, func() {
			for i := 0; i < 1000 && p.Hits() < 10; i++ {
				time.Sleep(time.Millisecond)
			}
			quiesce(t, m)
		}))
		assert.Equal(t, m.Executed(p.Addr)-base, p.Hits())
		require.ErrorIs(t, e.Close(), breakpoint.ErrUnanswered)
		d.remove = nil
		require.NoError(t, e.Close())
	})
}

// TestBadRegisters has a handler leave registers that no vCPU can have.
func TestBadRegisters(t *testing.T) {
	for name, spoil := range map[string]func(*breakpoint.Context){
		"SP":       func(c *breakpoint.Context) { c.Regs.SP = 1 << 62 },
		"IP":       func(c *breakpoint.Context) { c.Regs.IP = 1 << 62 },
		"TF":       func(c *breakpoint.Context) { c.Regs.Flags |= 0x100 },
		"reserved": func(c *breakpoint.Context) { c.Regs.Flags |= 1 << 40 },
		"CR3":      func(c *breakpoint.Context) { c.Regs.CR3++ },
	} {
		for _, post := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/post=%v", name, post), func(t *testing.T) {
				each(t, func(t *testing.T, cfg xentest.Config) {
					m, _, e := engine(t, cfg, breakpoint.Config{MayFault: xentest.NoFaults})
					n := 0
					handler := func(c *breakpoint.Context) breakpoint.Verdict {
						if n++; n == 3 {
							spoil(c)
						}
						return breakpoint.Continue
					}
					p := &breakpoint.Probe{Addr: m.Symbol("nop5"), Pre: handler}
					if post {
						p.Pre, p.Post = nil, handler
					}
					require.NoError(t, e.Register(p))
					base := m.Executed(p.Addr)
					m.Release()
					_, err := e.Serve(t.Context(), true)
					require.ErrorIs(t, err, breakpoint.ErrBadRegs)
					require.Equal(t, 3, n)
					require.NoError(t, served(t, e, func() { quiesce(t, m) }))
					assert.Equal(t, m.Executed(p.Addr)-base, p.Hits())
				})
			})
		}
	}
}

// TestRewritten has the guest rewrite a probed instruction as text_poke does: an
// int3 over the first byte, then the rest, then the first byte. Whatever the guest
// has written by the time of Unregister stays, and shows.
func TestRewritten(t *testing.T) {
	for name, steps := range map[string]int{"int3 and rest": 2, "all": 3} {
		t.Run(name, func(t *testing.T) {
			each(t, func(t *testing.T, cfg xentest.Config) {
				m := xentest.New(cfg)
				drv, err := m.Attach(nil)
				require.NoError(t, err)
				e := breakpoint.New(drv, breakpoint.Config{Scratch: m.Scratch, MayFault: xentest.NoFaults})
				p := &breakpoint.Probe{Addr: m.Symbol("nop5")}
				require.NoError(t, e.Register(p))
				want := []byte{0xcc, 0x10, 0, 0, 0}
				m.Poke(p.Addr, want[:1])
				m.Poke(p.Addr+1, want[1:])
				if steps == 3 {
					want[0] = 0xe9
					m.Poke(p.Addr, want[:1])
				}
				got := m.Peek(p.Addr, 5)
				e.Overlay(p.Addr, got)
				assert.Equal(t, want, got, "what the guest wrote shows")
				require.ErrorIs(t, e.Unregister(p), breakpoint.ErrTextChanged)
				assert.Equal(t, want, m.Peek(p.Addr, 5), "and stays")
				assert.False(t, e.Registered(p))
				require.NoError(t, e.Close())
			})
		})
	}
}

// TestWaitsForRewriting has the guest's kernel be in the middle of changing its code.
func TestWaitsForRewriting(t *testing.T) {
	each(t, func(t *testing.T, cfg xentest.Config) {
		asked := 0
		m, _, e := engine(t, cfg, breakpoint.Config{MayFault: xentest.NoFaults, Rewriting: func() bool {
			asked++
			return asked%4 != 0
		}})
		m.Release()
		p := &breakpoint.Probe{Addr: m.Symbol("nop5")}
		require.NoError(t, e.Register(p))
		assert.Equal(t, 4, asked)
		require.NoError(t, e.Unregister(p))
		assert.Equal(t, 8, asked)
		require.NoError(t, e.Register(p))
		require.NoError(t, e.Close())
		assert.Equal(t, 16, asked)
	})
}

// TestExpectedFault: what the guest's kernel expects to fault is not probed, with a
// memory operand or without.
func TestExpectedFault(t *testing.T) {
	each(t, func(t *testing.T, cfg xentest.Config) {
		m := xentest.New(cfg)
		va := m.Gaps()[0].VA + 0x100
		drv, err := m.Attach(nil)
		require.NoError(t, err)
		e := breakpoint.New(drv, breakpoint.Config{Scratch: m.Scratch, MayFault: func(a uint64) bool { return a == va }})
		for _, code := range [][]byte{
			{0x8e, 0xd8},       // mov %eax,%ds
			{0x9b},             // fwait
			{0x48, 0x8b, 0x18}, // mov (%rax),%rbx
			{0x90},
		} {
			m.Load(va, code)
			require.ErrorIs(t, e.Register(&breakpoint.Probe{Addr: va}), breakpoint.ErrNoWayPast, "% x", code)
		}
		require.NoError(t, e.Close())
	})
}

// TestNoExceptionTable: where it isn't known what may fault, an access to memory
// that isn't there is not stepped with other vCPUs held; its breakpoint is given up.
func TestNoExceptionTable(t *testing.T) {
	cfg := xentest.Config{Kind: xentest.PV, GDBSX: true, VCPUs: 2, IRQEvery: -1}
	m := xentest.New(cfg)
	va := m.Gaps()[0].VA + 0x100
	m.Load(va, []byte{0x48, 0x8b, 0x18, 0xeb, 0xfe}) // mov (%rax),%rbx; jmp .
	hv := m.Hypervisor()
	drv, err := m.Attach(nil)
	require.NoError(t, err)
	e := breakpoint.New(drv, breakpoint.Config{Scratch: m.Scratch})
	require.NoError(t, e.Register(&breakpoint.Probe{Addr: va}))
	require.NoError(t, hv.Pause())
	var c xenctrl.VCPUContext
	require.NoError(t, hv.VCPUContext(0, &c))
	c.User.RIP, c.User.RAX = va, 0x7f0000001000 // a user page that isn't there
	require.NoError(t, hv.SetVCPUContext(0, &c))
	require.NoError(t, hv.Unpause())
	m.Run(1)
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	_, err = e.Serve(ctx, true)
	require.ErrorIs(t, err, breakpoint.ErrNoWayPast)
	assert.Zero(t, e.Stats().InPlace)
	require.NoError(t, e.Close())
}

// TestUnmappable has memory that a call pushes to unreachable for a moment: the
// probe stays, and counts.
func TestUnmappable(t *testing.T) {
	each(t, func(t *testing.T, cfg xentest.Config) {
		m, d, e := engine(t, cfg, breakpoint.Config{MayFault: xentest.NoFaults})
		p := &breakpoint.Probe{Addr: find(t, m, 0xe8)}
		p.Pre = func(*breakpoint.Context) breakpoint.Verdict {
			if p.Hits() == 3 {
				d.store = failing(8)
			}
			return breakpoint.Continue
		}
		require.NoError(t, e.Register(p))
		base := m.Executed(p.Addr)
		m.Release()
		for range 100 {
			for _, err := range serveFor(t, e, 20*time.Millisecond) {
				require.ErrorIs(t, err, errInjected)
			}
			if p.Hits() > 10 {
				break
			}
		}
		require.True(t, e.Registered(p))
		require.NoError(t, served(t, e, func() { quiesce(t, m) }))
		assert.Equal(t, m.Executed(p.Addr)-base, p.Hits())
	})
}

// TestStepInterrupted steps in place while interrupts come, in whose handler is
// another probe, and events can't be masked: TF doesn't stay.
func TestStepInterrupted(t *testing.T) {
	for _, vcpus := range []int{1, 2, 4} {
		t.Run(fmt.Sprint(vcpus), func(t *testing.T) {
			m := xentest.New(xentest.Config{Kind: xentest.PV, GDBSX: true, VCPUs: vcpus, AnyMask: true, Seed: rand.Uint64()})
			before := m.Text()
			m.Start()
			defer m.Stop()
			drv, err := xen.OpenDebugger(m.Hypervisor(), xentest.Frames(t, m.Hypervisor()), xen.Config{})
			require.NoError(t, err)
			e := breakpoint.New(drv, breakpoint.Config{MayFault: xentest.NoFaults}) // no dead code: it is stepped in place
			stepped := &breakpoint.Probe{Addr: outOfLine(t, m)}
			inHandler := &breakpoint.Probe{}
			for _, in := range m.Insns() {
				if in.Func == "event_entry" && len(in.Bytes) == 1 && in.Bytes[0] == 0x57 { // push %rdi
					inHandler.Addr = in.VA
				}
			}
			require.NoError(t, e.Register(stepped, inHandler))
			serveFor(t, e, 300*time.Millisecond)
			assert.Positive(t, e.Stats().InPlace)
			a := m.Counter(0)
			serveFor(t, e, 300*time.Millisecond)
			assert.Greater(t, m.Counter(0), a, "the guest hangs: %s", m.State())
			require.NoError(t, e.Close())
			m.Release()
			xentest.Verify(t, m, before)
		})
	}
}

// TestOnlinedMeanwhile brings a second vCPU up within the second for which an HVM
// guest is taken for one with a single vCPU: nothing is stepped in place any more.
func TestOnlinedMeanwhile(t *testing.T) {
	cfg := xentest.Config{Kind: xentest.HVM, MTF: true, VCPUs: 2, Seed: rand.Uint64()}
	m := xentest.New(cfg)
	before := m.Text()
	m.Start()
	defer m.Stop()
	hv := &onlining{Hypervisor: m.Hypervisor()}
	drv, err := m.Attach(hv)
	require.NoError(t, err)
	hv.one = true
	e := breakpoint.New(drv, breakpoint.Config{MayFault: xentest.NoFaults, Method: breakpoint.InPlace})
	p := &breakpoint.Probe{Addr: outOfLine(t, m)}
	require.NoError(t, e.Register(p))
	hv.one = false
	_, err = e.Serve(t.Context(), true)
	require.ErrorIs(t, err, breakpoint.ErrNoWayPast)
	assert.False(t, e.Registered(p))
	assert.Zero(t, e.Stats().InPlace)
	require.NoError(t, e.Close())
	m.Release()
	xentest.Verify(t, m, before)
}

// onlining is a domain that may have one vCPU online.
type onlining struct {
	xen.Hypervisor
	one bool
}

func (h *onlining) Info() (xenctrl.DomainInfo, error) {
	info, err := h.Hypervisor.Info()
	if h.one {
		info.OnlineVCPUs = 1
	}
	return info, err
}

// TestExactWhileOthersChange compares the hits of probes that stay with the guest's
// own counts, while others come and go.
func TestExactWhileOthersChange(t *testing.T) {
	rounds := 6
	if testing.Short() {
		rounds = 1
	}
	for _, h := range hosts() {
		t.Run(h.name, func(t *testing.T) {
			for range rounds {
				cfg := h.cfg
				cfg.VCPUs, cfg.Seed = 4, rand.Uint64()
				t.Run(fmt.Sprint(cfg.Seed), func(t *testing.T) { exactWhileOthersChange(t, cfg) })
			}
		})
	}
}

func exactWhileOthersChange(t *testing.T, cfg xentest.Config) {
	m, _, e := engine(t, cfg, breakpoint.Config{MayFault: xentest.NoFaults})
	insns := m.Insns()
	pick := func() uint64 {
		for {
			in := insns[rand.IntN(len(insns))]
			if in.VA != m.Symbol("int3_entry") && !isOwn(m, in.VA) {
				return in.VA
			}
		}
	}
	type stay struct {
		*breakpoint.Probe
		pre, post, base uint64
	}
	var stays []*stay
	for len(stays) < 4 {
		s := &stay{Probe: &breakpoint.Probe{Addr: pick()}}
		s.Pre = func(*breakpoint.Context) breakpoint.Verdict { s.pre++; return breakpoint.Continue }
		if rand.IntN(2) == 0 {
			s.Post = func(*breakpoint.Context) breakpoint.Verdict { s.post++; return breakpoint.Continue }
		}
		if e.Register(s.Probe) == nil {
			s.base = m.Executed(s.Addr)
			stays = append(stays, s)
		}
	}
	m.Release()
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				q := &breakpoint.Probe{Addr: pick(), Post: func(*breakpoint.Context) breakpoint.Verdict { return breakpoint.Continue }}
				if e.Register(q) == nil {
					time.Sleep(time.Duration(rand.IntN(300)) * time.Microsecond)
					assert.NoError(t, e.Unregister(q))
				}
			}
		})
	}
	require.NoError(t, served(t, e, func() {
		time.Sleep(100 * time.Millisecond)
		close(stop)
		wg.Wait()
		quiesce(t, m)
	}))
	for _, s := range stays {
		n := m.Executed(s.Addr) - s.base
		assert.Equal(t, n, s.Hits(), "%#x", s.Addr)
		assert.Equal(t, n, s.pre, "%#x", s.Addr)
		if s.Post != nil {
			assert.Equal(t, n, s.post, "%#x", s.Addr)
		}
	}
}

// TestShifted has the breakpoint stand behind the instruction whose executions are
// hits, with another probe at its place.
func TestShifted(t *testing.T) {
	each(t, func(t *testing.T, cfg xentest.Config) {
		m, _, e := engine(t, cfg, breakpoint.Config{MayFault: xentest.NoFaults})
		addr := m.Symbol("nop5")
		var order []string
		handler := func(name string, ip uint64) func(*breakpoint.Context) breakpoint.Verdict {
			return func(c *breakpoint.Context) breakpoint.Verdict {
				assert.Equal(t, ip, c.Regs.IP, name)
				order = append(order, name)
				return breakpoint.Continue
			}
		}
		direct := &breakpoint.Probe{Addr: addr + 5, Pre: handler("direct pre", addr+5)}
		shifted := &breakpoint.Probe{Addr: addr, At: addr + 5,
			Pre: handler("shifted pre", addr), Post: handler("shifted post", addr+5)}
		require.NoError(t, e.Register(direct, shifted))
		require.Len(t, e.Sites(), 1)
		assert.NotEqual(t, byte(0xcc), m.Peek(addr, 1)[0], "nothing is written at the address itself")
		base := m.Executed(addr)
		m.Release()
		require.NoError(t, served(t, e, func() {
			for i := 0; i < 1000 && shifted.Hits() < 10; i++ {
				time.Sleep(time.Millisecond)
			}
			quiesce(t, m)
		}))
		n := m.Executed(addr) - base
		assert.Equal(t, n, shifted.Hits())
		assert.Equal(t, n, direct.Hits())
		require.NotEmpty(t, order)
		for i, name := range order {
			assert.Equal(t, []string{"shifted pre", "shifted post", "direct pre"}[i%3], name)
		}

		// One that ends the hit leaves it to nobody; one that sends the vCPU elsewhere
		// keeps it from the other's instruction.
		require.NoError(t, e.Unregister(shifted))
		stop := &breakpoint.Probe{Addr: addr, At: addr + 5, Pre: func(*breakpoint.Context) breakpoint.Verdict { return 1 }}
		require.NoError(t, e.Register(stop))
		before := direct.Hits()
		m.Release()
		v, err := e.Serve(t.Context(), true)
		require.NoError(t, err)
		assert.EqualValues(t, 1, v)
		assert.EqualValues(t, 1, stop.Hits())
		assert.Equal(t, before, direct.Hits())
		assert.Positive(t, direct.Missed())
	})
}
