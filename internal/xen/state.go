package xen

import (
	"bytes"
	"fmt"
	"reflect"
	"sync/atomic"
	"unsafe"

	"github.com/vmprobes/vmprobes/internal/x86"
	"github.com/vmprobes/vmprobes/paging"
	"github.com/vmprobes/vmprobes/xenctrl"
)

// shared is what a process has to know that takes over a guest from one that died. It is
// in memory that outlives the process: a driver works on it, and so pays nothing for it.
// Writer and reader are the same version of the same program, on the same machine.
type shared struct {
	beats    atomic.Uint64 // see Beats
	intent   intent
	frozen   int         // Freezes without their Thaw
	owed     int         // Debugger's
	vcpuInfo uint64      // Debugger's
	kernel   paging.Root // through which the kernel is reached, if it is known

	// A stop that is being counted (Debugger's): see takeStop.
	took                  atomic.Int64 // its vCPU plus one, below 0 if a step is done; 0: none is
	tookOwed, tookLatched int

	// Of a takeover (Debugger's): pauses undone, events taken that had been latched,
	// calls of an earlier process of which nobody knows whether they were made: those
	// that ask for an event, those that pause, and those that unpause.
	undone, latched, asked, maybe, paid int
	tries                               int    // takeovers begun
	counted                             bool   // undone is all of them
	unsure                              bool   // MonitorRoute's: a process died while it told Xen of answers
	port                                uint32 // MonitorRoute's: of the ring that a guardian may have mapped, or 0
	released                            bool   // MonitorRoute's: no monitor may be attached, though breakpoints are in the guest

	step sharedStep
}

// intent is a call that is under way: one that changes the domain's pause count, or that
// reads and clears an event. If the process dies then nobody else knows whether it was
// made.
type intent uint32

const (
	intentNone intent = iota
	intentAsk         // for an event
	intentPause
	intentUnpause
	intentNotify // Xen of answers on the ring
)

// sharedStep is a step in progress.
type sharedStep struct {
	vcpu   int // plus one; 0: there is none
	phase  stepPhase
	addr   uint64
	insn   [x86.MaxLen]byte // at addr
	len    uint8
	masked uint64 // address of an upcall mask that was 0 and is to be so again, or 0
	before x86.Regs
}

type stepPhase uint32

const (
	stepBegins stepPhase = iota // the vCPU is stopped at the breakpoint still
	stepRuns                    // it may execute the instruction
	stepDone                    // it has, and that is to be answered
)

// sharedVCPU is what is known of a vCPU only by who debugs the guest.
type sharedVCPU struct {
	stopped  bool // its event was taken, and the stop isn't answered
	fresh    bool // taken after the death of who answered it last, and not handed on yet
	setting  setting
	saved    bool // ext was saved, and Xen may have lost it
	entering bool // an exception is being delivered; mask is the interrupt mask of before
	mask     upcallMask
	told     bool             // MonitorRoute's: Xen was told of the answer, or there is none
	again    bool             // MonitorRoute's: the answer was to go on where it was
	dr6      uint64           // as last seen; 0 after a debug exception was given to the guest
	want     xenctrl.UserRegs // of the last change of context
	extMask  uint64
	extLen   int
	extData  [maxExt]byte
}

// maxExt is the size of the largest extended state there is, with room: that of AMX has
// 11008 bytes (SDM volume 1, 13.4.2 and 18.4).
const maxExt = 16 << 10

// setting is how far a change of context has come.
type setting uint8

const (
	settingNone  setting = iota // since the vCPU stopped
	settingBegun                // the context may be the vCPU's, and ext not
	settingDone
)

// StateSize is how much memory OpenDebugger and OpenMonitor want for the state of a guest
// with so many vCPUs.
func StateSize(vcpus int) int {
	return int(unsafe.Sizeof(shared{})) + vcpus*int(unsafe.Sizeof(sharedVCPU{}))
}

// StateTypes are the types of what is in such memory.
func StateTypes() []reflect.Type {
	return []reflect.Type{reflect.TypeFor[shared](), reflect.TypeFor[sharedVCPU]()}
}

// begin writes down that a vCPU is to step over the instruction of p, perhaps once more.
func (s *sharedStep) begin(vcpu int, p *patch, before *x86.Regs) {
	if s.vcpu != vcpu+1 || s.addr != p.addr || !bytes.Equal(s.insn[:min(int(s.len), len(s.insn))], p.insn.Bytes()) {
		*s = sharedStep{addr: p.addr, len: uint8(p.insn.Len), before: *before}
		copy(s.insn[:], p.insn.Bytes())
		s.vcpu = vcpu + 1 // last: whoever finds it finds the rest
	}
	s.before, s.phase = *before, stepBegins
}

// patch returns the breakpoint that is stepped over. It may have been removed since.
func (s *sharedStep) patch() (*patch, error) {
	in, err := x86.Decode(s.insn[:min(int(s.len), len(s.insn))])
	if err != nil {
		return nil, fmt.Errorf("step over %#x: %w", s.addr, err)
	}
	return &patch{addr: s.addr, insn: in, gone: true}, nil
}

// stateIn returns the state in mem, or in memory of this process if mem is nil.
func stateIn(mem []byte, vcpus int) (*shared, []sharedVCPU, error) {
	if mem == nil {
		return new(shared), make([]sharedVCPU, vcpus), nil
	}
	if len(mem) < StateSize(vcpus) {
		return nil, nil, fmt.Errorf("state of %d bytes, want %d for %d vCPUs", len(mem), StateSize(vcpus), vcpus)
	}
	s := (*shared)(unsafe.Pointer(&mem[0]))
	vs := unsafe.Slice((*sharedVCPU)(unsafe.Pointer(&mem[unsafe.Sizeof(shared{})])), vcpus)
	return s, vs, nil
}

// keep makes e the vCPU's saved state.
func (v *vcpu) keep(e xenctrl.ExtState) {
	v.ext = e
	v.extLen = 0
	if !e.Live() {
		return // nothing would be lost
	}
	if len(e.Data) <= len(v.extData) {
		v.extMask, v.extLen = e.Mask, copy(v.extData[:], e.Data)
		v.ext.Data = v.extData[:v.extLen]
	} else {
		v.ext.Data = append([]byte(nil), e.Data...) // Hypervisor.VCPUExtState uses its memory again
	}
}

// account makes a call that pauses the domain or undoes that, and adds by to n if it
// succeeds. Nobody else can know of the call before n says that it was made.
func (s *shared) account(i intent, call func() error, n *int, by int) error {
	s.intent = i
	err := call()
	if err == nil {
		*n += by
	}
	s.intent = intentNone
	return err
}
