package linux_test

import (
	"errors"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/kerneltest"
	"github.com/vmprobes/vmprobes/internal/x86"
	"github.com/vmprobes/vmprobes/linux"
	"github.com/vmprobes/vmprobes/paging"
)

func TestReturnable(t *testing.T) {
	s := returning()
	k := discover(t, s)
	fn := kerneltest.Fn
	for addr, want := range map[uint64]error{
		fn(600): nil, fn(601): nil, s.Sym["text demo"]: nil,
		fn(603): nil, fn(608): nil, fn(624): nil, // where they return isn't known
		fn(604): linux.ErrNeverReturns, fn(607): linux.ErrNeverReturns, fn(615): linux.ErrNeverReturns,
		fn(600) + 1: linux.ErrNotEntry, 1: linux.ErrNotEntry, s.Sym["init_task"]: linux.ErrNotEntry,
		s.Sym["__switch_to_asm"]:               linux.ErrStackSwitch,
		s.Sym["__x86_return_thunk"]:            linux.ErrStackSwitch,
		s.Sym["__x86_indirect_thunk_rax"]:      linux.ErrStackSwitch,
		s.Sym["__pi___x86_indirect_thunk_rbx"]: linux.ErrStackSwitch,
		s.Sym["return_to_handler"]:             linux.ErrStackSwitch,
	} {
		require.ErrorIs(t, k.Returnable(addr), want, "%#x", addr)
	}
}

func TestReturnAt(t *testing.T) {
	s := returning()
	k := discover(t, s)
	fn, demo := kerneltest.Fn, s.Sym["text demo"]
	copy(s.Bytes(fn(640)), []byte{0x48, 0x89, 0xc3, 0x90})
	for _, c := range []struct {
		ret  uint64
		want []uint64
		why  string
	}{
		{fn(640) + 3, []uint64{fn(640) + 3}, ""},
		{fn(640) + 1, nil, "not an instruction boundary"},
		{fn(300), []uint64{fn(300) + 5, fn(300) + 15}, ""}, // a jump label
		{fn(301), []uint64{fn(301) + 2, fn(301) + 15}, ""}, // a short one
		{fn(300) + 1, nil, "jump label"},
		{fn(460) + 8, []uint64{fn(460) + 13, fn(460) + 5}, ""},
		{fn(430) + 5, []uint64{fn(430) + 10, fn(430) + 15}, ""},
		{fn(310), nil, "static call"},
		{fn(320), nil, "LOCK prefix"},
		{fn(330), nil, "may fault"},
		{fn(400), nil, "ftrace"},
		{fn(400) + 2, nil, "ftrace"},
		{fn(100), nil, "noinstr"},
		{fn(200), nil, "kprobe blacklist"},
		{fn(608) + 5, nil, "an int3 is there"},
		{fn(608) + 6, nil, "a breakpoint of the guest's own"},
		{fn(624), nil, "invalid instruction"},
		{s.Sym["init_task"], nil, "not in the text"},
		{0, nil, "not in the text"},
		{1<<64 - 1, nil, "not in the text"},
		{kerneltest.SyntheticUser, nil, "not in the text"},
		{demo + 0x10, []uint64{demo + 0x10}, ""},
		{demo + 0x120, nil, "static call"},
		{s.Sym["text unformed"], nil, "not in the text"},
	} {
		at, err := k.ReturnAt(c.ret, false)
		if c.why != "" {
			require.ErrorIs(t, err, linux.ErrNotProbeable, "%#x", c.ret)
			assert.ErrorContains(t, err, c.why)
			requirePrintable(t, err.Error())
			assert.Nil(t, at)
			continue
		}
		require.NoError(t, err, "%#x", c.ret)
		assert.Equal(t, c.want, at, "%#x", c.ret)
		for _, a := range at {
			require.NoError(t, k.Probeable(a))
		}
	}
	_, err := k.ReturnAt(fn(640)+1, false)
	require.ErrorIs(t, err, x86.ErrNotBoundary)

	// While the kernel rewrites it, and when it leads elsewhere than it should.
	for _, b := range [][]byte{{0xcc, 0x1f, 0x44, 0, 0}, {0xe9, 0, 1, 0, 0}, {0xc3}} {
		copy(s.Bytes(fn(300)), b)
		_, err = k.ReturnAt(fn(300), false)
		require.ErrorIs(t, err, linux.ErrNotProbeable)
		assert.ErrorContains(t, err, "at a jump label")
	}
	copy(s.Bytes(fn(300)), jump(0xe9, fn(300), fn(300)+15))
	at, err := k.ReturnAt(fn(300), false)
	require.NoError(t, err)
	assert.Equal(t, []uint64{fn(300) + 5, fn(300) + 15}, at)
	s.Bytes(fn(300) + 15)[0] = 0xcc
	_, err = k.ReturnAt(fn(300), false)
	require.ErrorContains(t, err, "is a jump label: ")

	// The exception table isn't known.
	s.Put32(s.Sym["module demo"]+kerneltest.ModuleExTable+8, 1<<31)
	_, err = k.ReturnAt(demo+0x10, false)
	require.ErrorIs(t, err, linux.ErrUnknownPlaces)
	// With force that is enough, but what is known to be rewritten is refused all the same.
	at, err = k.ReturnAt(demo+0x10, true)
	require.NoError(t, err)
	assert.Equal(t, []uint64{demo + 0x10}, at)
	_, err = k.ReturnAt(demo+0x120, true)
	require.ErrorContains(t, err, "static call")
	k = discover(t, kerneltest.NewSynthetic(kerneltest.Layout{NoData: true}))
	_, err = k.ReturnAt(fn(640), false)
	require.ErrorIs(t, err, linux.ErrUnknownPlaces)
}

