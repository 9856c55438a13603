package vmprobes_test

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes"
	"github.com/vmprobes/vmprobes/xenaccess"
)

// TestOpenErrorText: an error of Open says the operation, the guest's name and each
// reason once.
func TestOpenErrorText(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	file := func(name, content string) string {
		require.NoError(t, os.WriteFile(at(name), []byte(content), 0o600))
		return at(name)
	}
	text := file("text", "hello\n")
	left, err := net.Listen("unix", at("left"))
	require.NoError(t, err)
	left.(*net.UnixListener).SetUnlinkOnClose(false)
	require.NoError(t, left.Close())
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	refused := tcp.Addr().String()
	require.NoError(t, tcp.Close())
	hangsUp, err := net.Listen("unix", at("hangs-up"))
	require.NoError(t, err)
	defer hangsUp.Close()
	go func() {
		for {
			c, err := hangsUp.Accept()
			if err != nil {
				return
			}
			_, _ = c.Read(make([]byte, 1))
			_ = c.Close()
		}
	}()

	const (
		stub = `: start QEMU with -gdb unix:PATH,server=on,wait=off, or enter "gdbserver unix:PATH,server=on,wait=off" in its monitor, ` +
			`or use qemu+monitor:PATH with the monitor's socket`
		monitor = `: start QEMU with -monitor unix:PATH,server=on,wait=off`
		names   = `not the name of a guest: want the name or id of a Xen domain (xen:NAME if there is a colon in it), qemu:PATH or ` +
			`qemu:HOST:PORT (a gdbstub), qemu+monitor:PATH (a monitor), or file:PATH (a saved memory image)`
		image = `a saved image can't be probed: nothing runs in it`
	)
	for name, want := range map[string]string{
		"":                                  "no guest is named",
		"kvm:x":                             names,
		text:                                names + "; the file of that name is file:" + text,
		"qemu:" + at("none"):                "nobody listens there (no such file or directory)" + stub,
		"qemu:" + at("left"):                "nobody listens there (connection refused)" + stub,
		"qemu:" + text:                      "nobody listens there (connection refused)" + stub,
		"qemu:" + refused:                   "nobody listens there (connection refused)" + stub,
		"qemu:" + text + "/x":               "can't connect: not a directory",
		"qemu:/" + strings.Repeat("x", 120): "can't connect: invalid argument",
		"qemu+monitor:" + at("none"):        "QEMU's monitor: nobody listens there (no such file or directory)" + monitor,
		"qemu+monitor:" + refused:           "QEMU's monitor: nobody listens there (connection refused)" + monitor,
		"qemu+monitor:" + text + "/x":       "QEMU's monitor: can't connect: not a directory",
		"file:" + at("none"):                "there is no such file",
		"file:" + text + "/x":               "not a directory",
		"file:" + dir:                       "memory image can't be read as it is: neither a file nor a block device",
		"file:" + file("empty", ""):         "malformed memory image: empty",
		"file:" + text + "?bogus":           `option "bogus": want raw, hole=pc, hole=q35, hole=ADDRESS (of a page below 4 GiB, such as 0xc0000000) or skip=BYTES`,
		"file:" + text: "no Linux kernel found: has the guest booted? (there are no vCPU registers); " +
			"no crash dump information (vmcoreinfo) in memory; a flat file of 0x6 bytes, which is no multiple of a page: " +
			"it is cut short, or something else is before or behind the memory",
	} {
		prefix := ": open: "
		if name != "" {
			prefix = ": open " + name + ": "
		}
		_, err := xenaccess.Open(t.Context(), name, &xenaccess.Options{Config: "-", Cache: "-"})
		assert.EqualError(t, err, "xenaccess"+prefix+want)
		if name == "file:"+text {
			want = image
		}
		_, err = vmprobes.Open(t.Context(), name, &vmprobes.Options{Config: "-", Cache: "-"})
		assert.EqualError(t, err, "vmprobes"+prefix+want)
	}
	// What a socket says that is closed depends on the moment: no more than that, though.
	for _, scheme := range []string{"qemu:", "qemu+monitor:"} {
		_, err := xenaccess.Open(t.Context(), scheme+at("hangs-up"), nil)
		require.Error(t, err)
		assert.Equal(t, 1, strings.Count(err.Error(), at("hangs-up")), "%v", err)
	}
}

