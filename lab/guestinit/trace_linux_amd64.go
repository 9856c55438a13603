package main

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/vmprobes/vmprobes/lab/internal/tracefs"
)

// What the guest's own tracing does to its text: the function tracer rewrites the
// first bytes of functions, kprobe events do too or put breakpoints, and trace
// events turn static keys and static calls over.

const tracing = "/sys/kernel/tracing/"

// openTracing makes the control files appear. Nothing is mounted before it is
// needed: most tests want a guest that has never traced.
func openTracing() error {
	if err := unix.Mount("tracefs", tracing, "tracefs", 0, ""); err != nil && err != unix.EBUSY {
		return fmt.Errorf("mount tracefs: %w", err)
	}
	return nil
}

// control writes to a file of tracefs: O_TRUNC empties a list first, O_APPEND
// adds to it.
func control(file, value string, flags int) error {
	f, err := os.OpenFile(tracing+file, os.O_WRONLY|flags, 0)
	if err != nil {
		return err
	}
	if _, err = f.WriteString(value); err != nil {
		err = fmt.Errorf("write %.40q to %s: %w", value, file, err)
	}
	if cerr := f.Close(); err == nil && cerr != nil {
		err = fmt.Errorf("%s: %w", file, cerr)
	}
	return err
}

// ftrace turns the function tracer on, for one function or for all from the first
// up to but without the last, or off.
func ftrace(words []string) (string, error) {
	if err := openTracing(); err != nil {
		return "", err
	}
	if len(words) == 1 && words[0] == "off" {
		reply, err := ftraceState()
		if err != nil {
			return "", err
		}
		return reply, control("current_tracer", "nop", os.O_TRUNC)
	}
	var filter string
	switch len(words) {
	case 1:
		filter = words[0]
	case 2:
		from, to, err := traceable(words[0], words[1])
		if err != nil {
			return "", err
		}
		// By their places in the list: the kernel looks all of it through for a name.
		var b strings.Builder
		for i := from; i < to; i++ {
			b.WriteString(strconv.Itoa(i))
			b.WriteByte('\n')
		}
		filter = b.String()
	default:
		return "", fmt.Errorf("ftrace: want off, a function, or the first of many and the one behind the last")
	}
	if err := control("set_ftrace_filter", filter, os.O_TRUNC); err != nil {
		return "", err
	}
	if err := control("trace", "", os.O_TRUNC); err != nil {
		return "", err
	}
	if err := control("current_tracer", "function", os.O_TRUNC); err != nil {
		return "", err
	}
	return ftraceState()
}

// places are those of functions in available_filter_functions, counted from 1.
var places = map[string]int{}

// traceable returns the places of two functions. The list is in the order of
// addresses, so those of one directory of the kernel's source stand together.
func traceable(first, last string) (from, to int, err error) {
	if places[first] == 0 || places[last] == 0 {
		f, err := os.Open(tracing + "available_filter_functions")
		if err != nil {
			return 0, 0, err
		}
		defer func() { _ = f.Close() }()
		in := bufio.NewScanner(f)
		for n := 1; in.Scan(); n++ {
			if name := in.Bytes(); string(name) == first || string(name) == last {
				places[string(name)] = n
			}
		}
		if err := in.Err(); err != nil {
			return 0, 0, err
		}
	}
	from, to = places[first], places[last]
	if from == 0 || to <= from {
		return 0, 0, fmt.Errorf("ftrace: %s (%d) and %s (%d) are no range of functions that can be traced", first, from, last, to)
	}
	return from, to, nil
}

// ftraceState tells whether ftrace works, how many functions it has changed now,
// and how many calls the tracer has recorded since it was turned on.
func ftraceState() (string, error) {
	// After a failed change of text the kernel turns ftrace off until it boots again
	// (ftrace_kill, kernel/trace/ftrace.c); this file can't be read then.
	alive := "no"
	switch b, err := os.ReadFile("/proc/sys/kernel/ftrace_enabled"); {
	case err != nil && !errors.Is(err, unix.ENODEV):
		return "", err
	case err == nil && strings.TrimSpace(string(b)) == "1":
		alive = "yes"
	}
	enabled, err := countLines(tracing + "enabled_functions")
	if err != nil {
		return "", err
	}
	stats, err := filepath.Glob(tracing + "per_cpu/cpu*/stats")
	if err != nil {
		return "", err
	}
	var calls uint64
	for _, file := range stats {
		b, err := os.ReadFile(file)
		if err != nil {
			return "", err
		}
		for line := range strings.Lines(string(b)) {
			name, value, _ := strings.Cut(line, ":")
			if n, err := strconv.ParseUint(strings.TrimSpace(value), 10, 64); err == nil && (name == "entries" || name == "overrun") {
				calls += n
			}
		}
	}
	return fmt.Sprintf("ftrace alive=%s enabled=%d calls=%d", alive, enabled, calls), nil
}

