package xentest

import (
	"encoding/binary"
	"fmt"
)

// Offsets in a vCPU's page, which its GS base points to.
const (
	pcSelf   = 0x000 // the page's own address
	pcOwn    = 0x008 // return address of the guest's int3
	pcInit   = 0x100 // registers at the top of the main loop
	pcExpect = 0x180 // registers at its end
	pcCount  = 0x300 // counters
	pcBuffer = 0x800 // 256 bytes
	// struct vcpu_info, as registered with Xen
	pcVCPUInfo = 0xa00
)

// Offsets in the data area.
const (
	dConst   = 0x000 // random constants
	dInc     = 0x200 // incremented by inc_mem
	dXadd    = 0x208 // by lock_xadd
	dPointer = 0x210 // address of a function
	dIDT     = 0x1000
)

// Counters that are not a function's.
const (
	ctrMain = iota
	ctrIRQ
	ctrInt3
	ctrFirst
	ctrMax = 128
)

// An Insn is an instruction of the guest's kernel.
type Insn struct {
	VA    uint64
	Bytes []byte
	Func  string // the symbol that it is in
}

// A Symbol is a function of the guest's kernel.
type Symbol struct {
	Name string
	VA   uint64
	Size uint64

	counter int
	of      string // the function that it is a part of
}

type fixup struct {
	at, size int
	label    string
}

// program is the guest's kernel text, as it is assembled.
type program struct {
	cfg    *Config
	b      []byte
	labels map[string]int
	fixups []fixup
	insns  []Insn
	syms   []Symbol
	gaps   []Symbol
	nctr   int
	funcs  []function
	own    []uint64 // addresses of the guest's own int3
}

func (p *program) here() uint64 { return TextBase + uint64(len(p.b)) }

func (p *program) raw(b ...byte) { p.b = append(p.b, b...) }

// i adds one instruction.
func (p *program) i(b ...byte) {
	n := len(p.syms) - 1
	p.insns = append(p.insns, Insn{p.here(), b, p.syms[n].Name})
	p.raw(b...)
	p.syms[n].Size = p.here() - p.syms[n].VA
}

func d32(v uint64) []byte { return binary.LittleEndian.AppendUint32(nil, uint32(v)) }

func cat(b []byte, more ...byte) []byte { return append(b, more...) }

// abs adds an instruction that ends in a 32-bit absolute number.
func (p *program) abs(v uint64, b ...byte) { p.i(cat(b, d32(v)...)...) }

// rip adds an instruction that ends in a RIP-relative displacement to va.
func (p *program) rip(va uint64, b ...byte) {
	p.i(cat(b, d32(va-(p.here()+uint64(len(b))+4))...)...)
}

// to adds a jump or call: the opcode and size bytes of displacement.
func (p *program) to(label string, size int, b ...byte) {
	p.i(cat(b, make([]byte, size)...)...)
	p.fixups = append(p.fixups, fixup{len(p.b) - size, size, label})
}

func (p *program) label(l string) { p.labels[l] = len(p.b) }

func (p *program) call(l string) { p.to(l, 4, 0xe8) }

func (p *program) align(n int) {
	for len(p.b)%n != 0 {
		p.raw(0xcc)
	}
}

// fn begins a function that counts by itself.
func (p *program) fn(name string) int {
	c := p.counter()
	p.sub(name, c)
	p.funcs = append(p.funcs, function{name: name, entered: c, returned: c, unwound: never, died: never})
	return c
}

// counter makes one more counter.
func (p *program) counter() int {
	p.nctr++
	if p.nctr > ctrMax {
		panic("xentest: too many functions")
	}
	return p.nctr - 1
}

// sub begins a function that is executed in proportion to another's counter.
func (p *program) sub(name string, counter int) {
	if len(p.syms)%4 == 3 { // dead code now and then
		p.gap()
	}
	p.align(16)
	p.label(name)
	p.syms = append(p.syms, Symbol{name, p.here(), 0, counter, name})
}

