package linux

import (
	"bytes"
	"cmp"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/vmprobes/vmprobes/paging"
	"github.com/vmprobes/vmprobes/sysmap"
)

// Decoding a symbol table costs a good part of a second, reading it a few
// milliseconds. So the decoded table of each kernel is kept in a file, with the hash
// of the guest's tables that it was decoded from, and is used for another guest only
// if the hash of its tables is the same. No guest can put wrong symbols into the cache
// for another: the bytes hashed are the very bytes decoded, not what the guest shows a
// moment later ([recorder]).
//
// An entry is a header and what [sysmap.Map.MarshalBinary] makes. Addresses are
// relative to the kernel's first one, so that KASLR doesn't matter.
type cacheHeader struct {
	Magic  [8]byte
	Probe  uint64 // where kallsyms_token_table is: one look tells most kernels apart
	Sum    [sha256.Size]byte
	Start  uint64 // what Hash is of
	Size   uint64
	Hash   [sha256.Size]byte
	Link   uint64 // the kernel's first address in the symbols that follow
	Symtab uint64 // their size
}

// Bounds of the cache. An entry has about 5 MiB.
const (
	cacheMagic   = "vmpsym\x00\x02"
	cacheEntries = 32
	cacheTables  = 32 << 20 // bytes hashed, and recorded
	cacheSymtab  = 64 << 20 // bytes read from a file
	cacheSuffix  = ".symbols"
	cacheTemp    = ".tmp"
	cacheStale   = time.Hour // age of a temporary file whose writer was killed
	probeSize    = 512
)

// A recorder reads each page of memory once, and gives the same bytes for it from then
// on, whatever the guest writes meanwhile.
type recorder struct {
	read  func(addr uint64, b []byte) error
	pages map[uint64][]byte // by address
	full  bool              // not all could be kept
}

// Read implements [sysmap.Memory].
func (r *recorder) Read(addr uint64, b []byte) error {
	for len(b) > 0 {
		at := addr &^ (paging.PageSize - 1)
		page := r.pages[at]
		if page == nil {
			page = make([]byte, paging.PageSize)
			if err := r.read(at, page); err != nil {
				return err
			}
			if len(r.pages) < cacheTables/paging.PageSize {
				r.pages[at] = page
			} else {
				r.full = true
			}
		}
		n := copy(b, page[addr-at:])
		addr, b = addr+uint64(n), b[n:]
	}
	return nil
}

// cached takes the symbols of the running kernel from the cache, if they are in it.
func (k *Kernel) cached(dir string) bool {
	root, err := openCache(dir)
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			k.log.Warn("cache not used", "dir", dir, "err", err)
		}
		return false
	}
	defer root.Close()
	for _, name := range cacheFiles(root) {
		m, err := k.tryCached(root, name)
		if err != nil {
			k.log.Debug("cache entry not used", "file", name, "err", err)
		}
		if m != nil {
			k.syms = m
			now := time.Now() // trimCache removes what wasn't used for longest
			if err := root.Chtimes(name, now, now); err != nil {
				k.log.Debug("cache", "err", err)
			}
			return true
		}
	}
	return false
}

// tryCached returns the symbols in a file if the running kernel has the same.
func (k *Kernel) tryCached(root *os.Root, name string) (*sysmap.Map, error) {
	f, err := root.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	h, err := readHeader(f)
	if err != nil {
		return nil, err
	}
	if sum, err := k.tableHash(k.begin("cache").Read, h.Probe, probeSize); err != nil || sum != h.Sum {
		return nil, nil //nolint:nilerr // another kernel
	}
	if sum, err := k.tableHash(k.begin("cache").Read, h.Start, h.Size); err != nil || sum != h.Hash {
		return nil, nil //nolint:nilerr // another kernel
	}
	m, err := readSymbols(f, h)
	if err != nil {
		return nil, err
	}
	if slide := k.ranges[0].Addr - h.Link; slide != 0 {
		m = m.Slide(slide)
	}
	k.explain("symbols", nil, fmt.Sprintf("the guest's tables have the hash %s…", hex.EncodeToString(h.Hash[:6])),
		"%d, from the cache", m.Len())
	return m, nil
}

func readHeader(r io.Reader) (h cacheHeader, err error) {
	if err := binary.Read(r, binary.LittleEndian, &h); err != nil {
		return h, err
	}
	if string(h.Magic[:]) != cacheMagic || h.Size > cacheTables || h.Symtab > cacheSymtab {
		return h, errors.New("not an entry of this version")
	}
	return h, nil
}

