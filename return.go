package vmprobes

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/x86"
	"github.com/vmprobes/vmprobes/linux"
)

// A ReturnProbe follows calls of a function from its first instruction to its return
// (kretprobe). Its Probe is registered as any other:
//
//	rp := &vmprobes.ReturnProbe{Symbol: "vfs_read", Return: func(a *vmprobes.Activation, r *vmprobes.Regs) vmprobes.Action {
//		fmt.Println(int64(r.Result()), a.Duration())
//		return vmprobes.Continue
//	}}
//	err := vmprobes.Run(ctx, "a3guest", nil, rp.Probe())
//
// Each call that Entry doesn't ignore is followed by exactly one of Return and Abandoned,
// however calls are nested, recursive, preempted or moved to another vCPU, unless the probe is
// unregistered or disabled, or the Session closed, before it ends. A call that has begun before
// Register isn't seen, and one whose return comes while no Loop runs is abandoned. The guest's
// stack is never written.
//
// The fields must not be changed after the first call of Probe.
type ReturnProbe struct {
	// DomainID, DomainName, Name and Cookie are as in Probe.
	DomainID   DomainID
	DomainName string
	Name       string
	Cookie     any
	// Filter, Once and Limit are as in Probe: of entries.
	Filter *Filter
	Once   bool
	Limit  Limit

	// Symbol or Addr selects the function; setting both is an error. Addr is that of its first
	// instruction.
	Symbol string
	Addr   Addr

	// Entry runs at the first instruction, before all Pre handlers there. It may keep something
	// in the Activation's Data, or have the call ignored. If it returns anything but Continue the
	// Loop ends; the call is followed all the same. Nil follows every call.
	Entry func(a *Activation, r *Regs) Action
	// Return runs when the call has returned, with the registers at the caller's next
	// instruction, or, where Stats.Follow is AtExits, at the function's last instruction.
	// r.Result is the same in both. The caller goes on with what r.SetResult sets. If several
	// probes follow a call their handlers run in the reverse order of Entry. A handler can't
	// send the vCPU elsewhere (ErrBadRegisters).
	Return func(a *Activation, r *Regs) Action
	// Abandoned runs when the call is known never to return. No vCPU is stopped for it, so it
	// has no registers. The error wraps ErrUnwound (a handler of a fault, or of a task's end, has
	// left the function), ErrTaskGone, ErrNotServed, ErrTextChanged or another cause.
	// That may be known late: when the stack is used again, or within seconds.
	Abandoned func(a *Activation, why error) Action

	// MaxActive bounds the calls that are followed at one time. Others are counted in
	// Stats.Missed, and Entry isn't called for them. 0 means 4096; a negative value leaves only
	// the bound of the Session, which is 65536 for all its probes. (kretprobe's maxactive.)
	MaxActive int
	// Follow says how returns are noticed. Stats.Follow says how they are.
	Follow Follow

	once  sync.Once
	probe *Probe
}

// defaultMaxActive is that of a ReturnProbe which doesn't say.
const defaultMaxActive = 4096

// Follow says where a breakpoint notices that a call returns.
type Follow uint8

// Ways to follow. FollowAuto takes AtExits for the wrappers of system calls, as all of these
// return to one address, and else AtReturn; it changes to AtExits where no breakpoint may stand
// at the return address, or where the returns of other functions are many.
const (
	FollowAuto = Follow(breakpoint.FollowAuto)
	// AtReturn is at the return address, while calls are under way and a second longer.
	AtReturn = Follow(breakpoint.AtReturn)
	// AtExits is at each RET of the function, and of those that it ends in a jump to. Register
	// fails with ErrNoExits if not all of them are known.
	AtExits = Follow(breakpoint.AtExits)
)

// String returns the way's name, as in "at return".
func (f Follow) String() string {
	switch f {
	case FollowAuto:
		return "auto"
	case AtReturn:
		return "at return"
	case AtExits:
		return "at exits"
	}
	return fmt.Sprintf("Follow(%d)", uint8(f))
}

// Probe returns the probe at the function's first instruction, the same one each time. It is
// what is registered, disabled and unregistered; it has no Pre and Post handlers.
func (p *ReturnProbe) Probe() *Probe {
	p.once.Do(func() {
		p.probe = &Probe{DomainID: p.DomainID, DomainName: p.DomainName, Name: p.Name, Cookie: p.Cookie,
			Filter: p.Filter, Once: p.Once, Limit: p.Limit, Symbol: p.Symbol, Addr: p.Addr, ret: p}
	})
	return p.probe
}

