package x86

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// The oracle: a stopped child process whose registers and memory the tests set
// before the processor executes one instruction in it.

const (
	oracleCode = 0x1000_0000 // two pages, writable and executable
	oracleData = 0x2000_0000 // two pages, writable, with nothing around them
	oracleSize = 2 * pageSize
)

var errUnmapped = errors.New("not mapped")

// tracee is the child. All its methods must run on the thread that started it.
type tracee struct {
	t   testing.TB
	pid int
	// base has the values of registers the tests do not set.
	base unix.PtraceRegs
	maps [][2]uint64 // what is mapped in the child
}

// startTracee starts a child that never runs: it stops at the first
// instruction after exec.
func startTracee(t testing.TB) *tracee {
	t.Helper()
	if testing.Short() {
		t.Skip("needs a traced process")
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	runtime.LockOSThread()
	t.Cleanup(runtime.UnlockOSThread)
	cmd := exec.Command(exe, "-test.run=^$")
	cmd.SysProcAttr = &syscall.SysProcAttr{Ptrace: true, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		if os.Getenv("VMPROBES_REQUIRE_LAB") == "1" {
			t.Fatalf("ptrace: %v", err)
		}
		t.Skipf("ptrace is not allowed here: %v", err)
	}
	tr := &tracee{t: t, pid: cmd.Process.Pid}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	var ws unix.WaitStatus
	if _, err := unix.Wait4(tr.pid, &ws, 0, nil); err != nil || !ws.Stopped() {
		t.Fatalf("child did not stop: %v, %#x", err, ws)
	}
	if err := unix.PtraceGetRegs(tr.pid, &tr.base); err != nil {
		t.Fatal(err)
	}
	for _, a := range []uint64{oracleCode, oracleData} {
		tr.mmap(a, oracleSize)
	}
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", tr.pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(maps)) {
		var m [2]uint64
		if _, err := fmt.Sscanf(line, "%x-%x", &m[0], &m[1]); err != nil {
			t.Fatal(err)
		}
		// Stacks grow down when touched below.
		if strings.Contains(line, "[stack]") {
			m[0] -= 8 << 20
		}
		tr.maps = append(tr.maps, m)
	}
	return tr
}

// mapped reports whether any byte of a small access is mapped.
func (tr *tracee) mapped(addr uint64, n int) bool {
	for _, m := range tr.maps {
		if addr < m[1] && addr+uint64(n) > m[0] {
			return true
		}
	}
	return false
}

// mmap makes the child map memory, by a SYSCALL put over the next instruction.
func (tr *tracee) mmap(addr, size uint64) {
	tr.t.Helper()
	rip := uintptr(tr.base.Rip)
	saved := make([]byte, 8)
	if _, err := unix.PtracePeekText(tr.pid, rip, saved); err != nil {
		tr.t.Fatal(err)
	}
	if _, err := unix.PtracePokeText(tr.pid, rip, []byte{0x0f, 0x05}); err != nil {
		tr.t.Fatal(err)
	}
	regs := tr.base
	regs.Rax, regs.Rdi, regs.Rsi = unix.SYS_MMAP, addr, size
	regs.Rdx = unix.PROT_READ | unix.PROT_WRITE | unix.PROT_EXEC
	regs.R10 = unix.MAP_PRIVATE | unix.MAP_ANONYMOUS | unix.MAP_FIXED
	regs.R8, regs.R9 = ^uint64(0), 0
	if err := unix.PtraceSetRegs(tr.pid, &regs); err != nil {
		tr.t.Fatal(err)
	}
	if sig := tr.stepRaw(); sig != unix.SIGTRAP {
		tr.t.Fatalf("mmap: %v", sig)
	}
	if err := unix.PtraceGetRegs(tr.pid, &regs); err != nil {
		tr.t.Fatal(err)
	}
	if regs.Rax != addr {
		tr.t.Fatalf("mmap in the child: %#x", regs.Rax)
	}
	if _, err := unix.PtracePokeText(tr.pid, rip, saved); err != nil {
		tr.t.Fatal(err)
	}
}

