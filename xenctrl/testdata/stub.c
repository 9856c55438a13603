/*
 * Stands in for Xen's libraries in TestStubLibrary: one file that is all of
 * them, with two domains, 0 and 7. It ends the process if it is given memory
 * for the hypervisor that is not from xencall_alloc_buffer, or if something is
 * still open when it is closed.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../vmp.h"

#define CHECK(x) do { if (!(x)) { fprintf(stderr, "stub: %s\n", #x); abort(); } } while (0)
#define FAIL(e) do { errno = (e); return -1; } while (0)
#define DOMAIN(d) do { if ((d) != 0 && (d) != 7) FAIL(ESRCH); } while (0)

static int live; /* buffers, mappings and handles that are open */
static void *buffers[16];

static void say(struct vmp_logger *l, ...)
{
	va_list ap;
	va_start(ap, l);
	l->vmessage(l, 9, EIO, "stub", "not to be seen %d", ap);
	va_end(ap);
	l->progress(l, "stub", "not to be seen", 1, 1, 100);
}
static void *opened(struct vmp_logger *l) { say(l, 1); live++; return &live; }
static int closed(void *h) { CHECK(h == &live); live--; return 0; }

VMP_XC *xc_interface_open(struct vmp_logger *a, struct vmp_logger *b, unsigned f) { CHECK(!f); say(b, 1); return opened(a); }
int xc_interface_close(VMP_XC *h) { closed(h); CHECK(live == 0); return 0; }
VMP_CALL *xencall_open(struct vmp_logger *l, unsigned f) { return opened(l); }
int xencall_close(VMP_CALL *h) { return closed(h); }
VMP_FM *xenforeignmemory_open(struct vmp_logger *l, unsigned f) { return opened(l); }
int xenforeignmemory_close(VMP_FM *h) { return closed(h); }
VMP_DM *xendevicemodel_open(struct vmp_logger *l, unsigned f) { return opened(l); }
int xendevicemodel_close(VMP_DM *h) { return closed(h); }

void *xencall_alloc_buffer(VMP_CALL *h, size_t n)
{
	for (int i = 0; i < 16; i++)
		if (!buffers[i]) {
			live++;
			return buffers[i] = malloc(n);
		}
	return NULL;
}
void xencall_free_buffer(VMP_CALL *h, void *p)
{
	for (int i = 0; i < 16; i++)
		if (buffers[i] == p) {
			buffers[i] = NULL;
			live--;
			free(p);
			return;
		}
	CHECK(!"free of no buffer");
}
static void *safe(uint64_t p)
{
	for (int i = 0; i < 16; i++)
		if (buffers[i] && (uintptr_t)buffers[i] == p)
			return buffers[i];
	CHECK(!"memory that is not safe");
}

int xc_version(VMP_XC *h, int cmd, void *arg)
{
	switch (cmd) {
	case 0: return 4 << 16 | 13;
	case 1: memset(arg, 'x', 16); return 0; /* without a NUL */
	case 3: strcpy(arg, "xen-3.0-x86_64 "); return 0;
	}
	FAIL(ENOSYS);
}

int xc_domain_getinfolist(VMP_XC *h, uint32_t first, unsigned max, void *out)
{
	struct vmp_dominfo d;
	CHECK(max == 1);
	if (first > 7)
		return 0;
	memset(&d, 0xEE, sizeof(d));
	d.domain = first ? 7 : 0;
	d.flags = 2;
	d.tot_pages = 100;
	d.max_pages = 200;
	d.shared_info_frame = 0x55;
	d.cpu_time = 1ull << 40;
	d.nr_online_vcpus = 2;
	d.max_vcpu_id = 3;
	for (int i = 0; i < 16; i++)
		d.handle[i] = i;
	memcpy(out, &d, offsetof(struct vmp_dominfo, room) + 300);
	return 1;
}

static unsigned char context[VMP_CONTEXT_SIZE], ext[600], guest[2 * 4096];
static uint32_t ext_size = 592;

