/*
 * Own declarations of what this package uses of Xen's libraries, so that it
 * builds without their headers. Each is compared with the headers by
 * header_check.go ("go test -tags xenheaders").
 *
 * Structures that only their address matters of are opaque here. The macros
 * stand for parameter types that header_check.go has in full.
 */
#ifndef VMP_H
#define VMP_H

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifndef VMP_LOGGER
#define VMP_LOGGER   struct vmp_logger
#define VMP_CONTEXT  void /* vcpu_guest_context_any_t */
#define VMP_VCPUINFO void /* xc_vcpuinfo_t */
#define VMP_DOMCTL   void /* struct xen_domctl */
#define VMP_DOMINFO  void /* xc_domaininfo_t */
#endif

#define VMP_XC struct xc_interface_core
#define VMP_FM struct xenforeignmemory_handle
#define VMP_DM struct xendevicemodel_handle
#define VMP_EC struct xenevtchn_handle
#define VMP_CALL struct xencall_handle
#define VMP_XS struct xs_handle

VMP_XC; VMP_FM; VMP_DM; VMP_EC; VMP_CALL; VMP_XS;

/* xentoollog.h; the level is an enum. */
struct vmp_logger {
	void (*vmessage)(struct vmp_logger *, int level, int errnoval,
			 const char *context, const char *format, va_list);
	void (*progress)(struct vmp_logger *, const char *context,
			 const char *doing_what, int percent,
			 unsigned long done, unsigned long total);
	void (*destroy)(struct vmp_logger *);
};

/* X(result, name, parameters) for each function, by library. */

#define VMP_XENCTRL(X) /* xenctrl.h */ \
	X(VMP_XC *, xc_interface_open, (VMP_LOGGER *, VMP_LOGGER *, unsigned)) \
	X(int, xc_interface_close, (VMP_XC *)) \
	X(int, xc_version, (VMP_XC *, int, void *)) \
	X(int, xc_domctl, (VMP_XC *, VMP_DOMCTL *)) \
	X(int, xc_domain_getinfolist, (VMP_XC *, uint32_t, unsigned, VMP_DOMINFO *)) \
	X(int, xc_domain_pause, (VMP_XC *, uint32_t)) \
	X(int, xc_domain_unpause, (VMP_XC *, uint32_t)) \
	X(int, xc_domain_get_guest_width, (VMP_XC *, uint32_t, unsigned *)) \
	X(int, xc_domain_maximum_gpfn, (VMP_XC *, uint32_t, unsigned long *)) \
	X(int, xc_domain_setdebugging, (VMP_XC *, uint32_t, unsigned)) \
	X(int, xc_domain_debug_control, (VMP_XC *, uint32_t, uint32_t, uint32_t)) \
	X(int, xc_domain_hvm_getcontext_partial, (VMP_XC *, uint32_t, uint16_t, uint16_t, void *, uint32_t)) \
	X(int, xc_vcpu_getinfo, (VMP_XC *, uint32_t, uint32_t, VMP_VCPUINFO *)) \
	X(int, xc_vcpu_getcontext, (VMP_XC *, uint32_t, uint32_t, VMP_CONTEXT *)) \
	X(int, xc_vcpu_setcontext, (VMP_XC *, uint32_t, uint32_t, VMP_CONTEXT *)) \
	X(int, xc_hvm_param_get, (VMP_XC *, uint32_t, uint32_t, uint64_t *)) \
	X(int, xc_domain_populate_physmap_exact, (VMP_XC *, uint32_t, unsigned long, unsigned, unsigned, unsigned long *)) \
	X(unsigned long, xc_translate_foreign_address, (VMP_XC *, uint32_t, int, unsigned long long)) \
	X(int, xc_vm_event_get_version, (VMP_XC *)) \
	X(int, xc_monitor_get_capabilities, (VMP_XC *, uint32_t, uint32_t *)) \
	X(void *, xc_monitor_enable, (VMP_XC *, uint32_t, uint32_t *)) \
	X(int, xc_monitor_disable, (VMP_XC *, uint32_t)) \
	X(int, xc_monitor_resume, (VMP_XC *, uint32_t)) \
	X(int, xc_monitor_software_breakpoint, (VMP_XC *, uint32_t, bool)) \
	X(int, xc_monitor_singlestep, (VMP_XC *, uint32_t, bool)) \
	X(int, xc_monitor_debug_exceptions, (VMP_XC *, uint32_t, bool, bool))

#define VMP_XENCALL(X) /* xencall.h */ \
	X(VMP_CALL *, xencall_open, (VMP_LOGGER *, unsigned)) \
	X(int, xencall_close, (VMP_CALL *)) \
	X(void *, xencall_alloc_buffer, (VMP_CALL *, size_t)) \
	X(void, xencall_free_buffer, (VMP_CALL *, void *))

#define VMP_XENFOREIGNMEMORY(X) /* xenforeignmemory.h */ \
	X(VMP_FM *, xenforeignmemory_open, (VMP_LOGGER *, unsigned)) \
	X(int, xenforeignmemory_close, (VMP_FM *)) \
	X(void *, xenforeignmemory_map, (VMP_FM *, uint32_t, int, size_t, const unsigned long *, int *)) \
	X(int, xenforeignmemory_unmap, (VMP_FM *, void *, size_t))

