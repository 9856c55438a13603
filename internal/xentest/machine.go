// Package xentest is a Xen with one guest, in memory, for this project's tests. A
// [Machine] is the guest: vCPUs that execute a small kernel, whose every effect
// is checked; [Machine.Hypervisor] is the interface that a tool in dom0 has to
// it. What hypervisor and guest do on breakpoints, single steps, pauses and
// vm_events follows the Xen sources, from 4.17 to 4.22.
//
// The guest notices if it is not left alone: every register, counter, flag and
// stack slot of its kernel is accounted for. The first thing to go wrong is
// reported by [Machine.Oops], and [Verify] checks the whole.
package xentest

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/vmprobes/vmprobes/xenctrl"
)

// Kind is a kind of guest.
type Kind uint8

// Kinds of guest. PVH is the same as HVM here.
const (
	PV Kind = iota
	HVM
)

// Config describes a machine. The zero value is a PV guest with one vCPU under
// a hypervisor without gdbsx.
type Config struct {
	Kind  Kind
	VCPUs int // 0: 1
	// Seed of everything random. Without Start, a machine that is used from
	// one goroutine does the same every time.
	Seed uint64
	// GDBSX: the hypervisor was built with CONFIG_GDBSX.
	GDBSX bool
	// MTF: the processor has the monitor trap flag (Intel), for HVM guests.
	MTF bool
	// AVX: the vCPUs have live AVX state.
	AVX bool
	// PhysPages is the size of the guest's memory; 0: 1024.
	PhysPages int
	// Quantum: each call of the hypervisor is preceded by up to this many
	// instructions of the guest, so that a guest that was not started makes
	// progress while a tool works. 0: none, or 8 while the machine is started.
	Quantum int
	// IRQEvery is the mean number of instructions between two interrupts of a
	// vCPU. 0: 400; negative: no interrupts.
	IRQEvery int
	// Late is how many instructions a vCPU may still execute after another one
	// has paused the domain by a breakpoint. 0: 24; negative: none.
	Late int
	// AnyMask: the guest does not mind if a tool that enters its int3 handler
	// leaves the event mask as it is and puts a wrong one into the frame, as
	// one must that does not know where struct vcpu_info is.
	AnyMask bool
	// Returns has the guest's kernel do what is hard on a tool that follows calls to
	// their returns, in each loop: it recurses, ends functions in jumps to others, leaves
	// several behind at once, and switches between tasks, which move from one vCPU to
	// another and die inside a call. See returns.go. For eight vCPUs at the most.
	Returns bool
}

// timesliceMax is the most instructions that one vCPU executes in a row.
const timesliceMax = 12

const (
	pvCS, pvSS       = 0xe033, 0xe02b
	hvmCS, hvmSS     = 0x10, 0x18
	vcpuInfoMask     = 1 // offset of evtchn_upcall_mask in struct vcpu_info
	sharedP2MCR3     = 3112
	extSizeAVX       = 16 + 512 + 64 + 256
	extSizeSSE       = 16 + 512 + 64
	extYMMHi         = 16 + 512 + 64
	maxPauses        = 255
	callLogMax       = 8192
	domainID         = 1
	ringSlots        = 8
	eventCallbackVec = 0xf3
)

type ymm [4]uint64

// step is the effect of the guest's vpaddq on ymm0, with a constant ymm1.
func (y *ymm) step() {
	for i := range y {
		y[i] += 0x0123456789abcdef << i
	}
}

// frameWant is the exception frame that the guest must see at its int3 handler.
type frameWant struct {
	rip, rsp, flags uint64
	rcx, r11        uint64
	mask            byte
}

type vcpu struct {
	id     int
	r      [16]uint64
	rip    uint64
	flags  uint64
	fsBase uint64
	gsBase uint64
	shadow uint64
	cr3    uint64
	dr6    uint64
	ymm    ymm
	// ymmWant is what ymm would be if nobody but the guest touched it.
	ymmWant ymm
	ymmLook bool // to be compared before the next instruction

	held    int  // gdbsx_pausevcpu
	offline bool // VGCF_online was not set
	halted  bool // after an oops
	event   uint32
	late    int  // instructions left although the domain is paused
	half    bool // has flagged its int3 but not paused the domain yet
	irq     int  // instructions to the next interrupt

	paused   int            // vm_event_pause_count
	ringWait *xenctrl.Event // to be put on the ring when there is room
	woken    bool           // there was
	single   bool           // MTF
	resume   bool           // one of the next three is pending
	setRegs  *xenctrl.EventRegs
	emulate  []byte
	inject   *injection

	want *frameWant
}

type injection struct {
	vector, typ uint8
	insnLen     uint32
}

// A Call is one call of the hypervisor.
type Call struct {
	Op   string
	VCPU int // -1: not about one vCPU
	Err  error
}

func (c Call) String() string {
	s := c.Op
	if c.VCPU >= 0 {
		s += fmt.Sprintf("(%d)", c.VCPU)
	}
	if c.Err != nil {
		s += ": " + c.Err.Error()
	}
	return s
}

