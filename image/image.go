// Package image reads the memory of a guest that was saved in a file.
//
// [Open] recognises these formats by their content:
//
//   - the ELF core that `xl dump-core` writes, of PV, PVH and HVM guests
//     (Xen's docs/misc/dump-core-format.txt);
//   - the ELF core that QEMU's `dump-guest-memory` writes, which is what
//     `virsh dump --memory-only` gives, with the state of the CPUs;
//   - other ELF cores whose segments have physical addresses: the vmcore of kdump,
//     as it is or filtered by `makedumpfile -E`;
//   - LiME files (https://github.com/504ensicsLabs/LiME, doc/README.md), as
//     AVML writes them too unless it compresses;
//   - everything else as flat memory, byte n of the file being byte n of the
//     guest: dd, QEMU's pmemsave, or the file of a memory-backend-file.
//
// An [Image] gives page frames and registers, and nothing else: packages paging
// and linux do the rest.
//
// # Trust
//
// The whole file is taken to be hostile. Counts, offsets and sizes are checked
// against the length of the file and against fixed bounds before anything is
// allocated for them; what overlaps is resolved once, when the file is opened. The
// file may change or shrink while it is open: it is read with pread into buffers,
// never mapped, as an access beyond the end of a mapped file raises a signal (SIGBUS)
// that would end the whole process, and the breakpoints of other guests with it.
// Pages are cached, so this costs little.
package image

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"sort"
	"sync"

	"github.com/vmprobes/vmprobes/paging"
)

// Errors of an image.
var (
	// ErrFormat: the file contradicts itself, or the format that it says it has.
	ErrFormat = errors.New("malformed memory image")
	// ErrTruncated: the file ends before the memory that it says it has. It
	// matches io.ErrUnexpectedEOF.
	ErrTruncated = fmt.Errorf("memory image is cut short: %w", io.ErrUnexpectedEOF)
	// ErrUnsupported: the format is known, but can't be read as it is. The message
	// says what to do.
	ErrUnsupported = errors.New("memory image can't be read as it is")
	// ErrAbsent: the image doesn't have the frame.
	ErrAbsent = errors.New("frame is not in the image")
	// ErrReadOnly: a frame was asked for as writable.
	ErrReadOnly = errors.New("memory images are read-only")
)

// A Kind is how the guest was virtualized: it says what its page tables hold.
type Kind uint8

// Kinds.
const (
	Unknown Kind = iota // the format doesn't tell; guest frames, most likely
	PV                  // machine frames: Image.Page takes these
	HVM                 // guest frames: HVM, PVH, KVM
)

// String returns the kind's name: "pv", "hvm" or "unknown".
func (k Kind) String() string {
	switch k {
	case Unknown:
		return "unknown"
	case PV:
		return "pv"
	case HVM:
		return "hvm"
	}
	return fmt.Sprintf("Kind(%d)", uint8(k))
}

// A Hole is a range below 4 GiB in which a PC has devices instead of RAM. A flat file
// has only the RAM, one piece after the other.
type Hole struct {
	// Limit is the smallest size of RAM, in bytes, with which there is a hole. Less
	// RAM lies at 0 in one piece.
	Limit uint64
	// Start is the guest-physical address of the hole, at most Limit. RAM goes on
	// at 4 GiB.
	Start uint64
}

// The holes of QEMU's machines, unless max-ram-below-4g is set: hw/i386/pc_piix.c
// and pc_q35.c. (`info mtree` in QEMU's monitor shows that of a running guest.)
var (
	HolePC  = Hole{Limit: 0xe0000000, Start: 0xc0000000} // -M pc
	HoleQ35 = Hole{Limit: 0xb0000000, Start: 0x80000000} // -M q35
)

// Options configures Open. Nil and the zero value mean that the format is
// recognised, and that a flat file has no hole.
type Options struct {
	// Raw says that the file is flat memory, whatever its first bytes look like:
	// a guest can make its memory begin as it likes.
	Raw bool
	// RawHole is where a flat file's RAM has its hole. The zero value means none.
	RawHole Hole
}

// cachePages bounds the cache of pages: 16 MiB.
const cachePages = 4096

// An Image is an opened file. It is a paging.Frames. Its methods are safe for
// concurrent use.
type Image struct {
	r      io.ReaderAt
	length uint64    // of the file
	closer io.Closer // nil if r isn't ours
	cache  *paging.Cache

	format     string
	kind       Kind
	cpus       []CPU
	vmcoreinfo []byte
	data       []extent // what the file has
	zero       []extent // what it says is zero; .off means nothing
	p2m        []run    // of a PV guest
	pages      uint64   // offset in the file of what p2m's pages count from
}

