package xenctrl

import (
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"runtime"
	"sync/atomic"
	"testing"
	"unsafe"
)

// A front is Xen's side (FRONT_RING_*) of a ring, for the tests: it puts
// requests and takes responses.
type front struct {
	mem     *[PageSize / 8]uint64
	back    ring
	reqProd uint32
	rspCons uint32
}

func newFront() *front {
	f := &front{mem: new([PageSize / 8]uint64)}
	for i := range f.mem {
		f.mem[i] = 0xA5A5A5A5A5A5A5A5
	}
	f.back.init(unsafe.Pointer(f.mem))
	return f
}

// at makes the ring one that has been used n times.
func (f *front) at(n uint32) {
	f.reqProd, f.rspCons = n, n
	f.back.reqCons, f.back.rspProd = n, n
	atomic.StoreUint32(f.back.counter(ringReqProdOff), n)
	atomic.StoreUint32(f.back.counter(ringRspProdOff), n)
}

func (f *front) free() uint32 { return ringSlots - (f.reqProd - f.rspCons) }

func (f *front) request(fill func(s *[ringSlotSize]byte)) {
	s := f.back.slot(f.reqProd)
	clear(s[:])
	binary.LittleEndian.PutUint32(s[evVersionOff:], vmEventVersion)
	fill(s)
	f.reqProd++
	atomic.StoreUint32(f.back.counter(ringReqProdOff), f.reqProd)
}

func (f *front) response() (*[ringSlotSize]byte, bool) {
	if f.rspCons == atomic.LoadUint32(f.back.counter(ringRspProdOff)) {
		return nil, false
	}
	s := f.back.slot(f.rspCons)
	f.rspCons++
	return s, true
}

func TestRingInit(t *testing.T) {
	f := newFront()
	for _, c := range []struct {
		name string
		off  int
		want uint32
	}{
		{"req_prod", ringReqProdOff, 0},
		{"req_event", ringReqEventOff, 1},
		{"rsp_prod", ringRspProdOff, 0},
		{"rsp_event", ringRspEventOff, 1},
		{"pvt", ringPvtOff, 0},
	} {
		if got := *f.back.counter(c.off); got != c.want {
			t.Errorf("%s = %d, want %d", c.name, got, c.want)
		}
	}
	if ringHeader+ringSlots*ringSlotSize > PageSize {
		t.Error("slots do not fit in the page")
	}
	var e Event
	if ok, err := f.back.next(&e); ok || err != nil {
		t.Errorf("next on an empty ring: %v, %v", ok, err)
	}
	if err := f.back.put(&e); !errors.Is(err, ErrRing) {
		t.Errorf("put on an empty ring: %v, want ErrRing", err)
	}
}

// sample returns an event whose values are all different.
func sample(reason EventReason, flags EventFlags) Event {
	e := Event{Flags: flags, Reason: reason, VCPU: 3, AltP2M: 0x102}
	switch reason {
	case ReasonSoftwareBreakpoint, ReasonDebugException:
		e.GFN, e.Pending, e.InsnLen, e.Type = 0x1122334455, 0x4000, 1, EventTypeSoftwareException
	case ReasonSingleStep:
		e.GFN = 0x66778899
	}
	for i, p := range e.Regs.general() {
		*p = 0x1000 + uint64(i)
	}
	g := &e.Regs
	g.RFLAGS, g.RIP, g.DR6, g.DR7 = 0x246, 0xffffffff81000010, 0xffff0ff0, 0x400
	g.CR0, g.CR2, g.CR3, g.CR4 = 0x80050033, 0x7f0000001000, 0x2000, 0x3506f0
	g.EFER, g.STAR, g.LSTAR = 0xd01, 0x23001000000000, 0xffffffff81e00000
	g.FSBase, g.GSBase, g.ShadowGS = 0x7f1111, 0xffff888000000000, 0x7f2222
	g.CS, g.SS = 0x10, 0x18
	return e
}

