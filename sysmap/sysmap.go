package sysmap

import (
	"cmp"
	"errors"
	"fmt"
	"hash/maphash"
	"iter"
	"math"
	"math/bits"
	"slices"
	"sort"
	"strconv"
	"strings"
	"sync"
)

// Bounds on what a map may hold. The largest kernel seen (7.3 amd64) has 210,000
// symbols, and 5 MB of names.
const (
	maxSymbols   = 1 << 22
	maxName      = 1024 // KSYM_NAME_LEN is 128, from 6.1 on 512 (b8a94bfb3395)
	maxNameBytes = 1 << 28
)

// A Symbol is one named address.
type Symbol struct {
	Addr uint64
	// Type is the letter nm(1) prints: T, t, D, b, … An upper-case letter is
	// a global symbol. From 6.16 on the letters in a kernel's own table no
	// longer tell code from data.
	Type byte
	Name string
	// Module is the module's name for symbols from /proc/kallsyms that are
	// not the kernel's own, else "".
	Module string
}

func (s Symbol) String() string {
	if s.Module != "" {
		return fmt.Sprintf("%016x %c %s [%s]", s.Addr, s.Type, s.Name, s.Module)
	}
	return fmt.Sprintf("%016x %c %s", s.Addr, s.Type, s.Name)
}

// A Map is a kernel's symbol table. It is immutable and safe for concurrent use.
// The zero Map is empty.
type Map struct {
	t     *table
	slide uint64
}

// table is what all slid views of a map share. The symbols are in address order,
// those of equal address in the order of the input.
type table struct {
	addr   []uint64
	ent    []entry
	names  string
	mods   []string // mods[0] is the kernel proper, ""
	banner string

	wide bool   // addresses have 64 bits
	low  uint64 // below this a value is a constant or a per-CPU offset, not a place
	lowN int    // how many symbols are below low

	nameOnce sync.Once
	seed     maphash.Seed
	slots    []uint32 // open hash table: 1 + first symbol of a name
	next     []uint32 // 1 + next symbol of the same name

	placeOnce sync.Once
	placeAddr []uint64 // one per address that Find may name
	place     []uint32 // the symbol, or its bits inverted where a range ends
	// The range from placeAddr[0] on is cut into buckets of 1<<bucketShift
	// bytes; bucket[b] is the first place that is not below bucket b.
	bucket      []uint32
	bucketShift uint

	coreOnce sync.Once
	core     *table // the same without modules
}

type entry struct {
	off uint32
	n   uint16
	mod uint16
	typ byte
}

var emptyTable table

func (m *Map) tab() *table {
	if m == nil || m.t == nil {
		return &emptyTable
	}
	return m.t
}

func (t *table) name(i int) string {
	e := &t.ent[i]
	return t.names[e.off : e.off+uint32(e.n)]
}

// A builder collects symbols in any order.
type builder struct {
	t     table
	names strings.Builder
	modID map[string]uint16
	mod   string
	id    uint16
}

func newBuilder(symbols, nameBytes int) *builder {
	b := new(builder)
	b.t.addr = make([]uint64, 0, symbols)
	b.t.ent = make([]entry, 0, symbols)
	b.t.mods = []string{""}
	b.names.Grow(nameBytes)
	return b
}

// add copies name and mod. The error, if any, is a phrase without context.
func (b *builder) add(addr uint64, typ byte, name, mod []byte) string {
	switch {
	case len(b.t.addr) >= maxSymbols:
		return "too many symbols"
	case len(name) == 0:
		return "empty name"
	case len(name) > maxName:
		return "name too long"
	case b.names.Len()+len(name) > maxNameBytes:
		return "too many names"
	}
	if string(mod) != b.mod {
		id := uint16(0)
		if len(mod) > 0 {
			if len(mod) > maxName {
				return "module name too long"
			}
			var ok bool
			if id, ok = b.modID[string(mod)]; !ok {
				if len(b.t.mods) > math.MaxUint16 {
					return "too many modules"
				}
				if b.modID == nil {
					b.modID = make(map[string]uint16)
				}
				id = uint16(len(b.t.mods))
				b.t.mods = append(b.t.mods, string(mod))
				b.modID[b.t.mods[id]] = id
			}
		}
		b.mod, b.id = b.t.mods[id], id
	}
	off := b.names.Len()
	b.names.Write(name)
	b.t.addr = append(b.t.addr, addr)
	b.t.ent = append(b.t.ent, entry{off: uint32(off), n: uint16(len(name)), mod: b.id, typ: typ})
	return ""
}