// stepRaw executes one instruction and returns the signal that stopped the child.
func (tr *tracee) stepRaw() unix.Signal {
	tr.t.Helper()
	if err := unix.PtraceSingleStep(tr.pid); err != nil {
		tr.t.Fatalf("singlestep: %v", err)
	}
	var ws unix.WaitStatus
	if _, err := unix.Wait4(tr.pid, &ws, 0, nil); err != nil {
		tr.t.Fatal(err)
	}
	if !ws.Stopped() {
		tr.t.Fatalf("child is gone: %#x", ws)
	}
	return ws.StopSignal()
}

func iov(b []byte) []unix.Iovec {
	v := unix.Iovec{Base: &b[0]}
	v.SetLen(len(b))
	return []unix.Iovec{v}
}

func (tr *tracee) ReadVirt(addr uint64, b []byte) error {
	if !inRegion(addr, len(b), oracleData) && !inRegion(addr, len(b), oracleCode) {
		return fmt.Errorf("%w: %#x", errUnmapped, addr)
	}
	n, err := unix.ProcessVMReadv(tr.pid, iov(b), []unix.RemoteIovec{{Base: uintptr(addr), Len: len(b)}}, 0)
	if err == nil && n != len(b) {
		err = errUnmapped
	}
	return err
}

func (tr *tracee) WriteVirt(addr uint64, b []byte) error {
	if !inRegion(addr, len(b), oracleData) && !inRegion(addr, len(b), oracleCode) {
		return fmt.Errorf("%w: %#x", errUnmapped, addr)
	}
	n, err := unix.ProcessVMWritev(tr.pid, iov(b), []unix.RemoteIovec{{Base: uintptr(addr), Len: len(b)}}, 0)
	if err == nil && n != len(b) {
		err = errUnmapped
	}
	return err
}

func inRegion(addr uint64, n int, base uint64) bool {
	return addr >= base && addr < base+oracleSize && addr+uint64(n) <= base+oracleSize
}

func (tr *tracee) write(addr uint64, b []byte) {
	tr.t.Helper()
	if err := tr.WriteVirt(addr, b); err != nil {
		tr.t.Fatal(err)
	}
}

func (tr *tracee) set(r *Regs) {
	tr.t.Helper()
	p := tr.base
	p.Orig_rax = ^uint64(0) // no system call to restart
	p.R15, p.R14, p.R13, p.R12, p.Rbp, p.Rbx = r.R15, r.R14, r.R13, r.R12, r.BP, r.BX
	p.R11, p.R10, p.R9, p.R8 = r.R11, r.R10, r.R9, r.R8
	p.Rax, p.Rcx, p.Rdx, p.Rsi, p.Rdi = r.AX, r.CX, r.DX, r.SI, r.DI
	p.Rip, p.Eflags, p.Rsp = r.IP, r.Flags, r.SP
	p.Fs_base, p.Gs_base = r.FSBase, r.GSBase
	if err := unix.PtraceSetRegs(tr.pid, &p); err != nil {
		tr.t.Fatalf("setregs: %v: %+v", err, *r)
	}
}

func (tr *tracee) get() Regs {
	tr.t.Helper()
	var p unix.PtraceRegs
	if err := unix.PtraceGetRegs(tr.pid, &p); err != nil {
		tr.t.Fatal(err)
	}
	// PTRACE_SETREGS cannot set ID, so that it keeps what some POPF loaded.
	p.Eflags &^= FlagID
	return Regs{
		R15: p.R15, R14: p.R14, R13: p.R13, R12: p.R12, BP: p.Rbp, BX: p.Rbx,
		R11: p.R11, R10: p.R10, R9: p.R9, R8: p.R8,
		AX: p.Rax, CX: p.Rcx, DX: p.Rdx, SI: p.Rsi, DI: p.Rdi,
		IP: p.Rip, CS: p.Cs, Flags: p.Eflags, SP: p.Rsp, SS: p.Ss,
		FSBase: p.Fs_base, GSBase: p.Gs_base,
	}
}
