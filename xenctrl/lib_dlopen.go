//go:build linux && amd64 && cgo

package xenctrl

/*
#cgo CFLAGS: -std=gnu11 -Wall
#cgo LDFLAGS: -ldl

// What a hit calls keeps no pointer, so that Go need not allocate what it points
// to, and C never calls Go.
#cgo noescape vmp_first_domain
#cgo nocallback vmp_first_domain
#cgo nocallback vmp_pause
#cgo nocallback vmp_unpause
#cgo noescape vmp_get_context
#cgo nocallback vmp_get_context
#cgo noescape vmp_set_context
#cgo nocallback vmp_set_context
#cgo noescape vmp_ext_room
#cgo nocallback vmp_ext_room
#cgo noescape vmp_get_extstate
#cgo nocallback vmp_get_extstate
#cgo noescape vmp_set_extstate
#cgo nocallback vmp_set_extstate
#cgo noescape vmp_write
#cgo nocallback vmp_write
#cgo noescape vmp_domctl
#cgo nocallback vmp_domctl

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include "vmp.h"

// Every function below returns 0 or more if it worked and -errno if not.

static int vmp_fail(void) { return errno > 0 ? -errno : -EIO; }

// A logger that says nothing: errors are in errno.
static void vmp_no_message(struct vmp_logger *l, int level, int errnoval,
			   const char *context, const char *format, va_list al) {}
static void vmp_no_progress(struct vmp_logger *l, const char *context,
			    const char *doing_what, int percent,
			    unsigned long done, unsigned long total) {}
static void vmp_no_destroy(struct vmp_logger *l) {}
static struct vmp_logger vmp_quiet = { vmp_no_message, vmp_no_progress, vmp_no_destroy };

#define VMP_FIELD(result, name, params) vmp_##name##_fn *name;
#define VMP_RESOLVE(result, name, params) \
	if (!(f->name = (vmp_##name##_fn *)dlsym(so, #name))) { snprintf(err, n, "%s has no %s", file, #name); return -ENOSYS; }

// vmp_open_so loads a library. It stays loaded, whatever comes.
static void *vmp_open_so(const char *file, char *err, size_t n)
{
	void *so = dlopen(file, RTLD_NOW | RTLD_LOCAL);
	if (!so) {
		const char *msg = dlerror();
		snprintf(err, n, "%s", msg ? msg : file);
	}
	return so;
}

#define VMP_LIBRARY(lib, LIST) \
	struct vmp_##lib { LIST(VMP_FIELD) }; \
	static int vmp_load_##lib(struct vmp_##lib *f, const char *file, char *err, size_t n) \
	{ \
		void *so = vmp_open_so(file, err, n); \
		if (!so) \
			return -ENOENT; \
		LIST(VMP_RESOLVE) \
		return 0; \
	}
VMP_LIBRARY(xenctrl, VMP_XENCTRL)
VMP_LIBRARY(xencall, VMP_XENCALL)
VMP_LIBRARY(xenforeignmemory, VMP_XENFOREIGNMEMORY)
VMP_LIBRARY(xendevicemodel, VMP_XENDEVICEMODEL)
VMP_LIBRARY(xenevtchn, VMP_XENEVTCHN)
VMP_LIBRARY(xenstore, VMP_XENSTORE)

// struct vmp is what a Handle has.
struct vmp {
	struct vmp_xenctrl xc;
	struct vmp_xencall call;
	struct vmp_xenforeignmemory fm;
	struct vmp_xendevicemodel dm;
	VMP_XC *xch;
	VMP_CALL *xcall;
	VMP_FM *fmem;
	VMP_DM *dmod;
};

static int vmp_close(struct vmp *v)
{
	if (v->dmod)
		v->dm.xendevicemodel_close(v->dmod);
	if (v->fmem)
		v->fm.xenforeignmemory_close(v->fmem);
	if (v->xcall)
		v->call.xencall_close(v->xcall);
	if (v->xch)
		v->xc.xc_interface_close(v->xch);
	free(v);
	return 0;
}

// vmp_open connects, once the libraries are loaded.
static int vmp_open(struct vmp *v)
{
	errno = 0;
	if (!(v->xch = v->xc.xc_interface_open((void *)&vmp_quiet, (void *)&vmp_quiet, 0)))
		return vmp_fail();
	if (!(v->xcall = v->call.xencall_open((void *)&vmp_quiet, 0)))
		return vmp_fail();
	if (!(v->fmem = v->fm.xenforeignmemory_open((void *)&vmp_quiet, 0)))
		return vmp_fail();
	if (!(v->dmod = v->dm.xendevicemodel_open((void *)&vmp_quiet, 0)))
		return vmp_fail();
	return 0;
}

// vmp_file stores the file that a function is from.
static void vmp_file(struct vmp *v, char *buf, size_t n)
{
	Dl_info info;
	buf[0] = 0;
	if (dladdr((void *)v->xc.xc_domctl, &info) && info.dli_fname)
		snprintf(buf, n, "%s", info.dli_fname);
}

#define VMP_TRY(expr) ({ errno = 0; int rc_ = (expr); rc_ < 0 ? vmp_fail() : rc_; })

static int vmp_version(struct vmp *v)
{
	return VMP_TRY(v->xc.xc_version(v->xch, VMP_XENVER_VERSION, NULL));
}

static int vmp_extra(struct vmp *v, char out[16])
{
	char buf[256] = { 0 };
	int rc = VMP_TRY(v->xc.xc_version(v->xch, VMP_XENVER_EXTRAVERSION, buf));
	memcpy(out, buf, 16);
	out[15] = 0;
	return rc;
}

static int vmp_caps(struct vmp *v, char out[1024])
{
	char buf[4096] = { 0 };
	int rc = VMP_TRY(v->xc.xc_version(v->xch, VMP_XENVER_CAPABILITIES, buf));
	memcpy(out, buf, 1024);
	out[1023] = 0;
	return rc;
}

// vmp_first_domain returns 1 if there is a domain, 0 if not.
static int vmp_first_domain(struct vmp *v, uint32_t first, struct vmp_dominfo *info)
{
	memset(info, 0, sizeof(*info));
	return VMP_TRY(v->xc.xc_domain_getinfolist(v->xch, first, 1, info));
}

static int vmp_pause(struct vmp *v, uint32_t dom) { return VMP_TRY(v->xc.xc_domain_pause(v->xch, dom)); }
static int vmp_unpause(struct vmp *v, uint32_t dom) { return VMP_TRY(v->xc.xc_domain_unpause(v->xch, dom)); }

static int vmp_guest_width(struct vmp *v, uint32_t dom)
{
	unsigned bytes = 0;
	errno = 0;
	// It returns 1, not -1, if it fails.
	if (v->xc.xc_domain_get_guest_width(v->xch, dom, &bytes) != 0)
		return vmp_fail();
	return (int)(bytes & 0xff);
}

static int vmp_max_gpfn(struct vmp *v, uint32_t dom, uint64_t *out)
{
	unsigned long n = 0;
	// Since 4.6 the number is in *n and the result is 0.
	int rc = VMP_TRY(v->xc.xc_domain_maximum_gpfn(v->xch, dom, &n));
	*out = n;
	return rc;
}

static int vmp_vcpu_info(struct vmp *v, uint32_t dom, uint32_t vcpu, struct vmp_vcpuinfo *info)
{
	memset(info, 0, sizeof(*info));
	return VMP_TRY(v->xc.xc_vcpu_getinfo(v->xch, dom, vcpu, info));
}

// The Go structure is copied, so that the library gets memory that is not Go's and
// has room at its end.
static int vmp_get_context(struct vmp *v, uint32_t dom, uint32_t vcpu, void *ctx)
{
	uint64_t buf[VMP_CONTEXT_ROOM / 8];
	memset(buf, 0, sizeof(buf));
	int rc = VMP_TRY(v->xc.xc_vcpu_getcontext(v->xch, dom, vcpu, buf));
	if (rc >= 0)
		memcpy(ctx, buf, VMP_CONTEXT_SIZE);
	return rc;
}

static int vmp_set_context(struct vmp *v, uint32_t dom, uint32_t vcpu, const void *ctx)
{
	uint64_t buf[VMP_CONTEXT_ROOM / 8];
	memset(buf, 0, sizeof(buf));
	memcpy(buf, ctx, VMP_CONTEXT_SIZE);
	return VMP_TRY(v->xc.xc_vcpu_setcontext(v->xch, dom, vcpu, buf));
}

// vmp_ext_room stores the largest size of a vCPU's extended state, and the mask that
// Xen expects.
static int vmp_ext_room(struct vmp *v, uint32_t dom, uint32_t vcpu, uint64_t *mask, uint64_t *room)
{
	struct vmp_domctl d = { .cmd = VMP_DOMCTL_GETVCPUEXTSTATE, .domain = dom };
	d.u.extstate.vcpu = vcpu; // all else 0 asks for the largest size
	int rc = VMP_TRY(v->xc.xc_domctl(v->xch, &d));
	*mask = d.u.extstate.xfeature_mask;
	*room = d.u.extstate.size;
	return rc;
}

// vmp_get_extstate stores the state in room bytes at out, and its size, which
// setvcpuextstate needs. xc_vcpu_get_extstate doesn't return that, and asks for the
// room each time.
static int vmp_get_extstate(struct vmp *v, uint32_t dom, uint32_t vcpu, uint64_t mask,
			    void *out, uint64_t room, uint64_t *size)
{
	struct vmp_domctl d = { .cmd = VMP_DOMCTL_GETVCPUEXTSTATE, .domain = dom };
	errno = 0;
	void *safe = v->call.xencall_alloc_buffer(v->xcall, room);
	if (!safe)
		return -ENOMEM;
	memset(safe, 0, room);
	d.u.extstate.vcpu = vcpu;
	d.u.extstate.xfeature_mask = mask;
	d.u.extstate.size = room;
	d.u.extstate.buffer = (uintptr_t)safe;
	int rc = VMP_TRY(v->xc.xc_domctl(v->xch, &d));
	if (rc >= 0 && d.u.extstate.size > room)
		rc = -EAGAIN;
	if (rc >= 0) {
		*size = d.u.extstate.size;
		memcpy(out, safe, *size);
	}
	v->call.xencall_free_buffer(v->xcall, safe);
	return rc;
}

static int vmp_set_extstate(struct vmp *v, uint32_t dom, uint32_t vcpu, uint64_t mask,
			    const void *data, size_t size)
{
	struct vmp_domctl d = { .cmd = VMP_DOMCTL_SETVCPUEXTSTATE, .domain = dom };
	errno = 0;
	void *safe = v->call.xencall_alloc_buffer(v->xcall, size);
	if (!safe)
		return -ENOMEM;
	memcpy(safe, data, size);
	d.u.extstate.vcpu = vcpu;
	d.u.extstate.xfeature_mask = mask;
	d.u.extstate.size = size;
	d.u.extstate.buffer = (uintptr_t)safe;
	int rc = VMP_TRY(v->xc.xc_domctl(v->xch, &d));
	v->call.xencall_free_buffer(v->xcall, safe);
	return rc;
}

static int vmp_hvm_cpu(struct vmp *v, uint32_t dom, uint16_t vcpu, void *rec)
{
	uint64_t buf[VMP_HVM_CPU_ROOM / 8];
	memset(buf, 0, sizeof(buf));
	int rc = VMP_TRY(v->xc.xc_domain_hvm_getcontext_partial(v->xch, dom, VMP_HVM_CPU_CODE, vcpu, buf, sizeof(buf)));
	if (rc >= 0)
		memcpy(rec, buf, VMP_HVM_CPU_SIZE);
	return rc;
}

static int vmp_set_debugging(struct vmp *v, uint32_t dom, unsigned on)
{
	return VMP_TRY(v->xc.xc_domain_setdebugging(v->xch, dom, on));
}

static int vmp_debug_control(struct vmp *v, uint32_t dom, uint32_t op, uint32_t vcpu)
{
	return VMP_TRY(v->xc.xc_domain_debug_control(v->xch, dom, op, vcpu));
}

static int vmp_domctl(struct vmp *v, uint32_t cmd, uint32_t dom, void *u)
{
	struct vmp_domctl d = { .cmd = cmd, .domain = dom };
	memcpy(&d.u, u, sizeof(d.u));
	int rc = VMP_TRY(v->xc.xc_domctl(v->xch, &d));
	memcpy(u, &d.u, sizeof(d.u));
	return rc;
}

static int vmp_gdbsx_memory(struct vmp *v, uint32_t dom, uint64_t pgd3, uint64_t va,
			    void *data, uint32_t size, int write, uint32_t *remain)
{
	struct vmp_domctl d = { .cmd = VMP_DOMCTL_GDBSX_GUESTMEMIO, .domain = dom };
	errno = 0;
	void *safe = v->call.xencall_alloc_buffer(v->xcall, size);
	if (!safe)
		return -ENOMEM;
	if (write)
		memcpy(safe, data, size);
	else
		memset(safe, 0, size);
	d.u.memio.pgd3val = pgd3;
	d.u.memio.gva = va;
	d.u.memio.uva = (uintptr_t)safe;
	d.u.memio.len = size;
	d.u.memio.gwr = !!write;
	int rc = VMP_TRY(v->xc.xc_domctl(v->xch, &d));
	if (rc >= 0) {
		*remain = d.u.memio.remain;
		if (!write)
			memcpy(data, safe, size);
	}
	v->call.xencall_free_buffer(v->xcall, safe);
	return rc;
}

static int vmp_translate(struct vmp *v, uint32_t dom, int vcpu, uint64_t va, uint64_t *frame)
{
	errno = 0;
	*frame = v->xc.xc_translate_foreign_address(v->xch, dom, vcpu, va);
	if (*frame)
		return 0;
	return errno > 0 ? -errno : -EFAULT;
}

// vmp_map stores an errno for each frame in errs, and returns 1 if one of them
// is not 0.
static int vmp_map(struct vmp *v, uint32_t dom, int write, size_t n,
		   const uint64_t *frames, int32_t *errs, void **out)
{
	int bad = 0;
	unsigned long *copy = calloc(n, sizeof(*copy));
	int *err = calloc(n, sizeof(*err));
	if (!copy || !err) {
		free(copy);
		free(err);
		return -ENOMEM;
	}
	for (size_t i = 0; i < n; i++)
		copy[i] = frames[i];
	errno = 0;
	void *mem = v->fm.xenforeignmemory_map(v->fmem, dom, PROT_READ | (write ? PROT_WRITE : 0), n, copy, err);
	int rc = mem ? 0 : vmp_fail();
	for (size_t i = 0; mem && i < n; i++) {
		errs[i] = err[i] < 0 ? -err[i] : err[i];
		bad |= err[i] != 0;
	}
	free(copy);
	free(err);
	if (!mem)
		return rc;
	if (bad) {
		v->fm.xenforeignmemory_unmap(v->fmem, mem, n);
		return 1;
	}
	*out = mem;
	return 0;
}

// vmp_write writes n bytes within a frame, which is mapped only for that.
static int vmp_write(struct vmp *v, uint32_t dom, uint64_t frame, size_t off, const void *buf, size_t n)
{
	unsigned long pfn = frame;
	int err = 0;
	errno = 0;
	char *mem = v->fm.xenforeignmemory_map(v->fmem, dom, PROT_READ | PROT_WRITE, 1, &pfn, &err);
	if (!mem)
		return vmp_fail();
	if (!err)
		memcpy(mem + off, buf, n);
	int rc = VMP_TRY(v->fm.xenforeignmemory_unmap(v->fmem, mem, 1));
	return err ? (err < 0 ? err : -err) : rc;
}

static int vmp_unmap(struct vmp *v, void *mem, size_t n)
{
	return VMP_TRY(v->fm.xenforeignmemory_unmap(v->fmem, mem, n));
}

static int vmp_inject(struct vmp *v, uint16_t dom, int vcpu, uint8_t vector, uint8_t type,
		      uint32_t error_code, uint8_t len, uint64_t extra)
{
	return VMP_TRY(v->dm.xendevicemodel_inject_event(v->dmod, dom, vcpu, vector, type, error_code, len, extra));
}

static int vmp_monitor_caps(struct vmp *v, uint32_t dom, uint32_t *caps)
{
	return VMP_TRY(v->xc.xc_monitor_get_capabilities(v->xch, dom, caps));
}

static int vmp_event_version(struct vmp *v) { return VMP_TRY(v->xc.xc_vm_event_get_version(v->xch)); }

static int vmp_monitor_enable(struct vmp *v, uint32_t dom, uint32_t *port, void **ring)
{
	errno = 0;
	*ring = v->xc.xc_monitor_enable(v->xch, dom, port);
	return *ring ? 0 : vmp_fail();
}

// vmp_monitor_map maps the page that xc_monitor_enable will make the ring
// (HVM_PARAM_MONITOR_RING_PFN, xen/include/public/hvm/params.h), and puts one there if
// there is none, as that does: no two pages are ever at that place.
static int vmp_monitor_map(struct vmp *v, uint32_t dom, void **ring)
{
	// Xen does with this what a notification makes it do, and fails if no monitor is
	// attached (vm_event_resume, xen/common/vm_event.c).
	int rc = VMP_TRY(v->xc.xc_monitor_resume(v->xch, dom));
	if (rc != -ENODEV)
		return rc < 0 ? rc : -EBUSY;
	uint64_t gfn = 0;
	rc = VMP_TRY(v->xc.xc_hvm_param_get(v->xch, dom, 28, &gfn));
	if (rc >= 0 && !gfn)
		rc = -EOPNOTSUPP;
	for (int again = 0; rc >= 0 && !*ring; again++) {
		unsigned long pfn = gfn;
		int err = 0;
		errno = 0;
		void *mem = v->fm.xenforeignmemory_map(v->fmem, dom, PROT_READ | PROT_WRITE, 1, &pfn, &err);
		if (mem && !err) {
			*ring = mem;
			break;
		}
		rc = mem ? (err < 0 ? err : -err) : vmp_fail();
		if (mem)
			v->fm.xenforeignmemory_unmap(v->fmem, mem, 1);
		if (again)
			break;
		rc = VMP_TRY(v->xc.xc_domain_populate_physmap_exact(v->xch, dom, 1, 0, 0, &pfn));
		gfn = pfn;
	}
	return rc;
}

static int vmp_monitor_unmap(void *ring)
{
	return VMP_TRY(munmap(ring, 4096));
}

static int vmp_monitor_disable(struct vmp *v, uint32_t dom) { return VMP_TRY(v->xc.xc_monitor_disable(v->xch, dom)); }
static int vmp_monitor_swbp(struct vmp *v, uint32_t dom, int on) { return VMP_TRY(v->xc.xc_monitor_software_breakpoint(v->xch, dom, on)); }
static int vmp_monitor_step(struct vmp *v, uint32_t dom, int on) { return VMP_TRY(v->xc.xc_monitor_singlestep(v->xch, dom, on)); }
static int vmp_monitor_debug(struct vmp *v, uint32_t dom, int on, int sync) { return VMP_TRY(v->xc.xc_monitor_debug_exceptions(v->xch, dom, on, sync)); }

// struct vmp_events is what EventChannels has.
struct vmp_events {
	struct vmp_xenevtchn ec;
	VMP_EC *xce;
};

static int vmp_events_open(struct vmp_events *e)
{
	errno = 0;
	return (e->xce = e->ec.xenevtchn_open((void *)&vmp_quiet, 0)) ? 0 : vmp_fail();
}

static int vmp_events_close(struct vmp_events *e)
{
	int rc = e->xce ? VMP_TRY(e->ec.xenevtchn_close(e->xce)) : 0;
	free(e);
	return rc;
}

static int vmp_events_fd(struct vmp_events *e) { return VMP_TRY(e->ec.xenevtchn_fd(e->xce)); }
static int vmp_events_virq(struct vmp_events *e, uint32_t virq) { return VMP_TRY(e->ec.xenevtchn_bind_virq(e->xce, virq)); }
static int vmp_events_bind(struct vmp_events *e, uint32_t dom, uint32_t port) { return VMP_TRY(e->ec.xenevtchn_bind_interdomain(e->xce, dom, port)); }
static int vmp_events_unbind(struct vmp_events *e, uint32_t port) { return VMP_TRY(e->ec.xenevtchn_unbind(e->xce, port)); }
static int vmp_events_notify(struct vmp_events *e, uint32_t port) { return VMP_TRY(e->ec.xenevtchn_notify(e->xce, port)); }
static int vmp_events_pending(struct vmp_events *e) { return VMP_TRY(e->ec.xenevtchn_pending(e->xce)); }
static int vmp_events_unmask(struct vmp_events *e, uint32_t port) { return VMP_TRY(e->ec.xenevtchn_unmask(e->xce, port)); }

// struct vmp_store is what Store has.
struct vmp_store {
	struct vmp_xenstore xs;
	VMP_XS *h;
};

static int vmp_store_open(struct vmp_store *s)
{
	errno = 0;
	return (s->h = s->xs.xs_open(0)) ? 0 : vmp_fail();
}

static void vmp_store_close(struct vmp_store *s)
{
	if (s->h)
		s->xs.xs_close(s->h);
	free(s);
}

static int vmp_store_fd(struct vmp_store *s) { return VMP_TRY(s->xs.xs_fileno(s->h)); }

// The caller frees the memory in *out.
static int vmp_store_read(struct vmp_store *s, const char *path, void **out, unsigned *len)
{
	errno = 0;
	return (*out = s->xs.xs_read(s->h, 0, path, len)) ? 0 : vmp_fail();
}

static int vmp_store_directory(struct vmp_store *s, const char *path, char ***out, unsigned *num)
{
	errno = 0;
	return (*out = s->xs.xs_directory(s->h, 0, path, num)) ? 0 : vmp_fail();
}

static int vmp_store_check_watch(struct vmp_store *s, char ***out)
{
	errno = 0;
	if ((*out = s->xs.xs_check_watch(s->h)))
		return 0;
	return errno > 0 ? -errno : -EAGAIN;
}

static int vmp_store_watch(struct vmp_store *s, const char *path, const char *token)
{
	errno = 0;
	return s->xs.xs_watch(s->h, path, token) ? 0 : vmp_fail();
}

static int vmp_store_unwatch(struct vmp_store *s, const char *path, const char *token)
{
	errno = 0;
	return s->xs.xs_unwatch(s->h, path, token) ? 0 : vmp_fail();
}

static char *vmp_string_at(char **list, unsigned i) { return list[i]; }
*/
import "C"

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"unsafe"
)

