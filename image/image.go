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
//   - LiME files (https://github.com/504ensicsLabs/LiME, doc/README.md), and those of
//     AVML, compressed or not;
//   - kdump's compressed form, as makedumpfile writes it (-c, -l, -p, -z) and QEMU's
//     dump-guest-memory (-z, -l, -s), and makedumpfile's flattened form of it or of an
//     ELF core;
//   - VMware's .vmss and .vmsn, with the .vmem beside them (only [Open]) or in them;
//   - everything else as flat memory, byte n of the file being byte n of the
//     guest: dd, QEMU's pmemsave, or the file of a memory-backend-file.
//
// A file that is cut short is read as far as it goes: see [Image.Warnings].
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
	// ErrTruncated: the file ends before its tables do, or before the page that was
	// asked for. It matches io.ErrUnexpectedEOF.
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

// minHole is where the lowest hole of known machines begins, that of QEMU's q35.
const minHole = 2 << 30

// HoleAt returns the hole of a machine whose memory goes on at 4 GiB when there is more of
// it than start bytes: 3 GiB in VMware, Cloud Hypervisor and QEMU's microvm, for example,
// 0xd0000000 in Firecracker, 0xf0000000 in Xen.
func HoleAt(start uint64) Hole { return Hole{Limit: start, Start: start} }

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
	// RawSkip is how many bytes precede a flat file's memory, such as a header.
	RawSkip uint64
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
	cut        []extent // what the file should have, and ends before
	warnings   []string
	flat       bool // without a hole
}

// Open opens a memory image. The error wraps ErrFormat, ErrTruncated or
// ErrUnsupported, or is the *fs.PathError of opening the file.
//
// VMware saves a guest in two files, of which Open opens the other: a .vmss or .vmsn, and
// the .vmem of the same name.
func Open(path string, opts *Options) (*Image, error) {
	if opts == nil {
		opts = &Options{}
	}
	f, size, err := openFile(path)
	if err != nil {
		return nil, err
	}
	closer := closers{f}
	m, err := openAs(f, size, path, opts, &closer)
	if err != nil {
		closer.Close() //nolint:errcheck // only read from
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	m.closer = closer
	return m, nil
}

// openAs lays out a file, and adds what else it opens to closer.
func openAs(f io.ReaderAt, size int64, path string, opts *Options, closer *closers) (*Image, error) {
	m, err := newImage(f, size)
	if err != nil {
		return nil, err
	}
	ok, other, err := m.openVMware(path, opts)
	if other != nil {
		*closer = append(*closer, other)
	}
	if err == nil && !ok {
		err = m.parse(opts)
	}
	if err != nil {
		return nil, err
	}
	return m, nil
}

type closers []io.Closer

func (c closers) Close() error {
	var errs error
	for _, f := range c {
		errs = errors.Join(errs, f.Close())
	}
	return errs
}

// openFile opens a file or a block device, and returns its size.
func openFile(path string) (*os.File, int64, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return nil, 0, err
	}
	// Nothing that may have no end, or that may block when it is opened.
	if m := fi.Mode(); !m.IsRegular() && m.Type() != os.ModeDevice {
		return nil, 0, fmt.Errorf("%s: %w: neither a file nor a block device", path, ErrUnsupported)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, 0, err
	}
	size, err := f.Seek(0, io.SeekEnd) // a device has no size that Stat tells
	if err != nil {
		f.Close() //nolint:errcheck // only read from
		return nil, 0, fmt.Errorf("%s: %w", path, err)
	}
	return f, size, nil
}

// New is Open for an image that is not a file: the first size bytes of r. Close
// leaves r open.
func New(r io.ReaderAt, size int64, opts *Options) (*Image, error) {
	if opts == nil {
		opts = &Options{}
	}
	m, err := newImage(r, size)
	if err != nil {
		return nil, err
	}
	if err := m.parse(opts); err != nil {
		return nil, err
	}
	return m, nil
}

// newImage returns an image of what isn't known yet.
func newImage(r io.ReaderAt, size int64) (*Image, error) {
	if size <= 0 {
		return nil, fmt.Errorf("%w: empty", ErrFormat)
	}
	m := &Image{r: r, length: uint64(size)}
	m.cache = paging.NewCache(reader{m}, cachePages, 0)
	return m, nil
}

func (m *Image) parse(opts *Options) error {
	if opts.Raw {
		return m.raw(opts.RawHole, opts.RawSkip)
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
	case isVMware(head):
		return m.vmware(nil)
	case bytes.HasPrefix(head, []byte(avmlMagic)):
		return m.avml()
	case bytes.HasPrefix(head, []byte(flattenedMagic)):
		return m.flattened()
	case bytes.HasPrefix(head, []byte(kdumpMagic)):
		return m.kdump()
	}
	for _, f := range foreign {
		if bytes.HasPrefix(head, []byte(f.magic)) {
			return fmt.Errorf("%w: it is %s", ErrUnsupported, f.cure)
		}
	}
	return m.raw(opts.RawHole, opts.RawSkip)
}

