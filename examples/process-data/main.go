// Process-data prints where the parts of a process' memory are, and the first
// page of its code.
//
//	process-data [-file] guest pid
package main

import (
	"context"
	"fmt"
	"os"
	"strconv"

	"github.com/vmprobes/vmprobes/examples/internal/guest"
	"github.com/vmprobes/vmprobes/xenaccess"
)

func main() {
	guest.Main([]string{"pid"}, false, func(_ context.Context, g *xenaccess.Guest, args []string) error {
		pid, err := strconv.Atoi(args[0])
		if err != nil {
			return err
		}
		t, err := g.Linux().Process(pid)
		if err != nil {
			return err
		}
		l, err := g.Linux().Layout(t)
		if err != nil {
			return err
		}
		fmt.Printf("Memory descriptor addresses for pid = %d:\n", pid)
		for _, f := range []struct {
			name string
			addr uint64
		}{
			{"start_code", l.StartCode}, {"end_code", l.EndCode},
			{"start_data", l.StartData}, {"end_data", l.EndData},
			{"start_brk", l.StartBrk}, {"brk", l.Brk},
			{"start_stack", l.StartStack},
			{"arg_start", l.ArgStart}, {"arg_end", l.ArgEnd},
			{"env_start", l.EnvStart}, {"env_end", l.EnvEnd},
		} {
			fmt.Printf("%s = 0x%.8x\n", f.name, f.addr)
		}
		user, err := g.User(pid)
		if err != nil {
			return err
		}
		page, offset, err := guest.Page(user, l.StartCode)
		if err != nil {
			return err
		}
		guest.Dump(os.Stdout, page)
		fmt.Printf("offset = 0x%x\n", offset)
		return nil
	})
}
