// Package vmprobes places kprobe-like breakpoints in the kernel of a running Xen
// guest, from dom0, with nothing installed in the guest, and nothing configured:
// symbols and types are found in the guest's memory. The same works on QEMU guests.
//
// A [Probe] names an instruction, and handlers that run before and after it:
//
//	p := &vmprobes.Probe{
//		Symbol: "do_sys_openat2",
//		Pre: func(p *vmprobes.Probe, r *vmprobes.Regs) vmprobes.Action {
//			task, _ := r.Task()
//			name, _ := p.ReadString(r.Arg(1), 4096)
//			_, err := fmt.Printf("%v opens %q\n", task, name)
//			return p.Fail(err)
//		},
//	}
//	err := vmprobes.Run(context.Background(), "a3guest", nil, p)
//
// A [ReturnProbe] follows calls of a function to their returns. [Regs.Return] has a function
// return without being executed.
//
// [Run] opens the guest, serves its probes until a handler or a signal ends that, and
// leaves the guest as it was; [RunFunc] does so for a function of the caller's. [Open]
// gives a [Session], which holds any number of probes, without signal handling.
// [Register], [Loop] and [Unregister] are those of the C library of the same name.
//
// PV guests need a hypervisor built with CONFIG_GDBSX; HVM and PVH guests work with
// every Xen that has vm_event; a QEMU guest needs its gdbstub on a socket. Open says
// what is missing before it changes anything in a guest. It lets a paused QEMU VM
// run. A 32-bit kernel has no probes ([Err32Bit]), but package xenaccess can look into it.
package vmprobes

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"

	"github.com/vmprobes/vmprobes/internal/guardian"
	"github.com/vmprobes/vmprobes/internal/target"
	"github.com/vmprobes/vmprobes/linux"
	"github.com/vmprobes/vmprobes/xenaccess"
)

// Open attaches to the domain called name, or with the numeric id that it
// spells; "xen:NAME" is a domain whatever is in its name. "qemu:/path/of/gdb.sock" and
// "qemu:host:port" are the gdbstub of a QEMU guest,
// "qemu+monitor:/path/of/monitor.sock" is a QEMU monitor through which that
// is started. Behind a QEMU name may stand options, as in
// "qemu:/run/vm.gdb?ram=/dev/shm/vm&debugregs": ram=FILE or pid=PID say where the
// guest's memory is, debugregs takes the CPU's debug registers under KVM, timeout=30s
// bounds QEMU's answers, gdb=SOCKET is where a monitor makes the stub's socket.
// "file:PATH" is a saved image, which has no probes. A nil opts means defaults.
//
// A domain that is paused is refused with ErrDomainPaused, but for a PV guest that was
// created paused and has not run yet: its probes are hit from its first instruction on.
func Open(ctx context.Context, name string, opts *Options) (*Session, error) {
	s, err := open(ctx, name, opts)
	if err != nil {
		if cause := context.Cause(ctx); cause != nil && !errors.Is(err, cause) {
			err = fmt.Errorf("%w: %w", cause, err)
		}
		return nil, &Error{Op: "open", Domain: name, Err: err}
	}
	return s, nil
}

func open(ctx context.Context, name string, opts *Options) (_ *Session, err error) {
	if name == "" {
		return nil, ErrNoDomain
	}
	if opts == nil {
		opts = new(Options)
	}
	if err := opts.checkWatchdog(); err != nil {
		return nil, err
	}
	g, err := target.Open(ctx, name)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, g.Close())
		}
	}()
	guest, err := xenaccess.Open(target.WithOpened(ctx, g), name, &xenaccess.Options{
		Symbols: opts.Symbols, Types: opts.Types, Config: opts.Config, Cache: opts.Cache, Logger: opts.Logger, Lax: true,
	})
	if err != nil {
		return nil, err
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if err := guest.Err(); insufficient(opts, err) {
		return nil, err
	}
	k := guest.Linux()
	setup := known(k)
	setup.Logger = opts.Logger
	if !opts.NoGuardian {
		setup.Watchdog = opts.Watchdog
		setup.Ring = guardian.Ring
		setup.Guardian = func(journal string) error {
			err := guardian.Start(opts.logger())
			if err == nil && opts.Watchdog != 0 {
				err = guardian.Watch(journal, opts.Watchdog)
			}
			return err
		}
	}
	drv, err := g.Attach(ctx, setup)
	if err != nil {
		if errors.Is(err, linux.ErrNotInPlace) && guest.Err() != nil {
			err = fmt.Errorf("%w; %w", err, guest.Err())
		}
		return nil, err
	}
	s := newSession(g.Info(), drv, k, guest.Err(), opts, g.Close)
	s.name, s.guest = name, guest
	s.log.Debug("attached", "kind", s.domain.Kind.String(), "vcpus", s.domain.VCPUs)
	return s, nil
}

// known is what a driver may know of the guest's kernel.
func known(k *linux.Kernel) (known target.Setup) {
	if k == nil {
		return known
	}
	known.BuildID, known.Bits = k.BuildID(), k.Bits()
	if root, own := k.Settled(); own {
		known.Root = root
	} else {
		known.Roots = k.Settled
	}
	known.Lookup = func(name string) (uint64, bool) {
		sym, err := k.Symbols().Lookup(name)
		return sym.Addr, err == nil
	}
	if addr, ok := known.Lookup("linux_banner"); ok {
		known.BannerAddr, known.Banner = addr, []byte(k.Banner())
	}
	return known
}

