package vmprobes

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/x86"
	"github.com/vmprobes/vmprobes/internal/xentest"
)

// TestFilter has filters of every kind at rec, which is called with 4, 3, 2 and 1 in RCX in turn.
func TestFilter(t *testing.T) {
	onReturns(t, nil, func(t *testing.T, m *xentest.Machine, s *Session) {
		require.NoError(t, quiesced(t, m))
		arg := func(op Op, value, mask uint64) *Filter {
			return &Filter{Args: []ArgFilter{{N: 3, Op: op, Value: value, Mask: mask}}}
		}
		main := m.Tasks()[0]
		type want struct {
			f *Filter
			n uint64 // of four executions; 0: what the handler of other counts
		}
		wants := []want{
			{nil, 4}, {&Filter{}, 4}, {arg(Equal, 4, 0), 1}, {arg(Equal, 5, 0), 0}, {arg(NotEqual, 4, 0), 3}, {arg(Less, 3, 0), 2},
			{arg(LessOrEqual, 3, 0), 3}, {arg(Greater, 3, 0), 1}, {arg(GreaterOrEqual, 3, 0), 2}, {arg(Equal, 1, 1), 2},
			{arg(Greater, 1, 1<<63|2), 2}, {&Filter{Args: []ArgFilter{{N: 3, Op: Greater, Value: 1}, {N: 3, Op: Less, Value: 4}}}, 2},
			{&Filter{VCPUs: []int{0, 1}}, 4}, {&Filter{VCPUs: []int{7}}, 0}, {&Filter{PIDs: []int{1 << 30}}, 0}, {&Filter{Tasks: []Addr{1}}, 0},
		}
		var probes []*Probe
		for i, w := range wants {
			p := &Probe{Symbol: "rec", Filter: w.f}
			if i%2 == 0 {
				p = (&ReturnProbe{Symbol: "rec", Filter: w.f}).Probe()
			}
			probes = append(probes, p)
		}
		// Those that depend on who executes it are compared with what handlers see.
		var byTask, byVCPU, both uint64
		seen := func(_ *Probe, r *Regs) Action {
			task, err := m.TaskAt(r.GSBase)
			assert.NoError(t, err)
			if task == main {
				byTask++
				if r.Arg(3) == 2 {
					both++
				}
			}
			return Continue
		}
		probes = append(probes, &Probe{Symbol: "rec", Pre: seen})
		pids := []int{int(main.ID)}
		pid := &Probe{Symbol: "rec", Filter: &Filter{PIDs: pids}}
		tasks := &ReturnProbe{Symbol: "rec", Filter: &Filter{Tasks: []Addr{5, main.Addr}}, Entry: func(a *Activation, _ *Regs) Action {
			at, p, known := a.Task()
			assert.True(t, known && at == main.Addr && p == int(main.ID))
			return Continue
		}}
		and := &Probe{Symbol: "rec", Filter: &Filter{PIDs: pids, Args: []ArgFilter{{N: 3, Value: 2}}}}
		vcpu := &Probe{Symbol: "rec", Filter: &Filter{VCPUs: []int{1}}, Pre: func(*Probe, *Regs) Action { byVCPU++; return Continue }}
		probes = append(probes, pid, tasks.Probe(), and, vcpu)
		require.NoError(t, s.Register(probes...))
		pids[0] = 1 << 30 // is the caller's own
		va := m.Symbol("rec")
		base, base1 := m.Executed(va), m.ExecutedBy(1, va)
		require.NoError(t, during(t, s, func() { rounds(t, m, 6) }))
		n := m.Executed(va) - base
		require.Positive(t, n)
		for i, p := range probes {
			equations4(t, p, n)
			if i < len(wants) {
				assert.Equal(t, n*wants[i].n/4, p.Stats().Hits, "%d: %+v", i, wants[i].f)
			}
			assert.Zero(t, p.Stats().Missed)
		}
		require.Positive(t, byTask)
		assert.Equal(t, byTask, pid.Stats().Hits)
		assert.Equal(t, byTask, tasks.Probe().Stats().Hits)
		assert.Equal(t, both, and.Stats().Hits)
		assert.Equal(t, m.ExecutedBy(1, va)-base1, vcpu.Stats().Hits)
		assert.Equal(t, byVCPU, vcpu.Stats().Hits)
	})
}

// equations4 is the equation of all probes.
func equations4(t *testing.T, p *Probe, executed uint64) {
	t.Helper()
	st := p.Stats()
	assert.Equal(t, executed, st.Hits+st.Missed+st.Filtered+st.Skipped, "%v: %+v", p, st)
}

