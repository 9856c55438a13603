package journal

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// osFile is a file with the lock that its owner holds. The lock goes with the process.
type osFile struct {
	*os.File
	path string
}

func (f osFile) sync() error            { return unix.Fdatasync(int(f.Fd())) }
func (f osFile) truncate(n int64) error { return f.Truncate(n) }

// reserve takes the space that the first n bytes need. Otherwise a full folder would be
// found out by a store to the mapping, for which the kernel kills the process (SIGBUS).
func (f osFile) reserve(n int64) error {
	for {
		switch err := unix.Fallocate(int(f.Fd()), 0, 0, n); err {
		case nil:
			return nil
		case unix.EINTR:
		default:
			return fmt.Errorf("reserve %d bytes for %s: %w", n, f.path, err)
		}
	}
}

func (f osFile) size() (int64, error) {
	st, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return st.Size(), nil
}

func (f osFile) mapShared(n int) ([]byte, error) {
	b, err := unix.Mmap(int(f.Fd()), 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map %s: %w", f.path, err)
	}
	return b, nil
}

func (osFile) unmap(b []byte) error { return unix.Munmap(b) }

func (f osFile) letGo(b []byte) error {
	p, err := unix.MmapPtr(-1, 0, unsafe.Pointer(unsafe.SliceData(b)), uintptr(len(b)), unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_FIXED)
	if err == nil && p != unsafe.Pointer(unsafe.SliceData(b)) {
		err = unix.EFAULT // MAP_FIXED moves nothing (mmap(2))
	}
	if err != nil {
		return fmt.Errorf("let go of %s: %w", f.path, err)
	}
	return nil
}

func (f osFile) forget(off, n int64) {
	// What isn't given back is only space.
	_ = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
}

func (f osFile) remove() error { return os.Remove(f.path) }

// Close gives the lock up, too, which a mapping of the file would keep.
func (f osFile) Close() error {
	err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_UNLCK})
	return errors.Join(err, f.File.Close())
}

// Create makes the journal of a guest in the folder dir, and this process its owner. name
// is the guest's, that no other on this host has. It fails with a *BusyError if another
// process is its owner, or another part of this one, and with ErrHot if there is a
// journal whose owner died: [Open] it first. State is the number of bytes of
// [File.State].
func Create(dir, name string, guest Identity, state int) (*File, error) {
	if err := makeDir(dir); err != nil {
		return nil, err
	}
	path := filepath.Join(dir, fileName(name))
	fl, err := lock(path, unix.O_CREAT)
	if err != nil {
		return nil, err
	}
	if n, err := fl.size(); err != nil || n > 0 {
		if err == nil {
			if _, _, err = readHeader(fl); err == nil {
				err = fmt.Errorf("%w (%s)", ErrHot, path)
			} else if begun(fl, n) {
				err = nil // its owner died before it had changed anything
			} else {
				err = fmt.Errorf("%s: %w", path, err)
			}
		}
		if err != nil {
			return nil, errors.Join(err, fl.Close())
		}
	}
	f, err := create(fl, path, information{guest, self()}, state)
	if err != nil {
		return nil, errors.Join(err, fl.remove(), fl.Close())
	}
	return f, nil
}

// begun reports whether a file was being made when its owner died: the header isn't
// there, and there is nothing else.
func begun(fl osFile, size int64) bool {
	if size > headerSize+maxState {
		return false
	}
	first := make([]byte, len(magic))
	n, err := fl.ReadAt(first, 0)
	return (err == nil || errors.Is(err, io.EOF)) && !slices.ContainsFunc(first[:n], func(c byte) bool { return c != 0 })
}

// Open opens the hot journal at path, and makes this process its owner. It fails with a
// *BusyError if it has one, with fs.ErrNotExist if there is none, and with
// ErrUnreadable.
func Open(path string) (*File, error) {
	if err := checkDir(filepath.Dir(path), os.Geteuid()); err != nil {
		return nil, err
	}
	fl, err := lock(path, 0)
	if err != nil {
		return nil, err
	}
	f, err := open(fl, path)
	if err != nil {
		return nil, errors.Join(err, fl.Close())
	}
	return f, nil
}

// Path returns the name that the guest's journal has in the folder, whether it exists or
// not.
func Path(dir, name string) string { return filepath.Join(dir, fileName(name)) }

// makeDir makes the folder, which is the owner's alone.
func makeDir(dir string) error {
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("make the folder of journals: %w", err)
	}
	return checkDir(dir, os.Geteuid())
}

// checkDir refuses a folder in which somebody else than user euid and root decides what
// the journals are. Root's is in a folder of root's alone; that of a user may be in one
// where anybody can have made it before him (/tmp).
func checkDir(dir string, euid int) error {
	st, err := os.Lstat(dir)
	if err != nil {
		return fmt.Errorf("the folder of journals: %w", err)
	}
	if !st.IsDir() {
		return fmt.Errorf("%s, the folder of journals, isn't a folder", dir)
	}
	// Whoever else may write there could put a journal in that tells us what to write
	// into a guest.
	if mode := st.Mode().Perm(); mode&0o002 != 0 {
		return fmt.Errorf("%s, the folder of journals, may be written by everybody (mode %04o): make it 0700", dir, mode)
	}
	if sys, ok := st.Sys().(*syscall.Stat_t); ok && euid != 0 && sys.Uid != 0 && int(sys.Uid) != euid {
		return fmt.Errorf("%s, the folder of journals, is user %d's, and not this user's: %w", dir, sys.Uid, fs.ErrPermission)
	}
	return nil
}

