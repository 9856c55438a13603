package linux

import (
	"context"
	"fmt"

	"github.com/vmprobes/vmprobes/paging"
	"github.com/vmprobes/vmprobes/sysmap"
)

// Memory without registers and without crash dump information (a kernel without
// CONFIG_VMCORE_INFO, as OpenWrt's) shows where the kernel is by its version string, if
// the kernel's symbols are known: the image lies in one piece in physical memory, so that
// its page tables are as far from the string as the symbols say.

const (
	maxBannersFound = 1 << 12 // places of version strings in memory
	maxReleases     = 4       // kernels for whose files is asked
)

// found is a version string in physical memory.
type foundBanner struct {
	phys uint64
	line string
}

// findBySymbols finds page tables by the symbols that were given, or those of files.
func findBySymbols(ctx context.Context, m Scanner, opts *Options) ([]image, error) {
	banners, err := findBanners(ctx, m)
	if err != nil {
		return nil, err
	}
	if len(banners) == 0 {
		return nil, nil // nor is there anything to say
	}
	var images []image
	try := func(syms *sysmap.Map, whose string) {
		for _, b := range banners {
			if want := syms.Banner(); want != "" && want != b.line || len(images) >= maxInfoImages {
				continue
			}
			images = append(images, imageAt(m, syms, b.phys, whose)...)
		}
	}
	if opts.Symbols != nil {
		try(opts.Symbols, "the symbols that were given")
	} else {
		asked := make(map[string]bool)
		for _, b := range banners {
			rel := safeRelease(release(b.line))
			if asked[rel] || len(asked) == maxReleases {
				continue
			}
			asked[rel] = true
			for i, path := range opts.SymbolFiles(rel) {
				if err := done(ctx); err != nil {
					return nil, err
				}
				if i == maxSymbolFiles || len(images) > 0 {
					break
				}
				if syms, err := sysmap.ParseFile(path); err == nil {
					try(syms, path)
				}
			}
		}
	}
	if len(images) == 0 {
		return nil, fmt.Errorf("none of %d version strings of kernels in memory, such as %q, belongs to page tables that symbols name (give its vmlinux, vmlinuz or System.map)",
			len(banners), printable(banners[0].line))
	}
	return images, nil
}

// findBanners searches all memory for version strings.
func findBanners(ctx context.Context, m Scanner) ([]foundBanner, error) {
	var banners []foundBanner
	var buf [maxBanner + paging.PageSize]byte // the end of the page before, and a page
	for first, count := range m.Ranges() {
		kept := 0 // bytes of it
		for f := first; f < first+paging.Frame(count); f++ {
			if f%1024 == 0 && ctx.Err() != nil {
				return nil, context.Cause(ctx)
			}
			page, release, err := m.Page(f, false)
			if err != nil {
				kept = 0
				continue
			}
			n := kept + copy(buf[kept:], page)
			release()
			at := uint64(f)*paging.PageSize - uint64(kept)
			for b := buf[:n]; ; {
				i, line := sysmap.VersionString(b)
				if i < 0 {
					break
				}
				// One that ended in what was kept has been found before.
				if i+len(line) >= kept-(n-len(b)) {
					if len(banners) == maxBannersFound {
						return banners, nil
					}
					banners = append(banners, foundBanner{at + uint64(n-len(b)+i), line})
				}
				b = b[i+len(line):]
			}
			kept = copy(buf[:maxBanner], buf[max(0, n-maxBanner):n])
		}
	}
	return banners, nil
}

// imageAt follows the page tables of a kernel whose version string is at phys, if symbols
// are its own.
func imageAt(m Machine, syms *sysmap.Map, phys uint64, whose string) (images []image) {
	banner, err := syms.Lookup(bannerSymbol)
	if err != nil {
		return nil
	}
	text, err := syms.Lookup("_text")
	if err != nil {
		return nil
	}
	modes := []paging.Mode{{Kind: paging.FourLevel, NXE: true}, {Kind: paging.FiveLevel, NXE: true}}
	if banner.Addr < 1<<32 {
		modes = []paging.Mode{{Kind: paging.PAE, NXE: true}, {Kind: paging.TwoLevel, PSE: true}}
	}
	for _, name := range ownRoots {
		pgd, err := syms.Lookup(name)
		if err != nil {
			continue
		}
		root := phys + pgd.Addr - banner.Addr
		if root%paging.PageSize != 0 {
			continue
		}
		for _, mode := range modes {
			found, err := image{
				mode: mode, mem: paging.New(m, mode), root: paging.Root(root),
				why: fmt.Sprintf("%s, as %s says, of the kernel whose version string is at %#x", name, whose, phys),
			}.find()
			if err != nil {
				continue
			}
			for _, img := range found {
				// They must map the string where it was found.
				va := paging.VAddr(banner.Addr + img.ranges[0].Addr - text.Addr)
				if t, err := img.mem.Translate(img.root, va); err == nil && uint64(t.Phys()) == phys {
					images = append(images, img)
				}
			}
		}
	}
	return images
}
