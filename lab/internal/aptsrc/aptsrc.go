// Package aptsrc derives package sources from a machine's apt configuration: those of
// the source packages, which it usually has none of, and those of another version of
// the distribution.
package aptsrc

import (
	"slices"
	"strings"
)

// Edit is what becomes of the entries of a configuration.
type Edit struct {
	// Types are those of the new entries: "deb", "deb-src" or both.
	Types []string
	// Suites returns the suites that take a suite's place. An entry that is left without
	// a suite is left out. Without Suites all stay as they are.
	Suites func(suite string) []string
}

// SourcePackages makes each entry the one for the same repository's source packages.
var SourcePackages = Edit{Types: []string{"deb-src"}}

// Version makes the entries those of another version of Debian, with its source
// packages: its release, the updates to it and the security updates. Entries of other
// repositories are left out.
func Version(from, to string) Edit {
	suites := map[string][]string{from: {to}}
	for _, s := range []string{"-updates", "-security"} {
		suites[from+s] = []string{to + s}
	}
	return Edit{Types: []string{"deb", "deb-src"}, Suites: func(s string) []string { return suites[s] }}
}

// All makes the entries those of all suites named, without source packages. The security
// updates are in a repository of their own, all else is where the release itself is.
func All(from string, suites []string) Edit {
	return Edit{Types: []string{"deb"}, Suites: func(s string) []string {
		if s != from && s != from+"-security" {
			return nil
		}
		var out []string
		for _, to := range suites {
			if strings.HasSuffix(to, "-security") == (s != from) {
				out = append(out, to)
			}
		}
		return out
	}}
}

func (e Edit) suites(s string) []string {
	if e.Suites == nil {
		return []string{s}
	}
	return e.Suites(s)
}

// List rewrites a one-line style file ("deb URI suite component…").
func (e Edit) List(content string) string {
	var out []string
	for line := range strings.Lines(content) {
		line, _, _ = strings.Cut(line, "#")
		fields := strings.Fields(line)
		if len(fields) < 3 || (fields[0] != "deb" && fields[0] != "deb-src") {
			continue
		}
		fields = withoutArch(fields)
		suite := 2
		if strings.HasPrefix(fields[1], "[") {
			suite++
		}
		if suite >= len(fields) {
			continue
		}
		for _, fields[suite] = range e.suites(fields[suite]) {
			for _, fields[0] = range e.Types {
				if line := strings.Join(fields, " "); !slices.Contains(out, line) {
					out = append(out, line)
				}
			}
		}
	}
	return joined(out, "\n")
}

// withoutArch takes the architectures out of an entry's options: sources have
// none. Its other options become one field.
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

// Sources rewrites a deb822 style file.
func (e Edit) Sources(content string) string {
	var out []string
	for _, stanza := range stanzas(content) {
		if s := e.stanza(stanza); s != "" && !slices.Contains(out, s) {
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

// stanza rewrites one stanza. "" leaves it out.
func (e Edit) stanza(lines []string) string {
	var out, suites []string
	usable, dropped, inSuites := false, false, false
	for _, line := range lines {
		if line[0] == ' ' || line[0] == '\t' { // the field goes on
			switch {
			case inSuites:
				suites = append(suites, strings.Fields(line)...)
			case !dropped:
				out = append(out, line)
			}
			continue
		}
		dropped, inSuites = false, false
		field, value, _ := strings.Cut(line, ":")
		value = strings.TrimSpace(value)
		switch strings.ToLower(field) {
		case "types":
			usable = slices.ContainsFunc(strings.Fields(value), func(s string) bool { return s == "deb" || s == "deb-src" })
			line = "Types: " + strings.Join(e.Types, " ")
		case "suites":
			inSuites = true
			suites = append(suites, strings.Fields(value)...)
			line = "Suites:" // the rest follows
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
	var left []string
	for _, s := range suites {
		left = append(left, e.suites(s)...)
	}
	if !usable || len(left) == 0 {
		return ""
	}
	out[slices.Index(out, "Suites:")] = "Suites: " + strings.Join(left, " ")
	return strings.Join(out, "\n")
}