// Files that say what this system is; variables for the tests.
var (
	fileCapabilities = "/proc/xen/capabilities"
	filePrivcmd      = filePrivcmdDevice
	dirHypervisor    = "/sys/hypervisor"
)

// The releases whose libxenctrl is looked for, if the running one's is not
// known or not there: the name of the library has the release in it.
const (
	oldestMinor = 13
	newestMinor = 40
)

// errno makes a Go error of a C result.
func errno(rc C.int) error {
	if rc >= 0 {
		return nil
	}
	return syscall.Errno(-rc)
}

// checkControlDomain returns nil in a control domain whose hypervisor this
// process may call.
func checkControlDomain() error {
	caps, err := os.ReadFile(fileCapabilities)
	switch {
	case err == nil && !strings.Contains(string(caps), "control_d"):
		return fmt.Errorf("%w: %s does not have control_d, so this is a guest: run in dom0", ErrNotControlDomain, fileCapabilities)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%w: cannot read %s: run as root", ErrPermission, fileCapabilities)
	case err != nil:
		if _, statErr := os.Stat(filePrivcmd); statErr == nil {
			return fmt.Errorf("%w: %s is missing: in dom0, mount it with \"mount -t xenfs xenfs /proc/xen\"", ErrNotControlDomain, fileCapabilities)
		}
		return fmt.Errorf("%w: %s is missing: boot this machine under Xen and run in dom0", ErrNotControlDomain, fileCapabilities)
	}
	f, err := os.OpenFile(filePrivcmd, os.O_RDWR, 0)
	switch {
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%w: cannot open %s: run as root", ErrPermission, filePrivcmd)
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%w: %s is missing: in dom0, load it with \"modprobe xen-privcmd\"", ErrNotControlDomain, filePrivcmd)
	case err != nil:
		return fmt.Errorf("%w: %w", ErrNotControlDomain, err)
	}
	return f.Close()
}

