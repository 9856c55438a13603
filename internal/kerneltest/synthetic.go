package kerneltest

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"
	"strings"

	"github.com/cilium/ebpf/btf"

	"github.com/vmprobes/vmprobes/internal/pagetest"
	"github.com/vmprobes/vmprobes/paging"
)

// A Layout says what differs between kernels.
type Layout struct {
	CoreLayout  bool // struct module has core_layout (before 6.4) instead of mem[]
	PCPUHot     bool // current is in pcpu_hot (6.2 to 6.14) instead of current_task
	NoTypes     bool // no BTF
	NoSymbols   bool // no table of symbols (CONFIG_KALLSYMS=n)
	OtherPlaces bool // the tables of where no probe may be have a layout of their own
	NoData      bool // only functions are among the symbols (CONFIG_KALLSYMS_ALL=n)
	// WeakBanner: the string of init/version.c comes first, and that of the build right
	// before the symbols (since 6.1).
	WeakBanner bool
	// NoStaticCalls is a kernel that has none (before 5.10).
	NoStaticCalls bool
	// ErrorInjection is a kernel that lists functions for it, and OldInjection one that
	// numbers their kinds as 6.1 does.
	ErrorInjection, OldInjection bool
}

// Where things are in a Synthetic guest.
const (
	SyntheticText   = 0xffffffff81000000 // _text
	synTextSize     = 0x20000
	synROData       = SyntheticText + synTextSize
	synRODataSize   = 0x60000
	synData         = synROData + synRODataSize
	synDataSize     = 0x80000
	synModules      = 0xffffffffc0000000
	synModulesSize  = 0x10000
	synPhys         = 0x100000 // of _text
	synModulesPhys  = synPhys + synTextSize + synRODataSize + synDataSize
	synUserPhys     = synModulesPhys + synModulesSize
	synTablesPhys   = synUserPhys + 0x10000
	synRAM          = synTablesPhys + 0x20000
	SyntheticUser   = 0x7ffc00000000 // a page of the memory of init
	SyntheticBanner = "Linux version 9.9.9-synthetic (me@here) #1 SMP"
	// SyntheticWeakBanner lacks the number of the build.
	SyntheticWeakBanner = "Linux version 9.9.9-synthetic (me@here) # SMP"
	SyntheticID         = "000102030405060708090a0b0c0d0e0f10111213"
	synNames            = 2304 // functions beside those with a meaning
)

// A Synthetic is a small guest with a made-up kernel: the structures that package
// linux reads, and nothing else. It needs no file, and its parts can be changed.
type Synthetic struct {
	*Guest
	// Sym has the addresses of the kernel's symbols, and of other objects:
	// "task 1", "mm 1", "cred 40", "module demo", …
	Sym map[string]uint64

	layout Layout
	ro, rw uint64 // next free addresses
	mod    uint64
	syms   []synSymbol
	tables *pagetest.Tables
	types  uint32 // how many the kernel has
}

type synSymbol struct {
	addr uint64
	typ  byte
	name string
}

// NewSynthetic makes a guest.
func NewSynthetic(l Layout) *Synthetic {
	s := &Synthetic{
		Guest: &Guest{RAM: make([]byte, synRAM)}, Sym: make(map[string]uint64), layout: l,
		ro: synROData, rw: synData, mod: synModules,
	}
	free := uint64(synTablesPhys / paging.PageSize)
	alloc := func() (uint64, []byte) {
		free++
		return free - 1, s.page(paging.Frame(free - 1))
	}
	s.tables = pagetest.New(pagetest.FourLevel, alloc)
	s.CR3 = s.tables.CR3
	const flags = pagetest.Global | pagetest.Accessed | pagetest.Dirty
	linear := func(va, phys, size, flags uint64) {
		for off := uint64(0); off < size; off += paging.PageSize {
			s.tables.Map(pagetest.Mapping{Virt: va + off, Phys: phys + off, Level: 1, Flags: flags})
		}
	}
	linear(SyntheticText, synPhys, synTextSize, flags)
	linear(synROData, synPhys+synTextSize, synRODataSize, flags|pagetest.NX)
	linear(synData, synPhys+synTextSize+synRODataSize, synDataSize, flags|pagetest.NX|pagetest.Writable)
	linear(synModules, synModulesPhys, synModulesSize, flags|pagetest.Writable)

	for i := range synTextSize { // all NOPs
		s.RAM[synPhys+i] = 0x90
	}
	s.sym('T', "_text", SyntheticText)
	s.sym('T', "_stext", SyntheticText)
	s.sym('T', "_etext", SyntheticText+synTextSize)
	for i := range uint64(synNames) {
		s.sym('t', fmt.Sprintf("fn_%04d", i), SyntheticText+16*(i+1))
	}
	if l.WeakBanner {
		s.String(&s.ro, SyntheticWeakBanner+"\n")
	} else {
		s.sym('D', "linux_banner", s.String(&s.ro, SyntheticBanner+"\n"))
	}
	notes := le32s(4, 4, 1) // some other note first
	notes = append(append(notes, "Xen\x00abcd"...), le32s(4, 20, 3)...)
	notes = append(notes, "GNU\x00"...)
	for i := range byte(20) {
		notes = append(notes, i)
	}
	s.sym('R', "__start_notes", s.put(&s.ro, notes))
	s.sym('R', "__stop_notes", s.Sym["__start_notes"]+uint64(len(notes)))
	if !l.NoTypes {
		blob := s.btf()
		s.sym('R', "__start_BTF", s.put(&s.ro, blob))
		s.sym('R', "__stop_BTF", s.Sym["__start_BTF"]+uint64(len(blob)))
	}
	s.places()
	s.syscalls()
	s.tasks()
	s.modules()
	s.sym('d', "__initcall__kmod_part__293_217_part_init6", s.data(4)) // of what is built in
	s.sym('B', "_end", synData+synDataSize-8)
	if !l.NoSymbols {
		s.kallsyms()
	}
	if s.ro > synROData+synRODataSize || s.rw > synData+synDataSize-16<<10 || s.mod > synModules+synModulesSize {
		panic("kerneltest: a synthetic kernel that is too large")
	}
	return s
}

