package linux

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/vmprobes/vmprobes/ktype"
	"github.com/vmprobes/vmprobes/sysmap"
)

// places is what a kernel knows of its own text, or of a module's.
type places struct {
	module string // whose text it is, or "" for the kernel's
	text   span
	spans  []span   // where no breakpoint may be, by address; they may overlap
	reach  uint64   // size of the largest of them
	sites  []site   // instructions that the kernel rewrites, by address
	locks  []site   // LOCK prefixes that it may put back, by address
	trace  []site   // entries of functions that ftrace may rewrite, by address
	boot   []span   // what only booting rewrites, by start, if it hasn't begun yet
	labels []branch // the jump labels among the sites, by address
	jumps  []uint64 // where they may lead, by address
	faults []uint64 // instructions whose fault is expected, by address
	fixups []branch // where the kernel goes on behind such a fault, by the instruction's address

	unknown  reasons // why a table that exists isn't known, for each such table
	noTrace  error   // why trace isn't known
	noFaults error   // why faults isn't known

	unsure time.Time // when a table was read in vain that may be readable later, or zero

	fresh     bool   // read before the kernel has executed anything
	bootReach uint64 // size of the largest of boot
}

// reasons are errors whose text is one line.
type reasons []error

func (r reasons) Error() string {
	var all []string
	for _, err := range r {
		if err != nil {
			all = append(all, strings.ReplaceAll(err.Error(), "\n", "; "))
		}
	}
	return strings.Join(all, "; ")
}

func (r reasons) Unwrap() []error {
	return slices.DeleteFunc(slices.Clone(r), func(err error) bool { return err == nil })
}

type span struct {
	start, end uint64
	why        string
}

func (s span) has(addr uint64) bool { return addr >= s.start && addr < s.end }

// site is an instruction that the kernel rewrites while it runs.
type site struct {
	addr uint64
	kind siteKind
}

// branch is where the instruction at addr may lead beside to the next one: a jump label
// while it isn't a NOP, or an instruction whose fault is expected.
type branch struct{ addr, to uint64 }

type siteKind uint8

const (
	jumpLabel siteKind = iota + 1
	staticCall
	ftraceSite
	ftraceCall
	smpLock
)

func (k siteKind) String() string {
	switch k {
	case jumpLabel:
		return "a jump label"
	case staticCall:
		return "a static call"
	case ftraceCall:
		return "ftrace's own call of its tracers"
	case smpLock:
		return "a LOCK prefix"
	}
	return "an entry that ftrace traces"
}

// Bounds of the tables in a kernel. Debian's 7.3 has 733 blacklist entries,
// 10,331 jump labels, 10,491 static calls and 47,382 ftrace sites, its 6.12 625
// entries of the exception table and 10,000 LOCK prefixes. A table of a module has at
// most maxModuleTable bytes: that of the 11,134 functions of Debian's amdgpu (6.1) has
// 87 KiB.
const (
	maxBlacklist   = 1 << 14
	maxJumpTable   = 16 << 18
	maxStaticCalls = 8 << 18
	maxFtrace      = 1 << 20
	maxFtracePages = 1 << 14
	maxExTable     = 12 << 16
	maxLocks       = 4 << 18
	maxModuleTable = 2 << 20
)

// ftraceSize is the length of what ftrace rewrites (MCOUNT_INSN_SIZE, arch/x86/
// include/asm/ftrace.h), and callRel32 the opcode of a call (SDM 2A CALL).
const (
	ftraceSize = 5
	callRel32  = 0xe8
)

// A table describes the text of the kernel. Each module has one for its own.
type table struct {
	name string
	// users are functions that only kernels with such a table have. They are among the
	// symbols even where the table isn't (CONFIG_KALLSYMS_ALL=n): without any of them,
	// the kernel has no such table.
	users  []string
	kernel func(*op, *places) (int, error)
	module func(*op, *places, ktype.Value) (int, error)
	// boot is kernel where the kernel has not run yet, if that has to be read elsewhere.
	boot func(*op, *places) (int, error)
}

