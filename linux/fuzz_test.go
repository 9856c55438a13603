package linux_test

import (
	"bytes"
	"encoding/binary"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unicode"

	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/kerneltest"
	"github.com/vmprobes/vmprobes/linux"
)

// FuzzDiscover writes words into a guest's memory: each patch is where, in four
// bytes, and what, in eight.
func FuzzDiscover(f *testing.F) {
	all := []kerneltest.Layout{{}, {CoreLayout: true}, {PCPUHot: true}, {NoTypes: true}, {NoTypes: true, NoData: true}}
	guests := make([]*kerneltest.Synthetic, len(all))
	for i, l := range all {
		guests[i] = kerneltest.NewSynthetic(l)
	}
	patch := func(words ...uint64) (b []byte) {
		for i := 0; i < len(words); i += 2 {
			at := words[i]
			if at >= kerneltest.SyntheticText { // an address
				at = uint64(cap(guests[0].RAM) - cap(guests[0].Bytes(at)))
			}
			b = binary.LittleEndian.AppendUint32(b, uint32(at))
			b = binary.LittleEndian.AppendUint64(b, words[i+1])
		}
		return b
	}
	sym := guests[0].Sym
	f.Add(byte(0), []byte{})
	f.Add(byte(1), patch(sym["module demo"]+kerneltest.ModuleMem, 1<<64-1))
	f.Add(byte(0), patch(sym["task 1"]+kerneltest.TaskTasks, sym["task 1"]+kerneltest.TaskTasks))
	f.Add(byte(0), patch(sym["kallsyms demo"]+8, 1<<18, sym["ftrace page"]+16, 1<<31-1))
	f.Add(byte(0), patch(sym["__start_BTF"], 0, sym["linux_banner"], 0))
	f.Add(byte(3), patch(sym["task 0"]+kerneltest.TaskComm, 0x72657070617773))
	demo := sym["module demo"]
	f.Add(byte(0), patch(demo+kerneltest.ModuleJumpEntries+8, 1<<16, demo+kerneltest.ModuleExTable, demo))
	f.Add(byte(1), patch(demo+kerneltest.ModuleFtrace, sym["text demo"], demo+kerneltest.ModuleNoinstr+8, 1<<32-1))
	f.Add(byte(0), patch(sym["locks of the kernel"]+24, 1<<64-1, sym["__start___ex_table"], 1<<63))
	f.Add(byte(2), patch(guests[0].CR3+8*511, guests[0].CR3|3))
	name := func(s string) uint64 { return uint64(bytes.Index(guests[0].RAM, []byte("\x00"+s+"\x00"))) + 1 }
	f.Add(byte(0), patch(name("css_set"), 0x7465735f731b63, name("dfl_cgrp"), 0x707267635f6c6658)) // escapes in names of types
	f.Add(byte(0), patch(name("kprobe_blacklist_entry"), 0x1b1b1b1b1b1b1b1b))
	f.Fuzz(func(t *testing.T, layout byte, patches []byte) {
		if len(patches) > 12*64 {
			return
		}
		s := *guests[int(layout)%len(guests)]
		g := *s.Guest
		s.Guest = &g
		g.RAM = bytes.Clone(g.RAM)
		for ; len(patches) >= 12; patches = patches[12:] {
			at := int(binary.LittleEndian.Uint32(patches)) % (len(g.RAM) - 8)
			copy(g.RAM[at:], patches[4:12])
		}
		printable := func(err error) {
			t.Helper()
			if err != nil {
				requirePrintable(t, strings.ReplaceAll(err.Error(), "\n", " "))
			}
		}
		k, err := linux.Discover(t.Context(), g.Machine(), nil)
		printable(err)
		if err != nil {
			require.Nil(t, k)
			return
		}
		tasks, err := k.Processes(true)
		printable(err)
		for _, p := range tasks[:min(len(tasks), 16)] {
			requirePrintable(t, p.String())
			_, err = k.Threads(p)
			printable(err)
			_, err = k.Cmdline(p)
			printable(err)
			_, err = k.Cgroup(p)
			printable(err)
		}
		_, err = k.AllSymbols()
		printable(err)
		_, err = k.ModuleTypes()
		printable(err)
		calls, err := k.Syscalls()
		printable(err)
		for _, c := range calls {
			requirePrintable(t, c.String())
		}
		ref, err := k.CurrentRef(s.Get64(s.Sym["__per_cpu_offset"]))
		printable(err)
		_, err = k.TaskAlive(ref)
		printable(err)
		_, err = k.FtraceSites()
		printable(err)
		places := 0
		for _, addr := range []uint64{
			kerneltest.Fn(1), kerneltest.Fn(300), kerneltest.Fn(411), kerneltest.Fn(450), kerneltest.Fn(470),
			s.Sym["text demo"], s.Sym["text demo"] + 0x100, s.Sym["text demo"] + 0x200,
		} {
			printable(k.Probeable(addr))
			at, err := k.ProbePoint(addr)
			printable(err)
			if err == nil {
				require.LessOrEqual(t, at-addr, uint64(9))
				require.NoError(t, k.Blacklisted(at))
			}
			k.ExpectedFault(addr)
			printable(k.FaultsKnown(addr))
			exits, err := k.Exits(addr)
			printable(err)
			require.LessOrEqual(t, len(exits.At)+len(exits.Tails), 64)
			printable(k.Returnable(addr))
			ends, err := k.ReturnAt(addr, false)
			printable(err)
			for _, at := range ends {
				require.NoError(t, k.Blacklisted(at))
			}
		}
		for _, name := range []string{"fn_0700", "sys_openat", "demo_run", "older:older_run", "demo_init@2", "gone:demo_run", "fn_07OO", "sys_getpod"} {
			sym, err := k.Lookup(name)
			printable(err)
			if err != nil {
				require.Zero(t, sym)
				continue
			}
			requirePrintable(t, sym.String()+sym.Note())
			fn, err := k.Function(sym.Addr)
			printable(err)
			if err != nil {
				require.ErrorIs(t, err, linux.ErrNoPrototype)
				continue
			}
			require.LessOrEqual(t, len(fn.Params), 6)
			for _, p := range fn.Params {
				requirePrintable(t, p.Name+p.Type+p.Format(1<<63))
			}
			_, err = k.Place(sym.Addr, linux.Placing{})
			printable(err)
		}
		k.DeadCode(func(addr, size uint64) bool {
			places++
			require.LessOrEqual(t, size, uint64(512))
			return false
		})
		require.Less(t, places, 1<<13)
		_, err = k.PhysToMachine(0)
		printable(err)
		for cpu := range 2 {
			base, err := k.PerCPU(cpu)
			printable(err)
			_, err = k.Current(base)
			printable(err)
		}
		for _, r := range k.Explain() {
			requirePrintable(t, r.String())
		}
	})
}

