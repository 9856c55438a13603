package linux_test

import (
	"bufio"
	"compress/gzip"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/target"
	"github.com/vmprobes/vmprobes/linux"
	"github.com/vmprobes/vmprobes/paging"
	"github.com/vmprobes/vmprobes/sysmap"
)

// truthEnv names a folder with a guest's memory, in the file image, and what the
// guest itself said at that moment: kallsyms.gz and modules, from its /proc, ps, with
// lines "pid|comm|ppid", blacklist, the file of that name in debugfs' kprobes, and
// syscalls, those that its tracefs has events for. "make test-oracles" makes one.
const truthEnv = "VMPROBES_TEST_GUEST"

// boundWorker is a kernel worker to whose name /proc adds what it works at.
var boundWorker = regexp.MustCompile(`^kworker/u?[0-9]`)

// saved returns the kernel in the image.
func saved(t *testing.T) *linux.Kernel {
	t.Helper()
	dir := os.Getenv(truthEnv)
	if dir == "" {
		if os.Getenv("VMPROBES_REQUIRE_ORACLES") == "1" {
			t.Fatal(truthEnv + " is not set")
		}
		t.Skip(truthEnv + " is not set: it names a folder with a guest's memory and what the guest said of itself")
	}
	g, err := target.Open(t.Context(), "file:"+filepath.Join(dir, "image"))
	require.NoError(t, err)
	t.Cleanup(func() { g.Close() })
	k, err := linux.Discover(t.Context(), g, nil)
	require.NoError(t, err)
	return k
}

func TestTruth(t *testing.T) {
	dir := os.Getenv(truthEnv)
	k := saved(t)

	var want, got []string
	f, err := os.Open(filepath.Join(dir, "kallsyms.gz"))
	require.NoError(t, err)
	defer f.Close()
	z, err := gzip.NewReader(f)
	require.NoError(t, err)
	truth, err := sysmap.Parse(z)
	require.NoError(t, err)
	for s := range truth.All() {
		if s.Module != "bpf" && s.Module != "__builtin__kprobes" && s.Module != "__builtin__ftrace" {
			want = append(want, fmt.Sprintf("%x %c %s %s", s.Addr, s.Type, s.Name, s.Module))
		}
	}
	for s := range k.Symbols().All() {
		got = append(got, fmt.Sprintf("%x %c %s %s", s.Addr, s.Type, s.Name, s.Module))
	}
	mods, err := k.ModuleSymbols()
	data := !errors.Is(err, sysmap.ErrNotFound) // CONFIG_KALLSYMS_ALL: there are symbols of data
	if data {
		require.NoError(t, err)
	}
	for _, s := range mods {
		got = append(got, fmt.Sprintf("%x %c %s %s", s.Addr, s.Type, s.Name, s.Module))
	}
	t.Logf("%d symbols, %d of modules", len(got), len(mods))
	same(t, "symbols", want, got)

	want, got = nil, nil
	for _, l := range lines(t, filepath.Join(dir, "modules")) {
		f := strings.Fields(l) // name size users dependents state address
		want = append(want, strings.Join([]string{f[0], f[1], f[4], strings.TrimPrefix(f[5], "0x")}, " "))
	}
	if data {
		all, err := k.Modules()
		require.NoError(t, err)
		for _, m := range all {
			got = append(got, fmt.Sprintf("%s %d %v %x", m.Name, m.Size, m.State, m.Base))
		}
		assert.Equal(t, want, got, "modules")
	}

	want, got = nil, nil
	for _, l := range lines(t, filepath.Join(dir, "ps")) {
		// /proc shows the whole name of a kernel thread, and what a worker does.
		f := strings.Split(l, "|")
		comm := f[1]
		if boundWorker.MatchString(comm) {
			comm, _, _ = strings.Cut(comm, "-")
		}
		want = append(want, fmt.Sprintf("%s|%.15s|%s", f[0], comm, f[2]))
	}
	tasks, err := k.Processes(false)
	require.NoError(t, err)
	// Between the list and the image the guest has started its last process.
	if n := len(tasks); n == len(want)+1 {
		t.Logf("%v came later", tasks[n-1])
		tasks = tasks[:n-1]
	}
	for _, p := range tasks {
		got = append(got, fmt.Sprintf("%d|%s|%d", p.TGID, p.Comm, p.PPID))
	}
	same(t, "processes", want, got)
	for _, r := range k.Explain() {
		t.Log(r)
	}
}

