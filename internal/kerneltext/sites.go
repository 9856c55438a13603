package kerneltext

import (
	"cmp"
	"encoding/binary"
	"slices"
	"strings"

	"github.com/vmprobes/vmprobes/internal/x86"
)

// A site is code that the kernel changes by itself.
type site struct {
	span
	kind   siteKind
	target uint64 // where a jump label leads
}

type siteKind uint8

const (
	boot      siteKind = iota + 1 // changed once, while the kernel boots
	returns                       // likewise: a jump to the thunk, or RET and int3
	retpoline                     // likewise: a call or jump by a thunk, or an indirect one
	jumpLabel                     // these three are changed while the kernel runs
	staticCall
	ftrace
)

// Bounds of tables, in bytes: those of Debian's 6.12 have up to 919 KB (.call_sites).
const maxTable = 16 << 20

// sites reads from the file's tables what the kernel changes in its text. A table that
// the kernel doesn't have, or that this program doesn't understand, is left out: the code
// around what it describes differs from the file's then, which is enough to leave it alone.
func (f *File) sites() []site {
	var all []site
	add := func(addr, n uint64, kind siteKind, target uint64) {
		if f.text.has(addr) && n > 0 && n <= f.text.end-addr {
			all = append(all, site{span{addr, addr + n}, kind, target})
		}
	}
	insn := func(addr uint64) uint64 {
		b := f.at(span{addr, min(addr+x86.MaxLen, f.text.end)})
		if b == nil {
			return 0
		}
		in, err := x86.Decode(b)
		if err != nil {
			return 1
		}
		return uint64(in.Len)
	}
	// each calls do with the entries of a table, and where each is.
	each := func(start, stop string, entry uint64, do func(at uint64, b []byte)) {
		s, err := f.section(start, stop, maxTable)
		if err != nil || (s.end-s.start)%entry != 0 {
			return
		}
		b := f.at(s)
		for off := uint64(0); off+entry <= uint64(len(b)); off += entry {
			do(s.start+off, b[off:off+entry])
		}
	}
	relative := func(at uint64, b []byte) uint64 {
		return at + uint64(int64(int32(binary.LittleEndian.Uint32(b))))
	}
	// include/linux/jump_label.h, include/linux/static_call_types.h
	each("__start___jump_table", "__stop___jump_table", 16, func(at uint64, b []byte) {
		addr := relative(at, b)
		add(addr, insn(addr), jumpLabel, relative(at+4, b[4:]))
	})
	each("__start_static_call_sites", "__stop_static_call_sites", 8, func(at uint64, b []byte) {
		addr := relative(at, b)
		add(addr, insn(addr), staticCall, 0)
	})
	// Addresses before 6.15 or so (include/asm-generic/vmlinux.lds.h, MCOUNT_REC).
	each("__start_mcount_loc", "__stop_mcount_loc", 8, func(_ uint64, b []byte) {
		add(binary.LittleEndian.Uint64(b), 5, ftrace, 0)
	})
	// objtool's tables of distances (arch/x86/kernel/vmlinux.lds.S).
	for _, t := range []struct {
		start, stop string
		kind        siteKind
	}{
		{"__retpoline_sites", "__retpoline_sites_end", retpoline},
		{"__return_sites", "__return_sites_end", returns},
		{"__call_sites", "__call_sites_end", boot},
		{"__ibt_endbr_seal", "__ibt_endbr_seal_end", boot},
		{"__cfi_sites", "__cfi_sites_end", boot},
		{"__smp_locks", "__smp_locks_end", boot},
	} {
		each(t.start, t.stop, 4, func(at uint64, b []byte) {
			addr := relative(at, b)
			add(addr, insn(addr), t.kind, 0)
		})
	}
	// struct paravirt_patch_site { u8 *instr; u8 type; u8 len } (before 6.8).
	each("__parainstructions", "__parainstructions_end", 16, func(_ uint64, b []byte) {
		add(binary.LittleEndian.Uint64(b), uint64(b[9]), boot, 0)
	})
	// Trampolines are a jump and 3 bytes that are never executed (arch/x86/include/asm/
	// static_call.h), and Xen writes the hypercall page.
	for s := range f.syms.All() {
		if strings.HasPrefix(s.Name, "__SCT__") {
			add(s.Addr, 5, staticCall, 0)
		}
	}
	if s, err := f.syms.Lookup("hypercall_page"); err == nil {
		const call = 32 // bytes
		for off := uint64(0); off < 4096; off += call {
			add(s.Addr+off, call, boot, 0)
		}
	}
	f.alternatives(func(at uint64, b []byte, length int) { add(relative(at, b), uint64(b[length]), boot, 0) })
	slices.SortFunc(all, func(a, b site) int {
		return cmp.Or(cmp.Compare(a.start, b.start), cmp.Compare(b.end, a.end))
	})
	return all
}

// alternatives calls do with each struct alt_instr of the file, and at which byte it has
// the length of the original instructions (arch/x86/include/asm/alternative.h): two
// distances, and 16 bits of what it depends on, before 6.3, or 32 since; then the two
// lengths, and before 5.10 a third one.
func (f *File) alternatives(do func(at uint64, b []byte, length int)) {
	s, err := f.section("__alt_instructions", "__alt_instructions_end", maxTable)
	if err != nil {
		return
	}
	table := f.at(s)
	if table == nil {
		return
	}
	for _, l := range []struct{ size, length int }{{12, 10}, {14, 12}, {13, 10}} {
		if len(table)%l.size != 0 {
			continue
		}
		good, n := 0, len(table)/l.size
		for i := range n {
			b := table[i*l.size:]
			addr := s.start + uint64(i*l.size) + uint64(int64(int32(binary.LittleEndian.Uint32(b))))
			if addr >= mapBase && f.at(span{addr, addr + uint64(b[l.length])}) != nil {
				good++
			}
		}
		if good < n {
			continue
		}
		for i := range n {
			do(s.start+uint64(i*l.size), table[i*l.size:(i+1)*l.size], l.length)
		}
		return
	}
}

// sitesAt returns the sites that addr is in. They may overlap; one that begins at addr
// comes first.
func sitesAt(sites []site, addr uint64) (at []site) {
	i, _ := slices.BinarySearchFunc(sites, addr, func(s site, a uint64) int {
		if s.start <= a {
			return -1
		}
		return 1
	})
	const longest = 256 // an alternative's length is a byte
	for i--; i >= 0 && addr-sites[i].start < longest; i-- {
		if sites[i].has(addr) {
			at = append(at, sites[i])
		}
	}
	return at
}
