package kimage

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
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

// testKernel is larger than one block of lz4, and has code for the filter of xz.
func testKernel() []byte {
	b := append([]byte(ELFMagic), bytes.Repeat([]byte("all work and no play "), 450_000)...)
	return append(b, opcodes(3, 1<<16)...)
}

func TestKernel(t *testing.T) {
	t.Parallel()
	want := testKernel()
	for name, pack := range packers() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			packed := pack(want)
			b := testBzImage(packed, 0x20f)
			got, err := Kernel(bytes.NewReader(b), int64(len(b)))
			require.NoError(t, err)
			require.True(t, bytes.Equal(want, got))
			assert.Equal(t, name != "none", Packed(packed))
			_, err = Kernel(bytes.NewReader(b), int64(len(b)-2000))
			require.ErrorIs(t, err, ErrFormat)
			if name == "none" {
				return
			}
			for _, cut := range []int{1, 10, len(packed) / 2, len(packed) - 200} {
				c := testBzImage(packed[:cut], 0x20f)
				_, err = Kernel(bytes.NewReader(c), int64(len(c)))
				require.True(t, errors.Is(err, ErrFormat) || errors.Is(err, ErrCompression), "cut at %d: %v", cut, err)
			}
		})
	}
	// Before 2.6.26: nothing says where the payload is.
	b := testBzImage(packers()["gzip"](want), 0x204)
	got, err := Kernel(bytes.NewReader(b), int64(len(b)))
	require.NoError(t, err)
	require.True(t, bytes.Equal(want, got))
}

func TestKernelErrors(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		b    []byte
		is   error
		text string
	}{
		"empty":       {nil, ErrNotBootImage, "0 bytes"},
		"no image":    {make([]byte, 4096), ErrNotBootImage, "signature"},
		"no payload":  {testBzImage(nil, 0x20f), ErrFormat, "truncated"},
		"unknown":     {testBzImage([]byte("some payload"), 0x20f), ErrCompression, "73 6f 6d 65"},
		"LZO":         {testBzImage([]byte("\x89LZO\x00\x0d\x0a\x1a\x0a"), 0x20f), errors.ErrUnsupported, "lzop"},
		"not ELF":     {testBzImage(packers()["gzip"]([]byte("no kernel")), 0x20f), ErrNotBootImage, "not an ELF"},
		"old, none":   {testBzImage([]byte("x"), 0x204), ErrNotBootImage, "no gzip"},
		"old, broken": {testBzImage([]byte("\x1f\x8b\x08\x00 and no more"), 0x204), ErrFormat, "gzip"},
	} {
		img, err := Kernel(bytes.NewReader(tt.b), int64(len(tt.b)))
		require.ErrorIs(t, err, tt.is, name)
		require.ErrorContains(t, err, tt.text, name)
		require.Nil(t, img)
	}
	_, err := Kernel(errReaderAt{}, 1<<40)
	require.ErrorIs(t, err, ErrFormat)
	_, err = Kernel(errReaderAt{}, 1<<20)
	require.ErrorContains(t, err, "on fire")
}

type errReaderAt struct{}

func (errReaderAt) ReadAt([]byte, int64) (int, error) { return 0, errors.New("disk on fire") }

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
	img, err := Unpack(withSize(z, 13))
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
	got, err := Unpack(withSize(z, 16384))
	require.NoError(t, err)
	require.Equal(t, sha256.Sum256(opcodes(1, 16384)), sha256.Sum256(got))
}

