package xen

import (
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/xenctrl"
)

// Bits of DR6 and DR7 (SDM 3B, Debug Registers).
const (
	dr6BS       = 1 << 14 // a single step
	breakpoints = 4       // DR0 to DR3: bits B0 to B3 of DR6, L and G from bit 0 of DR7 on

	// vgcfInKernel (VGCF_in_kernel, xen/include/public/arch-x86/xen.h).
	vgcfInKernel = 1 << 2
)

// debugWatch tells debug exceptions that the guest's kernel met, which pause a
// domain with a debugger, from somebody's "xl pause".
type debugWatch struct {
	// before is the code that runs between the entry to the guest's handler and
	// where it reads and clears DR6: a vCPU there has had its exception.
	before []addrRange
	quiet  bool // nothing was found when the domain was paused last
	next   time.Time
	gave   atomic.Bool // one was given to the guest
}

type addrRange struct{ start, end uint64 }

// useSymbols finds the code between a debug exception and where DR6 is read:
// entry code, code that isn't to be instrumented (exc_debug in
// arch/x86/kernel/traps.c and what it calls), and the hypercall that reads it
// (arch/x86/xen/enlighten_pv.c).
func (w *debugWatch) useSymbols(lookup func(name string) (addr uint64, ok bool)) {
	const limit = 1 << 24
	w.before = nil
	for _, r := range [][2]string{
		{"__entry_text_start", "__entry_text_end"},
		{"__noinstr_text_start", "__noinstr_text_end"},
	} {
		start, ok1 := lookup(r[0])
		end, ok2 := lookup(r[1])
		if ok1 && ok2 && end > start && end-start < limit {
			w.before = append(w.before, addrRange{start, end})
		}
	}
	for name, size := range map[string]uint64{"hypercall_page": 4096, "xen_get_debugreg": 64, "xen_set_debugreg": 64} {
		if start, ok := lookup(name); ok {
			w.before = append(w.before, addrRange{start, start + size})
		}
	}
}

// found reports whether the vCPU with these registers is at a debug exception of
// its kernel that Xen has not delivered but paused the domain for (do_debug,
// xen/arch/x86/traps.c). seen is DR6 as it was last seen.
func (w *debugWatch) found(c *xenctrl.VCPUContext, seen uint64) bool {
	dr6, dr7, rip := c.DebugReg[6], c.DebugReg[7], c.User.RIP
	if c.Flags&vgcfInKernel == 0 || c.Traps[1].Address == 0 {
		return false
	}
	// A step that its handler has not seen yet leaves TF set; the handler itself runs
	// without.
	if dr6&dr6BS != 0 && c.User.RFLAGS&eflagTF != 0 {
		return true
	}
	hit := false
	for n := range breakpoints {
		hit = hit || dr6>>n&1 != 0 && dr7>>(2*n)&3 != 0
	}
	if !hit || rip == c.Traps[1].Address {
		return false
	}
	for _, r := range w.before {
		if rip >= r.start && rip < r.end {
			return false
		}
	}
	return len(w.before) > 0 || dr6 != seen
}

// takeDebugException looks, while the domain is paused though no event is
// latched, for vCPUs that met a debug exception of the guest's own: a watchpoint on
// memory that the kernel reads for a process, perf's and kgdb's, the steps of old
// kprobes. They are given to the guest. What is paused by somebody stays so.
func (d *Debugger) takeDebugException() error {
	const again = 10 * time.Millisecond
	if d.debug.quiet && time.Now().Before(d.debug.next) {
		return nil
	}
	n, err := d.giveDebugExceptions()
	if err != nil {
		return errors.Join(err, d.payFor(n))
	}
	if d.debug.quiet = n == 0; d.debug.quiet {
		d.debug.next = time.Now().Add(again)
	} else {
		d.debug.gave.Store(true)
	}
	return d.payFor(n)
}

// giveDebugExceptions gives the guest the debug exceptions of its own, and returns
// how many: each has paused the domain once, which the caller pays for.
func (d *Debugger) giveDebugExceptions() (n int, err error) {
	for v := range d.nvcpu {
		c := &d.want
		if err := d.hv.VCPUContext(v, c); err != nil {
			if e := mapErr(err); errors.Is(e, breakpoint.ErrGone) {
				return n, e
			}
			continue
		}
		s := &d.vcpus[v]
		switch {
		case s.saved && s.entering && c.User.RIP == c.Traps[1].Address:
			// All that failed before was to restore the extended state.
			err = attempts(func() error { return d.hv.SetVCPUExtState(v, s.ext) })
		case d.debug.found(c, s.dr6):
			err = d.enter(v, c, 1, c.User.RIP)
			if cantTake(err) { // nor can anybody else give it, and it must not be found again
				c.DebugReg[6] &^= dr6BS | 1<<breakpoints - 1
				err = d.setContext(v, c)
			}
		default:
			continue
		}
		if err != nil {
			return n, fmt.Errorf("vCPU %d: give back a debug exception: %w", v, err)
		}
		s.saved, s.entering, s.dirty = false, false, false
		s.dr6 = 0 // the guest clears it
		n++
	}
	return n, nil
}

// payFor pays for n debug exceptions that were given to the guest.
func (d *Debugger) payFor(n int) error {
	d.owed += n
	return d.release()
}

// lastDebugExceptions looks, when all pauses of ours are undone and no debugger is
// attached any more, for debug exceptions that came just before.
func (d *Debugger) lastDebugExceptions() error {
	info, err := d.hv.Info()
	if err != nil {
		return mapErr(err)
	}
	if info.Flags&xenctrl.DomainPaused == 0 {
		return nil
	}
	n, err := d.giveDebugExceptions()
	return errors.Join(err, d.payFor(n))
}
