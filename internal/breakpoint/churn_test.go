package breakpoint_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/xentest"
)

// TestChurn registers and unregisters probes at the same few addresses, from handlers
// and from elsewhere: no execution counts twice, and the guest is whole.
func TestChurn(t *testing.T) {
	each(t, func(t *testing.T, cfg xentest.Config) {
		for _, method := range []breakpoint.Method{breakpoint.Auto, breakpoint.OutOfLine, breakpoint.InPlace} {
			t.Run(fmt.Sprint(method), func(t *testing.T) {
				cfg.Seed = rand.Uint64()
				withFailures := rand.IntN(2) == 0
				m := xentest.New(cfg)
				before := m.Text()
				m.Start()
				defer m.Stop()
				quiesce(t, m)
				drv, err := m.Attach(nil)
				require.NoError(t, err)
				e := breakpoint.New(drv, breakpoint.Config{Scratch: m.Scratch, MayFault: xentest.NoFaults, Method: method})
				addrs := []uint64{outOfLine(t, m), m.Symbol("nop5"), find(t, m, 0xe8)}
				var probes []*breakpoint.Probe
				for _, a := range addrs {
					p := &breakpoint.Probe{Addr: a}
					p.Pre = func(*breakpoint.Context) breakpoint.Verdict {
						switch rand.IntN(20) {
						case 0:
							_ = e.Unregister(p)
							_ = e.Register(p)
						case 1:
							_ = e.Unregister(p)
						}
						return breakpoint.Continue
					}
					p.Post = func(*breakpoint.Context) breakpoint.Verdict { return breakpoint.Continue }
					probes = append(probes, p)
				}
				base := make([]uint64, len(addrs))
				for i, a := range addrs {
					base[i] = m.Executed(a)
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
							if withFailures && rand.IntN(20) == 0 {
								failSome(m, rand.New(rand.NewPCG(rand.Uint64(), 1)))
							}
							p := probes[rand.IntN(len(probes))]
							_ = e.Unregister(p)
							_ = e.Register(p)
							time.Sleep(time.Duration(rand.IntN(200)) * time.Microsecond)
						}
					})
				}
				ctx, cancel := context.WithCancel(t.Context())
				done := make(chan struct{})
				go func() {
					defer close(done)
					for ctx.Err() == nil {
						if _, err := e.Serve(ctx, true); err != nil && !errors.Is(err, context.Canceled) {
							t.Log(err)
						}
					}
				}()
				time.Sleep(100 * time.Millisecond)
				close(stop)
				wg.Wait()
				quiesce(t, m)
				cancel()
				<-done
				for range 5 {
					if _ = e.Close(); e.Left() {
						break
					}
				}
				assert.True(t, e.Left())
				for i, p := range probes {
					n := m.Executed(p.Addr) - base[i]
					assert.LessOrEqual(t, p.Hits()+p.Missed(), n, "%d %#x", i, p.Addr)
				}
				m.Release()
				xentest.Verify(t, m, before)
				assert.Zero(t, m.Mappings())
				assert.Zero(t, m.Pauses())
			})
		}
	})
}
