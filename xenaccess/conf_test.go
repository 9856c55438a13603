package xenaccess

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func mustParse(t *testing.T, text string) *Config {
	t.Helper()
	c, err := ParseConfig(strings.NewReader(text))
	require.NoError(t, err)
	return c
}

// The entries that XenAccess' wiki lists as known to work, and a LibVMI one.
const wiki = `# Windows Vista, PAE enabled
WinVista {
    ostype = "Windows";
    win_tasks  = 0xa0;
    win_pdbase = 0x18;
    win_pid    = 0x9c;
    win_peb    = 0x188;
    win_iba    = 0x8;
    win_ph     = 0x18;
}
#WinXP-HVM {
#    sysmap = "/boot/none";
#}
Linux2-6-18-486{
    ostype = "Linux";
    linux_tasks = 108;
    linux_mm    = 132;
    linux_pid   = 168;
    linux_addr  = 120;
    linux_pgd   = 36;
}
fedora{
	ostype = "Linux"; sysmap="/boot/System.map-2.6.18-1.2798.fc6";
	linux_tasks= 0x7c; # in struct task_struct
}
win10-seabios {
    volatility_ist = "/root/symbols/ntkrnlmp.json";
    rekall_profile = "/root/old.json";
    kpgd = 0xffffffffffffffff;
}
`

func TestParseConfig(t *testing.T) {
	c := mustParse(t, wiki)
	unused := []string{"4:5:win_tasks", "5:5:win_pdbase", "6:5:win_pid", "7:5:win_peb", "8:5:win_iba", "9:5:win_ph", "28:5:rekall_profile", "29:5:kpgd"}
	for i, u := range unused {
		at, key := u[:strings.LastIndexByte(u, ':')], u[strings.LastIndexByte(u, ':')+1:]
		unused[i] = fmt.Sprintf("configuration:%s: key %q is not used", at, key)
	}
	assert.Equal(t, unused, c.Warnings())
	assert.Equal(t, []string{"Linux2-6-18-486", "WinVista", "fedora", "win10-seabios"}, c.Names())
	for _, want := range []DomainConfig{
		{Name: "WinVista", Line: 2, OSType: "Windows", Offsets: map[string]uint64{"win_tasks": 0xa0, "win_pdbase": 0x18, "win_pid": 0x9c, "win_peb": 0x188, "win_iba": 8, "win_ph": 0x18}},
		{Name: "Linux2-6-18-486", Line: 14, OSType: "Linux", Offsets: map[string]uint64{"linux_tasks": 108, "linux_mm": 132, "linux_pid": 168, "linux_addr": 120, "linux_pgd": 36}},
		{Name: "fedora", Line: 22, OSType: "Linux", Sysmap: "/boot/System.map-2.6.18-1.2798.fc6", Offsets: map[string]uint64{"linux_tasks": 0x7c}},
		{Name: "win10-seabios", Line: 26, Types: "/root/symbols/ntkrnlmp.json", Rekall: "/root/old.json", Offsets: map[string]uint64{"kpgd": 1<<64 - 1}},
	} {
		want.Unknown = map[string]string{}
		got, ok := c.Domain(want.Name)
		assert.True(t, ok)
		assert.Equal(t, want, got)
	}
	_, ok := c.Domain("winvista")
	assert.False(t, ok, "names are case-sensitive, as Xen's are")
}

