package vmprobes_test

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes"
	"github.com/vmprobes/vmprobes/internal/console"
	"github.com/vmprobes/vmprobes/internal/qemutest"
	"github.com/vmprobes/vmprobes/internal/texthash"
	"github.com/vmprobes/vmprobes/internal/x86"
	"github.com/vmprobes/vmprobes/lab/labguest"
	"github.com/vmprobes/vmprobes/linux"
	"github.com/vmprobes/vmprobes/sysmap"
)

// The tests in this file run in the dom0 of a lab host:
//
//	go test -exec 'lab exec pv' .
//
// With -short they take the smallest guest that shows each thing.

const probed = "do_sys_openat2"

// matrix is the guests to test.
func matrix() []labguest.Config {
	kind := labguest.PV
	if labguest.Is("hvm") {
		kind = labguest.PVH
	}
	var out []labguest.Config
	for _, k := range labguest.Kernels() {
		for _, n := range []int{1, 2} {
			out = append(out, labguest.Config{Name: "a3guest", Kind: kind, Kernel: k, VCPUs: n})
		}
	}
	if testing.Short() && len(out) > 0 {
		if labguest.Is("hvm-amd") {
			return out[:1] // one vCPU: it can be stepped in place, which takes another way there
		}
		return out[1:2] // the oldest kernel, two vCPUs
	}
	return out
}

// wide is the guests with more vCPUs than the emulated host has processors, on PV hosts:
// the newest kernel's.
func wide() []labguest.Config {
	all := matrix()
	if testing.Short() || !labguest.Is("pv") || len(all) == 0 {
		return nil
	}
	cfg := all[len(all)-1]
	cfg.VCPUs = 4
	return []labguest.Config{cfg}
}

// rounds is how often something that must hold every time is tried: on one guest
// of each host in earnest.
func (t labTest) rounds() int {
	switch {
	case testing.Short() && labguest.Is("hvm"):
		return 1 // an emulator of processors needs its time
	case testing.Short():
		return 2
	case t.patched() && t.cfg.VCPUs == 2 && t.cfg.Kernel == "6.1":
		return 50
	case labguest.Is("hvm"):
		return 2
	}
	return 5
}

// hits is how many of n hits to make: all, but for a short run on PV guests, whose
// emulated hypervisor takes 3 ms for one.
func (t labTest) hits(n int) int {
	if testing.Short() && labguest.Is("pv") {
		return n / 5
	}
	return n
}

// labGuest is a guest with the lab's init in it.
type labGuest interface {
	Name() string // for Open
	Command(ctx context.Context, command string) (reply string, err error)
	Output(ctx context.Context, command string) (reply string, lines []string, err error)
	Console() string
	KernelPath() string
}

type labTest struct {
	*testing.T
	g   labGuest
	cfg labguest.Config
}

// patched tells whether breakpoints show in the guest's memory. QEMU's don't.
func (t labTest) patched() bool { return labguest.Host() != "" }

func (t labTest) ask(format string, args ...any) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	reply, err := t.g.Command(ctx, fmt.Sprintf(format, args...))
	require.NoError(t, err, "guest console:\n%s", tail(t.g.Console(), 4000))
	return reply
}

func tail(s string, n int) string {
	if len(s) > n {
		s = "…" + s[len(s)-n:]
	}
	return s
}

// field returns the value of name=value in a guest's reply.
func field(t testing.TB, reply, name string) string {
	t.Helper()
	m := regexp.MustCompile(`(?:^| )` + name + `=(\S+)`).FindStringSubmatch(reply)
	require.NotNil(t, m, "%s in %q", name, reply)
	return m[1]
}

func number(t testing.TB, reply, name string) uint64 {
	t.Helper()
	n, err := strconv.ParseUint(field(t, reply, name), 10, 64)
	require.NoError(t, err)
	return n
}

func (t labTest) open(opts *vmprobes.Options) *vmprobes.Session {
	t.Helper()
	s, err := vmprobes.Open(t.Context(), t.g.Name(), opts)
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, s.Close()) })
	return s
}

// serve runs s.Loop while f runs.
func serve(t testing.TB, s *vmprobes.Session, f func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Loop(ctx) }()
	looping(t, s)
	f()
	cancel()
	require.ErrorIs(t, <-done, context.Canceled)
}

// looping waits until a Loop serves the hits. Without one they count as missed.
func looping(t testing.TB, s *vmprobes.Session) {
	t.Helper()
	require.Eventually(t, s.Looping, time.Minute, 100*time.Microsecond)
}

// keepText has the guest keep its kernel's text, for sameText. The guest patches
// itself now and then, above all when it does something for the first time.
func (t labTest) keepText() {
	t.Helper()
	t.ask("open 10 all")
	for range 5 {
		t.ask("textkeep")
		if t.ask("textchanges") == "textchanges other=0 own=0" {
			return
		}
	}
	t.Fatal("the guest's text doesn't come to rest")
}

