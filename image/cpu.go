package image

// Registers is a set of registers.
type Registers uint32

// Registers that a CPU may have.
const (
	CR0 Registers = 1 << iota
	CR2
	CR3
	CR4
	// EFER is deduced: no format has it. If the CPU is in a 64-bit mode, it has
	// LME, LMA and NXE (which every 64-bit kernel sets).
	EFER
	RIP
	RSP
	RFLAGS
	CS
	GSBase
	KernelGSBase
	IDTBase
	// PVContext: UserCR3, Traps and the callbacks.
	PVContext
)

// A CPU is the state of a CPU, as far as the image has it. Fields that aren't in Has
// are zero.
type CPU struct {
	ID  int // place in the file
	Has Registers
	// Offline: the guest doesn't use the CPU, and its registers mean nothing. Only
	// Xen's cores tell.
	Offline bool

	// CR3 is the physical address of the top-level page table, with its flags. For a
	// PV guest, a 32-bit one too, it is the machine address of the kernel's table,
	// and CR0 and CR4 are what Xen shows to the guest.
	CR0, CR2, CR3, CR4, EFER uint64

	RIP, RSP, RFLAGS uint64
	CS               uint16
	// GSBase is the base of the GS segment, KernelGSBase what SWAPGS would make it
	// (IA32_KERNEL_GS_BASE). Except for a few instructions at entry and exit, a Linux
	// kernel's per-CPU base is the former at CPL 0 and the latter at CPL 3. A 64-bit
	// PV kernel runs at CPL 3, too: for it, InKernel tells.
	GSBase, KernelGSBase uint64
	// IDTBase is the address of the interrupt descriptor table.
	IDTBase uint64

	// Bits is the address size that the guest's kernel runs with: 64 or 32, or 0 if
	// that can't be told.
	Bits int

	// InKernel says, for a PV guest, that the CPU was in the kernel.
	InKernel bool
	// UserCR3 is the machine address of the top-level page table for user
	// mode, which doesn't map the kernel; 0 if there is none. 64-bit PV guests
	// only.
	UserCR3 uint64
	// Traps are the handlers that a PV guest has set instead of an IDT.
	Traps []Trap
	// Where Xen enters a PV kernel. SyscallCallback is what LSTAR is elsewhere
	// (64-bit guests only).
	EventCallback, FailsafeCallback, SyscallCallback uint64
}

// A Trap is an entry of a PV guest's trap table (struct trap_info).
type Trap struct {
	Vector  uint8
	Flags   uint8 // bits 0 and 1: the privilege level that may raise it; bit 2: events are masked
	CS      uint16
	Address uint64
}

// maxCPUs is Xen's bound on the vCPUs of a domain (MAX_VIRT_CPUS,
// xen/include/public/xen.h).
const maxCPUs = 8192

const (
	cr0PG  = 1 << 31
	cr4PAE = 1 << 5

	// efer64 is LME, LMA and NXE.
	efer64 = 1<<8 | 1<<10 | 1<<11
)

// deduce fills in what CR0 and CR4 imply. long says that the CPU is in a 64-bit mode,
// if they allow that.
func (c *CPU) deduce(long bool) {
	switch {
	case c.CR0&cr0PG == 0: // not yet
	case c.CR4&cr4PAE != 0 && long:
		c.EFER, c.Bits = efer64, 64
		c.Has |= EFER
	default:
		c.Bits = 32
		c.Has |= EFER
	}
}

// prstatusCPU reads struct elf_prstatus, by its size: 336 bytes for 64-bit kernels,
// whose registers begin at 112, and 144 with registers at 72 for 32-bit ones (struct
// user_regs_struct, arch/x86/include/asm/user_{32,64}.h). Segment bases are left out:
// kdump's are the task's, not the CPU's.
func prstatusCPU(b []byte) (CPU, bool) {
	c := CPU{Has: RIP | RSP | RFLAGS | CS}
	switch len(b) {
	case 336:
		r := func(i int) uint64 { return le.Uint64(b[112+8*i:]) }
		c.RIP, c.CS, c.RFLAGS, c.RSP = r(16), uint16(r(17)), r(18), r(19)
	case 144:
		r := func(i int) uint64 { return uint64(le.Uint32(b[72+4*i:])) }
		c.RIP, c.CS, c.RFLAGS, c.RSP = r(12), uint16(r(13)), r(14), r(15)
	default:
		return CPU{}, false
	}
	return c, true
}

// qemuCPU reads QEMU's QEMUCPUState (target/i386/arch_dump.c), version 1:
//
//	  0  u32 version, u32 size
//	  8  u64 rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8 … r15
//	136  u64 rip, rflags
//	152  segments cs, ds, es, fs, gs, ss, ldt, tr, gdt, idt, each
//	     {u32 selector, limit, flags, pad; u64 base}
//	392  u64 cr0 … cr4
//	432  u64 kernel_gs_base, since QEMU 3.0
//
// long is what the ELF header says: that CPU 0 was in a 64-bit mode.
func qemuCPU(b []byte, long bool) (CPU, bool) {
	const (
		gs, idt = 4, 9
		size    = 432
	)
	if len(b) < size || le.Uint32(b) != 1 || uint64(le.Uint32(b[4:])) > uint64(len(b)) {
		return CPU{}, false
	}
	u := func(off int) uint64 { return le.Uint64(b[off:]) }
	base := func(seg int) uint64 { return u(152 + 24*seg + 16) }
	c := CPU{
		Has: CR0 | CR2 | CR3 | CR4 | RIP | RSP | RFLAGS | CS | GSBase | IDTBase,
		CR0: u(392), CR2: u(408), CR3: u(416), CR4: u(424),
		RSP: u(56), RIP: u(136), RFLAGS: u(144), CS: uint16(le.Uint32(b[152:])),
		GSBase: base(gs), IDTBase: base(idt),
	}
	if len(b) >= size+8 {
		c.KernelGSBase = u(size)
		c.Has |= KernelGSBase
	}
	c.deduce(long)
	return c, true
}
