package main

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/vmprobes/vmprobes/lab/internal/aptsrc"
)

// debPackage is a binary package at the version apt would install.
type debPackage struct {
	apt     *apt
	Name    string
	Version string
	Size    string
	Depends string
}

// output runs a program and returns what it prints; its error output is part
// of the error.
func output(ctx context.Context, dir string, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return string(out), fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, lastLines(string(out)+stderr.String(), 15))
	}
	return string(out), nil
}

func lastLines(s string, n int) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

// candidates returns the packages as apt's lists have them. It needs no
// network.
func (a *apt) candidates(ctx context.Context, names ...string) ([]debPackage, error) {
	out, err := output(ctx, "", "apt-cache", append(append(a.options()[1:], "show", "--no-all-versions"), names...)...)
	if err != nil {
		return nil, fmt.Errorf("%w\n(%s)", errors.Join(a.outdated, err), a.hint())
	}
	var pkgs []debPackage
	for stanza := range strings.SplitSeq(out, "\n\n") {
		p := debPackage{apt: a}
		for line := range strings.Lines(stanza) {
			field, value, _ := strings.Cut(strings.TrimSpace(line), ": ")
			switch field {
			case "Package":
				p.Name = value
			case "Version":
				p.Version = value
			case "Size":
				p.Size = value
			case "Depends":
				p.Depends = value
			}
		}
		if p.Name != "" && !slices.ContainsFunc(pkgs, func(q debPackage) bool { return q.Name == p.Name }) {
			pkgs = append(pkgs, p)
		}
	}
	for _, name := range names {
		if !slices.ContainsFunc(pkgs, func(p debPackage) bool { return p.Name == name }) {
			return nil, fmt.Errorf("apt knows no package %s (%s)", name, a.hint())
		}
	}
	return pkgs, nil
}

var kernelPackage = regexp.MustCompile(`\blinux-image-[0-9][^\s,|]*`)

// hint says what may help when a package isn't found or can't be fetched.
func (a *apt) hint() string {
	if a.dir == "" {
		return "is \"apt-get update\" due? The lab needs the packages of " + a.debian.name
	}
	return fmt.Sprintf("remove %s to have the lists of %s fetched again", a.dir, a.debian.name)
}

// kernelCandidate returns the kernel package that a meta package stands for.
func (a *apt) kernelCandidate(ctx context.Context, meta string) (debPackage, error) {
	pkgs, err := a.candidates(ctx, meta)
	if err != nil {
		return debPackage{}, err
	}
	name := kernelPackage.FindString(pkgs[0].Depends)
	if name == "" {
		return debPackage{}, fmt.Errorf("package %s names no kernel (it depends on %q)", meta, pkgs[0].Depends)
	}
	if pkgs, err = a.candidates(ctx, name); err != nil {
		return debPackage{}, err
	}
	return pkgs[0], nil
}

// fetch downloads packages into the cache, unless they are there, and returns
// their paths.
func (c *cache) fetch(ctx context.Context, pkgs []debPackage) (map[string]string, error) {
	dir, err := c.mkdir("debs")
	if err != nil {
		return nil, err
	}
	paths := map[string]string{}
	for _, p := range pkgs {
		path := filepath.Join(dir, fmt.Sprintf("%s_%s.deb", p.Name, strings.ReplaceAll(p.Version, ":", "%3a")))
		paths[p.Name] = path
		if _, err := os.Stat(path); err == nil {
			continue
		}
		progress("fetch %s %s (%s bytes)", p.Name, p.Version, p.Size)
		if err := c.fetchOne(ctx, p, path); err != nil {
			return nil, fmt.Errorf("fetch %s: %w\n(%s)", p.Name, err, p.apt.hint())
		}
	}
	return paths, nil
}

func (c *cache) fetchOne(ctx context.Context, p debPackage, path string) error {
	tmp, err := os.MkdirTemp(c.dir, "fetch-*")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(tmp) }()
	args := append(p.apt.options(), "download", p.Name+"="+p.Version)
	if _, err := output(ctx, tmp, "apt-get", args...); err != nil {
		return err
	}
	debs, err := filepath.Glob(filepath.Join(tmp, "*.deb"))
	if err != nil || len(debs) != 1 {
		return fmt.Errorf("apt-get download left %d files", len(debs))
	}
	return os.Rename(debs[0], path)
}

