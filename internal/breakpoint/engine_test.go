package breakpoint_test

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/xentest"
)

// TestEveryInstruction probes each instruction of the guest in turn, in each way
// of executing it, and compares the hits with the guest's own count.
func TestEveryInstruction(t *testing.T) {
	each(t, func(t *testing.T, cfg xentest.Config) { everyInstruction(t, cfg, 0) })
}

// TestEveryInstructionOfReturns does the same with those that Config.Returns adds: tasks
// change under the probes, and the stack with them.
func TestEveryInstructionOfReturns(t *testing.T) {
	one(t, func(t *testing.T, cfg xentest.Config) {
		cfg.Returns = true
		everyInstruction(t, cfg, xentest.New(cfg).Symbol("rec"))
	})
}

// everyInstruction probes each instruction from there on.
func everyInstruction(t *testing.T, cfg xentest.Config, from uint64) {
	m := xentest.New(cfg)
	before := m.Text()
	m.Start()
	defer m.Stop()
	for _, method := range []breakpoint.Method{breakpoint.Auto, breakpoint.OutOfLine, breakpoint.InPlace} {
		probed := 0
		var stats breakpoint.Stats
		for i, in := range m.Insns() {
			if testing.Short() && (i+cfg.VCPUs)%10 != 0 {
				continue
			}
			// The first instruction of the guest's int3 handler looks how it was
			// reached, and so would notice to be executed a second time.
			if in.VA < from || isOwn(m, in.VA) || in.VA == m.Symbol("int3_entry") {
				continue
			}
			quiesce(t, m)
			drv, err := m.Attach(nil)
			require.NoError(t, err)
			e := breakpoint.New(drv, breakpoint.Config{Scratch: m.Scratch, MayFault: xentest.NoFaults, Method: method})
			var pre, post uint64
			p := &breakpoint.Probe{
				Addr: in.VA,
				Pre: func(c *breakpoint.Context) breakpoint.Verdict {
					pre++
					if c.Regs.IP != in.VA {
						t.Errorf("pre handler at %#x, want %#x", c.Regs.IP, in.VA)
					}
					return breakpoint.Continue
				},
			}
			if probed%2 == 0 {
				p.Post = func(c *breakpoint.Context) breakpoint.Verdict {
					post++
					if c.Regs.Flags&0x100 != 0 {
						t.Errorf("post handler at %#x sees TF", c.Regs.IP)
					}
					return breakpoint.Continue
				}
			}
			if err := e.Register(p); err != nil {
				require.ErrorIs(t, err, breakpoint.ErrNoWayPast, "%#x % x", in.VA, in.Bytes)
				require.NoError(t, e.Close())
				continue
			}
			probed++
			executed := m.Executed(in.VA)
			m.Release()
			err = served(t, e, func() {
				for i := 0; i < 400 && p.Hits() < 12; i++ {
					time.Sleep(100 * time.Microsecond)
				}
				quiesce(t, m)
			})
			require.NoError(t, err, "%#x % x", in.VA, in.Bytes)
			require.Empty(t, m.Oops(), "%#x % x in %s (method %d)", in.VA, in.Bytes, in.Func, method)
			executed = m.Executed(in.VA) - executed
			require.Equal(t, executed, p.Hits(), "%#x % x in %s (method %d)", in.VA, in.Bytes, in.Func, method)
			require.Equal(t, executed, pre)
			if p.Post != nil {
				require.Equal(t, executed, post, "%#x % x", in.VA, in.Bytes)
			}
			require.NoError(t, e.Close())
			s := e.Stats()
			stats.Hits += s.Hits
			stats.Emulated += s.Emulated
			stats.OutOfLine += s.OutOfLine
			stats.InPlace += s.InPlace
			require.Equal(t, before, m.Text())
		}
		t.Logf("method %d: %d instructions, %+v", method, probed, stats)
		m.Release()
		xentest.Verify(t, m, before)
	}
}
