package breakpoint

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"github.com/vmprobes/vmprobes/internal/x86"
)

// A Journal is told what the engine changes in the guest's text before it does, so that
// another process can undo it when this one has died. Its methods return when what they
// were told outlives this process; a change that can't be told isn't made.
type Journal interface {
	// Break: a breakpoint is about to be put on an instruction, and before that its copy
	// into a slot, if slot isn't nil. busy is where the engine counts who is in the
	// slot: memory that outlives this process, and costs no call.
	Break(b LeftBreak, slot *LeftSlot) (busy *atomic.Int32, err error)
	// Removed: the byte under the breakpoint is back; Cleaned: a slot is dead code again.
	Removed(addr uint64) error
	Cleaned(addr uint64) error
	// Marks is where the engine notes which slot it is sending a vCPU to, in memory
	// that outlives this process.
	Marks(vcpu int) *Marks
}

// Marks are those of one vCPU. A process uses one of them. If it dies, and nobody knows
// whether it has given its last answer, whoever takes over uses the next one: in an
// interrupt handler the vCPU may be sent to the same slot again before that is known.
type Marks [4]Mark

// A Mark says that a vCPU is counted as in a slot though the answer that sends it there
// may not have been given yet, or no longer though it may be at the slot's end still.
type Mark struct {
	Slot     uint64 // its address, or 0
	SP       uint64 // the vCPU's stack pointer at its breakpoint, or 0 if that isn't known
	Back     bool   // it has come back
	End      uint64 // then: its stack pointer at the slot's end
	Counting bool   // the slot's counter is being made Count, and may be so or not
	Count    int32
	Kept     bool // by who took over: the last answer to the vCPU is another one
	Sure     bool // then: the vCPU comes to the slot's end once more
}

// count makes the slot's counter n, and m say what to says: what that means for a vCPU. The
// two are in different places: whoever takes over finds either what was before, or what is
// to be.
func (m *Mark) count(sl *slot, to Mark, n int32) {
	to.Count, to.Counting = n, true
	m.set(sl, to)
	sl.busy.Store(n)
	m.Counting = false
}

// set makes m say what to says, of a slot.
func (m *Mark) set(sl *slot, to Mark) {
	atomic.StoreUint64(&m.Slot, 0)
	m.SP, m.Back, m.End, m.Kept, m.Sure, m.Count, m.Counting = to.SP, to.Back, to.End, to.Kept, to.Sure, to.Count, to.Counting
	atomic.StoreUint64(&m.Slot, sl.addr) // last: whoever finds it finds the rest
}

// mark is the one that this process uses for a vCPU, or nil if it has none.
func (e *Engine) mark(vcpu int) *Mark {
	if e.own == nil {
		return nil
	}
	return e.own[vcpu]
}

// finishCounting completes what a process that died was counting. Only one at a time counts in
// the slots of a guest, so that the counter is as it left it.
func (e *Engine) finishCounting(slots []LeftSlot) {
	for _, ms := range e.marks {
		for i := range ms {
			m := &ms[i]
			if m.Slot == 0 || !m.Counting {
				continue
			}
			for j := range slots {
				if slots[j].Addr == m.Slot {
					slots[j].Busy.Store(m.Count)
				}
			}
			m.Counting = false
		}
	}
}

// A LeftBreak is a breakpoint that an engine had in its guest when its process died, or
// was about to put there.
type LeftBreak struct {
	Addr uint64
	Insn []byte // that it is on
}

// A LeftSlot is a copy of an instruction in dead code.
type LeftSlot struct {
	Addr  uint64
	Break LeftBreak     // of the instruction
	Code  []byte        // what is there: the copy, and int3s up to the end of the slot
	Len   int           // of the copy
	Busy  *atomic.Int32 // vCPUs and tasks in it, where that is counted; nil in Journal.Break
}

// An Underway is a step in place that a process had begun when it died.
type Underway struct {
	VCPU   int
	Break  LeftBreak // which may have been removed since
	Before x86.Regs  // with IP at it
}