#define VMP_XENDEVICEMODEL(X) /* xendevicemodel.h */ \
	X(VMP_DM *, xendevicemodel_open, (VMP_LOGGER *, unsigned)) \
	X(int, xendevicemodel_close, (VMP_DM *)) \
	X(int, xendevicemodel_inject_event, (VMP_DM *, uint16_t, int, uint8_t, uint8_t, uint32_t, uint8_t, uint64_t))

#define VMP_XENEVTCHN(X) /* xenevtchn.h */ \
	X(VMP_EC *, xenevtchn_open, (VMP_LOGGER *, unsigned)) \
	X(int, xenevtchn_close, (VMP_EC *)) \
	X(int, xenevtchn_fd, (VMP_EC *)) \
	X(int, xenevtchn_notify, (VMP_EC *, uint32_t)) \
	X(int, xenevtchn_bind_interdomain, (VMP_EC *, uint32_t, uint32_t)) \
	X(int, xenevtchn_bind_virq, (VMP_EC *, unsigned)) \
	X(int, xenevtchn_unbind, (VMP_EC *, uint32_t)) \
	X(int, xenevtchn_pending, (VMP_EC *)) \
	X(int, xenevtchn_unmask, (VMP_EC *, uint32_t))

#define VMP_XENSTORE(X) /* xenstore.h */ \
	X(VMP_XS *, xs_open, (unsigned long)) \
	X(void, xs_close, (VMP_XS *)) \
	X(int, xs_fileno, (VMP_XS *)) \
	X(void *, xs_read, (VMP_XS *, uint32_t, const char *, unsigned *)) \
	X(char **, xs_directory, (VMP_XS *, uint32_t, const char *, unsigned *)) \
	X(bool, xs_watch, (VMP_XS *, const char *, const char *)) \
	X(bool, xs_unwatch, (VMP_XS *, const char *, const char *)) \
	X(char **, xs_check_watch, (VMP_XS *))

#define VMP_FN_TYPE(result, name, params) typedef result vmp_##name##_fn params;
VMP_XENCTRL(VMP_FN_TYPE)
VMP_XENCALL(VMP_FN_TYPE)
VMP_XENFOREIGNMEMORY(VMP_FN_TYPE)
VMP_XENDEVICEMODEL(VMP_FN_TYPE)
VMP_XENEVTCHN(VMP_FN_TYPE)
VMP_XENSTORE(VMP_FN_TYPE)

/*
 * struct xen_domctl, public/domctl.h. The operation's part is 128 bytes; the
 * rest is room for libraries that copy more.
 */
struct vmp_domctl {
	uint32_t cmd;
	uint32_t interface_version;
	uint16_t domain;
	uint16_t pad[3];
	union {
		uint8_t pad[128];
		struct { /* struct xen_domctl_gdbsx_memio */
			uint64_t pgd3val;
			uint64_t gva;
			uint64_t uva;
			uint32_t len;
			uint8_t gwr;
			uint32_t remain;
		} memio;
		struct { /* struct xen_domctl_vcpuextstate */
			uint32_t vcpu;
			uint64_t xfeature_mask;
			uint64_t size;
			uint64_t buffer; /* a guest handle: the address */
		} extstate;
	} u;
	uint8_t room[1024];
};

/*
 * The beginning of struct xen_domctl_getdomaininfo, public/domctl.h, which is
 * xc_domaininfo_t. What follows depends on the release.
 */
struct vmp_dominfo {
	uint16_t domain;
	uint16_t pad1;
	uint32_t flags;
	uint64_t tot_pages;
	uint64_t max_pages;
	uint64_t outstanding_pages;
	uint64_t shr_pages;
	uint64_t paged_pages;
	uint64_t shared_info_frame;
	uint64_t cpu_time;
	uint32_t nr_online_vcpus;
	uint32_t max_vcpu_id;
	uint32_t ssidref;
	uint8_t handle[16];
	uint8_t room[1024];
};

/* struct xen_domctl_getvcpuinfo, public/domctl.h: xc_vcpuinfo_t. */
struct vmp_vcpuinfo {
	uint32_t vcpu;
	uint8_t online;
	uint8_t blocked;
	uint8_t running;
	uint64_t cpu_time;
	uint32_t cpu;
	uint8_t room[64];
};

#define VMP_CONTEXT_SIZE 5168 /* vcpu_guest_context_t, public/arch-x86/xen.h */
#define VMP_CONTEXT_ROOM 8192
#define VMP_HVM_CPU_SIZE 1032 /* struct hvm_hw_cpu, public/arch-x86/hvm/save.h */
#define VMP_HVM_CPU_ROOM 4096
#define VMP_HVM_CPU_CODE 2    /* HVM_SAVE_CODE(CPU) */

#define VMP_DOMCTL_SETVCPUEXTSTATE 62
#define VMP_DOMCTL_GETVCPUEXTSTATE 63
#define VMP_DOMCTL_GDBSX_GUESTMEMIO 1000
#define VMP_XENVER_VERSION 0
#define VMP_XENVER_EXTRAVERSION 1
#define VMP_XENVER_CAPABILITIES 3

#endif
