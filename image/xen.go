package image

import (
	"fmt"

	"github.com/vmprobes/vmprobes/paging"
)

// The core that `xl dump-core` writes: docs/misc/dump-core-format.txt, and
// xen/include/public/elfnote.h for the numbers of the notes.
const (
	xenNoteSection = ".note.Xen"

	xenNoteHeader  = 0x2000001
	xenNoteVersion = 0x2000002
	xenNoteFormat  = 0x2000003

	xenMagicPV  = 0xf00febed
	xenMagicHVM = 0xf00febee

	xenNone = ^uint64(0) // the pfn or gmfn of a page that is not there

	// maxXenPages bounds the pages of a core: 16 TiB, which is also what Xen
	// itself can manage.
	maxXenPages = 1 << 32
)

// A xenHeader is struct xen_dumpcore_elfnote_header_desc, and what the version note
// tells.
type xenHeader struct {
	magic, vcpus, pages, pageSize uint64
	bits                          int // 32 or 64 for a PV guest, 0 if unknown
}

// xen lays out a core of Xen.
func (f *elfFile) xen(sections []section) error {
	f.format = "Xen core"
	byName := map[string]section{}
	for _, s := range sections {
		byName[s.name] = s
	}
	h, err := f.xenNotes(byName[xenNoteSection])
	if err != nil {
		return err
	}
	switch h.magic {
	case xenMagicPV:
		f.kind = PV
	case xenMagicHVM:
		f.kind = HVM
	default:
		return formatErr("magic %#x in the header note", h.magic)
	}
	if h.pageSize != paging.PageSize {
		return fmt.Errorf("%w: pages of %d bytes", ErrUnsupported, h.pageSize)
	}
	if h.pages > maxXenPages {
		return formatErr("%d pages: more than %d", h.pages, uint64(maxXenPages))
	}
	need := func(name string, each uint64) (section, error) {
		s, ok := byName[name]
		if !ok {
			return s, formatErr("no section %s", name)
		}
		if s.size < h.pages*each {
			return s, formatErr("section %s has %d bytes: too few for %d pages", name, s.size, h.pages)
		}
		return s, f.within(name, s.off, h.pages*each)
	}
	pages, err := need(".xen_pages", paging.PageSize)
	if err != nil {
		return err
	}
	f.pages = pages.off
	// The table of a PV guest has {u64 pfn, u64 gmfn}, that of others u64 pfn.
	table, entry := ".xen_pfn", uint64(8)
	if f.kind == PV {
		table, entry = ".xen_p2m", 16
	}
	frames, err := need(table, entry)
	if err != nil {
		return err
	}
	runs, err := f.xenRuns(frames.off, h.pages, entry)
	if err != nil {
		return fmt.Errorf("section %s: %w", table, err)
	}
	data := make([]extent, len(runs))
	for i, r := range runs {
		data[i] = extent{addr: r.mfn << pageShift, off: pages.off + r.page<<pageShift, size: r.count << pageShift}
	}
	if err := f.layOut(data, nil); err != nil {
		return err
	}
	if f.kind == PV {
		f.p2m = runs
	}
	return f.xenCPUs(byName[".xen_prstatus"], h)
}

func (f *elfFile) xenNotes(s section) (h xenHeader, err error) {
	if s.size > maxNotes {
		return h, formatErr("more than %d bytes of notes", maxNotes)
	}
	b, err := f.table(xenNoteSection, s.off, 1, s.size)
	if err != nil {
		return h, err
	}
	version, header := uint64(0), false
	eachNote(b, func(name string, typ uint32, desc []byte) {
		switch {
		case name != "Xen":
		case typ == xenNoteHeader && len(desc) >= 32:
			header = true
			h.magic, h.vcpus, h.pages, h.pageSize = le.Uint64(desc), le.Uint64(desc[8:]), le.Uint64(desc[16:]), le.Uint64(desc[24:])
		case typ == xenNoteFormat && len(desc) >= 8:
			version = le.Uint64(desc) >> 32
		case typ == xenNoteVersion:
			h.bits = xenBits(desc)
		}
	})
	if !header {
		return h, formatErr("no header note in %s", xenNoteSection)
	}
	if version != 0 {
		return h, fmt.Errorf("%w: version %d of Xen's core format: only version 0 is known", ErrUnsupported, version)
	}
	return h, nil
}

// xenBits returns the address size of a PV guest. Nothing in a core says it directly,
// but struct xen_dumpcore_elfnote_xen_version_desc ends with an unsigned long and the
// page size as u64, and for a 32-bit guest xl puts the latter where that guest's
// alignment has it, four bytes lower.
func xenBits(desc []byte) int {
	const size = 1280
	if len(desc) != size {
		return 0
	}
	switch {
	case le.Uint64(desc[size-8:]) == paging.PageSize:
		return 64
	case le.Uint64(desc[size-12:]) == paging.PageSize:
		return 32
	}
	return 0
}

