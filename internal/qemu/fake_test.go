package qemu

import (
	"bufio"
	"cmp"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/x86"
)

// fakeStub speaks the stub's side of the protocol in one of QEMU's dialects,
// with one vCPU at a NOP.
type fakeStub struct {
	greeting string // sent on connect
	question string // answer to "?"
	version  string // answer to qGDBServerVersion
	sup      string // answer to qSupported
	kvm      bool
	rle      bool
	seen     func(packet string) // is called for each packet
	xml      string              // the target description, if another than usual
	threads  []string
	mute     string                                  // a packet that gets no answer
	noStop   bool                                    // an interrupt gets none
	trapped  bool                                    // an interrupt comes as a vCPU hits
	onCont   func(f *fakeStub, packet string) string // the stop reply, "" for none
	refuseZ0 bool
	before6  bool   // QEMU before 6.0 doesn't remove a breakpoint that the guest has overwritten
	saved    byte   // under the breakpoint, with KVM
	physical bool   // addresses are
	failM    int    // so many writes fail
	text     []byte // at fakeText
	regs     [608]byte

	c       net.Conn
	mu      sync.Mutex
	running bool
	unacked bool
	got     []string
	breaks  map[string]int
}

const fakeText = 0xffffffff81000000

func newFake() *fakeStub {
	f := &fakeStub{
		greeting: "T02thread:01;", question: "T05thread:p01.01;", threads: []string{"p01.01"},
		sup:    "PacketSize=1000;qXfer:features:read+;vContSupported+;multiprocess+",
		text:   []byte{0x0f, 0x1f, 0x44, 0x00, 0x00, 0x90, 0x90, 0x90},
		breaks: map[string]int{},
	}
	f.setReg(128, fakeText)
	f.setReg(204, 0x1000)
	f.setReg(188, 1<<31|1)
	f.setReg(212, 1<<5)
	f.setReg(228, 1<<10)
	return f
}

func (f *fakeStub) setReg(off int, v uint64) {
	for i := range 8 {
		f.regs[off+i] = byte(v >> (8 * i))
	}
}

// listen serves connections on a unix socket, one after the other as QEMU does.
func (f *fakeStub) listen(t *testing.T) string {
	dir, err := os.MkdirTemp("", "fake")
	require.NoError(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "s")
	l, err := net.Listen("unix", path)
	require.NoError(t, err)
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			f.serve(c)
		}
	}()
	return "qemu:" + path
}

func (f *fakeStub) send(data string) {
	if f.rle {
		// Every run of five becomes one with a count.
		for _, d := range hexDigits {
			data = strings.ReplaceAll(data, strings.Repeat(string(d), 5), string(d)+"*!")
		}
	}
	f.unacked = true
	f.c.Write(appendPacket(nil, data))
}

// stop reports a stop, as an interrupt or another's "stop" causes.
func (f *fakeStub) stop(reply string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.running = false
	f.send(reply)
}

func (f *fakeStub) serve(c net.Conn) {
	defer c.Close()
	f.mu.Lock()
	f.c = c
	f.running = false
	if f.greeting != "" {
		f.send(f.greeting)
	}
	f.mu.Unlock()
	var in []byte
	buf := make([]byte, 4096)
	for {
		n, err := c.Read(buf)
		if err != nil {
			return
		}
		f.mu.Lock()
		in = append(in, buf[:n]...)
		in = f.take(in)
		f.mu.Unlock()
	}
}

// take handles what has come, with QEMU's order of checks (gdb_read_byte).
func (f *fakeStub) take(in []byte) []byte {
	for len(in) > 0 {
		if f.unacked {
			if in[0] == '+' || in[0] == '$' {
				f.unacked = false
			}
			if in[0] != '$' {
				in = in[1:]
				continue
			}
		}
		if f.running {
			f.got = append(f.got, fmt.Sprintf("stop by %q", in[0]))
			in = in[1:]
			f.running = false
			switch {
			case f.noStop:
				f.running = true
			case f.trapped:
				f.send("T05thread:p01.01;")
			default:
				f.send("T02thread:p01.01;")
			}
			continue
		}
		if in[0] != '$' {
			in = in[1:]
			continue
		}
		end := strings.IndexByte(string(in), '#')
		if end < 0 || len(in) < end+3 {
			return in
		}
		packet := string(in[1:end])
		in = in[end+3:]
		f.c.Write([]byte("+"))
		f.got = append(f.got, packet)
		if f.seen != nil {
			f.seen(packet)
		}
		if f.mute == "" || !strings.HasPrefix(packet, f.mute) {
			f.handle(packet)
		}
	}
	return nil
}

const fakeXML = `<?xml version="1.0"?><!DOCTYPE target SYSTEM "gdb-target.dtd"><target><architecture>i386:x86-64</architecture><xi:include href="64bit.xml"/></target>`

// fakeFeature describes QEMU's "g" packet: the order that qemu.md has.
func fakeFeature() string {
	var b strings.Builder
	b.WriteString(`<feature name="org.gnu.gdb.i386.core">`)
	reg := func(bits int, names ...string) {
		for _, n := range names {
			fmt.Fprintf(&b, `<reg name="%s" bitsize="%d" type="int"/>`, n, bits)
		}
	}
	reg(64, strings.Fields("rax rbx rcx rdx rsi rdi rbp rsp r8 r9 r10 r11 r12 r13 r14 r15 rip")...)
	reg(32, strings.Fields("eflags cs ss ds es fs gs")...)
	b.WriteString(`<!-- <reg name="cs_base" bitsize="64"/> -->`)
	reg(64, strings.Fields("fs_base gs_base k_gs_base cr0 cr2 cr3 cr4 cr8 efer")...)
	b.WriteString(`<reg name="st0" bitsize="80"/></feature>`)
	return b.String()
}

