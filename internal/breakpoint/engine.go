package breakpoint

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vmprobes/vmprobes/internal/x86"
)

// A Verdict is what a handler decides.
type Verdict int

// Continue goes on; any other Verdict ends Serve after the hit.
const Continue Verdict = 0

// A Probe is one owner of a breakpoint. Addr, Pre and Post must not change
// while it is registered.
type Probe struct {
	Addr uint64
	// Pre runs before the instruction, Post after it; either may be nil.
	Pre, Post func(*Context) Verdict

	disabled     atomic.Bool
	armed        atomic.Bool
	hits, missed atomic.Uint64
	site         *site // nil unless registered; Engine.mu
}

// SetEnabled makes the probe's handlers run, or not; the breakpoint stays.
func (p *Probe) SetEnabled(on bool) { p.disabled.Store(!on) }

// Enabled reports whether the handlers run.
func (p *Probe) Enabled() bool { return !p.disabled.Load() }

// Registered reports whether the breakpoint of p is in the guest.
func (e *Engine) Registered(p *Probe) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return p.site != nil
}

// Armed reports whether the breakpoint of p is in the guest, as far as the last
// Register, Unregister or hit knows.
func (p *Probe) Armed() bool { return p.armed.Load() }

// Hits is how often the guest executed the address while the probe was enabled
// and served; Missed is how often while nobody served it.
func (p *Probe) Hits() uint64   { return p.hits.Load() }
func (p *Probe) Missed() uint64 { return p.missed.Load() }

// A Context is what a handler sees of a hit. It is valid until the handler returns.
type Context struct {
	Probe *Probe
	VCPU  int
	// Regs are the vCPU's registers: in Pre with IP at the probe, in Post after
	// the instruction. The vCPU goes on with what a handler leaves in them. A Pre
	// handler that changes IP replaces the instruction: it isn't executed and
	// Post handlers don't run.
	Regs *x86.Regs
	// Post is set while a Post handler runs.
	Post bool
}

// Method says how the instructions under breakpoints are executed.
type Method uint8

// Methods. Auto takes the first one that is possible; the others are for tests
// and measurements.
const (
	Auto Method = iota
	OutOfLine
	InPlace
	ByHypervisor
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
	// Method is Auto except in tests.
	Method Method
	Logger *slog.Logger
}

// Stats counts what the engine did, since New.
type Stats struct {
	Hits       uint64 // stops at an armed breakpoint
	Emulated   uint64 // instructions executed by this process
	Hypervisor uint64 // by the hypervisor
	OutOfLine  uint64 // in a slot
	InPlace    uint64 // by a single step
	Reinjected uint64 // breakpoints that were the guest's own
	Stale      uint64 // stops at a breakpoint that had been removed meanwhile
}

// site is one breakpoint: one patched byte, whoever owns it.
type site struct {
	addr   uint64
	insn   x86.Insn
	owners []*Probe // in order of registration
	armed  bool     // the breakpoint is in the guest
	slot   *slot
}

// slot is a copy of an instruction in dead code. The byte after the copy is an
// int3, which brings the vCPU back.
type slot struct {
	addr, end uint64
	size      uint64
	site      *site
	busy      int // vCPUs in it
}

// inflight is a hit whose instruction isn't executed yet.
type inflight struct {
	vcpu   int
	site   *site
	slot   *slot // nil: in place
	probes []*Probe
	before x86.Regs
	post   bool // run post handlers
}

// An Engine owns the breakpoints of one guest.
type Engine struct {
	drv Driver
	cfg Config
	log *slog.Logger

	serving sync.Mutex // held by Serve

	mu       sync.Mutex
	sites    map[uint64]*site
	slotEnd  map[uint64]*slot
	free     []*slot
	scratch  []region
	active   []*inflight // on their way: a vCPU can have several, one for each interrupt level
	idle     []*inflight // to be used again
	nvcpu    int
	cheap    bool // Caps.CheapStep
	stats    Stats
	closed   bool
	closeErr error

	// Of the goroutine in Serve.
	stop Stop
	ctx  Context
}

