package linux

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"slices"
	"strings"

	"github.com/vmprobes/vmprobes/internal/kimage"
	"github.com/vmprobes/vmprobes/ktype"
	"github.com/vmprobes/vmprobes/paging"
	"github.com/vmprobes/vmprobes/sysmap"
)

// Where kernels are. On x86-64 the image is in the first of the last two GiB, and
// modules follow it (Documentation/arch/x86/x86_64/mm.rst); on i386 it is in the
// linear mapping of memory, which usually begins at 3 GiB.
const (
	window64    = 0xffffffff80000000
	windowSize  = 1 << 30
	linkBase64  = 0xffffffff81000000 // __START_KERNEL with the usual CONFIG_PHYSICAL_START
	window32    = 0xc0000000
	maxGap      = 16 << 20 // between two parts of an image: init code is freed
	maxImage32  = 64 << 20
	tableBudget = 1 << 11 // page tables read per root: a 1 GiB window has at most 515
	maxRanges   = 1 << 13 // pieces of an image: a PV guest's page tables in it are read-only
	maxImages   = 16      // candidates that are searched for symbols
	maxBTF      = 32 << 20
	maxNotes    = 64 << 10
)

// Discover finds the kernel that a machine runs.
//
// It takes at most a minute, however hostile the guest, and then fails with an error
// that wraps ErrBudget. Where there are no registers, it first searches all of memory
// for a kernel, which takes as long as reading it.
func Discover(ctx context.Context, m Machine, opts *Options) (*Kernel, error) {
	if opts == nil {
		opts = new(Options)
	}
	cpus, err := m.CPUs()
	if err != nil {
		return nil, fmt.Errorf("%w (registers: %w)", ErrNoKernel, err)
	}
	images, err := findImages(ctx, m, cpus)
	searched := false
	if scanner, ok := m.(Scanner); ok && len(images) == 0 {
		searched = true
		var serr error
		images, serr = findVMCoreInfo(ctx, scanner)
		if serr != nil {
			err = fmt.Errorf("%w; %w", err, serr)
		}
		if len(images) == 0 && ctx.Err() == nil && (opts.Symbols != nil || opts.SymbolFiles != nil) {
			if images, serr = findBySymbols(ctx, scanner, opts); serr != nil {
				err = fmt.Errorf("%w; %w", err, serr)
			}
		}
	}
	if len(images) == 0 {
		return nil, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, maxTime, fmt.Errorf("discovery: %w: it has taken %v", ErrBudget, maxTime))
	defer cancel()
	// The largest image is the kernel's: the page tables that a processor has in
	// user mode map only its entry code (page-table isolation), and a page that is
	// no table maps garbage, if anything.
	var errs error
	var found []*Kernel
	seen := make(map[paging.Root]bool)
	for _, img := range images[:min(len(images), maxImages)] {
		if seen[img.root] {
			continue
		}
		if err := done(ctx); err != nil {
			if len(found) > 0 {
				break
			}
			return nil, errors.Join(errs, err)
		}
		k, err := discover(ctx, m, opts, img, cpus)
		if err != nil {
			errs = errors.Join(errs, err)
			if !searched && (errors.Is(err, ErrNotInPlace) || errors.Is(err, ErrWrongTypes)) {
				return nil, err // this is the kernel
			}
			continue
		}
		if !searched {
			return k, nil
		}
		found = append(found, k)
		seen[img.root] = true
	}
	if len(found) == 0 {
		return nil, errs
	}
	k := running(found)
	k.checkHole(m.(Scanner))
	return k, nil
}

