// Returns shows how long calls of a guest's functions take and what they return: return
// probes at all functions whose names match a pattern, as in path.Match.
//
//	returns [-for duration] [-each] [-symbols file] guest pattern
//
// "vfs_*" are functions of the kernel, "xfs:xfs_*" those of a module.
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/vmprobes/vmprobes"
	"github.com/vmprobes/vmprobes/examples/internal/cli"
)

var (
	duration = flag.Duration("for", 0, "end after this time, 0: at Ctrl+C")
	each     = flag.Bool("each", false, "print each call")
	symbols  = flag.String("symbols", "", "the guest's vmlinux, vmlinuz, System.map or saved kallsyms")
	verbose  = flag.Bool("v", false, "say what happens")
)

func main() {
	cli.Main("guest pattern", cli.Guests, func(ctx context.Context, out io.Writer, args []string) error {
		opts := &vmprobes.Options{Symbols: *symbols}
		if *verbose {
			opts.Logger = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
		}
		return vmprobes.RunFunc(ctx, args[0], opts, func(ctx context.Context, s *vmprobes.Session) error {
			if *duration == 0 {
				return watch(ctx, s, out, args[1])
			}
			timed, cancel := context.WithTimeout(ctx, *duration)
			defer cancel()
			err := watch(timed, s, out, args[1])
			if ctx.Err() == nil && errors.Is(err, context.DeadlineExceeded) {
				return nil
			}
			return err
		})
	})
}

// A function is what is known of the calls of one.
type function struct {
	name           string
	out            io.Writer // of each call, or nil
	calls, failed  int
	total, longest time.Duration
}

// watch follows calls until ctx is done.
func watch(ctx context.Context, s *vmprobes.Session, out io.Writer, pattern string) error {
	probes, refused, err := s.RegisterMatching(pattern, func(symbol string) *vmprobes.Probe {
		f := &function{name: symbol}
		if *each {
			f.out = out
		}
		rp := &vmprobes.ReturnProbe{Symbol: symbol, Cookie: f, Entry: f.entry, Return: f.returned, Abandoned: f.abandoned}
		return rp.Probe()
	})
	if err != nil {
		return err
	}
	if *verbose || len(probes) == 0 {
		for name, why := range refused {
			fmt.Fprintf(os.Stderr, "%s: %v\n", name, why)
		}
	}
	if len(probes) == 0 {
		return fmt.Errorf("none of %d functions can be followed", len(refused))
	}
	fmt.Fprintf(out, "following %d functions of %v, %d can't be\n", len(probes), s.Domain(), len(refused))
	err = s.Loop(ctx)
	var missed uint64
	functions := make([]*function, len(probes))
	for i, p := range probes {
		functions[i], _ = p.Cookie.(*function)
		missed += p.Stats().Missed
	}
	_, perr := fmt.Fprintf(out, "%s%d calls were missed\n", table(functions), missed)
	return errors.Join(err, perr)
}

// entry keeps what the call was, whose arguments may be others when it returns.
func (f *function) entry(a *vmprobes.Activation, r *vmprobes.Regs) vmprobes.Action {
	if f.out == nil {
		return vmprobes.Continue
	}
	call := f.name
	if c, err := a.Probe().Call(r); err == nil {
		call = c.String()
	}
	a.Data = call
	return vmprobes.Continue
}

func (f *function) returned(a *vmprobes.Activation, r *vmprobes.Regs) vmprobes.Action {
	f.add(a.Duration(), r.Result())
	return f.show(a, fmt.Sprintf("= %s, %v", result(r.Result()), a.Duration()))
}

// add counts a call.
func (f *function) add(took time.Duration, result uint64) {
	f.calls++
	f.total += took
	f.longest = max(f.longest, took)
	if errno(result) {
		f.failed++
	}
}

func (f *function) abandoned(a *vmprobes.Activation, why error) vmprobes.Action {
	return f.show(a, "doesn't return: "+why.Error())
}

// show prints a call and how it has ended.
func (f *function) show(a *vmprobes.Activation, end string) vmprobes.Action {
	if f.out == nil {
		return vmprobes.Continue
	}
	_, pid, _ := a.Task()
	_, err := fmt.Fprintf(f.out, "[%d] %*s%v %s\n", pid, 2*a.Depth(), "", a.Data, end)
	return a.Probe().Fail(err)
}

// errno reports whether a result is one of the kernel's errors.
func errno(v uint64) bool { return int64(v) < 0 && int64(v) >= -4095 }

// result is a number, or an address.
func result(v uint64) string {
	if errno(v) || v < 1<<32 {
		return fmt.Sprint(int64(v))
	}
	return fmt.Sprintf("%#x", v)
}

// table has a line for each function that was called: first those that took longest together.
func table(functions []*function) string {
	called := slices.DeleteFunc(slices.Clone(functions), func(f *function) bool { return f.calls == 0 })
	slices.SortFunc(called, func(f, g *function) int {
		return cmp.Or(cmp.Compare(g.total, f.total), cmp.Compare(f.name, g.name))
	})
	var text strings.Builder
	fmt.Fprintf(&text, "%8s %8s %12s %12s  %s\n", "calls", "failed", "mean", "longest", "function")
	for _, f := range called {
		fmt.Fprintf(&text, "%8d %8d %12v %12v  %s\n", f.calls, f.failed, (f.total / time.Duration(f.calls)).Round(100*time.Nanosecond), f.longest.Round(100*time.Nanosecond), f.name)
	}
	return text.String()
}
