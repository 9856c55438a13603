// Process-data prints where the parts of a process' memory are, and the first
// page of its code.
//
//	process-data [-file] guest pid
package main

import (
	"context"
	"fmt"
	"io"
	"strconv"

	"github.com/vmprobes/vmprobes/examples/internal/guest"
	"github.com/vmprobes/vmprobes/xenaccess"
)

func main() { guest.Main(guest.Command{Params: "pid", Run: show}) }

func show(_ context.Context, out io.Writer, g *xenaccess.Guest, args []string) error {
	pid, err := strconv.Atoi(args[0])
	if err != nil {
		return fmt.Errorf("pid %q: want a number", args[0])
	}
	t, err := g.Linux().Process(pid)
	if err != nil {
		return err
	}
	l, err := g.Linux().Layout(t)
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "Memory descriptor addresses for pid = %d:\n", pid)
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
		fmt.Fprintf(out, "%s = 0x%.8x\n", f.name, f.addr)
	}
	user, err := g.User(pid)
	if err != nil {
		return err
	}
	page, offset, err := guest.Page(user, l.StartCode)
	if err != nil {
		return err
	}
	guest.Dump(out, page)
	fmt.Fprintf(out, "offset = 0x%x\n", offset)
	return nil
}
