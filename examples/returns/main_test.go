package main

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
)

func TestTable(t *testing.T) {
	assert.Equal(t, `   calls   failed         mean      longest  function
       4        1         10ms         30ms  vfs_read
       2        0         10µs         15µs  vfs_open
       1        1         20µs         20µs  vfs_write
`, table([]*function{
		{name: "vfs_write", calls: 1, failed: 1, total: 20 * time.Microsecond, longest: 20 * time.Microsecond},
		{name: "vfs_never"},
		{name: "vfs_read", calls: 4, failed: 1, total: 40 * time.Millisecond, longest: 30 * time.Millisecond},
		{name: "vfs_open", calls: 2, total: 20*time.Microsecond + 10, longest: 15*time.Microsecond + 1},
	}))
}

func TestResult(t *testing.T) {
	for v, want := range map[uint64]string{0: "0", 4096: "4096", 1<<64 - 1: "-1", 1<<64 - 4095: "-4095", 1<<64 - 4096: "0xfffffffffffff000", 1 << 40: "0x10000000000"} {
		assert.Equal(t, want, result(v))
	}
}

func TestAdd(t *testing.T) {
	f := &function{name: "vfs_read"}
	f.add(time.Second, 1<<64-14)
	f.add(3*time.Second, 512)
	assert.Equal(t, &function{name: "vfs_read", calls: 2, failed: 1, total: 4 * time.Second, longest: 3 * time.Second}, f)
}
