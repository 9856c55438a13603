//go:build unix

package vmprobes

import (
	"os"
	"syscall"
)

// notEnds are the signals that are ignored while a probe is registered.
func notEnds() []os.Signal { return []os.Signal{syscall.SIGPIPE, syscall.SIGTSTP} }
