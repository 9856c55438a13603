package main

import (
	"path"

	"github.com/vmprobes/vmprobes/lab/internal/job"
)

// debian is a version of Debian.
type debian struct {
	name  string // as people call it
	suite string // as its package sources do
}

// This machine has Debian 12's package sources, and those of others are derived from
// them.
var (
	debian11 = debian{"Debian 11", "bullseye"}
	debian12 = debian{"Debian 12", "bookworm"}
	debian13 = debian{"Debian 13", "trixie"}
)

// guestKernel is a kernel for guests.
type guestKernel struct {
	series string // its folder in dom0
	debian debian
	meta   string // package that depends on the newest kernel's
}

// image returns the beginning of the name of the image. Those of Debian 12 are found by
// name by the tests that need a kernel and no Xen.
func (k guestKernel) image() string {
	if k.debian == debian12 {
		return "guest-" + k.series
	}
	return k.debian.suite + "-guest-" + k.series
}

// release is a release of Xen as a version of Debian has it.
type release struct {
	xen    string
	debian debian
	// guests are the kernels for guests. Where there is room for one, it is the first.
	guests []guestKernel
	ext2fs string // package of libext2fs.so.2
}

var (
	linux61    = guestKernel{"6.1", debian12, "linux-image-cloud-amd64"}
	linux612   = guestKernel{"6.12", debian12, "linux-image-6.12-cloud-amd64"}
	linux61213 = guestKernel{"6.12", debian13, "linux-image-cloud-amd64"}
)

var releases = []release{
	{"4.17", debian12, ownKernels(), "libext2fs2"},
	{"4.20", debian13, []guestKernel{linux61213, linux61}, "libext2fs2t64"},
}

// ownKernel returns the guest kernel of a series that this machine's Debian has.
func ownKernel(series string) (guestKernel, bool) {
	for _, k := range ownKernels() {
		if k.series == series {
			return k, true
		}
	}
	return guestKernel{}, false
}

func ownKernels() []guestKernel { return []guestKernel{linux61, linux612} }

// releaseOf returns the release of Xen that a host has.
func releaseOf(host string) release {
	r, ok := findRelease(job.Find(host).Xen)
	if !ok {
		panic("lab: no release of Xen for the host " + host)
	}
	return r
}

func findRelease(xen string) (release, bool) {
	for _, r := range releases {
		if r.xen == xen {
			return r, true
		}
	}
	return release{}, false
}

// kernels returns the series of the guests' kernels.
func (r release) kernels() []string {
	var all []string
	for _, k := range r.guests {
		all = append(all, k.series)
	}
	return all
}

const dom0Kernel = "linux-image-amd64"

// hypervisor returns the package of the hypervisor, and the file in it.
func (r release) hypervisor() (pkg, file string) {
	return "xen-hypervisor-" + r.xen + "-amd64", "boot/xen-" + r.xen + "-amd64.gz"
}

// userland returns the packages that dom0's programs and libraries come from.
func (r release) userland() []string {
	return []string{
		"busybox-static", "xen-utils-" + r.xen, "xenstore-utils",
		"libxencall1", "libxendevicemodel1", "libxenevtchn1", "libxenforeignmemory1", "libxengnttab1", "libxenhypfs1",
		"libxenmisc" + r.xen, "libxenstore4", "libxentoolcore1", "libxentoollog1",
		"libc6", "libgcc-s1", "libyajl2", "zlib1g", "liblzma5", "libzstd1", "libuuid1", r.ext2fs, "libcom-err2",
		"libbz2-1.0", "liblzo2-2", "libnl-3-200", "libnl-route-3-200", "libtinfo6", "libncurses6",
	}
}

// programs returns what dom0 gets out of them; the libraries follow.
func (r release) programs() []string {
	var all []string
	for _, p := range []string{"xl", "xenstored", "xenconsoled", "xenconsole", "xen-init-dom0", "libxl-save-helper", "xenctx", "xen-access"} {
		all = append(all, path.Join(job.XenBin(r.xen), p)[1:])
	}
	for _, p := range []string{"xenstore-ls", "xenstore-read", "xenstore-write", "xenstore-list", "xenstore-rm", "xenstore-exists"} {
		all = append(all, "usr/bin/"+p)
	}
	return all
}

// libraries returns what is needed although nothing links to it: it is opened by name,
// by the C library or by the tests.
func (r release) libraries() []string {
	return []string{
		"libgcc_s.so.1", "libc.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1", "libm.so.6", "libresolv.so.2", "libutil.so.1",
		"libxenctrl.so." + r.xen, "libxenguest.so." + r.xen, "libxenforeignmemory.so.1", "libxenevtchn.so.1", "libxendevicemodel.so.1",
		"libxenstore.so.4", "libxentoollog.so.1", "libxencall.so.1", "libxengnttab.so.1", "libxentoolcore.so.1", "libxenhypfs.so.1",
	}
}

// libraryFolders returns where the dynamic linker looks for libraries.
func (r release) libraryFolders() []string {
	own := path.Join(path.Dir(job.XenBin(r.xen)), "lib")[1:]
	return []string{"usr/lib/x86_64-linux-gnu", "usr/lib", "usr/lib64", own + "/x86_64-linux-gnu", own}
}
