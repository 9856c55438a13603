package x86

// Branches reports whether the instruction can lead elsewhere than to the next
// one: jumps, calls and returns, taken or not.
func (in *Insn) Branches() bool { return in.isBranchRel() || in.setsIP() }
