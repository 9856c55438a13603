package spin

import (
	"runtime"
	"testing"
	"time"
)

func TestMain(m *testing.M) {
	m.Run()
	if n := holders.Load(); n != 0 {
		panic("a Holder is left")
	}
}

// others makes a turn every tenth of a millisecond for a while, and returns how often
// another goroutine ran meanwhile, with one processor.
func others(h *Holder, d time.Duration) (n int) {
	stop, ended := make(chan struct{}), make(chan int)
	go func() {
		n := 0
		for {
			select {
			case <-stop:
				ended <- n
				return
			default:
				n++
				runtime.Gosched()
			}
		}
	}()
	for begin := Clock(); Clock()-begin < d; {
		h.Begin()
		for turn := Clock(); Clock()-turn < 100*time.Microsecond; {
		}
		h.End()
	}
	close(stop)
	return <-ended
}

// TestHolder: where there may be no processor for others they get this one every 2 ms,
// from when there is none on. (Go itself would take it away every 10 ms.)
func TestHolder(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(8))
	var h Holder
	h.Begin()
	h.End()
	runtime.GOMAXPROCS(1)
	const d = 200 * time.Millisecond
	best := 0
	for range 10 { // the machine may be busy
		if best = max(best, others(&h, d)); best > int(d/Every)/2 {
			return
		}
	}
	t.Errorf("in %v others ran %d times at the most", d, best)
}