// TestFilterMatches looks at what no simulated guest has: processes, all arguments, and a task
// that isn't known.
func TestFilterMatches(t *testing.T) {
	r := &x86.Regs{DI: 1, SI: 2, DX: 3, CX: 4, R8: 5, R9: 1 << 63}
	for n, v := range []uint64{1, 2, 3, 4, 5, 1 << 63} {
		assert.True(t, (&Filter{Args: []ArgFilter{{N: n, Value: v}}}).matches(r, 0, nil), n)
		assert.False(t, (&Filter{Args: []ArgFilter{{N: n, Value: v + 1}}}).matches(r, 0, nil), n)
	}
	// Numbers are unsigned.
	assert.True(t, (&Filter{Args: []ArgFilter{{N: 5, Op: Greater, Value: 1}}}).matches(r, 0, nil))
	task, unknown := &breakpoint.Task{Addr: 9, PID: 40, TGID: 39}, &breakpoint.Task{}
	for _, c := range []struct {
		f    Filter
		want bool
	}{
		{Filter{TGIDs: []int{39}}, true}, {Filter{TGIDs: []int{40}}, false}, {Filter{PIDs: []int{1, 40}}, true},
		{Filter{PIDs: []int{40}, TGIDs: []int{39}, Tasks: []Addr{9}}, true},
		{Filter{PIDs: []int{40}, TGIDs: []int{39}, Tasks: []Addr{8}}, false},
		{Filter{PIDs: []int{41}, TGIDs: []int{39}}, false}, {Filter{VCPUs: []int{1}, PIDs: []int{40}}, false},
	} {
		assert.Equal(t, c.want, c.f.matches(r, 0, task), "%+v", c.f)
		assert.False(t, c.f.matches(r, 0, unknown), "%+v", c.f)
	}
	assert.False(t, (&Filter{PIDs: []int{0}}).matches(r, 0, unknown), "PID 0 is the idle task, not what isn't known")
}

// TestBadFilter refuses filters before the guest is touched.
func TestBadFilter(t *testing.T) {
	onReturns(t, nil, func(t *testing.T, m *xentest.Machine, s *Session) {
		for name, f := range map[string]*Filter{
			"argument 6":  {Args: []ArgFilter{{N: 6}}},
			"argument -1": {Args: []ArgFilter{{N: -1}}},
			"relation 6":  {Args: []ArgFilter{{Op: GreaterOrEqual + 1}}},
			"17":          {Args: make([]ArgFilter, 17)},
			"1025":        {PIDs: make([]int, 1025)},
			"1026":        {VCPUs: make([]int, 1026)},
			"1027":        {Tasks: make([]Addr, 1027)},
			"tgid":        {TGIDs: []int{1}}, // this kernel's types lack it
		} {
			p := &Probe{Symbol: entry, Filter: f}
			err := s.Register(p)
			require.ErrorIs(t, err, ErrBadFilter, name)
			require.ErrorContains(t, err, name)
			require.ErrorIs(t, s.RegisterEach(p)[0], ErrBadFilter)
			assert.Zero(t, p.Flags())
		}
		assert.NoError(t, s.Register(&Probe{Symbol: entry, Filter: &Filter{
			Args: make([]ArgFilter, 16), PIDs: make([]int, 1024), Tasks: make([]Addr, 1024), VCPUs: make([]int, 1024)}}))
	})
	onBoth(t, func(t *testing.T, m *xentest.Machine, s *Session) { // no types
		err := s.Register(&Probe{Symbol: entry, Filter: &Filter{PIDs: []int{1}}})
		require.ErrorIs(t, err, ErrBadFilter)
		assert.ErrorContains(t, err, "which task a vCPU executes isn't known")
		require.ErrorIs(t, s.Register(&Probe{Symbol: entry, Filter: &Filter{Tasks: []Addr{1}}}), ErrBadFilter)
	})
}

