package xenaccess

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
)

// ErrConfig: a configuration file is malformed. The error is a *SyntaxError,
// which says where.
var ErrConfig = errors.New("malformed configuration")

// A SyntaxError is a place where a configuration can't be understood. It matches
// ErrConfig.
type SyntaxError struct {
	File string // "" if it wasn't read from one
	Line int    // from 1
	Col  int    // from 1, in bytes
	Msg  string
}

// Error implements error.
func (e *SyntaxError) Error() string {
	return fmt.Sprintf("%s:%d:%d: %s", cmp.Or(e.File, "configuration"), e.Line, e.Col, e.Msg)
}

// Is reports whether target is ErrConfig.
func (e *SyntaxError) Is(target error) bool { return target == ErrConfig }

// A Config is what configuration files say about guests. It is immutable; the maps in
// it must not be changed.
type Config struct {
	domains  map[string]DomainConfig
	warnings []string
}

// A DomainConfig is what is configured for one guest.
type DomainConfig struct {
	Name string
	File string // in which it was found, "" if it wasn't read from one
	Line int    // of the name

	// OSType is the value of ostype, or os_type: "Linux", "Windows", "FreeBSD" or "OSX" in this
	// spelling, or else what is written there.
	OSType string
	// Sysmap is the value of sysmap: the path of the kernel's System.map, or of
	// another file that Options.Symbols may name.
	Sysmap string
	// Types is the value of volatility_ist: the path of a Volatility 3 symbol file.
	Types string
	// Rekall is the value of rekall_profile: the path of a Rekall profile, which had
	// the same purpose. It is not used.
	Rekall string
	// Offsets are the numbers, by their keys: offsets in structures
	// ("linux_tasks") and a few addresses ("kpgd"), in bytes.
	Offsets map[string]uint64
	// Unknown are the other keys, with their values as they are written.
	Unknown map[string]string
	// Err is why the block can't be understood, a *SyntaxError, or nil. With it, the
	// fields above have what stands before that.
	Err error
}

// offsetKeys are the keys with numbers that XenAccess 0.5 and LibVMI have
// (its libvmi/config/lexicon.l at 82bbee6).
var offsetKeys = keySet(
	"linux_tasks", "linux_mm", "linux_pid", "linux_pgd", "linux_addr", "linux_name",
	"win_tasks", "win_pdbase", "win_pid", "win_peb", "win_iba", "win_ph",

	"kpgd", "linux_init_task", "linux_kaslr",
	"win_ntoskrnl", "win_ntoskrnl_va", "win_pname", "win_kdvb", "win_kdbg", "win_kpcr", "win_sysproc",
	"freebsd_name", "freebsd_pid", "freebsd_vmspace", "freebsd_pmap", "freebsd_pgd",
)

// usedKeys are those of them that make a difference here.
var usedKeys = keySet("linux_tasks", "linux_mm", "linux_pid", "linux_pgd", "linux_addr", "linux_name")

func keySet(keys ...string) map[string]bool {
	m := make(map[string]bool, len(keys))
	for _, k := range keys {
		m[k] = true
	}
	return m
}

// osTypes are the values of ostype that have a spelling of their own.
var osTypes = []string{"Linux", "Windows", "FreeBSD", "OSX"}

// Bounds of a configuration file. The C parsers have 1024 bytes for a text.
const (
	maxConfig   = 1 << 20 // bytes
	maxToken    = 4096    // bytes of a name or value
	maxWarnings = 100     // the rest are counted
)

// LoadConfig reads configuration files. If several have the same domain, the first
// one counts. The error is that of opening a file, all of which must exist, or a
// *SyntaxError: see [ParseConfig].
func LoadConfig(paths ...string) (*Config, error) {
	c := &Config{domains: map[string]DomainConfig{}}
	for _, path := range paths {
		one, err := loadConfig(path)
		if err != nil {
			return nil, err
		}
		c.warnings = append(c.warnings, one.warnings...)
		for _, name := range one.Names() {
			d := one.domains[name]
			if first, ok := c.domains[name]; ok {
				c.warnings = append(c.warnings, fmt.Sprintf("%s:%d: domain %q is ignored: %s:%d has it too", d.File, d.Line, name, first.File, first.Line))
				continue
			}
			c.domains[name] = d
		}
	}
	return c, nil
}

