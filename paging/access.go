package paging

import "fmt"

// Translate walks the tables below root.
func (m *Memory) Translate(root Root, va VAddr) (Translation, error) {
	v := m.begin()
	t, level, err := m.walk(&v, root, va)
	v.end()
	if err != nil {
		return Translation{}, &Error{Op: "translate", Addr: va, Root: root, Level: level, Err: err}
	}
	return t, nil
}

// walk returns the level at which it failed.
func (m *Memory) walk(v *view, root Root, va VAddr) (t Translation, level int, err error) {
	if m.err != nil {
		return t, 0, m.err
	}
	if m.canonical(va) != va {
		return t, 0, ErrNonCanonical
	}
	table, off := m.top(root)
	all := uint64(pteRW | pteUS)
	for i := m.levels; ; i-- {
		shift := m.level[i].shift
		e, err := v.entry(table, off, uint64(va)>>shift&(1<<m.index-1))
		if err != nil {
			return t, i, err
		}
		base, leaf, err := m.step(e, i)
		if err != nil {
			return t, i, err
		}
		all = m.restrict(all, e, i)
		if leaf {
			size := uint64(1) << shift
			phys := base | uint64(va)&(size-1)
			return Translation{
				Frame: Frame(phys >> pageShift), Offset: phys & (PageSize - 1),
				Size: size, Prot: protection(all, e),
			}, i, nil
		}
		table, off = Frame(base>>pageShift), 0
	}
}

// Read fills b from virtual address va. n < len(b) if and only if err is not nil; the
// first n bytes have then been read.
func (m *Memory) Read(root Root, va VAddr, b []byte) (n int, err error) {
	for n < len(b) {
		at := va + VAddr(n)
		if at < va {
			return n, &Error{Op: "read", Addr: at, Root: root, Err: ErrNonCanonical}
		}
		v := m.begin()
		t, level, err := m.walk(&v, root, at)
		k := 0
		if err == nil {
			k, err = v.read(t.Frame, int(t.Offset), b[n:])
			level = 0
		}
		v.end()
		if err != nil {
			return n, &Error{Op: "read", Addr: at, Root: root, Level: level, Err: err}
		}
		n += k
	}
	return n, nil
}

// Write stores b at virtual address va, whatever the guest's page protection
// says, as a debugger does. n counts the bytes written before an error.
func (m *Memory) Write(root Root, va VAddr, b []byte) (n int, err error) {
	return m.write(root, va, b, "write")
}

// Store stores b as the guest kernel itself would: it fails, before it writes
// anything to a page, unless that page is the kernel's, mapped writable, and already
// marked accessed and dirty, so that no bit of the tables would have to change. With
// 64-bit tables, a page is the kernel's if its address is in the upper half (the user
// bit doesn't tell: a 64-bit PV kernel runs in ring 3); in the 32-bit modes, if its
// user bit is clear.
func (m *Memory) Store(root Root, va VAddr, b []byte) (n int, err error) {
	return m.write(root, va, b, "store")
}

func (m *Memory) write(root Root, va VAddr, b []byte, op string) (n int, err error) {
	for n < len(b) {
		at := va + VAddr(n)
		if at < va {
			return n, &Error{Op: op, Addr: at, Root: root, Err: ErrNonCanonical}
		}
		v := m.begin()
		t, level, err := m.walk(&v, root, at)
		v.end()
		if err == nil && op == "store" && !m.storable(at, t.Prot) {
			err, level = ErrProtected, 0
		}
		k := 0
		if err == nil {
			k, err = m.put(t.Frame, int(t.Offset), b[n:])
			level = 0
		}
		if err != nil {
			return n, &Error{Op: op, Addr: at, Root: root, Level: level, Err: err}
		}
		n += k
	}
	return n, nil
}

func (m *Memory) storable(va VAddr, p Protection) bool {
	const want = Writable | Accessed | Dirty
	if p&want != want {
		return false
	}
	if m.bits == 32 {
		return p&User == 0
	}
	return int64(va) < 0
}

