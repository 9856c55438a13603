package vmprobes

import (
	"errors"
	"fmt"

	"github.com/vmprobes/vmprobes/sysmap"
)

// maxMatches bounds the functions of one RegisterMatching: each is decoded, and has a breakpoint.
// Tests change it.
var maxMatches = 20000

// RegisterMatching registers a probe at each function whose name matches a pattern as in
// [path.Match]: one of the kernel's own, or of a module's for "module:pattern". The guest is
// stopped once for all of them.
//
// newProbe makes the probe for a function. It may be that of a [ReturnProbe]; nil leaves the
// function out. A Symbol or Addr that it doesn't set is set, and Symbol is what it is called
// with, as in "vfs_read" or "xfs:xfs_inactive". Where several functions have that name each has a
// probe by its Addr, with Symbol empty and the name in Name, if that is empty. A function that
// has several names has one probe.
//
// It returns the probes that are registered, and of the others why not, by the function's
// name, or by NAME@ADDRESS where several have it. An error says that there are none: no function
// matches (ErrSymbolNotFound), or more than 20,000 do.
func (s *Session) RegisterMatching(pattern string, newProbe func(symbol string) *Probe) (probes []*Probe, refused map[string]error, err error) {
	found, err := s.matching(pattern)
	if err != nil {
		return nil, nil, &Error{Op: "register", Domain: s.name, Probe: pattern, Err: err}
	}
	var all []*Probe
	var names []string
	for _, f := range found {
		if p := newProbe(f.symbol); p != nil {
			all, names = append(all, p), append(names, f.name(p))
		}
	}
	refused = make(map[string]error)
	for i, err := range s.RegisterEach(all...) {
		switch {
		case err == nil:
			probes = append(probes, all[i])
		case errors.Is(err, ErrClosed):
			return nil, nil, &Error{Op: "register", Domain: s.name, Probe: pattern, Err: ErrClosed}
		default:
			refused[names[i]] = err
		}
	}
	return probes, refused, nil
}

// match is a function that a pattern matches.
type match struct {
	symbol string // as Probe.Symbol has it
	addr   Addr
	shared bool // other functions have this name, too
}

// matching returns the functions that a pattern matches.
func (s *Session) matching(pattern string) ([]match, error) {
	if s.kernel == nil {
		return nil, s.noKernel()
	}
	syms, err := s.kernel.FunctionsNamed(pattern)
	if err != nil {
		return nil, err
	}
	if len(syms) > maxMatches {
		return nil, fmt.Errorf("%d functions match, of %d at most", len(syms), maxMatches)
	}
	found := make([]match, len(syms))
	times := make(map[string]int)
	for i, sym := range syms {
		found[i] = match{symbol: symbolOf(sym), addr: sym.Addr}
		times[found[i].symbol]++
	}
	for i := range found {
		f := &found[i]
		// Something else may have the name, such as a variable.
		sym, err := s.kernel.Lookup(f.symbol)
		f.shared = times[f.symbol] > 1 || err != nil || sym.Addr != f.addr
	}
	return found, nil
}

// symbolOf is a symbol's name as Lookup takes it.
func symbolOf(sym sysmap.Symbol) string {
	if sym.Module != "" {
		return sym.Module + ":" + sym.Name
	}
	return sym.Name
}

// name has p be at f, and returns what f is called.
func (f *match) name(p *Probe) string {
	if !f.shared {
		if p.Symbol == "" && p.Addr == 0 {
			p.Symbol = f.symbol
		}
		return f.symbol
	}
	if p.Symbol == f.symbol {
		p.Symbol = ""
	}
	if p.Symbol == "" && p.Addr == 0 {
		p.Addr = f.addr
		if p.Name == "" {
			p.Name = f.symbol
		}
	}
	return fmt.Sprintf("%s@%#x", f.symbol, f.addr)
}
