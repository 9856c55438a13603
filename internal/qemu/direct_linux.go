package qemu

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/vmprobes/vmprobes/paging"
)

// sharedRAM is the file of a shared memory backend, mapped.
type sharedRAM struct {
	ram ramMap

	mu     sync.Mutex
	mem    []byte
	users  int
	closed bool
}

// mapRAM maps the file of the guest's memory, or of one region of it, which ram says.
func mapRAM(path string, system ramMap) (_ directRAM, ram ramMap, err error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("the guest's memory: %w", err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, nil, fmt.Errorf("the guest's memory: %w", err)
	}
	size := uint64(st.Size())
	if size>>47 != 0 {
		return nil, nil, fmt.Errorf("%s has %d bytes: this is not memory", path, size)
	}
	if ram, err = system.inFile(size); err != nil {
		return nil, nil, fmt.Errorf("%s: %w", path, err)
	}
	mem, err := unix.Mmap(int(f.Fd()), 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, nil, fmt.Errorf("map %s: %w", path, err)
	}
	return &sharedRAM{ram: ram, mem: mem}, ram, nil
}

func (s *sharedRAM) has(f paging.Frame) bool {
	_, _, ok := s.ram.locate(f)
	return ok
}

func (s *sharedRAM) page(f paging.Frame, _ bool) ([]byte, func(), error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, nil, ErrClosed
	}
	_, off, ok := s.ram.locate(f)
	if !ok || off+paging.PageSize > uint64(len(s.mem)) {
		return nil, nil, fmt.Errorf("frame %#x: %w", uint64(f), ErrNotRAM)
	}
	s.users++
	return s.mem[off : off+paging.PageSize : off+paging.PageSize], s.done, nil
}

func (s *sharedRAM) done() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.users--; s.users == 0 && s.closed {
		s.unmap()
	}
}

func (s *sharedRAM) unmap() error {
	mem := s.mem
	s.mem = nil
	return unix.Munmap(mem)
}

func (s *sharedRAM) write(f paging.Frame, off int, b []byte) error {
	page, release, err := s.page(f, true)
	if err != nil {
		return err
	}
	defer release()
	putWord(page[off:], b)
	return nil
}

func (s *sharedRAM) mapped() bool { return true }

func (s *sharedRAM) close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil
	}
	s.closed = true
	if s.users == 0 {
		return s.unmap()
	}
	return nil
}

// procMem is the memory of the QEMU process.
type procMem struct {
	ram  ramMap
	base map[uint64]uint64 // start of a range to its address in QEMU
	file *os.File
}

// maxDirect bounds the ranges of memory that are read from QEMU's process, since QEMU is
// asked for the address of each.
const maxDirect = 64

func openProcMem(v *VM, pid int) (directRAM, ramMap, error) {
	if pid == 0 {
		var err error
		if pid, err = peer(v.stub.c); err != nil {
			return nil, nil, err
		}
	}
	p := &procMem{base: make(map[uint64]uint64)}
	for _, r := range v.system[:min(len(v.system), maxDirect)] {
		hva, err := v.hostAddress(r.start)
		if err != nil {
			return nil, nil, err
		}
		p.ram = append(p.ram, r)
		p.base[r.start] = hva
	}
	var err error
	if p.file, err = os.OpenFile(fmt.Sprintf("/proc/%d/mem", pid), os.O_RDWR, 0); err != nil {
		return nil, nil, fmt.Errorf("memory of QEMU's process: %w", err)
	}
	return p, p.ram, nil
}

func (p *procMem) has(f paging.Frame) bool {
	_, _, ok := p.ram.locate(f)
	return ok
}

// peer returns the process that listens at the other end of a unix socket.
func peer(c net.Conn) (int, error) {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return 0, errors.New("over TCP QEMU's process can't be found: name it (?pid=PID)")
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var cerr error
	if err := raw.Control(func(fd uintptr) {
		cred, cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return 0, err
	}
	if cerr != nil {
		return 0, fmt.Errorf("QEMU's process: %w", cerr)
	}
	return int(cred.Pid), nil
}

// connections counts the connections, accepted or waiting, to the unix socket
// that is bound to path in this network namespace; 0 if that can't be told.
func connections(path string) int { return sockets(path, "02", "03") }

// listening reports whether somebody listens there.
func listening(path string) bool { return sockets(path, "01") > 0 }

// sockets counts the unix sockets of a path that are in one of some states, as in
// /proc/net/unix (Linux, unix_seq_show in net/unix/af_unix.c): 01 listens, 02 is a
// connection that waits to be accepted, 03 one that has been.
func sockets(path string, states ...string) (n int) {
	f, err := os.Open("/proc/net/unix")
	if err != nil {
		return 0
	}
	defer f.Close()
	const maxSockets = 1 << 20
	in := bufio.NewScanner(f)
	for range maxSockets {
		if !in.Scan() {
			break
		}
		// Num RefCount Protocol Flags Type St Inode Path
		if f := strings.Fields(in.Text()); len(f) >= 8 && slices.Contains(states, f[5]) && strings.HasSuffix(in.Text(), " "+path) {
			n++
		}
	}
	return n
}

// at returns where a frame is in QEMU's address space.
func (p *procMem) at(f paging.Frame) (int64, error) {
	if r, off, ok := p.ram.locate(f); ok {
		return int64(p.base[r.start] + off - r.offset), nil
	}
	return 0, fmt.Errorf("frame %#x: %w", uint64(f), ErrNotRAM)
}

func (p *procMem) page(f paging.Frame, writable bool) ([]byte, func(), error) {
	at, err := p.at(f)
	if err != nil {
		return nil, nil, err
	}
	if writable {
		return nil, nil, fmt.Errorf("frame %#x can be written to with WriteFrame only: %w", uint64(f), os.ErrInvalid)
	}
	page := make([]byte, paging.PageSize)
	if _, err := p.file.ReadAt(page, at); err != nil {
		return nil, nil, fmt.Errorf("frame %#x: %w", uint64(f), err)
	}
	return page, func() {}, nil
}

func (p *procMem) write(f paging.Frame, off int, b []byte) error {
	at, err := p.at(f)
	if err != nil {
		return err
	}
	if _, err := p.file.WriteAt(b, at+int64(off)); err != nil {
		return fmt.Errorf("frame %#x: %w", uint64(f), err)
	}
	return nil
}

func (p *procMem) mapped() bool { return false }

func (p *procMem) close() error { return p.file.Close() }