// A Machine is a guest and its hypervisor. All methods may be called at any
// time from any goroutine.
type Machine struct {
	mu      sync.Mutex
	waiters atomic.Int32
	cfg     Config
	rng     *rand.Rand
	mem     *memory
	roots   []int
	shared  int // pseudo-physical frame
	prog    *program
	start   []int16 // text offset → length of the instruction there, 0 inside one, -1 in dead code
	custom  bool
	clean   []byte // the text as it was
	v       []*vcpu
	tsc     uint64
	x       insn // of exec, to save allocations
	code    [16]byte
	steps   uint64

	main, check, irqEntry, int3Entry uint64

	attached bool // debugger_attached
	pauses   int  // controller_pause_count
	shutdown bool
	reason   uint8
	dying    bool
	gone     bool
	dead     chan struct{}
	mon      *vmEvent
	port     uint32    // of the last event channel
	ringPage *ringPage // in the guest's memory, for the next monitor; or nil
	park     bool
	mappings int

	calls   int
	log     []Call
	failAt  map[int]error
	failAll error
	oops    string
	counted []uint32 // executions by text offset, in calibration
	mult    []uint32 // executions of an instruction per count of its function
	perMain [ctrMax]uint64
	perIRQ  [ctrMax]uint64
	inside  map[string]uint64 // calls that had begun when the counters were 0

	started bool
	stop    chan struct{}
	done    chan struct{}
	kick    chan struct{}
}

// New makes a machine. Its guest stands at the top of its main loop.
func New(cfg Config) *Machine {
	if cfg.VCPUs == 0 {
		cfg.VCPUs = 1
	}
	if cfg.PhysPages == 0 {
		cfg.PhysPages = 1024
	}
	if cfg.Kind == HVM {
		cfg.PhysPages = max(cfg.PhysPages, 2*largeFrame) &^ (largeFrame - 1)
	}
	if cfg.IRQEvery == 0 {
		cfg.IRQEvery = 400
	}
	if cfg.Late == 0 {
		cfg.Late = 24
	}
	if cfg.VCPUs > 32 {
		panic("xentest: at most 32 vCPUs")
	}
	m := &Machine{
		cfg:    cfg,
		rng:    rand.New(rand.NewPCG(cfg.Seed, 0x766d70726f626573)),
		failAt: map[int]error{},
		dead:   make(chan struct{}),
		kick:   make(chan struct{}, 1),
	}
	m.mem = newMemory(cfg.Kind == PV, cfg.PhysPages, m.rng)
	runtime.AddCleanup(m, (*memory).free, m.mem)
	m.shared = m.mem.alloc()
	m.roots = m.mem.layout(cfg.VCPUs, cfg.tasks())
	m.mem.put64(m.mem.offset(m.shared)+sharedP2MCR3, m.mem.frame(m.mem.root)<<12)

	p := assemble(&m.cfg)
	m.prog = p
	m.main, m.check = p.addr("main"), p.addr("check")
	m.irqEntry, m.int3Entry = p.addr("event_entry"), p.addr("int3_entry")
	text := make([]byte, textSize)
	for i := range text {
		text[i] = 0xcc
	}
	copy(text, p.b)
	m.mem.access(TextBase, text, true, true)
	m.clean = text
	m.start = make([]int16, textSize)
	for i := range m.start {
		m.start[i] = -1
	}
	for _, in := range p.insns {
		o := in.VA - TextBase
		m.start[o] = int16(len(in.Bytes))
		for i := 1; i < len(in.Bytes); i++ {
			m.start[o+uint64(i)] = 0
		}
	}
	for i := range uint64(32) {
		m.write64(DataBase+dConst+8*i, m.rng.Uint64()|1<<63)
	}
	m.write64(DataBase+dPointer, p.addr("indirect"))
	m.gate(3, m.int3Entry)
	m.gate(eventCallbackVec, m.irqEntry)

	for i := range cfg.VCPUs {
		pc := percpuBase + uint64(i)*pageSize
		v := &vcpu{
			id: i, rip: m.main, flags: flMBS | flIF, gsBase: pc, shadow: 0x7f0000000000 + uint64(i)<<12,
			cr3: m.mem.frame(m.roots[i]) << 12, dr6: 0xffff0ff0, irq: 1 << 40,
		}
		for j := range v.r {
			v.r[j] = m.rng.Uint64() | 1<<62
			m.write64(pc+pcInit+8*uint64(j), v.r[j])
		}
		v.r[rsp] = StackBase + uint64(i)*StackStride + stackSize - 64
		for j := range v.ymm {
			v.ymm[j] = m.rng.Uint64() | 1
		}
		v.ymmWant = v.ymm
		m.write64(pc+pcSelf, pc)
		m.write64(pc+pcOwn, p.own[0]+1)
		m.v = append(m.v, v)
	}
	m.makeTasks()
	m.calibrate()
	return m
}

// gate writes an entry of the interrupt descriptor table.
func (m *Machine) gate(vector int, va uint64) {
	a := DataBase + dIDT + 16*uint64(vector)
	m.write64(a, va&0xffff|hvmCS<<16|0x8e<<40|va>>16&0xffff<<48)
	m.write64(a+8, va>>32)
}

func (m *Machine) write64(va, x uint64) {
	var b [8]byte
	for i := range b {
		b[i] = byte(x >> (8 * i))
	}
	if !m.mem.access(va, b[:], true, true) {
		panic("xentest: write64")
	}
}

