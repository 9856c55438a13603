package image

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// VMware's state of a suspended VM (.vmss) or of a snapshot (.vmsn), as known from the
// programs that read it (crash, Volatility). The memory is in it, or in a file beside it
// whose name ends in .vmem.
//
//	 0  u32 magic, u32 version, u32 number of groups
//	12  groups: char name[64], u64 offset, u64 size
//
// A group is tags, up to one that is 0:
//
//	u16  name's length << 8 | number of indices << 6 | size of the value
//	the name, u32 indices, the value
//
// A size of 63, or 62 if it is compressed, stands for a block: u64 size in the file, u64
// size in memory, u16 padding, the padding, and the block.
const (
	vmwareHead  = 12
	vmwareGroup = 80

	vmwareBlock      = 63
	vmwareCompressed = 62

	vmwareOld = 0xbed0bed0 // a magic: with fields of other sizes

	maxVMwareGroups  = 1 << 10
	maxVMwareTags    = 1 << 18
	maxVMwareRegions = 1 << 10
)

const vmwareCure = "a state of VMware (.vmss, .vmsn) without its memory: put the .vmem of the same name beside it"

var vmwareMagics = []uint32{vmwareOld, 0xbed2bed0, 0xbed2bed2, 0xbed3bed3, 0xbad1bad1, 0xbad2bad2}

// vmwareHole is where RAM beyond 3 GiB goes on, at 4 GiB.
var vmwareHole = HoleAt(3 << 30)

func isVMware(head []byte) bool {
	return len(head) >= 4 && slices.Contains(vmwareMagics, le.Uint32(head))
}

// A vmwareState is what matters of a state.
type vmwareState struct {
	regions map[uint32]*vmwareRegion
	count   uint64
	memory  extent // of the file; .addr means nothing, and .size is 0 if it isn't in it
	packed  bool
	cpus    map[uint32]*CPU
}

// A vmwareRegion is a run of pages: where it is in the guest, and in the memory's file.
type vmwareRegion struct{ frame, page, pages uint64 }

// vmware lays out a state. mem is the file with its memory, or nil if there is none.
func (m *Image) vmware(mem *Image) error {
	m.format = "VMware"
	m.kind = HVM
	s, err := m.vmwareState()
	if err != nil {
		return err
	}
	base := uint64(0)
	size := uint64(0)
	switch {
	case s.packed:
		return fmt.Errorf("%w: a state of VMware with compressed memory: suspend the VM or take the snapshot with mainMem.useNamedFile = TRUE, so that its memory is in a .vmem", ErrUnsupported)
	case s.memory.size > 0:
		base, size = s.memory.off, s.memory.size
	case mem != nil:
		m.r, m.length, size = mem.r, mem.length, mem.length
	default:
		return fmt.Errorf("%w: it is %s", ErrUnsupported, vmwareCure)
	}
	var data []extent
	for _, r := range s.regions {
		if r.pages == 0 {
			continue
		}
		data = append(data, extent{addr: r.frame << pageShift, off: base + r.page<<pageShift, size: r.pages << pageShift})
	}
	if len(data) == 0 {
		if size > vmwareHole.Limit {
			data = []extent{
				{addr: 0, off: base, size: vmwareHole.Start},
				{addr: 4 << 30, off: base + vmwareHole.Start, size: size - vmwareHole.Start},
			}
		} else {
			data = []extent{{addr: 0, off: base, size: size}}
		}
	}
	for i, c := range s.cpuList() {
		c.ID = i
		m.cpus = append(m.cpus, c)
	}
	return m.layOut(data, nil)
}

