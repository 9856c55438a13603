package recovery

import (
	"errors"
	"fmt"

	"github.com/vmprobes/vmprobes/internal/journal"
	"github.com/vmprobes/vmprobes/internal/xen"
	"github.com/vmprobes/vmprobes/xenctrl"
)

// A Watch looks at a guest whose owner lives, by its journal, without being in its way.
type Watch struct {
	v     *journal.View
	vcpus int
}

// Look begins a Watch of the guest whose journal is at path.
func Look(path string) (*Watch, error) {
	v, err := journal.Look(path)
	if err != nil {
		return nil, err
	}
	vcpus, err := laidOut(v)
	if err == nil && vcpus == 0 {
		err = fmt.Errorf("%s: %w: it has no state", path, journal.ErrUnreadable)
	}
	if err != nil {
		return nil, errors.Join(err, v.Close())
	}
	return &Watch{v, vcpus}, nil
}

// Owner returns the process that owns the guest.
func (w *Watch) Owner() journal.Owner { return w.v.Owner() }

// Guest returns whose journal it is.
func (w *Watch) Guest() journal.Identity { return w.v.Guest() }

// Over reports whether the owner has left the guest.
func (w *Watch) Over() bool { return w.v.Removed() }

// Beats is [xen.Beats] of the owner's driver.
func (w *Watch) Beats() (uint64, error) { return xen.Beats(w.driverState()) }

func (w *Watch) driverState() []byte { return w.v.State()[engineSize(w.vcpus):] }

// Waits is [xen.Waits] of the guest, which is behind hv.
func (w *Watch) Waits(hv xen.Hypervisor) (why string, err error) {
	info, err := hv.Info()
	if errors.Is(err, xenctrl.ErrNoDomain) {
		return "", nil
	} else if err != nil {
		return "", err
	}
	if !w.Guest().Same(Identity("", "", info)) {
		return "", nil
	}
	l := newLog(nil, w.vcpus)
	if err := l.load(w.v); err != nil {
		return "", err
	}
	frames := xen.NewFrames(hv)
	why, err = xen.Waits(hv, frames, l.left(w.driverState()))
	return why, errors.Join(err, frames.Close())
}

// Close ends the Watch.
func (w *Watch) Close() error { return w.v.Close() }