// Open opens a memory image. The error wraps ErrFormat, ErrTruncated or
// ErrUnsupported, or is the *fs.PathError of opening the file.
func Open(path string, opts *Options) (*Image, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	// Nothing that may have no end, or that may block when it is opened.
	if m := fi.Mode(); !m.IsRegular() && m.Type() != os.ModeDevice {
		return nil, fmt.Errorf("%s: %w: neither a file nor a block device", path, ErrUnsupported)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	size, err := f.Seek(0, io.SeekEnd) // a device has no size that Stat tells
	var m *Image
	if err == nil {
		m, err = New(f, size, opts)
	}
	if err != nil {
		f.Close() //nolint:errcheck // only read from
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	m.closer = f
	return m, nil
}

// New is Open for an image that is not a file: the first size bytes of r. Close
// leaves r open.
func New(r io.ReaderAt, size int64, opts *Options) (*Image, error) {
	if opts == nil {
		opts = &Options{}
	}
	if size <= 0 {
		return nil, fmt.Errorf("%w: empty", ErrFormat)
	}
	m := &Image{r: r, length: uint64(size)}
	if err := m.parse(opts); err != nil {
		return nil, err
	}
	m.cache = paging.NewCache(reader{m}, cachePages, 0)
	return m, nil
}

func (m *Image) parse(opts *Options) error {
	if opts.Raw {
		return m.raw(opts.RawHole)
	}
	head := make([]byte, min(m.length, 64))
	if err := m.readAt(head, 0); err != nil {
		return err
	}
	switch {
	case bytes.HasPrefix(head, []byte(elfMagic)):
		return m.elf()
	case bytes.HasPrefix(head, []byte(limeMagic)):
		return m.lime()
	}
	for _, f := range foreign {
		if bytes.HasPrefix(head, []byte(f.magic)) {
			return fmt.Errorf("%w: it is %s", ErrUnsupported, f.cure)
		}
	}
	return m.raw(opts.RawHole)
}

// foreign lists formats of memory that can't be read page by page, or not by this
// package. None of them must be taken for flat memory.
var foreign = []struct{ magic, cure string }{
	{"\x1f\x8b", "compressed: unpack it with gunzip"},
	{"\xfd7zXZ\x00", "compressed: unpack it with xz -d"},
	{"BZh", "compressed: unpack it with bunzip2"},
	{"\x28\xb5\x2f\xfd", "compressed: unpack it with zstd -d"},
	{"\x04\x22\x4d\x18", "compressed: unpack it with lz4 -d"},
	{"\x89LZO\x00", "compressed: unpack it with lzop -d"},
	{"LVMA", "AVML's compressed form: convert it with avml-convert --format lime"},
	{"makedumpfile", "makedumpfile's flattened form: rearrange it with makedumpfile -R, and dump as ELF (makedumpfile -E; in QEMU dump-guest-memory without -z, -l, -s)"},
	{"KDUMP   ", "kdump's compressed form: dump as ELF (makedumpfile -E; in QEMU dump-guest-memory without -z, -l, -s)"},
	{"DISKDUMP", "diskdump's form: convert it with makedumpfile -E"},
	{"QEVM", "a migration stream of QEMU: use dump-guest-memory (virsh dump --memory-only)"},
	{"LibvirtQemudSave", "a saved state of libvirt: use virsh dump --memory-only"},
	{"LibvirtQemudPart", "an unfinished saved state of libvirt: use virsh dump --memory-only"},
	{"Xen saved domain", "a saved state of xl: restore it paused (xl restore -p) and use xl dump-core"},
	{"PAGEDUMP", "a crash dump of Windows"},
	{"PAGEDU64", "a crash dump of Windows"},
	{"QFI\xfb", "a disk image (qcow2), which holds no memory but in snapshots"},
}

// raw lays out flat memory.
func (m *Image) raw(hole Hole) error {
	const fourGiB = 1 << 32
	m.format = "raw"
	if hole.Start > hole.Limit || hole.Start > fourGiB || hole.Start%paging.PageSize != 0 {
		return fmt.Errorf("image: Options.RawHole: start %#x, limit %#x: it must start at a page, below 4 GiB and the limit", hole.Start, hole.Limit)
	}
	if hole.Limit == 0 || m.length < hole.Limit {
		return m.layOut([]extent{{addr: 0, off: 0, size: m.length}}, nil)
	}
	return m.layOut([]extent{
		{addr: 0, off: 0, size: hole.Start},
		{addr: fourGiB, off: hole.Start, size: m.length - hole.Start},
	}, nil)
}

// Format returns the name of the format: "Xen core", "QEMU core", "ELF core", "LiME"
// or "raw".
func (m *Image) Format() string { return m.format }

// Kind returns how the guest was virtualized.
func (m *Image) Kind() Kind { return m.kind }

// CPUs returns the states of CPUs that the file has, in its order. LiME and flat
// files have none.
func (m *Image) CPUs() []CPU { return append([]CPU(nil), m.cpus...) }

// VMCoreInfo returns the text that the Linux guest left for its crash dumps
// (Documentation/admin-guide/kdump/vmcoreinfo.rst), if the file has it as a note:
// vmcores do, and dumps of QEMU guests with a vmcoreinfo device. Nil otherwise; the
// guest's memory may still have it, at the start of a page.
func (m *Image) VMCoreInfo() []byte { return bytes.Clone(m.vmcoreinfo) }

// Size returns how many bytes of memory the file has.
func (m *Image) Size() uint64 {
	var n uint64
	for _, e := range m.data {
		n += e.size
	}
	return n
}

// A Range is a run of frames.
type Range struct {
	First paging.Frame
	Count uint64
}

// Frames yields the frames that the file has, in whole or in part, in order, as
// ranges that neither overlap nor touch. Memory that the file only declares to be
// zero (makedumpfile left it out) isn't among them, though Page returns it.
func (m *Image) Frames() iter.Seq[Range] {
	return func(yield func(Range) bool) {
		var r Range
		for _, e := range m.data {
			first, last := e.addr>>pageShift, (e.addr+e.size-1)>>pageShift
			if next := uint64(r.First) + r.Count; r.Count > 0 && first <= next {
				r.Count = last + 1 - uint64(r.First)
				continue
			}
			if r.Count > 0 && !yield(r) {
				return
			}
			r = Range{paging.Frame(first), last + 1 - first}
		}
		if r.Count > 0 {
			yield(r)
		}
	}
}

// Page implements paging.Frames. f is a guest frame, and for a PV guest a machine
// frame. If the file has only part of a page, as at the end of a range of LiME, the
// rest is zero. The error wraps ErrAbsent, ErrTruncated (the file has shrunk),
// ErrReadOnly, or paging.ErrClosed.
func (m *Image) Page(f paging.Frame, writable bool) (page []byte, release func(), err error) {
	if writable {
		return nil, nil, fmt.Errorf("image: frame %#x: %w", uint64(f), ErrReadOnly)
	}
	return m.cache.Page(f, false)
}

// ReadPhys fills b from the physical (PV: machine) address addr, past the cache, for
// scans of the whole memory. n < len(b) if and only if err is not nil: the first n
// bytes have then been read, and what follows is not in the image (ErrAbsent) or
// can't be read.
func (m *Image) ReadPhys(addr uint64, b []byte) (n int, err error) {
	for n < len(b) {
		at := addr + uint64(n)
		part := b[n:]
		if e, ok := find(m.data, at); ok {
			part = part[:min(uint64(len(part)), e.end()-at)]
			if err := m.readAt(part, e.off+at-e.addr); err != nil {
				return n, err
			}
		} else if e, ok := find(m.zero, at); ok {
			part = part[:min(uint64(len(part)), e.end()-at, after(m.data, at)-at)]
			clear(part)
		} else {
			return n, fmt.Errorf("image: address %#x: %w", at, ErrAbsent)
		}
		n += len(part)
	}
	return n, nil
}

// PhysToMachine returns the machine frame of a pseudo-physical frame of a PV guest.
// For other kinds it is the same frame. ok is false if the image doesn't have it.
func (m *Image) PhysToMachine(pfn uint64) (mfn paging.Frame, ok bool) {
	if m.kind != PV {
		return paging.Frame(pfn), m.has(paging.Frame(pfn))
	}
	i := sort.Search(len(m.p2m), func(i int) bool { return m.p2m[i].pfn > pfn }) - 1
	if i < 0 || pfn-m.p2m[i].pfn >= m.p2m[i].count {
		return 0, false
	}
	return paging.Frame(m.p2m[i].mfn + pfn - m.p2m[i].pfn), true
}

// MachineToPhys returns the pseudo-physical frame of a machine frame of a PV guest,
// or one of them if there are several. For other kinds it is the same frame. ok is
// false if the image doesn't have it.
func (m *Image) MachineToPhys(mfn paging.Frame) (pfn uint64, ok bool) {
	if m.kind != PV {
		return uint64(mfn), m.has(mfn)
	}
	if mfn > maxFrame {
		return 0, false
	}
	e, ok := find(m.data, uint64(mfn)<<pageShift)
	if !ok {
		return 0, false
	}
	page := (e.off + uint64(mfn)<<pageShift - e.addr - m.pages) >> pageShift
	i := sort.Search(len(m.p2m), func(i int) bool { return m.p2m[i].page > page }) - 1
	return m.p2m[i].pfn + page - m.p2m[i].page, true
}

// PhysPages returns the highest frame that the image has, plus one. For a PV guest
// frames are pseudo-physical here.
func (m *Image) PhysPages() uint64 {
	if m.kind == PV {
		last := m.p2m[len(m.p2m)-1]
		return last.pfn + last.count
	}
	last := m.data[len(m.data)-1].end()
	if n := len(m.zero); n > 0 {
		last = max(last, m.zero[n-1].end())
	}
	return (last + paging.PageSize - 1) >> pageShift
}

// has reports whether the image has any part of a frame.
func (m *Image) has(f paging.Frame) bool {
	if f > maxFrame {
		return false
	}
	addr := uint64(f) << pageShift
	return overlaps(m.data, addr, addr+paging.PageSize) || overlaps(m.zero, addr, addr+paging.PageSize)
}

// Close closes the file. Pages in use stay valid until they are released.
func (m *Image) Close() error {
	err := m.cache.Close()
	if m.closer == nil {
		return err
	}
	return errors.Join(err, m.closer.Close())
}

// readAt fills b from the file.
func (m *Image) readAt(b []byte, off uint64) error {
	if off > m.length || uint64(len(b)) > m.length-off {
		return fmt.Errorf("%w: at %#x of %#x bytes", ErrTruncated, off, m.length)
	}
	n, err := m.r.ReadAt(b, int64(off))
	if n == len(b) {
		return nil
	}
	if err == io.EOF {
		return fmt.Errorf("%w: it has shrunk to less than %#x bytes", ErrTruncated, off+uint64(n)+1)
	}
	return fmt.Errorf("image: at %#x: %w", off, err)
}

// reader is the paging.Mapper below the cache.
type reader struct{ m *Image }

var buffers = sync.Pool{New: func() any { return new([paging.PageSize]byte) }}

// Map implements paging.Mapper by reading the page.
func (r reader) Map(f paging.Frame, _ bool) (page []byte, unmap func() error, err error) {
	if f > maxFrame || !r.m.has(f) {
		return nil, nil, fmt.Errorf("image: frame %#x: %w", uint64(f), ErrAbsent)
	}
	buf := buffers.Get().(*[paging.PageSize]byte)
	unmap = func() error {
		buffers.Put(buf)
		return nil
	}
	if err := r.m.fill(buf[:], uint64(f)<<pageShift); err != nil {
		unmap() //nolint:errcheck // always nil
		return nil, nil, fmt.Errorf("frame %#x: %w", uint64(f), err)
	}
	return buf[:], unmap, nil
}

// fill reads the page at addr; parts that the image doesn't have are zero.
func (m *Image) fill(page []byte, addr uint64) error {
	end := addr + uint64(len(page))
	if e, ok := find(m.data, addr); ok && e.end() >= end {
		return m.readAt(page, e.off+addr-e.addr)
	}
	clear(page)
	for i := search(m.data, addr); i < len(m.data) && m.data[i].addr < end; i++ {
		e := m.data[i]
		from, to := max(e.addr, addr), min(e.end(), end)
		if err := m.readAt(page[from-addr:to-addr], e.off+from-e.addr); err != nil {
			return err
		}
	}
	return nil
}

const (
	pageShift = 12

	// maxPhys bounds physical addresses: MAXPHYADDR is at most 52 (Intel SDM
	// vol. 3, 4.1.4).
	maxPhys  = 1 << 52
	maxFrame = maxPhys>>pageShift - 1
)

// formatErr is an ErrFormat that says where.
func formatErr(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrFormat, fmt.Sprintf(format, args...))
}
