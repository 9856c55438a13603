package xenctrl

import (
	"context"
	"errors"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A poller waits in Go's runtime poller until a file descriptor that a C
// library owns is readable.
type poller struct {
	f     *os.File // a duplicate, so that closing it does not pull the original away
	rc    syscall.RawConn
	ready func(fd uintptr) bool

	closed atomic.Bool
}

func newPoller(fd int) (*poller, error) {
	dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, err
	}
	// The flag is of the open file, which the duplicate shares.
	if err := unix.SetNonblock(dup, true); err != nil {
		_ = unix.Close(dup)
		return nil, err
	}
	p := &poller{f: os.NewFile(uintptr(dup), "xen")}
	if p.rc, err = p.f.SyscallConn(); err != nil {
		_ = p.f.Close()
		return nil, err
	}
	p.ready = func(fd uintptr) bool {
		for {
			fds := [1]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
			n, err := unix.Poll(fds[:], 0)
			if err != unix.EINTR {
				return n > 0 || err != nil
			}
		}
	}
	return p, nil
}

// wait returns when the descriptor is readable, or with the error of ctx.
func (p *poller) wait(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if ctx.Done() != nil {
		var interrupted sync.WaitGroup
		interrupted.Add(1)
		stop := context.AfterFunc(ctx, func() {
			_ = p.f.SetReadDeadline(time.Unix(1, 0))
			interrupted.Done()
		})
		defer func() {
			if !stop() {
				interrupted.Wait()
				_ = p.f.SetReadDeadline(time.Time{})
			}
		}()
	}
	err := p.rc.Read(p.ready)
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return ctx.Err()
	case p.closed.Load():
		return ErrClosed
	}
	return err
}

// close makes wait return.
func (p *poller) close() {
	p.closed.Store(true)
	_ = p.f.Close()
}
