package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"

	"github.com/vmprobes/vmprobes/lab/internal/job"
)

// tool is something of this machine that the lab calls. It is looked for by
// its files, so that a hand-made installation counts too.
type tool struct {
	pkg   string
	files []string // each must be there: a program, or the path of a file
	hosts []string // nil: all
}

// demo stands for the demonstration, among the hosts: a guest straight under QEMU,
// without Xen.
const demo = "demo"

// allHosts are what tools can be asked for.
var allHosts = append([]string{demo}, job.Hosts()...)

var tools = []tool{
	{"apt", []string{"apt-get", "apt-cache"}, nil},
	{"dpkg", []string{"dpkg-deb"}, nil},
	{"qemu-system-x86", []string{"qemu-system-x86_64"}, []string{demo, job.PV, job.PVStock}},
	{"gcc", []string{"gcc"}, []string{job.PV}},
	{"libc6-dev", []string{"/usr/include/stdio.h"}, []string{job.PV}},
	{"make", []string{"make"}, []string{job.PV, job.HVM}},
	{"g++", []string{"g++"}, []string{job.HVM}},
	{"flex", []string{"flex"}, []string{job.PV}},
	{"bison", []string{"bison"}, []string{job.PV}},
	{"bc", []string{"bc"}, []string{job.PV}},
	{"python3", []string{"python3"}, []string{job.PV}},
	{"dpkg-dev", []string{"dpkg-source"}, []string{job.PV}},
	{"xz-utils", []string{"xz"}, []string{job.PV, job.HVM}},
	{"bochsbios", []string{"/usr/share/bochs/BIOS-bochs-latest"}, []string{job.HVM}},
	{"vgabios", []string{"/usr/share/vgabios/vgabios.bin"}, []string{job.HVM}},
	{"grub-pc-bin", []string{"/usr/lib/grub/i386-pc/multiboot2.mod"}, []string{job.HVM}},
	{"grub-common", []string{"grub-mkrescue"}, []string{job.HVM}},
	{"xorriso", []string{"xorriso"}, []string{job.HVM}},
	{"mtools", []string{"mformat"}, []string{job.HVM}},
}

// missing returns the Debian packages that the hosts need and that are not
// there.
func missing(hosts ...string) []string {
	var pkgs []string
	for _, t := range tools {
		wanted := t.hosts == nil || slices.ContainsFunc(hosts, t.isFor)
		if wanted && slices.ContainsFunc(t.files, absent) {
			pkgs = append(pkgs, t.pkg)
		}
	}
	return pkgs
}

// isFor tells whether the host needs the tool.
func (t tool) isFor(host string) bool {
	return slices.ContainsFunc(t.hosts, func(h string) bool { return job.IsA(host, h) })
}

func absent(file string) bool {
	var err error
	if strings.HasPrefix(file, "/") {
		_, err = os.Stat(file)
	} else {
		_, err = exec.LookPath(file)
	}
	return err != nil
}

func installArgs(pkgs []string) []string {
	return append([]string{"apt-get", "install", "--no-install-recommends", "-y"}, pkgs...)
}

// requireTools fails with the command that helps if something is missing.
func requireTools(hosts ...string) error {
	pkgs := missing(hosts...)
	if len(pkgs) == 0 {
		return nil
	}
	return fmt.Errorf("this machine lacks packages for the lab's %[1]s; install them (or run: lab install %[2]s):\n  sudo %[3]s",
		strings.Join(hosts, ", "), strings.Join(hosts, " "), strings.Join(installArgs(pkgs), " "))
}

func doctor(ctx context.Context, out io.Writer) error {
	fail := false
	for _, h := range allHosts {
		if pkgs := missing(h); len(pkgs) > 0 {
			fail = true
			fmt.Fprintf(out, "%-13s missing: %s\n", h, strings.Join(pkgs, " "))
		} else {
			fmt.Fprintf(out, "%-13s all tools are there\n", h)
		}
	}
	c, err := openCache()
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "cache         %s\n", c.dir)
	for _, h := range job.Hosts() {
		if _, err := c.load(h); err != nil {
			fmt.Fprintf(out, "%-13s not built: lab build %s\n", h, h)
		} else {
			fmt.Fprintf(out, "%-13s built\n", h)
		}
	}
	if err := kvmWorks(ctx); err != nil {
		fmt.Fprintf(out, "kvm           not usable: %v\n", err)
	} else if err := kvmNests(); err != nil {
		fmt.Fprintf(out, "kvm           usable for pv, not for hvm: %v\n", err)
	} else {
		fmt.Fprintln(out, "kvm           usable")
	}
	if fail {
		fmt.Fprintf(out, "\nInstall what is missing (or run: lab install):\n  sudo %s\n",
			strings.Join(installArgs(missing(allHosts...)), " "))
		return &exitError{code: 1}
	}
	return nil
}

// install installs what the hosts lack.
func install(ctx context.Context, hosts []string) error {
	wanted := missing(hosts...)
	if len(wanted) == 0 {
		fmt.Println("nothing is missing")
		return nil
	}
	// A fresh container or cloud image has no lists of packages. Sources that can't
	// be reached are no matter if the others have what is wanted.
	if _, err := ownApt.candidates(ctx, wanted...); err != nil {
		if err := asRoot(ctx, "apt-get", "update"); err != nil {
			progress("%v", err)
		}
	}
	return asRoot(ctx, installArgs(wanted)...)
}

// asRoot runs a command, with sudo if need be, and says so.
func asRoot(ctx context.Context, args ...string) error {
	if os.Geteuid() != 0 {
		if absent("sudo") {
			return errors.New("not root, and no sudo; as root run:\n  " + strings.Join(args, " "))
		}
		args = append([]string{"sudo"}, args...)
	}
	fmt.Println("+", strings.Join(args, " "))
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s: %w", strings.Join(args, " "), err)
	}
	return nil
}