// TestOnce takes probes out after one hit, and after some. A Loop that has none left returns nil,
// and so does one that begins without any.
func TestOnce(t *testing.T) {
	onReturns(t, nil, func(t *testing.T, m *xentest.Machine, s *Session) {
		text := m.Text()
		n := map[*Probe]int{}
		count := func(p *Probe, _ *Regs) Action { n[p]++; return Continue }
		once := &Probe{Symbol: entry, Once: true, Pre: count}
		five := &Probe{Symbol: entry, Limit: Limit{Hits: 5}, Pre: count}
		filtered := &Probe{Symbol: "rec", Limit: Limit{Hits: 3}, Filter: &Filter{Args: []ArgFilter{{N: 3, Value: 4}}}, Pre: count}
		call := &ReturnProbe{Symbol: "blocking", Once: true, Return: func(a *Activation, _ *Regs) Action { n[a.Probe()]++; return Continue }}
		all := []*Probe{once, five, filtered, call.Probe()}
		require.NoError(t, s.Register(all...))
		assert.Equal(t, FlagPrepared|FlagArmed, once.Flags())
		require.NoError(t, s.Loop(t.Context()))
		for p, want := range map[*Probe]int{once: 1, five: 5, filtered: 3, call.Probe(): 1} {
			assert.Equal(t, want, n[p], "%v", p)
			assert.EqualValues(t, want, p.Stats().Hits, "%v", p)
			assert.Equal(t, FlagPrepared|FlagLimited, p.Flags(), "%v", p)
		}
		assert.EqualValues(t, 1, call.Probe().Stats().Returned)
		assert.Zero(t, call.Probe().Stats().Active)
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		require.NoError(t, s.Loop(ctx), "there is nothing to wait for")
		require.NoError(t, s.Unregister(all...))
		assert.Equal(t, text, m.Text())
		assert.Equal(t, FlagRestored, once.Flags())

		require.NoError(t, s.Register(once))
		assert.Equal(t, FlagPrepared|FlagArmed, once.Flags())
		for hit, err := range s.Hits(t.Context()) {
			require.NoError(t, err)
			assert.Same(t, once, hit.Probe)
		}
		assert.EqualValues(t, 2, once.Stats().Hits)
		assert.Equal(t, 2, n[once])
	})
}

// TestOnceBesideOthers: a Loop goes on as long as any probe is there.
func TestOnceBesideOthers(t *testing.T) {
	onBoth(t, func(t *testing.T, m *xentest.Machine, s *Session) {
		once := &Probe{Symbol: entry, Once: true}
		var other *Probe
		other = &Probe{Symbol: entry, Pre: func(*Probe, *Regs) Action {
			if other.Stats().Hits < 20 {
				return Continue
			}
			return Stop
		}}
		require.NoError(t, s.Register(once, other))
		require.NoError(t, s.Loop(t.Context()))
		assert.EqualValues(t, 20, other.Stats().Hits)
		assert.EqualValues(t, 1, once.Stats().Hits)
		assert.Zero(t, once.Stats().Missed)
	})
}

// TestTooOften takes probes out that have too many hits in a second.
func TestTooOften(t *testing.T) {
	onBoth(t, func(t *testing.T, m *xentest.Machine, s *Session) {
		p := &Probe{Symbol: entry, Limit: Limit{PerSecond: 10}}
		require.NoError(t, s.Register(p))
		err := s.Loop(t.Context())
		require.ErrorIs(t, err, ErrTooOften)
		assert.ErrorContains(t, err, "more than 10")
		assert.Equal(t, FlagPrepared|FlagLimited, p.Flags())
		assert.GreaterOrEqual(t, p.Stats().Hits, uint64(11))
		for _, err := range s.Hits(t.Context()) {
			require.ErrorIs(t, err, ErrTooOften)
		}
		require.NoError(t, s.Unregister(p))

		seldom := &Probe{Symbol: entry, Limit: Limit{PerSecond: 1 << 40, Hits: 100}}
		require.NoError(t, s.Register(seldom))
		require.NoError(t, s.Loop(t.Context()))
		assert.EqualValues(t, 100, seldom.Stats().Hits)
	})
}

// TestRegisterEach arms what can be armed, and says of the rest why not.
func TestRegisterEach(t *testing.T) {
	onBoth(t, func(t *testing.T, m *xentest.Machine, s *Session) {
		assert.Empty(t, s.RegisterEach())
		good, disabled := &Probe{Symbol: entry}, &Probe{Symbol: "push"}
		if _, err := s.Lookup("push"); err != nil {
			disabled.Symbol = m.Symbols()[3].Name
		}
		disabled.Disable()
		before := &Probe{Symbol: entry}
		require.NoError(t, s.Register(before))
		probes := []*Probe{good, nil, {Symbol: "twice"}, good, {Symbol: "no_such_function"}, {Addr: 0xffffffffc0000000}, disabled, before,
			{Addr: Addr(m.OwnBreakpoints()[0])}}
		want := []error{nil, ErrNilProbe, ErrAmbiguous, ErrRegistered, ErrSymbolNotFound, ErrNotMapped, nil, ErrRegistered, ErrForeign}
		errs := s.RegisterEach(probes...)
		require.Len(t, errs, len(want))
		for i, w := range want {
			if w == nil {
				require.NoError(t, errs[i])
				continue
			}
			require.ErrorIs(t, errs[i], w)
			var e *Error
			require.ErrorAs(t, errs[i], &e)
			assert.Equal(t, "register", e.Op)
		}
		assert.Equal(t, []*Probe{before, good, disabled}, s.Probes())
		assert.Equal(t, FlagPrepared|FlagArmed, good.Flags())
		assert.Equal(t, FlagDisabled|FlagPrepared|FlagArmed, disabled.Flags())
		assert.Zero(t, probes[5].Flags())
		require.NoError(t, during(t, s, func() { soon(t, "hits", func() bool { return good.Stats().Hits > 10 }) }))

		// What fails may be registered again.
		probes[4].Symbol = entry
		require.NoError(t, s.RegisterEach(probes[4])[0])
		require.NoError(t, s.Close())
		for _, err := range s.RegisterEach(&Probe{Symbol: entry}, nil) {
			require.True(t, errors.Is(err, ErrClosed) || errors.Is(err, ErrNilProbe), err)
		}
	})
}

