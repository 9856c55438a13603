package breakpoint

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vmprobes/vmprobes/internal/goid"
	"github.com/vmprobes/vmprobes/internal/x86"
)

// A Verdict is what a handler decides.
type Verdict int

// Continue goes on; any other Verdict ends Serve after the hit.
const Continue Verdict = 0

// A Probe is one owner of a breakpoint. Addr, At, Pre and Post must not change
// while it is registered.
type Probe struct {
	// Addr is the address whose executions are hits.
	Addr uint64
	// At is where the breakpoint stands, if that isn't Addr: behind instructions
	// at Addr that do nothing, and that the guest rewrites (0: at Addr). A vCPU
	// that comes to At has executed Addr, with the same registers but IP; handlers
	// see it at Addr, and their Post runs before the instruction at At.
	At uint64
	// Pre runs before the instruction, Post after it; either may be nil.
	Pre, Post func(*Context) Verdict
	// Ret makes this a return probe: Pre is at the entry of each call that isn't missed.
	Ret *Returns
	// Want says which executions are hits, before anything is counted or a handler runs. It is
	// called with the engine's lock held: it must not call the engine, nor read the guest. Nil:
	// all are. The task is the zero Task unless WantTask is set, and where it isn't known.
	Want     func(r *x86.Regs, vcpu int, t *Task) bool
	WantTask bool
	// Limit has the probe taken out after so many hits, PerSecond when it has more in a second.
	// 0: no limit. Neither ends what a return probe follows already.
	Limit, PerSecond uint64

	disabled     atomic.Bool
	disables     atomic.Uint32 // how often it was
	armed        atomic.Bool
	hits, missed atomic.Uint64
	skipped      atomic.Uint64
	filtered     atomic.Uint64
	over         atomic.Uint32 // Over
	second       time.Time     // Engine.mu: when the second began that PerSecond counts in
	inSecond     uint64        // … and the hits in it
	limitBase    uint64        // … hits before it was registered
	site         *site         // nil unless registered; Engine.mu
	gen          uint64        // counts registrations; Engine.mu
}

// at returns the address of the breakpoint.
func (p *Probe) at() uint64 {
	if p.At != 0 {
		return p.At
	}
	return p.Addr
}

// shifted reports whether the breakpoint stands elsewhere than at the address
// whose executions are hits.
func (p *Probe) shifted() bool { return p.at() != p.Addr }

// SetEnabled makes the probe's handlers run, or not; the breakpoint stays. The calls that a
// return probe follows when it is disabled are dropped.
func (p *Probe) SetEnabled(on bool) {
	if was := p.disabled.Swap(!on); !was && !on {
		p.disables.Add(1)
	}
}

// Enabled reports whether the handlers run.
func (p *Probe) Enabled() bool { return !p.disabled.Load() }

// Registered reports whether p is registered.
func (e *Engine) Registered(p *Probe) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return p.site != nil
}

// Armed reports whether the breakpoint of p is in the guest, as far as the last
// Register, Unregister or hit knows.
func (p *Probe) Armed() bool { return p.armed.Load() }

// Hits is how often the guest executed the address while the probe was enabled
// and its handlers ran; Missed is how often it did and they did not: nobody
// served, or another probe's handler at the same address ended the hit. While a
// probe is registered and enabled the two add up to the executions.
func (p *Probe) Hits() uint64   { return p.hits.Load() }
func (p *Probe) Missed() uint64 { return p.missed.Load() }

// Skipped is how often a handler of another probe at the address had the function return
// before this one's handlers ran. It is a part of neither Hits nor Missed.
func (p *Probe) Skipped() uint64 { return p.skipped.Load() }

// Filtered is how often the guest executed the address and Want said that it isn't a hit.
func (p *Probe) Filtered() uint64 { return p.filtered.Load() }

// Over says which limit a probe has reached.
type Over uint8

// Limits.
const (
	NotOver Over = iota
	OverLimit
	OverPerSecond
)

// Over says which limit has ended, or is about to end, the registration of p.
func (p *Probe) Over() Over { return Over(p.over.Load()) }

