// Package cli is what the example programs have in common: a command line, output
// whose failure ends the program, and an exit status that tells the truth.
package cli

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/vmprobes/vmprobes/internal/terminal"
)

// Exit statuses.
const (
	failed = 1
	usage  = 2
)

// Guests says how guests are named, for a program's usage.
const Guests = `guest is one of
  NAME or ID                  a Xen domain, as "xl list" shows it (xen:NAME if there is a colon in it)
  qemu:PATH, qemu:HOST:PORT   a QEMU guest, by the socket of its gdbstub
  qemu+monitor:PATH           a QEMU guest, by the socket of its monitor, HMP or QMP
`

// A Program does the work of an example. What it prints goes to out: once a write has
// failed ctx is done, with the error as its cause.
type Program func(ctx context.Context, out io.Writer, args []string) error

// Main parses the command line, whose flags have been defined with package flag, calls
// the program, and exits: with 0, with 1 if the program or its output failed, with 2
// after a wrong command line. params names the arguments, as in "guest symbol"; those
// in brackets may be left out. about is more of the usage.
func Main(params, about string, program Program) {
	// A reader of our output that goes away must not kill us with probes armed, but
	// have the write fail.
	signal.Ignore(syscall.SIGPIPE)
	os.Exit(status(os.Args, flag.CommandLine, params, about, program, os.Stdout, os.Stderr))
}

func status(args []string, flags *flag.FlagSet, params, about string, program Program, stdout, stderr io.Writer) int {
	name := filepath.Base(args[0])
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	out := &output{w: stdout, cancel: cancel}
	help := func(w io.Writer) {
		fmt.Fprintf(w, "usage: %s [flags] %s\n\n%s\nflags:\n", name, params, about)
		flags.SetOutput(w)
		flags.PrintDefaults()
	}
	flags.Init(name, flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	flags.Usage = func() {}
	switch err := flags.Parse(args[1:]); {
	case errors.Is(err, flag.ErrHelp):
		help(out)
		return report(out.err, name, stderr)
	case err != nil:
		fmt.Fprintf(stderr, "%s: %v\n", name, err)
		help(stderr)
		return usage
	}
	if err := count(flags.Args(), strings.Fields(params)); err != nil {
		fmt.Fprintf(stderr, "%s: %v\n", name, err)
		help(stderr)
		return usage
	}
	err := program(ctx, out, flags.Args())
	if out.err != nil && !errors.Is(err, out.err) {
		err = errors.Join(err, out.err)
	}
	return report(err, name, stderr)
}

// count checks the number of arguments.
func count(args, params []string) error {
	needed := 0
	for _, p := range params {
		if !strings.HasPrefix(p, "[") {
			needed++
		}
	}
	if len(args) < needed {
		return fmt.Errorf("no %s is given", params[len(args)])
	}
	if len(args) > len(params) {
		extra := args[len(params)]
		if strings.HasPrefix(extra, "-") {
			return fmt.Errorf("%s comes too late: flags stand before the arguments", extra)
		}
		return fmt.Errorf("%q is one argument too many", extra)
	}
	return nil
}

func report(err error, name string, stderr io.Writer) int {
	if err == nil {
		return 0
	}
	fmt.Fprintf(stderr, "%s: %s\n", name, terminal.Harmless(err.Error()))
	return failed
}

// An output is a program's standard output. It keeps its first error.
type output struct {
	w      io.Writer
	cancel context.CancelCauseFunc
	err    error
}

func (o *output) Write(b []byte) (n int, err error) {
	if o.err != nil {
		return 0, o.err
	}
	if n, err = o.w.Write(b); err != nil {
		o.err = err
		o.cancel(err)
	}
	return n, err
}

// Escape makes bytes of a guest harmless to a terminal: what isn't printable ASCII is
// written as in Go, "\x1b".
func Escape(s string) string {
	q := strconv.QuoteToASCII(s)
	return strings.ReplaceAll(q[1:len(q)-1], `\"`, `"`)
}
