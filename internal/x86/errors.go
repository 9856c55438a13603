package x86

import "errors"

var (
	// ErrTruncated means that the bytes end before the instruction does.
	ErrTruncated = errors.New("x86: truncated instruction")
	// ErrInvalid means that no instruction begins with these bytes in 64-bit mode.
	ErrInvalid = errors.New("x86: invalid instruction")
	// ErrNotEmulated means that the instruction, or this instance of it with
	// these registers, is outside what Emulate does. Nothing was changed.
	ErrNotEmulated = errors.New("x86: instruction is not emulated")
	// ErrNotSteppable means that the instruction must not be executed with TF set.
	ErrNotSteppable = errors.New("x86: instruction cannot be single-stepped")
	// ErrNotRelocatable means that a copy of the instruction at another
	// address would do something else.
	ErrNotRelocatable = errors.New("x86: instruction cannot be relocated")
	// ErrRange means that a relocated RIP-relative operand is out of reach.
	ErrRange = errors.New("x86: operand out of range of the new address")
	// ErrNotBoundary means that an address is inside an instruction.
	ErrNotBoundary = errors.New("x86: not an instruction boundary")
	// ErrStepLost means that a step ended where the instruction cannot lead:
	// an interrupt or exception was taken instead.
	ErrStepLost = errors.New("x86: step ended at an unexpected address")
)
