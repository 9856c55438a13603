package target

import (
	"errors"

	"github.com/vmprobes/vmprobes/internal/recovery"
	"github.com/vmprobes/vmprobes/internal/xen"
	"github.com/vmprobes/vmprobes/xenctrl"
)

// A Watch looks at a guest that another process serves, without being in its way.
type Watch struct {
	*recovery.Watch
	id xenctrl.DomID
	h  *xenctrl.Handle // nil: not needed yet
}

// Look begins a Watch of the Xen guest whose journal is at path.
func Look(path string) (*Watch, error) {
	w, err := recovery.Look(path)
	if err != nil {
		return nil, err
	}
	return &Watch{Watch: w, id: xenctrl.DomID(w.Guest().Domain)}, nil
}

// Waits says for what of its owner the guest waits, or "" if it doesn't ([xen.Waits]).
func (w *Watch) Waits() (why string, err error) {
	if w.h == nil {
		if w.h, err = xenctrl.Open(); err != nil {
			return "", explain(err)
		}
	}
	return w.Watch.Waits(xen.Live(w.h, w.id))
}

// Close ends the Watch.
func (w *Watch) Close() error {
	err := w.Watch.Close()
	if w.h != nil {
		err = errors.Join(err, w.h.Close())
	}
	return err
}
