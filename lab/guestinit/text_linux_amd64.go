package main

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/vmprobes/vmprobes/internal/texthash"
)

// textBounds are read once: the kernel makes /proc/kallsyms anew for each reader.
var textBounds struct{ start, end uint64 }

// keptText is the kernel's text as it was at the last textkeep.
var keptText []byte

// eachText calls f with the kernel's text, a part at a time. The part is f's until
// it returns.
func eachText(f func(at uint64, b []byte)) error {
	if textBounds.end == 0 {
		start, err := symbolAddress("_stext")
		if err != nil {
			return err
		}
		end, err := symbolAddress("_etext")
		if err != nil {
			return err
		}
		textBounds.start, textBounds.end = start, end
	}
	for at := textBounds.start; at < textBounds.end; at += uint64(len(kernelBuffer)) {
		b := kernelBuffer[:min(uint64(len(kernelBuffer)), textBounds.end-at)]
		if err := kernelMemory(at, b); err != nil {
			return err
		}
		f(at, b)
	}
	return nil
}

func symbolAddress(name string) (uint64, error) {
	found, err := addresses(name)
	if err != nil {
		return 0, err
	}
	return found[0], nil
}

func textHash() (string, error) {
	hash := new(texthash.Hash)
	if err := eachText(func(_ uint64, b []byte) { _, _ = hash.Write(b) }); err != nil {
		return "", err
	}
	return fmt.Sprintf("texthash %v bytes=%d", hash, textBounds.end-textBounds.start), nil
}

