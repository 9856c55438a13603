package linux

import (
	"strings"

	"github.com/vmprobes/vmprobes/paging"
)

// DeadCode calls try with ranges of the kernel's own text that hold nothing but
// int3 (0xcc), that nothing executes and nothing else will use, best first, until
// try returns true. Several may be next to each other.
//
// The linker fills the gaps between sections of the text with int3
// (arch/x86/kernel/vmlinux.lds.S, ":text = 0xcccc"): up to 2 MiB before and after the
// entry code of a kernel with page-table isolation, a few hundred bytes in any other.
// Memory outside of the kernel's text is never proposed, whatever it holds: pages full
// of int3 near the modules are where the guest puts BPF programs and thunks
// (bpf_prog_pack in kernel/bpf/core.c, its_alloc in arch/x86/kernel/alternative.c).
// Nor is the hypercall page, whose unused half Xen fills with int3 and writes again
// when it resumes the guest, nor the int3 between thunks.
//
// Without the symbols _stext and _etext nothing is proposed.
func (k *Kernel) DeadCode(try func(addr, size uint64) bool) {
	if k == nil {
		return
	}
	// Not readText: the caller may hold the lock that the overlay takes, and there is
	// no breakpoint in dead code.
	kernelText{k.syms, func(addr uint64, b []byte) (int, error) { return k.mem.Read(k.Root(), paging.VAddr(addr), b) }}.deadCode(try)
}

// deadCode is [Kernel.DeadCode] of the kernel's own text.
func (t kernelText) deadCode(try func(addr, size uint64) bool) {
	start, size, err := section(t.syms, "_stext", "_etext", 1<<30)
	if err != nil {
		return
	}
	d := &deadCode{t: t, in: span{start: start, end: start + size}, try: try}
	for _, c := range []struct {
		symbol string
		before bool
	}{{"__entry_text_end", false}, {"__entry_text_start", true}, {"_etext", true}} {
		sym, err := t.syms.Lookup(c.symbol)
		if err != nil || sym.Addr < d.in.start || sym.Addr > d.in.end {
			continue
		}
		at := sym.Addr
		if c.before {
			at -= min(at-d.in.start, deadGap)
		}
		if d.scan(at, min(d.in.end-at, deadGap)) {
			return
		}
	}
	d.scan(d.in.start, size)
}

const (
	deadGap   = 64 << 10 // bytes looked at around a symbol
	deadPiece = 512      // bytes proposed at once
	deadEdge  = 64       // bytes left alone at both ends of a run
	deadLeast = 2*deadEdge + 64
)

type deadCode struct {
	t   kernelText
	in  span
	try func(addr, size uint64) bool
}

// scan looks for runs of int3 in n bytes from addr on. Of a run that begins before
// them, or ends after, it sees only what is among them.
func (d *deadCode) scan(addr, n uint64) bool {
	end := addr + n
	run := uint64(0)
	var page [paging.PageSize]byte
	for at := addr; at < end; {
		b := page[:min(end-at, paging.PageSize-at%paging.PageSize)]
		if _, err := d.t.read(at, b); err != nil {
			clear(b)
		}
		for i, c := range b {
			if c == 0xcc {
				run++
				continue
			}
			if d.propose(at+uint64(i)-run, run) {
				return true
			}
			run = 0
		}
		at += uint64(len(b))
	}
	return d.propose(end-run, run)
}

// propose proposes a run piece by piece.
func (d *deadCode) propose(addr, n uint64) bool {
	if n < deadLeast || !d.unused(addr) {
		return false
	}
	end := addr + n - deadEdge
	for at := addr + deadEdge; at+64 <= end; at += deadPiece {
		if d.try(at, min(end-at, deadPiece)) {
			return true
		}
	}
	return false
}

// unused reports whether a run is what the linker put between sections, by the symbol
// before it.
func (d *deadCode) unused(addr uint64) bool {
	sym, off, ok := d.t.syms.Find(addr)
	if !ok {
		return false
	}
	for _, prefix := range []string{"hypercall_page", "xen_hypercall", "__x86_"} {
		if strings.HasPrefix(sym.Name, prefix) {
			return false
		}
	}
	return off > 0 || strings.HasPrefix(sym.Name, "__")
}
