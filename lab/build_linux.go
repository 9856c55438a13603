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
	"github.com/vmprobes/vmprobes/lab/internal/job"
	"github.com/vmprobes/vmprobes/lab/internal/kernelimg"
)

const (
	xenPackage = "xen-hypervisor-4.17-amd64"
	xenBinary  = "boot/xen-4.17-amd64.gz"
)

// userland are the packages that dom0's programs and libraries come from.
var userland = []string{
	"busybox-static", "xen-utils-4.17", "xenstore-utils",
	"libxencall1", "libxendevicemodel1", "libxenevtchn1", "libxenforeignmemory1", "libxengnttab1", "libxenhypfs1",
	"libxenmisc4.17", "libxenstore4", "libxentoolcore1", "libxentoollog1",
	"libc6", "libgcc-s1", "libyajl2", "zlib1g", "liblzma5", "libzstd1", "libuuid1", "libext2fs2", "libcom-err2",
	"libbz2-1.0", "liblzo2-2", "libnl-3-200", "libnl-route-3-200", "libtinfo6", "libncurses6",
}

// programs are what dom0 gets out of them; the libraries follow.
var programs = []string{
	"usr/lib/xen-4.17/bin/xl", "usr/lib/xen-4.17/bin/xenstored", "usr/lib/xen-4.17/bin/xenconsoled", "usr/lib/xen-4.17/bin/xenconsole",
	"usr/lib/xen-4.17/bin/xen-init-dom0", "usr/lib/xen-4.17/bin/libxl-save-helper", "usr/lib/xen-4.17/bin/xenctx", "usr/lib/xen-4.17/bin/xen-access",
	"usr/bin/xenstore-ls", "usr/bin/xenstore-read", "usr/bin/xenstore-write", "usr/bin/xenstore-list", "usr/bin/xenstore-rm", "usr/bin/xenstore-exists",
}

// libraries are needed although nothing links to them: they are opened by
// name, by the C library or by the tests.
var libraries = []string{
	"libgcc_s.so.1", "libc.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1", "libm.so.6", "libresolv.so.2", "libutil.so.1",
	"libxenctrl.so.4.17", "libxenguest.so.4.17", "libxenforeignmemory.so.1", "libxenevtchn.so.1", "libxendevicemodel.so.1",
	"libxenstore.so.4", "libxentoollog.so.1", "libxencall.so.1", "libxengnttab.so.1", "libxentoolcore.so.1", "libxenhypfs.so.1",
}

// dom0Modules are the kernel modules of dom0, in the order of loading.
var dom0Modules = []string{"xen-evtchn", "xen-gntdev", "xen-gntalloc", "xen-privcmd", "xenfs"}

// guestKernels are the meta packages of the guests' kernels, by series.
var guestKernels = map[string]string{
	"6.1":  "linux-image-cloud-amd64",
	"6.12": "linux-image-6.12-cloud-amd64",
}

const dom0Kernel = "linux-image-amd64"

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

	b, err := c.buildCommon(ctx)
	if err != nil {
		return err
	}
	for _, h := range hosts {
		this := *b
		if usesGDBSX(h) {
			this.Xen, this.XenVersion, err = c.buildGDBSX(ctx)
		} else {
			this.Xen, this.XenVersion, err = c.buildStock(ctx)
		}
		if err == nil && needsBochs(ctx, h) {
			this.Bochs, err = c.buildBochs(ctx)
		}
		if err != nil {
			return err
		}
		if err := c.store(h, &this); err != nil {
			return err
		}
	}
	if _, err := c.buildPrograms(ctx); err != nil {
		return err
	}
	progress("built %s in %v", strings.Join(hosts, ", "), time.Since(begin).Round(100*time.Millisecond))
	return nil
}

