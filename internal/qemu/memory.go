package qemu

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/paging"
)

// ErrNotRAM says that a frame isn't memory of the guest: nothing is there, or a
// device, and to read a device changes it.
var ErrNotRAM = errors.New("not the guest's memory")

// maxPages bounds the copies of pages that are kept while the VM is stopped.
const maxPages = 4096

// Page implements [paging.Frames]. Without direct access to the guest's RAM (see
// [Options]) the page is a copy, which doesn't follow the guest's memory and
// can't be had as writable: use WriteFrame.
func (v *VM) Page(f paging.Frame, writable bool) (page []byte, release func(), err error) {
	if v.direct != nil {
		return v.direct.page(f, writable)
	}
	if writable {
		return nil, nil, fmt.Errorf("frame %#x can be written to with WriteFrame only: %w", uint64(f), errors.ErrUnsupported)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if page = v.pages[f]; page == nil {
		err = v.held(func() error {
			page = make([]byte, paging.PageSize)
			return v.readPhys(uint64(f)<<12, page)
		})
		if err != nil {
			return nil, nil, err
		}
	}
	// While the VM runs there is nothing to be kept: held has dropped it.
	if !v.running {
		if len(v.pages) >= maxPages {
			clear(v.pages)
		}
		v.pages[f] = page
	}
	return page, func() {}, nil
}

// WriteFrame stores b at offset off of a frame.
func (v *VM) WriteFrame(f paging.Frame, off int, b []byte) error {
	if off < 0 || off+len(b) > paging.PageSize {
		return fmt.Errorf("%d bytes at offset %d of a frame", len(b), off)
	}
	if v.direct != nil {
		return v.direct.write(f, off, b)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.held(func() error {
		delete(v.pages, f)
		return v.writePhys(uint64(f)<<12+uint64(off), b)
	})
}

// physical switches PhyMemMode; v.mu is held, and the VM stopped.
func (v *VM) physical(on int) error {
	if v.physNow == on {
		return nil
	}
	if !v.phys {
		if on == 0 {
			return nil
		}
		return fmt.Errorf("this QEMU's gdbstub can't read physical memory (QEMU 4.2 and later can): %w", errors.ErrUnsupported)
	}
	v.physNow = -1
	if err := v.callOK(fmt.Sprintf("Qqemu.PhyMemMode:%d", on)); err != nil {
		return err
	}
	v.physNow = on
	return nil
}

// readPhys reads guest-physical memory; v.mu is held, and the VM stopped.
func (v *VM) readPhys(addr uint64, b []byte) error {
	if err := v.checkRAM(addr, len(b)); err != nil {
		return err
	}
	if err := v.physical(1); err != nil {
		return err
	}
	return v.readMem(addr, b)
}

// ramEvery is how often the map of the guest's memory is read anew, at most,
// because an address isn't in it: memory can be plugged in.
const ramEvery = time.Second

// checkRAM makes sure that n bytes at addr, all in one frame, are memory.
func (v *VM) checkRAM(addr uint64, n int) error {
	if v.ram.contains(addr, n) {
		return nil
	}
	if now := time.Now(); now.Sub(v.ramAt) >= ramEvery {
		v.ramAt = now
		tree, err := v.hmp("info mtree -f")
		if err != nil {
			return err
		}
		if ram := parseRAM(tree); len(ram) > 0 {
			v.ram = ram
		}
	}
	if v.ram.contains(addr, n) {
		return nil
	}
	return fmt.Errorf("physical address %#x: %w", addr, ErrNotRAM)
}

func (v *VM) writePhys(addr uint64, b []byte) error {
	if err := v.checkRAM(addr, len(b)); err != nil {
		return err
	}
	if err := v.physical(1); err != nil {
		return err
	}
	for len(b) > 0 {
		n := min(len(b), v.mread/2)
		p := fmt.Appendf(nil, "M%x,%x:", addr, n)
		if err := v.callOK(string(appendHex(p, b[:n]))); err != nil {
			return err
		}
		addr, b = addr+uint64(n), b[n:]
	}
	return nil
}

// readVirt reads memory as the thread sees it.
func (v *VM) readVirt(thread string, addr uint64, b []byte) error {
	if err := v.physical(0); err != nil {
		return err
	}
	if err := v.choose(thread); err != nil {
		return err
	}
	return v.readMem(addr, b)
}

// readMem reads with "m" packets, which are sent together: the stub answers them
// in turn.
func (v *VM) readMem(addr uint64, b []byte) error {
	const together = 8
	for len(b) > 0 {
		var packets []string
		var parts [][]byte
		for len(b) > 0 && len(packets) < together {
			n := min(len(b), v.mread)
			packets = append(packets, fmt.Sprintf("m%x,%x", addr, n))
			parts = append(parts, b[:n])
			addr, b = addr+uint64(n), b[n:]
		}
		if err := v.post(packets...); err != nil {
			return err
		}
		var errs error
		for i, part := range parts {
			data, err := v.receive()
			if err != nil {
				return err
			}
			if errs == nil {
				errs = memory(part, packets[i], data)
			}
		}
		if errs != nil {
			return errs
		}
	}
	return nil
}

// memory takes the answer to an "m" packet.
func memory(b []byte, packet string, data []byte) error {
	if len(data) == 0 || data[0] == 'E' && len(data) == 3 {
		return fmt.Errorf("%w: %w", breakpoint.ErrNotMapped, &refused{packet, string(data)})
	}
	return decodeHex(b, data)
}

// A CPU is the state of a vCPU that tells where its kernel is.
type CPU struct {
	CR0, CR2, CR3, CR4, EFER uint64
	// IP and CPL are where the vCPU is: CPL 3 is user mode.
	IP  uint64
	CPL int
	// GSBase is the base in use, KernelGSBase the one that SWAPGS exchanges it for.
	GSBase, KernelGSBase uint64
	// IDT is the address of the interrupt descriptor table, 0 if QEMU didn't tell.
	IDT uint64
}

// CPUs returns the state of all vCPUs, in order, taken while the VM was stopped.
func (v *VM) CPUs() (cpus []CPU, err error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	err = v.held(func() error {
		cpus, err = v.cpus()
		return err
	})
	return cpus, err
}

func (v *VM) cpus() ([]CPU, error) {
	current := v.current
	cpus := make([]CPU, 0, len(v.threads))
	for _, t := range v.threads {
		if err := v.choose(t); err != nil {
			return nil, err
		}
		data, err := v.call("g")
		if err != nil {
			return nil, err
		}
		var f regFile
		if err := v.layout.parse(&f, data); err != nil {
			return nil, v.broken(err)
		}
		cpus = append(cpus, CPU{
			CR0: f[rCR0], CR2: f[rCR2], CR3: f[rCR3], CR4: f[rCR4], EFER: f[rEFER],
			IP: f[rIP], CPL: int(f[rCS] & 3), GSBase: f[rGSBase], KernelGSBase: f[rKernelGSBase],
		})
	}
	text, err := v.hmp("info registers -a")
	if err != nil {
		return nil, err
	}
	parseIDT(text, cpus)
	if current != "" {
		return cpus, v.choose(current)
	}
	return cpus, nil
}

// parseIDT takes the bases of the interrupt descriptor tables from the output of
// "info registers -a": lines "CPU#n" and "IDT=     base limit".
func parseIDT(text string, cpus []CPU) {
	n := -1
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if s, ok := strings.CutPrefix(line, "CPU#"); ok {
			if n, ok = decimal(s); !ok {
				n = -1
			}
			continue
		}
		s, ok := strings.CutPrefix(line, "IDT=")
		if !ok || n < 0 || n >= len(cpus) {
			continue
		}
		if f := strings.Fields(s); len(f) == 2 {
			if base, err := strconv.ParseUint(f[0], 16, 64); err == nil {
				cpus[n].IDT = base
			}
		}
	}
}

// ramMap is where a guest's memory is, in order of addresses.
type ramMap []ramRange

// A ramRange is a piece of guest-physical addresses that is memory.
type ramRange struct {
	start, end uint64 // the first address, and the last
	region     string // the memory region that is there
	offset     uint64 // of start in it
	rom        bool
}

// maxRanges bounds the pieces of a map.
const maxRanges = 4096

// parseRAM reads the output of "info mtree -f", in the flat view of the address
// space "memory". Its lines look like
//
//	0000000000100000-00000000bfffffff (prio 0, ram): pc.ram @0000000000100000
func parseRAM(text string) ramMap {
	var m ramMap
	inside := false
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		switch {
		case strings.HasPrefix(line, "FlatView"):
			if inside && len(m) > 0 {
				return m
			}
			inside = false
		case strings.HasPrefix(line, "AS \"memory\","):
			inside = true
		case inside:
			if r, ok := parseRange(line); ok && len(m) < maxRanges && (len(m) == 0 || m[len(m)-1].end < r.start) {
				m = append(m, r)
			}
		}
	}
	return m
}

