package vmprobes

import (
	"fmt"
	"slices"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/x86"
)

// A Filter says which executions of a probed address are hits. It is looked at before
// anything is counted or copied and before a handler runs; the others count in
// Stats.Filtered. All that is set must match. The guest stops for each execution all the same.
//
// Register fails with ErrBadFilter if PIDs, TGIDs or Tasks are set and the guest's kernel
// doesn't tell which task a vCPU executes. Where that can't be read at a hit, none matches.
type Filter struct {
	// Args are conditions on the arguments, at a function's first instruction; at most 16.
	Args []ArgFilter
	// PIDs are thread ids, TGIDs process ids, both in the guest's initial namespace; Tasks are
	// addresses of task_structs. The vCPU must execute one of each list that isn't empty; at most
	// 1024.
	PIDs, TGIDs []int
	Tasks       []Addr
	// VCPUs are numbers of vCPUs.
	VCPUs []int
}

// An ArgFilter is a condition on one argument: argument N, with the bits of Mask (all, if it is
// 0), has the relation Op to Value. The numbers are unsigned.
type ArgFilter struct {
	N     int // from 0 to 5, as in Regs.Arg
	Op    Op
	Value uint64
	Mask  uint64
}

// An Op is a relation.
type Op uint8

// Relations.
const (
	Equal Op = iota
	NotEqual
	Less
	LessOrEqual
	Greater
	GreaterOrEqual
)

// Bounds of a Filter, which is looked at for each execution.
const (
	maxFilterArgs = 16
	maxFilterList = 1024
)

// check says what is wrong with a filter.
func (f *Filter) check() error {
	if len(f.Args) > maxFilterArgs {
		return fmt.Errorf("%w: %d conditions on arguments, of %d at most", ErrBadFilter, len(f.Args), maxFilterArgs)
	}
	for _, a := range f.Args {
		if a.N < 0 || a.N > 5 || a.Op > GreaterOrEqual {
			return fmt.Errorf("%w: argument %d, relation %d: arguments are 0 to 5, relations 0 to %d", ErrBadFilter, a.N, a.Op, GreaterOrEqual)
		}
	}
	for _, n := range []int{len(f.PIDs), len(f.TGIDs), len(f.Tasks), len(f.VCPUs)} {
		if n > maxFilterList {
			return fmt.Errorf("%w: a list of %d, of %d at most", ErrBadFilter, n, maxFilterList)
		}
	}
	return nil
}

// filter has the engine look at f for each execution.
func (f *Filter) filter(p *breakpoint.Probe, s *Session) error {
	if f == nil {
		return nil
	}
	if err := f.check(); err != nil {
		return err
	}
	if len(f.PIDs)+len(f.TGIDs)+len(f.Tasks) > 0 {
		if err := s.tellsTasks(len(f.TGIDs) > 0); err != nil {
			return fmt.Errorf("%w: which task a vCPU executes isn't known: %w", ErrBadFilter, err)
		}
	}
	// The caller may change his lists.
	g := Filter{slices.Clone(f.Args), slices.Clone(f.PIDs), slices.Clone(f.TGIDs), slices.Clone(f.Tasks), slices.Clone(f.VCPUs)}
	p.WantTask = len(g.PIDs)+len(g.TGIDs)+len(g.Tasks) > 0
	p.Want = g.matches
	return nil
}

func (f *Filter) matches(r *x86.Regs, vcpu int, t *breakpoint.Task) bool {
	if len(f.VCPUs) > 0 && !slices.Contains(f.VCPUs, vcpu) {
		return false
	}
	for i := range f.Args {
		if !f.Args[i].matches(r) {
			return false
		}
	}
	switch {
	case len(f.PIDs)+len(f.TGIDs)+len(f.Tasks) == 0:
		return true
	case t.Addr == 0,
		len(f.PIDs) > 0 && !slices.Contains(f.PIDs, t.PID),
		len(f.TGIDs) > 0 && !slices.Contains(f.TGIDs, t.TGID),
		len(f.Tasks) > 0 && !slices.Contains(f.Tasks, t.Addr):
		return false
	}
	return true
}

func (a *ArgFilter) matches(r *x86.Regs) bool {
	v := [...]uint64{r.DI, r.SI, r.DX, r.CX, r.R8, r.R9}[a.N]
	if a.Mask != 0 {
		v &= a.Mask
	}
	switch a.Op {
	case NotEqual:
		return v != a.Value
	case Less:
		return v < a.Value
	case LessOrEqual:
		return v <= a.Value
	case Greater:
		return v > a.Value
	case GreaterOrEqual:
		return v >= a.Value
	}
	return v == a.Value
}

// A Limit takes a probe out of the guest by itself. It stays registered, without being armed,
// until Unregister; its Flags have FlagLimited. A ReturnProbe follows to their end the calls that
// have begun. A Loop whose last probe is taken out by Hits returns nil, and by PerSecond an error
// that wraps ErrTooOften.
type Limit struct {
	Hits      uint64 // after so many hits; 0: no limit
	PerSecond uint64 // when there are more hits in a second; 0: no limit
}
