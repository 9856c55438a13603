package vmprobes

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/kerneltest"
	"github.com/vmprobes/vmprobes/internal/target"
	"github.com/vmprobes/vmprobes/internal/xen"
	"github.com/vmprobes/vmprobes/internal/xentest"
	"github.com/vmprobes/vmprobes/ktype"
	"github.com/vmprobes/vmprobes/linux"
	"github.com/vmprobes/vmprobes/sysmap"
	"github.com/vmprobes/vmprobes/xenctrl"
)

// attached attaches to a simulated guest.
func attached(t *testing.T, m *xentest.Machine) (target.Guest, target.Driver) {
	t.Helper()
	g, err := target.Xen(m.Hypervisor())
	require.NoError(t, err)
	drv, err := g.Attach(t.Context(), target.Setup{Lookup: m.Lookup})
	require.NoError(t, err)
	return g, drv
}

// simulated opens a Session on a simulated guest, which runs until the test ends
// and must then be unharmed.
func simulated(t *testing.T, cfg xentest.Config, opts *Options) (*xentest.Machine, *Session) {
	t.Helper()
	m := xentest.New(cfg)
	before := m.Text()
	const banner = xentest.DataBase + 0xa00 // in a page of which the program uses less
	m.Poke(banner, []byte("Linux version 9.9.9-simulated\x00"))
	m.Start()
	g, drv := attached(t, m)
	var b strings.Builder
	fmt.Fprintf(&b, "%016x T _text\n%016x T _stext\n", uint64(xentest.TextBase), uint64(xentest.TextBase))
	for _, s := range m.Symbols() {
		switch s.Name {
		case "switch_to":
			s.Name = "__switch_to_asm" // as in Linux
		case "rec_more", "rec_base", "tail_self_more", "tail_self_end", "yield_end", "victim_end":
			continue // labels in a function
		}
		fmt.Fprintf(&b, "%016x T %s\n", s.VA, s.Name)
	}
	fmt.Fprintf(&b, "%016x T _etext\n", xentest.TextBase+uint64(len(before)))
	fmt.Fprintf(&b, "%016x T twice\n%016x T twice\n", uint64(xentest.TextBase+0x100), uint64(xentest.TextBase+0x200))
	fmt.Fprintf(&b, "%016x D linux_banner\n", uint64(banner))
	var types *ktype.Types
	if cfg.Returns {
		types = withTasks(t, m, &b)
	}
	syms, err := sysmap.Parse(strings.NewReader(b.String()))
	require.NoError(t, err)
	kernel, err := linux.Discover(t.Context(), g, &linux.Options{Symbols: syms, Types: types})
	require.NoError(t, err)
	if opts == nil {
		opts = new(Options)
	}
	opts.IgnoreBlacklist = true // this kernel has no tables of what it rewrites
	info := g.Info()
	info.Name = "a3guest"
	s := newSession(info, drv, kernel, nil, opts, g.Close)
	t.Cleanup(func() {
		require.NoError(t, s.Close())
		m.Release()
		if !t.Failed() {
			xentest.Verify(t, m, before)
		}
		m.Stop()
		assert.Zero(t, m.Mappings())
	})
	return m, s
}

func onBoth(t *testing.T, f func(t *testing.T, m *xentest.Machine, s *Session)) {
	for name, cfg := range map[string]xentest.Config{
		"pv":  {Kind: xentest.PV, GDBSX: true, VCPUs: 2, AVX: true, Seed: 1},
		"hvm": {Kind: xentest.HVM, VCPUs: 2, AVX: true, Seed: 2},
	} {
		t.Run(name, func(t *testing.T) {
			m, s := simulated(t, cfg, nil)
			f(t, m, s)
		})
	}
}

const entry = "endbr" // a function of the simulated guest

func quiesced(t *testing.T, m *xentest.Machine) error {
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	return m.Quiesce(ctx)
}

func soon(t *testing.T, what string, f func() bool) {
	t.Helper()
	for range 5000 {
		if f() {
			return
		}
		time.Sleep(time.Millisecond)
	}
	t.Fatal("never: ", what)
}