// A Context is what a handler sees of a hit. It is valid until the handler returns.
type Context struct {
	Probe *Probe
	VCPU  int
	// Regs are the vCPU's registers: in Pre with IP at the probe, in Post after
	// the instruction. The vCPU goes on with what a handler leaves in them, if a
	// vCPU can have such registers. A Pre handler that changes IP replaces the
	// instruction: it isn't executed, and Post handlers don't run.
	Regs *x86.Regs
	// Post is set while a Post handler runs.
	Post bool
	// Call is, of a return probe, the call that begins or, in Returns.Return, ends.
	Call *Activation
	// Return is set while Returns.Return runs.
	Return bool

	skip, moved bool
	e           *Engine
}

// Leave tells the engine that what the handler does from here on is not the
// probe's: Unregister doesn't wait for it.
func (c *Context) Leave() {
	c.e.mu.Lock()
	defer c.e.mu.Unlock()
	c.e.handled()
}

// SkipCall says that a Pre handler has had the function return that the vCPU is at the first
// instruction of: Regs are those that its caller goes on with. No other Pre handler runs, and the
// calls that are followed have returned.
func (c *Context) SkipCall() { c.skip = true }

// CallSkipped reports whether SkipCall was called.
func (c *Context) CallSkipped() bool { return c.skip }

// Moved reports whether another Pre handler of this hit has sent the vCPU elsewhere, though
// Regs.IP is at the probe.
func (c *Context) Moved() bool { return c.moved }

// Method says how the instructions under breakpoints are executed.
type Method uint8

// Methods. Auto takes the first one that is possible; the others are for tests
// and measurements.
const (
	Auto Method = iota
	OutOfLine
	InPlace
)

// Config is the policy of an Engine.
type Config struct {
	// Scratch proposes ranges of dead code, best first: bytes of int3 (0xcc)
	// that nothing executes. The engine checks that they are.
	Scratch func(near uint64, try func(addr, size uint64) bool)
	// MayFault says whether the instruction at an address is one whose fault the
	// guest's kernel expects, and finds by its address (__ex_table). Such an
	// instruction isn't probed. If MayFault is nil, instructions that access memory
	// are probed only if they can be emulated.
	MayFault func(addr uint64) bool
	// Rewriting reports whether the guest's kernel is changing its own code at
	// this moment. The guest is frozen then. Breakpoints are not inserted or removed
	// meanwhile, as far as waiting for a moment helps. Nil: it never does.
	Rewriting func() bool
	// Journal is told of every change of the guest's text before it is made. Nil:
	// nobody is.
	Journal Journal
	// Hooks are for return probes.
	Hooks Hooks
	// Method is Auto except in tests.
	Method Method
	Logger *slog.Logger
}

// Stats counts what the engine did, since New.
type Stats struct {
	Hits       uint64 // stops at an armed breakpoint
	Emulated   uint64 // instructions executed by this process
	OutOfLine  uint64 // in a slot
	InPlace    uint64 // by a single step
	Reinjected uint64 // breakpoints that were the guest's own
	Stale      uint64 // stops at a breakpoint that had been removed meanwhile
}

// site is one breakpoint, whoever owns it.
type site struct {
	addr uint64
	insn x86.Insn
	// owners are in order of registration, the shifted ones before the others:
	// their instruction comes before the one at addr.
	owners []owner
	armed  bool // the breakpoint is in the guest
	slot   *slot
	lost   error // why it is out, though probes are registered: the guest has changed its code

	filters             int       // owners with Want
	wantTask            bool      // one of them had WantTask
	rets                int       // owners that are return probes
	live                int       // calls that are under way and return here
	warm                time.Time // when the last one did, or the breakpoint was made for one; 0: no return is expected
	idle                int       // returns to here since then
	exitOf              []*Probe  // whose calls end here, followed to exits
	by                  []*Probe  // whose calls were followed to here
	own, foreign, tried uint64    // returns to here that were followed, and others; when exits were tried last
}

// owner is one registration of a probe.
type owner struct {
	*Probe
	gen uint64
}

// inflight is a hit whose instruction isn't executed yet.
type inflight struct {
	vcpu    int
	site    *site
	slot    *slot // nil: in place
	owners  []owner
	before  x86.Regs
	post    bool  // run post handlers
	told    int   // owners that have counted it, or needn't
	shifted int   // how many of the owners are; they are the first
	skipped bool  // a handler has had the function return
	lost    bool  // taken over from a process that died; before isn't known, if it is in a slot
	mark    *Mark // of the process that died: the vCPU may not be in the slot
}