// aptOptions are for each call of apt-get: as root it would otherwise download
// as a user who may not be allowed to write to the cache.
func aptOptions() []string {
	options := []string{"-q"}
	if os.Geteuid() == 0 {
		options = append(options, "-o", "APT::Sandbox::User=root")
	}
	return options
}

func progress(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "lab: "+format+"\n", args...)
}

// node is a file of a package.
type node struct {
	perm fs.FileMode
	data []byte
	link string // a symbolic link, if not empty
}

// files is a file system tree by clean path, without the leading slash.
type files map[string]*node

// readDeb adds the files of a package that are wanted.
func (f files) readDeb(ctx context.Context, path string, want func(name string) bool) error {
	cmd := exec.CommandContext(ctx, "dpkg-deb", "--fsys-tarfile", path)
	cmd.Stderr = os.Stderr
	pipe, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("unpack %s: %w", path, err)
	}
	if err := f.readTar(pipe, want); err != nil {
		_, _ = io.Copy(io.Discard, pipe)
		_ = cmd.Wait()
		return fmt.Errorf("unpack %s: %w", path, err)
	}
	_, _ = io.Copy(io.Discard, pipe)
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("unpack %s: %w", path, err)
	}
	return nil
}

func (f files) readTar(r io.Reader, want func(name string) bool) error {
	for t := tar.NewReader(r); ; {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		name := merged(h.Name)
		if !want(name) {
			continue
		}
		n := &node{perm: h.FileInfo().Mode().Perm()}
		switch h.Typeflag {
		case tar.TypeReg:
			if n.data, err = io.ReadAll(t); err != nil {
				return err
			}
		case tar.TypeSymlink:
			n.link = h.Linkname
		case tar.TypeLink:
			target, ok := f[merged(h.Linkname)]
			if !ok {
				continue
			}
			n = target
		default:
			continue
		}
		f[name] = n
	}
}

// merged cleans a path and applies the merged /usr: /lib is /usr/lib, and so
// on.
func merged(name string) string {
	name = strings.TrimPrefix(filepath.Clean("/"+name), "/")
	first, _, _ := strings.Cut(name, "/")
	if slices.Contains([]string{"bin", "sbin", "lib", "lib64"}, first) {
		name = "usr/" + name
	}
	return name
}

// resolve follows symbolic links and returns the file behind name.
func (f files) resolve(name string) (*node, error) {
	name = merged(name)
	for range 20 {
		n, ok := f[name]
		if !ok {
			return nil, fmt.Errorf("no file /%s in the packages", name)
		}
		if n.link == "" {
			return n, nil
		}
		if filepath.IsAbs(n.link) {
			name = merged(n.link)
		} else {
			name = merged(filepath.Join(filepath.Dir(name), n.link))
		}
	}
	return nil, fmt.Errorf("too many links at /%s", name)
}

// apt is a configuration of apt.
type apt struct {
	debian debian
	// dir has the configuration and the lists, if it isn't the machine's own, which
	// is left alone.
	dir      string
	arch     string // other than the machine's
	outdated error  // why the lists may be old
}

// ownApt is the machine's.
var ownApt = &apt{debian: debian12}

// apt returns the configuration with the packages of a version of Debian. Other lists
// than the machine's are fetched once a day.
func (c *cache) apt(ctx context.Context, d debian) (*apt, error) {
	if d == ownApt.debian {
		return ownApt, nil
	}
	a, err := newApt(ctx, d, c.path("apt-"+d.suite), aptsrc.Version(ownApt.debian.suite, d.suite))
	if err != nil {
		return nil, err
	}
	stamp := filepath.Join(a.dir, "updated")
	if st, err := os.Stat(stamp); err == nil && time.Since(st.ModTime()) < 24*time.Hour {
		return a, nil
	}
	progress("fetch the lists of packages of %s", d.name)
	if _, a.outdated = output(ctx, "", "apt-get", append(a.options(), "update")...); a.outdated != nil {
		return a, nil // the older ones may do
	}
	return a, writeFile(stamp, nil)
}