func (p *program) gap() {
	va := p.here()
	for range 320 {
		p.raw(0xcc)
	}
	p.gaps = append(p.gaps, Symbol{Name: "gap", VA: va, Size: 320})
}

// count increments a counter of the vCPU.
func (p *program) count(ctr int) {
	p.abs(pcCount+8*uint64(ctr), 0x65, 0x48, 0xff, 0x04, 0x25)
}

// mix folds rax into rbx: rbx = rbx*5 + rax.
func (p *program) mix() {
	p.i(0x48, 0x8d, 0x1c, 0x9b) // lea (%rbx,%rbx,4),%rbx
	p.i(0x48, 0x01, 0xc3)       // add %rax,%rbx
}

func (p *program) ret() { p.i(0xc3) }

// gsReg is "op %reg, %gs:off" (mov 89/8b, cmp 3b).
func (p *program) gsReg(op byte, reg int, off uint64) {
	rex := byte(0x48) | byte(reg>>3)<<2
	p.abs(off, 0x65, rex, op, 0x04|byte(reg&7)<<3, 0x25)
}

func (p *program) pushReg(r int) {
	if r >= 8 {
		p.i(0x41, 0x50|byte(r&7))
		return
	}
	p.i(0x50 | byte(r))
}

func (p *program) popReg(r int) {
	if r >= 8 {
		p.i(0x41, 0x58|byte(r&7))
		return
	}
	p.i(0x58 | byte(r))
}

func (p *program) link() {
	for _, f := range p.fixups {
		t, ok := p.labels[f.label]
		if !ok {
			panic("xentest: no label " + f.label)
		}
		d := int64(t - f.at - f.size)
		if f.size == 1 {
			if int64(int8(d)) != d {
				panic("xentest: jump too far to " + f.label)
			}
			p.b[f.at] = byte(d)
		} else {
			binary.LittleEndian.PutUint32(p.b[f.at:], uint32(d))
		}
	}
	for i := range p.insns { // the listing has the displacements too
		o := p.insns[i].VA - TextBase
		p.insns[i].Bytes = p.b[o : o+uint64(len(p.insns[i].Bytes))]
	}
}

func (p *program) addr(label string) uint64 { return TextBase + uint64(p.labels[label]) }

// generalRegs is every register but the stack pointer.
var generalRegs = []int{rbx, rbp, r12, r13, r14, r15, r8, r9, r10, r11, rsi, rdi, rdx, rcx, rax}

// assemble writes the guest's kernel. Control flow depends on nothing but the
// text, so that every instruction of a function is executed a fixed number of
// times per call; what the functions compute ends up in the registers, which
// the end of the main loop compares with what they must be.
func assemble(cfg *Config) *program {
	p := &program{cfg: cfg, labels: map[string]int{}, nctr: ctrFirst}
	funcs := p.functions()
	if cfg.Returns {
		funcs = append(funcs, p.returning()...)
	}

	p.sub("main", ctrMain)
	for _, r := range generalRegs {
		p.gsReg(0x8b, r, pcInit+8*uint64(r))
	}
	for _, f := range funcs {
		p.call(f)
	}
	p.label("check")
	p.gsReg(0x3b, rsp, pcExpect+8*rsp)
	p.to("bad", 4, 0x0f, 0x85)
	for _, r := range generalRegs {
		p.gsReg(0x3b, r, pcExpect+8*uint64(r))
		p.to("bad", 4, 0x0f, 0x85) // jne
	}
	p.count(ctrMain)
	p.to("main", 4, 0xe9)
	p.sub("bad", ctrMain)
	p.i(0x0f, 0x0b)

	pv := cfg.Kind == PV
	p.sub("event_entry", ctrIRQ)
	if pv {
		p.popReg(rcx)
		p.popReg(r11)
	} else {
		p.i(0xfc) // cld
	}
	for _, r := range generalRegs {
		p.pushReg(r)
	}
	p.count(ctrIRQ)
	for _, f := range []string{"nop5", "push_rbp", "sub_rsp", "xor_test", "call_leaf", "jumps", "mov_riprel", "rep_stosb", "inc_mem", "lea_rip"} {
		p.call(f)
	}
	if cfg.Returns {
		p.recurse()
	}
	for i := range generalRegs {
		p.popReg(generalRegs[len(generalRegs)-1-i])
	}
	p.iret()

	p.sub("int3_entry", ctrInt3)
	if pv {
		p.popReg(rcx)
		p.popReg(r11)
	}
	p.pushReg(rax)
	p.count(ctrInt3)
	p.i(0x48, 0x8b, 0x44, 0x24, 0x08) // mov 8(%rsp),%rax
	p.gsReg(0x3b, rax, pcOwn)
	p.to("bad", 4, 0x0f, 0x85)
	p.popReg(rax)
	p.iret()
	p.gap()

	p.link()
	if len(p.b) > textSize {
		panic("xentest: text too large")
	}
	return p
}

