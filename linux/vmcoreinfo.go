package linux

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
	"strconv"
	"strings"

	"github.com/vmprobes/vmprobes/paging"
)

// A Scanner is a Machine whose physical memory can be searched from end to end.
// Without registers, as in a flat image, that is how the kernel is found.
type Scanner interface {
	Machine
	// Ranges yields runs of frames, in order: the first, and how many.
	Ranges() iter.Seq2[paging.Frame, uint64]
	// VMCoreInfo returns the crash dump information that comes with an image, or
	// nil: it need not be searched for then.
	VMCoreInfo() []byte
}

// vmcoreinfo is what a kernel leaves in memory for tools that read its crash dumps
// (kernel/vmcore_info.c, CONFIG_VMCORE_INFO, CONFIG_CRASH_CORE before 6.9): a
// page of lines, the first of which is OSRELEASE=.
type vmcoreinfo map[string]string

// vmcoreMagic begins the page, and hardly any other page of a guest.
const vmcoreMagic = "OSRELEASE="

// Bounds. Anybody in the guest can write such pages: those that lead to no kernel
// cost a few reads, and the others are searched for symbols. An old kernel's may
// be left by kexec.
const (
	maxVMCoreInfo  = 1 << 16
	maxInfoImages  = maxImages
	maxVMCoreLines = 1 << 9 // 6.12 has 150 or so
)

// findVMCoreInfo finds page tables where there are no registers, by searching memory
// for crash dump information.
func findVMCoreInfo(ctx context.Context, m Scanner) ([]image, error) {
	var images []image
	var errs error
	if info := parseVMCoreInfo(m.VMCoreInfo()); len(info) > 0 {
		found, err := info.image(m, "named in the image's crash dump information")
		if err == nil {
			return found, nil
		}
		errs = err
	}
	found, odd := 0, uint64(0)
	for first, count := range m.Ranges() {
		for f := first; f < first+paging.Frame(count); f++ {
			if f%1024 == 0 && ctx.Err() != nil {
				return nil, context.Cause(ctx)
			}
			page, release, err := m.Page(f, false)
			if err != nil {
				continue // a hole in the image
			}
			var info vmcoreinfo
			if bytes.HasPrefix(page, []byte(vmcoreMagic)) {
				info = parseVMCoreInfo(page)
			} else if i := oddVMCoreInfo(page); i > 0 && odd == 0 {
				odd = uint64(f)*paging.PageSize + uint64(i)
			}
			release()
			if info == nil {
				continue
			}
			if found++; found > maxVMCoreInfo || len(images) >= maxInfoImages {
				return images, fmt.Errorf("too many pages with crash dump information: %w", ErrBadKernel)
			}
			candidates, err := info.image(m, fmt.Sprintf("named in the crash dump information in frame %#x", uint64(f)))
			if err != nil {
				if errs == nil {
					errs = fmt.Errorf("crash dump information in frame %#x: %w", uint64(f), err)
				}
				continue
			}
			for _, img := range candidates {
				if !slices.ContainsFunc(images, img.same) { // not a copy of the page
					images = append(images, img)
				}
			}
		}
	}
	switch {
	case len(images) > 0 || errs != nil:
	case odd != 0:
		shift := odd % paging.PageSize
		errs = fmt.Errorf("crash dump information (vmcoreinfo) lies at %#x, %d bytes into a page, and not at the start of one: the image has something else before its memory, "+
			"such as a header (if that has %d bytes, ?skip=%d behind the name leaves it out), or ranges of memory without the gaps between them, as LiME's format=raw (take it with format=lime): %w",
			odd, shift, shift, shift, ErrBadKernel)
	default:
		errs = errors.New("no crash dump information (vmcoreinfo) in memory")
	}
	return images, errs
}

// oddVMCoreInfo returns where crash dump information begins in a page, if not at its
// start, or 0. The kernel has a copy in a note, behind 24 bytes of header, and programs
// have its beginning in their text; neither counts.
func oddVMCoreInfo(page []byte) int {
	const note = 24
	i := bytes.Index(page, []byte(vmcoreMagic))
	if i <= 0 || i == note || i >= note && bytes.HasPrefix(page[i-note+12:], []byte("VMCOREINFO\x00")) {
		return 0
	}
	lines := bytes.SplitN(page[i:], []byte("\n"), 3)
	if len(lines) < 3 || !bytes.HasPrefix(lines[1], []byte("BUILD-ID=")) && !bytes.HasPrefix(lines[1], []byte("PAGESIZE=")) {
		return 0
	}
	return i
}

// same reports whether two candidates are one kernel.
func (img image) same(other image) bool {
	return img.root == other.root && img.mode == other.mode && slices.Equal(img.ranges, other.ranges)
}

func parseVMCoreInfo(page []byte) vmcoreinfo {
	text, _, _ := bytes.Cut(page, []byte{0})
	v := make(vmcoreinfo)
	for line := range strings.Lines(string(text)) {
		if len(v) == maxVMCoreLines {
			break
		}
		if key, value, ok := strings.Cut(strings.TrimSuffix(line, "\n"), "="); ok {
			v[key] = value
		}
	}
	return v
}

// image follows the page tables that the information names: it has the virtual address
// of swapper_pg_dir, and by how much the kernel's mapping of itself is moved in physical
// memory (phys_base, arch/x86/kernel/head64.c), which may be negative.
func (v vmcoreinfo) image(m Machine, why string) ([]image, error) {
	pgd, err := strconv.ParseUint(v["SYMBOL(swapper_pg_dir)"], 16, 64)
	if err != nil {
		return nil, fmt.Errorf("vmcoreinfo without SYMBOL(swapper_pg_dir): %w", err)
	}
	mode := paging.Mode{Kind: paging.FourLevel, NXE: true}
	var phys int64
	switch {
	case pgd < 1<<32: // a kernel of 32 bits
		mode.Kind = paging.PAE
		if v["CONFIG_X86_PAE"] != "y" {
			mode = paging.Mode{Kind: paging.TwoLevel, PSE: true}
		}
		pgd -= window32
	default:
		if phys, err = strconv.ParseInt(v["NUMBER(phys_base)"], 10, 64); err != nil {
			return nil, fmt.Errorf("vmcoreinfo without NUMBER(phys_base): %w", err)
		}
		if v["NUMBER(pgtable_l5_enabled)"] == "1" {
			mode.Kind = paging.FiveLevel
		}
		pgd -= window64
	}
	return image{mode: mode, mem: paging.New(m, mode), root: paging.Root(pgd + uint64(phys)), why: why}.find()
}
