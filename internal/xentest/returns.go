package xentest

import (
	"fmt"
	"slices"
)

// What the guest does with Config.Returns, beside the rest. Each vCPU's main loop is a task,
// whose stack is the vCPU's, and runs four kinds of other tasks, each on a stack of its own:
//
//   - main calls rec, which calls itself until it is four deep. So does the interrupt handler,
//     whatever it has interrupted: rec, too.
//   - tail_a and tail_c end in a jump to tail_b, and tail_self in one to itself.
//   - lj_outer calls lj_mid, that lj_deep, and this goes back to lj_outer as longjmp does;
//     and all that once more, from the same places.
//   - A mover's calls of blocker begin in one loop and end in the next one, in which the task
//     is mostly on another vCPU: there is one mover more than there are vCPUs, and each vCPU
//     exchanges its own for that one. Main has calls of blocker from the same place, which begin
//     before the mover's end, and end after its next begin.
//   - A mortal dies inside victim and is born anew, with the same address and the same stack,
//     but another pid: its next call of victim looks like the one that never ended.
//   - Eight waiters take turns, so that each is inside blocking for eight loops. All their
//     calls go back to the same address.
//
// Nothing of it depends on chance: at the top of the main loop, each task stands where it
// stood a loop ago, or where the one that it has taken the place of did. That takes a
// few loops to begin with, which calibrate lets pass, so that there are calls from the start
// that nobody has seen begin.

// Offsets in a vCPU's page, with Config.Returns.
const (
	pcCurrent = 0x010 // the task that the vCPU executes
	pcOther   = 0x018 // the one that yield goes to
	pcMover   = 0x020 // the tasks that main has yield go to
	pcMortal  = 0x028
	pcWaiters = 0x030 // the first one's
	pcTurn    = 0x038 // counts the turns of all waiters
	pcJump    = 0x040 // lj_outer's stack pointer
	pcResult  = 0x048 // what wrap has returned
)

// Offsets in the data area, and in what describes a task there.
const (
	dMover = 0x218 // the mover that no vCPU has
	dTasks = 0x2000

	taskSize  = 64
	taskID    = 0x00
	taskStack = 0x08 // lowest address
	taskSP    = 0x10 // stack pointer of a task that doesn't run
	taskState = 0x18
	taskDead  = 0x80 // in taskState, as Linux' TASK_DEAD

	taskStacks = StackBase + 0x10000000
	taskStride = 2 * pageSize // one of them isn't mapped
	waiters    = 8
)

// What rec, and the others that return the same each time, return.
const (
	recDepth     = 4
	tailBValue   = 0x7b
	tailSelf     = 0x5e1f
	tailSelves   = 3 // entries of tail_self in one call
	innerValue   = 0x1e
	ljValue      = 0x17
	ljTimes      = 2
	blockerValue = 0xb10c
	victimValue  = 0x71c7
	waitValue    = 0x8100
)

// tasks is how many tasks have a stack of their own.
func (c *Config) tasks() int {
	if !c.Returns {
		return 0
	}
	if c.VCPUs > 8 {
		panic("xentest: at most 8 vCPUs with Config.Returns")
	}
	return c.VCPUs + 1 + c.VCPUs + waiters*c.VCPUs
}

// warmUp is how many loops of a vCPU it takes until all are alike.
func (c *Config) warmUp() int {
	if !c.Returns {
		return 0
	}
	return waiters
}

// never is the counter of what never happens.
const never = -1

// function is what is known of a function's calls: counters of how they began and ended,
// and where it may end in a jump to.
type function struct {
	name                             string
	entered, returned, unwound, died int
	tails                            []string
	open                             bool
	values                           []uint64
}

// plain begins a function that is executed in proportion to another's counter.
func (p *program) plain(name string, counter int) {
	p.sub(name, counter)
	p.funcs = append(p.funcs, function{name: name, entered: counter, returned: counter, unwound: never, died: never})
}

