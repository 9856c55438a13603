package xen

import (
	"time"

	"github.com/vmprobes/vmprobes/paging"
	"github.com/vmprobes/vmprobes/xenctrl"
)

// Limits of the page cache.
const (
	cachePages = 512
	cacheAge   = 250 * time.Millisecond
)

// NewFrames returns the frames of the guest behind hv. Those of a PV guest stay
// mapped for reading only: as long as somebody has one mapped writable, the guest
// can't make a page table of it (get_page_type, xen/arch/x86/mm.c), as its kernel
// may want of a page that was the stack of a task just now. It would go on with the
// page tables that it had.
func NewFrames(hv Hypervisor) *paging.Cache {
	if info, err := hv.Info(); err == nil && info.Flags&xenctrl.DomainHVM != 0 {
		return paging.NewCache(mapper{hv}, cachePages, cacheAge)
	}
	c := paging.NewCache(writer{mapper{hv}}, cachePages, cacheAge)
	c.WriteBriefly()
	return c
}

// mapper maps frames one by one. It implements [paging.Mapper].
type mapper struct{ hv Hypervisor }

func (m mapper) Map(f paging.Frame, writable bool) ([]byte, func() error, error) {
	mp, err := m.hv.MapFrames(writable, uint64(f))
	if err != nil {
		return nil, nil, err
	}
	return mp.Bytes(), mp.Unmap, nil
}

// writer is a mapper that writes without a mapping of its own. It implements
// [paging.FrameWriter].
type writer struct{ mapper }

func (w writer) WriteFrame(f paging.Frame, off int, b []byte) error {
	return w.hv.WriteFrame(uint64(f), off, b)
}
