package paging_test

import (
	"encoding/binary"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/pagetest"
	"github.com/vmprobes/vmprobes/paging"
)

// backend is a Mapper whose pages hold their frame's number in each word, and
// something else once they are unmapped.
type backend struct {
	mu     sync.Mutex
	maps   map[paging.Frame]int
	live   int
	peak   int
	fail   error
	unmap  error
	during func() // called in Map
}

const unmapped = 0xdddddddddddddddd

func (b *backend) Map(f paging.Frame, _ bool) ([]byte, func() error, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.fail != nil {
		return nil, nil, b.fail
	}
	if b.maps == nil {
		b.maps = make(map[paging.Frame]int)
	}
	b.maps[f]++
	b.live++
	b.peak = max(b.peak, b.live)
	if b.during != nil {
		b.during()
	}
	p := make([]byte, paging.PageSize)
	fill(p, uint64(f))
	gone := false
	return p, func() error {
		b.mu.Lock()
		defer b.mu.Unlock()
		if gone {
			panic("unmapped twice")
		}
		gone = true
		b.live--
		fill(p, unmapped)
		return b.unmap
	}, nil
}

func fill(p []byte, v uint64) {
	for i := 0; i < len(p); i += 8 {
		binary.LittleEndian.PutUint64(p[i:], v)
	}
}

func word(p []byte) uint64 { return binary.LittleEndian.Uint64(p) }

// use reads a frame through the cache and releases it.
func use(t *testing.T, c *paging.Cache, f paging.Frame) {
	t.Helper()
	p, release, err := c.Page(f, false)
	require.NoError(t, err)
	require.EqualValues(t, f, word(p))
	release()
}

func TestCacheHits(t *testing.T) {
	b := &backend{}
	c := paging.NewCache(b, 4, 0)
	for range 3 {
		for f := range paging.Frame(4) {
			use(t, c, f)
		}
	}
	assert.Equal(t, paging.CacheStats{Maps: 4, Hits: 8, Pages: 4}, c.Stats())

	// A writable page is another one.
	_, release, err := c.Page(0, true)
	require.NoError(t, err)
	release()
	st := c.Stats()
	assert.EqualValues(t, 5, st.Maps)
	assert.Equal(t, 4, st.Pages)
	assert.Equal(t, 4, b.live)
	require.NoError(t, c.Close())
	assert.Zero(t, b.live)
}

// TestCacheKeepsUsed: frames that are used all the time stay, whatever else
// passes through.
func TestCacheKeepsUsed(t *testing.T) {
	b := &backend{}
	c := paging.NewCache(b, 8, 0)
	for i := range paging.Frame(1000) {
		for f := range paging.Frame(5) {
			use(t, c, f)
		}
		use(t, c, 100+i)
		require.LessOrEqual(t, b.live, 8)
	}
	for f := range paging.Frame(5) {
		assert.Equal(t, 1, b.maps[f], "frame %d", f)
	}
	assert.Equal(t, 9, b.peak, "a new page is mapped before an old one goes")
	require.NoError(t, c.Close())
	assert.Zero(t, b.live)
}

func TestCachePagesInUse(t *testing.T) {
	b := &backend{}
	c := paging.NewCache(b, 2, 0)
	p, release, err := c.Page(1, false)
	require.NoError(t, err)
	q, release2, err := c.Page(1, false)
	require.NoError(t, err)
	for f := range paging.Frame(10) {
		use(t, c, 100+f)
	}
	c.Invalidate()
	assert.Equal(t, 1, b.live, "the page in use")
	assert.Zero(t, c.Stats().Pages)
	release2()
	assert.EqualValues(t, 1, word(p))
	use(t, c, 1)
	assert.Equal(t, 2, b.maps[1], "others get a new mapping")
	release()
	assert.EqualValues(t, uint64(unmapped), word(q), "the last user gone")
	p, release, err = c.Page(1, true)
	require.NoError(t, err)
	require.NoError(t, c.Close())
	assert.EqualValues(t, 1, word(p))
	release()
	assert.Zero(t, b.live)
	_, _, err = c.Page(1, false)
	require.ErrorIs(t, err, paging.ErrClosed)
	_, err = paging.New(c, paging.Mode{Kind: paging.PAE}).ReadPhys(0, make([]byte, 1))
	require.ErrorIs(t, err, paging.ErrClosed)
	require.NoError(t, c.Close(), "again")
}

func TestCacheAge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &backend{}
		c := paging.NewCache(b, 8, time.Second)
		start := time.Now()
		for time.Since(start) < 10*time.Second {
			use(t, c, 1)
			time.Sleep(10 * time.Millisecond)
		}
		assert.InDelta(t, 10, b.maps[1], 1, "each second a new one")
		time.Sleep(2 * time.Second)
		synctest.Wait()
		assert.Zero(t, b.live, "an idle cache has nothing mapped")
		use(t, c, 1)
		assert.Equal(t, 1, b.live)
		require.NoError(t, c.Close())
		assert.Zero(t, b.live)
		n := b.maps[1]
		time.Sleep(5 * time.Second)
		assert.Equal(t, n, b.maps[1])
	})
}

