package xentest

import (
	"encoding/binary"
	"syscall"

	"github.com/vmprobes/vmprobes/internal/xen"
	"github.com/vmprobes/vmprobes/xenctrl"
)

// Flags of struct vcpu_guest_context.
const (
	vgcfI387   = 1 << 0
	vgcfKernel = 1 << 2
	vgcfOnline = 1 << 5
)

type hypervisor struct{ m *Machine }

// Hypervisor is what a tool in dom0 has of the machine.
func (m *Machine) Hypervisor() xen.Hypervisor { return hypervisor{m} }

// do is one hypercall.
func (m *Machine) do(op string, vcpu int, f func() error) error {
	err := m.begin(op, vcpu)
	if err == nil {
		err = f()
	}
	return m.end(op, vcpu, err)
}

func (h hypervisor) Info() (info xenctrl.DomainInfo, err error) {
	m := h.m
	err = m.do("info", -1, func() error {
		info = xenctrl.DomainInfo{
			ID:              domainID,
			TotalPages:      uint64(m.cfg.PhysPages),
			MaxPages:        uint64(m.cfg.PhysPages),
			SharedInfoFrame: m.mem.frame(m.shared),
			CPUTime:         m.steps,
			OnlineVCPUs:     len(m.v),
			MaxVCPUID:       len(m.v) - 1,
			Handle:          [16]byte{0: 0x5e, 15: byte(m.cfg.Seed)},
		}
		set := func(c bool, f xenctrl.DomainFlags) {
			if c {
				info.Flags |= f
			}
		}
		set(!m.pv(), xenctrl.DomainHVM)
		set(m.pauses > 0, xenctrl.DomainPaused)
		set(m.attached, xenctrl.DomainDebugged)
		set(m.pauses == 0, xenctrl.DomainRunning)
		if m.shutdown {
			info.Flags |= xenctrl.DomainShutdown | xenctrl.DomainFlags(m.reason)<<16
		}
		if m.dying {
			info.Flags = info.Flags&^xenctrl.DomainRunning | xenctrl.DomainDying | xenctrl.DomainShutdown
			m.gone = true
		}
		return nil
	})
	return info, err
}

func (h hypervisor) Pause() error {
	m := h.m
	return m.do("pause", -1, func() error {
		if m.pauses == maxPauses {
			return syscall.EUSERS
		}
		m.syncAll() // may count pauses of its own
		if m.pauses < maxPauses {
			m.pauses++
		}
		m.syncAll()
		return nil
	})
}

func (h hypervisor) Unpause() error {
	m := h.m
	return m.do("unpause", -1, func() error {
		if m.pauses == 0 {
			return syscall.EINVAL
		}
		if m.pauses--; m.pauses == 0 {
			for _, v := range m.v {
				v.late = 0
				if v.flags&flTF != 0 && v.held == 0 && m.cfg.IRQEvery > 0 && m.rng.IntN(8) == 0 {
					v.irq = 0 // an interrupt comes before the step is done
				}
			}
		}
		return nil
	})
}

func (h hypervisor) VCPUContext(vcpu int, c *xenctrl.VCPUContext) error {
	m := h.m
	return m.do("get vcpu context", vcpu, func() error {
		m.sync(m.v[vcpu])
		m.context(m.v[vcpu], c)
		return nil
	})
}

func (m *Machine) context(v *vcpu, c *xenctrl.VCPUContext) {
	*c = xenctrl.VCPUContext{}
	binary.LittleEndian.PutUint64(c.FPU[160:], v.ymm[0]) // xmm0
	binary.LittleEndian.PutUint64(c.FPU[168:], v.ymm[1])
	c.Flags = vgcfI387 | vgcfOnline
	c.User = xenctrl.UserRegs{
		R15: v.r[r15], R14: v.r[r14], R13: v.r[r13], R12: v.r[r12], RBP: v.r[rbp], RBX: v.r[rbx],
		R11: v.r[r11], R10: v.r[r10], R9: v.r[r9], R8: v.r[r8], RAX: v.r[rax], RCX: v.r[rcx],
		RDX: v.r[rdx], RSI: v.r[rsi], RDI: v.r[rdi],
		RIP: v.rip, RFLAGS: v.flags, RSP: v.r[rsp], CS: hvmCS, SS: hvmSS,
	}
	c.CtrlReg[0] = 0x80050033
	c.CtrlReg[3] = v.cr3
	c.CtrlReg[4] = 0x6f0
	c.DebugReg[6] = v.dr6
	c.DebugReg[7] = 0x400
	c.GSBaseKernel, c.GSBaseUser, c.FSBase = v.gsBase, v.shadow, v.fsBase
	if m.pv() {
		c.Flags |= vgcfKernel
		c.User.CS, c.User.SS = pvCS, pvSS
		c.User.RFLAGS |= flIF
		c.Traps[3] = xenctrl.TrapInfo{Vector: 3, Flags: 3 | xenctrl.TrapDisablesEvents, CS: pvCS, Address: m.int3Entry}
		c.EventCallbackEIP = m.irqEntry
		c.SyscallCallbackEIP = m.prog.addr("bad")
		c.FailsafeCallbackEIP = c.SyscallCallbackEIP
		c.KernelSP, c.KernelSS = m.top(v), pvSS
		c.CtrlReg[1] = v.cr3
	}
}

