package main

import (
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"
)

// What a debugger in the guest does to a process: breakpoints, single steps and
// watchpoints, through ptrace(2) as gdb makes them.

var endian = binary.LittleEndian

// watched are two words that a child has written, each to a cache line of its own.
var watched struct {
	byKernel uint64 // by the kernel: the buffer of a read(2)
	_        [56]byte
	byUser   uint64
	_        [56]byte
}

// child is the process to be debugged: this program under another name. It does
// what a debugger has to expect to the last instruction, and ends.
func child(args []string) {
	runtime.LockOSThread()
	var n [2]uint64
	for i, a := range args[1:] {
		v, err := strconv.ParseUint(a, 10, 64)
		if err != nil || i >= len(n) {
			os.Exit(2)
		}
		n[i] = v
	}
	switch args[0] {
	case "read":
		fd, err := unix.Open("/dev/zero", unix.O_RDONLY, 0)
		if err != nil {
			os.Exit(3)
		}
		readLoop(n[0], uint64(fd), &watched.byKernel, &watched.byUser)
	case "call":
		callLoop(n[0], n[1])
	default:
		os.Exit(2)
	}
	os.Exit(0)
}

func init() {
	if len(os.Args) > 1 && os.Getpid() != 1 {
		child(os.Args[1:]) // on the process's first thread, which is the one traced
	}
}

// debuggee is a process that stands under this thread's ptrace.
type debuggee struct {
	pid    int
	status unix.WaitStatus
	others int // signals that are none of the debugger's
}

// startDebuggee starts a child, which stands at its first instruction. The calling
// goroutine must be locked to its thread.
func startDebuggee(args ...any) (*debuggee, error) {
	var words []string
	for _, a := range args {
		words = append(words, fmt.Sprint(a))
	}
	cmd := exec.Command("/proc/self/exe", words...)
	// Its runtime is to leave the thread alone that is in assembly all the time.
	cmd.Env = []string{"GODEBUG=asyncpreemptoff=1", "GOGC=off"}
	cmd.SysProcAttr = &unix.SysProcAttr{Ptrace: true}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	d := &debuggee{pid: cmd.Process.Pid}
	return d, d.wait()
}

func (d *debuggee) wait() error {
	for {
		_, err := unix.Wait4(d.pid, &d.status, 0, nil)
		if err != unix.EINTR {
			return err
		}
	}
}

// kill ends the child, if it hasn't ended.
func (d *debuggee) kill() {
	if d.status.Exited() || d.status.Signaled() {
		return
	}
	_ = unix.Kill(d.pid, unix.SIGKILL)
	for !d.status.Exited() && !d.status.Signaled() && d.wait() == nil {
	}
}

// resume lets the child run to its next trap, or by one instruction, and tells
// whether it came to a trap. Other signals are given to it.
func (d *debuggee) resume(step bool) (trapped bool, err error) {
	signal := 0
	for {
		if step {
			// PTRACE_SINGLESTEP with a signal, which the package has no call for.
			_, _, errno := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_SINGLESTEP, uintptr(d.pid), 0, uintptr(signal), 0, 0)
			if errno != 0 {
				return false, errno
			}
		} else if err := unix.PtraceCont(d.pid, signal); err != nil {
			return false, err
		}
		if err := d.wait(); err != nil {
			return false, err
		}
		switch {
		case d.status.Exited() || d.status.Signaled():
			return false, nil
		case d.status.StopSignal() == unix.SIGTRAP:
			return true, nil
		}
		d.others++
		signal = int(d.status.StopSignal())
	}
}

// trap is resume where nothing but a trap can come next.
func (d *debuggee) trap(step bool) error {
	trapped, err := d.resume(step)
	if err == nil && !trapped {
		err = fmt.Errorf("the debugged process ended with status %#x instead of a trap", uint32(d.status))
	}
	return err
}

// finish lets the child run to its end.
func (d *debuggee) finish() error {
	switch trapped, err := d.resume(false); {
	case err != nil:
		return err
	case trapped:
		return fmt.Errorf("a trap where there is none to be")
	case !d.status.Exited() || d.status.ExitStatus() != 0:
		return fmt.Errorf("the debugged process ended with status %#x", uint32(d.status))
	}
	return nil
}

