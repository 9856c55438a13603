package vmprobes

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/cstring"
	"github.com/vmprobes/vmprobes/internal/target"
	"github.com/vmprobes/vmprobes/linux"
	"github.com/vmprobes/vmprobes/xenaccess"
)

// Options configures Open. The zero value, and nil, mean defaults.
type Options struct {
	// Symbols is a file with the guest kernel's symbols: its vmlinux or vmlinuz, its
	// System.map, a saved /proc/kallsyms, or a Volatility 3 symbol file, compressed or
	// not. Empty means: the file named by the environment variable VMPROBES_SYMBOLS,
	// else what the configuration says, else the guest's own table, found in its memory;
	// if it has none, the file that Types names, the one that it was booted from, or one
	// of its release in /boot, /usr/lib/modules or /usr/lib/debug. This and the next
	// three are those of [xenaccess.Options]. A file that is named here and is of no use
	// fails Open.
	Symbols string
	// Types is a file with the kernel's types: BTF, a vmlinux with BTF or DWARF, a
	// vmlinuz with BTF, or a Volatility 3 symbol file. Those of another kernel are
	// refused, with ErrWrongTypes. Empty means the guest's own.
	Types string
	// Config is an xenaccess.conf or libvmi.conf. Empty means /etc/xenaccess.conf, if
	// it is there; "-" means none.
	Config string
	// Cache is a directory for what is expensive to work out about a kernel. Empty
	// means /var/cache/vmprobes; "-" means none.
	Cache string
	// IgnoreBlacklist has Register accept addresses that the guest's own kprobes
	// would refuse: its blacklist, entry code, code that must not be instrumented,
	// and instructions that the kernel rewrites while it runs; and all addresses
	// where the guest doesn't tell which these are. Such a probe can bring the guest
	// down.
	IgnoreBlacklist bool
	// AllowReturn has Regs.Return accept functions that the guest's kernel doesn't list for
	// error injection, and all of them where it has no list (CONFIG_FUNCTION_ERROR_INJECTION;
	// Debian's kernels have none). A function that isn't executed may leave locks, counts and
	// memory of its caller's in a state that the kernel doesn't expect. The other refusals stay.
	AllowReturn bool
	// Logger receives debug records of what happens (what -D_VERBOSE printed in
	// C). Nil discards them.
	Logger *slog.Logger
	// NoGuardian has Open start no second process of this program. The guardian repairs a
	// Xen guest as soon as this process dies without having closed its Session: by
	// SIGKILL, for want of memory, by a crash. Without it such a guest stands still at
	// its next hit, until somebody opens it, or runs vmprobes recover. Set it in a
	// program that is told of its own death in another way, as a service with
	// ExecStopPost=vmprobes recover. A process has one guardian for all its guests, which
	// isn't its child. For guests of other hypervisors there is none.
	NoGuardian bool
	// Watchdog is how long a hit may wait for this process: from 2 seconds to 24 hours.
	// When the guest has waited for so long, or a quarter longer at the most, the guardian
	// ends this process (SIGKILL) and repairs all its guests. It is for a process that is
	// stopped for long: by SIGSTOP, by a debugger, by swapping. But a handler that takes
	// longer is taken for the same, and so is the body of a range over Hits. While no
	// hit waits nothing happens, however long the process is stopped, nor while an
	// administrator has paused the guest. 0, the default, means that the guest waits for
	// ever. It costs a hit nothing.
	//
	// Open fails with ErrNoWatchdog if the value is out of range, with NoGuardian, and for
	// guests of other hypervisors.
	Watchdog time.Duration
	// Stepping says how probed instructions are executed. Leave it alone except
	// to measure.
	Stepping Stepping
}

// A hit may wait for a second after Register, until a Loop begins.
const (
	minWatchdog = 2 * loopGrace
	maxWatchdog = 24 * time.Hour
)

func (o *Options) checkWatchdog() error {
	switch {
	case o.Watchdog == 0:
		return nil
	case o.Watchdog < minWatchdog || o.Watchdog > maxWatchdog:
		return fmt.Errorf("%w: Options.Watchdog is %v, want 0 or %v to %v", ErrNoWatchdog, o.Watchdog, minWatchdog, maxWatchdog)
	case o.NoGuardian:
		return fmt.Errorf("%w: it is the guardian's work, and Options.NoGuardian is set", ErrNoWatchdog)
	}
	return nil
}

