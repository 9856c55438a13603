package xentest

import (
	"context"
	"runtime"
	"sync"

	"github.com/vmprobes/vmprobes/internal/xen"
	"github.com/vmprobes/vmprobes/xenctrl"
)

// Mortal is the Hypervisor of a tool that dies at one of its calls, as if by SIGKILL:
// from then on none of its goroutines comes back from a call, and no call of theirs has
// an effect. They end with runtime.Goexit.
type Mortal struct {
	xen.Hypervisor
	died func()

	mu   sync.Mutex
	left int // calls that it has to live, or < 0: for ever
	half bool
	dead bool
}

// Die has the tool die at its n-th call from now (0: the next): before the call, or if
// after is set when it was made and its answer isn't known yet. died is called at that
// moment, by the goroutine that dies.
func (m *Mortal) Die(n int, after bool, died func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.left, m.half, m.died = n, after, died
}

// NewMortal returns hv for a tool that lives until Die says otherwise.
func NewMortal(hv xen.Hypervisor) *Mortal { return &Mortal{Hypervisor: hv, left: -1} }

// Dead reports whether the tool has died.
func (m *Mortal) Dead() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.dead
}

// Call makes one call of the tool. Records of a journal may be such calls, too.
func (m *Mortal) Call(f func()) {
	m.mu.Lock()
	now := false
	switch {
	case m.dead:
		m.mu.Unlock()
		runtime.Goexit()
	case m.left == 0:
		now = true
	case m.left > 0:
		m.left--
	}
	if !now {
		m.mu.Unlock()
		f()
		// Another goroutine may have died meanwhile: then this one's call was made, and
		// nobody hears of it.
		if m.Dead() {
			runtime.Goexit()
		}
		return
	}
	if m.half {
		f() // with m.mu held: nobody else does anything meanwhile
	}
	m.dead = true
	if p, ok := m.Hypervisor.(interface{ Died() }); ok {
		p.Died()
	}
	m.died()
	m.mu.Unlock()
	runtime.Goexit()
}

func (m *Mortal) Info() (info xenctrl.DomainInfo, err error) {
	m.Call(func() { info, err = m.Hypervisor.Info() })
	return info, err
}

func (m *Mortal) Pause() (err error) {
	m.Call(func() { err = m.Hypervisor.Pause() })
	return err
}

func (m *Mortal) Unpause() (err error) {
	m.Call(func() { err = m.Hypervisor.Unpause() })
	return err
}

func (m *Mortal) VCPUContext(v int, c *xenctrl.VCPUContext) (err error) {
	m.Call(func() { err = m.Hypervisor.VCPUContext(v, c) })
	return err
}

func (m *Mortal) SetVCPUContext(v int, c *xenctrl.VCPUContext) (err error) {
	m.Call(func() { err = m.Hypervisor.SetVCPUContext(v, c) })
	return err
}

func (m *Mortal) VCPUExtState(v int) (s xenctrl.ExtState, err error) {
	m.Call(func() { s, err = m.Hypervisor.VCPUExtState(v) })
	return s, err
}

func (m *Mortal) SetVCPUExtState(v int, s xenctrl.ExtState) (err error) {
	m.Call(func() { err = m.Hypervisor.SetVCPUExtState(v, s) })
	return err
}

func (m *Mortal) HVMCPU(v int) (c xenctrl.HVMCPU, err error) {
	m.Call(func() { c, err = m.Hypervisor.HVMCPU(v) })
	return c, err
}

func (m *Mortal) VCPUInfo(v int) (info xenctrl.VCPUInfo, err error) {
	m.Call(func() { info, err = m.Hypervisor.VCPUInfo(v) })
	return info, err
}

func (m *Mortal) MapFrames(writable bool, frames ...uint64) (mp xen.Mapping, err error) {
	m.Call(func() { mp, err = m.Hypervisor.MapFrames(writable, frames...) })
	return mp, err
}

func (m *Mortal) WriteFrame(frame uint64, off int, b []byte) (err error) {
	m.Call(func() { err = m.Hypervisor.WriteFrame(frame, off, b) })
	return err
}