// runningRelease returns the release of the running Xen, such as "4.17", or "".
func runningRelease() string {
	var v [2]int
	for i, name := range []string{"major", "minor"} {
		b, err := os.ReadFile(dirHypervisor + "/version/" + name)
		if err != nil {
			return ""
		}
		if v[i], err = strconv.Atoi(strings.TrimSpace(string(b))); err != nil {
			return ""
		}
	}
	return fmt.Sprintf("%d.%d", v[0], v[1])
}

// xenctrlNames returns the names that libxenctrl may have, best first.
func xenctrlNames(release string) []string {
	var names []string
	if release != "" {
		names = append(names, "libxenctrl.so."+release)
	}
	for minor := newestMinor; minor >= oldestMinor; minor-- {
		if name := fmt.Sprintf("libxenctrl.so.4.%d", minor); len(names) == 0 || name != names[0] {
			names = append(names, name)
		}
	}
	return names
}

// load calls f with a C string for a file name and room for a message, and
// makes an ErrLibraryNotFound of its failure.
func load(file, pkg string, f func(file, msg *C.char, n C.size_t) C.int) error {
	const room = 512
	name := C.CString(file)
	defer C.free(unsafe.Pointer(name))
	msg := (*C.char)(C.calloc(room, 1))
	defer C.free(unsafe.Pointer(msg))
	// dlerror is per thread.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if f(name, msg, room) == 0 {
		return nil
	}
	return fmt.Errorf("%w: %s: install it (Debian: %s; Fedora: xen-libs)", ErrLibraryNotFound, C.GoString(msg), pkg)
}