// unharmed checks that the guest is as it was, by its own account.
func (t labTest) unharmed() {
	t.Helper()
	t.sameText()
	reply := t.ask("check")
	assert.NotContains(t, reply, "BAD", "the guest's ymm registers or memory")
	assert.Equal(t, "0", field(t, t.ask("dmesg"), "bad"), "signs of trouble in the guest's log:\n%s", tail(t.g.Console(), 4000))
}

// sameText has the guest compare its kernel's text with what it kept.
func (t labTest) sameText() {
	t.Helper()
	own, err := console.SameText(t.Context(), t.g.Output)
	if !errors.Is(err, console.ErrTextChanged) {
		require.NoError(t, err)
	}
	assert.NoError(t, err, "the guest's own view of its text")
	if len(own) > 0 {
		t.Logf("what the guest changed itself: %q", own)
	}
}

func TestLab(t *testing.T) {
	labguest.Require(t, "pv", "hvm")
	require.NotEmpty(t, matrix(), "the lab's dom0 has no guest kernels")
	for _, cfg := range append(matrix(), wide()...) {
		t.Run(guestName(cfg), func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 15*time.Minute)
			defer cancel()
			g, err := labguest.Start(ctx, cfg)
			require.NoError(t, err)
			defer g.Destroy()
			labTest{t, g, cfg}.keepText()
			lt := func(f func(labTest)) func(*testing.T) {
				return func(t *testing.T) {
					if _, err := g.Command(t.Context(), "ping"); err != nil {
						t.Fatalf("the guest doesn't answer any more: %v", err)
					}
					f(labTest{t, g, cfg})
				}
			}
			t.Run("Binding", lt(testBinding))
			t.Run("Symbols", lt(testSymbols))
			t.Run("Introspection", lt(testIntrospection))
			t.Run("Modules", lt(testModules))
			t.Run("Beside", lt(testBeside))
			t.Run("Lists", lt(testLists))
			t.Run("Calls", lt(testCalls))
			t.Run("Hits", lt(testHits))
			t.Run("Stepped", lt(testStepped))
			t.Run("Handlers", lt(testHandlers))
			t.Run("GuestsOwnInt3", lt(testGuestsOwnInt3))
			t.Run("Unserved", lt(testUnserved))
			t.Run("Examples", lt(testExamples))
			t.Run("User", lt(testUser))
			t.Run("Ends", lt(testEnds))
			labTest{t, g, cfg}.unharmed()
		})
	}
}

// testBinding runs the binding's own tests in this dom0.
func testBinding(t labTest) {
	out, err := exec.Command(binary(t, "xenctrl.test"), "-test.run=^TestLab", "-test.v").CombinedOutput()
	require.NoError(t, err, "%s", out)
	assert.Contains(t, string(out), "Xen "+labguest.Xen()+".", "the release that this host is for")
	t.Logf("%s", out)
}

// testSymbols compares symbols and text with the guest's own.
func testSymbols(t labTest) {
	s := t.open(nil) // no symbols named: the kernel that xl booted is found
	for _, name := range []string{probed, "__x64_sys_openat", "vfs_open", "_stext", "_etext"} {
		addr, err := s.Lookup(name)
		require.NoError(t, err)
		assert.Contains(t, t.ask("kallsyms %s", name), fmt.Sprintf("0x%x", uint64(addr)), name)
		if got, off, ok := s.Symbolize(addr + 1); name == probed && assert.True(t, ok) {
			assert.Equal(t, probed, got)
			assert.EqualValues(t, 1, off)
		}
	}
	_, err := s.Lookup("sys_open")
	require.NoError(t, err, "sys_open must be found as its wrapper")
	_, err = s.Lookup("do_sys_openat3")
	require.ErrorIs(t, err, vmprobes.ErrSymbolNotFound)
	_, err = s.Lookup("type_show")
	require.ErrorIs(t, err, vmprobes.ErrAmbiguous)

	// The whole text, with a probe in it that must not show.
	p := &vmprobes.Probe{Symbol: "vfs_open"}
	addr, err := s.Lookup(p.Symbol)
	require.NoError(t, err)
	around := t.ask("text %#x 4000", uint64(addr-2000))
	hash := t.ask("texthash")
	require.NoError(t, s.Register(p))
	view := t.ask("text %#x 16", uint64(p.Address()))                             // the breakpoint may stand behind what ftrace and IBT need
	for tries := 0; tries < 3 && !strings.Contains(hash, hashOf(t, s)); tries++ { // the guest changed it meanwhile
		require.NoError(t, s.Unregister(p))
		hash = t.ask("texthash")
		require.NoError(t, s.Register(p))
	}
	assert.Contains(t, hash, hashOf(t, s), "all of the text")
	code := make([]byte, 4000)
	_, err = s.ReadMemory(addr-2000, code)
	require.NoError(t, err)
	assert.Contains(t, around, hex.EncodeToString(code), "the text, read from dom0 with a probe in it")
	if t.patched() {
		assert.Positive(t, number(t, t.ask("textchanges"), "other"), "the guest tells a breakpoint from its own changes")
	}
	require.NoError(t, s.Unregister(p))
	t.sameText()
	if t.patched() {
		assert.NotEqual(t, view, t.ask("text %#x 16", uint64(p.Address())), "the breakpoint was in the guest's text, and isn't any more")
	}

	p = &vmprobes.Probe{Symbol: probed, Offset: 1}
	assert.ErrorIs(t, s.Register(p), vmprobes.ErrNotBoundary)

	// Another kernel's symbols are refused before anything is touched. (A guest that a
	// tool is attached to is refused before its symbols are looked at.)
	require.NoError(t, s.Close())
	for _, k := range labguest.Kernels() {
		if k == t.cfg.Kernel {
			continue
		}
		other := strings.Replace(t.g.KernelPath(), t.cfg.Kernel, k, 1)
		if _, err := os.Stat(other); err != nil || other == t.g.KernelPath() {
			continue
		}
		_, err := vmprobes.Open(t.Context(), t.g.Name(), &vmprobes.Options{Symbols: other})
		assert.ErrorIs(t, err, vmprobes.ErrWrongSymbols)
	}
}

