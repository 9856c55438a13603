package linux_test

import (
	"bufio"
	"compress/gzip"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/target"
	"github.com/vmprobes/vmprobes/linux"
	"github.com/vmprobes/vmprobes/sysmap"
)

// truthEnv names a folder with a guest's memory, in the file image, and what the
// guest itself said at that moment: kallsyms.gz and modules, from its /proc, and
// ps, with lines "pid|comm|ppid".
const truthEnv = "VMPROBES_TEST_GUEST"

// boundWorker is a kernel worker to whose name /proc adds what it works at.
var boundWorker = regexp.MustCompile(`^kworker/u?[0-9]`)

func TestTruth(t *testing.T) {
	dir := os.Getenv(truthEnv)
	if dir == "" {
		t.Skip(truthEnv + " is not set: it names a folder with a guest's memory and what the guest said of itself")
	}
	g, err := target.Open(t.Context(), "file:"+filepath.Join(dir, "image"))
	require.NoError(t, err)
	defer g.Close()
	k, err := linux.Discover(t.Context(), g, nil)
	require.NoError(t, err)

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
	require.NoError(t, err)
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
	all, err := k.Modules()
	require.NoError(t, err)
	for _, m := range all {
		got = append(got, fmt.Sprintf("%s %d %v %x", m.Name, m.Size, m.State, m.Base))
	}
	assert.Equal(t, want, got, "modules")

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

func TestInfer(t *testing.T) {
	dir := os.Getenv(truthEnv)
	if dir == "" {
		t.Skip(truthEnv + " is not set")
	}
	g, err := target.Open(t.Context(), "file:"+filepath.Join(dir, "image"))
	require.NoError(t, err)
	defer g.Close()
	k, err := linux.Discover(t.Context(), g, nil)
	require.NoError(t, err)
	types, err := k.Types()
	require.NoError(t, err)
	for _, without := range []string{"types", "types and init_task"} {
		t.Run("without "+without, func(t *testing.T) {
			k2, err := k.InferTypes(without != "types")
			require.NoError(t, err)
			inferred, err := k2.Types()
			require.NoError(t, err)
			base := uint64(0)
			if without != "types" {
				a, err := inferred.Offset("task_struct.comm")
				require.NoError(t, err)
				b, err := types.Offset("task_struct.comm")
				require.NoError(t, err)
				base = a.Offset - b.Offset
			}
			for _, path := range []string{"task_struct.comm", "task_struct.tasks", "task_struct.pid", "task_struct.tgid", "task_struct.mm", "task_struct.real_parent", "mm_struct.pgd"} {
				want, err := types.Offset(path)
				require.NoError(t, err)
				got, err := inferred.Offset(path)
				if without != "types" && (path == "mm_struct.pgd" || path == "task_struct.real_parent") {
					continue // not without symbols of data
				}
				if assert.NoError(t, err) {
					assert.Equal(t, want.Offset, got.Offset-base, path)
				}
			}
			want, err := k.Processes(true)
			require.NoError(t, err)
			got, err := k2.Processes(true)
			require.NoError(t, err)
			for i := range want {
				assert.Equal(t, fmt.Sprint(want[i].PID, want[i].Comm, want[i].MM), fmt.Sprint(got[i].PID, got[i].Comm, got[i].MM))
			}
			for _, r := range k2.Explain() {
				t.Log(r)
			}
		})
	}
}

func TestKernelTables(t *testing.T) {
	dir := os.Getenv(truthEnv)
	if dir == "" {
		t.Skip(truthEnv + " is not set")
	}
	g, err := target.Open(t.Context(), "file:"+filepath.Join(dir, "image"))
	require.NoError(t, err)
	defer g.Close()
	k, err := linux.Discover(t.Context(), g, nil)
	require.NoError(t, err)
	calls, err := k.Syscalls()
	require.NoError(t, err)
	t.Log(len(calls), calls[0])
	c, err := k.Syscall("openat")
	require.NoError(t, err)
	t.Log(c.Number, c)
	mt, err := k.ModuleTypes()
	require.NoError(t, err)
	f, err := mt.Offset("nf_tables:nft_set.name")
	t.Log(f.Offset, err)
	f, err = mt.Offset("nf_tables:nft_pktinfo.flags")
	t.Log(f.Offset, err)
	_, err = k.FtraceSites()
	require.NoError(t, err)
	for _, n := range []string{"do_sys_openat2", "asm_exc_page_fault", "do_int3", "__schedule", "get_kprobe", "native_write_msr"} {
		a, err := k.Symbols().Lookup(n)
		require.NoError(t, err)
		t.Log(n, k.Probeable(a.Addr), k.Probeable(a.Addr+1))
	}
	for cpu := range 2 {
		base, err := k.PerCPU(cpu)
		require.NoError(t, err)
		cur, err := k.Current(base)
		require.NoError(t, err)
		cg, err := k.Cgroup(cur)
		t.Log(cpu, cur, cg, err)
	}
	tasks, err := k.Processes(false)
	require.NoError(t, err)
	for _, p := range tasks {
		args, err := k.Cmdline(p)
		th, terr := k.Threads(p)
		if p.MM != 0 {
			t.Logf("%v %q %v threads %v %v uid %d", p, args, err, th, terr, p.UID)
		}
	}
	for _, r := range k.Explain() {
		t.Log(r)
	}
}