// followed begins a function whose returns are counted by themselves: see returned. first is
// its first instruction, if that isn't the one that counts; values are what its calls return.
func (p *program) followed(name string, first []byte, values ...uint64) {
	c := p.fn(name)
	if first != nil {
		p.i(first...)
	}
	p.count(c)
	f := p.function(name)
	f.returned, f.values = p.counter(), values
}

// First instructions.
var (
	nop5    = []byte{0x0f, 0x1f, 0x44, 0x00, 0x00}
	endbr   = []byte{0xf3, 0x0f, 0x1e, 0xfa}
	pushRBP = []byte{0x55}
	pushRBX = []byte{0x53}
)

func (p *program) function(name string) *function {
	for i := range p.funcs {
		if p.funcs[i].name == name {
			return &p.funcs[i]
		}
	}
	panic("xentest: no function " + name)
}

// returned counts a return of the function. It stands before its RET, or behind the call.
func (p *program) returned(name string) { p.count(p.function(name).returned) }

// part goes on with the function that is being written, where it is executed in proportion to
// another counter: right here, for what comes to it from above.
func (p *program) part(name string, counter int) {
	of := p.syms[len(p.syms)-1].of
	p.label(name)
	p.syms = append(p.syms, Symbol{name, p.here(), 0, counter, of})
}

// apart is part elsewhere, for what jumps to it.
func (p *program) apart(name string, counter int) {
	of := p.syms[len(p.syms)-1].of
	p.sub(name, counter)
	p.syms[len(p.syms)-1].of = of
}

// tail ends the function in a jump to another one.
func (p *program) tail(to string) {
	f := p.function(p.syms[len(p.syms)-1].of)
	f.tails = append(f.tails, to)
	p.to(to, 4, 0xe9)
}

func (p *program) ne() { p.to("bad", 4, 0x0f, 0x85) } // jne bad

// value is mov $v,%eax.
func (p *program) value(v uint64) { p.abs(v, 0xb8) }

// is goes to bad if a call hasn't returned v.
func (p *program) is(v uint64) {
	p.abs(v, 0x3d) // cmp $v,%eax
	p.ne()
}

// events has the vCPU take interrupts, or not.
func (p *program) events(on bool) {
	mask, op := byte(1), byte(0xfa) // cli
	if on {
		mask, op = 0, 0xfb // sti
	}
	if p.cfg.Kind == PV {
		p.i(append(append([]byte{0x65, 0xc6, 0x04, 0x25}, d32(pcVCPUInfo+vcpuInfoMask)...), mask)...) // movb $mask,%gs:..
		return
	}
	p.i(op)
}

// recurse calls rec, which is executed recDepth times then.
func (p *program) recurse() {
	p.abs(recDepth, 0xb9) // mov $recDepth,%ecx
	p.call("rec")
	p.is(recDepth - 1)
}

// calleeSaved are the registers that a function must leave as they were.
// They begin with the one that yield pushes first.
var calleeSaved = []int{rbx, rbp, r12, r13, r14, r15}