func (o *Options) logger() *slog.Logger {
	if o.Logger == nil {
		return slog.New(slog.DiscardHandler)
	}
	return o.Logger
}

// Stepping is a way to have the instruction under a breakpoint executed.
type Stepping uint8

// Ways of stepping. StepAuto takes the first that is safe: emulation in this
// process, a copy out of line, a single step in place. The others allow only
// theirs, and Register fails where it isn't possible.
const (
	StepAuto      = Stepping(breakpoint.Auto)
	StepOutOfLine = Stepping(breakpoint.OutOfLine)
	StepInPlace   = Stepping(breakpoint.InPlace)
)

// Kind is the virtualization mode of a domain.
type Kind uint8

// Kinds of domains. PVH counts as HVM where Xen doesn't tell them apart, and so
// do QEMU guests.
const (
	PV  = Kind(target.PV)
	HVM = Kind(target.HVM)
	PVH = Kind(target.PVH)
)

// String returns the kind as in xl's configuration files.
func (k Kind) String() string {
	switch k {
	case PV:
		return "pv"
	case HVM:
		return "hvm"
	case PVH:
		return "pvh"
	}
	return fmt.Sprintf("Kind(%d)", uint8(k))
}

// Domain describes the guest of a Session.
type Domain struct {
	ID    DomainID // of a Xen domain; 0 for other guests
	Name  string
	Kind  Kind
	VCPUs int // online when the Session was opened
}

// String returns the domain in a line: name, id if it is one of Xen's, kind and vCPUs.
func (d Domain) String() string {
	id := ""
	if d.ID != 0 {
		id = fmt.Sprintf("domain %d, ", d.ID)
	}
	return fmt.Sprintf("%s (%s%v, vCPUs: %d)", d.Name, id, d.Kind, d.VCPUs)
}

// A Session is an attachment to one domain. Its methods are safe for concurrent
// use; one Loop or Hits may run at a time. It must be closed: a guest stands still at
// a breakpoint that nobody answers any more.
//
// After Register, hits wait for a Loop, up to a second. Then, and between Loops,
// the guest runs over its breakpoints, and what it executes is counted in
// Stats.Missed.
//
// A Session doesn't catch signals, and a program that ends by one without Close
// leaves its breakpoints behind. Programs without signal handling of their own use
// [Run] or [RunFunc]; others mind SIGINT, SIGTERM, SIGHUP, SIGQUIT and SIGPIPE.
// Nor must it be stopped (SIGSTOP, Ctrl+Z, a debugger), as the guest then waits at
// its next hit ([Options.Watchdog] limits that), and the guest must not be saved or migrated while probes are
// registered: its image would hold their breakpoints.
type Session struct {
	name   string // of the domain, as the caller has it
	domain Domain
	drv    target.Driver
	eng    *breakpoint.Engine
	guest  *xenaccess.Guest // nil in tests
	kernel *linux.Kernel    // nil: not known
	symErr error            // why not
	log    *slog.Logger
	leave  func() error // closes what Open opened
	guard  *guard       // of the package-level functions
	unsafe bool         // Options.IgnoreBlacklist

	allowReturn bool // Options.AllowReturn
	early       early
	tasks       atomic.Bool // the kernel tells which task a vCPU executes

	seq  atomic.Uint64
	bad  atomic.Pointer[error] // that a handler ends the loop with
	sink func(*Hit) Action     // of Hits; only the loop's goroutine uses it
	regs Regs
	hit  Hit

	handling atomic.Pointer[Probe] // whose handler runs
	cr3      atomic.Uint64         // of the vCPU that hit it
	readHit  func(addr uint64, b []byte) error

	mu      sync.Mutex
	probes  []*Probe
	looping bool
	stop    context.CancelCauseFunc // of the loop that runs
	idle    *idle
	closed  bool

	closing sync.Mutex // held by Close
	left    bool       // nothing is in the guest any more; closing
	once    sync.Once
	done    chan struct{} // closed when Close has been tried
	err     error         // Close's; closing
}

