//go:build linux

package qemu_test

import (
	"encoding/binary"
	"fmt"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/qemu"
	"github.com/vmprobes/vmprobes/internal/qemutest"
	"github.com/vmprobes/vmprobes/paging"
)

// TestRegions: memory is reached wherever it is: above the hole below 4 GiB, in the
// regions of NUMA nodes, plugged in. QEMU's monitor is the oracle.
func TestRegions(t *testing.T) {
	for name, test := range map[string]struct {
		cfg    qemutest.Config
		end    uint64
		frames []paging.Frame
		holes  []paging.Frame
	}{
		"pc": {
			qemutest.Config{MB: 8 << 10, Args: []string{"-device", "VGA"}}, 9 << 30,
			[]paging.Frame{0x8000, 0xbffff, 0x100000, 0x23ffff}, []paging.Frame{0xc0000, 0x240000},
		},
		"q35": {
			qemutest.Config{MB: 8 << 10, Machine: "q35,memory-backend=ram"}, 10 << 30,
			[]paging.Frame{0x8000, 0x7ffff, 0x100000, 0x27ffff}, []paging.Frame{0x80000, 0xdffff, 0x280000},
		},
		"numa": {
			qemutest.Config{Machine: "pc", Args: []string{
				"-m", "160M,slots=2,maxmem=1G", "-object", "memory-backend-ram,id=more,size=96M",
				"-numa", "node,memdev=ram", "-numa", "node,memdev=more",
				"-object", "memory-backend-ram,id=plugged,size=128M", "-device", "pc-dimm,memdev=plugged", "-device", "VGA",
			}}, 4<<30 + 128<<20,
			[]paging.Frame{0x3fff, 0x4000, 0x9fff, 0x100000, 0x107fff}, []paging.Frame{0xa000, 0x108000},
		},
	} {
		t.Run(name, func(t *testing.T) {
			guest := qemutest.Start(t, test.cfg)
			for i, opts := range []*qemu.Options{{}, {ProcMem: true}, {RAM: guest.RAM}} {
				vm, err := qemu.Dial(t.Context(), "qemu:"+guest.GDB, opts)
				require.NoError(t, err)
				assert.Equal(t, test.end, vm.Info().RAM, "where it ends")
				require.NoError(t, vm.Freeze()) // the BIOS writes, too
				for _, f := range test.frames {
					var b [8]byte
					mark := uint64(f)<<32 | 0xfeed0000 | uint64(i)
					binary.LittleEndian.PutUint64(b[:], mark)
					require.NoError(t, vm.WriteFrame(f, 0x120, b[:]), "frame %#x", f)
					assert.Equal(t, mark, examine(t, guest, uint64(f)<<12+0x120), "frame %#x, by QEMU", f)
					page, release, err := vm.Page(f, false)
					require.NoError(t, err, "frame %#x", f)
					assert.Equal(t, mark, binary.LittleEndian.Uint64(page[0x120:]), "frame %#x", f)
					release()
				}
				for _, f := range test.holes {
					_, _, err := vm.Page(f, false)
					assert.ErrorIs(t, err, qemu.ErrNotRAM, "frame %#x", f)
				}
				require.NoError(t, vm.Thaw())
				require.NoError(t, vm.Close())
			}
		})
	}
}

// examine asks QEMU for a word of physical memory.
func examine(t *testing.T, guest *qemutest.VM, addr uint64) uint64 {
	t.Helper()
	_, value, _ := strings.Cut(guest.HMP(fmt.Sprintf("xp /1gx %#x", addr)), ": 0x")
	n, err := strconv.ParseUint(strings.TrimSpace(value), 16, 64)
	require.NoError(t, err)
	return n
}