func FuzzModuleSymbols(f *testing.F) {
	entry := make([]byte, 48)
	entry[24], entry[30] = 1, 1
	f.Add(entry, []byte("\x00name\x00"), []byte("?t"), make([]byte, 12), uint32(2), uint32(1))
	f.Add(entry, []byte("name"), []byte{}, []byte{}, uint32(1<<32-1), uint32(0))
	f.Add([]byte{}, []byte{}, []byte{}, []byte{1, 0, 0, 0, 0xff, 0xff, 0xff, 0x7f}, uint32(0), uint32(9))
	clean := kerneltest.NewSynthetic(kerneltest.Layout{})
	f.Fuzz(func(t *testing.T, symtab, strtab, typetab, exports []byte, symbols, exported uint32) {
		if max(len(symtab), len(strtab), len(typetab), len(exports)) > 1<<12 {
			return
		}
		s := *clean
		g := *s.Guest
		s.Guest = &g
		g.RAM = bytes.Clone(g.RAM)
		text := s.Sym["text demo"] // the tables go to what is its text else
		kallsyms, module := s.Sym["kallsyms demo"], s.Sym["module demo"]
		for i, b := range [][]byte{symtab, strtab, typetab, exports} {
			at := text + uint64(i)<<12
			copy(s.Bytes(at), b)
			s.Put64([]uint64{kallsyms, kallsyms + 16, kallsyms + 24, module + kerneltest.ModuleSyms}[i], at)
		}
		s.Put32(kallsyms+8, symbols)
		s.Put32(module+kerneltest.ModuleNumSyms, exported)
		k, err := linux.Discover(t.Context(), g.Machine(), nil)
		require.NoError(t, err)
		syms, err := k.ModuleSymbols()
		if err == nil {
			require.LessOrEqual(t, uint64(len(syms)), uint64(symbols)+4)
		}
		for _, y := range syms {
			require.NotEmpty(t, y.Name)
			require.LessOrEqual(t, len(y.Name), 512)
		}
	})
}

func FuzzVMCoreInfo(f *testing.F) {
	s := kerneltest.NewSynthetic(kerneltest.Layout{})
	m := s.Machine()
	f.Add([]byte("OSRELEASE=1\nSYMBOL(swapper_pg_dir)=ffffffff80220000\nNUMBER(phys_base)=0\n"))
	f.Add([]byte("OSRELEASE=1\nSYMBOL(swapper_pg_dir)=c0220000\nCONFIG_X86_PAE=y\n"))
	f.Add([]byte("SYMBOL(swapper_pg_dir)=c0220000"))
	f.Add([]byte("SYMBOL(swapper_pg_dir)=ffffffff80220000\nNUMBER(phys_base)=-1\nNUMBER(pgtable_l5_enabled)=1\n"))
	f.Fuzz(func(t *testing.T, page []byte) {
		if len(page) <= 4096 {
			_ = linux.FromVMCoreInfo(page, m)
		}
	})
}

func FuzzCache(f *testing.F) {
	dir := filepath.Join(f.TempDir(), "cache")
	_, err := linux.Discover(f.Context(), kerneltest.NewSynthetic(kerneltest.Layout{}).Machine(), &linux.Options{Cache: dir})
	require.NoError(f, err)
	files, err := filepath.Glob(filepath.Join(dir, "*"))
	require.NoError(f, err)
	require.Len(f, files, 1)
	good, err := os.ReadFile(files[0])
	require.NoError(f, err)
	_, err = linux.ReadCache(bytes.NewReader(good))
	require.NoError(f, err)
	f.Add(good)
	f.Add(good[:len(good)/2])
	f.Add(good[:100])
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := linux.ReadCache(bytes.NewReader(b))
		if err == nil {
			for s := range m.All() {
				_, _, _ = m.Find(s.Addr)
			}
		}
	})
}

func requirePrintable(t *testing.T, s string) {
	t.Helper()
	require.NotContains(t, s, "\x1b")
	for _, c := range s {
		require.True(t, unicode.IsPrint(c), "%q", s)
	}
}
