// Map-symbol prints the address of a kernel symbol, and the page of guest memory that
// holds it.
//
//	map-symbol [-file] guest symbol
package main

import (
	"context"
	"fmt"
	"io"

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
	addr, err := g.Symbol(args[0])
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "%s = 0x%.16x\n", args[0], addr)
	return guest.MapPage(out, g, addr)
}