// What the C lexers couldn't read, or could and few write.
func TestParseConfigLax(t *testing.T) {
	for _, tt := range []struct {
		name, text string
		want       DomainConfig
	}{
		{"signs in names", `a_b+c~d.e-f:1@h { sysmap = "/boot/System.map-6.1.0+b~1_x"; }`, DomainConfig{Name: "a_b+c~d.e-f:1@h", Sysmap: "/boot/System.map-6.1.0+b~1_x"}},
		{"quoted name", `"my guest {1}" { sysmap = "/a b/c;d#e=f"; }`, DomainConfig{Name: "my guest {1}", Sysmap: "/a b/c;d#e=f"}},
		{"unquoted", `g { ostype = linux; sysmap = /boot/System.map; }`, DomainConfig{Name: "g", OSType: "Linux", Sysmap: "/boot/System.map"}},
		{"quoted number", `g { linux_mm = "0x10"; }`, DomainConfig{Name: "g", Offsets: map[string]uint64{"linux_mm": 16}}},
		{"one letter", `g{}`, DomainConfig{Name: "g"}},
		{"digits", `7 { }`, DomainConfig{Name: "7"}},
		{"no last semicolon", `g { ostype = "Plan9" }`, DomainConfig{Name: "g", OSType: "Plan9"}},
		{"empty assignments", `g { ;; ostype = "OSX";; }`, DomainConfig{Name: "g", OSType: "OSX"}},
		{"octal", `g { linux_mm = 0120; linux_pid = 0; }`, DomainConfig{Name: "g", Offsets: map[string]uint64{"linux_mm": 80, "linux_pid": 0}}},
		{"CR LF and a byte order mark", "\ufeffg {\r\n\tsysmap = \"x\";\r\n}\r\n", DomainConfig{Name: "g", Sysmap: "x"}},
		{"comment at the end", "g{}#", DomainConfig{Name: "g"}},
		{"comment in between", "g#{\n{#}\nsysmap#=\n=#;\n\"x\";}", DomainConfig{Name: "g", Sysmap: "x"}},
		{"backslash", `g { sysmap = "C:\boot\"; }`, DomainConfig{Name: "g", Sysmap: `C:\boot\`}},
		{"single quotes", `'my "guest"' { sysmap = '/a b'; os_type = 'linux'; }`, DomainConfig{Name: `my "guest"`, OSType: "Linux", Sysmap: "/a b"}},
		{"comments of C", "/* g {\n } */ g { // sysmap = a; }\n sysmap = /* b */ c//d; //\n } /**/", DomainConfig{Name: "g", Line: 2, Sysmap: "c//d"}},
		{"empty value", `g { sysmap = ""; }`, DomainConfig{Name: "g"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := mustParse(t, tt.text)
			assert.Empty(t, c.Warnings())
			tt.want.Line = max(tt.want.Line, 1)
			if tt.want.Offsets == nil {
				tt.want.Offsets = map[string]uint64{}
			}
			tt.want.Unknown = map[string]string{}
			got, ok := c.Domain(tt.want.Name)
			require.True(t, ok, "%q", c.Names())
			assert.Equal(t, tt.want, got)
		})
	}
	assert.Empty(t, mustParse(t, " \n# nothing\n").Names())
}

func TestConfigWarnings(t *testing.T) {
	c := mustParse(t, `g { sysmap = "a"; }
g {
  pagemode = "ia32e";
  sysmap = "b"; sysmap = "c";
}
`)
	d, _ := c.Domain("g")
	assert.Equal(t, DomainConfig{Name: "g", Line: 2, Sysmap: "c", Offsets: map[string]uint64{}, Unknown: map[string]string{"pagemode": "ia32e"}}, d, "the last counts, and alone")
	assert.Equal(t, []string{
		`configuration:3:3: key "pagemode" is not known`,
		`configuration:4:17: key "sysmap" is in line 4 already: this one counts`,
		`configuration:2:1: domain "g" is in line 1 already: this one counts`,
	}, c.Warnings())

	var b strings.Builder
	b.WriteString("g {")
	for i := range 150 {
		fmt.Fprintf(&b, "k%d = 1;", i)
	}
	c = mustParse(t, b.String()+"}")
	require.Len(t, c.Warnings(), 101)
	assert.Equal(t, "configuration: 50 more", c.Warnings()[100])
}

// TestConfigBlocks: what is wrong with one block fails no other, as configurations are
// posted: with the author's own additions, halves of them, notes in between.
func TestConfigBlocks(t *testing.T) {
	for _, tt := range []struct {
		name, bad string
		domain    string // in which the error is, or ""
		warning   string
	}{
		{"value", "bad { linux_mm = many; }", "bad", "2:18: linux_mm is a number"},
		{"semicolon", "bad {\n ostype = \"Linux\"\n sysmap = x;\n}", "bad", "4:2: a ; is expected"},
		{"quote", "bad { sysmap = \"x;\n }", "bad", "2:16: the quote"},
		{"no end", "bad { sysmap = x;", "bad", "3:5: a = is expected after the key, not {"},
		{"nested", "bad { linux { tasks = 1; } sysmap = x; }", "bad", "2:13: a = is expected"},
		{"name", "a bad one { sysmap = x; }", "", "2:3: a { is expected"},
		{"brace", "}", "", "2:1: a domain's name"},
		{"note", "put this into /etc/libvmi.conf:\n{}", "", "2:5: a { is expected"},
		{"control", "bad { sysmap = \x1b; }", "bad", "2:16: control characters"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := mustParse(t, "one { sysmap = 1; }\n"+tt.bad+"\ntwo { sysmap = 2; }\n")
			for _, name := range []string{"one", "two"} {
				d, ok := c.Domain(name)
				require.True(t, ok, name)
				require.NoError(t, d.Err)
				assert.NotEmpty(t, d.Sysmap)
			}
			require.NotEmpty(t, c.Warnings())
			assert.Contains(t, c.Warnings()[0], "configuration:"+tt.warning)
			d, ok := c.Domain("bad")
			assert.Equal(t, tt.domain != "", ok)
			if ok {
				require.ErrorIs(t, d.Err, ErrConfig)
			}
		})
	}
}

// What is asked for must be understood; others' blocks needn't.
func TestConfigured(t *testing.T) {
	path := filepath.Join(t.TempDir(), "conf")
	require.NoError(t, os.WriteFile(path, []byte("good { sysmap = 'x'; }\nbad { sysmap }\n"), 0o600))
	d, err := configured("good", &Options{Config: path})
	require.NoError(t, err)
	assert.Equal(t, "x", d.Sysmap)
	_, err = configured("bad", &Options{Config: path})
	require.ErrorIs(t, err, ErrConfig)
	require.ErrorContains(t, err, path+":2:14")
	_, err = configured("other", &Options{Config: path})
	require.NoError(t, err)
}

func TestConfigErrors(t *testing.T) {
	long := strings.Repeat("x", 4097)
	for _, tt := range []struct {
		name, text string
		line, col  int
		msg        string
	}{
		{"no name", "\n {", 2, 2, "a domain's name is expected here, not {"},
		{"empty name", `"" {}`, 1, 1, "a domain's name is expected"},
		{"no brace", "g = 1;", 1, 3, "a { is expected after the domain's name, not ="},
		{"two names", "my guest {}", 1, 4, `a { is expected after the domain's name, not "guest"`},
		{"no end", "g {\n ostype = x;\n", 3, 1, "a key or } is expected here, not the end"},
		{"no equals", "g { ostype \"x\"; }", 1, 12, `a = is expected after the key, not "x"`},
		{"no value", "g { ostype = ; }", 1, 14, "a value is expected here, not ;"},
		{"no value at the end", "g { ostype =", 1, 13, "a value is expected here, not the end"},
		{"no semicolon", "g {\n ostype = \"x\"\n sysmap = y; }", 3, 2, `a ; is expected after the value, not "sysmap"`},
		{"key", "g { = 1; }", 1, 5, "a key or } is expected here, not ="},
		{"quote", "g { sysmap = \"x;\n}", 1, 14, "isn't closed"},
		{"quote at the end", "g { sysmap = \"x", 1, 14, "isn't closed"},
		{"open name", "\"", 1, 1, "isn't closed"},
		{"number", "g { linux_mm = \"/x\"; }", 1, 16, `linux_mm is a number of up to 64 bits, not "/x"`},
		{"negative", "g { linux_mm = -1; }", 1, 16, "a number"},
		{"octal", "g { linux_mm = 089; }", 1, 16, "a number"},
		{"hexadecimal", "g { linux_mm = 0x; }", 1, 16, "a number"},
		{"binary", "g { linux_mm = 0b1; }", 1, 16, "a number"},
		{"underscore", "g { linux_mm = 0x1_0; }", 1, 16, "a number"},
		{"65 bits", "g { linux_mm = 0x10000000000000000; }", 1, 16, "a number"},
		{"no number", `g { linux_mm = ""; }`, 1, 16, "a number"},
		{"NUL", "g\x00 {}", 1, 1, "control characters"},
		{"control in a quote", "g { sysmap = \"\x1b[2J\"; }", 1, 14, "control characters"},
		{"long word", long + " {}", 1, 1, "longer than 4096"},
		{"long quote", "g { sysmap = \"" + long + "\"; }", 1, 14, "longer than 4096"},
		{"large", strings.Repeat("#", 1<<20+1), 1, 1, "larger than 1048576"},
		{"stray brace", "}", 1, 1, "a domain's name"},
		{"open comment", "g /* {\n}", 1, 3, "the comment isn't closed"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := ParseConfig(strings.NewReader(tt.text))
			require.ErrorIs(t, err, ErrConfig)
			var s *SyntaxError
			require.ErrorAs(t, err, &s)
			assert.Equal(t, []int{tt.line, tt.col}, []int{s.Line, s.Col})
			assert.Contains(t, s.Msg, tt.msg)
			assert.Contains(t, err.Error(), fmt.Sprintf("configuration:%d:%d: ", tt.line, tt.col))
		})
	}
	errIO := errors.New("input/output error")
	_, err := ParseConfig(iotest.ErrReader(errIO))
	require.ErrorIs(t, err, errIO)
	mustParse(t, strings.Repeat("#", 1<<20))
}

func TestLoadConfig(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(path, []byte(text), 0o600))
		return path
	}
	a := write("a", "one { sysmap = a; odd = 1; }")
	b := write("b", "one { sysmap = b; }\ntwo { sysmap = b; }")
	c, err := LoadConfig(a, b)
	require.NoError(t, err)
	for name, want := range map[string]DomainConfig{"one": {Sysmap: "a", File: a, Line: 1}, "two": {Sysmap: "b", File: b, Line: 2}} {
		d, ok := c.Domain(name)
		require.True(t, ok)
		assert.Equal(t, want, DomainConfig{Sysmap: d.Sysmap, File: d.File, Line: d.Line})
	}
	assert.Equal(t, []string{
		a + `:1:19: key "odd" is not known`,
		b + `:1: domain "one" is ignored: ` + a + `:1 has it too`,
	}, c.Warnings())

	c, err = LoadConfig()
	require.NoError(t, err)
	assert.Empty(t, c.Names())
	_, err = LoadConfig(a, filepath.Join(dir, "none"))
	require.ErrorIs(t, err, fs.ErrNotExist)
	_, err = LoadConfig(write("bad", "x"))
	require.ErrorIs(t, err, ErrConfig)
	require.ErrorContains(t, err, filepath.Join(dir, "bad")+":1:2: a { is expected")
}