func (m *Mortal) SetDebugging(on bool) (err error) {
	m.Call(func() { err = m.Hypervisor.SetDebugging(on) })
	return err
}

func (m *Mortal) GdbsxDomStatus() (s xenctrl.DomStatus, err error) {
	m.Call(func() { s, err = m.Hypervisor.GdbsxDomStatus() })
	return s, err
}

func (m *Mortal) GdbsxPauseVCPU(v int) (err error) {
	m.Call(func() { err = m.Hypervisor.GdbsxPauseVCPU(v) })
	return err
}

func (m *Mortal) GdbsxUnpauseVCPU(v int) (err error) {
	m.Call(func() { err = m.Hypervisor.GdbsxUnpauseVCPU(v) })
	return err
}

func (m *Mortal) MonitorCapabilities() (c xenctrl.MonitorCaps, err error) {
	m.Call(func() { c, err = m.Hypervisor.MonitorCapabilities() })
	return c, err
}

func (m *Mortal) ReleaseMonitor(answers []xenctrl.Event) (err error) {
	m.Call(func() { err = m.Hypervisor.ReleaseMonitor(answers) })
	return err
}

func (m *Mortal) InjectEvent(v int, vector, eventType uint8, errorCode, insnLen uint32, cr2 uint64) (err error) {
	m.Call(func() { err = m.Hypervisor.InjectEvent(v, vector, eventType, errorCode, insnLen, cr2) })
	return err
}

func (m *Mortal) DebugControl(v int, on bool) (err error) {
	m.Call(func() { err = m.Hypervisor.DebugControl(v, on) })
	return err
}

func (m *Mortal) MapRing() (r xen.Ring, err error) {
	m.Call(func() { r, err = m.Hypervisor.MapRing() })
	return r, err
}

func (m *Mortal) TakeMonitor(r xen.Ring, port uint32) (mon xen.Monitor, st xenctrl.RingState, err error) {
	m.Call(func() { mon, st, err = m.Hypervisor.TakeMonitor(r, port) })
	if err != nil {
		return nil, st, err
	}
	return mortalMonitor{mon, m}, st, nil
}

func (m *Mortal) OpenMonitor() (mon xen.Monitor, err error) {
	m.Call(func() { mon, err = m.Hypervisor.OpenMonitor() })
	if err != nil {
		return nil, err
	}
	return mortalMonitor{mon, m}, nil
}

// mortalMonitor is the ring of a tool that may die.
type mortalMonitor struct {
	xen.Monitor
	m *Mortal
}

func (r mortalMonitor) SetSoftwareBreakpoint(on bool) (err error) {
	r.m.Call(func() { err = r.Monitor.SetSoftwareBreakpoint(on) })
	return err
}

func (r mortalMonitor) SetSingleStep(on bool) (err error) {
	r.m.Call(func() { err = r.Monitor.SetSingleStep(on) })
	return err
}

func (r mortalMonitor) SetDebugExceptions(on, sync bool) (err error) {
	r.m.Call(func() { err = r.Monitor.SetDebugExceptions(on, sync) })
	return err
}

// Wait isn't a call at which a tool can die halfway: while it waits it does nothing.
func (r mortalMonitor) Wait(ctx context.Context) (err error) {
	err = r.Monitor.Wait(ctx)
	r.m.Call(func() {})
	return err
}

func (r mortalMonitor) Next(e *xenctrl.Event) (ok bool, err error) {
	r.m.Call(func() { ok, err = r.Monitor.Next(e) })
	return ok, err
}

func (r mortalMonitor) Respond(e *xenctrl.Event) (err error) {
	r.m.Call(func() { err = r.Monitor.Respond(e) })
	return err
}

func (r mortalMonitor) Notify() (err error) {
	r.m.Call(func() { err = r.Monitor.Notify() })
	return err
}

func (r mortalMonitor) Close() (err error) {
	r.m.Call(func() { err = r.Monitor.Close() })
	return err
}
