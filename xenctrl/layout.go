package xenctrl

// Numbers and layouts of Xen's public headers that the calls of this package
// need and that are not part of its own interface. header_check.go compares
// each of them with the headers (go test -tags xenheaders).

// Domctl numbers, from xen/include/public/domctl.h.
const (
	domctlPauseDomain       = 3    // XEN_DOMCTL_pausedomain
	domctlUnpauseDomain     = 4    // XEN_DOMCTL_unpausedomain
	domctlGetDomainInfo     = 5    // XEN_DOMCTL_getdomaininfo
	domctlSetVCPUContext    = 12   // XEN_DOMCTL_setvcpucontext
	domctlGetVCPUContext    = 13   // XEN_DOMCTL_getvcpucontext
	domctlSetVCPUExtState   = 62   // XEN_DOMCTL_setvcpuextstate
	domctlGetVCPUExtState   = 63   // XEN_DOMCTL_getvcpuextstate
	domctlGdbsxGuestMemIO   = 1000 // XEN_DOMCTL_gdbsx_guestmemio
	domctlGdbsxPauseVCPU    = 1001 // XEN_DOMCTL_gdbsx_pausevcpu
	domctlGdbsxUnpauseVCPU  = 1002 // XEN_DOMCTL_gdbsx_unpausevcpu
	domctlGdbsxDomStatus    = 1003 // XEN_DOMCTL_gdbsx_domstatus
	debugOpSingleStepOff    = 0    // XEN_DOMCTL_DEBUG_OP_SINGLE_STEP_OFF
	debugOpSingleStepOn     = 1    // XEN_DOMCTL_DEBUG_OP_SINGLE_STEP_ON
	hvmSaveCodeCPU          = 2    // HVM_SAVE_CODE(CPU), public/arch-x86/hvm/save.h
	versionNumber           = 0    // XENVER_version, public/version.h
	versionExtra            = 1    // XENVER_extraversion
	versionCapabilities     = 3    // XENVER_capabilities
	versionExtraSize        = 16   // sizeof(xen_extraversion_t)
	versionCapabilitiesSize = 1024 // sizeof(xen_capabilities_info_t)
)

// Hypercalls (__HYPERVISOR_sched_op, __HYPERVISOR_domctl, xen/include/public/xen.h;
// SCHEDOP_yield, xen/include/public/sched.h).
const (
	hypervisorSchedOp = 29
	hypervisorDomctl  = 36
	schedopYield      = 0
)

// The versions of the domctl interface (XEN_DOMCTL_INTERFACE_VERSION,
// xen/include/public/domctl.h) of Xen 4.13 and of Xen 4.22. What is used here is the
// same in all of them.
const (
	domctlOldest = 0x12
	domctlNewest = 0x18
)

// Offsets in struct xen_domctl_vcpucontext and struct xen_domctl_vcpuextstate
// (xen/include/public/domctl.h); the vCPU's number comes first in both.
const (
	domctlVCPUOff          = 0
	domctlContextHandleOff = 8
	domctlExtMaskOff       = 8
	domctlExtSizeOff       = 16
	domctlExtHandleOff     = 24
)

// xenDomainInfo is the beginning of struct xen_domctl_getdomaininfo
// (xen/include/public/domctl.h). What follows depends on the release.
type xenDomainInfo struct {
	domain                   uint16
	_                        uint16
	flags                    uint32
	totPages, maxPages       uint64
	_                        [3]uint64 // outstanding_pages, shr_pages, paged_pages
	sharedInfoFrame, cpuTime uint64
	nrOnlineVCPUs, maxVCPUID uint32
	_                        uint32 // ssidref
	handle                   [16]byte
}

// info returns the part of i that is exported.
func (i *xenDomainInfo) info() DomainInfo {
	return DomainInfo{
		ID:              DomID(i.domain),
		Flags:           DomainFlags(i.flags),
		TotalPages:      i.totPages,
		MaxPages:        i.maxPages,
		SharedInfoFrame: i.sharedInfoFrame,
		CPUTime:         i.cpuTime,
		OnlineVCPUs:     int(i.nrOnlineVCPUs),
		MaxVCPUID:       int(i.maxVCPUID),
		Handle:          i.handle,
	}
}

