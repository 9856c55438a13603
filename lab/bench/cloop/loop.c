/*
 * The least that a C program over Xen's libraries needs to do for a breakpoint,
 * as a measure of what vmprobes costs. "make bench-lab" builds and runs it; it
 * isn't part of the library, and no tool: one vCPU, one address, one instruction
 * that must be a NOP.
 *
 *	loop emulate|step|debugger DOMID ADDRESS WARMUP HITS COUNTED
 *
 * emulate   vm_event: the response has RIP behind the NOP
 * step      vm_event: the byte is restored, the vCPU steps, the int3 is put back
 *           (by the monitor trap flag; by RFLAGS.TF where there is none)
 * debugger  gdbsx domctls, polled without rest
 *
 * It times HITS hits after WARMUP ones and prints
 *
 *	timed HITS NANOSECONDS TSC
 *
 * waits for a line on its input, runs COUNTED more hits, prints "counted POLLS"
 * with the number of polls that found nothing, waits for another line, and leaves
 * the guest as it was. So it does if a signal or an error ends it early.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#include <x86intrin.h>

#include <xenctrl.h>
#include <xenevtchn.h>
#include <xenforeignmemory.h>
#include <xen/vm_event.h>

#define TF (1u << 8)
#define IF (1u << 9)

static volatile sig_atomic_t ended;

static void end(int sig) { ended = sig; }

static xc_interface *xch;
static xenforeignmemory_handle *fmem;
static uint32_t dom;
static uint64_t addr;
static unsigned len;          /* of the NOP */
static volatile uint8_t *text; /* its first byte, mapped */
static uint8_t orig;
static uint64_t warmup, hits, counted, seen, polls;

static void complain(const char *what, ...)
{
	va_list ap;
	int e = errno;

	va_start(ap, what);
	fprintf(stderr, "loop: ");
	vfprintf(stderr, what, ap);
	fprintf(stderr, ": %s\n", strerror(e));
	va_end(ap);
}

/* wait_line waits for the bench program; at its end the input ends as well. */
static void wait_line(void)
{
	char c;

	while (!ended && read(0, &c, 1) == 1 && c != '\n')
		;
}

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * UINT64_C(1000000000) + t.tv_nsec;
}

/* hit counts one, and returns true when it was the last. */
static bool hit(void)
{
	static uint64_t ns, tsc;

	seen++;
	if (seen == warmup) {
		ns = now();
		tsc = __rdtsc();
	}
	if (seen == warmup + hits) {
		tsc = __rdtsc() - tsc;
		ns = now() - ns;
		printf("timed %" PRIu64 " %" PRIu64 " %" PRIu64 "\n", hits, ns, tsc);
		fflush(stdout);
		wait_line();
		polls = 0;
	}
	if (seen == warmup + hits + counted) {
		printf("counted %" PRIu64 "\n", polls);
		fflush(stdout);
		wait_line();
		return true;
	}
	return false;
}

/* find_text maps the instruction and looks whether it is a NOP. */
static int find_text(void)
{
	static const uint8_t nop4[] = { 0x0f, 0x1f, 0x40, 0x00 }, nop5[] = { 0x0f, 0x1f, 0x44, 0x00, 0x00 };
	static const uint8_t endbr[] = { 0xf3, 0x0f, 0x1e, 0xfa };
	xen_pfn_t frame = 0;
	uint8_t *page;
	int i, err = 0;

	/* In user mode the vCPU may have tables without the kernel in them. */
	for (i = 0; i < 1000 && !frame; i++) {
		frame = xc_translate_foreign_address(xch, dom, 0, addr);
		if (!frame)
			usleep(1000);
	}
	if (!frame || (addr & 4095) > 4096 - 8) {
		complain("translate %#" PRIx64, addr);
		return -1;
	}
	page = xenforeignmemory_map(fmem, dom, PROT_READ | PROT_WRITE, 1, &frame, &err);
	if (!page || err) {
		complain("map frame %#lx (%d)", (unsigned long)frame, err);
		return -1;
	}
	text = page + (addr & 4095);
	if (!memcmp((const void *)text, nop5, 5))
		len = 5;
	else if (!memcmp((const void *)text, nop4, 4) || !memcmp((const void *)text, endbr, 4))
		len = 4;
	else {
		fprintf(stderr, "loop: no NOP at %#" PRIx64 ": %02x %02x %02x %02x\n", addr, text[0], text[1], text[2], text[3]);
		return -1;
	}
	orig = text[0];
	return 0;
}

