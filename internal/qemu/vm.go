package qemu

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/paging"
)

// Errors of Dial, and of what follows.
var (
	// ErrBusy: the stub serves one debugger at a time, and gives no answer to others.
	ErrBusy = errors.New("the gdbstub doesn't answer: is another debugger (gdb, vmprobes) attached to this VM? End it first")
	// ErrNoStub: nobody listens there.
	ErrNoStub = errors.New("no gdbstub listens there: start QEMU with -gdb unix:PATH,server=on,wait=off, " +
		"or enter \"gdbserver unix:PATH,server=on,wait=off\" in its monitor, or use qemu+monitor:PATH with the monitor's socket")
	// ErrNotStub: something else listens there.
	ErrNotStub = errors.New("what listens there is not QEMU's gdbstub; for a monitor's socket use qemu+monitor:PATH")
	// ErrClosed: the VM is closed.
	ErrClosed = fmt.Errorf("the connection to the VM is closed: %w", fs.ErrClosed)
)

// Options configures Dial. The zero value, and nil, mean defaults.
type Options struct {
	// RAM is the file that holds the guest's memory, if QEMU was started with a
	// shared memory backend (memory-backend-file or memory-backend-memfd with
	// share=on; a memfd is /proc/PID/fd/N of QEMU). Memory is then read and written
	// there, also while the VM runs.
	RAM string
	// ProcMem has memory read and written through /proc/PID/mem of the QEMU
	// process, which takes the right to trace it (root has it). PID is that
	// process; 0 is whoever listens at the unix socket.
	ProcMem bool
	PID     int
	// GDB is where the monitor makes the socket of the gdbstub, for a target of
	// qemu+monitor. QEMU must be allowed to make it. Empty means a name next to
	// that of the monitor's socket.
	GDB string
	// DebugRegisters has breakpoints use the CPU's debug registers, of which there
	// are four, under KVM: for hosts whose KVM doesn't report QEMU's int3s, as some
	// that are guests themselves. Without it they are used where an int3 can't be
	// planted.
	DebugRegisters bool
	// Timeout bounds how long an answer of the stub may take; 0 means 10 seconds.
	// Waiting for a breakpoint is not bounded by it.
	Timeout time.Duration
	// Logger receives debug records. Nil discards them.
	Logger *slog.Logger
}

const defaultTimeout = 10 * time.Second

// Info describes a VM.
type Info struct {
	Name    string // of QEMU's -name, or ""
	UUID    string // of QEMU's -uuid, or ""
	Version string // of QEMU: "7.2.22"
	KVM     bool   // not TCG
	VCPUs   int
	// RAM is the guest's memory in bytes, 0 if QEMU didn't tell.
	RAM uint64
}

// maxVCPUs bounds the number of vCPUs; QEMU's machines have up to 4096.
const maxVCPUs = 4096

// A VM is a connection to a VM's gdbstub. Its methods are safe for concurrent
// use. It implements [paging.Frames].
//
// The VM runs except while somebody holds it ([VM.Freeze]), a stop waits for its
// answer, or another one than us has stopped it.
type VM struct {
	target   Target
	timeout  time.Duration
	log      *slog.Logger
	layout   *layout
	info     Info
	mread    int  // bytes that one "m" packet may read
	verify   bool // a step may end where it began
	multi    bool // thread ids have a process
	phys     bool // PhyMemMode exists
	hardware bool // Options.DebugRegisters
	mon      *monitor

	mu      sync.Mutex
	changed sync.Cond // running, frozen, event, err
	stub    *stub
	err     error // why nothing works any more
	gone    bool  // the connection is of no use
	closed  bool
	running bool   // as far as we know
	reading bool   // Wait receives, without mu
	reads   uint64 // counts those
	breakin bool   // the VM has been told to stop
	frozen  int

	threads []string // by number of vCPU
	current string   // the thread that g, p, P and m are about; "" is unknown
	physNow int      // PhyMemMode, -1 is unknown
	regs    regFile  // of the vCPU that stopped
	regsOf  string   // its thread, "" if regs are of no one

	ram    ramMap
	ramAt  time.Time // when it was last read because of an unknown address
	direct directRAM // nil: memory goes through packets
	pages  map[paging.Frame][]byte

	drv *Driver // attached, or nil
}

// A lostError ends everything: the guest can't be served any more.
type lostError struct{ reason error }

func (e *lostError) Error() string        { return e.reason.Error() }
func (e *lostError) Unwrap() error        { return e.reason }
func (e *lostError) Is(target error) bool { return target == breakpoint.ErrGone }