// An Activation is one call that a ReturnProbe follows. It is valid until its Return or
// Abandoned handler has ended; an ignored one until Entry has.
type Activation struct {
	// Data is what Entry leaves there for Return and Abandoned.
	Data any

	probe *Probe
	call  *breakpoint.Activation
	entry Regs
	vcpu  int // now
}

// Probe returns the probe that follows the call. Memory is read through it.
func (a *Activation) Probe() *Probe { return a.probe }

// Ignore has the call not be followed. It is for Entry; Stats.Ignored counts it.
func (a *Activation) Ignore() { a.call.Ignore() }

// Entry returns the registers at the function's first instruction, for Regs.Arg, Regs.SyscallArg
// and [Probe.Call]. What they point to is read when it is asked for, and may have changed since.
func (a *Activation) Entry() *Regs { return &a.entry }

// Task returns the address of the task_struct of the task that made the call, and its pid. known
// is false if the kernel's types don't tell.
func (a *Activation) Task() (addr Addr, pid int, known bool) {
	t := a.call.Task
	return t.Addr, t.PID, t.Addr != 0
}

// Slot returns where on the stack the return address is, or was. It tells calls apart that are
// under way at the same time.
func (a *Activation) Slot() Addr { return a.call.Slot }

// ReturnAddress returns the address of the caller's next instruction.
func (a *Activation) ReturnAddress() Addr { return a.call.Return }

// Depth returns how many calls of the function by the same task, which the same probe follows,
// were under way when this one began: 0, but for recursion and interrupts.
func (a *Activation) Depth() int { return a.call.Depth }

// Skipped reports whether a handler had the function return before its first instruction
// ([Regs.Return]).
func (a *Activation) Skipped() bool { return a.call.Skipped }

// VCPU returns the vCPU that the call began on, and the one that the handler runs for.
func (a *Activation) VCPU() (entry, now int) { return a.call.VCPU, a.vcpu }

// Duration returns how long the call took: by this host's monotonic clock, from when this process
// took up the stop of the entry to when it took up that of the return, less the time in between for
// which hits of this Session kept the guest stopped. On Xen HVM that is the vCPU that the call
// began on, and of a call that another vCPU has ended Duration may be too short by the hits there.
//
// What is left holds the call itself, interrupts and other tasks that the guest's scheduler gave the
// vCPU to meanwhile, what the hypervisor took to let the vCPU go and to announce its stop, and
// vCPUs' waiting for a processor of the host. In Abandoned it is the time until the end was noticed;
// in Entry it is 0.
func (a *Activation) Duration() time.Duration { return max(a.Elapsed()-a.call.Held, 0) }

// Elapsed is Duration with the time for which hits kept the guest stopped.
func (a *Activation) Elapsed() time.Duration {
	if a.call.Ended.IsZero() {
		return 0
	}
	return a.call.Ended.Sub(a.call.Entered)
}

// returns makes p, the engine's probe at a function's entry, one that follows calls.
func (s *Session) returns(rp *ReturnProbe, p *Probe, ep *breakpoint.Probe) error {
	r := &breakpoint.Returns{MaxActive: rp.MaxActive, Follow: breakpoint.Follow(rp.Follow)}
	switch {
	case p.Offset != 0:
		return fmt.Errorf("%#x: %w: a ReturnProbe has no Offset", ep.Addr, ErrNotEntry)
	case p.Pre != nil || p.Post != nil:
		return errors.New("a ReturnProbe's Probe has Pre or Post: it has Entry and Return instead")
	case rp.Follow > AtExits:
		return fmt.Errorf("Follow is %v: want FollowAuto, AtReturn or AtExits", rp.Follow)
	case rp.MaxActive == 0:
		r.MaxActive = defaultMaxActive
	case rp.MaxActive < 0:
		r.MaxActive = 0
	}
	if s.kernel == nil {
		if rp.Follow == AtExits {
			return fmt.Errorf("%w: %w", ErrNoExits, s.noKernel())
		}
		r.NoExits = s.noKernel()
	} else if err := s.exits(r, ep.Addr); err != nil {
		return err
	} else if err := s.tellsTasks(false); err != nil {
		s.log.Warn("calls are followed without knowing their tasks", "probe", p, "why", err)
	}
	ep.Ret, ep.Pre, ep.Post = r, s.entryHandler(rp, p, ep.Addr), nil
	r.Return = s.returnHandler(rp, p)
	if rp.Abandoned != nil {
		r.Abandoned = func(c *breakpoint.Activation, why error) breakpoint.Verdict {
			a, _ := c.Data.(*Activation)
			return breakpoint.Verdict(rp.Abandoned(a, why))
		}
	}
	return nil
}