func TestLoopUntilStop(t *testing.T) {
	onBoth(t, func(t *testing.T, m *xentest.Machine, s *Session) {
		var order []string
		first := &Probe{Symbol: entry, Pre: func(p *Probe, r *Regs) Action {
			assert.Equal(t, p.Address(), r.PC())
			order = append(order, "first pre")
			return Continue
		}, Post: func(p *Probe, r *Regs, f Flags) Action {
			assert.NotEqual(t, p.Address(), r.PC())
			assert.Equal(t, FlagPrepared|FlagArmed, f)
			order = append(order, "first post")
			return Continue
		}}
		n := 0
		second := &Probe{Symbol: entry, Pre: func(*Probe, *Regs) Action {
			order = append(order, "second pre")
			if n++; n == 3 {
				return Stop
			}
			return Continue
		}}
		assert.Zero(t, first.Flags())
		require.NoError(t, s.Register(first, second))
		assert.Equal(t, FlagPrepared|FlagArmed, first.Flags())
		assert.Equal(t, []*Probe{first, second}, s.Probes())
		require.NoError(t, s.Loop(t.Context()))
		assert.Equal(t, 3, n)
		assert.EqualValues(t, 3, first.Stats().Hits)
		assert.Equal(t, strings.Split(strings.Repeat("first pre,second pre,first post,", 2)+"first pre,second pre", ","), order)
		require.NoError(t, s.Unregister(second, first))
		assert.Equal(t, FlagRestored, first.Flags())
		assert.EqualValues(t, 3, first.Stats().Hits, "counters outlive the registration")
		require.NoError(t, s.Unregister(first), "again")
		require.ErrorIs(t, s.Loop(t.Context()), ErrNotRegistered)
	})
}

func TestHitsAreExact(t *testing.T) {
	onBoth(t, func(t *testing.T, m *xentest.Machine, s *Session) {
		require.NoError(t, quiesced(t, m))
		p := &Probe{Symbol: entry}
		require.NoError(t, s.Register(p))
		va := uint64(p.Address())
		base := m.Executed(va)
		m.Release()
		soon(t, "hits without a loop", func() bool { return p.Stats().Missed > 20 })
		ctx, cancel := context.WithCancelCause(t.Context())
		done := make(chan error, 1)
		go func() { done <- s.Loop(ctx) }()
		soon(t, "hits with one", func() bool { return p.Stats().Hits > 50 })
		require.ErrorIs(t, s.Loop(t.Context()), ErrLooping)
		cause := errors.New("enough")
		cancel(cause)
		err := <-done
		require.ErrorIs(t, err, context.Canceled)
		require.ErrorIs(t, err, cause)
		soon(t, "hits after it", func() bool { return p.Stats().Missed > 40 })
		require.NoError(t, quiesced(t, m))
		st := p.Stats()
		assert.Equal(t, m.Executed(va)-base, st.Hits+st.Missed)
	})
}

func TestDisabledProbe(t *testing.T) {
	onBoth(t, func(t *testing.T, m *xentest.Machine, s *Session) {
		p := &Probe{Symbol: entry, Pre: func(*Probe, *Regs) Action { t.Error("a disabled probe's handler runs"); return Stop }}
		p.Disable()
		n := 0
		q := &Probe{Symbol: entry, Pre: func(*Probe, *Regs) Action {
			if n++; n == 10 {
				return Stop
			}
			return Continue
		}}
		require.NoError(t, s.Register(p, q))
		assert.Equal(t, FlagDisabled|FlagPrepared|FlagArmed, p.Flags())
		require.NoError(t, s.Loop(t.Context()))
		assert.Zero(t, p.Stats().Hits)
		p.Enable()
		assert.Equal(t, FlagPrepared|FlagArmed, p.Flags())
	})
}

