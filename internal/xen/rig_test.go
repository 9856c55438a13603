package xen_test

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/xentest"
)

// running starts a guest, which is at rest, and stops it when the test is over. left
// closes the engine and checks that the guest is whole.
func running(t *testing.T, cfg xentest.Config) (m *xentest.Machine, left func(*breakpoint.Engine)) {
	t.Helper()
	m = xentest.New(cfg)
	before := m.Text()
	m.Start()
	t.Cleanup(m.Stop)
	require.NoError(t, m.Quiesce(t.Context()))
	return m, func(e *breakpoint.Engine) {
		t.Helper()
		require.NoError(t, e.Close())
		m.Release()
		xentest.Verify(t, m, before)
		assert.Zero(t, m.Pauses())
	}
}

// served lets the guest run and serves its hits until enough says so, five seconds at
// most, and then until the guest is at rest.
func served(t *testing.T, m *xentest.Machine, e *breakpoint.Engine, enough func() bool) {
	t.Helper()
	m.Release()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		_, err := e.Serve(ctx, true)
		done <- err
	}()
	for i := 0; i < 5000 && !enough(); i++ {
		time.Sleep(time.Millisecond)
	}
	atRest(t, m)
	cancel()
	require.ErrorIs(t, <-done, context.Canceled)
}

// atRest waits until the guest is.
func atRest(t *testing.T, m *xentest.Machine) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	assert.NoError(t, m.Quiesce(ctx), m.State())
}
