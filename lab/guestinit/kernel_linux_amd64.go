package main

import (
	"bytes"
	"debug/elf"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/vmprobes/vmprobes/lab/internal/kmsg"
)

// int3User executes n int3 in user mode under a SIGTRAP handler of our own
// (the runtime's would end the process).
func int3User(n uint64) (string, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	// What the kernel's rt_sigaction(2) takes.
	type sigaction struct {
		handler  uintptr
		flags    uint64
		restorer uintptr
		mask     uint64
	}
	const (
		saOnStack  = 0x08000000
		saRestorer = 0x04000000
		saSiginfo  = 0x4
	)
	handler, restorer := trapAddresses()
	act := sigaction{handler: handler, restorer: restorer, flags: saOnStack | saRestorer | saSiginfo}
	var old sigaction
	if _, _, errno := unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(unix.SIGTRAP), uintptr(unsafe.Pointer(&act)), uintptr(unsafe.Pointer(&old)), 8, 0, 0); errno != 0 {
		return "", fmt.Errorf("int3user: rt_sigaction: %w", errno)
	}
	before := atomic.LoadUint64(&traps)
	int3Loop(n)
	got := atomic.LoadUint64(&traps) - before
	_, _, _ = unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(unix.SIGTRAP), uintptr(unsafe.Pointer(&old)), 0, 8, 0, 0)
	return fmt.Sprintf("int3user sent=%d sigtraps=%d", n, got), nil
}

// symbols is /proc/kallsyms, read when it is first needed: having the kernel
// write it takes seconds under an emulator.
var symbols []byte

// addresses returns the addresses of a symbol, in the order of /proc/kallsyms.
func addresses(name string) ([]uint64, error) {
	if symbols == nil {
		b, err := os.ReadFile("/proc/kallsyms")
		if err != nil {
			return nil, err
		}
		symbols = b
	}
	var found []uint64
	// Only what names the symbol is looked at: the garbage collector is off, and
	// this guest's memory would not last for a string for each line.
	for rest := symbols; ; {
		i := bytes.Index(rest, []byte(" "+name))
		if i < 0 {
			break
		}
		line := rest[bytes.LastIndexByte(rest[:i], '\n')+1 : i] // "ffffffff81000000 T"
		rest = rest[i+1+len(name):]
		if len(rest) > 0 && rest[0] != '\n' && rest[0] != '\t' { // \t: of a module
			continue
		}
		digits, _, _ := bytes.Cut(line, []byte(" "))
		a, err := strconv.ParseUint(string(digits), 16, 64)
		if err != nil {
			return nil, fmt.Errorf("kallsyms: %w", err)
		}
		found = append(found, a)
	}
	if len(found) == 0 {
		return nil, fmt.Errorf("kallsyms: no symbol %q", name)
	}
	return found, nil
}

func kallsyms(name string) (string, error) {
	found, err := addresses(name)
	if err != nil {
		return "", err
	}
	var reply strings.Builder
	reply.WriteString("kallsyms " + name)
	for _, a := range found {
		reply.WriteString(fmt.Sprintf(" %#x", a))
	}
	return reply.String(), nil
}

// kernelBuffer is what textHash reads into: the garbage collector is off, so
// nothing large may be allocated anew for each command.
var kernelBuffer [256 << 10]byte

// kernelMemory fills b from the kernel's own virtual memory.
func kernelMemory(address uint64, b []byte) error {
	f, err := elf.Open("/proc/kcore")
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	for _, p := range f.Progs {
		if p.Type == elf.PT_LOAD && p.Vaddr <= address && address+uint64(len(b)) <= p.Vaddr+p.Memsz {
			_, err := p.ReadAt(b, int64(address-p.Vaddr))
			return err
		}
	}
	return fmt.Errorf("/proc/kcore has no %#x", address)
}

func text(symbol string, size uint64) (string, error) {
	if size > 4096 {
		return "", fmt.Errorf("text: at most 4096 bytes")
	}
	address, err := strconv.ParseUint(symbol, 0, 64)
	if err != nil {
		found, err := addresses(symbol)
		if err != nil {
			return "", err
		}
		address = found[0]
	}
	b := make([]byte, size)
	if err := kernelMemory(address, b); err != nil {
		return "", err
	}
	return fmt.Sprintf("text %#x %s", address, hex.EncodeToString(b)), nil
}

// trouble matches what a damaged kernel logs.
var trouble = regexp.MustCompile(`BUG:|Oops|int3|WARNING:|general protection|invalid opcode|Call Trace|soft lockup|rcu.*stall|Kernel panic|segfault|traps:|unhandled|cut here|ftrace (?:bug|failed|faulted)|jump_label: Fatal`)

// ownTrap matches what the kernel logs for the int3user command, because it
// comes from process 1.
var ownTrap = regexp.MustCompile(`traps: .*trap int3 ip:`)

// scanLog returns the kernel's messages that look like trouble.
func (g *guest) scanLog() []string {
	all, err := kmsg.Messages()
	if err != nil {
		return []string{"cannot read /dev/kmsg: " + err.Error()}
	}
	return slices.DeleteFunc(all, func(message string) bool {
		return !trouble.MatchString(message) || ownTrap.MatchString(message)
	})
}

// dmesg reports the trouble since the guest was ready.
func (g *guest) dmesg() (string, error) {
	lines := g.scanLog()
	fresh := lines[min(g.badAtStart, len(lines)):]
	for _, line := range fresh {
		say("| DMESG %s", line)
	}
	return fmt.Sprintf("dmesg bad=%d boot=%d", len(fresh), g.badAtStart), nil
}

func printFile(command, path string) (string, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	lines := 0
	for line := range strings.Lines(string(b)) {
		say("| %s", strings.TrimSpace(line))
		lines++
	}
	return fmt.Sprintf("%s lines=%d", command, lines), nil
}

func ps() (string, error) {
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return "", err
	}
	for _, dir := range dirs {
		comm, err := os.ReadFile(filepath.Join(dir, "comm"))
		if err != nil {
			continue // it ended meanwhile
		}
		say("| %s %s", filepath.Base(dir), strings.TrimSpace(string(comm)))
	}
	return fmt.Sprintf("ps lines=%d", len(dirs)), nil
}