// returning writes what Config.Returns adds to the main loop, and returns the names of what that
// calls, in order.
func (p *program) returning() (names []string) {
	fn := func(name string) {
		names = append(names, name)
		p.count(p.fn(name))
	}

	p.followed("rec", nop5, 0, 1, 2, 3)
	p.i(0xff, 0xc9)                 // dec %ecx
	p.to("rec_base", 4, 0x0f, 0x84) // je
	more := p.counter()
	p.part("rec_more", more)
	p.count(more)
	p.call("rec")
	p.i(0x48, 0x8d, 0x40, 0x01) // lea 1(%rax),%rax
	p.returned("rec")
	p.ret()
	base := p.counter()
	p.apart("rec_base", base)
	p.count(base)
	p.i(0x31, 0xc0) // xor %eax,%eax
	p.returned("rec")
	p.ret()
	fn("call_rec")
	p.recurse()
	p.ret()

	p.followed("tail_b", nil, tailBValue)
	p.value(tailBValue)
	p.returned("tail_b")
	p.ret()
	p.followed("tail_a", nop5, tailBValue)
	p.tail("tail_b")
	p.followed("tail_c", nil, tailBValue)
	p.rip(p.addr("tail_b"), 0x48, 0x8d, 0x05) // lea tail_b(%rip),%rax
	p.i(0xff, 0xe0)                           // jmp *%rax
	p.function("tail_c").open = true
	p.followed("tail_self", nop5, tailSelf)
	p.i(0xff, 0xc9)                      // dec %ecx
	p.to("tail_self_end", 4, 0x0f, 0x84) // je
	more = p.counter()
	p.part("tail_self_more", more)
	p.count(more)
	p.tail("tail_self")
	end := p.counter()
	p.apart("tail_self_end", end)
	p.count(end)
	p.value(tailSelf)
	p.ret()
	fn("tails")
	p.call("tail_a")
	p.is(tailBValue)
	p.returned("tail_a")
	p.call("tail_b")
	p.i(nop5...) // as a jump label is
	p.is(tailBValue)
	p.call("tail_c")
	p.is(tailBValue)
	p.returned("tail_c")
	p.abs(tailSelves, 0xb9) // mov $tailSelves,%ecx
	p.call("tail_self")
	p.is(tailSelf)
	for range tailSelves {
		p.returned("tail_self")
	}
	p.ret()

	// inner goes back to wrap's RET. Main takes any value of theirs.
	p.followed("inner", nil, innerValue)
	p.value(innerValue)
	p.returned("inner")
	p.ret()
	p.followed("wrap", nil, innerValue)
	p.call("inner")
	p.ret()
	fn("call_wrap")
	p.call("wrap")
	p.gsReg(0x89, rax, pcResult)
	p.returned("wrap")
	p.i(0x31, 0xc0) // xor %eax,%eax
	p.ret()

	names = append(names, "lj_outer")
	p.followed("lj_outer", endbr, ljValue)
	p.i(0x6a, ljTimes) // push $ljTimes
	p.gsReg(0x89, rsp, pcJump)
	p.label("lj_again")
	p.call("lj_mid")
	p.i(0x48, 0x85, 0xc0) // test %rax,%rax
	p.to("bad", 4, 0xe9)  // it doesn't return
	p.label("lj_landing")
	mid, deep := p.counter(), p.counter()
	p.count(mid)
	p.count(deep)
	p.i(0xff, 0x0c, 0x24)     // decl (%rsp)
	p.to("lj_again", 1, 0x75) // jne
	p.i(0x58)                 // pop %rax
	p.value(ljValue)
	p.returned("lj_outer")
	p.ret()
	p.followed("lj_mid", pushRBP)
	p.call("lj_deep")
	p.i(0x5d) // pop %rbp
	p.ret()
	p.followed("lj_deep", nil)
	p.i(0x48, 0x83, 0xec, 0x18) // sub $24,%rsp
	p.gsReg(0x8b, rsp, pcJump)
	p.i(0x48, 0x85, 0xe4)                         // test %rsp,%rsp
	p.to("lj_deep.1", 1, 0x74)                    // je
	p.rip(p.addr("lj_landing"), 0x48, 0x8d, 0x15) // lea lj_landing(%rip),%rdx
	p.i(0xff, 0xe2)                               // jmp *%rdx
	p.label("lj_deep.1")
	p.ret()
	p.function("lj_deep").open = true
	p.function("lj_mid").unwound, p.function("lj_deep").unwound = mid, deep

	p.tasks()
	// Main has a mover go on twice, and moves it.
	fn("run_mover")
	p.gsReg(0x8b, rax, pcMover)
	p.gsReg(0x89, rax, pcOther)
	p.call("call_blocker")
	p.is(blockerValue)
	p.ret()
	fn("migrate")
	p.gsReg(0x8b, rax, pcMover)
	p.rip(DataBase+dMover, 0xf0, 0x48, 0x87, 0x05) // lock xchg %rax,mover(%rip)
	p.gsReg(0x89, rax, pcMover)
	p.i(0x31, 0xc0) // xor %eax,%eax
	p.ret()

	// A mortal dies, has some time to be found dead, and begins anew.
	fn("kill_mortal")
	p.gsReg(0x8b, rax, pcMortal)
	p.abs(taskDead, 0x48, 0xc7, 0x40, taskState)       // movq $taskDead,taskState(%rax)
	for _, name := range []string{"victim", "yield"} { // that it is in
		c := p.counter()
		p.count(c)
		p.function(name).died = c
	}
	p.i(0x31, 0xc0)
	p.ret()
	fn("run_waiter")
	p.gsReg(0x8b, rax, pcTurn)
	p.i(0x48, 0xff, 0xc0) // inc %rax
	p.gsReg(0x89, rax, pcTurn)
	p.i(0x83, 0xe0, waiters-1)    // and $7,%eax
	p.i(0x48, 0xc1, 0xe0, 0x06)   // shl $6,%rax
	p.gsReg(0x03, rax, pcWaiters) // add pcWaiters,%rax
	p.gsReg(0x89, rax, pcOther)
	p.call("yield")
	p.ret()
	fn("fork_mortal")
	p.gsReg(0x8b, rax, pcMortal)
	p.i(0x48, 0xff, 0x40, taskID) // incq taskID(%rax)
	p.born("task_mortal")
	p.i(0x31, 0xc0)
	p.i(0x31, 0xc9)
	p.i(0x31, 0xd2)
	p.ret()
	fn("run_mortal")
	p.gsReg(0x8b, rax, pcMortal)
	p.gsReg(0x89, rax, pcOther)
	p.call("victim")
	p.is(victimValue)
	p.ret()
	return names
}

