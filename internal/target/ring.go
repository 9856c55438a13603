package target

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	"github.com/vmprobes/vmprobes/internal/recovery"
	"github.com/vmprobes/vmprobes/internal/xen"
	"github.com/vmprobes/vmprobes/xenctrl"
)

// A Ring is the page that becomes the ring of a guest's monitor, mapped by who is to repair
// the guest should its owner die. As long as it is mapped the page isn't given back to the
// domain, nor does one that was destroyed go away altogether.
type Ring struct {
	w    *recovery.Watch
	id   xenctrl.DomID
	h    *xenctrl.Handle
	ring xen.Ring
}

// MapRing maps the ring of the guest whose journal is at path, before its owner attaches.
func MapRing(path string) (_ *Ring, err error) {
	w, err := recovery.Look(path)
	if err != nil {
		return nil, err
	}
	r := &Ring{w: w, id: xenctrl.DomID(w.Guest().Domain)}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.Close())
		}
	}()
	if kind := w.Guest().Kind; kind != "hvm" {
		return nil, fmt.Errorf("%s: a guest of kind %q has no ring", path, kind)
	}
	if r.h, err = xenctrl.Open(); err != nil {
		return nil, explain(err)
	}
	hv := xen.Live(r.h, r.id)
	info, err := hv.Info()
	if err == nil && !w.Guest().Same(recovery.Identity("", "", info)) {
		err = fmt.Errorf("%s: it is of another domain", path)
	}
	if err == nil {
		r.ring, err = hv.MapRing()
	}
	if err != nil {
		return nil, errors.Join(err, r.h.Close())
	}
	return r, nil
}

// Over reports whether the ring is of no use any more: the guest's owner has left it, or it
// is gone.
func (r *Ring) Over() bool {
	if r.w.Over() {
		return true
	}
	info, err := r.h.Domain(r.id)
	return errors.Is(err, xenctrl.ErrNoDomain) || err == nil && (info.Gone() || !r.w.Guest().Same(recovery.Identity("", "", info)))
}

// Close unmaps it.
func (r *Ring) Close() error { return errors.Join(r.ring.Close(), r.h.Close(), r.w.Close()) }

// Recover repairs the guest of the journal at path, whose owner died: each byte is given
// back, each vCPU that waited goes on. It fails with a *journal.BusyError if the owner
// lives, and with fs.ErrNotExist if there is no such journal.
func Recover(ctx context.Context, path string, log *slog.Logger) (recovery.Report, error) {
	return TakeOver(ctx, path, nil, log)
}
