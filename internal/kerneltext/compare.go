package kerneltext

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/vmprobes/vmprobes/internal/x86"
	"github.com/vmprobes/vmprobes/linux"
)

// A Break is an int3 that the kernel's file doesn't have, on an instruction that is known.
type Break struct {
	Addr  uint64
	Insn  []byte // as the guest had it
	Where string // symbol and offset
}

// A Place is an int3 of which it can't be told whose it is, or what it is on.
type Place struct {
	Addr  uint64
	Where string
	Why   string
}

// A Report is what differs in a kernel's text from its file.
type Report struct {
	Text      uint64 // bytes compared
	Unread    uint64 // bytes that can't be read
	Breaks    []Break
	Unclear   []Place
	Own       []uint64 // int3s that are the guest's own
	Copies    []Place  // what somebody has written to dead code
	More      int      // int3s and copies that were found and aren't listed
	Rewriting error    // why it isn't known what the kernel is rewriting just now, if it is
}

// maxPlaces bounds the lists of a Report.
const maxPlaces = 4096

// Compare compares the text of a running kernel with its file. Nothing is changed. The
// guest should stand still.
func Compare(ctx context.Context, k *linux.Kernel, f *File) (*Report, error) {
	switch id := k.BuildID(); {
	case k == nil:
		return nil, linux.ErrNoKernel
	case id == "":
		return nil, fmt.Errorf("%w: the guest's kernel has no build id", ErrOtherKernel)
	case id != f.buildID:
		return nil, fmt.Errorf("%w: its build id is %s, and the guest's %s", ErrOtherKernel, f.buildID, id)
	}
	here, err := k.Symbols().Lookup("_stext")
	if err != nil {
		return nil, fmt.Errorf("where the kernel's text is: %w", err)
	}
	own, err := k.Int3s()
	if err != nil {
		return nil, fmt.Errorf("tell the guest's own breakpoints from others: %w", err)
	}
	mem := make([]byte, f.text.end-f.text.start)
	unread := make(map[uint64]bool)
	const page = 4096
	for off := uint64(0); off < uint64(len(mem)); {
		if off%(1<<20) == 0 && ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		n := min(page-(here.Addr+off)%page, uint64(len(mem))-off)
		if err := k.Read(here.Addr+off, mem[off:off+n]); err != nil {
			unread[(here.Addr+off)/page] = true
			copy(mem[off:off+n], f.at(span{f.text.start + off, f.text.start + off + n}))
		}
		off += n
	}
	if !f.sameKernel(mem) {
		return nil, fmt.Errorf("%w: its code isn't the guest's, though the build id is", ErrOtherKernel)
	}
	r := f.compare(here.Addr-f.text.start, mem, own)
	r.Unread = uint64(len(unread)) * page
	return r, nil
}

// sameKernel reports whether most of the text is the file's, by every 16th byte of it.
func (f *File) sameKernel(mem []byte) bool {
	same, all := 0, 0
	file := f.at(f.text)
	for i := 0; i < len(file); i += 16 {
		if all++; mem[i] == file[i] {
			same++
		}
	}
	return same > all/4*3
}

// comparison is a comparison of text: all addresses are the file's.
type comparison struct {
	f     *File
	slide uint64
	file  []byte
	mem   []byte
	sites []site
	own   linux.Int3s
	r     *Report

	fn     span    // the function that was decoded last
	starts []int32 // where its instructions begin, by offset in it
}

// compare compares the text with mem, which is slide higher in the guest.
func (f *File) compare(slide uint64, mem []byte, own linux.Int3s) *Report {
	c := &comparison{f: f, slide: slide, file: f.at(f.text), mem: mem, sites: f.changes(), own: own,
		r: &Report{Text: uint64(len(mem)), Rewriting: own.Rewriting}}
	for off := 0; off < len(c.file); {
		n := bytes.IndexByte(c.mem[off:], int3)
		if n < 0 {
			break
		}
		if off += n; c.file[off] != int3 {
			c.look(f.text.start + uint64(off))
		}
		off++
	}
	c.copies()
	return c.r
}

const int3 = 0xcc

