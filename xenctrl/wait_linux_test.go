package xenctrl

import (
	"context"
	"errors"
	"runtime"
	"slices"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// fakeTurn is a turn that can be given away: then others run.
type fakeTurn struct {
	yields atomic.Int64
	deny   bool
	closed bool
}

func (f *fakeTurn) yield() bool {
	f.yields.Add(1)
	runtime.Gosched()
	return !f.deny
}

func (f *fakeTurn) close() { f.closed = true }

// guest is the other side of a Monitor: each request is announced, and the next
// one comes a while after the answer.
type guest struct {
	f *fakeLib
	m *Monitor
	e *fakeTurn
}

func newGuest(t testing.TB, canYield bool) *guest {
	t.Helper()
	f := newFakeLib()
	h := newHandle(f)
	g := &guest{f: f}
	if canYield {
		g.e = new(fakeTurn)
		h.turn = g.e
	}
	var err error
	if g.m, err = h.OpenMonitor(5); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = h.Close()
		if g.e != nil && (g.e.closed || h.Yield()) {
			t.Error("the monitor is open, and its turn is closed; or the other way around")
		}
		_ = g.m.Close()
		if g.e != nil && !g.e.closed {
			t.Error("the turn is not closed")
		}
	})
	return g
}

func (g *guest) request() {
	want := sample(ReasonSoftwareBreakpoint, EventVCPUPaused)
	g.f.front.request(fillRequest(&want))
	g.f.events.raise(g.m.port)
}

// serve answers n requests and fails the test if one isn't seen in time.
func (g *guest) serve(t testing.TB, n int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	var e Event
	for i := range n {
		if err := g.m.Wait(ctx); err != nil {
			t.Fatalf("request %d of %d: Wait: %v", i, n, err)
		}
		if ok, err := g.m.Next(&e); !ok || err != nil {
			t.Fatalf("request %d: Next: %v, %v", i, ok, err)
		}
		if err := errors.Join(g.m.Respond(&e), g.m.Notify()); err != nil {
			t.Fatal(err)
		}
	}
}

// routes runs f with a guest whose requests can be waited for in each way.
func routes(t *testing.T, f func(t *testing.T, g *guest)) {
	for name, canYield := range map[string]bool{"poll": false, "spin": true} {
		t.Run(name, func(t *testing.T) { f(t, newGuest(t, canYield)) })
	}
}

// TestMonitorWaitLosesNothing: whenever a request comes, before, between or after
// the looks of Wait, it is seen.
func TestMonitorWaitLosesNothing(t *testing.T) {
	routes(t, func(t *testing.T, g *guest) {
		const n = 3000
		answered := make(chan struct{}, 1)
		g.f.events.onNotify = func() {
			g.f.front.response()
			answered <- struct{}{}
		}
		go func() {
			for i := range n {
				switch i % 8 {
				case 0: // at once
				case 1, 2, 3:
					for range i % 512 {
						runtime.Gosched()
					}
				case 4, 5:
					busy(time.Duration(i%300) * time.Microsecond)
				case 6:
					if i%256 == 6 {
						time.Sleep(time.Duration(i%7) * time.Millisecond)
					}
				}
				g.request()
				<-answered
			}
		}()
		g.serve(t, n)
	})
}

func busy(d time.Duration) {
	for begin := time.Now(); time.Since(begin) < d; {
		runtime.Gosched()
	}
}

// TestMonitorWaitEndsSoon: the end of a context ends a wait within milliseconds,
// whatever came before it, and with one processor.
func TestMonitorWaitEndsSoon(t *testing.T) {
	routes(t, func(t *testing.T, g *guest) {
		for _, procs := range []int{2, 1} {
			defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(procs))
			var ended []time.Duration
			for round := range 20 {
				// Requests that come at once make the next wait one without rest.
				g.f.events.onNotify = func() { g.f.front.response() }
				for range 3 {
					go g.request()
					g.serve(t, 1)
				}
				ctx, cancel := context.WithCancel(context.Background())
				var canceled time.Time
				delay := time.Duration(round) * 300 * time.Microsecond
				go func() {
					time.Sleep(delay)
					canceled = time.Now()
					cancel()
				}()
				if err := g.m.Wait(ctx); !errors.Is(err, context.Canceled) {
					t.Fatalf("Wait: %v, want Canceled", err)
				}
				ended = append(ended, time.Since(canceled))
			}
			// 2 ms; a busy machine may add what it likes to any of them.
			if slices.Sort(ended); ended[len(ended)/2] > time.Second {
				t.Errorf("%d processors: Wait ended %v after its context", procs, ended)
			}
		}
	})
}

