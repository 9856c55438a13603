// Package journal keeps, outside of the process that changes a guest, what it has
// changed: one file for each guest, in a folder on a tmpfs, which the next process reads
// when the first has died. It knows nothing of hypervisors or breakpoints.
//
// A file has three parts. The header says which guest and which process. The state is
// memory that is mapped by the owner, for what changes at every hit: a store costs no
// system call, and outlives the process. The log has one record for each change that is
// about to be made, appended and checksummed, and flushed before Append returns. A record
// that was being written when the owner died is cut off by a reader; the change that it
// announces was not made.
//
// The owner holds a lock on the file. A file whose lock is free is hot: its owner died,
// and the guest is as the file says. It is removed when nothing is left to be undone.
package journal

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"unsafe"
)

// Errors of this package.
var (
	// ErrBusy is matched by a *BusyError.
	ErrBusy = errors.New("the guest has an owner")
	// ErrHot: a process that owned the guest has died, and what it changed isn't undone.
	ErrHot = errors.New("the guest's last owner died with changes in it")
	// ErrUnreadable: a file isn't what this version writes. Nothing of it is to be
	// believed, or written into a guest.
	ErrUnreadable = errors.New("the journal can't be read")
	ErrClosed     = errors.New("the journal is closed")
)

// Identity tells one guest from every other that there was on this host, or will be.
type Identity struct {
	Name   string `json:"name"`            // for people
	Kind   string `json:"kind"`            // how it is virtualized: "pv", "hvm", "qemu"
	Domain uint16 `json:"domain"`          // Xen's domain id, which may be used again
	Handle []byte `json:"handle"`          // its UUID, or another one's after a restart
	Build  string `json:"build,omitempty"` // the kernel's build id in hexadecimal digits, "" if unknown
}

// Same reports whether a guest with the identity now may be the one of the journal. What
// either doesn't know is left out of it.
func (id Identity) Same(now Identity) bool {
	return id.Kind == now.Kind && id.Domain == now.Domain && bytes.Equal(id.Handle, now.Handle) &&
		(id.Build == "" || now.Build == "" || id.Build == now.Build)
}

// An Owner is a process.
type Owner struct {
	PID     int    `json:"pid"`
	Start   uint64 `json:"start"`   // clock ticks after boot (proc(5), /proc/PID/stat, field 22), 0 if unknown
	Program string `json:"program"` // its executable
}

func (o Owner) String() string {
	if o.PID == 0 {
		return "an unknown process"
	}
	if o.Program == "" {
		return fmt.Sprintf("process %d", o.PID)
	}
	return fmt.Sprintf("process %d (%q)", o.PID, o.Program)
}

// A BusyError says who owns the guest.
type BusyError struct {
	Owner Owner
	Path  string // of the journal
}

func (e *BusyError) Error() string { return fmt.Sprintf("%v: %v (%s)", ErrBusy, e.Owner, e.Path) }

// Is makes a BusyError match ErrBusy.
func (e *BusyError) Is(target error) bool { return target == ErrBusy }

