package paging_test

import (
	"bytes"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/pagetest"
	"github.com/vmprobes/vmprobes/paging"
)

const settled = pagetest.Writable | pagetest.Accessed | pagetest.Dirty

func TestReadWrite(t *testing.T) {
	for _, k := range allKinds {
		t.Run(kinds[k].String(), func(t *testing.T) {
			testReadWrite(t, k)
		})
	}
}

func testReadWrite(t *testing.T, k pagetest.Kind) {
	g := newGuest(k)
	va := uint64(0xffff888000100000)
	user := uint64(0x400000)
	if k.Bits() == 32 {
		va = 0xc0100000
	}
	var frames []uint64
	for i := range uint64(3) {
		f := g.frame()
		frames = append(frames, f)
		flags := uint64(settled)
		if i == 1 {
			flags = pagetest.Accessed
		}
		g.tables.Map(pagetest.Mapping{Virt: va + i<<12, Phys: f << 12, Level: 1, Flags: flags})
	}
	root, at := g.root(), paging.VAddr(va)
	m := paging.New(g.ram, g.mode())
	data := make([]byte, 2*paging.PageSize+100)
	r := rand.New(rand.NewPCG(3, 4))
	for i := range data {
		data[i] = byte(r.Uint32())
	}
	n, err := m.Write(root, at+50, data)
	require.NoError(t, err, "a debugger writes to read-only pages")
	assert.Equal(t, len(data), n)
	got := make([]byte, len(data))
	n, err = m.Read(root, at+50, got)
	require.NoError(t, err)
	assert.Equal(t, len(data), n)
	assert.Equal(t, data, got)
	assert.Equal(t, data[:paging.PageSize-50], g.ram[paging.Frame(frames[0])][50:])
	for _, size := range []int{1, 2, 4, 8, 16} { // aligned and not, and over the end of a page
		for off := paging.VAddr(4080); off < 4100; off++ {
			w := data[:size]
			_, err = m.Write(root, at+off, w)
			require.NoError(t, err)
			_, err = m.Read(root, at+off, got[:size])
			require.NoError(t, err)
			require.Equal(t, w, got[:size])
		}
	}

	n, err = m.Read(root, at+3*paging.PageSize-10, got[:20])
	require.ErrorIs(t, err, paging.ErrNotMapped)
	assert.Equal(t, 10, n, "what comes before the hole is read")
	var e *paging.Error
	require.ErrorAs(t, err, &e)
	assert.Equal(t, paging.Error{Op: "read", Addr: at + 3*paging.PageSize, Root: root, Level: 1, Err: paging.ErrNotMapped}, *e)

	_, err = m.Store(root, at+paging.PageSize, data[:8])
	require.ErrorIs(t, err, paging.ErrProtected, "the guest itself couldn't")
	n, err = m.Store(root, at+2*paging.PageSize, data[:8])
	require.NoError(t, err)
	assert.Equal(t, 8, n)
	n, err = m.Store(root, at+paging.PageSize-8, make([]byte, 16))
	require.ErrorIs(t, err, paging.ErrProtected)
	assert.Equal(t, 8, n)
	for _, flags := range []uint64{pagetest.Writable | pagetest.Accessed, pagetest.Writable | pagetest.Dirty} {
		g.tables.Map(pagetest.Mapping{Virt: va + 2<<12, Phys: frames[2] << 12, Level: 1, Flags: flags})
		_, err = m.Store(root, at+2*paging.PageSize, data[:8])
		require.ErrorIs(t, err, paging.ErrProtected, "a bit of the tables would have to be set")
	}
	g.tables.Map(pagetest.Mapping{Virt: user, Phys: frames[2] << 12, Level: 1, Flags: settled | pagetest.User})
	_, err = m.Store(root, paging.VAddr(user), data[:8])
	require.ErrorIs(t, err, paging.ErrProtected, "user memory")

	// The end of the address space is an end.
	last := uint64(1)<<k.Bits() - 1
	g.tables.Map(pagetest.Mapping{Virt: last &^ 0xfff, Phys: frames[0] << 12, Level: 1})
	g.tables.Map(pagetest.Mapping{Virt: 0, Phys: frames[1] << 12, Level: 1})
	n, err = m.Read(root, paging.VAddr(canonical(k, last)-3), got[:8])
	require.ErrorIs(t, err, paging.ErrNonCanonical)
	assert.Equal(t, 4, n)
	n, err = m.Write(root, paging.VAddr(canonical(k, last)-3), got[:8])
	require.ErrorIs(t, err, paging.ErrNonCanonical)
	assert.Equal(t, 4, n)
	n, err = m.Read(root, at, nil)
	require.NoError(t, err)
	assert.Zero(t, n)
	_, err = m.Read(0xbad000, at, got[:8])
	require.ErrorIs(t, err, paging.ErrNoFrame)

	// A page that is mapped, but isn't there.
	g.tables.Map(pagetest.Mapping{Virt: user, Phys: 0xbad << 12, Level: 1})
	_, err = m.Read(root, paging.VAddr(user), got[:8])
	require.ErrorIs(t, err, paging.ErrNoFrame)
	require.ErrorAs(t, err, &e)
	assert.Zero(t, e.Level, "the walk itself came to its end")
	_, err = m.Write(root, paging.VAddr(user), got[:8])
	require.ErrorIs(t, err, paging.ErrNoFrame)
}

