package linux

import (
	"bytes"
	"errors"
	"fmt"
	"slices"

	"github.com/vmprobes/vmprobes/ktype"
	"github.com/vmprobes/vmprobes/paging"
)

// Without type information a few offsets are inferred from the structures themselves,
// by what they point to, beginning with the idle task, init_task.

// ErrNotInferred: the guest's structures don't show where their members are.
var ErrNotInferred = errors.New("offsets can't be inferred from the guest's structures")

// Bounds. struct task_struct has 9 KiB or so; its name has 16 bytes
// (TASK_COMM_LEN).
const (
	taskSize     = 12 << 10
	commLen      = 16
	maxCandidate = 4096 // places that could be the idle task's name
	fewTasks     = 3    // followed for a first impression
)

// idleTask is what was read of a task that could be the idle one.
type idleTask struct {
	o      *op
	addr   uint64 // of what was read
	b      []byte
	word   int      // 4 or 8
	comm   int      // offsets in what was read
	list   int      // tasks
	pid    int      // and, after it, tgid
	mm     int      // and active_mm
	parent int      // real_parent; 0 if it wasn't found
	start  int      // of the task itself
	next   []uint64 // the first tasks after it; addresses as far before the task as addr is
}

// inferTypes finds where struct task_struct has its name, list, ids and memory.
func (k *Kernel) inferTypes() (*ktype.Types, error) {
	o := k.begin("inferring types")
	init, err := k.initTask()
	find := func() (*idleTask, error) { return o.inferTask(init) }
	if err != nil {
		// A kernel built without CONFIG_KALLSYMS_ALL has only functions among its
		// symbols: any "swapper" in its data may be the idle task's name.
		find = o.searchTask
	}
	idle, err := patient(o, find)
	if o.spent != nil { // then what was found isn't all
		return nil, o.spent
	}
	if err != nil {
		return nil, err
	}
	structs, err := idle.structs()
	if err != nil {
		return nil, err
	}
	t, err := ktype.New("inferred", uint64(idle.word), structs...)
	if err != nil {
		return nil, err
	}
	start := idle.addr + uint64(idle.start)
	k.idleAddr.Store(start)
	off := func(i int) int { return i - idle.start }
	lacking := "users, states and threads"
	if idle.parent == 0 {
		lacking = "parents, " + lacking
	}
	k.explainFrom(Inferred, "types", nil, fmt.Sprintf("the list at +%d closes, and its first tasks have names; ids at +%d count 0, 1, 2; not known: %s of tasks, and all other types",
		off(idle.list), off(idle.pid), lacking),
		"inferred from the idle task at %#x: comm +%d, tasks +%d, pid +%d, mm +%d", start, off(idle.comm), off(idle.list), off(idle.pid), off(idle.mm))
	return t, nil
}

// inferTask infers offsets from the idle task, which is at addr.
func (o *op) inferTask(addr uint64) (*idleTask, error) {
	t := &idleTask{o: o, addr: addr, b: make([]byte, taskSize), word: o.bits / 8}
	if err := o.Read(addr, t.b); err != nil {
		return nil, err
	}
	for _, name := range []string{"swapper/0\x00", "swapper\x00"} {
		if i := bytes.Index(t.b, []byte(name)); i >= 0 {
			t.comm = i
			return t, t.infer()
		}
	}
	return nil, fmt.Errorf("%w: no task called swapper at %#x", ErrNotInferred, addr)
}

// searchTask tries every "swapper" in the image's data as the name of a task.
func (o *op) searchTask() (*idleTask, error) { return search(o, o.taskAround) }

// search tries every "swapper" in the image's data, until exactly one is what try looks
// for.
func search[T any](o *op, try func(name uint64) (*T, error)) (found *T, err error) {
	tried := 0
	page := make([]byte, 4096+commLen)
	for _, r := range o.ranges {
		if !r.Writable {
			continue
		}
		for at := r.Addr; at < r.Addr+r.Size; at += 4096 {
			b := page[:min(uint64(len(page)), r.Addr+r.Size-at)]
			if o.Read(at, b) != nil {
				continue
			}
			for from := 0; ; {
				i := bytes.Index(b[from:], []byte("swapper"))
				if i < 0 || from+i >= 4096 {
					break
				}
				name := at + uint64(from+i)
				from += i + 1
				if tried++; tried > maxCandidate {
					return nil, fmt.Errorf("%w: too many tasks called swapper", ErrNotInferred)
				}
				t, err := try(name)
				if err != nil {
					continue
				}
				if found != nil {
					return nil, fmt.Errorf("%w: several tasks called swapper", ErrNotInferred)
				}
				found = t
			}
		}
	}
	if found == nil {
		return nil, fmt.Errorf("%w: none of %d tasks called swapper leads to others", ErrNotInferred, tried)
	}
	return found, nil
}

// patient calls find again if it fails, a few times: the list of tasks may change while it
// is followed.
func patient[T any](o *op, find func() (*T, error)) (found *T, err error) {
	for range listTries {
		if found, err = find(); err == nil || o.spent != nil {
			break
		}
	}
	return found, err
}

