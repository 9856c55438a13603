package sysmap

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestBinary(t *testing.T) {
	t.Parallel()
	image, _ := testKernel(layouts[11], 1, 3000)
	m, err := FromImage([]Segment{image})
	require.NoError(t, err)
	small := mustParse(t, sample)
	for name, m := range map[string]*Map{
		"kernel":      m,
		"slid":        m.Slide(0x1e000000),
		"sample":      small,
		"sample slid": small.Slide(0x1e000000),
		"modules":     small.Slide(0x1000).With(moduleSymbols(100)),
		"32 bits":     mustParse(t, "00001000 A x\nc1000000 T _text\nc1000010 T f\nffffff00 T _end\n").Slide(0x1000),
		"empty":       {},
		"nil":         nil,
	} {
		data, err := m.MarshalBinary()
		require.NoError(t, err, name)
		got, err := UnmarshalMap(data)
		require.NoError(t, err, name)
		want := slices.DeleteFunc(slices.Collect(m.All()), func(s Symbol) bool { return s.Module != "" })
		slices.SortStableFunc(want, byAddr)
		require.Equal(t, want, slices.Collect(got.All()), name)
		assert.Equal(t, m.Banner(), got.Banner())
		again, err := got.MarshalBinary()
		require.NoError(t, err)
		assert.True(t, bytes.Equal(data, again), name)
		for _, s := range want {
			a, aOff, aOK := m.Find(s.Addr)
			b, bOff, bOK := got.Find(s.Addr)
			if name != "32 bits" { // there the slide has wrapped _end
				require.Equal(t, aOK, bOK)
				require.Equal(t, aOff, bOff)
				require.Equal(t, a, b)
			}
		}
		// Nothing refers to data.
		for i := range data {
			data[i] = 0xff
		}
		require.Equal(t, want, slices.Collect(got.All()), name)
	}
}

// seal gives a binary map the checksum it should have.
func seal(b []byte) []byte {
	binary.LittleEndian.PutUint32(b[len(binaryMagic):], crc32.Checksum(b[len(binaryMagic)+4:], castagnoli))
	return b
}

func TestUnmarshalMapErrors(t *testing.T) {
	t.Parallel()
	good, err := mustParse(t, sample).MarshalBinary()
	require.NoError(t, err)
	// Every byte counts.
	for i := range good {
		b := bytes.Clone(good)
		b[i] ^= 0x10
		_, err := UnmarshalMap(b)
		require.ErrorIs(t, err, ErrFormat, "byte %d", i)
		_, err = UnmarshalMap(good[:i])
		require.ErrorIs(t, err, ErrFormat, "cut at %d", i)
	}
	n := int(binary.LittleEndian.Uint32(good[12:]))
	names := int(binary.LittleEndian.Uint32(good[16:]))
	types := binaryHeader + names
	set := func(at int, v ...byte) func(b []byte) []byte {
		return func(b []byte) []byte {
			copy(b[at:], v)
			return b
		}
	}
	for what, tt := range map[string]struct {
		damage func(b []byte) []byte
		text   string
	}{
		"version":            {set(7, 9), "version 9"},
		"too long":           {func(b []byte) []byte { return append(b, 0) }, "too many"},
		"four billion":       {set(12, 0xff, 0xff, 0xff, 0xff), "4294967295 symbols"},
		"huge names":         {set(16, 0xff, 0xff, 0xff, 0xff), "bytes of names"},
		"huge banner":        {set(20, 0xff, 0xff, 0xff, 0xff), "of banner"},
		"bad banner":         {set(20, 1), "banner"},
		"control character":  {set(binaryHeader, 0x1b), "bad byte"},
		"no type":            {set(types, '7'), "symbol 0"},
		"empty name":         {set(types+n, 0), "symbol 0"},
		"long name":          {set(types+n, 0xff, 0xff), "symbol 0"},
		"first is shared":    {set(types+n, 3), "symbol 0"},
		"names left":         {set(types+2*n-1, good[types+2*n-1]-2), "not used"},
		"too few names":      {set(types+2*n-1, good[types+2*n-1]+2), "missing"},
		"address wraps":      {set(len(good)-1, 0xff), "bad address"},
		"one symbol too few": {set(12, byte(n-1)), ""},
	} {
		b := seal(tt.damage(bytes.Clone(good)))
		_, err := UnmarshalMap(b)
		require.ErrorIs(t, err, ErrFormat, what)
		assert.ErrorContains(t, err, tt.text, what)
	}
}

// The end of the name before is stored once.
func TestBinaryShares(t *testing.T) {
	t.Parallel()
	b := newBuilder(0, 0)
	for i, name := range []string{"__pfx_f", "f", "f", "g", "g_long", "long", "__pfx_g_long"} {
		require.Empty(t, b.add(1<<63|uint64(i), 'T', []byte(name), nil))
	}
	m := b.finish("")
	assert.Equal(t, "__pfx_fgg_long__pfx_g_long", m.t.names)
	data, err := m.MarshalBinary()
	require.NoError(t, err)
	got, err := UnmarshalMap(data)
	require.NoError(t, err)
	assert.Equal(t, slices.Collect(m.All()), slices.Collect(got.All()))
	assert.Equal(t, m.t.names, got.t.names)
}

func FuzzUnmarshalMap(f *testing.F) {
	for _, text := range []string{sample, "c1000000 T _text\n"} {
		m, err := Parse(strings.NewReader(text))
		require.NoError(f, err)
		data, err := m.MarshalBinary()
		require.NoError(f, err)
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) >= binaryHeader {
			data = seal(bytes.Clone(data))
		}
		m, err := UnmarshalMap(data)
		checkFuzzed(t, m, err)
		if err != nil {
			return
		}
		again, err := m.MarshalBinary()
		require.NoError(t, err)
		back, err := UnmarshalMap(again)
		require.NoError(t, err)
		require.Equal(t, slices.Collect(m.All()), slices.Collect(back.All()))
	})
}