// loopGrace is how long hits wait for a Loop after Register: a guest is stopped
// for so long at the most because of a program that doesn't call it.
const loopGrace = time.Second

// idle serves breakpoints while no Loop runs.
type idle struct {
	cancel context.CancelFunc
	done   chan struct{}
}

// newSession builds a Session on an attached driver. It owns drv and leave.
func newSession(i target.Info, drv target.Driver, k *linux.Kernel, symErr error, opts *Options, leave func() error) *Session {
	d := Domain{ID: DomainID(i.ID), Name: i.Name, Kind: Kind(i.Kind), VCPUs: i.VCPUs}
	if opts == nil {
		opts = new(Options)
	}
	log := opts.logger().With("domain", d.Name)
	if d.ID != 0 {
		log = log.With("domid", uint16(d.ID))
	}
	s := &Session{name: d.Name, domain: d, drv: drv, kernel: k, symErr: symErr, log: log, leave: leave,
		unsafe: opts.IgnoreBlacklist, allowReturn: opts.AllowReturn, done: make(chan struct{})}
	var j breakpoint.Journal
	if d, ok := drv.(target.Journaled); ok {
		j = d.Journal()
	}
	s.eng = breakpoint.New(drv, breakpoint.Config{
		Journal:   j,
		Hooks:     s.hooks(),
		Scratch:   func(_ uint64, try func(addr, size uint64) bool) { k.DeadCode(try) },
		MayFault:  k.MayFault(s.unsafe),
		Rewriting: k.Rewriting,
		Method:    breakpoint.Method(opts.Stepping),
		Logger:    log,
	})
	k.SetOverlay(s.eng.Overlay)
	s.readHit = func(addr uint64, b []byte) error { _, err := s.drv.Read(s.cr3.Load(), addr, b); return err }
	s.mu.Lock()
	defer s.mu.Unlock()
	s.serveIdle(0)
	return s
}

// Domain describes the domain the Session is attached to.
func (s *Session) Domain() Domain { return s.domain }

// Guest returns the Session's guest for introspection: its kernel's tasks,
// modules, types and symbols, and its memory. It must not be closed. Breakpoints
// of the Session show in what it reads of the kernel's text.
func (s *Session) Guest() *xenaccess.Guest { return s.guest }

func (s *Session) fail(op string, p *Probe, err error) error {
	if err == nil {
		return nil
	}
	e := &Error{Op: op, Domain: s.name, Err: err}
	if p != nil {
		e.Probe = p.location()
	}
	return e
}

// Register arms every probe, or none. Several probes may be at one address;
// their handlers run in order of registration, but Entry handlers of return probes
// come before Pre handlers.
func (s *Session) Register(probes ...*Probe) error { return s.register(false, probes...) }

