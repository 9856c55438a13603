package linux_test

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/kerneltest"
	"github.com/vmprobes/vmprobes/ktype"
	"github.com/vmprobes/vmprobes/linux"
	"github.com/vmprobes/vmprobes/paging"
)

func TestInjectable(t *testing.T) {
	errno := func(n int64) uint64 { return uint64(-n) }
	values := []uint64{0, 1, 2, errno(1), errno(14), errno(4095), errno(4096), 0xfffffff2}
	for name, l := range map[string]kerneltest.Layout{
		"new": {ErrorInjection: true}, "old": {ErrorInjection: true, OldInjection: true},
		"no types": {ErrorInjection: true, NoTypes: true},
	} {
		t.Run(name, func(t *testing.T) {
			s := kerneltest.NewSynthetic(l)
			k := discover(t, s)
			fn := kerneltest.Fn
			for addr, good := range map[uint64][]bool{ // of values
				fn(700):                   {true, false, false, false, false, false, false, false},
				fn(701):                   {false, false, false, true, true, true, false, false},
				fn(702):                   {true, false, false, true, true, true, false, false},
				fn(703):                   {false, true, false, false, false, false, false, false},
				s.Sym["__x64_sys_getpid"]: {false, false, false, true, true, true, false, false},
			} {
				for i, v := range values {
					err := k.Injectable(addr, v)
					if good[i] {
						require.NoError(t, err, "%#x: %#x", addr, v)
						continue
					}
					require.ErrorIs(t, err, linux.ErrReturnValue, "%#x: %#x", addr, v)
					require.NotErrorIs(t, err, linux.ErrNotInjectable)
				}
			}
			for _, addr := range []uint64{fn(704), fn(705), fn(701) + 4, 0, s.Sym["__x64_sys_openat"]} {
				err := k.Injectable(addr, errno(1))
				require.ErrorIs(t, err, linux.ErrNotInjectable, "%#x", addr)
				require.NotErrorIs(t, err, linux.ErrNoErrorInjection)
			}
			require.ErrorContains(t, k.Injectable(fn(704), 0), "isn't known")

			// Without a system call among them nothing tells what the numbers mean.
			entry := s.Get64(s.Sym["error_injection_list"] + 8)
			s.Put64(entry+16, fn(706))
			require.ErrorIs(t, k.Injectable(fn(701), errno(1)), linux.ErrNotInjectable)
			s.Put64(entry+16, s.Sym["__x64_sys_getpid"])
			require.NoError(t, k.Injectable(fn(701), errno(1)))

			// Lists that aren't.
			first := s.Sym["injectable 0"]
			next := s.Get64(first)
			s.Put64(first, first)
			err := k.Injectable(fn(701), errno(1))
			require.ErrorIs(t, err, linux.ErrNotInjectable)
			require.ErrorIs(t, err, ktype.ErrListCycle)
			s.Put64(first, 0xffffc90000000000)
			require.ErrorIs(t, k.Injectable(fn(701), errno(1)), paging.ErrNotMapped)
			s.Put64(first, next)
			require.NoError(t, k.Injectable(fn(701), errno(1)))
		})
	}
	k := discover(t, kerneltest.NewSynthetic(kerneltest.Layout{}))
	err := k.Injectable(kerneltest.Fn(701), 0)
	require.ErrorIs(t, err, linux.ErrNoErrorInjection)
	require.ErrorIs(t, err, linux.ErrNotInjectable)
	k = discover(t, kerneltest.NewSynthetic(kerneltest.Layout{ErrorInjection: true, NoData: true}))
	err = k.Injectable(kerneltest.Fn(701), 0)
	require.ErrorIs(t, err, linux.ErrNotInjectable)
	assert.NotErrorIs(t, err, linux.ErrNoErrorInjection, "it has one, of which nothing is known")
}
