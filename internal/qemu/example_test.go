package qemu_test

import (
	"context"
	"fmt"
	"log"

	"github.com/vmprobes/vmprobes/internal/qemu"
	"github.com/vmprobes/vmprobes/paging"
)

// The guest was started with -gdb unix:/run/vm.gdb,server=on,wait=off.
func ExampleDial() {
	vm, err := qemu.Dial(context.Background(), "qemu:/run/vm.gdb", nil)
	if err != nil {
		log.Fatal(err)
	}
	defer vm.Close()
	// All of this sees one state of the guest, which is stopped once.
	if err := vm.Freeze(); err != nil {
		log.Fatal(err)
	}
	defer vm.Thaw()
	cpus, err := vm.CPUs()
	if err != nil {
		log.Fatal(err)
	}
	for i, c := range cpus {
		mode, err := paging.ModeOf(c.CR0, c.CR4, c.EFER)
		if err != nil {
			log.Fatal(err)
		}
		var entry [8]byte
		memory := paging.New(vm, mode)
		if _, err := memory.Read(paging.Root(c.CR3), paging.VAddr(c.IDT), entry[:]); err != nil {
			log.Fatal(err)
		}
		fmt.Printf("vCPU %d at %#x, first word of its IDT % x\n", i, c.IP, entry)
	}
}
