package target

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"strings"

	"github.com/vmprobes/vmprobes/internal/journal"
	"github.com/vmprobes/vmprobes/internal/xen"
	"github.com/vmprobes/vmprobes/xenctrl"
)

// States of a guest.
const (
	Served   = "served"   // its owner lives
	Left     = "left"     // its owner died, and it is not repaired
	Repaired = "repaired" // its owner died, and somebody repairs it at this moment
	Paused   = "paused"   // by somebody who is no owner
	Debugged = "debugged" // by a tool that keeps no journal
	Unknown  = "unknown"  // its journal can't be read
)

// State is a guest that somebody has attached to, or has paused.
type State struct {
	Name    string
	Kind    string // "pv", "hvm", "qemu"
	State   string
	Owner   string // a program, "" if none is known
	Journal string // path
	Note    string // what else is known of a guest without a journal
}

// Status returns the guests of this host that are not just running. Without Xen these are
// QEMU's. An error doesn't mean that there are none.
func Status() (guests []State, errs error) {
	known := map[xenctrl.DomID]bool{}
	for _, dir := range JournalDirs() {
		entries, err := journal.List(dir)
		if err != nil && !errors.Is(err, fs.ErrPermission) {
			errs = errors.Join(errs, err)
		}
		for _, e := range entries {
			s := State{Name: e.Guest.Name, Kind: e.Guest.Kind, State: Served, Owner: e.Owner.String(), Journal: e.Path}
			switch {
			case e.Err != nil:
				s.State, s.Name = Unknown, e.Path
				errs = errors.Join(errs, e.Err)
			case e.Hot:
				s.State = Left
			case !lives(e.Owner):
				s.State = Repaired
			}
			if e.Guest.Kind != "qemu" {
				known[xenctrl.DomID(e.Guest.Domain)] = true
			}
			guests = append(guests, s)
		}
	}
	more, err := foreign(known)
	if err != nil && !noXen(err) {
		errs = errors.Join(errs, explain(err))
	}
	return append(guests, more...), errs
}

// foreign returns the domains that are paused or debugged without a journal.
func foreign(known map[xenctrl.DomID]bool) (guests []State, err error) {
	h, err := xenctrl.Open()
	if err != nil {
		return nil, err
	}
	defer h.Close()
	store, err := xenctrl.OpenStore()
	if err != nil {
		return nil, err
	}
	defer store.Close()
	doms, err := h.Domains()
	if err != nil {
		return nil, err
	}
	for _, d := range doms {
		s := State{Kind: "pv"}
		switch {
		case d.ID == xenctrl.DomID0 || known[d.ID]:
			continue
		case d.Flags&xenctrl.DomainDebugged != 0:
			s.State = Debugged
		case d.Flags&xenctrl.DomainPaused != 0 && !d.Gone() && !d.Suspended():
			s.State = Paused
		default:
			continue
		}
		if d.Flags&xenctrl.DomainHVM != 0 {
			s.Kind = "hvm"
		}
		if s.Name, err = store.DomainName(d.ID); err != nil || s.Name == "" {
			s.Name = domainJournal(d.ID)
		}
		s.Note = note(xen.Live(h, d.ID), d)
		guests = append(guests, s)
	}
	return guests, nil
}

// note says where the vCPUs of a domain stand that is paused or debugged.
func note(hv xen.Hypervisor, d xenctrl.DomainInfo) string {
	g := newXen(hv, d)
	defer g.Cache.Close() //nolint:errcheck // mappings to read from
	var at []string
	for _, s := range g.standing(nil) {
		at = append(at, fmt.Sprintf("vCPU %d stands at the int3 at %#x", s.VCPU, s.Addr))
	}
	return strings.Join(at, ", ")
}

// RecoverGuest repairs a guest whose owner died, by its name, its domain's id, or the
// path of its journal. done is false if it needs no repair.
func RecoverGuest(ctx context.Context, name string, log *slog.Logger) (done bool, err error) {
	path := name
	if !strings.HasPrefix(name, "/") {
		if path, err = journalOf(strings.TrimPrefix(name, "xen:")); err != nil || path == "" {
			return false, err
		}
	}
	_, err = Recover(ctx, path, log)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	var busy *journal.BusyError
	if errors.As(err, &busy) {
		err = owned(busy)
	}
	return err == nil, err
}

// journalOf returns the path of a guest's journal, or "" if it has none. A domain that is
// gone may have one still.
func journalOf(name string) (string, error) {
	path := ""
	for _, dir := range JournalDirs() {
		entries, err := journal.List(dir)
		if err != nil && !errors.Is(err, fs.ErrPermission) {
			return "", err
		}
		for _, e := range entries {
			if e.Err == nil && e.Guest.Name == name && (path == "" || e.Hot) {
				path = e.Path // a guest that was started again may have another one, of its last life
			}
		}
	}
	if path != "" {
		return path, nil
	}
	store, err := xenctrl.OpenStore()
	if err != nil {
		return "", err
	}
	defer store.Close()
	id, err := findDomain(store, name)
	if err != nil {
		return "", err
	}
	return journal.Path(journalDir, domainJournal(id)), nil
}
