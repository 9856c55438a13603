package sysmap

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"debug/elf"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/ulikunitz/xz"
	"github.com/ulikunitz/xz/lzma"
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
	for _, l := range []layout{layouts[9], layouts[10]} {
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
	seg, _ := testKernel(layouts[9], 1, 1000)
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
	for _, i := range []int{1, 9, 14} {
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

func withSize(b []byte, n int) []byte { return binary.LittleEndian.AppendUint32(b, uint32(n)) }

func packers() map[string]func(p []byte) []byte {
	through := func(p []byte, open func(io.Writer) (io.WriteCloser, error)) []byte {
		var b bytes.Buffer
		w, err := open(&b)
		if err == nil {
			_, err = w.Write(p)
		}
		if err == nil {
			err = w.Close()
		}
		if err != nil {
			panic(err)
		}
		return b.Bytes()
	}
	return map[string]func(p []byte) []byte{
		"none": func(p []byte) []byte { return p },
		"gzip": func(p []byte) []byte {
			return through(p, func(w io.Writer) (io.WriteCloser, error) { return gzip.NewWriter(w), nil })
		},
		"xz": func(p []byte) []byte {
			return withSize(through(p, func(w io.Writer) (io.WriteCloser, error) { return xz.WriterConfig{CheckSum: xz.CRC32}.NewWriter(w) }), len(p))
		},
		"lzma": func(p []byte) []byte {
			return withSize(through(p, func(w io.Writer) (io.WriteCloser, error) { return lzma.NewWriter(w) }), len(p))
		},
		"zstd": func(p []byte) []byte {
			return withSize(through(p, func(w io.Writer) (io.WriteCloser, error) { return zstd.NewWriter(w) }), len(p))
		},
		"lz4": func(p []byte) []byte {
			b := []byte("\x02\x21\x4c\x18")
			const block = 8 << 20
			for c := range slices.Chunk(p, block) {
				z := make([]byte, lz4.CompressBlockBound(len(c)))
				n, err := lz4.CompressBlock(c, z, nil)
				if err != nil || n == 0 {
					panic(fmt.Sprint(n, err))
				}
				b = append(withSize(b, n), z[:n]...)
			}
			return withSize(b, len(p))
		},
	}
}

func TestFromVMLinuz(t *testing.T) {
	t.Parallel()
	seg, syms := testKernel(layouts[11], 9, 3000)
	image := testELF(8, seg, nil)
	image = append(image, make([]byte, 1234)...) // relocations
	for name, pack := range packers() {
		packed := pack(image)
		b := testBzImage(packed, 0x20f)
		m, err := FromVMLinuz(bytes.NewReader(b), int64(len(b)))
		require.NoError(t, err, name)
		require.Equal(t, syms, slices.Collect(m.All()), name)

		for file, b := range map[string][]byte{"vmlinuz": b, "vmlinux.packed": packed} {
			p := filepath.Join(t.TempDir(), file)
			require.NoError(t, os.WriteFile(p, b, 0o600))
			m, err = ParseFile(p)
			require.NoError(t, err, "%s %s", name, file)
			require.Equal(t, len(syms), m.Len())
		}
		// Damage and shortage.
		if name != "none" {
			for _, cut := range []int{1, 10, len(packed) / 2, len(packed) - 30} {
				c := testBzImage(packed[:cut], 0x20f)
				_, err = FromVMLinuz(bytes.NewReader(c), int64(len(c)))
				require.ErrorIs(t, err, ErrFormat, "%s cut at %d", name, cut)
			}
		}
		_, err = FromVMLinuz(bytes.NewReader(b), int64(len(b)-2000))
		require.ErrorIs(t, err, ErrFormat, name)
	}
	// Before 2.6.26: nothing says where the payload is.
	b := testBzImage(packers()["gzip"](image), 0x204)
	m, err := FromVMLinuz(bytes.NewReader(b), int64(len(b)))
	require.NoError(t, err)
	require.Equal(t, len(syms), m.Len())
}

func TestFromVMLinuzErrors(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		b    []byte
		text string
	}{
		"empty":       {nil, "0 bytes"},
		"no image":    {make([]byte, 4096), "signature"},
		"no payload":  {testBzImage(nil, 0x20f), "cut short"},
		"unknown":     {testBzImage([]byte("some payload"), 0x20f), "73 6f 6d 65"},
		"not ELF":     {testBzImage(packers()["gzip"]([]byte("no kernel")), 0x20f), "no ELF"},
		"old, none":   {testBzImage([]byte("x"), 0x204), "no gzip"},
		"old, broken": {testBzImage([]byte("\x1f\x8b\x08\x00 and no more"), 0x204), "gzip"},
	} {
		m, err := FromVMLinuz(bytes.NewReader(tt.b), int64(len(tt.b)))
		require.ErrorIs(t, err, ErrFormat, name)
		require.Contains(t, err.Error(), tt.text, name)
		require.Nil(t, m)
	}
	b := testBzImage([]byte("\x89LZO\x00\x0d\x0a\x1a\x0a"), 0x20f)
	_, err := FromVMLinuz(bytes.NewReader(b), int64(len(b)))
	require.ErrorIs(t, err, errors.ErrUnsupported)
	_, err = FromVMLinuz(bytes.NewReader(b), 1<<40)
	require.ErrorIs(t, err, ErrFormat)
	_, err = FromVMLinuz(errReaderAt{}, 1<<20)
	require.ErrorContains(t, err, "on fire")
}

// A bomb is given up at the bound, or at the size it declares.
func TestUnpackIsBounded(t *testing.T) {
	t.Parallel()
	zeros := make([]byte, 1<<20)
	for name, pack := range packers() {
		if i := packing(pack(zeros)); i >= 0 {
			img, err := packings[i].unpack(pack(zeros), 1000)
			require.ErrorIs(t, err, errLimit, name)
			require.LessOrEqual(t, len(img), 1000, name)
		}
	}
}

func TestUnpackBzip2(t *testing.T) {
	t.Parallel()
	z, err := base64.StdEncoding.DecodeString("QlpoOTFBWSZTWeN92HgAAAKRgEAEAk2QACAAMQZMQQ0G1CDWMiuVeLuSKcKEhxvuw8A=")
	require.NoError(t, err)
	img, err := unpack(withSize(z, 13))
	require.NoError(t, err)
	assert.Equal(t, "hello, kernel", string(img))
}

// opcodes makes bytes that the x86 filter has much to do with.
func opcodes(seed uint64, n int) []byte {
	rng := rand.New(rand.NewPCG(seed, 2))
	b := make([]byte, n)
	for i := range b {
		b[i] = "\xe8\xe9\x00\xff\x00\xff\xe8\x0f\x84\x10\x01\xfe"[rng.IntN(12)]
	}
	return b
}

// testdata/x86.xz is what xz --x86 --lzma2 made of opcodes(1, 16384).
func TestUnfilterX86(t *testing.T) {
	t.Parallel()
	z, err := os.ReadFile("testdata/x86.xz")
	require.NoError(t, err)
	got, err := unpack(withSize(z, 16384))
	require.NoError(t, err)
	require.Equal(t, sha256.Sum256(opcodes(1, 16384)), sha256.Sum256(got))
}

// The same against the xz program, with more data and all checks.
func TestXZProgram(t *testing.T) {
	t.Parallel()
	path, err := exec.LookPath("xz")
	if err != nil {
		t.Skip("no xz program; TestUnfilterX86 has one file it made")
	}
	seed := uint64(0)
	for _, check := range []string{"none", "crc32", "crc64", "sha256"} {
		for _, filters := range []string{"--x86 --lzma2=dict=64KiB", "--lzma2=preset=6", "--x86 --lzma2=dict=32MiB --block-size=10000"} {
			for _, n := range []int{0, 1, 4, 5, 6, 7, 100, 30000} {
				seed++
				want := opcodes(seed, n)
				c := exec.Command(path, append([]string{"-c", "--check=" + check}, strings.Fields(filters)...)...)
				c.Stdin = bytes.NewReader(want)
				z, err := c.Output()
				require.NoError(t, err)
				got, err := unpackXZ(z, 1<<20)
				require.NoError(t, err, "%s %s %d", check, filters, n)
				require.True(t, bytes.Equal(want, got), "%s %s %d", check, filters, n)
			}
		}
	}
	c := exec.Command(path, "-c", "--arm", "--lzma2")
	c.Stdin = strings.NewReader("x")
	z, err := c.Output()
	require.NoError(t, err)
	_, err = unpack(z)
	require.ErrorIs(t, err, errors.ErrUnsupported)
}

func FuzzVMLinuz(f *testing.F) {
	for _, pack := range packers() {
		f.Add(pack(testELF(8, Segment{Addr: 0xffffffff81000000, Data: make([]byte, 64)}, testSymtab(0xffffffff81000000))), uint16(0x20f))
		f.Add(pack([]byte("hello")), uint16(0x204))
	}
	if z, err := os.ReadFile("testdata/x86.xz"); err == nil {
		f.Add(z, uint16(0x20f))
	}
	f.Fuzz(func(t *testing.T, payload []byte, version uint16) {
		b := testBzImage(payload, version)
		m, err := FromVMLinuz(bytes.NewReader(b), int64(len(b)))
		checkFuzzed(t, m, err)
	})
}

func FuzzUnfilterX86(f *testing.F) {
	f.Add(opcodes(1, 100))
	f.Fuzz(func(_ *testing.T, b []byte) { unfilterX86(b) })
}
