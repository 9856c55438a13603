package image

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/paging"
)

// firmware is a guest's whole software: from real mode it goes to 64-bit mode and
// halts. Its page tables at 0x1000 map the first 2 MiB at 0 and at
// 0xffffffff80000000. It sets GS base to 0xffff88803fc00000 and
// KERNEL_GS_BASE to 0x7f0000001000, an IDT at 0x5000, and stores a word at 0x8000.
//
//	cli; xor %ax,%ax; mov %ax,%ds
//	movl $0x2003,0x1000; movl $0x2003,0x1ff8	# PML4 0 and 511
//	movl $0x3003,0x2000; movl $0x3003,0x2ff0	# PDPT 0 and 510
//	movl $0x83,0x3000				# 2 MiB at 0
//	lgdtl %cs:gdtr; lidtl %cs:idtr
//	mov $0x20,%eax; mov %eax,%cr4; mov $0x1000,%eax; mov %eax,%cr3
//	mov $0xc0000080,%ecx; mov $0x900,%eax; xor %edx,%edx; wrmsr
//	mov $0x80000011,%eax; mov %eax,%cr0
//	ljmpl $8,$(0xf0000+1f)
//	1: mov $0xc0000101,%ecx; mov $0x3fc00000,%eax; mov $0xffff8880,%edx; wrmsr
//	inc %ecx; mov $0x1000,%eax; mov $0x7f00,%edx; wrmsr
//	movabs $0xffffffff80008000,%rdi; movabs $0x0123456789abcdef,%rax
//	mov %rax,(%rdi); lea -8(%rdi),%rsp
//	2: hlt; jmp 2b
//	.quad 0, 0x00209a0000000000; gdtr: .word 15; .long 0xf0000+gdt; idtr: .word 0xfff; .long 0x5000
const firmware = "fa31c08ed866c70600100320000066c706f81f0320000066c70600200330000066c706f02f03300000" +
	"66c7060030830000002e660f0116c1002e660f011ec70066b8200000000f22e066b8001000000f22d866b980" +
	"0000c066b8000900006631d20f3066b8110000800f22c066ea74000f000800b9010100c0b80000c03fba8088" +
	"ffff0f30ffc1b800100000ba007f00000f3048bf00800080ffffffff48b8efcdab8967452301488907488d67" +
	"f8f4ebfd000000000000000000000000009a20000f00b1000f00ff0f00500000"

// A monitor is QEMU's: QMP on its standard input and output.
type monitor struct {
	t   *testing.T
	in  *json.Encoder
	out *json.Decoder
}

// execute runs a command of QMP and returns its result, skipping events.
func (m monitor) execute(cmd string, args map[string]any) string {
	m.t.Helper()
	require.NoError(m.t, m.in.Encode(map[string]any{"execute": cmd, "arguments": args}))
	for {
		var answer struct {
			Return *json.RawMessage
			Error  any
		}
		require.NoError(m.t, m.out.Decode(&answer))
		require.Nil(m.t, answer.Error)
		if answer.Return == nil {
			continue
		}
		var text string
		json.Unmarshal(*answer.Return, &text) //nolint:errcheck // {} if it prints nothing
		return text
	}
}

// command runs a command of the monitor for humans and returns what it printed.
func (m monitor) command(cmd string) string {
	m.t.Helper()
	return m.execute("human-monitor-command", map[string]any{"command-line": cmd})
}

// qemu returns the path of QEMU, whose dumps and memory maps are compared with.
func qemu(t *testing.T) string {
	t.Helper()
	path, err := exec.LookPath("qemu-system-x86_64")
	switch {
	case err == nil:
	case os.Getenv("VMPROBES_REQUIRE_QEMU") == "1":
		t.Fatal(err)
	default:
		t.Skip("qemu-system-x86_64 is not installed: nothing to compare with")
	}
	return path
}