int xc_domctl(VMP_XC *h, void *arg)
{
	struct vmp_domctl *d = arg;
	DOMAIN(d->domain);
	switch (d->cmd) {
	case 62:
		CHECK(d->u.extstate.vcpu == 1 && d->u.extstate.xfeature_mask == 7);
		if (d->u.extstate.size != ext_size)
			FAIL(EINVAL);
		memcpy(ext, safe(d->u.extstate.buffer), ext_size);
		return 0;
	case 63:
		CHECK(d->u.extstate.vcpu == 1);
		if (d->u.extstate.size == 0) {
			d->u.extstate.xfeature_mask = 7;
			d->u.extstate.size = ext_size + 8; /* the most it may be */
			return 0;
		}
		if (d->u.extstate.size < ext_size || d->u.extstate.xfeature_mask != 7)
			FAIL(EINVAL);
		ext[8] = 7;
		memcpy(safe(d->u.extstate.buffer), ext, ext_size);
		d->u.extstate.size = ext_size;
		return 0;
	case 1000: {
		void *p = safe(d->u.memio.uva);
		uint64_t a = d->u.memio.gva - 0x1000;
		CHECK(d->u.memio.pgd3val == 9);
		if (a >= sizeof(guest) || a + d->u.memio.len > sizeof(guest))
			FAIL(EFAULT);
		if (d->u.memio.gwr)
			memcpy(guest + a, p, d->u.memio.len);
		else
			memcpy(p, guest + a, d->u.memio.len);
		d->u.memio.remain = 0;
		return 0;
	}
	case 1001:
	case 1002:
		if (*(uint32_t *)d->u.pad != 1)
			FAIL(EINVAL);
		return 0;
	case 1003:
		d->u.pad[0] = 1;
		((uint32_t *)d->u.pad)[1] = 1;
		((uint32_t *)d->u.pad)[2] = 3;
		return 0;
	}
	FAIL(ENOSYS);
}

int xc_domain_pause(VMP_XC *h, uint32_t d) { DOMAIN(d); return 0; }
int xc_domain_unpause(VMP_XC *h, uint32_t d) { DOMAIN(d); return 0; }
int xc_domain_get_guest_width(VMP_XC *h, uint32_t d, unsigned *w)
{
	if (d != 7) {
		errno = ESRCH;
		return 1; /* like the real one */
	}
	*w = 8;
	return 0;
}
int xc_domain_maximum_gpfn(VMP_XC *h, uint32_t d, unsigned long *n) { DOMAIN(d); *n = 1ul << 33; return 0; }
int xc_domain_setdebugging(VMP_XC *h, uint32_t d, unsigned on) { DOMAIN(d); CHECK(on <= 1); return 0; }
int xc_domain_debug_control(VMP_XC *h, uint32_t d, uint32_t op, uint32_t v) { DOMAIN(d); if (op != 1 || v != 1) FAIL(EOPNOTSUPP); return 0; }
int xc_domain_hvm_getcontext_partial(VMP_XC *h, uint32_t d, uint16_t code, uint16_t v, void *p, uint32_t n)
{
	DOMAIN(d);
	CHECK(code == 2 && n >= VMP_HVM_CPU_SIZE);
	for (unsigned i = 0; i < VMP_HVM_CPU_SIZE; i++)
		((unsigned char *)p)[i] = i;
	return 0;
}
int xc_vcpu_getinfo(VMP_XC *h, uint32_t d, uint32_t v, void *p)
{
	struct vmp_vcpuinfo *i = p;
	DOMAIN(d);
	i->online = 1;
	i->running = 1;
	i->cpu_time = 1ull << 41;
	return 0;
}
int xc_vcpu_getcontext(VMP_XC *h, uint32_t d, uint32_t v, void *p) { DOMAIN(d); memcpy(p, context, sizeof(context)); return 0; }
int xc_vcpu_setcontext(VMP_XC *h, uint32_t d, uint32_t v, void *p) { DOMAIN(d); memcpy(context, p, sizeof(context)); ext[500]++; return 0; }
unsigned long xc_translate_foreign_address(VMP_XC *h, uint32_t d, int v, unsigned long long va) { errno = 0; return va >> 12 == 0x10 ? 0x20 : 0; }
int xc_vm_event_get_version(VMP_XC *h) { return 7; }
int xc_monitor_get_capabilities(VMP_XC *h, uint32_t d, uint32_t *c) { DOMAIN(d); *c = 0x1f7b; return 0; }
static int populated;
int xc_hvm_param_get(VMP_XC *h, uint32_t d, uint32_t p, uint64_t *v) { DOMAIN(d); CHECK(p == 28); *v = populated ? 0x28 : 0x1028; return 0; }
int xc_domain_populate_physmap_exact(VMP_XC *h, uint32_t d, unsigned long n, unsigned o, unsigned f, unsigned long *p)
{
	DOMAIN(d);
	CHECK(n == 1 && o == 0 && f == 0 && *p == 0x1028);
	*p = 0x28; // another place than asked for: which the caller follows, here
	populated = 1;
	return 0;
}
int xc_monitor_resume(VMP_XC *h, uint32_t d) { DOMAIN(d); FAIL(ENODEV); }
void *xc_monitor_enable(VMP_XC *h, uint32_t d, uint32_t *port)
{
	if (d != 7) {
		errno = EBUSY;
		return NULL;
	}
	live++;
	*port = 5;
	return mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}