// An Adopter is a Driver that takes over from a process that died.
type Adopter interface {
	Driver
	// AdoptBreak makes a breakpoint of the dead process the driver's own, and reports
	// whether it is in the guest. ErrTextChanged says that the guest has something else
	// there, which is left alone.
	AdoptBreak(addr uint64, in *x86.Insn) (there bool, err error)
	// Underway is the step that hasn't come to its end.
	Underway() (u Underway, ok bool)
	// IPs are the instruction pointers of the vCPUs. The guest is frozen.
	IPs() ([]uint64, error)
	// Answered reports whether the last answer to a vCPU of the process that died was
	// given: the vCPU has gone on, or will. If known is false it comes back to its
	// breakpoint if it wasn't.
	Answered(vcpu int) (answered, known bool)
}

// Adopt makes breakpoints and slots of a process that died e's own. It writes nothing:
// the guest has what it had. Close, called next, takes them out, and answers the stops
// that the driver has found. What Adopt returns in told doesn't keep Close from doing that:
// it is what isn't ours any more, because the guest has changed its code. If err isn't nil
// Close must not be called, as it would leave bytes in the guest that e doesn't know of.
func (e *Engine) Adopt(breaks []LeftBreak, slots []LeftSlot) (told, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	drv, ok := e.drv.(Adopter)
	if !ok {
		return nil, fmt.Errorf("take over from a process that died: %w", errors.ErrUnsupported)
	}
	if err := e.retry(e.drv.Freeze); err != nil {
		return nil, fmt.Errorf("pause the guest: %w", err)
	}
	e.finishCounting(slots)
	a := adoption{e: e, drv: drv, sites: make(map[uint64]*site)}
	tell := func(why error, format string, args ...any) {
		why = fmt.Errorf("%s: %w", fmt.Sprintf(format, args...), why)
		if changed(why) {
			told = errors.Join(told, why)
		} else {
			err = errors.Join(err, why)
		}
	}
	if u, ok := drv.Underway(); ok {
		s, err := a.site(u.Break)
		if err != nil {
			tell(err, "step over %#x", u.Break.Addr)
		} else {
			e.active = append(e.active, &inflight{vcpu: u.VCPU, site: s, before: u.Before, lost: true})
		}
	}
	for _, b := range breaks {
		if err := a.adoptBreak(b); err != nil {
			tell(err, "breakpoint at %#x", b.Addr)
		}
	}
	for i := range slots {
		if err := a.adoptSlot(&slots[i]); err != nil {
			tell(err, "slot at %#x", slots[i].Addr)
		}
	}
	for v, ms := range e.marks {
		e.own[v] = nil
		for i := range ms {
			m := &ms[i]
			if m.Slot != 0 {
				if err := a.adoptMark(v, m); err != nil {
					tell(err, "breakpoint of the copy at %#x", m.Slot)
				}
			}
			if m.Slot == 0 && e.own[v] == nil {
				e.own[v] = m
			}
		}
	}
	if err != nil {
		return told, errors.Join(err, e.retry(e.drv.Thaw))
	}
	return errors.Join(told, e.thaw()), nil
}

// changed reports whether an error says that the guest has something else where it was ours,
// or nothing any more, and not just that nobody could look.
func changed(err error) bool {
	return errors.Is(err, ErrTextChanged) || errors.Is(err, ErrNotMapped) || errors.Is(err, ErrFault) || errors.Is(err, ErrGone)
}

// adoption is an Adopt in progress.
type adoption struct {
	e     *Engine
	drv   Adopter
	sites map[uint64]*site // in the guest or not
}

// site returns the site of a breakpoint.
func (a *adoption) site(b LeftBreak) (*site, error) {
	if s := a.sites[b.Addr]; s != nil && bytes.Equal(s.insn.Bytes(), b.Insn) {
		return s, nil
	}
	in, err := x86.Decode(b.Insn)
	if err != nil || in.Len != len(b.Insn) {
		return nil, fmt.Errorf("%w: % x", ErrBadInsn, b.Insn)
	}
	s := &site{addr: b.Addr, insn: in}
	a.sites[b.Addr] = s
	return s, nil
}

