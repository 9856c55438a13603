package kimage

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"encoding/hex"
	"io"
	"slices"
)

const (
	bannerStart = "Linux version " // init/version.c
	maxBanner   = 1024             // bytes of a version string
	maxBanners  = 16
	maxNotes    = 64 << 10
	maxRodata   = 1 << 28 // bytes that are searched
	noteBuildID = 3       // NT_GNU_BUILD_ID
)

// Identity returns what an ELF kernel says of itself: the build id of its notes, in
// hexadecimal digits, and the version strings in its read-only data, one of which is the
// kernel's. Either is empty where there is none, as in a file that only has debug
// information.
func Identity(f *elf.File) (buildID string, banners []string) {
	for _, s := range f.Sections {
		if s.Type == elf.SHT_NOTE && buildID == "" {
			buildID = BuildID(most(s.Open(), s.FileSize, maxNotes))
		}
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_NOTE && buildID == "" {
			buildID = BuildID(most(p.Open(), p.Filesz, maxNotes))
		}
	}
	if s := f.Section(".rodata"); s != nil && s.Type == elf.SHT_PROGBITS {
		banners = Banners(io.LimitReader(s.Open(), maxRodata))
	}
	left := int64(maxRodata)
	for _, p := range f.Progs {
		if p.Type == elf.PT_LOAD && len(banners) == 0 && left > 0 {
			banners = Banners(io.LimitReader(p.Open(), left))
			left -= int64(min(p.Filesz, maxRodata))
		}
	}
	return buildID, banners
}

// most reads at most limit bytes of a section, or nothing if it has more.
func most(r io.Reader, size uint64, limit int64) []byte {
	if size > uint64(limit) {
		return nil
	}
	b, err := io.ReadAll(io.LimitReader(r, limit))
	if err != nil {
		return nil
	}
	return b
}

// BuildID returns the build id among ELF notes, in hexadecimal digits, or "".
func BuildID(notes []byte) string {
	for len(notes) >= 12 {
		name, desc, typ := binary.LittleEndian.Uint32(notes), binary.LittleEndian.Uint32(notes[4:]), binary.LittleEndian.Uint32(notes[8:])
		notes = notes[12:]
		n, d := (uint64(name)+3)&^3, (uint64(desc)+3)&^3
		if n > uint64(len(notes)) || d > uint64(len(notes))-n {
			return ""
		}
		if typ == noteBuildID && bytes.Equal(notes[:name], []byte("GNU\x00")) && desc > 0 && desc <= 64 {
			return hex.EncodeToString(notes[n : n+uint64(desc)])
		}
		notes = notes[n+d:]
	}
	return ""
}

// Banners returns the version strings in r, without their newline, each once. Kernels
// from 6.1 on also hold one without a build's number ("# SMP"), which is left out where
// there is another.
func Banners(r io.Reader) []string {
	var all []string
	buf := make([]byte, 0, 1<<20)
	for len(all) < maxBanners {
		n, err := io.ReadFull(r, buf[len(buf):cap(buf)])
		buf = buf[:len(buf)+n]
		all = appendBanners(all, buf)
		if err != nil {
			break
		}
		// A string may reach into what comes next.
		tail := buf[len(buf)-maxBanner:]
		buf = buf[:copy(buf[:maxBanner], tail)]
	}
	if slices.ContainsFunc(all, numbered) {
		all = slices.DeleteFunc(all, func(s string) bool { return !numbered(s) })
	}
	return all
}

func appendBanners(all []string, b []byte) []string {
	for len(all) < maxBanners {
		i := bytes.Index(b, []byte(bannerStart))
		if i < 0 {
			break
		}
		b = b[i:]
		if s := bannerAt(b); s != "" && !slices.Contains(all, s) {
			all = append(all, s)
		}
		b = b[len(bannerStart):]
	}
	return all
}

// bannerAt returns the version string that b begins with, or "". A digit tells it from
// format strings.
func bannerAt(b []byte) string {
	const n = len(bannerStart)
	b = b[:min(len(b), maxBanner)]
	end := bytes.IndexAny(b, "\n\x00")
	if end <= n || b[n] < '0' || b[n] > '9' {
		return ""
	}
	if bytes.ContainsFunc(b[:end], func(r rune) bool { return r < ' ' || r > '~' }) {
		return ""
	}
	return string(b[:end])
}

// numbered reports whether a version string has the number of a build: "#1 SMP".
func numbered(banner string) bool {
	for i := range len(banner) - 1 {
		if banner[i] == '#' && banner[i+1] >= '0' && banner[i+1] <= '9' {
			return true
		}
	}
	return false
}
