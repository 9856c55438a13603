// Map-symbol prints the address of a kernel symbol, and the page of guest memory that
// holds it.
//
//	map-symbol [-file] guest symbol
package main

import (
	"context"
	"fmt"
	"io"
	"os"

	"github.com/vmprobes/vmprobes/examples/internal/guest"
	"github.com/vmprobes/vmprobes/xenaccess"
)

func main() {
	guest.Main(guest.Command{
		Params: "symbol",
		About:  "\nsymbol is one of the kernel or of a module: NAME, MODULE:NAME, or NAME@2 for the\nsecond of several\n",
		Run:    mapSymbol,
	})
}

func mapSymbol(_ context.Context, out io.Writer, g *xenaccess.Guest, args []string) error {
	s, err := g.Linux().Lookup(args[0])
	if err != nil {
		return err
	}
	if note := s.Note(); note != "" {
		fmt.Fprintln(os.Stderr, note)
	}
	fmt.Fprintf(out, "%s = 0x%.16x\n", s.Name, s.Addr)
	return guest.MapPage(out, g, s.Addr)
}
