package sysmap

import (
	"cmp"
	"encoding/binary"
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
	maxSymbols   = 1 << 20
	maxName      = 1024 // KSYM_NAME_LEN is 128, from 6.1 on 512 (b8a94bfb3395)
	maxNameBytes = 1 << 26
)

// A Symbol is one named address.
type Symbol struct {
	Addr uint64
	// Type is the letter nm(1) prints: T, t, D, b, … An upper-case letter is
	// a global symbol. From 6.16 on the letters in a kernel's own table no
	// longer tell code from data.
	Type byte
	Name string
	// Module is the name of the module that the symbol belongs to, "" for the
	// kernel's own.
	Module string
}

// String returns the symbol as a line of /proc/kallsyms.
func (s Symbol) String() string {
	if s.Module != "" {
		return fmt.Sprintf("%016x %c %s [%s]", s.Addr, s.Type, s.Name, s.Module)
	}
	return fmt.Sprintf("%016x %c %s", s.Addr, s.Type, s.Name)
}

// A Map is a kernel's symbol table. It is immutable and safe for concurrent use.
// The zero Map is empty.
//
// The 163,205 symbols of Linux 6.12 take 6 MB, and 5 MB more for the indices that
// the first Lookup and the first Find make.
type Map struct {
	t     *table // the kernel's own symbols
	slide uint64 // added to their addresses
	mods  *table // those of modules, where they are; or nil
}

// table is what all slid views of a map share. The symbols are in address order,
// those of equal address in the order of the input.
type table struct {
	ent    []entry
	names  string
	banner string

	// Of a table of modules:
	mod  []uint16 // whose a symbol is, as an index into mods
	mods []string

	wide bool   // addresses have 64 bits
	low  uint64 // below this a value is a constant or a per-CPU offset, not a place
	lowN int    // how many symbols are below low

	nameOnce sync.Once
	slots    []uint32 // open hash table: see slot
	next     []uint32 // 1 + next symbol of the same name

	placeOnce sync.Once
	placeAddr []uint64 // one per address that Find may name
	place     []uint32 // the symbol, or its bits inverted where a range ends
	// The range from placeAddr[0] on is cut into buckets of 1<<bucketShift
	// bytes; bucket[b] is the first place that is not below bucket b.
	bucket      []uint32
	bucketShift uint
}

type entry struct {
	addr uint64
	off  uint32 // of the name
	n    uint16 // its length
	typ  byte
}

var emptyTable table

func (t *table) name(i int) string {
	e := &t.ent[i]
	return t.names[e.off : e.off+uint32(e.n)]
}

// module returns the module that symbol i belongs to, "" for the kernel's own.
func (t *table) module(i int) string {
	if t.mod == nil {
		return ""
	}
	return t.mods[t.mod[i]]
}

// above returns the first symbol above an address.
func (t *table) above(a uint64) int {
	return sort.Search(len(t.ent), func(i int) bool { return t.ent[i].addr > a })
}

// A builder collects symbols in any order: the kernel's own, and those of modules.
type builder struct {
	kernel, modules tableBuilder
	modID           map[string]uint16
	mod             string // the latest module
	id              uint16
}

type tableBuilder struct {
	t     table
	names strings.Builder
}

func newBuilder(symbols, nameBytes int) *builder {
	b := new(builder)
	b.kernel.t.ent = make([]entry, 0, symbols)
	b.kernel.names.Grow(nameBytes)
	return b
}

func (b *builder) len() int { return len(b.kernel.t.ent) + len(b.modules.t.ent) }

// add copies name and mod. The error, if any, is a phrase without context.
func (b *builder) add(addr uint64, typ byte, name, mod []byte) string {
	switch {
	case b.len() >= maxSymbols:
		return "too many symbols"
	case len(name) == 0:
		return "empty name"
	case len(name) > maxName:
		return "name too long"
	case b.kernel.names.Len()+b.modules.names.Len()+len(name) > maxNameBytes:
		return "too many names"
	}
	if len(mod) == 0 {
		b.kernel.add(addr, typ, name)
		return ""
	}
	if string(mod) != b.mod {
		id, ok := b.modID[string(mod)]
		if !ok {
			switch mods := len(b.modules.t.mods); {
			case len(mod) > maxName:
				return "module name too long"
			case mods > math.MaxUint16:
				return "too many modules"
			case b.modID == nil:
				b.modID = make(map[string]uint16)
			}
			id = uint16(len(b.modules.t.mods))
			b.modules.t.mods = append(b.modules.t.mods, string(mod))
			b.modID[string(mod)] = id
		}
		b.mod, b.id = b.modules.t.mods[id], id
	}
	b.modules.add(addr, typ, name)
	b.modules.t.mod = append(b.modules.t.mod, b.id)
	return ""
}

