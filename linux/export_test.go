package linux

import (
	"context"
	"io"
	"strings"
	"time"

	"github.com/vmprobes/vmprobes/paging"
	"github.com/vmprobes/vmprobes/sysmap"
)

// InferTypes returns the kernel as one without type information, and, if so
// asked, without symbols of data.
func (k *Kernel) InferTypes(noData bool) (*Kernel, error) {
	if k == nil {
		return nil, ErrNoKernel
	}
	c := &Kernel{machine: k.machine, mem: k.mem, bits: k.bits, ranges: k.ranges, syms: k.syms, log: k.log}
	c.root.Store(k.root.Load())
	if noData {
		var b strings.Builder
		for s := range k.syms.All() {
			if s.Type|0x20 == 't' {
				b.WriteString(s.String() + "\n")
			}
		}
		m, err := sysmap.Parse(strings.NewReader(b.String()))
		if err != nil {
			return nil, err
		}
		c.syms = m
	}
	t, err := c.inferTypes()
	c.types = t
	c.typesOnce.Do(func() {})
	return c, err
}

// RetrySafety sets how long tables that were not understood are taken for that.
func RetrySafety(d time.Duration) { retrySafety = d }

// SettleEvery sets how often the page tables in use are looked at.
func SettleEvery(d time.Duration) { settleEvery = d }

// ReadCache reads an entry of the cache.
func ReadCache(r io.Reader) (*sysmap.Map, error) {
	h, err := readHeader(r)
	if err != nil {
		return nil, err
	}
	return readSymbols(r, h)
}

// FromVMCoreInfo follows crash dump information to page tables.
func FromVMCoreInfo(page []byte, m Machine) error {
	_, err := parseVMCoreInfo(page).image(m, "")
	return err
}

// DeadCodeWithoutSymbols looks for dead code where there is nothing to look at.
func DeadCodeWithoutSymbols(try func(addr, size uint64) bool) {
	kernelText{read: func(uint64, []byte) (int, error) { panic("there is nothing to read") }}.deadCode(try)
}

// IsText reports whether a parameter is likely a string.
var IsText = isText

// Images returns where the candidates for a kernel's image begin, best first.
func Images(ctx context.Context, m Machine) (starts []uint64, err error) {
	cpus, err := m.CPUs()
	if err != nil {
		return nil, err
	}
	images, err := findImages(ctx, m, cpus)
	for _, img := range images {
		starts = append(starts, img.ranges[0].Addr)
	}
	return starts, err
}

// KernelAt returns a kernel of which only the version string is known, and where it is.
func KernelAt(m Machine, mode paging.Mode, root paging.Root, at uint64, banner string) *Kernel {
	k := &Kernel{machine: m, mem: paging.New(m, mode), banner: banner, bannerAt: at}
	k.root.Store(uint64(root))
	return k
}

// CurrentByCode returns where the code of a kernel says that current_task is.
var CurrentByCode = (*Kernel).currentByCode
