package sysmap

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
)

const (
	maxImage    = 1 << 28 // bytes of a kernel's loaded segments, the largest seen are 80 MB
	maxSections = 1 << 28 // bytes of .symtab, and of .strtab
	maxSegments = 64
)

// FromELF reads the symbols of a vmlinux: its .symtab if it has one, else the
// kallsyms tables in the image itself (see FromImage). Only little-endian files
// are read.
func FromELF(r io.ReaderAt) (*Map, error) { return fromELF(r, maxWork) }

func fromELF(r io.ReaderAt, work int) (*Map, error) {
	f, err := elf.NewFile(r)
	if err != nil {
		return nil, formatErr("%v", err)
	}
	if f.ByteOrder != binary.LittleEndian {
		return nil, formatErr("ELF file is not little-endian")
	}
	if f.Type != elf.ET_EXEC && f.Type != elf.ET_DYN {
		return nil, formatErr("ELF file of type %v is not a kernel image", f.Type)
	}
	m, err := fromSymtab(f)
	if m != nil || err != nil {
		return m, err
	}
	if m := fromRodata(f, work); m != nil {
		return m, nil
	}
	segs, err := loadSegments(f)
	if err != nil {
		return nil, err
	}
	m, err = fromImage(segs, work)
	if err != nil && errors.Is(err, ErrFormat) {
		return nil, fmt.Errorf("ELF file without .symtab: %w", err)
	}
	return m, err
}

// fromRodata looks for the kallsyms tables in .rodata alone, where the kernel's
// build puts them: a tenth of the image. It returns nil if they, and the banner
// that proves their addresses, aren't there.
func fromRodata(f *elf.File, work int) *Map {
	sec := f.Section(".rodata")
	if sec == nil || sec.Type != elf.SHT_PROGBITS {
		return nil
	}
	data, err := sectionData(sec)
	if err != nil {
		return nil
	}
	segs := []Segment{{Addr: sec.Addr, Data: data}}
	for _, p := range f.Progs {
		if p.Type == elf.PT_LOAD && len(segs) <= maxSegments {
			segs = append(segs, Segment{Addr: p.Vaddr, Size: p.Memsz}) // the kernel's extent
		}
	}
	m, err := fromImage(segs, work)
	if err != nil || m.Banner() == "" {
		return nil
	}
	return m
}

// loadSegments reads the PT_LOAD segments.
func loadSegments(f *elf.File) ([]Segment, error) {
	var segs []Segment
	total := uint64(0)
	for _, p := range f.Progs {
		if p.Type != elf.PT_LOAD || p.Memsz == 0 {
			continue
		}
		if len(segs) == maxSegments {
			return nil, formatErr("ELF file has more than %d segments", maxSegments)
		}
		if total += p.Filesz; p.Filesz > maxImage || total > maxImage {
			return nil, formatErr("ELF segments have more than %d bytes", maxImage)
		}
		data, err := readAll(p.Open(), int(p.Filesz))
		if err != nil {
			return nil, fmt.Errorf("reading ELF segment at %#x: %w", p.Vaddr, err)
		}
		segs = append(segs, Segment{Addr: p.Vaddr, Data: data, Size: max(p.Memsz, p.Filesz)})
	}
	return segs, nil
}

// readAll reads n bytes, without trusting that there are so many.
func readAll(r io.Reader, n int) ([]byte, error) {
	var b bytes.Buffer
	b.Grow(min(n, 1<<20))
	if _, err := io.CopyN(&b, r, int64(n)); err != nil {
		if err == io.EOF {
			err = fmt.Errorf("%w: cut short", ErrFormat)
		}
		return nil, err
	}
	return b.Bytes(), nil
}

func sectionData(s *elf.Section) ([]byte, error) {
	if s.Flags&elf.SHF_COMPRESSED != 0 || s.Type == elf.SHT_NOBITS {
		return nil, formatErr("section %q has no plain data", s.Name)
	}
	if s.FileSize > maxSections {
		return nil, formatErr("section %q has %d bytes", s.Name, s.FileSize)
	}
	data, err := readAll(io.NewSectionReader(s, 0, int64(s.FileSize)), int(s.FileSize))
	if err != nil {
		return nil, fmt.Errorf("reading section %q: %w", s.Name, err)
	}
	return data, nil
}

