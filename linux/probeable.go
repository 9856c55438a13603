package linux

import (
	"cmp"
	"errors"
	"fmt"
	"iter"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/vmprobes/vmprobes/internal/x86"
	"github.com/vmprobes/vmprobes/ktype"
	"github.com/vmprobes/vmprobes/paging"
	"github.com/vmprobes/vmprobes/sysmap"
)

// ErrNotProbeable: the kernel itself would not allow a probe there.
var ErrNotProbeable = errors.New("no place for a probe")

// safety is what the kernel knows about its own text.
type safety struct {
	text  span
	spans []span // where no breakpoint may be, by address; they may overlap
	reach uint64 // size of the largest of them
	sites []site // instructions that the kernel rewrites, by address
	trace []site // entries of functions that ftrace may rewrite, by address

	unsure time.Time // when a table was not understood, if one was
}

type span struct {
	start, end uint64
	why        string
}

// site is an instruction that the kernel rewrites while it runs.
type site struct {
	addr uint64
	kind siteKind
}

type siteKind uint8

const (
	jumpLabel siteKind = iota + 1
	staticCall
	ftraceSite
	ftraceActive
)

// Bounds of the tables in a kernel. Debian's 7.3 has 733 blacklist entries,
// 10,331 jump labels, 10,491 static calls and 47,382 ftrace sites.
const (
	maxBlacklist   = 1 << 14
	maxJumpTable   = 16 << 18
	maxStaticCalls = 8 << 18
	maxFtrace      = 1 << 20
	maxFtracePages = 1 << 14
)

// Probeable returns nil if a breakpoint may be at addr, and else an error that
// says why not and wraps ErrNotProbeable. It knows what the guest's own kprobes
// knows (check_kprobe_address_safe in kernel/kprobes.c, can_probe in
// arch/x86/kernel/kprobes/core.c): the kprobe blacklist, code that must not be
// instrumented, entry code, code that the kernel rewrites while it runs, and the
// boundaries of instructions.
//
// What alternatives and paravirt patching may rewrite is not known: their tables
// are freed when the kernel has booted, after which they are not used any more.
func (k *Kernel) Probeable(addr uint64) error {
	if err := k.Blacklisted(addr); err != nil {
		return err
	}
	return k.boundary(addr)
}

// Blacklisted is Probeable without the check that addr is the start of an
// instruction.
func (k *Kernel) Blacklisted(addr uint64) error {
	s, err := k.safety()
	if err != nil {
		return err
	}
	if addr < s.text.start || addr >= s.text.end {
		in, err := k.moduleText(addr)
		if err != nil {
			return fmt.Errorf("%#x: %w: not in the text of the kernel, and whether it is in a module's can't be told: %w", addr, ErrNotProbeable, err)
		}
		if in {
			return nil
		}
		return fmt.Errorf("%#x: %w: not in the text of the kernel (%#x to %#x) or a module", addr, ErrNotProbeable, s.text.start, s.text.end)
	}
	// All spans that start at or below addr and could reach it.
	i, _ := slices.BinarySearchFunc(s.spans, addr, func(s span, a uint64) int {
		if s.start <= a {
			return -1
		}
		return 1
	})
	for i--; i >= 0 && addr-s.spans[i].start < s.reach; i-- {
		if addr < s.spans[i].end {
			return fmt.Errorf("%#x: %w: %s", addr, ErrNotProbeable, s.spans[i].why)
		}
	}
	if at, ok := within(s.sites, addr, 5); ok && addr-at.addr < k.siteSize(at) {
		what := "a jump label"
		if at.kind == staticCall {
			what = "a static call"
		}
		return fmt.Errorf("%#x: %w: the kernel rewrites the instruction while it runs (%s)", addr, ErrNotProbeable, what)
	}
	if at, ok := within(s.trace, addr, 5); ok && addr != at.addr {
		return fmt.Errorf("%#x: %w: inside an instruction that ftrace rewrites", addr, ErrNotProbeable)
	}
	return nil
}

