// Guest-info prints what can be found out about a guest from its memory alone,
// how it was found, and why it is believed.
//
//	guest-info [-file] guest
package main

import (
	"context"
	"fmt"
	"io"

	"github.com/vmprobes/vmprobes/examples/internal/guest"
	"github.com/vmprobes/vmprobes/xenaccess"
)

func main() { guest.Main(guest.Command{Explains: true, Run: info}) }

func info(_ context.Context, out io.Writer, g *xenaccess.Guest, _ []string) error {
	k := g.Linux()
	// Each of these climbs another rung; Explain tells what came of it.
	tasks, terr := k.Processes(false)
	mods, merr := k.Modules()
	calls, cerr := k.Syscalls()
	_, perr := k.FtraceSites()
	for _, r := range k.Explain() {
		fmt.Fprintln(out, r)
	}
	for _, part := range []struct {
		name  string
		count int
		err   error
	}{
		{"processes", len(tasks), terr}, {"modules", len(mods), merr}, {"system calls", len(calls), cerr},
	} {
		if part.err != nil {
			fmt.Fprintf(out, "%-14s not found: %v\n", part.name+":", part.err)
			continue
		}
		fmt.Fprintf(out, "%-14s %d\n", part.name+":", part.count)
	}
	return perr
}