// An Engine owns the breakpoints of one guest.
type Engine struct {
	drv Driver
	cfg Config
	log *slog.Logger

	serving sync.Mutex // held by Serve

	mu      sync.Mutex
	sites   map[uint64]*site
	order   []*site // those of sites, by address
	lost    []*site // that are out, with probes that are registered
	slotEnd map[uint64]*slot
	free    []*slot
	dirty   []*slot  // to be filled with int3 again, which failed
	adopted []*slot  // taken over from a process that died
	back    []came   // likewise: vCPUs that may come to the end of a slot once more
	marks   []*Marks // of the vCPUs, or none
	own     []*Mark  // those of marks that this process uses, or nil where none is free
	scratch []region
	active  []*inflight // on their way: a vCPU can have several, one for each interrupt level
	idle    []*inflight // to be used again
	owed    []debt
	thaws   int   // Thaws that failed, which thawLater makes
	endLeft error // slots that Close had to leave behind
	nvcpu   int
	cheap   bool // Caps.CheapStep
	hidden  bool // Caps.Hidden
	stats   Stats
	closing bool // no probe may be registered any more
	closed  bool

	// Of return probes.
	calls       map[uint64]*call   // by slot
	tasks       map[uint64][]*call // by Task.Addr, from the top of the stack down
	activations int                // in calls
	depths      map[taskProbe]int  // how many of them are of one probe by one task
	plans       map[uint64]plan    // by return address
	held        []time.Duration    // while calls were under way, by vCPU, or one for all (Caps.AllStop)
	ended       []endedCall        // whose handlers are to run
	made        bool               // breakpoints at return addresses may be there
	sweeps      uint64
	swept       time.Time
	quiet       uint64      // sweeps after a Wait that found nothing
	stops       uint64      // that were served
	following   atomic.Bool // there is something to sweep, to tell or to take out
	spent       []*Probe    // whose limits are reached
	spentTold   string      // what the last failure to take one out was
	spentErr    error       // of the last one

	owing   atomic.Bool // owed isn't empty
	retried *debt       // that is being tried again
	mem     memory      // of the vCPU in hand
	running *Probe      // whose handler runs
	done    *sync.Cond  // running changed
	server  uint64      // the goroutine that runs handlers

	// Of the goroutine in Serve.
	stop   Stop
	ctx    Context
	moved  bool // a Pre handler of the hit in hand has sent the vCPU elsewhere
	buf    [x86.MaxLen]byte
	now    present
	inHand []*Activation // that begin or end with the stop, and of which nothing is counted yet
	noTask Task
	tick   tick
}

// New returns an engine for the guest that drv is attached to.
func New(drv Driver, cfg Config) *Engine {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	caps := drv.Caps()
	e := &Engine{
		drv: drv, cfg: cfg, log: cfg.Logger,
		sites:   make(map[uint64]*site),
		slotEnd: make(map[uint64]*slot),
		calls:   make(map[uint64]*call),
		tasks:   make(map[uint64][]*call),
		depths:  make(map[taskProbe]int),
		plans:   make(map[uint64]plan),
		nvcpu:   caps.VCPUs,
		cheap:   caps.CheapStep,
		hidden:  caps.Hidden,
		held:    make([]time.Duration, max(caps.VCPUs, 1)),
	}
	if caps.AllStop {
		e.held = e.held[:1]
	}
	e.done = sync.NewCond(&e.mu)
	if cfg.Journal != nil {
		for v := range e.nvcpu {
			ms := cfg.Journal.Marks(v)
			e.marks, e.own = append(e.marks, ms), append(e.own, &ms[0])
		}
	}
	return e
}

// Stats returns the engine's counters.
func (e *Engine) Stats() Stats {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.stats
}

// A Site describes one breakpoint.
type Site struct {
	Addr   uint64
	Orig   []byte // the instruction under it
	Armed  bool
	Owners int
	Slot   uint64 // address of the out-of-line copy, 0 if none
}

// Sites lists the breakpoints in address order.
func (e *Engine) Sites() []Site {
	e.mu.Lock()
	defer e.mu.Unlock()
	out := make([]Site, 0, len(e.order))
	for _, s := range e.order {
		x := Site{Addr: s.addr, Orig: s.insn.Bytes(), Armed: s.armed, Owners: len(s.owners)}
		if s.slot != nil {
			x.Slot = s.slot.addr
		}
		out = append(out, x)
	}
	return out
}