// testIntrospection compares what is found in the guest's memory with what the
// guest says of itself: nothing is configured, and no file of its kernel is used.
func testIntrospection(t labTest) {
	s := t.open(&vmprobes.Options{Cache: "-", Config: "-"})
	k := s.Guest().Linux()
	require.NotNil(t, k, "%v", s.Guest().Err())
	for _, r := range k.Explain() {
		t.Log(r)
	}

	mods, err := k.Modules()
	require.NoError(t, err)
	var got []string
	for _, m := range mods {
		got = append(got, fmt.Sprintf("%s %d %v 0x%016x", m.Name, m.Size, m.State, m.Base))
	}
	var want []string
	for _, l := range t.lines("modules") {
		f := strings.Fields(l) // name size users dependents state address
		want = append(want, strings.Join([]string{f[0], f[1], f[4], f[5]}, " "))
	}
	assert.Equal(t, want, got, "/proc/modules")
	assert.NotEmpty(t, got)

	got, want = nil, nil
	tasks, err := k.Processes(false)
	require.NoError(t, err)
	for _, p := range tasks {
		got = append(got, fmt.Sprintf("%d %s", p.PID, p.Comm))
	}
	for _, l := range t.lines("ps") {
		// /proc shows kernel threads' names in full, and what workers work at.
		pid, name, _ := strings.Cut(l, " ")
		if worker.MatchString(name) {
			name, _, _ = strings.Cut(name, "-")
		}
		want = append(want, fmt.Sprintf("%s %.15s", pid, name))
	}
	if len(want) == len(got) { // else a worker came or went
		assert.ElementsMatch(t, want, got, "ps")
	}
	assert.InDelta(t, len(want), len(got), 3, "ps: %v\n%v", want, got)
	assert.Contains(t, got, "1 init")

	core, modules := sha256.New(), sha256.New()
	var nmod int
	for sym := range k.Symbols().All() {
		fmt.Fprintf(core, "%016x %c %s\n", sym.Addr, sym.Type, sym.Name)
	}
	syms, err := k.ModuleSymbols()
	require.NoError(t, err)
	for _, sym := range syms {
		fmt.Fprintf(modules, "%016x %c %s\t[%s]\n", sym.Addr, sym.Type, sym.Name, sym.Module)
		nmod++
	}
	reply := t.ask("kallsymshash")
	assert.Equal(t, fmt.Sprintf("%x:%d", core.Sum(nil), k.Symbols().Len()), field(t, reply, "kernel"), "/proc/kallsyms")
	assert.Equal(t, fmt.Sprintf("%x:%d", modules.Sum(nil), nmod), field(t, reply, "modules"), "/proc/kallsyms of modules")
}

// testCalls compares how hits describe themselves with what the guest does.
func testCalls(t labTest) {
	s := t.open(nil)
	var calls []string
	var tasks []linux.Task
	describe := func(p *vmprobes.Probe, r *vmprobes.Regs) vmprobes.Action {
		call, err := p.Call(r)
		assert.NoError(t, err)
		task, err := r.Task()
		assert.NoError(t, err)
		calls, tasks = append(calls, call.String()), append(tasks, task)
		return vmprobes.Continue
	}
	require.NoError(t, s.Register(
		&vmprobes.Probe{Symbol: "sys_openat", Pre: describe},
		&vmprobes.Probe{Symbol: "do_sys_openat2", Pre: describe}))
	serve(t, s, func() { t.ask("open 1 0") })
	require.Len(t, calls, 2)
	assert.Regexp(t, `^__x64_sys_openat\(dfd=-100, filename="/lab-probe-target", flags=\S+, mode=\S+\)$`, calls[0])
	assert.Regexp(t, `^do_sys_openat2\(dfd=-100, filename="/lab-probe-target", how=0x[0-9a-f]+\)$`, calls[1])
	for _, task := range tasks {
		assert.Equal(t, "init", task.Comm)
		assert.Equal(t, 1, task.TGID)
		assert.Zero(t, task.UID)
	}
	t.Log(calls, tasks)

	// The kernel's own lists keep probes away from where they would do harm.
	assert.ErrorIs(t, s.Register(&vmprobes.Probe{Symbol: "do_int3"}), vmprobes.ErrNotProbeable)
}

