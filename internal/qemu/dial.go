package qemu

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/vmprobes/vmprobes/paging"
)

// Dial connects to the guest that a name stands for, as in
//
//	qemu:/run/vm.gdb               a unix socket (-gdb unix:/run/vm.gdb,server=on,wait=off)
//	qemu:localhost:1234            a TCP port (-gdb tcp:localhost:1234)
//	qemu::1234                     the same, on this machine (-s)
//	qemu+monitor:/run/vm.mon       the unix socket of a monitor, HMP or QMP
//	qemu+monitor:localhost:4444    a monitor's TCP port
//
// Behind it may stand "?" and options, joined by "&", which are those of the same
// meaning in [Options] and go before them:
//
//	ram=FILE      Options.RAM
//	pid=PID       Options.ProcMem and PID
//	debugregs     Options.DebugRegisters
//	gdb=SOCKET    Options.GDB, with qemu+monitor only
//	timeout=30s   Options.Timeout
//
// The VM is stopped for some milliseconds. What a dead predecessor left,
// breakpoints and a stopped VM, is repaired. A VM that was paused by its owner runs
// afterwards, as the stub can't tell; a monitor can, and then Dial fails with
// ErrPaused.
func Dial(ctx context.Context, name string, opts *Options) (*VM, error) {
	v, err := dial(ctx, name, opts)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return v, nil
}

func dial(ctx context.Context, name string, given *Options) (_ *VM, err error) {
	var opts Options
	if given != nil {
		opts = *given
	}
	t, err := parseName(name, &opts)
	if err != nil {
		return nil, err
	}
	v := &VM{
		target: t, timeout: opts.Timeout, log: opts.Logger, hardware: opts.DebugRegisters, physNow: -1,
		breaks: make(map[uint64]planted), stuck: make(map[uint64]bool), pages: make(map[paging.Frame][]byte),
	}
	v.info.Socket = t.Address
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
			return nil, err
		}
		defer func() {
			if err != nil {
				v.mon.stopStub()
				v.mon.close()
			}
		}()
		if stubAt, err = v.mon.startStub(opts.GDB); err != nil {
			return nil, err
		}
	}
	c, err := connect(ctx, stubAt)
	if err != nil && t.Monitor {
		// Not the address that the caller has named.
		return nil, fmt.Errorf("the gdbstub that the monitor has started at %s: %w", stubAt.Address, reason(err))
	}
	switch {
	case err == nil:
	case absent(err):
		return nil, fmt.Errorf("%w (%w): start QEMU with -gdb unix:PATH,server=on,wait=off, or enter \"gdbserver unix:PATH,server=on,wait=off\" "+
			"in its monitor, or use qemu+monitor:PATH with the monitor's socket", ErrNoStub, reason(err))
	case errors.Is(err, ErrBusy):
		return nil, fmt.Errorf("%w: end that one first (gdb, vmprobes)", err)
	default:
		return nil, fmt.Errorf("can't connect: %w", reason(err))
	}
	v.stub = &stub{c: c}
	if err := v.open(ctx, &opts); err != nil {
		return nil, err
	}
	return v, nil
}

// connect connects to a socket that serves one client at a time. It fails with
// ErrBusy if there is one already, as far as that can be told.
func connect(ctx context.Context, t Target) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, defaultTimeout)
	defer cancel()
	// A connection that has to wait does harm: QEMU accepts it when the debugger
	// before it leaves, and stops the VM then, even if nobody is there any more. QEMU
	// needs a moment to see that one was closed.
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
	if errors.Is(err, fs.ErrPermission) {
		return nil, fmt.Errorf("%w: run as root or as QEMU's user", reason(err))
	}
	return c, err
}

// reason returns why a network operation failed, without the operation and the
// addresses, of which the error's reader knows.
func reason(err error) error {
	var op *net.OpError
	if errors.As(err, &op) {
		err = op.Err
	}
	var call *os.SyscallError
	if errors.As(err, &call) {
		err = call.Err
	}
	var dns *net.DNSError
	if errors.As(err, &dns) {
		err = errors.New(dns.Err)
	}
	return err
}

