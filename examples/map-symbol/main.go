// Map-symbol prints the page of guest memory that holds a kernel symbol.
//
//	map-symbol [-file] guest symbol
package main

import (
	"context"
	"os"

	"github.com/vmprobes/vmprobes/examples/internal/guest"
	"github.com/vmprobes/vmprobes/xenaccess"
)

func main() {
	guest.Main([]string{"symbol"}, false, func(_ context.Context, g *xenaccess.Guest, args []string) error {
		addr, err := g.Symbol(args[0])
		if err != nil {
			return err
		}
		return guest.MapPage(os.Stdout, g, addr)
	})
}
