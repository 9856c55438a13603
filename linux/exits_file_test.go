package linux_test

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/kerneltest"
	"github.com/vmprobes/vmprobes/internal/x86"
	"github.com/vmprobes/vmprobes/linux"
)

// code is a function of a kernel's file from its symbol to the next, decoded in the order
// of its addresses, without a thought of what leads where.
type code struct {
	name       string
	start, end uint64
	whole      bool     // it was decoded to its end
	rets       []uint64 // RET, or JMP to a return thunk
	outs       []uint64 // where direct jumps lead out of it
	indirect   bool     // there is an indirect jump
	calls      []uint64 // the addresses behind direct calls
	patched    bool     // one way of a branch was taken away
	more       bool     // a jump label, or an expected fault, may lead elsewhere
	// cut is where code begins that nothing before it leads to: a function without a symbol
	// of its own, as most are. It is end if there is none.
	cut uint64
}

// functions decodes the text. Jumps out of all text, which a kernel that has booted doesn't
// have (static_cpu_has in arch/x86/include/asm/cpufeature.h: a NOP, or a jump within the
// function), are made NOPs in the guest's memory.
func (v vmlinux) functions() (all []code) {
	lo, hi := v.addr("_stext"), v.addr("_etext")
	more := slices.Sorted(maps.Keys(v.relative("__start___jump_table", "__stop___jump_table", 16)))
	more = slices.AppendSeq(more, maps.Keys(v.relative("__start___ex_table", "__stop___ex_table", 12)))
	slices.Sort(more)
	var last uint64
	for s := range v.g.Symbols.All() {
		end, ok := v.g.Symbols.FuncEnd(s.Addr)
		f, _, _ := v.g.Symbols.Find(s.Addr)
		// What isn't a function: bytes before one, trampolines of static calls, and
		// labels of the linker script.
		if s.Addr < lo || s.Addr >= hi || s.Addr == last || !ok || f.Addr != s.Addr || s.Type|0x20 != 't' ||
			strings.HasPrefix(f.Name, "__SCT__") || strings.HasSuffix(f.Name, "_text_start") || strings.HasSuffix(f.Name, "_text_end") {
			continue
		}
		last = s.Addr
		c := v.decode(f.Name, s.Addr, end, hi)
		i, _ := slices.BinarySearch(more, s.Addr)
		c.more = i < len(more) && more[i] < end
		all = append(all, c)
	}
	return all
}

func (v vmlinux) decode(name string, start, end, etext uint64) code {
	c := code{name: name, start: start, end: end, cut: end}
	ended, reach := false, start // behind a RET or JMP; how far any branch has led
	for pc := start; pc < end; {
		b := v.memory(pc)[:end-pc]
		in, err := x86.Decode(b)
		if err != nil {
			return c
		}
		next := pc + uint64(in.Len)
		b = b[:in.Len]
		if ended && pc > reach && c.cut == end && !in.IsNop() && !in.IsInt3() {
			c.cut = pc
		}
		ended = ended && (in.IsNop() || in.IsInt3()) || b[0] == 0xc3 || b[0] == 0xe9 || b[0] == 0xeb
		to := next
		switch {
		case in.Len == 2:
			to += uint64(int64(int8(b[1])))
		case in.Len > 4:
			to += uint64(int64(int32(binary.LittleEndian.Uint32(b[in.Len-4:]))))
		}
		s, _, _ := v.g.Symbols.Find(to)
		switch {
		case b[0] == 0xc3 || b[0] == 0xe9 && strings.HasSuffix(s.Name, "_return_thunk"):
			c.rets = append(c.rets, pc)
		case b[0] == 0xe9 && to >= etext:
			copy(v.memory(pc), []byte{0x0f, 0x1f, 0x44, 0, 0})
			c.patched = true
		case b[0] == 0xe8:
			c.calls = append(c.calls, next)
		case b[0] == 0xe9, b[0] == 0xeb, b[0]&0xf0 == 0x70, b[0] == 0x0f && b[1]&0xf0 == 0x80:
			if strings.HasPrefix(s.Name, "__x86_indirect_") {
				c.indirect = true
			} else if to < start || to >= end {
				c.outs = append(c.outs, to)
			} else {
				reach = max(reach, to)
			}
		case b[0] == 0xff && b[1]>>3&7 == 4, b[0] == 0x41 && b[1] == 0xff && b[2]>>3&7 == 4:
			c.indirect = true
		}
		pc = next
	}
	c.whole = true
	return c
}