// tellsTasks returns nil if the kernel tells the task that a vCPU executes; with process, its
// process as well. It is asked before a hit needs it, as types take time to load.
func (s *Session) tellsTasks(process bool) error {
	err := s.kernel.TellsTasks(process)
	if err == nil {
		s.tasks.Store(true)
	}
	return err
}

// errNoTasks: the Session has logged why, or refused a Filter for it.
var errNoTasks = errors.New("the kernel doesn't tell its tasks")

// exits looks where the function at fn ends, and whether that can be noticed.
func (s *Session) exits(r *breakpoint.Returns, fn Addr) error {
	if err := s.kernel.Returnable(fn); err != nil {
		return err
	}
	x, err := s.kernel.Exits(fn)
	if err != nil {
		if r.Follow == breakpoint.AtExits {
			return err
		}
		r.NoExits = err
	} else {
		r.Exits = x.At
		_, _, err := s.kernel.Wrapper(fn)
		r.ExitsFirst = err == nil
	}
	if !x.Open {
		tails := x.Tails
		r.TailsTo = func(fn uint64) bool { return slices.Contains(tails, fn) }
	}
	return nil
}

// entryHandler runs at the entry of each call.
func (s *Session) entryHandler(rp *ReturnProbe, p *Probe, fn Addr) func(*breakpoint.Context) breakpoint.Verdict {
	// Abandoned handlers have no vCPU, and so no process whose memory they could read.
	read := func(addr uint64, b []byte) error { _, err := s.drv.Read(s.cr3Of(p), addr, b); return err }
	return func(c *breakpoint.Context) breakpoint.Verdict {
		a := &Activation{probe: p, call: c.Call, vcpu: c.VCPU}
		c.Call.Data = a
		a.entry.load(c.Regs, read)
		a.entry.kernel, a.entry.entry, a.entry.past = s.kernel, fn, true
		if rp.Entry == nil {
			return breakpoint.Continue
		}
		return s.handle(p, c, fn, func(r *Regs) Action { return rp.Entry(a, r) })
	}
}

// returnHandler runs at the return of each call that was followed.
func (s *Session) returnHandler(rp *ReturnProbe, p *Probe) func(*breakpoint.Context) breakpoint.Verdict {
	return func(c *breakpoint.Context) breakpoint.Verdict {
		a, _ := c.Call.Data.(*Activation)
		a.vcpu = c.VCPU
		begin := c.Call.Ended
		return s.handle(p, c, 0, func(r *Regs) Action {
			if rp.Return != nil {
				if v := rp.Return(a, r); v != Continue {
					return v
				}
			}
			return s.yield(c, Hit{Probe: p, Regs: r, Time: begin, Activation: a})
		})
	}
}

// handle runs a handler of p with the registers of the stop in hand, and takes these back.
func (s *Session) handle(p *Probe, c *breakpoint.Context, entry Addr, f func(*Regs) Action) breakpoint.Verdict {
	s.cr3.Store(c.Regs.CR3)
	s.handling.Store(p)
	defer s.handling.Store(nil)
	r := &s.regs
	r.load(c.Regs, s.readHit)
	r.kernel, r.entry, r.session, r.hit = s.kernel, entry, s, c
	defer func() { r.hit = nil }()
	v := f(r)
	r.store(c.Regs)
	return breakpoint.Verdict(v)
}

// hooks are what the engine asks about the guest's kernel.
func (s *Session) hooks() breakpoint.Hooks {
	k := s.kernel
	if k == nil {
		return breakpoint.Hooks{}
	}
	return breakpoint.Hooks{
		Task: func(r *x86.Regs) (breakpoint.Task, error) {
			if !s.tasks.Load() {
				return breakpoint.Task{}, errNoTasks
			}
			t, err := k.CurrentRef(r.GSBase)
			return breakpoint.Task(t), err
		},
		Alive:      func(t breakpoint.Task) (bool, error) { return k.TaskAlive(linux.TaskRef(t)) },
		ReturnAt:   func(ret uint64) ([]uint64, error) { return k.ReturnAt(ret, s.unsafe) },
		Trampoline: k.Trampoline,
	}
}