type region struct {
	addr, size uint64
	orig       []byte
}

// New returns an engine for the guest that drv is attached to.
func New(drv Driver, cfg Config) *Engine {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	return &Engine{
		drv: drv, cfg: cfg, log: cfg.Logger,
		sites:   make(map[uint64]*site),
		slotEnd: make(map[uint64]*slot),
		nvcpu:   drv.Caps().VCPUs,
		cheap:   drv.Caps().CheapStep,
	}
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
	out := make([]Site, 0, len(e.sites))
	for _, s := range e.sites {
		x := Site{Addr: s.addr, Orig: s.insn.Bytes(), Armed: s.armed, Owners: len(s.owners)}
		if s.slot != nil {
			x.Slot = s.slot.addr
		}
		out = append(out, x)
	}
	slices.SortFunc(out, func(a, b Site) int {
		switch {
		case a.Addr < b.Addr:
			return -1
		case a.Addr > b.Addr:
			return 1
		}
		return 0
	})
	return out
}

// Register arms every probe, or none.
func (e *Engine) Register(probes ...*Probe) (err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return ErrClosed
	}
	if err := e.drv.Freeze(); err != nil {
		return fmt.Errorf("pause the guest: %w", err)
	}
	undo := func(n int) (errs error) {
		for _, q := range slices.Backward(probes[:n]) {
			errs = errors.Join(errs, e.drop(q))
		}
		return errs
	}
	defer func() {
		if terr := e.again(e.drv.Thaw); terr != nil {
			if err == nil {
				err = undo(len(probes))
			}
			err = errors.Join(err, fmt.Errorf("resume the guest: %w", terr))
		}
	}()
	for i, p := range probes {
		if err := e.add(p); err != nil {
			return errors.Join(err, undo(i))
		}
	}
	return nil
}

// Unregister removes probes; those that aren't registered are ignored. The
// breakpoint goes with the last probe at its address.
func (e *Engine) Unregister(probes ...*Probe) (err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return nil
	}
	if err := e.again(e.drv.Freeze); err != nil {
		return fmt.Errorf("pause the guest: %w", err)
	}
	defer func() {
		if terr := e.again(e.drv.Thaw); terr != nil {
			err = errors.Join(err, fmt.Errorf("resume the guest: %w", terr))
		}
	}()
	for _, p := range probes {
		err = errors.Join(err, e.drop(p))
	}
	return err
}

func (e *Engine) add(p *Probe) error {
	if p.site != nil {
		return fmt.Errorf("probe at %#x is registered already", p.Addr)
	}
	s := e.sites[p.Addr]
	if s == nil {
		var err error
		if s, err = e.newSite(p.Addr); err != nil {
			return err
		}
		if err := e.drv.InsertBreak(s.addr, &s.insn); err != nil {
			e.freeSlot(s)
			return fmt.Errorf("insert breakpoint at %#x: %w", s.addr, err)
		}
		s.armed = true
		e.sites[s.addr] = s
		e.log.Debug("breakpoint inserted", "addr", hex(s.addr), "insn", s.insn.String())
	}
	s.owners = append(s.owners, p)
	p.site = s
	p.armed.Store(true)
	return nil
}

func (e *Engine) drop(p *Probe) error {
	s := p.site
	if s == nil {
		return nil
	}
	p.site = nil
	p.armed.Store(false)
	// Handlers may be iterating over the old slice.
	s.owners = slices.DeleteFunc(slices.Clone(s.owners), func(q *Probe) bool { return q == p })
	if len(s.owners) > 0 {
		return nil
	}
	return e.removeSite(s)
}

// removeSite takes the breakpoint of s out. If that fails s stays, without
// owners: its hits are executed, and Close tries again.
func (e *Engine) removeSite(s *site) error {
	if s.armed {
		err := e.again(func() error { return e.drv.RemoveBreak(s.addr) })
		e.log.Debug("breakpoint removed", "addr", hex(s.addr), "err", err)
		if err != nil && !errors.Is(err, ErrTextChanged) && !errors.Is(err, ErrGone) {
			return fmt.Errorf("remove breakpoint at %#x: %w", s.addr, err)
		}
		defer func() {
			s.armed = false
			e.freeSlot(s)
		}()
		if err != nil {
			delete(e.sites, s.addr)
			return fmt.Errorf("remove breakpoint at %#x: %w", s.addr, err)
		}
	}
	delete(e.sites, s.addr)
	return nil
}

