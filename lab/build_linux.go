package main

import (
	"bytes"
	"compress/gzip"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/ulikunitz/xz"
	"github.com/vmprobes/vmprobes/internal/cpio"
	"github.com/vmprobes/vmprobes/lab/internal/aptsrc"
	"github.com/vmprobes/vmprobes/lab/internal/job"
	"github.com/vmprobes/vmprobes/lab/internal/kernelimg"
)

// dom0Modules are the kernel modules of dom0, in the order of loading.
var dom0Modules = []string{"xen-evtchn", "xen-gntdev", "xen-gntalloc", "xen-privcmd", "xenfs"}

// build makes what the hosts need and is not there yet.
func (c *cache) build(ctx context.Context, hosts []string) error {
	if err := requireTools(hosts...); err != nil {
		return err
	}
	unlock, err := lock(ctx, c.path("build.lock"), "another lab build")
	if err != nil {
		return err
	}
	defer unlock()
	begin := time.Now()

	commons := map[string]*built{}
	for _, h := range hosts {
		if err := c.buildHost(ctx, h, commons); err != nil {
			return fmt.Errorf("the %s host: %w", h, err)
		}
	}
	if _, err := c.buildPrograms(ctx); err != nil {
		return err
	}
	progress("built %s in %v", strings.Join(hosts, ", "), time.Since(begin).Round(100*time.Millisecond))
	return nil
}

// buildHost makes what a host needs. commons has what is made already for all hosts with
// a release of Xen, by the release.
func (c *cache) buildHost(ctx context.Context, host string, commons map[string]*built) error {
	r := releaseOf(host)
	a, err := c.apt(ctx, r.debian)
	if err != nil {
		return err
	}
	if commons[r.xen] == nil {
		if commons[r.xen], err = c.buildCommon(ctx, r, a); err != nil {
			return err
		}
	}
	this := *commons[r.xen]
	if job.Find(host).Kind == job.PV {
		this.Xen, this.XenVersion, err = c.buildGDBSX(ctx, r, a)
	} else {
		this.Xen, this.XenVersion, err = c.buildStock(ctx, r, a)
	}
	if err == nil && needsBochs(ctx, host) {
		this.Bochs, err = c.buildBochs(ctx)
	}
	if err != nil {
		return err
	}
	return c.store(host, &this)
}

// buildCommon makes what all hosts with a release of Xen share.
func (c *cache) buildCommon(ctx context.Context, r release, a *apt) (*built, error) {
	b := &built{Kernels: map[string]string{}, Versions: map[string]string{}}
	pkgs, err := a.candidates(ctx, r.userland()...)
	if err != nil {
		return nil, err
	}
	kernel, err := a.kernelCandidate(ctx, dom0Kernel)
	if err != nil {
		return nil, err
	}
	for _, p := range append(slices.Clone(pkgs), kernel) {
		b.Versions[p.Name] = p.Version
	}
	if b.Base, b.Kernel, err = c.buildDom0(ctx, r, pkgs, kernel); err != nil {
		return nil, fmt.Errorf("dom0 image: %w", err)
	}
	for _, k := range r.guests {
		var p debPackage
		if b.Kernels[k.series], p, err = c.buildGuestKernel(ctx, k); err != nil {
			return nil, fmt.Errorf("guest kernel %s: %w", k.series, err)
		}
		b.Versions[p.Name] = p.Version
	}
	return b, nil
}

// buildGuests makes the images of the guests' kernels and nothing else.
func (c *cache) buildGuests(ctx context.Context) error {
	unlock, err := lock(ctx, c.path("build.lock"), "another lab build")
	if err != nil {
		return err
	}
	defer unlock()
	for _, k := range ownKernels() {
		if _, _, err := c.buildGuestKernel(ctx, k); err != nil {
			return fmt.Errorf("guest kernel %s: %w", k.series, err)
		}
	}
	return nil
}

