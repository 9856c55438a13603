package qemu

import (
	"bytes"
	"encoding/binary"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/vmprobes/vmprobes/internal/x86"
)

type register struct {
	name string
	size int
}

// registers has the registers that are used here, with their names in the target
// descriptions of qemu-system-x86_64 and their sizes in bytes.
var registers = [numRegs]register{
	rAX: {"rax", 8}, rBX: {"rbx", 8}, rCX: {"rcx", 8}, rDX: {"rdx", 8},
	rSI: {"rsi", 8}, rDI: {"rdi", 8}, rBP: {"rbp", 8}, rSP: {"rsp", 8},
	r8: {"r8", 8}, r9: {"r9", 8}, r10: {"r10", 8}, r11: {"r11", 8},
	r12: {"r12", 8}, r13: {"r13", 8}, r14: {"r14", 8}, r15: {"r15", 8},
	rIP: {"rip", 8}, rFlags: {"eflags", 4}, rCS: {"cs", 4}, rSS: {"ss", 4},
	rFSBase: {"fs_base", 8}, rGSBase: {"gs_base", 8}, rKernelGSBase: {"k_gs_base", 8},
	rCR0: {"cr0", 8}, rCR2: {"cr2", 8}, rCR3: {"cr3", 8}, rCR4: {"cr4", 8}, rEFER: {"efer", 8},
}

// narrow has the names that qemu-system-i386 has for them, of 4 bytes each
// (gdb-xml/i386-32bit.xml). It has the others by the same name, or lacks them.
var narrow = map[string]int{
	"eax": rAX, "ebx": rBX, "ecx": rCX, "edx": rDX, "esi": rSI, "edi": rDI, "ebp": rBP, "esp": rSP, "eip": rIP,
}

// narrowNeeded are those that its description must have.
var narrowNeeded = []int{rIP, rCS, rCR0, rCR3, rCR4}

// Indexes of registers.
const (
	rAX = iota
	rBX
	rCX
	rDX
	rSI
	rDI
	rBP
	rSP
	r8
	r9
	r10
	r11
	r12
	r13
	r14
	r15
	rIP
	rFlags
	rCS
	rSS
	rFSBase
	rGSBase
	rKernelGSBase
	rCR0
	rCR2
	rCR3
	rCR4
	rEFER
	numRegs
)

// layout says where registers are in a "g" packet, and their numbers.
type layout struct {
	reg  [numRegs]struct{ offset, number, size int } // offset is -1 if there is none
	bits int                                         // of the CPU
}

// Limits of a target description.
const (
	maxTargetXML = 1 << 20
	maxIncludes  = 64
	maxRegisters = 4096
	maxRegFile   = maxPacket / 2
)

var errNotX86 = fmt.Errorf("the guest's CPU isn't an x86 one, or this isn't qemu-system-x86_64 or qemu-system-i386: %w", errors.ErrUnsupported)

// readLayout reads a target description (GDB manual, appendix G), with what it
// includes, through read, which returns one document.
func readLayout(read func(annex string) ([]byte, error)) (*layout, error) {
	l := new(layout)
	for i := range l.reg {
		l.reg[i].offset = -1
	}
	p := layoutParser{layout: l, read: read, seen: map[string]bool{}}
	if err := p.document("target.xml"); err != nil {
		return nil, fmt.Errorf("target description: %w", err)
	}
	for i, r := range registers {
		if l.reg[i].offset < 0 && (l.bits != 32 || slices.Contains(narrowNeeded, i)) {
			return nil, fmt.Errorf("%w: its target description has no register %s", errNotX86, r.name)
		}
	}
	return l, nil
}

type layoutParser struct {
	*layout
	read           func(annex string) ([]byte, error)
	seen           map[string]bool
	offset, number int
	count          int
}

func (p *layoutParser) document(annex string) error {
	if p.seen[annex] || len(p.seen) >= maxIncludes {
		return fmt.Errorf("%w: %q is included again", errProtocol, annex)
	}
	p.seen[annex] = true
	doc, err := p.read(annex)
	if err != nil {
		return err
	}
	d := xml.NewDecoder(bytes.NewReader(doc))
	for {
		tok, err := d.Token()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fmt.Errorf("%s: %w", annex, err)
		}
		e, ok := tok.(xml.StartElement)
		if !ok {
			continue
		}
		switch e.Name.Local {
		case "include":
			if err := p.document(attribute(e, "href")); err != nil {
				return err
			}
		case "reg":
			if err := p.register(e); err != nil {
				return err
			}
		}
	}
}

func attribute(e xml.StartElement, name string) string {
	for _, a := range e.Attr {
		if a.Name.Local == name {
			return a.Value
		}
	}
	return ""
}