// TestMonitorWaitLetsOthersRun: garbage is collected, timers fire and goroutines run
// while requests come without rest, with one processor, too.
func TestMonitorWaitLetsOthersRun(t *testing.T) {
	routes(t, func(t *testing.T, g *guest) {
		for _, procs := range []int{2, 1} {
			old := runtime.GOMAXPROCS(procs)
			var stop atomic.Bool
			// The guest: a thread of its own, so that it needs no processor of Go's
			// while it sleeps.
			g.f.events.onNotify = func() { g.f.front.response() }
			ended := make(chan struct{})
			go func() {
				defer close(ended)
				for !stop.Load() {
					if n, _ := g.m.waiting(); n == 0 {
						g.request()
					}
					time.Sleep(300 * time.Microsecond)
				}
			}()
			ctx, cancel := context.WithCancel(context.Background())
			served := make(chan int)
			go func() {
				n := 0
				var e Event
				for g.m.Wait(ctx) == nil {
					if ok, _ := g.m.Next(&e); ok {
						n++
						_ = g.m.Respond(&e)
						_ = g.m.Notify()
					}
				}
				served <- n
			}()
			time.Sleep(20 * time.Millisecond)
			var worstGC, worstTimer time.Duration
			for range 10 {
				begin := time.Now()
				runtime.GC()
				worstGC = max(worstGC, time.Since(begin))
				begin = time.Now()
				time.Sleep(time.Millisecond)
				worstTimer = max(worstTimer, time.Since(begin))
			}
			stop.Store(true)
			cancel()
			n := <-served
			<-ended
			runtime.GOMAXPROCS(old)
			t.Logf("%d processors: %d requests; longest collection %v, sleep of 1 ms %v", procs, n, worstGC, worstTimer)
			if n < 10 {
				t.Errorf("%d requests only", n)
			}
			if limit := 250 * time.Millisecond; worstGC > limit || worstTimer > limit {
				t.Errorf("%d processors: a collection took %v, a sleep of 1 ms %v", procs, worstGC, worstTimer)
			}
		}
	})
}

// TestMonitorWaitIdle: when no request comes a wait costs nothing: no polls, no
// turns given away, and no processor time.
func TestMonitorWaitIdle(t *testing.T) {
	routes(t, func(t *testing.T, g *guest) {
		g.f.events.onNotify = func() { g.f.front.response() }
		for range 3 {
			go g.request()
			g.serve(t, 1)
		}
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
		_ = g.m.Wait(ctx) // ends what is without rest
		cancel()
		var yields int64
		if g.e != nil {
			yields = g.e.yields.Load()
		}
		ctx, cancel = context.WithTimeout(context.Background(), 500*time.Millisecond)
		defer cancel()
		before := processorTime(t)
		if err := g.m.Wait(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatal(err)
		}
		if used := processorTime(t) - before; used > 25*time.Millisecond {
			t.Errorf("half a second without requests took %v of processor time", used)
		}
		if g.e != nil && g.e.yields.Load() != yields {
			t.Errorf("%d turns were given away", g.e.yields.Load()-yields)
		}
	})
}

func processorTime(t *testing.T) time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// TestMonitorSpinIsBounded: a request that doesn't come soon is waited for asleep.
func TestMonitorSpinIsBounded(t *testing.T) {
	g := newGuest(t, true)
	g.f.events.onNotify = func() { g.f.front.response() }
	for range 3 {
		go g.request()
		g.serve(t, 1)
	}
	go func() {
		time.Sleep(50 * time.Millisecond)
		g.request()
	}()
	before := processorTime(t)
	g.serve(t, 1)
	if used := processorTime(t) - before; used > 20*time.Millisecond {
		t.Errorf("a wait of 50 ms took %v of processor time", used)
	}
	if g.m.near {
		t.Error("after a long wait the next one would be without rest")
	}
	// Where a turn can't be given away there is no wait without rest.
	g.e.deny = true
	g.m.near = true
	go func() {
		time.Sleep(time.Millisecond)
		g.request()
	}()
	yields := g.e.yields.Load()
	g.serve(t, 1)
	if n := g.e.yields.Load() - yields; n > 1 {
		t.Errorf("asked %d times", n)
	}
}

// slowTurn is a turn that others take for as long as they like.
type slowTurn struct {
	given, back chan struct{}
	closed      atomic.Bool
	after       atomic.Int64 // turns that were given away when it was closed
}

func (s *slowTurn) yield() bool {
	s.given <- struct{}{}
	<-s.back
	if s.closed.Load() {
		s.after.Add(1)
	}
	return true
}