// Register arms every probe, or none.
func (e *Engine) Register(probes ...*Probe) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closing {
		return ErrClosed
	}
	err := e.freeze()
	if err != nil {
		return err
	}
	given := probes
	for i, p := range probes {
		if err = e.add(p); err != nil {
			probes = probes[:i]
			break
		}
	}
	all := err == nil
	if all {
		if err = e.thaw(); err == nil {
			return nil
		}
	}
	for _, q := range slices.Backward(probes) { // the guest is frozen still
		err = errors.Join(err, e.drop(q, true))
	}
	err = errors.Join(err, e.removeColdOf(given))
	if !all {
		err = errors.Join(err, e.thaw())
	}
	return err
}

// RegisterEach arms those of probes that can be, and returns for each why it isn't, or nil.
func (e *Engine) RegisterEach(probes ...*Probe) []error {
	errs := make([]error, len(probes))
	e.mu.Lock()
	defer e.mu.Unlock()
	err := ErrClosed
	if !e.closing {
		err = e.freeze()
	}
	for i, p := range probes {
		if errs[i] = err; err == nil {
			errs[i] = e.add(p)
		}
	}
	if err != nil {
		return errs
	}
	if slices.ContainsFunc(errs, func(err error) bool { return err != nil }) {
		if err := e.removeColdOf(probes); err != nil {
			e.log.Debug("breakpoints of probes that could not be registered stay for a while", "err", err)
		}
	}
	if err = e.thaw(); err == nil {
		return errs
	}
	for i, p := range slices.Backward(probes) { // the guest is frozen still
		if errs[i] == nil {
			errs[i] = errors.Join(err, e.drop(p, true))
		}
	}
	if err := e.removeColdOf(probes); err != nil {
		errs[0] = errors.Join(errs[0], err)
	}
	return errs
}

// Unregister removes probes; those that aren't registered are ignored. The
// breakpoint goes with the last probe at its address. If that fails the probe
// stays registered.
//
// No handler of a probe begins after Unregister has returned. One that runs still
// is waited for by [Engine.Quiesce].
func (e *Engine) Unregister(probes ...*Probe) (err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closing {
		return nil
	}
	if err := e.freeze(); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, e.thaw()) }()
	for _, p := range probes {
		err = errors.Join(err, e.drop(p, false))
	}
	return errors.Join(err, e.removeColdOf(probes))
}

// removeColdOf removes the breakpoints that only return probes had among probes, which have been
// dropped.
func (e *Engine) removeColdOf(probes []*Probe) error {
	if !slices.ContainsFunc(probes, func(p *Probe) bool { return p.Ret != nil }) {
		return nil
	}
	return e.removeAllCold()
}

// Quiesce waits until no handler of the probes runs, unless it is called by one.
func (e *Engine) Quiesce(probes ...*Probe) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.running == nil || !slices.Contains(probes, e.running) || e.server == goid.Get() {
		return
	}
	for e.running != nil && slices.Contains(probes, e.running) {
		e.done.Wait()
	}
}

// rewritingTries bounds how often freeze waits for the guest to have rewritten
// its code, a millisecond each time.
const rewritingTries = 50

// freeze freezes the guest, at a moment when it isn't rewriting its own code.
// e.mu is released while it waits for one.
func (e *Engine) freeze() error {
	for try := 0; ; try++ {
		if err := e.retry(e.drv.Freeze); err != nil {
			return fmt.Errorf("pause the guest: %w", err)
		}
		if try == rewritingTries || e.cfg.Rewriting == nil || !e.cfg.Rewriting() {
			return nil
		}
		if err := e.thaw(); err != nil {
			return err
		}
		e.mu.Unlock()
		time.Sleep(time.Millisecond)
		e.mu.Lock()
		if e.closing {
			return ErrClosed
		}
	}
}

// thaw undoes a freeze. If that fails it is tried again, whoever serves or doesn't.
func (e *Engine) thaw() error {
	err := e.retry(e.drv.Thaw)
	if err == nil || errors.Is(err, ErrGone) {
		return err
	}
	if e.thaws++; e.thaws == 1 {
		go e.thawLater()
	}
	return fmt.Errorf("resume the guest, which is tried again: %w", err)
}

