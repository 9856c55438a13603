package image

import (
	"bytes"
	"slices"
)

// The writers of the tests: each lays a file out from the description of its
// format, sharing no code with the readers.

// page returns a page that only frame n has.
func page(n uint64) []byte {
	b := make([]byte, 0, 4096)
	for i := range uint64(512) {
		b = le.AppendUint64(b, n*0x9e3779b97f4a7c15+i)
	}
	return b
}

// A note is an ELF note.
type note struct {
	name string
	typ  uint32
	desc []byte
}

func pad4(b []byte) []byte { return append(b, make([]byte, -len(b)&3)...) }

func noteBytes(notes ...note) []byte {
	var b []byte
	for _, n := range notes {
		b = le.AppendUint32(b, uint32(len(n.name)+1))
		b = le.AppendUint32(b, uint32(len(n.desc)))
		b = le.AppendUint32(b, n.typ)
		b = pad4(append(append(b, n.name...), 0))
		b = pad4(append(b, n.desc...))
	}
	return b
}

// A load is a PT_LOAD segment, with content.
type load struct {
	paddr uint64
	data  []byte
	memsz uint64 // if larger than data
	at    int    // 1-based number of the load whose bytes it has, or 0: its own
}

// A core is an ELF core with segments.
type core struct {
	class32 bool
	machine uint16
	loads   []load
	notes   []note
	xnum    bool // the number of segments in section 0, as for more than 65534
}

func (c core) bytes() []byte {
	type sizes struct{ eh, ph, sh int }
	sz, word := sizes{64, 56, 64}, 8
	if c.class32 {
		sz, word = sizes{52, 32, 40}, 4
	}
	var b []byte
	u := func(v uint64) {
		if word == 4 {
			b = le.AppendUint32(b, uint32(v))
		} else {
			b = le.AppendUint64(b, v)
		}
	}
	u16 := func(v int) { b = le.AppendUint16(b, uint16(v)) }
	u32 := func(v uint32) { b = le.AppendUint32(b, v) }

	phnum := 1 + len(c.loads)
	shoff, phoff := 0, sz.eh
	if c.xnum {
		shoff, phoff = sz.eh, sz.eh+sz.sh
	}
	b = append(b, "\x7fELF"...)
	b = append(b, byte(word/4), 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0)
	u16(4)
	u16(int(c.machine))
	u32(1)
	u(0)
	u(uint64(phoff))
	u(uint64(shoff))
	u32(0)
	u16(sz.eh)
	u16(sz.ph)
	if c.xnum {
		u16(0xffff)
		u16(sz.sh)
		u16(1)
	} else {
		u16(phnum)
		u16(0)
		u16(0)
	}
	u16(0)
	if c.xnum {
		// sh_name, sh_type, sh_flags, sh_addr, sh_offset, sh_size, sh_link, sh_info …
		u32(0)
		u32(0)
		for range 4 {
			u(0)
		}
		u32(0)
		u32(uint32(phnum))
		u(0)
		u(0)
	}

	notes := noteBytes(c.notes...)
	at := uint64(phoff + phnum*sz.ph)
	ph := func(typ uint32, off, paddr, filesz, memsz uint64) {
		u32(typ)
		if word == 8 {
			u32(0)
		}
		u(off)
		u(0) // p_vaddr
		u(paddr)
		u(filesz)
		u(memsz)
		if word == 4 {
			u32(0)
		}
		u(0)
	}
	ph(4, at, 0, uint64(len(notes)), uint64(len(notes)))
	at += uint64(len(notes))
	offs := make([]uint64, len(c.loads))
	for i, l := range c.loads {
		offs[i] = at
		if l.at > 0 {
			offs[i] = offs[l.at-1]
		} else {
			at += uint64(len(l.data))
		}
		ph(1, offs[i], l.paddr, uint64(len(l.data)), max(l.memsz, uint64(len(l.data))))
	}
	b = append(b, notes...)
	for _, l := range c.loads {
		if l.at == 0 {
			b = append(b, l.data...)
		}
	}
	return b
}

// A qemuState is QEMU's note of a CPU.
type qemuState struct {
	rip, rsp, rflags, cs, gs, kernelGS, idt, cr0, cr3, cr4 uint64
	old                                                    bool // without kernel_gs_base
}

func (s qemuState) bytes() []byte {
	size := 440
	if s.old {
		size = 432
	}
	b := le.AppendUint32(nil, 1)
	b = le.AppendUint32(b, uint32(size))
	for _, v := range []uint64{0, 0, 0, 0, 0, 0, s.rsp, 0, 0, 0, 0, 0, 0, 0, 0, 0, s.rip, s.rflags} {
		b = le.AppendUint64(b, v)
	}
	for i := range 10 { // cs ds es fs gs ss ldt tr gdt idt
		sel, base := uint64(0), uint64(0)
		switch i {
		case 0:
			sel = s.cs
		case 4:
			base = s.gs
		case 9:
			base = s.idt
		}
		b = le.AppendUint64(b, sel)
		b = le.AppendUint64(b, 0)
		b = le.AppendUint64(b, base)
	}
	for _, v := range []uint64{s.cr0, 0, 0x1234, s.cr3, s.cr4, s.kernelGS} {
		b = le.AppendUint64(b, v)
	}
	return b[:size]
}

func prstatus64(rip, rsp, rflags, cs uint64) []byte {
	b := make([]byte, 112)
	for i := range 27 {
		v := uint64(0x5555)
		switch i {
		case 16:
			v = rip
		case 17:
			v = cs
		case 18:
			v = rflags
		case 19:
			v = rsp
		}
		b = le.AppendUint64(b, v)
	}
	return append(b, make([]byte, 8)...)
}

