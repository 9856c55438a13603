package linux_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"iter"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/kerneltest"
	"github.com/vmprobes/vmprobes/ktype"
	"github.com/vmprobes/vmprobes/linux"
	"github.com/vmprobes/vmprobes/paging"
	"github.com/vmprobes/vmprobes/sysmap"
)

// allocated returns how many bytes f allocates, in all.
func allocated(f func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}

// TestHostile changes one thing in a guest. Each operation must end with the right
// error, and not allocate because a guest says so: 16 MiB are what a few retries
// and the tables of the synthetic kernel take.
func TestHostile(t *testing.T) {
	const bound = 16 << 20
	type guest = kerneltest.Synthetic
	processes := func(k *linux.Kernel) error { _, err := k.Processes(true); return err }
	modules := func(k *linux.Kernel) error { _, err := k.Modules(); return err }
	symbols := func(k *linux.Kernel) error { _, err := k.ModuleSymbols(); return err }
	moduleTypes := func(k *linux.Kernel) error { _, err := k.ModuleTypes(); return err }
	syscalls := func(k *linux.Kernel) error { _, err := k.Syscalls(); return err }
	places := func(k *linux.Kernel) error { _, err := k.FtraceSites(); return err }
	types := func(k *linux.Kernel) error { _, err := k.Types(); return err }
	place := func(k *linux.Kernel) error { return k.Blacklisted(kerneltest.Fn(1)) }
	modulePlace := func(k *linux.Kernel) error {
		mods, err := k.Modules()
		if err != nil {
			return err
		}
		return k.Blacklisted(mods[0].Base + 0x300)
	}
	of := func(pid int, f func(*linux.Kernel, linux.Task) error) func(*linux.Kernel) error {
		return func(k *linux.Kernel) error {
			p, err := k.Process(pid)
			if err != nil {
				return err
			}
			return f(k, p)
		}
	}
	cmdline := of(1, func(k *linux.Kernel, p linux.Task) error { _, err := k.Cmdline(p); return err })
	cgroup := of(40, func(k *linux.Kernel, p linux.Task) error { _, err := k.Cgroup(p); return err })
	threads := of(40, func(k *linux.Kernel, p linux.Task) error { _, err := k.Threads(p); return err })
	root := of(1, func(k *linux.Kernel, p linux.Task) error { _, err := k.UserRoot(p); return err })
	tasks := func(s *guest, pid int) uint64 { return s.Sym[fmt.Sprintf("task %d", pid)] + kerneltest.TaskTasks }
	const nowhere = 0xffffc90000000000

	for name, c := range map[string]struct {
		change func(*guest)
		op     func(*linux.Kernel) error
		want   error // nil: none
	}{
		"tasks run into themselves":     {func(s *guest) { s.Put64(tasks(s, 3), tasks(s, 1)) }, processes, ktype.ErrListCycle},
		"a task that follows itself":    {func(s *guest) { s.Put64(tasks(s, 2), tasks(s, 2)) }, processes, ktype.ErrListCycle},
		"a task that points back wrong": {func(s *guest) { s.Put64(tasks(s, 2)+8, tasks(s, 50)) }, processes, ktype.ErrListBroken},
		"tasks lead nowhere":            {func(s *guest) { s.Put64(tasks(s, 2), nowhere) }, processes, paging.ErrNotMapped},
		"tasks lead to user memory":     {func(s *guest) { s.Put64(tasks(s, 2), 0x1000) }, processes, paging.ErrNotMapped},
		"no credentials":                {func(s *guest) { s.Put64(s.Sym["task 3"]+kerneltest.TaskCred, 0) }, processes, nil}, // the task says so
		"threads run into themselves": {func(s *guest) {
			s.Put64(s.Sym["task 41"]+kerneltest.TaskThreadNode, s.Sym["task 40"]+kerneltest.TaskThreadNode)
		}, threads, ktype.ErrListCycle},
		"cgroups in a circle": {func(s *guest) { s.Put64(s.Sym["cgroup root"]+8, s.Sym["cgroup service"]) }, cgroup, linux.ErrBadKernel},
		"a cgroup in itself":  {func(s *guest) { s.Put64(s.Sym["cgroup slice"]+8, s.Sym["cgroup slice"]) }, cgroup, linux.ErrBadKernel},
		"a cgroup nowhere":    {func(s *guest) { s.Put64(s.Sym["cgroup slice"]+16, nowhere) }, cgroup, paging.ErrNotMapped},
		"arguments of all memory": {func(s *guest) {
			s.Put64(s.Sym["mm 1"]+kerneltest.MMStartCode+8*8, 1<<64-1)
		}, cmdline, paging.ErrNotMapped},
		"arguments that end before they begin": {func(s *guest) { s.Put64(s.Sym["mm 1"]+kerneltest.MMStartCode+8*8, 1) }, cmdline, linux.ErrBadKernel},
		"tables of a process nowhere":          {func(s *guest) { s.Put64(s.Sym["mm 1"]+kerneltest.MMPgd, nowhere) }, root, paging.ErrNotMapped},

		"modules run into themselves": {func(s *guest) {
			s.Put64(s.Sym["module older"]+kerneltest.ModuleList, s.Sym["module demo"]+kerneltest.ModuleList)
		}, modules, ktype.ErrListCycle},
		"a huge module":                {func(s *guest) { s.Put32(s.Sym["module demo"]+kerneltest.ModuleMem+8, 1<<32-1) }, modules, linux.ErrBadKernel},
		"a module's name without end":  {func(s *guest) { fill(s.Bytes(s.Sym["module demo"] + kerneltest.ModuleName)[:56]) }, modules, nil},
		"4 Gi symbols of a module":     {func(s *guest) { s.Put32(s.Sym["kallsyms demo"]+8, 1<<32-1) }, symbols, linux.ErrBadKernel},
		"many symbols that aren't":     {func(s *guest) { s.Put32(s.Sym["kallsyms demo"]+8, 1<<18) }, symbols, paging.ErrNotMapped},
		"4 Gi exports of a module":     {func(s *guest) { s.Put32(s.Sym["module demo"]+kerneltest.ModuleNumSyms, 1<<32-1) }, symbols, linux.ErrBadKernel},
		"symbols without names":        {func(s *guest) { s.Put64(s.Sym["kallsyms demo"]+16, nowhere) }, symbols, paging.ErrNotMapped},
		"names of symbols without end": {func(s *guest) { s.Put64(s.Sym["kallsyms demo"]+16, kerneltest.SyntheticText) }, symbols, nil},
		"a module without symbols":     {func(s *guest) { s.Put64(s.Sym["module demo"]+kerneltest.ModuleKallsyms, 0) }, symbols, ktype.ErrNull},
		"4 GiB of types of a module":   {func(s *guest) { s.Put32(s.Sym["btf demo"]+24, 1<<32-1) }, moduleTypes, linux.ErrBadKernel},
		"types of a module that aren't": {func(s *guest) {
			s.Put64(s.Sym["btf demo"], s.Sym["text demo"])
		}, moduleTypes, ktype.ErrFormat},
		"escape sequences in names of types": {func(s *guest) {
			copy(s.RAM[bytes.Index(s.RAM, []byte("\x00css_set\x00")):], "\x00\x1b[31m")
		}, types, nil}, // they are inferred

		"255 arguments":       {func(s *guest) { s.Bytes(s.Sym["__syscall_meta__openat"])[12] = 255 }, syscalls, linux.ErrBadKernel},
		"a call without name": {func(s *guest) { s.Put64(s.Sym["__syscall_meta__openat"], 0) }, syscalls, paging.ErrNotMapped},
		"arguments nowhere":   {func(s *guest) { s.Put64(s.Sym["__syscall_meta__openat"]+24, nowhere) }, syscalls, paging.ErrNotMapped},
		"blacklist in a circle": {func(s *guest) {
			s.Put64(s.Sym["blacklist entry"], s.Sym["blacklist entry"])
		}, place, ktype.ErrListCycle},
		"2 Gi ftrace records":    {func(s *guest) { s.Put32(s.Sym["ftrace page"]+16, 1<<31-1) }, places, linux.ErrBadKernel},
		"-1 ftrace records":      {func(s *guest) { s.Put32(s.Sym["ftrace page"]+16, 1<<32-1) }, places, ktype.ErrRange},
		"ftrace pages in a ring": {func(s *guest) { s.Put64(s.Sym["ftrace page 2"], s.Sym["ftrace page"]) }, places, linux.ErrBadKernel},
		"LOCK prefixes in a circle": {func(s *guest) {
			s.Put64(s.Sym["locks of the kernel"]+48, s.Sym["locks of the kernel"]+48)
		}, place, ktype.ErrListCycle},
		"LOCK prefixes that end before they begin": {func(s *guest) { s.Put64(s.Sym["locks of the kernel"]+24, 0) }, place, linux.ErrBadKernel},
		"LOCK prefixes in all memory":              {func(s *guest) { s.Put64(s.Sym["locks of the kernel"]+24, 1<<64-4) }, place, linux.ErrBadKernel},
		"LOCK prefixes nowhere": {func(s *guest) {
			s.Put64(s.Sym["locks of the kernel"]+16, nowhere)
			s.Put64(s.Sym["locks of the kernel"]+24, nowhere+16)
		}, place, paging.ErrNotMapped},
		"4 Gi jump labels of a module":    {func(s *guest) { s.Put32(s.Sym["module demo"]+kerneltest.ModuleJumpEntries+8, 1<<32-1) }, modulePlace, linux.ErrBadKernel},
		"many jump labels that aren't":    {func(s *guest) { s.Put32(s.Sym["module demo"]+kerneltest.ModuleJumpEntries+8, 1<<16) }, modulePlace, paging.ErrNotMapped},
		"jump labels of a module nowhere": {func(s *guest) { s.Put64(s.Sym["module demo"]+kerneltest.ModuleJumpEntries, nowhere) }, modulePlace, paging.ErrNotMapped},
		"jump labels at the end of memory": {func(s *guest) {
			s.Put64(s.Sym["module demo"]+kerneltest.ModuleJumpEntries, 1<<64-16)
		}, modulePlace, paging.ErrNotMapped},
		"-1 static calls of a module":       {func(s *guest) { s.Put32(s.Sym["module demo"]+kerneltest.ModuleStaticCalls+8, 1<<32-1) }, modulePlace, ktype.ErrRange},
		"2 Gi static calls of a module":     {func(s *guest) { s.Put32(s.Sym["module demo"]+kerneltest.ModuleStaticCalls+8, 1<<31-1) }, modulePlace, linux.ErrBadKernel},
		"4 Gi ftrace sites of a module":     {func(s *guest) { s.Put32(s.Sym["module demo"]+kerneltest.ModuleFtrace+8, 1<<32-1) }, modulePlace, linux.ErrBadKernel},
		"ftrace sites of a module nowhere":  {func(s *guest) { s.Put64(s.Sym["module demo"]+kerneltest.ModuleFtrace, nowhere) }, modulePlace, paging.ErrNotMapped},
		"noinstr code outside of a module":  {func(s *guest) { s.Put64(s.Sym["module demo"]+kerneltest.ModuleNoinstr, kerneltest.SyntheticText) }, modulePlace, linux.ErrBadKernel},
		"4 GiB of noinstr code of a module": {func(s *guest) { s.Put32(s.Sym["module demo"]+kerneltest.ModuleNoinstr+8, 1<<32-1) }, modulePlace, linux.ErrBadKernel},
		"a module's tables lead elsewhere": {func(s *guest) {
			// To itself, in the middle of nothing, and to the kernel's text: no sites of its.
			m := s.Sym["module demo"]
			s.Put64(m+kerneltest.ModuleJumpEntries, m)
			s.Put64(m+kerneltest.ModuleStaticCalls, kerneltest.SyntheticText)
			s.Put64(m+kerneltest.ModuleExTable, m)
		}, modulePlace, nil},
		"BTF that isn't": {func(s *guest) { s.Put64(s.Sym["__start_BTF"], 0) }, types, nil}, // they are inferred
		"BTF of another kernel": {func(s *guest) {
			// All tasks have another name.
			for _, pid := range []int{0, 1, 2} {
				copy(s.Bytes(s.Sym[fmt.Sprintf("task %d", pid)] + kerneltest.TaskComm)[:16], make([]byte, 16))
			}
		}, types, linux.ErrNoTypes},
	} {
		t.Run(name, func(t *testing.T) {
			s := kerneltest.NewSynthetic(kerneltest.Layout{})
			c.change(s)
			k := discover(t, s)
			var err error
			n := allocated(func() { err = c.op(k) })
			if c.want == nil {
				assert.NoError(t, err)
			} else {
				require.ErrorIs(t, err, c.want)
				requirePrintable(t, strings.ReplaceAll(err.Error(), "\n", " "))
			}
			assert.Less(t, n, uint64(bound), "bytes allocated")
			for _, r := range k.Explain() {
				requirePrintable(t, r.String())
			}
		})
	}
}

