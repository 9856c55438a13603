package linux_test

import (
	"bytes"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/kerneltest"
	"github.com/vmprobes/vmprobes/internal/x86"
	"github.com/vmprobes/vmprobes/linux"
)

// cetMachine is a guest whose second vCPU tracks indirect branches.
type cetMachine struct {
	*kerneltest.Machine
	err error
}

func (m cetMachine) CPUs() ([]linux.CPU, error) {
	cpus, err := m.Machine.CPUs()
	cpu := cpus[0]
	cpu.CR4 |= 1 << 23
	return append(cpus, cpu), errors.Join(err, m.err)
}

func TestProbePoint(t *testing.T) {
	s := kerneltest.NewSynthetic(kerneltest.Layout{})
	k := discover(t, s)
	cet, err := linux.Discover(t.Context(), cetMachine{s.Machine(), nil}, nil)
	require.NoError(t, err)
	fn, text := kerneltest.Fn, s.Sym["text demo"]
	for _, c := range []struct {
		addr, at uint64
		why      string
		cet      string // with CR4.CET, if that makes it impossible
	}{
		{fn(1), fn(1), "", ""},
		{fn(1) + 3, fn(1) + 3, "", ""},
		{fn(400), fn(400) + 5, "", ""},
		{fn(400) + 5, fn(400) + 5, "", ""},
		{fn(410), fn(410) + 5, "", ""}, // is traced
		{fn(411), fn(411) + 9, "", ""}, // ENDBR64 before it
		{fn(411) + 4, fn(411) + 9, "", ""},
		{fn(480), fn(480) + 9, "", ""}, // a NOP that was one
		{fn(500), fn(500) + 4, "", ""}, // not traced
		{fn(520), fn(520), "", ""},     // any call
		{text + 0x200, text + 0x205, "", ""},
		{text + 0x205, text + 0x205, "", ""},
		// What follows it won't do, but the ENDBR64 itself.
		{fn(470), fn(470), "", `the branch at "fn_0470"+0xa leads there`},
		{fn(470) + 4, 0, `the branch at "fn_0470"+0xa leads there`, ""},
		{fn(430), 0, "jump label", ""},
		{fn(440), 0, `the branch at "fn_0440"+0x7 leads there`, ""},
		{fn(450), 0, `the branch at "fn_0450.cold"+0x0 leads there`, ""},
		{fn(460), 0, "a jump label leads there", ""},
		{fn(490), 0, "a jump elsewhere", ""},
		{fn(400) + 1, 0, "ftrace", ""},
		{fn(411) + 1, 0, "not an instruction boundary", ""},
		{fn(200), 0, "kprobe blacklist", ""},
		{fn(300), 0, "jump label", ""},
		{fn(510) + 8, 0, `a breakpoint of the guest's own at "fn_0510"+0x5`, ""},
		{fn(530) + 3, fn(530) + 3, "", ""},
		{text + 0x100, 0, "jump label", ""},
		{text + 0x150, 0, "kprobe blacklist", ""},
		{1, 0, "not in the text", ""},
	} {
		at, err := k.ProbePoint(c.addr)
		if c.why == "" {
			if assert.NoError(t, err, "%#x", c.addr) {
				assert.Equal(t, c.at, at, "%#x", c.addr)
				assert.NoError(t, k.Probeable(at))
			}
		} else {
			require.ErrorIs(t, err, linux.ErrNotProbeable, "%#x", c.addr)
			assert.ErrorContains(t, err, c.why)
		}
		at, err = cet.ProbePoint(c.addr)
		if c.cet != "" {
			require.ErrorIs(t, err, linux.ErrNotProbeable)
			assert.ErrorContains(t, err, c.cet)
			assert.ErrorContains(t, err, "CR4.CET")
		} else if c.why == "" {
			require.NoError(t, err)
			assert.Equal(t, c.at, at, "%#x", c.addr)
		}
	}
	unknown, err := linux.Discover(t.Context(), &lateMachine{Machine: s.Machine()}, nil)
	require.NoError(t, err)
	_, err = unknown.ProbePoint(fn(470))
	require.ErrorIs(t, err, errNoRegisters)

	// While the guest rewrites it.
	s.Bytes(fn(400))[0] = 0xcc
	_, err = k.ProbePoint(fn(400))
	require.ErrorIs(t, err, linux.ErrNotProbeable)
	assert.ErrorContains(t, err, "is rewriting ftrace's instruction")
}

