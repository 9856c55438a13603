package xen

import (
	"errors"
	"fmt"
	"slices"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/xenctrl"
)

// Errors of guests in which a tool died that left no journal.
var (
	// ErrStepped: the tool was executing an instruction of a vCPU's.
	ErrStepped = errors.New("it has the trap flag in the kernel: the tool was stepping it, and what else it had changed for that isn't known")
	// ErrUnsure: nothing tells whether a vCPU has executed an int3.
	ErrUnsure = errors.New("it stands one byte behind an int3, and whether it has executed that one or came there otherwise can't be told")
)

// Stranger is the state of a process that died and left nothing behind from which it is
// known what it was doing. It pauses the guest, and writes that down in state, which is
// zero: whoever takes over from the stranger by that state undoes the pause. If likely is
// set, a vCPU of a PV guest that stands behind an int3 is taken for stopped there though
// that isn't sure (see [CheckStops]), as long as the domain is paused without another
// reason.
func Stranger(hv Hypervisor, state []byte, cfg Config, likely bool) error {
	info, err := hv.Info()
	if err != nil {
		return mapErr(err)
	}
	s, _, err := stateIn(state, info.MaxVCPUID+1)
	if err != nil {
		return err
	}
	s.kernel = cfg.Root
	if likely {
		s.asked = info.MaxVCPUID + 1
	}
	if cfg.Lookup != nil {
		if addr, ok := cfg.Lookup("xen_vcpu_info"); ok {
			s.vcpuInfo = addr
		}
	}
	if err := attempts(func() error { return s.account(intentPause, hv.Pause, &s.frozen, 1) }); err != nil {
		return fmt.Errorf("pause the guest: %w", err)
	}
	return nil
}

// LetGo undoes the pause of [Stranger], if nobody has taken over from it.
func LetGo(hv Hypervisor, state []byte) error {
	info, err := hv.Info()
	if err != nil {
		if errors.Is(mapErr(err), breakpoint.ErrGone) {
			return nil
		}
		return err
	}
	s, _, err := stateIn(state, info.MaxVCPUID+1)
	if err != nil || s.frozen == 0 {
		return err
	}
	return attempts(func() error { return s.account(intentUnpause, hv.Unpause, &s.frozen, -1) })
}

// CheckStops looks, before anything is done, for vCPUs of which it can't be told where
// they are: with the trap flag in the kernel, which is ErrStepped; or, of a PV guest, one
// byte behind an int3 that hides an instruction of one byte, or that isn't among breaks
// and so is the guest's own, as those at the addresses own are. Such a vCPU may have
// stopped there or come there by itself: that is ErrUnsure. The guest is paused; read reads
// its kernel's memory.
func CheckStops(hv Hypervisor, read func(addr uint64, b []byte) error, breaks []breakpoint.LeftBreak, own []uint64) (errs error) {
	err := inKernel(hv, func(pv bool, v int, ip, flags uint64) {
		if flags&eflagTF != 0 {
			errs = errors.Join(errs, fmt.Errorf("vCPU %d, at %#x: %w", v, ip, ErrStepped))
		}
		i := breakAt(breaks, ip-1)
		switch {
		case !pv, i >= 0 && len(breaks[i].Insn) > 1:
			return // it can be there only because of the int3
		case i < 0 && !slices.Contains(own, ip-1) && !behindInt3(read, ip):
			return
		}
		errs = errors.Join(errs, fmt.Errorf("vCPU %d, at %#x: %w", v, ip, ErrUnsure))
	})
	return errors.Join(errs, err)
}