func fill(b []byte) {
	for i := range b {
		b[i] = 'x'
	}
}

// TestHostileSymbols gives symbols that lead Discover astray.
func TestHostileSymbols(t *testing.T) {
	s := kerneltest.NewSynthetic(kerneltest.Layout{})
	// The guest's banner is not that of its symbols' kernel.
	copy(s.Bytes(s.Sym["linux_banner"]), "Windows")
	_, err := linux.Discover(t.Context(), s.Machine(), nil)
	require.ErrorIs(t, err, linux.ErrNoSymbols)

	// Page tables of one piece per page, and of many pages.
	s = kerneltest.NewSynthetic(kerneltest.Layout{})
	s.CR3 = uint64(len(s.RAM))
	s.RAM = append(s.RAM, make([]byte, 4*paging.PageSize)...)
	for table := range 4 {
		for i := range 512 {
			e := s.CR3 + uint64(min(table+1, 3))<<12 | 3
			if table == 3 && i%2 == 0 {
				e |= 1 << 63
			}
			binary.LittleEndian.PutUint64(s.RAM[s.CR3+uint64(table<<12+8*i):], e)
		}
	}
	n := allocated(func() { _, err = linux.Discover(t.Context(), s.Machine(), nil) })
	require.ErrorIs(t, err, linux.ErrBadKernel)
	assert.Less(t, n, uint64(16<<20))
}