// discover takes an image for the kernel's, if it has symbols.
func discover(ctx context.Context, m Machine, opts *Options, img image, cpus []CPU) (*Kernel, error) {
	k := &Kernel{
		machine: m, log: opts.Logger, givenTypes: opts.Types, offsets: opts.Offsets,
		mem: img.mem, bits: img.bits, ranges: img.ranges,
	}
	k.root.Store(uint64(img.root))
	if k.log == nil {
		k.log = slog.New(slog.DiscardHandler)
	}
	k.explain("page tables", nil, img.why, "%v, root %#x", img.mode.Kind, uint64(img.root))
	k.explain("image", nil, "the largest piece that is mapped where kernels are", "%s at %#x", size(img.size), img.ranges[0].Addr)
	if err := k.findSymbols(ctx, opts); err != nil {
		return nil, err
	}
	if err := k.completeSymbols(ctx, opts); err != nil {
		return nil, err
	}
	k.explainPlace(cpus)
	switch own := k.useOwnRoot(); {
	case own || !k.unstarted(): // a guest that was restored and has not run since has booted
		k.started.Store(true)
	default:
		if err := k.borrow(); err != nil {
			return nil, err
		}
	}
	if k.givenTypes != nil {
		var err error
		if k.typesWhy, err = k.checkOrigin(k.givenTypes); err != nil {
			return nil, err
		}
	}
	return k, nil
}

// image is a candidate for the kernel's image.
type image struct {
	mem    *paging.Memory
	mode   paging.Mode
	root   paging.Root
	bits   int
	ranges []sysmap.Range
	size   uint64
	text   uint64 // of i386: bytes of code at its beginning that can't be written
	why    string
}

// findImages returns what the page tables of the vCPUs map where kernels are, each
// image once, the largest first.
func findImages(ctx context.Context, m Machine, cpus []CPU) ([]image, error) {
	var images []image
	errs := fmt.Errorf("%w (none of %d vCPUs has page tables that map one)", ErrNoKernel, len(cpus))
	if len(cpus) == 0 {
		errs = fmt.Errorf("%w (there are no vCPU registers)", ErrNoKernel)
	}
	mems := make(map[paging.Mode]*paging.Memory)
	tried := make(map[paging.Root]bool)
	for i, c := range cpus {
		if err := done(ctx); err != nil {
			return nil, err
		}
		mode := paging.Mode{Kind: paging.FourLevel, NXE: true}
		if !c.PV {
			var err error
			if mode, err = paging.ModeOf(c.CR0, c.CR4, c.EFER); err != nil {
				errs = errors.Join(errs, fmt.Errorf("vCPU %d: %w", i, err))
				continue
			}
			// QEMU's cores of i386 guests are without EFER. A kernel that hasn't set
			// NXE doesn't set the bit in its tables either.
			mode.NXE = mode.Kind != paging.TwoLevel
		}
		mem := mems[mode]
		if mem == nil {
			mem = paging.New(m, mode)
			mems[mode] = mem
		}
		for _, r := range roots(mode, c) {
			if tried[r.root] {
				continue
			}
			tried[r.root] = true
			found, err := image{mem: mem, mode: mode, root: r.root, why: fmt.Sprintf(r.why, i)}.find()
			if err != nil {
				errs = errors.Join(errs, err)
				continue
			}
			for _, img := range found {
				// Every process maps the same kernel: one look at it is enough.
				if !slices.ContainsFunc(images, func(o image) bool { return slices.Equal(o.ranges, img.ranges) }) {
					images = append(images, img)
				}
			}
		}
	}
	slices.SortStableFunc(images, func(a, b image) int {
		return cmp.Or(cmp.Compare(b.text, a.text), cmp.Compare(b.size, a.size))
	})
	if len(images) == 0 {
		return nil, errs
	}
	return images, nil
}

type rootWhy struct {
	root paging.Root
	why  string
}

// roots returns the page tables that a vCPU may have for its kernel. With
// page-table isolation they are the first of a pair, and those for user mode the
// second (PTI_USER_PGTABLE_BIT, arch/x86/entry/calling.h); without, any.
func roots(mode paging.Mode, c CPU) []rootWhy {
	switch {
	case c.PV, mode.Kind == paging.TwoLevel:
		return []rootWhy{{paging.Root(c.CR3 &^ 0xfff), "CR3 of vCPU %d"}}
	case mode.Kind == paging.PAE:
		return []rootWhy{{paging.Root(c.CR3 &^ 0x1f), "CR3 of vCPU %d"}}
	}
	return []rootWhy{
		{paging.Root(c.CR3 &^ 0xfff), "CR3 of vCPU %d"},
		{paging.Root(c.CR3 &^ 0x1fff), "the kernel's half of vCPU %d's pair (page-table isolation)"},
	}
}