// thawLater makes the Thaws that failed.
func (e *Engine) thawLater() {
	for pause := time.Millisecond; ; pause = min(2*pause, 100*time.Millisecond) {
		time.Sleep(pause)
		e.mu.Lock()
		for e.thaws > 0 {
			err := e.drv.Thaw()
			if err != nil && !errors.Is(err, ErrGone) {
				break
			}
			e.thaws--
		}
		over := e.thaws == 0
		e.mu.Unlock()
		if over {
			return
		}
	}
}

func (e *Engine) add(p *Probe) error {
	if p.site != nil {
		return fmt.Errorf("probe at %#x is registered already", p.Addr)
	}
	at := p.at()
	s := e.sites[at]
	if s == nil {
		var err error
		if s, err = e.insertSite(at); err != nil {
			return err
		}
	}
	p.gen++
	p.site = s
	p.over.Store(uint32(NotOver))
	e.spentErr = nil
	p.second, p.inSecond, p.limitBase = time.Time{}, 0, p.Hits()
	if s.wantTask = s.wantTask || p.WantTask; p.Want != nil {
		s.filters++
	}
	from, to := s.shifted(), len(s.owners)
	if p.shifted() {
		from, to = 0, from
	}
	if p.Ret != nil { // its Pre comes before what may send the vCPU elsewhere
		s.rets++
		for to > from && s.owners[to-1].Ret == nil {
			to--
		}
		p.Ret.active, p.Ret.lost, p.Ret.told = 0, nil, nil
		p.Ret.exits, p.Ret.exiting = nil, false // another engine's, which was closed
	}
	// Handlers may be iterating over the old slice.
	s.owners = slices.Insert(slices.Clone(s.owners), to, owner{p, p.gen})
	p.armed.Store(true)
	if r := p.Ret; r != nil && (r.Follow == AtExits || r.Follow == FollowAuto && r.ExitsFirst) {
		if err := e.useExits(p); err != nil && r.Follow == AtExits {
			return errors.Join(err, e.drop(p, true))
		}
	}
	return nil
}

// insertSite makes a breakpoint; the guest is frozen.
func (e *Engine) insertSite(addr uint64) (*site, error) {
	s, err := e.newSite(addr)
	if err != nil {
		return nil, err
	}
	if s.slot == nil { // with one it has been told
		if _, err := e.tell(s, nil); err != nil {
			return nil, err
		}
	}
	if err := e.drv.InsertBreak(s.addr, &s.insn); err != nil {
		e.over(s.addr)
		e.freeSlot(s)
		return nil, fmt.Errorf("insert breakpoint at %#x: %w", s.addr, err)
	}
	s.armed = true
	e.enlist(s)
	e.log.Debug("breakpoint inserted", "addr", hex(s.addr), "insn", s.insn.String())
	return s, nil
}

// enlist enters s in the books, and delist takes it out.
func (e *Engine) enlist(s *site) {
	e.sites[s.addr] = s
	i, found := slices.BinarySearchFunc(e.order, s.addr, byAddr)
	if found {
		e.order[i] = s
		return
	}
	e.order = slices.Insert(e.order, i, s)
}

func (e *Engine) delist(s *site) {
	if e.sites[s.addr] != s {
		return
	}
	delete(e.sites, s.addr)
	if i, found := slices.BinarySearchFunc(e.order, s.addr, byAddr); found {
		e.order = slices.Delete(e.order, i, i+1)
	}
}

func byAddr(s *site, addr uint64) int { return cmp.Compare(s.addr, addr) }

// shifted returns how many of the owners are.
func (s *site) shifted() int {
	n := 0
	for n < len(s.owners) && s.owners[n].shifted() {
		n++
	}
	return n
}

// drop removes a probe, and with the last one at its address the breakpoint. If that
// fails the probe stays registered; with force only the breakpoint stays.
func (e *Engine) drop(p *Probe, force bool) error {
	s := p.site
	if s == nil {
		return nil
	}
	if s.lost != nil {
		e.disown(p)
		if len(s.owners) == 0 {
			e.lost = slices.DeleteFunc(e.lost, func(l *site) bool { return l == s })
		}
		if p.Ret != nil {
			e.endCalls(p)
		}
		return s.lost
	}
	var err error
	if len(s.owners) == 1 && s.live == 0 && !slices.ContainsFunc(s.exitOf, func(q *Probe) bool { return q != p }) {
		if err = e.removeSite(s); err != nil && s.armed && !force {
			return err
		}
	}
	e.disown(p)
	if p.Ret != nil {
		e.endCalls(p)
	}
	return err
}

