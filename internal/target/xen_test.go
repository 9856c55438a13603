package target

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestConfiguredKernel(t *testing.T) {
	dir := t.TempDir()
	kernel := filepath.Join(dir, "vmlinuz")
	require.NoError(t, os.WriteFile(kernel, []byte("x"), 0o600))
	for name, c := range map[string]struct{ json, want string }{
		"pvh":       {`{"c_info":{"type":"pvh"},"b_info":{"kernel":"` + kernel + `","ramdisk":"/x"}}`, kernel},
		"pv":        {`{"b_info":{"type.pv":{"kernel":"` + kernel + `"}}}`, kernel},
		"no kernel": {`{"b_info":{"kernel":"/no/such/file"}}`, ""},
		"folder":    {`{"b_info":{"kernel":"` + dir + `"}}`, ""},
		"relative":  {`{"b_info":{"kernel":"vmlinuz"}}`, ""},
		"not json":  {`{"b_info":`, ""},
		"wrong":     {`{"b_info":{"kernel":7}}`, ""},
	} {
		file := filepath.Join(dir, "config")
		require.NoError(t, os.WriteFile(file, []byte(c.json), 0o600))
		assert.Equal(t, c.want, configuredKernel(file), name)
	}
	assert.Empty(t, configuredKernel(filepath.Join(dir, "none")))
}