// find looks for the image through the page tables. On i386 there may be several, see
// find32.
func (img image) find() ([]image, error) {
	from := paging.VAddr(window64)
	img.bits = 64
	if img.mode.Kind == paging.PAE || img.mode.Kind == paging.TwoLevel {
		from, img.bits = window32, 32
	}
	var all []sysmap.Range
	var errs error
	for r, err := range img.mem.Ranges(img.root, from, from+windowSize-1, tableBudget) {
		if err != nil { // of one entry, or the last
			errs = err
			continue
		}
		if n := len(all); img.bits == 64 && n > 0 && uint64(r.Addr)-all[n-1].Addr-all[n-1].Size > maxGap {
			break
		}
		if len(all) == maxRanges {
			if img.bits == 32 {
				break // modules and mappings of devices follow
			}
			return nil, fmt.Errorf("page tables at %#x: more than %d pieces: %w", uint64(img.root), maxRanges, ErrBadKernel)
		}
		all = append(all, sysmap.Range{
			Addr: uint64(r.Addr), Size: r.Size,
			Writable: r.Prot&paging.Writable != 0, Exec: r.Prot&paging.NoExecute == 0,
		})
	}
	var images []image
	if img.bits == 32 {
		images = img.find32(all)
	} else if len(all) > 0 {
		img.ranges = all
		for _, r := range all {
			img.size += r.Size
		}
		images = []image{img}
	}
	if len(images) == 0 {
		if errs != nil {
			return nil, errs
		}
		return nil, fmt.Errorf("page tables at %#x map nothing from %v on", uint64(img.root), from)
	}
	return images, nil
}

const (
	minText32   = 1 << 20 // bytes of code: the kernel of 5.10 has 8 MiB
	maxImages32 = 4       // of one root
)

// find32 cuts images out of what an i386 kernel has mapped: its image is somewhere in the
// mapping of all memory, which KASLR (CONFIG_RANDOMIZE_BASE) uses up to its end. It
// begins with code, which can't be written once the kernel has booted
// (mark_rodata_ro, arch/x86/mm/init_32.c): without the NX bit that is all that tells it
// from the rest. What begins with the first page that can be executed at all comes last,
// for a kernel that has not booted that far.
func (img image) find32(all []sysmap.Range) []image {
	var images []image
	first := -1
	for i := 0; i < len(all); i++ {
		if !all[i].Exec {
			continue
		}
		if first < 0 {
			first = i
		}
		from, end, text := i, all[i].Addr, uint64(0)
		for ; i < len(all) && all[i].Exec && !all[i].Writable && all[i].Addr == end; i++ {
			text += all[i].Size
			end += all[i].Size
		}
		i = max(i-1, from)
		if text >= minText32 {
			images = append(images, img.cut(all[from:], text))
		}
	}
	slices.SortStableFunc(images, func(a, b image) int { return cmp.Compare(b.text, a.text) })
	images = images[:min(len(images), maxImages32-1)]
	if first >= 0 {
		images = append(images, img.cut(all[first:], 0))
	}
	return images
}

// cut takes the first ranges, up to a gap or to as much as an i386 kernel may have.
func (img image) cut(ranges []sysmap.Range, text uint64) image {
	img.ranges, img.size, img.text = nil, 0, text
	end := ranges[0].Addr
	for _, r := range ranges {
		r.Size = min(r.Size, maxImage32-img.size)
		if r.Addr-end > maxGap || r.Size == 0 {
			break
		}
		img.ranges = append(img.ranges, r)
		img.size += r.Size
		end = r.Addr + r.Size
	}
	return img
}