// runQEMU runs the firmware until it halts.
func runQEMU(t *testing.T, dir string, args ...string) monitor {
	path := qemu(t)
	rom := make([]byte, 64<<10)
	code, err := hex.DecodeString(firmware)
	require.NoError(t, err)
	copy(rom, code)
	copy(rom[0xfff0:], "\xea\x00\x00\x00\xf0") // ljmp $0xf000,$0
	bios := filepath.Join(dir, "firmware")
	require.NoError(t, os.WriteFile(bios, rom, 0o600))

	args = append([]string{"-nodefaults", "-display", "none", "-accel", "tcg", "-m", "32", "-smp", "2", "-bios", bios, "-qmp", "stdio"}, args...)
	cmd := exec.CommandContext(t.Context(), path, args...)
	in, err := cmd.StdinPipe()
	require.NoError(t, err)
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	cmd.Stderr = os.Stderr
	require.NoError(t, cmd.Start())
	t.Cleanup(func() {
		cmd.Process.Kill() //nolint:errcheck // it may have ended
		cmd.Wait()         //nolint:errcheck // killed
	})
	m := monitor{t, json.NewEncoder(in), json.NewDecoder(out)}
	m.execute("qmp_capabilities", map[string]any{})
	for !strings.Contains(m.command("info registers"), "RSP=ffffffff80007ff8") {
	}
	m.command("stop")
	return m
}

// The dump of a real QEMU, against what QEMU says otherwise of the same guest:
// its memory by pmemsave, and its registers by the monitor.
func TestQEMU(t *testing.T) {
	dir := t.TempDir()
	ram := filepath.Join(dir, "ram")
	mon := runQEMU(t, dir, "-M", "pc,memory-backend=mem", "-object", "memory-backend-file,id=mem,size=32M,share=on,mem-path="+ram)
	flat := filepath.Join(dir, "flat")
	mon.command("pmemsave 0 0x2000000 \"" + flat + "\"") // a slash alone would divide
	want, err := os.ReadFile(flat)
	require.NoError(t, err)
	require.Len(t, want, 32<<20)

	regs := mon.command("info registers -a")
	reg := func(cpu int, expr string) uint64 {
		_, text, ok := strings.Cut(regs, fmt.Sprintf("CPU#%d", cpu))
		require.True(t, ok)
		m := regexp.MustCompile(expr).FindStringSubmatch(text)
		require.Len(t, m, 2, "%s", expr)
		v, err := strconv.ParseUint(m[1], 16, 64)
		require.NoError(t, err)
		return v
	}

	// With paging -p makes a segment of each virtual mapping.
	for _, flags := range []string{"", "-p "} {
		core := filepath.Join(dir, "core"+strings.TrimSpace(flags))
		mon.command("dump-guest-memory " + flags + core)
		m, err := Open(core, nil)
		require.NoError(t, err)
		defer m.Close() //nolint:errcheck // only read from
		assert.Equal(t, "QEMU core", m.Format())
		assert.Equal(t, HVM, m.Kind())
		var frames uint64
		for r := range m.Frames() {
			for f := uint64(r.First); f < min(uint64(r.First)+r.Count, 32<<8); f++ {
				frames++
				require.True(t, bytes.Equal(want[f<<12:(f+1)<<12], get(t, m, f)), "frame %#x", f)
			}
		}
		if flags == "" {
			require.EqualValues(t, 32<<8, frames)
		} else {
			require.Positive(t, frames)
		}

		cpus := m.CPUs()
		require.Len(t, cpus, 2)
		c := cpus[0]
		require.Equal(t, CR0|CR2|CR3|CR4|EFER|RIP|RSP|RFLAGS|CS|GSBase|KernelGSBase|IDTBase, c.Has)
		assert.Equal(t, 64, c.Bits)
		for _, r := range []struct {
			expr string
			got  uint64
		}{
			{`CR0=(\w+)`, c.CR0},
			{`CR3=(\w+)`, c.CR3},
			{`CR4=(\w+)`, c.CR4},
			{`EFER=(\w+)`, c.EFER},
			{`RIP=(\w+)`, c.RIP},
			{`RSP=(\w+)`, c.RSP},
			{`RFL=(\w+)`, c.RFLAGS},
			{`CS =(\w+)`, uint64(c.CS)},
			{`GS =\w+ (\w+)`, c.GSBase},
			{`IDT= +(\w+)`, c.IDTBase},
		} {
			assert.Equal(t, reg(0, r.expr), r.got, "%s", r.expr)
		}
		assert.Equal(t, uint64(0x7f0000001000), c.KernelGSBase, "as the firmware set it: the monitor doesn't show it")
		assert.Equal(t, reg(1, `CR0=(\w+)`), cpus[1].CR0, "it waits for its start, in real mode")
		assert.Zero(t, cpus[1].Bits)

		mode, err := paging.ModeOf(c.CR0, c.CR4, c.EFER)
		require.NoError(t, err)
		var word [8]byte
		_, err = paging.New(m, mode).Read(paging.Root(c.CR3), 0xffffffff80008000, word[:])
		require.NoError(t, err)
		assert.Equal(t, uint64(0x0123456789abcdef), le.Uint64(word[:]))
	}

	// The file of the RAM itself: what lies under the firmware differs.
	m, err := Open(ram, &Options{RawHole: HolePC})
	require.NoError(t, err)
	defer m.Close() //nolint:errcheck // only read from
	assert.Equal(t, "raw", m.Format())
	for f := range uint64(32 << 8) {
		if f < 0xa0 || f >= 0x100 {
			require.True(t, bytes.Equal(want[f<<12:(f+1)<<12], get(t, m, f)), "frame %#x", f)
		}
	}

	// kdump's form, flattened and not, of each compression that this QEMU has.
	for _, flags := range []string{"-z", "-l", "-s", "-R -z", "-R -l", "-R -s"} {
		name := filepath.Join(dir, "kdump"+strings.ReplaceAll(flags, " ", ""))
		out := mon.command("dump-guest-memory " + flags + " " + name)
		if _, err := os.Stat(name); err != nil {
			require.NotEqual(t, "-z", flags, out)
			continue // flags that this QEMU hasn't
		}
		k, err := Open(name, nil)
		require.NoError(t, err, "%s", flags)
		defer k.Close() //nolint:errcheck // only read from
		assert.Equal(t, "kdump of QEMU", k.Format())
		assert.Empty(t, k.Warnings())
		require.Len(t, k.CPUs(), 2)
		for f := range uint64(32 << 8) {
			if f < 0xa0 || f >= 0x100 {
				require.True(t, bytes.Equal(want[f<<12:(f+1)<<12], get(t, k, f)), "%s: frame %#x", flags, f)
			}
		}
	}
}

