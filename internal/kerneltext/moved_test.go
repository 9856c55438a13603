package kerneltext_test

import (
	"testing"

	"github.com/stretchr/testify/assert"

	"github.com/vmprobes/vmprobes/internal/kerneltext"
)

// TestRelocated: an instruction may have two addresses that move with the kernel.
func TestRelocated(t *testing.T) {
	const slide = 0x1cc00000
	for name, c := range map[string]struct {
		file, mem string
		want      bool
	}{
		"equal":        {"\x49\x89\xf4", "\x49\x89\xf4", true},
		"other":        {"\x49\x89\xf4", "\x49\x89\xf5", false},
		"immediate":    {"\x48\xc7\xc0\x00\x10\x20\x81", "\x48\xc7\xc0\x00\x10\xe0\x9d", true},
		"two":          {"\x48\x81\xb8\x00\x10\x20\x81\x50\x00\x40\x81", "\x48\x81\xb8\x00\x10\xe0\x9d\x50\x00\x00\x9e", true},
		"two, one off": {"\x48\x81\xb8\x00\x10\x20\x81\x50\x00\x40\x81", "\x48\x81\xb8\x00\x10\xe0\x9d\x50\x00\x01\x9e", false},
		"per-CPU":      {"\x65\x48\x8b\x05\x00\x00\x00\x7f", "\x65\x48\x8b\x05\x00\x00\x40\x62", true},
		"64 bits":      {"\x48\xb8\x00\x10\x20\x81\xff\xff\xff\xff", "\x48\xb8\x00\x10\xe0\x9d\xff\xff\xff\xff", true},
		"int3 behind":  {"\x48\xc7\xc0\x00\x10\x20\x81", "\x48\xcc\xc0\x00\x10\xe0\x9d", false},
	} {
		assert.Equal(t, c.want, kerneltext.Relocated([]byte(c.file), []byte(c.mem), slide), name)
	}
}