// findSymbols takes the symbols that were given, or finds the kernel's own, and checks
// that they are those of this kernel.
func (k *Kernel) findSymbols(ctx context.Context, opts *Options) error {
	if opts.Symbols != nil {
		// What the user has named need not be confirmed.
		if err := k.adopt(ctx, opts.Symbols, "as given"); !errors.Is(err, errUnconfirmed) {
			return err
		}
		return nil
	}
	before := k.rungs
	if opts.Cache != "" && k.cached(opts.Cache) {
		err := k.identify(ctx)
		if err == nil {
			return nil
		}
		k.log.Warn("symbols in the cache are wrong", "err", err)
		k.rungs = before
	}
	var mem sysmap.Memory = k
	rec := &recorder{read: k.Read, pages: make(map[uint64][]byte)}
	if opts.Cache != "" {
		mem = rec
	}
	m, t, err := sysmap.FromMemory(ctx, mem, k.ranges)
	if err != nil {
		if err := done(ctx); err != nil {
			return err
		}
		return k.symbolsFromFile(ctx, opts, fmt.Errorf("%w: %w", ErrNoSymbols, err))
	}
	k.syms = m
	k.explain("symbols", nil, fmt.Sprintf("%s; every name and marker fits, addresses rise", t.Layout),
		"%d, by the structure of the tables at %#x (%d pages read)", t.Count, t.Names, t.Pages)
	if err := k.identify(ctx); err != nil {
		return err
	}
	if opts.Cache != "" {
		if err := k.keep(opts.Cache, t, rec); err != nil {
			k.log.Debug("symbols not kept in the cache", "dir", opts.Cache, "err", err)
		}
	}
	return nil
}

// maxSymbolFiles bounds how many files are tried.
const maxSymbolFiles = 16

// symbolsFromFile takes the symbols of a kernel that has none, as why says, from
// the first file that fits it.
func (k *Kernel) symbolsFromFile(ctx context.Context, opts *Options, why error) error {
	if opts.SymbolFiles == nil {
		return why
	}
	var rel string
	if at, err := k.findBanner(ctx, ""); err == nil {
		if s, err := k.ReadString(at, maxBanner); err == nil {
			rel = safeRelease(release(s))
		}
	}
	before := k.rungs
	errs := []error{why}
	found, err := firstFile(ctx, opts.SymbolFiles(rel), func(path string, m *sysmap.Map, err error) bool {
		if err == nil {
			err = k.adopt(ctx, m, "of "+path)
		}
		if err == nil {
			k.log.Warn("symbols are those of a file, as the guest has none", "file", path)
			return true
		}
		k.syms, k.rungs = nil, before
		// The user didn't name this file: that it is another kernel's is not an
		// ErrWrongSymbols.
		errs = append(errs, fmt.Errorf("%s: %v", path, err))
		return false
	})
	if found || err != nil {
		return err
	}
	return errors.Join(errs...)
}

// firstFile calls fits with the symbols of each file that there is, or why they can't be
// read, until it returns true. It reports whether it did.
func firstFile(ctx context.Context, paths []string, fits func(path string, m *sysmap.Map, err error) bool) (found bool, err error) {
	for _, path := range paths[:min(len(paths), maxSymbolFiles)] {
		if err := done(ctx); err != nil {
			return false, err
		}
		if m, err := sysmap.ParseFile(path); !errors.Is(err, fs.ErrNotExist) && fits(path, m, err) {
			return true, nil
		}
	}
	return false, nil
}

// completeSymbols takes the symbols of a kernel whose own table has only functions
// (CONFIG_KALLSYMS_ALL=n, as Debian's i386 ones) from the first file that has the same
// functions at the same places, and more. If there is none that is no error.
func (k *Kernel) completeSymbols(ctx context.Context, opts *Options) error {
	if opts.Symbols != nil || opts.SymbolFiles == nil || !k.onlyFunctions() {
		return nil
	}
	_, err := firstFile(ctx, opts.SymbolFiles(safeRelease(k.Release())), func(path string, m *sysmap.Map, err error) bool {
		var slide uint64
		var same int
		if err == nil {
			slide, same, err = k.sameFunctions(m)
		}
		if err != nil {
			k.log.Debug("symbols not completed", "file", path, "err", err)
			return false
		}
		k.syms = m.Slide(slide)
		k.explainFrom(FromFile, "data", nil, fmt.Sprintf("of the kernel's own table, which has only functions, %d of %d that were compared are where it says", same, same),
			"%d symbols, of %s", k.syms.Len(), path)
		k.log.Warn("symbols of data are those of a file, as the guest tells only its functions", "file", path)
		k.findBuildID()
		return true
	})
	return err
}

