// Opens shows which files a guest opens, and which of them it couldn't: a
// Session with two probes, one at the start of do_sys_openat2 and one at
// do_filp_open, read as hits, each with the task that hit.
//
//	opens [-for duration] [-symbols file] domain
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/vmprobes/vmprobes"
)

func main() {
	log.SetFlags(0)
	duration := flag.Duration("for", 0, "end after this time, 0: at Ctrl+C")
	symbols := flag.String("symbols", "", "the guest's vmlinux, vmlinuz, System.map or saved kallsyms")
	verbose := flag.Bool("v", false, "say what happens")
	flag.Parse()
	if flag.NArg() != 1 {
		log.Fatal("usage: opens [flags] domain")
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	// A reader of our output that goes away must not kill us with probes armed.
	signal.Ignore(syscall.SIGPIPE)
	if *duration > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, *duration)
		defer cancel()
	}
	if err := run(ctx, flag.Arg(0), *symbols, *verbose); err != nil {
		log.Fatal(err)
	}
}

func run(ctx context.Context, domain, symbols string, verbose bool) (err error) {
	opts := &vmprobes.Options{Symbols: symbols}
	if verbose {
		opts.Logger = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	s, err := vmprobes.Open(ctx, domain, opts)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()

	open := &vmprobes.Probe{Symbol: "do_sys_openat2"}
	lookup := &vmprobes.Probe{Symbol: "do_filp_open"}
	if err := s.Register(open, lookup); err != nil {
		return err
	}
	d := s.Domain()
	fmt.Printf("watching %s (domain %d, %v, %d vCPUs)\n", d.Name, d.ID, d.Kind, d.VCPUs)
	began := time.Now()
	for hit, err := range s.Hits(ctx) {
		if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
			break
		}
		if err != nil {
			return err
		}
		if hit.Probe == open {
			name, err := open.ReadString(vmprobes.Addr(hit.Regs.Arg(1)), 4096)
			if err != nil {
				name = err.Error()
			}
			fmt.Printf("%10.6f cpu%d %s open %q\n", time.Since(began).Seconds(), hit.VCPU, who(hit), name)
		} else {
			// do_filp_open(int dfd, struct filename *pathname, …): the name comes first.
			p, _ := lookup.ReadUint64(vmprobes.Addr(hit.Regs.Arg(1)))
			name, _ := lookup.ReadString(vmprobes.Addr(p), 4096)
			fmt.Printf("%10.6f cpu%d %s look up %q\n", time.Since(began).Seconds(), hit.VCPU, who(hit), name)
		}
	}
	fmt.Printf("%d opened, %d looked up; %+v\n", open.Stats().Hits, lookup.Stats().Hits, s.Stats())
	return nil
}

// who returns the task that hit.
func who(hit *vmprobes.Hit) string {
	t, err := hit.Regs.Task()
	if err != nil {
		return "?"
	}
	return fmt.Sprintf("%q[%d]", t.Comm, t.PID)
}