func (s *Session) register(private bool, probes ...*Probe) error {
	eps, errs := s.prepareAll(probes)
	for i, err := range errs {
		if err != nil {
			return s.fail("register", probes[i], err)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return s.fail("register", nil, ErrClosed)
	}
	for i, p := range probes {
		if !p.attach(s, private) {
			for _, q := range probes[:i] {
				q.mu.Lock()
				q.session = nil
				q.mu.Unlock()
			}
			return s.fail("register", p, ErrRegistered)
		}
	}
	if err := s.arm(probes, eps, s.eng.Register); err != nil {
		for _, p := range probes {
			p.detach(false)
		}
		if len(probes) == 1 {
			return s.fail("register", probes[0], err)
		}
		return s.fail("register", nil, err)
	}
	s.enlist(probes...)
	return nil
}

// RegisterEach arms the probes that can be armed, and returns for each why it isn't, or nil.
// The guest is stopped once for all of them.
func (s *Session) RegisterEach(probes ...*Probe) []error {
	eps, errs := s.prepareAll(probes)
	s.mu.Lock()
	defer s.mu.Unlock()
	var which []int // attached to s here
	for i, p := range probes {
		switch {
		case errs[i] != nil:
		case s.closed:
			errs[i] = ErrClosed
		case !p.attach(s, false):
			errs[i] = ErrRegistered
		default:
			which = append(which, i)
		}
	}
	some, someEps := make([]*Probe, len(which)), make([]*breakpoint.Probe, len(which))
	for j, i := range which {
		some[j], someEps[j] = probes[i], eps[i]
	}
	if len(which) > 0 {
		_ = s.arm(some, someEps, func(eps ...*breakpoint.Probe) error {
			for j, err := range s.eng.RegisterEach(eps...) {
				errs[which[j]] = err
			}
			return nil
		})
	}
	for j, i := range which {
		if errs[i] != nil {
			some[j].detach(false)
			continue
		}
		s.enlist(some[j])
	}
	for i, p := range probes {
		errs[i] = s.fail("register", p, errs[i])
	}
	return errs
}

// prepareAll returns probes as the engine knows them, or why one can't be registered.
func (s *Session) prepareAll(probes []*Probe) ([]*breakpoint.Probe, []error) {
	eps, errs := make([]*breakpoint.Probe, len(probes)), make([]error, len(probes))
	seen := make(map[*Probe]bool, len(probes))
	for i, p := range probes {
		if p != nil && seen[p] {
			errs[i] = ErrRegistered
			continue
		}
		seen[p] = true
		eps[i], errs[i] = s.prepare(p)
	}
	return eps, errs
}

// prepare returns p as the engine knows it.
func (s *Session) prepare(p *Probe) (*breakpoint.Probe, error) {
	if p == nil {
		return nil, ErrNilProbe
	}
	addr, err := s.resolve(p)
	if err != nil {
		return nil, err
	}
	at, err := s.place(addr)
	if err != nil {
		return nil, err
	}
	ep := s.engineProbe(p, addr, at)
	if err := p.Filter.filter(ep, s); err != nil {
		return nil, err
	}
	if p.ret != nil {
		return ep, s.returns(p.ret, p, ep)
	}
	return ep, nil
}

// attach makes p a probe of s, unless it is registered.
func (p *Probe) attach(s *Session, private bool) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.session != nil {
		return false
	}
	p.session, p.private = s, private
	return true
}

// arm has the engine register probes; s.mu is held.
func (s *Session) arm(probes []*Probe, eps []*breakpoint.Probe, register func(...*breakpoint.Probe) error) error {
	// From here on a hit may be served at any moment.
	for i, p := range probes {
		p.mu.Lock()
		p.engine, p.addr, p.restored = eps[i], eps[i].Addr, false
		p.engine.SetEnabled(!p.disabled.Load())
		p.mu.Unlock()
	}
	// Hits from here on belong to the Loop that is to come.
	s.endIdle()
	defer s.serveIdle(loopGrace)
	return register(eps...)
}

// enlist notes that probes are registered; s.mu is held.
func (s *Session) enlist(probes ...*Probe) {
	s.probes = append(s.probes, probes...)
	for _, p := range probes {
		s.log.Debug("probe registered", "probe", p, "addr", hex(p.Address()))
	}
}

// detach makes p a probe that isn't registered.
func (p *Probe) detach(restored bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.past = p.stats()
	p.session, p.engine, p.private, p.function = nil, nil, false, nil
	p.restored = restored
}

// engineProbe returns p as the engine knows it. The breakpoint stands at at. The
// engine's handler gives p's handlers, and the body of a range over Hits, the registers
// of a hit, and takes them back.
func (s *Session) engineProbe(p *Probe, addr, at Addr) *breakpoint.Probe {
	handler := func(c *breakpoint.Context) breakpoint.Verdict {
		var begin time.Time
		if s.sink != nil && !c.Post {
			begin = time.Now()
		}
		return s.handle(p, c, addr, func(r *Regs) Action {
			a := Continue
			switch {
			case c.Post:
				a = p.Post(p, r, p.Flags())
			case p.Pre != nil:
				a = p.Pre(p, r)
			}
			if a != Continue || c.Post {
				return a
			}
			return s.yield(c, Hit{Probe: p, Regs: r, Time: begin})
		})
	}
	ep := &breakpoint.Probe{Addr: addr, At: at, Pre: handler, Limit: p.Limit.Hits, PerSecond: p.Limit.PerSecond}
	if p.Once {
		ep.Limit = 1
	}
	if p.Post != nil {
		ep.Post = handler
	}
	return ep
}

