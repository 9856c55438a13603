package xenctrl

import (
	"context"
	"errors"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/vmprobes/vmprobes/internal/spin"
)

// A poller waits until a file descriptor that a C library owns is readable, in
// one of two ways.
//
// While events come one after the other it polls the descriptor in a system call
// that Go's scheduler isn't told of. To tell it costs more than all the rest: the
// runtime's monitor takes the processor (P) from a goroutine that is in a system
// call for 20 µs, and is itself awake every 20 µs from then on. But the goroutine
// keeps its P meanwhile, so such a poll lasts hotPoll at the most. The signal by
// which the runtime asks a goroutine to stop, for a garbage collection say, ends
// it sooner.
//
// When none has come for hotPoll it waits in Go's own poller, as other
// descriptors do, and costs nothing.
type poller struct {
	fd int // a duplicate, so that closing it does not pull the original away

	// Go's poller watches an epoll descriptor of our own, which has fd in it only
	// while somebody waits there: else each event would wake the thread in Go's
	// poller, too.
	f     *os.File
	rc    syscall.RawConn
	ready func(ep uintptr) bool

	closed atomic.Bool

	// Of the goroutine in wait.
	fds    [1]unix.PollFd
	left   unix.Timespec
	canHot bool // the first way is allowed
	hot    bool // and in use
	holder spin.Holder
	err    error // of ready

	// What ends the wait in Go's poller: it stays from one wait to the next.
	done        <-chan struct{}
	stop        func() bool
	interrupted sync.WaitGroup
}

// hotPoll is how long an event may stay away before the wait becomes an ordinary
// one. It also bounds how late the end of a context is noticed.
const hotPoll = 2 * time.Millisecond

// newPoller returns a poller of fd. hot allows the first way.
func newPoller(fd int, hot bool) (*poller, error) {
	dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, err
	}
	// The flag is of the open file, which the duplicate shares.
	if err := unix.SetNonblock(dup, true); err != nil {
		_ = unix.Close(dup)
		return nil, err
	}
	ep, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		_ = unix.Close(dup)
		return nil, err
	}
	if err := unix.SetNonblock(ep, true); err != nil {
		_ = unix.Close(dup)
		_ = unix.Close(ep)
		return nil, err
	}
	p := &poller{fd: dup, f: os.NewFile(uintptr(ep), "xen"), canHot: hot}
	p.fds[0] = unix.PollFd{Fd: int32(dup), Events: unix.POLLIN}
	if p.rc, err = p.f.SyscallConn(); err != nil {
		_ = p.f.Close()
		_ = unix.Close(dup)
		return nil, err
	}
	p.ready = func(uintptr) bool {
		var ok bool
		ok, p.err = p.poll(0)
		return ok || p.err != nil
	}
	return p, nil
}

// poll is one ppoll(2), and false if it was interrupted or d has passed.
func (p *poller) poll(d time.Duration) (bool, error) {
	p.left = unix.NsecToTimespec(int64(d)) // the kernel writes here what is left of it
	n, _, e := syscall.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&p.fds)), 1, uintptr(unsafe.Pointer(&p.left)), 0, 0, 0)
	switch {
	case e == unix.EINTR:
		return false, nil
	case e != 0:
		return false, e
	}
	return n > 0, nil
}

// wait returns when the descriptor is readable, or with the error of ctx.
func (p *poller) wait(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if p.closed.Load() {
		return ErrClosed
	}
	if p.hot {
		p.holder.Begin(spin.Clock())
		ok, err := p.poll(hotPoll)
		p.holder.End()
		if ok || err != nil {
			return err
		}
		p.hot = false
		if err := ctx.Err(); err != nil {
			return err
		}
	}
	begin := spin.Clock()
	if err := p.waitLong(ctx); err != nil {
		return err
	}
	p.hot = p.canHot && spin.Clock()-begin < hotPoll
	return nil
}

// waitLong waits in Go's poller.
func (p *poller) waitLong(ctx context.Context) error {
	p.watch(ctx)
	if err := p.epoll(unix.EPOLL_CTL_ADD); err != nil {
		return err
	}
	defer func() { _ = p.epoll(unix.EPOLL_CTL_DEL) }()
	err := p.rc.Read(p.ready)
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return ctx.Err()
	case p.closed.Load():
		return ErrClosed
	case err == nil:
		err = p.err
	}
	return err
}

func (p *poller) epoll(op int) (err error) {
	e := p.rc.Control(func(ep uintptr) {
		err = unix.EpollCtl(int(ep), op, p.fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(p.fd)})
	})
	switch {
	case p.closed.Load():
		return ErrClosed
	case e != nil:
		return e
	}
	return err
}

// watch makes the end of ctx end the wait in Go's poller.
func (p *poller) watch(ctx context.Context) {
	done := ctx.Done()
	if done == p.done {
		return
	}
	p.unwatch()
	if done == nil {
		return
	}
	p.done = done
	p.interrupted.Add(1)
	p.stop = context.AfterFunc(ctx, func() {
		_ = p.f.SetReadDeadline(time.Unix(1, 0))
		p.interrupted.Done()
	})
}

func (p *poller) unwatch() {
	if p.done == nil {
		return
	}
	if p.stop() {
		p.interrupted.Done()
	} else {
		p.interrupted.Wait()
		_ = p.f.SetReadDeadline(time.Time{})
	}
	p.done, p.stop = nil, nil
}

// interrupt makes wait return ErrClosed, now and later.
func (p *poller) interrupt() {
	p.closed.Store(true)
	_ = p.f.Close()
}

// close ends what interrupt began, when wait has returned.
func (p *poller) close() {
	p.unwatch()
	_ = unix.Close(p.fd)
}
