package qemutest

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/vmprobes/vmprobes/internal/kerneltest"
)

// Config describes a VM. The zero value is one vCPU under TCG with the
// micro-kernel.
type Config struct {
	// QEMU is the program; default: see [Binary].
	QEMU   string
	VCPUs  int
	Accel  string // default "tcg"; under "kvm" the test is skipped where that doesn't work
	Kernel string // file; empty is the micro-kernel
	Initrd string
	Append string
	MB     int // memory, default 64
	// Machine is QEMU's, default "pc,memory-backend=ram"; the backend "ram" has the MB of
	// memory.
	Machine string
	// NoGDB starts the VM without a gdbstub; Monitor can start one.
	NoGDB bool
	// Reboot lets the VM start anew when it is reset; without it QEMU ends.
	Reboot bool
	Args   []string // more of QEMU's arguments
}

// A VM is a running QEMU.
type VM struct {
	GDB     string // socket of the gdbstub
	Monitor string // socket of an HMP monitor
	RAM     string // file with the guest's memory
	PID     int

	tb     testing.TB
	trial  bool // not to work is no failure
	qmp    string
	serial string
	cmd    *exec.Cmd
	ended  chan struct{}
	mem    []byte
	out    Buffer
}

// Binary returns the QEMU to be tested, which the environment variable
// VMPROBES_QEMU may name. Tests with QEMU run under VMPROBES_REQUIRE_QEMU=1 only,
// which make test-qemu sets: then it must be there.
func Binary(tb testing.TB) string {
	tb.Helper()
	if os.Getenv(kerneltest.RequireEnv) != "1" {
		tb.Skipf("starts QEMU: make test-qemu runs it (%s=1)", kerneltest.RequireEnv)
	}
	name := os.Getenv("VMPROBES_QEMU")
	if name == "" {
		name = "qemu-system-x86_64"
	}
	path, err := exec.LookPath(name)
	if err != nil {
		kerneltest.Skip(tb, "no QEMU here: install qemu-system-x86, or set VMPROBES_QEMU (%v)", err)
	}
	return path
}

// Start starts a VM, which ends with the test.
func Start(tb testing.TB, c Config) *VM {
	tb.Helper()
	bin := c.QEMU
	if bin == "" {
		bin = Binary(tb)
	}
	if c.VCPUs == 0 {
		c.VCPUs = 1
	}
	if c.Accel == "" {
		c.Accel = "tcg"
	}
	if c.Machine == "" {
		c.Machine = "pc,memory-backend=ram"
	}
	if c.MB == 0 {
		c.MB = 64
	}
	// The path of a unix socket is short; the file is best in memory.
	dir, err := os.MkdirTemp("", "qt")
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { os.RemoveAll(dir) })
	ramDir := dir
	if st, err := os.Stat("/dev/shm"); err == nil && st.IsDir() {
		if ramDir, err = os.MkdirTemp("/dev/shm", "qemutest"); err != nil {
			tb.Fatal(err)
		}
		tb.Cleanup(func() { os.RemoveAll(ramDir) })
	}
	v := &VM{
		tb:  tb,
		GDB: filepath.Join(dir, "gdb"), Monitor: filepath.Join(dir, "mon"), RAM: filepath.Join(ramDir, "ram"),
		qmp: filepath.Join(dir, "qmp"), serial: filepath.Join(dir, "serial"), ended: make(chan struct{}),
	}
	if c.Kernel == "" {
		c.Kernel = filepath.Join(dir, "kernel")
		if err := os.WriteFile(c.Kernel, MicroKernel(), 0o600); err != nil {
			tb.Fatal(err)
		}
	}
	socket := func(path string) string { return "unix:" + path + ",server=on,wait=off" }
	args := []string{
		"-M", c.Machine + ",accel=" + c.Accel, "-smp", strconv.Itoa(c.VCPUs), "-m", strconv.Itoa(c.MB),
		"-object", fmt.Sprintf("memory-backend-file,id=ram,size=%dM,mem-path=%s,share=on", c.MB, v.RAM),
		"-nodefaults", "-no-user-config", "-display", "none", "-name", "qemutest",
		"-kernel", c.Kernel, "-serial", socket(v.serial), "-monitor", socket(v.Monitor), "-qmp", socket(v.qmp),
	}
	if c.Accel == "kvm" {
		// Its existence says little: one that runs in a guest may not get far.
		f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
		if err != nil {
			tb.Skipf("no KVM here: %v", err)
		}
		f.Close()
		v.trial = true
		args = append(args, "-cpu", "host")
	} else {
		args = append(args, "-cpu", "max")
	}
	if !c.Reboot {
		args = append(args, "-no-reboot")
	}
	if !c.NoGDB {
		args = append(args, "-gdb", socket(v.GDB))
	}
	if c.Initrd != "" {
		args = append(args, "-initrd", c.Initrd)
	}
	if c.Append != "" {
		args = append(args, "-append", c.Append)
	}
	v.cmd = exec.Command(bin, append(args, c.Args...)...)
	v.cmd.Stdout, v.cmd.Stderr = &v.out, &v.out
	v.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	if err := v.cmd.Start(); err != nil {
		tb.Fatal(err)
	}
	v.PID = v.cmd.Process.Pid
	go func() {
		v.cmd.Wait()
		close(v.ended)
	}()
	tb.Cleanup(v.Kill)
	for _, path := range []string{v.Monitor, v.qmp, v.serial, v.GDB} {
		if path == v.GDB && c.NoGDB {
			continue
		}
		v.eventually("QEMU makes its sockets", func() bool { return listens(path) })
	}
	f, err := os.OpenFile(v.RAM, os.O_RDWR, 0)
	if err != nil {
		tb.Fatal(err)
	}
	defer f.Close()
	if v.mem, err = unix.Mmap(int(f.Fd()), 0, c.MB<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		tb.Fatal(err)
	}
	return v
}

