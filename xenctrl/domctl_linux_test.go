package xenctrl

import (
	"bytes"
	"encoding/binary"
	"errors"
	"slices"
	"sync"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// fakeXen is a hypervisor behind privcmd: it reads and writes memory at the
// addresses that it is given, if they are of the memory for it, by the layout of
// xen/include/public/domctl.h.
type fakeXen struct {
	t    testing.TB
	mem  []byte
	face uint32
	err  syscall.Errno // of the next calls

	calls   []uint32
	domain  uint16
	vcpu    uint32
	ctx     [5168]byte
	compat  bool   // the guest's context is shorter
	ext     []byte // of the vCPU
	mask    uint64
	next    bool // asked for no domain it answers with the next
	grows   int  // the state grows before it is read, so often
	answer  [128]byte
	given   [128]byte
	size    int // of its struct xen_domctl
	overlap sync.Mutex
}

func newFakeXen(t testing.TB, face uint32) (*fakeXen, *domctls, *fakeLib, error) {
	t.Helper()
	mem, err := unix.Mmap(-1, 0, domctlMemory, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	x := &fakeXen{t: t, mem: mem, face: face, mask: 7, size: 144}
	l := newFakeLib()
	d, err := newDomctls(l, x, mem)
	if err != nil {
		_ = unix.Munmap(mem)
		d = nil
	}
	return x, d, l, err
}

// at returns n bytes at an address.
func (x *fakeXen) at(addr uint64, n int) []byte {
	off := addr - uint64(uintptr(unsafe.Pointer(unsafe.SliceData(x.mem))))
	if off > uint64(len(x.mem)) || uint64(n) > uint64(len(x.mem))-off {
		x.t.Fatalf("%#x, %d bytes: not of the memory for the hypervisor", addr, n)
	}
	return x.mem[off:][:n]
}

func (x *fakeXen) hypercall(op, arg0 uint64) error {
	if !x.overlap.TryLock() {
		x.t.Error("two calls at once, of one memory")
		return syscall.EFAULT
	}
	defer x.overlap.Unlock()
	if op != 36 {
		return syscall.ENOSYS
	}
	le := binary.LittleEndian
	b := x.at(arg0, x.size)
	if le.Uint32(b[4:]) != x.face {
		return syscall.EACCES
	}
	if x.err != 0 {
		return x.err
	}
	cmd, u := le.Uint32(b), b[16:144]
	x.calls = append(x.calls, cmd)
	x.domain = le.Uint16(b[8:])
	copy(x.given[:], u)
	switch cmd {
	case 5: // the answer may be longer than the union that is known here
		switch {
		case x.domain == 0 || x.domain == 5:
		case x.domain < 5 && x.next: // Xen 4.18 and older
			x.domain = 5
		default:
			return syscall.ESRCH
		}
		for i := range b[16:] {
			b[16+i] = 0xEE
		}
		le.PutUint16(b[8:], x.domain)
		le.PutUint16(u, x.domain)
		le.PutUint32(u[4:], 2)             // flags
		le.PutUint64(u[8:], 100)           // tot_pages
		le.PutUint64(u[16:], 200)          // max_pages
		le.PutUint64(u[48:], 0x55)         // shared_info_frame
		le.PutUint64(u[56:], 1<<40)        // cpu_time
		le.PutUint32(u[64:], 2)            // nr_online_vcpus
		le.PutUint32(u[68:], 3)            // max_vcpu_id
		copy(u[76:92], "0123456789abcdef") // handle
	case 12, 13:
		x.vcpu = le.Uint32(u)
		m := x.at(le.Uint64(u[8:]), len(x.ctx))
		switch {
		case cmd == 12:
			copy(x.ctx[:], m)
		case x.compat:
			copy(m[:2800], x.ctx[:])
		default:
			copy(m, x.ctx[:])
		}
	case 62:
		x.vcpu = le.Uint32(u)
		x.ext = append(x.ext[:0], x.at(le.Uint64(u[24:]), int(le.Uint64(u[16:])))...)
	case 63:
		x.vcpu = le.Uint32(u)
		if le.Uint64(u[8:]) == 0 && le.Uint64(u[16:]) == 0 {
			le.PutUint64(u[8:], x.mask)
			le.PutUint64(u[16:], uint64(len(x.ext)))
			break
		}
		if x.grows > 0 {
			x.grows--
			x.ext = append(x.ext, make([]byte, 100)...)
		}
		if le.Uint64(u[16:]) < uint64(len(x.ext)) || le.Uint64(u[8:]) != x.mask {
			return syscall.EINVAL
		}
		copy(x.at(le.Uint64(u[24:]), len(x.ext)), x.ext)
		le.PutUint64(u[16:], uint64(len(x.ext)))
	default:
		copy(u, x.answer[:])
	}
	return nil
}

// TestDomctlVersions: every known version of the interface is found, by a call that
// changes nothing, and no other is used.
func TestDomctlVersions(t *testing.T) {
	for face := range uint32(0x30) {
		x, d, _, err := newFakeXen(t, face)
		if face < 0x12 || face > 0x18 {
			if err != syscall.EACCES || len(x.calls) != 0 {
				t.Errorf("version %#x: %v, calls %v", face, err, x.calls)
			}
			continue
		}
		if err != nil || d.face != face || !slices.Equal(x.calls, []uint32{5}) || x.domain != 0 {
			t.Errorf("version %#x: %v, calls %v", face, err, x.calls)
			continue
		}
		if err := d.close(); err != nil {
			t.Error(err)
		}
	}
	// A domain that may not: the library is to say so.
	x := &fakeXen{t: t, mem: make([]byte, domctlMemory), face: 0x15, err: syscall.EPERM, size: 144}
	if _, err := newDomctls(newFakeLib(), x, x.mem); err != syscall.EPERM {
		t.Errorf("no permission: %v, want EPERM", err)
	}
	if _, err := newDomctls(newFakeLib(), x, x.mem[:PageSize]); err == nil {
		t.Error("too little memory was taken")
	}
}

// TestDomctls: what the hypervisor gets and gives is what the caller gave and gets,
// and the library makes none of the calls.
func TestDomctls(t *testing.T) {
	x, d, l, err := newFakeXen(t, 0x15)
	if err != nil {
		t.Fatal(err)
	}
	x.size = PageSize // of a hypervisor that is to come
	h := newHandle(d)
	le := binary.LittleEndian
	called := func(what string, err error, cmds ...uint32) {
		t.Helper()
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
		if !slices.Equal(x.calls, cmds) || x.domain != 5 {
			t.Errorf("%s: calls %v of domain %d, want %v", what, x.calls, x.domain, cmds)
		}
		x.calls = x.calls[:0]
	}
	x.calls = nil
	called("pause", h.Pause(5), 3)
	called("unpause", h.Unpause(5), 4)
	called("pause vCPU", h.GdbsxPauseVCPU(5, 6), 1001)
	if le.Uint32(x.given[:]) != 6 || !bytes.Equal(x.given[4:], make([]byte, 124)) {
		t.Errorf("pause vCPU: % x", x.given)
	}
	called("unpause vCPU", h.GdbsxUnpauseVCPU(5, 127), 1002)
	x.answer[0] = 1
	le.PutUint32(x.answer[4:], 3)
	le.PutUint32(x.answer[8:], 3)
	s, err := h.GdbsxDomStatus(5)
	called("status", err, 1003)
	if s != (DomStatus{Paused: true, VCPU: 3, Event: 3}) {
		t.Errorf("status: %+v", s)
	}
	if x.given != [128]byte{} {
		t.Errorf("status: % x is left of another call", x.given)
	}

	var in, out VCPUContext
	for i, b := 0, unsafe.Slice((*byte)(unsafe.Pointer(&in)), unsafe.Sizeof(in)); i < len(b); i++ {
		b[i] = byte(i*7 + i>>8)
	}
	called("set context", h.SetVCPUContext(5, 2, &in), 12)
	if x.vcpu != 2 || !bytes.Equal(x.ctx[:], unsafe.Slice((*byte)(unsafe.Pointer(&in)), unsafe.Sizeof(in))) {
		t.Error("set context: the hypervisor has another one")
	}
	called("get context", h.VCPUContext(5, 2, &out), 13)
	if x.vcpu != 2 || out != in {
		t.Error("get context: another one")
	}
	x.compat = true
	out = in
	called("get context of a 32-bit guest", h.VCPUContext(5, 0, &out), 13)
	if out.FPU != in.FPU || out.GSBaseUser != 0 {
		t.Error("a 32-bit guest has registers of another vCPU")
	}

	x.ext = bytes.Repeat([]byte{7, 0, 0, 0, 0, 0, 0, 0}, 106)
	var ext ExtState
	called("get extended state", h.ReadVCPUExtState(5, 1, &ext), 63, 63)
	called("again", h.ReadVCPUExtState(5, 1, &ext), 63)
	if x.vcpu != 1 || ext.Mask != 7 || !bytes.Equal(ext.Data, x.ext) || !ext.Live() {
		t.Errorf("extended state: mask %#x, %d bytes", ext.Mask, len(ext.Data))
	}
	x.grows = 1
	called("grown state", h.ReadVCPUExtState(5, 1, &ext), 63, 63, 63)
	if !bytes.Equal(ext.Data, x.ext) {
		t.Error("grown state: another one")
	}
	want := slices.Clone(x.ext)
	want[800] = 1
	called("set extended state", h.SetVCPUExtState(5, 1, ExtState{Mask: 7, Data: want}), 62)
	if !bytes.Equal(x.ext, want) || le.Uint64(x.given[8:]) != 7 {
		t.Error("set extended state: the hypervisor has another one")
	}
	x.ext = make([]byte, extStateMax+1)
	ext = ExtState{}
	if err := h.ReadVCPUExtState(5, 1, &ext); !errors.Is(err, syscall.E2BIG) {
		t.Errorf("too much extended state: %v, want E2BIG", err)
	}
	if _, err := d.extState(5, 1, 7, make([]byte, extStateMax+1)); err != syscall.E2BIG {
		t.Errorf("too much room: %v, want E2BIG", err)
	}
	if err := d.setVCPUExtState(5, 1, 7, make([]byte, extStateMax+1)); err != syscall.E2BIG {
		t.Errorf("too much to set: %v, want E2BIG", err)
	}

	x.err = syscall.ESRCH
	out = in
	for name, err := range map[string]error{
		"pause":       h.Pause(5),
		"status":      func() error { _, err := h.GdbsxDomStatus(5); return err }(),
		"context":     h.VCPUContext(5, 0, &out),
		"set context": h.SetVCPUContext(5, 0, &out),
		"state":       h.ReadVCPUExtState(5, 0, &ext),
		"set state":   h.SetVCPUExtState(5, 0, ExtState{Data: want}),
	} {
		if !errors.Is(err, ErrNoDomain) {
			t.Errorf("%s of no domain: %v", name, err)
		}
	}
	if out != in {
		t.Error("a context that couldn't be read was changed")
	}
	if len(l.calls) != 0 {
		t.Errorf("the library was called: %v", l.calls)
	}
	if n, err := h.MaxGPFN(5); err != nil || n != 0xFEFFF || len(l.calls) != 1 {
		t.Errorf("other calls are the library's: %v, %v", l.calls, err)
	}
	if err := errors.Join(h.Close(), h.Close()); err != nil || l.closes != 1 {
		t.Errorf("Close: %v, the library %d times", err, l.closes)
	}
	if err := h.Pause(5); !errors.Is(err, ErrClosed) {
		t.Errorf("Pause after Close: %v", err)
	}
}

// TestDomctlDomains: a domain that is there is asked for without the library, one that
// isn't with it, whatever the hypervisor says then.
func TestDomctlDomains(t *testing.T) {
	for _, next := range []bool{false, true} {
		x, d, l, err := newFakeXen(t, 0x15)
		if err != nil {
			t.Fatal(err)
		}
		x.size, x.next = PageSize, next
		h := newHandle(d)
		want := DomainInfo{
			ID: 5, Flags: DomainHVM, TotalPages: 100, MaxPages: 200, SharedInfoFrame: 0x55, CPUTime: 1 << 40,
			OnlineVCPUs: 2, MaxVCPUID: 3, Handle: [16]byte([]byte("0123456789abcdef")),
		}
		if info, err := h.Domain(5); err != nil || info != want || len(l.calls) != 0 {
			t.Errorf("Domain(5): %+v, %v, the library %v", info, err, l.calls)
		}
		for _, id := range []DomID{3, 6} {
			if _, err := h.Domain(id); !errors.Is(err, ErrNoDomain) {
				t.Errorf("Domain(%d): %v, want ErrNoDomain", id, err)
			}
		}
		list, err := h.Domains()
		if err != nil || len(list) != 2 || list[0].ID != 0 || list[1].ID != 5 {
			t.Errorf("Domains: %+v, %v", list, err)
		}
		if err := h.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestDomctlsTogether: calls of several goroutines don't mix.
func TestDomctlsTogether(t *testing.T) {
	x, d, _, err := newFakeXen(t, 0x17)
	if err != nil {
		t.Fatal(err)
	}
	x.ext = make([]byte, 600)
	h := newHandle(d)
	var g sync.WaitGroup
	for id := range DomID(4) {
		g.Go(func() {
			c := VCPUContext{User: UserRegs{RIP: uint64(id)}}
			var s ExtState
			for range 200 {
				if err := errors.Join(h.Pause(id), h.SetVCPUContext(id, 0, &c), h.VCPUContext(id, 0, &c), h.ReadVCPUExtState(id, 0, &s)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	g.Wait()
	if err := h.Close(); err != nil {
		t.Error(err)
	}
}

// TestDomctlsAllocate: none of the calls of a hit makes anything for the garbage
// collector.
func TestDomctlsAllocate(t *testing.T) {
	x, d, _, err := newFakeXen(t, 0x15)
	if err != nil {
		t.Fatal(err)
	}
	x.ext = make([]byte, 848)
	x.calls = make([]uint32, 0, 10000)
	h := newHandle(d)
	defer h.Close()
	var c VCPUContext
	var s ExtState
	hit := func() {
		_, err := h.GdbsxDomStatus(5)
		err1, err2 := h.VCPUContext(5, 0, &c), h.ReadVCPUExtState(5, 0, &s)
		err3, err4, err5 := h.SetVCPUContext(5, 0, &c), h.SetVCPUExtState(5, 0, s), h.Unpause(5)
		if err != nil || err1 != nil || err2 != nil || err3 != nil || err4 != nil || err5 != nil {
			t.Fatal(err, err1, err2, err3, err4, err5)
		}
	}
	hit()
	if n := testing.AllocsPerRun(200, hit); n != 0 {
		t.Errorf("%v allocations a hit", n)
	}
}

// TestPrivcmd: without the device there are no hypercalls; and a call's result is the
// ioctl's.
func TestPrivcmd(t *testing.T) {
	if inDom0() {
		t.Skip("this is a dom0")
	}
	if p := openPrivcmd(); p != nil {
		t.Error("opened")
	}
	if m, err := hypercallMemory(domctlMemory); err == nil {
		t.Error("memory for hypercalls", len(m))
	}
	l := newFakeLib()
	h := newHandle(l)
	h.goDirect()
	if h.l != lib(l) || h.turn != nil {
		t.Error("without the device something changed")
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fds[0])
	defer unix.Close(fds[1])
	p := &privcmd{fd: uintptr(fds[0])}
	if err := p.hypercall(hypervisorDomctl, 0); err != syscall.ENOTTY {
		t.Errorf("hypercall of a socket: %v, want ENOTTY", err)
	}
	if p.yield() {
		t.Error("a socket gave away a turn")
	}
}
