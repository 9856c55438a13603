package xen_test

import (
	"context"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/xen"
	"github.com/vmprobes/vmprobes/internal/xentest"
	"github.com/vmprobes/vmprobes/xenctrl"
)

// ballooning is a domain that has given back all pages that are mapped, and taken
// others at the same places: what is mapped before shows bytes of the past.
type ballooning struct {
	xen.Hypervisor
	done atomic.Bool
}

func (h *ballooning) Info() (xenctrl.DomainInfo, error) {
	info, err := h.Hypervisor.Info()
	if h.done.Load() {
		info.TotalPages++ // the old page is the domain's as long as it is mapped
	}
	return info, err
}

func (h *ballooning) MapFrames(writable bool, frames ...uint64) (xen.Mapping, error) {
	m, err := h.Hypervisor.MapFrames(writable, frames...)
	if err != nil || h.done.Load() {
		return m, err
	}
	return &past{m, append([]byte(nil), m.Bytes()...)}, nil
}

type past struct {
	xen.Mapping
	bytes []byte
}

func (p *past) Bytes() []byte { return p.bytes }

// TestBallooned: a page that the guest has exchanged is not read, nor stored to, for
// longer than it takes to notice, a tenth of a second.
func TestBallooned(t *testing.T) {
	m := xentest.New(xentest.Config{Kind: xentest.HVM, IRQEvery: -1})
	hv := &ballooning{Hypervisor: m.Hypervisor()}
	drv, err := xen.OpenMonitor(hv, xentest.Frames(t, hv), xen.Config{})
	require.NoError(t, err)
	defer drv.Close()
	at := uint64(xentest.DataBase + 0x800)
	wait := func(d time.Duration) {
		ctx, cancel := context.WithTimeout(t.Context(), d)
		defer cancel()
		var s breakpoint.Stop
		for ctx.Err() == nil {
			if drv.Wait(ctx, &s) == nil {
				require.NoError(t, drv.Reinject(&s))
			}
		}
	}
	wait(10 * time.Millisecond)
	var b [1]byte
	_, err = drv.Read(0, at, b[:])
	require.NoError(t, err)
	hv.done.Store(true)
	m.Poke(at, []byte{b[0] + 1})
	was := b[0]
	for i := 0; i < 100 && b[0] == was; i++ { // a busy machine takes its time
		wait(150 * time.Millisecond)
		_, err = drv.Read(0, at, b[:])
		require.NoError(t, err)
	}
	assert.Equal(t, was+1, b[0])
	_, err = drv.Write(0, at, []byte{was + 2})
	require.NoError(t, err)
	assert.Equal(t, was+2, m.Peek(at, 1)[0])
}
