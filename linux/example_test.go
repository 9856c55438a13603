package linux_test

import (
	"context"
	"fmt"

	"github.com/vmprobes/vmprobes/internal/kerneltest"
	"github.com/vmprobes/vmprobes/linux"
)

// exampleKernel finds the kernel of a small guest. Programs get theirs from
// xenaccess.Guest.Linux, for a running guest or a saved one, or from Discover, for a
// Machine of their own.
func exampleKernel() *linux.Kernel {
	guest := kerneltest.NewSynthetic(kerneltest.Layout{})
	kernel, err := linux.Discover(context.Background(), guest.Machine(), nil)
	if err != nil {
		panic(err)
	}
	return kernel
}

func ExampleKernel_Lookup() {
	kernel := exampleKernel()
	for _, name := range []string{"fn_0042", "sys_openat", "demo:demo_run"} {
		sym, err := kernel.Lookup(name)
		if err != nil {
			fmt.Println(err)
			continue
		}
		if note := sym.Note(); note != "" {
			fmt.Println(note)
		}
		fmt.Println(sym)
	}
	// Output:
	// ffffffff810002b0 t fn_0042
	// this kernel has no sys_openat; __x64_sys_openat, the wrapper of the system call, is used: its one argument points to the caller's registers
	// ffffffff8100a0a0 T __x64_sys_openat
	// ffffffffc0000010 T demo_run [demo]
}

func ExampleKernel_Processes() {
	kernel := exampleKernel()
	tasks, err := kernel.Processes(false)
	if err != nil {
		fmt.Println(err)
		return
	}
	for _, t := range tasks[:3] {
		fmt.Println(t)
	}
	// A kernel that wasn't found is nil.
	_, err = (*linux.Kernel)(nil).Processes(false)
	fmt.Println(err)
	// Output:
	// init[1]
	// kthreadd[2]
	// kworker/0:0[3]
	// no Linux kernel found: has the guest booted?
}

func ExampleKernel_Function() {
	kernel := exampleKernel()
	sym, err := kernel.Lookup("sys_openat")
	if err != nil {
		fmt.Println(err)
		return
	}
	f, err := kernel.Function(sym.Addr)
	if err != nil {
		fmt.Println(err)
		return
	}
	for _, p := range f.Params {
		fmt.Println(p.Type, p.Name)
	}
	// Output:
	// int dfd
	// const char * filename
	// int flags
}

func ExampleKernel_Place() {
	kernel := exampleKernel()
	for _, name := range []string{"fn_0400", "fn_0300"} {
		sym, err := kernel.Lookup(name)
		if err != nil {
			fmt.Println(err)
			continue
		}
		at, err := kernel.Place(sym.Addr, linux.Placing{})
		if err != nil {
			fmt.Println(err)
			continue
		}
		fmt.Printf("%s: %d bytes after its beginning\n", name, at-sym.Addr)
	}
	// Output:
	// fn_0400: 5 bytes after its beginning
	// 0xffffffff810012d0: no place for a probe: the kernel rewrites the instruction while it runs (a jump label)
}
