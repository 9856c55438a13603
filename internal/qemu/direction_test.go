package qemu

import (
	"context"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
)

// TestOneDirection: the Driver uses the VM, and the VM knows nothing of it; and each
// has its fields for itself.
func TestOneDirection(t *testing.T) {
	entries, err := os.ReadDir(".")
	require.NoError(t, err)
	fset := token.NewFileSet()
	checked := 0
	for _, e := range entries {
		if !strings.HasSuffix(e.Name(), ".go") || strings.HasSuffix(e.Name(), "_test.go") {
			continue
		}
		file, err := parser.ParseFile(fset, e.Name(), nil, parser.SkipObjectResolution)
		require.NoError(t, err)
		for _, decl := range file.Decls {
			var owner string
			switch d := decl.(type) {
			case *ast.FuncDecl:
				if d.Recv == nil || d.Name.Name == "Attach" { // which makes a Driver
					continue
				}
				if star, ok := d.Recv.List[0].Type.(*ast.StarExpr); ok {
					owner = star.X.(*ast.Ident).Name
				}
			case *ast.GenDecl:
				if s, ok := d.Specs[0].(*ast.TypeSpec); ok {
					owner = s.Name.Name
				}
			}
			if owner != "VM" && owner != "Driver" {
				continue
			}
			checked++
			ast.Inspect(decl, func(n ast.Node) bool {
				var changed []ast.Expr
				switch n := n.(type) {
				case *ast.Ident:
					if owner == "VM" {
						assert.NotContains(t, []string{"Driver", "point", "underway"}, n.Name, "%v", fset.Position(n.Pos()))
					}
				case *ast.AssignStmt:
					changed = n.Lhs
				case *ast.IncDecStmt:
					changed = []ast.Expr{n.X}
				}
				for _, x := range changed {
					if ix, ok := x.(*ast.IndexExpr); ok {
						x = ix.X
					}
					path := "." + selectors(x)
					assert.False(t, owner == "Driver" && (strings.HasPrefix(path, ".v.") || strings.Contains(path, ".vm.")),
						"%v: %s is the VM's", fset.Position(x.Pos()), path)
				}
				return true
			})
		}
	}
	assert.Greater(t, checked, 80)
}

// selectors returns an expression such as d.vm.mu as text, "" if it is another one.
func selectors(x ast.Expr) string {
	switch x := x.(type) {
	case *ast.Ident:
		return x.Name
	case *ast.SelectorExpr:
		return selectors(x.X) + "." + x.Sel.Name
	}
	return ""
}

// TestTrapWhileHeld: a vCPU hits while somebody else than the driver holds the VM, and
// while nobody waits. The hit is there for the next Wait, and the VM stands still until
// its answer.
func TestTrapWhileHeld(t *testing.T) {
	f := newFake()
	vm, d := attachFake(t, f)
	armFake(t, d)
	for !f.state() {
		time.Sleep(time.Millisecond)
	}
	f.mu.Lock()
	f.trapped = true // the vCPU is at the breakpoint when the interrupt comes
	f.mu.Unlock()
	require.NoError(t, vm.Freeze())
	f.mu.Lock()
	f.trapped = false
	f.mu.Unlock()
	cpus, err := vm.CPUs() // chooses threads, and chooses back
	require.NoError(t, err)
	require.Len(t, cpus, 1)
	require.NoError(t, vm.Thaw())
	time.Sleep(2 * watchEvery)
	require.False(t, f.state(), "nobody has answered")
	var s breakpoint.Stop
	require.NoError(t, d.Wait(t.Context(), &s))
	require.Equal(t, breakpoint.Hit, s.Reason)
	require.Equal(t, uint64(fakeText), s.Regs.IP)
	s.Regs.IP += 5
	require.NoError(t, d.Resume(&s))
	require.Eventually(t, f.state, time.Second, time.Millisecond)
}

// TestTrapBeforeRemoval: a vCPU that a breakpoint has stopped is still reported when
// the breakpoint is removed, whoever has stopped the VM.
func TestTrapBeforeRemoval(t *testing.T) {
	f := newFake()
	vm, d := attachFake(t, f)
	armFake(t, d)
	for !f.state() {
		time.Sleep(time.Millisecond)
	}
	f.mu.Lock()
	f.trapped = true
	f.mu.Unlock()
	require.NoError(t, vm.Freeze())
	require.NoError(t, d.RemoveBreak(fakeText))
	assert.Zero(t, f.armed())
	require.NoError(t, vm.Thaw())
	var s breakpoint.Stop
	require.NoError(t, d.Wait(t.Context(), &s))
	require.Equal(t, breakpoint.Hit, s.Reason)
	require.NoError(t, d.Resume(&s))
	require.Eventually(t, f.state, time.Second, time.Millisecond)
}

// TestStrayTrap: a stop where no breakpoint is doesn't keep the VM stopped, although
// nobody waits for stops; nor does one that comes while the driver leaves.
func TestStrayTrap(t *testing.T) {
	f := newFake()
	vm, d := attachFake(t, f)
	for range 3 {
		require.Eventually(t, f.state, time.Second, time.Millisecond)
		f.stop("T05thread:p01.01;")
	}
	require.Eventually(t, f.state, time.Second, time.Millisecond)
	armFake(t, d)
	require.Eventually(t, f.state, time.Second, time.Millisecond)
	f.mu.Lock()
	f.trapped = true
	f.mu.Unlock()
	require.NoError(t, d.Close())
	require.Eventually(t, f.state, time.Second, time.Millisecond)
	require.ErrorIs(t, d.Wait(context.Background(), new(breakpoint.Stop)), ErrClosed)
	assert.Zero(t, f.armed())
	// The VM can have another driver.
	_, err := vm.Attach(t.Context())
	require.NoError(t, err)
}