// lock opens the file and takes its lock.
func lock(path string, flags int) (osFile, error) {
	for {
		fd, err := unix.Open(path, unix.O_RDWR|unix.O_NOFOLLOW|unix.O_CLOEXEC|flags, 0o600)
		if err != nil {
			return osFile{}, &fs.PathError{Op: "open", Path: path, Err: err}
		}
		f := osFile{os.NewFile(uintptr(fd), path), path}
		// The lock belongs to the open file: it goes when the process dies, and a second
		// attempt of the same process fails like anybody's.
		for err = unix.EINTR; err == unix.EINTR; {
			err = unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK})
		}
		switch {
		case err == unix.EAGAIN || err == unix.EACCES:
			busy := &BusyError{Path: path}
			if info, _, err := readHeader(f); err == nil {
				busy.Owner = info.Owner
			}
			return osFile{}, errors.Join(busy, f.Close())
		case err != nil:
			return osFile{}, errors.Join(fmt.Errorf("lock %s: %w", path, err), f.Close())
		}
		// The owner removes the file before it gives the lock up: is it still that one?
		var held, there unix.Stat_t
		if err := unix.Fstat(fd, &held); err != nil {
			return osFile{}, errors.Join(err, f.Close())
		}
		err = unix.Lstat(path, &there)
		if err == nil && held.Ino == there.Ino && held.Dev == there.Dev {
			if held.Mode&unix.S_IFMT != unix.S_IFREG {
				return osFile{}, errors.Join(fmt.Errorf("%s: %w: it isn't a regular file", path, ErrUnreadable), f.Close())
			}
			return f, nil
		}
		if cerr := f.Close(); cerr != nil {
			return osFile{}, cerr
		}
		if err != nil && err != unix.ENOENT {
			return osFile{}, &fs.PathError{Op: "stat", Path: path, Err: err}
		}
	}
}

// An Entry is one journal of a folder.
type Entry struct {
	Path  string
	Guest Identity
	Owner Owner
	Hot   bool  // its owner is dead
	Err   error // why nothing else is known
}

// List returns the journals in the folder. There need be no folder.
func List(dir string) ([]Entry, error) {
	names, err := os.ReadDir(dir)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, nil
		}
		return nil, err
	}
	if err := checkDir(dir, os.Geteuid()); err != nil {
		return nil, err
	}
	var entries []Entry
	for _, n := range names {
		if strings.HasSuffix(n.Name(), suffix) {
			if e, ok := look(filepath.Join(dir, n.Name())); ok {
				entries = append(entries, e)
			}
		}
	}
	return entries, nil
}

// look reads the header of a journal; ok is false if there is none any more, or none yet.
func look(path string) (e Entry, ok bool) {
	e.Path = path
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC|unix.O_NONBLOCK, 0) // it may be a FIFO
	if err != nil {
		e.Err = &fs.PathError{Op: "open", Path: path, Err: err}
		return e, err != unix.ENOENT
	}
	f := osFile{os.NewFile(uintptr(fd), path), path}
	defer f.File.Close()
	info, _, err := readHeader(f)
	if err != nil {
		if n, serr := f.size(); serr == nil && begun(f, n) {
			return e, false
		}
		e.Err = fmt.Errorf("%s: %w", path, err)
	}
	e.Guest, e.Owner = info.Guest, info.Owner
	// To ask who holds the lock doesn't take it.
	l := unix.Flock_t{Type: unix.F_WRLCK}
	if err := unix.FcntlFlock(uintptr(fd), unix.F_OFD_GETLK, &l); err != nil {
		e.Err = errors.Join(e.Err, fmt.Errorf("lock of %s: %w", path, err))
	}
	e.Hot = l.Type == unix.F_UNLCK
	return e, true
}

// self describes this process.
func self() Owner {
	o := Owner{PID: os.Getpid()}
	o.Program, _ = os.Executable()
	o.Start, _ = StartTime(o.PID)
	return o
}

// StartTime returns when a process was started, in clock ticks after boot: field 22 of
// /proc/PID/stat (proc(5)).
func StartTime(pid int) (uint64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	// The second field is the program's name in parentheses, which may have any byte.
	_, rest, _ := strings.Cut(string(b[max(0, strings.LastIndexByte(string(b), ')')):]), " ")
	fields := strings.Fields(rest)
	if len(fields) < 20 {
		return 0, fmt.Errorf("/proc/%d/stat has %d fields", pid, len(fields)+2)
	}
	return strconv.ParseUint(fields[19], 10, 64)
}
