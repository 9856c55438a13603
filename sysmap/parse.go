package sysmap

import (
	"bytes"
	"fmt"
	"io"
	"strings"
)

const (
	maxText  = 1 << 28 // bytes of a text map; the largest seen are 12 MB
	maxLine  = 4096
	readSize = 1 << 16
)

// Parse reads a System.map (the output of nm -n) or a saved /proc/kallsyms:
//
//	ffffffff81000000 T _stext
//	ffffffffc0201000 t ext4_init	[ext4]
//
// Empty lines, lines starting with '#', carriage returns, surrounding blanks and nm's
// undefined symbols are skipped. Bytes of a name above 0x7e are shown as \xc3. The lines may be in any order. Errors other than r's
// are a *SyntaxError with the line number, ErrStub for a distribution's placeholder,
// or ErrRestricted if no address was disclosed.
func Parse(r io.Reader) (*Map, error) {
	size := 0
	if l, ok := r.(interface{ Len() int }); ok {
		size = min(l.Len(), maxText)
	}
	// A line has some 45 bytes, 25 of them the name.
	p := parser{b: newBuilder(size/40, size/2)}
	buf := make([]byte, readSize)
	total, n := 0, 0 // n bytes of buf are the beginning of a line
	empty := 0
	for {
		k, err := r.Read(buf[n:])
		total += k
		if total > maxText {
			return nil, formatErr("more than %d bytes", maxText)
		}
		if k == 0 && err == nil {
			if empty++; empty > 100 {
				return nil, fmt.Errorf("reading symbols: %w", io.ErrNoProgress)
			}
			continue
		}
		empty = 0
		rest := buf[:n+k]
		for {
			nl := bytes.IndexByte(rest, '\n')
			if nl < 0 {
				break
			}
			if err := p.line(rest[:nl]); err != nil {
				return nil, err
			}
			rest = rest[nl+1:]
		}
		if len(rest) > maxLine {
			return nil, &SyntaxError{Line: p.n + 1, Msg: "line too long"}
		}
		n = copy(buf, rest)
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("reading symbols: after line %d: %w", p.n, err)
		}
	}
	if n > 0 {
		if err := p.line(buf[:n]); err != nil {
			return nil, err
		}
	}
	if p.b.len() == 0 {
		return nil, formatErr("no symbols in %d bytes of text", total)
	}
	if !p.nonzero {
		return nil, fmt.Errorf("%w in %d symbols: kernel.kptr_restrict hides them, read /proc/kallsyms as root (with CAP_SYSLOG)",
			ErrRestricted, p.b.len())
	}
	return p.b.finish(""), nil
}

type parser struct {
	b       *builder
	n       int // lines seen
	nonzero bool
}

func (p *parser) fail(format string, args ...any) error {
	return &SyntaxError{Line: p.n, Msg: fmt.Sprintf(format, args...)}
}

// stubMark is what follows the type letter in Debian's System.map.
var stubMark = []byte("The real System.map is in the ")

// null is an address of 0, as kernels of 2018 and before (up to 4.15) print it: those of
// per-CPU symbols to root, and all of them to others.
var null = []byte("(null)")

func (p *parser) line(l []byte) error {
	p.n++
	if p.n == 1 {
		l = bytes.TrimPrefix(l, []byte("\xef\xbb\xbf"))
	}
	if len(l) > maxLine {
		return p.fail("line too long")
	}
	i := 0
	for i < len(l) && blank(l[i]) {
		i++
	}
	if i == len(l) || l[i] == '#' {
		return nil
	}
	start := i
	var addr uint64
	for ; i < len(l); i++ {
		d := hexDigit[l[i]]
		if d < 0 {
			break
		}
		if i-start == 16 {
			return p.fail("address of more than 16 digits")
		}
		addr = addr<<4 | uint64(d)
	}
	if bytes.HasPrefix(l[start:], null) {
		i = start + len(null)
	}
	if i == start || i == len(l) || !blank(l[i]) {
		// nm prints no address for symbols that the file only refers to.
		if f := bytes.Fields(l); len(f) == 2 && len(f[0]) == 1 && strings.IndexByte("UwvN", f[0][0]) >= 0 {
			return nil
		}
		return p.fail("no hexadecimal address in %s", excerpt(l))
	}
	for i < len(l) && blank(l[i]) {
		i++
	}
	if i >= len(l) || !isType(l[i]) || i+1 >= len(l) || !blank(l[i+1]) {
		return p.fail("no type letter and name in %s", excerpt(l))
	}
	typ := l[i]
	for i++; i < len(l) && blank(l[i]); i++ {
	}
	if bytes.HasPrefix(l[i:], stubMark) {
		return stubError(l[i+len(stubMark):])
	}
	start = i
	for i < len(l) && l[i] > ' ' && l[i] != 0x7f {
		i++
	}
	name, _ := quoted(l[start:i])
	if len(name) == 0 {
		return p.fail("no name in %s", excerpt(l))
	}
	var mod []byte
	if i < len(l) {
		if !blank(l[i]) {
			return p.fail("byte %#02x in a name", l[i])
		}
		if mod = bytes.TrimFunc(l[i:], func(r rune) bool { return r < 0x80 && blank(byte(r)) }); len(mod) > 0 {
			if len(mod) < 3 || mod[0] != '[' || mod[len(mod)-1] != ']' {
				return p.fail("%s after the name is not a [module]", excerpt(mod))
			}
			mod = mod[1 : len(mod)-1]
			for _, c := range mod {
				if c <= ' ' || c >= 0x7f {
					return p.fail("byte %#02x in a module name", c)
				}
			}
		}
	}
	if msg := p.b.add(addr, typ, name, mod); msg != "" {
		return p.fail("%s", msg)
	}
	p.nonzero = p.nonzero || addr != 0
	return nil
}

// stubError explains the placeholder; tail is "linux-image-… package".
func stubError(tail []byte) error {
	pkg := "linux-image-<version>-dbg"
	if f := bytes.Fields(tail); len(f) > 0 && len(f[0]) < 100 && len(f[0]) > 0 {
		ok := true
		for _, c := range f[0] {
			ok = ok && c > ' ' && c < 0x7f
		}
		if ok {
			pkg = string(f[0])
		}
	}
	return fmt.Errorf("%w: the real one is in the package %s (about 1 GB); give the matching /boot/vmlinuz-* instead, "+
		"which has the same symbols, or a copy of the guest's /proc/kallsyms", ErrStub, pkg)
}

func blank(c byte) bool { return c == ' ' || c == '\t' || c == '\r' || c == '\v' || c == '\f' }

// isType accepts nm's letters, and '?' and '-' which stand for unknown and stabs.
func isType(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c == '?' || c == '-'
}

func excerpt(l []byte) string {
	const most = 60
	if len(l) > most {
		return fmt.Sprintf("%q…", l[:most])
	}
	return fmt.Sprintf("%q", l)
}

var hexDigit = func() (t [256]int8) {
	for i := range t {
		t[i] = -1
	}
	for i, c := range "0123456789" {
		t[c] = int8(i)
	}
	for i, c := range "abcdef" {
		t[c], t[c-'a'+'A'] = int8(10+i), int8(10+i)
	}
	return t
}()
