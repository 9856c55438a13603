package xen

import (
	"context"
	"time"

	"github.com/vmprobes/vmprobes/internal/spin"
)

// A pace says how a goroutine that has to ask again and again waits in between: it
// asks without rest as long as hits come close together, and sleeps when they
// don't, the longer the more time has passed. It belongs to one goroutine at a
// time.
type pace struct {
	begin  time.Duration
	near   bool // the last answer came within spinFor
	sleep  time.Duration
	asked  time.Duration // when it was asked last without rest, or 0
	turn   time.Duration // what asking once takes, about
	holder spin.Holder
	held   bool // from start to end, but not in a sleep
	timer  *time.Timer
}

const (
	// paceSpin is how long answers are asked for without rest when the last one
	// came as soon: a guest that hits so often would run half as fast otherwise.
	// On a slow machine it is paceTurns times what asking once takes, up to paceSlow.
	// paceFirst is that time after an answer that came later.
	paceSpin  = 2 * time.Millisecond
	paceTurns = 50
	paceSlow  = 10 * time.Millisecond
	paceFirst = 50 * time.Microsecond

	// Sleeps double from the first of these to the second, and in a wait that is
	// longer than paceIdle to the third.
	paceMin  = 20 * time.Microsecond
	paceMax  = 2 * time.Millisecond
	paceRest = 5 * time.Millisecond
	paceIdle = time.Second
)

// start is called when a wait begins, done when it has its answer, and end when
// there is no other.
func (p *pace) start() {
	p.begin, p.sleep, p.asked = spin.Clock(), paceMin, 0
	p.hold(p.begin)
}
func (p *pace) done() { p.near = spin.Clock()-p.begin < p.spinFor() }

// spinFor is how long to ask without rest.
func (p *pace) spinFor() time.Duration {
	return min(max(paceSpin, paceTurns*p.turn), paceSlow)
}
func (p *pace) end() { p.free() }

func (p *pace) hold(now time.Duration) {
	if !p.held {
		p.held = true
		p.holder.Begin(now)
	}
}

func (p *pace) free() {
	if p.held {
		p.held = false
		p.holder.End()
	}
}

// rest returns when it is time to ask again, or ctx is done, and says what time it is.
// On a slow machine to read a clock takes as long as much of a hit.
func (p *pace) rest(ctx context.Context) (now time.Duration) {
	p.free()
	defer func() { p.hold(now) }()
	now = spin.Clock()
	if p.asked != 0 {
		p.turn += (now - p.asked - p.turn) / 8
	}
	p.asked = now
	waited := now - p.begin
	if waited < paceFirst || p.near && waited < p.spinFor() {
		return now
	}
	p.asked = 0
	if p.timer == nil {
		p.timer = time.NewTimer(p.sleep)
	} else {
		p.timer.Reset(p.sleep)
	}
	select {
	case <-p.timer.C:
	case <-ctx.Done():
		p.timer.Stop()
	}
	limit := paceMax
	if waited > paceIdle {
		limit = paceRest
	}
	p.sleep = min(2*p.sleep, limit)
	now = spin.Clock()
	return now
}
