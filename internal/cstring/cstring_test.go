package cstring

import (
	"errors"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
)

func TestRead(t *testing.T) {
	absent := errors.New("not there")
	long := strings.Repeat("x", 5000)
	for name, c := range map[string]struct {
		at    uint64
		mem   string // what is there from at on
		limit int
		want  string
		err   error
	}{
		"short":               {0x1000, "hello\x00zz", 100, "hello", nil},
		"empty":               {0x1000, "\x00zz", 100, "", nil},
		"no room":             {0x1000, "hello", 0, "", ErrNoTerminator},
		"less than none":      {0x1000, "hello", -1, "", ErrNoTerminator},
		"NUL is the last":     {0x1000, "hello\x00", 6, "hello", nil},
		"NUL is behind":       {0x1000, "hello\x00", 5, "hello", ErrNoTerminator},
		"end of page":         {0x1ffa, "hello\x00", 100, "hello", nil},
		"end of memory":       {0x1ffb, "hello", 100, "hello", absent},
		"across pages":        {0x1f00, long + "\x00", 6000, long, nil},
		"end of addresses":    {1<<64 - 5, "hello", 100, "hello", ErrEnd},
		"nothing there":       {0x1000, "", 100, "", absent},
		"largest of limits":   {0x1000, "hello", 1<<63 - 1, "hello", absent},
		"short read, and NUL": {0x1000, "he\x00", 100, "he", nil},
	} {
		got, err := Read(func(addr uint64, b []byte) (int, error) {
			assert.NotEmpty(t, b, name)
			assert.Equal(t, addr/pageSize, (addr+uint64(len(b))-1)/pageSize, name)
			n := copy(b, c.mem[min(addr-c.at, uint64(len(c.mem))):])
			if n < len(b) {
				return n, absent
			}
			return n, nil
		}, c.at, c.limit)
		assert.Equal(t, c.want, got, name)
		assert.Equal(t, c.err, err, name)
	}
}