func (b *builder) finish(banner string) *Map {
	t := &b.t
	t.names = b.names.String()
	t.banner = banner
	if !slices.IsSorted(t.addr) {
		type key struct {
			addr uint64
			i    int
		}
		keys := make([]key, len(t.addr))
		for i, a := range t.addr {
			keys[i] = key{a, i}
		}
		slices.SortFunc(keys, func(a, b key) int {
			return cmp.Or(cmp.Compare(a.addr, b.addr), cmp.Compare(a.i, b.i))
		})
		ent := make([]entry, len(keys))
		for i, k := range keys {
			t.addr[i], ent[i] = k.addr, t.ent[k.i]
		}
		t.ent = ent
	}
	t.setRange()
	// A copy: the builder's other fields need not stay alive.
	return &Map{t: &table{
		addr: t.addr, ent: t.ent, names: t.names, mods: t.mods, banner: t.banner,
		wide: t.wide, low: t.low, lowN: t.lowN,
	}}
}

// setRange decides below which value a symbol cannot be a kernel address: on
// 64 bits the user half (per-CPU offsets up to 6.14, phys_startup_64, sizes),
// on 32 bits what is below the kernel's first byte, if the map says where.
func (t *table) setRange() {
	n := len(t.addr)
	t.wide = n > 0 && t.addr[n-1] > math.MaxUint32
	if t.wide {
		t.low = 1 << 63
	} else {
		for i, a := range t.addr {
			if s := t.name(i); s == "_text" || s == "_stext" {
				t.low = a
				break
			}
		}
	}
	t.lowN = sort.Search(n, func(i int) bool { return t.addr[i] >= t.low })
}

// Len returns the number of symbols.
func (m *Map) Len() int { return len(m.tab().addr) }

// Banner returns the kernel's "Linux version …" line, without the newline, if
// the map was read from a kernel image, else "".
func (m *Map) Banner() string { return m.tab().banner }

// Release returns what uname -r prints on that kernel, the third word of Banner,
// or "".
func (m *Map) Release() string {
	f := strings.Fields(m.tab().banner)
	if len(f) < 3 {
		return ""
	}
	return f[2]
}

// Slide returns a view of the map with delta added to every address: the KASLR
// slide of a running kernel, or its negative. It costs nothing, as the tables are
// shared. Slides add up.
//
// Constants and per-CPU offsets keep their values. Symbols of modules are not in
// the result: modules are placed apart from the kernel, so that no slide makes
// the addresses from another boot right.
func (m *Map) Slide(delta uint64) *Map {
	if delta == 0 {
		return m
	}
	return &Map{t: m.tab().withoutModules(), slide: m.slide + delta}
}

func (t *table) withoutModules() *table {
	if len(t.mods) < 2 {
		return t
	}
	t.coreOnce.Do(func() {
		c := &table{names: t.names, mods: t.mods[:1], banner: t.banner, wide: t.wide, low: t.low, lowN: t.lowN}
		c.addr = make([]uint64, 0, len(t.addr))
		c.ent = make([]entry, 0, len(t.addr))
		c.lowN = 0
		for i, e := range t.ent {
			if e.mod == 0 {
				c.addr = append(c.addr, t.addr[i])
				c.ent = append(c.ent, e)
				if t.addr[i] < t.low {
					c.lowN++
				}
			}
		}
		t.core = c
	})
	return t.core
}

// shift turns an address of the table into one of the view.
func (m *Map) shift(a uint64) uint64 {
	a += m.slide
	if !m.t.wide {
		a &= math.MaxUint32
	}
	return a
}

