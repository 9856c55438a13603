//go:build unix

package guest

import (
	"os/signal"
	"syscall"
)

// ignoreStop has Ctrl+Z ignored until the function that it returns is called.
func ignoreStop() (end func()) {
	if signal.Ignored(syscall.SIGTSTP) {
		return func() {}
	}
	signal.Ignore(syscall.SIGTSTP)
	return func() { signal.Reset(syscall.SIGTSTP) }
}
