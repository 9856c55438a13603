package linux_test

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/pagetest"
	"github.com/vmprobes/vmprobes/linux"
	"github.com/vmprobes/vmprobes/paging"
)

// A machine32 has page tables of 32 bits, and nothing else.
type machine32 struct {
	pages [][]byte
	cpu   linux.CPU
}

func (m *machine32) Page(f paging.Frame, _ bool) ([]byte, func(), error) {
	if uint64(f) >= uint64(len(m.pages)) {
		return nil, nil, paging.ErrNoFrame
	}
	return m.pages[f], func() {}, nil
}

func (m *machine32) CPUs() ([]linux.CPU, error) { return []linux.CPU{m.cpu, m.cpu}, nil }

// TestImages32 has an i386 kernel at one place or another of the mapping of all memory.
// Those of KASLR are where Debian's 6.1.0-50-686-pae and -686 have been seen.
func TestImages32(t *testing.T) {
	const (
		linear  = 0xc0000000
		lowmem  = 0x30000000
		textLen = 0x1000000
		huge    = 2
	)
	for _, tt := range []struct {
		name  string
		kind  pagetest.Kind
		text  uint64 // 0: not protected yet
		nx    bool
		wants []uint64
	}{
		{"PAE", pagetest.PAE, 0xc1000000, true, []uint64{0xc1000000, 0xc0000000}},
		{"PAE, KASLR", pagetest.PAE, 0xc8000000, true, []uint64{0xc8000000, 0xc0000000}},
		{"PAE, KASLR, no NX", pagetest.PAE, 0xdc000000, false, []uint64{0xdc000000, 0xc0000000}},
		{"two levels", pagetest.TwoLevel, 0xc1000000, false, []uint64{0xc1000000, 0xc0000000}},
		{"two levels, KASLR", pagetest.TwoLevel, 0xc4000000, false, []uint64{0xc4000000, 0xc0000000}},
		{"two levels, boots", pagetest.TwoLevel, 0, false, []uint64{0xc0000000}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := &machine32{}
			tables := pagetest.New(tt.kind, func() (uint64, []byte) {
				m.pages = append(m.pages, make([]byte, paging.PageSize))
				return uint64(len(m.pages) - 1), m.pages[len(m.pages)-1]
			})
			m.cpu = linux.CPU{CR0: 0x80050033, CR3: tables.CR3, CR4: 0x10} // PSE
			if tt.kind == pagetest.PAE {
				m.cpu.CR4 |= 0x20
			}
			size := tt.kind.Size(huge)
			for off := uint64(0); off < lowmem; off += size {
				flags := uint64(pagetest.Writable | pagetest.Accessed | pagetest.Dirty)
				va := linear + off
				switch {
				case tt.text != 0 && va >= tt.text && va < tt.text+textLen:
					flags &^= pagetest.Writable
				case tt.nx && off > 0: // the first has the BIOS
					flags |= pagetest.NX
				}
				tables.Map(pagetest.Mapping{Virt: va, Phys: off, Level: huge, Flags: flags})
			}
			// A module.
			for off := uint64(0); off < 0x80000; off += paging.PageSize {
				tables.Map(pagetest.Mapping{Virt: 0xf8000000 + off, Phys: 0x8000000 + off, Level: 1})
			}
			starts, err := linux.Images(t.Context(), m)
			require.NoError(t, err)
			assert.Equal(t, tt.wants, starts)
		})
	}
}

// TestRunning32: the four top entries of PAE tables may be anywhere in their page, of which
// CR3 says where (Intel SDM vol. 3, 4.4.1).
func TestRunning32(t *testing.T) {
	const at, banner = 0xc1000010, "Linux version 6.1"
	m := &machine32{}
	tables := pagetest.New(pagetest.PAE, func() (uint64, []byte) {
		m.pages = append(m.pages, make([]byte, paging.PageSize))
		return uint64(len(m.pages) - 1), m.pages[len(m.pages)-1]
	})
	m.pages = append(m.pages, append(make([]byte, at%paging.PageSize), append([]byte(banner), make([]byte, paging.PageSize)...)...)[:paging.PageSize])
	tables.Map(pagetest.Mapping{Virt: at &^ 0xfff, Phys: uint64(len(m.pages)-1) * paging.PageSize, Level: 1})
	m.cpu = linux.CPU{CR0: 0x80050033, CR3: tables.CR3, CR4: 0x30}
	require.NotZero(t, tables.CR3%paging.PageSize)
	mode, err := paging.ModeOf(m.cpu.CR0, m.cpu.CR4, m.cpu.EFER)
	require.NoError(t, err)
	k := linux.KernelAt(m, mode, paging.Root(m.cpu.CR3), at, banner)
	ok, err := k.Running()
	require.NoError(t, err)
	assert.True(t, ok)
	m.cpu.CR3 &^= 0xfff
	ok, err = k.Running()
	require.NoError(t, err)
	assert.False(t, ok, "no vCPU has these tables")
}