func (h hypervisor) SetVCPUContext(vcpu int, c *xenctrl.VCPUContext) error {
	m := h.m
	return m.do("set vcpu context", vcpu, func() error {
		m.syncAll()
		v := m.v[vcpu]
		var old xenctrl.VCPUContext
		m.context(v, &old)
		if m.pv() && (c.CtrlReg[3] != old.CtrlReg[3] || c.CtrlReg[1] != old.CtrlReg[1] || c.GDTFrames != old.GDTFrames ||
			c.GDTEntries != old.GDTEntries || c.LDTBase != old.LDTBase || c.LDTEntries != old.LDTEntries) {
			return syscall.EOPNOTSUPP
		}
		u := &c.User
		if int64(u.RIP)<<16>>16 != int64(u.RIP) {
			return syscall.EINVAL
		}
		// From 4.18 on (arch_set_info_guest, xen/arch/x86/domain.c).
		if c.DebugReg[6]>>32 != 0 || c.DebugReg[7]>>32 != 0 {
			return syscall.EINVAL
		}
		o := &old.User
		if m.pv() && (u.CS|3 != pvCS || u.SS|3 != pvSS || c.Flags&vgcfKernel == 0 || c.Traps != old.Traps ||
			c.EventCallbackEIP != old.EventCallbackEIP || c.SyscallCallbackEIP != old.SyscallCallbackEIP ||
			c.KernelSP != old.KernelSP || c.VMAssist != old.VMAssist) {
			m.fail(v, "segments, traps or callbacks were changed")
		}
		if c.GSBaseKernel != old.GSBaseKernel || c.GSBaseUser != old.GSBaseUser || c.FSBase != old.FSBase ||
			u.DS != o.DS || u.ES != o.ES || u.FS != o.FS || u.GS != o.GS {
			m.fail(v, "segment bases or selectors were changed")
		}
		v.offline = c.Flags&vgcfOnline == 0
		v.r = [16]uint64{
			rax: u.RAX, rcx: u.RCX, rdx: u.RDX, rbx: u.RBX, rsp: u.RSP, rbp: u.RBP, rsi: u.RSI, rdi: u.RDI,
			r8: u.R8, r9: u.R9, r10: u.R10, r11: u.R11, r12: u.R12, r13: u.R13, r14: u.R14, r15: u.R15,
		}
		v.rip, v.flags = u.RIP, u.RFLAGS|flMBS
		if m.pv() {
			v.flags = v.flags&^(flIOPL|flVM) | flIF
		}
		v.dr6 = c.DebugReg[6]
		// Only the FXSAVE image is loaded: the rest is initialised.
		v.ymm[0] = binary.LittleEndian.Uint64(c.FPU[160:])
		v.ymm[1] = binary.LittleEndian.Uint64(c.FPU[168:])
		if m.cfg.AVX {
			v.ymm[2], v.ymm[3] = 0, 0
		}
		v.ymmLook = true
		return nil
	})
}

func (m *Machine) accum() uint64 {
	if m.cfg.AVX {
		return 7
	}
	return 3
}

func (h hypervisor) VCPUExtState(vcpu int) (s xenctrl.ExtState, err error) {
	m := h.m
	err = m.do("get vcpu extended state", vcpu, func() error {
		v := m.v[vcpu]
		m.sync(v)
		s.Mask = 7
		size := extSizeSSE
		if m.cfg.AVX {
			size = extSizeAVX
		}
		s.Data = make([]byte, size)
		put := func(off int, x uint64) { binary.LittleEndian.PutUint64(s.Data[off:], x) }
		put(0, m.accum())
		put(8, m.accum())
		put(16+160, v.ymm[0])
		put(16+168, v.ymm[1])
		put(16+512, m.accum()) // xstate_bv
		if m.cfg.AVX {
			put(extYMMHi, v.ymm[2])
			put(extYMMHi+8, v.ymm[3])
		}
		return nil
	})
	return s, err
}

