package image

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
)

// Values of the ELF format: gABI, and the x86 supplements.
const (
	elfMagic = "\x7fELF"

	elfClass32 = 1
	elfClass64 = 2
	elfDataLSB = 1

	elfCore = 4 // e_type

	elf386   = 3 // e_machine
	elfX8664 = 62

	elfPNXNum = 0xffff // e_phnum: the number is sh_info of section 0

	elfLoad = 1 // p_type
	elfNote = 4
)

// Bounds of an ELF file. Xen writes nine sections, QEMU one segment for each
// block of RAM, or, with -p, for each mapping; makedumpfile one for each run of
// pages that it keeps.
const (
	maxSections = 1024
	maxSegments = 1 << 20
	maxNames    = 64 << 10 // bytes of section names
	maxNotes    = 16 << 20 // bytes of notes: 8192 CPUs with 2 KiB each
)

var le = binary.LittleEndian

// An elfFile is the part of an ELF header that matters here.
type elfFile struct {
	*Image
	class   byte
	machine uint16
	phoff   uint64
	shoff   uint64
	phnum   uint64
	shnum   uint64
	shstr   uint64 // section of the names
}

// A section is a section header.
type section struct {
	name      string
	off, size uint64
}

// A segment is a program header.
type segment struct {
	typ                       uint32
	off, paddr, filesz, memsz uint64
}

// elf reads an ELF core.
func (m *Image) elf() error {
	f, err := m.elfHeader()
	if err != nil {
		return err
	}
	sections, err := f.sections()
	if err != nil {
		return err
	}
	for _, s := range sections {
		if s.name == xenNoteSection {
			return f.xen(sections)
		}
	}
	return f.loads()
}

// elfHeader reads the header: 52 bytes, or 64 in the 64-bit class. Its own size,
// e_ehsize, isn't looked at: QEMU 7.2 says 8.
func (m *Image) elfHeader() (*elfFile, error) {
	h := make([]byte, 64)
	if m.length < 64 { // a 32-bit header would fit, but no memory after it
		return nil, fmt.Errorf("%w: ELF header", ErrTruncated)
	}
	if err := m.readAt(h, 0); err != nil {
		return nil, err
	}
	f := &elfFile{Image: m, class: h[4], machine: le.Uint16(h[18:])}
	if h[5] != elfDataLSB {
		return nil, formatErr("a big-endian ELF file: not of an x86 machine")
	}
	if typ := le.Uint16(h[16:]); typ != elfCore {
		return nil, fmt.Errorf("%w: an ELF file of type %d, not a core (4): a program or a kernel, not a memory image", ErrUnsupported, typ)
	}
	if f.machine != elf386 && f.machine != elfX8664 {
		return nil, fmt.Errorf("%w: a core of machine %d, not x86 (3 or 62)", ErrUnsupported, f.machine)
	}
	switch f.class {
	case elfClass32:
		f.phoff, f.shoff = uint64(le.Uint32(h[28:])), uint64(le.Uint32(h[32:]))
		h = h[42:]
	case elfClass64:
		f.phoff, f.shoff = le.Uint64(h[32:]), le.Uint64(h[40:])
		h = h[54:]
	default:
		return nil, formatErr("ELF class %d", f.class)
	}
	f.phnum, f.shnum, f.shstr = uint64(le.Uint16(h[2:])), uint64(le.Uint16(h[6:])), uint64(le.Uint16(h[8:]))
	if size := uint64(le.Uint16(h)); f.phnum > 0 && size != f.phentsize() {
		return nil, formatErr("program headers of %d bytes, not %d", size, f.phentsize())
	}
	if size := uint64(le.Uint16(h[4:])); f.shnum > 0 && size != f.shentsize() {
		return nil, formatErr("section headers of %d bytes, not %d", size, f.shentsize())
	}
	if f.phnum == elfPNXNum {
		// gABI: the real numbers are in section 0.
		b, err := f.table("section 0", f.shoff, 1, f.shentsize())
		if err != nil {
			return nil, err
		}
		if f.class == elfClass32 {
			f.phnum = uint64(le.Uint32(b[28:]))
		} else {
			f.phnum = uint64(le.Uint32(b[44:]))
		}
	}
	if f.phnum > maxSegments {
		return nil, formatErr("%d segments: more than %d", f.phnum, maxSegments)
	}
	if f.shnum > maxSections {
		return nil, formatErr("%d sections: more than %d", f.shnum, maxSections)
	}
	return f, nil
}

func (f *elfFile) phentsize() uint64 {
	if f.class == elfClass32 {
		return 32
	}
	return 56
}

func (f *elfFile) shentsize() uint64 {
	if f.class == elfClass32 {
		return 40
	}
	return 64
}

// table reads count entries, whose number is bounded.
func (f *elfFile) table(what string, off, count, size uint64) ([]byte, error) {
	if err := f.within(what, off, count*size); err != nil {
		return nil, err
	}
	b := make([]byte, count*size)
	if err := f.readAt(b, off); err != nil {
		return nil, err
	}
	return b, nil
}

func (f *elfFile) sections() ([]section, error) {
	b, err := f.table("section headers", f.shoff, f.shnum, f.shentsize())
	if err != nil {
		return nil, err
	}
	list := make([]section, f.shnum)
	names := make([]uint32, f.shnum)
	for i := range list {
		h := b[uint64(i)*f.shentsize():]
		names[i] = le.Uint32(h)
		if f.class == elfClass32 {
			list[i] = section{off: uint64(le.Uint32(h[16:])), size: uint64(le.Uint32(h[20:]))}
		} else {
			list[i] = section{off: le.Uint64(h[24:]), size: le.Uint64(h[32:])}
		}
	}
	if f.shstr >= f.shnum {
		return list, nil // without names
	}
	str := list[f.shstr]
	if str.size > maxNames {
		return nil, formatErr("%d bytes of section names: more than %d", str.size, maxNames)
	}
	text, err := f.table("section names", str.off, 1, str.size)
	if err != nil {
		return nil, err
	}
	for i, at := range names {
		if uint64(at) < str.size {
			name, _, _ := strings.Cut(string(text[at:min(str.size, uint64(at)+maxSectionName)]), "\x00")
			list[i].name = name
		}
	}
	return list, nil
}

