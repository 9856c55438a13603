package xen_test

import (
	"fmt"
	"syscall"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/xen"
	"github.com/vmprobes/vmprobes/internal/xentest"
	"github.com/vmprobes/vmprobes/paging"
	"github.com/vmprobes/vmprobes/xenctrl"
)

// TestAbsent: memory isn't there if all page tables say so. A breakpoint in it is given
// up then, as one in an unloaded module, which one of them that couldn't be read, or
// wasn't known, must not bring about.
func TestAbsent(t *testing.T) {
	failed := fmt.Errorf("map: %w", syscall.EAGAIN)
	absent := fmt.Errorf("walk: %w", paging.ErrNotMapped)
	reserved := fmt.Errorf("walk: %w", paging.ErrReserved)
	for name, c := range map[string]struct {
		known   error // that not all roots are
		answers [3]error
		want    error
	}{
		"the last one has it":         {nil, [3]error{absent, failed, nil}, nil},
		"the first one has it":        {failed, [3]error{nil, absent, absent}, nil},
		"none has it":                 {nil, [3]error{absent, absent, absent}, breakpoint.ErrNotMapped},
		"none has it, tables damaged": {nil, [3]error{absent, absent, reserved}, breakpoint.ErrFault},
		"the first can't be read":     {nil, [3]error{failed, absent, absent}, syscall.EAGAIN},
		"the last can't be read":      {nil, [3]error{absent, reserved, failed}, syscall.EAGAIN},
		"one isn't known":             {failed, [3]error{absent, absent, absent}, syscall.EAGAIN},
	} {
		roots := []paging.Root{0x1000, 0x2000, 0x3000}
		answers := map[paging.Root]error{}
		for i, r := range roots {
			answers[r] = c.answers[i]
		}
		err := xen.WithRoots(roots, c.known, answers)
		assert.ErrorIs(t, err, c.want, name)
		if c.want == syscall.EAGAIN {
			assert.NotErrorIs(t, err, breakpoint.ErrNotMapped, name)
		}
	}
	assert.ErrorIs(t, xen.WithRoots(nil, failed, nil), syscall.EAGAIN, "none is known")
}

// withoutKernel is a Xen whose guest's vCPUs have tables without anything in them.
type withoutKernel struct {
	xen.Hypervisor
	gone *bool
}

func (h withoutKernel) HVMCPU(v int) (xenctrl.HVMCPU, error) {
	c, err := h.Hypervisor.HVMCPU(v)
	if *h.gone {
		c.CR3 = 0x3ff000
	}
	return c, err
}

// TestAbsentSpare: a vCPU that isn't up has no tables, and none that could have the kernel: a
// guest with one can be left when the page of a breakpoint is gone.
func TestAbsentSpare(t *testing.T) {
	m := xentest.New(xentest.Config{Kind: xentest.HVM, VCPUs: 2, Seed: 3})
	m.Start()
	t.Cleanup(m.Stop)
	require.NoError(t, m.Quiesce(t.Context()))
	gone := false
	hv := spare{withoutKernel{m.Hypervisor(), &gone}, 1}
	d, err := xen.OpenMonitor(hv, xen.NewFrames(hv), xen.Config{})
	require.NoError(t, err)
	var b [1]byte
	_, err = d.Read(0, 0xffffffffc0ffe000, b[:])
	require.ErrorIs(t, err, breakpoint.ErrNotMapped)
	e := breakpoint.New(d, breakpoint.Config{Scratch: m.Scratch, MayFault: xentest.NoFaults})
	p := &breakpoint.Probe{Addr: m.Symbol("nop5")}
	require.NoError(t, e.Register(p))
	gone = true
	require.ErrorIs(t, e.Check(), breakpoint.ErrTextChanged)
	assert.False(t, p.Armed())
	require.ErrorIs(t, e.Close(), breakpoint.ErrTextChanged)
	assert.True(t, e.Left())
}

// TestRemovedOverlap: a vCPU at an instruction that is inside another one, as the ret of
// retbleed_return_thunk is (arch/x86/lib/retpoline.S), has not stopped in front of the latter.
func TestRemovedOverlap(t *testing.T) {
	m := xentest.New(xentest.Config{Kind: xentest.PV, GDBSX: true, VCPUs: 1, Seed: 3})
	at := m.Gaps()[0].VA
	m.Load(at, []byte{0xf6, 0xc3, 0xcc, 0x0f, 0xae, 0xe8})
	m.Goto(0, at+1)
	begins := map[uint64]int{at: 3, at + 3: 3}
	insn := func(addr uint64) ([]byte, bool) { return m.Peek(addr, begins[addr]), begins[addr] > 0 }
	removed, err := xen.Removed(m.Hypervisor(), insn, nil)
	require.NoError(t, err)
	assert.Equal(t, []breakpoint.LeftBreak{{Addr: at, Insn: []byte{0xf6, 0xc3, 0xcc}}}, removed, "nothing begins behind it")
	removed, err = xen.Removed(m.Hypervisor(), insn, removed)
	require.NoError(t, err)
	assert.Empty(t, removed, "that one is known")
	begins[at+1] = 1
	removed, err = xen.Removed(m.Hypervisor(), insn, nil)
	require.NoError(t, err)
	assert.Empty(t, removed)
}