// endCalls ends what p, which isn't registered any more, follows. Its breakpoints stay, cold.
func (e *Engine) endCalls(p *Probe) {
	e.forgetCalls(p)
	e.leaveExits(p)
}

// disown makes p a probe that isn't registered.
func (e *Engine) disown(p *Probe) {
	s := p.site
	p.site = nil
	p.armed.Store(false)
	if p.Ret != nil {
		s.rets--
	}
	if p.Want != nil {
		s.filters--
	}
	s.owners = slices.DeleteFunc(slices.Clone(s.owners), func(o owner) bool { return o.Probe == p })
}

// removeSite takes the breakpoint of s out. If that fails s stays armed: its hits
// are served, and it can be tried again.
func (e *Engine) removeSite(s *site) error {
	if !s.armed {
		e.delist(s)
		return nil
	}
	err := e.retry(func() error { return e.drv.RemoveBreak(s.addr) })
	e.log.Debug("breakpoint removed", "addr", hex(s.addr), "err", err)
	if err != nil {
		err = fmt.Errorf("remove breakpoint at %#x: %w", s.addr, err)
		if !errors.Is(err, ErrTextChanged) && !errors.Is(err, ErrGone) {
			return err
		}
	}
	e.delist(s)
	s.armed = false
	e.over(s.addr)
	e.freeSlot(s)
	return err
}

// tell tells the journal of a breakpoint that is about to be inserted, and of its slot.
func (e *Engine) tell(s *site, sl *slot) (*atomic.Int32, error) {
	if e.cfg.Journal == nil {
		return new(atomic.Int32), nil
	}
	b := LeftBreak{s.addr, s.insn.Bytes()}
	var left *LeftSlot
	if sl != nil {
		left = &LeftSlot{Addr: sl.addr, Break: b, Code: sl.code[:], Len: int(sl.end - sl.addr)}
	}
	busy, err := e.cfg.Journal.Break(b, left)
	if err != nil {
		return nil, fmt.Errorf("breakpoint at %#x, in the journal before it is made: %w", s.addr, err)
	}
	return busy, nil
}

// over tells the journal that a breakpoint is out. Whoever reads it compares before he
// writes, so one that it doesn't hear of does no harm.
func (e *Engine) over(addr uint64) {
	if e.cfg.Journal == nil {
		return
	}
	if err := e.cfg.Journal.Removed(addr); err != nil {
		e.log.Warn("the journal wasn't told that a breakpoint is out", "addr", hex(addr), "err", err)
	}
}

// tries bounds the attempts that retry makes.
const tries = 3

// retry calls f until it succeeds, a few times at most. It is for what must not fail.
func (e *Engine) retry(f func() error) (err error) {
	for try := range tries {
		if try > 0 {
			time.Sleep(time.Millisecond)
		}
		if err = f(); err == nil || final(err) {
			return err
		}
	}
	return err
}

// final reports whether an error stays the same however often it is tried.
func final(err error) bool {
	return errors.Is(err, ErrGone) || errors.Is(err, ErrTextChanged) || errors.Is(err, x86.ErrStepLost) ||
		errors.Is(err, ErrNoWayPast) || errors.Is(err, ErrBadRegs) || errors.Is(err, ErrQueued)
}

