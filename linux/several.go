package linux

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/vmprobes/vmprobes/sysmap"
)

// Memory without registers may hold several kernels: a guest that has rebooted by kexec,
// and many a guest that was reset, still has the page tables, the text and the symbols of
// the kernel that ran before, wherever nothing else was put. All of them are looked at.

// A vitality is what tells a kernel that runs from the remains of one.
type vitality struct {
	tasks   error // why its tasks can't be read
	clock   int64 // its time of day, in seconds since 1970; 0 if that isn't known
	ended   bool  // it has halted, or has left to another
	modules error // why its modules can't be read
}

// compare returns what cmp.Compare does: more than 0 if v is livelier than other.
func (v vitality) compare(other vitality) int {
	yes := func(b bool) int {
		if b {
			return 1
		}
		return 0
	}
	// Where memory was put to another use its lists are broken. Else the clock
	// decides: that of a kernel that is gone stands still.
	c := cmp.Or(cmp.Compare(yes(v.tasks == nil), yes(other.tasks == nil)), cmp.Compare(yes(v.modules == nil), yes(other.modules == nil)))
	if c == 0 && v.clock != 0 && other.clock != 0 {
		c = cmp.Compare(v.clock, other.clock)
	}
	return cmp.Or(c, cmp.Compare(yes(!v.ended), yes(!other.ended)))
}

func (v vitality) String() string {
	var all []string
	if v.tasks != nil {
		all = append(all, fmt.Sprintf("its tasks can't be read (%v)", v.tasks))
	}
	if v.modules != nil {
		all = append(all, fmt.Sprintf("its modules can't be read (%v)", v.modules))
	}
	if v.clock != 0 {
		all = append(all, "its clock is at "+time.Unix(v.clock, 0).UTC().Format(time.RFC3339))
	}
	if v.ended {
		all = append(all, "it says itself that it has ended")
	}
	if all == nil {
		return "its tasks can be read"
	}
	return strings.ReplaceAll(strings.Join(all, ", "), "\n", "; ")
}

// errLate: others took all the time.
var errLate = errors.New("not looked at: those before it took too long")

// running returns the kernel that runs, of those that were found in memory.
func running(found []*Kernel) *Kernel {
	if len(found) == 1 {
		return found[0]
	}
	v := make(map[*Kernel]vitality)
	deadline := time.Now().Add(maxTime)
	for _, k := range found {
		if v[k] = (vitality{tasks: errLate}); time.Now().Before(deadline) {
			v[k] = k.vitality()
		}
	}
	slices.SortStableFunc(found, func(a, b *Kernel) int { return v[b].compare(v[a]) })
	k := found[0]
	var others []string
	for _, o := range found[1:] {
		others = append(others, fmt.Sprintf("%s, at %#x: %v", printable(o.banner), o.ranges[0].Addr, v[o]))
	}
	why := fmt.Sprintf("of the one that is taken for the running one, %v", v[k])
	if v[k].compare(v[found[1]]) == 0 {
		why = "nothing tells which of them runs: the first is taken"
	}
	k.explain(rungOthers, nil, why, "%d more in memory: %s", len(others), strings.Join(others, "; "))
	k.log.Warn("memory has several kernels", "taken", k.banner, "others", others)
	return k
}

// The range of a clock that is believed: 2000 to 2100.
const (
	clockFrom = 946684800
	clockTo   = 4102444800
)

// vitality looks at what only a kernel that runs keeps in order.
func (k *Kernel) vitality() (v vitality) {
	tasks, err := k.Processes(true)
	switch {
	case err != nil:
		v.tasks = err
	case len(tasks) < 2:
		v.tasks = fmt.Errorf("there is only the idle task: %w", ErrBadKernel)
	}
	if _, err := k.Modules(); !errors.Is(err, sysmap.ErrNotFound) { // it may have none
		v.modules = err
	}
	var b [8]byte
	// SYSTEM_POWER_OFF is 4 up to 5.17 and SYSTEM_HALT 4 since (enum system_states,
	// include/linux/kernel.h); those behind are no better.
	if at, err := k.symbol("system_state"); err == nil && k.Read(at, b[:4]) == nil {
		v.ended = le32(b[:]) >= 4
	}
	// tk_core begins with a sequence counter (kernel/time/timekeeping.c).
	const timekeeper = 8
	if at, err := k.symbol("tk_core"); err == nil {
		if t, err := k.Types(); err == nil {
			f, err := t.Offset("timekeeper.xtime_sec")
			if err == nil && k.Read(at+timekeeper+f.Offset, b[:]) == nil {
				if s := int64(le64(b[:])); s >= clockFrom && s < clockTo {
					v.clock = s
				}
			}
		}
	}
	return v
}
