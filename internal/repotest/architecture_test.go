package repotest

import (
	"fmt"
	"go/ast"
	"maps"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// room is a package as ARCHITECTURE.md shows it.
type room struct {
	layer   string // a number, "programs", "tests" or "lab"
	imports []string
	place   int // among all rooms, from the top of the page
}

// level returns the number of a layer of the library.
func (r room) level() (int, bool) {
	n, err := strconv.Atoi(r.layer)
	return n, err == nil
}

func rooms(t *testing.T, tables []table) map[string]room {
	t.Helper()
	all := map[string]room{}
	for _, tb := range tables {
		if !slices.Equal(tb.head[:min(3, len(tb.head))], []string{"layer", "package", "imports"}) {
			continue
		}
		for _, r := range tb.rows {
			assert.NotContains(t, all, r[1], "ARCHITECTURE.md shows it twice")
			all[r[1]] = room{r[0], list(r[2]), len(all)}
		}
	}
	require.Greater(t, len(all), 40, "ARCHITECTURE.md has no tables of packages")
	return all
}

// The packages and the arrows between them that ARCHITECTURE.md shows are those that
// the code has, whatever system it is built for, and every arrow points down.
func TestArchitecture(t *testing.T) {
	_, tables := page(t, "ARCHITECTURE.md")
	shown := rooms(t, tables)
	real := map[string][]string{}
	for _, s := range sources(t) {
		if s.test {
			continue
		}
		own, _ := s.imports()
		real[s.pkg] = append(real[s.pkg], own...)
	}

	// What was parsed here is what the go command sees, and for other systems more.
	listed := goList(t)
	assert.Equal(t, slices.Sorted(maps.Keys(listed)), slices.Sorted(maps.Keys(real)))
	for pkg, imports := range listed {
		for _, i := range imports {
			assert.Contains(t, real[pkg], i, pkg)
		}
	}

	for pkg, imports := range real {
		imports = sorted(imports)
		r, ok := shown[pkg]
		cell := "–"
		if len(imports) > 0 {
			cell = strings.Join(imports, ", ")
		}
		if !ok {
			t.Errorf("ARCHITECTURE.md lacks the row\n| layer | %s | %s | what it is |", pkg, cell)
			continue
		}
		if !slices.Equal(sorted(r.imports), imports) {
			t.Errorf("ARCHITECTURE.md, %s: it shows %s; the code imports\n| %s | %s | %s |", pkg, strings.Join(r.imports, ", "), r.layer, pkg, cell)
		}
		for _, i := range imports {
			if why := upward(r, shown[i]); why != "" {
				t.Errorf("%s imports %s: %s", pkg, i, why)
			}
		}
	}
	for pkg := range shown {
		assert.Contains(t, real, pkg, "ARCHITECTURE.md shows a package that there isn't")
	}
}

// upward says what is wrong with an arrow.
func upward(from, to room) string {
	a, lib := from.level()
	b, below := to.level()
	switch {
	case lib && !below:
		return fmt.Sprintf("it is of the %s", to.layer)
	case lib && b >= a:
		return fmt.Sprintf("layer %d from layer %d: arrows point down", b, a)
	case lib:
	case below:
		return ""
	case from.layer != to.layer && !(from.layer == "lab" && to.layer == "tests"):
		return fmt.Sprintf("it is of the %s", to.layer)
	case from.layer == to.layer && to.place < from.place:
		return "it stands higher in the table"
	}
	return ""
}

// The picture above the tables shows the same layers: each line a number, the
// packages of that layer, and in brackets those that are planned.
func TestArchitecturePicture(t *testing.T) {
	text, tables := page(t, "ARCHITECTURE.md")
	shown := rooms(t, tables)
	want := map[string][]string{}
	for pkg, r := range shown {
		if _, ok := r.level(); ok {
			want[r.layer] = append(want[r.layer], pkg)
		}
	}
	planned := map[string]string{} // room: layer
	for _, tb := range tables {
		if tb.head[0] != "planned" {
			continue
		}
		for _, r := range tb.rows {
			planned[r[0]] = r[1]
			layer, ok := room{layer: r[1]}.level()
			if !ok {
				assert.Equal(t, "programs", r[1], r[0])
				layer = 1 << 10
			}
			for _, need := range list(r[2]) {
				if to, ok := shown[need]; ok {
					n, ok := to.level()
					assert.True(t, ok && n < layer, "%s would have to reach up to %s", r[0], need)
				} else if l, ok := planned[need]; ok {
					n, _ := strconv.Atoi(l)
					assert.Less(t, n, layer, "%s would have to reach up to %s", r[0], need)
				} else {
					t.Errorf("%s needs %s, which is neither there nor planned above it", r[0], need)
				}
			}
		}
	}
	require.NotEmpty(t, planned)

	got, brackets := map[string][]string{}, map[string]string{}
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) < 2 || !strings.HasPrefix(line, "    ") {
			continue
		}
		if _, err := strconv.Atoi(f[0]); err != nil {
			continue
		}
		for _, name := range f[1:] {
			if in, ok := strings.CutPrefix(name, "["); ok {
				brackets[strings.TrimSuffix(in, "]")] = f[0]
			} else {
				got[f[0]] = append(got[f[0]], name)
			}
		}
	}
	for layer, pkgs := range want {
		assert.Equal(t, sorted(pkgs), sorted(got[layer]), "layer %s of the picture", layer)
	}
	assert.Len(t, got, len(want))
	for name, layer := range brackets {
		assert.Equal(t, planned[name], layer, "[%s] in the picture", name)
		assert.NotContains(t, shown, name, "it is planned, and there")
	}
	for name, layer := range planned {
		if layer != "programs" && !strings.HasSuffix(name, ".go") {
			assert.Contains(t, brackets, name, "planned, and not in the picture")
		}
	}
}