// again makes an attempt at something that must not fail, a few times.
func (e *Engine) again(f func() error) (err error) {
	for range 3 {
		if err = f(); err == nil || errors.Is(err, ErrGone) || errors.Is(err, ErrTextChanged) || errors.Is(err, x86.ErrStepLost) {
			return err
		}
		time.Sleep(time.Millisecond)
	}
	return err
}

// newSite reads and judges the instruction at addr.
func (e *Engine) newSite(addr uint64) (*site, error) {
	in, err := e.readInsn(addr)
	if err != nil {
		return nil, err
	}
	for _, o := range e.sites {
		if addr > o.addr && addr < o.addr+uint64(o.insn.Len) || o.addr > addr && o.addr < addr+uint64(in.Len) {
			return nil, fmt.Errorf("%#x and %#x: %w", addr, o.addr, ErrOverlap)
		}
	}
	s := &site{addr: addr, insn: in}
	if e.cheap {
		if e.cfg.Method == OutOfLine {
			return nil, fmt.Errorf("%#x (%s): %w: this hypervisor steps in place", addr, in.String(), ErrNoWayPast)
		}
		if err := in.CanStep(); err != nil {
			return nil, fmt.Errorf("%#x: %w: %w", addr, ErrNoWayPast, err)
		}
		return s, nil
	}
	memory := in.MemoryOperand()
	if memory && e.cfg.MayFault != nil && e.cfg.MayFault(addr) {
		// The fault must happen at this address, and its handler may need every
		// vCPU: neither a copy nor a step with the others held will do.
		return nil, fmt.Errorf("%#x (%s): %w: it may access user memory", addr, in.String(), ErrNoWayPast)
	}
	// What is emulated without touching memory can't fail, and needs no other way.
	if e.cfg.Method == Auto && in.CanEmulate() && !memory {
		return s, nil
	}
	var slotErr error
	if e.cfg.Method != InPlace {
		if s.slot, slotErr = e.newSlot(s); slotErr == nil {
			return s, nil
		}
	}
	stepErr := in.CanStep()
	switch {
	case stepErr != nil:
	case memory && e.cfg.MayFault == nil:
		stepErr = errors.New("without symbols, who knows whether it may fault")
	case !e.drv.Caps().Step:
		stepErr = errors.New("the other vCPUs can't be held")
	}
	if e.cfg.Method != OutOfLine && stepErr == nil {
		return s, nil
	}
	if in.CanEmulate() && e.cfg.Method == Auto {
		return s, nil // its memory operand is mapped, or else: execute
	}
	return nil, fmt.Errorf("%#x (%s): %w: out of line: %v; in place: %v", addr, in.String(), ErrNoWayPast, slotErr, stepErr)
}