// worker is a kernel thread to whose name /proc adds what it works at.
var worker = regexp.MustCompile(`^kworker/u?[0-9]`)

// lines returns the lines before the answer to a command.
func (t labTest) lines(command string) []string {
	t.Helper()
	_, lines, err := t.g.Output(t.Context(), command)
	require.NoError(t, err)
	return lines
}

// hashOf is the guest's texthash, of _stext to _etext as s reads it.
func hashOf(t testing.TB, s *vmprobes.Session) string {
	start, err := s.Lookup("_stext")
	require.NoError(t, err)
	end, err := s.Lookup("_etext")
	require.NoError(t, err)
	hash := new(texthash.Hash)
	buf := make([]byte, 64<<10)
	for a := start; a < end; a += vmprobes.Addr(len(buf)) {
		n := min(len(buf), int(end-a))
		_, err := s.ReadMemory(a, buf[:n])
		require.NoError(t, err)
		hash.Write(buf[:n])
	}
	return hash.String()
}

// testHits compares hits at a function's entry with the guest's own count, and
// what the handlers see with what the guest does.
func testHits(t labTest) {
	s := t.open(nil)
	per := t.hits(10000) / t.cfg.VCPUs
	if !t.patched() {
		per /= 20 // QEMU before 10.2 throws all it has translated away at each stop
	}
	var pre, post, wrong atomic.Uint64
	p := &vmprobes.Probe{
		Symbol: probed,
		Pre: func(p *vmprobes.Probe, r *vmprobes.Regs) vmprobes.Action {
			pre.Add(1)
			if name, err := p.ReadString(vmprobes.Addr(r.Arg(1)), 256); err != nil || name != "/lab-probe-target" {
				wrong.Add(1)
			}
			return vmprobes.Continue
		},
		Post: func(p *vmprobes.Probe, r *vmprobes.Regs, f vmprobes.Flags) vmprobes.Action {
			post.Add(1)
			if r.PC() == p.Address() || f&vmprobes.FlagArmed == 0 {
				wrong.Add(1)
			}
			return vmprobes.Continue
		},
	}
	require.NoError(t, s.Register(p))
	var reply string
	began := time.Now()
	serve(t, s, func() { reply = t.ask("open %d all", per) })
	took := time.Since(began)
	require.NoError(t, s.Unregister(p))
	guest := number(t, reply, "total")
	require.EqualValues(t, per*t.cfg.VCPUs, guest)
	assert.Equal(t, vmprobes.Stats{Hits: guest}, p.Stats(), "hits, of %s", reply)
	assert.Equal(t, guest, pre.Load())
	assert.Equal(t, guest, post.Load())
	assert.Zero(t, wrong.Load(), "handlers saw something else than the guest did")
	assert.NotContains(t, reply, "BAD")
	t.Logf("%d hits in %.1f s (%.0f a second, emulated time); guest: %s; %+v", guest, took.Seconds(), float64(guest)/took.Seconds(), reply, s.Stats())
}

// onThePath are functions that an openat runs through.
var onThePath = []string{
	"do_sys_openat2", "getname_flags", "do_filp_open", "path_openat", "alloc_empty_file", "init_file", "__alloc_file",
	"alloc_fd", "fd_install", "do_dentry_open", "vfs_open", "security_file_open", "terminate_walk", "path_init", "putname",
	"link_path_walk.part.0.constprop.0", "lookup_fast", "__d_lookup_rcu", "file_ra_state_init", "may_open", "simple_open",
}

// candidates finds instructions on the path of an openat that only the guest's
// processor can execute: not NOPs, and not emulated.
func candidates(t testing.TB, s *vmprobes.Session, kernel string) []*vmprobes.Probe {
	m, err := sysmap.ParseFile(kernel)
	require.NoError(t, err)
	var out []*vmprobes.Probe
	for _, f := range onThePath {
		sym, err := m.Lookup(f)
		if err != nil {
			continue
		}
		end, ok := m.FuncEnd(sym.Addr)
		if !ok || end-sym.Addr > 8192 {
			continue
		}
		code := make([]byte, end-sym.Addr)
		_, err = s.ReadMemory(vmprobes.Addr(sym.Addr), code)
		require.NoError(t, err)
		for off := 0; off < len(code); {
			in, err := x86.Decode(code[off:])
			if err != nil {
				break
			}
			if !in.CanEmulate() && !in.IsNop() && in.CanStep() == nil && !in.Branches() {
				out = append(out, &vmprobes.Probe{Symbol: f, Offset: uint64(off)})
			}
			off += in.Len
		}
	}
	return out
}