// The same against the xz program, with more data and all checks.
func TestXZProgram(t *testing.T) {
	t.Parallel()
	path, err := exec.LookPath("xz")
	if err != nil {
		if os.Getenv("VMPROBES_REQUIRE_ORACLES") == "1" {
			t.Fatal(err)
		}
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
	_, err = Unpack(z)
	require.ErrorIs(t, err, errors.ErrUnsupported)
}

// What "xz --check=crc32 --x86 --lzma2=dict=64KiB" makes of some calls and
// jumps, near and far ones and such as overlap.
const (
	branches = "f0VMRugR9f//6OUQAADogfD//+l7VjQS6Ojp2f///1VIieXoAP/oA/T//+gtDAAA6DwJAADpgVY0Eujo6bcAAABVSInl6AD/6MME" +
		"AADo5/n//+h58v//6YdWNBLo6OnHAAAAVUiJ5egA/+hI7v//6GoFAADoKggAAOmNVjQS6Ojp1v7//1VIieXoAP/o+QgAAOiD/f//" +
		"6Bz7///pk1Y0Eujo6Tz///9VSInl6AD/6MgAAADobe7//+jl7f//6ZlWNBLo6Onu/v//VUiJ5egA/+geDwAA6A7t///o3QQAAOmf" +
		"VjQS6Ojpsf///1VIieXoAP/oewcAAOhT7v//6DwOAADppVY0Eujo6bf///9VSInl6AD/6H4IAADoMwwAAOjaDwAA6atWNBLo6OnC" +
		"////VUiJ5egA/+iXAgAA6D77///oePr//+mxVjQS6OjpqgAAAFVIieXoAP/oA////+jY7f//6BoHAADpt1Y0Eujo6Q0BAABVSInl" +
		"6AD/6N7y///oXfj//+hw////6b1WNBLo6OlP////VUiJ5egA/+jCAQAA6IUMAADoewcAAOnDVjQS6Ojp2wAAAFVIieXoAP/onvj/" +
		"/+ji////6Kf+///pyVY0Eujo6dMAAABVSInl6AD/6M4MAADopAUAAOgqEgAA6c9WNBLo6On3/v//VUiJ5egA/+g0CwAA6AH8///o" +
		"VwYAAOnVVjQS6OjpfAAAAFVIieXoAP/oivf//+j2AwAA6JcPAADp21Y0Eujo6VMAAABVSInl6AD/6ADy///ojwgAAOgCDQAA6eFW" +
		"NBLo6OlC////VUiJ5egA/+jy9v//6M8NAADoowUAAOnnVjQS6OjpTwAAAFVIieXoAP/ozwsAAOhc7v//6IEKAADp7VY0Eujo6QD/" +
		"//9VSInl6AD/"
	branchesXZ = "/Td6WFoAAAFpIt42AgEEACEBCADSuXTL4AKrAVddAD+RRYRwahxppf9DExxxcr5zHcNRTzWDSotdVsrFBJvWkDRsB+CXXf/o5miL" +
		"wopZQJKsyQBisENtIVhaWY3YO72iItKU0EyS9Ye0PkrGkhN2md2DEifCjHaHwsBh0qWIQRYXlgxSLKHcaZgMoe0gsZkncpzLo6yb" +
		"rFkHq1lTKmDE5kw3BwH9aXDArjeyVnmIvdep1DGKcVcvYiVl9OWVV2o9wthr4xb7GeT057l+7YuVrW2ww7icDpGLuYBu4TM4XTUZ" +
		"rPSdxsffSxdPlWcimATTXoCRkyA6pmfTSb47zDdfyK1Ss69R9gNPWPFsMzPAE5PCJYoVfTxFcFrAhuevg5R9JHMfNAnw/uQHQ01v" +
		"Io4Ekc8P6MsuAbAKYcXLgJEXEmXWtZkCh9zi/NkCMPJVw2WaY9LCl/cJ6sd1vEMeSXxgrEm6W7QlGhwVNtFjCs1xH3xeQk3njZ8A" +
		"AIdA+c4AAe8CrAUAALxK8V8+MA2LAgAAAAABWVo="
)

func decode(t *testing.T, s string) []byte {
	t.Helper()
	b, err := base64.StdEncoding.DecodeString(s)
	require.NoError(t, err)
	return b
}

func TestBranchFilter(t *testing.T) {
	t.Parallel()
	want, stream := decode(t, branches), decode(t, branchesXZ)
	got, err := Unpack(withSize(stream, len(want)))
	require.NoError(t, err)
	assert.Equal(t, want, got)
}

func TestBrokenXZ(t *testing.T) {
	t.Parallel()
	stream := decode(t, branchesXZ)
	for n := 6; n < len(stream)-100; n++ {
		_, err := Unpack(stream[:n])
		require.ErrorIs(t, err, ErrFormat, "%d bytes", n)
	}
	// Another branch filter.
	header := stream[12:]
	header = header[:(int(header[0])+1)*4]
	header[2] = 0x07
	binary.LittleEndian.PutUint32(header[len(header)-4:], crc32.ChecksumIEEE(header[:len(header)-4]))
	_, err := Unpack(stream)
	require.ErrorIs(t, err, ErrCompression)
	require.ErrorIs(t, err, errors.ErrUnsupported)
}

func FuzzKernel(f *testing.F) {
	for _, pack := range packers() {
		f.Add(pack([]byte(ELFMagic+"hello")), uint16(0x20f))
		f.Add(pack([]byte("hello")), uint16(0x204))
	}
	if z, err := os.ReadFile("testdata/x86.xz"); err == nil {
		f.Add(z, uint16(0x20f))
	}
	f.Fuzz(func(t *testing.T, payload []byte, version uint16) {
		b := testBzImage(payload, version)
		img, err := Kernel(bytes.NewReader(b), int64(len(b)))
		if err == nil {
			require.True(t, IsELF(img))
		}
		require.LessOrEqual(t, len(img), MaxKernel)
	})
}

func FuzzUnfilterX86(f *testing.F) {
	f.Add(opcodes(1, 100))
	f.Fuzz(func(_ *testing.T, b []byte) { unfilterX86(b) })
}
