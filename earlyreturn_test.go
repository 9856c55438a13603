package vmprobes

import (
	"bytes"
	"encoding/binary"
	"errors"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/kerneltest"
	"github.com/vmprobes/vmprobes/internal/xentest"
	"github.com/vmprobes/vmprobes/linux"
)

// asIf has the simulated guest count what wrap, and inner that it calls, would have counted: a
// guest whose counts don't agree is taken for one that was harmed.
func asIf(t *testing.T, m *xentest.Machine) func(r *Regs, p *Probe) {
	t.Helper()
	var at []uint64
	for _, in := range m.Insns() {
		if (in.Func == "wrap" || in.Func == "inner") && bytes.HasPrefix(in.Bytes, []byte{0x65, 0x48, 0xff, 0x04, 0x25}) { // incq %gs:…
			at = append(at, uint64(binary.LittleEndian.Uint32(in.Bytes[5:])))
		}
	}
	require.Len(t, at, 3)
	return func(r *Regs, p *Probe) {
		for _, offset := range at {
			v, err := p.ReadUint64(r.GSBase + offset)
			assert.NoError(t, err)
			_, err = p.WriteMemory(r.GSBase+offset, binary.LittleEndian.AppendUint64(nil, v+1))
			assert.NoError(t, err)
		}
	}
}

// TestEarlyReturn has a function return before its first instruction: from a Pre handler, from a
// return probe's Entry and from the body of a range over Hits.
func TestEarlyReturn(t *testing.T) {
	for _, from := range []string{"pre", "entry", "hits"} {
		t.Run(from, func(t *testing.T) {
			onReturns(t, &Options{AllowReturn: true}, func(t *testing.T, m *xentest.Machine, s *Session) {
				require.NoError(t, quiesced(t, m))
				instead := asIf(t, m)
				early := func(p *Probe, r *Regs) {
					sp := r.SP
					ret, err := p.ReadUint64(sp)
					assert.NoError(t, err)
					assert.NoError(t, r.Return(0x77))
					assert.True(t, r.IP == ret && r.SP == sp+8 && r.Result() == 0x77, "%v", r)
					assert.ErrorIs(t, r.Return(1), ErrNotEntry, "again")
					instead(r, p)
				}
				skipped := 0
				// follows sees the entry, and late doesn't.
				follows := &ReturnProbe{Symbol: "wrap", Return: func(a *Activation, r *Regs) Action {
					assert.True(t, a.Skipped())
					assert.EqualValues(t, 0x77, r.Result())
					assert.Equal(t, a.ReturnAddress(), r.PC())
					assert.ErrorIs(t, r.Return(1), ErrNotEntry)
					skipped++
					return Continue
				}}
				late := &Probe{Symbol: "wrap", Pre: func(*Probe, *Regs) Action { t.Error("a later handler runs"); return Continue },
					Post: func(*Probe, *Regs, Flags) Action { t.Error("nothing was executed"); return Continue }}
				does := &Probe{Symbol: "wrap"}
				var entry *ReturnProbe
				switch from {
				case "pre":
					does.Pre = func(p *Probe, r *Regs) Action { early(p, r); return Continue }
				case "entry":
					entry = &ReturnProbe{Symbol: "wrap", Entry: func(a *Activation, r *Regs) Action {
						assert.False(t, a.Skipped())
						early(a.Probe(), r)
						return Continue
					}, Return: func(a *Activation, _ *Regs) Action {
						assert.True(t, a.Skipped())
						return Continue
					}}
					does = entry.Probe()
				}
				require.NoError(t, s.Register(follows.Probe(), does, late))
				va := m.Symbol("wrap")
				base := m.Executed(va)
				inner := &Probe{Symbol: "inner", Pre: func(*Probe, *Regs) Action { t.Error("inner runs"); return Continue }}
				require.NoError(t, s.Register(inner))
				if from == "hits" {
					m.Release()
					n := 0
					for hit, err := range s.Hits(t.Context()) {
						require.NoError(t, err)
						if hit.Probe == does {
							early(does, hit.Regs)
						} else {
							require.Same(t, follows.Probe(), hit.Probe)
							assert.True(t, hit.Activation.Skipped())
						}
						if n++; n == 20 {
							break
						}
					}
					// What the loop's end has cut short went on without us.
					require.NoError(t, s.Unregister(follows.Probe(), does, late, inner))
					require.NoError(t, quiesced(t, m))
				} else {
					require.NoError(t, during(t, s, func() { rounds(t, m, 5) }))
					// The machine counts an execution when its counter goes up.
					n := m.Executed(va) - base
					require.Positive(t, n)
					assert.Equal(t, n, does.Stats().Hits)
					assert.Equal(t, Stats{Skipped: n}, late.Stats())
					assert.EqualValues(t, skipped, n)
					equations(t, follows.Probe(), n)
					assert.Equal(t, n, follows.Probe().Stats().Returned)
					if entry != nil {
						equations(t, entry.Probe(), n)
						assert.Equal(t, n, entry.Probe().Stats().Returned)
					}
					for vcpu := range 2 {
						assert.EqualValues(t, 0x77, m.Result(vcpu))
					}
				}
				assert.Positive(t, skipped)
			})
		})
	}
}

