package breakpoint

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"github.com/vmprobes/vmprobes/internal/x86"
)

// A return probe is a probe at a function's first instruction that follows the calls which
// begin there. The engine knows a call by its slot: the address on the stack where its return
// address stands. No two calls that are under way share one, whatever the vCPU, unless one
// function has ended in a jump to the other; the task is a check. What stands in the slot is
// read and never written.

// Follow says where the engine notices that a call returns.
type Follow uint8

// Places. FollowAuto is AtReturn, until that isn't possible or too many other functions
// return to the same address: then AtExits.
const (
	FollowAuto Follow = iota
	AtReturn          // at the return address, while calls are under way and a second longer
	AtExits           // at the last instructions of the function and of those that it ends in a jump to
)

// Returns is what a return probe has beside its Probe. The exported fields must not change
// while it is registered.
type Returns struct {
	// Return runs when a call has returned, or is about to (AtExits), with Context.Call. It
	// can't send the vCPU elsewhere.
	Return func(*Context) Verdict
	// Abandoned runs when a call is known to have ended in another way. No vCPU is stopped for
	// it. The error wraps ErrUnwound, ErrTaskGone, ErrNotServed, ErrTextChanged or what made
	// the engine remove the breakpoint.
	Abandoned func(a *Activation, why error) Verdict
	// MaxActive bounds the calls that are followed at one time; the engine has a bound of its
	// own for those of all probes.
	MaxActive int
	Follow    Follow
	// ExitsFirst has FollowAuto begin with AtExits.
	ExitsFirst bool
	// Exits are the addresses of the last instructions, for AtExits; if there are none
	// NoExits says why.
	Exits   []uint64
	NoExits error
	// TailsTo reports whether the function may end in a jump to the one at fn. Nil: it may.
	TailsTo func(fn uint64) bool

	returned, abandoned, foreign, ignored, dropped atomic.Uint64
	following                                      atomic.Uint32 // the Follow of the last call that was followed

	// Engine.mu
	active  int
	exits   []*site // where breakpoints are
	exiting bool    // calls are followed to the exits from now on
	lost    error   // why they can't be any more
	told    error   // why a call was missed
	toldAt  time.Time
}

// maxActivations bounds the calls that are followed at one time, of all probes.
const maxActivations = 1 << 16

func (r *Returns) limit() int {
	if r.MaxActive <= 0 {
		return maxActivations
	}
	return r.MaxActive
}

// Counts are what became of the calls of a return probe.
type Counts struct {
	Ignored   uint64 // by the Pre handler
	Returned  uint64
	Abandoned uint64
	Dropped   uint64 // under way when the probe was unregistered or disabled
	Foreign   uint64 // stops where a call may return that were another function's, or none's
	Active    int    // under way
	Follow    Follow // FollowAuto until a call was followed
}

// Counts returns the counters of a return probe.
func (e *Engine) Counts(p *Probe) Counts {
	e.mu.Lock()
	defer e.mu.Unlock()
	r := p.Ret
	return Counts{
		Ignored: r.ignored.Load(), Returned: r.returned.Load(), Abandoned: r.abandoned.Load(),
		Dropped: r.dropped.Load(), Foreign: r.foreign.Load(),
		Active: r.active, Follow: Follow(r.following.Load()),
	}
}

// A Task is a thread of the guest's. The zero Task is one that isn't known.
type Task struct {
	Addr uint64 // of its task_struct
	PID  int    // of the thread
	TGID int    // of the process
	// ID tells it from others that have or had the same address. It isn't the PID: a thread that
	// executes a program takes on its process' (de_thread in fs/exec.c).
	ID uint64
	// Its kernel stack is from StackLow to before StackHigh; 0 and 0 if that isn't known.
	StackLow, StackHigh uint64
}

func (t *Task) same(u *Task) bool {
	return t.Addr == 0 || u.Addr == 0 || t.Addr == u.Addr && t.ID == u.ID
}

