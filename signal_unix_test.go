//go:build unix

package vmprobes

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/target"
	"github.com/vmprobes/vmprobes/internal/xentest"
)

func TestSignalUnregisters(t *testing.T) {
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP} {
		t.Run(sig.String(), func(t *testing.T) {
			needs(t, sig)
			_, s := simulated(t, xentest.Config{Kind: xentest.HVM, VCPUs: 2, Seed: 3}, nil)
			p := &Probe{DomainName: "a3guest", Symbol: entry}
			require.NoError(t, registerWith(p, func(context.Context) (*Session, error) { return s, nil }))
			done := make(chan error, 1)
			go func() { done <- Loop(t.Context(), p) }()
			soon(t, "hits", func() bool { return p.Stats().Hits > 5 })
			require.NoError(t, syscall.Kill(os.Getpid(), syscall.SIGPIPE), "not an end")
			require.NoError(t, syscall.Kill(os.Getpid(), sig))
			err := <-done
			require.ErrorIs(t, err, ErrInterrupted)
			assert.ErrorContains(t, err, sig.String())
			assert.Equal(t, FlagRestored, p.Flags())
			require.NoError(t, Unregister(p))
			<-s.guard.quit
		})
	}
}

// TestSignalEndsOpen has signals come while a guest is opened, which takes a while
// where symbols must be searched for.
func TestSignalEndsOpen(t *testing.T) {
	needs(t, syscall.SIGINT)
	waits := func(ctx context.Context) (*Session, error) {
		assert.NoError(t, syscall.Kill(os.Getpid(), syscall.SIGINT))
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(10 * time.Second):
			return nil, errors.New("the signal was not obeyed")
		}
	}
	p := &Probe{DomainName: "a3guest", Symbol: entry}
	require.ErrorIs(t, registerWith(p, waits), ErrInterrupted)
	assert.Zero(t, p.Flags())
	require.ErrorIs(t, run(t.Context(), waits, nil), ErrInterrupted)

	// It came when all was found already.
	late := func(s *Session) func(context.Context) (*Session, error) {
		return func(ctx context.Context) (*Session, error) {
			_, err := waits(ctx)
			assert.ErrorIs(t, err, ErrInterrupted)
			return s, nil
		}
	}
	_, s := simulated(t, xentest.Config{Kind: xentest.HVM, Seed: 1}, nil)
	require.ErrorIs(t, registerWith(p, late(s)), ErrInterrupted)
	assert.Equal(t, FlagRestored, p.Flags())
	require.ErrorIs(t, s.Register(p), ErrClosed)
	_, s = simulated(t, xentest.Config{Kind: xentest.HVM, Seed: 1}, nil)
	require.ErrorIs(t, run(t.Context(), late(s), nil), ErrInterrupted)
	require.ErrorIs(t, s.Register(p), ErrClosed)
}