// searchIdle finds the idle task of a kernel without symbols of data, by types: its id
// is 0, and by them it leads to all other tasks and back. The types are another kernel's
// if none does.
func (k *Kernel) searchIdle(t *ktype.Types) (uint64, error) {
	comm, err := t.Offset("task_struct.comm")
	if err != nil {
		return 0, err
	}
	tasks, err := t.Offset("task_struct.tasks")
	if err != nil {
		return 0, err
	}
	o := k.begin("idle task")
	try := func(name uint64) (*uint64, error) {
		addr := name - comm.Offset
		for _, id := range []string{"pid", "tgid"} {
			if n, err := optional(t.At(o, "task_struct", addr).Field(id).Int()); err != nil || n != 0 {
				return nil, errors.Join(ErrNotInferred, err)
			}
		}
		for _, err := range t.List(o, addr+tasks.Offset, "task_struct", "tasks", maxTasks) {
			if err != nil {
				return nil, err
			}
		}
		return &addr, nil
	}
	addr, err := patient(o, func() (*uint64, error) { return search(o, try) })
	if o.spent != nil {
		return 0, o.spent
	}
	if err != nil {
		return 0, err
	}
	return *addr, nil
}

// taskAround takes what is at name for the name of a task whose beginning isn't known.
// Offsets count from half of taskSize before it.
func (o *op) taskAround(name uint64) (*idleTask, error) {
	const before = taskSize / 2
	t := &idleTask{o: o, addr: name - before, b: make([]byte, taskSize), word: o.bits / 8, comm: before}
	if err := o.Read(t.addr, t.b); err != nil {
		return nil, err
	}
	return t, t.infer()
}

// infer finds the list of tasks, then the ids, then the memory.
func (t *idleTask) infer() error {
	var lists []int
	for off := t.comm &^ (t.word - 1); off >= 0; off -= t.word {
		if next, ok := t.follow(off); ok {
			lists = append(lists, off)
			t.next = next
		}
	}
	// The tasks may seem to be on several lists: the list of all tasks is the one that
	// closes.
	lists = slices.DeleteFunc(lists, func(off int) bool { return !t.closes(off) })
	if len(lists) != 1 {
		return fmt.Errorf("%w: %d lists of tasks", ErrNotInferred, len(lists))
	}
	t.list = lists[0]
	t.next, _ = t.follow(t.list)
	if err := t.inferIDs(); err != nil {
		return err
	}
	if err := t.inferMM(); err != nil {
		return err
	}
	return t.inferParent()
}

// at reads a word of t.
func (t *idleTask) at(off int) uint64 { return word(t.b[off:], t.word) }

func word(b []byte, n int) uint64 {
	if n == 4 {
		return uint64(le32(b))
	}
	return le64(b)
}

// read reads a word of another task, by offset.
func (t *idleTask) read(task uint64, off int) (uint64, error) { return t.o.pointer(task + uint64(off)) }

// follow follows the list at an offset for a few tasks: each must point back and
// have a name.
func (t *idleTask) follow(off int) (tasks []uint64, ok bool) {
	if off+2*t.word > len(t.b) {
		return nil, false
	}
	head := t.addr + uint64(off)
	prev, next := head, t.at(off)
	for range fewTasks {
		if next == head || next < t.o.kernelHalf() {
			return nil, false
		}
		back, err := t.o.pointer(next + uint64(t.word))
		if err != nil || back != prev || !t.named(next-uint64(off)) {
			return nil, false
		}
		tasks = append(tasks, next-uint64(off))
		prev = next
		if next, err = t.o.pointer(next); err != nil {
			return nil, false
		}
	}
	return tasks, true
}

// closes follows the list at an offset until it returns to its head. Names don't
// matter here: any process can give itself an odd one.
func (t *idleTask) closes(off int) bool {
	head := t.addr + uint64(off)
	prev, next := head, t.at(off)
	for range maxTasks {
		back, err := t.o.pointer(next + uint64(t.word))
		if err != nil || back != prev {
			return false
		}
		if next == head {
			return true
		}
		prev = next
		if next, err = t.o.pointer(next); err != nil {
			return false
		}
	}
	return false
}

// named reports whether the task at addr has a name where the idle one has.
func (t *idleTask) named(addr uint64) bool {
	var b [commLen]byte
	if t.o.Read(addr+uint64(t.comm), b[:]) != nil {
		return false
	}
	n := bytes.IndexByte(b[:], 0)
	if n < 1 {
		return false
	}
	for _, c := range b[:n] {
		if c < ' ' || c > '~' {
			return false
		}
	}
	return true
}

