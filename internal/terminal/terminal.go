// Package terminal is about what programs show to people.
package terminal

import (
	"strings"
	"unicode"
)

// Harmless replaces in a text what a terminal obeys, or doesn't show as it is: a guest may
// have put it there. Lines stay.
func Harmless(s string) string {
	return strings.Map(func(r rune) rune {
		if r != '\n' && r != ' ' && !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, s)
}
