package image

import (
	"bytes"
	"compress/zlib"
	"fmt"
	"io"
	"math/bits"
	"sort"
	"sync"

	"github.com/anchore/go-lzo"
	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"

	"github.com/vmprobes/vmprobes/paging"
)

// kdump's compressed form: what makedumpfile writes unless it is told otherwise, and
// QEMU's dump-guest-memory -z, -l and -s (makedumpfile's implementation document and
// diskdump_mod.h; QEMU's include/sysemu/dump.h). In blocks:
//
//	0  struct disk_dump_header
//	1  struct kdump_sub_header, in sub_hdr_size blocks with the notes behind it
//	…  a bitmap of the frames that the machine has, and, as long, one of those
//	   that the file has
//	…  struct page_desc {i64 offset; u32 size, flags; u64 page_flags} of each of these
//	…  their contents
const (
	kdumpMagic = "KDUMP   "
	kdumpDesc  = 24

	kdumpZlib   = 1 << 0 // flags of a page_desc: how it is compressed
	kdumpLZO    = 1 << 1
	kdumpSnappy = 1 << 2
	kdumpZstd   = 1 << 5

	// maxKdumpBitmaps bounds both bitmaps, in bytes: of 16 TiB of memory.
	maxKdumpBitmaps = 1 << 30
)

// kdumped reads the pages that a file in kdump's form has, as if they followed each other.
type kdumped struct {
	m     *Image // what the file was before
	desc  uint64 // offset of the descriptions
	count uint64 // of pages
}

// kdump lays out a file in kdump's form.
func (m *Image) kdump() error {
	m.format = "kdump"
	h := make([]byte, 464)
	if err := m.within("kdump's header", 0, uint64(len(h))); err != nil {
		return err
	}
	if err := m.readAt(h, 0); err != nil {
		return err
	}
	// The header has a struct timeval, whose size and alignment are the kernel's:
	// that the size of a block makes sense tells which. Of machines with other pages
	// neither does.
	f := &elfFile{Image: m, class: elfClass64, machine: elfX8664}
	at := 424
	if le.Uint32(h[at+4:]) != paging.PageSize {
		f.class, f.machine, at = elfClass32, elf386, 412
	}
	version := le.Uint32(h[8:])
	block, subBlocks, bitmapBlocks := le.Uint32(h[at+4:]), uint64(le.Uint32(h[at+8:])), uint64(le.Uint32(h[at+12:]))
	if block != paging.PageSize {
		return fmt.Errorf("%w: kdump's form with pages of %d bytes: not of an x86 machine", ErrUnsupported, le.Uint32(h[428:]))
	}
	if subBlocks == 0 || bitmapBlocks == 0 || bitmapBlocks > maxKdumpBitmaps/paging.PageSize || subBlocks > maxNotes/paging.PageSize {
		return formatErr("kdump's header: %d blocks of sub-header, %d of bitmaps", subBlocks, bitmapBlocks)
	}
	if err := f.kdumpSub(version); err != nil {
		return err
	}
	bitmaps := (1 + subBlocks) * paging.PageSize
	half := bitmapBlocks / 2 * paging.PageSize
	if err := m.within("kdump's bitmaps", bitmaps, 2*half); err != nil {
		return err
	}
	data, cut, err := m.kdumpFrames(bitmaps+half, half)
	if err != nil {
		return err
	}
	file := *m
	k := &kdumped{m: &file, desc: bitmaps + bitmapBlocks*paging.PageSize}
	for _, e := range data {
		k.count += e.size >> pageShift
	}
	if cut {
		return formatErr("kdump's bitmap has more than %d runs of frames", maxExtents)
	}
	m.r, m.length = k, (k.count-k.missing())*paging.PageSize
	return m.layOut(data, nil)
}

// kdumpSub reads the sub-header: where notes and vmcoreinfo are, since version 3 and 4.
//
//	64 bits  32 bits
//	 0        0      unsigned long phys_base
//	 8        4      int dump_level
//	12        8      int split
//	16       12      unsigned long start_pfn, end_pfn
//	32       20      u64 offset_vmcoreinfo, unsigned long size_vmcoreinfo
//	48       32      u64 offset_note, unsigned long size_note
func (f *elfFile) kdumpSub(version uint32) error {
	b := make([]byte, 104)
	if err := f.within("kdump's sub-header", paging.PageSize, uint64(len(b))); err != nil {
		return err
	}
	if err := f.readAt(b, paging.PageSize); err != nil {
		return err
	}
	split, infoAt, noteAt := 12, 32, 48
	long := func(at int) uint64 { return le.Uint64(b[at:]) }
	if f.class == elfClass32 {
		split, infoAt, noteAt = 8, 20, 32
		long = func(at int) uint64 { return uint64(le.Uint32(b[at:])) }
	}
	if version >= 2 && le.Uint32(b[split:]) != 0 {
		return fmt.Errorf("%w: a part of a dump that was split: put the parts together with makedumpfile --reassemble", ErrUnsupported)
	}
	part := func(what string, since uint32, at int) []byte {
		off, size := le.Uint64(b[at:]), long(at+8)
		if version < since || size == 0 {
			return nil
		}
		if size > maxNotes {
			f.warnf("%s of %d bytes, more than %d: left out", what, size, maxNotes)
			return nil
		}
		all, err := f.table(what, off, 1, size)
		if err != nil {
			f.warnf("%v: left out", err)
			return nil
		}
		return all
	}
	info := part("crash dump information", 3, infoAt)
	f.cpuNotes(part("notes", 4, noteAt))
	if f.vmcoreinfo == nil && info != nil {
		f.vmcoreinfo = bytes.TrimRight(info, "\x00")
	}
	if f.format == "QEMU core" {
		f.format = "kdump of QEMU"
	}
	return nil
}

