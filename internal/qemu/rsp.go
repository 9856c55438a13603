package qemu

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"time"
)

// The GDB remote serial protocol (GDB manual, appendix E): packets are
// "$data#checksum", each is acknowledged with a "+".

// maxPacket bounds the data of a packet, after run-length decoding. QEMU 11's
// PacketSize is 0x20020 bytes, the largest of all versions.
const maxPacket = 1 << 18

// errProtocol says that the other side doesn't speak the protocol.
var errProtocol = errors.New("not what a gdbstub sends")

// unpack takes the first packet from in: its data, with runs expanded, is
// appended to dst[:0], and n is how many bytes of in it took. While the packet
// isn't complete n is 0.
func unpack(dst, in []byte) (data []byte, n int, err error) {
	start := 0
	for start < len(in) && in[start] == '+' {
		start++
	}
	if start == len(in) {
		return nil, 0, nil
	}
	switch in[start] {
	case '$':
	case '-':
		return nil, 0, fmt.Errorf("%w: it rejects our packet", errProtocol)
	default:
		return nil, 0, fmt.Errorf("%w: it begins with %.40q", errProtocol, in[start:])
	}
	body := in[start+1:]
	end := bytes.IndexByte(body, '#')
	if end > maxPacket || end < 0 && len(body) > maxPacket {
		return nil, 0, fmt.Errorf("%w: a packet of more than %d bytes", errProtocol, maxPacket)
	}
	if end < 0 || len(body) < end+3 {
		return nil, 0, nil
	}
	var sum byte
	for _, c := range body[:end] {
		sum += c
	}
	hi, lo := unhex(body[end+1]), unhex(body[end+2])
	if hi < 0 || lo < 0 || byte(hi<<4|lo) != sum {
		return nil, 0, fmt.Errorf("%w: checksum %q, computed %02x", errProtocol, body[end+1:end+3], sum)
	}
	data, err = expand(dst[:0], body[:end])
	return data, start + 1 + end + 3, err
}

// expand undoes the run-length encoding: "*" and a character c stand for c-29
// more of the character before (GDB manual, E.1).
func expand(dst, b []byte) ([]byte, error) {
	for i := 0; i < len(b); i++ {
		if b[i] != '*' {
			dst = append(dst, b[i])
			continue
		}
		i++
		if len(dst) == 0 || i == len(b) || b[i] < ' ' || b[i] > '~' {
			return nil, fmt.Errorf("%w: malformed run length", errProtocol)
		}
		for range b[i] - 29 {
			dst = append(dst, dst[len(dst)-1])
		}
		if len(dst) > maxPacket {
			return nil, fmt.Errorf("%w: a packet of more than %d bytes", errProtocol, maxPacket)
		}
	}
	return dst, nil
}

// unescape undoes the escapes of binary data in place: "}" and a character c
// stand for c^0x20.
func unescape(b []byte) []byte {
	out := b[:0]
	for i := 0; i < len(b); i++ {
		c := b[i]
		if c == '}' && i+1 < len(b) {
			i++
			c = b[i] ^ 0x20
		}
		out = append(out, c)
	}
	return out
}

const hexDigits = "0123456789abcdef"

// appendPacket appends the packet with the given data. None of what is sent
// here needs an escape.
func appendPacket(b []byte, data string) []byte {
	var sum byte
	for i := range len(data) {
		sum += data[i]
	}
	b = append(b, '$')
	b = append(b, data...)
	return append(b, '#', hexDigits[sum>>4], hexDigits[sum&15])
}

func unhex(c byte) int {
	switch {
	case '0' <= c && c <= '9':
		return int(c - '0')
	case 'a' <= c && c <= 'f':
		return int(c-'a') + 10
	case 'A' <= c && c <= 'F':
		return int(c-'A') + 10
	}
	return -1
}

// appendHex appends b in hexadecimal.
func appendHex(dst []byte, b []byte) []byte {
	for _, c := range b {
		dst = append(dst, hexDigits[c>>4], hexDigits[c&15])
	}
	return dst
}