// sameFunctions compares a file's symbols with the kernel's own, of which all that are
// compared must be the file's, as many bytes from where the file has them.
func (k *Kernel) sameFunctions(m *sysmap.Map) (slide uint64, same int, err error) {
	if b := strings.TrimRight(m.Banner(), "\n\x00"); b != "" && b != k.banner {
		return 0, 0, fmt.Errorf("%w: they are of %q", ErrWrongSymbols, b)
	}
	if _, err := m.Lookup("init_task"); err != nil {
		return 0, 0, err
	}
	const every, least = 37, 16
	n := 0
	for s := range k.syms.All() {
		if n++; n%every != 0 {
			continue
		}
		if all := k.syms.LookupAll(s.Name); len(all) != 1 {
			continue
		}
		f, err := m.Lookup(s.Name)
		if err != nil {
			return 0, 0, fmt.Errorf("%w: %w", ErrWrongSymbols, err)
		}
		if same == 0 {
			slide = s.Addr - f.Addr
		}
		if f.Addr+slide != s.Addr {
			return 0, 0, fmt.Errorf("%w: %q is at %#x in the guest, and would be at %#x", ErrWrongSymbols, s.Name, s.Addr, f.Addr+slide)
		}
		same++
	}
	if same < least {
		return 0, 0, fmt.Errorf("%w: only %d functions can be compared", ErrWrongSymbols, same)
	}
	return slide, same, nil
}

// safeRelease returns a release if it is safe as a part of a path, else "".
func safeRelease(s string) string {
	const maxRelease = 64 // __NEW_UTS_LEN
	ok := s != "" && s[0] != '.' && len(s) <= maxRelease
	for _, c := range []byte(s) {
		ok = ok && (c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || isDigit(c) || strings.IndexByte("._+~-", c) >= 0)
	}
	if !ok {
		return ""
	}
	return s
}

// adopt takes symbols from a file, if they are those of the running kernel.
func (k *Kernel) adopt(ctx context.Context, m *sysmap.Map, whose string) error {
	if err := k.fit(m, whose); err != nil {
		return err
	}
	if err := k.identify(ctx); err != nil {
		return err
	}
	return k.confirm()
}

// fit moves symbols from where they were linked to where the kernel is.
func (k *Kernel) fit(m *sysmap.Map, whose string) error {
	text, err := m.Lookup("_text")
	if err != nil {
		return fmt.Errorf("%w: no _text among them", ErrWrongSymbols)
	}
	slide := k.ranges[0].Addr - text.Addr
	// CONFIG_PHYSICAL_ALIGN is at least 2 MiB on x86-64, and 8 KiB on i386.
	align := uint64(2 << 20)
	if k.bits == 32 {
		align = 8 << 10
	}
	// Without the NX bit nothing tells where in the mapping of all memory the image
	// begins. Few of these kernels move. Nor does a PV guest's, in which the domain's builder
	// has mapped what is below it, too.
	if last := k.ranges[len(k.ranges)-1]; (k.bits == 32 || k.unstarted()) && text.Addr >= k.ranges[0].Addr && text.Addr < last.Addr+last.Size {
		slide = 0
	}
	if slide >= windowSize || slide%align != 0 {
		return fmt.Errorf("%w: _text is at %#x in the file, and the kernel's image at %#x", ErrWrongSymbols, text.Addr, k.ranges[0].Addr)
	}
	k.syms = m
	why := "where the image is"
	if slide != 0 {
		k.syms = m.Slide(slide)
		why = fmt.Sprintf("moved by %#x to where the image is", slide)
	}
	k.explainFrom(FromFile, "symbols", nil, why, "%d, %s", m.Len(), whose)
	return nil
}

