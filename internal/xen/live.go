package xen

import "github.com/vmprobes/vmprobes/xenctrl"

// Live returns the Hypervisor of a domain on the Xen that h is connected to.
func Live(h *xenctrl.Handle, id xenctrl.DomID) Hypervisor { return &live{h: h, id: id} }

type live struct {
	h   *xenctrl.Handle
	id  xenctrl.DomID
	ext xenctrl.ExtState // memory of VCPUExtState
}

func (l *live) Info() (xenctrl.DomainInfo, error) { return l.h.Domain(l.id) }
func (l *live) Yield() bool                       { return l.h.Yield() }
func (l *live) Pause() error                      { return l.h.Pause(l.id) }
func (l *live) Unpause() error                    { return l.h.Unpause(l.id) }

func (l *live) VCPUContext(vcpu int, c *xenctrl.VCPUContext) error {
	return l.h.VCPUContext(l.id, vcpu, c)
}

func (l *live) SetVCPUContext(vcpu int, c *xenctrl.VCPUContext) error {
	return l.h.SetVCPUContext(l.id, vcpu, c)
}

func (l *live) VCPUExtState(vcpu int) (xenctrl.ExtState, error) {
	err := l.h.ReadVCPUExtState(l.id, vcpu, &l.ext)
	return l.ext, err
}

func (l *live) SetVCPUExtState(vcpu int, s xenctrl.ExtState) error {
	return l.h.SetVCPUExtState(l.id, vcpu, s)
}

func (l *live) VCPUInfo(vcpu int) (xenctrl.VCPUInfo, error) { return l.h.VCPUInfo(l.id, vcpu) }

func (l *live) HVMCPU(vcpu int) (xenctrl.HVMCPU, error) { return l.h.HVMCPU(l.id, vcpu) }

func (l *live) MapFrames(writable bool, frames ...uint64) (Mapping, error) {
	m, err := l.h.MapForeign(l.id, writable, frames...)
	if err != nil {
		return nil, err
	}
	return m, nil
}

func (l *live) WriteFrame(frame uint64, off int, b []byte) error {
	return l.h.WriteForeign(l.id, frame, off, b)
}

func (l *live) SetDebugging(on bool) error                 { return l.h.SetDebugging(l.id, on) }
func (l *live) GdbsxDomStatus() (xenctrl.DomStatus, error) { return l.h.GdbsxDomStatus(l.id) }
func (l *live) GdbsxPauseVCPU(vcpu int) error              { return l.h.GdbsxPauseVCPU(l.id, vcpu) }
func (l *live) GdbsxUnpauseVCPU(vcpu int) error            { return l.h.GdbsxUnpauseVCPU(l.id, vcpu) }

func (l *live) MonitorCapabilities() (xenctrl.MonitorCaps, error) {
	return l.h.MonitorCapabilities(l.id)
}

func (l *live) OpenMonitor() (Monitor, error) {
	m, err := l.h.OpenMonitor(l.id)
	if err != nil {
		return nil, err
	}
	return m, nil
}

func (l *live) ReleaseMonitor(answers []xenctrl.Event) error {
	return l.h.ReleaseMonitor(l.id, answers)
}

func (l *live) MapRing() (Ring, error) {
	r, err := l.h.MapRing(l.id)
	if err != nil {
		return nil, err
	}
	return r, nil
}

func (l *live) TakeMonitor(r Ring, port uint32) (Monitor, xenctrl.RingState, error) {
	m, st, err := r.(*xenctrl.Ring).TakeMonitor(port)
	if err != nil {
		return nil, st, err
	}
	return m, st, nil
}

func (l *live) InjectEvent(vcpu int, vector, eventType uint8, errorCode, insnLen uint32, cr2 uint64) error {
	return l.h.InjectEvent(l.id, vcpu, vector, eventType, errorCode, insnLen, cr2)
}

func (l *live) DebugControl(vcpu int, singleStep bool) error {
	return l.h.DebugControl(l.id, vcpu, singleStep)
}
