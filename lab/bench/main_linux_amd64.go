package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"log/slog"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/vmprobes/vmprobes"
	"github.com/vmprobes/vmprobes/internal/console"
	"github.com/vmprobes/vmprobes/lab/labguest"
	"github.com/vmprobes/vmprobes/xenctrl"
)

// symbol is what the guest executes without rest; a NOP is there in its kernel.
const symbol = "do_sys_openat2"

// rdtsc reads the time-stamp counter, which counts instructions under Bochs.
func rdtsc() uint64

// sample is one run of one program.
type sample struct {
	hits     int
	time     time.Duration
	tsc      uint64
	counted  int // hits while system calls were counted
	syscalls uint64
	ioctls   uint64
	polls    uint64 // polls that found nothing, if known
}

func (s sample) rate() float64 { return float64(s.hits) / s.time.Seconds() }

var verbose bool

// pair is a way past a breakpoint, in C and here.
type pair struct {
	name     string
	c        string // argument of the C program
	stepping vmprobes.Stepping
	hits     int
}

func main() {
	log.SetFlags(0)
	log.SetPrefix("bench: ")
	rounds := flag.Int("rounds", 5, "how often each is measured")
	hits := flag.Int("hits", 0, "hits of a measurement (0: what suits the host)")
	loop := flag.String("loop", "/bin/cloop", "the C program")
	count := flag.Bool("count", !labguest.Is("pv"), "count system calls, by the kernel's tracepoints, at whose patching an emulated dom0 on pv now and then locks up")
	only := flag.String("only", "", "measure this way alone")
	flag.BoolVar(&verbose, "v", false, "log what the Session does")
	flag.Parse()
	if err := run(*rounds, *hits, *loop, *only, *count); err != nil {
		log.Fatal(err)
	}
}

func pairs() []pair {
	if labguest.Is("hvm") {
		return []pair{
			{"emulated", "emulate", vmprobes.StepAuto, 800},
			{"out-of-line", "step", vmprobes.StepOutOfLine, 400},
		}
	}
	return []pair{{"emulated", "debugger", vmprobes.StepAuto, 200}}
}

func run(rounds, hits int, loop, only string, count bool) error {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Minute)
	defer cancel()
	host := labguest.Host()
	if host == "" {
		return fmt.Errorf("this is not the lab's dom0: make bench-lab")
	}
	g, err := labguest.Start(ctx, labguest.Config{Name: "bench"})
	if err != nil {
		return err
	}
	defer func() { _ = g.Destroy() }()
	reply, err := g.Command(ctx, "kallsyms "+symbol)
	if err != nil {
		return err
	}
	f := strings.Fields(reply)
	addr, err := strconv.ParseUint(strings.TrimPrefix(f[len(f)-1], "0x"), 16, 64)
	if err != nil || len(f) != 3 {
		return fmt.Errorf("address of %s: %q", symbol, reply)
	}
	if _, err := g.Command(ctx, "textkeep"); err != nil {
		return err
	}
	cache, err := os.MkdirTemp("", "bench-*") // what is found out about the kernel, once
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(cache) }()
	b := &bench{guest: g, addr: addr, loop: loop, host: host, cache: cache}
	if count {
		if b.counters, err = newCounters(); err != nil {
			log.Printf("system calls are not counted: %v", err)
		}
	}
	fmt.Printf("%s, guest %s, %s at %#x\n", host, strings.TrimSpace(g.Ready()), symbol, addr)
	fmt.Println("(the TSC counts instructions under Bochs)")
	for _, p := range pairs() {
		if only != "" && only != p.name {
			continue
		}
		if hits > 0 {
			p.hits = hits
		}
		if err := b.compare(ctx, p, rounds); err != nil {
			return fmt.Errorf("%s: %w", p.name, err)
		}
	}
	if _, err := console.SameText(ctx, g.Output); err != nil {
		return err
	}
	dmesg, err := g.Command(ctx, "dmesg")
	if err != nil {
		return err
	}
	fmt.Println("guest:", dmesg)
	return nil
}

type bench struct {
	guest    *labguest.Guest
	addr     uint64
	loop     string
	host     string
	cache    string
	counters *counters // nil: none
}

// Hits before a measurement, and after it, while system calls are counted.
const (
	warmUp  = 100
	counted = 100
)

// compare measures C and ours in turn, and prints every measurement.
func (b *bench) compare(ctx context.Context, p pair, rounds int) error {
	fmt.Printf("\n%s: %d hits each\n%-6s %10s %10s %12s\n", p.name, p.hits, "", "hits/s", "ratio", "TSC/hit")
	var c, ours []sample
	if _, err := b.guest.Command(ctx, "busy 0"); err != nil {
		return err
	}
	for range rounds {
		s, err := b.measureC(ctx, p)
		if err != nil {
			return fmt.Errorf("the loop in C: %w", err)
		}
		t, err := b.measureOurs(ctx, p)
		if err != nil {
			return fmt.Errorf("ours: %w", err)
		}
		c, ours = append(c, s), append(ours, t)
		fmt.Printf("%-6s %10.1f %10s %12d\n", "C", s.rate(), "", s.tsc/uint64(s.hits))
		fmt.Printf("%-6s %10.1f %10.3f %12d\n", "ours", t.rate(), t.rate()/s.rate(), t.tsc/uint64(t.hits))
	}
	if reply, err := b.guest.Command(ctx, "stop"); err != nil {
		return err
	} else if !strings.Contains(reply, "failed=0") || strings.Contains(reply, "BAD") {
		return fmt.Errorf("the guest is not well: %s", reply)
	}
	m := func(s []sample) float64 { return median(s, sample.rate) }
	fmt.Printf("median: C %.1f, ours %.1f hits/s; ratio of medians %.3f\n", m(c), m(ours), m(ours)/m(c))
	for _, x := range []struct {
		name string
		s    []sample
	}{{"C", c}, {"ours", ours}} {
		if b.counters == nil {
			break
		}
		per := func(f func(sample) uint64) float64 {
			return median(x.s, func(s sample) float64 { return float64(f(s)) / float64(s.counted) })
		}
		fmt.Printf("%-6s %6.2f system calls a hit, of them %.2f hypercalls", x.name,
			per(func(s sample) uint64 { return s.syscalls }), per(func(s sample) uint64 { return s.ioctls }))
		if x.name == "C" && labguest.Is("pv") {
			fmt.Printf(" (%.2f without polls that found nothing)", per(func(s sample) uint64 { return s.ioctls - min(s.polls, s.ioctls) }))
		}
		fmt.Println()
	}
	return nil
}

