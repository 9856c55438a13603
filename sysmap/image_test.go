package sysmap

import (
	"bytes"
	"compress/gzip"
	"debug/elf"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

type sym struct {
	name  string
	info  byte
	shndx uint16
	value uint64
}

// testELF makes a vmlinux: one PT_LOAD, and a .symtab of syms unless that is nil.
// Section 1 is text, 2 data, 3 bss, 4 rodata, 5 not loaded.
func testELF(word int, seg Segment, syms []sym) []byte {
	var str, tab, b bytes.Buffer
	le := binary.LittleEndian
	put := func(w io.Writer, v any) {
		if err := binary.Write(w, le, v); err != nil {
			panic(err)
		}
	}
	str.WriteByte(0)
	for i, s := range append([]sym{{}}, syms...) {
		off := uint32(0)
		if i > 0 {
			off = uint32(str.Len())
			str.WriteString(s.name + "\x00")
		}
		if word == 8 {
			put(&tab, elf.Sym64{Name: off, Info: s.info, Shndx: s.shndx, Value: s.value})
		} else {
			put(&tab, elf.Sym32{Name: off, Info: s.info, Shndx: s.shndx, Value: uint32(s.value)})
		}
	}
	const hdr = 0x1000
	symOff := uint64(hdr + len(seg.Data))
	strOff := symOff + uint64(tab.Len())
	shOff := strOff + uint64(str.Len())
	type section struct {
		typ       elf.SectionType
		flags     elf.SectionFlag
		off, size uint64
		link      uint32
		ent       uint64
	}
	var secs []section
	if syms != nil {
		a := elf.SHF_ALLOC
		secs = []section{{}, {typ: elf.SHT_PROGBITS, flags: a | elf.SHF_EXECINSTR}, {typ: elf.SHT_PROGBITS, flags: a | elf.SHF_WRITE},
			{typ: elf.SHT_NOBITS, flags: a | elf.SHF_WRITE}, {typ: elf.SHT_PROGBITS, flags: a}, {typ: elf.SHT_PROGBITS},
			{typ: elf.SHT_SYMTAB, off: symOff, size: uint64(tab.Len()), link: 7, ent: 24},
			{typ: elf.SHT_STRTAB, off: strOff, size: uint64(str.Len())}}
	}
	if secs == nil {
		shOff = 0
	}
	ident := [16]byte{0x7f, 'E', 'L', 'F', 2, 1, 1}
	if word == 8 {
		put(&b, elf.Header64{Ident: ident, Type: 2, Machine: uint16(elf.EM_X86_64), Version: 1, Phoff: 64, Shoff: shOff,
			Ehsize: 64, Phentsize: 56, Phnum: 1, Shentsize: 64, Shnum: uint16(len(secs)), Shstrndx: uint16(max(0, len(secs)-1))})
		put(&b, elf.Prog64{Type: 1, Off: hdr, Vaddr: seg.Addr, Filesz: uint64(len(seg.Data)), Memsz: seg.size()})
	} else {
		ident[4] = 1
		put(&b, elf.Header32{Ident: ident, Type: 2, Machine: uint16(elf.EM_386), Version: 1, Phoff: 52, Shoff: uint32(shOff),
			Ehsize: 52, Phentsize: 32, Phnum: 1, Shentsize: 40, Shnum: uint16(len(secs)), Shstrndx: uint16(max(0, len(secs)-1))})
		put(&b, elf.Prog32{Type: 1, Off: hdr, Vaddr: uint32(seg.Addr), Filesz: uint32(len(seg.Data)), Memsz: uint32(seg.size())})
	}
	b.Write(make([]byte, hdr-b.Len()))
	b.Write(seg.Data)
	b.Write(tab.Bytes())
	b.Write(str.Bytes())
	for _, s := range secs {
		if word == 8 {
			put(&b, elf.Section64{Type: uint32(s.typ), Flags: uint64(s.flags), Off: s.off, Size: s.size, Link: s.link, Entsize: s.ent})
		} else {
			put(&b, elf.Section32{Type: uint32(s.typ), Flags: uint32(s.flags), Off: uint32(s.off), Size: uint32(s.size), Link: s.link, Entsize: 16})
		}
	}
	return b.Bytes()
}

func testSymtab(base uint64) []sym {
	fn, obj := elf.STT_FUNC, elf.STT_OBJECT
	info := func(b elf.SymBind, t elf.SymType) byte { return elf.ST_INFO(b, t) }
	return []sym{
		{"main.c", info(elf.STB_LOCAL, elf.STT_FILE), uint16(elf.SHN_ABS), 0},
		{"_text", info(elf.STB_GLOBAL, elf.STT_NOTYPE), 1, base},
		{"f", info(elf.STB_LOCAL, fn), 1, base + 0x10},
		{"weak", info(elf.STB_WEAK, fn), 1, base + 0x20},
		{"weakobj", info(elf.STB_WEAK, obj), 2, base + 0x30},
		{"linux_banner", info(elf.STB_GLOBAL, obj), 4, base + 0x2000},
		{"data", info(elf.STB_LOCAL, obj), 2, base + 0x3000},
		{"bss", info(elf.STB_GLOBAL, obj), 3, base + 0x4000},
		{"const", info(elf.STB_LOCAL, elf.STT_NOTYPE), uint16(elf.SHN_ABS), 42},
		{"undefined", info(elf.STB_GLOBAL, fn), 0, 0},
		{"notloaded", info(elf.STB_LOCAL, obj), 5, 5},
		{"badsection", info(elf.STB_LOCAL, obj), 77, 5},
		{".L1", info(elf.STB_LOCAL, obj), 1, base + 1},
		{"__crc_x", info(elf.STB_LOCAL, obj), 1, base + 1},
		{"bad\x1bname", info(elf.STB_LOCAL, obj), 1, base + 1},
		{"", info(elf.STB_LOCAL, obj), 1, base + 1},
	}
}

func TestFromELFSymtab(t *testing.T) {
	t.Parallel()
	for _, l := range []layout{layouts[13], layouts[14]} {
		seg, _ := testKernel(l, 1, 1000)
		m, err := FromELF(bytes.NewReader(testELF(l.word, seg, testSymtab(seg.Addr))))
		require.NoError(t, err)
		assert.Equal(t, []Symbol{
			{42, 'a', "const", ""},
			{seg.Addr, 'T', "_text", ""},
			{seg.Addr + 0x10, 't', "f", ""},
			{seg.Addr + 0x20, 'W', "weak", ""},
			{seg.Addr + 0x30, 'V', "weakobj", ""},
			{seg.Addr + 0x2000, 'R', "linux_banner", ""},
			{seg.Addr + 0x3000, 'd', "data", ""},
			{seg.Addr + 0x4000, 'B', "bss", ""},
		}, slices.Collect(m.All()))
		assert.Equal(t, testBanner, m.Banner())
	}
}

func TestFromELFStripped(t *testing.T) {
	t.Parallel()
	for _, l := range layouts {
		seg, syms := testKernel(l, 5, 1500)
		m, err := FromELF(bytes.NewReader(testELF(l.word, seg, nil)))
		require.NoError(t, err, l.name)
		require.Equal(t, syms, slices.Collect(m.All()), l.name)
		// A .symtab without anything in it is as good as none.
		m, err = FromELF(bytes.NewReader(testELF(l.word, seg, []sym{})))
		require.NoError(t, err, l.name)
		require.Equal(t, len(syms), m.Len(), l.name)
	}
}

func TestFromELFErrors(t *testing.T) {
	t.Parallel()
	seg, _ := testKernel(layouts[13], 1, 1000)
	good := testELF(8, seg, nil)
	symtab := testELF(8, seg, testSymtab(seg.Addr))
	patch := func(b []byte, off int, v ...byte) []byte {
		b = bytes.Clone(b)
		copy(b[off:], v)
		return b
	}
	for name, b := range map[string][]byte{
		"empty":        nil,
		"no ELF":       []byte("hello, this is no ELF file at all"),
		"big endian":   patch(good, 5, 2),
		"relocatable":  patch(good, 16, 1),
		"cut":          good[:len(good)/3],
		"symtab cut":   symtab[:len(symtab)-8*64],
		"huge segment": patch(good, 64+32, 0, 0, 0, 0, 0, 1),
		"long segment": patch(good, 64+32, 0, 0, 0, 0x0f),
		"no symbols":   testELF(8, Segment{Addr: seg.Addr, Data: make([]byte, 5000)}, nil),
	} {
		m, err := FromELF(bytes.NewReader(b))
		require.ErrorIs(t, err, ErrFormat, name)
		require.Nil(t, m, name)
	}
	_, err := FromELF(errReaderAt{})
	require.Error(t, err)
}

type errReaderAt struct{}

func (errReaderAt) ReadAt([]byte, int64) (int, error) { return 0, errors.New("disk on fire") }

// Run it with -fuzzminimizetime 1x: the seeds are large, and go test would spend its
// time on making them smaller.
func FuzzFromELF(f *testing.F) {
	for _, i := range []int{5, 13, 18} {
		seg, _ := testKernel(layouts[i], 1, 900)
		f.Add(testELF(layouts[i].word, seg, nil))
	}
	f.Add(testELF(8, Segment{Addr: 0xffffffff81000000, Data: make([]byte, 64)}, testSymtab(0xffffffff81000000)))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := fromELF(bytes.NewReader(b), fuzzWork)
		checkFuzzed(t, m, err)
	})
}