func (a *adoption) adoptBreak(b LeftBreak) error {
	s, err := a.site(b)
	if err != nil {
		return err
	}
	return a.e.retry(func() error {
		there, err := a.drv.AdoptBreak(s.addr, &s.insn)
		if there && err == nil {
			s.armed = true
			a.e.enlist(s)
		}
		return err
	})
}

func (a *adoption) adoptSlot(l *LeftSlot) error {
	e := a.e
	s, err := a.site(l.Break)
	if err != nil {
		return err
	}
	busy := l.Busy.Load()
	if len(l.Code) != slotSize || l.Len < 1 || l.Len > x86.MaxLen || busy < 0 || busy > maxActive {
		return fmt.Errorf("%w: a copy of %d bytes, of %d, with %d in it", ErrBadInsn, l.Len, len(l.Code), busy)
	}
	sl := &slot{addr: l.Addr, end: l.Addr + uint64(l.Len), site: s, busy: l.Busy}
	copy(sl.code[:], l.Code)
	var now [slotSize]byte
	if err := e.retry(func() error { _, err := e.drv.Read(0, sl.addr, now[:]); return err }); err != nil {
		return err
	}
	for i, c := range now { // each of which may have been written or not
		if c != sl.code[i] && c != int3 {
			return fmt.Errorf("%w: it holds % x, not the copy % x", ErrTextChanged, now, sl.code)
		}
	}
	if bytes.Equal(now[:], filled) {
		return nil // nothing of it is there
	}
	// A vCPU may be at its end. So it is made dead code when those that have stopped are
	// answered, whoever else is in it.
	e.slotEnd[sl.end] = sl
	e.adopted = append(e.adopted, sl)
	if bytes.Equal(now[:], sl.code[:]) {
		// Of use still: a breakpoint that vCPUs are waited for is not taken out because one
		// that isn't waited for can't get past.
		s.slot = sl
	}
	for range busy {
		e.active = append(e.active, &inflight{vcpu: -1, site: s, slot: sl, lost: true})
	}
	return nil
}

// adoptMark finds out whether a vCPU is in the slot in which it was counted.
func (a *adoption) adoptMark(v int, m *Mark) error {
	e := a.e
	answered, known := a.drv.Answered(v)
	if answered && known && !m.Kept {
		m.Slot = 0 // what becomes of the vCPU next is another matter
		return nil
	}
	if m.Kept {
		known = m.Sure
	}
	m.Sure, m.Kept = known, true
	if m.Back {
		i := slices.IndexFunc(e.adopted, func(sl *slot) bool { return sl.addr == m.Slot })
		if i < 0 {
			m.Slot = 0 // nothing of the slot is there
			return nil
		}
		sl := e.adopted[i]
		e.back = append(e.back, came{sl, m})
		if known {
			return nil
		}
		return a.rearm(sl.site) // if it has gone on it may come by, which tells
	}
	for _, f := range e.active {
		if f.slot == nil || f.slot.addr != m.Slot || f.vcpu >= 0 {
			continue
		}
		f.vcpu, f.before.SP, f.mark = v, m.SP, m
		if known {
			e.away(f)
			return nil
		}
		// It comes to its breakpoint again, or to the slot's end: here tells.
		return a.rearm(f.site)
	}
	m.Slot = 0 // nobody is counted as in that slot
	return nil
}

// rearm puts a breakpoint back that was removed when a vCPU may have been at it.
func (a *adoption) rearm(s *site) error {
	if s.armed || a.e.sites[s.addr] != nil {
		return nil
	}
	if _, err := a.e.tell(s, nil); err != nil {
		return err
	}
	if err := a.e.retry(func() error { return a.drv.InsertBreak(s.addr, &s.insn) }); err != nil {
		return err
	}
	s.armed = true
	a.e.enlist(s)
	return nil
}

// came is a vCPU whose return from a slot was counted by the process that died.
type came struct {
	slot *slot
	mark *Mark
}

// expected reports whether a vCPU may come to the end of a slot in which it isn't counted.
func (e *Engine) expected(sl *slot) bool {
	return slices.ContainsFunc(e.back, func(c came) bool { return c.slot == sl })
}