// made returns the path of an image and whether it is there already.
func (c *cache) made(name string) (string, bool, error) {
	dir, err := c.mkdir("images")
	if err != nil {
		return "", false, err
	}
	p := filepath.Join(dir, name)
	_, err = os.Stat(p)
	return p, err == nil, nil
}

func (c *cache) buildDom0(ctx context.Context, r release, pkgs []debPackage, kernel debPackage) (base, vmlinux string, err error) {
	k := versionKey("dom0", append(slices.Clone(pkgs), kernel))
	base, haveBase, err := c.made("dom0-" + k + ".cpio")
	if err != nil {
		return "", "", err
	}
	vmlinux, haveKernel, err := c.made("dom0-" + k + ".vmlinux")
	if err != nil || haveBase && haveKernel {
		return base, vmlinux, err
	}
	debs, err := c.fetch(ctx, append(slices.Clone(pkgs), kernel))
	if err != nil {
		return "", "", err
	}
	progress("make the dom0 image")
	tree := files{}
	for _, p := range pkgs {
		if err := tree.readDeb(ctx, debs[p.Name], func(name string) bool { return !strings.HasPrefix(name, "usr/share/") }); err != nil {
			return "", "", err
		}
	}
	linux := files{}
	err = linux.readDeb(ctx, debs[kernel.Name], func(name string) bool {
		return strings.HasPrefix(name, "boot/vmlinuz-") || slices.Contains(dom0Modules, moduleName(name))
	})
	if err != nil {
		return "", "", err
	}
	if err := writeKernel(vmlinux, linux); err != nil {
		return "", "", err
	}
	err = writeWith(base, func(f *os.File) error { return writeDom0(f, r, tree, linux) })
	return base, vmlinux, err
}

// moduleName returns the name of a kernel module file, as in "xenfs".
func moduleName(name string) string {
	name, _, ok := strings.Cut(path.Base(name), ".ko")
	if !ok {
		return ""
	}
	return name
}

// writeKernel writes the ELF kernel of a kernel package.
func writeKernel(out string, linux files) error {
	vmlinuz, err := linux.kernel()
	if err != nil {
		return err
	}
	image, err := kernelimg.ELF(vmlinuz)
	if err != nil {
		return err
	}
	return writeFile(out, image)
}

func (f files) kernel() ([]byte, error) {
	for name, n := range f {
		if isVmlinuz(name) {
			return n.data, nil
		}
	}
	return nil, errors.New("the package has no kernel")
}

// isVmlinuz reports whether a file of a kernel's package is the kernel. From 6.19 on it is
// among the modules.
func isVmlinuz(name string) bool {
	return strings.HasPrefix(name, "boot/vmlinuz-") || strings.HasPrefix(name, "usr/lib/modules/") && path.Base(name) == "vmlinuz"
}

func writeDom0(out io.Writer, r release, tree, linux files) error {
	w := cpio.NewWriter(out)
	for _, dir := range []string{"dev", "proc", "sys", "run", "tmp", "root", "var/log/xen", "var/lib/xen", "etc/xen", "lab/bin", "usr/bin", "usr/sbin", "usr/lib", "usr/lib64"} {
		if err := w.Dir(dir, 0o755); err != nil {
			return err
		}
	}
	links := [][2]string{
		{"usr/bin", "bin"}, {"usr/sbin", "sbin"}, {"usr/lib", "lib"}, {"usr/lib64", "lib64"},
		{"/run", "var/run"}, {"/run/lock", "var/lock"}, {"/proc/self/mounts", "etc/mtab"},
	}
	for _, l := range links {
		if err := w.Symlink(l[0], l[1]); err != nil {
			return err
		}
	}
	for name, content := range map[string]string{
		"etc/passwd": "root:x:0:0:root:/root:/bin/sh\n", "etc/group": "root:x:0:\n", "etc/hosts": "127.0.0.1 localhost\n",
		"etc/xen/xl.conf": "", "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
	} {
		if err := w.Bytes(name, 0o644, []byte(content)); err != nil {
			return err
		}
	}
	if err := w.CharDevice("dev/console", 0o600, 5, 1); err != nil {
		return err
	}
	if err := writePrograms(w, r, tree); err != nil {
		return err
	}
	if err := writeBusybox(w, tree); err != nil {
		return err
	}
	if err := writeModules(w, linux); err != nil {
		return err
	}
	return w.Close()
}

