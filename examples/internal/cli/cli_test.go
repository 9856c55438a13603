package cli

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"testing"

	"github.com/stretchr/testify/assert"
)

// failing is output of which only the first writes succeed.
type failing struct {
	n   int
	err error
}

func (f *failing) Write(b []byte) (int, error) {
	if f.n--; f.n < 0 {
		return 0, f.err
	}
	return len(b), nil
}

func TestStatus(t *testing.T) {
	full := errors.New("no space")
	other := errors.New("something else")
	waits := func(ctx context.Context, out io.Writer, _ []string) error {
		for ctx.Err() == nil {
			fmt.Fprintln(out, "a line")
		}
		return context.Cause(ctx)
	}
	for name, c := range map[string]struct {
		args    []string
		program Program
		stdout  io.Writer
		status  int
		stderr  string
	}{
		"good":            {[]string{"x"}, func(context.Context, io.Writer, []string) error { return nil }, new(bytes.Buffer), 0, ""},
		"fails":           {[]string{"x"}, func(context.Context, io.Writer, []string) error { return other }, new(bytes.Buffer), 1, "prog: something else\n"},
		"output fails":    {[]string{"x"}, waits, &failing{3, full}, 1, "prog: no space\n"},
		"nobody asked":    {[]string{"x"}, func(_ context.Context, out io.Writer, _ []string) error { fmt.Fprintln(out); return nil }, &failing{0, full}, 1, "prog: no space\n"},
		"both":            {[]string{"x"}, func(_ context.Context, out io.Writer, _ []string) error { fmt.Fprintln(out); return other }, &failing{0, full}, 1, "prog: something else\nno space\n"},
		"optional":        {[]string{"x", "y"}, func(_ context.Context, _ io.Writer, args []string) error { return errors.New(args[1]) }, io.Discard, 1, "prog: y\n"},
		"help not read":   {[]string{"-h"}, nil, &failing{0, full}, 1, "prog: no space\n"},
		"help, and a bit": {[]string{"-h", "x"}, nil, io.Discard, 0, ""},
	} {
		var stderr bytes.Buffer
		got := status(append([]string{"/bin/prog"}, c.args...), flag.NewFlagSet("", flag.ExitOnError), "a [b]", "", c.program, c.stdout, &stderr)
		assert.Equal(t, c.status, got, name)
		assert.Equal(t, c.stderr, stderr.String(), name)
	}
}

func TestEscape(t *testing.T) {
	assert.Equal(t, `/tmp/a "b" c`, Escape(`/tmp/a "b" c`))
	assert.Equal(t, `\x1b]0;owned\a`, Escape("\x1b]0;owned\a"))
	assert.Equal(t, `\xff\u202e`, Escape("\xff\u202e"))
	assert.Equal(t, `\\x1b`, Escape(`\x1b`))
}