func (f *fakeStub) handle(p string) {
	cmd, arg, _ := strings.Cut(p, ",")
	switch {
	case strings.HasPrefix(p, "qSupported"):
		f.send(f.sup)
	case p == "?":
		clear(f.breaks)
		f.send(f.question)
	case strings.HasPrefix(p, "qXfer:features:read:"):
		doc := cmp.Or(f.xml, fakeXML)
		if strings.Contains(p, "64bit.xml") {
			doc = fakeFeature()
		}
		var off, n int
		fmt.Sscanf(p[strings.LastIndexByte(p, ':')+1:], "%x,%x", &off, &n)
		part := doc[min(off, len(doc)):min(off+n, len(doc))]
		more := "m"
		if off+n >= len(doc) {
			more = "l"
		}
		f.send(more + part)
	case p == "qfThreadInfo":
		f.send("m" + f.threads[0])
	case p == "qsThreadInfo":
		if n := len(f.got); n > 1 && f.got[n-2] == "qfThreadInfo" && len(f.threads) > 1 {
			f.send("m" + strings.Join(f.threads[1:], ","))
			return
		}
		f.send("l")
	case p == "qqemu.sstepbits":
		f.send("ENABLE=1,NOIRQ=2,NOTIMER=4")
	case p == "qGDBServerVersion":
		f.send(f.version)
	case cmd == "qRcmd":
		b, _ := hex.DecodeString(arg)
		f.hmp(string(b))
	case strings.HasPrefix(p, "Z0"):
		if f.refuseZ0 {
			f.send("E22")
			return
		}
		if b := f.byteAt(p); f.kvm && f.breaks[p[1:]] == 0 && b != nil {
			f.saved, *b = *b, int3 // kvm_arch_insert_sw_breakpoint
		}
		f.breaks[p[1:]]++
		f.send("OK")
	case p[0] == 'Z':
		if len(f.breaks) >= 4 {
			f.send("E1c")
			return
		}
		f.breaks[p[1:]]++
		f.send("OK")
	case p[0] == 'z':
		if f.breaks[p[1:]] == 0 {
			f.send("E22")
			return
		}
		if b := f.byteAt(p); f.kvm && p[1] == '0' && b != nil {
			switch { // kvm_arch_remove_sw_breakpoint
			case *b == int3:
				*b = f.saved
			case f.before6:
				f.send("E22")
				return
			}
		}
		delete(f.breaks, p[1:])
		f.send("OK")
	case p[0] == 'M':
		if f.physical || f.failM > 0 {
			f.failM--
			f.send("E14")
			return
		}
		var b byte
		fmt.Sscanf(p[strings.IndexByte(p, ':')+1:], "%02x", &b)
		*f.byteAt(p) = b
		f.send("OK")
	case p == "g":
		f.send(hex.EncodeToString(f.regs[:]))
	case p[0] == 'm':
		var addr, n uint64
		fmt.Sscanf(p, "m%x,%x", &addr, &n)
		if addr < fakeText || addr+n > fakeText+uint64(len(f.text)) {
			f.send("E14")
			return
		}
		f.send(hex.EncodeToString(f.text[addr-fakeText:][:n]))
	case p[0] == 'p':
		f.send(hex.EncodeToString(f.regs[128:136]))
	case p[0] == 'c', strings.HasPrefix(p, "vCont;"):
		f.running = true
		if f.onCont != nil {
			if reply := f.onCont(f, p); reply != "" {
				f.running = false
				f.send(reply)
			}
		}
	case p[0] == 'D':
		// QEMU's handle_detach: it wants the process if it knows of several.
		if strings.Contains(f.sup, "multiprocess+") && !strings.HasPrefix(p, "D;") {
			f.send("E22")
			return
		}
		f.send("OK")
		f.running = true
	case strings.HasPrefix(p, "Qqemu.PhyMemMode:"):
		f.physical = p[len(p)-1] == '1'
		f.send("OK")
	case p[0] == 'P', p[0] == 'H', strings.HasPrefix(p, "Qqemu."):
		f.send("OK")
	default:
		f.send("")
	}
}

// byteAt is the byte of text at the address that a packet begins with, or nil.
func (f *fakeStub) byteAt(p string) *byte {
	var addr uint64
	_, after, ok := strings.Cut(p, ",")
	if !ok || p[0] == 'M' {
		after = p[1:]
	}
	fmt.Sscanf(after, "%x", &addr)
	if addr -= fakeText; addr >= uint64(len(f.text)) {
		return nil
	}
	return &f.text[addr]
}

func (f *fakeStub) hmp(cmd string) {
	out := ""
	switch cmd {
	case "info version":
		out = "7.2.22Debian 1:7.2+dfsg-7+deb12u18\r\n"
	case "info kvm":
		out = "kvm support: disabled\r\n"
		if f.kvm {
			out = "kvm support: enabled\r\n"
		}
	case "info name":
		out = "fake\r\n"
	}
	if out != "" {
		f.send("O" + hex.EncodeToString([]byte(out)))
	}
	f.send("OK")
}

func (f *fakeStub) packets() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]string(nil), f.got...)
}

func (f *fakeStub) state() (running bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.running
}

func (f *fakeStub) armed() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.breaks)
}

var fast = &Options{Timeout: 300 * time.Millisecond}

// dialects are the handshakes of QEMU's versions, as measured.
var dialects = map[string]func(*fakeStub){
	"7.2":              func(*fakeStub) {},
	"7.2, was stopped": func(f *fakeStub) { f.greeting = "" },
	"11": func(f *fakeStub) {
		f.greeting, f.question = "", "T05core:01;"
		f.version = "name:qemu-system-x86_64;version:11.1.3;"
		f.sup = "PacketSize=20020;qXfer:features:read+;vContSupported+;multiprocess+"
	},
	"old": func(f *fakeStub) {
		f.question, f.threads = "S05", []string{"1"}
		f.sup = "PacketSize=1000;qXfer:features:read+"
	},
	"run lengths": func(f *fakeStub) { f.rle = true },
	"3 vCPUs":     func(f *fakeStub) { f.threads = []string{"p01.01", "p01.02", "p02.03"} },
}

func TestDialects(t *testing.T) {
	for name, change := range dialects {
		t.Run(name, func(t *testing.T) {
			f := newFake()
			change(f)
			vm, err := Dial(t.Context(), f.listen(t), fast)
			require.NoError(t, err)
			info := vm.Info()
			assert.Equal(t, "fake", info.Name)
			assert.Equal(t, len(f.threads), info.VCPUs)
			if f.version == "" {
				assert.Equal(t, "7.2.22", info.Version)
			} else {
				assert.Equal(t, "11.1.3", info.Version)
			}
			cpus, err := vm.CPUs()
			require.NoError(t, err)
			require.Len(t, cpus, len(f.threads))
			assert.Equal(t, uint64(fakeText), cpus[0].IP)
			assert.EqualValues(t, 0x1000, cpus[0].CR3)
			require.NoError(t, vm.Close())
			for _, p := range f.packets() {
				if strings.HasPrefix(p, "stop by") {
					assert.Equal(t, `stop by '\x03'`, p, "only an interrupt may stop the VM")
				}
			}
			assert.True(t, f.running, "the VM runs afterwards")
		})
	}
}

