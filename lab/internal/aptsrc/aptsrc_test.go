package aptsrc

import (
	"testing"

	"github.com/stretchr/testify/assert"
)

func TestFromList(t *testing.T) {
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
		t.Run(name, func(t *testing.T) { assert.Equal(t, tt.want, FromList(tt.in)) })
	}
}

func TestFromSources(t *testing.T) {
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
`, FromSources(in))
	assert.Empty(t, FromSources(""))
}
