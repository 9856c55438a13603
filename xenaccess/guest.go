package xenaccess

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"strings"

	"github.com/vmprobes/vmprobes/internal/target"
	"github.com/vmprobes/vmprobes/ktype"
	"github.com/vmprobes/vmprobes/linux"
	"github.com/vmprobes/vmprobes/paging"
	"github.com/vmprobes/vmprobes/sysmap"
)

// Options configures Open. The zero value, and nil, mean defaults.
type Options struct {
	// Symbols is a file with the kernel's symbols: its vmlinux or vmlinuz, its
	// System.map, a saved /proc/kallsyms, or a Volatility 3 symbol file, compressed or
	// not. Empty means: the file named by the environment variable VMPROBES_SYMBOLS,
	// else what the configuration says, else the guest's own table, found in its memory;
	// if it has none, the file that Types names, the one that it was booted from, or one
	// of its release in /boot, /usr/lib/modules or among the debug symbols here
	// (/usr/lib/debug).
	Symbols string
	// Types is a file with the kernel's types: BTF, a vmlinux with BTF or DWARF, a
	// vmlinuz with BTF, or a Volatility 3 symbol file. Those of another kernel than
	// the one that runs are refused with linux.ErrWrongTypes. Empty means: the
	// guest's own, if it has any.
	Types string
	// Config is a file in the form of /etc/xenaccess.conf or of LibVMI's
	// /etc/libvmi.conf. Empty means /etc/xenaccess.conf, if it exists and names
	// the guest; "-" means none.
	Config string
	// Cache is a directory for what is expensive to work out about a kernel.
	// Empty means /var/cache/vmprobes; "-" means none.
	Cache string
	// Lax makes Open succeed where no Linux kernel is found, so that physical and
	// machine memory can be read (XA_FAILSOFT). Guest.Err says what was missing.
	Lax bool
	// Logger receives debug records. Nil discards them.
	Logger *slog.Logger
}

// Places of files.
const (
	defaultConfig = "/etc/xenaccess.conf"
	defaultCache  = "/var/cache/vmprobes"
	symbolsEnv    = "VMPROBES_SYMBOLS"
	none          = "-"
)

// A Guest is a running or saved guest. Its methods are safe for concurrent use.
type Guest struct {
	target target.Guest
	kernel *linux.Kernel
	err    error
	raw    *paging.Memory // for physical and machine memory
}

// Open opens the domain called name, or the one whose id name spells, or, if name has
// a scheme, another kind of guest: "file:PATH" is a saved image. The Guest must be
// closed.
func Open(ctx context.Context, name string, opts *Options) (*Guest, error) {
	g, err := open(ctx, name, opts)
	if err != nil {
		if name != "" {
			name = " " + name
		}
		return nil, fmt.Errorf("xenaccess: open%s: %w", name, err)
	}
	return g, nil
}

func open(ctx context.Context, name string, opts *Options) (*Guest, error) {
	if opts == nil {
		opts = new(Options)
	}
	t, err := target.Open(ctx, name)
	if err != nil {
		return nil, err
	}
	g := look(ctx, t, opts)
	if g.err != nil && !opts.Lax {
		if w := g.Warnings(); len(w) > 0 {
			g.err = fmt.Errorf("%w; %s", g.err, strings.Join(w, "; "))
		}
		return nil, errors.Join(g.err, g.Close())
	}
	return g, nil
}

// look returns t as a Guest, whose err says why no kernel was found.
func look(ctx context.Context, t target.Guest, opts *Options) *Guest {
	g := &Guest{target: t, raw: paging.New(t, paging.Mode{Kind: paging.FourLevel, NXE: true})}
	if f, ok := t.(target.Freezer); ok {
		if g.err = f.Freeze(); g.err != nil {
			return g
		}
		defer func() { g.err = errors.Join(g.err, f.Thaw()) }()
	}
	g.kernel, g.err = discover(ctx, t, opts)
	if opts.Logger != nil {
		for _, w := range g.Warnings() {
			opts.Logger.Warn("guest", "warning", w)
		}
	}
	return g
}

