package linux

import (
	"errors"
	"fmt"

	"github.com/vmprobes/vmprobes/internal/x86"
)

// asksCurrent are functions of every kernel that have to do with the task that calls them
// before anything else (kernel/sys.c): with the names that wrappers of system calls have
// had since 4.17, and before.
var asksCurrent = []string{
	"__x64_sys_getpid", "__x64_sys_gettid", "__x64_sys_getuid", "__x64_sys_geteuid", "__x64_sys_getgid", "__x64_sys_getegid",
	"__ia32_sys_getpid", "__ia32_sys_gettid", "sys_getpid", "sys_gettid", "SyS_getpid", "SyS_gettid",
}

const (
	enoughAgree = 3  // of asksCurrent
	maxPrologue = 12 // instructions of one until it reads current
)

// currentByCode returns the address of the per-CPU variable current_task of a 64-bit
// kernel, without its base, from the code of functions that read it.
func (k *Kernel) currentByCode() (uint64, error) {
	if a := k.currentAddr.Load(); a != nil {
		return *a, nil
	}
	if k.bits != 64 {
		return 0, fmt.Errorf("of a kernel of %d bits: %w", k.bits, errors.ErrUnsupported)
	}
	seen := make(map[uint64]int)
	for _, name := range asksCurrent {
		sym, err := k.syms.Lookup(name)
		if err != nil {
			continue
		}
		if at, ok := k.readsGS(sym.Addr); ok {
			seen[at]++
		}
	}
	for at, n := range seen {
		if n >= enoughAgree && len(seen) == 1 {
			k.currentAddr.Store(&at)
			k.explainFrom(Inferred, "current task", nil, fmt.Sprintf("%d functions that ask for it read it there", n), "per-CPU variable at %#x", at)
			return at, nil
		}
	}
	return 0, fmt.Errorf("%w: the code of getpid and the like reads %d different per-CPU variables first", ErrNotInferred, len(seen))
}

// readsGS returns what the first instruction of a function that reads a word at a fixed
// place behind GS reads: MOV r64, GS:[disp32] or GS:[RIP+disp32] (SDM vol. 2, 2.1.5 and
// 2.2.1.6).
func (k *Kernel) readsGS(addr uint64) (at uint64, ok bool) {
	const (
		gs, movLoad = 0x65, 0x8b
		canary      = 0x28 // of the stack protector
	)
	for range maxPrologue {
		var b [x86.MaxLen]byte
		if k.Read(addr, b[:]) != nil {
			return 0, false
		}
		in, err := x86.Decode(b[:])
		if err != nil {
			return 0, false
		}
		c := in.Bytes()
		if len(c) >= 8 && c[0] == gs && c[1]&0xf8 == 0x48 && c[2] == movLoad {
			disp := uint64(int64(int32(le32(c[len(c)-4:]))))
			switch modrm := c[3] & 0xc7; {
			case modrm == 0x05 && len(c) == 8:
				return addr + uint64(in.Len) + disp, true
			case modrm == 0x04 && len(c) == 9 && c[4] == 0x25 && disp != canary:
				return disp, true
			}
		}
		if in.Branches() && c[0] != 0xe8 { // but for the call of ftrace
			return 0, false
		}
		addr += uint64(in.Len)
	}
	return 0, false
}
