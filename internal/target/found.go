package target

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/journal"
	"github.com/vmprobes/vmprobes/internal/kerneltext"
	"github.com/vmprobes/vmprobes/internal/recovery"
	"github.com/vmprobes/vmprobes/internal/x86"
	"github.com/vmprobes/vmprobes/internal/xen"
	"github.com/vmprobes/vmprobes/linux"
	"github.com/vmprobes/vmprobes/paging"
	"github.com/vmprobes/vmprobes/xenctrl"
)

// ErrUnclear: what a tool without a journal has left in a guest isn't known well enough to
// repair it.
var ErrUnclear = errors.New("not all that was left in the guest is known, and nothing was done")

// Found is what is known of a guest that has no journal.
type Found struct {
	Name     string
	Kind     string // "pv", "hvm"
	Debugger bool   // attached
	Monitor  bool
	Paused   bool
	Standing []xen.Standing // vCPUs at an int3
	File     string         // of the kernel, with which its text was compared, or ""
	Text     *kerneltext.Report
	TextErr  error // why it wasn't compared

	Repaired    bool
	StillPaused bool  // when it was repaired, for a reason that isn't known
	Changed     error // what was left alone
	Took        time.Duration
}

// Hurt reports whether somebody has left something in the guest, as far as is known.
func (f *Found) Hurt() bool {
	return f.Debugger || f.Monitor || f.Text != nil && len(f.Text.Breaks)+len(f.Text.Unclear) > 0
}

// Inspect says what is known of a Xen guest that has no journal. The guest's memory is
// only read. The kernel's file is looked for where the toolstack booted it from. Whether a
// monitor is attached to an HVM guest shows by an attempt to attach one.
func Inspect(ctx context.Context, name string, log *slog.Logger) (*Found, error) {
	c, err := openFound(ctx, name)
	if err != nil {
		return nil, err
	}
	err = c.prepare(ctx, log)
	if err == nil {
		err = c.look()
	}
	if err == nil && (c.Debugger || c.Monitor || c.Paused) {
		if err := c.compare(ctx, c.g.info.Kernel); err != nil {
			c.TextErr = err
		}
	}
	return &c.Found, errors.Join(err, c.close())
}

// RecoverFrom repairs a Xen guest in which a tool without a journal has died, by the
// kernel's own file: it gives back every byte that an int3 has replaced, lets go the vCPUs
// that have stopped there, and detaches debugger and monitor. Other pauses of the domain
// stay. It fails with ErrUnclear, and has done nothing, if it can't tell what was left.
// With force it does what it can even so: int3s of which nobody knows what was there stay,
// and vCPUs are put back to an int3 where that is only likely.
func RecoverFrom(ctx context.Context, name, file string, force bool, log *slog.Logger) (_ *Found, err error) {
	c, err := openFound(ctx, name)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, c.close()) }()
	// Whatever is wrong with the file is said before anything is done.
	f, err := kerneltext.ReadFile(file)
	if err != nil {
		return nil, err
	}
	c.File = file
	return c.recover(ctx, f, force, log)
}

func (c *finding) recover(ctx context.Context, f *kerneltext.File, force bool, log *slog.Logger) (*Found, error) {
	if err := c.prepare(ctx, log); err != nil {
		return nil, err
	}
	if err := c.look(); err != nil {
		return nil, err
	}
	if c.Debugger && c.Kind == "hvm" {
		return &c.Found, fmt.Errorf("a debugger is attached to an HVM guest, where vmprobes can't take its place: %w", ErrBusy)
	}
	k, err := linux.Discover(ctx, c.g, nil)
	if err != nil {
		return &c.Found, err
	}
	lookup := func(name string) (uint64, bool) {
		s, err := k.Symbols().Lookup(name)
		return s.Addr, err == nil
	}
	if err := xen.Stranger(c.g.hv, c.log.DriverState(), xen.Config{Root: k.Root(), Lookup: lookup}, force); err != nil {
		return &c.Found, err
	}
	c.frozen = true
	c.g.Invalidate() // what was read while the guest ran
	if c.Text, err = kerneltext.Compare(ctx, k, f); err != nil {
		return &c.Found, err
	}
	var breaks []breakpoint.LeftBreak
	for _, b := range c.Text.Breaks {
		breaks = append(breaks, breakpoint.LeftBreak{Addr: b.Addr, Insn: b.Insn})
	}
	err = errors.Join(c.unclear(), xen.CheckStops(c.g.hv, k.Read, breaks, c.Text.Own))
	switch {
	case err != nil && !force:
		return &c.Found, fmt.Errorf("%w: %w", ErrUnclear, err)
	case err != nil:
		log.Warn("goes on in spite of what isn't known", "guest", c.Name, "what", err)
	case len(breaks) == 0 && !c.Debugger && !c.Monitor:
		return &c.Found, nil
	}
	removed, err := xen.Removed(c.g.hv, instructions(k, breaks), breaks)
	if err != nil {
		return &c.Found, err
	}
	for _, b := range removed {
		log.Info("a vCPU stands behind a breakpoint that the tool had taken out", "guest", c.Name, "addr", fmt.Sprintf("%#x", b.Addr))
	}
	breaks = append(breaks, removed...)
	ctx, cancel := context.WithTimeout(ctx, repairFor)
	defer cancel()
	r, err := recovery.Found(ctx, c.g.hv, c.log, breaks, log)
	c.Changed, c.Took = r.Changed, r.Took
	c.Repaired = err == nil
	if info, ierr := c.g.hv.Info(); ierr == nil {
		c.StillPaused = info.Flags&xenctrl.DomainPaused != 0
	}
	return &c.Found, err
}