var tables = []table{
	{"blacklist entries", []string{"register_kprobe", "within_kprobe_blacklist"}, (*op).readBlacklist, (*op).moduleBlacklist, (*op).bootBlacklist},
	{"jump labels", []string{"arch_jump_label_transform", "jump_label_init", "jump_label_text_reserved"}, (*op).readJumpLabels, (*op).moduleJumpLabels, nil},
	{"static calls", []string{"__static_call_update", "static_call_init", "static_call_text_reserved"}, (*op).readStaticCalls, (*op).moduleStaticCalls, nil},
	{ftraceTable, []string{"ftrace_init", "ftrace_location", "ftrace_modify_all_code"}, (*op).readFtrace, (*op).moduleFtrace, (*op).bootFtrace},
	{"LOCK prefixes", []string{"alternatives_enable_smp"}, (*op).readLocks, (*op).moduleLocks, (*op).noLocks},
}

const ftraceTable = "ftrace sites"

// spanAt returns a span that holds addr.
func (p *places) spanAt(addr uint64) (span, bool) {
	// All spans that start at or below addr and could reach it.
	i, _ := slices.BinarySearchFunc(p.spans, addr, func(s span, a uint64) int {
		if s.start <= a {
			return -1
		}
		return 1
	})
	for i--; i >= 0 && addr-p.spans[i].start < p.reach; i-- {
		if addr < p.spans[i].end {
			return p.spans[i], true
		}
	}
	return span{}, false
}

// siteAt returns the site whose instruction holds addr.
func (p *places) siteAt(k *Kernel, addr uint64) (site, bool) {
	at, ok := within(p.sites, addr, 6)
	if !ok || addr-at.addr >= k.siteSize(at) {
		return site{}, false
	}
	return at, true
}

// within returns the last site at or below addr that is less than size below.
func within(sites []site, addr, size uint64) (site, bool) {
	i, found := slices.BinarySearchFunc(sites, addr, func(s site, a uint64) int { return cmp.Compare(s.addr, a) })
	if !found {
		i--
	}
	if i < 0 || addr-sites[i].addr >= size {
		return site{}, false
	}
	return sites[i], true
}

// branchAt returns where the instruction at addr may lead.
func branchAt(branches []branch, addr uint64) (to uint64, ok bool) {
	i, found := slices.BinarySearchFunc(branches, addr, func(b branch, a uint64) int { return cmp.Compare(b.addr, a) })
	if !found {
		return 0, false
	}
	return branches[i].to, true
}

// siteSize returns the length of the instruction at a site. Since 5.14 (ab3257042c26)
// a jump label is JMP rel8, or the NOP of 2 bytes, where its target is near; since 6.3
// (923510c88d2b) a static call may be Jcc rel32.
func (k *Kernel) siteSize(s site) uint64 {
	var b [2]byte
	if _, err := k.readText(s.addr, b[:]); err != nil {
		return 6
	}
	switch {
	case s.kind == jumpLabel && (b[0] == 0xeb || b == [2]byte{0x66, 0x90}):
		return 2
	case s.kind == staticCall && b[0] == 0x0f && b[1]&0xf0 == 0x80:
		return 6
	}
	return 5
}

// sort sorts what was read, for searching.
func (p *places) sort() {
	for _, s := range [][]span{p.spans, p.boot} {
		slices.SortFunc(s, func(a, b span) int { return cmp.Compare(a.start, b.start) })
	}
	for _, s := range [][]site{p.sites, p.locks, p.trace} {
		slices.SortFunc(s, func(a, b site) int { return cmp.Compare(a.addr, b.addr) })
	}
	for _, s := range [][]branch{p.labels, p.fixups} {
		slices.SortFunc(s, func(a, b branch) int { return cmp.Compare(a.addr, b.addr) })
	}
	slices.Sort(p.jumps)
	slices.Sort(p.faults)
	for _, sp := range p.spans {
		p.reach = max(p.reach, sp.end-sp.start)
	}
	for _, sp := range p.boot {
		p.bootReach = max(p.bootReach, sp.end-sp.start)
	}
}

// placesOf returns what is known of the text that addr is in.
func (k *Kernel) placesOf(addr uint64) (*places, error) {
	if k == nil {
		return nil, ErrNoKernel
	}
	p, err := k.kernelPlaces()
	if err != nil {
		return nil, fmt.Errorf("%#x: %w: %w", addr, ErrUnknownPlaces, err)
	}
	if p.text.has(addr) {
		return p, nil
	}
	m, err := k.modulePlaces(addr)
	if err != nil {
		return nil, fmt.Errorf("%#x: %w: not in the text of the kernel, and the text of modules isn't known: %w", addr, ErrUnknownPlaces, err)
	}
	if m == nil {
		return nil, fmt.Errorf("%#x: %w: not in the text of the kernel (%#x to %#x) or of a module that runs", addr, ErrNotProbeable, p.text.start, p.text.end)
	}
	return m, nil
}

