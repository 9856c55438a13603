package xenctrl

// Every constant and layout in this file is compared with Xen's headers by
// TestHeaderValues.

// A DomID identifies a domain for as long as it lives (domid_t,
// xen/include/public/xen.h). Domain 0 is the control domain.
type DomID uint16

// DomID0 is the control domain; DomIDFirstReserved is the first id that is not
// a domain (DOMID_FIRST_RESERVED, xen/include/public/xen.h).
const (
	DomID0             DomID = 0
	DomIDFirstReserved DomID = 0x7FF0
)

// PageSize is the size of a machine or guest page frame, in bytes (XC_PAGE_SIZE,
// tools/include/xenctrl.h).
const PageSize = 4096

// MaxVCPUs bounds the vCPU numbers this package accepts (MAX_VIRT_CPUS for HVM
// is 128, for PV 8192, xen/arch/x86/include/asm/config.h).
const MaxVCPUs = 8192

// DomainFlags is the state word of a domain (XEN_DOMINF_*,
// xen/include/public/domctl.h).
type DomainFlags uint32

// Domain states (XEN_DOMINF_dying, _hvm_guest, _shutdown, _paused, _blocked,
// _running, _debugged). The shutdown reason is in bits 16 to 23
// (XEN_DOMINF_shutdownshift, XEN_DOMINF_shutdownmask).
const (
	DomainDying    DomainFlags = 1 << 0
	DomainHVM      DomainFlags = 1 << 1 // HVM and PVH guests alike
	DomainShutdown DomainFlags = 1 << 2
	DomainPaused   DomainFlags = 1 << 3
	DomainBlocked  DomainFlags = 1 << 4
	DomainRunning  DomainFlags = 1 << 5
	DomainDebugged DomainFlags = 1 << 6
)

// ShutdownReason returns the reason code (SHUTDOWN_*, xen/include/public/sched.h)
// of a domain that is DomainShutdown.
func (f DomainFlags) ShutdownReason() uint8 { return uint8(f >> 16) }

// DomainInfo is the part of struct xen_domctl_getdomaininfo that is the same in
// every supported Xen release.
type DomainInfo struct {
	ID              DomID
	Flags           DomainFlags
	TotalPages      uint64 // 4 KiB pages
	MaxPages        uint64
	SharedInfoFrame uint64 // MFN (PV) or GFN (HVM) of struct shared_info
	CPUTime         uint64 // nanoseconds
	OnlineVCPUs     int
	MaxVCPUID       int // highest vCPU number; not a count
	Handle          [16]byte
}

// shutdownSuspend is the reason of a domain that is being saved or migrated
// (SHUTDOWN_suspend, xen/include/public/sched.h).
const shutdownSuspend = 2

// Gone reports whether the domain is dying or has shut down for good.
func (i *DomainInfo) Gone() bool {
	return i.Flags&DomainDying != 0 || i.Flags&DomainShutdown != 0 && !i.Suspended()
}

// Suspended reports whether the domain has suspended itself: it is being saved or
// migrated, and is destroyed afterwards, or resumed.
func (i *DomainInfo) Suspended() bool {
	return i.Flags&DomainShutdown != 0 && i.Flags.ShutdownReason() == shutdownSuspend
}

// UserRegs is struct cpu_user_regs (xen/include/public/arch-x86/xen-x86_64.h),
// field for field.
type UserRegs struct {
	R15, R14, R13, R12, RBP, RBX, R11, R10, R9, R8, RAX, RCX, RDX, RSI, RDI uint64
	ErrorCode, EntryVector                                                  uint32
	RIP                                                                     uint64
	CS                                                                      uint16
	_                                                                       uint16
	SavedUpcallMask                                                         uint8
	_                                                                       [3]uint8
	RFLAGS, RSP                                                             uint64
	SS                                                                      uint16
	_                                                                       [3]uint16
	ES                                                                      uint16
	_                                                                       [3]uint16
	DS                                                                      uint16
	_                                                                       [3]uint16
	FS                                                                      uint16
	_                                                                       [3]uint16
	GS                                                                      uint16
	_                                                                       [3]uint16
}

