// Package recovery undoes what a process that died has left in a guest. A [Log] tells a
// journal what is about to change; [Repair] reads it, takes the dead process' place, and
// leaves the guest as it was.
package recovery

import (
	"encoding/binary"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"sync"
	"sync/atomic"
	"unsafe"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/journal"
	"github.com/vmprobes/vmprobes/internal/x86"
	"github.com/vmprobes/vmprobes/internal/xen"
	"github.com/vmprobes/vmprobes/xenctrl"
)

// Kinds of records.
const (
	kindBreak   = iota + 1 // a breakpoint
	kindSlot               // a slot and the breakpoint whose instruction is copied to it
	kindRemoved            // the byte under a breakpoint is back
	kindCleaned            // a slot is dead code again
)

// The state of a journal begins with how it is laid out: a checksum, which is not 0, the
// number of vCPUs, and whether it was prepared before anything was done. The engine's
// follows: the marks of each vCPU, and how many are in each slot. Then the driver's.
const (
	headSize  = 16
	maxSlots  = 4096
	marksSize = int(unsafe.Sizeof(breakpoint.Marks{}))
)

// stateSize is the size of the state for a guest with so many vCPUs, of which the
// driver's part has driver bytes.
func stateSize(vcpus, driver int) int { return engineSize(vcpus) + driver }

func engineSize(vcpus int) int { return headSize + vcpus*marksSize + 4*maxSlots }

// layout tells programs apart that understand the state in different ways: those built of
// different versions of this module may.
var layout = sync.OnceValue(func() uint32 {
	return journal.Layout(append(xen.StateTypes(), reflect.TypeFor[breakpoint.Marks]())...)
})

// Log keeps the journal of one guest. It implements breakpoint.Journal.
type Log struct {
	f     *journal.File
	vcpus int

	mu     sync.Mutex
	breaks map[uint64]breakpoint.LeftBreak
	gone   []breakpoint.LeftBreak // the last ones that were removed
	slots  map[uint64]slotAt
	free   []int // indexes of counters
	next   int
	behind bool // the file wasn't told what is over
}

// slotAt is a slot and where it is counted who is in it.
type slotAt struct {
	breakpoint.LeftSlot
	index int
}

// Create makes the journal of a guest, as [journal.Create] does. The driver's part of its
// state has driver bytes.
func Create(dir, name string, guest journal.Identity, vcpus, driver int) (*Log, error) {
	f, err := journal.Create(dir, name, guest, stateSize(vcpus, driver))
	if err != nil {
		return nil, err
	}
	binary.LittleEndian.PutUint32(f.State()[4:], uint32(vcpus))
	l := newLog(f, vcpus)
	l.begin()
	return l, nil
}

// Prepare is Create for somebody who first finds out what is to be written down. If he
// dies before [Found] has begun, the journal says nothing, whatever records it has: to act
// on half of what was found would hurt the guest.
func Prepare(dir, name string, guest journal.Identity, vcpus, driver int) (*Log, error) {
	f, err := journal.Create(dir, name, guest, stateSize(vcpus, driver))
	if err != nil {
		return nil, err
	}
	binary.LittleEndian.PutUint32(f.State()[8:], 1)
	binary.LittleEndian.PutUint32(f.State()[4:], uint32(vcpus))
	return newLog(f, vcpus), nil
}

// readable is a journal, whoever owns it.
type readable interface {
	Path() string
	Owner() journal.Owner
	State() []byte
	Size() int64
	Records(fn func(journal.Record) error) error
}

// begin says that what the journal has is whole: from now on the guest may be changed.
func (l *Log) begin() { binary.LittleEndian.PutUint32(l.f.State(), layout()) }

// Begun reports whether the guest may have been changed.
func (l *Log) Begun() bool { return binary.LittleEndian.Uint32(l.f.State()) != 0 }