// SetClock sets the kernel's time of day, in seconds since 1970.
func (s *Synthetic) SetClock(sec uint64) { s.Put64(s.Sym["tk_core"]+8+0x70, sec) }

// Behind puts the guest's memory behind other memory, which is as long as a page's
// multiple, as another kernel's that is there, too. It returns both, and where its
// page tables now begin.
func (s *Synthetic) Behind(other []byte) (ram []byte, cr3 uint64) {
	by := uint64(len(other))
	ram = append(slices.Clone(other), s.RAM...)
	for at := by + synTablesPhys; at < uint64(len(ram)); at += 8 {
		if e := binary.LittleEndian.Uint64(ram[at:]); e&pagetest.Present != 0 {
			binary.LittleEndian.PutUint64(ram[at:], e+by)
		}
	}
	return ram, s.CR3 + by
}

func le32s(words ...uint32) (b []byte) {
	for _, w := range words {
		b = binary.LittleEndian.AppendUint32(b, w)
	}
	return b
}

func (s *Synthetic) sym(typ byte, name string, addr uint64) {
	s.Sym[name] = addr
	s.syms = append(s.syms, synSymbol{addr, typ, name})
}

// Bytes returns kernel memory from addr on.
func (s *Synthetic) Bytes(addr uint64) []byte {
	if addr >= synModules {
		return s.RAM[addr-synModules+synModulesPhys:]
	}
	return s.RAM[addr-SyntheticText+synPhys:]
}

// Put64 sets a word of the kernel's.
func (s *Synthetic) Put64(addr, v uint64) { binary.LittleEndian.PutUint64(s.Bytes(addr), v) }

// Put32 sets half a word of the kernel's.
func (s *Synthetic) Put32(addr uint64, v uint32) { binary.LittleEndian.PutUint32(s.Bytes(addr), v) }

// Get64 returns a word of the kernel's.
func (s *Synthetic) Get64(addr uint64) uint64 { return binary.LittleEndian.Uint64(s.Bytes(addr)) }

// put takes memory behind *at.
func (s *Synthetic) put(at *uint64, b []byte) uint64 {
	addr := (*at + 15) &^ 15
	copy(s.Bytes(addr), b)
	*at = addr + uint64(len(b))
	return addr
}

func (s *Synthetic) data(size uint64) uint64 { return s.put(&s.rw, make([]byte, size)) }

// String puts a string behind *at.
func (s *Synthetic) String(at *uint64, str string) uint64 { return s.put(at, []byte(str+"\x00")) }

// list makes a list of a head and members.
func (s *Synthetic) list(heads ...uint64) {
	for i, h := range heads {
		next := heads[(i+1)%len(heads)]
		s.Put64(h, next)
		s.Put64(next+8, h)
	}
}

// A synField is a member: its type is "u8" to "u64", "int", "char[16]", "*" or "*name"
// for a pointer, or a struct's name, also with an array's length.
type synField struct {
	off  uint32
	name string
	typ  string
}

// Offsets of the made-up structures.
const (
	TaskTasks      = 0x100
	TaskMM         = 0x110
	TaskExitState  = 0x120
	TaskPID        = 0x128
	TaskParent     = 0x130
	TaskThreadNode = 0x140
	TaskCred       = 0x150
	TaskComm       = 0x160
	TaskSignal     = 0x170
	TaskCgroups    = 0x178
	TaskFlags      = 0x180
	TaskWorker     = 0x188 // worker_private
	TaskStack      = 0x190
	TaskCanary     = 0x198
	TaskState      = 0x1a0 // __state, or state in Layout.CoreLayout
	KthreadName    = 0x18  // in struct kthread
	taskSize       = 0x200
	MMPgd          = 72
	MMStartCode    = 0x100 // and ten more
	ModuleList     = 8
	ModuleName     = 24
	ModuleSyms     = 0x60
	ModuleNumSyms  = 0x68
	ModuleKallsyms = 0x70
	ModuleMem      = 0x80

	ModuleJumpEntries   = 0x100 // their address; their number is behind it
	ModuleStaticCalls   = 0x110
	ModuleFtrace        = 0x120
	ModuleExTable       = 0x130
	ModuleNoinstr       = 0x140
	ModuleKprobes       = 0x150
	ModuleKlp           = 0x160
	SyntheticAsm        = SyntheticText + 0xa000  // what is no fn_
	SyntheticEntry      = SyntheticText + 0x14000 // 256 bytes of entry code
	SyntheticDead       = 0x4000                  // bytes of int3 before and behind it
	SyntheticHypercalls = SyntheticText + 0x1a000 // the hypercall page
)

// Fn returns the address of fn_i: 16 bytes of NOPs, if nothing else is said.
func Fn(i uint64) uint64 { return SyntheticText + 16*(i+1) }