// TrapInfo is struct trap_info (xen/include/public/arch-x86/xen.h): one entry
// of the virtual interrupt table that a PV guest gave to Xen.
type TrapInfo struct {
	Vector  uint8
	Flags   uint8 // bits 0-1: lowest privilege that may raise it; bit 2: TrapDisablesEvents
	CS      uint16
	_       uint32
	Address uint64
}

// TrapDisablesEvents (TI_GET_IF, xen/include/public/arch-x86/xen.h) says that
// entering the handler masks event delivery.
const TrapDisablesEvents = 1 << 2

// VCPUContext is struct vcpu_guest_context (xen/include/public/arch-x86/xen.h)
// of a 64-bit control domain, field for field, 5168 bytes.
type VCPUContext struct {
	FPU                 [512]byte // FXSAVE image: x87 and SSE only
	Flags               uint64    // VGCF_*
	User                UserRegs
	Traps               [256]TrapInfo // PV only
	LDTBase, LDTEntries uint64
	GDTFrames           [16]uint64
	GDTEntries          uint64
	KernelSS, KernelSP  uint64
	CtrlReg             [8]uint64 // [3]: kernel CR3; for PV [1]: user CR3
	DebugReg            [8]uint64 // DR0-7
	EventCallbackEIP    uint64    // PV only, like the next two
	FailsafeCallbackEIP uint64
	SyscallCallbackEIP  uint64
	VMAssist            uint64
	FSBase              uint64
	GSBaseKernel        uint64 // the active GS base while the guest's kernel runs
	GSBaseUser          uint64 // the active GS base while its user code runs
}

// VCPUInfo is the part of struct xen_domctl_getvcpuinfo
// (xen/include/public/domctl.h) that matters.
type VCPUInfo struct {
	Online, Blocked, Running bool
	CPUTime                  uint64 // nanoseconds
}

// DomStatus is the answer of XEN_DOMCTL_gdbsx_domstatus (struct
// xen_domctl_gdbsx_domstatus, xen/include/public/domctl.h). While the domain is
// paused, each call returns and clears one latched vCPU event.
type DomStatus struct {
	Paused bool
	VCPU   int // -1: no event is latched
	Event  uint32
}

// DomStatusBreakpoint is the DomStatus.Event of an int3 (X86_TRAP_BP,
// xen/arch/x86/include/asm/x86-defns.h).
const DomStatusBreakpoint = 3

// ExtState is a vCPU's extended state (XEN_DOMCTL_getvcpuextstate, struct
// xen_domctl_vcpuextstate, xen/include/public/domctl.h). Data is
// Xen's own layout and is given back to SetVCPUExtState unchanged.
type ExtState struct {
	Mask uint64 // xfeature_mask: XCR0 bits the host supports
	Data []byte // xcr0, xcr0_accum, then the XSAVE area
}

// HVMCPU is the part of struct hvm_hw_cpu (xen/include/public/arch-x86/hvm/save.h)
// that introspection needs.
type HVMCPU struct {
	RAX, RBX, RCX, RDX, RBP, RSI, RDI, RSP, R8, R9, R10, R11, R12, R13, R14, R15 uint64
	RIP, RFLAGS                                                                  uint64
	CR0, CR2, CR3, CR4                                                           uint64
	DR0, DR1, DR2, DR3, DR6, DR7                                                 uint64
	CS, SS                                                                       uint32 // selectors
	FSBase, GSBase, ShadowGS                                                     uint64
	IDTBase                                                                      uint64
	LSTAR, STAR, EFER                                                            uint64
}

// MonitorCaps is the answer of XEN_DOMCTL_MONITOR_OP_GET_CAPABILITIES: bit n is
// set if event n (XEN_DOMCTL_MONITOR_EVENT_*) can be monitored. It is 0 for PV.
type MonitorCaps uint32