// look finds out what an int3 at addr is, where the file has something else.
func (c *comparison) look(addr uint64) {
	if _, own := slices.BinarySearch(c.own.Addrs, addr+c.slide); own {
		if len(c.r.Own) == maxPlaces {
			c.r.More++
			return
		}
		c.r.Own = append(c.r.Own, addr+c.slide)
		return
	}
	var s site
	sites := sitesAt(c.sites, addr)
	in := len(sites) > 0
	if in {
		if slices.ContainsFunc(sites, func(s site) bool { _, padding := c.within(s, addr); return padding }) {
			return
		}
		s = sites[0]
	}
	i, ok := c.function(addr)
	if !ok {
		c.unclear(addr, "no symbol of the file covers it, or the code before it can't be decoded")
		return
	}
	if int64(c.starts[i]) != int64(addr-c.fn.start) {
		// Inside an instruction of the file's, and a part of it unless the guest has
		// another one there.
		start := c.fn.start + uint64(c.starts[i])
		switch {
		case !in && !c.same(span{start, c.end(i)}):
			c.unclear(addr, "inside an instruction of the file's, which is another one in the guest")
		case slices.ContainsFunc(sites, func(s site) bool { begins, _ := c.within(s, addr); return begins }):
			c.unclear(addr, "in code that the kernel has changed")
		}
		return
	}
	insn := span{addr, c.end(i)}
	first := c.at(c.file, addr)[0]
	switch {
	case in && s.start == addr && c.lookSite(s):
	case in && s.kind >= jumpLabel:
		c.unclear(addr, "the kernel rewrites this code, and what it was isn't known")
	case in && (insn.end-addr < 3 || first == 0xf0), in && !c.sameBehind(insn):
		c.unclear(addr, "in code that the kernel has changed while it booted")
	case !c.sameBehind(insn):
		c.unclear(addr, "the instruction there is another one than the file's")
	case !in && !c.neighbours(i):
		c.unclear(addr, "the code around it differs from the file's")
	default:
		c.found(insn, first)
	}
}

// lookSite finds out what was at a site that the kernel changes. It reports whether that
// is known, or what isn't was said.
func (c *comparison) lookSite(s site) bool {
	rest := c.at(c.mem, s.start)[1 : s.end-s.start]
	distance := func() uint64 { return s.end + uint64(int64(int32(binary.LittleEndian.Uint32(rest)))) }
	switch s.kind {
	case returns:
		if len(rest) == 4 && bytes.Equal(rest, []byte{int3, int3, int3, int3}) {
			return c.found(s.span, 0xc3)
		}
		return false
	case retpoline:
		switch {
		case len(rest) > 1 && indirect(rest[0]):
			return c.found(s.span, 0xff)
		case len(rest) > 2 && rest[0] == 0xff && indirect(rest[1]):
			return c.found(s.span, 0x41)
		}
		return false
	case boot:
		return false
	}
	if c.own.Rewriting != nil {
		c.unclear(s.start, "the kernel may be rewriting it")
		return true
	}
	switch {
	case len(rest) == 4 && bytes.Equal(rest, []byte{0x1f, 0x44, 0, 0}): // the NOP of 5 bytes
		return c.found(s.span, 0x0f)
	case s.kind == jumpLabel && len(rest) == 4 && distance() == s.target:
		return c.found(s.span, 0xe9)
	case s.kind == jumpLabel && len(rest) == 1 && rest[0] == 0x90:
		return byte(s.target-s.end) != 0x90 && c.found(s.span, 0x66)
	case s.kind == jumpLabel && len(rest) == 1 && s.end+uint64(int64(int8(rest[0]))) == s.target:
		return c.found(s.span, 0xeb)
	case s.kind == ftrace && len(rest) == 4 && c.tracer(distance()):
		return c.found(s.span, 0xe8)
	case s.kind == staticCall && len(rest) == 4:
		// A call stays one.
		op := c.at(c.file, s.start)[0]
		sym, off, ok := c.f.syms.Find(distance())
		return (op == 0xe8 || op == 0xe9) && ok && off == 0 && sym.Addr != 0 && c.found(s.span, op)
	}
	return false
}

// indirect reports whether b is the ModRM byte of CALL or JMP by a register (SDM 2A, FF /2
// and FF /4).
func indirect(b byte) bool { return b&0xf8 == 0xd0 || b&0xf8 == 0xe0 }