func median(s []sample, f func(sample) float64) float64 {
	v := make([]float64, len(s))
	for i := range s {
		v[i] = f(s[i])
	}
	slices.Sort(v)
	if n := len(v); n%2 == 0 {
		return (v[n/2-1] + v[n/2]) / 2
	}
	return v[len(v)/2]
}

// measureC runs the C program.
func (b *bench) measureC(ctx context.Context, p pair) (s sample, err error) {
	cmd := exec.CommandContext(ctx, b.loop, p.c, fmt.Sprint(b.guest.DomID()), fmt.Sprintf("%#x", b.addr),
		fmt.Sprint(warmUp), fmt.Sprint(p.hits), fmt.Sprint(counted))
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) } // it has to clean up
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return s, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return s, err
	}
	if err := cmd.Start(); err != nil {
		return s, err
	}
	defer func() {
		_ = in.Close()
		if e := cmd.Wait(); e != nil {
			err = errors.Join(err, fmt.Errorf("%s: %w", b.loop, e))
		}
	}()
	r := bufio.NewReader(out)
	// A guest that somebody left paused has no hits, and the loop would wait for ever.
	slow := time.AfterFunc(3*time.Minute, func() { b.complain(ctx); _ = cmd.Process.Signal(os.Interrupt) })
	defer slow.Stop()
	var ns int64
	if _, err := fmt.Fscanf(r, "timed %d %d %d\n", &s.hits, &ns, &s.tsc); err != nil {
		return s, fmt.Errorf("what it timed: %w", err)
	}
	s.time = time.Duration(ns)
	c, err := b.counters.of(cmd.Process.Pid)
	if err != nil {
		return s, err
	}
	defer c.close()
	c.start()
	if _, err := io.WriteString(in, "\n"); err != nil {
		return s, err
	}
	if _, err := fmt.Fscanf(r, "counted %d\n", &s.polls); err != nil {
		return s, fmt.Errorf("what it counted: %w", err)
	}
	c.stop()
	s.counted = counted
	s.syscalls, s.ioctls = c.read()
	_, err = io.WriteString(in, "\n")
	return s, err
}

// complain says what state a guest is in that has no hits.
func (b *bench) complain(ctx context.Context) {
	h, err := xenctrl.Open()
	if err != nil {
		log.Print(err)
		return
	}
	defer func() { _ = h.Close() }()
	id := xenctrl.DomID(b.guest.DomID())
	was, err1 := h.Domain(id)
	time.Sleep(time.Second)
	is, err2 := h.Domain(id)
	var c xenctrl.VCPUContext
	err3 := h.VCPUContext(id, 0, &c)
	log.Printf("no hits: the guest's flags are %#x, it ran %v in a second, and is at %#x (%v)",
		uint32(is.Flags), time.Duration(is.CPUTime-was.CPUTime), c.User.RIP, errors.Join(err1, err2, err3))
}

// measureOurs does the same with a Session, in this process.
func (b *bench) measureOurs(ctx context.Context, p pair) (s sample, err error) {
	opts := vmprobes.Options{Stepping: p.stepping, Cache: b.cache, NoGuardian: true}
	if verbose {
		opts.Logger = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	session, err := vmprobes.Open(ctx, b.guest.Name(), &opts)
	if err != nil {
		return s, err
	}
	defer func() {
		if e := session.Close(); err == nil {
			err = e
		}
	}()
	var c *counts
	var begin time.Time
	var tsc uint64
	n := 0
	probe := &vmprobes.Probe{
		Symbol: symbol,
		Pre: func(*vmprobes.Probe, *vmprobes.Regs) vmprobes.Action {
			n++
			switch n {
			case warmUp:
				begin, tsc = time.Now(), rdtsc()
			case warmUp + p.hits:
				s.tsc = rdtsc() - tsc
				s.time = time.Since(begin)
				s.hits = p.hits
				if c, err = b.counters.of(os.Getpid()); err != nil {
					return vmprobes.Stop
				}
				c.start()
			case warmUp + p.hits + counted:
				c.stop()
				s.counted = counted
				s.syscalls, s.ioctls = c.read()
				c.close()
				return vmprobes.Stop
			}
			return vmprobes.Continue
		},
	}
	if e := session.Register(probe); e != nil {
		return s, e
	}
	if e := session.Loop(ctx); e != nil {
		return s, e
	}
	if err != nil {
		return s, err
	}
	if s.counted == 0 && b.counters != nil || s.hits == 0 {
		return s, fmt.Errorf("the loop ended after %d hits", n)
	}
	return s, nil
}
