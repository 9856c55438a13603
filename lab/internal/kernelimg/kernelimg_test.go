package kernelimg

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/ulikunitz/xz"
)

// Offsets into the boot image, from the Linux/x86 boot protocol.
const (
	offSetupSects    = 0x1f1
	offBootMagic     = 0x1fe
	offHeaderMagic   = 0x202
	offVersion       = 0x206
	offPayload       = 0x248
	offPayloadLength = 0x24c
	sectorSize       = 512
)

// kernel is a stand-in for an ELF kernel, larger than one lz4 legacy block.
func kernel() []byte {
	return append([]byte("\x7fELF"), bytes.Repeat([]byte("all work and no play "), 500_000)...)
}

// bootImage wraps a payload the way a boot image does, with the kernel's size
// behind the compressed stream.
func bootImage(compressed []byte, size int) []byte {
	payload := binary.LittleEndian.AppendUint32(bytes.Clone(compressed), uint32(size))
	image := make([]byte, 3*sectorSize+0x40)
	image[offSetupSects] = 2
	copy(image[offBootMagic:], "\x55\xaa")
	copy(image[offHeaderMagic:], "HdrS")
	binary.LittleEndian.PutUint16(image[offVersion:], 0x020f)
	binary.LittleEndian.PutUint32(image[offPayload:], 0x40)
	binary.LittleEndian.PutUint32(image[offPayloadLength:], uint32(len(payload)))
	image = append(image, payload...)
	return append(image, "whatever follows"...)
}

func TestELF(t *testing.T) {
	compressors := map[string]func(t *testing.T, data []byte) []byte{
		"gzip": func(t *testing.T, data []byte) []byte {
			var b bytes.Buffer
			w := gzip.NewWriter(&b)
			_, err := w.Write(data)
			require.NoError(t, err)
			require.NoError(t, w.Close())
			return b.Bytes()
		},
		"xz": func(t *testing.T, data []byte) []byte {
			var b bytes.Buffer
			w, err := xz.NewWriter(&b)
			require.NoError(t, err)
			_, err = w.Write(data)
			require.NoError(t, err)
			require.NoError(t, w.Close())
			return b.Bytes()
		},
		"zstd": func(t *testing.T, data []byte) []byte {
			w, err := zstd.NewWriter(nil)
			require.NoError(t, err)
			return w.EncodeAll(data, nil)
		},
		"lz4 legacy": func(t *testing.T, data []byte) []byte {
			out := []byte("\x02\x21\x4c\x18")
			for len(data) > 0 {
				n := min(len(data), 8<<20)
				block := make([]byte, lz4.CompressBlockBound(n))
				m, err := lz4.CompressBlock(data[:n], block, nil)
				require.NoError(t, err)
				require.NotZero(t, m)
				out = append(binary.LittleEndian.AppendUint32(out, uint32(m)), block[:m]...)
				data = data[n:]
			}
			return out
		},
	}
	for name, compress := range compressors {
		t.Run(name, func(t *testing.T) {
			want := kernel()
			got, err := ELF(bootImage(compress(t, want), len(want)))
			require.NoError(t, err)
			assert.True(t, bytes.Equal(want, got), "%d bytes instead of %d", len(got), len(want))
		})
	}
}

func TestELFIsKept(t *testing.T) {
	got, err := ELF([]byte("\x7fELF and more"))
	require.NoError(t, err)
	assert.Equal(t, "\x7fELF and more", string(got))
}

func TestErrors(t *testing.T) {
	_, err := ELF([]byte(strings.Repeat("x", 4096)))
	require.ErrorIs(t, err, ErrNotBootImage)

	_, err = ELF(bootImage([]byte("????????"), 1))
	require.ErrorIs(t, err, ErrCompression)

	old := bootImage([]byte("????????"), 1)
	binary.LittleEndian.PutUint16(old[offVersion:], 0x0207)
	_, err = ELF(old)
	require.ErrorIs(t, err, ErrNotBootImage)

	short := bootImage(make([]byte, 4096), 1)
	_, err = ELF(short[:2048])
	require.ErrorContains(t, err, "truncated")

	_, err = ELF(bootImage([]byte("\x02\x21\x4c\x18\xff\xff\xff\x00"), 1))
	require.ErrorContains(t, err, "unexpected EOF")
}

func FuzzELF(f *testing.F) {
	f.Add(bootImage([]byte("\x02\x21\x4c\x18\x01\x00\x00\x00a"), 1))
	f.Add(bootImage([]byte("\x1f\x8b"), 1))
	f.Fuzz(func(_ *testing.T, image []byte) { _, _ = ELF(image) })
}