func lines(t *testing.T, file string) []string {
	f, err := os.Open(file)
	require.NoError(t, err)
	defer f.Close()
	var out []string
	for s := bufio.NewScanner(f); s.Scan(); {
		out = append(out, s.Text())
	}
	return out
}

// same compares two large lists as sets, and shows what only one of them has.
func same(t *testing.T, what string, want, got []string) {
	t.Helper()
	count := make(map[string]int)
	for _, s := range want {
		count[s]++
	}
	for _, s := range got {
		count[s]--
	}
	shown := 0
	for s, n := range count {
		if n != 0 && shown < 20 {
			shown++
			t.Errorf("%s: %+d %s", what, n, s)
		}
	}
}

// TestInfer compares what is inferred from the structures with the kernel's own
// types, if it has any.
func TestInfer(t *testing.T) {
	k := saved(t)
	types, err := k.Types()
	require.NoError(t, err)
	if types.Source() == "inferred" {
		t.Skip("the guest has no types to compare with")
	}
	for _, without := range []string{"types", "types and symbols of data"} {
		t.Run("without "+without, func(t *testing.T) {
			k2, err := k.InferTypes(without != "types")
			require.NoError(t, err)
			inferred, err := k2.Types()
			require.NoError(t, err)
			for _, path := range []string{"task_struct.comm", "task_struct.tasks", "task_struct.pid", "task_struct.tgid", "task_struct.mm", "task_struct.real_parent", "mm_struct.pgd"} {
				want, err := types.Offset(path)
				require.NoError(t, err)
				got, err := inferred.Offset(path)
				require.NoError(t, err)
				assert.Equal(t, want.Offset, got.Offset, path)
			}
			if without == "types" { // the tables of places for probes
				want, err := k.FtraceSites()
				require.NoError(t, err)
				got, err := k2.FtraceSites()
				require.NoError(t, err)
				assert.Equal(t, want, got)
				assert.Equal(t, rung(k, "probeable"), rung(k2, "probeable"))
			}
			want, err := k.Processes(true)
			require.NoError(t, err)
			got, err := k2.Processes(true)
			require.NoError(t, err)
			require.Len(t, got, len(want))
			for i := range want {
				assert.Equal(t, fmt.Sprint(want[i].Addr, want[i].PID, want[i].PPID, want[i].Comm, want[i].MM),
					fmt.Sprint(got[i].Addr, got[i].PID, got[i].PPID, got[i].Comm, got[i].MM))
			}
		})
	}
}

// rung returns what was found in one of the steps of discovery.
func rung(k *linux.Kernel, name string) string {
	for _, r := range k.Explain() {
		if r.Name == name {
			return r.Found
		}
	}
	return ""
}

// TestProcesses checks what is known of every booted guest.
func TestProcesses(t *testing.T) {
	k := saved(t)
	init, err := k.Process(1)
	require.NoError(t, err)
	root, err := k.UserRoot(init)
	require.NoError(t, err)
	text, err := k.Symbols().Lookup("_text")
	require.NoError(t, err)
	_, err = k.Memory().Translate(root, paging.VAddr(text.Addr))
	require.NoError(t, err, "it maps the kernel, too")
	kthreadd, err := k.Process(2)
	require.NoError(t, err)
	assert.Equal(t, "kthreadd", kthreadd.Comm)
	_, err = k.UserRoot(kthreadd)
	require.ErrorIs(t, err, linux.ErrNoMemory)
}