// Hooks are what the engine asks of who knows the guest's kernel. Each may be nil. They are
// called without the engine's lock, as they may read the kernel's code through Overlay.
type Hooks struct {
	// Task returns the task that a vCPU with registers r executes.
	Task func(r *x86.Regs) (Task, error)
	// Alive reports whether a task still is what it was. An error says nothing.
	Alive func(t Task) (bool, error)
	// ReturnAt returns the addresses, one or two, of which a vCPU that returns to ret
	// executes one, with the stack pointer that it has at ret. It fails where no
	// breakpoint may stand. Nil: ret itself.
	ReturnAt func(ret uint64) ([]uint64, error)
	// Trampoline reports whether addr, found where a return address was, is one that the
	// guest's own tracers put there.
	Trampoline func(addr uint64) bool
}

// An Activation is one call that a return probe follows. It is the probe's own until the
// Return or Abandoned handler has ended.
type Activation struct {
	Probe  *Probe
	Data   any      // the owner's
	Before x86.Regs // at entry
	VCPU   int      // at entry
	// Entered is when the stop of its entry was taken up, Ended that of its return, or when it was
	// known to be abandoned. Held is how much of the time between the vCPU was stopped for this
	// and other hits, as far as the engine knows: with Caps.AllStop for those of all vCPUs, else
	// of that which the call began on.
	Entered, Ended time.Time
	Held           time.Duration
	Task           Task
	Slot           uint64 // where the return address is
	Return         uint64 // the return address
	Depth          int    // calls of the same probe by the same task that are under way around this one
	// Skipped says that a Pre handler had the function return before its first instruction.
	Skipped bool

	gen      uint64
	disables uint32
	ignored  bool
	held     time.Duration // heldFor its vCPU, when it began
	dropped  bool          // is counted as such
}

// Ignore has the engine not follow the call. It is for the Pre handler.
func (a *Activation) Ignore() { a.ignored = true }

// drop counts a as dropped, once: a handler may have unregistered its probe, whose counters
// are read then.
func (a *Activation) drop() {
	if !a.dropped {
		a.dropped = true
		a.Probe.Ret.dropped.Add(1)
	}
}

// wanted reports whether the registration that a belongs to is there, and enabled.
func (a *Activation) wanted() bool {
	p := a.Probe
	return p.site != nil && p.gen == a.gen && p.Enabled() && p.disables.Load() == a.disables
}

// call is what is under way at one slot: one activation, or several where probes share the
// function or functions ended in jumps to each other.
type call struct {
	slot, ret uint64
	task      Task
	acts      []*Activation // in order of entry
	sites     []*site       // at ret; none if all are followed to exits
	begun     uint64        // Engine.sweeps
	suspect   suspicion
	// tailsTo is Returns.TailsTo of the function that runs, the last one of such jumps.
	tailsTo func(fn uint64) bool
}

// present is what is known of the stop in hand where calls begin or end.
type present struct {
	time time.Time
	task Task
	slot uint64 // of the call that begins
	ret  uint64
	err  error // why ret isn't known
}

// An endedCall is a call whose Abandoned handler is to run.
type endedCall struct {
	a   *Activation
	why error
}

// follows reports whether calls begin or end at s.
func (s *site) follows() bool { return s.rets > 0 || s.ends() }

// ends reports whether calls end at s, or did.
func (s *site) ends() bool { return s.live > 0 || !s.warm.IsZero() || len(s.exitOf) > 0 }

// look finds out whose call begins or ends with s. It releases e.mu.
func (e *Engine) look(s *Stop) {
	if e.now.time.IsZero() {
		e.now.time = time.Now()
	}
	if e.cfg.Hooks.Task == nil {
		return
	}
	task, err := e.taskOf(s)
	if err != nil {
		e.log.Debug("whose call it is isn't known", "vcpu", s.VCPU, "addr", hex(s.Regs.IP), "err", err)
		return
	}
	e.now.task = task
}

