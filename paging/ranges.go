package paging

import "iter"

// A Range is a run of mapped addresses with equal protection.
type Range struct {
	Addr VAddr
	Size uint64     // in bytes
	Prot Protection // Writable, User and NoExecute only
	// Pages counts the pages by the level of their entries: [1] those of 4 KiB,
	// [2] of 2 MiB (2-level tables: 4 MiB), [3] of 1 GiB. Pages at either end may
	// lie in the range in part only.
	Pages [4]uint64
}

// Last returns the last address. The one after it may be 1<<64, which is no VAddr.
func (r Range) Last() VAddr { return r.Addr + VAddr(r.Size-1) }

// Ranges yields the mapped ranges from first to last, both included, in the order of
// their addresses; non-canonical addresses are not among them.
//
// It reads each page-table page that maps some of them once, and at most tables pages
// in all, so that tables which lead back to themselves can't hold it up: it ends with
// ErrBudget then. A whole GiB, as Linux has for its kernel image, takes at most 516
// (all its pages of 4 KiB, 5-level tables). An entry that can't be used (ErrReserved,
// ErrNoFrame) is yielded as an *Error with the first address that it would map, and
// the scan continues after it; there are at most 1024 for each table.
//
// The guest may change its tables meanwhile: what is yielded is what each
// table page held when it was read.
func (m *Memory) Ranges(root Root, first, last VAddr, tables int) iter.Seq2[Range, error] {
	return func(yield func(Range, error) bool) {
		s := scan{m: m, root: root, budget: tables, yield: yield}
		if m.err != nil {
			s.fail(first, 0, m.err)
			return
		}
		// Without the bits that are copies, the canonical addresses lie one after
		// the other, and no sum of two wraps.
		mask := VAddr(1)<<m.bits - 1
		half := mask >> 1
		if m.canonical(first) != first {
			if m.bits == 32 {
				return // all of them are beyond
			}
			first = ^half
		}
		if m.canonical(last) != last {
			last = half
			if m.bits == 32 {
				last = mask
			}
		}
		if first > last {
			return
		}
		table, off := m.top(root)
		if s.table(m.levels, table, off, 0, first&mask, last&mask, pteRW|pteUS) {
			s.flush()
		}
	}
}

// A scan is a call of Ranges.
type scan struct {
	m      *Memory
	root   Root
	budget int
	yield  func(Range, error) bool
	run    Range // not yielded yet; none if its Size is 0
	// Entries of the tables on the way down: the tables may change meanwhile.
	entries [maxLevels + 1][1024]uint64
}

// table scans the part from first to last of a table at level i, whose entries
// begin at address base. It returns whether to go on.
func (s *scan) table(i int, f Frame, off int, base, first, last VAddr, above uint64) bool {
	m, l := s.m, &s.m.level[i]
	from, to := uint64(first-base)>>l.shift, uint64(last-base)>>l.shift
	if s.budget <= 0 {
		s.fail(first, i, ErrBudget)
		return false
	}
	s.budget--
	entries := s.entries[i][from : to+1]
	if err := s.read(f, off, from, entries); err != nil {
		return s.fail(first, i, err)
	}
	for n, e := range entries {
		if e&pteP == 0 {
			continue
		}
		start := base + VAddr(from+uint64(n))<<l.shift
		lo, hi := max(first, start), min(last, start+1<<l.shift-1)
		addr, leaf, err := m.step(e, i)
		all := m.restrict(above, e, i)
		switch {
		case err != nil:
			if !s.fail(lo, i, err) {
				return false
			}
		case leaf:
			if !s.page(i, lo, uint64(hi-lo)+1, protection(all, 0)) {
				return false
			}
		case !s.table(i-1, Frame(addr>>pageShift), 0, start, lo, hi, all):
			return false
		}
	}
	return true
}

// read copies entries of a table, beginning with number from.
func (s *scan) read(f Frame, off int, from uint64, entries []uint64) error {
	v := s.m.begin()
	defer v.end()
	page, release, err := v.page(f)
	if err != nil {
		return err
	}
	defer release()
	for n := range entries {
		entries[n] = s.m.entryAt(page, off, from+uint64(n))
	}
	return nil
}

// page adds a page, or the part of one, to the run.
func (s *scan) page(level int, va VAddr, size uint64, p Protection) bool {
	va = s.m.canonical(va)
	if s.run.Size == 0 || s.run.Last()+1 != va || s.run.Prot != p {
		if !s.flush() {
			return false
		}
		s.run = Range{Addr: va, Prot: p}
	}
	s.run.Size += size
	s.run.Pages[level]++
	return true
}

// flush yields the run.
func (s *scan) flush() bool {
	r := s.run
	s.run = Range{}
	return r.Size == 0 || s.yield(r, nil)
}

// fail yields the run, and then an error at va.
func (s *scan) fail(va VAddr, level int, err error) bool {
	return s.flush() && s.yield(Range{}, &Error{Op: "list", Addr: s.m.canonical(va), Root: s.root, Level: level, Err: err})
}