func TestHits(t *testing.T) {
	onBoth(t, func(t *testing.T, m *xentest.Machine, s *Session) {
		p, q := &Probe{Symbol: entry}, &Probe{Symbol: "push"}
		if _, err := s.Lookup("push"); err != nil {
			q.Symbol = m.Symbols()[3].Name
		}
		require.NoError(t, s.Register(p, q))
		seen := map[*Probe]int{}
		last, lastTime := uint64(0), time.Now()
		for hit, err := range s.Hits(t.Context()) {
			require.NoError(t, err)
			assert.Equal(t, hit.Probe.Address(), hit.Regs.PC())
			assert.Less(t, hit.VCPU, 2)
			assert.False(t, hit.Time.Before(lastTime))
			lastTime = hit.Time
			assert.Greater(t, hit.Seq, last)
			last = hit.Seq
			seen[hit.Probe]++
			if seen[p] > 20 && seen[q] > 20 {
				break
			}
		}
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		defer cancel()
		var final error
		for _, err := range s.Hits(ctx) {
			final = err
		}
		require.ErrorIs(t, final, context.DeadlineExceeded)
	})
}

// TestHitJSON has a hit as another program gets it. Numbers are read as 64-bit floats
// there: no bit may be lost.
func TestHitJSON(t *testing.T) {
	onBoth(t, func(t *testing.T, m *xentest.Machine, s *Session) {
		p := &Probe{Symbol: entry, Name: "the \"entry\""}
		require.NoError(t, s.Register(p))
		for hit, err := range s.Hits(t.Context()) {
			require.NoError(t, err)
			regs := *hit.Regs
			hit.Regs.R15 = 1<<64 - 1
			b, err := json.Marshal(hit)
			require.NoError(t, err)
			byValue, err := json.Marshal(*hit)
			require.NoError(t, err)
			assert.Equal(t, b, byValue)
			*hit.Regs = regs
			regs.R15 = 1<<64 - 1

			var got map[string]any
			require.NoError(t, json.Unmarshal(b, &got))
			for k, v := range map[string]any{"event": "hit", "probe": entry, "name": "the \"entry\"", "address": fmt.Sprintf("0x%x", regs.IP), "vcpu": float64(hit.VCPU), "seq": float64(hit.Seq)} {
				assert.Equal(t, v, got[k], k)
			}
			at, err := time.Parse(time.RFC3339Nano, got["time"].(string))
			require.NoError(t, err)
			assert.WithinDuration(t, time.Now(), at, time.Minute)
			fields := got["registers"].(map[string]any)
			assert.Len(t, fields, 23)
			for _, f := range regs.fields() {
				v, err := strconv.ParseUint(fields[f.name].(string), 0, 64)
				require.NoError(t, err)
				assert.Equal(t, f.value, v, f.name)
			}
			break
		}
	})
	b, err := json.Marshal(Hit{})
	require.NoError(t, err)
	assert.JSONEq(t, `{"event":"hit","vcpu":0,"seq":0,"time":"0001-01-01T00:00:00Z","registers":null}`, string(b))
}

func TestPanicRestoresGuest(t *testing.T) {
	onBoth(t, func(t *testing.T, m *xentest.Machine, s *Session) {
		p := &Probe{Symbol: entry, Pre: func(*Probe, *Regs) Action { panic("in a handler") }}
		require.NoError(t, s.Register(p))
		assert.PanicsWithValue(t, "in a handler", func() { s.Loop(t.Context()) })
		assert.Equal(t, FlagRestored, p.Flags())
		require.ErrorIs(t, s.Register(p), ErrClosed)
		require.ErrorIs(t, s.Loop(t.Context()), ErrClosed)
	})
}

func TestPostPanicRestoresGuest(t *testing.T) {
	onBoth(t, func(t *testing.T, m *xentest.Machine, s *Session) {
		p := &Probe{Symbol: entry, Post: func(*Probe, *Regs, Flags) Action { panic("after it") }}
		require.NoError(t, s.Register(p))
		assert.PanicsWithValue(t, "after it", func() { s.Loop(t.Context()) })
		assert.Equal(t, FlagRestored, p.Flags())
	})
}

func TestCloseEndsLoop(t *testing.T) {
	onBoth(t, func(t *testing.T, m *xentest.Machine, s *Session) {
		p := &Probe{Symbol: entry}
		require.NoError(t, s.Register(p))
		done := make(chan error, 1)
		go func() { done <- s.Loop(t.Context()) }()
		soon(t, "hits", func() bool { return p.Stats().Hits > 5 })
		require.NoError(t, s.Close())
		require.ErrorIs(t, <-done, ErrClosed)
		require.NoError(t, s.Close(), "again")
	})
}

