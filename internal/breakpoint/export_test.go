package breakpoint

import "time"

// Sweep is what Serve does once a second, as a test can't wait for that. Like Serve, it is for
// the goroutine that serves, between two stops.
func (e *Engine) Sweep(quiet bool) { e.sweep(quiet) }

// Age makes what the engine does after a while due now.
func (e *Engine) Age() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.swept = time.Time{}
	for ret, p := range e.plans {
		p.made = p.made.Add(-planAgain)
		e.plans[ret] = p
	}
	for _, st := range e.sites {
		if !st.warm.IsZero() {
			st.warm = st.warm.Add(-coolFor)
		}
	}
}
