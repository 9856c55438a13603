//go:build !linux || !amd64 || !cgo

package xenctrl

import (
	"fmt"
	"runtime"
)

// notBuilt says why this program has no access to Xen's libraries.
func notBuilt() error {
	if runtime.GOOS != "linux" || runtime.GOARCH != "amd64" {
		return fmt.Errorf("%w: this program is for %s on %s: run it in dom0", ErrUnsupportedPlatform, runtime.GOOS, runtime.GOARCH)
	}
	return fmt.Errorf("%w: install a C compiler and rebuild with CGO_ENABLED=1", ErrNotBuilt)
}

func openLib() (lib, error)           { return nil, notBuilt() }
func openEventLib() (eventLib, error) { return nil, notBuilt() }
func openStoreLib() (storeLib, error) { return nil, notBuilt() }
