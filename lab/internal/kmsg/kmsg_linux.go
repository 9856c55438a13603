package kmsg

import (
	"strings"

	"golang.org/x/sys/unix"
)

// Messages returns the first lines of all messages that the kernel has kept
// (Documentation/ABI/testing/dev-kmsg), oldest first.
func Messages() ([]string, error) {
	fd, err := unix.Open("/dev/kmsg", unix.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer func() { _ = unix.Close(fd) }()
	var all []string
	buf := make([]byte, 8192)
	for {
		n, err := unix.Read(fd, buf)
		if err == unix.EPIPE || err == unix.EINTR {
			continue // a message was lost: go on with the next one
		}
		if err != nil || n <= 0 {
			return all, nil // EAGAIN: there are no more
		}
		_, message, _ := strings.Cut(string(buf[:n]), ";")
		message, _, _ = strings.Cut(message, "\n")
		all = append(all, message)
	}
}