// laidOut returns the number of vCPUs for which the state of f is laid out, or 0 if its owner
// died before it had done that. It fails if this program doesn't understand it.
func laidOut(f readable) (vcpus int, err error) {
	b := f.State()
	if len(b) < headSize {
		return 0, fmt.Errorf("%s: %w: state of %d bytes", f.Path(), journal.ErrUnreadable, len(b))
	}
	switch sum := binary.LittleEndian.Uint32(b); sum {
	case 0:
		if f.Size() > 0 && binary.LittleEndian.Uint32(b[8:]) != 1 {
			return 0, fmt.Errorf("%s: %w: it has records and no state", f.Path(), journal.ErrUnreadable)
		}
		return 0, nil
	case layout():
	default:
		return 0, fmt.Errorf("%s: %w: a program of another version of vmprobes wrote it: %v; what is built of that version repairs the guest",
			f.Path(), journal.ErrUnreadable, f.Owner())
	}
	n := binary.LittleEndian.Uint32(b[4:])
	if n < 1 || n > xenctrl.MaxVCPUs || len(b) < stateSize(int(n), xen.StateSize(int(n))) {
		return 0, fmt.Errorf("%s: %w: state of %d bytes for %d vCPUs", f.Path(), journal.ErrUnreadable, len(b), n)
	}
	return int(n), nil
}

func newLog(f *journal.File, vcpus int) *Log {
	return &Log{f: f, vcpus: vcpus, breaks: make(map[uint64]breakpoint.LeftBreak), slots: make(map[uint64]slotAt)}
}

// DriverState returns the driver's part of the state.
func (l *Log) DriverState() []byte { return l.f.State()[engineSize(l.vcpus):] }

// Remove ends the journal: the guest is as it was.
func (l *Log) Remove() error { return l.f.Remove() }

// Close leaves the journal to whoever repairs the guest.
func (l *Log) Close() error { return l.f.Close() }

// Marks implements breakpoint.Journal.
func (l *Log) Marks(vcpu int) *breakpoint.Marks {
	return (*breakpoint.Marks)(unsafe.Pointer(&l.f.State()[headSize+vcpu*marksSize]))
}

func (l *Log) counter(i int) *atomic.Int32 {
	return (*atomic.Int32)(unsafe.Pointer(&l.f.State()[headSize+l.vcpus*marksSize+4*i]))
}

// Break implements breakpoint.Journal.
func (l *Log) Break(b breakpoint.LeftBreak, s *breakpoint.LeftSlot) (*atomic.Int32, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if s == nil {
		if err := l.append(journal.Record{Kind: kindBreak, Data: encodeBreak(nil, b)}); err != nil {
			return nil, err
		}
		l.breaks[b.Addr] = b
		return nil, nil
	}
	at := slotAt{*s, l.next}
	if n := len(l.free); n > 0 {
		at.index = l.free[n-1]
	}
	if at.index == maxSlots {
		return nil, fmt.Errorf("the journal counts in %d slots and no more", maxSlots)
	}
	busy := l.counter(at.index)
	busy.Store(0)
	if err := l.append(journal.Record{Kind: kindSlot, Data: encodeSlot(at)}); err != nil {
		return nil, err
	}
	if at.index == l.next {
		l.next++
	} else {
		l.free = l.free[:len(l.free)-1]
	}
	l.breaks[b.Addr], l.slots[s.Addr] = b, at
	return busy, nil
}

// Removed implements breakpoint.Journal.
func (l *Log) Removed(addr uint64) error { return l.over(kindRemoved, addr) }

// Cleaned implements breakpoint.Journal.
func (l *Log) Cleaned(addr uint64) error { return l.over(kindCleaned, addr) }

func (l *Log) over(kind uint8, addr uint64) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if kind == kindRemoved {
		l.remove(addr)
	} else if s, ok := l.slots[addr]; ok {
		delete(l.slots, addr)
		l.free = append(l.free, s.index)
	}
	err := l.append(journal.Record{Kind: kind, Data: binary.LittleEndian.AppendUint64(nil, addr)})
	l.behind = l.behind || err != nil
	return err
}

// maxGone is how many breakpoints are remembered that were removed. A vCPU may have hit
// one just before, and nobody have heard of it. Return probes have up to 4096, and remove
// them all at once.
const maxGone = 1 << 13

// remove says that a breakpoint isn't there any more.
func (l *Log) remove(addr uint64) {
	b, ok := l.breaks[addr]
	if !ok {
		return
	}
	delete(l.breaks, addr)
	// One of a return probe comes and goes.
	l.gone = slices.DeleteFunc(l.gone, func(b breakpoint.LeftBreak) bool { return b.Addr == addr })
	if len(l.gone) == maxGone {
		l.gone = slices.Delete(l.gone, 0, 1)
	}
	l.gone = append(l.gone, b)
}

