package qemu

import (
	"bytes"
	"encoding/binary"
	"strconv"
	"strings"
	"time"

	"github.com/vmprobes/vmprobes/internal/x86"
	"github.com/vmprobes/vmprobes/paging"
)

// A step of a repeated string instruction ends after one iteration. Stepping through
// 40,000 of them takes 13 seconds, with the VM stopped; letting the vCPU run to the
// next instruction, with the breakpoint out, misses what an interrupt handler hits
// meanwhile. So steps are made where the processor decides something: the first
// iteration in each page of source and destination, which meets faults, permissions
// and accessed bits, the last one, which leaves flags and accumulator, and the one
// that ends a comparison. The iterations between them touch nothing but this VM's
// memory, and are done here, through the stub, which tells QEMU's translator and its
// log of dirty pages about it.

// slice is for how long a repeated instruction may keep the VM stopped at a time.
// Then the VM runs: the vCPU takes what interrupts are due, and comes back.
var slice = 25 * time.Millisecond

// minSkip is how many iterations at least are worth doing here.
const minSkip = 16

// repeat has d.thread execute the repeated instruction at addr, all other vCPUs
// standing still, for no longer than a slice. It reports whether the vCPU has
// left addr; v.regs are its registers in either case.
func (d *Driver) repeat(addr uint64, p *point) (done bool, err error) {
	v := d.vm
	op, bulk := p.insn.StringOp()
	bulk = bulk && v.phys && v.regs[rCS]&3 == 0
	var mem *paging.Memory
	for end := time.Now().Add(slice); ; {
		before := v.regs
		if err := v.step(d.thread, addr); err != nil {
			return false, err
		}
		if err := v.readRegs(d.thread); err != nil {
			return false, err
		}
		if v.regs[rIP] != addr {
			return true, nil
		}
		if bulk && v.regs[rCX] > minSkip {
			if mem == nil {
				mem = paging.New(&tables{vm: v}, d.mem.Load().Mode())
				if bulk, err = v.unwatched(); err != nil {
					return false, err
				}
			}
			if bulk {
				if err := d.skip(op, &before, mem); err != nil {
					return false, err
				}
			}
		}
		if !time.Now().Before(end) {
			return false, nil
		}
	}
}

// unwatched reports whether the guest has no watchpoint armed, which an access from
// here wouldn't trigger: the enable bits of DR7 (SDM 3B §18.2.4) in "info
// registers".
func (v *VM) unwatched() (bool, error) {
	text, err := v.hmp("info registers -a")
	if err != nil {
		return false, err
	}
	return noWatchpoints(text), nil
}

func noWatchpoints(text string) bool {
	found := false
	for f := range strings.FieldsSeq(text) {
		s, ok := strings.CutPrefix(f, "DR7=")
		if !ok {
			continue
		}
		dr7, err := strconv.ParseUint(s, 16, 64)
		if err != nil || dr7&0xff != 0 {
			return false
		}
		found = true
	}
	return found
}

// An operand is where the elements of iterations lie that are all in one page.
type operand struct {
	frame paging.Frame
	off   int // of the first element in the frame
}

// addr is the physical address of the lowest of n elements.
func (o operand) addr(n, size int, down bool) uint64 {
	a := uint64(o.frame)<<12 + uint64(o.off)
	if down {
		a -= uint64((n - 1) * size)
	}
	return a
}

// room returns how many elements, from the one at addr on, lie in the page that
// holds all of the one before it, at prev.
func room(prev, addr uint64, size int, down bool) uint64 {
	off := addr & (paging.PageSize - 1)
	switch {
	case prev/paging.PageSize != addr/paging.PageSize:
		return 0
	case !down:
		return (paging.PageSize - off) / uint64(size)
	case prev&(paging.PageSize-1)+uint64(size) > paging.PageSize:
		return 0
	}
	return off/uint64(size) + 1
}

// skip does iterations of the instruction that d.thread is at, if it has just
// executed one; before are its registers before that one.
func (d *Driver) skip(op x86.StringOp, before *regFile, mem *paging.Memory) error {
	v := d.vm
	down := v.regs[rFlags]&x86.FlagDF != 0
	delta := uint64(op.Size)
	if down {
		delta = -delta
	}
	if v.regs[rCX] != before[rCX]-1 {
		return nil // that step was not made
	}
	count := min(v.regs[rCX], paging.PageSize) - 1
	at := func(reg int, base uint64, write bool) (o operand, ok bool) {
		addr := base + v.regs[reg]
		n := room(base+before[reg], addr, op.Size, down)
		if v.regs[reg] != before[reg]+delta || n <= minSkip {
			return o, false
		}
		count = min(count, n-1)
		t, err := mem.Translate(paging.Root(v.regs[rCR3]), paging.VAddr(addr))
		if err != nil {
			return o, false
		}
		r, _, ok := v.ram.locate(t.Frame)
		return operand{t.Frame, int(t.Offset)}, ok && (!write || !r.rom)
	}
	var src, dst operand
	ok := true
	if op.Kind.Source() {
		base := uint64(0)
		switch op.Segment {
		case 0x64:
			base = v.regs[rFSBase]
		case 0x65:
			base = v.regs[rGSBase]
		}
		src, ok = at(rSI, base, false)
	}
	if ok && op.Kind.Dest() {
		dst, ok = at(rDI, 0, op.Kind == x86.Movs || op.Kind == x86.Stos)
	}
	if v.err != nil || !ok {
		return v.err
	}
	n, err := v.iterate(op, src, dst, int(count), down, v.regs[rAX])
	if err != nil || n < minSkip {
		return err
	}
	want := v.regs.general()
	want.CX -= uint64(n)
	if op.Kind.Source() {
		want.SI += uint64(n) * delta
	}
	if op.Kind.Dest() {
		want.DI += uint64(n) * delta
	}
	return v.writeRegs(d.thread, &want)
}