// A breakpoint is the int3 that a debugger puts into a process.
type breakpoint struct {
	addr     uint64
	original [1]byte
}

func (d *debuggee) insert(addr uint64) (*breakpoint, error) {
	b := &breakpoint{addr: addr}
	if _, err := unix.PtracePeekText(d.pid, uintptr(addr), b.original[:]); err != nil {
		return nil, err
	}
	return b, b.put(d, 0xcc)
}

func (b *breakpoint) put(d *debuggee, c byte) error {
	_, err := unix.PtracePokeText(d.pid, uintptr(b.addr), []byte{c})
	return err
}

// leave puts the instruction back and the child in front of it. It must have hit.
func (b *breakpoint) leave(d *debuggee) (unix.PtraceRegs, error) {
	var r unix.PtraceRegs
	if err := unix.PtraceGetRegs(d.pid, &r); err != nil {
		return r, err
	}
	if r.Rip != b.addr+1 {
		return r, fmt.Errorf("a trap at %#x, not behind the breakpoint at %#x", r.Rip, b.addr)
	}
	if err := b.put(d, b.original[0]); err != nil {
		return r, err
	}
	r.Rip = b.addr
	return r, unix.PtraceSetRegs(d.pid, &r)
}

// breaks has a child call a function n times and stops it there each time.
func breaks(n uint64) (string, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	d, err := startDebuggee("call", n, 1)
	if err != nil {
		return "", err
	}
	defer d.kill()
	b, err := d.insert(uint64(callAddress()))
	if err != nil {
		return "", err
	}
	hits := uint64(0)
	for {
		trapped, err := d.resume(false)
		if err != nil {
			return "", err
		}
		if !trapped {
			break
		}
		hits++
		if _, err := b.leave(d); err != nil {
			return "", err
		}
		if err := d.trap(true); err != nil {
			return "", fmt.Errorf("breaks: step past hit %d: %w", hits, err)
		}
		if err := b.put(d, 0xcc); err != nil {
			return "", err
		}
	}
	return fmt.Sprintf("breaks calls=%d hits=%d others=%d status=%d", n, hits, d.others, d.status.ExitStatus()), nil
}

// steps single-steps a child through n system calls.
func steps(n uint64) (string, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	d, err := startDebuggee("call", 1, n)
	if err != nil {
		return "", err
	}
	defer d.kill()
	b, err := d.insert(uint64(callAddress()))
	if err != nil {
		return "", err
	}
	if err := d.trap(false); err != nil {
		return "", fmt.Errorf("steps: to the breakpoint: %w", err)
	}
	r, err := b.leave(d)
	if err != nil {
		return "", err
	}
	var word [8]byte
	if _, err := unix.PtracePeekData(d.pid, uintptr(r.Rsp), word[:]); err != nil {
		return "", err
	}
	back := endian.Uint64(word[:])
	made, limit := uint64(0), 2*callSteps(n)+100
	for ; r.Rip != back && made < limit; made++ {
		if err := d.trap(true); err != nil {
			return "", fmt.Errorf("steps: after step %d: %w", made, err)
		}
		if err := unix.PtraceGetRegs(d.pid, &r); err != nil {
			return "", err
		}
	}
	if err := d.finish(); err != nil {
		return "", fmt.Errorf("steps: %w", err)
	}
	return fmt.Sprintf("steps calls=%d made=%d want=%d others=%d", n, made, callSteps(n), d.others), nil
}

// callSteps is how many instructions the function at callAddress has for n calls.
func callSteps(n uint64) uint64 { return 4*n + 1 }

// debugRegister is the offset of a debug register in struct user
// (arch/x86/include/asm/user_64.h, u_debugreg).
func debugRegister(i int) uintptr { return 848 + 8*uintptr(i) }

