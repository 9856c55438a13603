package image

import (
	"bytes"
	"compress/zlib"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/paging"
)

// same requires that an image has these pieces of memory, and no more.
func same(t testing.TB, m *Image, pieces ...piece) {
	t.Helper()
	var want []Range
	var size uint64
	for _, p := range pieces {
		n := uint64(len(p.data))
		size += n
		want = append(want, Range{paging.Frame(p.addr >> 12), n >> 12})
		got := make([]byte, n)
		k, err := m.ReadPhys(p.addr, got)
		require.NoError(t, err)
		require.EqualValues(t, n, k)
		require.Equal(t, p.data, got)
		for i := uint64(0); i < n; i += 4096 {
			require.Equal(t, p.data[i:i+4096], get(t, m, (p.addr+i)>>12))
		}
	}
	assert.Equal(t, want, ranges(m))
	assert.Equal(t, size, m.Size())
}

// cutPages requires that pages are missing because the file ends, and the others right.
func cutPages(t testing.TB, m *Image, first uint64, good, missing uint64) {
	t.Helper()
	for i := range good {
		require.Equal(t, page(first+i), get(t, m, first+i))
	}
	for i := good; i < good+missing; i++ {
		_, _, err := m.Page(paging.Frame(first+i), false)
		require.ErrorIs(t, err, ErrTruncated, "frame %#x", first+i)
		require.ErrorIs(t, err, io.ErrUnexpectedEOF)
	}
	require.Len(t, m.Warnings(), 1)
	assert.Contains(t, m.Warnings()[0], "cut short")
}

func TestLiMETail(t *testing.T) {
	whole := limeBytes(piece{0x1000, pages(1, 2)}, piece{0x100000, pages(0x100, 4)})
	m := open(t, append(slices.Clone(whole), make([]byte, 512)...), nil)
	same(t, m, piece{0x1000, pages(1, 2)}, piece{0x100000, pages(0x100, 4)})
	assert.Empty(t, m.Warnings())

	m = open(t, append(slices.Clone(whole), "something else, longer than a header"...), nil)
	same(t, m, piece{0x1000, pages(1, 2)}, piece{0x100000, pages(0x100, 4)})
	require.Len(t, m.Warnings(), 1)
	assert.Contains(t, m.Warnings()[0], "left out, 0x24 bytes")

	m = open(t, whole[:len(whole)-5000], nil)
	cutPages(t, m, 0x100, 2, 2)
	assert.Contains(t, m.Warnings()[0], "0x2000 bytes of memory are missing, the first at 0x102000")
	_, err := m.ReadPhys(0x101000, make([]byte, 8192))
	require.ErrorIs(t, err, ErrTruncated)

	m = open(t, whole[:32+8192+20], nil) // in a header
	cutPages(t, m, 1, 2, 0)
}

func TestCoreCut(t *testing.T) {
	whole := core{machine: 62, loads: []load{{paddr: 0x1000, data: pages(1, 2)}, {paddr: 0x100000, data: pages(0x100, 4)}}}.bytes()
	m := open(t, whole[:len(whole)-4097], nil)
	cutPages(t, m, 0x100, 2, 2)
	require.Equal(t, page(1), get(t, m, 1))

	_, err := New(bytes.NewReader(whole[:0x200]), 0x200, nil)
	require.ErrorIs(t, err, ErrTruncated)
}

// TestKcore: segments without a physical address are left out.
func TestKcore(t *testing.T) {
	m := open(t, core{machine: 62, loads: []load{
		{paddr: 1<<64 - 1, data: page(7)}, {paddr: 0x100000, data: pages(0x100, 2)},
		{paddr: 1<<64 - 1, data: page(8), memsz: 1 << 30}, {paddr: 0x1000, data: pages(1, 3)},
	}}.bytes(), nil)
	same(t, m, piece{0x1000, pages(1, 3)}, piece{0x100000, pages(0x100, 2)})
	m = open(t, core{machine: 3, class32: true, loads: []load{{paddr: 1<<32 - 1, data: page(7)}, {paddr: 0x1000, data: pages(1, 3)}}}.bytes(), nil)
	same(t, m, piece{0x1000, pages(1, 3)})

	for _, none := range [][]load{
		{{paddr: 1<<64 - 1, data: page(7)}},
		{{data: page(1)}, {data: pages(2, 2)}, {data: page(3)}}, // before 4.19
	} {
		b := core{machine: 62, loads: none}.bytes()
		_, err := New(bytes.NewReader(b), int64(len(b)), nil)
		require.ErrorIs(t, err, ErrUnsupported)
		require.ErrorContains(t, err, "physical address")
	}
}