// retrySafety is how long to wait before tables that were read in vain are read again.
var retrySafety = 5 * time.Second

// kernelPlaces returns what is known of the kernel's own text. It is read once, and read
// again if not all of it could be understood: the guest may have been changing it.
func (k *Kernel) kernelPlaces() (*places, error) {
	k.safeMu.Lock()
	defer k.safeMu.Unlock()
	if k.stale() {
		fresh := k.unstarted()
		boots := k.booting()
		p, err := k.begin("places for probes").readKernelPlaces(fresh)
		if err != nil {
			return nil, err
		}
		if fresh && !k.unstarted() { // it has begun meanwhile
			p.fresh, boots = false, errors.New("it has begun to boot")
		}
		if boots != nil {
			p.unsure = time.Now()
			p.unknown = append(p.unknown, errors.New("the tables were read while the kernel booted"))
		}
		k.safe = p
	}
	return k.safe, nil
}

// has reports whether the kernel has any of the named functions.
func (k *Kernel) has(names []string) bool {
	return slices.ContainsFunc(names, func(name string) bool {
		_, err := k.syms.Lookup(name)
		return !errors.Is(err, sysmap.ErrNotFound)
	})
}

func (o *op) readKernelPlaces(fresh bool) (*places, error) {
	start, size, err := o.section("_stext", "_etext", 1<<30)
	if err != nil {
		return nil, err
	}
	p := &places{text: span{start: start, end: start + size}, fresh: fresh}
	var found []string
	for _, r := range []struct{ start, end, why string }{
		{"__entry_text_start", "__entry_text_end", "entry code"},
		{"__noinstr_text_start", "__noinstr_text_end", "code that must not be instrumented (noinstr)"},
		{"__kprobes_text_start", "__kprobes_text_end", "code that kprobes itself runs"},
		{"__cpuidle_text_start", "__cpuidle_text_end", "idle code"},
		{"__static_call_text_start", "__static_call_text_end", "static call trampolines"},
	} {
		switch a, n, err := o.section(r.start, r.end, size); {
		case err == nil && n > 0:
			p.spans = append(p.spans, span{a, a + n, r.why})
		case err != nil && !errors.Is(err, sysmap.ErrNotFound):
			p.unknown = append(p.unknown, fmt.Errorf("where %s is: %w", r.why, err))
		}
	}
	// ftrace's trampolines call tracers by an instruction that it rewrites
	// (ftrace_update_ftrace_func, ftrace_mod_jmp in arch/x86/kernel/ftrace.c).
	for _, name := range []string{"ftrace_call", "ftrace_regs_call", "ftrace_graph_call"} {
		if a, err := o.symbol(name); err == nil && p.text.has(a) {
			p.sites = append(p.sites, site{a, ftraceCall})
		}
	}
	for _, t := range tables {
		read := t.kernel
		if fresh && t.boot != nil {
			read = t.boot
		}
		n, err := read(o, p)
		switch {
		case err == nil:
			found = append(found, fmt.Sprintf("%d %s", n, t.name))
			continue
		case errors.Is(err, sysmap.ErrNotFound) && !o.has(t.users):
			o.log.Debug("not in this kernel", "what", t.name, "err", err)
			continue
		case !errors.Is(err, sysmap.ErrNotFound):
			p.unsure = time.Now() // it may be readable later
		}
		o.log.Warn("a table of this kernel is not known", "what", t.name, "err", err)
		err = fmt.Errorf("the table of %s: %w", t.name, err)
		p.unknown = append(p.unknown, err)
		if t.name == ftraceTable {
			p.noTrace = err
		}
	}
	if n, err := o.readFaults(p); err != nil {
		p.noFaults = fmt.Errorf("the exception table: %w", err)
		o.log.Warn("a table of this kernel is not known", "what", "exception table", "err", err)
		if !errors.Is(err, sysmap.ErrNotFound) {
			p.unsure = time.Now()
		}
	} else {
		found = append(found, fmt.Sprintf("%d expected faults", n))
	}
	if fresh {
		found = append(found, o.readBoot(p)...)
	}
	p.sort()
	why := ""
	if unknown := append(slices.Clone(p.unknown), p.noFaults).Error(); unknown != "" {
		why = "not known: " + unknown
	}
	o.explain("probeable", nil, why, "text %#x to %#x, %s", p.text.start, p.text.end, strings.Join(found, ", "))
	return p, nil
}

