package paging

import (
	"fmt"
	"math/bits"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"
)

// A Mapper maps single frames of a guest into this process. Its methods may be
// called concurrently.
//
// A Mapper whose pages are copies is a [FrameWriter] too, and calls the Cache's
// Invalidate whenever the guest has run. (See [Cache.WriteBriefly] for one that is a
// FrameWriter for another reason.)
type Mapper interface {
	// Map returns the 4096 bytes of frame f, and the function that unmaps them.
	Map(f Frame, writable bool) (page []byte, unmap func() error, err error)
}

// A Cache keeps frames mapped for a while. It is the [Frames] that a Memory reads
// fastest. A Memory reads a type that embeds a *Cache through that Cache, so such a
// type must not have a Page method of its own. Make one with [NewCache]. It is safe
// for concurrent use.
//
// A page is never unmapped while it is in use. A guest can give a frame another
// meaning (ballooning), and an old mapping then still shows the old memory. So every
// frame is mapped again after an age, or after Invalidate. Once it has been idle for
// that age, a Cache has nothing mapped.
type Cache struct {
	mapper Mapper
	writer FrameWriter // the mapper, if it is one
	size   int
	age    time.Duration
	factor uint64 // of the hash: odd, and unknown to guests
	maps   atomic.Uint64

	// stripes guard what follows. Readers lock one of them, writers all, so that
	// readers on several CPUs share no cache line that they write to.
	stripes [stripes]stripe
	index   []*cached // by hash: chains of pages
	ring    []*cached // the same pages, in the order of the clock
	hand    int
	era     uint64 // changes when pages that are being mapped must not be kept
	brief   bool   // writable pages aren't kept
	closed  bool
	timer   *time.Timer // ends the era, if there are pages

	sweep    sync.Mutex // held while an era ends: Close waits for that
	unmapErr atomic.Pointer[error]
}

const (
	stripeBits = 3
	stripes    = 1 << stripeBits
)

// A stripe is alone in two cache lines, which CPUs fetch together.
type stripe struct {
	sync.RWMutex
	hits atomic.Uint64
	_    [128 - unsafe.Sizeof(sync.RWMutex{}) - 8]byte
}

// A cached page is referred to by the cache and by each of its users.
type cached struct {
	frame    Frame
	writable bool
	bytes    []byte
	unmap    func() error
	release  func()
	refs     atomic.Int64
	used     atomic.Bool // since the clock's hand was here
	slot     int         // in the ring
	next     *cached     // in the chain
}

// CacheStats counts what a Cache did since it was made.
type CacheStats struct {
	Maps  uint64 // calls of Mapper.Map
	Hits  uint64 // pages that were found mapped
	Pages int    // that are kept now
}

// maxPages is 16 GiB of guest memory.
const maxPages = 1 << 22

// NewCache returns a Cache that keeps up to size pages (1 to 1<<22) mapped, and
// each for about age at most; 0 means until Invalidate.
func NewCache(m Mapper, size int, age time.Duration) *Cache {
	c := &Cache{mapper: m, size: min(max(size, 1), maxPages), age: age, factor: rand.Uint64() | 1}
	c.writer, _ = m.(FrameWriter)
	c.index = make([]*cached, 1<<bits.Len(uint(c.size)))
	return c
}

// Page implements [Frames].
func (c *Cache) Page(f Frame, writable bool) ([]byte, func(), error) {
	s := c.stripe()
	s.RLock()
	brief := writable && c.brief
	if p := c.find(f, writable); p != nil && !brief {
		p.refs.Add(1)
		s.hits.Add(1)
		s.RUnlock()
		return p.bytes, p.release, nil
	}
	era, closed := c.era, c.closed
	s.RUnlock()
	if closed {
		return nil, nil, ErrClosed
	}
	p, err := c.mapPage(f, writable)
	if err != nil {
		return nil, nil, err
	}
	if brief {
		return p.bytes, p.release, nil
	}
	var old *cached
	c.lock()
	if q := c.find(f, writable); q != nil {
		old, p = p, q // another reader was faster
		p.refs.Add(1)
	} else if era == c.era { // else it is good for this use, but not to be kept
		p.refs.Add(1)
		old = c.insert(p)
	}
	c.unlock()
	c.drop(old)
	return p.bytes, p.release, nil
}

// WriteBriefly makes c map writable pages for each use and unmap them after it. It is
// for guests that a writable mapping hinders: Xen lets no PV guest make a page table
// of such a frame. With it a Mapper's WriteFrame is a shorter way to do that, and its
// pages are no copies.
func (c *Cache) WriteBriefly() {
	c.lock()
	c.brief = true
	c.unlock()
	c.Invalidate()
}

// mapPage returns a new page with one reference, for its user.
func (c *Cache) mapPage(f Frame, writable bool) (*cached, error) {
	c.maps.Add(1)
	b, unmap, err := c.mapper.Map(f, writable)
	if err != nil {
		return nil, err
	}
	p := &cached{frame: f, writable: writable, bytes: b, unmap: unmap}
	p.release = func() { c.drop(p) }
	p.refs.Store(1)
	if len(b) < PageSize {
		c.drop(p)
		return nil, errShort
	}
	return p, nil
}

