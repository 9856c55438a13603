package aptsrc

import (
	"testing"

	"github.com/stretchr/testify/assert"
)

func TestSourcePackagesList(t *testing.T) {
	for name, tt := range map[string]struct{ in, want string }{
		"empty":    {"", ""},
		"comments": {"# deb http://a b c\n\n", ""},
		"plain":    {"deb http://m.example/debian stable main contrib # note\n", "deb-src http://m.example/debian stable main contrib\n"},
		"options": {
			"deb [ arch=amd64 signed-by=/k.gpg ] http://m.example/debian stable main\ndeb [arch=amd64] http://o.example stable main",
			"deb-src [signed-by=/k.gpg] http://m.example/debian stable main\ndeb-src http://o.example stable main\n",
		},
		"both kinds": {"deb http://m.example s main\ndeb-src http://m.example s main\n", "deb-src http://m.example s main\n"},
		"others":     {"rpm http://m.example s main\n", ""},
	} {
		t.Run(name, func(t *testing.T) { assert.Equal(t, tt.want, SourcePackages.List(tt.in)) })
	}
}

func TestSourcePackagesSources(t *testing.T) {
	in := `# the mirror
Types: deb
# an older one
URIs: http://m.example/debian
Suites: stable stable-updates
Components: main
Architectures: amd64
 i386
Signed-By:
 -----BEGIN KEY-----
 .
 -----END KEY-----

Types: deb deb-src
URIs: http://s.example/security
Suites: stable-security
Components: main

Types: deb
URIs: http://off.example
Suites: x
Components: main
Enabled: no
`
	assert.Equal(t, `Types: deb-src
URIs: http://m.example/debian
Suites: stable stable-updates
Components: main
Signed-By:
 -----BEGIN KEY-----
 .
 -----END KEY-----

Types: deb-src
URIs: http://s.example/security
Suites: stable-security
Components: main
`, SourcePackages.Sources(in))
	assert.Empty(t, SourcePackages.Sources(""))
}

// TestVersion checks that another version's repositories are derived from those of one
// version, and from no others.
func TestVersion(t *testing.T) {
	e := Version("bookworm", "trixie")
	assert.Equal(t, `deb [signed-by=/k.gpg] http://m.example/debian trixie main
deb-src [signed-by=/k.gpg] http://m.example/debian trixie main
deb http://s.example/security trixie-security main
deb-src http://s.example/security trixie-security main
`, e.List(`deb [arch=amd64 signed-by=/k.gpg] http://m.example/debian bookworm main
deb http://s.example/security bookworm-security main
deb-src http://s.example/security bookworm-security main
deb http://m.example/debian bookworm-backports main
deb http://o.example/tool stable main
deb [arch=amd64] http://cut.example
`))
	assert.Equal(t, `Types: deb deb-src
URIs: http://m.example/debian
Suites: trixie trixie-updates
Components: main
`, e.Sources(`Types: deb
URIs: http://m.example/debian
Suites: bookworm bookworm-backports
 bookworm-updates
Components: main

Types: deb
URIs: http://o.example/node
Suites: nodistro
Components: main

Types: deb
URIs: http://n.example/without-suites
`))
}

// TestAll: each suite is looked for where the release is, and the security updates where
// those of the release are.
func TestAll(t *testing.T) {
	e := All("bookworm", []string{"bullseye", "bullseye-security", "bullseye-backports", "sid"})
	assert.Equal(t, `deb http://m.example/debian bullseye main
deb http://m.example/debian bullseye-backports main
deb http://m.example/debian sid main
deb http://s.example/security bullseye-security main
`, e.List(`deb http://m.example/debian bookworm main
deb http://m.example/debian bookworm-updates main
deb [arch=amd64] http://s.example/security bookworm-security main
deb http://o.example/tool stable main
`))
	assert.Equal(t, `Types: deb
URIs: http://m.example/debian
Suites: bullseye bullseye-backports sid
Components: main
`, e.Sources(`Types: deb
URIs: http://m.example/debian
Suites: bookworm bookworm-updates
Components: main
Architectures: amd64
`))
}