func (m *Machine) read64(va uint64) (x uint64) {
	off, _, ok := m.mem.translate(va, false)
	if !ok {
		panic("xentest: read64")
	}
	return m.mem.get64(off)
}

func (m *Machine) counter(v *vcpu, i int) uint64 {
	return m.read64(v.percpu() + pcCount + 8*uint64(i))
}

func (v *vcpu) percpu() uint64 { return percpuBase + uint64(v.id)*pageSize }

// calibrate executes each vCPU's main loop and interrupt handler once: it fills
// in the registers that the guest expects, and how often each instruction is
// executed.
func (m *Machine) calibrate() {
	run := func(v *vcpu, to uint64) {
		sp := m.top(v)
		for n := 0; ; n++ {
			m.step(v)
			if v.rip == to && v.r[rsp] == sp {
				return
			}
			if m.oops != "" || n > 100000 {
				panic("xentest: the guest does not work: " + m.oops)
			}
		}
	}
	var c0, c1, c2 [ctrMax]uint64
	get := func(c *[ctrMax]uint64) {
		for i := range c {
			c[i] = m.counter(m.v[0], i)
		}
	}
	loop := func(v *vcpu) {
		run(v, m.check)
		for j := range v.r {
			m.write64(v.percpu()+pcExpect+8*uint64(j), v.r[j])
		}
		run(v, m.main)
	}
	for _, v := range m.v {
		// Tasks begin in the first loops. From then on each loop is like the one before.
		for range m.cfg.warmUp() {
			loop(v)
		}
	}
	m.zero()
	m.counted = make([]uint32, textSize)
	for _, v := range m.v {
		loop(v)
	}
	get(&c0)
	v := m.v[0]
	run(v, m.main)
	get(&c1)
	m.interrupt(v)
	run(v, m.main)
	get(&c2)
	for i := range c0 {
		m.perMain[i], m.perIRQ[i] = c1[i]-c0[i], c2[i]-c1[i]
	}
	m.mult = make([]uint32, textSize)
	for _, in := range m.prog.insns {
		ctr, total := m.prog.symbol(in.VA).counter, uint32(0)
		for _, v := range m.v {
			total += uint32(m.counter(v, ctr))
		}
		n := m.counted[in.VA-TextBase]
		if total == 0 && n != 0 || total != 0 && n%total != 0 {
			panic(fmt.Sprintf("xentest: %#x in %s: %d executions in %d calls", in.VA, in.Func, n, total))
		}
		if total != 0 {
			m.mult[in.VA-TextBase] = n / total
		}
	}
	m.counted = nil
	m.zero()
	for _, v := range m.v {
		m.nextIRQ(v)
	}
	m.inside = m.insides()
	m.steps = 0
}

// zero sets everything that the guest counts to 0.
func (m *Machine) zero() {
	for _, v := range m.v {
		for i := range uint64(ctrMax) {
			m.write64(v.percpu()+pcCount+8*i, 0)
		}
	}
	m.write64(DataBase+dInc, 0)
	m.write64(DataBase+dXadd, 0)
}

func (p *program) symbol(va uint64) *Symbol {
	for i := range p.syms {
		if s := &p.syms[i]; va-s.VA < s.Size {
			return s
		}
	}
	return nil
}

func (m *Machine) nextIRQ(v *vcpu) {
	if m.cfg.IRQEvery < 0 {
		v.irq = 1 << 40
		return
	}
	v.irq = 1 + m.rng.IntN(2*m.cfg.IRQEvery)
}

// fail records that the guest went wrong, and stops the vCPU.
func (m *Machine) fail(v *vcpu, format string, a ...any) {
	v.halted = true
	where := "dead code"
	if s := m.prog.symbol(v.rip); s != nil {
		where = fmt.Sprintf("%s+%#x", s.Name, v.rip-s.VA)
	}
	m.report(fmt.Sprintf("vcpu %d at %#x (%s): ", v.id, v.rip, where) + fmt.Sprintf(format, a...))
}

func (m *Machine) report(s string) {
	if m.oops == "" {
		m.oops = s
	}
}

func (m *Machine) pv() bool { return m.cfg.Kind == PV }

// upcallMask is evtchn_upcall_mask of a vCPU.
func (m *Machine) upcallMask(v *vcpu) *byte {
	return &m.mem.b[m.mem.percpu[v.id]+pcVCPUInfo+vcpuInfoMask]
}

// VCPUInfo is where a PV guest has registered its struct vcpu_info, as Linux
// does: the symbol of a per-CPU variable, to which a vCPU's GS base is added.
func (m *Machine) VCPUInfo() uint64 { return pcVCPUInfo }

// Lookup is a Config's Lookup: the symbol that the debugger route wants of a PV guest.
func (m *Machine) Lookup(name string) (addr uint64, ok bool) {
	return pcVCPUInfo, name == "xen_vcpu_info"
}

// runnable reports whether the vCPU is inside the guest, or on its way out.
func (m *Machine) runnable(v *vcpu) bool {
	if v.half {
		return true
	}
	if v.halted || v.offline || v.held > 0 || v.paused > 0 || v.ringWait != nil && !v.woken || m.gone || m.dying || m.shutdown {
		return false
	}
	if m.pauses > 0 && v.late == 0 {
		return false
	}
	return !m.parked(v)
}

