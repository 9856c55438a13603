package kimage

import (
	"bytes"
	"encoding/hex"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestBanners(t *testing.T) {
	const one, two = "Linux version 6.1.0 (me@here) #1 SMP", "Linux version 6.1.0 (me@here) # SMP"
	block := strings.Repeat("x", 1<<20-20) // one string reaches across two reads
	for name, c := range map[string]struct {
		in   string
		want []string
	}{
		"none":      {"Linux version %s (%s)\n", nil},
		"one":       {"\x00" + one + "\n\x00" + one + "\n\x00", []string{one}},
		"weak":      {two + "\n\x00" + one + "\n\x00", []string{one}},
		"only weak": {two + "\n\x00", []string{two}},
		"no end":    {one, nil},
		"control":   {"Linux version 6\x1b[m\n", nil},
		"long":      {"Linux version 6" + strings.Repeat("y", maxBanner) + "\n", nil},
		"across":    {block + one + "\n" + strings.Repeat("z", 3000), []string{one}},
		"empty":     {"", nil},
	} {
		assert.Equal(t, c.want, Banners(strings.NewReader(c.in)), name)
	}
	var many strings.Builder
	for i := range 100 {
		many.WriteString("Linux version 6." + strings.Repeat("1", i+1) + " #1\n")
	}
	assert.Len(t, Banners(strings.NewReader(many.String())), maxBanners)
}

func FuzzBuildID(f *testing.F) {
	note := "\x04\x00\x00\x00\x14\x00\x00\x00\x03\x00\x00\x00GNU\x00aaaaabbbbbcccccddddd"
	f.Add([]byte(note))
	f.Add([]byte("\x05\x00\x00\x00\x01\x00\x00\x00\x09\x00\x00\x00Linux\x00\x00\x00x\x00\x00\x00" + note))
	f.Add([]byte("\xff\xff\xff\xff\xff\xff\xff\xff\x03\x00\x00\x00GNU\x00"))
	f.Fuzz(func(t *testing.T, notes []byte) {
		b, err := hex.DecodeString(BuildID(notes))
		require.NoError(t, err)
		require.LessOrEqual(t, len(b), 64)
		require.True(t, bytes.Contains(notes, b))
		Banners(bytes.NewReader(notes))
	})
}
