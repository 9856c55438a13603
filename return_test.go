package vmprobes

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/kerneltest"
	"github.com/vmprobes/vmprobes/internal/xentest"
	"github.com/vmprobes/vmprobes/ktype"
)

// withTasks has the simulated guest tell of its tasks as a kernel does, and that the fault of no
// instruction is expected: by symbols, which it writes to w, and by types.
func withTasks(t *testing.T, m *xentest.Machine, w io.Writer) *ktype.Types {
	t.Helper()
	const faults, idle, comm = xentest.DataBase + 0xb00, xentest.DataBase + 0xc00, 0x20
	m.Poke(idle+comm, []byte("swapper/0\x00"))
	fmt.Fprintf(w, "%016x R __start___ex_table\n%016x R __stop___ex_table\n", uint64(faults), uint64(faults+12))
	fmt.Fprintf(w, "%016x D init_task\n%016x D current_task\n", uint64(idle), 0x10)
	types, err := ktype.New("xentest", 8, ktype.Struct{Name: "task_struct", Size: 64, Fields: []ktype.StructField{
		{Name: "pid", Offset: 0, Type: "int"}, {Name: "stack", Offset: 8, Type: "void *"}, {Name: "__state", Offset: 0x18, Type: "unsigned int"},
		{Name: "comm", Offset: comm, Type: "char [16]"},
	}})
	require.NoError(t, err)
	return types
}

// onReturns runs f with guests whose functions return in all ways.
func onReturns(t *testing.T, opts *Options, f func(t *testing.T, m *xentest.Machine, s *Session)) {
	for _, cfg := range []xentest.Config{
		{Kind: xentest.PV, GDBSX: true, VCPUs: 2, AVX: true, Seed: 1, Returns: true},
		{Kind: xentest.HVM, VCPUs: 2, AVX: true, Seed: 2, Returns: true},
	} {
		t.Run(map[xentest.Kind]string{xentest.PV: "pv", xentest.HVM: "hvm"}[cfg.Kind], func(t *testing.T) {
			var o Options
			if opts != nil {
				o = *opts
			}
			m, s := simulated(t, cfg, &o)
			f(t, m, s)
		})
	}
}

// during has a Loop run while f does, and returns what it returned.
func during(t *testing.T, s *Session, f func()) error {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- s.Loop(ctx) }()
	soon(t, "a loop", func() bool { return s.Looping() || len(done) > 0 })
	f()
	cancel()
	err := <-done
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

// rounds lets the guest run until vCPU 0 has been around its loop n times more, and rest.
func rounds(t *testing.T, m *xentest.Machine, n uint64) {
	t.Helper()
	n += m.Counter(0)
	m.Release()
	soon(t, "so many rounds", func() bool { return m.Counter(0) >= n || m.Oops() != "" })
	require.NoError(t, quiesced(t, m))
	require.Empty(t, m.Oops())
}

// book is a ReturnProbe that keeps account of what its handlers see.
type book struct {
	ReturnProbe
	under           map[*Activation]int // the number of each call
	n               int
	returned, ended int
	wrong           []string
	values          map[uint64]bool
	moved, nested   int
}

func (b *book) errorf(format string, a ...any) {
	if len(b.wrong) < 10 {
		b.wrong = append(b.wrong, b.Symbol+": "+fmt.Sprintf(format, a...))
	}
}

func bookOf(m *xentest.Machine, symbol string, follow Follow) *book {
	b := &book{under: map[*Activation]int{}, values: map[uint64]bool{}}
	b.ReturnProbe = ReturnProbe{
		Symbol: symbol, Name: "a " + symbol, Cookie: b, Follow: follow, MaxActive: -1,
		Entry: func(a *Activation, r *Regs) Action {
			if a.Probe() != b.Probe() || a.Probe().Cookie != b || a.Skipped() || a.Duration() != 0 {
				b.errorf("entry: %+v", a)
			}
			if r.PC() != b.Probe().Address() || r.SP != a.Slot() || a.Entry().SP != r.SP || a.Entry().IP != r.IP || a.Entry().DI != r.DI {
				b.errorf("entry: at %#x, stack pointer %#x, slot %#x, copied %#x", r.PC(), r.SP, a.Slot(), a.Entry().SP)
			}
			if entry, now := a.VCPU(); entry != now {
				b.errorf("it enters on vCPU %d and %d", entry, now)
			}
			task, pid, known := a.Task()
			if at, err := m.TaskAt(r.GSBase); err != nil || !known || task != at.Addr || pid != int(at.ID) {
				b.errorf("task %#x, pid %d, known %v: %v, must be %+v", task, pid, known, err, at)
			}
			if ret, err := a.Probe().ReadUint64(a.Slot()); err != nil || ret != a.ReturnAddress() {
				b.errorf("return address %#x, on the stack is %#x: %v", a.ReturnAddress(), ret, err)
			}
			if a.Depth() > 0 {
				b.nested++
			}
			b.n++
			a.Data, b.under[a] = b.n, b.n
			return Continue
		},
		Return: func(a *Activation, r *Regs) Action {
			b.returned++
			if a.Data != b.under[a] || a.Data == nil {
				b.errorf("what returns isn't under way: %+v", a)
			}
			delete(b.under, a)
			if a.Probe().Stats().Follow == AtReturn && (r.PC() != a.ReturnAddress() || r.SP != a.Slot()+8) {
				b.errorf("it returns to %#x with stack pointer %#x, must be %#x, %#x", r.PC(), r.SP, a.ReturnAddress(), a.Slot()+8)
			}
			if d := a.Duration(); d <= 0 || d > time.Minute {
				b.errorf("it took %v", d)
			}
			if entry, now := a.VCPU(); entry != now {
				b.moved++
			}
			if a.Skipped() {
				b.errorf("skipped")
			}
			b.values[r.Result()] = true
			return Continue
		},
		Abandoned: func(a *Activation, why error) Action {
			b.ended++
			if a.Data != b.under[a] || a.Data == nil || a.Duration() <= 0 {
				b.errorf("what is abandoned isn't under way: %+v", a)
			}
			delete(b.under, a)
			if !errors.Is(why, ErrUnwound) && !errors.Is(why, ErrTaskGone) {
				b.errorf("abandoned: %v", why)
			}
			return Continue
		},
	}
	return b
}

