package qemutest

import (
	"bytes"
	"encoding/binary"
	"slices"
)

// The micro-kernel: an ELF file that QEMU enters by the PVH note in 32-bit mode
// (Xen's docs/misc/pvh.pandoc). It builds nothing: page tables and descriptors
// are in the image. Every vCPU then executes, in 64-bit mode at kernel addresses
// and with interrupts off, but for one function, what the test chooses as often as
// the test asks, and counts.
const (
	// KernelBase is where physical address 0 is mapped, for 1 GiB.
	KernelBase = 0xffffffff80000000

	imageBase = 0x200000 // physical; what follows are offsets from here
	codeOff   = 0x0000
	longOff   = 0x0400 // 64-bit code
	apOff     = 0x0700 // code that other vCPUs begin with
	targetOff = 0x0800 // the functions
	targetLen = 0x40
	// The handler of the timer's interrupt, behind them.
	handlerOff  = 0xf80
	timerVector = 0x20
	pml4Off     = 0x1000
	pdptOff     = 0x2000
	pdOff       = 0x3000
	pdAPICOff   = 0x4000
	gdtOff      = 0x5000
	dataOff     = 0x6000 // a block for each vCPU
	stackOff    = 0x8000 // the end of the first vCPU's; they grow down by 0x400
	ptOff       = 0x8000 // of the Arena
	imageLen    = 0x9000

	apicBase = 0xfee00000
	apBase   = 0x8000 // where a started vCPU begins, in real mode
)

// A block has what a vCPU and the test tell each other, at Data(vcpu).
const (
	dataLen   = 0x100
	offGoal   = 0x00 // how often to call the function, since the start
	offDone   = 0x08 // how often it was called
	offCount  = 0x10 // how often the probed instruction was executed
	offTarget = 0x18 // address of the function
	offReady  = 0x20 // 1 when the vCPU loops
	offSpare  = 0x28
	offIRQs   = 0x30 // how many interrupts came
	offIn     = 0x38 // of string functions: RCX, RSI, RDI, RAX, RFLAGS before
	offOut    = 0x60 // and RCX, RSI, RDI, RAX, and RFLAGS at offSpare, after
)

// The Arena is memory for tests, in 4 KiB pages of which none follows the one
// before it in physical memory, and each of ArenaMemory, at that physical address,
// is mapped twice. ArenaTable is the physical address of the page table.
const (
	Arena       = KernelBase + 24<<20
	ArenaLen    = 512 << 12
	ArenaMemory = 16 << 20
	ArenaTable  = imageBase + ptOff
)

// arenaFrame is the page of ArenaMemory that page i of the Arena shows.
func arenaFrame(i int) int {
	if i < 256 {
		return i * 5 % 256
	}
	return (i - 256) * 3 % 256
}

// Interrupted is the name of the function that runs with interrupts on: a timer
// interrupts its probed instruction, which is long, and the handler executes that
// as well, with another count.
const Interrupted = "rep lods, interrupted"

// A Function is code of the micro-kernel that a test may probe.
type Function struct {
	Name  string
	Probe int // offset of the instruction to be probed
	code  []byte
}

// inc counts in the block that RBX points to.
var inc = []byte{0x48, 0xff, 0x43, offCount}

