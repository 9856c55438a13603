package qemu

import (
	"errors"
	"fmt"
	"time"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/paging"
)

// ErrNotRAM says that a frame isn't memory of the guest: nothing is there, or a
// device, and to read a device changes it.
var ErrNotRAM = errors.New("not the guest's memory")

// maxPages bounds the copies of pages that are kept while the VM is stopped.
const maxPages = 4096

// Page implements [paging.Frames]. Without direct access to the guest's RAM (see
// [Options]) the page is a copy, which doesn't follow the guest's memory and
// can't be had as writable: use WriteFrame.
func (v *VM) Page(f paging.Frame, writable bool) (page []byte, release func(), err error) {
	if v.reaches(f) {
		return v.direct.page(f, writable)
	}
	if writable {
		return nil, nil, fmt.Errorf("frame %#x can be written to with WriteFrame only: %w", uint64(f), errors.ErrUnsupported)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if page = v.pages[f]; page == nil {
		if err := v.hole(uint64(f)<<12, paging.PageSize); err != nil {
			return nil, nil, err // for which the VM needn't stop
		}
		page = make([]byte, paging.PageSize)
		err = v.held(func() error { return errors.Join(v.readPhys(uint64(f)<<12, page), v.linger()) })
		if err != nil {
			return nil, nil, err
		}
	}
	// While the VM runs a copy would soon be stale.
	if !v.running {
		if len(v.pages) >= maxPages {
			clear(v.pages)
		}
		v.pages[f] = page
	}
	return page, func() {}, nil
}

// WriteFrame stores b at offset off of a frame.
func (v *VM) WriteFrame(f paging.Frame, off int, b []byte) error {
	if off < 0 || off+len(b) > paging.PageSize {
		return fmt.Errorf("%d bytes at offset %d of a frame", len(b), off)
	}
	if v.reaches(f) {
		return v.direct.write(f, off, b)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if err := v.hole(uint64(f)<<12+uint64(off), len(b)); err != nil {
		return err
	}
	return v.held(func() error {
		delete(v.pages, f)
		return v.writePhys(uint64(f)<<12+uint64(off), b)
	})
}

// physical switches PhyMemMode; v.mu is held, and the VM stopped.
func (v *VM) physical(on int) error {
	if v.physNow == on {
		return nil
	}
	if !v.phys {
		if on == 0 {
			return nil
		}
		return fmt.Errorf("this QEMU's gdbstub can't read physical memory (QEMU 4.2 and later can): %w", errors.ErrUnsupported)
	}
	v.physNow = -1
	if err := v.callOK(fmt.Sprintf("Qqemu.PhyMemMode:%d", on)); err != nil {
		return err
	}
	v.physNow = on
	return nil
}

// readPhys reads guest-physical memory; v.mu is held, and the VM stopped.
func (v *VM) readPhys(addr uint64, b []byte) error {
	if err := v.checkRAM(addr, len(b)); err != nil {
		return err
	}
	if err := v.physical(1); err != nil {
		return err
	}
	return v.readMem(addr, b)
}

// ramEvery is how often the map of the guest's memory is read anew, at most,
// because an address isn't in it: memory can be plugged in.
const ramEvery = time.Second

// hole fails if n bytes at addr, all in one frame, aren't memory as far as is known, and
// it is too early to read the map anew.
func (v *VM) hole(addr uint64, n int) error {
	if v.ram.contains(addr, n) || time.Since(v.ramAt) >= ramEvery {
		return nil
	}
	return fmt.Errorf("physical address %#x: %w", addr, ErrNotRAM)
}

// checkRAM makes sure that n bytes at addr, all in one frame, are memory.
func (v *VM) checkRAM(addr uint64, n int) error {
	if v.ram.contains(addr, n) {
		return nil
	}
	if err := v.hole(addr, n); err != nil {
		return err
	}
	v.ramAt = time.Now()
	tree, err := v.hmp("info mtree -f")
	if err != nil {
		return err
	}
	if ram := parseRAM(tree); len(ram) > 0 {
		v.ram = ram
	}
	return v.hole(addr, n)
}

func (v *VM) writePhys(addr uint64, b []byte) error {
	if err := v.checkRAM(addr, len(b)); err != nil {
		return err
	}
	if err := v.physical(1); err != nil {
		return err
	}
	for len(b) > 0 {
		n := min(len(b), v.mread/2)
		p := fmt.Appendf(nil, "M%x,%x:", addr, n)
		if err := v.callOK(string(appendHex(p, b[:n]))); err != nil {
			return err
		}
		addr, b = addr+uint64(n), b[n:]
	}
	return nil
}

// readVirt reads memory as the thread sees it.
func (v *VM) readVirt(thread string, addr uint64, b []byte) error {
	if err := v.physical(0); err != nil {
		return err
	}
	if err := v.choose(thread); err != nil {
		return err
	}
	return v.readMem(addr, b)
}

// readMem reads with "m" packets, which are sent together: the stub answers them
// in turn.
func (v *VM) readMem(addr uint64, b []byte) error {
	const together = 8
	for len(b) > 0 {
		var packets []string
		var parts [][]byte
		for len(b) > 0 && len(packets) < together {
			n := min(len(b), v.mread)
			packets = append(packets, fmt.Sprintf("m%x,%x", addr, n))
			parts = append(parts, b[:n])
			addr, b = addr+uint64(n), b[n:]
		}
		if err := v.post(packets...); err != nil {
			return err
		}
		var errs error
		for i, part := range parts {
			data, err := v.receive()
			if err != nil {
				return err
			}
			if errs == nil {
				errs = memory(part, packets[i], data)
			}
		}
		if errs != nil {
			return errs
		}
	}
	return nil
}

// memory takes the answer to an "m" packet.
func memory(b []byte, packet string, data []byte) error {
	if len(data) == 0 || data[0] == 'E' && len(data) == 3 {
		return fmt.Errorf("%w: %w", breakpoint.ErrNotMapped, &refused{packet, string(data)})
	}
	return decodeHex(b, data)
}