func (b *tableBuilder) add(addr uint64, typ byte, name []byte) {
	off := b.shared(name)
	if off < 0 {
		off = b.names.Len()
		b.names.Write(name)
	}
	b.t.ent = append(b.t.ent, entry{addr: addr, off: uint32(off), n: uint16(len(name)), typ: typ})
}

// shared returns the offset of name if it is the end of the name before, else -1:
// from 6.2 on nearly every function comes after its __pfx_ symbol.
func (b *tableBuilder) shared(name []byte) int {
	if len(b.t.ent) == 0 {
		return -1
	}
	last := b.t.ent[len(b.t.ent)-1]
	end := int(last.off) + int(last.n)
	if len(name) > int(last.n) || b.names.String()[end-len(name):end] != string(name) {
		return -1
	}
	return end - len(name)
}

func (b *tableBuilder) finish() *table {
	t := &table{ent: b.t.ent, mod: b.t.mod, mods: b.t.mods}
	if t.names = b.names.String(); b.names.Cap() > len(t.names)+len(t.names)/8 {
		t.names = strings.Clone(t.names)
	}
	if !slices.IsSortedFunc(t.ent, func(a, b entry) int { return cmp.Compare(a.addr, b.addr) }) {
		order := make([]uint32, len(t.ent))
		for i := range order {
			order[i] = uint32(i)
		}
		slices.SortFunc(order, func(a, b uint32) int {
			return cmp.Or(cmp.Compare(t.ent[a].addr, t.ent[b].addr), cmp.Compare(a, b))
		})
		t.ent = make([]entry, len(order))
		for i, k := range order {
			t.ent[i] = b.t.ent[k]
		}
		if t.mod != nil {
			t.mod = make([]uint16, len(order))
			for i, k := range order {
				t.mod[i] = b.t.mod[k]
			}
		}
	}
	return t
}

func (b *builder) finish(banner string) *Map {
	m := &Map{t: b.kernel.finish()}
	m.t.banner = banner
	m.t.setRange()
	m.setModules(b)
	return m
}

// setModules gives the map the modules of a builder.
func (m *Map) setModules(b *builder) {
	if len(b.modules.t.ent) == 0 {
		return
	}
	m.mods = b.modules.finish()
	n := len(m.mods.ent)
	wide := m.mods.ent[n-1].addr > math.MaxUint32
	if len(m.t.ent) > 0 {
		wide = m.t.wide
	}
	m.mods.setLow(wide)
}

// quoted returns a name with bytes above 0x7e, as a symbol may have whose source is in
// UTF-8, in printable characters: each of these bytes as \xc3. ok is false for blanks
// and control characters, which no name has.
func quoted(name []byte) (text []byte, ok bool) {
	if printable(name) {
		return name, true
	}
	const hex = "0123456789abcdef"
	for _, c := range name {
		switch {
		case c <= ' ' || c == 0x7f:
			return nil, false
		case c > 0x7f:
			text = append(text, '\\', 'x', hex[c>>4], hex[c&15])
		default:
			text = append(text, c)
		}
	}
	// Of a name that becomes too long the end is lost, not the symbol.
	return text[:min(len(text), maxName)], len(name) <= maxName
}

// printable reports whether b has only bytes that names have: no blanks, control
// characters or bytes above 0x7e.
func printable(b []byte) bool {
	const low, high = 0x0101010101010101, 0x8080808080808080
	for ; len(b) >= 8; b = b[8:] {
		// For each byte c, 0x21 <= c <= 0x7e: the top bits of c and c+1 are 0, and
		// that of (c|0x80)-0x21 is 1.
		v := binary.LittleEndian.Uint64(b)
		if (v|(v+low)|^((v|high)-0x21*low))&high != 0 {
			return false
		}
	}
	for _, c := range b {
		if c <= ' ' || c >= 0x7f {
			return false
		}
	}
	return true
}

// setRange decides below which value a symbol cannot be a kernel address: on
// 64 bits the user half (per-CPU offsets up to 6.14, phys_startup_64, sizes),
// on 32 bits what is below the kernel's first byte, if the map says where.
func (t *table) setRange() {
	n := len(t.ent)
	t.setLow(n > 0 && t.ent[n-1].addr > math.MaxUint32)
	if t.wide {
		return
	}
	for i, e := range t.ent {
		if s := t.name(i); s == "_text" || s == "_stext" {
			for t.low = e.addr; i > 0 && t.ent[i-1].addr == e.addr; i-- {
			}
			t.lowN = i
			break
		}
	}
}