// testStepped compares hits at instructions that the processor itself must
// execute, in the two ways there are.
func testStepped(t labTest) {
	s := t.open(nil)
	sample, n, inPlace := 50, t.hits(2000), t.hits(300) // holding the other vCPUs takes its time
	var chosen []*vmprobes.Probe
	all := candidates(t, s, t.g.KernelPath())
	for len(all) > 0 && len(chosen) < 3 {
		batch := all[:min(len(all), 12)]
		all = all[len(batch):]
		var armed []*vmprobes.Probe
		for _, p := range batch {
			if err := s.Register(p); err != nil {
				require.True(t, errors.Is(err, vmprobes.ErrNoWayPast) || errors.Is(err, vmprobes.ErrNotProbeable), "%v: %v", p, err)
				continue
			}
			armed = append(armed, p)
		}
		if len(armed) == 0 {
			continue
		}
		serve(t, s, func() { t.ask("open %d 0", sample) })
		for _, p := range armed {
			require.NoError(t, s.Unregister(p))
			if p.Stats().Hits == uint64(sample) {
				chosen = append(chosen, p)
			}
		}
	}
	require.NotEmpty(t, chosen, "no instruction on the path of openat must be stepped")
	require.NoError(t, s.Close())

	for _, step := range []vmprobes.Stepping{vmprobes.StepAuto, vmprobes.StepInPlace} {
		s := t.open(&vmprobes.Options{Stepping: step})
		did := false
		for _, c := range chosen {
			var posts atomic.Uint64
			p := &vmprobes.Probe{Symbol: c.Symbol, Offset: c.Offset, Post: func(p *vmprobes.Probe, r *vmprobes.Regs, _ vmprobes.Flags) vmprobes.Action {
				posts.Add(1)
				return vmprobes.Continue
			}}
			if err := s.Register(p); err != nil {
				require.ErrorIs(t, err, vmprobes.ErrNoWayPast)
				continue
			}
			did = true
			n := n
			if step == vmprobes.StepInPlace {
				n = inPlace
			}
			var reply string
			began := time.Now()
			serve(t, s, func() { reply = t.ask("open %d all", n/t.cfg.VCPUs) })
			took := time.Since(began)
			require.NoError(t, s.Unregister(p))
			guest := number(t, reply, "total")
			assert.EqualValues(t, n, guest)
			assert.Equal(t, vmprobes.Stats{Hits: guest}, p.Stats(), "hits at %v", p)
			assert.Equal(t, guest, posts.Load(), "post handlers at %v", p)
			assert.NotContains(t, reply, "BAD")
			t.Logf("%v, stepping %d: %d hits in %.1f s; %s; %+v", p, step, guest, took.Seconds(), reply, s.Stats())
			break
		}
		if step == vmprobes.StepInPlace && t.g != nil && t.cfg.Kind == labguest.PVH && t.cfg.VCPUs > 1 {
			assert.False(t, did, "stepping in place can't be safe here")
		} else {
			assert.True(t, did, "no probe could be stepped (stepping %d)", step)
		}
		st := s.Stats()
		assert.Zero(t, st.Emulated)
		require.NoError(t, s.Close())
	}
}

// testHandlers checks that what handlers do takes effect in the guest.
func testHandlers(t labTest) {
	s := t.open(nil)
	var arg, viaRegs string
	deny := false
	wrapper := &vmprobes.Probe{Symbol: "sys_openat", Pre: func(p *vmprobes.Probe, r *vmprobes.Regs) vmprobes.Action {
		a, err := r.SyscallArg(1)
		assert.NoError(t, err)
		viaRegs, _ = p.ReadString(vmprobes.Addr(a), 256)
		return vmprobes.Continue
	}}
	var order []string
	inner := &vmprobes.Probe{Symbol: probed, Pre: func(p *vmprobes.Probe, r *vmprobes.Regs) vmprobes.Action {
		order = append(order, "first")
		arg, _ = p.ReadString(vmprobes.Addr(r.Arg(1)), 256)
		if deny {
			// Return from the function, with -EPERM, instead of executing it.
			ret, err := p.ReadUint64(vmprobes.Addr(r.SP))
			assert.NoError(t, err)
			r.SetResult(^uint64(0))
			r.IP, r.SP = ret, r.SP+8
		}
		return vmprobes.Continue
	}}
	second := &vmprobes.Probe{Symbol: probed, Pre: func(p *vmprobes.Probe, r *vmprobes.Regs) vmprobes.Action {
		order = append(order, "second")
		return vmprobes.Continue
	}}
	require.NoError(t, s.Register(wrapper, inner, second))
	serve(t, s, func() {
		assert.Contains(t, t.ask("openpath /proc/self/status"), "opened")
	})
	assert.Equal(t, "/proc/self/status", arg)
	assert.Equal(t, "/proc/self/status", viaRegs)
	assert.Equal(t, []string{"first", "second"}, order)
	deny = true
	serve(t, s, func() {
		assert.Contains(t, t.ask("openpath /proc/self/status"), "failed")
	})
	deny = false
	second.Disable()
	order = nil
	serve(t, s, func() {
		assert.Contains(t, t.ask("openpath /proc/self/status"), "opened")
	})
	assert.Equal(t, []string{"first"}, order)
	assert.NotZero(t, second.Flags()&vmprobes.FlagDisabled)

	// Writing to the guest: the name it opens becomes another one.
	inner2 := &vmprobes.Probe{Symbol: "do_sys_openat2", Pre: func(p *vmprobes.Probe, r *vmprobes.Regs) vmprobes.Action {
		_, err := p.WriteMemory(vmprobes.Addr(r.Arg(1)), []byte("/nosuch\x00"))
		assert.NoError(t, err)
		return vmprobes.Stop
	}}
	require.NoError(t, s.Unregister(wrapper, inner, second))
	require.NoError(t, s.Register(inner2))
	done := make(chan error, 1)
	go func() { done <- s.Loop(t.Context()) }()
	looping(t, s)
	assert.Contains(t, t.ask("openpath /proc/self/status"), "failed")
	require.NoError(t, <-done, "Stop ends Loop without error")
	assert.EqualValues(t, 1, inner2.Stats().Hits)
}

