package vmprobes

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/target"
	"github.com/vmprobes/vmprobes/internal/xentest"
)

// waitFails is a driver whose Wait fails a number of times.
type waitFails struct {
	target.Driver
	n atomic.Int32
}

func (d *waitFails) Wait(ctx context.Context, s *breakpoint.Stop) error {
	if d.n.Add(-1) >= 0 {
		return errors.New("injected")
	}
	return d.Driver.Wait(ctx, s)
}

// TestIdleFails has the idle server fail many times: Register and Loop, for which it
// ends, don't wait for it.
func TestIdleFails(t *testing.T) {
	m := xentest.New(xentest.Config{Kind: xentest.HVM, VCPUs: 1})
	m.Start()
	defer m.Stop()
	g, drv := attached(t, m)
	d := &waitFails{Driver: drv}
	d.n.Store(1 << 20)
	s := newSession(g.Info(), d, nil, ErrNoSymbols, nil, g.Close)
	time.Sleep(1200 * time.Millisecond)
	begin := time.Now()
	s.mu.Lock()
	s.endIdle()
	s.mu.Unlock()
	assert.Less(t, time.Since(begin), 200*time.Millisecond)
	d.n.Store(0)
	require.NoError(t, s.Close())
}
