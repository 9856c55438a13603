// Package labguest starts and drives the lab's guests. It is for tests that
// run in the lab's emulated dom0 (see the lab command): elsewhere there is no
// Xen, and Require skips.
//
// The guest's only process is lab/guestinit. Its documentation has the
// commands that Guest.Command sends.
package labguest

import (
	"context"
	"fmt"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/vmprobes/vmprobes/lab/internal/job"
)

// Kind is the kind of a guest.
type Kind string

// The kinds of guest that the lab can start. PVH guests need an hvm host.
const (
	PV  Kind = "pv"
	PVH Kind = "pvh"
)

// Config describes a guest. Everything in it is optional.
type Config struct {
	Name     string // default "labguest"
	Kind     Kind   // default: what the host is for
	Kernel   string // series, as in "6.1" (the default, where it is) or "6.12"
	VCPUs    int    // default 1
	MemoryMB int    // default 256
	// Cmdline is added to the guest kernel's command line.
	Cmdline string
	// Extra lines for the domain's configuration.
	Extra []string
	// Restart has a guest that reboots be started again, as another domain of the same
	// name (on_reboot = "restart"). Otherwise it is kept as it is then.
	Restart bool
}

// Host returns the name of the lab host this process runs in, such as "pv",
// "pv-stock", "hvm", "hvm-amd" or "pv-4.20", or "" outside the lab.
func Host() string { return os.Getenv(job.EnvHost) }

// Xen returns the release of Xen that the lab host has, such as "4.17", or "" outside
// the lab.
func Xen() string { return job.Find(Host()).Xen }

// Is tells whether this process runs in the named lab host, or in one like it:
// "hvm-amd" is an "hvm", "pv-4.20" a "pv".
func Is(host string) bool { return job.IsA(Host(), host) }

// Require skips the test, saying why, unless it runs in one of the named lab
// hosts, as Is tells (any of them, if none is named). With VMPROBES_REQUIRE_LAB=1 the test
// fails instead, so that a run that was meant for the lab cannot pass by
// skipping everything.
func Require(t testing.TB, hosts ...string) {
	t.Helper()
	here := Host()
	if slices.ContainsFunc(hosts, Is) {
		return
	}
	if here != "" && len(hosts) == 0 {
		return
	}
	want := strings.Join(hosts, " or ")
	if want == "" {
		want = "any"
	}
	reason := fmt.Sprintf("needs the lab's %s host: go test -exec \"lab exec %s\"", want, strings.TrimSpace(strings.Join(append(hosts, "pv")[:1], "")))
	if here != "" {
		reason += fmt.Sprintf(" (this is %q)", here)
	}
	if os.Getenv("VMPROBES_REQUIRE_LAB") == "1" {
		t.Fatal(reason)
	}
	t.Skip(reason)
}

// Kernels returns the guest kernels that this dom0 has, such as "6.1".
func Kernels() []string {
	entries, err := os.ReadDir(job.Kernels)
	if err != nil {
		return nil
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

func (c Config) withDefaults() Config {
	if c.Name == "" {
		c.Name = "labguest"
	}
	if c.Kind == "" {
		c.Kind = PV
		if Is(job.HVM) {
			c.Kind = PVH
		}
	}
	if c.Kernel == "" {
		c.Kernel = "6.1"
		if all := Kernels(); len(all) > 0 && !slices.Contains(all, c.Kernel) {
			c.Kernel = all[0]
		}
	}
	if c.VCPUs == 0 {
		c.VCPUs = 1
	}
	if c.MemoryMB == 0 {
		c.MemoryMB = 256
	}
	return c
}

// ramdisk is where the guest's archive is put together: its init, and the modules
// of its kernel.
func (c Config) ramdisk() string { return path.Join(os.TempDir(), "labguest-"+c.Name+".cpio") }

// guestArgs are every guest's. The kernel's watchdogs measure 20 s of an emulated
// processor's time by default: on a busy machine that isn't much.
const guestArgs = "console=hvc0 quiet rcupdate.rcu_cpu_stall_timeout=60 watchdog_thresh=30"

// file returns the domain's configuration as xl reads it.
func (c Config) file() string {
	lines := []string{
		"name = " + strconv.Quote(c.Name),
		"type = " + strconv.Quote(string(c.Kind)),
		"kernel = " + strconv.Quote(c.kernelFile("vmlinux")),
		"ramdisk = " + strconv.Quote(c.ramdisk()),
		"cmdline = " + strconv.Quote(strings.Join(strings.Fields(guestArgs+" "+os.Getenv(job.EnvCmdline)+" "+c.Cmdline), " ")),
		fmt.Sprintf("memory = %d", c.MemoryMB),
		fmt.Sprintf("vcpus = %d", c.VCPUs),
		// What a guest leaves behind when it dies is worth a look.
		`on_crash = "preserve"`,
		"on_reboot = " + strconv.Quote(map[bool]string{true: "restart", false: "preserve"}[c.Restart]),
		`on_poweroff = "preserve"`,
	}
	if c.Kind == PVH {
		// Where dom0 and the guest share one processor, a guest that never rests
		// would leave dom0 the smaller part.
		lines = append(lines, `tsc_mode = "native"`, "nomigrate = 1", "cpu_weight = 32")
	}
	return strings.Join(append(lines, c.Extra...), "\n") + "\n"
}

func (c Config) kernelFile(name string) string { return path.Join(job.Kernels, c.Kernel, name) }

// Start starts a guest and waits until it takes commands.
func Start(ctx context.Context, c Config) (*Guest, error) {
	g, err := start(ctx, c.withDefaults())
	if err != nil {
		return nil, fmt.Errorf("start guest: %w", err)
	}
	return g, nil
}

// StartPaused starts a guest that has not run when it returns (xl create -p): see
// [Guest.Booted].
func StartPaused(ctx context.Context, c Config) (*Guest, error) {
	g, err := startPaused(ctx, c.withDefaults())
	if err != nil {
		return nil, fmt.Errorf("start guest, paused: %w", err)
	}
	return g, nil
}

// Find returns a guest that runs and was started otherwise: one that was restored, or has
// been started again ([Config.Restart]). It may have to boot yet: see [Guest.Booted].
func Find(ctx context.Context, c Config) (*Guest, error) {
	g, err := find(ctx, c.withDefaults())
	if err != nil {
		return nil, fmt.Errorf("find guest: %w", err)
	}
	return g, nil
}
