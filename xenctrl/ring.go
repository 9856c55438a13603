package xenctrl

import (
	"encoding/binary"
	"fmt"
	"sync/atomic"
	"unsafe"
)

// The shared page of the vm_event ring. It begins with struct vm_event_sring
// (DEFINE_RING_TYPES, xen/include/public/io/ring.h): four counters and padding,
// then the slots, as many as fit and are a power of two. Requests and responses
// share the slots. All values are little endian.
const (
	ringReqProdOff  = 0  // sring.req_prod, written by Xen
	ringReqEventOff = 4  // sring.req_event, written by us
	ringRspProdOff  = 8  // sring.rsp_prod, written by us
	ringRspEventOff = 12 // sring.rsp_event, written by Xen
	ringPvtOff      = 16 // sring.pvt
	ringHeader      = 64 // offsetof(sring, ring)
	ringSlotSize    = 400
	ringSlots       = 8 // __RING_SIZE(sring, 4096)
)

// struct vm_event_st (xen/include/public/vm_event.h), of which a slot is one.
const (
	vmEventVersion = 7 // VM_EVENT_INTERFACE_VERSION

	evVersionOff = 0
	evFlagsOff   = 4
	evReasonOff  = 8
	evVCPUOff    = 12
	evAltP2MOff  = 16
	evUnionOff   = 24 // u
	evDataOff    = 56 // data

	// struct vm_event_debug: u.software_breakpoint, u.debug_exception; u.singlestep
	// has the frame number at the same place.
	evDebugGFNOff     = evUnionOff + 0
	evDebugPendingOff = evUnionOff + 8
	evDebugInsnLenOff = evUnionOff + 16
	evDebugTypeOff    = evUnionOff + 20

	// struct vm_event_regs_x86: data.regs.x86. The general registers come
	// first, in the order of their numbers.
	evRAXOff      = evDataOff + 0
	evRFLAGSOff   = evDataOff + 128
	evDR6Off      = evDataOff + 136
	evDR7Off      = evDataOff + 144
	evRIPOff      = evDataOff + 152
	evCR0Off      = evDataOff + 160
	evCR2Off      = evDataOff + 168
	evCR3Off      = evDataOff + 176
	evCR4Off      = evDataOff + 184
	evEFEROff     = evDataOff + 216
	evSTAROff     = evDataOff + 224
	evLSTAROff    = evDataOff + 232
	evFSBaseOff   = evDataOff + 280
	evGSBaseOff   = evDataOff + 288
	evShadowGSOff = evDataOff + 320
	evCSOff       = evDataOff + 330
	evSSOff       = evDataOff + 332

	// struct vm_event_emul_insn_data: data.emul.insn, in a response.
	evInsnDataOff = evDataOff
)

// A ring is the back end's side (BACK_RING_*, xen/include/public/io/ring.h) of
// a vm_event ring: it takes requests and puts responses. It is not safe for
// concurrent use.
type ring struct {
	page    *[PageSize]byte
	reqCons uint32 // requests taken
	rspProd uint32 // responses put
}

// init makes the page an empty ring (SHARED_RING_INIT, BACK_RING_INIT).
func (r *ring) init(page unsafe.Pointer) {
	*r = ring{page: (*[PageSize]byte)(page)}
	clear(r.page[ringPvtOff:ringHeader])
	atomic.StoreUint32(r.counter(ringReqEventOff), 1)
	atomic.StoreUint32(r.counter(ringRspEventOff), 1)
	atomic.StoreUint32(r.counter(ringRspProdOff), 0)
	atomic.StoreUint32(r.counter(ringReqProdOff), 0)
}

