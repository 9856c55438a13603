package qemu

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"time"
)

// The methods here exchange packets with the stub of a VM that is stopped; v.mu is
// held.

// call sends one packet and returns the answer, which is valid until the next
// call.
func (v *VM) call(packet string) ([]byte, error) {
	if err := v.post(packet); err != nil {
		return nil, err
	}
	return v.receive()
}

// post sends packets.
func (v *VM) post(packets ...string) error {
	if v.gone {
		return v.err
	}
	if err := v.stub.send(v.timeout, packets...); err != nil {
		return v.broken(err)
	}
	return nil
}

// receive returns the next packet, which must come soon.
func (v *VM) receive() ([]byte, error) {
	if v.gone {
		return nil, v.err
	}
	if err := v.stub.deadline(time.Now().Add(v.timeout)); err != nil {
		return nil, v.broken(err)
	}
	data, err := v.stub.receive()
	if err != nil {
		return nil, v.broken(err)
	}
	return data, nil
}

func (v *VM) callText(packet string) (string, error) {
	data, err := v.call(packet)
	return string(data), err
}

// refused is an error reply, or an empty one: the stub doesn't know the packet.
type refused struct{ packet, reply string }

func (e *refused) Error() string {
	if e.reply == "" {
		return fmt.Sprintf("the gdbstub doesn't know %q", e.packet)
	}
	return fmt.Sprintf("the gdbstub answers %q to %q", e.reply, e.packet)
}

func (v *VM) callOK(packet string) error {
	text, err := v.callText(packet)
	if err == nil && text != "OK" {
		err = &refused{packet, printable(text)}
	}
	return err
}

// maxHMP bounds the output of a monitor command.
const maxHMP = 4 << 20

// hmp executes a command of the human monitor. The output of an unknown command
// says so; a stub without a monitor gives "".
func (v *VM) hmp(command string) (string, error) {
	data, err := v.call("qRcmd," + hex.EncodeToString([]byte(command)))
	var out []byte
	for err == nil {
		switch {
		case string(data) == "OK":
			return string(out), nil
		case len(data) == 0 || data[0] == 'E':
			return "", nil
		case data[0] != 'O' || len(data)%2 == 0:
			return "", fmt.Errorf("%w: output of %q: %.40q", errProtocol, command, data)
		}
		part := make([]byte, len(data)/2)
		if err := decodeHex(part, data[1:]); err != nil {
			return "", err
		}
		if out = append(out, part...); len(out) > maxHMP {
			return "", fmt.Errorf("%w: output of %q has no end", errProtocol, command)
		}
		data, err = v.receive()
	}
	return "", err
}

// lose ends everything with err; the connection may still be good.
func (v *VM) lose(err error) error {
	if v.err == nil {
		v.err = &lostError{err}
		v.log.Debug("guest lost", "err", err)
	}
	v.changed.Broadcast()
	return v.err
}

// broken ends everything, because the connection is.
func (v *VM) broken(err error) error {
	v.gone = true
	v.running = false
	switch {
	case hungUp(err):
		err = fmt.Errorf("QEMU has closed the connection: the VM has ended, or its gdbserver was stopped or given to another (%w)", err)
	case errors.Is(err, os.ErrDeadlineExceeded):
		err = fmt.Errorf("QEMU hasn't answered for %v: if it lives, attach again, which clears the breakpoints and lets the VM run", v.timeout)
	case errors.Is(err, net.ErrClosed):
		err = ErrClosed
	default:
		err = fmt.Errorf("connection to the gdbstub: %w: attach again, which clears the breakpoints and lets the VM run", err)
	}
	v.stub.c.Close()
	return v.lose(err)
}

// hungUp reports whether err says that the other side has closed the connection.
func hungUp(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}
