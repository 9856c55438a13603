package vmprobes

import (
	"bytes"
	"errors"
	"fmt"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/xentest"
)

// TestUnregisterAgain has the hypervisor fail at each call of an Unregister, and from then
// on: as long as the byte is in the guest the probe says that it is armed, and a later
// Unregister takes it out.
func TestUnregisterAgain(t *testing.T) {
	onBoth(t, func(t *testing.T, m *xentest.Machine, s *Session) {
		before := m.Text()
		failed := 0
		for n := range 12 {
			p := &Probe{Symbol: entry}
			require.NoError(t, s.Register(p))
			require.NotEqual(t, before, m.Text())
			const calls = 400
			for i := range calls { // others may make some of them
				m.FailCall(1+n+i, fmt.Errorf("call %d: %w", n, errFailed))
			}
			err := s.Unregister(p)
			if err != nil {
				failed++
				require.ErrorIs(t, err, errFailed)
				there := !bytes.Equal(before, m.Text())
				if armed := p.Flags()&FlagArmed != 0; there {
					assert.True(t, armed, "call %d: its byte is in the guest", n)
				}
			}
			for try := 0; err != nil && try < calls; try++ {
				err = s.Unregister(p)
			}
			require.NoError(t, err)
			for good := 0; good < 2*calls; good++ { // none fails any more
				if _, err := m.Hypervisor().Info(); err != nil {
					good = 0
				}
			}
			assert.Zero(t, p.Flags()&FlagArmed)
			assert.True(t, bytes.Equal(before, m.Text()))
		}
		assert.NotZero(t, failed)
	})
}

var errFailed = errors.New("the hypervisor fails")
