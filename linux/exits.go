package linux

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/vmprobes/vmprobes/internal/x86"
)

// Exits are where calls of a function end.
type Exits struct {
	// At are the addresses of the RETs, and of the jumps to return thunks, of the
	// function and of those in Tails, in order. At each the return address is where RSP
	// points.
	At []uint64
	// Tails are the functions, and parts of functions, that the function ends in a jump
	// to, and so on, in order of their addresses. It is among them itself if something
	// jumps to its first instruction.
	Tails []uint64
	// Open says that there are more ways out than At has, and maybe more Tails.
	Open bool
}

// Bounds of what is followed from one function.
const (
	maxExits       = 32
	maxTails       = 32
	maxWalkSteps   = 20000   // instructions
	maxWalkText    = 1 << 20 // bytes of functions
	maxWalkRegions = 128
)

// Exits returns where calls of the function that begins at fn end. It follows the branches
// of the code as it is in memory now, both ways of jump labels, which may change at any
// time, and those behind faults that the kernel expects. The error wraps
//
//   - ErrNotEntry if no function begins there;
//   - ErrNeverReturns if there is no way out;
//   - ErrNoExits if not all ways out are known, or if at one of them no breakpoint may
//     stand, and says why. What is known is returned with it.
//
// An indirect jump may be one to another function, a table of cases, or both, so it makes
// the exits unknown, as do a static call that is a jump, IRET and int3 (the guest's own
// probes, or a moment at which it rewrites the code). A call is taken to come back, unless
// nothing but padding follows it, as does UD2, which is how the kernel warns. So some exits
// may be of code that is never reached. A live patch that comes later isn't seen.
func (k *Kernel) Exits(fn uint64) (Exits, error) {
	w, err := k.walk(fn)
	if err != nil {
		return Exits{Open: k != nil}, err // what isn't known may be
	}
	e := Exits{w.exits, w.tails, w.why != nil}
	slices.Sort(e.At)
	slices.Sort(e.Tails)
	if len(e.At) == 0 && !e.Open {
		return e, w.errorf(ErrNeverReturns, errNoWayOut)
	}
	if e.Open {
		return e, w.errorf(ErrNoExits, w.why)
	}
	for _, at := range e.At {
		p, err := w.placesOf(at)
		if err == nil {
			err = k.mayStand(p, at, false)
		}
		if err != nil {
			return e, w.errorf(ErrNoExits, err)
		}
	}
	return e, nil
}

var errNoWayOut = errors.New("no way through its code leads to a RET")

// A walk follows the branches of a function.
type walk struct {
	k    *Kernel
	name string
	text kernelText

	places  []*places
	regions []function // whose code has been read
	bytes   uint64     // of them
	seen    map[uint64]uint8
	todo    []step

	exits, tails []uint64
	why          error // why not all ways out are known, or nil
	ended        bool  // a bound was reached
}

// A step is where to go on.
type step struct {
	addr uint64
	// doubt says that there is but padding behind an instruction that needn't let the
	// processor get here: a call, or one that faults.
	doubt bool
}

// walk follows the function that begins at fn to all of its ends.
func (k *Kernel) walk(fn uint64) (*walk, error) {
	if k == nil {
		return nil, ErrNoKernel
	}
	if k.bits != 64 {
		return nil, fmt.Errorf("code of a kernel of %d bits: %w", k.bits, errors.ErrUnsupported)
	}
	text := kernelText{k.syms, k.readText}
	sym, off, ok := text.syms.Find(fn)
	if !ok {
		var err error
		if text.syms, err = k.AllSymbols(); err != nil {
			return nil, fmt.Errorf("%#x: %w: the symbols of modules are not known: %w", fn, ErrNotEntry, err)
		}
		sym, off, ok = text.syms.Find(fn)
	}
	switch {
	case !ok:
		return nil, fmt.Errorf("%#x: %w: no symbol covers it", fn, ErrNotEntry)
	case off != 0:
		return nil, fmt.Errorf("%#x: %w: it is %#x bytes behind that of %q", fn, ErrNotEntry, off, sym.Name)
	}
	w := &walk{k: k, name: sym.Name, text: text, seen: make(map[uint64]uint8), todo: []step{{addr: fn}}}
	if _, err := w.placesOf(fn); errors.Is(err, ErrNotProbeable) && !errors.Is(err, ErrUnknownPlaces) {
		return nil, fmt.Errorf("%q: %w: %w", sym.Name, ErrNotEntry, err)
	}
	for len(w.todo) > 0 && !w.ended {
		s := w.todo[len(w.todo)-1]
		w.todo = w.todo[:len(w.todo)-1]
		w.follow(s)
	}
	return w, nil
}

func (w *walk) errorf(kind, why error) error {
	return fmt.Errorf("%q: %w: %w", w.name, kind, why)
}

