package linux

import (
	"errors"

	"github.com/vmprobes/vmprobes/paging"
)

// Running reports whether this kernel is still in the guest's memory, by its version
// string: after a reboot, a reset or a kexec it isn't there, or elsewhere (KASLR). The same
// build at the same place can't be told from this one. It fails if the memory can't be
// read at all.
func (k *Kernel) Running() (bool, error) {
	if k == nil {
		return false, ErrNoKernel
	}
	if k.borrowed.Load() {
		return true, nil // its page tables change until it has booted
	}
	b := make([]byte, len(k.banner))
	err := k.Read(k.bannerAt, b)
	switch {
	case err == nil:
		return string(b) == k.banner, nil
	case errors.Is(err, paging.ErrNotMapped), errors.Is(err, paging.ErrReserved):
		return false, nil // there is something else at the root
	case errors.Is(err, paging.ErrNoFrame):
		// Either the tables lead nowhere, or no memory can be read now.
		if _, rerr := k.mem.ReadPhys(paging.PAddr(k.Root())&^(paging.PageSize-1), b[:1]); rerr == nil {
			return false, nil
		}
	}
	return false, err
}
