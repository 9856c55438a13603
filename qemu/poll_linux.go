package qemu

import (
	"net"
	"runtime"
	"syscall"
	"time"
)

// pollFor is how long an answer is looked for before the reader goes to sleep. To
// wake it up again takes longer than QEMU takes for most answers.
const pollFor = 200 * time.Microsecond

// poller reads from a connection without sleeping.
type poller struct {
	raw syscall.RawConn
	try func(fd uintptr) bool
	b   []byte
	n   int
}

// read returns how much of b it has filled from c in that time: 0 if nothing came,
// or the connection has something to say that a usual Read will tell.
func (p *poller) read(c net.Conn, b []byte) int {
	if p.try == nil {
		p.try = func(fd uintptr) bool {
			p.n, _ = syscall.Read(int(fd), p.b)
			return true
		}
		// With one processor it would keep QEMU from answering.
		if sc, ok := c.(syscall.Conn); ok && runtime.NumCPU() > 1 {
			p.raw, _ = sc.SyscallConn()
		}
	}
	if p.raw == nil {
		return 0
	}
	p.b, p.n = b, 0
	for begin := time.Now(); ; {
		if err := p.raw.Read(p.try); err != nil { // closed, or past the deadline
			return 0
		}
		if p.n > 0 {
			return p.n
		}
		if time.Since(begin) > pollFor {
			return 0
		}
	}
}