// inferIDs finds pid and tgid: two words of 32 bits, one after the other, which
// are 0, 1 and 2 in the idle task, init and kthreadd, and greater in the next.
func (t *idleTask) inferIDs() error {
	b := make([]byte, t.comm)
	var all []int
	values := make([][]byte, 0, fewTasks)
	for _, task := range t.next {
		if err := t.o.Read(task, b); err != nil {
			return err
		}
		values = append(values, bytes.Clone(b))
	}
	for off := t.list; off+8 <= t.comm; off += 4 {
		if le64(t.b[off:]) != 0 {
			continue
		}
		ok := true
		for i, v := range values {
			pid, tgid := le32(v[off:]), le32(v[off+4:])
			ok = ok && pid == tgid && (pid == uint32(i+1) || i == 2 && pid > 2 && pid < maxTasks)
		}
		if ok {
			all = append(all, off)
		}
	}
	if len(all) != 1 {
		return fmt.Errorf("%w: %d places for the process id", ErrNotInferred, len(all))
	}
	t.pid = all[0]
	return nil
}

// inferMM finds mm and active_mm: two pointers, side by side and equal in init. In
// kthreadd and the idle task, which only borrow memory (active_mm), mm is nil.
func (t *idleTask) inferMM() error {
	init, kthreadd := t.next[0], t.next[1]
	var all []int
	for off := t.list; off+2*t.word <= t.pid; off += t.word {
		if t.at(off) != 0 {
			continue
		}
		mm, err := t.read(init, off)
		if err != nil {
			return err
		}
		active, err := t.read(init, off+t.word)
		if err != nil {
			return err
		}
		none, err := t.read(kthreadd, off)
		if err != nil {
			return err
		}
		if mm >= t.o.kernelHalf() && mm == active && none == 0 {
			all = append(all, off)
		}
	}
	if len(all) != 1 {
		return fmt.Errorf("%w: %d places for the memory of a process", ErrNotInferred, len(all))
	}
	t.mm = all[0]
	return nil
}

// inferParent finds real_parent, and so where the task begins: the idle task is its
// own parent, and that of init and kthreadd.
func (t *idleTask) inferParent() error {
	name := t.addr + uint64(t.comm)
	for off := t.pid + 8; off+t.word <= t.comm; off += t.word {
		p := t.at(off)
		if p < t.addr || p > name {
			continue
		}
		child := 0
		for _, task := range t.next[:2] {
			parent, err := t.read(task, off)
			if err != nil {
				return err
			}
			if parent == p {
				child++
			}
		}
		if child == 2 {
			t.parent, t.start = off, int(p-t.addr)
			return nil
		}
	}
	return nil
}

// structs returns what has been found as layouts. Where the beginning of the task
// isn't known, offsets count from what was read.
func (t *idleTask) structs() ([]ktype.Struct, error) {
	off := func(i int) uint64 { return uint64(i - t.start) }
	if t.list < t.start {
		return nil, fmt.Errorf("%w: the idle task would begin after its list", ErrNotInferred)
	}
	task := ktype.Struct{Name: "task_struct", Size: taskSize, Fields: []ktype.StructField{
		{Name: "tasks", Offset: off(t.list), Type: "list_head"},
		{Name: "mm", Offset: off(t.mm), Type: "mm_struct *"},
		{Name: "pid", Offset: off(t.pid), Type: "int"},
		{Name: "tgid", Offset: off(t.pid + 4), Type: "int"},
		{Name: "comm", Offset: off(t.comm), Type: "char[16]"},
	}}
	if t.parent != 0 {
		task.Fields = append(task.Fields, ktype.StructField{Name: "real_parent", Offset: off(t.parent), Type: "task_struct *"})
	}
	structs := []ktype.Struct{listHead(uint64(t.word)), task}
	if pgd, ok := t.pgd(); ok {
		structs = append(structs, ktype.Struct{Name: "mm_struct", Size: pgd + uint64(t.word), Fields: []ktype.StructField{
			{Name: "pgd", Offset: pgd, Type: "void *"},
		}})
	}
	if t.word == 8 {
		structs = append(structs, usualModule)
	}
	return structs, nil
}

// pgd finds where struct mm_struct has its page tables: the only pointer in init's
// to tables that map the kernel.
func (t *idleTask) pgd() (off uint64, ok bool) {
	mm, err := t.read(t.next[0], t.mm)
	if err != nil {
		return 0, false
	}
	kernel := paging.VAddr(t.o.ranges[0].Addr)
	want, err := t.o.mem.Translate(t.o.Root(), kernel)
	if err != nil {
		return 0, false
	}
	const size = 1 << 9
	var b [size]byte
	if t.o.Read(mm, b[:]) != nil {
		return 0, false
	}
	for i := 0; i < size; i += t.word {
		p := word(b[i:], t.word)
		if p < t.o.kernelHalf() || p%32 != 0 { // PAE's have 32 bytes
			continue
		}
		tr, err := t.o.mem.Translate(t.o.Root(), paging.VAddr(p))
		if err != nil {
			continue
		}
		root := paging.Root(tr.Phys())
		if got, err := t.o.mem.Translate(root, kernel); err == nil && got.Frame == want.Frame {
			return uint64(i), true
		}
	}
	return 0, false
}

// kernelHalf returns the lowest address that can be the kernel's. With 5-level
// tables it isn't the usual 0xffff800000000000.
func (k *Kernel) kernelHalf() uint64 {
	if k.bits == 32 {
		return window32
	}
	return 1 << 63
}