// Layout of a file. Numbers are little-endian.
const (
	magic      = "vmprobes journal" // 16 bytes
	version    = 1
	headerSize = 4096
	// Offsets in the header.
	offVersion  = 16 // uint32
	offState    = 20 // uint32, size of the state
	offLog      = 24 // uint64, where the log begins, as it is now
	offInfoLen  = 32 // uint32
	offInfoSum  = 36 // uint32, CRC-32C of the information
	offInfo     = 40 // JSON
	maxState    = 64 << 20
	maxLog      = 64 << 20
	maxRecord   = 4096
	recordFixed = 21 // length, number, kind, and checksums of the data and of this
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// information is what the header says in JSON.
type information struct {
	Guest Identity `json:"guest"`
	Owner Owner    `json:"owner"`
}

// A Record is one entry of the log.
type Record struct {
	Kind uint8
	Data []byte
}

// A File is a journal whose lock this process holds.
type File struct {
	path string
	info information
	m    []byte // header and state, mapped

	mu     sync.Mutex
	f      file
	next   uint64 // number of the next record
	end    int64  // of the log
	closed bool
}

// file is an open file with a lock.
type file interface {
	ReadAt(b []byte, off int64) (int, error)
	WriteAt(b []byte, off int64) (int, error)
	sync() error
	size() (int64, error)
	truncate(n int64) error
	reserve(n int64) error
	mapShared(n int) ([]byte, error)
	unmap(b []byte) error
	// letGo puts memory of this process in the place of what mapShared has mapped.
	letGo(b []byte) error
	// forget gives back the space of a range, which nobody reads any more.
	forget(off, n int64)
	remove() error
	Close() error
}

// Guest returns whose journal f is.
func (f *File) Guest() Identity { return f.info.Guest }

// Owner returns the process that made the journal.
func (f *File) Owner() Owner { return f.info.Owner }

// Path returns the file's name.
func (f *File) Path() string { return f.path }

// State returns the memory that outlives the process; after Close or Remove it is this
// process' own, and means nothing. It begins at a multiple of 8 bytes, and is zero in a new
// journal.
func (f *File) State() []byte { return f.m[headerSize:] }

// Layout returns a checksum of how values of the types are laid out in memory, which is not
// 0. A state made of such values means something only to a program that has them laid out
// in the same way.
func Layout(types ...reflect.Type) uint32 {
	var b strings.Builder
	var walk func(t reflect.Type)
	walk = func(t reflect.Type) {
		fmt.Fprintf(&b, "%v %d", t.Kind(), t.Size())
		switch t.Kind() {
		case reflect.Array:
			walk(t.Elem())
		case reflect.Struct:
			for i := range t.NumField() {
				f := t.Field(i)
				fmt.Fprintf(&b, " %s@%d:", f.Name, f.Offset)
				walk(f.Type)
			}
		}
		b.WriteByte(';')
	}
	for _, t := range types {
		walk(t)
	}
	return max(crc32.Checksum([]byte(b.String()), castagnoli), 1)
}

// start is where the log begins.
func (f *File) start() *uint64 { return (*uint64)(unsafe.Pointer(&f.m[offLog])) }

// create makes fl a new journal.
func create(fl file, path string, info information, state int) (*File, error) {
	if state < 0 || state > maxState {
		return nil, fmt.Errorf("%s: state of %d bytes, want 0 to %d", path, state, maxState)
	}
	state = (state + headerSize - 1) &^ (headerSize - 1)
	text, err := json.Marshal(info)
	if err != nil {
		return nil, err
	}
	if len(text) > headerSize-offInfo {
		return nil, fmt.Errorf("%s: names of %d bytes, want up to %d", path, len(text), headerSize-offInfo)
	}
	if err := fl.truncate(0); err != nil {
		return nil, err
	}
	if err := fl.truncate(int64(headerSize + state)); err != nil {
		return nil, err
	}
	if err := fl.reserve(int64(headerSize + state)); err != nil {
		return nil, err
	}
	m, err := fl.mapShared(headerSize + state)
	if err != nil {
		return nil, err
	}
	f := &File{path: path, info: info, m: m, f: fl, next: 1, end: int64(len(m))}
	le := binary.LittleEndian
	le.PutUint32(m[offVersion:], version)
	le.PutUint32(m[offState:], uint32(state))
	le.PutUint64(m[offLog:], uint64(f.end))
	le.PutUint32(m[offInfoLen:], uint32(len(text)))
	le.PutUint32(m[offInfoSum:], crc32.Checksum(text, castagnoli))
	copy(m[offInfo:], text)
	copy(m, magic) // last: a file without it has no owner yet
	if err := fl.sync(); err != nil {
		return nil, errors.Join(err, fl.unmap(m))
	}
	return f, nil
}

// readHeader returns what the header of a journal says.
func readHeader(fl file) (info information, state int, err error) {
	h := make([]byte, headerSize)
	if n, err := fl.ReadAt(h, 0); n < len(h) {
		return info, 0, fmt.Errorf("%w: header of %d bytes, not %d: %w", ErrUnreadable, n, len(h), err)
	}
	le := binary.LittleEndian
	if string(h[:len(magic)]) != magic {
		return info, 0, fmt.Errorf("%w: it isn't one", ErrUnreadable)
	}
	if v := le.Uint32(h[offVersion:]); v != version {
		return info, 0, fmt.Errorf("%w: it has version %d, and this program reads %d: use the program that wrote it", ErrUnreadable, v, version)
	}
	n := le.Uint32(h[offInfoLen:])
	if n > headerSize-offInfo {
		return info, 0, fmt.Errorf("%w: names of %d bytes", ErrUnreadable, n)
	}
	text := h[offInfo : offInfo+n]
	if crc32.Checksum(text, castagnoli) != le.Uint32(h[offInfoSum:]) {
		return info, 0, fmt.Errorf("%w: its header has another checksum", ErrUnreadable)
	}
	if err := json.Unmarshal(text, &info); err != nil {
		return info, 0, fmt.Errorf("%w: %w", ErrUnreadable, err)
	}
	state = int(le.Uint32(h[offState:]))
	if state > maxState || state%headerSize != 0 {
		return info, 0, fmt.Errorf("%w: state of %d bytes", ErrUnreadable, state)
	}
	return info, state, nil
}

// open makes fl, whose lock is held, a journal to read and to go on with.
func open(fl file, path string) (*File, error) {
	info, state, err := readHeader(fl)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	size, err := fl.size()
	if err != nil {
		return nil, err
	}
	if size < int64(headerSize+state) {
		return nil, fmt.Errorf("%s: %w: it has %d bytes, and its state alone %d", path, ErrUnreadable, size, headerSize+state)
	}
	m, err := fl.mapShared(headerSize + state)
	if err != nil {
		return nil, err
	}
	f := &File{path: path, info: info, m: m, f: fl}
	if _, err := f.read(func(Record) error { return nil }); err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", path, err), fl.unmap(m))
	}
	return f, nil
}

