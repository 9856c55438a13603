package target

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/vmprobes/vmprobes/internal/xen"
)

// lockDomain takes the lock of a domain, and returns what gives it back. It fails
// with ErrBusy if another tool, or another Session of this one, has it: two that
// attach to a PV guest at once would both succeed, and each take half of the events.
// The lock goes with the process that has it.
func lockDomain(id uint16) (release func() error, err error) {
	if err := os.Mkdir(lockDir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, fmt.Errorf("lock the domain: %w", err)
	}
	name := filepath.Join(lockDir, fmt.Sprintf("domain-%d.lock", id))
	// To read is enough for a lock. Only who may enter the folder can do it.
	fd, err := unix.Open(name, unix.O_RDONLY|unix.O_CREAT|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return nil, fmt.Errorf("lock the domain: open %s: %w", name, err)
	}
	for err = unix.EINTR; err == unix.EINTR; {
		err = unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)
	}
	if err != nil {
		unix.Close(fd)
		if err == unix.EWOULDBLOCK {
			return nil, fmt.Errorf("%w (it holds %s)", xen.ErrBusy, name)
		}
		return nil, fmt.Errorf("lock %s: %w", name, err)
	}
	return func() error { return unix.Close(fd) }, nil
}
