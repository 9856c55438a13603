package vmprobes

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/cstring"
	"github.com/vmprobes/vmprobes/linux"
)

// An Addr is a guest virtual address. It is the same type as uint64, as which
// registers, symbols, and pointers in the guest's structures come: no conversion is
// needed.
type Addr = uint64

// ParseProbe returns a Probe at a place as [Probe.String] writes it after the domain: a
// symbol or an address (0x…), and an offset in bytes, decimal or hexadecimal. Examples
// are "do_sys_openat2", "do_sys_openat2+0x4" and "0xffffffff8134a350". The caller adds
// the handlers.
func ParseProbe(place string) (*Probe, error) {
	name, offset, signed := strings.Cut(place, "+")
	p := &Probe{Symbol: name}
	var err error
	if signed {
		if p.Offset, err = parseNumber(offset); err != nil {
			return nil, &Error{Op: "parse", Probe: place, Err: fmt.Errorf("offset %q: want a number of bytes, such as 4 or 0x4", offset)}
		}
	}
	if strings.HasPrefix(name, "0x") {
		addr, err := parseNumber(name)
		if err != nil {
			return nil, &Error{Op: "parse", Probe: place, Err: fmt.Errorf("address %q: want at most 16 hexadecimal digits after 0x", name)}
		}
		p.Symbol, p.Addr = "", addr
	}
	if err := p.checkPlace(); err != nil {
		return nil, &Error{Op: "parse", Probe: place, Err: err}
	}
	return p, nil
}

// parseNumber parses a decimal number, or a hexadecimal one after 0x.
func parseNumber(s string) (uint64, error) {
	if digits, ok := strings.CutPrefix(s, "0x"); ok {
		return strconv.ParseUint(digits, 16, 64)
	}
	return strconv.ParseUint(s, 10, 64)
}

// A DomainID identifies a running domain (domid_t).
type DomainID uint16

// A Probe is a breakpoint at Symbol+Offset, or at Addr+Offset, with its
// handlers. The fields must not be changed while it is registered.
type Probe struct {
	// DomainID or DomainName selects the guest for the package-level functions;
	// setting both is an error. A Session ignores them.
	DomainID   DomainID
	DomainName string

	// Name is the caller's own word for the probe, to tell its hits from others'. It
	// is part of what a Hit marshals to; nothing depends on it.
	Name string

	// Symbol or Addr selects the instruction; setting both is an error. Offset
	// is added to either and must lead to the start of an instruction.
	Symbol string
	Addr   Addr
	Offset uint64

	// Cookie is the caller's own; nothing depends on it.
	Cookie any

	// Filter, if it isn't nil, says which executions are hits.
	Filter *Filter
	// Once is Limit with one hit.
	Once  bool
	Limit Limit

	// Pre runs before the instruction and Post after it. Either may be nil.
	Pre  PreHandler
	Post PostHandler

	ret *ReturnProbe // nil unless it is one's

	mu       sync.Mutex
	session  *Session // nil unless registered
	private  bool     // session belongs to the package-level functions
	engine   *breakpoint.Probe
	function *linux.Function // how the function is called, once that is known
	addr     Addr
	restored bool
	disabled atomic.Bool
	past     Stats  // of earlier registrations
	ended    *guard // of the last registration with Register
}

// Stats counts what happened at a probe.
type Stats struct {
	Hits   uint64 // executions that the handlers saw
	Missed uint64 // executions that they did not: no Loop ran, or another probe's handler ended the hit

	// Filtered are executions that Probe.Filter said are no hits, Skipped those for which another
	// probe's handler had the function return before this one's could run (Regs.Return).
	// While a probe is registered, enabled and not limited, executions are the sum of these four.
	Filtered, Skipped uint64

	// The rest is of a ReturnProbe, whose Hits are the calls that Entry saw, and whose Missed are
	// also those beyond MaxActive, or whose return could not be noticed. Hits is the sum of
	// Ignored, Returned, Abandoned, Dropped and Active.
	Ignored   uint64 // calls that Entry had ignored
	Returned  uint64
	Abandoned uint64
	Dropped   uint64 // under way when the probe was unregistered or disabled
	Active    int    // calls that are under way now
	// Foreign counts stops where returns are noticed that were the return of another function,
	// or of a call that isn't followed.
	Foreign uint64
	Follow  Follow // how the last call is followed, FollowAuto if there was none
}