// unshift is the inverse of shift. It fails for what no table can hold.
func (m *Map) unshift(a uint64) (uint64, bool) {
	t := m.t
	if !t.wide {
		if a > math.MaxUint32 {
			return 0, false
		}
		return (a - m.slide) & math.MaxUint32, true
	}
	return a - m.slide, true
}

func (m *Map) symbol(i int) Symbol {
	t := m.t
	a := t.addr[i]
	if m.slide != 0 && i >= t.lowN {
		a = m.shift(a)
	}
	return Symbol{Addr: a, Type: t.ent[i].typ, Name: t.name(i), Module: t.mods[t.ent[i].mod]}
}

// All returns the symbols in address order.
func (m *Map) All() iter.Seq[Symbol] {
	return func(yield func(Symbol) bool) {
		for i := range m.tab().addr {
			if !yield(m.symbol(i)) {
				return
			}
		}
	}
}

// index builds the table of names.
func (t *table) index() {
	t.nameOnce.Do(func() {
		n := len(t.addr)
		size := 16
		for size < 2*n {
			size *= 2
		}
		t.seed = maphash.MakeSeed()
		t.slots = make([]uint32, size)
		t.next = make([]uint32, n)
		// Backwards, so that each chain is in address order.
		for i := n - 1; i >= 0; i-- {
			s := t.slot(t.name(i))
			t.next[i] = t.slots[s]
			t.slots[s] = uint32(i + 1)
		}
	})
}

// slot finds the place of a name: the one that has it, or a free one. There are
// always free ones.
func (t *table) slot(name string) int {
	mask := len(t.slots) - 1
	s := int(maphash.String(t.seed, name)) & mask
	for t.slots[s] != 0 && t.name(int(t.slots[s]-1)) != name {
		s = (s + 1) & mask
	}
	return s
}

// LookupAll returns every symbol of that exact name, in address order.
func (m *Map) LookupAll(name string) []Symbol {
	t := m.tab()
	if len(t.addr) == 0 {
		return nil
	}
	t.index()
	var all []Symbol
	for i := t.slots[t.slot(name)]; i != 0; i = t.next[i-1] {
		all = append(all, m.symbol(int(i-1)))
	}
	return all
}

// Lookup finds a symbol by its exact name.
//
// A name that has several addresses gives an *AmbiguousError; "name@2" picks the
// second of them, in address order. A name the map does not have gives
// ErrNotFound: see LookupSuffixed and Suggest for what to try then.
func (m *Map) Lookup(name string) (Symbol, error) {
	t := m.tab()
	if len(t.addr) == 0 {
		return Symbol{}, fmt.Errorf("%q: %w", name, ErrNotFound)
	}
	t.index()
	if i := t.slots[t.slot(name)]; i != 0 {
		first := int(i - 1)
		for i = t.next[first]; i != 0 && t.addr[i-1] == t.addr[first]; i = t.next[i-1] {
		}
		if i == 0 {
			return m.symbol(first), nil
		}
		return Symbol{}, &AmbiguousError{Name: name, Candidates: distinct(m.LookupAll(name))}
	}
	if at := strings.LastIndexByte(name, '@'); at > 0 {
		c := distinct(m.LookupAll(name[:at]))
		if n, err := strconv.ParseUint(name[at+1:], 10, 32); err == nil && len(c) > 0 {
			if n < 1 || n > uint64(len(c)) {
				return Symbol{}, fmt.Errorf("%q: %w: %s has %d address(es)", name, ErrNotFound, name[:at], len(c))
			}
			return c[n-1], nil
		}
	}
	return Symbol{}, fmt.Errorf("%q: %w", name, ErrNotFound)
}

// distinct keeps one symbol per address of a list in address order.
func distinct(s []Symbol) []Symbol {
	return slices.CompactFunc(s, func(a, b Symbol) bool { return a.Addr == b.Addr })
}