// TestEarlyReturnRefused has it where it can't be right. Nothing changes then.
func TestEarlyReturnRefused(t *testing.T) {
	onReturns(t, &Options{AllowReturn: true}, func(t *testing.T, m *xentest.Machine, s *Session) {
		refused := func(r *Regs, want error) {
			t.Helper()
			before := *r
			assert.ErrorIs(t, r.Return(1), want)
			assert.Equal(t, before.String(), r.String())
		}
		hits := map[string]int{}
		var kept Regs
		insns := m.Insns()
		i := 0
		for insns[i].VA != m.Symbol("wrap") {
			i++
		}
		probes := []*Probe{
			{Symbol: "wrap", Pre: func(_ *Probe, r *Regs) Action {
				// Of a stack on which no return address is, or nothing.
				for _, sp := range []uint64{r.SP - 8*64, 0x1000} {
					good := r.SP
					r.SP = sp
					refused(r, ErrReturnAddress)
					r.SP = good
				}
				kept = *r
				refused(&kept, ErrNotEntry)
				hits["first"]++
				return Continue
			}, Post: func(_ *Probe, r *Regs, _ Flags) Action {
				refused(r, ErrNotEntry)
				hits["post"]++
				return Continue
			}},
			{Addr: insns[i+1].VA, Pre: func(_ *Probe, r *Regs) Action {
				refused(r, ErrNotEntry)
				hits["inside"]++
				return Continue
			}},
		}
		call := &ReturnProbe{Symbol: "wrap", Return: func(a *Activation, r *Regs) Action {
			refused(r, ErrNotEntry)
			refused(a.Entry(), ErrNotEntry)
			hits["return"]++
			return Continue
		}}
		require.NoError(t, s.Register(append(probes, call.Probe())...))
		require.NoError(t, during(t, s, func() { soon(t, "hits", func() bool { return call.Probe().Stats().Returned > 5 }) }))
		for _, what := range []string{"first", "post", "inside", "return"} {
			assert.Positive(t, hits[what], what)
		}
		require.ErrorIs(t, kept.Return(1), ErrNotEntry)
		require.ErrorIs(t, (&Regs{}).Return(1), ErrNotEntry)
		require.NoError(t, s.Unregister(s.Probes()...))

		// Another handler has replaced the instruction: that one stands.
		nop := m.Symbol("nop5")
		moved := 0
		a := &Probe{Addr: nop, Pre: func(_ *Probe, r *Regs) Action { r.IP += 5; return Continue }}
		b := &Probe{Addr: nop, Pre: func(_ *Probe, r *Regs) Action { refused(r, ErrNotEntry); moved++; return Continue }}
		require.NoError(t, s.Register(a, b))
		require.NoError(t, during(t, s, func() { soon(t, "hits", func() bool { return b.Stats().Hits > 5 }) }))
		assert.Positive(t, moved)
	})
	// Without AllowReturn a kernel without a list has no function that may.
	onReturns(t, nil, func(t *testing.T, m *xentest.Machine, s *Session) {
		p := &Probe{Symbol: "wrap", Pre: func(p *Probe, r *Regs) Action { return p.Fail(r.Return(1)) }}
		require.NoError(t, s.Register(p))
		err := s.Loop(t.Context())
		require.ErrorIs(t, err, ErrNoErrorInjection)
		require.ErrorIs(t, err, ErrNotInjectable)
		assert.ErrorContains(t, err, "AllowReturn")
	})
	// Nor is there a way without a kernel.
	s := &Session{symErr: ErrNoSymbols, allowReturn: true}
	_, err := s.mayReturn(&Regs{entry: 1}, 0)
	require.ErrorIs(t, err, ErrNoSymbols)
}

