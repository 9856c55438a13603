package target

import (
	"context"
	"errors"
	"strings"

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
	vm, err := qemu.Dial(ctx, name, &qemu.Options{ProcMem: true})
	if err != nil && !errors.Is(err, qemu.ErrNoStub) && !errors.Is(err, qemu.ErrBusy) && !errors.Is(err, qemu.ErrTarget) && ctx.Err() == nil {
		vm, err = qemu.Dial(ctx, name, nil)
	}
	if err != nil {
		return nil, err
	}
	i := vm.Info()
	g := &qemuGuest{VM: vm, info: Info{Name: i.Name, Kind: HVM, VCPUs: i.VCPUs}}
	if g.info.Name == "" {
		_, g.info.Name, _ = strings.Cut(name, ":")
	}
	return g, nil
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