// A liar is a guest with 512 GiB of memory in which each page is a task, and a
// module, that is followed by the next.
type liar struct {
	*kerneltest.Synthetic
	cpus []linux.CPU
}

const (
	liarVA    = 0xffff888000000000
	liarPhys  = 4 << 30
	liarTasks = liarVA + kerneltest.TaskTasks
)

func (l *liar) Map(f paging.Frame, w bool) ([]byte, func() error, error) {
	if f < liarPhys/paging.PageSize {
		return l.Synthetic.Map(f, w)
	}
	page := make([]byte, paging.PageSize)
	va := liarVA + uint64(f)*paging.PageSize - liarPhys
	put := func(off int, v uint64) { binary.LittleEndian.PutUint64(page[off:], v) }
	for _, off := range []int{kerneltest.TaskTasks, kerneltest.TaskThreadNode, kerneltest.ModuleList} {
		put(off, va+paging.PageSize+uint64(off))
		put(off+8, va-paging.PageSize+uint64(off))
	}
	if va == liarVA {
		put(kerneltest.TaskTasks+8, l.Sym["task 0"]+kerneltest.TaskTasks)
		put(kerneltest.ModuleList+8, l.Sym["modules"])
	}
	put(kerneltest.TaskParent, va)
	put(kerneltest.TaskCred, va)
	copy(page[kerneltest.TaskComm:], "evil")
	return page, func() error { return nil }, nil
}

