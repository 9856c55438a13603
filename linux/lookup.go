package linux

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/vmprobes/vmprobes/sysmap"
)

// A Symbol is what [Kernel.Lookup] found: a symbol of the kernel, or of a module.
type Symbol struct {
	sysmap.Symbol
	// Asked is the name that was looked up. It differs from Name if that is the
	// wrapper of the system call, or if Asked says which of several is meant.
	Asked string
	// Syscall is the name of a system call, as in "openat", if the symbol is its
	// wrapper (__x64_sys_openat, __ia32_compat_sys_openat …), else "". The arguments of a
	// wrapper are where [Wrapper.ArgOffset] says.
	Syscall string

	builtIn string // the module that was asked for, which is a part of the kernel
}

// Note returns what a program should tell its user about the symbol, in a sentence
// without a full stop, or "" if it is what was asked for.
func (s Symbol) Note() string {
	if s.builtIn != "" {
		return fmt.Sprintf("%s is no module of this kernel but a part of it; the kernel's own %s is used", s.builtIn, s.Name)
	}
	if s.Syscall == "" || strings.Contains(s.Asked, s.Name) {
		return ""
	}
	return fmt.Sprintf("this kernel has no %s; %s, the wrapper of the system call, is used: its one argument points to the caller's registers", s.Asked, s.Name)
}

// Lookup finds a symbol of the kernel or of its modules:
//
//   - by its name, as in "do_sys_openat2". The kernel's own come before those of
//     modules.
//   - "module:name", or "name [module]" as in /proc/kallsyms, is that of a module, or the
//     kernel's own if the module is built into it: see [Symbol.Note].
//   - "name@2" is the second, by address, of several symbols of one name. Without
//     the number they are an error that wraps [sysmap.ErrAmbiguous] and lists them.
//   - "sys_openat" is the wrapper __x64_sys_openat in kernels since 4.17, which have
//     no sys_openat: see [Symbol.Note].
//
// If there is no such symbol, the error wraps [sysmap.ErrNotFound] and suggests
// others. Names of symbols are printable ASCII.
func (k *Kernel) Lookup(name string) (Symbol, error) {
	if k == nil {
		return Symbol{}, ErrNoKernel
	}
	sym, err := k.syms.Lookup(name)
	if err == nil || !errors.Is(err, sysmap.ErrNotFound) {
		return found(sym, name), err
	}
	for _, prefix := range []string{"sys_", "SyS_"} {
		call, ok := strings.CutPrefix(name, prefix)
		if !ok {
			continue
		}
		if sym, err := k.syms.Lookup(wrapperPrefix + call); err == nil {
			return found(sym, name), nil
		}
	}
	all, merr := k.AllSymbols()
	if merr != nil {
		all = k.syms
	} else if sym, err = all.Lookup(name); err == nil || !errors.Is(err, sysmap.ErrNotFound) {
		return found(sym, name), err
	}
	if merr == nil {
		if s, ok := k.builtIn(name); ok {
			return s, nil
		}
	}
	return Symbol{}, k.suggest(name, all, err, merr)
}

// builtIn finds "module:name" of a module that is built into the kernel. Each of them
// leaves the place of its init function behind, with a name of its own, in kernels since
// 5.11 (__initcall_id, include/linux/init.h).
func (k *Kernel) builtIn(name string) (Symbol, bool) {
	mod, plain := splitName(name)
	if mod == "" || plain == "" || k.loaded(mod) {
		return Symbol{}, false
	}
	sym, err := k.syms.Lookup(plain)
	if err != nil {
		return Symbol{}, false
	}
	prefix := "__initcall__kmod_" + strings.ReplaceAll(mod, "-", "_") + "__"
	for s := range k.syms.All() {
		if strings.HasPrefix(s.Name, prefix) {
			return Symbol{Symbol: sym, Asked: name, builtIn: mod}, true
		}
	}
	return Symbol{}, false
}

// loaded reports whether a module is loaded.
func (k *Kernel) loaded(mod string) bool {
	mods, err := k.Modules()
	return err == nil && slices.ContainsFunc(mods, func(m Module) bool { return m.Name == mod })
}

func found(sym sysmap.Symbol, asked string) Symbol {
	s := Symbol{Symbol: sym, Asked: asked}
	w, _ := WrapperOf(sym.Name)
	s.Syscall = w.Call
	return s
}

// suggest adds to err, which says that all has no such name, names that it has.
// merr is why all lacks the symbols of modules.
func (k *Kernel) suggest(name string, all *sysmap.Map, err, merr error) error {
	mod, plain := splitName(name)
	if mod != "" && merr == nil {
		if !k.loaded(mod) {
			err = fmt.Errorf("%w; no module %q is loaded", err, mod)
			if _, kerr := k.syms.Lookup(plain); kerr == nil {
				err = fmt.Errorf("%w, and the kernel itself has %s", err, plain)
			}
			return err
		}
	}
	near := all.Suggest(plain)
	if len(near) > 0 {
		err = fmt.Errorf("%w; this kernel has %s", err, strings.Join(near, ", "))
	}
	if merr != nil && (mod != "" || len(near) == 0) {
		err = fmt.Errorf("%w; the symbols of modules are not known: %w", err, merr)
	}
	return err
}

// splitName splits a name as [sysmap.Map.Lookup] takes it.
func splitName(name string) (mod, plain string) {
	if i := strings.LastIndexByte(name, '@'); i > 0 {
		if _, err := strconv.ParseUint(name[i+1:], 10, 32); err == nil {
			name = name[:i]
		}
	}
	if plain, mod, ok := strings.Cut(name, " ["); ok && strings.HasSuffix(mod, "]") {
		return strings.TrimSuffix(mod, "]"), plain
	}
	if mod, plain, ok := strings.Cut(name, ":"); ok {
		return mod, plain
	}
	return "", name
}

// Find returns the symbol of the kernel, or of a module, that holds addr, and the
// offset of addr in it: see [sysmap.Map.Find].
func (k *Kernel) Find(addr uint64) (sym sysmap.Symbol, offset uint64, ok bool) {
	if k == nil {
		return sym, 0, false
	}
	if sym, offset, ok = k.syms.Find(addr); ok {
		return sym, offset, true
	}
	all, err := k.AllSymbols()
	if err != nil {
		k.log.Debug("symbols of modules", "err", err)
		return sym, 0, false
	}
	return all.Find(addr)
}

// FuncEnd returns an upper bound for the end of the function of the kernel, or of a
// module, that addr is in: see [sysmap.Map.FuncEnd].
func (k *Kernel) FuncEnd(addr uint64) (uint64, bool) {
	if k == nil {
		return 0, false
	}
	if end, ok := k.syms.FuncEnd(addr); ok {
		return end, true
	}
	all, err := k.AllSymbols()
	if err != nil {
		k.log.Debug("symbols of modules", "err", err)
		return 0, false
	}
	return all.FuncEnd(addr)
}
