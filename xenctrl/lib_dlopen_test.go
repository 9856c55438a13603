//go:build linux && amd64 && cgo

package xenctrl

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"unsafe"
)

// pretend makes checkControlDomain look at other files: their contents, or ""
// for none.
func pretend(t *testing.T, capabilities, privcmd string) {
	t.Helper()
	oldCaps, oldPrivcmd, oldSys := fileCapabilities, filePrivcmd, dirHypervisor
	t.Cleanup(func() { fileCapabilities, filePrivcmd, dirHypervisor = oldCaps, oldPrivcmd, oldSys })
	dir := t.TempDir()
	fileCapabilities, filePrivcmd, dirHypervisor = filepath.Join(dir, "capabilities"), filepath.Join(dir, "privcmd"), dir
	for file, text := range map[string]string{fileCapabilities: capabilities, filePrivcmd: privcmd} {
		if text == "" {
			continue
		}
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func TestControlDomain(t *testing.T) {
	for _, c := range []struct {
		name, capabilities, privcmd string
		want                        error
		cure                        string
	}{
		{"no xen", "", "", ErrNotControlDomain, "boot this machine under Xen"},
		{"xenfs is not mounted", "", "x", ErrNotControlDomain, "mount -t xenfs"},
		{"guest", "\n", "x", ErrNotControlDomain, "run in dom0"},
		{"no driver", "control_d\n", "", ErrNotControlDomain, "modprobe xen-privcmd"},
		{"dom0", "control_d\n", "x", nil, ""},
	} {
		pretend(t, c.capabilities, c.privcmd)
		err := checkControlDomain()
		if !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
		if err != nil && !strings.Contains(err.Error(), c.cure) {
			t.Errorf("%s: %q does not name the cure %q", c.name, err, c.cure)
		}
	}

	if os.Getuid() == 0 {
		t.Log("root may open everything: permission was not tested")
		return
	}
	pretend(t, "control_d\n", "x")
	if err := os.Chmod(filePrivcmd, 0); err != nil {
		t.Fatal(err)
	}
	if err := checkControlDomain(); !errors.Is(err, ErrPermission) || !errors.Is(err, fs.ErrPermission) {
		t.Errorf("got %v, want ErrPermission", err)
	}
}

func TestLibraryNames(t *testing.T) {
	names := xenctrlNames("4.17")
	if names[0] != "libxenctrl.so.4.17" || len(names) != newestMinor-oldestMinor+1 {
		t.Errorf("got %q", names)
	}
	names = xenctrlNames("")
	if names[0] != "libxenctrl.so.4.40" || names[len(names)-1] != "libxenctrl.so.4.13" {
		t.Errorf("got %q", names)
	}
	pretend(t, "", "")
	if r := runningRelease(); r != "" {
		t.Errorf("release %q", r)
	}
	if err := os.Mkdir(filepath.Join(dirHypervisor, "version"), 0o700); err != nil {
		t.Fatal(err)
	}
	for name, v := range map[string]string{"major": "4\n", "minor": "19\n"} {
		if err := os.WriteFile(filepath.Join(dirHypervisor, "version", name), []byte(v), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if r := runningRelease(); r != "4.19" {
		t.Errorf("release %q", r)
	}
}

func TestLibraryNotFound(t *testing.T) {
	_, err := openLibNamed([]string{"libxenctrl.so.4.98", "libxenctrl.so.4.99"})
	if !errors.Is(err, ErrLibraryNotFound) {
		t.Fatalf("got %v, want ErrLibraryNotFound", err)
	}
	for _, want := range []string{"libxenctrl.so.4.98", "libxenmisc"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q does not have %q in it", err, want)
		}
	}
	for _, r := range reasons {
		if r != ErrLibraryNotFound && errors.Is(err, r) {
			t.Errorf("%v is %v", err, r)
		}
	}
	// A library that is something else.
	if _, err := openLibNamed([]string{"libc.so.6"}); !errors.Is(err, ErrLibraryNotFound) || !strings.Contains(err.Error(), "xc_interface_open") {
		t.Errorf("got %v, want ErrLibraryNotFound and the missing function", err)
	}
}

// TestQuietLibrary has the real libraries fail, where they are installed and
// Xen is not: they must not print.
func TestQuietLibrary(t *testing.T) {
	if inDom0() {
		t.Skip("the libraries would succeed here")
	}
	if os.Getenv("XENCTRL_TEST_QUIET") != "" {
		pretend(t, "control_d\n", "x")
		_, err := Open()
		_, evErr := OpenEventChannels()
		_, storeErr := OpenStore()
		for _, err := range []error{err, evErr, storeErr} {
			if err == nil {
				t.Error("no error")
			}
			t.Log(err)
		}
		return
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe, "-test.run=^TestQuietLibrary$", "-test.v")
	cmd.Env = append(os.Environ(), "XENCTRL_TEST_QUIET=1")
	var out, msg strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &msg
	if err := cmd.Run(); err != nil {
		t.Errorf("%v: %s", err, out.String())
	}
	if msg.Len() != 0 {
		t.Errorf("printed %q", msg.String())
	}
	t.Log(out.String())
}

// The sizes that the C code copies.
func TestSizes(t *testing.T) {
	if n := unsafe.Sizeof(VCPUContext{}); n != 5168 {
		t.Errorf("VCPUContext has %d bytes, want 5168", n)
	}
	if n := unsafe.Sizeof(UserRegs{}); n != 200 {
		t.Errorf("UserRegs has %d bytes, want 200", n)
	}
	if n := unsafe.Sizeof(hvmHWCPU{}); n != 1032 {
		t.Errorf("hvmHWCPU has %d bytes, want 1032", n)
	}
	// None has padding that is not a field, so with the offsets that
	// TestHeaderValues compares, the sizes of the fields are right too.
	for _, v := range []any{VCPUContext{}, UserRegs{}, TrapInfo{}, hvmHWCPU{}} {
		typ, end := reflect.TypeOf(v), uintptr(0)
		for i := range typ.NumField() {
			f := typ.Field(i)
			if f.Offset != end {
				t.Errorf("%s: padding before %s", typ, f.Name)
			}
			end = f.Offset + f.Type.Size()
		}
		if end != typ.Size() {
			t.Errorf("%s: padding at the end", typ)
		}
	}
}
