package linux

import "slices"

// ExpectedFault reports whether the kernel expects that the instruction at addr, of its
// own or of a module's, may fault, and finds by that address how to go on (__ex_table:
// accesses to user memory, loads of segment registers, …). A copy of such an
// instruction at another address would crash the kernel when it faults. ExpectedFault
// is true where that isn't known: outside of all text, and if the table can't be read.
func (k *Kernel) ExpectedFault(addr uint64) bool {
	return k.expectedFault(addr, true)
}

// expectedFault is ExpectedFault that returns unknown where that isn't known.
func (k *Kernel) expectedFault(addr uint64, unknown bool) bool {
	p, err := k.placesOf(addr)
	if err != nil || p.noFaults != nil {
		return unknown
	}
	_, found := slices.BinarySearch(p.faults, addr)
	return found
}

// MayFault returns a function that reports whether the instruction at an address must
// not be executed as a copy elsewhere, because the kernel may expect its fault. It
// returns nil if the exception table isn't among the kernel's symbols: then any access
// to memory may be expected to fault. With force, instructions whose table can't be
// read count as harmless.
func (k *Kernel) MayFault(force bool) func(addr uint64) bool {
	if _, err := k.symbol("__start___ex_table"); err != nil {
		return nil
	}
	// With force the caller takes the risk.
	return func(addr uint64) bool { return k.expectedFault(addr, !force) }
}

// FaultsKnown returns nil if ExpectedFault has a table to look addr up in, otherwise
// why not.
func (k *Kernel) FaultsKnown(addr uint64) error {
	p, err := k.placesOf(addr)
	if err != nil {
		return err
	}
	return p.noFaults
}
