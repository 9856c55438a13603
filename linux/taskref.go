package linux

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
)

// A TaskRef is what tells a task from others, and where its stack is.
type TaskRef struct {
	Addr uint64 // of its struct task_struct
	PID  int    // of the thread, in the initial PID namespace
	TGID int    // of its process; 0 if the kernel's types don't tell
	// ID tells it from a task that had the same address before, or has it later: the
	// canary of its stack, which is random and the task's own, or its PID if the kernel has
	// none. (A PID may be another after execve: a thread that isn't its process' first
	// takes over that one's, and when it was started, see de_thread in fs/exec.c.)
	ID uint64
	// StackLow and StackHigh are the bounds of its kernel stack, the second one exclusive.
	// Both are 0 if they aren't known. Interrupts, exceptions and NMIs may have others.
	StackLow, StackHigh uint64
}

// Kernel stacks of 64-bit kernels have 16 KiB, and with KASAN more (THREAD_SIZE,
// arch/x86/include/asm/page_64_types.h).
const (
	usualStack = 16 << 10
	maxStack   = 256 << 10
)

// taskDead is what is in task_struct.__state of a task that has left its last function
// for good: it is set by do_task_dead (kernel/sched/core.c), and is called TASK_DEAD in
// include/linux/sched.h. Before 4.14 the bit had another meaning.
const taskDead = 0x80

// taskRefs is how a TaskRef is read. Where a kernel lacks one of the fields it is nil.
type taskRefs struct {
	current              uint64 // address of the per-CPU variable, without a base
	pid                  uint64
	stack, canary, state *uint64
	tgid                 bool // it follows the pid
	stackSize            uint64
}

func (k *Kernel) taskRef() (*taskRefs, error) {
	if k == nil {
		return nil, ErrNoKernel
	}
	if r := k.taskRefs.Load(); r != nil {
		return r, nil
	}
	if k.bits != 64 {
		return nil, fmt.Errorf("a task of a kernel of %d bits: %w", k.bits, errors.ErrUnsupported)
	}
	t, err := k.Types()
	if err != nil {
		return nil, err
	}
	pid, err := t.Offset("task_struct.pid")
	if err != nil {
		return nil, err
	}
	r := &taskRefs{pid: pid.Offset, stackSize: k.stackSize()}
	if f, err := t.Offset("task_struct.tgid"); err == nil {
		r.tgid = f.Offset == pid.Offset+4
	}
	if r.current, err = k.currentVariable(); err != nil {
		return nil, err
	}
	field := func(path string, size uint64) *uint64 {
		if f, err := t.Offset(path); err == nil && f.Size >= size {
			return &f.Offset
		}
		return nil
	}
	r.stack, r.canary = field("task_struct.stack", 8), field("task_struct.stack_canary", 8)
	if r.state = field("task_struct.__state", 4); r.state == nil && since(k.Release(), 5) { // since 5.14
		r.state = field("task_struct.state", 4)
	}
	k.taskRefs.Store(r)
	return r, nil
}

// TellsTasks returns why [Kernel.CurrentRef] can't tell the task that a vCPU runs, or nil; with
// process, why it can't tell its process.
func (k *Kernel) TellsTasks(process bool) error {
	r, err := k.taskRef()
	if err == nil && process && !r.tgid {
		err = errors.New("task_struct.tgid isn't behind task_struct.pid")
	}
	return err
}

// since reports whether a kernel's release is known, and its first number at least n.
func since(release string, n int) bool {
	first, _, _ := strings.Cut(release, ".")
	have, err := strconv.Atoi(first)
	return err == nil && have >= n
}

// stackSize returns THREAD_SIZE, by what the linker script gives the first task
// (INIT_TASK_DATA in include/asm-generic/vmlinux.lds.h). 16 KiB where that isn't known are
// a part of each stack.
func (k *Kernel) stackSize() uint64 {
	for _, of := range [][2]string{{"__start_init_stack", "__end_init_stack"}, {"__start_init_task", "__end_init_task"}} {
		if _, n, err := k.section(of[0], of[1], maxStack); err == nil && n >= usualStack && n&(n-1) == 0 {
			return n
		}
	}
	return usualStack
}

// CurrentRef returns the task that a vCPU runs, given the base of its per-CPU variables, as
// [Kernel.Current] does. It takes four reads of at most 8 bytes. If the kernel's types lack
// where the stack is, that isn't known.
func (k *Kernel) CurrentRef(base uint64) (TaskRef, error) {
	r, err := k.taskRef()
	if err != nil {
		return TaskRef{}, err
	}
	var t TaskRef
	if t.Addr, err = k.number(r.current+base, 8); err != nil {
		return TaskRef{}, err
	}
	if t.PID, t.TGID, t.ID, err = k.identity(r, t.Addr); err != nil {
		return TaskRef{}, err
	}
	if r.stack == nil {
		return t, nil
	}
	if t.StackLow, err = k.number(t.Addr+*r.stack, 8); err != nil {
		return TaskRef{}, err
	}
	// In the kernel's half, and not at the end of it.
	if t.StackLow < 1<<63 || t.StackLow+r.stackSize < t.StackLow {
		return TaskRef{}, fmt.Errorf("the stack of the task at %#x is at %#x: %w", t.Addr, t.StackLow, ErrBadKernel)
	}
	t.StackHigh = t.StackLow + r.stackSize
	return t, nil
}

// numbers are buffers for number, which is called at every hit.
var numbers = sync.Pool{New: func() any { return new([8]byte) }}

// number reads a number of n bytes.
func (k *Kernel) number(addr uint64, n int) (uint64, error) {
	b, _ := numbers.Get().(*[8]byte)
	defer numbers.Put(b)
	clear(b[:])
	err := k.Read(addr, b[:n])
	return le64(b[:]), err
}

// identity reads what is a task's own.
func (k *Kernel) identity(r *taskRefs, task uint64) (pid, tgid int, id uint64, err error) {
	p, err := k.number(task+r.pid, 8)
	if err != nil {
		return 0, 0, 0, err
	}
	if pid = int(int32(p)); r.tgid {
		tgid = int(int32(p >> 32))
	}
	if r.canary != nil {
		if id, err = k.number(task+*r.canary, 8); err != nil {
			return 0, 0, 0, err
		}
	}
	if id == 0 {
		id = uint64(pid)
	}
	return pid, tgid, id, nil
}

// TaskAlive reports whether a task is still there and may go on with what it was in: its
// struct task_struct and its stack are not another's, and it isn't in its last switch to
// another task. What the kernel's types lack isn't looked at. An error says that it can't
// be told, such as that memory can't be read, which may be otherwise later.
func (k *Kernel) TaskAlive(t TaskRef) (bool, error) {
	r, err := k.taskRef()
	if err != nil {
		return false, err
	}
	_, _, id, err := k.identity(r, t.Addr)
	if err != nil {
		return false, err
	}
	if id != t.ID {
		return false, nil
	}
	if r.stack != nil && t.StackLow != 0 {
		low, err := k.number(t.Addr+*r.stack, 8)
		if err != nil {
			return false, err
		}
		if low != t.StackLow {
			return false, nil
		}
	}
	if r.state != nil {
		state, err := k.number(t.Addr+*r.state, 4)
		return err == nil && state&taskDead == 0, err
	}
	return true, nil
}
