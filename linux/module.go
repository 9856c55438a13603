package linux

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/vmprobes/vmprobes/ktype"
	"github.com/vmprobes/vmprobes/sysmap"
)

// A Module is a loaded kernel module.
type Module struct {
	Addr  uint64 // of its struct module
	Name  string
	Base  uint64 // of its text, as /proc/modules shows it
	Size  uint64 // in bytes, of all its parts, as /proc/modules shows it
	State ModuleState

	// Unknown says which of Base, Size and State are not known, as the types lack them.
	// They are zero then, which says nothing.
	Unknown Fields

	text uint64 // size of the text, from Base on; 0 if it isn't known
}

// ModuleState is enum module_state (include/linux/module.h).
type ModuleState int

// Module states.
const (
	ModuleLive     ModuleState = iota // normal
	ModuleComing                      // set up, runs its init
	ModuleGoing                       // going away
	ModuleUnformed                    // still setting it up
)

// String returns the state as /proc/modules shows it.
func (s ModuleState) String() string {
	switch s {
	case ModuleLive:
		return "Live"
	case ModuleComing:
		return "Loading"
	case ModuleGoing:
		return "Unloading"
	}
	return "Unknown"
}

// Bounds. A module's name has at most 55 bytes (MODULE_NAME_LEN). It has one part for
// each member of enum mod_mem_type, which are 7 in 6.12.
const (
	maxModules     = 1 << 12
	maxModuleSize  = 1 << 30
	maxModuleParts = 16
	maxModuleSyms  = 1 << 18
	maxSymbolName  = 512 // KSYM_NAME_LEN since 6.1
)

// Modules returns the loaded modules, in the order of /proc/modules, the latest first.
// Without types, only their names and the addresses of their struct module are known:
// see [Module.Unknown].
// With an error it returns all that can be read.
func (k *Kernel) Modules() ([]Module, error) {
	head, err := k.symbol("modules")
	if err != nil {
		return nil, err
	}
	types, err := k.moduleTypes()
	if err != nil {
		return nil, err
	}
	o := k.begin("modules")
	member, err := types.Offset("module.list")
	if err != nil {
		return nil, err
	}
	return again(o, func() ([]Module, error) {
		var mods []Module
		var bad faulty
		for at, err := range types.List(o, head, "module", "list", maxModules) {
			if err != nil {
				return mods, bad.with(err)
			}
			m, err := o.module(types, at)
			if err != nil {
				if o.spent != nil || o.linkedAt(at+member.Offset) {
					bad.add(fmt.Errorf("module at %#x: %w", at, err))
				}
				continue // or gone meanwhile
			}
			if m.State != ModuleUnformed {
				mods = append(mods, m)
			}
		}
		return mods, bad.with(nil)
	})
}

// moduleTypes returns types that have at least the list of modules and their names.
func (k *Kernel) moduleTypes() (*ktype.Types, error) {
	t, err := k.Types()
	if err == nil {
		if _, err = t.Offset("module.list"); err == nil {
			return t, nil
		}
	}
	if k.bits != 64 {
		return nil, err
	}
	return ktype.New("usual layout", 8, listHead(8), usualModule)
}

// usualModule is where struct module's list and name are on every 64-bit kernel
// from 5.10 to 7.3: modules can be listed without types.
var usualModule = ktype.Struct{Name: "module", Size: 64, Fields: []ktype.StructField{
	{Name: "list", Offset: 8, Type: "list_head"},
	{Name: "name", Offset: 24, Type: "char[40]"},
}}

// listHead is struct list_head (include/linux/types.h).
func listHead(word uint64) ktype.Struct {
	return ktype.Struct{Name: "list_head", Size: 2 * word, Fields: []ktype.StructField{
		{Name: "next", Offset: 0, Type: "list_head *"},
		{Name: "prev", Offset: word, Type: "list_head *"},
	}}
}