type liarMachine struct {
	*paging.Cache
	*liar
}

func (m liarMachine) CPUs() ([]linux.CPU, error) { return m.cpus, nil }

func newLiar(t *testing.T, layout kerneltest.Layout) *linux.Kernel {
	s := kerneltest.NewSynthetic(layout)
	cpus, err := s.Machine().CPUs()
	require.NoError(t, err)
	l := &liar{s, cpus}
	s.MapHuge(liarVA, liarPhys, 512)
	s.Put64(s.Sym["task 0"]+kerneltest.TaskTasks, liarTasks)
	s.Put64(s.Sym["modules"], liarVA+kerneltest.ModuleList)
	k, err := linux.Discover(t.Context(), liarMachine{paging.NewCache(l, 1<<10, 0), l}, nil)
	require.NoError(t, err)
	return k
}

// TestEndless walks lists that are well-formed and never end.
func TestEndless(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: it reads eight million times")
	}
	k := newLiar(t, kerneltest.Layout{})
	runtime.GC()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	tasks, err := k.Processes(false)
	require.ErrorIs(t, err, linux.ErrBudget)
	assert.ErrorContains(t, err, "processes")
	runtime.GC()
	runtime.ReadMemStats(&after)
	assert.Greater(t, len(tasks), 300_000, "so many are no reason to give up")
	assert.Less(t, after.HeapAlloc-before.HeapAlloc, uint64(256<<20))
	runtime.KeepAlive(tasks)
	_, err = k.Modules()
	require.ErrorIs(t, err, ktype.ErrLimit)

	// Nor are types inferred for ever.
	k = newLiar(t, kerneltest.Layout{NoTypes: true})
	_, err = k.Types()
	require.ErrorIs(t, err, linux.ErrNoTypes)
	require.ErrorIs(t, err, linux.ErrBudget)
}