// readInsn reads the instruction at addr. A breakpoint there that isn't ours may
// be the guest patching itself, which takes it microseconds.
func (e *Engine) readInsn(addr uint64) (x86.Insn, error) {
	var b [15]byte
	n := len(b)
	if err := e.drv.Read(0, addr, b[:]); err != nil {
		// The instruction may end before the page does.
		n = min(n, int(4096-addr%4096))
		if n == len(b) {
			return x86.Insn{}, fmt.Errorf("read %#x: %w", addr, err)
		}
		if err := e.drv.Read(0, addr, b[:n]); err != nil {
			return x86.Insn{}, fmt.Errorf("read %#x: %w", addr, err)
		}
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
func (e *Engine) Overlay(addr uint64, b []byte) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.overlay(addr, b)
}

func (e *Engine) overlay(addr uint64, b []byte) {
	patch := func(at uint64, orig []byte) {
		for i, c := range orig {
			if off := at + uint64(i) - addr; off < uint64(len(b)) {
				b[off] = c
			}
		}
	}
	for _, s := range e.sites {
		if s.armed {
			patch(s.addr, s.insn.Bytes())
		}
	}
	for _, r := range e.scratch {
		patch(r.addr, r.orig)
	}
}

// slotSize holds the longest instruction, the int3 after it, and room for the
// jump that ends a slot which has to be left behind.
const slotSize = 32

// newSlot copies the instruction of s to dead code.
func (e *Engine) newSlot(s *site) (*slot, error) {
	if err := s.insn.CanStep(); err != nil {
		return nil, err
	}
	if s.insn.Branches() {
		return nil, errors.New("it doesn't lead to the end of a copy")
	}
	if s.insn.MemoryOperand() && e.cfg.MayFault == nil {
		return nil, errors.New("without symbols, who knows whether it may fault")
	}
	sl := e.takeSlot(s)
	if sl == nil {
		return nil, errors.New("no dead code in reach")
	}
	code, err := s.insn.Relocate(s.addr, sl.addr)
	if err == nil {
		var buf [slotSize]byte
		for i := copy(buf[:], code); i < slotSize; i++ {
			buf[i] = 0xcc
		}
		err = e.drv.Patch(sl.addr, buf[:])
	}
	if err != nil {
		e.free = append(e.free, sl)
		return nil, err
	}
	sl.site, sl.end = s, sl.addr+uint64(len(code))
	e.slotEnd[sl.end] = sl
	return sl, nil
}

func (e *Engine) takeSlot(s *site) *slot {
	for i, sl := range e.free {
		if inReach(s.addr, sl.addr) {
			e.free = slices.Delete(e.free, i, i+1)
			return sl
		}
	}
	if e.cfg.Scratch == nil {
		return nil
	}
	const regionSize = 16 * slotSize
	e.cfg.Scratch(s.addr, func(addr, size uint64) bool {
		addr, end := (addr+15)&^15, addr+size
		if end < addr+slotSize || !inReach(s.addr, addr) {
			return false
		}
		size = min(end-addr, regionSize) &^ (slotSize - 1)
		for _, r := range e.scratch {
			if addr < r.addr+r.size && r.addr < addr+size {
				return false
			}
		}
		buf := make([]byte, size)
		if err := e.drv.Read(0, addr, buf); err != nil {
			return false
		}
		for _, c := range buf {
			if c != 0xcc {
				return false
			}
		}
		e.scratch = append(e.scratch, region{addr, size, buf})
		for a := addr; a < addr+size; a += slotSize {
			e.free = append(e.free, &slot{addr: a, size: slotSize})
		}
		e.log.Debug("dead code for out-of-line execution", "addr", hex(addr), "size", size)
		return true
	})
	for i, sl := range e.free {
		if inReach(s.addr, sl.addr) {
			e.free = slices.Delete(e.free, i, i+1)
			return sl
		}
	}
	return nil
}

// inReach keeps a jump and a RIP-relative operand near one address within
// 32 bits of the other, roughly; Relocate has the last word.
func inReach(a, b uint64) bool {
	d := int64(a - b)
	return d > -(1<<30) && d < 1<<30
}

// freeSlot gives back the slot of s, at once or when the last vCPU leaves it.
func (e *Engine) freeSlot(s *site) {
	sl := s.slot
	if sl == nil || sl.busy > 0 {
		return
	}
	s.slot = nil
	delete(e.slotEnd, sl.end)
	var fill [slotSize]byte
	for i := range fill {
		fill[i] = 0xcc
	}
	if err := e.again(func() error { return e.drv.Patch(sl.addr, fill[:]) }); err != nil {
		e.log.Error("dead code not restored", "addr", hex(sl.addr), "err", err)
		e.closeErr = errors.Join(e.closeErr, fmt.Errorf("restore %d bytes of dead code at %#x: %w", slotSize, sl.addr, err))
		return
	}
	sl.site = nil
	e.free = append(e.free, sl)
}

type hex uint64

func (h hex) String() string { return fmt.Sprintf("%#x", uint64(h)) }

// LogValue keeps a hex a string in structured logs.
func (h hex) LogValue() slog.Value { return slog.StringValue(h.String()) }

// Serve answers stops until a handler's verdict isn't Continue (then it returns
// that verdict), ctx is done, or something fails. If live is false no handler
// runs and hits count as missed.
//
// Whenever it returns, or a handler panics, every vCPU it took a stop from runs
// again, or executes the instruction of its hit, which the next Serve or Close
// sees to the end.
func (e *Engine) Serve(ctx context.Context, live bool) (Verdict, error) {
	e.serving.Lock()
	defer e.serving.Unlock()
	for {
		if err := ctx.Err(); err != nil {
			return Continue, err
		}
		if err := e.drv.Wait(ctx, &e.stop); err != nil {
			return Continue, err
		}
		if v, err := e.locked(&e.stop, live); v != Continue || err != nil {
			return v, err
		}
	}
}

func (e *Engine) locked(s *Stop, live bool) (Verdict, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.handle(s, live)
}

// handle answers one stop; e.mu is held, except while handlers run.
func (e *Engine) handle(s *Stop, live bool) (Verdict, error) {
	if s.VCPU < 0 || s.VCPU >= e.nvcpu {
		return Continue, fmt.Errorf("stop of vCPU %d, of %d", s.VCPU, e.nvcpu)
	}
	if s.Reason == Stepped {
		return e.stepped(s)
	}
	if s.User {
		e.stats.Reinjected++
		return Continue, e.reinject(s)
	}
	if st := e.sites[s.Regs.IP]; st != nil && st.armed {
		return e.hit(st, s, live)
	}
	if sl := e.slotEnd[s.Regs.IP]; sl != nil && sl.busy > 0 {
		return e.leaveSlot(sl, s)
	}
	return Continue, e.foreign(s)
}

// foreign answers a breakpoint that is none of ours. If the byte is no longer an
// int3, it was: it has been removed since, and the instruction is executed. As
// long as that can't be told the guest is given nothing: the vCPU comes to the
// place again.
func (e *Engine) foreign(s *Stop) error {
	var b [1]byte
	err := e.again(func() error { return e.drv.Read(s.Regs.CR3, s.Regs.IP, b[:]) })
	if err != nil {
		return errors.Join(fmt.Errorf("vCPU %d: read the breakpoint at %#x: %w", s.VCPU, s.Regs.IP, err), e.resume(s))
	}
	if b[0] != 0xcc {
		e.stats.Stale++
		e.log.Debug("breakpoint was removed", "vcpu", s.VCPU, "addr", hex(s.Regs.IP))
		return e.resume(s)
	}
	e.stats.Reinjected++
	e.log.Debug("breakpoint is the guest's own", "vcpu", s.VCPU, "addr", hex(s.Regs.IP))
	return e.reinject(s)
}

// take returns an unused inflight for a hit of st.
func (e *Engine) take(st *site, s *Stop) *inflight {
	var f *inflight
	if n := len(e.idle); n > 0 {
		f, e.idle = e.idle[n-1], e.idle[:n-1]
	} else {
		f = new(inflight)
	}
	*f = inflight{vcpu: s.VCPU, site: st, probes: append(f.probes[:0], st.owners...), before: s.Regs}
	return f
}

func (e *Engine) give(f *inflight) { e.idle = append(e.idle, f) }

// depart marks f as executed by its vCPU.
func (e *Engine) depart(f *inflight, sl *slot) {
	f.slot = sl
	if sl != nil {
		sl.busy++
	}
	e.active = append(e.active, f)
}

// arrive ends what depart began.
func (e *Engine) arrive(f *inflight) {
	if f.slot != nil {
		f.slot.busy--
	}
	e.active = slices.DeleteFunc(e.active, func(g *inflight) bool { return g == f })
}

// find returns the hit that the vCPU of s ends in slot sl (nil: in place). The
// guest may have run interrupt handlers, which hit as well, or even moved the
// task to another vCPU, but the task's stack is its own.
func (e *Engine) find(s *Stop, sl *slot) *inflight {
	var best *inflight
	score := 0
	for _, f := range e.active {
		if f.slot != sl || s.Addr != 0 && s.Addr != f.site.addr {
			continue
		}
		n := 1
		if d := int64(f.before.SP - s.Regs.SP); d >= -64 && d <= 64 {
			n += 4
		}
		if f.vcpu == s.VCPU {
			n += 2
		}
		if n > score || n == score && f.before.SP == s.Regs.SP {
			best, score = f, n
		}
	}
	if sl == nil && best != nil && best.vcpu != s.VCPU && !e.cheap {
		return nil
	}
	return best
}

func (e *Engine) hit(st *site, s *Stop, live bool) (v Verdict, err error) {
	f := e.take(st, s)
	e.stats.Hits++
	if !live {
		for _, p := range f.probes {
			if p.Enabled() {
				p.missed.Add(1)
			}
		}
		return e.execute(f, s)
	}
	// If a handler panics the hit is still seen to its end.
	finished := false
	defer func() {
		if !finished {
			f.post = false
			s.Regs = f.before
			if _, err := e.execute(f, s); err != nil {
				e.log.Error("hit not finished after a panic", "err", err)
			}
		}
	}()
	v = e.run(f, s, false)
	finished = true
	f.post = v == Continue
	w, err := e.execute(f, s)
	if v == Continue {
		v = w
	}
	return v, err
}

// run calls the pre or post handlers of a hit, without the engine's lock.
func (e *Engine) run(f *inflight, s *Stop, post bool) (v Verdict) {
	e.mu.Unlock()
	defer e.mu.Lock()
	for _, p := range f.probes {
		if !p.Enabled() {
			continue
		}
		h := p.Pre
		if post {
			h = p.Post
		} else {
			p.hits.Add(1)
		}
		if h == nil {
			continue
		}
		e.ctx = Context{Probe: p, VCPU: s.VCPU, Regs: &s.Regs, Post: post}
		if w := h(&e.ctx); w != Continue && v == Continue {
			v = w
		}
		if v != Continue {
			break
		}
	}
	return v
}

// execute has the instruction of a hit executed, by the first way that works.
func (e *Engine) execute(f *inflight, s *Stop) (Verdict, error) {
	st := f.site
	if s.Regs.IP != st.addr || !st.armed {
		// Redirected by a handler, or removed by one: the guest's own bytes run.
		e.give(f)
		return Continue, e.resume(s)
	}
	in := &st.insn
	if e.cfg.Method == Auto && e.emulates(in) {
		before := s.Regs
		if err := in.Emulate(&s.Regs, memory{e.drv, s.Regs.CR3}); err == nil && (!e.cheap || onlyIP(&before, &s.Regs)) {
			e.stats.Emulated++
			return e.finish(f, s)
		}
		s.Regs = before
	}
	caps := e.drv.Caps()
	if caps.Emulate && !f.wantsPost() && e.byHypervisor(in, s.Regs == f.before) {
		e.give(f)
		e.stats.Hypervisor++
		return Continue, e.again(func() error { return e.drv.Emulate(s, in) })
	}
	f.before = s.Regs
	if sl := st.slot; sl != nil {
		e.depart(f, sl)
		s.Regs.IP = sl.addr
		e.stats.OutOfLine++
		if err := e.resume(s); err != nil {
			e.arrive(f)
			e.give(f)
			return Continue, err
		}
		return Continue, nil
	}
	if in.CanStep() == nil && caps.Step {
		e.depart(f, nil)
		e.stats.InPlace++
		if err := e.again(func() error { return e.drv.StepOver(s, st.addr) }); err != nil {
			e.arrive(f)
			e.give(f)
			return Continue, errors.Join(fmt.Errorf("step over %#x: %w", st.addr, err), e.giveUp(st, s))
		}
		return Continue, nil
	}
	e.give(f)
	return Continue, errors.Join(fmt.Errorf("%#x (%s): %w", st.addr, in.String(), ErrNoWayPast), e.giveUp(st, s))
}

// emulates reports whether an attempt is made to emulate in here.
func (e *Engine) emulates(in *x86.Insn) bool {
	return in.CanEmulate() && (!e.cheap || !in.MemoryOperand())
}

// byHypervisor reports whether the hypervisor may be asked to emulate in. It
// takes the registers as the vCPU has them, so they must be the same still,
// unless the driver says otherwise.
func (e *Engine) byHypervisor(in *x86.Insn, same bool) bool {
	switch {
	case e.cfg.Method != Auto && e.cfg.Method != ByHypervisor:
		return false
	case e.cheap:
		return true
	}
	return same && in.XenEmulatable() && (e.cfg.Method == ByHypervisor || !in.MemoryOperand())
}

// onlyIP reports whether a and b differ in IP at the most.
func onlyIP(a, b *x86.Regs) bool {
	c := *a
	c.IP = b.IP
	return c == *b
}

// giveUp takes a breakpoint out so that the vCPU at it can go on.
func (e *Engine) giveUp(st *site, s *Stop) error {
	s.Regs.IP = st.addr
	err := e.removeSite(st)
	for _, p := range st.owners {
		p.site = nil
		p.armed.Store(false)
	}
	st.owners = nil
	return errors.Join(err, e.resume(s))
}

// resume answers s; a vCPU is not left behind because of one failed call.
func (e *Engine) resume(s *Stop) error {
	return e.again(func() error { return e.drv.Resume(s) })
}

func (e *Engine) reinject(s *Stop) error {
	return e.again(func() error { return e.drv.Reinject(s) })
}

func (f *inflight) wantsPost() bool {
	return f.post && slices.ContainsFunc(f.probes, func(p *Probe) bool { return p.Post != nil && p.Enabled() })
}

// finish runs the post handlers, with s.Regs after the instruction, and lets the
// vCPU go.
func (e *Engine) finish(f *inflight, s *Stop) (v Verdict, err error) {
	defer func() {
		e.give(f)
		err = errors.Join(err, e.resume(s))
	}()
	if f.wantsPost() {
		v = e.run(f, s, true)
	}
	return v, nil
}

// leaveSlot takes a vCPU back from out-of-line execution.
func (e *Engine) leaveSlot(sl *slot, s *Stop) (Verdict, error) {
	f := e.find(s, sl)
	e.arrive(f)
	if sl.busy == 0 && !sl.site.armed {
		defer e.freeSlot(sl.site)
	}
	return e.completed(f, s, sl.addr)
}

// completed ends a hit whose instruction the vCPU executed itself, at address at.
func (e *Engine) completed(f *inflight, s *Stop, at uint64) (Verdict, error) {
	if err := e.finishStep(f, s, at); err != nil {
		// The vCPU is behind the instruction all the same.
		s.Regs.IP = f.site.addr + uint64(f.site.insn.Len)
		e.give(f)
		return Continue, errors.Join(err, e.resume(s))
	}
	return e.finish(f, s)
}

func (e *Engine) finishStep(f *inflight, s *Stop, at uint64) error {
	st := f.site
	err := e.again(func() error {
		return st.insn.FinishStep(&s.Regs, st.addr, at, memory{e.drv, s.Regs.CR3}, &f.before)
	})
	if err != nil {
		return fmt.Errorf("%#x: %w", st.addr, err)
	}
	return nil
}

func (e *Engine) stepped(s *Stop) (Verdict, error) {
	f := e.find(s, nil)
	if f == nil {
		return Continue, errors.Join(fmt.Errorf("vCPU %d was stepped, but not by us", s.VCPU), e.resume(s))
	}
	st := f.site
	if s.Regs.IP == st.addr && st.insn.Repeats() && st.armed {
		return Continue, e.again(func() error { return e.drv.StepOver(s, st.addr) })
	}
	e.arrive(f)
	if err := e.finishStep(f, s, st.addr); err != nil {
		if e.cheap && errors.Is(err, x86.ErrStepLost) {
			// It faulted. The guest's handler runs, and may come back for another hit.
			e.give(f)
			return Continue, e.resume(s)
		}
		// It faulted, which newSite rules out as far as that can be known: the vCPU
		// is in the guest's fault handler. What was set for the step must not stay.
		if s.Regs.Flags&x86.FlagTF != 0 {
			const step = x86.FlagTF | x86.FlagIF
			s.Regs.Flags = s.Regs.Flags&^step | f.before.Flags&step
		}
		e.give(f)
		return Continue, errors.Join(err, e.resume(s))
	}
	return e.finish(f, s)
}

// memory is guest memory as the vCPU with these page tables sees it.
type memory struct {
	drv Driver
	cr3 uint64
}

func (m memory) ReadVirt(addr uint64, b []byte) error  { return m.drv.Read(m.cr3, addr, b) }
func (m memory) WriteVirt(addr uint64, b []byte) error { return m.drv.Store(m.cr3, addr, b) }

// closeWait bounds how long Close waits for vCPUs in slots. They are there for
// microseconds, unless the guest is preempted or the hypervisor is busy.
const closeWait = 10 * time.Second

// Close takes every breakpoint out, waits until no vCPU executes a slot, and
// leaves the guest. Serve must have returned.
func (e *Engine) Close() error {
	e.serving.Lock()
	defer e.serving.Unlock()
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return nil
	}
	e.closed = true
	var errs []error
	fail := func(err error) {
		if err != nil && !errors.Is(err, ErrGone) {
			errs = append(errs, err)
		}
	}
	frozen := e.again(e.drv.Freeze)
	fail(frozen)
	for _, s := range e.sites {
		for _, p := range s.owners {
			p.site = nil
		}
		fail(e.removeSite(s))
	}
	if frozen == nil {
		fail(e.again(e.drv.Thaw))
	}
	if e.drain() > 0 {
		fail(e.again(e.drv.Freeze))
		for _, sl := range e.slotEnd {
			fail(e.endWithJump(sl))
		}
		fail(e.again(e.drv.Thaw))
	}
	fail(e.drv.Close(func(s *Stop) error {
		if s.Reason == Hit {
			if sl := e.slotEnd[s.Regs.IP]; sl != nil && sl.busy > 0 {
				_, err := e.leaveSlot(sl, s)
				return err
			}
			if s.User {
				return e.reinject(s)
			}
			return e.foreign(s)
		}
		_, err := e.stepped(s)
		return err
	}))
	fail(e.closeErr)
	return errors.Join(errs...)
}

