package xentest

import (
	"encoding/binary"
	"math/rand/v2"
	"syscall"
)

const (
	pageSize  = 4096
	pageMask  = pageSize - 1
	largeSize = 2 << 20
)

// The guest's address space.
const (
	// TextBase is the first address of the guest kernel's text.
	TextBase = 0xffffffff81000000
	// DataBase is the first address of its data.
	DataBase = 0xffffffff82000000
	// StackBase is the lowest address of the stacks: vCPU i has two pages at
	// StackBase + i*StackStride, and nothing is mapped around them.
	StackBase   = 0xffffc90000000000
	StackStride = 0x8000
	// DirectBase is where all of the guest's memory is mapped.
	DirectBase = 0xffff888000000000

	textSize   = 64 << 10
	stackSize  = 2 * pageSize
	percpuBase = DataBase + 0x10000 // one page for each vCPU
	frameBase  = 0x10000            // lowest machine frame of a PV guest
	largeFrame = largeSize / pageSize
)

// Page-table bits.
const (
	pteP  = 1 << 0
	pteRW = 1 << 1
	pteUS = 1 << 2
	pteA  = 1 << 5
	pteD  = 1 << 6
	ptePS = 1 << 7
	pteNX = 1 << 63
)

// memory is the guest's physical memory: an anonymous file, so that mappings of
// single frames alias it as foreign mappings do. The race detector does not
// watch it, as is right: guest memory is shared with the tool without locks.
type memory struct {
	ram    *ram
	b      []byte
	pv     bool
	frames int
	perm   []int    // PV: pseudo-physical frame → index of the machine frame
	isPT   []bool   // by frame index: a page table
	next   int      // next free pseudo-physical frame
	root   int      // pseudo-physical frame of the first page-table root
	text   []uint64 // offsets in b of the text's pages
	data   []uint64
	percpu []uint64
	stack  [][2]uint64
	tasks  []uint64 // stacks of tasks, see Config.Returns
}

func newMemory(pv bool, frames int, rng *rand.Rand) *memory {
	r := newRAM(frames * pageSize)
	mem := &memory{ram: r, b: r.b, pv: pv, frames: frames, isPT: make([]bool, frames), next: 1}
	if pv {
		mem.perm = rng.Perm(frames)
	}
	return mem
}

func (mem *memory) free() {
	mem.ram.free()
}

// index is the position of a pseudo-physical frame in the memory.
func (mem *memory) index(pfn int) int {
	if mem.pv {
		return mem.perm[pfn]
	}
	return pfn
}

// frame is the number by which the hypervisor's interface knows it.
func (mem *memory) frame(pfn int) uint64 {
	if mem.pv {
		return frameBase + uint64(mem.perm[pfn])
	}
	return uint64(pfn)
}

// frameIndex is the reverse of frame, down to the position in memory.
func (mem *memory) frameIndex(frame uint64) (int, bool) {
	if mem.pv {
		frame -= frameBase
	}
	return int(frame), frame < uint64(mem.frames)
}

func (mem *memory) alloc() int {
	if mem.next >= mem.frames || !mem.pv && mem.next == largeFrame {
		panic("xentest: Config.PhysPages is too small")
	}
	mem.next++
	return mem.next - 1
}

func (mem *memory) offset(pfn int) uint64 { return uint64(mem.index(pfn)) * pageSize }

func (mem *memory) get64(off uint64) uint64    { return binary.LittleEndian.Uint64(mem.b[off:]) }
func (mem *memory) put64(off uint64, v uint64) { binary.LittleEndian.PutUint64(mem.b[off:], v) }

// user is the U/S bit of kernel mappings: a PV kernel runs in ring 3.
func (mem *memory) user() uint64 {
	if mem.pv {
		return pteUS
	}
	return 0
}

func (mem *memory) table() int {
	pfn := mem.alloc()
	mem.isPT[mem.index(pfn)] = true
	return pfn
}

// entry returns the offset of va's entry at the given level (4 to 1), making
// the tables above it.
func (mem *memory) entry(root int, va uint64, level int) uint64 {
	t := mem.offset(root)
	for l := 4; ; l-- {
		off := t + (va>>(12+9*(l-1)))&511*8
		if l == level {
			return off
		}
		e := mem.get64(off)
		if e&pteP == 0 {
			e = mem.frame(mem.table())<<12 | pteP | pteRW | pteA | mem.user()
			mem.put64(off, e)
		}
		i, _ := mem.frameIndex(e >> 12 & (1<<40 - 1))
		t = uint64(i) * pageSize
	}
}

func (mem *memory) mapPage(va uint64, pfn int, bits uint64) {
	mem.put64(mem.entry(mem.root, va, 1), mem.frame(pfn)<<12|bits|mem.user()|pteP)
}