var errNoRegisters = errors.New("no registers now")

// lateMachine has registers only at first.
type lateMachine struct {
	*kerneltest.Machine
	n int
}

func (m *lateMachine) CPUs() ([]linux.CPU, error) {
	if m.n++; m.n > 1 {
		return nil, errNoRegisters
	}
	return m.Machine.CPUs()
}

// TestOverlay has breakpoints of the caller's own in the text.
func TestOverlay(t *testing.T) {
	s := kerneltest.NewSynthetic(kerneltest.Layout{})
	fn := kerneltest.Fn
	copy(s.Bytes(fn(600)), []byte{0x48, 0x89, 0xc3, 0x48, 0x89, 0xc3, 0x90}) // mov %rax,%rbx, twice
	k := discover(t, s)
	under := map[uint64]byte{fn(600): s.Bytes(fn(600))[0], fn(400): s.Bytes(fn(400))[0], fn(301): s.Bytes(fn(301))[0]}
	require.NoError(t, k.Probeable(fn(600)+3))
	require.NoError(t, k.Probeable(fn(301)+2))
	for a := range under {
		s.Bytes(a)[0] = 0xcc
	}
	require.ErrorIs(t, k.Probeable(fn(600)+3), linux.ErrNotProbeable)
	require.ErrorIs(t, k.Probeable(fn(301)+2), linux.ErrNotProbeable)
	k.SetOverlay(func(addr uint64, b []byte) {
		for a, c := range under {
			if off := a - addr; off < uint64(len(b)) {
				b[off] = c
			}
		}
	})
	require.NoError(t, k.Probeable(fn(600)+3))
	require.NoError(t, k.Probeable(fn(301)+2), "a short jump label")
	err := k.Probeable(fn(600) + 1)
	require.ErrorIs(t, err, x86.ErrNotBoundary)
	require.ErrorIs(t, err, linux.ErrNotProbeable)
	at, err := k.ProbePoint(fn(400))
	require.NoError(t, err)
	assert.Equal(t, fn(400)+5, at)
	k.SetOverlay(nil)
	require.Error(t, k.Probeable(fn(600)+3))
}

func TestExpectedFault(t *testing.T) {
	for name, l := range layouts {
		s := kerneltest.NewSynthetic(l)
		k := discover(t, s)
		fn, text := kerneltest.Fn, s.Sym["text demo"]
		for addr, want := range map[uint64]bool{
			fn(330): true, fn(331): false, fn(331) + 3: true, fn(1): false,
			text + 0x130: true, text + 0x131: false, text: false,
			// Nobody knows.
			1: true, s.Sym["init_task"]: true, 0xffffffffc000f000: true, s.Sym["text unformed"]: true,
		} {
			assert.Equal(t, want, k.ExpectedFault(addr), "%s: %#x", name, addr)
		}
		require.NoError(t, k.FaultsKnown(fn(1)))
		require.NoError(t, k.FaultsKnown(text))
		require.ErrorIs(t, k.FaultsKnown(1), linux.ErrNotProbeable)

		s.Put32(s.Sym["module demo"]+kerneltest.ModuleExTable+8, 1<<31)
		assert.True(t, k.ExpectedFault(text), "its table can't be read")
		require.ErrorIs(t, k.FaultsKnown(text), linux.ErrBadKernel)
		require.NoError(t, k.Probeable(text), "which doesn't matter for a breakpoint")
	}
	k := discover(t, kerneltest.NewSynthetic(kerneltest.Layout{NoData: true}))
	assert.True(t, k.ExpectedFault(kerneltest.Fn(1)))
	require.Error(t, k.FaultsKnown(kerneltest.Fn(1)))
}