// heldFor is for how long a vCPU has been stopped while calls were under way, without the stop in
// hand.
func (e *Engine) heldFor(vcpu int) time.Duration { return e.held[vcpu%len(e.held)] }

// hold adds the stop in hand to the time for which its vCPU is stopped.
func (e *Engine) hold(vcpu int) {
	if e.now.time.IsZero() || e.activations == 0 {
		return
	}
	e.held[vcpu%len(e.held)] += time.Since(e.now.time)
}

func (e *Engine) taskOf(s *Stop) (Task, error) {
	e.mu.Unlock()
	defer e.mu.Lock()
	return e.cfg.Hooks.Task(&s.Regs)
}

// returned ends the calls that return to st, where the vCPU is, and runs their handlers.
func (e *Engine) returned(st *site, s *Stop, m mode) (Verdict, error) {
	if st.live == 0 && st.warm.IsZero() {
		return Continue, nil
	}
	c := e.calls[s.Regs.SP-8]
	if c == nil || !slices.Contains(c.sites, st) {
		e.foreignReturn(st)
		return Continue, nil
	}
	if !c.task.same(&e.now.task) {
		e.abandon(ErrTaskGone, c)
		e.foreignReturn(st)
		return Continue, nil
	}
	st.own++
	return e.end(c, s, m)
}

// exited ends the call whose function is about to return at st.
func (e *Engine) exited(st *site, s *Stop, m mode) (Verdict, error) {
	if len(st.exitOf) == 0 || s.Regs.IP != st.addr {
		return Continue, nil
	}
	c := e.calls[s.Regs.SP]
	if c != nil && !slices.ContainsFunc(c.acts, func(a *Activation) bool { return slices.Contains(st.exitOf, a.Probe) }) {
		c = nil
	}
	if c != nil {
		// What was unwound past has left its slot to another call, whose entry nobody saw.
		ret, err := e.word(s.Regs.CR3, c.slot)
		switch {
		case !c.task.same(&e.now.task):
			e.abandon(ErrTaskGone, c)
			c = nil
		case err == nil && ret != c.ret && !e.trampoline(ret):
			if e.calls[c.slot] == c { // e.mu was released
				e.abandon(ErrUnwound, c)
			}
			c = nil
		}
	}
	if c == nil || e.calls[s.Regs.SP] != c {
		for _, p := range st.exitOf {
			p.Ret.foreign.Add(1)
		}
		return Continue, nil
	}
	return e.end(c, s, m)
}

// leftByHand reports whether a handler has had the function return that f was at the first
// instruction of, without saying so.
func (e *Engine) leftByHand(f *inflight, s *Stop) bool {
	if len(e.calls) == 0 || s.Regs.IP == f.site.addr || s.Regs.SP != f.before.SP+8 {
		return false
	}
	c := e.calls[f.before.SP]
	return c != nil && s.Regs.IP == c.ret
}

// skipped ends the calls whose function, at whose first instruction f was, a handler has had
// return.
func (e *Engine) skipped(f *inflight, s *Stop, m mode) (Verdict, error) {
	slot := f.before.SP
	if e.calls[slot] == nil {
		return Continue, nil
	}
	if f.site.rets == 0 {
		e.look(s)
	}
	c := e.calls[slot]
	if c == nil {
		return Continue, nil
	}
	if !c.task.same(&e.now.task) {
		e.abandon(ErrTaskGone, c)
		return Continue, nil
	}
	for _, a := range c.acts {
		a.Skipped = a.Probe.site == f.site
	}
	return e.end(c, s, m)
}