// counted reports whether the return with s from sl was counted before. If so that is
// this process' to say from now on, as it is its answer that may not be given. The task may
// have moved to another vCPU; its stack is its own.
func (e *Engine) counted(sl *slot, s *Stop) bool {
	i := slices.IndexFunc(e.back, func(c came) bool {
		return c.slot == sl && c.mark.End == s.Regs.SP
	})
	if i < 0 {
		return false
	}
	m := e.back[i].mark
	e.back = slices.Delete(e.back, i, i+1)
	if slices.ContainsFunc(e.active, func(f *inflight) bool {
		return f.slot == sl && !f.lost && f.vcpu == s.VCPU && sameStack(f.before.SP, s.Regs.SP)
	}) {
		// It had gone on, and came by where its stack pointer wasn't known.
		m.Slot = 0
		return false
	}
	if own := e.mark(s.VCPU); own != nil {
		own.set(sl, Mark{SP: m.SP, Back: true, End: m.End})
		m.Slot = 0
	}
	return true
}

// here is told of each stop. A vCPU that was counted as in a slot, or as back from it, and
// is at the breakpoint, isn't there any more, or does not come back from it once more.
func (e *Engine) here(s *Stop) {
	e.back = slices.DeleteFunc(e.back, func(c came) bool {
		if c.slot.site.addr != s.Regs.IP || c.mark.SP != s.Regs.SP && (c.mark.SP != 0 || !near(c.mark.End, s.Regs.SP)) {
			return false
		}
		c.mark.Slot = 0
		return true
	})
	for _, f := range e.active {
		if f.mark != nil && f.site.addr == s.Regs.IP && f.before.SP == s.Regs.SP {
			e.away(f)
			return
		}
	}
}

// away says that f's vCPU isn't in the slot in which it was counted.
func (e *Engine) away(f *inflight) {
	f.mark.Slot = 0 // first: one too many that is counted does no harm
	e.arrive(f)
}

// errInside: a vCPU is in a slot that was taken over, or at its end, and hasn't stopped.
var errInside = errors.New("a vCPU is in the copy of an instruction")

// inside looks whether a vCPU is in a slot that was taken over. Nobody may have counted
// it: it had stopped at its end, and comes to the int3 there once more. The guest is
// frozen.
func (e *Engine) inside() error {
	if len(e.adopted) == 0 {
		return nil
	}
	var ips []uint64
	if err := e.retry(func() (err error) { ips, err = e.drv.(Adopter).IPs(); return err }); err != nil {
		return err
	}
	for _, sl := range e.adopted {
		for _, ip := range ips {
			// Xen has a PV guest's vCPU behind the int3 at the end.
			if ip >= sl.addr && ip <= sl.end+1 && e.slotEnd[sl.end] == sl {
				return fmt.Errorf("%w at %#x", errInside, sl.addr)
			}
		}
	}
	return nil
}

// settleAdopted makes dead code of the slots that were taken over and that nobody is in.
// The guest is frozen, and all that had stopped is answered.
func (e *Engine) settleAdopted() {
	if e.owing.Load() {
		return
	}
	e.adopted = slices.DeleteFunc(e.adopted, func(sl *slot) bool {
		if sl.busy.Load() > 0 || e.expected(sl) {
			return false
		}
		if sl.site.slot == sl {
			sl.site.slot = nil // whose breakpoint may be there still
		}
		if e.slotEnd[sl.end] == sl { // it isn't, if it was left with a jump
			delete(e.slotEnd, sl.end)
			e.dirty = append(e.dirty, sl)
		}
		return true
	})
}

// meet waits for vCPUs that were taken over: those that may be in a slot or at their
// breakpoint still, which tell as long as its byte is there, and those that come to the
// end of a slot once more.
func (e *Engine) meet() {
	waits := func() time.Duration {
		switch {
		case len(e.back) > 0:
			return closeWait
		case slices.ContainsFunc(e.active, func(f *inflight) bool { return f.mark != nil }):
			return failWait
		}
		return 0
	}
	for begin := time.Now(); time.Since(begin) < waits(); {
		e.serveFor(time.Millisecond)
	}
}