// yield gives a hit to the body of a range over Hits, if there is one.
func (s *Session) yield(c *breakpoint.Context, h Hit) Action {
	if s.sink == nil {
		return Continue
	}
	c.Leave() // the body is no handler
	s.hit = h
	s.hit.VCPU, s.hit.Seq = c.VCPU, s.seq.Add(1)
	return s.sink(&s.hit)
}

// Unregister removes probes and gives the guest its instructions back. Probes
// that aren't registered with s are ignored. One whose breakpoint can't be removed
// stays registered, and Unregister may be called again.
//
// When Unregister returns no handler of the probes runs, and none will. So it waits
// for one that runs now, unless it is called by a handler itself. A handler must not
// wait for another goroutine that calls it.
func (s *Session) Unregister(probes ...*Probe) error {
	gone, err := s.unregister(probes...)
	s.eng.Quiesce(gone...)
	return err
}

func (s *Session) unregister(probes ...*Probe) (gone []*breakpoint.Probe, errs error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, nil
	}
	for _, p := range probes {
		if p == nil {
			continue
		}
		i := slices.Index(s.probes, p)
		if i < 0 {
			continue
		}
		p.mu.Lock()
		ep := p.engine
		p.mu.Unlock()
		err := s.eng.Unregister(ep)
		if err != nil {
			errs = errors.Join(errs, s.fail("unregister", p, err))
			if s.eng.Registered(ep) {
				continue // it may be tried again
			}
		}
		s.probes = slices.Delete(s.probes, i, i+1)
		p.detach(err == nil)
		gone = append(gone, ep)
		s.log.Debug("probe unregistered", "probe", p)
	}
	return gone, errs
}

// Probes returns the registered probes, in order of registration.
func (s *Session) Probes() []*Probe {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.probes)
}

// serveIdle starts to answer hits that no Loop sees, and breakpoints of the
// guest's own, which reach us as soon as we are attached; s.mu is held. It begins
// after the given time, unless a Loop does.
func (s *Session) serveIdle(after time.Duration) {
	if s.idle != nil || s.looping {
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	i := &idle{cancel, make(chan struct{})}
	s.idle = i
	go func() {
		defer close(i.done)
		if after > 0 {
			t := time.NewTimer(after)
			defer t.Stop()
			select {
			case <-t.C:
			case <-ctx.Done():
				return
			}
		}
		pause, last := time.Millisecond, ""
		for ctx.Err() == nil {
			begin := time.Now()
			_, err := s.eng.Serve(ctx, false)
			if time.Since(begin) > time.Second {
				pause = time.Millisecond // what went wrong before is over
			}
			if errors.Is(err, breakpoint.ErrGone) || ctx.Err() != nil {
				return
			}
			if err != nil {
				if msg := err.Error(); msg != last {
					s.log.Error("answering a hit outside of Loop", "err", err)
					last = msg
				}
				select { // a Loop need not wait
				case <-time.After(pause):
				case <-ctx.Done():
				}
				pause = min(2*pause, time.Second)
			}
		}
	}()
}

// endIdle ends what serveIdle began; s.mu is held.
func (s *Session) endIdle() {
	if s.idle == nil {
		return
	}
	s.idle.cancel()
	<-s.idle.done
	s.idle = nil
}

// Loop runs the guest and calls handlers, in the caller's goroutine, until one
// of them returns something else than Continue (then Loop returns nil, or the error
// of [Probe.Fail]), ctx is
// done (then an error that wraps both ctx.Err and its cause), the last probe is out by
// its [Limit] (nil, or ErrTooOften), the domain is gone
// or runs another kernel (ErrDomainGone), or something fails. Where the guest changes its
// code at a probe, only that one ends (ErrTextChanged), unless it was the last.
// The probes stay registered: Loop may be called again.
//
// If a handler panics, the Session is closed, and so the guest restored, before
// the panic goes on. A handler must not call Close.
func (s *Session) Loop(ctx context.Context) error {
	err := s.loop(ctx, nil)
	if errors.Is(err, ErrClosed) {
		<-s.done // so that a program may end now
	}
	return err
}

func (s *Session) loop(ctx context.Context, sink func(*Hit) Action) (err error) {
	caller := ctx
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	s.mu.Lock()
	switch {
	case s.closed:
		s.mu.Unlock()
		return s.fail("loop", nil, ErrClosed)
	case s.looping:
		s.mu.Unlock()
		return s.fail("loop", nil, ErrLooping)
	case len(s.probes) == 0:
		s.mu.Unlock()
		return s.fail("loop", nil, ErrNotRegistered)
	}
	s.looping, s.stop, s.sink = true, cancel, sink
	s.endIdle()
	s.bad.Store(nil)
	s.mu.Unlock()

	finished := false
	defer func() {
		s.mu.Lock()
		s.looping, s.stop, s.sink = false, nil, nil
		if finished && !s.closed {
			s.serveIdle(0)
		}
		s.mu.Unlock()
		if !finished { // a handler panics, or ended the goroutine
			if err := s.Close(); err != nil {
				s.log.Error("close after a panic", "err", err)
			}
		}
	}()
	s.log.Debug("loop begins")
	var watch sync.WaitGroup
	watch.Go(func() { s.watchKernel(ctx, cancel) })
	v, err := s.eng.Serve(ctx, true)
	if errors.Is(err, breakpoint.ErrSpent) {
		err = nil
	}
	cause := context.Cause(ctx)
	cancel(nil)
	watch.Wait()
	finished = true
	s.log.Debug("loop ends", "action", int(v), "err", err)
	if bad := s.bad.Swap(nil); bad != nil {
		return s.fail("loop", nil, errors.Join(*bad, err))
	}
	if err != nil && cause != nil && (errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)) {
		err = cause
		// A cause need not be a context.Canceled: those of signal.NotifyContext
		// aren't in Go 1.26.0.
		if ended := caller.Err(); ended != nil && !errors.Is(err, ended) {
			err = fmt.Errorf("%w: %w", ended, err)
		}
	}
	return s.fail("loop", nil, err)
}