// fillRequest writes e as Xen does, by offsets that are written here once more
// (offsetof in vm_event.h of 4.17).
func fillRequest(e *Event) func(s *[ringSlotSize]byte) {
	return func(s *[ringSlotSize]byte) {
		le := binary.LittleEndian
		le.PutUint32(s[4:], uint32(e.Flags))
		le.PutUint32(s[8:], uint32(e.Reason))
		le.PutUint32(s[12:], uint32(e.VCPU))
		le.PutUint16(s[16:], e.AltP2M)
		le.PutUint64(s[24:], e.GFN)
		le.PutUint64(s[32:], e.Pending)
		le.PutUint32(s[40:], e.InsnLen)
		s[44] = e.Type
		g := &e.Regs
		for i, v := range []uint64{
			g.RAX, g.RCX, g.RDX, g.RBX, g.RSP, g.RBP, g.RSI, g.RDI,
			g.R8, g.R9, g.R10, g.R11, g.R12, g.R13, g.R14, g.R15,
			g.RFLAGS, g.DR6, g.DR7, g.RIP, g.CR0, g.CR2, g.CR3, g.CR4,
		} {
			le.PutUint64(s[56+8*i:], v)
		}
		for off, v := range map[int]uint64{
			272: g.EFER, 280: g.STAR, 288: g.LSTAR, 336: g.FSBase, 344: g.GSBase, 376: g.ShadowGS,
		} {
			le.PutUint64(s[off:], v)
		}
		le.PutUint16(s[386:], uint16(g.CS))
		le.PutUint16(s[388:], uint16(g.SS))
	}
}

func TestRingRequests(t *testing.T) {
	for _, reason := range []EventReason{ReasonSoftwareBreakpoint, ReasonSingleStep, ReasonDebugException} {
		f := newFront()
		want := sample(reason, EventVCPUPaused|EventAlternateP2M)
		f.request(fillRequest(&want))
		got := Event{InsnData: [16]byte{1, 2, 3}} // of the event before
		ok, err := f.back.next(&got)
		if !ok || err != nil {
			t.Fatalf("reason %d: next: %v, %v", reason, ok, err)
		}
		if got != want {
			t.Errorf("reason %d:\ngot  %+v\nwant %+v", reason, got, want)
		}
		if req := *f.back.counter(ringReqEventOff); req != 2 {
			t.Errorf("req_event = %d, want 2", req)
		}
	}
}

func TestRingResponses(t *testing.T) {
	insn := [16]byte{0x0f, 0x1f, 0x44, 0, 0, 0x55, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}
	for _, c := range []struct {
		name  string
		flags EventFlags
		data  bool // the response has data
	}{
		{"go on", EventVCPUPaused, false},
		{"toggle single step", EventVCPUPaused | EventToggleSingleStep, false},
		{"registers", EventVCPUPaused | EventSetRegisters, true},
		{"emulate", EventVCPUPaused | EventEmulate | EventSetEmulInsnData, true},
	} {
		f := newFront()
		e := sample(ReasonSoftwareBreakpoint, EventVCPUPaused)
		f.request(fillRequest(&e))
		if ok, err := f.back.next(&e); !ok || err != nil {
			t.Fatal(ok, err)
		}
		e.Flags, e.InsnData = c.flags, insn
		if err := f.back.put(&e); err != nil {
			t.Fatalf("%s: put: %v", c.name, err)
		}
		s, ok := f.response()
		if !ok {
			t.Fatalf("%s: no response", c.name)
		}
		le := binary.LittleEndian
		if v := le.Uint32(s[0:]); v != 7 {
			t.Errorf("%s: version %d", c.name, v)
		}
		if v := le.Uint32(s[4:]); v != uint32(c.flags) {
			t.Errorf("%s: flags %#x, want %#x", c.name, v, c.flags)
		}
		if v := le.Uint32(s[8:]); v != 6 {
			t.Errorf("%s: reason %d, want 6", c.name, v)
		}
		if v := le.Uint32(s[12:]); v != 3 {
			t.Errorf("%s: vcpu %d, want 3", c.name, v)
		}
		empty := [ringSlotSize]byte{}
		if has := *(*[ringSlotSize - 56]byte)(s[56:]) != [ringSlotSize - 56]byte(empty[56:]); has != c.data {
			t.Errorf("%s: has data: %v, want %v", c.name, has, c.data)
		}
		switch {
		case c.flags&EventSetRegisters != 0:
			var got Event
			got.decode(s)
			if got.Regs != e.Regs {
				t.Errorf("%s: got %+v, want %+v", c.name, got.Regs, e.Regs)
			}
		case c.flags&EventSetEmulInsnData != 0:
			if got := [16]byte(s[56:]); got != insn {
				t.Errorf("%s: got % x, want % x", c.name, got, insn)
			}
		}
	}
}

