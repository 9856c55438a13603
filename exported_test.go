package vmprobes_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// unused says why an identifier is exported that nothing outside its package uses.
var unused = map[string]string{
	"Probe.LogValue":   "package slog calls it",
	"Error.Unwrap":     "package errors calls it",
	"vmprobes.Call":    "what Probe.Call returns; its users name no type",
	"vmprobes.CallArg": "an element of Call.Args; its users name no type",
	"Hit.MarshalJSON":  "package json calls it",
	"Regs.MarshalJSON": "package json calls it",

	"vmprobes.Op":             "the type of ArgFilter.Op; its users name constants",
	"vmprobes.Equal":          "the zero Op: an ArgFilter that names none compares for it",
	"vmprobes.NotEqual":       "a relation of ArgFilter.Op, like Greater, which an example uses",
	"vmprobes.Less":           "a relation of ArgFilter.Op, like Greater, which an example uses",
	"vmprobes.LessOrEqual":    "a relation of ArgFilter.Op, like Greater, which an example uses",
	"vmprobes.GreaterOrEqual": "a relation of ArgFilter.Op, like Greater, which an example uses",
	"vmprobes.Follow":         "the type of ReturnProbe.Follow; its users name constants",
	"vmprobes.FollowAuto":     "the zero Follow: a ReturnProbe that names none has it",
}

// TestExported: every exported identifier of the two packages that users begin with has a
// user outside of them: a program, a test as an outsider would write it, an example. Of
// errors it is enough that a test expects them.
func TestExported(t *testing.T) {
	stale := maps.Clone(unused)
	for _, dir := range []string{".", "xenaccess"} {
		outside, tests := sources(t, dir)
		for full, name := range exported(t, dir) {
			used := outside[full] || strings.HasPrefix(name, "Err") && tests[name]
			if _, method, ok := strings.Cut(full, "."); ok && full[0] < 'a' {
				used = outside["."+method]
			}
			_, reason := unused[full]
			assert.True(t, used != reason, "%s: either somebody outside package %s uses it (%v), or a sentence says why it is there (%v)", full, dir, used, reason)
			delete(stale, full)
		}
	}
	assert.Empty(t, stale, "these aren't there")
}

// sources returns what is used in the module's Go files that see of the package in dir
// only what is exported: "xenaccess.Name" of that package, and ".Name" of anything, also
// as the key of a literal. tests has the words of all tests.
func sources(t *testing.T, dir string) (outside, tests map[string]bool) {
	t.Helper()
	outside, tests = map[string]bool{}, map[string]bool{}
	external := regexp.MustCompile(`(?m)^package \w+_test$`)
	word := regexp.MustCompile(`(\w*)(\.?)\b(\w+)(:?)`)
	require.NoError(t, filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || path == "exported_test.go" {
			return err
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		isTest, sees := strings.HasSuffix(path, "_test.go"), filepath.Dir(path) == dir && !external.Match(b)
		for _, m := range word.FindAllSubmatch(b, -1) {
			if isTest {
				tests[string(m[3])] = true
			}
			if sees {
				continue
			}
			if len(m[2]) > 0 || len(m[4]) > 0 {
				outside["."+string(m[3])] = true
			}
			if string(m[1]) == "vmprobes" || string(m[1]) == "xenaccess" {
				outside[string(m[1])+"."+string(m[3])] = true
			}
		}
		return nil
	}))
	return outside, tests
}

// exported returns the exported identifiers of a package, with their last part.
func exported(t *testing.T, dir string) map[string]string {
	t.Helper()
	names := map[string]string{}
	files, err := filepath.Glob(filepath.Join(dir, "*.go"))
	require.NoError(t, err)
	for _, file := range files {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		f, err := parser.ParseFile(token.NewFileSet(), file, nil, 0)
		require.NoError(t, err)
		add := func(of string, id *ast.Ident) {
			if id.IsExported() {
				names[of+id.Name] = id.Name
			}
		}
		prefix := f.Name.Name + "."
		for _, d := range f.Decls {
			switch d := d.(type) {
			case *ast.FuncDecl:
				if d.Recv == nil {
					add(prefix, d.Name)
				} else if of := receiver(d.Recv.List[0].Type); ast.IsExported(of) {
					add(of+".", d.Name)
				}
			case *ast.GenDecl:
				for _, s := range d.Specs {
					switch s := s.(type) {
					case *ast.TypeSpec:
						add(prefix, s.Name)
						if st, ok := s.Type.(*ast.StructType); ok && s.Name.IsExported() {
							for _, field := range st.Fields.List {
								for _, id := range field.Names {
									add(s.Name.Name+".", id)
								}
							}
						}
					case *ast.ValueSpec:
						for _, id := range s.Names {
							add(prefix, id)
						}
					}
				}
			}
		}
	}
	return names
}

func receiver(e ast.Expr) string {
	if p, ok := e.(*ast.StarExpr); ok {
		e = p.X
	}
	if id, ok := e.(*ast.Ident); ok {
		return id.Name
	}
	return ""
}
