// Package guest is what the introspection examples have in common: a command
// line, the guest that it names, and the hex dump that XenAccess printed.
package guest

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/vmprobes/vmprobes/xenaccess"
)

// Main parses the command line "[-file] guest args…", opens the guest and calls f
// with it and the args, of which there must be as many as there are names. It
// doesn't return.
func Main(names []string, lax bool, f func(ctx context.Context, g *xenaccess.Guest, args []string) error) {
	file := flag.Bool("file", false, "the guest is a file with a saved memory image")
	symbols := flag.String("symbols", "", "file with the kernel's symbols, if not those in its memory")
	types := flag.String("types", "", "file with the kernel's types, if not those in its memory")
	flag.Usage = func() {
		fmt.Fprintf(flag.CommandLine.Output(), "usage: %s [flags] guest %s\n\nguest is a domain's name or id, or another target such as file:PATH.\n\n",
			os.Args[0], strings.Join(names, " "))
		flag.PrintDefaults()
	}
	flag.Parse()
	if flag.NArg() != len(names)+1 {
		flag.Usage()
		os.Exit(2)
	}
	name := flag.Arg(0)
	if *file {
		name = "file:" + name
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, name, &xenaccess.Options{Symbols: *symbols, Types: *types, Lax: lax}, flag.Args()[1:], f)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

func run(ctx context.Context, name string, opts *xenaccess.Options, args []string, f func(context.Context, *xenaccess.Guest, []string) error) error {
	g, err := xenaccess.Open(ctx, name, opts)
	if err != nil {
		return err
	}
	err = f(ctx, g, args)
	if cerr := g.Close(); err == nil {
		err = cerr
	}
	return err
}

// Dump prints b as XenAccess' print_hex did: 16 bytes a line, the offset before
// them, and what is printable behind.
func Dump(w io.Writer, b []byte) {
	for off := 0; off < len(b); off += 16 {
		fmt.Fprintf(w, "%.8x|  ", off)
		row := b[off:min(off+16, len(b))]
		for i := range 16 {
			if i == 8 {
				fmt.Fprint(w, " ")
			}
			if i < len(row) {
				fmt.Fprintf(w, "%.2x ", row[i])
			} else {
				fmt.Fprint(w, "   ")
			}
		}
		fmt.Fprint(w, "  ")
		for _, c := range row {
			if c < ' ' || c > '~' {
				c = '.'
			}
			fmt.Fprintf(w, "%c", c)
		}
		fmt.Fprintln(w)
	}
}

// Page returns a copy of the page of a space that holds addr, and where addr is
// in it.
func Page(s xenaccess.Space, addr uint64) (page []byte, offset int, err error) {
	p, offset, release, err := s.Page(addr)
	if err != nil {
		return nil, 0, err
	}
	defer release()
	return bytes.Clone(p), offset, nil
}

// MapPage prints where addr is in its page of kernel memory, and the page.
func MapPage(w io.Writer, g *xenaccess.Guest, addr uint64) error {
	page, offset, err := Page(g.Kernel(), addr)
	if err != nil {
		return err
	}
	fmt.Fprintf(w, "offset = 0x%.8x\n", offset)
	Dump(w, page)
	return nil
}

// ListProcesses prints the id and the name of each process.
func ListProcesses(w io.Writer, g *xenaccess.Guest) error {
	tasks, err := g.Linux().Processes(true)
	for _, t := range tasks {
		fmt.Fprintf(w, "[%5d] %s\n", t.PID, Printable(t.Comm))
	}
	return err
}

// Printable replaces what a guest could put into a name to harm a terminal.
func Printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return '?'
		}
		return r
	}, s)
}