/* ---- vm_event */

static xenevtchn_handle *xce;
static vm_event_back_ring_t ring;

static bool mtf;      /* steps are made by the monitor trap flag */
static bool stepping; /* the vCPU executes the NOP */

static void take(vm_event_request_t *req)
{
	RING_IDX c = ring.req_cons;

	memcpy(req, RING_GET_REQUEST(&ring, c), sizeof(*req));
	ring.req_cons = ++c;
	ring.sring->req_event = c + 1;
}

static void put(const vm_event_response_t *rsp)
{
	RING_IDX p = ring.rsp_prod_pvt;

	memcpy(RING_GET_RESPONSE(&ring, p), rsp, sizeof(*rsp));
	ring.rsp_prod_pvt = ++p;
	RING_PUSH_RESPONSES(&ring);
}

/* answer makes *m the response, and returns true when the loop is done. */
static bool answer(vm_event_request_t *m, bool step)
{
	uint32_t flags = m->flags & VM_EVENT_FLAG_VCPU_PAUSED;
	bool last = false;

	m->version = VM_EVENT_INTERFACE_VERSION;
	if (m->reason == VM_EVENT_REASON_SOFTWARE_BREAKPOINT && m->data.regs.x86.rip == addr && *text == 0xcc) {
		if (step) {
			*text = orig;
			stepping = true;
			if (mtf) {
				flags |= VM_EVENT_FLAG_TOGGLE_SINGLESTEP;
			} else {
				flags |= VM_EVENT_FLAG_SET_REGISTERS;
				m->data.regs.x86.rflags = (m->data.regs.x86.rflags | TF) & ~(uint64_t)IF;
			}
		} else {
			last = hit();
			flags |= VM_EVENT_FLAG_SET_REGISTERS;
			m->data.regs.x86.rip += len;
		}
	} else if (step && (m->reason == VM_EVENT_REASON_SINGLESTEP || m->reason == VM_EVENT_REASON_DEBUG_EXCEPTION)) {
		last = hit();
		*text = 0xcc;
		stepping = false;
		if (mtf) {
			flags |= VM_EVENT_FLAG_TOGGLE_SINGLESTEP;
		} else {
			flags |= VM_EVENT_FLAG_SET_REGISTERS;
			/* do_sys_openat2 runs with interrupts on */
			m->data.regs.x86.rflags = (m->data.regs.x86.rflags & ~(uint64_t)TF) | IF;
		}
	}
	m->flags = flags;
	return last;
}