// equations are what Stats promises of a return probe.
func equations(t *testing.T, p *Probe, entered uint64) {
	t.Helper()
	st := p.Stats()
	assert.Equal(t, entered, st.Hits+st.Missed+st.Filtered+st.Skipped, "%v: executions, %+v", p, st)
	assert.Equal(t, st.Hits, st.Ignored+st.Returned+st.Abandoned+st.Dropped+uint64(st.Active), "%v: %+v", p, st)
}

// TestReturnProbe follows calls that end in all ways and compares with the guest's own counts.
func TestReturnProbe(t *testing.T) {
	for _, follow := range []Follow{FollowAuto, AtReturn, AtExits} {
		t.Run(follow.String(), func(t *testing.T) {
			onReturns(t, nil, func(t *testing.T, m *xentest.Machine, s *Session) {
				require.NoError(t, quiesced(t, m))
				var books []*book
				entered := map[*book]uint64{}
				for _, name := range []string{"rec", "tail_a", "tail_b", "tail_c", "tail_self", "lj_mid", "lj_deep", "blocker", "victim", "blocking"} {
					b := bookOf(m, name, follow)
					err := s.Register(b.Probe())
					if _, open := m.Exits(name); open && follow == AtExits {
						require.ErrorIs(t, err, ErrNoExits)
						continue
					}
					require.NoError(t, err)
					assert.Equal(t, FollowAuto, b.Probe().Stats().Follow)
					books = append(books, b)
					entered[b], _, _, _ = m.Returns(name)
				}
				require.NoError(t, during(t, s, func() { rounds(t, m, 12) }))
				moved, nested := 0, 0
				for _, b := range books {
					assert.Empty(t, b.wrong)
					n, _, unwound, died := m.Returns(b.Symbol)
					st := b.Probe().Stats()
					assert.Equal(t, n-entered[b], st.Hits, "%s: %+v", b.Symbol, st)
					equations(t, b.Probe(), n-entered[b])
					assert.EqualValues(t, b.n, st.Hits, b.Symbol)
					assert.EqualValues(t, b.returned, st.Returned, b.Symbol)
					assert.LessOrEqual(t, uint64(b.ended), st.Abandoned, b.Symbol)
					assert.Positive(t, st.Returned+st.Abandoned, b.Symbol)
					if unwound+died == 0 {
						assert.Zero(t, st.Abandoned, b.Symbol)
					} else {
						assert.Positive(t, st.Abandoned, b.Symbol)
					}
					if f := m.Function(b.Symbol); f.Values != nil {
						for v := range b.values {
							assert.Contains(t, f.Values, v, b.Symbol)
						}
					}
					if follow != FollowAuto {
						assert.Equal(t, follow, st.Follow, b.Symbol)
					}
					moved, nested = moved+b.moved, nested+b.nested
				}
				assert.Positive(t, moved, "no call has gone to another vCPU")
				assert.Positive(t, nested, "no call was in another one")
				for _, b := range books {
					require.NoError(t, s.Unregister(b.Probe()))
					st := b.Probe().Stats()
					assert.Zero(t, st.Active)
					assert.Equal(t, st.Hits, st.Ignored+st.Returned+st.Abandoned+st.Dropped, b.Symbol)
				}
				assert.Empty(t, s.eng.Sites(), "breakpoints after Unregister")
			})
		})
	}
}

