package guardian

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// TestReaper is a program of TestNoChild: it waits for any child there is, all the time, as
// the first process of a container does.
func TestReaper(t *testing.T) {
	if os.Getenv("VMPROBES_TEST_REAPER") == "" {
		t.Skip("only as a child process of TestNoChild")
	}
	reaped := make(chan int, 10)
	go func() {
		for {
			switch child, err := syscall.Wait4(-1, nil, 0, nil); {
			case err == nil:
				reaped <- child
			case errors.Is(err, syscall.ECHILD):
				time.Sleep(time.Microsecond)
			}
		}
	}()
	require.NoError(t, Start(slog.New(slog.DiscardHandler)))
	time.Sleep(100 * time.Millisecond)
	for len(reaped) > 0 {
		require.NotEqual(t, pid, <-reaped)
	}
	_, err := syscall.Wait4(-1, nil, syscall.WNOHANG, nil)
	require.ErrorIs(t, err, syscall.ECHILD, "it has a child still")
	fmt.Println("guarded by", pid)
}

// TestNoChild: the guardian isn't a child of its process, whose program may wait for any
// child there is until there is none. Nor does it matter if that gets to know of the process
// that starts the guardian.
func TestNoChild(t *testing.T) {
	require.NoError(t, Start(slog.New(slog.DiscardHandler)))
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	require.NoError(t, err)
	fields := strings.Fields(string(b[strings.LastIndexByte(string(b), ')'):]))
	assert.NotEqual(t, fmt.Sprint(os.Getpid()), fields[2], "its parent (proc(5), field 4)")
	comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	require.NoError(t, err)
	assert.Equal(t, "vmprobes-guard\n", string(comm))
	for range 3 {
		cmd := exec.Command(os.Args[0], "-test.run=^TestReaper$", "-test.v")
		cmd.Env = append(os.Environ(), "VMPROBES_TEST_REAPER=1", soon)
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, "%s", out)
		require.Contains(t, string(out), "guarded by ", "%s", out)
	}
}