// Functions are what a vCPU can call. Each executes its probed instruction once
// and counts that; "inc" is counted by the probed instruction itself.
var Functions = []Function{
	{"nop5", 0, cat([]byte{0x0f, 0x1f, 0x44, 0x00, 0x00}, inc, []byte{0xc3})},
	{"push", 0, cat([]byte{0x55}, inc, []byte{0x5d, 0xc3})},
	{"mov", 0, cat([]byte{0x48, 0x89, 0xf8}, inc, []byte{0xc3})},
	{"load", 0, cat([]byte{0x48, 0x8b, 0x43, offDone}, inc, []byte{0xc3})},
	{"store", 0, cat([]byte{0x48, 0x89, 0x43, offSpare}, inc, []byte{0xc3})},
	// call 1f; ret; 1: inc; ret
	{"call", 0, cat([]byte{0xe8, 1, 0, 0, 0, 0xc3}, inc, []byte{0xc3})},
	{"ret", 4, cat(inc, []byte{0xc3})},
	{"jmp", 0, cat([]byte{0xeb, 0x00}, inc, []byte{0xc3})},
	{"inc", 0, cat(inc, []byte{0xc3})},
	{"pushf", 0, cat([]byte{0x9c}, inc, []byte{0x58, 0xc3})},
	// cld; mov ecx,8; lea rsi,[rbx+80h]; lea rdi,[rbx+0c0h]; rep movsb
	{"rep movs", 20, cat([]byte{
		0xfc, 0xb9, 8, 0, 0, 0,
		0x48, 0x8d, 0xb3, 0x80, 0, 0, 0,
		0x48, 0x8d, 0xbb, 0xc0, 0, 0, 0,
		0xf3, 0xa4,
	}, inc, []byte{0xc3})},
}

// stringFunctions are repeated string instructions by their names, which take
// their registers from the block and leave them there.
var stringFunctions = []struct {
	name string
	code []byte
}{
	{"rep lodsb", []byte{0xf3, 0xac}},
	{"rep lodsl", []byte{0xf3, 0xad}},
	{"rep movsb", []byte{0xf3, 0xa4}},
	{"rep movsw", []byte{0x66, 0xf3, 0xa5}},
	{"rep movsq", []byte{0xf3, 0x48, 0xa5}},
	{"rep stosb", []byte{0xf3, 0xaa}},
	{"rep stosq", []byte{0xf3, 0x48, 0xab}},
	{"repne scasb", []byte{0xf2, 0xae}},
	{"repe scasw", []byte{0x66, 0xf3, 0xaf}},
	{"repe cmpsb", []byte{0xf3, 0xa6}},
	{"repne cmpsl", []byte{0xf2, 0xa7}},
	{"rep movsb, 32-bit", []byte{0x67, 0xf3, 0xa4}},
}

// Ordinary is how many of Functions, the first ones, execute their probed
// instruction once whatever the state of the block.
var Ordinary = len(Functions)

func init() {
	// With the timer of the local APIC, one shot; sti; cld; mov ecx,40000; 1: lea
	// rsi,[rbx+80h]; rep lodsb; inc; cli; no timer; ret. The handler calls 1.
	const timer = 0x380 // initial count (SDM 3A, "APIC Timer")
	apic := func(count uint32) []byte {
		return cat([]byte{0xb8}, le32(apicBase), []byte{0xc7, 0x80}, le32(timer), le32(count))
	}
	long := cat(apic(timerCount), []byte{0xfb, 0xfc, 0xb9}, le32(40000))
	inner := len(long)
	long = cat(long, []byte{0x48, 0x8d, 0xb3, 0x80, 0, 0, 0})
	probe := len(long)
	long = cat(long, []byte{0xf3, 0xac}, inc, []byte{0xfa}, apic(0), []byte{0xc3})
	Functions = append(Functions, Function{Interrupted, probe, long})
	innerOff = targetOff + (len(Functions)-1)*targetLen + inner

	for _, f := range stringFunctions {
		code := cat(
			[]byte{0x0f, 0x20, 0xd8, 0x0f, 0x22, 0xd8}, // mov rax,cr3; mov cr3,rax
			[]byte{0x48, 0x8b, 0x4b, offIn, 0x48, 0x8b, 0x73, offIn + 8, 0x48, 0x8b, 0x7b, offIn + 16, 0x48, 0x8b, 0x43, offIn + 24},
			[]byte{0xff, 0x73, offIn + 32, 0x9d}) // push [flags]; popf
		probe := len(code)
		code = cat(code, f.code,
			[]byte{0x48, 0x89, 0x4b, offOut, 0x48, 0x89, 0x73, offOut + 8, 0x48, 0x89, 0x7b, offOut + 16, 0x48, 0x89, 0x43, offOut + 24},
			[]byte{0x9c, 0x8f, 0x43, offSpare, 0xfc}, // pushf; pop [spare]; cld
			inc, []byte{0xc3})
		Functions = append(Functions, Function{f.name, probe, code})
	}
}

