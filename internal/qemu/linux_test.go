//go:build linux

package qemu_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/qemu"
	"github.com/vmprobes/vmprobes/internal/qemutest"
)

// fileName reads the string that the second argument of do_sys_openat2 points to.
func fileName(d *qemu.Driver, c *breakpoint.Context) (string, error) {
	var b [32]byte
	if _, err := d.Read(c.Regs.CR3, c.Regs.SI, b[:]); err != nil {
		return "", err
	}
	for i, ch := range b {
		if ch == 0 {
			return string(b[:i]), nil
		}
	}
	return string(b[:]), nil
}

// TestLinux counts the guest's openat calls to the last one, with 1 and 2 vCPUs,
// at a NOP and behind it, and reads the name of each file.
func TestLinux(t *testing.T) {
	for _, test := range []struct {
		series string
		vcpus  int
		args   string
		direct bool
	}{
		{"6.1", 1, "", false},
		{"6.1", 2, "nokaslr", true},
		{"6.12", 2, "", false},
	} {
		if testing.Short() && test.series != "6.1" {
			continue
		}
		t.Run(fmt.Sprintf("%s/%d/%s", test.series, test.vcpus, test.args), func(t *testing.T) {
			guest := qemutest.StartLinux(t, test.series, qemutest.Config{VCPUs: test.vcpus, Append: test.args})
			addr := guest.Symbol("do_sys_openat2")
			opts := new(qemu.Options)
			if test.direct {
				opts.RAM = guest.RAM
			}
			vm, err := qemu.Dial(t.Context(), "qemu:"+guest.GDB, opts)
			require.NoError(t, err)
			defer vm.Close()
			t.Logf("%s: %+v", guest.Ready, vm.Info())
			cpus, err := vm.CPUs()
			require.NoError(t, err)
			for _, c := range cpus {
				assert.Equal(t, uint64(0xfffffe0000000000), c.IDT, "Linux maps the IDT at the start of cpu_entry_area")
				assert.NotZero(t, c.CR3)
				assert.NotZero(t, c.EFER&0x400, "long mode")
			}
			d, err := vm.Attach(t.Context())
			require.NoError(t, err)
			require.NoError(t, d.SetIdentity(guest.Symbol("linux_banner"), []byte("Linux version "+test.series)))
			e := breakpoint.New(d, breakpoint.Config{})
			defer func() { require.NoError(t, e.Close()) }()

			hits, named := 0, 0
			pre := func(c *breakpoint.Context) breakpoint.Verdict {
				hits++
				if name, err := fileName(d, c); err == nil && name == "/lab-probe-target" {
					named++
				}
				return breakpoint.Continue
			}
			// The function's first instruction is the NOP of ftrace; a push follows.
			code := make([]byte, 16)
			_, err = d.Read(0, addr, code)
			require.NoError(t, err)
			t.Logf("code: % x", code)
			for _, at := range []uint64{addr, addr + 5} {
				p := &breakpoint.Probe{Addr: at, Pre: pre}
				require.NoError(t, e.Register(p))
				stop := serve(e)
				hits, named = 0, 0
				packets, begin := vm.Packets(), time.Now()
				n := 40
				reply := qemutest.Counts(guest.Must(fmt.Sprintf("open %d all", n)))
				took := time.Since(begin)
				packets = vm.Packets() - packets
				require.NoError(t, stop())
				require.NoError(t, e.Unregister(p))
				assert.Equal(t, n*test.vcpus, reply["total"])
				assert.Equal(t, reply["total"], hits)
				assert.Equal(t, hits, named)
				t.Logf("offset %d: %d hits, %.1f packets a hit with the name, %.0f hits/s", at-addr, hits,
					float64(packets)/float64(hits), float64(hits)/took.Seconds())
			}
			t.Logf("%+v", e.Stats())
			require.NoError(t, e.Close())
			require.NoError(t, vm.Close())
			require.Equal(t, "running", guest.Status())
			reply := guest.Must("open 100 all")
			assert.Contains(t, reply, "mem=ok")
			assert.NotContains(t, reply, "BAD")
			assert.Equal(t, 0, qemutest.Counts(guest.Must("dmesg"))["bad"])
		})
	}
}