// setLow sets the range of a table that does not say itself where the kernel is.
func (t *table) setLow(wide bool) {
	t.wide, t.low = wide, 0
	if wide {
		t.low = 1 << 63
	}
	if t.lowN = 0; wide {
		t.lowN = t.above(t.low - 1)
	}
}

// Len returns the number of symbols.
func (m *Map) Len() int {
	n := 0
	for _, v := range m.views() {
		n += len(v.t.ent)
	}
	return n
}

// Banner returns the kernel's "Linux version …" line, without the newline, if
// the map was read from a kernel image, else "".
func (m *Map) Banner() string { return m.core().t.banner }

// Release returns what uname -r prints on that kernel, the third word of Banner,
// or "".
func (m *Map) Release() string {
	f := strings.Fields(m.Banner())
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
	v := m.core()
	return &Map{t: v.t, slide: v.slide + delta}
}

// With returns the map with syms as the symbols of modules, instead of those it
// has. It costs little, as the kernel's own table is shared; modules come and go,
// so call it again, on either map, when they have. Addresses are those of the
// running kernel, so Slide before With.
//
// Symbols that /proc/kallsyms could not show are left out: those without a module,
// and those whose names are empty, too long, or have blanks or control characters. Bytes
// above 0x7e are shown as \xc3.
func (m *Map) With(syms []Symbol) *Map {
	b := newBuilder(0, 0)
	for _, s := range syms {
		name, ok := quoted([]byte(s.Name))
		mod := []byte(s.Module)
		if !ok || len(mod) == 0 || !printable(mod) {
			continue
		}
		if !isType(s.Type) {
			s.Type = '?'
		}
		b.add(s.Addr, s.Type, name, mod) // leaves out what it cannot hold
	}
	base := m.core()
	with := &Map{t: base.t, slide: base.slide}
	with.setModules(b)
	return with
}

// A view is a table, and what is added to its addresses.
type view struct {
	t     *table
	slide uint64
}

// core is the view of the kernel's own symbols.
func (m *Map) core() view {
	if m == nil || m.t == nil {
		return view{t: &emptyTable}
	}
	return view{m.t, m.slide}
}

// views are the parts of the map: the kernel's own, and the modules'.
func (m *Map) views() [2]view {
	v := [2]view{m.core(), {t: &emptyTable}}
	if m != nil && m.mods != nil {
		v[1].t = m.mods
	}
	return v
}

// shift turns an address of the table into one of the view.
func (v view) shift(a uint64) uint64 {
	a += v.slide
	if !v.t.wide {
		a &= math.MaxUint32
	}
	return a
}

// unshift is the inverse of shift. It fails for addresses that no table can hold.
func (v view) unshift(a uint64) (uint64, bool) {
	if !v.t.wide {
		if a > math.MaxUint32 {
			return 0, false
		}
		return (a - v.slide) & math.MaxUint32, true
	}
	return a - v.slide, true
}

func (v view) addr(i int) uint64 {
	a := v.t.ent[i].addr
	if v.slide != 0 && i >= v.t.lowN {
		a = v.shift(a)
	}
	return a
}

func (v view) symbol(i int) Symbol {
	e := &v.t.ent[i]
	return Symbol{Addr: v.addr(i), Type: e.typ, Name: v.t.name(i), Module: v.t.module(i)}
}

// All returns the symbols in address order.
func (m *Map) All() iter.Seq[Symbol] {
	return func(yield func(Symbol) bool) {
		v := m.views()
		mod := 0
		for i := range v[0].t.ent {
			for ; mod < len(v[1].t.ent) && v[1].t.ent[mod].addr < v[0].addr(i); mod++ {
				if !yield(v[1].symbol(mod)) {
					return
				}
			}
			if !yield(v[0].symbol(i)) {
				return
			}
		}
		for ; mod < len(v[1].t.ent); mod++ {
			if !yield(v[1].symbol(mod)) {
				return
			}
		}
	}
}

// What a slot of the hash table holds: 1 + the first symbol of a name, whether there
// are more of that name, and some bits of the hash, which tell most other names
// without looking at them.
const (
	slotIndex = 1<<21 - 1 // more than maxSymbols
	slotMore  = 1 << 21
	slotTag   = ^uint32(slotIndex | slotMore)
)