// drain serves stops until no hit is in flight, and returns how many still are.
func (e *Engine) drain() int {
	ctx, cancel := context.WithTimeout(context.Background(), closeWait)
	defer cancel()
	failures := 0
	for {
		n := len(e.active)
		for _, f := range e.active {
			f.post = false
		}
		if n == 0 || failures > 10 || ctx.Err() != nil {
			return n
		}
		e.mu.Unlock()
		err := e.drv.Wait(ctx, &e.stop)
		e.mu.Lock()
		if errors.Is(err, ErrGone) {
			return 0
		}
		if err == nil {
			_, err = e.handle(&e.stop, false)
		}
		if err != nil {
			e.log.Debug("drain", "err", err)
			failures++
		}
	}
}

// endWithJump makes a slot that a vCPU may still come back to harmless: its
// int3 becomes a jump to the instruction after the original.
func (e *Engine) endWithJump(sl *slot) error {
	to := sl.site.addr + uint64(sl.site.insn.Len)
	rel := uint32(to - (sl.end + 5))
	b := []byte{0xe9, byte(rel), byte(rel >> 8), byte(rel >> 16), byte(rel >> 24)}
	if err := e.again(func() error { return e.drv.Patch(sl.end, b) }); err != nil {
		return fmt.Errorf("end slot at %#x: %w", sl.addr, err)
	}
	return fmt.Errorf("a vCPU is still executing the copy of %#x in dead code at %#x; the %d bytes there were left, as harmless code",
		sl.site.addr, sl.addr, slotSize)
}
