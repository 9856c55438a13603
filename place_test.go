package vmprobes

import (
	"errors"
	"fmt"
	"log/slog"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/kerneltest"
	"github.com/vmprobes/vmprobes/internal/target"
	"github.com/vmprobes/vmprobes/internal/xentest"
	"github.com/vmprobes/vmprobes/linux"
	"github.com/vmprobes/vmprobes/xenaccess"
)

// untouched is the driver of a guest that can be read. Whatever else is asked of it
// ends the test.
type untouched struct {
	target.Driver
	read func(addr uint64, b []byte) error
}

func (untouched) Caps() breakpoint.Caps { return breakpoint.Caps{VCPUs: 1} }

func (d untouched) Read(_, addr uint64, b []byte) (int, error) {
	if err := d.read(addr, b); err != nil {
		return 0, err
	}
	return len(b), nil
}

// lookedAt is a Session with a guest whose memory is in a file, and in which nothing
// runs.
func lookedAt(t *testing.T, s *kerneltest.Synthetic, opts Options) *Session {
	t.Helper()
	image, err := target.Open(t.Context(), "file:"+s.WriteImage(t))
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, image.Close()) })
	g, err := xenaccess.Open(target.WithOpened(t.Context(), image), "image", &xenaccess.Options{Config: "-", Cache: "-", Lax: true})
	require.NoError(t, err)
	k := g.Linux()
	drv := untouched{read: func(uint64, []byte) error { return errors.New("nothing can be read") }}
	if k != nil {
		drv.read = k.Read
	}
	session := &Session{guest: g, kernel: k, drv: drv, unsafe: opts.IgnoreBlacklist, symErr: g.Err(), log: slog.New(slog.DiscardHandler), done: make(chan struct{})}
	session.eng = breakpoint.New(drv, breakpoint.Config{MayFault: k.MayFault(opts.IgnoreBlacklist)})
	return session
}

// placeOf is what Register does before it touches the guest.
func placeOf(s *Session, p *Probe) (addr, at Addr, err error) {
	if addr, err = s.resolve(p); err == nil {
		at, err = s.place(addr)
	}
	return addr, at, err
}

// TestPlaces refuses places before the guest is touched, by what it says of itself,
// and what it doesn't say.
func TestPlaces(t *testing.T) {
	guest := kerneltest.NewSynthetic(kerneltest.Layout{})
	fn, text := kerneltest.Fn, guest.Sym["text demo"]
	s := lookedAt(t, guest, Options{})
	for addr, want := range map[uint64]uint64{
		fn(1): fn(1), fn(400): fn(400) + 5, fn(411): fn(411) + 9, text: text, text + 0x180: text + 0x180, text + 0x200: text + 0x205,
	} {
		found, at, err := placeOf(s, &Probe{Addr: Addr(addr)})
		require.NoError(t, err)
		assert.EqualValues(t, addr, found)
		assert.EqualValues(t, want, at)
	}
	for addr, why := range map[uint64]string{
		fn(200): "kprobe blacklist", fn(300): "jump label", fn(310): "static call", fn(320): "LOCK prefix", fn(100): "noinstr",
		text + 0x100: "jump label", text + 0x120: "static call", text + 0x140: "LOCK prefix", text + 0x150: "kprobe blacklist",
		text + 0x160: "noinstr", guest.Sym["init_task"]: "not in the text", guest.Sym["text unformed"]: "not in the text",
	} {
		err := s.Register(&Probe{Addr: Addr(addr)})
		require.ErrorIs(t, err, ErrNotProbeable, "%#x", addr)
		require.ErrorContains(t, err, why)
	}
	err := s.Register(&Probe{Addr: Addr(fn(411) + 1)})
	require.ErrorIs(t, err, ErrNotBoundary)
	require.ErrorIs(t, err, ErrNotProbeable)

	// The risk is the user's.
	s = lookedAt(t, guest, Options{IgnoreBlacklist: true})
	for _, addr := range []uint64{fn(200), fn(300), text + 0x100, guest.Sym["init_task"]} {
		_, _, err := placeOf(s, &Probe{Addr: Addr(addr)})
		require.NoError(t, err)
	}
	_, _, err = placeOf(s, &Probe{Addr: Addr(fn(411) + 1)})
	require.ErrorIs(t, err, ErrNotBoundary, "there is no use in that")
}

