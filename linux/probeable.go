package linux

import (
	"errors"
	"fmt"
	"iter"
	"path"
	"strings"

	"github.com/vmprobes/vmprobes/sysmap"
)

// Errors of places for probes.
var (
	// ErrNotProbeable: the kernel itself would not allow a probe there.
	ErrNotProbeable = errors.New("no place for a probe")
	// ErrUnknownPlaces: the guest doesn't tell whether a probe is safe there. One of
	// the kernel's tables of what it rewrites can't be found, read or understood, or
	// nothing shows where instructions begin. It wraps ErrNotProbeable.
	ErrUnknownPlaces = fmt.Errorf("%w: cannot tell whether it is a safe one", ErrNotProbeable)
)

// Probeable returns nil if a breakpoint may stand at addr, otherwise an error that
// says why not and wraps ErrNotProbeable. It checks, in the kernel and its modules,
// what the guest's own kprobes check (check_kprobe_address_safe in kernel/kprobes.c,
// can_probe in arch/x86/kernel/kprobes/core.c): the kprobe blacklist, code that must
// not be instrumented, entry code, code that the kernel rewrites while it runs (jump
// labels, static calls, LOCK prefixes that one CPU doesn't need), and the boundaries of
// instructions.
//
// Alternatives, retpolines, return thunks and paravirt patching rewrite code once,
// before the kernel or the module is up. While that may be, every place is refused. In a
// kernel that has not run yet ([Starter]) only what they will rewrite is.
func (k *Kernel) Probeable(addr uint64) error {
	if err := k.Blacklisted(addr); err != nil {
		return err
	}
	return k.Boundary(addr)
}

// Blacklisted is Probeable without the check that addr is the start of an
// instruction. If one of the tables of the kernel, or of a module, isn't known, all of
// its text is refused, with ErrUnknownPlaces.
//
// The start of an instruction that ftrace rewrites isn't refused, nor do the kernel's
// own kprobes refuse it: see [Kernel.FtraceSite] and [Kernel.ProbePoint].
func (k *Kernel) Blacklisted(addr uint64) error {
	p, err := k.placesOf(addr)
	if err != nil {
		return err
	}
	return k.refused(p, addr)
}

// refused says why no breakpoint may stand at addr, which is in p's text, or returns
// nil.
func (k *Kernel) refused(p *places, addr uint64) error {
	if err := k.booting(); err != nil {
		return fmt.Errorf("%#x: %w", addr, err)
	}
	if s, ok := p.spanAt(addr); ok {
		return fmt.Errorf("%#x: %w: %s", addr, ErrNotProbeable, s.why)
	}
	if at, ok := p.siteAt(k, addr); ok {
		return fmt.Errorf("%#x: %w: the kernel rewrites the instruction while it runs (%s)", addr, ErrNotProbeable, at.kind)
	}
	if at, ok := within(p.locks, addr, 1); ok && k.mayLock() {
		return fmt.Errorf("%#x: %w: the kernel rewrites the instruction when its second CPU comes up (%s)", addr, ErrNotProbeable, at.kind)
	}
	if at, ok := k.rewrittenAtBoot(p, addr); ok {
		return fmt.Errorf("%#x: %w: the kernel rewrites the instruction when it boots (%s)", addr, ErrNotProbeable, at.why)
	}
	if at, ok := within(p.trace, addr, ftraceSize); ok && addr != at.addr {
		return fmt.Errorf("%#x: %w: inside an instruction that ftrace rewrites", addr, ErrNotProbeable)
	}
	if why, err := k.named(p, addr); err != nil {
		return fmt.Errorf("%#x: %w: the symbols of modules are not known: %w", addr, ErrUnknownPlaces, err)
	} else if why != "" {
		return fmt.Errorf("%#x: %w: %s", addr, ErrNotProbeable, why)
	}
	if len(p.unknown) > 0 {
		return fmt.Errorf("%#x: %w: %w", addr, ErrUnknownPlaces, p.unknown)
	}
	return nil
}

