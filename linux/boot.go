package linux

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/vmprobes/vmprobes/internal/x86"
	"github.com/vmprobes/vmprobes/paging"
	"github.com/vmprobes/vmprobes/sysmap"
)

// A Starter is a [Machine] that may not have run yet.
//
// Before its first instruction a kernel's text and tables are those of its file: what
// booting will rewrite is known, and probes may be put anywhere else. It still runs on
// the page tables that the domain's builder made, and leaves them early.
type Starter interface {
	// Started reports whether a vCPU has executed anything. Once true it stays so.
	Started() (bool, error)
}

// unstarted reports whether the machine has not run yet, as far as that is known.
func (k *Kernel) unstarted() bool {
	if k.started.Load() {
		return false
	}
	s, ok := k.machine.(Starter)
	if !ok {
		k.started.Store(true)
		return false
	}
	started, err := s.Started()
	if started {
		k.started.Store(true)
	}
	return err == nil && !started
}

// ErrNotInPlace: the kernel of a machine that has never run can't be told from its memory.
var ErrNotInPlace = errors.New("the guest has never run, and its kernel isn't in place yet")

// borrow has k use the page tables that the machine's builder made, until its kernel has
// its own (see [Kernel.Root]). It fails if nothing would tell when that is so.
func (k *Kernel) borrow() error {
	if _, err := k.symbol(ownRoots[0]); err != nil {
		return fmt.Errorf("%w: when it gets page tables of its own can't be told: %w", ErrNotInPlace, err)
	}
	// What the builder has mapped below the image isn't part of it.
	if text, err := k.symbol("_text"); err == nil {
		for len(k.ranges) > 1 && k.ranges[0].Addr+k.ranges[0].Size <= text {
			k.ranges = k.ranges[1:]
		}
		if r := &k.ranges[0]; r.Addr < text && text-r.Addr < r.Size {
			r.Addr, r.Size = text, r.Size-(text-r.Addr)
		}
	}
	k.builder = k.root.Load()
	k.borrowed.Store(true)
	return nil
}

// settleEvery bounds how often a vCPU is asked for its page tables. Those of the builder
// aren't used for anything else so soon: they stay reserved while the kernel makes its own
// (xen_setup_kernel_pagetable in arch/x86/xen/mmu_pv.c).
var settleEvery = time.Millisecond

// settle looks whether a kernel that has run on its builder's page tables has others. Its
// own are taken only when a vCPU has left the builder's: before that the kernel may be
// making them.
func (k *Kernel) settle() {
	k.settling.Lock()
	defer k.settling.Unlock()
	if !k.borrowed.Load() || time.Since(k.lookedAt) < settleEvery {
		return
	}
	defer func() { k.lookedAt = time.Now() }()
	cpus, err := k.machine.CPUs()
	if err != nil || len(cpus) == 0 {
		return
	}
	now := cpus[0].CR3 &^ 0xfff
	if now == k.builder {
		return
	}
	if root, name, ok := k.ownRoot(paging.Root(now)); ok {
		k.root.Store(uint64(root))
		k.borrowed.Store(false)
		k.explain("own tables", nil, "they map themselves where the tables in use do", "%s, root %#x, since it has booted", name, uint64(root))
		return
	}
	k.root.Store(now)
}

// Settled returns the page tables to reach kernel memory through now, and whether they
// are the kernel's own, which stay.
func (k *Kernel) Settled() (root paging.Root, own bool) {
	root = k.Root()
	return root, k != nil && !k.borrowed.Load()
}

// A bootTable names instructions that the kernel rewrites when it boots, in a section
// between two symbols.
type bootTable struct {
	name, start, end string
	read             func(o *op, p *places, base uint64, table []byte) (int, error)
}

// maxText bounds the text of a kernel. That of Debian's 6.12 has 16 MiB.
const maxText = 64 << 20

// maxBootTable bounds a table. Debian's 6.12 has 897 KiB of call sites.
const maxBootTable = 16 << 20

// bootTables are what apply_alternatives and its like in arch/x86/kernel/alternative.c go
// through, and callthunks_patch_builtin_calls (arch/x86/kernel/callthunks.c). Beside these,
// [tables] has what is rewritten later, too. All kernels have the first one; the linker
// script names all of them in one way, so that a kernel whose symbols have the first has
// none of those that they don't have.
var bootTables = []bootTable{
	{"alternatives", "__alt_instructions", "__alt_instructions_end", (*op).readAlternatives},
	{"LOCK prefixes", "__smp_locks", "__smp_locks_end", relativeSpans(1, "a LOCK prefix")},
	{"paravirt calls", "__parainstructions", "__parainstructions_end", (*op).readParavirt},
	{"retpolines", "__retpoline_sites", "__retpoline_sites_end", relativeSpans(0, "a retpoline")},
	{"returns", "__return_sites", "__return_sites_end", relativeSpans(0, "a return")},
	{"calls", "__call_sites", "__call_sites_end", relativeSpans(0, "a call")},
	{"ENDBR64", "__ibt_endbr_seal", "__ibt_endbr_seal_end", relativeSpans(endbrSize, sealed)},
	{"CFI checks", "__cfi_sites", "__cfi_sites_end", relativeSpans(0, "a CFI check")},
}

