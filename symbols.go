package vmprobes

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/vmprobes/vmprobes/sysmap"
	"github.com/vmprobes/vmprobes/paging"
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
	if near := s.syms.Suggest(symbol); len(near) > 0 {
		return 0, fmt.Errorf("%w; this kernel has %s", err, strings.Join(near, ", "))
	}
	return 0, err
}

// Symbolize returns the symbol that holds addr, and the offset of addr in it.
func (s *Session) Symbolize(addr Addr) (name string, offset uint64, ok bool) {
	if s.syms == nil {
		return "", 0, false
	}
	sym, off, ok := s.syms.Find(uint64(addr))
	return sym.Name, off, ok
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
	return addr, s.boundary(uint64(addr))
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

// symbolsEnv names the file that Options.Symbols would.
const symbolsEnv = "VMPROBES_SYMBOLS"

// loadSymbols reads the symbols of a guest. booted returns the file of the
// kernel the toolstack booted the guest with, or "".
func loadSymbols(opts *Options, booted func() string) (m *sysmap.Map, file string, err error) {
	file = opts.Symbols
	if file == "" {
		file = os.Getenv(symbolsEnv)
	}
	if file == "" {
		file = booted()
	}
	if file == "" {
		return nil, "", fmt.Errorf("%w: set Options.Symbols (or %s) to its vmlinux, vmlinuz, System.map or saved /proc/kallsyms, "+
			"or give Probe.Addr instead of Symbol", ErrNoSymbols, symbolsEnv)
	}
	m, err = sysmap.ParseFile(file)
	if err != nil {
		return nil, file, fmt.Errorf("%w: %w", ErrNoSymbols, err)
	}
	return m, file, nil
}

// anchors are addresses in the guest kernel that the hypervisor knows, by the
// names that kernels have had for what is there.
type anchor struct {
	addr  uint64
	names []string
}

var (
	// arch/x86/entry/entry_64.S.
	syscallEntry = []string{"entry_SYSCALL_64", "system_call"}
	// arch/x86/xen/xen-asm.S; the older names are from before 5.8 and 5.19.
	xenInt3      = []string{"xen_asm_exc_int3", "xen_int3", "xen_xenint3"}
	xenPageFault = []string{"xen_asm_exc_page_fault", "xen_page_fault"}
	xenSyscall   = []string{"xen_entry_SYSCALL_64", "xen_syscall_target"}
)

// kaslrAlign and kaslrRange bound a slide: CONFIG_PHYSICAL_ALIGN is at least
// 2 MiB, and the kernel's image stays in its 1 GiB (arch/x86/boot/compressed/kaslr.c).
const (
	kaslrAlign = 2 << 20
	kaslrRange = 1 << 30
)

// fit slides m to where the running kernel is, and fails if it is another's.
func fit(m *sysmap.Map, anchors []anchor) (*sysmap.Map, error) {
	fitted := false
	for _, a := range anchors {
		for _, name := range a.names {
			for _, sym := range m.LookupAll(name) {
				d := a.addr - sym.Addr
				if !fitted {
					if d >= kaslrRange || d%kaslrAlign != 0 {
						return nil, fmt.Errorf("%w: %s is at %#x in the file, and %#x is what Xen has", ErrWrongSymbols, name, sym.Addr, a.addr)
					}
					m, fitted = m.Slide(d), true
				} else if d != 0 {
					return nil, fmt.Errorf("%w: %s would be at %#x, and is at %#x", ErrWrongSymbols, name, sym.Addr, a.addr)
				}
			}
		}
	}
	if !fitted {
		return nil, fmt.Errorf("%w: none of the kernel's entry points is among them", ErrWrongSymbols)
	}
	return m, nil
}

// checkBanner compares the kernel's version string with the symbol file's.
func (s *Session) checkBanner() error {
	want := s.syms.Banner()
	sym, err := s.syms.Lookup("linux_banner")
	if want == "" || err != nil {
		return nil
	}
	want = strings.TrimRight(want, "\n\x00")
	b := make([]byte, len(want))
	if _, err := s.ReadMemory(b, Addr(sym.Addr)); err != nil {
		return err
	}
	if string(b) != want {
		return fmt.Errorf("%w: they are of %q", ErrWrongSymbols, want)
	}
	return nil
}

// useKernelRoot has kernel memory reached through init_top_pgt, which lives as
// long as the kernel, instead of the tables of whatever process runs.
func (s *Session) useKernelRoot() {
	sym, err := s.syms.Lookup("init_top_pgt")
	if err != nil {
		return
	}
	t, err := s.drv.Translate(sym.Addr)
	if err != nil || t.Offset != 0 {
		return
	}
	// It must lead to where the tables in use lead.
	root := paging.Root(uint64(t.Frame) * paging.PageSize)
	s.drv.SetKernelRoot(root)
	if t2, err := s.drv.Translate(sym.Addr); err != nil || t2.Frame != t.Frame {
		s.drv.SetKernelRoot(0)
		return
	}
	s.log.Debug("kernel page tables", "root", fmt.Sprintf("%#x", uint64(root)))
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