// Dial connects to a guest's gdbstub. The VM is stopped for some milliseconds;
// what a dead predecessor left, breakpoints and a stopped VM, is repaired. A VM
// that was paused by its owner runs afterwards, as the stub can't tell.
func Dial(ctx context.Context, target string, opts *Options) (_ *VM, err error) {
	if opts == nil {
		opts = new(Options)
	}
	t, err := ParseTarget(target)
	if err != nil {
		return nil, err
	}
	v := &VM{
		target: t, timeout: opts.Timeout, log: opts.Logger,
		hardware: opts.DebugRegisters, physNow: -1, pages: make(map[paging.Frame][]byte),
	}
	v.changed.L = &v.mu
	if v.timeout <= 0 {
		v.timeout = defaultTimeout
	}
	if v.log == nil {
		v.log = slog.New(slog.DiscardHandler)
	}
	stubAt := t
	if t.Monitor {
		if v.mon, err = dialMonitor(ctx, t, v.timeout); err != nil {
			return nil, fmt.Errorf("%s: %w", target, err)
		}
		defer func() {
			if err != nil {
				v.mon.stopStub()
				v.mon.close()
			}
		}()
		if stubAt, err = v.mon.startStub(opts.GDB); err != nil {
			return nil, fmt.Errorf("%s: %w", target, err)
		}
	}
	c, err := dial(ctx, stubAt)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", target, err)
	}
	v.stub = &stub{c: c}
	if err := v.open(ctx, opts); err != nil {
		return nil, fmt.Errorf("%s: %w", target, err)
	}
	return v, nil
}

func dial(ctx context.Context, t Target) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, defaultTimeout)
	defer cancel()
	// To try is not harmless: QEMU accepts a connection that waits when the debugger
	// before it leaves, and stops the VM then, even if nobody is there any more. One
	// that was just closed needs a moment.
	for i := 0; t.Network == "unix" && connections(t.Address) > 0; i++ {
		if i == 100 {
			return nil, ErrBusy
		}
		select {
		case <-time.After(5 * time.Millisecond):
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	var d net.Dialer
	c, err := d.DialContext(ctx, t.Network, t.Address)
	switch {
	case err == nil:
		return c, nil
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return nil, fmt.Errorf("%w (%w)", ErrNoStub, err)
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("this user may not connect to the VM's socket: run as root or as QEMU's user: %w", err)
	}
	return nil, err
}

// open does the handshake and lets the VM run. On failure the connection is closed.
func (v *VM) open(ctx context.Context, opts *Options) (err error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	// A caller that gives up ends the connection, whatever is being waited for.
	stop := context.AfterFunc(ctx, func() { v.stub.c.Close() })
	defer func() {
		if !stop() && err == nil {
			err = context.Cause(ctx)
		}
		if err != nil {
			if ctx.Err() != nil {
				err = context.Cause(ctx)
			}
			if v.direct != nil {
				v.direct.close()
			}
			v.stub.c.Close()
		}
	}()
	if err := v.handshake(); err != nil {
		return err
	}
	// From here on the VM is ours and stopped: let it go whatever fails.
	if err := v.discover(); err != nil {
		return errors.Join(err, v.detach())
	}
	if v.direct, err = openDirect(v, opts); err != nil {
		return errors.Join(err, v.detach())
	}
	if err := v.settle(); err != nil {
		return err
	}
	go v.watch()
	return nil
}

// handshake finds out what the stub can do. The VM is stopped: QEMU does that
// when somebody connects.
func (v *VM) handshake() error {
	if err := v.stub.send(v.timeout, "qSupported:multiprocess+;vContSupported+"); err != nil {
		return fmt.Errorf("%w (%w)", ErrNotStub, err)
	}
	if err := v.stub.deadline(time.Now().Add(min(v.timeout, 5*time.Second))); err != nil {
		return err
	}
	reply, err := v.stub.receive()
	// QEMU before 8.1 reports first that it has stopped the VM.
	if err == nil && len(reply) > 0 && (reply[0] == 'T' || reply[0] == 'S') {
		reply, err = v.stub.receive()
	}
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return ErrBusy
	case errors.Is(err, errProtocol), hungUp(err):
		return fmt.Errorf("%w (%w)", ErrNotStub, err)
	case err != nil:
		return err
	}
	features := map[string]bool{}
	for f := range strings.SplitSeq(string(reply), ";") {
		features[f] = true
		if s, ok := strings.CutPrefix(f, "PacketSize="); ok {
			n, err := strconv.ParseUint(s, 16, 31)
			if err != nil || n < 64 {
				return fmt.Errorf("%w: packet size %.20q", errProtocol, s)
			}
			v.mread = int(min(n, maxPacket) / 2)
		}
	}
	v.multi = features["multiprocess+"]
	if v.mread == 0 || !features["qXfer:features:read+"] {
		return fmt.Errorf("%w: it offers only %.200q", ErrNotStub, reply)
	}
	return v.clear()
}