// LookupSuffixed is Lookup, and if there is no such name, the symbol the compiler
// made of it: name.isra.0, name.constprop.0, name.part.0 and the like, but not
// name.cold, which is only the unlikely half of a function. Such a function may
// take other arguments than the source says; tell the user. Several of them give
// an *AmbiguousError.
func (m *Map) LookupSuffixed(name string) (Symbol, error) {
	sym, err := m.Lookup(name)
	if err == nil || errors.Is(err, ErrAmbiguous) {
		return sym, err
	}
	c := distinct(m.suffixed(name))
	switch len(c) {
	case 0:
		return Symbol{}, err
	case 1:
		return c[0], nil
	}
	return Symbol{}, &AmbiguousError{Name: name, Candidates: c}
}

// suffixed returns the compiler's variants of name, in address order.
func (m *Map) suffixed(name string) []Symbol {
	t := m.tab()
	var c []Symbol
	if name == "" || len(name) >= maxName {
		return nil
	}
	for i := range t.addr {
		s := t.name(i)
		if len(s) > len(name)+1 && s[len(name)] == '.' && s[:len(name)] == name && isCompilerSuffix(s[len(name)+1:]) {
			c = append(c, m.symbol(i))
		}
	}
	return c
}

// isCompilerSuffix accepts "isra.0", "constprop.0.isra.1", "llvm.123", "part.7".
func isCompilerSuffix(s string) bool {
	named := false
	for p := range strings.SplitSeq(s, ".") {
		switch p {
		case "isra", "constprop", "part", "clone", "llvm", "lto_priv", "specialized":
			named = true
		default:
			if p == "" || !named || strings.Trim(p, "0123456789") != "" {
				return false
			}
		}
	}
	return named
}

// What a symbol is worth as the name of its address.
const (
	rankNone   = iota // not at all
	rankEnd           // nothing is known from here on
	rankMarker        // a linker script's label
	rankLocal
	rankGlobal
)

func rank(name string, typ byte) int {
	switch name {
	case "_etext", "_einittext", "_end":
		return rankEnd
	case "_text", "_stext", "_sinittext", "_sdata", "_edata",
		"__bss_start", "__bss_stop", "__init_begin", "__init_end", "__end_rodata",
		"__brk_base", "__brk_limit", "__per_cpu_load", "__per_cpu_start", "__per_cpu_end":
		return rankMarker
	}
	switch {
	case typ == 'A' || typ == 'a',
		// The padding before a function (CONFIG_CALL_PADDING,
		// 9f2899fe36a6, 6.2) and its CFI type hash (clang).
		strings.HasPrefix(name, "__pfx_"), strings.HasPrefix(name, "__cfi_"):
		return rankNone
	case strings.HasPrefix(name, "__start_"), strings.HasPrefix(name, "__stop_"),
		strings.HasSuffix(name, "text_start"), strings.HasSuffix(name, "text_end"):
		return rankMarker
	case typ >= 'A' && typ <= 'Z':
		return rankGlobal
	}
	return rankLocal
}

// places builds the list of addresses that Find names.
func (t *table) places() {
	t.placeOnce.Do(func() {
		n := len(t.addr)
		t.placeAddr = make([]uint64, 0, n-t.lowN)
		t.place = make([]uint32, 0, n-t.lowN)
		for i := t.lowN; i < n; {
			best, bestRank, a := 0, rankNone, t.addr[i]
			for ; i < n && t.addr[i] == a; i++ {
				if r := rank(t.name(i), t.ent[i].typ); r > bestRank {
					best, bestRank = i, r
				}
			}
			switch bestRank {
			case rankNone:
				continue
			case rankEnd:
				best = ^best
			}
			t.placeAddr = append(t.placeAddr, a)
			t.place = append(t.place, uint32(best))
		}
		if len(t.place) == 0 {
			return
		}
		first := t.placeAddr[0]
		span := t.placeAddr[len(t.placeAddr)-1] - first
		size := 1 << bits.Len(uint(len(t.place)))
		t.bucketShift = uint(max(0, bits.Len64(span)-bits.Len(uint(size-1))))
		t.bucket = make([]uint32, span>>t.bucketShift+2)
		b := uint64(0)
		for i, a := range t.placeAddr {
			for ; b <= (a-first)>>t.bucketShift; b++ {
				t.bucket[b] = uint32(i)
			}
		}
		t.bucket[b] = uint32(len(t.place))
	})
}

