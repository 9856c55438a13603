package console

import (
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// TestServe: a Client and Serve understand each other.
func TestServe(t *testing.T) {
	host, guest := net.Pipe()
	say := func(format string, args ...any) { fmt.Fprintf(guest, format+"\n", args...) }
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		say("GUEST READY 6.1 2")
		Serve(guest, say, func(words []string) (string, error) {
			if words[0] == "fail" {
				return "", errors.New("of\ntwo lines")
			}
			say("| a line")
			return strings.Join(words, "+"), nil
		})
	}()
	c := New(host)
	_, err := c.Ready(t.Context())
	require.NoError(t, err)
	reply, lines, err := c.Do(t.Context(), "open  it 5")
	require.NoError(t, err)
	assert.Equal(t, "open+it+5", reply)
	assert.Equal(t, []string{"a line"}, lines)
	_, _, err = c.Do(t.Context(), "fail")
	require.ErrorIs(t, err, ErrCommand)
	require.ErrorContains(t, err, "of two lines")
	_, _, err = c.Do(t.Context(), " ")
	require.ErrorContains(t, err, "empty command")
	require.NoError(t, guest.Close())
	<-ended
}