// TestReturnSetResult changes what a function returns, which its caller sees.
func TestReturnSetResult(t *testing.T) {
	for _, follow := range []Follow{AtReturn, AtExits} {
		onReturns(t, nil, func(t *testing.T, m *xentest.Machine, s *Session) {
			require.NoError(t, quiesced(t, m))
			rp := &ReturnProbe{Symbol: "wrap", Follow: follow, Return: func(_ *Activation, r *Regs) Action {
				r.SetResult(r.Result() + 0x100)
				return Continue
			}}
			require.NoError(t, s.Register(rp.Probe()))
			was := m.Result(0)
			require.NoError(t, during(t, s, func() { rounds(t, m, 3) }))
			for vcpu := range 2 {
				assert.Equal(t, was+0x100, m.Result(vcpu))
			}
			require.NoError(t, s.Unregister(rp.Probe()))
			rounds(t, m, 3)
			assert.Equal(t, was, m.Result(0))
		})
	}
}

// TestReturnElsewhere has a Return handler send the vCPU elsewhere, which is undone.
func TestReturnElsewhere(t *testing.T) {
	onReturns(t, nil, func(t *testing.T, m *xentest.Machine, s *Session) {
		rp := &ReturnProbe{Symbol: "wrap", Return: func(_ *Activation, r *Regs) Action {
			r.IP += 3
			return Continue
		}}
		require.NoError(t, s.Register(rp.Probe()))
		err := s.Loop(t.Context())
		require.ErrorIs(t, err, ErrBadRegisters)
		assert.ErrorContains(t, err, "Return handler")
		assert.EqualValues(t, 1, rp.Probe().Stats().Returned)
	})
}

// TestReturnOrder: Return handlers of one call run in the reverse order of Entry, and before and
// after Pre handlers of the same function. Entry's Stop ends the Loop, and the call is followed.
func TestReturnOrder(t *testing.T) {
	onReturns(t, nil, func(t *testing.T, m *xentest.Machine, s *Session) {
		var order []string
		note := func(what string) { order = append(order, what) }
		probe := func(name string) *Probe {
			return (&ReturnProbe{Symbol: "wrap",
				Entry:  func(*Activation, *Regs) Action { note(name + " entry"); return Continue },
				Return: func(*Activation, *Regs) Action { note(name + " return"); return Continue },
			}).Probe()
		}
		pre := &Probe{Symbol: "wrap", Pre: func(*Probe, *Regs) Action { note("pre"); return Continue }}
		end := &ReturnProbe{Symbol: "wrap", Return: func(*Activation, *Regs) Action { note("end"); return Stop }}
		require.NoError(t, quiesced(t, m))
		require.NoError(t, s.Register(pre, end.Probe(), probe("a"), probe("b")))
		m.Release()
		require.NoError(t, s.Loop(t.Context()))
		// The other vCPU may be in the middle.
		got := strings.Join(order, ", ")
		assert.Contains(t, got, "a entry, b entry, pre")
		assert.Contains(t, got, "b return, a return, end")
	})
	onReturns(t, nil, func(t *testing.T, m *xentest.Machine, s *Session) {
		rp := &ReturnProbe{Symbol: "blocking", Entry: func(*Activation, *Regs) Action { return Stop }}
		require.NoError(t, s.Register(rp.Probe()))
		require.NoError(t, s.Loop(t.Context()))
		st := rp.Probe().Stats()
		assert.EqualValues(t, 1, st.Hits)
		assert.Equal(t, 1, st.Active)
		require.NoError(t, s.Unregister(rp.Probe()))
		st = rp.Probe().Stats()
		assert.Zero(t, st.Active)
		assert.Equal(t, st.Hits, st.Returned+st.Abandoned+st.Dropped, "%+v", st)
	})
}

// TestReturnIgnored has Entry ignore every other call, and MaxActive bound the calls that are
// under way.
func TestReturnIgnored(t *testing.T) {
	onReturns(t, nil, func(t *testing.T, m *xentest.Machine, s *Session) {
		require.NoError(t, quiesced(t, m))
		n := 0
		half := &ReturnProbe{Symbol: "rec", Entry: func(a *Activation, _ *Regs) Action {
			if n++; n%2 == 0 {
				a.Ignore()
				a.Ignore()
			}
			return Continue
		}}
		one := &ReturnProbe{Symbol: "rec", MaxActive: 1}
		depth := 0
		one.Entry = func(a *Activation, _ *Regs) Action { depth = max(depth, a.Depth()); return Continue }
		require.NoError(t, s.Register(half.Probe(), one.Probe()))
		entered, _, _, _ := m.Returns("rec")
		require.NoError(t, during(t, s, func() { rounds(t, m, 5) }))
		now, _, _, _ := m.Returns("rec")
		for _, rp := range []*ReturnProbe{half, one} {
			equations(t, rp.Probe(), now-entered)
		}
		st := half.Probe().Stats()
		assert.Equal(t, st.Hits/2, st.Ignored, "%+v", st)
		assert.Zero(t, st.Missed)
		st = one.Probe().Stats()
		assert.Greater(t, st.Missed, st.Hits, "%+v", st)
		assert.Positive(t, st.Hits)
		assert.Zero(t, depth)
		assert.Equal(t, st.Hits, st.Returned, "%+v", st)
	})
}

