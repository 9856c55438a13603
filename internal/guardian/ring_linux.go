package guardian

import (
	"fmt"
	"runtime/debug"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmprobes/vmprobes/internal/target"
)

// ringWord begins a request to map the ring of a guest's monitor; the path of its journal
// follows. mapped is the answer.
const (
	ringWord = "ring "
	mapped   = "mapped"
)

// A page is the page of a ring: *target.Ring, but for tests.
type page interface {
	Over() bool
	Close() error
}

// mapRing maps the ring of the guest whose journal is at a path.
var mapRing = func(path string) (page, error) { return target.MapRing(path) }

// Ring has the guardian map the ring of the guest whose journal is at path, before this
// process attaches to it: nobody can do that later. Start has been called.
func Ring(path string) error {
	mu.Lock()
	defer mu.Unlock()
	if err := ask(ringWord+path+"\n", mapped); err != nil {
		return fmt.Errorf("the guardian, process %d, hasn't mapped the ring: %w", pid, err)
	}
	return nil
}

// rings are the rings that a guardian has mapped, by the paths of the journals.
type rings struct {
	pages  map[string]page
	ticker *time.Ticker // while there are some
}

// sweepEvery is how often they are looked at.
const sweepEvery = time.Second

// add maps another one.
func (r *rings) add(path string) error {
	r.sweep()
	if old := r.pages[path]; old != nil { // of a session that has ended just now
		delete(r.pages, path)
		_ = old.Close()
	}
	p, err := mapRing(path)
	if err != nil {
		return err
	}
	if r.pages == nil {
		r.pages = make(map[string]page)
		debug.SetGCPercent(100) // to look whether they are over takes memory
	}
	_ = unix.Mlockall(unix.MCL_CURRENT) // what that has loaded, too
	r.pages[path] = p
	if r.ticker == nil {
		r.ticker = time.NewTicker(sweepEvery)
	}
	return nil
}

// ticks says when to sweep.
func (r *rings) ticks() <-chan time.Time {
	if r.ticker == nil {
		return nil
	}
	return r.ticker.C
}

// sweep unmaps those that are over: a guest's page is its memory, and a destroyed domain
// stays as long as somebody has some of it mapped.
func (r *rings) sweep() {
	for path, p := range r.pages {
		if p.Over() {
			delete(r.pages, path)
			_ = p.Close()
		}
	}
	if len(r.pages) == 0 && r.ticker != nil {
		r.ticker.Stop()
		r.ticker = nil
	}
}

// of returns the ring of a journal for target.TakeOver, or nil.
func (r *rings) of(path string) *target.Ring {
	p, _ := r.pages[path].(*target.Ring)
	return p
}

// parseRing returns the path of a request to map a ring.
func parseRing(line string) (path string, ok bool) { return strings.CutPrefix(line, ringWord) }
