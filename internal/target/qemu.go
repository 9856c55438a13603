package target

import (
	"context"
	"fmt"

	"github.com/vmprobes/vmprobes/internal/qemu"
	"github.com/vmprobes/vmprobes/linux"
	"github.com/vmprobes/vmprobes/paging"
)

// qemuGuest is a VM of QEMU's, under TCG or KVM.
type qemuGuest struct {
	*qemu.VM
	info Info
}

func openQEMU(ctx context.Context, name string) (Guest, error) {
	// Memory is read best from the QEMU process itself: the VM needn't stop for
	// that. It takes a process on this machine, and the right to trace it.
	vm, err := qemu.Dial(ctx, name, &qemu.Options{ProcMem: true, Fallback: true})
	if err != nil {
		return nil, err
	}
	i := vm.Info()
	return &qemuGuest{VM: vm, info: Info{Name: qemuName(i), Given: i.Name, Kind: HVM, VCPUs: i.VCPUs}}, nil
}

// qemuName returns a name that no other VM of this machine has. Whoever starts QEMU
// may give any -name, to several VMs the same one.
func qemuName(i qemu.Info) string {
	switch {
	case i.Name == "":
		return i.Socket
	case i.UUID != "":
		return fmt.Sprintf("%s (%s)", i.Name, i.UUID)
	}
	return fmt.Sprintf("%s (%s)", i.Name, i.Socket)
}

func (g *qemuGuest) Info() Info { return g.info }

// Attach implements [Guest].
func (g *qemuGuest) Attach(ctx context.Context) (Driver, error) {
	d, err := g.VM.Attach(ctx)
	if err != nil {
		return nil, known("", err)
	}
	return d, nil
}

// CPUs implements [linux.Machine].
func (g *qemuGuest) CPUs() ([]linux.CPU, error) {
	states, err := g.VM.CPUs()
	if err != nil {
		return nil, err
	}
	cpus := make([]linux.CPU, 0, len(states))
	for _, s := range states {
		cpus = append(cpus, linux.CPU{CR0: s.CR0, CR3: s.CR3, CR4: s.CR4, EFER: s.EFER})
	}
	return cpus, nil
}

// PhysicalPages implements [Sized]. Memory beyond 3 GiB has a hole before it: the
// size is of the RAM alone then.
func (g *qemuGuest) PhysicalPages() (uint64, error) {
	return g.VM.Info().RAM / paging.PageSize, nil
}
