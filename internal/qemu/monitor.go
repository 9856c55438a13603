package qemu

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// ErrMonitor: the monitor doesn't do what is asked of it.
var ErrMonitor = errors.New("QEMU's monitor")

// monitor is a connection to a monitor: QMP (the machine protocol, JSON) or HMP
// (for people, with a prompt).
type monitor struct {
	c       net.Conn
	r       *bufio.Reader
	qmp     bool
	target  Target
	timeout time.Duration
	path    string // of the stub's socket, once it is started
}

const prompt = "(qemu) "

// dialMonitor connects and finds out which kind of monitor it is.
func dialMonitor(ctx context.Context, t Target, timeout time.Duration) (*monitor, error) {
	c, err := connect(ctx, t)
	switch {
	case err == nil:
	case absent(err):
		return nil, fmt.Errorf("%w: %w (%w): start QEMU with -monitor unix:PATH,server=on,wait=off", ErrMonitor, ErrNoStub, reason(err))
	case errors.Is(err, ErrBusy):
		return nil, fmt.Errorf("%w: %w: end that one first, unless it is libvirt: then %s", ErrMonitor, err, libvirtHint)
	default:
		return nil, fmt.Errorf("%w: can't connect: %w", ErrMonitor, reason(err))
	}
	m := &monitor{c: c, r: bufio.NewReader(c), target: t, timeout: timeout}
	stop := context.AfterFunc(ctx, func() { c.Close() })
	err = m.greet()
	if !stop() {
		err = context.Cause(ctx)
	}
	if err != nil {
		c.Close()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return nil, fmt.Errorf("%w doesn't answer: is somebody else connected to it, or is it something else? "+
				"(A libvirt guest's is libvirt's: %s)", ErrMonitor, libvirtHint)
		}
		if hungUp(err) {
			return nil, fmt.Errorf("%w has closed the connection (%w): is it a monitor's socket?", ErrMonitor, reason(err))
		}
		return nil, fmt.Errorf("%w: %w", ErrMonitor, reason(err))
	}
	return m, nil
}

const libvirtHint = "use virsh qemu-monitor-command --hmp NAME 'gdbserver unix:PATH,server=on,wait=off', and then qemu:PATH"

func (m *monitor) greet() error {
	if err := m.c.SetDeadline(time.Now().Add(min(m.timeout, 5*time.Second))); err != nil {
		return err
	}
	first, err := m.r.Peek(1)
	if err != nil {
		return err
	}
	switch first[0] {
	case '{':
		m.qmp = true
		if _, err := m.line(); err != nil {
			return err
		}
		_, err := m.execute(`{"execute":"qmp_capabilities"}`)
		return err
	case '$', '+':
		return errors.New("that is a gdbstub: use qemu:PATH")
	}
	_, err = m.untilPrompt()
	return err
}

// maxLine bounds a line of a monitor, and the output of an HMP command.
const maxLine = 1 << 20

func (m *monitor) line() ([]byte, error) {
	var line []byte
	for {
		part, err := m.r.ReadSlice('\n')
		line = append(line, part...)
		if err == nil {
			return line, nil
		}
		if !errors.Is(err, bufio.ErrBufferFull) {
			return nil, err
		}
		if len(line) > maxLine {
			return nil, errors.New("a line without end")
		}
	}
}

func (m *monitor) untilPrompt() (string, error) {
	var out []byte
	for !bytes.HasSuffix(out, []byte(prompt)) {
		c, err := m.r.ReadByte()
		if err != nil {
			return "", err
		}
		if out = append(out, c); len(out) > maxLine {
			return "", errors.New("output without end")
		}
	}
	return string(out[:len(out)-len(prompt)]), nil
}

// execute sends a QMP command and returns what it returns; events are skipped.
func (m *monitor) execute(command string) (json.RawMessage, error) {
	if _, err := m.c.Write([]byte(command + "\n")); err != nil {
		return nil, err
	}
	for {
		line, err := m.line()
		if err != nil {
			return nil, err
		}
		var reply struct {
			Return json.RawMessage               `json:"return"`
			Error  *struct{ Class, Desc string } `json:"error"`
		}
		if err := json.Unmarshal(line, &reply); err != nil {
			return nil, fmt.Errorf("%.80q: %w", line, err)
		}
		if reply.Error != nil {
			return nil, fmt.Errorf("%s: %s", printable(reply.Error.Class), printable(reply.Error.Desc))
		}
		if reply.Return != nil {
			return reply.Return, nil
		}
	}
}

