package linux

import (
	"bytes"
	"errors"
	"fmt"
	"slices"

	"github.com/vmprobes/vmprobes/ktype"
)

// Without type information a few offsets are found out from the structures
// themselves: what is known of them is whom they point to. The idle task,
// init_task, is where all that begins.

// ErrNotInferred: the guest's structures don't show where their members are.
var ErrNotInferred = errors.New("offsets can't be told from the guest's structures")

// Bounds. struct task_struct has 9 KiB or so; its name has 16 bytes
// (TASK_COMM_LEN).
const (
	taskSize     = 12 << 10
	commLen      = 16
	maxCandidate = 64 // places that could be the idle task, or its list
	fewTasks     = 3  // followed for a first impression
)

// idleTask is what was read of a task that could be the idle one.
type idleTask struct {
	k    *Kernel
	addr uint64 // of what was read; of the task itself, once that is known
	b    []byte
	word int // 4 or 8
	comm int // offsets, -1: unknown
	list int
	pid  int
	mm   int
	next []uint64 // the first tasks behind it
}

// inferTypes finds where struct task_struct has its name, list, ids and memory.
func (k *Kernel) inferTypes() (*ktype.Types, error) {
	var idle *idleTask
	init, err := k.initTask()
	if err == nil {
		idle, err = k.inferTask(init)
	} else {
		// A kernel built without CONFIG_KALLSYMS_ALL has only functions among its
		// symbols: any "swapper" in its data may be the idle task's name.
		idle, err = k.searchTask()
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
	k.idleAddr.Store(idle.addr)
	k.explain("types", nil, fmt.Sprintf("the list at +%d closes, with a name in each of its tasks; ids at +%d count 0, 1, 2", idle.list, idle.pid),
		"inferred from the idle task at %#x: comm +%d, tasks +%d, pid +%d, mm +%d", idle.addr, idle.comm, idle.list, idle.pid, idle.mm)
	return t, nil
}

// inferTask looks at the task at addr, with the name of the idle one.
func (k *Kernel) inferTask(addr uint64) (*idleTask, error) {
	t := &idleTask{k: k, addr: addr, b: make([]byte, taskSize), word: k.bits / 8, comm: -1, list: -1, pid: -1, mm: -1}
	if err := k.Read(addr, t.b); err != nil {
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
func (k *Kernel) searchTask() (*idleTask, error) {
	var found *idleTask
	tried := 0
	page := make([]byte, 4096+commLen)
	for _, r := range k.ranges {
		if !r.Writable {
			continue
		}
		for at := r.Addr; at < r.Addr+r.Size; at += 4096 {
			b := page[:min(uint64(len(page)), r.Addr+r.Size-at)]
			if k.Read(at, b) != nil {
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
				t, err := k.taskAround(name)
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

// taskAround takes what is at addr for the name of a task whose beginning isn't
// known. Offsets are counted from so far before it that they are in what is read.
func (k *Kernel) taskAround(name uint64) (*idleTask, error) {
	const before = taskSize / 2
	t := &idleTask{k: k, addr: name - before, b: make([]byte, taskSize), word: k.bits / 8, comm: before, list: -1, pid: -1, mm: -1}
	if err := k.Read(t.addr, t.b); err != nil {
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
	// Tasks are on more than one list only where one of them has them all: the
	// list of all tasks is the one that closes.
	lists = slices.DeleteFunc(lists, func(off int) bool { return !t.closes(off) })
	if len(lists) != 1 {
		return fmt.Errorf("%w: %d lists of tasks", ErrNotInferred, len(lists))
	}
	t.list = lists[0]
	t.next, _ = t.follow(t.list)
	if err := t.inferIDs(); err != nil {
		return err
	}
	return t.inferMM()
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
func (t *idleTask) read(task uint64, off int) (uint64, error) { return t.k.pointer(task + uint64(off)) }

// follow follows the list at an offset for a few tasks: each must point back and
// have a name.
func (t *idleTask) follow(off int) (tasks []uint64, ok bool) {
	if off+2*t.word > len(t.b) {
		return nil, false
	}
	head := t.addr + uint64(off)
	prev, next := head, t.at(off)
	for range fewTasks {
		if next == head || next < t.k.kernelHalf() {
			return nil, false
		}
		back, err := t.k.pointer(next + uint64(t.word))
		if err != nil || back != prev || !t.named(next-uint64(off)) {
			return nil, false
		}
		tasks = append(tasks, next-uint64(off))
		prev = next
		if next, err = t.k.pointer(next); err != nil {
			return nil, false
		}
	}
	return tasks, true
}

// closes follows the list at an offset until it comes back.
func (t *idleTask) closes(off int) bool {
	head := t.addr + uint64(off)
	next := t.at(off)
	for range maxTasks {
		if next == head {
			return true
		}
		if !t.named(next - uint64(off)) {
			return false
		}
		var err error
		if next, err = t.k.pointer(next); err != nil {
			return false
		}
	}
	return false
}

// named reports whether the task at addr has a name where the idle one has.
func (t *idleTask) named(addr uint64) bool {
	var b [commLen]byte
	if t.k.Read(addr+uint64(t.comm), b[:]) != nil {
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
		if err := t.k.Read(task, b); err != nil {
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

// inferMM finds mm and active_mm: two pointers, the same in init, none in
// kthreadd and the idle task but for the memory that these borrow.
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
		if mm >= t.k.kernelHalf() && mm == active && none == 0 {
			all = append(all, off)
		}
	}
	if len(all) != 1 {
		return fmt.Errorf("%w: %d places for the memory of a process", ErrNotInferred, len(all))
	}
	t.mm = all[0]
	return nil
}

// structs returns what has been found as layouts. Where the beginning of the task
// isn't known, offsets count from what was read.
func (t *idleTask) structs() ([]ktype.Struct, error) {
	task := ktype.Struct{Name: "task_struct", Size: taskSize, Fields: []ktype.StructField{
		{Name: "tasks", Offset: uint64(t.list), Type: "list_head"},
		{Name: "mm", Offset: uint64(t.mm), Type: "mm_struct *"},
		{Name: "pid", Offset: uint64(t.pid), Type: "int"},
		{Name: "tgid", Offset: uint64(t.pid + 4), Type: "int"},
		{Name: "comm", Offset: uint64(t.comm), Type: "char[16]"},
	}}
	// real_parent is the first pointer of the idle task to itself: it is its own
	// parent.
	for off := t.pid + 8; off+t.word <= t.comm; off += t.word {
		if t.at(off) == t.addr {
			task.Fields = append(task.Fields, ktype.StructField{Name: "real_parent", Offset: uint64(off), Type: "task_struct *"})
			break
		}
	}
	structs := []ktype.Struct{
		listHead(uint64(t.word)),
		task,
	}
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

// pgd finds where struct mm_struct has its page tables: init_mm has the kernel's
// own.
func (t *idleTask) pgd() (off uint64, ok bool) {
	mm, err := t.k.symbol("init_mm")
	if err != nil {
		return 0, false
	}
	for _, name := range []string{"init_top_pgt", "init_level4_pgt", "swapper_pg_dir"} {
		table, err := t.k.symbol(name)
		if err != nil {
			continue
		}
		const size = 1 << 10
		b := make([]byte, size)
		if t.k.Read(mm, b) != nil {
			return 0, false
		}
		n := 0
		for i := 0; i < size; i += t.word {
			if word(b[i:], t.word) == table {
				off = uint64(i)
				n++
			}
		}
		return off, n == 1
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
