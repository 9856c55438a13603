package xenctrl

import (
	"errors"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
)

// reasons are the errors that say that Xen cannot be reached. No two match.
var reasons = []error{ErrUnsupportedPlatform, ErrNotBuilt, ErrLibraryNotFound, ErrNotControlDomain, ErrPermission}

// inDom0 reports whether this machine is one where Open works.
func inDom0() bool {
	b, err := os.ReadFile("/proc/xen/capabilities")
	return err == nil && strings.Contains(string(b), "control_d")
}

// TestOpenElsewhere has each of the three functions that open something run
// where Xen is not: they say so, and nothing else is said.
func TestOpenElsewhere(t *testing.T) {
	if inDom0() {
		t.Skip("this is a control domain: see TestLab")
	}
	opens := map[string]func() error{
		"Open":              func() error { _, err := Open(); return err },
		"OpenStore":         func() error { _, err := OpenStore(); return err },
		"OpenEventChannels": func() error { _, err := OpenEventChannels(); return err },
	}
	if name := os.Getenv("XENCTRL_TEST_OPEN"); name != "" {
		err := opens[name]()
		if err == nil {
			t.Fatal("no error")
		}
		var is []string
		for _, r := range reasons {
			if errors.Is(err, r) {
				is = append(is, r.Error())
			}
		}
		if len(is) != 1 {
			t.Errorf("%v is %q, want one", err, is)
		}
		return
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for name, open := range opens {
		err := open()
		switch {
		case runtime.GOOS != "linux" || runtime.GOARCH != "amd64":
			if !errors.Is(err, ErrUnsupportedPlatform) {
				t.Errorf("%s: %v, want ErrUnsupportedPlatform", name, err)
			}
		case !errors.Is(err, ErrNotControlDomain) && !errors.Is(err, ErrNotBuilt):
			t.Errorf("%s: %v, want ErrNotControlDomain or ErrNotBuilt", name, err)
		}
		cmd := exec.Command(exe, "-test.run=^TestOpenElsewhere$")
		cmd.Env = append(os.Environ(), "XENCTRL_TEST_OPEN="+name)
		var out, msg strings.Builder
		cmd.Stdout, cmd.Stderr = &out, &msg
		if err := cmd.Run(); err != nil {
			t.Errorf("%s: %v: %s", name, err, out.String())
		}
		if msg.Len() != 0 {
			t.Errorf("%s printed %q", name, msg.String())
		}
	}
}