func TestDialErrors(t *testing.T) {
	for name, test := range map[string]struct {
		change func(*fakeStub)
		want   error
	}{
		"busy":       {func(f *fakeStub) { f.greeting, f.mute = "", "qSupported" }, ErrBusy},
		"HMP":        {func(f *fakeStub) { f.greeting = "" }, ErrNotStub},
		"ended":      {func(f *fakeStub) { f.question = "W00" }, breakpoint.ErrGone},
		"no XML":     {func(f *fakeStub) { f.sup = "PacketSize=1000" }, ErrNotStub},
		"no answer":  {func(f *fakeStub) { f.mute = "qfThreadInfo" }, breakpoint.ErrGone},
		"bad size":   {func(f *fakeStub) { f.sup = "PacketSize=zz" }, errProtocol},
		"bad thread": {func(f *fakeStub) { f.threads = []string{"p01;c"} }, errProtocol},
		"bad XML":    {func(f *fakeStub) { f.xml = "<target" }, nil},
		"32-bit":     {func(f *fakeStub) { f.xml = `<target><reg name="eax" bitsize="32"/></target>` }, errors.ErrUnsupported},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFake()
			test.change(f)
			target := f.listen(t)
			if name == "HMP" {
				path := filepath.Join(t.TempDir(), "hmp")
				l, err := net.Listen("unix", path)
				require.NoError(t, err)
				defer l.Close()
				go func() {
					for c, err := l.Accept(); err == nil; c, err = l.Accept() {
						c.Write([]byte("QEMU 7.2.22 monitor - type 'help' for more information\r\n(qemu) "))
					}
				}()
				target = "qemu:" + path
			}
			_, err := Dial(t.Context(), target, fast)
			require.Error(t, err)
			if test.want != nil {
				require.ErrorIs(t, err, test.want)
			}
			t.Log(err)
			// What was a VM's stub has let it go.
			switch name {
			case "no XML", "bad thread", "bad XML", "32-bit":
				assert.True(t, f.state(), "the VM runs")
			}
		})
	}
	_, err := Dial(t.Context(), "qemu:/nonexistent/sock", nil)
	require.ErrorIs(t, err, ErrNoStub)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	f := newFake()
	f.mute = "g" // never sent by Dial
	f.mute = "qSupported"
	f.greeting = ""
	_, err = Dial(ctx, f.listen(t), nil)
	require.ErrorIs(t, err, context.DeadlineExceeded)
}

// TestDialGivenUp: a caller who gives up at any moment gets the VM running, and soon.
func TestDialGivenUp(t *testing.T) {
	all := newFake()
	vm, err := Dial(t.Context(), all.listen(t), fast)
	require.NoError(t, err)
	require.NoError(t, vm.Close())
	for i := range all.packets() {
		f := newFake()
		ctx, cancel := context.WithCancel(t.Context())
		n := 0
		f.seen = func(string) {
			if n == i {
				cancel()
			}
			n++
		}
		begin := time.Now()
		vm, err := Dial(ctx, f.listen(t), nil)
		if err == nil { // all was done
			require.NoError(t, vm.Close())
		} else {
			require.ErrorIs(t, err, context.Canceled)
		}
		require.Less(t, time.Since(begin), 5*time.Second)
		require.Eventually(t, f.state, time.Second, time.Millisecond, "the VM is stopped after %d packets", i)
		cancel()
	}
	// A stub that doesn't answer doesn't keep the caller.
	for _, packet := range []string{"qSupported", "qfThreadInfo"} {
		f := newFake()
		ctx, cancel := context.WithCancel(t.Context())
		f.greeting, f.mute = "", packet
		f.seen = func(p string) {
			if strings.HasPrefix(p, packet) {
				cancel()
			}
		}
		begin := time.Now()
		_, err := Dial(ctx, f.listen(t), nil)
		require.ErrorIs(t, err, context.Canceled)
		require.Less(t, time.Since(begin), 3*time.Second)
	}
}

// nop is the instruction at fakeText.
func nop(t *testing.T) *x86.Insn {
	in, err := x86.Decode([]byte{0x0f, 0x1f, 0x44, 0x00, 0x00})
	require.NoError(t, err)
	return &in
}

func attachFake(t *testing.T, f *fakeStub) (*VM, *Driver) {
	t.Helper()
	vm, err := Dial(t.Context(), f.listen(t), fast)
	require.NoError(t, err)
	t.Cleanup(func() { vm.Close() })
	d, err := vm.Attach(t.Context())
	require.NoError(t, err)
	d.SetKernelRoot(0x1000)
	return vm, d
}

// armFake plants a breakpoint without the page tables that the fake hasn't got.
func armFake(t *testing.T, d *Driver) {
	t.Helper()
	v := d.vm
	v.mu.Lock()
	defer v.mu.Unlock()
	require.NoError(t, d.held(func() error { return v.plant(fakeText, nop(t)) }))
	d.points[fakeText] = &point{insn: *nop(t)}
}

