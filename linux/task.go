package linux

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/vmprobes/vmprobes/ktype"
	"github.com/vmprobes/vmprobes/paging"
)

// A Task is a thread of the guest.
type Task struct {
	Addr   uint64 // of its struct task_struct
	PID    int    // of the thread, as gettid returns it in the initial PID namespace
	TGID   int    // of the process, as getpid returns it
	PPID   int    // of the process that is its parent, 0 if none
	Comm   string // the thread's name, at most 15 bytes, as it is in memory
	UID    uint32 // effective: cred.euid
	GID    uint32
	MM     uint64 // address of its struct mm_struct, 0 for kernel threads
	Exited bool   // a zombie: its parent hasn't waited for it yet

	// FullName is the name of a kernel thread that is longer than Comm has room for, as
	// /proc shows it since Linux 5.17, else "".
	FullName string

	// Unknown says which of PPID, UID, GID, MM and Exited are not known. They are zero
	// then, which says nothing.
	Unknown Fields
	// Err is why some of them couldn't be read, such as a bad pointer in the task. It is
	// nil if the types lack them, and if all are known.
	Err error
}

// Name returns the task's full name: FullName, or Comm.
func (t Task) Name() string {
	if t.FullName != "" {
		return t.FullName
	}
	return t.Comm
}

// String returns the task as "name[tgid/pid]", in printable ASCII.
func (t Task) String() string {
	if t.PID == t.TGID {
		return fmt.Sprintf("%s[%d]", printable(t.Name()), t.TGID)
	}
	return fmt.Sprintf("%s[%d/%d]", printable(t.Name()), t.TGID, t.PID)
}

// Bounds of what a guest can have: pid_max can't be more than 4 Mi on 64 bits
// (PID_MAX_LIMIT, include/linux/threads.h).
const (
	maxTasks = 1 << 22
	maxCPUs  = 8192 // CONFIG_NR_CPUS with MAXSMP
)

// listTries is how often a list is read if the running guest changes it meanwhile.
const listTries = 5

// Task reads the task whose struct task_struct is at addr. What the types lack, as
// inferred ones lack most, and what can't be read is in its Unknown. It fails if the
// name or one of the ids can't be read.
func (k *Kernel) Task(addr uint64) (Task, error) {
	return k.begin("task").task(addr)
}

func (o *op) task(addr uint64) (Task, error) {
	task, err := o.partOfTask(addr)
	if err != nil {
		return Task{}, err
	}
	return task, nil
}

// partOfTask returns what can be read of a task, and the first error of what every task
// has.
func (o *op) partOfTask(addr uint64) (Task, error) {
	t, err := o.Types()
	if err != nil {
		return Task{}, err
	}
	v := t.At(o, "task_struct", addr)
	task := Task{Addr: addr}
	var first error
	keep := func(err error) bool {
		if first == nil {
			first = err
		}
		return err == nil
	}
	if pid, err := v.Field("pid").Int(); keep(err) {
		task.PID = int(pid)
	}
	if tgid, err := v.Field("tgid").Int(); keep(err) {
		task.TGID = int(tgid)
	}
	task.Comm, err = v.Field("comm").CString()
	if keep(err) && len(task.Comm) == commLen-1 {
		task.FullName = o.fullName(t, v, task.Comm)
	}
	for _, f := range []struct {
		field Fields
		path  string
		read  func(ktype.Value) (uint64, error)
		max   uint64
		set   func(uint64)
	}{
		{FieldMM, "mm", ktype.Value.Pointer, 1<<64 - 1, func(v uint64) { task.MM = v }},
		{FieldPPID, "real_parent.tgid", ktype.Value.Uint, maxTasks, func(v uint64) { task.PPID = int(v) }},
		{FieldUID, "cred.euid.val", ktype.Value.Uint, 1<<32 - 1, func(v uint64) { task.UID = uint32(v) }},
		{FieldGID, "cred.egid.val", ktype.Value.Uint, 1<<32 - 1, func(v uint64) { task.GID = uint32(v) }},
		{FieldExited, "exit_state", ktype.Value.Uint, 1<<32 - 1, func(v uint64) { task.Exited = v != 0 }},
	} {
		n, err := f.read(v.Field(f.path))
		if err == nil && n > f.max {
			err = fmt.Errorf("%s is %#x: %w", f.path, n, ErrBadKernel)
		}
		if err == nil {
			f.set(n)
			continue
		}
		task.Unknown |= f.field
		if o.spent != nil {
			keep(o.spent)
		}
		if task.Err == nil {
			task.Err = lacking(err)
		}
	}
	return task, first
}

