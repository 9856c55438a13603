package route

import (
	"container/list"
	"sync"
	"time"

	"github.com/vmprobes/vmprobes/paging"
)

// Limits of the page cache. A guest can give a frame another meaning
// (ballooning), and a mapping then still shows the old memory, so mappings are
// made anew after a while.
const (
	cachePages = 512
	cacheAge   = time.Second
)

// frames maps guest frames and keeps the mappings for a while. It implements
// [paging.Frames].
type frames struct {
	hv Hypervisor

	mu    sync.Mutex
	pages map[frameKey]*list.Element
	lru   list.List // of *cachedPage, most recently used first
}

type frameKey struct {
	frame    paging.Frame
	writable bool
}

type cachedPage struct {
	key     frameKey
	m       Mapping
	since   time.Time
	users   int
	dropped bool
	release func()
}

func newFrames(hv Hypervisor) *frames {
	return &frames{hv: hv, pages: make(map[frameKey]*list.Element)}
}

func (f *frames) Page(fr paging.Frame, writable bool) ([]byte, func(), error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	k := frameKey{fr, writable}
	if el, ok := f.pages[k]; ok {
		p := el.Value.(*cachedPage)
		if p.users > 0 || time.Since(p.since) < cacheAge {
			f.lru.MoveToFront(el)
			p.users++
			return p.m.Bytes(), p.release, nil
		}
		f.drop(el)
	}
	m, err := f.hv.MapFrames(writable, uint64(fr))
	if err != nil {
		return nil, nil, err
	}
	p := &cachedPage{key: k, m: m, since: time.Now(), users: 1}
	p.release = func() { f.done(p) }
	f.pages[k] = f.lru.PushFront(p)
	for el := f.lru.Back(); el != nil && f.lru.Len() > cachePages; {
		prev := el.Prev()
		if el.Value.(*cachedPage).users == 0 {
			f.drop(el)
		}
		el = prev
	}
	return m.Bytes(), p.release, nil
}

func (f *frames) done(p *cachedPage) {
	f.mu.Lock()
	defer f.mu.Unlock()
	p.users--
	if p.users == 0 && p.dropped {
		p.m.Unmap()
	}
}

// drop takes a page out of the cache; f.mu is held.
func (f *frames) drop(el *list.Element) {
	p := f.lru.Remove(el).(*cachedPage)
	delete(f.pages, p.key)
	p.dropped = true
	if p.users == 0 {
		p.m.Unmap()
	}
}

func (f *frames) close() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for el := f.lru.Front(); el != nil; el = f.lru.Front() {
		f.drop(el)
	}
}