// tracer reports whether ftrace's entries call what is at addr.
func (c *comparison) tracer(addr uint64) bool {
	for _, name := range []string{"ftrace_caller", "ftrace_regs_caller"} {
		if s, err := c.f.syms.Lookup(name); err == nil && s.Addr == addr {
			return true
		}
	}
	return false
}

// found adds a breakpoint on the first instruction of a span, which began with first. It
// reports whether there can be one.
func (c *comparison) found(at span, first byte) bool {
	b := bytes.Clone(c.at(c.mem, at.start)[:at.end-at.start])
	b[0] = first
	in, err := x86.Decode(b)
	switch {
	case err != nil || in.IsInt3():
		c.unclear(at.start, "what it is on can't be decoded")
	case len(c.r.Breaks) == maxPlaces:
		c.r.More++
	default:
		c.r.Breaks = append(c.r.Breaks, Break{at.start + c.slide, b[:in.Len], c.where(at.start)})
	}
	return true
}

func (c *comparison) unclear(addr uint64, why string) {
	if len(c.r.Unclear) == maxPlaces {
		c.r.More++
		return
	}
	c.r.Unclear = append(c.r.Unclear, Place{addr + c.slide, c.where(addr), why})
}

func (c *comparison) where(addr uint64) string {
	if sym, off, ok := c.f.syms.Find(addr); ok {
		return fmt.Sprintf("%s+%#x", sym.Name, off)
	}
	return ""
}

// at returns what b, the text in the file or in memory, has from addr on.
func (c *comparison) at(b []byte, addr uint64) []byte { return b[addr-c.f.text.start:] }

// within looks at the int3 at addr in code that the kernel changes, as the guest has it. It
// reports whether an instruction begins there, and whether the int3 is what the kernel puts
// behind one that leaves, or a part of an instruction.
func (c *comparison) within(s site, addr uint64) (begins, padding bool) {
	// A breakpoint may hide the first of them.
	left := s.kind == returns && addr > s.start && c.at(c.mem, s.start)[0] == int3
	for at := s.start; at <= addr; {
		in, err := x86.Decode(c.at(c.mem, at))
		if err != nil {
			return false, false
		}
		if at == addr {
			return true, left
		}
		left = in.IsInt3() && left || leaves(in.Bytes())
		at += uint64(in.Len)
	}
	return false, true
}

// leaves reports whether int3 behind an instruction only stop speculation: behind
// returns and jumps, and calls over what is behind them, which fill the return stack
// buffer (SDM 2A and 2B: RET, JMP, CALL).
func leaves(b []byte) bool {
	for len(b) > 1 && (bytes.IndexByte([]byte{0x2e, 0x3e, 0x66, 0xf2, 0xf3}, b[0]) >= 0 || b[0]&0xf0 == 0x40) {
		b = b[1:]
	}
	switch b[0] {
	case 0xc2, 0xc3, 0xe9, 0xeb:
		return true
	case 0xe8:
		return len(b) == 5 && b[1] > 0 && b[1] <= 16 && b[2]|b[3]|b[4] == 0
	case 0xff:
		return len(b) > 1 && b[1]>>3&7 == 4
	}
	return false
}

// maxFunction bounds what is decoded at once. The longest function of Debian's 6.12,
// do_jit, has 14,656 bytes.
const maxFunction = 1 << 20

// function decodes the function of the file's that addr is in, and returns the number of
// the instruction.
func (c *comparison) function(addr uint64) (i int, ok bool) {
	if !c.fn.has(addr) {
		c.decode(addr)
	}
	if !c.fn.has(addr) {
		return 0, false
	}
	i, found := slices.BinarySearch(c.starts, int32(addr-c.fn.start))
	if !found {
		i--
	}
	return i, i >= 0
}