// vmwareState reads the groups that matter.
func (m *Image) vmwareState() (*vmwareState, error) {
	var h [vmwareHead]byte
	if err := m.within("VMware's header", 0, vmwareHead); err != nil {
		return nil, err
	}
	if err := m.readAt(h[:], 0); err != nil {
		return nil, err
	}
	if le.Uint32(h[:]) == vmwareOld {
		return nil, fmt.Errorf("%w: a state of an old VMware, whose form is not known", ErrUnsupported)
	}
	n := uint64(le.Uint32(h[8:]))
	if n == 0 {
		return nil, fmt.Errorf("%w: it is %s", ErrUnsupported, vmwareCure)
	}
	if n > maxVMwareGroups {
		return nil, formatErr("%d groups of VMware's: more than %d", n, maxVMwareGroups)
	}
	if err := m.within("VMware's groups", vmwareHead, n*vmwareGroup); err != nil {
		return nil, err
	}
	b := make([]byte, n*vmwareGroup)
	if err := m.readAt(b, vmwareHead); err != nil {
		return nil, err
	}
	s := &vmwareState{regions: make(map[uint32]*vmwareRegion), cpus: make(map[uint32]*CPU)}
	tags := 0
	for ; len(b) > 0; b = b[vmwareGroup:] {
		name, _, _ := strings.Cut(string(b[:64]), "\x00")
		if name != "memory" && name != "cpu" {
			continue
		}
		t := vmwareTags{m: m, off: le.Uint64(b[64:])}
		for t.next() {
			if tags++; tags > maxVMwareTags {
				return nil, formatErr("more than %d tags of VMware's", maxVMwareTags)
			}
			if name == "memory" {
				s.memoryTag(&t)
			} else {
				s.cpuTag(&t)
			}
		}
		if t.err != nil {
			return nil, fmt.Errorf("group %q of VMware's: %w", name, t.err)
		}
	}
	if s.count > maxVMwareRegions || uint64(len(s.regions)) > maxVMwareRegions {
		return nil, formatErr("%d regions of VMware's memory", max(s.count, uint64(len(s.regions))))
	}
	for i, r := range s.regions {
		if uint64(i) >= s.count {
			delete(s.regions, i)
		} else if r.frame > maxFrame || r.page > maxFrame || r.pages > maxFrame {
			return nil, formatErr("region %d of VMware's memory: %d pages at frame %#x", i, r.pages, r.frame)
		}
	}
	return s, nil
}

// vmwareTags reads the tags of a group.
type vmwareTags struct {
	m   *Image
	off uint64 // of the next
	err error

	name   string
	index  [3]uint32
	value  [64]byte // of a block: its first bytes
	size   uint64   // of the value
	at     uint64   // where it is
	block  bool
	packed bool
}

// next reads a tag, or reports that there is none.
func (t *vmwareTags) next() bool {
	var b [2 + 255 + 3*4 + 18 + 63]byte
	n := min(uint64(len(b)), t.m.length-min(t.off, t.m.length))
	if n < 2 {
		t.err = fmt.Errorf("%w: in its tags", ErrTruncated)
		return false
	}
	if t.err = t.m.readAt(b[:n], t.off); t.err != nil {
		return false
	}
	tag := le.Uint16(b[:])
	if tag == 0 {
		return false
	}
	name, indices := uint64(tag>>8), uint64(tag>>6&3)
	p := 2 + name + 4*indices
	t.name, t.size = string(b[2:2+name]), uint64(tag&63)
	t.index = [3]uint32{}
	for i := range indices {
		t.index[i] = le.Uint32(b[2+name+4*i:])
	}
	t.block, t.packed = t.size >= vmwareCompressed, t.size == vmwareCompressed
	if t.block {
		t.size = le.Uint64(b[p:])
		p += 18 + uint64(le.Uint16(b[p+16:]))
	}
	t.at = t.off + p
	if p > n || t.size > maxPhys {
		t.err = formatErr("tag %q at %#x: %#x bytes", t.name, t.off, t.size)
		return false
	}
	clear(t.value[:])
	copy(t.value[:], b[p:min(n, p+t.size)])
	t.off = t.at + t.size
	return true
}

func (s *vmwareState) memoryTag(t *vmwareTags) {
	region := func() *vmwareRegion {
		r := s.regions[t.index[0]]
		if r == nil {
			r = new(vmwareRegion)
			if len(s.regions) <= maxVMwareRegions {
				s.regions[t.index[0]] = r
			}
		}
		return r
	}
	v := uint64(le.Uint32(t.value[:]))
	switch t.name {
	case "regionsCount":
		s.count = v
	case "regionPPN":
		region().frame = v
	case "regionPageNum":
		region().page = v
	case "regionSize":
		region().pages = v
	case "Memory":
		if t.block && t.size > 0 {
			s.memory, s.packed = extent{off: t.at, size: t.size}, t.packed
		}
	}
}