// parked reports whether v stands where Park wants it, in the middle of nothing
// that a tool has begun.
func (m *Machine) parked(v *vcpu) bool {
	return m.park && v.rip == m.main && v.r[rsp] == m.top(v) && !v.resume && !v.half && !v.halted &&
		v.paused == 0 && v.ringWait == nil && !v.single && v.flags&flTF == 0
}

// top is the stack pointer in the main loop.
func (m *Machine) top(v *vcpu) uint64 {
	return StackBase + uint64(v.id)*StackStride + stackSize - 64
}

// sync waits until the vCPU has left the guest, as vcpu_pause does.
func (m *Machine) sync(v *vcpu) {
	v.late = 0
	if v.half {
		m.finishTrap(v)
	}
}

func (m *Machine) syncAll() {
	for _, v := range m.v {
		m.sync(v)
	}
}

// run executes up to n instructions and returns how many. If yield is set, it
// ends early when a call comes in.
func (m *Machine) run(n int, yield bool) (did int) {
	for did < n {
		if yield && m.waiters.Load() != 0 {
			return did
		}
		var v *vcpu
		i := m.rng.IntN(len(m.v))
		for range m.v {
			if m.runnable(m.v[i]) {
				v = m.v[i]
				break
			}
			i = (i + 1) % len(m.v)
		}
		if v == nil {
			return did
		}
		for k := 1 + m.rng.IntN(timesliceMax); k > 0 && did < n && m.runnable(v); k-- {
			if m.pauses > 0 && v.late > 0 {
				v.late--
			}
			m.step(v)
			did++
		}
	}
	return did
}

// step executes one instruction of a vCPU, or delivers an interrupt first.
func (m *Machine) step(v *vcpu) {
	m.steps++
	if v.half {
		m.finishTrap(v)
		return
	}
	if v.ringWait != nil {
		m.claim(v)
		return
	}
	if v.resume {
		m.hvmResume(v)
		if v.resume || v.paused > 0 || v.halted || m.parked(v) {
			return
		}
	}
	if v.irq--; v.irq <= 0 && m.interruptible(v) {
		m.nextIRQ(v)
		m.interrupt(v)
	}
	if v.ymmLook {
		v.ymmLook = false
		if m.cfg.AVX && v.ymm != v.ymmWant {
			m.fail(v, "extended state lost: ymm0 is %x, must be %x", v.ymm, v.ymmWant)
			return
		}
	}
	if v.rip == m.int3Entry && !m.checkFrame(v) {
		return
	}
	code := m.code[:15]
	o := v.rip - TextBase
	if off, n, ok := m.mem.translate(v.rip, false); !ok || o >= textSize {
		m.fail(v, "execution outside of the text")
		return
	} else if n >= 15 {
		copy(code, m.mem.b[off:])
	} else if copy(code, m.mem.b[off:off+uint64(n)]); !m.mem.access(v.rip, code, false, false) {
		code = code[:n]
	}
	m.execute(v, code)
}

// execute executes the instruction in code at RIP, with what follows from it.
func (m *Machine) execute(v *vcpu, code []byte) {
	start, tf := v.rip, v.flags&flTF != 0
	o := start - TextBase
	inside := o < textSize && m.start[o] == 0
	before := v.rip
	res := m.exec(v, code)
	v.flags &^= flRF
	if inside && res != isInt3 && !m.custom {
		// The rest of a patched instruction is fair, that of the original not.
		n := 1
		for o+uint64(n) < textSize && m.start[o+uint64(n)] == 0 {
			n++
		}
		// The tail of a two-byte NOP is one either way.
		n = min(n, len(code))
		if tail := string(code[:n]); tail != "\x90" && tail == string(m.clean[o:o+uint64(n)]) {
			v.rip = before
			m.fail(v, "execution in the middle of an instruction")
			return
		}
	}
	switch res {
	case again:
	case isInt3:
		m.int3(v)
		if v.single && v.paused == 0 && v.rip == m.int3Entry && m.running(v) {
			m.monitorTrap(v)
		}
		return
	case isUD:
		m.fail(v, "invalid opcode: % x", code)
		return
	case isFault:
		m.fail(v, "page fault: % x", code)
		return
	case isCall:
		m.hypercall(v)
		return
	default:
		if m.counted != nil && o < textSize {
			m.counted[o]++
		}
	}
	switch {
	case v.single:
		m.monitorTrap(v)
	case tf:
		m.debugTrap(v)
	}
}

// running reports whether nothing but the domain's pause count keeps v.
func (m *Machine) running(v *vcpu) bool { return !v.halted && !v.half && v.ringWait == nil }

func (m *Machine) interruptible(v *vcpu) bool {
	if m.pv() {
		return *m.upcallMask(v) == 0
	}
	return v.flags&flIF != 0 && !v.single
}

// interrupt enters the guest's event or interrupt handler.
func (m *Machine) interrupt(v *vcpu) {
	m.enter(v, m.irqEntry)
}

