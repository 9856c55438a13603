package target

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/journal"
	"github.com/vmprobes/vmprobes/internal/recovery"
	"github.com/vmprobes/vmprobes/internal/sentinel"
	"github.com/vmprobes/vmprobes/internal/xen"
	"github.com/vmprobes/vmprobes/xenctrl"
)

// journalDir is where tools write down what they have in a guest, for who comes after
// them, and agree on who is attached. It is on a tmpfs: nothing of it survives the
// hypervisor, as nothing in a guest does.
var journalDir = "/run/vmprobes"

// JournalDir returns the folder of the journals: that of root, or of the user who runs
// VMs without being root.
func JournalDir() string {
	if os.Geteuid() <= 0 {
		return journalDir
	}
	if dir := os.Getenv("XDG_RUNTIME_DIR"); filepath.IsAbs(dir) {
		return filepath.Join(dir, "vmprobes")
	}
	return filepath.Join(os.TempDir(), fmt.Sprintf("vmprobes-%d", os.Geteuid()))
}

// JournalDirs returns the folders in which this user's tools may have journals: those of
// Xen guests are all in root's, whoever it is that may look into them.
func JournalDirs() []string {
	if dir := JournalDir(); dir != journalDir {
		return []string{journalDir, dir}
	}
	return []string{journalDir}
}

// domainJournal is the name of a domain's journal.
func domainJournal(id xenctrl.DomID) string { return fmt.Sprintf("domain-%d", id) }

// repairFor bounds how long Attach tries to repair a guest whose last owner died.
const repairFor = 30 * time.Second

// own makes this process the guest's owner, in its journal. If its last owner died the
// guest is repaired first.
func (g *xenGuest) own(ctx context.Context, s Setup) (*recovery.Log, error) {
	dom := g.dom
	id := recovery.Identity(g.info.Name, s.BuildID, dom)
	vcpus := dom.MaxVCPUID + 1
	name := domainJournal(dom.ID)
	begin := time.Now()
	for try := 0; ; {
		l, err := recovery.Create(journalDir, name, id, vcpus, xen.StateSize(vcpus))
		if err == nil {
			return l, nil
		}
		var busy *journal.BusyError
		switch {
		case errors.As(err, &busy):
		case !errors.Is(err, journal.ErrHot) || try == 3:
			return nil, fmt.Errorf("write down who owns the guest: %w", err)
		default:
			try++
			ctx, cancel := context.WithTimeout(ctx, repairFor)
			r, err := Recover(ctx, journal.Path(journalDir, name), s.log())
			cancel()
			if !errors.As(err, &busy) && err != nil && !errors.Is(err, fs.ErrNotExist) { // else somebody else has
				return nil, fmt.Errorf("repair the guest, whose last owner, %v, died: %w", r.Owner, err)
			}
		}
		if busy == nil {
			continue
		}
		// If the owner that the journal names is dead, its guardian is at it, or somebody
		// else who repairs the guest, and doesn't take long.
		if lives(busy.Owner) || time.Since(begin) > repairFor {
			return nil, owned(busy)
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// lives reports whether a process is there, as far as that can be told.
func lives(o journal.Owner) bool {
	if o.PID != 0 && o.Start == 0 {
		return true
	}
	start, err := journal.StartTime(o.PID)
	return err == nil && start == o.Start
}

// owned is the error of a guest that has an owner.
func owned(busy *journal.BusyError) error {
	return sentinel.As(fmt.Errorf("%v is attached to the guest: end it first", busy.Owner), ErrBusy)
}

// TakeOver is Recover by who has mapped the ring of the guest's monitor, or nil.
func TakeOver(ctx context.Context, path string, ring *Ring, log *slog.Logger) (r recovery.Report, err error) {
	f, err := journal.Open(path)
	if err != nil {
		return r, err
	}
	r.Guest, r.Owner = f.Guest(), f.Owner()
	if r.Guest.Kind == "qemu" {
		// Its gdbstub takes the breakpoints out when the next tool connects.
		return r, f.Remove()
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	h, err := xenctrl.Open()
	if err != nil {
		return r, explain(err)
	}
	defer func() { err = errors.Join(err, h.Close()) }()
	var page xen.Ring
	if ring != nil {
		page = ring.ring
	}
	r, err = recovery.TakeOver(ctx, xen.Live(h, xenctrl.DomID(r.Guest.Domain)), page, f, log)
	switch {
	case err != nil:
	case r.NothingThere:
		log.Info("a guest whose owner died isn't there any more", "domain", r.Guest.Name, "owner", r.Owner.String())
	default:
		log.Info("repaired a guest whose owner died", "domain", r.Guest.Name, "owner", r.Owner.String(),
			"breakpoints", r.Breaks, "slots", r.Slots, "paused", r.StillPaused, "took", r.Took)
	}
	if r.Changed != nil {
		log.Warn("left alone what the guest has changed since", "domain", r.Guest.Name, "what", r.Changed)
	}
	return r, err
}

// own writes down who is attached to a VM. Its gdbstub takes one tool, and takes the
// breakpoints of a dead one out by itself when the next one connects. Where that can't be
// written down the VM is probed all the same.
func (g *qemuGuest) own(s Setup) (*journal.File, error) {
	i := g.VM.Info()
	return ownVM(i.Socket, journal.Identity{Name: g.info.Name, Kind: "qemu", Handle: []byte(i.UUID)}, s.log())
}

// ownVM makes this process the owner of the VM with that socket, in its journal.
func ownVM(socket string, id journal.Identity, log *slog.Logger) (*journal.File, error) {
	name := vmJournal(socket)
	for begin := time.Now(); ; time.Sleep(time.Millisecond) {
		f, err := journal.Create(JournalDir(), name, id, 0)
		if errors.Is(err, journal.ErrHot) {
			_, err = Recover(context.Background(), journal.Path(JournalDir(), name), log)
			if err == nil || errors.Is(err, fs.ErrNotExist) { // somebody else has
				continue
			}
		}
		var busy *journal.BusyError
		switch {
		case err == nil:
			return f, nil
		case !errors.As(err, &busy):
			log.Debug("not written down who owns the VM", "err", err)
			return nil, nil
		// Else it is written down in a moment who that is.
		case lives(busy.Owner) || time.Since(begin) > writtenFor:
			return nil, owned(busy)
		}
	}
}

// writtenFor bounds how long a process may take to write down that it owns a VM, or that
// nobody does any more.
const writtenFor = 2 * time.Second

// owner is the driver of a guest whose owner is written down, until it is left.
type owner struct {
	Driver
	journal interface{ Remove() error }
}

func (d owner) Close() error {
	err := d.Driver.Close()
	if err == nil || errors.Is(err, breakpoint.ErrGone) {
		err = errors.Join(err, d.journal.Remove())
	}
	return err
}

// A Journaled driver writes down what the engine changes.
type Journaled interface{ Journal() breakpoint.Journal }

// journaled is an owner whose journal has more than that.
type journaled struct {
	owner
	log *recovery.Log
}

func (d journaled) Journal() breakpoint.Journal { return d.log }