func countLines(path string) (int, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer func() { _ = f.Close() }()
	n := 0
	in := bufio.NewScanner(f)
	for in.Scan() {
		n++
	}
	return n, in.Err()
}

// event turns a trace event, such as xdp/xdp_exception, or all of a subsystem's
// on or off.
func event(name, on string) (string, error) {
	value, ok := map[string]string{"on": "1", "off": "0"}[on]
	if !ok {
		return "", fmt.Errorf("event: want on or off, not %q", on)
	}
	if err := openTracing(); err != nil {
		return "", err
	}
	return "event", control("events/"+name+"/enable", value, os.O_TRUNC)
}

// probeEvents is one of the two kinds of kprobe events. A trigger counts an event's hits.
// Its table is small: an ordinary one has room for 2048, and there are many.
type probeEvents struct {
	name, definition, trigger string

	functions []string // with one
}

var (
	kprobeEvents    = probeEvents{name: "kprobes", definition: "p:%s %s\n", trigger: "hist:keys=common_pid:size=128"}
	kretprobeEvents = probeEvents{name: "kretprobes", definition: "r4096:%s %s ret=$retval:x64\n", trigger: "hist:keys=common_pid,ret:size=1024"}
)

func probeEvent(i int) string { return fmt.Sprintf("lab/e%d", i) }

// command has events at functions, or none.
func (p *probeEvents) command(words []string) (string, error) {
	if err := openTracing(); err != nil {
		return "", err
	}
	switch {
	case len(words) > 1 && words[0] == "on" && kprobeEvents.functions == nil && kretprobeEvents.functions == nil:
		if err := control("trace", "", os.O_TRUNC); err != nil {
			return "", err
		}
		for i, name := range words[1:] {
			if err := control("kprobe_events", fmt.Sprintf(p.definition, probeEvent(i), name), os.O_APPEND); err != nil {
				return "", err
			}
			p.functions = append(p.functions, name)
			if err := control("events/"+probeEvent(i)+"/trigger", p.trigger, os.O_APPEND); err != nil {
				return "", err
			}
		}
		if err := control("events/lab/enable", "1", os.O_TRUNC); err != nil {
			return "", err
		}
		return fmt.Sprintf("%s on=%d", p.name, len(p.functions)), nil
	case len(words) == 1 && words[0] == "counts":
		return p.counts()
	case len(words) == 1 && words[0] == "order" && p == &kretprobeEvents:
		return p.order()
	case len(words) == 1 && words[0] == "off":
		if p.functions == nil {
			return p.name + " on=0", nil
		}
		if err := control("events/lab/enable", "0", os.O_TRUNC); err != nil {
			return "", err
		}
		for i := range p.functions {
			if err := control("events/"+probeEvent(i)+"/trigger", "!"+p.trigger, os.O_APPEND); err != nil {
				return "", err
			}
		}
		if err := control("kprobe_events", "", os.O_TRUNC); err != nil {
			return "", err
		}
		p.functions = nil
		return p.name + " on=0", nil
	}
	return "", fmt.Errorf("%s: want on and functions while there are no events, counts, or off", p.name)
}

// counts says how often each thread hit each event, and with which result.
func (p *probeEvents) counts() (string, error) {
	for i, name := range p.functions {
		b, err := os.ReadFile(tracing + "events/" + probeEvent(i) + "/hist")
		if err != nil {
			return "", err
		}
		counts, err := tracefs.Histogram(b)
		if err != nil {
			return "", fmt.Errorf("%s: %s: %w", p.name, name, err)
		}
		say("| %s", strings.Join(append([]string{name}, counts...), " "))
	}
	b, err := os.ReadFile(tracing + "kprobe_profile")
	if err != nil {
		return "", err
	}
	missed, err := tracefs.Missed(b)
	return fmt.Sprintf("%s on=%d missed=%d", p.name, len(p.functions), missed), err
}

// order says in which order functions returned.
func (p *probeEvents) order() (_ string, err error) {
	// What reads the trace would write it.
	if err := control("tracing_on", "0", os.O_TRUNC); err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, control("tracing_on", "1", os.O_TRUNC)) }()
	f, err := os.Open(tracing + "trace")
	if err != nil {
		return "", err
	}
	defer func() { _ = f.Close() }()
	returns, err := tracefs.Returns(f)
	if err != nil {
		return "", fmt.Errorf("%s: %w", p.name, err)
	}
	n := 0
	for _, r := range returns {
		for i, name := range p.functions {
			if probeEvent(i) == "lab/"+r.Event {
				say("| %d %s %d", r.TID, name, r.Result)
				n++
			}
		}
	}
	return fmt.Sprintf("%s order=%d", p.name, n), nil
}