// append appends a record, and makes the log short again when it is long, or says of what
// isn't there any more; l.mu is held. The guest may have an int3 of its own there by now.
func (l *Log) append(r journal.Record) error {
	const long = 256 << 10
	if l.behind || l.f.Size() > long && l.f.Size() > int64(400*(len(l.breaks)+len(l.slots)+len(l.gone))) {
		if err := l.f.Replace(l.all()...); err != nil {
			return err
		}
		l.behind = false
	}
	return l.f.Append(r)
}

// all says in records what there is.
func (l *Log) all() []journal.Record {
	var rs []journal.Record
	for _, b := range l.gone {
		rs = append(rs, journal.Record{Kind: kindBreak, Data: encodeBreak(nil, b)},
			journal.Record{Kind: kindRemoved, Data: binary.LittleEndian.AppendUint64(nil, b.Addr)})
	}
	for _, b := range l.breaks {
		rs = append(rs, journal.Record{Kind: kindBreak, Data: encodeBreak(nil, b)})
	}
	for _, s := range l.slots {
		rs = append(rs, journal.Record{Kind: kindSlot, Data: encodeSlot(s)}, // which brings its breakpoint along
			journal.Record{Kind: kindRemoved, Data: binary.LittleEndian.AppendUint64(nil, s.Break.Addr)})
		if b, ok := l.breaks[s.Break.Addr]; ok {
			rs = append(rs, journal.Record{Kind: kindBreak, Data: encodeBreak(nil, b)})
		}
	}
	return rs
}

func encodeBreak(b []byte, l breakpoint.LeftBreak) []byte {
	b = binary.LittleEndian.AppendUint64(b, l.Addr)
	b = append(b, byte(len(l.Insn)))
	return append(b, l.Insn...)
}

func encodeSlot(s slotAt) []byte {
	le := binary.LittleEndian
	b := le.AppendUint64(nil, s.Addr)
	b = le.AppendUint32(b, uint32(s.index))
	b = append(b, byte(s.Len), byte(len(s.Code)))
	b = append(b, s.Code...)
	return encodeBreak(b, s.Break)
}

var errRecord = errors.New("a record that this program doesn't write")

func decodeBreak(b []byte) (l breakpoint.LeftBreak, err error) {
	if len(b) < 9 || len(b) != 9+int(b[8]) || b[8] == 0 || b[8] > x86.MaxLen {
		return l, errRecord
	}
	return breakpoint.LeftBreak{Addr: binary.LittleEndian.Uint64(b), Insn: append([]byte(nil), b[9:]...)}, nil
}

func decodeSlot(b []byte) (s slotAt, err error) {
	if len(b) < 14 || len(b) < 14+int(b[13]) {
		return s, errRecord
	}
	le := binary.LittleEndian
	s.Addr, s.index, s.Len = le.Uint64(b), int(le.Uint32(b[8:])), int(b[12])
	n := 14 + int(b[13])
	s.Code = append([]byte(nil), b[14:n]...)
	if s.index >= maxSlots {
		return s, errRecord
	}
	s.Break, err = decodeBreak(b[n:])
	return s, err
}

// load reads what a journal says.
func (l *Log) load(f readable) error {
	return f.Records(func(r journal.Record) error {
		err := error(nil)
		switch r.Kind {
		case kindBreak:
			var b breakpoint.LeftBreak
			if b, err = decodeBreak(r.Data); err == nil {
				l.breaks[b.Addr] = b
			}
		case kindSlot:
			var s slotAt
			if s, err = decodeSlot(r.Data); err == nil {
				l.slots[s.Addr], l.breaks[s.Break.Addr] = s, s.Break
				l.next = max(l.next, s.index+1)
			}
		case kindRemoved, kindCleaned:
			if len(r.Data) != 8 {
				return fmt.Errorf("%w: %w", journal.ErrUnreadable, errRecord)
			}
			addr := binary.LittleEndian.Uint64(r.Data)
			if r.Kind == kindRemoved {
				l.remove(addr)
			} else {
				delete(l.slots, addr)
			}
		default:
			err = errRecord
		}
		if err != nil {
			return fmt.Errorf("%w: %w", journal.ErrUnreadable, err)
		}
		return nil
	})
}