func (o *op) module(types *ktype.Types, at uint64) (m Module, err error) {
	m.Addr = at
	v := types.At(o, "module", at)
	if m.Name, err = v.Field("name").CString(); err != nil {
		return m, err
	}
	switch state, err := v.Field("state").Int(); {
	case err == nil:
		m.State = ModuleState(state)
	case lacking(err) != nil:
		return m, err
	default:
		m.Unknown |= FieldState
	}
	// module.mem[] since 6.4 (ac3b43283923), core_layout since 4.5, and
	// module_core before.
	switch mem := v.Field("mem"); {
	case mem.Err() == nil:
		for i := range min(mem.Len(), maxModuleParts) {
			part := mem.Index(i)
			base, err := part.Field("base").Pointer()
			if err != nil {
				return m, err
			}
			size, err := part.Field("size").Uint()
			if err != nil {
				return m, err
			}
			if i == 0 { // MOD_TEXT
				m.Base, m.text = base, size
			}
			m.Size += size
		}
	case v.Field("core_layout").Err() == nil:
		if m.Base, err = v.Field("core_layout.base").Pointer(); err != nil {
			return m, err
		}
		core, err := v.Field("core_layout.size").Uint()
		if err != nil {
			return m, err
		}
		init, err := v.Field("init_layout.size").Uint()
		if err != nil {
			return m, err
		}
		m.Size = core + init
		if m.text, err = v.Field("core_layout.text_size").Uint(); err != nil {
			return m, err
		}
	case v.Field("module_core").Err() == nil:
		if m.Base, err = v.Field("module_core").Pointer(); err != nil {
			return m, err
		}
		if m.Size, err = v.Field("core_size").Uint(); err != nil {
			return m, err
		}
		if m.text, err = v.Field("core_text_size").Uint(); err != nil {
			return m, err
		}
	default:
		m.Unknown |= FieldBase | FieldSize
	}
	if m.Size > maxModuleSize {
		return m, fmt.Errorf("module %q of %d bytes: %w", m.Name, m.Size, ErrBadKernel)
	}
	return m, nil
}

// ModuleSymbols returns the symbols of every loaded module, as /proc/kallsyms
// shows them.
func (k *Kernel) ModuleSymbols() ([]sysmap.Symbol, error) {
	mods, err := k.Modules()
	if err != nil {
		return nil, err
	}
	o := k.begin("symbols of modules")
	var all []sysmap.Symbol
	for _, m := range mods {
		syms, err := o.symbolsOf(m)
		if err != nil {
			if now, lerr := k.Modules(); lerr == nil && !slices.Contains(now, m) {
				continue // unloaded meanwhile
			}
			return all, fmt.Errorf("module %q: %w", m.Name, err)
		}
		if all = append(all, syms...); len(all) > maxModuleSyms {
			return nil, fmt.Errorf("more than %d symbols of modules: %w", maxModuleSyms, ErrBadKernel)
		}
	}
	return all, nil
}

// AllSymbols returns the kernel's symbols with those of the modules that are
// loaded now. It reads the latter again only if the list of modules has changed.
func (k *Kernel) AllSymbols() (*sysmap.Map, error) {
	mods, err := k.Modules()
	if err != nil {
		return nil, err
	}
	k.modMu.Lock()
	defer k.modMu.Unlock()
	if k.withMods == nil || !slices.Equal(mods, k.mods) {
		syms, err := k.ModuleSymbols()
		if err != nil {
			return nil, err
		}
		k.withMods, k.mods = k.syms.With(syms), mods
	}
	return k.withMods, nil
}

// symbolsOf reads struct mod_kallsyms (include/linux/module.h): an ELF symbol
// table, its strings, and the letters that nm would print.
func (o *op) symbolsOf(m Module) ([]sysmap.Symbol, error) {
	types, err := o.Types()
	if err != nil {
		return nil, err
	}
	v := types.At(o, "module", m.Addr).Field("kallsyms").Deref()
	symtab, err := v.Field("symtab").Pointer()
	if err != nil {
		return nil, err
	}
	strtab, err := v.Field("strtab").Pointer()
	if err != nil {
		return nil, err
	}
	count, err := v.Field("num_symtab").Uint()
	if err != nil {
		return nil, err
	}
	if count > maxModuleSyms {
		return nil, fmt.Errorf("%d symbols: %w", count, ErrBadKernel)
	}
	var letters []byte
	typetab, err := v.Field("typetab").Pointer() // since 5.2 (1c7651f43777)
	switch {
	case err == nil:
		letters, err = o.table("typetab", typetab, count, maxModuleSyms)
	case errors.Is(err, ktype.ErrNoField):
		letters, err = make([]byte, count), nil
	}
	if err != nil {
		return nil, err
	}
	exported, err := o.exports(m)
	if err != nil {
		return nil, err
	}
	// Elf64_Sym: name, info, other, shndx, value, size; Elf32_Sym has the value
	// and the size before info.
	entry, shndx, value := uint64(24), 6, 8
	if o.bits == 32 {
		entry, shndx, value = 16, 14, 4
	}
	table, err := o.table("symtab", symtab, count*entry, maxModuleSyms*entry)
	if err != nil {
		return nil, err
	}
	var syms []sysmap.Symbol
	for i := range count {
		e := table[i*entry:]
		name, section := le32(e), binary.LittleEndian.Uint16(e[shndx:])
		if i == 0 || section == 0 || name == 0 {
			continue
		}
		s := sysmap.Symbol{Type: letters[i], Module: m.Name}
		if s.Addr = uint64(le32(e[value:])); o.bits == 64 {
			s.Addr = le64(e[value:])
		}
		if s.Name, err = o.str(strtab+uint64(name), maxSymbolName); err != nil {
			return nil, err
		}
		if s.Name == "" {
			continue
		}
		if s.Type == 0 {
			s.Type = letters[i] | e[4]
		}
		s.Type = lower(s.Type)
		if exported[export{s.Addr, s.Name}] {
			s.Type = upper(s.Type)
		}
		syms = append(syms, s)
	}
	return syms, nil
}