// Kill ends QEMU.
func (v *VM) Kill() {
	v.cmd.Process.Kill()
	<-v.ended
}

// Ended reports whether QEMU has ended.
func (v *VM) Ended() bool {
	select {
	case <-v.ended:
		return true
	default:
		return false
	}
}

func (v *VM) eventually(what string, ok func() bool) {
	v.tb.Helper()
	fail := v.tb.Fatalf
	if v.trial {
		fail = v.tb.Skipf
	}
	for range 6000 {
		if ok() {
			return
		}
		if v.Ended() {
			fail("waiting until %s: QEMU has ended: %s", what, v.out.String())
		}
		time.Sleep(10 * time.Millisecond)
	}
	fail("waited for a minute until %s: %s", what, v.out.String())
}

func (v *VM) word(addr uint64) *uint64 {
	return (*uint64)(unsafe.Pointer(&v.mem[addr : addr+8][0]))
}

// Load returns the word at a physical address, from the shared file.
func (v *VM) Load(addr uint64) uint64 { return atomic.LoadUint64(v.word(addr)) }

// Bytes returns memory at a physical address, in the shared file.
func (v *VM) Bytes(addr, n uint64) []byte { return v.mem[addr : addr+n : addr+n] }

// A CPU is a vCPU that runs the micro-kernel.
type CPU struct {
	vm   *VM
	data uint64
}

// CPU returns vCPU n once it loops.
func (v *VM) CPU(n int) CPU {
	v.tb.Helper()
	c := CPU{v, imageBase + dataOff + uint64(n)*dataLen}
	v.eventually(fmt.Sprintf("vCPU %d loops", n), func() bool { return v.Load(c.data+offReady) == 1 })
	v.trial = false
	return c
}

// Call has function i called n times more.
func (c CPU) Call(i, n int) {
	f, _ := Target(i)
	atomic.StoreUint64(c.vm.word(c.data+offTarget), f)
	atomic.AddUint64(c.vm.word(c.data+offGoal), uint64(n))
}

// Stop has the vCPU call no more functions.
func (c CPU) Stop() { atomic.StoreUint64(c.vm.word(c.data+offGoal), 0) }