// end takes c out of the books and runs the Return handlers of its activations, the last
// one first: all of them, whatever the verdict of one is.
func (e *Engine) end(c *call, s *Stop, m mode) (v Verdict, bad error) {
	if m != serving {
		e.abandon(ErrNotServed, c)
		return Continue, nil
	}
	e.unwind(c.slot, &c.task)
	e.remove(c)
	acts := c.acts
	defer func() { // if a handler panics
		e.inHand = e.inHand[:0]
		for _, a := range acts {
			e.lapse(a, ErrNotServed)
		}
	}()
	for len(acts) > 0 {
		a := acts[len(acts)-1]
		acts = acts[:len(acts)-1]
		e.inHand = append(e.inHand[:0], acts...)
		r := a.Probe.Ret
		if !a.wanted() {
			a.drop()
			continue
		}
		r.returned.Add(1)
		a.Ended, a.Held = e.now.time, e.heldFor(a.VCPU)-a.held
		ip := s.Regs.IP
		w := e.run(Context{Probe: a.Probe, VCPU: s.VCPU, Regs: &s.Regs, Call: a, Return: true, e: e}, r.Return)
		if s.Regs.IP != ip {
			s.Regs.IP = ip
			bad = errors.Join(bad, fmt.Errorf("vCPU %d returns to %#x: %w: a Return handler sent it elsewhere", s.VCPU, c.ret, ErrBadRegs))
		}
		if v == Continue {
			v = w
		}
	}
	return v, bad
}

// lapse counts and keeps an activation whose call ended otherwise than by returning, or was
// dropped.
func (e *Engine) lapse(a *Activation, why error) {
	r := a.Probe.Ret
	if !a.wanted() {
		a.drop()
		return
	}
	r.abandoned.Add(1)
	if r.Abandoned != nil {
		a.Ended, a.Held = time.Now(), e.heldFor(a.VCPU)-a.held
		e.ended = append(e.ended, endedCall{a, why})
	}
}

// abandon ends calls that will never return.
func (e *Engine) abandon(why error, calls ...*call) {
	e.remove(calls...)
	for _, c := range calls {
		e.log.Debug("a call doesn't return", "slot", hex(c.slot), "return", hex(c.ret), "why", why)
		why := fmt.Errorf("the call that would return to %#x: %w", c.ret, why)
		for _, a := range c.acts {
			e.lapse(a, why)
		}
	}
}

// unwind ends the calls below slot on the stack of a task: whoever is above has returned past
// them.
func (e *Engine) unwind(slot uint64, t *Task) {
	if t.Addr == 0 || slot < t.StackLow || slot >= t.StackHigh {
		return
	}
	of := e.tasks[t.Addr]
	i, found := slices.BinarySearchFunc(of, slot, bySlot) // the first that isn't above
	if found {
		i++
	}
	end := i
	for end < len(of) && of[end].slot >= t.StackLow {
		end++
	}
	if i < end {
		e.abandon(ErrUnwound, slices.Clone(of[i:end])...)
	}
}

// bySlot orders calls from the top of a stack, where it begins, down.
func bySlot(c *call, slot uint64) int {
	switch {
	case c.slot > slot:
		return -1
	case c.slot < slot:
		return 1
	}
	return 0
}

// insert enters a call in the books.
func (e *Engine) insert(c *call) {
	e.calls[c.slot] = c
	if a := c.task.Addr; a != 0 {
		of := e.tasks[a]
		i, _ := slices.BinarySearchFunc(of, c.slot, bySlot)
		e.tasks[a] = slices.Insert(of, i, c)
	}
	for _, st := range c.sites {
		st.live++
	}
}

// remove takes calls out of the books. There may be very many.
func (e *Engine) remove(calls ...*call) {
	tasks := make(map[uint64]bool)
	for _, c := range calls {
		delete(e.calls, c.slot)
		if c.task.Addr != 0 {
			tasks[c.task.Addr] = true
		}
		for _, st := range c.sites {
			e.leaveSite(st)
		}
		for _, a := range c.acts {
			e.count(a, -1)
		}
	}
	for t := range tasks {
		of := e.tasks[t]
		if len(calls) > 1 {
			of = slices.DeleteFunc(of, func(c *call) bool { return e.calls[c.slot] != c })
		} else if i, found := slices.BinarySearchFunc(of, calls[0].slot, bySlot); found {
			of = slices.Delete(of, i, i+1)
		}
		if e.tasks[t] = of; len(of) == 0 {
			delete(e.tasks, t)
		}
	}
}

