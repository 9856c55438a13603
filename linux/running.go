package linux

import (
	"errors"

	"github.com/vmprobes/vmprobes/paging"
)

// Running reports whether the guest still runs this kernel, by its version string: after a
// reboot, a reset or a kexec it isn't there, or not in the page tables of any vCPU. The same
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
	case err == nil && string(b) != k.banner:
		return false, nil
	case err == nil:
		return k.inUse(b), nil
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

// inUse reports whether the page tables of a vCPU map the version string, as far as that can
// be told: what a reset has left in memory may stay there for long. b is scratch.
func (k *Kernel) inUse(b []byte) bool {
	cpus, err := k.machine.CPUs()
	if err != nil || len(cpus) == 0 {
		return true
	}
	for _, c := range cpus {
		for _, r := range roots(k.mem.Mode(), c) {
			if _, err := k.mem.Read(r.root, paging.VAddr(k.bannerAt), b); err == nil && string(b) == k.banner {
				return true
			}
		}
	}
	return false
}