// Stats returns the probe's counters, over all its registrations.
func (p *Probe) Stats() Stats {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.stats()
}

func (p *Probe) stats() Stats {
	s := p.past
	if p.engine != nil {
		s.Hits += p.engine.Hits()
		s.Missed += p.engine.Missed()
		s.Filtered += p.engine.Filtered()
		s.Skipped += p.engine.Skipped()
		if p.ret != nil {
			c := p.session.eng.Counts(p.engine)
			s.Ignored += c.Ignored
			s.Returned += c.Returned
			s.Abandoned += c.Abandoned
			s.Dropped += c.Dropped
			s.Foreign += c.Foreign
			s.Active, s.Follow = c.Active, Follow(c.Follow)
		}
	}
	return s
}

// Enable lets the handlers run again after Disable (enable_vmprobe). It may be
// called at any time from any goroutine.
func (p *Probe) Enable() { p.setEnabled(true) }

// Disable stops the handlers from running (disable_vmprobe). The breakpoint
// stays in the guest; its hits aren't counted. Calls that a ReturnProbe follows are dropped.
func (p *Probe) Disable() { p.setEnabled(false) }

func (p *Probe) setEnabled(on bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.disabled.Store(!on)
	if p.engine != nil {
		p.engine.SetEnabled(on)
	}
}

// Fail ends the Loop that a handler of p runs in with an error, which Loop and Run
// return: the handler returns what Fail returns. That is Stop, or Continue if err is
// nil, so that a handler may end in
//
//	_, err := fmt.Println(name)
//	return p.Fail(err)
func (p *Probe) Fail(err error) Action {
	if err == nil {
		return Continue
	}
	if s, serr := p.attached(); serr == nil {
		bad := err // so that nothing is allocated for nil
		s.bad.Store(&bad)
	}
	return Stop
}

// Flags returns the probe's state.
func (p *Probe) Flags() Flags {
	p.mu.Lock()
	defer p.mu.Unlock()
	var f Flags
	if p.disabled.Load() {
		f |= FlagDisabled
	}
	if p.session != nil {
		f |= FlagPrepared
		if p.engine != nil && p.engine.Armed() {
			f |= FlagArmed
		}
		if p.engine != nil && p.engine.Over() != breakpoint.NotOver {
			f |= FlagLimited
		}
	}
	if p.restored {
		f |= FlagRestored
	}
	return f
}

// Address returns the address of the probed instruction, or 0 before Register
// has found it.
func (p *Probe) Address() Addr {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.addr
}

// location is the place as the caller gave it.
func (p *Probe) location() string {
	s := p.Symbol
	if s == "" {
		s = hex(p.Addr)
	}
	if p.Offset != 0 {
		s += fmt.Sprintf("+%#x", p.Offset)
	}
	return s
}

func (p *Probe) domain() string {
	if p.DomainName == "" && p.DomainID != 0 {
		return strconv.Itoa(int(p.DomainID))
	}
	return p.DomainName
}

// String returns the probe's domain and place, as in "a3guest:sys_open+0x4".
func (p *Probe) String() string {
	if p == nil {
		return "<nil>"
	}
	s := p.location()
	if d := p.domain(); d != "" {
		s = d + ":" + s
	}
	return s
}

// LogValue implements slog.LogValuer.
func (p *Probe) LogValue() slog.Value { return slog.StringValue(p.String()) }

