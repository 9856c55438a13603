package vmprobes_test

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// testUser runs programs as a user other than root: without rights to Xen's devices, and
// with them.
func testUser(t labTest) {
	const user = 65534
	devices := []string{"/dev/xen/privcmd", "/dev/xen/hypercall", "/dev/xen/evtchn", "/dev/xen/xenbus"}
	runAs := func(tt *testing.T, program string, args ...string) (string, error) {
		cmd := exec.Command(binary(tt, program), args...)
		cmd.Env = append(os.Environ(), "HOME=/")
		asUser(cmd, user)
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	t.Run("no rights", func(tt *testing.T) {
		for program, args := range map[string][]string{"process-list": nil, "vmprobebio": {"-n", "1"}} {
			out, err := runAs(tt, program, append(args, t.g.Name())...)
			require.Error(tt, err)
			assert.Contains(tt, out, "this is user 65534")
			assert.Contains(tt, out, "/dev/xen/privcmd")
			assert.NotContains(tt, out, "registered")
			tt.Log(out)
		}
	})
	t.Run("rights", func(tt *testing.T) {
		for _, d := range devices {
			st, err := os.Stat(d)
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			require.NoError(tt, err)
			require.NoError(tt, os.Chmod(d, 0o666))
			defer os.Chmod(d, st.Mode().Perm())
		}
		const locks = "/run/vmprobes"
		require.NoError(tt, os.MkdirAll(locks, 0o700))
		require.NoError(tt, os.Chown(locks, user, user))
		defer os.Chown(locks, 0, 0)
		out, err := runAs(tt, "process-list", t.g.Name())
		require.NoError(tt, err, "%s", out)
		assert.Contains(tt, out, "[    1] init\n")
		cmd := exec.Command(binary(tt, "vmprobebio"), "-n", "3", t.g.Name())
		asUser(cmd, user)
		probe := start(tt, cmd, "vmprobe registered\n")
		t.ask("open 3 0")
		require.NoError(tt, <-probe.done, "%s", probe)
		assert.Equal(tt, 3, strings.Count(probe.String(), "(/lab-probe-target)"), "%s", probe)
	})
}