// TestHitPackets checks what is sent for a hit, and that nothing else stops a VM
// that runs.
func TestHitPackets(t *testing.T) {
	for _, test := range []struct {
		name   string
		change func(*fakeStub)
		answer func(*Driver, *breakpoint.Stop) error
		want   []string
	}{
		{"nop", nil, func(d *Driver, s *breakpoint.Stop) error {
			s.Regs.IP += 5
			return d.Resume(s)
		}, []string{"g", "cffffffff81000005"}},
		{"register", nil, func(d *Driver, s *breakpoint.Stop) error {
			s.Regs.IP += 5
			s.Regs.AX = 0x0102
			return d.Resume(s)
		}, []string{"g", "P0=0201000000000000", "cffffffff81000005"}},
		{"step", nil, func(d *Driver, s *breakpoint.Stop) error { return d.StepOn(s, nil) },
			[]string{"g", "vCont;s:p01.01", "c"}},
		{"step, registers", nil, func(d *Driver, s *breakpoint.Stop) error {
			s.Regs.BX = 1
			return d.StepOn(s, nil)
		}, []string{"g", "P1=0100000000000000", "vCont;s:p01.01", "c"}},
		{"step, KVM", func(f *fakeStub) { f.kvm = true }, func(d *Driver, s *breakpoint.Stop) error { return d.StepOn(s, nil) },
			[]string{"g", "z0,ffffffff81000000,1", "vCont;s:p01.01", "Z0,ffffffff81000000,1", "c"}},
		{"step, 7.2", func(f *fakeStub) { f.version = "" },
			func(d *Driver, s *breakpoint.Stop) error { return d.StepOn(s, nil) },
			[]string{"g", "vCont;s:p01.01", "p10", "c"}},
		{"step, look", nil, func(d *Driver, s *breakpoint.Stop) error {
			if err := d.StepOver(s, fakeText); err != nil {
				return err
			}
			if err := d.Wait(context.Background(), s); err != nil || s.Reason != breakpoint.Stepped {
				return fmt.Errorf("%v %v", s.Reason, err)
			}
			return d.Resume(s)
		}, []string{"g", "vCont;s:p01.01", "g", "c"}},
		{"reinject", nil, func(d *Driver, s *breakpoint.Stop) error { return d.Reinject(s) }, []string{"g", "vCont;s:p01.01", "c"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			f := newFake()
			f.version = "name:qemu-system-x86_64;version:11.1.3;"
			if test.change != nil {
				test.change(f)
			}
			f.onCont = func(f *fakeStub, p string) string {
				if strings.HasPrefix(p, "vCont;s") {
					f.setReg(128, fakeText+5)
					return "T05thread:p01.01;"
				}
				return ""
			}
			_, d := attachFake(t, f)
			armFake(t, d)
			d.vm.mu.Lock()
			d.points[fakeText].checked = time.Now().Add(time.Hour)
			d.vm.mu.Unlock()
			for !f.state() {
				time.Sleep(time.Millisecond)
			}
			before := len(f.packets())
			go func() {
				time.Sleep(10 * time.Millisecond)
				f.stop("T05thread:p01.01;")
			}()
			var s breakpoint.Stop
			require.NoError(t, d.Wait(t.Context(), &s))
			require.Equal(t, breakpoint.Hit, s.Reason)
			require.Equal(t, uint64(fakeText), s.Regs.IP)
			require.NoError(t, test.answer(d, &s))
			for range 1000 {
				if len(f.packets()) >= before+len(test.want) {
					break
				}
				time.Sleep(time.Millisecond)
			}
			assert.Equal(t, test.want, f.packets()[before:])
			require.NoError(t, d.Close())
			assert.Zero(t, f.armed())
		})
	}
}

// TestUnmovedStep: a step that ended where it began is made again, and the stop
// in between is no hit.
func TestUnmovedStep(t *testing.T) {
	f := newFake()
	steps, conts := 0, 0
	f.onCont = func(f *fakeStub, p string) string {
		if strings.HasPrefix(p, "vCont;s") {
			if steps++; steps == 2 {
				f.setReg(128, fakeText+5)
			}
			return "T05thread:p01.01;"
		}
		if conts++; steps == 1 {
			return "T05thread:p01.01;" // it traps at once
		}
		return ""
	}
	_, d := attachFake(t, f)
	armFake(t, d)
	f.hitSoon()
	var s breakpoint.Stop
	require.NoError(t, d.Wait(t.Context(), &s))
	require.NoError(t, d.StepOn(&s, nil))
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	require.ErrorIs(t, d.Wait(ctx, &s), context.DeadlineExceeded)
	assert.Equal(t, 2, steps)
}

// TestUnmovedElsewhere: between a step that wasn't made and the next stop, an
// interrupt's handler comes to the breakpoint on the same vCPU, which is a hit, and
// the task moves to another vCPU, which is none.
func TestUnmovedElsewhere(t *testing.T) {
	const sp, handlerSP, gsBase = 56, 0xffff888000001f00, 172
	f := newFake()
	f.threads = []string{"p01.01", "p01.02"}
	f.setReg(sp, 0xffff888000002000)
	var stepped []string
	var conts int
	_, d := attachFake(t, f)
	armFake(t, d)
	for !f.state() {
		time.Sleep(time.Millisecond)
	}
	f.mu.Lock()
	f.onCont = func(f *fakeStub, p string) string {
		if thread, ok := strings.CutPrefix(p, "vCont;s:"); ok {
			stepped = append(stepped, thread)
			if len(stepped) > 1 {
				f.setReg(128, fakeText+5)
			}
			return "T05thread:" + thread + ";"
		}
		conts++
		switch conts {
		case 1: // the handler
			f.setReg(sp, handlerSP)
			return "T05thread:p01.01;"
		case 2: // the task, interrupted there, on another vCPU
			f.setReg(128, fakeText)
			f.setReg(sp, 0xffff888000002000)
			f.setReg(gsBase, 0xffff88803e000000)
			f.regs[136+2] |= x86.FlagRF >> 16
			return "T05thread:p01.02;"
		case 3: // and once more: another execution with the same registers
			f.setReg(128, fakeText)
			return "T05thread:p01.02;"
		}
		return ""
	}
	f.mu.Unlock()
	f.hitSoon()
	for i, want := range []breakpoint.Stop{
		{VCPU: 0, Regs: x86.Regs{SP: 0xffff888000002000}},
		{VCPU: 0, Regs: x86.Regs{SP: handlerSP}},
		{VCPU: 1, Regs: x86.Regs{SP: 0xffff888000002000}},
	} {
		var s breakpoint.Stop
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		require.NoError(t, d.Wait(ctx, &s))
		cancel()
		require.Equal(t, breakpoint.Hit, s.Reason)
		require.Equal(t, want.VCPU, s.VCPU, "hit %d", i)
		require.Equal(t, want.Regs.SP, s.Regs.SP, "hit %d", i)
		require.NoError(t, d.StepOn(&s, nil))
	}
	var s breakpoint.Stop
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	require.ErrorIs(t, d.Wait(ctx, &s), context.DeadlineExceeded)
	f.mu.Lock()
	defer f.mu.Unlock()
	assert.Equal(t, []string{"p01.01", "p01.01", "p01.02", "p01.02"}, stepped)
}