var (
	// errOtherLayout: a structure differs from that of every known kernel.
	errOtherLayout = errors.New("not the usual layout")

	errTooManyPages = fmt.Errorf("more than %d pages: %w", maxFtracePages, ErrBadKernel)
)

// byLayout reads a table of structures by the layout they have had since 3.16
// (include/linux/kprobes.h, include/linux/ftrace.h, kernel/trace/ftrace.c). If what is
// read so makes no sense, which read checks, it is read by the kernel's own types, which
// a kernel may lack and which take time to load. They must have the member path.
func (o *op) byLayout(path string, read func(t *ktype.Types, check bool) (int, error)) (int, error) {
	word := uint64(o.bits / 8)
	usual, err := ktype.New("usual layout", word, listHead(word),
		ktype.Struct{Name: "kprobe_blacklist_entry", Size: 4 * word, Fields: []ktype.StructField{
			{Name: "list", Offset: 0, Type: "list_head"},
			{Name: "start_addr", Offset: 2 * word, Type: "unsigned long"},
			{Name: "end_addr", Offset: 3 * word, Type: "unsigned long"},
		}},
		ktype.Struct{Name: "dyn_ftrace", Size: 2 * word, Fields: []ktype.StructField{
			{Name: "ip", Offset: 0, Type: "unsigned long"},
			{Name: "flags", Offset: word, Type: "unsigned long"},
		}},
		ktype.Struct{Name: "ftrace_page", Size: 2*word + 8, Fields: []ktype.StructField{
			{Name: "next", Offset: 0, Type: "ftrace_page *"},
			{Name: "records", Offset: word, Type: "dyn_ftrace *"},
			{Name: "index", Offset: 2 * word, Type: "int"},
		}})
	if err != nil {
		return 0, err
	}
	var n int
	for range listTries { // the guest may be adding to it
		if n, err = read(usual, true); !errors.Is(err, errOtherLayout) {
			break
		}
	}
	if err == nil || o.spent != nil || errors.Is(err, errTooManyPages) {
		return n, err
	}
	t, terr := o.Types()
	if terr != nil || !t.HasField(path) {
		if !errors.Is(err, errOtherLayout) {
			err = fmt.Errorf("%w: %w", errOtherLayout, err)
		}
		return 0, reasons{err, terr}
	}
	return read(t, false)
}

// twoWords returns where a struct of at most limit bytes has two words of n bytes,
// and its size.
func twoWords(t *ktype.Types, n int, name, a, b string, limit uint64) (offA, offB, size uint64, err error) {
	fa, err := t.Offset(name + "." + a)
	if err != nil {
		return 0, 0, 0, err
	}
	fb, err := t.Offset(name + "." + b)
	if err != nil {
		return 0, 0, 0, err
	}
	word := uint64(n)
	size, err = t.Sizeof(name)
	if err != nil || size < 2*word || size > limit || fa.Offset > size-word || fb.Offset > size-word {
		return 0, 0, 0, errors.Join(fmt.Errorf("struct %s of %d bytes: %w", name, size, ErrBadKernel), err)
	}
	return fa.Offset, fb.Offset, size, nil
}

// readBlacklist reads kprobe_blacklist (kernel/kprobes.c): functions marked with
// NOKPROBE_SYMBOL, and what the architecture adds. Functions of modules are in the same
// list: only entries in p's text are taken.
func (o *op) readBlacklist(p *places) (int, error) {
	head, err := o.symbol("kprobe_blacklist")
	if err != nil {
		return 0, err
	}
	lowest, size, err := o.section("_stext", "_etext", 1<<30)
	if err != nil {
		return 0, err
	}
	return o.byLayout("kprobe_blacklist_entry.end_addr", func(t *ktype.Types, check bool) (int, error) {
		long := o.bits / 8
		var entry [128]byte
		from, to, n, err := twoWords(t, long, "kprobe_blacklist_entry", "start_addr", "end_addr", uint64(len(entry)))
		if err != nil {
			return 0, err
		}
		spans, err := again(o, func() ([]span, error) {
			var spans []span
			for at, err := range t.List(o, head, "kprobe_blacklist_entry", "list", maxBlacklist) {
				if err != nil {
					return nil, err
				}
				if err := o.Read(at, entry[:n]); err != nil {
					return nil, err
				}
				start, end := word(entry[from:], long), word(entry[to:], long)
				if check && (start < lowest || end < start) { // modules are above the kernel
					return nil, fmt.Errorf("%w: entry of %#x to %#x", errOtherLayout, start, end)
				}
				if end > start && end-start <= size && start < p.text.end && end > p.text.start {
					spans = append(spans, span{start, end, "on the kernel's own kprobe blacklist"})
				}
			}
			return spans, nil
		})
		if err != nil {
			return 0, err
		}
		p.spans = append(p.spans, spans...)
		return len(spans), nil
	})
}

