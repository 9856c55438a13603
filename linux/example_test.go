package linux_test

import (
	"context"
	"errors"
	"fmt"
	"log"

	"github.com/vmprobes/vmprobes/image"
	"github.com/vmprobes/vmprobes/internal/kerneltest"
	"github.com/vmprobes/vmprobes/linux"
)

// Everything comes out of the guest's memory: here that of a small guest made for
// tests, as it would be of a real one.
func Example() {
	guest := kerneltest.NewSynthetic(kerneltest.Layout{}).Machine()
	k, err := linux.Discover(context.Background(), guest, nil)
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(k.Release())

	tasks, err := k.Processes(false)
	if err != nil {
		fmt.Println(err)
		return
	}
	for _, t := range tasks {
		fmt.Printf("%d %q, child of %d\n", t.TGID, t.Comm, t.PPID)
	}

	openat, err := k.Syscall("openat")
	fmt.Println(openat, err)

	// Where the guest's own kprobes could not stand, no probe of ours may.
	init, err := k.Symbols().Lookup("init_task")
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(errors.Is(k.Probeable(init.Addr), linux.ErrNotProbeable))
	// Output:
	// 9.9.9-synthetic
	// 1 "init", child of 0
	// 2 "kthreadd", child of 0
	// 3 "kworker/0:0", child of 2
	// 40 "daemon", child of 1
	// 50 "zombie\x1b[31m", child of 40
	// openat(int dfd, const char * filename, int flags) <nil>
	// true
}

// dump is a [linux.Machine] of a saved image: its frames, and the registers of its
// CPUs.
type dump struct{ *image.Image }

func (s dump) CPUs() (cpus []linux.CPU, err error) {
	for _, c := range s.Image.CPUs() {
		if !c.Offline && c.Has&image.CR3 != 0 {
			cpus = append(cpus, linux.CPU{CR0: c.CR0, CR3: c.CR3, CR4: c.CR4, EFER: c.EFER, PV: s.Kind() == image.PV})
		}
	}
	return cpus, nil
}

// A Machine is two methods: any source of frames and registers can be one. (Package
// xenaccess has them for Xen domains, QEMU guests and images.)
func ExampleMachine() {
	m, err := image.Open("guest.core", nil)
	if err != nil {
		log.Fatal(err)
	}
	defer m.Close()
	k, err := linux.Discover(context.Background(), dump{m}, nil)
	if err != nil {
		log.Fatal(err)
	}
	for _, rung := range k.Explain() {
		fmt.Println(rung)
	}
}
