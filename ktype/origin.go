package ktype

import (
	"bytes"
	"debug/elf"
	"io"

	"github.com/vmprobes/vmprobes/internal/kimage"
)

// An Origin is what a file with types says of the kernel that they are of.
type Origin struct {
	// BuildID is the kernel's build id in hexadecimal digits, or "".
	BuildID string
	// Banners are the version strings in the file ("Linux version …", without the
	// newline), one of which is the kernel's; or none.
	Banners []string
}

// Origin returns what the file that the types were read from says of its kernel.
// Nothing is known of raw BTF: see [Types.IsBTF].
func (t *Types) Origin() Origin { return t.origin }

// IsBTF reports whether the types are those of raw BTF.
func (t *Types) IsBTF(raw []byte) bool {
	s, ok := t.src.(*btfSource)
	return ok && bytes.Equal(s.sheet.raw, raw)
}

// withOrigin adds what an ELF kernel says of itself.
func withOrigin(t *Types, f *elf.File) *Types {
	t.origin.BuildID, t.origin.Banners = kimage.Identity(f)
	return t
}

// FromVMLinuz reads the types of a bzImage, the vmlinuz of x86: it unpacks the kernel in
// it and gives that to FromELF. Only kernels with BTF have any there.
func FromVMLinuz(r io.ReaderAt, size int64) (*Types, error) {
	img, err := kimage.Kernel(r, size)
	if err != nil {
		return nil, formatErr("%v", err)
	}
	return FromELF(bytes.NewReader(img))
}
