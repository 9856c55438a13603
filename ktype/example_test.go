package ktype_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"github.com/vmprobes/vmprobes/ktype"
)

// ram is a Memory with one piece of it.
type ram struct {
	base uint64
	data []byte
}

func (r ram) Read(addr uint64, b []byte) error {
	off := addr - r.base
	if off > uint64(len(r.data)) || uint64(len(b)) > uint64(len(r.data))-off {
		return errors.New("not mapped")
	}
	copy(b, r.data[off:])
	return nil
}

// types has what is known of a kernel without type information; with it,
// ktype.FromBTF or ktype.ParseFile gives all.
func types() *ktype.Types {
	t, err := ktype.New("inferred", 8, ktype.Struct{Name: "task_struct", Fields: []ktype.StructField{
		{Name: "pid", Offset: 0, Type: "int"},
		{Name: "real_parent", Offset: 8, Type: "task_struct *"},
		{Name: "comm", Offset: 16, Type: "char[16]"},
	}})
	if err != nil {
		panic(err)
	}
	return t
}

// tasks has init at 0x1000 and a shell, its child, at 0x1020.
func tasks() ram {
	m := ram{0x1000, make([]byte, 64)}
	binary.LittleEndian.PutUint32(m.data, 1)
	copy(m.data[16:], "init")
	binary.LittleEndian.PutUint32(m.data[32:], 77)
	binary.LittleEndian.PutUint64(m.data[40:], 0x1000)
	copy(m.data[48:], "sh")
	return m
}

func ExampleTypes_Offset() {
	f, err := types().Offset("task_struct.comm")
	fmt.Println(f.Offset, f.Size, f.Type, err)
	_, err = types().Offset("task_struct.com")
	fmt.Println(err)
	// Output:
	// 16 16 char[16] <nil>
	// task_struct.com: no such field: struct task_struct has no "com" (near: comm)
}

func ExampleTypes_At() {
	task := types().At(tasks(), "task_struct", 0x1020)
	name, err := task.Field("real_parent.comm").CString()
	fmt.Println(name, err)
	_, err = task.Field("real_parent.real_parent.comm").CString()
	fmt.Println(err)
	// Output:
	// init <nil>
	// task_struct.real_parent.real_parent at 0x1008: null pointer
}

func ExampleTypes_Decode() {
	var p struct {
		Pid    int    `ktype:"pid"`
		Comm   string `ktype:"comm"`
		Parent struct {
			Pid  int    `ktype:"pid"`
			Comm string `ktype:"comm"`
		} `ktype:"real_parent,optional"`
	}
	err := types().Decode(tasks(), "task_struct", 0x1020, &p)
	fmt.Println(p, err)
	// Output: {77 sh {1 init}} <nil>
}

func ExampleTypes_Print() {
	if err := types().Print(os.Stdout, "task_struct"); err != nil {
		fmt.Println(err)
	}
	// Output:
	// struct task_struct {
	// 	int pid;                                     /*     0     4 */
	// 	struct task_struct *real_parent;             /*     8     8 */
	// 	char comm[16];                               /*    16    16 */
	// }; /* size: 32 */
}