// testGuestsOwnInt3 checks that int3s which aren't ours reach the guest.
func testGuestsOwnInt3(t labTest) {
	s := t.open(nil)
	p := &vmprobes.Probe{Symbol: probed}
	require.NoError(t, s.Register(p))
	serve(t, s, func() {
		reply := t.ask("int3user 200")
		assert.Equal(t, field(t, reply, "sent"), field(t, reply, "sigtraps"))
		assert.EqualValues(t, 200, number(t, reply, "sigtraps"))
	})
}

// testUnserved checks that a guest runs on when nobody calls Loop, and that what
// it executed meanwhile is counted.
func testUnserved(t labTest) {
	s := t.open(nil)
	p := &vmprobes.Probe{Symbol: probed}
	require.NoError(t, s.Register(p))
	reply := t.ask("open 300 all")
	require.NoError(t, s.Unregister(p))
	assert.Equal(t, number(t, reply, "total"), p.Stats().Missed)
	assert.Zero(t, p.Stats().Hits)
}

// programsEnv names a folder with the examples.
const programsEnv = "VMPROBES_TEST_PROGRAMS"

// binary returns the path of a program that was brought into dom0.
func binary(t testing.TB, name string) string {
	t.Helper()
	for _, dir := range []string{os.Getenv(programsEnv), "/", "/bin", "/lab", "/tmp", filepath.Dir(os.Args[0])} {
		if st, err := os.Stat(filepath.Join(dir, name)); err == nil && st.Mode()&0o111 != 0 && !st.IsDir() {
			return filepath.Join(dir, name)
		}
	}
	if os.Getenv("VMPROBES_REQUIRE_LAB") != "" {
		t.Fatalf("%s isn't in this dom0: bring it with lab run --file", name)
	}
	t.Skipf("%s isn't in this dom0: bring it with lab run --file", name)
	return ""
}

// testExamples runs the example programs on the guest.
func testExamples(t labTest) {
	s := t.open(nil)
	addr, err := s.Lookup(probed)
	require.NoError(t, err)
	require.NoError(t, s.Close())
	t.Run("vmprobebio", func(tt *testing.T) {
		cmd := exec.Command(binary(tt, "vmprobebio"), "-n", "5", t.g.Name())
		out := start(tt, cmd, "vmprobe registered\n")
		t.ask("open 5 0")
		require.NoError(tt, <-out.done, "%s", out)
		assert.Equal(tt, 5, strings.Count(out.String(), "(/lab-probe-target)"), "%s", out)
		assert.Regexp(tt, `(?m)^\[1\] do_sys_openat2\(\) called\n -- filename: [0-9a-f]{8,} \(/lab-probe-target\)\n -- flags: [0-9a-f]{8}\n -- mode: [0-9a-f]{8}$`, out.String())
		assert.Contains(tt, out.String(), "vmprobe unregistered\ndo_sys_openat2() called 5 times.\n")
	})
	t.Run("vmprobebio sys_openat", func(tt *testing.T) {
		cmd := exec.Command(binary(tt, "vmprobebio"), "-n", "2", "-symbol", "sys_openat", t.g.Name())
		out := start(tt, cmd, "vmprobe registered\n")
		t.ask("open 2 0")
		require.NoError(tt, <-out.done, "%s", out)
		assert.Equal(tt, 2, strings.Count(out.String(), "(/lab-probe-target)"), "%s", out)
	})
	t.Run("opens", func(tt *testing.T) {
		cmd := exec.Command(binary(tt, "opens"), t.g.Name())
		out := start(tt, cmd, "watching ")
		t.ask("open 7 all")
		require.NoError(tt, cmd.Process.Signal(syscall.SIGINT))
		require.NoError(tt, <-out.done, "%s", out)
		n := 7 * t.cfg.VCPUs
		assert.Equal(tt, n, strings.Count(out.String(), `open "/lab-probe-target"`), "%s", out)
		assert.Equal(tt, n, strings.Count(out.String(), `look up "/lab-probe-target"`), "%s", out)
		assert.Len(tt, regexp.MustCompile(`init\[[\d/]+\] open "/lab-probe-target"`).FindAllString(out.String(), -1), n, "the task that hit: %s", out)
	})
	for _, program := range []string{"vmprobebio", "opens"} {
		t.Run(program+", reader goes away", func(tt *testing.T) {
			before := t.ask("text %#x 8", uint64(addr))
			cmd := exec.Command(binary(tt, program), t.g.Name())
			pipe, err := cmd.StdoutPipe()
			require.NoError(tt, err)
			require.NoError(tt, cmd.Start())
			_, err = bufio.NewReader(pipe).ReadString('\n') // the probes are in place, or will be
			require.NoError(tt, err)
			pipe.Close()
			t.ask("open 100 0")
			assert.Equal(tt, 1, exitStatus(tt, cmd), "it fails at the first hit that it can't tell of, and isn't killed")
			assert.Equal(tt, before, t.ask("text %#x 8", uint64(addr)), "its breakpoint is out")
		})
		t.Run(program+", no space", func(tt *testing.T) {
			before := t.ask("text %#x 8", uint64(addr))
			full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
			require.NoError(tt, err)
			defer full.Close()
			cmd := exec.Command(binary(tt, program), t.g.Name())
			cmd.Stdout = full
			require.NoError(tt, cmd.Start())
			assert.Equal(tt, 1, exitStatus(tt, cmd))
			assert.Equal(tt, before, t.ask("text %#x 8", uint64(addr)), "its breakpoint is out")
		})
	}
}

