// Package aptsrc derives the entries for source packages from a machine's apt
// configuration for binary packages, which usually has none of them.
package aptsrc

import (
	"slices"
	"strings"
)

// FromList rewrites a one-line style file ("deb URI suite component…"): each
// entry becomes the one for the same repository's source packages.
func FromList(content string) string {
	var out []string
	for line := range strings.Lines(content) {
		line, _, _ = strings.Cut(line, "#")
		fields := strings.Fields(line)
		if len(fields) < 3 || (fields[0] != "deb" && fields[0] != "deb-src") {
			continue
		}
		fields[0] = "deb-src"
		if line := strings.Join(withoutArch(fields), " "); !slices.Contains(out, line) {
			out = append(out, line)
		}
	}
	return joined(out, "\n")
}

// withoutArch takes the architectures out of an entry's options: sources have
// none.
func withoutArch(fields []string) []string {
	first := fields[1]
	if !strings.HasPrefix(first, "[") {
		return fields
	}
	end := slices.IndexFunc(fields, func(s string) bool { return strings.HasSuffix(s, "]") })
	if end < 0 {
		return fields
	}
	options := strings.Fields(strings.Trim(strings.Join(fields[1:end+1], " "), "[] "))
	options = slices.DeleteFunc(options, func(s string) bool { return strings.HasPrefix(s, "arch") })
	out := []string{fields[0]}
	if len(options) > 0 {
		out = append(out, "["+strings.Join(options, " ")+"]")
	}
	return append(out, fields[end+1:]...)
}

// FromSources rewrites a deb822 style file in the same way.
func FromSources(content string) string {
	var out []string
	for _, stanza := range stanzas(content) {
		if s := rewriteStanza(stanza); s != "" && !slices.Contains(out, s) {
			out = append(out, s)
		}
	}
	return joined(out, "\n\n")
}

func joined(parts []string, separator string) string {
	if len(parts) == 0 {
		return ""
	}
	return strings.Join(parts, separator) + "\n"
}

// stanzas cuts a deb822 file into the lines of each stanza, without comments.
func stanzas(content string) [][]string {
	var all [][]string
	var current []string
	flush := func() {
		if len(current) > 0 {
			all = append(all, current)
		}
		current = nil
	}
	for line := range strings.Lines(content) {
		line = strings.TrimRight(line, "\r\n \t")
		switch {
		case line == "":
			flush()
		case strings.HasPrefix(line, "#"):
		default:
			current = append(current, line)
		}
	}
	flush()
	return all
}

func rewriteStanza(lines []string) string {
	var out []string
	usable, dropped := false, false
	for _, line := range lines {
		if line[0] == ' ' || line[0] == '\t' { // the field goes on
			if !dropped {
				out = append(out, line)
			}
			continue
		}
		dropped = false
		field, value, _ := strings.Cut(line, ":")
		value = strings.TrimSpace(value)
		switch strings.ToLower(field) {
		case "types":
			usable = slices.ContainsFunc(strings.Fields(value), func(s string) bool { return s == "deb" || s == "deb-src" })
			line = "Types: deb-src"
		case "enabled":
			if v := strings.ToLower(value); v == "no" || v == "false" || v == "0" {
				return ""
			}
		case "architectures", "architectures-add", "architectures-remove":
			dropped = true
			continue
		}
		out = append(out, line)
	}
	if !usable {
		return ""
	}
	return strings.Join(out, "\n")
}