// cet is a guest whose vCPU has control-flow enforcement on, or doesn't tell.
type cet struct {
	*kerneltest.Machine
	on  bool
	err error
}

func (m *cet) CPUs() ([]linux.CPU, error) {
	cpus, err := m.Machine.CPUs()
	if m.on {
		cpus[0].CR4 |= 1 << 23
	}
	return cpus, errors.Join(err, m.err)
}

// TestEarlyReturnListed asks a kernel that has a list of functions for error injection.
func TestEarlyReturnListed(t *testing.T) {
	fn := kerneltest.Fn
	guest := kerneltest.NewSynthetic(kerneltest.Layout{ErrorInjection: true})
	ret := fn(410) + 5 // behind a call
	const eperm = 1<<64 - 1
	machine := &cet{Machine: guest.Machine()}
	k, err := linux.Discover(t.Context(), machine, nil)
	require.NoError(t, err)
	session := func(allow bool) (*Session, *Regs, func(uint64)) {
		s := &Session{kernel: k, allowReturn: allow}
		stack := make([]byte, 8)
		r := &Regs{SP: 0x1000, mem: func(addr uint64, b []byte) error {
			if addr != 0x1000 {
				return ErrNotMapped
			}
			copy(b, stack)
			return nil
		}}
		return s, r, func(v uint64) { binary.LittleEndian.PutUint64(stack, v) }
	}
	s, r, push := session(false)
	push(ret)
	for range 2 { // asked, and remembered
		for _, c := range []struct {
			fn, value uint64
			want      error
		}{
			{fn(700), 0, nil}, {fn(701), eperm, nil}, {fn(701), 0, ErrReturnValue}, {fn(702), 0, nil}, {fn(703), 1, nil},
			{fn(703), 2, ErrReturnValue}, {fn(705), eperm, ErrNotInjectable}, {fn(701) + 1, eperm, ErrNotEntry},
		} {
			r.entry, r.IP = c.fn, c.fn
			to, err := s.mayReturn(r, c.value)
			if c.want != nil {
				require.ErrorIs(t, err, c.want, "%#x, %#x", c.fn, c.value)
				require.NotErrorIs(t, err, ErrNoErrorInjection)
				continue
			}
			require.NoError(t, err)
			assert.Equal(t, ret, to)
		}
	}
	r.entry = fn(701)
	for _, bad := range []uint64{0, ret + 1, fn(1) + 4, guest.Sym["init_task"], 1<<64 - 1} {
		push(bad)
		_, err := s.mayReturn(r, eperm)
		require.ErrorIs(t, err, ErrReturnAddress, "%#x", bad)
	}
	r.SP = 0x2000
	_, err = s.mayReturn(r, eperm)
	require.ErrorIs(t, err, ErrReturnAddress)
	require.ErrorIs(t, err, ErrNotMapped)

	// The user takes the risk of a function that isn't listed, and no other.
	s, r, push = session(true)
	push(ret)
	r.entry = fn(705)
	_, err = s.mayReturn(r, 12345)
	require.NoError(t, err)
	push(ret + 1)
	_, err = s.mayReturn(r, 12345)
	require.ErrorIs(t, err, ErrReturnAddress)

	for _, allow := range []bool{false, true} {
		for _, m := range []cet{{on: true}, {err: errFailed}} {
			s, r, push := session(allow)
			push(ret)
			r.entry = fn(701)
			machine.on, machine.err = m.on, m.err
			_, err = s.mayReturn(r, eperm)
			require.ErrorIs(t, err, ErrShadowStack)
			machine.on, machine.err = false, nil
			_, err = s.mayReturn(r, eperm)
			require.NoError(t, err, "a refusal is not remembered")
			machine.on = true
			_, err = s.mayReturn(r, eperm)
			require.NoError(t, err, "what is off at boot stays off")
			machine.on = false
		}
	}
}

// TestEarlyReturnRemembers bounds what is remembered of a guest that makes up return addresses.
func TestEarlyReturnRemembers(t *testing.T) {
	guest := kerneltest.NewSynthetic(kerneltest.Layout{ErrorInjection: true})
	k, err := linux.Discover(t.Context(), guest.Machine(), nil)
	require.NoError(t, err)
	var e early
	for v := range uint64(3 * maxEarly) {
		_ = e.injectable(k, kerneltest.Fn(700), v)
		require.LessOrEqual(t, len(e.allowed), maxEarly)
	}
	require.NoError(t, e.injectable(k, kerneltest.Fn(700), 0))
}
