// Package cpio writes archives in the "newc" format, the one a Linux kernel
// unpacks into its first root file system.
package cpio

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"strings"
)

// The file type bits of a newc mode field.
const (
	modeDir     = 0o040000
	modeRegular = 0o100000
	modeSymlink = 0o120000
	modeCharDev = 0o020000
)

// maxSize is the largest file that the format's 32-bit size field can hold.
const maxSize = 1<<32 - 1

// Writer writes one archive. Parent directories are created as they are first
// needed. After the first error every call returns that error.
type Writer struct {
	w      io.Writer
	offset int64
	inode  uint32
	dirs   map[string]bool
	err    error
}

// NewWriter returns a Writer that writes its archive to w.
func NewWriter(w io.Writer) *Writer {
	return &Writer{w: w, dirs: map[string]bool{}}
}

// Dir adds the directory name and the ones above it, unless this archive has
// them already.
func (w *Writer) Dir(name string, perm fs.FileMode) error {
	name = clean(name)
	if name == "" || w.dirs[name] {
		return w.err
	}
	if err := w.parents(name); err != nil {
		return err
	}
	w.dirs[name] = true
	return w.entry(name, modeDir|uint32(perm.Perm()), 0, 0, 0, strings.NewReader(""))
}

// File adds a regular file of exactly size bytes, read from r.
func (w *Writer) File(name string, perm fs.FileMode, size int64, r io.Reader) error {
	if err := w.parents(clean(name)); err != nil {
		return err
	}
	return w.entry(clean(name), modeRegular|uint32(perm.Perm()), size, 0, 0, r)
}

// Bytes adds a regular file that holds data.
func (w *Writer) Bytes(name string, perm fs.FileMode, data []byte) error {
	return w.File(name, perm, int64(len(data)), strings.NewReader(string(data)))
}

// Symlink adds a symbolic link called name that points to target.
func (w *Writer) Symlink(target, name string) error {
	if err := w.parents(clean(name)); err != nil {
		return err
	}
	return w.entry(clean(name), modeSymlink|0o777, int64(len(target)), 0, 0, strings.NewReader(target))
}

// CharDevice adds a character device node.
func (w *Writer) CharDevice(name string, perm fs.FileMode, major, minor uint32) error {
	if err := w.parents(clean(name)); err != nil {
		return err
	}
	return w.entry(clean(name), modeCharDev|uint32(perm.Perm()), 0, major, minor, strings.NewReader(""))
}

// Close ends the archive and pads it to a multiple of 512 bytes, so that
// another archive may follow it in the same file. It does not close the
// underlying writer.
func (w *Writer) Close() error {
	if err := w.entry("TRAILER!!!", 0, 0, 0, 0, strings.NewReader("")); err != nil {
		return err
	}
	w.pad(512)
	if w.err != nil {
		return w.err
	}
	w.err = errors.New("cpio: archive already closed")
	return nil
}

func clean(name string) string {
	return strings.TrimPrefix(path.Clean("/"+name), "/")
}

func (w *Writer) parents(name string) error {
	if dir := path.Dir(name); dir != "." {
		return w.Dir(dir, 0o755)
	}
	return w.err
}

func (w *Writer) entry(name string, mode uint32, size int64, major, minor uint32, r io.Reader) error {
	if w.err != nil {
		return w.err
	}
	if size < 0 || size > maxSize {
		w.err = fmt.Errorf("cpio: %s: size %d does not fit the format", name, size)
		return w.err
	}
	w.inode++
	links := 1
	if mode&modeDir != 0 && mode&modeRegular == 0 {
		links = 2
	}
	// Fields: inode, mode, uid, gid, links, mtime, size, the device the file
	// is on (2), the device it is (2), name length, checksum. Times are zero
	// so that the same content gives the same archive.
	w.write(fmt.Appendf(nil, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%s\x00",
		w.inode, mode, 0, 0, links, 0, size, 0, 0, major, minor, len(name)+1, 0, name))
	w.pad(4)
	if w.err != nil {
		return w.err
	}
	n, err := io.Copy(w.w, io.LimitReader(r, size))
	w.offset += n
	switch {
	case err != nil:
		w.err = fmt.Errorf("cpio: %s: %w", name, err)
	case n != size:
		w.err = fmt.Errorf("cpio: %s: %d bytes of %d: %w", name, n, size, io.ErrUnexpectedEOF)
	}
	w.pad(4)
	return w.err
}

func (w *Writer) write(p []byte) {
	if w.err != nil {
		return
	}
	n, err := w.w.Write(p)
	w.offset += int64(n)
	if err != nil {
		w.err = fmt.Errorf("cpio: %w", err)
	}
}

func (w *Writer) pad(to int64) {
	if rest := w.offset % to; rest != 0 {
		w.write(make([]byte, to-rest))
	}
}
