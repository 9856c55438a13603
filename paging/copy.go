package paging

import (
	"encoding/binary"
	"sync/atomic"
	"unsafe"
)

// The guest writes its memory while we read it. An aligned access of up to
// eight bytes is therefore made in one piece: a page-table entry is never seen
// half changed, and a text byte never half written.

// loadUint64 reads the little-endian word at page[off]; off is a multiple of 8.
func loadUint64(page []byte, off int) uint64 {
	p := (*uint64)(unsafe.Pointer(&page[off : off+8][0]))
	if uintptr(unsafe.Pointer(p))&7 != 0 {
		return binary.LittleEndian.Uint64(page[off:])
	}
	return atomic.LoadUint64(p)
}

// copyFrom copies len(dst) bytes of guest memory.
func copyFrom(dst, src []byte) {
	if len(dst) == 8 && uintptr(unsafe.Pointer(&src[0]))&7 == 0 {
		binary.LittleEndian.PutUint64(dst, loadUint64(src, 0))
		return
	}
	copy(dst, src)
}

// copyTo copies src into guest memory; an aligned word in one store.
func copyTo(dst, src []byte) {
	if len(src) == 8 && uintptr(unsafe.Pointer(&dst[0]))&7 == 0 {
		atomic.StoreUint64((*uint64)(unsafe.Pointer(&dst[0])), binary.LittleEndian.Uint64(src))
		return
	}
	copy(dst, src)
}