// born writes the first frame of the task at %rax, by %rcx and %rdx.
func (p *program) born(label string) {
	p.rip(p.addr(label), 0x48, 0x8d, 0x0d) // lea label(%rip),%rcx
	p.i(0x48, 0x8b, 0x50, taskStack)       // mov taskStack(%rax),%rdx
	p.abs(firstFrame, 0x48, 0x81, 0xc2)    // add $firstFrame,%rdx
	p.i(0x48, 0x89, 0x0a)                  // mov %rcx,(%rdx)
	p.i(0x48, 0x89, 0x50, taskSP)          // mov %rdx,taskSP(%rax)
	p.abs(0, 0x48, 0xc7, 0x40, taskState)  // movq $0,taskState(%rax)
}

// firstFrame is where a task's first frame is in its stack: the address that it begins at.
const firstFrame = pageSize - 16

// tasks writes what tasks other than main execute, and the change from one to another.
func (p *program) tasks() {
	// switch_to(%rdi) is Linux' __switch_to_asm. Interrupts don't see a task on another's stack.
	c := p.counter()
	p.sub("switch_to", c)
	p.count(c)
	p.events(false)
	p.gsReg(0x8b, rax, pcCurrent)
	p.i(0x48, 0x89, 0x60, taskSP) // mov %rsp,taskSP(%rax)
	p.i(0x48, 0x8b, 0x67, taskSP) // mov taskSP(%rdi),%rsp
	p.gsReg(0x89, rdi, pcCurrent)
	p.events(true)
	p.ret()

	// yield is what calls it: a task that is born has called neither.
	p.followed("yield", pushRBX, 0)
	for _, r := range calleeSaved[1:] {
		p.pushReg(r)
	}
	p.gsReg(0x8b, rdi, pcOther)
	p.gsReg(0x8b, rax, pcCurrent)
	p.gsReg(0x89, rax, pcOther)
	p.call("switch_to")
	p.part("yield_end", p.function("yield").returned)
	p.returned("yield")
	for i := range calleeSaved {
		p.popReg(calleeSaved[len(calleeSaved)-1-i])
	}
	p.i(0x31, 0xc0) // xor %eax,%eax
	p.i(0x31, 0xff) // xor %edi,%edi
	p.ret()

	// blocker looks whether it goes on with its own frame and its own task.
	p.followed("blocker", pushRBP, blockerValue)
	p.i(0x48, 0x89, 0xe5) // mov %rsp,%rbp
	p.i(0x53)             // push %rbx
	p.i(0x41, 0x54)       // push %r12
	p.gsReg(0x8b, rbx, pcCurrent)
	p.i(0x4c, 0x8b, 0x63, taskID) // mov taskID(%rbx),%r12
	p.i(0x53)                     // push %rbx
	for range 2 {
		p.call("yield")
		p.gsReg(0x3b, rbx, pcCurrent) // cmp pcCurrent,%rbx
		p.ne()
		p.i(0x48, 0x3b, 0x1c, 0x24) // cmp (%rsp),%rbx
		p.ne()
		p.i(0x4c, 0x3b, 0x63, taskID) // cmp taskID(%rbx),%r12
		p.ne()
		p.i(0x48, 0x8d, 0x45, 0xe8) // lea -24(%rbp),%rax
		p.i(0x48, 0x39, 0xe0)       // cmp %rsp,%rax
		p.ne()
	}
	p.i(0x58)       // pop %rax
	p.i(0x41, 0x5c) // pop %r12
	p.i(0x5b)       // pop %rbx
	p.i(0xc9)       // leave
	p.value(blockerValue)
	p.returned("blocker")
	p.ret()
	p.followed("call_blocker", nil, blockerValue)
	p.call("blocker")
	p.returned("call_blocker")
	p.ret()
	c = p.counter()
	p.sub("task_mover", c)
	p.count(c)
	p.gsReg(0x8b, r13, pcCurrent)
	p.call("call_blocker")
	p.is(blockerValue)
	p.gsReg(0x3b, r13, pcCurrent) // cmp pcCurrent,%r13
	p.ne()
	p.to("task_mover", 4, 0xe9)

	// victim returns when main has called it; a mortal stays in it.
	p.followed("victim", pushRBX, victimValue)
	p.gsReg(0x8b, rbx, pcCurrent)
	p.call("yield")
	p.part("victim_end", p.function("victim").returned)
	p.gsReg(0x3b, rbx, pcCurrent) // cmp pcCurrent,%rbx
	p.ne()
	p.i(0x5b) // pop %rbx
	p.value(victimValue)
	p.returned("victim")
	p.ret()
	c = p.counter()
	p.sub("task_mortal", c)
	p.count(c)
	p.call("victim")
	p.i(0x48, 0x85, 0xc0) // test %rax,%rax
	p.to("bad", 4, 0xe9)

	// blocking looks whether all waiters have had a turn meanwhile.
	p.followed("blocking", pushRBX, waitValue)
	p.gsReg(0x8b, rbx, pcTurn)
	p.call("yield")
	p.gsReg(0x8b, rax, pcTurn)
	p.i(0x48, 0x29, 0xd8)          // sub %rbx,%rax
	p.i(0x48, 0x83, 0xf8, waiters) // cmp $waiters,%rax
	p.ne()
	p.i(0x5b) // pop %rbx
	p.value(waitValue)
	p.returned("blocking")
	p.ret()
	c = p.counter()
	p.sub("task_waiter", c)
	p.count(c)
	p.call("blocking")
	p.is(waitValue)
	p.to("task_waiter", 4, 0xe9)
}

