// Dump-memory writes a guest's physical memory to a file, which process-list-file
// and the other examples can read. Where there is no memory, or nothing but zeros, the
// file has a hole, which reads as zeros.
//
//	dump-memory [-file] guest file
package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"github.com/vmprobes/vmprobes"
	"github.com/vmprobes/vmprobes/examples/internal/guest"
	"github.com/vmprobes/vmprobes/paging"
	"github.com/vmprobes/vmprobes/xenaccess"
)

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
	absent, err := dump(ctx, f, g.Physical(), size)
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	_, err = fmt.Fprintf(os.Stderr, "%d pages, %d of them not there\n", size/paging.PageSize, absent)
	return err
}

func dump(ctx context.Context, f *os.File, s xenaccess.Space, size uint64) (absent int, err error) {
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
