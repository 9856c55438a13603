package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"github.com/vmprobes/vmprobes/lab/internal/job"
	"github.com/vmprobes/vmprobes/lab/internal/wire"
	"golang.org/x/sys/unix"
)

// isTerminal tells whether a descriptor is a terminal.
func isTerminal(fd uintptr) bool {
	_, err := unix.IoctlGetTermios(int(fd), unix.TCGETS)
	return err == nil
}

// makeRaw makes a terminal pass on every key at once. The returned function
// undoes it.
func makeRaw(fd int) (func(), error) {
	saved, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return nil, err
	}
	raw := *saved
	raw.Iflag &^= unix.IGNBRK | unix.BRKINT | unix.PARMRK | unix.ISTRIP | unix.INLCR | unix.IGNCR | unix.ICRNL | unix.IXON
	raw.Oflag &^= unix.OPOST
	raw.Lflag &^= unix.ECHO | unix.ECHONL | unix.ICANON | unix.ISIG | unix.IEXTEN
	raw.Cc[unix.VMIN], raw.Cc[unix.VTIME] = 1, 0
	if err := unix.IoctlSetTermios(fd, unix.TCSETS, &raw); err != nil {
		return nil, err
	}
	return func() { _ = unix.IoctlSetTermios(fd, unix.TCSETS, saved) }, nil
}

// leaveKey ends an interactive session.
const leaveKey = 0x1d // Ctrl-]

// errLeft says that the user left.
var errLeft = errors.New("left")

func runShell(ctx context.Context, host string, flags runFlags) error {
	if !isTerminal(os.Stdin.Fd()) {
		return &exitError{codeUsage, errors.New("shell: the standard input is not a terminal (to run a program: lab run)")}
	}
	j := job.Job{Host: host, Env: jobEnv(flags.env), ShellGuest: "a3guest", Rows: 24, Columns: 80}
	if size, err := unix.IoctlGetWinsize(int(os.Stdin.Fd()), unix.TIOCGWINSZ); err == nil {
		j.Rows, j.Columns = size.Row, size.Col
	}
	if flags.timeout == 0 {
		flags.timeout = 24 * time.Hour // whoever sits there decides
	}
	m, cleanup, err := boot(ctx, host, flags, j)
	if err != nil {
		return err
	}
	defer cleanup()
	progress("booting %s with %s; Ctrl-] leaves", host, m.emu.name())
	r := m.wait(func(conn net.Conn) error {
		restore, err := makeRaw(int(os.Stdin.Fd()))
		if err != nil {
			return err
		}
		defer restore()
		return interact(conn)
	})
	if errors.Is(r.err, errLeft) {
		return nil
	}
	return r.err
}

// interact connects the terminal with dom0's shell until either side leaves.
func interact(conn net.Conn) error {
	ended := make(chan error, 2)
	go func() {
		buf := make([]byte, 256)
		for {
			n, err := os.Stdin.Read(buf)
			for i := range n {
				if buf[i] == leaveKey {
					n = i
					err = errLeft
					break
				}
			}
			if n > 0 {
				if _, werr := conn.Write(buf[:n]); werr != nil {
					err = werr
				}
			}
			if err != nil {
				ended <- errLeft
				return
			}
		}
	}()
	go func() {
		exit := false
		parser := wire.Parser{Message: func(msg wire.Message) { exit = exit || msg.Kind == wire.Exit }}
		buf := make([]byte, 4096)
		for !exit {
			n, err := conn.Read(buf)
			_, _ = parser.Write(buf[:n])
			shown := buf[:n]
			for i, b := range shown {
				if b == 0x01 { // the protocol begins again
					shown = shown[:i]
					break
				}
			}
			_, _ = os.Stdout.Write(shown)
			if err != nil {
				break
			}
		}
		ended <- errLeft
	}()
	err := <-ended
	fmt.Print("\r\n")
	return err
}
