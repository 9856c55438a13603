package paging

import (
	"encoding/binary"
	"sync/atomic"
	"unsafe"
)

// The guest writes its memory while we read it. An aligned word of four or
// eight bytes is therefore accessed in one piece: a page-table entry is never
// seen half changed, and a pointer never half written. Words are little-endian,
// as is every host that Xen's tools for x86 run on.

// load64 reads the word at page[off].
func load64(page []byte, off int) uint64 {
	b := page[off : off+8]
	if !aligned(b, 8) {
		return binary.LittleEndian.Uint64(b)
	}
	return atomic.LoadUint64((*uint64)(unsafe.Pointer(&b[0])))
}

// load32 reads the word at page[off].
func load32(page []byte, off int) uint32 {
	b := page[off : off+4]
	if !aligned(b, 4) {
		return binary.LittleEndian.Uint32(b)
	}
	return atomic.LoadUint32((*uint32)(unsafe.Pointer(&b[0])))
}

func aligned(b []byte, n uintptr) bool {
	return uintptr(unsafe.Pointer(&b[0]))&(n-1) == 0
}

// copyFrom fills dst from guest memory, where len(dst) <= len(src).
func copyFrom(dst, src []byte) {
	switch len(dst) {
	case 4:
		binary.LittleEndian.PutUint32(dst, load32(src, 0))
	case 8:
		binary.LittleEndian.PutUint64(dst, load64(src, 0))
	default:
		copy(dst, src)
	}
}

// copyTo copies src into guest memory, where len(src) <= len(dst).
func copyTo(dst, src []byte) {
	switch n := len(src); {
	case n == 4 && aligned(dst, 4):
		atomic.StoreUint32((*uint32)(unsafe.Pointer(&dst[0])), binary.LittleEndian.Uint32(src))
	case n == 8 && aligned(dst, 8):
		atomic.StoreUint64((*uint64)(unsafe.Pointer(&dst[0])), binary.LittleEndian.Uint64(src))
	default:
		copy(dst, src)
	}
}