// named says why no breakpoint may stand at addr, by the symbols around it, or returns
// "".
func (k *Kernel) named(p *places, addr uint64) (why string, err error) {
	text, err := k.textOf(p)
	if err != nil {
		return "", err
	}
	syms := text.syms
	// The bytes before a function are used by mitigations: call depth tracking writes
	// them when it first needs them (patch_dest in arch/x86/kernel/callthunks.c), kCFI
	// and FineIBT have their hash and check there (is_cfi_preamble_symbol in
	// kernel/kprobes.c).
	if next, ok := syms.Next(addr); ok {
		if f, off, ok := syms.Find(next); ok && off == 0 {
			for _, prefix := range []string{"__pfx_", "__cfi_"} {
				for _, s := range syms.LookupAll(prefix + f.Name) {
					if s.Addr <= addr && addr < next {
						return fmt.Sprintf("in the bytes before a function, %q", s.Name), nil
					}
				}
			}
		}
	}
	sym, off, ok := syms.Find(addr)
	if !ok {
		return "", nil
	}
	// DEFINE_STATIC_CALL makes a jump of 5 bytes that is rewritten as its sites are
	// (arch/x86/include/asm/static_call.h). Modules have theirs in their text.
	if strings.HasPrefix(sym.Name, "__SCT__") && off < 8 {
		return "a static call's trampoline, which the kernel rewrites while it runs", nil
	}
	// A BPF dispatcher's entry is rewritten by bpf_arch_text_poke, in 6.0 and 6.1
	// without being ftrace's (kernel/bpf/dispatcher.c).
	if strings.HasPrefix(sym.Name, "bpf_dispatcher_") && strings.HasSuffix(sym.Name, "_func") && sym.Name != "bpf_dispatcher_nop_func" && off < 4+ftraceSize {
		return "the entry of a BPF dispatcher, which the kernel rewrites while it runs", nil
	}
	// What the compiler split off a function is blacklisted with it
	// (within_kprobe_blacklist in kernel/kprobes.c).
	if base, _, ok := strings.Cut(sym.Name, "."); ok {
		for _, f := range syms.LookupAll(base) {
			if s, ok := p.spanAt(f.Addr); ok && p.text.has(f.Addr) {
				return fmt.Sprintf("%q, of which this is a part, is %s", base, s.why), nil
			}
		}
	}
	return "", nil
}

// booting returns an error until the kernel has reached its last steps before init:
// before them it applies alternatives, makes its lists and frees what only booting
// needs. Values of system_state from 2 on are beyond that in every
// version (enum system_states, include/linux/kernel.h).
func (k *Kernel) booting() error {
	if k.booted.Load() || k.unstarted() {
		return nil
	}
	at, err := k.symbol("system_state")
	if errors.Is(err, sysmap.ErrNotFound) {
		return nil // without symbols of data, no table is known either
	}
	if err != nil {
		return fmt.Errorf("%w: system_state: %w", ErrUnknownPlaces, err)
	}
	var b [4]byte
	if err := k.Read(at, b[:]); err != nil {
		return fmt.Errorf("%w: system_state: %w", ErrUnknownPlaces, err)
	}
	if le32(b[:]) < 2 {
		return fmt.Errorf("%w: the kernel is still booting, and rewrites its text", ErrNotProbeable)
	}
	k.booted.Store(true)
	return nil
}

// FtraceSite reports whether ftrace may rewrite the instruction at addr, of the
// kernel or of a module, and whether it traces the function now. If the guest starts to
// trace a function with a breakpoint there, ftrace finds a byte that it didn't expect,
// and turns itself off.
func (k *Kernel) FtraceSite(addr uint64) (traced, ok bool) {
	p, err := k.placesOf(addr)
	if err != nil {
		return false, false
	}
	if _, ok := within(p.trace, addr, 1); !ok {
		return false, false
	}
	var b [ftraceSize]byte
	if _, err := k.readText(addr, b[:]); err != nil {
		return false, true
	}
	return b[0] == callRel32, true
}

// FtraceSites returns how many instructions of the kernel ftrace may rewrite, and
// so how many of its functions its own tracers can trace.
func (k *Kernel) FtraceSites() (int, error) {
	if k == nil {
		return 0, ErrNoKernel
	}
	p, err := k.kernelPlaces()
	if err != nil {
		return 0, err
	}
	if p.noTrace != nil {
		return 0, p.noTrace
	}
	return len(p.trace), nil
}

// isFunction rules out symbols of what is no function: the bytes before one, and labels
// of the linker script. Since 6.16 the letters no longer tell code from data.
func isFunction(s sysmap.Symbol) bool {
	return (s.Type|0x20 == 't' || s.Type|0x20 == 'w') &&
		!strings.HasPrefix(s.Name, "__pfx_") && !strings.HasPrefix(s.Name, "__cfi_") &&
		!strings.HasSuffix(s.Name, "text_start") && !strings.HasSuffix(s.Name, "text_end") && s.Name != "_stext" && s.Name != "_text"
}

// Functions returns the functions of the kernel whose names match a pattern (as
// in [path.Match]) and whose first instructions may be probed. It fails if the
// tables that say so aren't known.
func (k *Kernel) Functions(pattern string) (iter.Seq[sysmap.Symbol], error) {
	if _, err := path.Match(pattern, ""); err != nil {
		return nil, fmt.Errorf("%q: %w", pattern, err)
	}
	if k == nil {
		return nil, ErrNoKernel
	}
	p, err := k.kernelPlaces()
	if err != nil {
		return nil, err
	}
	if err := k.booting(); err != nil {
		return nil, err
	}
	if len(p.unknown) > 0 {
		return nil, fmt.Errorf("%w: %w", ErrUnknownPlaces, p.unknown)
	}
	return func(yield func(sysmap.Symbol) bool) {
		for sym := range k.syms.All() {
			if !p.text.has(sym.Addr) || !isFunction(sym) {
				continue
			}
			if ok, _ := path.Match(pattern, sym.Name); ok && k.refused(p, sym.Addr) == nil && !yield(sym) {
				return
			}
		}
	}, nil
}