func (c *comparison) decode(addr uint64) {
	c.fn, c.starts = span{}, c.starts[:0]
	sym, off, ok := c.f.syms.Find(addr)
	if !ok || off > maxFunction || !c.f.text.has(sym.Addr) {
		return
	}
	end, ok := c.f.syms.FuncEnd(addr)
	if !ok || end <= addr {
		end = addr + 1
	}
	end = min(end, sym.Addr+maxFunction+x86.MaxLen, c.f.text.end)
	at := sym.Addr
	for at < end {
		n, err := x86.UnitLen(c.at(c.file, at))
		if err != nil || n < 1 {
			break
		}
		c.starts = append(c.starts, int32(at-sym.Addr))
		at += uint64(n)
	}
	c.fn = span{sym.Addr, min(at, c.f.text.end)} // the last instruction may go on behind a wrong end
}

// end returns where instruction i of the function ends.
func (c *comparison) end(i int) uint64 {
	if i+1 < len(c.starts) {
		return c.fn.start + uint64(c.starts[i+1])
	}
	return c.fn.end
}

// neighbours reports whether the instructions around number i are the file's. Another
// breakpoint, and what the kernel changes, may be there.
func (c *comparison) neighbours(i int) bool {
	all := 0
	for _, n := range []int{i - 1, i + 1} {
		if n < 0 || n >= len(c.starts) {
			continue
		}
		all++
		insn := span{c.fn.start + uint64(c.starts[n]), c.end(n)}
		if c.same(insn) {
			continue
		}
		if len(sitesAt(c.sites, insn.start)) > 0 {
			continue
		}
		if insn.end-insn.start < 2 || c.at(c.mem, insn.start)[0] != int3 || !c.sameBehind(insn) {
			return false
		}
	}
	return all > 0 || c.end(i)-c.fn.start-uint64(c.starts[i]) > 1
}

// same reports whether an instruction is the file's.
func (c *comparison) same(insn span) bool {
	n := insn.end - insn.start
	return relocated(c.at(c.file, insn.start)[:n], c.at(c.mem, insn.start)[:n], c.slide)
}

// sameBehind reports whether an instruction is the file's but for its first byte.
func (c *comparison) sameBehind(insn span) bool {
	n := insn.end - insn.start
	return relocated(c.at(c.file, insn.start)[1:n], c.at(c.mem, insn.start)[1:n], c.slide)
}

// relocated reports whether mem are the bytes of an instruction of the file's in a kernel
// that has moved by slide: addresses in them, of which an instruction has two at most (a
// displacement and an immediate), may be as much higher, or, if one is a per-CPU variable's
// distance, lower (arch/x86/boot/compressed/misc.c, handle_relocations).
func relocated(file, mem []byte, slide uint64) bool { return moved(file, mem, slide, 2) }

// moved is relocated for up to so many addresses.
func moved(file, mem []byte, slide uint64, addresses int) bool {
	le := binary.LittleEndian
	for ; !bytes.Equal(file, mem); file, mem = file[1:], mem[1:] {
		if addresses == 0 || len(file) < 4 {
			return false
		}
		if d := le.Uint32(mem) - le.Uint32(file); (d == uint32(slide) || d == -uint32(slide)) && moved(file[4:], mem[4:], slide, addresses-1) {
			return true
		}
		if len(file) >= 8 && le.Uint64(mem)-le.Uint64(file) == slide && moved(file[8:], mem[8:], slide, addresses-1) {
			return true
		}
		if file[0] != mem[0] {
			return false
		}
	}
	return true
}

// copies looks for code where the file has nothing but int3: tools execute copies of
// instructions there.
func (c *comparison) copies() {
	const least = 64 // of what is padding between functions, less
	for end := 0; end < len(c.file); {
		n := bytes.IndexByte(c.file[end:], int3)
		if n < 0 {
			return
		}
		run := end + n
		for end = run + 1; end < len(c.file) && c.file[end] == int3; end++ {
		}
		if end-run < least {
			continue
		}
		for at := run; at < end; at++ {
			if c.mem[at] == int3 {
				continue
			}
			n := at
			for n < end && !(c.mem[n] == int3 && (n+1 == end || c.mem[n+1] == int3)) {
				n++
			}
			addr := c.f.text.start + uint64(at)
			if len(c.r.Copies) < maxPlaces {
				c.r.Copies = append(c.r.Copies, Place{addr + c.slide, c.where(addr), fmt.Sprintf("% x", c.mem[at:min(n, at+32)])})
			} else {
				c.r.More++
			}
			at = n
		}
	}
}
