package examples_test

import (
	"encoding/binary"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/qemutest"
)

// TestFreeze dumps the memory of a VM that counts: with -freeze it stands still until all
// is written, and runs again whatever ends the program. It is reached by TCP, where a
// dump takes some seconds.
func TestFreeze(t *testing.T) {
	qemutest.Binary(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	addr := l.Addr().String()
	require.NoError(t, l.Close())
	vm := qemutest.Start(t, qemutest.Config{NoGDB: true, Args: []string{"-gdb", "tcp:" + addr}})
	cpu := vm.CPU(0)
	cpu.Call(0, 1<<40)
	t.Cleanup(cpu.Stop)
	counts := func() bool {
		before := cpu.Count()
		time.Sleep(20 * time.Millisecond)
		return cpu.Count() != before
	}
	require.Eventually(t, counts, time.Minute, time.Millisecond)
	file := filepath.Join(t.TempDir(), "memory")
	program := filepath.Join(programs, "dump-memory")
	// start starts a dump, and returns when the VM stands still.
	start := func() *exec.Cmd {
		cmd := exec.Command(program, "-freeze", "qemu:"+addr, file)
		var errs qemutest.Buffer
		cmd.Stderr = &errs
		require.NoError(t, cmd.Start())
		t.Cleanup(func() { t.Log(errs.String()) })
		require.Eventually(t, func() bool {
			st, err := os.Stat(file) // it is written once a page isn't zeros
			return err == nil && st.Size() > 1<<20 && !counts()
		}, time.Minute, time.Millisecond)
		return cmd
	}
	for _, sig := range []os.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT} {
		cmd := start()
		require.NoError(t, cmd.Process.Signal(syscall.SIGTSTP), "which is ignored")
		require.NoError(t, cmd.Process.Signal(sig))
		require.Error(t, cmd.Wait())
		assert.Equal(t, 1, cmd.ProcessState.ExitCode(), sig)
		assert.Equal(t, "running", vm.Status())
		require.Eventually(t, counts, time.Minute, time.Millisecond, sig)
		require.NoError(t, os.Remove(file))
	}

	cmd := start()
	want := cpu.Count()
	require.NoError(t, cmd.Wait())
	require.Eventually(t, counts, time.Minute, time.Millisecond)
	saved, err := os.ReadFile(file)
	require.NoError(t, err)
	assert.Equal(t, want, binary.LittleEndian.Uint64(saved[cpu.CountAddr():]))
	r := run(t, nil, program, "-freeze", "qemu:"+addr, file)
	assert.Zero(t, r.status)
	assert.Contains(t, r.stderr, "of one moment: the guest stood still for ")
	r = run(t, nil, program, "qemu:"+addr, file)
	assert.Zero(t, r.status)
	assert.Contains(t, r.stderr, "not of one moment: the guest ran meanwhile")
}