int xc_monitor_disable(VMP_XC *h, uint32_t d) { live--; return 0; }
int xc_monitor_software_breakpoint(VMP_XC *h, uint32_t d, bool on) { DOMAIN(d); return 0; }
int xc_monitor_singlestep(VMP_XC *h, uint32_t d, bool on) { FAIL(EOPNOTSUPP); }
int xc_monitor_debug_exceptions(VMP_XC *h, uint32_t d, bool on, bool sync) { CHECK(!on || sync); return 0; }

void *xenforeignmemory_map(VMP_FM *h, uint32_t d, int prot, size_t n, const unsigned long *f, int *err)
{
	int bad = 0;
	for (size_t i = 0; i < n; i++)
		bad += (err[i] = f[i] >= 0x1000 ? -EINVAL : 0) != 0;
	if (bad == (int)n || (d != 0 && d != 7)) {
		errno = EINVAL;
		return NULL;
	}
	live++;
	unsigned long *p = mmap(NULL, n * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	for (size_t i = 0; i < n; i++)
		p[i * 512] = f[i];
	mprotect(p, n * 4096, prot);
	return p;
}
int xenforeignmemory_unmap(VMP_FM *h, void *p, size_t n) { live--; return munmap(p, n * 4096); }

int xendevicemodel_inject_event(VMP_DM *h, uint16_t d, int v, uint8_t vec, uint8_t type, uint32_t ec, uint8_t len, uint64_t x)
{
	DOMAIN(d);
	CHECK(v == 1 && vec == 3 && type == 6 && ec == ~0u && len == 1 && x == 1ull << 35);
	return 0;
}

/* An event sent by notify comes back at once. */
static int ec[2];
VMP_EC *xenevtchn_open(struct vmp_logger *l, unsigned f) { say(l, 1); CHECK(!pipe2(ec, O_CLOEXEC)); return (void *)ec; }
int xenevtchn_close(VMP_EC *h) { close(ec[0]); close(ec[1]); return 0; }
int xenevtchn_fd(VMP_EC *h) { return ec[0]; }
int xenevtchn_notify(VMP_EC *h, uint32_t port) { return write(ec[1], &port, 4) == 4 ? 0 : -1; }
int xenevtchn_bind_interdomain(VMP_EC *h, uint32_t d, uint32_t port) { CHECK(port == 5); return 11; }
int xenevtchn_bind_virq(VMP_EC *h, unsigned virq) { if (virq != 6) FAIL(EEXIST); return 12; }
int xenevtchn_unbind(VMP_EC *h, uint32_t port) { return 0; }
int xenevtchn_pending(VMP_EC *h) { uint32_t port; return read(ec[0], &port, 4) == 4 ? (int)port : -1; }
int xenevtchn_unmask(VMP_EC *h, uint32_t port) { return 0; }

static int xs[2];
VMP_XS *xs_open(unsigned long f) { CHECK(!pipe2(xs, O_CLOEXEC)); return (void *)xs; }
void xs_close(VMP_XS *h) { close(xs[0]); close(xs[1]); }
int xs_fileno(VMP_XS *h) { return xs[0]; }
void *xs_read(VMP_XS *h, uint32_t t, const char *path, unsigned *n)
{
	if (strcmp(path, "/local/domain/7/name")) {
		errno = ENOENT;
		return NULL;
	}
	*n = 5;
	return strdup("guest");
}
static char **list(const char *a, const char *b)
{
	char **l = malloc(2 * sizeof(*l) + 100);
	l[0] = strcpy((char *)(l + 2), a);
	l[1] = strcpy(l[0] + strlen(a) + 1, b);
	return l;
}
char **xs_directory(VMP_XS *h, uint32_t t, const char *path, unsigned *n) { *n = 2; return list("0", "7"); }
bool xs_watch(VMP_XS *h, const char *path, const char *token) { return write(xs[1], "", 1) == 1; }
bool xs_unwatch(VMP_XS *h, const char *path, const char *token) { errno = ENOENT; return false; }
char **xs_check_watch(VMP_XS *h)
{
	char c;
	if (read(xs[0], &c, 1) != 1) {
		errno = EAGAIN;
		return NULL;
	}
	return list("@releaseDomain", "vmprobes");
}