// discover finds the guest's kernel, with the files that the user has named.
func discover(ctx context.Context, t target.Guest, opts *Options) (*linux.Kernel, error) {
	lo := &linux.Options{Cache: opts.Cache, Logger: opts.Logger}
	switch opts.Cache {
	case "":
		lo.Cache = defaultCache
	case none:
		lo.Cache = ""
	}
	symbols, types := opts.Symbols, opts.Types
	if symbols == "" {
		symbols = os.Getenv(symbolsEnv)
	}
	i := t.Info()
	conf, err := configured(cmp.Or(i.Given, i.Name), opts)
	if err != nil {
		return nil, err
	}
	if symbols == "" {
		symbols = conf.Sysmap
	}
	if types == "" {
		types = conf.Types
	}
	lo.Offsets = conf.Offsets
	if types != "" {
		if lo.Types, err = parse(ctx, types, ktype.ParseFile); err != nil {
			return nil, err
		}
	}
	if symbols == "" {
		lo.SymbolFiles = func(release string) []string {
			files := symbolFiles(t.Info().Kernel, release)
			if types != "" {
				files = append([]string{types}, files...) // it may have both
			}
			return files
		}
		k, err := linux.Discover(ctx, t, lo)
		if errors.Is(err, linux.ErrWrongTypes) {
			return nil, fmt.Errorf("%s: %w", types, err)
		}
		if errors.Is(err, linux.ErrNoSymbols) {
			err = fmt.Errorf("%w: name the kernel's vmlinux, vmlinuz, System.map or saved /proc/kallsyms "+
				"in Options.Symbols or %s", err, symbolsEnv)
		}
		return k, err
	}
	if lo.Symbols, err = parse(ctx, symbols, sysmap.ParseFile); err != nil {
		return nil, fmt.Errorf("%w: %w", linux.ErrNoSymbols, err)
	}
	k, err := linux.Discover(ctx, t, lo)
	if errors.Is(err, linux.ErrWrongTypes) {
		symbols = types // it is that file's fault
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", symbols, err)
	}
	return k, nil
}

// parse reads a file, which takes seconds for one with debug information. It returns
// early when ctx is done; f then runs to its end unnoticed.
func parse[T any](ctx context.Context, path string, f func(path string) (*T, error)) (*T, error) {
	type result struct {
		t   *T
		err error
	}
	done := make(chan result, 1)
	go func() {
		t, err := f(path)
		done <- result{t, err}
	}()
	select {
	case r := <-done:
		return r.t, r.err
	case <-ctx.Done():
		return nil, fmt.Errorf("%s: %w", path, context.Cause(ctx))
	}
}

// symbolPlaces is where distributions put the files of a kernel, by its release:
// an administrator may have installed here what the guest runs.
var symbolPlaces = []string{
	// First those with a version string to compare.
	"/usr/lib/debug/boot/vmlinux-%s", "/usr/lib/debug/lib/modules/%s/vmlinux", "/usr/lib/debug/usr/lib/modules/%s/vmlinux",
	"/boot/vmlinux-%s", "/boot/vmlinuz-%s",
	// Fedora, Arch, openSUSE, and Debian from 7.2 on; builds of one's own.
	"/usr/lib/modules/%s/vmlinux", "/usr/lib/modules/%s/vmlinuz", "/lib/modules/%s/build/vmlinux",
	"/boot/System.map-%s", "/usr/lib/debug/boot/System.map-%s", "/usr/lib/modules/%s/System.map",
}

// symbolFiles returns the files that may have the symbols of a kernel that was
// built without a table of them: the one that it was booted from, if that is
// known, and those of its release.
func symbolFiles(booted, release string) (files []string) {
	if booted != "" {
		files = append(files, booted)
	}
	if release != "" {
		for _, place := range symbolPlaces {
			files = append(files, fmt.Sprintf(place, release))
		}
	}
	return files
}

