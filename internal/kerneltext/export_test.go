package kerneltext

import "github.com/vmprobes/vmprobes/linux"

// Text returns the text of the file: where it was linked, and its bytes.
func (f *File) Text() (addr uint64, b []byte) { return f.text.start, f.at(f.text) }

// CompareText is Compare with memory that was read already.
func (f *File) CompareText(slide uint64, mem []byte, own linux.Int3s) *Report {
	return f.compare(slide, mem, own)
}

// Boundaries calls do with the instructions of the file's functions, and whether the kernel
// changes what is there.
func (f *File) Boundaries(do func(addr uint64, insn []byte, changes bool)) {
	c := &comparison{f: f, file: f.at(f.text), mem: f.at(f.text), sites: f.changes()}
	for addr := f.text.start; addr < f.text.end; {
		if i, ok := c.function(addr); !ok || i > 0 || c.fn.end <= addr {
			addr++
			continue
		}
		for i := range c.starts {
			at := c.fn.start + uint64(c.starts[i])
			do(at, c.at(c.file, at)[:c.end(i)-at], len(sitesAt(c.sites, at)) > 0)
		}
		addr = c.fn.end
	}
}

// Relocated reports whether an instruction is the file's, in a kernel that has moved.
var Relocated = relocated
