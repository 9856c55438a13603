// Process-list-file prints the id and the name of each process in a saved memory
// image: process-list -file.
//
//	process-list-file file
package main

import (
	"context"
	"os"

	"github.com/vmprobes/vmprobes/examples/internal/guest"
	"github.com/vmprobes/vmprobes/xenaccess"
)

func main() {
	os.Args = append([]string{os.Args[0], "-file"}, os.Args[1:]...)
	guest.Main(nil, false, func(_ context.Context, g *xenaccess.Guest, _ []string) error {
		return guest.ListProcesses(os.Stdout, g)
	})
}