// decimal parses a number of at most six digits.
func decimal(s string) (int, bool) {
	if s == "" || len(s) > 6 {
		return 0, false
	}
	n := 0
	for _, c := range []byte(s) {
		if c < '0' || c > '9' {
			return 0, false
		}
		n = 10*n + int(c-'0')
	}
	return n, true
}

func (p *layoutParser) register(e xml.StartElement) error {
	name := attribute(e, "name")
	bits, ok := decimal(attribute(e, "bitsize"))
	if !ok || bits == 0 || bits%8 != 0 {
		return fmt.Errorf("%w: register %q of %q bits", errProtocol, name, attribute(e, "bitsize"))
	}
	if s := attribute(e, "regnum"); s != "" {
		if p.number, ok = decimal(s); !ok {
			return fmt.Errorf("%w: register %q with number %q", errProtocol, name, s)
		}
	}
	size := bits / 8
	if p.count++; p.count > maxRegisters || p.offset+size > maxRegFile {
		return fmt.Errorf("%w: too many registers", errProtocol)
	}
	i, old := narrow[name]
	switch {
	case name == "eax":
		p.bits = 32
	case name == "rax":
		p.bits = 64
	}
	if !old {
		i = slices.IndexFunc(registers[:], func(r register) bool { return r.name == name })
	}
	if i >= 0 {
		want := registers[i].size
		if p.bits == 32 {
			want = 4
		}
		if size != want || old != (p.bits == 32) && registers[i].name != name {
			return fmt.Errorf("%w: register %s has %d bits", errNotX86, name, bits)
		}
		p.reg[i].offset, p.reg[i].number, p.reg[i].size = p.offset, p.number, size
	}
	p.offset += size
	p.number++
	return nil
}

// regFile holds the values of registers.
type regFile [numRegs]uint64

// parse takes the data of a "g" packet.
func (l *layout) parse(f *regFile, data []byte) error {
	for i, r := range l.reg {
		if f[i] = 0; r.offset < 0 {
			continue
		}
		var b [8]byte
		from := 2 * r.offset
		to := from + 2*r.size
		if to > len(data) {
			return fmt.Errorf("%w: %d digits of registers, none for %s", errProtocol, len(data), registers[i].name)
		}
		if err := decodeHex(b[:r.size], data[from:to]); err != nil {
			return fmt.Errorf("register %s: %w", registers[i].name, err)
		}
		f[i] = binary.LittleEndian.Uint64(b[:])
	}
	return nil
}

// set returns the packet that sets register i.
func (l *layout) set(i int, v uint64) string {
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], v)
	p := fmt.Appendf(nil, "P%x=", l.reg[i].number)
	return string(appendHex(p, b[:l.reg[i].size]))
}

// value parses the value of register i, as "p" gives it.
func (l *layout) value(i int, data []byte) (uint64, error) {
	var b [8]byte
	if err := decodeHex(b[:l.reg[i].size], data); err != nil {
		return 0, fmt.Errorf("register %s: %w", registers[i].name, err)
	}
	return binary.LittleEndian.Uint64(b[:]), nil
}

// general returns the registers that a hit shows.
func (f *regFile) general() x86.Regs {
	return x86.Regs{
		R15: f[r15], R14: f[r14], R13: f[r13], R12: f[r12], BP: f[rBP], BX: f[rBX],
		R11: f[r11], R10: f[r10], R9: f[r9], R8: f[r8],
		AX: f[rAX], CX: f[rCX], DX: f[rDX], SI: f[rSI], DI: f[rDI],
		IP: f[rIP], CS: f[rCS], Flags: f[rFlags], SP: f[rSP], SS: f[rSS],
		FSBase: f[rFSBase], GSBase: f[rGSBase], CR3: f[rCR3],
	}
}

// setGeneral puts into f what a handler may change.
func (f *regFile) setGeneral(r *x86.Regs) {
	f[r15], f[r14], f[r13], f[r12], f[rBP], f[rBX] = r.R15, r.R14, r.R13, r.R12, r.BP, r.BX
	f[r11], f[r10], f[r9], f[r8] = r.R11, r.R10, r.R9, r.R8
	f[rAX], f[rCX], f[rDX], f[rSI], f[rDI] = r.AX, r.CX, r.DX, r.SI, r.DI
	f[rIP], f[rSP] = r.IP, r.SP
	f[rFlags] = r.Flags & 0xffffffff
}

// The methods of VM here want it stopped and v.mu held.

// vcpu returns the number of a thread's vCPU.
func (v *VM) vcpu(thread string) (int, error) {
	for range 2 {
		if n := slices.Index(v.threads, thread); n >= 0 {
			return n, nil
		}
		// One was plugged in.
		if err := v.readThreads(); err != nil {
			return 0, err
		}
	}
	return 0, v.broken(fmt.Errorf("%w: unknown thread %q", errProtocol, thread))
}