// VIRQDebugger (VIRQ_DEBUGGER, xen/include/public/xen.h) is the virtual
// interrupt by which Xen says that some domain was paused for its debugger. It
// is not raised for int3, and has one listener at a time.
const VIRQDebugger uint32 = 6

// domctlArgs is the operation's part of struct xen_domctl (its union u).
type domctlArgs [128]byte

// Offsets in struct xen_domctl_gdbsx_pauseunp_vcpu and
// struct xen_domctl_gdbsx_domstatus (xen/include/public/domctl.h).
const (
	gdbsxPauseVCPUOff     = 0
	gdbsxStatusPausedOff  = 0
	gdbsxStatusVCPUIDOff  = 4
	gdbsxStatusVCPUEvOff  = 8
	gdbsxStatusNoVCPU     = 0xFFFFFFFF
	gdbsxMaxBytesPerCall  = PageSize
	extStateHeader        = 16       // xcr0 and xcr0_accum before the XSAVE area
	extStateMax           = 64 << 10 // more than any XSAVE area (AMX: 11 KiB)
	xstateLegacy          = 1 | 2    // XSTATE_FP_SSE: what setcontext preserves
	mapForeignMax         = 1 << 18  // frames of one mapping: 1 GiB
	maxInsnLen            = 15
	maxDomainNameLen      = 1024
	maxStoreValue         = 4096 // XENSTORE_PAYLOAD_MAX, public/io/xs_wire.h
	maxStorePath          = 3072 // XENSTORE_ABS_PATH_MAX
	maxWatchPathsPerStore = 1024
)

// hvmHWCPU is struct hvm_hw_cpu (xen/include/public/arch-x86/hvm/save.h), the
// CPU record of an HVM guest's saved state.
type hvmHWCPU struct {
	FPURegs [512]byte

	RAX, RBX, RCX, RDX, RBP, RSI, RDI, RSP, R8, R9, R10, R11, R12, R13, R14, R15 uint64

	RIP, RFLAGS                  uint64
	CR0, CR2, CR3, CR4           uint64
	DR0, DR1, DR2, DR3, DR6, DR7 uint64

	CSSel, DSSel, ESSel, FSSel, GSSel, SSSel, TRSel, LDTRSel                                       uint32
	CSLimit, DSLimit, ESLimit, FSLimit, GSLimit, SSLimit, TRLimit, LDTRLimit, IDTRLimit, GDTRLimit uint32
	CSBase, DSBase, ESBase, FSBase, GSBase, SSBase, TRBase, LDTRBase, IDTRBase, GDTRBase           uint64
	CSARBytes, DSARBytes, ESARBytes, FSARBytes, GSARBytes, SSARBytes, TRARBytes, LDTRARBytes       uint32
	SysenterCS, SysenterESP, SysenterEIP                                                           uint64
	ShadowGS                                                                                       uint64
	MSRFlags, MSRLSTAR, MSRSTAR, MSRCSTAR, MSRSyscallMask, MSREFER, MSRTSCAux                      uint64
	TSC                                                                                            uint64
	PendingEvent, ErrorCode, Flags, Pad0                                                           uint32
}

// cpu returns the part of r that is exported.
func (r *hvmHWCPU) cpu() HVMCPU {
	return HVMCPU{
		RAX: r.RAX, RBX: r.RBX, RCX: r.RCX, RDX: r.RDX,
		RBP: r.RBP, RSI: r.RSI, RDI: r.RDI, RSP: r.RSP,
		R8: r.R8, R9: r.R9, R10: r.R10, R11: r.R11,
		R12: r.R12, R13: r.R13, R14: r.R14, R15: r.R15,
		RIP: r.RIP, RFLAGS: r.RFLAGS,
		CR0: r.CR0, CR2: r.CR2, CR3: r.CR3, CR4: r.CR4,
		DR0: r.DR0, DR1: r.DR1, DR2: r.DR2, DR3: r.DR3, DR6: r.DR6, DR7: r.DR7,
		CS: r.CSSel, SS: r.SSSel,
		FSBase: r.FSBase, GSBase: r.GSBase, ShadowGS: r.ShadowGS,
		IDTBase: r.IDTRBase,
		LSTAR:   r.MSRLSTAR, STAR: r.MSRSTAR, EFER: r.MSREFER,
	}
}