func TestUnregisterInHandler(t *testing.T) {
	onBoth(t, func(t *testing.T, m *xentest.Machine, s *Session) {
		var q *Probe
		p := &Probe{Symbol: entry, Pre: func(p *Probe, r *Regs) Action {
			assert.NoError(t, s.Unregister(p))
			assert.NoError(t, s.Register(q))
			return Continue
		}}
		q = &Probe{Symbol: entry, Pre: func(*Probe, *Regs) Action { return Stop }}
		require.NoError(t, s.Register(p))
		require.NoError(t, s.Loop(t.Context()))
		assert.EqualValues(t, 1, p.Stats().Hits)
		assert.EqualValues(t, 1, q.Stats().Hits)
	})
}

func TestRegisterAllOrNothing(t *testing.T) {
	onBoth(t, func(t *testing.T, m *xentest.Machine, s *Session) {
		text := m.Text()
		good := &Probe{Symbol: entry}
		insns := m.Insns()
		long := insns[0]
		for _, in := range insns {
			if len(in.Bytes) > 4 {
				long = in
				break
			}
		}
		for name, bad := range map[string]struct {
			p   *Probe
			err error
		}{
			"nil":           {nil, ErrNilProbe},
			"no place":      {&Probe{}, ErrNoAddress},
			"two places":    {&Probe{Symbol: entry, Addr: 1}, ErrTwoAddresses},
			"no symbol":     {&Probe{Symbol: "no_such_function"}, ErrSymbolNotFound},
			"ambiguous":     {&Probe{Symbol: "twice"}, ErrAmbiguous},
			"inside":        {&Probe{Addr: Addr(long.VA), Offset: 1}, ErrNotBoundary},
			"not mapped":    {&Probe{Addr: 0xffffffffc0000000}, ErrNotMapped},
			"not canonical": {&Probe{Addr: 0x8000000000000000}, nil},
			"own int3":      {&Probe{Addr: Addr(m.OwnBreakpoints()[0])}, ErrForeign},
			"twice":         {good, ErrRegistered},
		} {
			err := s.Register(good, bad.p)
			require.Error(t, err, name)
			if bad.err != nil {
				require.ErrorIs(t, err, bad.err, name)
			}
			var e *Error
			require.ErrorAs(t, err, &e, name)
			assert.Equal(t, "a3guest", e.Domain)
			assert.Zero(t, good.Flags(), name)
			assert.Equal(t, text, m.Text(), name)
			assert.Empty(t, s.Probes())
		}
		require.NoError(t, s.Register(good))
		require.ErrorIs(t, s.Register(good), ErrRegistered)
	})
}

func TestMemory(t *testing.T) {
	onBoth(t, func(t *testing.T, m *xentest.Machine, s *Session) {
		p := &Probe{Symbol: entry}
		_, err := p.ReadMemory(xentest.TextBase, make([]byte, 4))
		require.ErrorIs(t, err, ErrNotRegistered)
		clean := m.Text()
		require.NoError(t, s.Register(p))
		assert.NotEqual(t, clean, m.Text())
		got := make([]byte, len(clean))
		n, err := s.ReadMemory(xentest.TextBase, got)
		require.NoError(t, err)
		assert.Equal(t, len(got), n)
		assert.Equal(t, clean, got, "breakpoints must not show")

		_, err = s.WriteMemory(Addr(s.eng.Sites()[0].Addr), []byte{0x90})
		require.Error(t, err, "under a probe")
		assert.ErrorContains(t, err, "unregister")

		word := m.Peek(xentest.DataBase+0x800, 8)
		require.NoError(t, err2(s.WriteMemory(xentest.DataBase+0x800, word)))
		v, err := p.ReadUint64(xentest.DataBase + 0x800)
		require.NoError(t, err)
		assert.Equal(t, le64(word), v)
		v32, err := p.ReadUint32(xentest.DataBase + 0x800)
		require.NoError(t, err)
		assert.Equal(t, uint32(le64(word)), v32)

		n, err = s.ReadMemory(xentest.StackBase+2*4096-16, make([]byte, 32))
		require.ErrorIs(t, err, ErrNotMapped)
		assert.Equal(t, 16, n)
		n, err = s.ReadMemory(^Addr(0)-3, make([]byte, 16))
		require.Error(t, err)
		assert.Zero(t, n)
		top := make([]byte, 16)
		require.NoError(t, err2(s.ReadMemory(xentest.StackBase+2*4096-8, top[:8])))
		n, err = s.WriteMemory(xentest.StackBase+2*4096-8, top)
		require.ErrorIs(t, err, ErrNotMapped)
		assert.Equal(t, 8, n)
	})
}

