// Map-addr prints the page of guest memory that holds a kernel virtual address.
//
//	map-addr [-file] guest hexadecimal-address
package main

import (
	"context"
	"os"
	"strconv"
	"strings"

	"github.com/vmprobes/vmprobes/examples/internal/guest"
	"github.com/vmprobes/vmprobes/xenaccess"
)

func main() {
	guest.Main([]string{"address"}, false, func(_ context.Context, g *xenaccess.Guest, args []string) error {
		addr, err := strconv.ParseUint(strings.TrimPrefix(args[0], "0x"), 16, 64)
		if err != nil {
			return err
		}
		return guest.MapPage(os.Stdout, g, addr)
	})
}
