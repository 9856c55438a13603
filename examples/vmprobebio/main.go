// Vmprobebio watches the files that a guest opens: the demonstration of the C
// library, line for line.
//
//	vmprobebio [-symbol do_sys_openat2] [-n count] [-task] [domain]
//
// A Xen domain takes root in dom0; qemu:/path/gdb.sock is a QEMU guest. Ctrl+C
// unregisters the probe.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/vmprobes/vmprobes"
)

var (
	symbol = flag.String("symbol", "do_sys_openat2", "function to probe: do_sys_openat2, do_sys_open, or a system call such as sys_openat")
	count  = flag.Int("n", 0, "end after this many calls, 0: never")
	task   = flag.Bool("task", false, "show the task that made each call, too")
)

var calls int

// arguments returns file name, flags and mode of the call that the vCPU is at.
func arguments(p *vmprobes.Probe, r *vmprobes.Regs) (filename vmprobes.Addr, flags, mode uint64) {
	arg := func(n int) uint64 { return r.Arg(n) }
	name := *symbol
	if strings.HasPrefix(name, "sys_") || strings.HasPrefix(name, "__x64_sys_") {
		// The wrapper of a system call finds its arguments in struct pt_regs.
		arg = func(n int) uint64 {
			v, _ := r.SyscallArg(n)
			return v
		}
		name = strings.TrimPrefix(strings.TrimPrefix(name, "__x64_"), "sys_")
	}
	switch name {
	case "open":
		return vmprobes.Addr(arg(0)), arg(1), arg(2)
	case "do_sys_openat2", "openat2": // (dfd, filename, struct open_how *how)
		flags, _ = p.ReadUint64(vmprobes.Addr(arg(2)))
		mode, _ = p.ReadUint64(vmprobes.Addr(arg(2) + 8))
		return vmprobes.Addr(arg(1)), flags, mode
	default: // openat, do_sys_open: (dfd, filename, flags, mode)
		return vmprobes.Addr(arg(1)), arg(2), arg(3)
	}
}

func sysOpenHandler(p *vmprobes.Probe, r *vmprobes.Regs) vmprobes.Action {
	calls++
	filename, flags, mode := arguments(p, r)
	// A name that isn't in the guest's memory yet shows as an empty string.
	name, _ := p.ReadString(filename, 4096)
	fmt.Printf("[%d] %s() called\n", calls, *symbol)
	fmt.Printf(" -- filename: %08x (%s)\n", uint64(filename), name)
	fmt.Printf(" -- flags: %08x\n", flags)
	_, err := fmt.Printf(" -- mode: %08x\n", mode)
	if *task {
		fmt.Printf(" -- task: %s\n", who(r))
	}
	if calls == *count || err != nil {
		return vmprobes.Stop
	}
	return vmprobes.Continue
}

// who returns the task that made the call, as comm[process id].
func who(r *vmprobes.Regs) string {
	t, err := r.Task()
	if err != nil {
		return "? (" + err.Error() + ")"
	}
	return fmt.Sprintf("%s[%d]", t.Comm, t.TGID)
}

func main() {
	flag.Usage = func() {
		fmt.Fprintf(flag.CommandLine.Output(), "usage: vmprobebio [flags] [domain]\n")
		flag.PrintDefaults()
	}
	flag.Parse()
	domain := "a3guest"
	if flag.NArg() > 0 {
		domain = flag.Arg(0)
	}

	// A reader of the output that goes away must not kill us with a probe armed: the
	// handler stops at the error instead.
	signal.Ignore(syscall.SIGPIPE)
	vp := &vmprobes.Probe{
		DomainName: domain,
		Symbol:     *symbol,
		Pre:        sysOpenHandler,
	}
	if err := vmprobes.Register(vp); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println("vmprobe registered")

	err := vmprobes.Loop(context.Background(), vp)
	if uerr := vmprobes.Unregister(vp); uerr != nil {
		err = errors.Join(err, uerr)
	}
	fmt.Println("vmprobe unregistered")
	fmt.Printf("%s() called %d times.\n", *symbol, calls)
	if err != nil && !errors.Is(err, vmprobes.ErrInterrupted) {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