func err2(_ int, err error) error { return err }

func TestReadString(t *testing.T) {
	_, s := simulated(t, xentest.Config{Kind: xentest.HVM, Seed: 5}, nil)
	p := &Probe{Symbol: entry}
	require.NoError(t, s.Register(p))
	// The end of a stack's pages: behind it nothing is mapped.
	end := Addr(xentest.StackBase + 2*4096)
	top := make([]byte, 32)
	_, err := s.ReadMemory(end-32, top)
	require.NoError(t, err)
	defer s.WriteMemory(end-32, top)
	require.NoError(t, err2(s.WriteMemory(end-16, []byte("hello, world!\x00zz"))))
	str, err := p.ReadString(end-16, 4096)
	require.NoError(t, err)
	assert.Equal(t, "hello, world!", str)
	for _, read := range []func(Addr, int) (string, error){p.ReadString, s.ReadString} {
		str, err = read(end-16, 5)
		require.ErrorIs(t, err, ErrNoTerminator)
		assert.Equal(t, "hello", str)
	}
	str, err = p.ReadString(end-2, 4096)
	require.ErrorIs(t, err, ErrNotMapped)
	assert.Equal(t, "zz", str)
	str, err = p.ReadString(end-16, 0)
	require.ErrorIs(t, err, ErrNoTerminator)
	assert.Empty(t, str)
}

func TestRegsTakeEffect(t *testing.T) {
	onBoth(t, func(t *testing.T, m *xentest.Machine, s *Session) {
		// Skip an instruction by doing its work: nothing may be noticed.
		var nop xentest.Insn
		for _, in := range m.Insns() {
			if bytes.Equal(in.Bytes, []byte{0x0f, 0x1f, 0x44, 0, 0}) {
				nop = in
			}
		}
		require.NotZero(t, nop.VA)
		var pre atomic.Int64
		p := &Probe{Addr: Addr(nop.VA), Pre: func(p *Probe, r *Regs) Action {
			r.IP += uint64(len(nop.Bytes))
			pre.Add(1)
			return Continue
		}, Post: func(*Probe, *Regs, Flags) Action {
			t.Error("the instruction was replaced: there's no after")
			return Stop
		}}
		require.NoError(t, s.Register(p))
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		done := make(chan error, 1)
		go func() { done <- s.Loop(ctx) }()
		soon(t, "hits", func() bool { return pre.Load() > 20 })
		cancel()
		<-done
	})
}

func TestDomainDies(t *testing.T) {
	for _, cfg := range []xentest.Config{{Kind: xentest.PV, GDBSX: true}, {Kind: xentest.HVM}} {
		m := xentest.New(cfg)
		m.Start()
		g, drv := attached(t, m)
		s := newSession(g.Info(), drv, nil, ErrNoSymbols, &Options{IgnoreBlacklist: true}, g.Close)
		p := &Probe{Addr: Addr(m.Symbol(entry))}
		require.NoError(t, s.Register(p))
		done := make(chan error, 1)
		go func() { done <- s.Loop(t.Context()) }()
		soon(t, "hits", func() bool { return p.Stats().Hits > 5 })
		m.Kill()
		require.ErrorIs(t, <-done, ErrDomainGone)
		require.NoError(t, s.Close(), "there is nothing left to restore")
		m.Stop()
	}
}