// command executes an HMP command and returns its output.
func (m *monitor) command(command string) (string, error) {
	if err := m.c.SetDeadline(time.Now().Add(m.timeout)); err != nil {
		return "", err
	}
	if !m.qmp {
		if _, err := m.c.Write([]byte(command + "\n")); err != nil {
			return "", err
		}
		out, err := m.untilPrompt()
		if err != nil {
			return "", err
		}
		// The command is echoed, with escape sequences, on the first line.
		_, out, _ = strings.Cut(out, "\n")
		return strings.TrimSpace(out), nil
	}
	arg, err := json.Marshal(command)
	if err != nil {
		return "", err
	}
	raw, err := m.execute(`{"execute":"human-monitor-command","arguments":{"command-line":` + string(arg) + `}}`)
	if err != nil {
		return "", err
	}
	var out string
	err = json.Unmarshal(raw, &out)
	return strings.TrimSpace(out), err
}

// startStub starts the gdbstub on a socket at path, or next to the monitor's, or
// takes the one that a dead predecessor has started there.
func (m *monitor) startStub(path string) (Target, error) {
	if path == "" {
		if m.target.Network != "unix" {
			return Target{}, errors.New("say where QEMU is to make the gdbstub's socket: qemu+monitor:…?gdb=/PATH")
		}
		// QEMU may be in another folder.
		socket, err := filepath.Abs(m.target.Address)
		if err != nil {
			return Target{}, err
		}
		path = socket + ".vmprobes"
	}
	if strings.ContainsAny(path, ",\n\r\x00 ") {
		return Target{}, fmt.Errorf("socket path %q: QEMU can't be told of a path with a space or a comma", path)
	}
	t := Target{Network: "unix", Address: path}
	if _, err := os.Lstat(path); err == nil {
		if listens(path) {
			m.path = path
			return t, nil
		}
		// A VM that has ended left it.
		if err := os.Remove(path); err != nil {
			return Target{}, err
		}
	}
	status, err := m.command("info status")
	if err != nil {
		return Target{}, m.failed("info status", err)
	}
	if strings.Contains(status, "paused") {
		return Target{}, fmt.Errorf("%w (%s)", ErrPaused, printable(status))
	}
	out, err := m.command("gdbserver unix:" + path + ",server=on,wait=off")
	if err != nil {
		return Target{}, m.failed("gdbserver", err)
	}
	if strings.Contains(out, "duplicate") {
		return Target{}, errors.New("this QEMU has a gdbstub already (-gdb, -s or gdbserver): use qemu: with its socket, " +
			"or enter \"gdbserver none\" in its monitor")
	}
	if !listens(path) {
		return Target{}, m.failed("gdbserver", fmt.Errorf("it hasn't made %s: name a path that QEMU may write to (qemu+monitor:…?gdb=/PATH): %s", path, printable(out)))
	}
	m.path = path
	// QEMU's umask may leave it open to others.
	if err := os.Chmod(path, 0o600); err != nil && !errors.Is(err, fs.ErrPermission) {
		return Target{}, err
	}
	return t, nil
}

// listens reports whether path is a socket that somebody listens at. Nobody
// connects to find out: that would stop the VM.
func listens(path string) bool {
	st, err := os.Stat(path)
	return err == nil && st.Mode()&fs.ModeSocket != 0 && listening(path)
}

func (m *monitor) failed(command string, err error) error {
	return fmt.Errorf("%w: %s: %w", ErrMonitor, command, reason(err))
}

// stopStub ends the gdbstub that startStub started.
func (m *monitor) stopStub() error {
	if m.path == "" {
		return nil
	}
	_, err := m.command("gdbserver none")
	os.Remove(m.path)
	m.path = ""
	if err != nil && !hungUp(err) {
		return m.failed("gdbserver none", err)
	}
	return nil
}

func (m *monitor) close() { m.c.Close() }
