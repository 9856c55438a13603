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

// MayFault returns what tells whether an instruction may be executed elsewhere than in
// its place: the instructions for which it returns true may not, as the kernel may
// expect their faults. It returns nil if the kernel's exception table isn't among its
// symbols: then any access to memory may be one that is expected to fault. With force,
// the instructions that no table could be read for count as harmless.
func (k *Kernel) MayFault(force bool) func(addr uint64) bool {
	if _, err := k.symbol("__start___ex_table"); err != nil {
		return nil
	}
	return func(addr uint64) bool {
		if force && k.FaultsKnown(addr) != nil {
			return false // the caller takes the risk
		}
		return k.ExpectedFault(addr)
	}
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