static int monitor(bool step)
{
	uint32_t remote, caps = 0;
	int port, rc = -1;
	vm_event_request_t req;
	bool last = false;
	void *page;
	struct pollfd pfd;

	if (xc_monitor_get_capabilities(xch, dom, &caps) < 0) {
		complain("monitor capabilities");
		return -1;
	}
	mtf = caps & (1u << XEN_DOMCTL_MONITOR_EVENT_SINGLESTEP);
	if (!(xce = xenevtchn_open(NULL, 0))) {
		complain("open event channels");
		return -1;
	}
	if (!(page = xc_monitor_enable(xch, dom, &remote))) {
		complain("monitor enable");
		return -1;
	}
	SHARED_RING_INIT((vm_event_sring_t *)page);
	BACK_RING_INIT(&ring, (vm_event_sring_t *)page, 4096);
	if ((port = xenevtchn_bind_interdomain(xce, dom, remote)) < 0) {
		complain("bind event channel");
		xc_domain_pause(xch, dom);
		goto disable;
	}
	if (xc_monitor_software_breakpoint(xch, dom, true) < 0 ||
	    (step && (mtf ? xc_monitor_singlestep(xch, dom, true) : xc_monitor_debug_exceptions(xch, dom, true, true)) < 0)) {
		complain("monitor events");
		goto off;
	}
	pfd = (struct pollfd){ .fd = xenevtchn_fd(xce), .events = POLLIN };
	*text = 0xcc;
	while (!last && (!ended || stepping)) {
		int p;

		if (poll(&pfd, 1, -1) < 0) {
			if (errno == EINTR)
				continue;
			complain("poll");
			break;
		}
		if ((p = xenevtchn_pending(xce)) < 0 || xenevtchn_unmask(xce, p) < 0) {
			complain("event channel");
			break;
		}
		while (RING_HAS_UNCONSUMED_REQUESTS(&ring)) {
			take(&req);
			last |= answer(&req, step);
			put(&req);
			if (xenevtchn_notify(xce, port) < 0)
				complain("notify");
		}
	}
	rc = last ? 0 : -1;
off:
	/* Nothing stops any more; what did is let go where it was. */
	xc_domain_pause(xch, dom);
	*text = orig;
	while (RING_HAS_UNCONSUMED_REQUESTS(&ring)) {
		take(&req);
		req.version = VM_EVENT_INTERFACE_VERSION;
		req.flags &= VM_EVENT_FLAG_VCPU_PAUSED;
		if (req.reason == VM_EVENT_REASON_DEBUG_EXCEPTION) {
			req.flags |= VM_EVENT_FLAG_SET_REGISTERS;
			req.data.regs.x86.rflags = (req.data.regs.x86.rflags & ~(uint64_t)TF) | IF;
		}
		put(&req);
	}
	xenevtchn_notify(xce, port);
	if (step && mtf) {
		xc_domain_debug_control(xch, dom, XEN_DOMCTL_DEBUG_OP_SINGLE_STEP_OFF, 0);
		xc_monitor_singlestep(xch, dom, false);
	} else if (step) {
		xc_monitor_debug_exceptions(xch, dom, false, false);
	}
	xc_monitor_software_breakpoint(xch, dom, false);
	xenevtchn_unbind(xce, port);
disable:
	xc_monitor_disable(xch, dom);
	munmap(page, 4096);
	xenevtchn_close(xce);
	xc_domain_unpause(xch, dom);
	return rc;
}

/* ---- gdbsx */

static void *ext; /* for a vCPU's extended state */
static uint64_t ext_size, ext_mask;
static uint64_t ext_used; /* of ext_size, which the set call wants to have again */
static vcpu_guest_context_any_t ctx;

static int domctl(struct xen_domctl *d, uint32_t cmd)
{
	d->cmd = cmd;
	d->domain = dom;
	return xc_domctl(xch, d);
}

/* get_ext reads the extended state, and first how large it is if that isn't known. */
static int get_ext(void)
{
	int i, rc = -1;

	for (i = 0; i < 3 && rc < 0; i++) {
		struct xen_domctl d = { 0 };

		if (!ext_size) {
			if (domctl(&d, XEN_DOMCTL_getvcpuextstate) < 0)
				return -1;
			ext_size = d.u.vcpuextstate.size;
			ext_mask = d.u.vcpuextstate.xfeature_mask;
			if (ext_size > 65536)
				return -1;
			memset(&d, 0, sizeof(d));
		}
		d.u.vcpuextstate.xfeature_mask = ext_mask;
		d.u.vcpuextstate.size = ext_size;
		set_xen_guest_handle_raw(d.u.vcpuextstate.buffer, ext);
		if ((rc = domctl(&d, XEN_DOMCTL_getvcpuextstate)) < 0)
			ext_size = 0;
		ext_used = d.u.vcpuextstate.size;
	}
	return rc;
}