// TestOpenWatchdog: Open says why there is no watchdog, before it looks for the guest.
func TestOpenWatchdog(t *testing.T) {
	for want, opts := range map[string]vmprobes.Options{
		"Options.Watchdog is -1s, want 0 or 2s to 24h0m0s":               {Watchdog: -time.Second},
		"Options.Watchdog is 1.999999999s, want 0 or 2s to 24h0m0s":      {Watchdog: 2*time.Second - 1},
		"Options.Watchdog is 24h0m0.000000001s, want 0 or 2s to 24h0m0s": {Watchdog: 24*time.Hour + 1},
		"it is the guardian's work, and Options.NoGuardian is set":       {Watchdog: 10 * time.Second, NoGuardian: true},
	} {
		_, err := vmprobes.Open(t.Context(), "a3guest", &opts)
		assert.ErrorIs(t, err, vmprobes.ErrNoWatchdog)
		assert.EqualError(t, err, "vmprobes: open a3guest: no watchdog can be had: "+want)
	}
	// What is right is not in the way.
	for _, d := range []time.Duration{0, 2 * time.Second, 24 * time.Hour} {
		_, err := vmprobes.Open(t.Context(), "qemu:"+t.TempDir()+"/none", &vmprobes.Options{Watchdog: d})
		assert.ErrorIs(t, err, vmprobes.ErrDomainNotFound)
	}
}

// TestOpenFilesText: the same of the files that Options name.
func TestOpenFilesText(t *testing.T) {
	dir := t.TempDir()
	image := filepath.Join(dir, "image")
	require.NoError(t, os.WriteFile(image, make([]byte, 4096), 0o600))
	// The first 40 bytes of 100 random ones, packed by xz.
	const cutXZ = "\xfd\x37\x7a\x58\x5a\x00\x00\x04\xe6\xd6\xb4\x46\x02\x00\x21\x01\x16\x00\x00\x00" +
		"\x74\x2f\xe5\xa3\x01\x00\x63\x5c\x08\x6f\x83\x99\x05\x98\x0d\xe3\x78\xde\x34\xd2"
	const noSymbols = "the kernel's symbols are not known: "
	for _, test := range []struct {
		file, content           string
		symbols, types, configs string // "": not tried
	}{
		{"none", "", noSymbols + "open FILE: no such file or directory", "open FILE: no such file or directory", "open FILE: no such file or directory"},
		{".", "", noSymbols + "read FILE: is a directory", "read FILE: is a directory", "read FILE: is a directory"},
		{"empty", "", noSymbols + "FILE: bad symbol table: no symbols in 0 bytes of text", "FILE: bad type information: empty", ""},
		{"cut.xz", cutXZ, noSymbols + "FILE: damaged boot image: xz payload: unexpected EOF",
			"FILE: bad type information: unpacking: unexpected EOF", ""},
		{"words", "hello\n", noSymbols + `FILE: line 1: no hexadecimal address in "hello"`,
			"FILE: bad type information: neither BTF, nor ELF, nor an ISF file: it starts with 68 65 6c 6c 6f 0a",
			"FILE:2:1: a { is expected after the domain's name, not the end"},
	} {
		path := filepath.Join(dir, test.file)
		if test.file != "none" && test.file != "." {
			require.NoError(t, os.WriteFile(path, []byte(test.content), 0o600))
		}
		for want, opts := range map[*string]xenaccess.Options{
			&test.symbols: {Symbols: path, Config: "-"}, &test.types: {Types: path, Config: "-"}, &test.configs: {Config: path},
		} {
			if *want == "" {
				continue
			}
			opts.Cache = "-"
			_, err := xenaccess.Open(t.Context(), "file:"+image, &opts)
			assert.EqualError(t, err, "xenaccess: open file:"+image+": "+strings.ReplaceAll(*want, "FILE", path))
		}
	}
}
