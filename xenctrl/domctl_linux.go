package xenctrl

import (
	"encoding/binary"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// domctls makes the control operations that a hit takes as hypercalls, and all others
// through the library. Go's scheduler keeps account of calls through cgo, and takes
// the processor away from one that lasts: getting it back costs more than the
// operation.
//
// All of them return soon, as they must: the scheduler doesn't hear of them, and
// garbage collection waits for them. At most the hypervisor waits until a vCPU has
// left its processor, or for another operation.
type domctls struct {
	lib
	dev  hypercaller
	face uint32 // version of the running hypervisor's interface

	mu   sync.Mutex // held during an operation: m
	m    *domctlBuffers
	mem  []byte // m
	addr uint64 // of m
}

// hypercaller makes hypercalls.
type hypercaller interface {
	hypercall(op, arg0 uint64) error
}

// xenDomctl is struct xen_domctl (xen/include/public/domctl.h), with room for
// hypervisors in which it is larger.
type xenDomctl struct {
	cmd    uint32
	face   uint32 // interface_version
	domain uint16
	_      [3]uint16
	u      domctlArgs
	_      [PageSize - 16 - len(domctlArgs{})]byte
}

// domctlBuffers is what the hypervisor reads and writes.
type domctlBuffers struct {
	op  xenDomctl
	ctx struct {
		VCPUContext
		_ [2*PageSize - unsafe.Sizeof(VCPUContext{})]byte
	}
	ext [extStateMax]byte
}

const domctlMemory = int(unsafe.Sizeof(domctlBuffers{}))

// newDomctls makes the domctls of l with memory of domctlMemory bytes. It fails if
// the hypervisor has an interface that isn't known.
func newDomctls(l lib, dev hypercaller, mem []byte) (*domctls, error) {
	if len(mem) != domctlMemory {
		return nil, syscall.EINVAL
	}
	p := unsafe.Pointer(unsafe.SliceData(mem))
	d := &domctls{lib: l, dev: dev, mem: mem, m: (*domctlBuffers)(p), addr: uint64(uintptr(p))}
	// A hypervisor that has another interface does nothing and returns EACCES.
	for d.face = domctlNewest; d.face >= domctlOldest; d.face-- {
		_, err := d.domainInfo(DomID0)
		if err != syscall.EACCES {
			return d, err
		}
	}
	return nil, syscall.EACCES
}

func (d *domctls) close() error {
	err := d.lib.close()
	if e := unix.Munmap(d.mem); err == nil {
		err = e
	}
	d.m, d.mem = nil, nil
	return err
}

// begin starts an operation and returns its arguments; do makes the call, and end
// finishes it.
func (d *domctls) begin() *domctlArgs {
	d.mu.Lock()
	clear(d.m.op.u[:])
	return &d.m.op.u
}

func (d *domctls) do(cmd uint32, id DomID) error {
	op := &d.m.op
	op.cmd, op.face, op.domain = cmd, d.face, uint16(id)
	return d.dev.hypercall(hypervisorDomctl, d.addr+uint64(unsafe.Offsetof(d.m.op)))
}

func (d *domctls) end() { d.mu.Unlock() }

// firstDomain asks for the domain first itself. If there is none, the answer is an
// error or another domain, depending on the release: then the library is asked.
func (d *domctls) firstDomain(first DomID) (DomainInfo, bool, error) {
	if info, err := d.domainInfo(first); err == nil && info.ID == first {
		return info, true, nil
	}
	return d.lib.firstDomain(first)
}

func (d *domctls) domainInfo(id DomID) (DomainInfo, error) {
	args := d.begin()
	defer d.end()
	if err := d.do(domctlGetDomainInfo, id); err != nil {
		return DomainInfo{}, err
	}
	return (*xenDomainInfo)(unsafe.Pointer(args)).info(), nil
}

func (d *domctls) pause(id DomID) error {
	_, err := d.domctl(domctlPauseDomain, id, domctlArgs{})
	return err
}

func (d *domctls) unpause(id DomID) error {
	_, err := d.domctl(domctlUnpauseDomain, id, domctlArgs{})
	return err
}

func (d *domctls) domctl(cmd uint32, id DomID, u domctlArgs) (domctlArgs, error) {
	args := d.begin()
	defer d.end()
	*args = u
	err := d.do(cmd, id)
	return *args, err
}

// vcpuContextCall is XEN_DOMCTL_getvcpucontext or _setvcpucontext, on m.ctx.
func (d *domctls) vcpuContextCall(args *domctlArgs, cmd uint32, id DomID, vcpu int) error {
	binary.LittleEndian.PutUint32(args[domctlVCPUOff:], uint32(vcpu))
	binary.LittleEndian.PutUint64(args[domctlContextHandleOff:], d.addr+uint64(unsafe.Offsetof(d.m.ctx)))
	return d.do(cmd, id)
}

func (d *domctls) vcpuContext(id DomID, vcpu int, c *VCPUContext) error {
	args := d.begin()
	defer d.end()
	// Xen leaves alone what a guest of the other width doesn't have.
	d.m.ctx.VCPUContext = VCPUContext{}
	err := d.vcpuContextCall(args, domctlGetVCPUContext, id, vcpu)
	if err == nil {
		*c = d.m.ctx.VCPUContext
	}
	return err
}

func (d *domctls) setVCPUContext(id DomID, vcpu int, c *VCPUContext) error {
	args := d.begin()
	defer d.end()
	d.m.ctx.VCPUContext = *c
	return d.vcpuContextCall(args, domctlSetVCPUContext, id, vcpu)
}

// extStateCall is XEN_DOMCTL_getvcpuextstate or _setvcpuextstate, on m.ext.
func (d *domctls) extStateCall(args *domctlArgs, cmd uint32, id DomID, vcpu int, mask uint64, size int) error {
	binary.LittleEndian.PutUint32(args[domctlVCPUOff:], uint32(vcpu))
	binary.LittleEndian.PutUint64(args[domctlExtMaskOff:], mask)
	binary.LittleEndian.PutUint64(args[domctlExtSizeOff:], uint64(size))
	binary.LittleEndian.PutUint64(args[domctlExtHandleOff:], d.addr+uint64(unsafe.Offsetof(d.m.ext)))
	return d.do(cmd, id)
}

func (d *domctls) vcpuExtState(id DomID, vcpu int, s *ExtState) error {
	return readExtState(d, id, vcpu, s)
}

func (d *domctls) extRoom(id DomID, vcpu int) (mask, room uint64, err error) {
	args := d.begin()
	defer d.end()
	// With all other fields 0 Xen returns the largest possible size.
	binary.LittleEndian.PutUint32(args[domctlVCPUOff:], uint32(vcpu))
	err = d.do(domctlGetVCPUExtState, id)
	return binary.LittleEndian.Uint64(args[domctlExtMaskOff:]), binary.LittleEndian.Uint64(args[domctlExtSizeOff:]), err
}

func (d *domctls) extState(id DomID, vcpu int, mask uint64, buf []byte) (size int, err error) {
	if len(buf) > len(d.m.ext) {
		return 0, syscall.E2BIG
	}
	args := d.begin()
	defer d.end()
	if err := d.extStateCall(args, domctlGetVCPUExtState, id, vcpu, mask, len(buf)); err != nil {
		return 0, err
	}
	n := binary.LittleEndian.Uint64(args[domctlExtSizeOff:])
	if n > uint64(len(buf)) {
		return 0, syscall.EAGAIN
	}
	return copy(buf, d.m.ext[:n]), nil
}

func (d *domctls) setVCPUExtState(id DomID, vcpu int, mask uint64, data []byte) error {
	if len(data) > len(d.m.ext) {
		return syscall.E2BIG
	}
	args := d.begin()
	defer d.end()
	copy(d.m.ext[:], data)
	return d.extStateCall(args, domctlSetVCPUExtState, id, vcpu, mask, len(data))
}