var seed = maphash.MakeSeed()

// index builds the table of names.
func (t *table) index() {
	t.nameOnce.Do(func() {
		n := len(t.ent)
		size := 16
		for size < 2*n {
			size *= 2
		}
		t.slots = make([]uint32, size)
		t.next = make([]uint32, n)
		// Backwards, so that each chain is in address order.
		for i := n - 1; i >= 0; i-- {
			h := maphash.String(seed, t.name(i))
			s := t.slot(h, t.name(i))
			v := uint32(i+1) | uint32(h)&slotTag
			if first := t.slots[s] & slotIndex; first != 0 {
				t.next[i] = first
				v |= slotMore
			}
			t.slots[s] = v
		}
	})
}

// slot finds the place of a name: the one that has it, or a free one. There are
// always free ones.
func (t *table) slot(hash uint64, name string) int {
	mask := len(t.slots) - 1
	s := int(hash>>32) & mask
	for {
		v := t.slots[s]
		if v == 0 || (v^uint32(hash))&slotTag == 0 && t.name(int(v&slotIndex)-1) == name {
			return s
		}
		s = (s + 1) & mask
	}
}

// first returns 1 + the first symbol of a name, or 0, and whether there may be
// more.
func (t *table) first(hash uint64, name string) (i uint32, more bool) {
	if len(t.ent) == 0 {
		return 0, false
	}
	t.index()
	v := t.slots[t.slot(hash, name)]
	return v & slotIndex, v&slotMore != 0
}

// LookupAll returns every symbol of that exact name, in address order.
func (m *Map) LookupAll(name string) []Symbol {
	var all []Symbol
	hash := maphash.String(seed, name)
	for _, v := range m.views() {
		for i, _ := v.t.first(hash, name); i != 0; i = v.t.next[i-1] {
			all = append(all, v.symbol(int(i-1)))
		}
	}
	slices.SortStableFunc(all, byAddr)
	return all
}

func byAddr(a, b Symbol) int { return cmp.Compare(a.Addr, b.Addr) }

// Lookup finds a symbol by its exact name.
//
// A name that has several addresses gives an *AmbiguousError; "name@2" picks the
// second of them, in address order, and "name [ext4]" or "ext4:name" those of a
// module. A name the map does not have gives ErrNotFound: see LookupSuffixed and
// Suggest for what to try then.
func (m *Map) Lookup(name string) (Symbol, error) {
	hash := maphash.String(seed, name)
	v := m.core()
	i, more := v.t.first(hash, name)
	if m != nil && m.mods != nil {
		if j, modMore := m.mods.first(hash, name); j != 0 {
			more = more || modMore || i != 0
			v, i = view{t: m.mods}, j
		}
	}
	switch {
	case i == 0:
		return m.lookupQualified(name)
	case !more:
		return v.symbol(int(i - 1)), nil
	}
	c := distinct(m.LookupAll(name))
	if len(c) > 1 {
		return Symbol{}, &AmbiguousError{Name: name, Candidates: c}
	}
	return c[0], nil
}

// lookupQualified finds "name@2", "name [mod]", "mod:name", and both together.
func (m *Map) lookupQualified(full string) (Symbol, error) {
	if text, ok := quoted([]byte(full)); ok && string(text) != full {
		return m.Lookup(string(text))
	}
	name, nth := full, uint64(0)
	if at := strings.LastIndexByte(name, '@'); at > 0 {
		n, err := strconv.ParseUint(name[at+1:], 10, 32)
		if err != nil || n == 0 {
			return Symbol{}, fmt.Errorf("%q: %w", full, ErrNotFound)
		}
		name, nth = name[:at], n
	}
	name, mod, ofModule := splitModule(name)
	if name == full {
		return Symbol{}, fmt.Errorf("%q: %w", full, ErrNotFound)
	}
	c := m.LookupAll(name)
	if ofModule {
		c = slices.DeleteFunc(c, func(s Symbol) bool { return s.Module == "" || s.Module != mod })
	}
	c = distinct(c)
	switch {
	case len(c) == 0:
		return Symbol{}, fmt.Errorf("%q: %w", full, ErrNotFound)
	case nth > uint64(len(c)):
		return Symbol{}, fmt.Errorf("%q: %w: %s has %d address(es)", full, ErrNotFound, name, len(c))
	case nth > 0:
		return c[nth-1], nil
	case len(c) > 1:
		return Symbol{}, &AmbiguousError{Name: full, Candidates: c}
	}
	return c[0], nil
}