func TestNoRoute(t *testing.T) {
	m := xentest.New(xentest.Config{Kind: xentest.PV, GDBSX: false})
	before := m.Text()
	m.Start()
	defer m.Stop()
	g, err := target.Xen(m.Hypervisor())
	require.NoError(t, err)
	_, err = g.Attach(t.Context(), target.Setup{})
	require.ErrorIs(t, err, ErrNoGDBSX)
	assert.ErrorContains(t, err, "CONFIG_GDBSX=y")
	assert.False(t, m.Attached(), "setdebugging must not have been called")
	xentest.Verify(t, m, before)

	h := xentest.New(xentest.Config{Kind: xentest.HVM})
	g, first := attached(t, h)
	_, err = g.Attach(t.Context(), target.Setup{})
	require.ErrorIs(t, err, ErrBusy)
	require.NoError(t, newSession(g.Info(), first, nil, nil, nil, g.Close).Close())
}

// noEvents is a hypervisor without vm_event's software breakpoints.
type noEvents struct{ xen.Hypervisor }

func (noEvents) MonitorCapabilities() (xenctrl.MonitorCaps, error) { return 0, nil }

func TestNoMonitor(t *testing.T) {
	m := xentest.New(xentest.Config{Kind: xentest.HVM})
	before := m.Text()
	m.Start()
	defer m.Stop()
	g, err := target.Xen(noEvents{m.Hypervisor()})
	require.NoError(t, err)
	_, err = g.Attach(t.Context(), target.Setup{})
	require.ErrorIs(t, err, ErrNoMonitor)
	xentest.Verify(t, m, before)
}

// TestOverlap has probes inside the instruction of another one, in a guest without
// symbols, where boundaries aren't known.
func TestOverlap(t *testing.T) {
	m := xentest.New(xentest.Config{Kind: xentest.HVM})
	m.Start()
	defer m.Stop()
	g, drv := attached(t, m)
	s := newSession(g.Info(), drv, nil, ErrNoSymbols, &Options{IgnoreBlacklist: true}, g.Close)
	va := Addr(m.Symbol("nop5"))
	require.NoError(t, s.Register(&Probe{Addr: va}))
	require.ErrorIs(t, s.Register(&Probe{Addr: va + 3}), ErrOverlap)
	require.NoError(t, s.Close())
}

func TestLookup(t *testing.T) {
	_, s := simulated(t, xentest.Config{Kind: xentest.HVM, Seed: 9}, nil)
	a, err := s.Lookup(entry)
	require.NoError(t, err)
	name, off, ok := s.Symbolize(a + 2)
	assert.True(t, ok)
	assert.Equal(t, entry, name)
	assert.EqualValues(t, 2, off)
	_, err = s.Lookup("twice")
	require.ErrorIs(t, err, ErrAmbiguous)

	none := &Session{symErr: ErrNoSymbols}
	_, err = none.Lookup(entry)
	require.ErrorIs(t, err, ErrNoSymbols)
	_, _, ok = none.Symbolize(1)
	assert.False(t, ok)
}

// golden compares with testdata/name, or writes it if VMPROBES_UPDATE is set.
func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if os.Getenv("VMPROBES_UPDATE") != "" {
		require.NoError(t, os.WriteFile(path, []byte(got), 0o644))
	}
	want, err := os.ReadFile(path)
	require.NoError(t, err)
	assert.Equal(t, string(want), got)
}

func TestDumps(t *testing.T) {
	r := &Regs{BX: 1, CX: 2, DX: 3, SI: 4, DI: 5, BP: 6, AX: 7, IP: 0xffffffff8134a350, CS: 0xe030, Flags: 0x246, SP: 0xffffc90040493ab8, SS: 0xe02b,
		R8: 8, R9: 9, R10: 10, R11: 11, R12: 12, R13: 13, R14: 14, R15: 15, FSBase: 0x7f0000000000, GSBase: 0xffff888000000000, CR3: 0x102b8000}
	var b bytes.Buffer
	require.NoError(t, r.Dump(&b))
	b.WriteString(r.String() + "\n")
	require.NoError(t, (*Regs)(nil).Dump(&b))
	p := &Probe{DomainName: "a3guest", Symbol: "do_sys_openat2", Offset: 4}
	require.NoError(t, p.Dump(&b))
	b.WriteString(p.String() + "\n")
	require.NoError(t, (&Probe{DomainID: 3, Addr: 0xffffffff8134a350}).Dump(&b))
	require.NoError(t, (*Probe)(nil).Dump(&b))
	for f := range Flags(33) {
		fmt.Fprintf(&b, "%d %s\n", f, f)
	}
	golden(t, "dumps.golden", b.String())
}