// FtraceSite reports whether ftrace may rewrite the instruction at addr, and
// whether it traces it now. If the guest starts to trace a function while a
// breakpoint is there, it finds a byte it didn't expect, and turns ftrace off.
func (k *Kernel) FtraceSite(addr uint64) (traced, ok bool) {
	s, err := k.safety()
	if err != nil {
		return false, false
	}
	at, ok := within(s.trace, addr, 1)
	return ok && at.kind == ftraceActive, ok
}

// FtraceSites returns how many instructions ftrace may rewrite, and so how many
// functions of the guest its own tracers can trace.
func (k *Kernel) FtraceSites() (int, error) {
	s, err := k.safety()
	if err != nil {
		return 0, err
	}
	return len(s.trace), nil
}

// isFunction rules out names of no function: bytes before one, and labels of the
// linker script. Since 6.16 the letters tell code from data no more.
func isFunction(s sysmap.Symbol) bool {
	return (s.Type|0x20 == 't' || s.Type|0x20 == 'w') &&
		!strings.HasPrefix(s.Name, "__pfx_") && !strings.HasPrefix(s.Name, "__cfi_") &&
		!strings.HasSuffix(s.Name, "text_start") && !strings.HasSuffix(s.Name, "text_end") && s.Name != "_stext" && s.Name != "_text"
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

// siteSize returns the length of the instruction at a site. Jump labels have
// been short ones, of 2 bytes, where they can, since 5.14 (ab3257042c26).
func (k *Kernel) siteSize(s site) uint64 {
	var b [1]byte
	if s.kind == jumpLabel && k.Read(s.addr, b[:]) == nil && (b[0] == 0xeb || b[0] == 0x66) {
		return 2
	}
	return 5
}

// Functions returns the functions of the kernel whose names match a pattern (as
// in [path.Match]) and whose first instructions may be probed.
func (k *Kernel) Functions(pattern string) (iter.Seq[sysmap.Symbol], error) {
	if _, err := path.Match(pattern, ""); err != nil {
		return nil, fmt.Errorf("%q: %w", pattern, err)
	}
	s, err := k.safety()
	if err != nil {
		return nil, err
	}
	return func(yield func(sysmap.Symbol) bool) {
		for sym := range k.syms.All() {
			if sym.Addr < s.text.start || sym.Addr >= s.text.end || !isFunction(sym) {
				continue
			}
			if ok, _ := path.Match(pattern, sym.Name); ok && k.Blacklisted(sym.Addr) == nil && !yield(sym) {
				return
			}
		}
	}, nil
}

// boundary decodes the function that addr is in, up to there.
func (k *Kernel) boundary(addr uint64) error {
	sym, off, ok := k.syms.Find(addr)
	if !ok {
		all, err := k.AllSymbols()
		if err != nil {
			return fmt.Errorf("%#x: %w: what function it is in can't be told: %w", addr, ErrNotProbeable, err)
		}
		if sym, off, ok = all.Find(addr); !ok {
			return fmt.Errorf("%#x: %w: in no function that has a name", addr, ErrNotProbeable)
		}
	}
	if off == 0 {
		return nil
	}
	const limit = 1 << 20
	if off > limit {
		return fmt.Errorf("%#x: %w: %#x bytes behind %q, the nearest symbol", addr, ErrNotProbeable, off, sym.Name)
	}
	code := make([]byte, off+x86.MaxLen)
	n, err := k.mem.Read(k.root, paging.VAddr(sym.Addr), code)
	if err != nil && uint64(n) <= off {
		return err
	}
	if err := x86.FindBoundary(code[:n], sym.Addr, addr); err != nil {
		return fmt.Errorf("%w: %w", ErrNotProbeable, err)
	}
	return nil
}

// retrySafety is how long tables that were not understood are taken for that.
var retrySafety = 5 * time.Second

// safety returns what was read before. If it couldn't be, or not all of it, it is
// read again: the guest may have been changing it.
func (k *Kernel) safety() (*safety, error) {
	k.safeMu.Lock()
	defer k.safeMu.Unlock()
	if k.safe == nil || !k.safe.unsure.IsZero() && time.Since(k.safe.unsure) > retrySafety {
		s, err := k.begin("places for probes").readSafety()
		if err != nil {
			return nil, err
		}
		k.safe = s
	}
	return k.safe, nil
}

func (o *op) readSafety() (*safety, error) {
	start, size, err := o.section("_stext", "_etext", 1<<30)
	if err != nil {
		return nil, err
	}
	s := &safety{text: span{start: start, end: start + size}}
	var found []string
	for _, r := range []struct{ start, end, why string }{
		{"__entry_text_start", "__entry_text_end", "entry code"},
		{"__noinstr_text_start", "__noinstr_text_end", "code that must not be instrumented (noinstr)"},
		{"__kprobes_text_start", "__kprobes_text_end", "code that kprobes itself runs"},
		{"__cpuidle_text_start", "__cpuidle_text_end", "idle code"},
		{"__static_call_text_start", "__static_call_text_end", "static call trampolines"},
	} {
		if a, n, err := o.section(r.start, r.end, size); err == nil && n > 0 {
			s.spans = append(s.spans, span{a, a + n, r.why})
		}
	}
	for _, part := range []struct {
		name string
		read func(*safety) (int, error)
	}{
		{"blacklist entries", o.readBlacklist},
		{"jump labels", o.readJumpLabels},
		{"static calls", o.readStaticCalls},
		{"ftrace sites", o.readFtrace},
	} {
		n, err := part.read(s)
		switch {
		case errors.Is(err, sysmap.ErrNotFound):
			o.log.Debug("not in this kernel", "what", part.name, "err", err)
		case errors.Is(err, errOtherLayout):
			o.log.Warn("not understood in this kernel", "what", part.name, "err", err)
			s.unsure = time.Now()
		case err != nil:
			return nil, fmt.Errorf("%s: %w", part.name, err)
		default:
			found = append(found, fmt.Sprintf("%d %s", n, part.name))
		}
	}
	byAddr := func(a, b site) int { return cmp.Compare(a.addr, b.addr) }
	slices.SortFunc(s.spans, func(a, b span) int { return cmp.Compare(a.start, b.start) })
	slices.SortFunc(s.sites, byAddr)
	slices.SortFunc(s.trace, byAddr)
	for _, sp := range s.spans {
		s.reach = max(s.reach, sp.end-sp.start)
	}
	o.explain("probeable", nil, "", "text %#x to %#x, %v", s.text.start, s.text.end, found)
	return s, nil
}

var (
	// errOtherLayout: a structure isn't what it is in every kernel known.
	errOtherLayout = errors.New("not of the usual layout")

	errTooManyPages = fmt.Errorf("more than %d pages: %w", maxFtracePages, ErrBadKernel)
)

// byLayout reads a table of structures by the layout they have had since 3.16
// (include/linux/kprobes.h, include/linux/ftrace.h, kernel/trace/ftrace.c), as
// long as what is read by it makes sense, which read is to check, or else by the
// kernel's own types, which a kernel may lack and which take time to load. The
// path is a member that those must have.
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
		return 0, fmt.Errorf("%w: %w", errOtherLayout, errors.Join(err, terr))
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
// NOKPROBE_SYMBOL, and what the architecture adds.
func (o *op) readBlacklist(s *safety) (int, error) {
	head, err := o.symbol("kprobe_blacklist")
	if err != nil {
		return 0, err
	}
	return o.byLayout("kprobe_blacklist_entry.end_addr", func(t *ktype.Types, check bool) (int, error) {
		long := o.bits / 8
		var entry [128]byte
		from, to, size, err := twoWords(t, long, "kprobe_blacklist_entry", "start_addr", "end_addr", uint64(len(entry)))
		if err != nil {
			return 0, err
		}
		spans, err := again(func() ([]span, error) {
			var spans []span
			for at, err := range t.List(o, head, "kprobe_blacklist_entry", "list", maxBlacklist) {
				if err != nil {
					return nil, err
				}
				if err := o.Read(at, entry[:size]); err != nil {
					return nil, err
				}
				start, end := word(entry[from:], long), word(entry[to:], long)
				if check && (start < s.text.start || end < start) {
					return nil, fmt.Errorf("%w: entry of %#x to %#x", errOtherLayout, start, end)
				}
				if end > start && end-start <= s.text.end-s.text.start {
					spans = append(spans, span{start, end, "on the kernel's own kprobe blacklist"})
				}
			}
			return spans, nil
		})
		if err != nil {
			return 0, err
		}
		s.spans = append(s.spans, spans...)
		return len(spans), nil
	})
}

// readJumpLabels reads the jump table: struct jump_entry { s32 code, target;
// long key } with code relative to itself (include/linux/jump_label.h,
// HAVE_ARCH_JUMP_LABEL_RELATIVE; x86 since 4.19).
func (o *op) readJumpLabels(s *safety) (int, error) {
	return o.readRelative(s, "__start___jump_table", "__stop___jump_table", 8+uint64(o.bits/8), maxJumpTable, jumpLabel)
}

// readStaticCalls reads struct static_call_site { s32 addr, key }, relative as
// well (include/linux/static_call_types.h, since 5.10).
func (o *op) readStaticCalls(s *safety) (int, error) {
	return o.readRelative(s, "__start_static_call_sites", "__stop_static_call_sites", 8, maxStaticCalls, staticCall)
}

// readRelative reads a table whose entries begin with a 32-bit distance to the
// instruction that they describe.
func (o *op) readRelative(s *safety, start, stop string, entry, limit uint64, kind siteKind) (int, error) {
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
	n := 0
	for off := uint64(0); off < size; off += entry {
		addr := base + off + uint64(int64(int32(le32(table[off:]))))
		if addr >= s.text.start && addr < s.text.end { // not freed init code
			s.sites = append(s.sites, site{addr, kind})
			n++
		}
	}
	return n, nil
}

// readFtrace walks ftrace_pages_start (kernel/trace/ftrace.c): pages of records,
// one for each function that can be traced.
func (o *op) readFtrace(s *safety) (int, error) {
	head, err := o.symbol("ftrace_pages_start")
	if err != nil {
		return 0, err
	}
	return o.byLayout("ftrace_page.index", func(t *ktype.Types, check bool) (int, error) {
		lowest := uint64(0)
		if check {
			lowest = s.text.start // modules are above the kernel
		}
		trace, err := o.readFtracePages(t, head, lowest)
		if err != nil {
			return 0, err
		}
		s.trace = trace
		return len(trace), nil
	})
}

func (o *op) readFtracePages(t *ktype.Types, head, lowest uint64) (trace []site, err error) {
	long := o.bits / 8
	ip, flags, entry, err := twoWords(t, long, "dyn_ftrace", "ip", "flags", 64)
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
			// The number of those who trace it is in the low bits
			// (FTRACE_REF_MAX), FTRACE_FL_ENABLED is the top one.
			const enabled = 1 << 31
			kind := ftraceSite
			if word(table[flags:], long)&enabled != 0 {
				kind = ftraceActive
			}
			addr := word(table[ip:], long)
			if addr < lowest {
				return nil, fmt.Errorf("%w: record of %#x", errOtherLayout, addr)
			}
			trace = append(trace, site{addr, kind})
		}
		if page, err = v.Field("next").Pointer(); err != nil {
			return nil, err
		}
	}
	return nil, errTooManyPages
}
