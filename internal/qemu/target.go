package qemu

import (
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strings"
)

// ErrTarget says that a name isn't one of a QEMU guest.
var ErrTarget = errors.New("not the name of a QEMU guest: " +
	"want qemu:/path/of/gdb.sock, qemu:host:port or qemu+monitor:/path/of/monitor.sock")

// A Target says where a guest's gdbstub is.
type Target struct {
	// Network and Address are as for [net.Dial]: "unix" or "tcp".
	Network, Address string
	// Monitor says that a monitor (HMP or QMP) listens there, through which the
	// gdbstub has to be started first.
	Monitor bool
}

// String returns the name that ParseTarget takes.
func (t Target) String() string {
	if t.Monitor {
		return "qemu+monitor:" + t.Address
	}
	return "qemu:" + t.Address
}

// ParseTarget understands
//
//	qemu:/run/vm.gdb            a unix socket (-gdb unix:/run/vm.gdb,server=on,wait=off)
//	qemu:localhost:1234         a TCP port (-gdb tcp:localhost:1234)
//	qemu::1234                  the same, on this machine (-s)
//	qemu+monitor:/run/vm.mon    the unix socket of a monitor, HMP or QMP
//	qemu+monitor:localhost:4444 a monitor's TCP port
//
// The error wraps ErrTarget.
func ParseTarget(name string) (Target, error) {
	rest, monitor := strings.CutPrefix(name, "qemu+monitor:")
	if !monitor {
		var ok bool
		if rest, ok = strings.CutPrefix(name, "qemu:"); !ok {
			return Target{}, fmt.Errorf("%q: %w", name, ErrTarget)
		}
	}
	t := Target{Monitor: monitor}
	rest = strings.TrimPrefix(rest, "unix:")
	switch {
	case rest == "":
		return Target{}, fmt.Errorf("%q: %w", name, ErrTarget)
	case strings.ContainsRune(rest, 0):
		return Target{}, fmt.Errorf("%q has a zero byte: %w", name, ErrTarget)
	case strings.Contains(rest, "/"):
		for _, option := range []string{",server", ",wait", ",nowait"} {
			if path, _, ok := strings.Cut(rest, option); ok {
				return Target{}, fmt.Errorf("%q: options are for QEMU's command line; here it is qemu:%s: %w", name, path, ErrTarget)
			}
		}
		if !filepath.IsAbs(rest) && !strings.HasPrefix(rest, ".") {
			return Target{}, fmt.Errorf("%q: the socket's path must begin with / or .: %w", name, ErrTarget)
		}
		t.Network, t.Address = "unix", rest
		return t, nil
	}
	rest = strings.TrimPrefix(rest, "tcp:")
	host, port, err := net.SplitHostPort(rest)
	if err != nil || port == "" {
		return Target{}, fmt.Errorf("%q: neither a path with a / nor host:port: %w", name, ErrTarget)
	}
	if _, err := net.LookupPort("tcp", port); err != nil {
		return Target{}, fmt.Errorf("%q: port %q: %w", name, port, ErrTarget)
	}
	if host == "" {
		host = "localhost"
	}
	t.Network, t.Address = "tcp", net.JoinHostPort(host, port)
	return t, nil
}