// sealed is why an ENDBR64 is rewritten. A breakpoint is put behind it (see
// [Kernel.ProbePoint]).
const sealed = "an ENDBR64"

// readBoot reads what the kernel will rewrite when it boots. It has not run yet.
func (o *op) readBoot(p *places) (found []string) {
	unknown := func(what string, err error) {
		o.log.Warn("a table of this kernel is not known", "what", what, "err", err)
		p.unknown = append(p.unknown, fmt.Errorf("the table of %s: %w", what, err))
	}
	var err error
	if o.text, err = o.table("text", p.text.start, p.text.end-p.text.start, maxText); err != nil {
		unknown("instructions", err)
		return nil
	}
	for i, t := range bootTables {
		base, size, err := o.section(t.start, t.end, maxBootTable)
		var table []byte
		if err == nil {
			table, err = o.table(t.name, base, size, maxBootTable)
		}
		n := 0
		if err == nil {
			n, err = t.read(o, p, base, table)
		}
		switch {
		case err == nil:
			found = append(found, fmt.Sprintf("%d %s", n, t.name))
		case errors.Is(err, sysmap.ErrNotFound) && i > 0 && !o.has([]string{t.start, t.end}):
		default:
			unknown(t.name, err)
		}
	}
	n, err := o.readRuntimeConstants(p)
	if err != nil {
		unknown("runtime constants", err)
	} else if n > 0 {
		found = append(found, fmt.Sprintf("%d runtime constants", n))
	}
	return found
}

// relativeSpans returns what reads a table of 32-bit distances from themselves to
// instructions, of which n bytes are rewritten, or if n is 0 all.
func relativeSpans(n uint64, what string) func(*op, *places, uint64, []byte) (int, error) {
	return func(o *op, p *places, base uint64, table []byte) (int, error) {
		found := 0
		for off := uint64(0); off+4 <= uint64(len(table)); off += 4 {
			addr := relative32(base, table, off)
			if !p.text.has(addr) {
				continue
			}
			size := n
			if size == 0 {
				size = o.lengthAt(p, addr)
			}
			p.boot = append(p.boot, span{addr, addr + size, what})
			found++
		}
		return found, nil
	}
}

// lengthAt returns the length of the instruction at addr, in p's text, or if it can't be told the
// longest that there is.
func (o *op) lengthAt(p *places, addr uint64) uint64 {
	in, err := x86.Decode(o.text[addr-p.text.start:])
	if err != nil {
		return x86.MaxLen
	}
	return uint64(in.Len)
}

// readAlternatives reads struct alt_instr (arch/x86/include/asm/alternative.h), whose
// layout changed in 5.13 and in 6.3: the kernel's types tell it.
func (o *op) readAlternatives(p *places, base uint64, table []byte) (int, error) {
	t, err := o.Types()
	if err != nil {
		return 0, err
	}
	size, err := t.Sizeof("alt_instr")
	if err != nil {
		return 0, err
	}
	at, err := t.Offset("alt_instr.instr_offset")
	if err != nil {
		return 0, err
	}
	length, err := t.Offset("alt_instr.instrlen")
	if err != nil {
		return 0, err
	}
	if size < 8 || size > 64 || at.Offset > size-4 || length.Offset > size-1 || uint64(len(table))%size != 0 {
		return 0, fmt.Errorf("%d bytes of alternatives, of %d each: %w", len(table), size, ErrBadKernel)
	}
	found := 0
	for off := uint64(0); off < uint64(len(table)); off += size {
		addr := relative32(base, table, off+at.Offset)
		if p.text.has(addr) {
			p.boot = append(p.boot, span{addr, addr + uint64(table[off+length.Offset]), "an alternative"})
			found++
		}
	}
	return found, nil
}

// readParavirt reads struct paravirt_patch_site { u8 *instr; u8 type; u8 len }
// (arch/x86/include/asm/paravirt_types.h, until 6.7).
func (o *op) readParavirt(p *places, _ uint64, table []byte) (int, error) {
	const size = 16
	found := 0
	for ; len(table) >= 10; table = table[min(size, len(table)):] {
		if addr := le64(table[:8]); p.text.has(addr) {
			p.boot = append(p.boot, span{addr, addr + uint64(table[9]), "a paravirt call"})
			found++
		}
	}
	return found, nil
}