// writePrograms adds the programs with all the libraries they need.
func writePrograms(w *cpio.Writer, r release, tree files) error {
	done := map[string]bool{}
	var add func(name string, n *node) error
	add = func(name string, n *node) error {
		if done[name] {
			return nil
		}
		done[name] = true
		if err := w.Bytes(name, 0o755, n.data); err != nil {
			return err
		}
		needed, interpreter, err := dependencies(n.data)
		if err != nil {
			return fmt.Errorf("/%s: %w", name, err)
		}
		if interpreter != "" {
			ld, err := tree.resolve(interpreter)
			if err != nil {
				return fmt.Errorf("/%s: %w", name, err)
			}
			if err := add(merged(interpreter), ld); err != nil {
				return err
			}
		}
		for _, lib := range needed {
			p, n, err := tree.library(r, lib)
			if err != nil {
				return fmt.Errorf("/%s needs %w", name, err)
			}
			if err := add(p, n); err != nil {
				return err
			}
		}
		return nil
	}
	for _, name := range r.programs() {
		n, err := tree.resolve(name)
		if err != nil {
			return err
		}
		if err := add(name, n); err != nil {
			return err
		}
		if strings.HasPrefix(name, "usr/lib/xen-") {
			if err := w.Symlink("/"+name, "usr/sbin/"+path.Base(name)); err != nil {
				return err
			}
		}
	}
	for _, lib := range r.libraries() {
		p, n, err := tree.library(r, lib)
		if err != nil {
			return err
		}
		if err := add(p, n); err != nil {
			return err
		}
	}
	return nil
}

// library finds a shared library where the dynamic linker would.
func (f files) library(r release, name string) (string, *node, error) {
	for _, dir := range r.libraryFolders() {
		p := path.Join(dir, name)
		if _, ok := f[p]; !ok {
			continue
		}
		n, err := f.resolve(p)
		return p, n, err
	}
	return "", nil, fmt.Errorf("the library %s, which is in none of the lab's packages", name)
}

// dependencies returns what an ELF file needs at run time.
func dependencies(data []byte) (needed []string, interpreter string, err error) {
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return nil, "", err
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			raw, err := io.ReadAll(p.Open())
			if err != nil {
				return nil, "", err
			}
			interpreter = strings.TrimRight(string(raw), "\x00")
		}
	}
	needed, err = f.ImportedLibraries()
	return slices.DeleteFunc(needed, func(s string) bool { return strings.HasPrefix(s, "ld-linux") }), interpreter, err
}

// applets are what dom0 has of busybox under their own names.
var applets = strings.Fields(`[ ash awk base64 basename cat chmod chown cmp cp cut date dd df diff dirname dmesg du echo
	env expr false find free grep gunzip gzip head hexdump hostname id insmod kill killall ln ls lsmod md5sum mkdir mknod mktemp
	more mount mv nice od pgrep pidof pkill printenv printf ps pwd readlink realpath reset rm rmdir rmmod sed seq setsid sh
	sha256sum sleep sort stat strings stty sync tail tar tee test time timeout top touch tr true tty umount uname uniq usleep vi
	watch wc which xargs xxd yes zcat`)

func writeBusybox(w *cpio.Writer, tree files) error {
	n, err := tree.resolve("usr/bin/busybox")
	if err != nil {
		return err
	}
	if err := w.Bytes("usr/bin/busybox", 0o755, n.data); err != nil {
		return err
	}
	for _, a := range applets {
		if err := w.Symlink("busybox", "usr/bin/"+a); err != nil {
			return err
		}
	}
	return nil
}

func writeModules(w *cpio.Writer, linux files) error {
	var list []string
	for _, module := range dom0Modules {
		data, err := linux.module(module)
		if err != nil {
			return err
		}
		file := "lab/modules/" + module + ".ko"
		list = append(list, "/"+file)
		if err := w.Bytes(file, 0o644, data); err != nil {
			return err
		}
	}
	return w.Bytes(job.Modules, 0o644, []byte(strings.Join(list, "\n")+"\n"))
}

