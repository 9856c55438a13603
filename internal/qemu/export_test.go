package qemu

import "time"

// SetSlice sets for how long a repeated instruction may keep the VM stopped, and
// returns a function that undoes it.
func SetSlice(d time.Duration) (undo func()) {
	old := slice
	slice = d
	return func() { slice = old }
}