// dlLib is the lib of Xen's own libraries.
type dlLib struct{ v *C.struct_vmp }

var _ lib = (*dlLib)(nil)

func openLib() (lib, error) {
	if err := checkControlDomain(); err != nil {
		return nil, err
	}
	return openLibNamed(xenctrlNames(runningRelease()))
}

// openLibNamed is openLib with the names to try for libxenctrl.
func openLibNamed(names []string) (lib, error) {
	release := runningRelease()
	pkg := "libxenmisc" + release
	if release == "" {
		pkg = "libxenmisc4.17 or that of your release"
	}
	var first, mismatch error
	for _, name := range names {
		l, err := loadLib(name, pkg)
		if errors.Is(err, ErrLibraryNotFound) {
			if first == nil {
				first = err
			}
			continue
		}
		if err != nil {
			return nil, err
		}
		// A hypervisor that has another version of the control interface
		// refuses all of it with EACCES.
		_, _, err = l.firstDomain(0)
		if err == nil {
			return l, nil
		}
		path := l.path()
		_ = l.close()
		switch err {
		case syscall.EACCES:
			mismatch = fmt.Errorf("%w: %s is not for the running Xen %s: install the libxenctrl of that release (Debian: %s)", ErrLibraryNotFound, path, release, pkg)
		case syscall.EPERM:
			return nil, fmt.Errorf("%w: the hypervisor refuses control operations to this domain", ErrPermission)
		default:
			return nil, opErr("open", domNone, -1, err)
		}
	}
	if mismatch != nil {
		return nil, mismatch
	}
	return nil, first
}