// countWrites has the kernel count writes of eight bytes at an address in a process,
// in kernel mode too. It returns a descriptor from which the count can be read.
func countWrites(pid int, addr uintptr) (fd int, err error) {
	const onWrite, eightBytes = 2, 8 // HW_BREAKPOINT_W, HW_BREAKPOINT_LEN_8 (linux/hw_breakpoint.h)
	return unix.PerfEventOpen(&unix.PerfEventAttr{
		Type: unix.PERF_TYPE_BREAKPOINT, Size: uint32(unsafe.Sizeof(unix.PerfEventAttr{})),
		Bp_type: onWrite, Ext1: uint64(addr), Ext2: eightBytes,
	}, pid, -1, -1, unix.PERF_FLAG_FD_CLOEXEC)
}

// watch has a child's memory written n times by itself, under a debugger's hardware
// watchpoint, and n times by the kernel on its behalf, under one of perf's that
// counts: since 5.8 the kernel doesn't tell a debugger of those (exc_debug_kernel,
// arch/x86/kernel/traps.c), though they trap all the same.
func watch(n uint64) (string, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	d, err := startDebuggee("read", n)
	if err != nil {
		return "", err
	}
	defer d.kill()
	poke := func(i int, v uint64) error {
		if _, err := unix.PtracePokeUser(d.pid, debugRegister(i), endian.AppendUint64(nil, v)); err != nil {
			return fmt.Errorf("watch: DR%d: %w", i, err)
		}
		return nil
	}
	if err := poke(0, uint64(uintptr(unsafe.Pointer(&watched.byUser)))); err != nil {
		return "", err
	}
	// DR7: DR0 for this task, on writes, of eight bytes (SDM volume 3, 18.2.4).
	if err := poke(7, 1<<0|1<<16|2<<18); err != nil {
		return "", err
	}
	perf, err := countWrites(d.pid, uintptr(unsafe.Pointer(&watched.byKernel)))
	if err != nil {
		return "", fmt.Errorf("watch: perf_event_open: %w", err)
	}
	defer func() { _ = unix.Close(perf) }()
	var byUser, odd uint64
	for {
		trapped, err := d.resume(false)
		if err != nil {
			return "", err
		}
		if !trapped {
			break
		}
		var status [8]byte
		if _, err := unix.PtracePeekUser(d.pid, debugRegister(6), status[:]); err != nil {
			return "", fmt.Errorf("watch: DR6: %w", err)
		}
		if endian.Uint64(status[:])&15 == 1 {
			byUser++
		} else {
			odd++
		}
		if err := poke(6, 0); err != nil {
			return "", err
		}
	}
	var word [8]byte
	if _, err := unix.Read(perf, word[:]); err != nil {
		return "", fmt.Errorf("watch: %w", err)
	}
	return fmt.Sprintf("watch reads=%d kernel=%d user=%d odd=%d others=%d status=%d", n, endian.Uint64(word[:]), byUser, odd, d.others, d.status.ExitStatus()), nil
}

// ldt loads DS with a segment of a local descriptor table and takes that segment
// away. The kernel then loads DS again, which faults, and an entry of its exception
// table has it go on with a null selector.
func ldt() (string, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	// struct user_desc (arch/x86/include/uapi/asm/ldt.h).
	type segment struct{ entry, base, limit, flags uint32 }
	const (
		write        = 0x11 // modify_ldt(2)'s function
		seg32        = 1 << 0
		readExecOnly = 1 << 3
		inPages      = 1 << 4
		notPresent   = 1 << 5
		useable      = 1 << 6
		selector     = 0<<3 | 1<<2 | 3 // entry 0, of the local table, for user mode
	)
	set := func(s segment) error {
		if _, _, errno := unix.RawSyscall(unix.SYS_MODIFY_LDT, write, uintptr(unsafe.Pointer(&s)), unsafe.Sizeof(s)); errno != 0 {
			return fmt.Errorf("ldt: modify_ldt: %w", errno)
		}
		return nil
	}
	if err := set(segment{limit: 0xfffff, flags: seg32 | inPages | useable}); err != nil {
		return "", err
	}
	setDS(selector)
	before := getDS()
	err := set(segment{flags: readExecOnly | notPresent}) // an entry of these is empty
	after := getDS()
	setDS(0)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("ldt before=%d after=%d", before, after), nil
}
