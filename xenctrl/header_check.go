//go:build xenheaders && linux && amd64 && cgo

package xenctrl

// This file is for "go vet -tags xenheaders" and "go test -tags xenheaders",
// on a machine with Xen's headers (Debian: libxen-dev). It compiles only if
// every declaration in vmp.h is what the headers declare, and gives the
// header's numbers and layouts to TestHeaderValues, which compares those that
// are written in Go.

/*
#include <stddef.h>
#include <stdint.h>

#define XC_WANT_COMPAT_DEVICEMODEL_API
#include <xenctrl.h>
#include <xencall.h>
#include <xendevicemodel.h>
#include <xenevtchn.h>
#include <xenforeignmemory.h>
#include <xenstore.h>
#include <xentoollog.h>
#include <xen/domctl.h>
#include <xen/vm_event.h>
#include <xen/hvm/dm_op.h>
#include <xen/hvm/save.h>
#include <xen/io/ring.h>
#include <xen/io/xs_wire.h>
#include <xen/version.h>
#include <sys/ioctl.h>
#include <xen/sched.h>
#include <xen/sys/evtchn.h>
#include <xen/sys/privcmd.h>

#define VMP_LOGGER   xentoollog_logger
#define VMP_CONTEXT  vcpu_guest_context_any_t
#define VMP_VCPUINFO xc_vcpuinfo_t
#define VMP_DOMCTL   struct xen_domctl
#define VMP_DOMINFO  xc_domaininfo_t
#include "vmp.h"

// Every prototype.
#define VMP_SAME(result, name, params) \
	_Static_assert(__builtin_types_compatible_p(__typeof__(&name), vmp_##name##_fn *), "prototype of " #name);
VMP_XENCTRL(VMP_SAME)
VMP_XENCALL(VMP_SAME)
VMP_XENFOREIGNMEMORY(VMP_SAME)
VMP_XENDEVICEMODEL(VMP_SAME)
VMP_XENEVTCHN(VMP_SAME)
VMP_XENSTORE(VMP_SAME)

// Every structure of vmp.h.
#define VMP_OFF(own, field, theirs, their_field) \
	_Static_assert(offsetof(own, field) == offsetof(theirs, their_field), "offset of " #their_field); \
	_Static_assert(sizeof(((own *)0)->field) == sizeof(((theirs *)0)->their_field), "size of " #their_field);

_Static_assert(sizeof(struct vmp_logger) == sizeof(struct xentoollog_logger), "logger");
VMP_OFF(struct vmp_logger, vmessage, struct xentoollog_logger, vmessage)
VMP_OFF(struct vmp_logger, progress, struct xentoollog_logger, progress)
VMP_OFF(struct vmp_logger, destroy, struct xentoollog_logger, destroy)
_Static_assert(sizeof(xentoollog_level) == sizeof(int), "level");

_Static_assert(sizeof(struct xen_domctl) <= sizeof(struct vmp_domctl), "room for a domctl");
VMP_OFF(struct vmp_domctl, cmd, struct xen_domctl, cmd)
VMP_OFF(struct vmp_domctl, interface_version, struct xen_domctl, interface_version)
VMP_OFF(struct vmp_domctl, domain, struct xen_domctl, domain)
VMP_OFF(struct vmp_domctl, u, struct xen_domctl, u)
VMP_OFF(struct vmp_domctl, u.memio.pgd3val, struct xen_domctl, u.gdbsx_guest_memio.pgd3val)
VMP_OFF(struct vmp_domctl, u.memio.gva, struct xen_domctl, u.gdbsx_guest_memio.gva)
VMP_OFF(struct vmp_domctl, u.memio.uva, struct xen_domctl, u.gdbsx_guest_memio.uva)
VMP_OFF(struct vmp_domctl, u.memio.len, struct xen_domctl, u.gdbsx_guest_memio.len)
VMP_OFF(struct vmp_domctl, u.memio.gwr, struct xen_domctl, u.gdbsx_guest_memio.gwr)
VMP_OFF(struct vmp_domctl, u.memio.remain, struct xen_domctl, u.gdbsx_guest_memio.remain)
VMP_OFF(struct vmp_domctl, u.extstate.vcpu, struct xen_domctl, u.vcpuextstate.vcpu)
VMP_OFF(struct vmp_domctl, u.extstate.xfeature_mask, struct xen_domctl, u.vcpuextstate.xfeature_mask)
VMP_OFF(struct vmp_domctl, u.extstate.size, struct xen_domctl, u.vcpuextstate.size)
VMP_OFF(struct vmp_domctl, u.extstate.buffer, struct xen_domctl, u.vcpuextstate.buffer)

_Static_assert(sizeof(xc_domaininfo_t) + 256 <= sizeof(struct vmp_dominfo), "room for a domaininfo");
VMP_OFF(struct vmp_dominfo, domain, xc_domaininfo_t, domain)
VMP_OFF(struct vmp_dominfo, flags, xc_domaininfo_t, flags)
VMP_OFF(struct vmp_dominfo, tot_pages, xc_domaininfo_t, tot_pages)
VMP_OFF(struct vmp_dominfo, max_pages, xc_domaininfo_t, max_pages)
VMP_OFF(struct vmp_dominfo, shared_info_frame, xc_domaininfo_t, shared_info_frame)
VMP_OFF(struct vmp_dominfo, cpu_time, xc_domaininfo_t, cpu_time)
VMP_OFF(struct vmp_dominfo, nr_online_vcpus, xc_domaininfo_t, nr_online_vcpus)
VMP_OFF(struct vmp_dominfo, max_vcpu_id, xc_domaininfo_t, max_vcpu_id)
VMP_OFF(struct vmp_dominfo, handle, xc_domaininfo_t, handle)

_Static_assert(sizeof(xc_vcpuinfo_t) <= sizeof(struct vmp_vcpuinfo), "room for a vcpuinfo");
VMP_OFF(struct vmp_vcpuinfo, online, xc_vcpuinfo_t, online)
VMP_OFF(struct vmp_vcpuinfo, blocked, xc_vcpuinfo_t, blocked)
VMP_OFF(struct vmp_vcpuinfo, running, xc_vcpuinfo_t, running)
VMP_OFF(struct vmp_vcpuinfo, cpu_time, xc_vcpuinfo_t, cpu_time)

// Every constant of vmp.h.
_Static_assert(VMP_CONTEXT_SIZE == sizeof(vcpu_guest_context_t), "VMP_CONTEXT_SIZE");
_Static_assert(VMP_CONTEXT_ROOM >= sizeof(vcpu_guest_context_any_t), "VMP_CONTEXT_ROOM");
_Static_assert(VMP_HVM_CPU_SIZE == sizeof(HVM_SAVE_TYPE(CPU)), "VMP_HVM_CPU_SIZE");
_Static_assert(VMP_HVM_CPU_CODE == HVM_SAVE_CODE(CPU), "VMP_HVM_CPU_CODE");
_Static_assert(VMP_DOMCTL_SETVCPUEXTSTATE == XEN_DOMCTL_setvcpuextstate, "setvcpuextstate");
_Static_assert(VMP_DOMCTL_GETVCPUEXTSTATE == XEN_DOMCTL_getvcpuextstate, "getvcpuextstate");
_Static_assert(VMP_DOMCTL_GDBSX_GUESTMEMIO == XEN_DOMCTL_gdbsx_guestmemio, "gdbsx_guestmemio");
_Static_assert(VMP_XENVER_VERSION == XENVER_version, "XENVER_version");
_Static_assert(VMP_XENVER_EXTRAVERSION == XENVER_extraversion, "XENVER_extraversion");
_Static_assert(VMP_XENVER_CAPABILITIES == XENVER_capabilities, "XENVER_capabilities");
_Static_assert(XS_WATCH_PATH == 0 && XS_WATCH_TOKEN == 1, "xs_check_watch");

// What Go has: name and value in the headers.
struct vmp_value { const char *name; unsigned long long value; };
#define V(expr) { #expr, (unsigned long long)(expr) },
#define SZ(type) { "sizeof(" #type ")", sizeof(type) },
#define OFF(type, field) { #type "." #field, offsetof(type, field) },

typedef struct vm_event_st ev;
typedef struct vm_event_sring sring;
typedef struct hvm_hw_cpu hvm;
typedef vcpu_guest_context_t ctx;
typedef struct cpu_user_regs user;
typedef struct xen_domctl_getdomaininfo info;

static const struct vmp_value vmp_values[] = {
	V(DOMID_FIRST_RESERVED) V(DOMID_INVALID) V(VIRQ_DEBUGGER)
	V(XC_PAGE_SIZE)
	V(XEN_DOMINF_dying) V(XEN_DOMINF_hvm_guest) V(XEN_DOMINF_shutdown) V(XEN_DOMINF_paused)
	V(XEN_DOMINF_blocked) V(XEN_DOMINF_running) V(XEN_DOMINF_debugged)
	V(XEN_DOMINF_shutdownshift) V(XEN_DOMINF_shutdownmask)
	V(XEN_DOMCTL_pausedomain) V(XEN_DOMCTL_unpausedomain) V(XEN_DOMCTL_getdomaininfo)
	V(XEN_DOMCTL_setvcpucontext) V(XEN_DOMCTL_getvcpucontext) V(XEN_DOMCTL_getvcpuextstate)
	V(XEN_DOMCTL_setvcpuextstate) V(XEN_DOMCTL_gdbsx_guestmemio) V(XEN_DOMCTL_gdbsx_pausevcpu)
	V(XEN_DOMCTL_gdbsx_unpausevcpu) V(XEN_DOMCTL_gdbsx_domstatus)
	V(XEN_DOMCTL_DEBUG_OP_SINGLE_STEP_OFF) V(XEN_DOMCTL_DEBUG_OP_SINGLE_STEP_ON)
	V(1 << XEN_DOMCTL_MONITOR_EVENT_SINGLESTEP) V(1 << XEN_DOMCTL_MONITOR_EVENT_SOFTWARE_BREAKPOINT)
	V(1 << XEN_DOMCTL_MONITOR_EVENT_DEBUG_EXCEPTION) V(1 << XEN_DOMCTL_MONITOR_EVENT_EMUL_UNIMPLEMENTED)
	V(XENVER_version) V(XENVER_extraversion) V(XENVER_capabilities)
	SZ(xen_extraversion_t) SZ(xen_capabilities_info_t)
	V(HVM_SAVE_CODE(CPU))
	{ "IOCTL_EVTCHN_NOTIFY", (unsigned)IOCTL_EVTCHN_NOTIFY }, { "IOCTL_PRIVCMD_HYPERCALL", (unsigned)IOCTL_PRIVCMD_HYPERCALL },
	SZ(struct privcmd_hypercall) V(__HYPERVISOR_sched_op) V(SCHEDOP_yield) V(__HYPERVISOR_domctl)
	V(XEN_DOMCTL_INTERFACE_VERSION >= 0x12 && XEN_DOMCTL_INTERFACE_VERSION <= 0x18)
	V(XENSTORE_PAYLOAD_MAX) V(XENSTORE_ABS_PATH_MAX)
	V(XEN_DMOP_EVENT_hw_exc) V(XEN_DMOP_EVENT_pri_sw_exc) V(XEN_DMOP_EVENT_sw_exc)
	{ "sizeof(xen_domctl.u)", sizeof(((struct xen_domctl *)0)->u) },
	OFF(struct xen_domctl, cmd) OFF(struct xen_domctl, interface_version) OFF(struct xen_domctl, domain) OFF(struct xen_domctl, u)
	OFF(info, domain) OFF(info, flags) OFF(info, tot_pages) OFF(info, max_pages) OFF(info, shared_info_frame) OFF(info, cpu_time)
	OFF(info, nr_online_vcpus) OFF(info, max_vcpu_id) OFF(info, handle)
	SZ(struct xen_domctl_vcpucontext) OFF(struct xen_domctl_vcpucontext, vcpu) OFF(struct xen_domctl_vcpucontext, ctxt)
	SZ(struct xen_domctl_vcpuextstate) OFF(struct xen_domctl_vcpuextstate, vcpu) OFF(struct xen_domctl_vcpuextstate, xfeature_mask)
	OFF(struct xen_domctl_vcpuextstate, size) OFF(struct xen_domctl_vcpuextstate, buffer)
	OFF(struct xen_domctl_gdbsx_pauseunp_vcpu, vcpu)
	OFF(struct xen_domctl_gdbsx_domstatus, paused)
	OFF(struct xen_domctl_gdbsx_domstatus, vcpu_id)
	OFF(struct xen_domctl_gdbsx_domstatus, vcpu_ev)

	V(VM_EVENT_INTERFACE_VERSION)
	V(VM_EVENT_FLAG_VCPU_PAUSED) V(VM_EVENT_FLAG_EMULATE) V(VM_EVENT_FLAG_TOGGLE_SINGLESTEP)
	V(VM_EVENT_FLAG_ALTERNATE_P2M) V(VM_EVENT_FLAG_SET_REGISTERS) V(VM_EVENT_FLAG_SET_EMUL_INSN_DATA)
	V(VM_EVENT_REASON_UNKNOWN) V(VM_EVENT_REASON_SOFTWARE_BREAKPOINT) V(VM_EVENT_REASON_SINGLESTEP)
	V(VM_EVENT_REASON_DEBUG_EXCEPTION)

	OFF(sring, req_prod) OFF(sring, req_event) OFF(sring, rsp_prod) OFF(sring, rsp_event)
	OFF(sring, pvt) OFF(sring, ring)
#if VM_EVENT_INTERFACE_VERSION == 7 // of Xen 4.15 and later; OpenMonitor refuses others
	{ "sizeof(slot)", sizeof(((sring *)0)->ring[0]) },
	V(__RING_SIZE((sring *)0, 4096))
	SZ(ev) OFF(ev, version) OFF(ev, flags) OFF(ev, reason) OFF(ev, vcpu_id) OFF(ev, altp2m_idx) OFF(ev, u) OFF(ev, data)
	OFF(ev, u.software_breakpoint.gfn) OFF(ev, u.software_breakpoint.pending_dbg)
	OFF(ev, u.software_breakpoint.insn_length) OFF(ev, u.software_breakpoint.type)
	OFF(ev, u.debug_exception.gfn) OFF(ev, u.debug_exception.pending_dbg)
	OFF(ev, u.debug_exception.insn_length) OFF(ev, u.debug_exception.type)
	OFF(ev, u.singlestep.gfn)
	OFF(ev, data.regs.x86.rax) OFF(ev, data.regs.x86.rcx) OFF(ev, data.regs.x86.rdx) OFF(ev, data.regs.x86.rbx)
	OFF(ev, data.regs.x86.rsp) OFF(ev, data.regs.x86.rbp) OFF(ev, data.regs.x86.rsi) OFF(ev, data.regs.x86.rdi)
	OFF(ev, data.regs.x86.r8) OFF(ev, data.regs.x86.r9) OFF(ev, data.regs.x86.r10) OFF(ev, data.regs.x86.r11)
	OFF(ev, data.regs.x86.r12) OFF(ev, data.regs.x86.r13) OFF(ev, data.regs.x86.r14) OFF(ev, data.regs.x86.r15)
	OFF(ev, data.regs.x86.rflags) OFF(ev, data.regs.x86.rip)
	OFF(ev, data.regs.x86.dr6) OFF(ev, data.regs.x86.dr7)
	OFF(ev, data.regs.x86.cr0) OFF(ev, data.regs.x86.cr2) OFF(ev, data.regs.x86.cr3) OFF(ev, data.regs.x86.cr4)
	OFF(ev, data.regs.x86.msr_efer) OFF(ev, data.regs.x86.msr_star) OFF(ev, data.regs.x86.msr_lstar)
	OFF(ev, data.regs.x86.fs_base) OFF(ev, data.regs.x86.gs_base) OFF(ev, data.regs.x86.shadow_gs)
	OFF(ev, data.regs.x86.cs_sel) OFF(ev, data.regs.x86.ss_sel)
	OFF(ev, data.emul.insn.data)
	{ "sizeof(emul.insn.data)", sizeof(((ev *)0)->data.emul.insn.data) },
#endif

	SZ(hvm)
	OFF(hvm, fpu_regs) OFF(hvm, rax) OFF(hvm, rbx) OFF(hvm, rcx) OFF(hvm, rdx) OFF(hvm, rbp) OFF(hvm, rsi) OFF(hvm, rdi) OFF(hvm, rsp)
	OFF(hvm, r8) OFF(hvm, r9) OFF(hvm, r10) OFF(hvm, r11) OFF(hvm, r12) OFF(hvm, r13) OFF(hvm, r14) OFF(hvm, r15)
	OFF(hvm, rip) OFF(hvm, rflags) OFF(hvm, cr0) OFF(hvm, cr2) OFF(hvm, cr3) OFF(hvm, cr4)
	OFF(hvm, dr0) OFF(hvm, dr1) OFF(hvm, dr2) OFF(hvm, dr3) OFF(hvm, dr6) OFF(hvm, dr7)
	OFF(hvm, cs_sel) OFF(hvm, ss_sel) OFF(hvm, cs_limit) OFF(hvm, cs_base) OFF(hvm, fs_base) OFF(hvm, gs_base) OFF(hvm, idtr_base)
	OFF(hvm, cs_arbytes) OFF(hvm, shadow_gs) OFF(hvm, msr_lstar) OFF(hvm, msr_star) OFF(hvm, msr_efer) OFF(hvm, error_code)

	SZ(ctx) SZ(user) SZ(struct trap_info)
	OFF(ctx, fpu_ctxt) OFF(ctx, flags) OFF(ctx, user_regs) OFF(ctx, trap_ctxt) OFF(ctx, ldt_base) OFF(ctx, ldt_ents)
	OFF(ctx, gdt_frames) OFF(ctx, gdt_ents) OFF(ctx, kernel_ss) OFF(ctx, kernel_sp) OFF(ctx, ctrlreg) OFF(ctx, debugreg)
	OFF(ctx, event_callback_eip) OFF(ctx, failsafe_callback_eip) OFF(ctx, syscall_callback_eip) OFF(ctx, vm_assist)
	OFF(ctx, fs_base) OFF(ctx, gs_base_kernel) OFF(ctx, gs_base_user)
	OFF(user, r15) OFF(user, r14) OFF(user, r13) OFF(user, r12) OFF(user, rbp) OFF(user, rbx) OFF(user, r11) OFF(user, r10)
	OFF(user, r9) OFF(user, r8) OFF(user, rax) OFF(user, rcx) OFF(user, rdx) OFF(user, rsi) OFF(user, rdi)
	OFF(user, error_code) OFF(user, entry_vector) OFF(user, rip) OFF(user, cs) OFF(user, saved_upcall_mask)
	OFF(user, rflags) OFF(user, rsp) OFF(user, ss) OFF(user, es) OFF(user, ds) OFF(user, fs) OFF(user, gs)
	OFF(struct trap_info, vector) OFF(struct trap_info, flags) OFF(struct trap_info, cs) OFF(struct trap_info, address)
};
static unsigned vmp_ti_if(void) { struct trap_info t = { .flags = 0xff }; return TI_GET_IF(&t); }
static unsigned vmp_value_count(void) { return sizeof(vmp_values) / sizeof(vmp_values[0]); }
static const char *vmp_value_name(unsigned i) { return vmp_values[i].name; }
static unsigned long long vmp_value_of(unsigned i) { return vmp_values[i].value; }
*/
import "C"

// headerValues returns numbers, sizes and offsets as the headers have them.
func headerValues() map[string]uint64 {
	m := map[string]uint64{"TI_GET_IF": uint64(C.vmp_ti_if())}
	for i := range C.vmp_value_count() {
		m[C.GoString(C.vmp_value_name(i))] = uint64(C.vmp_value_of(i))
	}
	return m
}
