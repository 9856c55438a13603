package main

import "strings"

// failures keeps what a Go test's output says of assertions that failed, so that it
// can be shown again at the end, behind the consoles: who reads the end of a long log
// finds the cause there.
type failures struct {
	lines []string
	part  string // of a line
	in    bool   // a block of an assertion
}

// failureLines is how many lines are kept: the first ones, which tend to be the cause.
const failureLines = 60

func (f *failures) write(s string) {
	s = f.part + s
	for {
		line, rest, ok := strings.Cut(s, "\n")
		if !ok {
			f.part = s[max(0, len(s)-4096):]
			return
		}
		f.line(line)
		s = rest
	}
}

func (f *failures) line(line string) {
	text := strings.TrimSpace(line)
	switch {
	case strings.HasPrefix(text, "Error Trace:"), strings.HasPrefix(text, "panic:"):
		f.in = true
	case strings.HasPrefix(text, "--- FAIL"):
		f.in = false
	case strings.HasPrefix(line, "==="), strings.HasPrefix(text, "--- "), strings.HasPrefix(text, "goroutine "), !strings.HasPrefix(line, " "):
		f.in = false
		return
	case !f.in:
		return
	}
	if len(f.lines) < failureLines {
		f.lines = append(f.lines, line)
	}
}

func (f *failures) String() string { return strings.Join(f.lines, "\n") }