// fromSymtab returns nil and no error if there are no symbols to speak of.
func fromSymtab(f *elf.File) (*Map, error) {
	sec := f.SectionByType(elf.SHT_SYMTAB)
	if sec == nil {
		return nil, nil
	}
	if sec.Link == 0 || int64(sec.Link) >= int64(len(f.Sections)) {
		return nil, formatErr(".symtab has no string table")
	}
	tab, err := sectionData(sec)
	if err != nil {
		return nil, err
	}
	str, err := sectionData(f.Sections[sec.Link])
	if err != nil {
		return nil, err
	}
	size := elf.Sym32Size
	if f.Class == elf.ELFCLASS64 {
		size = elf.Sym64Size
	}
	n := len(tab) / size
	b := newBuilder(min(n, 1<<18), min(len(str), 8<<20))
	var banner uint64
	for i := 1; i < n; i++ {
		e := tab[i*size:]
		name := cstring(str, binary.LittleEndian.Uint32(e))
		var info byte
		var shndx elf.SectionIndex
		var value uint64
		if f.Class == elf.ELFCLASS64 {
			info, shndx = e[4], elf.SectionIndex(binary.LittleEndian.Uint16(e[6:]))
			value = binary.LittleEndian.Uint64(e[8:])
		} else {
			value = uint64(binary.LittleEndian.Uint32(e[4:]))
			info, shndx = e[12], elf.SectionIndex(binary.LittleEndian.Uint16(e[14:]))
		}
		typ := letter(f, info, shndx)
		name, ok := quoted(name)
		if typ == 0 || !ok || !wanted(name) {
			continue
		}
		if msg := b.add(value, typ, name, nil); msg != "" {
			return nil, formatErr(".symtab entry %d: %s", i, msg)
		}
		if string(name) == "linux_banner" {
			banner = value
		}
	}
	if b.len() == 0 {
		return nil, nil
	}
	line := ""
	if segs, err := loadSegments(f); err == nil {
		line = findBanner(segs, banner)
	}
	return b.finish(line), nil
}

func cstring(str []byte, off uint32) []byte {
	if uint64(off) >= uint64(len(str)) {
		return nil
	}
	s := str[off:]
	s = s[:min(len(s), maxName+1)]
	if before, _, ok := bytes.Cut(s, []byte{0}); ok {
		return before
	}
	return nil
}

// wanted tells the kernel's symbols from the linker's and assembler's helpers,
// which scripts/mksysmap keeps out of System.map too.
func wanted(name []byte) bool {
	if len(name) == 0 {
		return false
	}
	s := string(name)
	for _, p := range []string{".L", "$", "__crc_", "__kstrtab_", "__kstrtabns_"} {
		if strings.HasPrefix(s, p) {
			return false
		}
	}
	return true
}

// letter returns what nm would print as the type of a symbol, or 0 for one that is
// not an address in the kernel.
func letter(f *elf.File, info byte, shndx elf.SectionIndex) byte {
	typ, bind := elf.ST_TYPE(info), elf.ST_BIND(info)
	if typ == elf.STT_FILE || typ == elf.STT_SECTION || typ == elf.STT_TLS {
		return 0
	}
	var l byte
	switch {
	case shndx == elf.SHN_ABS:
		l = 'A'
	case shndx == elf.SHN_UNDEF || int(shndx) >= len(f.Sections):
		return 0
	default:
		s := f.Sections[shndx]
		switch {
		case s.Flags&elf.SHF_ALLOC == 0:
			return 0
		case bind == elf.STB_WEAK && typ == elf.STT_OBJECT:
			return 'V'
		case bind == elf.STB_WEAK:
			return 'W'
		case s.Flags&elf.SHF_EXECINSTR != 0:
			l = 'T'
		case s.Type == elf.SHT_NOBITS:
			l = 'B'
		case s.Flags&elf.SHF_WRITE == 0:
			l = 'R'
		default:
			l = 'D'
		}
	}
	if bind == elf.STB_LOCAL {
		l |= 0x20
	}
	return l
}