// testBzImage wraps a payload as arch/x86/boot does.
func testBzImage(payload []byte, version uint16) []byte {
	const sects, off = 7, 0x3b3
	b := make([]byte, (sects+1)*512+off)
	b[0x1f1] = sects
	b[0x1fe], b[0x1ff] = 0x55, 0xaa
	copy(b[0x202:], "HdrS")
	binary.LittleEndian.PutUint16(b[0x206:], version)
	if version >= 0x208 {
		binary.LittleEndian.PutUint32(b[0x248:], off)
		binary.LittleEndian.PutUint32(b[0x24c:], uint32(len(payload)))
	}
	b = append(b, payload...)
	return append(b, make([]byte, 999)...)
}

func packed(image []byte) []byte {
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	if _, err := z.Write(image); err != nil {
		panic(err)
	}
	if err := z.Close(); err != nil {
		panic(err)
	}
	return b.Bytes()
}

// What there is to unpack is tested in kimage.
func TestFromVMLinuz(t *testing.T) {
	t.Parallel()
	seg, syms := testKernel(layouts[15], 9, 3000)
	image := testELF(8, seg, nil)
	image = append(image, make([]byte, 1234)...) // relocations
	gz := packed(image)
	b := testBzImage(gz, 0x20f)
	m, err := FromVMLinuz(bytes.NewReader(b), int64(len(b)))
	require.NoError(t, err)
	require.Equal(t, syms, slices.Collect(m.All()))
	z, err := zstd.NewWriter(nil)
	require.NoError(t, err)
	for file, b := range map[string][]byte{
		"vmlinuz": b, "vmlinux": image, "vmlinux.gz": gz, "vmlinux.zst": z.EncodeAll(image, nil),
	} {
		p := filepath.Join(t.TempDir(), file)
		require.NoError(t, os.WriteFile(p, b, 0o600))
		m, err = ParseFile(p)
		require.NoError(t, err, file)
		require.Equal(t, len(syms), m.Len())
	}
}