// TestRun ends programs in each way that there is: the guest is left, and the error
// tells why unless it was asked for.
func TestRun(t *testing.T) {
	needs(t, syscall.SIGTERM, syscall.SIGPIPE)
	failure := errors.New("no space left")
	type program = func(context.Context, *Session) error
	loops := func(pre PreHandler) program {
		return func(ctx context.Context, s *Session) error {
			if err := s.Register(&Probe{Symbol: entry, Pre: pre}); err != nil {
				return err
			}
			return s.Loop(ctx)
		}
	}
	signals := func(sigs ...syscall.Signal) {
		for _, sig := range sigs {
			assert.NoError(t, syscall.Kill(os.Getpid(), sig))
		}
	}
	for name, c := range map[string]struct {
		f    program
		want error
	}{
		"stop": {loops(func(*Probe, *Regs) Action { return Stop }), nil},
		"fail": {loops(func(p *Probe, _ *Regs) Action { return p.Fail(failure) }), failure},
		"fail, and go on all the same": {loops(func(p *Probe, _ *Regs) Action {
			p.Fail(failure)
			signals(syscall.SIGTERM)
			return Continue
		}), failure},
		"signal": {loops(func(p *Probe, _ *Regs) Action {
			signals(syscall.SIGPIPE, syscall.SIGTERM)
			return p.Fail(nil)
		}), nil},
		"signal, hits": {func(ctx context.Context, s *Session) error {
			if err := s.Register(&Probe{Symbol: entry}); err != nil {
				return err
			}
			for _, err := range s.Hits(ctx) {
				if err != nil {
					return fmt.Errorf("ended: %w", err)
				}
				signals(syscall.SIGTERM)
			}
			return errors.New("no error is yielded")
		}, nil},
		"signal and failure": {func(ctx context.Context, _ *Session) error {
			signals(syscall.SIGTERM)
			<-ctx.Done()
			return errors.Join(context.Cause(ctx), failure)
		}, failure},
		"two signals": {func(ctx context.Context, s *Session) error {
			signals(syscall.SIGTERM)
			<-ctx.Done()
			signals(syscall.SIGTERM)
			<-s.done
			return s.Loop(context.Background())
		}, nil},
		"no such symbol": {func(_ context.Context, s *Session) error {
			return s.Register(&Probe{Symbol: "no_such_function"})
		}, ErrSymbolNotFound},
		"context": {func(ctx context.Context, s *Session) error {
			ctx, cancel := context.WithTimeout(ctx, time.Millisecond)
			defer cancel()
			return loops(nil)(ctx, s)
		}, context.DeadlineExceeded},
	} {
		t.Run(name, func(t *testing.T) {
			_, s := simulated(t, xentest.Config{Kind: xentest.HVM, VCPUs: 2, Seed: 4}, nil)
			err := run(t.Context(), func(context.Context) (*Session, error) { return s, nil }, c.f)
			if c.want == nil {
				require.NoError(t, err)
			} else {
				require.ErrorIs(t, err, c.want)
			}
			assert.True(t, s.left)
		})
	}
	t.Run("panic", func(t *testing.T) {
		_, s := simulated(t, xentest.Config{Kind: xentest.PV, GDBSX: true, Seed: 4}, nil)
		assert.PanicsWithValue(t, "in the body", func() {
			_ = run(t.Context(), func(context.Context) (*Session, error) { return s, nil }, func(context.Context, *Session) error {
				require.NoError(t, s.Register(&Probe{Symbol: entry}))
				panic("in the body")
			})
		})
		assert.True(t, s.left)
	})
}

// refuses is a driver that leaves breakpoints where they are, until a time.
type refuses struct {
	target.Driver
	until atomic.Int64 // Unix milliseconds
}

func (d *refuses) RemoveBreak(addr uint64) error {
	if time.Now().UnixMilli() < d.until.Load() {
		return errors.New("injected")
	}
	return d.Driver.RemoveBreak(addr)
}

// TestRunCloses: Run doesn't leave at the first failure to close.
func TestRunCloses(t *testing.T) {
	m := xentest.New(xentest.Config{Kind: xentest.HVM, VCPUs: 1})
	before := m.Text()
	m.Start()
	defer m.Stop()
	g, drv := attached(t, m)
	d := &refuses{Driver: drv}
	s := newSession(g.Info(), d, nil, ErrNoSymbols, &Options{IgnoreBlacklist: true}, g.Close)
	err := run(t.Context(), func(context.Context) (*Session, error) { return s, nil }, func(context.Context, *Session) error {
		require.NoError(t, s.Register(&Probe{Addr: Addr(m.Symbol(entry))}))
		d.until.Store(time.Now().Add(2 * time.Second).UnixMilli()) // one Close gives up after half of that
		return nil
	})
	require.NoError(t, err)
	assert.Greater(t, time.Now().UnixMilli(), d.until.Load())
	assert.True(t, s.left)
	xentest.Verify(t, m, before)
}

// needs skips a test if a signal was ignored when the tests were started (nohup, or a
// shell's background), which stays so.
func needs(t *testing.T, sigs ...os.Signal) {
	t.Helper()
	for _, sig := range sigs {
		if signal.Ignored(sig) {
			t.Skipf("%v is ignored here", sig)
		}
	}
}
