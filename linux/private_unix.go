//go:build unix

package linux

import (
	"io/fs"
	"os"
	"syscall"
)

// private reports whether only the caller can write to a folder.
func private(info fs.FileInfo) bool {
	st, ok := info.Sys().(*syscall.Stat_t)
	return ok && info.IsDir() && info.Mode().Perm()&0o022 == 0 && int(st.Uid) == os.Geteuid()
}