func parseRange(line string) (r ramRange, ok bool) {
	addrs, rest, ok1 := strings.Cut(line, " (prio ")
	first, last, ok2 := strings.Cut(addrs, "-")
	_, rest, ok3 := strings.Cut(rest, ", ")
	kind, name, ok4 := strings.Cut(rest, "): ")
	if !ok1 || !ok2 || !ok3 || !ok4 {
		return r, false
	}
	switch kind {
	case "ram":
	case "rom", "romd":
		r.rom = true
	default:
		return r, false
	}
	var err error
	if r.start, err = strconv.ParseUint(first, 16, 64); err != nil {
		return r, false
	}
	if r.end, err = strconv.ParseUint(last, 16, 64); err != nil || r.end < r.start {
		return r, false
	}
	name = strings.TrimSuffix(name, " KVM")
	if at := strings.LastIndex(name, " @"); at >= 0 {
		if r.offset, err = strconv.ParseUint(name[at+2:], 16, 64); err != nil {
			return r, false
		}
		name = name[:at]
	}
	r.region = name
	return r, true
}

// find returns the range that addr is in.
func (m ramMap) find(addr uint64) (ramRange, bool) {
	for _, r := range m {
		if addr >= r.start && addr <= r.end {
			return r, true
		}
	}
	return ramRange{}, false
}

