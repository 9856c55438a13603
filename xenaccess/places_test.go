package xenaccess_test

import (
	"testing"

	"github.com/stretchr/testify/assert"

	"github.com/vmprobes/vmprobes/xenaccess"
)

// TestSymbolPlaceNames: where Debian before and after 7.2, Fedora, Arch and openSUSE, and
// their debug packages, put a kernel.
func TestSymbolPlaceNames(t *testing.T) {
	files := xenaccess.SymbolFiles("7.2.13")
	for _, want := range []string{
		"/boot/vmlinuz-7.2.13", "/boot/System.map-7.2.13", "/usr/lib/debug/boot/vmlinux-7.2.13",
		"/usr/lib/modules/7.2.13/vmlinuz", "/usr/lib/modules/7.2.13/vmlinux", "/usr/lib/debug/lib/modules/7.2.13/vmlinux",
	} {
		assert.Contains(t, files, want)
	}
	assert.LessOrEqual(t, len(files), 15, "so many are tried, besides the one that was booted")
	assert.Empty(t, xenaccess.SymbolFiles(""))
}