// TestReturnRefused: what can't be followed is refused before the guest is touched.
func TestReturnRefused(t *testing.T) {
	onReturns(t, nil, func(t *testing.T, m *xentest.Machine, s *Session) {
		text := m.Text()
		insns := m.Insns()
		i := slices.IndexFunc(insns, func(in xentest.Insn) bool { return in.VA == m.Symbol("rec") })
		offset := (&ReturnProbe{Symbol: "rec"}).Probe()
		offset.Offset = insns[i+1].VA - insns[i].VA
		pre := (&ReturnProbe{Symbol: "rec"}).Probe()
		pre.Pre = func(*Probe, *Regs) Action { return Stop }
		for name, c := range map[string]struct {
			p    *Probe
			want error
			text string
		}{
			"in the middle": {(&ReturnProbe{Addr: insns[i+1].VA}).Probe(), ErrNotEntry, ""},
			"offset":        {offset, ErrNotEntry, ""},
			"indirect":      {(&ReturnProbe{Symbol: "tail_c", Follow: AtExits}).Probe(), ErrNoExits, "an indirect jump"},
			"follow":        {(&ReturnProbe{Symbol: "rec", Follow: 9}).Probe(), nil, "Follow(9)"},
			"handlers":      {pre, nil, "Pre"},
			"filter":        {(&ReturnProbe{Symbol: "rec", Filter: &Filter{Args: []ArgFilter{{N: 6}}}}).Probe(), ErrBadFilter, ""},
			"never": { // what longjmp leads to, no branch does
				(&ReturnProbe{Symbol: "lj_outer"}).Probe(), ErrNeverReturns, ""},
			"no symbol": {(&ReturnProbe{Symbol: "no_such_function"}).Probe(), ErrSymbolNotFound, ""},
			"no place":  {(&ReturnProbe{}).Probe(), ErrNoAddress, ""},
		} {
			err := s.Register(c.p)
			require.Error(t, err, name)
			if c.want != nil {
				require.ErrorIs(t, err, c.want, name)
			}
			require.ErrorContains(t, err, c.text, name)
			assert.Zero(t, c.p.Flags(), name)
			assert.Zero(t, c.p.Stats(), name)
		}
		assert.Equal(t, text, m.Text())
		rp := &ReturnProbe{Symbol: "rec"}
		assert.Same(t, rp.Probe(), rp.Probe())
		require.NoError(t, s.Register(rp.Probe()))
		require.ErrorIs(t, s.Register(rp.Probe()), ErrRegistered)
	})
}

// TestReturnRefusedByKernel has what a kernel with all its tables refuses.
func TestReturnRefusedByKernel(t *testing.T) {
	guest := kerneltest.NewSynthetic(kerneltest.Layout{})
	// Functions of 16 bytes: one that only calls, one that ends in UD2, one that returns.
	copy(guest.Bytes(kerneltest.Fn(800)), []byte{0x0f, 0x0b, 0xeb, 0xfc})
	copy(guest.Bytes(kerneltest.Fn(801)), []byte{0x31, 0xc0, 0xc3})
	s := lookedAt(t, guest, Options{})
	err := s.Register((&ReturnProbe{Symbol: "fn_0800"}).Probe())
	require.ErrorIs(t, err, ErrNeverReturns)
	ep, err := s.prepare((&ReturnProbe{Symbol: "fn_0801"}).Probe())
	require.NoError(t, err)
	assert.Equal(t, []uint64{kerneltest.Fn(801) + 2}, ep.Ret.Exits)
	require.ErrorIs(t, s.Register((&ReturnProbe{Symbol: "fn_0200"}).Probe()), ErrNotProbeable)
	require.ErrorIs(t, s.Register((&ReturnProbe{Addr: kerneltest.Fn(801) + 2}).Probe()), ErrNotEntry)

	// Without a kernel the risk is the user's, and there are no exits.
	s = lookedAt(t, kerneltest.NewSynthetic(kerneltest.Layout{NoSymbols: true}), Options{IgnoreBlacklist: true})
	require.ErrorIs(t, s.Register((&ReturnProbe{Addr: kerneltest.Fn(801), Follow: AtExits}).Probe()), ErrNoExits)
	ep, err = s.prepare((&ReturnProbe{Addr: kerneltest.Fn(801)}).Probe())
	require.NoError(t, err)
	require.ErrorIs(t, ep.Ret.NoExits, ErrNoSymbols)
}

// TestReturnStackSwitch refuses the context switch, by its name.
func TestReturnStackSwitch(t *testing.T) {
	_, s := simulated(t, xentest.Config{Kind: xentest.HVM, Returns: true}, nil)
	require.ErrorIs(t, s.Register((&ReturnProbe{Symbol: "__switch_to_asm"}).Probe()), ErrStackSwitch)
}