// exitStatus waits for a program that ends by itself, and returns its status.
func exitStatus(t testing.TB, cmd *exec.Cmd) int {
	t.Helper()
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	select {
	case <-ended:
		return cmd.ProcessState.ExitCode()
	case <-time.After(time.Minute):
		_ = cmd.Process.Signal(syscall.SIGINT) // it has probes in the guest
		<-ended
		t.Error("it doesn't end")
		return -1
	}
}

// run runs a program and returns the lines of its output.
func run(t testing.TB, program string, args ...string) []string {
	t.Helper()
	out, err := exec.Command(binary(t, program), args...).CombinedOutput()
	require.NoError(t, err, "%s", out)
	return strings.Split(strings.TrimSpace(string(out)), "\n")
}

// testLists compares XenAccess' lists with the guest's own.
func testLists(t labTest) {
	var want []string
	for _, l := range t.lines("modules") {
		want = append(want, strings.Fields(l)[0])
	}
	assert.Equal(t, want, run(t, "module-list", t.g.Name()))
	tasks := run(t, "process-list", t.g.Name())
	assert.Equal(t, "[    0] swapper/0", tasks[0])
	assert.Equal(t, "[    1] init", tasks[1])
	assert.InDelta(t, len(t.lines("ps"))+1, len(tasks), 3)
}

// proc is a program that runs and whose output can be read meanwhile.
type proc struct {
	qemutest.Buffer
	done chan error
}

// start starts a program and waits until its output contains want.
func start(t testing.TB, cmd *exec.Cmd, want string) *proc {
	t.Helper()
	p := &proc{done: make(chan error, 1)}
	cmd.Stdout, cmd.Stderr = p, p
	require.NoError(t, cmd.Start())
	go func() { p.done <- cmd.Wait() }()
	t.Cleanup(func() { cmd.Process.Kill() })
	for range 1200 {
		if strings.Contains(p.String(), want) {
			return p
		}
		select {
		case err := <-p.done:
			p.done <- err
			if strings.Contains(p.String(), want) {
				return p
			}
			t.Fatalf("%v ended (%v) without %q in its output:\n%s", cmd.Args, err, want, p)
		case <-time.After(50 * time.Millisecond):
		}
	}
	t.Fatalf("no %q in the output of %v:\n%s", want, cmd.Args, p)
	return nil
}

// testEnds ends a tool in each way while the guest is busy at the probe.
func testEnds(t labTest) {
	s := t.open(nil)
	addr, err := s.Lookup(probed)
	require.NoError(t, err)
	require.NoError(t, s.Close())
	before := t.ask("text %#x 16", uint64(addr))

	t.ask("busy 0 all")
	// moves waits until each vCPU makes calls.
	moves := func(tt *testing.T, round int) {
		before := t.ask("count")
		for cpu := range t.cfg.VCPUs {
			name := fmt.Sprintf("cpu%d", cpu)
			ok := false
			for i := 0; i < 50 && !ok; i++ {
				time.Sleep(20 * time.Millisecond)
				ok = number(tt, t.ask("count"), name) > number(tt, before, name)
			}
			require.True(tt, ok, "round %d: %s stands still: %s, then %s", round, name, before, t.ask("count"))
		}
	}
	for _, end := range []string{"SIGINT", "SIGTERM", "panic"} {
		t.Run(end, func(tt *testing.T) {
			for i := range t.rounds() {
				cmd := exec.Command(os.Args[0], "-test.run=^TestChild$")
				cmd.Env = append(os.Environ(), "VMPROBES_TEST_CHILD="+end, "VMPROBES_TEST_DOMAIN="+t.g.Name())
				out := start(tt, cmd, "hits\n")
				switch end {
				case "SIGINT":
					cmd.Process.Signal(syscall.SIGINT)
				case "SIGTERM":
					cmd.Process.Signal(syscall.SIGTERM)
				}
				err := <-out.done
				if end == "panic" {
					require.Error(tt, err)
					require.Contains(tt, out.String(), "the handler panics", "round %d", i)
				} else {
					require.NoError(tt, err, "round %d: %s", i, out)
					require.Contains(tt, out.String(), "interrupted by a signal")
				}
				require.Equal(tt, before, t.ask("text %#x 16", uint64(addr)), "round %d: text", i)
				moves(tt, i)
			}
			tt.Logf("%d times", t.rounds())
		})
	}
	reply := t.ask("stop")
	assert.NotContains(t, reply, "BAD")
}