// enter pushes an exception frame and goes to the handler, as the processor
// (HVM) or Xen's create_bounce_frame (PV) does.
func (m *Machine) enter(v *vcpu, handler uint64) {
	sp := v.r[rsp] &^ 15
	push := func(x uint64) {
		sp -= 8
		var b [8]byte
		for i := range b {
			b[i] = byte(x >> (8 * i))
		}
		if !m.mem.access(sp, b[:], true, false) {
			m.fail(v, "no stack for an exception frame")
		}
	}
	if m.pv() {
		mask := m.upcallMask(v)
		push(pvSS)
		push(v.r[rsp])
		push(v.flags&^(flIF|flIOPL) | when(*mask == 0, flIF))
		push(pvCS&^3 | uint64(*mask)<<32)
		push(v.rip)
		push(v.r[r11])
		push(v.r[rcx])
		*mask = 1
		v.flags &^= flAC | flVM | flRF | flNT | flTF
	} else {
		push(hvmSS)
		push(v.r[rsp])
		push(v.flags)
		push(hvmCS)
		push(v.rip)
		v.flags &^= flIF | flVM | flRF | flNT | flTF
	}
	v.r[rsp] = sp
	v.rip = handler
}

// hypercall is what a PV guest asks of Xen: only iret.
func (m *Machine) hypercall(v *vcpu) {
	if v.r[rax]&0xffffffff != 23 {
		m.fail(v, "hypercall %d", v.r[rax])
		return
	}
	var f [9]uint64 // rax, r11, rcx, flags, rip, cs, rflags, rsp, ss
	for i := range f {
		off, n, ok := m.mem.translate(v.r[rsp]+uint64(8*i), false)
		if !ok || n < 8 {
			m.fail(v, "bad iret frame")
			return
		}
		f[i] = m.mem.get64(off)
	}
	if f[5]|3 != f[5]&^0xffff|pvCS || f[8] != pvSS {
		// Bits 32-39 of the CS slot are saved_upcall_mask.
		m.fail(v, "iret to cs %#x ss %#x", f[5], f[8])
		return
	}
	if m.counted != nil {
		m.counted[v.rip-2-TextBase]++
	}
	v.r[rax], v.r[r11], v.r[rcx] = f[0], f[1], f[2]
	v.rip, v.r[rsp] = f[4], f[7]
	v.flags = f[6]&^(flIOPL|flVM) | flIF | flMBS
	*m.upcallMask(v) = byte(when(f[6]&flIF == 0, 1))
}

// isOwn reports whether the guest has an int3 of its own at va.
func (m *Machine) isOwn(va uint64) bool {
	if slices.Contains(m.prog.own, va) {
		return true
	}
	return m.custom
}

func (m *Machine) expectFrame(v *vcpu, va uint64) {
	if !m.isOwn(va) {
		return
	}
	f := &frameWant{rip: va + 1, rsp: v.r[rsp], flags: v.flags, rcx: v.r[rcx], r11: v.r[r11]}
	if m.pv() {
		f.mask = *m.upcallMask(v)
		f.flags = v.flags&^(flIF|flIOPL) | when(f.mask == 0, flIF)
	}
	v.want = f
}

// checkFrame compares the exception frame at the entry of the int3 handler with
// what the guest must see, whoever made it.
func (m *Machine) checkFrame(v *vcpu) bool {
	f := v.want
	v.want = nil
	if m.custom {
		return true
	}
	if f == nil {
		m.fail(v, "int3 handler entered without an int3")
		return false
	}
	var want []uint64
	n := 5
	if m.pv() {
		want = []uint64{f.rcx, f.r11, f.rip, pvCS&^3 | uint64(f.mask)<<32, f.flags, f.rsp, pvSS}
		n = 7
	} else {
		want = []uint64{f.rip, hvmCS, f.flags, f.rsp, hvmSS}
	}
	if sp := f.rsp&^15 - uint64(8*n); v.r[rsp] != sp {
		m.fail(v, "int3 frame at %#x, must be at %#x", v.r[rsp], sp)
		return false
	}
	for i, w := range want {
		got := m.read64(v.r[rsp] + uint64(8*i))
		if i == n-3 { // flags
			got, w = got&^(flTF|flRF), w&^(flTF|flRF)
			if m.cfg.AnyMask {
				got, w = got|flIF, w|flIF
			}
		}
		if m.cfg.AnyMask && i == n-4 { // cs
			got, w = got&0xffff, w&0xffff
		}
		if got != w {
			m.fail(v, "int3 frame: word %d is %#x, must be %#x", i, got, w)
			return false
		}
	}
	if m.pv() && !m.cfg.AnyMask && *m.upcallMask(v) == 0 {
		m.fail(v, "int3 handler entered with events enabled")
		return false
	}
	if !m.pv() && v.flags&flIF != 0 {
		m.fail(v, "int3 handler entered with interrupts enabled")
		return false
	}
	return true
}

// int3 is a breakpoint exception at RIP.
func (m *Machine) int3(v *vcpu) {
	va := v.rip
	if m.attached {
		v.rip++
		if !m.cfg.GDBSX {
			return // swallowed: the guest goes on behind it
		}
		m.expectFrame(v, va)
		v.event = xenctrl.DomStatusBreakpoint
		v.half = true
		if m.rng.IntN(8) != 0 {
			m.finishTrap(v)
		}
		return
	}
	if !m.pv() && m.mon != nil && m.mon.breakpoint {
		m.expectFrame(v, va)
		m.sendEvent(v, &xenctrl.Event{Reason: xenctrl.ReasonSoftwareBreakpoint, InsnLen: 1,
			Type: xenctrl.EventTypeSoftwareException, GFN: m.gfn(va)}, true)
		return
	}
	m.guestInt3(v, va)
}

