package xen_test

import (
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/xen"
	"github.com/vmprobes/vmprobes/internal/xentest"
)

// typing counts the frames of a guest that are mapped writable.
type typing struct {
	xen.Hypervisor
	writable atomic.Int64
}

type typed struct {
	xen.Mapping
	of *typing
}

func (h *typing) MapFrames(writable bool, frames ...uint64) (xen.Mapping, error) {
	m, err := h.Hypervisor.MapFrames(writable, frames...)
	if err != nil || !writable {
		return m, err
	}
	h.writable.Add(1)
	return &typed{m, h}, nil
}

func (m *typed) Unmap() error {
	m.of.writable.Add(-1)
	return m.Mapping.Unmap()
}

// TestNothingStaysWritable: of a frame that is mapped writable a PV guest can't make
// a page table, and its kernel goes on as if it could.
func TestNothingStaysWritable(t *testing.T) {
	m := xentest.New(xentest.Config{Kind: xentest.PV, GDBSX: true, IRQEvery: -1})
	hv := &typing{Hypervisor: m.Hypervisor()}
	d, err := xen.OpenDebugger(hv, xentest.Frames(t, hv), xen.Config{})
	require.NoError(t, err)
	at := uint64(xentest.DataBase + 0x800)
	_, err = d.Write(0, at, []byte{1, 2})
	require.NoError(t, err)
	assert.Zero(t, hv.writable.Load(), "frames that are mapped writable after a write")
	require.NoError(t, d.Store(0, at, []byte{3, 4}))
	assert.Zero(t, hv.writable.Load(), "frames that are mapped writable after a store")
	assert.Equal(t, []byte{3, 4}, m.Peek(at, 2))
	require.NoError(t, d.Close())
}