// TestToItselfIndirectly: an indirect jump to itself looks like a step that isn't
// made; it is stepped for good before long.
func TestToItselfIndirectly(t *testing.T) {
	f := newFake()
	steps := 0
	_, d := attachFake(t, f)
	armFake(t, d)
	for !f.state() {
		time.Sleep(time.Millisecond)
	}
	f.mu.Lock()
	f.onCont = func(f *fakeStub, p string) string {
		if strings.HasPrefix(p, "vCont;s") {
			steps++
		}
		return "T05thread:p01.01;"
	}
	f.mu.Unlock()
	f.hitSoon()
	for i := range 3 {
		var s breakpoint.Stop
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		require.NoError(t, d.Wait(ctx, &s), "hit %d", i)
		cancel()
		if i == 2 {
			require.NoError(t, d.StepOver(&s, fakeText))
			require.NoError(t, d.Wait(t.Context(), &s))
			require.Equal(t, breakpoint.Stepped, s.Reason)
			require.Equal(t, uint64(fakeText), s.Regs.IP)
			break
		}
		require.NoError(t, d.StepOn(&s, nil))
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	assert.LessOrEqual(t, steps, 3*maxTries)
}

// TestGuestLost: whatever ends a session ends Wait with an error that says what
// happened, and Close doesn't hang.
func TestGuestLost(t *testing.T) {
	for reply, want := range map[string]string{
		"W00":               "the VM has ended",
		"T02thread:p01.01;": "somebody has paused",
		"T03thread:p01.01;": "shut down",
		"T06thread:p01.01;": "panicked",
		"T17thread:p01.01;": "disk",
		"T18thread:p01.01;": "migrating",
		"T1fthread:p01.01;": "signal 31",
		"Thello":            "not what a gdbstub sends",
		"":                  "closed the connection",
	} {
		t.Run(reply, func(t *testing.T) {
			f := newFake()
			vm, d := attachFake(t, f)
			armFake(t, d)
			go func() {
				time.Sleep(10 * time.Millisecond)
				if reply == "" {
					f.c.Close()
					return
				}
				f.stop(reply)
			}()
			var s breakpoint.Stop
			err := d.Wait(t.Context(), &s)
			require.ErrorIs(t, err, breakpoint.ErrGone)
			require.ErrorContains(t, err, want)
			require.ErrorIs(t, d.Freeze(), breakpoint.ErrGone)
			require.ErrorIs(t, d.RemoveBreak(fakeText), breakpoint.ErrGone)
			d.Close()
			require.NoError(t, vm.Close())
			if strings.HasPrefix(reply, "T0") || strings.HasPrefix(reply, "T1") {
				assert.Zero(t, f.armed(), "breakpoints are removed")
				f.mu.Lock()
				assert.False(t, f.running, "what another has stopped stays so")
				f.mu.Unlock()
			}
		})
	}
}

// TestNoAnswer: a QEMU that hangs ends a call, not the caller.
func TestNoAnswer(t *testing.T) {
	f := newFake()
	vm, d := attachFake(t, f)
	f.mu.Lock()
	f.noStop = true
	f.mu.Unlock()
	waited := make(chan error)
	go func() {
		var s breakpoint.Stop
		waited <- d.Wait(context.Background(), &s)
	}()
	time.Sleep(20 * time.Millisecond)
	err := d.Freeze()
	require.ErrorIs(t, err, breakpoint.ErrGone)
	require.ErrorContains(t, err, "hasn't answered")
	require.ErrorIs(t, <-waited, breakpoint.ErrGone)
	require.NoError(t, vm.Close())
}

// hitSoon has a vCPU come to a breakpoint while somebody waits for that.
func (f *fakeStub) hitSoon() {
	go func() {
		time.Sleep(10 * time.Millisecond)
		f.stop("T05thread:p01.01;")
	}()
}

// TestRewritten: code that isn't what it was is not stepped as if it were.
func TestRewritten(t *testing.T) {
	f := newFake()
	_, d := attachFake(t, f)
	armFake(t, d)
	f.mu.Lock()
	f.text[0] = 0xe8
	f.mu.Unlock()
	f.hitSoon()
	var s breakpoint.Stop
	err := d.Wait(t.Context(), &s)
	require.ErrorIs(t, err, breakpoint.ErrTextChanged)
	assert.Zero(t, f.armed())
	require.ErrorIs(t, d.RemoveBreak(fakeText), breakpoint.ErrTextChanged)
	require.NoError(t, d.RemoveBreak(fakeText))
}

// TestNarrow: the registers of qemu-system-i386 are read, in which nothing can be probed.
func TestNarrow(t *testing.T) {
	f := newFake()
	f.regs = [608]byte{}
	var xml strings.Builder
	off := 0
	for _, r := range []struct {
		name  string
		value uint32
	}{
		{"eax", 1}, {"ecx", 2}, {"edx", 3}, {"ebx", 4}, {"esp", 5}, {"ebp", 6}, {"esi", 7}, {"edi", 8}, {"eip", 0xc1234567}, {"eflags", 2},
		{"cs", 0x60}, {"ss", 0x68}, {"ds", 0x7b}, {"es", 0x7b}, {"fs", 0xd8}, {"gs", 0}, {"fs_base", 0xd1000000}, {"gs_base", 9}, {"k_gs_base", 0},
		{"cr0", 0x80050033}, {"cr2", 0x1234}, {"cr3", 0x1211ce0}, {"cr4", 0x6f0}, {"cr8", 0}, {"efer", 0x800},
	} {
		fmt.Fprintf(&xml, `<reg name="%s" bitsize="32"/>`, r.name)
		for i := range 4 {
			f.regs[off+i] = byte(r.value >> (8 * i))
		}
		off += 4
	}
	f.xml = "<target>" + xml.String() + "</target>"
	vm, err := Dial(t.Context(), f.listen(t), nil)
	require.NoError(t, err)
	all, err := vm.CPUs()
	require.NoError(t, err)
	require.Equal(t, []CPU{{CR0: 0x80050033, CR2: 0x1234, CR3: 0x1211ce0, CR4: 0x6f0, EFER: 0x800, IP: 0xc1234567, GSBase: 9}}, all)
	_, err = vm.Attach(t.Context())
	require.ErrorIs(t, err, errors.ErrUnsupported)
	require.NoError(t, vm.Close())

	f = newFake()
	f.xml = "<target>" + strings.ReplaceAll(xml.String(), "cr3", "cr9") + "</target>"
	_, err = Dial(t.Context(), f.listen(t), nil)
	require.ErrorIs(t, err, errors.ErrUnsupported)
	require.ErrorContains(t, err, "no register cr3")
}

// TestLeftLongMode: a hit of a vCPU in 32-bit mode is none of the kernel's that was probed.
func TestLeftLongMode(t *testing.T) {
	f := newFake()
	_, d := attachFake(t, f)
	armFake(t, d)
	f.mu.Lock()
	f.setReg(228, 0)
	f.mu.Unlock()
	f.hitSoon()
	var s breakpoint.Stop
	err := d.Wait(t.Context(), &s)
	var c *breakpoint.ChangedError
	require.ErrorAs(t, err, &c)
	require.Equal(t, []uint64{fakeText}, c.Addrs)
	require.ErrorContains(t, err, "32-bit")
	assert.Zero(t, f.armed())
}

// TestDebugRegisters: where Z0 isn't possible a debug register is taken.
func TestDebugRegisters(t *testing.T) {
	f := newFake()
	f.kvm, f.refuseZ0 = true, true
	_, d := attachFake(t, f)
	f.mu.Lock()
	f.text = make([]byte, 64)
	for i := range f.text {
		f.text[i] = 0x90
	}
	f.mu.Unlock()
	in, err := x86.Decode([]byte{0x90})
	require.NoError(t, err)
	// A pending stop lets Read go through the vCPU's own tables.
	v := d.vm
	v.mu.Lock()
	require.NoError(t, v.halt())
	require.NoError(t, v.readRegs(v.threads[0]))
	v.holdTrap()
	v.mu.Unlock()
	for i := range 4 {
		require.NoError(t, d.InsertBreak(fakeText+uint64(i), &in))
	}
	err = d.InsertBreak(fakeText+4, &in)
	require.ErrorContains(t, err, "four debug registers are in use")
	require.Error(t, d.InsertBreak(fakeText, &in), "twice")
	require.NoError(t, d.Close())
	assert.Zero(t, f.armed())
}

// TestRewriting: with KVM, a breakpoint that the guest is about to overwrite begins with an int3
// of the guest's own, which stays when ours is removed, however that is done. One that it has
// overwritten is out.
func TestRewriting(t *testing.T) {
	rewritten := []byte{int3, 0x01, 0x02, 0x03, 0x04, 0x90}
	other := []byte{0xe9, 0x01, 0x02, 0x03, 0x04, 0x90}
	for _, test := range []struct {
		name  string
		text  []byte // that the guest has there by then
		after []byte
		qemu5 bool
		failM int
		err   error // of RemoveBreak
	}{
		{"as it was", []byte{int3, 0x1f, 0x44, 0, 0, 0x90}, []byte{0x0f, 0x1f, 0x44, 0, 0, 0x90}, false, 0, nil},
		{"its tail is written", rewritten, rewritten, false, 0, nil},
		{"its tail is written, and that fails", rewritten, rewritten, false, 1, nil},
		{"all of it", other, other, false, 0, breakpoint.ErrTextChanged},
		{"all of it, QEMU 5", other, other, true, 0, breakpoint.ErrTextChanged},
	} {
		for _, how := range []string{"remove", "close"} {
			t.Run(test.name+"/"+how, func(t *testing.T) {
				f := newFake()
				f.kvm, f.before6 = true, test.qemu5
				vm, d := attachFake(t, f)
				d.SetKernelRoot(0) // the fake has no page tables
				armFake(t, d)
				f.mu.Lock()
				require.Equal(t, byte(int3), f.text[0])
				copy(f.text, test.text)
				f.failM = test.failM
				f.mu.Unlock()
				d.vm.mu.Lock()
				require.NoError(t, d.held(func() error { return d.vm.physical(1) })) // as after a read
				d.vm.mu.Unlock()
				if test.failM > 0 {
					if how == "remove" {
						require.Error(t, d.RemoveBreak(fakeText))
					} else {
						require.Error(t, d.Close())
					}
				}
				if how == "remove" {
					require.ErrorIs(t, d.RemoveBreak(fakeText), test.err)
					require.NoError(t, d.RemoveBreak(fakeText))
				}
				require.NoError(t, d.Close())
				require.NoError(t, vm.Close())
				assert.Equal(t, test.after, f.text[:6])
				if !test.qemu5 {
					assert.Zero(t, f.armed())
				}
			})
		}
	}
}

// TestStuck: QEMU 5 doesn't remove a breakpoint that the guest has overwritten, and takes an int3
// that the guest has there afterwards for it. The guest gets that all the same.
func TestStuck(t *testing.T) {
	f := newFake()
	f.kvm, f.before6 = true, true
	_, d := attachFake(t, f)
	d.SetKernelRoot(0)
	armFake(t, d)
	f.mu.Lock()
	f.text[0] = 0xe9
	f.mu.Unlock()
	require.ErrorIs(t, d.RemoveBreak(fakeText), breakpoint.ErrTextChanged)
	require.NotZero(t, f.armed())
	v := d.vm
	v.mu.Lock()
	require.ErrorIs(t, v.plant(fakeText, nop(t)), breakpoint.ErrTextChanged)
	v.mu.Unlock()
	f.mu.Lock()
	f.text[0] = int3
	f.mu.Unlock()
	for !f.state() {
		time.Sleep(time.Millisecond)
	}
	f.stop("T05thread:p01.01;")
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for f.armed() != 0 && ctx.Err() == nil {
		short, end := context.WithTimeout(ctx, 5*time.Millisecond)
		require.ErrorIs(t, d.Wait(short, new(breakpoint.Stop)), context.DeadlineExceeded)
		end()
	}
	assert.Zero(t, f.armed())
	f.mu.Lock()
	assert.Equal(t, byte(int3), f.text[0])
	f.mu.Unlock()
	require.NoError(t, d.Close())
}

func TestToItself(t *testing.T) {
	for code, want := range map[string]bool{
		"\xe2\xfe":                 true, // loop .
		"\xe2\xfc":                 false,
		"\xe8\xfb\xff\xff\xff":     true, // call .
		"\xe8\xfa\xff\xff\xff":     false,
		"\x0f\x84\xfa\xff\xff\xff": true, // je .
		"\xc3":                     false,
		"\x6a\xfe":                 false, // push -2
	} {
		in, err := x86.Decode([]byte(code))
		require.NoError(t, err)
		assert.Equal(t, want, (&point{insn: in}).toItself(), "% x", code)
	}
}

func TestParseTarget(t *testing.T) {
	for name, want := range map[string]Target{
		"qemu:/run/vm.gdb":         {"unix", "/run/vm.gdb", false},
		"qemu:./vm.gdb":            {"unix", "./vm.gdb", false},
		"qemu:unix:/run/vm.gdb":    {"unix", "/run/vm.gdb", false},
		"qemu:localhost:1234":      {"tcp", "localhost:1234", false},
		"qemu:tcp::1234":           {"tcp", "localhost:1234", false},
		"qemu::1234":               {"tcp", "localhost:1234", false},
		"qemu:[::1]:1234":          {"tcp", "[::1]:1234", false},
		"qemu+monitor:/run/vm.mon": {"unix", "/run/vm.mon", true},
	} {
		got, err := parseTarget(name)
		require.NoError(t, err, name)
		assert.Equal(t, want, got, name)
		again, err := parseTarget(got.String())
		require.NoError(t, err)
		assert.Equal(t, got, again)
	}
	for _, name := range []string{"", "qemu", "qemu:", "xen:guest", "qemu:vm", "qemu:host:", "qemu:host:port:1", "qemu:a/b",
		"qemu:/run/vm,server=on", "qemu:/a\x00", "qemu:host:99999999", "qemu+monitor:"} {
		_, err := parseTarget(name)
		assert.ErrorIs(t, err, ErrTarget, name)
	}
}

func TestParseName(t *testing.T) {
	direct := Options{ProcMem: true, Fallback: true} // as package target has it
	for name, want := range map[string]struct {
		target Target
		opts   Options
	}{
		"qemu:/run/vm.gdb":                        {Target{"unix", "/run/vm.gdb", false}, direct},
		"qemu:/run/vm.gdb?debugregs":              {Target{"unix", "/run/vm.gdb", false}, Options{ProcMem: true, Fallback: true, DebugRegisters: true}},
		"qemu:/run/vm.gdb?ram=/dev/shm/vm":        {Target{"unix", "/run/vm.gdb", false}, Options{RAM: "/dev/shm/vm"}},
		"qemu:/run/vm.gdb?ram=./a=b?c":            {Target{"unix", "/run/vm.gdb", false}, Options{RAM: "./a=b?c"}},
		"qemu::1234?pid=123&debugregs":            {Target{"tcp", "localhost:1234", false}, Options{ProcMem: true, PID: 123, DebugRegisters: true}},
		"qemu+monitor:/run/vm.mon?gdb=/run/x":     {Target{"unix", "/run/vm.mon", true}, Options{ProcMem: true, Fallback: true, GDB: "/run/x"}},
		"qemu+monitor:[::1]:44?gdb=/x&timeout=2m": {Target{"tcp", "[::1]:44", true}, Options{ProcMem: true, Fallback: true, GDB: "/x", Timeout: 2 * time.Minute}},
	} {
		opts := direct
		got, err := parseName(name, &opts)
		require.NoError(t, err, name)
		assert.Equal(t, want.target, got, name)
		assert.Equal(t, want.opts, opts, name)
	}
	for _, name := range []string{
		"qemu:?debugregs", "qemu:/x?", "qemu:/x?&", "qemu:/x?debugregs&", "qemu:/x?debugregs=1", "qemu:/x?debugregs&debugregs",
		"qemu:/x?debugreg", "qemu:/x?DEBUGREGS", "qemu:/x? debugregs", "qemu:/x?ram", "qemu:/x?ram=", "qemu:/x?ram=vm", "qemu:/x?pid=", "qemu:/x?pid=0",
		"qemu:/x?pid=-1", "qemu:/x?pid=1x", "qemu:/x?pid=99999999999", "qemu:/x?ram=/a&pid=1", "qemu:/x?pid=1&ram=/a", "qemu:/x?gdb=/y",
		"qemu+monitor:/x?gdb=y", "qemu:/x?timeout=5", "qemu:/x?timeout=-1s", "qemu:/x?hole=pc",
	} {
		_, err := parseName(name, new(Options))
		assert.ErrorIs(t, err, ErrTarget, name)
	}
	_, err := parseName("qemu:/x?hole=pc", new(Options))
	for _, option := range []string{`"hole=pc"`, "ram=", "pid=", "debugregs", "timeout=", "gdb="} {
		assert.ErrorContains(t, err, option)
	}
}

func FuzzParseName(f *testing.F) {
	for _, s := range []string{"qemu:/run/vm.gdb?debugregs", "qemu::1?pid=1&timeout=1s", "qemu+monitor:./m?gdb=/g&ram=/r", "qemu:[::1]:1234", "qemu:?="} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, name string) {
		var opts Options
		target, err := parseName(name, &opts)
		if err != nil {
			if !errors.Is(err, ErrTarget) {
				t.Fatal(err)
			}
			return
		}
		if target.Address == "" || opts.RAM != "" && opts.ProcMem || opts.PID != 0 && !opts.ProcMem || opts.GDB != "" && !target.Monitor ||
			opts.Timeout < 0 {
			t.Fatalf("%+v %+v", target, opts)
		}
		// What is said without options is the same.
		again, err := parseName(target.String(), new(Options))
		if err != nil || again != target {
			t.Fatalf("%+v again: %+v, %v", target, again, err)
		}
	})
}