// Records calls fn with each record of the log, oldest first.
func (f *File) Records(fn func(Record) error) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return ErrClosed
	}
	_, err := f.read(fn)
	return err
}

// read reads the log and finds its end; f.mu is held.
func (f *File) read(fn func(Record) error) (n int, err error) {
	size, err := f.f.size()
	if err != nil {
		return 0, err
	}
	begin := int64(atomic.LoadUint64(f.start()))
	if begin < int64(len(f.m)) || begin > size || size-begin > maxLog {
		return 0, fmt.Errorf("%w: its log is from %#x to %#x", ErrUnreadable, begin, size)
	}
	b := make([]byte, size-begin)
	if n, err := f.f.ReadAt(b, begin); n < len(b) {
		return 0, fmt.Errorf("%w: read its log: %w", ErrUnreadable, err)
	}
	rest := b
	for len(rest) > 0 {
		r, number, size, err := parse(rest)
		if err != nil {
			if err == errTorn {
				break
			}
			return n, fmt.Errorf("%w: record %d of its log, at %#x: %w", ErrUnreadable, n, begin+int64(len(b)-len(rest)), err)
		}
		if n > 0 && number != f.next {
			return n, fmt.Errorf("%w: record %d follows record %d of its log", ErrUnreadable, number, f.next-1)
		}
		f.next = number + 1
		if err := fn(r); err != nil {
			return n, err
		}
		rest = rest[size:]
		n++
	}
	f.end = begin + int64(len(b)-len(rest))
	f.next = max(f.next, 1)
	return n, nil
}

// errTorn: a record ends before it should.
var errTorn = errors.New("it isn't whole")

// parse reads the record at the beginning of b. Its fixed part has a checksum of its own,
// so that a damaged length isn't taken for a record whose end is missing.
func parse(b []byte) (r Record, number uint64, size int, err error) {
	if len(b) < recordFixed {
		return r, 0, 0, errTorn
	}
	le := binary.LittleEndian
	if crc32.Checksum(b[:recordFixed-4], castagnoli) != le.Uint32(b[recordFixed-4:]) {
		if len(bytes.TrimRight(b, "\x00")) < recordFixed {
			return r, 0, 0, errTorn // the file was made longer before it was written
		}
		return r, 0, 0, errors.New("its head has another checksum")
	}
	n := le.Uint32(b)
	if n > maxRecord {
		return r, 0, 0, fmt.Errorf("%d bytes of data", n)
	}
	size = recordFixed + int(n)
	if size > len(b) {
		return r, 0, 0, errTorn
	}
	if crc32.Checksum(b[recordFixed:size], castagnoli) != le.Uint32(b[13:]) {
		if len(bytes.TrimRight(b, "\x00")) < size {
			return r, 0, 0, errTorn
		}
		return r, 0, 0, errors.New("its data has another checksum")
	}
	return Record{b[12], b[recordFixed:size]}, le.Uint64(b[4:]), size, nil
}