// guestInt3 delivers a breakpoint exception to the guest.
func (m *Machine) guestInt3(v *vcpu, va uint64) {
	if !m.isOwn(va) {
		m.fail(v, "int3 delivered to the guest, which has none here")
		return
	}
	v.rip = va
	m.expectFrame(v, va)
	if m.counted != nil {
		m.counted[va-TextBase]++
	}
	v.rip = va + 1
	m.enter(v, m.int3Entry)
}

// pauseNosync is domain_pause_by_systemcontroller_nosync by vCPU v.
func (m *Machine) pauseNosync(v *vcpu) {
	if m.pauses == maxPauses {
		return // ignored: the vCPU is not paused
	}
	if m.pauses == 0 && m.cfg.Late > 0 {
		for _, o := range m.v {
			// One that is held isn't in the guest, and gets there no more when it is let go.
			if o != v && m.runnable(o) {
				o.late = m.rng.IntN(m.cfg.Late + 1)
			}
		}
	}
	m.pauses++
	v.late = 0
}

func (m *Machine) finishTrap(v *vcpu) {
	v.half = false
	m.pauseNosync(v)
}

// debugTrap is #DB after an instruction that was executed with TF.
func (m *Machine) debugTrap(v *vcpu) {
	if m.attached {
		v.dr6 |= 1 << 14
		if m.cfg.GDBSX {
			m.pauseNosync(v)
		}
		return
	}
	if !m.pv() && m.mon != nil && m.mon.debug {
		m.sendEvent(v, &xenctrl.Event{Reason: xenctrl.ReasonDebugException,
			Type: xenctrl.EventTypeHardwareException, Pending: 1 << 14, GFN: m.gfn(v.rip)}, m.mon.debugSync)
		if m.mon.debugSync {
			return
		}
	}
	m.fail(v, "debug exception delivered to the guest: TF was left set")
}

// monitorTrap is the VM exit by the monitor trap flag.
func (m *Machine) monitorTrap(v *vcpu) {
	if m.mon != nil && m.mon.singleStep {
		m.sendEvent(v, &xenctrl.Event{Reason: xenctrl.ReasonSingleStep, GFN: m.gfn(v.rip)}, true)
	}
	if m.attached && m.cfg.GDBSX {
		m.pauseNosync(v)
	}
}

func (m *Machine) gfn(va uint64) uint64 {
	if off, _, ok := m.mem.translate(va, false); ok {
		return off / pageSize
	}
	return ^uint64(0)
}

// lock takes the machine, ahead of the guest.
func (m *Machine) lock() {
	m.waiters.Add(1)
	m.mu.Lock()
	m.waiters.Add(-1)
}

// wake has the scheduler look again.
func (m *Machine) wake() {
	select {
	case m.kick <- struct{}{}:
	default:
	}
}

// Start runs the guest in the background until Stop.
func (m *Machine) Start() {
	m.lock()
	defer m.mu.Unlock()
	if m.started {
		return
	}
	m.started = true
	m.stop, m.done = make(chan struct{}), make(chan struct{})
	go m.loop(m.stop, m.done)
}

// Stop ends what Start began. The guest stands between two instructions.
func (m *Machine) Stop() {
	m.lock()
	if !m.started {
		m.mu.Unlock()
		return
	}
	m.started = false
	close(m.stop)
	done := m.done
	m.mu.Unlock()
	<-done
}

func (m *Machine) loop(stop, done chan struct{}) {
	defer close(done)
	for {
		select {
		case <-stop:
			return
		default:
		}
		for m.waiters.Load() != 0 {
			runtime.Gosched()
		}
		m.mu.Lock()
		// It may do nothing because somebody waits for the machine, too.
		idle := m.run(512, true) == 0 && !slices.ContainsFunc(m.v, m.runnable)
		m.mu.Unlock()
		if idle && m.waiters.Load() == 0 {
			select {
			case <-stop:
				return
			case <-m.kick:
			}
			continue
		}
		runtime.Gosched()
	}
}

// Run executes up to n instructions of the guest, and returns how many it did:
// fewer if no vCPU can run.
func (m *Machine) Run(n int) int {
	m.lock()
	defer m.mu.Unlock()
	return m.run(n, false)
}

// RunVCPU is Run for one vCPU alone.
func (m *Machine) RunVCPU(vcpu, n int) (did int) {
	m.lock()
	defer m.mu.Unlock()
	for v := m.v[vcpu]; did < n && m.runnable(v); did++ {
		if m.pauses > 0 && v.late > 0 {
			v.late--
		}
		m.step(v)
	}
	return did
}

// Steps is the number of instructions that the guest has executed so far.
func (m *Machine) Steps() uint64 {
	m.lock()
	defer m.mu.Unlock()
	return m.steps
}

// Park has every vCPU stop at the top of its main loop, where the counters are
// exact, until Release. It does not wait; see Parked.
func (m *Machine) Park() {
	m.lock()
	m.park = true
	m.mu.Unlock()
}

