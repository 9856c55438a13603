package vmprobes

import (
	"encoding/json"
	"fmt"
	"time"
)

// An Action is what a handler returns. As in C, zero goes on and anything else
// ends the loop.
type Action int

// Actions.
const (
	Continue Action = 0
	Stop     Action = 1
)

// A PreHandler runs before the probed instruction, with r.PC() at the probe. If
// it returns anything but Continue the loop ends; the instruction is executed all
// the same, without Post handlers. It also ends the hit for the probes that were
// registered later at the same address: they count it in Stats.Missed.
type PreHandler func(p *Probe, r *Regs) Action

// A PostHandler runs after the probed instruction, with the probe's flags, and
// only while a Loop runs: of a hit whose Pre handler ended the Loop it doesn't run.
type PostHandler func(p *Probe, r *Regs, f Flags) Action

// A Hit is what [Session.Hits] yields: a vCPU stopped at a probe, before the
// instruction, or at the return of a call that a ReturnProbe follows. It is valid
// until the next one; changes to Regs take effect.
type Hit struct {
	Probe *Probe
	Regs  *Regs
	VCPU  int
	Seq   uint64 // counts the hits that the Session delivered, from 1
	// Time is this host's clock when the Session took the hit up, before the Pre
	// handlers. The vCPU had stopped earlier: by the time that the hypervisor and
	// the hits before this one took. The guest's clock may show another time.
	Time time.Time
	// Activation is the call that returns, or nil if Probe isn't a ReturnProbe's.
	Activation *Activation
}

// MarshalJSON returns the hit as a JSON object:
//
//	{"event":"hit","probe":"do_sys_openat2","name":"opens","address":"0xffffffff8134a350",
//	 "vcpu":0,"seq":1,"time":"2026-01-02T15:04:05.123456789Z","registers":{"rbx":"0x0", …}}
//
// probe is the place as the caller gave it; name is there if the probe has one.
// At the return of a call the event is "return", and there are "result", "return_address"
// and "duration_ns", which is [Activation.Duration]. Addresses, results and registers are
// hexadecimal strings, because many readers of JSON keep 53 bits of a number.
func (h Hit) MarshalJSON() ([]byte, error) {
	j := struct {
		Event   string    `json:"event"`
		Probe   string    `json:"probe,omitempty"`
		Name    string    `json:"name,omitempty"`
		Address string    `json:"address,omitempty"`
		VCPU    int       `json:"vcpu"`
		Seq     uint64    `json:"seq"`
		Time    time.Time `json:"time"`
		Result  string    `json:"result,omitempty"`
		Took    *int64    `json:"duration_ns,omitempty"`
		Return  string    `json:"return_address,omitempty"`
		Regs    *Regs     `json:"registers"`
	}{Event: "hit", VCPU: h.VCPU, Seq: h.Seq, Time: h.Time, Regs: h.Regs}
	if a := h.Activation; a != nil && h.Regs != nil {
		took := a.Duration().Nanoseconds()
		j.Event, j.Result, j.Took, j.Return = "return", hex(h.Regs.Result()), &took, hex(a.ReturnAddress())
	}
	if h.Probe != nil {
		j.Probe, j.Name, j.Address = h.Probe.location(), h.Probe.Name, hex(h.Probe.Address())
	}
	return json.Marshal(j)
}

// Flags is the state of a probe, with the values of the C library.
type Flags uint32

// States of a probe.
const (
	FlagDisabled Flags = 1 << iota // VMPROBE_FLAG_DISABLED: handlers don't run
	FlagPrepared                   // VMPROBE_FLAG_PREPARED: the address is resolved, the guest attached
	FlagArmed                      // VMPROBE_FLAG_ARMED: the breakpoint is in the guest
	FlagRestored                   // VMPROBE_FLAG_RESTORED: the guest has its instruction back
	FlagLimited                    // Probe.Limit is reached: the probe is out, or about to be
)

// String returns the names of the flags, as in "prepared|armed".
func (f Flags) String() string {
	if f == 0 {
		return "0"
	}
	s := ""
	for i, name := range []string{"disabled", "prepared", "armed", "restored", "limited"} {
		if f&(1<<i) != 0 {
			if s != "" {
				s += "|"
			}
			s += name
		}
	}
	if rest := f &^ (FlagDisabled | FlagPrepared | FlagArmed | FlagRestored | FlagLimited); rest != 0 {
		if s != "" {
			s += "|"
		}
		s += fmt.Sprintf("%#x", uint32(rest))
	}
	return s
}