// clear removes the breakpoints of one vCPU, those of a dead predecessor: that
// is a side effect of "?".
func (v *VM) clear() error {
	data, err := v.call("?")
	if err != nil {
		return err
	}
	stop, err := parseStop(data)
	if err != nil {
		return fmt.Errorf("%w (%w)", ErrNotStub, err)
	}
	if stop.exited {
		return v.lose(errors.New("the VM has ended"))
	}
	return nil
}

// discover reads what doesn't change.
func (v *VM) discover() (err error) {
	if v.layout, err = readLayout(v.xfer); err != nil {
		return err
	}
	if err := v.readThreads(); err != nil {
		return err
	}
	// Under TCG "?" is about the vCPU that "Hc" chooses (QEMU since 7.1,
	// tcg_remove_all_breakpoints).
	for _, t := range v.threads {
		if len(v.threads) > 1 {
			if err := v.callOK("Hc" + t); err != nil {
				return err
			}
			if err := v.clear(); err != nil {
				return err
			}
		}
	}
	// Steps without interrupts and timers, as far as the accelerator can.
	if bits, err := v.callText("qqemu.sstepbits"); err != nil {
		return err
	} else if bits != "" {
		n := 0
		for b := range strings.SplitSeq(bits, ",") {
			_, value, _ := strings.Cut(b, "=")
			k, err := strconv.ParseUint(value, 0, 8)
			if err != nil {
				return fmt.Errorf("%w: step bits %.80q", errProtocol, bits)
			}
			n |= int(k)
		}
		if err := v.callOK(fmt.Sprintf("Qqemu.sstep=%x", n)); err != nil {
			return fmt.Errorf("set up stepping: %w", err)
		}
	}
	if text, err := v.callText("Qqemu.PhyMemMode:0"); err != nil {
		return err
	} else if text == "OK" {
		v.phys, v.physNow = true, 0
	}
	if text, err := v.callText("qGDBServerVersion"); err != nil {
		return err
	} else if text != "" {
		for f := range strings.SplitSeq(text, ";") {
			if s, ok := strings.CutPrefix(f, "version:"); ok {
				v.info.Version = s
			}
		}
	}
	if v.info.Version == "" {
		text, err := v.hmp("info version")
		if err != nil {
			return err
		}
		// "7.2.22Debian 1:7.2+dfsg…": the package's name follows without a space.
		v.info.Version = versionPrefix(text)
	}
	kvm, err := v.hmp("info kvm")
	if err != nil {
		return err
	}
	v.info.KVM = strings.Contains(kvm, "enabled")
	for _, i := range []struct {
		command string
		to      *string
	}{{"info name", &v.info.Name}, {"info uuid", &v.info.UUID}} {
		text, err := v.hmp(i.command)
		if err != nil {
			return err
		}
		*i.to = printable(text)
	}
	if strings.Trim(v.info.UUID, "0-") == "" {
		v.info.UUID = ""
	}
	tree, err := v.hmp("info mtree -f")
	if err != nil {
		return err
	}
	v.ram = parseRAM(tree)
	v.info.RAM = v.ram.size()
	v.info.VCPUs = len(v.threads)
	// QEMU 7.2 ends a step now and then, about one of 10,000, without having made it,
	// also with a single vCPU; QEMU 11 has not been seen to.
	v.verify = major(v.info.Version) < 11
	v.log.Debug("attached to QEMU", "version", v.info.Version, "kvm", v.info.KVM, "vcpus", len(v.threads), "ram", v.info.RAM)
	return nil
}

// versionPrefix returns the digits and dots that s begins with.
func versionPrefix(s string) string {
	n := 0
	for n < len(s) && (s[n] == '.' || '0' <= s[n] && s[n] <= '9') {
		n++
	}
	return strings.TrimRight(s[:n], ".")
}

func major(version string) int {
	s, _, _ := strings.Cut(version, ".")
	n, _ := decimal(s)
	return n
}