// foreign lists formats of memory that can't be read page by page, or not by this
// package. None of them must be taken for flat memory.
var foreign = []struct{ magic, cure string }{
	{"\x1f\x8b", "compressed: unpack it with gunzip"},
	{"\xfd7zXZ\x00", "compressed: unpack it with xz -d"},
	{"BZh", "compressed: unpack it with bunzip2"},
	{"\x28\xb5\x2f\xfd", "compressed: unpack it with zstd -d"},
	{"\x04\x22\x4d\x18", "compressed: unpack it with lz4 -d"},
	{"\x02\x21\x4c\x18", "compressed, in lz4's legacy form: unpack it with lz4 -d"},
	{"\x89LZO\x00", "compressed: unpack it with lzop -d"},
	{"\xff\x06\x00\x00sNaPpY", "compressed: unpack it with snzip -d"},
	{"PK\x03\x04", "a zip archive: unpack it with unzip"},
	{"7z\xbc\xaf\x27\x1c", "an archive: unpack it with 7z x"},
	{"Rar!\x1a\x07", "an archive: unpack it with unrar x"},
	{"DISKDUMP", "diskdump's form: convert it with makedumpfile -E"},
	{"QEVM", "a migration stream of QEMU: use dump-guest-memory (virsh dump --memory-only)"},
	{"LibvirtQemudSave", "a saved state of libvirt: use virsh dump --memory-only"},
	{"LibvirtQemudPart", "an unfinished saved state of libvirt: use virsh dump --memory-only"},
	{"Xen saved domain", "a saved state of xl: restore it paused (xl restore -p) and use xl dump-core"},
	{"LibxlFmt", "a saved state of Xen: restore it paused (xl restore -p) and use xl dump-core"},
	{"libvirt-xml\n", "a saved state of libvirt's driver for Xen: restore it paused (virsh restore --paused) and use xl dump-core"},
	{"\x7fVirtualBox SavedState ", "a saved state of VirtualBox: restore it and use VBoxManage debugvm VM dumpvmcore --filename FILE"},
	{"PAGEDUMP", "a crash dump of Windows"},
	{"PAGEDU64", "a crash dump of Windows"},
	{"QFI\xfb", "a disk image (qcow2), which holds no memory but in snapshots"},
	{"KDMV", "a disk image (VMDK), which holds no memory"},
	{"# Disk DescriptorFile", "a disk image (VMDK), which holds no memory"},
	{"<<< Oracle VM VirtualBox Disk Image >>>", "a disk image (VDI), which holds no memory"},
	{"vhdxfile", "a disk image (VHDX), which holds no memory"},
	{"conectix", "a disk image (VHD), which holds no memory"},
}

// raw lays out flat memory, behind skip bytes of something else.
func (m *Image) raw(hole Hole, skip uint64) error {
	const fourGiB = 1 << 32
	m.format = "raw"
	if hole.Start > hole.Limit || hole.Start > fourGiB || hole.Start%paging.PageSize != 0 {
		return fmt.Errorf("image: Options.RawHole: start %#x, limit %#x: it must start at a page, below 4 GiB and the limit", hole.Start, hole.Limit)
	}
	if skip >= m.length {
		return fmt.Errorf("image: Options.RawSkip: %#x bytes of a file of %#x", skip, m.length)
	}
	size := m.length - skip
	if size%paging.PageSize != 0 {
		m.warnf("a flat file of %#x bytes, which is no multiple of a page: it is cut short, or something else is before or behind the memory", size)
	}
	if hole.Limit == 0 || size < hole.Limit || size == hole.Start {
		m.flat = hole.Limit == 0
		return m.layOut([]extent{{addr: 0, off: skip, size: size}}, nil)
	}
	return m.layOut([]extent{
		{addr: 0, off: skip, size: hole.Start},
		{addr: fourGiB, off: skip + hole.Start, size: size - hole.Start},
	}, nil)
}

// Format returns the name of the format: "Xen core", "QEMU core", "ELF core", "kdump",
// "kdump of QEMU", "LiME", "AVML", "VMware" or "raw".
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
			return n, fmt.Errorf("image: address %#x: %w", at, m.absent(paging.Frame(at>>pageShift)))
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

// absent returns why the image doesn't have a frame.
func (m *Image) absent(f paging.Frame) error {
	if f > maxFrame {
		return ErrAbsent
	}
	addr := uint64(f) << pageShift
	if overlaps(m.cut, addr, addr+paging.PageSize) {
		return fmt.Errorf("%w: %w", ErrAbsent, ErrTruncated)
	}
	if m.flat && m.length > minHole && addr >= minHole {
		return fmt.Errorf("%w, which is flat and was taken to be in one piece: a machine with so much memory has a hole below 4 GiB; say where (?hole=pc, ?hole=q35 or ?hole=ADDRESS in the name of the file)", ErrAbsent)
	}
	return ErrAbsent
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
		return nil, nil, fmt.Errorf("image: frame %#x: %w", uint64(f), r.m.absent(f))
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