func TestTrampoline(t *testing.T) {
	s := kerneltest.NewSynthetic(kerneltest.Layout{})
	k := discover(t, s)
	for _, name := range []string{"arch_rethook_trampoline", "return_to_handler"} {
		a := s.Sym[name]
		assert.True(t, k.Trampoline(a))
		assert.True(t, k.Trampoline(a+7))
		assert.True(t, k.Trampoline(a+0x1f))
	}
	assert.False(t, k.Trampoline(s.Sym["arch_rethook_trampoline"]-1))
	assert.False(t, k.Trampoline(s.Sym["__switch_to_asm"]))
	assert.False(t, k.Trampoline(0))
}

func TestTaskRef(t *testing.T) {
	for name, l := range layouts {
		t.Run(name, func(t *testing.T) {
			s := kerneltest.NewSynthetic(l)
			m := s.Machine()
			k, err := linux.Discover(t.Context(), m, nil)
			require.NoError(t, err)
			base, err := k.PerCPU(1)
			require.NoError(t, err)
			task, stack := s.Sym["task 40"], kerneltest.SyntheticStack(40)
			want := linux.TaskRef{Addr: task, PID: 40, TGID: 40, ID: 0x5eed5eed00002800, StackLow: stack, StackHigh: stack + 16<<10}
			ref, err := k.CurrentRef(base)
			require.NoError(t, err)
			assert.Equal(t, want, ref)
			alive := func(want bool) {
				t.Helper()
				ok, err := k.TaskAlive(ref)
				require.NoError(t, err)
				assert.Equal(t, want, ok)
			}
			alive(true)

			// A thread's PID changes when it executes another program.
			s.Put32(task+kerneltest.TaskPID, 39)
			alive(true)
			s.Put64(task+kerneltest.TaskCanary, 0x1234500)
			alive(false)
			s.Put64(task+kerneltest.TaskCanary, want.ID)
			s.Put64(task+kerneltest.TaskStack, 0)
			alive(false)
			s.Put64(task+kerneltest.TaskStack, stack)
			for state, is := range map[uint32]bool{0: true, 2: true, 0x402: true, 0x102: true, 0x80: false, 0x82: false} {
				s.Put32(task+kerneltest.TaskState, state)
				alive(is)
			}
			s.Put32(task+kerneltest.TaskState, 0x10) // EXIT_DEAD is of another field
			alive(true)

			// Without a canary it is the PID that counts.
			s.Put64(task+kerneltest.TaskCanary, 0)
			alive(false)
			ref, err = k.CurrentRef(base)
			require.NoError(t, err)
			assert.EqualValues(t, 39, ref.ID)
			alive(true)
			s.Put32(task+kerneltest.TaskPID, 40)
			alive(false)

			// Lies, and what can't be read.
			for _, bad := range []uint64{0x1000, 1<<64 - 4096} {
				s.Put64(task+kerneltest.TaskStack, bad)
				_, err = k.CurrentRef(base)
				require.ErrorIs(t, err, linux.ErrBadKernel)
			}
			_, err = k.TaskAlive(linux.TaskRef{Addr: 0xffffc90000000000})
			require.ErrorIs(t, err, paging.ErrNotMapped)
			_, err = k.TaskAlive(linux.TaskRef{Addr: 1<<64 - 1})
			require.Error(t, err)
			_, err = k.CurrentRef(0x10000)
			require.Error(t, err)
			s.Put64(task+kerneltest.TaskStack, stack)

			// It is asked at every hit.
			before := accesses(m)
			n := testing.AllocsPerRun(100, func() { _, err = k.CurrentRef(base) })
			require.NoError(t, err)
			assert.Less(t, n, 3.0, "none, but with the race detector, which drops buffers")
			assert.LessOrEqual(t, accesses(m)-before, uint64(101*4*5), "four words, each through four tables")
		})
	}
}

