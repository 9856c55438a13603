package linux

import (
	"errors"
	"fmt"
	"slices"

	"github.com/vmprobes/vmprobes/ktype"
	"github.com/vmprobes/vmprobes/sysmap"
)

// Int3s are the breakpoints that a kernel has in code by its own doing.
type Int3s struct {
	// Addrs has the address of each, in order: of the guest's kprobes, of its kernel
	// debugger, and of what it is rewriting at this moment. Not each of them need be
	// there: an optimized kprobe is a jump.
	Addrs []uint64
	// Rewriting, if not nil, says that the kernel is rewriting its code at this moment,
	// and why it isn't known where. See [Kernel.Rewriting].
	Rewriting error
}

// Bounds of what is read. kgdb has room for 1000 breakpoints (KGDB_MAX_BREAKPOINTS,
// include/linux/kgdb.h), and a page of 16-byte struct text_poke_loc is rewritten at once
// (TP_VEC_MAX, arch/x86/kernel/alternative.c).
const (
	kprobeBuckets = 64 // KPROBE_TABLE_SIZE (kernel/kprobes.c)
	maxKprobes    = 1 << 16
	maxKGDB       = 1000
	maxPokes      = 256
)

// Int3s returns where the kernel has breakpoints of its own, so that they can be told
// from somebody else's. It fails if the kernel can have some and doesn't show where. The
// answer holds while the guest is stopped.
func (k *Kernel) Int3s() (Int3s, error) {
	var own Int3s
	if k == nil {
		return own, ErrNoKernel
	}
	o := k.begin("the kernel's own breakpoints")
	if err := o.kprobes(&own); err != nil {
		return own, fmt.Errorf("the guest's kprobes: %w", err)
	}
	if err := o.kgdb(&own); err != nil {
		return own, fmt.Errorf("the breakpoints of the guest's kgdb: %w", err)
	}
	if k.Rewriting() {
		if err := o.pokes(&own); err != nil {
			own.Rewriting = fmt.Errorf("the kernel is rewriting its code: %w", err)
		}
	}
	// Before 5.8 ftrace put int3s at all its sites at once (arch/x86/kernel/ftrace.c).
	var busy [4]byte
	if at, err := o.symbol("modifying_ftrace_code"); err == nil && (o.Read(at, busy[:]) != nil || le32(busy[:]) != 0) {
		own.Rewriting = errors.Join(own.Rewriting, errors.New("ftrace is rewriting the kernel's code"))
	}
	slices.Sort(own.Addrs)
	own.Addrs = slices.Compact(own.Addrs)
	return own, nil
}

// kprobes reads kprobe_table (kernel/kprobes.c): lists of struct kprobe, each of which
// is there before its int3 is, and until that has gone.
func (o *op) kprobes(own *Int3s) error {
	table, err := o.symbol("kprobe_table")
	if err != nil {
		if errors.Is(err, sysmap.ErrNotFound) && !o.has([]string{"register_kprobe"}) {
			return nil
		}
		return err
	}
	word := uint64(o.bits / 8)
	var probes []uint64
	for b := range uint64(kprobeBuckets) {
		at, err := o.pointer(table + b*word)
		for ; err == nil && at != 0; at, err = o.pointer(at) { // hlist_node begins with next
			if len(probes) == maxKprobes {
				return fmt.Errorf("more than %d: %w", maxKprobes, ErrBadKernel)
			}
			probes = append(probes, at)
		}
		if err != nil {
			return err
		}
	}
	if len(probes) == 0 {
		return nil
	}
	addr := 5 * word // behind hlist, list and nmissed (include/linux/kprobes.h, since 2.6.24)
	if t, err := o.Types(); err == nil && t.HasField("kprobe.addr") && t.HasField("kprobe.hlist") {
		a, err := t.Offset("kprobe.addr")
		if err != nil {
			return err
		}
		h, err := t.Offset("kprobe.hlist")
		if err != nil {
			return err
		}
		if h.Offset != 0 || a.Offset > 4096 {
			return fmt.Errorf("struct kprobe: %w", ErrBadKernel)
		}
		addr = a.Offset
	}
	for _, p := range probes {
		a, err := o.pointer(p + addr)
		if err != nil {
			return err
		}
		own.Addrs = append(own.Addrs, a)
	}
	return nil
}

// kgdb reads kgdb_break (kernel/debug/debug_core.c): struct kgdb_bkpt { unsigned long
// bpt_addr; unsigned char saved_instr[1]; enum type, state }, of which state is 0 in
// those that were never used (include/linux/kgdb.h).
func (o *op) kgdb(own *Int3s) error {
	table, err := o.symbol("kgdb_break")
	if err != nil {
		if errors.Is(err, sysmap.ErrNotFound) && !o.has([]string{"kgdb_register_io_module"}) {
			return nil
		}
		return err
	}
	const size, state = 24, 16
	if o.bits != 64 {
		return fmt.Errorf("of %d bits: %w", o.bits, errors.ErrUnsupported)
	}
	b, err := o.table("kgdb_break", table, maxKGDB*size, maxKGDB*size)
	if err != nil {
		return err
	}
	for ; len(b) > 0; b = b[size:] {
		if le32(b[state:]) != 0 {
			own.Addrs = append(own.Addrs, le64(b))
		}
	}
	return nil
}

// pokes reads what text_poke_bp_batch is at (arch/x86/kernel/alternative.c): bp_desc, and
// behind its vec the places, as distances from _stext. While refs isn't 0 there may be an
// int3 at each.
func (o *op) pokes(own *Int3s) error {
	desc, err := o.symbol("bp_desc")
	if err != nil {
		return err
	}
	stext, err := o.symbol("_stext")
	if err != nil {
		return err
	}
	t, err := o.Types()
	if err != nil {
		return err
	}
	refs, vec, n, err := o.pokeDesc(t, desc)
	if err != nil || refs == 0 {
		return err
	}
	if n > maxPokes {
		return fmt.Errorf("%d places at once: %w", n, ErrBadKernel)
	}
	rel, err := t.Offset("text_poke_loc.rel_addr")
	if err != nil {
		return err
	}
	size, err := t.Sizeof("text_poke_loc")
	if err != nil || size < 4 || size > 64 || rel.Offset > size-4 {
		return errors.Join(fmt.Errorf("struct text_poke_loc of %d bytes: %w", size, ErrBadKernel), err)
	}
	b, err := o.table("text_poke_loc", vec, n*size, maxPokes*64)
	if err != nil {
		return err
	}
	for ; len(b) > 0; b = b[size:] {
		own.Addrs = append(own.Addrs, stext+uint64(int64(int32(le32(b[rel.Offset:])))))
	}
	return nil
}

// pokeDesc reads a struct bp_patching_desc.
func (o *op) pokeDesc(t *ktype.Types, at uint64) (refs, vec, n uint64, err error) {
	v := t.At(o, "bp_patching_desc", at)
	if refs, err = v.Field("refs").Field("counter").Uint(); err != nil {
		return 0, 0, 0, err
	}
	if vec, err = v.Field("vec").Pointer(); err != nil {
		return 0, 0, 0, err
	}
	n, err = v.Field("nr_entries").Uint()
	return refs, vec, n, err
}