func TestRingRefuses(t *testing.T) {
	t.Run("both kinds of data", func(t *testing.T) {
		f := newFront()
		e := sample(ReasonSoftwareBreakpoint, EventVCPUPaused)
		f.request(fillRequest(&e))
		_, _ = f.back.next(&e)
		e.Flags |= EventSetRegisters | EventSetEmulInsnData
		if err := f.back.put(&e); err == nil {
			t.Error("put succeeded")
		}
		if _, ok := f.response(); ok {
			t.Error("a response was put")
		}
		e.Flags = EventVCPUPaused
		if err := f.back.put(&e); err != nil {
			t.Errorf("put after a refused one: %v", err)
		}
		if err := f.back.put(&e); !errors.Is(err, ErrRing) {
			t.Errorf("second put for one request: %v, want ErrRing", err)
		}
	})
	t.Run("vcpu of response", func(t *testing.T) {
		f := newFront()
		e := sample(ReasonSingleStep, EventVCPUPaused)
		f.request(fillRequest(&e))
		_, _ = f.back.next(&e)
		for _, vcpu := range []int{-1, MaxVCPUs} {
			e.VCPU = vcpu
			if err := f.back.put(&e); err == nil {
				t.Errorf("put for vcpu %d succeeded", vcpu)
			}
		}
	})
	t.Run("version", func(t *testing.T) {
		f := newFront()
		e := sample(ReasonSoftwareBreakpoint, EventVCPUPaused)
		f.request(func(s *[ringSlotSize]byte) { s[0] = 6 })
		f.request(fillRequest(&e))
		var got Event
		if ok, err := f.back.next(&got); ok || !errors.Is(err, ErrRing) {
			t.Errorf("next: %v, %v, want ErrRing", ok, err)
		}
		if ok, err := f.back.next(&got); !ok || err != nil || got != e {
			t.Errorf("next after a dropped request: %v, %v", ok, err)
		}
	})
	t.Run("vcpu of request", func(t *testing.T) {
		f := newFront()
		f.request(func(s *[ringSlotSize]byte) { binary.LittleEndian.PutUint32(s[12:], MaxVCPUs) })
		var got Event
		if ok, err := f.back.next(&got); ok || !errors.Is(err, ErrRing) {
			t.Errorf("next: %v, %v, want ErrRing", ok, err)
		}
	})
	t.Run("too many requests", func(t *testing.T) {
		f := newFront()
		for _, n := range []uint32{ringSlots + 1, 1 << 31, ^uint32(0)} {
			atomic.StoreUint32(f.back.counter(ringReqProdOff), n)
			var got Event
			if ok, err := f.back.next(&got); ok || !errors.Is(err, ErrRing) {
				t.Errorf("next with req_prod %#x: %v, %v, want ErrRing", n, ok, err)
			}
		}
	})
}

// TestRingOrder runs requests and responses through the ring in random order,
// past the wrap of the counters, and checks that none is lost.
func TestRingOrder(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	f := newFront()
	f.at(^uint32(0) - 1000)
	var sent, taken, answered, got uint64
	var open []Event
	for got < 20000 {
		switch rnd.IntN(4) {
		case 0:
			for range rnd.IntN(int(f.free()) + 1) {
				e := sample(ReasonSoftwareBreakpoint, EventVCPUPaused)
				e.Regs.RAX = sent
				sent++
				f.request(fillRequest(&e))
			}
		case 1:
			var e Event
			ok, err := f.back.next(&e)
			if err != nil {
				t.Fatal(err)
			}
			if ok != (sent > taken) {
				t.Fatalf("next: %v with %d sent, %d taken", ok, sent, taken)
			}
			if ok {
				if e.Regs.RAX != taken {
					t.Fatalf("request %d, want %d", e.Regs.RAX, taken)
				}
				taken++
				open = append(open, e)
			}
		case 2:
			if len(open) == 0 {
				continue
			}
			i := rnd.IntN(len(open))
			e := open[i]
			open = append(open[:i], open[i+1:]...)
			e.Flags |= EventSetRegisters
			e.Regs.RIP++
			if err := f.back.put(&e); err != nil {
				t.Fatal(err)
			}
			answered++
		case 3:
			if s, ok := f.response(); ok {
				if rip := binary.LittleEndian.Uint64(s[evRIPOff:]); rip != sample(0, 0).Regs.RIP+1 {
					t.Fatalf("response %d: rip %#x", got, rip)
				}
				got++
			} else if got != answered {
				t.Fatalf("%d responses, want %d", got, answered)
			}
		}
	}
}