// readJumpLabels reads the jump table: struct jump_entry { s32 code, target;
// long key } with code relative to itself (include/linux/jump_label.h,
// HAVE_ARCH_JUMP_LABEL_RELATIVE; x86 since 4.19).
func (o *op) readJumpLabels(p *places) (int, error) {
	return o.readRelative(p, "__start___jump_table", "__stop___jump_table", o.jumpEntry(), maxJumpTable, jumpLabel)
}

func (o *op) jumpEntry() uint64 { return 8 + uint64(o.bits/8) }

// readStaticCalls reads struct static_call_site { s32 addr, key }, relative as
// well (include/linux/static_call_types.h, since 5.10).
func (o *op) readStaticCalls(p *places) (int, error) {
	return o.readRelative(p, "__start_static_call_sites", "__stop_static_call_sites", staticCallSite, maxStaticCalls, staticCall)
}

const staticCallSite = 8

// readRelative reads a table whose entries begin with a 32-bit distance to the
// instruction that they describe.
func (o *op) readRelative(p *places, start, stop string, entry, limit uint64, kind siteKind) (int, error) {
	base, size, err := o.section(start, stop, limit)
	if err != nil {
		return 0, err
	}
	if size%entry != 0 {
		return 0, fmt.Errorf("%s: %d bytes: %w", start, size, ErrBadKernel)
	}
	table, err := o.table(start, base, size, limit)
	if err != nil {
		return 0, err
	}
	return p.add(base, table, entry, kind), nil
}

// add adds the instructions of a table that begins at base, and returns how many
// are in the text. The others were in init code, which has been freed.
func (p *places) add(base uint64, table []byte, entry uint64, kind siteKind) (n int) {
	for off := uint64(0); off+entry <= uint64(len(table)); off += entry {
		addr := relative32(base, table, off)
		if !p.text.has(addr) {
			continue
		}
		n++
		switch kind {
		case 0:
			p.faults = append(p.faults, addr)
			p.fixups = append(p.fixups, branch{addr, relative32(base, table, off+4)})
		case smpLock:
			p.locks = append(p.locks, site{addr, kind})
		case jumpLabel:
			to := relative32(base, table, off+4)
			p.jumps = append(p.jumps, to)
			p.labels = append(p.labels, branch{addr, to})
			p.sites = append(p.sites, site{addr, kind})
		default:
			p.sites = append(p.sites, site{addr, kind})
		}
	}
	return n
}

// relative32 returns the address that the 32 bits at off in a table at base give as a
// distance from themselves.
func relative32(base uint64, table []byte, off uint64) uint64 {
	return base + off + uint64(int64(int32(le32(table[off:]))))
}

// readFaults reads the exception table: struct exception_table_entry { int insn,
// fixup, data }, the first two relative as well (arch/x86/include/asm/extable.h; the third
// member is called handler before 5.16, and isn't there before 4.6).
func (o *op) readFaults(p *places) (int, error) {
	base, size, err := o.section("__start___ex_table", "__stop___ex_table", maxExTable)
	if err != nil {
		return 0, err
	}
	if size == 0 || size%exTableEntry != 0 {
		return 0, fmt.Errorf("%d bytes: %w", size, ErrBadKernel)
	}
	table, err := o.table("exception table", base, size, maxExTable)
	if err != nil {
		return 0, err
	}
	return p.add(base, table, exTableEntry, 0), nil
}

const exTableEntry = 12