// identify reads the kernel's version string and build id. That it finds them shows that
// the symbols are at the right addresses.
func (k *Kernel) identify(ctx context.Context) error {
	want := strings.TrimRight(k.syms.Banner(), "\n\x00")
	why := "read at linux_banner"
	at, err := k.symbol(bannerSymbol)
	if errors.Is(err, sysmap.ErrNotFound) {
		// A kernel without CONFIG_KALLSYMS_ALL has only functions among its symbols.
		why = "found in read-only data"
		at, err = k.findBanner(ctx, want)
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrWrongSymbols, err)
	}
	s, err := k.ReadString(at, maxBanner)
	if err != nil || !strings.HasPrefix(s, bannerMagic) {
		return fmt.Errorf("%w: no version string at linux_banner, %#x", errors.Join(ErrWrongSymbols, err), at)
	}
	k.banner, k.bannerAt = strings.TrimRight(s, "\n"), at
	if want != "" && want != k.banner {
		return fmt.Errorf("%w: they are of %q, and the guest runs %q", ErrWrongSymbols, want, k.banner)
	}
	k.explain("banner", nil, why, "%s", printable(k.banner))

	k.findBuildID()
	return nil
}

// findBuildID reads the build id, if the symbols say where the kernel's notes are.
func (k *Kernel) findBuildID() {
	o := k.begin("build id")
	if addr, n, err := k.section("__start_notes", "__stop_notes", maxNotes); err == nil {
		if notes, err := o.table("notes", addr, n, maxNotes); err == nil {
			k.buildID = kimage.BuildID(notes)
		}
	}
	if k.buildID != "" {
		k.explain("build id", nil, "in the kernel's notes", "%s", k.buildID)
	} else {
		k.explain("build id", errors.New("no note of it"), "", "")
	}
}

// errUnconfirmed: nothing shows that symbols are those of this build of the kernel.
var errUnconfirmed = errors.New("nothing in it can be compared with the guest")

// confirm checks that symbols from a file without a version string, such as a
// System.map, are those of the very build that runs: functions of system calls, which
// are in all parts of a kernel, must be where the guest's sys_call_table says.
func (k *Kernel) confirm() error {
	if k.syms.Banner() != "" {
		return nil // identify has compared it
	}
	at, err := k.symbol("sys_call_table")
	if err != nil {
		return fmt.Errorf("%w: %w", errUnconfirmed, err)
	}
	const calls = 128 // fewer than any kernel has
	long := k.bits / 8
	table := make([]byte, calls*long)
	if err := k.Read(at, table); err != nil {
		return fmt.Errorf("%w: sys_call_table: %w", ErrWrongSymbols, err)
	}
	good := 0
	for i := range calls {
		if _, off, ok := k.syms.Find(word(table[i*long:], long)); ok && off == 0 {
			good++
		}
	}
	// Some entries may have been replaced by functions of other origin.
	if good < calls*3/4 {
		return fmt.Errorf("%w: %d of the guest's first %d system calls are where they say", ErrWrongSymbols, good, calls)
	}
	k.explain("build", nil, "", "%d of the first %d system calls are where the symbols say", good, calls)
	return nil
}

// bannerMagic begins the version string (init/version.c).
const bannerMagic = "Linux version "

// findBanner searches read-only data for the version string: for the one that is wanted,
// or else the first (see [sysmap.VersionString]). The kernel's log has it, too, but is
// writable.
func (k *Kernel) findBanner(ctx context.Context, want string) (uint64, error) {
	o := k.begin("version string")
	var first uint64
	for _, r := range k.ranges {
		for off := uint64(0); off < r.Size && !r.Writable; off += paging.PageSize {
			if err := done(ctx); err != nil {
				return 0, err
			}
			var page [paging.PageSize + len(bannerMagic)]byte
			b := page[:min(uint64(len(page)), r.Size-off)]
			if err := o.Read(r.Addr+off, b); errors.Is(err, ErrBudget) {
				return 0, err
			}
			for from := 0; ; from++ {
				i := bytes.Index(b[from:], []byte(bannerMagic))
				if i < 0 {
					break
				}
				from += i
				at := r.Addr + off + uint64(from)
				s, err := o.str(at, maxBanner)
				if errors.Is(err, ErrBudget) {
					return 0, err
				}
				i, line := sysmap.VersionString([]byte(s + "\x00"))
				switch {
				case i != 0:
				case line == want || want == "":
					return at, nil
				case first == 0:
					first = at
				}
			}
		}
	}
	if first == 0 {
		return 0, errors.New("no version string in the kernel's image")
	}
	return first, nil
}

