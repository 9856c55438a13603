package linux

import "slices"

// ExpectedFault reports whether the kernel expects a fault of the instruction at
// addr, of its own or of a module's, and finds what to do then by that address
// (__ex_table: accesses to user memory, loads of segment registers, …). Executed
// elsewhere, its fault would be the kernel's end. Where that isn't known it is true:
// of what is in the text of neither, and of a table that can't be read.
func (k *Kernel) ExpectedFault(addr uint64) bool {
	p, err := k.placesOf(addr)
	if err != nil || p.noFaults != nil {
		return true
	}
	_, found := slices.BinarySearch(p.faults, addr)
	return found
}

// FaultsKnown returns nil if ExpectedFault has a table to look addr up in, and else
// why not.
func (k *Kernel) FaultsKnown(addr uint64) error {
	p, err := k.placesOf(addr)
	if err != nil {
		return err
	}
	return p.noFaults
}
