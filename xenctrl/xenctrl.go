// Package xenctrl makes the calls of Xen's control libraries that a debugger
// of guest kernels needs, as Go functions. It is thin: one method is one call,
// or as few as the operation takes, and no decision is made here.
//
// The libraries (libxenctrl, libxenforeignmemory, libxendevicemodel,
// libxenevtchn, libxenstore) are loaded when [Open] is called, not linked, so
// that a program builds and starts on machines without them, and one binary
// works with every Xen release from 4.13 on. Where Xen cannot be reached, the
// functions that open something return an error that says why:
// [ErrUnsupportedPlatform], [ErrNotBuilt], [ErrNotControlDomain],
// [ErrPermission] or [ErrLibraryNotFound].
//
// The calls that a hit in a PV guest takes are made without the libraries where Linux
// and the hypervisor are known to allow it: through cgo they would cost several times
// as much.
//
// Numbers and layouts are those of Xen's public headers; the source is named
// at each. "go test -tags xenheaders" compares all of them, and the prototype
// of every library function, with the installed headers.
//
// Nothing is printed, no Go function is called from C, and no Go memory is
// given to the hypervisor.
package xenctrl

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"syscall"
	"time"
)

// A Version is the version of the running hypervisor.
type Version struct {
	Major, Minor int
	Extra        string // such as ".7-pre"
}

// String returns v as Xen prints it, such as "4.17.7-pre".
func (v Version) String() string { return fmt.Sprintf("%d.%d%s", v.Major, v.Minor, v.Extra) }

// A Handle is a connection to the hypervisor. Its methods may be called from
// any number of goroutines.
type Handle struct {
	mu     sync.RWMutex // held for reading during each call
	l      lib
	path   string
	closed bool
	ended  bool // l is closed too
	refs   int  // mappings and monitors that are still open
	turn   turn // nil if it can't be given up
}

// Open loads the Xen libraries and connects to the hypervisor. The process must run
// in a control domain, as root or as a user with the right to read and write
// /dev/xen/privcmd, /dev/xen/evtchn and /dev/xen/xenbus.
func Open() (*Handle, error) {
	l, err := openLib()
	if err != nil {
		return nil, err
	}
	h := newHandle(l)
	h.goDirect()
	return h, nil
}

func newHandle(l lib) *Handle { return &Handle{l: l, path: l.path()} }

// Close ends the connection. Mappings and monitors that are still open stay
// usable until they are closed; all other calls fail with ErrClosed.
func (h *Handle) Close() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return nil
	}
	h.closed = true
	return opErr("close", domNone, -1, h.end())
}

// end closes the libraries if h is closed and nothing refers to it.
func (h *Handle) end() error {
	if !h.closed || h.ended || h.refs > 0 {
		return nil
	}
	h.ended = true
	if h.turn != nil {
		h.turn.close()
	}
	return h.l.close()
}

// ref keeps the libraries open for a mapping or monitor; unref gives that up.
func (h *Handle) ref() {
	h.mu.Lock()
	h.refs++
	h.mu.Unlock()
}

func (h *Handle) unref() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.refs--
	_ = h.end()
}

// do calls f, unless h is closed or the domain or vCPU cannot exist, and makes
// an *Error of its error.
func (h *Handle) do(op string, id DomID, vcpu int, f func(l lib) error) error {
	if id >= DomIDFirstReserved && id != domNone {
		return opErr(op, id, vcpu, syscall.ESRCH)
	}
	if vcpu < -1 || vcpu >= MaxVCPUs {
		return opErr(op, id, vcpu, syscall.EINVAL)
	}
	h.mu.RLock()
	defer h.mu.RUnlock()
	if h.closed {
		return opErr(op, id, vcpu, ErrClosed)
	}
	return opErr(op, id, vcpu, f(h.l))
}

// doVCPU is do for operations that need a vCPU: -1 is not one.
func (h *Handle) doVCPU(op string, id DomID, vcpu int, f func(l lib) error) error {
	if vcpu < 0 {
		return opErr(op, id, vcpu, syscall.EINVAL)
	}
	return h.do(op, id, vcpu, f)
}

// Yield gives the rest of this vCPU's turn to others that wait for the same physical
// processor, such as the vCPU of a guest that this program waits for. It reports
// whether that is possible.
func (h *Handle) Yield() bool {
	h.mu.RLock()
	defer h.mu.RUnlock()
	return !h.closed && h.turns()
}

