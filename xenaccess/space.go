package xenaccess

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/vmprobes/vmprobes/internal/cstring"
	"github.com/vmprobes/vmprobes/internal/target"
	"github.com/vmprobes/vmprobes/paging"
)

// ErrNoTerminator: a string is longer than the limit.
var ErrNoTerminator = cstring.ErrNoTerminator

// ErrNoPhysical: the physical-to-machine map of a PV guest isn't known, without which
// its physical memory can't be found.
var ErrNoPhysical = errors.New("the guest's physical-to-machine map is not known")

// A Space is a way to address a guest's memory. The addresses are virtual ones of
// the kernel or of a process, or physical, or machine addresses.
type Space struct {
	frames paging.Frames
	mem    *paging.Memory
	root   func() paging.Root
	// phys, if not nil, is what makes a page's address a frame: there are no
	// page tables to walk.
	phys func(page uint64) (paging.Frame, error)
	err  error
}

// Kernel returns the kernel's virtual memory.
func (g *Guest) Kernel() Space {
	if g.kernel == nil {
		return Space{err: g.err}
	}
	return Space{frames: g.target, mem: g.kernel.Memory(), root: g.kernel.Root}
}

// User returns the virtual memory of the process with the given id. An access fails
// where a page is absent or swapped out.
func (g *Guest) User(pid int) (Space, error) {
	if g.kernel == nil {
		return Space{}, g.err
	}
	t, err := g.kernel.Process(pid)
	if err != nil {
		return Space{}, err
	}
	root, err := g.kernel.UserRoot(t)
	if err != nil {
		return Space{}, err
	}
	return Space{frames: g.target, mem: g.kernel.Memory(), root: func() paging.Root { return root }}, nil
}

// Machine returns machine memory, which is what the guest's page tables name. For an
// HVM or PVH guest it is its physical memory.
func (g *Guest) Machine() Space {
	return Space{frames: g.target, mem: g.raw, phys: func(page uint64) (paging.Frame, error) { return paging.Frame(page), nil }}
}

// Physical returns the guest's physical memory. That of a running PV guest is found
// through the guest's own physical-to-machine map.
func (g *Guest) Physical() Space {
	if m, ok := g.target.(interface {
		PhysToMachine(page uint64) (paging.Frame, error)
	}); ok {
		return Space{frames: g.target, mem: g.raw, phys: m.PhysToMachine}
	}
	if g.target.Info().Kind != target.PV {
		return g.Machine()
	}
	if g.kernel == nil {
		return Space{err: fmt.Errorf("%w: %w", ErrNoPhysical, g.err)}
	}
	return Space{frames: g.target, mem: g.raw, phys: g.kernel.PhysToMachine}
}

// Read fills b from addr on. n < len(b) if and only if err is not nil; the first n
// bytes have then been read.
func (s Space) Read(addr uint64, b []byte) (n int, err error) {
	if s.err != nil {
		return 0, s.err
	}
	if s.phys == nil {
		return s.mem.Read(s.root(), paging.VAddr(addr), b)
	}
	return s.byPage(addr, b, s.mem.ReadPhys)
}

// Write stores b at addr, whatever the guest's page protection says. n is as in Read.
func (s Space) Write(addr uint64, b []byte) (n int, err error) {
	if s.err != nil {
		return 0, s.err
	}
	if s.phys == nil {
		return s.mem.Write(s.root(), paging.VAddr(addr), b)
	}
	return s.byPage(addr, b, s.mem.WritePhys)
}

func (s Space) byPage(addr uint64, b []byte, do func(paging.PAddr, []byte) (int, error)) (n int, err error) {
	for n < len(b) {
		at := addr + uint64(n)
		if at < addr {
			return n, fmt.Errorf("%#x+%#x: %w", addr, len(b), paging.ErrNoFrame)
		}
		f, err := s.phys(at / paging.PageSize)
		if err != nil {
			return n, err
		}
		off := at % paging.PageSize
		part := b[n:min(len(b), n+int(paging.PageSize-off))]
		k, err := do(paging.PAddr(uint64(f)*paging.PageSize+off), part)
		if n += k; err != nil {
			return n, err
		}
	}
	return n, nil
}

// Uint8 reads a byte.
func (s Space) Uint8(addr uint64) (uint8, error) {
	var b [1]byte
	_, err := s.Read(addr, b[:])
	return b[0], err
}

// Uint16 reads a little-endian word of 16 bits.
func (s Space) Uint16(addr uint64) (uint16, error) {
	var b [2]byte
	_, err := s.Read(addr, b[:])
	return binary.LittleEndian.Uint16(b[:]), err
}

// Uint32 reads a little-endian word of 32 bits.
func (s Space) Uint32(addr uint64) (uint32, error) {
	var b [4]byte
	_, err := s.Read(addr, b[:])
	return binary.LittleEndian.Uint32(b[:]), err
}

// Uint64 reads a little-endian word of 64 bits.
func (s Space) Uint64(addr uint64) (uint64, error) {
	var b [8]byte
	_, err := s.Read(addr, b[:])
	return binary.LittleEndian.Uint64(b[:]), err
}

// ReadString reads a NUL-terminated string. If none of the first limit bytes is a
// NUL, it returns these and an error that wraps ErrNoTerminator; if only the
// beginning can be read, it returns that and the error. The bytes are the guest's:
// quote them before they go to a terminal.
func (s Space) ReadString(addr uint64, limit int) (string, error) {
	str, err := cstring.Read(s.Read, addr, limit)
	if errors.Is(err, ErrNoTerminator) {
		err = fmt.Errorf("xenaccess: string at %#x: %w", addr, err)
	}
	return str, err
}

// Translate returns the frame of an address: a machine frame of a PV guest, a guest
// frame of others. For virtual addresses it also returns what the page tables allow
// there.
func (s Space) Translate(addr uint64) (paging.Translation, error) {
	if s.err != nil {
		return paging.Translation{}, s.err
	}
	if s.phys == nil {
		return s.mem.Translate(s.root(), paging.VAddr(addr))
	}
	f, err := s.phys(addr / paging.PageSize)
	if err != nil {
		return paging.Translation{}, err
	}
	return paging.Translation{Frame: f, Offset: addr % paging.PageSize, Size: paging.PageSize}, nil
}

// Decode reads a value of fixed size, or a slice of such, as [binary.Read] does:
// integers of a stated width, and arrays and structs of them, little-endian and
// without padding.
func (s Space) Decode(addr uint64, v any) error {
	n := binary.Size(v)
	if n < 0 {
		return fmt.Errorf("%T has no fixed size", v)
	}
	b := make([]byte, n)
	if _, err := s.Read(addr, b); err != nil {
		return err
	}
	_, err := binary.Decode(b, binary.LittleEndian, v)
	return err
}

// Page returns the page that holds addr, and where addr is in it. The bytes stay
// valid, and follow the guest's memory where it can be mapped, until release is
// called, which must be done once.
func (s Space) Page(addr uint64) (page []byte, offset int, release func(), err error) {
	t, err := s.Translate(addr)
	if err != nil {
		return nil, 0, nil, err
	}
	page, release, err = s.frames.Page(t.Frame, false)
	return page, int(addr % paging.PageSize), release, err
}