// TestReturnDisabled disables a probe while calls are under way, enables it, unregisters it and
// registers it again: what it has counted stays, and what was dropped gets no handler.
func TestReturnDisabled(t *testing.T) {
	onReturns(t, nil, func(t *testing.T, m *xentest.Machine, s *Session) {
		require.NoError(t, quiesced(t, m))
		b := bookOf(m, "blocking", FollowAuto)
		p := b.Probe()
		require.NoError(t, s.Register(p))
		entered, _, _, _ := m.Returns("blocking")
		require.NoError(t, during(t, s, func() { rounds(t, m, 10) }))
		n, _, _, _ := m.Returns("blocking")
		equations(t, p, n-entered)
		require.Positive(t, p.Stats().Active)

		handlers := b.returned + b.ended
		p.Disable()
		require.NoError(t, during(t, s, func() { rounds(t, m, 10) }))
		st := p.Stats()
		assert.Equal(t, n-entered, st.Hits, "entries of a disabled probe")
		assert.Equal(t, handlers, b.returned+b.ended, "handlers of a disabled probe")
		assert.Equal(t, st.Hits, st.Returned+st.Abandoned+st.Dropped+uint64(st.Active), "%+v", st)
		assert.Positive(t, st.Dropped)
		clear(b.under)

		before, _, _, _ := m.Returns("blocking")
		p.Enable()
		require.NoError(t, during(t, s, func() { rounds(t, m, 10) }))
		after, _, _, _ := m.Returns("blocking")
		assert.Equal(t, st.Hits+after-before, p.Stats().Hits)
		require.NoError(t, s.Unregister(p))
		st = p.Stats()
		assert.Zero(t, st.Active)
		assert.Equal(t, st.Hits, st.Returned+st.Abandoned+st.Dropped, "%+v", st)
		clear(b.under)

		require.NoError(t, s.Register(p))
		before, _, _, _ = m.Returns("blocking")
		require.NoError(t, during(t, s, func() { rounds(t, m, 10) }))
		after, _, _, _ = m.Returns("blocking")
		now := p.Stats()
		assert.Equal(t, st.Hits+after-before, now.Hits)
		assert.Greater(t, now.Returned, st.Returned)
		assert.Equal(t, now.Hits, now.Returned+now.Abandoned+now.Dropped+uint64(now.Active), "%+v", now)
		assert.Empty(t, b.wrong)
	})
}

// TestReturnBetweenLoops: a call whose return comes while no Loop runs is abandoned, and its
// Abandoned handler runs in the next Loop.
func TestReturnBetweenLoops(t *testing.T) {
	onReturns(t, nil, func(t *testing.T, m *xentest.Machine, s *Session) {
		require.NoError(t, quiesced(t, m))
		unserved := 0
		rp := &ReturnProbe{Symbol: "blocking", Follow: AtReturn, Abandoned: func(a *Activation, why error) Action {
			if errors.Is(why, ErrNotServed) {
				unserved++
			}
			return Continue
		}}
		require.NoError(t, s.Register(rp.Probe()))
		require.NoError(t, during(t, s, func() { rounds(t, m, 4) }))
		require.Positive(t, rp.Probe().Stats().Active)
		rounds(t, m, 12)
		assert.Positive(t, rp.Probe().Stats().Missed)
		require.NoError(t, during(t, s, func() { rounds(t, m, 1) }))
		assert.Positive(t, unserved)
	})
}

// TestReturnPanic has a Return handler panic: the Session is closed, and the guest restored.
func TestReturnPanic(t *testing.T) {
	onReturns(t, nil, func(t *testing.T, m *xentest.Machine, s *Session) {
		rp := &ReturnProbe{Symbol: "wrap", Return: func(*Activation, *Regs) Action { panic("at a return") }}
		require.NoError(t, s.Register(rp.Probe()))
		assert.PanicsWithValue(t, "at a return", func() { s.Loop(t.Context()) })
		assert.Equal(t, FlagRestored, rp.Probe().Flags())
		st := rp.Probe().Stats()
		assert.Zero(t, st.Active)
		assert.Equal(t, st.Hits, st.Returned+st.Abandoned+st.Dropped, "%+v", st)
	})
}

// TestReturnEntryPanic has an Entry handler panic: its call is counted all the same.
func TestReturnEntryPanic(t *testing.T) {
	onReturns(t, nil, func(t *testing.T, m *xentest.Machine, s *Session) {
		rp := &ReturnProbe{Symbol: "wrap", Entry: func(*Activation, *Regs) Action { panic("at an entry") }}
		require.NoError(t, s.Register(rp.Probe()))
		assert.PanicsWithValue(t, "at an entry", func() { s.Loop(t.Context()) })
		st := rp.Probe().Stats()
		assert.EqualValues(t, 1, st.Hits)
		assert.EqualValues(t, 1, st.Dropped)
	})
}