// export is a symbol that a module exports.
type export struct {
	addr uint64
	name string
}

// exports reads a module's table of struct kernel_symbol, whose members are
// distances from themselves (CONFIG_HAVE_ARCH_PREL32_RELOCATIONS; x86 since 4.19,
// include/linux/export.h). /proc/kallsyms shows what is in it in capitals, but not
// what is exported to GPL modules only (is_exported, kernel/module/kallsyms.c).
func (o *op) exports(m Module) (map[export]bool, error) {
	types, err := o.Types()
	if err != nil {
		return nil, err
	}
	valueOff, err := types.Offset("kernel_symbol.value_offset")
	if err != nil {
		return nil, nil //nolint:nilerr // older, or without such tables: nothing is in capitals
	}
	nameOff, err := types.Offset("kernel_symbol.name_offset")
	if err != nil {
		return nil, err
	}
	entry, err := types.Sizeof("kernel_symbol")
	if err != nil || entry < 8 || entry > 64 || valueOff.Offset > entry-4 || nameOff.Offset > entry-4 {
		return nil, fmt.Errorf("struct kernel_symbol of %d bytes: %w", entry, ErrBadKernel)
	}
	v := types.At(o, "module", m.Addr)
	base, err := v.Field("syms").Pointer()
	if err != nil {
		return nil, err
	}
	count, err := v.Field("num_syms").Uint()
	if err != nil {
		return nil, err
	}
	if count > maxModuleSyms {
		return nil, fmt.Errorf("%d exports: %w", count, ErrBadKernel)
	}
	table, err := o.table("exports", base, count*entry, maxModuleSyms*entry)
	if err != nil {
		return nil, err
	}
	relative := func(off uint64) uint64 {
		return base + off + uint64(int64(int32(le32(table[off:]))))
	}
	found := make(map[export]bool, count)
	for off := uint64(0); off < uint64(len(table)); off += entry {
		name, err := o.str(relative(off+nameOff.Offset), maxSymbolName)
		if err != nil {
			return nil, err
		}
		found[export{relative(off + valueOff.Offset), name}] = true
	}
	return found, nil
}

func upper(c byte) byte {
	if c >= 'a' && c <= 'z' {
		c -= 'a' - 'A'
	}
	return c
}

func lower(c byte) byte {
	if c >= 'A' && c <= 'Z' {
		c += 'a' - 'A'
	}
	return c
}

// maxModuleBTF bounds the types of one module; xfs has 300 KB.
const maxModuleBTF = 16 << 20

// ModuleTypes returns the kernel's types with those of the named modules, or of
// all that are loaded if none is named (CONFIG_DEBUG_INFO_BTF_MODULES). A module
// without types is left out.
func (k *Kernel) ModuleTypes(names ...string) (*ktype.Types, error) {
	base, err := k.Types()
	if err != nil {
		return nil, err
	}
	head, err := k.symbol("btf_modules")
	if err != nil {
		return nil, fmt.Errorf("types of modules: %w: modules carry them since 5.11, with CONFIG_DEBUG_INFO_BTF_MODULES (%w)", ErrNoTypes, err)
	}
	o := k.begin("types of modules")
	type btf struct {
		name string
		data []byte
	}
	found, err := again(o, func() ([]btf, error) {
		var found []btf
		for at, err := range base.List(o, head, "btf_module", "list", maxModules) {
			if err != nil {
				return nil, err
			}
			v := base.At(o, "btf_module", at)
			name, err := v.Field("module.name").CString()
			if err != nil {
				return nil, err
			}
			if len(names) > 0 && !slices.Contains(names, name) {
				continue
			}
			data, err := v.Field("btf.data").Pointer()
			if err != nil {
				return nil, err
			}
			n, err := v.Field("btf.data_size").Uint()
			if err != nil {
				return nil, err
			}
			blob, err := o.table("types", data, n, maxModuleBTF)
			if err == nil {
				err = checkNames(blob)
			}
			if err != nil {
				return nil, fmt.Errorf("module %q: %w", name, err)
			}
			found = append(found, btf{name, blob})
		}
		return found, nil
	})
	if err != nil {
		return nil, fmt.Errorf("types of modules: %w", err)
	}
	types := base
	for _, b := range found {
		if types, err = types.WithModule(b.name, b.data); err != nil {
			return nil, fmt.Errorf("types of module %q: %w", b.name, err)
		}
	}
	return types, nil
}