func prstatus32(eip, esp, eflags, cs uint32) []byte {
	b := make([]byte, 72)
	for i := range 17 {
		v := uint32(0x5555)
		switch i {
		case 12:
			v = eip
		case 13:
			v = cs
		case 14:
			v = eflags
		case 15:
			v = esp
		}
		b = le.AppendUint32(b, v)
	}
	return append(b, 0, 0, 0, 0)
}

// A frame is a page of a Xen core.
type frame struct {
	pfn, mfn uint64
	data     []byte
}

// A xenCore is a core as xl writes it.
type xenCore struct {
	pv       bool
	bits     int
	frames   []frame
	contexts [][]byte
	stride   int    // of .xen_prstatus, 5168 if 0
	version  uint64 // of the format
	magic    uint64 // if not the kind's
	pageSize uint64
}

func (c xenCore) bytes() []byte {
	type sect struct {
		name string
		typ  uint32
		ent  int
		data []byte
	}
	var pages, frames []byte
	for _, f := range c.frames {
		frames = le.AppendUint64(frames, f.pfn)
		if c.pv {
			frames = le.AppendUint64(frames, f.mfn)
		}
		pages = append(pages, f.data...)
	}
	stride := c.stride
	if stride == 0 {
		stride = 5168
	}
	var contexts []byte
	for _, ctx := range c.contexts {
		contexts = append(contexts, ctx...)
		contexts = append(contexts, make([]byte, stride-len(ctx))...)
	}
	magic, table, ent := uint64(0xf00febee), ".xen_pfn", 8
	if c.pv {
		magic, table, ent = 0xf00febed, ".xen_p2m", 16
	}
	if c.magic != 0 {
		magic = c.magic
	}
	pageSize := uint64(4096)
	if c.pageSize != 0 {
		pageSize = c.pageSize
	}
	var header []byte
	for _, v := range []uint64{magic, uint64(len(c.contexts)), uint64(len(c.frames)), pageSize} {
		header = le.AppendUint64(header, v)
	}
	version := make([]byte, 1280)
	le.PutUint64(version[1264:], 0xffff800000000000) // virt_start
	le.PutUint64(version[1272:], 4096)
	if c.pv && c.bits == 32 {
		copy(version[1268:], bytes.Clone(version[1272:1280]))
	}
	notes := noteBytes(
		note{"Xen", 0x2000000, nil},
		note{"Xen", 0x2000001, header},
		note{"Xen", 0x2000002, version},
		note{"Xen", 0x2000003, le.AppendUint64(nil, c.version<<32|1)},
	)
	sects := []sect{
		{},
		{".shstrtab", 3, 0, nil},
		{".note.Xen", 7, 0, notes},
		{".xen_prstatus", 1, stride, contexts},
		{".xen_shared_info", 1, 4096, make([]byte, 4096)},
		{".xen_pages", 1, 4096, pages},
		{table, 1, ent, frames},
	}
	var names []byte
	at := make([]int, len(sects))
	for i, s := range sects {
		at[i] = len(names)
		names = append(append(names, s.name...), 0)
	}
	sects[1].data = names

	b := append([]byte("\x7fELF"), 2, 1, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0)
	b = le.AppendUint16(b, 4)
	b = le.AppendUint16(b, 62)
	b = le.AppendUint32(b, 1)
	b = le.AppendUint64(b, 0)
	b = le.AppendUint64(b, 0)
	b = le.AppendUint64(b, 64)
	b = le.AppendUint32(b, 0)
	for _, v := range []int{64, 56, 0, 64, len(sects), 1} {
		b = le.AppendUint16(b, uint16(v))
	}
	off := 64 + 64*len(sects)
	var body []byte
	for i, s := range sects {
		o := off + len(body)
		if s.name == ".xen_pages" {
			body = append(body, make([]byte, -o&4095)...)
			o = off + len(body)
		}
		if i == 0 {
			o = 0
		}
		b = le.AppendUint32(b, uint32(at[i]))
		b = le.AppendUint32(b, s.typ)
		for _, v := range []int{0, 0, o, len(s.data)} {
			b = le.AppendUint64(b, uint64(v))
		}
		b = le.AppendUint64(b, 0)
		b = le.AppendUint64(b, 0)
		b = le.AppendUint64(b, uint64(s.ent))
		body = append(body, s.data...)
	}
	return append(b, body...)
}

// context64 is a struct vcpu_guest_context with words at offsets, which come from
// offsetof in a C program built with Debian's libxen-dev 4.17 for x86-64.
func context64(words map[int]uint64) []byte {
	b := make([]byte, 5168)
	for off, v := range words {
		le.PutUint64(b[off:], v)
	}
	return b
}

// context32 is the same of a 32-bit guest (gcc -m32).
func context32(words map[int]uint32) []byte {
	b := make([]byte, 2800)
	for off, v := range words {
		le.PutUint32(b[off:], v)
	}
	return b
}

// A piece is memory at an address.
type piece struct {
	addr uint64
	data []byte
}

func limeBytes(pieces ...piece) []byte {
	var b []byte
	for _, p := range pieces {
		b = append(b, "EMiL\x01\x00\x00\x00"...)
		b = le.AppendUint64(b, p.addr)
		b = le.AppendUint64(b, p.addr+uint64(len(p.data))-1)
		b = append(append(b, make([]byte, 8)...), p.data...)
	}
	return b
}

// pages returns the pages of count frames.
func pages(first, count uint64) []byte {
	var b []byte
	for i := range count {
		b = append(b, page(first+i)...)
	}
	return slices.Clip(b)
}
