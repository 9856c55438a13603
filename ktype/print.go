package ktype

import (
	"bufio"
	"fmt"
	"io"
	"strings"
)

// maxLines bounds the output of Print.
const maxLines = 1 << 16

// Print writes the definition of a type in C, with the offset and size of each
// member in bytes as comments, and anonymous structs and unions in full:
//
//	struct qstr {
//		union {
//			struct {
//				u32 hash;                    /*     0     4 */
//				…
//	}; /* size: 16 */
//
// After the offset of a bit-field come a colon and its lowest bit. In names, which
// may be a hostile kernel's, characters other than printable ASCII are replaced.
func (t *Types) Print(w io.Writer, typ string) error {
	found, err := t.Type(typ)
	if err != nil {
		return err
	}
	p := printer{w: bufio.NewWriter(w), lines: maxLines}
	if err := p.definition(found); err != nil {
		return fmt.Errorf("%s: %w", typ, err)
	}
	return p.w.Flush()
}

type printer struct {
	w     *bufio.Writer
	lines int
}

// printf writes one line, indented.
func (p *printer) printf(depth int, format string, args ...any) {
	if p.lines--; p.lines < 0 {
		return
	}
	line := strings.Map(func(r rune) rune {
		if r == '\t' || r == '…' || r >= ' ' && r < 0x7f {
			return r
		}
		return '?'
	}, fmt.Sprintf(format, args...))
	// Write errors stay in p.w, for Flush.
	_, _ = p.w.WriteString(strings.Repeat("\t", depth) + line + "\n")
}

func (p *printer) definition(t *Type) error {
	for t.kind == KindTypedef {
		p.printf(0, "typedef %s;", t.Elem().Decl(t.name))
		if err := t.load(); err != nil {
			return err
		}
		next := t.Elem()
		if next.kind != KindTypedef && (next.name != "" || next.kind < KindStruct || next.kind > KindEnum) {
			return nil
		}
		if p.lines < maxLines-maxChain {
			return formatErr("typedefs in a circle")
		}
		t = next
	}
	if err := t.load(); err != nil {
		return err
	}
	switch t.kind {
	case KindEnum:
		p.printf(0, "%s {", t.base())
		for _, v := range t.values {
			if t.signed {
				p.printf(1, "%s = %d,", clip(v.Name), v.Value)
			} else {
				p.printf(1, "%s = %d,", clip(v.Name), uint64(v.Value))
			}
		}
		p.printf(0, "}; /* size: %d */", t.size)
	case KindStruct, KindUnion:
		p.printf(0, "%s {", t.base())
		p.members(t, 1, 0)
		p.printf(0, "}; /* size: %d */", t.size)
	default:
		p.printf(0, "%s;", t)
	}
	if p.lines < 0 {
		return formatErr("more than %d lines", maxLines)
	}
	return nil
}

func (p *printer) members(t *Type, depth int, base uint64) {
	if depth > maxDepth || p.lines < 0 {
		p.printf(depth, "…")
		return
	}
	if err := t.load(); err != nil {
		p.printf(depth, "/* %v */", err)
		return
	}
	for i := range t.members {
		if p.lines < 0 {
			return
		}
		m := &t.members[i]
		f, err := t.field(m)
		if err != nil {
			p.printf(depth, "%s; /* %v */", clip(m.name), err)
			continue
		}
		off := base + f.Offset
		// An array or a pointer of an anonymous struct is shown by "{…}".
		if u := m.typ; u.name == "" && (u.kind == KindStruct || u.kind == KindUnion) {
			p.printf(depth, "%s {", u.kind)
			p.members(u, depth+1, off)
			p.printf(depth, "}%s; /* %5d %5d */", strings.TrimRight(" "+clip(m.name), " "), off, f.Size)
			continue
		}
		decl := m.typ.Decl(clip(m.name))
		at := fmt.Sprintf("%5d", off)
		if f.BitSize > 0 {
			decl += fmt.Sprintf(":%d", f.BitSize)
			at += fmt.Sprintf(":%d", f.BitOffset)
		}
		p.printf(depth, "%-44s /* %s %5d */", decl+";", at, f.Size)
	}
}