// timerCount is when the timer of Interrupted fires, in nanoseconds of the guest.
const timerCount = 30000

// innerOff is where the handler of its interrupt calls it.
var innerOff int

// Find returns the index of the function of a name.
func Find(name string) int {
	return slices.IndexFunc(Functions, func(f Function) bool { return f.Name == name })
}

// StringFunctions returns the indexes of those for [CPU.SetString].
func StringFunctions() (all []int) {
	for _, f := range stringFunctions {
		all = append(all, Find(f.name))
	}
	return all
}

// Target returns the address of function i of Functions, and that of its probe.
func Target(i int) (function, probe uint64) {
	function = KernelBase + imageBase + targetOff + uint64(i)*targetLen
	return function, function + uint64(Functions[i].Probe)
}

// IDT is where the micro-kernel's interrupt descriptor table would be.
const IDT = KernelBase + imageBase + gdtOff + 0x800

func cat(parts ...[]byte) []byte { return bytes.Join(parts, nil) }

func le32(v uint32) []byte { return binary.LittleEndian.AppendUint32(nil, v) }
func le64(v uint64) []byte { return binary.LittleEndian.AppendUint64(nil, v) }

// MicroKernel returns the ELF file.
func MicroKernel() []byte {
	img := make([]byte, imageLen)
	put := func(off int, parts ...[]byte) { copy(img[off:], cat(parts...)) }
	const (
		high    = KernelBase + imageBase
		gdtr    = gdtOff + 0x40
		idtr    = gdtOff + 0x50
		code64  = 0x08
		data    = 0x10
		code32  = 0x18
		common  = 0x20 // offset of what follows lgdt
		low64   = 0x80 // offset of the first 64-bit code
		trampSz = 0x80
	)
	// 32-bit entry, with flat segments.
	put(codeOff, []byte{0xfa, 0x0f, 0x01, 0x15}, le32(imageBase+gdtr), // cli; lgdt [gdtr]
		[]byte{0xea}, le32(imageBase+common), []byte{code32, 0}) // ljmp
	put(common,
		[]byte{0x66, 0xb8, data, 0, 0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0},       // mov ax,data; mov ds,es,ss
		[]byte{0x0f, 0x20, 0xe0, 0x0d}, le32(0x220), []byte{0x0f, 0x22, 0xe0}, // cr4 |= PAE, OSFXSR
		[]byte{0xb8}, le32(imageBase+pml4Off), []byte{0x0f, 0x22, 0xd8}, // cr3
		[]byte{0xb9}, le32(0xc0000080), []byte{0x0f, 0x32, 0x0d}, le32(0x100), []byte{0x0f, 0x30}, // EFER.LME
		[]byte{0x0f, 0x20, 0xc0, 0x0d}, le32(0x80000001), []byte{0x0f, 0x22, 0xc0}, // cr0 |= PG, PE
		[]byte{0xea}, le32(imageBase+low64), []byte{code64, 0})
	put(low64, []byte{0x48, 0xb8}, le64(high+longOff), []byte{0xff, 0xe0}) // jmp to kernel addresses

	// 64-bit code: RBX is the vCPU's block, by the APIC id.
	boot := cat(
		[]byte{0xb8, 1, 0, 0, 0, 0x0f, 0xa2, 0xc1, 0xeb, 24}, // cpuid(1); shr ebx,24
		[]byte{0x89, 0xd9},                                               // mov ecx,ebx
		[]byte{0xc1, 0xe3, 8},                                            // shl ebx,8 (dataLen)
		[]byte{0x48, 0xb8}, le64(high+dataOff), []byte{0x48, 0x01, 0xc3}, // add rbx,data
		[]byte{0x89, 0xc8, 0xc1, 0xe0, 10},                                // mov eax,ecx; shl eax,10
		[]byte{0x48, 0xbc}, le64(high+stackOff), []byte{0x48, 0x29, 0xc4}, // rsp = stack - eax
		[]byte{0x48, 0xb8}, le64(high+idtr), []byte{0x0f, 0x01, 0x18}, // lidt [rax]
		[]byte{0x85, 0xc9}, // test ecx,ecx
	)
	// The first vCPU copies the others' first code and starts them: INIT, then
	// SIPI to all but itself (SDM vol. 3, "MP Initialization").
	start := cat(
		[]byte{0x48, 0xc7, 0xc7}, le32(apBase), // mov rdi,apBase
		[]byte{0x48, 0xbe}, le64(high+apOff), // mov rsi,ap
		[]byte{0xb9}, le32(trampSz), []byte{0xf3, 0xa4}, // mov ecx; rep movsb
		[]byte{0xbf}, le32(apicBase), // mov edi,apic (zero-extended)
		[]byte{0xc7, 0x87}, le32(0x300), le32(0xc4500), // INIT, all but self
		[]byte{0xb9}, le32(200000), []byte{0xf3, 0x90, 0xff, 0xc9, 0x75, 0xfa}, // 1: pause; dec ecx; jnz 1b
		[]byte{0xc7, 0x87}, le32(0x300), le32(0xc4600|apBase>>12), // SIPI
	)
	boot = cat(boot, []byte{0x0f, 0x85}, le32(uint32(len(start))), start) // jnz past start
	loop := cat(
		[]byte{0x48, 0x8b, 0x43, offDone}, // mov rax,[done]
		[]byte{0x48, 0x3b, 0x43, offGoal}, // cmp rax,[goal]
		[]byte{0x72, 0x04},                // jb 1f
		[]byte{0xf3, 0x90, 0xeb, 0xf2},    // pause; jmp loop
		[]byte{0xff, 0x53, offTarget},     // 1: call [target]
		[]byte{0x48, 0xff, 0x43, offDone}, // inc [done]
		[]byte{0xeb, 0xe9},                // jmp loop
	)
	// The interrupt controllers of old are masked; the local APIC is on, its timer is
	// to divide by one and to fire once (SDM 3A, chapter "APIC").
	interrupts := cat(
		[]byte{0xb0, 0xff, 0xe6, 0x21, 0xe6, 0xa1, 0xbf}, le32(apicBase),
		[]byte{0xc7, 0x87}, le32(0x0f0), le32(0x1ff),
		[]byte{0xc7, 0x87}, le32(0x3e0), le32(0x0b),
		[]byte{0xc7, 0x87}, le32(0x320), le32(timerVector),
	)
	put(longOff, boot, interrupts, []byte{0x48, 0xc7, 0x43, offReady, 1, 0, 0, 0}, loop) // mov [ready],1
	// The handler: count; save; mov ecx,5; cld; call the inner part; EOI; restore.
	handler := cat([]byte{0x48, 0xff, 0x43, offIRQs, 0x50, 0x51, 0x56, 0xfc, 0xb9}, le32(5))
	handler = cat(handler, []byte{0xe8}, le32(uint32(innerOff-(handlerOff+len(handler)+5))),
		[]byte{0xb8}, le32(apicBase), []byte{0xc7, 0x80}, le32(0xb0), le32(0),
		[]byte{0x5e, 0x59, 0x58, 0x48, 0xcf})
	put(handlerOff, handler)
	// An interrupt gate (SDM 3A figure 7-8).
	gate := uint64(high + handlerOff)
	put(gdtOff+0x800+16*timerVector, le64(gate&0xffff|code64<<16|0x8e00<<32|gate>>16&0xffff<<48), le64(gate>>32))

	// Real mode, at apBase: to 32-bit mode, and into the common path.
	ap := cat(
		[]byte{0xfa, 0x31, 0xc0, 0x8e, 0xd8},                   // cli; xor ax,ax; mov ds,ax
		[]byte{0x0f, 0x01, 0x16, 0x60, apBase >> 8},            // lgdt [apBase+60h]
		[]byte{0x0f, 0x20, 0xc0, 0x0c, 0x01, 0x0f, 0x22, 0xc0}, // cr0 |= PE
		[]byte{0x66, 0xea}, le32(imageBase+common), []byte{code32, 0},
	)
	put(apOff, ap)
	put(apOff+0x60, []byte{0x3f, 0}, le32(imageBase+gdtOff))

	for i, f := range Functions {
		if len(f.code) > targetLen || targetOff+(i+1)*targetLen > handlerOff {
			panic("no room for " + f.Name)
		}
		put(targetOff+i*targetLen, f.code)
	}
	// Present, writable, accessed, dirty.
	const table, page = 0x63, 0xe3
	put(pml4Off, le64(imageBase+pdptOff|table))
	put(pml4Off+511*8, le64(imageBase+pdptOff|table))
	put(pdptOff, le64(imageBase+pdOff|table))
	put(pdptOff+3*8, le64(imageBase+pdAPICOff|table))
	put(pdptOff+510*8, le64(imageBase+pdOff|table))
	for i := range 512 {
		put(pdOff+8*i, le64(uint64(i)<<21|page))
	}
	put(pdOff+8*((Arena-KernelBase)>>21), le64(ArenaTable|table))
	for i := range 512 {
		put(ptOff+8*i, le64(uint64(ArenaMemory+arenaFrame(i)<<12|table)))
	}
	put(pdAPICOff+8*(apicBase>>21&511), le64(apicBase|page|0x18)) // not cached
	put(gdtOff, le64(0), le64(0x00af9b000000ffff), le64(0x00cf93000000ffff), le64(0x00cf9b000000ffff))
	put(gdtr, []byte{0x3f, 0}, le32(imageBase+gdtOff))
	put(idtr, []byte{0xff, 0x0f}, le64(IDT))
	for v := range maxVCPUs {
		f, _ := Target(0)
		put(dataOff+v*dataLen+offTarget, le64(f))
	}
	return elf(img)
}

