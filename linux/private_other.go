//go:build !unix

package linux

import "io/fs"

// private reports whether only the caller can write to a folder. Here that is
// what the system's default for a user's folders has to see to.
func private(info fs.FileInfo) bool { return info.IsDir() }