func TestArguments(t *testing.T) {
	for name, c := range map[string]struct {
		p   *Probe
		err error
	}{
		"nil":             {nil, ErrNilProbe},
		"no domain":       {&Probe{Symbol: "f"}, ErrNoDomain},
		"two domains":     {&Probe{DomainID: 1, DomainName: "g", Symbol: "f"}, ErrTwoDomains},
		"control domain":  {&Probe{DomainName: "0", Symbol: "f"}, ErrControlDomain},
		"by its name":     {&Probe{DomainName: "Domain-0", Symbol: "f"}, ErrControlDomain},
		"no address":      {&Probe{DomainID: 1}, ErrNoAddress},
		"address, symbol": {&Probe{DomainID: 1, Symbol: "f", Addr: 1}, ErrTwoAddresses},
	} {
		err := Register(c.p)
		require.ErrorIs(t, err, c.err, name)
		var e *Error
		require.ErrorAs(t, err, &e, name)
		assert.Equal(t, "register", e.Op)
	}
	p := &Probe{DomainID: 1, Symbol: "f"}
	require.ErrorIs(t, Loop(t.Context(), p), ErrNotRegistered)
	require.ErrorIs(t, Loop(t.Context(), nil), ErrNilProbe)
	require.NoError(t, Unregister(p))
	require.NoError(t, Unregister(nil))
}

// TestOpenHere checks what Open says on a machine without Xen.
func TestOpenHere(t *testing.T) {
	if _, err := os.Stat("/proc/xen/capabilities"); err == nil {
		t.Skip("this machine has Xen")
	}
	_, err := Open(t.Context(), "a3guest", nil)
	require.Error(t, err)
	ok := false
	for _, want := range []error{ErrPermission, ErrNotBuilt, ErrUnsupportedPlatform, ErrLibraryNotFound, ErrNotControlDomain} {
		ok = ok || errors.Is(err, want)
	}
	assert.True(t, ok, "%v", err)
	_, err = Open(t.Context(), "", nil)
	require.ErrorIs(t, err, ErrNoDomain)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = Open(ctx, "a3guest", nil)
	require.ErrorIs(t, err, context.Canceled)
}

// TestOpenNamed: a file that the caller has named and that is of no use ends Open before
// it attaches, which fails otherwise here.
func TestOpenNamed(t *testing.T) {
	image := "file:" + kerneltest.NewSynthetic(kerneltest.Layout{}).WriteImage(t)
	noise := filepath.Join(t.TempDir(), "noise")
	require.NoError(t, os.WriteFile(noise, []byte("noise {"), 0o600))
	for name, opts := range map[string]*Options{
		"symbols": {Symbols: noise}, "types": {Types: noise}, "config": {Config: noise},
		"no symbols": {Symbols: noise + "s"}, "no types": {Types: noise + "s"}, "no config": {Config: noise + "s"},
	} {
		_, err := Open(t.Context(), image, opts)
		require.Error(t, err, name)
		assert.NotErrorIs(t, err, ErrImage, name)
		assert.ErrorContains(t, err, noise, name)
	}
	for name, opts := range map[string]*Options{"nil": nil, "none": {}, "config": {Config: "-"}} {
		_, err := Open(t.Context(), image, opts)
		assert.ErrorIs(t, err, ErrImage, name)
	}
}

