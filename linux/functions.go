package linux

import (
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/vmprobes/vmprobes/sysmap"
)

// FunctionsNamed returns the functions of the kernel whose names match a pattern (as in
// [path.Match]), or, by "module:pattern", those of a module that is loaded, in order of their
// addresses. It doesn't matter whether they may be probed: see [Kernel.Functions]. A function
// that has several names is there once, with the first one that matches; several functions may
// have the same name. What the compiler split off a function as .cold is none: nothing calls it.
//
// If there is none, the error wraps [sysmap.ErrNotFound].
func (k *Kernel) FunctionsNamed(pattern string) ([]sysmap.Symbol, error) {
	if k == nil {
		return nil, ErrNoKernel
	}
	mod, names := splitName(pattern)
	if _, err := path.Match(names, ""); err != nil {
		return nil, fmt.Errorf("%q: %w", names, err)
	}
	syms, text, err := k.functionsOf(mod)
	if err != nil {
		return nil, err
	}
	var found []sysmap.Symbol
	for sym := range syms.All() {
		if sym.Module != mod || !text.has(sym.Addr) || !isFunction(sym) || isCold(sym.Name) {
			continue
		}
		if n := len(found); n > 0 && found[n-1].Addr == sym.Addr {
			continue
		}
		if ok, _ := path.Match(names, sym.Name); ok {
			found = append(found, sym)
		}
	}
	if len(found) == 0 {
		return nil, fmt.Errorf("%q: %w: no function has such a name", pattern, sysmap.ErrNotFound)
	}
	return found, nil
}

// functionsOf returns the symbols that those of a module are among, or the kernel's own for "",
// and where its text is.
func (k *Kernel) functionsOf(mod string) (*sysmap.Map, span, error) {
	if mod == "" {
		start, size, err := k.section("_stext", "_etext", 1<<30)
		return k.syms, span{start: start, end: start + size}, err
	}
	syms, err := k.AllSymbols()
	if err != nil {
		return nil, span{}, fmt.Errorf("the symbols of modules are not known: %w", err)
	}
	mods, err := k.Modules()
	if err != nil {
		return nil, span{}, err
	}
	i := slices.IndexFunc(mods, func(m Module) bool { return m.Name == mod })
	if i < 0 {
		return nil, span{}, fmt.Errorf("%w: no module %q is loaded", sysmap.ErrNotFound, mod)
	}
	return syms, span{start: mods[i].Base, end: mods[i].Base + mods[i].text}, nil
}

// isCold reports whether a name is of the .cold part of a function.
func isCold(name string) bool {
	_, part, _ := strings.Cut(name, ".cold")
	return strings.Contains(name, ".cold") && strings.Trim(part, ".0123456789") == ""
}