// Dump writes the probe's fields, one a line, as dump_vmprobe did.
func (p *Probe) Dump(w io.Writer) error {
	if p == nil {
		_, err := fmt.Fprintln(w, "Dumping vmprobe: NULL")
		return err
	}
	p.mu.Lock()
	addr, id, name := p.addr, p.DomainID, p.DomainName
	s := p.session
	if s != nil {
		id, name = s.domain.ID, s.domain.Name
	}
	p.mu.Unlock()
	if addr == 0 {
		addr = p.Addr
	}
	var b bytes.Buffer
	fmt.Fprintf(&b, "Dumping vmprobe:\n")
	fmt.Fprintf(&b, " -- Domain Name: %s\n", name)
	if id != 0 || s == nil { // a guest of QEMU's has none
		fmt.Fprintf(&b, " -- Domain ID: %d\n", id)
	}
	fmt.Fprintf(&b, " -- Symbol Name: %s\n", p.Symbol)
	fmt.Fprintf(&b, " -- Address: %016x\n", addr)
	fmt.Fprintf(&b, " -- Offset: %x\n", p.Offset)
	fmt.Fprintf(&b, " -- Flags: %s\n", p.Flags())
	_, err := w.Write(b.Bytes())
	return err
}

// attached returns the session, for a memory access.
func (p *Probe) attached() (*Session, error) {
	if p == nil {
		return nil, ErrNilProbe
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.session == nil {
		return nil, ErrNotRegistered
	}
	return p.session, nil
}

// cr3Of returns the page tables of the vCPU that hit p, while a handler of p runs
// in s, and else 0.
func (s *Session) cr3Of(p *Probe) uint64 {
	if s.handling.Load() == p {
		return s.cr3.Load()
	}
	return 0
}

// ReadMemory fills b from the guest's memory (read_vmprobe). In a handler, addr is taken
// in the address space of the vCPU that hit, so pointers of the guest's processes work;
// elsewhere it is a kernel address. n < len(b) if and only if err is not nil: n bytes
// are before the first page that can't be read. Breakpoints of this Session don't show.
func (p *Probe) ReadMemory(addr Addr, b []byte) (n int, err error) {
	s, err := p.attached()
	if err != nil {
		return 0, &Error{Op: "read", Probe: p.String(), Err: err}
	}
	return s.read(s.cr3Of(p), addr, b)
}

// WriteMemory writes b to the guest (write_vmprobe), whatever the page's
// protection, with addresses and n as in ReadMemory.
func (p *Probe) WriteMemory(addr Addr, b []byte) (n int, err error) {
	s, err := p.attached()
	if err != nil {
		return 0, &Error{Op: "write", Probe: p.String(), Err: err}
	}
	return s.write(s.cr3Of(p), addr, b)
}

// ReadUint64 reads a little-endian word of 64 bits.
func (p *Probe) ReadUint64(addr Addr) (uint64, error) {
	var b [8]byte
	_, err := p.ReadMemory(addr, b[:])
	return le64(b[:]), err
}

// ReadUint32 reads a little-endian word of 32 bits.
func (p *Probe) ReadUint32(addr Addr) (uint32, error) {
	var b [4]byte
	_, err := p.ReadMemory(addr, b[:])
	return binary.LittleEndian.Uint32(b[:]), err
}

// ReadString reads a NUL-terminated string, with addresses as in ReadMemory. If none of
// the first limit bytes is a NUL, it returns these and an error that wraps
// ErrNoTerminator; if not all of it can be read, what is before that, and why. The bytes
// are the guest's: quote them before they go to a terminal.
func (p *Probe) ReadString(addr Addr, limit int) (string, error) {
	str, err := cstring.Read(p.ReadMemory, addr, limit)
	if errors.Is(err, ErrNoTerminator) {
		err = &Error{Op: "read", Probe: p.String(), Err: err}
	}
	return str, err
}

func le64(b []byte) uint64 { return binary.LittleEndian.Uint64(b) }
