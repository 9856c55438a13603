// Map-addr prints the page of guest memory that holds a kernel virtual address.
//
//	map-addr [-file] guest hexadecimal-address
package main

import (
	"context"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/vmprobes/vmprobes/examples/internal/guest"
	"github.com/vmprobes/vmprobes/xenaccess"
)

func main() { guest.Main(guest.Command{Params: "address", Run: mapAddr}) }

func mapAddr(_ context.Context, out io.Writer, g *xenaccess.Guest, args []string) error {
	addr, err := strconv.ParseUint(strings.TrimPrefix(args[0], "0x"), 16, 64)
	if err != nil {
		return fmt.Errorf("address %q: want a hexadecimal number of at most 16 digits", args[0])
	}
	return guest.MapPage(out, g, addr)
}