// maxThreadName bounds the name of a kernel thread.
const maxThreadName = 256

// fullName returns the name of a kernel thread whose first 15 bytes are comm, or "" if it
// is no more: struct kthread has it (kernel/kthread.c), to which worker_private points
// since 5.17.
func (o *op) fullName(t *ktype.Types, task ktype.Value, comm string) string {
	const kernelThread = 0x00200000 // PF_KTHREAD
	f, err := t.Offset("kthread.full_name")
	if err != nil {
		return ""
	}
	if flags, err := task.Field("flags").Uint(); err != nil || flags&kernelThread == 0 {
		return ""
	}
	thread, err := task.Field("worker_private").Pointer()
	if err != nil || thread == 0 {
		return ""
	}
	at, err := o.pointer(thread + f.Offset)
	if err != nil || at == 0 {
		return ""
	}
	name, err := o.str(at, maxThreadName)
	if err != nil || !strings.HasPrefix(name, comm) {
		return ""
	}
	return name
}

// optional returns zero if the types don't have a field.
func optional[T any](v T, err error) (T, error) {
	if errors.Is(err, ktype.ErrNoField) || errors.Is(err, ktype.ErrNoType) {
		var zero T
		return zero, nil
	}
	return v, err
}

// Processes returns the guest's processes, each as the thread that leads it, in
// the order of their creation. The first is the idle task, PID 0, if idle.
//
// Those that are there all the time are in it, whatever the guest does meanwhile. With
// an error it returns all that can be read: a bad pointer in the list doesn't hide the
// processes behind it. One in a process is that process' Err, and no error of the list.
func (k *Kernel) Processes(idle bool) ([]Task, error) {
	t, err := k.Types()
	if err != nil {
		return nil, err
	}
	first, err := k.initTask()
	if err != nil {
		return nil, err
	}
	member, err := t.Offset("task_struct.tasks")
	if err != nil {
		return nil, err
	}
	o := k.begin("processes")
	return again(o, func() ([]Task, error) {
		var tasks []Task
		if idle {
			task, err := o.task(first)
			if err != nil {
				return nil, err
			}
			tasks = append(tasks, task)
		}
		return o.tasks(t, first+member.Offset, "tasks", tasks)
	})
}

// tasks appends the tasks on a list, which are linked by the given member.
func (o *op) tasks(t *ktype.Types, head uint64, member string, tasks []Task) ([]Task, error) {
	f, err := t.Offset("task_struct." + member)
	if err != nil {
		return tasks, err
	}
	var bad faulty
	for at, err := range t.List(o, head, "task_struct", member, maxTasks) {
		if err != nil {
			return tasks, bad.with(err)
		}
		task, err := o.partOfTask(at)
		if (err != nil || task.Err != nil) && o.spent == nil && !o.linkedAt(at+f.Offset) {
			continue // gone meanwhile
		}
		if err != nil {
			if bad.add(fmt.Errorf("task at %#x: %w", at, err)); task.Comm == "" {
				continue // nothing of it is known
			}
		}
		tasks = append(tasks, task)
	}
	return tasks, bad.with(nil)
}

// linkedAt reports whether both neighbours of a list_head point to it.
func (o *op) linkedAt(at uint64) bool {
	word := uint64(o.bits / 8)
	next, err := o.pointer(at)
	if err != nil {
		return false
	}
	prev, err := o.pointer(at + word)
	if err != nil {
		return false
	}
	back, berr := o.pointer(next + word)
	to, terr := o.pointer(prev)
	return berr == nil && terr == nil && back == at && to == at
}

// faulty collects errors of elements of a list: the first, and how many there are.
type faulty struct {
	first error
	n     int
}

func (f *faulty) add(err error) {
	if f.n++; f.first == nil {
		f.first = err
	}
}

// with returns the errors and that of the list, or nil if there are none.
func (f *faulty) with(err error) error {
	first := f.first
	if f.n > 1 {
		first = fmt.Errorf("%w (and %d more)", first, f.n-1)
	}
	switch {
	case first == nil:
		return err
	case err == nil:
		return first
	}
	return fmt.Errorf("%w; %w", err, first)
}

// initTask returns the address of the first task, the idle one: by its symbol or, in a
// kernel without symbols of data, as it was inferred.
func (k *Kernel) initTask() (uint64, error) {
	if a := k.idleAddr.Load(); a != 0 {
		return a, nil
	}
	return k.symbol("init_task")
}

