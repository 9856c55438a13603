package repotest

import (
	"go/ast"
	"go/build/constraint"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

const (
	root   = "../.."
	module = "github.com/vmprobes/vmprobes"
	// top is what the package at the root is called in the pages.
	top = "vmprobes"
)

// A source is a Go file of the module, on whatever system and with whatever tags it
// is built.
type source struct {
	path   string // from the root
	pkg    string // its folder, or top
	test   bool
	tagged bool // it has a build constraint, by a line or by its name
	fset   *token.FileSet
	file   *ast.File
}

// sources parses every Go file of the module. Reading them here, instead of asking
// the go command alone, is also what makes "go test" run a test again when one of
// them has changed.
func sources(t *testing.T) []source {
	t.Helper()
	var all []source
	err := filepath.WalkDir(root, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		base := d.Name()
		if d.IsDir() {
			_, nested := os.Stat(filepath.Join(name, "go.mod"))
			if name != root && (nested == nil || base == "testdata" || base[0] == '.' || base[0] == '_') {
				return filepath.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(base, ".go") || base[0] == '.' || base[0] == '_' {
			return nil
		}
		rel, err := filepath.Rel(root, name)
		if err != nil {
			return err
		}
		s := source{path: filepath.ToSlash(rel), test: strings.HasSuffix(base, "_test.go"), fset: token.NewFileSet()}
		if s.pkg = path.Dir(s.path); s.pkg == "." {
			s.pkg = top
		}
		if s.file, err = parser.ParseFile(s.fset, name, nil, parser.ParseComments); err != nil {
			return err
		}
		s.tagged = tagged(s.file, strings.TrimSuffix(strings.TrimSuffix(base, ".go"), "_test"))
		all = append(all, s)
		return nil
	})
	require.NoError(t, err)
	require.Greater(t, len(all), 200)
	return all
}

// tagged reports whether a file is built on some systems only.
func tagged(f *ast.File, name string) bool {
	for _, g := range f.Comments {
		for _, c := range g.List {
			if c.Pos() < f.Package && constraint.IsGoBuild(c.Text) {
				return true
			}
		}
	}
	for _, suffix := range []string{"_linux", "_amd64", "_darwin", "_windows", "_unix"} {
		if strings.HasSuffix(name, suffix) && suffix != "_unix" { // unix is no GOOS: only a line says so
			return true
		}
	}
	return false
}

// imports returns what a file imports: packages of this module by their folders, and
// the others by their paths.
func (s *source) imports() (own, others []string) {
	for _, i := range s.file.Imports {
		p, err := strconv.Unquote(i.Path.Value)
		if err != nil {
			continue
		}
		if p == module {
			own = append(own, top)
		} else if rest, ok := strings.CutPrefix(p, module+"/"); ok {
			own = append(own, rest)
		} else {
			others = append(others, p)
		}
	}
	return own, others
}

// goList returns the packages of the module as the go command sees them on this
// system, with their imports of each other.
func goList(t *testing.T) map[string][]string {
	t.Helper()
	cmd := exec.Command("go", "list", "-f", "{{if .GoFiles}}{{.ImportPath}} {{range .Imports}} {{.}}{{end}}{{end}}", "./...")
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "GOFLAGS=")
	out, err := cmd.Output()
	require.NoError(t, err)
	list := map[string][]string{}
	folder := func(p string) (string, bool) {
		if p == module {
			return top, true
		}
		return strings.CutPrefix(p, module+"/")
	}
	for line := range strings.Lines(string(out)) {
		f := strings.Fields(line)
		if len(f) == 0 { // it has tests only
			continue
		}
		pkg, ok := folder(f[0])
		require.True(t, ok, line)
		list[pkg] = nil
		for _, p := range f[1:] {
			if q, ok := folder(p); ok {
				list[pkg] = append(list[pkg], q)
			}
		}
	}
	return list
}

// page returns a file at the root, and its tables by the heading above them and the
// first cell of their own heading. A cell has no markup.
func page(t *testing.T, name string) (string, []table) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(root, name))
	require.NoError(t, err)
	text := string(b)
	var tables []table
	var heading string
	inside := false
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if h, ok := strings.CutPrefix(line, "## "); ok {
			heading = h
		}
		if !strings.HasPrefix(line, "|") {
			inside = false
			continue
		}
		var cells []string
		for c := range strings.SplitSeq(strings.Trim(line, "|"), "|") {
			cells = append(cells, strings.TrimSpace(strings.ReplaceAll(c, "`", "")))
		}
		switch {
		case !inside:
			tables = append(tables, table{heading: heading, head: cells})
			inside = true
		case strings.Trim(line, "|-: ") == "":
		default:
			last := &tables[len(tables)-1]
			require.Len(t, cells, len(last.head), "%s: %s", name, line)
			last.rows = append(last.rows, cells)
		}
	}
	return text, tables
}

// table is one of a page.
type table struct {
	heading string
	head    []string
	rows    [][]string
}

// list splits a cell at its commas; "–" is an empty one.
func list(cell string) []string {
	var out []string
	for s := range strings.SplitSeq(cell, ",") {
		if s = strings.TrimSpace(s); s != "" && s != "–" {
			out = append(out, s)
		}
	}
	return out
}

// sorted returns the elements of a list once each.
func sorted(l []string) []string {
	l = slices.Clone(l)
	slices.Sort(l)
	return slices.Compact(l)
}