// TestKernelTables compares the kernel's tables with what the guest's debugfs and
// tracefs showed of them.
func TestKernelTables(t *testing.T) {
	dir := os.Getenv(truthEnv)
	k := saved(t)
	calls, err := k.Syscalls()
	require.NoError(t, err)
	var names []string
	for _, c := range calls {
		if c.Number >= 0 { // one without is in no table, and has no event
			names = append(names, c.Name)
		}
	}
	same(t, "system calls", lines(t, filepath.Join(dir, "syscalls")), names)
	blacklist := lines(t, filepath.Join(dir, "blacklist"))
	assert.Greater(t, len(blacklist), 300)
	c, err := k.Syscall("openat")
	require.NoError(t, err)
	assert.Equal(t, 257, c.Number)
	assert.Equal(t, "openat(int dfd, const char * filename, int flags, umode_t mode)", c.String())

	mt, err := k.ModuleTypes()
	require.NoError(t, err)
	_, err = mt.Offset("tun:tun_struct.numqueues")
	require.NoError(t, err)
	_, err = mt.Offset("nosuchmodule:tun_struct.numqueues")
	require.Error(t, err)

	n, err := k.FtraceSites()
	require.NoError(t, err)
	assert.Greater(t, n, 30000)
	var found strings.Builder
	for _, r := range k.Explain() {
		found.WriteString(r.Found)
	}
	assert.Contains(t, found.String(), fmt.Sprintf(", %d blacklist entries", len(blacklist)))

	for name, want := range map[string][2]string{ // why not at +0, and at +1
		"do_sys_openat2":     {"", "ftrace"},
		"asm_exc_page_fault": {"blacklist", "blacklist"},
		"do_int3":            {"blacklist", "blacklist"},
		"get_kprobe":         {"blacklist", "blacklist"},
		"native_write_msr":   {"", "not an instruction boundary"},
	} {
		a, err := k.Symbols().Lookup(name)
		require.NoError(t, err)
		for off, why := range want {
			err := k.Probeable(a.Addr + uint64(off))
			if why == "" {
				assert.NoError(t, err, "%s+%d", name, off)
				continue
			}
			require.ErrorIs(t, err, linux.ErrNotProbeable)
			assert.ErrorContains(t, err, why, "%s+%d", name, off)
		}
	}
	mods, err := k.Modules()
	require.NoError(t, err)
	require.NotEmpty(t, mods)
	syms, err := k.ModuleSymbols()
	require.NoError(t, err)
	for _, m := range mods {
		// A module may begin with the bytes that are kept before a function.
		i := slices.IndexFunc(syms, func(s sysmap.Symbol) bool {
			return s.Module == m.Name && s.Addr >= m.Base && s.Type == 't' && !strings.HasPrefix(s.Name, "__pfx_")
		})
		require.GreaterOrEqual(t, i, 0, m.Name)
		assert.NoError(t, k.Blacklisted(syms[i].Addr), syms[i].Name)
	}
	i := slices.IndexFunc(syms, func(s sysmap.Symbol) bool { return s.Name == "tun_chr_open" })
	require.Positive(t, i)
	assert.NoError(t, k.Probeable(syms[i].Addr))
	assert.Error(t, k.Probeable(syms[i].Addr+1), "in an instruction that ftrace rewrites")
	for cpu := range 2 {
		base, err := k.PerCPU(cpu)
		require.NoError(t, err)
		cur, err := k.Current(base)
		require.NoError(t, err)
		assert.NotEmpty(t, cur.Comm)
		cg, err := k.Cgroup(cur)
		require.NoError(t, err)
		assert.Equal(t, "/", cg)
	}
	init, err := k.Process(1)
	require.NoError(t, err)
	args, err := k.Cmdline(init)
	require.NoError(t, err)
	assert.Equal(t, []string{"/bin/busybox", "sh", "/init"}, args)
	threads, err := k.Threads(init)
	require.NoError(t, err)
	assert.Equal(t, []linux.Task{init}, threads)
	layout, err := k.Layout(init)
	require.NoError(t, err)
	b := make([]byte, 4)
	require.NoError(t, k.ReadUser(init, layout.StartCode&^0xfff, b))
}
