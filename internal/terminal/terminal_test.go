package terminal

import (
	"testing"

	"github.com/stretchr/testify/assert"
)

func TestHarmless(t *testing.T) {
	for in, want := range map[string]string{
		"":                           "",
		"domain \"a3guest\": größer": "domain \"a3guest\": größer",
		"two\nlines":                 "two\nlines",
		"a\x1b[2J":                   "a?[2J",
		"a\tb\rc\x7f\u0085":          "a?b?c??",
		"\u202egnp.exe":              "?gnp.exe", // right-to-left override
		"\xff":                       "\ufffd",
	} {
		assert.Equal(t, want, Harmless(in))
	}
}