func loadConfig(path string) (*Config, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // only read from
	return parseConfig(f, path)
}

// ParseConfig reads the configuration of XenAccess (/etc/xenaccess.conf) or of
// LibVMI (/etc/libvmi.conf), which has the same form:
//
//	# a comment, up to the end of the line; so is what follows //, and /* this */
//	a3guest {
//	    ostype = "Linux";
//	    sysmap = '/boot/System.map-2.6.18-xen';
//	    linux_tasks = 0x60;
//	}
//
// Numbers are decimal, hexadecimal (0x…) or octal (0…). Names and values with spaces
// or one of {}=;#" are quoted; the C parsers knew no others than letters, digits
// and a few signs. There are no escapes. The last assignment of a block may lack its
// semicolon.
//
// Unknown keys are kept. If a key or a domain occurs twice in one file, the last one
// counts, as with LibVMI. [Config.Warnings] tells of both, and of keys that make no
// difference here. At most 1 MiB is read.
//
// A block that can't be understood doesn't fail the others: it has an Err, and a warning
// says so. The error is r's, or a *SyntaxError if there is nothing else in the file, or
// if it is too large.
func ParseConfig(r io.Reader) (*Config, error) { return parseConfig(r, "") }

func parseConfig(r io.Reader, file string) (*Config, error) {
	text, err := io.ReadAll(io.LimitReader(r, maxConfig+1))
	if err != nil {
		return nil, err
	}
	p := &configParser{lex: lexer{file: file, text: text, line: 1}, config: &Config{domains: map[string]DomainConfig{}}}
	if len(text) > maxConfig {
		return nil, p.lex.errorf("larger than %d bytes", maxConfig)
	}
	if text, ok := bytes.CutPrefix(text, []byte("\ufeff")); ok {
		p.lex.text = text // a byte order mark
	}
	if err := p.parse(); err != nil {
		return nil, err
	}
	if p.dropped > 0 {
		p.config.warnings = append(p.config.warnings, fmt.Sprintf("%s: %d more", cmp.Or(file, "configuration"), p.dropped))
	}
	return p.config, nil
}

// Domain returns what is configured for the domain called name.
func (c *Config) Domain(name string) (DomainConfig, bool) {
	d, ok := c.domains[name]
	return d, ok
}