// TestOffset refuses what isn't in the function that is named.
func TestOffset(t *testing.T) {
	guest := kerneltest.NewSynthetic(kerneltest.Layout{})
	text := guest.Sym["text demo"]
	for _, opts := range []Options{{}, {IgnoreBlacklist: true}} {
		s := lookedAt(t, guest, opts)
		for _, c := range []struct {
			symbol       string
			offset, want uint64
		}{
			{"fn_0001", 0, kerneltest.Fn(1)}, {"fn_0001", 15, kerneltest.Fn(1) + 15},
			{"demo_run", 0x100, text + 0x110}, {"part:fn_0001", 3, kerneltest.Fn(1) + 3},
		} {
			at, err := s.resolve(&Probe{Symbol: c.symbol, Offset: c.offset})
			require.NoError(t, err, c)
			assert.Equal(t, c.want, at, c)
		}
		for _, c := range []struct {
			symbol string
			offset uint64
			why    string
		}{
			{"fn_0001", 16, `"fn_0001" has 16 bytes, and 0x10 is asked for: that is in "fn_0002", at 0x0`},
			{"fn_0001", 1 << 20, "has 16 bytes"}, {"fn_0001", 1<<64 - 1, "has 16 bytes"},
			{"demo_run", 0x1f0, `that is in "demo_traced", at 0x0`},
		} {
			err := s.Register(&Probe{Symbol: c.symbol, Offset: c.offset})
			require.ErrorIs(t, err, ErrOffset, c)
			require.ErrorContains(t, err, c.why)
		}
		err := s.Register(&Probe{Symbol: "__pfx_fn_0540"})
		require.ErrorIs(t, err, ErrNotProbeable)
		require.ErrorContains(t, err, `probe "fn_0540"`)
	}
}

// TestPlacesUnknown: what the guest doesn't tell is no permission.
func TestPlacesUnknown(t *testing.T) {
	fn := kerneltest.Fn
	refused := func(s *Session, addr uint64, why ...string) {
		t.Helper()
		err := s.Register(&Probe{Addr: Addr(addr)})
		require.ErrorIs(t, err, ErrNotProbeable)
		for _, w := range append(why, "Options.IgnoreBlacklist") {
			require.ErrorContains(t, err, w)
		}
		s.unsafe = true
		_, _, err = placeOf(s, &Probe{Addr: Addr(addr)})
		require.NoError(t, err)
	}
	// CONFIG_KALLSYMS_ALL=n.
	s := lookedAt(t, kerneltest.NewSynthetic(kerneltest.Layout{NoData: true}), Options{})
	refused(s, fn(1), "the table of jump labels", "the table of ftrace sites")

	// A kernel without static calls is another thing.
	s = lookedAt(t, kerneltest.NewSynthetic(kerneltest.Layout{NoStaticCalls: true}), Options{})
	_, _, err := placeOf(s, &Probe{Addr: Addr(fn(310))})
	require.NoError(t, err)

	// Tables that can't be read: a list, the exception table, a module's.
	guest := kerneltest.NewSynthetic(kerneltest.Layout{})
	guest.Put64(guest.Sym["kprobe_blacklist"], 8)
	refused(lookedAt(t, guest, Options{}), fn(1), "the table of blacklist entries")

	guest = kerneltest.NewSynthetic(kerneltest.Layout{NoTypes: true})
	s = lookedAt(t, guest, Options{})
	refused(s, guest.Sym["text demo"], "of modules")

	guest = kerneltest.NewSynthetic(kerneltest.Layout{})
	guest.Put32(guest.Sym["module demo"]+kerneltest.ModuleJumpEntries+8, 1<<30)
	refused(lookedAt(t, guest, Options{}), guest.Sym["text demo"], `the table of jump labels of module "demo"`)

	guest = kerneltest.NewSynthetic(kerneltest.Layout{})
	guest.Put32(guest.Sym["module demo"]+kerneltest.ModuleExTable+8, 1<<30)
	s = lookedAt(t, guest, Options{})
	refused(s, guest.Sym["text demo"], `the exception table of module "demo"`)

	// No kernel at all.
	s = lookedAt(t, kerneltest.NewSynthetic(kerneltest.Layout{NoSymbols: true}), Options{})
	require.Nil(t, s.guest.Linux())
	err = s.Register(&Probe{Addr: Addr(fn(1))})
	require.ErrorIs(t, err, ErrNoSymbols)
	refused(s, fn(1))
	require.NotErrorIs(t, err, linux.ErrUnknownPlaces)
}

// TestOwnBreakpoints decodes functions with and without breakpoints of the Session's
// own in them: the answers must be the same, through the Session and through its
// guest's kernel.
func TestOwnBreakpoints(t *testing.T) {
	onBoth(t, func(t *testing.T, m *xentest.Machine, s *Session) {
		// Instructions of more than one byte, each followed by others of its function.
		var under []*Probe
		insns := m.Insns()
		for i, in := range insns {
			if name, off, ok := s.Symbolize(Addr(in.VA)); ok && len(in.Bytes) > 1 && i+1 < len(insns) && insns[i+1].Func == in.Func {
				p := &Probe{Symbol: name, Offset: off}
				if s.Register(p) == nil {
					under = append(under, p)
				}
			}
			if len(under) == 12 {
				break
			}
		}
		require.Len(t, under, 12)
		visible := 0
		for _, site := range s.eng.Sites() {
			if m.Peek(site.Addr, 1)[0] == 0xcc && site.Orig[0] != 0xcc {
				visible++
			}
		}
		require.Greater(t, visible, 9, "they must be in the guest's memory")
		answers := func() (all []string) {
			for addr := uint64(xentest.TextBase); addr < xentest.TextBase+0x800; addr++ {
				all = append(all, fmt.Sprint(s.kernel.Boundary(addr)))
			}
			return all
		}
		with := answers()
		require.NoError(t, s.Unregister(under...))
		require.Equal(t, answers(), with)
		assert.Contains(t, with, "<nil>")
	})
}
