package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/vmprobes/vmprobes/lab/internal/job"
)

// The exit codes of lab itself. A job's own code is passed on. After a signal the code
// is codeSignal plus its number, as with shells.
const (
	codeUsage   = 2
	codeTimeout = 124
	codeLab     = 125
	codeSignal  = 128
)

// exitError ends the program with a code of its own; a nil err says nothing
// more.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit code %d", e.code)
	}
	return e.err.Error()
}

func (e *exitError) Unwrap() error { return e.err }

func main() {
	ctx, stop := untilSignal(context.Background())
	code, err := exitCode(rootCommand().ExecuteContext(ctx), context.Cause(ctx))
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "lab:", err)
	}
	os.Exit(code)
}

// A signalError is why a context has ended: a signal came.
type signalError struct{ signal syscall.Signal }

func (e *signalError) Error() string { return e.signal.String() }

// untilSignal returns a context that ends with a *signalError when SIGINT, SIGTERM or
// SIGHUP comes. Until stop is called none of them ends the program.
func untilSignal(parent context.Context) (ctx context.Context, stop func()) {
	ctx, cancel := context.WithCancelCause(parent)
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	go func() {
		select {
		case s := <-signals:
			cancel(&signalError{s.(syscall.Signal)})
		case <-ctx.Done():
		}
	}()
	return ctx, func() {
		signal.Stop(signals)
		cancel(nil)
	}
}

// exitCode returns the exit code of a command that returned err, and what is to be
// printed, if anything. cause is why the command's context has ended, or nil. What fails
// after a signal failed because of it; a job that has a code of its own keeps that.
func exitCode(err, cause error) (code int, message error) {
	if err == nil {
		return 0, nil
	}
	code = codeLab
	var exit *exitError
	if errors.As(err, &exit) {
		code, err = exit.code, exit.err
	}
	var s *signalError
	if code == codeLab && errors.As(cause, &s) {
		code = codeSignal + int(s.signal)
	}
	return code, err
}

func rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "lab",
		Short: "Emulated Xen hosts and QEMU guests for trying and testing vmprobes",
		Long: `lab runs programs in a real Xen dom0 with real guests, inside an emulator, and
boots Linux guests in QEMU ("lab demo", "lab vm").

Hosts:
  pv        Xen with CONFIG_GDBSX and PV guests (QEMU)
  pv-stock  Debian's Xen and PV guests (QEMU)
  hvm       Debian's Xen and PVH guests (KVM if it nests, else Bochs: slow)
  hvm-amd   the same on a processor of AMD's (Bochs)

These have Xen 4.17, Debian 12's. pv-4.20, pv-stock-4.20 and hvm-4.20 have Debian 13's.`,
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.AddCommand(buildCommand(), headersCommand(), kernelsCommand(), runCommand(), execCommand(), shellCommand(), demoCommand(), vmCommand(), doctorCommand(), installCommand())
	return root
}

func hostArg(name string) (string, error) {
	if slices.Contains(job.Hosts(), name) {
		return name, nil
	}
	return "", &exitError{codeUsage, fmt.Errorf("no host %q: want one of %s", name, strings.Join(job.Hosts(), ", "))}
}

func buildCommand() *cobra.Command {
	return &cobra.Command{
		Use:       "build HOST|all|guests",
		Short:     "Fetch and build what a host needs, or the guests' kernels only",
		Args:      cobra.ExactArgs(1),
		ValidArgs: append(job.Hosts(), "all", "guests"),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := openCache()
			if err != nil {
				return err
			}
			hosts := job.Hosts()
			switch args[0] {
			case "guests":
				return c.buildGuests(cmd.Context())
			case "all":
			default:
				h, err := hostArg(args[0])
				if err != nil {
					return err
				}
				hosts = []string{h}
			}
			return c.build(cmd.Context(), hosts)
		},
	}
}

func headersCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "headers RELEASE",
		Short: "Fetch the headers of a release of Xen and print their folder",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			r, ok := findRelease(args[0])
			if !ok {
				return &exitError{codeUsage, fmt.Errorf("no release %q of Xen", args[0])}
			}
			c, err := openCache()
			if err != nil {
				return err
			}
			dir, err := c.buildHeaders(cmd.Context(), r)
			if err == nil {
				fmt.Fprintln(cmd.OutOrStdout(), dir)
			}
			return err
		},
	}
}

// runFlags are the flags that start an emulator.
type runFlags struct {
	verbose bool
	timeout time.Duration
	files   []string
	env     []string
	collect []string
	out     string
	kernels []string
	accel   string
	xenArgs string
}