// TestReturnClose closes the Session while calls are under way.
func TestReturnClose(t *testing.T) {
	onReturns(t, nil, func(t *testing.T, m *xentest.Machine, s *Session) {
		rp := &ReturnProbe{Symbol: "blocking"}
		require.NoError(t, s.Register(rp.Probe()))
		done := make(chan error, 1)
		go func() { done <- s.Loop(t.Context()) }()
		soon(t, "calls under way", func() bool { return rp.Probe().Stats().Active > 3 })
		require.NoError(t, s.Close())
		require.ErrorIs(t, <-done, ErrClosed)
		st := rp.Probe().Stats()
		assert.Zero(t, st.Active)
		assert.Positive(t, st.Dropped)
		assert.Equal(t, st.Hits, st.Returned+st.Abandoned+st.Dropped, "%+v", st)
	})
}

// TestReturnPackageLevel registers a return probe with the package-level functions.
func TestReturnPackageLevel(t *testing.T) {
	onReturns(t, nil, func(t *testing.T, m *xentest.Machine, s *Session) {
		n := 0
		rp := &ReturnProbe{DomainName: "a3guest", Symbol: "wrap", Return: func(_ *Activation, r *Regs) Action {
			if n++; n == 5 {
				return Stop
			}
			return Continue
		}}
		require.NoError(t, checkArguments(rp.Probe()))
		require.ErrorIs(t, Register((&ReturnProbe{Symbol: "f"}).Probe()), ErrNoDomain)
		require.NoError(t, registerWith(rp.Probe(), func(context.Context) (*Session, error) { return s, nil }))
		require.NoError(t, Loop(t.Context(), rp.Probe()))
		assert.Equal(t, 5, n)
		require.NoError(t, Unregister(rp.Probe()))
		assert.Equal(t, FlagRestored, rp.Probe().Flags())
		assert.EqualValues(t, 5, rp.Probe().Stats().Returned)
	})
}

// TestReturnInHandlers has handlers of a return probe unregister it, register others and end the
// Loop with an error.
func TestReturnInHandlers(t *testing.T) {
	onReturns(t, nil, func(t *testing.T, m *xentest.Machine, s *Session) {
		n := 0
		var next, entry *ReturnProbe
		next = &ReturnProbe{Symbol: "wrap", Return: func(a *Activation, _ *Regs) Action {
			n++
			assert.NoError(t, s.Unregister(a.Probe()))
			assert.Zero(t, a.Probe().Flags()&FlagPrepared)
			return Stop
		}}
		entry = &ReturnProbe{Symbol: "wrap", Entry: func(a *Activation, _ *Regs) Action {
			n++
			assert.NoError(t, s.Unregister(a.Probe()))
			assert.NoError(t, s.Register(next.Probe()))
			return Continue
		}, Return: func(*Activation, *Regs) Action {
			t.Error("the probe isn't registered")
			return Continue
		}}
		require.NoError(t, s.Register(entry.Probe()))
		require.NoError(t, s.Loop(t.Context()))
		assert.Equal(t, 2, n)
		st := entry.Probe().Stats()
		assert.EqualValues(t, 1, st.Hits)
		assert.EqualValues(t, 1, st.Dropped)
		assert.EqualValues(t, 1, next.Probe().Stats().Returned)
		assert.Empty(t, s.Probes())

		ignored := &ReturnProbe{Symbol: "wrap", Entry: func(a *Activation, _ *Regs) Action {
			a.Ignore()
			assert.NoError(t, s.Unregister(a.Probe()))
			return Stop
		}}
		require.NoError(t, s.Register(ignored.Probe()))
		require.NoError(t, s.Loop(t.Context()))
		st = ignored.Probe().Stats()
		assert.Equal(t, Stats{Hits: 1, Dropped: 1, Follow: AtReturn}, st)

		// Of a chain of calls that return together the last one's handler unregisters the probe.
		n = 0
		self := &ReturnProbe{Symbol: "tail_self", Return: func(a *Activation, _ *Regs) Action {
			n++
			assert.NoError(t, s.Unregister(a.Probe()))
			return Stop
		}}
		require.NoError(t, s.Register(self.Probe()))
		require.NoError(t, s.Loop(t.Context()))
		assert.Equal(t, 1, n)
		st = self.Probe().Stats()
		assert.Equal(t, st.Hits, st.Returned+st.Dropped, "%+v", st)
		assert.GreaterOrEqual(t, st.Dropped, uint64(1))

		// An Abandoned handler ends the Loop, too.
		failed := errors.New("as it was told to")
		lost := &ReturnProbe{Symbol: "lj_mid", Abandoned: func(a *Activation, why error) Action {
			assert.ErrorIs(t, why, ErrUnwound)
			_, err := a.Probe().ReadUint64(a.Slot())
			assert.NoError(t, err)
			return a.Probe().Fail(failed)
		}}
		require.NoError(t, s.Register(lost.Probe()))
		require.ErrorIs(t, s.Loop(t.Context()), failed)
	})
}

