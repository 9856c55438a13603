package console

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// guest is the other end: it answers each command by what answer prints.
func guest(t *testing.T, greeting string, answer func(tag, command string) string) *Client {
	a, b := net.Pipe()
	t.Cleanup(func() { a.Close(); b.Close() })
	go func() {
		io.WriteString(b, greeting)
		for in := bufio.NewReader(b); ; {
			line, err := in.ReadString('\n')
			if err != nil {
				return
			}
			tag, command, _ := strings.Cut(strings.TrimSpace(line), " ")
			out := answer(tag, command)
			if out == "" {
				b.Close()
				return
			}
			io.WriteString(b, out)
		}
	}()
	return New(a)
}

func TestClient(t *testing.T) {
	c := guest(t, "[ 0.1] booting\r\n[0.2] noise GUEST READY 6.1 cpus=2\r\n", func(tag, command string) string {
		switch command {
		case "ps":
			return "| 1 init\r\n| 2 kthreadd\r\n[ 3.0] noise" + tag + " DONE ps 2\r\n"
		case "nonsense":
			return "@99 DONE of nobody\n" + tag + " ERR what?\n"
		case "die":
			return "[ 9.9] Kernel panic - not syncing\n"
		case "end":
			return ""
		}
		return tag + " DONE " + command + "\n"
	})
	ready, err := c.Ready(t.Context())
	require.NoError(t, err)
	assert.Equal(t, "6.1 cpus=2", ready)
	reply, lines, err := c.Do(t.Context(), "ps")
	require.NoError(t, err)
	assert.Equal(t, "ps 2", reply)
	assert.Equal(t, []string{"1 init", "2 kthreadd"}, lines)
	_, _, err = c.Do(t.Context(), "nonsense")
	require.ErrorIs(t, err, ErrCommand)
	assert.EqualError(t, err, `guest command "nonsense": what?`)

	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			want := fmt.Sprint("echo ", i)
			got, _, err := c.Do(t.Context(), want)
			assert.NoError(t, err)
			assert.Equal(t, want, got)
		})
	}
	wg.Wait()

	_, _, err = c.Do(t.Context(), "die")
	require.ErrorIs(t, err, ErrDied)
	_, _, err = c.Do(t.Context(), "end")
	require.ErrorIs(t, err, ErrClosed)
	_, _, err = c.Do(t.Context(), "again")
	require.ErrorIs(t, err, ErrClosed)
	assert.Contains(t, c.Tail(), "Kernel panic")
}

func TestClientTimeout(t *testing.T) {
	c := guest(t, "", func(string, string) string { return "noise\n" })
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	_, _, err := c.Do(ctx, "anything")
	require.ErrorIs(t, err, context.DeadlineExceeded)
	_, err = c.Ready(ctx)
	require.ErrorIs(t, err, context.DeadlineExceeded)
}

func TestClientIsBounded(t *testing.T) {
	a, b := net.Pipe()
	defer a.Close()
	c := New(a)
	for i := range maxQueue + 10 {
		fmt.Fprintf(b, "%d\n", i)
	}
	b.Close()
	assert.Eventually(t, func() bool { c.mu.Lock(); defer c.mu.Unlock(); return c.ended }, 10*time.Second, time.Millisecond)
	assert.Len(t, c.queue, maxQueue)
	assert.Equal(t, fmt.Sprint(maxQueue+9), c.queue[maxQueue-1])
	assert.Len(t, strings.Split(c.Tail(), "\n"), maxTail)
}
