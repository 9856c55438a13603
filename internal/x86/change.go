package x86

import (
	"errors"
	"fmt"
)

// changeableFlags are the bits of RFLAGS that a change may touch: the status flags,
// DF, IF, AC and ID. TF would trap into the guest, RF, NT, VM, VIF, VIP and IOPL are
// the kernel's, and a processor refuses to run with any other changed (SDM 3C
// §27.3.1.4, Checks on Guest RIP, RFLAGS, and SSP).
const changeableFlags = arithFlags | FlagDF | FlagIF | FlagAC | FlagID

// CheckChange returns an error if a vCPU in kernel mode whose registers are before
// can't be given those of r: RIP and RSP must be canonical (48 bits, or 57 with
// la57), and most bits of RFLAGS, CS, SS, the segment bases and CR3 must be as they
// were.
func (r *Regs) CheckChange(before *Regs, la57 bool) error {
	switch {
	case !isCanonical(r.IP, la57):
		return fmt.Errorf("RIP %#x is not canonical", r.IP)
	case !isCanonical(r.SP, la57):
		return fmt.Errorf("RSP %#x is not canonical", r.SP)
	case (r.Flags^before.Flags)&^changeableFlags != 0:
		return fmt.Errorf("RFLAGS %#x, was %#x: only %#x can be changed", r.Flags, before.Flags, uint64(changeableFlags))
	case r.CS != before.CS, r.SS != before.SS:
		return errors.New("CS or SS was changed")
	case r.FSBase != before.FSBase, r.GSBase != before.GSBase, r.CR3 != before.CR3:
		return errors.New("the FS base, the GS base or CR3 was changed")
	}
	return nil
}

// isCanonical reports whether all bits of addr from the highest that is translated
// are the same (SDM 1 §3.3.7.1).
func isCanonical(addr uint64, la57 bool) bool {
	bits := 48
	if la57 {
		bits = 57
	}
	top := int64(addr) >> (bits - 1)
	return top == 0 || top == -1
}
