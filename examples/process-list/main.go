// Process-list prints the id and the name of each process of a guest, from the
// idle task on.
//
//	process-list [-file] guest
package main

import (
	"context"
	"os"

	"github.com/vmprobes/vmprobes/examples/internal/guest"
	"github.com/vmprobes/vmprobes/xenaccess"
)

func main() {
	guest.Main(nil, false, func(_ context.Context, g *xenaccess.Guest, _ []string) error {
		return guest.ListProcesses(os.Stdout, g)
	})
}