// loadLib loads the libraries of a Handle and connects.
func loadLib(name, pkg string) (*dlLib, error) {
	v := (*C.struct_vmp)(C.calloc(1, C.sizeof_struct_vmp))
	l := &dlLib{v}
	err := load(name, pkg, func(f, m *C.char, n C.size_t) C.int { return C.vmp_load_xenctrl(&v.xc, f, m, n) })
	if err == nil {
		err = load("libxencall.so.1", "libxencall1", func(f, m *C.char, n C.size_t) C.int { return C.vmp_load_xencall(&v.call, f, m, n) })
	}
	if err == nil {
		err = load("libxenforeignmemory.so.1", "libxenforeignmemory1", func(f, m *C.char, n C.size_t) C.int { return C.vmp_load_xenforeignmemory(&v.fm, f, m, n) })
	}
	if err == nil {
		err = load("libxendevicemodel.so.1", "libxendevicemodel1", func(f, m *C.char, n C.size_t) C.int { return C.vmp_load_xendevicemodel(&v.dm, f, m, n) })
	}
	if err == nil {
		err = openedErr("open", "is this the dom0 of a running Xen, with /dev/xen/privcmd?", C.vmp_open(v))
	}
	if err != nil {
		_ = l.close()
		return nil, err
	}
	return l, nil
}