func (h hypervisor) SetVCPUExtState(vcpu int, s xenctrl.ExtState) error {
	m := h.m
	return m.do("set vcpu extended state", vcpu, func() error {
		v := m.v[vcpu]
		m.sync(v)
		size := extSizeSSE
		if m.cfg.AVX {
			size = extSizeAVX
		}
		if len(s.Data) != size {
			return syscall.EINVAL
		}
		get := func(off int) uint64 { return binary.LittleEndian.Uint64(s.Data[off:]) }
		if get(0) != m.accum() || get(8) != m.accum() || get(16+512)&^m.accum() != 0 || s.Mask&m.accum() != m.accum() {
			return syscall.EINVAL
		}
		v.ymm[0], v.ymm[1] = get(16+160), get(16+168)
		if m.cfg.AVX {
			v.ymm[2], v.ymm[3] = get(extYMMHi), get(extYMMHi+8)
		}
		v.ymmLook = true
		return nil
	})
}

// VCPUInfo says of a vCPU that Park has at rest that it waits for an interrupt.
func (h hypervisor) VCPUInfo(vcpu int) (info xenctrl.VCPUInfo, err error) {
	err = h.m.do("get vcpu info", vcpu, func() error {
		v := h.m.v[vcpu]
		info.Online, info.Blocked = !v.offline, h.m.parked(v)
		return nil
	})
	return info, err
}

func (h hypervisor) HVMCPU(vcpu int) (c xenctrl.HVMCPU, err error) {
	m := h.m
	err = m.do("get hvm cpu", vcpu, func() error {
		if m.pv() {
			return syscall.EINVAL
		}
		v := m.v[vcpu]
		m.sync(v)
		c = xenctrl.HVMCPU{
			RAX: v.r[rax], RBX: v.r[rbx], RCX: v.r[rcx], RDX: v.r[rdx], RBP: v.r[rbp], RSI: v.r[rsi], RDI: v.r[rdi],
			RSP: v.r[rsp], R8: v.r[r8], R9: v.r[r9], R10: v.r[r10], R11: v.r[r11], R12: v.r[r12], R13: v.r[r13],
			R14: v.r[r14], R15: v.r[r15], RIP: v.rip, RFLAGS: v.flags,
			CR0: 0x80050033, CR3: v.cr3, CR4: 0x6f0, DR6: v.dr6, DR7: 0x400, CS: hvmCS, SS: hvmSS,
			FSBase: v.fsBase, GSBase: v.gsBase, ShadowGS: v.shadow, IDTBase: DataBase + dIDT,
			LSTAR: m.prog.addr("bad"), STAR: 0x0023001000000000, EFER: 0xd01,
		}
		return nil
	})
	return c, err
}

func (h hypervisor) MapFrames(writable bool, frames ...uint64) (mp xen.Mapping, err error) {
	m := h.m
	err = m.do("map", -1, func() error {
		if len(frames) == 0 {
			return syscall.EINVAL
		}
		idx := make([]int, len(frames))
		for i, f := range frames {
			x, ok := m.mem.frameIndex(f)
			if !ok {
				return syscall.EINVAL
			}
			if writable && m.pv() && m.mem.isPT[x] {
				return syscall.EPERM // a PV guest's page tables
			}
			idx[i] = x
		}
		p, err := m.newMapping(writable, idx)
		if err == nil {
			mp = p
		}
		return err
	})
	return mp, err
}

func (h hypervisor) WriteFrame(frame uint64, off int, b []byte) error {
	m := h.m
	return m.do("write frame", -1, func() error {
		x, ok := m.mem.frameIndex(frame)
		switch {
		case !ok || off < 0 || off+len(b) > pageSize:
			return syscall.EINVAL
		case m.pv() && m.mem.isPT[x]:
			return syscall.EPERM // a PV guest's page tables
		}
		copy(m.mem.b[x*pageSize+off:], b)
		return nil
	})
}