// No input panics, and what is understood can be written down and understood again.
func FuzzParseConfig(f *testing.F) {
	f.Add(wiki)
	f.Add(`"my guest" { sysmap = "a;b"; odd = /x; ;}#`)
	f.Add("g{linux_mm=0777;linux_mm=0x1}g{}")
	f.Add("g {\n\x00")
	f.Add("g { a }\nh { sysmap = 'x\"y'; // z\n/* } */ } }")
	f.Fuzz(func(t *testing.T, text string) {
		c, err := ParseConfig(strings.NewReader(text))
		if err != nil {
			var s *SyntaxError
			if !errors.As(err, &s) || s.Line < 1 || s.Col < 1 || s.Line > strings.Count(text, "\n")+1 {
				t.Fatalf("error %v", err)
			}
			return
		}
		for _, name := range c.Names() {
			d, ok := c.Domain(name)
			if !ok || d.Name != name {
				t.Fatalf("domain %q: %+v", name, d)
			}
			if d.Err != nil {
				continue
			}
			var b strings.Builder
			quote := func(s string) string {
				if strings.Contains(s, `"`) {
					return "'" + s + "'"
				}
				return `"` + s + `"`
			}
			fmt.Fprintf(&b, "%s{ostype=%s;sysmap=%s;volatility_ist=%s;rekall_profile=%s;", quote(name), quote(d.OSType), quote(d.Sysmap), quote(d.Types), quote(d.Rekall))
			for k, v := range d.Offsets {
				fmt.Fprintf(&b, "%s=%#x;", k, v)
			}
			for k, v := range d.Unknown {
				fmt.Fprintf(&b, "%s=%s;", quote(k), quote(v))
			}
			if b.Len() > maxConfig-1 {
				continue
			}
			again, err := ParseConfig(strings.NewReader(b.String() + "}"))
			if err != nil {
				t.Fatalf("%s: %v", b.String(), err)
			}
			e, _ := again.Domain(name)
			d.Line, e.Line = 0, 0
			if fmt.Sprint(d) != fmt.Sprint(e) {
				t.Fatalf("%+v became %+v", d, e)
			}
		}
	})
}

func ExampleParseConfig() {
	c, err := ParseConfig(strings.NewReader(`a3guest { sysmap = "/boot/System.map-6.1"; }`))
	if err != nil {
		fmt.Println(err)
		return
	}
	d, _ := c.Domain("a3guest")
	fmt.Println(d.Sysmap)
	// Output: /boot/System.map-6.1
}