// openedErr explains why a library could not connect. hint says what to look at.
func openedErr(op, hint string, rc C.int) error {
	err := errno(rc)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%w: %w: run as root", ErrPermission, opErr(op, domNone, -1, err))
	}
	return fmt.Errorf("%w: %s", opErr(op, domNone, -1, err), hint)
}

func (l *dlLib) path() string {
	const room = 4096
	buf := (*C.char)(C.calloc(room, 1))
	defer C.free(unsafe.Pointer(buf))
	C.vmp_file(l.v, buf, room)
	return C.GoString(buf)
}

func (l *dlLib) close() error { return errno(C.vmp_close(l.v)) }

func (l *dlLib) version() (major, minor int, extra string, err error) {
	rc := C.vmp_version(l.v)
	if rc < 0 {
		return 0, 0, "", errno(rc)
	}
	var buf [versionExtraSize]C.char
	if e := C.vmp_extra(l.v, &buf[0]); e < 0 {
		return 0, 0, "", errno(e)
	}
	return int(rc >> 16), int(rc & 0xFFFF), C.GoString(&buf[0]), nil
}

func (l *dlLib) capabilities() (string, error) {
	var buf [versionCapabilitiesSize]C.char
	if rc := C.vmp_caps(l.v, &buf[0]); rc < 0 {
		return "", errno(rc)
	}
	return strings.TrimSpace(C.GoString(&buf[0])), nil
}

func (l *dlLib) firstDomain(first DomID) (DomainInfo, bool, error) {
	var c C.struct_vmp_dominfo
	rc := C.vmp_first_domain(l.v, C.uint32_t(first), &c)
	if rc <= 0 {
		return DomainInfo{}, false, errno(rc)
	}
	return (*xenDomainInfo)(unsafe.Pointer(&c)).info(), true, nil
}

func (l *dlLib) pause(id DomID) error   { return errno(C.vmp_pause(l.v, C.uint32_t(id))) }
func (l *dlLib) unpause(id DomID) error { return errno(C.vmp_unpause(l.v, C.uint32_t(id))) }

func (l *dlLib) guestWidth(id DomID) (int, error) {
	rc := C.vmp_guest_width(l.v, C.uint32_t(id))
	return max(int(rc), 0), errno(rc)
}

func (l *dlLib) maxGPFN(id DomID) (uint64, error) {
	var n C.uint64_t
	rc := C.vmp_max_gpfn(l.v, C.uint32_t(id), &n)
	return uint64(n), errno(rc)
}

func (l *dlLib) vcpuInfo(id DomID, vcpu int, info *VCPUInfo) error {
	var c C.struct_vmp_vcpuinfo
	rc := C.vmp_vcpu_info(l.v, C.uint32_t(id), C.uint32_t(vcpu), &c)
	if rc < 0 {
		return errno(rc)
	}
	*info = VCPUInfo{Online: c.online != 0, Blocked: c.blocked != 0, Running: c.running != 0, CPUTime: uint64(c.cpu_time)}
	return nil
}

// contexts are VCPUContexts of their own: the caller's may be part of something
// that holds Go pointers, and such memory must not be given to C.
var contexts = sync.Pool{New: func() any { return new(VCPUContext) }}

func (l *dlLib) vcpuContext(id DomID, vcpu int, c *VCPUContext) error {
	own := contexts.Get().(*VCPUContext)
	defer contexts.Put(own)
	err := errno(C.vmp_get_context(l.v, C.uint32_t(id), C.uint32_t(vcpu), unsafe.Pointer(own)))
	if err == nil {
		*c = *own
	}
	return err
}

func (l *dlLib) setVCPUContext(id DomID, vcpu int, c *VCPUContext) error {
	own := contexts.Get().(*VCPUContext)
	defer contexts.Put(own)
	*own = *c
	return errno(C.vmp_set_context(l.v, C.uint32_t(id), C.uint32_t(vcpu), unsafe.Pointer(own)))
}

func (l *dlLib) vcpuExtState(id DomID, vcpu int, s *ExtState) error {
	return readExtState(l, id, vcpu, s)
}

func (l *dlLib) extRoom(id DomID, vcpu int) (uint64, uint64, error) {
	var mask, room C.uint64_t
	err := errno(C.vmp_ext_room(l.v, C.uint32_t(id), C.uint32_t(vcpu), &mask, &room))
	return uint64(mask), uint64(room), err
}

