package vmprobes

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"sync"
	"syscall"
	"time"
)

// Run opens the guest called name, registers the probes, calls their handlers and
// closes: all that most programs need. A nil opts means defaults.
//
// It returns nil when a handler has returned Stop, and when a signal has ended it:
// SIGINT (Ctrl+C), SIGTERM, SIGHUP or SIGQUIT. Otherwise it returns the error that
// ended it, such as that of ctx or of a handler ([Probe.Fail]), or that of closing.
// A signal that comes before the probes are in place is an error too: ErrInterrupted.
//
// Signals are caught until Run returns, so that none of them leaves a breakpoint
// behind. SIGPIPE and SIGTSTP (Ctrl+Z) are ignored meanwhile: a write to a closed pipe
// returns its error, and the program can't be stopped while a guest depends on it.
//
// Warnings go to stderr unless Options.Logger is set; with VMPROBES_DEBUG=1 in the
// environment debug records do as well.
func Run(ctx context.Context, name string, opts *Options, probes ...*Probe) error {
	return RunFunc(ctx, name, opts, func(ctx context.Context, s *Session) error {
		if err := s.Register(probes...); err != nil {
			return err
		}
		return s.Loop(ctx)
	})
}

// RunFunc is [Run] for programs that do more than serve handlers: it opens the guest,
// calls f, and closes the Session when f returns or panics, or a signal comes.
//
// The first signal cancels f's context, which [Session.Loop] and [Session.Hits] obey;
// f should return then, and what it returns because of that counts as nil. The second
// signal closes the Session while f still runs.
func RunFunc(ctx context.Context, name string, opts *Options, f func(ctx context.Context, s *Session) error) error {
	var o Options
	if opts != nil {
		o = *opts
	}
	if o.Logger == nil {
		o.Logger = defaultLogger()
	}
	return run(ctx, func(ctx context.Context) (*Session, error) { return Open(ctx, name, &o) }, f)
}

func run(ctx context.Context, open func(context.Context) (*Session, error), f func(context.Context, *Session) error) (err error) {
	g, ctx := guardSignals(ctx, 2)
	defer g.release()
	s, err := open(ctx)
	if err != nil {
		return err
	}
	g.watches(s)
	defer func() { err = errors.Join(err, closeInsistently(s)) }()
	if ctx.Err() != nil {
		return s.fail("open", nil, context.Cause(ctx))
	}
	err = f(ctx, s)
	if g.signal() != nil && onlyBecause(err, context.Cause(ctx)) {
		return nil
	}
	return err
}

// onlyBecause reports whether err says nothing else than that a context was cancelled
// for the given cause.
func onlyBecause(err, cause error) bool {
	if err == cause || err == context.Canceled || err == ErrClosed {
		return true
	}
	switch e := err.(type) {
	case interface{ Unwrap() error }:
		return onlyBecause(e.Unwrap(), cause)
	case interface{ Unwrap() []error }:
		return !slices.ContainsFunc(e.Unwrap(), func(err error) bool { return !onlyBecause(err, cause) })
	}
	return false
}

// closeInsistently closes s, and again for a while if something of ours is still in
// the guest: the program ends after that, and the guest would stand still.
func closeInsistently(s *Session) error {
	err := s.Close()
	for range 10 { // of a second and more each
		if !errors.Is(err, ErrUnanswered) {
			break
		}
		time.Sleep(100 * time.Millisecond)
		err = s.Close()
	}
	return err
}

// guard catches signals while a guest depends on this program.
type guard struct {
	ch     chan os.Signal
	quit   chan struct{}
	once   sync.Once
	cancel context.CancelCauseFunc
	limit  int // which signal closes the session

	mu      sync.Mutex
	sig     os.Signal // the first one that asks for an end
	session *Session
}

// guardSignals catches signals until release. The first one cancels the returned
// context, the one of the given number closes the session that is watched then.
func guardSignals(ctx context.Context, limit int) (*guard, context.Context) {
	ctx, cancel := context.WithCancelCause(ctx)
	g := &guard{ch: make(chan os.Signal, 8), quit: make(chan struct{}), cancel: cancel, limit: limit}
	for _, sig := range append(ignoredSignals(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT) {
		if !signal.Ignored(sig) {
			signal.Notify(g.ch, sig)
		}
	}
	go g.wait()
	return g, ctx
}

func (g *guard) wait() {
	ends := 0
	for {
		select {
		case <-g.quit:
			return
		case sig := <-g.ch:
			if slices.Contains(ignoredSignals(), sig) {
				continue
			}
			g.mu.Lock()
			if g.sig == nil {
				g.sig = sig
			}
			s := g.session
			g.mu.Unlock()
			g.cancel(fmt.Errorf("%w (%v)", ErrInterrupted, sig))
			if ends++; s == nil || ends < g.limit {
				continue
			}
			if err := closeInsistently(s); err != nil {
				s.log.Error("close after a signal", "signal", sig.String(), "err", err)
			}
			g.release()
			return
		}
	}
}

// watches has signals close s. It reports false if one has come already.
func (g *guard) watches(s *Session) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.session = s
	return g.sig == nil
}

// signal returns the signal that has ended what g guards, or nil.
func (g *guard) signal() os.Signal {
	if g == nil {
		return nil
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.sig
}

// release has signals do again what they did before.
func (g *guard) release() {
	g.once.Do(func() {
		signal.Stop(g.ch)
		close(g.quit)
		g.cancel(nil)
	})
}
