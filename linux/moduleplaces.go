package linux

import (
	"errors"
	"fmt"
	"slices"

	"github.com/vmprobes/vmprobes/ktype"
	"github.com/vmprobes/vmprobes/sysmap"
)

// modulePlaces returns what is known of the text of the module that addr is in, or
// nil if it is in none that runs. Nothing of it is kept: a module may be unloaded at
// any time, and another one be at its place.
func (k *Kernel) modulePlaces(addr uint64) (*places, error) {
	for range listTries {
		m, ok, err := k.moduleAt(addr)
		if err != nil || !ok {
			return nil, err
		}
		p, err := k.begin("places for probes in modules").readModulePlaces(m)
		// What was read is of m only if m is still there.
		if now, ok, merr := k.moduleAt(addr); merr != nil {
			return nil, merr
		} else if ok && now == m {
			return p, err
		}
	}
	return nil, fmt.Errorf("the list of modules keeps changing: tried %d times", listTries)
}

// moduleAt returns the live module whose text holds addr. The kernel may rewrite or
// free any part of a module that is being loaded or unloaded.
func (k *Kernel) moduleAt(addr uint64) (Module, bool, error) {
	mods, err := k.Modules()
	if err != nil {
		return Module{}, false, err
	}
	i := slices.IndexFunc(mods, func(m Module) bool {
		return m.State == ModuleLive && addr >= m.Base && addr-m.Base < m.text
	})
	if i >= 0 {
		return mods[i], true, nil
	}
	if len(mods) > 0 && !slices.ContainsFunc(mods, func(m Module) bool { return m.text > 0 }) {
		return Module{}, false, fmt.Errorf("where the text of modules is can't be told: %w", ErrNoTypes)
	}
	return Module{}, false, nil
}

// readModulePlaces reads the tables that a module's struct module points to
// (include/linux/module.h).
func (o *op) readModulePlaces(m Module) (*places, error) {
	types, err := o.Types()
	if err != nil {
		return nil, err
	}
	p := &places{module: m.Name, text: span{start: m.Base, end: m.Base + m.text}}
	v := types.At(o, "module", m.Addr)
	// The kernel writes the operands of a live patch when the module that it is for
	// is loaded (klp_apply_object_relocs, kernel/livepatch/core.c).
	if klp, err := optional(v.Field("klp").Bool()); err != nil {
		return nil, err
	} else if klp {
		p.spans = append(p.spans, span{p.text.start, p.text.end, "a live patch, whose references the kernel writes while it runs"})
	}
	for _, t := range tables {
		_, err := t.module(o, p, v)
		if err == nil || (errors.Is(err, ktype.ErrNoField) || errors.Is(err, sysmap.ErrNotFound)) && !o.has(t.users) {
			continue
		}
		err = fmt.Errorf("the table of %s of module %q: %w", t.name, m.Name, err)
		p.unknown = append(p.unknown, err)
		if t.name == ftraceTable {
			p.noTrace = err
		}
	}
	if base, table, err := o.moduleTable(v, "extable", "num_exentries", exTableEntry); err != nil {
		p.noFaults = fmt.Errorf("the exception table of module %q: %w", m.Name, err)
	} else {
		p.add(base, table, exTableEntry, 0)
	}
	p.sort()
	return p, nil
}

// moduleTable reads an array whose address and length are in struct module.
func (o *op) moduleTable(v ktype.Value, field, count string, entry uint64) (base uint64, table []byte, err error) {
	n, err := v.Field(count).Uint()
	if err != nil {
		return 0, nil, err
	}
	if base, err = v.Field(field).Pointer(); err != nil || n == 0 {
		return base, nil, err
	}
	if n > maxModuleTable/entry {
		return 0, nil, fmt.Errorf("%s is %d, at most %d are read: %w", count, n, maxModuleTable/entry, ErrBadKernel)
	}
	if table, err = o.table(field, base, n*entry, maxModuleTable); err != nil {
		return 0, nil, err
	}
	return base, table, nil
}

func (o *op) moduleSites(p *places, v ktype.Value, field, count string, entry uint64, kind siteKind) (int, error) {
	base, table, err := o.moduleTable(v, field, count, entry)
	if err != nil {
		return 0, err
	}
	return p.add(base, table, entry, kind), nil
}

func (o *op) moduleJumpLabels(p *places, v ktype.Value) (int, error) {
	return o.moduleSites(p, v, "jump_entries", "num_jump_entries", o.jumpEntry(), jumpLabel)
}

func (o *op) moduleStaticCalls(p *places, v ktype.Value) (int, error) {
	return o.moduleSites(p, v, "static_call_sites", "num_static_call_sites", staticCallSite, staticCall)
}

// moduleFtrace reads where a module's functions call __fentry__. ftrace makes its
// records from that list, which unlike them can be read for one module alone.
func (o *op) moduleFtrace(p *places, v ktype.Value) (int, error) {
	long := o.bits / 8
	_, table, err := o.moduleTable(v, "ftrace_callsites", "num_ftrace_callsites", uint64(long))
	if err != nil {
		return 0, err
	}
	for ; len(table) >= long; table = table[long:] {
		if addr := word(table, long); p.text.has(addr) {
			p.trace = append(p.trace, site{addr, ftraceSite})
		}
	}
	return len(p.trace), nil
}

// moduleLocks reads the kernel's list of what it may rewrite in modules.
func (o *op) moduleLocks(p *places, _ ktype.Value) (int, error) { return o.readLocks(p) }

// moduleBlacklist reads which parts of a module are on the kernel's blacklist, which the
// kernel adds when it loads the module (add_module_kprobe_blacklist, kernel/kprobes.c),
// and the module's own sections of that kind.
func (o *op) moduleBlacklist(p *places, v ktype.Value) (int, error) {
	for _, r := range []struct{ start, size, why string }{
		{"kprobes_text_start", "kprobes_text_size", "code that kprobes itself runs"},
		{"noinstr_text_start", "noinstr_text_size", "code that must not be instrumented (noinstr)"},
	} {
		start, err := optional(v.Field(r.start).Pointer())
		if err != nil {
			return 0, err
		}
		size, err := optional(v.Field(r.size).Uint())
		if err != nil {
			return 0, err
		}
		if start == 0 || size == 0 {
			continue
		}
		if !p.text.has(start) || size > p.text.end-start {
			return 0, fmt.Errorf("%s at %#x, %d bytes: %w", r.start, start, size, ErrBadKernel)
		}
		p.spans = append(p.spans, span{start, start + size, r.why})
	}
	return o.readBlacklist(p)
}