static int set_rip(uint64_t rip)
{
	struct xen_domctl d = { 0 };

	ctx.x64.user_regs.rip = rip;
	if (get_ext() < 0) {
		complain("get extended state");
		return -1;
	}
	if (xc_vcpu_setcontext(xch, dom, 0, &ctx) < 0) {
		complain("set context");
		return -1;
	}
	if (!(((uint64_t *)ext)[1] & ~UINT64_C(3))) /* no more than x87 and SSE */
		return 0;
	d.u.vcpuextstate.xfeature_mask = ext_mask;
	d.u.vcpuextstate.size = ext_used;
	set_xen_guest_handle_raw(d.u.vcpuextstate.buffer, ext);
	return domctl(&d, XEN_DOMCTL_setvcpuextstate);
}

/* stopped returns 1 when the vCPU has executed the int3, 0 if not yet. */
static int stopped(void)
{
	struct xen_domctl d = { 0 };

	if (domctl(&d, XEN_DOMCTL_gdbsx_domstatus) < 0)
		return -1;
	return d.u.gdbsx_domstatus.paused && d.u.gdbsx_domstatus.vcpu_id == 0;
}

static int debugger(void)
{
	bool last = false;
	int rc;

	/* locked in memory, as the hypervisor writes it */
	ext = mmap(NULL, 65536, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_LOCKED | MAP_POPULATE, -1, 0);
	if (ext == MAP_FAILED) {
		complain("memory");
		return -1;
	}
	if (stopped() < 0) {
		complain("gdbsx domstatus");
		return -1;
	}
	if (xc_domain_setdebugging(xch, dom, 1) < 0) {
		complain("set debugging");
		return -1;
	}
	*text = 0xcc;
	while (!ended && !last) {
		if ((rc = stopped()) < 0) {
			complain("gdbsx domstatus");
			break;
		}
		if (!rc) {
			polls++;
			continue;
		}
		if (xc_vcpu_getcontext(xch, dom, 0, &ctx) < 0) {
			complain("get context");
			break;
		}
		if (ctx.x64.user_regs.rip == addr + 1) {
			last = hit();
			if (set_rip(addr + len) < 0) {
				complain("set registers");
				break;
			}
		}
		if (xc_domain_unpause(xch, dom) < 0) {
			complain("unpause");
			break;
		}
	}
	xc_domain_pause(xch, dom);
	*text = orig;
	while (stopped() == 1) {
		if (xc_vcpu_getcontext(xch, dom, 0, &ctx) == 0 && ctx.x64.user_regs.rip == addr + 1)
			set_rip(addr);
		xc_domain_unpause(xch, dom);
	}
	xc_domain_setdebugging(xch, dom, 0);
	xc_domain_unpause(xch, dom);
	return last ? 0 : -1;
}

int main(int argc, char **argv)
{
	struct sigaction sa = { .sa_handler = end };
	int rc;

	if (argc != 7) {
		fprintf(stderr, "usage: loop emulate|step|debugger DOMID ADDRESS WARMUP HITS COUNTED\n");
		return 2;
	}
	dom = strtoul(argv[2], NULL, 0);
	addr = strtoull(argv[3], NULL, 0);
	warmup = strtoull(argv[4], NULL, 0);
	hits = strtoull(argv[5], NULL, 0);
	counted = strtoull(argv[6], NULL, 0);
	sigaction(SIGINT, &sa, NULL);
	sigaction(SIGTERM, &sa, NULL);
	sigaction(SIGHUP, &sa, NULL);
	signal(SIGPIPE, SIG_IGN);
	if (!(xch = xc_interface_open(NULL, NULL, 0)) || !(fmem = xenforeignmemory_open(NULL, 0))) {
		complain("open Xen's interfaces");
		return 1;
	}
	if (find_text() < 0)
		return 1;
	if (!strcmp(argv[1], "emulate"))
		rc = monitor(false);
	else if (!strcmp(argv[1], "step"))
		rc = monitor(true);
	else
		rc = debugger();
	return rc < 0 ? 1 : 0;
}
