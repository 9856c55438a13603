package tracefs

import (
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

const (
	atEntry = `# event histogram
#
# trigger info: hist:keys=common_pid:vals=hitcount:sort=hitcount:size=128 [active]
#

{ common_pid:          1 } hitcount:          4

Totals:
    Hits: 4
    Entries: %d
    Dropped: %d
`
	atReturn = `# event histogram
#
# trigger info: hist:keys=common_pid,ret:vals=hitcount:sort=hitcount:size=1024 [active]
#

{ common_pid:         61, ret:          3 } hitcount:         12
{ common_pid:         62, ret: 18446744073709551614 } hitcount:          7

Totals:
    Hits: 19
    Entries: 2
    Dropped: 0
`
	trace = `# tracer: nop
#
# entries-in-buffer/entries-written: 3/3   #P:2
#
#                                _-----=> irqs-off/BH-disabled
#           TASK-PID     CPU#  |||||  TIMESTAMP  FUNCTION
#              | |         |   |||||     |         |
            init-61      [000] .....     9.514412: e1: (ksys_read+0x6b/0xf0 <- vfs_read) ret=0x7
     my: [0] 1-2-62      [001] d..2.     9.514450: e0: (do_syscall_64+0x5c/0x90 <- __x64_sys_read) ret=0xfffffffffffffff7
            init-61      [000] .....     9.514460: p0: (vfs_read+0x4/0x340)
`
)

func TestHistogram(t *testing.T) {
	counts, err := Histogram([]byte(atReturn))
	require.NoError(t, err)
	assert.Equal(t, []string{"61:3:12", "62:18446744073709551614:7"}, counts)
	counts, err = Histogram(fmt.Appendf(nil, atEntry, 1, 0))
	require.NoError(t, err)
	assert.Equal(t, []string{"1:4"}, counts)
	_, err = Histogram(fmt.Appendf(nil, atEntry, 1, 3))
	require.ErrorContains(t, err, "too small")
	_, err = Histogram(fmt.Appendf(nil, atEntry, 2, 0))
	require.ErrorContains(t, err, "of 2 entries shows 1")
	_, err = Histogram([]byte("# tracer: nop\n"))
	require.ErrorContains(t, err, "no histogram")
}

func TestMissed(t *testing.T) {
	missed, err := Missed([]byte("  e0                  10               2\n  e1                   7              40\n"))
	require.NoError(t, err)
	assert.EqualValues(t, 42, missed)
	_, err = Missed([]byte("  e0  10  many\n"))
	require.Error(t, err)
	_, err = Missed([]byte("  e0\n"))
	require.Error(t, err)
}

func TestReturns(t *testing.T) {
	all, err := Returns(strings.NewReader(trace))
	require.NoError(t, err)
	assert.Equal(t, []Return{{61, "e1", 7}, {62, "e0", ^uint64(8)}}, all)
	_, err = Returns(strings.NewReader(trace + "CPU:1 [LOST 3 EVENTS]\n"))
	require.ErrorContains(t, err, "lost")
}
