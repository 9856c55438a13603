// Package wire is the line protocol in which the emulated dom0 reports to the
// lab program over its second serial port. Each message is one line of plain
// ASCII that starts with a mark, so that a kernel message or a truncated line
// is never taken for one.
package wire

import (
	"bytes"
	"fmt"
	"io"
	"strconv"
	"strings"
	"sync"
)

// mark starts each message. It has a control character that no log line has.
const mark = "\x01LAB "

// Kind says what a Message carries.
type Kind string

// The kinds of message.
const (
	Status Kind = "status" // Data: what dom0 is doing now
	Start  Kind = "start"  // the job starts: all output from here on is its own
	Stdout Kind = "out"    // Data: a piece of the job's standard output
	Stderr Kind = "err"    // Data: a piece of the job's standard error
	File   Kind = "file"   // Name, Data: a piece of a file sent back, in order
	Fatal  Kind = "fatal"  // Data: why dom0 could not run the job
	Exit   Kind = "exit"   // Code: the job's exit code; the last message
)

// Message is one report from dom0.
type Message struct {
	Kind Kind
	Name string
	Data string
	Code int
}

// chunk bounds the data in one line, which keeps the output live on a slow
// serial port.
const chunk = 512

// Writer sends messages. It may be used from several goroutines.
type Writer struct {
	mu sync.Mutex
	w  io.Writer
}

// NewWriter returns a Writer that sends its messages to w.
func NewWriter(w io.Writer) *Writer { return &Writer{w: w} }

// Send sends m, in several lines if its data is long.
func (w *Writer) Send(m Message) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	data := m.Data
	for {
		n := min(len(data), chunk)
		line := fmt.Sprintf("%s%s %s %s %d\n", mark, m.Kind, strconv.QuoteToASCII(m.Name), quote(data[:n]), m.Code)
		if _, err := io.WriteString(w.w, line); err != nil {
			return fmt.Errorf("send %s message: %w", m.Kind, err)
		}
		if data = data[n:]; data == "" {
			return nil
		}
	}
}

// quote is strconv.Quote for arbitrary bytes: pieces of a message may end in
// the middle of a character, so nothing outside ASCII is kept as it is.
func quote(s string) string {
	var b strings.Builder
	b.WriteByte('"')
	for i := range len(s) {
		switch c := s[i]; {
		case c == '\n':
			b.WriteString(`\n`)
		case c == '\t':
			b.WriteString(`\t`)
		case c == '"' || c == '\\':
			b.WriteByte('\\')
			b.WriteByte(c)
		case c < ' ' || c > '~':
			fmt.Fprintf(&b, `\x%02x`, c)
		default:
			b.WriteByte(c)
		}
	}
	b.WriteByte('"')
	return b.String()
}

// Stream returns an io.Writer that sends what is written to it as messages of
// one kind.
func (w *Writer) Stream(kind Kind, name string) io.Writer {
	return streamWriter{w: w, kind: kind, name: name}
}

type streamWriter struct {
	w    *Writer
	kind Kind
	name string
}

func (s streamWriter) Write(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if err := s.w.Send(Message{Kind: s.kind, Name: s.name, Data: string(p)}); err != nil {
		return 0, err
	}
	return len(p), nil
}

// Parser finds the messages in what arrives on the serial port, however it is
// cut into pieces.
type Parser struct {
	// Message is called for each message.
	Message func(Message)
	// Noise, if set, is called for each line that is no message.
	Noise func(line string)

	line []byte
}

// maxLine bounds what is kept of a line without an end.
const maxLine = 64 << 10

// Write takes the next piece. It never fails.
func (p *Parser) Write(b []byte) (int, error) {
	n := len(b)
	for {
		i := bytes.IndexByte(b, '\n')
		if i < 0 {
			break
		}
		p.line = append(p.line, b[:i]...)
		p.finish()
		b = b[i+1:]
	}
	p.line = append(p.line, b...)
	if len(p.line) > maxLine {
		p.finish()
	}
	return n, nil
}

func (p *Parser) finish() {
	line := strings.TrimRight(string(p.line), "\r")
	p.line = p.line[:0]
	if m, ok := parse(line); ok {
		p.Message(m)
	} else if p.Noise != nil && line != "" {
		p.Noise(line)
	}
}

func parse(line string) (Message, bool) {
	_, rest, ok := strings.Cut(line, mark)
	if !ok {
		return Message{}, false
	}
	var m Message
	kind, rest, ok := strings.Cut(rest, " ")
	m.Kind = Kind(kind)
	if !ok {
		return Message{}, false
	}
	for _, field := range []*string{&m.Name, &m.Data} {
		quoted, err := strconv.QuotedPrefix(rest)
		if err != nil {
			return Message{}, false
		}
		if *field, err = strconv.Unquote(quoted); err != nil {
			return Message{}, false
		}
		if rest, ok = strings.CutPrefix(rest[len(quoted):], " "); !ok {
			return Message{}, false
		}
	}
	code, err := strconv.Atoi(rest)
	m.Code = code
	return m, err == nil
}