// splitModule splits "name [mod]" and "mod:name".
func splitModule(full string) (name, mod string, ok bool) {
	if i := strings.Index(full, " ["); i > 0 && strings.HasSuffix(full, "]") {
		return full[:i], full[i+2 : len(full)-1], true
	}
	if i := strings.IndexByte(full, ':'); i > 0 {
		return full[i+1:], full[:i], true
	}
	return full, "", false
}

// distinct keeps one symbol per address of a list in address order.
func distinct(s []Symbol) []Symbol {
	return slices.CompactFunc(s, func(a, b Symbol) bool { return a.Addr == b.Addr })
}

// LookupSuffixed is Lookup, and if there is no such name, the symbol the compiler
// made of it: name.isra.0, name.constprop.0, name.part.0 and the like, but not
// name.cold, which is only the unlikely half of a function. Such a function may
// take other arguments than the source says; tell the user. Several of them give
// an *AmbiguousError. "mod:name" and "name [mod]" are looked for in that module.
func (m *Map) LookupSuffixed(name string) (Symbol, error) {
	sym, err := m.Lookup(name)
	if err == nil || errors.Is(err, ErrAmbiguous) {
		return sym, err
	}
	plain, mod, ofModule := splitModule(name)
	c := m.suffixed(plain)
	if ofModule {
		c = slices.DeleteFunc(c, func(s Symbol) bool { return s.Module == "" || s.Module != mod })
	}
	c = distinct(c)
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
	var c []Symbol
	if name == "" || len(name) >= maxName {
		return nil
	}
	for _, v := range m.views() {
		for i := range v.t.ent {
			s := v.t.name(i)
			if len(s) > len(name)+1 && s[len(name)] == '.' && s[:len(name)] == name && isCompilerSuffix(s[len(name)+1:]) {
				c = append(c, v.symbol(i))
			}
		}
	}
	slices.SortStableFunc(c, byAddr)
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
		n := len(t.ent)
		t.placeAddr = make([]uint64, 0, n-t.lowN)
		t.place = make([]uint32, 0, n-t.lowN)
		for i := t.lowN; i < n; {
			best, bestRank, a := 0, rankNone, t.ent[i].addr
			for ; i < n && t.ent[i].addr == a; i++ {
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
		next := t.placeAddr[lo]
		j := int32(t.place[lo])
		if j < 0 {
			j = ^j
		}
		if t.mod == nil || t.mod[i] == t.mod[j] && next-start <= maxModuleGap {
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
	v, i, _, ok := m.find(addr)
	if !ok {
		return Symbol{}, 0, false
	}
	sym = v.symbol(i)
	return sym, addr - sym.Addr, true
}

func (m *Map) find(addr uint64) (v view, i int, end uint64, ok bool) {
	if m == nil || m.t == nil {
		return view{}, 0, 0, false
	}
	// The kernel's own table first: it claims nothing past the kernel's end.
	v = view{m.t, m.slide}
	if i, end, ok = v.find(addr); !ok && m.mods != nil {
		v = view{t: m.mods}
		i, end, ok = v.find(addr)
	}
	return v, i, end, ok
}

func (v view) find(addr uint64) (i int, end uint64, ok bool) {
	a, ok := v.unshift(addr)
	if !ok {
		return 0, 0, false
	}
	if i, end, ok = v.t.find(a); !ok {
		return 0, 0, false
	}
	// Not shift(end): the end of the last page is no address of a 32-bit table.
	if end = addr + (end - a); end < addr {
		end = math.MaxUint64
	}
	return i, end, true
}

// Next returns the address of the next symbol above addr, of whatever kind.
// No function that starts at or below addr reaches beyond it.
func (m *Map) Next(addr uint64) (uint64, bool) {
	next, found := uint64(0), false
	for _, v := range m.views() {
		a, ok := v.unshift(addr)
		if !ok || a < v.t.low {
			continue
		}
		if i := v.t.above(a); i < len(v.t.ent) {
			if b := v.addr(i); !found || b < next {
				next, found = b, true
			}
		}
	}
	return next, found
}

// FuncEnd returns an upper bound for the end of the function that addr is in: the
// next symbol, or the end of what Find claims. It fails where Find does.
func (m *Map) FuncEnd(addr uint64) (uint64, bool) {
	_, _, end, ok := m.find(addr)
	if !ok {
		return 0, false
	}
	if next, ok := m.Next(addr); ok && next-addr < end-addr {
		end = next
	}
	return end, true
}
