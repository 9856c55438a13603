package vmprobes

import (
	"errors"
	"fmt"
	"strings"

	"github.com/vmprobes/vmprobes/linux"
	"github.com/vmprobes/vmprobes/sysmap"
)

// Lookup returns the address of a guest kernel symbol.
func (s *Session) Lookup(symbol string) (Addr, error) {
	a, err := s.lookup(symbol)
	return a, s.fail("lookup", nil, err)
}

func (s *Session) lookup(symbol string) (Addr, error) {
	if s.syms == nil {
		return 0, s.symErr
	}
	sym, err := s.syms.Lookup(symbol)
	if err == nil {
		return Addr(sym.Addr), nil
	}
	if !errors.Is(err, sysmap.ErrNotFound) {
		return 0, err
	}
	// sys_NAME was the function of a system call until Linux 4.17; since then
	// that is a wrapper around it.
	for _, prefix := range []string{"sys_", "SyS_"} {
		if name, ok := strings.CutPrefix(symbol, prefix); ok {
			if sym, err := s.syms.Lookup("__x64_sys_" + name); err == nil {
				s.log.Warn("symbol isn't in this kernel, its system call wrapper is used: read arguments with Regs.SyscallArg",
					"symbol", symbol, "wrapper", sym.Name)
				return Addr(sym.Addr), nil
			}
		}
	}
	if all := s.allSymbols(); all != s.syms {
		if sym, merr := all.Lookup(symbol); merr == nil || !errors.Is(merr, sysmap.ErrNotFound) {
			return Addr(sym.Addr), merr
		}
	}
	if near := s.syms.Suggest(symbol); len(near) > 0 {
		return 0, fmt.Errorf("%w; this kernel has %s", err, strings.Join(near, ", "))
	}
	return 0, err
}

// Symbolize returns the symbol that holds addr, and the offset of addr in it.
func (s *Session) Symbolize(addr Addr) (name string, offset uint64, ok bool) {
	sym, off, ok := s.find(uint64(addr))
	return sym.Name, off, ok
}

// kernel returns what is known of the guest's kernel, or nil.
func (s *Session) kernel() *linux.Kernel {
	if s.guest == nil {
		return nil
	}
	return s.guest.Linux()
}

// text is the guest's kernel text without breakpoints of the Session.
func (s *Session) text(syms *sysmap.Map) linux.Text {
	return linux.Text{Symbols: syms, Read: s.ReadMemory}
}

// find returns the symbol of the kernel, or of a module, that holds addr.
func (s *Session) find(addr uint64) (sysmap.Symbol, uint64, bool) {
	if s.syms == nil {
		return sysmap.Symbol{}, 0, false
	}
	sym, off, ok := s.syms.Find(addr)
	if ok {
		return sym, off, ok
	}
	return s.allSymbols().Find(addr)
}

// allSymbols returns the kernel's symbols with those of its modules, if these can
// be read.
func (s *Session) allSymbols() *sysmap.Map {
	k := s.kernel()
	if k == nil {
		return s.syms
	}
	all, err := k.AllSymbols()
	if err != nil {
		s.log.Debug("symbols of modules", "err", err)
		return s.syms
	}
	return all
}

// resolve returns the address of a probe.
func (s *Session) resolve(p *Probe) (Addr, error) {
	if err := p.checkPlace(); err != nil {
		return 0, err
	}
	addr := p.Addr
	if p.Symbol != "" {
		var err error
		if addr, err = s.lookup(p.Symbol); err != nil {
			return 0, err
		}
	}
	addr += Addr(p.Offset)
	boundary := s.boundary(uint64(addr))
	if errors.Is(boundary, ErrNotBoundary) {
		return 0, boundary
	}
	if err := s.allowed(uint64(addr)); err != nil {
		return 0, err
	}
	if boundary != nil && s.careful() {
		return 0, fmt.Errorf("%w: %s", boundary, insist)
	}
	return addr, nil
}

// allowed asks the guest's own lists whether a probe may be at addr. What they don't
// tell is refused.
func (s *Session) allowed(addr uint64) error {
	if !s.careful() {
		return nil
	}
	k := s.kernel()
	if k == nil {
		return fmt.Errorf("%#x: %w: %w: %s", addr, ErrNotProbeable, s.symErr, insist)
	}
	err := k.Blacklisted(addr)
	if err == nil {
		if ferr := k.FaultsKnown(addr); ferr != nil {
			err = fmt.Errorf("%#x: %w: %w", addr, linux.ErrUnknownPlaces, ferr)
		}
	}
	if errors.Is(err, linux.ErrUnknownPlaces) {
		return fmt.Errorf("%w: %s", err, insist)
	}
	return err
}

// place returns where the breakpoint of a probe at addr has to stand: behind the
// instructions at a function's entry that do nothing, and that the guest's ftrace
// rewrites or its processor looks for (ENDBR64), so that both go on as without us.
// A breakpoint that doesn't show in the guest stands at addr.
func (s *Session) place(addr Addr) (Addr, error) {
	k := s.kernel()
	if k == nil || s.drv.Caps().Hidden {
		return addr, nil
	}
	at, err := k.ProbePoint(uint64(addr))
	switch {
	case err == nil:
		return Addr(at), nil
	case !s.careful():
		return addr, nil
	case errors.Is(err, linux.ErrUnknownPlaces):
		return 0, fmt.Errorf("%w: %s", err, insist)
	}
	return 0, err
}

// careful reports whether a probe is only for places of which it is known that they
// are safe. In tests there is nobody to ask.
func (s *Session) careful() bool { return s.guest != nil && !s.unsafe }

// insist is what to do where a place can't be told to be safe.
const insist = "a file with the kernel's symbols and types (Options.Symbols, Options.Types) may tell, Options.IgnoreBlacklist takes the risk"

func (p *Probe) checkPlace() error {
	switch {
	case p.Symbol != "" && p.Addr != 0:
		return ErrTwoAddresses
	case p.Symbol == "" && p.Addr == 0:
		return ErrNoAddress
	}
	return nil
}

// expectedFaults returns what tells whether the kernel expects a fault of an
// instruction, or nil if that isn't known of any.
func (s *Session) expectedFaults() func(uint64) bool {
	if _, err := s.syms.Lookup("__start___ex_table"); err != nil {
		return nil
	}
	return func(addr uint64) bool {
		k := s.kernel()
		if k == nil {
			return true
		}
		if s.unsafe && k.FaultsKnown(addr) != nil {
			return false // the risk was taken
		}
		return k.ExpectedFault(addr)
	}
}
