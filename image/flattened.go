package image

import (
	"cmp"
	"container/heap"
	"encoding/binary"
	"fmt"
	"io"
	"slices"
	"sort"
)

// makedumpfile's flattened form (makedumpfile -F, and QEMU's dump-guest-memory -z, -l and
// -s), for pipes: a file in pieces, each with the place it goes to (struct
// makedumpfile_header, makedumpfile_data_header; makedumpfile's implementation document).
// Numbers are big-endian.
//
//	   0  char signature[16], i64 type = 1, i64 version = 1, zeros
//	4096  pieces: i64 offset, i64 size, then the bytes; both -1 at the end
const (
	flattenedMagic = "makedumpfile"
	flattenedHead  = 4096
	flattenedPiece = 16
	// maxFile bounds where a piece may go: 16 TiB.
	maxFile = 1 << 44
)

// A rearranged reads the file that the pieces make.
type rearranged struct {
	m    *Image   // what the file was before
	list []extent // addr is the place in the file that they make
	cut  bool     // pieces are missing
}

// flattened puts the pieces together, and reads what they make.
func (m *Image) flattened() error {
	file := *m
	r := &rearranged{m: &file}
	var h [flattenedHead]byte
	if m.length < flattenedHead {
		return m.within("makedumpfile's header", 0, flattenedHead)
	}
	if err := m.readAt(h[:32], 0); err != nil {
		return err
	}
	if t, v := binary.BigEndian.Uint64(h[16:]), binary.BigEndian.Uint64(h[24:]); t != 1 || v != 1 {
		return formatErr("a flattened file of makedumpfile's, type %d, version %d", t, v)
	}
	ended := false
	for off := uint64(flattenedHead); m.length-off >= flattenedPiece; {
		if err := m.readAt(h[:flattenedPiece], off); err != nil {
			return err
		}
		at, size := binary.BigEndian.Uint64(h[:]), binary.BigEndian.Uint64(h[8:])
		if int64(at) == -1 && int64(size) == -1 {
			ended = true
			break
		}
		if at >= maxFile || size > maxFile-at {
			return formatErr("piece at %#x: %#x bytes to %#x", off, size, at)
		}
		if len(r.list) == maxExtents {
			return formatErr("more than %d pieces", maxExtents)
		}
		off += flattenedPiece
		have := min(size, m.length-off)
		if have > 0 {
			r.list = append(r.list, extent{addr: at, off: off, size: have})
		}
		off += have
	}
	if !ended {
		r.cut = true
		m.warnf("the file is cut short: it ends in the middle of its pieces")
	}
	// What is written later replaces what was there: QEMU writes its tables so.
	r.list = overwrite(r.list)
	if len(r.list) == 0 {
		return formatErr("no memory in it")
	}
	m.r, m.length = r, r.list[len(r.list)-1].end()
	switch b := h[:8]; {
	case m.length < uint64(len(b)):
	default:
		if err := m.readAt(b, 0); err != nil {
			return err
		}
		switch {
		case string(b[:4]) == elfMagic:
			return m.elf()
		case string(b) == kdumpMagic:
			return m.kdump()
		}
	}
	return formatErr("a flattened file of makedumpfile's with neither an ELF core nor kdump's form in it")
}

// overwrite sorts extents, of which later ones replace earlier ones.
func overwrite(list []extent) []extent {
	sorted := true
	for i := 1; i < len(list) && sorted; i++ {
		sorted = list[i-1].end() <= list[i].addr
	}
	if sorted {
		return resolve(list)
	}
	// Backwards: of each, what the later ones have left.
	type edge struct {
		at   uint64
		i    int
		from bool
	}
	edges := make([]edge, 0, 2*len(list))
	for i, e := range list {
		edges = append(edges, edge{e.addr, i, true}, edge{e.end(), i, false})
	}
	slices.SortFunc(edges, func(a, b edge) int { return cmp.Compare(a.at, b.at) })
	var out []extent
	var open latest
	for k, e := range edges {
		if e.from {
			open.add(e.i)
		} else {
			open.remove(e.i)
		}
		i, ok := open.top()
		if !ok || k+1 == len(edges) || edges[k+1].at == e.at {
			continue
		}
		out = append(out, extent{addr: e.at, off: list[i].off + e.at - list[i].addr, size: edges[k+1].at - e.at})
	}
	return resolve(out)
}

// ReadAt implements io.ReaderAt. What no piece of a whole file has is zero, as in a sparse
// file.
func (r *rearranged) ReadAt(b []byte, off int64) (n int, err error) {
	at := uint64(off)
	end := r.list[len(r.list)-1].end()
	i := sort.Search(len(r.list), func(i int) bool { return r.list[i].end() > at })
	for n < len(b) && at < end {
		part := b[n:]
		part = part[:min(uint64(len(part)), end-at)]
		if e := r.list[i]; e.addr > at {
			part = part[:min(uint64(len(part)), e.addr-at)]
			if r.cut {
				return n, fmt.Errorf("%w: the piece with what belongs to %#x is missing", ErrTruncated, at)
			}
			clear(part)
		} else {
			part = part[:min(uint64(len(part)), e.end()-at)]
			if err := r.m.readAt(part, e.off+at-e.addr); err != nil {
				return n, err
			}
			if at+uint64(len(part)) == e.end() {
				i++
			}
		}
		n += len(part)
		at += uint64(len(part))
	}
	if n < len(b) {
		return n, io.EOF
	}
	return n, nil
}

// latest is a set of numbers of which the largest is asked for: a heap, from which what
// was removed goes when it comes to the top.
type latest struct {
	heap []int
	gone map[int]bool
}

func (l *latest) Len() int           { return len(l.heap) }
func (l *latest) Less(i, j int) bool { return l.heap[i] > l.heap[j] }
func (l *latest) Swap(i, j int)      { l.heap[i], l.heap[j] = l.heap[j], l.heap[i] }
func (l *latest) Push(x any)         { l.heap = append(l.heap, x.(int)) }
func (l *latest) Pop() any {
	x := l.heap[len(l.heap)-1]
	l.heap = l.heap[:len(l.heap)-1]
	return x
}

func (l *latest) add(i int) { heap.Push(l, i) }

func (l *latest) remove(i int) {
	if l.gone == nil {
		l.gone = make(map[int]bool)
	}
	l.gone[i] = true
}

func (l *latest) top() (i int, ok bool) {
	for len(l.heap) > 0 && l.gone[l.heap[0]] {
		delete(l.gone, heap.Pop(l).(int))
	}
	if len(l.heap) == 0 {
		return 0, false
	}
	return l.heap[0], true
}