// TestFailClosed has kernels of which not all tables are known.
func TestFailClosed(t *testing.T) {
	// CONFIG_KALLSYMS_ALL=n: the code that uses the tables is there, they aren't.
	s := kerneltest.NewSynthetic(kerneltest.Layout{NoData: true})
	k := discover(t, s)
	err := k.Probeable(kerneltest.Fn(1))
	require.ErrorIs(t, err, linux.ErrUnknownPlaces)
	require.ErrorIs(t, err, linux.ErrNotProbeable)
	for _, what := range []string{"blacklist entries", "jump labels", "static calls", "ftrace sites", "LOCK prefixes"} {
		assert.ErrorContains(t, err, "the table of "+what)
	}
	requirePrintable(t, err.Error())
	_, err = k.ProbePoint(kerneltest.Fn(1))
	require.ErrorIs(t, err, linux.ErrUnknownPlaces)
	err = k.Probeable(s.Sym["text demo"])
	require.ErrorIs(t, err, linux.ErrUnknownPlaces)
	assert.ErrorContains(t, err, "of modules isn't known")

	// A kernel without static calls isn't one whose static calls aren't known.
	s = kerneltest.NewSynthetic(kerneltest.Layout{NoStaticCalls: true})
	k = discover(t, s)
	require.NoError(t, k.Probeable(kerneltest.Fn(310)))
	require.ErrorContains(t, k.Probeable(kerneltest.Fn(300)), "jump label")
	require.NoError(t, k.Probeable(s.Sym["text demo"]+0x120))
	require.ErrorContains(t, k.Probeable(s.Sym["text demo"]+0x100), "jump label")

	// A module's table that can't be read is no matter for others.
	s = kerneltest.NewSynthetic(kerneltest.Layout{})
	k = discover(t, s)
	s.Put64(s.Sym["module demo"]+kerneltest.ModuleStaticCalls, 0xffffc90000000000)
	err = k.Probeable(s.Sym["text demo"])
	require.ErrorIs(t, err, linux.ErrUnknownPlaces)
	assert.ErrorContains(t, err, `the table of static calls of module "demo"`)
	require.NoError(t, k.Probeable(s.Sym["text older"]))
	require.NoError(t, k.Probeable(kerneltest.Fn(1)))
}

// TestBooting has a guest that comes up while it is looked at.
func TestBooting(t *testing.T) {
	s := kerneltest.NewSynthetic(kerneltest.Layout{})
	s.Put32(s.Sym["system_state"], 1)
	first := s.Get64(s.Sym["ftrace_pages_start"])
	s.Put64(s.Sym["ftrace_pages_start"], 0) // not made yet
	k := discover(t, s)
	err := k.Probeable(kerneltest.Fn(1))
	require.ErrorIs(t, err, linux.ErrNotProbeable)
	assert.ErrorContains(t, err, "still booting")
	_, err = k.Functions("*")
	require.ErrorContains(t, err, "still booting")
	s.Put32(s.Sym["system_state"], 2)
	s.Put64(s.Sym["ftrace_pages_start"], first)
	err = k.Probeable(kerneltest.Fn(1))
	require.ErrorIs(t, err, linux.ErrUnknownPlaces)
	assert.ErrorContains(t, err, "while the kernel booted", "what was read before isn't all")
	linux.RetrySafety(0)
	defer linux.RetrySafety(5 * time.Second)
	assert.ErrorContains(t, k.Probeable(kerneltest.Fn(400)+1), "ftrace")
	require.NoError(t, k.Probeable(kerneltest.Fn(1)))
}

// TestLocks brings up the second CPU.
func TestLocks(t *testing.T) {
	s := kerneltest.NewSynthetic(kerneltest.Layout{})
	k := discover(t, s)
	for _, addr := range []uint64{kerneltest.Fn(320), s.Sym["text demo"] + 0x140} {
		require.ErrorContains(t, k.Probeable(addr), "LOCK prefix")
	}
	s.Put32(s.Sym["uniproc_patched"], 0)
	for _, addr := range []uint64{kerneltest.Fn(320), s.Sym["text demo"] + 0x140} {
		require.NoError(t, k.Probeable(addr))
	}
	// One that never had to: its list is of no matter, and may be anything.
	s.Put64(s.Sym["smp_alt_modules"], 1)
	k = discover(t, s)
	require.NoError(t, k.Probeable(kerneltest.Fn(320)))
}