// avmlBytes writes AVML's compressed form.
func avmlBytes(t testing.TB, pieces ...piece) []byte {
	t.Helper()
	var b []byte
	for _, p := range pieces {
		b = append(b, "AVML"...)
		b = le.AppendUint32(b, 2)
		b = le.AppendUint64(b, p.addr)
		b = le.AppendUint64(b, p.addr+uint64(len(p.data))-1)
		b = le.AppendUint64(b, 0)
		var z bytes.Buffer
		w := s2.NewWriter(&z, s2.WriterSnappyCompat(), s2.WriterConcurrency(1))
		_, err := w.Write(p.data)
		require.NoError(t, err)
		require.NoError(t, w.Close())
		b = le.AppendUint64(append(b, z.Bytes()...), uint64(z.Len()))
	}
	return b
}

// mixed returns pages of which some compress, some don't, and some are zero.
func mixed(first, n uint64) []byte {
	b := pages(first, n)
	rng := rand.New(rand.NewPCG(first, n))
	for i := range n {
		p := b[i*4096:][:4096]
		switch i % 3 {
		case 0:
			clear(p)
		case 1:
			for j := 0; j < len(p); j += 8 {
				le.PutUint64(p[j:], rng.Uint64())
			}
		}
	}
	return b
}

func TestAVML(t *testing.T) {
	pieces := []piece{{0x1000, mixed(1, 3)}, {0x100000, mixed(0x100, 70)}, {0x146000, mixed(0x146, 33)}}
	whole := avmlBytes(t, pieces...)
	joined := []piece{pieces[0], {0x100000, slices.Concat(pieces[1].data, pieces[2].data)}}
	m := open(t, whole, nil)
	assert.Equal(t, "AVML", m.Format())
	assert.Empty(t, m.Warnings())
	same(t, m, joined...)
	same(t, open(t, append(slices.Clone(whole), make([]byte, 512)...), nil), joined...)

	cut := open(t, whole[:len(whole)-70000], nil)
	require.Len(t, cut.Warnings(), 1)
	assert.Contains(t, cut.Warnings()[0], "cut short")
	require.Equal(t, pieces[1].data[:4096], get(t, cut, 0x100))
	_, _, err := cut.Page(0x166, false)
	require.ErrorIs(t, err, ErrTruncated)

	// Memory that isn't what was saved is an error, never a value.
	at := bytes.Index(whole, pieces[0].data[4096:4096+16])
	require.Positive(t, at)
	bad := slices.Clone(whole)
	bad[at] ^= 1
	_, _, err = open(t, bad, nil).Page(2, false)
	require.ErrorIs(t, err, ErrFormat)
	assert.ErrorContains(t, err, "checksum")

	// What comes before the damage is read.
	bad = slices.Clone(whole)
	bad[len(avmlBytes(t, pieces[0]))+32+10] = 7 // the kind of a chunk
	m = open(t, bad, nil)
	require.Len(t, m.Warnings(), 2)
	assert.Contains(t, m.Warnings()[0], "chunk of kind 0x7")
	same(t, m, pieces[0])

	for name, edit := range map[string]func(b []byte) []byte{
		"kind":    func(b []byte) []byte { b[32+10] = 7; return b },
		"stream":  func(b []byte) []byte { b[34] = 7; return b },
		"version": func(b []byte) []byte { b[4] = 3; return b },
		"last":    func(b []byte) []byte { b[22] = 0xff; return b },
		"shorter": func(b []byte) []byte { b[17] = 0x2f; return b },
	} {
		b := edit(slices.Clone(whole))
		_, err := New(bytes.NewReader(b), int64(len(b)), nil)
		require.Error(t, err, name)
	}
}

// A kdumpFile is a file in kdump's form.
type kdumpFile struct {
	class32 bool
	pieces  []piece
	flags   uint32 // of compressed pages
	notes   []note
	info    string
	split   bool
}

