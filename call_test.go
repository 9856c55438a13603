package vmprobes

import (
	"errors"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/kerneltest"
)

// TestCall describes calls in a guest that writes escape sequences wherever it can.
func TestCall(t *testing.T) {
	guest := kerneltest.NewSynthetic(kerneltest.Layout{})
	page := guest.Sym["text demo"] + 0x800 // of no use
	name, regs, long := page, page+0x40, page+0x100
	copy(guest.Bytes(name), "/etc/\x1b]0;me\a\xff\"\x00")
	copy(guest.Bytes(long), strings.Repeat("x", 256)+"\x00")
	guest.Put64(regs+112, 1<<64-100)
	guest.Put64(regs+104, name)
	guest.Put64(regs+96, 2)
	guest.Put64(regs+40, 0xdead_ffff_ff9c) // as a 32-bit program has them
	guest.Put64(regs+88, 1<<63|0x1000)
	// The name of the first argument, as the guest has it, now.
	args := guest.Get64(guest.Sym["__syscall_meta__openat"] + 24)
	copy(guest.Bytes(guest.Get64(args)), "\x1bfd\x00")

	s := lookedAt(t, guest, Options{})
	at := func(symbol string) *Probe {
		addr, err := s.resolve(&Probe{Symbol: symbol})
		require.NoError(t, err)
		return &Probe{Symbol: symbol, session: s, addr: addr}
	}
	const quoted = `"/etc/\x1b]0;me\a\xff\""`
	r := &Regs{DI: name, SI: 0x1000, DX: 1<<64 - 1, CX: 4, R8: 5, R9: 6, mem: s.kernel.Read}
	p := at("fn_0700")
	c, err := p.Call(r)
	require.NoError(t, err)
	assert.Equal(t, Call{Function: "fn_0700", Args: []CallArg{
		{Name: "name", Type: "const char *", Value: name, Text: quoted},
		{Name: "buf", Type: "const char *", Value: 0x1000, Text: "0x1000"},
		{Name: "n", Type: "int", Value: 1<<64 - 1, Text: "-1"},
		{Type: "int", Value: 4, Text: "4"}, {Type: "int", Value: 5, Text: "5"}, {Type: "int", Value: 6, Text: "6"},
	}}, c)
	assert.Equal(t, `fn_0700(name=`+quoted+`, buf=0x1000, n=-1, 4, 5, 6)`, c.String())

	// The prototype is kept; the values are each call's own.
	for value, want := range map[uint64]string{0: "NULL", 0x1000: "0x1000", long: hex(long)} {
		r.DI = value
		c, err = p.Call(r)
		require.NoError(t, err)
		assert.Equal(t, want, c.Args[0].Text, "no string, or one that is too long")
		assert.Equal(t, value, c.Args[0].Value)
	}

	// Structs take two registers, or none.
	structs := Regs{DI: 10, SI: 11, DX: 12, CX: 13, R8: 14, R9: 15, mem: s.kernel.Read}
	c, err = at("fn_0702").Call(&structs)
	require.NoError(t, err)
	assert.Equal(t, "fn_0702(a=10, two=0xb, also_two=0xd, last=15)", c.String())

	wrapper := at("sys_openat")
	r.DI = regs
	c, err = wrapper.Call(r)
	require.NoError(t, err)
	assert.Equal(t, Call{Function: "__x64_sys_openat", Syscall: "openat", Args: []CallArg{
		{Name: "?fd", Type: "int", Value: 1<<64 - 100, Text: "-100"},
		{Name: "filename", Type: "const char *", Value: name, Text: quoted},
		{Name: "flags", Type: "int", Value: 2, Text: "2"},
	}}, c)
	assert.Equal(t, `__x64_sys_openat(?fd=-100, filename=`+quoted+`, flags=2)`, c.String())

	// The same of a 32-bit program: other registers, of which half counts.
	for _, name := range []string{"__ia32_compat_sys_openat", "__ia32_sys_openat"} {
		c, err = at(name).Call(r)
		require.NoError(t, err)
		assert.Equal(t, "openat", c.Syscall)
		assert.Equal(t, name+"(?fd=-100, filename=0x1000, flags=2)", c.String())
		assert.EqualValues(t, 0xffff_ff9c, c.Args[0].Value)
	}

	// The caller's registers aren't there.
	r.DI = 0x1000
	c, err = wrapper.Call(r)
	require.NoError(t, err)
	assert.Equal(t, `__x64_sys_openat(?fd=?, filename=?, flags=?)`, c.String())
	require.Error(t, c.Args[0].Err)
	c, err = wrapper.Call(&Regs{DI: regs})
	require.NoError(t, err)
	require.ErrorIs(t, c.Args[0].Err, errNoHit)

	_, err = at("fn_0701").Call(r)
	require.ErrorIs(t, err, ErrNoPrototype)
	_, err = wrapper.Call(nil)
	require.ErrorIs(t, err, errNoHit)
	_, err = (&Probe{}).Call(r)
	require.ErrorIs(t, err, ErrNotRegistered)
	_, err = (*Probe)(nil).Call(r)
	require.ErrorIs(t, err, ErrNilProbe)

	none := lookedAt(t, kerneltest.NewSynthetic(kerneltest.Layout{NoSymbols: true}), Options{})
	_, err = (&Probe{session: none, addr: 1}).Call(r)
	require.ErrorIs(t, err, ErrNoPrototype)
	require.ErrorIs(t, err, ErrNoSymbols)
}

// TestTask reads the current task of a hit.
func TestTask(t *testing.T) {
	guest := kerneltest.NewSynthetic(kerneltest.Layout{})
	k := lookedAt(t, guest, Options{}).kernel
	base, err := k.PerCPU(1)
	require.NoError(t, err)
	mem := func(uint64, []byte) error { return errors.New("of no use here") }
	task, err := (&Regs{GSBase: base, kernel: k, mem: mem}).Task()
	require.NoError(t, err)
	assert.Equal(t, "daemon", task.Comm)
	assert.Equal(t, 40, task.PID)
	_, err = (&Regs{GSBase: base}).Task()
	require.ErrorIs(t, err, errNoHit)
	_, err = (&Regs{GSBase: base, mem: mem}).Task()
	require.ErrorIs(t, err, ErrNoKernel)
}

// TestNotBooted has a VM without a kernel: what is asked of it says so.
func TestNotBooted(t *testing.T) {
	guest := kerneltest.NewSynthetic(kerneltest.Layout{})
	clear(guest.RAM)
	s := lookedAt(t, guest, Options{})
	_, err := s.Guest().Linux().Processes(false)
	require.ErrorIs(t, err, ErrNoKernel)
	assert.ErrorContains(t, err, "has the guest booted?")
	_, err = s.Lookup("fn_0001")
	require.ErrorIs(t, err, ErrNoKernel)
	require.ErrorIs(t, s.Register(&Probe{Addr: 1}), ErrNoKernel)
	_, _, ok := s.Symbolize(1)
	assert.False(t, ok)
}