// resume goes on with a ring where another process has left it. All that it knew is in the
// page: how far it had come with the requests is in req_event, and its responses take the
// places of requests that may not be answered yet.
func (r *ring) resume(page unsafe.Pointer) (st RingState, err error) {
	*r = ring{page: (*[PageSize]byte)(page)}
	r.reqCons = atomic.LoadUint32(r.counter(ringReqEventOff)) - 1
	r.rspProd = atomic.LoadUint32(r.counter(ringRspProdOff))
	n, err := r.waiting()
	if taken := r.reqCons - r.rspProd; err == nil && (taken > ringSlots || n+taken > ringSlots) {
		err = fmt.Errorf("%w: %d requests taken and %d not, in %d slots", ErrRing, taken, n, ringSlots)
	}
	if err != nil {
		return st, err
	}
	vcpu := func(n uint32) int {
		v := le32(r.slot(n-1), evVCPUOff)
		if n == 0 || v >= MaxVCPUs {
			return -1
		}
		return int(v)
	}
	return RingState{int(r.reqCons - r.rspProd), vcpu(r.reqCons), vcpu(r.rspProd)}, nil
}

// full reports whether there is no room for another request, as far as this side knows.
func (r *ring) full() bool {
	return atomic.LoadUint32(r.counter(ringReqProdOff))-r.rspProd >= ringSlots
}

// counter returns one of the four counters. Loads and stores of Go's
// sync/atomic are sequentially consistent, so a slot is read after req_prod
// and written before rsp_prod.
func (r *ring) counter(off int) *uint32 { return (*uint32)(unsafe.Pointer(&r.page[off])) }

// slot returns the slot of the nth request or response.
func (r *ring) slot(n uint32) *[ringSlotSize]byte {
	off := ringHeader + int(n%ringSlots)*ringSlotSize
	return (*[ringSlotSize]byte)(r.page[off : off+ringSlotSize])
}

// waiting returns the number of requests that were not taken.
func (r *ring) waiting() (uint32, error) {
	n := atomic.LoadUint32(r.counter(ringReqProdOff)) - r.reqCons
	if n > ringSlots {
		return 0, fmt.Errorf("%w: %d requests in %d slots", ErrRing, n, ringSlots)
	}
	return n, nil
}

// next takes a request.
func (r *ring) next(e *Event) (bool, error) {
	n, err := r.waiting()
	if err != nil || n == 0 {
		return false, err
	}
	s := r.slot(r.reqCons)
	version, vcpu := le32(s, evVersionOff), le32(s, evVCPUOff)
	if version != vmEventVersion {
		err = fmt.Errorf("%w: request has version %d, want %d", ErrRing, version, vmEventVersion)
	} else if vcpu >= MaxVCPUs {
		err = fmt.Errorf("%w: request of vcpu %d", ErrRing, vcpu)
	} else {
		e.decode(s)
	}
	r.reqCons++
	atomic.StoreUint32(r.counter(ringReqEventOff), r.reqCons+1)
	return err == nil, err
}

// put puts a response.
func (r *ring) put(e *Event) error {
	if r.rspProd == r.reqCons {
		return fmt.Errorf("%w: more responses than requests", ErrRing)
	}
	if e.VCPU < 0 || e.VCPU >= MaxVCPUs {
		return fmt.Errorf("xenctrl: response for vcpu %d", e.VCPU)
	}
	if e.Flags&EventSetRegisters != 0 && e.Flags&EventSetEmulInsnData != 0 {
		return fmt.Errorf("xenctrl: a response cannot have both registers and instruction data")
	}
	e.encode(r.slot(r.rspProd))
	r.rspProd++
	atomic.StoreUint32(r.counter(ringRspProdOff), r.rspProd)
	return nil
}

func le16(s *[ringSlotSize]byte, off int) uint16 { return binary.LittleEndian.Uint16(s[off:]) }
func le32(s *[ringSlotSize]byte, off int) uint32 { return binary.LittleEndian.Uint32(s[off:]) }
func le64(s *[ringSlotSize]byte, off int) uint64 { return binary.LittleEndian.Uint64(s[off:]) }

// general returns the general registers in the order of struct
// vm_event_regs_x86.
func (g *EventRegs) general() [16]*uint64 {
	return [16]*uint64{
		&g.RAX, &g.RCX, &g.RDX, &g.RBX, &g.RSP, &g.RBP, &g.RSI, &g.RDI,
		&g.R8, &g.R9, &g.R10, &g.R11, &g.R12, &g.R13, &g.R14, &g.R15,
	}
}