func compress(t testing.TB, flags uint32, p []byte) []byte {
	t.Helper()
	switch flags {
	case kdumpZlib:
		var z bytes.Buffer
		w := zlib.NewWriter(&z)
		_, err := w.Write(p)
		require.NoError(t, err)
		require.NoError(t, w.Close())
		return z.Bytes()
	case kdumpSnappy:
		return s2.EncodeSnappy(nil, p)
	case kdumpZstd:
		w, err := zstd.NewWriter(nil)
		require.NoError(t, err)
		return w.EncodeAll(p, nil)
	case kdumpLZO:
		// A literal run, as LZO1X has it for what doesn't compress.
		n := len(p) - 3 - 15
		b := []byte{0}
		for ; n > 255; n -= 255 {
			b = append(b, 0)
		}
		return append(append(append(b, byte(n)), p...), 0x11, 0, 0)
	}
	return p
}

func (f kdumpFile) bytes(t testing.TB) []byte {
	t.Helper()
	top := uint64(0)
	frames := map[uint64][]byte{}
	for _, p := range f.pieces {
		for i := uint64(0); i < uint64(len(p.data)); i += 4096 {
			frames[(p.addr+i)>>12] = p.data[i : i+4096]
			top = max(top, (p.addr+i)>>12)
		}
	}
	block := func(b []byte) []byte { return append(b, make([]byte, -len(b)&4095)...) }
	bitmap := block(make([]byte, top/8+1))
	for n := range frames {
		bitmap[n/8] |= 1 << (n % 8)
	}
	sub := make([]byte, 104)
	notes := noteBytes(f.notes...)
	b := make([]byte, 4096)
	copy(b, "KDUMP   ")
	le.PutUint32(b[8:], 6)
	word, at := uint64(8), 424
	if f.class32 {
		word, at = 4, 412
	}
	const subAt = 4096
	infoAt := uint64(subAt + len(sub))
	put := func(off, v, size uint64) {
		if size == 8 {
			le.PutUint64(sub[off:], v)
		} else {
			le.PutUint32(sub[off:], uint32(v))
		}
	}
	split, at1, at2 := uint64(12), uint64(32), uint64(48)
	if f.class32 {
		split, at1, at2 = 8, 20, 32
	}
	if f.split {
		put(split, 1, 4)
	}
	put(at1, infoAt, 8)
	put(at1+8, uint64(len(f.info)), word)
	put(at2, infoAt+uint64(len(f.info)), 8)
	put(at2+8, uint64(len(notes)), word)
	sub = block(slices.Concat(sub, []byte(f.info), notes))
	le.PutUint32(b[at+4:], 4096)
	le.PutUint32(b[at+8:], uint32(len(sub)/4096))
	le.PutUint32(b[at+12:], uint32(2*len(bitmap)/4096))
	b = slices.Concat(b, sub, bitmap, bitmap)
	order := make([]uint64, 0, len(frames))
	for n := range frames {
		order = append(order, n)
	}
	slices.Sort(order)
	data := uint64(len(b)) + 24*uint64(len(order))
	var descs, contents []byte
	zero := uint64(0)
	for _, n := range order {
		p := frames[n]
		isZero := bytes.Equal(p, make([]byte, 4096))
		if isZero && zero != 0 { // they share one
			descs = append(descs, descs[zero-24:zero]...)
			continue
		}
		z, flags := compress(t, f.flags, p), f.flags
		if len(z) >= len(p) {
			z, flags = p, 0
		}
		descs = le.AppendUint64(descs, data+uint64(len(contents)))
		descs = le.AppendUint32(descs, uint32(len(z)))
		descs = le.AppendUint32(descs, flags)
		descs = le.AppendUint64(descs, 0)
		contents = append(contents, z...)
		if isZero {
			zero = uint64(len(descs))
		}
	}
	return slices.Concat(b, descs, contents)
}

// flattened writes makedumpfile's flattened form of a file, in pieces of a size. The
// first piece comes last again, as where a header is completed at the end.
func flattened(b []byte, size int) []byte {
	be := binary.BigEndian
	out := append(make([]byte, 0, 4096), "makedumpfile\x00\x00\x00\x00"...)
	out = be.AppendUint64(be.AppendUint64(out, 1), 1)
	out = append(out, make([]byte, 4096-len(out))...)
	put := func(at int, p []byte) {
		out = be.AppendUint64(be.AppendUint64(out, uint64(at)), uint64(len(p)))
		out = append(out, p...)
	}
	put(0, bytes.Repeat([]byte{0x55}, min(len(b), 1000)))
	for i := 0; i < len(b); i += size {
		put(i, b[i:min(len(b), i+size)])
	}
	end := ^uint64(0)
	return be.AppendUint64(be.AppendUint64(out, end), end)
}

