//go:build !unix

package vmprobes

import (
	"os"
	"syscall"
)

func notEnds() []os.Signal { return []os.Signal{syscall.SIGPIPE} }
