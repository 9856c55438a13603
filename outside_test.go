package vmprobes_test

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/kerneltest"
)

// TestOutside builds programs of another module, which sees what is exported and
// nothing else: a port of the C library's demonstration, one of the examples of
// XenAccess and LibVMI, and the first program of the README. They are as short as
// programs of that kind should be.
func TestOutside(t *testing.T) {
	root, err := filepath.Abs("testdata/outside")
	require.NoError(t, err)
	bin := outside(t, root)
	for program, lines := range map[string]int{"vmprobebio": 50, "introspect": 70} {
		b, err := os.ReadFile(filepath.Join(root, program, "main.go"))
		require.NoError(t, err)
		assert.LessOrEqual(t, bytes.Count(b, []byte{'\n'}), lines, program)
	}

	guest := kerneltest.NewSynthetic(kerneltest.Layout{})
	image := "file:" + guest.WriteImage(t)
	t.Setenv("VMPROBES_SYMBOLS", "")
	out, err := exec.Command(filepath.Join(bin, "introspect"), image, "init_task", "1").CombinedOutput()
	require.NoError(t, err, "%s", out)
	assert.Contains(t, string(out), "[    1] ")
	assert.Contains(t, string(out), `"demo"`)
	assert.Contains(t, string(out), kerneltest.SyntheticArgs[0])
	out, err = exec.Command(filepath.Join(bin, "vmprobebio"), image).CombinedOutput()
	require.Error(t, err)
	assert.Contains(t, string(out), "a saved image can't be probed")
	assert.NotContains(t, string(out), "registered")
	out, err = exec.Command(filepath.Join(bin, "readme")).CombinedOutput()
	require.Error(t, err, "there is no Xen here")
	assert.Contains(t, string(out), "vmprobes: open a3guest: ")
}

// firstProgram returns the first program of the README.
func firstProgram(t *testing.T) string {
	t.Helper()
	readme, err := os.ReadFile("README.md")
	require.NoError(t, err)
	_, rest, ok := strings.Cut(string(readme), "```go\npackage main\n")
	require.True(t, ok)
	program, _, _ := strings.Cut(rest, "```\n")
	return "package main\n" + program
}

// outside builds the module in dir, with what this one needs and nothing from the
// network, and returns the folder of the programs.
func outside(t *testing.T, dir string) (bin string) {
	t.Helper()
	bin, tmp := t.TempDir(), t.TempDir()
	theirs, err := os.ReadFile(filepath.Join(dir, "go.mod"))
	require.NoError(t, err)
	ours, err := os.ReadFile("go.mod")
	require.NoError(t, err)
	sums, err := os.ReadFile("go.sum")
	require.NoError(t, err)
	mod := string(theirs)
	for part := range strings.SplitSeq(string(ours), "require (") {
		if list, _, ok := strings.Cut(part, "\n)"); ok {
			mod += "\nrequire (" + list + "\n)\n"
		}
	}
	require.NoError(t, os.WriteFile(filepath.Join(tmp, "go.mod"), []byte(mod), 0o600))
	require.NoError(t, os.WriteFile(filepath.Join(tmp, "go.sum"), sums, 0o600))
	require.NoError(t, os.WriteFile(filepath.Join(tmp, "main.go"), []byte(firstProgram(t)), 0o600))
	overlay, err := json.Marshal(map[string]any{"Replace": map[string]string{filepath.Join(dir, "readme", "main.go"): filepath.Join(tmp, "main.go")}})
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(tmp, "overlay"), overlay, 0o600))
	cmd := exec.Command("go", "build", "-mod=mod", "-modfile="+filepath.Join(tmp, "go.mod"), "-overlay="+filepath.Join(tmp, "overlay"), "-ldflags=-s -w", "-o", bin+"/", "./...", "./readme")
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GOWORK=off", "GOFLAGS=", "GOPROXY=off")
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	return bin
}