// WriteFrame implements [FrameWriter], by the Mapper's WriteFrame if it has one, else
// by a writable mapping.
func (c *Cache) WriteFrame(f Frame, off int, b []byte) error {
	if off < 0 || off > PageSize || len(b) > PageSize-off {
		return fmt.Errorf("%d bytes at offset %d exceed the frame", len(b), off)
	}
	if c.writer == nil {
		page, release, err := c.Page(f, true)
		if err != nil {
			return err
		}
		copyTo(page[off:], b)
		release()
		return nil
	}
	closed, brief := c.state()
	if closed {
		return ErrClosed
	}
	err := c.writer.WriteFrame(f, off, b)
	if brief {
		return err // pages are mapped, and show what was written
	}
	// Copies made before or during the write are stale.
	c.lock()
	c.era++
	ro, rw := c.remove(f, false), c.remove(f, true)
	c.unlock()
	c.drop(ro)
	c.drop(rw)
	return err
}

func (c *Cache) state() (closed, brief bool) {
	s := c.stripe()
	s.RLock()
	defer s.RUnlock()
	return c.closed, c.brief
}

// Invalidate forgets all pages: what is read from now on is mapped anew.
func (c *Cache) Invalidate() {
	c.sweep.Lock()
	defer c.sweep.Unlock()
	c.lock()
	ring := c.forget()
	c.unlock()
	for _, p := range ring {
		c.drop(p)
	}
}

// Close forgets all pages and fails all later accesses with ErrClosed. Pages in use
// are unmapped when they are released. It returns the first error of unmapping a
// page.
func (c *Cache) Close() error {
	c.lock()
	c.closed = true
	c.unlock()
	c.Invalidate()
	if err := c.unmapErr.Load(); err != nil {
		return fmt.Errorf("paging: unmap: %w", *err)
	}
	return nil
}

func (c *Cache) frameCache() *Cache { return c }

// Stats returns the counters.
func (c *Cache) Stats() CacheStats {
	st := CacheStats{Maps: c.maps.Load()}
	for i := range c.stripes {
		st.Hits += c.stripes[i].hits.Load()
	}
	s := c.stripe()
	s.RLock()
	defer s.RUnlock()
	st.Pages = len(c.ring)
	return st
}

// stripe returns the calling goroutine's stripe, by the address of a local variable:
// each goroutine has a stack of its own, of at least 2 KiB.
func (c *Cache) stripe() *stripe {
	var here byte
	const golden = 0x9e3779b97f4a7c15 // Fibonacci hashing: 2^64 divided by the golden ratio
	return &c.stripes[uint64(uintptr(unsafe.Pointer(&here)))>>11*golden>>(64-stripeBits)]
}

func (c *Cache) lock() {
	for i := range c.stripes {
		c.stripes[i].Lock()
	}
}

func (c *Cache) unlock() {
	for i := range c.stripes {
		c.stripes[i].Unlock()
	}
}

// chain returns the head of a frame's chain of pages. The caller holds a stripe.
func (c *Cache) chain(f Frame) **cached {
	return &c.index[uint64(f)*c.factor>>32&uint64(len(c.index)-1)]
}

// find returns the page of a frame, or nil. The caller holds a stripe.
func (c *Cache) find(f Frame, writable bool) *cached {
	for p := *c.chain(f); p != nil; p = p.next {
		if p.frame == f && p.writable == writable {
			if !p.used.Load() {
				p.used.Store(true)
			}
			return p
		}
	}
	return nil
}

// insert keeps a page. If there are too many, it returns the one to drop: the clock's
// choice, which wasn't used lately. The caller holds all stripes, here and below.
func (c *Cache) insert(p *cached) (old *cached) {
	if c.timer == nil && c.age > 0 {
		c.timer = time.AfterFunc(c.age, c.Invalidate)
	}
	if len(c.ring) < c.size {
		p.slot = len(c.ring)
		c.ring = append(c.ring, p)
	} else {
		for c.ring[c.hand].used.Swap(false) {
			c.hand = (c.hand + 1) % len(c.ring)
		}
		old = c.ring[c.hand]
		c.unchain(old)
		p.slot = c.hand
		c.ring[c.hand] = p
		c.hand = (c.hand + 1) % len(c.ring)
	}
	head := c.chain(p.frame)
	p.next, *head = *head, p
	return old
}

// remove forgets the page of a frame and returns it, or nil.
func (c *Cache) remove(f Frame, writable bool) *cached {
	p := c.find(f, writable)
	if p == nil {
		return nil
	}
	c.unchain(p)
	last := c.ring[len(c.ring)-1]
	last.slot, c.ring[p.slot] = p.slot, last
	c.ring = c.ring[:len(c.ring)-1]
	if c.hand >= len(c.ring) {
		c.hand = 0
	}
	return p
}

func (c *Cache) unchain(p *cached) {
	at := c.chain(p.frame)
	for *at != p {
		at = &(*at).next
	}
	*at = p.next
}

// forget begins an era without pages and returns those there were.
func (c *Cache) forget() (ring []*cached) {
	ring = c.ring
	c.era++
	c.ring, c.hand = nil, 0
	clear(c.index)
	if c.timer != nil {
		c.timer.Stop()
		c.timer = nil
	}
	return ring
}

// drop gives up a reference, and with the last one the mapping. Since that can
// take its time, it isn't called with all stripes locked.
func (c *Cache) drop(p *cached) {
	if p == nil || p.refs.Add(-1) != 0 {
		return
	}
	if err := p.unmap(); err != nil {
		c.unmapErr.CompareAndSwap(nil, &err)
	}
}

var _ interface {
	Frames
	FrameWriter
} = (*Cache)(nil)