// instructions returns a function that returns the instruction at an address of the kernel's
// text, if one begins there, with what was under the breakpoints.
func instructions(k *linux.Kernel, breaks []breakpoint.LeftBreak) func(addr uint64) ([]byte, bool) {
	under := func(addr uint64, b []byte) {
		for _, l := range breaks {
			if i := l.Addr - addr; i < uint64(len(b)) {
				b[i] = l.Insn[0]
			}
		}
	}
	k.SetOverlay(under)
	return func(addr uint64) ([]byte, bool) {
		b := make([]byte, x86.MaxLen)
		if k.Boundary(addr) != nil || k.Read(addr, b) != nil {
			return nil, false
		}
		under(addr, b)
		in, err := x86.Decode(b)
		return in.Bytes(), err == nil
	}
}

// Lines says what was found, a fact a line. Names are the guest's or the file's.
func (f *Found) Lines() []string {
	var lines []string
	say := func(format string, args ...any) { lines = append(lines, fmt.Sprintf(format, args...)) }
	if f.Debugger {
		say("a debugger was attached")
	}
	if f.Monitor {
		say("a monitor was attached")
	}
	if f.Paused {
		say("it was paused")
	}
	for _, s := range f.Standing {
		say("vCPU %d stood at the int3 at %#x", s.VCPU, s.Addr)
	}
	switch t := f.Text; {
	case t == nil && f.TextErr != nil:
		say("its kernel's text was not compared with a file: %v", f.TextErr)
	case t != nil:
		const most = 50
		for i, b := range t.Breaks {
			if i == most {
				say("and at %d more", len(t.Breaks)-most)
				break
			}
			say("an int3 that the kernel's file doesn't have is at %#x (%s), on % x", b.Addr, b.Where, b.Insn)
		}
		for i, p := range t.Unclear {
			if i == most {
				say("and %d more", len(t.Unclear)-most)
				break
			}
			say("an int3 at %#x (%s) can't be told from the kernel's own: %s", p.Addr, p.Where, p.Why)
		}
		for i, p := range t.Copies {
			if i == most {
				say("and in %d more places", len(t.Copies)-most)
				break
			}
			say("code was put at %#x (%s), where the kernel has none; it is left there: %s", p.Addr, p.Where, p.Why)
		}
		say("%d bytes of its kernel's text were compared with %s: %d int3s left, %d unclear, %d of the guest's own; the text of modules wasn't",
			t.Text-t.Unread, f.File, len(t.Breaks), len(t.Unclear), len(t.Own))
	}
	if f.StillPaused {
		say("it is paused still: by an administrator, or by the tool that died; nothing is left in its kernel's text that would hurt it, and xl unpause lets it go on")
	}
	if f.Changed != nil {
		say("left alone, as the guest has changed it: %v", f.Changed)
	}
	return lines
}

// unclear returns what isn't known of the text.
func (f *Found) unclear() (errs error) {
	if f.Text.Rewriting != nil {
		errs = errors.Join(errs, f.Text.Rewriting)
	}
	const most = 20
	for i, p := range f.Text.Unclear {
		if i == most {
			errs = errors.Join(errs, fmt.Errorf("and %d more", len(f.Text.Unclear)-most+f.Text.More))
			break
		}
		errs = errors.Join(errs, fmt.Errorf("int3 at %#x (%s): %s", p.Addr, p.Where, p.Why))
	}
	for i, p := range f.Text.Copies {
		if i == most {
			errs = errors.Join(errs, fmt.Errorf("and %d more copies of code", len(f.Text.Copies)-most))
			break
		}
		errs = errors.Join(errs, fmt.Errorf("code was put at %#x (%s), where the kernel has none: whether a vCPU or a task comes back to it, and where that leads, isn't known", p.Addr, p.Where))
	}
	if f.Text.Unread > 0 {
		errs = errors.Join(errs, fmt.Errorf("%d bytes of the kernel's text can't be read", f.Text.Unread))
	}
	if f.Text.More > 0 && len(f.Text.Unclear) <= most {
		errs = errors.Join(errs, fmt.Errorf("%d int3s more than are listed", f.Text.More))
	}
	return errs
}