// contains reports whether n bytes at addr, all in one frame, are memory. If the
// map isn't known everything is.
func (m ramMap) contains(addr uint64, n int) bool {
	if len(m) == 0 || n == 0 {
		return true
	}
	r, ok := m.find(addr)
	return ok && r.end-addr >= uint64(n)-1
}

// main returns the region that most of the memory is in.
func (m ramMap) main() string {
	sizes := map[string]uint64{}
	best := ""
	for _, r := range m {
		if r.rom {
			continue
		}
		sizes[r.region] += r.end - r.start + 1
		if sizes[r.region] > sizes[best] {
			best = r.region
		}
	}
	return best
}

// of returns the ranges of a region.
func (m ramMap) of(region string) (out ramMap) {
	for _, r := range m {
		if r.region == region {
			out = append(out, r)
		}
	}
	return out
}

// size is how much memory there is in the main region.
func (m ramMap) size() (n uint64) {
	for _, r := range m.of(m.main()) {
		if !r.rom {
			n += r.end - r.start + 1
		}
	}
	return n
}

// locate returns the range and the offset in its region of a whole frame.
func (m ramMap) locate(f paging.Frame) (r ramRange, offset uint64, ok bool) {
	addr := uint64(f) << 12
	r, ok = m.find(addr)
	if !ok || r.end-addr < paging.PageSize-1 {
		return r, 0, false
	}
	return r, r.offset + addr - r.start, true
}