var errNoModule = errors.New("the kernel package has no module")

// module returns a kernel module, unpacked.
func (f files) module(module string) ([]byte, error) {
	for name, n := range f {
		if moduleName(name) != module {
			continue
		}
		if !strings.HasSuffix(name, ".xz") {
			return n.data, nil
		}
		r, err := xz.NewReader(bytes.NewReader(n.data))
		if err != nil {
			return nil, err
		}
		return io.ReadAll(r)
	}
	return nil, fmt.Errorf("%w %s", errNoModule, module)
}

// guestModules are kernel modules for guests to load, so that there are some:
// neither needs another, or any device.
var guestModules = []string{"dummy", "tun"}

// guestArchive is an archive with the guest's kernel modules, to be put behind the
// one with its init.
func guestArchive(linux files) ([]byte, error) {
	var b bytes.Buffer
	w := cpio.NewWriter(&b)
	for _, module := range guestModules {
		data, err := linux.module(module)
		if err != nil {
			return nil, err
		}
		if err := w.Bytes("modules/"+module+".ko", 0o644, data); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}

// buildGuestKernel makes the archive with one guest kernel, and returns the package that
// it is from.
func (c *cache) buildGuestKernel(ctx context.Context, k guestKernel) (archive string, kernel debPackage, err error) {
	a, err := c.apt(ctx, k.debian)
	if err != nil {
		return "", kernel, err
	}
	if kernel, err = a.kernelCandidate(ctx, k.meta); err != nil {
		return "", kernel, err
	}
	archive, have, err := c.made(k.image() + "-" + versionKey("guest2", []debPackage{kernel}) + ".cpio")
	if err != nil || have {
		return archive, kernel, err
	}
	return archive, kernel, c.writeGuestKernel(ctx, archive, k.series, kernel)
}

func (c *cache) writeGuestKernel(ctx context.Context, out, series string, kernel debPackage) error {
	debs, err := c.fetch(ctx, []debPackage{kernel})
	if err != nil {
		return err
	}
	progress("make the image of guest kernel %s", kernel.Name)
	linux := files{}
	err = linux.readDeb(ctx, debs[kernel.Name], func(name string) bool {
		return strings.HasPrefix(name, "boot/") || slices.Contains(guestModules, moduleName(name))
	})
	if err != nil {
		return err
	}
	modules, err := guestArchive(linux)
	if err != nil {
		return err
	}
	vmlinuz, err := linux.kernel()
	if err != nil {
		return err
	}
	vmlinux, err := kernelimg.ELF(vmlinuz)
	if err != nil {
		return err
	}
	dir := path.Join(job.Kernels, series)
	return writeWith(out, func(f *os.File) error {
		w := cpio.NewWriter(f)
		if err := w.Bytes(dir+"/vmlinux", 0o644, vmlinux); err != nil {
			return err
		}
		if err := w.Bytes(dir+"/vmlinuz", 0o644, vmlinuz); err != nil {
			return err
		}
		if err := w.Bytes(dir+"/modules.cpio", 0o644, modules); err != nil {
			return err
		}
		release := strings.TrimPrefix(kernel.Name, "linux-image-")
		if err := w.Bytes(dir+"/release", 0o644, []byte(release+"\n")); err != nil {
			return err
		}
		return w.Close()
	})
}

// buildStock takes the hypervisor out of Debian's package.
func (c *cache) buildStock(ctx context.Context, r release, a *apt) (file, version string, err error) {
	xenPackage, xenBinary := r.hypervisor()
	pkgs, err := a.candidates(ctx, xenPackage)
	if err != nil {
		return "", "", err
	}
	out, have, err := c.made("xen-stock-" + versionKey("stock", pkgs))
	if err != nil || have {
		return out, pkgs[0].Version, err
	}
	debs, err := c.fetch(ctx, pkgs)
	if err != nil {
		return "", "", err
	}
	tree := files{}
	if err := tree.readDeb(ctx, debs[xenPackage], func(name string) bool { return name == xenBinary }); err != nil {
		return "", "", err
	}
	n, err := tree.resolve(xenBinary)
	if err != nil {
		return "", "", err
	}
	z, err := gzip.NewReader(bytes.NewReader(n.data))
	if err != nil {
		return "", "", fmt.Errorf("%s: %w", xenBinary, err)
	}
	image, err := io.ReadAll(z)
	if err != nil {
		return "", "", fmt.Errorf("%s: %w", xenBinary, err)
	}
	return out, pkgs[0].Version, writeFile(out, image)
}

// xenConfig is what the hypervisor with GDBSX is configured with; all else is
// as by default.
const xenConfig = `CONFIG_EXPERT=y
CONFIG_GDBSX=y
# CONFIG_DEBUG is not set
# CONFIG_LIVEPATCH is not set
`

// buildGDBSX builds the hypervisor with GDBSX, from an archive that was put among the
// cache's sources or else from Debian's source package.
func (c *cache) buildGDBSX(ctx context.Context, r release, a *apt) (file, version string, err error) {
	archive, sum, err := c.xenArchive(r)
	if err != nil {
		return "", "", err
	}
	made := []string{xenConfig, sum}
	if archive == "" {
		pkg, _ := r.hypervisor()
		wanted, err := a.candidates(ctx, pkg)
		if err != nil {
			return "", "", err
		}
		// The build is kept until Debian has another hypervisor, even if it is of
		// an older source because the newest one was not there.
		made[1] = wanted[0].Version
	}
	out, have, err := c.made("xen-gdbsx-" + key(made...))
	if err != nil {
		return "", "", err
	}
	if have {
		version, err := os.ReadFile(out + ".version")
		if err == nil {
			return out, strings.TrimSpace(string(version)), nil
		}
	}
	tmp, err := os.MkdirTemp(c.dir, "xen-*")
	if err != nil {
		return "", "", err
	}
	defer func() { _ = os.RemoveAll(tmp) }()
	src := filepath.Join(tmp, "src")
	if archive == "" {
		version, err = c.fetchXen(ctx, r, a, tmp, src)
	} else {
		version, err = unpackXen(ctx, r, archive, src)
	}
	if err != nil {
		return "", "", err
	}
	progress("build Xen %s with GDBSX (a few minutes)", version)
	image, err := makeXen(ctx, filepath.Join(src, "xen"))
	if err != nil {
		return "", "", fmt.Errorf("build Xen: %w", err)
	}
	if err := writeFile(out+".version", []byte(version+"\n")); err != nil {
		return "", "", err
	}
	return out, version, writeFile(out, image)
}

// xenArchive returns the archive with a source of Xen that was put among the cache's
// sources, and its SHA-256 sum, or "" if there is none.
func (c *cache) xenArchive(r release) (archive, sum string, err error) {
	found, err := filepath.Glob(c.path("sources", "xen-"+r.xen+"*.tar*"))
	if err != nil || len(found) == 0 {
		return "", "", err
	}
	archive = found[len(found)-1]
	sum, err = sumSHA256(archive)
	return archive, sum, err
}

// unpackXen unpacks such an archive into src. It returns the version.
func unpackXen(ctx context.Context, r release, archive, src string) (version string, err error) {
	if err := os.Mkdir(src, 0o755); err != nil {
		return "", err
	}
	if _, err := output(ctx, src, "tar", "-x", "--strip-components=1", "-f", archive); err != nil {
		return "", fmt.Errorf("unpack the source of Xen: %w", err)
	}
	version, err = output(ctx, filepath.Join(src, "xen"), "make", "-s", "xenversion")
	version = strings.TrimSpace(version)
	if err == nil && version != r.xen && !strings.HasPrefix(version, r.xen+".") {
		err = fmt.Errorf("it is of Xen %s, not %s", version, r.xen)
	}
	if err != nil {
		return "", fmt.Errorf("the source of Xen in %s: %w", archive, err)
	}
	return version, nil
}

// fetchXen unpacks the newest source package of the release that is there into src. It
// returns the version.
func (c *cache) fetchXen(ctx context.Context, r release, a *apt, tmp, src string) (version string, err error) {
	if a == ownApt { // it usually has no source packages
		if a, err = newApt(ctx, r.debian, c.path("apt"), aptsrc.SourcePackages); err != nil {
			return "", err
		}
	}
	progress("look for the source of Xen")
	versions, err := a.sourceVersions(ctx, "xen")
	if err != nil {
		return "", err
	}
	var failed []error
	for _, v := range versions {
		if !strings.HasPrefix(v, r.xen+".") {
			continue
		}
		progress("fetch the source of Xen %s", v)
		dsc, err := a.download(ctx, "xen", v, tmp)
		if err == nil {
			_, err = output(ctx, tmp, "dpkg-source", "--no-check", "-x", dsc, src)
			return v, err
		}
		progress("not there; trying an older one")
		failed = append(failed, err)
		leftovers, _ := filepath.Glob(filepath.Join(tmp, "*"))
		for _, f := range leftovers {
			_ = os.RemoveAll(f)
		}
	}
	return "", fmt.Errorf("no source of Xen %[1]s could be fetched from this machine's package sources: %[2]w\n(a release of it, as from xenproject.org, will do: put xen-%[1]s.N.tar.gz at %[3]s)",
		r.xen, errors.Join(append(failed, fmt.Errorf("%d versions tried", len(failed)))...), c.path("sources"))
}

// makeXen builds the hypervisor in the folder xen of its source, and returns the image.
func makeXen(ctx context.Context, xen string) ([]byte, error) {
	if err := os.WriteFile(filepath.Join(xen, ".config"), []byte(xenConfig), 0o644); err != nil {
		return nil, err
	}
	jobs := fmt.Sprintf("-j%d", runtime.NumCPU())
	for _, args := range [][]string{{"olddefconfig"}, {jobs}} {
		if _, err := output(ctx, xen, "make", args...); err != nil {
			return nil, err
		}
	}
	config, err := os.ReadFile(filepath.Join(xen, ".config"))
	if err != nil {
		return nil, err
	}
	if !strings.Contains(string(config), "CONFIG_GDBSX=y\n") {
		return nil, errors.New("the configuration has no CONFIG_GDBSX=y in the end")
	}
	return os.ReadFile(filepath.Join(xen, "xen"))
}

// buildHeaders unpacks the headers of a release of Xen, and returns their folder.
func (c *cache) buildHeaders(ctx context.Context, r release) (string, error) {
	unlock, err := lock(ctx, c.path("build.lock"), "another lab build")
	if err != nil {
		return "", err
	}
	defer unlock()
	a, err := c.apt(ctx, r.debian)
	if err != nil {
		return "", err
	}
	pkgs, err := a.candidates(ctx, "libxen-dev")
	if err != nil {
		return "", err
	}
	out, have, err := c.made("xen-headers-" + versionKey("headers", pkgs))
	if err != nil || have {
		return out, err
	}
	debs, err := c.fetch(ctx, pkgs)
	if err != nil {
		return "", err
	}
	tmp, err := os.MkdirTemp(c.dir, "headers-*")
	if err != nil {
		return "", err
	}
	defer func() { _ = os.RemoveAll(tmp) }()
	if _, err := output(ctx, tmp, "dpkg-deb", "-x", debs["libxen-dev"], "."); err != nil {
		return "", err
	}
	return out, os.Rename(filepath.Join(tmp, "usr", "include"), out)
}

const modulePath = "github.com/vmprobes/vmprobes"

// buildPrograms builds dom0's and the guests' init from the source tree that
// the current folder is in. Outside of it the ones built last are used.
func (c *cache) buildPrograms(ctx context.Context) (map[string]string, error) {
	return c.buildCommands(ctx, "lab/dom0init", "lab/guestinit")
}