// decodeHex fills dst from exactly twice as many hexadecimal digits.
func decodeHex(dst, src []byte) error {
	if len(src) != 2*len(dst) {
		return fmt.Errorf("%w: %d digits for %d bytes", errProtocol, len(src), len(dst))
	}
	for i := range dst {
		hi, lo := unhex(src[2*i]), unhex(src[2*i+1])
		if hi < 0 || lo < 0 {
			return fmt.Errorf("%w: %q in hexadecimal data", errProtocol, src[2*i:2*i+2])
		}
		dst[i] = byte(hi<<4 | lo)
	}
	return nil
}

// stub is a connection to a gdbstub. One goroutine at a time may use it, except
// for interrupt and c's deadlines.
type stub struct {
	c       net.Conn
	in      []byte // received, not taken yet
	out     []byte
	data    []byte // of the last packet
	unacked bool   // a packet has been received and not been acknowledged
	sent    uint64 // packets
	poll    poller
}

// send sends packets in one write, with the acknowledgement of the last one
// received before them: an acknowledgement on its own would stop a running VM.
func (s *stub) send(timeout time.Duration, packets ...string) error {
	s.out = s.out[:0]
	if s.unacked {
		s.out = append(s.out, '+')
		s.unacked = false
	}
	for _, p := range packets {
		s.out = appendPacket(s.out, p)
	}
	s.sent += uint64(len(packets))
	if err := s.c.SetWriteDeadline(time.Now().Add(timeout)); err != nil {
		return err
	}
	_, err := s.c.Write(s.out)
	return err
}

// interrupt stops a running VM. It must be alone in its write: QEMU 11 loses
// the stop reply otherwise.
func (s *stub) interrupt(timeout time.Duration) error {
	if err := s.c.SetWriteDeadline(time.Now().Add(timeout)); err != nil {
		return err
	}
	_, err := s.c.Write([]byte{3})
	return err
}

// deadline sets when receive gives up; the zero time is never.
func (s *stub) deadline(t time.Time) error { return s.c.SetReadDeadline(t) }

// receive returns the next packet's data, which is valid until the next call.
// If the deadline passes in the middle of a packet, the next call goes on there.
func (s *stub) receive() ([]byte, error) {
	for {
		data, n, err := unpack(s.data, s.in)
		if err != nil {
			return nil, err
		}
		if n > 0 {
			s.data = data
			s.in = s.in[:copy(s.in, s.in[n:])]
			s.unacked = true
			return data, nil
		}
		if err := s.fill(); err != nil {
			return nil, err
		}
	}
}

// fill reads what has come.
func (s *stub) fill() error {
	const chunk = 4096
	if cap(s.in)-len(s.in) < chunk {
		s.in = append(make([]byte, 0, 2*cap(s.in)+chunk), s.in...)
	}
	free := s.in[len(s.in):cap(s.in)]
	n, err := s.poll.read(s.c, free)
	if n == 0 && err == nil {
		n, err = s.c.Read(free)
	}
	s.in = s.in[:len(s.in)+n]
	if n > 0 {
		return nil
	}
	if err == nil {
		return io.ErrNoProgress
	}
	return err
}

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
		err = fmt.Errorf("QEMU has closed the connection: the VM has ended, or its gdbserver was stopped or given to another (%w)", reason(err))
	case errors.Is(err, os.ErrDeadlineExceeded):
		err = fmt.Errorf("QEMU hasn't answered for %v: if it lives, attach again, which clears the breakpoints and lets the VM run", v.timeout)
	case errors.Is(err, net.ErrClosed):
		err = ErrClosed
	default:
		err = fmt.Errorf("connection to the gdbstub: %w: attach again, which clears the breakpoints and lets the VM run", reason(err))
	}
	v.stub.c.Close()
	return v.lose(err)
}

// hungUp reports whether err says that the other side has closed the connection.
func hungUp(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}