// scanner is a guest without registers.
type scanner struct {
	*kerneltest.Machine
	frames uint64
}

func (s scanner) CPUs() ([]linux.CPU, error) { return nil, nil }
func (s scanner) VMCoreInfo() []byte         { return nil }
func (s scanner) Ranges() iter.Seq2[paging.Frame, uint64] {
	return func(yield func(paging.Frame, uint64) bool) { yield(0, s.frames) }
}

// TestVMCoreInfo finds the kernel behind pages that only look like its own.
func TestVMCoreInfo(t *testing.T) {
	s := kerneltest.NewSynthetic(kerneltest.Layout{})
	const fakes = 300
	at := len(s.RAM)
	s.RAM = append(s.RAM, make([]byte, (fakes+1)*paging.PageSize)...)
	for i := range fakes {
		copy(s.RAM[at+i*paging.PageSize:], []string{
			"OSRELEASE=1\nSYMBOL(swapper_pg_dir)=ffffffff81000000\nNUMBER(phys_base)=-99999999999\n",
			"OSRELEASE=1\nSYMBOL(swapper_pg_dir)=c1000000\n",
			"OSRELEASE=1\nSYMBOL(swapper_pg_dir)=zzz\n",
			"OSRELEASE=1\nSYMBOL(swapper_pg_dir)=ffffffffffffffff\nNUMBER(phys_base)=9223372036854775807\nNUMBER(pgtable_l5_enabled)=1\n",
			"OSRELEASE=1\n\n\n====\n=",
		}[i%5])
	}
	m := scanner{s.Machine(), uint64(len(s.RAM)) / paging.PageSize}
	_, err := linux.Discover(t.Context(), m, nil)
	require.ErrorIs(t, err, linux.ErrNoKernel)

	copy(s.RAM[at+fakes*paging.PageSize:], fmt.Sprintf("OSRELEASE=1\nSYMBOL(swapper_pg_dir)=%x\nNUMBER(phys_base)=0\n", uint64(0xffffffff80000000)+s.CR3))
	m = scanner{s.Machine(), uint64(len(s.RAM)) / paging.PageSize}
	k, err := linux.Discover(t.Context(), m, nil)
	require.NoError(t, err)
	assert.Equal(t, kerneltest.SyntheticBanner, k.Banner())

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = linux.Discover(ctx, m, nil)
	require.ErrorIs(t, err, context.Canceled)
}

// TestModuleTypesName: a module's name is quoted where it is the one of bad types.
func TestModuleTypesName(t *testing.T) {
	s := kerneltest.NewSynthetic(kerneltest.Layout{})
	copy(s.Bytes(s.Sym["module demo"]+kerneltest.ModuleName), "\x1b[31m\x00")
	s.Bytes(s.Get64(s.Sym["btf demo"]))[0] = 0 // of BTF's magic number
	_, err := discover(t, s).ModuleTypes()
	require.ErrorIs(t, err, ktype.ErrFormat)
	requirePrintable(t, err.Error())
}

// vmcoreinfoPage is a page that leads to page tables.
func vmcoreinfoPage(cr3 uint64) []byte {
	page := make([]byte, paging.PageSize)
	copy(page, fmt.Sprintf("OSRELEASE=1\nSYMBOL(swapper_pg_dir)=%x\nNUMBER(phys_base)=0\n", uint64(0xffffffff80000000)+cr3))
	return page
}