// TestRegisterMatching registers by pattern.
func TestRegisterMatching(t *testing.T) {
	onReturns(t, nil, func(t *testing.T, m *xentest.Machine, s *Session) {
		names := map[string]bool{}
		probes, refused, err := s.RegisterMatching("tail_[abs]*", func(symbol string) *Probe {
			names[symbol] = true
			if symbol == "tail_b" {
				return (&ReturnProbe{Symbol: symbol}).Probe()
			}
			return (&ReturnProbe{}).Probe()
		})
		require.NoError(t, err)
		assert.Empty(t, refused)
		assert.Equal(t, map[string]bool{"tail_a": true, "tail_b": true, "tail_self": true}, names)
		require.Len(t, probes, 3)
		assert.Equal(t, probes, s.Probes())
		for _, p := range probes {
			assert.True(t, names[p.Symbol], p.Symbol)
			assert.Equal(t, Addr(m.Symbol(p.Symbol)), p.Address())
		}
		require.NoError(t, during(t, s, func() {
			soon(t, "returns", func() bool {
				return probes[0].Stats().Returned > 3 && probes[1].Stats().Returned > 3 && probes[2].Stats().Returned > 3
			})
		}))

		// One is refused, and one left out.
		probes, refused, err = s.RegisterMatching("tail*", func(symbol string) *Probe {
			switch symbol {
			case "tail_c":
				return (&ReturnProbe{Follow: AtExits}).Probe()
			case "tail_b":
				return nil
			}
			return &Probe{}
		})
		require.NoError(t, err)
		require.Len(t, refused, 1)
		require.ErrorIs(t, refused["tail_c"], ErrNoExits)
		require.Len(t, probes, 3) // tail_a, tail_self, tails
		require.NoError(t, s.Unregister(probes...))

		// Two of one name are told apart by their addresses.
		for _, symbol := range []string{"", "twice"} {
			probes, refused, err = s.RegisterMatching("twic?", func(name string) *Probe {
				assert.Equal(t, "twice", name)
				return &Probe{Symbol: symbol}
			})
			require.NoError(t, err)
			// They are in the middle of other functions, where instructions needn't begin.
			require.Equal(t, 2, len(probes)+len(refused))
			for _, p := range probes {
				assert.Empty(t, p.Symbol)
				assert.Equal(t, "twice", p.Name)
				assert.Equal(t, p.Addr, p.Address())
			}
			for name := range refused {
				assert.True(t, strings.HasPrefix(name, "twice@0xffffffff81000"), name)
			}
			require.NoError(t, s.Unregister(probes...))
		}

		none := func(string) *Probe { return nil }
		probes, refused, err = s.RegisterMatching("*", none)
		require.NoError(t, err)
		assert.Empty(t, probes)
		assert.Empty(t, refused)
		for pattern, want := range map[string]error{"no_such_*": ErrSymbolNotFound, "": ErrSymbolNotFound, "no_module:*": ErrSymbolNotFound, "linux_b*": ErrSymbolNotFound} {
			_, _, err = s.RegisterMatching(pattern, none)
			require.ErrorIs(t, err, want, pattern)
			var e *Error
			require.ErrorAs(t, err, &e)
			assert.Equal(t, pattern, e.Probe)
		}
		_, _, err = s.RegisterMatching("[", none)
		require.ErrorContains(t, err, "syntax error in pattern")
		defer func(n int) { maxMatches = n }(maxMatches)
		maxMatches = 4
		_, _, err = s.RegisterMatching("tail*", none)
		require.ErrorContains(t, err, "5 functions match, of 4 at most")
		require.NoError(t, s.Close())
		_, _, err = s.RegisterMatching("tail_?", func(string) *Probe { return &Probe{} })
		require.ErrorIs(t, err, ErrClosed)
	})
	_, _, err := (&Session{symErr: ErrNoSymbols}).RegisterMatching("*", nil)
	require.ErrorIs(t, err, ErrNoSymbols)
}
