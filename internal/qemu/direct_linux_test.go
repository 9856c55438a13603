package qemu

import (
	"net"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// TestConnections: who waits to be served is counted like who is served; to connect
// beside either would have QEMU stop the VM later for nobody.
func TestConnections(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	assert.False(t, listening(path))
	l, err := net.Listen("unix", path)
	require.NoError(t, err)
	defer l.Close()
	assert.True(t, listening(path))
	assert.Zero(t, connections(path))
	first, err := net.Dial("unix", path)
	require.NoError(t, err)
	defer first.Close()
	assert.Equal(t, 1, connections(path), "it waits")
	c, err := l.Accept()
	require.NoError(t, err)
	assert.Equal(t, 1, connections(path), "it is served")
	second, err := net.Dial("unix", path)
	require.NoError(t, err)
	defer second.Close()
	assert.Equal(t, 2, connections(path))
	require.NoError(t, c.Close())
	assert.Equal(t, 1, connections(path))
	assert.Zero(t, connections(path+"x"))
}