// maxBanner bounds the version string, in bytes.
const maxBanner = 1024

func isDigit(c byte) bool { return c >= '0' && c <= '9' }

// explainPlace says where the kernel is, and whether the processors' entry points
// confirm it.
func (k *Kernel) explainPlace(cpus []CPU) {
	text, err := k.symbol("_text")
	if err != nil {
		return
	}
	start, n, err := k.section("_stext", "_etext", windowSize)
	if err != nil {
		return
	}
	in, all := 0, 0
	for _, c := range cpus {
		for _, e := range c.Entries {
			all++
			if e >= start && e < start+n {
				in++
			}
		}
	}
	why := ""
	if all > 0 {
		why = fmt.Sprintf("%d of %d entry points that its processors know are in its text", in, all)
	}
	if k.bits == 64 {
		k.explain("place", nil, why, "_text at %#x, slide %#x", text, text-linkBase64)
		return
	}
	k.explain("place", nil, why, "_text at %#x", text)
}

// ownRoots are the names of the kernel's own page tables: since 4.13, up to then, and on
// i386.
var ownRoots = []string{"init_top_pgt", "init_level4_pgt", "swapper_pg_dir"}

// bannerSymbol is the name of the version string.
const bannerSymbol = "linux_banner"

// useOwnRoot switches from the page tables of whatever process was running to the
// kernel's own, which live as long as the kernel.
func (k *Kernel) useOwnRoot() bool {
	root, name, ok := k.ownRoot(paging.Root(k.root.Load()))
	if ok {
		k.root.Store(uint64(root))
		k.explain("own tables", nil, "they map themselves where the tables in use do", "%s, root %#x", name, uint64(root))
	}
	return ok
}

// ownRoot finds the kernel's own page tables through those in use.
func (k *Kernel) ownRoot(inUse paging.Root) (root paging.Root, name string, ok bool) {
	for _, name := range ownRoots {
		at, err := k.symbol(name)
		if err != nil {
			continue
		}
		t, err := k.mem.Translate(inUse, paging.VAddr(at))
		if err != nil {
			continue
		}
		root := paging.Root(t.Phys())
		// They must map themselves where the tables in use do.
		if t2, err := k.mem.Translate(root, paging.VAddr(at)); err != nil || t2.Frame != t.Frame {
			continue
		}
		return root, name, true
	}
	return 0, "", false
}

// Types returns the kernel's types: those given to Discover, else its own (BTF),
// else a few inferred from its structures. They are looked for at the first call.
func (k *Kernel) Types() (*ktype.Types, error) {
	if k == nil {
		return nil, ErrNoKernel
	}
	k.typesOnce.Do(func() {
		k.types, k.typesErr = k.findTypes()
		if k.typesErr != nil {
			k.explain("types", k.typesErr, "", "")
		}
	})
	return k.types, k.typesErr
}

func (k *Kernel) findTypes() (*ktype.Types, error) {
	if k.givenTypes != nil {
		why, err := k.checkLayout(k.givenTypes)
		if err != nil {
			return nil, err
		}
		k.explainFrom(FromFile, "types", nil, why, "%s, as given", k.givenTypes.Source())
		return k.givenTypes, nil
	}
	t, err := k.ownTypes()
	if err == nil {
		return t, nil
	}
	if len(k.offsets) > 0 {
		t, oerr := k.configuredTypes()
		if oerr == nil {
			return t, nil
		}
		err = fmt.Errorf("%w; %w", err, oerr)
	}
	t, ierr := k.inferTypes()
	if ierr != nil {
		return nil, fmt.Errorf("%w: %w; %w", ErrNoTypes, err, ierr)
	}
	return t, nil
}