// TestChild is the tool that testEnds ends.
func TestChild(t *testing.T) {
	end := os.Getenv("VMPROBES_TEST_CHILD")
	if end == "" {
		t.Skip("only as a child process of TestLab")
	}
	n := 0
	p := &vmprobes.Probe{
		DomainName: os.Getenv("VMPROBES_TEST_DOMAIN"),
		Symbol:     probed,
		Pre: func(*vmprobes.Probe, *vmprobes.Regs) vmprobes.Action {
			if n++; n == 20 {
				fmt.Println("hits")
				if end == "panic" {
					panic("the handler panics")
				}
			}
			return vmprobes.Continue
		},
	}
	if end == "open" {
		openAtOnce(t, p.DomainName)
		return
	}
	watchdog, _ := time.ParseDuration(os.Getenv("VMPROBES_TEST_WATCHDOG"))
	if os.Getenv("VMPROBES_TEST_KERNEL") == "" && watchdog != 0 {
		s, err := vmprobes.Open(t.Context(), p.DomainName, &vmprobes.Options{Watchdog: watchdog})
		require.NoError(t, err)
		require.NoError(t, s.Register(p))
		fmt.Println("armed")
		require.NoError(t, s.Loop(t.Context()))
		return
	}
	if end == "alone" { // nobody takes over from it, and all it has is emulated
		s, err := vmprobes.Open(t.Context(), p.DomainName, &vmprobes.Options{NoGuardian: true})
		require.NoError(t, err)
		require.NoError(t, s.Register(p))
		fmt.Println("armed")
		require.NoError(t, s.Loop(t.Context()))
		return
	}
	if kind := os.Getenv("VMPROBES_TEST_STEPPING"); kind != "" {
		step := map[string]vmprobes.Stepping{"auto": vmprobes.StepAuto, "out-of-line": vmprobes.StepOutOfLine, "in-place": vmprobes.StepInPlace}[kind]
		s, err := vmprobes.Open(t.Context(), p.DomainName, &vmprobes.Options{Stepping: step, Watchdog: watchdog})
		require.NoError(t, err)
		require.NoError(t, s.Register(p))
		// Instructions that aren't emulated, too.
		n := 0
		for _, c := range candidates(t, s, os.Getenv("VMPROBES_TEST_KERNEL")) {
			c.Post = func(*vmprobes.Probe, *vmprobes.Regs, vmprobes.Flags) vmprobes.Action { return vmprobes.Continue }
			if s.Register(c) == nil {
				n++
			}
			if n == 3 {
				break
			}
		}
		require.NoError(t, s.Loop(t.Context()))
		return
	}
	require.NoError(t, vmprobes.Register(p))
	err := vmprobes.Loop(t.Context(), p)
	fmt.Println(err)
	require.True(t, errors.Is(err, vmprobes.ErrInterrupted))
	require.NoError(t, vmprobes.Unregister(p))
}

// openAtOnce is a tool of testOpenAtOnce: it opens the guest at an instant that it is told,
// says what came of it, and closes it when it is told to.
func openAtOnce(t *testing.T, name string) {
	fmt.Println("ready")
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		at, err := strconv.ParseInt(in.Text(), 10, 64)
		require.NoError(t, err)
		for time.Now().UnixNano() < at {
		}
		s, err := vmprobes.Open(t.Context(), name, nil)
		switch {
		case err == nil:
			fmt.Println("owner")
			require.True(t, in.Scan())
			require.NoError(t, s.Close())
			fmt.Println("left")
		case errors.Is(err, vmprobes.ErrBusy):
			fmt.Println("busy:", err)
		default:
			fmt.Println("failed:", err)
		}
	}
}

// TestLabStock checks that a PV guest on a hypervisor without GDBSX is left alone.
func TestLabStock(t *testing.T) {
	labguest.Require(t, "pv-stock")
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	g, err := labguest.Start(ctx, labguest.Config{Name: "a3guest", Kind: labguest.PV})
	require.NoError(t, err)
	defer g.Destroy()
	lt := labTest{t, g, labguest.Config{}}
	lt.keepText()
	for range 3 {
		_, err := vmprobes.Open(t.Context(), "a3guest", nil)
		require.ErrorIs(t, err, vmprobes.ErrNoGDBSX)
		assert.ErrorContains(t, err, "CONFIG_GDBSX")
	}
	assert.EqualValues(t, 500, number(t, lt.ask("open 500 0"), "total"))
	lt.unharmed()
}
