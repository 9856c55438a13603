// Package kerneltext compares the text of a running Linux kernel with the kernel's own
// file, to find the breakpoints that a tool has left in it. What the kernel changes in its
// text by itself isn't taken for one.
package kerneltext

import (
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/vmprobes/vmprobes/internal/kimage"
	"github.com/vmprobes/vmprobes/sysmap"
)

// Errors of files.
var (
	// ErrNotKernel: a file isn't a kernel of x86-64 with its text.
	ErrNotKernel = errors.New("not a file of a Linux kernel for x86-64 with its code")
	// ErrOtherKernel: the file is of another kernel than the one that runs.
	ErrOtherKernel = errors.New("the file is of another kernel than the guest runs")
)

const (
	mapBase     = 0xffffffff80000000 // __START_KERNEL_map: below it are per-CPU variables
	maxImage    = 1 << 28            // bytes of segments; the largest kernel seen has 80 MB
	maxText     = 1 << 27            // bytes between _stext and _etext; Debian's have 16 MB
	maxSegments = 64
	maxNotes    = 1 << 16
)

// A File is the kernel's own file, at the addresses where it was linked.
type File struct {
	buildID  string
	segments []segment
	syms     *sysmap.Map
	text     span
	changes  func() []site // sites, once
}

type segment struct {
	addr uint64
	data []byte
}

// A span is addresses from start on, to below end.
type span struct{ start, end uint64 }

func (s span) has(addr uint64) bool { return addr >= s.start && addr < s.end }

// ReadFile reads a kernel's file: a vmlinux, with debug information or without, or a
// vmlinuz.
func ReadFile(path string) (_ *File, err error) {
	r, c, err := kimage.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	f, err := Read(r)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return f, nil
}

// Read is ReadFile of an ELF file.
func Read(r io.ReaderAt) (*File, error) {
	e, err := elf.NewFile(r)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNotKernel, err)
	}
	if e.Class != elf.ELFCLASS64 || e.Machine != elf.EM_X86_64 || e.ByteOrder != binary.LittleEndian {
		return nil, fmt.Errorf("%w: it is of %v, %v", ErrNotKernel, e.Machine, e.Class)
	}
	f := new(File)
	total := uint64(0)
	for _, p := range e.Progs {
		switch {
		case p.Type == elf.PT_NOTE && p.Filesz <= maxNotes && f.buildID == "":
			b, err := read(p)
			if err != nil {
				return nil, err
			}
			f.buildID = kimage.BuildID(b)
		case p.Type == elf.PT_LOAD && p.Vaddr >= mapBase:
			if total += p.Filesz; p.Filesz > maxImage || total > maxImage || len(f.segments) == maxSegments || p.Vaddr+p.Filesz < p.Vaddr {
				return nil, fmt.Errorf("%w: its segments have more than %d bytes", ErrNotKernel, maxImage)
			}
			b, err := read(p)
			if err != nil {
				return nil, err
			}
			f.segments = append(f.segments, segment{p.Vaddr, b})
		}
	}
	if f.buildID == "" {
		return nil, fmt.Errorf("%w: it has no build id", ErrNotKernel)
	}
	if f.syms, err = sysmap.FromELF(r); err != nil {
		return nil, fmt.Errorf("%w: its symbols: %w", ErrNotKernel, err)
	}
	if f.text, err = f.section("_stext", "_etext", maxText); err != nil {
		return nil, fmt.Errorf("%w: where its text is: %w", ErrNotKernel, err)
	}
	if b := f.at(f.text); b == nil || allZero(b) {
		return nil, fmt.Errorf("%w: it has no code (a file with debug information only?)", ErrNotKernel)
	}
	f.changes = sync.OnceValue(f.sites)
	return f, nil
}

// read reads a segment, without trusting that the file has so many bytes.
func read(p *elf.Prog) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(p.Open(), int64(p.Filesz)))
	if err == nil && uint64(len(b)) < p.Filesz {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return nil, fmt.Errorf("%w: segment at %#x: %w", ErrNotKernel, p.Vaddr, err)
	}
	return b, nil
}

func allZero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}

// BuildID returns the build id, in hexadecimal digits.
func (f *File) BuildID() string { return f.buildID }

// section returns the span between two symbols.
func (f *File) section(start, stop string, limit uint64) (span, error) {
	a, err := f.syms.Lookup(start)
	if err != nil {
		return span{}, err
	}
	b, err := f.syms.Lookup(stop)
	if err != nil {
		return span{}, err
	}
	if b.Addr < a.Addr || b.Addr-a.Addr > limit {
		return span{}, fmt.Errorf("%s is at %#x and %s at %#x", start, a.Addr, stop, b.Addr)
	}
	return span{a.Addr, b.Addr}, nil
}

// at returns the bytes of a span, or nil if not all of them are in one segment.
func (f *File) at(s span) []byte {
	for _, g := range f.segments {
		if n := uint64(len(g.data)); s.start >= g.addr && s.end >= s.start && s.end-g.addr <= n {
			return g.data[s.start-g.addr : s.end-g.addr]
		}
	}
	return nil
}