func TestPhys(t *testing.T) {
	r := ram{5: make([]byte, paging.PageSize), 6: make([]byte, paging.PageSize)}
	m := paging.New(r, paging.Mode{Kind: paging.FourLevel})
	data := bytes.Repeat([]byte("0123456789abcde"), 300)
	n, err := m.WritePhys(5<<12+100, data)
	require.NoError(t, err)
	require.Equal(t, len(data), n)
	got := make([]byte, len(data))
	n, err = m.ReadPhys(5<<12+100, got)
	require.NoError(t, err)
	require.Equal(t, len(data), n)
	assert.Equal(t, data, got)
	n, err = m.ReadPhys(7<<12-5, got)
	require.ErrorIs(t, err, paging.ErrNoFrame)
	require.ErrorIs(t, err, errNoFrame)
	assert.Equal(t, 5, n)
	n, err = m.WritePhys(7<<12-5, got)
	require.ErrorIs(t, err, paging.ErrNoFrame)
	assert.Equal(t, 5, n)
	for _, pa := range []paging.PAddr{1 << 52, ^paging.PAddr(0), ^paging.PAddr(0) - 0xfff} {
		_, err = m.ReadPhys(pa, got)
		require.ErrorIs(t, err, paging.ErrNoFrame)
		assert.NotErrorIs(t, err, errNoFrame, "the backend isn't asked")
		_, err = m.WritePhys(pa, got)
		require.ErrorIs(t, err, paging.ErrNoFrame)
	}
}

// stub is a backend whose pages are copies.
type stub struct {
	ram
	writes int
	err    error
}

func (s *stub) Page(f paging.Frame, w bool) ([]byte, func(), error) {
	p, release, err := s.ram.Page(f, w)
	return bytes.Clone(p), release, err
}

func (s *stub) Map(f paging.Frame, w bool) ([]byte, func() error, error) {
	p, unmap, err := s.ram.Map(f, w)
	return bytes.Clone(p), unmap, err
}

func (s *stub) WriteFrame(f paging.Frame, off int, b []byte) error {
	s.writes++
	if s.err != nil {
		return s.err
	}
	copy(s.ram[f][off:], b)
	return nil
}

func TestFrameWriter(t *testing.T) {
	const va = 0xffff888000100000
	g := newGuest(pagetest.FourLevel)
	frames := []uint64{g.frame(), g.frame()}
	for i, f := range frames {
		g.tables.Map(pagetest.Mapping{Virt: va + uint64(i)<<12, Phys: f << 12, Level: 1, Flags: settled})
	}
	s := &stub{ram: g.ram}
	cache := paging.NewCache(s, 16, 0)
	for name, f := range map[string]paging.Frames{"direct": s, "cached": cache, "embedded": struct{ *paging.Cache }{cache}} {
		t.Run(name, func(t *testing.T) {
			m := paging.New(f, g.mode())
			got := make([]byte, 8)
			_, err := m.Read(g.root(), va+0xffc, got)
			require.NoError(t, err)
			s.writes, s.err = 0, nil
			for _, write := range []func([]byte) (int, error){
				func(b []byte) (int, error) { return m.Write(g.root(), va+0xffc, b) },
				func(b []byte) (int, error) { return m.Store(g.root(), va+0xffc, b) },
				func(b []byte) (int, error) { return m.WritePhys(paging.PAddr(frames[0]<<12+0xff8), b) },
			} {
				data := []byte(name + "12345678")[:8]
				data[0] += byte(s.writes)
				n, err := write(data)
				require.NoError(t, err)
				require.Equal(t, 8, n)
				if s.writes < 5 {
					_, err = m.Read(g.root(), va+0xffc, got)
				} else {
					_, err = m.ReadPhys(paging.PAddr(frames[0]<<12+0xff8), got)
				}
				require.NoError(t, err)
				require.Equal(t, data, got, "what was written is read")
			}
			require.Equal(t, 5, s.writes)
			s.err = errNoFrame
			n, err := m.Write(g.root(), va, got)
			require.ErrorIs(t, err, paging.ErrNoFrame)
			require.ErrorIs(t, err, errNoFrame)
			require.Zero(t, n)
		})
	}
	require.Error(t, cache.WriteFrame(paging.Frame(frames[0]), 4090, make([]byte, 7)))
	require.Error(t, cache.WriteFrame(paging.Frame(frames[0]), -1, nil))
	require.Error(t, cache.WriteFrame(paging.Frame(frames[0]), 4097, nil))
	require.NoError(t, cache.Close())
	require.ErrorIs(t, cache.WriteFrame(paging.Frame(frames[0]), 0, []byte{1}), paging.ErrClosed)
}

// short is a backend that gives too little.
type short struct{}

func (short) Page(paging.Frame, bool) ([]byte, func(), error) {
	return make([]byte, 100), func() {}, nil
}

func (short) Map(paging.Frame, bool) ([]byte, func() error, error) {
	return nil, func() error { return nil }, nil
}

func TestShortPages(t *testing.T) {
	for _, f := range []paging.Frames{short{}, paging.NewCache(short{}, 1, 0)} {
		m := paging.New(f, paging.Mode{Kind: paging.FourLevel})
		_, err := m.Translate(0, 0)
		require.ErrorIs(t, err, paging.ErrNoFrame)
		_, err = m.WritePhys(0, make([]byte, 1))
		require.ErrorIs(t, err, paging.ErrNoFrame)
	}
}