// finding is an Inspect or a RecoverFrom in progress.
type finding struct {
	Found
	g      *xenGuest
	log    *recovery.Log // which makes this process the guest's owner
	frozen bool
}

// Inspectable reports whether a name may be that of a Xen guest's.
func Inspectable(name string) bool {
	scheme, _, ok := strings.Cut(name, ":")
	return name != "" && (!ok || scheme == "xen") && !strings.HasPrefix(name, "/")
}

func openFound(ctx context.Context, name string) (*finding, error) {
	if name == "" {
		return nil, ErrNoName
	}
	if !Inspectable(name) {
		return nil, fmt.Errorf("%w: of a Xen domain's, which alone can need this", ErrBadName)
	}
	opened, err := openXen(ctx, name)
	if err != nil {
		return nil, known(name, err)
	}
	return newFound(opened.(*xenGuest)), nil
}

func newFound(g *xenGuest) *finding {
	c := &finding{g: g}
	c.Name, c.Kind = g.info.Name, "hvm"
	if g.info.Kind == PV {
		c.Kind = "pv"
	}
	return c
}

// prepare makes this process the guest's owner. If there is a hot journal the guest is
// repaired by that first.
func (c *finding) prepare(ctx context.Context, log *slog.Logger) error {
	dom := c.g.dom
	vcpus := dom.MaxVCPUID + 1
	name := domainJournal(dom.ID)
	for range 3 {
		l, err := recovery.Prepare(journalDir, name, recovery.Identity(c.g.info.Name, "", dom), vcpus, xen.StateSize(vcpus))
		var busy *journal.BusyError
		switch {
		case err == nil:
			c.log = l
			return nil
		case errors.As(err, &busy):
			return owned(busy)
		case !errors.Is(err, journal.ErrHot):
			return fmt.Errorf("write down who owns the guest: %w", err)
		}
		if _, err := Recover(ctx, journal.Path(journalDir, name), log); err != nil {
			return fmt.Errorf("repair the guest by its journal: %w", err)
		}
	}
	return fmt.Errorf("%w: other tools come and go", ErrBusy)
}

// close lets the guest go, if nothing was done to it.
func (c *finding) close() (err error) {
	switch {
	case c.log == nil || c.Repaired: // which has ended the journal
	case c.log.Begun():
		err = c.log.Close() // it says what the next attempt needs
	default:
		if c.frozen {
			err = xen.LetGo(c.g.hv, c.log.DriverState())
		}
		err = errors.Join(err, c.log.Remove())
	}
	return errors.Join(err, c.g.Close())
}

// look finds out what doesn't take the kernel's file.
func (c *finding) look() (err error) {
	info, err := c.g.hv.Info()
	if err != nil {
		return err
	}
	if info.Gone() {
		return breakpoint.ErrGone
	}
	c.Paused = info.Flags&xenctrl.DomainPaused != 0
	if c.Debugger, c.Monitor, err = xen.Attached(c.g.hv); err != nil {
		return err
	}
	c.Standing = c.g.standing(nil)
	return nil
}

// standing returns the vCPUs that stand at an int3, as far as that can be told.
func (g *xenGuest) standing(known []uint64) []xen.Standing {
	cpus, err := g.CPUs()
	if err != nil || len(cpus) == 0 {
		return nil
	}
	var all []xen.Standing
	for _, c := range cpus {
		mode := paging.Mode{Kind: paging.FourLevel, NXE: true}
		if !c.PV {
			if mode, err = paging.ModeOf(c.CR0, c.CR4, c.EFER); err != nil {
				continue
			}
		}
		mem := paging.New(g.Cache, mode)
		all, err = xen.AtInt3(g.hv, func(addr uint64, b []byte) error {
			_, err := mem.Read(paging.Root(c.CR3&^0xfff), paging.VAddr(addr), b)
			return err
		}, known)
		if err == nil && len(all) > 0 {
			break // the kernel is the same in all page tables
		}
	}
	return all
}

// compare compares the guest's text with a file of its kernel.
func (c *finding) compare(ctx context.Context, file string) error {
	if file == "" {
		return errors.New("which file its kernel was booted from isn't known")
	}
	k, err := linux.Discover(ctx, c.g, nil)
	if err != nil {
		return err
	}
	f, err := kerneltext.ReadFile(file)
	if err != nil {
		return err
	}
	if c.Text, err = kerneltext.Compare(ctx, k, f); err != nil {
		return err
	}
	c.File = file
	known := c.Text.Own
	for _, b := range c.Text.Breaks {
		known = append(known, b.Addr)
	}
	for _, p := range c.Text.Unclear {
		known = append(known, p.Addr)
	}
	c.Standing = c.g.standing(known)
	return nil
}
