// Command vmprobes looks after guests that have probes in them: it shows who has
// attached to which guest, and repairs guests whose tool died.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/vmprobes/vmprobes/internal/target"
	"github.com/vmprobes/vmprobes/internal/terminal"
)

// Exit statuses.
const (
	failed = 1
	usage  = 2
)

func main() { os.Exit(run(os.Args[1:], os.Stdout, os.Stderr)) }

func run(args []string, stdout, stderr io.Writer) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	root := command()
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	began := false
	root.PersistentPreRun = func(*cobra.Command, []string) { began = true }
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	fmt.Fprintf(stderr, "vmprobes: %s\n", terminal.Harmless(err.Error()))
	if !began {
		return usage
	}
	return failed
}

func command() *cobra.Command {
	root := &cobra.Command{
		Use:   "vmprobes",
		Short: "Look after guests that have probes in them",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return cmd.Help()
		},
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.AddCommand(statusCommand(), recoverCommand())
	return root
}

func statusCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "status",
		Short: "Show who is attached to which guest, and which guests need a repair",
		Long: `Show who is attached to which guest, and which guests need a repair.

A guest is "served" while the program that has attached to it lives, and "left" when
that has died: "vmprobes recover" repairs it. While that is done, by whomever, it is
"repaired". Domains that are paused, or that have a
debugger attached, without a program that is known are shown, too. They may be so for
a good reason; but one that is "debugged" and has vCPUs that stand at an int3 may have
been left by a tool without a journal: see "vmprobes recover --help".`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			guests, err := target.Status()
			return errors.Join(err, show(cmd.OutOrStdout(), guests))
		},
	}
}

// show prints a table.
func show(out io.Writer, guests []target.State) error {
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "GUEST\tKIND\tSTATE\tPROGRAM\tNOTE")
	for _, g := range guests {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", quote(g.Name), quote(g.Kind), g.State, quote(g.Owner), g.Note)
	}
	return w.Flush()
}

func recoverCommand() *cobra.Command {
	var all, verbose, force bool
	var from string
	cmd := &cobra.Command{
		Use:   "recover GUEST [--from FILE] | --all",
		Short: "Repair a guest whose tool died",
		Long: `Repair a guest whose tool died: give it every byte back that a probe has
replaced, and let go what waits for an answer. GUEST is a domain's name or id, or
the path of a journal.

It is done by itself as soon as a tool dies, by its guardian, and else when the next
tool opens the guest. To do it by hand is right when neither will happen: as a
service's ExecStopPost, or when the guest stands still. A guest whose tool lives, or
that needs no repair, is left alone. It may be called any number of times.

A tool that keeps no journal, or whose journal was lost, leaves a Xen guest of which
nobody knows what was done to it. Then what can be seen is said, and nothing is done.
If you know that the tool is dead, --from FILE repairs the guest from its kernel's own
file: its vmlinuz, its vmlinux, or that with debug information, of the same build id.
What the file has and the guest hides behind an int3 is given back; what the kernel
changes in its code by itself, the guest's own kprobes, and modules are left alone. If
not all of it can be told, nothing is done, unless --force says to go on in spite of
what is then listed: a guest may die of that.`,
		Args: func(_ *cobra.Command, args []string) error {
			switch {
			case all && len(args) > 0:
				return errors.New("either a guest or --all")
			case !all && len(args) != 1:
				return errors.New("which guest? (or --all)")
			case all && from != "":
				return errors.New("--from is for one guest: a file is of one kernel")
			case force && from == "":
				return errors.New("--force is for --from")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			level := slog.LevelInfo
			if verbose {
				level = slog.LevelDebug
			}
			log := slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), &slog.HandlerOptions{Level: level}))
			if all {
				return recoverAll(cmd.Context(), cmd.OutOrStdout(), log)
			}
			if from != "" {
				f, err := target.RecoverFrom(cmd.Context(), args[0], from, force, log)
				return found(cmd.OutOrStdout(), args[0], f, err)
			}
			done, err := target.RecoverGuest(cmd.Context(), args[0], log)
			if err != nil || done || !target.Inspectable(args[0]) {
				return tell(cmd.OutOrStdout(), args[0], done, err)
			}
			f, err := target.Inspect(cmd.Context(), args[0], log)
			if err == nil && f.Hurt() {
				err = errors.New("somebody has left something in it, or is attached: if no such tool runs, --from FILE repairs it from its kernel's file")
			}
			return found(cmd.OutOrStdout(), args[0], f, err)
		},
	}
	cmd.Flags().StringVar(&from, "from", "", "repair the guest from its kernel's file, without a journal")
	cmd.Flags().BoolVar(&force, "force", false, "with --from: go on in spite of what isn't known")
	cmd.Flags().BoolVar(&all, "all", false, "every guest on this host")
	cmd.Flags().BoolVarP(&verbose, "verbose", "v", false, "log every step")
	return cmd
}

// recoverAll repairs what there is to be repaired.
func recoverAll(ctx context.Context, out io.Writer, log *slog.Logger) error {
	guests, errs := target.Status()
	for _, g := range guests {
		if g.State != target.Left {
			continue
		}
		done, err := target.RecoverGuest(ctx, g.Journal, log)
		errs = errors.Join(errs, tell(out, g.Name, done, err))
	}
	return errs
}

// tell says what was done about a guest.
func tell(out io.Writer, name string, done bool, err error) error {
	switch {
	case err != nil:
		return fmt.Errorf("%s: %w", quote(name), err)
	case done:
		_, err = fmt.Fprintf(out, "%s: repaired\n", quote(name))
	default:
		_, err = fmt.Fprintf(out, "%s: needs no repair\n", quote(name))
	}
	return err
}

// found says what was found out about a guest without a journal, and what was done.
func found(out io.Writer, name string, f *target.Found, err error) error {
	if f != nil {
		for _, l := range f.Lines() {
			if _, werr := fmt.Fprintf(out, "%s: %s\n", quote(name), strings.ReplaceAll(terminal.Harmless(l), "\n", "; ")); werr != nil {
				return errors.Join(err, werr)
			}
		}
	}
	return tell(out, name, f != nil && f.Repaired, err)
}

// quote quotes a name that a terminal might take for more than that.
func quote(s string) string {
	if s != "" && terminal.Harmless(s) == s && !strings.Contains(s, "\n") {
		return s
	}
	return fmt.Sprintf("%q", s)
}