func textKeep() (string, error) {
	hash := new(texthash.Hash)
	var failed error
	err := eachText(func(at uint64, b []byte) {
		if keptText == nil && failed == nil {
			// Not from Go's heap: nothing would ever give it back.
			keptText, failed = unix.Mmap(-1, 0, int(textBounds.end-textBounds.start), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
		}
		if failed == nil {
			copy(keptText[at-textBounds.start:], b)
		}
		_, _ = hash.Write(b)
	})
	if err = errors.Join(err, failed); err != nil {
		return "", err
	}
	return fmt.Sprintf("textkeep %v bytes=%d", hash, len(keptText)), nil
}

// A patchSite is an instruction that the kernel rewrites while it runs.
type patchSite struct {
	addr, target uint64 // target: of the jump, if it is a jump label's
	call         bool   // a static call, or its trampoline
}

// The instructions that the kernel writes at a patchSite, besides jumps and calls
// (arch/x86/include/asm/nops.h, arch/x86/kernel/static_call.c).
var (
	nop2    = []byte{0x66, 0x90}
	nop5    = []byte{0x0f, 0x1f, 0x44, 0x00, 0x00}
	xor5    = []byte{0x2e, 0x2e, 0x2e, 0x31, 0xc0} // returns 0, in place of the call
	xor5p   = []byte{0x66, 0x66, 0x48, 0x31, 0xc0} // the same, before Linux 6.2
	return5 = []byte{0xc3, 0xcc, 0xcc, 0xcc, 0xcc}
)

// size returns the length of what now is at the site, or 0 if the kernel wouldn't
// write that.
func (p patchSite) size(now []byte) int {
	if len(now) < 5 {
		return 0
	}
	far := p.addr + 5 + uint64(int64(int32(binary.LittleEndian.Uint32(now[1:]))))
	inText := far >= textBounds.start && far < textBounds.end
	switch {
	case bytes.Equal(now[:5], nop5):
		return 5
	case p.call && (now[0] == 0xe8 || now[0] == 0xe9) && inText:
		return 5
	case p.call && (bytes.Equal(now[:5], xor5) || bytes.Equal(now[:5], xor5p) || bytes.Equal(now[:5], return5)):
		return 5
	case p.call:
		return 0
	case now[0] == 0xe9 && far == p.target:
		return 5
	case bytes.Equal(now[:2], nop2), now[0] == 0xeb && p.addr+2+uint64(int64(int8(now[1]))) == p.target:
		return 2
	}
	return 0
}

// patchSites returns them in the order of their addresses.
func patchSites() ([]patchSite, error) {
	var sites []patchSite
	for _, t := range []struct {
		start, stop string
		entry       int
		call        bool
	}{
		// struct jump_entry (include/linux/jump_label.h) and struct static_call_site
		// (include/linux/static_call_types.h): a word each is relative to itself.
		{"__start___jump_table", "__stop___jump_table", 16, false},
		{"__start_static_call_sites", "__stop_static_call_sites", 8, true},
	} {
		start, err := symbolAddress(t.start)
		if err != nil {
			return nil, err
		}
		stop, err := symbolAddress(t.stop)
		if err != nil {
			return nil, err
		}
		if stop < start || stop-start > 8<<20 {
			return nil, fmt.Errorf("%s: %d bytes", t.start, stop-start)
		}
		table := make([]byte, stop-start)
		if err := kernelMemory(start, table); err != nil {
			return nil, err
		}
		relative := func(at int) uint64 {
			return start + uint64(at) + uint64(int64(int32(binary.LittleEndian.Uint32(table[at:]))))
		}
		for at := 0; at+t.entry <= len(table); at += t.entry {
			s := patchSite{addr: relative(at), call: t.call}
			if !t.call {
				s.target = relative(at + 4)
			}
			sites = append(sites, s)
		}
	}
	// "ffffffff81000000 t __SCT__name": trampolines of static calls.
	for rest := symbols; ; {
		i := bytes.Index(rest, []byte(" __SCT__"))
		if i < 0 {
			break
		}
		digits, _, _ := bytes.Cut(rest[bytes.LastIndexByte(rest[:i], '\n')+1:i], []byte(" "))
		rest = rest[i+1:]
		a, err := strconv.ParseUint(string(digits), 16, 64)
		if err != nil {
			return nil, fmt.Errorf("kallsyms: %w", err)
		}
		sites = append(sites, patchSite{addr: a, call: true})
	}
	slices.SortFunc(sites, func(a, b patchSite) int { return cmp.Compare(a.addr, b.addr) })
	return sites, nil
}

// siteOf returns the site of which the byte at addr is a part, if what is there now
// is what the kernel writes there.
func siteOf(sites []patchSite, addr uint64) (s patchSite, size int, err error) {
	i, _ := slices.BinarySearchFunc(sites, addr+1, func(s patchSite, a uint64) int { return cmp.Compare(s.addr, a) })
	for i--; i >= 0 && addr-sites[i].addr < 5; i-- {
		now := make([]byte, 5)
		if err := kernelMemory(sites[i].addr, now); err != nil {
			return patchSite{}, 0, err
		}
		if size := sites[i].size(now); addr < sites[i].addr+uint64(size) {
			return sites[i], size, nil
		}
	}
	return patchSite{}, 0, nil
}

// textChanges tells where the kernel's text isn't what was kept.
func textChanges() (string, error) {
	if keptText == nil {
		return "", errors.New("textchanges: no text is kept")
	}
	var changed []uint64 // addresses of bytes
	err := eachText(func(at uint64, b []byte) {
		was := keptText[at-textBounds.start:]
		for i := range b {
			if b[i] != was[i] {
				changed = append(changed, at+uint64(i))
			}
		}
	})
	if err != nil || len(changed) == 0 {
		return "textchanges other=0 own=0", err
	}
	sites, err := patchSites()
	if err != nil {
		return "", err
	}
	var own, other int
	for behind := uint64(0); len(changed) > 0; changed = changed[1:] {
		addr := changed[0]
		if addr < behind {
			continue
		}
		s, size, err := siteOf(sites, addr)
		if err != nil {
			return "", err
		}
		kind := "own"
		if size > 0 {
			own++
		} else {
			kind, other = "other", other+1
			s.addr, size = addr, 1
		}
		behind = s.addr + uint64(size)
		if own+other <= 64 {
			now := make([]byte, size)
			if err := kernelMemory(s.addr, now); err != nil {
				return "", err
			}
			say("| %#x %x %x %s", s.addr, keptText[s.addr-textBounds.start:][:size], now, kind)
		}
	}
	return fmt.Sprintf("textchanges other=%d own=%d", other, own), nil
}