func TestUnpack(t *testing.T) {
	for in, want := range map[string]string{
		"$OK#9a":       "OK",
		"++$OK#9ajunk": "OK",
		"$0* #7a":      "0000",
		"$#00":         "",
	} {
		data, n, err := unpack(nil, []byte(in))
		require.NoError(t, err, in)
		assert.Equal(t, want, string(data), in)
		assert.Equal(t, strings.IndexByte(in, '#')+3, n, in)
	}
	for _, in := range []string{"", "+", "$", "$OK", "$OK#", "$OK#9"} {
		_, n, err := unpack(nil, []byte(in))
		require.NoError(t, err, in)
		assert.Zero(t, n, in)
	}
	for _, in := range []string{"x", "-", "$OK#9b", "$*!#4b", "$0*#5a", "$OK#zz", "$" + strings.Repeat("a", maxPacket+2)} {
		_, _, err := unpack(nil, []byte(in))
		assert.ErrorIs(t, err, errProtocol, "%.20q", in)
	}
}

func FuzzUnpack(f *testing.F) {
	for _, s := range []string{"$OK#9a", "+$T05thread:p01.01;#00", "$0* #7a", "$0*~#d8", "-", "$O48#ff", "\x03$"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		data, n, err := unpack(nil, in)
		if n > len(in) || len(data) > maxPacket+128 {
			t.Fatalf("%d of %d, %d bytes", n, len(in), len(data))
		}
		if err == nil && n > 0 {
			// What was taken once is taken again, whatever follows.
			again, m, err := unpack(nil, append(in[:n:n], "$#00"...))
			if err != nil || m != n || string(again) != string(data) {
				t.Fatal("not stable")
			}
		}
		unescape(append([]byte(nil), data...))
		parseStop(data)
	})
}

