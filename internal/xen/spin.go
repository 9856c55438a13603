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
	near   bool // the last answer came within paceSpin
	sleep  time.Duration
	holder spin.Holder
	held   bool // from start to end, but not in a sleep
	timer  *time.Timer
}

const (
	// paceSpin is how long answers are asked for without rest when the last one
	// came as soon: a guest that hits so often would run half as fast otherwise.
	// paceFirst is that time after an answer that came later.
	paceSpin  = 2 * time.Millisecond
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
	p.begin, p.sleep = spin.Clock(), paceMin
	p.hold()
}
func (p *pace) done() { p.near = spin.Clock()-p.begin < paceSpin }
func (p *pace) end()  { p.free() }

func (p *pace) hold() {
	if !p.held {
		p.held = true
		p.holder.Begin()
	}
}

func (p *pace) free() {
	if p.held {
		p.held = false
		p.holder.End()
	}
}

// rest returns when it is time to ask again, or ctx is done.
func (p *pace) rest(ctx context.Context) {
	p.free()
	defer p.hold()
	waited := spin.Clock() - p.begin
	if waited < paceFirst || p.near && waited < paceSpin {
		return
	}
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
}