func TestKdump(t *testing.T) {
	pieces := []piece{{0x1000, mixed(1, 3)}, {0x100000, mixed(0x100, 70)}, {0x400000000, mixed(0x400000, 40)}}
	state := qemuState{rip: 0xffffffff81000123, cs: 0x10, cr0: 0x80050033, cr3: 0x2a10003, cr4: 0x3506f0}
	f := kdumpFile{pieces: pieces, notes: []note{{"CORE", 1, prstatus64(1, 2, 3, 4)}, {"QEMU", 0, state.bytes()}}, info: "OSRELEASE=6.1.0\n"}
	for name, flags := range map[string]uint32{"plain": 0, "zlib": kdumpZlib, "LZO": kdumpLZO, "snappy": kdumpSnappy, "zstd": kdumpZstd} {
		t.Run(name, func(t *testing.T) {
			f := f
			f.flags = flags
			whole := f.bytes(t)
			for _, b := range [][]byte{whole, flattened(whole, 16384), flattened(whole, 1000)} {
				m := open(t, b, nil)
				assert.Equal(t, "kdump of QEMU", m.Format())
				assert.Equal(t, "OSRELEASE=6.1.0\n", string(m.VMCoreInfo()))
				require.Len(t, m.CPUs(), 1)
				assert.EqualValues(t, 0x2a10003, m.CPUs()[0].CR3)
				assert.Equal(t, 64, m.CPUs()[0].Bits)
				assert.Empty(t, m.Warnings())
				same(t, m, pieces...)
				requireAbsent(t, m, 0, 4, 0x146)
			}
		})
	}
	f.flags = kdumpZlib
	whole := f.bytes(t)
	for _, b := range [][]byte{whole[:len(whole)-20000], flattened(whole, 16384)[:len(whole)-20000]} {
		cut := open(t, b, nil)
		require.NotEmpty(t, cut.Warnings())
		assert.Contains(t, strings.Join(cut.Warnings(), "; "), "cut short")
		require.Equal(t, pieces[1].data[4096:8192], get(t, cut, 0x101))
		_, _, err := cut.Page(0x400000000>>12+37, false)
		require.ErrorIs(t, err, ErrTruncated)
	}

	f32 := kdumpFile{class32: true, pieces: pieces[:2], flags: kdumpZlib, notes: []note{{"CORE", 1, prstatus32(1, 2, 3, 4)}}, info: "OSRELEASE=6.1.0-686\n"}
	m := open(t, f32.bytes(t), nil)
	assert.Equal(t, "kdump", m.Format())
	assert.Equal(t, "OSRELEASE=6.1.0-686\n", string(m.VMCoreInfo()))
	same(t, m, pieces[:2]...)

	f.split = true
	b := f.bytes(t)
	_, err := New(bytes.NewReader(b), int64(len(b)), nil)
	require.ErrorIs(t, err, ErrUnsupported)
	require.ErrorContains(t, err, "--reassemble")
}

// TestKdumpLZO has a page as lzop packs it (busybox's, with matches of all kinds).
func TestKdumpLZO(t *testing.T) {
	var want []byte
	for i := 0; len(want) < 4096; i++ {
		want = fmt.Appendf(want, "line %d of a page\n", i*i%97)
	}
	want = want[:4096]
	packed, err := hex.DecodeString("00056c696e652030206f66206120706167650a6c696e6520312e4100342e4100392e420031362e460032352e4500332f8d00342f1d01362fa901382f" +
		"3502332e6101322fd20034372e8e0037322e44002f4100332fa501362f8d00393054032f3902373040052f1d01352fd500393074042f5903392f8502" +
		"34301c012fd500352f3d02382e2d04362f5903322f0505382fd500352fa901322fa103383088072f1103332ff501312f8d00382f7904362f4500342f" +
		"8502332f3d02312f8c002f1901392f4d05382f8102372f590337308c002f1d013730440030d4002f640130f4013084022f1003309c03302c0430bc04" +
		"304c0530dc05306c0630fd063630fc062f580330ac08303c0930cc09305c0a30ec0a2f880730050c392fe80a31240d2f1103342fd40030d40e30650f" +
		"312f100a308510332f640830a41130341230c41230a8012f4400306c1430fc142f340230141630a41630341730c41730541830e4182fa4082fd4052f" +
		"60062f84132f84002f0c012f940130200230b00230400330d00330600430f0042f7c053008063098062000000000000000003a081b110000")
	require.NoError(t, err)
	b := kdumpFile{pieces: []piece{{0x1000, page(1)}}}.bytes(t)
	desc := len(b) - 4096 - 24
	le.PutUint32(b[desc+8:], uint32(len(packed)))
	le.PutUint32(b[desc+12:], kdumpLZO)
	copy(b[len(b)-4096:], packed)
	same(t, open(t, b, nil), piece{0x1000, want})
}