// printable returns at most 256 bytes of s, on one line.
func printable(s string) string {
	s = strings.TrimSpace(s)
	if len(s) > 256 {
		s = s[:256]
	}
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return -1
		}
		return r
	}, s)
}

// readThreads lists the vCPUs.
func (v *VM) readThreads() error {
	var all []string
	for query := "qfThreadInfo"; ; query = "qsThreadInfo" {
		text, err := v.callText(query)
		if err != nil {
			return err
		}
		if text == "l" {
			break
		}
		ids, ok := strings.CutPrefix(text, "m")
		if !ok {
			return fmt.Errorf("%w: list of threads %.80q", errProtocol, text)
		}
		for id := range strings.SplitSeq(ids, ",") {
			if !validThread(id) || slices.Contains(all, id) || len(all) == maxVCPUs {
				return fmt.Errorf("%w: list of threads %.80q", errProtocol, text)
			}
			all = append(all, id)
		}
	}
	if len(all) == 0 {
		return fmt.Errorf("%w: no threads", errProtocol)
	}
	v.threads = all
	return nil
}

// xfer reads one document of the target description.
func (v *VM) xfer(annex string) ([]byte, error) {
	if annex == "" || len(annex) > 64 || strings.ContainsAny(annex, ":#$}*,;") {
		return nil, fmt.Errorf("%w: document %.80q", errProtocol, annex)
	}
	var doc []byte
	for {
		data, err := v.call(fmt.Sprintf("qXfer:features:read:%s:%x,%x", annex, len(doc), v.mread))
		if err != nil {
			return nil, err
		}
		if len(data) == 0 || data[0] != 'l' && data[0] != 'm' {
			return nil, fmt.Errorf("%w: reading %s gives %.40q", errProtocol, annex, data)
		}
		last := data[0] == 'l'
		part := unescape(data[1:])
		doc = append(doc, part...)
		if last {
			return doc, nil
		}
		if len(part) == 0 || len(doc) > maxTargetXML {
			return nil, fmt.Errorf("%w: %s has no end", errProtocol, annex)
		}
	}
}

// maxHMP bounds the output of a monitor command.
const maxHMP = 4 << 20

// hmp has a command of the human monitor executed. An unknown command's output
// says so; a stub without a monitor gives "".
func (v *VM) hmp(command string) (string, error) {
	data, err := v.call("qRcmd," + hex.EncodeToString([]byte(command)))
	var out []byte
	for err == nil {
		switch {
		case string(data) == "OK":
			return string(out), nil
		case len(data) == 0 || data[0] == 'E':
			return "", nil
		case data[0] != 'O' || len(data)%2 == 0:
			return "", fmt.Errorf("%w: output of %q: %.40q", errProtocol, command, data)
		}
		part := make([]byte, len(data)/2)
		if err := decodeHex(part, data[1:]); err != nil {
			return "", err
		}
		if out = append(out, part...); len(out) > maxHMP {
			return "", fmt.Errorf("%w: output of %q has no end", errProtocol, command)
		}
		data, err = v.receive()
	}
	return "", err
}

// Methods from here on, except for the exported ones, want v.mu held.

// call sends one packet to the stopped VM and returns the answer, which is valid
// until the next call.
func (v *VM) call(packet string) ([]byte, error) {
	if err := v.post(packet); err != nil {
		return nil, err
	}
	return v.receive()
}

// post sends packets to the stopped VM.
func (v *VM) post(packets ...string) error {
	if v.gone {
		return v.err
	}
	if err := v.stub.send(v.timeout, packets...); err != nil {
		return v.broken(err)
	}
	return nil
}

// receive returns the next packet, which must come soon.
func (v *VM) receive() ([]byte, error) {
	if v.gone {
		return nil, v.err
	}
	if err := v.stub.deadline(time.Now().Add(v.timeout)); err != nil {
		return nil, v.broken(err)
	}
	data, err := v.stub.receive()
	if err != nil {
		return nil, v.broken(err)
	}
	return data, nil
}

func (v *VM) callText(packet string) (string, error) {
	data, err := v.call(packet)
	return string(data), err
}

// refused is an error reply, or an empty one: the packet isn't known.
type refused struct{ packet, reply string }

func (e *refused) Error() string {
	if e.reply == "" {
		return fmt.Sprintf("the gdbstub doesn't know %q", e.packet)
	}
	return fmt.Sprintf("the gdbstub answers %q to %q", e.reply, e.packet)
}

