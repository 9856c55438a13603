package vmprobes_test

import (
	"bytes"
	"fmt"
	"regexp"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/kerneltest"
	"github.com/vmprobes/vmprobes/internal/qemutest"
	"github.com/vmprobes/vmprobes/internal/x86"
	"github.com/vmprobes/vmprobes/linux"
)

// unstarted is a machine with a kernel as its file has it.
type unstarted struct{ *kerneltest.Machine }

func (unstarted) Started() (bool, error) { return false, nil }

// TestQEMUBoot boots kernels, and compares each instruction of their text with the file:
// one that booting has rewritten is one at which no probe would have been allowed before.
func TestQEMUBoot(t *testing.T) {
	if testing.Short() {
		t.Skip("boots guests")
	}
	for _, c := range []struct {
		series, args string
		vcpus        int
	}{
		{"6.1", "", 1}, {"6.12", "", 2}, {"6.1", "mitigations=auto spectre_v2=retpoline", 2}, {"6.12", "mitigations=auto spectre_v2=retpoline", 1},
	} {
		t.Run(fmt.Sprintf("%s-%dvcpu", c.series, c.vcpus), func(t *testing.T) {
			g, err := kerneltest.Load(kerneltest.File(t, c.series, "vmlinux"))
			require.NoError(t, err)
			phys := func(name string) uint64 {
				s, err := g.Symbols.Lookup(name)
				require.NoError(t, err, name)
				return s.Addr - 0xffffffff80000000
			}
			clear(g.RAM[phys("init_top_pgt"):][:4096]) // as good as a PV guest's: see linux.Starter
			k, err := linux.Discover(t.Context(), unstarted{g.Machine()}, nil)
			require.NoError(t, err)
			vm := qemutest.StartLinux(t, c.series, qemutest.Config{VCPUs: c.vcpus, Append: "nokaslr " + c.args})
			start, end := phys("_stext"), phys("_etext")
			booted := bytes.Clone(vm.Bytes(start, end-start))
			vm.Kill()

			changed, all := 0, 0
			why, reason := map[string]int{}, regexp.MustCompile(`\([^()]*\)$|is on the .*|ftrace.*|trampoline|code that.*|bytes before.*`)
			for sym := range k.Symbols().All() {
				at := sym.Addr - 0xffffffff80000000
				stop, ok := k.Symbols().FuncEnd(sym.Addr)
				if !ok || at < start || at >= end || sym.Name == "hypercall_page" {
					continue
				}
				for at < stop-0xffffffff80000000 && at < end {
					in, err := x86.Decode(g.RAM[at:min(end, at+x86.MaxLen)])
					if err != nil {
						break
					}
					all++
					addr := at + 0xffffffff80000000
					at += uint64(in.Len)
					if bytes.Equal(in.Bytes(), booted[addr-0xffffffff80000000-start:][:in.Len]) {
						continue
					}
					changed++
					place, err := k.Place(addr, linux.Placing{})
					if err == nil && place == addr {
						t.Errorf("%s+%#x: a probe was allowed; % x became % x", sym.Name, addr-sym.Addr, in.Bytes(), booted[addr-0xffffffff80000000-start:][:in.Len])
						if changed > 200_000 {
							return
						}
					}
					if err != nil {
						why[reason.FindString(err.Error())]++
					} else {
						why["skipped"]++
					}
				}
			}
			t.Logf("booting rewrote %d of %d instructions: %v", changed, all, why)
			assert.Greater(t, changed, 30_000)
		})
	}
}
