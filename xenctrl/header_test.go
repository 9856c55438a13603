//go:build xenheaders && linux && amd64 && cgo

package xenctrl

import (
	"fmt"
	"strings"
	"testing"
	"unsafe"
)

// eventSizes are the names in headerValues that depend on the version of events
// and do not begin with "ev.".
var eventSizes = map[string]bool{
	"VM_EVENT_INTERFACE_VERSION": true, "sizeof(ev)": true, "sizeof(slot)": true,
	"sizeof(emul.insn.data)": true, "__RING_SIZE((sring *)0, 4096)": true,
}

// TestHeaderValues compares every number and layout that is written in Go with
// Xen's headers. The prototypes and structures of vmp.h were compared when
// header_check.go was compiled.
func TestHeaderValues(t *testing.T) {
	var c VCPUContext
	var u UserRegs
	var ti TrapInfo
	var r hvmHWCPU
	var d xenDomctl
	var i xenDomainInfo
	want := map[string]uint64{
		"DOMID_FIRST_RESERVED": uint64(DomIDFirstReserved),
		"DOMID_INVALID":        uint64(domNone),
		"VIRQ_DEBUGGER":        uint64(VIRQDebugger),
		"XC_PAGE_SIZE":         PageSize,

		"XEN_DOMINF_dying":         uint64(DomainDying),
		"XEN_DOMINF_hvm_guest":     uint64(DomainHVM),
		"XEN_DOMINF_shutdown":      uint64(DomainShutdown),
		"XEN_DOMINF_paused":        uint64(DomainPaused),
		"XEN_DOMINF_blocked":       uint64(DomainBlocked),
		"XEN_DOMINF_running":       uint64(DomainRunning),
		"XEN_DOMINF_debugged":      uint64(DomainDebugged),
		"XEN_DOMINF_shutdownshift": 16,  // DomainFlags.ShutdownReason
		"XEN_DOMINF_shutdownmask":  255, // idem

		"XEN_DOMCTL_pausedomain":                            domctlPauseDomain,
		"XEN_DOMCTL_unpausedomain":                          domctlUnpauseDomain,
		"XEN_DOMCTL_getdomaininfo":                          domctlGetDomainInfo,
		"XEN_DOMCTL_setvcpucontext":                         domctlSetVCPUContext,
		"XEN_DOMCTL_getvcpucontext":                         domctlGetVCPUContext,
		"XEN_DOMCTL_getvcpuextstate":                        domctlGetVCPUExtState,
		"XEN_DOMCTL_setvcpuextstate":                        domctlSetVCPUExtState,
		"XEN_DOMCTL_gdbsx_guestmemio":                       domctlGdbsxGuestMemIO,
		"XEN_DOMCTL_gdbsx_pausevcpu":                        domctlGdbsxPauseVCPU,
		"XEN_DOMCTL_gdbsx_unpausevcpu":                      domctlGdbsxUnpauseVCPU,
		"XEN_DOMCTL_gdbsx_domstatus":                        domctlGdbsxDomStatus,
		"XEN_DOMCTL_DEBUG_OP_SINGLE_STEP_OFF":               debugOpSingleStepOff,
		"XEN_DOMCTL_DEBUG_OP_SINGLE_STEP_ON":                debugOpSingleStepOn,
		"1 << XEN_DOMCTL_MONITOR_EVENT_SINGLESTEP":          uint64(MonitorSingleStep),
		"1 << XEN_DOMCTL_MONITOR_EVENT_SOFTWARE_BREAKPOINT": uint64(MonitorSoftwareBreakpoint),
		"1 << XEN_DOMCTL_MONITOR_EVENT_DEBUG_EXCEPTION":     uint64(MonitorDebugException),
		"1 << XEN_DOMCTL_MONITOR_EVENT_EMUL_UNIMPLEMENTED":  uint64(MonitorEmulUnimplemented),
		"XENVER_version":                                    versionNumber,
		"XENVER_extraversion":                               versionExtra,
		"XENVER_capabilities":                               versionCapabilities,
		"sizeof(xen_extraversion_t)":                        versionExtraSize,
		"sizeof(xen_capabilities_info_t)":                   versionCapabilitiesSize,
		"HVM_SAVE_CODE(CPU)":                                hvmSaveCodeCPU,
		"IOCTL_EVTCHN_NOTIFY":                               ioctlNotify,
		"IOCTL_PRIVCMD_HYPERCALL":                           ioctlHypercall,
		"sizeof(struct privcmd_hypercall)":                  uint64(unsafe.Sizeof(privcmdHypercall{})),
		"__HYPERVISOR_sched_op":                             hypervisorSchedOp,
		"SCHEDOP_yield":                                     schedopYield,
		"__HYPERVISOR_domctl":                               hypervisorDomctl,
		fmt.Sprintf("XEN_DOMCTL_INTERFACE_VERSION >= %#x && XEN_DOMCTL_INTERFACE_VERSION <= %#x", domctlOldest, domctlNewest): 1,
		"struct xen_domctl.cmd":               uint64(unsafe.Offsetof(d.cmd)),
		"struct xen_domctl.interface_version": uint64(unsafe.Offsetof(d.face)),
		"struct xen_domctl.domain":            uint64(unsafe.Offsetof(d.domain)),
		"struct xen_domctl.u":                 uint64(unsafe.Offsetof(d.u)),
		"info.domain":                         uint64(unsafe.Offsetof(i.domain)), "info.flags": uint64(unsafe.Offsetof(i.flags)),
		"info.tot_pages": uint64(unsafe.Offsetof(i.totPages)), "info.max_pages": uint64(unsafe.Offsetof(i.maxPages)),
		"info.shared_info_frame": uint64(unsafe.Offsetof(i.sharedInfoFrame)), "info.cpu_time": uint64(unsafe.Offsetof(i.cpuTime)),
		"info.nr_online_vcpus": uint64(unsafe.Offsetof(i.nrOnlineVCPUs)), "info.max_vcpu_id": uint64(unsafe.Offsetof(i.maxVCPUID)),
		"info.handle":                                  uint64(unsafe.Offsetof(i.handle)),
		"sizeof(struct xen_domctl_vcpucontext)":        domctlContextHandleOff + 8,
		"struct xen_domctl_vcpucontext.vcpu":           domctlVCPUOff,
		"struct xen_domctl_vcpucontext.ctxt":           domctlContextHandleOff,
		"sizeof(struct xen_domctl_vcpuextstate)":       domctlExtHandleOff + 8,
		"struct xen_domctl_vcpuextstate.vcpu":          domctlVCPUOff,
		"struct xen_domctl_vcpuextstate.xfeature_mask": domctlExtMaskOff,
		"struct xen_domctl_vcpuextstate.size":          domctlExtSizeOff,
		"struct xen_domctl_vcpuextstate.buffer":        domctlExtHandleOff,
		"XENSTORE_PAYLOAD_MAX":                         maxStoreValue,
		"XENSTORE_ABS_PATH_MAX":                        maxStorePath,
		"XEN_DMOP_EVENT_hw_exc":                        EventTypeHardwareException,
		"XEN_DMOP_EVENT_pri_sw_exc":                    EventTypePrivSoftwareException,
		"XEN_DMOP_EVENT_sw_exc":                        EventTypeSoftwareException,
		"TI_GET_IF":                                    TrapDisablesEvents,
		"sizeof(xen_domctl.u)":                         uint64(len(domctlArgs{})),
		"struct xen_domctl_gdbsx_pauseunp_vcpu.vcpu":   gdbsxPauseVCPUOff,
		"struct xen_domctl_gdbsx_domstatus.paused":     gdbsxStatusPausedOff,
		"struct xen_domctl_gdbsx_domstatus.vcpu_id":    gdbsxStatusVCPUIDOff,
		"struct xen_domctl_gdbsx_domstatus.vcpu_ev":    gdbsxStatusVCPUEvOff,

		"VM_EVENT_INTERFACE_VERSION":          vmEventVersion,
		"VM_EVENT_FLAG_VCPU_PAUSED":           uint64(EventVCPUPaused),
		"VM_EVENT_FLAG_EMULATE":               uint64(EventEmulate),
		"VM_EVENT_FLAG_TOGGLE_SINGLESTEP":     uint64(EventToggleSingleStep),
		"VM_EVENT_FLAG_ALTERNATE_P2M":         uint64(EventAlternateP2M),
		"VM_EVENT_FLAG_SET_REGISTERS":         uint64(EventSetRegisters),
		"VM_EVENT_FLAG_SET_EMUL_INSN_DATA":    uint64(EventSetEmulInsnData),
		"VM_EVENT_REASON_UNKNOWN":             uint64(ReasonUnknown),
		"VM_EVENT_REASON_SOFTWARE_BREAKPOINT": uint64(ReasonSoftwareBreakpoint),
		"VM_EVENT_REASON_SINGLESTEP":          uint64(ReasonSingleStep),
		"VM_EVENT_REASON_DEBUG_EXCEPTION":     uint64(ReasonDebugException),

		"sring.req_prod": ringReqProdOff, "sring.req_event": ringReqEventOff,
		"sring.rsp_prod": ringRspProdOff, "sring.rsp_event": ringRspEventOff,
		"sring.pvt": ringPvtOff, "sring.ring": ringHeader,
		"sizeof(slot)": ringSlotSize, "sizeof(ev)": ringSlotSize,
		"__RING_SIZE((sring *)0, 4096)": ringSlots,
		"ev.version":                    evVersionOff, "ev.flags": evFlagsOff, "ev.reason": evReasonOff,
		"ev.vcpu_id": evVCPUOff, "ev.altp2m_idx": evAltP2MOff, "ev.u": evUnionOff, "ev.data": evDataOff,
		"ev.u.software_breakpoint.gfn":         evDebugGFNOff,
		"ev.u.software_breakpoint.pending_dbg": evDebugPendingOff,
		"ev.u.software_breakpoint.insn_length": evDebugInsnLenOff,
		"ev.u.software_breakpoint.type":        evDebugTypeOff,
		"ev.u.debug_exception.gfn":             evDebugGFNOff,
		"ev.u.debug_exception.pending_dbg":     evDebugPendingOff,
		"ev.u.debug_exception.insn_length":     evDebugInsnLenOff,
		"ev.u.debug_exception.type":            evDebugTypeOff,
		"ev.u.singlestep.gfn":                  evDebugGFNOff,
		"ev.data.regs.x86.rflags":              evRFLAGSOff, "ev.data.regs.x86.rip": evRIPOff,
		"ev.data.regs.x86.dr6": evDR6Off, "ev.data.regs.x86.dr7": evDR7Off,
		"ev.data.regs.x86.cr0": evCR0Off, "ev.data.regs.x86.cr2": evCR2Off,
		"ev.data.regs.x86.cr3": evCR3Off, "ev.data.regs.x86.cr4": evCR4Off,
		"ev.data.regs.x86.msr_efer": evEFEROff, "ev.data.regs.x86.msr_star": evSTAROff, "ev.data.regs.x86.msr_lstar": evLSTAROff,
		"ev.data.regs.x86.fs_base": evFSBaseOff, "ev.data.regs.x86.gs_base": evGSBaseOff, "ev.data.regs.x86.shadow_gs": evShadowGSOff,
		"ev.data.regs.x86.cs_sel": evCSOff, "ev.data.regs.x86.ss_sel": evSSOff,
		"ev.data.emul.insn.data": evInsnDataOff, "sizeof(emul.insn.data)": uint64(len(Event{}.InsnData)),

		"sizeof(hvm)":  uint64(unsafe.Sizeof(r)),
		"hvm.fpu_regs": uint64(unsafe.Offsetof(r.FPURegs)),
		"hvm.rax":      uint64(unsafe.Offsetof(r.RAX)), "hvm.rbx": uint64(unsafe.Offsetof(r.RBX)),
		"hvm.rcx": uint64(unsafe.Offsetof(r.RCX)), "hvm.rdx": uint64(unsafe.Offsetof(r.RDX)),
		"hvm.rbp": uint64(unsafe.Offsetof(r.RBP)), "hvm.rsi": uint64(unsafe.Offsetof(r.RSI)),
		"hvm.rdi": uint64(unsafe.Offsetof(r.RDI)), "hvm.rsp": uint64(unsafe.Offsetof(r.RSP)),
		"hvm.r8": uint64(unsafe.Offsetof(r.R8)), "hvm.r9": uint64(unsafe.Offsetof(r.R9)),
		"hvm.r10": uint64(unsafe.Offsetof(r.R10)), "hvm.r11": uint64(unsafe.Offsetof(r.R11)),
		"hvm.r12": uint64(unsafe.Offsetof(r.R12)), "hvm.r13": uint64(unsafe.Offsetof(r.R13)),
		"hvm.r14": uint64(unsafe.Offsetof(r.R14)), "hvm.r15": uint64(unsafe.Offsetof(r.R15)),
		"hvm.rip": uint64(unsafe.Offsetof(r.RIP)), "hvm.rflags": uint64(unsafe.Offsetof(r.RFLAGS)),
		"hvm.cr0": uint64(unsafe.Offsetof(r.CR0)), "hvm.cr2": uint64(unsafe.Offsetof(r.CR2)),
		"hvm.cr3": uint64(unsafe.Offsetof(r.CR3)), "hvm.cr4": uint64(unsafe.Offsetof(r.CR4)),
		"hvm.dr0": uint64(unsafe.Offsetof(r.DR0)), "hvm.dr1": uint64(unsafe.Offsetof(r.DR1)),
		"hvm.dr2": uint64(unsafe.Offsetof(r.DR2)), "hvm.dr3": uint64(unsafe.Offsetof(r.DR3)),
		"hvm.dr6": uint64(unsafe.Offsetof(r.DR6)), "hvm.dr7": uint64(unsafe.Offsetof(r.DR7)),
		"hvm.cs_sel": uint64(unsafe.Offsetof(r.CSSel)), "hvm.ss_sel": uint64(unsafe.Offsetof(r.SSSel)),
		"hvm.cs_limit": uint64(unsafe.Offsetof(r.CSLimit)), "hvm.cs_base": uint64(unsafe.Offsetof(r.CSBase)),
		"hvm.fs_base": uint64(unsafe.Offsetof(r.FSBase)), "hvm.gs_base": uint64(unsafe.Offsetof(r.GSBase)),
		"hvm.idtr_base": uint64(unsafe.Offsetof(r.IDTRBase)), "hvm.cs_arbytes": uint64(unsafe.Offsetof(r.CSARBytes)),
		"hvm.shadow_gs": uint64(unsafe.Offsetof(r.ShadowGS)), "hvm.msr_lstar": uint64(unsafe.Offsetof(r.MSRLSTAR)),
		"hvm.msr_star": uint64(unsafe.Offsetof(r.MSRSTAR)), "hvm.msr_efer": uint64(unsafe.Offsetof(r.MSREFER)),
		"hvm.error_code": uint64(unsafe.Offsetof(r.ErrorCode)),

		"sizeof(ctx)":              uint64(unsafe.Sizeof(c)),
		"sizeof(user)":             uint64(unsafe.Sizeof(u)),
		"sizeof(struct trap_info)": uint64(unsafe.Sizeof(ti)),
		"ctx.fpu_ctxt":             uint64(unsafe.Offsetof(c.FPU)),
		"ctx.flags":                uint64(unsafe.Offsetof(c.Flags)), "ctx.user_regs": uint64(unsafe.Offsetof(c.User)),
		"ctx.trap_ctxt": uint64(unsafe.Offsetof(c.Traps)), "ctx.ldt_base": uint64(unsafe.Offsetof(c.LDTBase)),
		"ctx.ldt_ents": uint64(unsafe.Offsetof(c.LDTEntries)), "ctx.gdt_frames": uint64(unsafe.Offsetof(c.GDTFrames)),
		"ctx.gdt_ents": uint64(unsafe.Offsetof(c.GDTEntries)), "ctx.kernel_ss": uint64(unsafe.Offsetof(c.KernelSS)),
		"ctx.kernel_sp": uint64(unsafe.Offsetof(c.KernelSP)), "ctx.ctrlreg": uint64(unsafe.Offsetof(c.CtrlReg)),
		"ctx.debugreg":              uint64(unsafe.Offsetof(c.DebugReg)),
		"ctx.event_callback_eip":    uint64(unsafe.Offsetof(c.EventCallbackEIP)),
		"ctx.failsafe_callback_eip": uint64(unsafe.Offsetof(c.FailsafeCallbackEIP)),
		"ctx.syscall_callback_eip":  uint64(unsafe.Offsetof(c.SyscallCallbackEIP)),
		"ctx.vm_assist":             uint64(unsafe.Offsetof(c.VMAssist)), "ctx.fs_base": uint64(unsafe.Offsetof(c.FSBase)),
		"ctx.gs_base_kernel": uint64(unsafe.Offsetof(c.GSBaseKernel)), "ctx.gs_base_user": uint64(unsafe.Offsetof(c.GSBaseUser)),

		"user.r15": uint64(unsafe.Offsetof(u.R15)), "user.r14": uint64(unsafe.Offsetof(u.R14)),
		"user.r13": uint64(unsafe.Offsetof(u.R13)), "user.r12": uint64(unsafe.Offsetof(u.R12)),
		"user.rbp": uint64(unsafe.Offsetof(u.RBP)), "user.rbx": uint64(unsafe.Offsetof(u.RBX)),
		"user.r11": uint64(unsafe.Offsetof(u.R11)), "user.r10": uint64(unsafe.Offsetof(u.R10)),
		"user.r9": uint64(unsafe.Offsetof(u.R9)), "user.r8": uint64(unsafe.Offsetof(u.R8)),
		"user.rax": uint64(unsafe.Offsetof(u.RAX)), "user.rcx": uint64(unsafe.Offsetof(u.RCX)),
		"user.rdx": uint64(unsafe.Offsetof(u.RDX)), "user.rsi": uint64(unsafe.Offsetof(u.RSI)),
		"user.rdi":        uint64(unsafe.Offsetof(u.RDI)),
		"user.error_code": uint64(unsafe.Offsetof(u.ErrorCode)), "user.entry_vector": uint64(unsafe.Offsetof(u.EntryVector)),
		"user.rip": uint64(unsafe.Offsetof(u.RIP)), "user.cs": uint64(unsafe.Offsetof(u.CS)),
		"user.saved_upcall_mask": uint64(unsafe.Offsetof(u.SavedUpcallMask)),
		"user.rflags":            uint64(unsafe.Offsetof(u.RFLAGS)), "user.rsp": uint64(unsafe.Offsetof(u.RSP)),
		"user.ss": uint64(unsafe.Offsetof(u.SS)), "user.es": uint64(unsafe.Offsetof(u.ES)),
		"user.ds": uint64(unsafe.Offsetof(u.DS)), "user.fs": uint64(unsafe.Offsetof(u.FS)), "user.gs": uint64(unsafe.Offsetof(u.GS)),
		"struct trap_info.vector": uint64(unsafe.Offsetof(ti.Vector)), "struct trap_info.flags": uint64(unsafe.Offsetof(ti.Flags)),
		"struct trap_info.cs": uint64(unsafe.Offsetof(ti.CS)), "struct trap_info.address": uint64(unsafe.Offsetof(ti.Address)),
	}
	for i, name := range []string{
		"rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
		"r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
	} {
		want["ev.data.regs.x86."+name] = uint64(evRAXOff + 8*i)
	}

	got := headerValues()
	if v := got["VM_EVENT_INTERFACE_VERSION"]; v < vmEventVersion {
		t.Logf("the headers have events of version %d, so the layout of events was not compared", v)
		delete(got, "VM_EVENT_INTERFACE_VERSION")
		for name := range want {
			if _, ok := got[name]; !ok && (strings.HasPrefix(name, "ev.") || eventSizes[name]) {
				delete(want, name)
			}
		}
	}
	for name, v := range got {
		w, ok := want[name]
		if !ok {
			t.Errorf("%s: the headers have %d, this test nothing", name, v)
		} else if w != v {
			t.Errorf("%s: the headers have %d, this package %d", name, v, w)
		}
		delete(want, name)
	}
	for name := range want {
		t.Errorf("%s: not compared with the headers", name)
	}
}