// Removed returns the breakpoints that the tool had taken out, so that they aren't among
// breaks, while vCPUs of a PV guest were stopped there whose stops it hadn't answered: such a
// vCPU is inside an instruction, one byte behind its beginning. insn returns the instruction
// that begins at an address, if one does: code that overlaps other code, as the kernel's
// return thunks, begins at both. Where the instruction has one byte nothing tells such a vCPU
// from another.
func Removed(hv Hypervisor, insn func(addr uint64) ([]byte, bool), breaks []breakpoint.LeftBreak) (removed []breakpoint.LeftBreak, err error) {
	err = inKernel(hv, func(pv bool, _ int, ip, _ uint64) {
		if !pv || breakAt(breaks, ip-1) >= 0 || breakAt(removed, ip-1) >= 0 {
			return // an HVM guest's vCPU stops at the beginning
		}
		if _, begins := insn(ip); begins {
			return
		}
		if b, ok := insn(ip - 1); ok && len(b) > 1 && b[0] != int3 {
			removed = append(removed, breakpoint.LeftBreak{Addr: ip - 1, Insn: b})
		}
	})
	return removed, err
}

// breakAt returns the index of the breakpoint at addr, or -1.
func breakAt(breaks []breakpoint.LeftBreak, addr uint64) int {
	return slices.IndexFunc(breaks, func(b breakpoint.LeftBreak) bool { return b.Addr == addr })
}

// inKernel calls f with each vCPU that is up and in the kernel.
func inKernel(hv Hypervisor, f func(pv bool, v int, ip, flags uint64)) error {
	info, err := hv.Info()
	if err != nil {
		return mapErr(err)
	}
	pv := info.Flags&xenctrl.DomainHVM == 0
	for v := range min(info.MaxVCPUID+1, xenctrl.MaxVCPUs) {
		if ip, flags, kernel, err := where(hv, pv, v); err == nil && kernel {
			f(pv, v, ip, flags)
		}
	}
	return nil
}

// where returns where a vCPU is.
func where(hv Hypervisor, pv bool, v int) (ip, flags uint64, kernel bool, err error) {
	if pv {
		var c xenctrl.VCPUContext
		err = hv.VCPUContext(v, &c)
		return c.User.RIP, c.User.RFLAGS, c.Flags&vgcfInKernel != 0, err
	}
	c, err := hv.HVMCPU(v)
	return c.RIP, c.RFLAGS, c.CS&3 == 0, err
}

// behindInt3 reports whether the byte before ip is an int3, and not the end of what is
// between functions.
func behindInt3(read func(addr uint64, b []byte) error, ip uint64) bool {
	var b [2]byte
	return read(ip-2, b[:]) == nil && b[1] == int3 && b[0] != int3
}

// A Standing vCPU is at an int3, or of a PV guest one byte behind it.
type Standing struct {
	VCPU int
	Addr uint64 // of the int3
}

// AtInt3 returns the vCPUs that stand at an int3 in the kernel: at one of those whose
// addresses are known, or at another as far as that can be told from the end of what is
// between functions.
func AtInt3(hv Hypervisor, read func(addr uint64, b []byte) error, known []uint64) (at []Standing, err error) {
	err = inKernel(hv, func(pv bool, v int, ip, _ uint64) {
		var b [1]byte
		switch {
		case pv && (slices.Contains(known, ip-1) || behindInt3(read, ip)):
			at = append(at, Standing{v, ip - 1})
		case !pv && read(ip, b[:]) == nil && b[0] == int3:
			at = append(at, Standing{v, ip})
		}
	})
	return at, err
}

// Attached reports what is attached to the guest: a debugger, as Xen says, or a monitor,
// which only shows if one tries to attach another for a moment.
func Attached(hv Hypervisor) (debugger, monitor bool, err error) {
	info, err := hv.Info()
	if err != nil {
		return false, false, mapErr(err)
	}
	debugger = info.Flags&xenctrl.DomainDebugged != 0
	if info.Flags&xenctrl.DomainHVM == 0 {
		return debugger, false, nil
	}
	if _, err := hv.MonitorCapabilities(); err != nil {
		return debugger, false, nil //nolint:nilerr // nor can there be a monitor
	}
	switch m, err := hv.OpenMonitor(); {
	case errors.Is(err, xenctrl.ErrBusy):
		return debugger, true, nil
	case err != nil:
		return debugger, false, fmt.Errorf("see whether a monitor is attached: %w", mapErr(err))
	default:
		return debugger, false, m.Close()
	}
}