func (s *Synthetic) structs() map[string]struct {
	size   uint32
	fields []synField
} {
	type st = struct {
		size   uint32
		fields []synField
	}
	m := map[string]st{
		"list_head": {16, []synField{{0, "next", "*list_head"}, {8, "prev", "*list_head"}}},
		"task_struct": {taskSize, []synField{
			{TaskTasks, "tasks", "list_head"}, {TaskMM, "mm", "*mm_struct"}, {TaskExitState, "exit_state", "int"},
			{TaskPID, "pid", "int"}, {TaskPID + 4, "tgid", "int"}, {TaskParent, "real_parent", "*task_struct"},
			{TaskThreadNode, "thread_node", "list_head"}, {TaskCred, "cred", "*cred"}, {TaskComm, "comm", "char[16]"},
			{TaskSignal, "signal", "*signal_struct"}, {TaskCgroups, "cgroups", "*css_set"},
			{TaskFlags, "flags", "u32"}, {TaskWorker, "worker_private", "*"},
		}},
		"kthread":       {32, []synField{{KthreadName, "full_name", "*char"}}},
		"kuid_t":        {4, []synField{{0, "val", "u32"}}},
		"cred":          {64, []synField{{24, "euid", "kuid_t"}, {28, "egid", "kuid_t"}}},
		"signal_struct": {64, []synField{{16, "thread_head", "list_head"}}},
		"css_set":       {64, []synField{{8, "dfl_cgrp", "*cgroup"}}},
		"cgroup":        {64, []synField{{24, "kn", "*kernfs_node"}}},
		"kernfs_node":   {64, []synField{{8, "parent", "*kernfs_node"}, {16, "name", "*char"}}},
		"timekeeper":    {0x80, []synField{{0x70, "xtime_sec", "u64"}}},
		"mm_struct":     {0x180, []synField{{MMPgd, "pgd", "*"}}},
		"module": {0x200, []synField{
			{0, "state", "int"}, {ModuleList, "list", "list_head"}, {ModuleName, "name", "char[56]"},
			{ModuleSyms, "syms", "*kernel_symbol"}, {ModuleNumSyms, "num_syms", "u32"}, {ModuleKallsyms, "kallsyms", "*mod_kallsyms"},
			{ModuleJumpEntries, "jump_entries", "*"}, {ModuleJumpEntries + 8, "num_jump_entries", "u32"},
			{ModuleFtrace, "ftrace_callsites", "*"}, {ModuleFtrace + 8, "num_ftrace_callsites", "u32"},
			{ModuleExTable, "extable", "*"}, {ModuleExTable + 8, "num_exentries", "u32"},
			{ModuleNoinstr, "noinstr_text_start", "*"}, {ModuleNoinstr + 8, "noinstr_text_size", "u32"},
			{ModuleKprobes, "kprobes_text_start", "*"}, {ModuleKprobes + 8, "kprobes_text_size", "u32"},
			{ModuleKlp, "klp", "u8"},
		}},
		"smp_alt_module":         {64, []synField{{0, "mod", "*module"}, {8, "name", "*char"}, {16, "locks", "*"}, {24, "locks_end", "*"}, {32, "text", "*"}, {40, "text_end", "*"}, {48, "next", "list_head"}}},
		"mod_kallsyms":           {32, []synField{{0, "symtab", "*"}, {8, "num_symtab", "u32"}, {16, "strtab", "*char"}, {24, "typetab", "*char"}}},
		"kernel_symbol":          {12, []synField{{0, "value_offset", "int"}, {4, "name_offset", "int"}}},
		"btf_module":             {64, []synField{{0, "list", "list_head"}, {16, "module", "*module"}, {24, "btf", "*btf"}}},
		"btf":                    {64, []synField{{0, "data", "*"}, {24, "data_size", "u32"}}},
		"pcpu_hot":               {64, []synField{{0, "current_task", "*task_struct"}}},
		"kprobe_blacklist_entry": {32, []synField{{0, "list", "list_head"}, {16, "start_addr", "u64"}, {24, "end_addr", "u64"}}},
		"dyn_ftrace":             {16, []synField{{0, "ip", "u64"}, {8, "flags", "u64"}}},
		"ftrace_page":            {24, []synField{{0, "next", "*ftrace_page"}, {8, "records", "*dyn_ftrace"}, {16, "index", "int"}}},
		"syscall_metadata":       {48, []synField{{0, "name", "*char"}, {8, "syscall_nr", "int"}, {12, "nb_args", "u8"}, {16, "types", "*"}, {24, "args", "*"}}},
	}
	task := m["task_struct"]
	task.fields = append(task.fields, synField{TaskStack, "stack", "*"}, synField{TaskCanary, "stack_canary", "u64"})
	if s.layout.CoreLayout {
		task.fields = append(task.fields, synField{TaskState, "state", "u64"})
	} else {
		task.fields = append(task.fields, synField{TaskState, "__state", "u32"})
	}
	m["task_struct"] = task
	if s.layout.OtherPlaces {
		m["kprobe_blacklist_entry"] = st{40, []synField{{0, "list", "list_head"}, {24, "start_addr", "u64"}, {32, "end_addr", "u64"}}}
		m["dyn_ftrace"] = st{24, []synField{{8, "ip", "u64"}, {16, "flags", "u64"}}}
	}
	mm := m["mm_struct"]
	for i, name := range []string{"start_code", "end_code", "start_data", "end_data", "start_brk", "brk", "start_stack", "arg_start", "arg_end", "env_start", "env_end"} {
		mm.fields = append(mm.fields, synField{MMStartCode + uint32(8*i), name, "u64"})
	}
	m["mm_struct"] = mm
	mod := m["module"]
	if !s.layout.NoStaticCalls {
		mod.fields = append(mod.fields, synField{ModuleStaticCalls, "static_call_sites", "*"}, synField{ModuleStaticCalls + 8, "num_static_call_sites", "int"})
	}
	if s.layout.CoreLayout {
		m["module_layout"] = st{32, []synField{{0, "base", "*"}, {8, "size", "u32"}, {12, "text_size", "u32"}}}
		mod.fields = append(mod.fields, synField{ModuleMem, "core_layout", "module_layout"}, synField{ModuleMem + 32, "init_layout", "module_layout"})
	} else {
		m["module_memory"] = st{16, []synField{{0, "base", "*"}, {8, "size", "u32"}}}
		mod.fields = append(mod.fields, synField{ModuleMem, "mem", "module_memory[7]"})
	}
	m["module"] = mod
	return m
}