// Done reports whether all the calls asked for were made.
func (c CPU) Done() bool { return c.vm.Load(c.data+offDone) >= c.vm.Load(c.data+offGoal) }

// CountAddr is where in physical memory Count is.
func (c CPU) CountAddr() uint64 { return c.data + offCount }

// Count is how often the vCPU has executed probed instructions.
func (c CPU) Count() uint64 { return c.vm.Load(c.data + offCount) }

// IRQs is how many interrupts the vCPU has served.
func (c CPU) IRQs() uint64 { return c.vm.Load(c.data + offIRQs) }

// listens reports whether somebody listens on a socket: its file is there a moment
// before. To connect would use up the one connection that QEMU takes.
func listens(path string) bool {
	const flags, listening = 3, "00010000" // __SO_ACCEPTCON, include/uapi/linux/net.h
	table, err := os.ReadFile("/proc/net/unix")
	if err != nil {
		_, err := os.Stat(path)
		return err == nil
	}
	for line := range strings.Lines(string(table)) {
		if f := strings.Fields(line); len(f) > flags && f[len(f)-1] == path {
			return f[flags] == listening
		}
	}
	return false
}

// A StringState has the registers that a repeated string instruction uses.
type StringState struct{ CX, SI, DI, AX, Flags uint64 }

// SetString sets the registers that string functions begin with.
func (c CPU) SetString(s StringState) {
	for i, w := range []uint64{s.CX, s.SI, s.DI, s.AX, s.Flags} {
		atomic.StoreUint64(c.vm.word(c.data+offIn+8*uint64(i)), w)
	}
}

// StringState returns what the last of them left.
func (c CPU) StringState() StringState {
	out := func(i uint64) uint64 { return c.vm.Load(c.data + offOut + 8*i) }
	return StringState{out(0), out(1), out(2), out(3), c.vm.Load(c.data + offSpare)}
}

// Wait waits until the calls are made.
func (c CPU) Wait() {
	c.vm.tb.Helper()
	c.vm.eventually("all calls are made", c.Done)
}

// QMP executes a command and returns the raw answer. Each call connects anew.
func (v *VM) QMP(command string, args map[string]any) json.RawMessage {
	v.tb.Helper()
	c, err := net.Dial("unix", v.qmp)
	if err != nil {
		v.tb.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(30 * time.Second))
	in := json.NewDecoder(c)
	var reply struct {
		Return json.RawMessage
		Error  json.RawMessage
	}
	next := func() {
		for {
			reply.Return, reply.Error = nil, nil
			if err := in.Decode(&reply); err != nil {
				v.tb.Fatalf("qmp %s: %v", command, err)
			}
			if reply.Return != nil || reply.Error != nil {
				return
			}
		}
	}
	io.WriteString(c, `{"execute":"qmp_capabilities"}`)
	next()
	cmd := map[string]any{"execute": command}
	if args != nil {
		cmd["arguments"] = args
	}
	if err := json.NewEncoder(c).Encode(cmd); err != nil {
		v.tb.Fatal(err)
	}
	next()
	if reply.Error != nil {
		v.tb.Fatalf("qmp %s: %s", command, reply.Error)
	}
	return reply.Return
}

// HMP executes a command of the human monitor.
func (v *VM) HMP(command string) string {
	v.tb.Helper()
	var out string
	if err := json.Unmarshal(v.QMP("human-monitor-command", map[string]any{"command-line": command}), &out); err != nil {
		v.tb.Fatal(err)
	}
	return strings.TrimSpace(out)
}

// Status is QEMU's view of whether the VM runs: "running", "paused", "debug" …
func (v *VM) Status() string {
	v.tb.Helper()
	var s struct{ Status string }
	if err := json.Unmarshal(v.QMP("query-status", nil), &s); err != nil {
		v.tb.Fatal(err)
	}
	return s.Status
}

// QMPSocket returns the path of the QMP monitor's socket.
func (v *VM) QMPSocket() string { return v.qmp }
