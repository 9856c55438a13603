package image_test

import (
	"context"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/image"
	"github.com/vmprobes/vmprobes/internal/texthash"
	"github.com/vmprobes/vmprobes/lab/labguest"
	"github.com/vmprobes/vmprobes/paging"
)

// The core that a real `xl dump-core` writes of a real guest, against what the guest
// says of itself. It runs in the dom0 of a lab host:
//
//	go test -exec 'lab exec pv' -run Xl ./image
func TestXlDumpCore(t *testing.T) {
	labguest.Require(t, "pv", "pv-stock", "hvm")
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	conf := labguest.Config{Kind: labguest.PV, VCPUs: 2, MemoryMB: 128}
	if labguest.Is("hvm") {
		conf = labguest.Config{Kind: labguest.PVH, VCPUs: 1, MemoryMB: 128} // the emulator's limit
	}
	g, err := labguest.Start(ctx, conf)
	require.NoError(t, err)
	defer g.Destroy() //nolint:errcheck // the machine ends soon

	symbol := func(name string) uint64 {
		answer, err := g.Command(ctx, "kallsyms "+name)
		require.NoError(t, err)
		fields := strings.Fields(answer)
		v, err := strconv.ParseUint(strings.TrimPrefix(fields[len(fields)-1], "0x"), 16, 64)
		require.NoError(t, err, "%s", answer)
		return v
	}
	stext, etext := symbol("_stext"), symbol("_etext")
	hash, err := g.Command(ctx, "texthash")
	require.NoError(t, err)

	core := filepath.Join(t.TempDir(), "core")
	out, err := exec.CommandContext(ctx, "xl", "dump-core", g.Name(), core).CombinedOutput()
	require.NoError(t, err, "%s", out)
	later, err := g.Command(ctx, "texthash") // the guest's kernel may patch itself at any time
	require.NoError(t, err)
	m, err := image.Open(core, nil)
	require.NoError(t, err)
	defer m.Close() //nolint:errcheck // only read from
	t.Logf("%s, %s, %d MiB", m.Format(), m.Kind(), m.Size()>>20)
	require.Equal(t, "Xen core", m.Format())
	assert.GreaterOrEqual(t, m.Size(), uint64(120<<20))

	cpus := m.CPUs()
	require.Len(t, cpus, conf.VCPUs)
	for _, c := range cpus {
		assert.False(t, c.Offline)
		require.Equal(t, 64, c.Bits)
	}
	c := cpus[0]
	mode := paging.Mode{Kind: paging.FourLevel, NXE: true}
	if conf.Kind == labguest.PV {
		require.Equal(t, image.PV, m.Kind())
	} else {
		require.Equal(t, image.HVM, m.Kind())
		mode, err = paging.ModeOf(c.CR0, c.CR4, c.EFER)
		require.NoError(t, err)
	}
	mem := paging.New(m, mode)
	// The kernel's half of a page table is the same for all processes.
	text := make([]byte, etext-stext)
	_, err = mem.Read(paging.Root(c.CR3), paging.VAddr(stext), text)
	require.NoError(t, err)
	assert.Contains(t, hash+later, texthash.Sum(text).String(), "the kernel's text, through its page tables")

	kernelGS := c.GSBase
	if conf.Kind == labguest.PV && !c.InKernel || conf.Kind != labguest.PV && c.CS&3 != 0 {
		kernelGS = c.KernelGSBase
	}
	var percpu [8]byte
	_, err = mem.Read(paging.Root(c.CR3), paging.VAddr(symbol("__per_cpu_offset")), percpu[:])
	require.NoError(t, err)
	assert.Equal(t, kernelGS, leUint64(percpu), "per-CPU base")

	if conf.Kind != labguest.PV {
		return
	}
	// A PV kernel runs where it was linked, so its text's pseudo-physical address is known.
	const startKernelMap = 0xffffffff80000000
	for va := stext; va < etext; va += 64 << 12 {
		tr, err := mem.Translate(paging.Root(c.CR3), paging.VAddr(va))
		require.NoError(t, err)
		pfn := (va - startKernelMap) >> 12
		mfn, ok := m.PhysToMachine(pfn)
		assert.True(t, ok)
		assert.Equal(t, tr.Frame, mfn)
		back, ok := m.MachineToPhys(mfn)
		assert.True(t, ok)
		assert.Equal(t, pfn, back)
	}
	for _, trap := range c.Traps {
		if trap.Vector == 14 {
			assert.Equal(t, symbol("xen_asm_exc_page_fault"), trap.Address)
		}
	}
	assert.NotEmpty(t, c.Traps)
	assert.True(t, stext <= c.SyscallCallback && c.SyscallCallback < etext, "%#x", c.SyscallCallback)
	assert.True(t, stext <= c.EventCallback && c.EventCallback < etext, "%#x", c.EventCallback)
}

func leUint64(b [8]byte) (v uint64) {
	for i, c := range b {
		v |= uint64(c) << (8 * i)
	}
	return v
}
