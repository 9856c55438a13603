package xen

import (
	"time"

	"github.com/vmprobes/vmprobes/paging"
)

// Limits of the page cache.
const (
	cachePages = 512
	cacheAge   = 250 * time.Millisecond
)

// NewFrames returns the frames of the guest behind hv.
func NewFrames(hv Hypervisor) *paging.Cache {
	return paging.NewCache(mapper{hv}, cachePages, cacheAge)
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