// newSite reads and judges the instruction at addr.
func (e *Engine) newSite(addr uint64) (*site, error) {
	in, err := e.readInsn(addr)
	if err != nil {
		return nil, err
	}
	i, _ := slices.BinarySearchFunc(e.order, addr, byAddr) // they don't overlap one another
	for _, o := range e.order[max(i-1, 0):min(i+1, len(e.order))] {
		if addr > o.addr && addr < o.addr+uint64(o.insn.Len) || o.addr > addr && o.addr < addr+uint64(in.Len) {
			return nil, fmt.Errorf("%#x and %#x: %w", addr, o.addr, ErrOverlap)
		}
	}
	s := &site{addr: addr, insn: in}
	if e.cheap {
		if e.cfg.Method == OutOfLine {
			return nil, fmt.Errorf("%#x (%s): %w: this hypervisor steps in place", addr, in.String(), ErrNoWayPast)
		}
		if err := in.CanStep(); err != nil && !e.emulates(&in) {
			return nil, fmt.Errorf("%#x (%s): %w: %w", addr, in.String(), ErrNoWayPast, err)
		}
		return s, nil
	}
	// Whatever has an entry in the exception table may fault, and not only by its
	// memory operand: Linux expects that of "mov %eax,%ds", too.
	if e.cfg.MayFault != nil && e.cfg.MayFault(addr) {
		return nil, fmt.Errorf("%#x (%s): %w: the kernel expects a fault there", addr, in.String(), ErrNoWayPast)
	}
	if in.CanEmulate() && e.cfg.Method == Auto && !in.MemoryOperand() {
		return s, nil
	}
	var slotErr error
	if e.cfg.Method != InPlace {
		if s.slot, slotErr = e.newSlot(s); slotErr == nil {
			return s, nil
		}
	}
	stepErr := e.canStepNow(&in)
	if e.cfg.Method != OutOfLine && stepErr == nil {
		return s, nil
	}
	if in.CanEmulate() && e.cfg.Method == Auto {
		return s, nil // its memory operand is mapped, or else: execute
	}
	return nil, fmt.Errorf("%#x (%s): %w: out of line: %v; in place: %v", addr, in.String(), ErrNoWayPast, slotErr, stepErr)
}

// errMayFault: a fault that the guest's kernel expects would come from another address
// in a copy, and could not be handled while the other vCPUs are held for a step.
var errMayFault = errors.New("without symbols there is no telling whether it may fault")

// canStepNow says why an instruction can't be stepped in place now.
func (e *Engine) canStepNow(in *x86.Insn) error {
	if err := in.CanStep(); err != nil {
		return err
	}
	if !e.cheap && in.MemoryOperand() && e.cfg.MayFault == nil {
		return errMayFault
	}
	if !e.drv.Caps().Step {
		return errors.New("the other vCPUs can't be held")
	}
	return nil
}

// readInsn reads the instruction at addr. A breakpoint there that isn't ours may
// be the guest patching itself, which takes it microseconds.
func (e *Engine) readInsn(addr uint64) (x86.Insn, error) {
	var b [x86.MaxLen]byte
	n, err := e.drv.Read(0, addr, b[:]) // the instruction may end where what is mapped does
	if err != nil && n == 0 {
		return x86.Insn{}, fmt.Errorf("read %#x: %w", addr, err)
	}
	e.overlay(addr, b[:n])
	in, err := x86.Decode(b[:n])
	if err != nil {
		return in, fmt.Errorf("%#x: %w: %w", addr, ErrBadInsn, err)
	}
	if in.IsInt3() {
		return in, fmt.Errorf("%#x: %w", addr, ErrForeign)
	}
	return in, nil
}

// Overlay replaces our breakpoints in bytes read from addr by what is under them.
// Where the guest has rewritten its code, what it wrote shows.
func (e *Engine) Overlay(addr uint64, b []byte) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.overlay(addr, b)
}

func (e *Engine) overlay(addr uint64, b []byte) {
	if e.hidden {
		return
	}
	i, _ := slices.BinarySearchFunc(e.order, addr, byAddr)
	for _, s := range e.order[i:] {
		off := s.addr - addr
		if off >= uint64(len(b)) {
			break
		}
		if !s.armed || b[off] != int3 {
			continue
		}
		orig := s.insn.Bytes()
		rest := b[off+1 : min(off+uint64(len(orig)), uint64(len(b)))]
		if string(rest) == string(orig[1:1+len(rest)]) {
			b[off] = orig[0]
		}
	}
	for _, sl := range e.slotEnd {
		sl.overlay(addr, b)
	}
	for _, sl := range e.dirty {
		sl.overlay(addr, b)
	}
}

type hex uint64

func (h hex) String() string { return fmt.Sprintf("%#x", uint64(h)) }

// LogValue keeps a hex a string in structured logs.
func (h hex) LogValue() slog.Value { return slog.StringValue(h.String()) }

// expired is a context whose time is up: Wait with it returns what has stopped
// already, and waits for nothing.
var expired = func() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}()
