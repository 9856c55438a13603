// Package guest is what the introspection examples have in common: the guest that
// their command line names, and the hex dump that XenAccess printed.
package guest

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/vmprobes/vmprobes/examples/internal/cli"
	"github.com/vmprobes/vmprobes/linux"
	"github.com/vmprobes/vmprobes/xenaccess"
)

// A Command is a program that looks into a guest.
type Command struct {
	Params string // names of the arguments behind the guest's
	About  string // them, for the usage
	File   bool   // the guest is always a file
	Lax    bool   // it may be one without a Linux kernel
	// Explains: what it prints says where all that is known comes from.
	Explains bool
	Run      func(ctx context.Context, out io.Writer, g *xenaccess.Guest, args []string) error
}

// Main parses the command line "[flags] guest params…", runs c and exits.
func Main(c Command) {
	about := "guest is the path of a saved memory image\n"
	file, first := &c.File, "file "
	if !c.File {
		about = cli.Guests + "  file:PATH                   a saved memory image: of xl dump-core, QEMU, LiME, AVML, kdump\n" +
			"                              or VMware, or flat (file:PATH?raw is flat whatever it begins\n" +
			"                              with; ?hole=pc or ?hole=q35 has the hole below 4 GiB of such a\n" +
			"                              machine, ?hole=ADDRESS another one; ?skip=BYTES are not memory)\n"
		file, first = flag.Bool("file", false, "the guest is the path of a saved memory image"), "guest "
	}
	symbols := flag.String("symbols", "", "file with the kernel's symbols, if not those in its memory")
	types := flag.String("types", "", "file with the kernel's types, if not those in its memory")
	cli.Main(first+c.Params, about+c.About, func(ctx context.Context, out io.Writer, args []string) error {
		// Nothing is changed in a guest that is looked into, but a QEMU guest stands
		// still at times, and any with Frozen.
		ctx, stop := signal.NotifyContext(ctx, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT)
		defer stop()
		name := args[0]
		if *file {
			name = "file:" + name
		}
		return run(ctx, out, name, &xenaccess.Options{Symbols: *symbols, Types: *types, Lax: c.Lax}, args[1:], c)
	})
}

func run(ctx context.Context, out io.Writer, name string, opts *xenaccess.Options, args []string, c Command) (err error) {
	g, err := xenaccess.Open(ctx, name, opts)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, g.Close()) }()
	for _, w := range g.Warnings() {
		fmt.Fprintf(os.Stderr, "%s: warning: %s\n", filepath.Base(os.Args[0]), cli.Escape(w))
	}
	w := bufio.NewWriter(out)
	err = errors.Join(c.Run(ctx, w, g, args), w.Flush())
	if !c.Explains {
		for _, n := range g.Notes() {
			fmt.Fprintf(os.Stderr, "%s: note: not from the guest itself: %s\n", filepath.Base(os.Args[0]), n)
		}
	}
	return err
}

// Frozen has the guest stand still while f runs, and returns for how long. Whatever ends f,
// a panic too, the guest runs again; so does it after each signal that Main catches, if f
// obeys its context, and Ctrl+Z is ignored meanwhile.
func Frozen(g *xenaccess.Guest, f func() error) (took time.Duration, err error) {
	defer ignoreStop()()
	if err := g.Freeze(); err != nil {
		return 0, err
	}
	begin := time.Now()
	defer func() {
		terr := g.Thaw()
		for try := 0; terr != nil && try < 10; try++ {
			time.Sleep(100 * time.Millisecond)
			terr = g.Thaw()
		}
		took, err = time.Since(begin), errors.Join(err, terr)
	}()
	return 0, f()
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

// Long is the flag for a long list of processes.
func Long() *bool {
	return flag.Bool("l", false, "show the parent, the user and the state (Z: a zombie) of each process, too, and ? for what isn't known")
}

// ListProcesses returns a program that prints the id and the name of each process.
func ListProcesses(long *bool) func(context.Context, io.Writer, *xenaccess.Guest, []string) error {
	return func(_ context.Context, w io.Writer, g *xenaccess.Guest, _ []string) error {
		tasks, err := g.Linux().Processes(true)
		for _, t := range tasks {
			if *long {
				fmt.Fprintf(w, "[%5d] %s\n", t.PID, describe(t))
			} else {
				fmt.Fprintf(w, "[%5d] %s\n", t.PID, cli.Escape(t.Name()))
			}
		}
		return err
	}
}

func describe(t linux.Task) string {
	known := func(f linux.Fields, v any) string {
		if t.Unknown&f != 0 {
			return "?"
		}
		return fmt.Sprint(v)
	}
	state := "-"
	if t.Exited {
		state = "Z"
	}
	s := fmt.Sprintf("%5s %5s %s %s", known(linux.FieldPPID, t.PPID), known(linux.FieldUID, t.UID), known(linux.FieldExited, state), cli.Escape(t.Name()))
	if t.Err != nil {
		s += fmt.Sprintf(" (%s)", cli.Escape(t.Err.Error()))
	}
	return s
}
