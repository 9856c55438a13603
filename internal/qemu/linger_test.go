//go:build linux

package qemu_test

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/qemu"
	"github.com/vmprobes/vmprobes/internal/qemutest"
	"github.com/vmprobes/vmprobes/paging"
)

// TestLinger: who reads many pages through the stub doesn't stop the VM for each, and it
// runs on afterwards.
func TestLinger(t *testing.T) {
	guest := qemutest.Start(t, qemutest.Config{})
	cpus := []qemutest.CPU{guest.CPU(0)}
	cpus[0].Call(0, 1<<40)
	vm, err := qemu.Dial(t.Context(), "qemu:"+guest.GDB, nil)
	require.NoError(t, err)
	defer vm.Close()
	running(t, guest, cpus)
	const pages = 200
	before := vm.Packets()
	for f := range paging.Frame(pages) {
		page, release, err := vm.Page(f+0x1000, false)
		require.NoError(t, err)
		require.Len(t, page, paging.PageSize)
		release()
	}
	n := float64(vm.Packets()-before) / pages
	t.Logf("%.2f packets a page", n)
	assert.Less(t, n, 3.0, "two read it, one more lets the VM go on")
	running(t, guest, cpus)
	before = vm.Packets()
	running(t, guest, cpus)
	assert.Equal(t, before, vm.Packets(), "nobody reads")
}