// Names returns the names of the domains, in alphabetical order.
func (c *Config) Names() []string {
	names := make([]string, 0, len(c.domains))
	for name := range c.domains {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// Warnings returns what was probably not meant as it is written, each with its place.
func (c *Config) Warnings() []string { return slices.Clone(c.warnings) }

type configParser struct {
	lex     lexer
	ahead   []token // that were read and put back
	config  *Config
	dropped int // warnings
}

func (p *configParser) warn(err error) {
	if len(p.config.warnings) == maxWarnings {
		p.dropped++
		return
	}
	p.config.warnings = append(p.config.warnings, err.Error())
}

func (p *configParser) warnf(at token, format string, args ...any) {
	p.warn(p.lex.at(at, fmt.Sprintf(format, args...)))
}

// next returns the next token.
func (p *configParser) next() (token, error) {
	if n := len(p.ahead); n > 0 {
		t := p.ahead[n-1]
		p.ahead = p.ahead[:n-1]
		return t, nil
	}
	return p.lex.next()
}

// parse reads domains: NAME { assignments }
func (p *configParser) parse() error {
	var first error // of a block without any good one
	good := 0
	for {
		name, err := p.next()
		if err == nil && name.kind == tokenEnd {
			break
		}
		named := false
		if err == nil {
			named, err = p.domain(name)
		}
		if err == nil {
			good++
			continue
		}
		if first == nil {
			first = err
		}
		p.warn(err)
		p.skipBlock(named)
	}
	if good == 0 {
		return first
	}
	return nil
}

// domain reads a block. named says that an error is in it, not in what is before it.
func (p *configParser) domain(name token) (named bool, err error) {
	if !name.isText() || name.text == "" {
		p.ahead = append(p.ahead, name)
		return false, p.lex.at(name, "a domain's name is expected here, not "+name.String())
	}
	if err := p.expect('{', "after the domain's name"); err != nil {
		return false, err
	}
	d := DomainConfig{Name: name.text, File: p.lex.file, Line: name.line, Offsets: map[string]uint64{}, Unknown: map[string]string{}}
	d.Err = p.block(&d)
	if first, ok := p.config.domains[d.Name]; ok {
		p.warnf(name, "domain %q is in line %d already: this one counts", d.Name, first.Line)
	}
	p.config.domains[d.Name] = d
	return true, d.Err
}

// skipBlock goes on behind the next closing brace, or where, in a block without one, the
// next block begins: NAME {.
func (p *configParser) skipBlock(named bool) {
	var last token
	for {
		t, err := p.next()
		switch {
		case err != nil:
			p.lex.skipLine()
		case t.kind == '}', t.kind == tokenEnd:
			return
		case t.kind == '{' && named && last.isText():
			p.ahead = append(p.ahead, t, last)
			return
		}
		last = t
	}
}

// block reads assignments up to the closing brace.
func (p *configParser) block(d *DomainConfig) error {
	seen := map[string]int{}
	for {
		key, err := p.next()
		if err != nil {
			return err
		}
		switch {
		case key.kind == '}':
			return nil
		case key.kind == ';': // an empty assignment, as the C grammars have it
			continue
		case !key.isText() || key.text == "":
			p.ahead = append(p.ahead, key)
			return p.lex.at(key, "a key or } is expected here, not "+key.String())
		}
		if err := p.expect('=', "after the key"); err != nil {
			p.ahead = append(p.ahead, key) // it may be the next block's name
			return err
		}
		value, err := p.next()
		if err != nil {
			return err
		}
		if !value.isText() {
			p.ahead = append(p.ahead, value)
			return p.lex.at(value, "a value is expected here, not "+value.String())
		}
		if line, ok := seen[key.text]; ok {
			p.warnf(key, "key %q is in line %d already: this one counts", key.text, line)
		}
		seen[key.text] = key.line
		if err := p.assign(d, key, value); err != nil {
			return err
		}
		end, err := p.next()
		if err != nil {
			return err
		}
		switch end.kind {
		case ';':
		case '}':
			return nil
		default:
			p.ahead = append(p.ahead, end)
			return p.lex.at(end, "a ; is expected after the value, not "+end.String())
		}
	}
}

func (p *configParser) assign(d *DomainConfig, key, value token) error {
	switch key.text {
	case "ostype", "os_type":
		d.OSType = value.text
		for _, s := range osTypes {
			if strings.EqualFold(s, value.text) {
				d.OSType = s
			}
		}
	case "sysmap":
		d.Sysmap = value.text
	case "volatility_ist":
		d.Types = value.text
	case "rekall_profile":
		d.Rekall = value.text
		p.warnf(key, "key %q is not used", key.text)
	default:
		if !offsetKeys[key.text] {
			p.warnf(key, "key %q is not known", key.text)
			d.Unknown[key.text] = value.text
			return nil
		}
		n, ok := parseNumber(value.text)
		if !ok {
			return p.lex.at(value, fmt.Sprintf("%s is a number of up to 64 bits, not %q", key.text, value.text))
		}
		d.Offsets[key.text] = n
		if !usedKeys[key.text] {
			p.warnf(key, "key %q is not used", key.text)
		}
	}
	return nil
}

// parseNumber is strtoull with base 0, as C programs read numbers, for a whole text.
func parseNumber(s string) (uint64, bool) {
	base := 10
	switch {
	case strings.HasPrefix(s, "0x"), strings.HasPrefix(s, "0X"):
		base, s = 16, s[2:]
	case len(s) > 1 && s[0] == '0':
		base = 8
	}
	n, err := strconv.ParseUint(s, base, 64) // takes no sign
	return n, err == nil
}

func (p *configParser) expect(kind byte, where string) error {
	t, err := p.next()
	if err == nil && t.kind != kind {
		p.ahead = append(p.ahead, t)
		err = p.lex.at(t, fmt.Sprintf("a %c is expected %s, not %s", kind, where, t))
	}
	return err
}

// Kinds of tokens besides the signs { } = ; which are their own.
const (
	tokenEnd    = 0
	tokenWord   = 'w'
	tokenQuoted = '"'
)

type token struct {
	kind      byte
	text      string // of a word; what is within the quotes
	line, col int
}

func (t token) isText() bool { return t.kind == tokenWord || t.kind == tokenQuoted }

func (t token) String() string {
	switch t.kind {
	case tokenEnd:
		return "the end"
	case tokenWord, tokenQuoted:
		return strconv.Quote(t.text)
	}
	return string(t.kind)
}

// A lexer splits a configuration into tokens.
type lexer struct {
	file  string
	text  []byte // what is left
	line  int
	start int // how many bytes of the line are gone
}

// at returns the error that something is wrong with a token.
func (l *lexer) at(t token, msg string) *SyntaxError {
	return &SyntaxError{File: l.file, Line: t.line, Col: t.col, Msg: msg}
}

// errorf returns an error where the lexer is.
func (l *lexer) errorf(format string, args ...any) *SyntaxError {
	return l.at(token{line: l.line, col: l.start + 1}, fmt.Sprintf(format, args...))
}

// skipLine goes to the end of the line.
func (l *lexer) skipLine() {
	n := bytes.IndexByte(l.text, '\n')
	if n < 0 {
		n = len(l.text)
	}
	l.skip(n)
}

func (l *lexer) skip(n int) {
	l.text = l.text[n:]
	l.start += n
}

// next returns the next token; at the end tokenEnd, for ever.
func (l *lexer) next() (token, error) {
	if err := l.space(); err != nil {
		return token{}, err
	}
	t := token{line: l.line, col: l.start + 1}
	if len(l.text) == 0 {
		return t, nil
	}
	switch c := l.text[0]; c {
	case '{', '}', '=', ';':
		t.kind = c
		l.skip(1)
		return t, nil
	case '"', '\'':
		n := bytes.IndexAny(l.text[1:], string(rune(c))+"\n")
		if n < 0 || l.text[1+n] == '\n' {
			return t, l.errorf("the quote isn't closed on its line")
		}
		t.kind = tokenQuoted
		err := l.take(&t, l.text[1:1+n])
		l.skip(n + 2)
		return t, err
	}
	n := bytes.IndexAny(l.text, " \t\r\n{}=;#\"")
	if n < 0 {
		n = len(l.text)
	}
	t.kind = tokenWord
	err := l.take(&t, l.text[:n])
	l.skip(n)
	return t, err
}

// take makes b the text of t.
func (l *lexer) take(t *token, b []byte) error {
	if len(b) > maxToken {
		return l.errorf("longer than %d bytes", maxToken)
	}
	if bytes.ContainsFunc(b, func(r rune) bool { return r < ' ' && r != '\t' || r == 0x7f }) {
		return l.errorf("control characters in %q", b)
	}
	t.text = string(b)
	return nil
}

// space skips white space and comments.
func (l *lexer) space() error {
	for len(l.text) > 0 {
		switch c := l.text[0]; {
		case c == '\n':
			l.newline()
		case c == ' ', c == '\t', c == '\r':
			l.skip(1)
		case c == '#', bytes.HasPrefix(l.text, []byte("//")):
			l.skipLine()
		case bytes.HasPrefix(l.text, []byte("/*")):
			n := bytes.Index(l.text[2:], []byte("*/"))
			if n < 0 {
				return l.errorf("the comment isn't closed")
			}
			for end := len(l.text) - n - 4; len(l.text) > end; {
				if l.text[0] == '\n' {
					l.newline()
				} else {
					l.skip(1)
				}
			}
		default:
			return nil
		}
	}
	return nil
}

func (l *lexer) newline() {
	l.text = l.text[1:]
	l.line++
	l.start = 0
}