func (l *dlLib) extState(id DomID, vcpu int, mask uint64, buf []byte) (int, error) {
	var size C.uint64_t
	err := errno(C.vmp_get_extstate(l.v, C.uint32_t(id), C.uint32_t(vcpu), C.uint64_t(mask),
		unsafe.Pointer(unsafe.SliceData(buf)), C.uint64_t(len(buf)), &size))
	return int(size), err
}

func (l *dlLib) setVCPUExtState(id DomID, vcpu int, mask uint64, data []byte) error {
	return errno(C.vmp_set_extstate(l.v, C.uint32_t(id), C.uint32_t(vcpu), C.uint64_t(mask),
		unsafe.Pointer(unsafe.SliceData(data)), C.size_t(len(data))))
}

func (l *dlLib) hvmCPU(id DomID, vcpu int, rec *hvmHWCPU) error {
	return errno(C.vmp_hvm_cpu(l.v, C.uint32_t(id), C.uint16_t(vcpu), unsafe.Pointer(rec)))
}

func (l *dlLib) setDebugging(id DomID, on bool) error {
	return errno(C.vmp_set_debugging(l.v, C.uint32_t(id), C.uint(cBool(on))))
}

func (l *dlLib) debugControl(id DomID, vcpu int, op uint32) error {
	return errno(C.vmp_debug_control(l.v, C.uint32_t(id), C.uint32_t(op), C.uint32_t(vcpu)))
}

func (l *dlLib) domctl(cmd uint32, id DomID, u domctlArgs) (domctlArgs, error) {
	err := errno(C.vmp_domctl(l.v, C.uint32_t(cmd), C.uint32_t(id), unsafe.Pointer(&u)))
	return u, err
}

func (l *dlLib) gdbsxMemory(id DomID, pgd3, va uint64, buf []byte, write bool) (int, error) {
	var remain C.uint32_t
	rc := C.vmp_gdbsx_memory(l.v, C.uint32_t(id), C.uint64_t(pgd3), C.uint64_t(va),
		unsafe.Pointer(unsafe.SliceData(buf)), C.uint32_t(len(buf)), cBool(write), &remain)
	return int(remain), errno(rc)
}

func (l *dlLib) translate(id DomID, vcpu int, va uint64) (uint64, error) {
	var frame C.uint64_t
	rc := C.vmp_translate(l.v, C.uint32_t(id), C.int(vcpu), C.uint64_t(va), &frame)
	return uint64(frame), errno(rc)
}

func (l *dlLib) mapForeign(id DomID, writable bool, frames []uint64) ([]byte, []int32, error) {
	errs := make([]int32, len(frames))
	var mem unsafe.Pointer
	rc := C.vmp_map(l.v, C.uint32_t(id), cBool(writable), C.size_t(len(frames)),
		(*C.uint64_t)(unsafe.SliceData(frames)), (*C.int32_t)(unsafe.SliceData(errs)), &mem)
	switch {
	case rc < 0:
		return nil, nil, errno(rc)
	case rc > 0:
		return nil, errs, nil
	}
	return unsafe.Slice((*byte)(mem), len(frames)*PageSize), nil, nil
}

func (l *dlLib) unmapForeign(mem []byte) error {
	return errno(C.vmp_unmap(l.v, unsafe.Pointer(unsafe.SliceData(mem)), C.size_t(len(mem)/PageSize)))
}

func (l *dlLib) writeForeign(id DomID, frame uint64, off int, b []byte) error {
	return errno(C.vmp_write(l.v, C.uint32_t(id), C.uint64_t(frame), C.size_t(off), unsafe.Pointer(unsafe.SliceData(b)), C.size_t(len(b))))
}

func (l *dlLib) injectEvent(id DomID, vcpu int, vector, eventType uint8, errorCode uint32, insnLen uint8, cr2 uint64) error {
	return errno(C.vmp_inject(l.v, C.uint16_t(id), C.int(vcpu), C.uint8_t(vector), C.uint8_t(eventType),
		C.uint32_t(errorCode), C.uint8_t(insnLen), C.uint64_t(cr2)))
}

func (l *dlLib) monitorCaps(id DomID) (uint32, error) {
	var caps C.uint32_t
	rc := C.vmp_monitor_caps(l.v, C.uint32_t(id), &caps)
	return uint32(caps), errno(rc)
}

func (l *dlLib) eventVersion() (int, error) {
	rc := C.vmp_event_version(l.v)
	return max(int(rc), 0), errno(rc)
}

func (l *dlLib) monitorEnable(id DomID) (unsafe.Pointer, uint32, error) {
	var port C.uint32_t
	var ring unsafe.Pointer
	rc := C.vmp_monitor_enable(l.v, C.uint32_t(id), &port, &ring)
	return ring, uint32(port), errno(rc)
}

func (l *dlLib) monitorMap(id DomID) (unsafe.Pointer, error) {
	var ring unsafe.Pointer
	rc := C.vmp_monitor_map(l.v, C.uint32_t(id), &ring)
	return ring, errno(rc)
}

func (l *dlLib) monitorUnmap(ring unsafe.Pointer) error { return errno(C.vmp_monitor_unmap(ring)) }

func (l *dlLib) monitorDisable(id DomID) error {
	return errno(C.vmp_monitor_disable(l.v, C.uint32_t(id)))
}

func (l *dlLib) monitorSet(id DomID, what monitorEvent, on, sync bool) error {
	dom, enable := C.uint32_t(id), cBool(on)
	switch what {
	case monitorSoftwareBreakpoint:
		return errno(C.vmp_monitor_swbp(l.v, dom, enable))
	case monitorSingleStep:
		return errno(C.vmp_monitor_step(l.v, dom, enable))
	case monitorDebugExceptions:
		return errno(C.vmp_monitor_debug(l.v, dom, enable, cBool(sync)))
	}
	return syscall.EINVAL
}