// btf returns the structures as a kernel describes them.
func (s *Synthetic) btf() []byte {
	long := &btf.Int{Name: "unsigned long", Size: 8}
	base := map[string]btf.Type{
		"u64": long, "u32": &btf.Int{Name: "unsigned int", Size: 4}, "u8": &btf.Int{Name: "unsigned char", Size: 1},
		"int": &btf.Int{Name: "int", Size: 4, Encoding: btf.Signed}, "char": &btf.Int{Name: "char", Size: 1, Encoding: btf.Signed}, "": &btf.Void{},
	}
	defs := s.structs()
	for name, d := range defs {
		base[name] = &btf.Struct{Name: name, Size: d.size}
	}
	var typ func(string) btf.Type
	typ = func(t string) btf.Type {
		if to, ok := strings.CutPrefix(t, "*"); ok {
			return &btf.Pointer{Target: typ(to)}
		}
		if elem, n, ok := strings.Cut(t, "["); ok {
			var count uint32
			fmt.Sscanf(n, "%d]", &count)
			return &btf.Array{Index: long, Type: typ(elem), Nelems: count}
		}
		return base[t]
	}
	all := []btf.Type{long}
	names := make([]string, 0, len(defs))
	for name := range defs {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		st := base[name].(*btf.Struct)
		for _, f := range defs[name].fields {
			st.Members = append(st.Members, btf.Member{Name: f.name, Type: typ(f.typ), Offset: btf.Bits(f.off * 8)})
		}
		all = append(all, st)
	}
	// fn_0700(const char *name, const char *buf, int n, int, int, int, int)
	text := &btf.Pointer{Target: &btf.Const{Type: base["char"]}}
	proto := &btf.FuncProto{Return: base["int"], Params: []btf.FuncParam{{Name: "name", Type: text}, {Name: "buf", Type: text}, {Name: "n", Type: base["int"]}}}
	for range 4 {
		proto.Params = append(proto.Params, btf.FuncParam{Type: base["int"]})
	}
	all = append(all, &btf.Func{Name: "fn_0700", Type: proto, Linkage: btf.StaticFunc})
	// fn_0702(int a, struct list_head two, struct kernel_symbol also_two, struct mod_kallsyms stack, struct list_head none_left, u64 last)
	proto = &btf.FuncProto{Return: base["int"], Params: []btf.FuncParam{
		{Name: "a", Type: base["int"]}, {Name: "two", Type: base["list_head"]}, {Name: "also_two", Type: base["kernel_symbol"]},
		{Name: "stack", Type: base["mod_kallsyms"]}, {Name: "none_left", Type: base["list_head"]}, {Name: "last", Type: base["u64"]},
	}}
	all = append(all, &btf.Func{Name: "fn_0702", Type: proto, Linkage: btf.StaticFunc})
	b, err := btf.NewBuilder(all, nil)
	if err != nil {
		panic(err)
	}
	blob, err := b.Marshal(nil, &btf.MarshalOptions{Order: binary.LittleEndian})
	if err != nil {
		panic(err)
	}
	spec, err := btf.LoadSpecFromReader(bytes.NewReader(blob))
	if err != nil {
		panic(err)
	}
	s.types = 0
	for _, err := range spec.All() {
		if err != nil {
			panic(err)
		}
		s.types++
	}
	s.types-- // void
	return blob
}

// code puts instructions into the text.
func (s *Synthetic) code(addr uint64, b ...byte) { copy(s.Bytes(addr), b) }

// relative makes a table behind *at, of entries that begin with the distance from
// themselves to an address.
func (s *Synthetic) relative(at *uint64, entry uint64, addrs ...uint64) (base, size uint64) {
	base = s.put(at, make([]byte, entry*uint64(len(addrs))))
	for i, a := range addrs {
		e := base + entry*uint64(i)
		s.Put32(e, uint32(a-e))
	}
	return base, entry * uint64(len(addrs))
}

// Instructions.
var (
	synNOP5  = []byte{0x0f, 0x1f, 0x44, 0, 0}
	synEndbr = []byte{0xf3, 0x0f, 0x1e, 0xfa}
	synNOP4  = []byte{0x66, 0x0f, 0x1f, 0} // what becomes of an ENDBR64 that isn't needed
)