// TestFlattenedCore: what is flattened may be an ELF core (makedumpfile -F -E).
func TestFlattenedCore(t *testing.T) {
	whole := core{machine: 62, loads: []load{{paddr: 0x1000, data: pages(1, 2)}, {paddr: 0x100000, data: pages(0x100, 40)}}}.bytes()
	same(t, open(t, flattened(whole, 5000), nil), piece{0x1000, pages(1, 2)}, piece{0x100000, pages(0x100, 40)})
	cut := flattened(whole, 5000)
	m := open(t, cut[:len(cut)-20000], nil)
	require.Equal(t, page(0x101), get(t, m, 0x101))
	_, _, err := m.Page(0x127, false)
	require.ErrorIs(t, err, ErrTruncated)
	assert.NotEmpty(t, m.Warnings())

	junk := flattened([]byte("neither of them"), 5)
	_, err = New(bytes.NewReader(junk), int64(len(junk)), nil)
	require.ErrorIs(t, err, ErrFormat)
}

// TestOverwrite compares with bytes that are written one after the other.
func TestOverwrite(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	for range 300 {
		model := make([]int, 64)
		for i := range model {
			model[i] = -1
		}
		var list []extent
		for off := 1; off < 2000; off += 100 {
			at := rng.IntN(60)
			n := 1 + rng.IntN(min(12, 64-at))
			list = append(list, extent{addr: uint64(at), off: uint64(off), size: uint64(n)})
			for i := range n {
				model[at+i] = off + i
			}
		}
		got := slices.Repeat([]int{-1}, 64)
		for _, e := range overwrite(list) {
			for i := range e.size {
				require.Equal(t, -1, got[e.addr+i], "two extents at one place")
				got[e.addr+i] = int(e.off + i)
			}
		}
		require.Equal(t, model, got)
	}
}

// vmss writes VMware's state.
func vmss(groups map[string][]byte) []byte {
	names := make([]string, 0, len(groups))
	for n := range groups {
		names = append(names, n)
	}
	slices.Sort(names)
	b := le.AppendUint32(nil, 0xbed2bed2)
	b = le.AppendUint32(b, 8)
	b = le.AppendUint32(b, uint32(len(names)))
	at := uint64(12 + 80*len(names))
	for _, n := range names {
		b = append(append(b, n...), make([]byte, 64-len(n))...)
		b = le.AppendUint64(le.AppendUint64(b, at), uint64(len(groups[n])))
		at += uint64(len(groups[n]))
	}
	for _, n := range names {
		b = append(b, groups[n]...)
	}
	return b
}

func vmwareTag(name string, value []byte, index ...uint32) []byte {
	b := le.AppendUint16(nil, uint16(len(name))<<8|uint16(len(index))<<6|uint16(len(value)))
	b = append(b, name...)
	for _, i := range index {
		b = le.AppendUint32(b, i)
	}
	return append(b, value...)
}

func vmwareBlockTag(name string, kind uint16, block []byte, pad int) []byte {
	b := le.AppendUint16(nil, uint16(len(name))<<8|kind)
	b = append(b, name...)
	b = le.AppendUint64(le.AppendUint64(b, uint64(len(block))), uint64(len(block)))
	b = le.AppendUint16(b, uint16(pad))
	return append(append(b, make([]byte, pad)...), block...)
}

func u32(v uint32) []byte { return le.AppendUint32(nil, v) }
func u64(v uint64) []byte { return le.AppendUint64(nil, v) }

