//go:build !unix

package linux

import "io/fs"

// private reports whether only the caller can write to a folder. Here that is left to
// the system's defaults for a user's folders.
func private(info fs.FileInfo) bool { return info.IsDir() }