// kernelEvery is how often a Loop looks whether the guest's kernel is still there, as
// after a reset nothing else may tell: there are just no hits any more.
const kernelEvery = 5 * time.Second

// watchKernel ends a Loop when the guest runs another kernel.
func (s *Session) watchKernel(ctx context.Context, end context.CancelCauseFunc) {
	if s.kernel == nil {
		return
	}
	for missed, wait := 0, kernelEvery; ; {
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
		switch ok, err := s.kernel.Running(); {
		case err != nil:
			s.log.Debug("look for the guest's kernel", "err", err)
		case ok:
			missed, wait = 0, kernelEvery
			if err := s.eng.Check(); errors.Is(err, ErrTextChanged) {
				end(err)
				return
			} else if err != nil {
				s.log.Debug("look at the code at breakpoints", "err", err)
			}
		case missed < 2:
			missed, wait = missed+1, time.Second
		default:
			end(fmt.Errorf("%w: it has rebooted, was reset or runs another kernel by kexec, since %q isn't where it was: close this session and open the guest again",
				ErrDomainGone, s.kernel.Banner()))
			return
		}
	}
}

// Hits is Loop for those who prefer a range statement to handlers: it yields
// each hit, with the vCPU stopped before the probed instruction until the body
// is done. Pre handlers, if any, run first. Leaving the range ends the loop; an
// error is yielded last. The body must not call Close before it has left.
func (s *Session) Hits(ctx context.Context) iter.Seq2[*Hit, error] {
	return func(yield func(*Hit, error) bool) {
		left := false
		err := s.loop(ctx, func(h *Hit) Action {
			if !yield(h, nil) {
				left = true
				return Stop
			}
			return Continue
		})
		if errors.Is(err, ErrClosed) {
			<-s.done
		}
		if err != nil && !left {
			yield(nil, err)
		}
	}
}

