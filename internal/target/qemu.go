package target

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/vmprobes/vmprobes/internal/journal"
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
		if errors.Is(err, qemu.ErrAttached) || errors.Is(err, qemu.ErrBusy) {
			err = ownedVM(name, err)
		}
		return nil, err
	}
	i := vm.Info()
	return &qemuGuest{VM: vm, info: Info{Name: qemuName(i), Given: i.Name, Kind: HVM, VCPUs: i.VCPUs}}, nil
}

// ownedVM says who is attached to a VM, if that is known; else it returns err.
func ownedVM(name string, err error) error {
	socket, serr := qemu.Socket(name)
	if serr != nil {
		return err
	}
	path := journal.Path(JournalDir(), vmJournal(socket))
	entries, lerr := journal.List(JournalDir())
	if lerr != nil {
		return err
	}
	for _, e := range entries {
		if e.Path == path && e.Err == nil && !e.Hot {
			return owned(&journal.BusyError{Owner: e.Owner, Path: path})
		}
	}
	return err
}

// vmJournal is the name of a VM's journal, by the address of the gdbstub's or the
// monitor's socket, whatever folder the tool was in that named it.
func vmJournal(socket string) string {
	if strings.HasPrefix(socket, ".") {
		if path, err := filepath.Abs(socket); err == nil {
			socket = path
		}
	}
	return "qemu:" + socket
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
func (g *qemuGuest) Attach(ctx context.Context, k Setup) (Driver, error) {
	if k.Watchdog != 0 {
		return nil, fmt.Errorf("%w: the guest isn't one of Xen's, and has no guardian", ErrNoWatchdog)
	}
	if err := k.wide(g); err != nil {
		return nil, err
	}
	own, err := g.own(k)
	if err != nil {
		return nil, known("", err)
	}
	d, err := g.VM.Attach(ctx)
	if err != nil {
		return nil, errors.Join(known("", err), own.Remove())
	}
	d.SetKernelRoot(k.Root)
	if len(k.Banner) > 0 {
		if err := d.SetIdentity(k.BannerAddr, k.Banner); err != nil {
			return nil, errors.Join(err, d.Close(), own.Remove())
		}
	}
	return owner{d, own}, nil
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

// Hold and LetGo implement [Holder].
func (g *qemuGuest) Hold() error  { return g.VM.Freeze() }
func (g *qemuGuest) LetGo() error { return g.VM.Thaw() }

// PhysicalPages implements [Sized].
func (g *qemuGuest) PhysicalPages() (uint64, error) {
	return g.VM.Info().RAM / paging.PageSize, nil
}