// Parked reports whether all vCPUs have followed Park.
func (m *Machine) Parked() bool {
	m.lock()
	defer m.mu.Unlock()
	return m.allParked()
}

func (m *Machine) allParked() bool {
	for _, v := range m.v {
		if !m.parked(v) {
			return false
		}
	}
	return true
}

// Release ends Park.
func (m *Machine) Release() {
	m.lock()
	m.park = false
	m.mu.Unlock()
	m.wake()
}

// Quiesce parks the vCPUs and waits until they are. Without Start, it runs the
// guest itself; whoever has to answer for its breakpoints does so from another
// goroutine.
func (m *Machine) Quiesce(ctx context.Context) error {
	m.Park()
	m.wake()
	for {
		m.lock()
		n := 0
		if !m.started {
			n = m.run(1000, false)
		}
		ok, oops := m.allParked(), m.oops
		m.mu.Unlock()
		switch {
		case oops != "":
			return errors.New("xentest: the guest went wrong: " + oops)
		case ok:
			return nil
		case ctx.Err() != nil:
			return fmt.Errorf("xentest: guest does not come to rest (%s): %w", m.State(), ctx.Err())
		}
		if n == 0 {
			time.Sleep(50 * time.Microsecond)
		}
	}
}

// State describes the vCPUs, for messages.
func (m *Machine) State() string {
	m.lock()
	defer m.mu.Unlock()
	var s strings.Builder
	fmt.Fprintf(&s, "pauses=%d attached=%v monitor=%v", m.pauses, m.attached, m.mon != nil)
	for _, v := range m.v {
		where := "?"
		if y := m.prog.symbol(v.rip); y != nil {
			where = fmt.Sprintf("%s+%#x", y.Name, v.rip-y.VA)
		}
		fmt.Fprintf(&s, "; vcpu %d at %#x (%s) flags=%#x held=%d paused=%d event=%d half=%v ring=%v single=%v late=%d",
			v.id, v.rip, where, v.flags, v.held, v.paused, v.event, v.half, v.ringWait != nil, v.single, v.late)
	}
	return s.String()
}

// Oops is the first thing that the guest did which it never would on its own,
// or "".
func (m *Machine) Oops() string {
	m.lock()
	defer m.mu.Unlock()
	return m.oops
}

// Stuck returns the vCPUs that cannot run: the domain is paused, the vCPU is
// held, waits for the response to a vm_event, or is dead.
func (m *Machine) Stuck() (vcpus []int) {
	m.lock()
	defer m.mu.Unlock()
	for _, v := range m.v {
		if m.pauses > 0 || v.half || !m.runnable(v) && !m.parked(v) {
			vcpus = append(vcpus, v.id)
		}
	}
	return vcpus
}

// Load writes code into the text at va, which is dead code in the guest. From
// then on the machine does not know where instructions begin, and takes every
// int3 for the guest's own.
func (m *Machine) Load(va uint64, code []byte) {
	m.lock()
	defer m.mu.Unlock()
	m.custom = true
	if !m.mem.access(va, code, true, true) || va-TextBase >= textSize {
		panic("xentest: Load outside of the text")
	}
	copy(m.clean[va-TextBase:], code)
}

// Interrupt has the vCPU take an interrupt before its next instruction, if it takes any.
func (m *Machine) Interrupt(vcpu int) {
	m.lock()
	defer m.mu.Unlock()
	m.v[vcpu].irq = 0
}

// Goto has the vCPU go on at va.
func (m *Machine) Goto(vcpu int, va uint64) {
	m.lock()
	m.v[vcpu].rip = va
	m.mu.Unlock()
	m.wake()
}

// Peek reads guest memory. It returns nil if va is not mapped.
func (m *Machine) Peek(va uint64, n int) []byte {
	m.lock()
	defer m.mu.Unlock()
	b := make([]byte, n)
	if !m.mem.access(va, b, false, false) {
		return nil
	}
	return b
}

// Poke writes guest memory, read-only or not.
func (m *Machine) Poke(va uint64, b []byte) {
	m.lock()
	defer m.mu.Unlock()
	if !m.mem.access(va, b, true, true) {
		panic("xentest: Poke at an address that is not mapped")
	}
}

// Text is the guest's text as it is now.
func (m *Machine) Text() []byte { return m.Peek(TextBase, textSize) }

// Symbol returns the address of a function of the guest.
func (m *Machine) Symbol(name string) uint64 {
	for _, s := range m.prog.syms {
		if s.Name == name {
			return s.VA
		}
	}
	panic("xentest: no symbol " + name)
}

// Symbols returns all functions, by address.
func (m *Machine) Symbols() []Symbol { return append([]Symbol(nil), m.prog.syms...) }

// Gaps returns the stretches of at least 256 bytes of dead code (int3).
func (m *Machine) Gaps() []Symbol { return append([]Symbol(nil), m.prog.gaps...) }

// Insns returns every instruction of the guest's text, by address.
func (m *Machine) Insns() []Insn {
	r := make([]Insn, len(m.prog.insns))
	for i, in := range m.prog.insns {
		r[i] = in
		r[i].Bytes = append([]byte(nil), in.Bytes...)
	}
	return r
}