// TestReturnWrite: what is under a breakpoint at a return address can't be written.
func TestReturnWrite(t *testing.T) {
	onReturns(t, nil, func(t *testing.T, m *xentest.Machine, s *Session) {
		text := m.Text()
		rp := &ReturnProbe{Symbol: "wrap", Follow: AtReturn, Return: func(a *Activation, _ *Regs) Action {
			_, err := s.WriteMemory(a.ReturnAddress(), []byte{0x90})
			assert.ErrorContains(t, err, "is under the breakpoint of a ReturnProbe")
			got := make([]byte, len(text))
			_, err = s.ReadMemory(xentest.TextBase, got)
			assert.NoError(t, err)
			assert.Equal(t, text, got, "breakpoints must not show")
			return Stop
		}}
		require.NoError(t, s.Register(rp.Probe()))
		require.NoError(t, s.Loop(t.Context()))
	})
}

// TestReturnHits ranges over returns and hits.
func TestReturnHits(t *testing.T) {
	onReturns(t, nil, func(t *testing.T, m *xentest.Machine, s *Session) {
		rp := &ReturnProbe{Symbol: "rec", Name: "recursion"}
		p := &Probe{Symbol: "rec"}
		require.NoError(t, s.Register(rp.Probe(), p))
		returns, entries, last := 0, 0, uint64(0)
		for hit, err := range s.Hits(t.Context()) {
			require.NoError(t, err)
			assert.Greater(t, hit.Seq, last)
			last = hit.Seq
			if hit.Probe == p {
				assert.Nil(t, hit.Activation)
				entries++
				continue
			}
			require.NotNil(t, hit.Activation)
			assert.Same(t, rp.Probe(), hit.Probe)
			assert.Same(t, rp.Probe(), hit.Activation.Probe())
			assert.Less(t, hit.Regs.Result(), uint64(4))
			b, err := json.Marshal(hit)
			require.NoError(t, err)
			var got map[string]any
			require.NoError(t, json.Unmarshal(b, &got))
			for k, v := range map[string]any{
				"event": "return", "probe": "rec", "name": "recursion", "address": hex(rp.Probe().Address()),
				"result": hex(hit.Regs.Result()), "return_address": hex(hit.Activation.ReturnAddress()),
				"duration_ns": float64(hit.Activation.Duration().Nanoseconds()),
			} {
				assert.Equal(t, v, got[k], k)
			}
			if returns++; returns > 20 && entries > 20 {
				break
			}
		}
		assert.Greater(t, returns, 20)
	})
}

// TestReturnJSON has a return as another program gets it.
func TestReturnJSON(t *testing.T) {
	began := time.Date(2026, 1, 2, 15, 4, 5, 0, time.UTC)
	call := &Activation{call: &breakpoint.Activation{Return: 0xffffffff8134a351, Entered: began, Ended: began.Add(1500 * time.Nanosecond)}}
	h := Hit{Probe: &Probe{Symbol: "vfs_read", addr: 0xffffffff8134a000, Name: "read"}, Regs: &Regs{AX: 1<<64 - 14, IP: 0xffffffff8134a351},
		VCPU: 1, Seq: 7, Time: time.Date(2026, 1, 2, 15, 4, 5, 123456789, time.UTC), Activation: call}
	b, err := json.MarshalIndent(h, "", "\t")
	require.NoError(t, err)
	golden(t, "return.golden", string(b)+"\n")
}

// TestReturnEntryCall: what a call was given is told at its return, by the registers that it
// began with.
func TestReturnEntryCall(t *testing.T) {
	guest := kerneltest.NewSynthetic(kerneltest.Layout{})
	page := guest.Sym["text demo"] + 0x800
	copy(guest.Bytes(page), "/etc/passwd\x00")
	guest.Put64(page+0x40+104, page) // RSI of the caller
	s := lookedAt(t, guest, Options{})
	p := &Probe{Symbol: "__x64_sys_openat", session: s, addr: guest.Sym["__x64_sys_openat"]}
	a := &Activation{probe: p, entry: Regs{DI: page + 0x40, IP: p.addr, entry: p.addr, kernel: s.kernel, mem: s.kernel.Read, past: true}}
	v, err := a.Entry().SyscallArg(1)
	require.NoError(t, err)
	assert.Equal(t, page, v)
	c, err := p.Call(a.Entry())
	require.NoError(t, err)
	assert.Contains(t, c.String(), `"/etc/passwd"`)
	_, err = a.Entry().Task()
	require.ErrorIs(t, err, errNoHit, "the vCPU may execute another one by now")
	require.ErrorIs(t, a.Entry().Return(0), ErrNotEntry)
}