func FuzzLayout(f *testing.F) {
	f.Add(fakeXML, fakeFeature())
	f.Add(fakeFeature(), "")
	f.Add(`<reg name="rax" bitsize="64" regnum="999999"/>`, `<xi:include href="target.xml"/>`)
	f.Fuzz(func(t *testing.T, a, b string) {
		l, err := readLayout(func(annex string) ([]byte, error) {
			if annex == "target.xml" {
				return []byte(a), nil
			}
			return []byte(b), nil
		})
		if err != nil {
			return
		}
		var regs regFile
		l.parse(&regs, make([]byte, 100))
		l.parse(&regs, []byte(strings.Repeat("0", 2*maxRegFile)))
		for i := range regs {
			l.set(i, ^uint64(0))
		}
	})
}

func FuzzStopReply(f *testing.F) {
	for _, s := range []string{"T05thread:p01.01;", "T05core:01;", "S05", "W00", "X0f", "T05watch:1234;thread:p1.2;", "T02thread:1;"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := parseStop(b)
		if err == nil && r.thread != "" && !validThread(r.thread) {
			t.Fatal(r.thread)
		}
	})
}

func FuzzMonitorText(f *testing.F) {
	f.Add("FlatView #0\n AS \"memory\", root: system\n  0000000000000000-00000000000bffff (prio 0, ram): pc.ram\n" +
		"  0000000000100000-00000000bfffffff (prio 0, ram): pc.ram @0000000000100000\n")
	f.Add("CPU#0\nIDT=     fffffe0000000000 00000fff\n")
	f.Fuzz(func(t *testing.T, s string) {
		m := parseRAM(s)
		m.size()
		for i, r := range m {
			if r.end < r.start || i > 0 && m[i-1].end >= r.start {
				t.Fatal(m)
			}
			m.locate(0)
			m.contains(r.start, 4096)
		}
		parseIDT(s, make([]CPU, 2))
		noWatchpoints(s)
		if major(versionPrefix(s)) < 0 || len(printable(s)) > 1024 {
			t.Fatal("not bounded")
		}
	})
}

