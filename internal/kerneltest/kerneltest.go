// Package kerneltest makes guests of kernel files, for tests: memory with a kernel
// in it, as it is before its first instruction, behind page tables as it would
// have when it has booted. There are no tasks but the idle one.
package kerneltest

import (
	"bytes"
	"debug/elf"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/vmprobes/vmprobes/internal/cpio"
	"github.com/vmprobes/vmprobes/internal/pagetest"
	"github.com/vmprobes/vmprobes/linux"
	"github.com/vmprobes/vmprobes/paging"
	"github.com/vmprobes/vmprobes/sysmap"
)

// RequireEnv, if 1, makes a failure of each test that lacks a kernel or QEMU.
const RequireEnv = "VMPROBES_REQUIRE_QEMU"

// Skip ends a test that can't run here.
func Skip(tb testing.TB, format string, args ...any) {
	tb.Helper()
	if os.Getenv(RequireEnv) == "1" {
		tb.Fatalf(format, args...)
	}
	tb.Skipf(format, args...)
}

// File returns a file of one of the guest kernels that the lab has fetched: series
// is "6.1" or "6.12", name "vmlinux", "vmlinuz" or "modules.cpio". Without it the
// test is skipped.
func File(tb testing.TB, series, name string) []byte {
	tb.Helper()
	b, err := file(series, name)
	if err != nil {
		Skip(tb, "no kernel %s: %v (make the lab fetch it: bin/lab build guests)", series, err)
	}
	return b
}

func file(series, name string) ([]byte, error) {
	dir := os.Getenv("VMPROBES_CACHE")
	if dir == "" {
		base, err := os.UserCacheDir()
		if err != nil {
			return nil, err
		}
		dir = filepath.Join(base, "vmprobes")
	}
	files, err := filepath.Glob(filepath.Join(dir, "images", "guest-"+series+"-*.cpio"))
	if err != nil {
		return nil, err
	}
	// The newest, if the lab has made several.
	var newest string
	var made int64
	for _, f := range files {
		if st, err := os.Stat(f); err == nil && st.ModTime().UnixNano() > made {
			newest, made = f, st.ModTime().UnixNano()
		}
	}
	if newest == "" {
		return nil, fmt.Errorf("nothing in %s: %w", filepath.Join(dir, "images"), os.ErrNotExist)
	}
	f, err := os.Open(newest)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	r, err := cpio.Open(f, "lab/kernels/"+series+"/"+name)
	if err != nil {
		return nil, err
	}
	b := make([]byte, r.Size())
	_, err = io.ReadFull(r, b)
	return b, err
}

// A Guest is physical memory with a kernel in it. It is a linux.Machine.
type Guest struct {
	RAM     []byte
	CR3     uint64
	Symbols *sysmap.Map // of the kernel's file
}

// What 64-bit kernels run with: Intel SDM vol. 3, 2.5 and 2.2.1.
const (
	cr0  = 1<<31 | 1<<0                // PG, PE
	cr4  = 1<<5 | 1<<7                 // PAE, PGE
	efer = 1<<0 | 1<<8 | 1<<10 | 1<<11 // SCE, LME, LMA, NXE
)

const mapBase = 0xffffffff80000000 // __START_KERNEL_map: physical memory 0 is there

// Load makes a guest of a vmlinux, mapped by pages of 4 KiB with the protection
// that the kernel gives its sections (mark_rodata_ro, arch/x86/mm/init_64.c).
func Load(vmlinux []byte) (*Guest, error) {
	f, err := elf.NewFile(bytes.NewReader(vmlinux))
	if err != nil {
		return nil, err
	}
	syms, err := sysmap.FromELF(bytes.NewReader(vmlinux))
	if err != nil {
		return nil, err
	}
	g := &Guest{Symbols: syms}
	var end uint64
	for _, p := range f.Progs {
		if p.Type == elf.PT_LOAD && p.Vaddr >= mapBase {
			end = max(end, p.Vaddr-mapBase+p.Memsz)
		}
	}
	const tables, limit = 2 << 20, 256 << 20
	if end == 0 || end > limit {
		return nil, fmt.Errorf("a kernel up to %#x", end)
	}
	end = (end + tables - 1) &^ (tables - 1)
	g.RAM = make([]byte, end+tables)
	for _, p := range f.Progs {
		if p.Type == elf.PT_LOAD && p.Vaddr >= mapBase {
			at := p.Vaddr - mapBase
			if _, err := p.ReadAt(g.RAM[at:at+p.Filesz], 0); err != nil {
				return nil, err
			}
		}
	}
	free := end / paging.PageSize
	t := pagetest.New(pagetest.FourLevel, func() (uint64, []byte) {
		free++
		return free, g.page(paging.Frame(free))
	})
	g.CR3 = t.CR3
	addr := func(name string) (uint64, error) {
		s, err := syms.Lookup(name)
		return s.Addr, err
	}
	var at [5]uint64
	for i, name := range []string{"_text", "_etext", "__start_rodata", "__end_rodata", "_end"} {
		if at[i], err = addr(name); err != nil {
			return nil, err
		}
	}
	for va := at[0]; va < at[4]; va += paging.PageSize {
		flags := uint64(pagetest.Global | pagetest.Accessed | pagetest.Dirty)
		switch {
		case va < at[1]:
		case va >= at[2] && va < at[3]:
			flags |= pagetest.NX
		default:
			flags |= pagetest.NX | pagetest.Writable
		}
		t.Map(pagetest.Mapping{Virt: va, Phys: va - mapBase, Level: 1, Flags: flags})
	}
	return g, nil
}

func (g *Guest) page(f paging.Frame) []byte {
	return g.RAM[f*paging.PageSize:][:paging.PageSize:paging.PageSize]
}

// Map implements [paging.Mapper].
func (g *Guest) Map(f paging.Frame, _ bool) ([]byte, func() error, error) {
	if uint64(f) >= uint64(len(g.RAM))/paging.PageSize {
		return nil, nil, paging.ErrNoFrame
	}
	return g.page(f), func() error { return nil }, nil
}

// A Machine is a Guest behind a cache of frames, as a hypervisor's is.
type Machine struct {
	*paging.Cache
	g *Guest
}

// Machine returns the guest as a machine, whose Cache counts the pages read.
func (g *Guest) Machine() *Machine { return &Machine{paging.NewCache(g, 1<<16, 0), g} }

// CPUs implements [linux.Machine].
func (m *Machine) CPUs() ([]linux.CPU, error) {
	return []linux.CPU{{CR0: cr0, CR3: m.g.CR3, CR4: cr4, EFER: efer}}, nil
}

// WriteImage writes memory to a flat file, with the information by which the
// kernel is found in there (VMCOREINFO of Linux).
func (g *Guest) WriteImage(tb testing.TB) (path string) {
	tb.Helper()
	ram := slices.Clone(g.RAM)
	info := fmt.Sprintf("OSRELEASE=test\nSYMBOL(swapper_pg_dir)=%x\nNUMBER(phys_base)=0\nNUMBER(pgtable_l5_enabled)=0\n", mapBase+g.CR3)
	ram = append(ram, make([]byte, paging.PageSize)...)
	copy(ram[len(g.RAM):], info)
	path = filepath.Join(tb.TempDir(), "memory")
	if err := os.WriteFile(path, ram, 0o600); err != nil {
		tb.Fatal(err)
	}
	return path
}