// places makes what says where no probe may be, and functions of every kind as far
// as that is concerned.
func (s *Synthetic) places() {
	s.sym('T', "__noinstr_text_start", Fn(100))
	s.sym('T', "__noinstr_text_end", Fn(110))
	s.sym('d', "max_pfn", s.data(8))
	s.Put64(s.Sym["max_pfn"], synRAM/paging.PageSize)
	s.sym('d', "tk_core", s.data(8+0x80))
	s.SetClock(1700000000)
	s.sym('D', "system_state", s.data(8))
	s.Put32(s.Sym["system_state"], 3) // SYSTEM_RUNNING

	// Functions that tell what the kernel is able to do.
	asm := uint64(SyntheticAsm)
	asmSym := func(name string) uint64 {
		asm += 0x20
		s.sym('T', name, asm)
		return asm
	}
	for _, name := range []string{"register_kprobe", "arch_jump_label_transform", "ftrace_location", "alternatives_enable_smp"} {
		asmSym(name)
	}
	for _, name := range []string{"__x64_sys_openat", "__x64_sys_getpid", "__x64_sys_undescribed", "__ia32_sys_openat", "__ia32_compat_sys_openat", "sys_old"} {
		asmSym(name)
	}
	if !s.layout.NoStaticCalls {
		asmSym("__static_call_update")
		asmSym("__SCT__something")
	}
	asmSym("ftrace_call")
	asmSym("bpf_dispatcher_xdp_func")
	asmSym("fn_0200.part.0")
	for _, name := range []string{"__x86_return_thunk", "__x86_indirect_thunk_rax", "__pi___x86_indirect_thunk_rbx", "arch_rethook_trampoline", "return_to_handler", "__switch_to_asm"} {
		asmSym(name)
	}
	s.code(s.Sym["__switch_to_asm"], 0xc3)

	moved := uint64(0)
	if s.layout.OtherPlaces {
		moved = 8
	}
	s.sym('d', "kprobe_blacklist", s.data(16))
	s.Sym["blacklist entry"] = s.blacklist(Fn(200), Fn(201))

	// A jump label to the end of its function, a short one, one whose code was freed,
	// one right behind ftrace's NOP, one that leads right behind it.
	jumps, size := s.relative(&s.ro, 16, Fn(300), Fn(301), synData, Fn(430)+5, Fn(460)+8)
	for i, to := range []uint64{Fn(300) + 15, Fn(301) + 15, synData, Fn(430) + 15, Fn(460) + 5} {
		e := jumps + 16*uint64(i) + 4
		s.Put32(e, uint32(to-e))
	}
	s.sym('r', "__start___jump_table", jumps)
	s.sym('r', "__stop___jump_table", jumps+size)
	s.code(Fn(300), synNOP5...)
	s.code(Fn(301), 0xeb, 0x0d)
	if !s.layout.NoStaticCalls {
		calls, size := s.relative(&s.ro, 8, Fn(310), Fn(311))
		s.sym('r', "__start_static_call_sites", calls)
		s.sym('r', "__stop_static_call_sites", calls+size)
		s.code(Fn(310), 0xe8, 0, 0, 0, 0)
		s.code(Fn(311), 0x0f, 0x84, 0, 0, 0, 0) // JE
	}
	faults, size := s.relative(&s.ro, 12, Fn(330), synData, Fn(331)+3)
	s.sym('R', "__start___ex_table", faults)
	s.sym('R', "__stop___ex_table", faults+size)

	// The kernel has booted with one CPU.
	s.sym('b', "uniproc_patched", s.data(8))
	s.Put32(s.Sym["uniproc_patched"], 1)
	s.sym('d', "smp_alt_modules", s.data(16))
	s.Sym["locks of the kernel"] = s.locks(SyntheticText, synTextSize, Fn(320), synData)

	// What ftrace may rewrite: at a function's entry, or behind ENDBR64.
	s.code(Fn(400), synNOP5...)
	s.code(Fn(401), synNOP5...)
	s.code(Fn(410), 0xe8, 0, 0, 0, 0) // is traced
	s.code(Fn(411), append(synEndbr, synNOP5...)...)
	s.code(Fn(430), append(synNOP5, synNOP5...)...)             // a jump label behind it
	s.code(Fn(440), append(synNOP5, 0x90, 0x90, 0xeb, 0xfc)...) // a loop begins behind it
	s.code(Fn(450), synNOP5...)                                 // the same, by way of what was split off
	s.code(asmSym("fn_0450.cold"), 0xe9, 0, 0, 0, 0)
	s.Put32(asm+1, uint32(Fn(450)+5-(asm+5)))
	s.code(Fn(460), synNOP5...)
	s.code(Fn(460)+8, synNOP5...)
	s.code(Fn(470), append(append(synEndbr, synNOP5...), 0x90, 0xeb, 0xfd)...) // a loop behind both
	s.code(Fn(480), append(synNOP4, synNOP5...)...)
	s.code(Fn(490), 0xe9, 0, 1, 0, 0)                           // leads elsewhere
	s.code(Fn(500), synEndbr...)                                // isn't traced
	s.code(Fn(510), append(synNOP5, 0xcc, 1, 2, 3, 4, 0x90)...) // a probe of the guest's own behind it
	s.code(Fn(520), 0xe8, 0xfb, 0xff, 0xff, 0xff)               // no call of ftrace's: like a traced one
	s.code(Fn(530), append([]byte{0xc3}, 0xcc, 0xcc, 0x90)...)  // int3 as padding
	s.sym('t', "__pfx_fn_0540", Fn(540)-8)

	if s.layout.ErrorInjection {
		asmSym("within_error_injection_list")
		s.sym('d', "error_injection_list", s.data(16))
		first := uint32(0)
		if s.layout.OldInjection {
			first = 1
		}
		for i, kind := range []uint32{0, 1, 2, 3, 9} {
			s.Sym[fmt.Sprintf("injectable %d", i)] = s.injectable(Fn(700+uint64(i)), first+kind)
		}
		s.injectable(s.Sym["__x64_sys_getpid"], first+1)
	}

	start, page, page2 := s.data(8), s.data(24), s.data(24)
	s.sym('d', "ftrace_pages_start", start)
	s.Sym["ftrace page"], s.Sym["ftrace page 2"] = page, page2
	s.Put64(start, page)
	s.Put64(page, page2)
	for page, sites := range map[uint64][]uint64{
		page:  {Fn(400), Fn(401)},
		page2: {Fn(410), Fn(411) + 4, Fn(430), Fn(440), Fn(450), Fn(460), Fn(470) + 4, Fn(480) + 4, Fn(490), Fn(510)},
	} {
		records := s.data((16 + moved) * uint64(len(sites)))
		s.Put64(page+8, records)
		s.Put32(page+16, uint32(len(sites)))
		for j, at := range sites {
			s.Put64(records+(16+moved)*uint64(j)+moved, at)
		}
	}

	// Room between sections, and a page that Xen fills.
	int3 := func(addr, n uint64) {
		for i := range n {
			s.Bytes(addr)[i] = 0xcc
		}
	}
	s.sym('T', "__entry_text_start", SyntheticEntry)
	s.sym('T', "__entry_text_end", SyntheticEntry+0x100)
	int3(SyntheticEntry-SyntheticDead, SyntheticDead)
	int3(SyntheticEntry+0x100, SyntheticDead)
	s.sym('T', "hypercall_page", SyntheticHypercalls)
	s.sym('T', "behind_hypercall_page", SyntheticHypercalls+0x1000)
	int3(SyntheticHypercalls+0x800, 0x800)
	s.sym('T', "area_of_int3", SyntheticHypercalls+0x2000)
	int3(SyntheticHypercalls+0x2000, 0x200)
}

