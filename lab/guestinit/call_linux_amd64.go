package main

import (
	"bytes"
	"fmt"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Calls whose way through the kernel, and whose results, are known: for probes at returns.

// onWorkers has each of the workers a command names do a job, and returns how many did.
func (g *guest) onWorkers(which string, job func(*worker)) (int, error) {
	if g.running.Load() != 0 {
		return 0, fmt.Errorf("busy is still running")
	}
	workers, err := g.workers(which)
	if err != nil {
		return 0, err
	}
	var jobs sync.WaitGroup
	for _, w := range workers {
		jobs.Add(1)
		w.jobs <- func() {
			defer jobs.Done()
			job(w)
		}
	}
	jobs.Wait()
	return len(workers), nil
}

// reads makes n rounds of calls.
func (g *guest) reads(n uint64, which string) (string, error) {
	var wrong atomic.Uint64
	workers, err := g.onWorkers(which, func(*worker) {
		// With a table of its own a thread gets the same descriptor each time.
		if err := unix.Unshare(unix.CLONE_FILES); err != nil {
			wrong.Add(n)
			return
		}
		there, missing := append([]byte(target), 0), []byte("/no-such-file\x00")
		var buf [64]byte
		read := func(fd, n int) (int, unix.Errno) {
			r, _, errno := unix.RawSyscall(unix.SYS_READ, uintptr(fd), uintptr(unsafe.Pointer(&buf)), uintptr(n))
			return int(r), errno
		}
		for range n {
			fd, errno := openat(&there[0])
			ok := errno == 0
			for _, want := range []struct{ n, got int }{{1, 1}, {7, 7}, {len(buf), len(targetText) - 8}, {len(buf), 0}} {
				got, errno := read(fd, want.n)
				ok = ok && errno == 0 && got == want.got
			}
			_, _, errno = unix.RawSyscall(unix.SYS_CLOSE, uintptr(fd), 0, 0)
			ok = ok && errno == 0
			_, errno = read(fd, 1)
			ok = ok && errno == unix.EBADF
			_, errno = openat(&missing[0])
			if ok = ok && errno == unix.ENOENT; !ok {
				wrong.Add(1)
			}
		}
	})
	if err != nil {
		return "", fmt.Errorf("reads: %w", err)
	}
	return fmt.Sprintf("reads rounds=%d wrong=%d", n*uint64(workers), wrong.Load()), nil
}

// chain is how many epoll instances recurse has. The kernel allows five (EP_MAX_NESTS,
// fs/eventpoll.c).
const chain = 5

// recurse writes to an eventfd, n times, that an epoll instance watches, which another one
// watches, and so on: each of their callbacks (ep_poll_callback) calls the next one.
func (g *guest) recurse(n uint64, which string) (string, error) {
	var failed atomic.Pointer[error]
	workers, err := g.onWorkers(which, func(*worker) {
		if err := wakeChain(n); err != nil {
			failed.Store(&err)
		}
	})
	if bad := failed.Load(); err == nil && bad != nil {
		err = *bad
	}
	if err != nil {
		return "", fmt.Errorf("recurse: %w", err)
	}
	return fmt.Sprintf("recurse times=%d depth=%d", n*uint64(workers), chain), nil
}

func wakeChain(n uint64) error {
	event, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(event) }()
	watched := event
	for range chain {
		e, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
		if err != nil {
			return err
		}
		defer func() { _ = unix.Close(e) }()
		if err := unix.EpollCtl(e, unix.EPOLL_CTL_ADD, watched, &unix.EpollEvent{Events: unix.EPOLLIN}); err != nil {
			return err
		}
		watched = e
	}
	word := endian.AppendUint64(nil, 1)
	for range n {
		if _, err := unix.Write(event, word); err != nil {
			return err
		}
	}
	return nil
}

// block has n threads in a system call, and has them wait so long when all of them are.
func block(n uint64, d time.Duration) (string, error) {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		return "", err
	}
	defer func() { _, _ = unix.Close(p[0]), unix.Close(p[1]) }()
	var jobs sync.WaitGroup
	var returned atomic.Uint64
	threads := make([]atomic.Int64, n)
	for i := range threads {
		jobs.Go(func() {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			threads[i].Store(int64(unix.Gettid()))
			var b [1]byte
			got, err := unix.Read(p[0], b[:])
			for err == unix.EINTR {
				got, err = unix.Read(p[0], b[:])
			}
			if got == 1 && err == nil {
				returned.Add(1)
			}
		})
	}
	blocked := 0
	for end := time.Now().Add(time.Minute); blocked < len(threads) && time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		blocked = 0
		for i := range threads {
			if thread := threads[i].Load(); thread != 0 && asleep(int(thread)) {
				blocked++
			}
		}
	}
	time.Sleep(d)
	if _, err := unix.Write(p[1], make([]byte, n)); err != nil {
		return "", err
	}
	jobs.Wait()
	if blocked < len(threads) {
		return "", fmt.Errorf("block: %d of %d threads are blocked", blocked, n)
	}
	return fmt.Sprintf("block threads=%d returned=%d", n, returned.Load()), nil
}

// blockKill kills n processes in a system call that would never end.
func blockKill(n uint64) (string, error) {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		return "", err
	}
	defer func() { _, _ = unix.Close(p[0]), unix.Close(p[1]) }()
	var pids []int
	var bad error
	for range n {
		pid := forkRead(uint64(p[0]))
		if pid < 0 {
			bad = fmt.Errorf("blockkill: fork: %w", unix.Errno(-pid))
			break
		}
		pids = append(pids, pid)
	}
	for end := time.Now().Add(time.Minute); len(pids) > 0 && bad == nil; {
		sleeping := 0
		for _, pid := range pids {
			if asleep(pid) {
				sleeping++
			}
		}
		if sleeping == len(pids) {
			break
		}
		if time.Now().After(end) {
			bad = fmt.Errorf("blockkill: %d of %d processes are blocked", sleeping, len(pids))
		}
		time.Sleep(50 * time.Millisecond)
	}
	killed := 0
	for _, pid := range pids {
		_ = unix.Kill(pid, unix.SIGKILL)
	}
	for _, pid := range pids {
		var status unix.WaitStatus
		_, err := unix.Wait4(pid, &status, 0, nil)
		for err == unix.EINTR {
			_, err = unix.Wait4(pid, &status, 0, nil)
		}
		if err == nil && status.Signaled() && status.Signal() == unix.SIGKILL {
			killed++
		}
		say("| %d", pid)
	}
	return fmt.Sprintf("blockkill processes=%d killed=%d", len(pids), killed), bad
}

// asleep tells whether a thread waits in the kernel for what a signal may interrupt. It
// allocates little, as that is never freed.
func asleep(pid int) bool {
	fd, err := unix.Open("/proc/"+strconv.Itoa(pid)+"/stat", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer func() { _ = unix.Close(fd) }()
	var b [64]byte
	n, _ := unix.Read(fd, b[:])
	return bytes.Contains(b[:max(n, 0)], []byte(") S "))
}