// FuzzMonitor: whatever a monitor says, connecting to it ends.
func FuzzMonitor(f *testing.F) {
	f.Add([]byte("QEMU 7.2.22 monitor - type 'help' for more information\r\n(qemu) info status\r\nVM status: running\r\n(qemu) "))
	f.Add([]byte(`{"QMP": {"version": {}, "capabilities": []}}` + "\r\n" + `{"return": {}}` + "\r\n" +
		`{"event": "STOP"}` + "\r\n" + `{"return": "VM status: running\r\n"}` + "\r\n" + `{"error": {"class": "x", "desc": "y"}}` + "\n"))
	f.Add([]byte("$T02#00"))
	f.Fuzz(func(t *testing.T, said []byte) {
		us, them := net.Pipe()
		go io.Copy(io.Discard, them)
		go func() {
			them.Write(said)
			them.Close()
		}()
		defer us.Close()
		m := &monitor{c: us, r: bufio.NewReader(us), timeout: time.Second}
		if m.greet() == nil {
			m.command("info status")
			m.command("info version")
		}
	})
}

func TestNoWatchpoints(t *testing.T) {
	one := "CPU#0\nRAX=0000000000000000 RBX=0000000000000000\nDR0=0000000000000000 DR1=0000000000000000 DR2=0000000000000000 DR3=0000000000000000 \n" +
		"DR6=00000000ffff0ff0 DR7=0000000000000400\nEFER=0000000000000500\n"
	two := one + "\nCPU#1\nDR6=00000000ffff0ff0 DR7=00000000000d0402\n"
	assert.True(t, noWatchpoints(one))
	assert.False(t, noWatchpoints(two))
	assert.False(t, noWatchpoints(""), "not known")
	assert.False(t, noWatchpoints("DR7=?"))
}

func TestParseRAM(t *testing.T) {
	text := "FlatView #0\n AS \"cpu-smm-1\", root: memory\n  0000000000000000-00000000ffffffff (prio 0, ram): x\n\n" +
		"FlatView #1\n AS \"memory\", root: system\n AS \"cpu-memory-0\", root: system\n Root memory region: system\n" +
		"  0000000000000000-000000000009ffff (prio 0, ram): ram KVM\n" +
		"  00000000000a0000-00000000000bffff (prio 1, i/o): vga-lowmem\n" +
		"  00000000000c0000-00000000000dffff (prio 1, rom): pc.rom\n" +
		"  0000000000100000-00000000bfffffff (prio 0, ram): ram @0000000000100000 KVM\n" +
		"  00000000fee00000-00000000fee00fff (prio 4096, i/o): kvm-apic-msi\n" +
		"  0000000100000000-000000013fffffff (prio 0, ram): ram @00000000c0000000 KVM\n\nFlatView #2\n"
	m := parseRAM(text)
	require.Len(t, m, 4)
	assert.Equal(t, "ram", m.main())
	main := m.of("ram")
	require.Len(t, main, 3)
	_, off, ok := main.locate(0x100000)
	assert.True(t, ok)
	assert.EqualValues(t, 0xc0000000, off)
	assert.False(t, m.contains(0xa0000, 8))
	assert.False(t, m.contains(0xfee00000, 4096))
	assert.True(t, m.contains(0xc0000, 4096))
	_, _, ok = main.locate(0xc0)
	assert.False(t, ok, "ROM isn't in the file")
	assert.EqualValues(t, 0xa0000+0xbff00000+0x40000000, m.size())
	assert.True(t, ramMap(nil).contains(1<<40, 8), "unknown")
	assert.EqualValues(t, 0x140000000, m.end())
}

// TestRegionsOfMemory: RAM of NUMA nodes is told from that of a graphics card by how much
// there is, and a file's region by its size.
func TestRegionsOfMemory(t *testing.T) {
	const mib = 1 << 20
	m := ramMap{
		{start: 0, end: 64*mib - 1, region: "m0"},
		{start: 64 * mib, end: 128*mib - 1, region: "m1"},
		{start: 0xfd000000, end: 0xfd000000 + 16*mib - 1, region: "vga.vram"},
		{start: 0xfffc0000, end: 0xffffffff, region: "pc.bios", rom: true},
		{start: 4096 * mib, end: 4352*mib - 1, region: "dimm"},
	}
	assert.EqualValues(t, 384*mib, parseTotal("base memory: 134217728\r\nplugged memory: 268435456\r\n"))
	assert.Zero(t, parseTotal("unknown command"))
	sys := m.system(384 * mib)
	assert.Equal(t, ramMap{m[0], m[1], m[4]}, sys)
	assert.Equal(t, ramMap{m[4]}, m.system(0), "not known")
	assert.Empty(t, ramMap(nil).system(384*mib))
	in, err := sys.inFile(256 * mib)
	require.NoError(t, err)
	assert.Equal(t, ramMap{m[4]}, in)
	_, err = sys.inFile(64 * mib)
	require.ErrorContains(t, err, "in 2 regions of about 67108864 bytes")
	_, err = sys.inFile(1024 * mib)
	require.ErrorContains(t, err, "not its memory")
	in, err = ramMap{m[0]}.inFile(1024 * mib)
	require.NoError(t, err, "the file may be larger")
	assert.Equal(t, ramMap{m[0]}, in)
}