// turns is Yield for callers that hold a reference.
func (h *Handle) turns() bool { return h.turn != nil && h.turn.yield() }

// LibraryPath returns the file that libxenctrl was loaded from.
func (h *Handle) LibraryPath() string { return h.path }

// Version returns the version of the running hypervisor.
func (h *Handle) Version() (Version, error) {
	var v Version
	err := h.do("get version", domNone, -1, func(l lib) (err error) {
		v.Major, v.Minor, v.Extra, err = l.version()
		return err
	})
	return v, err
}

// Capabilities returns the kinds of guests that the hypervisor can run, such
// as "xen-3.0-x86_64 hvm-3.0-x86_64".
func (h *Handle) Capabilities() (string, error) {
	var s string
	err := h.do("get capabilities", domNone, -1, func(l lib) (err error) {
		s, err = l.capabilities()
		return err
	})
	return s, err
}

// Domain returns the state of a domain, or ErrNoDomain.
func (h *Handle) Domain(id DomID) (DomainInfo, error) {
	var info DomainInfo
	err := h.do("get info", id, -1, func(l lib) error {
		i, ok, err := l.firstDomain(id)
		if err != nil {
			return err
		}
		if !ok || i.ID != id { // Xen answers with the next domain
			return syscall.ESRCH
		}
		info = i
		return nil
	})
	return info, err
}