func (s *vmwareState) cpuTag(t *vmwareTags) {
	if t.index[0] >= maxCPUs {
		return
	}
	c := s.cpus[t.index[0]]
	if c == nil {
		c = new(CPU)
		s.cpus[t.index[0]] = c
	}
	v := le.Uint64(t.value[:])
	cr := func(n uint32, v uint64) {
		switch n {
		case 0:
			c.CR0, c.Has = v, c.Has|CR0
		case 2:
			c.CR2, c.Has = v, c.Has|CR2
		case 3:
			c.CR3, c.Has = v, c.Has|CR3
		case 4:
			c.CR4, c.Has = v, c.Has|CR4
		}
	}
	switch t.name {
	case "CR64":
		if !t.block {
			cr(t.index[1], v)
			break
		}
		for i := uint32(0); i < 5 && uint64(8*i+8) <= t.size; i++ {
			cr(i, le.Uint64(t.value[8*i:]))
		}
	case "rip":
		c.RIP, c.Has = v, c.Has|RIP
	case "rsp":
		c.RSP, c.Has = v, c.Has|RSP
	case "EFLAGS", "eflags":
		c.RFLAGS, c.Has = uint64(uint32(v)), c.Has|RFLAGS
	case "IDTR":
		switch {
		case t.block && t.size >= 10:
			c.IDTBase, c.Has = le.Uint64(t.value[2:]), c.Has|IDTBase
		case !t.block && t.index[1] == 1:
			c.IDTBase = c.IDTBase&^0xffffffff | uint64(uint32(v))
		case !t.block && t.index[1] == 2:
			c.IDTBase, c.Has = c.IDTBase&0xffffffff|v<<32, c.Has|IDTBase
		}
	}
}

// cpuList returns the CPUs that have page tables, in order.
func (s *vmwareState) cpuList() []CPU {
	var ids []uint32
	for id := range s.cpus {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	var list []CPU
	for _, id := range ids {
		c := s.cpus[id]
		if tables := CR0 | CR3 | CR4; c.Has&tables != tables {
			continue
		}
		if c.Has&IDTBase == 0 {
			c.IDTBase = 0
		}
		// Nothing says whether it is in a 64-bit mode. A 64-bit program has its stack
		// above 4 GiB, and so has the kernel.
		c.deduce(c.RIP>>32 != 0 || c.RSP>>32 != 0)
		list = append(list, *c)
	}
	return list
}

// beside opens the file with the other part of what VMware has saved: for a state its
// memory, for memory its state. f is nil if there is none.
func beside(path string, exts ...string) (f *os.File, size int64, err error) {
	old := filepath.Ext(path)
	for _, ext := range exts {
		f, size, err = openFile(strings.TrimSuffix(path, old) + ext)
		if !errors.Is(err, fs.ErrNotExist) {
			return f, size, err
		}
	}
	return nil, 0, nil
}

// openVMware lays out what the two files have that VMware saves. m is of the one that the
// user has named; ok is false if it is none of them.
func (m *Image) openVMware(path string, opts *Options) (ok bool, other io.Closer, err error) {
	if opts.Raw || opts.RawHole != (Hole{}) || opts.RawSkip != 0 {
		return false, nil, nil
	}
	var head [4]byte
	if m.length < uint64(len(head)) {
		return false, nil, nil
	}
	if err := m.readAt(head[:], 0); err != nil {
		return false, nil, err
	}
	state := isVMware(head[:])
	var f *os.File
	var size int64
	switch {
	case state:
		f, size, err = beside(path, ".vmem")
	case filepath.Ext(path) == ".vmem":
		f, size, err = beside(path, ".vmss", ".vmsn")
	default:
		return false, nil, nil
	}
	if err != nil {
		return true, nil, err
	}
	if f == nil {
		if !state {
			if m.length <= vmwareHole.Limit {
				return false, nil, nil
			}
			m.warnf("a .vmem without the .vmss or .vmsn of its name, which says where its memory belongs: taken to go on at 4 GiB behind the first 3")
			return true, nil, m.raw(vmwareHole, 0)
		}
		return true, nil, m.vmware(nil)
	}
	o := &Image{r: f, length: uint64(size)}
	if state {
		err = m.vmware(o)
	} else {
		mem := *m
		m.r, m.length = o.r, o.length
		err = m.vmware(&mem)
	}
	if err != nil {
		f.Close() //nolint:errcheck // only read from
		return true, nil, err
	}
	return true, f, nil
}