// buildCommon makes what all hosts share.
func (c *cache) buildCommon(ctx context.Context) (*built, error) {
	b := &built{Kernels: map[string]string{}, Versions: map[string]string{}}
	use := func(pkgs ...debPackage) {
		for _, p := range pkgs {
			b.Versions[p.Name] = p.Version
		}
	}
	pkgs, err := candidates(ctx, userland...)
	if err != nil {
		return nil, err
	}
	kernel, err := kernelCandidate(ctx, dom0Kernel)
	if err != nil {
		return nil, err
	}
	use(append(pkgs, kernel)...)
	if b.Base, b.Kernel, err = c.buildDom0(ctx, pkgs, kernel); err != nil {
		return nil, fmt.Errorf("dom0 image: %w", err)
	}
	for series, meta := range guestKernels {
		kernel, err := kernelCandidate(ctx, meta)
		if err != nil {
			return nil, err
		}
		use(kernel)
		if b.Kernels[series], err = c.buildGuestKernel(ctx, series, kernel); err != nil {
			return nil, fmt.Errorf("guest kernel %s: %w", series, err)
		}
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
	for series, meta := range guestKernels {
		kernel, err := kernelCandidate(ctx, meta)
		if err != nil {
			return err
		}
		if _, err := c.buildGuestKernel(ctx, series, kernel); err != nil {
			return fmt.Errorf("guest kernel %s: %w", series, err)
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

func (c *cache) buildDom0(ctx context.Context, pkgs []debPackage, kernel debPackage) (base, vmlinux string, err error) {
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
	err = writeWith(base, func(f *os.File) error { return writeDom0(f, tree, linux) })
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
		if strings.HasPrefix(name, "boot/vmlinuz-") {
			return n.data, nil
		}
	}
	return nil, errors.New("the package has no kernel")
}

func writeDom0(out io.Writer, tree, linux files) error {
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
	if err := writePrograms(w, tree); err != nil {
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
func writePrograms(w *cpio.Writer, tree files) error {
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
			p, n, err := tree.library(lib)
			if err != nil {
				return fmt.Errorf("/%s needs %w", name, err)
			}
			if err := add(p, n); err != nil {
				return err
			}
		}
		return nil
	}
	for _, name := range programs {
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
	for _, lib := range libraries {
		p, n, err := tree.library(lib)
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
func (f files) library(name string) (string, *node, error) {
	for _, dir := range []string{"usr/lib/x86_64-linux-gnu", "usr/lib", "usr/lib64", "usr/lib/xen-4.17/lib/x86_64-linux-gnu", "usr/lib/xen-4.17/lib"} {
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
	return nil, fmt.Errorf("the kernel package has no module %s", module)
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

// buildGuestKernel makes the archive with one guest kernel.
func (c *cache) buildGuestKernel(ctx context.Context, series string, kernel debPackage) (string, error) {
	out, have, err := c.made("guest-" + series + "-" + versionKey("guest2", []debPackage{kernel}) + ".cpio")
	if err != nil || have {
		return out, err
	}
	debs, err := c.fetch(ctx, []debPackage{kernel})
	if err != nil {
		return "", err
	}
	progress("make the image of guest kernel %s", kernel.Name)
	linux := files{}
	err = linux.readDeb(ctx, debs[kernel.Name], func(name string) bool {
		return strings.HasPrefix(name, "boot/") || slices.Contains(guestModules, moduleName(name))
	})
	if err != nil {
		return "", err
	}
	modules, err := guestArchive(linux)
	if err != nil {
		return "", err
	}
	vmlinuz, err := linux.kernel()
	if err != nil {
		return "", err
	}
	vmlinux, err := kernelimg.ELF(vmlinuz)
	if err != nil {
		return "", err
	}
	dir := path.Join(job.Kernels, series)
	err = writeWith(out, func(f *os.File) error {
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
	return out, err
}

// buildStock takes the hypervisor out of Debian's package.
func (c *cache) buildStock(ctx context.Context) (file, version string, err error) {
	pkgs, err := candidates(ctx, xenPackage)
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

// buildGDBSX builds the hypervisor with GDBSX from Debian's source package.
func (c *cache) buildGDBSX(ctx context.Context) (file, version string, err error) {
	wanted, err := candidates(ctx, xenPackage)
	if err != nil {
		return "", "", err
	}
	// The build is kept until Debian has another hypervisor, even if it is of
	// an older source because the newest one was not there.
	name := "xen-gdbsx-" + key(xenConfig, wanted[0].Version)
	out, have, err := c.made(name)
	if err != nil {
		return "", "", err
	}
	if have {
		version, err := os.ReadFile(out + ".version")
		if err == nil {
			return out, strings.TrimSpace(string(version)), nil
		}
	}
	apt, err := newPrivateApt(ctx, c.path("apt"))
	if err != nil {
		return "", "", err
	}
	progress("look for the source of Xen")
	versions, err := apt.sourceVersions(ctx, "xen")
	if err != nil {
		return "", "", err
	}
	tmp, err := os.MkdirTemp(c.dir, "xen-*")
	if err != nil {
		return "", "", err
	}
	defer func() { _ = os.RemoveAll(tmp) }()
	var dsc string
	var failed []error
	for _, v := range versions {
		progress("fetch the source of Xen %s", v)
		if dsc, err = apt.download(ctx, "xen", v, tmp); err == nil {
			version = v
			break
		}
		progress("not there; trying an older one")
		failed = append(failed, err)
		leftovers, _ := filepath.Glob(filepath.Join(tmp, "*"))
		for _, f := range leftovers {
			_ = os.RemoveAll(f)
		}
	}
	if dsc == "" {
		return "", "", fmt.Errorf("no source of Xen could be fetched: %w", errors.Join(failed...))
	}
	src := filepath.Join(tmp, "src")
	if _, err := output(ctx, tmp, "dpkg-source", "--no-check", "-x", dsc, src); err != nil {
		return "", "", err
	}
	xen := filepath.Join(src, "xen")
	if err := os.WriteFile(filepath.Join(xen, ".config"), []byte(xenConfig), 0o644); err != nil {
		return "", "", err
	}
	progress("build Xen %s with GDBSX (a few minutes)", version)
	jobs := fmt.Sprintf("-j%d", runtime.NumCPU())
	for _, args := range [][]string{{"olddefconfig"}, {jobs}} {
		if _, err := output(ctx, xen, "make", args...); err != nil {
			return "", "", fmt.Errorf("build Xen: %w", err)
		}
	}
	config, err := os.ReadFile(filepath.Join(xen, ".config"))
	if err != nil {
		return "", "", err
	}
	if !strings.Contains(string(config), "CONFIG_GDBSX=y\n") {
		return "", "", errors.New("build Xen: the configuration has no CONFIG_GDBSX=y in the end")
	}
	image, err := os.ReadFile(filepath.Join(xen, "xen"))
	if err != nil {
		return "", "", err
	}
	if err := writeFile(out+".version", []byte(version+"\n")); err != nil {
		return "", "", err
	}
	return out, version, writeFile(out, image)
}

const modulePath = "github.com/vmprobes/vmprobes"

// buildPrograms builds dom0's and the guests' init from the source tree that
// the current folder is in. Outside of it the ones built last are used.
func (c *cache) buildPrograms(ctx context.Context) (map[string]string, error) {
	return c.buildCommands(ctx, "lab/dom0init", "lab/guestinit")
}
