//go:build !linux

package xenctrl

import "context"

// poller is not used: nothing can be opened on this platform.
type poller struct{}

func newPoller(int, bool) (*poller, error) { return nil, ErrUnsupportedPlatform }
func (*poller) wait(context.Context) error { return ErrUnsupportedPlatform }
func (*poller) interrupt()                 {}
func (*poller) close()                     {}

func direct(l eventLib) eventLib { return l }
func (*Handle) goDirect()        {}
