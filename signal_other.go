//go:build !unix

package vmprobes

import (
	"os"
	"syscall"
)

func ignoredSignals() []os.Signal { return []os.Signal{syscall.SIGPIPE} }