func (v *VM) callOK(packet string) error {
	text, err := v.callText(packet)
	if err == nil && text != "OK" {
		err = &refused{packet, printable(text)}
	}
	return err
}

// lose ends everything with err; the connection may still be good.
func (v *VM) lose(err error) error {
	if v.err == nil {
		v.err = &lostError{err}
		v.log.Debug("guest lost", "err", err)
	}
	v.changed.Broadcast()
	return v.err
}

// broken ends everything, because the connection is.
func (v *VM) broken(err error) error {
	v.gone = true
	v.running = false
	switch {
	case hungUp(err):
		err = fmt.Errorf("QEMU has closed the connection: the VM has ended, or its gdbserver was stopped or given to another (%w)", err)
	case errors.Is(err, os.ErrDeadlineExceeded):
		err = fmt.Errorf("QEMU hasn't answered for %v: if it lives, attach again, which clears the breakpoints and lets the VM run", v.timeout)
	case errors.Is(err, net.ErrClosed):
		err = ErrClosed
	default:
		err = fmt.Errorf("connection to the gdbstub: %w: attach again, which clears the breakpoints and lets the VM run", err)
	}
	v.stub.c.Close()
	return v.lose(err)
}

// hungUp reports whether err says that the other side has closed the connection.
func hungUp(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

// halt stops the VM, if it runs.
func (v *VM) halt() error {
	for v.running && v.err == nil {
		if !v.breakin {
			v.breakin = true
			if err := v.stub.interrupt(v.timeout); err != nil {
				return v.broken(err)
			}
			if err := v.stub.deadline(time.Now().Add(v.timeout)); err != nil {
				return v.broken(err)
			}
		}
		if v.reading {
			v.changed.Wait()
			continue
		}
		data, err := v.stub.receive()
		if err != nil {
			return v.broken(err)
		}
		if err := v.stopped(data); err != nil {
			return err
		}
	}
	return v.err
}

// settle lets the VM run if nothing speaks against it.
func (v *VM) settle() error {
	if v.err != nil {
		return v.err
	}
	if v.running || v.frozen > 0 || v.drv != nil && v.drv.pending {
		return nil
	}
	return v.run("c")
}

// run lets the VM run with the given packets, the last of which does that.
func (v *VM) run(packets ...string) error {
	v.forget()
	if err := v.post(packets...); err != nil {
		return err
	}
	v.running = true
	v.changed.Broadcast()
	return nil
}

// forget drops what is known of the stopped VM.
func (v *VM) forget() {
	v.regsOf = ""
	clear(v.pages)
}

// stopped takes the stop reply of a VM that ran.
func (v *VM) stopped(data []byte) error {
	stop, err := parseStop(data)
	if err != nil {
		return v.broken(err)
	}
	asked := v.breakin
	v.running, v.breakin, v.current = false, false, ""
	v.changed.Broadcast()
	if stop.exited {
		v.gone = true
		return v.lose(errors.New("the VM has ended: the guest was shut down, or reset under -no-reboot, or QEMU was quit"))
	}
	switch stop.signal {
	case sigTrap:
		return v.trapped(stop)
	case sigInt:
		if asked {
			return nil
		}
		return v.lose(errors.New("somebody has paused the VM through QEMU's monitor (stop, virsh suspend, snapshot): " +
			"attach again when it runs"))
	case sigQuit:
		return v.lose(errors.New("the guest has shut down"))
	case sigAbrt:
		return v.lose(errors.New("QEMU has stopped the VM: the guest panicked, or met an internal error of QEMU"))
	case sigAlrm:
		return v.lose(errors.New("QEMU has stopped the VM: its watchdog has fired"))
	case sigIO:
		return v.lose(errors.New("QEMU has stopped the VM: a disk failed or is full; cure that, enter \"cont\" in the monitor, and attach again"))
	case sigXCPU:
		return v.lose(errors.New("QEMU has stopped the VM: it is migrating to another host; attach again there"))
	}
	return v.lose(fmt.Errorf("QEMU has stopped the VM (signal %d)", stop.signal))
}

// trapped takes a stop at a breakpoint.
func (v *VM) trapped(stop stopReply) error {
	v.current = stop.thread
	if v.current == "" {
		if len(v.threads) != 1 {
			return v.broken(fmt.Errorf("%w: it doesn't say which vCPU stopped", errProtocol))
		}
		v.current = v.threads[0]
	}
	if v.drv == nil {
		return v.settle()
	}
	return v.drv.trapped()
}

// await waits, without v.mu, until the VM stops or ctx is done; or, if the VM is
// stopped or another goroutine waits, until something changes.
func (v *VM) await(ctx context.Context) error {
	if !v.running || v.reading {
		stop := context.AfterFunc(ctx, func() {
			v.mu.Lock()
			defer v.mu.Unlock()
			v.changed.Broadcast()
		})
		defer stop()
		v.changed.Wait()
		return nil
	}
	if !v.breakin {
		if err := v.stub.deadline(time.Time{}); err != nil {
			return v.broken(err)
		}
	}
	v.reading = true
	v.reads++
	turn := v.reads
	stop := context.AfterFunc(ctx, func() {
		v.mu.Lock()
		defer v.mu.Unlock()
		// A break-in has its own deadline, and ends the reading as well.
		if v.reading && v.reads == turn && !v.breakin {
			v.stub.deadline(time.Unix(1, 0))
		}
	})
	v.mu.Unlock()
	data, err := v.stub.receive()
	v.mu.Lock()
	stop()
	v.reading = false
	v.changed.Broadcast()
	if errors.Is(err, os.ErrDeadlineExceeded) && !v.breakin {
		return nil // ctx is done
	}
	if err != nil {
		return v.broken(err)
	}
	return v.stopped(data)
}

// watchEvery is how long a VM may stay stopped unnoticed when nobody waits for
// its stops.
const watchEvery = 50 * time.Millisecond

// watch sees stops that come while nobody is in Wait: QEMU reports one late now
// and then, of a breakpoint that is gone.
func (v *VM) watch() {
	v.mu.Lock()
	defer v.mu.Unlock()
	for v.err == nil {
		if v.running && !v.reading {
			if err := v.await(context.Background()); err != nil {
				return
			}
		}
		v.mu.Unlock()
		time.Sleep(watchEvery)
		v.mu.Lock()
	}
}

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

// takeRegs parses the answer to "g", of the current thread.
func (v *VM) takeRegs(data []byte) error {
	v.regsOf = ""
	if err := v.layout.parse(&v.regs, data); err != nil {
		return v.broken(err)
	}
	v.regsOf = v.current
	return nil
}

// Freeze stops the VM until the Thaw that belongs to it; they nest. Many reads
// under one Freeze stop the VM once, and see one state of it.
func (v *VM) Freeze() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.freeze()
}

