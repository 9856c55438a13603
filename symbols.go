package vmprobes

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
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
	if s.guest == nil || s.guest.Linux() == nil {
		return s.syms
	}
	all, err := s.guest.Linux().AllSymbols()
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
	if err := s.boundary(uint64(addr)); err != nil {
		return 0, err
	}
	return addr, s.allowed(uint64(addr))
}

// allowed asks the guest's own lists whether a probe may be at addr.
func (s *Session) allowed(addr uint64) error {
	if s.guest == nil || s.guest.Linux() == nil || s.unsafe {
		return nil
	}
	err := s.guest.Linux().Blacklisted(addr)
	if err != nil && !errors.Is(err, linux.ErrNotProbeable) {
		s.log.Warn("the guest's lists of places without probes can't be read", "err", err)
		return nil
	}
	return err
}

func (p *Probe) checkPlace() error {
	switch {
	case p.Symbol != "" && p.Addr != 0:
		return ErrTwoAddresses
	case p.Symbol == "" && p.Addr == 0:
		return ErrNoAddress
	}
	return nil
}

// expectedFaults reads the kernel's exception table: the instructions whose
// fault it expects, and finds by address (arch/x86/include/asm/extable.h).
// It returns nil, "any may", if the table isn't known.
func (s *Session) expectedFaults() func(uint64) bool {
	if s.syms == nil {
		return nil
	}
	start, err1 := s.syms.Lookup("__start___ex_table")
	stop, err2 := s.syms.Lookup("__stop___ex_table")
	text, err3 := s.syms.Lookup("_stext")
	etext, err4 := s.syms.Lookup("_etext")
	if errors.Join(err1, err2, err3, err4) != nil {
		return nil
	}
	const entry, limit = 12, 1 << 20 // insn, fixup and type, relative to their own places
	size := stop.Addr - start.Addr
	if size == 0 || size > limit || size%entry != 0 {
		return nil
	}
	table := make([]byte, size)
	if err := s.drv.Read(0, start.Addr, table); err != nil {
		s.log.Debug("exception table not read", "err", err)
		return nil
	}
	faults := make([]uint64, 0, size/entry)
	for i := uint64(0); i < size; i += entry {
		rel := int32(binary.LittleEndian.Uint32(table[i:]))
		faults = append(faults, start.Addr+i+uint64(int64(rel)))
	}
	slices.Sort(faults)
	return func(addr uint64) bool {
		if addr < text.Addr || addr >= etext.Addr {
			return true // a module has a table of its own
		}
		_, found := slices.BinarySearch(faults, addr)
		return found
	}
}
