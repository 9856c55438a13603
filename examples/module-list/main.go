// Module-list prints the names of a guest's loaded kernel modules, the one loaded
// last first.
//
//	module-list [-file] guest
package main

import (
	"context"
	"fmt"
	"io"

	"github.com/vmprobes/vmprobes/examples/internal/cli"
	"github.com/vmprobes/vmprobes/examples/internal/guest"
	"github.com/vmprobes/vmprobes/xenaccess"
)

func main() { guest.Main(guest.Command{Run: list}) }

func list(_ context.Context, out io.Writer, g *xenaccess.Guest, _ []string) error {
	mods, err := g.Linux().Modules()
	for _, m := range mods {
		fmt.Fprintln(out, cli.Escape(m.Name))
	}
	return err
}