// again reads a list, and reads it again if that fails, as it may while the guest changes
// it. If it never succeeds, the most that was read of it is returned with the error.
func again[T any](o *op, read func() ([]T, error)) (list []T, err error) {
	for tries := 1; ; tries++ {
		var l []T
		if l, err = read(); err == nil {
			return l, nil
		}
		if len(l) > len(list) {
			list = l
		}
		switch {
		case o.spent != nil, lacking(err) == nil, errors.Is(err, errOtherLayout):
			return list, err // it won't be otherwise
		case tries == listTries:
			return list, fmt.Errorf("tried %d times: %w", tries, err)
		}
	}
}

// Threads returns the threads of the process whose leader is given.
func (k *Kernel) Threads(leader Task) ([]Task, error) {
	t, err := k.Types()
	if err != nil {
		return nil, err
	}
	o := k.begin("threads")
	signal, err := t.At(o, "task_struct", leader.Addr).Field("signal").Pointer()
	if err != nil {
		return nil, err
	}
	head, err := t.Offset("signal_struct.thread_head")
	if err != nil {
		return nil, err
	}
	return again(o, func() ([]Task, error) {
		return o.tasks(t, signal+head.Offset, "thread_node", nil)
	})
}

// Process returns the process with the given id, or ErrNoProcess. Id 0 is the
// idle task.
func (k *Kernel) Process(pid int) (Task, error) {
	tasks, err := k.Processes(pid == 0)
	for _, t := range tasks {
		if t.TGID == pid {
			return t, nil
		}
	}
	if err == nil {
		err = fmt.Errorf("%d: %w", pid, ErrNoProcess)
	}
	return Task{}, err
}

// Current returns the task that a vCPU runs, given the base of its per-CPU
// variables: its GS base while it is in the kernel, or [Kernel.PerCPU].
func (k *Kernel) Current(base uint64) (Task, error) {
	addr, err := k.currentTask(base)
	if err != nil {
		return Task{}, err
	}
	return k.Task(addr)
}

// currentTask finds what the kernel calls current: the per-CPU variable
// current_task, which was part of struct pcpu_hot from 6.2 to 6.14. A kernel whose
// symbols are only functions shows in its code where it is.
func (k *Kernel) currentTask(base uint64) (uint64, error) {
	at, err := k.currentVariable()
	if err != nil {
		return 0, err
	}
	if at += base; k.bits == 32 {
		at &= 1<<32 - 1
	}
	return k.pointer(at)
}

// currentVariable returns the address of that variable, to which the base is added.
func (k *Kernel) currentVariable() (uint64, error) {
	at, err := k.symbol("current_task")
	if k == nil || err == nil {
		return at, err
	}
	hot, herr := k.symbol("pcpu_hot")
	if herr != nil {
		at, cerr := k.currentByCode()
		if cerr != nil {
			return 0, fmt.Errorf("%w; %w", err, cerr)
		}
		return at, nil
	}
	t, err := k.Types()
	if err != nil {
		return 0, err
	}
	f, err := t.Offset("pcpu_hot.current_task")
	if err != nil {
		return 0, err
	}
	return hot + f.Offset, nil
}

// PerCPU returns the base of the per-CPU variables of a CPU, by the kernel's own
// number: what is added to the address of a per-CPU symbol.
func (k *Kernel) PerCPU(cpu int) (uint64, error) {
	if cpu < 0 || cpu >= maxCPUs {
		return 0, fmt.Errorf("CPU %d: %w", cpu, ErrBadKernel)
	}
	table, err := k.symbol("__per_cpu_offset")
	if err != nil {
		return 0, err
	}
	return k.pointer(table + uint64(cpu)*uint64(k.bits/8))
}

// hasMemory returns nil if the task has memory of its own.
func (t Task) hasMemory() error {
	switch {
	case t.Unknown&FieldMM != 0 && t.Err == nil:
		return fmt.Errorf("%v: whether it has user memory is not known: %w: they lack task_struct.mm", t, ErrNoTypes)
	case t.Unknown&FieldMM != 0:
		return fmt.Errorf("%v: whether it has user memory is not known: %w", t, t.Err)
	case t.MM == 0:
		return fmt.Errorf("%v: %w", t, ErrNoMemory)
	}
	return nil
}

// UserRoot returns the page tables of a task's own memory. They map the kernel as
// well. For a task without memory of its own it returns ErrNoMemory.
func (k *Kernel) UserRoot(t Task) (paging.Root, error) {
	if k == nil {
		return 0, ErrNoKernel
	}
	if err := t.hasMemory(); err != nil {
		return 0, err
	}
	types, err := k.Types()
	if err != nil {
		return 0, err
	}
	pgd, err := types.At(k, "mm_struct", t.MM).Field("pgd").Pointer()
	if err != nil {
		return 0, err
	}
	// mm->pgd is where the kernel sees the table; the frame behind it is a machine
	// frame for a PV guest, as a root must be.
	tr, err := k.mem.Translate(k.Root(), paging.VAddr(pgd))
	if err != nil {
		return 0, err
	}
	return paging.Root(tr.Phys()), nil
}