// TestModulesComeAndGo has other tables at the same place.
func TestModulesComeAndGo(t *testing.T) {
	s := kerneltest.NewSynthetic(kerneltest.Layout{})
	k := discover(t, s)
	m, text := s.Sym["module demo"], s.Sym["text demo"]
	require.NoError(t, k.Probeable(text+0x180))
	require.Error(t, k.Probeable(text+0x100))
	// Another build of the same module, at the same place.
	e := s.Get64(m + kerneltest.ModuleJumpEntries)
	s.Put32(e, uint32(text+0x180-e))
	require.ErrorContains(t, k.Probeable(text+0x180), "jump label")
	require.NoError(t, k.Probeable(text+0x100))
	for _, state := range []uint32{1, 2, 3} { // it is being loaded, unloaded, made
		s.Put32(m, state)
		err := k.Probeable(text + 0x100)
		require.ErrorIs(t, err, linux.ErrNotProbeable)
		assert.ErrorContains(t, err, "or of a module that runs")
		assert.True(t, k.ExpectedFault(text+0x100))
	}
	s.Put32(m, 0)
	require.NoError(t, k.Probeable(text+0x100))
	s.Bytes(m + kerneltest.ModuleKlp)[0] = 1
	require.ErrorContains(t, k.Probeable(text+0x100), "live patch")
	s.Bytes(m + kerneltest.ModuleKlp)[0] = 0
	// Unloaded.
	next, prev := s.Get64(m+kerneltest.ModuleList), s.Get64(m+kerneltest.ModuleList+8)
	s.Put64(prev, next)
	s.Put64(next+8, prev)
	require.ErrorIs(t, k.Probeable(text+0x100), linux.ErrNotProbeable)
	assert.True(t, k.ExpectedFault(text+0x100))
	require.NoError(t, k.Probeable(s.Sym["text older"]))
	// Loaded when the session has been open for a while.
	s.Put64(prev, m+kerneltest.ModuleList)
	s.Put64(next+8, m+kerneltest.ModuleList)
	require.NoError(t, k.Probeable(text+0x100))
	require.ErrorContains(t, k.Probeable(text+0x180), "jump label")
	assert.True(t, k.ExpectedFault(text+0x130))
}

// TestDeadCode checks every proposal against the text.
func TestDeadCode(t *testing.T) {
	s := kerneltest.NewSynthetic(kerneltest.Layout{})
	k := discover(t, s)
	type piece struct{ addr, size uint64 }
	var all []piece
	k.DeadCode(func(addr, size uint64) bool {
		all = append(all, piece{addr, size})
		assert.Equal(t, bytes.Repeat([]byte{0xcc}, int(size)), s.Bytes(addr)[:size])
		return false
	})
	entry := uint64(kerneltest.SyntheticEntry)
	require.NotEmpty(t, all)
	assert.Equal(t, piece{entry + 0x100 + 64, 512}, all[0], "behind the entry code")
	total := map[bool]uint64{}
	slices.SortFunc(all, func(a, b piece) int { return int(int64(a.addr - b.addr)) })
	all = slices.Compact(all)
	for i, p := range all {
		behind := p.addr >= entry
		total[behind] += p.size
		if behind {
			assert.GreaterOrEqual(t, p.addr, entry+0x100)
			assert.LessOrEqual(t, p.addr+p.size, entry+0x100+kerneltest.SyntheticDead-64)
		} else {
			assert.GreaterOrEqual(t, p.addr, entry-kerneltest.SyntheticDead+64)
			assert.LessOrEqual(t, p.addr+p.size, entry-64)
		}
		if i > 0 {
			assert.GreaterOrEqual(t, p.addr, all[i-1].addr+all[i-1].size, "they overlap")
		}
	}
	assert.Equal(t, map[bool]uint64{false: kerneltest.SyntheticDead - 128, true: kerneltest.SyntheticDead - 128}, total)
	n := 0
	k.DeadCode(func(uint64, uint64) bool { n++; return n == 3 })
	assert.Equal(t, 3, n)
	linux.DeadCodeWithoutSymbols(func(uint64, uint64) bool { panic("without symbols") })
}

