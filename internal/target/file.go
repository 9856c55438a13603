package target

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/vmprobes/vmprobes/image"
	"github.com/vmprobes/vmprobes/internal/sentinel"
	"github.com/vmprobes/vmprobes/linux"
	"github.com/vmprobes/vmprobes/paging"
)

// ErrImage: a saved image can be looked into, but nothing runs in it.
var ErrImage = errors.New("a saved image can't be probed: nothing runs in it")

// fileGuest is a guest's memory in a file.
type fileGuest struct {
	*image.Image
	info Info
}

func openFile(_ context.Context, name string) (Guest, error) {
	path, opts, err := parseFile(strings.TrimPrefix(name, "file:"))
	if err != nil {
		return nil, err
	}
	m, err := image.Open(path, opts)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, sentinel.Say(sentinel.As(err, ErrNotFound), "there is no such file")
	}
	if err != nil {
		// The caller has said the path.
		var pe *fs.PathError
		if errors.As(err, &pe) && pe.Path == path {
			err = pe.Err
		}
		return nil, known(path, err)
	}
	g := &fileGuest{Image: m, info: Info{Name: filepath.Base(path), Kind: HVM}}
	if m.Kind() == image.PV {
		g.info.Kind = PV
	}
	for _, c := range m.CPUs() {
		if !c.Offline {
			g.info.VCPUs++
		}
	}
	return g, nil
}

// parseFile takes options off a path: "?raw" for a flat image whatever it begins with,
// "?hole=pc" and "?hole=q35" for one with the hole below 4 GiB of such a machine of
// QEMU's, "?hole=ADDRESS" for one whose hole begins there, and "?skip=BYTES" for one that
// has something else before its memory.
func parseFile(s string) (path string, opts *image.Options, err error) {
	path, query, _ := strings.Cut(s, "?")
	opts = new(image.Options)
	for _, o := range strings.FieldsFunc(query, func(r rune) bool { return r == '&' }) {
		key, value, _ := strings.Cut(o, "=")
		n, nerr := strconv.ParseUint(value, 0, 63)
		switch {
		case o == "raw":
			opts.Raw = true
		case o == "hole=pc":
			opts.RawHole = image.HolePC
		case o == "hole=q35":
			opts.RawHole = image.HoleQ35
		case key == "hole" && nerr == nil && n > 0 && n < 4<<30 && n%paging.PageSize == 0:
			opts.RawHole = image.HoleAt(n)
		case key == "skip" && nerr == nil:
			opts.RawSkip = n
		default:
			return "", nil, fmt.Errorf("file:%s: option %q: want raw, hole=pc, hole=q35, hole=ADDRESS (of a page below 4 GiB, such as 0xc0000000) or skip=BYTES", s, o)
		}
	}
	return path, opts, nil
}

func (g *fileGuest) Info() Info { return g.info }

func (g *fileGuest) Attach(context.Context, Setup) (Driver, error) { return nil, ErrImage }

// CPUs implements [linux.Machine]. A format without registers has none.
func (g *fileGuest) CPUs() ([]linux.CPU, error) {
	var cpus []linux.CPU
	for _, c := range g.Image.CPUs() {
		if c.Offline || c.Has&image.CR3 == 0 {
			continue
		}
		cpu := linux.CPU{CR0: c.CR0, CR3: c.CR3, CR4: c.CR4, EFER: c.EFER, PV: g.info.Kind == PV}
		for _, t := range c.Traps {
			cpu.Entries = append(cpu.Entries, t.Address)
		}
		if c.SyscallCallback != 0 {
			cpu.Entries = append(cpu.Entries, c.SyscallCallback)
		}
		cpus = append(cpus, cpu)
	}
	return cpus, nil
}

// Ranges implements [linux.Scanner].
func (g *fileGuest) Ranges() iter.Seq2[paging.Frame, uint64] {
	return func(yield func(paging.Frame, uint64) bool) {
		for r := range g.Image.Frames() {
			if !yield(r.First, r.Count) {
				return
			}
		}
	}
}

// PhysicalPages implements [Sized].
func (g *fileGuest) PhysicalPages() (uint64, error) { return g.PhysPages(), nil }

// PhysToMachine returns the machine frame of a page of physical memory.
func (g *fileGuest) PhysToMachine(page uint64) (paging.Frame, error) {
	f, ok := g.Image.PhysToMachine(page)
	if !ok {
		return 0, paging.ErrNoFrame
	}
	return f, nil
}
