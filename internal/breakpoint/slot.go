package breakpoint

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
)

// int3 fills dead code, and ends a slot.
const int3 = 0xcc

// slotSize holds the longest instruction, the int3 after it, and room for the
// jump that ends a slot which has to be left behind.
const slotSize = 32

// slot is a copy of an instruction in dead code. The byte after the copy is an
// int3, which brings the vCPU back.
type slot struct {
	addr, end uint64
	code      [slotSize]byte // what is there
	site      *site
	busy      *atomic.Int32 // vCPUs and tasks in it
}

// region is dead code that was taken for slots.
type region struct {
	addr, size uint64
}

var filled = bytes.Repeat([]byte{int3}, slotSize)

// newSlot copies the instruction of s to dead code.
func (e *Engine) newSlot(s *site) (*slot, error) {
	if err := s.insn.CanStep(); err != nil {
		return nil, err
	}
	if s.insn.Branches() {
		return nil, errors.New("it doesn't lead to the end of a copy")
	}
	if s.insn.MemoryOperand() && e.cfg.MayFault == nil {
		return nil, errMayFault
	}
	sl := e.takeSlot(s)
	if sl == nil {
		return nil, errors.New("no dead code in reach")
	}
	code, err := s.insn.Relocate(s.addr, sl.addr)
	if err != nil {
		e.free = append(e.free, sl)
		return nil, err
	}
	copy(sl.code[:], filled)
	copy(sl.code[:], code)
	sl.end = sl.addr + uint64(len(code))
	if sl.busy, err = e.tell(s, sl); err != nil {
		e.free = append(e.free, sl)
		return nil, err
	}
	if err := e.retry(func() error { return e.drv.Patch(sl.addr, sl.code[:]) }); err != nil {
		e.clean(sl) // part of it may have been written
		e.over(s.addr)
		return nil, err
	}
	sl.site = s
	e.slotEnd[sl.end] = sl
	return sl, nil
}

func (e *Engine) takeSlot(s *site) *slot {
	if sl := e.freeSlotNear(s.addr); sl != nil || e.cfg.Scratch == nil {
		return sl
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
		if _, err := e.drv.Read(0, addr, buf); err != nil {
			return false
		}
		for _, c := range buf {
			if c != int3 {
				return false
			}
		}
		e.scratch = append(e.scratch, region{addr, size})
		for a := addr; a < addr+size; a += slotSize {
			e.free = append(e.free, &slot{addr: a})
		}
		e.log.Debug("dead code for out-of-line execution", "addr", hex(addr), "size", size)
		return true
	})
	return e.freeSlotNear(s.addr)
}

func (e *Engine) freeSlotNear(addr uint64) *slot {
	for i, sl := range e.free {
		if inReach(addr, sl.addr) {
			e.free = slices.Delete(e.free, i, i+1)
			return sl
		}
	}
	return nil
}

// inReach keeps a jump and a RIP-relative operand near one address within
// 32 bits of the other, but for 32 MiB; Relocate has the last word.
func inReach(a, b uint64) bool {
	const limit = 1<<31 - 32<<20
	d := int64(a - b)
	return d > -limit && d < limit
}

// freeSlot gives back the slot of s, at once or when the last vCPU leaves it. It waits while
// answers are owed: one may be to a vCPU at the slot's end, and if this process dies the vCPU
// comes there once more. A slot that was taken over is given back when the engine leaves the
// guest.
func (e *Engine) freeSlot(s *site) {
	sl := s.slot
	if sl == nil || sl.busy.Load() > 0 || e.owing.Load() || slices.Contains(e.adopted, sl) {
		return
	}
	s.slot = nil
	delete(e.slotEnd, sl.end)
	e.clean(sl)
}

// freeSlots gives back the slots that could not be while answers were owed.
func (e *Engine) freeSlots() {
	for _, sl := range e.slotEnd {
		if s := sl.site; !s.armed && s.slot == sl {
			e.freeSlot(s)
		}
	}
}

// clean makes a slot dead code again. If that fails Close tries it again.
func (e *Engine) clean(sl *slot) {
	sl.site = nil
	if err := e.retry(func() error { return e.drv.Patch(sl.addr, filled) }); err != nil {
		e.log.Error("dead code not restored", "addr", hex(sl.addr), "err", err)
		e.dirty = append(e.dirty, sl)
		return
	}
	e.cleaned(sl)
}

// cleaned takes back a slot that is dead code again.
func (e *Engine) cleaned(sl *slot) {
	e.free = append(e.free, sl)
	if e.cfg.Journal == nil {
		return
	}
	if err := e.cfg.Journal.Cleaned(sl.addr); err != nil {
		e.log.Warn("the journal wasn't told that dead code is so again", "addr", hex(sl.addr), "err", err)
	}
}

// cleanDirty makes dead code of what could not be restored before.
func (e *Engine) cleanDirty() error {
	var errs error
	e.dirty = slices.DeleteFunc(e.dirty, func(sl *slot) bool {
		err := e.retry(func() error { return e.drv.Patch(sl.addr, filled) })
		if err != nil && !errors.Is(err, ErrGone) {
			errs = errors.Join(errs, fmt.Errorf("restore %d bytes of dead code at %#x: %w", slotSize, sl.addr, err))
			return false
		}
		e.cleaned(sl)
		return true
	})
	return errs
}

// overlay replaces the slot in bytes read from addr by the dead code that it
// stands in.
func (sl *slot) overlay(addr uint64, b []byte) {
	for i, c := range sl.code {
		if off := sl.addr + uint64(i) - addr; off < uint64(len(b)) && b[off] == c {
			b[off] = int3
		}
	}
}

// endWithJump makes a slot that a vCPU may still come back to harmless: its
// int3 becomes a jump to the instruction after the original.
func (e *Engine) endWithJump(sl *slot) error {
	to := sl.site.addr + uint64(sl.site.insn.Len)
	rel := uint32(to - (sl.end + 5))
	b := []byte{0xe9, byte(rel), byte(rel >> 8), byte(rel >> 16), byte(rel >> 24)}
	if err := e.retry(func() error { return e.drv.Patch(sl.end, b) }); err != nil {
		return fmt.Errorf("end slot at %#x: %w", sl.addr, err)
	}
	delete(e.slotEnd, sl.end)
	e.active = slices.DeleteFunc(e.active, func(f *inflight) bool { return f.slot == sl })
	e.back = slices.DeleteFunc(e.back, func(c came) bool { return c.slot == sl })
	e.endLeft = errors.Join(e.endLeft, fmt.Errorf("a vCPU is still executing the copy of %#x in dead code at %#x; the %d bytes there were left, as harmless code",
		sl.site.addr, sl.addr, slotSize))
	return nil
}