func (f *runFlags) add(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.BoolVarP(&f.verbose, "verbose", "v", false, "show the consoles of Xen and dom0, on standard error")
	flags.DurationVar(&f.timeout, "timeout", 0, "end everything after this time (default: 20m, with Bochs 60m)")
	flags.StringArrayVar(&f.files, "file", nil, "HOST:DOM0 copies a file or folder into dom0 (repeatable)")
	flags.StringArrayVar(&f.env, "env", nil, "NAME=VALUE for the job (repeatable); VMPROBES_* is passed on anyway")
	flags.StringArrayVar(&f.collect, "collect", nil, "pattern of dom0 files to bring back (repeatable)")
	flags.StringVar(&f.out, "out", "", "where to put what is brought back (default: the cache's logs)")
	flags.StringSliceVar(&f.kernels, "kernels", nil, "guest kernels in dom0, of 6.1 and 6.12 (default: both, with Bochs that of the Debian whose Xen it is)")
	flags.StringVar(&f.xenArgs, "xen-args", "", "more arguments for Xen's command line")
	flags.StringVar(&f.accel, "accel", "auto", "auto, kvm, tcg or bochs")
	flags.SetInterspersed(false)
}

func runCommand() *cobra.Command {
	var f runFlags
	cmd := &cobra.Command{
		Use:   "run HOST [flags] -- BIN [ARGS…]",
		Short: "Run a program in a host's dom0",
		Long: `run boots the host with BIN in its dom0, runs it there, passes on its output
and ends with its exit code. Code 124: timeout, 125: the lab itself failed, 130: interrupted (143: by SIGTERM).`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			h, rest, err := hostAndRest(cmd, args)
			if err != nil {
				return err
			}
			if len(rest) == 0 {
				return &exitError{codeUsage, errors.New("what to run? lab run " + h + " [flags] -- BIN [ARGS…]")}
			}
			return runJob(cmd.Context(), h, f, rest, nil)
		},
	}
	f.add(cmd)
	return cmd
}

// hostAndRest parses "HOST [flags] [--] ARGS…": the flags may be before and
// behind the host, but not behind the program.
func hostAndRest(cmd *cobra.Command, args []string) (string, []string, error) {
	h, err := hostArg(args[0])
	if err != nil {
		return "", nil, err
	}
	flags := cmd.Flags()
	if err := flags.Parse(args[1:]); err != nil {
		return "", nil, &exitError{codeUsage, err}
	}
	return h, flags.Args(), nil
}

func execCommand() *cobra.Command {
	var f runFlags
	cmd := &cobra.Command{
		Use:   "exec HOST [flags] BIN [ARGS…]",
		Short: "Like run, for go test -exec \"lab exec pv\"",
		Long: `exec is run in the form that "go test -exec" wants. The package's testdata
folder goes along, and coverage profiles come back.`,
		Args: cobra.MinimumNArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			h, rest, err := hostAndRest(cmd, args)
			if err != nil {
				return err
			}
			if len(rest) == 0 {
				return &exitError{codeUsage, errors.New("what to run? lab exec " + h + " BIN [ARGS…]")}
			}
			if info, err := os.Stat("testdata"); err == nil && info.IsDir() {
				f.files = append(f.files, "testdata:"+job.WorkDir+"/testdata")
			}
			back := map[string]string{}
			for i, arg := range rest {
				switch name, value, _ := strings.Cut(arg, "="); strings.TrimPrefix(name, "-") {
				case "-test.coverprofile", "test.coverprofile":
					inside := job.WorkDir + "/lab-cover.out"
					rest[i] = name + "=" + inside
					f.collect = append(f.collect, inside)
					back[filepath.Base(inside)] = value
				case "-test.gocoverdir", "test.gocoverdir":
					rest[i] = name + "=" + job.WorkDir
				case "-test.outputdir", "test.outputdir":
					rest[i] = name + "=" + job.WorkDir
				}
			}
			return runJob(cmd.Context(), h, f, rest, back)
		},
	}
	f.add(cmd)
	return cmd
}

func shellCommand() *cobra.Command {
	var f runFlags
	cmd := &cobra.Command{
		Use:   "shell HOST [flags]",
		Short: "An interactive dom0 with a guest called a3guest (Ctrl-] leaves)",
		Args:  cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			h, rest, err := hostAndRest(cmd, args)
			if err != nil {
				return err
			}
			if len(rest) > 0 {
				return &exitError{codeUsage, fmt.Errorf("unexpected %q", rest[0])}
			}
			return runShell(cmd.Context(), h, f)
		},
	}
	f.add(cmd)
	return cmd
}

func doctorCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "doctor",
		Short: "Say what is missing on this machine and how to install it",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return doctor(cmd.Context(), cmd.OutOrStdout())
		},
	}
}

func installCommand() *cobra.Command {
	return &cobra.Command{
		Use:       "install [demo|HOST]…",
		Short:     "Install what doctor finds missing (as root, or with sudo)",
		Args:      cobra.OnlyValidArgs,
		ValidArgs: allHosts,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				args = allHosts
			}
			return install(cmd.Context(), args)
		},
	}
}