// The holes, against the memory map that QEMU shows.
func TestQEMUHole(t *testing.T) {
	path := qemu(t)
	for _, tt := range []struct {
		machine string
		hole    Hole
	}{{"pc", HolePC}, {"q35", HoleQ35}} {
		for _, size := range []uint64{tt.hole.Limit - 1<<20, tt.hole.Limit} {
			cmd := exec.CommandContext(t.Context(), path, "-M", tt.machine, "-m", strconv.FormatUint(size>>20, 10),
				"-nodefaults", "-display", "none", "-accel", "tcg", "-S", "-monitor", "stdio")
			cmd.Stdin = strings.NewReader("info mtree -f\nquit\n")
			out, err := cmd.Output()
			require.NoError(t, err)
			// 0000000100000000-000000011fffffff (prio 0, ram): pc.ram @00000000c0000000
			above := regexp.MustCompile(`(?m)^ +0000000100000000-\w+ .*ram\): pc\.ram @0*(\w+)`).FindSubmatch(out)
			if size < tt.hole.Limit {
				require.Nil(t, above, "%s %#x", tt.machine, size)
				continue
			}
			require.NotNil(t, above, "%s %#x: %s", tt.machine, size, out)
			off, err := strconv.ParseUint(string(above[1]), 16, 64)
			require.NoError(t, err)
			require.Equal(t, tt.hole.Start, off, "%s", tt.machine)
		}
	}
}
