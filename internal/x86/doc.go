// Package x86 holds what a breakpoint engine must know about amd64
// instructions in 64-bit mode: where they end, what they do, whether they
// can be single-stepped, and how to step a copy of one somewhere else.
//
// It is pure Go, builds on every platform and knows nothing of hypervisors.
// Section numbers ("SDM 2A §2.1") refer to the Intel 64 and IA-32
// Architectures Software Developer's Manual.
//
// # Three ways past a breakpoint
//
// An engine that finds a vCPU stopped at its breakpoint has three ways to get
// past the instruction the breakpoint byte replaced, in order of preference:
//
//   - [Insn.Emulate] does the instruction's work on a [Regs] copy. The
//     breakpoint byte stays where it is and no other vCPU has to be held.
//   - [Insn.Relocate] gives the bytes for stepping a copy elsewhere, and
//     [Insn.FinishStep] removes the traces of the other address.
//   - Step in place: take the byte out, step, put it back. FinishStep with
//     from == to does the flag bookkeeping.
//
// [Insn.CanStep] says which instructions must not be stepped at all.
//
// # What is not modelled
//
// 16-bit and 32-bit code, CET shadow stacks (an emulated call pushes no shadow
// return address; engines must not emulate near calls and returns on a vCPU
// with CR4.CET and shadow stacks on), the trap that the guest's own TF raises
// after an instruction, and hardware breakpoints on emulated accesses.
package x86
