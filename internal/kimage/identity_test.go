package kimage

import (
	"bytes"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
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
	f.Add([]byte("\x04\x00\x00\x00\x02\x00\x00\x00\x03\x00\x00\x00GNU\x00ab\x00\x00"))
	f.Fuzz(func(t *testing.T, notes []byte) {
		if id := BuildID(notes); len(id) > 128 {
			t.Errorf("%d digits", len(id))
		}
		Banners(bytes.NewReader(notes))
	})
}