// makeTasks makes all tasks: those of the vCPUs' main loops come first.
func (m *Machine) makeTasks() {
	if !m.cfg.Returns {
		return
	}
	n, made := len(m.v), 0
	task := func(pid int, begin string) uint64 {
		a := DataBase + dTasks + taskSize*uint64(made)
		stack := StackBase + StackStride*uint64(made)
		if begin != "" {
			stack = taskStacks + taskStride*uint64(made-n)
			m.write64(stack+firstFrame, m.prog.addr(begin))
			m.write64(a+taskSP, stack+firstFrame)
		}
		m.write64(a+taskID, uint64(pid))
		m.write64(a+taskStack, stack)
		made++
		return a
	}
	// The vCPUs' own pids are below 100; a mortal has a new one in each loop.
	for i, v := range m.v {
		m.write64(v.percpu()+pcCurrent, task(1+i, ""))
	}
	for i, v := range m.v {
		m.write64(v.percpu()+pcMover, task(100+i, "task_mover"))
	}
	m.write64(DataBase+dMover, task(100+n, "task_mover"))
	for i, v := range m.v {
		m.write64(v.percpu()+pcMortal, task((1+i)<<24, "task_mortal"))
	}
	for i, v := range m.v {
		for k := range waiters {
			a := task(200+waiters*i+k, "task_waiter")
			if k == 0 {
				m.write64(v.percpu()+pcWaiters, a)
			}
		}
	}
}