// configured returns what the configuration says of the guest called name.
func configured(name string, opts *Options) (DomainConfig, error) {
	path := opts.Config
	switch path {
	case none:
		return DomainConfig{}, nil
	case "":
		path = defaultConfig
	}
	c, err := LoadConfig(path)
	if errors.Is(err, fs.ErrNotExist) && opts.Config == "" {
		return DomainConfig{}, nil
	}
	if err != nil {
		return DomainConfig{}, err
	}
	if opts.Logger != nil {
		for _, w := range c.Warnings() {
			opts.Logger.Warn("configuration", "warning", w)
		}
	}
	d, _ := c.Domain(name)
	if d.Err != nil {
		return d, d.Err
	}
	if d.OSType != "" && d.OSType != "Linux" {
		return d, fmt.Errorf("%s:%d: ostype %s: only Linux guests are understood: %w", d.File, d.Line, d.OSType, errors.ErrUnsupported)
	}
	return d, nil
}

// Live reports whether the guest is a running one, not a saved image.
func (g *Guest) Live() bool {
	_, ok := g.target.(target.Holder)
	return ok
}

// Freeze has a running guest stand still until the Thaw that belongs to it, so that all
// that is read meanwhile is of one moment. Calls nest, and Close ends them. If the
// process dies without either the guest stands still for good: then xl unpause, or for a
// QEMU guest any program that opens it, lets it go. A saved image never runs: for it
// Freeze and Thaw do nothing.
func (g *Guest) Freeze() error {
	if h, ok := g.target.(target.Holder); ok {
		return h.Hold()
	}
	return nil
}

// Thaw ends a Freeze. If it fails it may be called again.
func (g *Guest) Thaw() error {
	if h, ok := g.target.(target.Holder); ok {
		return h.LetGo()
	}
	return nil
}

// Close releases the guest's memory. Nothing that came from the Guest may be used
// afterwards.
func (g *Guest) Close() error { return g.target.Close() }

// Name returns the guest's name.
func (g *Guest) Name() string { return g.target.Info().Name }

// Warnings returns what makes the guest's memory less than certain: that an image is cut
// short, for example, or that it has several kernels. Programs should show them; they may
// quote the guest, and are printable.
func (g *Guest) Warnings() []string {
	var all []string
	if w, ok := g.target.(interface{ Warnings() []string }); ok {
		all = w.Warnings()
	}
	for _, r := range g.kernel.Explain() {
		if r.Warning() {
			all = append(all, fmt.Sprintf("%s; %s", r.Found, r.Why))
		}
	}
	return all
}

// Notes returns what is known of the guest not from itself: what was inferred from how
// things in its memory look, and what comes from a file, and what it rests on. Programs
// should show them beside what they print. Types are looked for when they are first
// needed, so it is called after that. The notes are printable ASCII.
func (g *Guest) Notes() []string {
	var all []string
	for _, r := range g.kernel.Explain() {
		if r.Note() {
			all = append(all, strings.Join(strings.Fields(r.String()), " "))
		}
	}
	return all
}

// Err returns why no kernel was found, or nil.
func (g *Guest) Err() error { return g.err }

// Linux returns the guest's kernel, or nil if none was found: see Err.
func (g *Guest) Linux() *linux.Kernel { return g.kernel }

// Symbol returns the address of a symbol of the guest's kernel, or of one of its
// modules: "name", "module:name", or "name@2" for the second of several; "sys_openat"
// may be that of the system call's wrapper, which [linux.Kernel.Lookup] tells. If there
// is none, the error suggests others.
func (g *Guest) Symbol(name string) (uint64, error) {
	if g.kernel == nil {
		return 0, g.err
	}
	s, err := g.kernel.Lookup(name)
	return s.Addr, err
}

// PhysicalSize returns where the guest's physical memory ends, in bytes. There may
// be holes in it, as below 4 GiB.
func (g *Guest) PhysicalSize() (uint64, error) {
	s, ok := g.target.(target.Sized)
	if !ok {
		return 0, fmt.Errorf("size of the guest's memory: %w", errors.ErrUnsupported)
	}
	n, err := s.PhysicalPages()
	return n * paging.PageSize, err
}