func TestVMware(t *testing.T) {
	const holeEnd = 4 << 30
	memory := pages(0, 8)
	cpu := slices.Concat(
		vmwareTag("cpu:numVCPUs", u32(2)),
		vmwareTag("CR64", u64(0x80050033), 0, 0), vmwareTag("CR64", u64(0x1234), 0, 2), vmwareTag("CR64", u64(0x2a10003), 0, 3), vmwareTag("CR64", u64(0x3506f0), 0, 4),
		vmwareTag("rip", u64(0xffffffff81000123), 0), vmwareTag("rsp", u64(0xffffc90000001000), 0), vmwareTag("eflags", u32(0x246), 0),
		vmwareTag("IDTR", u32(0xfff), 0, 0), vmwareTag("IDTR", u32(0x1000), 0, 1), vmwareTag("IDTR", u32(0xfffffe00), 0, 2),
		vmwareTag("rip", u64(7), 1), []byte{0, 0})
	regions := slices.Concat(
		vmwareTag("regionsCount", u32(2)),
		vmwareTag("regionPageNum", u32(0), 0), vmwareTag("regionPPN", u32(0), 0), vmwareTag("regionSize", u32(5), 0),
		vmwareTag("regionPageNum", u32(5), 1), vmwareTag("regionPPN", u32(holeEnd>>12), 1), vmwareTag("regionSize", u32(3), 1))
	beside := vmss(map[string][]byte{"memory": append(slices.Clone(regions), 0, 0), "cpu": cpu, "Checkpoint": []byte("junk")})
	want := []piece{{0, memory[:5*4096]}, {holeEnd, memory[5*4096:]}}
	check := func(m *Image) {
		t.Helper()
		assert.Equal(t, "VMware", m.Format())
		same(t, m, want...)
		require.Len(t, m.CPUs(), 1)
		assert.Equal(t, CPU{
			Has: CR0 | CR2 | CR3 | CR4 | EFER | RIP | RSP | RFLAGS | IDTBase, CR0: 0x80050033, CR2: 0x1234, CR3: 0x2a10003, CR4: 0x3506f0, EFER: 0xd00, Bits: 64,
			RIP: 0xffffffff81000123, RSP: 0xffffc90000001000, RFLAGS: 0x246, IDTBase: 0xfffffe0000001000,
		}, m.CPUs()[0])
	}
	inside := vmss(map[string][]byte{"memory": slices.Concat(regions, vmwareBlockTag("Memory", 63, memory, 99), []byte{0, 0}), "cpu": cpu})
	check(open(t, inside, nil))

	dir := t.TempDir()
	write := func(name string, b []byte) string {
		path := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(path, b, 0o600))
		return path
	}
	openFile := func(path string) *Image {
		t.Helper()
		m, err := Open(path, nil)
		require.NoError(t, err)
		t.Cleanup(func() { assert.NoError(t, m.Close()) })
		return m
	}
	for _, ext := range []string{".vmss", ".vmsn"} {
		state, mem := write("guest"+ext[1:]+ext, beside), write("guest"+ext[1:]+".vmem", memory)
		check(openFile(state))
		check(openFile(mem))
		m, err := Open(mem, &Options{Raw: true})
		require.NoError(t, err)
		assert.Equal(t, "raw", m.Format())
		require.NoError(t, m.Close())
	}
	same(t, openFile(write("alone.vmem", memory)), piece{0, memory})

	for name, c := range map[string]struct {
		b   []byte
		is  error
		msg string
	}{
		"alone":      {beside, ErrUnsupported, ".vmem"},
		"head":       {append([]byte("\xd2\xbe\xd2\xbe"), make([]byte, 4096)...), ErrUnsupported, ".vmem"},
		"old":        {append([]byte("\xd0\xbe\xd0\xbe"), make([]byte, 4096)...), ErrUnsupported, "old VMware"},
		"compressed": {vmss(map[string][]byte{"memory": slices.Concat(vmwareBlockTag("Memory", 62, memory, 0), []byte{0, 0})}), ErrUnsupported, "compressed"},
		"tags":       {vmss(map[string][]byte{"memory": regions}), ErrTruncated, "tags"},
		"regions": {vmss(map[string][]byte{"memory": slices.Concat(vmwareTag("regionsCount", u32(1<<20)),
			vmwareBlockTag("Memory", 63, memory, 0), []byte{0, 0})}), ErrFormat, "regions"},
		"groups": {append([]byte("\xd2\xbe\xd2\xbe\x08\x00\x00\x00\xff\xff\xff\xff"), make([]byte, 4096)...), ErrFormat, "groups"},
	} {
		_, err := New(bytes.NewReader(c.b), int64(len(c.b)), nil)
		require.ErrorIs(t, err, c.is, name)
		require.ErrorContains(t, err, c.msg, name)
	}
}

