// Package kernelimg takes the ELF kernel out of a compressed x86 Linux boot
// image ("bzImage"). Xen starts an ELF kernel at once, while it needs minutes
// under an emulator to decompress the boot image itself.
package kernelimg

import (
	"bytes"
	"fmt"

	"github.com/vmprobes/vmprobes/internal/kimage"
)

// Errors that callers may want to tell apart.
var (
	// ErrNotBootImage says that the file is no x86 Linux boot image.
	ErrNotBootImage = kimage.ErrNotBootImage
	// ErrCompression says that the payload's compression is not known here.
	ErrCompression = kimage.ErrCompression
)

// ELF returns the ELF kernel in image, which is the content of a vmlinuz file.
// An image that is an ELF file already is returned as it is.
func ELF(image []byte) ([]byte, error) {
	if kimage.IsELF(image) {
		return image, nil
	}
	kernel, err := kimage.Kernel(bytes.NewReader(image), int64(len(image)))
	if err != nil {
		return nil, fmt.Errorf("unpack the kernel: %w", err)
	}
	return kernel, nil
}