// OwnBreakpoints returns the addresses of the guest's own int3.
func (m *Machine) OwnBreakpoints() []uint64 { return append([]uint64(nil), m.prog.own...) }

// Executed is how often the guest has executed its instruction at va, in
// whatever way it was brought about. The guest counts by itself, once in each
// call of a function: the number is exact while the vCPUs are parked. A repeated
// string instruction counts once.
func (m *Machine) Executed(va uint64) (n uint64) {
	m.lock()
	defer m.mu.Unlock()
	s := m.prog.symbol(va)
	if s == nil {
		return 0
	}
	for _, v := range m.v {
		n += m.counter(v, s.counter)
	}
	return n * uint64(m.mult[va-TextBase])
}

// ExecutedBy is Executed for one vCPU.
func (m *Machine) ExecutedBy(vcpu int, va uint64) uint64 {
	m.lock()
	defer m.mu.Unlock()
	s := m.prog.symbol(va)
	if s == nil {
		return 0
	}
	return m.counter(m.v[vcpu], s.counter) * uint64(m.mult[va-TextBase])
}

// Counter is the number of times that vCPU has been through the main loop.
func (m *Machine) Counter(vcpu int) uint64 {
	m.lock()
	defer m.mu.Unlock()
	return m.counter(m.v[vcpu], ctrMain)
}

// Calls is the number of calls of the hypervisor so far.
func (m *Machine) Calls() int {
	m.lock()
	defer m.mu.Unlock()
	return m.calls
}

// CallLog returns the last calls of the hypervisor, some thousands at most.
func (m *Machine) CallLog() []Call {
	m.lock()
	defer m.mu.Unlock()
	return append([]Call(nil), m.log...)
}

// FailCall has the n-th call of the hypervisor from now (1 is the next) fail
// with err, having done nothing. It may be used several times.
func (m *Machine) FailCall(n int, err error) {
	m.lock()
	defer m.mu.Unlock()
	m.failAt[m.calls+n] = err
}

// FailAll has every call of the hypervisor fail with err, having done nothing, until
// it is called with nil.
func (m *Machine) FailAll(err error) {
	m.lock()
	defer m.mu.Unlock()
	m.failAll = err
}

// Attached reports whether debugger_attached is set.
func (m *Machine) Attached() bool {
	m.lock()
	defer m.mu.Unlock()
	return m.attached
}

// MonitorOpen reports whether a monitor is attached.
func (m *Machine) MonitorOpen() bool {
	m.lock()
	defer m.mu.Unlock()
	return m.mon != nil
}

// Mappings is the number of mappings that were not unmapped.
func (m *Machine) Mappings() int {
	m.lock()
	defer m.mu.Unlock()
	return m.mappings
}

// Pauses is the domain's pause count.
func (m *Machine) Pauses() int {
	m.lock()
	defer m.mu.Unlock()
	return m.pauses
}

// Kill destroys the domain: Info says once that it is dying, everything after
// that, and every other call, that it does not exist.
func (m *Machine) Kill() {
	m.lock()
	defer m.mu.Unlock()
	if !m.dying {
		m.dying = true
		close(m.dead)
	}
}

// Shutdown has the guest shut down (SHUTDOWN_*: 0 poweroff, 1 reboot, 2 suspend,
// 3 crash).
// The domain goes on existing, but no vCPU runs.
func (m *Machine) Shutdown(reason uint8) {
	m.lock()
	defer m.mu.Unlock()
	m.shutdown, m.reason = true, reason
}

// ResumeDomain undoes Shutdown, as XEN_DOMCTL_resumedomain does after "xl save -c"
// or a migration that failed.
func (m *Machine) ResumeDomain() {
	m.lock()
	m.shutdown = false
	m.mu.Unlock()
	m.wake()
}

// begin begins a call of the hypervisor: it returns holding the machine.
func (m *Machine) begin(op string, vcpu int) error {
	m.lock()
	q := m.cfg.Quantum
	if q == 0 && m.started {
		q = 8
	}
	if q > 0 {
		m.run(m.rng.IntN(q+1), false)
	}
	m.calls++
	if len(m.log) == callLogMax {
		m.log = append(m.log[:0], m.log[callLogMax/2:]...)
	}
	var err error
	if e, ok := m.failAt[m.calls]; ok || m.failAll != nil {
		delete(m.failAt, m.calls)
		if !ok {
			e = m.failAll
		}
		err = m.wrap(op, vcpu, e)
	} else if m.gone || m.dying && op != "info" {
		err = m.wrap(op, vcpu, syscall.ESRCH)
	} else if vcpu >= len(m.v) || vcpu < -1 {
		err = m.wrap(op, vcpu, syscall.EINVAL)
	}
	m.log = append(m.log, Call{op, vcpu, err})
	return err
}

// end ends it, and records err.
func (m *Machine) end(op string, vcpu int, err error) error {
	if err != nil {
		var e *xenctrl.Error
		if !errors.As(err, &e) {
			err = m.wrap(op, vcpu, err)
		}
		m.log[len(m.log)-1].Err = err
	}
	m.mu.Unlock()
	m.wake()
	return err
}

func (m *Machine) wrap(op string, vcpu int, err error) error {
	return &xenctrl.Error{Op: op, Domain: domainID, VCPU: vcpu, Err: err}
}