func readSymbols(r io.Reader, h cacheHeader) (*sysmap.Map, error) {
	var b bytes.Buffer
	b.Grow(int(min(h.Symtab, 8<<20))) // more is allocated as it is read
	if _, err := io.CopyN(&b, r, int64(h.Symtab)); err != nil {
		return nil, err
	}
	return sysmap.UnmarshalMap(b.Bytes())
}

// tableHash hashes guest memory, off bytes after the kernel's first address.
// Words that hold that address, as kallsyms_relative_base does, count as a constant:
// KASLR changes them at each boot.
func (k *Kernel) tableHash(read func(uint64, []byte) error, off, n uint64) (sum [sha256.Size]byte, err error) {
	base := k.ranges[0].Addr
	b := make([]byte, n)
	if err := read(base+off, b); err != nil {
		return sum, err
	}
	word := binary.LittleEndian.AppendUint64(nil, base)[:k.bits/8]
	return sha256.Sum256(bytes.ReplaceAll(b, word, []byte("its base")[:k.bits/8])), nil
}

// keep writes the symbols of the running kernel, which were decoded from the tables t
// as recorded, to the cache.
func (k *Kernel) keep(dir string, t *sysmap.Tables, rec *recorder) error {
	base := k.ranges[0].Addr
	if text, err := k.symbol("_text"); err != nil || text != base {
		return errors.New("the image doesn't begin with _text")
	}
	// All tables lie close together. Whatever else is between them is constant, too.
	start := min(t.Names, t.Markers, t.TokenTable, t.Addresses)
	end := max(t.Names, t.Markers, t.TokenTable+probeSize, t.Addresses+uint64(k.bits/8)*uint64(t.Count))
	if start < base || end-start > cacheTables {
		return fmt.Errorf("tables from %#x to %#x: %w", start, end, ErrBadKernel)
	}
	b, err := k.syms.MarshalBinary()
	if err != nil {
		return err
	}
	h := cacheHeader{Probe: t.TokenTable - base, Start: start - base, Size: end - start, Link: base, Symtab: uint64(len(b))}
	copy(h.Magic[:], cacheMagic)
	if h.Sum, err = k.tableHash(rec.Read, h.Probe, probeSize); err != nil {
		return err
	}
	if h.Hash, err = k.tableHash(rec.Read, h.Start, h.Size); err != nil {
		return err
	}
	if rec.full {
		return fmt.Errorf("more than %s were read", size(cacheTables))
	}
	var out bytes.Buffer
	if err := binary.Write(&out, binary.LittleEndian, &h); err != nil {
		return err
	}
	out.Write(b)

	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	root, err := openCache(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	trimCache(root)
	// Another process may be doing the same: the last one wins, with the same bytes.
	tmp := rand.Text() + cacheTemp
	f, err := root.OpenFile(tmp, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(out.Bytes())
	err = errors.Join(err, f.Close())
	if err == nil {
		err = root.Rename(tmp, hex.EncodeToString(h.Hash[:16])+cacheSuffix)
	}
	if err != nil {
		err = errors.Join(err, root.Remove(tmp))
	}
	return err
}

// openCache opens the folder of the cache, if it belongs to the caller and nobody else
// can write to it.
func openCache(dir string) (*os.Root, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	info, err := root.Stat(".")
	if err == nil && !private(info) {
		err = fmt.Errorf("%s must belong to its user, and nobody else may write to it", dir)
	}
	if err != nil {
		root.Close()
		return nil, err
	}
	return root, nil
}

// cacheFiles returns the entries of the cache, those used last first.
func cacheFiles(root *os.Root) []string {
	entries, err := fs.ReadDir(root.FS(), ".")
	if err != nil {
		return nil
	}
	type file struct {
		name string
		used time.Time
	}
	var files []file
	for _, e := range entries {
		info, err := e.Info()
		switch {
		case err != nil || !info.Mode().IsRegular():
		case strings.HasSuffix(e.Name(), cacheSuffix):
			files = append(files, file{e.Name(), info.ModTime()})
		case strings.HasSuffix(e.Name(), cacheTemp) && time.Since(info.ModTime()) > cacheStale:
			root.Remove(e.Name())
		}
	}
	slices.SortFunc(files, func(a, b file) int { return cmp.Or(b.used.Compare(a.used), cmp.Compare(a.name, b.name)) })
	names := make([]string, len(files))
	for i, f := range files {
		names[i] = f.name
	}
	return names
}

// trimCache makes room for one more entry.
func trimCache(root *os.Root) {
	files := cacheFiles(root)
	for _, f := range files[min(len(files), cacheEntries-1):] {
		root.Remove(f)
	}
}