// count enters an activation in the counts of those that are under way, or takes it out (-1).
func (e *Engine) count(a *Activation, n int) {
	a.Probe.Ret.active += n
	e.activations += n
	if a.Task.Addr == 0 {
		return
	}
	k := taskProbe{a.Task.Addr, a.Probe}
	if e.depths[k] += n; e.depths[k] == 0 {
		delete(e.depths, k)
	}
}

// taskProbe is a probe's calls of one task.
type taskProbe struct {
	task  uint64
	probe *Probe
}

// leaveSite ends the interest of a call in a breakpoint at its return address.
func (e *Engine) leaveSite(st *site) {
	if st.live--; st.live == 0 {
		st.warm, st.idle = time.Now(), 0
	}
}

// forgetCalls drops the activations of p, or of all probes if p is nil.
func (e *Engine) forgetCalls(p *Probe) {
	mine := func(a *Activation) bool { return p == nil || a.Probe == p }
	for _, a := range e.inHand {
		if mine(a) {
			a.drop()
		}
	}
	if p == nil || p.Ret.active > 0 {
		e.dropCalls(mine)
	}
}

// forgetUnwanted drops the activations of probes that have been disabled.
func (e *Engine) forgetUnwanted() {
	e.dropCalls(func(a *Activation) bool { return !a.wanted() })
}

func (e *Engine) dropCalls(mine func(*Activation) bool) {
	var over []*call
	for _, c := range e.calls {
		if !slices.ContainsFunc(c.acts, func(a *Activation) bool { return !mine(a) }) {
			for _, a := range c.acts {
				a.drop()
			}
			over = append(over, c)
			continue
		}
		c.acts = slices.DeleteFunc(c.acts, func(a *Activation) bool {
			if !mine(a) {
				return false
			}
			a.drop()
			e.count(a, -1)
			return true
		})
	}
	e.remove(over...)
}

// orphan ends the calls that were to end at st, or might, whose breakpoint is out.
func (e *Engine) orphan(st *site, why error) {
	for _, p := range st.exitOf {
		r := p.Ret
		r.exits = slices.DeleteFunc(r.exits, func(x *site) bool { return x == st })
		r.exiting, r.lost = false, why
	}
	for ret, p := range e.plans { // also of calls that have returned there
		if slices.Contains(p.addrs, st.addr) {
			e.plans[ret] = plan{err: why, made: time.Now()}
		}
	}
	lost := st.exitOf
	st.exitOf = nil
	if st.live == 0 && len(lost) == 0 {
		return
	}
	var over []*call
	for _, c := range e.calls {
		switch last := c.acts[len(c.acts)-1].Probe; {
		case slices.Contains(c.sites, st):
			e.plans[c.ret] = plan{err: why, made: time.Now()} // which may have been forgotten
			over = append(over, c)
		case len(c.sites) == 0 && slices.Contains(lost, last): // what it returns by may be this exit
			over = append(over, c)
		}
	}
	e.abandon(why, over...)
}

// word reads 8 bytes of a stack.
func (e *Engine) word(cr3, addr uint64) (v uint64, err error) {
	b := e.buf[:8]
	for try := range tries {
		if try > 0 {
			time.Sleep(time.Millisecond)
		}
		if _, err = e.drv.Read(cr3, addr, b); !transient(err) {
			break
		}
	}
	if err != nil {
		return 0, err
	}
	return binary.LittleEndian.Uint64(b), nil
}

// trampoline is the hook of that name. It releases e.mu.
func (e *Engine) trampoline(addr uint64) bool {
	if e.cfg.Hooks.Trampoline == nil {
		return false
	}
	e.mu.Unlock()
	defer e.mu.Lock()
	return e.cfg.Hooks.Trampoline(addr)
}