func (h hypervisor) SetDebugging(on bool) error {
	m := h.m
	return m.do("set debugging", -1, func() error {
		// domain_pause and domain_unpause, on another count than the tools'.
		m.syncAll()
		m.attached = on
		return nil
	})
}

// gdbsx is one of the gdbsx operations.
func (m *Machine) gdbsx(op string, vcpu int, f func() error) error {
	return m.do(op, vcpu, func() error {
		if !m.cfg.GDBSX {
			return syscall.ENOSYS
		}
		return f()
	})
}

func (h hypervisor) GdbsxDomStatus() (s xenctrl.DomStatus, err error) {
	m := h.m
	err = m.gdbsx("gdbsx domstatus", -1, func() error {
		s = xenctrl.DomStatus{Paused: m.pauses > 0, VCPU: -1}
		if !s.Paused {
			return nil
		}
		for _, v := range m.v {
			if v.event != 0 {
				s.VCPU, s.Event = v.id, v.event
				v.event = 0
				break
			}
		}
		return nil
	})
	return s, err
}

func (h hypervisor) GdbsxPauseVCPU(vcpu int) error {
	m := h.m
	return m.gdbsx("gdbsx pause vcpu", vcpu, func() error {
		if m.pauses == 0 {
			return syscall.EBUSY
		}
		v := m.v[vcpu]
		if v.held == maxPauses {
			return syscall.EUSERS
		}
		v.held++
		m.sync(v)
		return nil
	})
}

func (h hypervisor) GdbsxUnpauseVCPU(vcpu int) error {
	m := h.m
	return m.gdbsx("gdbsx unpause vcpu", vcpu, func() error {
		if m.pauses == 0 {
			return syscall.EBUSY
		}
		v := m.v[vcpu]
		if v.held == 0 {
			return syscall.EINVAL
		}
		v.held--
		return nil
	})
}

func (h hypervisor) MonitorCapabilities() (caps xenctrl.MonitorCaps, err error) {
	m := h.m
	err = m.do("monitor capabilities", -1, func() error {
		if m.pv() {
			return nil
		}
		caps = xenctrl.MonitorSoftwareBreakpoint | xenctrl.MonitorDebugException | xenctrl.MonitorEmulUnimplemented
		if m.cfg.MTF {
			caps |= xenctrl.MonitorSingleStep
		}
		return nil
	})
	return caps, err
}

func (h hypervisor) OpenMonitor() (mon xen.Monitor, err error) {
	m := h.m
	err = m.do("open monitor", -1, func() error {
		if m.pv() {
			return syscall.EOPNOTSUPP
		}
		if m.mon != nil {
			return syscall.EBUSY
		}
		page := m.ringPage
		if page == nil {
			page = new(ringPage)
		}
		m.ringPage = nil // out of the guest's memory
		*page = ringPage{}
		m.port++
		d := &vmEvent{page: page, port: m.port}
		d.bound = &monitor{m: m, vmEvent: d, ready: make(chan struct{}, 1)}
		m.mon, mon = d, d.bound
		return nil
	})
	return mon, err
}

// ReleaseMonitor is several calls on a real Xen. They have the same effect if they end
// early and are made again.
func (h hypervisor) ReleaseMonitor(answers []xenctrl.Event) error {
	m := h.m
	return m.do("release monitor", -1, func() error {
		if m.pv() {
			return syscall.EOPNOTSUPP
		}
		if m.mon != nil {
			if err := m.disableEvents(); err != nil {
				m.mon.breakpoint = true // xenctrl turns it on again
				return err
			}
		}
		for i := range answers {
			m.respond(&answers[i])
		}
		return nil
	})
}

func (h hypervisor) InjectEvent(vcpu int, vector, eventType uint8, _, insnLen uint32, _ uint64) error {
	m := h.m
	return m.do("inject event", vcpu, func() error {
		if m.pv() {
			return syscall.EINVAL
		}
		v := m.v[vcpu]
		if v.inject != nil {
			return syscall.EBUSY
		}
		v.inject = &injection{vector, eventType, insnLen}
		v.resume = true
		return nil
	})
}

func (h hypervisor) DebugControl(vcpu int, singleStep bool) error {
	m := h.m
	return m.do("debug control", vcpu, func() error {
		if m.pv() {
			return syscall.EINVAL
		}
		if !m.cfg.MTF {
			return syscall.EOPNOTSUPP
		}
		v := m.v[vcpu]
		m.sync(v)
		v.single = singleStep
		return nil
	})
}
