// Vmprobebio watches the files that a guest opens: the demonstration of the C
// library, with flags, and the task that made each call, added.
//
//	vmprobebio [-symbol do_sys_openat2] [-n count] [-task] [guest]
//
// A Xen domain takes the rights of root in dom0; qemu:/path/gdb.sock is a QEMU guest.
// Ctrl+C unregisters the probe.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/vmprobes/vmprobes"
	"github.com/vmprobes/vmprobes/examples/internal/cli"
)

var (
	symbol = flag.String("symbol", "do_sys_openat2", "`function` to probe: do_sys_openat2, do_sys_open, or a system call such as sys_openat;\nFUNCTION+OFFSET is an instruction in it")
	count  = flag.Int("n", 0, "end after this many calls, 0: never")
	task   = flag.Bool("task", false, "show the task that made each call, too")
)

// A watch is what is printed, and how far it has come.
type watch struct {
	out      io.Writer
	function string
	calls    int
}

func main() {
	cli.Main("[guest]", cli.Guests+"and a3guest if it is left out.\n", func(ctx context.Context, out io.Writer, args []string) error {
		vp, err := vmprobes.ParseProbe(*symbol)
		if err != nil {
			return err
		}
		w := &watch{out: out, function: vp.Symbol}
		vp.Pre = w.sysOpenHandler
		vp.DomainName = "a3guest"
		if len(args) > 0 {
			vp.DomainName = args[0]
		}
		if strings.TrimPrefix(vp.Symbol, "__x64_") == "sys_open" {
			fmt.Fprintln(os.Stderr, "vmprobebio: few programs still make the system call open: -symbol do_sys_openat2 sees every file that is opened")
		}

		if err := vmprobes.Register(vp); err != nil {
			return err
		}
		fmt.Fprintln(out, "vmprobe registered")

		err = vmprobes.Loop(ctx, vp)
		if errors.Is(err, vmprobes.ErrInterrupted) {
			err = nil
		}
		err = errors.Join(err, vmprobes.Unregister(vp))
		fmt.Fprintln(out, "vmprobe unregistered")
		fmt.Fprintf(out, "%s() called %d times.\n", *symbol, w.calls)
		return err
	})
}

func (w *watch) sysOpenHandler(p *vmprobes.Probe, r *vmprobes.Regs) vmprobes.Action {
	w.calls++
	filename, flags, mode := w.arguments(p, r)
	// A name that isn't in the guest's memory yet shows as an empty string.
	name, _ := p.ReadString(filename, 4096)
	fmt.Fprintf(w.out, "[%d] %s() called\n", w.calls, *symbol)
	fmt.Fprintf(w.out, " -- filename: %08x (%s)\n", filename, cli.Escape(name))
	fmt.Fprintf(w.out, " -- flags: %08x\n", flags)
	_, err := fmt.Fprintf(w.out, " -- mode: %08x\n", mode)
	if *task {
		_, err = fmt.Fprintf(w.out, " -- task: %s\n", who(r))
	}
	if w.calls == *count {
		return vmprobes.Stop
	}
	return p.Fail(err)
}

// arguments returns file name, flags and mode of the call that the vCPU is at.
func (w *watch) arguments(p *vmprobes.Probe, r *vmprobes.Regs) (filename vmprobes.Addr, flags, mode uint64) {
	arg := r.Arg
	name := w.function
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
		return arg(0), arg(1), arg(2)
	case "do_sys_openat2", "openat2": // (dfd, filename, struct open_how *how)
		flags, _ = p.ReadUint64(arg(2))
		mode, _ = p.ReadUint64(arg(2) + 8)
		return arg(1), flags, mode
	default: // openat, do_sys_open: (dfd, filename, flags, mode)
		return arg(1), arg(2), arg(3)
	}
}

// who returns the task that made the call.
func who(r *vmprobes.Regs) string {
	t, err := r.Task()
	if err != nil {
		return "? (" + err.Error() + ")"
	}
	return t.String()
}
