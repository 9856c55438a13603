package ktype

import (
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"slices"
)

// MaxList is the limit on the elements of a list where no other one is given.
const MaxList = 1 << 20

// List walks a list (struct list_head of include/linux/types.h) and yields the
// address of each object that is linked into it, as list_for_each_entry does. head is
// the address of the list's head, which is not an element; member is the path of the
// list_head within an object of type typ: List(m, init_task+tasks, "task_struct",
// "tasks", 0).
//
// Every element must point back to the one before, or, while an element is put between
// them or taken out, to the one before that. Where the list has changed under the reader,
// it goes back to an element that is still linked and reads on from there: what was on
// the list all the time is yielded, and once.
//
// If the memory isn't a list (ErrListBroken), if it runs into itself (ErrListCycle), if it
// has more than limit elements (ErrLimit; 0 is MaxList), or if memory can't be read, what
// can be reached from the end of the list is yielded as well, and then address 0 and the
// error.
func (t *Types) List(m Memory, head uint64, typ, member string, limit int) iter.Seq2[uint64, error] {
	return t.walk(m, head, typ, member, limit, false)
}

// HList is List for lists with a head of one pointer (struct hlist_head), which have no
// way from their end.
func (t *Types) HList(m Memory, head uint64, typ, member string, limit int) iter.Seq2[uint64, error] {
	return t.walk(m, head, typ, member, limit, true)
}

// Bounds on reading a list that changes: how many elements are looked at again, and how
// often the same one.
const (
	maxResync = 1 << 14
	maxStuck  = 3
)

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
		w := walker{m: m, ptr: t.ptr, hlist: hlist, chain: []uint64{head}}
		n := 0
		fail := func(err error) {
			err = &ReadError{Path: fmt.Sprintf("list at %#x, element %d (%s.%s)", head, n, typ, member), Addr: w.next, Err: err}
			if !hlist {
				for _, at := range slices.Backward(w.fromEnd(limit - n)) {
					if !yield(at-f.Offset, nil) {
						return
					}
				}
			}
			yield(0, err)
		}
		if w.next, _, err = w.read(head); err != nil {
			w.next = head
			fail(err)
			return
		}
		for !w.end() {
			if n == limit {
				fail(fmt.Errorf("%w: more than %d", ErrLimit, n))
				return
			}
			known, err := w.step()
			if err != nil {
				fail(err)
				return
			}
			if known {
				continue
			}
			n++
			if !yield(w.top()-f.Offset, nil) {
				return
			}
		}
	}
}

// A walker is between two elements of a list.
type walker struct {
	m     Memory
	ptr   uint64
	hlist bool
	// chain has the list_heads from the head on to where the walker is, each of which
	// the one before has pointed to.
	chain []uint64
	next  uint64          // what the last of them points to
	gone  map[uint64]bool // those that were in the chain, and may be met again
	tries int             // elements looked at again so far
	buf   [16]byte
}

func (w *walker) top() uint64 { return w.chain[len(w.chain)-1] }

// before returns the element before the last of the chain, or 0.
func (w *walker) before() uint64 {
	if len(w.chain) < 2 {
		return 0
	}
	return w.chain[len(w.chain)-2]
}

// end reports whether there is no further element. A list_head's last points to
// the head, an hlist_node's is null.
func (w *walker) end() bool {
	if w.hlist {
		return w.next == 0
	}
	return w.next == w.chain[0]
}

func (w *walker) pointer(b []byte) uint64 {
	if w.ptr == 4 {
		return uint64(binary.LittleEndian.Uint32(b))
	}
	return binary.LittleEndian.Uint64(b)
}

// read returns the two pointers of an element: next and prev; or next and pprev, which
// points to the "next" or "first" before: the first pointer of what prev is in both. A
// head of an hlist has only the first.
func (w *walker) read(at uint64) (next, back uint64, err error) {
	b := w.buf[:2*w.ptr]
	if w.hlist && at == w.chain[0] {
		b = b[:w.ptr]
	}
	clear(w.buf[:])
	if err := w.m.Read(at, b); err != nil {
		return 0, 0, err
	}
	return w.pointer(w.buf[:]), w.pointer(w.buf[w.ptr:]), nil
}

// step goes to the next element. known says that it has been there before.
func (w *walker) step() (known bool, err error) {
	for stuck := 0; ; {
		at := w.next
		next, back, err := w.read(at)
		switch {
		case err != nil:
		case back == w.top():
		case back == w.before() && back != 0 && at != w.top() && !w.gone[at]:
			// list_del and list_add change one pointer after the other.
			w.drop()
		default:
			err = w.broken(at, back)
		}
		if err == nil {
			known = w.gone[at]
			delete(w.gone, at)
			w.chain, w.next = append(w.chain, at), next
			return known, nil
		}
		if stuck == maxStuck || w.tries >= maxResync {
			return false, err
		}
		length := len(w.chain)
		if rerr := w.resync(); rerr != nil {
			return false, errors.Join(err, rerr)
		}
		if w.end() {
			// It ends here now. The caller sees that at the next look.
			return true, nil
		}
		if stuck++; len(w.chain) != length || w.next != at {
			stuck = 0
		}
	}
}

func (w *walker) broken(at, back uint64) error {
	if slices.Contains(w.chain, at) {
		return fmt.Errorf("%w: it comes back to %#x", ErrListCycle, at)
	}
	return fmt.Errorf("%w: it points back to %#x instead of %#x", ErrListBroken, back, w.top())
}

// drop takes the last element off the chain.
func (w *walker) drop() {
	if w.gone == nil {
		w.gone = make(map[uint64]bool)
	}
	w.gone[w.top()] = true
	w.chain = w.chain[:len(w.chain)-1]
}

// resync goes back to the last element that is still linked, and looks what follows it
// now.
func (w *walker) resync() error {
	for {
		w.tries++
		next, back, err := w.read(w.top())
		if len(w.chain) == 1 {
			if err == nil {
				w.next = next
			}
			return err
		}
		if err == nil && back == w.before() {
			if to, _, err := w.read(w.before()); err == nil && to == w.top() {
				w.next = next
				return nil
			}
		}
		w.drop()
	}
}

// fromEnd returns the elements that lead back from the list's end to where the walker is,
// or to the first that is damaged; the last one comes first.
func (w *walker) fromEnd(limit int) []uint64 {
	met := make(map[uint64]bool, len(w.chain))
	for _, at := range w.chain {
		met[at] = true
	}
	var back []uint64
	from := w.chain[0]
	_, at, err := w.read(from)
	for err == nil && len(back) < limit && !met[at] && !w.gone[at] {
		next, prev, rerr := w.read(at)
		if rerr != nil || next != from {
			break
		}
		met[at] = true
		back = append(back, at)
		from, at = at, prev
	}
	return back
}