// ReadMemory fills b from the guest's kernel memory. n < len(b) if and only if err is
// not nil: n bytes are before the first page that can't be read. Breakpoints of this
// Session don't show.
func (s *Session) ReadMemory(addr Addr, b []byte) (n int, err error) { return s.read(0, addr, b) }

// WriteMemory writes b to the guest's kernel memory, whatever the page's protection. n
// is as in ReadMemory. What is under a probe can't be written.
func (s *Session) WriteMemory(addr Addr, b []byte) (n int, err error) { return s.write(0, addr, b) }

// ReadString reads a NUL-terminated string from the guest's kernel memory, as
// [Probe.ReadString] does.
func (s *Session) ReadString(addr Addr, limit int) (string, error) {
	str, err := cstring.Read(s.ReadMemory, addr, limit)
	if errors.Is(err, ErrNoTerminator) {
		err = s.fail("read", nil, err)
	}
	return str, err
}

func (s *Session) read(cr3 uint64, addr Addr, b []byte) (n int, err error) {
	n, err = s.drv.Read(cr3, addr, b)
	s.eng.Overlay(addr, b[:n])
	return n, s.fail("read", nil, err)
}

func (s *Session) write(cr3 uint64, addr Addr, b []byte) (n int, err error) {
	for _, site := range s.eng.Sites() {
		if addr < site.Addr+uint64(len(site.Orig)) && site.Addr < addr+uint64(len(b)) {
			what := "a probe: unregister it first"
			if site.Owners == 0 {
				what = "the breakpoint of a ReturnProbe: unregister that first, or wait for its calls to return"
			}
			return 0, s.fail("write", nil, fmt.Errorf("%#x is under %s", site.Addr, what))
		}
	}
	n, err = s.drv.Write(cr3, addr, b)
	return n, s.fail("write", nil, err)
}

// Stats returns how the Session's hits were served.
func (s *Session) Stats() SessionStats { return SessionStats(s.eng.Stats()) }

// SessionStats counts stops of vCPUs, by what was done about them.
type SessionStats struct {
	Hits       uint64 // executions of probed addresses, and of those where calls may return
	Emulated   uint64 // whose instruction this process executed
	OutOfLine  uint64 // … the vCPU executed as a copy elsewhere
	InPlace    uint64 // … the vCPU executed in place, single-stepped
	Reinjected uint64 // breakpoints of the guest's own, given back to it
	Stale      uint64 // breakpoints that were removed when a vCPU had just hit them
}

// Close unregisters every probe, gives the guest its instructions back and
// detaches. It interrupts a Loop in progress, which returns ErrClosed, and waits
// for the handler that runs; so a handler must not call it, nor the body of a
// range over Hits. It joins all failures. After it has left the guest, which is
// nearly always so, it does nothing and returns the same.
//
// If a breakpoint can't be removed or a vCPU not be let go, however often that is
// tried, the error wraps ErrUnanswered. The Session then stays attached and answers
// the guest, and Close may be called again. A program that ends all the same leaves
// a guest that stands still at the breakpoint.
func (s *Session) Close() error {
	s.mu.Lock()
	s.closed = true
	if s.stop != nil {
		s.stop(ErrClosed)
	}
	s.mu.Unlock()

	s.closing.Lock()
	defer s.closing.Unlock()
	if s.left {
		return s.err
	}
	s.mu.Lock()
	s.endIdle()
	probes := s.probes
	s.probes = nil
	s.mu.Unlock()
	slow := time.AfterFunc(5*time.Second, func() {
		s.log.Error("Close has waited for 5 s; was it called in a handler?")
	})
	err := s.eng.Close()
	slow.Stop()
	s.left = s.eng.Left()
	for _, p := range probes {
		p.detach(err == nil)
	}
	if s.left {
		if s.leave != nil {
			err = errors.Join(err, s.leave())
		}
	} else {
		s.mu.Lock()
		s.serveIdle(0)
		s.mu.Unlock()
	}
	s.err = s.fail("close", nil, err)
	s.log.Debug("session closed", "left", s.left, "err", err)
	s.once.Do(func() { close(s.done) })
	return s.err
}

// closeError returns what Close returned.
func (s *Session) closeError() error {
	s.closing.Lock()
	defer s.closing.Unlock()
	return s.err
}