func (s *slowTurn) close() { s.closed.Store(true) }

// TestMonitorCloseWhileLooking: what gives away a turn stays open as long as somebody
// uses it. The number of a closed descriptor is soon another file's.
func TestMonitorCloseWhileLooking(t *testing.T) {
	f := newFakeLib()
	h := newHandle(f)
	turn := &slowTurn{given: make(chan struct{}), back: make(chan struct{})}
	h.turn = turn
	m, err := h.OpenMonitor(5)
	if err != nil {
		t.Fatal(err)
	}
	m.near = true
	waited := make(chan error)
	go func() { waited <- m.Wait(context.Background()) }()
	<-turn.given
	closed := make(chan error)
	go func() { closed <- errors.Join(h.Close(), m.Close()) }()
	select {
	case err := <-closed:
		close(turn.back)
		t.Fatalf("closed, though a turn was given away: %v", err)
	case <-time.After(30 * time.Millisecond):
	}
	close(turn.back)
	if err := <-waited; !errors.Is(err, ErrClosed) {
		t.Errorf("Wait: %v, want ErrClosed", err)
	}
	select {
	case err := <-closed:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("Close doesn't return")
	}
	if turn.after.Load() > 0 {
		t.Errorf("%d turns were given away after the end", turn.after.Load())
	}
	if !turn.closed.Load() {
		t.Error("the turn is not closed")
	}
	// And none is from then on.
	m.near = true
	if err := m.Wait(context.Background()); !errors.Is(err, ErrClosed) {
		t.Errorf("Wait: %v, want ErrClosed", err)
	}
}

// TestMonitorAllocates: a request and its answer make nothing for the garbage
// collector.
func TestMonitorAllocates(t *testing.T) {
	routes(t, func(t *testing.T, g *guest) {
		want := sample(ReasonSoftwareBreakpoint, EventVCPUPaused)
		fill := fillRequest(&want)
		g.f.events.onNotify = func() { g.f.front.response() }
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		var e Event
		n := testing.AllocsPerRun(500, func() {
			g.f.front.request(fill)
			g.f.events.raise(g.m.port)
			// As if it had come later: Wait looks at the ring first.
			if err := g.m.ev.Wait(ctx); err != nil {
				t.Fatal(err)
			}
			port, ok, err := g.m.ev.Pending()
			if !ok || err != nil || g.m.ev.Unmask(port) != nil {
				t.Fatal(ok, err)
			}
			if err := g.m.Wait(ctx); err != nil {
				t.Fatal(err)
			}
			if ok, err := g.m.Next(&e); !ok || err != nil {
				t.Fatal(ok, err)
			}
			if g.m.Respond(&e) != nil || g.m.Notify() != nil {
				t.Fatal("no response")
			}
		})
		// The fake makes one for each event: a buffer.
		if n > 2 {
			t.Errorf("%v allocations", n)
		}
	})
}

// TestDirectEvents: what goes over the descriptor is a port, as libxenevtchn has it.
func TestDirectEvents(t *testing.T) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fds[0])
	defer unix.Close(fds[1])
	d := &directEvents{dev: uintptr(fds[0])}
	if _, err := d.pending(); err != syscall.EAGAIN {
		t.Errorf("nothing is pending: %v, want EAGAIN", err)
	}
	if _, err := unix.Write(fds[1], []byte{0x44, 0x33, 0x22, 0x11}); err != nil {
		t.Fatal(err)
	}
	if port, err := d.pending(); port != 0x11223344 || err != nil {
		t.Errorf("pending: %#x, %v", port, err)
	}
	if _, err := unix.Write(fds[1], []byte{1, 2}); err != nil {
		t.Fatal(err)
	}
	if _, err := d.pending(); err != syscall.EIO {
		t.Errorf("half a port: %v, want EIO", err)
	}
	if err := d.unmask(0x11223344); err != nil {
		t.Error(err)
	}
	var b [8]byte
	if n, err := unix.Read(fds[1], b[:]); n != 4 || [4]byte(b[:4]) != [4]byte{0x44, 0x33, 0x22, 0x11} || err != nil {
		t.Errorf("unmask wrote % x, %v", b[:max(n, 0)], err)
	}
	if err := d.notify(1); err != syscall.ENOTTY {
		t.Errorf("notify of a socket: %v, want ENOTTY", err)
	}
	// Only of the device itself: other systems, and the tests, have the library's calls.
	e := newFakeEvents()
	defer e.pipe.close()
	if direct(e) != eventLib(e) {
		t.Error("a pipe was taken for /dev/xen/evtchn")
	}
}