// iterate does at most n iterations in memory and returns how many it did: fewer
// if a comparison ends the instruction earlier, whose last iteration is left to
// the vCPU, or minSkip is not reached. Doing the same again with the same registers
// changes nothing: this process may be killed before it sets the registers.
func (v *VM) iterate(op x86.StringOp, src, dst operand, n int, down bool, ax uint64) (int, error) {
	size := op.Size
	distance := 0 // from where it reads up, or down, to where it writes
	if op.Kind == x86.Movs && src.frame == dst.frame {
		if distance = dst.off - src.off; down {
			distance = -distance
		}
		// An element that is overwritten after it was read can't be read again, and
		// elements that overlap in part are not worth the trouble.
		if distance < 0 || distance%size != 0 {
			n = min(n, max(distance, -distance)/size)
		}
	}
	if n < minSkip || op.Kind == x86.Lods {
		return n, nil // the vCPU loads the last element itself
	}
	var acc [8]byte
	binary.LittleEndian.PutUint64(acc[:], ax)
	a, b := make([]byte, n*size), make([]byte, n*size)
	if op.Kind.Source() {
		if err := v.readRAM(src.addr(n, size, down), a); err != nil {
			return 0, err
		}
	}
	if op.Kind == x86.Cmps || op.Kind == x86.Scas {
		if err := v.readRAM(dst.addr(n, size, down), b); err != nil {
			return 0, err
		}
	}
	// element returns the i-th in the order of execution.
	element := func(b []byte, i int) []byte {
		if down {
			i = n - 1 - i
		}
		return b[i*size:][:size]
	}
	switch op.Kind {
	case x86.Stos:
		for i := range n {
			copy(b[i*size:], acc[:size])
		}
	case x86.Movs:
		for i := range n {
			from := element(a, i)
			if back := distance / size; distance > 0 && i >= back {
				from = element(b, i-back) // what it has written itself
			}
			copy(element(b, i), from)
		}
	default:
		for i := range n {
			x := acc[:size]
			if op.Kind == x86.Cmps {
				x = element(a, i)
			}
			if bytes.Equal(x, element(b, i)) != op.Equal {
				return i, nil
			}
		}
		return n, nil
	}
	delete(v.pages, dst.frame)
	return n, v.writePhys(dst.addr(n, size, down), b)
}

// readRAM reads physical memory, all in one frame, of the stopped VM.
func (v *VM) readRAM(addr uint64, b []byte) error {
	f := paging.Frame(addr >> 12)
	if !v.reaches(f) {
		return v.readPhys(addr, b)
	}
	page, release, err := v.direct.page(f, false)
	if err != nil {
		return err
	}
	defer release()
	copy(b, page[addr&(paging.PageSize-1):])
	return nil
}

// tables reads the page tables of a stopped VM for a caller who holds v.mu. It keeps
// what it has read, as a processor's TLB may.
type tables struct {
	vm    *VM
	pages map[paging.Frame][]byte
}

// held is the memory of a stopped VM for a caller who holds v.mu.
type held struct{ vm *VM }

// Page implements [paging.Frames].
func (h held) Page(f paging.Frame, writable bool) ([]byte, func(), error) {
	if h.vm.reaches(f) {
		return h.vm.direct.page(f, writable)
	}
	page := make([]byte, paging.PageSize)
	return page, func() {}, h.vm.readPhys(uint64(f)<<12, page)
}

// Page implements [paging.Frames].
func (t *tables) Page(f paging.Frame, writable bool) ([]byte, func(), error) {
	if t.vm.reaches(f) {
		return t.vm.direct.page(f, writable)
	}
	page := t.pages[f]
	if page == nil {
		page = make([]byte, paging.PageSize)
		if err := t.vm.readPhys(uint64(f)<<12, page); err != nil {
			return nil, nil, err
		}
		if t.pages == nil || len(t.pages) >= maxPages {
			t.pages = make(map[paging.Frame][]byte)
		}
		t.pages[f] = page
	}
	return page, func() {}, nil
}
