// Module-list prints the names of a guest's loaded kernel modules, the one loaded
// last first.
//
//	module-list [-file] guest
package main

import (
	"context"
	"fmt"

	"github.com/vmprobes/vmprobes/examples/internal/guest"
	"github.com/vmprobes/vmprobes/xenaccess"
)

func main() {
	guest.Main(nil, false, func(_ context.Context, g *xenaccess.Guest, _ []string) error {
		mods, err := g.Linux().Modules()
		for _, m := range mods {
			fmt.Println(guest.Printable(m.Name))
		}
		return err
	})
}