// readRuntimeConstants finds immediates that the kernel sets when it knows their values
// (arch/x86/include/asm/runtime-const.h, since 6.11): for each constant a section of
// distances to them. A value has 8 bytes, a number of bits to shift by one.
func (o *op) readRuntimeConstants(p *places) (found int, err error) {
	for sym := range o.syms.All() {
		rest, ok := strings.CutPrefix(sym.Name, "__start_runtime_")
		if !ok {
			continue
		}
		n := uint64(8)
		if strings.HasPrefix(rest, "shift_") {
			n = 1
		}
		base, size, err := o.section(sym.Name, "__stop_runtime_"+rest, maxBootTable)
		if err != nil {
			return found, err
		}
		table, err := o.table("runtime constants", base, size, maxBootTable)
		if err != nil {
			return found, err
		}
		k, err := relativeSpans(n, "a constant in it")(o, p, base, table)
		if err != nil {
			return found, err
		}
		found += k
	}
	return found, nil
}

// bootBlacklist reads the functions of which the kernel makes kprobe_blacklist when it
// boots (_ASM_NOKPROBE, populate_kprobe_blacklist in kernel/kprobes.c).
func (o *op) bootBlacklist(p *places) (int, error) {
	base, size, err := o.section("__start_kprobe_blacklist", "__stop_kprobe_blacklist", maxBlacklist*8)
	if err != nil {
		return 0, err
	}
	long := uint64(o.bits / 8)
	table, err := o.table("blacklist entries", base, size, maxBlacklist*8)
	if err != nil {
		return 0, err
	}
	found := 0
	for ; uint64(len(table)) >= long; table = table[long:] {
		addr := word(table, int(long))
		end, ok := o.syms.FuncEnd(addr)
		if !ok || !p.text.has(addr) {
			continue
		}
		p.spans = append(p.spans, span{addr, end, "on the kernel's own kprobe blacklist"})
		found++
	}
	return found, nil
}

// bootFtrace reads the list of which ftrace makes its records (ftrace_process_locs in
// kernel/trace/ftrace.c).
func (o *op) bootFtrace(p *places) (int, error) {
	base, size, err := o.section("__start_mcount_loc", "__stop_mcount_loc", maxFtrace*8)
	if err != nil {
		return 0, err
	}
	long := uint64(o.bits / 8)
	table, err := o.table(ftraceTable, base, size, maxFtrace*8)
	if err != nil {
		return 0, err
	}
	for ; uint64(len(table)) >= long; table = table[long:] {
		if addr := word(table, int(long)); p.text.has(addr) {
			p.trace = append(p.trace, site{addr, ftraceSite})
		}
	}
	return len(p.trace), nil
}

// noLocks: a kernel that has not booted has no list of LOCK prefixes to restore.
// bootTables has where they are.
func (o *op) noLocks(*places) (int, error) { return 0, nil }

// rewrittenAtBoot returns what is rewritten of the instruction at addr when the kernel
// boots. What ProbePoint skips doesn't count: ftrace's instructions, which are among the
// calls, and ENDBR64.
func (k *Kernel) rewrittenAtBoot(p *places, addr uint64) (span, bool) {
	if len(p.boot) == 0 {
		return span{}, false
	}
	var b [x86.MaxLen]byte
	n, _ := k.readText(addr, b[:])
	end := addr + x86.MaxLen
	if in, err := x86.Decode(b[:n]); err == nil {
		end = addr + uint64(in.Len)
	}
	// All that start before its end and may reach it.
	i, _ := slices.BinarySearchFunc(p.boot, end, func(s span, a uint64) int { return cmp.Compare(s.start, a) })
	for i--; i >= 0 && end-p.boot[i].start < p.bootReach+x86.MaxLen; i-- {
		s := p.boot[i]
		if s.end <= addr || s.start == addr && s.why == sealed {
			continue
		}
		if _, ok := within(p.trace, addr, 1); !ok {
			return s, true
		}
	}
	return span{}, false
}

// sealedAtBoot reports whether the instruction at addr is an ENDBR64 that is rewritten
// when the kernel boots.
func (p *places) sealedAtBoot(addr uint64) bool {
	i, found := slices.BinarySearchFunc(p.boot, addr, func(s span, a uint64) int { return cmp.Compare(s.start, a) })
	for ; found && i < len(p.boot) && p.boot[i].start == addr; i++ {
		if p.boot[i].why == sealed {
			return true
		}
	}
	return false
}

// stale reports whether what is known of the kernel's text is to be read again.
func (k *Kernel) stale() bool {
	switch p := k.safe; {
	case p == nil:
		return true
	case p.fresh:
		// What was read before it booted holds while it boots, when nothing else does.
		return !k.unstarted() && k.booting() == nil
	default:
		return !p.unsure.IsZero() && time.Since(p.unsure) > retrySafety
	}
}