// blacklist adds an entry to the kernel's list of what kprobes must not touch.
func (s *Synthetic) blacklist(start, end uint64) uint64 {
	moved := uint64(0)
	if s.layout.OtherPlaces {
		moved = 8
	}
	entry := s.data(40)
	s.append(s.Sym["kprobe_blacklist"], entry)
	s.Put64(entry+16+moved, start)
	s.Put64(entry+24+moved, end)
	return entry
}

// injectable adds a struct ei_entry to the kernel's list.
func (s *Synthetic) injectable(start uint64, kind uint32) uint64 {
	entry := s.data(48)
	s.append(s.Sym["error_injection_list"], entry)
	s.Put64(entry+16, start)
	s.Put64(entry+24, start+16)
	s.Put32(entry+32, kind)
	return entry
}

// locks adds a struct smp_alt_module, of LOCK prefixes that were made DS prefixes.
func (s *Synthetic) locks(text, size uint64, at ...uint64) uint64 {
	m := s.data(64)
	s.append(s.Sym["smp_alt_modules"], m+48)
	locks, n := s.relative(&s.ro, 4, at...)
	s.Put64(m+16, locks)
	s.Put64(m+24, locks+n)
	s.Put64(m+32, text)
	s.Put64(m+40, text+size)
	return m
}

// append puts a member behind the others of a list.
func (s *Synthetic) append(head, member uint64) {
	if s.Get64(head) == 0 {
		s.list(head, member)
		return
	}
	last := s.Get64(head + 8)
	s.Put64(last, member)
	s.Put64(member, head)
	s.Put64(member+8, last)
	s.Put64(head+8, member)
}

func (s *Synthetic) syscalls() {
	table := s.data(8 * 128)
	s.sym('D', "sys_call_table", table)
	for i := range uint64(128) {
		s.Put64(table+8*i, s.Sym[fmt.Sprintf("fn_%04d", 2*i)])
	}
	for i, c := range []struct {
		name string
		args [][2]string
	}{
		{"openat", [][2]string{{"int", "dfd"}, {"const char *", "filename"}, {"int", "flags"}}},
		{"getpid", nil},
	} {
		meta := s.data(48)
		s.sym('d', "__syscall_meta__"+c.name, meta)
		s.Put64(meta, s.String(&s.rw, "sys_"+c.name))
		s.Put32(meta+8, uint32(257+i))
		s.Bytes(meta)[12] = byte(len(c.args))
		types, names := s.data(8*uint64(len(c.args))), s.data(8*uint64(len(c.args)))
		s.Put64(meta+16, types)
		s.Put64(meta+24, names)
		for j, a := range c.args {
			s.Put64(types+uint64(8*j), s.String(&s.rw, a[0]))
			s.Put64(names+uint64(8*j), s.String(&s.rw, a[1]))
		}
	}
}

// SyntheticArgs is the command line of init.
var SyntheticArgs = []string{"/sbin/init", "--flag", ""}

// SyntheticStack returns where the stack of a task begins. There is no memory.
func SyntheticStack(pid uint32) uint64 { return 0xffffc90000000000 + uint64(pid)<<16 }

