package xentest

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// ram is the machine's memory: a memfd, so that mappings are mappings.
type ram struct {
	fd int
	b  []byte
}

func newRAM(size int) *ram {
	fd, err := unix.MemfdCreate("vmprobes-sim", unix.MFD_CLOEXEC)
	if err != nil {
		panic("xentest: memfd_create: " + err.Error())
	}
	if err := unix.Ftruncate(fd, int64(size)); err != nil {
		panic("xentest: ftruncate: " + err.Error())
	}
	b, err := unix.Mmap(fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		panic("xentest: mmap: " + err.Error())
	}
	return &ram{fd, b}
}

func (r *ram) free() {
	_ = unix.Munmap(r.b)
	_ = unix.Close(r.fd)
}

// mapPages maps pages one after the other. A page that isn't writable faults
// when it is written.
func (r *ram) mapPages(writable bool, pages []int) ([]byte, error) {
	prot := unix.PROT_READ
	if writable {
		prot |= unix.PROT_WRITE
	}
	size := len(pages) * pageSize
	base, err := unix.MmapPtr(-1, 0, nil, uintptr(size), unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		return nil, err
	}
	for i, x := range pages {
		if _, err := unix.MmapPtr(r.fd, int64(x)*pageSize, unsafe.Add(base, i*pageSize), pageSize, prot,
			unix.MAP_SHARED|unix.MAP_FIXED); err != nil {
			_ = unix.MunmapPtr(base, uintptr(size))
			return nil, err
		}
	}
	return unsafe.Slice((*byte)(base), size), nil
}

func unmapPages(b []byte) error {
	return unix.MunmapPtr(unsafe.Pointer(unsafe.SliceData(b)), uintptr(len(b)))
}
