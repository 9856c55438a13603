package vmprobes

import (
	"errors"
	"fmt"
	"strings"

	"github.com/vmprobes/vmprobes/linux"
)

// Lookup returns the address of a symbol of the guest's kernel or of its modules:
// "do_sys_openat2", "module:symbol", "symbol@2", or "sys_openat" for the wrapper of a
// system call. Guest().Linux().Lookup says more of what was found: see
// [linux.Kernel.Lookup].
func (s *Session) Lookup(symbol string) (Addr, error) {
	a, err := s.lookup(symbol)
	return a, s.fail("lookup", nil, err)
}

func (s *Session) lookup(symbol string) (Addr, error) {
	found, err := s.symbol(symbol)
	return found.Addr, err
}

func (s *Session) symbol(symbol string) (linux.Symbol, error) {
	if s.kernel == nil {
		return linux.Symbol{}, s.noKernel()
	}
	found, err := s.kernel.Lookup(symbol)
	if err != nil {
		return linux.Symbol{}, err
	}
	if note := found.Note(); note != "" {
		s.log.Warn(note)
	}
	return found, nil
}

// noKernel says why the guest's kernel isn't known.
func (s *Session) noKernel() error {
	if s.symErr == nil {
		return ErrNoKernel
	}
	return s.symErr
}

// Symbolize returns the symbol that holds addr, and the offset of addr in it.
func (s *Session) Symbolize(addr Addr) (name string, offset uint64, ok bool) {
	sym, off, ok := s.kernel.Find(addr)
	return sym.Name, off, ok
}

// resolve returns the address that a probe names.
func (s *Session) resolve(p *Probe) (Addr, error) {
	if err := p.checkPlace(); err != nil {
		return 0, err
	}
	if p.Symbol == "" {
		return p.Addr + p.Offset, nil
	}
	sym, err := s.symbol(p.Symbol)
	if err != nil {
		return 0, err
	}
	// Padding before a function (CONFIG_CALL_PADDING, since 6.2) is never executed.
	if fn, ok := strings.CutPrefix(sym.Name, "__pfx_"); ok {
		return 0, fmt.Errorf("%w: %q is the padding before a function: probe %q", ErrNotProbeable, sym.Name, fn)
	}
	if p.Offset == 0 {
		return sym.Addr, nil
	}
	return s.within(sym, p.Offset)
}

// within returns the address so many bytes behind the beginning of a symbol.
func (s *Session) within(sym linux.Symbol, offset uint64) (Addr, error) {
	end, ok := s.kernel.FuncEnd(sym.Addr)
	if !ok {
		return 0, fmt.Errorf("%w: nothing tells where %q ends", ErrOffset, sym.Name)
	}
	if size := end - sym.Addr; offset >= size {
		err := fmt.Errorf("%w: %q has %d bytes, and %#x is asked for", ErrOffset, sym.Name, size, offset)
		if in, off, ok := s.kernel.Find(sym.Addr + offset); ok && offset < 1<<63 {
			err = fmt.Errorf("%w: that is in %q, at %#x", err, in.Name, off)
		}
		return 0, err
	}
	return sym.Addr + offset, nil
}

// place returns where the breakpoint of a probe at addr has to stand. What the guest
// doesn't tell to be safe is refused, unless the user takes the risk.
func (s *Session) place(addr Addr) (Addr, error) {
	if s.kernel == nil {
		if s.unsafe {
			return addr, nil
		}
		return 0, fmt.Errorf("%#x: %w: %w: %s", addr, ErrNotProbeable, s.noKernel(), insist)
	}
	at, err := s.kernel.Place(addr, linux.Placing{Hidden: s.drv.Caps().Hidden, Force: s.unsafe})
	if errors.Is(err, linux.ErrUnknownPlaces) {
		return 0, fmt.Errorf("%w: %s", err, insist)
	}
	return at, err
}

// insist is what to do where nothing tells whether a place is safe.
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