// TestSeveralKernels has the remains of the kernel that ran before in the image, as a
// guest has that has rebooted by kexec: the one that runs is taken, in whatever order
// they are, and the other is named.
func TestSeveralKernels(t *testing.T) {
	const dead = "Linux version 8.8.8-dead (me@here) #1 SMP"
	for name, kill := range map[string]func(*kerneltest.Synthetic){
		"tasks":    func(s *kerneltest.Synthetic) { s.Put64(s.Sym["init_task"]+kerneltest.TaskTasks, 0x4141414141414141) },
		"modules":  func(s *kerneltest.Synthetic) { s.Put64(s.Sym["modules"], 0x4141414141414141) },
		"clock":    func(s *kerneltest.Synthetic) { s.SetClock(1699999999) },
		"ended":    func(s *kerneltest.Synthetic) { s.Put32(s.Sym["system_state"], 6) },
		"no clock": func(s *kerneltest.Synthetic) { s.SetClock(0); s.Put32(s.Sym["system_state"], 6) },
	} {
		for _, order := range []string{"dead first", "alive first"} {
			t.Run(name+", "+order, func(t *testing.T) {
				a, b := kerneltest.NewSynthetic(kerneltest.Layout{}), kerneltest.NewSynthetic(kerneltest.Layout{})
				killed := a
				if order == "alive first" {
					killed = b
				}
				kill(killed)
				copy(killed.Bytes(killed.Sym["linux_banner"]), dead+"\n\x00")
				ram, cr3 := b.Behind(a.RAM)
				a.RAM = slices.Concat(ram, vmcoreinfoPage(a.CR3), vmcoreinfoPage(a.CR3), vmcoreinfoPage(cr3))
				k, err := linux.Discover(t.Context(), scanner{a.Machine(), uint64(len(a.RAM)) / paging.PageSize}, nil)
				require.NoError(t, err)
				assert.Equal(t, kerneltest.SyntheticBanner, k.Banner())
				said := rung(k, "other kernels")
				assert.Contains(t, said, "1 more in memory: "+dead)
				assert.False(t, slices.ContainsFunc(k.Explain(), func(r linux.Rung) bool { return strings.Contains(r.Why, "nothing tells") }))
			})
		}
	}

	// Twins.
	a := kerneltest.NewSynthetic(kerneltest.Layout{})
	ram, cr3 := a.Behind(a.RAM)
	a.RAM = slices.Concat(ram, vmcoreinfoPage(a.CR3), vmcoreinfoPage(cr3))
	k, err := linux.Discover(t.Context(), scanner{a.Machine(), uint64(len(a.RAM)) / paging.PageSize}, nil)
	require.NoError(t, err)
	assert.True(t, slices.ContainsFunc(k.Explain(), func(r linux.Rung) bool { return strings.Contains(r.Why, "nothing tells") }))
}

// TestBySymbols: an image without registers and without crash dump information.
func TestBySymbols(t *testing.T) {
	for _, l := range []kerneltest.Layout{{}, {NoSymbols: true}} {
		s := kerneltest.NewSynthetic(l)
		text := bytes.Clone(s.SystemMap())
		const textPhys = 0x100000
		text = fmt.Appendf(text, "%016x D init_top_pgt\n", uint64(kerneltest.SyntheticText)+s.CR3-textPhys)
		syms, err := sysmap.Parse(bytes.NewReader(text))
		require.NoError(t, err)
		// Strings that lead nowhere.
		at := len(s.RAM)
		s.RAM = append(s.RAM, make([]byte, 16*paging.PageSize)...)
		copy(s.RAM[0x1234:], kerneltest.SyntheticBanner+"\n")
		copy(s.RAM[at+paging.PageSize-10:], kerneltest.SyntheticBanner+"\n")
		m := scanner{s.Machine(), uint64(len(s.RAM)) / paging.PageSize}
		_, err = linux.Discover(t.Context(), m, nil)
		require.ErrorIs(t, err, linux.ErrNoKernel)
		assert.ErrorContains(t, err, "vmcoreinfo")

		k, err := linux.Discover(t.Context(), m, &linux.Options{Symbols: syms})
		require.NoError(t, err)
		assert.Equal(t, kerneltest.SyntheticBanner, k.Banner())
		assert.Contains(t, k.Explain()[0].Why, "init_top_pgt, as the symbols that were given says")
		tasks, err := k.Processes(true)
		require.NoError(t, err)
		assert.Len(t, tasks, 6)

		path := filepath.Join(t.TempDir(), "System.map")
		require.NoError(t, os.WriteFile(path, text, 0o600))
		var asked []string
		k, err = linux.Discover(t.Context(), m, &linux.Options{SymbolFiles: func(release string) []string {
			asked = append(asked, release)
			return []string{"/no/such/file", path}
		}})
		require.NoError(t, err)
		assert.Equal(t, kerneltest.SyntheticBanner, k.Banner())
		assert.Equal(t, "9.9.9-synthetic", asked[0])

		other := bytes.ReplaceAll(text, []byte(" D linux_banner"), []byte(" D some_other"))
		syms, err = sysmap.Parse(bytes.NewReader(other))
		require.NoError(t, err)
		_, err = linux.Discover(t.Context(), m, &linux.Options{Symbols: syms})
		require.ErrorIs(t, err, linux.ErrNoKernel)
		assert.ErrorContains(t, err, "9.9.9-synthetic")
	}
}

