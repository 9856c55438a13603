package linux_test

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/kerneltest"
	"github.com/vmprobes/vmprobes/linux"
	"github.com/vmprobes/vmprobes/sysmap"
)

// TestFunctionsNamed: functions of the kernel and of modules, whether they may be probed or not.
func TestFunctionsNamed(t *testing.T) {
	s := kerneltest.NewSynthetic(kerneltest.Layout{})
	k := discover(t, s)
	names := func(pattern string) (all []string) {
		syms, err := k.FunctionsNamed(pattern)
		require.NoError(t, err, pattern)
		last := uint64(0)
		for _, sym := range syms {
			require.Greater(t, sym.Addr, last)
			last = sym.Addr
			all = append(all, sym.Module+":"+sym.Name)
		}
		return all
	}
	assert.Equal(t, []string{":fn_0200", ":fn_0201"}, names("fn_020[01]"), "one is on the blacklist")
	assert.Equal(t, []string{":fn_0450"}, names("fn_0450*"), "its .cold part is none")
	assert.Equal(t, []string{":fn_0540"}, names("*fn_0540"), "nor is the padding before it")
	assert.Equal(t, []string{"demo:demo_init", "demo:demo_run", "demo:demo_traced"}, names("demo:*"))
	assert.Equal(t, []string{"older:older_run"}, names("older:*_run"))
	assert.Equal(t, []string{":fn_0200.part.0"}, names("fn_0200.part*"))
	for _, none := range []string{"no_such_*", "", "init_task", "_stext", "nodemo:*", "demo:fn_*", "unformed:*", "part:fn_*"} {
		_, err := k.FunctionsNamed(none)
		require.ErrorIs(t, err, sysmap.ErrNotFound, none)
	}
	_, err := k.FunctionsNamed("fn_[")
	require.Error(t, err)
	require.NotErrorIs(t, err, sysmap.ErrNotFound)
	_, err = (*linux.Kernel)(nil).FunctionsNamed("*")
	require.ErrorIs(t, err, linux.ErrNoKernel)
}

// TestTellsTasks: what tells the task of a vCPU is known before there is one.
func TestTellsTasks(t *testing.T) {
	k := discover(t, kerneltest.NewSynthetic(kerneltest.Layout{}))
	require.NoError(t, k.TellsTasks(false))
	require.NoError(t, k.TellsTasks(true))
	k = discover(t, kerneltest.NewSynthetic(kerneltest.Layout{NoTypes: true, NoData: true}))
	require.Error(t, k.TellsTasks(false))
	require.ErrorIs(t, (*linux.Kernel)(nil).TellsTasks(false), linux.ErrNoKernel)
}