// What only a program needs is in no package of the library, and each module that
// others have made is used where ARCHITECTURE.md says.
func TestLibraryImports(t *testing.T) {
	_, tables := page(t, "ARCHITECTURE.md")
	shown := rooms(t, tables)
	// Flags, logging to the terminal, other programs, web servers, tests, and signals but
	// for the package-level functions, which have C's signal handling. The guardian is a
	// program, though one of ours.
	never := []string{"flag", "log", "os/exec", "net/http", "expvar", "testing", "os/signal", "embed"}
	used := map[string][]string{}
	for _, s := range sources(t) {
		_, others := s.imports()
		_, lib := shown[s.pkg].level()
		for _, p := range others {
			allowed := s.pkg == top && p == "os/signal" || strings.HasSuffix(s.pkg, "internal/guardian") && strings.HasPrefix(p, "os/")
			if lib && !s.test && slices.Contains(never, p) && !allowed {
				t.Errorf("%s imports %q: that is for programs", s.path, p)
			}
			if p == "C" {
				assert.Equal(t, "xenctrl", s.pkg, "%s: C is xenctrl's alone", s.path)
			}
			if !s.test && strings.Contains(strings.SplitN(p, "/", 2)[0], ".") {
				used[p] = append(used[p], s.pkg)
			}
		}
	}
	third := map[string][]string{}
	for _, tb := range tables {
		if tb.head[0] == "from others" {
			for _, r := range tb.rows {
				third[r[0]] = list(r[1])
			}
		}
	}
	for p, pkgs := range used {
		assert.Equal(t, sorted(pkgs), sorted(third[p]), "ARCHITECTURE.md, %s", p)
	}
	for p := range third {
		assert.Contains(t, used, p, "ARCHITECTURE.md shows it")
	}
}

