package linux

import (
	"fmt"
	"slices"

	"github.com/vmprobes/vmprobes/internal/x86"
	"github.com/vmprobes/vmprobes/sysmap"
)

// kernelText is the text of the kernel, or of it and its modules: its symbols, and how
// it is read.
type kernelText struct {
	syms *sysmap.Map
	// read reads len(b) bytes at addr, or only the first n and says why. Breakpoints
	// of the caller's own don't show in them where instructions are decoded.
	read func(addr uint64, b []byte) (n int, err error)
}

// A function is the code of one function.
type function struct {
	name  string
	start uint64
	code  []byte
}

// maxFunction bounds what is decoded. The longest function of Debian's 6.12, do_jit,
// has 14,656 bytes.
const maxFunction = 1 << 20

// functionAt reads the function that addr is in, to its end.
func (t kernelText) functionAt(addr uint64) (f function, err error) {
	sym, off, ok := t.syms.Find(addr)
	if !ok {
		return f, fmt.Errorf("%#x: %w: no symbol covers it", addr, ErrUnknownPlaces)
	}
	if off > maxFunction {
		return f, fmt.Errorf("%#x: %w: %#x bytes after %q, the nearest symbol", addr, ErrUnknownPlaces, off, sym.Name)
	}
	end, ok := t.syms.FuncEnd(addr)
	if !ok || end <= addr {
		end = addr + 1
	}
	f = function{sym.Name, sym.Addr, make([]byte, min(end-sym.Addr, maxFunction+x86.MaxLen))}
	n, err := t.read(f.start, f.code)
	if uint64(n) <= off {
		return f, fmt.Errorf("%#x: %w: the code of %q can't be read: %w", addr, ErrUnknownPlaces, f.name, err)
	}
	f.code = f.code[:n]
	return f, nil
}

// boundary returns nil if addr is the start of an instruction: see [Kernel.Boundary].
func (t kernelText) boundary(addr uint64) error {
	if sym, off, ok := t.syms.Find(addr); ok && off == 0 && sym.Addr == addr {
		return nil
	}
	f, err := t.functionAt(addr)
	if err != nil {
		return err
	}
	return f.boundary(addr)
}

func (f *function) boundary(addr uint64) error {
	if err := x86.FindBoundary(f.code, f.start, addr); err != nil {
		return fmt.Errorf("%w: %q: %w", ErrNotProbeable, f.name, err)
	}
	// An int3 on the way that isn't padding hides the first byte of an instruction: it
	// is a probe of the guest's own, or the kernel is rewriting the text.
	padding := false
	for at := f.start; at < addr; {
		in, err := x86.Decode(f.code[at-f.start:])
		if err != nil {
			return fmt.Errorf("%w: %q: %w", ErrNotProbeable, f.name, err)
		}
		if in.IsInt3() && !padding {
			return fmt.Errorf("%#x: %w: a breakpoint of the guest's own at %q+%#x hides where instructions begin", addr, ErrNotProbeable, f.name, at-f.start)
		}
		padding = in.IsInt3() || leaves(in.Bytes())
		at += uint64(in.Len)
	}
	return nil
}

// prefixes are those that leave a branch the same branch: CS, DS, operand size, REPNE
// and REP (SDM 2A, 2.1.1).
var prefixes = []byte{0x2e, 0x3e, 0x66, 0xf2, 0xf3}

// bare returns an instruction without its prefixes, as far as a branch may have them.
func bare(b []byte) []byte {
	for len(b) > 1 && (slices.Contains(prefixes, b[0]) || b[0]&0xf0 == 0x40) {
		b = b[1:]
	}
	return b
}

// leaves reports whether the processor never goes on past an instruction,
// so that int3 there stop speculation or are padding (SDM 2A and 2B: RET, IRET, JMP,
// HLT, UD0 to UD2, SYSRET, SYSEXIT).
func leaves(b []byte) bool {
	b = bare(b)
	switch b[0] {
	case 0xc2, 0xc3, 0xca, 0xcb, 0xcf, 0xe9, 0xeb, 0xf4:
		return true
	case 0xff:
		return len(b) > 1 && (b[1]>>3&7 == 4 || b[1]>>3&7 == 5)
	case 0x0f:
		return len(b) > 1 && slices.Contains([]byte{0x07, 0x0b, 0x35, 0xb9, 0xff}, b[1])
	}
	return false
}

// target returns where the direct branch at addr leads, if b is one (SDM 2A: Jcc, JMP,
// CALL, LOOP, JCXZ).
func target(addr uint64, b []byte) (uint64, bool) {
	next := addr + uint64(len(b))
	for len(b) > 1 && slices.Contains(prefixes, b[0]) {
		b = b[1:]
	}
	switch op := b[0]; {
	case len(b) == 2 && (op&0xf0 == 0x70 || op == 0xeb || op >= 0xe0 && op <= 0xe3):
		return next + uint64(int64(int8(b[1]))), true
	case len(b) == 5 && (op == 0xe8 || op == 0xe9):
		return next + uint64(int64(int32(le32(b[1:])))), true
	case len(b) == 6 && op == 0x0f && b[1]&0xf0 == 0x80:
		return next + uint64(int64(int32(le32(b[2:])))), true
	}
	return 0, false
}