// TestTaskRefInferred has a kernel whose types lack most.
func TestTaskRefInferred(t *testing.T) {
	s := kerneltest.NewSynthetic(kerneltest.Layout{NoTypes: true})
	k := discover(t, s)
	base, err := k.PerCPU(0)
	require.NoError(t, err)
	ref, err := k.CurrentRef(base)
	require.NoError(t, err)
	assert.Equal(t, linux.TaskRef{Addr: s.Sym["task 0"]}, ref)
	ok, err := k.TaskAlive(ref)
	require.NoError(t, err)
	assert.True(t, ok)
	ref.ID = 1
	ok, err = k.TaskAlive(ref)
	require.NoError(t, err)
	assert.False(t, ok)
}

// TestSavedReturns follows the functions of a guest that has booted, where retpolines and
// returns are what its processor needs, and looks at its tasks.
func TestSavedReturns(t *testing.T) {
	k := saved(t)
	count := make(map[error]int)
	functions, err := k.Functions("*")
	require.NoError(t, err)
	n := 0
	for s := range functions {
		e, err := k.Exits(s.Addr)
		n++
		for _, kind := range []error{linux.ErrNeverReturns, linux.ErrNoExits, linux.ErrNotEntry} {
			if errors.Is(err, kind) {
				count[kind]++
			}
		}
		if err == nil && k.Returnable(s.Addr) == nil {
			require.NotEmpty(t, e.At, s.Name)
			require.NoError(t, k.Blacklisted(e.At[0]), s.Name)
		}
	}
	t.Logf("%d functions: %v", n, count)
	assert.Greater(t, n, 30000)
	assert.Less(t, count[linux.ErrNoExits], n/20)
	assert.Less(t, count[linux.ErrNeverReturns], n/50)

	for cpu := range 2 {
		base, err := k.PerCPU(cpu)
		require.NoError(t, err)
		cur, err := k.Current(base)
		require.NoError(t, err)
		ref, err := k.CurrentRef(base)
		require.NoError(t, err)
		assert.Equal(t, cur.Addr, ref.Addr)
		assert.Equal(t, cur.PID, ref.PID)
		assert.EqualValues(t, 16<<10, ref.StackHigh-ref.StackLow)
		assert.NotEqual(t, uint64(ref.PID), ref.ID)
		alive, err := k.TaskAlive(ref)
		require.NoError(t, err)
		assert.True(t, alive)
		ref.ID++
		alive, err = k.TaskAlive(ref)
		require.NoError(t, err)
		assert.False(t, alive)
	}
}
