//go:build unix

package vmprobes

import (
	"os"
	"syscall"
)

// ignoredSignals are the signals that are ignored while a guest depends on this program.
func ignoredSignals() []os.Signal { return []os.Signal{syscall.SIGPIPE, syscall.SIGTSTP} }
