package qemu

import (
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// ErrTarget says that a name isn't one of a QEMU guest, or that its options aren't
// those that there are.
var ErrTarget = errors.New("not the name of a QEMU guest")

const (
	wantName    = "want qemu:/path/of/gdb.sock, qemu:host:port or qemu+monitor:/path/of/monitor.sock"
	wantOptions = "behind a ? may stand, joined by &: ram=FILE or pid=PID (where the guest's memory is), " +
		"debugregs (use the CPU's debug registers), timeout=30s and, for qemu+monitor, gdb=SOCKET"
)

// A Target says where a guest's gdbstub is.
type Target struct {
	// Network and Address are as for [net.Dial]: "unix" or "tcp".
	Network, Address string
	// Monitor says that a monitor (HMP or QMP) listens there, through which the
	// gdbstub has to be started first.
	Monitor bool
}

// String returns the name that parseTarget takes.
func (t Target) String() string {
	if t.Monitor {
		return "qemu+monitor:" + t.Address
	}
	return "qemu:" + t.Address
}

// Socket returns the address of the socket that a name as Dial takes it stands for, the
// one that [Info] has.
func Socket(name string) (string, error) {
	t, err := parseName(name, new(Options))
	return t.Address, err
}

// parseName parses a name as Dial takes it, and puts what its options say into
// opts. The error wraps ErrTarget, and doesn't repeat the name.
func parseName(name string, opts *Options) (Target, error) {
	name, query, ok := strings.Cut(name, "?")
	t, err := parseTarget(name)
	if err != nil || !ok {
		return t, err
	}
	seen := map[string]bool{}
	for o := range strings.SplitSeq(query, "&") {
		key, value, assigned := strings.Cut(o, "=")
		bad := func(why string) (Target, error) {
			return Target{}, fmt.Errorf("%w: option %q%s: %s", ErrTarget, o, why, wantOptions)
		}
		if seen[key] {
			return bad(" comes twice")
		}
		seen[key] = true
		if flag := key == "debugregs"; assigned == flag || assigned && value == "" {
			return bad("")
		}
		switch key {
		case "ram":
			if !isPath(value) {
				return bad(": the file's path must begin with / or .")
			}
			opts.RAM, opts.ProcMem, opts.Fallback = value, false, false
		case "pid":
			// Linux: PID_MAX_LIMIT is 2^22.
			pid, err := strconv.ParseUint(value, 10, 31)
			if err != nil || pid == 0 {
				return bad(": not the number of a process")
			}
			opts.RAM, opts.ProcMem, opts.PID, opts.Fallback = "", true, int(pid), false
		case "debugregs":
			opts.DebugRegisters = true
		case "gdb":
			switch {
			case !t.Monitor:
				return bad(" is for qemu+monitor: a gdbstub has its socket")
			case !filepath.IsAbs(value):
				return bad(": QEMU makes that socket, and may be in another folder: the path must begin with /")
			}
			opts.GDB = value
		case "timeout":
			d, err := time.ParseDuration(value)
			if err != nil || d <= 0 {
				return bad(": not a duration such as 30s")
			}
			opts.Timeout = d
		default:
			return bad("")
		}
	}
	if seen["ram"] && seen["pid"] {
		return Target{}, fmt.Errorf("%w: ram and pid exclude each other", ErrTarget)
	}
	return t, nil
}

func isPath(s string) bool { return filepath.IsAbs(s) || strings.HasPrefix(s, ".") }

// parseTarget parses a name without options. The error wraps ErrTarget.
func parseTarget(name string) (Target, error) {
	rest, monitor := strings.CutPrefix(name, "qemu+monitor:")
	if !monitor {
		var ok bool
		if rest, ok = strings.CutPrefix(name, "qemu:"); !ok {
			return Target{}, fmt.Errorf("%w: %s", ErrTarget, wantName)
		}
	}
	t := Target{Monitor: monitor}
	rest = strings.TrimPrefix(rest, "unix:")
	switch {
	case rest == "":
		return Target{}, fmt.Errorf("%w: %s", ErrTarget, wantName)
	case strings.ContainsRune(rest, 0):
		return Target{}, fmt.Errorf("%w: it has a zero byte", ErrTarget)
	case strings.Contains(rest, "/"):
		for _, option := range []string{",server", ",wait", ",nowait"} {
			if path, _, ok := strings.Cut(rest, option); ok {
				return Target{}, fmt.Errorf("%w: %q is for QEMU's command line: here it is just %s", ErrTarget, rest, path)
			}
		}
		if !isPath(rest) {
			return Target{}, fmt.Errorf("%w: the path of a socket begins with / or with ./", ErrTarget)
		}
		t.Network, t.Address = "unix", rest
		return t, nil
	}
	rest = strings.TrimPrefix(rest, "tcp:")
	host, port, err := net.SplitHostPort(rest)
	if err != nil || port == "" {
		return Target{}, fmt.Errorf("%w: neither a path with a / nor host:port: %s", ErrTarget, wantName)
	}
	if _, err := net.LookupPort("tcp", port); err != nil {
		return Target{}, fmt.Errorf("%w: there is no port %q", ErrTarget, port)
	}
	if host == "" {
		host = "localhost"
	}
	t.Network, t.Address = "tcp", net.JoinHostPort(host, port)
	return t, nil
}