// TestReturnChurn registers, disables and unregisters return probes and others at the same
// functions while a Loop runs, from several goroutines: nothing is counted twice or forgotten.
func TestReturnChurn(t *testing.T) {
	turns := 60
	if testing.Short() {
		turns = 15
	}
	onReturns(t, nil, func(t *testing.T, m *xentest.Machine, s *Session) {
		require.NoError(t, s.Register(&Probe{Symbol: "wrap"})) // keeps the Loop busy
		require.NoError(t, during(t, s, func() {
			var all sync.WaitGroup
			for i, name := range []string{"rec", "tail_b", "blocking"} {
				all.Go(func() {
					names := [][]string{{"rec", "lj_mid"}, {"tail_a", "tail_b", "tail_self"}, {"blocking", "victim", "blocker"}}[i]
					for turn := range turns {
						var probes []*Probe
						for k, n := range names {
							rp := &ReturnProbe{Symbol: n, Follow: Follow((turn + k) % 3), Entry: func(a *Activation, _ *Regs) Action {
								if a.Slot()%3 == 0 {
									a.Ignore()
								}
								return Continue
							}}
							probes = append(probes, rp.Probe(), &Probe{Symbol: n})
						}
						for _, err := range s.RegisterEach(probes...) {
							assert.NoError(t, err, name)
						}
						for n := 0; n < 5000 && probes[0].Stats().Hits <= 2; n++ {
							time.Sleep(time.Millisecond)
						}
						assert.Greater(t, probes[0].Stats().Hits, uint64(2))
						probes[0].Disable()
						probes[0].Enable()
						assert.NoError(t, s.Unregister(probes...))
						for _, p := range probes {
							st := p.Stats()
							assert.Zero(t, st.Active)
							if p.ret != nil {
								assert.Equal(t, st.Hits, st.Ignored+st.Returned+st.Abandoned+st.Dropped, "%v: %+v", p, st)
							}
						}
					}
				})
			}
			all.Wait()
		}))
		assert.Len(t, s.Probes(), 1)
	})
}

// TestReturnWithoutTables follows calls in a guest that tells neither its tasks nor what it
// rewrites: with IgnoreBlacklist that is possible, at return addresses.
func TestReturnWithoutTables(t *testing.T) {
	onBoth(t, func(t *testing.T, m *xentest.Machine, s *Session) {
		require.NoError(t, quiesced(t, m))
		rp := &ReturnProbe{Symbol: entry, Entry: func(a *Activation, _ *Regs) Action {
			_, _, known := a.Task()
			assert.False(t, known)
			return Continue
		}, Return: func(a *Activation, r *Regs) Action {
			assert.Equal(t, a.ReturnAddress(), r.PC())
			return Continue
		}}
		require.ErrorIs(t, s.Register((&ReturnProbe{Symbol: entry, Follow: AtExits}).Probe()), ErrNoExits)
		require.NoError(t, s.Register(rp.Probe()))
		base := m.Executed(rp.Probe().Address())
		require.NoError(t, during(t, s, func() { rounds(t, m, 20) }))
		st := rp.Probe().Stats()
		n := m.Executed(rp.Probe().Address()) - base
		equations(t, rp.Probe(), n)
		assert.Positive(t, n)
		assert.Equal(t, Stats{Hits: n, Returned: n, Follow: AtReturn, Foreign: st.Foreign}, st)
	})
}

// TestFourGuests follows calls in four guests at once, in a process that has a Session with each.
func TestFourGuests(t *testing.T) {
	type guest struct {
		m *xentest.Machine
		s *Session
		b *book
	}
	var guests []guest
	for i := range 4 {
		cfg := xentest.Config{Kind: xentest.HVM, VCPUs: 2, Seed: uint64(i), Returns: true}
		if i%2 == 0 {
			cfg.Kind, cfg.GDBSX = xentest.PV, true
		}
		m, s := simulated(t, cfg, nil)
		guests = append(guests, guest{m, s, bookOf(m, "rec", Follow(i%3))})
	}
	var all sync.WaitGroup
	var bad atomic.Int32
	for _, g := range guests {
		all.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			p := &Probe{Symbol: entry, Limit: Limit{Hits: 50}}
			if err := g.s.Register(g.b.Probe(), p); err != nil {
				bad.Add(1)
				t.Error(err)
				return
			}
			for hit, err := range g.s.Hits(ctx) {
				if err != nil {
					t.Error(err)
					return
				}
				if hit.Probe == p {
					continue
				}
				if g.b.Probe().Stats().Returned > 200 && p.Stats().Hits == 50 {
					break
				}
			}
		})
	}
	all.Wait()
	for _, g := range guests {
		assert.Empty(t, g.b.wrong)
		require.NoError(t, g.s.Unregister(g.b.Probe()))
		st := g.b.Probe().Stats()
		assert.Equal(t, st.Hits, st.Returned+st.Abandoned+st.Dropped, "%+v", st)
	}
}
