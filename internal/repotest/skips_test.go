package repotest

import (
	"go/ast"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// No test is skipped by every target: each call of Skip is in skips.txt, with a
// target of the Makefile that runs the test.
func TestSkips(t *testing.T) {
	found := map[string]int{}
	for _, s := range sources(t) {
		if _, others := s.imports(); s.pkg == "internal/repotest" || !slices.Contains(others, "testing") {
			continue
		}
		for _, d := range s.file.Decls {
			fn, ok := d.(*ast.FuncDecl)
			if !ok {
				continue
			}
			ast.Inspect(fn, func(n ast.Node) bool {
				call, ok := n.(*ast.CallExpr)
				if !ok {
					return true
				}
				sel, ok := call.Fun.(*ast.SelectorExpr)
				if !ok || !slices.Contains([]string{"Skip", "Skipf", "SkipNow"}, sel.Sel.Name) {
					return true
				}
				if x, ok := sel.X.(*ast.Ident); ok && x.Name == "kerneltest" {
					return true // whose own Skip is in the list
				}
				found[s.path+" | "+fn.Name.Name]++
				return true
			})
		}
	}
	require.NotEmpty(t, found)

	makefile, targets := recipes(t)
	ci := read(t, ".ci/run")
	listed := map[string]int{}
	for line := range strings.Lines(read(t, "internal/repotest/skips.txt")) {
		if line = strings.TrimSpace(line); line == "" || line[0] == '#' {
			continue
		}
		f := strings.Split(line, " | ")
		require.Len(t, f, 5, line)
		listed[f[0]+" | "+f[1]]++
		target, strict := f[2], f[3]
		recipe, ok := targets[target]
		if !assert.True(t, ok, "%s: the Makefile has no target %s", line, target) || strict == "–" {
			continue
		}
		// The variable is set where the target is run, by it or by a script of its own …
		for _, script := range regexp.MustCompile(`tools/\w+`).FindAllString(recipe, -1) {
			recipe += read(t, script)
		}
		if strings.Contains(recipe, "$(IN_LAB)") {
			assert.True(t, strings.Contains(makefile, "IN_LAB = "+strict+"=$("+strict+") "), line)
			recipe += ci
		}
		assert.True(t, strings.Contains(recipe, strict+"=1"), "%s: %s doesn't set %s", line, target, strict)
		// … and where the test looks at it.
		text := read(t, f[0])
		assert.True(t, strings.Contains(text, strict) || strings.Contains(text, "RequireEnv") || strings.Contains(text, "lack(t,"), "%s: nothing there looks at %s", line, strict)
	}
	for what, n := range found {
		if listed[what] != n {
			t.Errorf("%s: %d calls of Skip, %d lines in skips.txt: which target runs the test all the same?", what, n, listed[what])
		}
	}
	for what := range listed {
		if found[what] == 0 {
			t.Errorf("skips.txt: %s: there is no Skip", what)
		}
	}
}

// Each script and page that names a target of the Makefile names one that there is.
func TestTargetsNamed(t *testing.T) {
	_, targets := recipes(t)
	named := regexp.MustCompile("(?:^|[` ;])make ([a-z][a-z-]*)(?:[` ;,.:)]|$)")
	pages := []string{"README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", ".ci/run", "lab/README.md"}
	more, err := filepath.Glob(filepath.Join(root, "docs", "*.md"))
	require.NoError(t, err)
	for _, p := range more {
		pages = append(pages, "docs/"+filepath.Base(p))
	}
	n := 0
	for _, p := range pages {
		inCode := false
		for line := range strings.Lines(read(t, p)) {
			if strings.HasPrefix(strings.TrimSpace(line), "```") {
				inCode = !inCode
			}
			// Prose says "make" too: only what is set as code counts there.
			code := inCode || strings.HasPrefix(line, "    ") || !strings.HasSuffix(p, ".md")
			for _, m := range named.FindAllStringSubmatch(line, -1) {
				if strings.HasSuffix(m[1], "defconfig") {
					continue // Xen's
				}
				if code || strings.Contains(m[0], "`") {
					n++
					assert.NotEmpty(t, targets[m[1]], "%s: there is no target of make %s", p, m[1])
				}
			}
		}
	}
	assert.Greater(t, n, 20)
	for _, name := range regexp.MustCompile(`(?m)^\t@echo 'make ([a-z-]+)`).FindAllStringSubmatch(read(t, "Makefile"), -1) {
		assert.NotEmpty(t, targets[name[1]], "make help: %s", name[1])
	}
}

// recipes returns the Makefile, and its targets with their recipes and what they need
// first.
func recipes(t *testing.T) (text string, targets map[string]string) {
	t.Helper()
	text = read(t, "Makefile")
	targets = map[string]string{}
	rule := regexp.MustCompile(`^([a-z][a-z -]*):(?:$|[^=])`)
	var now []string
	for line := range strings.Lines(text) {
		if m := rule.FindStringSubmatch(line); m != nil {
			now = strings.Fields(m[1])
		} else if line[0] != '\t' {
			now = nil
		}
		for _, name := range now {
			targets[name] += line
		}
	}
	require.Greater(t, len(targets), 15)
	return text, targets
}

func read(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(root, filepath.FromSlash(name)))
	require.NoError(t, err)
	return string(b)
}