// Append adds records, in order, and returns when they are where no death of this process
// takes them away.
func (f *File) Append(records ...Record) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.add(records)
}

// add adds records at the end of the log; f.mu is held.
func (f *File) add(records []Record) error {
	if f.closed {
		return ErrClosed
	}
	b, err := f.encode(records)
	if err != nil {
		return err
	}
	if _, err := f.f.WriteAt(b, f.end); err != nil {
		// Part of it may be there: it must not be followed by anything.
		return errors.Join(fmt.Errorf("write %s: %w", f.path, err), f.f.truncate(f.end))
	}
	if err := f.f.sync(); err != nil {
		return errors.Join(fmt.Errorf("flush %s: %w", f.path, err), f.f.truncate(f.end))
	}
	f.next += uint64(len(records))
	f.end += int64(len(b))
	return nil
}

func (f *File) encode(records []Record) ([]byte, error) {
	var b []byte
	le := binary.LittleEndian
	for i, r := range records {
		if len(r.Data) > maxRecord {
			return nil, fmt.Errorf("%s: record of %d bytes, want up to %d", f.path, len(r.Data), maxRecord)
		}
		at := len(b)
		b = le.AppendUint32(b, uint32(len(r.Data)))
		b = le.AppendUint64(b, f.next+uint64(i))
		b = append(b, r.Kind)
		b = le.AppendUint32(b, crc32.Checksum(r.Data, castagnoli))
		b = le.AppendUint32(b, crc32.Checksum(b[at:], castagnoli))
		b = append(b, r.Data...)
	}
	return b, nil
}

// Size returns how many bytes the log has.
func (f *File) Size() int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.end - int64(atomic.LoadUint64(f.start()))
}

// Replace makes the records the whole of the log, as a shorter way to say the same. A
// reader finds either the old ones or the new ones.
func (f *File) Replace(records ...Record) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	old, at := atomic.LoadUint64(f.start()), f.end
	if err := f.add(records); err != nil {
		return err
	}
	atomic.StoreUint64(f.start(), uint64(at))
	f.f.forget(int64(old), at-int64(old))
	return nil
}

// Remove ends the journal: nothing is left to be undone. A nil File has nothing.
func (f *File) Remove() error {
	if f == nil {
		return nil
	}
	return f.finish(true)
}

// Close gives the lock up and leaves the file, which is hot from then on.
func (f *File) Close() error { return f.finish(false) }

func (f *File) finish(remove bool) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return nil
	}
	f.closed = true
	var err error
	if remove {
		err = f.f.remove() // while the lock is held
	}
	// Whoever has State may still store to it, which must not reach the next owner. Nor is
	// the file's memory given back as long as it is mapped.
	return errors.Join(err, f.f.letGo(f.m), f.f.Close())
}

// fileName is the name of a guest's journal in its folder.
func fileName(guest string) string {
	var b strings.Builder
	for _, c := range []byte(guest) {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '-', c == '_':
			b.WriteByte(c)
		default:
			fmt.Fprintf(&b, "%%%02x", c)
		}
	}
	if name := b.String(); len(name) > longName {
		// Its end tells more than its beginning, if it is a path.
		sum := sha256.Sum256([]byte(guest))
		return fmt.Sprintf("%x%s%s", sum[:16], name[len(name)-longName+2*16:], suffix)
	}
	return b.String() + suffix
}

// longName is how long the name of a file may be, without suffix: NAME_MAX is 255.
const longName = 200

const suffix = ".journal"