// tasks makes the processes: swapper (0), init (1), kthreadd (2), kworker (3), a
// daemon with two threads (40, 41) in a cgroup, and a zombie (50).
func (s *Synthetic) tasks() {
	signals := make(map[uint32]uint64)
	nodes := make(map[uint32][]uint64)
	leaders := []uint64{}
	cgroup := func(parent uint64, name string) uint64 {
		kn := s.data(64)
		s.Put64(kn+8, parent)
		s.Put64(kn+16, s.String(&s.rw, name))
		return kn
	}
	rootNode := cgroup(0, "")
	slice := cgroup(rootNode, "system.slice")
	service := cgroup(slice, "daemon.service")
	s.Sym["cgroup root"], s.Sym["cgroup slice"], s.Sym["cgroup service"] = rootNode, slice, service
	set := func(kn uint64) uint64 {
		cg, css := s.data(64), s.data(64)
		s.Put64(cg+24, kn)
		s.Put64(css+8, cg)
		return css
	}
	rootSet, serviceSet := set(rootNode), set(service)
	for _, t := range []struct {
		pid, tgid, parent, uid uint32
		comm                   string
	}{
		{0, 0, 0, 0, "swapper/0"},
		{1, 1, 0, 0, "init"},
		{2, 2, 0, 0, "kthreadd"},
		{3, 3, 2, 0, "kworker/0:0"},
		{40, 40, 1, 1000, "daemon"},
		{41, 40, 1, 1000, "daemon-helper"},
		{50, 50, 40, 1000, "zombie\x1b[31m"},
	} {
		task, cred := s.data(taskSize), s.data(64)
		s.Sym[fmt.Sprintf("task %d", t.pid)], s.Sym[fmt.Sprintf("cred %d", t.pid)] = task, cred
		if t.pid == 0 {
			s.sym('D', "init_task", task)
		}
		s.Put32(task+TaskPID, t.pid)
		s.Put32(task+TaskPID+4, t.tgid)
		s.Put64(task+TaskStack, SyntheticStack(t.pid))
		s.Put64(task+TaskCanary, 0x5eed5eed00000000|uint64(t.pid)<<8)
		s.Put64(task+TaskParent, s.Sym[fmt.Sprintf("task %d", t.parent)])
		s.Put64(task+TaskCred, cred)
		s.Put32(cred+24, t.uid)
		s.Put32(cred+28, t.uid+1)
		copy(s.Bytes(task+TaskComm), t.comm)
		s.Put64(task+TaskCgroups, rootSet)
		if t.tgid == 40 {
			s.Put64(task+TaskCgroups, serviceSet)
		}
		if t.pid == t.tgid {
			leaders = append(leaders, task+TaskTasks)
			signals[t.tgid] = s.data(64)
			nodes[t.tgid] = []uint64{signals[t.tgid] + 16}
		}
		s.Put64(task+TaskSignal, signals[t.tgid])
		nodes[t.tgid] = append(nodes[t.tgid], task+TaskThreadNode)
	}
	s.Put32(s.Sym["task 50"]+TaskExitState, 32) // EXIT_ZOMBIE
	s.list(leaders...)
	for _, n := range nodes {
		s.list(n...)
	}

	// Memory of its own has init. Its tables have the kernel's half, too.
	user := pagetest.New(pagetest.FourLevel, func() (uint64, []byte) {
		// Where the kernel sees them: in its data.
		s.rw = (s.rw + paging.PageSize - 1) &^ (paging.PageSize - 1)
		va := s.rw
		s.rw += paging.PageSize
		return (va - SyntheticText + synPhys) / paging.PageSize, s.Bytes(va)[:paging.PageSize:paging.PageSize]
	})
	user.Map(pagetest.Mapping{Virt: SyntheticUser, Phys: synUserPhys, Level: 1, Flags: pagetest.User | pagetest.Writable | pagetest.NX})
	copy(user.Entry(SyntheticText, 4), s.tables.Entry(SyntheticText, 4))
	args := strings.Join(SyntheticArgs, "\x00") + "\x00"
	copy(s.RAM[synUserPhys+0x100:], args)
	mm := s.data(0x180)
	s.Sym["mm 1"] = mm
	task := s.Sym["task 1"]
	s.Put64(task+TaskMM, mm)
	s.Put64(task+TaskMM+8, mm) // active_mm
	s.Put64(mm+MMPgd, user.CR3-synPhys+SyntheticText)
	for i := range uint64(11) {
		s.Put64(mm+MMStartCode+8*i, 0x400000+i<<12)
	}
	s.Put64(mm+MMStartCode+7*8, SyntheticUser+0x100)
	s.Put64(mm+MMStartCode+8*8, SyntheticUser+0x100+uint64(len(args)))

	// Two CPUs; the second runs the daemon.
	offsets, area := s.data(16), s.data(64)
	s.sym('R', "__per_cpu_offset", offsets)
	name := "current_task"
	if s.layout.PCPUHot {
		name = "pcpu_hot"
	}
	s.sym('D', name, area)
	for i, task := range []uint64{s.Sym["task 0"], s.Sym["task 40"]} {
		own := s.data(64)
		s.Put64(own, task)
		s.Put64(offsets+uint64(8*i), own-area)
	}

	// What a PV guest knows of its memory.
	p2m := s.data(48)
	s.sym('D', "xen_p2m_addr", s.data(8))
	s.Put64(s.Sym["xen_p2m_addr"], p2m)
	s.sym('D', "xen_p2m_size", s.data(8))
	s.Put64(s.Sym["xen_p2m_size"], 6)
	for i, e := range []uint64{0x1234, 1<<64 - 1, 1 << 63, 1 << 62, 1 << 52, 1<<40 - 1} {
		s.Put64(p2m+uint64(8*i), e)
	}
}

// modules makes two of them, demo and older, and one that is being set up.
func (s *Synthetic) modules() {
	head := s.data(16)
	s.sym('d', "modules", head)
	list := []uint64{head}
	for i, name := range []string{"demo", "older", "unformed"} {
		m := s.data(0x200)
		s.Sym["module "+name] = m
		list = append(list, m+ModuleList)
		copy(s.Bytes(m+ModuleName), name)
		text := s.put(&s.mod, make([]byte, 0x1000))
		s.Sym["text "+name] = text
		data := s.put(&s.mod, make([]byte, 0x800))
		s.Put64(m+ModuleMem, text)
		s.Put32(m+ModuleMem+8, 0x1000)
		if s.layout.CoreLayout {
			s.Put32(m+ModuleMem+8, 0x1800)
			s.Put32(m+ModuleMem+12, 0x1000)
		} else {
			s.Put64(m+ModuleMem+16, data)
			s.Put32(m+ModuleMem+24, 0x800)
		}
		if i == 2 {
			s.Put32(m, 3) // MODULE_STATE_UNFORMED
		}
		s.modulePlaces(m, text)
		names := "\x00" + name + "_init\x00" + name + "_run\x00" + name + "_traced\x00undefined\x00"
		strtab := s.put(&s.mod, []byte(names))
		symtab := []byte(strings.Repeat("\x00", 24))
		for j, sym := range []string{name + "_init", name + "_run", name + "_traced", "undefined"} {
			e := make([]byte, 24)
			binary.LittleEndian.PutUint32(e, uint32(strings.Index(names, "\x00"+sym)+1))
			if j < 3 {
				binary.LittleEndian.PutUint16(e[6:], 1)
			}
			binary.LittleEndian.PutUint64(e[8:], text+[]uint64{0, 0x10, 0x200, 0}[j])
			symtab = append(symtab, e...)
		}
		k := s.data(32)
		s.Sym["kallsyms "+name] = k
		s.Put64(m+ModuleKallsyms, k)
		s.Put64(k, s.put(&s.mod, symtab))
		s.Put32(k+8, 5)
		s.Put64(k+16, strtab)
		s.Put64(k+24, s.put(&s.mod, []byte("?tttU")))
		// _run is for others.
		export := s.put(&s.mod, make([]byte, 12))
		s.Put32(export, uint32(text+0x10-export))
		s.Put32(export+4, uint32(strtab+uint64(1+len(name)+6)-(export+4)))
		s.Put64(m+ModuleSyms, export)
		s.Put32(m+ModuleNumSyms, 1)
	}
	s.list(list...)

	if s.layout.NoTypes {
		return
	}
	// The types of demo: an int, called demo_t, and demo_run(demo_t howmany), whose name
	// a function of the kernel's might have.
	kernel := s.Bytes(s.Sym["__start_BTF"])
	name := binary.LittleEndian.Uint32(kernel[20:]) // of the kernel's strings: ours come behind
	types := le32s(name+1, 1<<24, 4, 32)
	first := s.types + 1
	types = append(types, le32s(0, 13<<24|1, 0, name+8, first)...) // FUNC_PROTO
	types = append(types, le32s(name+16, 12<<24, first+1)...)      // FUNC
	strs := "\x00demo_t\x00howmany\x00demo_run\x00"
	blob := append(slices.Clone(kernel[:8]), le32s(0, uint32(len(types)), uint32(len(types)), uint32(len(strs)))...)
	blob = append(append(blob, types...), strs...)
	bhead, bm, b := s.data(16), s.data(64), s.data(64)
	s.sym('d', "btf_modules", bhead)
	s.Sym["btf demo"] = b
	s.list(bhead, bm)
	s.Put64(bm+16, s.Sym["module demo"])
	s.Put64(bm+24, b)
	s.Put64(b, s.put(&s.mod, blob))
	s.Put32(b+24, uint32(len(blob)))
}