// layout builds the page tables, and one root for each vCPU. tasks is how many tasks have
// a stack of their own.
func (mem *memory) layout(vcpus, tasks int) (roots []int) {
	mem.root = mem.table()
	textPFN := mem.next
	if !mem.pv {
		textPFN = largeFrame
		mem.put64(mem.entry(mem.root, TextBase, 2), uint64(textPFN)<<12|pteP|pteA|ptePS)
	}
	for i := range textSize / pageSize {
		pfn := textPFN + i
		if mem.pv {
			pfn = mem.alloc()
			mem.mapPage(TextBase+uint64(i)*pageSize, pfn, pteA)
		}
		mem.text = append(mem.text, mem.offset(pfn))
	}
	const rw = pteRW | pteA | pteD | pteNX
	one := func(va uint64) uint64 {
		pfn := mem.alloc()
		mem.mapPage(va, pfn, rw)
		return mem.offset(pfn)
	}
	for i := range uint64(4) {
		mem.data = append(mem.data, one(DataBase+i*pageSize))
	}
	for i := range uint64(vcpus) {
		mem.percpu = append(mem.percpu, one(percpuBase+i*pageSize))
		va := StackBase + i*StackStride
		mem.stack = append(mem.stack, [2]uint64{one(va), one(va + pageSize)})
	}
	for i := range uint64(tasks) {
		mem.tasks = append(mem.tasks, one(taskStacks+i*taskStride))
	}
	if mem.pv {
		for pfn := range mem.frames {
			va := DirectBase + uint64(pfn)*pageSize
			mem.put64(mem.entry(mem.root, va, 1), 0)
			mem.mapPage(va, pfn, rw)
		}
		ro := func(pfn int) {
			off := mem.entry(mem.root, DirectBase+uint64(pfn)*pageSize, 1)
			mem.put64(off, mem.get64(off)&^(pteRW|pteD))
		}
		roots = mem.copyRoots(vcpus)
		for pfn := range mem.frames {
			if mem.isPT[mem.index(pfn)] {
				ro(pfn)
			}
		}
		return roots
	}
	for i := range uint64(mem.frames / largeFrame) {
		va := DirectBase + i*largeSize
		mem.put64(mem.entry(mem.root, va, 2), i*largeSize|rw|pteP|ptePS)
	}
	return mem.copyRoots(vcpus)
}

// copyRoots makes the vCPUs' own page-table roots, which share all below.
func (mem *memory) copyRoots(vcpus int) (roots []int) {
	for range vcpus {
		r := mem.table()
		o, n := mem.offset(mem.root), mem.offset(r)
		copy(mem.b[n:n+pageSize], mem.b[o:o+pageSize])
		roots = append(roots, r)
	}
	return roots
}

// translate finds the offset of va in the memory without looking at the page
// tables; n is how many bytes follow on the page.
func (mem *memory) translate(va uint64, write bool) (off uint64, n int, ok bool) {
	page, in := -1, va&pageMask
	var t []uint64
	switch {
	case va-DataBase < uint64(len(mem.data))*pageSize:
		t, page = mem.data, int((va-DataBase)/pageSize)
	case va-percpuBase < uint64(len(mem.percpu))*pageSize:
		t, page = mem.percpu, int((va-percpuBase)/pageSize)
	case va-StackBase < uint64(len(mem.stack))*StackStride:
		s, o := (va-StackBase)/StackStride, (va-StackBase)%StackStride
		if o >= stackSize {
			return 0, 0, false
		}
		return mem.stack[s][o/pageSize] + in, int(pageSize - in), true
	case va-TextBase < textSize && !write:
		t, page = mem.text, int((va-TextBase)/pageSize)
	case va-DirectBase < uint64(mem.frames)*pageSize:
		i := mem.index(int((va - DirectBase) / pageSize))
		if write && mem.pv && mem.isPT[i] {
			return 0, 0, false
		}
		return uint64(i)*pageSize + in, int(pageSize - in), true
	case va-taskStacks < uint64(len(mem.tasks))*taskStride && va%taskStride < pageSize:
		t, page = mem.tasks, int((va-taskStacks)/taskStride)
	default:
		return 0, 0, false
	}
	return t[page] + in, int(pageSize - in), true
}

// walk translates va by the page tables below root.
func (mem *memory) walk(root int, va uint64) (off uint64, ok bool) {
	t := mem.offset(root)
	for l := 4; l > 0; l-- {
		e := mem.get64(t + (va>>(12+9*(l-1)))&511*8)
		if e&pteP == 0 {
			return 0, false
		}
		i, ok := mem.frameIndex(e >> 12 & (1<<40 - 1))
		if !ok {
			return 0, false
		}
		t = uint64(i) * pageSize
		if l == 2 && e&ptePS != 0 {
			return t + va&(largeSize-1), true
		}
	}
	return t + va&pageMask, true
}

// access copies between b and guest memory.
func (mem *memory) access(va uint64, b []byte, write, force bool) bool {
	for len(b) > 0 {
		off, n, ok := mem.translate(va, write && !force)
		if !ok {
			return false
		}
		n = min(n, len(b))
		if write {
			copy(mem.b[off:off+uint64(n)], b[:n])
		} else {
			copy(b[:n], mem.b[off:off+uint64(n)])
		}
		b, va = b[n:], va+uint64(n)
	}
	return true
}

// A mapping is some frames, one after the other, in one range of addresses.
type mapping struct {
	m *Machine
	b []byte
}

func (m *Machine) newMapping(writable bool, idx []int) (*mapping, error) {
	b, err := m.mem.ram.mapPages(writable, idx)
	if err != nil {
		return nil, err
	}
	m.mappings++
	return &mapping{m, b}, nil
}

func (p *mapping) Bytes() []byte { return p.b }

func (p *mapping) Unmap() error {
	p.m.lock()
	defer p.m.mu.Unlock()
	if p.b == nil {
		return syscall.EINVAL
	}
	err := unmapPages(p.b)
	p.b = nil
	p.m.mappings--
	return err
}