// unknown notes that there may be ways out which aren't found.
func (w *walk) unknown(addr uint64, format string, args ...any) {
	if w.why != nil {
		return
	}
	where := ""
	if sym, off, ok := w.text.syms.Find(addr); ok {
		where = fmt.Sprintf(" (%q+%#x)", sym.Name, off)
	}
	w.why = fmt.Errorf("%#x%s: %w", addr, where, fmt.Errorf(format, args...))
}

// full ends the walk at a bound.
func (w *walk) full(addr uint64, format string, args ...any) {
	w.unknown(addr, format, args...)
	w.ended = true
}

// placesOf is [Kernel.placesOf], which for modules takes long.
func (w *walk) placesOf(addr uint64) (*places, error) {
	for _, p := range w.places {
		if p.text.has(addr) {
			return p, nil
		}
	}
	p, err := w.k.placesOf(addr)
	if err == nil {
		w.places = append(w.places, p)
	}
	return p, err
}

// regionOf returns the function that addr is in, with its code to its end.
func (w *walk) regionOf(addr uint64) (*function, error) {
	for i := range w.regions {
		if f := &w.regions[i]; addr-f.start < uint64(len(f.code)) {
			return f, nil
		}
	}
	sym, _, ok := w.text.syms.Find(addr)
	end, known := w.text.syms.FuncEnd(addr)
	if !ok || !known || end <= addr {
		return nil, errors.New("no function is known there")
	}
	size := end - sym.Addr
	if size > maxWalkText-w.bytes || len(w.regions) == maxWalkRegions {
		w.ended = true
		return nil, fmt.Errorf("more than %d KiB of code, or %d parts", maxWalkText>>10, maxWalkRegions)
	}
	f, err := w.text.functionAt(addr)
	if err != nil {
		return nil, err
	}
	if uint64(len(f.code)) != size {
		return nil, fmt.Errorf("only %d of the %d bytes of %q can be read", len(f.code), size, f.name)
	}
	w.bytes += size
	w.regions = append(w.regions, f)
	return &w.regions[len(w.regions)-1], nil
}

// follow goes from one instruction to the next until it comes to one that isn't followed
// by another, or where it has been.
func (w *walk) follow(s step) {
	var f *function
	for !w.ended {
		bit := uint8(1)
		if s.doubt {
			bit = 2
		}
		if w.seen[s.addr]&bit != 0 {
			return
		}
		if f != nil && s.addr-f.start >= uint64(len(f.code)) {
			if s.doubt {
				return
			}
			f = nil
			w.enters(s.addr)
		}
		if f == nil {
			var err error
			if f, err = w.regionOf(s.addr); err != nil {
				w.unknown(s.addr, "%w", err)
				return
			}
		}
		if len(w.seen) >= maxWalkSteps {
			w.full(s.addr, "more than %d instructions", maxWalkSteps)
			return
		}
		w.seen[s.addr] |= bit
		var ok bool
		if s, ok = w.next(f, s); !ok {
			return
		}
	}
}

// next returns where an instruction of f leads, if it goes on, and notes where else.
func (w *walk) next(f *function, s step) (step, bool) {
	pc := s.addr
	code := f.code[pc-f.start:]
	n, err := x86.UnitLen(code)
	if err != nil {
		w.unknown(pc, "%w", err)
		return s, false
	}
	on := step{addr: pc + uint64(n)}
	in, err := x86.Decode(code)
	if err == nil && in.Len != n {
		return on, true // an emulate prefix, which is UD2 to others
	}
	if err != nil {
		w.unknown(pc, "%w", err)
		return s, false
	}
	if in.IsInt3() {
		if !s.doubt || !f.padding(pc) {
			w.unknown(pc, "an int3 is there: the guest's own, or of code that only booting needed")
		}
		return s, false
	}
	b := in.Bytes()
	p, err := w.placesOf(pc)
	if err != nil {
		w.unknown(pc, "what the kernel rewrites isn't known: %w", err)
	} else if p.fresh {
		w.unknown(pc, "the kernel has not booted, and rewrites its code when it does")
	} else if p.noFaults != nil {
		w.unknown(pc, "where faults lead isn't known: %w", p.noFaults)
	} else if to, ok := branchAt(p.labels, pc); ok {
		w.jump(f, pc, to, true)
		return on, true
	} else if to, ok := branchAt(p.fixups, pc); ok {
		w.jump(f, pc, to, true)
	} else if at, ok := within(p.sites, pc, 1); ok && at.kind == staticCall && bare(b)[0] != callRel32 && (in.Branches() || leaves(b)) {
		w.unknown(pc, "a static call, which leads wherever the kernel wants, without coming back")
		return on, bare(b)[0] == 0x0f
	}
	return w.classify(f, on, pc, &in, s.doubt)
}