// maxSectionName bounds how much of a name is read; .xen_shared_info has 16 bytes.
const maxSectionName = 32

// loads lays out a core whose segments have physical addresses.
func (f *elfFile) loads() error {
	f.format = "ELF core"
	b, err := f.table("program headers", f.phoff, f.phnum, f.phentsize())
	if err != nil {
		return err
	}
	var data, zero []extent
	var notes []byte
	without := 0
	for ; len(b) > 0; b = b[f.phentsize():] {
		s := f.segment(b)
		switch s.typ {
		case elfNote:
			if s.filesz > maxNotes-uint64(len(notes)) {
				return formatErr("more than %d bytes of notes", maxNotes)
			}
			note, err := f.table("notes", s.off, 1, s.filesz)
			if errors.Is(err, ErrTruncated) {
				f.warnf("%v: registers and crash dump information are left out", err)
				continue
			}
			if err != nil {
				return err
			}
			notes = append(notes, note...)
		case elfLoad:
			// In the layout of /proc/kcore the mappings of modules, vmalloc and the
			// like have no physical address (fs/proc/kcore.c, since 4.19).
			if s.paddr == f.noAddress() {
				without++
				continue
			}
			if s.filesz > 0 {
				data = append(data, extent{addr: s.paddr, off: s.off, size: s.filesz})
			}
			// Memory that a filter left out has no bytes in the file, and reads as
			// zero, as in crash(8).
			if s.memsz > s.filesz {
				zero = append(zero, extent{addr: s.paddr + s.filesz, size: s.memsz - s.filesz})
			}
		}
	}
	// Before, all of them were at 0. (Where QEMU writes several mappings of one piece of
	// memory, they have the same place in the file.)
	all0, differ := true, false
	for _, e := range data {
		all0 = all0 && e.addr == 0
		differ = differ || e.off != data[0].off
	}
	if all0 && differ {
		without, data = without+len(data), nil
	}
	if len(data) == 0 && without > 0 {
		return fmt.Errorf("%w: none of its %d segments has a physical address (a copy of /proc/kcore of a kernel before 4.19?): take the memory with AVML, LiME or dump-guest-memory", ErrUnsupported, without)
	}
	if err := f.layOut(data, zero); err != nil {
		return err
	}
	f.cpuNotes(notes)
	return nil
}

// noAddress is the physical address of a segment that has none.
func (f *elfFile) noAddress() uint64 {
	if f.class == elfClass32 {
		return 1<<32 - 1
	}
	return 1<<64 - 1
}

func (f *elfFile) segment(h []byte) segment {
	if f.class == elfClass32 {
		return segment{
			typ: le.Uint32(h), off: uint64(le.Uint32(h[4:])), paddr: uint64(le.Uint32(h[12:])),
			filesz: uint64(le.Uint32(h[16:])), memsz: uint64(le.Uint32(h[20:])),
		}
	}
	return segment{
		typ: le.Uint32(h), off: le.Uint64(h[8:]), paddr: le.Uint64(h[24:]),
		filesz: le.Uint64(h[32:]), memsz: le.Uint64(h[40:]),
	}
}

// eachNote calls do for the notes in b, until one is malformed. Name and
// descriptor are padded to 4 bytes, in the 64-bit class too.
func eachNote(b []byte, do func(name string, typ uint32, desc []byte)) {
	for len(b) >= 12 {
		namesz, descsz := uint64(le.Uint32(b)), uint64(le.Uint32(b[4:]))
		typ := le.Uint32(b[8:])
		b = b[12:]
		descAt := (namesz + 3) &^ 3
		if descAt > uint64(len(b)) || descsz > uint64(len(b))-descAt {
			return
		}
		name := strings.TrimRight(string(b[:min(namesz, maxSectionName)]), "\x00")
		do(name, typ, b[descAt:descAt+descsz])
		b = b[min((descAt+descsz+3)&^3, uint64(len(b))):]
	}
}

// cpuNotes takes the CPUs, and the vmcoreinfo, from the notes.
func (f *elfFile) cpuNotes(notes []byte) {
	const prstatus = 1 // NT_PRSTATUS
	var status, qemu []CPU
	eachNote(notes, func(name string, typ uint32, desc []byte) {
		switch {
		case name == "QEMU" && typ == 0:
			if c, ok := qemuCPU(desc, f.machine == elfX8664); ok && len(qemu) < maxCPUs {
				c.ID = len(qemu)
				qemu = append(qemu, c)
			}
		case name == "CORE" && typ == prstatus:
			if c, ok := prstatusCPU(desc); ok && len(status) < maxCPUs {
				c.ID = len(status)
				status = append(status, c)
			}
		case name == "VMCOREINFO" && f.vmcoreinfo == nil:
			f.vmcoreinfo = bytes.Clone(bytes.TrimRight(desc, "\x00"))
		}
	})
	f.cpus = status
	if len(qemu) > 0 {
		// QEMU writes both kinds of notes, and its own have all that the others have.
		f.format, f.kind, f.cpus = "QEMU core", HVM, qemu
	}
}
