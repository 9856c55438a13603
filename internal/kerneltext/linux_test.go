//go:build linux

package kerneltext_test

import (
	"bytes"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/kerneltest"
	"github.com/vmprobes/vmprobes/internal/kerneltext"
	"github.com/vmprobes/vmprobes/internal/qemutest"
	"github.com/vmprobes/vmprobes/internal/target"
	"github.com/vmprobes/vmprobes/linux"
)

// TestRunning: nothing in the text of a kernel that runs in QEMU is taken for a breakpoint:
// with what it does about its processor's flaws and without, idle, tracing, and with
// kprobes of its own.
func TestRunning(t *testing.T) {
	if testing.Short() {
		t.Skip("boots guests: takes a minute")
	}
	for _, series := range serieses {
		for name, args := range map[string]string{"mitigations=off": "", "mitigations=auto": "mitigations=auto", "retpoline": "mitigations=auto spectre_v2=retpoline retbleed=off"} {
			t.Run(series+" "+name, func(t *testing.T) {
				// A kernel for several CPUs, of which one is online: QEMU 7.2's TCG isn't up to
				// code that is rewritten while another vCPU executes it.
				vm := qemutest.StartLinux(t, series, qemutest.Config{VCPUs: 2, Append: args + " maxcpus=1"})
				f, err := kerneltext.Read(bytes.NewReader(kerneltest.File(t, series, "vmlinux")))
				require.NoError(t, err)
				g, err := target.Open(t.Context(), "qemu:"+vm.GDB)
				require.NoError(t, err)
				defer g.Close()
				k, err := linux.Discover(t.Context(), g, nil)
				require.NoError(t, err)
				check := func(when string) {
					t.Helper()
					if z, ok := g.(target.Freezer); assert.True(t, ok) {
						require.NoError(t, z.Freeze())
						defer func() { assert.NoError(t, z.Thaw()) }()
					}
					began := time.Now()
					r, err := kerneltext.Compare(t.Context(), k, f)
					require.NoError(t, err)
					none(t, r)
					t.Logf("%s: %d bytes of text, %d int3s of the guest's own, none taken for a breakpoint, in %v", when, r.Text, len(r.Own), time.Since(began).Round(time.Millisecond))
				}
				check("idle")
				vm.Must("event sched on")
				check("with events on")
				vm.Must("ftrace do_sys_openat2")
				check("traced")
				vm.Must("ftrace off")
				vm.Must("busy 0 all")
				check("busy")
				vm.Must("stop")
			})
		}
	}
}