// A Task is one of the guest's tasks, by what a tool knows it by.
type Task struct {
	Addr             uint64 // of what describes it
	ID               uint64 // its pid: another task at the same address has another one
	StackLo, StackHi uint64
}

// task reads a task.
func (m *Machine) task(addr uint64) (t Task, ok bool) {
	if i := addr - DataBase - dTasks; !m.cfg.Returns || i%taskSize != 0 || i/taskSize >= uint64(len(m.v)+m.cfg.tasks()) {
		return Task{}, false
	}
	lo := m.read64(addr + taskStack)
	t = Task{addr, m.read64(addr + taskID), lo, lo + pageSize}
	if lo < taskStacks {
		t.StackHi = lo + stackSize
	}
	return t, true
}

// TaskAt is the task that a vCPU with this GS base executes, with Config.Returns. No call
// of the hypervisor is made for it.
func (m *Machine) TaskAt(gsBase uint64) (Task, error) {
	m.lock()
	defer m.mu.Unlock()
	if i := gsBase - percpuBase; i%pageSize == 0 && i/pageSize < uint64(len(m.v)) {
		if t, ok := m.task(m.read64(gsBase + pcCurrent)); ok {
			return t, nil
		}
	}
	return Task{}, fmt.Errorf("xentest: no task of a vCPU with GS base %#x", gsBase)
}

// CurrentTask is TaskAt by a vCPU's number.
func (m *Machine) CurrentTask(vcpu int) (Task, error) { return m.TaskAt(m.v[vcpu].percpu()) }

// Tasks returns all tasks of the guest that are alive: first those of the vCPUs' main
// loops.
func (m *Machine) Tasks() (all []Task) {
	m.lock()
	defer m.mu.Unlock()
	return m.living()
}

func (m *Machine) living() (all []Task) {
	for a := uint64(DataBase + dTasks); ; a += taskSize {
		t, ok := m.task(a)
		if !ok {
			return all
		}
		if m.read64(a+taskState)&taskDead == 0 {
			all = append(all, t)
		}
	}
}

// TaskAlive reports whether t is still the task at its address, and hasn't died there.
func (m *Machine) TaskAlive(t Task) bool { return slices.Contains(m.Tasks(), t) }

// A Function is one of the guest's functions that return, or might.
type Function struct {
	Name  string
	Entry uint64
	// Exits are its RETs, in the order of their addresses.
	Exits []uint64
	// Tails are the functions that it ends in a direct jump to; Open says that it
	// ends in an indirect jump as well.
	Tails []string
	Open  bool
	// Backs are the addresses behind the direct calls of it.
	Backs []uint64
	// Values are what its calls return, each of them equally often; nil if that isn't known.
	Values []uint64
}

// Functions returns all functions, in the order of their addresses.
func (m *Machine) Functions() (all []Function) {
	for _, f := range m.prog.funcs {
		all = append(all, m.prog.describe(&f))
	}
	return all
}

// Function returns the function of that name.
func (m *Machine) Function(name string) Function { return m.prog.describe(m.prog.function(name)) }

func (p *program) describe(f *function) Function {
	r := Function{Name: f.name, Entry: p.addr(f.name), Tails: slices.Clone(f.tails), Open: f.open, Values: slices.Clone(f.values)}
	for _, in := range p.insns {
		switch end := in.VA + uint64(len(in.Bytes)); {
		case in.isRet() && p.symbol(in.VA).of == f.name:
			r.Exits = append(r.Exits, in.VA)
		case in.calls() == r.Entry:
			r.Backs = append(r.Backs, end)
		}
	}
	return r
}