// padding reports whether there is nothing but int3 from addr on.
func (f *function) padding(addr uint64) bool {
	return !slices.ContainsFunc(f.code[addr-f.start:], func(c byte) bool { return c != 0xcc })
}

// classify is next of an instruction that the kernel doesn't rewrite (SDM 2A to 2D, by the
// instructions' names). on is the one behind it.
func (w *walk) classify(f *function, on step, pc uint64, in *x86.Insn, doubt bool) (step, bool) {
	b := in.Bytes()
	op := bare(b)
	to, direct := target(pc, b)
	switch {
	case op[0] == 0xc3 || op[0] == 0xc2: // RET
		w.exit(pc)
		return on, false
	case op[0] == callRel32:
		on.doubt = true
		// One to a place inside of the function is there for the return stack buffer
		// (__FILL_RETURN_BUFFER in arch/x86/include/asm/nospec-branch.h), and int3 is
		// where the processor guesses that it goes on.
		if direct && to > f.start && to-f.start < uint64(len(f.code)) {
			w.todo = append(w.todo, step{addr: to})
			behind := on.addr - f.start
			return on, behind >= uint64(len(f.code)) || f.code[behind] != 0xcc
		}
		return on, true
	case direct:
		jcc := op[0] != 0xe9 && op[0] != 0xeb
		w.jump(f, pc, to, jcc)
		return on, jcc
	case op[0] == 0xff && len(op) > 1 && op[1]>>3&7 >= 4 && op[1]>>3&7 <= 5: // JMP
		w.unknown(pc, "an indirect jump")
		return on, false
	case op[0] == 0xff && len(op) > 1 && op[1]>>3&7 >= 2 && op[1]>>3&7 <= 3: // CALL
		on.doubt = true
		return on, true
	case op[0] == 0xca || op[0] == 0xcb || op[0] == 0xcf: // RETF, IRET: also to the next instruction
		w.unknown(pc, "an IRET, or a far RET")
		return on, true
	case op[0] == 0x0f && len(op) > 1 && (op[1] == 0x07 || op[1] == 0x35): // SYSRET, SYSEXIT
		w.unknown(pc, "it leaves for user mode")
		return on, false
	case in.Branches():
		w.unknown(pc, "a branch whose way isn't known, % x", b)
		return on, true
	case leaves(b): // UD0 to UD2, HLT
		on.doubt = true
	case in.IsNop():
		on.doubt = doubt
	}
	return on, true
}

// jump notes that the instruction at pc leads to an address.
func (w *walk) jump(f *function, pc, to uint64, perhaps bool) {
	if to > f.start && to-f.start < uint64(len(f.code)) {
		w.todo = append(w.todo, step{addr: to})
		return
	}
	sym, off, ok := w.text.syms.Find(to)
	switch {
	case !ok:
		w.unknown(pc, "a jump to %#x, which is in no function", to)
	case off == 0 && returnThunk(sym.Name) && !perhaps:
		w.exit(pc)
	case off == 0 && (returnThunk(sym.Name) || leadsAnywhere(sym.Name)):
		w.unknown(pc, "a jump to %q", sym.Name)
	default:
		w.enters(to)
		w.todo = append(w.todo, step{addr: to})
	}
}

// enters notes that a way leads to an address, where a function may begin.
func (w *walk) enters(addr uint64) {
	sym, off, ok := w.text.syms.Find(addr)
	if ok && off == endbrSize { // a direct jump may leave out the ENDBR64
		addr, off = sym.Addr, 0
	}
	if !ok || off != 0 || sym.Addr != addr || slices.Contains(w.tails, addr) {
		return
	}
	if len(w.tails) == maxTails {
		w.full(addr, "it may end in more than %d others", maxTails)
		return
	}
	w.tails = append(w.tails, addr)
}

// exit notes that calls end at an address.
func (w *walk) exit(addr uint64) {
	if slices.Contains(w.exits, addr) {
		return
	}
	if len(w.exits) == maxExits {
		w.full(addr, "it has more than %d exits", maxExits)
		return
	}
	w.exits = append(w.exits, addr)
}

// returnThunk reports whether a symbol is what a RET is made a jump to
// (arch/x86/include/asm/nospec-branch.h: __x86_return_thunk, retbleed_return_thunk,
// srso_return_thunk, its_return_thunk, call_depth_return_thunk, which was called
// __x86_return_skl before 6.9, …). Since 6.16 there are second names of some, with __pi_
// before them.
func returnThunk(name string) bool {
	return strings.HasSuffix(name, "_return_thunk") || name == "__x86_return_skl"
}

// leadsAnywhere reports whether a symbol is code that jumps to an address in a register
// (arch/x86/lib/retpoline.S), or to what a static call is of.
func leadsAnywhere(name string) bool {
	name = strings.TrimPrefix(name, "__pi_")
	return strings.HasPrefix(name, "__x86_indirect_") || strings.HasPrefix(name, "__SCT__")
}