// Domains returns the state of every domain, in the order of their ids. It
// takes one call for each, so the list is not a snapshot.
func (h *Handle) Domains() ([]DomainInfo, error) {
	var list []DomainInfo
	err := h.do("list domains", domNone, -1, func(l lib) error {
		for next := DomID(0); next < DomIDFirstReserved; {
			info, ok, err := l.firstDomain(next)
			if err != nil {
				return err
			}
			if !ok || info.ID < next {
				return nil
			}
			list = append(list, info)
			next = info.ID + 1
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return list, nil
}

// Pause adds one to the pause count of a domain and returns when none of its
// vCPUs runs.
func (h *Handle) Pause(id DomID) error {
	return h.do("pause", id, -1, func(l lib) error { return l.pause(id) })
}

// Unpause takes one from the pause count of a domain.
func (h *Handle) Unpause(id DomID) error {
	return h.do("unpause", id, -1, func(l lib) error { return l.unpause(id) })
}

// GuestWidth returns the width of a PV guest's words, 32 or 64 bits. Xen knows no
// width of an HVM guest: ErrNotSupported.
func (h *Handle) GuestWidth(id DomID) (bits int, err error) {
	err = h.do("get guest width", id, -1, func(l lib) error {
		bytes, err := l.guestWidth(id)
		bits = 8 * bytes
		return err
	})
	return bits, err
}

// MaxGPFN returns the highest guest frame number in use.
func (h *Handle) MaxGPFN(id DomID) (uint64, error) {
	var n uint64
	err := h.do("get highest frame", id, -1, func(l lib) (err error) {
		n, err = l.maxGPFN(id)
		return err
	})
	return n, err
}

// VCPUInfo returns the state of a vCPU. It is ESRCH (ErrNoDomain) also if the
// domain has no such vCPU.
func (h *Handle) VCPUInfo(id DomID, vcpu int) (VCPUInfo, error) {
	var info VCPUInfo
	err := h.doVCPU("get info", id, vcpu, func(l lib) error { return l.vcpuInfo(id, vcpu, &info) })
	return info, err
}

// VCPUContext stores the registers of a vCPU in *c. Xen holds the vCPU while
// it copies them.
func (h *Handle) VCPUContext(id DomID, vcpu int, c *VCPUContext) error {
	return h.doVCPU("get context", id, vcpu, func(l lib) error { return l.vcpuContext(id, vcpu, c) })
}

// SetVCPUContext sets the registers of a vCPU. *c should be what VCPUContext
// returned for it while the domain was paused, with changes. The call resets
// all extended state (AVX and later) of the vCPU: see SetVCPUContextPreserving.
func (h *Handle) SetVCPUContext(id DomID, vcpu int, c *VCPUContext) error {
	return h.doVCPU("set context", id, vcpu, func(l lib) error { return l.setVCPUContext(id, vcpu, c) })
}

// VCPUExtState returns the extended state of a vCPU.
func (h *Handle) VCPUExtState(id DomID, vcpu int) (ExtState, error) {
	var s ExtState
	err := h.ReadVCPUExtState(id, vcpu, &s)
	return s, err
}

// ReadVCPUExtState is VCPUExtState with memory that is used again: s is empty, or
// what an earlier call made. It then takes one call of the hypervisor instead of
// two, unless the state has grown.
func (h *Handle) ReadVCPUExtState(id DomID, vcpu int, s *ExtState) error {
	return h.doVCPU("get extended state", id, vcpu, func(l lib) error { return l.vcpuExtState(id, vcpu, s) })
}

// SetVCPUExtState sets the extended state of a vCPU to what VCPUExtState
// returned.
func (h *Handle) SetVCPUExtState(id DomID, vcpu int, s ExtState) error {
	return h.doVCPU("set extended state", id, vcpu, func(l lib) error {
		if len(s.Data) < extStateHeader || len(s.Data) > extStateMax {
			return syscall.EINVAL
		}
		return l.setVCPUExtState(id, vcpu, s.Mask, s.Data)
	})
}

// Accumulated returns the XCR0 bits that the vCPU ever had set (xcr0_accum), 0
// if s is empty.
func (s *ExtState) Accumulated() uint64 {
	if len(s.Data) < extStateHeader {
		return 0
	}
	return binary.LittleEndian.Uint64(s.Data[8:])
}

// Live reports whether s holds more than x87 and SSE state, which is what
// SetVCPUContext destroys.
func (s *ExtState) Live() bool { return s.Accumulated()&^xstateLegacy != 0 }

// SetVCPUContextPreserving is SetVCPUContext for a vCPU that may use AVX or
// later extensions: it saves that state before and restores it after. The
// domain must be paused. It takes three or four calls; a processor without
// XSAVE (ErrNotSupported from VCPUExtState) has nothing to preserve.
//
// The x87 and SSE registers are those of the saved state too if there is one:
// changes of c.FPU are then lost.
func (h *Handle) SetVCPUContextPreserving(id DomID, vcpu int, c *VCPUContext) error {
	s, err := h.VCPUExtState(id, vcpu)
	if err != nil && !errors.Is(err, ErrNotSupported) {
		return err
	}
	if err := h.SetVCPUContext(id, vcpu, c); err != nil {
		return err
	}
	if !s.Live() {
		return nil
	}
	return h.SetVCPUExtState(id, vcpu, s)
}

// SetDebugging attaches a debugger to a domain, or detaches it: int3 and #DB
// of the guest then pause the domain, if the hypervisor was built with
// CONFIG_GDBSX. If it was not, the call succeeds as well, and int3 is
// swallowed: make sure with GdbsxDomStatus first.
func (h *Handle) SetDebugging(id DomID, on bool) error {
	return h.do("set debugging", id, -1, func(l lib) error { return l.setDebugging(id, on) })
}

// DebugControl turns single stepping of an HVM vCPU by the monitor trap flag
// on or off (Intel only; ErrNotSupported elsewhere).
func (h *Handle) DebugControl(id DomID, vcpu int, singleStep bool) error {
	op := uint32(debugOpSingleStepOff)
	if singleStep {
		op = debugOpSingleStepOn
	}
	return h.doVCPU("debug control", id, vcpu, func(l lib) error { return l.debugControl(id, vcpu, op) })
}

// GdbsxDomStatus says whether a domain is paused, and returns and clears one
// latched event of a vCPU. Any error means that the hypervisor has no gdbsx
// support (CONFIG_GDBSX), or that there is no such domain.
func (h *Handle) GdbsxDomStatus(id DomID) (DomStatus, error) {
	s := DomStatus{VCPU: -1}
	err := h.do("gdbsx domstatus", id, -1, func(l lib) error {
		u, err := l.domctl(domctlGdbsxDomStatus, id, domctlArgs{})
		if err != nil {
			return err
		}
		s.Paused = u[gdbsxStatusPausedOff] != 0
		vcpu := binary.LittleEndian.Uint32(u[gdbsxStatusVCPUIDOff:])
		if !s.Paused || vcpu == gdbsxStatusNoVCPU {
			return nil
		}
		if vcpu >= MaxVCPUs {
			return syscall.ERANGE
		}
		s.VCPU = int(vcpu)
		s.Event = binary.LittleEndian.Uint32(u[gdbsxStatusVCPUEvOff:])
		return nil
	})
	return s, err
}

// GdbsxPauseVCPU adds one to the pause count of a vCPU whose domain is paused
// (ErrBusy if it is not).
func (h *Handle) GdbsxPauseVCPU(id DomID, vcpu int) error {
	return h.gdbsxVCPU("gdbsx pause", domctlGdbsxPauseVCPU, id, vcpu)
}

// GdbsxUnpauseVCPU takes one from the pause count of a vCPU.
func (h *Handle) GdbsxUnpauseVCPU(id DomID, vcpu int) error {
	return h.gdbsxVCPU("gdbsx unpause", domctlGdbsxUnpauseVCPU, id, vcpu)
}

func (h *Handle) gdbsxVCPU(op string, cmd uint32, id DomID, vcpu int) error {
	return h.doVCPU(op, id, vcpu, func(l lib) error {
		var u domctlArgs
		binary.LittleEndian.PutUint32(u[gdbsxPauseVCPUOff:], uint32(vcpu))
		_, err := l.domctl(cmd, id, u)
		return err
	})
}

// GdbsxGuestMemory copies between buf and the guest's memory at va, through
// the page tables of its vCPU 0, or through pgd3 (the value of init_mm.pgd[3]
// of a 32-bit guest) if that is not 0. It takes one call for each page, and
// returns the number of bytes of the pages that could be copied.
func (h *Handle) GdbsxGuestMemory(id DomID, pgd3, va uint64, buf []byte, write bool) (n int, err error) {
	err = h.do("gdbsx guest memory", id, -1, func(l lib) error {
		for n < len(buf) {
			chunk := min(len(buf)-n, PageSize-int((va+uint64(n))%PageSize))
			remain, err := l.gdbsxMemory(id, pgd3, va+uint64(n), buf[n:n+chunk], write)
			if err != nil {
				return err
			}
			n += chunk - min(max(remain, 0), chunk)
			if remain != 0 {
				return syscall.EFAULT
			}
		}
		return nil
	})
	return n, err
}

// TranslateAddress walks the page tables of a vCPU and returns the machine
// (PV) or guest (HVM) frame of va.
func (h *Handle) TranslateAddress(id DomID, vcpu int, va uint64) (frame uint64, err error) {
	err = h.doVCPU("translate address", id, vcpu, func(l lib) (err error) {
		frame, err = l.translate(id, vcpu, va)
		return err
	})
	return frame, err
}

// HVMCPU returns the registers of an HVM or PVH vCPU, including MSRs.
func (h *Handle) HVMCPU(id DomID, vcpu int) (HVMCPU, error) {
	var rec hvmHWCPU
	err := h.doVCPU("get hvm cpu", id, vcpu, func(l lib) error { return l.hvmCPU(id, vcpu, &rec) })
	if err != nil {
		return HVMCPU{}, err
	}
	return rec.cpu(), nil
}

// InjectEvent makes an HVM or PVH vCPU take an exception when it next runs.
// eventType is an EventType constant, errorCode is ^uint32(0) if the exception
// has none, insnLen the length of the instruction if it is a software
// exception, and cr2 the fault address of a page fault or the pending DR6 bits
// of a debug exception.
func (h *Handle) InjectEvent(id DomID, vcpu int, vector, eventType uint8, errorCode, insnLen uint32, cr2 uint64) error {
	return h.doVCPU("inject event", id, vcpu, func(l lib) error {
		if insnLen > maxInsnLen {
			return syscall.EINVAL
		}
		return l.injectEvent(id, vcpu, vector, eventType, errorCode, uint8(insnLen), cr2)
	})
}

// MonitorCapabilities returns the events of a domain that can be monitored: 0
// for PV.
func (h *Handle) MonitorCapabilities(id DomID) (MonitorCaps, error) {
	var caps uint32
	err := h.do("get monitor capabilities", id, -1, func(l lib) (err error) {
		caps, err = l.monitorCaps(id)
		return err
	})
	return MonitorCaps(caps), err
}

// A Mapping is memory of another domain.
type Mapping struct {
	h   *Handle
	mu  sync.Mutex
	mem []byte
}

// frameMax is the highest frame number: a physical address has at most 52 bits
// (Intel SDM vol. 3, 4.1.4).
const frameMax = 1<<40 - 1

// MapForeign maps frames of a domain (machine frames of a PV guest, guest
// frames of an HVM guest) one after the other into this process. All of them
// are mapped, or none: then errors.As finds a *MapError that says which failed.
func (h *Handle) MapForeign(id DomID, writable bool, frames ...uint64) (*Mapping, error) {
	m := &Mapping{h: h}
	h.ref()
	err := h.do("map memory", id, -1, func(l lib) error {
		if len(frames) == 0 || len(frames) > mapForeignMax {
			return syscall.EINVAL
		}
		for _, f := range frames {
			// A PV dom0 puts the number into a page-table entry, where larger ones
			// would lose their upper bits and map another frame.
			if f > frameMax {
				return &MapError{Frames: []uint64{f}, Errs: []error{syscall.ERANGE}}
			}
		}
		mem, errs, err := l.mapForeign(id, writable, frames)
		if err != nil {
			return err
		}
		var failed MapError
		for i, errno := range errs {
			if errno != 0 {
				failed.Frames = append(failed.Frames, frames[i])
				failed.Errs = append(failed.Errs, syscall.Errno(errno))
			}
		}
		if failed.Frames != nil {
			return &failed
		}
		m.mem = mem
		return nil
	})
	if err != nil {
		h.unref()
		return nil, err
	}
	return m, nil
}

// WriteForeign writes b to a domain's memory: to the machine frame (PV) or guest frame
// (HVM) given, from offset off of its 4096 bytes on. The frame is mapped only for that: as
// long as one is mapped writable, Xen lets a PV guest make no page table of it. What
// exceeds the frame is EINVAL.
func (h *Handle) WriteForeign(id DomID, frame uint64, off int, b []byte) error {
	return h.do("write memory", id, -1, func(l lib) error {
		switch {
		case off < 0 || off > PageSize || len(b) > PageSize-off:
			return syscall.EINVAL
		case frame > frameMax:
			return syscall.ERANGE
		case len(b) == 0:
			return nil
		}
		return l.writeForeign(id, frame, off, b)
	})
}

// Bytes returns the mapped memory, which the guest may change at any time, or
// nil after Unmap. It must not be used after Unmap, nor written to if the
// mapping is not writable: that ends the process.
func (m *Mapping) Bytes() []byte {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.mem
}

// Unmap ends the mapping. Calling it again does nothing.
func (m *Mapping) Unmap() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.mem == nil {
		return nil
	}
	err := m.h.l.unmapForeign(m.mem)
	m.mem = nil
	m.h.unref()
	return opErr("unmap memory", domNone, -1, err)
}

// deathPoll is how often WatchDomainDeath looks even if nothing is announced,
// in case xenstored is restarted and forgets the watch.
const deathPoll = time.Second

// WatchDomainDeath returns a channel that is closed when the domain is dying,
// has shut down or crashed, or is gone. Watching ends when ctx is done or h is
// closed; the channel then stays open.
func (h *Handle) WatchDomainDeath(ctx context.Context, id DomID) (<-chan struct{}, error) {
	var sl storeLib
	err := h.do("watch", id, -1, func(l lib) (err error) {
		sl, err = l.openStore()
		return err
	})
	if err != nil {
		return nil, err
	}
	s, err := newStore(sl)
	if err != nil {
		return nil, err
	}
	if err := s.Watch("@releaseDomain", "vmprobes"); err != nil {
		_ = s.Close()
		return nil, err
	}
	first, err := h.Domain(id)
	if err != nil {
		_ = s.Close()
		return nil, err
	}
	dead := make(chan struct{})
	go func() {
		defer s.Close()
		for {
			info, err := h.Domain(id)
			switch {
			case ctx.Err() != nil, errors.Is(err, ErrClosed):
				return
			case errors.Is(err, ErrNoDomain), err == nil && (info.Gone() || info.Handle != first.Handle):
				close(dead)
				return
			}
			wait, cancel := context.WithTimeout(ctx, deathPoll)
			_, _, err = s.WaitWatch(wait)
			if err != nil {
				<-wait.Done() // a broken store must not make this a busy loop
			}
			cancel()
		}
	}()
	return dead, nil
}
