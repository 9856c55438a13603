package linux

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vmprobes/vmprobes/sysmap"
)

// Decoding a symbol table costs a good part of a second, reading it a few
// milliseconds. So the decoded table of each kernel seen is kept in a file, with
// the hash of the guest's own tables that it was made of, and is taken for another
// guest only if that one's tables have the same hash: no guest can put wrong
// symbols into the cache for another.
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
	cacheMagic   = "vmpsym\x00\x01"
	cacheEntries = 32
	cacheTables  = 32 << 20 // bytes hashed
	cacheSymtab  = 64 << 20 // bytes read from a file
	cacheSuffix  = ".symbols"
	probeSize    = 512
)

// cached returns the symbols of the running kernel if dir has them.
func (k *Kernel) cached(dir string) *sysmap.Map {
	if err := checkCache(dir); err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			k.log.Warn("cache not used", "dir", dir, "err", err)
		}
		return nil
	}
	for _, f := range cacheFiles(dir) {
		m, err := k.tryCached(f)
		if err != nil {
			k.log.Debug("cache entry not used", "file", f, "err", err)
		}
		if m != nil {
			return m
		}
	}
	return nil
}

// tryCached returns the symbols in a file if the running kernel has the same.
func (k *Kernel) tryCached(name string) (*sysmap.Map, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var h cacheHeader
	if err := binary.Read(f, binary.LittleEndian, &h); err != nil {
		return nil, err
	}
	if string(h.Magic[:]) != cacheMagic || h.Size > cacheTables || h.Symtab > cacheSymtab {
		return nil, errors.New("not an entry of this version")
	}
	if sum, err := k.tableHash(h.Probe, probeSize); err != nil || sum != h.Sum {
		return nil, nil //nolint:nilerr // another kernel
	}
	if sum, err := k.tableHash(h.Start, h.Size); err != nil || sum != h.Hash {
		return nil, nil //nolint:nilerr // another kernel
	}
	b := make([]byte, h.Symtab)
	if _, err := io.ReadFull(f, b); err != nil {
		return nil, err
	}
	m, err := sysmap.UnmarshalMap(b)
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

// tableHash hashes guest memory, off bytes behind the kernel's first address.
// Words that hold that address count as zero: kallsyms_relative_base does, and is
// not the same at each boot.
func (k *Kernel) tableHash(off, n uint64) (sum [sha256.Size]byte, err error) {
	base := k.ranges[0].Addr
	b := make([]byte, n)
	if err := k.Read(base+off, b); err != nil {
		return sum, err
	}
	var word [8]byte
	binary.LittleEndian.PutUint64(word[:], base)
	for i := 0; ; {
		j := bytes.Index(b[i:], word[:])
		if j < 0 {
			break
		}
		clear(b[i+j : i+j+8])
		i += j + 8
	}
	return sha256.Sum256(b), nil
}

// keep writes the symbols of the running kernel to the cache.
func (k *Kernel) keep(dir string, t *sysmap.Tables) error {
	base := k.ranges[0].Addr
	if text, err := k.symbol("_text"); err != nil || text != base {
		return errors.New("the image doesn't begin with _text")
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	if err := checkCache(dir); err != nil {
		return err
	}
	// All tables lie close together. Whatever else is between them is constant, too.
	start := min(t.Names, t.Markers, t.TokenTable, t.Addresses)
	end := max(t.Names, t.Markers, t.TokenTable+probeSize, t.Addresses+4*uint64(t.Count))
	if start < base || end-start > cacheTables {
		return fmt.Errorf("tables from %#x to %#x: %w", start, end, ErrBadKernel)
	}
	b, err := k.syms.MarshalBinary()
	if err != nil {
		return err
	}
	h := cacheHeader{Probe: t.TokenTable - base, Start: start - base, Size: end - start, Link: base, Symtab: uint64(len(b))}
	copy(h.Magic[:], cacheMagic)
	if h.Sum, err = k.tableHash(h.Probe, probeSize); err != nil {
		return err
	}
	if h.Hash, err = k.tableHash(h.Start, h.Size); err != nil {
		return err
	}
	var out bytes.Buffer
	if err := binary.Write(&out, binary.LittleEndian, &h); err != nil {
		return err
	}
	out.Write(b)
	trimCache(dir)
	// Another process may be doing the same: whoever is last wins, with the same.
	tmp, err := os.CreateTemp(dir, "*.tmp")
	if err != nil {
		return err
	}
	_, err = tmp.Write(out.Bytes())
	err = errors.Join(err, tmp.Close())
	if err == nil {
		err = os.Rename(tmp.Name(), filepath.Join(dir, hex.EncodeToString(h.Hash[:16])+cacheSuffix))
	}
	if err != nil {
		os.Remove(tmp.Name())
	}
	return err
}

// checkCache makes sure that nobody but the owner can write to the cache.
func checkCache(dir string) error {
	st, err := os.Stat(dir)
	if err != nil {
		return err
	}
	if !st.IsDir() || st.Mode().Perm()&0o022 != 0 {
		return fmt.Errorf("%s must be a folder that only its owner can write to", dir)
	}
	return nil
}

// cacheFiles returns the entries of the cache, those used last first.
func cacheFiles(dir string) []string {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil
	}
	type file struct {
		name string
		time int64
	}
	var files []file
	for _, e := range entries {
		if info, err := e.Info(); err == nil && info.Mode().IsRegular() && strings.HasSuffix(e.Name(), cacheSuffix) {
			files = append(files, file{filepath.Join(dir, e.Name()), info.ModTime().UnixNano()})
		}
	}
	slices.SortFunc(files, func(a, b file) int { return cmp.Compare(b.time, a.time) })
	names := make([]string, 0, len(files))
	for _, f := range files[:min(len(files), cacheEntries)] {
		names = append(names, f.name)
	}
	return names
}

// trimCache makes room for one more entry.
func trimCache(dir string) {
	files := cacheFiles(dir)
	for _, f := range files[min(len(files), cacheEntries-1):] {
		os.Remove(f)
	}
}