// modulePlaces makes a module's tables of its text, of what is from 0x100 on:
// jump labels (a short one, a long one, one whose code was freed), a static call, an
// expected fault, a LOCK prefix, a function on the kernel's blacklist and a section of
// each kind that mustn't be probed; and, at 0x200, a function that is traced.
func (s *Synthetic) modulePlaces(m, text uint64) {
	table := func(field uint32, base, n uint64) {
		s.Put64(m+uint64(field), base)
		s.Put32(m+uint64(field)+8, uint32(n))
	}
	jumps, _ := s.relative(&s.mod, 16, text+0x100, text+0x110, text+0x2000)
	table(ModuleJumpEntries, jumps, 3)
	s.code(text+0x100, 0x66, 0x90)
	s.code(text+0x110, append(synNOP5, 0x90)...)
	calls, _ := s.relative(&s.mod, 8, text+0x120)
	table(ModuleStaticCalls, calls, 1)
	faults, _ := s.relative(&s.mod, 12, text+0x130, text+0x2000)
	table(ModuleExTable, faults, 2)
	s.locks(text, 0x1000, text+0x140, text+0x2000)
	s.blacklist(text+0x150, text+0x160)
	table(ModuleNoinstr, text+0x160, 0x10)
	table(ModuleKprobes, text+0x170, 0x10)
	traced := s.put(&s.mod, make([]byte, 16))
	s.Put64(traced, text+0x200)
	s.Put64(traced+8, text+0x2000)
	table(ModuleFtrace, traced, 2)
	s.code(text+0x200, synNOP5...)
}

// SystemMap is what the kernel's System.map would have in it.
func (s *Synthetic) SystemMap() []byte {
	var b []byte
	for _, sym := range s.syms {
		b = fmt.Appendf(b, "%016x %c %s\n", sym.addr, sym.typ, sym.name)
	}
	return b
}

// kallsyms writes the symbols as kernels from 6.15 to 6.19 have them, without any
// packing: each character is a token of its own.
func (s *Synthetic) kallsyms() {
	if s.layout.WeakBanner {
		s.sym('D', "linux_banner", s.String(&s.ro, SyntheticBanner+"\n"))
	}
	syms := s.syms
	if s.layout.NoData {
		syms = slices.DeleteFunc(slices.Clone(syms), func(y synSymbol) bool { return y.typ|0x20 != 't' })
	}
	slices.SortStableFunc(syms, func(a, b synSymbol) int { return int(int64(a.addr - b.addr)) })
	le := binary.LittleEndian
	b := le32s(uint32(len(syms)), 0)
	align := func() {
		for len(b)%8 != 0 {
			b = append(b, 0)
		}
	}
	start := len(b)
	var markers []int
	for i, y := range syms {
		if i%256 == 0 {
			markers = append(markers, len(b)-start)
		}
		b = append(append(b, byte(1+len(y.name)), y.typ), y.name...)
	}
	align()
	for _, m := range markers {
		b = le.AppendUint32(b, uint32(m))
	}
	align()
	start = len(b)
	var index []uint16
	for c := range 256 {
		index = append(index, uint16(len(b)-start))
		token := fmt.Sprintf("%02x", c)
		if c > ' ' && c <= '~' {
			token = string(rune(c))
		}
		b = append(append(b, token...), 0)
	}
	align()
	for _, i := range index {
		b = le.AppendUint16(b, i)
	}
	for _, y := range syms {
		b = le.AppendUint32(b, uint32(y.addr-SyntheticText))
	}
	align()
	b = le.AppendUint64(b, SyntheticText)
	for i := range syms {
		b = append(b, byte(i>>16), byte(i>>8), byte(i))
	}
	s.put(&s.ro, b)
}

// MapHuge maps count GiB of memory, by pages of 1 GiB.
func (s *Synthetic) MapHuge(virt, phys uint64, count int) {
	for i := range uint64(count) {
		s.tables.Map(pagetest.Mapping{Virt: virt + i<<30, Phys: phys + i<<30, Level: 3, Flags: pagetest.NX | pagetest.Writable})
	}
}