// readLocks reads which LOCK prefixes alternatives_enable_smp would restore when a
// second CPU comes up (arch/x86/kernel/alternative.c). A kernel that booted with one CPU
// has turned LOCK into a DS prefix, and until then keeps lists of where, in its own text
// and in modules. In other kernels the section __smp_locks has been freed.
func (o *op) readLocks(p *places) (int, error) {
	head, err := o.symbol("smp_alt_modules")
	if err != nil {
		return 0, err
	}
	up, err := o.uniprocessor()
	if err != nil || !up {
		return 0, err
	}
	word := uint64(o.bits / 8)
	// The layout since 2.6.
	usual, err := ktype.New("usual layout", word, listHead(word), ktype.Struct{Name: "smp_alt_module", Size: 8 * word, Fields: []ktype.StructField{
		{Name: "locks", Offset: 2 * word, Type: "int *"},
		{Name: "locks_end", Offset: 3 * word, Type: "int *"},
		{Name: "text", Offset: 4 * word, Type: "unsigned char *"},
		{Name: "text_end", Offset: 5 * word, Type: "unsigned char *"},
		{Name: "next", Offset: 6 * word, Type: "list_head"},
	}})
	if err != nil {
		return 0, err
	}
	types := usual
	if t, err := o.Types(); err == nil && t.HasField("smp_alt_module.locks_end") && t.HasField("smp_alt_module.text_end") {
		types = t
	}
	n := 0
	_, err = again(o, func() ([]site, error) {
		n, p.locks = 0, nil
		for at, err := range types.List(o, head, "smp_alt_module", "next", maxModules) {
			if err != nil {
				return nil, err
			}
			v := types.At(o, "smp_alt_module", at)
			var a [4]uint64
			for i, f := range []string{"locks", "locks_end", "text", "text_end"} {
				if a[i], err = v.Field(f).Pointer(); err != nil {
					return nil, err
				}
			}
			if a[2] >= p.text.end || a[3] <= p.text.start {
				continue
			}
			if a[1] < a[0] || a[1]-a[0] > maxLocks || (a[1]-a[0])%4 != 0 {
				return nil, fmt.Errorf("from %#x to %#x: %w", a[0], a[1], ErrBadKernel)
			}
			table, err := o.table("LOCK prefixes", a[0], a[1]-a[0], maxLocks)
			if err != nil {
				return nil, err
			}
			n += p.add(a[0], table, 4, smpLock)
		}
		return nil, nil
	})
	return n, err
}

// uniprocessor reports whether the kernel may still have to restore its LOCK prefixes.
func (k *Kernel) uniprocessor() (bool, error) {
	at, err := k.symbol("uniproc_patched")
	if err != nil {
		return false, err
	}
	var b [1]byte
	err = k.Read(at, b[:])
	return b[0] != 0, err
}

// mayLock is uniprocessor at this moment, or true if that can't be read. It becomes
// false once, and never true again.
func (k *Kernel) mayLock() bool {
	up, err := k.uniprocessor()
	return up || err != nil
}

// readFtrace walks ftrace_pages_start (kernel/trace/ftrace.c): pages of records,
// one for each function that can be traced.
func (o *op) readFtrace(p *places) (int, error) {
	head, err := o.symbol("ftrace_pages_start")
	if err != nil {
		return 0, err
	}
	return o.byLayout("ftrace_page.index", func(t *ktype.Types, check bool) (int, error) {
		lowest := uint64(0)
		if check {
			lowest = p.text.start // modules are above the kernel
		}
		trace, err := o.readFtracePages(t, head, lowest, p.text)
		if err != nil {
			return 0, err
		}
		p.trace = trace
		return len(trace), nil
	})
}

func (o *op) readFtracePages(t *ktype.Types, head, lowest uint64, text span) (trace []site, err error) {
	long := o.bits / 8
	ip, _, entry, err := twoWords(t, long, "dyn_ftrace", "ip", "flags", 64)
	if err != nil {
		return nil, err
	}
	page, err := o.pointer(head)
	if err != nil {
		return nil, err
	}
	n := 0
	for range maxFtracePages {
		if page == 0 {
			return trace, nil
		}
		v := t.At(o, "ftrace_page", page)
		records, err := v.Field("records").Pointer()
		if err != nil {
			return nil, err
		}
		count, err := v.Field("index").Uint()
		if err != nil {
			return nil, err
		}
		if count > uint64(maxFtrace-n) {
			return nil, fmt.Errorf("more than %d records: %w", maxFtrace, ErrBadKernel)
		}
		n += int(count)
		table, err := o.table("ftrace records", records, count*entry, maxFtrace*entry)
		if err != nil {
			return nil, err
		}
		for ; len(table) > 0; table = table[entry:] {
			addr := word(table[ip:], long)
			if addr < lowest {
				return nil, fmt.Errorf("%w: record of %#x", errOtherLayout, addr)
			}
			if text.has(addr) {
				trace = append(trace, site{addr, ftraceSite})
			}
		}
		if page, err = v.Field("next").Pointer(); err != nil {
			return nil, err
		}
	}
	return nil, errTooManyPages
}