func TestRawSkip(t *testing.T) {
	b := append(bytes.Repeat([]byte{7}, 512), pages(0, 8)...)
	m := open(t, b, nil)
	require.Len(t, m.Warnings(), 1)
	assert.Contains(t, m.Warnings()[0], "no multiple of a page")
	m = open(t, b, &Options{RawSkip: 512})
	assert.Empty(t, m.Warnings())
	same(t, m, piece{0, pages(0, 8)})
	m = open(t, b, &Options{RawSkip: 512, RawHole: HoleAt(5 << 12)})
	same(t, m, piece{0, pages(0, 5)}, piece{4 << 30, pages(5, 3)})
	m = open(t, pages(0, 5), &Options{RawHole: HoleAt(5 << 12)})
	same(t, m, piece{0, pages(0, 5)})
	_, err := New(bytes.NewReader(b), int64(len(b)), &Options{RawSkip: uint64(len(b))})
	require.Error(t, err)
}

// A sparse is a file of zeros.
type sparse struct{}

func (sparse) ReadAt(b []byte, _ int64) (int, error) { clear(b); return len(b), nil }

// TestNoHole: a flat image that needs a hole says so.
func TestNoHole(t *testing.T) {
	m, err := New(sparse{}, 4<<30, nil)
	require.NoError(t, err)
	_, _, err = m.Page(0x100c21, false)
	require.ErrorIs(t, err, ErrAbsent)
	assert.ErrorContains(t, err, "?hole=ADDRESS")
	m, err = New(sparse{}, 4<<30, &Options{RawHole: HoleQ35})
	require.NoError(t, err)
	get(t, m, 0x100c21)
	_, _, err = m.Page(0x180000, false)
	assert.NotContains(t, err.Error(), "hole")
}

// packedSeeds are files for fuzzing.
func packedSeeds(tb testing.TB) [][]byte {
	pieces := []piece{{0x1000, mixed(1, 3)}, {0x100000, mixed(0x100, 5)}}
	all := [][]byte{
		avmlBytes(tb, pieces...),
		vmss(map[string][]byte{"memory": slices.Concat(vmwareTag("regionsCount", u32(1)), vmwareTag("regionSize", u32(5), 0), vmwareBlockTag("Memory", 63, pages(0, 8), 99), []byte{0, 0})}),
	}
	for _, flags := range []uint32{0, kdumpZlib, kdumpLZO, kdumpSnappy, kdumpZstd} {
		b := kdumpFile{pieces: pieces, flags: flags, info: "OSRELEASE=1\n", notes: []note{{"CORE", 1, prstatus64(1, 2, 3, 4)}}}.bytes(tb)
		all = append(all, b, flattened(b, 3000))
	}
	return all
}

// TestDamaged changes bytes of files of all packed forms: whatever comes of it, opening and
// reading them ends, and without a panic.
func TestDamaged(t *testing.T) {
	rng := rand.New(rand.NewPCG(5, 6))
	all := packedSeeds(t)
	for range 3000 {
		b := slices.Clone(all[rng.IntN(len(all))])
		for range 1 + rng.IntN(3) {
			at := rng.IntN(len(b) - 8)
			if rng.IntN(2) == 0 {
				at = rng.IntN(600)
			}
			le.PutUint64(b[at:], []uint64{0, 1, ^uint64(0), 1 << 31, 1 << 40, 1<<52 - 1, rng.Uint64()}[rng.IntN(7)])
		}
		b = b[:len(b)-rng.IntN(2)*rng.IntN(len(b))]
		m, err := New(bytes.NewReader(b), int64(len(b)), nil)
		if err != nil {
			continue
		}
		n := 0
		for r := range m.Frames() {
			for i := range min(r.Count, 16) {
				if page, release, err := m.Page(r.First+paging.Frame(i), false); err == nil {
					require.Len(t, page, paging.PageSize)
					release()
				}
			}
			if n++; n == 16 {
				break
			}
		}
		require.NoError(t, m.Close())
	}
}