// xenRuns reads the table of frames. Its entries are in ascending order of pfn.
func (f *elfFile) xenRuns(off, pages, entry uint64) ([]run, error) {
	var runs []run
	buf := make([]byte, 64<<10)
	for page := uint64(0); page < pages; {
		b := buf[:min(uint64(len(buf)), (pages-page)*entry)]
		if err := f.readAt(b, off+page*entry); err != nil {
			return nil, err
		}
		for ; len(b) > 0; b, page = b[entry:], page+1 {
			pfn := le.Uint64(b)
			mfn := pfn
			if entry == 16 {
				mfn = le.Uint64(b[8:])
			}
			if pfn == xenNone || mfn == xenNone {
				continue // "the corresponding page has zero"
			}
			if pfn > maxFrame || mfn > maxFrame {
				return nil, formatErr("entry %d: frame %#x, machine frame %#x: beyond 52 bits", page, pfn, mfn)
			}
			if len(runs) > 0 {
				last := &runs[len(runs)-1]
				n := last.count
				if pfn < last.pfn+n {
					return nil, formatErr("entry %d: frame %#x comes after %#x", page, pfn, last.pfn+n-1)
				}
				if pfn == last.pfn+n && mfn == last.mfn+n && page == last.page+n {
					last.count++
					continue
				}
			}
			if len(runs) == maxExtents {
				return nil, formatErr("more than %d runs of frames", maxExtents)
			}
			runs = append(runs, run{pfn: pfn, mfn: mfn, page: page, count: 1})
		}
	}
	return runs, nil
}

// A xenContext has the offsets of what is needed here in struct vcpu_guest_context:
// xen/include/public/arch-x86/xen.h, xen-x86_64.h and xen-x86_32.h, as a compiler
// lays them out.
type xenContext struct {
	word, size       int // of an unsigned long, of the whole struct
	flags            int
	ip, cs, fl, sp   int // in user_regs
	traps, trap      int // of trap_ctxt, of one of its entries
	ctrlreg          int
	event, failsafe  int // …_callback_eip
	syscall          int // syscall_callback_eip
	gsKernel, gsUser int
}

var (
	xenContext64 = xenContext{
		word: 8, size: 5168, flags: 512, ip: 648, cs: 656, fl: 664, sp: 672,
		traps: 720, trap: 16, ctrlreg: 4984,
		event: 5112, failsafe: 5120, syscall: 5128, gsKernel: 5152, gsUser: 5160,
	}
	xenContext32 = xenContext{
		word: 4, size: 2800, flags: 512, ip: 548, cs: 552, fl: 556, sp: 560,
		traps: 584, trap: 8, ctrlreg: 2716,
		event: 2784, failsafe: 2792,
	}
)

// Bits of vcpu_guest_context.flags.
const (
	vgcfInKernel = 1 << 2
	vgcfOnline   = 1 << 5
)

// xenCPUs reads the array of struct vcpu_guest_context. Its entries have the size of
// the larger of the toolstack's two layouts, whatever the guest.
func (f *elfFile) xenCPUs(s section, h xenHeader) error {
	if h.vcpus > maxCPUs {
		return formatErr("%d CPUs: more than %d", h.vcpus, maxCPUs)
	}
	if s.size == 0 || h.vcpus == 0 {
		return nil
	}
	stride := s.size / h.vcpus
	l := &xenContext64
	if h.bits == 32 || stride < uint64(l.size) {
		l = &xenContext32
	}
	if stride < uint64(l.size) {
		return formatErr("section .xen_prstatus has %d bytes: too few for %d CPUs", s.size, h.vcpus)
	}
	if err := f.within(".xen_prstatus", s.off, s.size); err != nil {
		return err
	}
	b := make([]byte, l.size)
	for i := range h.vcpus {
		if err := f.readAt(b, s.off+i*stride); err != nil {
			return err
		}
		c := l.cpu(b, f.kind)
		c.ID = int(i)
		f.cpus = append(f.cpus, c)
	}
	return nil
}

// cpu reads a context (arch_get_info_guest, xen/arch/x86/domctl.c, says what Xen
// puts into it).
func (l *xenContext) cpu(b []byte, kind Kind) CPU {
	u := func(off int) uint64 {
		if l.word == 4 {
			return uint64(le.Uint32(b[off:]))
		}
		return le.Uint64(b[off:])
	}
	cr := func(n int) uint64 { return u(l.ctrlreg + n*l.word) }
	flags := u(l.flags)
	c := CPU{
		Has:     CR0 | CR2 | CR3 | CR4 | RIP | RSP | RFLAGS | CS,
		Offline: flags&vgcfOnline == 0,
		CR0:     cr(0), CR2: cr(2), CR3: cr(3), CR4: cr(4),
		RIP: u(l.ip), RSP: u(l.sp), RFLAGS: u(l.fl), CS: le.Uint16(b[l.cs:]),
	}
	inKernel := c.CS&3 == 0
	if kind == PV {
		inKernel = flags&vgcfInKernel != 0
	}
	if l.word == 8 {
		// Xen tells them apart by owner, not by which one is in force.
		c.GSBase, c.KernelGSBase = u(l.gsKernel), u(l.gsUser)
		if !inKernel {
			c.GSBase, c.KernelGSBase = c.KernelGSBase, c.GSBase
		}
		c.Has |= GSBase | KernelGSBase
	}
	if kind != PV {
		// Only a 64-bit kernel runs, or keeps its per-CPU data, above 4 GiB.
		c.deduce((c.RIP|u(l.gsKernel))>>32 != 0)
		return c
	}

	c.Has |= PVContext
	c.InKernel = inKernel
	c.EventCallback, c.FailsafeCallback = u(l.event), u(l.failsafe)
	c.Bits = 8 * l.word
	if c.Bits == 64 {
		c.UserCR3, c.SyscallCallback = cr(1), u(l.syscall)
	} else {
		c.CR3 = uint64(paging.PV32Root(uint32(c.CR3)))
	}
	for n := range 256 {
		e := b[l.traps+n*l.trap:]
		// The table is indexed by vector; address is the last field.
		t := Trap{Vector: uint8(n), Flags: e[1], CS: le.Uint16(e[2:]), Address: u(l.traps + (n+1)*l.trap - l.word)}
		if t.Address != 0 {
			c.Traps = append(c.Traps, t)
		}
	}
	return c
}
