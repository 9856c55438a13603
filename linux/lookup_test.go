package linux_test

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/kerneltest"
	"github.com/vmprobes/vmprobes/sysmap"
)

func TestLookup(t *testing.T) {
	s := kerneltest.NewSynthetic(kerneltest.Layout{})
	k := discover(t, s)
	text := s.Sym["text demo"]
	for _, c := range []struct {
		asked   string
		addr    uint64
		name    string
		module  string
		syscall string
		note    string
	}{
		{"fn_0001", kerneltest.Fn(1), "fn_0001", "", "", ""},
		{"sys_openat", s.Sym["__x64_sys_openat"], "__x64_sys_openat", "", "openat",
			"this kernel has no sys_openat; __x64_sys_openat, the wrapper of the system call, is used: its one argument points to the caller's registers"},
		{"SyS_getpid", s.Sym["__x64_sys_getpid"], "__x64_sys_getpid", "", "getpid",
			"this kernel has no SyS_getpid; __x64_sys_getpid, the wrapper of the system call, is used: its one argument points to the caller's registers"},
		{"__x64_sys_openat", s.Sym["__x64_sys_openat"], "__x64_sys_openat", "", "openat", ""},
		{"demo_run", text + 0x10, "demo_run", "demo", "", ""},
		{"demo:demo_run", text + 0x10, "demo_run", "demo", "", ""},
		{"demo_run [demo]", text + 0x10, "demo_run", "demo", "", ""},
		{"demo:demo_run@1", text + 0x10, "demo_run", "demo", "", ""},
		{"fn_0001@1", kerneltest.Fn(1), "fn_0001", "", "", ""},
		{"part:fn_0001", kerneltest.Fn(1), "fn_0001", "", "", "part is no module of this kernel but a part of it; the kernel's own fn_0001 is used"},
	} {
		sym, err := k.Lookup(c.asked)
		if !assert.NoError(t, err, c.asked) {
			continue
		}
		assert.Equal(t, c.addr, sym.Addr, c.asked)
		assert.Equal(t, c.name, sym.Name, c.asked)
		assert.Equal(t, c.module, sym.Module, c.asked)
		assert.Equal(t, c.syscall, sym.Syscall, c.asked)
		assert.Equal(t, c.asked, sym.Asked)
		assert.Equal(t, c.note, sym.Note(), c.asked)
		found, off, ok := k.Find(sym.Addr + 1)
		require.True(t, ok)
		assert.Equal(t, c.name, found.Name)
		assert.Equal(t, c.module, found.Module)
		assert.EqualValues(t, 1, off)
	}
	for asked, why := range map[string]string{
		"fn_00O1":          "this kernel has fn_00",
		"sys_opemat":       "not found",
		"older:older_rum":  "this kernel has older_run",
		"demo:older_run":   "not found",
		"ext4:ext4_sync":   `no module "ext4" is loaded`,
		"ext4_sync [ext4]": `no module "ext4" is loaded`,
		"ext4:fn_0001":     `no module "ext4" is loaded, and the kernel itself has fn_0001`,
		"part:ext4_sync":   `no module "part" is loaded`,
		"fn_0001@2":        "1 address",
		"":                 "not found",
		":":                "not found",
		"@1":               "not found",
		" []":              "not found",
		"sys_":             "not found",
	} {
		sym, err := k.Lookup(asked)
		require.ErrorIs(t, err, sysmap.ErrNotFound, asked)
		assert.ErrorContains(t, err, why)
		assert.Zero(t, sym)
		requirePrintable(t, err.Error())
	}
	_, _, ok := k.Find(1)
	assert.False(t, ok)

	// Two modules with a symbol of one name.
	names := s.Get64(s.Sym["kallsyms older"] + 16)
	copy(s.Bytes(names+1), "demo_init\x00") // instead of older_init
	k = discover(t, s)
	_, err := k.Lookup("demo_init")
	require.ErrorIs(t, err, sysmap.ErrAmbiguous)
	assert.ErrorContains(t, err, "[older]")
	sym, err := k.Lookup("older:demo_init")
	require.NoError(t, err)
	assert.Equal(t, s.Sym["text older"], sym.Addr)
	sym, err = k.Lookup("demo_init@2")
	require.NoError(t, err)
	assert.Equal(t, "older", sym.Module)

	// Modules whose symbols can't be read don't hide the kernel's, and the error says so.
	k = discover(t, kerneltest.NewSynthetic(kerneltest.Layout{NoTypes: true}))
	_, err = k.Lookup("fn_0001")
	require.NoError(t, err)
	_, err = k.Lookup("demo:demo_run")
	require.ErrorIs(t, err, sysmap.ErrNotFound)
	assert.ErrorContains(t, err, "the symbols of modules are not known")
	_, _, ok = k.Find(text)
	assert.False(t, ok)
}

// An unloaded module is forgotten, and one that is loaded later is found.
func TestLookupUnloaded(t *testing.T) {
	s := kerneltest.NewSynthetic(kerneltest.Layout{})
	k := discover(t, s)
	_, err := k.Lookup("demo_run")
	require.NoError(t, err)
	m := s.Sym["module demo"] + kerneltest.ModuleList
	next, prev := s.Get64(m), s.Get64(m+8)
	s.Put64(prev, next)
	s.Put64(next+8, prev)
	_, err = k.Lookup("demo_run")
	require.ErrorIs(t, err, sysmap.ErrNotFound)
	_, err = k.Lookup("demo:demo_run")
	require.ErrorContains(t, err, `no module "demo" is loaded`)
	s.Put64(prev, m)
	s.Put64(next+8, m)
	_, err = k.Lookup("demo_run")
	require.NoError(t, err)
}
