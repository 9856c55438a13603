// Dump-memory writes a guest's physical memory to a file, which process-list-file
// and the other examples can read. Where there is no memory, or nothing but zeros, the
// file has a hole, which reads as zeros.
//
// A running guest goes on meanwhile, so that its lists may be broken in the file. With
// -freeze it stands still until all is written. What it was is said at the end.
//
//	dump-memory [-file] [-freeze] guest file
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"

	"github.com/vmprobes/vmprobes"
	"github.com/vmprobes/vmprobes/examples/internal/guest"
	"github.com/vmprobes/vmprobes/paging"
	"github.com/vmprobes/vmprobes/xenaccess"
)

var freeze = flag.Bool("freeze", false, "have a running guest stand still meanwhile, so that the file is its memory at one moment;\nit runs again however this ends, but for SIGKILL")

func main() { guest.Main(guest.Command{Params: "file", Lax: true, Run: save}) }

func save(ctx context.Context, _ io.Writer, g *xenaccess.Guest, args []string) error {
	size, err := g.PhysicalSize()
	if err != nil {
		return err
	}
	// All of the guest's secrets are in there.
	f, err := os.OpenFile(args[0], os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	var absent uint64
	moment := ""
	still := func() (err error) {
		absent, err = dump(ctx, f, g.Physical(), size)
		return err
	}
	switch {
	case !g.Live():
		err = still()
	case *freeze:
		var took time.Duration
		took, err = guest.Frozen(g, still)
		moment = fmt.Sprintf("; of one moment: the guest stood still for %v", took.Round(time.Millisecond))
	default:
		err = still()
		moment = "; not of one moment: the guest ran meanwhile (-freeze has it stand still)"
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	_, err = fmt.Fprintf(os.Stderr, "%d pages, %d of them not there%s\n", size/paging.PageSize, absent, moment)
	return err
}

func dump(ctx context.Context, f *os.File, s xenaccess.Space, size uint64) (absent uint64, err error) {
	page, zeros := make([]byte, paging.PageSize), make([]byte, paging.PageSize)
	for addr := uint64(0); addr < size; addr += paging.PageSize {
		if addr%(1<<20) == 0 && ctx.Err() != nil {
			return absent, context.Cause(ctx)
		}
		_, err := s.Read(addr, page)
		switch {
		case errors.Is(err, vmprobes.ErrDomainGone), errors.Is(err, fs.ErrClosed):
			return absent, err
		case err != nil:
			absent++
			continue
		case bytes.Equal(page, zeros):
			continue
		}
		if _, err := f.WriteAt(page, int64(addr)); err != nil {
			return absent, err
		}
	}
	return absent, f.Truncate(int64(size))
}