// insufficient reports whether err, of looking into the guest, is a reason not to
// attach. That nothing is known of a guest is none, but it is one if what the caller has
// named can't be used.
func insufficient(opts *Options, err error) bool {
	var path *fs.PathError
	switch {
	case err == nil:
		return false
	case errors.Is(err, ErrWrongSymbols), errors.Is(err, ErrWrongTypes), errors.Is(err, xenaccess.ErrConfig):
		return true
	case opts.Symbols != "" || opts.Types != "":
		return true
	}
	return opts.Config != "" && errors.As(err, &path)
}

// checkArguments finds what is wrong with a probe for the package-level
// functions, as register_vmprobe did.
func checkArguments(p *Probe) error {
	switch {
	case p == nil:
		return ErrNilProbe
	case p.DomainID != 0 && p.DomainName != "":
		return ErrTwoDomains
	case p.DomainID == 0 && p.DomainName == "":
		return ErrNoDomain
	case p.DomainName == "0" || p.DomainName == "Domain-0":
		return ErrControlDomain
	}
	return p.checkPlace()
}

// Register finds p's domain and address, attaches and arms the breakpoint
// (register_vmprobe). [Run] does that, what comes after it and what it needs in one call.
//
// Until Unregister, SIGINT, SIGTERM, SIGHUP and SIGQUIT are caught: the
// first one unregisters the probe and ends its Loop with ErrInterrupted; after
// that, signals do again what they did before. SIGPIPE and SIGTSTP (Ctrl+Z) are
// ignored meanwhile: a write to a closed pipe returns its error, and the program
// can't be stopped while a guest depends on it. Programs with signal handling of
// their own use [Open].
func Register(p *Probe) error {
	if err := checkArguments(p); err != nil {
		e := &Error{Op: "register", Err: err}
		if p != nil {
			e.Domain, e.Probe = p.domain(), p.location()
		}
		return e
	}
	return registerWith(p, func(ctx context.Context) (*Session, error) {
		return Open(ctx, p.domain(), &Options{Logger: defaultLogger()})
	})
}

func registerWith(p *Probe, open func(context.Context) (*Session, error)) error {
	p.mu.Lock()
	registered := p.session != nil
	p.mu.Unlock()
	if registered {
		return &Error{Op: "register", Domain: p.domain(), Probe: p.location(), Err: ErrRegistered}
	}
	g, ctx := guardSignals(context.Background(), 1)
	s, err := open(ctx)
	if err != nil {
		g.release()
		return err
	}
	s.guard = g
	p.mu.Lock()
	p.ended = g
	p.mu.Unlock()
	err = s.register(true, p)
	if err == nil && !g.watches(s) {
		err = s.fail("register", p, context.Cause(ctx))
	}
	if err != nil {
		err = errors.Join(err, closeInsistently(s))
		g.release()
	}
	return err
}

// defaultLogger logs to stderr, for functions that manage a Session themselves:
// warnings, and if VMPROBES_DEBUG is set what a C program built with -D_VERBOSE
// printed.
func defaultLogger() *slog.Logger {
	opts := &slog.HandlerOptions{Level: slog.LevelWarn}
	if os.Getenv("VMPROBES_DEBUG") != "" {
		opts.Level = slog.LevelDebug
	}
	return slog.New(slog.NewTextHandler(os.Stderr, opts))
}

// Loop runs the guest and calls p's handlers until one of them returns something
// else than Continue, ctx is done, a signal comes (ErrInterrupted), or the
// domain is gone (loop_vmprobe). p stays registered unless a signal came.
func Loop(ctx context.Context, p *Probe) error {
	if p == nil {
		return &Error{Op: "loop", Err: ErrNilProbe}
	}
	p.mu.Lock()
	s, private, ended := p.session, p.private, p.ended
	p.mu.Unlock()
	if sig := ended.signal(); s == nil && sig != nil {
		return &Error{Op: "loop", Domain: p.domain(), Probe: p.location(), Err: fmt.Errorf("%w (%v)", ErrInterrupted, sig)}
	}
	if s == nil || !private {
		return &Error{Op: "loop", Domain: p.domain(), Probe: p.location(), Err: ErrNotRegistered}
	}
	err := s.Loop(ctx)
	if sig := s.guard.signal(); sig != nil && errors.Is(err, ErrClosed) {
		return &Error{Op: "loop", Domain: p.domain(), Probe: p.location(), Err: errors.Join(fmt.Errorf("%w (%v)", ErrInterrupted, sig), s.closeError())}
	}
	return err
}

// Unregister takes the breakpoint out, gives the guest its instruction back and
// detaches (unregister_vmprobe). Unregistering a probe that isn't registered
// does nothing. A handler must not call it: it returns Stop instead.
func Unregister(p *Probe) error {
	if p == nil {
		return nil
	}
	p.mu.Lock()
	s, private := p.session, p.private
	p.mu.Unlock()
	if s == nil {
		return nil
	}
	if !private {
		return s.Unregister(p)
	}
	err := closeInsistently(s)
	s.guard.release()
	return err
}