// Every exported declaration of a package that programs import is in a file without
// build constraints, so that programs compile everywhere and the documentation is
// the same.
func TestExportedUntagged(t *testing.T) {
	_, tables := page(t, "ARCHITECTURE.md")
	shown := rooms(t, tables)
	for _, s := range sources(t) {
		_, lib := shown[s.pkg].level()
		if s.test || !s.tagged || !lib || strings.HasPrefix(s.pkg, "internal/") {
			continue
		}
		for _, d := range s.file.Decls {
			switch d := d.(type) {
			case *ast.FuncDecl:
				if d.Name.IsExported() && (d.Recv == nil || ast.IsExported(receiver(d))) {
					t.Errorf("%s: %s is exported", s.path, d.Name.Name)
				}
			case *ast.GenDecl:
				for _, spec := range d.Specs {
					switch spec := spec.(type) {
					case *ast.TypeSpec:
						assert.False(t, spec.Name.IsExported(), "%s: %s is exported", s.path, spec.Name.Name)
					case *ast.ValueSpec:
						for _, name := range spec.Names {
							assert.False(t, name.IsExported(), "%s: %s is exported", s.path, name.Name)
						}
					}
				}
			}
		}
	}
}

// receiver returns the type of a method's receiver, "" for a function.
func receiver(d *ast.FuncDecl) string {
	if d.Recv == nil || len(d.Recv.List) == 0 {
		return ""
	}
	e := d.Recv.List[0].Type
	if star, ok := e.(*ast.StarExpr); ok {
		e = star.X
	}
	if index, ok := e.(*ast.IndexExpr); ok {
		e = index.X
	}
	if id, ok := e.(*ast.Ident); ok {
		return id.Name
	}
	return ""
}

// How long the way of a hit may be, in what ARCHITECTURE.md lists of it.
const (
	mostFiles     = 7
	mostFunctions = 20
)

// The way of a hit that ARCHITECTURE.md describes is there: each function is in the
// file named, and each but the first is called by one that stands before it. What it
// names as left out is there, too.
func TestWayOfAHit(t *testing.T) {
	type function struct {
		file  string
		calls map[string]bool
	}
	byName := map[string][]function{} // "Type.method" or "function"
	for _, s := range sources(t) {
		if s.test {
			continue
		}
		for _, d := range s.file.Decls {
			fn, ok := d.(*ast.FuncDecl)
			if !ok || fn.Body == nil {
				continue
			}
			name := fn.Name.Name
			if r := receiver(fn); r != "" {
				name = r + "." + name
			}
			calls := map[string]bool{}
			ast.Inspect(fn.Body, func(n ast.Node) bool {
				switch n := n.(type) {
				case *ast.SelectorExpr:
					calls[n.Sel.Name] = true
				case *ast.Ident:
					calls[n.Name] = true
				}
				return true
			})
			byName[name] = append(byName[name], function{s.path, calls})
		}
	}
	routes := 0
	_, tables := page(t, "ARCHITECTURE.md")
	for _, tb := range tables {
		if tb.head[0] == "left out" {
			for _, r := range tb.rows {
				for _, name := range list(r[1]) {
					assert.Contains(t, byName, name, "left out: %s", r[0])
				}
			}
		}
		if !slices.Equal(tb.head[:min(2, len(tb.head))], []string{"file", "functions"}) {
			continue
		}
		routes++
		called := map[string]bool{}
		files, functions := map[string]bool{}, map[string]bool{}
		for i, r := range tb.rows {
			files[r[0]] = true
			for j, name := range list(r[1]) {
				name, closure := strings.CutSuffix(name, " (its closure)")
				functions[r[0]+name] = true
				k := slices.IndexFunc(byName[name], func(f function) bool { return f.file == r[0] })
				if k < 0 {
					t.Errorf("%s: there is no function %s in %s", tb.heading, name, r[0])
					continue
				}
				short := name[strings.LastIndex(name, ".")+1:]
				if (i > 0 || j > 0) && !closure && !called[short] {
					t.Errorf("%s: nothing before it calls %s of %s", tb.heading, name, r[0])
				}
				maps.Copy(called, byName[name][k].calls)
			}
		}
		t.Logf("%s: %d files, %d functions", tb.heading, len(files), len(functions))
		assert.LessOrEqual(t, len(files), mostFiles, "%s: files", tb.heading)
		assert.LessOrEqual(t, len(functions), mostFunctions, "%s: functions", tb.heading)
	}
	assert.Equal(t, 3, routes, "PV, HVM, QEMU")
}
