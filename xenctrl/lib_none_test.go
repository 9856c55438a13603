//go:build !linux || !amd64 || !cgo

package xenctrl

import (
	"errors"
	"runtime"
	"testing"
)

func TestNotBuilt(t *testing.T) {
	want := ErrNotBuilt
	if runtime.GOOS != "linux" || runtime.GOARCH != "amd64" {
		want = ErrUnsupportedPlatform
	}
	if err := notBuilt(); !errors.Is(err, want) || err.Error() == want.Error() {
		t.Errorf("got %v, want %v and a cure", err, want)
	}
}