// maxVCPUs is how many vCPUs have a block and a stack.
const maxVCPUs = 4

// elf wraps the image.
func elf(img []byte) []byte {
	const header, ph, noteOff, fileOff = 64, 56, 64 + 2*56, 0x1000
	// XEN_ELFNOTE_PHYS32_ENTRY (xen/include/public/elfnote.h).
	note := cat(le32(4), le32(8), le32(18), []byte("Xen\x00"), le64(imageBase))
	out := make([]byte, fileOff+len(img))
	copy(out, cat([]byte("\x7fELF\x02\x01\x01\x00"), make([]byte, 8),
		[]byte{2, 0, 62, 0}, le32(1), le64(imageBase), le64(header), le64(0), le32(0),
		[]byte{header, 0, ph, 0, 2, 0, 0, 0, 0, 0, 0, 0}))
	phdr := func(typ, flags uint32, off, addr, size, align uint64) []byte {
		return cat(le32(typ), le32(flags), le64(off), le64(addr), le64(addr), le64(size), le64(size), le64(align))
	}
	copy(out[header:], phdr(1, 7, fileOff, imageBase, uint64(len(img)), 0x1000))
	copy(out[header+ph:], phdr(4, 4, noteOff, 0, uint64(len(note)), 4))
	copy(out[noteOff:], note)
	copy(out[fileOff:], img)
	return out
}
