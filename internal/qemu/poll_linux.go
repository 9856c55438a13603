package qemu

import (
	"net"
	"os"
	"runtime"
	"syscall"
	"time"
)

// pollFor is how long an answer is polled for before the reader goes to sleep.
// Waking it up again takes longer than QEMU takes for most answers.
const pollFor = 200 * time.Microsecond

// poller reads from a connection without sleeping.
type poller struct {
	raw syscall.RawConn
	try func(fd uintptr) bool
	b   []byte
	n   int
	err error
}

// read returns how much of b it has filled from c in that time: 0 if nothing came,
// or at the connection's end, which an ordinary Read will report.
func (p *poller) read(c net.Conn, b []byte) (int, error) {
	if p.try == nil {
		p.try = func(fd uintptr) bool {
			p.n, p.err = syscall.Read(int(fd), p.b)
			return true
		}
		// With one processor it would keep QEMU from answering.
		if sc, ok := c.(syscall.Conn); ok && runtime.NumCPU() > 1 {
			p.raw, _ = sc.SyscallConn()
		}
	}
	if p.raw == nil {
		return 0, nil
	}
	p.b = b
	for begin := time.Now(); ; {
		p.n, p.err = 0, nil
		if err := p.raw.Read(p.try); err != nil { // closed, or past the deadline
			return 0, nil
		}
		switch {
		case p.err == syscall.EAGAIN || p.err == syscall.EINTR:
			if time.Since(begin) > pollFor {
				return 0, nil
			}
		case p.err != nil: // which the next read wouldn't report again
			return 0, &net.OpError{Op: "read", Net: c.RemoteAddr().Network(), Addr: c.RemoteAddr(), Err: os.NewSyscallError("read", p.err)}
		default:
			return p.n, nil
		}
	}
}