func (v *VM) freeze() error {
	v.frozen++
	if err := v.halt(); err != nil {
		v.frozen--
		return err
	}
	return nil
}

// Thaw ends a Freeze.
func (v *VM) Thaw() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.thaw()
}

func (v *VM) thaw() error {
	if v.frozen == 0 {
		return nil
	}
	v.frozen--
	v.changed.Broadcast()
	return v.settle()
}

// held calls f while the VM is stopped.
func (v *VM) held(f func() error) error {
	if err := v.freeze(); err != nil {
		return err
	}
	err := f()
	return errors.Join(err, v.thaw())
}

// Info describes the VM as it was when Dial connected.
func (v *VM) Info() Info { return v.info }

// Packets returns how many packets have been sent, for measurements.
func (v *VM) Packets() uint64 {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.stub.sent
}

// Close removes every breakpoint, lets the VM run and leaves it. A VM that
// somebody else has paused meanwhile stays paused.
func (v *VM) Close() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.closed {
		return nil
	}
	v.closed = true
	var err error
	if !v.gone {
		v.frozen++ // it must not run again in between
		if v.err == nil {
			err = v.halt()
		}
		if !v.gone {
			err = errors.Join(err, v.detach())
		}
	}
	if errors.Is(err, breakpoint.ErrGone) {
		err = nil
	}
	v.stub.c.Close()
	v.gone = true
	v.lose(ErrClosed)
	if v.direct != nil {
		err = errors.Join(err, v.direct.close())
	}
	if v.mon != nil {
		err = errors.Join(err, v.mon.stopStub())
		v.mon.close()
		v.mon = nil
	}
	return err
}

// detach clears the stopped VM and, unless another has stopped it, lets it run.
func (v *VM) detach() error {
	var errs error
	if v.drv != nil {
		errs = v.drv.clear()
	}
	if v.gone || v.err != nil {
		// Paused by another: without "D" it stays so.
		return errs
	}
	packet := "D"
	if v.multi && len(v.threads) > 0 {
		pid, _, _ := strings.Cut(strings.TrimPrefix(v.threads[0], "p"), ".")
		packet = "D;" + pid
	}
	return errors.Join(errs, v.callOK(packet))
}
