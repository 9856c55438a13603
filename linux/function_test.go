package linux_test

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/kerneltest"
	"github.com/vmprobes/vmprobes/linux"
)

func TestFunction(t *testing.T) {
	s := kerneltest.NewSynthetic(kerneltest.Layout{})
	k := discover(t, s)
	f, err := k.Function(kerneltest.Fn(700))
	require.NoError(t, err)
	assert.Equal(t, "fn_0700", f.Symbol.Name)
	assert.Empty(t, f.Syscall)
	require.Len(t, f.Params, 6, "the seventh is on the stack")
	type param struct {
		name, typ string
		text      bool
		minus1    string
	}
	params := func(f *linux.Function) (all []param) {
		for _, p := range f.Params {
			all = append(all, param{p.Name, p.Type, p.Text, p.Format(1<<64 - 1)})
		}
		return all
	}
	assert.Equal(t, []param{
		{"name", "const char *", true, "0xffffffffffffffff"}, {"buf", "const char *", false, "0xffffffffffffffff"},
		{"n", "int", false, "-1"}, {"", "int", false, "-1"}, {"", "int", false, "-1"}, {"", "int", false, "-1"},
	}, params(f))

	// A struct of up to 16 bytes takes one or two registers, a larger one none, and so
	// does one that is too large for what is left (System V ABI for AMD64, 3.2.3).
	f, err = k.Function(kerneltest.Fn(702))
	require.NoError(t, err)
	regs := make(map[string]int)
	for _, p := range f.Params {
		regs[p.Name] = p.Reg
	}
	assert.Equal(t, map[string]int{"a": 0, "two": 1, "also_two": 3, "last": 5}, regs)

	f, err = k.Function(s.Sym["__x64_sys_openat"])
	require.NoError(t, err)
	assert.Equal(t, "openat", f.Syscall)
	assert.Equal(t, []param{{"dfd", "int", false, "-1"}, {"filename", "const char *", true, "0xffffffffffffffff"}, {"flags", "int", false, "-1"}}, params(f))
	f, err = k.Function(s.Sym["__x64_sys_getpid"])
	require.NoError(t, err)
	assert.Equal(t, "getpid", f.Syscall)
	assert.Empty(t, f.Params)

	// A module's function, by the module's types; one of a module without types.
	f, err = k.Function(s.Sym["text demo"] + 0x10)
	require.NoError(t, err)
	assert.Equal(t, "demo_run", f.Symbol.Name)
	assert.Equal(t, []param{{"howmany", "demo_t", false, "4294967295"}}, params(f))

	for _, addr := range []uint64{kerneltest.Fn(700) + 1, kerneltest.Fn(701), s.Sym["__x64_sys_undescribed"], s.Sym["text older"] + 0x10, 1} {
		_, err = k.Function(addr)
		require.ErrorIs(t, err, linux.ErrNoPrototype, "%#x", addr)
	}
	k = discover(t, kerneltest.NewSynthetic(kerneltest.Layout{NoTypes: true}))
	_, err = k.Function(kerneltest.Fn(700))
	require.ErrorIs(t, err, linux.ErrNoPrototype)

	// What a guest writes where names are to be: nothing for a terminal.
	names := s.Get64(s.Sym["__syscall_meta__openat"] + 24)
	copy(s.Bytes(s.Get64(names+8)), "\x1b[31m\n")
	types := s.Get64(s.Sym["__syscall_meta__openat"] + 16)
	copy(s.Bytes(s.Get64(types)), "\x1bc\x00")
	f, err = discover(t, s).Function(s.Sym["__x64_sys_openat"])
	require.NoError(t, err)
	assert.Equal(t, "?[31m?me", f.Params[1].Name)
	assert.Equal(t, "?c", f.Params[0].Type)
}

// TestSyscallArgOffset compares with the layout of struct pt_regs: r15, r14, r13, r12,
// bp, bx, r11, r10, r9, r8, ax, cx, dx, si, di, each of 8 bytes.
func TestSyscallArgOffset(t *testing.T) {
	order := []string{"r15", "r14", "r13", "r12", "bp", "bx", "r11", "r10", "r9", "r8", "ax", "cx", "dx", "si", "di"}
	for n, reg := range []string{"di", "si", "dx", "r10", "r8", "r9"} {
		off, ok := linux.SyscallArgOffset(n)
		require.True(t, ok)
		assert.Equal(t, reg, order[off/8])
		assert.Zero(t, off%8)
	}
	for _, n := range []int{-1, 6} {
		_, ok := linux.SyscallArgOffset(n)
		assert.False(t, ok)
	}
}

// TestWrapper tells the functions that system calls enter by their names, in kernels
// from 4.17 on (arch/x86/include/asm/syscall_wrapper.h).
func TestWrapper(t *testing.T) {
	for name, want := range map[string]linux.Wrapper{
		"__x64_sys_openat":         {Call: "openat"},
		"__ia32_sys_openat":        {Call: "openat", IA32: true},
		"__ia32_compat_sys_openat": {Call: "openat", IA32: true, Compat: true},
		"__x32_compat_sys_ioctl":   {Call: "ioctl", Compat: true},
		"__x64_compat_sys_ioctl":   {Call: "ioctl", Compat: true},
	} {
		w, ok := linux.WrapperOf(name)
		assert.True(t, ok, name)
		assert.Equal(t, want, w, name)
	}
	for _, name := range []string{"", "__x64_sys_", "__se_sys_openat", "__do_compat_sys_wait4", "sys_openat", "do_sys_openat2", "__pfx___x64_sys_openat"} {
		_, ok := linux.WrapperOf(name)
		assert.False(t, ok, name)
	}
	k := discover(t, kerneltest.NewSynthetic(kerneltest.Layout{}))
	sym, err := k.Lookup("__ia32_compat_sys_openat")
	require.NoError(t, err)
	assert.Equal(t, "openat", sym.Syscall)
	assert.Empty(t, sym.Note(), "it is what was asked for")
}

func TestIsText(t *testing.T) {
	for _, c := range []struct {
		typ, name string
		want      bool
	}{
		{"const char *", "filename", true},
		{"const char __user *", "pathname", true},
		{"const char*", "s", true},
		{"const char *", "buf", false},
		{"char *", "name", false},
		{"const char **", "argv", false},
		{"const char __user *", "u_buf", false},
		{"int", "fd", false},
	} {
		assert.Equal(t, c.want, linux.IsText(c.typ, c.name), "%s %s", c.typ, c.name)
	}
}
