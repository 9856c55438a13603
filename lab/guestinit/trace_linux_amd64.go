package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
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

// kprobed are the functions with kprobe events.
var kprobed []string

// perThread counts an event's hits by thread. The table is small: an ordinary one
// has room for 2048, and there are many.
const perThread = "hist:keys=common_pid:size=128"

func kprobeEvent(i int) string { return fmt.Sprintf("lab/p%d", i) }

// kprobes has kprobe events at functions, or none.
func kprobes(words []string) (string, error) {
	if err := openTracing(); err != nil {
		return "", err
	}
	switch {
	case len(words) > 1 && words[0] == "on" && kprobed == nil:
		for i, name := range words[1:] {
			if err := control("kprobe_events", fmt.Sprintf("p:%s %s\n", kprobeEvent(i), name), os.O_APPEND); err != nil {
				return "", err
			}
			kprobed = append(kprobed, name)
			if err := control("events/"+kprobeEvent(i)+"/trigger", perThread, os.O_APPEND); err != nil {
				return "", err
			}
		}
		if err := control("events/lab/enable", "1", os.O_TRUNC); err != nil {
			return "", err
		}
		return fmt.Sprintf("kprobes on=%d", len(kprobed)), nil
	case len(words) == 1 && words[0] == "counts":
		return kprobeCounts()
	case len(words) == 1 && words[0] == "off":
		if kprobed == nil {
			return "kprobes on=0", nil
		}
		if err := control("events/lab/enable", "0", os.O_TRUNC); err != nil {
			return "", err
		}
		for i := range kprobed {
			if err := control("events/"+kprobeEvent(i)+"/trigger", "!"+perThread, os.O_APPEND); err != nil {
				return "", err
			}
		}
		if err := control("kprobe_events", "", os.O_TRUNC); err != nil {
			return "", err
		}
		kprobed = nil
		return "kprobes on=0", nil
	}
	return "", fmt.Errorf("kprobes: want on and functions while there are none, counts, or off")
}

var histLine = regexp.MustCompile(`(?m)^\{ common_pid: +(\d+) \} hitcount: +(\d+)$`)

// kprobeCounts says how often each thread hit each kprobe event.
func kprobeCounts() (string, error) {
	for i, name := range kprobed {
		b, err := os.ReadFile(tracing + "events/" + kprobeEvent(i) + "/hist")
		if err != nil {
			return "", err
		}
		var line strings.Builder
		line.WriteString(name)
		for _, m := range histLine.FindAllSubmatch(b, -1) {
			line.WriteString(fmt.Sprintf(" %s:%s", m[1], m[2]))
		}
		say("| %s", line.String())
	}
	b, err := os.ReadFile(tracing + "kprobe_profile") // event hits missed
	if err != nil {
		return "", err
	}
	missed := uint64(0)
	for line := range bytes.Lines(b) {
		if f := bytes.Fields(line); len(f) == 3 {
			n, err := strconv.ParseUint(string(f[2]), 10, 64)
			if err != nil {
				return "", fmt.Errorf("kprobe_profile: %w", err)
			}
			missed += n
		}
	}
	return fmt.Sprintf("kprobes on=%d missed=%d", len(kprobed), missed), nil
}
