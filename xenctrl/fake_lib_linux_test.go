package xenctrl

import (
	"fmt"
	"sync"
	"syscall"
	"unsafe"
)

// fakeLib is a lib in memory: two domains, and whatever the test sets.
type fakeLib struct {
	mu     sync.Mutex
	calls  []string
	closes int

	domains   []DomainInfo
	fail      map[string]error // by name of the call
	ext       []byte
	status    domctlArgs
	domctls   []uint32
	guest     map[uint64]byte
	mapErrs   []int32
	rec       hvmHWCPU
	evVersion int

	front  *front
	mapped *front // the page in the guest's memory
	events *fakeEvents
	store  *fakeStore
}

var _ lib = (*fakeLib)(nil)

func newFakeLib() *fakeLib {
	return &fakeLib{
		domains: []DomainInfo{
			{ID: 0, TotalPages: 1000, OnlineVCPUs: 2, MaxVCPUID: 1},
			{ID: 5, Flags: DomainHVM, Handle: [16]byte{1}},
		},
		fail:      map[string]error{},
		evVersion: vmEventVersion,
	}
}

func (f *fakeLib) call(name string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = append(f.calls, name)
	return f.fail[name]
}

func (f *fakeLib) set(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

func (f *fakeLib) path() string { return "/fake/libxenctrl.so.4.17" }
func (f *fakeLib) close() error { f.closes++; return f.call("close") }

func (f *fakeLib) version() (int, int, string, error) { return 4, 17, ".7", f.call("version") }
func (f *fakeLib) capabilities() (string, error) {
	return "xen-3.0-x86_64 hvm-3.0-x86_64", f.call("capabilities")
}

func (f *fakeLib) firstDomain(first DomID) (DomainInfo, bool, error) {
	if err := f.call("firstDomain"); err != nil {
		return DomainInfo{}, false, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, d := range f.domains {
		if d.ID >= first {
			return d, true, nil
		}
	}
	return DomainInfo{}, false, nil
}

func (f *fakeLib) pause(DomID) error                             { return f.call("pause") }
func (f *fakeLib) unpause(DomID) error                           { return f.call("unpause") }
func (f *fakeLib) guestWidth(DomID) (int, error)                 { return 8, f.call("guestWidth") }
func (f *fakeLib) maxGPFN(DomID) (uint64, error)                 { return 0xFEFFF, f.call("maxGPFN") }
func (f *fakeLib) vcpuContext(DomID, int, *VCPUContext) error    { return f.call("vcpuContext") }
func (f *fakeLib) setVCPUContext(DomID, int, *VCPUContext) error { return f.call("setVCPUContext") }
func (f *fakeLib) setDebugging(DomID, bool) error                { return f.call("setDebugging") }
func (f *fakeLib) translate(DomID, int, uint64) (uint64, error)  { return 77, f.call("translate") }
func (f *fakeLib) monitorCaps(DomID) (uint32, error)             { return 0x1F7B, f.call("monitorCaps") }
func (f *fakeLib) eventVersion() (int, error)                    { return f.evVersion, f.call("eventVersion") }
func (f *fakeLib) monitorUnmap(unsafe.Pointer) error             { return f.call("monitorUnmap") }
func (f *fakeLib) monitorDisable(DomID) error                    { return f.call("monitorDisable") }
func (f *fakeLib) writeForeign(_ DomID, frame uint64, off int, b []byte) error {
	return f.call(fmt.Sprintf("writeForeign %#x+%d % x", frame, off, b))
}
func (f *fakeLib) unmapForeign([]byte) error { return f.call("unmapForeign") }

func (f *fakeLib) vcpuInfo(_ DomID, _ int, info *VCPUInfo) error {
	info.Online = true
	return f.call("vcpuInfo")
}

func (f *fakeLib) debugControl(_ DomID, _ int, op uint32) error {
	return f.call([]string{"debugControl off", "debugControl on"}[op])
}

func (f *fakeLib) vcpuExtState(_ DomID, _ int, s *ExtState) error {
	s.Mask, s.Data = 7, append(s.Data[:0], f.ext...)
	return f.call("vcpuExtState")
}

func (f *fakeLib) setVCPUExtState(_ DomID, _ int, mask uint64, data []byte) error {
	f.ext = append([]byte(nil), data...)
	return f.call("setVCPUExtState")
}

func (f *fakeLib) hvmCPU(_ DomID, _ int, rec *hvmHWCPU) error {
	*rec = f.rec
	return f.call("hvmCPU")
}

func (f *fakeLib) domctl(cmd uint32, _ DomID, u domctlArgs) (domctlArgs, error) {
	f.domctls = append(f.domctls, cmd)
	if cmd == domctlGdbsxDomStatus {
		u = f.status
	} else {
		f.status = u
	}
	return u, f.call("domctl")
}

func (f *fakeLib) gdbsxMemory(_ DomID, _, va uint64, buf []byte, write bool) (int, error) {
	if err := f.call("gdbsxMemory"); err != nil {
		return 0, err
	}
	for i := range buf {
		a := va + uint64(i)
		if _, ok := f.guest[a]; !ok {
			return 0, syscall.EFAULT
		}
		if write {
			f.guest[a] = buf[i]
		} else {
			buf[i] = f.guest[a]
		}
	}
	return 0, nil
}

func (f *fakeLib) mapForeign(_ DomID, _ bool, frames []uint64) ([]byte, []int32, error) {
	if err := f.call("mapForeign"); err != nil {
		return nil, nil, err
	}
	if f.mapErrs != nil {
		return nil, f.mapErrs, nil
	}
	return make([]byte, PageSize*len(frames)), nil, nil
}

func (f *fakeLib) injectEvent(DomID, int, uint8, uint8, uint32, uint8, uint64) error {
	return f.call("injectEvent")
}

func (f *fakeLib) monitorEnable(DomID) (unsafe.Pointer, uint32, error) {
	if err := f.call("monitorEnable"); err != nil {
		return nil, 0, err
	}
	if f.front = f.mapped; f.front == nil {
		f.front = newFront()
	}
	f.mapped = nil
	return unsafe.Pointer(f.front.mem), 44, nil
}

func (f *fakeLib) monitorMap(DomID) (unsafe.Pointer, error) {
	if err := f.call("monitorMap"); err != nil {
		return nil, err
	}
	f.mapped = newFront()
	return unsafe.Pointer(f.mapped.mem), nil
}

func (f *fakeLib) monitorSet(_ DomID, what monitorEvent, on, sync bool) error {
	name := []string{"swbp", "step", "debug"}[what]
	if on {
		return f.call(name + " on")
	}
	return f.call(name + " off")
}

func (f *fakeLib) openEvents() (eventLib, error) {
	if err := f.call("openEvents"); err != nil {
		return nil, err
	}
	f.events = newFakeEvents()
	return f.events, nil
}

func (f *fakeLib) openStore() (storeLib, error) {
	if err := f.call("openStore"); err != nil {
		return nil, err
	}
	return f.store, nil
}
