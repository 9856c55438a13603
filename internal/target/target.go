// Package target finds a guest by its name, whatever hypervisor it runs under,
// and shows it in the two ways that the packages above need: as memory and
// registers, which changes nothing, and as a driver for breakpoints.
package target

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/linux"
	"github.com/vmprobes/vmprobes/paging"
)

// Errors of Open.
var (
	ErrNoName        = errors.New("the domain has no name")
	ErrNotFound      = fmt.Errorf("no such domain: %w", fs.ErrNotExist)
	ErrControlDomain = errors.New("domain 0 can't be looked into: this program runs in it")
	ErrPaused        = errors.New("the domain is paused: if you have paused it, unpause it first (xl unpause); " +
		"if a tool that had probes in it was killed, leave it so, as a PV guest would run on behind a breakpoint and die")
	ErrNotRoot = fmt.Errorf("only root may look into a guest: %w", fs.ErrPermission)
)

// Kind is how a guest is virtualized.
type Kind uint8

// Kinds.
const (
	PV Kind = iota + 1
	HVM
	PVH
)

// Info describes a guest.
type Info struct {
	ID     uint16 // Xen's domain id
	Name   string // that no other guest of this host has
	Given  string // name that its configuration gives it, if that is another one
	Kind   Kind
	VCPUs  int    // online
	Kernel string // file, on this machine, that the toolstack booted it from, or ""
}

// A Guest is an opened guest. Nothing has been changed in it.
type Guest interface {
	linux.Machine
	Info() Info
	// Attach prepares the guest for breakpoints. The driver is closed before the
	// Guest.
	Attach(ctx context.Context) (Driver, error)
	Close() error
}

// A Driver is a breakpoint driver with what a Session needs besides.
type Driver interface {
	breakpoint.Driver
	Translate(addr uint64) (paging.Translation, error)
	SetKernelRoot(paging.Root)
	// Write writes in spite of the guest's page protection, with the page tables
	// of cr3, or with the kernel's own if that is 0.
	Write(cr3, addr uint64, b []byte) error
}

// A Freezer is a guest that does better if it stands still while much of its
// memory is read. Calls nest.
type Freezer interface {
	Freeze() error
	Thaw() error
}

// Sized is implemented by guests that know how large their physical memory is.
type Sized interface {
	// PhysicalPages returns the number of the last page of physical memory, plus
	// one. There may be holes below it.
	PhysicalPages() (uint64, error)
}

// Identified is implemented by drivers of guests that may be reset under a probe.
type Identified interface {
	// SetIdentity names bytes that tell the guest's kernel from any other.
	SetIdentity(addr uint64, b []byte) error
}

// Symbolic is implemented by drivers that work better when they know where the
// kernel keeps certain things. lookup returns the address of a symbol.
type Symbolic interface {
	UseSymbols(lookup func(name string) (addr uint64, ok bool))
}

// schemes are the prefixes of names, as in "xen:a3guest", with what opens such a
// guest by the whole name.
var schemes = map[string]func(ctx context.Context, name string) (Guest, error){
	"xen":          openXen,
	"file":         openFile,
	"qemu":         openQEMU,
	"qemu+monitor": openQEMU,
}

// Open opens the guest that name stands for: "scheme:name", or just the name or
// the numeric id of a Xen domain.
func Open(ctx context.Context, name string) (Guest, error) {
	if name == "" {
		return nil, ErrNoName
	}
	if err := ctx.Err(); err != nil {
		return nil, context.Cause(ctx)
	}
	scheme, rest, ok := strings.Cut(name, ":")
	open := schemes[scheme]
	switch {
	case !ok || open == nil:
		return openXen(ctx, name)
	case rest == "":
		return nil, ErrNoName
	}
	return open(ctx, name)
}