// choose makes g, p, P and m be about a thread.
func (v *VM) choose(thread string) error {
	if v.current == thread {
		return nil
	}
	v.current = ""
	if err := v.callOK("Hg" + thread); err != nil {
		return fmt.Errorf("choose vCPU %s: %w", thread, err)
	}
	v.current = thread
	return nil
}

// readRegs reads the registers of a thread into v.regs.
func (v *VM) readRegs(thread string) error {
	if err := v.choose(thread); err != nil {
		return err
	}
	data, err := v.call("g")
	if err != nil {
		return err
	}
	v.regsOf = ""
	if err := v.layout.parse(&v.regs, data); err != nil {
		return v.broken(err)
	}
	v.regsOf = thread
	return nil
}

// writeRegs gives a thread, whose registers are v.regs, those of r that differ: as
// many packets in one write.
func (v *VM) writeRegs(thread string, r *x86.Regs) error {
	want := v.regs
	want.setGeneral(r)
	if want == v.regs {
		return nil
	}
	if err := v.choose(thread); err != nil {
		return err
	}
	var packets []string
	for i := range want {
		if want[i] != v.regs[i] {
			packets = append(packets, v.layout.set(i, want[i]))
		}
	}
	if err := v.post(packets...); err != nil {
		return err
	}
	var errs error
	for i := range packets {
		data, err := v.receive()
		if err != nil {
			return err
		}
		if string(data) != "OK" {
			errs = errors.Join(errs, &refused{packets[i], printable(string(data))})
		}
	}
	if errs == nil {
		v.regs = want
	}
	return errs
}

// readIP returns the packet that asks for the current thread's RIP. Under KVM "p"
// doesn't fetch the registers from the kernel (QEMU's handle_get_reg), "g" does.
func (v *VM) readIP() string {
	if v.info.KVM {
		return "g"
	}
	return fmt.Sprintf("p%x", v.layout.reg[rIP].number)
}

// receiveIP takes the answer.
func (v *VM) receiveIP() (uint64, error) {
	data, err := v.receive()
	if err != nil {
		return 0, err
	}
	var ip uint64
	if v.info.KVM {
		var f regFile
		err = v.layout.parse(&f, data)
		ip = f[rIP]
	} else {
		ip, err = v.layout.value(rIP, data)
	}
	if err != nil {
		return 0, v.broken(err)
	}
	return ip, nil
}

// A stopReply is why the VM stopped: "T05thread:p01.02;" and the like.
type stopReply struct {
	signal int
	thread string // "" if it isn't said
	exited bool   // "W" or "X": QEMU ends
}

// Signals that QEMU's stub uses (gdbstub/system.c, gdb_vm_state_change).
const (
	sigInt  = 2  // paused: by us, or by another through the monitor
	sigQuit = 3  // the guest has shut down
	sigTrap = 5  // breakpoint or step
	sigAbrt = 6  // internal error, or the guest panicked
	sigAlrm = 14 // the watchdog fired
	sigIO   = 23 // a disk failed
	sigXCPU = 24 // a migration is about to finish
)

// maxThreadID bounds the length of a thread id, "p" pid "." tid.
const maxThreadID = 35

func parseStop(data []byte) (r stopReply, err error) {
	bad := func() (stopReply, error) {
		return stopReply{}, fmt.Errorf("%w: stop reply %.80q", errProtocol, data)
	}
	if len(data) < 3 {
		return bad()
	}
	hi, lo := unhex(data[1]), unhex(data[2])
	if hi < 0 || lo < 0 {
		return bad()
	}
	r.signal = hi<<4 | lo
	switch data[0] {
	case 'W', 'X':
		r.exited = true
		return r, nil
	case 'S':
		return r, nil
	case 'T':
	default:
		return bad()
	}
	for pair := range strings.SplitSeq(string(data[3:]), ";") {
		key, value, _ := strings.Cut(pair, ":")
		if key == "thread" {
			if !validThread(value) {
				return bad()
			}
			r.thread = value
		}
	}
	return r, nil
}

// validThread reports whether id is well-formed; it will be sent back as it is.
func validThread(id string) bool {
	if id == "" || len(id) > maxThreadID {
		return false
	}
	pid, tid, multi := strings.Cut(strings.TrimPrefix(id, "p"), ".")
	if multi != (id[0] == 'p') {
		return false
	}
	return isHex(pid) && (!multi || isHex(tid))
}

func isHex(s string) bool {
	for i := range len(s) {
		if unhex(s[i]) < 0 {
			return false
		}
	}
	return s != ""
}