// testReturns follows each function of a kernel, and compares what is found with what all
// of its instructions are.
func testReturns(v vmlinux, k *linux.Kernel) {
	all := v.functions()
	testShape(v, all)
	v.Run("exits", func(t *testing.T) { testFileExits(vmlinux{t, v.g, v.f}, k, all) })
	v.Run("objdump", func(t *testing.T) { testObjdump(vmlinux{t, v.g, v.f}, k, all) })
	v.Run("return addresses", func(t *testing.T) { testReturnAt(vmlinux{t, v.g, v.f}, k, all) })
	for _, name := range []string{"__switch_to_asm", "arch_rethook_trampoline", "xen_iret", "its_return_thunk"} {
		require.ErrorIs(v, k.Returnable(v.addr(name)), linux.ErrStackSwitch, name)
	}
	for _, name := range []string{"do_exit", "__x64_sys_exit_group", "panic", "kthread_exit"} {
		require.ErrorIs(v, k.Returnable(v.addr(name)), linux.ErrNeverReturns, name)
	}
	for _, name := range []string{"vfs_read", "do_sys_openat2", "__x64_sys_read", "schedule", "wake_up_process", "copy_process"} {
		require.NoError(v, k.Returnable(v.addr(name)), name)
	}
	for _, name := range []string{"arch_rethook_trampoline", "return_to_handler"} {
		require.True(v, k.Trampoline(v.addr(name)))
	}
}

// testShape counts functions by how they end. What most of the design of return probes
// rests on must stay so: few functions have an indirect jump.
func testShape(v vmlinux, all []code) {
	const (
		ret      = "RET"
		both     = "RET, and jumps to others"
		tail     = "jumps to others"
		indirect = "an indirect jump"
		none     = "nothing"
	)
	count := make(map[string]int)
	whole := 0
	for _, c := range all {
		if !c.whole || strings.Contains(c.name, ".cold") {
			continue
		}
		whole++
		outs := slices.ContainsFunc(c.outs, func(to uint64) bool {
			s, _, _ := v.g.Symbols.Find(to)
			return !strings.HasPrefix(s.Name, c.name+".cold")
		})
		switch {
		case c.indirect:
			count[indirect]++
		case len(c.rets) > 0 && !outs:
			count[ret]++
		case len(c.rets) > 0:
			count[both]++
		case outs:
			count[tail]++
		default:
			count[none]++
		}
	}
	v.Logf("%d functions and parts of such, %d functions", len(all), whole)
	for what, about := range map[string]float64{ret: 69, both: 12, tail: 16, indirect: 2, none: 0.3} {
		percent := 100 * float64(count[what]) / float64(whole)
		v.Logf("%-25s %5.2f %%", what, percent)
		assert.InDelta(v, about, percent, max(0.3, about/10), what)
	}
}

// testFileExits compares where functions end with all of their RETs.
func testFileExits(v vmlinux, k *linux.Kernel, all []code) {
	count := make(map[string]int)
	exits, nameless := 0, 0
	for _, c := range all {
		e, err := k.Exits(c.start)
		switch {
		case err == nil:
			count["known"]++
		case errors.Is(err, linux.ErrNeverReturns):
			count["never returns"]++
		default:
			require.ErrorIs(v, err, linux.ErrNoExits, c.name)
			count["not known"]++
		}
		if !c.whole {
			continue
		}
		for _, at := range e.At {
			if at >= c.start && at < c.end {
				require.Contains(v, c.rets, at, "%s: %#x", c.name, at)
				exits++
			}
		}
		// Parts have several beginnings, and a way that was taken away leads nowhere.
		if e.Open || c.patched || strings.Contains(c.name, ".cold") {
			continue
		}
		for _, at := range c.rets {
			switch {
			case slices.Contains(e.At, at):
			case at >= c.cut:
				nameless++
			default:
				v.Errorf("%s: the RET at %#x isn't reached", c.name, at)
			}
		}
		for _, to := range c.outs {
			if s, off, _ := v.g.Symbols.Find(to); off == 0 && c.cut == c.end && !slices.Contains(e.Tails, to) {
				v.Errorf("%s: a jump to %s isn't reached", c.name, s.Name)
			}
		}
		if len(c.outs) == 0 && !c.indirect && !c.more && len(c.rets) > 0 && err == nil && len(slices.DeleteFunc(e.Tails, func(a uint64) bool { return a == c.start })) > 0 {
			v.Errorf("%s: leads to %#x", c.name, e.Tails)
		}
	}
	assert.Less(v, count["not known"], len(all)/20)
	assert.Less(v, count["never returns"], len(all)/80)
	v.Logf("%v; %d exits in their own functions, %d of functions without a name", count, exits, nameless)
}

