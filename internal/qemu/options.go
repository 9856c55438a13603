package qemu

import (
	"log/slog"
	"time"
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
	// process; 0 means whoever listens at the unix socket.
	ProcMem bool
	PID     int
	// Fallback has Dial go on, with memory read and written through the stub, where
	// RAM or ProcMem isn't possible.
	Fallback bool
	// GDB is where the monitor makes the socket of the gdbstub, for a target of
	// qemu+monitor. QEMU must be allowed to make it. Empty means a name next to
	// that of the monitor's socket.
	GDB string
	// DebugRegisters has breakpoints under KVM use the CPU's debug registers, of
	// which there are four: for hosts whose KVM doesn't report QEMU's int3s, as
	// happens on hosts that are guests themselves. Without it they are used where an
	// int3 can't be planted. Under TCG it changes nothing.
	DebugRegisters bool
	// Timeout bounds how long an answer of the stub may take; 0 means 10 seconds.
	// Waiting for a breakpoint is not bounded by it.
	Timeout time.Duration
	// Logger receives debug records. Nil discards them.
	Logger *slog.Logger
}

const defaultTimeout = 10 * time.Second