// TestRingConcurrent has the two sides in two goroutines.
func TestRingConcurrent(t *testing.T) {
	const n = 5000
	f := newFront()
	done := make(chan error, 1)
	go func() {
		var e Event
		for i := uint64(0); i < n; {
			ok, err := f.back.next(&e)
			if err != nil {
				done <- err
				return
			}
			if !ok {
				runtime.Gosched()
				continue
			}
			if e.Regs.RAX != i || e.Regs.R15 != ^i {
				done <- errors.New("request out of order or torn")
				return
			}
			i++
			e.Flags |= EventSetRegisters
			if err := f.back.put(&e); err != nil {
				done <- err
				return
			}
		}
		done <- nil
	}()
	sent := uint64(0)
	for got := uint64(0); got < n; {
		if sent < n && f.free() > 0 {
			e := Event{Flags: EventVCPUPaused, Reason: ReasonSoftwareBreakpoint}
			e.Regs.RAX, e.Regs.R15 = sent, ^sent
			sent++
			f.request(fillRequest(&e))
		}
		if s, ok := f.response(); ok {
			if v := binary.LittleEndian.Uint64(s[evRAXOff:]); v != got {
				t.Fatalf("response %d, want %d", v, got)
			}
			got++
		} else {
			runtime.Gosched()
		}
		select {
		case err := <-done:
			if err != nil {
				t.Fatal(err)
			}
			done <- nil
		default:
		}
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

func TestRingAllocations(t *testing.T) {
	f := newFront()
	req := sample(ReasonSoftwareBreakpoint, EventVCPUPaused)
	for i := range uint32(ringSlots) {
		clear(f.back.slot(i)[:])
		fillRequest(&req)(f.back.slot(i))
	}
	var e Event
	if n := testing.AllocsPerRun(100, func() {
		binary.LittleEndian.PutUint32(f.back.slot(f.reqProd)[evVersionOff:], vmEventVersion)
		f.reqProd++
		atomic.StoreUint32(f.back.counter(ringReqProdOff), f.reqProd)
		if ok, err := f.back.next(&e); !ok || err != nil {
			t.Fatal(ok, err)
		}
		e.Flags |= EventSetRegisters
		if err := f.back.put(&e); err != nil {
			t.Fatal(err)
		}
		f.response()
	}); n != 0 {
		t.Errorf("%v allocations for one event, want 0", n)
	}
}

// FuzzRing gives the ring a page with any contents: it may refuse, but has to
// stay within the page and its own counters.
func FuzzRing(f *testing.F) {
	good := newFront()
	e := sample(ReasonSoftwareBreakpoint, EventVCPUPaused)
	good.request(fillRequest(&e))
	f.Add((*[PageSize]byte)(unsafe.Pointer(good.mem))[:], uint32(0), uint8(0))
	f.Add([]byte{9}, uint32(1), uint8(3))
	f.Add([]byte{7, 0, 0, 0}, ^uint32(0), uint8(255))
	f.Fuzz(func(t *testing.T, page []byte, cons uint32, flags uint8) {
		// Guards around the page, to see writes beyond it.
		var mem struct {
			before [64]uint64
			page   [PageSize / 8]uint64
			after  [64]uint64
		}
		var r ring
		r.init(unsafe.Pointer(&mem.page))
		r.reqCons, r.rspProd = cons, cons
		copy(r.page[:], page)
		var e Event
		for range 2 * ringSlots {
			n, werr := r.waiting()
			ok, err := r.next(&e)
			if ok && (err != nil || werr != nil || n == 0 || n > ringSlots) {
				t.Fatalf("next succeeded: waiting %d, %v, %v", n, werr, err)
			}
			if r.reqCons-r.rspProd > ringSlots {
				t.Fatalf("took %d requests", r.reqCons-r.rspProd)
			}
			if !ok {
				continue
			}
			if e.VCPU < 0 || e.VCPU >= MaxVCPUs {
				t.Fatalf("vcpu %d", e.VCPU)
			}
			e.Flags = EventFlags(flags) << 2
			if r.put(&e) != nil && e.Flags&EventSetRegisters == 0 {
				t.Fatal("put failed")
			}
		}
		if mem.before != [64]uint64{} || mem.after != [64]uint64{} {
			t.Fatal("write beyond the page")
		}
	})
}

// TestRingResume: whoever goes on with a ring finds what was taken and what was answered,
// and nothing that can't be.
func TestRingResume(t *testing.T) {
	request := func(f *front, vcpu int) {
		e := sample(ReasonSoftwareBreakpoint, EventVCPUPaused)
		e.VCPU = vcpu
		f.request(fillRequest(&e))
	}
	for _, begin := range []uint32{0, 5, ^uint32(2)} {
		f := newFront()
		f.at(begin)
		atomic.StoreUint32(f.back.counter(ringReqEventOff), begin+1)
		for v := range 6 {
			request(f, 10+v)
		}
		var e Event
		for range 4 {
			if ok, err := f.back.next(&e); !ok || err != nil {
				t.Fatal(ok, err)
			}
		}
		e.VCPU = 12 // the third one is answered first, in the place of the first one's request
		if err := f.back.put(&e); err != nil {
			t.Fatal(err)
		}
		var next ring
		st, err := next.resume(unsafe.Pointer(f.mem))
		if want := (RingState{Unanswered: 3, LastTaken: 13, LastAnswered: 12}); st != want || err != nil {
			t.Errorf("from %d: %+v, %v, want %+v", begin, st, err, want)
		}
		if n, err := next.waiting(); n != 2 || err != nil {
			t.Errorf("%d requests not taken, %v", n, err)
		}
		if ok, err := next.next(&e); !ok || err != nil || e.VCPU != 14 {
			t.Errorf("next: %v, %v, vCPU %d", ok, err, e.VCPU)
		}
		for v := range 4 {
			e.VCPU = 20 + v
			if err := next.put(&e); err != nil {
				t.Errorf("answer %d: %v", v, err)
			}
		}
		for i, want := range []int{12, 20, 21, 22, 23} {
			s, ok := f.response()
			if !ok || int(le32(s, evVCPUOff)) != want {
				t.Errorf("response %d: %v, want of vCPU %d", i, ok, want)
			}
		}
		if full := next.full(); full {
			t.Error("it is full with one request")
		}
	}
	for _, c := range []struct {
		name                       string
		reqProd, reqEvent, rspProd uint32
	}{
		{"never initialised", 0, 0, 0},
		{"more taken than there are", 3, 5, 0},
		{"more than it has places", 9, 1, 0},
		{"more answered than taken", 4, 3, 3},
		{"too many not answered", 12, 10, 0},
	} {
		f := newFront()
		atomic.StoreUint32(f.back.counter(ringReqProdOff), c.reqProd)
		atomic.StoreUint32(f.back.counter(ringReqEventOff), c.reqEvent)
		atomic.StoreUint32(f.back.counter(ringRspProdOff), c.rspProd)
		var r ring
		if _, err := r.resume(unsafe.Pointer(f.mem)); !errors.Is(err, ErrRing) {
			t.Errorf("%s: %v, want ErrRing", c.name, err)
		}
	}
	f := newFront() // nothing has happened yet
	var r ring
	if st, err := r.resume(unsafe.Pointer(f.mem)); err != nil || st != (RingState{0, -1, -1}) {
		t.Errorf("a new ring: %+v, %v", st, err)
	}
}