// ReadUser reads memory of a process as it sees it. An error means that not all
// of it could be read: pages may be absent, or swapped out.
func (k *Kernel) ReadUser(t Task, addr uint64, b []byte) error {
	root, err := k.UserRoot(t)
	if err != nil {
		return err
	}
	_, err = k.mem.Read(root, paging.VAddr(addr), b)
	return err
}

// A Layout is where the parts of a process's memory are, from struct mm_struct:
// XenAccess' xa_linux_taskaddr_t.
type Layout struct {
	StartCode, EndCode uint64
	StartData, EndData uint64
	StartBrk, Brk      uint64
	StartStack         uint64
	ArgStart, ArgEnd   uint64
	EnvStart, EnvEnd   uint64
}

// Layout returns where the parts of a task's memory are.
func (k *Kernel) Layout(t Task) (Layout, error) {
	if k == nil {
		return Layout{}, ErrNoKernel
	}
	if err := t.hasMemory(); err != nil {
		return Layout{}, err
	}
	types, err := k.Types()
	if err != nil {
		return Layout{}, err
	}
	v := types.At(k, "mm_struct", t.MM)
	var l Layout
	for _, f := range []struct {
		name string
		dst  *uint64
	}{
		{"start_code", &l.StartCode}, {"end_code", &l.EndCode},
		{"start_data", &l.StartData}, {"end_data", &l.EndData},
		{"start_brk", &l.StartBrk}, {"brk", &l.Brk},
		{"start_stack", &l.StartStack},
		{"arg_start", &l.ArgStart}, {"arg_end", &l.ArgEnd},
		{"env_start", &l.EnvStart}, {"env_end", &l.EnvEnd},
	} {
		if *f.dst, err = v.Field(f.name).Uint(); err != nil {
			return Layout{}, err
		}
	}
	return l, nil
}

// maxCmdline bounds a command line, as ps does.
const maxCmdline = 128 << 10

// Cmdline returns the arguments of a task's process, or nil if it has no memory
// of its own.
func (k *Kernel) Cmdline(t Task) ([]string, error) {
	l, err := k.Layout(t)
	if errors.Is(err, ErrNoMemory) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if l.ArgEnd < l.ArgStart {
		return nil, fmt.Errorf("%v: arguments from %#x to %#x: %w", t, l.ArgStart, l.ArgEnd, ErrBadKernel)
	}
	b := make([]byte, min(l.ArgEnd-l.ArgStart, maxCmdline))
	if err := k.ReadUser(t, l.ArgStart, b); err != nil {
		return nil, err
	}
	s := strings.TrimSuffix(string(b), "\x00")
	if s == "" {
		return nil, nil
	}
	return strings.Split(s, "\x00"), nil
}

// maxCgroups bounds the depth of a cgroup.
const maxCgroups = 64

// Cgroup returns the path of a task's cgroup in the unified hierarchy
// (cgroup v2), as /proc/PID/cgroup shows it after "0::".
func (k *Kernel) Cgroup(t Task) (string, error) {
	types, err := k.Types()
	if err != nil {
		return "", err
	}
	o := k.begin("cgroup")
	kn, err := types.At(o, "task_struct", t.Addr).Field("cgroups.dfl_cgrp.kn").Pointer()
	if err != nil {
		return "", err
	}
	parent := "parent"
	if _, err := types.Offset("kernfs_node.parent"); err != nil {
		parent = "__parent" // since 6.15
	}
	var names []string
	for range maxCgroups {
		v := types.At(o, "kernfs_node", kn)
		up, err := v.Field(parent).Pointer()
		if err != nil {
			return "", err
		}
		if up == 0 {
			slices.Reverse(names)
			return "/" + strings.Join(names, "/"), nil
		}
		at, err := v.Field("name").Pointer()
		if err != nil {
			return "", err
		}
		name, err := o.str(at, 256)
		if err != nil {
			return "", err
		}
		names = append(names, name)
		kn = up
	}
	return "", fmt.Errorf("%v: cgroups nested more than %d deep: %w", t, maxCgroups, ErrBadKernel)
}

func le64(b []byte) uint64 { return binary.LittleEndian.Uint64(b) }
func le32(b []byte) uint32 { return binary.LittleEndian.Uint32(b) }