const (
	pageSize = 4096
	// maxModuleGap is how far apart two neighbouring symbols of one module
	// may be and still be taken for the same section of it.
	maxModuleGap = 1 << 20
)

// find returns the symbol that owns a table address, and the end of its extent.
func (t *table) find(a uint64) (i int, end uint64, ok bool) {
	if a < t.low {
		return 0, 0, false
	}
	t.places()
	if len(t.place) == 0 || a < t.placeAddr[0] {
		return 0, 0, false
	}
	// The first place above a. Written out: this is the hot path.
	lo := len(t.place)
	hi := lo
	if b := (a - t.placeAddr[0]) >> t.bucketShift; b+1 < uint64(len(t.bucket)) {
		lo, hi = int(t.bucket[b]), int(t.bucket[b+1])
	}
	for lo < hi {
		mid := int(uint(lo+hi) >> 1)
		if t.placeAddr[mid] <= a {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	if int32(t.place[lo-1]) < 0 {
		return 0, 0, false
	}
	i = int(t.place[lo-1])
	// An unbounded extent ends with its page.
	start := t.placeAddr[lo-1]
	end = start | (pageSize - 1)
	if end != math.MaxUint64 {
		end++
	}
	if lo < len(t.placeAddr) {
		next, mod, sameMod := t.placeAddr[lo], t.ent[i].mod, false
		if j := int32(t.place[lo]); j < 0 {
			sameMod = mod == 0
		} else {
			sameMod = mod == t.ent[j].mod
		}
		if sameMod && (mod == 0 || next-start <= maxModuleGap) {
			end = next
		} else {
			end = min(end, next)
		}
	}
	return i, end, a < end
}

// Find returns the symbol at or below addr, and how far above it addr is.
//
// Of several names of an address it prefers a global one, and any to a label of
// the linker script (_stext, __entry_text_start, …). It never answers with the
// __pfx_ or __cfi_ names of the bytes before a function, nor with absolute
// symbols and per-CPU offsets. It claims nothing past _etext, _einittext and _end
// before the next symbol. Where no end is known (the last symbol of a module,
// or of a map without _end) it claims the rest of the symbol's page and no more.
func (m *Map) Find(addr uint64) (sym Symbol, offset uint64, ok bool) {
	if m == nil || m.t == nil {
		return Symbol{}, 0, false
	}
	a, ok := m.unshift(addr)
	if !ok {
		return Symbol{}, 0, false
	}
	i, _, ok := m.t.find(a)
	if !ok {
		return Symbol{}, 0, false
	}
	return m.symbol(i), a - m.t.addr[i], true
}

// Next returns the address of the next symbol above addr, of whatever kind.
// No function that starts at or below addr reaches beyond it.
func (m *Map) Next(addr uint64) (uint64, bool) {
	if m == nil || m.t == nil {
		return 0, false
	}
	t := m.t
	a, ok := m.unshift(addr)
	if !ok {
		return 0, false
	}
	if i := sort.Search(len(t.addr), func(i int) bool { return t.addr[i] > a }); i < len(t.addr) && i >= t.lowN {
		return m.shift(t.addr[i]), true
	}
	return 0, false
}

// FuncEnd returns an upper bound for the end of the function addr is in: the next
// symbol, or where Find stops to claim addresses. It fails where Find does.
func (m *Map) FuncEnd(addr uint64) (uint64, bool) {
	if m == nil || m.t == nil {
		return 0, false
	}
	a, ok := m.unshift(addr)
	if !ok {
		return 0, false
	}
	_, end, ok := m.t.find(a)
	if !ok {
		return 0, false
	}
	end = m.shift(end)
	if next, ok := m.Next(addr); ok && next-addr < end-addr {
		end = next
	}
	return end, true
}