// TestShifted: the image has 512 bytes before its memory.
func TestShifted(t *testing.T) {
	s := kerneltest.NewSynthetic(kerneltest.Layout{})
	page := make([]byte, paging.PageSize)
	copy(page, fmt.Sprintf("OSRELEASE=1\nBUILD-ID=00\nPAGESIZE=4096\nSYMBOL(swapper_pg_dir)=%x\nNUMBER(phys_base)=0\n", uint64(0xffffffff80000000)+s.CR3))
	note := make([]byte, paging.PageSize)
	copy(note[12:], "VMCOREINFO\x00\x00"+string(page[:1000]))
	s.RAM = slices.Concat(make([]byte, 512), s.RAM, note, page, make([]byte, paging.PageSize-512))
	_, err := linux.Discover(t.Context(), scanner{s.Machine(), uint64(len(s.RAM)) / paging.PageSize}, nil)
	require.ErrorIs(t, err, linux.ErrNoKernel)
	assert.ErrorContains(t, err, "512 bytes into a page")
	assert.ErrorContains(t, err, "?skip=512")
}

// A holed scanner has a flat image's memory in two runs.
type holed struct {
	scanner
	hole uint64 // frames
}

func (s holed) Ranges() iter.Seq2[paging.Frame, uint64] {
	return func(yield func(paging.Frame, uint64) bool) {
		if s.hole == 0 {
			yield(0, s.frames)
		} else if yield(0, s.hole) {
			yield(1<<20, s.frames-s.hole)
		}
	}
}

// TestLayout: where a flat image has its hole is compared with where memory ends.
func TestLayout(t *testing.T) {
	for _, tt := range []struct{ hole, top, want uint64 }{
		{0, 0x90000, 0},        // all below 4 GiB
		{0xc0000, 0x140000, 0}, // pc
		{0x80000, 0x180000, 0}, // q35
		{0, 0x140000, 0xc0000}, // none given
		{0, 0x180000, 0x80000}, //
		{0xc0000, 0x180000, 0x80000},
		{0x80000, 0x130000, 0xd0000}, // Firecracker
		{0, 1 << 50, 0},              // nonsense
		{0, 0x100001, 0xfffff},
	} {
		s := kerneltest.NewSynthetic(kerneltest.Layout{})
		s.RAM = slices.Concat(s.RAM, vmcoreinfoPage(s.CR3))
		s.Put64(s.Sym["max_pfn"], tt.top)
		k, err := linux.Discover(t.Context(), holed{scanner{s.Machine(), 0x100000}, tt.hole}, nil)
		require.NoError(t, err)
		said := rung(k, "memory layout")
		if tt.want == 0 {
			assert.Empty(t, said, "%+v", tt)
		} else {
			assert.Contains(t, said, fmt.Sprintf("?hole=%#x ", tt.want*paging.PageSize), "%+v", tt)
		}
		assert.Equal(t, tt.want != 0, slices.ContainsFunc(k.Explain(), linux.Rung.Warning))
	}
}
