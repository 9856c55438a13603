// Package console speaks with the init of the lab's guests over their console, as
// lab/guestinit describes it: a command is a line with a tag, and the answer has the
// same tag, followed by "DONE " or "ERR ".
package console

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
)

var (
	// ErrClosed: there is nothing more to read.
	ErrClosed = errors.New("the guest's console is gone")
	// ErrDied: the guest's kernel has panicked.
	ErrDied = errors.New("the guest died")
	// ErrCommand: the guest's init could not do what it was told to.
	ErrCommand = errors.New("guest command")
)

const (
	maxQueue = 1 << 16 // lines that nobody has asked for
	maxTail  = 20
)

// A Client has a guest's console for itself. Its methods may be called from
// several goroutines.
type Client struct {
	w io.Writer

	commands sync.Mutex // one at a time
	tag      int

	mu    sync.Mutex
	queue []string
	tail  []string
	ended bool
	more  chan struct{} // has a value when the three above have changed
}

// New returns a client that reads rw until its end.
func New(rw io.ReadWriter) *Client {
	c := &Client{w: rw, more: make(chan struct{}, 1)}
	go c.read(bufio.NewReader(rw))
	return c
}

func (c *Client) read(in *bufio.Reader) {
	for {
		line, err := in.ReadString('\n')
		line = strings.TrimRight(line, "\r\n")
		c.mu.Lock()
		if line != "" {
			c.queue = append(c.queue[max(0, len(c.queue)-maxQueue+1):], line)
			c.tail = append(c.tail[max(0, len(c.tail)-maxTail+1):], line)
		}
		c.ended = err != nil
		c.mu.Unlock()
		select {
		case c.more <- struct{}{}:
		default:
		}
		if err != nil {
			return
		}
	}
}

// line returns the guest's next line.
func (c *Client) line(ctx context.Context) (string, error) {
	for {
		c.mu.Lock()
		ended := c.ended
		if len(c.queue) > 0 {
			line := c.queue[0]
			c.queue = c.queue[1:]
			c.mu.Unlock()
			if strings.Contains(line, "Kernel panic") {
				return "", fmt.Errorf("%w: %s", ErrDied, line)
			}
			return line, nil
		}
		c.mu.Unlock()
		if ended {
			return "", ErrClosed
		}
		select {
		case <-c.more:
		case <-ctx.Done():
			return "", ctx.Err()
		}
	}
}

// Ready waits until init has said that it is, and returns what else it said: the
// kernel's release and the number of CPUs.
func (c *Client) Ready(ctx context.Context) (string, error) {
	c.commands.Lock()
	defer c.commands.Unlock()
	for {
		line, err := c.line(ctx)
		if err != nil {
			return "", err
		}
		if _, ready, ok := strings.Cut(line, "GUEST READY "); ok {
			return ready, nil
		}
	}
}

// Do has init execute a command, and returns its answer and the lines before that.
func (c *Client) Do(ctx context.Context, command string) (reply string, lines []string, err error) {
	c.commands.Lock()
	defer c.commands.Unlock()
	c.tag++
	tag := fmt.Sprintf("@%d ", c.tag)
	if _, err := io.WriteString(c.w, tag+command+"\n"); err != nil {
		return "", nil, fmt.Errorf("%w %q: %w", ErrClosed, command, err)
	}
	for {
		line, err := c.line(ctx)
		if err != nil {
			return "", lines, fmt.Errorf("guest command %q: %w", command, err)
		}
		if extra, ok := strings.CutPrefix(line, "| "); ok {
			lines = append(lines, extra)
			continue
		}
		// The kernel may have printed something in front of the reply.
		_, answer, ok := strings.Cut(line, tag)
		if !ok {
			continue
		}
		if reply, ok := strings.CutPrefix(answer, "DONE "); ok {
			return reply, lines, nil
		}
		return "", lines, fmt.Errorf("%w %q: %s", ErrCommand, command, strings.TrimPrefix(answer, "ERR "))
	}
}

// Tail returns the last lines that were read.
func (c *Client) Tail() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return strings.Join(c.tail, "\n")
}