// kdumpFrames reads a bitmap, and returns runs of frames whose pages follow each other.
func (m *Image) kdumpFrames(off, size uint64) (data []extent, tooMany bool, err error) {
	page := uint64(0)
	var run extent
	end := func() {
		if run.size > 0 {
			data = append(data, run)
		}
		run.size = 0
	}
	b := make([]byte, 64<<10)
	for done := uint64(0); done < size; {
		b = b[:min(uint64(len(b)), size-done)]
		if err := m.readAt(b, off+done); err != nil {
			return nil, false, err
		}
		for i := 0; i+8 <= len(b); i += 8 {
			w := le.Uint64(b[i:])
			frame := (done + uint64(i)) * 8
			if w == 0 {
				end()
				continue
			}
			for bit := 0; bit < 64; {
				if w>>bit&1 == 0 {
					end()
					bit += bits.TrailingZeros64(w >> bit)
					continue
				}
				n := min(bits.TrailingZeros64(^(w >> bit)), 64-bit)
				if run.size == 0 {
					if len(data) == maxExtents {
						return data, true, nil
					}
					run = extent{addr: (frame + uint64(bit)) << pageShift, off: page << pageShift}
				}
				run.size += uint64(n) << pageShift
				page += uint64(n)
				bit += n
			}
		}
		done += uint64(len(b))
	}
	end()
	return data, false, nil
}

// missing returns how many pages at the end the file doesn't have. The pages follow each
// other in the order of the descriptions, but for those of zeros, which share one.
func (k *kdumped) missing() uint64 {
	have := uint64(0)
	if k.m.length > k.desc {
		have = min(k.count, (k.m.length-k.desc)/kdumpDesc)
	}
	return k.count - uint64(sort.Search(int(have), func(i int) bool {
		off, size, _, err := k.at(uint64(i))
		return err != nil || size == 0 || k.m.within("page", off, size) != nil
	}))
}

// at reads a description.
func (k *kdumped) at(page uint64) (off, size uint64, flags uint32, err error) {
	var d [kdumpDesc]byte
	if err := k.m.readAt(d[:], k.desc+page*kdumpDesc); err != nil {
		return 0, 0, 0, err
	}
	return le.Uint64(d[:]), uint64(le.Uint32(d[8:])), le.Uint32(d[12:]), nil
}

// ReadAt implements io.ReaderAt.
func (k *kdumped) ReadAt(b []byte, off int64) (n int, err error) {
	var page [paging.PageSize]byte
	for n < len(b) {
		at := uint64(off) + uint64(n)
		i, skip := at>>pageShift, at%paging.PageSize
		if i >= k.count {
			return n, io.EOF
		}
		into := page[:]
		if skip == 0 && len(b)-n >= paging.PageSize {
			into = b[n:][:paging.PageSize]
		}
		if err := k.page(i, into); err != nil {
			return n, err
		}
		n += copy(b[n:], into[skip:])
	}
	return n, nil
}

// page unpacks a page.
func (k *kdumped) page(i uint64, page []byte) error {
	off, size, flags, err := k.at(i)
	if err != nil {
		return err
	}
	if size == 0 || size > paging.PageSize {
		return formatErr("page %d of kdump's form: %d bytes of contents", i, size)
	}
	b := make([]byte, size)
	if err := k.m.readAt(b, off); err != nil {
		return err
	}
	n := 0
	switch flags & (kdumpZlib | kdumpLZO | kdumpSnappy | kdumpZstd) {
	case 0:
		n = copy(page, b)
	case kdumpZlib:
		var r io.ReadCloser
		if r, err = zlib.NewReader(bytes.NewReader(b)); err == nil {
			n, err = io.ReadFull(r, page)
		}
	case kdumpLZO:
		n, err = lzo.Decompress(b, page)
	case kdumpSnappy:
		if n, err = s2.DecodedLen(b); err == nil && n == len(page) {
			_, err = s2.Decode(page, b)
		}
	case kdumpZstd:
		n, err = unzstd(page, b)
	default:
		err = fmt.Errorf("flags %#x", flags)
	}
	if err != nil || n != len(page) {
		return formatErr("page %d of kdump's form, %d bytes at %#x: %d bytes of memory (%v)", i, size, off, n, err)
	}
	return nil
}

var zstdDecoder = sync.OnceValues(func() (*zstd.Decoder, error) {
	return zstd.NewReader(nil, zstd.WithDecoderConcurrency(0), zstd.WithDecoderMaxMemory(1<<20))
})

// unzstd unpacks at most len(page) bytes.
func unzstd(page, b []byte) (int, error) {
	d, err := zstdDecoder()
	if err != nil {
		return 0, err
	}
	out, err := d.DecodeAll(b, page[:0])
	if len(out) > len(page) {
		return len(out), nil
	}
	return copy(page, out), err
}
