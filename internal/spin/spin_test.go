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

// others makes turns of a tenth of a millisecond for a while, and returns how often
// another goroutine ran meanwhile, with one processor, and how often it was due.
func others(h *Holder, d time.Duration) (n, due int) {
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
		if Clock()-h.looked >= Every {
			due++
		}
		h.Begin(Clock())
		for turn := Clock(); Clock()-turn < 100*time.Microsecond; {
		}
		h.End()
	}
	close(stop)
	return <-ended, due
}

// TestHolder: where there may be no processor for others they get this one every 2 ms,
// from when there is none on. (Go itself would take it away every 10 ms.)
func TestHolder(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(8))
	var h Holder
	h.Begin(Clock())
	h.End()
	runtime.GOMAXPROCS(1)
	n, due := others(&h, 200*time.Millisecond)
	if due == 0 || 2*n < due {
		t.Errorf("others ran %d times, and were due %d times", n, due)
	}
}
