package image

import (
	"fmt"
	"io"
	"iter"

	"github.com/vmprobes/vmprobes/paging"
)

// A DumpFormat is a format that Dump writes.
type DumpFormat uint8

// Formats of Dump.
const (
	// DumpRaw is flat memory: frame n lies at byte n*4096, and what is between
	// the ranges is zero. For a guest with a hole below 4 GiB that is a large file.
	DumpRaw DumpFormat = iota
	// DumpLiME has only the ranges, each with its address.
	DumpLiME
)

// Dump writes the frames of ranges to w, in one of the formats that Open reads. The
// ranges are in order, and don't overlap. If f fails to return a frame Dump calls
// absent. If that returns nil, a page of zeros takes the frame's place; else Dump
// returns its error. A nil absent returns f's error.
//
// The guest keeps running meanwhile, unless the caller has paused it.
func Dump(w io.Writer, format DumpFormat, f paging.Frames, ranges iter.Seq[Range], absent func(paging.Frame, error) error) error {
	if format > DumpLiME {
		return fmt.Errorf("image: no dump format %d", format)
	}
	var next paging.Frame // raw: the next frame of the file; else the lowest that may follow
	for r := range ranges {
		if r.Count == 0 {
			continue
		}
		if r.First < next || r.First > maxFrame || r.Count > maxFrame+1-uint64(r.First) {
			return fmt.Errorf("image: dump of %#x frames from %#x: out of order, or beyond 52 bits", r.Count, r.First)
		}
		if format == DumpLiME {
			h := append(make([]byte, 0, limeHeader), limeMagic...)
			h = le.AppendUint32(h, limeVersion)
			h = le.AppendUint64(h, uint64(r.First)<<pageShift)
			h = le.AppendUint64(h, (uint64(r.First)+r.Count)<<pageShift-1)
			if _, err := w.Write(le.AppendUint64(h, 0)); err != nil {
				return err
			}
			next = r.First
		}
		for ; next < r.First; next++ {
			if _, err := w.Write(zeroPage[:]); err != nil {
				return err
			}
		}
		for end := r.First + paging.Frame(r.Count); next < end; next++ {
			if err := dumpFrame(w, f, next, absent); err != nil {
				return err
			}
		}
	}
	return nil
}

var zeroPage [paging.PageSize]byte

func dumpFrame(w io.Writer, f paging.Frames, frame paging.Frame, absent func(paging.Frame, error) error) error {
	page, release, err := f.Page(frame, false)
	if err == nil {
		_, err = w.Write(page)
		release()
		return err
	}
	if absent != nil {
		err = absent(frame, err)
	}
	if err != nil {
		return err
	}
	_, err = w.Write(zeroPage[:])
	return err
}
