//go:build !linux

package labguest

import (
	"context"
	"errors"
)

var errNoLab = errors.New("lab guests run in the lab's dom0 only, which is Linux")

// Guest is a running guest.
type Guest struct{}

func start(context.Context, Config) (*Guest, error)       { return nil, errNoLab }
func startPaused(context.Context, Config) (*Guest, error) { return nil, errNoLab }
func find(context.Context, Config) (*Guest, error)        { return nil, errNoLab }

// Booted waits until the guest takes commands.
func (*Guest) Booted(context.Context) error { return errNoLab }

// Command sends a command and returns what the guest answered.
func (*Guest) Command(context.Context, string) (string, error) { return "", errNoLab }

// Output is like Command and returns the lines before the answer too.
func (*Guest) Output(context.Context, string) (string, []string, error) { return "", nil, errNoLab }

// DomID returns the guest's domain id.
func (*Guest) DomID() uint32 { return 0 }

// Name returns the guest's name.
func (*Guest) Name() string { return "" }

// Ready returns what the guest said when it was up.
func (*Guest) Ready() string { return "" }

// Console returns everything the guest has written to its console.
func (*Guest) Console() string { return "" }

// KernelPath returns the path of the guest's kernel as an ELF file.
func (*Guest) KernelPath() string { return "" }

// VMLinuzPath returns the path of the guest's kernel as Debian packages it.
func (*Guest) VMLinuzPath() string { return "" }

// Leave lets go of the guest and leaves it running.
func (*Guest) Leave() {}

// Destroy ends the guest.
func (*Guest) Destroy() error { return errNoLab }