// newApt derives a configuration from the machine's.
func newApt(ctx context.Context, d debian, dir string, edit aptsrc.Edit) (*apt, error) {
	etc, err := output(ctx, "", "apt-config", "shell", "LIST", "Dir::Etc::sourcelist/f", "PARTS", "Dir::Etc::sourceparts/d")
	if err != nil {
		return nil, err
	}
	var paths []string
	for line := range strings.Lines(etc) {
		_, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		value = strings.Trim(value, "'\"")
		if info, err := os.Stat(value); err == nil && info.IsDir() {
			for _, pattern := range []string{"*.list", "*.sources"} {
				more, err := filepath.Glob(filepath.Join(value, pattern))
				if err != nil {
					return nil, err
				}
				paths = append(paths, more...)
			}
		} else if err == nil {
			paths = append(paths, value)
		}
	}
	parts := filepath.Join(dir, "sources")
	for _, d := range []string{parts, filepath.Join(dir, "lists", "partial")} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return nil, err
		}
	}
	old, err := filepath.Glob(filepath.Join(parts, "*"))
	if err != nil {
		return nil, err
	}
	for _, path := range old {
		if err := os.Remove(path); err != nil {
			return nil, err
		}
	}
	some := false
	for _, path := range paths {
		raw, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		content := edit.List(string(raw))
		if strings.HasSuffix(path, ".sources") {
			content = edit.Sources(string(raw))
		}
		if content == "" {
			continue
		}
		some = true
		if err := writeFile(filepath.Join(parts, filepath.Base(path)), []byte(content)); err != nil {
			return nil, err
		}
	}
	if !some {
		return nil, fmt.Errorf("this machine's apt configuration has no package source that one of %s could be derived from: the lab needs those of %s",
			d.name, ownApt.debian.name)
	}
	return &apt{debian: d, dir: dir}, nil
}

// options are for each call of a program of apt's.
func (a *apt) options() []string {
	if a.dir == "" {
		return aptOptions()
	}
	options, cached := aptOptions(), ""
	if a.arch != "" {
		options = append(options, "-o", "APT::Architecture="+a.arch, "-o", "APT::Architectures::="+a.arch)
		// So many lists take ten seconds to read.
		cached = filepath.Join(a.dir, "pkgcache.bin")
	}
	return append(options,
		"-o", "Dir::Etc::sourcelist=/dev/null",
		"-o", "Dir::Etc::sourceparts="+filepath.Join(a.dir, "sources"),
		"-o", "Dir::State::Lists="+filepath.Join(a.dir, "lists"),
		"-o", "Dir::Cache::pkgcache="+cached,
		"-o", "Dir::Cache::srcpkgcache=",
		"-o", "Acquire::Languages=none",
		"-o", "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false",
	)
}

// sourceVersions returns the versions of a source package, newest first.
func (a *apt) sourceVersions(ctx context.Context, name string) ([]string, error) {
	// Some of the repositories may have no sources; what counts is whether
	// the package is found.
	_, updateErr := output(ctx, "", "apt-get", append(a.options(), "update")...)
	out, err := output(ctx, "", "apt-cache", append(a.options()[1:], "showsrc", "--only-source", name)...)
	if err != nil || out == "" {
		return nil, fmt.Errorf("no source package %s in this machine's package sources: %w", name, errors.Join(updateErr, err))
	}
	var versions []string
	for line := range strings.Lines(out) {
		if v, ok := strings.CutPrefix(strings.TrimSpace(line), "Version: "); ok && !slices.Contains(versions, v) {
			versions = append(versions, v)
		}
	}
	slices.SortStableFunc(versions, func(v, w string) int {
		if exec.CommandContext(ctx, "dpkg", "--compare-versions", v, "gt", w).Run() == nil {
			return -1
		}
		return 1
	})
	return versions, nil
}

// download fetches one version of a source package into dir and returns the
// path of its .dsc file.
func (a *apt) download(ctx context.Context, name, version, dir string) (string, error) {
	if _, err := output(ctx, dir, "apt-get", append(a.options(), "source", "--download-only", name+"="+version)...); err != nil {
		return "", err
	}
	dscs, err := filepath.Glob(filepath.Join(dir, "*.dsc"))
	if err != nil || len(dscs) != 1 {
		return "", fmt.Errorf("apt-get source left %d .dsc files", len(dscs))
	}
	return dscs[0], nil
}
