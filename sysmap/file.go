package sysmap

import (
	"bufio"
	"bytes"
	"compress/flate"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/vmprobes/vmprobes/internal/kimage"
)

// ParseFile reads a file of any kind the package knows, and finds out itself
// which: System.map or kallsyms text, plain or compressed; an ELF vmlinux with or
// without .symtab, plain or compressed (as the kernels of old Xen guests are); or
// a vmlinuz (bzImage). The errors are those of Parse, FromELF and FromVMLinuz with
// the path before them, or the *fs.PathError of opening it.
func ParseFile(path string) (*Map, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // only read from
	m, err := parseOpen(f)
	if err != nil {
		var pe *os.PathError
		if errors.As(err, &pe) {
			return nil, err
		}
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return m, nil
}

func parseOpen(f *os.File) (*Map, error) {
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	br := bufio.NewReaderSize(f, readSize)
	head, err := br.Peek(kimage.HeaderSize)
	if err != nil && err != io.EOF {
		return nil, err
	}
	switch {
	case kimage.IsELF(head):
		return FromELF(f)
	case kimage.IsBootImage(head):
		return FromVMLinuz(f, fi.Size())
	case kimage.Packed(head):
		return parsePacked(br)
	case bytes.HasPrefix(head, []byte("MZ")):
		return nil, formatErr("a PE file, but no bzImage (a unified kernel image? extract its .linux section)")
	}
	return parseText(br)
}

// parseText reads a System.map, kallsyms, or a symbol file.
func parseText(br *bufio.Reader) (*Map, error) {
	if head, _ := br.Peek(64); bytes.HasPrefix(bytes.TrimLeft(head, " \t\r\n"), []byte("{")) {
		return FromISF(br)
	}
	return Parse(br)
}

// parsePacked reads a compressed file that is no bzImage.
func parsePacked(r *bufio.Reader) (*Map, error) {
	if head, _ := r.Peek(2); string(head) == "\x1f\x8b" {
		z, err := gzip.NewReader(r)
		if err != nil {
			return nil, formatErr("%v", err)
		}
		br := bufio.NewReaderSize(z, readSize)
		if head, _ := br.Peek(4); !kimage.IsELF(head) {
			m, err := parseText(br)
			var corrupt flate.CorruptInputError
			if errors.Is(err, gzip.ErrChecksum) || errors.Is(err, gzip.ErrHeader) ||
				errors.Is(err, io.ErrUnexpectedEOF) || errors.As(err, &corrupt) {
				return nil, fmt.Errorf("%w: %w", ErrFormat, err)
			}
			return m, err
		}
		img, err := readAtMost(br, kimage.MaxKernel)
		if err != nil {
			return nil, fmt.Errorf("%w: gzip: %w", ErrFormat, err)
		}
		return FromELF(bytes.NewReader(img))
	}
	data, err := readAtMost(r, kimage.MaxFile)
	if err != nil {
		return nil, err
	}
	img, err := kimage.Unpack(data)
	if err != nil {
		return nil, imageErr(err)
	}
	if kimage.IsELF(img) {
		return FromELF(bytes.NewReader(img))
	}
	return parseText(bufio.NewReader(bytes.NewReader(img)))
}

// readAtMost reads r to its end.
func readAtMost(r io.Reader, limit int64) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err == nil && int64(len(b)) > limit {
		err = formatErr("more than %d bytes", limit)
	}
	return b, err
}
