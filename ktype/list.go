package ktype

import (
	"encoding/binary"
	"fmt"
	"iter"
)

// MaxList is the limit on the elements of a list where no other one is given.
const MaxList = 1 << 20

// List walks a list (struct list_head of include/linux/types.h) and yields the
// address of each object that is linked into it, as list_for_each_entry does. head is
// the address of the list's head, which is not an element; member is the path of the
// list_head within an object of type typ: List(m, init_task+tasks, "task_struct",
// "tasks", 0).
//
// Every element must point back to the one before. If one doesn't, if the list
// runs into itself, if it has more than limit elements (0 is MaxList), or if
// memory can't be read, the last pair has address 0 and the error: ErrListBroken,
// ErrListCycle, ErrLimit or that of the Memory.
func (t *Types) List(m Memory, head uint64, typ, member string, limit int) iter.Seq2[uint64, error] {
	return t.walk(m, head, typ, member, limit, false)
}

// HList is List for lists with a head of one pointer (struct hlist_head).
func (t *Types) HList(m Memory, head uint64, typ, member string, limit int) iter.Seq2[uint64, error] {
	return t.walk(m, head, typ, member, limit, true)
}

func (t *Types) walk(m Memory, head uint64, typ, member string, limit int, hlist bool) iter.Seq2[uint64, error] {
	return func(yield func(uint64, error) bool) {
		f, err := t.Offset(typ + "." + member)
		if err != nil {
			yield(0, err)
			return
		}
		if limit <= 0 {
			limit = MaxList
		}
		w := walker{m: m, ptr: t.ptr, head: head, hlist: hlist}
		if err := w.start(); err != nil {
			yield(0, w.wrap(typ, member, 0, err))
			return
		}
		for n := 0; !w.end(); n++ {
			var err error
			if n == limit {
				err = fmt.Errorf("%w: more than %d", ErrLimit, limit)
			} else {
				err = w.step(n)
			}
			if err != nil {
				yield(0, w.wrap(typ, member, n, err))
				return
			}
			if !yield(w.prev-f.Offset, nil) {
				return
			}
		}
	}
}

// A walker is between two elements of a list.
type walker struct {
	m          Memory
	ptr        uint64
	head       uint64
	hlist      bool
	prev, next uint64 // list_heads; prev begins as the head
	buf        [16]byte
}

func (w *walker) wrap(typ, member string, n int, err error) error {
	return &ReadError{Path: fmt.Sprintf("list at %#x, element %d (%s.%s)", w.head, n, typ, member), Addr: w.next, Err: err}
}

// end reports whether there is no further element. A list_head's last points to
// the head, an hlist_node's is null.
func (w *walker) end() bool {
	if w.hlist {
		return w.next == 0
	}
	return w.next == w.head
}

func (w *walker) pointer(b []byte) uint64 {
	if w.ptr == 4 {
		return uint64(binary.LittleEndian.Uint32(b))
	}
	return binary.LittleEndian.Uint64(b)
}

// start reads the head. The first pointer is "next" or "first".
func (w *walker) start() error {
	w.prev, w.next = w.head, w.head
	b := w.buf[:w.ptr]
	if err := w.m.Read(w.head, b); err != nil {
		return err
	}
	w.next = w.pointer(b)
	return nil
}

// step goes to the next element, which is the n-th.
func (w *walker) step(n int) error {
	// next, then prev; or next, then pprev, which points to the "next" or
	// "first" before: the first pointer of what prev is in both.
	b := w.buf[:2*w.ptr]
	if err := w.m.Read(w.next, b); err != nil {
		return err
	}
	if back := w.pointer(b[w.ptr:]); back != w.prev {
		if w.visited(n) {
			return fmt.Errorf("%w: it comes back to %#x", ErrListCycle, w.next)
		}
		return fmt.Errorf("%w: it points back to %#x instead of %#x", ErrListBroken, back, w.prev)
	}
	w.prev, w.next = w.next, w.pointer(b)
	return nil
}

// visited reports whether w.next is one of the n elements that came before.
func (w *walker) visited(n int) bool {
	again := *w
	if again.start() != nil {
		return false
	}
	for range n {
		if again.next == w.next {
			return true
		}
		if again.m.Read(again.next, again.buf[:w.ptr]) != nil {
			return false
		}
		again.next = again.pointer(again.buf[:])
	}
	return false
}