// ReadPhys fills b from physical address pa. n counts the bytes read before an
// error, which wraps ErrNoFrame.
func (m *Memory) ReadPhys(pa PAddr, b []byte) (n int, err error) {
	for n < len(b) {
		at := pa + PAddr(n)
		v := m.begin()
		k, err := v.read(Frame(at>>pageShift), int(at%PageSize), b[n:])
		v.end()
		if err != nil {
			return n, fmt.Errorf("paging: read physical address %v: %w", at, err)
		}
		n += k
	}
	return n, nil
}

// WritePhys stores b at physical address pa. n counts the bytes written before
// an error, which wraps ErrNoFrame.
func (m *Memory) WritePhys(pa PAddr, b []byte) (n int, err error) {
	for n < len(b) {
		at := pa + PAddr(n)
		k, err := m.put(Frame(at>>pageShift), int(at%PageSize), b[n:])
		if err != nil {
			return n, fmt.Errorf("paging: write physical address %v: %w", at, err)
		}
		n += k
	}
	return n, nil
}

// put stores the part of b that fits into frame f at offset off.
func (m *Memory) put(f Frame, off int, b []byte) (int, error) {
	if err := f.check(); err != nil {
		return 0, err
	}
	b = b[:min(len(b), PageSize-off)]
	if m.writer != nil {
		if err := m.writer.WriteFrame(f, off, b); err != nil {
			return 0, noFrame(f, err)
		}
		return len(b), nil
	}
	page, release, err := m.frames.Page(f, true)
	if err != nil {
		return 0, noFrame(f, err)
	}
	defer release()
	if len(page) < PageSize {
		return 0, noFrame(f, errShort)
	}
	copyTo(page[off:], b)
	return len(b), nil
}

var errShort = fmt.Errorf("the backend returned less than %d bytes", PageSize)

func noFrame(f Frame, err error) error {
	return fmt.Errorf("%w: frame %#x: %w", ErrNoFrame, uint64(f), err)
}

// check rejects frames above 52 physical address bits, the most that a page-table
// entry can name. Backends needn't expect others.
func (f Frame) check() error {
	if f > physMask>>pageShift {
		return noFrame(f, fmt.Errorf("above %d physical address bits", 52))
	}
	return nil
}

// A view is the frames as one operation sees them. With a Cache its stripe is
// locked, so that pages found there need not be counted one by one.
type view struct {
	m      *Memory
	stripe *stripe
	hits   uint64
}

// begin and end enclose an operation on at most one page. Meanwhile no other
// operation can map a frame.
func (m *Memory) begin() view {
	v := view{m: m}
	if m.cache != nil {
		v.stripe = m.cache.stripe()
		v.stripe.RLock()
	}
	return v
}

func (v *view) end() {
	if v.stripe != nil {
		v.stripe.hits.Add(v.hits)
		v.stripe.RUnlock()
	}
}

// page returns frame f for reading, until release.
func (v *view) page(f Frame) (page []byte, release func(), err error) {
	if v.stripe != nil {
		if p := v.m.cache.find(f, false); p != nil {
			v.hits++
			return p.bytes, released, nil
		}
		// Mapping it takes the locks of all stripes.
		v.stripe.RUnlock()
	}
	page, release, err = v.m.frames.Page(f, false)
	if v.stripe != nil {
		v.stripe.RLock() // not deferred: if a backend panics nobody unlocks it
	}
	if err != nil {
		return nil, nil, noFrame(f, err)
	}
	if len(page) < PageSize {
		release()
		return nil, nil, noFrame(f, errShort)
	}
	return page, release, nil
}

func released() {}

// entry returns entry i of the table at off in frame f.
func (v *view) entry(f Frame, off int, i uint64) (e uint64, err error) {
	page, release, err := v.page(f)
	if err != nil {
		return 0, err
	}
	e = v.m.entryAt(page, off, i)
	release()
	return e, nil
}

// read copies from frame f, starting at offset off, to b, up to the end of either.
func (v *view) read(f Frame, off int, b []byte) (n int, err error) {
	if err := f.check(); err != nil {
		return 0, err
	}
	page, release, err := v.page(f)
	if err != nil {
		return 0, err
	}
	n = min(len(b), PageSize-off)
	copyFrom(b[:n], page[off:])
	release()
	return n, nil
}