// configuredTypes makes types of configured offsets. The ids of the thread and the
// process are next to each other, and so are the eleven addresses of a process's parts.
func (k *Kernel) configuredTypes() (*ktype.Types, error) {
	word := uint64(k.bits / 8)
	task, mm := ktype.Struct{Name: "task_struct"}, ktype.Struct{Name: "mm_struct"}
	add := func(s *ktype.Struct, key string, fields ...ktype.StructField) {
		base, ok := k.offsets[key]
		if !ok {
			return
		}
		for _, f := range fields {
			f.Offset += base
			s.Fields = append(s.Fields, f)
		}
	}
	add(&task, "linux_tasks", ktype.StructField{Name: "tasks", Type: "list_head"})
	add(&task, "linux_mm", ktype.StructField{Name: "mm", Type: "mm_struct *"})
	add(&task, "linux_pid", ktype.StructField{Name: "pid", Type: "int"}, ktype.StructField{Name: "tgid", Offset: 4, Type: "int"})
	add(&task, "linux_name", ktype.StructField{Name: "comm", Type: "char[16]"})
	add(&mm, "linux_pgd", ktype.StructField{Name: "pgd", Type: "void *"})
	for i, name := range []string{"start_code", "end_code", "start_data", "end_data", "start_brk", "brk",
		"start_stack", "arg_start", "arg_end", "env_start", "env_end"} {
		add(&mm, "linux_addr", ktype.StructField{Name: name, Offset: uint64(i) * word, Type: "unsigned long"})
	}
	t, err := ktype.New("configured offsets", word, listHead(word), task, mm)
	if err != nil {
		return nil, err
	}
	why, err := k.checkLayout(t)
	if err != nil {
		return nil, err
	}
	k.explainFrom(FromFile, "types", nil, why, "%d configured offsets; what they don't tell is not known", len(k.offsets))
	return t, nil
}

// ownBTF reads the BTF in the kernel's image (CONFIG_DEBUG_INFO_BTF).
func (k *Kernel) ownBTF() (blob []byte, at uint64, err error) {
	at, n, err := k.section("__start_BTF", "__stop_BTF", maxBTF)
	if err != nil {
		return nil, 0, fmt.Errorf("no BTF in the kernel: %w", err)
	}
	if blob, err = k.begin("types").table("BTF", at, n, maxBTF); err != nil {
		return nil, 0, fmt.Errorf("BTF: %w", err)
	}
	return blob, at, nil
}

// ownTypes makes types of the kernel's own BTF.
func (k *Kernel) ownTypes() (*ktype.Types, error) {
	blob, at, err := k.ownBTF()
	if err != nil {
		return nil, err
	}
	if err := checkNames(blob); err != nil {
		return nil, err
	}
	t, err := ktype.FromBTF(bytes.NewReader(blob), int64(len(blob)))
	if err != nil {
		return nil, err
	}
	if err := k.checkTypes(t); err != nil {
		return nil, err
	}
	k.explain("types", nil, "the idle task is called swapper by them", "BTF, %s at %#x", size(uint64(len(blob))), at)
	return t, nil
}

// checkNames makes sure that the names of types, which errors show, are printable,
// as those of C and Rust are. The header says where they are (struct btf_header, include/uapi/linux/btf.h).
func checkNames(blob []byte) error {
	const header = 24
	if len(blob) < header {
		return fmt.Errorf("BTF of %d bytes: %w", len(blob), ErrBadKernel)
	}
	at := uint64(le32(blob[4:])) + uint64(le32(blob[16:]))
	n := uint64(le32(blob[20:]))
	if at > uint64(len(blob)) || n > uint64(len(blob))-at {
		return fmt.Errorf("BTF with names beyond its end: %w", ErrBadKernel)
	}
	for _, c := range blob[at : at+n] {
		if c != 0 && (c < ' ' || c > '~') {
			return fmt.Errorf("BTF with unprintable names: %w", ErrBadKernel)
		}
	}
	return nil
}

// size formats a number of bytes.
func size(n uint64) string {
	switch {
	case n >= 1<<20:
		return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20))
	case n >= 1<<10:
		return fmt.Sprintf("%.1f KiB", float64(n)/(1<<10))
	}
	return fmt.Sprintf("%d bytes", n)
}

// printable replaces all but printable ASCII, which could control a terminal.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r > 0x7e {
			return '?'
		}
		return r
	}, s)
}
