package recovery

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/journal"
	"github.com/vmprobes/vmprobes/internal/xen"
	"github.com/vmprobes/vmprobes/paging"
	"github.com/vmprobes/vmprobes/xenctrl"
)

// A Report says what a repair found.
type Report struct {
	Guest        journal.Identity
	Owner        journal.Owner // who died
	Breaks       int           // breakpoints that the journal names
	Slots        int
	StillPaused  bool  // by somebody else
	Changed      error // what the guest has changed itself since, and was left alone; or nil
	Took         time.Duration
	NothingThere bool // no such guest runs any more
}

// Repair undoes what the owner of a hot journal has left in its guest, behind hv, and
// ends the journal. If it fails it may be called again, by another process, too: the
// journal stays.
//
// It never writes where something else is than the journal says.
func Repair(ctx context.Context, hv xen.Hypervisor, f *journal.File, log *slog.Logger) (Report, error) {
	return TakeOver(ctx, hv, nil, f, log)
}

// TakeOver is Repair by who has mapped the ring of the owner's monitor before it was
// attached ([xen.AdoptMonitor]), or has none. The ring is closed when that succeeds; it
// may be used again if not.
func TakeOver(ctx context.Context, hv xen.Hypervisor, ring xen.Ring, f *journal.File, log *slog.Logger) (r Report, err error) {
	begin := time.Now()
	r.Guest, r.Owner = f.Guest(), f.Owner()
	info, err := hv.Info()
	if err != nil {
		if errors.Is(err, xenctrl.ErrNoDomain) {
			r.NothingThere = true
			return r, f.Remove()
		}
		return r, err
	}
	if info.Gone() {
		r.NothingThere = true
		return r, f.Remove()
	}
	if now := Identity("", "", info); !r.Guest.Same(now) {
		// One domain at a time has an id: the journal's isn't there any more.
		log.Warn("the journal of a domain that isn't there any more is removed: another domain has its id", "domain", r.Guest.Name,
			"id", now.Domain, "owner", r.Owner.String(), "uuid", fmt.Sprintf("%x", r.Guest.Handle), "now", fmt.Sprintf("%x", now.Handle))
		r.NothingThere = true
		return r, f.Remove()
	}
	vcpus, err := laidOut(f)
	if err != nil {
		return r, err
	}
	l := newLog(f, vcpus)
	switch now := info.MaxVCPUID + 1; {
	case vcpus == 0:
		return r, f.Remove() // its owner had not attached
	case now > vcpus:
		return r, fmt.Errorf("%s: %w: it is of a guest with %d vCPUs, and this one has %d", f.Path(), journal.ErrUnreadable, vcpus, now)
	}
	if err := l.load(f); err != nil {
		return r, err
	}
	err = l.repair(ctx, hv, ring, info, &r, log)
	r.Took = time.Since(begin)
	return r, err
}

// Found repairs a guest in which breakpoints were found that no journal knows of. l comes
// from [Prepare], and the state of its driver from [xen.Stranger]. If Found fails, l is
// hot, and what the next attempt needs, unless [Log.Begun] says that nothing was done.
func Found(ctx context.Context, hv xen.Hypervisor, l *Log, breaks []breakpoint.LeftBreak, log *slog.Logger) (r Report, err error) {
	begin := time.Now()
	r.Guest, r.Owner = l.f.Guest(), l.f.Owner()
	info, err := hv.Info()
	if err != nil {
		return r, err
	}
	for _, b := range breaks {
		if _, err := l.Break(b, nil); err != nil {
			return r, err
		}
	}
	l.begin()
	err = l.repair(ctx, hv, nil, info, &r, log)
	r.Took = time.Since(begin)
	return r, err
}

// repair undoes what the journal says, and ends it.
func (l *Log) repair(ctx context.Context, hv xen.Hypervisor, ring xen.Ring, info xenctrl.DomainInfo, r *Report, log *slog.Logger) (err error) {
	left := l.left(l.DriverState())
	breaks := left.Breaks
	var slots []breakpoint.LeftSlot
	for _, s := range l.slots {
		s.Busy = l.counter(s.index)
		slots = append(slots, s.LeftSlot)
	}
	r.Breaks, r.Slots = len(breaks), len(slots)
	for _, b := range breaks {
		log.Debug("left: breakpoint", "addr", fmt.Sprintf("%#x", b.Addr), "insn", fmt.Sprintf("% x", b.Insn))
	}
	for _, s := range slots {
		log.Debug("left: slot", "addr", fmt.Sprintf("%#x", s.Addr), "len", s.Len, "of", fmt.Sprintf("%#x", s.Break.Addr), "busy", s.Busy.Load())
	}
	for v := range l.vcpus {
		for _, m := range l.Marks(v) {
			if m.Slot != 0 {
				log.Debug("left: on its way to a slot", "vcpu", v, "slot", fmt.Sprintf("%#x", m.Slot), "sp", fmt.Sprintf("%#x", m.SP), "back", m.Back)
			}
		}
	}

	left.Ring, left.Logger = ring, log
	frames := xen.NewFrames(hv)
	drv, others, err := adopt(hv, frames, info, left)
	if err != nil {
		return errors.Join(err, frames.Close())
	}
	r.StillPaused = others > 0
	e := breakpoint.New(drv, breakpoint.Config{Journal: l, Logger: log})
	if r.Changed, err = e.Adopt(breaks, slots); err != nil {
		// The guest stays frozen, and has lost nothing.
		return errors.Join(fmt.Errorf("find what was left in the guest: %w", err), frames.Close())
	}
	if err := drv.Thaw(); err != nil {
		return errors.Join(fmt.Errorf("resume the guest: %w", err), frames.Close())
	}
	err = leave(ctx, e)
	if e.Left() {
		r.Changed = errors.Join(r.Changed, err)
		err = l.f.Remove()
	}
	return errors.Join(err, frames.Close())
}

// left is what the journal says that a driver has to know.
func (l *Log) left(state []byte) xen.Left {
	left := xen.Left{State: state, Gone: l.gone}
	for _, b := range l.breaks {
		left.Breaks = append(left.Breaks, b)
	}
	for _, s := range l.slots {
		left.Ends = append(left.Ends, s.Addr+uint64(s.Len))
	}
	return left
}

// adopt takes the dead process' place.
func adopt(hv xen.Hypervisor, frames *paging.Cache, info xenctrl.DomainInfo, left xen.Left) (drv breakpoint.Driver, others int, err error) {
	if info.Flags&xenctrl.DomainHVM != 0 {
		drv, err = xen.AdoptMonitor(hv, frames, left)
		return drv, 0, err
	}
	return xen.AdoptDebugger(hv, frames, left)
}

// leave closes the engine, however often that has to be tried.
func leave(ctx context.Context, e *breakpoint.Engine) (err error) {
	for pause := 10 * time.Millisecond; ; pause = min(2*pause, time.Second) {
		if err = e.Close(); e.Left() {
			return err
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return errors.Join(err, ctx.Err())
		}
	}
}

// Identity describes a Xen guest.
func Identity(name, build string, info xenctrl.DomainInfo) journal.Identity {
	kind := "pv"
	if info.Flags&xenctrl.DomainHVM != 0 {
		kind = "hvm"
	}
	return journal.Identity{Name: name, Kind: kind, Domain: uint16(info.ID), Handle: info.Handle[:], Build: build}
}