func (in *Insn) isRet() bool { return string(in.Bytes) == "\xc3" || string(in.Bytes) == "\xf3\xc3" }

// calls is what the instruction calls, or 0.
func (in *Insn) calls() uint64 {
	if in.Bytes[0] != 0xe8 {
		return 0
	}
	x := insn{b: in.Bytes, i: 1}
	return in.VA + 5 + x.imm(4)
}

// Exits returns every RET that may end a call of the function, also those of functions
// that it ends in a direct jump to; open says that there may be others, behind an
// indirect jump.
func (m *Machine) Exits(name string) (at []uint64, open bool) {
	for _, n := range m.prog.closure(name) {
		f := m.Function(n)
		at, open = append(at, f.Exits...), open || f.Open
	}
	slices.Sort(at)
	return at, open
}

// closure is the function and all that it may end in direct jumps to.
func (p *program) closure(name string) []string {
	all := []string{name}
	for i := 0; i < len(all); i++ {
		for _, t := range p.function(all[i]).tails {
			if !slices.Contains(all, t) {
				all = append(all, t)
			}
		}
	}
	return all
}

// TailsTo reports whether a call of the function at entry from may end in a jump to the
// function at entry to, as far as the text says: behind an indirect jump may be any.
func (m *Machine) TailsTo(from, to uint64) bool {
	for _, f := range m.prog.funcs {
		if m.prog.addr(f.name) != from {
			continue
		}
		for _, n := range m.prog.closure(f.name) {
			g := m.prog.function(n)
			if g.open || slices.ContainsFunc(g.tails, func(t string) bool { return m.prog.addr(t) == to }) {
				return true
			}
		}
	}
	return false
}

// Returns is what has become of the function's calls, on all vCPUs together: how many have
// begun, those included that had when the machine was made, and how many of them have
// returned, were left behind by a jump to one of their callers, or were lost with their
// task. The guest counts by itself; the numbers are exact while the vCPUs are parked.
func (m *Machine) Returns(name string) (entered, returned, unwound, died uint64) {
	m.lock()
	defer m.mu.Unlock()
	f := m.prog.function(name)
	return m.total(f.entered) + m.inside[name], m.total(f.returned), m.total(f.unwound), m.total(f.died)
}

// total is a counter of all vCPUs.
func (m *Machine) total(ctr int) (n uint64) {
	if ctr == never {
		return 0
	}
	for _, v := range m.v {
		n += m.counter(v, ctr)
	}
	return n
}

// Inside is how many calls of the function have begun and not ended, by the stacks of
// all tasks that don't run. It is exact while the vCPUs are parked.
func (m *Machine) Inside(name string) uint64 {
	m.lock()
	defer m.mu.Unlock()
	return m.insides()[name]
}

func (m *Machine) insides() map[string]uint64 {
	if !m.cfg.Returns {
		return nil
	}
	entries, backs := map[uint64]string{}, map[uint64]string{}
	for _, f := range m.prog.funcs {
		entries[m.prog.addr(f.name)] = f.name
	}
	for _, in := range m.prog.insns {
		if f, ok := entries[in.calls()]; ok {
			backs[in.VA+uint64(len(in.Bytes))] = f
		}
	}
	n := map[string]uint64{}
	for _, t := range m.living() {
		if t.StackLo < taskStacks {
			continue // a main loop's
		}
		for sp := m.read64(t.Addr + taskSP); sp < t.StackHi; sp += 8 {
			if f, ok := backs[m.read64(sp)]; ok {
				n[f]++
			}
		}
	}
	return n
}

// Result is what the function wrap has returned last to that vCPU's main loop, which
// accepts any value of it.
func (m *Machine) Result(vcpu int) uint64 {
	m.lock()
	defer m.mu.Unlock()
	return m.read64(m.v[vcpu].percpu() + pcResult)
}
