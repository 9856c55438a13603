// Package spin is for goroutines that wait without telling Go's scheduler, in
// small turns, because what they wait for mostly comes sooner than a goroutine is
// put to sleep and woken.
package spin

import (
	"runtime"
	"sync/atomic"
	"time"
)

// A Holder is a goroutine that keeps its processor (P) while it waits. Between two
// turns it lets other goroutines run, if there may be no processor for them.
// Begin and End are called by one goroutine at a time.
type Holder struct {
	looked time.Duration
	procs  int32 // GOMAXPROCS then
}

// holders is how many goroutines are in a turn.
var holders atomic.Int32

// Every is how often others get the processor.
const Every = 2 * time.Millisecond

// Begin begins a turn, which must be shorter than Every. now is the Clock.
func (h *Holder) Begin(now time.Duration) {
	n := holders.Add(1)
	if h.procs != 0 && now-h.looked < Every {
		return
	}
	// It may have changed, with a container's limit for one.
	h.looked, h.procs = now, int32(runtime.GOMAXPROCS(0))
	if n >= h.procs {
		runtime.Gosched()
	}
}

// End ends it.
func (h *Holder) End() { holders.Add(-1) }

// Clock is a monotonic time. It costs half of what time.Now does.
func Clock() time.Duration { return time.Since(base) }

var base = time.Now()
