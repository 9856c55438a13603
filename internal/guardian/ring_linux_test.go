package guardian

import (
	"errors"
	"os"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// fakePage is a ring that is mapped until it is closed.
type fakePage struct{ over, closed bool }

func (p *fakePage) Over() bool   { return p.over }
func (p *fakePage) Close() error { p.closed = true; return nil }

// mapping has rings mapped by the test, and returns them by path.
func mapping(t *testing.T) map[string]*fakePage {
	t.Helper()
	pages := make(map[string]*fakePage)
	was := mapRing
	t.Cleanup(func() { mapRing = was })
	mapRing = func(path string) (page, error) {
		if path == "/none" {
			return nil, errors.New("no such\nguest")
		}
		pages[path] = new(fakePage)
		return pages[path], nil
	}
	return pages
}

// TestRings: a ring stays mapped as long as its guest has its owner, and no longer.
func TestRings(t *testing.T) {
	pages := mapping(t)
	var r rings
	assert.Nil(t, r.ticks())
	require.Error(t, r.add("/none"))
	require.NoError(t, r.add("/a"))
	require.NoError(t, r.add("/b"))
	require.NotNil(t, r.ticks())
	first := pages["/a"]
	require.NoError(t, r.add("/a"), "another session of the same guest")
	assert.True(t, first.closed)
	assert.False(t, pages["/a"].closed)
	pages["/b"].over = true
	r.sweep()
	assert.True(t, pages["/b"].closed)
	assert.False(t, pages["/a"].closed)
	pages["/a"].over = true
	r.sweep()
	assert.True(t, pages["/a"].closed)
	assert.Nil(t, r.ticks(), "there is nothing to be looked at")
	assert.Nil(t, r.of("/a"))
}

// TestRingAsked: a process asks its guardian, and is told what it can't do.
func TestRingAsked(t *testing.T) {
	pages := mapping(t)
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	require.NoError(t, err)
	ours, theirs := os.NewFile(uintptr(fds[0]), "guardian"), os.NewFile(uintptr(fds[1]), "guarded")
	mu.Lock()
	was, wasPID := conn, pid
	conn, pid = ours, 1
	mu.Unlock()
	defer func() {
		mu.Lock()
		defer mu.Unlock()
		conn, pid = was, wasPID
	}()
	var r rings
	done := make(chan struct{})
	go func() {
		defer close(done)
		serve(theirs, new(warden), &r)
	}()
	require.NoError(t, Ring("/a"))
	err = Ring("/none")
	require.ErrorContains(t, err, "no such; guest")
	require.ErrorContains(t, Watch("/a", time.Second), "couldn't be ended")
	require.NoError(t, Ring("/b"))
	require.NoError(t, ours.Close())
	<-done
	assert.Len(t, pages, 2)
	assert.Len(t, r.pages, 2, "they are needed now")
}
