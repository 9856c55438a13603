package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/vmprobes/vmprobes/internal/cpio"
	"github.com/vmprobes/vmprobes/lab/internal/aptsrc"
	"github.com/vmprobes/vmprobes/lab/internal/job"
	"github.com/vmprobes/vmprobes/lab/kernels"
)

// kernelSuites returns the suites whose kernels are tested: what is supported of each
// Debian, its backports, and what comes next.
func kernelSuites() []string {
	var all []string
	for _, d := range []debian{debian11, debian12, debian13} {
		for _, s := range []string{"", "-updates", "-security", "-backports"} {
			all = append(all, d.suite+s)
		}
	}
	return append(all, "sid")
}

// kernelArches are the architectures that Debian has x86 kernels of.
var kernelArches = []string{"amd64", "i386"}

// testModules are the modules that a tested kernel loads, in this order: those that its
// package has.
var testModules = append(slices.Clone(guestModules), "llc", "stp", "bridge", "fat", "vfat", "nls_utf8", "loop", "md5")

func kernelsCommand() *cobra.Command {
	get := ""
	cmd := &cobra.Command{
		Use:   "kernels",
		Short: "List the kernels that Debian has, or get one of them",
		Long: `kernels prints, as JSON, the kernels of Debian's releases, their backports and sid
that this machine's mirror has, and the suites that it hasn't. With --get it fetches one
and prints the path of an archive with its vmlinuz and some modules.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := openCache()
			if err != nil {
				return err
			}
			list, apts, err := c.listKernels(cmd.Context())
			if err != nil {
				return err
			}
			if get == "" {
				return json.NewEncoder(cmd.OutOrStdout()).Encode(list)
			}
			i := slices.IndexFunc(list.Packages, func(p kernels.Package) bool { return p.Release == get })
			if i < 0 {
				return &exitError{codeUsage, fmt.Errorf("the mirror has no kernel %q", get)}
			}
			archive, err := c.testKernel(cmd.Context(), apts[list.Packages[i].Arch], list.Packages[i])
			if err == nil {
				fmt.Fprintln(cmd.OutOrStdout(), archive)
			}
			return err
		},
	}
	cmd.Flags().StringVar(&get, "get", "", "the release of the kernel to get, as 6.1.0-57-amd64")
	return cmd
}

// listKernels returns the kernels that can be had, and apt's configuration for each
// architecture. The mirror's lists are fetched once a day.
func (c *cache) listKernels(ctx context.Context) (kernels.List, map[string]*apt, error) {
	var list kernels.List
	apts := map[string]*apt{}
	for _, arch := range kernelArches {
		a, err := newApt(ctx, debian{"Debian 11 to 13 and sid", arch}, c.path("apt-kernels-"+arch), aptsrc.All(ownApt.debian.suite, kernelSuites()))
		if err != nil {
			return list, nil, err
		}
		a.arch = arch
		apts[arch] = a
		of, err := a.kernels(ctx)
		if err != nil {
			return list, nil, err
		}
		list.Packages = append(list.Packages, of.Packages...)
		list.Missing = append(list.Missing, of.Missing...)
	}
	return list, apts, nil
}

// kernels returns the kernels of one architecture, and the suites that there aren't.
func (a *apt) kernels(ctx context.Context) (list kernels.List, err error) {
	kept := filepath.Join(a.dir, "kernels.json")
	if st, err := os.Stat(kept); err == nil && time.Since(st.ModTime()) < 24*time.Hour {
		if raw, err := os.ReadFile(kept); err == nil && json.Unmarshal(raw, &list) == nil {
			return list, nil
		}
	}
	progress("fetch the lists of packages of %s (%s)", a.debian.name, a.arch)
	update, err := output(ctx, "", "apt-get", append(a.options(), "update")...)
	if err != nil {
		update += err.Error() // a suite that isn't there is an error, and the others are fetched
	}
	if list, err = a.readKernels(ctx, update); err != nil {
		return list, err
	}
	raw, err := json.Marshal(list)
	if err != nil {
		return list, err
	}
	return list, writeFile(kept, raw)
}

// readKernels reads what apt-get update has fetched, and printed.
func (a *apt) readKernels(ctx context.Context, update string) (list kernels.List, err error) {
	targets, err := output(ctx, "", "apt-get", append(a.options()[1:], "indextargets", "--format", "$(RELEASE) $(FILENAME)", "Created-By: Packages")...)
	if err != nil {
		return list, err
	}
	var stanzas []stanza
	had := map[string]bool{}
	for line := range strings.Lines(targets) {
		suite, file, _ := strings.Cut(strings.TrimSpace(line), " ")
		index, err := output(ctx, "", "/usr/lib/apt/apt-helper", append(a.options()[1:], "cat-file", file)...)
		if err != nil {
			return list, err
		}
		more, err := kernelStanzas(strings.NewReader(index), suite)
		if err != nil {
			return list, fmt.Errorf("list of packages of %s: %w", suite, err)
		}
		had[suite] = true
		stanzas = append(stanzas, more...)
	}
	if len(had) == 0 {
		return list, fmt.Errorf("no lists of packages: %s", lastLines(update, 5))
	}
	for _, s := range kernelSuites() {
		if !had[s] {
			list.Missing = append(list.Missing, kernels.Missing{Suite: s, Arch: a.arch, Why: whyMissing(update, s)})
		}
	}
	list.Packages = kernelPackages(stanzas, a.arch)
	return list, nil
}

// whyMissing says why a suite isn't there, from what apt-get update printed, without the
// name of the mirror.
func whyMissing(update, suite string) string {
	for line := range strings.Lines(update) {
		if strings.Contains(line, " "+suite+" Release") && strings.Contains(line, "does not have a Release file") {
			return "the mirror has no such suite"
		}
	}
	return "the mirror's list of packages is not whole"
}

// kernelPart matches the packages that a kernel, or a part of one, is in.
var kernelPart = regexp.MustCompile(`^linux-(?:image|binary|modules)-[0-9]`)

// stanza is what a list of packages says of one that has to do with kernels.
type stanza struct {
	suite, name, version string
	size                 int64
}

// kernelStanzas reads a list of packages (deb-control(5)).
func kernelStanzas(r io.Reader, suite string) ([]stanza, error) {
	var all []stanza
	s := stanza{suite: suite}
	in := bufio.NewScanner(r)
	in.Buffer(nil, 1<<20)
	for in.Scan() {
		if in.Text() == "" {
			s = stanza{suite: suite}
			continue
		}
		field, value, _ := strings.Cut(in.Text(), ": ")
		switch field {
		case "Package":
			s.name = value
		case "Version":
			s.version = value
		case "Size":
			n, err := strconv.ParseInt(value, 10, 64)
			if err != nil {
				return nil, fmt.Errorf("%s: size: %w", s.name, err)
			}
			s.size = n
		default:
			continue
		}
		if s.name != "" && s.version != "" && s.size != 0 && kernelPart.MatchString(s.name) {
			all = append(all, s)
		}
	}
	return all, in.Err()
}

// kernelPackages puts together what the lists say of each kernel. The same kernel may be
// in several suites; of one release in two versions the first is taken.
func kernelPackages(stanzas []stanza, arch string) []kernels.Package {
	size := map[[2]string]int64{} // by name and version
	for _, s := range stanzas {
		size[[2]string{s.name, s.version}] = s.size
	}
	found := map[string]*kernels.Package{}
	for _, s := range stanzas {
		release, ok := strings.CutPrefix(s.name, "linux-image-")
		if !ok || !kernels.Known(release) {
			continue
		}
		p := found[release]
		if p == nil {
			p = &kernels.Package{Release: release, Arch: arch, Version: s.version}
			for _, part := range []string{"image", "binary", "modules"} {
				name := "linux-" + part + "-" + release
				if n := size[[2]string{name, s.version}]; n > emptyPackage {
					p.Names = append(p.Names, name)
					p.Bytes += n
				}
			}
			if len(p.Names) == 0 {
				continue
			}
			found[release] = p
		}
		if p.Version == s.version && !slices.Contains(p.Suites, s.suite) {
			p.Suites = append(p.Suites, s.suite)
		}
	}
	var all []kernels.Package
	for _, p := range found {
		all = append(all, *p)
	}
	slices.SortFunc(all, func(a, b kernels.Package) int { return cmp.Compare(a.Release, b.Release) })
	return all
}

// emptyPackage is more than the size of a package that only depends on others.
const emptyPackage = 64 << 10

// testKernel makes the archive of a kernel to be tested, and keeps none of the packages
// that it fetches: there are some 340 kernels.
func (c *cache) testKernel(ctx context.Context, a *apt, k kernels.Package) (string, error) {
	var pkgs []debPackage
	for _, name := range k.Names {
		pkgs = append(pkgs, debPackage{apt: a, Name: name, Version: k.Version, Size: strconv.FormatInt(k.Bytes, 10)})
	}
	archive, have, err := c.made("kernel-" + k.Release + "-" + versionKey("kernel1 "+strings.Join(testModules, " "), pkgs) + ".cpio")
	if err != nil || have {
		return archive, err
	}
	before, err := filepath.Glob(c.path("debs", "*.deb"))
	if err != nil {
		return "", err
	}
	debs, err := c.fetch(ctx, pkgs)
	if err != nil {
		return "", err
	}
	defer func() {
		for _, deb := range debs {
			if !slices.Contains(before, deb) {
				_ = os.Remove(deb)
			}
		}
	}()
	linux := files{}
	for _, deb := range debs {
		err := linux.readDeb(ctx, deb, func(name string) bool {
			return isVmlinuz(name) || slices.Contains(testModules, moduleName(name))
		})
		if err != nil {
			return "", err
		}
	}
	vmlinuz, err := linux.kernel()
	if err != nil {
		return "", err
	}
	modules, err := moduleArchive(linux)
	if err != nil {
		return "", err
	}
	dir := path.Join(job.Kernels, k.Release)
	return archive, writeWith(archive, func(f *os.File) error {
		w := cpio.NewWriter(f)
		return errors.Join(w.Bytes(dir+"/vmlinuz", 0o644, vmlinuz), w.Bytes(dir+"/modules.cpio", 0o644, modules), w.Close())
	})
}

// moduleArchive has the modules of a kernel under names that sort as they are to be loaded.
func moduleArchive(linux files) ([]byte, error) {
	var b bytes.Buffer
	w := cpio.NewWriter(&b)
	for i, name := range testModules {
		data, err := linux.module(name)
		if errors.Is(err, errNoModule) {
			continue // built in, or not of this flavour
		}
		if err != nil {
			return nil, err
		}
		if err := w.Bytes(fmt.Sprintf("modules/%02d-%s.ko", i, name), 0o644, data); err != nil {
			return nil, err
		}
	}
	err := w.Close()
	return b.Bytes(), err
}