func (l *dlLib) openEvents() (eventLib, error) { return openEventLib() }
func (l *dlLib) openStore() (storeLib, error)  { return openStoreLib() }

func cBool(b bool) C.int {
	if b {
		return 1
	}
	return 0
}

// dlEvents is the eventLib of libxenevtchn.
type dlEvents struct{ e *C.struct_vmp_events }

func openEventLib() (eventLib, error) {
	if err := checkControlDomain(); err != nil {
		return nil, err
	}
	e := (*C.struct_vmp_events)(C.calloc(1, C.sizeof_struct_vmp_events))
	err := load("libxenevtchn.so.1", "libxenevtchn1", func(f, m *C.char, n C.size_t) C.int { return C.vmp_load_xenevtchn(&e.ec, f, m, n) })
	if err == nil {
		err = openedErr("open event channels", "is the module xen-evtchn loaded?", C.vmp_events_open(e))
	}
	if err != nil {
		C.vmp_events_close(e)
		return nil, err
	}
	return &dlEvents{e}, nil
}

func (d *dlEvents) fd() int      { return int(C.vmp_events_fd(d.e)) }
func (d *dlEvents) close() error { return errno(C.vmp_events_close(d.e)) }

func (d *dlEvents) bindVIRQ(virq uint32) (uint32, error) {
	return portOrError(C.vmp_events_virq(d.e, C.uint32_t(virq)))
}

func (d *dlEvents) bindInterdomain(id DomID, remote uint32) (uint32, error) {
	return portOrError(C.vmp_events_bind(d.e, C.uint32_t(id), C.uint32_t(remote)))
}

func (d *dlEvents) pending() (uint32, error) { return portOrError(C.vmp_events_pending(d.e)) }

func (d *dlEvents) unbind(port uint32) error {
	return errno(C.vmp_events_unbind(d.e, C.uint32_t(port)))
}

func (d *dlEvents) notify(port uint32) error {
	return errno(C.vmp_events_notify(d.e, C.uint32_t(port)))
}

func (d *dlEvents) unmask(port uint32) error {
	return errno(C.vmp_events_unmask(d.e, C.uint32_t(port)))
}

func portOrError(rc C.int) (uint32, error) {
	if rc < 0 {
		return 0, errno(rc)
	}
	return uint32(rc), nil
}

// dlStore is the storeLib of libxenstore.
type dlStore struct{ s *C.struct_vmp_store }

func openStoreLib() (storeLib, error) {
	if err := checkControlDomain(); err != nil {
		return nil, err
	}
	s := (*C.struct_vmp_store)(C.calloc(1, C.sizeof_struct_vmp_store))
	var err error
	for _, name := range []string{"libxenstore.so.4", "libxenstore.so.3.0"} {
		e := load(name, "libxenstore4", func(f, m *C.char, n C.size_t) C.int { return C.vmp_load_xenstore(&s.xs, f, m, n) })
		if e == nil {
			err = nil
			break
		}
		if err == nil {
			err = e
		}
	}
	if err == nil {
		err = openedErr("open xenstore", "is xenstored running?", C.vmp_store_open(s))
	}
	if err != nil {
		C.vmp_store_close(s)
		return nil, err
	}
	return &dlStore{s}, nil
}

func (d *dlStore) fd() int { return int(C.vmp_store_fd(d.s)) }

func (d *dlStore) close() error {
	C.vmp_store_close(d.s)
	return nil
}

func (d *dlStore) read(path string) ([]byte, error) {
	p := C.CString(path)
	defer C.free(unsafe.Pointer(p))
	var out unsafe.Pointer
	var n C.uint
	if rc := C.vmp_store_read(d.s, p, &out, &n); rc < 0 {
		return nil, errno(rc)
	}
	defer C.free(out)
	return C.GoBytes(out, C.int(min(n, maxStoreValue))), nil
}

func (d *dlStore) directory(path string) ([]string, error) {
	p := C.CString(path)
	defer C.free(unsafe.Pointer(p))
	var out **C.char
	var n C.uint
	if rc := C.vmp_store_directory(d.s, p, &out, &n); rc < 0 {
		return nil, errno(rc)
	}
	defer C.free(unsafe.Pointer(out)) // one block of memory
	names := make([]string, n)
	for i := range names {
		names[i] = C.GoString(C.vmp_string_at(out, C.uint(i)))
	}
	return names, nil
}

func (d *dlStore) watch(path, token string) error {
	p, t := C.CString(path), C.CString(token)
	defer C.free(unsafe.Pointer(p))
	defer C.free(unsafe.Pointer(t))
	return errno(C.vmp_store_watch(d.s, p, t))
}

func (d *dlStore) unwatch(path, token string) error {
	p, t := C.CString(path), C.CString(token)
	defer C.free(unsafe.Pointer(p))
	defer C.free(unsafe.Pointer(t))
	return errno(C.vmp_store_unwatch(d.s, p, t))
}

func (d *dlStore) checkWatch() (path, token string, err error) {
	var out **C.char
	if rc := C.vmp_store_check_watch(d.s, &out); rc < 0 {
		return "", "", errno(rc)
	}
	defer C.free(unsafe.Pointer(out))
	// XS_WATCH_PATH, XS_WATCH_TOKEN: xenstore_lib.h
	return C.GoString(C.vmp_string_at(out, 0)), C.GoString(C.vmp_string_at(out, 1)), nil
}