func TestFromVMLinuzErrors(t *testing.T) {
	t.Parallel()
	for name, b := range map[string][]byte{
		"empty":    nil,
		"no image": make([]byte, 4096),
		"unknown":  testBzImage([]byte("some payload"), 0x20f),
		"LZO":      testBzImage([]byte("\x89LZO\x00\x0d\x0a\x1a\x0a"), 0x20f),
		"no ELF":   testBzImage(packed([]byte("no kernel")), 0x20f),
		"bad ELF":  testBzImage(packed([]byte("\x7fELF")), 0x20f),
		"damaged":  testBzImage([]byte("\x1f\x8b\x08\x00 and no more"), 0x20f),
	} {
		m, err := FromVMLinuz(bytes.NewReader(b), int64(len(b)))
		require.ErrorIs(t, err, ErrFormat, name)
		require.Equal(t, name == "LZO", errors.Is(err, errors.ErrUnsupported), name)
		require.Nil(t, m)
	}
	_, err := FromVMLinuz(errReaderAt{}, 1<<20)
	require.ErrorContains(t, err, "on fire")
	require.NotErrorIs(t, err, ErrFormat)
}

func FuzzVMLinuz(f *testing.F) {
	f.Add(packed(testELF(8, Segment{Addr: 0xffffffff81000000, Data: make([]byte, 64)}, testSymtab(0xffffffff81000000))))
	f.Add([]byte("hello"))
	f.Fuzz(func(t *testing.T, payload []byte) {
		b := testBzImage(payload, 0x20f)
		m, err := FromVMLinuz(bytes.NewReader(b), int64(len(b)))
		checkFuzzed(t, m, err)
	})
}
