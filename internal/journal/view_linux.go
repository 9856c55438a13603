package journal

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// A View is a journal that another process owns, as it is at the moment.
type View struct {
	f  *File
	fl viewed
}

// viewed is a file that is only read. It has no lock.
type viewed struct{ osFile }

func (f viewed) mapShared(n int) ([]byte, error) {
	b, err := unix.Mmap(int(f.Fd()), 0, n, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map %s: %w", f.path, err)
	}
	return b, nil
}

// Look opens the journal at path to read it while its owner writes to it.
func Look(path string) (*View, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	fl := viewed{osFile{os.NewFile(uintptr(fd), path), path}}
	f, err := open(fl, path)
	if err != nil {
		return nil, errors.Join(err, fl.File.Close())
	}
	return &View{f, fl}, nil
}

// Guest returns whose journal it is.
func (v *View) Guest() Identity { return v.f.Guest() }

// Owner returns the process that made the journal.
func (v *View) Owner() Owner { return v.f.Owner() }

// State returns the memory in which the owner writes down what changes at every hit. It
// can't be stored to.
func (v *View) State() []byte { return v.f.State() }

// Size returns how many bytes the log had when somebody looked last.
func (v *View) Size() int64 { return v.f.Size() }

// Path returns the file's name.
func (v *View) Path() string { return v.f.path }

// Records calls fn with each record of the log, as [File.Records] does. It fails with
// ErrUnreadable if the owner makes the log shorter meanwhile.
func (v *View) Records(fn func(Record) error) error { return v.f.Records(fn) }

// Removed reports whether the journal has been removed: its owner has left the guest.
func (v *View) Removed() bool {
	var st unix.Stat_t
	return unix.Fstat(int(v.fl.Fd()), &st) == nil && st.Nlink == 0
}

// Close ends the view.
func (v *View) Close() error { return errors.Join(unix.Munmap(v.f.m), v.fl.File.Close()) }