// absent reports whether err says that nobody listens at an address.
func absent(err error) bool {
	var dns *net.DNSError
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) || errors.As(err, &dns) && dns.IsNotFound
}

// graceOfDial is how long a caller of Dial who has given up may have to wait until the
// VM, which QEMU has stopped when we connected, is let go.
const graceOfDial = 500 * time.Millisecond

// open does the handshake and lets the VM run. On failure the connection is closed.
func (v *VM) open(ctx context.Context, opts *Options) (err error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	// If the caller gives up, begin ends early; if QEMU doesn't answer, so does the
	// connection.
	stop := context.AfterFunc(ctx, func() { time.AfterFunc(graceOfDial, func() { v.stub.c.Close() }) })
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
	if err := v.begin(ctx, opts); err != nil {
		if v.err == nil {
			err = errors.Join(err, v.detach())
		}
		return err
	}
	if err := v.settle(); err != nil {
		return err
	}
	go v.watch()
	return nil
}

// handshake finds out that a gdbstub is there. QEMU stops the VM when somebody
// connects.
func (v *VM) handshake() error {
	if err := v.stub.send(v.timeout, "qSupported:multiprocess+;vContSupported+"); err != nil {
		return fmt.Errorf("%w (%w)", ErrNotStub, reason(err))
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
		return fmt.Errorf("no answer, probably because %w: end that one first (gdb, vmprobes)", ErrBusy)
	case errors.Is(err, errProtocol), hungUp(err):
		return fmt.Errorf("%w (%w)", ErrNotStub, reason(err))
	case err != nil:
		return err
	}
	for f := range strings.SplitSeq(string(reply), ";") {
		if s, ok := strings.CutPrefix(f, "PacketSize="); ok {
			n, err := strconv.ParseUint(s, 16, 31)
			if err != nil || n < 64 {
				return fmt.Errorf("%w: packet size %.20q", errProtocol, s)
			}
			v.mread = int(min(n, maxPacket) / 2)
		}
		v.multi = v.multi || f == "multiprocess+"
		v.xml = v.xml || f == "qXfer:features:read+"
	}
	if v.mread == 0 {
		return fmt.Errorf("%w: it offers only %.200q", ErrNotStub, reply)
	}
	return nil
}

// begin makes the stub ready and finds out what VM this is.
func (v *VM) begin(ctx context.Context, opts *Options) error {
	if !v.xml {
		return fmt.Errorf("%w: it doesn't describe the guest's registers", ErrNotStub)
	}
	if err := v.clear(); err != nil {
		return err
	}
	if err := v.discover(ctx); err != nil {
		return err
	}
	var err error
	if v.direct, err = openDirect(v, opts); err != nil && opts.Fallback && v.err == nil {
		v.log.Debug("the guest's memory is read through the gdbstub", "why", err)
		err = nil
	}
	if err == nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return err
}

// clear removes the breakpoints that a dead predecessor left, under TCG those of
// one vCPU: that is a side effect of "?".
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

// discover reads what doesn't change, and sets stepping up.
func (v *VM) discover(ctx context.Context) (err error) {
	if v.layout, err = readLayout(v.xfer); err != nil {
		return err
	}
	if err := v.readThreads(); err != nil {
		return err
	}
	// Under TCG "?" is about the vCPU that "Hc" chooses (QEMU since 7.1,
	// tcg_remove_all_breakpoints).
	for _, t := range v.threads {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if len(v.threads) > 1 {
			if err := v.callOK("Hc" + t); err != nil {
				return err
			}
			if err := v.clear(); err != nil {
				return err
			}
		}
	}
	// Steps are to be without interrupts and timers, as far as the accelerator can.
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
	total, err := v.hmp("info memory_size_summary")
	if err != nil {
		return err
	}
	v.system = v.ram.system(parseTotal(total))
	v.info.RAM = v.system.end()
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