// TestCacheWriteBriefly: a page is mapped writable for as long as it is used.
func TestCacheWriteBriefly(t *testing.T) {
	b := &backend{}
	c := paging.NewCache(b, 8, 0)
	_, release, err := c.Page(1, true)
	require.NoError(t, err)
	release()
	assert.Equal(t, 1, b.live, "kept until then")
	c.WriteBriefly()
	assert.Zero(t, b.live)
	for n := range 2 {
		page, release, err := c.Page(1, true)
		require.NoError(t, err)
		assert.EqualValues(t, 1, binary.NativeEndian.Uint64(page))
		assert.Equal(t, n+1, b.live)
		release()
		assert.Equal(t, n, b.live)
		require.NoError(t, c.WriteFrame(1, 0, []byte{1}))
		assert.Equal(t, n, b.live)
		_, release, err = c.Page(1, false)
		require.NoError(t, err)
		release()
		assert.Equal(t, 1, b.live, "for reading it is kept")
	}
	require.NoError(t, c.Close())
	assert.Zero(t, b.live)
	_, _, err = c.Page(1, true)
	assert.ErrorIs(t, err, paging.ErrClosed)
}

func TestCacheErrors(t *testing.T) {
	b := &backend{fail: errNoFrame}
	c := paging.NewCache(b, 0, 0)
	for range 2 {
		_, _, err := c.Page(1, false)
		require.ErrorIs(t, err, errNoFrame)
	}
	assert.Zero(t, c.Stats().Pages)
	b.fail = nil
	use(t, c, 1)
	use(t, c, 2)
	assert.Equal(t, 1, c.Stats().Pages, "the least size")
	b.unmap = errors.New("munmap")
	use(t, c, 3)
	require.ErrorIs(t, c.Close(), b.unmap)
	assert.Zero(t, b.live)
}

// TestCacheInvalidateWhileMapping: what was mapped before an Invalidate isn't
// kept after it.
func TestCacheInvalidateWhileMapping(t *testing.T) {
	b := &backend{}
	c := paging.NewCache(b, 8, 0)
	b.during = func() {
		b.during = nil
		c.Invalidate()
	}
	p, release, err := c.Page(1, false)
	require.NoError(t, err)
	assert.Zero(t, c.Stats().Pages)
	assert.EqualValues(t, 1, word(p))
	release()
	assert.Zero(t, b.live)
}

// TestCachePanic: a backend that panics leaves nothing locked.
func TestCachePanic(t *testing.T) {
	b := &backend{during: func() { panic("as if out of memory") }}
	c := paging.NewCache(b, 8, 0)
	m := paging.New(c, paging.Mode{Kind: paging.FourLevel})
	var p [8]byte
	assert.Panics(t, func() { _, _ = m.ReadPhys(paging.PageSize, p[:]) })
	b.during = nil
	done := make(chan error, 1)
	go func() {
		c.Invalidate()
		_, err := m.ReadPhys(paging.PageSize, p[:])
		done <- err
	}()
	select {
	case err := <-done:
		assert.NoError(t, err)
	case <-time.After(time.Minute):
		t.Error("locked")
	}
}

// TestCacheConcurrent reads while pages are evicted and invalidated all the time:
// no reader may ever see an unmapped one. Run it with -race.
func TestCacheConcurrent(t *testing.T) {
	b := &backend{}
	c := paging.NewCache(b, 16, 0)
	m := paging.New(c, paging.Mode{Kind: paging.FourLevel})
	var stop atomic.Bool
	var readers, sweeper sync.WaitGroup
	sweeper.Go(func() {
		for !stop.Load() {
			c.Invalidate()
			time.Sleep(100 * time.Microsecond)
		}
	})
	for i := range 4 {
		readers.Go(func() {
			for n := range 5000 {
				f := paging.Frame((n*7 + i) % 24)
				var got [8]byte
				if n%3 == 0 {
					p, release, err := c.Page(f, n%2 == 0)
					if err != nil {
						t.Error(err)
						return
					}
					copy(got[:], p)
					release()
				} else if _, err := m.ReadPhys(paging.PAddr(f<<12|0x10), got[:]); err != nil {
					t.Error(err)
					return
				}
				if v := word(got[:]); v != uint64(f) {
					t.Errorf("frame %d reads %#x", f, v)
					return
				}
			}
		})
	}
	readers.Wait()
	stop.Store(true)
	sweeper.Wait()
	st := c.Stats()
	assert.EqualValues(t, 20000, st.Hits+st.Maps, "each page is a hit or is mapped")
	require.NoError(t, c.Close())
	assert.Zero(t, b.live)
}

// TestLive: there is no TLB. A change of the guest's tables is seen at once.
func TestLive(t *testing.T) {
	const va = 0xffff888000100000
	g := newGuest(pagetest.FourLevel)
	c := paging.NewCache(g.ram, 16, 0)
	m := paging.New(c, g.mode())
	for i := range byte(10) {
		f := g.frame()
		g.ram[paging.Frame(f)][0] = i
		g.tables.Map(pagetest.Mapping{Virt: va, Phys: f << 12, Level: 1})
		var b [1]byte
		_, err := m.Read(g.root(), va, b[:])
		require.NoError(t, err)
		require.Equal(t, i, b[0])
	}
	pagetest.Put(g.tables.Entry(va, 4), 0)
	_, err := m.Read(g.root(), va, make([]byte, 1))
	require.ErrorIs(t, err, paging.ErrNotMapped)
}

func TestReadAllocs(t *testing.T) {
	const va = 0xffff888000100ff8
	g := newGuest(pagetest.FourLevel)
	g.tables.Map(pagetest.Mapping{Virt: va &^ 0xfff, Phys: g.frame() << 12, Level: 1})
	c := paging.NewCache(g.ram, 16, 0)
	m := paging.New(c, g.mode())
	assert.Zero(t, testing.AllocsPerRun(100, func() {
		var b [8]byte
		if _, err := m.Read(g.root(), va, b[:]); err != nil {
			t.Error(err)
		}
		if _, err := m.Translate(g.root(), va); err != nil {
			t.Error(err)
		}
	}))
}