// decode makes *e the request in a slot.
func (e *Event) decode(s *[ringSlotSize]byte) {
	*e = Event{
		Flags:  EventFlags(le32(s, evFlagsOff)),
		Reason: EventReason(le32(s, evReasonOff)),
		VCPU:   int(le32(s, evVCPUOff)),
		AltP2M: le16(s, evAltP2MOff),
	}
	switch e.Reason {
	case ReasonSoftwareBreakpoint, ReasonDebugException:
		e.GFN = le64(s, evDebugGFNOff)
		e.Pending = le64(s, evDebugPendingOff)
		e.InsnLen = le32(s, evDebugInsnLenOff)
		e.Type = s[evDebugTypeOff]
	case ReasonSingleStep:
		e.GFN = le64(s, evDebugGFNOff)
	}
	g := &e.Regs
	for i, p := range g.general() {
		*p = le64(s, evRAXOff+8*i)
	}
	g.RFLAGS, g.RIP = le64(s, evRFLAGSOff), le64(s, evRIPOff)
	g.DR6, g.DR7 = le64(s, evDR6Off), le64(s, evDR7Off)
	g.CR0, g.CR2 = le64(s, evCR0Off), le64(s, evCR2Off)
	g.CR3, g.CR4 = le64(s, evCR3Off), le64(s, evCR4Off)
	g.EFER, g.STAR, g.LSTAR = le64(s, evEFEROff), le64(s, evSTAROff), le64(s, evLSTAROff)
	g.FSBase, g.GSBase, g.ShadowGS = le64(s, evFSBaseOff), le64(s, evGSBaseOff), le64(s, evShadowGSOff)
	g.CS, g.SS = uint32(le16(s, evCSOff)), uint32(le16(s, evSSOff))
}

// encode makes a slot the response *e. Of the registers, Xen takes the general
// ones, RIP and RFLAGS.
func (e *Event) encode(s *[ringSlotSize]byte) {
	le := binary.LittleEndian
	clear(s[:])
	le.PutUint32(s[evVersionOff:], vmEventVersion)
	le.PutUint32(s[evFlagsOff:], uint32(e.Flags))
	le.PutUint32(s[evReasonOff:], uint32(e.Reason))
	le.PutUint32(s[evVCPUOff:], uint32(e.VCPU))
	le.PutUint16(s[evAltP2MOff:], e.AltP2M)
	switch {
	case e.Flags&EventSetRegisters != 0:
		g := &e.Regs
		for i, p := range g.general() {
			le.PutUint64(s[evRAXOff+8*i:], *p)
		}
		le.PutUint64(s[evRFLAGSOff:], g.RFLAGS)
		le.PutUint64(s[evRIPOff:], g.RIP)
		le.PutUint64(s[evDR6Off:], g.DR6)
		le.PutUint64(s[evDR7Off:], g.DR7)
		le.PutUint64(s[evCR0Off:], g.CR0)
		le.PutUint64(s[evCR2Off:], g.CR2)
		le.PutUint64(s[evCR3Off:], g.CR3)
		le.PutUint64(s[evCR4Off:], g.CR4)
		le.PutUint64(s[evEFEROff:], g.EFER)
		le.PutUint64(s[evSTAROff:], g.STAR)
		le.PutUint64(s[evLSTAROff:], g.LSTAR)
		le.PutUint64(s[evFSBaseOff:], g.FSBase)
		le.PutUint64(s[evGSBaseOff:], g.GSBase)
		le.PutUint64(s[evShadowGSOff:], g.ShadowGS)
		le.PutUint16(s[evCSOff:], uint16(g.CS))
		le.PutUint16(s[evSSOff:], uint16(g.SS))
	case e.Flags&EventSetEmulInsnData != 0:
		copy(s[evInsnDataOff:], e.InsnData[:])
	}
}