// TestMayFault is what the engine asks, with the risk taken and without.
func TestMayFault(t *testing.T) {
	s := kerneltest.NewSynthetic(kerneltest.Layout{})
	k := discover(t, s)
	fn, text := kerneltest.Fn, s.Sym["text demo"]
	for _, force := range []bool{false, true} {
		may := k.MayFault(force)
		for addr, want := range map[uint64]bool{fn(330): true, fn(1): false, text + 0x130: true, text + 0x131: false, s.Sym["init_task"]: !force} {
			assert.Equal(t, want, may(addr), "%#x, %v", addr, force)
		}
	}
	s.Put32(s.Sym["module demo"]+kerneltest.ModuleExTable+8, 1<<30)
	assert.True(t, k.MayFault(false)(text))
	assert.False(t, k.MayFault(true)(text), "the risk was taken")
	assert.True(t, k.MayFault(true)(fn(330)), "what is known stays so")

	k = discover(t, kerneltest.NewSynthetic(kerneltest.Layout{NoData: true}))
	assert.Nil(t, k.MayFault(false))
	assert.Nil(t, k.MayFault(true))
}

// TestPlace has probes of every kind: seen by the guest or not, at the caller's risk
// or not.
func TestPlace(t *testing.T) {
	s := kerneltest.NewSynthetic(kerneltest.Layout{})
	k := discover(t, s)
	fn, text := kerneltest.Fn, s.Sym["text demo"]
	const refused = 0
	for _, c := range []struct{ addr, at, hidden, force uint64 }{
		{fn(1), fn(1), fn(1), fn(1)},
		{fn(400), fn(400) + 5, fn(400), fn(400) + 5},
		{fn(411), fn(411) + 9, fn(411), fn(411) + 9},
		{fn(200), refused, refused, fn(200)},
		{fn(300), refused, refused, fn(300)},
		{fn(430), refused, fn(430), fn(430)},
		{fn(510) + 8, refused, refused, fn(510) + 8}, // a probe of the guest's own before it
		{text + 0x100, refused, refused, text + 0x100},
		{s.Sym["init_task"], refused, refused, s.Sym["init_task"]},
		{fn(411) + 1, refused, refused, refused}, // inside an instruction
	} {
		for want, how := range map[*uint64]linux.Placing{&c.at: {}, &c.hidden: {Hidden: true}, &c.force: {Force: true}} {
			at, err := k.Place(c.addr, how)
			if *want == refused {
				require.ErrorIs(t, err, linux.ErrNotProbeable, "%#x, %+v", c.addr, how)
				continue
			}
			require.NoError(t, err, "%#x, %+v", c.addr, how)
			assert.Equal(t, *want, at, "%#x, %+v", c.addr, how)
		}
	}
	_, err := k.Place(fn(411)+1, linux.Placing{Force: true})
	require.ErrorIs(t, err, x86.ErrNotBoundary)

	// Its exception table isn't known.
	s.Put32(s.Sym["module demo"]+kerneltest.ModuleExTable+8, 1<<30)
	_, err = k.Place(text, linux.Placing{})
	require.ErrorIs(t, err, linux.ErrUnknownPlaces)
	assert.ErrorContains(t, err, `the exception table of module "demo"`)
	at, err := k.Place(text, linux.Placing{Force: true})
	require.NoError(t, err)
	assert.Equal(t, text, at)
}

// TestPlaceReadsOnce: the tables of a module, of which nothing is kept, are read once
// for a place, and once to tell whether a fault is expected.
func TestPlaceReadsOnce(t *testing.T) {
	s := kerneltest.NewSynthetic(kerneltest.Layout{})
	m := s.Machine()
	k, err := linux.Discover(t.Context(), m, nil)
	require.NoError(t, err)
	text := s.Sym["text demo"]
	cost := func(f func()) uint64 {
		f() // what is kept is there from now on
		before := accesses(m)
		f()
		return accesses(m) - before
	}
	known := cost(func() { require.NoError(t, k.FaultsKnown(text)) })
	require.NotZero(t, known)
	for _, how := range []linux.Placing{{}, {Hidden: true}, {Force: true}} {
		place := cost(func() {
			_, err := k.Place(text, how)
			require.NoError(t, err)
		})
		assert.Less(t, place, known*5/2, "%+v: what is known, the symbols that it takes and the code", how)
	}
	assert.Equal(t, known, cost(func() { k.MayFault(true)(text) }))
}