// Monitor capabilities (1 << XEN_DOMCTL_MONITOR_EVENT_SINGLESTEP,
// _SOFTWARE_BREAKPOINT, _DEBUG_EXCEPTION, _EMUL_UNIMPLEMENTED,
// xen/include/public/domctl.h).
const (
	MonitorSingleStep         MonitorCaps = 1 << 2
	MonitorSoftwareBreakpoint MonitorCaps = 1 << 3
	MonitorDebugException     MonitorCaps = 1 << 5
	MonitorEmulUnimplemented  MonitorCaps = 1 << 10
)

// EventReason says why a vCPU stopped (VM_EVENT_REASON_*,
// xen/include/public/vm_event.h).
type EventReason uint32

// Event reasons that this project uses (VM_EVENT_REASON_UNKNOWN,
// _SOFTWARE_BREAKPOINT, _SINGLESTEP, _DEBUG_EXCEPTION).
const (
	ReasonUnknown            EventReason = 0
	ReasonSoftwareBreakpoint EventReason = 6
	ReasonSingleStep         EventReason = 7
	ReasonDebugException     EventReason = 9
)

// EventFlags are VM_EVENT_FLAG_* (xen/include/public/vm_event.h).
type EventFlags uint32

// Event flags (VM_EVENT_FLAG_VCPU_PAUSED, _EMULATE, _TOGGLE_SINGLESTEP,
// _ALTERNATE_P2M, _SET_REGISTERS, _SET_EMUL_INSN_DATA). EventVCPUPaused and
// EventAlternateP2M are set in requests and kept in the response; the others are
// instructions to Xen in a response. EventSetRegisters and EventSetEmulInsnData
// exclude each other, and the latter needs EventEmulate.
const (
	EventVCPUPaused       EventFlags = 1 << 0
	EventEmulate          EventFlags = 1 << 2
	EventToggleSingleStep EventFlags = 1 << 4
	EventAlternateP2M     EventFlags = 1 << 7 // Event.AltP2M is valid
	EventSetRegisters     EventFlags = 1 << 8
	EventSetEmulInsnData  EventFlags = 1 << 9
)

// EventRegs are the registers of struct vm_event_regs_x86
// (xen/include/public/vm_event.h) that matter.
type EventRegs struct {
	RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8, R9, R10, R11, R12, R13, R14, R15 uint64
	RFLAGS, RIP                                                                  uint64
	DR6, DR7                                                                     uint64
	CR0, CR2, CR3, CR4                                                           uint64
	EFER, STAR, LSTAR                                                            uint64
	FSBase, GSBase, ShadowGS                                                     uint64
	CS, SS                                                                       uint32 // selectors (CS: RPL bits tell the privilege level with SS.DPL)
}

// An Event is a vm_event request (struct vm_event_st,
// xen/include/public/vm_event.h), and with other Flags the response to it.
type Event struct {
	Flags  EventFlags
	Reason EventReason
	VCPU   int
	AltP2M uint16

	// Of a software breakpoint, single step or debug exception.
	GFN     uint64
	InsnLen uint32
	Type    uint8  // an EventType constant
	Pending uint64 // debug exception: pending DR6 bits

	Regs     EventRegs
	InsnData [16]byte // response with EventSetEmulInsnData: the bytes to emulate, all 16
}

// Kinds of exceptions (XEN_DMOP_EVENT_hw_exc, _pri_sw_exc, _sw_exc,
// xen/include/public/hvm/dm_op.h; the processor's own numbers) and vectors, for
// InjectEvent and Event.Type.
const (
	EventTypeHardwareException           = 3
	EventTypePrivSoftwareException       = 5
	EventTypeSoftwareException           = 6
	VectorDebug                    uint8 = 1
	VectorBreakpoint               uint8 = 3
)
