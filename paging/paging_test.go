package paging

import (
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// ram is guest memory in a map; frames that aren't in it don't exist.
type ram map[Frame][]byte

var errNoFrame = errors.New("no such frame")

func (r ram) Page(f Frame, _ bool) ([]byte, func(), error) {
	if p, ok := r[f]; ok {
		return p, func() {}, nil
	}
	return nil, nil, errNoFrame
}

// builder makes real page tables in ram: the walker must invert them.
type builder struct {
	ram    ram
	next   Frame
	root   Frame
	levels int
}

func newBuilder(levels int) *builder {
	b := &builder{ram: ram{}, next: 0x1000, levels: levels}
	b.root = b.frame()
	return b
}

func (b *builder) frame() Frame {
	b.next++
	b.ram[b.next] = make([]byte, PageSize)
	return b.next
}

// entry returns the entry for va at a level, making tables above it.
func (b *builder) entry(va VAddr, level int) []byte {
	table := b.root
	for l := b.levels; ; l-- {
		i := uint64(va) >> (12 + 9*(l-1)) & 0x1ff
		e := b.ram[table][i*8 : i*8+8]
		if l == level {
			return e
		}
		if v := binary.LittleEndian.Uint64(e); v == 0 {
			binary.LittleEndian.PutUint64(e, uint64(b.frame())<<12|pteP|pteRW|pteUS|pteA)
		}
		table = Frame(binary.LittleEndian.Uint64(e) & physMask >> 12)
	}
}

func (b *builder) mapPage(va VAddr, level int, phys, flags uint64) {
	if level > 1 {
		flags |= ptePS
	}
	binary.LittleEndian.PutUint64(b.entry(va, level), phys|pteP|flags)
}

func (b *builder) memory() *Memory {
	if b.levels == 5 {
		return New5Level(b.ram)
	}
	return New(b.ram)
}

func (b *builder) cr3() Root { return Root(uint64(b.root)<<12 | 1<<63 | 0x3) } // no-flush and a PCID

// TestTranslateInverts builds random mappings and walks them.
func TestTranslateInverts(t *testing.T) {
	for _, levels := range []int{4, 5} {
		r := rand.New(rand.NewPCG(1, uint64(levels)))
		b := newBuilder(levels)
		type mapping struct {
			va    VAddr
			level int
			phys  uint64
			flags uint64
		}
		var maps []mapping
		shift := 64 - (12 + 9*levels)
		for i := range 400 {
			level := 1 + r.IntN(3)
			size := uint64(1) << (12 + 9*(level-1))
			// Each in a 1 GiB of its own, so that none hides another.
			va := VAddr(int64((uint64(i)<<30|r.Uint64N(1<<30))<<shift)>>shift) &^ VAddr(size-1)
			if i%2 == 1 {
				va |= VAddr(^uint64(0) << (11 + 9*levels))
			}
			phys := r.Uint64N(1<<52) &^ (size - 1)
			flags := r.Uint64() & (pteRW | pteUS | pteA | pteD | pteNX)
			b.mapPage(va, level, phys, flags)
			maps = append(maps, mapping{va, level, phys, flags})
		}
		m := b.memory()
		for _, mp := range maps {
			size := uint64(1) << (12 + 9*(mp.level-1))
			off := r.Uint64N(size)
			got, err := m.Translate(b.cr3(), mp.va+VAddr(off))
			require.NoError(t, err, "%v level %d", mp.va, mp.level)
			assert.Equal(t, mp.phys+off, uint64(got.Frame)<<12|got.Offset)
			assert.Equal(t, size, got.Size)
			assert.Equal(t, mp.flags&pteRW != 0, got.Prot&Writable != 0)
			assert.Equal(t, mp.flags&pteUS != 0, got.Prot&User != 0)
			assert.Equal(t, mp.flags&pteA != 0, got.Prot&Accessed != 0)
			assert.Equal(t, mp.flags&pteD != 0, got.Prot&Dirty != 0)
			assert.Equal(t, mp.flags&pteNX != 0, got.Prot&NoExecute != 0)
		}
	}
}

func TestTranslateErrors(t *testing.T) {
	b := newBuilder(4)
	const va = VAddr(0xffffffff81000000)
	m := b.memory()
	_, err := m.Translate(b.cr3(), va)
	require.ErrorIs(t, err, ErrNotMapped)
	_, err = m.Translate(b.cr3(), 0x0000800000000000)
	require.ErrorIs(t, err, ErrNonCanonical)
	_, err = m.Translate(b.cr3(), 0x00007fffffffffff)
	require.ErrorIs(t, err, ErrNotMapped)

	b.mapPage(va, 2, 1<<13, 0) // bit 13 is reserved in a 2 MiB entry
	_, err = m.Translate(b.cr3(), va)
	require.ErrorIs(t, err, ErrBadTable)
	b.mapPage(va, 2, 4<<21|1<<12, 0) // bit 12 is PAT
	tr, err := m.Translate(b.cr3(), va+5)
	require.NoError(t, err)
	assert.EqualValues(t, 4<<9, tr.Frame)

	// A table that isn't the guest's, and one that leads to itself.
	binary.LittleEndian.PutUint64(b.entry(va, 3), 0xdead<<12|pteP)
	_, err = m.Translate(b.cr3(), va)
	require.ErrorIs(t, err, ErrBadTable)
	require.ErrorIs(t, err, errNoFrame)
	for i := range 512 {
		binary.LittleEndian.PutUint64(b.ram[b.root][i*8:], uint64(b.root)<<12|pteP)
	}
	tr, err = m.Translate(b.cr3(), va)
	require.NoError(t, err, "a self-mapping table ends like any other")
	assert.Equal(t, b.root, tr.Frame)
	binary.LittleEndian.PutUint64(b.ram[b.root][511*8:], pteP|ptePS)
	_, err = m.Translate(b.cr3(), va)
	require.ErrorIs(t, err, ErrBadTable, "there are no 512 GiB pages")

	var e *Error
	require.ErrorAs(t, err, &e)
	assert.Equal(t, 4, e.Level)
	assert.Equal(t, va, e.Addr)
}

func TestReadWrite(t *testing.T) {
	b := newBuilder(4)
	const va = VAddr(0xffff888000100000)
	var frames []Frame
	for i := range 3 {
		f := b.frame()
		frames = append(frames, f)
		flags := uint64(pteRW | pteA | pteD)
		if i == 1 {
			flags = pteA
		}
		b.mapPage(va+VAddr(i*PageSize), 1, uint64(f)<<12, flags)
	}
	m := b.memory()
	data := make([]byte, 2*PageSize+100)
	r := rand.New(rand.NewPCG(3, 4))
	for i := range data {
		data[i] = byte(r.Uint32())
	}
	n, err := m.Write(b.cr3(), va+50, data)
	require.NoError(t, err, "a debugger writes to read-only pages")
	assert.Equal(t, len(data), n)
	got := make([]byte, len(data))
	n, err = m.Read(b.cr3(), va+50, got)
	require.NoError(t, err)
	assert.Equal(t, len(data), n)
	assert.Equal(t, data, got)
	assert.Equal(t, data[:PageSize-50], b.ram[frames[0]][50:])

	n, err = m.Read(b.cr3(), va+3*PageSize-10, got[:20])
	require.ErrorIs(t, err, ErrNotMapped)
	assert.Equal(t, 10, n, "what comes before the hole is read")

	_, err = m.Store(b.cr3(), va+PageSize, data[:8])
	require.ErrorIs(t, err, ErrProtected, "the guest itself couldn't")
	n, err = m.Store(b.cr3(), va+2*PageSize, data[:8])
	require.NoError(t, err)
	assert.Equal(t, 8, n)
	b.mapPage(va+2*PageSize, 1, uint64(frames[2])<<12, pteRW|pteA)
	_, err = m.Store(b.cr3(), va+2*PageSize, data[:8])
	require.ErrorIs(t, err, ErrProtected, "the dirty bit would have to be set")
	b.mapPage(0x400000, 1, uint64(frames[2])<<12, pteRW|pteUS|pteA|pteD)
	_, err = m.Store(b.cr3(), 0x400000, data[:8])
	require.ErrorIs(t, err, ErrProtected, "user memory")

	_, err = m.Read(b.cr3(), ^VAddr(0)-3, got[:8])
	require.ErrorIs(t, err, ErrNonCanonical, "it wraps around")
	n, err = m.Read(b.cr3(), va, nil)
	require.NoError(t, err)
	assert.Zero(t, n)
}

// FuzzTranslate walks tables of arbitrary contents: it may fail, but not panic,
// loop, or leave the frames that exist.
func FuzzTranslate(f *testing.F) {
	f.Add([]byte{1, 0x10, 0, 0, 0, 0, 0, 0}, uint64(0xffffffff81000000), true)
	f.Fuzz(func(t *testing.T, table []byte, va uint64, five bool) {
		r := ram{}
		for i := range Frame(4) {
			p := make([]byte, PageSize)
			for j := range p {
				if len(table) > 0 {
					p[j] = table[(j+int(i)*7)%len(table)]
				}
			}
			r[i] = p
		}
		walks := 0
		m := New(counting{r, &walks})
		if five {
			m = New5Level(counting{r, &walks})
		}
		tr, err := m.Translate(0, VAddr(va))
		if walks > 5 {
			t.Fatalf("%d tables read", walks)
		}
		if err == nil && (tr.Offset >= PageSize || uint64(tr.Frame) >= 1<<40) {
			t.Fatalf("translation %+v", tr)
		}
		var b [16]byte
		if n, err := m.Read(0, VAddr(va), b[:]); err == nil && n != len(b) {
			t.Fatalf("read %d bytes without an error", n)
		}
	})
}

type counting struct {
	ram
	n *int
}

func (c counting) Page(f Frame, w bool) ([]byte, func(), error) {
	*c.n++
	return c.ram.Page(f, w)
}

func BenchmarkRead8(b *testing.B) {
	bl := newBuilder(4)
	bl.mapPage(0x1000, 1, uint64(bl.frame())<<12, pteRW|pteA|pteD)
	m := bl.memory()
	buf := make([]byte, 8)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := m.Read(bl.cr3(), 0x1000, buf); err != nil {
			b.Fatal(err)
		}
	}
}
