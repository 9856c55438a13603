package image

import "fmt"

// A file that ends early, because a disk was full or a connection was lost, is read as
// far as it goes: the kernel and its lists are usually in it. What it should have had is
// absent, with ErrTruncated, and never zero.

// maxWarnings bounds the warnings of an image.
const maxWarnings = 16

// warnf notes what the user of an image should know.
func (m *Image) warnf(format string, args ...any) {
	if len(m.warnings) < maxWarnings {
		m.warnings = append(m.warnings, fmt.Sprintf(format, args...))
	}
}

// Warnings returns what is wrong with the file, in words, though it can be read: that it
// ends early, for example, and how much is missing. Programs should show them.
func (m *Image) Warnings() []string { return append([]string(nil), m.warnings...) }

// cutAt returns the part of an extent that the file has, in whole pages of memory if
// anything is missing, and notes the rest.
func (m *Image) cutAt(e extent) extent {
	if e.off <= m.length && e.size <= m.length-e.off {
		return e
	}
	var have uint64
	if e.off < m.length {
		have = m.length - e.off
	}
	end := (e.addr + have) &^ (1<<pageShift - 1)
	rest := e
	if end <= e.addr {
		e.size = 0
	} else {
		rest.addr, rest.size = end, e.end()-end
		e.size = end - e.addr
	}
	m.cut = append(m.cut, rest)
	return e
}

// warnCut tells of what is missing.
func (m *Image) warnCut() {
	if len(m.cut) == 0 {
		return
	}
	m.cut = resolve(m.cut)
	var n uint64
	for _, e := range m.cut {
		n += e.size
	}
	m.warnf("the file is cut short: %#x bytes of memory are missing, the first at %#x", n, m.cut[0].addr)
}
