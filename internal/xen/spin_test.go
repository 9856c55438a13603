package xen

import (
	"context"
	"runtime"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/xenctrl"
)

// asked counts how often a wait asks in the given time.
func asked(ctx context.Context, p *pace, d time.Duration) (n int) {
	p.start()
	for begin := time.Now(); time.Since(begin) < d; n++ {
		p.rest(ctx)
	}
	return n
}

func TestPace(t *testing.T) {
	ctx := t.Context()
	var p pace
	defer p.end()
	// What doesn't come is asked for a few hundred times a second, after a beginning
	// without rest. (It would be a few million times.)
	n := asked(ctx, &p, 300*time.Millisecond)
	p.done()
	assert.False(t, p.near)
	assert.Less(t, n, 2000)
	assert.Equal(t, paceMax, p.sleep)

	// An answer that comes soon makes the next wait one without rest, for a while.
	restless := func() bool {
		p.start()
		p.done()
		near := p.near
		p.start()
		for range 10 {
			p.rest(ctx)
		}
		return near && p.sleep == paceMin
	}
	for try := 0; !restless(); try++ { // a busy machine may take 2 ms for any step of it
		require.Less(t, try, 1000)
	}
	asked(ctx, &p, 50*time.Millisecond)
	p.done()
	assert.False(t, p.near, "after 50 ms")

	// The end of a context ends a sleep.
	p.start()
	p.begin -= 2 * paceIdle
	p.sleep = time.Minute
	short, cancel := context.WithTimeout(ctx, 5*time.Millisecond)
	defer cancel()
	begin := time.Now()
	p.rest(short)
	assert.Less(t, time.Since(begin), time.Minute/2)
	// A timer that was stopped so doesn't shorten the next sleep.
	p.sleep = 20 * time.Millisecond
	begin = time.Now()
	p.rest(ctx)
	assert.GreaterOrEqual(t, time.Since(begin), 20*time.Millisecond)

	allocs := func() float64 {
		return testing.AllocsPerRun(20, func() {
			p.start()
			p.begin -= paceSpin
			p.rest(ctx)
			p.done()
		})
	}
	for try := 0; allocs() > 0; try++ { // the runtime may make something meanwhile
		require.Less(t, try, 20)
	}
}

// asking is a PV domain that looks at who asks.
type asking struct {
	quiet
	d    *Debugger
	held int
}

func (a *asking) GdbsxDomStatus() (s xenctrl.DomStatus, err error) {
	if a.d != nil && a.d.pace.held {
		a.held++
	}
	return a.quiet.GdbsxDomStatus()
}

// TestDebuggerHoldsProcessor: a wait without rest counts as one that keeps its
// processor for as long as it lasts, calls of the hypervisor included, so that two of
// them on two processors let others run; and no longer.
func TestDebuggerHoldsProcessor(t *testing.T) {
	a := new(asking)
	d, err := OpenDebugger(a, NewFrames(a), Config{})
	require.NoError(t, err)
	a.d, a.polls = d, 0
	d.pace.near = true
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	require.ErrorIs(t, d.Wait(ctx, nil), context.DeadlineExceeded)
	assert.Positive(t, a.held)
	assert.Equal(t, a.polls, a.held)
	assert.False(t, d.pace.held)
}

// quiet is a PV domain in which nothing happens.
type quiet struct {
	Hypervisor
	polls int
	flags xenctrl.DomainFlags
}

func (q *quiet) Info() (xenctrl.DomainInfo, error) {
	return xenctrl.DomainInfo{ID: 1, Flags: q.flags}, nil
}
func (q *quiet) VCPUContext(int, *xenctrl.VCPUContext) error { return nil }
func (q *quiet) SetDebugging(on bool) error {
	if q.flags = 0; on {
		q.flags = xenctrl.DomainDebugged
	}
	return nil
}

func (q *quiet) GdbsxDomStatus() (s xenctrl.DomStatus, err error) {
	q.polls++
	s.VCPU = -1
	return s, nil
}

// TestDebuggerWaitsAsleep: a second without a hit costs a few hundred polls; the end
// of the context ends it; and garbage is collected meanwhile.
func TestDebuggerWaitsAsleep(t *testing.T) {
	q := new(quiet)
	d, err := OpenDebugger(q, NewFrames(q), Config{})
	require.NoError(t, err)
	for _, procs := range []int{2, 1} {
		old := runtime.GOMAXPROCS(procs)
		q.polls = 0
		ctx, cancel := context.WithCancel(t.Context())
		var canceled time.Time
		go func() {
			time.Sleep(100 * time.Millisecond)
			runtime.GC()
			time.Sleep(900 * time.Millisecond)
			canceled = time.Now()
			cancel()
		}()
		require.ErrorIs(t, d.Wait(ctx, nil), context.Canceled)
		assert.Less(t, time.Since(canceled), 100*time.Millisecond)
		// Without rest for 50 µs, in which this Hypervisor can be asked very often.
		assert.Less(t, q.polls, 2000)
		assert.Greater(t, q.polls, 100)
		t.Logf("%d processors: %d polls in a second", procs, q.polls)
		runtime.GOMAXPROCS(old)
	}
}
