// Package tracefs reads what the kernel's tracefs says of kprobe events.
package tracefs

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strconv"
)

var (
	entry   = regexp.MustCompile(`(?m)^\{ common_pid: +(\d+)(?:, ret: +(\d+))? +\} hitcount: +(\d+)$`)
	entries = regexp.MustCompile(`(?m)^ +Entries: (\d+)$`)
	dropped = regexp.MustCompile(`(?m)^ +Dropped: (\d+)$`)
	event   = regexp.MustCompile(`^.*-(\d+) +\[\d+\] [^:]* [\d.]+: (\w+): \(.* <- .*\) ret=(0x[0-9a-f]+)$`)
	lost    = regexp.MustCompile(`^CPU:\d+ \[LOST .*\]$`)
)

// Histogram returns the counts of an event's file hist, whose keys are common_pid and, if it
// is at returns, the field ret: "TID:HITS" or "TID:RESULT:HITS".
func Histogram(hist []byte) (counts []string, err error) {
	for _, m := range entry.FindAllSubmatch(hist, -1) {
		c := append(bytes.Clone(m[1]), ':')
		if m[2] != nil {
			c = append(append(c, m[2]...), ':')
		}
		counts = append(counts, string(append(c, m[3]...)))
	}
	e, d := entries.FindSubmatch(hist), dropped.FindSubmatch(hist)
	switch {
	case e == nil || d == nil:
		return nil, fmt.Errorf("%.100q is no histogram", hist)
	case string(d[1]) != "0":
		return nil, fmt.Errorf("the table is too small for %s hits", d[1])
	case string(e[1]) != strconv.Itoa(len(counts)):
		return nil, fmt.Errorf("a histogram of %s entries shows %d", e[1], len(counts))
	}
	return counts, nil
}

// Missed returns how many hits the events of the file kprobe_profile missed, in all.
func Missed(profile []byte) (missed uint64, err error) {
	for line := range bytes.Lines(profile) {
		f := bytes.Fields(line) // event, hits, missed
		if len(f) != 3 {
			return 0, fmt.Errorf("kprobe_profile: %q", line)
		}
		n, err := strconv.ParseUint(string(f[2]), 10, 64)
		if err != nil {
			return 0, fmt.Errorf("kprobe_profile: %w", err)
		}
		missed += n
	}
	return missed, nil
}

// A Return is a line of an event at a function's return.
type Return struct {
	TID    int
	Event  string
	Result uint64 // the field ret
}

// Returns returns what the file trace says of events at returns.
func Returns(trace io.Reader) (all []Return, err error) {
	in := bufio.NewScanner(trace)
	for in.Scan() {
		if lost.Match(in.Bytes()) {
			return nil, errors.New("the trace lacks events that were lost")
		}
		m := event.FindSubmatch(in.Bytes())
		if m == nil {
			continue
		}
		tid, err := strconv.Atoi(string(m[1]))
		if err != nil {
			return nil, err
		}
		ret, err := strconv.ParseUint(string(m[3]), 0, 64)
		if err != nil {
			return nil, err
		}
		all = append(all, Return{tid, string(m[2]), ret})
	}
	return all, in.Err()
}
