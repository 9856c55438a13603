package qemu

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/vmprobes/vmprobes/paging"
)

// directRAM is the guest's memory, or some of it, without the stub: nothing has to stop
// for it.
type directRAM interface {
	has(f paging.Frame) bool
	page(f paging.Frame, writable bool) ([]byte, func(), error)
	write(f paging.Frame, off int, b []byte) error
	mapped() bool // a page costs no system call
	close() error
}

// openDirect opens what the options ask for, or returns nil. v.mu is held, and
// the VM stopped.
func openDirect(v *VM, opts *Options) (directRAM, error) {
	if opts.RAM == "" && !opts.ProcMem {
		return nil, nil
	}
	if opts.RAM != "" && opts.ProcMem {
		return nil, errors.New("the guest's memory is either in a file (ram=) or in a process (pid=)")
	}
	if len(v.system) == 0 {
		return nil, errors.New("QEMU doesn't say where the guest's memory is (info mtree -f): leave ram= and pid= out of the name")
	}
	var d directRAM
	var ram ramMap // what d has of it
	var err error
	if opts.RAM != "" {
		d, ram, err = mapRAM(opts.RAM, v.system)
	} else {
		d, ram, err = openProcMem(v, opts.PID)
	}
	if err != nil {
		return nil, err
	}
	if err := v.compare(d, ram); err != nil {
		return nil, errors.Join(err, d.close())
	}
	v.whole = ram.size() == v.system.size()
	return d, nil
}

// reaches reports whether a frame can be had without the stub. What can't is read and
// written through it.
func (v *VM) reaches(f paging.Frame) bool { return v.direct != nil && v.direct.has(f) }

// compare checks that d is the memory of this VM, by some pages all over it.
func (v *VM) compare(d directRAM, ram ramMap) error {
	var want [paging.PageSize]byte
	compared := 0
	for _, r := range ram {
		size := r.end - r.start + 1
		for i := range uint64(16) {
			addr := (r.start + size/16*i) &^ (paging.PageSize - 1)
			if addr < r.start || r.end-addr < paging.PageSize-1 {
				continue
			}
			if err := v.readPhys(addr, want[:]); err != nil {
				return err
			}
			page, release, err := d.page(paging.Frame(addr>>12), false)
			if err != nil {
				return err
			}
			same := bytes.Equal(page, want[:])
			release()
			if !same {
				return fmt.Errorf("this is not the memory of the VM: physical address %#x differs", addr)
			}
			compared++
		}
	}
	v.log.Debug("direct access to the guest's memory", "pages compared", compared)
	return nil
}

// hostAddress asks where in QEMU's address space a physical address is.
func (v *VM) hostAddress(addr uint64) (uint64, error) {
	text, err := v.hmp(fmt.Sprintf("gpa2hva %#x", addr))
	if err != nil {
		return 0, err
	}
	// "Host virtual address for 0x0 (pc.ram) is 0x7fcfd7e00000"
	_, s, ok := strings.Cut(text, ") is 0x")
	hva, err := strconv.ParseUint(strings.TrimSpace(s), 16, 64)
	if !ok || err != nil || hva == 0 {
		return 0, fmt.Errorf("QEMU doesn't say where it keeps the guest's memory: gpa2hva gives %.100q", text)
	}
	return hva, nil
}

// putWord stores b in one piece if it is an aligned word.
func putWord(dst, b []byte) {
	switch len(b) {
	case 8:
		binary.NativeEndian.PutUint64(dst, binary.NativeEndian.Uint64(b))
	case 4:
		binary.NativeEndian.PutUint32(dst, binary.NativeEndian.Uint32(b))
	default:
		copy(dst, b)
	}
}
