package console_test

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/console"
)

func TestSameText(t *testing.T) {
	broken := errors.New("no answer")
	for name, c := range map[string]struct {
		replies []string // the last one again and again
		own     []string
		asked   int
		err     error
	}{
		"as it was":               {[]string{"textchanges other=0 own=0"}, nil, 1, nil},
		"changed by itself":       {[]string{"textchanges other=0 own=1"}, []string{"own"}, 1, nil},
		"in the middle of that":   {[]string{"textchanges other=1 own=0", "textchanges other=0 own=1"}, []string{"own"}, 2, nil},
		"something else is there": {[]string{"textchanges other=1 own=0"}, nil, 10, console.ErrTextChanged},
		"no answer":               {[]string{""}, nil, 1, broken},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				asked := 0
				own, err := console.SameText(t.Context(), func(_ context.Context, command string) (string, []string, error) {
					assert.Equal(t, "textchanges", command)
					reply := c.replies[min(asked, len(c.replies)-1)]
					asked++
					switch reply {
					case "":
						return "", nil, broken
					case "textchanges other=0 own=0":
						return reply, nil, nil
					}
					return reply, []string{"own"}, nil
				})
				require.ErrorIs(t, err, c.err)
				assert.Equal(t, c.own, own)
				assert.Equal(t, c.asked, asked)
			})
		})
	}
}