// testReturnAt asks for each direct call where its return would be noticed.
func testReturnAt(v vmlinux, k *linux.Kernel, all []code) {
	count := make(map[string]int)
	n := 0
	step := 1
	if testing.Short() {
		step = 16
	}
	for _, c := range all {
		for i := 0; i < len(c.calls); i += step {
			n++
			at, err := k.ReturnAt(c.calls[i], false)
			switch {
			case err == nil:
				count[fmt.Sprint(len(at), " places")]++
			default:
				require.ErrorIs(v, err, linux.ErrNotProbeable)
				require.NotErrorIs(v, err, linux.ErrUnknownPlaces)
				_, text, _ := strings.Cut(err.Error(), "no place for a probe: ")
				text, _, _ = strings.Cut(text, "\"")
				if strings.Contains(err.Error(), "is a jump label") {
					text = "an end of a jump label: " + text
				}
				count[text]++
			}
		}
	}
	v.Logf("%d direct calls", n)
	for what, m := range count {
		v.Logf("%6d %6.3f %% %s", m, 100*float64(m)/float64(n), what)
	}
	assert.Greater(v, count["1 places"]+count["2 places"], n*985/1000)
	assert.Positive(v, count["2 places"])
}

// testObjdump compares the exits in a part of the text with the RETs that objdump sees there.
func testObjdump(v vmlinux, k *linux.Kernel, all []code) {
	const size = 1 << 20
	if _, err := exec.LookPath("objdump"); err != nil {
		kerneltest.Skip(v, "no objdump (Debian package binutils): %v", err)
	}
	path := filepath.Join(v.TempDir(), "text")
	lo := v.addr("_stext") + 1<<20
	require.NoError(v, os.WriteFile(path, v.memory(lo)[:size], 0o600))
	cmd := exec.Command("objdump", "-D", "-w", "-b", "binary", "-m", "i386:x86-64", "--no-show-raw-insn", fmt.Sprintf("--adjust-vma=%#x", lo), path)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	out, err := cmd.Output()
	require.NoError(v, err)
	thunk := fmt.Sprintf("%#x", v.addr("__x86_return_thunk"))
	rets := make(map[uint64]bool)
	for s := bufio.NewScanner(strings.NewReader(string(out))); s.Scan(); {
		// "ffffffff81100005:\tjmp    0xffffffff81e01ef0"
		addr, text, _ := strings.Cut(strings.TrimSpace(s.Text()), ":\t")
		f := strings.Fields(text)
		at, err := strconv.ParseUint(addr, 16, 64)
		if err != nil || len(f) == 0 {
			continue
		}
		rets[at] = f[0] == "ret" || f[0] == "jmp" && len(f) == 2 && f[1] == thunk
	}
	n, exits := 0, 0
	for _, c := range all {
		if c.start < lo || c.end > lo+size {
			continue
		}
		e, err := k.Exits(c.start)
		if err != nil || c.patched || c.cut != c.end {
			continue
		}
		n++
		var want, got []uint64
		for at := c.start; at < c.end; at++ {
			if rets[at] {
				want = append(want, at)
			}
			if slices.Contains(e.At, at) {
				got = append(got, at)
			}
		}
		exits += len(got)
		if !assert.Equal(v, want, got, c.name) {
			return
		}
	}
	v.Logf("%d functions, %d exits", n, exits)
	assert.Greater(v, n, 3000)
}