// iret returns from a handler: in a PV guest by the hypercall.
func (p *program) iret() {
	if p.cfg.Kind != PV {
		p.i(0x48, 0xcf)
		return
	}
	p.i(0x6a, 0x00) // push $0: flags
	p.pushReg(rcx)
	p.pushReg(r11)
	p.pushReg(rax)
	p.i(0xb8, 23, 0, 0, 0) // mov $__HYPERVISOR_iret,%eax
	p.i(0x0f, 0x05)
}

// functions writes what the main loop calls, and returns the names in order.
func (p *program) functions() (names []string) {
	fn := func(name string) int {
		names = append(names, name)
		return p.fn(name)
	}

	c := fn("nop5")
	p.i(0x0f, 0x1f, 0x44, 0x00, 0x00)
	p.i(0x55)             // push %rbp
	p.i(0x48, 0x89, 0xe5) // mov %rsp,%rbp
	p.count(c)
	p.i(0x48, 0x8d, 0x44, 0x40, 0x11) // lea 0x11(%rax,%rax,2),%rax
	p.mix()
	p.i(0x5d)
	p.ret()

	c = fn("endbr")
	p.i(0xf3, 0x0f, 0x1e, 0xfa)
	p.i(0x0f, 0x1f, 0x44, 0x00, 0x00)
	p.count(c)
	p.i(0x48, 0x31, 0xd3)       // xor %rdx,%rbx
	p.i(0x48, 0xc1, 0xc3, 0x07) // rol $7,%rbx
	p.ret()

	c = fn("push_rbp")
	p.i(0x55)
	p.i(0x48, 0x89, 0xe5)
	p.i(0x48, 0x83, 0xec, 0x20)
	p.i(0x48, 0x89, 0x7c, 0x24, 0x08) // mov %rdi,8(%rsp)
	p.i(0x41, 0x54)                   // push %r12
	p.count(c)
	p.i(0x48, 0x8b, 0x4d, 0xe8) // mov -24(%rbp),%rcx
	p.i(0x48, 0x01, 0xcb)
	p.i(0x41, 0x5c)
	p.i(0xc9) // leave
	p.ret()

	c = fn("push_r12")
	p.i(0x41, 0x54)
	p.i(0x53)
	p.i(0x49, 0x89, 0xfc) // mov %rdi,%r12
	p.count(c)
	p.i(0x49, 0x81, 0xc4, 0x78, 0x56, 0x34, 0x12) // add $0x12345678,%r12
	p.i(0x4c, 0x89, 0xe0)                         // mov %r12,%rax
	p.i(0x5b)
	p.i(0x41, 0x5c)
	p.mix()
	p.ret()

	c = fn("sub_rsp")
	p.i(0x48, 0x83, 0xec, 0x18)
	p.i(0x48, 0x89, 0x44, 0x24, 0x10) // mov %rax,16(%rsp)
	p.count(c)
	p.i(0x48, 0x8b, 0x54, 0x24, 0x10) // mov 16(%rsp),%rdx
	p.i(0x48, 0x83, 0xc4, 0x18)
	p.ret()

	c = fn("sub_rsp32")
	p.i(0x48, 0x81, 0xec, 0x88, 0x00, 0x00, 0x00)
	p.i(0x48, 0xc7, 0x04, 0x24, 0x2a, 0x00, 0x00, 0x00) // movq $42,(%rsp)
	p.count(c)
	p.i(0x48, 0x03, 0x04, 0x24) // add (%rsp),%rax
	p.i(0x48, 0x81, 0xc4, 0x88, 0x00, 0x00, 0x00)
	p.ret()

	c = fn("xor_test")
	p.i(0x31, 0xc0)                 // xor %eax,%eax
	p.to("xor_test.1", 1, 0x74)     // je
	p.i(0x0f, 0x0b)                 // ud2
	p.label("xor_test.1")           //
	p.to("bad", 4, 0x0f, 0x85)      // jne
	p.i(0x48, 0x85, 0xe4)           // test %rsp,%rsp
	p.to("bad", 4, 0x0f, 0x84)      // je
	p.to("xor_test.2", 1, 0x75)     // jne
	p.i(0x0f, 0x0b)                 //
	p.label("xor_test.2")           //
	p.count(c)                      //
	p.i(0x0f, 0x95, 0xc0)           // setne %al
	p.i(0x45, 0x31, 0xc0)           // xor %r8d,%r8d
	p.i(0x48, 0x0f, 0x44, 0xc3)     // cmove %rbx,%rax
	p.i(0x49, 0x0f, 0xba, 0xe8, 21) // bts $21,%r8
	p.mix()
	p.ret()

	c = fn("test_entry")
	p.i(0x48, 0x85, 0xff) // test %rdi,%rdi
	p.i(0x0f, 0x95, 0xc0) // setne %al
	p.i(0x0f, 0x98, 0xc4) // sets %ah
	p.count(c)
	p.i(0x0f, 0xb7, 0xc0) // movzwl %ax,%eax
	p.mix()
	p.ret()

	c = p.fn("leaf")
	p.i(0x48, 0xff, 0xc3) // inc %rbx
	p.count(c)
	p.ret()
	c = fn("call_leaf")
	p.call("leaf")
	p.count(c)
	p.call("bare_ret")
	p.i(0x48, 0x8d, 0x05, 0xf9, 0xff, 0xff, 0xff) // lea -7(%rip),%rax: its own address
	p.i(0xff, 0x15)                               // call *(%rip): completed below
	p.unfinished(DataBase + dPointer)
	p.mix()
	p.ret()
	p.plain("bare_ret", c)
	p.ret()
	p.plain("indirect", c)
	p.i(0x48, 0x83, 0xc0, 0x01)
	p.i(0xf3, 0xc3) // rep ret

	c = fn("jumps")
	p.to("jumps.1", 1, 0xeb)
	p.i(0x0f, 0x0b)
	p.label("jumps.1")
	p.count(c)
	p.to("jumps.2", 4, 0xe9)
	p.i(0x0f, 0x0b)
	p.label("jumps.2")
	p.i(0xb9, 0x05, 0x00, 0x00, 0x00) // mov $5,%ecx
	p.label("jumps.3")
	p.i(0x48, 0x8d, 0x1c, 0x0b) // lea (%rbx,%rcx),%rbx
	p.i(0xff, 0xc9)             // dec %ecx
	p.to("jumps.3", 1, 0x75)
	p.to("jumps.4", 1, 0xe3) // jrcxz
	p.i(0x0f, 0x0b)
	p.label("jumps.4")
	p.to("jumps.5", 4, 0xe9) // a tail call
	p.label("jumps.5")
	p.ret()

	c = fn("lea_rip")
	p.rip(DataBase+dConst, 0x48, 0x8d, 0x35) // lea const(%rip),%rsi
	p.i(0x48, 0x8b, 0x46, 0x18)              // mov 24(%rsi),%rax
	p.count(c)
	p.i(0x48, 0x33, 0x44, 0x0e, 0x08) // xor 8(%rsi,%rcx),%rax
	p.mix()
	p.ret()
	// rcx is 0 after jumps only; see main's order and the handler's.

	c = fn("lea_rsp")
	p.i(0x48, 0x8d, 0x44, 0x24, 0x08) // lea 8(%rsp),%rax
	p.i(0x4c, 0x8d, 0x14, 0x25, 0x78, 0x56, 0x34, 0x12)
	p.count(c)
	p.mix()
	p.ret()

	c = fn("mov_riprel")
	p.rip(DataBase+dConst+8, 0x48, 0x8b, 0x05)                                            // mov const(%rip),%rax
	p.i(0x48, 0x69, 0xc0, 0x67, 0x45, 0x23, 0x01)                                         // imul $..,%rax,%rax
	p.count(c)                                                                            //
	p.ripImm(DataBase+dConst+0x20, []byte{0x48, 0x81, 0x3d}, []byte{0xef, 0xcd, 0xab, 1}) // cmpq $..,const(%rip)
	p.to("mov_riprel.1", 1, 0x75)                                                         // never equal
	p.i(0x0f, 0x0b)
	p.label("mov_riprel.1")
	p.mix()
	p.ret()

	c = fn("mov_rsp")
	p.i(0x48, 0x8b, 0x04, 0x24)       // mov (%rsp),%rax: the return address
	p.i(0x48, 0x89, 0x44, 0x24, 0xe0) // mov %rax,-32(%rsp)
	p.count(c)
	p.mix()
	p.i(0x48, 0xb8, 0xf0, 0xde, 0xbc, 0x9a, 0x78, 0x56, 0x34, 0x12) // movabs
	p.ret()

	c = fn("inc_mem")
	p.rip(DataBase+dInc, 0x48, 0xff, 0x05) // incq inc(%rip)
	p.count(c)
	p.ret()

	c = fn("lock_xadd")
	p.i(0xb8, 0x01, 0x00, 0x00, 0x00)
	p.rip(DataBase+dXadd, 0xf0, 0x48, 0x0f, 0xc1, 0x05) // lock xadd %rax,xadd(%rip)
	p.count(c)
	p.i(0x31, 0xc0)
	p.ret()

	c = fn("cpuid")
	p.i(0x0f, 0xa2)
	p.count(c)
	p.i(0x48, 0x01, 0xcb)
	p.mix()
	p.ret()

	c = fn("rdtsc")
	p.i(0x0f, 0x31)
	p.count(c)
	p.i(0x31, 0xc0)
	p.i(0x31, 0xd2)
	p.i(0x48, 0x39, 0xc0) // cmp %rax,%rax
	p.ret()

	c = fn("rep_stosb")
	p.gsReg(0x8b, rdi, pcSelf)
	p.i(0x48, 0x81, 0xc7, 0x00, 0x08, 0x00, 0x00) // add $pcBuffer,%rdi
	p.i(0xb0, 0x5a)                               // mov $0x5a,%al
	p.i(0xb9, 0x18, 0x00, 0x00, 0x00)             // mov $24,%ecx
	p.i(0xf3, 0xaa)
	p.count(c)
	p.i(0x48, 0x8b, 0x47, 0xf8) // mov -8(%rdi),%rax
	p.i(0x0f, 0xb6, 0x57, 0xff) // movzbl -1(%rdi),%edx
	p.i(0x48, 0x0f, 0xaf, 0xd0) // imul %rax,%rdx
	p.mix()
	p.ret()

	c = fn("pushf")
	p.i(0x9c)
	p.i(0x58)
	p.i(0x25, 0x00, 0x01, 0x00, 0x00) // and $TF,%eax
	p.to("bad", 4, 0x0f, 0x85)
	p.i(0x48, 0x83, 0xf8, 0x07) // cmp $7,%rax
	p.i(0x9c)
	p.i(0x58)
	p.i(0x25, 0xd5, 0x08, 0x00, 0x00) // and $arithmetic,%eax
	p.count(c)
	p.mix()
	p.i(0x9c)
	p.i(0x48, 0x83, 0x0c, 0x24, 0x01) // orq $CF,(%rsp)
	p.i(0x9d)
	p.i(0x0f, 0x92, 0xc0) // setc %al
	p.i(0x0f, 0xb6, 0xc0)
	p.mix()
	p.ret()

	c = fn("popf")
	p.i(0x9c)
	p.i(0x9d)
	p.count(c)
	p.i(0x48, 0xc1, 0xeb, 0x03) // shr $3,%rbx
	p.ret()

	c = fn("own_int3")
	p.i(0x0f, 0x1f, 0x44, 0x00, 0x00)
	p.own = append(p.own, p.here())
	p.i(0xcc)
	p.count(c)
	p.i(0x48, 0x83, 0xc3, 0x03)
	p.ret()

	c = fn("nops")
	p.i(0x66, 0x90)
	p.i(0x90)
	p.i(0x0f, 0x1f, 0x00)
	p.i(0x0f, 0x1f, 0x40, 0x00)
	p.i(0x0f, 0x1f, 0x80, 0x00, 0x00, 0x00, 0x00)
	p.i(0x0f, 0x1f, 0x84, 0x00, 0x00, 0x00, 0x00, 0x00)
	p.i(0x66, 0x2e, 0x0f, 0x1f, 0x84, 0x00, 0x00, 0x00, 0x00, 0x00)
	p.i(0xf3, 0x90)
	p.count(c)
	p.ret()

	c = fn("misc")
	p.i(0x48, 0x63, 0xc3) // movslq %ebx,%rax
	p.i(0x6a, 0xfe)       // push $-2
	p.i(0x59)
	p.i(0x48, 0x87, 0xca) // xchg %rcx,%rdx
	p.i(0x48, 0x0f, 0xc8) // bswap %rax
	p.i(0x41, 0x89, 0xd1) // mov %edx,%r9d
	p.count(c)
	p.i(0x48, 0xf7, 0xd0)       // not %rax
	p.i(0x48, 0xf7, 0xd8)       // neg %rax
	p.i(0x48, 0xc1, 0xf8, 0x05) // sar $5,%rax
	p.i(0x48, 0x19, 0xd2)       // sbb %rdx,%rdx
	p.i(0x49, 0x89, 0xd2)       // mov %rdx,%r10
	p.i(0xa8, 0x10)             // test $0x10,%al
	p.i(0x48, 0x99)             // cqo
	p.mix()
	p.ret()

	if p.cfg.Kind == HVM {
		c = fn("cli")
		p.i(0x9c)
		p.i(0xfa)
		p.count(c)
		p.i(0x48, 0xff, 0xc3)
		p.i(0x9d)
		p.ret()
	}
	if p.cfg.AVX {
		c = fn("avx")
		p.i(0xc5, 0xfd, 0xd4, 0xc1) // vpaddq %ymm1,%ymm0,%ymm0
		p.count(c)
		p.ret()
	}
	return names
}

// unfinished completes the last instruction with a RIP-relative displacement.
func (p *program) unfinished(va uint64) {
	p.raw(d32(va - (p.here() + 4))...)
	in := &p.insns[len(p.insns)-1]
	in.Bytes = p.b[in.VA-TextBase:]
	p.syms[len(p.syms)-1].Size += 4
}

// ripImm adds an instruction with a RIP-relative operand and an immediate.
func (p *program) ripImm(va uint64, op, imm []byte) {
	end := p.here() + uint64(len(op)+4+len(imm))
	p.i(append(cat(append([]byte(nil), op...), d32(va-end)...), imm...)...)
}

func (p *program) String() string {
	return fmt.Sprintf("%d bytes, %d instructions", len(p.b), len(p.insns))
}