// TestSyscallArg reads arguments from struct pt_regs, whose registers are numbered here:
// r15, r14, r13, r12, bp, bx, r11, r10, r9, r8, ax, cx, dx, si, di.
func TestSyscallArg(t *testing.T) {
	guest := kerneltest.NewSynthetic(kerneltest.Layout{})
	k := lookedAt(t, guest, Options{}).kernel
	regs := make([]byte, 168)
	for i := range 21 {
		binary.LittleEndian.PutUint64(regs[8*i:], 1<<63|uint64(i))
	}
	const r8, r9, r10, cx, dx, si, di, bx, bp = 9, 8, 7, 11, 12, 13, 14, 5, 4
	mem := func(addr uint64, b []byte) error {
		copy(b, regs[addr-0x1000:])
		return nil
	}
	for at, want := range map[string][]uint64{
		"__x64_sys_openat":         {di, si, dx, r10, r8, r9},
		"__ia32_sys_openat":        {bx, cx, dx, si, di, bp},
		"__ia32_compat_sys_openat": {bx, cx, dx, si, di, bp},
	} {
		r := &Regs{DI: 0x1000, IP: guest.Sym[at], mem: mem, kernel: k}
		for n, reg := range want {
			v, err := r.SyscallArg(n)
			require.NoError(t, err, at)
			if strings.HasPrefix(at, "__x64_") {
				reg |= 1 << 63
			}
			assert.Equal(t, reg, v, "%s, %d", at, n)
		}
		for _, n := range []int{-1, 6} {
			_, err := r.SyscallArg(n)
			require.Error(t, err)
		}
		r.IP, r.entry = r.IP+5, r.IP // a Post handler
		v, err := r.SyscallArg(0)
		require.NoError(t, err)
		assert.Equal(t, want[0], v&^(1<<63))
	}
	// A function of old kernels.
	r := &Regs{DI: 1, CX: 4, IP: guest.Sym["sys_old"], mem: mem, kernel: k}
	v, err := r.SyscallArg(3)
	require.NoError(t, err)
	assert.EqualValues(t, 4, v)
	_, err = r.SyscallArg(6)
	require.Error(t, err)

	r.IP = kerneltest.Fn(1)
	_, err = r.SyscallArg(0)
	require.ErrorIs(t, err, linux.ErrNoWrapper)
	r.IP = guest.Sym["__x64_sys_openat"] + 1
	_, err = r.SyscallArg(0)
	require.ErrorIs(t, err, linux.ErrNoWrapper)
	_, err = (&Regs{mem: mem}).SyscallArg(0)
	require.ErrorIs(t, err, ErrNoKernel)
	_, err = (&Regs{}).SyscallArg(0)
	require.ErrorIs(t, err, errNoHit)
	q := &Regs{DI: 1, SI: 2, DX: 3, CX: 4, R8: 5, R9: 6}
	for n := range 6 {
		assert.EqualValues(t, n+1, q.Arg(n))
	}
	assert.Zero(t, q.Arg(6))
	assert.Zero(t, q.Arg(-1))
}

func TestParseProbe(t *testing.T) {
	for place, want := range map[string]*Probe{
		"do_sys_openat2":         {Symbol: "do_sys_openat2"},
		"do_sys_openat2+0x1f":    {Symbol: "do_sys_openat2", Offset: 0x1f},
		"xfs:open@2+12":          {Symbol: "xfs:open@2", Offset: 12},
		"open+010":               {Symbol: "open", Offset: 10}, // as decimal as it says
		"0xffffffff8134a350":     {Addr: 0xffffffff8134a350},
		"0xFFFFFFFF8134A350+0xA": {Addr: 0xffffffff8134a350, Offset: 10},
	} {
		p, err := ParseProbe(place)
		require.NoError(t, err, place)
		assert.Equal(t, want, p, place)
		again, err := ParseProbe(p.String())
		require.NoError(t, err, place)
		assert.Equal(t, p, again, place)
	}
	for _, place := range []string{
		"", "+4", "open+", "open+-4", "open+0x", "open+4+4", "open+1_0", "open+0b1", "open+0o7", "open+18446744073709551616",
		"0x", "0x0", "0x1_0", "0xffffffff8134a3500", "0xopen",
	} {
		_, err := ParseProbe(place)
		var e *Error
		require.ErrorAs(t, err, &e, place)
		assert.Equal(t, place, e.Probe)
	}
}
