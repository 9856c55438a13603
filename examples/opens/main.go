// Opens shows which files a guest opens, and which names its kernel looks up for
// that: a Session with two probes, one at the start of do_sys_openat2 and one at
// do_filp_open (do_file_open since Linux 7.0), read as hits, each with the task that hit.
//
//	opens [-for duration] [-json] [-symbols file] guest
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"time"

	"github.com/vmprobes/vmprobes"
	"github.com/vmprobes/vmprobes/examples/internal/cli"
)

var (
	duration = flag.Duration("for", 0, "end after this time, 0: at Ctrl+C")
	asJSON   = flag.Bool("json", false, "print each hit as a JSON object")
	symbols  = flag.String("symbols", "", "the guest's vmlinux, vmlinuz, System.map or saved kallsyms")
	verbose  = flag.Bool("v", false, "say what happens")
)

func main() {
	cli.Main("guest", cli.Guests, func(ctx context.Context, out io.Writer, args []string) error {
		opts := &vmprobes.Options{Symbols: *symbols}
		if *verbose {
			opts.Logger = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
		}
		return vmprobes.RunFunc(ctx, args[0], opts, func(ctx context.Context, s *vmprobes.Session) error {
			if *duration == 0 {
				return watch(ctx, s, out)
			}
			timed, cancel := context.WithTimeout(ctx, *duration)
			defer cancel()
			err := watch(timed, s, out)
			if ctx.Err() == nil && errors.Is(err, context.DeadlineExceeded) {
				return nil
			}
			return err
		})
	})
}

// watch prints hits until ctx is done.
func watch(ctx context.Context, s *vmprobes.Session, out io.Writer) error {
	open := &vmprobes.Probe{Symbol: "do_sys_openat2", Name: "open"}
	lookup := &vmprobes.Probe{Symbol: lookupFunction(s.Lookup), Name: "look up"}
	if err := s.Register(open, lookup); err != nil {
		return err
	}
	if !*asJSON {
		fmt.Fprintf(out, "watching %v\n", s.Domain())
	}
	began := time.Now()
	var err error
	for hit, herr := range s.Hits(ctx) {
		if err = herr; err != nil {
			break
		}
		who := "?"
		if t, err := hit.Regs.Task(); err == nil {
			who = t.String()
		}
		name := path(hit.Probe, hit.Regs.Arg(1))
		if *asJSON {
			err = json.NewEncoder(out).Encode(map[string]any{"hit": hit, "task": who, "path": name})
		} else {
			_, err = fmt.Fprintf(out, "%10.6f cpu%d %s %s %q\n", hit.Time.Sub(began).Seconds(), hit.VCPU, who, hit.Probe.Name, name)
		}
		if err != nil {
			break
		}
	}
	if !*asJSON {
		fmt.Fprintf(out, "%d opened, %d looked up; %+v\n", open.Stats().Hits, lookup.Stats().Hits, s.Stats())
	}
	return err
}

// lookupFunction returns the function of this kernel that looks a name up.
func lookupFunction(lookup func(symbol string) (vmprobes.Addr, error)) string {
	const old = "do_filp_open"
	if _, err := lookup(old); errors.Is(err, vmprobes.ErrSymbolNotFound) {
		return "do_file_open"
	}
	return old
}

// path returns the name that a hit is about: do_sys_openat2(int dfd, const char
// *filename, …), and do_filp_open or do_file_open(int dfd, struct filename *pathname, …),
// in which the pointer to the name comes first.
func path(p *vmprobes.Probe, arg uint64) string {
	if p.Name == "look up" {
		arg, _ = p.ReadUint64(arg)
	}
	name, err := p.ReadString(arg, 4096)
	if err != nil {
		return err.Error() // not in memory yet, mostly
	}
	return name
}
